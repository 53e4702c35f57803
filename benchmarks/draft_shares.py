"""How often is an answer known before it is computed? Drafts of PriME's search on the trained demo, per task.

Reads   the embedded demo; stages 1 to 3 are run first (experiments/demo_runs.py)
Writes  nothing; the last line is one JSON object, whose shares are the defaults of benchmarks/shapes.py
Takes   1 minute per task on one core, stages 1 to 3 not counted

For the base and the sharers (whose draft is the history's own answer) and for the generations of the search, shares of
answers that are the most frequent known answer (`accepted`), another known one (`known`), or new; of the tokens of new
answers, the share that the most frequent known answer begins with (`agreed`).

    python benchmarks/draft_shares.py --tasks movie_tagging,news_headline --users 24
"""

import argparse
import sys
import tempfile
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import measuring
from benchmarks.shapes import Shares, by_frequency
from experiments import demo_runs
from prime import cli
from prime.bank.encoding import Tokens
from prime.merging.population import Answers, Population
from prime.runs.journal import Journal
from prime.seeds import derive_seed

PHASES = ("points", "search")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter, allow_abbrev=False)
    demo_runs.add_options(parser, users=24)
    parser.add_argument("--seed", type=int, default=0, help="run seed of the stages")
    measuring.add_threads(parser)
    return parser


class Watched(Population):
    """A population that notes, for each answer, the drafts there were and what they were worth."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.seen: list[tuple[str, Tokens, list[Tokens]]] = []  # phase, answer, known answers by falling frequency

    def answers(self, weights: Tensor) -> list[Answers]:
        phase = PHASES[1] if self.seen else PHASES[0]
        before = [len(known) for known in self.drafts]
        answers = super().answers(weights)
        for known, count in zip(self.drafts, before, strict=True):
            ranked = by_frequency(known[:count])
            self.seen += [(phase, answer, ranked) for answer in known[count:]]
        return answers


def shares_of(seen: list[tuple[Tokens, list[Tokens]]]) -> Shares:
    accepted = fmean(answer == ranked[0] for answer, ranked in seen)
    known = fmean(answer in ranked[1:] for answer, ranked in seen)
    new = [(answer, ranked[0]) for answer, ranked in seen if answer not in ranked]
    tokens = sum(len(answer) for answer, _ in new)
    agreed = sum(common(answer, draft) for answer, draft in new) / tokens if tokens else 0.0
    return Shares(accepted, known, agreed)


def common(answer: Tokens, draft: Tokens) -> int:
    """Length of the common beginning."""
    places = (i for i, (x, y) in enumerate(zip(answer, draft, strict=False)) if x != y)
    return next(places, min(len(answer), len(draft)))


def run_one(task: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """Shares over the searches of the first users of a task."""
    start = demo_runs.start(task, seed, args.output_dir)
    seen: dict[str, list] = {phase: [] for phase in PHASES}
    lengths = []
    for index in range(len(start.users[: args.users])):
        for phase, answer, ranked in search(start, index).seen:
            seen[phase].append((answer, ranked))
            lengths.append(len(answer))
    counts = start.engine.counts
    return {phase: shares_of(rows)._asdict() for phase, rows in seen.items()} | {
        "answered_in_one_pass": round(counts.from_draft / counts.rows, 4),
        "answer_tokens": {"mean": round(fmean(lengths), 2), "longest": max(lengths)},
        "rows": counts.rows,
    }


def search(start: demo_runs.Start, index: int) -> Watched:
    """A test user's search; the population that it asked."""
    start.engine.bank.load(start.pool.adapters(index))
    user = start.users[index]
    seed = derive_seed(start.settings.seed, user.user_id)
    with tempfile.TemporaryDirectory() as scratch:
        journal = Journal(Path(scratch) / "journal.jsonl")
        population = Watched(start.setup(), user, seed, start.settings.search.n_sim, journal)
        start.search(population)
    return population


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    measuring.set_threads(args.threads)
    by_task, rows = {}, []
    for task in args.tasks.split(","):
        by_task[task] = run_one(task, args.seed, args)
        one_pass = by_task[task]["answered_in_one_pass"]
        rows += [[task, phase, *by_task[task][phase].values(), one_pass] for phase in PHASES]
    print(measuring.table(rows, ("task", "phase", *Shares._fields, "one pass, both phases")))
    measuring.report({"benchmark": "draft_shares", "seed": args.seed, "users": args.users, "tasks": by_task})


if __name__ == "__main__":
    cli.run(main)
