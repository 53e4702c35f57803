"""What stored JSON has to look like: settings, results and summaries of earlier stages are checked when they are read.

A results folder may be edited, cut off by a crash, or come from somebody else. Its files are therefore compared with a
*form* (a small schema) before anything is computed from them. A form is one of

    str, int, float, bool, None   a value of exactly this JSON type (`float` has to be finite)
    Between(low, high)            a number in this range
    re.compile(...)               a text that the pattern matches as a whole
    [form]                        a list whose items all have this form
    {"a": form, "b?": form}       an object with these keys, of which `b` may be absent; further keys are not looked at
    MapOf(pattern, form)          an object whose keys are data (names, user ids) and whose values all have this form
    (form, form, ...)             any of these forms
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prime.errors import InputError
from prime.runs.files import json_type, read_json, read_lines


@dataclass(frozen=True)
class MapOf:
    """An object of any number of keys: `keys` matches each of them, and each value has the form `values`."""

    keys: re.Pattern[str]
    values: Any


@dataclass(frozen=True)
class Between:
    """A number from `low` to `high`."""

    low: float
    high: float


METHOD_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")
PROMPT_SETTING = re.compile(r"k\d{1,9}(-profile)?")  # of test prompts: retrieved items, with or without a profile
ANY_TEXT = re.compile(r".*", re.DOTALL)

NUMBER = (float, int)
FRACTION = Between(0, 1)
PLOTTABLE = Between(-1e12, 1e12)  # has room on a figure's axis
FRACTION_INTERVAL = {"mean": FRACTION, "low": FRACTION, "high": FRACTION}
PLOTTABLE_INTERVAL = {"mean": PLOTTABLE, "low": PLOTTABLE, "high": PLOTTABLE}

# -- a run directory ------------------------------------------------------------------------------------------------

SETTINGS_FILE = {"stage": str, "method": METHOD_NAME, "settings": {}, "versions?": MapOf(ANY_TEXT, str)}
MEMBERSHIP_SCORES = {"member": [NUMBER], "non_member": [NUMBER]}
USER_RESULT = {
    "user_id": str,
    "index": int,
    "predictions?": MapOf(METHOD_NAME, MapOf(PROMPT_SETTING, [{"id": str, "output": str}])),
    "sharers?": [str],
    "weights?": [(float, int, [NUMBER])],
    "deployed?": str,
    "record_ids?": [str],
    "seconds?": MapOf(ANY_TEXT, NUMBER),
    "on_base?": bool,
    "files?": [str],
    "scores?": MapOf(ANY_TEXT, MEMBERSHIP_SCORES),
    "blind?": MapOf(ANY_TEXT, MEMBERSHIP_SCORES),
}
RECORD_SETTINGS = {"seed": int, "recent_k": int, "holdout?": NUMBER, "enable_dp?": bool}  # that choose training records

# -- a search: the settings of one penalty, a result, and views of a line of evaluations.jsonl ------------------------

PENALTY_SETTINGS = {"sim_penalty": NUMBER}
SEARCH_RESULT = {"sharers": [str], "best_sharer": str, "similarity": NUMBER}
EVALUATED_WEIGHTS = {"weights": [(float, int, [NUMBER])], "similarity": NUMBER}
EVALUATED_UTILITY = {"utility": NUMBER}
EVALUATED_LOSS = {"loss": PLOTTABLE, "origin": re.compile("base|sharer|start|search")}

# -- an attack: what the table, the frontier and the report's page take from mia_summary.json and roc.json ------------

AUROCS = {"auroc": (FRACTION_INTERVAL, None), "blind_auroc": (FRACTION_INTERVAL, None)}
AUROC_SETS = {"sets?": MapOf(ANY_TEXT, {"attacks": MapOf(ANY_TEXT, AUROCS)})}
FRONTIER_SUMMARY = {**AUROC_SETS, "sharers?": AUROC_SETS}
MIA_SUMMARY = {
    **AUROC_SETS,
    "method": METHOD_NAME,
    "attacks": MapOf(ANY_TEXT, AUROCS),
    "sharers": {"users": int, "attacks": MapOf(ANY_TEXT, AUROCS)},
}
TPR_AT_FPR = dict.fromkeys(("0.1", "0.01", "0.001"), (FRACTION_INTERVAL, None))
PAGE_SCORES = {
    "auroc": FRACTION_INTERVAL,
    "blind_auroc": FRACTION_INTERVAL,
    "tpr_at_fpr": TPR_AT_FPR,
    "blind_tpr_at_fpr": TPR_AT_FPR,
}
PAGE_SETS = {"sets?": MapOf(ANY_TEXT, {"attacks": MapOf(ANY_TEXT, PAGE_SCORES)})}
PAGE_SUMMARY = {**PAGE_SETS, "sharers": PAGE_SETS}
ROC_CURVES = {"curves": [{"attack": str, "set": str, "model": str, "fpr": [FRACTION], "tpr": [FRACTION]}]}

# -- a frontier of penalties ------------------------------------------------------------------------------------------

FRONTIER_FILE = {"metric": str, "points": [{"label": str, "penalty": (PLOTTABLE, None)}]}
FRONTIER_POINT = {
    "similarity?": (PLOTTABLE_INTERVAL, None),
    "auroc?": (FRACTION_INTERVAL, None),
    "controlled_auroc?": (FRACTION_INTERVAL, None),
}


# -- checking -------------------------------------------------------------------------------------------------------


def read_form(path: Path, form: Any) -> Any:
    """The content of a JSON file, which has to have a form; one InputError lists all that is wrong with it."""
    content = read_json(path)
    problems = form_problems(content, form, f"{path}: the file")
    if problems:
        raise InputError.many([problem.replace(": the file.", ": ", 1) for problem in problems])
    return content


def read_form_lines(path: Path, form: Any) -> list[dict[str, Any]]:
    """A file of one JSON object per line, each of a form; one InputError lists all that is wrong with it."""
    rows = read_lines(path)
    problems: list[str] = []
    for number, row in enumerate(rows, 1):
        problems += form_problems(row, form, f"{path}: line {number}")
    if problems:
        raise InputError.many(problems)
    return rows


def form_problems(value: Any, form: Any, where: str) -> list[str]:
    """What keeps a JSON value from having a form, one line each; `where` names the value's place in its file."""
    match form:
        case tuple():
            return _alternatives_problems(value, form, where)
        case list():
            return _type_problems(value, list, where) or _items_problems(value, form[0], where)
        case dict():
            return _type_problems(value, dict, where) or _keys_problems(value, form, where)
        case MapOf():
            return _type_problems(value, dict, where) or _map_problems(value, form, where)
        case Between():
            return form_problems(value, NUMBER, where) or _range_problems(value, form, where)
        case re.Pattern():
            matches = isinstance(value, str) and form.fullmatch(value)
            return [] if matches else [f"{where} is {_shown(value)}, expected a name like {form.pattern}"]
        case _:
            return _type_problems(value, form, where)


def merge_problems(result: Mapping[str, Any]) -> list[str]:
    """What is wrong with the weights of a result of form USER_RESULT that names sharers."""
    if "sharers" not in result:
        return []
    n, weights = len(result["sharers"]), result.get("weights")
    return [f"{len(weights)} weights for {n} sharers"] if weights is not None and len(weights) != n else []


def _alternatives_problems(value: Any, forms: tuple, where: str) -> list[str]:
    """Those of one alternative, if the value has none of the forms: of an object or list the most detailed ones."""
    tries = [form_problems(value, form, where) for form in forms]
    if [] in tries:
        return []
    return max(tries, key=len) if isinstance(value, dict | list) else tries[0]


def _items_problems(items: list, form: Any, where: str) -> list[str]:
    problems: list[str] = []
    for place, item in enumerate(items):
        problems += form_problems(item, form, f"{where}[{place}]")
    return problems


def _keys_problems(value: Mapping[str, Any], form: Mapping[str, Any], where: str) -> list[str]:
    problems: list[str] = []
    for key, value_form in form.items():
        name = key.removesuffix("?")
        if name in value:
            problems += form_problems(value[name], value_form, f"{where}.{name}")
        elif name == key:
            problems.append(f"{where}.{name} is missing")
    return problems


def _map_problems(value: Mapping[str, Any], form: MapOf, where: str) -> list[str]:
    problems: list[str] = []
    for key, item in value.items():
        if not form.keys.fullmatch(key):
            problems.append(f"{where} has the key {_shown(key)}, expected names like {form.keys.pattern}")
        problems += form_problems(item, form.values, f"{where}.{_shown(key)}")
    return problems


def _range_problems(value: float, form: Between, where: str) -> list[str]:
    if form.low <= value <= form.high:
        return []
    return [f"{where} is {value:.10g}, expected a number from {form.low:g} to {form.high:g}"]


def _type_problems(value: Any, kind: type | None, where: str) -> list[str]:
    matches = value is None if kind is None else type(value) is kind
    if matches and kind is float and not math.isfinite(value):
        return [f"{where} is beyond the largest number"]
    return [] if matches else [f"{where} is {json_type(value)}, expected {EXPECTED.get(kind, 'null')}"]


EXPECTED: dict[type | None, str] = {
    str: "a text", int: "a whole number", float: "a number", bool: "true or false", list: "a list", dict: "an object",
}  # fmt: skip


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, str) else json_type(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
