"""A description of each user in words, from the history: by an instruction-tuned model, or by counting (--rule).

Reads   <data_dir>/user_base_LLM.json, user_anchor_candidate.json, test_100/user_test_100.json; a model, but for --rule
Writes  <output_dir>/users/<user>/result.json     a finished user's text
        <profile_path>                            all texts, {user id: text}; default <data_dir>/profile-id2text.json
Takes   seconds by rule; by a model about as long as answering one long prompt per user. Resumes: run it again.

    python gen_profile.py --task_name movie_tagging --model_name mistralai/Mistral-7B-Instruct-v0.2
    python gen_profile.py --task_name movie_tagging --rule
"""

from prime import cli  # isort: skip (first: Ctrl-C ends with one line from here on)
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from prime import settings as opt
from prime.errors import InputError
from prime.runs.files import read_json, write_json
from prime.runs.inputs import Inputs
from prime.runs.progress import bar
from prime.runs.run import read_results
from prime.runs.workers import open_groups, share_groups
from prime.users.data import BASE_FILE, CANDIDATE_FILE, PROFILE_FILE, TEST_FILE, User, load_users, user_cost
from prime.users.identity import wording
from prime.users.profiles import ITEM_WORDS, load_profile_prompts, rule_profile
from prime.users.tasks import Task, get_task

MODEL = "mistralai/Mistral-7B-Instruct-v0.2"


@dataclass(frozen=True, kw_only=True)
class Settings:
    data: opt.DataSettings = opt.group()
    rule: bool = opt.setting(False, "count (tags, mean score, words) without any model")
    profile_path: str | None = opt.setting(None, "file to write; default <data_dir>/profile-id2text.json")
    output_dir: str = opt.task_path("./output/<task_name>/profiles", "folder of finished users", neutral=True)
    recent_k: int = opt.setting(opt.RECENT_K, "history items read, the last; 0 = all", parse=opt.natural)
    item_words: int = opt.setting(ITEM_WORDS, "words of an item's field at most", parse=opt.positive)
    users_per_batch: int = opt.setting(16, "users answered together; 0 = all", parse=opt.natural, neutral=True)
    seed: int = opt.seed()
    model: opt.ModelSettings = opt.group(
        without=("lora_ckpt", "plan", "device_memory"),
        llama_model_path=opt.setting(
            MODEL,
            "instruction-tuned model: a name of the Hugging Face hub, or a directory",
            flag="--model_name",
            metavar="NAME_OR_DIR",
        ),
    )
    prompts: opt.PromptSettings = opt.group(
        chat=opt.setting("auto", "ask through the chat template; auto: where there is one", choices=opt.CHAT)
    )
    decoding: opt.SamplingSettings = opt.group(max_gen_len=160)


def load_everybody(data_dir: Path, task: Task, recent_k: int) -> tuple[list[User], str]:
    """All users that stages read, each once, with the items to describe; and a digest of their files."""
    users: dict[str, User] = {}
    digest = hashlib.sha256()
    for name in (BASE_FILE, CANDIDATE_FILE, TEST_FILE):
        users |= {user.user_id: user for user in load_users(data_dir / name, task)}
        digest.update((data_dir / name).read_bytes())
    recent = [User(user.user_id, user.recent(recent_k)) for user in users.values()]
    return recent, digest.hexdigest()


def check_target(path: Path, folder: Path) -> None:
    """InputError where profiles are there that were not made from this folder."""
    if path.exists() and not (folder / "settings.json").exists():
        raise InputError(f"{path}: there already; remove it, or give another --profile_path")


def write_by_rule(users: Sequence[User], task: Task, target: Path) -> None:
    texts = {user.user_id: rule_profile(task, user.profile) for user in users}
    if target.exists() and read_json(target) != texts:
        raise InputError(f"{target}: there already, with other texts; remove it, or give another --profile_path")
    write_json(target, texts)


def write_by_model(settings: Settings, users: Sequence[User], task: Task, data: str, target: Path) -> None:
    folder = Path(settings.output_dir)
    prompts = load_profile_prompts(settings.prompts.prompt_path, task)
    check_target(target, folder)
    inputs = Inputs(wording(prompts, settings.prompts.prompt_path))
    run = cli.open_run(settings, folder, "gen_profile", "profiles", inputs, data=data)
    index = {user.user_id: place for place, user in enumerate(users)}
    groups = open_groups(users, settings.users_per_batch, run.done)
    if groups:
        from prime.sources.describe import Asking, Describer  # the model's libraries, which --rule does without

        asking = Asking(prompts, settings.item_words, settings.prompts)
        describer = Describer(settings.model, settings.decoding, settings.seed, asking)
        with bar(sum(map(len, groups)), "users", "user") as progress:
            for users_of_group in share_groups(run, groups, partial(user_cost, recent_k=settings.recent_k)):
                texts = describer.texts(users_of_group, progress.update)
                run.finish_all([{"user_id": name, "index": index[name], **about} for name, about in texts.items()])
    write_json(target, {result["user_id"]: result["text"] for result in read_results(run.root)})


def main(argv: list[str] | None = None) -> None:
    settings = cli.parse(Settings, __doc__, argv)
    task = get_task(settings.data.task, settings.prompts.texts)
    target = Path(settings.profile_path or settings.data.folder / PROFILE_FILE)
    users, data = load_everybody(settings.data.folder, task, settings.recent_k)
    if settings.rule:
        write_by_rule(users, task, target)
    else:
        write_by_model(settings, users, task, data, target)
    print(f"{target}: {len(users)} users")


if __name__ == "__main__":
    cli.run(main)
