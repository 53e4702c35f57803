"""How fast are a user's candidates answered? (1 + n_sim + budget) adapters x prompts, ours against PEFT and a limit.

Reads   data/demo/model for --shape demo; the other shapes are random weights
Writes  nothing; the last line is one JSON object
Takes   shape 30m, 2 CPU cores: about 15 minutes without `published`, which takes 10 minutes a repeat for all candidates
        (--published_candidates 2 measures two and scales); shape demo: 2 minutes

    python benchmarks/merge.py --shape 30m --workload tag
    python benchmarks/merge.py --shape 30m --workload title
    python benchmarks/merge.py --shape 30m --workload tag --scaling
    python benchmarks/merge.py --shape llama-3.2-3b --device cuda --workload tag

Contenders (benchmarks/contenders.py):
    ours            the bank: base and sharers, then generations of 5, every answer a draft for the next
    peft_loop       PEFT: set_adapter, generate with EOS stop, batches of 8 as the prompts come
    peft_sorted     the same, prompts sorted by length
    peft_mixed      PEFT's adapter_names, rows of all candidates sorted by length, batches of 8
    peft_onednn     peft_loop with our products, prime.bank.cpu: what is left is how the work is arranged
    published       one adapter at a time, 100 new tokens always, batches of 8 as the prompts come
    forward_limit   plain forward passes over all prompt + answer rows, sorted, one adapter, nothing else
    distinct_limit  the same over the distinct tokens only: the shared prefix once per candidate
    distinct_onednn the same with our products: what is left for us to gain
"""

import argparse
import sys
from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import contenders, measuring, shapes
from benchmarks.measuring import Measured
from benchmarks.shapes import Kind, Shares, Work
from prime import cli
from prime.bank.bank import AdapterBank
from prime.bank.budgets import auto_batch_tokens
from prime.bank.lora import RULES, merge
from prime.settings import fraction, natural, positive

ANSWERING = ("ours", "peft_loop", "peft_sorted", "peft_mixed", "peft_onednn", "published")
LIMITS = ("forward_limit", "distinct_limit", "distinct_onednn")
SCALES = (1, 2, 4)
# Largest difference of the largest logits that still counts as equal: rounding, by the model's dtype.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}


def build_parser() -> argparse.ArgumentParser:
    names = (shapes.DEMO, *shapes.SHAPES)
    parser = measuring.new_parser(__doc__, names, "30m", (*ANSWERING, *LIMITS))
    parser.add_argument("--workload", choices=tuple(shapes.WORKLOADS), default="tag", help="length of the answers")
    parser.add_argument("--prompts", type=positive, default=99, help="of the user, 60 shared and 60-200 own tokens")
    parser.add_argument("--n_sim", type=positive, default=3, help="sharers")
    parser.add_argument("--budget", type=natural, default=10, help="candidates of the search")
    parser.add_argument("--merge_rule", choices=RULES, default="delta", help="how candidates are made of sharers")
    parser.add_argument(
        "--accepted", type=shares, help="shares of rows whose answer is the first draft: base and sharers, search; "
        "default as measured (benchmarks/draft_shares.py)"
    )  # fmt: skip
    parser.add_argument("--known", type=shares, help="shares of rows whose answer is another draft; default measured")
    parser.add_argument(
        "--agreed", type=shares, help="share of a new answer's tokens that its draft begins with; default measured"
    )
    parser.add_argument(
        "--published_candidates", type=natural, default=0,
        help="measure `published` on the first N candidates only and scale its seconds linearly; 0 = on all",
    )  # fmt: skip
    parser.add_argument("--scaling", action="store_true", help="also ours for users and budget x1, x2, x4")
    return parser


def shares(text: str) -> tuple[float, float]:
    """Option type: `0.5,0.8`."""
    parts = tuple(fraction(part) for part in text.split(","))
    if len(parts) != 2:
        raise argparse.ArgumentTypeError(f"{text!r}: two shares expected, base and sharers, search")
    return parts[0], parts[1]


def kind_of(args: argparse.Namespace) -> Kind:
    """The workload with the shares that the options change."""
    kind = shapes.WORKLOADS[args.workload]
    changed = {name: getattr(args, name) for name in Shares._fields if getattr(args, name)}
    return kind._replace(
        points=kind.points._replace(**{name: pair[0] for name, pair in changed.items()}),
        search=kind.search._replace(**{name: pair[1] for name, pair in changed.items()}),
    )


class Field:
    """One model with its adapters; makes the contenders' runs over a piece of work."""

    def __init__(self, args: argparse.Namespace, model: nn.Module):
        self.args = args
        self.sharers = [shapes.random_adapter(model, seed) for seed in range(args.n_sim)]
        scales = SCALES if args.scaling else (1,)
        self.weights = shapes.random_weights(args.n_sim, args.budget * max(scales), args.seed)
        self.candidates = 1 + args.n_sim + args.budget
        self.peft: Any = None
        if set(args.contenders) != {"ours"}:
            merged = [merge(self.sharers, weights, args.merge_rule) for weights in self.weights[: self.candidates]]
            self.peft = contenders.peft_model(model, merged)
        self.bank = AdapterBank(model)
        self.limit_tokens = args.max_batch_tokens or auto_batch_tokens(self.bank)

    def ours(self, work: Work) -> contenders.Result:
        args = self.args
        return contenders.answer_with_bank(
            self.bank, self.sharers, self.weights, args.merge_rule, work, args.max_batch_tokens
        )

    def limit(self, rows: Callable[[Work], list], work: Work) -> None:
        self.peft.set_adapter(str(work.candidates[-1]))
        contenders.forward_only(self.peft, rows(work), self.limit_tokens)

    def runs(self, work: Work) -> dict[str, Callable[[], Any]]:
        """The contenders asked for; `published` on its part of the work."""
        part = work.first(self.args.published_candidates or self.candidates, len(work.prompts))
        loop = contenders.answer_by_loop
        distinct = partial(self.limit, contenders.distinct_rows, work)
        as_they_come = partial(loop, self.peft, work, stop=True, in_order=True)
        every: dict[str, Callable[[], Any]] = {
            "ours": partial(self.ours, work),
            "peft_loop": as_they_come,
            "peft_sorted": partial(loop, self.peft, work, stop=True, in_order=False),
            "peft_mixed": partial(contenders.answer_mixed, self.peft, work),
            "peft_onednn": partial(contenders.with_onednn, self.peft, as_they_come),
            "published": partial(loop, self.peft, part, stop=False, in_order=True),
            "forward_limit": partial(self.limit, contenders.all_rows, work),
            "distinct_limit": distinct,
            "distinct_onednn": partial(contenders.with_onednn, self.peft, distinct),
        }
        return {name: run for name, run in every.items() if name in self.args.contenders}


def compare(measured: Mapping[str, Measured], work: Work, tolerance: float) -> tuple[bool, dict[str, float]]:
    """Whether all who answered gave the scripted answers, and how far their logits are from those of the first.

    A contender that was measured on a part of the work (the first candidates) is compared on that part.
    """
    results = {name: contender.result for name, contender in measured.items() if name in ANSWERING}
    # A contender's answers are a part of the scripted ones: items() compares keys and values.
    equal = all(result.answers and result.answers.items() <= work.answers.items() for result in results.values())
    first = next(iter(results.values()))
    apart = {}
    for name, result in list(results.items())[1:]:
        size = min(len(first.tops), len(result.tops))
        apart[name] = float((first.tops[:size] - result.tops[:size]).abs().max())
    return equal and all(value <= tolerance for value in apart.values()), apart


def scaling(field: Field, make: Callable[[int, int], Work]) -> list[dict[str, Any]]:
    """Seconds and peak memory of ours for more users and for a larger budget."""
    args, figures = field.args, []
    for what, scale in product(("users", "budget"), SCALES):
        users, budget = (scale, args.budget) if what == "users" else (1, args.budget * scale)
        works = [make(budget, args.seed + user) for user in range(users)]
        run = {f"{what} x{scale}": partial(answer_users, field, works)}
        (measured,) = measuring.measure(run, args.repeats, field.bank.device).values()
        rows = sum(len(work.answers) for work in works)
        per_row = 1000 * measured.median / rows
        figures.append({"what": what, "scale": scale, "rows": rows, "ms_per_row": per_row} | measured.figures())
    return figures


def answer_users(field: Field, works: list[Work]) -> None:
    for work in works:
        field.ours(work)


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    measuring.set_threads(args.threads)
    model = shapes.make_model(args.shape, args.device, args.dtype)
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    kind, vocabulary = kind_of(args), int(model.config.vocab_size)

    def make(budget: int, seed: int) -> Work:
        return shapes.make_work(kind, vocabulary, args.prompts, args.n_sim, budget, seed)

    work, tokens = make(args.budget, args.seed), make(args.budget, args.seed).tokens()
    flops = shapes.linear_flops(model, tokens["distinct"], tokens["answers"])
    field = Field(args, model)
    for name, run in field.runs(work.first(min(2, field.candidates), min(8, args.prompts))).items():
        if name != "published":  # the code of peft_loop, and long
            run()  # warm up
    peak = measuring.product_peak(device, dtype)
    measured = measuring.measure(field.runs(work), args.repeats, device)
    equal, apart = compare(measured, work, TOLERANCE[dtype])
    scaled = scale_published(args, field.candidates, measured)
    figures: dict[str, Any] = {
        "benchmark": "merge",
        **measuring.ratios(measured, ANSWERING[1:], LIMITS),
        "outputs_equal": equal,
        "largest_logit_difference": apart,
        "published_scaled_from_candidates": scaled,
        "tokens": tokens | {"distinct_over_total": tokens["distinct"] / tokens["total"]},
        "product_peak_gflops": peak / 1e9,
        "contenders": measuring.contenders_figures(measured, flops, peak),
    }
    if "ours" in measured:
        figures["drafts"] = drafts(kind, measured["ours"].result.counts)
    if args.profile:
        figures["profile"] = measuring.profile(partial(field.ours, work), device)
    if args.scaling:
        figures["scaling"] = scaling(field, make)
        columns = ("what", "scale", "rows", "median", "ms_per_row", "peak_mb")
        print(measuring.table(list(map(itemgetter(*columns), figures["scaling"])), columns))
    figures |= {"settings": vars(args), "environment": measuring.environment(device, dtype)}
    print(measuring.contenders_table(measured))
    measuring.report(figures)


def scale_published(args: argparse.Namespace, candidates: int, measured: Mapping[str, Measured]) -> int | None:
    """Scale the seconds of `published` to all candidates; how many it was measured on, None where on all."""
    part = args.published_candidates
    if "published" not in measured or not 0 < part < candidates:
        return None
    published = measured["published"]
    published.seconds = [seconds * candidates / part for seconds in published.seconds]
    published.cpu_seconds = [seconds * candidates / part for seconds in published.cpu_seconds]
    return part


def drafts(kind: Kind, counts: Any) -> dict[str, Any]:
    """The shares the script was made with, and what decoding counted."""
    return {
        "shares_points": kind.points._asdict(),
        "shares_search": kind.search._asdict(),
        "answered_in_one_pass": counts.from_draft / counts.rows,
        "passes": counts.passes,
        "tokens_fed": counts.tokens,
    }


if __name__ == "__main__":
    cli.run(main)
