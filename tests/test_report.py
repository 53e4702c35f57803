"""The table of a run: gathering, scores, pairs, files."""

import json
import re

import numpy as np
import pandas
import pytest

import postprocess
from prime.errors import InputError
from prime.report.figures.utility import pair_sentence
from prime.report.predictions import Cell, check_answers, check_golds, check_stage, gather
from prime.report.records import write_records
from prime.report.scores import gain_of_reference, paired_comparison, write_stage_files
from prime.report.summary import LEAKAGE, about_methods, build_summary, seconds_per_user
from prime.report.summary_table import method_rows, notes, printed, table_rows, write_summary
from prime.report.tables import aligned
from prime.runs.files import read_json
from prime.runs.run import Run
from prime.users.data import Query, User
from prime.users.metrics import METRICS
from prime.users.tasks import TASKS

TASK = TASKS["movie_tagging"]
TAGS = TASK.labels[:3]
USERS = [str(u) for u in range(6)]


def golds_of(users=USERS, n=4):
    return {f"{u}-{i}": TAGS[(int(u) + i) % 3] for u in users for i in range(n)}


def answers(user, right, n=4):
    """The first `right` samples answered correctly, the others with an unknown label."""
    gold = golds_of([user], n)
    return [{"id": key, "output": gold[key] if i < right else "?"} for i, key in enumerate(gold)]


def write_stage(folder, stage, method, predictions_of_user, users=USERS):
    run = Run(folder, stage, method, {"task_name": "movie_tagging"})
    for index, user in enumerate(users):
        run.finish(user, {"user_id": user, "index": index, "predictions": predictions_of_user(user)})
    return folder


@pytest.fixture
def output(tmp_path):
    """A run with two stages: the base gets 1 of 4 right, the task LoRA 2, prime 3 (users 0 and 1: 2)."""
    base = {"k0": 1, "k2": 2, "k2-profile": 1}
    write_stage(
        tmp_path / "task-base_LLM", "task_lora", "task_lora",
        lambda u: {"base": {s: answers(u, r) for s, r in base.items()}, "task_lora": {"k0": answers(u, 2)}},
    )  # fmt: skip
    write_stage(
        tmp_path / "LoRA-Composition-evo", "lora_composition_evo", "prime",
        lambda u: {"prime": {"k0": answers(u, 2 if u in "01" else 3), "k2-profile": answers(u, 4)},
                   "uniform": {"k0": answers(u, 2 if u in "012" else 4)}},
    )  # fmt: skip
    return tmp_path


def summary_of(output, stage="LoRA-Composition-evo", expected=USERS):
    predictions, source = gather(output / stage, TASK)
    return build_summary(TASK, predictions, golds_of(), about_methods(source), expected)


def row(rows, method, k=0, profile=False):
    return next(r for r in rows if (r["method"], r["k"], r["profile"]) == (method, k, profile))


def test_rows_come_in_order_and_the_base_with_retrieval_is_rag(output):
    keys = [(r["method"], r["k"], r["profile"]) for r in summary_of(output)["rows"]]
    assert keys == [
        ("base", 0, False), ("task_lora", 0, False), ("uniform", 0, False), ("prime", 0, False),
        ("rag", 2, False), ("rag", 2, True), ("prime", 2, True),
    ]  # fmt: skip


def test_scores_carry_intervals(output):
    rows = summary_of(output)["rows"]
    assert row(rows, "base")["accuracy"] == {"mean": 0.25, "low": 0.25, "high": 0.25}
    prime = row(rows, "prime")["accuracy"]
    assert prime["mean"] == pytest.approx((2 * 2 + 4 * 3) / 24)
    assert prime["low"] < prime["mean"] < prime["high"]
    assert row(rows, "prime")["outside"]["mean"] == pytest.approx(1 - prime["mean"])  # all wrong answers are unknown
    columns = {*LEAKAGE, "seconds_per_user", "bytes_per_user", "gradient", "outside"}
    assert set(row(rows, "prime")) == {"method", "k", "profile", "accuracy", "f1"} | columns


def test_comparison_is_paired_by_user(output):
    pair = row(summary_of(output)["paired"], "uniform")
    assert (pair["better"], pair["equal"], pair["worse"]) == (3, 2, 1)
    assert pair["accuracy"]["mean"] == pytest.approx((3 * 2 + 3 * 4) / 24 - 16 / 24)
    assert [p["method"] for p in summary_of(output)["paired"]] == ["base", "task_lora", "uniform", "rag"]


def test_lower_is_better_for_error_metrics():
    task = TASKS["product_rating"]
    good, bad = np.array([[1.0, 4.0]]), np.array([[8.0, 4.0]])
    stats = [{"MAE": s, "RMSE": s} for s in (good, bad)]
    compared = paired_comparison(task, *stats)
    assert (compared["better"], compared["worse"]) == (1, 0)
    assert compared["MAE"]["mean"] == -1.75 and not METRICS["MAE"].higher_is_better


def test_partial_runs_are_scored_and_told(output):
    write_stage(output / "oppu", "oppu", "oppu", lambda u: {"oppu": {"k0": answers(u, 4)}}, USERS[:2])
    summary = summary_of(output)
    assert row(summary["rows"], "oppu")["accuracy"]["mean"] == 1.0
    assert row(summary["rows"], "prime")["accuracy"]["mean"] == 0.5  # of users 0 and 1, as every row at k = 0
    assert summary["compared"] == {"k0": USERS[:2], "k2": USERS, "k2-profile": USERS}
    assert row(summary["rows"], "prime", 2, True)["accuracy"]["mean"] == 1.0
    assert summary["users"]["oppu"] == {"present": 2, "expected": 6}
    pair = row(summary["paired"], "oppu")
    assert pair["accuracy"]["mean"] == pytest.approx(0.5) and pair["better"] == 2
    assert "oppu: partial, 2 of 6 users.\nEvery row is of the 2 users that all rows have" in notes(summary)
    assert "prime: partial" not in notes(summary)


def test_rows_without_a_user_in_common_are_of_their_own_users(output):
    write_stage(output / "oppu", "oppu", "oppu", lambda u: {"oppu": {"k0": answers(u, 4)}}, USERS[:2])
    write_stage(output / "mta", "mta", "mta", lambda u: {"mta": {"k0": answers(u, 1)}}, USERS[2:])
    summary = summary_of(output)
    assert summary["compared"]["k0"] == [] and row(summary["rows"], "mta")["accuracy"]["mean"] == 0.25
    assert row(summary["rows"], "prime")["accuracy"]["mean"] == pytest.approx(16 / 24)
    assert "no user in common" in notes(summary)


def test_one_sign_on_a_page(output):
    """Table and sentence tell what prime gains, above 0 where it is better, also where lower values are."""
    summary = summary_of(output)
    header, *body = table_rows(summary)
    shown = dict(zip(header, next(cells for cells in body if cells[0] == "base"), strict=True))
    gain = shown["prime's gain"]
    assert gain.startswith(f"+{16 / 24 - 0.25:.3f} [") and shown["better/equal/worse"] == "6/0/0"
    assert f"it gains {gain} in accuracy" in pair_sentence(summary["paired"][0], "accuracy", "prime")
    pair = {"method": "base", "MAE": {"mean": 0.3, "low": -0.1, "high": 0.5}, "better": 1, "equal": 0, "worse": 2}
    assert gain_of_reference(pair, "MAE") == pair["MAE"]  # the base's error is larger
    assert "it gains +0.300 [-0.100, +0.500] in MAE (lower is better)" in pair_sentence(pair, "MAE", "prime")


LABELS = {"0-0": TAGS[0], "0-1": TAGS[1]}


@pytest.mark.parametrize(
    ("task", "outputs", "golds", "told"),
    [
        ("movie_tagging", ["", " "], LABELS, "base: all 2 answers are empty"),
        ("movie_tagging", ["", "The tag is comedy"], LABELS, "none of 2 answers is one of the labels asked for; the fir"
         "st is 'The tag is comedy'"),
        ("movie_tagging", [TAGS[1], "?"], LABELS, "none of 2 answers is right, though 1 of them are labels"),
        ("movie_tagging", ["?", TAGS[1]], LABELS, ""),
        ("product_rating", ["bad", ""], {"0-0": "1", "0-1": "5"}, "none of 2 answers is a number; the first is 'bad'"),
        ("product_rating", ["5", ""], {"0-0": "1", "0-1": "5"}, ""),
        ("news_headline", ["x" * 99, "y"], {"0-0": "a b", "0-1": "c"}, f"has a word of .*the first is '{'x' * 59}…'"),
        ("news_headline", ["a", "y"], {"0-0": "a b", "0-1": "c"}, ""),
    ],
)  # fmt: skip
def test_why_nothing_is_right_is_told(task, outputs, golds, told):
    samples = [{"id": key, "output": output} for key, output in zip(golds, outputs, strict=True)]
    about = {"base": dict.fromkeys((*LEAKAGE, "seconds_per_user", "bytes_per_user", "gradient"))}
    summary = build_summary(TASKS[task], {Cell("base", 0, False): {"0": samples}}, golds, about, ["0"])
    assert len(summary["remarks"]) == bool(told) and re.search(told, " ".join(summary["remarks"]))
    assert not told or notes(summary).startswith(summary["remarks"][0])


def test_methods_that_were_not_attacked_are_told(output):
    """Those with a run of their own; a baseline that comes along with PriME's run has none."""
    assert "not attacked: prime (mia.py" in notes(summary_of(output))


def test_a_terminal_shows_the_first_setting_and_the_files_hold_all(output):
    summary = summary_of(output)
    shown = printed(summary)
    at_k0 = [r["method"] for r in summary["rows"] if (r["k"], r["profile"]) == (0, False)]
    first, second = (part.splitlines() for part in shown.split("\n\n")[1:3])
    for lines in (first, second):
        assert [line.split()[0] for line in lines[2:]] == at_k0
    assert max(map(len, shown.splitlines())) <= 110 and "k = 0, without the textual profile" in shown
    write_summary(output, summary)
    first, rest = (output / "summary.md").read_text().split("## Other test settings")
    assert "| rag | 2 |" not in first and "| rag | 2 | yes |" in rest and "| prime | 2 | yes |" in rest


def test_each_users_scores_and_weights_are_read_by_pandas(output):
    """The means of scores.csv are those of the table; weights by layer have a line each."""
    run = Run(output / "Merged", "lora_composition", "per_pcs", {"task_name": TASK.name})
    for index, (user, weights) in enumerate((("0", [0.5, -0.25]), ("=1,\n", [[0.1, 0.2], [0.3, 0.4]]))):
        merged = {"deployed": "merge", "sharers": ["a", "b"], "weights": weights}
        run.finish(user, {"user_id": user, "index": index, **merged, "predictions": {"per_pcs": {"k0": []}}})
    predictions, sources = gather(output / "LoRA-Composition-evo", TASK)
    write_records(output, TASK, predictions, golds_of(), sources)
    scores = pandas.read_csv(output / "scores.csv", dtype={"user": str})
    assert list(scores) == ["user", "method", "k", "profile", "metric", "value"]
    means = scores[scores.metric == "accuracy"].groupby(["method", "k", "profile"]).value.mean()
    for one in summary_of(output)["rows"]:
        assert means[one["method"], one["k"], one["profile"]] == pytest.approx(one["accuracy"]["mean"])
    weights = pandas.read_csv(output / "weights.csv", dtype={"user": str})
    of_user = weights[weights.user == "0"]
    assert of_user[["sharer", "rank", "weight"]].values.tolist() == [["a", 1, 0.5], ["b", 2, -0.25]]
    by_layer = weights[weights.user == "=1,\n"]
    assert by_layer[["sharer", "layer", "weight"]].values.tolist() == [
        ["a", 0, 0.1], ["a", 1, 0.2], ["b", 0, 0.3], ["b", 1, 0.4],
    ]  # fmt: skip


def test_the_named_stage_wins_over_another_with_the_same_method(output):
    write_stage(output / "LoRA-Composition-evo-b30", "lora_composition_evo", "prime",
                lambda u: {"prime": {"k0": answers(u, 4)}})  # fmt: skip
    for stage, accuracy in (("LoRA-Composition-evo", 16 / 24), ("LoRA-Composition-evo-b30", 1.0)):
        rows = summary_of(output, stage)["rows"]
        assert row(rows, "prime")["accuracy"]["mean"] == pytest.approx(accuracy)
    assert row(summary_of(output, "task-base_LLM")["rows"], "prime")["accuracy"]["mean"] == pytest.approx(16 / 24)


def test_a_baselines_own_run_wins_over_the_search_it_comes_along_with(output):
    write_stage(output / "Uniform", "lora_composition_evo", "uniform", lambda u: {"uniform": {"k0": answers(u, 1)}})
    adapter = output / "Uniform" / "users" / "user_0" / "adapter" / "adapter_model.safetensors"
    adapter.parent.mkdir(parents=True, exist_ok=True)
    adapter.write_bytes(b"123456")
    predictions, source = gather(output / "LoRA-Composition-evo", TASK)
    assert {name: folder.name for name, folder in source.items()} == {
        "base": "task-base_LLM", "rag": "task-base_LLM", "task_lora": "task-base_LLM",
        "prime": "LoRA-Composition-evo", "uniform": "Uniform",
    }  # fmt: skip
    assert predictions[Cell("uniform", 0, False)] == {user: answers(user, 1) for user in USERS}
    assert about_methods(source)["uniform"]["bytes_per_user"] == 6 / len(USERS)


SUMMARY = {"sharers": {"users": 0, "attacks": {}}}  # of mia_summary.json


def test_auroc_of_the_published_attack_and_its_blind_baseline(output):
    assert all(r["auroc"] is None for r in summary_of(output)["rows"])
    values = {name: {"mean": m, "low": m - 0.1, "high": m + 0.1} for name, m in (("auroc", 0.7), ("blind_auroc", 0.6))}
    content = SUMMARY | {"method": "prime", "attacks": {"loss": values, "calibrated": values}}
    (output / "LoRA-Composition-evo" / "mia_summary.json").write_text(json.dumps(content))
    summary = summary_of(output)
    assert row(summary["rows"], "prime")["auroc"] == values["auroc"]
    assert row(summary["rows"], "prime")["blind_auroc"] == values["blind_auroc"]
    assert row(summary["rows"], "base")["auroc"] == values["blind_auroc"]
    assert row(summary["rows"], "base")["blind_auroc"] is None
    assert row(summary["rows"], "uniform")["auroc"] is None
    assert summary["auroc_attack"].startswith("loss")
    assert row(summary["rows"], "prime")["controlled_auroc"] is None
    assert "controlled" not in aligned(method_rows(summary)) + notes(summary)


def test_auroc_of_the_controlled_attack_where_records_were_held_out(output):
    """By hand: columns of their own beside the published attack's, the base under its own blind baseline."""
    means = {"auroc": 0.7, "blind_auroc": 0.6}, {"auroc": 0.55, "blind_auroc": 0.48}
    published, held_out = ({k: {"mean": m, "low": m, "high": m} for k, m in one.items()} for one in means)
    sets = {"published": {"attacks": {"loss": published}}, "controlled": {"attacks": {"loss": held_out}}}
    content = SUMMARY | {"method": "prime", "attacks": {"loss": published}, "sets": sets}
    (output / "LoRA-Composition-evo" / "mia_summary.json").write_text(json.dumps(content))
    summary = summary_of(output)
    assert row(summary["rows"], "prime")["controlled_auroc"] == held_out["auroc"]
    assert row(summary["rows"], "task_lora")["controlled_auroc"] == held_out["blind_auroc"]
    header, *body = method_rows(summary)
    shown = dict(zip(header, next(cells for cells in body if cells[0] == "prime"), strict=True))
    assert shown["AUROC"].startswith("0.700") and shown["controlled AUROC"].startswith("0.550")
    assert shown["controlled, blind"].startswith("0.480") and "held-out" in notes(summary)


METHOD_FOLDERS = {
    "lorahub": "LoraHub", "mta": "Merge-then-adapt", "per_pcs": "LoRA-Composition", "oppu": "OPPU",
    "prime_published": "LoRA-Composition-evo-published",
}  # fmt: skip


def test_every_method_has_its_row_attack_and_pair(output):
    """By hand: each gets as many of 4 right as it stands behind the first, for every user; prime 2, 2, 3, 3, 3, 3."""
    values = {name: {"mean": m, "low": m, "high": m} for name, m in (("auroc", 0.7), ("blind_auroc", 0.6))}
    for right, (method, folder) in enumerate(METHOD_FOLDERS.items()):
        write_stage(output / folder, "stage", method, lambda u, m=method, r=right: {m: {"k0": answers(u, r)}})
        auroc = {"mean": right / 10, "low": 0.0, "high": 1.0}
        content = SUMMARY | {"method": method, "attacks": {"loss": values | {"auroc": auroc}}}
        (output / folder / "mia_summary.json").write_text(json.dumps(content))
    summary = summary_of(output)
    at_k0 = [r["method"] for r in summary["rows"] if r["k"] == 0]
    assert at_k0 == [
        "base", "task_lora", "uniform", "lorahub", "mta", "per_pcs", "prime_published", "prime", "oppu",
    ]  # fmt: skip
    counts = {0: (0, 0, 6), 1: (0, 0, 6), 2: (0, 2, 4), 3: (2, 4, 0), 4: (6, 0, 0)}
    for right, method in enumerate(METHOD_FOLDERS):
        own, pair = row(summary["rows"], method), row(summary["paired"], method)
        assert own["auroc"]["mean"] == right / 10 and own["blind_auroc"] == values["blind_auroc"]
        assert own["gradient"] == (method in ("mta", "oppu"))
        assert (pair["better"], pair["equal"], pair["worse"]) == counts[right]
        assert pair["accuracy"]["mean"] == pytest.approx(right / 4 - 16 / 24)
        assert pair["accuracy"]["low"] <= pair["accuracy"]["mean"] <= pair["accuracy"]["high"]


def test_cost_of_a_user(tmp_path):
    """Means over users: of the seconds that personalise (not of predicting), and of the stored adapters' sizes."""
    times = [{"search": 3.0, "sharers": 1.0, "predict": 9.0}, {"search": 5.0, "sharers": 2.0, "predict": 9.0}]
    stage = Run(tmp_path / "evo", "lora_composition_evo", "prime", {"task_name": TASK.name})
    for index, (user, seconds) in enumerate(zip(USERS[:2], times, strict=True)):
        settings = {"k0": answers(user, 2)}
        found = {method: settings for method in ("prime", "best_sharer", "uniform")}
        stage.finish(user, {"user_id": user, "index": index, "predictions": found, "seconds": seconds})
    adapter = stage.user_dir("0") / "adapter" / "adapter_model.safetensors"  # user 1 deployed the base
    adapter.parent.mkdir()
    adapter.write_bytes(b"x" * 3000)
    write_stage(tmp_path / "old", "old", "oppu", lambda u: {"oppu": {"k0": answers(u, 1)}})
    rows = summary_of(tmp_path, "evo")["rows"]
    cost = {r["method"]: (r["seconds_per_user"], r["bytes_per_user"]) for r in rows}
    assert cost["prime"] == (4.0, 1500.0)
    assert cost["best_sharer"] == (1.5, None) and cost["uniform"] == (0.0, None)
    assert cost["oppu"] == (None, 0.0)  # a result without seconds tells none
    composed = {"compose": 2.0, "measure": 7.0, "predict": 1.0}
    assert seconds_per_user("per_pcs", [{"seconds": composed}]) == 2.0
    assert seconds_per_user("mta", [{"seconds": {"train": 0.5, "predict": 1.0}}]) == 0.5
    assert seconds_per_user("base", [{"seconds": {"predict": 1.0}}]) == 0.0
    old = {"search": 3.0, "predict": 1.0}
    assert seconds_per_user("best_sharer", [{"seconds": old}]) is None
    lines = aligned(method_rows(summary_of(tmp_path, "evo"))).splitlines()
    assert lines[0].split()[:2] == ["method", "AUROC"] and "1,500" in next(x for x in lines if x.startswith("prime"))
    assert len(lines) == 2 + 4


def test_published_files_of_the_stages_own_method(output):
    stage = output / "LoRA-Composition-evo"
    written = write_stage_files(stage, TASK, golds_of())
    assert sorted(p.name for p in written) == [
        "eval-k0.json", "eval-k2-profile.json", "output-k0.json", "output-k2-profile.json",
    ]  # fmt: skip
    content = read_json(stage / "output-k0.json")
    assert content["task"] == "LaMP_2M" and content["golds"][0] == {"id": "0-0", "output": TAGS[0]}
    assert len(content["golds"]) == 24
    assert read_json(stage / "eval-k0.json")["accuracy"] == pytest.approx(16 / 24)


def test_missing_golds_are_named(output):
    predictions, _ = gather(output / "task-base_LLM", TASK)
    golds = golds_of()
    del golds["3-1"], golds["5-0"]
    with pytest.raises(InputError, match=r"labels.json: no gold for 2 .*: 3-1, 5-0"):
        check_golds(predictions, golds, output / "labels.json")


def test_a_folder_without_results_names_the_stage_to_run(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match="run the stage .*lora_composition_evo.py"):
            check_stage(folder, TASK)
    Run(tmp_path, "train_anchor_peft", "anchors", {}).finish("1", {"user_id": "1", "index": 0})
    with pytest.raises(InputError, match="run the stage"):
        check_stage(tmp_path, TASK)


def test_stages_of_another_task_are_refused_or_left_out(output):
    other = TASKS["news_categorize"]
    with pytest.raises(InputError, match="made for task movie_tagging, not news_categorize"):
        check_stage(output / "LoRA-Composition-evo", other)
    Run(output / "a-other", "oppu", "oppu", {"task_name": other.name}).finish(
        "0", {"user_id": "0", "index": 0, "predictions": {"oppu": {"k0": answers("0", 4)}}}
    )
    assert "oppu" not in gather(output / "LoRA-Composition-evo", TASK)[1]


def test_table_and_files(output):
    summary = summary_of(output)
    lines = aligned(table_rows(summary)).splitlines()
    assert lines[0].split()[:5] == ["method", "k", "profile", "accuracy", "f1"]
    assert len(lines) == 2 + len(summary["rows"]) and max(map(len, lines)) <= 130
    assert lines[0].index("accuracy") == lines[2].index("0.250")
    write_summary(output, summary)
    assert read_json(output / "summary.json") == json.loads(json.dumps(summary))
    written = (output / "summary.md").read_text()
    assert "| prime | 0 | no | 0.667 [" in written and "| method | AUROC | AUROC, blind |" in written


def test_the_stage_from_its_command_line(output, write, capsys):
    golds = [{"id": key, "output": gold} for key, gold in golds_of().items()]
    write("data/test_100/user_test_100_label.json", {"task": "LaMP_2M", "golds": golds})
    users = []
    for user in USERS:
        queries = [{"id": key, "input": "x"} for key in golds_of([user])]
        users.append({"user_id": int(user), "profile": [], "query": queries})
    write("data/test_100/user_test_100.json", users)
    stage = output / "LoRA-Composition-evo"
    argv = ["--task_name", TASK.name, "--data_dir", str(output / "data"), "--output_dir", str(stage)]
    postprocess.main(argv)
    shown = capsys.readouterr().out
    assert shown.startswith("movie_tagging, k = 0") and "AUROC" in shown and f"{output / 'scores.csv'}" in shown
    assert {r["method"] for r in read_json(output / "summary.json")["rows"]} >= {"base", "rag", "prime"}
    assert (stage / "output-k2-profile.json").is_file() and (stage / "eval-k0.json").is_file()
    with pytest.raises(InputError, match="run the stage"):
        postprocess.main([*argv[:-1], str(output / "nothing")])
    write("data/test_100/user_test_100_label.json", {"task": "LaMP_2M", "golds": golds[1:]})
    before = (output / "summary.json").read_text()
    with pytest.raises(InputError, match="user_test_100_label.json: no gold for 1 .*: 0-0"):
        postprocess.main(argv)
    assert (output / "summary.json").read_text() == before


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda samples: samples[1:], "no answer to 1 of {n} queries, 0-0 for one"),
        (lambda samples: [*samples, samples[0]], "more than one answer to 1 of {n} queries, 0-0 for one"),
        (lambda samples: [*samples, {"id": "else", "output": "x"}], "an answer to else, which is not asked"),
        (lambda samples: [{**samples[0], "id": "0-1"}, *samples[1:]], "no answer to 1 of {n} queries, 0-0 for one"),
        (lambda samples: samples[::-1], ""),
    ],
)
def test_answers_that_are_missing_or_listed_twice_are_named(change, told, tmp_path):
    samples = answers("0", 1)
    users = [User("0", (), tuple(Query(sample["id"], "x", None) for sample in samples)), User("1", ())]
    predictions = {Cell("prime", 0, True): {"0": change(samples), "somebody": samples}}
    if not told:
        return check_answers(predictions, users, {"prime": tmp_path})
    where = f"{tmp_path}: user 0: prime at k0-profile: "
    with pytest.raises(InputError, match=f"^{where}{told.format(n=len(samples))}$"):
        check_answers(predictions, users, {"prime": tmp_path})
