"""Meta's `tokenizer.model` as a Hugging Face tokenizer that gives the ids of Meta's own encoder.

Llama 2 keeps a sentencepiece model there (BPE, byte fallback, a space in front of every text). Llama 3 keeps a tiktoken
file (a line per token: base64 of its bytes, its rank), and has 256 special tokens with ids behind those. Both become a
list of merges: every way to divide a token into two other tokens, the better token first. Special tokens written out in
a text stay text, as with Meta's encoders, and BOS goes in front.

Known differences: inside a repetition a token that can be divided in several ways may be merged from another side; and
Meta's Llama 3 encoder cuts runs of more than 25,000 characters without (or only of) space, this one does not.
"""

import base64
import binascii
import re
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from prime.errors import InputError
from prime.runs.files import read_bytes

SPACE = "\u2581"  # sentencepiece's space
BYTE_PIECE = re.compile(r"<0x[0-9A-F]{2}>")
# How Llama 3 splits a text before merging (published with its tokenizer; that of GPT-4 but for \p{N}{1,3}).
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPECIALS = 256
# By their number behind the tokens; the others are reserved. Only ids matter, since text never becomes one of them.
LLAMA3_NAMED = {
    0: "<|begin_of_text|>", 1: "<|end_of_text|>", 4: "<|finetune_right_pad_id|>", 6: "<|start_header_id|>",
    7: "<|end_header_id|>", 8: "<|eom_id|>", 9: "<|eot_id|>", 10: "<|python_tag|>",
}  # fmt: skip
LLAMA3_ENDS = (1, 8, 9)  # end of text, of a message, of a turn; only instruct models write the latter two


def load_meta_tokenizer(folder: str | Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a directory with Meta's tokenizer.model; InputError when it is neither of the two kinds."""
    path = Path(folder) / "tokenizer.model"
    if not path.is_file():
        raise InputError(f"{path}: no such file; Meta's tokenizer is expected there (--tokenizer_path)")
    ranks = read_tiktoken(path)
    return _from_tiktoken(ranks) if ranks else _from_sentencepiece(path)


def end_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end an answer: EOS, and Llama 3's ends of a message and a turn where the vocabulary has them."""
    vocab = tokenizer.get_vocab()
    ends = [LLAMA3_NAMED[number] for number in LLAMA3_ENDS]
    return sorted({tokenizer.eos_token_id, *(vocab[token] for token in ends if token in vocab)})


# -- Llama 3 --------------------------------------------------------------------------------------------------------


def read_tiktoken(path: Path) -> dict[bytes, int] | None:
    """Rank of each token's bytes, or None when the file is not of this format."""
    ranks: dict[bytes, int] = {}
    for line in read_bytes(path).splitlines():
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            if ranks:
                raise InputError(f"{path}: line {len(ranks) + 1} is no token and rank: {line[:40]!r}") from None
            return None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise InputError(f"{path}: the ranks of {len(ranks)} tokens are not 0 to {len(ranks) - 1}; is it cut short?")
    return ranks


def _from_tiktoken(ranks: dict[bytes, int]) -> PreTrainedTokenizerFast:
    letters = _byte_letters()
    vocab = {token.decode("latin-1").translate(letters): rank for token, rank in ranks.items()}
    inner = Tokenizer(models.BPE(vocab, _merges(vocab, by=vocab), ignore_merges=True))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    inner.decoder = decoders.ByteLevel()
    reserved = iter(range(LLAMA3_SPECIALS))
    named = [LLAMA3_NAMED.get(i) or f"<|reserved_special_token_{next(reserved)}|>" for i in range(LLAMA3_SPECIALS)]
    inner.add_special_tokens([AddedToken(name, normalized=False, special=True) for name in named])
    _begin_with(inner, named[0], len(ranks))
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=named[0], eos_token=named[1], split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def _byte_letters() -> dict[int, str]:
    """The printable letter that byte-level BPE writes for each byte (Radford et al. 2019)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + number) for number, byte in enumerate(others)}


def _merges(vocab: dict[str, int], by: dict[str, int]) -> list[tuple[str, str]]:
    """All pairs of tokens that make up a token, in the order of `by[token]`; of one token the earliest pair first."""
    merges = []
    for token in sorted(vocab, key=by.__getitem__):
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        known = [(a, b) for a, b in pairs if a in vocab and b in vocab]
        merges += sorted(known, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    return merges


# -- Llama 2 --------------------------------------------------------------------------------------------------------


def _from_sentencepiece(path: Path) -> PreTrainedTokenizerFast:
    from sentencepiece import SentencePieceProcessor

    try:
        model = SentencePieceProcessor(model_file=str(path))
    except (RuntimeError, OSError) as error:
        raise InputError(f"{path}: neither a tiktoken file nor a sentencepiece model: {error}") from None
    pieces = [model.id_to_piece(i) for i in range(len(model))]
    unknown, begin, end = (pieces[i] for i in (model.unk_id(), model.bos_id(), model.eos_id()))
    inner = Tokenizer(_bpe_of(model, pieces, unknown))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    inner.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    _begin_with(inner, begin, model.bos_id())
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token=unknown, bos_token=begin, eos_token=end, split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    _check_same(tokenizer, model, path)
    return tokenizer


def _begin_with(inner: Tokenizer, token: str, number: int) -> None:
    """Put BOS in front of every text, as Meta's own code does."""
    inner.post_processor = processors.TemplateProcessing(single=f"{token} $A", special_tokens=[(token, number)])


def _bpe_of(model: Any, pieces: list[str], unknown: str) -> models.BPE:
    """The merges of a sentencepiece model, the highest score first."""
    vocab = {piece: i for i, piece in enumerate(pieces)}
    # Control tokens, and the pieces of single bytes, are never made by merging.
    plain = [i for i in vocab.values() if not (model.is_control(i) or model.is_unknown(i) or model.is_byte(i))]
    merged = {pieces[i]: i for i in plain}
    by_score = sorted(plain, key=lambda i: (-model.get_score(i), i))
    order = {pieces[i]: number for number, i in enumerate(by_score)}
    byte_fallback = any(BYTE_PIECE.fullmatch(piece) for piece in pieces)
    merges = _merges(merged, by=order)
    return models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=byte_fallback)


PROBES = ("Two  spaces, 1234 digits\nand a line.", " caf\u00e9 \U0001f600 at the end ")


def _check_same(tokenizer: PreTrainedTokenizerFast, model: Any, path: Path) -> None:
    """InputError for a model that is not like Llama's: unigram, or with a normalizer of its own."""
    for text in PROBES:
        if tokenizer(text, add_special_tokens=False)["input_ids"] != model.encode(text):
            raise InputError(f"{path}: not a sentencepiece model like Llama's (BPE, plain text): differs on {text!r}")
