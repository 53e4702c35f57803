"""The adapter bank: many low-rank adapters over one frozen base model, each row of a batch routed to its own.

Shape legend: `b` batch rows, `t` tokens, `d` width, `v` vocabulary, `r` rank, `n` adapters, `c` candidates,
`g` row groups (consecutive rows of one adapter), `l` layers.

The target `nn.Linear`s of a Hugging Face causal LM are replaced by thin wrappers that add
`scale * (x A_i^T) B_i^T` with i = the row's adapter (Hu et al. 2022; PEFT is the oracle in the tests). A trainable
adapter may stand on a frozen one, a second pair of factors that no gradient reaches.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from prime.bank.cpu import device_of, quicken, restore, round_up
from prime.bank.initial import initial_a
from prime.bank.limits import check_states, lookback, positions
from prime.bank.linear import BankLinear, InputScaler, Route
from prime.bank.lora import Adapter, check_widths, layer_of, merge, pad_rank, truncate
from prime.errors import InputError, tell
from prime.settings import SHARERS

DEFAULT_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


class AdapterBank:
    """Adapters stacked over one frozen causal LM.

    Args:
        model: a Hugging Face causal LM whose targets are `nn.Linear`; it is changed in place and frozen.
        targets: last parts of the module names that carry adapters (published default: q, k, v, o).

    On some CPUs its frozen layers compute by oneDNN meanwhile (`prime.bank.cpu`); `unwrap` gives it back with plain
    layers.

    Raises:
        InputError: no module, or a module that is no `nn.Linear`, has one of these names; or a kind of model whose
            layers are not attention alone.
    """

    def __init__(self, model: nn.Module, targets: Sequence[str] = DEFAULT_TARGETS):
        self.model = model.requires_grad_(False).eval()
        causal_lm: Any = model  # nn.Module does not declare what a causal LM has
        check_states(causal_lm.config, causal_lm)
        self.config: Any = causal_lm.config.get_text_config(decoder=True)
        self.lookback = lookback(self.config)  # columns; rows of at most so many may have holes among their tokens
        self.positions = positions(self.config)
        self.device = device_of(causal_lm.get_input_embeddings())  # of ids and logits; each layer has its own
        self.route = Route()
        self.wrappers = self._wrap(tuple(targets))
        self.columns = quicken(self.model)
        if self.device.type == "cuda":
            # cuDNN plans its attention anew for every length that it meets, which takes longer than a decoding step.
            torch.backends.cuda.enable_cudnn_sdp(False)
        if self.positions.hard:
            self.columns = 1  # padding needs a position, too
        self.layers = 1 + max(layer_of(name) for name in self.wrappers)
        self._stored: dict[str, tuple[Tensor, Tensor]] = {}

    def _wrap(self, targets: tuple[str, ...]) -> dict[str, BankLinear]:
        model: Any = self.model
        # What reads images or sound beside a text has modules of the same names.
        text = set((model if self.config is model.config else model.get_decoder()).modules())
        targeted = {
            name: module
            for name, module in self.model.named_modules()
            if module in text and name.rsplit(".", 1)[-1] in targets
        }
        missing = set(targets) - {name.rsplit(".", 1)[-1] for name in targeted}
        if missing:
            raise InputError(f"the model has no module named {', '.join(sorted(missing))} (--target_modules)")
        wrappers = {}
        for number, (name, module) in enumerate(targeted.items()):
            if not isinstance(module, nn.Linear):
                raise InputError(f"{name} is a {type(module).__name__}, not an nn.Linear; it cannot carry an adapter")
            parent, _, leaf = name.rpartition(".")
            wrappers[name] = BankLinear(module, number, self.route)
            setattr(self.model.get_submodule(parent), leaf, wrappers[name])
        return wrappers

    def unwrap(self) -> nn.Module:
        """Put the plain linear layers back and return the model."""
        for name, wrapper in self.wrappers.items():
            parent, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(parent), leaf, wrapper.base)
        restore(self.model)
        return self.model

    def width(self, tokens: int) -> int:
        """Columns of a pass over prompts of so many tokens: as many, or some more of padding where that is faster."""
        return round_up(tokens, self.columns)

    @property
    def last_position(self) -> float | None:
        """The last one that a token may have; None where there is no end."""
        return self.positions.most - 1 if self.positions.hard else None

    def check_length(self, name: str, prompt: int, answer: int) -> None:
        """InputError for a row of this name that has more tokens than the model has positions. The first one of more
        tokens than it was trained on is told.
        """
        most, hard, reason = self.positions
        if prompt + answer - 1 <= most:  # nothing follows the last token
            return
        message = f"{name}: a prompt of {prompt} tokens, an answer of up to {answer}; {reason} (--max_length)"
        if hard:
            raise InputError(message)
        tell(f"warning: {message}; only the first such text is told")
        self.positions = self.positions._replace(most=math.inf)

    @property
    def n(self) -> int:
        """Number of adapters (or candidates) that rows can be routed to."""
        first = next(iter(self.wrappers.values())).A
        return 0 if first is None else first.shape[0]

    # -- filling the bank ---------------------------------------------------------------------------------------

    def load(self, adapters: Sequence[Adapter]) -> None:
        """Stack adapters; row index i routes to adapters[i]. Ranks and modules may differ, widths may not."""
        parts = self._checked(adapters)
        for name, wrapper in self.wrappers.items():
            self._stored[name] = self._stack(parts, name)
            wrapper.A, wrapper.B = self._stored[name]
            wrapper.scale, wrapper.under = 1.0, None

    def clear(self) -> None:
        """No adapters."""
        self._stored.clear()
        for wrapper in self.wrappers.values():
            wrapper.A = wrapper.B = wrapper.under = None

    def _stack(self, parts: Sequence[Adapter], name: str) -> tuple[Tensor, Tensor]:
        """One module's factors of all adapters: `[n, r, in]`, `[n, out, r]` with r the largest rank; 0 where it has
        none.
        """
        wrapper, rank = self.wrappers[name], max(part.rank for part in parts)
        nothing = torch.zeros(0, wrapper.base.in_features), torch.zeros(wrapper.base.out_features, 0)
        pairs = [pad_rank(*part.factors.get(name, nothing), rank) for part in parts]
        device = wrapper.device
        return torch.stack([a.to(device) for a, _ in pairs]), torch.stack([b.to(device) for _, b in pairs])

    def _checked(self, adapters: Sequence[Adapter]) -> list[Adapter]:
        """Adapters of scale 1; InputError where one holds a module that the model has not, or of another width."""
        check_widths(adapters)
        for number, adapter in enumerate(adapters):
            label = adapter.source or f"adapter {number}"
            for name, (a, b) in adapter.factors.items():
                if name not in self.wrappers:
                    raise InputError(f"{label}: the model has no {name} that carries adapters (--target_modules)")
                base = self.wrappers[name].base
                if (a.shape[1], b.shape[0]) != (base.in_features, base.out_features):
                    raise InputError(
                        f"{label}: {name}: the adapter is {a.shape[1]} -> {b.shape[0]} wide, "
                        f"the model {base.in_features} -> {base.out_features}"
                    )
        return [adapter.folded() for adapter in adapters]

    def combine(self, weights: Tensor, rule: str, keep_rank: int | str = 0) -> None:
        """Make c candidates out of the n loaded adapters; row index j then routes to candidate j.

        Args:
            weights: `[c, n]`, or `[c, n, l]` for one weight per adapter and layer. A zero row is the base, a
                one-hot row that adapter.
            rule: `factor` or `delta`, see `prime.bank.lora.merge`.
            keep_rank: leading singular directions of each merged update that are kept; 0 = all, `SHARERS`: as many as
                the largest rank of the loaded adapters.
        """
        for name, wrapper in self.wrappers.items():
            a, b = self._stored[name]
            layer_weights = (weights if weights.dim() == 2 else weights[:, :, layer_of(name)]).to(a)
            combine = _combine_factor if rule == "factor" else _combine_delta
            pair = combine(layer_weights, a, b)
            rank = a.shape[1] if keep_rank == SHARERS else int(keep_rank)
            wrapper.A, wrapper.B = truncate(*pair, rank) if rank else pair

    def allocate(
        self,
        seeds: Sequence[int | bytes],
        rank: int,
        alpha: float,
        under: Sequence[Adapter] = (),
        frozen_a: bool = False,
    ) -> None:
        """Fresh trainable adapters, one per seed: A random, see `prime.bank.initial`, B zero.

        Args:
            seeds: numbers, or secret keys.
            rank: of every adapter.
            alpha: the update is scaled by alpha / rank.
            under: one adapter per seed that the fresh one stands on. It takes part in every pass, but is frozen:
                no `parameters()`, no dropout in front of it.
            frozen_a: only B is trained.
        """
        parts = self._checked(under)
        for name, wrapper in self.wrappers.items():
            base = wrapper.base
            draws = torch.stack([initial_a(seed, name, rank, base.in_features) for seed in seeds])
            wrapper.A = draws.to(wrapper.device).requires_grad_(not frozen_a)
            wrapper.B = torch.zeros(len(seeds), base.out_features, rank, device=wrapper.device, requires_grad=True)
            wrapper.scale, wrapper.under = alpha / rank, self._stack(parts, name) if parts else None
            self._stored.pop(name, None)

    def adapter(self, index: int) -> Adapter:
        """A copy of one adapter (or candidate) now in the bank, together with the frozen one it stands on."""
        scale = next(iter(self.wrappers.values())).scale
        top = Adapter({name: (_part(w.A, index), _part(w.B, index)) for name, w in self.wrappers.items()}, scale)
        under = {n: (_part(w.under[0], index), _part(w.under[1], index)) for n, w in self.wrappers.items() if w.under}
        return merge([Adapter(under), top], torch.ones(2), "delta") if under else top

    def parameters(self) -> list[Tensor]:
        """The stacked factors, A and B of each module in turn."""
        factors: list[Tensor] = []
        for wrapper in self.wrappers.values():
            factors += [stack for stack in (wrapper.A, wrapper.B) if stack is not None]
        return factors

    def loaded(self) -> Iterator[tuple[str, Tensor]]:
        """The factors that `load` stacked, by module: what candidates are made of."""
        for name, (a, b) in self._stored.items():
            yield from ((f"{name}.A", a), (f"{name}.B", b))

    def stacks(self) -> list[Tensor]:
        """All tensors that rows are routed through: the factors, and the frozen ones they stand on."""
        stacks = self.parameters()
        for wrapper in self.wrappers.values():
            stacks += wrapper.under or ()
        return stacks

    # -- using the bank -----------------------------------------------------------------------------------------

    @contextmanager
    def routed(self, groups: Sequence[int] | Tensor | None, scaler: InputScaler | None = None) -> Iterator[None]:
        """Within the block, forward passes send rows to adapters.

        Args:
            groups: `[g]` adapter indices, -1 for the plain base; the b rows are g groups of b / g consecutive
                rows (g = b: one index per row). None: the plain base for all.
            scaler: multiplies each module's input in front of its factor pair (dropout, gates).
        """
        with self._on(*self._groups(groups), scaler):
            yield

    @contextmanager
    def _on(self, groups: Tensor | None, on_base: Tensor | None, scaler: InputScaler | None) -> Iterator[None]:
        before = (self.route.groups, self.route.on_base, self.route.scaler)
        self.route.to(groups, on_base, scaler)
        try:
            yield
        finally:
            self.route.to(*before)

    @contextmanager
    def checkpointing(self, wanted: bool = True) -> Iterator[None]:
        """Within the block, backward passes recompute each layer instead of keeping what it computed.

        Only the layers themselves are set to training, not what is in them, so dropout inside the model stays off. A
        layer is recomputed after the block of `routed` was left, so it is given the routes that it ran with.

        Raises:
            InputError: the model has no layers that can be recomputed.
        """
        model: Any = self.model
        layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)] if wanted else []
        if wanted and not layers:
            raise InputError(f"{type(model).__name__} cannot recompute its layers (--gradient_checkpointing)")
        if layers:
            options = {"use_reentrant": False, "preserve_rng_state": False, "context_fn": self._recomputing}
            model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
        try:
            for layer in layers:
                layer.training = True
            yield
        finally:
            for layer in layers:
                layer.training = False
            if layers:
                model.activation_checkpointing_disable()

    def _recomputing(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """Contexts of a layer's first pass and of its recomputation."""
        route = self.route
        return nullcontext(), self._on(route.groups, route.on_base, route.scaler)

    def _groups(self, groups: Sequence[int] | Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """`Route.groups` and `Route.on_base`; a group on the base is routed through adapter 0 and masked."""
        if groups is None:
            return None, None
        adapters = groups.tolist() if isinstance(groups, Tensor) else list(groups)
        on_base = [adapter < 0 for adapter in adapters]
        if all(on_base):
            return None, None
        mask = torch.tensor(on_base, device=self.device)[:, None, None] if any(on_base) else None
        return torch.tensor([max(adapter, 0) for adapter in adapters], device=self.device), mask


def _combine_factor(weights: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """A_c = sum_n w_cn A_n, B_c likewise (published rule). weights [c, n] -> [c, r, in], [c, out, r]."""
    return torch.einsum("cn,nri->cri", weights, a), torch.einsum("cn,nor->cor", weights, b)


def _combine_delta(weights: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """dW_c = sum_n w_cn B_n A_n as stacked factors. weights [c, n] -> [c, n*r, in] (shared), [c, out, n*r]."""
    n, r, width = a.shape
    stacked = torch.einsum("cn,nor->cnro", weights, b).reshape(len(weights), n * r, b.shape[1])
    return a.reshape(1, n * r, width).expand(len(weights), -1, -1), stacked.mT


def _part(stack: Tensor | None, index: int) -> Tensor:
    if stack is None:
        raise ValueError("the bank is empty")
    return stack[index].detach().clone()
