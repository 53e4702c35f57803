"""`--plan`: bytes against torch's own profiler and against real tensors; published shapes by configuration alone."""

import argparse
import json
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
import world
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig

from prime.bank.bank import AdapterBank
from prime.bank.decode import batch_tokens, cache_bytes, decode, every_pair, waiting_tokens
from prime.bank.encoding import EncodedRecord
from prime.bank.sampling import Sampler
from prime.bank.train import Learner, TrainSettings, train
from prime.checkpoints import plan
from prime.checkpoints.ledger import Ledger
from prime.checkpoints.plan import STAGES, plan_of, rank_of
from prime.checkpoints.rehearsal import Rehearsal
from prime.errors import InputError
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


def arguments(stage: str, model: str, *more: str) -> argparse.Namespace:
    words = ["--task_name", "movie_tagging", "--llama_model_path", model, "--data_dir", "nowhere", *more]
    words += [] if stage == "task_lora" else ["--lora_ckpt", "none"]
    words += ["--exp_dir", "none", "--anchor_dir", "none"] if stage == "mia" else []
    words += ["--method", "oppu"] if stage == "train_user_peft" else []
    return world.script(stage).build_parser().parse_args(words)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("small")
    tiny.model().config.save_pretrained(folder)
    return str(folder)


# -- published shapes -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("form", ["meta", "hub"])
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_shapes(name: str, form: str, tmp_path: Path) -> None:
    found = Rehearsal(arguments("mia", directory(tmp_path, name, form), "--device", "cuda", "--device_memory", "80"))
    parameters = PUBLISHED[name][2]
    assert (found.plan.parameters, found.plan.weights, found.plan.dtype) == (parameters, 2 * parameters, "bfloat16")


@pytest.mark.slow
def test_the_search_of_a_7b_by_its_params_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--task_name", "movie_tagging", "--llama_model_path", directory(tmp_path, "llama-2-7b", "meta"), "--plan"]
    words += ["--lora_ckpt", "none", "--data_dir", "nowhere", "--device", "cuda", "--recent_k", "1", "--k_list", ""]
    for memory, verdict in (("24", "yes"), ("12", "no")):
        world.script("lora_composition_evo").main([*words, "--device_memory", memory, "--max_length", "400"])
        text = capsys.readouterr().out
        assert "6,738,415,616, bfloat16" in text and "12.55 GiB" in text
        assert text.splitlines()[-1].split() == ["fits", verdict]


# -- bytes ----------------------------------------------------------------------------------------------------------


def profiled_peak(work) -> int:
    """Largest sum of live bytes that torch's allocator counted."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    changes: list[tuple[int, int]] = []

    def walk(events) -> None:
        for event in events:
            if event.tag.name == "Allocation":
                changes.append((event.start_time_ns, event.extra_fields.alloc_size))
            walk(event.children)

    walk(found.profiler.kineto_results.experimental_event_tree())
    now = peak = 0
    for _, change in sorted(changes):
        now += change
        peak = max(peak, now)
    return peak


RECORDS = [EncodedRecord(f"r{i}", tiny.text_ids(i, 30, 60), (5, 6, 7, 2)) for i in range(24)]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_is_what_the_profiler_counts(small: str, checkpointing: bool) -> None:
    """Two steps of one pass: in the second everything is alive that ever will be."""
    more = ["--gradient_checkpointing"] if checkpointing else []
    args = arguments("train_anchor_peft", small, "--device", "cpu", *more)
    settings = TrainSettings(batch_size=24, epochs=2, gradient_checkpointing=checkpointing)
    rehearsal = Rehearsal(args)
    rehearsal.allocate(1)
    rehearsal.train([RECORDS], settings)
    planned = rehearsal.plan.training_checkpointed if checkpointing else rehearsal.plan.training
    bank = AdapterBank(tiny.model())
    bank.allocate([0], 8, 8)
    learner = Learner(0, "one", 0, RECORDS)
    train(bank, [learner], settings)  # what is made once
    assert planned + rehearsal.plan.adapters * 3 // 4 == pytest.approx(
        profiled_peak(lambda: train(bank, [learner], settings)), rel=0.1
    )


@pytest.mark.parametrize("ending", [0.0, 0.75])
def test_answering_is_what_real_tensors_take(small: str, ending: float) -> None:
    """Rows end in their first pass where the draft is the adapters' answer (all have the same), else at their limit."""
    rehearsal = Rehearsal(arguments("lora_composition_evo", small, "--device", "cpu"))
    rehearsal.load(3, 8)
    rehearsal.answer(RECORDS, 3, ending, 6)
    bank = AdapterBank(tiny.model())
    bank.load([tiny.adapter(tiny.model(), 0, rank=8)] * 3)
    answers = decode(bank, RECORDS, every_pair([0], 24), Sampler(0.1), 6, [])
    drafts = [[answers[0, i] if i < 24 * ending else record.target[:-1]] for i, record in enumerate(RECORDS)]
    with Ledger(shadow=False) as ledger:
        decode(bank, RECORDS, every_pair(range(3), 24), Sampler(0.1), 6, [], drafts)
    assert rehearsal.plan.cache + rehearsal.plan.forward == pytest.approx(ledger.peak, rel=0.15)


def test_the_heap_holds_what_is_alive() -> None:
    """Blocks that malloc always maps, since smaller ones may find room that this process has left over."""
    with FakeTensorMode(), Ledger(shadow=True) as ledger:
        kept = [torch.empty(10 << 20) for _ in range(4)]
        torch.empty(30 << 20)
    assert ledger.now == 160 << 20 and ledger.peak == (160 + 120) << 20
    assert ledger.peak <= ledger.most_held <= 1.05 * ledger.peak
    del kept
    assert ledger.now == 0


# -- the whole plan -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [pytest.param(s, marks=[] if s == "mia" else pytest.mark.slow) for s in STAGES])
def test_every_stage_tells_its_plan_without_data_or_weights(
    stage: str, small: str, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = ["--max_length", "64", "--plan"] + ([] if stage == "task_lora" else ["--recent_k", "2"])
    args = arguments(stage, small, *quick)
    words = [f"--{key}={value}" for key, value in vars(args).items() if value is not None and f"--{key}" in NEEDED]
    world.script(stage).main([*words, *quick])
    text = capsys.readouterr().out
    for line in ("parameters", "weights", "adapters", "peak", "fits"):
        assert f"\n{line} " in text
    assert ("activations, training" in text) == (stage in ("task_lora", *TRAINING))
    assert "assumed" in text


NEEDED = (
    "--task_name", "--llama_model_path", "--lora_ckpt", "--data_dir", "--exp_dir", "--anchor_dir", "--method",
)  # fmt: skip
TRAINING = ("train_anchor_peft", "train_anchor_gate", "train_user_peft")


@pytest.mark.slow
def test_real_lengths_where_the_data_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world.build(tmp_path)
    monkeypatch.chdir(tmp_path)
    words = next(words for words in world.announcement() if words[0] == "lora_composition_evo.py")
    args = world.script(words[0]).build_parser().parse_args([*words[1:], "--k_list", "1", "--device_memory", "1"])
    del args.parser  # cannot be sent to another process
    # In a process of its own, as a person runs it: this one's heap has room that the plan would find.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        found = fresh.submit(plan_of, "lora_composition_evo", args).result()
    assert found.lengths == "of the task's data" and 50 < found.longest < 400
    assert found.parameters == 1_033_344 and found.memory == 2**30 and found.fits
    assert found.peak > found.process + found.weights + found.cache


def test_batches_are_those_of_the_run() -> None:
    config = tiny.model().config
    assert batch_tokens(config, 0, None) == 1536
    assert batch_tokens(config, 0, 80 << 30) == 16_384 > batch_tokens(config, 80 << 30, 80 << 30) == 1536
    assert cache_bytes(config, 4) == 2 * 2 * 2 * 16 * 4
    assert waiting_tokens(config, 1000, on_cpu=False) == 4000 < waiting_tokens(config, 1000, on_cpu=True) == 16_000


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such model directory"):
        Rehearsal(arguments("mia", str(tmp_path / "none")))
    with pytest.raises(InputError, match="--device cuda: this machine"):
        Rehearsal(arguments("mia", str(tmp_path), "--device", "cuda"))


def test_the_expectation_is_below_the_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels are short, whatever --train_gen_len says, and their rows end early; without data nothing is expected."""
    world.build(tmp_path)
    monkeypatch.chdir(tmp_path)
    words = ["--device", "cpu", "--anchor_dir", "none", "--k_list", ""]
    args = arguments("lora_composition_evo", world.CHECKPOINT, *words, "--data_dir", "data/movie_tagging")
    runs = [Rehearsal(args, expecting) for expecting in (True, False)]
    history = runs[0].histories(plan.test_users)[0]
    expected, bound = (run.endings(history) for run in runs)
    assert expected.golds > 0 == bound.golds
    assert expected.history_limit == max(len(record.target) for record in history) <= bound.history_limit < 10
    del args.parser
    # In a process of its own, as a person runs it: this one's heap has room that the plan would find.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        found = fresh.submit(plan_of, "lora_composition_evo", args).result()
    assert found.process < found.expected <= found.peak
    assert plan_of("lora_composition_evo", arguments("lora_composition_evo", world.CHECKPOINT, *words)).expected == 0


def test_an_adapter_of_a_broken_configuration(tmp_path: Path) -> None:
    world.write(tmp_path / "users/user_1/adapter/adapter_config.json", {"peft_type": "LORA", "lora_alpha": 8})
    with pytest.raises(InputError, match="adapter_config.json: r is None, expected a positive whole number"):
        rank_of(tmp_path)


def test_several_penalties_are_searched_together(small: str) -> None:
    """Their candidates are in the bank at once; those of one pareto search are not more for more penalties."""
    stage = "lora_composition_evo"
    one, four, both = (
        plan_of(stage, arguments(stage, small, "--anchor_dir", "none", "--k_list", "", *words)).adapters
        for words in ((), ("--sim_penalty", "0,1,2,3"), ("--sim_penalty", "0,1,2,3", "--opt_type", "pareto"))
    )
    assert one <= both < 2 * one < four < 4 * one
