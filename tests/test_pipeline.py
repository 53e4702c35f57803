"""The stages in a row, on a small cut of the demo world: the announcement's commands, and the promises of a run."""
import json
import shutil
import sys
import warnings
from pathlib import Path
from unittest.mock import Mock

import lamp_world
import meta_world
import pytest
import torch
import world
from peft import PeftModel
from transformers import AutoModelForCausalLM

from experiments import ablation, demo_runs, sweep
from prime import cli
from prime.bank.encoding import Encoder
from prime.bank.lora import Adapter, merge
from prime.checkpoints.loading import load_tokenizer
from prime.checkpoints.peft import load_adapter, save_adapter
from prime.errors import InputError
from prime.merging.optimizer import ranked_weights
from prime.merging.population import Setup, fitness_records
from prime.merging.sharers import adapter_folder
from prime.runs.run import user_dirname
from prime.settings import FitnessSettings, SamplingSettings, SearchSettings
from prime.users.data import load_users
from prime.users.prompts import history_records
from prime.users.tasks import TASKS
from prime.users.texts import Texts, asked_as_queries, load_test_users, load_texts
from tests import tiny

pytestmark = pytest.mark.slow  # the whole pipeline is run before the first test

TASK = "movie_tagging"
EVO = f"./output/{TASK}/LoRA-Composition-evo"
ANCHORS = f"./output/{TASK}/Anchor_PEFT/LoRA"
QUICK = {
    "task_lora.py": ["--epochs", "1", "--lr", "5e-3", "--k_list", "1"],
    "history_anchor.py": ["--encoder", world.CHECKPOINT, "--k", "6"],
    "train_anchor_peft.py": ["--epochs", "1", "--lr", "5e-3"],
    "train_anchor_gate.py": ["--max_step", "3"],
    "lora_composition.py": ["--k_list", "1"],
    "lora_composition_evo.py": ["--k_list", "1"],
    "mia.py": ["--max_records", "8"],
}


def quick(words: list[str]) -> list[str]:
    """An announced command with the options that make it quick here."""
    return [*words, *QUICK.get(words[0], [])]


def command(name: str) -> list[str]:
    """The announcement's first command of a script, made quick."""
    return quick(next(words for words in world.announcement() if words[0] == name))


def evo(output: str, *options: str) -> list[str]:
    """The search as announced, into another folder."""
    words = command("lora_composition_evo.py")
    words[words.index("--output_dir") + 1] = output
    return [*words, *options]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory):
    """A folder in which stages 1 to 6 have run by the announcement's commands."""
    folder = tmp_path_factory.mktemp("pipeline")
    world.build(folder, test_users=4)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for words in world.announcement():
            world.run(quick(words))
        world.run(["postprocess.py", "--task_name", TASK, "--output_dir", EVO])  # the table, now with the attacks
        yield folder


def test_every_published_file_is_there(inside: Path) -> None:
    users = [user["user_id"] for user in world.read(inside / f"data/{TASK}/test_100/user_test_100.json")]
    for name in ("output-k0", "output-k0-profile", "output-k1", "output-k1-profile"):
        output = world.read(inside / EVO / f"{name}.json")
        assert output["task"] == "LaMP_2M" and len(output["golds"]) == 3 * len(users)
        assert set(output["golds"][0]) == {"id", "output"}
    assert set(world.read(inside / EVO / "eval-k0.json")) >= {"accuracy", "f1"}
    mia = world.read(inside / EVO / "mia_results.json")
    assert set(world.read(inside / f"output/{TASK}/LoRA-Composition/mia_results.json")) == set(mia)
    assert set(mia) == {f"{user}-{index}" for index, user in enumerate(users)}
    keys = {f"{side}_{what}" for side in ("member", "non_member") for what in ("ids", "num_samples", "loss")}
    assert all(set(entry) == keys for entry in mia.values())


def test_summary_has_every_method_and_mia_has_its_blind_baseline(inside: Path) -> None:
    summary = world.read(inside / f"output/{TASK}/summary.json")
    rows = {(row["method"], row["k"], row["profile"]) for row in summary["rows"]}
    assert {m for m, _, _ in rows} >= {"base", "rag", "task_lora", "best_sharer", "uniform", "prime", "per_pcs"}
    assert ("prime", 0, False) in rows and ("prime", 1, True) in rows
    for row in summary["rows"]:
        assert row["accuracy"]["low"] <= row["accuracy"]["mean"] <= row["accuracy"]["high"]


def test_result_reports_the_best_evaluated_candidate(inside: Path) -> None:
    for user_id, result in world.results(EVO).items():
        lines = (inside / EVO / "users" / user_dirname(user_id) / "evaluations.jsonl").read_text().splitlines()
        evaluated = [json.loads(line) for line in lines]
        assert [one["origin"] for one in evaluated] == ["base"] + ["sharer"] * 3 + ["start"] + ["search"] * 10
        ranked = ranked_weights([one["loss"] for one in evaluated[1:4]])
        assert evaluated[4]["weights"] == pytest.approx(ranked, abs=1e-6)
        best = min(evaluated, key=lambda one: one["loss"])
        assert (result["loss"], result["weights"]) == (best["loss"], best["weights"])
        assert (result["deployed"] == "base") == (best["origin"] == "base")


def origins(folder: str, user_id: str) -> list[str]:
    lines = (Path(folder) / "users" / user_dirname(user_id) / "evaluations.jsonl").read_text().splitlines()
    return [json.loads(line)["origin"] for line in lines]


def test_the_published_start_is_the_base_and_the_uniform_one_is_evaluated(inside: Path) -> None:
    for start, counted in (("zero", 0), ("uniform", 1)):
        world.run(evo(f"./output/start-{start}", "--user_idxs", "0-1", "--start", start))
        ((user_id, _),) = world.results(f"./output/start-{start}").items()
        found = origins(f"./output/start-{start}", user_id)
        assert found == ["base"] + ["sharer"] * 3 + ["start"] * counted + ["search"] * 10


def test_fitness_by_queries_finds_the_same_where_history_and_test_ask_the_same(inside: Path) -> None:
    """One item has no record that shows history, so greedy answers to it are the same by either name."""
    for fitness in ("query", "history"):
        words = ["--user_idxs", "0-2", "--fitness", fitness, "--recent_k", "1", "--temperature", "0"]
        world.run(evo(f"./output/{fitness}", *words))
    assert world.results("./output/query") == world.results("./output/history")


def test_fitness_by_queries_counts_records_and_metrics_of_the_test() -> None:
    texts = asked_as_queries(world.DEMO / "citation", Texts(TASKS["citation"], TASKS["citation"].templates, None))
    assert texts.task.history_metrics == ("accuracy", "f1") and texts.task.history_labels == ("[1]", "[2]")
    user = load_users(world.DEMO / "citation/test_100/user_test_100.json", texts.task)[0]
    fitness = FitnessSettings(fitness="query")
    setup = Setup(SearchSettings(), fitness, SamplingSettings(), 5, texts, Mock())
    records = fitness_records(setup, user, seed=1)
    assert [record.id for record in records] == [f"u{user.user_id}-{item['id']}-q" for item in user.profile[-5:]]
    assert all(f" [{i}]: " in record.input for record in records for i in (1, 2))
    assert {record.target for record in records} <= {" [1]", " [2]"}


def test_deployed_adapter_is_the_merge_of_the_named_sharers(inside: Path) -> None:
    for user_id, result in world.results(EVO).items():
        if result["deployed"] == "base":
            continue
        shared = [load_adapter(adapter_folder(ANCHORS, sharer)) for sharer in result["sharers"]]
        expected = merge(shared, torch.tensor(result["weights"]), result["rule"])
        found = load_adapter(inside / EVO / "users" / user_dirname(user_id) / "adapter")
        for name, (a, b) in found.folded().factors.items():
            torch.testing.assert_close(b @ a, expected.factors[name][1] @ expected.factors[name][0])


@pytest.mark.slow
def test_held_out_items_are_in_neither_adapter_nor_gate_and_are_attacked_as_non_members(inside: Path) -> None:
    anchors, gates, search = ("./output/held-out/" + name for name in ("anchors", "gates", "search"))
    world.run([*command("train_anchor_peft.py"), "--holdout", "0.25", "--output_dir", anchors])
    whole, words = world.results(ANCHORS), command("train_anchor_gate.py")
    words[words.index("--anchor_path") + 1] = anchors
    world.run([*words, "--output_dir", gates])
    found = world.results(anchors)
    for user_id, own in found.items():
        out = [name for name in whole[user_id]["record_ids"] if name.split("-")[1] in own["held_out_ids"]]
        assert len(own["held_out_ids"]) == 3 and not {name.split("-")[1] for name in own["record_ids"]} & set(out)
        assert set(own["record_ids"]) <= set(whole[user_id]["record_ids"]) - set(out)
        assert world.results(gates)[user_id]["record_ids"] == own["record_ids"]
        assert world.read(adapter_folder(anchors, user_id) / "card.json")["held_out_ids"] == own["held_out_ids"]
    words = evo(search, "--user_idxs", "0-3")
    words[words.index("--anchor_dir") + 1] = anchors
    world.run(words)
    attack = next(words for words in world.announcement() if words[0] == "mia.py" and words[-1] == EVO)
    attack[attack.index("--exp_dir") + 1], attack[attack.index("--anchor_dir") + 1] = search, anchors
    world.run([*attack, "--skip_sharers"])
    summary = world.read(Path(search) / "mia_summary.json")
    trained = [len(found[name]["record_ids"]) for own in world.results(search).values() for name in own["sharers"]]
    controlled = summary["sets"]["controlled"]
    assert controlled["members"] == summary["sets"]["published"]["members"] <= sum(trained)
    assert set(controlled["attacks"]) == set(summary["attacks"]) and controlled["non_members"] > 0
    white_box = summary["white_box"]
    for own in map(world.read, Path(search).glob("mia/users/*/result.json")):
        assert own["on_base"] == (not own["white_box"])  # the file as it is, is what the controlled set attacks
        whole = own["white_box"].get("whole", {}).get("scores", {}).get("calibrated", {})
        assert whole.items() <= own["scores"]["calibrated"].items()
    assert white_box["whole"]["cosine"] > 0
    curves = world.read(Path(search) / "mia_roc.json")["curves"]
    assert {(c["set"], c["model"]) for c in curves} == {
        (name, model) for name in ("published", "controlled", "user") for model in ("deployed", "base")
    }
    assert all(len(c["fpr"]) == len(c["tpr"]) <= 200 and (c["fpr"][-1], c["tpr"][-1]) == (1, 1) for c in curves)
    assert all((Path(search) / f"mia_roc.{kind}").stat().st_size > 1000 for kind in ("png", "svg"))


def test_users_in_parts_give_the_files_that_all_at_once_give(inside: Path) -> None:
    world.run(evo("./output/part", "--user_idxs", "1-3"))
    whole, part = world.results(EVO), world.results("./output/part")
    assert len(part) == 2
    assert all(part[user] == whole[user] for user in part)
    for user in part:
        mine, theirs = (adapter_folder(folder, user) / "adapter_model.safetensors" for folder in ("./output/part", EVO))
        assert mine.exists() == theirs.exists() and (not mine.exists() or mine.read_bytes() == theirs.read_bytes())


def test_settings_of_a_search_matter_only_where_they_should(inside: Path) -> None:
    """Another token budget changes nothing."""
    world.run(evo("./output/tokens", "--user_idxs", "1-2", "--max_batch_tokens", "300"))
    whole, part = world.results(EVO), world.results("./output/tokens")
    assert all(part[user] == whole[user] for user in part) and len(part) == 1


def test_resuming_under_other_settings_is_refused_by_name(inside: Path) -> None:
    before = world.results(EVO)
    with pytest.raises(InputError, match=r"sim_penalty: there 0\.1, now 0\.7"):
        world.run([*command("lora_composition_evo.py"), "--sim_penalty", "0.7"])
    assert world.results(EVO) == before


class Computes(Exception):
    """The stage found all it needs."""


@pytest.mark.parametrize("name", [name for name in QUICK if name != "history_anchor.py"])
def test_a_wrong_model_path_does_not_bind_the_folder(inside: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The run is opened before the model loads; the corrected command goes on there."""
    words, folder = command(name), Path("./output/failed") / name
    if name == "mia.py":
        shutil.copytree(EVO, folder, ignore=shutil.ignore_patterns("mia*"))
    option = "--exp_dir" if name == "mia.py" else "--output_dir"
    place = words.index(option) + 1 if option in words else len(words)
    words[place - 1 : place + 1] = [option, str(folder)]
    with pytest.raises(InputError, match="wrong: no such model directory"):
        world.run([*words, "--llama_model_path", "./llama/wrong"])
    assert list(folder.rglob("settings.json"))
    monkeypatch.setattr(world.script(name), "load_engine", Mock(side_effect=Computes))
    with pytest.raises(Computes):
        world.run(words)


def test_runs_made_before_an_option_came_resume_without_it(inside: Path) -> None:
    """Options of later days are away from the record; with their defaults, nothing is computed again."""
    own = Path("./output/older")
    shutil.copytree(ANCHORS, own)
    record = world.read(own / "settings.json")
    later = ("holdout", "enable_dp", "epsilon", "sigma", "delta", "max_per_sample_grad_norm", "accountant")
    for key in later:
        del record["settings"][key]
    world.write(own / "settings.json", record)
    words = [*command("train_anchor_peft.py"), "--output_dir", str(own)]
    world.run(words)
    with pytest.raises(InputError, match=r"other settings:\n  holdout: there 0.0, now 0.2\nUse another"):
        world.run([*words, "--holdout", "0.2"])
    assert world.read(own / "settings.json") == record


def test_full_adapters_are_exported_of_finished_users_and_cards_hold_the_attack(inside: Path) -> None:
    """As a second step: nothing is searched again."""
    before = world.results(EVO)
    world.run([*command("lora_composition_evo.py"), "--export_full"])
    assert world.results(EVO) == before
    task = load_adapter(f"./output/{TASK}/task-base_LLM")
    for user_id, result in before.items():
        folder = inside / EVO / "users" / user_dirname(user_id)
        expected = task.factors
        if result["deployed"] != "base":
            expected = merge([task, load_adapter(folder / "adapter")], torch.ones(2), "delta").factors
            assert world.read(folder / "adapter" / "card.json")["attack"]
        found = load_adapter(folder / "adapter_full").folded().factors
        for name, (a, b) in found.items():
            torch.testing.assert_close(b @ a, expected[name][1] @ expected[name][0])


def test_finished_users_are_left_alone_and_lost_ones_come_back_the_same(inside: Path) -> None:
    paths = sorted(Path(EVO).glob("users/*/result.json"))
    kept, before = paths[0].stat().st_mtime_ns, world.results(EVO)
    paths[1].unlink()
    world.run(command("lora_composition_evo.py"))
    assert paths[0].stat().st_mtime_ns == kept and world.results(EVO) == before


def test_poisoned_golds_change_nothing_in_the_search(inside: Path) -> None:
    path = inside / f"data/{TASK}/test_100/user_test_100.json"
    before = path.read_bytes()
    users = json.loads(before)
    for user in users:
        for query in user["query"]:
            query["gold"] = "poison"
    try:
        world.write(path, users)
        world.run(evo("./output/poisoned", "--user_idxs", "0-2"))
    finally:
        path.write_bytes(before)
    whole, poisoned = world.results(EVO), world.results("./output/poisoned")
    assert len(poisoned) == 2 and all(poisoned[user] == whole[user] for user in poisoned)


@pytest.mark.slow
def test_where_the_base_wins_the_base_is_deployed_predicted_and_attacked(inside: Path) -> None:
    """Sharers that answer garbage lose to the base; so does every mixture of them."""
    good, bad = Path(ANCHORS), Path("./output/garbage")
    stream = torch.Generator().manual_seed(0)
    for result in world.results(good).values():
        name = user_dirname(result["user_id"])
        own = load_adapter(good / "users" / name / "adapter").factors
        noise = {
            module: (torch.randn(a.shape, generator=stream), 5 * torch.randn(b.shape, generator=stream))
            for module, (a, b) in own.items()
        }
        save_adapter(Adapter(noise), bad / "users" / name / "adapter", "base")
        world.write(bad / "users" / name / "result.json", result)
    world.write(bad / "settings.json", world.read(good / "settings.json"))
    words = evo("./output/base-wins", "--user_idxs", "0-1", "--sim_penalty", "0")
    words[words.index("--anchor_dir") + 1] = str(bad)
    world.run(words)
    (result,) = world.results("./output/base-wins").values()
    assert result["deployed"] == "base" and result["weights"] == [0.0, 0.0, 0.0]
    assert not list(Path("./output/base-wins").glob("users/*/adapter"))
    untouched = world.results(f"./output/{TASK}/task-base_LLM")[result["user_id"]]["predictions"]["task_lora"]
    assert result["predictions"]["prime"] == untouched
    attack = next(words for words in world.announcement() if words[0] == "mia.py" and words[-1] == EVO)
    attack[attack.index("--exp_dir") + 1] = "./output/base-wins"
    attack[attack.index("--anchor_dir") + 1] = str(bad)
    world.run(quick(attack))
    per_user = world.read(next(Path("./output/base-wins/mia/users").glob("*/result.json")))
    assert per_user["scores"] == per_user["blind"]


@pytest.mark.parametrize(("objective", "name"), [("metric", "prime"), ("nll", "lorahub")])
def test_a_user_without_history_gets_the_base(
    inside: Path, capsys: pytest.CaptureFixture[str], objective: str, name: str
) -> None:
    path = inside / f"data/{TASK}/test_100/user_test_100.json"
    before = path.read_bytes()
    users = json.loads(before)
    users[0]["profile"] = []
    try:
        world.write(path, users)
        world.run(evo(f"./output/no-history-{name}", "--user_idxs", "0-1", "--objective", objective))
    finally:
        path.write_bytes(before)
    (result,) = world.results(f"./output/no-history-{name}").values()
    assert result["deployed"] == "base" and len(result["predictions"][name]["k0"]) == 3
    assert f"user {users[0]['user_id']}: an empty history" in capsys.readouterr().err


def test_an_anchor_without_adapter_is_named(inside: Path, tmp_path: Path) -> None:
    words = evo(str(tmp_path / "out"))
    words[words.index("--anchor_dir") + 1] = str(tmp_path / "nothing")
    with pytest.raises(InputError, match="no adapter of 6 anchors"):
        world.run(words)


def test_results_of_other_users_are_refused(inside: Path, tmp_path: Path) -> None:
    test = inside / f"data/{TASK}/test_100"
    strangers = [dict(user, user_id=f"x{user['user_id']}") for user in world.read(test / "user_test_100.json")]
    world.write(tmp_path / "test_100/user_test_100.json", strangers)
    world.write(tmp_path / "test_100/user_test_100_label.json", world.read(test / "user_test_100_label.json"))
    words = ["postprocess.py", "--task_name", TASK, "--output_dir", EVO, "--data_dir", str(tmp_path)]
    with pytest.raises(InputError, match="none of its 4 users has a prediction"):
        world.run(words)


def test_bad_input_is_one_message_and_exit_code_2(
    inside: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    path = inside / f"data/{TASK}/user_anchor_candidate.json"
    before = path.read_bytes()
    users = json.loads(before)
    del users[1]["profile"][3]["tag"]
    users[2]["profile"][0]["description"] = None
    try:
        world.write(path, users)
        with monkeypatch.context() as patch, pytest.raises(SystemExit) as stopped:
            patch.setattr(sys, "argv", command("lora_composition_evo.py"))
            for of_the_process in ("stop_between_writes", "keep_freed_memory"):
                patch.setattr(cli, of_the_process, lambda: None)
            cli.run(world.script("lora_composition_evo.py").main)
    finally:
        path.write_bytes(before)
    message = capfd.readouterr().err
    assert stopped.value.code == 2 and "Traceback" not in message
    assert f"user {users[1]['user_id']}: item 3: field 'tag' is missing" in message
    assert f"user {users[2]['user_id']}: item 0: field 'description'" in message


@pytest.mark.parametrize("rule", ["factor", "delta"])
def test_lorahubs_losses_are_cross_entropies_of_each_record(inside: Path, rule: str) -> None:
    """Against a plain model that carries each candidate in its weights, one record at a time."""
    words = evo(f"./output/lorahub-{rule}", "--objective", "nll", "--user_idxs", "0-1", "--merge_rule", rule)
    world.run(words)
    (result,) = world.results(f"./output/lorahub-{rule}").values()
    assert set(result["predictions"]) == {"lorahub"} and result["similarity"] == 0
    settings = world.read(inside / f"output/lorahub-{rule}/settings.json")
    assert settings["method"] == "lorahub" and settings["settings"]["sim_penalty"] == 0
    base = AutoModelForCausalLM.from_pretrained(world.CHECKPOINT, dtype=torch.float32)
    base = PeftModel.from_pretrained(base, f"output/{TASK}/task-base_LLM").merge_and_unload().eval()
    settings = world.settings(words)
    texts = load_texts(settings.data.folder, TASK, None)
    user = load_test_users(settings.data.folder, texts.task)[0]
    profile = texts.profile_of(user.user_id)
    records = history_records(user, texts.task, texts.templates, profile, settings.prompts.recent_k)
    encoder = Encoder(load_tokenizer(world.CHECKPOINT), settings.prompts.max_length)
    shared = [load_adapter(adapter_folder(ANCHORS, sharer)) for sharer in result["sharers"]]
    lines = (inside / f"output/lorahub-{rule}/users" / user_dirname(user.user_id) / "evaluations.jsonl").read_text()
    evaluated = [json.loads(line) for line in lines.splitlines()]
    assert len(evaluated) == 1 + 3 + 1 + 10 and result["loss"] == min(one["loss"] for one in evaluated)
    for one in [*evaluated[:2], *evaluated[-3:]]:
        w = torch.tensor(one["weights"])
        model = tiny.with_updates(base, tiny.dense_updates(merge(shared, w, rule)))
        losses = []
        for record in records:
            own = encoder.record(record.id, record.input, record.target)
            ids = torch.tensor([[*own.ids, *own.target]])
            labels = torch.tensor([[-100] * len(own.ids) + [*own.target]])
            with torch.inference_mode():
                losses.append(float(model(input_ids=ids, labels=labels).loss))
        assert one["unpenalised"] == pytest.approx(sum(losses) / len(losses), abs=1e-4)
        assert one["loss"] == pytest.approx(one["unpenalised"] + 0.05 * float(w.abs().mean()), abs=1e-6)


def test_a_named_row_comes_without_the_baselines(inside: Path) -> None:
    """The published settings beside ours: the same search, chosen and told otherwise."""
    world.run(evo("./output/named", "--user_idxs", "0-1", "--search_only", "--name", "prime_published"))
    (result,) = world.results("./output/named").values()
    assert set(result["predictions"]) == {"prime_published"} and result["origin"] != "sharer"
    assert world.read(inside / "output/named/settings.json")["method"] == "prime_published"
    with pytest.raises(InputError, match="name: there 'prime_published', now 'prime'"):
        world.run(evo("./output/named", "--search_only"))
    for name in ("uniform", "best sharer"):
        with pytest.raises(SystemExit):
            world.run(evo("./output/other", "--name", name))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "start"), [("best_sharer", 0), ("uniform", 1)])
def test_a_baseline_is_deployed_as_a_run_that_can_be_attacked(inside: Path, name: str, start: int) -> None:
    """It answers as the row that comes with PriME, and the attack's members are the sharers that are in it."""
    folder = inside / f"output/{name}"
    world.run(evo(f"./output/{name}", "--baseline", name, "--user_idxs", "0-2"))
    beside = world.results(EVO)
    for user_id, result in world.results(folder).items():
        assert result["predictions"] == {name: beside[user_id]["predictions"][name]}
        weights = {sharer: float(sharer == result["best_sharer"]) for sharer in result["sharers"]}
        weights = weights if name == "best_sharer" else dict.fromkeys(weights, pytest.approx(1 / 3))
        assert dict(zip(result["sharers"], result["weights"], strict=True)) == weights
        own = folder / "users" / user_dirname(user_id)
        assert len((own / "evaluations.jsonl").read_text().splitlines()) == 1 + 3 + start
        shared = [load_adapter(adapter_folder(ANCHORS, sharer)) for sharer in result["sharers"]]
        expected = tiny.dense_updates(merge(shared, torch.tensor(result["weights"]), "delta"))
        for module, update in tiny.dense_updates(load_adapter(own / "adapter")).items():
            torch.testing.assert_close(update, expected[module])
    words = command("mia.py")
    words[words.index("--exp_dir") + 1] = str(folder)
    world.run([*words, "--skip_sharers"])
    attacked = world.read(folder / "mia_summary.json")
    assert attacked["method"] == name and attacked["on_base"] == 0
    attacked = world.results(folder / "mia")
    for user_id, result in world.results(folder).items():
        merged = [sharer for sharer, weight in zip(result["sharers"], result["weights"], strict=True) if weight]
        assert attacked.pop(user_id)["member_ids"] == merged
    assert attacked == {}


@pytest.mark.slow
@pytest.mark.parametrize("task", ["citation", "news_headline", "product_rating", "scholarly_title", "tweet_paraphrase"])
def test_the_other_tasks_run_too(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world.build(tmp_path, task, test_users=2, anchors=4)
    monkeypatch.chdir(tmp_path)
    for words in world.announcement():
        named = [word.replace(TASK, task) for word in quick(words)]
        world.run([*named, *(["--k", "4"] if words[0] == "history_anchor.py" else [])])
    summary = world.read(tmp_path / f"output/{task}/summary.json")
    assert {row["method"] for row in summary["rows"]} >= {"base", "task_lora", "prime"}


@pytest.mark.slow
def test_imported_published_adapters_are_merged_and_attacked_as_the_same_ones_of_stage_3(inside: Path) -> None:
    config = world.read(inside / world.CHECKPOINT / "config.json")
    heads = {"q": config["num_attention_heads"], "k": config["num_key_value_heads"]}
    imported, search = Path("./output/imported"), "./output/with-imported"
    for user_id in world.results(ANCHORS):
        tensors = meta_world.as_published(load_adapter(adapter_folder(ANCHORS, user_id)), heads)
        folder = adapter_folder(imported, user_id)
        folder.mkdir(parents=True)
        torch.save(tensors, folder / "lora_ckpt.pt")
    words = evo(search)
    words[words.index("--anchor_dir") + 1] = str(imported)
    world.run(words)
    assert world.results(search) == world.results(EVO)
    attack = quick(next(words for words in world.announcement() if words[0] == "mia.py" and words[-1] == EVO))
    attack[attack.index("--exp_dir") + 1], attack[attack.index("--anchor_dir") + 1] = search, str(imported)
    world.run(attack)
    assert world.read(Path(search) / "mia_results.json") == world.read(inside / EVO / "mia_results.json")
    words = command("train_anchor_gate.py")
    words[words.index("--anchor_path") + 1] = str(imported)
    world.run([*words, "--output_dir", "./output/imported-gates"])
    assert len(world.results("./output/imported-gates")) == len(world.results(ANCHORS))


@pytest.mark.slow
def test_several_penalties_in_one_run_are_lone_runs_bit_for_bit(inside: Path) -> None:
    """penalty-0.1 of a frontier is the announced run: results, adapters, evaluations and settings; mia.py takes it."""
    words = command("lora_composition_evo.py")
    words[words.index("--sim_penalty") + 1] = "0,0.1,1"
    words[words.index("--output_dir") + 1] = f"./output/{TASK}/Frontier"
    world.run(words)
    own = Path(f"./output/{TASK}/Frontier/penalty-0.1")
    assert world.results(own) == world.results(EVO)
    settings = {"penalty-0": 0.0, "penalty-0.1": 0.1, "penalty-1": 1.0}
    assert sorted(path.name for path in own.parent.iterdir()) == sorted(settings)
    assert world.read(own / "settings.json") == world.read(Path(EVO) / "settings.json")
    for name, penalty in settings.items():
        assert world.read(own.parent / name / "settings.json")["settings"]["sim_penalty"] == penalty
    for user_id in world.results(EVO):
        folder = Path("users") / user_dirname(user_id)
        one, other = (world.entries(root / folder / "evaluations.jsonl") for root in (own, Path(EVO)))
        assert one == other
        adapters = [root / folder / "adapter" / "adapter_model.safetensors" for root in (own, Path(EVO))]
        assert [a.read_bytes() if a.exists() else b"" for a in adapters[:1]] == [
            a.read_bytes() if a.exists() else b"" for a in adapters[1:]
        ]
    attack = quick(next(words for words in world.announcement() if words[0] == "mia.py"))
    attack[attack.index("--exp_dir") + 1] = str(own)
    world.run(attack)
    assert world.read(own / "mia_summary.json")["attacks"] == world.read(Path(EVO) / "mia_summary.json")["attacks"]
    world.run(["postprocess.py", "--task_name", TASK, "--output_dir", str(own.parent)])
    points = {one["label"]: one for one in world.read(own.parent / "frontier.json")["points"]}
    lone = next(row for row in world.read(inside / f"output/{TASK}/summary.json")["rows"] if row["method"] == "prime")
    assert points["penalty 0.1"]["accuracy"] == lone["accuracy"] and points["penalty 0.1"]["auroc"]
    assert {"Per-Pcs", "uniform average", "best sharer (AUROC: of all sharers)", "base"} <= points.keys()


@pytest.mark.slow
def test_official_lamp_files_run_through_every_stage_without_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a download to the table: prepare_data.py, gen_profile.py, then the announcement's commands."""
    lamp_world.of_the_demo(TASK, world.DEMO / TASK).write(tmp_path / "lamp" / "LaMP_2")
    shutil.copytree(world.DEMO / "model", tmp_path / world.CHECKPOINT)
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        world.run(["prepare_data.py", "--task_name", TASK, "--lamp_dir", "./lamp/LaMP_2", "--test_users", "3"])
        world.run(["gen_profile.py", "--task_name", TASK, "--rule"])
        for words in world.announcement():
            world.run([*quick(words), *(["--k", "4"] if words[0] == "history_anchor.py" else [])])
    assert capsys.readouterr().err == ""
    summary = world.read(tmp_path / f"output/{TASK}/summary.json")
    assert {row["method"] for row in summary["rows"]} >= {"base", "task_lora", "prime", "per_pcs"}
    assert all(counts == {"present": 3, "expected": 3} for counts in summary["users"].values())


@pytest.mark.slow
def test_the_arms_of_the_ablation_are_what_stage_4_gives_with_their_options(inside: Path) -> None:
    words = evo("./output/arm", "--user_idxs", "0-1")
    start = demo_runs.start_of(cli.parse(world.script(words[0]).Settings, None, words[1:]))
    found = ablation.run_one(start, users=1)
    assert found["answers"].keys() == found["origins"].keys() == set(ablation.ROWS) and 0 < found["same"][0] <= 1
    options = {
        "prime": [], "no search": ["--opt_budget", "0"], "budget 30": ["--opt_budget", "30"],
        "start uniform": ["--start", "uniform"], "rule factor": ["--merge_rule", "factor"],
        "as published": ["--as_published"],
        "4 draws of each answer": ["--num_repeat", "4"], "the other fitness": ["--fitness", "query"],
        "by likelihood": ["--objective", "nll", "--name", "prime"],
    }  # fmt: skip
    for place, (name, more) in enumerate(options.items()):
        words[words.index("--output_dir") + 1] = f"./output/arm-{place}"
        world.run([*words, *more])
        ((user_id, result),) = world.results(f"./output/arm-{place}").items()
        assert found["answers"][name] == {user_id: result["predictions"]["prime"]["k0"]}, name
        assert found["origins"][name] == {result["origin"]: 1}, name
    asked = [sample["id"] for sample in found["answers"]["prime"][user_id]]
    by_test = found["answers"][ablation.CHOSEN_BY_TEST][user_id]
    assert sorted(sample["id"] for sample in by_test) == sorted(asked)
    assert sum(found["origins"][ablation.CHOSEN_BY_TEST].values()) == 2


@pytest.mark.slow
def test_a_sweep_is_stage_4_at_each_value(
    inside: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = evo("./unused")[1:]
    del words[words.index("--output_dir") : words.index("--output_dir") + 2]
    monkeypatch.setattr(demo_runs, "trained", lambda *_: Path("./output/swept"))
    monkeypatch.setattr(demo_runs, "search_options", lambda *_: words)
    sweep.main(["--vary", "sharers", "--values", "nearest,noise", "--tasks", TASK, "--users", "2",
                "--output_dir", "./output/sweep"])  # fmt: skip
    swept, whole = world.results("./output/swept/sweep/sharers-nearest"), world.results(EVO)
    assert len(swept) == 2 and all(swept[user] == whole[user] for user in swept)
    table = world.read(Path("./output/sweep/sweep-sharers.json"))["tasks"][TASK]
    assert table["nearest"]["paired"]["equal"] == 2 and set(table) == {"nearest", "noise"}
    assert "| noise |" in capsys.readouterr().out
    assert Path(f"./output/sweep/sweep-sharers-{TASK}.svg").stat().st_size > 1000
