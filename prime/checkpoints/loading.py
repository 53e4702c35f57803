"""Loading the base model and its tokenizer: device and dtype, both directory formats, the task adapter folded in."""

import os
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

from prime.bank.cpu import quicken, threads_of
from prime.bank.limits import check_states, positions
from prime.bank.lora import Adapter
from prime.checkpoints.hub import local_dir
from prime.checkpoints.meta import MetaCheckpoint
from prime.checkpoints.meta_params import config_of_params, is_meta_dir
from prime.checkpoints.meta_tokenizer import end_ids, load_meta_tokenizer
from prime.checkpoints.placement import dispatched, read_map
from prime.checkpoints.published import open_adapter
from prime.checkpoints.tensors import check_hub_dir, shown, shown_error
from prime.checkpoints.weight_files import check_loaded, check_size, weight_files
from prime.errors import InputError, tell
from prime.runs.workers import cores, world

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def pick_device(name: str = "auto") -> torch.device:
    """`auto` is CUDA, then MPS, then CPU; of several processes launched on a machine each takes a GPU of its own."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind in available if available[kind])
    if not available[name]:
        raise InputError(f"--device {name}: this machine (or this build of torch) has none")
    process = world()
    if name == "cuda" and process.local_size > 1:
        return torch.device(f"cuda:{process.local_rank % torch.cuda.device_count()}")
    return torch.device(name)


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bf16 on a GPU (as published) and fp32 on a CPU."""
    if name != "auto":
        return DTYPES[name]
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def settle_threads(model: nn.Module, device: torch.device) -> None:
    """Let torch compute a model on a CPU with as many threads as serve it, unless OMP_NUM_THREADS says how many."""
    if device.type != "cpu" or os.environ.get("OMP_NUM_THREADS"):
        return
    threads = threads_of(model, max(1, cores() // world().local_size))
    torch.set_num_threads(threads)
    if world().rank == 0:
        tell(f"threads: {threads} of {cores()} cores, by the size of the model's products (docs/scaling.md)")


def load_model(
    path: str, device: str = "auto", dtype: str = "auto", task_adapter: str | None = None,
    device_map: str | None = None,
) -> nn.Module:  # fmt: skip
    """A frozen causal LM in evaluation mode.

    Args:
        path: a Hugging Face directory, or a Meta one, or a name of the hub.
        device: auto, cpu, cuda, mps.
        dtype: auto, float32, bfloat16, float16.
        task_adapter: PEFT directory or published lora_ckpt.pt to fold into the weights; None: the untouched model.
        device_map: divides the model among devices, see `prime.checkpoints.placement.read_map`; None: all on one.

    Raises:
        InputError: no such model, or an adapter that does not fit it.
    """
    main_device = pick_device(device)
    named, path = path, local_dir(path)
    check_model_dir(path)
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    parts = None if device_map is None else read_map(device_map)
    load = _load_meta if is_meta_dir(path) else _load_hugging_face
    model = load(path, main_device if parts is None else torch.device("cpu"), pick_dtype(dtype, main_device))
    if task_adapter is not None:
        fold(model, open_adapter(task_adapter, path, named), task_adapter)
    quicken(model.requires_grad_(False).eval())  # before accelerate hooks into the layers
    return nn.Module.to(model, main_device) if parts is None else dispatched(model, parts, main_device)


def _load_hugging_face(path: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The model of a Hugging Face directory, still on the CPU."""
    model_config(path, dtype)
    files = weight_files(path)
    try:
        with _quiet():
            check_size(path, files, AutoModelForCausalLM)
            # Mismatched sizes are let through here, since `check_loaded` reports them with both shapes.
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path, dtype=dtype, trust_remote_code=False, output_loading_info=True, ignore_mismatched_sizes=True
            )
    except InputError:
        raise
    except Exception as error:  # as in `model_config`
        raise InputError(f"{path}: cannot be loaded as a causal language model: {shown_error(error)}") from error
    model, info = loaded
    check_loaded(path, files, info, model)
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    """Within this block transformers does not print its own report of missing and unexpected tensors."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _load_meta(path: str, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The model of a Meta directory, its weights moved to the device one by one; the shards stay mapped files."""
    checkpoint = MetaCheckpoint(path)
    with init_empty_weights():
        model: Any = AutoModelForCausalLM.from_config(checkpoint.config(), dtype=dtype)
    for name, tensor in checkpoint.tensors():
        set_module_tensor_to_device(model, name, device, value=tensor, dtype=dtype)
    model.tie_weights()
    return model


def model_config(path: str, dtype: torch.dtype) -> PreTrainedConfig:
    """The configuration of a model directory, from config.json or params.json alone.

    Raises:
        InputError: it cannot be read, or is that of a kind of model that is not supported.
    """
    path = local_dir(path, weights=False)
    check_model_dir(path)
    if is_meta_dir(path):
        return config_of_params(path, dtype)
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # a stranger's configuration can make the library raise whatever it likes
        raise InputError(f"{path}: cannot be read as a model's configuration: {shown_error(error)}") from error
    try:
        check_states(config, AutoModelForCausalLM._model_mapping.get(type(config), None))
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    return config


def check_positions(path: str, tokens: int) -> None:
    """InputError, before weights are read, for a model that has no positions for rows of so many tokens."""
    most, hard, reason = positions(model_config(path, torch.float32).get_text_config(decoder=True))
    if hard and tokens > most:
        raise InputError(f"{path}: {reason}; --max_length and the longest answer are {tokens} together")


def check_model_dir(path: str) -> None:
    """InputError unless `path` is a model directory of Hugging Face or Meta."""
    path = local_dir(path, weights=False)
    if not Path(path).is_dir():
        raise InputError(f"{path}: no such model directory (--llama_model_path)")
    if not is_meta_dir(path) and not (Path(path) / "config.json").is_file():
        if (Path(path) / "adapter_config.json").is_file():
            raise InputError(f"{path}: an adapter, not a model; give the base that it was trained on")
        raise InputError(
            f"{path}: no config.json there, and no params.json; a Hugging Face or a Meta model directory is expected"
        )
    check_hub_dir(Path(path))


def fold(model: nn.Module, adapter: Adapter, source: str) -> None:
    """Add an adapter's update to the model's weights: W + scale * B A, computed in fp32.

    A weight that the embedding shares becomes the module's own, since the update is the module's alone.
    """
    for name, (a, b) in adapter.factors.items():
        try:
            module = model.get_submodule(name)
        except AttributeError:
            raise InputError(f"{source}: the model has no module {name}") from None
        if not isinstance(module, nn.Linear):
            raise InputError(f"{source}: {name} is a {type(module).__name__}, not an nn.Linear; it cannot be adapted")
        weight = module.weight
        if weight.shape != (b.shape[0], a.shape[1]):
            raise InputError(
                f"{source}: {name}: the adapter's update is {(b.shape[0], a.shape[1])}, "
                f"the model's weight {tuple(weight.shape)}"
            )
        updated = weight.data.float() + adapter.scale * (b @ a).to(weight.device)
        module.weight = nn.Parameter(updated.to(weight.dtype), requires_grad=False)
        if weight is cast(Any, model).get_input_embeddings().weight:
            cast(Any, model).config.tie_word_embeddings = False  # else a library would tie them again


def load_tokenizer(path: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a Hugging Face directory or name, or of a folder with Meta's tokenizer.model (or that file).

    Raises:
        InputError: no tokenizer, or one without an end-of-sequence token. (A padding token is never used.)
    """
    if Path(path).is_file() and Path(path).name == "tokenizer.model":
        path = str(Path(path).parent)
    path = local_dir(path, weights=False)
    if not Path(path).is_dir():
        raise InputError(f"{path}: no such tokenizer directory (--tokenizer_path)")
    if is_bare_tokenizer(path):
        return load_meta_tokenizer(path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # as in `_load_hugging_face`
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
    """Rows of the model's embedding; InputError if the tokenizer's own vocabulary has more."""
    embeddings = cast(Tensor, cast(Any, model).get_input_embeddings().weight)
    # Added tokens do not count: hub copies of Llama 2 list a padding token, which hardly any text contains.
    if tokenizer.vocab_size > len(embeddings):
        raise InputError(
            f"{source}: the tokenizer has {tokenizer.vocab_size} tokens, "
            f"the model's embedding is {tuple(embeddings.shape)}; they do not belong together (--tokenizer_path)"
        )
    return len(embeddings)


def eos_ids(tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> list[int]:
    """Ids that end an answer: the tokenizer's (with Llama 3's ends of a turn), and those of the generation settings."""
    eos: Any = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if not all(type(token) is int and 0 <= token < 2**31 for token in ids):
        source = getattr(getattr(model, "config", None), "_name_or_path", "the model")
        problem = f"eos_token_id is {shown(repr(eos))}, expected ids of tokens"
        raise InputError(f"{source}: generation_config.json: {problem}")
    return sorted({*end_ids(tokenizer), *ids})
