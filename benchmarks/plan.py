"""Is what `--plan` says true? Planned beside measured peak, in megabytes, each of PHASES in a process of its own.

Reads   data/demo/model for the shape `demo`; the other shapes are random weights, whose rows end at their limit
Writes  nothing that stays; as the last line a JSON object
Takes   2 minutes with the shape 30m (2 CPU cores). Measured is the process's peak, or torch.cuda.max_memory_allocated
"""

import argparse
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.measuring import new_parser, peak_mb, report, set_threads, table
from benchmarks.shapes import DEMO, EOS, SHAPES, config_of, make_model, random_adapter, random_weights
from prime import cli
from prime.bank.bank import AdapterBank
from prime.bank.batching import every_pair
from prime.bank.decode import Request, decode
from prime.bank.encoding import EncodedRecord
from prime.bank.logprobs import target_logprobs
from prime.bank.sampling import Sampler
from prime.bank.train import Learner, train
from prime.checkpoints.memory import Work
from prime.checkpoints.plan import plan
from prime.runs.workers import keep_freed_memory
from prime.settings import ModelSettings, TrainingSettings

RECORDS = [EncodedRecord(str(i), (1, i + 3, *[5] * 198), (*[6] * 19, EOS)) for i in range(80)]
TRAINING = Work("training", 8, 8, prompt=200, answer=20, rows=8 * 6, shortest=200, shared=0)
SEARCH = replace(TRAINING, kind="answering", adapters=5, rank=3 * 8, rows=5 * 80, other_ranks=2 * 3 * 8)
PHASES = {
    "training": TRAINING, "checkpointing": replace(TRAINING, gradient_checkpointing=True), "answering": SEARCH,
    "scoring": replace(SEARCH, kind="scoring"),
}  # fmt: skip


def measure(phase: str, args: argparse.Namespace) -> dict[str, float]:
    """The phase planned, and gone through in this process."""
    set_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        config_of(args.shape).save_pretrained(folder)
        settings = ModelSettings(llama_model_path=folder, device=args.device, dtype=args.dtype)
        planned = plan(replace(settings, max_batch_tokens=args.max_batch_tokens), [PHASES[phase]])
    model = make_model(args.shape, args.device, args.dtype)
    adapters = [random_adapter(model, seed) for seed in range(3)]
    bank, pairs = AdapterBank(model), every_pair(range(5), len(RECORDS))
    if PHASES[phase].kind == "training":
        bank.allocate(list(range(8)), 8, 8)
        learners = [Learner(place, str(place), place, RECORDS[:6]) for place in range(8)]
        train(bank, learners, TrainingSettings(gradient_checkpointing=phase != "training"), args.max_batch_tokens)
    else:
        bank.load(adapters)
        bank.combine(random_weights(3, 1, 0), "delta")
    if phase == "scoring":
        target_logprobs(bank, RECORDS, pairs, args.max_batch_tokens)
    elif phase == "answering":
        request = Request(RECORDS, pairs, Sampler(), 20, [[record.target] for record in RECORDS])
        decode(bank, request, [EOS], args.max_batch_tokens)
    return {"planned": planned.peak / 2**20, "measured": peak_mb(bank.device)}


def apart(phase: str, args: argparse.Namespace) -> dict[str, float]:
    with ProcessPoolExecutor(1, get_context("spawn"), keep_freed_memory) as fresh:
        return fresh.submit(measure, phase, args).result()


def main(argv: list[str] | None = None) -> None:
    args = new_parser(__doc__, (DEMO, *SHAPES), "30m", tuple(PHASES)).parse_args(argv)
    figures = {phase: apart(phase, args) for phase in args.contenders}
    rows = [[phase, *sides.values(), sides["planned"] / sides["measured"]] for phase, sides in figures.items()]
    print(table(rows, ["", "planned", "measured", "planned over measured"]))
    report(figures)


if __name__ == "__main__":
    cli.run(main)
