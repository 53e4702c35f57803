"""The house: which wing of prime/ may import which, no circles, and no Namespace beyond the command line."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import world

# From the bottom: a wing imports from the floors below it, and from itself.
FLOORS = ["errors seeds", "settings", "runs", "users bank", "checkpoints", "engine", "merging", "attack", "report",
          "cli sources"]  # fmt: skip
NARROWER = {"bank": {"errors", "seeds", "settings"}}  # wings that may import less than all below
LARGE = {"transformers", "peft"}  # what users/ never imports; torch only within a function
FILES = [path for path in sorted(world.ROOT.glob("prime/**/*.py")) if path.name != "__init__.py"]
SOURCES = {path.relative_to(world.ROOT): path.read_text("utf-8") for path in FILES}
MODULES = {".".join(path.with_suffix("").parts): path for path in SOURCES}

ALLOWED: dict[str, set[str]] = {}
for floor in FLOORS:
    below = set(ALLOWED)
    ALLOWED |= {wing: {wing} | NARROWER.get(wing, below) for wing in floor.split()}


def imports(source: str, top_only: bool = False) -> Iterator[str]:
    """Modules that a source imports, anywhere or only at its top."""
    tree = ast.parse(source)
    for node in tree.body if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "imports are absolute"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if node.module == "prime" or inner in MODULES else node.module


def broken_rules(path: Path, source: str) -> list[str]:
    """What a module of prime/ imports and should not."""
    wing = path.with_suffix("").parts[1]
    at_the_top = set(imports(source, top_only=True))
    broken = []
    for name in imports(source):
        package, _, inner = name.partition(".")
        if package == "prime" and inner.split(".")[0] not in ALLOWED[wing]:
            broken.append(f"{path} imports {name}")
        if wing == "users" and (package in LARGE or package == "torch" and name in at_the_top):
            broken.append(f"{path} imports {name}")
    return broken


def namespaces(path: Path, source: str) -> list[str]:
    """Functions that take what argparse parsed."""
    taking = []
    functions = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef)]
    for function in functions:
        for parameter in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs):
            annotation = ast.unparse(parameter.annotation) if parameter.annotation else ""
            if parameter.arg == "args" or "Namespace" in annotation:
                taking.append(f"{path}: {function.name}")
    return taking


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_imports_go_one_way(path: Path) -> None:
    assert broken_rules(path, SOURCES[path]) == []


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("prime/runs/made_up.py", "from prime.users.data import User"),
        ("prime/bank/made_up.py", "from prime.runs import files"),
        ("prime/users/made_up.py", "def lazily():\n    import peft"),
        ("prime/users/made_up.py", "import torch.nn"),
        ("prime/report/made_up.py", "from prime import cli"),
        ("prime/engine.py", "def lazily():\n    from prime import merging"),
    ],
)
def test_an_arrow_that_is_turned_is_found(path: str, line: str) -> None:
    assert len(broken_rules(Path(path), f"import json\n{line}\nfrom prime.errors import InputError\n")) == 1


def test_no_circles() -> None:
    graph = {name: set(imports(SOURCES[path])) for name, path in MODULES.items()}
    TopologicalSorter(graph).prepare()  # a CycleError names the circle


def test_namespaces_end_at_the_command_line() -> None:
    made_up = "def a(args): ...\ndef b(own: argparse.Namespace): ...\ndef c(*args): ..."
    assert namespaces(Path("x"), made_up) == ["x: a", "x: b"]
    taking = {path: namespaces(path, source) for path, source in SOURCES.items() if path.name != "cli.py"}
    assert {path: functions for path, functions in taking.items() if functions} == {}


def test_only_what_prepares_data_reads_their_sources() -> None:
    scripts = {path.name for path in world.ROOT.glob("*.py") if "prime.sources" in path.read_text("utf-8")}
    assert scripts <= {"prepare_data.py", "gen_profile.py"}
