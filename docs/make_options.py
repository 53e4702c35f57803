"""Writes docs/options.md from the scripts' own parsers: `python docs/make_options.py` after changing an option.

tests/test_docs.py compares the page with what this would write.
"""

import argparse
import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "options.md"

INTRO = """# Options

Every option of every stage, as `python <stage>.py --help` prints it. Written by `python docs/make_options.py`.
"""


def default_text(action: argparse.Action) -> str:
    if action.required:
        return "required"
    if action.nargs == 0:
        return "off"
    if action.default is None:
        return ""
    given = action.default
    text = ",".join(map(str, given)) if isinstance(given, (list, tuple)) else str(given)
    return f"`{text}`" if text else ""


def row(action: argparse.Action) -> str:
    choices = f" ({', '.join(map(str, action.choices))})" if action.choices else ""
    told = " ".join(f"{action.help}{choices}".replace("%%", "%").replace("|", r"\|").replace("<", "&lt;").split())
    return f"| `{action.option_strings[-1]}` | {default_text(action)} | {told} |"


def groups(parser: argparse.ArgumentParser) -> list[tuple[str, list[argparse.Action]]]:
    """Options by the group they are declared in, the ungrouped ones first."""
    own = [a for a in parser._actions if a.option_strings and not isinstance(a, argparse._HelpAction)]
    named = [(g.title, g._group_actions) for g in parser._action_groups if g.title not in ("options",)]
    grouped = {id(action) for _, members in named for action in members}
    parts = [("", [action for action in own if id(action) not in grouped])]
    parts += [(str(title), [action for action in own if action in members]) for title, members in named]
    return [(title, members) for title, members in parts if members]


def section(name: str, parser: argparse.ArgumentParser) -> str:
    """A script: the first line of its docstring, and a table for each group of options."""
    lines = [f"## {name}", "", (parser.description or "").strip().splitlines()[0], ""]
    for title, members in groups(parser):
        lines += [f"**{title}**", ""] if title else []
        lines += ["| option | default | meaning |", "|---|---|---|", *map(row, members), ""]
    return "\n".join(lines)


def stages() -> dict[str, argparse.ArgumentParser]:
    """The parser of every stage script, in the order of the stages their docstrings give; then the others."""
    found = {}
    for path in sorted(ROOT.glob("*.py")):
        module = importlib.import_module(path.stem)
        if hasattr(module, "build_parser"):
            found[path.name] = module.build_parser()
    return dict(sorted(found.items(), key=lambda one: ((one[1].description or "").split(":")[0].split(",")[0], one[0])))


def text() -> str:
    found = stages()
    links = "\n".join(f"- [{name}](#{name.replace('.', '')})" for name in found)
    return "\n".join([INTRO, links, "", *(section(name, parser) for name, parser in found.items())]).rstrip() + "\n"


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    PAGE.write_text(text(), encoding="utf-8")
    print(f"wrote {PAGE}")
