"""Log-probabilities of records' targets under many adapters, in the batches that decoding uses."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from prime.bank.bank import AdapterBank
from prime.bank.batching import Pair, batches_of
from prime.bank.budgets import auto_batch_tokens
from prime.bank.drafts import Drafts
from prime.bank.encoding import EncodedRecord
from prime.bank.rows import Row, check_finite


@torch.inference_mode()
def target_logprobs(
    bank: AdapterBank,
    records: Sequence[EncodedRecord],
    pairs: Iterable[Pair],
    max_batch_tokens: int = 0,
    progress: Callable[[int], object] | None = None,
    moments: dict[Pair, Tensor] | None = None,
) -> dict[Pair, Tensor]:
    """Log-probabilities of the target tokens of records under adapters.

    Args:
        bank: holds the adapters.
        records: the texts that `pairs` count from 0.
        pairs: (adapter, record) indices; adapter -1 is the plain base.
        max_batch_tokens: tokens per forward pass; 0 = chosen for the device.
        progress: called with the number of records just read.
        moments: added to, if given: `[2, target tokens]`, mean and standard deviation of the log-probability of a
            token drawn from the model in the target token's place.

    Returns:
        fp32 CPU tensors `[target tokens, EOS included]`, by pair.

    Raises:
        InputError: a record has more tokens than the model has positions, or logits that are not finite.
    """
    logprobs: dict[Pair, Tensor] = {}
    fed_targets = [record.target[:-1] for record in records]  # nothing is read behind the last token
    rows = [Row(adapter, index, records[index].ids, records[index].id) for adapter, index in pairs]
    budget = max_batch_tokens or auto_batch_tokens(bank)
    for batch in batches_of(bank, rows, Drafts([[target] for target in fed_targets]), 0, budget):
        batch_logits = batch.feed([row.text for row in batch.rows], [fed_targets[row.index] for row in batch.rows])
        for row, padded_logits in zip(batch.rows, batch_logits, strict=True):
            target = torch.tensor(records[row.index].target, device=padded_logits.device)
            logits = padded_logits[: len(target)].float()
            found = (logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(1)).cpu()
            check_finite(found.sum()[None], [row.name], padded_logits.dtype)
            logprobs[row.adapter, row.index] = found
            if moments is not None:
                moments[row.adapter, row.index] = _moments(logits).cpu()
                check_finite(moments[row.adapter, row.index].sum()[None], [row.name], padded_logits.dtype)
        if progress:
            progress(len(batch.rows))
    return logprobs


def _moments(logits: Tensor) -> Tensor:
    """`[2, t]` mean and standard deviation of log p(token) for a token drawn from p, of logits `[t, v]`."""
    logprobs = logits.log_softmax(1)
    p = logprobs.exp()
    mean = (p * logprobs).sum(1)
    return torch.stack([mean, (p * (logprobs - mean[:, None]).square()).sum(1).sqrt()])
