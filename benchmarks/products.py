"""What do oneDNN's products of frozen layers gain over PyTorch's own? The layers of a shape, by number of rows.

Reads   nothing
Writes  nothing; the last line is one JSON object
Takes   half a minute

    python benchmarks/products.py --shape 30m

A row is a token: 16 to 100 in a step of decoding, about 1,500 in a pass over prompts. `plain` is `nn.Linear` as it is,
`onednn` the same layer quickened (`prime.bank.cpu`); both in turn, the best of several tries. Where oneDNN has
nothing to gain (`prime.bank.cpu.available`), or a layer is small, both are the same code and the ratio is 1.
"""

import argparse
import copy
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import measuring, shapes
from prime import cli
from prime.bank.cpu import available, quicken

ROWS = (1, 16, 64, 256, 1536)
TRIES, WORK = 7, 2e8  # timings of each; operations of a timing, so that short ones are repeated


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter, allow_abbrev=False)
    parser.add_argument("--shape", choices=tuple(shapes.SHAPES), default="30m", help="model; see benchmarks/shapes.py")
    measuring.add_threads(parser)
    return parser


def sizes_of(shape: str) -> dict[str, tuple[int, int]]:
    """(in, out) of the layers."""
    width, _, heads, kv_heads, inner, vocabulary, _ = shapes.SHAPES[shape]
    return {
        "q, o": (width, width), "k, v": (width, width // heads * kv_heads), "gate, up": (width, inner),
        "down": (inner, width), "head": (width, vocabulary),
    }  # fmt: skip


def rate(layer: nn.Linear, x: Tensor, *, backward: bool) -> float:
    """Operations per second, of the product or of its input's gradient."""
    flops, best = 2.0 * x.shape[0] * layer.weight.numel(), float("inf")
    repeats = max(1, int(WORK / flops))
    x = x.clone().requires_grad_(backward)
    y = layer(x)
    gradient = torch.ones_like(y)
    for _ in range(TRIES):
        started = time.perf_counter()
        for _ in range(repeats):
            if backward:
                torch.autograd.grad(y, x, gradient, retain_graph=True)
            else:
                layer(x)
        best = min(best, (time.perf_counter() - started) / repeats)
    return flops / best


def compare(width: int, out: int, rows: int) -> dict[str, Any]:
    """Rates of both in Gflop/s, and how far their outputs are apart relative to the largest."""
    plain = nn.Linear(width, out, bias=False).requires_grad_(False)
    quick, x = copy.deepcopy(plain), torch.randn(rows, width)
    quicken(quick)
    rates: dict[str, Any] = {}
    for side, backward in (("forward", False), ("gradient", True)):
        theirs, ours = rate(plain, x, backward=backward), rate(quick, x, backward=backward)
        rates[side] = {"plain": theirs / 1e9, "onednn": ours / 1e9, "ratio": ours / theirs}
    with torch.inference_mode():
        a, b = plain(x), quick(x)
    return rates | {"apart": float((a - b).abs().max() / a.abs().max())}


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    measuring.set_threads(args.threads)
    torch.manual_seed(0)
    layers, rows_of_table = [], []
    for (name, (width, out)), rows in product(sizes_of(args.shape).items(), ROWS):
        rates = compare(width, out, rows)
        layers.append({"layer": name, "in": width, "out": out, "rows": rows} | rates)
        rows_of_table.append([name, rows, *rates["forward"].values(), *rates["gradient"].values()])
    head = ("layer", "rows", "plain", "onednn", "ratio", "gradient: plain", "onednn", "ratio")
    print(measuring.table(rows_of_table, head))
    place = measuring.environment(torch.device("cpu"), torch.float32)
    measuring.report({"benchmark": "products", "onednn": available(), "layers": layers, "environment": place})


if __name__ == "__main__":
    cli.run(main)
