"""Are two output folders of the same commands the same, byte for byte?

Reads   two folders written by reproduce.sh or a stage, by two versions of the code on the same machine
Writes  nothing; prints each file that differs or is missing, and how many are equal; exit code 1 if one differs
Takes   seconds.

    python benchmarks/same_results.py output_of_one_version output_of_another

Left out are the files that differ from run to run: seconds.json, working/, marks of finished steps, and the tables
and pages that show seconds (summary.*, report.html). The folders' own paths, which settings and cards quote, are made
equal first; so is the order of the keys of settings, and options that one version alone has are named once.
"""

import argparse
import json
import re
import sys
from pathlib import Path

SKIPPED = ("seconds.json", "summary.json", "summary.md", "report.html")
SETTINGS = ("settings", "attacked", "anchors")  # keys under which files quote a run's settings


def files_of(root: Path) -> dict[str, Path]:
    """Files to compare, by their path below the folder."""
    names = {}
    for path in sorted(root.rglob("*")):
        below = path.relative_to(root)
        if path.is_file() and path.name not in SKIPPED and not {"working", ".steps"} & set(below.parts):
            names[str(below)] = path
    return names


def content_of(path: Path, root: Path) -> bytes:
    return path.read_bytes().replace(str(root).encode(), b"ROOT").replace(b"\r\n", b"\n")


def settings_removed(value: object, options: dict[str, object]) -> object:
    """The JSON without the settings it quotes, which are gathered in `options`."""
    if isinstance(value, list):
        return [settings_removed(part, options) for part in value]
    if not isinstance(value, dict):
        return value
    rest = {}
    for key, part in value.items():
        if key in SETTINGS and isinstance(part, dict):
            options |= {name: setting for name, setting in part.items() if name not in SETTINGS}
            settings_removed(part, options)
        else:
            rest[key] = settings_removed(part, options)
    return rest


def differences(first: bytes, second: bytes, name: str) -> list[str]:
    """What differs in one file: nothing, the options of one version, or all of it."""
    if first == second:
        return []
    if name.endswith("README.md"):
        lines = set(first.decode().splitlines()) ^ set(second.decode().splitlines())
        rows = [re.fullmatch(r"\| (\w+) \| .* \|", line) for line in lines]
        return sorted({f"option {row[1]}" if row else "content" for row in rows})
    if not name.endswith(".json"):
        return ["content"]
    of_first: dict[str, object] = {}
    of_second: dict[str, object] = {}
    if settings_removed(json.loads(first), of_first) != settings_removed(json.loads(second), of_second):
        return ["content"]
    both = of_first.keys() | of_second.keys()
    absent = object()
    return [f"option {key}" for key in sorted(both) if of_first.get(key, absent) != of_second.get(key, absent)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    args = parser.parse_args()
    first, second = files_of(args.first), files_of(args.second)
    by_reason: dict[str, list[str]] = {}
    for name in sorted(first.keys() | second.keys()):
        reasons = ["only in one of them"]
        if name in first and name in second:
            contents = content_of(first[name], args.first.resolve()), content_of(second[name], args.second.resolve())
            reasons = differences(*contents, name)
        for reason in reasons:
            by_reason.setdefault(reason, []).append(name)
    for reason, names in by_reason.items():
        shown = "\n  ".join(names if reason in ("content", "only in one of them") else names[:3])
        print(f"{reason}: {len(names)} files\n  {shown}")
    print(f"{len(first.keys() & second.keys())} files in both")
    sys.exit(bool(by_reason.keys() & {"content", "only in one of them"}))


if __name__ == "__main__":
    main()
