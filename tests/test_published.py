"""Adapters and gates of the published code, held against the Meta-style forward they were trained in."""

from pathlib import Path

import meta_world as meta
import pytest
import tiny
import torch
from torch import Tensor

from prime.bank.bank import AdapterBank
from prime.checkpoints.loading import load_model
from prime.checkpoints.meta_conversion import kept_conversion
from prime.checkpoints.peft import save_adapter
from prime.checkpoints.published import has_adapter, heads_of, load_published, open_adapter
from prime.errors import InputError
from prime.merging.gates import gate_path, load_gate, module_widths

IDS = tiny.ids(2, 40)
CASES = {"llama2": (meta.LLAMA2, 400, 192), "llama3": (meta.LLAMA3, 576, 224)}


@pytest.fixture(scope="module", params=CASES)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, dict]:
    params, vocab, hidden = CASES[request.param]
    folder, whole = tmp_path_factory.mktemp("meta"), meta.weights(params, vocab, hidden)
    meta.save(folder, params, whole)
    meta.save_sentencepiece(folder)
    return folder, params, whole


def saved(folder: Path, params: dict, **options: int) -> tuple[Path, dict[str, Tensor]]:
    adapter = meta.published_adapter(params, **options)
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(adapter, folder / "lora_ckpt.pt")
    return folder / "lora_ckpt.pt", adapter


def test_a_published_task_adapter_on_either_format(made: tuple, tmp_path: Path) -> None:
    folder, params, whole = made
    file, adapter = saved(tmp_path / "task", params)
    expected = meta.forward(params, whole, IDS, adapter)
    assert (expected - meta.forward(params, whole, IDS)).abs().max() > 0.1
    kept_conversion(str(folder), str(tmp_path / "hf"), None)
    for base in (str(folder), str(tmp_path / "hf")):
        assert heads_of(base) == (4, params.get("n_kv_heads", 4))
        model = load_model(base, "cpu", task_adapter=str(file))
        assert (tiny.logits(model, IDS) - expected).abs().max() < 1e-5


def test_without_the_permutation_the_logits_are_others(made: tuple, tmp_path: Path) -> None:
    folder, params, whole = made
    file, adapter = saved(tmp_path, params)
    own = load_published(file, 4, params.get("n_kv_heads", 4))
    for name, (a, _) in own.factors.items():
        layer, kind = name.split(".")[2], name.rsplit(".", 1)[-1][0]
        if kind in "qk":
            own.factors[name] = (a, adapter[f"layers.{layer}.attention.lora_w{kind}.lora_up.weight"])
    save_adapter(own, tmp_path / "peft", "base")
    model = load_model(str(folder), "cpu", task_adapter=str(tmp_path / "peft"))
    assert (tiny.logits(model, IDS) - meta.forward(params, whole, IDS, adapter)).abs().max() > 0.01


def test_a_published_sharer_in_the_bank(made: tuple, tmp_path: Path) -> None:
    """In the place of stage 3's PEFT directory; rank 4 at the published alpha of 8 is scale 2."""
    folder, params, whole = made
    _, adapter = saved(tmp_path / "adapter", params, rank=4)
    assert has_adapter(tmp_path / "adapter") and not has_adapter(tmp_path)
    bank = AdapterBank(load_model(str(folder), "cpu"))
    bank.load([open_adapter(tmp_path / "adapter", str(folder))])
    doubled = {name: tensor * (2 if "lora_up" in name else 1) for name, tensor in adapter.items()}
    with bank.routed([0]):
        found = tiny.logits(bank.model, IDS)
    assert (found - meta.forward(params, whole, IDS, doubled)).abs().max() < 1e-5


def test_a_peft_directory_beside_the_name_of_the_announcement(tmp_path: Path) -> None:
    base = tiny.model()
    base.save_pretrained(tmp_path / "base")
    own = tiny.adapter(base, 0)
    save_adapter(own, tmp_path / "task", "base")
    found = open_adapter(tmp_path / "task" / "lora_ckpt.pt", str(tmp_path / "base"))
    assert found.factors.keys() == own.factors.keys()


def test_published_gates(made: tuple, tmp_path: Path) -> None:
    folder, params, _ = made
    widths = module_widths(AdapterBank(load_model(str(folder), "cpu")))
    keys = {"q": "layers.{}.attention.gate_wq.weight", "k": "layers.{}.attention.lora_wk.gate.weight",
            "v": "layers.{}.attention.v_gate", "o": "model.layers.{}.attention.wo_gate.weight"}  # fmt: skip
    gates = {key.format(i): torch.randn(1, 64) for i in range(2) for key in keys.values()}
    path = gate_path(tmp_path, "7")
    assert path.name == "gate.safetensors"
    path.parent.mkdir(parents=True)
    torch.save(gates, path.with_name("gate.pt"))
    found = load_gate(gate_path(tmp_path, "7"), widths)
    for kind, key in keys.items():
        for layer in range(2):
            assert torch.equal(found[f"model.layers.{layer}.self_attn.{kind}_proj"], gates[key.format(layer)][0])
    torch.save(gates | {"layers.0.attention.gate_wq.weight": torch.randn(1, 32)}, path.with_name("gate.pt"))
    with pytest.raises(InputError, match=r"gate.pt: model.layers.0.self_attn.q_proj: shape \(32,\), expected \(64,\)"):
        load_gate(gate_path(tmp_path, "7"), widths)
    torch.save(gates | {"layers.0.norm": torch.randn(64)}, path.with_name("gate.pt"))
    with pytest.raises(InputError, match=r"gate.pt: layers.0.norm \(64,\) is no gate vector"):
        load_gate(gate_path(tmp_path, "7"), widths)


UP, DOWN = (f"layers.1.attention.lora_wq.lora_{side}.weight" for side in ("up", "down"))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({UP: torch.zeros(63, 8)}, r"layers.1.self_attn.q_proj: lora_up \(63, 8\) cannot be parted into .* 4 heads"),
        ({UP: torch.zeros(64, 7)}, r"q_proj: lora_down \(8, 64\) and lora_up \(64, 7\) do not fit"),
        ({UP: torch.full((64, 8), torch.nan)}, f"{UP} holds values that are not finite"),
        ({UP: torch.zeros(64, 4), DOWN: torch.zeros(4, 64)}, r"ranks \[4, 8\] in one adapter"),
        ({"tok_embeddings.weight": torch.zeros(2, 2)}, "unexpected tensor tok_embeddings.weight"),
    ],
)  # fmt: skip
def test_a_broken_published_adapter_is_named(change: dict, told: str, tmp_path: Path) -> None:
    torch.save(meta.published_adapter(meta.LLAMA2) | change, tmp_path / "lora_ckpt.pt")
    with pytest.raises(InputError, match="lora_ckpt.pt: .*" + told):
        load_published(tmp_path / "lora_ckpt.pt", 4, 4)


@pytest.mark.parametrize("content", [b"", b"no tensors"])
def test_an_unreadable_published_adapter_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "lora_ckpt.pt").write_bytes(content)
    with pytest.raises(InputError, match="lora_ckpt.pt: cut short, or not a file of tensors"):
        load_published(tmp_path / "lora_ckpt.pt", 4, 4)


def test_an_adapter_of_another_width_is_named_with_both_shapes(made: tuple, tmp_path: Path) -> None:
    file, _ = saved(tmp_path, made[1] | {"dim": 128})
    told = (
        r"lora_ckpt.pt: model.layers.0.self_attn.\w_proj: the adapter's update is \(\d+, 128\), .* weight \(\d+, 64\)"
    )
    with pytest.raises(InputError, match=told):
        load_model(str(made[0]), "cpu", task_adapter=str(file))
