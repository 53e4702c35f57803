"""The wording of every prompt: how a task's templates are made, and the check of those that a file gives.

A task's own are in its file (`prime.users.tasks`); the wording of the built-in ones is ours. A file given by
`--prompt_path` replaces it, in the published schema: JSON, `{task: {key: template}}` with these keys.

    prompt                 a test query: the article; in citation a title and two options
    full_prompt            the same with its answer, which is what training learns
    OPPU_input             a history item as a question
    OPPU_full              the same with its answer
    retrieval_history      a history item as it is shown when it is retrieved
    retrieval_query        the text that a history item is compared by with earlier items
    retrieval_query_wokey  the text that a test query is compared by with the history

Templates are plain `str.format` strings, checked when they are loaded. `prompt`, `full_prompt` and
`retrieval_query_wokey` hold positional `{}`; the others hold names of item fields. Nothing else is allowed in braces:
no attribute, index, conversion or format, so a template reaches nothing but those texts. Literal braces are
written `{{` and `}}`.
"""

from __future__ import annotations

import os
import string
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from prime.errors import InputError
from prime.runs.files import read_json
from prime.users.task import Task

Templates = Mapping[str, str]
KEYS = (
    "prompt", "full_prompt", "retrieval_history", "retrieval_query", "retrieval_query_wokey",
    "OPPU_input", "OPPU_full",
)  # fmt: skip


# -- a task's own ---------------------------------------------------------------------------------------------------


def literal(text: str) -> str:
    """A text as a template holds it: its braces stand for themselves."""
    return text.replace("{", "{{").replace("}", "}}")


def wording(intro: str, name: str, field: str, answer: str, target: str) -> dict[str, str]:
    """Templates of a task whose history asks the same question as its test.

    Args:
        intro: the instruction, in front of everything.
        name, field: how the article is introduced, and the item's field that holds it.
        answer, target: how the answer is introduced, and the item's field that holds it.
    """
    intro, name, answer = literal(intro), literal(name), literal(answer)
    query = f"{intro}{name}: {{}} {answer}:"
    item = f"{intro}{name}: {{{field}}} {answer}:"
    return {
        "prompt": query,
        "full_prompt": query + " {}",
        "retrieval_history": f"{name}: {{{field}}} {answer}: {{{target}}}\n",
        "retrieval_query": f"{{{field}}}",
        "retrieval_query_wokey": "{}",
        "OPPU_input": item,
        "OPPU_full": f"{item} {{{target}}}",
    }


# -- a file of templates --------------------------------------------------------------------------------------------


def load_templates(path: str | os.PathLike[str] | None, task: Task) -> dict[str, str]:
    """The task's templates: its own, or those of a file.

    Raises:
        InputError: the file has none for this task, or all that is wrong with them.
    """
    if path is None:
        return dict(task.templates)
    rows = read_rows(path, task)
    refuse_problems(path, task, template_problems(rows, task))
    return {key: rows[key] for key in KEYS}


def read_rows(path: str | os.PathLike[str], task: Task) -> dict[str, Any]:
    """What a template file has for the task, not yet checked; InputError where it has nothing."""
    table = read_json(path)
    rows = table.get(task.name) if isinstance(table, dict) else None
    if not isinstance(rows, dict):
        raise InputError(f"{path}: no templates for task '{task.name}'")
    return rows


def refuse_problems(path: str | os.PathLike[str], task: Task, problems: Sequence[str]) -> None:
    """InputError with all problems of the task's templates, if there are any."""
    if problems:
        raise InputError.many([f"{path}: task '{task.name}': {problem}" for problem in problems])


def template_problems(rows: Mapping[str, Any], task: Task) -> list[str]:
    """What is wrong with the task's templates."""
    return key_problems(rows, KEYS, task) or _answer_problems(rows)


def key_problems(rows: Mapping[str, Any], keys: Iterable[str], task: Task) -> list[str]:
    """What is wrong with the templates under these keys, each looked at alone."""
    problems = []
    for key in keys:
        if key not in rows:
            problems.append(f"key '{key}': missing")
        elif not isinstance(rows[key], str):
            problems.append(f"key '{key}': not a text")
        else:
            problems += [f"key '{key}': {problem}" for problem in _field_problems(rows[key], key, task)]
    return problems


def _field_problems(template: str, key: str, task: Task) -> list[str]:
    """What is wrong with the braces of one template."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        return [f"{error} (a literal brace is written {{{{ or }}}})"]
    names, problems = [], []
    for _, name, spec, conversion in parts:
        if name is None:  # literal text behind the last field
            continue
        names.append(name)
        if conversion or spec:
            problems.append(f"field '{{{name}}}': conversions and formats are not allowed")
    expected = _positional_fields(task).get(key)
    allowed = task.fields if expected is None else ("",)
    listed = ", ".join(f"{{{name}}}" for name in allowed)
    problems += [f"field '{{{name}}}': not allowed, only {listed}" for name in names if name not in allowed]
    if expected is not None and not problems and len(names) != expected:
        problems.append(f"field '{{}}': found {len(names)} times, expected {expected}")
    return problems


def _positional_fields(task: Task) -> dict[str, int]:
    """How many `{}` the templates of these keys hold; those of other keys name their fields."""
    parts = task.query_parts
    return {"prompt": parts, "full_prompt": parts + 1, "retrieval_query_wokey": 1, "profile": 1}


def _answer_problems(rows: Mapping[str, str]) -> list[str]:
    """The answer is what a full template adds to its question, so it has to begin with it and add something."""
    problems = []
    for question, full in (("prompt", "full_prompt"), ("OPPU_input", "OPPU_full")):
        if not rows[full].startswith(rows[question]) or rows[full] == rows[question]:
            problems.append(f"key '{full}': must begin with '{question}' and add the answer")
    return problems
