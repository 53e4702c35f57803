"""How much memory does converting a Meta checkpoint take? A synthetic one of two shards in bf16, 1 GB by default.

Reads   nothing
Writes  <work_dir>/meta, <work_dir>/hf   the checkpoint and its conversion; removed at the end
Takes   about a minute and twice the checkpoint's size on disk

Measured is the converting process: its highest resident size (VmHWM) over that after its imports. Pages of the
mapped shards count in it while they are resident, though the system may drop them at any time; `anonymous` is what
the process holds of its own (RssAnon, sampled), without them.

    python benchmarks/convert.py
"""

import argparse
import json
import shutil
import sys
import threading
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.measuring import child_report, report, status_mb
from prime import cli
from prime.checkpoints.loading import load_tokenizer
from prime.checkpoints.meta_conversion import convert
from prime.settings import positive

WIDTH, VOCABULARY, SHARDS = 2048, 32_000, 2
HIDDEN = 5632  # of params.json's multiple_of 256


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=cli.HelpFormatter, allow_abbrev=False)
    parser.add_argument("--layers", type=positive, default=9, help="of width 2,048; 9 make 1.0 GB")
    parser.add_argument("--work_dir", default=str(ROOT / "output/benchmarks/convert"), help="what is made on the way")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    return parser


def make(folder: Path, layers: int) -> int:
    """Write params.json and the shards; bytes of the weights."""
    folder.mkdir(parents=True, exist_ok=True)
    params = {"dim": WIDTH, "n_layers": layers, "n_heads": 16, "multiple_of": 256, "norm_eps": 1e-5, "vocab_size": -1}
    (folder / "params.json").write_text(json.dumps(params))
    d, h = WIDTH, HIDDEN
    cut = {  # a shard's part of each tensor
        "attention.wq": (d // SHARDS, d), "attention.wk": (d // SHARDS, d), "attention.wv": (d // SHARDS, d),
        "attention.wo": (d, d // SHARDS), "feed_forward.w1": (h // SHARDS, d), "feed_forward.w2": (d, h // SHARDS),
        "feed_forward.w3": (h // SHARDS, d), "attention_norm": (d,), "ffn_norm": (d,),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"norm.weight": (d,)}
    for layer in range(layers):
        shapes |= {f"layers.{layer}.{name}.weight": shape for name, shape in cut.items()}
    shapes |= {"tok_embeddings.weight": (VOCABULARY, d // SHARDS), "output.weight": (VOCABULARY // SHARDS, d)}
    for shard in range(SHARDS):
        stream = torch.Generator().manual_seed(shard)
        tensors = {name: torch.randn(shape, generator=stream).bfloat16() for name, shape in shapes.items()}
        torch.save(tensors, folder / f"consolidated.{shard:02d}.pth")
    return sum(path.stat().st_size for path in folder.glob("*.pth"))


def child(folder: Path) -> dict[str, float]:
    """Convert in this process; megabytes before and at the peak."""
    tokenizer = load_tokenizer(str(ROOT / "data/demo/model"))
    before, anonymous_before = status_mb("VmRSS"), status_mb("RssAnon")
    anonymous, stop = [anonymous_before], threading.Event()

    def watch() -> None:
        while not stop.wait(0.01):
            anonymous.append(status_mb("RssAnon"))

    thread = threading.Thread(target=watch)
    thread.start()
    started = time.perf_counter()
    convert(folder / "meta", folder / "hf", tokenizer)
    seconds = time.perf_counter() - started
    stop.set()
    thread.join()
    return {"peak": status_mb("VmHWM") - before, "anonymous": max(anonymous) - anonymous_before, "seconds": seconds}


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    folder = Path(args.work_dir).resolve()
    if args.child:
        return report(child(folder))
    shutil.rmtree(folder, ignore_errors=True)
    size = make(folder / "meta", args.layers) / 2**20
    measured = child_report([__file__, "--child", "--work_dir", str(folder)])
    shutil.rmtree(folder)
    peak, anonymous = measured["peak"], measured["anonymous"]
    ratios = {"peak_over_checkpoint": peak / size, "anonymous_over_checkpoint": anonymous / size}
    print(f"a checkpoint of {size:.0f} MB: at most {peak:.0f} MB resident, {anonymous:.0f} MB own")
    report({"checkpoint_mb": size} | measured | ratios)


if __name__ == "__main__":
    cli.run(main)
