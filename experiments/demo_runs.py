"""The trained demo for benchmarks: stages 1 to 3 of a task and seed, then what stage 4 starts from.

Reads   the embedded demo, through reproduce.sh
Writes  <output_dir>/seed<seed>/<task>/   what stages 1 to 3 write; finished steps are skipped
Takes   2 to 4 minutes per task and seed on one core
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import lora_composition_evo as stage
from prime import cli
from prime.engine import Engine, load_engine
from prime.merging.sharers import Pool, load_pool
from prime.users.data import User, load_labels

DEFAULT_DIR = str(ROOT / "output" / "experiments" / "demo")


def add_options(parser: argparse.ArgumentParser, users: int) -> None:
    parser.add_argument("--tasks", default="movie_tagging,news_headline", help="tasks, with commas")
    parser.add_argument("--users", type=cli.positive, default=users, help="test users, the first ones")
    parser.add_argument("--output_dir", default=DEFAULT_DIR, help="results of stages 1 to 3")


def trained(
    task: str, seed: int, output_dir: Path | str, until: str = "train_anchor_peft", options: Sequence[str] = ()
) -> Path:
    """Stages 1 to 3 of the demo (or up to an earlier one), run unless finished, with further options of reproduce.sh;
    their folder.
    """
    folder = Path(output_dir) / f"seed{seed}" / task
    command = ["bash", str(ROOT / "reproduce.sh"), "--tasks", task, "--seed", str(seed)]
    command += ["--output_dir", str(folder.parent), "--until", until, *options]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder


def shared_words(task: str, seed: int, folder: Path) -> list[str]:
    """The options that stages 3 to 5 share: data, model and task adapter."""
    words = ["--task_name", task, "--data_dir", str(ROOT / "data/demo" / task), "--seed", str(seed)]
    words += ["--llama_model_path", str(ROOT / "data/demo/model"), "--lora_ckpt", str(folder / "task-base_LLM")]
    return words


def stage_words(task: str, seed: int, folder: Path) -> list[str]:
    """The options of stage 4 as reproduce.sh gives them, for k = 0 only."""
    words = shared_words(task, seed, folder)
    words += ["--anchor_selection_dir", str(folder / "anchor_selection"), "--k_list", ""]
    words += ["--anchor_dir", str(folder / "Anchor_PEFT/LoRA"), "--max_gen_len", "48", "--train_gen_len", "48"]
    return words


def stage_args(task: str, seed: int, folder: Path) -> argparse.Namespace:
    return stage.build_parser().parse_args(stage_words(task, seed, folder))


@dataclass
class Start:
    """What stage 4 holds when it begins."""

    args: argparse.Namespace
    texts: cli.Texts
    users: list[User]
    golds: dict[str, str]
    pool: Pool
    engine: Engine


def start(task: str, seed: int, output_dir: Path | str) -> Start:
    args = stage_args(task, seed, trained(task, seed, output_dir))
    texts = cli.load_texts(args)
    users = cli.load_test_users(args, texts.task)
    golds = load_labels(cli.data_dir(args) / "test_100" / "user_test_100_label.json")
    pool = load_pool(args, cli.load_candidates(args, texts.task), len(users))
    return Start(args, texts, users, golds, pool, load_engine(args, task_adapter=args.lora_ckpt))
