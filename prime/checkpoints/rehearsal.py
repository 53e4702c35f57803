"""A run on tensors without data: what it takes, before anything is loaded (`prime.checkpoints.plan`).

The model is built from config.json or params.json alone, its tensors without data, and the run's own code goes
through its largest passes on them while a ledger counts (`ledger.py`). So the plan knows any architecture, dtype
and option that the run knows. Prompts have their real lengths where the task's data and the tokenizer are there;
otherwise each is taken to fill --max_length.

On a CPU the peak is that of the process: its size before the model (Python and libraries, measured as the plan is
made), the tensors, and the gaps that malloc leaves between them. On a GPU it is that of torch's allocations.
"""

import argparse
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from prime import cli
from prime.bank.bank import AdapterBank
from prime.bank.decode import batch_tokens, rehearse, waiting_tokens, weight_bytes
from prime.bank.encoding import EncodedRecord, Encoder
from prime.bank.lora import Adapter
from prime.bank.sampling import gumbel
from prime.bank.train import TRAIN_BATCH_TOKENS, Learner, TrainSettings, heaviest_step
from prime.bank.train import rehearse as rehearse_training
from prime.checkpoints.ledger import Ledger
from prime.checkpoints.loading import load_tokenizer, model_config, pick_device, pick_dtype
from prime.errors import InputError
from prime.users.data import User
from prime.users.prompts import Record, history_records, test_prompts
from prime.users.tasks import Task, get_task

Load = Callable[[argparse.Namespace, Task], Sequence[User]]

GIB = 2**30
CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
PUBLISHED_RANK, PUBLISHED_ANCHORS = 8, 50
OF_DATA = "of the task's data"
# Shares of rows that a draft answers where answers are labels, as counted on the trained demo: of base and sharers, and
# of a search's candidates (benchmarks/README.md). Titles: 0.00 and 0.21, taken for none.
GOLDS_RIGHT, ANSWERS_RIGHT = 0.53, 0.86
TOGETHER = "free memory of all devices together, each has a part of the peak"


class Endings(NamedTuple):
    """When rows that are answered end: after at most so many tokens, some already in their first pass."""

    history_limit: int
    query_limit: int
    golds: float  # share of rows that end in their first pass, a record's gold being the draft
    answers: float  # the same with the answers of other candidates as further drafts


@dataclass
class Plan:
    """Bytes, where nothing else is said."""

    model: str
    parameters: int
    dtype: str
    device: str  # cpu, cuda, mps
    memory: int  # of the device, free for the run
    weights: int
    adapters: int = 0  # with gradients and moments where they are trained
    cache: int = 0  # keys and values of all rows in flight
    forward: int = 0  # activations of the largest forward pass
    training: int = 0  # activations of the largest forward and backward pass
    training_checkpointed: int = 0  # the same with --gradient_checkpointing
    process: int = 0  # on a CPU: the process before the model
    gaps: int = 0  # on a CPU: what malloc holds beyond the tensors
    peak: int = 0  # all of that together, at the worst moment, if no row ends before its limit
    expected: int = 0  # the same if rows end as in `Rehearsal.endings`; 0: not told
    batch: int = 0  # tokens of a pass that answers or scores
    waiting: int = 0  # tokens of rows that wait to be decoded together
    train_batch: int = 0  # tokens of a forward and backward pass
    longest: int = 0  # tokens of the longest prompt with its target
    device_map: str = ""  # how the model is parted among devices
    lengths: str = ""  # where the lengths are from

    @property
    def fits(self) -> bool:
        return self.peak <= self.memory

    @property
    def verdict(self) -> str:
        if self.fits or not self.expected:
            return "yes" if self.fits else "no"
        return "no, unless rows end as expected" if self.expected <= self.memory else "no"

    def text(self) -> str:
        rows = [
            ("model", self.model), ("parameters", f"{self.parameters:,}, {self.dtype}"),
            ("lengths", f"longest {self.longest:,} tokens, {self.lengths}"),
            ("batch", f"{self.batch:,} tokens of a pass, {self.waiting:,} wait to be decoded together"),
            ("training batch", f"{self.train_batch:,} tokens of a pass" if self.train_batch else ""),
            ("weights", size(self.weights)), ("adapters", size(self.adapters)),
            ("key-value cache", size(self.cache)), ("activations, forward", size(self.forward)),
            ("activations, training", size(self.training)),
            ("   with --gradient_checkpointing", size(self.training_checkpointed)),
            ("process before the model", size(self.process)), ("gaps between tensors", size(self.gaps)),
            ("device map", self.device_map and f"{self.device_map}: {TOGETHER}"),
            ("peak", size(self.peak)), ("   if rows end as expected", size(self.expected)),
            ("free memory", f"{size(self.memory)} ({self.device})"),
            ("fits", self.verdict),
        ]  # fmt: skip
        return "\n".join(f"{name:33}{value}" for name, value in rows if value)


def size(n: int) -> str:
    """Bytes for people; nothing for 0."""
    return "" if n == 0 else f"{n / GIB:.2f} GiB" if n >= GIB else f"{n / 2**20:.1f} MiB"


# -- the device -----------------------------------------------------------------------------------------------------


def planned_device(args: argparse.Namespace) -> tuple[str, int]:
    """Kind of device and its memory, with --device_map that of all; a GPU of --device_memory need not be here."""
    given = int(args.device_memory * GIB)
    kind = args.device if given and args.device != "auto" else pick_device(args.device).type
    return kind, given or device_memory(kind, bool(args.device_map))


def device_memory(kind: str, together: bool) -> int:
    """Bytes that a run could take now, on one GPU or all `together`; on a CPU within the container's limit."""
    if kind == "cuda":
        gpus = range(torch.cuda.device_count()) if together else [torch.cuda.current_device()]
        return sum(torch.cuda.mem_get_info(gpu)[0] for gpu in gpus)
    limits = [int(text) for text in map(_read, CGROUP_LIMITS) if text.isdigit()]
    return min([psutil.virtual_memory().available, *limits])


def _read(path: str) -> str:
    return Path(path).read_text().strip() if Path(path).is_file() else ""


# -- rehearsing -----------------------------------------------------------------------------------------------------


class Rehearsal:
    """A run on tensors without data; `plan` is what it came to. Calls in the order of the run's own.

    With `expecting`, rows end as they are expected to (`endings`), and the plan's peak is no bound.
    """

    def __init__(self, args: argparse.Namespace, expecting: bool = False):
        kind, memory = planned_device(args)
        self.args, self.expecting, self.on_cpu = args, expecting, kind == "cpu"
        process = psutil.Process().memory_info().rss if self.on_cpu else 0
        dtype = pick_dtype(args.dtype, torch.device(kind))
        path = cli.base_name(args) if args.convert_to and Path(args.convert_to).is_dir() else args.llama_model_path
        config = model_config(path, dtype)
        self.tokenizer_path = args.tokenizer_path or path
        self._mode, self._ledger = _fake_mode(), Ledger(shadow=self.on_cpu)
        with self.pretending():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
            self.bank = AdapterBank(model, cli.target_modules(args))
        weights = weight_bytes(self.bank.model)
        budget = args.max_batch_tokens or batch_tokens(self.bank.config, weights, None if self.on_cpu else memory)
        self.plan = Plan(
            path, sum(p.numel() for p in model.parameters()), str(dtype).removeprefix("torch."), kind, memory, weights,
            process=process, batch=budget, waiting=waiting_tokens(self.bank.config, budget, self.on_cpu),
            device_map=args.device_map or "",
        )  # fmt: skip

    @contextmanager
    def pretending(self) -> Iterator[None]:
        """Tensors made within the block have no data, and are counted."""
        with self._mode, self._ledger:
            yield

    # -- adapters ----------------------------------------------------------------------------------------------

    def load(self, n: int, rank: int) -> None:
        """n adapters of others, as a pool keeps them and stacked in the bank."""
        with self.pretending():
            self._loaded = [self._adapter(rank) for _ in range(n)]
            self.bank.load(self._loaded)
        self._note_adapters(sum(f.numel() * 4 for one in self._loaded for pair in one.factors.values() for f in pair))

    def combine(self, candidates: int, rule: str) -> None:
        with self.pretending():
            self.bank.combine(torch.zeros(candidates, len(self._loaded)), rule)
        self._note_adapters(self.plan.adapters)

    def allocate(self, n: int) -> None:
        """n adapters in training: with gradients and AdamW's two moments they are four times their size."""
        with self.pretending():
            self.bank.allocate(list(range(n)), self.args.lora_r, self.args.lora_alpha)
        self.plan.adapters = 4 * self._stacked()

    def _adapter(self, rank: int) -> Adapter:
        widths = {name: wrapper.base for name, wrapper in self.bank.wrappers.items()}
        return Adapter(
            {n: (torch.empty(rank, m.in_features), torch.empty(m.out_features, rank)) for n, m in widths.items()}
        )

    def _stacked(self) -> int:
        return sum(stack.untyped_storage().nbytes() for stack in self.bank.parameters())

    def _note_adapters(self, others: int) -> None:
        self.plan.adapters = max(self.plan.adapters, others + self._stacked())

    # -- texts -------------------------------------------------------------------------------------------------

    def histories(self, load: Load) -> list[list[EncodedRecord]]:
        """Each user's history records, the users with most tokens first; without data one user of full length."""

        def own(texts: cli.Texts, user: User) -> list[Record]:
            profile = (texts.profiles or {}).get(user.user_id)
            return history_records(user, texts.task, texts.templates, profile, self.args.recent_k)

        return self.texts(load, own, 2 * self.args.recent_k or 2 * PUBLISHED_ANCHORS)

    def queries(self, load: Load) -> list[EncodedRecord]:
        """The test prompts, in all settings, of the user with most tokens; their drafts are empty."""

        def own(texts: cli.Texts, user: User) -> list[Record]:
            profiles = [None] if texts.profiles is None else [None, texts.profiles.get(user.user_id, "")]
            settings = itertools.product((0, *self.args.k_list), profiles)
            task, templates = texts.task, texts.templates
            prompts = [p for k, profile in settings for p in test_prompts(user, task, templates, k, profile)]
            return [Record(p.id, p.text, "") for p in prompts]

        return self.texts(load, own, 2 * (1 + len(self.args.k_list)))[0]

    def texts(self, load: Load, own: Callable[[cli.Texts, User], list[Record]], rows: int) -> list[list[EncodedRecord]]:
        """Each user's records as tokens, the users with most first; without data, one user's `rows` of full length."""
        found = self._read(load, own) or [[assumed(place, self.args.max_length) for place in range(rows)]]
        longest = max(len(r.ids) + len(r.target) for records in found for r in records)
        self.plan.longest = max(self.plan.longest, longest)
        return sorted(found, key=lambda records: -sum(len(r.ids) + len(r.target) for r in records))

    def _read(self, load: Load, own: Callable[[cli.Texts, User], list[Record]]) -> list[list[EncodedRecord]]:
        try:
            encoder, texts = self.encoder, cli.load_texts(self.args)
            users = load(self.args, texts.task)
        except InputError as error:
            self.plan.lengths = f"assumed, since {str(error).splitlines()[0]}"
            return []
        self.plan.lengths = OF_DATA
        found = ([encoder.record(r.id, r.input, r.target) for r in own(texts, user)] for user in users)
        return [records for records in found if records]

    @cached_property
    def encoder(self) -> Encoder:
        """InputError where there is no tokenizer."""
        return Encoder(load_tokenizer(self.tokenizer_path), self.args.max_length)

    def endings(self, history: Sequence[EncodedRecord]) -> Endings:
        """How rows end: none before its limit, or where `expecting`, as on the trained demo: answers as long as the
        history's at most, and where they are labels, drafts that are right.
        """
        for_history, for_query = self.limits()
        if not self.expecting:
            return Endings(for_history, for_query, 0.0, 0.0)
        right = get_task(self.args.task_name).history_labels is not None
        longest = max(len(record.target) for record in history)
        limits = (min(for_history, longest), min(for_query, longest))
        return Endings(*limits, *((GOLDS_RIGHT, ANSWERS_RIGHT) if right else (0.0, 0.0)))

    def limits(self) -> tuple[int, int]:
        """New tokens at most of an answer to a history record, and to a test query (`prime.engine.Engine.limit`)."""
        task = get_task(self.args.task_name)
        return self._limit(task.history_labels, "train_gen_len"), self._limit(task.labels, "max_gen_len")

    def _limit(self, labels: Sequence[str] | None, option: str) -> int:
        cap = getattr(self.args, option, 1)
        with suppress(InputError):  # without a tokenizer a label may be as long as any text
            return cap if labels is None else min(cap, self.encoder.label_tokens(labels))
        return cap

    # -- passes ------------------------------------------------------------------------------------------------

    def answer(self, records: Sequence[EncodedRecord], adapters: int, ending: float, limit: int) -> None:
        """The passes that answer (limit 0: score) these prompts for this many adapters, and `ending` of the rows end in
        their first pass.
        """
        budgets = (self.plan.batch, self.plan.waiting)
        with self.pretending():
            self._ledger.restart()
            before = self._ledger.now
            cache = rehearse(self.bank, records, adapters, limit, *budgets, self._choose, ending)
        self.plan.cache = max(self.plan.cache, cache)
        self.plan.forward = max(self.plan.forward, self._ledger.peak - before - cache)

    def _choose(self, logits: Tensor) -> None:
        """What a sampler makes beside the logits: their logarithms, and noise (`Sampler.choose`)."""
        if getattr(self.args, "temperature", 0):
            scores = torch.log_softmax(logits.float() / self.args.temperature, -1)
            zeros = torch.zeros(len(logits), dtype=torch.long)
            scores.masked_fill(scores < 0, 0.0).add(gumbel(zeros, zeros, logits.shape[-1]))

    def train(
        self, texts: Sequence[Sequence[EncodedRecord]], settings: TrainSettings,
        gates: Callable[[AdapterBank], Any] | None = None,
    ) -> None:  # fmt: skip
        """The heaviest step of these learners' adapters, or of gates before them (`prime.merging.gates.Gates.zeros`).

        The other way of --gradient_checkpointing is told, too.
        """
        more: dict[str, Any] = {}
        if gates:
            with self.pretending():
                made = gates(self.bank)
            more = {"stacks": made.stacks, "scalers": made.scaler}
        learners = [Learner(place, str(place), place, records) for place, records in enumerate(texts)]
        parts = heaviest_step(learners, settings, self.args.max_batch_tokens)
        chosen = settings.gradient_checkpointing
        found = {}
        for wanted in (chosen, not chosen):
            own = replace(settings, gradient_checkpointing=wanted)
            found[wanted] = self._training(parts, own, wanted == chosen, more)
        self.plan.training, self.plan.training_checkpointed = found[False], found[True]
        self.plan.train_batch = self.args.max_batch_tokens or TRAIN_BATCH_TOKENS

    def _training(self, parts: Sequence, settings: TrainSettings, counts: bool, more: dict[str, Any]) -> int:
        """Bytes beyond what lives before, gradients and moments apart; only what `counts` may raise the peak."""
        ledger, most = self._ledger, self._ledger.most_held
        with self.pretending():
            ledger.restart()
            before = ledger.now
            rehearse_training(self.bank, parts, settings, **more)
        ledger.most_held = ledger.most_held if counts else most
        return ledger.peak - before - self.plan.adapters * 3 // 4

    def done(self) -> Plan:
        plan, ledger = self.plan, self._ledger
        plan.peak = plan.process + ledger.most_held
        checkpointing = getattr(self.args, "gradient_checkpointing", False)
        chosen = plan.training_checkpointed if checkpointing else plan.training
        tensors = plan.weights + plan.adapters + max(plan.cache + plan.forward, chosen)
        plan.gaps = max(0, ledger.most_held - tensors) if self.on_cpu else 0
        return plan


def assumed(place: int, length: int) -> EncodedRecord:
    """A record of full length that shares no beginning with the others."""
    return EncodedRecord(str(place), (place, *[0] * (length - 3)), (0, 0))


def _fake_mode() -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode  # brings the compiler with it; only plans need it

    return FakeTensorMode()
