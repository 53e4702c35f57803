"""A description of each user in words, from the history: by an instruction-tuned model, or by counting (--rule).

Reads   <data_dir>/user_base_LLM.json, user_anchor_candidate.json, test_100/user_test_100.json; a model, but for --rule
Writes  <output_dir>/users/<user>/result.json     a finished user's text
        <profile_path>                            all texts, {user id: text}; default <data_dir>/profile-id2text.json
Takes   seconds by rule; by a model about as long as answering one long prompt per user. Resumes: run it again.

    python gen_profile.py --task_name movie_tagging --model_name mistralai/Mistral-7B-Instruct-v0.2
    python gen_profile.py --task_name movie_tagging --rule
"""

import argparse
import hashlib
from collections.abc import Sequence
from pathlib import Path

from prime import cli
from prime.errors import InputError
from prime.runs.files import read_json, write_json
from prime.runs.run import read_results
from prime.users.data import User, load_users
from prime.users.profiles import ITEM_WORDS, load_profile_prompts, rule_profile
from prime.users.prompts import RECENT_K
from prime.users.tasks import Task, get_task

MODEL = "mistralai/Mistral-7B-Instruct-v0.2"
FILES = ("user_base_LLM.json", "user_anchor_candidate.json", "test_100/user_test_100.json")


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(__doc__)
    parser.add_argument("--rule", action="store_true", help="count (tags, mean score, words) without any model")
    parser.add_argument("--profile_path", help="file to write; default <data_dir>/profile-id2text.json")
    parser.add_argument("--output_dir", help="folder of finished users; default ./output/<task_name>/profiles")
    parser.add_argument("--recent_k", type=cli.natural, default=RECENT_K, help="history items read, the last; 0 = all")
    parser.add_argument("--item_words", type=cli.positive, default=ITEM_WORDS, help="words of an item's field at most")
    parser.add_argument("--users_per_batch", type=cli.natural, default=16, help="users answered together; 0 = all")
    cli.add_seed(parser)
    cli.add_model(parser, with_task_adapter=False, named=MODEL)
    cli.add_device_map(parser)
    cli.add_prompts(parser)
    cli.add_sampling(parser, max_gen_len=160)
    return parser


def load_everybody(args: argparse.Namespace, task: Task) -> tuple[list[User], str]:
    """All users that stages read, each once, with the items to describe; and a digest of their files."""
    users: dict[str, User] = {}
    digest = hashlib.sha256()
    for name in FILES:
        path = cli.data_dir(args) / name
        users |= {user.user_id: user for user in load_users(path, task)}
        digest.update(path.read_bytes())
    recent = [User(user.user_id, user.profile[-args.recent_k :]) for user in users.values()]
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


def write_by_model(args: argparse.Namespace, users: Sequence[User], task: Task, data: str, target: Path) -> None:
    folder = Path(args.output_dir or f"./output/{args.task_name}/profiles")
    prompts = load_profile_prompts(args.prompt_path, task)
    check_target(target, folder)
    run = cli.open_run(args, folder, "gen_profile", "profiles", data=data)
    index = {user.user_id: place for place, user in enumerate(users)}
    groups = cli.open_groups(users, args.users_per_batch, run.done)
    if groups:
        from prime.sources.describe import Describer  # the model's libraries, which --rule does without

        describer = Describer(args, prompts)
        with cli.bar(sum(map(len, groups)), "users", "user") as progress:
            for group in cli.share_groups(args, run, groups):
                found = describer.texts(group, progress.update)
                run.finish_all([{"user_id": name, "index": index[name], **about} for name, about in found.items()])
    write_json(target, {result["user_id"]: result["text"] for result in read_results(run.root)})


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    task = get_task(args.task_name)
    target = Path(args.profile_path or cli.data_dir(args) / "profile-id2text.json")
    users, data = load_everybody(args, task)
    if args.rule:
        write_by_rule(users, task, target)
    else:
        write_by_model(args, users, task, data, target)
    print(f"{target}: {len(users)} users")


if __name__ == "__main__":
    cli.run(main)
