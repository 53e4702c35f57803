"""The one table of methods: light to ask, its order, and that the whole job runs into its folders."""

import subprocess
import sys
from pathlib import Path

from prime.report.methods import METHODS, REFERENCE, SHORT_LIST, SHORTEST_LIST, choices, place

ROOT = Path(__file__).parent.parent


def test_rows_stand_in_the_order_of_the_table_and_unknown_ones_last() -> None:
    names = list(METHODS)
    assert sorted(["my_own", *reversed(names), "another"], key=place) == [*names, "another", "my_own"]
    assert {REFERENCE, *SHORT_LIST, *SHORTEST_LIST} <= set(names)


def test_a_choice_of_a_stage_names_one_method() -> None:
    searched = choices("lora_composition_evo")
    assert {choice: method.name for choice, method in searched.items()} == {
        "metric": "prime", "nll": "lorahub", "best_sharer": "best_sharer", "uniform": "uniform",
    }  # fmt: skip
    assert set(choices("train_user_peft")) == {"oppu", "mta"}


def test_reproduce_runs_every_method_into_its_folder() -> None:
    script = (ROOT / "reproduce.sh").read_text()
    for method in METHODS.values():
        assert (ROOT / f"{method.stage}.py").is_file() and f"{method.stage}.py" in script
        assert f"$out/{method.folder}" in script or f"baseline {method.name} {method.folder}" in script


def test_the_command_prints_a_line_a_method_and_imports_nothing_heavy() -> None:
    code = "import runpy, sys; runpy.run_module('prime.report.methods', run_name='__main__'); "
    code += "assert not {'torch', 'numpy', 'matplotlib'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    fields = [line.split("\t") for line in done.stdout.splitlines()]
    assert [name for name, *_ in fields] == list(METHODS)
    assert fields[-1][:5] == ["oppu", "OPPU", "train_user_peft.py", "gradients", "own"]
