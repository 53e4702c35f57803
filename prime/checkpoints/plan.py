"""`--plan`: what a stage would take of its device, from the model's configuration alone; no weights are loaded.

Batches are those of the run, bytes are those of `memory.py`. On a GPU the peak is that of torch's allocations. On a CPU
it is that of the process, and meant as a bound: prompts are taken to fill `--max_length`, and nothing to be reused.
"""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import psutil
import torch

from prime.bank.bank import AdapterBank
from prime.bank.budgets import batch_tokens, waiting_tokens, weight_bytes
from prime.bank.encoding import Encoder
from prime.bank.train import TRAIN_BATCH_TOKENS
from prime.checkpoints.adapter_config import read_config
from prime.checkpoints.loading import load_tokenizer, model_config, pick_device, pick_dtype
from prime.checkpoints.memory import (
    Work,
    adapter_bytes,
    cached_bytes,
    forward_bytes,
    heap_bytes,
    meta_bank,
    training_bytes,
)
from prime.errors import InputError
from prime.settings import ModelSettings, TrainingSettings

# Where nothing tells them: the published rank, the published number of anchors, tokens of a target that is no label.
PUBLISHED_RANK, PUBLISHED_ANCHORS = 8, 50
UNLABELLED = 100

FIRST_USE = 96 << 20  # measured: what libraries take beyond their imports when they are first used

GIB = 2**30
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
TOGETHER = "free memory of all devices together, each has a part of the peak"


class Device(NamedTuple):
    kind: str  # cpu, cuda, mps
    free: int  # bytes that a run could take now
    total: int  # bytes, which batches on a GPU depend on


class Passes(NamedTuple):
    """Passes of one kind: their batches in tokens, and what they take in bytes."""

    work: Work
    batch: int
    waiting: int  # rows of so many tokens are decoded together
    adapters: int
    cache: int
    activations: int
    gaps: int  # of the heap between tensors; 0 on a GPU

    @property
    def taken(self) -> int:
        return self.adapters + self.cache + self.activations + self.gaps


@dataclass(frozen=True)
class Plan:
    """What a stage would take; sizes in bytes."""

    model: str
    parameters: int
    dtype: str
    weights: int
    process: int  # without any tensor; 0 on a GPU
    passes: Sequence[Passes]
    device: Device
    device_map: str | None = None

    @property
    def peak(self) -> int:
        return self.process + self.weights + max(passes.taken for passes in self.passes)

    def text(self) -> str:
        lines = [("model", self.model), ("parameters", f"{self.parameters:,}, {self.dtype}")]
        lines += [("weights", size(self.weights)), ("process and libraries", size(self.process))]
        for passes in self.passes:
            work, waiting = passes.work, f", {passes.waiting:,} wait to be decoded together" * (passes.waiting > 0)
            lines += [(work.kind, f"prompts of at most {work.prompt:,} tokens, answers of {work.answer:,}")]
            lines += [("   batch", f"{passes.batch:,} tokens of a pass{waiting}")]
            lines += [("   adapters", size(passes.adapters)), ("   key-value cache", size(passes.cache))]
            lines += [("   activations", size(passes.activations)), ("   gaps of the heap", size(passes.gaps))]
        lines += [("device map", f"{self.device_map}: {TOGETHER}" if self.device_map else "")]
        lines += [("peak", size(self.peak)), ("free memory", f"{size(self.device.free)} ({self.device.kind})")]
        lines += [("fits", "yes" if self.peak <= self.device.free else "no")]
        return "\n".join(f"{name:24}{value}" for name, value in lines if value)


def size(n: int) -> str:
    """Bytes for people; nothing for 0."""
    return "" if n == 0 else f"{n / GIB:.2f} GiB" if n >= GIB else f"{n / 2**20:.1f} MiB"


def show(settings: ModelSettings, *works: Work) -> None:
    """Print what a stage of these passes would take."""
    print(plan(settings, works).text())


def plan(settings: ModelSettings, works: Sequence[Work]) -> Plan:
    """What a stage of these passes would take."""
    device = planned_device(settings)
    dtype = pick_dtype(settings.dtype, torch.device(device.kind))
    path = settings.base if Path(settings.base).is_dir() else settings.llama_model_path
    bank = meta_bank(model_config(path, dtype), dtype, settings.modules)
    return Plan(
        model=path,
        parameters=sum(parameter.numel() for parameter in bank.model.parameters()),
        dtype=str(dtype).removeprefix("torch."),
        weights=weight_bytes(bank.model),
        process=psutil.Process().memory_info().rss + FIRST_USE if device.kind == "cpu" else 0,
        passes=[passes_of(bank, device, work, settings.max_batch_tokens) for work in works],
        device=device,
        device_map=settings.device_map,
    )


def passes_of(bank: AdapterBank, device: Device, work: Work, max_batch_tokens: int = 0) -> Passes:
    """The batches that the run makes, and what they take."""
    on_cpu, waiting, cache = device.kind == "cpu", 0, 0
    if work.kind == "training":
        batch = max_batch_tokens or TRAIN_BATCH_TOKENS
        tokens = largest_pass(work, batch)
        activations = training_bytes(bank, work, tokens)
    else:
        total = device.total if device.kind == "cuda" else None
        batch = max_batch_tokens or batch_tokens(bank.config, weight_bytes(bank.model), total)
        tokens = largest_pass(work, batch)
        waiting = waiting_tokens(bank.config, batch, on_cpu) if work.kind == "answering" else 0
        cache = cached_bytes(bank, work, tokens, waiting)
        activations = forward_bytes(bank, work, tokens, waiting)
    gaps = heap_bytes(bank, work, tokens, waiting) if on_cpu else 0
    return Passes(work, batch, waiting, adapter_bytes(bank, work), cache, activations, gaps)


def largest_pass(work: Work, batch: int) -> int:
    """Tokens of the largest pass: a row is never parted."""
    return min(max(batch, work.length), work.rows * work.length)


# -- what is there --------------------------------------------------------------------------------------------------


def planned_device(settings: ModelSettings) -> Device:
    """A GPU of `--device_memory` need not be here; with `--device_map` all GPUs count together."""
    given = int(settings.device_memory * GIB)
    kind = settings.device if given and settings.device != "auto" else pick_device(settings.device).type
    if given or kind != "cuda":
        return Device(kind, given or free_memory(), given)
    gpus = range(torch.cuda.device_count()) if settings.device_map else [torch.cuda.current_device()]
    memory = [torch.cuda.mem_get_info(gpu) for gpu in gpus]
    return Device(kind, sum(free for free, _ in memory), sum(total for _, total in memory))


def free_memory() -> int:
    """Of this machine, within the container's limit."""
    limits = [Path(path).read_text().strip() for path in CGROUP_LIMITS if Path(path).is_file()]
    return min([psutil.virtual_memory().available, *(int(limit) for limit in limits if limit.isdigit())])


def rank_of(folder: str | Path) -> int:
    """Rank of the adapters of a stage's folder, the published one where there are none yet."""
    paths = sorted(Path(folder).glob("users/*/adapter/adapter_config.json"))
    return read_config(paths[0]).largest_rank if paths else PUBLISHED_RANK


def training_work(settings: TrainingSettings, adapters: int, prompt: int, answer: int) -> Work:
    """A step of so many adapters that train together."""
    rows, checkpointing = adapters * settings.batch_size, settings.gradient_checkpointing
    return Work("training", adapters, settings.lora_r, prompt, answer, rows, gradient_checkpointing=checkpointing)


def longest_answer(settings: ModelSettings, *kinds: tuple[Sequence[str] | None, int]) -> int:
    """New tokens of the longest answer; of each kind its labels (None: free text) and its limit."""
    return max(answer_tokens(settings, labels, limit) for labels, limit in kinds)


def answer_tokens(settings: ModelSettings, labels: Sequence[str] | None, limit: int) -> int:
    """New tokens of an answer at most, as in the run; without a tokenizer a label may be as long as any text."""
    if labels is not None:
        with suppress(InputError):
            return min(limit, Encoder(load_tokenizer(settings.tokenizer_path or settings.base)).label_tokens(labels))
    return limit
