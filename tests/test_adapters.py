"""Adapters as PEFT itself writes them: PEFT's logits, or refused by the name of what is more than plain LoRA."""

import json
import warnings
from pathlib import Path

import pytest
import tiny
import torch
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.config import KasaConfig, MontecloraConfig, VeloraConfig
from safetensors.torch import load_file, save_file

from prime.bank.bank import AdapterBank
from prime.bank.lora import Adapter, merge
from prime.checkpoints.adapter_config import HARMLESS, HARMLESS_VALUES, READ
from prime.checkpoints.loading import fold
from prime.checkpoints.peft import load_adapter, save_adapter
from prime.errors import InputError

IDS = tiny.ids(2, 12)
QKVO, MLP = list(tiny.TARGETS), ["gate_proj", "up_proj", "down_proj"]
Q0 = "model.layers.0.self_attn.q_proj"

# What LoraConfig is given beside r=4, lora_alpha=6 and q, k, v, o; and the key that it is refused by ("": it is read).
SOUND: dict[str, dict] = {
    "plain": {},
    "a rank for a name": {"rank_pattern": {"q_proj": 2, "v_proj": 8}},
    "an alpha for a name": {"alpha_pattern": {"k_proj": 32}},
    "both, for one module": {"rank_pattern": {Q0: 8}, "alpha_pattern": {Q0: 3}},
    "rsLoRA and patterns": {"use_rslora": True, "rank_pattern": {"o_proj": 9}, "alpha_pattern": {"attn.v_proj": 5,
                            "self_attn.v_proj": 2}},
    "an anchored pattern": {"alpha_pattern": {f"^{Q0}": 24, "^q_proj": 99, "proj": 77}},
    "the first of two patterns": {"alpha_pattern": {"layers.1.self_attn.q_proj": 2, "q_proj": 30}},
    "modules of another kind": {"target_modules": MLP},
    "all linear modules": {"target_modules": "all-linear"},
    "two kinds of modules": {"target_modules": ["q_proj", "down_proj"]},
    "one layer": {"layers_to_transform": [1]},
    "a regular expression of targets": {"target_modules": r".*layers\.0\..*(q|v)_proj"},
    "modules left out": {"exclude_modules": ["o_proj"]},
    "one module": {"target_modules": [Q0]},
    "rank 1": {"r": 1, "lora_alpha": 1},
    "a rank above the width": {"r": 80},
    "rsLoRA": {"use_rslora": True},
    "a large alpha": {"lora_alpha": 25},
    "dropout": {"lora_dropout": 0.3},
    "gaussian": {"init_lora_weights": "gaussian"},
    "no initialisation": {"init_lora_weights": False},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "EVA": {"init_lora_weights": "eva", "eva_config": EvaConfig(rho=2.0)},
    "a causal LM's task": {"task_type": "CAUSAL_LM"},
    "fan in, fan out": {"fan_in_fan_out": True},
    "a revision": {"revision": "main", "inference_mode": True},
}
REFUSED: dict[str, tuple[dict, str]] = {
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    "fast PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights"),
    "OLoRA": ({"init_lora_weights": "olora"}, "init_lora_weights"),
    "MiCA": ({"init_lora_weights": "mica"}, "init_lora_weights"),
    "DoRA": ({"use_dora": True}, "use_dora"),
    "KaSA": ({"kasa_config": KasaConfig()}, "kasa_config"),
    "MonteCLoRA": ({"monteclora_config": MontecloraConfig()}, "monteclora_config"),
    "VeLoRA": ({"velora_config": VeloraConfig()}, "velora_config"),
    "activated LoRA": ({"alora_invocation_tokens": [5, 6], "task_type": "CAUSAL_LM"}, "alora_invocation_tokens"),
    "layer replication": ({"layer_replication": [[0, 2], [0, 2]]}, "layer_replication"),
    "biases": ({"bias": "all"}, "bias"),
    "a bias of B": ({"lora_bias": True}, "lora_bias"),
    "a saved head": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "trained tokens": ({"trainable_token_indices": [3, 4]}, "trainable_token_indices"),
    "a pattern with a group": ({"alpha_pattern": {r"layers\.(0|1)\..*q_proj": 2}}, "alpha_pattern"),
    "another task": ({"task_type": "FEATURE_EXTRACTION"}, "task_type"),
}
FAST = {"rsLoRA and patterns", "an anchored pattern", "two kinds of modules", "one layer", "PiSSA", "activated LoRA",
        "layer replication"}  # fmt: skip


def cases(names: dict) -> list:
    return [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in names]


def written(folder: Path, **given: object) -> Path:
    """An adapter with numbers in all it trains, as PEFT saves it."""
    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = get_peft_model(tiny.model(), LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": QKVO} | given))
        for name, parameter in model.named_parameters():
            if ".lora_A." in name or ".lora_B." in name:
                parameter.data.normal_(0, 0.1)
        model.save_pretrained(folder)
    return folder


def by_peft(*folders: Path) -> torch.Tensor:
    """Logits of PEFT's own model of these adapters, read from their files; several are its exact sum, `cat`."""
    model = PeftModel.from_pretrained(tiny.model(), folders[0], adapter_name="0")
    for number, folder in enumerate(folders[1:], start=1):
        model.load_adapter(folder, str(number))
    if len(folders) > 1:
        model.add_weighted_adapter([str(i) for i in range(len(folders))], [0.7, -0.4], "sum", combination_type="cat")
        model.set_adapter("sum")
    return tiny.logits(model.eval(), IDS)


def ours(*adapters: Adapter) -> torch.Tensor:
    """Logits of each adapter in one bank, `[n, 2, t, v]`."""
    bank = AdapterBank(tiny.model(), [*QKVO, *MLP])
    bank.load(adapters)
    found = []
    for place in range(len(adapters)):
        with bank.routed([place] * len(IDS)):
            found.append(tiny.logits(bank.model, IDS))
    return torch.stack(found)


@pytest.mark.parametrize("name", cases(SOUND))
def test_a_configuration_of_peft_means_the_same_here(name: str, tmp_path: Path) -> None:
    expected, adapter = by_peft(written(tmp_path, **SOUND[name])), load_adapter(tmp_path)
    assert (expected - tiny.logits(tiny.model(), IDS)).abs().max() > 0.01
    assert (ours(adapter)[0] - expected).abs().max() < 1e-5
    folded = tiny.model()
    fold(folded, adapter, "task")
    assert (tiny.logits(folded, IDS) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("name", cases(REFUSED))
def test_a_configuration_beyond_plain_lora_is_refused_by_name(name: str, tmp_path: Path) -> None:
    given, key = REFUSED[name]
    written(tmp_path, **given)
    with pytest.raises(InputError, match=f"adapter_config.json: {key}( is set|:)"):
        load_adapter(tmp_path)


def test_what_comes_next_is_refused_once_it_is_set(tmp_path: Path) -> None:
    """Every key of the pinned PEFT that is neither read nor harmless, and one that no version has."""
    config = json.loads((written(tmp_path) / "adapter_config.json").read_text())
    for key in sorted((config.keys() | {"of_the_next_version"}) - READ - HARMLESS - HARMLESS_VALUES.keys()):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | {key: None}))
        load_adapter(tmp_path)
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | {key: {"some": "thing"}}))
        with pytest.raises(InputError, match=f"{key} is set"):
            load_adapter(tmp_path)


@pytest.mark.parametrize("initialisation", ["loftq", "corda", "lora_ga", "pissa_niter_16", "of_the_next_version"])
def test_an_initialisation_that_takes_from_the_base_is_refused(initialisation: str, tmp_path: Path) -> None:
    """Those that need data or a quantized model, and any that is not known to leave the base alone."""
    config = json.loads((written(tmp_path) / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": initialisation}))
    with pytest.raises(InputError, match=f"init_lora_weights is set \('{initialisation}'\)"):
        load_adapter(tmp_path)


# -- adapters that differ -------------------------------------------------------------------------------------------


@pytest.fixture
def unlike(tmp_path: Path) -> list[Path]:
    """Two adapters of other modules and ranks, which share some modules."""
    return [written(tmp_path / "one", target_modules=["q_proj", "down_proj"]),
            written(tmp_path / "two", target_modules=["q_proj", "v_proj"], r=3)]  # fmt: skip


def test_adapters_of_other_modules_merge_as_peft_concatenates_them(unlike: list[Path]) -> None:
    adapters = [load_adapter(folder) for folder in unlike]
    weights = torch.tensor([0.7, -0.4])
    expected = by_peft(*unlike)
    assert (ours(merge(adapters, weights, "delta"))[0] - expected).abs().max() < 1e-5
    bank = AdapterBank(tiny.model(), [*QKVO, *MLP])
    bank.load(adapters)
    bank.combine(weights[None], "delta")
    with bank.routed([0] * len(IDS)):
        assert (tiny.logits(bank.model, IDS) - expected).abs().max() < 1e-5


def test_beside_others_an_adapter_is_what_it_is_alone(unlike: list[Path]) -> None:
    found = ours(*(load_adapter(folder) for folder in unlike))
    for place, folder in enumerate(unlike):
        assert (found[place] - by_peft(folder)).abs().max() < 1e-5


def test_the_factor_rule_takes_a_missing_module_for_zero(unlike: list[Path]) -> None:
    first, second = (load_adapter(folder) for folder in unlike)
    merged = merge([first, second], torch.tensor([0.5, 2.0]), "factor")
    assert merged.factors.keys() == first.factors.keys() | second.factors.keys()
    name = "model.layers.0.mlp.down_proj"
    a, b = first.folded().factors[name]
    assert torch.equal(merged.factors[name][0], 0.5 * a) and torch.equal(merged.factors[name][1], 0.5 * b)


def test_messages_name_the_directories(unlike: list[Path], tmp_path: Path) -> None:
    save_adapter(tiny.adapter(tiny.model(hidden_size=32), 0), tmp_path / "narrow", "base")
    adapters = [load_adapter(folder) for folder in (unlike[0], tmp_path / "narrow")]
    told = rf"q_proj: {tmp_path}/narrow is \(32, 32\) wide .*, {tmp_path}/one is \(64, 64\)"
    with pytest.raises(InputError, match=told):
        merge(adapters, torch.ones(2), "delta")
    with pytest.raises(InputError, match=rf"{tmp_path}/one: the model has no .*down_proj.*--target_modules"):
        AdapterBank(tiny.model()).load(adapters[:1])


# -- files ----------------------------------------------------------------------------------------------------------


def test_the_older_file_is_read(tmp_path: Path) -> None:
    expected = load_adapter(written(tmp_path))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(tensors, tmp_path / "adapter_model.bin")
    found = load_adapter(tmp_path)
    for name, (a, b) in expected.factors.items():
        assert torch.equal(found.factors[name][0], a) and torch.equal(found.factors[name][1], b)
    torch.save(Path("/"), tmp_path / "adapter_model.bin")
    with pytest.raises(InputError, match="adapter_model.bin: cut short, or not a file of tensors"):
        load_adapter(tmp_path)
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    load_adapter(tmp_path)  # as in PEFT, the older file does not count beside the newer one


@pytest.mark.parametrize(
    ("named", "used_on", "warned"),
    [
        ("meta-llama/Llama-2-7b-hf", "./llama/Llama-2-7b-hf", False),
        ("Llama-2-7b-hf + out/task", "elsewhere/Llama-2-7b-hf + other/task", False),
        (None, "./llama/Llama-2-7b-hf", False),
        ("meta-llama/Llama-2-7b-hf", "./llama/Llama-2-13b-hf", True),
        ("meta-llama/Llama-2-7b-hf", "./llama/Llama-2-7b-hf + out/task", True),
    ],
)
def test_another_base_is_warned_of_with_both_names(
    named: str | None, used_on: str, warned: bool, tmp_path: Path
) -> None:
    save_adapter(tiny.adapter(tiny.model(), 0), tmp_path, named)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        load_adapter(tmp_path, used_on)
    told = [str(warning.message) for warning in caught]
    assert len(told) == warned
    assert all(name in told[0] for name in (str(tmp_path), str(named), used_on)) if warned else True


# -- bases ----------------------------------------------------------------------------------------------------------


def test_a_task_adapter_on_a_tied_head_leaves_the_embedding_alone() -> None:
    base = tiny.model(tie_word_embeddings=True)
    a, b = torch.randn(2, 64) * 0.1, torch.randn(tiny.VOCAB, 2) * 0.1
    folded = tiny.model(tie_word_embeddings=True)
    fold(folded, Adapter({"lm_head": (a, b)}), "task")
    hidden = base.model(input_ids=IDS).last_hidden_state
    expected = hidden @ (base.lm_head.weight + b @ a).T
    assert (tiny.logits(folded, IDS) - expected).abs().max() < 1e-5
    folded.tie_weights()
    assert (tiny.logits(folded, IDS) - expected).abs().max() < 1e-5


def test_a_layer_that_stores_its_weight_transposed_is_refused() -> None:
    """GPT-2's square projections would take the update of the transposed weight without a word."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(vocab_size=97, n_embd=32, n_layer=1, n_head=2))
    name = "transformer.h.0.attn.c_proj"
    with pytest.raises(InputError, match=f"task: {name} is a Conv1D, not an nn.Linear"):
        fold(model, Adapter({name: (torch.ones(1, 32), torch.ones(32, 1))}), "task")
