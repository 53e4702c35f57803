"""Models, tokenizers and adapters by their content, as a run records what it read (`prime.runs.inputs`)."""

from contextlib import suppress
from pathlib import Path

from prime.checkpoints.hub import is_hub_name, local_dir
from prime.checkpoints.loading import pick_device, pick_dtype
from prime.checkpoints.peft import adapter_dir
from prime.checkpoints.published import FILE
from prime.errors import InputError
from prime.runs.files import read_json
from prime.runs.inputs import MACHINE, Source, digest_of, file_digest, folder_digest
from prime.settings import ModelSettings

MODEL_FILES = (
    "config.json", "generation_config.json", "params.json", "*.index.json", "*.safetensors", "*.bin", "*.pth",
)  # fmt: skip
TOKENIZER_FILES = (
    "tokenizer*", "*.model", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*",
)  # fmt: skip
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")


def model_sources(settings: ModelSettings) -> dict[str, Source]:
    """What all results of a stage depend on that reads a model. A path where nothing is is left out: whoever needs it
    reports it. A name of the hub counts by its commit.
    """
    model, adapter = settings.llama_model_path, settings.lora_ckpt
    tokenizer = Path(settings.tokenizer_path or model)
    found = {
        **computed_with(settings.device, settings.dtype),
        **_there("base model", _commit(model) or folder_digest(model, MODEL_FILES), model),
        **tokenizer_source(tokenizer.parent if tokenizer.is_file() else tokenizer),
    }
    return found | (adapter_source("task adapter", adapter) if adapter else {})


def _commit(name: str) -> str:
    """Of a model on the hub; "" for a directory, and for one that cannot be had."""
    with suppress(InputError):
        return Path(local_dir(name, weights=False)).name if is_hub_name(name) else ""
    return ""


def encoder_sources(name: str, device: str) -> dict[str, Source]:
    """The same of stage 2's encoder, which computes in float32."""
    found = {**computed_with(device, "float32"), **_there("encoder", folder_digest(name, MODEL_FILES), name)}
    return found | tokenizer_source(Path(name))


def computed_with(device: str, dtype: str) -> dict[str, Source]:
    """The kind of device and the dtype, as `auto` resolves here."""
    chosen = pick_device(device)
    name = str(pick_dtype(dtype, chosen)).removeprefix("torch.")
    return {MACHINE: Source(f"{chosen.type}, {name}", "--device, --dtype")}


def tokenizer_source(folder: Path) -> dict[str, Source]:
    return _there("tokenizer", folder_digest(folder, TOKENIZER_FILES), folder)


def adapter_source(what: str, path: Path | str) -> dict[str, Source]:
    """An adapter as `prime.checkpoints.published.open_adapter` finds it: its weights, and its scale."""
    path = Path(path)
    published = path / FILE if path.is_dir() and not (path / "adapter_config.json").is_file() else path
    if published.is_file():
        return {what: Source(file_digest(published), str(published))}
    try:
        folder = adapter_dir(path)
        config = read_json(folder / "adapter_config.json")
    except InputError:
        return {}
    if isinstance(config, dict):  # where the base lies is no content
        config = {key: value for key, value in config.items() if key not in ("base_model_name_or_path", "revision")}
    return {what: Source(digest_of([config, folder_digest(folder, ADAPTER_FILES)]), str(folder))}


def _there(what: str, digest: str | None, path: Path | str) -> dict[str, Source]:
    return {what: Source(digest, str(path))} if digest else {}
