"""A small cut of the demo world laid out as the announcement expects it: ./data, ./llama/checkpoints/Llama-2-7b."""

import argparse
import importlib
import json
import shlex
import shutil
from collections.abc import Sequence
from pathlib import Path

from prime import cli

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "data" / "demo"
CHECKPOINT = "./llama/checkpoints/Llama-2-7b"


def read(path: Path):
    return json.loads(path.read_text(encoding="utf-8"))


def write(path: Path, value) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def entries(path: Path) -> list[dict]:
    """The lines of a .jsonl file, but for the seconds they took (and a journal's digests of those)."""
    return [without_seconds(json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def results(folder: str | Path) -> dict[str, dict]:
    """A run's results by user id, but for the seconds they took."""
    found = map(read, sorted(Path(folder).glob("users/*/result.json")))
    return {result["user_id"]: without_seconds(result) for result in found}


def without_seconds(entry: dict) -> dict:
    return {key: value for key, value in entry.items() if key not in ("seconds", "check")}


def build(folder: Path, task: str = "movie_tagging", test_users: int = 6, anchors: int = 6) -> Path:
    """data/<task> with few users and short histories, and the demo model under the announcement's path."""
    source, target = DEMO / task, folder / "data" / task
    base = read(source / "user_base_LLM.json")[:5]
    candidates = read(source / "user_anchor_candidate.json")[: anchors + 2]
    tests = read(source / "test_100" / "user_test_100.json")[:test_users]
    write(target / "user_base_LLM.json", [dict(user, query=user["query"][:3]) for user in base])
    write(target / "user_anchor_candidate.json", [dict(user, profile=user["profile"][-12:]) for user in candidates])
    cut = [dict(user, profile=user["profile"][-5:], query=user["query"][:3]) for user in tests]
    write(target / "test_100" / "user_test_100.json", cut)
    shutil.copy(source / "test_100" / "user_test_100_label.json", target / "test_100")
    shutil.copy(source / "profile-id2text.json", target)
    shutil.copytree(DEMO / "model", folder / CHECKPOINT, dirs_exist_ok=True)
    return target


def announcement() -> list[list[str]]:
    """The announcement's commands, split as a shell would."""
    text = (Path(__file__).parent / "announcement.txt").read_text(encoding="utf-8")
    lines = [line for line in text.replace("\\\n", " ").splitlines() if line.startswith("python")]
    return [shlex.split(line)[1:] for line in lines]


def script(name: str):
    """A stage script as a module."""
    return importlib.import_module(name.removesuffix(".py"))


def parser(name: str, words: Sequence[str] = ()) -> argparse.ArgumentParser:
    """The parser of a stage script; of one that has several, the one that takes these words."""
    module = script(name)
    asked = getattr(module, "asked", lambda _: (module.Settings, module.__doc__))
    return cli.parser_of(*asked(words))


def settings(command: list[str]):
    """The settings of a stage script's command."""
    return cli.parse(script(command[0]).Settings, script(command[0]).__doc__, command[1:])


def run(command: list[str]) -> None:
    """Run a command in this process, in the current directory."""
    script(command[0]).main(command[1:])
