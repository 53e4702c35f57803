"""How long until ours is as good on held-out questions as the published search ends? On the trained demo.

Reads   the embedded demo; stages 1 to 3 of every (task, seed) are run first (experiments/demo_runs.py)
Writes  nothing; the last line is one JSON object
Takes   about 2 minutes per user, task and seed on one core, nearly all of it the published procedure

    python benchmarks/time_to_quality.py --tasks movie_tagging,news_headline --seeds 0,1,2 --users 4

Both sides search the same users from the same adapters, greedily decoded. `published`: factor rule, wide steps from
zero, one adapter at a time in PEFT, 100 new tokens always, batches of 8 as the prompts come; a single sharer cannot
win. `ours`: stage 4's defaults, the bank, generations together. After every phase of ours (base and sharers, the
start, then each generation) the best candidate so far answers the held-out queries (k = 0); the first phase whose mean
score over users is at least the published end's counts. Held-out answers are not timed: neither search needs them.
`outputs_equal`: the published procedure's answers, cut as ours are, equal the bank's under the factor rule for every
candidate and record.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain, product
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import lora_composition_evo as stage
from benchmarks import contenders, measuring
from experiments import demo_runs
from experiments.demo_runs import Start
from prime import cli
from prime.bank.encoding import EncodedPrompt
from prime.bank.lora import Adapter, merge
from prime.engine import predict
from prime.merging.evolution import Evaluation, choose
from prime.merging.population import Answers, Population
from prime.runs.journal import Journal
from prime.seeds import derive_seed
from prime.settings import int_list, natural, positive
from prime.users.data import User
from prime.users.metrics import METRICS, score

# Settings of the search; ours are the defaults.
PUBLISHED = {"merge_rule": "factor", "start": "zero", "step": 1.0, "search_only": True}

Held = list[tuple[str, str]]  # answers to held-out queries and their golds


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter, allow_abbrev=False)
    demo_runs.add_options(parser, users=4)
    parser.add_argument("--seeds", type=int_list, default=(0, 1, 2), help="run seeds, with commas")
    parser.add_argument("--budget", type=positive, default=10, help="candidates of both searches (published: 10)")
    parser.add_argument("--history", type=natural, default=0, help="history items, the last ones; 0 = as stage 4")
    measuring.add_threads(parser)
    return parser


class Timed(Population):
    """A population that notes when each phase was asked for, and its number of candidates."""

    def __init__(self, start: Start, user: User, seed: int):
        journal = Journal(Path(tempfile.mkdtemp()) / "journal.jsonl")
        super().__init__(start.setup(), user, seed, start.settings.search.n_sim, journal)
        self.phases: list[tuple[float, int]] = []

    def answers(self, weights: Tensor) -> list[Answers]:
        self.phases.append((time.perf_counter(), len(weights)))
        return super().answers(weights)


class Published(Timed):
    """Answers by one PEFT adapter at a time, 100 new tokens each."""

    def __init__(self, start: Start, user: User, seed: int, model: Any, adapters: Sequence[Adapter]):
        super().__init__(start, user, seed)
        self.model, self.adapters = model, adapters
        self.given: list[Answers] = []

    def answers(self, weights: Tensor) -> list[Answers]:
        self.phases.append((time.perf_counter(), len(weights)))
        answers = [[self.answers_of(candidate)] for candidate in weights]
        self.given += answers
        return answers

    def answers_of(self, weights: Tensor) -> list[str]:
        """The answers of one candidate `[n]` to all history records."""
        contenders.copy_factors(self.model, "0", merge(self.adapters, weights, "factor"))
        rows: list[list[int]] = []
        for start in range(0, len(self.prompts), contenders.BATCH):
            rows += self.generate(self.prompts[start : start + contenders.BATCH])
        return [self.engine.encoder.text(row) for row in rows]

    @torch.inference_mode()
    def generate(self, prompts: Sequence[EncodedPrompt]) -> list[list[int]]:
        ids, mask = contenders.padded([prompt.ids for prompt in prompts], self.model.device)
        self.model.generation_config.eos_token_id = None
        tokens = contenders.PUBLISHED_TOKENS
        out = self.model.generate(
            input_ids=ids, attention_mask=mask, do_sample=False, pad_token_id=0, max_new_tokens=tokens
        )
        ends = set(self.engine.eos)
        return [cut(row, ends, self.limit) for row in out[:, ids.shape[1] :].tolist()]


def cut(row: list[int], ends: set[int], limit: int) -> list[int]:
    """An answer up to its EOS, at most as long as ours may be."""
    stop = next((place for place, token in enumerate(row) if token in ends), len(row))
    return row[: min(stop, limit)]


# -- one user -------------------------------------------------------------------------------------------------------


def search(start: Start, population: Timed, began: float) -> tuple[list[Evaluation], list[tuple[int, float]]]:
    """All evaluations, and for each phase: how many there were at its end, and seconds since the start."""
    evaluations = start.search(population)
    ends = [at for at, _ in population.phases[1:]] + [time.perf_counter()]
    phases, count = [], 0
    for (_, size), end in zip(population.phases, ends, strict=True):
        count += size
        phases.append((count, end - began))
    return evaluations, phases


def held_out(start: Start, user: User, weights: list[Tensor]) -> list[Held]:
    """Answers to the user's queries (k = 0) by each of several candidates."""
    settings = start.settings
    start.engine.bank.combine(torch.stack(weights), settings.search.merge_rule)
    methods = {str(row): row for row in range(len(weights))}
    predictions = predict(start.engine, start.texts, user, methods, settings.decoding, settings.seed)
    held = []
    for by_setting in predictions.values():
        held.append([(sample["output"], start.golds[sample["id"]]) for sample in by_setting["k0"]])
    return held


def run_published(start: Start, index: int, model: Any) -> dict[str, Any]:
    """Seconds, held-out answers at the end, and whether the bank answers alike under the factor rule."""
    start = replace(start, settings=replace(start.settings, search=replace(start.settings.search, **PUBLISHED)))
    user, adapters = start.users[index], start.pool.adapters(index)
    seed = derive_seed(start.settings.seed, user.user_id)
    began = time.perf_counter()
    population = Published(start, user, seed, model, adapters)
    evaluations, phases = search(start, population, began)
    start.engine.bank.load(adapters)
    by_bank = Timed(start, user, seed).answers(torch.stack([evaluation.weights for evaluation in evaluations]))
    best = choose(evaluations, start.settings.search)
    return {
        "seconds": phases[-1][1],
        "held": held_out(start, user, [best.weights])[0],
        "differing": differing(population.given, by_bank),
        "rows": len(evaluations) * len(population.prompts),
    }


def differing(published: list[Answers], by_bank: list[Answers]) -> int:
    """How many answers differ; both sides have one repeat."""
    count = 0
    for (answers,), (answers_by_bank,) in zip(published, by_bank, strict=True):
        count += sum(text != other for text, other in zip(answers, answers_by_bank, strict=True))
    return count


def run_ours(start: Start, index: int) -> dict[str, Any]:
    """Seconds at the end of each phase, and held-out answers of the best candidate until then."""
    user, counts = start.users[index], start.engine.counts
    rows, drafted = counts.rows, counts.from_draft
    began = time.perf_counter()
    start.engine.bank.load(start.pool.adapters(index))
    population = Timed(start, user, derive_seed(start.settings.seed, user.user_id))
    evaluations, phases = search(start, population, began)
    rows, drafted = counts.rows - rows, counts.from_draft - drafted
    best = [choose(evaluations[:count], start.settings.search).weights for count, _ in phases]
    held = held_out(start, user, best)
    return {"seconds": [end for _, end in phases], "held": held, "rows": rows, "from_draft": drafted}


# -- one task and seed ----------------------------------------------------------------------------------------------


def greedy(settings: stage.Settings, budget: int, history: int) -> stage.Settings:
    """Settings of both searches: greedy, with this budget, on the last `history` items (0: as in stage 4)."""
    return replace(
        settings,
        search=replace(settings.search, opt_budget=budget),
        decoding=replace(settings.decoding, temperature=0.0),
        prompts=replace(settings.prompts, recent_k=history or settings.prompts.recent_k),
    )


def run_one(task: str, seed: int, args: argparse.Namespace) -> dict[str, Any]:
    start = demo_runs.start(task, seed, args.output_dir)
    start = replace(start, settings=greedy(start.settings, args.budget, args.history))
    bank = start.engine.bank
    model = contenders.peft_model(bank.unwrap(), start.pool.adapters(0)[:1])
    start.engine.bank = type(bank)(bank.model)
    published, ours = [], []
    for index, user in enumerate(start.users[: args.users]):
        published.append(run_published(start, index, model))
        ours.append(run_ours(start, index))
        seconds = f"{published[-1]['seconds']:.1f} s published, {ours[-1]['seconds'][-1]:.1f} s ours"
        print(f"{task}, seed {seed}, user {user.user_id}: {seconds}", file=sys.stderr, flush=True)
    return summary(start, published, ours)


def summary(start: Start, published: list[dict], ours: list[dict]) -> dict[str, Any]:
    """Scores over all users' held-out answers; our first phase that is as good as the published end."""
    task = start.texts.task
    metric = task.metrics[0]
    sign = 1 if METRICS[metric].higher_is_better else -1

    def score_of(held: Iterable[Held]) -> float:
        answers, golds = zip(*chain.from_iterable(held), strict=True)
        return round(score(task.metrics, answers, golds, task.choices)[metric], 4)

    end = score_of(user["held"] for user in published)
    scores = list(map(score_of, zip(*map(itemgetter("held"), ours), strict=True)))  # by phase, over users
    seconds = list(map(sum, zip(*map(itemgetter("seconds"), ours), strict=True)))
    reached = next((phase for phase, mean in enumerate(scores) if sign * (mean - end) >= 0), None)
    total = sum(user["seconds"] for user in published)
    return {
        "metric": metric,
        "published": {"seconds": total, "score": end},
        "ours": {"seconds_by_phase": seconds, "score_by_phase": scores, "phase_reached": reached},
        "speedup_to_quality": None if reached is None else total / seconds[reached],
        "speedup_whole_search": total / seconds[-1],
        "answers_from_drafts": sum(user["from_draft"] for user in ours) / sum(user["rows"] for user in ours),
        "answers_compared": sum(user["rows"] for user in published),
        "answers_differing": sum(user["differing"] for user in published),
    }


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    measuring.set_threads(args.threads)
    runs = []
    for task, seed in product(args.tasks.split(","), args.seeds):
        runs.append({"task": task, "seed": seed} | run_one(task, seed, args))
    columns = ("task", "seed", "published", "ours", "speedup_to_quality", "answers_from_drafts")
    print(measuring.table(list(map(itemgetter(*columns), runs)), columns))
    speedups = [run["speedup_to_quality"] for run in runs]
    measuring.report(
        {
            "benchmark": "time_to_quality",
            "speedup_over_published": None if None in speedups else min(speedups),
            "speedup_over_peft_loop": None,  # merge.py measures it
            "time_over_forward_limit": None,
            "outputs_equal": all(run["answers_differing"] == 0 for run in runs),
            "runs": runs,
            "settings": vars(args),
            "environment": measuring.environment(torch.device("cpu"), torch.float32),
        }
    )


if __name__ == "__main__":
    cli.run(main)
