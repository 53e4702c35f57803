"""Git repositories made on the spot: authors who commit in turn, each with a habit in the subject lines."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

THINGS = ("parser", "cache", "index", "socket", "buffer", "editor", "logger", "loader")
FAULTS = ("a leak", "a crash", "an overflow", "a wrong count", "a lost line", "a slow path")
VERBS = ("fix", "Fixes", "mend", "Repair")


def commits(authors: int, each: int) -> list[tuple[str, str, str]]:
    """Author, subject and body of each commit, in order of time; no two alike."""
    made = []
    for number in range(each):
        for author in range(authors):
            thing, fault = THINGS[(number + author) % len(THINGS)], FAULTS[(number * authors + author) % len(FAULTS)]
            case = number * authors + author
            body = (
                f"When case {case} comes up, the {thing} shows {fault} that nobody saw before. Check for it first, and "
                f"tell the caller how the {thing} was found, so that the next reader has an easier time."
            )
            made.append((f"Author Number{author}", f"{VERBS[author % len(VERBS)]} {fault} in {thing} {case}", body))
    return made


def build(folder: Path, history: Sequence[tuple[str, str, str]]) -> Path:
    """A bare repository with these commits, one second apart, written by fast-import."""
    folder.mkdir(parents=True)
    git(folder, "init", "-q", "--bare", "-b", "main")
    lines = []
    for number, (name, subject, body) in enumerate(history):
        mail, when = f"{name.lower().replace(' ', '.')}@example.org", f"{1_700_000_000 + number} +0000"
        message = f"{subject}\n\n{body}"
        lines += ["commit refs/heads/main", f"author {name} <{mail}> {when}", f"committer C <c@example.org> {when}"]
        lines += [f"data {len(message.encode())}", message, ""]
    subprocess.run(["git", "-C", str(folder), "fast-import", "--quiet"], input="\n".join(lines).encode(), check=True)
    return folder


def git(folder: Path, *words: str) -> None:
    subprocess.run(["git", "-C", str(folder), *words], check=True, capture_output=True)
