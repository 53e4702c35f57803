"""Hugging Face directories as they come: sharded or not, safetensors or .bin; what is wrong with them is named."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from prime.checkpoints.loading import load_model
from prime.errors import InputError
from tests import tiny

BASE = tiny.model()
IDS = tiny.ids(2, 9)
QUERY, KEY = "model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.k_proj.weight"


def one_file(folder: Path) -> None:
    BASE.save_pretrained(folder)


def sharded(folder: Path) -> None:
    BASE.save_pretrained(folder, max_shard_size="60KB")


def as_bin(folder: Path) -> None:
    one_file(folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def as_bins(folder: Path) -> None:
    one_file(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: f"pytorch_model-0000{1 + (name > KEY)}-of-00002.bin" for name in tensors}
    for file in set(files.values()):
        torch.save({name: tensor for name, tensor in tensors.items() if files[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))


@pytest.mark.parametrize("save", [one_file, sharded, as_bin, as_bins])
def test_every_kind_of_file_loads(save: Callable[[Path], None], tmp_path: Path) -> None:
    save(tmp_path)
    assert torch.equal(tiny.logits(load_model(str(tmp_path), "cpu"), IDS), tiny.logits(BASE, IDS))


def refused(folder: Path, told: str) -> None:
    with pytest.raises(InputError, match=told) as error:
        load_model(str(folder), "cpu")
    assert str(folder) in str(error.value)


@pytest.mark.parametrize(
    ("save", "file"),
    [(sharded, "model-00002-of-00006.safetensors"), (as_bins, "pytorch_model-00002-of-00002.bin")],
)
def test_a_missing_or_truncated_shard(save: Callable[[Path], None], file: str, tmp_path: Path) -> None:
    save(tmp_path)
    whole = (tmp_path / file).read_bytes()
    (tmp_path / file).write_bytes(whole[:-200])
    refused(tmp_path, rf"{file}: cut short")
    (tmp_path / file).unlink()
    refused(tmp_path, rf"{file}: no such file; .*index.json names it for \d+ tensors, model.layers.0")


def test_a_shard_of_another_model(tmp_path: Path) -> None:
    sharded(tmp_path)
    save_file({"other": torch.zeros(2)}, tmp_path / "model-00003-of-00006.safetensors", metadata={"format": "pt"})
    refused(tmp_path, r"model-00003-of-00006.safetensors: lacks model.layers.* tensors that model.safetensors.index")


def test_a_tensor_of_another_shape_is_named_with_both(tmp_path: Path) -> None:
    one_file(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors") | {KEY: torch.zeros(32, 60)}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    refused(tmp_path, rf"model.safetensors: {KEY} is \(32, 60\), config.json makes it \(32, 64\)")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"vocab_size": 90}, r"model.embed_tokens.weight is \(97, 64\), config.json makes it \(90, 64\)"),
        ({"num_hidden_layers": 1}, r"model.layers.1.* is of a layer that config.json does not have"),
        ({"num_hidden_layers": 3}, r"the checkpoint lacks 9 tensors, model.layers.2"),
    ],
)
def test_a_configuration_of_another_model(change: dict, told: str, tmp_path: Path) -> None:
    one_file(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(tmp_path, told)


def test_no_weights_and_a_broken_index(tmp_path: Path) -> None:
    one_file(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    refused(tmp_path, "no weights there: neither model.safetensors nor pytorch_model.bin")
    for text, told in (("{", "not JSON"), ("[]", "no weight_map"), ('{"weight_map": {"a": 1}}', "no weight_map")):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        refused(tmp_path, "model.safetensors.index.json.*" + told)


class Evil:
    def __reduce__(self) -> tuple:
        return (pytest.fail, ("code of a checkpoint was run",))


def test_pickled_code_is_not_run(tmp_path: Path) -> None:
    as_bin(tmp_path)
    torch.save({QUERY: Evil()}, tmp_path / "pytorch_model.bin")
    refused(tmp_path, "pytorch_model.bin: cut short, or not a file of tensors")


# -- what lies beside -----------------------------------------------------------------------------------------------

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 13476939516\n"


def index_of_absent(folder: Path, name: str, file: str) -> None:
    """The index of files that were not downloaded."""
    (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(BASE.state_dict(), file)}))


def beside_an_index_of_bins(folder: Path) -> None:
    index_of_absent(folder, "pytorch_model.bin.index.json", "pytorch_model-00001-of-00002.bin")


def beside_an_index_of_another_library(folder: Path) -> None:
    index_of_absent(folder, "tf_model.h5.index.json", "tf_model-00001-of-00002.h5")


def beside_an_index_that_is_none(folder: Path) -> None:
    (folder / "flax_model.msgpack.index.json").write_text("[]")


def beside_what_was_not_downloaded(folder: Path) -> None:
    (folder / "pytorch_model.bin").write_text(POINTER)
    (folder / "scheduler.bin").symlink_to("/nonexistent/blob")


@pytest.mark.parametrize("save", [one_file, sharded])
@pytest.mark.parametrize("put", [beside_an_index_of_bins, beside_an_index_of_another_library,
                                 beside_an_index_that_is_none, beside_what_was_not_downloaded])  # fmt: skip
def test_only_what_is_read_is_checked(save: Callable, put: Callable, tmp_path: Path) -> None:
    save(tmp_path)
    put(tmp_path)
    assert torch.equal(tiny.logits(load_model(str(tmp_path), "cpu", "float32"), IDS), tiny.logits(BASE, IDS))


def test_an_index_beside_one_file_is_not_read(tmp_path: Path) -> None:
    one_file(tmp_path)
    index_of_absent(tmp_path, "model.safetensors.index.json", "model-00001-of-00002.safetensors")
    assert torch.equal(tiny.logits(load_model(str(tmp_path), "cpu", "float32"), IDS), tiny.logits(BASE, IDS))


@pytest.mark.parametrize("name", ["other.safetensors", "../other.safetensors", "/etc/other.safetensors", 3])
def test_weights_that_the_configuration_names(name: object, tmp_path: Path) -> None:
    """As transformers does, and inside the directory alone."""
    one_file(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    config = json.loads((tmp_path / "config.json").read_text()) | {"transformers_weights": name}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if name != "other.safetensors":
        refused(tmp_path, "config.json: transformers_weights is .* no file of this folder")
        return
    assert torch.equal(tiny.logits(load_model(str(tmp_path), "cpu", "float32"), IDS), tiny.logits(BASE, IDS))


@pytest.mark.parametrize("field", ["num_nextn_predict_layers", "num_mtp_modules"])
def test_layers_that_predict_further_tokens_are_left_out(field: str, tmp_path: Path) -> None:
    """DeepSeek's and GLM's last layer; as many as the configuration tells, and no more."""
    one_file(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors |= {name.replace("layers.1.", "layers.2."): tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    refused(tmp_path, r"model.layers.2.* is of a layer that config.json does not have")
    config = json.loads((tmp_path / "config.json").read_text()) | {field: 1}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(tiny.logits(load_model(str(tmp_path), "cpu", "float32"), IDS), tiny.logits(BASE, IDS))


@pytest.mark.parametrize("stem", ["mtp.layers.7", "vision_tower.encoder.layers.26", "model.mtp_layers.2"])
def test_layers_of_what_is_not_loaded_at_all(stem: str, tmp_path: Path) -> None:
    one_file(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {f"{stem}.weight": torch.zeros(3)}, tmp_path / "model.safetensors", {"format": "pt"})
    assert torch.equal(tiny.logits(load_model(str(tmp_path), "cpu", "float32"), IDS), tiny.logits(BASE, IDS))
