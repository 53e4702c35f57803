"""Sharers who distil: what they are asked, which answers the shared adapter learns, and that it learns nothing else."""

from pathlib import Path

import pytest
import world

from prime.checkpoints.peft import load_adapter
from prime.errors import InputError
from prime.merging.distil import Answered, answered, public_records, runs
from prime.merging.sharers import adapter_folder
from prime.users.data import User
from prime.users.prompts import Record
from prime.users.texts import load_texts

TASK = "movie_tagging"


def user(name: str, items: int) -> User:
    profile = [{"id": str(i), "description": f"film {i} of {name}", "tag": "comedy"} for i in range(items)]
    return User(name, profile, [])


def test_every_sharer_is_asked_the_same_public_items(tmp_path: Path) -> None:
    texts, users = load_texts(tmp_path, TASK, None), [user("p", 5), user("q", 0), user("r", 4)]
    everything = public_records(users, texts, 0, 0)
    assert len(everything) == 9 == len(public_records(users, texts, 100, 0))
    some = public_records(users, texts, 4, 7)
    assert some == public_records(users, texts, 4, 7) != public_records(users, texts, 4, 8)
    assert len(some) == 4 and [record for record in everything if record in some] == some
    with pytest.raises(InputError, match="no public user has an item"):
        public_records([user("q", 0)], texts, 4, 0)


def test_answers_take_the_place_of_golds_and_quotations_are_dropped_and_counted() -> None:
    asked = [Record(f"p{i}", f"about a film, number {i}", " unused gold") for i in range(4)]
    own = [Record("u", "in", " The night the lights went out"), Record("v", "in", " about a film, number one")]
    answers = ["  a quiet film", "He said THE NIGHT the   lights", " ", "about a film, number one"]
    found = answered(asked, answers, own)
    assert [(record.id, record.input, record.target) for record in found.records] == [
        ("p0", asked[0].input, " a quiet film"),
    ]
    assert (found.quoting, found.empty) == (2, 1)
    public = [Record("q", "about a film, number one", " x"), *asked[1:]]
    again = answered(public, answers, own)  # what a public text says as well is no quotation
    assert (len(again.records), again.quoting) == (2, 1)
    assert found.told() == {"distilled": {"answers": 1, "quoting": 2, "empty": 1}}


def test_runs_are_all_stretches_of_words() -> None:
    assert runs(["a b c", "A b  c d e"]) == {("a", "b", "c", "d"), ("b", "c", "d", "e")}
    assert Answered([], 0, 0).told()["distilled"]["answers"] == 0


@pytest.mark.slow
def test_what_is_shared_is_trained_on_answers_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Other golds of the public users, the same answers: the same adapter, bit for bit; and not the private one."""
    world.build(tmp_path, anchors=2)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "task").mkdir()
    base = ["--task_name", TASK, "--llama_model_path", world.CHECKPOINT]
    world.run(["task_lora.py", *base, "--output_dir", "task", "--epochs", "1", "--user_idxs", "0-1", "--k_list", ""])
    world.run(["history_anchor.py", "--task_name", TASK, "--encoder", world.CHECKPOINT, "--k", "2", "--n_sim", "1"])
    words = ["train_anchor_peft.py", *base, "--lora_ckpt", "task", "--lr", "1e-2", "--train_gen_len", "4"]
    distil = [*words, "--distill", "public", "--public_records", "6"]
    world.run([*words, "--output_dir", "own"])
    world.run([*distil, "--output_dir", "shared"])
    path = tmp_path / f"data/{TASK}/user_base_LLM.json"
    users = world.read(path)
    for one in users:
        one["profile"] = [item | {"tag": "poison"} for item in one["profile"]]
    world.write(path, users)
    world.run([*distil, "--output_dir", "again"])
    private = world.results("own")
    for name, result in world.results("shared").items():
        assert 0 < result["distilled"]["answers"] <= 6 and result["record_ids"] == private[name]["record_ids"]
        folders = [adapter_folder(folder, name) for folder in ("own", "shared", "again")]
        own, shared, again = (load_adapter(folder).factors for folder in folders)
        for module, (a, b) in shared.items():
            assert (a == again[module][0]).all() and (b == again[module][1]).all()
            assert (b != own[module][1]).any()
