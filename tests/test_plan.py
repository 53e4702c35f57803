"""`--plan`: formulas against real tensors; published shapes by their configuration alone; every stage's bound."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import world
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, DynamicCache, GPT2Config, GPTNeoXConfig, LlamaConfig

from prime.bank.bank import DEFAULT_TARGETS, AdapterBank
from prime.bank.budgets import auto_batch_tokens, waiting_tokens
from prime.bank.encoding import EncodedRecord
from prime.bank.train import Learner, train
from prime.checkpoints.loading import load_model
from prime.checkpoints.memory import Work, adapter_bytes, cached_bytes, meta_bank, training_bytes
from prime.checkpoints.peft import save_adapter
from prime.checkpoints.plan import Device, Plan, answer_tokens, passes_of, plan, rank_of
from prime.errors import InputError
from prime.settings import ModelSettings, TrainingSettings
from tests import tiny

# Meta's own files (params.json of the download, config.json of the hub): a model's shape, and its parameters.
LLAMA2_7B = {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-5, "vocab_size": -1}
SCALED = {"norm_eps": 1e-5, "rope_theta": 500_000.0, "use_scaled_rope": True, "vocab_size": 128_256}
LLAMA31_8B = SCALED | {
    "dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "ffn_dim_multiplier": 1.3, "multiple_of": 1024,
}  # fmt: skip
LLAMA32_3B = SCALED | {
    "dim": 3072, "n_layers": 28, "n_heads": 24, "n_kv_heads": 8, "ffn_dim_multiplier": 1.0, "multiple_of": 256,
}  # fmt: skip
PUBLISHED = {
    "llama-2-7b": (LLAMA2_7B, (4096, 11_008, 32, 32, 32, 32_000, False), 6_738_415_616),
    "llama-3.1-8b": (LLAMA31_8B, (4096, 14_336, 32, 32, 8, 128_256, False), 8_030_261_248),
    "llama-3.2-3b": (LLAMA32_3B, (3072, 8192, 28, 24, 8, 128_256, True), 3_212_749_824),
}
STAGES = (
    "task_lora", "train_anchor_peft", "train_anchor_gate", "train_user_peft",
    "lora_composition_evo", "lora_composition", "mia",
)  # fmt: skip


def directory(folder: Path, name: str, form: str) -> str:
    """A model directory with nothing in it but its configuration."""
    params, (width, inner, layers, heads, kv_heads, vocabulary, tied), _ = PUBLISHED[name]
    if form == "meta":
        (folder / "params.json").write_text(json.dumps(params))
        return str(folder)
    LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocabulary, tie_word_embeddings=tied,
    ).save_pretrained(folder)  # fmt: skip
    return str(folder)


def on_meta(config, targets=DEFAULT_TARGETS) -> AdapterBank:
    return meta_bank(config, torch.float32, targets)


# -- what lasts -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["meta", "hub"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes(name: str, form: str, tmp_path: Path) -> None:
    settings = ModelSettings(llama_model_path=directory(tmp_path, name, form), device="cuda", device_memory=80.0)
    planned = plan(settings, [Work("scoring", 1, 8, 100, 10)])
    parameters = PUBLISHED[name][2]
    assert (planned.parameters, planned.weights, planned.dtype) == (parameters, 2 * parameters, "bfloat16")


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma", "neox", "demo"])
def test_parameters_are_those_of_the_loaded_model(family: str, tmp_path: Path) -> None:
    small = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}
    if family == "demo":
        model = load_model(str(world.DEMO / "model"), "cpu")
    elif family == "neox":
        model = AutoModelForCausalLM.from_config(GPTNeoXConfig(vocab_size=97, **small))
    else:
        model = tiny.model(family)
    model.config.save_pretrained(tmp_path)
    modules = "query_key_value" if family == "neox" else ",".join(DEFAULT_TARGETS)
    settings = ModelSettings(llama_model_path=str(tmp_path), target_modules=modules, device="cpu")
    assert plan(settings, [Work("scoring", 1, 8, 100, 10)]).parameters == sum(p.numel() for p in model.parameters())


def test_a_model_without_linear_projections_is_refused_as_in_the_run() -> None:
    with pytest.raises(InputError, match="is a Conv1D, not an nn.Linear"):
        on_meta(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=50), ["c_attn"])


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_the_cache_is_that_of_transformers(family: str) -> None:
    model, cache = tiny.model(family), DynamicCache()
    model(input_ids=tiny.ids(3, 20), past_key_values=cache)
    real = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert cached_bytes(on_meta(model.config), Work("scoring", 1, 8, 15, 5, rows=3), 60, 0) == real


def test_adapters_are_those_of_the_bank() -> None:
    bank, config = AdapterBank(tiny.model()), tiny.model().config
    bank.allocate([0, 1, 2], 4, 4)
    trained = sum(stack.nbytes for stack in bank.parameters())
    assert adapter_bytes(on_meta(config), Work("training", 3, 4, 100, 10)) == 4 * trained
    bank.load([tiny.adapter(tiny.model(), seed) for seed in range(3)])
    loaded = sum(stack.nbytes for stack in bank.parameters())
    assert adapter_bytes(on_meta(config), Work("answering", 2, 4, 100, 10, other_ranks=4)) == loaded == trained


# -- passes ---------------------------------------------------------------------------------------------------------


def profiled_peak(work) -> int:
    """Largest sum of live bytes that torch's allocator counted."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    changes: list[tuple[int, int]] = []

    def walk(events) -> None:
        for event in events:
            if event.tag.name == "Allocation":
                changes.append((event.start_time_ns, event.extra_fields.alloc_size))
            walk(event.children)

    walk(seen.profiler.kineto_results.experimental_event_tree())
    now = peak = 0
    for _, change in sorted(changes):
        now += change
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_is_about_what_the_profiler_counts(checkpointing: bool) -> None:
    """A model deep enough that the formula's part, the layers, outweighs what a pass makes once."""
    model = tiny.model(num_hidden_layers=8)
    work = Work("training", 1, 8, 60, 4, rows=24, shortest=60, gradient_checkpointing=checkpointing)
    records = [EncodedRecord(str(i), (1, *[i + 3] * 59), (5, 6, 7, 2)) for i in range(24)]
    meta = on_meta(model.config)
    bank, settings = AdapterBank(model), TrainingSettings(batch_size=24, epochs=1, gradient_checkpointing=checkpointing)
    bank.allocate([0], 8, 8)
    learner = Learner(0, "one", 0, records)
    train(bank, [learner], settings)  # what is made once
    counted = profiled_peak(lambda: train(bank, [learner], settings))
    made = adapter_bytes(meta, work) * 3 // 4 + training_bytes(meta, work, 24 * 63)
    assert counted * 0.85 < made < counted * 1.5


def test_batches_are_those_of_the_run() -> None:
    bank, cpu = AdapterBank(tiny.model()), Device("cpu", 2**30, 0)
    work = Work("answering", 4, 8, 100, 10)
    passes = passes_of(on_meta(bank.config), cpu, work)
    assert (passes.batch, passes.waiting) == (1536, waiting_tokens(bank.config, auto_batch_tokens(bank), True))
    assert passes_of(on_meta(bank.config), cpu, work, 700).batch == 700
    assert passes_of(on_meta(bank.config), Device("cuda", 1, 80 << 30), work).batch == 16_384
    assert passes_of(on_meta(bank.config), Device("cuda", 1, 80 << 30), Work("training", 4, 8, 100, 10)).batch == 2048


def test_the_peak_is_that_of_the_largest_passes() -> None:
    works = [Work("training", 4, 8, 100, 10), Work("answering", 4, 8, 100, 10)]
    bank = on_meta(tiny.model().config)

    def planned(kind: str, works: list[Work]) -> Plan:
        device = Device(kind, 2**40, 2**40)
        return Plan("m", 1, "float32", 1000, 0, [passes_of(bank, device, work) for work in works], device)

    for kind in ("cpu", "cuda"):
        alone = [planned(kind, [work]) for work in works]
        assert planned(kind, works).peak == max(one.peak for one in alone) > min(one.peak for one in alone) > 1000
        assert all((one.passes[0].gaps > 0) == (kind == "cpu") for one in alone)


# -- the stages -----------------------------------------------------------------------------------------------------


def words_of(stage: str, model: str, *more: str) -> list[str]:
    words = [f"{stage}.py", "--task_name", "movie_tagging", "--llama_model_path", model, "--data_dir", "nowhere"]
    words += [] if stage == "task_lora" else ["--lora_ckpt", "none"]
    words += ["--exp_dir", "none", "--anchor_dir", "none"] if stage == "mia" else []
    words += ["--method", "oppu"] if stage == "train_user_peft" else []
    return [*words, *more, "--plan"]


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_tells_its_plan_without_data_or_weights(
    stage: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny.model().config.save_pretrained(tmp_path)
    world.run(words_of(stage, str(tmp_path)))
    text = capsys.readouterr().out
    for line in ("parameters", "weights", "   adapters", "   activations", "peak", "fits"):
        assert f"\n{line} " in text
    assert ("\ntraining " in text) == stage.startswith(("task_lora", "train_"))
    assert ("answering " in text) == (stage not in ("train_anchor_gate", "mia"))


def test_the_search_of_a_7b_by_its_params_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = directory(tmp_path, "llama-2-7b", "meta")
    for memory, verdict in (("80", "yes"), ("12", "no")):
        world.run(words_of("lora_composition_evo", model, "--device", "cuda", "--device_memory", memory))
        text = capsys.readouterr().out
        assert "6,738,415,616, bfloat16" in text and "12.55 GiB" in text
        assert text.splitlines()[-1].split() == ["fits", verdict]


def test_the_map_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.model().config.save_pretrained(tmp_path)
    world.run(words_of("mia", str(tmp_path), "--device_map", "auto"))
    assert "auto: free memory of all devices together, each has a part of the peak\n" in capsys.readouterr().out


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such model directory"):
        world.run(words_of("mia", str(tmp_path / "none")))
    with pytest.raises(InputError, match="--device cuda: this machine"):
        world.run(words_of("mia", str(tmp_path), "--device", "cuda"))


def test_an_adapter_of_a_broken_configuration(tmp_path: Path) -> None:
    assert rank_of(tmp_path) == 8
    world.write(tmp_path / "users/user_1/adapter/adapter_config.json", {"peft_type": "LORA", "lora_alpha": 8})
    with pytest.raises(InputError, match="adapter_config.json: r is None, expected a positive whole number"):
        rank_of(tmp_path)


def test_labels_are_short_where_the_tokenizer_is_there(tmp_path: Path) -> None:
    demo = ModelSettings(llama_model_path=str(world.DEMO / "model"))
    assert answer_tokens(demo, ("comedy", "dark comedy"), 100) < 12
    assert (
        answer_tokens(demo, None, 100) == answer_tokens(ModelSettings(llama_model_path="no"), ("comedy",), 100) == 100
    )


MEASURED = """
import os, re, resource, runpy, sys
sys.argv = sys.argv[1:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
try:  # ru_maxrss starts from what the process was that started this one
    print(int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024)
except OSError:
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def output_of(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_the_peak_of_a_real_process_stays_below(tmp_path: Path) -> None:
    """Stages 3 and 4 with the demo's model; a factor of two, since how the heap frays is not known better."""
    data = world.build(tmp_path)
    save_adapter(tiny.adapter(load_model(str(world.DEMO / "model"), "cpu"), 0), tmp_path / "task", "base")
    selection = tmp_path / "selection"
    selection.mkdir()
    torch.save(list(range(6)), selection / "anchor_user_idx.pt")
    for name, users in (("user_history_emb.pt", 8), ("test_user_history_emb.pt", 6)):
        torch.save(torch.randn(users, 4), selection / name)
    words = ["--task_name", "movie_tagging", "--data_dir", str(data), "--llama_model_path", str(world.DEMO / "model")]
    words += ["--lora_ckpt", "task", "--anchor_selection_dir", str(selection), "--device", "cpu"]
    stages = {
        "train_anchor_peft.py": ["--epochs", "1", "--output_dir", "anchors"],
        "lora_composition_evo.py": ["--anchor_dir", "anchors", "--user_idxs", "0-2", "--output_dir", "evo"],
    }
    for stage, more in stages.items():
        command = [sys.executable, "-c", MEASURED, str(world.ROOT / stage), *words, *more]
        text, measured = output_of([*command, "--plan"], tmp_path), output_of(command, tmp_path)
        amount, unit = re.search(r"\npeak +([\d.]+) (GiB|MiB)", text).groups()
        planned = float(amount) * {"GiB": 2**30, "MiB": 2**20}[unit]
        peak = int(measured.splitlines()[-1])
        assert peak < planned < 2 * peak, stage
