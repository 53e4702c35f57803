"""The command line as a contract: every announced and documented command parses, every option is told and read."""

import argparse
import gc
import importlib
import os
import re
import shlex
import string
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import world

from prime import cli
from prime.settings import (
    DataSettings,
    defaults,
    group,
    int_list,
    natural,
    positive,
    recorded,
    setting,
    task_path,
)

SCRIPTS = sorted(path.name for path in world.ROOT.glob("*.py"))
SOURCE = "\n".join(path.read_text() for path in [*world.ROOT.glob("*.py"), *(world.ROOT / "prime").rglob("*.py")])


def readme_commands() -> list[list[str]]:
    """`python <script>.py ...` of the README's and docs' code blocks."""
    texts = [path.read_text() for path in [world.ROOT / "README.md", *sorted((world.ROOT / "docs").glob("*.md"))]]
    blocks = [block for text in texts for block in re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.DOTALL)]
    words = [shlex.split(line, comments=True) for block in blocks for line in expanded_lines(block)]
    return [w[1:] for w in words if len(w) > 1 and w[0].endswith(("python", "python3")) and w[1] in SCRIPTS]


def expanded_lines(block: str) -> list[str]:
    """A code block as the shell reads it: lines joined at backslashes, with the block's `name="..."` put in."""
    values: dict[str, str] = {}
    lines = []
    for line in block.replace("\\\n", " ").splitlines():
        line = string.Template(line.strip()).safe_substitute(values)
        if set_here := re.fullmatch(r'(\w+)="(.*)"', line):
            values[set_here[1]] = set_here[2]
        lines.append(line)
    return lines


@pytest.mark.parametrize("words", world.announcement(), ids=lambda words: words[0])
def test_announced_command_parses(words: list[str]) -> None:
    args = world.parser(words[0]).parse_args(words[1:])
    given = dict(zip(words[1::2], words[2::2], strict=True))
    for option, text in given.items():
        value = getattr(args, option.removeprefix("--"))
        expected = tuple(map(float, text.split(","))) if isinstance(value, tuple) else type(value)(text)
        assert value == expected, option


def test_readme_commands_parse() -> None:
    commands = readme_commands()
    assert {words[0] for words in commands} >= {"task_lora.py", "lora_composition_evo.py", "mia.py", "postprocess.py"}
    for words in commands:
        world.parser(words[0], words[1:]).parse_args(words[1:])


def test_readme_paths_exist() -> None:
    """Shell commands of the README name scripts that are there."""
    text = (world.ROOT / "README.md").read_text()
    assert "@@" not in text, "a figure is still to be filled in"
    for name in re.findall(r"(?:bash|python) ([\w./-]+\.(?:sh|py))", text):
        assert (world.ROOT / name).is_file(), name


@pytest.mark.parametrize("line", [*SCRIPTS, "mia.py --adapter"])
def test_every_option_has_help_and_is_read(line: str) -> None:
    name, *words = line.split()
    parser = world.parser(name, words)
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        assert action.help, f"{name} {action.option_strings}: no help"
        assert "None" not in parser._get_formatter()._expand_help(action), f"{name} {action.dest}"
        assert action.type is not bool, f"{name} {action.option_strings}: type=bool"
        read = re.search(rf"\.{action.dest}\b|\"{action.dest}\"", SOURCE) or action.dest == "debug"
        assert read, f"{name} {action.option_strings}: never read"


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_stage_script_is_a_page_and_says_what_it_does(name: str) -> None:
    text = (Path(world.ROOT) / name).read_text()
    for heading in ("\nReads ", "\nWrites ", "\nTakes "):
        assert heading in text, f"{name}: the docstring has no {heading.strip()!r}"
    assert len(text.splitlines()) <= 220


def test_wrong_values_are_refused_with_the_value(capsys: pytest.CaptureFixture[str]) -> None:
    words = next(words for words in world.announcement() if words[0] == "lora_composition_evo.py")
    for option, value in (("--opt_budget", "-1"), ("--top_p", "1.5"), ("--k_list", "1,x"), ("--task_name", "movies")):
        with pytest.raises(SystemExit) as stopped:
            world.parser(words[0]).parse_args([*words[1:], option, value])
        assert stopped.value.code == 2 and value.split(",")[-1] in capsys.readouterr().err


@dataclass(frozen=True, kw_only=True)
class Oven:
    degrees: int = setting(200, "of the oven", parse=positive)
    fan: bool = setting(False, "with the fan", neutral=True)
    tray: str | None = setting(None, "which tray", required=True)


@dataclass(frozen=True, kw_only=True)
class Baking:
    data: DataSettings = group()
    output_dir: str = task_path("./bread/<task_name>", "where it goes", neutral=True)
    first: Oven = group(degrees=180)
    flour: tuple[int, ...] = setting((1, 2), "sorts", parse=int_list)


def test_settings_become_options_and_options_settings() -> None:
    words = ["--task_name", "citation", "--tray", "low", "--fan", "--flour", "3"]
    baking = cli.parse(Baking, "Bakes.", words)
    assert baking.first == Oven(degrees=180, fan=True, tray="low") and baking.flour == (3,)
    assert baking.output_dir == "./bread/citation" and baking.data.folder == Path("data/citation")
    assert recorded(baking) == {
        "task_name": "citation", "data_dir": None, "degrees": 180, "tray": "low", "flour": (3,),
    }  # fmt: skip
    assert defaults(Baking)["degrees"] == 180 and "tray" not in defaults(Baking)


def test_a_stage_leaves_out_what_it_does_not_have(capsys: pytest.CaptureFixture[str]) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Raw:
        data: DataSettings = group(without=("data_dir",))
        first: Oven = group(without=("tray",), degrees=setting(90, "warm", parse=natural))

    assert cli.parse(Raw, None, ["--task_name", "citation"]).first == Oven(degrees=90)
    with pytest.raises(SystemExit):
        cli.parse(Raw, None, ["--task_name", "citation", "--tray", "low"])
    with pytest.raises(SystemExit):
        cli.parse(Baking, None, ["--task_name", "citation"])
    assert "the following arguments are required: --tray" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--task_nam citation", "there is no option --task_nam; did you mean --task_name?"),
        ("--task-name citation", "there is no option --task-name; did you mean --task_name?"),
        ("-tray=low", "there is no option -tray; did you mean --tray?"),
        ("--wine red", "there is no option --wine ("),
        ("--degrees hot", "argument --degrees: 'hot' is not a whole number from 1"),
        ("--task_name citation", "the following arguments are required: --tray"),
        ("--task_name citation --tray low --flour 1 2", "lists have commas and no spaces; what is for no option: 2"),
    ],
)
def test_a_wrong_option_is_one_line(words: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.parse(Baking, "Bakes.", words.split())
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and told in line


def test_values_that_look_like_options_are_left_alone() -> None:
    baking = cli.parse(Baking, None, ["--task_name", "citation", "--tray", "-1", "--output_dir=--x"])
    assert (baking.first.tray, baking.output_dir) == ("-1", "--x")


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_begins_with_a_command_and_every_option_is_in_a_group(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 80 columns only commands are longer, which are to be copied; no word of the docstring is lost."""
    monkeypatch.setenv("COLUMNS", "80")
    parser, doc = world.parser(name), world.script(name).__doc__.strip()
    usage, _, command, *_ = parser.format_help().split("\n\n")
    needed = " [" if name == "prepare_data.py" else " --"  # which takes one of two sources
    assert "\n" not in usage and usage.startswith(f"usage: {parser.prog}{needed}") and f"    python {name} " in command
    assert "\noptions:" not in parser.format_help() and not parser._optionals._group_actions
    told = cli.fitted(parser.description, 78)
    assert f"\n\n{told}\n\n" in parser.format_help() and sorted(told.split()) == sorted(doc.split())
    commands = [part for part in doc.split("\n\n") if part.startswith("    ")]
    assert commands and all(part in told.split("\n\n") for part in commands)
    wrapped = [part for part in told.split("\n\n") if part not in commands]
    assert [line for part in wrapped for line in part.splitlines() if len(line) > 78] == []


def test_a_docstring_is_fitted_to_the_terminal() -> None:
    """Entries hang at the column of their text; where that is too far to the right their gap closes."""
    doc = """Reads   one file and
        another
Writes  <a>      first
        <bb>     second, and
                 more

    python x.py  --a  b

A sentence that
goes on."""
    command, entries = "    python x.py  --a  b", ["Reads   one file and another", "Writes  <a>      first"]
    wide = [*entries, "        <bb>     second, and more", "", command, "", "A sentence that goes on."]
    assert cli.fitted(doc, 80).splitlines() == wide
    entries[:1] = ["Reads   one file and", "        another"]
    narrow = [*entries, "        <bb>  second,", "            and more", "", command, "", "A sentence that goes on."]
    assert cli.fitted(doc, 24).splitlines() == narrow


INTERRUPTED = "import os, signal, time\nos.kill(os.getpid(), signal.{name})\ntime.sleep(60)\n"


def least(name: str) -> list[str]:
    """The fewest words that a script takes."""
    needed = [action for action in world.parser(name)._actions if action.required]
    return [word for a in needed for word in (a.option_strings[0], next(iter(a.choices or ()), "some"))]


@pytest.mark.parametrize("name", SCRIPTS)
def test_ctrl_c_while_a_script_still_imports_is_one_line(name: str, tmp_path: Path) -> None:
    """The first library that it imports is one that presses Ctrl-C."""
    signal_name = "SIGTERM" if name == "mia.py" else "SIGINT"
    for library in ("torch", "numpy", "ijson"):
        (tmp_path / f"{library}.py").write_text(INTERRUPTED.format(name=signal_name))
    ended = subprocess.run(
        [sys.executable, name, *least(name)], cwd=world.ROOT, env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    told = f"{name}: stopped; run the same command again to go on\n"
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", told)


# What takes long to load; numpy is loaded in a tenth of a second.
HEAVY = {"torch", "transformers", "peft", "nevergrad", "scipy", "sklearn", "pandas", "matplotlib"}


@pytest.mark.parametrize(
    ("name", "option", "code"), [*((name, "--help", 0) for name in SCRIPTS), ("mia.py", "--no_such_option", 2)]
)
def test_options_are_read_before_anything_heavy_loads(name: str, option: str, code: int) -> None:
    """Modules are counted, not seconds."""
    ended = subprocess.run(
        [sys.executable, "-X", "importtime", name, option], cwd=world.ROOT, capture_output=True, text=True
    )
    loaded = [line.rpartition("|")[2].strip() for line in ended.stderr.splitlines() if "import time:" in line]
    assert ended.returncode == code and "prime.cli" in loaded
    assert HEAVY.isdisjoint(module.partition(".")[0] for module in loaded)
    assert len(loaded) < 400


def test_garbage_is_left_alone_only_while_libraries_load(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("stop_between_writes", "limit_threads", "keep_freed_memory"):  # they are for the whole process
        monkeypatch.setattr(cli, name, lambda: None)
    monkeypatch.setattr(sys, "argv", ["bake.py", "--task_name", "citation", "--tray", "low"])
    collected: list[bool] = []
    try:
        cli.check_options(Baking, "Bakes.")
        assert not gc.isenabled()
        cli.run(lambda _: collected.append(gc.isenabled()))
    finally:
        gc.enable()
        gc.unfreeze()
    assert collected == [True]


def test_results_do_not_steer_a_terminal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Ids come out of files; tables, line breaks and letters stay as they are."""
    for name in ("stop_between_writes", "limit_threads", "keep_freed_memory"):  # they are for the whole process
        monkeypatch.setattr(cli, name, lambda: None)
    cli.run(lambda _: print("2 anchors: \x1b[2J\u202e7, \u00e9\tx\n"))
    assert capsys.readouterr().out == "2 anchors: \\u001b[2J\\u202e7, \u00e9\tx\n\n"


def test_what_trains_together_is_recorded_and_how_answers_are_batched_is_not() -> None:
    """Sums are rounded in the order of the batch, so other batches are other adapters; answers do not depend on it."""
    words = ["--task_name", "citation", "--llama_model_path", "m", "--lora_ckpt", "t", "--max_batch_tokens", "64"]
    own = {"train_anchor_peft": "anchors_per_batch", "train_anchor_gate": "anchors_per_batch",
           "train_user_peft": "users_per_batch", "task_lora": ""}  # fmt: skip
    for name, together in own.items():
        script = importlib.import_module(name)
        more = ["--method", "oppu"] if name == "train_user_peft" else []
        more += [f"--{together}", "3"] if together else []
        without = [word for word in words if name != "task_lora" or word not in ("--lora_ckpt", "t")]
        kept = recorded(cli.parse(script.Settings, None, [*without, *more]))
        assert kept["max_batch_tokens"] == 64 and (not together or kept[together] == 3)
    for name in ("lora_composition_evo", "lora_composition"):
        script = importlib.import_module(name)
        assert "max_batch_tokens" not in recorded(cli.parse(script.Settings, None, words))
