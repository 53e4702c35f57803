"""Tasks are files: JSON objects whose keys docs/extending.md lists. The built-in ones, LaMP as processed by the Per-Pcs
authors, are in data/tasks/.

    python -m prime.users.tasks NAME_OR_FILE    its name, and what its search asks (--fitness), for reproduce.sh
"""

from __future__ import annotations

import difflib
import math
import re
import string
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from prime.errors import InputError
from prime.runs.files import json_type, read_json
from prime.users.answers import LIMIT
from prime.users.metrics import METRICS
from prime.users.task import Task, extract
from prime.users.templates import KEYS, key_problems, literal, template_problems, wording

__all__ = ["TASKS", "Task", "extract", "get_task", "read_task"]

FOLDER = Path(__file__).resolve().parents[2] / "data" / "tasks"
TASK_BYTES = 1 << 20
STEPS = 10_000  # labels, or steps of a scale, at most
CHOICE, ERROR, TEXT = ("accuracy", "f1"), ("MAE", "RMSE"), ("rouge-1", "rouge-L")
TASK_KEYS = (
    "name", "lamp", "fields", "input", "target", "labels", "ignore_case", "scale", "metrics", "history_metrics",
    "history_labels", "paired", "retrieve_by", "marker", "two_options", "instruction", "input_name", "target_name",
    "templates", "profile",
)  # fmt: skip
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")  # of tasks, which are folders too, and of fields


def get_task(name: str, texts: str = "faithful") -> Task:
    """The built-in task called `name`, or that of the file `name`; its texts as they are or `published`.

    Raises:
        InputError: there is none, or what is wrong with its file.
    """
    if name not in TASKS and not name.endswith(".json") and not Path(name).is_file():
        raise InputError(f"unknown task '{name}', choose from: {', '.join(TASKS)}; or give a file (--task_file)")
    task = TASKS[name] if name in TASKS else read_task(name)
    return replace(task, published_texts=True) if texts == "published" else task


def read_task(path: Path | str) -> Task:
    """The task of a file; InputError with all that is wrong with it, each with its key."""
    return task_of(read_json(path, TASK_BYTES), str(path))


def task_of(content: Any, where: str) -> Task:
    """The same of what a file holds."""
    if not isinstance(content, dict):
        raise InputError(f"{where}: expected an object of keys such as 'name' and 'target', found {json_type(content)}")
    keys = _Keys(content)
    task = _task(keys)
    if not keys.problems:
        task = _worded(task, keys)
    if keys.problems:
        raise InputError.many([f"{where}: {problem}" for problem in keys.problems])
    return task


class _Keys:
    """The keys of a task's file, each looked at for its type, and what is wrong with them."""

    def __init__(self, content: Mapping[str, Any]):
        self.content = content
        self.problems: list[str] = []
        for key in content:
            if key not in TASK_KEYS:
                near = difflib.get_close_matches(key, TASK_KEYS, 1)
                self.wrong(key, f"unknown{f', is it {near[0]!r}?' if near else ''}; keys are {', '.join(TASK_KEYS)}")

    def wrong(self, key: str, what: str) -> None:
        self.problems.append(f"key '{key}': {what}")

    def _of(self, key: str, kind: type, default: Any, expected: str) -> Any:
        value = self.content.get(key, default)
        if value is default or isinstance(value, kind) and not (kind is not bool and isinstance(value, bool)):
            return value
        self.wrong(key, f"is {json_type(value)}, expected {expected}")
        return default

    def text(self, key: str, default: str = "") -> str:
        value = self._of(key, str, default, "a text")
        try:
            value.encode()
        except UnicodeEncodeError:
            self.wrong(key, "is not valid Unicode (half of a surrogate pair)")
        return value

    def name(self, key: str, default: str = "") -> str:
        """A name of letters, digits and underscores; without a default it has to be there."""
        value = self.text(key, default)
        if key not in self.content and not default:
            self.wrong(key, "is missing")
        elif value and not NAME.fullmatch(value):
            self.wrong(key, f"{value[:80]!r} is no name of letters, digits and _ that begins with a letter")
        return value

    def flag(self, key: str, default: bool) -> bool:
        return self._of(key, bool, default, "true or false")

    def texts(self, key: str, default: Sequence[str] | None) -> tuple[str, ...] | None:
        """A list of different, not empty texts, as they are or as numbers; of labels null is None."""
        value = self.content.get(key, default)
        if value is default or value is None and key.endswith("labels"):
            return None if value is None else tuple(value)
        if not isinstance(value, list) or not 0 < len(value) <= STEPS:
            self.wrong(key, f"is {json_type(value)}, expected a list of 1 to {STEPS:,} texts")
            return ()
        texts = tuple(str(text) for text in value)
        plain = [text.strip() for text in texts]
        if any(isinstance(text, bool) or not isinstance(text, str | int | float) for text in value):
            self.wrong(key, "holds something that is neither a text nor a number")
        elif "" in plain or len(set(plain)) < len(plain):
            self.wrong(key, "holds an empty text, or one text twice")
        return texts

    def table(self, key: str, known: Sequence[str]) -> dict[str, str]:
        """An object of texts."""
        value = self._of(key, dict, {}, "an object of texts")
        for name, text in value.items():
            if name not in known:
                self.wrong(key, f"unknown key '{name}', expected {', '.join(known)}")
            elif not isinstance(text, str):
                self.wrong(key, f"key '{name}' is {json_type(text)}, expected a text")
        return {name: text for name, text in value.items() if isinstance(text, str)}


def _task(keys: _Keys) -> Task:
    """All but the wording."""
    name, target = keys.name("name"), keys.name("target")
    source = keys.name("input", "") if "input" in keys.content else ""
    fields = keys.texts("fields", tuple(dict.fromkeys(field for field in (source, target) if field))) or ()
    labels, scale = _possible(keys)
    kind = ERROR if scale else CHOICE if labels else TEXT
    metrics = keys.texts("metrics", kind) or ()
    task = Task(
        name,
        keys.text("lamp", name),
        ("id", *fields),
        target,
        metrics,
        marker=keys.text("marker"),
        labels=labels,
        history_metrics=keys.texts("history_metrics", metrics) or (),
        history_labels=keys.texts("history_labels", labels),
        paired=keys.flag("paired", bool(source)),
        source=source,
        two_options=keys.flag("two_options", False),
        scale=scale,
        ignore_case=keys.flag("ignore_case", False),
    )
    _check_fields(keys, task)
    _check_answers(keys, task)
    return task


def _possible(keys: _Keys) -> tuple[tuple[str, ...] | None, tuple[float, float] | None]:
    """Labels and the ends of the scale; the steps of a scale are labels."""
    labels, scale = keys.texts("labels", None), keys.content.get("scale")
    if scale is None:
        return labels, None
    numbers = isinstance(scale, list) and all(isinstance(n, int | float) and not isinstance(n, bool) for n in scale)
    low, high, step = (*scale, 1)[:3] if numbers and len(scale) in (2, 3) else (0, 0, 0)
    usable = low < high and step > 0 and math.isfinite(step) and max(abs(low), abs(high)) <= LIMIT
    if not usable or (high - low) / step > STEPS:
        keys.wrong("scale", f"expected [lowest, highest], or a step as third: at most {LIMIT:,.0f}, {STEPS:,} steps")
        return labels, None
    if labels is not None:
        keys.wrong("scale", "there are 'labels' too; a task has one of them")
    steps = math.floor((high - low) / step + 1e-9)
    return tuple(f"{low + place * step:.10g}" for place in range(steps + 1)), (float(low), float(high))


def _check_fields(keys: _Keys, task: Task) -> None:
    if task.name in ("demo", "tasks"):
        keys.wrong("name", f"'{task.name}' is a folder of data/ already")
    for field in task.fields[1:] if "fields" in keys.content else ():
        if not NAME.fullmatch(field) or field == "id":
            keys.wrong("fields", f"{field[:80]!r}: a name has letters, digits and _; 'id' is there without being named")
    for key, field in (("target", task.target), ("input", task.source)):
        if field and task.fields[1:] and field not in task.fields:
            keys.wrong(key, f"'{field}' is none of the fields, {', '.join(task.fields[1:])}")
    if task.two_options and (not task.source or task.labels is None or len(task.labels) != 2):
        keys.wrong("two_options", "needs 'input' and two 'labels'")
    if task.two_options and task.marker:
        keys.wrong("marker", "a question with two options has none")


def _check_answers(keys: _Keys, task: Task) -> None:
    """Metrics are known ones, of one direction, that these answers can be judged by."""
    judged = {"metrics": (task.metrics, task.labels)}
    if {"history_metrics", "history_labels"} & keys.content.keys():
        judged["history_metrics"] = (task.history_metrics, task.history_labels)
    for key, (metrics, labels) in judged.items():
        for metric in metrics:
            if metric not in METRICS:
                keys.wrong(key, f"{metric[:80]!r} is none of {', '.join(METRICS)}")
            elif metric == "f1" and not labels:
                keys.wrong(key, "f1 needs 'labels'")
            elif metric in ERROR and task.scale is None:
                keys.wrong(key, f"{metric} needs 'scale', e.g. [0, 10]")
        known = [METRICS[metric].higher_is_better for metric in metrics if metric in METRICS]
        if len(set(known)) > 1:
            keys.wrong(key, f"{', '.join(metrics)}: of some higher is better, of others lower; a task goes one way")
    if task.ignore_case and task.labels is None:
        keys.wrong("ignore_case", "there are no 'labels'")
    if task.ignore_case and task.labels and len({label.strip().casefold() for label in task.labels}) < len(task.labels):
        keys.wrong("labels", "two of them differ in case only, and 'ignore_case' is true")


# -- wording --------------------------------------------------------------------------------------------------------


def _worded(task: Task, keys: _Keys) -> Task:
    """The task with its templates and the wording of profiles, of the file or as usual."""
    source_name = keys.text("input_name", _spoken(task.source or task.target).capitalize())
    target_name = keys.text("target_name", _spoken(task.target).capitalize())
    asked = task.source or task.target
    templates = wording(_instruction(task, keys), source_name, asked, target_name, task.target)
    if "retrieve_by" in keys.content:
        templates["retrieval_query"] = f"{{{keys.name('retrieve_by')}}}"
    given = keys.table("templates", KEYS)
    if not task.source and len(given) < len(KEYS):
        keys.wrong("input", "is missing; a task whose items hold nothing but answers gives all its 'templates'")
    templates |= given
    profile = keys.table("profile", ("items", "guess", "habit"))
    answer, text = _spoken(task.target), _spoken(asked)
    items = profile.get("items", f"items of a person, each a {text} with its {answer}")
    guess = profile.get("guess", f"their next {answer}")
    usual = f"The {answer} mostly begins with {{}}."
    if task.history_choices.limited:
        usual = f"The most frequent {answer} is {{}}."
    habit = profile.get("habit", usual)
    if not keys.problems:
        keys.problems += [f"key 'templates': {problem}" for problem in template_problems(templates, task)]
        for problem in key_problems({"profile": habit}, ["profile"], task):  # it has one {}, as that template has
            keys.wrong("profile", "habit: " + problem.removeprefix("key 'profile': "))
    return replace(task, templates=templates, profile_prompt=_question(items, guess), habit=habit)


def _spoken(field: str) -> str:
    return field.replace("_", " ")


def _instruction(task: Task, keys: _Keys) -> str:
    """What stands in front of a question, with the labels or the ends of the scale put in."""
    answer, text = _spoken(task.target), _spoken(task.source)
    usual = f"Write the {answer} for the {text}."
    if task.scale:
        usual = f"Guess the {answer} of the {text}, {{low}} to {{high}}."
    elif task.labels:
        usual = f"Choose the {answer} of the {text}: {{labels}}."
    low, high = task.scale or (0, 0)
    values = {"labels": ", ".join(task.labels or ()), "low": f"{low:g}", "high": f"{high:g}"}
    instruction = keys.text("instruction", usual)
    try:
        marks = [part[1:] for part in string.Formatter().parse(instruction) if part[1] is not None]
    except ValueError as error:
        keys.wrong("instruction", f"{error} (a literal brace is written {{{{ or }}}})")
        return ""
    for name, spec, conversion in marks:
        if name not in values or spec or conversion:
            keys.wrong("instruction", f"'{{{name}}}' is not allowed, only {{labels}}, {{low}} and {{high}}")
            return ""
    return instruction.format(**values) + "\n" if instruction else ""


def _question(items: str, answer: str) -> str:
    """The template of a question about `items`, for somebody who is going to guess `answer`."""
    return (
        f"Here are {literal(items)}, oldest first.\n\n{{}}\n"
        f"Describe this person in two or three sentences for somebody who has to guess {literal(answer)}. "
        "Name what repeats, not single items, and write nothing else."
    )


# -- the built-in tasks -----------------------------------------------------------------------------------------------


_BUILT_IN = sorted(map(read_task, FOLDER.glob("*.json")), key=lambda task: (task.lamp, task.name))
TASKS: dict[str, Task] = {task.name: task for task in _BUILT_IN}

if __name__ == "__main__":
    try:
        named = get_task(sys.argv[1])
    except InputError as error:
        sys.exit(f"{error}")
    print(named.name, named.fitness)
