"""merge_adapters.py: adapters of one's own, of other ranks and modules, merged by pairs of one's own."""

import json
import random
import shutil
from pathlib import Path

import numpy as np
import own_world
import pytest
import tiny
import torch
import world
from peft import PeftModel
from rouge_score.rouge_scorer import RougeScorer
from test_cli import readme_commands
from transformers import AutoTokenizer

import merge_adapters
from prime.bank.lora import Adapter, merge, norm
from prime.errors import InputError
from prime.merging.own_merge import Merging, Question
from prime.runs.files import read_json
from prime.users.answers import ANY_TEXT
from prime.users.metrics import METRICS
from prime.users.own_metric import own_metric
from prime.users.pairs import Pair, read_pairs

LIMIT = 4  # new tokens


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Model, six adapters, and 30 pairs: the answers of the second adapter."""
    root = tmp_path_factory.mktemp("own")
    model = own_world.write_model(root / "model")
    adapters = own_world.six_adapters(root, model)
    teacher = PeftModel.from_pretrained(own_world.plain(model), adapters[1]).eval()
    stream, tokenizer, rows = random.Random(0), AutoTokenizer.from_pretrained(model), []
    for _ in range(30):
        text = own_world.sentence(stream, 5)
        rows.append({"input": text, "output": own_world.answer(teacher, tokenizer, text, LIMIT)})
    own_world.write_lines(root / "mine.jsonl", rows)
    return root


def command(*more: str, adapters: int = 6, pairs: str = "mine.jsonl") -> list[str]:
    named = [f"adapter_{place}" for place in range(adapters)]
    words = ["--llama_model_path", "model", "--adapters", *named, "--pairs", pairs, "--max_gen_len", str(LIMIT)]
    return [*words, "--device", "cpu", *more]


@pytest.fixture(scope="module")
def merged(here: Path) -> Path:
    """The result of a search in which no single adapter may win, so that a mix of six is cut to rank 16."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(here)
        merge_adapters.main(command("--search_only", "--output_dir", "merged"))
    return here / "merged"


def answers(model: torch.nn.Module, here: Path) -> list[str]:
    tokenizer = AutoTokenizer.from_pretrained(here / "model")
    return [own_world.answer(model, tokenizer, pair.input, LIMIT) for pair in read_pairs(here / "mine.jsonl")]


def test_plain_peft_answers_as_reported(here: Path, merged: Path) -> None:
    result = read_json(merged / "result.json")
    assert np.count_nonzero(result["weights"]) == 6 and read_json(merged / "adapter_config.json")["r"] == 16
    folders = {
        "base": None,
        "merged": merged,
        "adapter_0 alone": here / "adapter_0",
        "adapter_3 alone": here / "adapter_3",
    }
    for row, folder in folders.items():
        model = own_world.plain(here / "model")
        model = PeftModel.from_pretrained(model, folder).eval() if folder else model
        assert [told["output"] for told in result["predictions"][row]] == answers(model, here), row
    assert len({json.dumps(told) for told in result["predictions"].values()}) > 5  # the rows do differ


def test_scores_are_those_of_the_pairs_that_were_held_out(here: Path, merged: Path) -> None:
    result, scorer = read_json(merged / "result.json"), RougeScorer(["rouge1"])
    golds = {str(pair.line): pair.output for pair in read_pairs(here / "mine.jsonl")}
    assert len(result["held_out"]) == 9 and len(golds) == 30
    for row, predictions in result["predictions"].items():
        found = {told["id"]: scorer.score(golds[told["id"]], told["output"])["rouge1"].fmeasure for told in predictions}
        held = [value for line, value in found.items() if line in result["held_out"]]
        others = [value for line, value in found.items() if line not in result["held_out"]]
        scores = result["scores"][row]
        assert (scores["held_out"]["mean"], scores["searched_by"]["mean"]) == pytest.approx(
            (np.mean(held), np.mean(others))
        )


def test_the_cut_is_told(here: Path, merged: Path) -> None:
    """Against dense matrices: the saved file's update and the exact merge's."""
    from prime.checkpoints.peft import load_adapter

    result = read_json(merged / "result.json")
    adapters = [load_adapter(here / f"adapter_{place}") for place in range(6)]
    exact = tiny.dense_updates(merge(adapters, torch.tensor(result["weights"]), "delta"))
    saved = tiny.dense_updates(load_adapter(merged))
    lost = sum((exact[name] - saved[name]).square().sum() for name in exact)
    whole = sum(update.square().sum() for update in exact.values())
    assert result["lost"] == pytest.approx(float((lost / whole).sqrt()), rel=1e-3) and result["lost"] > 0.01
    assert norm(Adapter(load_adapter(merged).factors, 3.0)) == pytest.approx(
        3 * float(sum(update.square().sum() for update in saved.values()).sqrt())
    )


def test_an_interrupted_merge_goes_on(here: Path, merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped before the judging, the search is not computed again; the files end up as those of an unbroken run."""
    monkeypatch.chdir(here)
    judged, searched = Merging.answers, []
    monkeypatch.setattr(Merging, "answers", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    words = command("--search_only", "--output_dir", "again")
    with pytest.raises(KeyboardInterrupt):
        merge_adapters.main(words)
    assert not (here / "again/result.json").exists()
    monkeypatch.setattr(Merging, "answers", judged)
    monkeypatch.setattr("prime.merging.population.Population._decode", lambda *_: searched.append(1))
    merge_adapters.main(words)
    assert searched == []
    for name in merge_adapters.MADE:
        assert (here / "again" / name).read_bytes() == (merged / name).read_bytes(), name
    assert not list((here / "again/working").glob("*.jsonl"))
    with pytest.raises(InputError, match="sim_penalty: there .0.1., now .0.5."):
        merge_adapters.main([*words, "--sim_penalty", "0.5"])


@pytest.mark.slow
def test_ranks_can_be_bounded_and_the_exact_merge_kept(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two adapters of ranks 4 and 8: cut to 3, or whole."""
    monkeypatch.chdir(here)
    for limit, rank in (("3", 3), ("0", 12)):
        folder = f"rank-{limit}"
        more = ("--max_rank", limit, "--opt_budget", "2", "--search_only", "--output_dir", folder)
        merge_adapters.main(command(*more, adapters=2))
        result, told = read_json(Path(folder) / "result.json"), capsys.readouterr().out
        assert read_json(Path(folder) / "adapter_config.json")["r"] == result["rank"] == rank
        assert (result["lost"] < 1e-6) == (limit == "0") and f"merged adapter: {folder} (PEFT, rank {rank};" in told


@pytest.mark.slow
def test_where_the_base_wins_no_adapter_is_written(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(here)
    rows = [{"input": pair.input, "output": text} for pair, text in
            zip(read_pairs("mine.jsonl"), answers(own_world.plain(here / "model"), here), strict=True)]  # fmt: skip
    own_world.write_lines(here / "bases.jsonl", rows)
    merge_adapters.main(command("--metric", "exact", "--output_dir", "base-wins", adapters=2, pairs="bases.jsonl"))
    result = read_json(here / "base-wins/result.json")
    assert result["scores"]["base"]["held_out"]["mean"] == 1.0 and "merged" not in result["scores"]
    assert not (here / "base-wins/adapter_config.json").exists()
    assert "no adapter is written" in capsys.readouterr().out


@pytest.mark.slow
def test_the_documented_commands_run(here: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of README and docs, as typed, in a folder with the files that they name."""
    shutil.copytree(here / "model", tmp_path / world.CHECKPOINT)
    for place, name in enumerate("abc"):
        shutil.copytree(here / f"adapter_{place}", tmp_path / name)
    lines = (here / "mine.jsonl").read_text().splitlines(keepends=True)
    for name, part in (("mine", lines), ("members", lines[:15]), ("non_members", lines[15:]), ("others", lines[15:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(part))
    monkeypatch.chdir(tmp_path)
    commands = [words for words in readme_commands() if {"--pairs", "--adapter"} & set(words)]
    assert [words[0] for words in commands].count("mia.py") == 2 and len(commands) == 4
    for place, words in enumerate(commands):
        world.run([*words, "--output_dir", f"out-{place}", *(["--max_gen_len", "4"] if "--pairs" in words else [])])
    assert Path("out-0/adapter_config.json").exists() and Path("out-1/audit_scores.csv").exists()


# -- pairs and metrics ----------------------------------------------------------------------------------------------


def question(pairs: list[Pair], seed: int = 0) -> Question:
    return Question.of(pairs, METRICS["rouge-1"], None, 0.3, seed)


def test_the_search_never_sees_what_is_held_out() -> None:
    pairs = [Pair(line, f"in {line % 18}", f"out {line % 18}") for line in range(1, 31)]  # twelve are there twice
    drawn = question(pairs)
    held = {drawn.user.profile[place]["input"] for place in drawn.held_out}
    assert held.isdisjoint(item["input"] for item in drawn.searched_by.profile)
    assert len(drawn.searched_by.profile) + len(drawn.held_out) == 30
    assert drawn.held_out == question(pairs).held_out != question(pairs, seed=1).held_out


def test_the_metrics_are_plain_ones() -> None:
    golds, answers = ["4", "2", "5", "1"], ["4", "3.5", "good", "-"]
    pairs = [Pair(line, "?", gold) for line, gold in enumerate(golds, 1)]

    def scored(name: str) -> float:
        metric = own_metric(name, "mine.jsonl", pairs)
        rows = [metric.stats(answer, gold, ANY_TEXT) for answer, gold in zip(answers, golds, strict=True)]
        return float(metric.finish(np.sum(rows, axis=0)))

    assert scored("mae") == pytest.approx((0 + 1.5 + 4 + 4) / 4)  # the ends are 1 and 5: the pairs' own
    assert scored("exact") == scored("accuracy") == 0.25
    assert not own_metric("mae", "mine.jsonl", pairs).higher_is_better and "mae" not in METRICS


def test_a_function_of_ones_own_judges(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the objective, and a change of it is seen."""
    monkeypatch.chdir(here)
    source = "def last(prediction, reference):\n    return float(prediction.split()[-1] == reference.split()[-1])\n"
    (here / "my_metric.py").write_text(source)
    words = command("--metric", "my_metric:last", "--opt_budget", "2", "--output_dir", "by-function", adapters=2)
    merge_adapters.main(words)
    result = read_json("by-function/result.json")
    golds = {str(pair.line): pair.output.split()[-1] for pair in read_pairs("mine.jsonl")}
    for row, predictions in result["predictions"].items():
        right = [
            told["output"].split()[-1] == golds[told["id"]] for told in predictions if told["id"] in result["held_out"]
        ]
        assert result["scores"][row]["held_out"]["mean"] == pytest.approx(np.mean(right))
    (here / "my_metric.py").write_text(f"# changed\n{source}")
    assert "my_metric:last" not in METRICS
    with pytest.raises(InputError, match="metric: there sha256"):
        merge_adapters.main(words)


def test_a_space_stands_between_input_and_output_unless_there_is_one() -> None:
    assert [Pair(1, text, "b").target for text in ("a", "a ", "a\n", "")] == [" b", "b", "b", "b"]
    assert Pair(1, "a", "\nb").target == "\nb"


def test_csv_and_jsonl_hold_the_same_pairs(tmp_path: Path) -> None:
    rows = [{"input": 'say "hi",\nplease', "output": "hi", "user": "u"}, {"input": "2 + 2", "output": 4, "user": 7}]
    own_world.write_lines(tmp_path / "a.jsonl", rows)
    (tmp_path / "a.csv").write_text('output,input,user,more\nhi,"say ""hi"",\nplease",u,\n4,2 + 2,7,x\n')
    one, other = (read_pairs(tmp_path / name) for name in ("a.jsonl", "a.csv"))
    assert [(pair.input, pair.output, pair.user) for pair in one] == [
        ('say "hi",\nplease', "hi", "u"), ("2 + 2", "4", "7")
    ]  # fmt: skip
    assert [vars(pair) | {"line": 0} for pair in one] == [vars(pair) | {"line": 0} for pair in other]


# -- what newcomers get wrong: one line that says what to do --------------------------------------------------------


GOOD = '{"input": "a", "output": "b"}\n'
FILES = {
    "no such file": ("missing.jsonl", None, "missing.jsonl: No such file"),
    "another ending": ("mine.txt", GOOD, "pairs are read from .jsonl (an object a line) or .csv"),
    "a JSON list": ("list.jsonl", f"[{GOOD}]", "list.jsonl: a JSON list; one object a line is expected: jq -c"),
    "no JSON": ("broken.jsonl", GOOD + "{'input': 'a'}\n", "broken.jsonl: line 2: not JSON"),
    "other fields": ("other.jsonl", '{"prompt": "a", "completion": "b"}\n' * 9,
                     "no line has the fields input and output (line 1 has prompt, completion); rename them"),
    "no output": ("half.jsonl", GOOD * 4 + '{"input": "a"}\n', "half.jsonl: line 5: no field 'output' (it has input)"),
    "an empty output": ("empty.jsonl", GOOD + '{"input": "a", "output": " "}\n',
                        "empty.jsonl: line 2: an empty output; fill it in or remove the line"),
    "a list as output": ("listed.jsonl", GOOD + '{"input": "a", "output": ["b"]}\n',
                         "listed.jsonl: line 2: output is a list, expected a text"),
    "nothing": ("nothing.jsonl", "\n", "nothing.jsonl: holds no pairs; a line is"),
    "no text": ("model.jsonl", b"\xff\xfe\x00", "model.jsonl: not UTF-8 text (byte 0)"),
    "a CSV without names": ("bare.csv", "a,b\nc,d\n", "no line has the fields input and output (line 2 has a, b)"),
    "a short CSV row": ("short.csv", "input,output\na,b\nc\n", "short.csv: line 3: no field 'output' (it has input)"),
    "too few pairs": ("few.jsonl", GOOD * 30, "few.jsonl: 1 different pairs; give 4 or more"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", FILES)
def test_a_wrong_file_of_pairs(mistake: str, inside: Path) -> None:
    name, content, expected = FILES[mistake]
    if content is not None:
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())
    told(command(pairs=name, adapters=2), expected)


def told(words: list[str], expected: str) -> None:
    """The command ends with one line that holds the expected words, before a folder is made."""
    with pytest.raises(InputError) as stopped:
        merge_adapters.main([*words, *(["--output_dir", "never"] if "--output_dir" not in words else [])])
    assert expected in str(stopped.value) and "\n" not in str(stopped.value)
    assert not Path("never").exists()


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--adapters", "adapter_0"], "--adapters: one adapter, nothing to merge it with; give two or more"),
        (["--adapters", "adapter_0", "adapter_0/"], "adapter_0/: given twice (as adapter_0); leave one out"),
        (["--adapters", "adapter_0", "model"], "model: a model, not an adapter; --llama_model_path takes it"),
        (["--adapters", "adapter_0,adapter_1", "adapter_2"], "no such directory; adapters are parted by spaces"),
        (
            ["--adapters", "adapter_0", "wide"],
            "wide: made for another base than model: model.layers.0.self_attn.q_proj",
        ),
        (
            ["--llama_model_path", "adapter_0"],
            "adapter_0: an adapter, not a model; give the base that it was trained on",
        ),
        (["--output_dir", "adapter_0"], "--output_dir adapter_0: holds an adapter already; give a folder of its own"),
        (["--metric", "rouge1"], "--metric rouge1: no such metric; give rouge-1, rouge-L, accuracy, exact, mae, or"),
        (["--metric", "my_metric.py:f"], "--metric my_metric.py:f: give the module, not its file: my_metric:f"),
        (["--metric", "json:grade"], "--metric json:grade: json has no function 'grade'"),
        (["--metric", "no_such_module:f"], "no_such_module cannot be imported from here: ModuleNotFoundError"),
        (["--opt_type", "cmaes"], "--opt_type cmaes: nevergrad has no such optimizer; did you mean one of"),
    ],
)
def test_a_wrong_option(more: list[str], expected: str, inside: Path) -> None:
    if "wide" in more and not Path("wide").exists():
        own_world.write_adapter(own_world.write_model(inside / "wider", hidden=64), inside / "wide", 4, ["q_proj"], 0)
    told([*command(), *more], expected)


def test_outputs_that_are_no_numbers_have_no_distance(inside: Path) -> None:
    own_world.write_lines(Path("rated.jsonl"), [{"input": str(i), "output": i} for i in range(5)])
    with open("rated.jsonl", "a") as file:
        file.write('{"input": "6", "output": "good"}\n')
    told([*command(pairs="rated.jsonl"), "--metric", "mae"], "rated.jsonl: line 6: the output 'good' is no number")


def test_a_function_that_fails_is_named(inside: Path) -> None:
    Path("failing.py").write_text("def ratio(prediction, reference):\n    return 1 / len('')\n")
    shutil.rmtree("never", ignore_errors=True)
    pairs = read_pairs("mine.jsonl")
    metric = own_metric("failing:ratio", "mine.jsonl", pairs)
    with pytest.raises(InputError, match="--metric failing:ratio: ZeroDivisionError: .*for the prediction 'a'"):
        metric.stats("a", "b", ANY_TEXT)


def test_what_is_only_doubtful_is_told(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Few held-out pairs, labels that are free text, an adapter that names another base."""
    shutil.copytree("adapter_0", "renamed", dirs_exist_ok=True)
    config = read_json("renamed/adapter_config.json")
    Path("renamed/adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/other"}))
    words = [
        "--adapters",
        "renamed",
        "adapter_1",
        "--metric",
        "accuracy",
        "--opt_budget",
        "0",
        "--output_dir",
        "doubts",
    ]
    with pytest.warns(UserWarning, match="renamed/adapter_config.json: made for the base 'org/other', and used on"):
        merge_adapters.main([*command(), *words])
    err = capsys.readouterr().err
    assert "only 9 pairs are held out" in err and "different outputs in 30 pairs; free text is for exact" in err
