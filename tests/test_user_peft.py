"""OPPU and merge-then-adapt: training against PEFT, what is frozen stays, what is saved is what was trained."""
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import world
from peft import LoraConfig, PeftModel, get_peft_model
from test_train import LEARNERS, SETTINGS, assert_close, peft_training
from transformers import AutoModelForCausalLM

import train_user_peft
from prime.bank.bank import AdapterBank
from prime.bank.lora import merge
from prime.bank.train import Learner, train
from prime.checkpoints.peft import load_adapter, save_adapter
from prime.engine import load_engine
from prime.errors import InputError
from prime.runs.run import read_results, user_dirname
from prime.users.prompts import history_records
from prime.users.texts import load_test_users, load_texts
from tests import tiny

pytestmark = pytest.mark.slow  # the whole pipeline is run before the first test

# -- training on top of a frozen adapter ----------------------------------------------------------------------------

DROPOUT = replace(SETTINGS, lora_dropout=0.1)
MERGED = [
    merge([tiny.adapter(tiny.model(), 2 * i), tiny.adapter(tiny.model(), 2 * i + 1)], torch.full((2,), 0.5), "delta")
    for i in range(len(LEARNERS))
]


def stacked_bank(places: list[int]) -> AdapterBank:
    bank = AdapterBank(tiny.model())
    bank.allocate([LEARNERS[place].seed for place in places], rank=4, alpha=8, under=[MERGED[p] for p in places])
    return bank


def frozen_parts(bank: AdapterBank) -> list[torch.Tensor]:
    return [part for wrapper in bank.wrappers.values() for part in wrapper.under]


def test_a_fresh_adapter_on_a_frozen_one_starts_as_the_frozen_one() -> None:
    bank = stacked_bank([0, 1])
    ids = tiny.ids(2, 9)
    with bank.routed([1, -1]):
        found = tiny.logits(bank.model, ids)
    assert torch.allclose(found[0], tiny.logits(tiny.peft_model(tiny.model(), MERGED[1]), ids)[0], atol=1e-5)
    assert torch.equal(found[1], tiny.logits(tiny.model(), ids)[1])


def test_training_on_top_leaves_the_frozen_part_bit_for_bit() -> None:
    """With weight decay and clipping that a frozen part would show."""
    bank = stacked_bank([0, 1, 2])
    before = [part.clone() for part in frozen_parts(bank)]
    train(bank, LEARNERS, replace(DROPOUT, weight_decay=0.5))
    assert all(torch.equal(part, old) for part, old in zip(frozen_parts(bank), before, strict=True))
    assert not any(part.requires_grad for part in frozen_parts(bank))
    assert len(bank.parameters()) == 2 * len(bank.wrappers)


def test_training_on_top_is_pefts_on_a_base_that_carries_the_merge(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle folds the merge into the weights, so decay and clipping cannot see it."""
    learner, bank = LEARNERS[1], stacked_bank([1])
    fresh = AdapterBank(tiny.model())
    fresh.allocate([learner.seed], rank=4, alpha=8)
    carrying = tiny.with_updates(tiny.model(), tiny.dense_updates(MERGED[1]))
    with monkeypatch.context() as patch:
        patch.setattr(tiny, "model", lambda: carrying)
        expected, norms, model = peft_training(fresh, learner, SETTINGS)
    found = train(bank, [Learner(0, "user", learner.seed, learner.records)], SETTINGS)[0]
    assert found[:5] == pytest.approx(expected[:5], abs=1e-4) and max(norms) > SETTINGS.clip
    with bank.routed([0]):
        assert torch.allclose(tiny.logits(bank.model, tiny.ids(1, 9)), tiny.logits(model, tiny.ids(1, 9)), atol=2e-3)


def test_dropout_stands_in_front_of_the_trained_part_only() -> None:
    """B is zero at first: were the frozen part's input dropped, the first loss would change."""
    dry, wet = (
        train(stacked_bank([0]), [Learner(0, "user", LEARNERS[0].seed, LEARNERS[0].records)], settings)[0]
        for settings in (SETTINGS, DROPOUT)
    )
    assert dry[0] == wet[0] and dry[-1] != pytest.approx(wet[-1], abs=1e-4)


def test_training_on_top_together_is_training_alone() -> None:
    bank = stacked_bank([0, 1, 2])
    together = train(bank, LEARNERS, DROPOUT)
    for learner in LEARNERS:
        own = stacked_bank([learner.slot])
        losses = train(own, [replace(learner, slot=0)], DROPOUT)[0]
        assert together[learner.slot] == pytest.approx(losses, abs=1e-4)
        assert_close(bank.adapter(learner.slot).factors, own.adapter(0).factors, atol=5e-4)


def test_what_is_saved_is_the_merge_and_the_trained_part(tmp_path: Path) -> None:
    bank = stacked_bank([0, 1])
    train(bank, LEARNERS[:2], replace(SETTINGS, lr=2e-2))
    ids = tiny.ids(2, 9)
    with bank.routed([1, 1]):
        trained = tiny.logits(bank.model, ids)
    save_adapter(bank.adapter(1), tmp_path, "base")
    saved = load_adapter(tmp_path)
    assert saved.rank == MERGED[1].rank + 4
    for name, (a, b) in saved.factors.items():
        assert torch.equal(a[:8], MERGED[1].factors[name][0]) and torch.equal(b[:, :8], MERGED[1].factors[name][1])
    theirs = PeftModel.from_pretrained(tiny.model(), tmp_path).eval()
    assert torch.allclose(tiny.logits(theirs, ids), trained, atol=1e-5)
    assert (trained - tiny.logits(tiny.peft_model(tiny.model(), MERGED[1]), ids)).abs().max() > 0.02
    bank.load([saved])
    with bank.routed([0, 0]):
        assert torch.allclose(tiny.logits(bank.model, ids), trained, atol=1e-5)  # and nothing stands below any more


# -- the stage ------------------------------------------------------------------------------------------------------

TASK = "movie_tagging"
COMMON = ["--task_name", TASK, "--llama_model_path", world.CHECKPOINT]
ADAPTED = [*COMMON, "--lora_ckpt", f"./output/{TASK}/task-base_LLM/lora_ckpt.pt"]
QUICK = ["--epochs", "2", "--lr", "5e-3", "--lora_dropout", "0", "--k_list", "1"]


def stage(method: str, *options: str) -> None:
    world.run(["train_user_peft.py", "--method", method, *ADAPTED, *QUICK, *options])


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with sharers in it, where both methods have run into their default folders."""
    folder = tmp_path_factory.mktemp("user_peft")
    world.build(folder, test_users=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        quick = ["--epochs", "1", "--lr", "5e-3"]
        world.run(["task_lora.py", *COMMON, *quick, "--k_list", ""])
        world.run(["history_anchor.py", "--task_name", TASK, "--encoder", world.CHECKPOINT, "--k", "6"])
        world.run(["train_anchor_peft.py", *ADAPTED, *quick])
        for method in ("oppu", "mta"):
            stage(method)
        yield folder


FOLDERS = {"oppu": f"output/{TASK}/OPPU", "mta": f"output/{TASK}/Merge-then-adapt"}


def test_first_losses_are_those_of_a_lone_adapter_trained_by_peft(inside: Path) -> None:
    words = ["--method", "oppu", *ADAPTED, *QUICK]
    settings = world.settings(["train_user_peft.py", *words])
    texts = load_texts(settings.data.folder, settings.data.task_name, None)
    user = load_test_users(settings.data.folder, texts.task)[1]
    engine = load_engine(settings.model, settings.prompts)
    stage = train_user_peft.Stage(settings, texts, engine, Mock(), None, {})
    learner = train_user_peft.learner_of(stage, user, 0)
    engine.bank.allocate([learner.seed], 8, 8)

    base = AutoModelForCausalLM.from_pretrained(world.CHECKPOINT, dtype=torch.float32)
    base = PeftModel.from_pretrained(base, f"output/{TASK}/task-base_LLM").merge_and_unload()
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=8, lora_dropout=0, target_modules=list(tiny.TARGETS)))
    for name, (a, _) in engine.bank.adapter(0).factors.items():
        model.base_model.model.get_submodule(name).lora_A["default"].weight.data.copy_(a)
    training, plan = settings.training, learner.batches(settings.training)
    own = [p for p in model.parameters() if p.requires_grad]
    adamw = torch.optim.AdamW(own, lr=training.lr, betas=(0.9, 0.95), weight_decay=training.weight_decay)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(adamw, T_max=len(plan))
    expected = []
    for batch in plan[:5]:
        adamw.zero_grad()
        loss = tiny.textbook_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(own, training.clip)
        adamw.step()
        cosine.step()
        expected.append(float(loss.detach()))
    result = world.results(FOLDERS["oppu"])[user.user_id]
    assert len(result["losses"]) == len(plan) and result["losses"][:5] == pytest.approx(expected, abs=1e-4)
    profile = texts.profile_of(user.user_id)
    records = history_records(user, texts.task, texts.templates, profile, settings.prompts.recent_k)
    assert result["record_ids"] == [record.id for record in records]


@pytest.mark.parametrize("method", ["oppu", "mta"])
def test_a_result_has_predictions_of_every_setting_seconds_and_an_adapter(inside: Path, method: str) -> None:
    found = read_results(FOLDERS[method])
    assert len(found) == 3
    for result in found:
        assert set(result["predictions"]) == {method}
        assert set(result["predictions"][method]) == {"k0", "k0-profile", "k1", "k1-profile"}
        assert set(result["seconds"]) == {"train", "predict"}
        own = load_adapter(inside / FOLDERS[method] / "users" / user_dirname(result["user_id"]) / "adapter")
        assert own.rank == (8 if method == "oppu" else 8 + 8 + 4) and own.card["records"] == len(result["record_ids"])
        assert ("sharers" in result) == (method == "mta")


def test_merge_then_adapt_stands_on_the_mean_of_the_two_nearest_sharers(inside: Path) -> None:
    for user, result in world.results(FOLDERS["mta"]).items():
        folders = [inside / f"output/{TASK}/Anchor_PEFT/LoRA/users" / user_dirname(s) for s in result["sharers"]]
        mean = merge([load_adapter(folder / "adapter") for folder in folders], torch.tensor([0.5, 0.5]), "delta")
        own = load_adapter(inside / FOLDERS["mta"] / "users" / user_dirname(user) / "adapter")
        trained, merged = tiny.dense_updates(own), tiny.dense_updates(mean)
        for name, update in trained.items():  # what was trained on top has rank 4
            sizes = torch.linalg.svdvals(update - merged[name])
            assert sizes[3] > 1e-4 and sizes[4] < 1e-5 * sizes[0].clamp(min=1)


@pytest.mark.parametrize("method", ["oppu", "mta"])
def test_users_alone_come_out_as_users_together(inside: Path, method: str) -> None:
    stage(method, "--users_per_batch", "1", "--user_idxs", "1-3", "--output_dir", f"alone/{method}")
    together, alone = world.results(FOLDERS[method]), world.results(f"alone/{method}")
    assert len(alone) == 2
    for user, own in alone.items():
        assert own["losses"] == together[user]["losses"]
        assert own["record_ids"] == together[user]["record_ids"] and own["deployed"] == together[user]["deployed"]


def test_a_lost_user_comes_back_byte_for_byte_and_others_are_left_alone(inside: Path) -> None:
    before = world.results(FOLDERS["mta"])
    lost, *kept = (inside / FOLDERS["mta"] / "users" / user_dirname(user) for user in before)
    weights, times = (lost / "adapter/adapter_model.safetensors").read_bytes(), [p.stat().st_mtime_ns for p in kept]
    (lost / "result.json").unlink()
    stage("mta")
    assert world.results(FOLDERS["mta"]) == before
    assert (lost / "adapter/adapter_model.safetensors").read_bytes() == weights
    assert [p.stat().st_mtime_ns for p in kept] == times


def test_other_settings_are_refused_by_name(inside: Path) -> None:
    with pytest.raises(InputError, match="lr: there 0.005, now 0.5"):
        stage("oppu", "--lr", "0.5")
    with pytest.raises(InputError, match="method: there 'oppu', now 'mta'"):
        stage("mta", "--output_dir", FOLDERS["oppu"])


def test_a_user_without_history_keeps_the_base_or_the_merge(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = inside / f"data/{TASK}/test_100/user_test_100.json"
    before, users = path.read_bytes(), world.read(path)
    users[0]["profile"] = []
    try:
        world.write(path, users)
        for method in ("oppu", "mta"):
            stage(method, "--user_idxs", "0-1", "--output_dir", f"empty/{method}")
    finally:
        path.write_bytes(before)
    assert f"user {users[0]['user_id']}: an empty history" in capsys.readouterr().err
    (result,) = world.results("empty/oppu").values()
    base = world.results(f"output/{TASK}/task-base_LLM")[result["user_id"]]["predictions"]["task_lora"]
    assert result["losses"] == [] and result["predictions"]["oppu"]["k0"] == base["k0"]


@pytest.mark.slow
def test_mta_is_attacked_by_its_sharers(inside: Path) -> None:
    attack = ["mia.py", *ADAPTED, "--anchor_dir", f"output/{TASK}/Anchor_PEFT/LoRA", "--max_records", "2", "--exp_dir"]
    world.run([*attack, FOLDERS["mta"], "--skip_sharers"])
    short = world.read(inside / FOLDERS["mta"] / "mia_summary.json")
    assert short["method"] == "mta" and short["sharers"] == {"users": 0, "attacks": {}, "sets": {}}
    world.run([*attack, FOLDERS["mta"]])  # the sharers may come later
    whole = world.read(inside / FOLDERS["mta"] / "mia_summary.json")
    assert whole["sharers"]["users"] == 6 and whole["attacks"] == short["attacks"]
    for key, entry in world.read(inside / FOLDERS["mta"] / "mia_results.json").items():
        assert entry["member_ids"] == world.results(FOLDERS["mta"])[key.rpartition("-")[0]]["sharers"]
        assert len(entry["non_member_ids"]) == 4


@pytest.mark.slow
def test_oppus_members_are_the_users_own_records(inside: Path) -> None:
    stage("oppu", "--holdout", "0.4", "--output_dir", "held-out/oppu")
    world.run(["mia.py", *ADAPTED, "--anchor_dir", "not-read", "--exp_dir", "held-out/oppu"])
    found = world.results("held-out/oppu")
    assert all(len(own["held_out_ids"]) == 2 for own in found.values())
    summary = world.read(inside / "held-out/oppu/mia_summary.json")
    assert (summary["method"], summary["users"], summary["sharers"]["users"]) == ("oppu", 3, 0)
    assert set(summary["sets"]) == {"published", "controlled", "user"}
    for key, entry in world.read(inside / "held-out/oppu/mia_results.json").items():
        user = key.rpartition("-")[0]
        assert entry["member_ids"] == [user] and set(entry["non_member_ids"]) == set(found) - {user}
        assert entry["member_num_samples"] == [len(found[user]["record_ids"])]
