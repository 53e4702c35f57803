"""A sharer leaves: nothing of his stays in the output, whoever had merged him is reopened, interrupted or not."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import kills
import pytest
import torch
import world

from prime.bank.lora import merge
from prime.checkpoints.peft import load_adapter, save_adapter
from prime.errors import InputError
from prime.merging.anchors import load_anchor_idx, load_embeddings, save_selection
from prime.merging.withdrawal import withdraw
from prime.runs.run import Run, user_dirname
from tests import tiny

GONE, SHARERS, MERGED = "7001", ["6001", "7001", "8001"], {"1": ["6001", "7001"], "2": ["8001", "6001"]}
BASE = tiny.model()


def finish(run: Run, user_id: str, index: int, **more: object) -> None:
    run.finish(user_id, {"user_id": user_id, "index": index, **more})


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the stages leave, in short: a selection, adapters, gates, merges, attacks, a table, work in progress."""
    out = tmp_path_factory.mktemp("withdraw") / "out"
    save_selection(out / "selection", torch.ones(5, 4), torch.ones(2, 4), [0, 2, 4])
    anchors, gates = (Run(out / f"A/{name}", f"train_anchor_{name}", "anchors", {}) for name in ("peft", "gate"))
    for place, name in enumerate(SHARERS):
        save_adapter(tiny.adapter(BASE, place), anchors.user_dir(name) / "adapter", "base", {"user_id": name})
        finish(anchors, name, place, losses=[2.0], held_out_ids=[f"{name}00"])
        finish(gates, name, place, losses=[1.0])
        (gates.user_dir(name) / "gate.safetensors").write_text(name)
    anchors.journal([*SHARERS]).call("x", lambda: "losses")
    evo = Run(out / "evo", "lora_composition_evo", "prime", {})
    attacks = [Run(out / "evo" / part, "mia", "users", {}) for part in ("mia", "mia/sharers")]
    for place, (user, names) in enumerate(MERGED.items()):
        parts = [load_adapter(anchors.user_dir(name) / "adapter") for name in names]
        save_adapter(merge(parts, torch.tensor([0.5, 0.0]), "delta"), evo.user_dir(user) / "adapter", "base")
        (evo.user_dir(user) / "evaluations.jsonl").write_text("{}\n")
        finish(evo, user, place, sharers=names, weights=[0.5, 0.0])
        others = [name for name in SHARERS if name not in names]
        finish(attacks[0], user, place, member_ids=names, non_member_ids=others, member_loss=[0.1])
    for place, name in enumerate(SHARERS):
        finish(attacks[1], name, place, member_ids=[name], non_member_ids=[n for n in SHARERS if n != name])
    evo.journal(["3"]).call("x", lambda: "answers of his adapter")
    (evo.user_dir("3") / "adapter").mkdir(parents=True)
    (evo.user_dir("3") / "adapter" / "half").write_text("of his")
    made = ("evo/mia_results.json", "evo/mia_summary.json", "evo/output-k0.json", "report.html", "figures/weights.svg")
    for name in made:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text(f'"{GONE}"')
    oppu = Run(out / "oppu", "train_user_peft", "oppu", {})
    finish(oppu, "1", 0, deployed="own")
    (out / "oppu" / "mia_summary.json").write_text("{}")
    return out


@pytest.fixture
def out(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    return Path("out")


def leave(out: Path, user_id: str = GONE, place: int = 2, receipt: str = "receipt.json") -> dict:
    return withdraw(user_id, [out], place, 5, ["copies"], Path(receipt))


def naming(out: Path, user_id: str) -> list[str]:
    """Files whose path or content holds the id, not as a part of another number."""
    pattern = re.compile(rb"(?<![0-9.])" + user_id.encode())
    return [name for name, content in kills.files(out).items() if pattern.search(name.encode() + b" " + content)]


def test_nothing_of_the_sharer_is_left_and_the_receipt_says_what_was_done(out: Path) -> None:
    factors = load_adapter(out / "A/peft/users" / user_dirname(GONE) / "adapter").factors
    own = [part.numpy().tobytes() for pair in factors.values() for part in pair]
    assert naming(out, GONE)
    done = leave(out)
    assert naming(out, GONE) == [] and done == world.read(Path("receipt.json")) and done["state"] == "done"
    contents = kills.files(out).values()
    assert not any(part in content for content in contents for part in own)
    assert done["reopened"] == {"out/evo": ["1"]} and done["left"] == ["copies"]
    removed = {f"out/A/{part}/users/user_{GONE}" for part in ("peft", "gate")}
    removed |= {f"out/evo/mia/users/user_{user}" for user in MERGED}
    assert set(done["removed"]) == removed | {f"out/evo/mia/sharers/users/user_{name}" for name in SHARERS}
    assert load_anchor_idx(out / "selection/anchor_user_idx.pt", 5) == [0, 4]
    rows = load_embeddings(out / "selection/user_history_emb.pt", 5).sum(1).tolist()
    assert rows == [4, 4, 0, 4, 4]


def test_others_are_left_alone(out: Path) -> None:
    before = kills.files(out)
    leave(out)
    after = kills.files(out)
    assert all(before[name] == content for name, content in after.items() if "selection" not in name)
    kept = ["evo/users/user_2/result.json", "oppu/users/user_1/result.json", "oppu/mia_summary.json"]
    kept += [f"A/peft/users/user_{name}/adapter/adapter_model.safetensors" for name in ("6001", "8001")]
    assert set(kept) <= after.keys()


class Cut(BaseException):
    """The process dies here."""


@pytest.mark.slow
def test_cut_off_anywhere_it_ends_the_same(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(out, "whole")
    out.rename("before")
    Path("whole").rename(out)
    expected = leave(out, receipt="whole.json")
    out.rename("whole")
    for at in range(1, 60, 4):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree("before", out)
        Path("receipt.json").unlink(missing_ok=True)
        with monkeypatch.context() as patch:
            cut_at(patch, at)
            with suppress(Cut):
                leave(out)
        assert leave(out) == expected, at
        assert kills.differing(kills.files(out), kills.files(Path("whole"))) == [], at


def cut_at(patch: pytest.MonkeyPatch, at: int) -> None:
    """The `at`th change of the file system from now on does not come to pass, nor what follows."""
    left: Iterator[int] = iter(range(at - 1))
    for name in ("unlink", "rmdir", "replace", "mkdir"):
        patch.setattr(os, name, dying(getattr(os, name), left))


def dying(real, left: Iterator[int]):
    def call(*args, **more):
        if next(left, None) is None:
            raise Cut
        return real(*args, **more)

    return call


def test_who_never_shared_is_told_and_nothing_touched(out: Path) -> None:
    before = kills.files(out)
    with pytest.raises(InputError, match="user 9: no adapter of such a sharer, and no merge with it, in out"):
        leave(out, "9", 1)
    assert kills.files(out) == before and not Path("receipt.json").exists()


def test_again_is_the_same_receipt_and_that_of_another_is_not_overwritten(out: Path) -> None:
    assert leave(out) == leave(out)
    with pytest.raises(InputError, match=f"the receipt of user {GONE}; give another --receipt"):
        leave(out, "8001", 4)


def test_nobody_may_be_at_work(out: Path) -> None:
    run = Run(out / "evo", "lora_composition_evo", "prime", {})
    with pytest.raises(InputError, match="out/evo: a stage is at work there"):
        leave(out)
    assert run
