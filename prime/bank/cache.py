"""Key-value cache of rows in flight: tokens are appended in place, and rows leave without the others being copied.

transformers' own dynamic cache copies all of itself for every token; with dozens of rows of some hundred tokens that
costs more than the model's products. Here keys and values are views of buffers with room for more tokens.

Shapes: `b` rows, `h` key-value heads, `t` tokens, `d` head width.
"""

from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

KeysValues = tuple[Tensor, Tensor]  # of one layer

ROOM = 24  # tokens of room whenever a buffer grows


class Places:
    """Numbers of rows; on a GPU one tensor for all layers, since to send it there anew makes everything wait."""

    def __init__(self, numbers: Sequence[int]):
        self.numbers = list(numbers)
        self._tensors: dict[torch.device, Tensor] = {}

    def __len__(self) -> int:
        return len(self.numbers)

    def on(self, device: torch.device) -> Tensor:
        if device not in self._tensors:
            self._tensors[device] = torch.tensor(self.numbers, device=device)
        return self._tensors[device]


class RoomyLayer(DynamicLayer):
    """One layer's keys and values `[b, h, t, d]`, the front of buffers `[>= b, h, >= t, d]`."""

    def __init__(self) -> None:
        super().__init__()
        self.buffers: Any = ()  # keys' and values'

    def fill(self, keys: Tensor, values: Tensor, room: int) -> None:
        """Hold a copy of these, with room for `room` more tokens."""
        self.lazy_initialization(keys, values)
        self._allocate((keys, values), room)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> KeysValues:
        """Append `[b, h, new, d]`; returns all keys and values `[b, h, t + new, d]`."""
        if not self.is_initialized:
            self.fill(key_states, value_states, 0)
        else:
            self._append((key_states, value_states))
        return self.held()

    def join(self, pairs: Sequence[KeysValues], chosen: Sequence[Places], room: int) -> None:
        """Hold a copy of the chosen rows of all pairs, which end in one column, with room for `room` more tokens."""
        self.lazy_initialization(*pairs[0])
        rows, tokens = sum(map(len, chosen)), max(keys.shape[2] for keys, _ in pairs)
        buffers = []
        for parts in zip(*pairs, strict=True):
            _, h, _, d = parts[0].shape
            buffers.append(parts[0].new_empty(rows, h, tokens + room, d))
            for target, part, picked in zip(buffers[-1].split([*map(len, chosen)]), parts, chosen, strict=True):
                missing = tokens - part.shape[2]
                target[:, :, :missing] = 0  # masked, but uninitialised memory may hold NaN, and 0 * NaN is NaN
                _copy_rows(part, picked, target[:, :, missing:tokens], None)
        self.buffers = tuple(buffers)
        self._show(rows, tokens)

    def held(self) -> KeysValues:
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def _append(self, new: KeysValues) -> None:
        keys, _ = self.held()
        rows, before, more = keys.shape[0], keys.shape[2], new[0].shape[2]
        if before + more > self.buffers[0].shape[2]:
            self._allocate(self.held(), more + ROOM)
        for buffer, states in zip(self.buffers, new, strict=True):
            buffer[:rows, :, before : before + more] = states
        self._show(rows, before + more)

    def _allocate(self, held: KeysValues, room: int) -> None:
        b, h, t, d = held[0].shape
        self.buffers = tuple(states.new_empty(b, h, t + room, states.shape[3]) for states in held)
        for buffer, states in zip(self.buffers, held, strict=True):
            buffer[:, :, :t] = states
        self._show(b, t)

    def _show(self, rows: int, tokens: int) -> None:
        self.keys, self.values = (buffer[:rows, :, :tokens] for buffer in self.buffers)

    def select(self, count: int, moved: Places, targets: Places) -> None:
        """Keep `count` rows, the first ones but where these from behind them move to."""
        keys, _ = self.held()
        for buffer in self.buffers if moved else ():
            _copy_rows(buffer, moved, buffer, targets)
        self._show(count, keys.shape[2])
        if 2 * count < self.buffers[0].shape[0]:  # give the memory of rows that left back
            self._allocate(self.held(), self.buffers[0].shape[2] - keys.shape[2])


class RoomyCache(Cache):
    """A `transformers` cache of roomy layers."""

    def __init__(self) -> None:
        super().__init__(layer_class_to_replicate=RoomyLayer)

    @classmethod
    def holding(cls, layers: Iterable[KeysValues], room: int) -> "RoomyCache":
        """A cache of these keys and values, a pair per layer, with room for `room` more tokens."""
        cache = cls()
        for keys, values in layers:
            layer = RoomyLayer()
            layer.fill(keys, values, room)
            cache.layers.append(layer)
        return cache

    def pairs(self) -> list[KeysValues]:
        """Keys and values of each layer, as they are."""
        return [layer.held() for layer in self._roomy()]

    @classmethod
    def joined(
        cls, caches: Sequence["RoomyCache"], selections: Sequence[Sequence[list[int]]], room: int
    ) -> list["RoomyCache"]:
        """A cache per selection of rows (a list for each cache, not all empty), shorter ones with columns of zeros in
        front. The caches' layers are given up one by one, so that two caches of everything never exist together.
        """
        wholes = [cls() for _ in selections]
        chosen_rows = [[Places(chosen) for chosen in selection] for selection in selections]
        while caches[0].layers:
            pairs = [cast(RoomyLayer, cache.layers.pop(0)).held() for cache in caches]
            for whole, selection in zip(wholes, chosen_rows, strict=True):
                layer = RoomyLayer()
                filled = [place for place, chosen in enumerate(selection) if chosen]
                layer.join([pairs[place] for place in filled], [selection[place] for place in filled], room)
                whole.layers.append(layer)
        return wholes

    def _roomy(self) -> list[RoomyLayer]:
        return cast(list[RoomyLayer], self.layers)

    def keep(self, indices: Sequence[int], rows: int) -> list[int]:
        """Keep these of `rows` rows; the order they then have."""
        order = compact_order(indices, rows)
        targets = Places([place for place, row in enumerate(order) if place != row])
        moved = Places([order[place] for place in targets.numbers])
        for layer in self._roomy():
            layer.select(len(order), moved, targets)
        return order


def _copy_rows(source: Tensor, rows: Places, target: Tensor, places: Places | None) -> None:
    """`target[places] = source[rows]`, into all of target without places. On a CPU one after the other, since to gather
    them first is a second copy.
    """
    if source.device.type != "cpu":
        picked = source.index_select(0, rows.on(source.device))
        if places is None:
            target.copy_(picked)
        else:
            target.index_copy_(0, places.on(target.device), picked)
        return
    for place, row in zip(range(len(rows)) if places is None else places.numbers, rows.numbers, strict=True):
        target[place] = source[row]


def compact_order(indices: Sequence[int], rows: int) -> list[int]:
    """The kept rows, each at its old place where that is still inside; the last ones fill the gaps."""
    kept = set(indices)
    last = iter(sorted((row for row in kept if row >= len(kept)), reverse=True))
    return [place if place in kept else next(last) for place in range(len(kept))]
