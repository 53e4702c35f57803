"""How fast are records scored under adapters? Several users' adapters in one bank against a PEFT loop.

Reads   data/demo/model for --shape demo; the other shapes are random weights
Writes  nothing; the last line is one JSON object
Takes   shape 30m 6 minutes (2 CPU cores), shape demo half a minute

    python benchmarks/membership.py --shape 30m

Records are prompts of 60 shared and 60-200 own tokens with targets as long as the workload's answers; every adapter
scores every record, as mia.py does for `--users_per_batch` test users at once.

Contenders:
    ours            prime.bank.logprobs.target_logprobs over all (adapter, record) pairs
    peft_loop       PEFT: set_adapter, batches of 8 as the records come, loss of the target tokens; published, too
    peft_sorted     the same, records sorted by length
    peft_mixed      PEFT's adapter_names, batches of 8 rows of several adapters, sorted by length
    peft_onednn     peft_loop with our products (prime.bank.cpu)
    forward_limit   plain forward passes over the same rows, sorted, one adapter, nothing else
    distinct_limit  the same over the distinct tokens only: the shared prefix once per adapter
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import contenders, measuring, shapes
from benchmarks.contenders import BATCH
from benchmarks.measuring import Measured
from benchmarks.train_anchors import random_records
from prime import cli
from prime.bank.bank import AdapterBank
from prime.bank.batching import Pair, every_pair
from prime.bank.budgets import auto_batch_tokens
from prime.bank.encoding import EncodedRecord, Tokens
from prime.bank.logprobs import target_logprobs
from prime.bank.lora import Adapter
from prime.settings import positive

Losses = dict[Pair, float]  # mean over the target's tokens, the size a tolerance can be given for

SCORING = ("ours", "peft_loop", "peft_sorted", "peft_mixed", "peft_onednn")
LIMITS = ("forward_limit", "distinct_limit")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.5, torch.float16: 0.1}


def build_parser() -> argparse.ArgumentParser:
    names = (shapes.DEMO, *shapes.SHAPES)
    parser = measuring.new_parser(__doc__, names, "30m", (*SCORING, *LIMITS))
    parser.add_argument("--adapters", type=positive, default=8, help="deployed adapters, those of test users")
    parser.add_argument("--records", type=positive, default=99, help="scored under every adapter")
    parser.add_argument("--rank", type=positive, default=24, help="of a deployed adapter: n_sim x 8")
    return parser


# -- contenders -----------------------------------------------------------------------------------------------------


def ours(bank: AdapterBank, adapters: Sequence[Adapter], records: Sequence[EncodedRecord], tokens: int) -> Losses:
    bank.load(adapters)
    scored = target_logprobs(bank, records, every_pair(range(len(adapters)), len(records)), tokens)
    return {pair: -float(logprobs.mean()) for pair, logprobs in scored.items()}


def peft_loop(model: Any, adapters: int, records: Sequence[EncodedRecord], *, in_order: bool) -> Losses:
    losses: Losses = {}
    order = range(len(records)) if in_order else by_length(records)
    for adapter in range(adapters):
        model.set_adapter(str(adapter))
        for batch in batches_of([(adapter, index) for index in order]):
            losses |= batch_losses(model, records, batch)
    return losses


def peft_mixed(model: Any, adapters: int, records: Sequence[EncodedRecord]) -> Losses:
    losses: Losses = {}
    pairs = [(adapter, index) for index, adapter in product(by_length(records), range(adapters))]
    for batch in batches_of(pairs):
        losses |= batch_losses(model, records, batch, adapter_names=[str(adapter) for adapter, _ in batch])
    return losses


def by_length(records: Sequence[EncodedRecord]) -> list[int]:
    return sorted(range(len(records)), key=lambda i: -len(records[i].ids) - len(records[i].target))


def batches_of(pairs: list[Pair]) -> list[list[Pair]]:
    return [pairs[start : start + BATCH] for start in range(0, len(pairs), BATCH)]


@torch.inference_mode()
def batch_losses(model: Any, records: Sequence[EncodedRecord], pairs: list[Pair], **options: Any) -> Losses:
    """Mean loss of each row's target, by the shifted logits of one forward pass."""
    rows = [records[index].ids + records[index].target for _, index in pairs]
    ids, mask = contenders.padded(rows, model.device)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False, **options).logits
    losses = {}
    for row, pair in enumerate(pairs):
        target = torch.tensor(records[pair[1]].target, device=model.device)
        predicted = logits[row, -len(target) - 1 : -1].float()
        losses[pair] = float(torch.nn.functional.cross_entropy(predicted, target, reduction="mean"))
    return losses


def rows_of(adapters: int, records: Sequence[EncodedRecord]) -> list[tuple[Tokens, int]]:
    """What has to be fed: prompt and target without EOS; logits are wanted for the target."""
    return [(record.ids + record.target[:-1], len(record.target)) for record in records] * adapters


def distinct_rows(adapters: int, records: Sequence[EncodedRecord]) -> list[tuple[Tokens, int]]:
    length = shapes.shared_length([record.ids for record in records])
    prefixes = [(records[0].ids[:length], 1)] * adapters
    return prefixes + [(row[length:], wanted) for row, wanted in rows_of(adapters, records)]


# -- main -----------------------------------------------------------------------------------------------------------


def compare(measured: Mapping[str, Measured]) -> dict[str, float]:
    """Largest difference of any record's loss to the first contender's."""
    first, *others = (name for name in measured if name in SCORING)
    return {name: largest_difference(measured[first].result, measured[name].result) for name in others}


def largest_difference(losses: Losses, others: Losses) -> float:
    return max(abs(loss - others[pair]) for pair, loss in losses.items())


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    measuring.set_threads(args.threads)
    model = shapes.make_model(args.shape, args.device, args.dtype)
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    records = random_records(1, args.records, int(model.config.vocab_size), args.seed)[0]
    n = args.adapters
    adapters = [shapes.random_adapter(model, seed, args.rank) for seed in range(n)]
    tokens = {
        "total": sum(len(row) for row, _ in rows_of(n, records)),
        "distinct": sum(len(row) for row, _ in distinct_rows(n, records)),
        "answers": sum(wanted for _, wanted in rows_of(n, records)),
    }
    flops = shapes.linear_flops(model, tokens["distinct"], tokens["answers"])
    peft = contenders.peft_model(model, adapters)
    bank = AdapterBank(model)
    limit_tokens = args.max_batch_tokens or auto_batch_tokens(bank)

    def runs(records: Sequence[EncodedRecord]) -> dict[str, Callable[[], Any]]:
        as_they_come = partial(peft_loop, peft, n, records, in_order=True)
        every: dict[str, Callable[[], Any]] = {
            "ours": partial(ours, bank, adapters, records, args.max_batch_tokens),
            "peft_loop": as_they_come,
            "peft_mixed": partial(peft_mixed, peft, n, records),
            "peft_sorted": partial(peft_loop, peft, n, records, in_order=False),
            "peft_onednn": partial(contenders.with_onednn, peft, as_they_come),
            "forward_limit": partial(contenders.forward_only, peft, rows_of(n, records), limit_tokens),
            "distinct_limit": partial(contenders.forward_only, peft, distinct_rows(n, records), limit_tokens),
        }
        return {name: run for name, run in every.items() if name in args.contenders}

    for run in runs(records[:4]).values():
        run()  # warm up
    peak = measuring.product_peak(device, dtype)
    measured = measuring.measure(runs(records), args.repeats, device)
    apart = compare(measured)
    seen = measuring.profile(runs(records)["ours"], device) if args.profile else None
    print(measuring.contenders_table(measured))
    measuring.report(
        {
            "benchmark": "membership",
            **measuring.ratios(measured, SCORING[1:], LIMITS),
            "speedup_over_published": measuring.ratio(measured, "peft_loop", "ours"),  # it has no way of its own
            "outputs_equal": all(value <= TOLERANCE[dtype] for value in apart.values()),
            "largest_loss_difference": apart,
            "tokens": tokens | {"distinct_over_total": tokens["distinct"] / tokens["total"]},
            "product_peak_gflops": peak / 1e9,
            "contenders": measuring.contenders_figures(measured, flops, peak),
            "profile": seen,
            "settings": vars(args),
            "environment": measuring.environment(device, dtype),
        }
    )


if __name__ == "__main__":
    cli.run(main)
