"""GGUF files as Hugging Face directories: converted once, kept beside the file, with their tokenizer.

The file is read by transformers and the package `gguf`, which is installed only where such a file is to be read. Its
weights are taken out of their packing and kept as bfloat16 (those of a float32 or float16 file as they are).
"""

import os
import shutil
import sys
from contextlib import nullcontext, redirect_stderr
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any

from prime.errors import InputError, tell
from prime.runs.files import flush, read_json, uninterrupted, write_json
from prime.runs.inputs import file_digest
from prime.runs.locks import turn

MAGIC = b"GGUF"
PACKAGE = "gguf==0.19.0"
SOURCE = "converted_from.json"  # beside a conversion: what it was made of
# What llama.cpp calls tokenizers that part texts as GPT-2's does, and those that part digits before it. transformers
# reads many a file as if it were of the first kind.
AS_GPT2 = ("gpt-2", "default")
DIGITS_APART = ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone")
MARKS = ("quantization_method", "quantization_config", "_pre_quantization_dtype")  # of a quantizer, on model and config


def model_directory(path: str) -> str:
    """A GGUF file, or a folder that holds one and no other model, as the directory it is converted to; else the path.

    Raises:
        InputError: it cannot be converted, or the folder holds several.
    """
    file = gguf_file(Path(path))
    return path if file is None else str(kept_conversion(file))


def gguf_file(path: Path) -> Path | None:
    """The GGUF file that a path names; None where it names something else."""
    if path.suffix == ".gguf" and path.is_file():
        return path
    files = sorted(path.glob("*.gguf")) if path.is_dir() else []
    if not files or (path / "config.json").is_file() or (path / "params.json").is_file():
        return None
    if len(files) > 1:
        raise InputError(f"{path}: holds {len(files)} GGUF files; name one of them, such as {files[0]}")
    return files[0]


def kept_conversion(file: Path) -> Path:
    """The conversion beside a file; made unless it is there, made anew where the file has changed."""
    target = file.with_suffix(".hf")
    made_of = {"file": file.name, "digest": file_digest(file)}
    with turn(target.with_name(f".{target.name}.lock"), "the converted model"):
        if target.exists() and not (target / SOURCE).is_file():
            raise InputError(f"{target}: there already, and no conversion of {file.name}; move one of them away")
        if not target.exists() or read_json(target / SOURCE) != made_of:
            _replace(file, target, made_of)
    return target


def _replace(file: Path, target: Path, made_of: dict[str, str]) -> None:
    """Convert into a folder of another name, which becomes `target` when it is whole."""
    making = target.with_name(f".{target.name}.making")
    shutil.rmtree(making, ignore_errors=True)
    try:
        convert(file, making)
        write_json(making / SOURCE, made_of)
        for written in making.iterdir():
            written.chmod(0o644)
            flush(written)
    except BaseException:
        shutil.rmtree(making, ignore_errors=True)
        raise
    with uninterrupted():
        shutil.rmtree(target, ignore_errors=True)
        os.replace(making, target)
        flush(target.parent)


def convert(file: Path, target: Path) -> None:
    """Write model and tokenizer of a GGUF file into a Hugging Face directory.

    Raises:
        InputError: the package `gguf` is missing, or the file cannot be read as a causal language model.
    """
    with open(file, "rb") as opened:
        if opened.read(len(MAGIC)) != MAGIC:
            raise InputError(f"{file}: not a GGUF file")
    if find_spec("gguf") is None:
        raise InputError(f"{file}: to read it, install its library: .venv/bin/pip install {PACKAGE}")
    tell(f"{file}: converted once, which takes half a minute or more, and kept beside it")
    from transformers import AutoModelForCausalLM, AutoTokenizer  # takes seconds, and most runs need no conversion
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    source: dict[str, Any] = {"gguf_file": file.name, "trust_remote_code": False}
    bars = nullcontext() if sys.stderr.isatty() else redirect_stderr(StringIO())
    try:
        with bars:
            tokenizer: Any = AutoTokenizer.from_pretrained(file.parent, **source)
            model: Any = AutoModelForCausalLM.from_pretrained(file.parent, dtype=_dtype(file), **source)
    except Exception as error:  # a stranger's file can make the libraries raise whatever they like
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InputError(f"{file}: cannot be read as a causal language model: {reason}") from error
    packed = sorted({type(module).__name__ for module in model.modules() if "gguf" in type(module).__name__.lower()})
    if packed:
        raise InputError(f"{file}: its weights stay packed ({packed[0]}) where the package `kernels` is installed")
    _unmark(model)
    _part_texts(file, tokenizer)
    model.save_pretrained(target)
    tokenizer.save_pretrained(target)


def _part_texts(file: Path, tokenizer: Any) -> None:
    """Let a tokenizer part texts before it merges letters as its file says, or tell that it does not."""
    from gguf import GGUFReader
    from tokenizers import pre_tokenizers

    field = GGUFReader(file).get_field("tokenizer.ggml.pre")
    named = AS_GPT2[0] if field is None else field.contents()
    inner = tokenizer.backend_tokenizer
    if not isinstance(inner.pre_tokenizer, pre_tokenizers.ByteLevel) or named in AS_GPT2:
        return
    if named in DIGITS_APART:
        inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(True), inner.pre_tokenizer])
    else:
        tell(f"{file}: its tokenizer ({named}) is read as GPT-2's; --tokenizer_path DIR gives the original")


def _unmark(model: Any) -> None:
    """Take off what says that the weights are packed; `save_pretrained` would refuse, though they no longer are."""
    model.hf_quantizer, model.is_quantized = None, False
    for holder in (model, model.config):
        for mark in MARKS:
            if hasattr(holder, mark):
                delattr(holder, mark)


def _dtype(file: Path) -> Any:
    """What a file's weights are kept as."""
    import torch
    from gguf import GGMLQuantizationType, GGUFReader

    plain = {GGMLQuantizationType.F32: torch.float32, GGMLQuantizationType.F16: torch.float16}
    kinds = {tensor.tensor_type for tensor in GGUFReader(file).tensors if len(tensor.shape) > 1}
    return plain.get(kinds.pop(), torch.bfloat16) if len(kinds) == 1 else torch.bfloat16


if __name__ == "__main__":
    try:
        print(model_directory(sys.argv[1]))
    except InputError as error:
        sys.exit(str(error))
