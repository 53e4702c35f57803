"""Loading, folding the task adapter (PEFT's merge_and_unload is the oracle), and texts as ids."""

import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from prime.bank.encoding import Encoder
from prime.bank.lora import Adapter
from prime.checkpoints.loading import (
    check_model_dir,
    eos_ids,
    fold,
    load_model,
    load_tokenizer,
    pick_device,
    pick_dtype,
)
from prime.checkpoints.peft import save_adapter
from prime.errors import InputError
from tests import tiny

BASE = tiny.model()
ADAPTER = tiny.adapter(BASE, 0, scale=1.5)
IDS = tiny.ids(2, 9)
TOKENIZER, WITHOUT_BOS = tiny.tokenizer(), tiny.tokenizer(bos=False)
BOS, EOS = TOKENIZER.bos_token_id, TOKENIZER.eos_token_id


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    BASE.save_pretrained(path)
    TOKENIZER.save_pretrained(path)
    return path


# -- models ---------------------------------------------------------------------------------------------------------


def test_the_untouched_model(saved: Path) -> None:
    model = load_model(str(saved), "cpu", "auto")
    assert torch.equal(tiny.logits(model, IDS), tiny.logits(BASE, IDS))
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_folding_is_merge_and_unload(saved: Path, tmp_path: Path) -> None:
    save_adapter(ADAPTER, tmp_path, str(saved))
    model = load_model(str(saved), "cpu", "auto", str(tmp_path / "lora_ckpt.pt"))
    merged = tiny.peft_model(BASE, ADAPTER).merge_and_unload().eval()
    found = tiny.logits(model, IDS)
    assert torch.allclose(found, tiny.logits(merged, IDS), atol=1e-5)
    assert (found - tiny.logits(BASE, IDS)).abs().max() > 0.1
    for name, weight in merged.state_dict().items():
        assert torch.allclose(model.state_dict()[name], weight, atol=1e-6), name


def test_folding_into_bf16_rounds_once() -> None:
    model = tiny.model().to(torch.bfloat16)
    name, update = next(iter(tiny.dense_updates(ADAPTER).items()))
    expected = (model.get_submodule(name).weight.data.double() + update).float().to(torch.bfloat16)
    fold(model, ADAPTER, "here")
    weight = model.get_submodule(name).weight
    assert weight.dtype == torch.bfloat16
    off = (weight != expected).float().mean()
    assert off < 0.001  # fp32 sums that fall on the other side of a tie


def test_an_adapter_that_does_not_fit_is_named() -> None:
    name, (a, b) = next(iter(ADAPTER.factors.items()))
    with pytest.raises(InputError, match=rf"task: {name}: the adapter's update is \(64, 63\), .*\(64, 64\)"):
        fold(tiny.model(), Adapter({name: (a[:, 1:], b)}), "task")
    with pytest.raises(InputError, match="task: the model has no module model.layers.9.self_attn.q_proj"):
        fold(tiny.model(), Adapter({"model.layers.9.self_attn.q_proj": (a, b)}), "task")


def test_device_and_dtype() -> None:
    cpu = torch.device("cpu")
    assert pick_device("cpu") == cpu
    assert pick_dtype("auto", cpu) == torch.float32
    assert pick_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert pick_dtype("float16", cpu) == torch.float16


def test_bf16_loading(saved: Path) -> None:
    assert {p.dtype for p in load_model(str(saved), "cpu", "bfloat16").parameters()} == {torch.bfloat16}


def damaged(saved: Path, tmp_path: Path, **files: str) -> str:
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    for name, text in files.items():
        (tmp_path / name.replace("__", ".")).write_text(text)
    return str(tmp_path)


def test_no_model_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere: no such model directory"):
        load_model(str(tmp_path / "nowhere"), "cpu")
    with pytest.raises(InputError, match="no config.json there"):
        check_model_dir(str(tmp_path))


@pytest.mark.parametrize(
    "files",
    [
        {"config__json": "{"},
        {"config__json": '{"model_type": "no such type"}'},
        {"config__json": '{"model_type": "bert"}', "model__safetensors": "x"},
        {"model__safetensors": "these are no tensors"},
        {"config__json": '{"auto_map": {"AutoModelForCausalLM": "evil.M"}, "model_type": "evil"}', "evil__py": "1/0"},
    ],
)
def test_a_broken_model_is_one_clear_error(saved: Path, tmp_path: Path, files: dict[str, str]) -> None:
    path = damaged(saved, tmp_path, **files)
    with pytest.raises(InputError) as error:
        load_model(path, "cpu")
    assert path in str(error.value)


def test_a_checkpoint_that_lacks_weights_is_refused(saved: Path, tmp_path: Path) -> None:
    """transformers would fill the gap with random numbers: another model at every load."""
    path = damaged(saved, tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match="model.layers.1.self_attn.q_proj.weight"):
        load_model(path, "cpu")


def test_tokenizers(saved: Path, tmp_path: Path) -> None:
    text = "which tag fits the movie?"
    assert load_tokenizer(str(saved))(text)["input_ids"] == TOKENIZER(text)["input_ids"]
    with pytest.raises(InputError, match="no such tokenizer directory"):
        load_tokenizer(str(tmp_path / "nowhere"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="empty: cannot be loaded as a tokenizer"):
        load_tokenizer(str(tmp_path / "empty"))
    broken = tiny.tokenizer()
    broken.eos_token = None
    broken.save_pretrained(tmp_path / "endless")
    with pytest.raises(InputError, match="no end-of-sequence token"):
        load_tokenizer(str(tmp_path / "endless"))


def test_eos_of_tokenizer_and_model() -> None:
    model = tiny.model()
    for listed, expected in ((None, [EOS]), (7, [EOS, 7]), ([7, EOS, 9], [EOS, 7, 9])):
        model.generation_config.eos_token_id = listed
        assert eos_ids(TOKENIZER, model) == expected
    for listed in ("abc", 1.5, [1, "x"], {"a": 1}, [[1]], True, -3, 10**400):
        model.generation_config.eos_token_id = listed
        with pytest.raises(InputError, match="generation_config.json: eos_token_id is .*, expected ids of tokens"):
            eos_ids(TOKENIZER, model)


# -- texts ----------------------------------------------------------------------------------------------------------

TEXTS = st.one_of(
    st.text(max_size=25),
    st.sampled_from(tiny.SENTENCES).flatmap(lambda s: st.integers(0, len(s)).map(lambda i: s[:i])),
)
TARGETS = st.one_of(st.text(min_size=1, max_size=12), st.sampled_from([" science fiction", "ence", " romance", "n"]))


def plain(tokenizer: object, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@given(TEXTS, TARGETS, st.sampled_from([TOKENIZER, WITHOUT_BOS]))
@settings(max_examples=150)
def test_a_record_is_the_whole_text_parted(text: str, target: str, tokenizer: object) -> None:
    record = Encoder(tokenizer).record("r", text, target)
    whole, prompt = plain(tokenizer, text + target), plain(tokenizer, text)
    bos = [BOS] if tokenizer is TOKENIZER else []
    assert [*record.ids, *record.target] == [*bos, *whole, EOS]
    own = list(record.ids[len(bos) :])
    assert own == prompt[: len(own)]  # the prompt as it is at test time, but for a token over the border
    assert len(own) == len(prompt) or prompt[len(own)] != whole[len(own)]
    assert record.target[-1] == EOS and record.id == "r"


def test_a_token_over_the_border_belongs_to_the_target() -> None:
    text, target = "the sci", "ence of a quiet film"
    whole, prompt = plain(TOKENIZER, text + target), plain(TOKENIZER, text)
    assert whole[: len(prompt)] != prompt  # the case exists
    record = Encoder(TOKENIZER).record("r", text, target)
    assert "".join(TOKENIZER.decode(list(record.target[:-1]))).endswith(target)
    assert len(record.ids) < 1 + len(prompt)


@given(TEXTS, st.integers(4, 20))
@settings(max_examples=60)
def test_long_prompts_keep_bos_and_the_tail(text: str, room: int) -> None:
    whole = plain(TOKENIZER, text)
    prompt = Encoder(TOKENIZER, room).prompt("p", text)
    kept = min(len(whole), room - 1)
    assert prompt.id == "p" and list(prompt.ids) == [BOS, *whole[len(whole) - kept :]]


@given(TEXTS, TARGETS, st.integers(4, 20), st.sampled_from([TOKENIZER, WITHOUT_BOS]))
@settings(max_examples=100)
def test_long_records_are_cut_at_the_prompts_left(text: str, target: str, room: int, tokenizer: object) -> None:
    full, cut = Encoder(tokenizer).record("r", text, target), Encoder(tokenizer, room).record("r", text, target)
    n = len(full.ids) + len(full.target)
    assert len(cut.ids) + len(cut.target) == min(n, room) or len(full.target) > room - 3
    assert len(cut.ids) + len(cut.target) <= room
    bos = 1 if tokenizer is TOKENIZER else 0
    assert cut.ids[:bos] == full.ids[:bos]
    tail = cut.ids[bos:]
    assert tail == full.ids[len(full.ids) - len(tail) :]
    assert cut.target[-1] == EOS and cut.target[:-1] == full.target[: len(cut.target) - 1]
    if cut.target != full.target:  # only a target that leaves the prompt no room is cut, and then as little as can be
        assert len(tail) <= 1 and len(cut.target) >= room - bos - 1


def test_a_token_without_an_embedding_is_named() -> None:
    """A text may hold the name of an added token; that of a special one is text."""
    tokenizer = tiny.tokenizer()
    rows = len(tokenizer)
    tokenizer.add_tokens(["[TOOL]"])
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    encoder = Encoder(tokenizer, embeddings=rows)
    assert encoder.prompt("p", "a quiet film").ids == Encoder(tiny.tokenizer()).prompt("p", "a quiet film").ids
    told = rf"'\[TOOL\]' as id {rows}, the model's embedding has {rows} rows.*a \[TOOL\]"
    with pytest.raises(InputError, match=told):
        encoder.record("r", "a [TOOL] b", " c")
    assert max(encoder.record("r", "a [PAD] b", " c").ids) < rows


def test_answers_come_back_as_text() -> None:
    encoder = Encoder(TOKENIZER)
    ids = plain(TOKENIZER, " science fiction ")
    assert encoder.text([*ids, EOS]) == "science fiction"
    assert encoder.text([]) == ""


def test_label_tokens_leave_room_for_one_more() -> None:
    labels = ["romance", "a", "social commentary and much more"]
    longest = max(len(plain(TOKENIZER, " " + label)) for label in labels)
    assert Encoder(TOKENIZER).label_tokens(labels) == longest + 1


def test_a_bare_sentencepiece_model_gives_the_same_ids(tmp_path: Path) -> None:
    """Llama-2's download holds no tokenizer.json; transformers then needs protobuf to read tokenizer.model."""
    source = Path(__file__).resolve().parent.parent / "data" / "demo" / "model"
    for name in ("tokenizer.model", "tokenizer_config.json", "config.json"):
        shutil.copy(source / name, tmp_path)
    bare, whole = load_tokenizer(str(tmp_path)), load_tokenizer(str(source))
    for text in ("Movie: a heist in Corley. Tag:", "breaking: 42 trams, at last!", "naïve café"):
        assert bare(text)["input_ids"] == whole(text)["input_ids"]
