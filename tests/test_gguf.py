"""GGUF files: read as the model they were written from, converted once, kept beside the file, made anew with it."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from tokenizers import pre_tokenizers
from torch import nn

from prime.checkpoints.gguf import PACKAGE, SOURCE, gguf_file, model_directory
from prime.checkpoints.loading import load_model, load_tokenizer
from prime.errors import InputError
from tests import tiny, world

HEADS = {"attn_q": 4, "attn_k": 2}
NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
         "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q",
         "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
         "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}  # fmt: skip


def gguf_name(name: str) -> str:
    """`model.layers.0.self_attn.q_proj.weight` -> `blk.0.attn_q.weight`"""
    stem = name.removesuffix(".weight")
    if not stem.startswith("model.layers."):
        return f"{NAMES[stem]}.weight"
    number, _, inner = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{number}.{NAMES[inner]}.weight"


def rotated(name: str, weight: np.ndarray) -> np.ndarray:
    """Query and key rows as llama.cpp orders them: the halves of a head interleaved."""
    heads = next((count for part, count in HEADS.items() if part in name), 0)
    if not heads:
        return weight
    return weight.reshape(heads, 2, len(weight) // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write_gguf(path: Path, model: nn.Module, kind: gguf.GGMLQuantizationType, split: str = "gpt-2") -> Path:
    """A Llama and the tests' tokenizer, as llama.cpp's converter lays them out."""
    writer = gguf.GGUFWriter(path, "llama")
    config = model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    inner = json.loads(tiny.tokenizer()._tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(split)
    writer.add_token_list(sorted(inner["vocab"], key=inner["vocab"].get))
    writer.add_token_types([1] * len(inner["vocab"]))
    writer.add_token_merges([" ".join(pair) for pair in inner["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(0)
    for name, tensor in model.state_dict().items():
        weight = rotated(gguf_name(name), tensor.float().numpy())
        packed = weight if weight.ndim == 1 else gguf.quantize(weight, kind)
        writer.add_tensor(gguf_name(name), packed, raw_dtype=None if weight.ndim == 1 else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.f32.gguf", source(), gguf.GGMLQuantizationType.F32)


def source() -> nn.Module:
    vocabulary = len(tiny.tokenizer())
    return tiny.model(vocab_size=vocabulary, num_hidden_layers=1, tie_word_embeddings=False)


def test_the_model_and_the_tokenizer_are_those_that_were_written(made: Path) -> None:
    folder = model_directory(str(made))
    ids = tiny.ids(2, 20)
    assert Path(folder) == made.with_suffix(".hf")
    assert torch.equal(tiny.logits(load_model(folder, "cpu", "float32"), ids), tiny.logits(source(), ids))
    read, written = load_tokenizer(folder), tiny.tokenizer()._tokenizer
    written.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # GPT-2's, as the file says
    for text in ("which tag fits the movie?", "naïve  words"):
        assert read(text, add_special_tokens=False)["input_ids"] == written.encode(text, add_special_tokens=False).ids
    assert read.eos_token_id == 2


@pytest.mark.parametrize(("split", "parts"), [("smollm", ["in", "Ġ", "2", "4"]), ("another", ["in", "Ġ24"])])
def test_digits_are_parted_as_the_file_says_or_it_is_told(
    tmp_path: Path, split: str, parts: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_gguf(tmp_path / "m.gguf", source(), gguf.GGMLQuantizationType.F32, split)
    tokenizer = load_tokenizer(model_directory(str(file)))
    assert [part for part, _ in tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str("in 24")] == parts
    assert ("is read as GPT-2's" in capsys.readouterr().err) == (split == "another")


def test_it_is_converted_once_and_a_folder_with_one_is_that_file(made: Path) -> None:
    folder = Path(model_directory(str(made)))
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert model_directory(str(made.parent)) == str(folder) and model_directory(str(folder)) == str(folder)
    assert (folder / "model.safetensors").stat().st_mtime_ns == before
    assert {path.name for path in made.parent.iterdir()} == {made.name, folder.name}


def test_a_changed_file_is_converted_anew_and_a_packed_one_is_kept_in_bfloat16(tmp_path: Path) -> None:
    kind = gguf.GGMLQuantizationType.Q8_0
    file = write_gguf(tmp_path / "m.gguf", source(), kind)
    folder = Path(model_directory(str(file)))
    before = json.loads((folder / SOURCE).read_text())["digest"]
    weight = source().state_dict()["model.layers.0.mlp.up_proj.weight"].numpy()
    unpacked = torch.from_numpy(gguf.dequantize(gguf.quantize(weight, kind), kind)).bfloat16()
    loaded = load_model(str(folder), "cpu", "bfloat16").get_submodule("model.layers.0.mlp.up_proj").weight
    assert loaded.dtype == torch.bfloat16 and torch.equal(loaded, unpacked)
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    write_gguf(file, tiny.model(seed=1, vocab_size=len(tiny.tokenizer()), num_hidden_layers=1), kind)
    model_directory(str(file))
    assert json.loads((folder / SOURCE).read_text())["digest"] != before


def test_a_conversion_that_is_cut_short_leaves_nothing_that_is_believed(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(made.read_bytes())

    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("prime.checkpoints.gguf._unmark", stopped)
    with pytest.raises(KeyboardInterrupt):
        model_directory(str(file))
    assert {path.name for path in tmp_path.iterdir()} == {"m.gguf"}
    monkeypatch.undo()
    (tmp_path / ".m.hf.making").mkdir()  # of a process that was killed
    assert (Path(model_directory(str(file))) / "config.json").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"m.gguf", "m.hf"}


def test_a_stage_gets_the_directory(made: Path) -> None:
    words = ["--task_name", "movie_tagging", "--llama_model_path", str(made)]
    settings = world.settings(["task_lora.py", *words])
    assert settings.model.llama_model_path == settings.model.base == str(made.with_suffix(".hf"))
    chosen = world.settings(["history_anchor.py", "--task_name", "movie_tagging", "--encoder", str(made)])
    assert chosen.encoder == str(made.with_suffix(".hf"))


def test_what_is_no_such_file_is_one_line(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"something else")
    (tmp_path / "c.gguf").write_bytes(made.read_bytes()[:3000])
    (tmp_path / "a.hf").mkdir()
    for path, told in (
        (tmp_path, "holds 3 GGUF files; name one of them"),
        (tmp_path / "a.gguf", "a.hf: there already, and no conversion of a.gguf"),
        (tmp_path / "b.gguf", "b.gguf: not a GGUF file"),
        (tmp_path / "c.gguf", "c.gguf: cannot be read as a causal language model: "),
    ):
        with pytest.raises(InputError) as error:
            model_directory(str(path))
        assert told in str(error.value) and "\n" not in str(error.value)
    monkeypatch.setattr("prime.checkpoints.gguf.find_spec", lambda name: None)
    (tmp_path / "d.gguf").write_bytes(made.read_bytes())
    with pytest.raises(InputError, match=f"pip install {PACKAGE}$"):
        model_directory(str(tmp_path / "d.gguf"))
    assert PACKAGE in (world.ROOT / "requirements-dev.txt").read_text()


def test_other_models_are_left_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    for path in (str(tmp_path), "owner/model", str(tmp_path / "nothing.gguf")):
        assert gguf_file(Path(path)) is None and model_directory(path) == path
