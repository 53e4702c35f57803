"""What a model's rows may be: windows by any name, positions that end or shift, kinds of models that are refused, and a
self-check that tells the others. Oracles: one row at a time, without cache and mask; transformers' generate.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BertConfig,
    Gemma2Config,
    Gemma3Config,
    GPTJConfig,
    GPTNeoConfig,
    JambaConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlamaConfig,
    MambaConfig,
    MptConfig,
    OPTConfig,
    Phi3Config,
    Qwen3NextConfig,
)
from transformers.configuration_utils import PreTrainedConfig

from prime.bank.bank import AdapterBank
from prime.bank.batching import every_pair
from prime.bank.decode import Request, decode
from prime.bank.encoding import EncodedPrompt, EncodedRecord
from prime.bank.limits import lookback, positions
from prime.bank.logprobs import target_logprobs
from prime.bank.passes import TrainRow, row_losses
from prime.bank.sampling import Sampler
from prime.bank.selfcheck import check_rows
from prime.checkpoints.loading import load_model
from prime.checkpoints.memory import Work
from prime.checkpoints.plan import plan
from prime.engine import load_engine
from prime.errors import InputError
from prime.settings import ModelSettings, PromptSettings
from tests import tiny

WINDOW, LIMIT = 24, 6
SIZE = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
OUT = ("q_proj", "k_proj", "v_proj", "out_proj")
GPT_NEO = GPTNeoConfig(vocab_size=97, hidden_size=64, num_layers=2, num_heads=4, intermediate_size=96,
                       attention_types=[[["global", "local"], 1]], window_size=WINDOW,
                       max_position_embeddings=128)  # fmt: skip
LLAMA_4 = Llama4TextConfig(**SIZE, head_dim=16, intermediate_size_mlp=96, num_local_experts=2, num_experts_per_tok=1,
                           attention_chunk_size=WINDOW, no_rope_layers=[1, 0], max_position_embeddings=128)  # fmt: skip
GEMMA_2 = Gemma2Config(**SIZE, head_dim=16, sliding_window=WINDOW, query_pre_attn_scalar=16)
MPT = MptConfig(vocab_size=97, d_model=64, n_layers=2, n_heads=4, max_seq_len=128)
OPT = OPTConfig(vocab_size=97, hidden_size=64, ffn_dim=96, num_hidden_layers=2, num_attention_heads=4,
                max_position_embeddings=64, word_embed_proj_dim=64)  # fmt: skip
GPT_J = GPTJConfig(vocab_size=97, n_embd=64, n_layer=2, n_head=4, rotary_dim=8, n_positions=64)

FACTORS = {"short_factor": [1.0] * 8, "long_factor": [4.0] * 8}
DYNAMIC = LlamaConfig(**SIZE, max_position_embeddings=64, rope_parameters={"rope_type": "dynamic", "factor": 4.0,
                      "rope_theta": 10000.0})  # fmt: skip
LONGROPE = Phi3Config(**SIZE, max_position_embeddings=256, original_max_position_embeddings=64,
                      rope_parameters={"rope_type": "longrope", "rope_theta": 10000.0, **FACTORS})  # fmt: skip
YARN = LlamaConfig(**SIZE, max_position_embeddings=256, rope_parameters={"rope_type": "yarn", "factor": 4.0,
                   "rope_theta": 10000.0, "original_max_position_embeddings": 64})  # fmt: skip


def model_of(config: PreTrainedConfig) -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        parameter.data.mul_(4.0 if parameter.dim() == 2 else 1.0)
    return model


def prompts(*lengths: int) -> list[EncodedPrompt]:
    """Prompts of these lengths; the first three begin alike."""
    shared = tiny.text_ids(0, 18, 18)
    texts = [tiny.text_ids(9 + place, length - 1, length - 1) for place, length in enumerate(lengths)]
    for place, text in enumerate(texts[:3]):
        texts[place] = (shared + text)[: lengths[place]] if lengths[place] > len(shared) else text
    return [EncodedPrompt(f"prompt {place}", text) for place, text in enumerate(texts)]


def check_right(bank: AdapterBank, asked: Sequence[EncodedPrompt]) -> None:
    """Answers, with wrong drafts and without, and log-probabilities are those of rows alone."""
    alone = [tiny.naive_answer(bank.model, prompt.ids, LIMIT, lambda own, _: int(own.argmax())) for prompt in asked]
    assert len(set(alone)) > len(asked) // 2
    wrong = [[answer[:1] + tiny.text_ids(place, 4, 4)[1:]] for place, answer in enumerate(alone)]
    pairs = every_pair([-1], len(asked))
    for drafts in (None, wrong):
        found = decode(bank, Request(asked, pairs, Sampler(0.0), LIMIT, drafts), [])
        assert [found[pair] for pair in pairs] == alone
    records = [EncodedRecord(prompt.id, prompt.ids, answer[: 1 + 5 * (place % 2)])
               for place, (prompt, answer) in enumerate(zip(asked, alone, strict=True))]  # fmt: skip
    scores = target_logprobs(bank, records, pairs)
    rows = [TrainRow(0, -1, 0, 0, record) for record in records]
    losses = row_losses(bank, rows, 0.0)
    for place, record in enumerate(records):
        table = tiny.logits(bank.model, torch.tensor([record.ids + record.target[:-1]]))[0].log_softmax(-1)
        target = torch.tensor(record.target)
        expected = table[len(record.ids) - 1 :].gather(1, target[:, None])[:, 0]
        assert torch.allclose(scores[-1, place], expected, atol=1e-4)
        assert torch.allclose(losses[place], -expected.sum(), atol=1e-3)


# -- windows --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "targets"),
    [(GPT_NEO, OUT), (LLAMA_4, tiny.TARGETS), (GEMMA_2, tiny.TARGETS)],
    ids=["window_size", "attention_chunk_size", "sliding_window"],
)
def test_a_window_by_any_name_counts_no_padding(config: PreTrainedConfig, targets: Sequence[str]) -> None:
    assert lookback(config) == WINDOW
    check_right(AdapterBank(model_of(config), targets), prompts(21, 28, 42, 51, 3))


def test_what_is_no_window() -> None:
    assert lookback(LlamaConfig(**SIZE)) == math.inf
    unused = LlamaConfig(**SIZE, sliding_window=8, use_sliding_window=False, max_window_layers=3, window_pattern=6)
    assert lookback(unused) == math.inf


# -- positions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "targets"), [(DYNAMIC, tiny.TARGETS), (LONGROPE, ["qkv_proj"])], ids=["dynamic", "longrope"]
)
def test_rotary_positions_that_follow_the_longest_row(config: PreTrainedConfig, targets: Sequence[str]) -> None:
    """Right up to the length where they change; a short row beside a longer one would get other frequencies."""
    bank = AdapterBank(model_of(config), targets)
    longest = 64 - LIMIT + 1  # nothing follows an answer's last token
    check_right(bank, prompts(20, 30, longest, longest, 3))
    refuses(bank, longest + 1, "follow the longest row")


def test_static_scaling_has_no_end() -> None:
    assert not positions(YARN).hard
    check_right(AdapterBank(model_of(YARN)), prompts(20, 30, 70, 80, 3))


@pytest.mark.parametrize(("config", "targets"), [(OPT, OUT), (GPT_J, OUT)], ids=["opt", "gptj"])
def test_a_table_of_positions(config: PreTrainedConfig, targets: Sequence[str]) -> None:
    bank = AdapterBank(model_of(config), targets)
    longest = 64 - LIMIT + 1
    check_right(bank, prompts(20, 30, longest, longest, 3))
    refuses(bank, longest + 1, "the model has 64 positions")


def refuses(bank: AdapterBank, length: int, told: str) -> None:
    """Answering, scoring and training refuse a text of so many tokens before any pass, and name it."""
    (prompt,) = prompts(length)
    record = EncodedRecord(prompt.id, prompt.ids, tiny.text_ids(0, LIMIT - 1, LIMIT - 1))
    for call in (
        lambda: decode(bank, Request([prompt], [(-1, 0)], Sampler(0.0), LIMIT), []),
        lambda: target_logprobs(bank, [record], [(-1, 0)]),
        lambda: row_losses(bank, [TrainRow(0, -1, 0, 0, record)], 0.0),
    ):
        with pytest.raises(InputError, match=f"prompt 0: a prompt of {length} tokens.*{told}"):
            call()


def test_beyond_what_was_trained_is_told_once(capsys: pytest.CaptureFixture) -> None:
    bank = AdapterBank(tiny.model(max_position_embeddings=32))
    check_right(bank, prompts(20, 40, 50, 30, 3))
    assert capsys.readouterr().err.count("the model was trained on 32 positions") == 1


# -- refused when it is loaded --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "kind"),
    [
        (Lfm2Config(**SIZE, layer_types=["conv", "full_attention"]), "conv"),
        (Qwen3NextConfig(**SIZE), "linear_attention"),
        (MambaConfig(vocab_size=97, hidden_size=64, num_hidden_layers=2), "linear_attention"),
        (JambaConfig(**SIZE), "linear_attention"),
    ],
    ids=["lfm2", "qwen3_next", "mamba", "jamba"],
)  # fmt: skip
def test_states_that_are_not_keys_and_values(config: PreTrainedConfig, kind: str, tmp_path: Path) -> None:
    """Told from config.json: there are no weights here at all. `--plan` says the same."""
    config.architectures = None
    config.save_pretrained(tmp_path)
    for call in (
        lambda: load_model(str(tmp_path), "cpu", "float32"),
        lambda: plan(ModelSettings(llama_model_path=str(tmp_path), device="cpu"), []),
    ):
        with pytest.raises(InputError, match=f"{tmp_path}: a model of the kind {config.model_type}.*{kind}") as told:
            call()
        assert len(str(told.value).splitlines()) == 1


# -- the self-check -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_families_of_old_pass(family: str, dtype: torch.dtype, capsys: pytest.CaptureFixture) -> None:
    bank = AdapterBank(tiny.model(family).to(dtype))
    check_rows(bank, "here")
    assert bank.n == 0 and bank.lookback and not capsys.readouterr().err


def test_a_family_whose_attention_counts_columns_gets_batches_without_holes(capsys: pytest.CaptureFixture) -> None:
    """MPT's ALiBi; nothing in its configuration tells."""
    bank = AdapterBank(model_of(MPT), ["Wqkv"])
    with pytest.raises(AssertionError):
        check_right(bank, prompts(21, 28, 42, 51, 3))
    check_rows(bank, "some/model")
    assert "some/model: a model of the kind mpt" in capsys.readouterr().err
    check_right(bank, prompts(21, 28, 42, 51, 3))


@pytest.mark.parametrize(
    ("config", "targets"),
    [
        (BertConfig(**SIZE), ["query", "value"]),  # sees what follows
        (BartConfig(vocab_size=97, d_model=64, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=96),
         OUT),  # positions by column
    ],
    ids=["bert", "bart"],
)  # fmt: skip
def test_a_family_whose_rows_depend_on_others_is_refused(config: PreTrainedConfig, targets: Sequence[str]) -> None:
    bank = AdapterBank(model_of(config), targets)
    with pytest.raises(InputError, match=f"some/model: a model of the kind {config.model_type} .*its logits depend"):
        check_rows(bank, "some/model")
    assert bank.n == 0


def test_a_layer_that_mixes_rows_is_refused() -> None:
    """An invented family: attention is right, and every row gets a little of the batch's mean."""
    model = tiny.model()
    model.model.norm.register_forward_hook(lambda _, __, out: out + 0.1 * out.mean(0, keepdim=True))
    with pytest.raises(InputError, match="its logits depend on the other rows"):
        check_rows(AdapterBank(model), "here")


def test_a_cache_that_a_family_does_not_take_is_told_in_one_line() -> None:
    model = tiny.model()
    model.model.layers[0].register_forward_pre_hook(
        lambda _, __, options: options["past_key_values"].crop(3) if options.get("past_key_values") else None,
        with_kwargs=True,
    )
    with pytest.raises(InputError, match=r"here: .* its layers fail on batches with a shared cache \(\w+:") as told:
        check_rows(AdapterBank(model), "here")
    assert len(str(told.value).splitlines()) == 1


# -- numbers that are none ------------------------------------------------------------------------------------------


def overflowing() -> torch.nn.Module:
    """In float16, as Gemma 2 and 3 do."""
    model = tiny.model("gemma")
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data *= 3e5
    return model.to(torch.float16)


@pytest.mark.parametrize("sampler", [Sampler(0.0), Sampler(0.1, 0.9)], ids=["greedy", "sampled"])
def test_logits_that_are_not_finite_answer_nothing(sampler: Sampler) -> None:
    bank, asked = AdapterBank(overflowing()), prompts(5, 9)
    with pytest.raises(InputError, match="prompt [01]: the model's logits are not finite; .*--dtype bfloat16"):
        decode(bank, Request(asked, every_pair([-1], 2), sampler, 4), [])
    with pytest.raises(InputError, match="record: the model's logits are not finite"):
        target_logprobs(bank, [EncodedRecord("record", asked[0].ids, (5, 6, 2))], [(-1, 0)])
    with pytest.raises(InputError, match="here: .*its logits are not finite in float16"):
        check_rows(bank, "here")


def test_an_adapter_that_is_not_finite_answers_nothing() -> None:
    bank, asked = AdapterBank(tiny.model()), prompts(5, 9)
    broken = tiny.adapter(tiny.model(), 1)
    next(iter(broken.factors.values()))[1][0, 0] = math.inf
    bank.load([broken])
    with pytest.raises(InputError, match="prompt 1: the model's logits are not finite; are all weights"):
        decode(bank, Request(asked, [(0, 1)], Sampler(0.0), 4), [])


# -- the engine -----------------------------------------------------------------------------------------------------


def saved(config: PreTrainedConfig, folder: Path) -> ModelSettings:
    """Settings of a model of this configuration, with the tiny tokenizer beside it."""
    config.vocab_size = 400
    model_of(config).save_pretrained(folder)
    tiny.tokenizer().save_pretrained(folder)
    return ModelSettings(llama_model_path=str(folder), device="cpu", dtype="float32")


def test_positions_are_counted_before_weights_are_read(tmp_path: Path) -> None:
    settings = saved(copy.deepcopy(GPT_NEO), tmp_path)
    settings = replace(settings, target_modules="q_proj,v_proj")
    assert load_engine(settings, PromptSettings(max_length=100), answer=28).bank.positions.most == 128
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match=f"{tmp_path}: the model has 128 positions; --max_length and .* 129 together"):
        load_engine(settings, PromptSettings(max_length=100), answer=29)


def test_a_model_that_reads_images_too_answers_texts(tmp_path: Path) -> None:
    """Sizes are those of its text part, and so are the modules with adapters: its image part has a q_proj, too."""
    seeing = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 28, "patch_size": 14}  # fmt: skip
    text = {**SIZE, "vocab_size": 400, "head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 16}
    config = Gemma3Config(text_config=text, vision_config=seeing, image_token_index=399, boi_token_index=398,
                          eoi_token_index=397, mm_tokens_per_image=4)  # fmt: skip
    model_of(config).save_pretrained(tmp_path)
    tiny.tokenizer().save_pretrained(tmp_path)
    model = ModelSettings(llama_model_path=str(tmp_path), device="cpu", dtype="float32")
    engine = load_engine(model, PromptSettings(max_length=100), 20)
    assert type(engine.bank.model).__name__ == "Gemma3ForConditionalGeneration"
    assert len(engine.bank.wrappers) == 8 and all(".language_model." in name for name in engine.bank.wrappers)
    assert engine.bank.lookback == WINDOW
    check_right(engine.bank, prompts(21, 28, 42, 51, 3))
    assert plan(ModelSettings(llama_model_path=str(tmp_path), device="cpu"), [Work("answering", 1, 8, 50, 5)]).peak > 0
