"""The embedded demo: its files are what the seed makes, its users differ, its model and tokenizer load."""

import json
from collections import Counter
from itertools import combinations
from pathlib import Path

import make_world
import pytest

from prime.users.data import load_labels, load_profiles, load_users
from prime.users.prompts import history_records
from prime.users.tasks import TASKS, extract
from prime.users.templates import load_templates

DATA = Path(__file__).parents[1] / "data" / "demo"
MODEL = DATA / "model"
FILES = {"base": "user_base_LLM.json", "anchor": "user_anchor_candidate.json", "test": "test_100/user_test_100.json"}
tasks = pytest.mark.parametrize("task", list(make_world.WORLDS))


def read(task: str, split: str) -> list[dict]:
    return json.loads((DATA / task / FILES[split]).read_text())


def test_shipped_data_is_what_the_seed_makes() -> None:
    for name, text in make_world.rendered():
        assert (DATA / name).read_bytes() == text.encode("ascii"), name


def test_command_writes_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["make_world.py", "--out", str(tmp_path)])
    make_world.main()
    written = {str(p.relative_to(tmp_path)): p.read_bytes() for p in tmp_path.rglob("*.json")}
    assert written == {name: (DATA / name).read_bytes() for name, _ in make_world.rendered()}


def test_demo_is_small() -> None:
    sizes = [p.stat().st_size for p in DATA.rglob("*") if p.is_file()]
    assert sum(sizes) <= 6_000_000 and max(sizes) <= 2_900_000


@tasks
def test_data_contract(task: str) -> None:
    info, users = TASKS[task], []
    for name in FILES.values():
        users += load_users(DATA / task / name, info, need_queries=True)
    ids = [user.user_id for user in users]
    assert len(set(ids)) == len(ids) == sum(make_world.SPLITS.values())
    assert set(load_profiles(DATA / task / "profile-id2text.json")) == set(ids)
    records = [r["id"] for u in users for r in u.profile] + [q.id for u in users for q in u.queries]
    assert len(set(records)) == len(records)
    for user in users:
        assert all(extract(info, q.input) is not None for q in user.queries)
        assert info.labels is None or {q.gold for q in user.queries} <= set(info.labels)
    test = load_users(DATA / task / FILES["test"], info, need_queries=True)
    golds = load_labels(DATA / task / "test_100" / "user_test_100_label.json")
    assert golds == {q.id: q.gold for user in test for q in user.queries}
    assert len(test) >= 24 and min(len(u.queries) for u in test) >= (30 if task == "movie_tagging" else 15)


@tasks
def test_anchor_candidates_are_active(task: str) -> None:
    lengths = [len(user["profile"]) for user in read(task, "anchor")]
    assert min(lengths) > 10 and len(set(lengths)) > 5


@tasks
def test_every_text_is_new(task: str) -> None:
    """No two records of a task share their text: each has its own fact."""
    users = [user for split in FILES for user in read(task, split)]
    texts = [str({k: v for k, v in item.items() if k != "id"}) for user in users for item in user["profile"]]
    articles = [(extract(TASKS[task], q["input"]) or ("",))[0] for user in users for q in user["query"]]
    assert len(set(texts)) == len(texts) and len(set(articles)) == len(articles)


def test_facts_are_unique_and_pretraining_has_others() -> None:
    shipped = range(sum(make_world.SPLITS.values()) * make_world.FACTS_PER_USER)
    assert shipped[-1] < make_world.GENERIC_FACTS[0]
    known = {make_world.fact(i) for i in [*shipped, *make_world.GENERIC_FACTS]}
    assert len(known) == len(shipped) + len(make_world.GENERIC_FACTS)


@tasks
def test_records_carry_their_fact(task: str) -> None:
    for place in (0, 45, 93):
        split = "base" if place < 40 else "anchor" if place < 70 else "test"
        user = read(task, split)[place - {"base": 0, "anchor": 40, "test": 70}[split]]
        for i, query in enumerate(user["query"], start=len(user["profile"])):
            name, number = make_world.fact(place * make_world.FACTS_PER_USER + i)
            assert name in query["input"] and number in query["input"]


def answers(task: str, archetype: int) -> list[str]:
    """What two pure users of an archetype answer to the same 60 events."""
    who = make_world.Person(None, make_world.archetype_habits(task, archetype), 0)
    return [make_world.WORLDS[task].happen(who, i, make_world.Dice("compare", i)).answer for i in range(60)]


@tasks
def test_archetypes_differ(task: str) -> None:
    made = [answers(task, a) for a in range(make_world.ARCHETYPES)]
    agree = [sum(x == y for x, y in zip(a, b, strict=True)) / 60 for a, b in combinations(made, 2)]
    assert max(agree) < 0.8 and sum(agree) / len(agree) < 0.6
    assert made[0] == answers(task, 0)


def test_quirks_and_noise_leave_the_archetype_visible() -> None:
    kept = Counter()
    for i in range(200):
        who = make_world.person("news_headline", 2, 0, make_world.Dice("quirk", i))
        kept.update(value == 2 for value in who.habits.values())
    assert 0.7 < kept[True] / kept.total() < 0.95


# --- The model -------------------------------------------------------------------------------------------------------

def texts() -> list[str]:
    """Texts of all tasks, prompts included, and some that are none of this world."""
    found = ["naïve 漢字 ☃", "tabs\tand\n\nbreaks \n", "two  spaces", "a"]
    for name in make_world.WORLDS:
        users = load_users(DATA / name / FILES["test"], TASKS[name], need_queries=True)[:3]
        templates = load_templates(None, TASKS[name])
        records = [r for u in users for r in history_records(u, TASKS[name], templates, "Likes tea.")]
        found += [r.input + r.target for r in records] + [q.input for u in users for q in u.queries]
    return found


def test_tokenizer_gives_bos_and_sentencepiece_ids() -> None:
    import sentencepiece
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    oracle = sentencepiece.SentencePieceProcessor(model_file=str(MODEL / "tokenizer.model"))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    for text in texts():
        assert tokenizer(text).input_ids == [1, *oracle.encode(text)]
        assert tokenizer.decode(tokenizer(text).input_ids, skip_special_tokens=True) == text


def test_model_loads_and_is_tiny() -> None:
    import torch
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    assert 0.8e6 < model.num_parameters() < 1.3e6
    assert model.config.max_position_embeddings >= 2048
    with safe_open(MODEL / "model.safetensors", "pt") as file:
        assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"BF16"}  # noqa: SIM118


def test_pretraining_documents_are_reproducible_and_of_other_people() -> None:
    from make_model import document, text_of

    made = [text_of(document(n, 4)) for n in range(200)]
    assert made == [text_of(document(n, 4)) for n in range(200)]
    shipped = {item["description"] for user in read("movie_tagging", "anchor") for item in user["profile"]}
    assert not any(text in document_text for document_text in made for text in shipped)


def test_pretraining_loss_is_over_answers() -> None:
    from make_model import encode
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    ids, answers = encode(tokenizer, [("given a film ->", False), (" comedy\n", True), ("next", False)])
    assert len(ids) == len(answers) and ids[0] == 1 and ids[-1] == 2
    assert tokenizer.decode([i for i, answer in zip(ids, answers, strict=True) if answer]) == "comedy\n"


@pytest.mark.parametrize("records", [1, 6])
def test_pretraining_batches(records: int, monkeypatch: pytest.MonkeyPatch) -> None:
    import make_model
    import torch
    from tokenizers import Tokenizer

    monkeypatch.setattr(make_model, "SHORT", 1.0 if records == 1 else 0.0)
    monkeypatch.setattr(make_model, "LENGTHS", (records,))
    ids, answers = next(make_model.batches(Tokenizer.from_file(str(MODEL / "tokenizer.json"))))
    assert ids.shape == answers.shape and len(ids) == make_model.RECORDS // records
    assert torch.equal(ids[:, 0], torch.ones(len(ids), dtype=torch.long)) and not answers[:, 0].any()
    loss = make_model.answer_loss(make_model.new_model(), ids[:2], answers[:2])
    assert 6.5 < loss.item() < 8.5  # ln 1792 = 7.5
