"""mia.py --adapter: an audit of any adapter by two files of records, against scikit-learn, scipy and PEFT."""

import csv
import json
import random
from pathlib import Path

import numpy as np
import own_world
import pytest
import tiny
import torch
from chat_templates import TEMPLATES
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score, roc_curve
from transformers import AutoTokenizer

import mia
from prime.attack import intervals
from prime.attack.audit import encoded_records
from prime.attack.intervals import Units
from prime.attack.statistics import auroc
from prime.bank.encoding import Encoder
from prime.errors import InputError
from prime.runs.files import read_json
from prime.users.pairs import Pair


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model, three adapters, members and non-members of users; some of the records are whole texts."""
    root = tmp_path_factory.mktemp("audit")
    model = own_world.write_model(root / "model")
    for place in range(3):
        own_world.write_adapter(model, root / f"adapter_{place}", 4, own_world.ATTENTION, place)
    stream = random.Random(0)
    for name, count, users in (("members", 24, 6), ("non_members", 120, 8)):
        rows = []
        for i in range(count):
            row = {"input": own_world.sentence(stream, 4), "output": own_world.sentence(stream, 3)}
            row = {"text": own_world.sentence(stream, 6)} if i % 5 == 4 else row
            rows.append(row | {"user": f"{name[0]}{i % users}"})
        own_world.write_lines(root / f"{name}.jsonl", rows)
    return root


def command(*more: str) -> list[str]:
    words = ["--llama_model_path", "model", "--adapter", "adapter_0", "--members", "members.jsonl"]
    return [*words, "--non_members", "non_members.jsonl", "--device", "cpu", *more]


@pytest.fixture(scope="module")
def audited(here: Path) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        mia.main(command("--references", "adapter_1", "adapter_2", "--output_dir", "audit"))
    return here / "audit"


def table(folder: Path) -> dict[str, np.ndarray]:
    """The columns of the CSV."""
    with open(folder / "audit_scores.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def test_aurocs_are_scikit_learns_on_the_csv(audited: Path) -> None:
    columns, summary = table(audited), read_json(audited / "audit.json")
    truth = columns["member"].astype(int)
    assert (truth.sum(), len(truth), summary["unit"]) == (24, 144, "user") and len(summary["attacks"]) == 8
    for name, models in summary["attacks"].items():
        for model, column in (("adapter", name), ("base", f"base_{name}")):
            scores = columns[column].astype(float)
            if name in ("calibrated", "logit") and model == "base":
                assert models[model] is None and not scores.any()  # one score for all
                continue
            found = models[model]["auroc"]
            assert found["mean"] == pytest.approx(roc_auc_score(truth, scores), abs=1e-12), column
            assert found["low"] < found["mean"] < found["high"]
            fpr, tpr, _ = roc_curve(truth, scores, drop_intermediate=False)
            rates = models[model]["tpr_at_fpr"]
            assert rates["0.1"]["mean"] == pytest.approx(tpr[fpr <= 0.1].max())
            assert rates["0.01"] is not None and rates["0.001"] is None  # 120 non-members show 1 %, not 0.1 %


@torch.inference_mode()
def losses(model: torch.nn.Module, here: Path, name: str) -> list[float]:
    """Summed losses of the outputs and their end, a record at a time."""
    tokenizer, found = AutoTokenizer.from_pretrained(here / "model"), []
    for line in (here / f"{name}.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt = tokenizer(row.get("input", ""))["input_ids"]
        target = [*tokenizer(row.get("output", row.get("text")), add_special_tokens=False)["input_ids"], 2]
        logits = model(input_ids=torch.tensor([prompt + target])).logits[0, len(prompt) - 1 : -1]
        found.append(float(torch.nn.functional.cross_entropy(logits, torch.tensor(target), reduction="sum")))
    return found


def test_scores_are_pefts_losses(here: Path, audited: Path) -> None:
    columns, expected = table(audited), {}
    for column in ("base_loss", "loss"):
        model = own_world.plain(here / "model")
        model = PeftModel.from_pretrained(model, here / "adapter_0").eval() if column == "loss" else model
        expected[column] = np.array(losses(model, here, "members") + losses(model, here, "non_members"))
        np.testing.assert_allclose(-columns[column].astype(float), expected[column], atol=1e-4)
    calibrated = expected["base_loss"] - expected["loss"]
    np.testing.assert_allclose(columns["calibrated"].astype(float), calibrated, atol=1e-4)
    assert list(columns["line"][:3]) == ["1", "2", "3"] and list(columns["user"][:2]) == ["m0", "m1"]


def test_a_text_is_no_turn_of_a_chat_and_needs_a_token_in_front_of_it() -> None:
    tokenizer = tiny.tokenizer(bos=False)
    tokenizer.chat_template = TEMPLATES["chatml"]
    asked, text = encoded_records(Encoder(tokenizer), [Pair(1, "which tag", "a film"), Pair(2, "", "a quiet film")])
    assert "assistant" in tokenizer.decode(asked.ids) and tokenizer.decode(asked.target).startswith("a film")
    assert tokenizer.decode(text.ids + text.target) == "a quiet film</s>" and len(text.ids) == 1


def test_without_references_rmia_is_not_told(here: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(here)
    mia.main(command("--output_dir", "bare", "--seed", "1"))
    out = capsys.readouterr().out
    (row,) = [line.split() for line in out.splitlines() if line.startswith("rmia")]
    assert row == ["rmia", *["n/a"] * 5] and "(rmia) no --references" in out
    assert "rmia" not in table(here / "bare") and "rmia" not in read_json(here / "bare/audit.json")["attacks"]
    assert "intervals from resampling by user (6 of members and 8 of non_members)" in out


# -- intervals ------------------------------------------------------------------------------------------------------


def summary(scores: np.ndarray, units: Units, n: int) -> dict | None:
    return intervals.set_summaries({"loss": scores}, units, n=n)["loss"]


def units(members: int, non_members: int, users: int = 0) -> Units:
    sides = [True] * members + [False] * non_members
    return Units.choose([f"{side}{i % users}" if users else "" for i, side in enumerate(sides)], sides)


@given(st.integers(1, 12), st.integers(1, 12), st.sampled_from([0, 2, 5]), st.integers(0, 3), st.data())
def test_no_interval_is_of_zero_width(members: int, non_members: int, users: int, values: int, data) -> None:
    drawn = st.lists(st.integers(0, values), min_size=members + non_members, max_size=members + non_members)
    scores = np.array(data.draw(drawn), dtype=float)
    found = summary(scores, units(members, non_members, users), 30)
    if len(set(scores)) == 1:
        assert found is None
        return
    for told in (found["auroc"], *found["tpr_at_fpr"].values()):
        assert told is None or (told["high"] - told["low"] > 1e-6 and 0 <= told["low"] <= told["high"] <= 1)


def test_a_perfect_attack_on_few_records_is_not_certain() -> None:
    widths = []
    for n in (3, 30, 300):
        told = summary(np.r_[np.ones(n), np.zeros(n)], units(n, n), 50)
        assert (told["auroc"]["mean"], told["auroc"]["high"]) == (1.0, 1.0)
        widths.append(1 - told["auroc"]["low"])
    assert widths[0] > 0.3 > widths[1] > widths[2] > 0.001


def test_the_closed_forms() -> None:
    for rate, n in ((0.0, 7), (1.0, 7), (0.25, 20)):
        expected = binomtest(round(rate * n), n).proportion_ci(method="wilson")
        assert intervals.wilson(rate, n) == pytest.approx((expected.low, expected.high))
    for area, m, n in ((1.0, 5, 9), (0.7, 40, 60), (0.0, 4, 4)):
        for end in intervals.newcombe(area, m, n):
            if 0 < end < 1:  # the hypothesis whose own standard error is just too small to reach the estimate
                spread = 1 + ((m + n) / 2 - 1) * ((1 - end) / (2 - end) + end / (1 + end))
                error = np.sqrt(end * (1 - end) * spread / (m * n))
                assert abs(area - end) == pytest.approx(1.959964 * error, rel=1e-5)


def test_weighted_records_are_records_that_occur_several_times() -> None:
    stream = np.random.default_rng(0)
    for _ in range(20):
        truth = np.r_[1, 0, stream.integers(0, 2, 38)].astype(bool)
        scores = stream.integers(0, 9, 40) + truth
        times = np.maximum(stream.integers(0, 4, 40), [1, 1, *[0] * 38])
        (_, area), (_, rates) = intervals.weighted(scores, truth, np.stack([np.ones(40), times]))
        assert area == pytest.approx(roc_auc_score(truth, scores, sample_weight=times))
        again = np.repeat(scores, times)[np.repeat(truth, times)], np.repeat(scores, times)[~np.repeat(truth, times)]
        assert area == pytest.approx(auroc(*again))
        fpr, tpr, _ = roc_curve(np.repeat(truth, times), np.repeat(scores, times), drop_intermediate=False)
        assert rates[0] == pytest.approx(tpr[fpr <= 0.1 + 1e-9].max())


def test_users_are_resampled_whole_and_of_fewer_than_five_records_are() -> None:
    assert (units(20, 20, 5).name, units(20, 20, 4).name, units(20, 20).name) == ("user", "record", "record")
    by_user = units(20, 20, 5)
    for times in np.vstack(list(by_user.draws(20, seed=0))):
        assert all(len(set(times[by_user.of == unit])) == 1 for unit in set(by_user.of))
        assert times[by_user.is_member].sum() == times[~by_user.is_member].sum() == 20
    members = np.tile([-2.0, -1.0, 0.0, 2.0, 3.0], 4)  # a user's records are alike
    scores = np.r_[members, np.random.default_rng(1).normal(0, 1, 20)]
    wide, narrow = (summary(scores, one, 300)["auroc"] for one in (by_user, units(20, 20)))
    assert wide["high"] - wide["low"] > narrow["high"] - narrow["low"]


# -- what newcomers get wrong ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("files", "more", "expected"),
    [
        ({}, ["--non_members", "./members.jsonl"], "--members and --non_members are the same file, members.jsonl"),
        ({"non.jsonl": '{"input": "w1", "output": "w2"}\n{"input": "w3 ", "output": "w4"}\n',
          "m.jsonl": '{"input": "w3", "output": "w4"}\n'}, ["--members", "m.jsonl", "--non_members", "non.jsonl"],
         "m.jsonl: line 1: also in non.jsonl, line 2; a record was trained on or it was not: remove it from one"),
        ({"non.jsonl": '{"input": "a", "output": "b", "user": "x"}\n{"input": "c", "output": "d"}\n'},
         ["--non_members", "non.jsonl"], "non.jsonl: line 2: no user, but line 1 has one; name all of them or none"),
        ({"m.jsonl": '{"content": "a"}\n'}, ["--members", "m.jsonl"], "(line 1 has content); rename them: "),
        ({"m.jsonl": '{"text": ""}\n'}, ["--members", "m.jsonl"], "m.jsonl: line 1: an empty text; fill it in"),
        ({"m.jsonl": ""}, ["--members", "m.jsonl"], "m.jsonl: holds no pairs; a line is "),
        ({}, ["--references", "adapter_0"], "adapter_0: given twice (as adapter_0); leave one out"),
        ({}, ["--adapter", "members.jsonl"], "members.jsonl"),
        ({}, ["--adapter", "model"], "model: a model, not an adapter"),
    ],
)  # fmt: skip
def test_mistakes_get_a_line(files: dict, more: list[str], expected: str, inside: Path) -> None:
    for name, content in files.items():
        Path(name).write_text(content)
    with pytest.raises(InputError) as stopped:
        mia.main([*command(), *more, "--output_dir", "never"])
    assert expected in str(stopped.value) and "\n" not in str(stopped.value) and not Path("never").exists()


def test_an_audit_without_its_adapter_is_asked_for_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        mia.main(["--members", "m.jsonl", "--non_members", "n.jsonl"])
    assert "the following arguments are required: --adapter, --llama_model_path" in capsys.readouterr().err
