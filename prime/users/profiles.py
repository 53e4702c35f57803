"""Textual profiles of users: what a language model is asked to write, and a rule that counts without any model.

Both read the history alone, never a query. The wording is ours. A file given by `--prompt_path` replaces it: JSON,
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
from prime.users.tasks import CHOICE, ERROR, Task
from prime.users.templates import TEMPLATES, key_problems, read_rows, refuse_problems

ITEM_WORDS = 60  # of each field of an item that is shown to the model, at most
FREQUENT = 5  # tags, categories or words that the rule names at most
LONG = 5  # letters of a word that the rule counts, at least


# -- by a model -----------------------------------------------------------------------------------------------------


def _question(items: str, answer: str) -> str:
    """The template of a question about `items`, for somebody who is going to guess `answer`."""
    return (
        f"Here are {items}, oldest first.\n\n{{}}\n"
        f"Describe this person in two or three sentences for somebody who has to guess {answer}. "
        "Name what repeats, not single items, and write nothing else."
    )


PROFILE_PROMPTS: dict[str, str] = {
    "citation": _question(
        "papers that a person wrote, each with a paper that it cites", "which papers they will cite next: their topics"
    ),
    "movie_tagging": _question(
        "movies and the tag that a person gave to each", "the tag they will give to another movie: the tags they prefer"
    ),
    "news_categorize": _question(
        "articles and the category that their author gave to each", "the category of their next article: usual topics"
    ),
    "product_rating": _question(
        "product reviews of a person and the score, 1 to 5, that they gave", "their next score: how strict they are"
    ),
    "news_headline": _question(
        "articles and the headline that their author wrote for each", "their next headline: how they word headlines"
    ),
    "scholarly_title": _question(
        "abstracts of papers and the title that their author chose", "their next title: how they word titles"
    ),
    "tweet_paraphrase": _question(
        "tweets of a person", "how they would say something in a tweet: wording, mood, signs"
    ),
}


def load_profile_prompts(path: str | os.PathLike[str] | None, task: Task) -> dict[str, str]:
    """The task's templates `profile` and `retrieval_history`: ours, or those of a file.

    Raises:
        InputError: the file has none for this task, or all that is wrong with them.
    """
    item_template = {"retrieval_history": TEMPLATES[task.name]["retrieval_history"]}
    if path is None:
        return {"profile": PROFILE_PROMPTS[task.name]} | item_template
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

# The sentence about the commonest answer or, of texts, the commonest first word.
HABITS = {
    "citation": "Cites works that mostly begin with {}.",
    "movie_tagging": "The most frequent tag is {}.",
    "news_categorize": "The most frequent category is {}.",
    "product_rating": "The most frequent score is {}.",
    "news_headline": "Headlines mostly begin with {}.",
    "scholarly_title": "Titles mostly begin with {}.",
    "tweet_paraphrase": "Tweets mostly begin with {}.",
}
WHOLE = ("movie_tagging", "news_categorize", "product_rating")  # tasks whose whole answers are counted


def main_habit(task: str, answers: Sequence[str]) -> str:
    """A sentence with the commonest answer, or with the commonest first word of texts if a quarter begins with it.

    The demo's textual profiles are this sentence alone.
    """
    counts = Counter(answer if task in WHOLE else answer.split(" ")[0] for answer in answers)
    common = _ranked(counts)[0]
    rare = task not in WHOLE and counts[common] * 4 < len(answers)
    return HABITS[task].format("no fixed word" if rare else common)


def rule_profile(task: Task, items: Sequence[Mapping[str, str]]) -> str:
    """The textual profile by counting; empty for an empty history.

    It says how often tags and categories were given, the mean of scores, and of texts their length in words and the
    long words that several of them hold.
    """
    answers = [" ".join(item[task.target].split()) for item in items if item[task.target].strip()]
    if not answers:
        return ""
    rules: dict[tuple[str, ...], Callable[[Sequence[str]], str]] = {CHOICE: _shares, ERROR: _scores}
    counted = rules.get(task.history_metrics, _wording)
    return f"{main_habit(task.name, answers)} {counted(answers)}"


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
