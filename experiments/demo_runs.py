"""The trained demo for experiments and benchmarks: stages 1 to 3 of a task and seed, then what stage 4 starts from.

Reads   the embedded demo, through reproduce.sh
Writes  <output_dir>/seed<seed>/<task>/   what stages 1 to 3 write; finished steps are skipped
Takes   2 to 4 minutes per task and seed on one core
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import lora_composition_evo as stage
from prime import cli
from prime.engine import Engine, load_engine
from prime.merging.controls import load_sharers
from prime.merging.evolution import Evaluation, search_each
from prime.merging.population import Population, Setup
from prime.merging.sharers import Pool, Selection
from prime.settings import positive
from prime.users.data import LABEL_FILE, User, load_labels
from prime.users.tasks import TASKS
from prime.users.texts import Texts, asked_as_queries, load_candidates, load_test_users, load_texts

DEMO = ROOT / "data" / "demo"
DEFAULT_DIR = str(ROOT / "output" / "experiments" / "demo")


def add_options(parser: argparse.ArgumentParser, users: int) -> None:
    parser.add_argument("--tasks", default="movie_tagging,news_headline", help="tasks, with commas")
    parser.add_argument("--users", type=positive, default=users, help="test users, the first ones")
    parser.add_argument("--output_dir", default=DEFAULT_DIR, help="results of stages 1 to 3")


def tasks_of(names: str) -> list[str]:
    """The tasks named, with commas; `all`: those of the demo, which has no news_categorize."""
    return [name for name in TASKS if (DEMO / name).is_dir()] if names == "all" else names.split(",")


def golds_of(task: str) -> dict[str, str]:
    """Answers to the test queries, by query id."""
    return load_labels(DEMO / task / LABEL_FILE)


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


def model_options(task: str, seed: int, folder: Path) -> list[str]:
    """The options that stages 3 to 5 have in common."""
    options = ["--task_name", task, "--data_dir", str(DEMO / task), "--seed", str(seed)]
    return [*options, "--llama_model_path", str(DEMO / "model"), "--lora_ckpt", str(folder / "task-base_LLM")]


def training_options(task: str, seed: int, folder: Path) -> list[str]:
    """The options of stage 3 but for those of the training itself."""
    options = ["--anchor_selection_dir", str(folder / "anchor_selection"), "--train_gen_len", "48"]
    return [*model_options(task, seed, folder), *options]


def search_options(task: str, seed: int, folder: Path, anchor_dir: Path | None = None) -> list[str]:
    """The options of stage 4 as reproduce.sh gives them, for k = 0 only.

    Args:
        anchor_dir: the sharers' adapters; None: those of stage 3 in `folder`.
    """
    options = ["--anchor_dir", str(anchor_dir or folder / "Anchor_PEFT/LoRA"), "--k_list", "", "--max_gen_len", "48"]
    return [*training_options(task, seed, folder), *options]


def search_settings(task: str, seed: int, folder: Path) -> stage.Settings:
    return cli.parse(stage.Settings, stage.__doc__, search_options(task, seed, folder))


@dataclass(frozen=True)
class Start:
    """What stage 4 holds when it begins."""

    settings: stage.Settings
    texts: Texts
    users: list[User]
    golds: dict[str, str]  # answers to the test queries, by query id
    pool: Pool
    engine: Engine

    def setup(self) -> Setup:
        """What the searches of all users have in common."""
        settings, texts = self.settings, self.texts
        if settings.fitness.fitness == "query":
            texts = asked_as_queries(settings.data.folder, texts)
        recent_k = settings.prompts.recent_k
        return Setup(settings.search, settings.fitness, settings.decoding, recent_k, texts, self.engine)

    def search(self, population: Population) -> list[Evaluation]:
        """All evaluated candidates of PriME's search at its one penalty."""
        with tempfile.TemporaryDirectory() as scratch:
            (evaluations,) = search_each(population, self.settings.search.sim_penalty, [Path(scratch) / "log.jsonl"])
        return evaluations


def start(task: str, seed: int, output_dir: Path | str) -> Start:
    return start_of(search_settings(task, seed, trained(task, seed, output_dir)))


def start_of(settings: stage.Settings) -> Start:
    """Load what stage 4 begins with under these settings."""
    data, search = settings.data, settings.search
    texts = load_texts(data.folder, data.task, settings.prompts.prompt_path, settings.prompts.texts)
    users = load_test_users(data.folder, texts.task)
    golds = load_labels(data.folder / LABEL_FILE)
    selection = Selection.of(settings.anchors, data.task_name, load_candidates(data.folder, texts.task))
    pool = load_sharers(selection, settings.model, settings.anchor_dir, users, search, settings.seed)
    engine = load_engine(settings.model, settings.prompts)
    return Start(settings, texts, users, golds, pool, engine)
