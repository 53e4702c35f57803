"""Option groups that the stage scripts share, and what they have in common around `main`."""

import argparse
import dataclasses
import errno
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from tqdm import tqdm

from prime.errors import InputError, tell
from prime.runs.files import stop_between_writes
from prime.runs.run import Run
from prime.runs.workers import keep_freed_memory, limit_threads, share, world
from prime.users.data import User, load_profiles, load_users, select_indices, user_cost
from prime.users.prompts import RECENT_K
from prime.users.tasks import TASKS, Task, get_task
from prime.users.templates import load_templates

# Options that change where or how fast a run works, never what it finds.
NOT_SETTINGS = (
    "output_dir", "user_idxs", "max_batch_tokens", "device", "debug", "anchors_per_batch", "users_per_batch",
    "convert_to", "export_full", "gradient_checkpointing", "plan", "device_memory", "device_map", "noise_key", "parser",
)  # fmt: skip


class HasId(Protocol):
    @property
    def user_id(self) -> str: ...


WithId = TypeVar("WithId", bound=HasId)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults that tell something, and the script's docstring as it is written."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        if action.default is None or action.nargs == 0:
            return action.help
        return super()._get_help_string(action)


def new_parser(doc: str | None, *, reads_data: bool = True) -> argparse.ArgumentParser:
    """Parser with the options that every stage has. `reads_data`: it reads the files of data/README.md."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=HelpFormatter, allow_abbrev=False)
    parser.add_argument("--task_name", required=True, choices=tuple(TASKS), help="task, of the table in users/tasks.py")
    if reads_data:
        parser.add_argument("--data_dir", help="folder of the task's data files; default ./data/<task_name>")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(parser=parser)  # for the options' defaults, see `open_run`
    return parser


def add_seed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seed", type=int, default=0, help="run seed; each user's own is derived from it and the id")


def add_model(parser: argparse.ArgumentParser, *, with_task_adapter: bool, named: str = "") -> None:
    """Options of the model. `named`: it goes by --model_name, with this default, and may be a name of the hub."""
    group = parser.add_argument_group("model")
    if named:
        told = "instruction-tuned model: a name of the Hugging Face hub, or a directory"
        group.add_argument("--model_name", dest="llama_model_path", metavar="NAME_OR_DIR", default=named, help=told)
    else:
        told = "directory of the base model, of Hugging Face or Meta"
        group.add_argument("--llama_model_path", required=True, help=told)
    group.add_argument("--tokenizer_path", help="directory of the tokenizer; default the model's")
    group.add_argument(
        "--convert_to", help="keep a Meta checkpoint as a Hugging Face directory here, and use that; default: in memory"
    )
    if with_task_adapter:
        group.add_argument(
            "--lora_ckpt",
            required=True,
            help="task adapter: PEFT directory of stage 1 (or <directory>/lora_ckpt.pt), or a published lora_ckpt.pt",
        )
    group.add_argument("--target_modules", default="q_proj,k_proj,v_proj,o_proj", help="modules that carry adapters")
    if not named:
        add_plan(group)
    group.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="where to compute")
    group.add_argument(
        "--dtype",
        default="auto",
        choices=("auto", "float32", "bfloat16", "float16"),
        help="of the base model; auto: bfloat16 on a GPU, float32 on a CPU",
    )
    group.add_argument(
        "--max_batch_tokens", type=natural, default=0, help="tokens of one pass; 0 = chosen for the device"
    )


def add_plan(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--plan",
        action="store_true",
        help="load no weights; tell parameters, bytes and batches of this run, and whether it fits the device",
    )
    group.add_argument(
        "--device_memory",
        type=non_negative,
        default=0.0,
        help="GiB that --plan may use, also of GPUs that are not there (with --device_map of all together); 0 = what "
        "is free now",
    )


def add_device_map(parser: argparse.ArgumentParser) -> None:
    """For stages that train nothing: one model on several devices, see `prime.checkpoints.placement`."""
    parser.add_argument(
        "--device_map",
        help="part the model among all GPUs: auto, balanced, balanced_low_0, sequential, or a JSON file of modules "
        "and devices (docs/models.md); default: all on one device",
    )


def add_prompts(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("prompts")
    group.add_argument("--prompt_path", help="template file in the published schema; default: the built-in wording")
    group.add_argument("--max_length", type=positive, default=3000, help="tokens of a prompt with its answer")


def add_history(parser: argparse.ArgumentParser) -> None:
    add_prompts(parser)
    parser.add_argument("--recent_k", type=natural, default=RECENT_K, help="history items used, the last ones; 0 = all")


def add_decoding(parser: argparse.ArgumentParser) -> None:
    group = add_sampling(parser)
    group.add_argument("--k_list", type=int_list, default=(1, 2, 4), help="retrieved items in test prompts, beside 0")


def add_sampling(parser: argparse.ArgumentParser, max_gen_len: int = 100) -> argparse._ArgumentGroup:
    group = parser.add_argument_group("decoding")
    group.add_argument("--temperature", type=non_negative, default=0.1, help="of sampling; 0 = greedy")
    group.add_argument("--top_p", type=fraction, default=0.9, help="probability mass that sampling keeps")
    group.add_argument("--max_gen_len", type=positive, default=max_gen_len, help="new tokens of an answer at most")
    return group


def add_history_decoding(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--train_gen_len", type=positive, default=100, help="new tokens of an answer to a history record at most"
    )


def add_training(parser: argparse.ArgumentParser, lr: float, clip: float, ranks: str = "") -> None:
    """Options of a LoRA's training. `ranks` tells the default ranks where the script chooses by another option."""
    rank, told, scale_told = (None, f"; default {ranks}", "; default the rank") if ranks else (8, "", "")
    group = parser.add_argument_group("training")
    group.add_argument("--lr", type=non_negative, default=lr, help="learning rate at the start of the cosine")
    group.add_argument("--min_lr", type=non_negative, default=0.0, help="learning rate at its end")
    group.add_argument("--weight_decay", type=non_negative, default=0.01, help="of AdamW")
    group.add_argument("--clip", type=non_negative, default=clip, help="gradient norm of an adapter at most")
    group.add_argument("--batch_size", type=positive, default=6, help="records of one step of an adapter")
    group.add_argument("--epochs", type=positive, default=3, help="passes over the records")
    group.add_argument("--lora_r", type=positive, default=rank, help=f"rank of the adapter{told}")
    group.add_argument(
        "--lora_alpha", type=positive, default=rank, help=f"scale of the adapter times its rank{scale_told}"
    )
    group.add_argument("--lora_dropout", type=below_one, default=0.05, help="dropout in front of the adapter")
    add_checkpointing(group)


def add_checkpointing(group: argparse._ArgumentGroup) -> None:
    """Options of every stage that trains."""
    group.add_argument("--device_map", type=_not_in_training, help=argparse.SUPPRESS)
    group.add_argument(
        "--gradient_checkpointing",
        action="store_true",
        help="recompute each layer in the backward pass: a fraction of the memory, a third more time, the same numbers",
    )


def add_privacy(parser: argparse.ArgumentParser) -> None:
    """Differentially private training, see `prime.bank.dp`. Batch size and epochs are then expectations."""
    group = parser.add_argument_group("differential privacy")
    group.add_argument(
        "--enable_dp", action="store_true", help="protect each history item: DP-SGD with AdamW, in place of --clip"
    )
    group.add_argument("--epsilon", type=above_zero, help="privacy budget of one training; noise is chosen to keep it")
    group.add_argument("--sigma", type=above_zero, help="or the noise: its standard deviation over the clip norm")
    group.add_argument("--delta", type=above_zero, default=1e-5, help="probability beyond epsilon; far below 1 / items")
    group.add_argument(
        "--max_per_sample_grad_norm", type=above_zero, default=1.0, help="clip norm: of an item's gradient at most"
    )
    group.add_argument("--accountant", default="rdp", choices=("rdp", "prv"), help="Opacus'; prv: tighter, slower")
    group.add_argument(
        "--noise_key",
        help="file with the secret that noise is drawn from, made if absent; default <output_dir>/noise.key",
    )


def add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--export_full",
        action="store_true",
        help="also write <user>/adapter_full, relative to the downloaded base: task and personal adapter in one",
    )


def add_users(parser: argparse.ArgumentParser, whom: str) -> None:
    parser.add_argument("--user_idxs", help=f"{whom} to work on, e.g. 0-100 (end not included) or 3,7; default all")


# -- option types ---------------------------------------------------------------------------------------------------


def _not_in_training(text: str) -> str:
    told = "a stage that trains keeps its model on one device; on more GPUs run more processes (docs/scaling.md)"
    raise argparse.ArgumentTypeError(told)


def _number(kind: type, low: float, high: float, what: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return value

    return parse


natural = _number(int, 0, 2**31, "a whole number from 0")
positive = _number(int, 1, 2**31, "a whole number from 1")
non_negative = _number(float, 0, 1e9, "a number from 0")
above_zero = _number(float, 1e-9, 1e9, "a number above 0")
fraction = _number(float, 0, 1, "a number from 0 to 1")
below_one = _number(float, 0, 1 - 1e-9, "a number from 0 to less than 1")


def int_list(text: str) -> tuple[int, ...]:
    """`1,2,4` -> (1, 2, 4); empty text -> ()."""
    return tuple(natural(part.strip()) for part in text.split(",") if part.strip())


def penalty_list(text: str) -> tuple[float, ...]:
    """`0,0.1,1` -> (0.0, 0.1, 1.0), each once and at least one."""
    found = tuple(dict.fromkeys(non_negative(part.strip()) for part in text.split(",") if part.strip()))
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r} names no penalty")
    return found


def method_name(text: str) -> str:
    """A row's name in the table: letters, digits and underscores."""
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,31}", text) or text in ("best_sharer", "uniform"):
        raise argparse.ArgumentTypeError(f"{text!r} is no name of a row: a-z, 0-9, _, and not that of a baseline")
    return text


# -- what scripts do first and last ---------------------------------------------------------------------------------


class Texts(NamedTuple):
    """What turns users into prompts: the task, its templates, the users' textual profiles."""

    task: Task
    templates: Mapping[str, str]
    profiles: Mapping[str, str] | None  # None: the data has no profile file
    others: Sequence[Mapping[str, str]] = ()  # items of other users, see `asked_as_queries`


def data_dir(args: argparse.Namespace) -> Path:
    return Path(args.data_dir or f"./data/{args.task_name}")


def load_texts(args: argparse.Namespace) -> Texts:
    """Task, templates and profiles; without profile-id2text.json there are no prompts with a profile."""
    task = get_task(args.task_name)
    path = data_dir(args) / "profile-id2text.json"
    profiles = load_profiles(path) if path.exists() else None
    if profiles is None:
        tell(f"{path}: not there; prompts with a textual profile are left out (gen_profile.py makes it)")
    return Texts(task, load_templates(args.prompt_path, task), profiles)


def asked_as_queries(args: argparse.Namespace, texts: Texts) -> Texts:
    """For histories asked as test queries: the test's metrics, and items of the base users for wrong references."""
    task = dataclasses.replace(texts.task, history_metrics=texts.task.metrics, history_labels=texts.task.labels)
    if task.query_parts == 1:
        return texts._replace(task=task)
    users = load_users(data_dir(args) / "user_base_LLM.json", task)
    return texts._replace(task=task, others=[item for user in users for item in user.profile])


def load_test_users(args: argparse.Namespace, task: Task) -> list[User]:
    return load_users(data_dir(args) / "test_100" / "user_test_100.json", task, need_queries=True)


def load_candidates(args: argparse.Namespace, task: Task) -> list[User]:
    return load_users(data_dir(args) / "user_anchor_candidate.json", task)


def base_name(args: argparse.Namespace) -> str:
    """Directory of the base model as adapters name it: the kept conversion of a Meta checkpoint, or what was given."""
    return args.convert_to or args.llama_model_path


def target_modules(args: argparse.Namespace) -> list[str]:
    return [name.strip() for name in args.target_modules.split(",")]


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The options a result depends on, for the run's record."""
    return {key: value for key, value in vars(args).items() if key not in NOT_SETTINGS}


def open_run(args: argparse.Namespace, root: Path | str, stage: str, method: str, **more: Any) -> Run:
    """The run directory `root` of a stage; `more` are settings beside the options.

    A directory made before an option came was made with the option left alone.
    """
    return Run(root, stage, method, settings_of(args) | more, args.parser.get_default)


def bar(total: int, what: str, unit: str = "row") -> tqdm:
    """A progress bar of the first process, silent when the output is no terminal."""
    silent = world().rank > 0 or None
    return tqdm(total=total, desc=what, unit=unit, unit_scale=unit == "B", disable=silent, leave=False)


def open_users(users: Sequence[User], spec: str | None, done: Callable[[str], bool]) -> list[tuple[int, User]]:
    """(index, user) of the users named by `--user_idxs` that are not finished."""
    return [(i, users[i]) for i in select_indices(spec, len(users)) if not done(users[i].user_id)]


def open_groups(users: Sequence[WithId], size: int, done: Callable[[str], bool]) -> list[Sequence[WithId]]:
    """Users, or what else has an id, in groups of `size` (0: one group), without those that are wholly finished.

    Groups do not depend on what is finished, so an interrupted run ends with the same bytes as an unbroken one.
    """
    size = size or len(users)
    groups = [users[start : start + size] for start in range(0, len(users), size)]
    return [group for group in groups if not all(done(user.user_id) for user in group)]


def share_users(
    args: argparse.Namespace, run: Run, todo: Sequence[tuple[int, User]], others: Sequence[Run] = ()
) -> Iterator[tuple[int, User]]:
    """Those of `todo` that no other process does, each claimed while it is worked on."""
    recent_k = getattr(args, "recent_k", 0)
    return share(run, todo, lambda unit: [unit[1].user_id], lambda unit: user_cost(unit[1], recent_k), others)


def share_groups(args: argparse.Namespace, run: Run, groups: Sequence[Sequence[User]]) -> Iterator[Sequence[User]]:
    """The same for groups of users that are trained together."""
    return share(
        run,
        groups,
        lambda group: [user.user_id for user in group],
        lambda group: sum(user_cost(user, args.recent_k) for user in group),
    )


def for_each(
    users: Iterable[tuple[int, User]], total: int, work: Callable[[int, User, Callable[[int], object]], None]
) -> None:
    """Call work(index, user, progress) for each, under a bar of users and one of answers."""
    with bar(total, "test users", "user") as users_bar, bar(0, "answers") as rows_bar:
        for index, user in users:
            work(index, user, rows_bar.update)
            users_bar.update()


NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def run(main: Callable[[list[str] | None], None]) -> None:
    """Run a script: an InputError is one message and exit code 2; `--debug` adds the traceback.

    Ctrl-C and SIGTERM let the write in progress finish, and end with exit code 130 and a line that says how to go on.
    Of several processes the first alone tells its results.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    stop_between_writes()
    limit_threads()
    keep_freed_memory()
    name = Path(sys.argv[0]).name
    try:
        with open(os.devnull, "w") if world().rank else nullcontext(sys.stdout) as output, redirect_stdout(output):
            main(None)
    except (InputError, OSError) as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        full = isinstance(error, OSError) and error.errno in NO_SPACE
        hint = "; finished users are kept: make room and run the same command again to go on" if full else ""
        tell(f"{name}: error: {error}{hint}")
        sys.exit(2)
    except KeyboardInterrupt:
        tell(f"{name}: stopped; run the same command again to go on")
        sys.exit(130)
