"""Settings of the stages: what each is, its type, default and help, and whether a result depends on it.

A stage script has one frozen dataclass `Settings`, made of the groups below and of options of its own. `prime.cli`
makes command-line options of it and reads them back; functions take the group they need, never the command line.
"""

import argparse
import dataclasses
import re
from collections.abc import Callable, Iterator
from dataclasses import MISSING, dataclass
from pathlib import Path
from typing import Any, get_type_hints

HIDDEN = argparse.SUPPRESS  # help of an option that only says why it is refused
DEVICES = ("auto", "cpu", "cuda", "mps")
SHARERS = "sharers"  # as a rank: that of the sharers' adapters
CHAT = ("auto", "on", "off")
RECENT_K = 50  # published window of a history
MIN_ITEMS = 11  # of an anchor's history; published: more than ten
# How directories were made that do not name these options.
BEFORE_THE_OPTION = {"texts": "published", "chat": "off", "deploy_form": "merged"}


# -- declaring ------------------------------------------------------------------------------------------------------


def setting(
    default: Any = MISSING,
    help: str = "",
    *,
    parse: Callable[[str], Any] | None = None,
    choices: tuple[str, ...] | None = None,
    neutral: bool = False,
    required: bool = False,
    published: Any = MISSING,
    **more: Any,
) -> Any:
    """A setting; without a default it has to be given.

    Args:
        parse: makes a value of the option's text; else the field's type does.
        neutral: results do not depend on it (where to write, how fast to work), so it is not recorded with them.
        required: it has to be given where a stage has it; the default is for stages that do not.
        published: the value of the published code where the default is another; `--as_published` sets it.
        more: `flag`, the name of the option where it is not that of the field; `aliases`, published names; `metavar`;
            `nargs`, of argparse.
    """
    about = {"help": help, "parse": parse, "choices": choices, "neutral": neutral, "required": required, **more}
    if published is not MISSING:
        about["published"] = published
    return dataclasses.field(default=default, metadata=about)


def task_path(default: str, help: str, *, neutral: bool = False) -> Any:
    """A folder whose default depends on the task: `<task_name>` stands for it."""
    about = {"help": f"{help}; default {default}", "neutral": neutral, "task_path": default}
    return dataclasses.field(default=None, metadata=about)


def group(without: tuple[str, ...] = (), **changes: Any) -> Any:
    """A group of settings in a stage's `Settings`.

    Args:
        without: names of settings that the stage does not have; they keep their defaults.
        changes: other defaults for this stage, or a whole other `setting`.
    """
    return dataclasses.field(metadata={"without": without, "changes": changes})


@dataclass(frozen=True)
class Option:
    """A setting as the command line knows it."""

    name: str
    kind: Any  # its type
    default: Any
    about: dict[str, Any]  # metadata of `setting`
    group: str = ""  # "": none

    @property
    def required(self) -> bool:
        return self.default is MISSING or self.about.get("required", False)

    @property
    def flag(self) -> str:
        return self.about.get("flag") or f"--{self.name}"


def options(settings_class: type) -> Iterator[Option]:
    """All options of a stage's `Settings` or of a group, in their order."""
    kinds = get_type_hints(settings_class)
    for field in dataclasses.fields(settings_class):
        if dataclasses.is_dataclass(kinds[field.name]):
            yield from _options_of_group(field, kinds[field.name])
        else:
            yield Option(field.name, kinds[field.name], field.default, dict(field.metadata))


def _options_of_group(field: dataclasses.Field, group_class: type) -> Iterator[Option]:
    changes = field.metadata["changes"]
    for option in options(group_class):
        change = changes.get(option.name, option.default)
        if option.name in field.metadata["without"]:
            continue
        if isinstance(change, dataclasses.Field):
            yield Option(option.name, option.kind, change.default, dict(change.metadata), field.name)
        else:
            yield Option(option.name, option.kind, change, option.about, field.name)


def build(settings_class: type, values: dict[str, Any]) -> Any:
    """The settings of these values by name; a folder that was not given becomes that of the task."""
    kinds = get_type_hints(settings_class)
    values = dict(values)
    for option in options(settings_class):
        template = option.about.get("task_path")
        if template and values.get(option.name) is None:
            values[option.name] = template.replace("<task_name>", values["task_name"])
    parts: dict[str, Any] = {}
    for field in dataclasses.fields(settings_class):
        kind = kinds[field.name]
        if dataclasses.is_dataclass(kind):
            names = [option.name for option in _options_of_group(field, kind)]  # type: ignore[arg-type]
            parts[field.name] = kind(**{name: values[name] for name in names})  # type: ignore[operator]
        else:
            parts[field.name] = values[field.name]
    return settings_class(**parts)


def recorded(settings: Any) -> dict[str, Any]:
    """What results depend on, by name, in the order of the options."""
    values: dict[str, Any] = {}
    for option in options(type(settings)):
        if not option.about["neutral"]:
            holder = getattr(settings, option.group) if option.group else settings
            values[option.name] = getattr(holder, option.name)
    return values


def published(settings_class: type) -> dict[str, Any]:
    """What `--as_published` sets, by name: the published value of every option whose default is another."""
    return {o.name: o.about["published"] for o in options(settings_class) if "published" in o.about}


def defaults(settings_class: type) -> dict[str, Any]:
    """Default of every option that has one."""
    return {option.name: option.default for option in options(settings_class) if not option.required}


# -- values ---------------------------------------------------------------------------------------------------------


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
part = _number(float, 1e-9, 1 - 1e-9, "a number between 0 and 1")


def sample_size(text: str) -> float:
    """A number of records, or a share of them below 1."""
    return below_one(text) if "." in text else natural(text)


def int_list(text: str) -> tuple[int, ...]:
    """`1,2,4` -> (1, 2, 4); empty text -> ()."""
    return tuple(natural(part.strip()) for part in text.split(",") if part.strip())


def penalty_list(text: str) -> tuple[float, ...]:
    """`0,0.1,1` -> (0.0, 0.1, 1.0), each once and at least one."""
    penalties = tuple(dict.fromkeys(non_negative(part.strip()) for part in text.split(",") if part.strip()))
    if not penalties:
        raise argparse.ArgumentTypeError(f"{text!r} names no penalty")
    return penalties


def rank_kept(text: str) -> int | str:
    """A rank, or the word for that of the sharers."""
    return text if text == SHARERS else natural(text)


def method_name(text: str) -> str:
    """A row's name in the table: letters, digits and underscores."""
    if not re.fullmatch(r"[a-z][a-z0-9_]{0,31}", text) or text in ("best_sharer", "uniform"):
        raise argparse.ArgumentTypeError(f"{text!r} is no name of a row: a-z, 0-9, _, and not that of a baseline")
    return text


def refused_in_training(text: str) -> str:
    raise argparse.ArgumentTypeError(
        "a stage that trains keeps its model on one device; on more GPUs run more processes (docs/scaling.md)"
    )


# -- options that several stages have, each on its own ---------------------------------------------------------------


def seed() -> Any:
    return setting(0, "run seed; each user's own is derived from it and the id")


def user_idxs(whom: str) -> Any:
    """`whom`: who is counted."""
    return setting(None, f"{whom} to work on, e.g. 0-100 (end not included) or 3,7; default all", neutral=True)


def texts() -> Any:
    return setting(
        "faithful",
        "users' texts as they are, or as published: with single spaces, and cut to 768 words, which the articles that "
        "train the task adapter are too",
        choices=("faithful", "published"),
        published="published",
    )


def train_gen_len() -> Any:
    return setting(100, "new tokens of an answer to a history record at most", parse=positive)


def holdout(whose: str) -> Any:
    return setting(
        0.0,
        f"share of {whose} history items that nothing trains on, for mia.py's controlled attack; 0 = none",
        parse=below_one,
    )


# What goes through the model together is part of a result: sums are rounded in another order. Measured once on the demo
# (6 anchors, 2 epochs at 1e-2; no command): passes of 512 tokens move numbers of the factors by up to 0.014. On a CPU a
# pass holds rows of one learner, so there what trains together changes nothing; on a GPU it does.


def anchors_per_batch() -> Any:
    return setting(16, "anchors trained together; 0 = all of them; part of the result", parse=natural)


def users_per_batch() -> Any:
    return setting(16, "users trained together; 0 = all of them; part of the result", parse=natural)


def training_tokens() -> Any:
    return setting(0, "tokens of one pass; 0 = chosen for training; part of the result", parse=natural)


# -- groups ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Which task, and where its files lie."""

    task_name: str = setting(None, "a built-in task; for one of your own give --task_file")
    task_file: str | None = setting(None, "file of a task of your own (docs/extending.md)", neutral=True)
    data_dir: str | None = setting(None, "folder of the task's data files; default ./data/<task_name>")
    refresh: bool = setting(False, "make again what was made from files that have changed since, no more", neutral=True)

    @property
    def folder(self) -> Path:
        return Path(self.data_dir or f"./data/{self.task_name}")

    @property
    def task(self) -> str:
        """What `prime.users.tasks.get_task` takes."""
        return self.task_file or self.task_name


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The base model, the task adapter that is folded into it, and how both are computed with."""

    llama_model_path: str = setting(help="base model: directory of Hugging Face or Meta, or a name of the hub")
    tokenizer_path: str | None = setting(None, "directory of the tokenizer; default the model's")
    convert_to: str | None = setting(
        None,
        "keep a Meta checkpoint as a Hugging Face directory here, and use that; default: in memory",
        neutral=True,
    )
    lora_ckpt: str | None = setting(
        None,
        "task adapter: PEFT directory of stage 1 (or <directory>/lora_ckpt.pt), or a published lora_ckpt.pt",
        required=True,
    )
    target_modules: str = setting("q_proj,k_proj,v_proj,o_proj", "modules that carry adapters")
    plan: bool = setting(
        False,
        "load no weights; tell parameters, bytes and batches of this run, and whether it fits the device",
        neutral=True,
    )
    device_memory: float = setting(
        0.0,
        "GiB that --plan may use, also of GPUs that are not there (with --device_map of all together); 0 = what is "
        "free now",
        parse=non_negative,
        neutral=True,
    )
    device: str = setting("auto", "where to compute", choices=DEVICES, neutral=True)
    dtype: str = setting(
        "auto",
        "of the base model; auto: bfloat16 on a GPU, float32 on a CPU",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    max_batch_tokens: int = setting(0, "tokens of one pass; 0 = chosen for the device", parse=natural, neutral=True)
    device_map: str | None = setting(
        None,
        "part the model among all GPUs: auto, balanced, balanced_low_0, sequential, or a JSON file of modules and "
        "devices (docs/models.md); default: all on one device",
        neutral=True,
    )

    @property
    def base(self) -> str:
        """Directory of the base model as adapters name it: the kept conversion of a checkpoint, or what was given."""
        return self.convert_to or self.llama_model_path

    @property
    def adapted_base(self) -> str:
        """The model that personal adapters stand on, as they name it: `base + task adapter`, which no library takes
        for the plain one.
        """
        if self.lora_ckpt is None:
            return self.base
        task = Path(self.lora_ckpt)
        return f"{self.base} + {task.parent if task.name == 'lora_ckpt.pt' else task}"

    @property
    def modules(self) -> list[str]:
        return [name.strip() for name in self.target_modules.split(",")]


@dataclass(frozen=True, kw_only=True)
class PromptSettings:
    texts: str = texts()
    prompt_path: str | None = setting(None, "template file in the published schema; default: the built-in wording")
    max_length: int = setting(
        3000, "tokens of a prompt with its answer", parse=positive, aliases=("--max_seq_len",)
    )
    chat: str = setting(
        "auto",
        "write prompts and answers as turns of the tokenizer's chat template; auto: where it has one",
        choices=CHAT,
        published="off",
    )


@dataclass(frozen=True, kw_only=True)
class HistorySettings(PromptSettings):
    recent_k: int = setting(RECENT_K, "history items used, the last ones; 0 = all", parse=natural)


@dataclass(frozen=True, kw_only=True)
class SamplingSettings:
    temperature: float = setting(0.1, "of sampling; 0 = greedy", parse=non_negative)
    top_p: float = setting(0.9, "probability mass that sampling keeps", parse=fraction)
    max_gen_len: int = setting(100, "new tokens of an answer at most", parse=positive)


@dataclass(frozen=True, kw_only=True)
class DecodingSettings(SamplingSettings):
    k_list: tuple[int, ...] = setting((1, 2, 4), "retrieved items in test prompts, beside 0", parse=int_list)


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """Training of adapters or gates; the defaults are the published ones of the task adapter."""

    max_step: int = setting(0, "steps of a gate at most; 0 = all of --epochs", parse=natural)
    lr: float = setting(1e-4, "learning rate at the start of the cosine", parse=non_negative)
    min_lr: float = setting(0.0, "learning rate at its end", parse=non_negative)
    lr_schedule: str = setting(
        "cosine",
        "published: the cosine one step late, since the rate is set after each step; the first two have all of it",
        choices=("cosine", "published"),
        published="published",
    )
    weight_decay: float = setting(0.01, "of AdamW", parse=non_negative)
    clip: float = setting(0.3, "gradient norm of an adapter at most", parse=non_negative)
    batch_size: int = setting(6, "records of one step of an adapter", parse=positive)
    epochs: int = setting(3, "passes over the records", parse=positive)
    lora_r: int = setting(8, "rank of the adapter", parse=positive)
    lora_alpha: int = setting(8, "scale of the adapter times its rank", parse=positive)
    lora_dropout: float = setting(0.05, "dropout in front of the adapter", parse=below_one)
    device_map: None = setting(None, HIDDEN, parse=refused_in_training, neutral=True)
    gradient_checkpointing: bool = setting(
        False,
        "recompute each layer in the backward pass: a fraction of the memory, a third more time, the same numbers",
        neutral=True,
    )


@dataclass(frozen=True, kw_only=True)
class PrivacySettings:
    """Differentially private training, see `prime.bank.dp`. Batch size and epochs are then expectations."""

    enable_dp: bool = setting(False, "protect each history item: DP-SGD with AdamW, in place of --clip")
    epsilon: float | None = setting(
        None, "privacy budget of one training; noise is chosen to keep it", parse=above_zero
    )
    sigma: float | None = setting(
        None, "or the noise: its standard deviation over the clip norm", parse=above_zero
    )
    delta: float = setting(1e-5, "probability beyond epsilon; far below 1 / items", parse=above_zero)
    max_per_sample_grad_norm: float = setting(1.0, "clip norm: of an item's gradient at most", parse=above_zero)
    accountant: str = setting("rdp", "Opacus'; prv: tighter, slower", choices=("rdp", "prv"))
    noise_key: str | None = setting(
        None,
        "file with the secret that noise (and a secret initial A) is drawn from, made if absent; default "
        "<output_dir>/noise.key",
        neutral=True,
    )


@dataclass(frozen=True, kw_only=True)
class DistilSettings:
    """Sharing what an adapter answers to others in its place, see `prime.merging.distil`."""

    distill: str | None = setting(
        None,
        "share a fresh adapter that learns what a sharer's own answers to public prompts; that one is not written",
        choices=("public",),
    )
    public_prompts: str | None = setting(
        None, "file of the users whose items are asked, answers unused; default <data_dir>/user_base_LLM.json"
    )
    public_records: int = setting(400, "of them asked, drawn by the seed; 0 = all", parse=natural)


@dataclass(frozen=True, kw_only=True)
class SelectionSettings:
    """Where stage 2 put its files."""

    anchor_idx_path: str | None = setting(None, "default <anchor_selection_dir>/anchor_user_idx.pt")
    anchor_selection_dir: str | None = setting(None, "outputs of stage 2; default ./anchor_selection/<task_name>")


@dataclass(frozen=True, kw_only=True)
class DeploySettings:
    """What a personal adapter is written as."""

    deploy_form: str = setting(
        "refactored",
        "factors of a deployed adapter: a function of its update alone, or as they were merged (of rule delta the "
        "sharers' own, one below the other, for whoever holds the file)",
        choices=("refactored", "merged"),
        published="merged",
    )
    export_full: bool = setting(
        False,
        "also write <user>/adapter_full, relative to the downloaded base: task and personal adapter in one",
        neutral=True,
    )


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """The search for merging weights, and which of the evaluated candidates may win."""

    n_sim: int = setting(3, "most similar sharers to merge; 0 = all", parse=natural)
    sharers: str = setting(
        "nearest",
        "who they are; null controls: random or the farthest ones, or noise in place of the nearest ones' adapters",
        choices=("nearest", "random", "farthest", "noise"),
    )
    opt_type: str = setting(
        "cma",
        "cma, ngopt, tbpsa, or any optimizer of nevergrad; pareto: one search of utility and similarity at once, from "
        "which each --sim_penalty deploys its best",
    )
    opt_budget: int = setting(10, "candidates the search evaluates", parse=natural)
    sim_penalty: tuple[float, ...] = setting(
        (0.1,),
        "weight of resembling the sharers; several, with commas: the whole frontier, on shared evaluations, in "
        "<output_dir>/penalty-<p>; nll generates nothing to compare, so there it is 0 whatever is given",
        parse=penalty_list,
    )
    start: str = setting(
        "ranked",
        "where the search begins: zero (published), the sharers' average, or one weighted by rank of their losses",
        choices=("zero", "uniform", "ranked"),
        published="zero",
    )
    step: float = setting(
        0.3,
        "standard deviation of its first candidates around the start (published: 0.5, a sixth of the box)",
        parse=above_zero,
        published=0.5,
    )
    merge_rule: str = setting(
        "delta", "factor is the published rule", choices=("factor", "delta"), published="factor"
    )
    keep_rank: int | str = setting(
        0,
        "leading singular directions kept of each module's merged update, scaled to its size, of every candidate, "
        "evaluated or deployed; 0 = all, sharers: as many as a sharer's adapter has. Few of them hold what the sharers "
        "have in common and less of what each remembers",
        parse=rank_kept,
        aliases=("--deploy_rank",),
    )
    piece_merge: bool = setting(False, "one weight per sharer and layer")
    search_only: bool = setting(
        False,
        "published selection: a single sharer, known beforehand, cannot win, and the base only with a smaller loss",
        published=True,
    )
    baseline: str | None = setting(
        None,
        "no search: deploy the single sharer that does best on the history, or the sharers' average, as a run of its "
        "own that mia.py can attack; the row is the one that comes with PriME",
        choices=("best_sharer", "uniform"),
    )


@dataclass(frozen=True, kw_only=True)
class FitnessSettings:
    """What candidates are asked, and how their answers become a loss."""

    objective: str = setting(
        "metric",
        "metric: of generated answers (PriME); nll: cross-entropy of the history's targets plus L1 of the weights "
        "(LoraHub), which does without the sampling, --num_repeat, --m_reduce, --t_reduce and --train_gen_len",
        choices=("metric", "nll"),
    )
    fitness: str = setting(
        "history",
        "what candidates answer: the history's records (published), or its items asked as test queries, which differ "
        "in citation; there wrong references come from user_base_LLM.json",
        choices=("history", "query"),
    )
    unknown_answers: str = setting(
        "distinct",
        "in the similarity, answers outside the task's labels: distinct as their texts are, or alike (published; a "
        "sharer's rating that is no number is then a 2.5)",
        choices=("distinct", "alike"),
        published="alike",
    )
    num_repeat: int = setting(1, "sampled decodings per evaluation", parse=positive)
    m_reduce: str = setting("sum", "of a task's metrics", choices=("sum", "mean", "first", "min", "max"))
    t_reduce: str = setting("mean", "of the repeats' losses", choices=("mean", "min", "max", "median", "sum"))
    train_sample: float = setting(0, "history records drawn: how many, or a share below 1; 0 = all", parse=sample_size)
    train_gen_len: int = train_gen_len()
