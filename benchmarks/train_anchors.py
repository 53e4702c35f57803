"""How fast are anchors' adapters trained? All in one bank against one PEFT model after the other.

Reads   data/demo for --shape demo (model and histories of movie_tagging); other shapes are random
Writes  nothing; the last line is one JSON object
Takes   shape demo 2 minutes, shape 30m 25 minutes (2 CPU cores)

    python benchmarks/train_anchors.py --shape demo
    python benchmarks/train_anchors.py --shape 30m

Both sides have the same records in the same order, the same initial adapters, AdamW, clipping and schedule. A first
run of each without dropout compares the losses step by step; the timed runs have `--dropout`, whose noise is each
side's own. `peft_onednn` is `peft_loop` with our products (prime.bank.cpu). `forward_limit` is plain forward passes
over the same rows, sorted; a backward pass over a frozen base costs about as much again, so
`time_over_forward_and_backward` is half of `time_over_forward_limit`.
"""

import argparse
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import contenders, measuring, shapes
from prime import cli
from prime.bank.bank import AdapterBank
from prime.bank.encoding import EncodedRecord, Encoder, Tokens
from prime.bank.lora import Adapter
from prime.bank.train import BETAS, Learner, cosine_lr, train
from prime.checkpoints.loading import load_tokenizer
from prime.seeds import derive_seed
from prime.settings import TrainingSettings, below_one, non_negative, positive

Losses = list[list[float]]
CONTENDERS = ("ours", "peft_loop", "peft_onednn", "forward_limit")
LIMIT_TOKENS = 2048  # of a forward pass of the limits
# Largest difference of a step's loss that still counts as equal: rounding, by the model's dtype.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.02}


def build_parser() -> argparse.ArgumentParser:
    names = (shapes.DEMO, *shapes.SHAPES)
    parser = measuring.new_parser(__doc__, names, shapes.DEMO, CONTENDERS)
    parser.add_argument("--anchors", type=positive, default=16, help="adapters to train")
    parser.add_argument("--records", type=positive, default=30, help="records of an anchor, the last ones")
    parser.add_argument("--epochs", type=positive, default=1, help="passes over the records in the timed runs")
    parser.add_argument("--batch_size", type=positive, default=6, help="records of a step of an adapter")
    parser.add_argument("--dropout", type=below_one, default=0.05, help="of the timed runs, in front of adapters")
    parser.add_argument("--lr", type=non_negative, default=1e-3, help="learning rate at the start of the cosine")
    parser.add_argument("--rank", type=positive, default=8, help="of the adapters; alpha is the same")
    parser.add_argument("--check_steps", type=positive, default=5, help="steps whose losses are compared")
    return parser


# -- work -----------------------------------------------------------------------------------------------------------


def demo_records(anchors: int, count: int) -> list[list[EncodedRecord]]:
    """Histories of the demo's candidates with the most items."""
    # Only here: a machine that measures random shapes needs nothing that reads users.
    from prime.users.data import load_users
    from prime.users.prompts import history_records
    from prime.users.tasks import get_task

    task, folder = get_task("movie_tagging"), shapes.ROOT / "data/demo"
    encoder = Encoder(load_tokenizer(str(folder / "model")))
    users = load_users(folder / task.name / "user_anchor_candidate.json", task)
    users = sorted(users, key=lambda user: -len(user.profile))[:anchors]
    by_anchor = []
    for user in users:
        records = history_records(user, task, task.templates, None, 50)[-count:]
        by_anchor.append([encoder.record(record.id, record.input, record.target) for record in records])
    return by_anchor


def random_records(anchors: int, count: int, vocabulary: int, seed: int) -> list[list[EncodedRecord]]:
    """Prompts like those of merge.py's workload `tag`: 60 shared and 60-200 own tokens, 1-5 answer tokens."""
    rng, kind = random.Random(derive_seed("records", seed)), shapes.WORKLOADS["tag"]
    shared = (shapes.BOS, *shapes.some_tokens(rng, vocabulary, shapes.SHARED_TOKENS - 1))

    def record(anchor: int, number: int) -> EncodedRecord:
        own = shapes.some_tokens(rng, vocabulary, rng.randint(*shapes.OWN_TOKENS))
        answer = shapes.new_answer(rng, kind, vocabulary)
        return EncodedRecord(f"{anchor}-{number}", shared + own, (*answer, shapes.EOS))

    return [list(map(partial(record, anchor), range(count))) for anchor in range(anchors)]


def learners_of(args: argparse.Namespace, vocabulary: int) -> list[Learner]:
    if args.shape == shapes.DEMO:
        records = demo_records(args.anchors, args.records)
    else:
        records = random_records(args.anchors, args.records, vocabulary, args.seed)
    seeds = [derive_seed("anchor", args.seed, place) for place in range(len(records))]
    return [Learner(i, f"anchor {i}", seed, records[i]) for i, seed in enumerate(seeds)]


def settings_of(args: argparse.Namespace) -> TrainingSettings:
    """The published settings of anchors but for the options."""
    return TrainingSettings(
        lr=args.lr, epochs=args.epochs, batch_size=args.batch_size, lora_dropout=args.dropout, clip=1.0
    )


# -- contenders -----------------------------------------------------------------------------------------------------


def ours(bank: AdapterBank, learners: Sequence[Learner], settings: TrainingSettings, rank: int, tokens: int) -> Losses:
    bank.allocate([learner.seed for learner in learners], rank, rank)
    return train(bank, learners, settings, tokens)


def peft_loop(
    model: nn.Module, starts: Sequence[Adapter], learners: Sequence[Learner], settings: TrainingSettings
) -> Losses:
    """One PEFT model after the other; the base is copied once, adapters are reset to their start."""
    losses: Losses = []
    wrapped = contenders.peft_model(model, starts[:1], settings.lora_dropout)
    for start, learner in zip(starts, learners, strict=True):
        contenders.copy_factors(wrapped, "0", start)
        losses.append(peft_training(wrapped.train(), learner, settings))
    return losses


def peft_training(model: Any, learner: Learner, settings: TrainingSettings) -> list[float]:
    """The textbook loop: pad right, mean over target tokens, clip, AdamW, cosine by step."""
    trained = [parameter.requires_grad_() for name, parameter in model.named_parameters() if "lora_" in name]
    plan = learner.batches(settings)
    optimizer = torch.optim.AdamW(trained, lr=settings.lr, betas=BETAS, weight_decay=settings.weight_decay)
    losses = []
    for step, batch in enumerate(plan):
        optimizer.param_groups[0]["lr"] = cosine_lr(settings, step, len(plan))
        optimizer.zero_grad()
        loss = peft_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, settings.clip)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def peft_loss(model: Any, batch: Sequence[EncodedRecord]) -> Tensor:
    whole = [[*record.ids, *record.target] for record in batch]
    width = max(map(len, whole))
    ids = torch.tensor([row + [shapes.PAD] * (width - len(row)) for row in whole], device=model.device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in whole], device=model.device)
    labels = torch.full_like(ids, -100)
    for row, record in enumerate(batch):
        labels[row, len(record.ids) : len(whole[row])] = torch.tensor(record.target)
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits.float()
    return cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def rows_of(learners: Sequence[Learner], settings: TrainingSettings) -> list[tuple[Tokens, int]]:
    """The rows of all steps: prompt and target without EOS, and the length of the target."""
    rows = []
    for learner in learners:
        for record in chain.from_iterable(learner.batches(settings)):
            rows.append((record.ids + record.target[:-1], len(record.target)))
    return rows


# -- main -----------------------------------------------------------------------------------------------------------


def largest_difference(losses: Losses, others: Losses) -> float:
    pairs = zip(chain.from_iterable(losses), chain.from_iterable(others), strict=True)
    return max(abs(loss - other) for loss, other in pairs)


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    measuring.set_threads(args.threads)
    model = shapes.make_model(args.shape, args.device, args.dtype)
    device, dtype = next(model.parameters()).device, next(model.parameters()).dtype
    learners = learners_of(args, int(model.config.vocab_size))
    settings = settings_of(args)
    tokens = sum(len(row) for row, _ in rows_of(learners, settings))
    predicted = sum(wanted for _, wanted in rows_of(learners, settings))
    flops = 2 * shapes.linear_flops(model, tokens, predicted)
    limit_model = contenders.peft_model(model, [shapes.random_adapter(model, 0, args.rank)])
    plain = contenders.peft_model(model, [shapes.random_adapter(model, 0, args.rank)]).unload()
    bank = AdapterBank(model)
    bank.allocate([learner.seed for learner in learners], args.rank, args.rank)
    starts = [bank.adapter(learner.slot) for learner in learners]

    def runs(settings: TrainingSettings) -> dict[str, Callable[[], Any]]:
        one_by_one = partial(peft_loop, plain, starts, learners, settings)
        return {
            "ours": partial(ours, bank, learners, settings, args.rank, args.max_batch_tokens),
            "peft_loop": one_by_one,
            "peft_onednn": partial(contenders.with_onednn, plain, one_by_one),
            "forward_limit": partial(contenders.forward_only, limit_model, rows_of(learners, settings), LIMIT_TOKENS),
        }

    check = runs(replace(settings, lora_dropout=0.0, max_step=args.check_steps))
    losses = {name: check[name]() for name in CONTENDERS[:-1] if name in args.contenders}  # warms up, too
    first = next(iter(losses.values()), [])
    apart = max((largest_difference(first, theirs) for theirs in losses.values()), default=0.0)
    peak = measuring.product_peak(device, dtype)
    timed = {name: run for name, run in runs(settings).items() if name in args.contenders}
    measured = measuring.measure(timed, args.repeats, device)
    over = measuring.ratio(measured, "ours", "forward_limit")
    seen = measuring.profile(timed["ours"], device) if args.profile else None
    print(measuring.contenders_table(measured))
    measuring.report(
        {
            "benchmark": "train_anchors",
            **measuring.ratios(measured, CONTENDERS[1:-1], CONTENDERS[-1:]),
            "speedup_over_published": measuring.ratio(measured, "peft_loop", "ours"),  # published: one after the other
            "time_over_forward_and_backward": None if over is None else over / 2,
            "outputs_equal": apart <= TOLERANCE[dtype],
            "largest_loss_difference": apart,
            "anchors": len(learners),
            "steps": sum(len(learner.batches(settings)) for learner in learners),
            "tokens": {"total": tokens, "answers": predicted},
            "product_peak_gflops": peak / 1e9,
            "contenders": measuring.contenders_figures(measured, flops, peak),
            "profile": seen,
            "settings": vars(args),
            "environment": measuring.environment(device, dtype),
        }
    )


if __name__ == "__main__":
    cli.run(main)
