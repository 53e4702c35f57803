"""Models by their name on the Hugging Face hub: downloaded where a directory is read, the size told first.

Without a network (or with HF_HUB_OFFLINE=1) it is what was downloaded before.
"""

import re
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

from huggingface_hub import DryRunFileInfo, snapshot_download
from huggingface_hub.errors import DryRunError, HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from prime.errors import InputError, tell

NAME = re.compile(r"\w[\w.-]*/[\w.-]+")
WANTED = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt")  # of a repository
DOUBLE = ("consolidated*", "original/*")  # the same weights in Meta's or Mistral's own format
WEIGHTS = ("*.safetensors", "*.index.json")


def local_dir(name: str, weights: bool = True) -> str:
    """A directory as it is; a name of the hub (`owner/model`) as the directory of its download.

    Args:
        weights: False: all but these; what tells a model's kind takes a few MB.

    Raises:
        InputError: it cannot be had from the hub.
    """
    return _download(name, weights) if is_hub_name(name) else name


def is_hub_name(name: str) -> bool:
    """Whether a name of a model is to be looked up on the hub."""
    return bool(NAME.fullmatch(name)) and not Path(name).exists()


@lru_cache
def _download(name: str, weights: bool) -> str:
    try:
        return _snapshot(name, [*DOUBLE, *(() if weights else WEIGHTS)], weights)
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(
            f"{name}: no directory, and it cannot be had from the Hugging Face hub ({reason}); "
            "download it elsewhere and give its directory"
        ) from None


def _snapshot(name: str, left_out: list[str], weights: bool) -> str:
    """The directory of the download, after its size was told; where there is no network, of what is there."""
    wanted = list(WANTED)
    with suppress(DryRunError):
        planned = _planned(name, wanted, left_out)
        if weights and not any(file.filename.endswith(".safetensors") for file in planned):
            wanted.append("*.bin")
            planned = _planned(name, wanted, left_out)
        size = sum(file.file_size or 0 for file in planned if file.will_download)
        if size:
            tell(f"{name}: {size / 2**30:.2f} GiB are downloaded from the Hugging Face hub")
    return str(snapshot_download(name, allow_patterns=wanted, ignore_patterns=left_out))


def _planned(name: str, wanted: list[str], left_out: list[str]) -> list[DryRunFileInfo]:
    return snapshot_download(name, allow_patterns=wanted, ignore_patterns=left_out, dry_run=True)
