"""The form that stored JSON has to have: results, settings and attack summaries of earlier stages, checked when read.

A form is a type, a list of one form, a dictionary of forms by key (`"key?"` may be absent; further keys are left
alone), an `Each` for objects whose keys are data, a `Within` for numbers, or a tuple of forms any of which will do.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from prime.errors import InputError
from prime.runs.files import kind_of, read_json, read_lines

METHOD = re.compile(r"[a-z][a-z0-9_]{0,31}")
SETTING = re.compile(r"k\d{1,9}(-profile)?")
ANY_KEY = re.compile(r".*", re.DOTALL)


class Each(NamedTuple):
    """An object of any number of keys, each of which matches `key` and holds `value`."""

    key: re.Pattern[str]
    value: Any


class Within(NamedTuple):
    """A number from `low` to `high`."""

    low: float
    high: float


NUMBERS = [(float, int)]
SIDES = {"member": NUMBERS, "non_member": NUMBERS}
RATE, DRAWN = Within(0, 1), Within(-1e12, 1e12)  # DRAWN: what has room on a figure's axis
RATES, DRAWN_INTERVAL = ({"mean": one, "low": one, "high": one} for one in (RATE, DRAWN))
AUROCS = {"auroc": (RATES, None), "blind_auroc": (RATES, None)}

SETTINGS = {"stage": str, "method": METHOD, "settings": {}}
RESULT = {
    "user_id": str,
    "index": int,
    "predictions?": Each(METHOD, Each(SETTING, [{"id": str, "output": str}])),
    "sharers?": [str],
    "weights?": [(float, int, NUMBERS)],
    "deployed?": str,
    "record_ids?": [str],
    "seconds?": Each(ANY_KEY, (float, int)),
    "on_base?": bool,
    "scores?": Each(ANY_KEY, SIDES),
    "blind?": Each(ANY_KEY, SIDES),
}
EVALUATION = {"loss": DRAWN, "origin": re.compile("base|sharer|start|search")}
# Of a run at one of several penalties: its settings, its results, a line of its evaluations, and
# (ATTACKED) an attack on it.
PENALISED = {"sim_penalty": (float, int)}
SEARCHED = {"sharers": [str], "best_sharer": str, "similarity": (float, int)}
EVALUATED = {"weights": [(float, int, NUMBERS)], "similarity": (float, int)}
TRAINED = {"seed": int, "recent_k": int, "holdout?": (float, int), "enable_dp?": bool}  # settings that make records
ATTACKS = Each(ANY_KEY, AUROCS)
TPRS = dict.fromkeys(("0.1", "0.01", "0.001"), (RATES, None))
# What the page shows of an attack's sets.
SHOWN = {"auroc": RATES, "blind_auroc": RATES, "tpr_at_fpr": TPRS, "blind_tpr_at_fpr": TPRS}
SHOWN_SETS = {"sets?": Each(ANY_KEY, {"attacks": Each(ANY_KEY, SHOWN)})}
SHOWN_SUMMARY = {**SHOWN_SETS, "sharers": SHOWN_SETS}
SETS = {"sets?": Each(ANY_KEY, {"attacks": ATTACKS})}
ATTACKED = {**SETS, "sharers?": SETS}
MIA_SUMMARY = {**SETS, "method": METHOD, "attacks": ATTACKS, "sharers": {"users": int, "attacks": ATTACKS}}
CURVES = {"curves": [{"attack": str, "set": str, "model": str, "fpr": [RATE], "tpr": [RATE]}]}
FRONTIER = {"metric": str, "points": [{"label": str, "penalty": (DRAWN, None)}]}
TRADED = {"similarity?": (DRAWN_INTERVAL, None), "auroc?": (RATES, None), "controlled_auroc?": (RATES, None)}


def read_form(path: Path, form: Any) -> Any:
    """The content of a JSON file, which has to have a form; all that it lacks is told in one InputError."""
    found = read_json(path)
    problems = form_problems(found, form, f"{path}: the file")
    if problems:
        raise InputError.many([problem.replace(": the file.", ": ", 1) for problem in problems])
    return found


def read_form_lines(path: Path, form: Any) -> list[dict[str, Any]]:
    """A file of one JSON object per line, each of a form; all problems in one InputError."""
    found = read_lines(path)
    problems = [one for i, row in enumerate(found, 1) for one in form_problems(row, form, f"{path}: line {i}")]
    if problems:
        raise InputError.many(problems)
    return found


def form_problems(value: Any, form: Any, where: str) -> list[str]:
    """What keeps a JSON value from having a form, a line each, with the place in the file."""
    if isinstance(form, tuple) and not isinstance(form, Each | Within):
        tries = [form_problems(value, one, where) for one in form]
        return [] if [] in tries else max(tries, key=len) if isinstance(value, dict | list) else tries[0]
    if isinstance(form, list):
        return _expected(value, list, where) or [
            problem for i, one in enumerate(value) for problem in form_problems(one, form[0], f"{where}[{i}]")
        ]
    if isinstance(form, Each):
        return _expected(value, dict, where) or _each_problems(value, form, where)
    if isinstance(form, dict):
        return _expected(value, dict, where) or _key_problems(value, form, where)
    if isinstance(form, Within):
        return form_problems(value, (float, int), where) or _within(value, form, where)
    if isinstance(form, re.Pattern):
        fits = isinstance(value, str) and form.fullmatch(value)
        return [] if fits else [f"{where} is {_shown(value)}, expected a name like {form.pattern}"]
    return _expected(value, form, where)


def merge_problems(result: Mapping[str, Any]) -> list[str]:
    """What is wrong with a result of form RESULT that names sharers."""
    if "sharers" not in result:
        return []
    n, weights = len(result["sharers"]), result.get("weights")
    return [f"{len(weights)} weights for {n} sharers"] if weights is not None and len(weights) != n else []


def _each_problems(value: Mapping[str, Any], form: Each, where: str) -> list[str]:
    problems = []
    for key, own in value.items():
        if not form.key.fullmatch(key):
            problems.append(f"{where} has the key {_shown(key)}, expected names like {form.key.pattern}")
        problems += form_problems(own, form.value, f"{where}.{_shown(key)}")
    return problems


def _key_problems(value: Mapping[str, Any], form: Mapping[str, Any], where: str) -> list[str]:
    problems = []
    for key, own in form.items():
        name = key.removesuffix("?")
        if name in value:
            problems += form_problems(value[name], own, f"{where}.{name}")
        elif name == key:
            problems.append(f"{where}.{name} is missing")
    return problems


def _within(value: float, form: Within, where: str) -> list[str]:
    right = form.low <= value <= form.high
    return [] if right else [f"{where} is {value:.10g}, expected a number from {form.low:g} to {form.high:g}"]


def _expected(value: Any, kind: type | None, where: str) -> list[str]:
    right = value is None if kind is None else type(value) is kind
    if right and kind is float and not math.isfinite(value):
        return [f"{where} is beyond the largest number"]
    return [] if right else [f"{where} is {kind_of(value)}, expected {KINDS.get(kind, 'null')}"]


KINDS: dict[type | None, str] = {
    str: "a text", int: "a whole number", float: "a number", bool: "true or false", list: "a list", dict: "an object",
}  # fmt: skip


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else kind_of(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
