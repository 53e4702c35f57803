"""Models by their name on the hub: never downloaded here; the cache is laid out by hand, as the hub's client has it."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError

from prime.checkpoints import hub
from prime.checkpoints.identity import model_sources
from prime.checkpoints.loading import load_model, load_tokenizer
from prime.engine import load_engine
from prime.errors import InputError
from prime.settings import ModelSettings, PromptSettings
from tests import tiny

NAME, COMMIT = "owner/a-model", "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def forgotten() -> Iterator[None]:
    hub._download.cache_clear()
    yield
    hub._download.cache_clear()


@pytest.fixture
def cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model that was downloaded before, and no network."""
    folder = tmp_path / "hub" / "models--owner--a-model"
    tiny.model(vocab_size=400).save_pretrained(folder / "snapshots" / COMMIT)
    tiny.tokenizer().save_pretrained(folder / "snapshots" / COMMIT)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    download = hub.snapshot_download
    monkeypatch.setattr(hub, "snapshot_download", lambda *names, **options: download(
        *names, **options, cache_dir=tmp_path / "hub"))  # fmt: skip
    return folder


def test_a_name_works_where_a_directory_does(cached: Path) -> None:
    settings = ModelSettings(llama_model_path=NAME, device="cpu", dtype="float32")
    ids = tiny.ids(1, 9)
    wanted = tiny.logits(tiny.model(vocab_size=400), ids)
    assert torch.equal(tiny.logits(load_model(NAME, "cpu", "float32"), ids), wanted)
    assert load_tokenizer(NAME)("a robot")["input_ids"] == tiny.tokenizer()("a robot")["input_ids"]
    assert torch.equal(tiny.logits(load_engine(settings, PromptSettings(max_length=100)).bank.model, ids), wanted)
    assert model_sources(settings)["base model"].digest == COMMIT


def test_a_directory_is_itself_and_a_path_is_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "snapshot_download", lambda *_, **__: pytest.fail("the hub was asked"))
    monkeypatch.chdir(tmp_path)
    Path("owner/a-model").mkdir(parents=True)
    for name in (NAME, "./llama/Llama-2-7b", "../a/b", "llama", "/a/b", "a/b/c", "~/models"):
        assert hub.local_dir(name) == name
    with pytest.raises(InputError, match="no such model directory"):
        load_model("./not/there")


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_the_size_is_told_first(weights: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """`.bin` is downloaded where there is nothing else."""
    repository = {"config.json": 2**20, weights: 3 * 2**30, "original/consolidated.00.pth": 2**40}
    done: list[str] = []

    def download(name: str, allow_patterns: list, ignore_patterns: list, dry_run: bool = False) -> object:
        wanted = {file for file in repository if any(Path(file).match(one) for one in allow_patterns)}
        wanted -= {file for file in repository if any(Path(file).match(one) for one in ignore_patterns)}
        if dry_run:
            return [SimpleNamespace(filename=one, file_size=repository[one], will_download=True) for one in wanted]
        assert "GiB are downloaded" in capsys.readouterr().err
        done.extend(sorted(wanted))
        return "/there"

    monkeypatch.setattr(hub, "snapshot_download", download)
    assert hub.local_dir(NAME, weights=False) == "/there" and done == ["config.json"]
    assert hub.local_dir(NAME) == "/there" and done[1:] == ["config.json", weights]


def test_a_hub_that_cannot_be_reached_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise LocalEntryNotFoundError("no connection\nand a long story")

    monkeypatch.setattr(hub, "snapshot_download", unreachable)
    with pytest.raises(InputError, match=r"a/b: no directory, and .* hub \(no connection\); download it elsewhere"):
        load_model("a/b")
    assert "base model" not in model_sources(ModelSettings(llama_model_path="a/b", device="cpu"))


def test_an_incomplete_download_without_a_network_is_told(cached: Path) -> None:
    (cached / "snapshots" / COMMIT / "model.safetensors").unlink()
    with pytest.raises(InputError, match="no weights there|cannot be had"):
        load_model(NAME, "cpu", "float32")
    shutil.rmtree(cached)
    hub._download.cache_clear()
    with pytest.raises(InputError, match="owner/a-model: no directory, and it cannot be had"):
        load_model(NAME)
