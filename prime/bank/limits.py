"""What a model's configuration says about its rows: how long they may be, and how far their tokens look back.

Of a row that is alone in its batch, column and position are the same. In a batch they are not: shorter rows have masked
columns in front, and refused guesses leave holes. Attention that counts columns must not reach over one.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from prime.errors import InputError

# What families call the tokens that a layer looks back, or the chunk that it looks at.
LOOKBACK = re.compile(r"(window|window_size|window_len|attention_chunk_size|attn_chunk_length|block_size)$")

SHIFTING = ("dynamic", "longrope")  # rotary positions whose frequencies follow the longest row of the batch
ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}  # layers that keep keys and values alone


class Positions(NamedTuple):
    """How many tokens a row may have, its answer included."""

    most: float
    hard: bool  # more of them fail or are answered wrongly; else the model was only not trained on them
    reason: str


def numbers(config: Any, name: str) -> list[int]:
    """A positive number of a configuration, or those of its layers where they differ; empty if it says none."""
    try:
        values = getattr(config, name, None)
    except RuntimeError:  # "may vary across layers"
        values = [getattr(layer, name, None) for layer in config.per_layer_config]
    listed = values if isinstance(values, list | tuple) else [values]
    return [value for value in listed if type(value) is int and value > 0]


def smallest(config: Any, name: str) -> float:
    """The same as one number; infinite if it says none."""
    return min(numbers(config, name), default=math.inf)


def lookback(config: Any) -> float:
    """Tokens that the model's narrowest layer looks back; infinite if all do to the row's beginning."""
    if not getattr(config, "use_sliding_window", True):
        return math.inf
    return min((smallest(config, name) for name in config.to_dict() if LOOKBACK.search(name)), default=math.inf)


def positions(config: Any) -> Positions:
    """How long rows may be: a table of positions has an end, rotary positions go on beyond what was trained."""
    trained, rotary = smallest(config, "max_position_embeddings"), _rotary(config)
    if not rotary:
        return Positions(trained, True, f"the model has {trained} positions")
    before = [one.get("original_max_position_embeddings") for one in rotary if one["rope_type"] == "longrope"]
    before += [trained for one in rotary if one["rope_type"] == "dynamic"]
    if before:
        kinds = ", ".join(sorted({one["rope_type"] for one in rotary} & set(SHIFTING)))
        most = min(limit or trained for limit in before)
        return Positions(most, True, f"beyond {most} the model's rotary positions ({kinds}) follow the longest row")
    return Positions(trained, False, f"the model was trained on {trained} positions")


def _rotary(config: Any) -> list[Mapping[str, Any]]:
    """Parameters of rotary positions; several where kinds of layers differ, none where positions are others."""
    parameters = getattr(config, "rope_parameters", None) or {}
    each = [parameters] if "rope_type" in parameters else list(parameters.values())
    return [one for one in each if isinstance(one, Mapping) and "rope_type" in one]


def check_states(config: Any, causal_lm: Any) -> None:
    """InputError for a model whose layers keep something else than keys and values, by its configuration or class."""
    text = config.get_text_config(decoder=True)
    others = sorted({str(kind) for kind in getattr(text, "layer_types", None) or ()} - ATTENTION)
    if others or getattr(causal_lm, "_is_stateful", False):
        kinds = f"layers of other kinds ({', '.join(others)})" if others else "a recurrent state"
        raise InputError(f"a model of the kind {config.model_type} is not supported: not attention alone, but {kinds}")
