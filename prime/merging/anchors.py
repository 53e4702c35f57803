"""Which candidates become sharers ("anchors"), and the files that say so.

A user's embedding is the mean over history items of an encoder's mean token state. Candidates are clustered
and each cluster's most active user shares an adapter (Per-Pcs, Tan et al. 2024, "sharer selection").

Letters: `n` candidates or users, `h` embedding width, `b` batch rows, `t` tokens.
"""

from __future__ import annotations

import io
import pickle
import struct
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from prime.checkpoints.tensors import FLOATS, check_hub_dir, check_plain, load_pickled, shown_error, shown_value
from prime.checkpoints.weight_files import check_size, weight_files
from prime.errors import InputError, harmless
from prime.runs.files import write_bytes
from prime.settings import MIN_ITEMS

MAX_TOKENS = 512
ROWS = 4096  # of embeddings, checked at a time
MAX_EMBEDDING = 1e16  # of one number: squares and their sums over any width stay within fp32
CANDIDATE_EMB, TEST_EMB, ANCHOR_IDX = "user_history_emb.pt", "test_user_history_emb.pt", "anchor_user_idx.pt"


# --- embeddings ------------------------------------------------------------------------------------


class SentenceEncoder(NamedTuple):
    """A frozen encoder: `tokens(text)` gives the ids, cut to what it can read; `pad_id` fills batches."""

    model: torch.nn.Module
    tokens: Callable[[str], list[int]]
    pad_id: int


def load_encoder(name: str, device: str | torch.device = "cpu") -> SentenceEncoder:
    """Any Hugging Face encoder or causal LM without its head (`AutoModel`), in float32."""
    from transformers import AutoModel, AutoTokenizer, logging

    local = Path(name).is_dir()
    if local:
        check_hub_dir(Path(name))
    away = "" if local else hub_is_away(name)
    logging.set_verbosity_error()  # a causal LM's unused head is no news
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        options: dict[str, Any] = {"trust_remote_code": False, "local_files_only": bool(away)}
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        if local:
            check_size(name, weight_files(name), AutoModel)
        model = AutoModel.from_pretrained(name, dtype=torch.float32, **options)
    except InputError:
        raise
    except Exception as error:  # the configuration of a stranger can make the library raise whatever it likes
        unreachable = f"it is no directory, and the Hugging Face hub cannot be reached: {away}"
        reason = unreachable if away else shown_error(error)
        remedy = "" if local else "\nWithout a network, download it elsewhere and give its directory (--encoder)."
        raise InputError(f"--encoder {name}: no encoder could be loaded: {reason}{remedy}") from error
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    positions = getattr(model.config, "max_position_embeddings", None) or MAX_TOKENS
    limit = min(MAX_TOKENS, tokenizer.model_max_length, positions)

    def tokens(text: str) -> list[int]:
        return tokenizer(text, truncation=True, max_length=limit, split_special_tokens=True)["input_ids"]

    return SentenceEncoder(model.to(device).eval().requires_grad_(False), tokens, pad)


def hub_is_away(name: str, seconds: float = 10) -> str:
    """Why the Hugging Face hub cannot be asked for a model, "" if it can: one try, where transformers makes dozens."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=seconds)
    except (HfHubHTTPError, HFValidationError):  # it answers, or would never be asked
        return ""
    except Exception as error:  # of the network, whatever library carries it
        return shown_error(error)
    return ""


def _batches(rows: Sequence[Sequence[int]], max_batch_tokens: int) -> Iterator[list[int]]:
    """Row numbers in batches of similar length, each of at most `max_batch_tokens` with padding."""
    batch: list[int] = []
    for i in sorted(range(len(rows)), key=lambda i: -len(rows[i])):
        if batch and len(rows[batch[0]]) * (len(batch) + 1) > max_batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


@torch.no_grad()
def embed_texts(texts: Sequence[str], encoder: SentenceEncoder, max_batch_tokens: int = 4096) -> torch.Tensor:
    """[len(texts), h] mean of the last hidden states over each text's own tokens (padding masked)."""
    rows = [encoder.tokens(text) or [encoder.pad_id] for text in texts]
    device = next(encoder.model.parameters()).device
    means: dict[int, torch.Tensor] = {}
    for batch in _batches(rows, max_batch_tokens):
        ids = torch.nn.utils.rnn.pad_sequence(
            [torch.tensor(rows[i]) for i in batch], batch_first=True, padding_value=encoder.pad_id
        ).to(device)
        lengths = torch.tensor([[len(rows[i])] for i in batch], device=device)
        mask = torch.arange(ids.shape[1], device=device) < lengths  # [b, t]
        states = encoder.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state.float()
        sums = (states * mask[..., None]).sum(1) / lengths
        means.update(zip(batch, sums.cpu(), strict=True))
    return torch.stack([means[i] for i in range(len(rows))])


def embed_users(
    user_ids: Sequence[str], texts: Sequence[Sequence[str]], encoder: SentenceEncoder, max_batch_tokens: int = 4096
) -> torch.Tensor:
    """[n, h] mean over the embedded texts of each user; one without any gets zeros, and a warning says so."""
    # Equal texts (items shared between users, labels) are embedded once.
    distinct: dict[str, None] = {}
    for texts_of_user in texts:
        distinct |= dict.fromkeys(texts_of_user)
    place = {text: i for i, text in enumerate(distinct)}
    if not place:
        raise InputError(f"none of the {len(texts)} users has a history item to embed")
    items = embed_texts(list(place), encoder, max_batch_tokens)
    out = torch.zeros(len(texts), items.shape[1])
    for row, (user_id, texts_of_user) in enumerate(zip(user_ids, texts, strict=True)):
        if texts_of_user:
            out[row] = items[[place[text] for text in texts_of_user]].mean(0)
        else:
            warnings.warn(harmless(f"user {user_id}: empty history, embedded as zeros"), stacklevel=2)
    return out


# --- choosing --------------------------------------------------------------------------------------


def cluster(embeddings: torch.Tensor, k: int = 50) -> list[int]:
    """k-means label of each row of [n, h]; published settings: random_state 0, max_iter 3000, n_init 10."""
    from sklearn.cluster import KMeans

    means = KMeans(n_clusters=k, random_state=0, max_iter=3000, n_init=10)
    return means.fit_predict(embeddings.double().numpy()).tolist()


def choose_anchors(labels: Sequence[int], n_items: Sequence[int], min_items: int = MIN_ITEMS) -> list[int]:
    """Index of each cluster's user with the longest profile (ties: the first), if of `min_items` or more.

    Ascending, so the list does not depend on how the clusters are numbered.
    """
    best: dict[int, int] = {}
    for i, label in enumerate(labels):
        if label not in best or n_items[i] > n_items[best[label]]:
            best[label] = i
    return sorted(i for i in best.values() if n_items[i] >= min_items)


def check_anchors(found: int, clusters: int, longest: int, min_items: int, n_sim: int) -> str:
    """What a reader has to know of a choice of `found` anchors; "" if every cluster has one.

    Raises:
        InputError: there are no more anchors than are merged for a user (0: as many as there are), so that nobody is
            left whom an attack could tell from the merged ones.
    """
    dropped = clusters - found
    why = f"nobody in them has {min_items} history items (--min_items)"
    told = f"{dropped} of {clusters} clusters give no anchor: {why}" if dropped else ""
    if found > n_sim or found and not n_sim:
        return told
    remedy = f"give more candidates, a smaller --min_items (their longest history has {longest} items)"
    short = f"{found} anchors, and {n_sim} are merged for a user (--n_sim), so nobody is left to compare them with"
    lines = [f"{short if found else 'no anchor'}: {remedy}, or a smaller --n_sim", *([told] if told else [])]
    raise InputError.many(lines)


# --- files -----------------------------------------------------------------------------------------


def save_tensor(path: Path, tensor: torch.Tensor) -> None:
    """Write so that a reader sees either the old file or the whole new one, of the same bytes for the same tensor."""
    buffer = io.BytesIO()  # given a path, torch.save writes the file's name into it, here that of a temporary one
    torch.save(tensor, buffer)
    write_bytes(path, buffer.getvalue())


def save_selection(folder: Path, candidate_emb: torch.Tensor, test_emb: torch.Tensor, anchors: Sequence[int]) -> None:
    """The three published files, `anchor_user_idx.pt` (here an int64 tensor) last: the mark of being done."""
    save_tensor(folder / CANDIDATE_EMB, candidate_emb)
    save_tensor(folder / TEST_EMB, test_emb)
    save_tensor(folder / ANCHOR_IDX, torch.tensor(anchors, dtype=torch.int64))


class _PickledInt64:
    """Stands in for `numpy.dtype` in the published index file: knows int64 and its byte order, no more."""

    order = "="

    def __init__(self, code: str, *_flags: object) -> None:
        if code != "i8":
            raise pickle.UnpicklingError(f"dtype {code!r} where int64 ('i8') was expected")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.order = {"<": "<", ">": ">"}.get(state[1], "=")


def _pickled_scalar(dtype: _PickledInt64, data: bytes) -> int:
    """Stands in for `numpy.core.multiarray.scalar`: eight bytes to an int."""
    return struct.unpack(f"{dtype.order}q", data)[0]


# The published file is a pickled list of int64 scalars made with numpy 1. These names are answered by the
# harmless stand-ins above, so reading it runs no code of numpy's nor the file's. Numpy 2 says `_core`.
_PUBLISHED_GLOBALS: list[Any] = [
    (_PickledInt64, "numpy.dtype"),
    (_pickled_scalar, "numpy.core.multiarray.scalar"),
    (_pickled_scalar, "numpy._core.multiarray.scalar"),
]


def _load(path: Path, mmap: bool = False) -> Any:
    if not path.is_file():
        raise InputError(f"{path}: no such file; history_anchor.py writes it")
    return load_pickled(path, _PUBLISHED_GLOBALS, mmap)


def load_embeddings(path: str | Path, n_users: int) -> torch.Tensor:
    """[n, h] float32, one row for each of `n_users` users; left in the file until it is read, where torch can map it.

    Raises:
        InputError: another shape, or rows with values that are not finite or whose squares fp32 cannot hold.
    """
    value = _load(Path(path), mmap=True)
    if not isinstance(value, torch.Tensor) or value.ndim != 2:
        raise InputError(f"{path}: expected a tensor [users, width], found {shown_value(value)}")
    check_plain(path, {"the tensor": value})
    if value.dtype not in FLOATS or not value.shape[1]:
        raise InputError(f"{path}: expected floating point numbers, found {shown_value(value)}")
    if len(value) != n_users:
        raise InputError(f"{path}: holds {len(value)} users, the data {n_users}: run history_anchor.py again")
    wrong: list[int] = []
    for i, part in enumerate(value.split(ROWS)):
        wrong += [i * ROWS + row for row in _odd_rows(part)]
    if wrong:
        rows = ", ".join(map(str, wrong[:10])) + (", ..." if len(wrong) > 10 else "")
        what = "users have an embedding that is not finite or above"
        raise InputError(f"{path}: {len(wrong)} {what} {MAX_EMBEDDING:g}: rows {rows}")
    return value.float()


def _odd_rows(rows: torch.Tensor) -> list[int]:
    """Numbers of the rows that hold something else than usual numbers."""
    low, high = rows.aminmax()
    if low >= -MAX_EMBEDDING and high <= MAX_EMBEDDING:  # NaN is neither
        return []
    return torch.nonzero(~(rows.abs() <= MAX_EMBEDDING).all(1)).flatten().tolist()


def load_anchor_idx(path: str | Path, n_candidates: int) -> list[int]:
    """Indices into the candidate file: an int tensor, a list of ints, or published pickled numpy scalars."""
    value = _load(Path(path))
    if isinstance(value, torch.Tensor):
        check_plain(path, {"the tensor": value})
    values = value.tolist() if isinstance(value, torch.Tensor) and value.ndim == 1 else value
    if not isinstance(values, list) or not values or not all(type(v) is int for v in values):
        raise InputError(f"{path}: expected a list of user indices, found {shown_value(value)}")
    problems = [] if len(set(values)) == len(values) else [f"{path}: an anchor is listed twice"]
    wrong = [v for v in values if not 0 <= v < n_candidates]
    if wrong:
        indices = f"{str(wrong[:10])[:-1]}{', ...' if len(wrong) > 10 else ''}]"
        problems.append(f"{path}: indices {indices} lie outside the {n_candidates} candidates")
    if problems:
        raise InputError.many(problems)
    return values
