"""Meta-format checkpoints: logits against an independent Meta-style forward, ids against Meta's encoders, errors."""

import json
from pathlib import Path

import meta_world as meta
import pytest
import sentencepiece
import tiktoken
import tiny
import torch
from torch import Tensor, nn

from prime.bank.encoding import Encoder
from prime.checkpoints.loading import check_vocabulary, eos_ids, is_bare_tokenizer, load_model, load_tokenizer
from prime.checkpoints.meta import MetaCheckpoint, rope_rows
from prime.checkpoints.meta_conversion import kept_conversion as make_conversion
from prime.checkpoints.meta_params import is_meta_dir, llama_config, read_params
from prime.checkpoints.meta_tokenizer import LLAMA3_PATTERN, LLAMA3_SPECIALS, load_meta_tokenizer
from prime.errors import InputError

IDS = torch.randint(0, 400, (2, 300), generator=torch.Generator().manual_seed(0))  # long: slow rotary pairs count
# name -> (params, vocabulary, width of the feed-forward layer, options of meta.save, tied)
WITH_FACTOR = meta.LLAMA3 | {"rope_scaling_factor": 32}
CASES = {
    "llama2": (meta.LLAMA2, 400, meta.HIDDEN["llama2"], {}, False),
    "llama2, 2 shards": (meta.LLAMA2, 400, meta.HIDDEN["llama2"], {"shards": 2}, False),
    "llama3": (meta.LLAMA3 | {"vocab_size": 576}, 576, meta.HIDDEN["llama3"], {}, False),
    "llama3, 2 shards": (meta.LLAMA3, 576, meta.HIDDEN["llama3"], {"shards": 2, "by_rows": True}, False),
    "llama3.2, no output layer": (WITH_FACTOR, 576, meta.HIDDEN["llama3"], {}, True),
}  # fmt: skip


def make(folder: Path, case: str) -> tuple[dict, dict[str, Tensor]]:
    params, vocab, hidden, options, tied = CASES[case]
    whole = meta.weights(params, vocab, hidden, tied)
    meta.save(folder, params, whole, **options)
    (meta.save_tiktoken if "use_scaled_rope" in params else meta.save_sentencepiece)(folder)
    return params, whole


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict, dict[str, Tensor]]]:
    folders = {case: tmp_path_factory.mktemp("meta") for case in CASES}
    return {case: (folder, *make(folder, case)) for case, folder in folders.items()}


def kept_conversion(source: str, target: str, tokenizer: str | None = None) -> str:
    make_conversion(source, target, tokenizer)
    return target


def off(model: nn.Module, expected: Tensor) -> float:
    return float((tiny.logits(model, IDS) - expected).abs().max())


# -- weights --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_logits_in_memory_and_converted(made: dict, case: str, tmp_path: Path) -> None:
    folder, params, whole = made[case]
    expected = meta.forward(params, whole, IDS)
    assert expected.abs().max() > 1
    assert off(load_model(str(folder), "cpu"), expected) < 1e-5
    kept = kept_conversion(str(folder), str(tmp_path / "hf"))
    assert not is_meta_dir(kept) and off(load_model(kept, "cpu"), expected) < 1e-5
    tied = "output.weight" not in whole
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["tie_word_embeddings"] == tied


def test_the_test_sees_rotation_and_its_scaling(made: dict) -> None:
    """The tolerance above would not hold without the permuted rows, nor with another scale."""
    folder, params, whole = made["llama3"]
    model = load_model(str(folder), "cpu")
    assert off(model, meta.forward(params | {"use_scaled_rope": False}, whole, IDS)) > 1e-2
    assert off(model, meta.forward(params | {"rope_scaling_factor": 32}, whole, IDS)) > 1e-3
    query = model.get_submodule("model.layers.0.self_attn.q_proj")
    query.weight.data = whole["layers.0.attention.wq.weight"]
    assert off(model, meta.forward(params, whole, IDS)) > 1e-2


def test_an_output_layer_that_repeats_the_embeddings_is_tied(tmp_path: Path) -> None:
    whole = meta.weights(meta.LLAMA3, 576, 224, tied=True)
    whole["output.weight"] = whole["tok_embeddings.weight"].clone()
    meta.save(tmp_path, meta.LLAMA3, whole, shards=2, by_rows=True)
    model = load_model(str(tmp_path), "cpu")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert off(model, meta.forward(meta.LLAMA3, whole, IDS)) < 1e-5


def test_bf16_is_kept_on_disk_and_widened_on_a_cpu(tmp_path: Path) -> None:
    whole = {name: tensor.bfloat16() for name, tensor in meta.weights(meta.LLAMA2, 400, 192).items()}
    meta.save(tmp_path / "meta", meta.LLAMA2, whole)
    meta.save_sentencepiece(tmp_path / "meta")
    kept = kept_conversion(str(tmp_path / "meta"), str(tmp_path / "hf"))
    size = sum(path.stat().st_size for path in Path(kept).glob("*.safetensors"))
    assert size < 1.1 * 2 * sum(tensor.numel() for tensor in whole.values())
    expected = meta.forward(meta.LLAMA2, {name: tensor.float() for name, tensor in whole.items()}, IDS)
    assert off(load_model(kept, "cpu"), expected) < 1e-5
    assert {p.dtype for p in load_model(str(tmp_path / "meta"), "cpu", "bfloat16").parameters()} == {torch.bfloat16}


def test_large_checkpoints_become_several_files(made: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prime.checkpoints.meta_conversion.FILE_BYTES", 100_000)
    folder, params, whole = made["llama2, 2 shards"]
    kept = kept_conversion(str(folder), str(tmp_path / "hf"))
    files = sorted(Path(kept).glob("*.safetensors"))
    assert len(files) > 3 and all(file.stat().st_size < 110_000 for file in files)
    assert off(load_model(kept, "cpu"), meta.forward(params, whole, IDS)) < 1e-5


def test_rows_change_places_within_their_head() -> None:
    rows = torch.arange(12)[:, None].expand(12, 3)
    assert rope_rows(rows, 2)[:, 0].tolist() == [0, 2, 4, 1, 3, 5, 6, 8, 10, 7, 9, 11]


# params.json and the config.json of the same model, as Meta publishes both.
SHAPES = {
    "Llama-2-7b": ({"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-5, "vocab_size": -1},
                   {"intermediate_size": 11008, "num_key_value_heads": 32, "max_position_embeddings": 4096}, None),
    "Llama-3.1-8B": ({"dim": 4096, "ffn_dim_multiplier": 1.3, "multiple_of": 1024, "n_heads": 32, "n_kv_heads": 8,
                      "n_layers": 32, "norm_eps": 1e-5, "rope_theta": 500000.0, "use_scaled_rope": True},
                     {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072}, 8.0),
    "Llama-3.2-3B": ({"dim": 3072, "ffn_dim_multiplier": 1.0, "multiple_of": 256, "n_heads": 24, "n_kv_heads": 8,
                      "n_layers": 28, "norm_eps": 1e-5, "rope_theta": 500000.0, "use_scaled_rope": True},
                     {"intermediate_size": 8192, "num_key_value_heads": 8, "head_dim": 128}, 32.0),
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_published_shapes(name: str, tmp_path: Path) -> None:
    params, expected, factor = SHAPES[name]
    (tmp_path / "params.json").write_text(json.dumps(params))
    config = llama_config(read_params(tmp_path), 32000, tied=False)
    assert {key: getattr(config, key) for key in expected} == expected
    assert config.rope_parameters.get("factor") == factor


# -- tokenizers -----------------------------------------------------------------------------------------------------


def ids(tokenizer: object, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def both_ways(folder: Path, target: Path) -> list:
    """The tokenizer of a Meta directory, and of its conversion."""
    own = load_tokenizer(str(folder))
    own.save_pretrained(target)
    return [own, load_tokenizer(str(target))]


def test_ids_of_sentencepiece(made: dict, tmp_path: Path) -> None:
    folder = made["llama2"][0]
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for tokenizer in both_ways(folder, tmp_path):
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (oracle.bos_id(), oracle.eos_id())
        exceptions = [text for text in meta.strings() if ids(tokenizer, text) != oracle.encode(text)]
        assert exceptions == []
        for text in ("a robot", "naïve  tag", "日本 😀"):
            assert Encoder(tokenizer).text(oracle.encode(text)) == text


def test_ids_of_tiktoken(made: dict, tmp_path: Path) -> None:
    ranks = meta.save_tiktoken(tmp_path)
    oracle = tiktoken.Encoding("llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={})
    for tokenizer in both_ways(made["llama3"][0], tmp_path / "hf"):
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (len(ranks), len(ranks) + 1)
        assert len(tokenizer) == len(ranks) + LLAMA3_SPECIALS
        exceptions = [text for text in meta.strings() if ids(tokenizer, text) != oracle.encode(text)]
        assert exceptions == []
        for text in ("a robot", "naïve  tag", "日本 😀"):
            assert Encoder(tokenizer).text([*oracle.encode(text), tokenizer.eos_token_id]) == text


def test_bos_in_front_and_eos_behind(made: dict) -> None:
    for case, bos, eos in (("llama2", 1, 2), ("llama3", 320, 321)):
        tokenizer = load_tokenizer(str(made[case][0]))
        record = Encoder(tokenizer).record("r", "the movie", " tag")
        assert record.ids[0] == bos and record.target[-1] == eos
        assert [*record.ids[1:], *record.target[:-1]] == ids(tokenizer, "the movie tag")


def test_answers_end_where_llama_3_ends_a_turn(made: dict) -> None:
    model = tiny.model()
    model.generation_config.eos_token_id = None
    assert eos_ids(load_tokenizer(str(made["llama3"][0])), model) == [321, 328, 329]
    assert eos_ids(load_tokenizer(str(made["llama2"][0])), model) == [2]


def test_a_tokenizer_may_be_named_by_its_file(made: dict) -> None:
    folder = made["llama2"][0]
    assert is_bare_tokenizer(str(folder))
    assert ids(load_tokenizer(str(folder / "tokenizer.model")), "tag") == ids(load_tokenizer(str(folder)), "tag")


def test_another_kind_of_sentencepiece_model_is_refused(tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(meta.corpus()), model_prefix=str(tmp_path / "tokenizer"), model_type="unigram",
        vocab_size=300, byte_fallback=True, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    with pytest.raises(InputError, match="tokenizer.model: not a sentencepiece model like Llama's"):
        load_meta_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"", b"neither", b"IQ== 0\nIg== 2\n", b"IQ== 0\nIg=="])
def test_a_broken_tokenizer_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content)
    with pytest.raises(InputError, match="tokenizer.model"):
        load_meta_tokenizer(tmp_path)


# -- errors ---------------------------------------------------------------------------------------------------------


def broken(made: dict, case: str, tmp_path: Path) -> Path:
    tmp_path.mkdir(exist_ok=True)
    for path in made[case][0].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_embeddings_of_another_number_of_dimensions(made: dict, tmp_path: Path) -> None:
    file = broken(made, "llama2", tmp_path) / "consolidated.00.pth"
    tensors = torch.load(file, weights_only=True)
    for spoilt, shape in ((tensors["tok_embeddings.weight"][None], r"\(1, 400, 64\)"), (torch.zeros(0), r"\(0,\)")):
        torch.save(tensors | {"tok_embeddings.weight": spoilt.clone()}, file)
        with pytest.raises(InputError, match=f"00.pth: tok_embeddings.weight is {shape}, expected two dimensions"):
            MetaCheckpoint(file.parent)


def test_a_missing_shard(made: dict, tmp_path: Path) -> None:
    folder = broken(made, "llama2, 2 shards", tmp_path)
    (folder / "consolidated.01.pth").unlink()
    told = r"layers.0.attention.wq.weight is \(32, 64\), .* 1 shard make it \(64, 64\); with 2 shards"
    with pytest.raises(InputError, match="consolidated.00.pth: " + told):
        MetaCheckpoint(folder)
    (folder / "consolidated.00.pth").rename(folder / "consolidated.01.pth")
    with pytest.raises(InputError, match="consolidated.00.pth is missing, consolidated.01.pth is there"):
        MetaCheckpoint(folder)
    (folder / "consolidated.01.pth").unlink()
    with pytest.raises(InputError, match="the weights are missing"):
        MetaCheckpoint(folder)


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.999])
def test_a_truncated_shard(made: dict, tmp_path: Path, kept: float) -> None:
    file = broken(made, "llama2", tmp_path) / "consolidated.00.pth"
    file.write_bytes(file.read_bytes()[: int(kept * file.stat().st_size)])
    with pytest.raises(InputError, match="consolidated.00.pth: cut short, or not a file of tensors"):
        load_model(str(tmp_path), "cpu")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"dim": 32}, r"tok_embeddings.weight is \(400, 64\), .* make it \(400, 32\)"),
        ({"n_layers": 3}, r"lacks layers.2.attention.wq.weight \(64, 64\)"),
        ({"n_layers": 1}, "layers.1.attention.wk.weight is no tensor of a Llama"),
        ({"n_kv_heads": 2}, r"layers.0.attention.wk.weight is \(64, 64\), .* make it \(32, 64\)"),
        ({"multiple_of": 100}, r"layers.1.feed_forward.w2.weight is \(64, 192\), .* make it \(64, 200\)"),
        ({"vocab_size": 500}, r"tok_embeddings.weight is \(400, 64\), so 1 shards hold 400 tokens; .* vocab_size 500"),
        ({"n_heads": None}, "params.json: n_heads is None, expected a positive whole number"),
    ],
)  # fmt: skip
def test_params_of_another_model(made: dict, tmp_path: Path, change: dict, told: str) -> None:
    folder = broken(made, "llama2", tmp_path)
    (folder / "params.json").write_text(json.dumps(meta.LLAMA2 | change))
    with pytest.raises(InputError, match=told) as error:
        load_model(str(folder), "cpu")
    assert str(folder) in str(error.value)


def test_a_tokenizer_of_another_model(made: dict) -> None:
    model = load_model(str(made["llama2"][0]), "cpu")
    check_vocabulary(load_tokenizer(str(made["llama2"][0])), model, "here")
    large = load_tokenizer(str(Path(__file__).parent.parent / "data" / "demo" / "model"))
    with pytest.raises(InputError, match=r"there: the tokenizer has 1792 tokens, the model's embedding is \(400, 64\)"):
        check_vocabulary(large, model, "there")


def test_a_conversion_is_made_once_and_never_over_another_model(made: dict, tmp_path: Path) -> None:
    source, target = broken(made, "llama2", tmp_path / "meta"), tmp_path / "hf"
    kept = kept_conversion(str(source), str(target))
    before = {path: path.stat().st_mtime_ns for path in target.iterdir()}
    assert kept_conversion(str(source), str(target)) == kept
    assert {path: path.stat().st_mtime_ns for path in target.iterdir()} == before
    other = str(made["llama3"][0])
    with pytest.raises(InputError, match="holds another model than the conversion of"):
        kept_conversion(other, str(target))
    with pytest.raises(InputError, match=r"no Meta checkpoint .* for --convert_to"):
        kept_conversion(kept, str(tmp_path / "more"))


def test_pickled_code_is_not_run(made: dict, tmp_path: Path) -> None:
    folder = broken(made, "llama2", tmp_path)
    torch.save({"tok_embeddings.weight": Evil()}, folder / "consolidated.00.pth")
    with pytest.raises(InputError, match="consolidated.00.pth"):
        load_model(str(folder), "cpu")


class Evil:
    def __reduce__(self) -> tuple:
        return (pytest.fail, ("code of a checkpoint was run",))
