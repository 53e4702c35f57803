"""Choosing the next token: greedy, or temperature and top-p sampling whose noise belongs to the prompt.

Sampling a token from p is the same as taking argmax(log p + Gumbel noise) (Gumbel 1954; Maddison et al. 2014).
The noise here is a hash of (seed, prompt, position, token), so a sampled answer does not depend on the batch,
the order of prompts, or the candidates decoded beside it, and two candidates meet the same noise.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from prime.seeds import derive_seed

# Multipliers of the splitmix64 finaliser (Steele et al. 2014) and its golden-ratio increment, as signed 64 bit.
MIX_1, MIX_2, GOLDEN = (0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64, 0x9E3779B97F4A7C15 - 2**64)


@dataclass(frozen=True)
class Sampler:
    """Published defaults: temperature 0.1, top_p 0.9. Temperature 0 is greedy."""

    temperature: float = 0.1
    top_p: float = 0.9
    seed: int = 0

    def key(self, prompt_id: str) -> int:
        """The noise stream of a prompt, a 63-bit integer."""
        return derive_seed("decode", self.seed, prompt_id)

    def choose(self, logits: Tensor, keys: Tensor, positions: Tensor) -> Tensor:
        """Next tokens.

        Args:
            logits: `[m, v]`.
            keys: `[m]` int64, the noise stream of each row's prompt.
            positions: `[m]` int64, index of the token in the answer, from 0.

        Returns:
            `[m]` token ids.
        """
        if self.temperature == 0:
            return logits.argmax(-1)
        scores = torch.log_softmax(logits.float() / self.temperature, -1)
        scores = scores.masked_fill(~nucleus(scores, self.top_p), -torch.inf)
        return (scores + gumbel(keys, positions, logits.shape[-1])).argmax(-1)


def nucleus(log_probs: Tensor, top_p: float) -> Tensor:
    """Mask `[m, v]` of the most probable tokens: those before which less than or exactly top_p has gathered.

    Tokens exactly as probable as the last one belong to it, so the mask does not depend on a sorting order.
    """
    size = log_probs.shape[-1]
    for highest in (min(64, size), size):  # few tokens hold the mass as a rule; all are ordered only where they do not
        ordered = log_probs.topk(highest, dim=-1).values
        probs = ordered.exp()
        kept = probs.cumsum(-1) - probs <= top_p
        if highest == size or not bool(kept[:, -1].any()):
            break
    last = ordered.gather(-1, kept.sum(-1, keepdim=True) - 1)
    return log_probs >= last


def gumbel(keys: Tensor, positions: Tensor, size: int) -> Tensor:
    """Standard Gumbel noise `[m, size]`, a function of (key, position, index) alone."""
    if keys.device.type == "mps":  # has no float64
        return gumbel(keys.cpu(), positions.cpu(), size).to(keys.device)
    streams = _mix(keys + positions * GOLDEN)
    tokens = _mix((torch.arange(1, size + 1, device=keys.device)) * GOLDEN)
    bits = _mix(streams[:, None] ^ tokens[None, :])
    uniform = (_shift(bits, 11).double() + 0.5) * 2.0**-53
    return -torch.log(-torch.log(uniform)).float()


def _shift(x: Tensor, places: int) -> Tensor:
    """Logical right shift of int64 (torch's >> keeps the sign)."""
    return (x >> places) & ((1 << (64 - places)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift(x, 30)) * MIX_1
    x = (x ^ _shift(x, 27)) * MIX_2
    return x ^ _shift(x, 31)
