"""Textual profiles of users: what a language model is asked to write, and a rule that counts without any model.

Both read the history alone, never a query. The task has the wording. A file given by `--prompt_path` replaces it: JSON,
`{task: {"profile": text with one {} for the items, "retrieval_history": how an item is shown}}`. The second key is that
of the published schema (`prime.users.templates`), and may be absent.
"""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from statistics import mean

from prime.users.prompts import history_texts
from prime.users.task import Task
from prime.users.templates import key_problems, read_rows, refuse_problems

ITEM_WORDS = 60  # of each field of an item that is shown to the model, at most
FREQUENT = 5  # tags, categories or words that the rule names at most
LONG = 5  # letters of a word that the rule counts, at least


# -- by a model -----------------------------------------------------------------------------------------------------


def load_profile_prompts(path: str | os.PathLike[str] | None, task: Task) -> dict[str, str]:
    """The task's templates `profile` and `retrieval_history`: its own, or those of a file.

    Raises:
        InputError: the file has none for this task, or all that is wrong with them.
    """
    item_template = {"retrieval_history": task.templates["retrieval_history"]}
    if path is None:
        return {"profile": task.profile_prompt} | item_template
    rows = item_template | read_rows(path, task)
    keys = ("profile", "retrieval_history")
    refuse_problems(path, task, key_problems(rows, keys, task))
    return {key: rows[key] for key in keys}


def fit(
    items: Sequence[Mapping[str, str]], prompts: Mapping[str, str], words: int, fits: Callable[[str], bool]
) -> tuple[str, int]:
    """The question about as many of the last items as fit, and their number; 0 where not even one does.

    Args:
        words: of each field of an item at most.
        fits: whether a question is short enough. A question longer than one that does not fit does not fit either.
    """
    lines = history_texts(items, prompts, words)

    def question(number: int) -> str:
        return prompts["profile"].format("".join(lines[len(lines) - number :]))

    low, high = 0, len(lines)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(question(middle)) else (low, middle - 1)
    return question(low), low


def whole_sentences(text: str) -> str:
    """A text that was cut off, up to the end of its last sentence; all of it where no sentence ends."""
    ends = list(re.finditer(r"[.!?][\"')\]]*(?=\s|$)", text))
    return text[: ends[-1].end()] if ends else text


# -- by rule --------------------------------------------------------------------------------------------------------


def main_habit(task: Task, answers: Sequence[str]) -> str:
    """A sentence with the commonest answer or, of free texts, the commonest first word if a quarter begins with it.

    The demo's textual profiles are this sentence alone.
    """
    whole = task.history_choices.limited
    counts = Counter(answer if whole else answer.split(" ")[0] for answer in answers)
    common = _ranked(counts)[0]
    rare = not whole and counts[common] * 4 < len(answers)
    return task.habit.format("no fixed word" if rare else common)


def rule_profile(task: Task, items: Sequence[Mapping[str, str]]) -> str:
    """The textual profile by counting; empty for an empty history.

    It says how often tags and categories were given, the mean of scores, and of texts their length in words and the
    long words that several of them hold.
    """
    answers = [" ".join(item[task.target].split()) for item in items if item[task.target].strip()]
    if not answers:
        return ""
    choices = task.history_choices
    counted = _scores if choices.scale else _shares if choices.labels else _wording
    return f"{main_habit(task, answers)} {counted(answers)}"


def _ranked(counts: Mapping[str, int]) -> list[str]:
    """The most frequent first; equally frequent ones by the alphabet."""
    return sorted(counts, key=lambda name: (-counts[name], name))


def _shares(answers: Sequence[str]) -> str:
    counts = Counter(answers)
    frequent = ", ".join(f"{name} ({counts[name]})" for name in _ranked(counts)[:FREQUENT])
    return f"Given in {len(answers)} items: {frequent}."


def _scores(answers: Sequence[str]) -> str:
    scores = [float(answer) for answer in answers if re.fullmatch(r"\d+(\.\d+)?", answer)]
    if not scores:
        return f"Given in {len(answers)} items."
    return f"The mean score is {mean(scores):.1f} over {len(scores)} items, from {min(scores):g} to {max(scores):g}."


def _wording(answers: Sequence[str]) -> str:
    lengths = [len(answer.split()) for answer in answers]
    usual = f"The usual length is {mean(lengths):.0f} words, from {min(lengths)} to {max(lengths)}."
    counts: Counter[str] = Counter()  # of texts that hold a word, however often
    for answer in answers:
        counts.update(set(re.findall(rf"[^\W\d_]{{{LONG},}}", answer.lower())))
    frequent = [word for word in _ranked(counts)[:FREQUENT] if counts[word] > 1]
    return f"{usual} Frequent words: {', '.join(frequent)}." if frequent else usual
