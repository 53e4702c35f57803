"""Results belong to their inputs: what has changed is named, --refresh makes again what depends on it and no more, and
then everything is as a fresh run makes it.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import kills
import pytest
import torch
import world
from safetensors.torch import load_file, save_file

from prime.errors import InputError
from prime.runs import inputs as module
from prime.runs import machine
from prime.runs.inputs import Inputs, Source, file_digest, folder_digest
from prime.runs.run import Run, user_dirname
from prime.users.tasks import TASKS

# -- the record, without any model ----------------------------------------------------------------------------------


def read_by(digests: dict[str, str]) -> dict[str, Source]:
    return {what: Source(digest, f"{what}.json") for what, digest in digests.items()}


def opened(root: Path, model: str, refresh: bool = False, products: tuple[str, ...] = (), **users: str) -> Run:
    """A run whose results depend on a model, and each user's on a history."""
    by_user = {}
    for place, (user_id, history) in enumerate(users.items()):
        by_user[user_id] = read_by({"place": str(place), "history": history})
    found = Inputs(read_by({"model": model}), by_user, products)
    return Run(root, "stage", "prime", {"seed": 0}, inputs=found, refresh=refresh)


def finish(run: Run, *user_ids: str) -> None:
    for user_id in user_ids:
        run.finish(user_id, {"user_id": user_id, "index": int(run.inputs.of(user_id)["place"].digest)})
        (run.user_dir(user_id) / "adapter").mkdir(exist_ok=True)
        (run.user_dir(user_id) / "adapter" / "x.safetensors").write_text("made of them")


def test_one_users_change_is_named_and_only_he_is_made_again(tmp_path: Path) -> None:
    finish(opened(tmp_path, "m1", a="1", b="2", c="3"), "a", "b")
    assert opened(tmp_path, "m1", a="1", b="2", c="changed, but not finished").done("a")
    with pytest.raises(InputError) as error:
        opened(tmp_path, "m1", a="1", b="5", c="3")
    told = str(error.value)
    assert "\n  user b: history: there 2, now 5 (history.json)\n" in told and "user a" not in told
    assert "--refresh makes again what depends on them (1 users)" in told
    again = opened(tmp_path, "m1", refresh=True, a="1", b="5", c="3")
    assert again.done("a") and not again.user_dir("b").exists()
    finish(again, "b", "c")
    assert opened(tmp_path, "m1", a="1", b="5", c="3").done("b")


def test_what_all_share_makes_all_again_with_what_is_made_once(tmp_path: Path) -> None:
    products = ("made.json", "more.json")
    finish(opened(tmp_path, "m1", products=products, a="1", b="2"), "a")
    for name in products:
        (tmp_path / name).write_text("{}")
    with pytest.raises(InputError, match=r"other inputs:\n  model: there m1, now m2 \(model.json\)\n--refresh"):
        opened(tmp_path, "m2", products=products, a="1", b="2")
    assert (tmp_path / "more.json").exists()
    again = opened(tmp_path, "m2", True, products, a="1", b="2")
    assert not again.done("a") and not any((tmp_path / name).exists() for name in products)
    opened(tmp_path, "m2", products=products, a="1", b="2")


def test_a_change_before_anything_was_made_is_no_news(tmp_path: Path) -> None:
    opened(tmp_path, "m1", a="1")
    finish(opened(tmp_path, "m2", a="1"), "a")
    assert world.read(tmp_path / "inputs.json") == {"model": "m2"}


def test_a_result_of_a_process_that_had_read_the_old_inputs_is_not_believed(tmp_path: Path) -> None:
    slow = opened(tmp_path, "m1", a="1")
    opened(tmp_path, "m2", True, a="1")
    finish(slow, "a")
    with pytest.raises(InputError, match="user a: model: there m1, now m2"):
        opened(tmp_path, "m2", a="1")


def test_users_who_left_are_named_and_removed_and_those_who_moved_are_numbered_anew(tmp_path: Path) -> None:
    finish(opened(tmp_path, "m1", a="1", b="2"), "a", "b")
    before = (tmp_path / "users/user_b/adapter/x.safetensors").stat().st_mtime_ns
    with pytest.raises(InputError, match="user_a: no longer one of the users"):
        opened(tmp_path, "m1", b="2", d="4")
    opened(tmp_path, "m1", True, b="2", d="4")
    assert [path.name for path in (tmp_path / "users").iterdir()] == ["user_b"]
    assert world.read(tmp_path / "users/user_b/result.json") == {"user_id": "b", "index": 0}
    assert (tmp_path / "users/user_b/adapter/x.safetensors").stat().st_mtime_ns == before


def test_a_directory_older_than_the_record_is_recorded_from_now_on(tmp_path: Path) -> None:
    Run(tmp_path, "stage", "prime", {"seed": 0}).finish("a", {"user_id": "a", "index": 0})
    Run(tmp_path, "stage", "prime", {"seed": 0}).finish("gone", {"user_id": "gone", "index": 1})
    assert opened(tmp_path, "m1", a="1").done("a")
    with pytest.raises(InputError, match="user a: history: there 1, now 2"):
        opened(tmp_path, "m1", a="2")


def test_what_cannot_be_read_now_is_not_compared_and_not_forgotten(tmp_path: Path) -> None:
    """The model of a finished run may be gone; when it is back, it is known."""
    finish(opened(tmp_path, "m1", a="1"), "a")
    gone = Inputs({}, {"a": read_by({"place": "0"})})
    assert Run(tmp_path, "stage", "prime", {"seed": 0}, inputs=gone).done("a")
    with pytest.raises(InputError, match="model: there m1, now m2"):
        opened(tmp_path, "m2", a="1")


@pytest.mark.parametrize("place", ["users/user_a", "users/user_a/adapter"])
def test_links_are_not_followed_when_a_user_is_made_again(tmp_path: Path, place: str) -> None:
    finish(opened(tmp_path / "run", "m1", a="1"), "a")
    own, victim = tmp_path / "run" / place, tmp_path / "victim"
    own.rename(victim)
    own.symlink_to(victim)
    files = kills.files(victim)
    with pytest.raises(InputError, match="a link"):
        opened(tmp_path / "run", "m2", True, a="1")
    assert kills.files(victim) == files


def test_a_journal_of_other_inputs_is_not_believed(tmp_path: Path) -> None:
    run = opened(tmp_path, "m1", a="1", b="2")
    assert run.journal(["a"]).call("trained", lambda: 1) == 1
    assert opened(tmp_path, "m1", a="1", b="3").journal(["a"]).recorded("trained") == 1
    assert opened(tmp_path, "m1", a="4", b="2").journal(["a"]).recorded("trained") is None
    assert opened(tmp_path, "m2", a="1", b="2").journal(["a"]).recorded("trained") is None


@pytest.mark.parametrize("users", [{"a": "1"}, {"a": "1", "b": "2"}], ids=["finished", "half done"])
def test_other_library_versions_are_told(
    users: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: Any
) -> None:
    finish(opened(tmp_path, "m1", **users), "a")
    opened(tmp_path, "m1", **users)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(machine, "version", lambda name: "99.0")
    assert opened(tmp_path, "m1", **users).done("a")
    told = capsys.readouterr().err
    assert f"{tmp_path}/settings.json: begun with torch {torch.__version__.split('+')[0]}" in told
    assert ", now 99.0" in told and "results may differ" in told


# -- digests --------------------------------------------------------------------------------------------------------


def test_digests_are_of_contents_and_names_within_a_folder(tmp_path: Path) -> None:
    for folder, content in (("a", "x"), ("b", "x"), ("c", "y")):
        world.write(tmp_path / folder / "model.json", content)
        (tmp_path / folder / "README.md").write_text(folder)
    a, b, c = (folder_digest(tmp_path / folder, ["*.json"]) for folder in "abc")
    assert a == b != c and folder_digest(tmp_path / "a", ["*.bin"]) is None is folder_digest(tmp_path / "none", ["*"])
    (tmp_path / "b" / "model.json").rename(tmp_path / "b" / "other.json")
    assert folder_digest(tmp_path / "b", ["*.json"]) != a


def test_large_weights_are_sampled_and_everything_else_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LARGE", 1000)
    monkeypatch.setattr(module, "BLOCK", 10)
    content = bytes(range(250)) * 40
    found: dict[str, set[str]] = {".safetensors": set(), ".json": set()}
    for number, place in enumerate([None, 3, 9_995, 5_000]):  # nowhere, in the header, at the end, between
        changed = bytearray(content)
        if place is not None:
            changed[place] ^= 1
        for suffix, digests in found.items():
            path = tmp_path / f"{number}{suffix}"
            path.write_bytes(changed)
            digests.add(file_digest(path))
    assert len(found[".json"]) == 4 and all(digest.startswith("sha256:") for digest in found[".json"])
    assert len(found[".safetensors"]) in (3, 4) and all(d.startswith("sampled:") for d in found[".safetensors"])


# -- whole stages: each change, with a run that is half done and one that is finished ---------------------------------

DATA = f"data/{kills.TASK}"
TESTS, CANDIDATES = f"{DATA}/test_100/user_test_100.json", f"{DATA}/user_anchor_candidate.json"
Result = dict[str, Any]
Stale = Callable[[Result], bool]  # of a result that was made before the change


def edit(path: str, change: Callable[[Any], None]) -> None:
    content = world.read(Path(path))
    change(content)
    world.write(Path(path), content)


def edit_tensors(path: Path, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    tensors = load_file(path)
    name = sorted(tensors)[0]
    save_file(tensors | {name: change(tensors[name])}, path, metadata={"format": "pt"})


def first(stage: str) -> Result:
    return min(results(stage), key=lambda result: result["index"])


def results(stage: str) -> list[Result]:
    return [world.read(path) for path in sorted(Path("out", stage).glob("users/*/result.json"))]


def everybody(_: Result) -> bool:
    return True


def history() -> Stale:
    edit(TESTS, lambda users: users[0]["profile"][0].update(tag="comedy", description="a robot dances"))
    return lambda result: result["index"] == 0


def queries() -> Stale:
    edit(TESTS, lambda users: users[0]["query"][0].update(input=users[1]["query"][0]["input"]))
    return lambda result: result["index"] == 0


def gold() -> Stale:
    edit(TESTS, lambda users: users[0]["query"][0].update(gold="never read here"))
    return lambda result: False


def anchors_history() -> Stale:
    name = first("anchors")["user_id"]

    def change(users: list) -> None:
        next(user for user in users if str(user["user_id"]) == name)["profile"][-1].update(description="a robot")

    edit(CANDIDATES, change)
    return lambda result: result["user_id"] == name


def base_users() -> Stale:
    edit(f"{DATA}/user_base_LLM.json", lambda users: users[0]["query"][0].update(gold="romance"))
    return everybody


def words() -> Stale:
    name = first("evo")["user_id"]
    edit(f"{DATA}/profile-id2text.json", lambda texts: texts.update({name: "likes robots"}))
    return lambda result: result["user_id"] == name


def template() -> Stale:
    edit("prompts.json", lambda table: table[kills.TASK].update(retrieval_history="{tag}: {description}\n"))
    return everybody


def indices() -> Stale:
    """One anchor less: who merged him merges another."""
    path = Path("out/selection/anchor_user_idx.pt")
    places = torch.load(path).tolist()
    candidates = [str(user["user_id"]) for user in world.read(Path(CANDIDATES))]
    gone = first("evo")["sharers"][0]
    torch.save(torch.tensor([place for place in places if candidates[place] != gone]), path)
    return lambda result: gone in result["sharers"]


def embeddings() -> Stale:
    path = Path("out/selection/test_user_history_emb.pt")
    changed = torch.load(path)
    changed[0] = -changed[0]
    torch.save(changed, path)
    return lambda result: result["index"] == 0


def adapter() -> Stale:
    name = first("evo")["sharers"][0]
    edit_tensors(Path(f"out/anchors/users/{user_dirname(name)}/adapter/adapter_model.safetensors"), lambda x: x * 1.5)
    return lambda result: name in result.get("sharers", [result["user_id"]])  # of a gate's: his own


def gate() -> Stale:
    name = first("composed")["sharers"][0]
    edit_tensors(Path(f"out/gates/users/{user_dirname(name)}/gate.safetensors"), lambda x: x - 1)
    return lambda result: name in result["sharers"]


def task_adapter() -> Stale:
    edit_tensors(Path("out/task/adapter_model.safetensors"), lambda x: x * 1.5)
    return everybody


def base_weights() -> Stale:
    edit_tensors(Path(world.CHECKPOINT, "model.safetensors"), lambda x: x * 1.5)
    return everybody


def tokenizer() -> Stale:
    edit(f"{world.CHECKPOINT}/tokenizer.json", lambda own: own["model"]["merges"].pop())
    return everybody


CHANGES = {
    "history": ("evo", history, "history"),
    "history-4c": ("oppu", history, "history"),
    "history-4b": ("composed", history, "history"),
    "queries": ("task", queries, "queries"),
    "gold": ("evo", gold, ""),
    "anchor's history": ("anchors", anchors_history, "history"),
    "base users": ("task", base_users, "base users"),
    "words": ("evo", words, "profile in words"),
    "template": ("evo", template, "templates"),
    "indices": ("evo", indices, "sharers"),
    "embeddings": ("evo", embeddings, "sharers"),
    "adapter": ("evo", adapter, "adapter of"),
    "adapter-3b": ("gates", adapter, "adapter"),
    "adapter-5": ("mia", adapter, "adapter of"),
    "gate": ("composed", gate, "gate of"),
    "task adapter": ("evo", task_adapter, "task adapter"),
    "task adapter-3": ("anchors", task_adapter, "task adapter"),
    "base weights": ("evo", base_weights, "base model"),
    "base weights-1": ("task", base_weights, "base model"),
    "base weights-2": ("selection", base_weights, "encoder"),
    "tokenizer": ("evo", tokenizer, "tokenizer"),
}


def command(stage: str, *more: str) -> list[str]:
    return [*kills.command(stage), *(["--prompt_path", "prompts.json"] if stage == "evo" else []), *more]

@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small world in which all stages have run but the last (by any name), and one in which that has, too ("mia")."""
    folder = tmp_path_factory.mktemp("made")
    world.build(folder / "evo", kills.TASK, 3, 4)
    world.write(folder / "evo" / "prompts.json", {kills.TASK: dict(TASKS[kills.TASK].templates)})
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder / "evo")
        for stage in kills.STAGES:
            if stage != "mia":
                world.run(command(stage))
        shutil.copytree(folder / "evo", folder / "mia")
        patch.chdir(folder / "mia")
        world.run(command("mia"))
    return {stage: folder / ("mia" if stage == "mia" else "evo") for stage in kills.STAGES}


@pytest.fixture
def stage(made: dict[str, Path], case: tuple, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The stage of a case, in a copy of the world of its own."""
    shutil.copytree(made[case[0]], tmp_path / "world")
    monkeypatch.chdir(tmp_path / "world")
    return case[0]


def output(stage: str) -> Path:
    return Path("out/evo/mia" if stage == "mia" else f"out/{stage}")


def states(stage: str) -> dict[Path, tuple[Result, int]]:
    """Each result, and when it was written."""
    paths = sorted(output(stage).glob("users/*/result.json"))
    return {path: (world.read(path), path.stat().st_mtime_ns) for path in paths}


class Computes(Exception):
    """The stage begins to work."""


def refused(stage: str, named: str) -> None:
    """The change is named, and nothing is touched."""
    before = kills.files(output(stage))
    with pytest.raises(InputError, match=f"{named}.*: there .*, now .*"):
        world.run(command(stage))
    assert kills.files(output(stage)) == before


@pytest.mark.slow
@pytest.mark.parametrize("case", CHANGES.values(), ids=CHANGES)
def test_a_change_behind_a_finished_run_is_named_and_what_depends_on_it_is_made_again(
    stage: str, case: tuple, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, change, named = case
    stale, before = change(), states(stage)
    if not named:
        world.run(command(stage))
        assert states(stage) == before
        return
    refused(stage, named)
    for name in ("load_engine", "load_encoder"):
        monkeypatch.setattr(world.script(command(stage)[0]), name, Mock(side_effect=Computes), raising=False)
    with pytest.raises(Computes):
        world.run(command(stage, "--refresh"))
    if stage != "mia":  # whose references are others for each subject
        assert states(stage) == {path: state for path, state in before.items() if not stale(state[0])}


@pytest.mark.slow
@pytest.mark.parametrize("case", CHANGES.values(), ids=CHANGES)
def test_a_half_done_run_is_refreshed_to_what_a_fresh_run_makes(stage: str, case: tuple) -> None:
    _, change, named = case
    stale, made = change(), states(stage)
    if stage == "selection":
        (output(stage) / "anchor_user_idx.pt").unlink()  # what comes last
    else:  # the last of those who have not changed, if there is one
        last = max(made, key=lambda path: (not stale(made[path][0]), made[path][0]["index"]))
        shutil.rmtree(last.parent)
    if named and stage != "selection":
        refused(stage, named)
    world.run(command(stage, "--refresh"))
    found = kills.files(output(stage))
    shutil.rmtree(output(stage))
    world.run(command(stage))
    differing = kills.differing(found, kills.files(output(stage)))
    assert differing == []  # who was left alone and trained beside other histories, too


@pytest.mark.slow
@pytest.mark.parametrize("case", [("anchors",)])
def test_private_training_on_another_model_draws_new_noise(stage: str) -> None:
    words = command(stage, "--enable_dp", "--epsilon", "8")
    words[words.index("--output_dir") + 1] = "out/private"
    world.run(words)
    key = Path("out/private/noise.key").read_text()
    anchors_history()
    world.run([*words, "--refresh"])  # other records have noise of their own
    assert Path("out/private/noise.key").read_text() == key
    task_adapter()
    world.run([*words, "--refresh"])
    assert Path("out/private/noise.key").read_text() != key


@pytest.mark.slow
@pytest.mark.parametrize("case", [("evo",)])
def test_labels_are_read_anew_by_each_table(stage: str) -> None:
    """And make nothing else stale."""
    table = ["postprocess.py", "--task_name", kills.TASK, "--output_dir", "out/evo"]
    world.run(table)
    before, results = world.read(Path("out/evo/eval-k0.json")), states("evo")
    edit(f"{DATA}/test_100/user_test_100_label.json", lambda labels: labels["golds"][0].update(output="no tag"))
    world.run(command("evo"))
    world.run(table)
    assert world.read(Path("out/evo/eval-k0.json")) != before and states("evo") == results


@pytest.mark.slow
@pytest.mark.parametrize("case", [("evo",)])
def test_after_a_withdrawal_merges_are_those_of_a_fresh_run_without_him(stage: str) -> None:
    name, before = first("evo")["sharers"][0], states("evo")
    words = ["withdraw.py", "--task_name", kills.TASK, "--user", name, "--output_dir", "out"]
    world.run([*words, "--anchor_selection_dir", "out/selection"])
    without = {path: state for path, state in before.items() if name not in state[0]["sharers"]}
    assert states("evo") == without and len(without) < len(before)
    assert [path for path, content in kills.files(Path("out")).items() if f'"{name}"'.encode() in content] == []
    for again in ("anchors", "gates", "evo", "composed"):
        world.run(command(again))
    assert states("evo").items() >= without.items() and len(states("evo")) == len(before)
    for merging in ("evo", "composed"):
        found = kills.files(output(merging))
        shutil.rmtree(output(merging))
        world.run(command(merging))
        assert kills.differing(found, kills.files(output(merging))) == []
