"""mia.py on a tiny world whose sharers have memorised their records, and held some of them out."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

import mia
from prime import cli
from prime.attack import evidence, subjects
from prime.engine import load_engine
from prime.errors import InputError
from prime.runs.run import Run
from prime.settings import TrainingSettings, recorded
from prime.users.holdout import Split, records_of, trained_records
from prime.users.texts import load_candidates, load_texts

TASK_NAME, RECORDS = "movie_tagging", 7  # four trained items, and a second record for all but the first of them
HOLDOUT = Split(1 / 3, seed=0, recent_k=50)


def write_data(folder):
    """Four anchors with six items each; every anchor has tags of its own."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    anchors = [
        {
            "user_id": 10 + a,
            "profile": [
                {"id": i, "description": " ".join(f"w{w}" for w in rng.integers(0, 30, 6)), "tag": f"w{30 + 6 * a + i}"}
                for i in range(6)
            ],
        }
        for a in range(4)
    ]
    (folder / "user_anchor_candidate.json").write_text(json.dumps(anchors))


def write_model(folder):
    """A tiny random Llama and a tokenizer of words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    words = {w: i for i, w in enumerate(["[UNK]", "[BOS]", "[EOS]", *(f"w{i}" for i in range(54))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "[UNK]", "bos_token": "[BOS]", "eos_token": "[EOS]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    size["initializer_range"] = 0.2  # large enough to learn by heart
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), eos_token_id=2, **size)).save_pretrained(folder)


def train_sharers(settings, folder):
    """Stage 3 in short: every anchor's adapter learns its records by heart, but those of a third of the items."""
    from prime.bank.train import Learner, train
    from prime.checkpoints.peft import save_adapter

    without_task = replace(settings.model, lora_ckpt=None)
    engine = load_engine(without_task, settings.prompts)
    texts = load_texts(settings.data.folder, settings.data.task_name, None)
    engine.bank.allocate(range(4), 8, 8)
    # B is zero: the task adapter changes nothing.
    save_adapter(engine.bank.adapter(0), settings.model.lora_ckpt, "tiny")
    learners = []
    for place, user in enumerate(load_candidates(settings.data.folder, texts.task)):
        records = trained_records(texts, user, 50, HOLDOUT)
        encoded = [engine.encoder.record(r.id, r.input, r.target) for r in records]
        learners.append(Learner(place, user.user_id, place, encoded))
    train(engine.bank, learners, TrainingSettings(lr=0.03, clip=1.0, epochs=40))
    about = {key: recorded(settings)[key] for key in (*subjects.RECORD_OPTIONS, "recent_k")}
    run = Run(folder, "train_anchor_peft", "anchors", about | {"seed": HOLDOUT.seed, "holdout": HOLDOUT.share})
    for learner in learners:
        save_adapter(engine.bank.adapter(learner.slot), run.user_dir(learner.name) / "adapter", "tiny")
        ids = [record.id for record in learner.records]
        run.finish(learner.name, {"user_id": learner.name, "index": learner.slot, "record_ids": ids})


def write_experiment(folder, anchor_dir):
    """Stage 4 in short: user 1 got sharer 10 alone (11 has weight 0), for user 2 the base won."""
    run = Run(folder, "lora_composition_evo", "prime", {"task_name": TASK_NAME})
    shutil.copytree(anchor_dir / "users" / "user_10" / "adapter", run.user_dir("1") / "adapter")
    run.finish("1", {"user_id": "1", "index": 0, "deployed": "merge", "sharers": ["10", "11"], "weights": [1.0, 0.0]})
    run.finish("2", {"user_id": "2", "index": 1, "deployed": "base", "sharers": ["12", "11"], "weights": [0.0, 0.0]})


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(command line, experiment folder) after one run of mia.py."""
    root = tmp_path_factory.mktemp("mia")
    write_data(root / "data")
    write_model(root / "model")
    paths = {
        "data_dir": "data",
        "llama_model_path": "model",
        "lora_ckpt": "task",
        "anchor_dir": "LoRA",
        "exp_dir": "evo",
    }
    argv = ["--task_name", TASK_NAME, "--n_sim", "3", "--device", "cpu"]
    argv += [text for key, name in paths.items() for text in (f"--{key}", str(root / name))]
    train_sharers(cli.parse(mia.Settings, None, argv), root / "LoRA")
    write_experiment(root / "evo", root / "LoRA")
    mia.main(argv)
    return argv, root / "evo"


def test_results_have_the_published_shape(world):
    results = json.loads((world[1] / "mia_results.json").read_text())
    assert list(results) == ["1-0", "2-1"]
    sides = {key: (results[key]["member_ids"], results[key]["non_member_ids"]) for key in results}
    assert sides == {"1-0": (["10"], ["12", "13"]), "2-1": (["12", "11"], ["10", "13"])}
    for user in results.values():
        assert len(user) == 6
        for side in ("member", "non_member"):
            assert user[f"{side}_num_samples"] == [RECORDS] * len(user[f"{side}_ids"])
            assert len(user[f"{side}_loss"]) == sum(user[f"{side}_num_samples"])


def reference_losses(argv, adapter, anchor):
    """Summed losses of an anchor's records by PEFT, one record at a time."""
    return [loss for loss, _ in losses_and_lengths(argv, adapter, anchor)]


def reference_means(argv, adapter, anchor):
    """Geometric mean of the token probabilities of all of an anchor's records, held-out ones too."""
    return np.exp([-loss / length for loss, length in losses_and_lengths(argv, adapter, anchor, held_out=True)])


def losses_and_lengths(argv, adapter, anchor, held_out=False):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    settings = cli.parse(mia.Settings, None, argv)
    model = AutoModelForCausalLM.from_pretrained(settings.model.llama_model_path)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    encoder = load_engine(replace(settings.model, lora_ckpt=None), settings.prompts).encoder
    texts = load_texts(settings.data.folder, settings.data.task_name, None)
    user = next(u for u in load_candidates(settings.data.folder, texts.task) if u.user_id == anchor)
    losses = []
    for record in (records_of if held_out else trained_records)(texts, user, 50, HOLDOUT):
        own = encoder.record(record.id, record.input, record.target)
        ids = torch.tensor([[*own.ids, *own.target]])
        labels = torch.tensor([[-100] * len(own.ids) + list(own.target)])
        with torch.no_grad():
            loss = float(model(input_ids=ids, labels=labels).loss) * len(own.target)
        losses.append((loss, len(own.target)))
    return losses


def test_losses_are_pefts_on_what_was_deployed(world):
    argv, exp_dir = world
    results = json.loads((exp_dir / "mia_results.json").read_text())
    merged = reference_losses(argv, exp_dir / "users" / "user_1" / "adapter", "10")
    assert results["1-0"]["member_loss"] == pytest.approx(merged, abs=1e-3)
    assert results["2-1"]["member_loss"][:RECORDS] == pytest.approx(reference_losses(argv, None, "12"), abs=1e-3)


def test_the_base_leaks_nothing_and_memorising_sharers_are_caught(world, capsys):
    argv, exp_dir = world
    summary = json.loads((exp_dir / "mia_summary.json").read_text())
    assert (summary["method"], summary["users"], summary["on_base"]) == ("prime", 2, 1)
    calibrated = summary["sharers"]["attacks"]["calibrated"]
    assert calibrated["auroc"]["mean"] > 0.9 and calibrated["blind_auroc"]["mean"] == 0.5
    on_base = json.loads((exp_dir / "mia" / "users" / "user_2" / "result.json").read_text())
    assert on_base["scores"] == on_base["blind"] and not any(on_base["scores"]["calibrated"]["member"])


@pytest.mark.slow
def test_a_resumed_attack_gives_the_same_losses(world, capsys, monkeypatch):
    argv, exp_dir = world
    before = json.loads((exp_dir / "mia_results.json").read_text())
    for part in ("users/user_1", "sharers/users/user_12"):
        (exp_dir / "mia" / part / "result.json").unlink()
    mia.main([*argv, "--users_per_batch", "1", "--max_batch_tokens", "64"])
    after = json.loads((exp_dir / "mia_results.json").read_text())
    for key in before:
        assert after[key]["member_loss"] == pytest.approx(before[key]["member_loss"], abs=1e-4)
        assert after[key]["non_member_loss"] == pytest.approx(before[key]["non_member_loss"], abs=1e-4)
    monkeypatch.setattr(mia, "load_engine", lambda *_, **__: pytest.fail("a finished attack loads no model"))
    mia.main(argv)
    table = capsys.readouterr().out
    assert "sharers, unmerged" in table and "blind" in table and "1 deployed the base" in table


def test_wrong_input_is_told(world, tmp_path):
    argv, exp_dir = world
    with pytest.raises(InputError, match="trained on other records:\n  max_length: there 3000, now 200"):
        mia.main([*argv, "--max_length", "200"])
    with pytest.raises(InputError, match="other settings"):
        mia.main([*argv, "--max_records", "2"])
    with pytest.raises(InputError, match="--gate_dir .*nowhere: no such directory"):
        mia.main([*argv, "--gate_dir", str(tmp_path / "nowhere")])
    with pytest.raises(InputError, match="no finished users"):
        mia.main([*argv, "--exp_dir", str(tmp_path)])
    with pytest.raises(InputError, match="merged no sharer's adapter"):
        subjects.deployment(tmp_path, {"user_id": "1", "index": 0}, 3)


def test_members_are_sharers_in_the_adapter_and_all_listed_where_the_base_won(tmp_path):
    result = {"user_id": "1", "index": 0, "deployed": "merge", "sharers": ["a", "b", "c"]}
    cases = [  # weights, n_sim -> members
        ([0.5, 0.0, -1.0], 0, ["a", "c"]),
        ([0.5, 0.0, -1.0], 1, ["a"]),
        ([[0.0, 0.0], [0.0, 0.1], [0.0, 0.0]], 3, ["b"]),  # --piece_merge
    ]
    for weights, n_sim, members in cases:
        subject = subjects.deployment(tmp_path, result | {"weights": weights}, n_sim)
        assert subject.members == members
        assert sorted([*subject.members, *subject.neither]) == ["a", "b", "c"]
    on_base = subjects.deployment(tmp_path, result | {"weights": [0.0] * 3, "deployed": "base"}, 2)
    assert on_base.members == ["a", "b"] and on_base.adapter is None
    with pytest.raises(InputError, match="user 1: all 3 anchors are sharers"):
        subjects.check_members([subject], ["a", "b", "c"])
    with pytest.raises(InputError, match="no results of sharers c"):
        subjects.check_members([subject], ["a", "b", "d"])


def write_random_adapters(folder, anchor_dir):
    """Test users with adapters that nobody trained, as large as the sharers'; two sharers each."""
    from prime.bank.lora import Adapter
    from prime.checkpoints.peft import load_adapter, save_adapter

    stream = torch.Generator().manual_seed(0)
    like = load_adapter(anchor_dir / "users" / "user_10" / "adapter")
    run = Run(folder, "lora_composition_evo", "prime", {"task_name": TASK_NAME})
    names = ["10", "11", "12", "13"]
    for index in range(8):
        user_id, chosen = f"r{index}", [names[index % 4], names[(index + 1) % 4]]
        noise = {
            module: tuple(torch.randn(part.shape, generator=stream) * part.std() for part in pair)
            for module, pair in like.factors.items()
        }
        save_adapter(Adapter(noise), run.user_dir(user_id) / "adapter", "tiny")
        own = {"user_id": user_id, "index": index, "deployed": "merge", "sharers": chosen, "weights": [0.5, 0.5]}
        run.finish(user_id, own)


def test_a_random_adapter_is_not_caught_and_a_memorising_one_is(world, tmp_path):
    """Trained and held-out records of the same sharers, under adapters without and with memory of them."""
    argv, exp_dir = world
    write_random_adapters(tmp_path / "random", exp_dir.parent / "LoRA")
    mia.main([*argv, "--exp_dir", str(tmp_path / "random"), "--skip_sharers"])
    innocent = json.loads((tmp_path / "random" / "mia_summary.json").read_text())["sets"]["controlled"]
    caught = json.loads((exp_dir / "mia_summary.json").read_text())["sharers"]["sets"]["controlled"]
    assert (innocent["users"], innocent["members"]) == (8, 8 * 2 * RECORDS)
    for attack in ("calibrated", "rmia"):
        assert innocent["attacks"][attack]["auroc"]["low"] < 0.5 < innocent["attacks"][attack]["auroc"]["high"]
        assert caught["attacks"][attack]["auroc"]["mean"] > 0.9


def test_references_are_other_peoples_and_as_many_for_every_record():
    owners = ["a", "b", "c", "d", "e", "f"]
    subject = subjects.Subject("1", 0, None, ["b"], ["d"])
    for seed in range(5):
        drawn = evidence.References.draw(owners, 2, seed)
        assert drawn == evidence.References.draw(owners[::-1], 2, seed)
        for owner in owners:
            chosen = drawn.of(subject, owner)
            assert len(set(chosen)) == 2 and not {owner, "b", "d"} & set(chosen)
    few = evidence.References.draw(["a", "b"], 2, 0)  # nobody is left beside the record's owner
    assert few.of(subjects.Subject("1", 0, None, ["b"]), "a") == []
    assert evidence.References.draw(owners, 0, 0).pool(subject) == []


def test_rmia_of_a_result_is_the_definition_record_by_record(world):
    """From log-probabilities by PEFT: user 1's members under sharer 10, the one reference a record has."""
    argv, exp_dir = world
    result = json.loads((exp_dir / "mia" / "users" / "user_1" / "result.json").read_text())
    settings = cli.parse(mia.Settings, None, argv)
    anchors = exp_dir.parent / "LoRA" / "users"
    order = evidence.References.draw(["10", "11", "12", "13"], settings.references, settings.seed)
    subject = subjects.Subject("1", 0, None, ["10"], ["11"])
    deployed = exp_dir / "users" / "user_1" / "adapter"

    def ratios(owner):
        (reference,) = order.of(subject, owner)
        own, other = (reference_means(argv, path, owner) for path in (deployed, anchors / f"user_{reference}/adapter"))
        return own / ((1.3 * other + 0.7) / 2)

    others = np.concatenate([ratios(owner) for owner in ("12", "13")])
    expected = np.array([np.mean(ratio / others >= 2) for ratio in ratios("10")])
    texts = load_texts(settings.data.folder, settings.data.task_name, None)
    user = next(u for u in load_candidates(settings.data.folder, texts.task) if u.user_id == "10")
    out = np.array([record.held_out for record in records_of(texts, user, 50, HOLDOUT)])
    assert result["scores"]["rmia"]["member"] == pytest.approx(expected[~out])
    assert result["scores"]["rmia"]["held_out"] == pytest.approx(expected[out])
