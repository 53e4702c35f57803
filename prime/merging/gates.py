"""Per-Pcs: one gate vector per module and anchor, and the adapter that gates compose for a user.

Training (Tan et al., EMNLP 2024, "post-hoc gating"): with an anchor's LoRA frozen, the input x of each factor pair is
scaled by sigmoid(<x, g>). Composition: a module's input h scores each sharer's gate,

    score_j = mean over the user's records of the mean over a record's target tokens of <LN(h), LN(g_j)> / sqrt(d)

with LN the LayerNorm without affine part; the `topk` best sharers get the softmax of their scores as weights, and
A = sum w_j A_j, B = sum w_j B_j (the factor rule). Modules are composed in order of execution, so each score sees
activations that the modules before it have changed. h of a target token is read where that token is predicted.

Shapes: `b` records, `t` tokens, `d` width of a module's input, `r` rank, `n` sharers, `g` row groups.
"""

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from prime.bank.bank import AdapterBank
from prime.bank.encoding import EncodedRecord
from prime.bank.linear import BankLinear, InputScaler
from prime.checkpoints.published import load_published_gate
from prime.checkpoints.tensors import finite_problem, read_safetensors, shown
from prime.errors import InputError
from prime.runs.files import write_bytes
from prime.runs.inputs import Source, file_digest
from prime.runs.run import user_dirname
from prime.seeds import derive_seed

Gate = dict[str, Tensor]  # module name -> [d]
Weights = dict[str, Tensor]  # module name -> [n] aggregation weights

# Published: the default of torch's layer_norm. It matters: entries of a gate trained for 50 steps at lr 2e-5 are
# about 1e-3 at most, so eps outweighs their variance and LayerNorm leaves such a gate shorter than sqrt(d).
EPS = 1e-5


# -- files ----------------------------------------------------------------------------------------------------------


def gate_file(gate_dir: str | Path, user_id: str) -> Path:
    """Where stage 3b puts an anchor's gate."""
    return Path(gate_dir) / "users" / user_dirname(user_id) / "gate.safetensors"


def gate_path(gate_dir: str | Path, user_id: str) -> Path:
    """The gate to read: stage 3b's, or a published file put in its place as gate.pt."""
    path = gate_file(gate_dir, user_id)
    published = path.with_name("gate.pt")
    return published if published.is_file() and not path.is_file() else path


def gate_source(gate_dir: str | Path, user_id: str) -> dict[str, Source]:
    """A gate by its content, as a run records what it read."""
    path = gate_path(gate_dir, user_id)
    return {f"gate of {user_id}": Source(file_digest(path), str(path))} if path.is_file() else {}


def save_gate(gate: Gate, path: Path) -> None:
    """Write a gate as safetensors, module name -> [d], in float32."""
    write_bytes(path, save({name: vector.detach().cpu().float().contiguous() for name, vector in gate.items()}))


def load_gate(path: Path, widths: Mapping[str, int]) -> Gate:
    """Read a gate and check it against the model's modules.

    Args:
        widths: input width of each module that carries an adapter, see `module_widths`.

    Raises:
        InputError: not a safetensors file, or (all of them at once) modules too many or too few, vectors of another
            shape, values that are not finite.
    """
    gate = load_published_gate(path) if path.suffix == ".pt" else read_safetensors(path)
    problems = [f"{path}: no gate of {name}" for name in widths.keys() - gate.keys()]
    problems += [f"{path}: {shown(name)} is no module that carries an adapter" for name in gate.keys() - widths.keys()]
    for name in widths.keys() & gate.keys():
        if gate[name].shape != (widths[name],):
            problems.append(f"{path}: {name}: shape {tuple(gate[name].shape)}, expected ({widths[name]},)")
        elif problem := finite_problem(gate[name]):
            problems.append(f"{path}: {name} {problem}")
    if problems:
        raise InputError.many(sorted(problems))
    return {name: gate[name].float() for name in widths}


def module_widths(bank: AdapterBank) -> dict[str, int]:
    """Input width of each module that carries an adapter."""
    return {name: wrapper.base.in_features for name, wrapper in bank.wrappers.items()}


# -- gates in front of a bank's adapters ----------------------------------------------------------------------------


class Gates:
    """Gates of all adapters in a bank, stacked `[n, d]` per module in the bank's order."""

    def __init__(self, bank: AdapterBank, gates: Sequence[Gate]):
        self.names = list(bank.wrappers)
        self.stacks: list[Tensor] = []
        for name, wrapper in bank.wrappers.items():
            self.stacks.append(torch.stack([gate[name] for gate in gates]).to(wrapper.device))

    @classmethod
    def zeros(cls, bank: AdapterBank) -> "Gates":
        """Untrained gates, one per adapter in the bank: every input is scaled by sigmoid(0) = 1/2 (published)."""
        start = {name: torch.zeros(width) for name, width in module_widths(bank).items()}
        gates = cls(bank, [start] * bank.n)
        for stack in gates.stacks:
            stack.requires_grad_()
        return gates

    def scaler(self, places: Sequence[int]) -> InputScaler:
        """Scales x `[g, t, d]` of group i by sigmoid(<x, g>) with g the gate of adapter places[i]."""
        index = torch.as_tensor(places, device=self.stacks[0].device)

        def scale(module: int, x: Tensor) -> Tensor:
            gates = self.stacks[module].index_select(0, index.to(x.device))
            return x * torch.bmm(x, gates[:, :, None]).sigmoid()

        return scale

    def gate(self, place: int) -> Gate:
        """A copy of one adapter's gate."""
        return {name: stack[place].detach().clone() for name, stack in zip(self.names, self.stacks, strict=True)}


# -- composition ----------------------------------------------------------------------------------------------------


def gate_scores(h: Tensor, positions: Tensor, gates: Tensor) -> Tensor:
    """Score `[n]` of each sharer's gate for one module.

    Args:
        h: `[b, t, d]`, the module's input.
        positions: `[b, t]` bool, where a target token is predicted; at least one in each row.
        gates: `[n, d]`. A gate of zeros stays zero under LayerNorm and scores 0, whatever h is.
    """
    d = h.shape[-1]
    normed = functional.layer_norm(h.float(), (d,), eps=EPS) * positions[..., None]
    mean = (normed.sum(1) / positions.sum(1, keepdim=True)).mean(0)
    return functional.layer_norm(gates, (d,), eps=EPS) @ mean / math.sqrt(d)


def aggregation_weights(scores: Tensor, topk: int, temperature: float) -> Tensor:
    """Softmax `[n]` over the topk best scores, 0 elsewhere. Ties go to the earlier (more similar) sharer.

    Temperature 0: all weight to the best.
    """
    order = scores.sort(descending=True, stable=True).indices[: topk if temperature else 1]
    best = torch.softmax(scores[order] / (temperature or 1.0), 0)
    return torch.zeros_like(scores).scatter(0, order, best)


@torch.inference_mode()
def compose(
    bank: AdapterBank,
    gates: Gates,
    batches: Sequence[Sequence[EncodedRecord]],
    topk: int,
    temperature: float,
    progress: Callable[[int], object] | None = None,
) -> Weights:
    """Compose a user's adapter out of the n sharers in the bank; afterwards it is adapter 0, alone in the bank.

    Args:
        bank: filled by `bank.load` with the sharers' adapters, the most similar first.
        gates: of the same sharers.
        batches: the user's history records. Each batch composes an adapter of its own from a fresh start; their
            factors are averaged, which is the same as averaging the weights, since A and B are linear in them.
        topk: sharers that a module takes at most.
        temperature: of the softmax over their scores.
        progress: called with the number of records just read.

    Returns:
        Per module the averaged weights `[n]`, a sum of 1, that made the adapter.
    """
    factors = {name: (wrapper.A, wrapper.B) for name, wrapper in bank.wrappers.items()}
    totals: Weights = {name: torch.zeros(bank.n, device=wrapper.device) for name, wrapper in bank.wrappers.items()}

    def hook(name: str, gate: Tensor, positions: Tensor, module: nn.Module, inputs: tuple[Tensor]) -> None:
        weights = aggregation_weights(gate_scores(inputs[0], positions.to(gate.device), gate), topk, temperature)
        totals[name] += weights / len(batches)
        _merge(bank.wrappers[name], *factors[name], weights)

    for batch in batches:
        ids, positions = teacher_forced(batch)
        stacks = zip(gates.names, gates.stacks, strict=True)
        hooks = {name: partial(hook, name, gate, positions) for name, gate in stacks}
        with bank.routed([0]), _hooked(bank, hooks):
            bank.model(input_ids=ids.to(bank.device), logits_to_keep=1, use_cache=False)
        if progress:
            progress(len(batch))
    for name, wrapper in bank.wrappers.items():
        _merge(wrapper, *factors[name], totals[name])
    return {name: weights.cpu() for name, weights in totals.items()}


def _merge(wrapper: BankLinear, a: Tensor | None, b: Tensor | None, weights: Tensor) -> None:
    """Make sum_j w_j A_j `[1, r, d]` and sum_j w_j B_j `[1, out, r]` the wrapper's only adapter."""
    if a is None or b is None:
        raise ValueError("the bank is empty")
    wrapper.A, wrapper.B = (torch.einsum("n,nij->ij", weights, side)[None] for side in (a, b))


@contextmanager
def _hooked(bank: AdapterBank, hooks: Mapping[str, Callable]) -> Iterator[None]:
    """Within the block, hooks run before their modules."""
    handles = [bank.wrappers[name].register_forward_pre_hook(hook) for name, hook in hooks.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def teacher_forced(batch: Sequence[EncodedRecord]) -> tuple[Tensor, Tensor]:
    """Token ids `[b, t]` of prompts and targets, padded at the right, and where targets (with EOS) are predicted."""
    texts = [[*record.ids, *record.target[:-1]] for record in batch]
    width = max(map(len, texts))
    ids = torch.tensor([text + [0] * (width - len(text)) for text in texts])
    starts = torch.tensor([[len(record.ids) - 1] for record in batch])
    counts = torch.tensor([[len(record.target)] for record in batch])
    column = torch.arange(width)[None]
    return ids, (column >= starts) & (column < starts + counts)


def history_batches(records: Sequence[EncodedRecord], size: int, seed: int) -> list[list[EncodedRecord]]:
    """The records in an order drawn by the user's seed (published: shuffled), `size` at a time."""
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed)).tolist()
    shuffled = [records[place] for place in order]
    return [shuffled[start : start + size] for start in range(0, len(shuffled), size)]


def sharing_places(n: int, ratio: float, seed: int) -> set[int]:
    """Places of the anchors that share: a share `ratio` of n, rounded down but at least one, drawn by the run's seed.

    The smaller of two ratios draws a subset of the larger.
    """
    order = list(range(n))
    random.Random(derive_seed("shared", seed)).shuffle(order)
    return set(order[: max(1, math.floor(n * ratio + 1e-9))])
