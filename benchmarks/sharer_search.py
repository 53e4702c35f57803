"""The nearest sharers out of a pool on disk, against the bare matrix product of the same embeddings.

Reads   nothing: makes `--sharers` random embeddings (around `--spread` of a common mean, as mean token states lie)
Writes  a temporary file of them in the form of stage 2; prints the ratio and the peak of memory, as JSON at the end
Takes   under a minute for 100,000 sharers of width 1024 and 1,000 users (2 CPU cores)

The product is one `users @ sharers.T` in fp32, both in memory, without norms, ranking or the file. The search maps
the file (a checked load as every stage does it), takes cosines block by block and settles every tie in fp64. With
--check its answer is compared with that of sorting all cosines in fp64 for some of the users.

    python benchmarks/sharer_search.py --sharers 100000 --users 1000 --width 1024 --n_sim 3 --check 20
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import measuring
from benchmarks.measuring import environment, measure, ratio, report
from prime import cli
from prime.merging.anchors import load_embeddings, save_tensor
from prime.merging.nearest import top_similar
from prime.settings import above_zero, natural, positive


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter, allow_abbrev=False)
    parser.add_argument("--sharers", type=positive, default=100_000, help="embeddings on disk")
    parser.add_argument("--users", type=positive, default=1000, help="test users")
    parser.add_argument("--width", type=positive, default=1024, help="numbers of an embedding")
    parser.add_argument("--n_sim", type=positive, default=3, help="nearest sharers of a user")
    parser.add_argument("--spread", type=above_zero, default=1.0, help="of the embeddings around their mean")
    parser.add_argument("--check", type=natural, default=20, help="users whose answer is compared; 0 = none")
    parser.add_argument("--repeats", type=positive, default=3, help="measurements of each; the median counts")
    parser.add_argument("--seed", type=int, default=0, help="of the embeddings")
    measuring.add_threads(parser)
    return parser


def embeddings(rows: int, width: int, spread: float, stream: torch.Generator, mean: torch.Tensor) -> torch.Tensor:
    return torch.randn(rows, width, generator=stream).mul_(spread).add_(mean)


def agreeing(test: torch.Tensor, pool: torch.Tensor, found: list[list[int]], users: int) -> int:
    """Of the first `users` rows, those whose answer is that of sorting all their cosines in fp64."""
    unit, same = torch.nn.functional.normalize(pool.double()), 0
    for row, nearest in zip(test[:users].double(), found, strict=False):
        order = (unit @ torch.nn.functional.normalize(row, dim=0)).argsort(descending=True, stable=True)
        same += order[: len(nearest)].tolist() == nearest
    return same


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    measuring.set_threads(args.threads)
    cpu = torch.device("cpu")
    stream = torch.Generator().manual_seed(args.seed)
    mean = torch.randn(args.width, generator=stream)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "user_history_emb.pt"
        save_tensor(file, embeddings(args.sharers, args.width, args.spread, stream, mean))
        test = embeddings(args.users, args.width, args.spread, stream, mean)

        def search() -> list[list[int]]:
            return top_similar(test, load_embeddings(file, args.sharers), args.n_sim)

        searched = measure({"search": search}, args.repeats, cpu)
        peak = max(searched["search"].peak_mb)
        pool = load_embeddings(file, args.sharers).clone()
        measured = measure({"search": search, "product": lambda: (test @ pool.T).shape}, args.repeats, cpu)
        same = agreeing(test, pool, measured["search"].result, args.check)
    print(measuring.contenders_table(measured))
    figures = {
        "sharers": args.sharers, "users": args.users, "width": args.width, "n_sim": args.n_sim, "spread": args.spread,
        "search_over_product": ratio(measured, "search", "product"),
        "cpu_seconds_over_product": min(measured["search"].cpu_seconds) / min(measured["product"].cpu_seconds),
        "peak_mb_of_the_process": peak, "embeddings_mb": pool.numel() * 4 / 2**20,
        "checked": args.check, "same_as_sorting_fp64": same, "seconds": measured["search"].figures()["seconds"],
        **environment(cpu, torch.float32),
    }  # fmt: skip
    report(figures)


if __name__ == "__main__":
    cli.run(main)
