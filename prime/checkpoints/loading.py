"""Base model and tokenizer: loading, device and dtype, folding the task adapter, turning texts into ids."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from prime.bank.cpu import quicken
from prime.bank.lora import Adapter
from prime.checkpoints.meta import MetaCheckpoint
from prime.checkpoints.meta_params import config_of_params, is_meta_dir
from prime.checkpoints.meta_tokenizer import end_ids, load_meta_tokenizer
from prime.checkpoints.placement import dispatched, read_map
from prime.checkpoints.published import open_adapter
from prime.checkpoints.tensors import check_hub_dir, shown_error
from prime.checkpoints.weight_files import check_loaded, weight_files
from prime.errors import InputError
from prime.runs.workers import world

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str = "auto") -> torch.device:
    """`auto` is CUDA, then MPS, then CPU; each of several processes launched on a machine takes a GPU of its own."""
    if (name == "cuda" and not torch.cuda.is_available()) or (name == "mps" and not torch.backends.mps.is_available()):
        raise InputError(f"--device {name}: this machine (or this build of torch) has none")
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        here = world()
        return torch.device(f"cuda:{here.local_rank % torch.cuda.device_count()}" if here.local_size > 1 else "cuda")
    if name != "auto":
        return torch.device(name)
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bf16 on a GPU (published) and fp32 on a CPU."""
    if name != "auto":
        return DTYPES[name]
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def load_model(
    path: str, device: str = "auto", dtype: str = "auto", task_adapter: str | None = None,
    device_map: str | None = None,
) -> nn.Module:  # fmt: skip
    """A frozen causal LM in evaluation mode.

    Args:
        path: a Hugging Face directory, or a Meta one.
        device: auto, cpu, cuda, mps.
        dtype: auto, float32, bfloat16, float16.
        task_adapter: PEFT directory or published lora_ckpt.pt folded into the weights; None: the untouched model.
        device_map: parts the model among devices, see `prime.checkpoints.placement.read_map`; None: all on one.

    Raises:
        InputError: no such model, or an adapter that does not fit it.
    """
    place = pick_device(device)
    check_model_dir(path)
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    parts = None if device_map is None else read_map(device_map)
    load = _load_meta if is_meta_dir(path) else _load_hugging_face
    model = load(path, place if parts is None else torch.device("cpu"), pick_dtype(dtype, place))
    if task_adapter is not None:
        fold(model, open_adapter(task_adapter, path), task_adapter)
    quicken(model.requires_grad_(False).eval())  # before accelerate hooks into the layers
    return nn.Module.to(model, place) if parts is None else dispatched(model, parts, place)


def _load_hugging_face(path: str, place: torch.device, dtype: torch.dtype) -> nn.Module:
    files = weight_files(path)
    try:
        with _quiet():
            # Sizes that do not match are reported below, with both shapes.
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True
            )
    except Exception as error:  # the configuration of a stranger can make the library raise whatever it likes
        raise InputError(f"{path}: cannot be loaded as a causal language model: {shown_error(error)}") from error
    model, info = loaded
    check_loaded(path, files, info, getattr(model.config, "num_hidden_layers", 0))
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' own report of what it found."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _load_meta(path: str, place: torch.device, dtype: torch.dtype) -> nn.Module:
    """The model of a Meta directory, its weights put in place one by one; the shards stay mapped files."""
    checkpoint = MetaCheckpoint(path)
    with init_empty_weights():
        model: Any = AutoModelForCausalLM.from_config(checkpoint.config(), dtype=dtype)
    for name, tensor in checkpoint.tensors():
        set_module_tensor_to_device(model, name, place, value=tensor, dtype=dtype)
    model.tie_weights()
    return model


def model_config(path: str, dtype: torch.dtype) -> PreTrainedConfig:
    """The configuration of a model directory, read from config.json or params.json alone."""
    check_model_dir(path)
    if is_meta_dir(path):
        return config_of_params(path, dtype)
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as a model's configuration: {error}") from None


def check_model_dir(path: str) -> None:
    """InputError unless `path` is a directory of one of the two formats."""
    if not Path(path).is_dir():
        raise InputError(f"{path}: no such model directory (--llama_model_path)")
    if not is_meta_dir(path) and not (Path(path) / "config.json").is_file():
        raise InputError(
            f"{path}: no config.json there, and no params.json; a Hugging Face or a Meta model directory is expected"
        )
    check_hub_dir(Path(path))


def fold(model: nn.Module, adapter: Adapter, source: str) -> None:
    """Add an adapter's update to the model's weights: W + scale * B A, computed in fp32."""
    for name, (a, b) in adapter.factors.items():
        try:
            module = model.get_submodule(name)
        except AttributeError:
            raise InputError(f"{source}: the model has no module {name}") from None
        weight = cast(Tensor, module.weight)
        if weight.shape != (b.shape[0], a.shape[1]):
            raise InputError(
                f"{source}: {name}: the adapter's update is {(b.shape[0], a.shape[1])}, "
                f"the model's weight {tuple(weight.shape)}"
            )
        weight.data = (weight.data.float() + adapter.scale * (b @ a).to(weight.device)).to(weight.dtype)


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face directory, or of one with Meta's bare tokenizer.model (or that file itself).

    It needs an end-of-sequence token; a padding token is never used.
    """
    if Path(path).is_file() and Path(path).name == "tokenizer.model":
        path = str(Path(path).parent)
    if not Path(path).is_dir():
        raise InputError(f"{path}: no such tokenizer directory (--tokenizer_path)")
    if is_bare_tokenizer(path):
        return load_meta_tokenizer(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # as for a model
        raise InputError(f"{path}: cannot be loaded as a tokenizer: {shown_error(error)}") from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"{path}: the tokenizer has no end-of-sequence token")
    return tokenizer


def is_bare_tokenizer(path: str) -> bool:
    """Meta's download: tokenizer.model and none of the files that tell transformers what it is."""
    names = ("tokenizer.json", "tokenizer_config.json")
    bare = is_meta_dir(path) or (Path(path) / "tokenizer.model").is_file()
    return bare and not any((Path(path) / name).is_file() for name in names)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: nn.Module, source: str) -> int:
    """Rows of the model's embedding; InputError when the tokenizer's own vocabulary has more."""
    embeddings = cast(Tensor, cast(Any, model).get_input_embeddings().weight)
    # Without the tokens that were added later: hub copies of Llama 2 list a padding token that hardly a text contains.
    if tokenizer.vocab_size > len(embeddings):
        raise InputError(
            f"{source}: the tokenizer has {tokenizer.vocab_size} tokens, "
            f"the model's embedding is {tuple(embeddings.shape)}; they do not belong together (--tokenizer_path)"
        )
    return len(embeddings)


def eos_ids(tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> list[int]:
    """Ids that end an answer: the tokenizer's (with Llama 3's ends of a turn), and the model's generation settings'."""
    listed = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = [] if listed is None else [listed] if isinstance(listed, int) else list(listed)
    return sorted({*end_ids(tokenizer), *listed})


