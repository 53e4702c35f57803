"""A git repository as people's records: the body of a commit message is answered by its subject line.

Users are authors. Names and addresses are replaced, trailers (Signed-off-by: ...), code, logs and quotations are left
out. A repository is input: git is told to run nothing that it configures and to fetch nothing, and reads no file of it
but its objects and .mailmap.
"""

from __future__ import annotations

import os
import re
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from prime.errors import InputError
from prime.sources.people import LONGEST_NAME, Limits, cut, taken, without_names
from prime.sources.placing import Tally
from prime.sources.timed import Timed

COMMITS = 200_000  # at most, the latest
BYTES = 64 << 10  # of a message at most
BODY, SUBJECT = (20, 400), (3, 14)  # words at least and at most
SAFE = ("log.showSignature=false", "core.fsmonitor=false", "core.hooksPath=/dev/null", "gpg.program=false")
FIELDS = ("%aE", "%aN", "%at", "%s", "%b")  # address and name by the mailmap, seconds, subject, body
APART = "\x1f"
LOG = ("log", "-z", "--use-mailmap", "--no-merges", f"--max-count={COMMITS}", "--encoding=UTF-8", "--no-color",
       "--no-notes", f"--format={'%x1f'.join(FIELDS)}", "HEAD", "--")  # fmt: skip
TRAILER = re.compile(r"[A-Za-z][A-Za-z-]*: .*[<@].*|(?:change-id|fixes|closes|cc|link|refs?)(?::| #).*", re.IGNORECASE)
ADDRESS = re.compile(r"<?\S+@\S+\.\S+|https?://\S+")
ASIDE = (" ", "\t", ">", "|", "#", "---", "+++", "@@", "diff ", "$ ")  # lines of code, logs, quotations


def git_records(clone: Path, limits: Limits, tally: Tally) -> list[Timed]:
    """The records of a repository's authors.

    Raises:
        InputError: no repository, or git cannot read it.
    """
    names: set[str] = set()
    seen: set[tuple[str, str]] = set()
    found: list[Timed] = []
    for message in messages(clone):
        tally.counts["commits read"] += 1
        fields = message.split(APART, len(FIELDS) - 1)
        if len(fields) < len(FIELDS):
            tally.counts["commits that cannot be read"] += 1
            continue
        address, name, seconds, subject, body = fields
        if 1 < len(name.split()) <= LONGEST_NAME:
            names.add(" ".join(name.lower().split()))
        text, subject = prose(body), " ".join(subject.split())
        if reason := unfit(text, subject):
            tally.counts[reason] += 1
        elif (text, subject) in seen:
            tally.counts["commits picked twice"] += 1
        else:
            seen.add((text, subject))
            found.append(Timed(address.lower(), float(seconds or "nan"), cut(text, limits.words), subject))
    kept = taken(found, limits, tally)
    return [r._replace(input=without_names(r.input, names), target=without_names(r.target, names)) for r in kept]


def prose(body: str) -> str:
    """What a message says in words, as one line."""
    lines, fenced = [], False
    for line in body.splitlines():
        if line.startswith("```"):
            fenced = not fenced
        elif not (fenced or line.startswith(ASIDE) or TRAILER.fullmatch(line.strip())):
            lines.append(line)
    return " ".join(ADDRESS.sub("", " ".join(lines)).split())


def unfit(text: str, subject: str) -> str:
    """Why a message is of no use; "" if it is."""
    if subject.lower().startswith(("revert ", "merge ", "fixup!", "squash!")):
        return "commits that revert, merge or fix up"
    for what, words, (least, most) in (("bodies", text.split(), BODY), ("subjects", subject.split(), SUBJECT)):
        if not least <= len(words) <= most:
            return f"commits whose {what} have fewer than {least} or more than {most} words"
    return "commits that are no text" if "\ufffd" in text + subject or ADDRESS.search(subject) else ""


def messages(clone: Path) -> Iterator[str]:
    """Messages of `git log`, the latest first; those of more than `BYTES` are left out."""
    with log_of(clone) as stream:
        waiting, overlong = b"", False
        while block := stream.read(1 << 20):
            *whole, waiting = (waiting + block).split(b"\0")
            for message in whole:
                if not overlong and len(message) <= BYTES:
                    yield message.decode("utf-8", "replace")
                overlong = False
            if len(waiting) > BYTES:
                waiting, overlong = b"", True
        if waiting and not overlong:
            yield waiting.decode("utf-8", "replace")


@contextmanager
def log_of(clone: Path) -> Iterator[IO[bytes]]:
    """The output of `git log` in a repository."""
    if not clone.is_dir():
        raise InputError(f"{clone}: no such directory (--git)")
    options = [word for setting in SAFE for word in ("-c", setting)]
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    env |= {"GIT_NO_LAZY_FETCH": "1", "GIT_TERMINAL_PROMPT": "0", "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
    with tempfile.TemporaryFile() as complaints:
        try:
            process = subprocess.Popen(
                ["git", "--no-pager", *options, "-C", str(clone.absolute()), *LOG],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=complaints, env=env,
            )  # fmt: skip
        except FileNotFoundError:
            raise InputError("--git needs the program git, which is not installed") from None
        assert process.stdout is not None
        try:
            yield process.stdout
        except BaseException:
            process.kill()
            raise
        finally:
            process.stdout.close()
            failed = process.wait()
        if failed:
            complaints.seek(0)
            lines = complaints.read(2000).decode("utf-8", "replace").split("\n")
            raise InputError(f"{clone}: git cannot read it: {lines[0] or f'exit code {failed}'}")
