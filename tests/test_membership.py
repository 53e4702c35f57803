"""Attack scores, and AUROC against pair counting and scikit-learn."""

import json
import shutil

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score, roc_curve

from prime import membership
from prime.errors import InputError


def pairs(members, non_members):
    """The definition, one pair at a time."""
    won = [(m > n) + (m == n) / 2 for m in members for n in non_members]
    return sum(won) / len(won)


@pytest.fixture(params=range(5))
def scores(request):
    """Integer scores, so that ties are common."""
    rng = np.random.default_rng(request.param)
    return rng.integers(0, 9, 40).astype(float), rng.integers(-2, 8, 130).astype(float)


def test_auroc_is_pair_counting_and_scikit_learns(scores):
    members, non_members = scores
    truth = np.r_[np.ones(len(members)), np.zeros(len(non_members))]
    assert membership.auroc(members, non_members) == pytest.approx(pairs(members, non_members), abs=1e-12)
    expected = roc_auc_score(truth, np.r_[members, non_members])
    assert membership.auroc(members, non_members) == pytest.approx(expected, abs=1e-12)


def test_swapping_members_and_non_members_gives_one_minus_auroc(scores):
    members, non_members = scores
    assert membership.auroc(non_members, members) == pytest.approx(1 - membership.auroc(members, non_members))


def test_auroc_extremes():
    assert membership.auroc([2.0, 3.0], [0.0, 1.0]) == 1.0
    assert membership.auroc([0.0], [1.0]) == 0.0
    assert membership.auroc([1.0, 1.0], [1.0]) == 0.5
    assert np.isnan(membership.auroc([], [1.0]))


@pytest.mark.parametrize("fpr", [0.01, 0.05, 0.1, 0.29, 1.0])
def test_tpr_at_fpr_is_the_best_threshold_of_the_roc_curve(scores, fpr):
    members, non_members = scores
    truth = np.r_[np.ones(len(members)), np.zeros(len(non_members))]
    false, true, _ = roc_curve(truth, np.r_[members, non_members], drop_intermediate=False)
    assert membership.tpr_at_fpr(members, non_members, fpr) == pytest.approx(true[false <= fpr + 1e-12].max())


def test_tpr_is_not_available_where_the_rate_cannot_be_observed():
    assert membership.tpr_at_fpr([1.0], np.zeros(99), 0.01) is None
    assert membership.tpr_at_fpr([1.0], np.zeros(100), 0.01) == 1.0
    assert membership.tpr_at_fpr([], np.zeros(100), 0.01) is None


def test_attacks_on_a_hand_made_record():
    adapter, base = np.array([-0.5, -1.0]), np.array([-1.0, -2.5])
    assert membership.ATTACKS["loss"](adapter, base) == -1.5
    assert membership.ATTACKS["calibrated"](adapter, base) == 2.0
    assert membership.ATTACKS["calibrated"](base, base) == 0.0


def attacked_users(shift, u=12, seed=0):
    """Scores of u users; members score higher by `shift`."""
    rng = np.random.default_rng(seed)
    return [rng.normal(shift, 1, 30) for _ in range(u)], [rng.normal(0, 1, 50) for _ in range(u)]


def test_pooled_and_per_user_auroc_of_the_summary():
    members, non_members = attacked_users(0.5)
    summary = membership.attack_summary(members, non_members, members, non_members, n=200)
    pooled = membership.auroc(np.concatenate(members), np.concatenate(non_members))
    own = np.mean([membership.auroc(m, n) for m, n in zip(members, non_members, strict=True)])
    assert summary["auroc"]["mean"] == pytest.approx(pooled)
    assert summary["user_auroc"]["mean"] == pytest.approx(own)
    assert summary["auroc"] == summary["blind_auroc"]
    assert summary["auroc_above_blind"] == {"mean": 0.0, "low": 0.0, "high": 0.0}


def test_a_resample_of_users_is_the_pooled_auroc_of_their_records():
    members, non_members = attacked_users(0.5, u=4)
    drawn = [0, 0, 2, 3]
    wins = membership.pair_counts(members, non_members)
    sizes = np.array([30.0] * 4), np.array([50.0] * 4)
    got = membership.pooled_auroc(wins, *sizes, np.array([[2.0, 0.0, 1.0, 1.0]]))
    again = [np.concatenate([side[i] for i in drawn]) for side in (members, non_members)]
    assert got[0] == pytest.approx(membership.auroc(*again))


def test_a_memorising_adapter_is_caught_and_a_random_one_is_not():
    caught = membership.attack_summary(*attacked_users(3), *attacked_users(0, seed=1))
    innocent = membership.attack_summary(*attacked_users(0, seed=2), *attacked_users(0, seed=1))
    assert caught["auroc"]["low"] > 0.9 and caught["auroc_above_blind"]["low"] > 0.4
    assert innocent["auroc"]["low"] < 0.5 < innocent["auroc"]["high"]


def test_intervals_are_seeded():
    users = attacked_users(0.5)
    first, again = (membership.attack_summary(*users, *users, n=100, seed=3) for _ in range(2))
    other = membership.attack_summary(*users, *users, n=100, seed=4)
    assert first == again
    assert first["auroc"] != other["auroc"]


# --- the stage: mia.py on a tiny world whose sharers have memorised their records


TASK_NAME, RECORDS = "movie_tagging", 7  # four items, and a second record for all but the first


def write_data(folder):
    """Four anchors with four items each; every anchor has tags of its own."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    anchors = [
        {
            "user_id": 10 + a,
            "profile": [
                {"id": i, "description": " ".join(f"w{w}" for w in rng.integers(0, 30, 6)), "tag": f"w{30 + 4 * a + i}"}
                for i in range(4)
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
    words = {w: i for i, w in enumerate(["[UNK]", "[BOS]", "[EOS]", *(f"w{i}" for i in range(46))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "[UNK]", "bos_token": "[BOS]", "eos_token": "[EOS]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), eos_token_id=2, **size)).save_pretrained(folder)


def train_sharers(args, folder):
    """Stage 3 in short: every anchor's adapter learns its records by heart."""
    import mia
    from prime.engine import load_engine
    from prime.lora import save_adapter
    from prime.runs import Run
    from prime.train import Learner, TrainSettings, train

    engine, texts = load_engine(args), mia.cli.load_texts(args)
    engine.bank.allocate(range(4), 8, 8)
    save_adapter(engine.bank.adapter(0), args.lora_ckpt, "tiny")  # B is zero: the task adapter changes nothing
    learners = []
    for place, user in enumerate(mia.cli.load_candidates(args, texts.task)):
        records = mia.history_records(user, texts.task, texts.templates, None, 50)
        encoded = [engine.encoder.record(r.id, r.input, r.target) for r in records]
        learners.append(Learner(place, user.user_id, place, encoded))
    train(engine.bank, learners, TrainSettings(lr=0.03, clip=1.0, epochs=40))
    settings = {key: getattr(args, key) for key in mia.RECORD_OPTIONS}
    run = Run(folder, "train_anchor_peft", "anchors", settings)
    for learner in learners:
        save_adapter(engine.bank.adapter(learner.place), run.user_dir(learner.name) / "adapter", "tiny")
        ids = [record.id for record in learner.records]
        run.finish(learner.name, {"user_id": learner.name, "index": learner.place, "record_ids": ids})


def write_experiment(folder, anchor_dir):
    """Stage 4 in short: user 1 got sharer 10 alone (11 has weight 0), for user 2 the base won."""
    from prime.runs import Run

    run = Run(folder, "lora_composition_evo", "prime", {"task_name": TASK_NAME})
    shutil.copytree(anchor_dir / "users" / "user_10" / "adapter", run.user_dir("1") / "adapter")
    run.finish("1", {"user_id": "1", "index": 0, "deployed": "merge", "sharers": ["10", "11"], "weights": [1.0, 0.0]})
    run.finish("2", {"user_id": "2", "index": 1, "deployed": "base", "sharers": ["12", "11"], "weights": [0.0, 0.0]})


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(command line, experiment folder) after one run of mia.py."""
    import mia

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
    train_sharers(mia.build_parser().parse_args(argv), root / "LoRA")
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
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    import mia

    args = mia.build_parser().parse_args(argv)
    model = AutoModelForCausalLM.from_pretrained(args.llama_model_path)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter)
    encoder = mia.load_engine(args).encoder
    texts = mia.cli.load_texts(args)
    user = next(u for u in mia.cli.load_candidates(args, texts.task) if u.user_id == anchor)
    losses = []
    for record in mia.history_records(user, texts.task, texts.templates, None, 50):
        own = encoder.record(record.id, record.input, record.target)
        ids = torch.tensor([[*own.ids, *own.target]])
        labels = torch.tensor([[-100] * len(own.ids) + list(own.target)])
        with torch.no_grad():
            losses.append(float(model(input_ids=ids, labels=labels).loss) * len(own.target))
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


def test_a_resumed_attack_gives_the_same_losses(world, capsys, monkeypatch):
    import mia

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
    import mia

    argv, exp_dir = world
    with pytest.raises(InputError, match="trained on other records:\n  recent_k: there 50, now 2"):
        mia.main([*argv, "--recent_k", "2"])
    with pytest.raises(InputError, match="other settings"):
        mia.main([*argv, "--max_records", "2"])
    with pytest.raises(InputError, match="--gate_dir .*nowhere: no such directory"):
        mia.main([*argv, "--gate_dir", str(tmp_path / "nowhere")])
    with pytest.raises(InputError, match="no anchors' results there"):
        mia.main([*argv, "--anchor_dir", str(tmp_path)])
    with pytest.raises(InputError, match="no finished users"):
        mia.main([*argv, "--exp_dir", str(tmp_path)])
    with pytest.raises(InputError, match="merged no sharer's adapter"):
        mia.deployment(tmp_path, {"user_id": "1", "index": 0}, 3)


def test_members_are_sharers_in_the_adapter_and_all_listed_where_the_base_won(tmp_path):
    import mia

    result = {"user_id": "1", "index": 0, "deployed": "merge", "sharers": ["a", "b", "c"]}
    cases = [  # weights, n_sim -> members
        ([0.5, 0.0, -1.0], 0, ["a", "c"]),
        ([0.5, 0.0, -1.0], 1, ["a"]),
        ([[0.0, 0.0], [0.0, 0.1], [0.0, 0.0]], 3, ["b"]),  # --piece_merge
    ]
    for weights, n_sim, members in cases:
        subject = mia.deployment(tmp_path, result | {"weights": weights}, n_sim)
        assert subject.members == members
        assert sorted([*subject.members, *subject.neither]) == ["a", "b", "c"]
    on_base = mia.deployment(tmp_path, result | {"weights": [0.0] * 3, "deployed": "base"}, 2)
    assert on_base.members == ["a", "b"] and on_base.adapter is None
    with pytest.raises(InputError, match="user 1: all 3 anchors are sharers"):
        mia.check_members([subject], ["a", "b", "c"])
    with pytest.raises(InputError, match="no results of sharers c"):
        mia.check_members([subject], ["a", "b", "d"])


def test_user_aurocs_are_scikit_learns() -> None:
    scores = {"member": [3.0, 1.0, 2.0], "non_member": [0.5, 2.0]}
    blind = {"member": [1.0, 1.0, 1.0], "non_member": [1.0, 1.0]}
    found = membership.user_aurocs({"scores": {"loss": scores}, "blind": {"loss": blind}})
    truth = [1, 1, 1, 0, 0]
    assert found == {"loss": {"auroc": pytest.approx(roc_auc_score(truth, [3, 1, 2, 0.5, 2])), "blind": 0.5}}
