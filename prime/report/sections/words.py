"""What the page says in words: the findings at its top, and the examples."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from prime.report.figures.parts import people
from prime.report.figures.utility import pair_sentence
from prime.report.methods import REFERENCE, SHORT_LIST, SHORTEST_LIST
from prime.report.sections.content import Content
from prime.report.summary import leading
from prime.report.tables import interval_text
from prime.users.metrics import score
from prime.users.tasks import Task, extract

EXAMPLES = 10
INPUT_LENGTH, OUTPUT_LENGTH = 280, 160  # characters shown of a text

# --- findings --------------------------------------------------------------------------------------


def findings(content: Content) -> list[str]:
    """The page in three or four sentences."""
    rows = {row["method"]: row for row in leading(content.summary)}
    ours, metric = rows.get(REFERENCE), content.metric
    sentences = []
    if ours:
        baselines = [name for name in ("base", *SHORTEST_LIST) if name in rows]
        values = [f"{name} {rows[name][metric]['mean']:.3f}" for name in baselines]
        beside = f" ({', '.join(values)})" if values else ""
        sentences.append(f"{REFERENCE} reaches {metric} {interval_text(ours[metric])}{beside}.")
    for pair in content.summary["paired"]:
        if pair["method"] in SHORTEST_LIST and (pair["k"], pair["profile"]) == (0, False):
            sentences.append(pair_sentence(pair, metric, REFERENCE))
    sentences += base_won(content)
    if ours and ours.get("auroc"):
        auroc = f"The published attack finds sharers' records with AUROC {interval_text(ours['auroc'])}"
        blind = f"where the same attack on the base gives {interval_text(ours['blind_auroc'])}"
        sentences.append(f"{auroc}, {blind}.")
    return sentences


def base_won(content: Content) -> list[str]:
    """A sentence about users who merge nothing, where there are any."""
    results = content.reference_results()
    alone = sum(result.get("deployed") == "base" for result in results)
    if not alone:
        return []
    if alone < len(results):
        return [f"For {people(alone, len(results))} the base won the search: nothing is merged."]
    all_of_them = f"for all of {people(alone)} the base won the search"
    return [
        f"Nobody's adapters are merged: {all_of_them}, so {REFERENCE} answers as task_lora does, and the attack on it "
        "is the blind one."
    ]


# --- examples --------------------------------------------------------------------------------------


def shorten(text: str, limit: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


def mark(task: Task, output: str, gold: str) -> str:
    """How good one answer is, in a word."""
    metric = task.metrics[0]
    value = score([metric], [output], [gold], task.choices)[metric]
    return ("right" if value else "wrong") if metric == "accuracy" else f"{metric} {value:.2f}"


def evenly_spaced(users: Sequence[str], n: int) -> list[str]:
    """`n` of the users at most."""
    return [users[i * len(users) // n] for i in range(n)] if len(users) > n else list(users)


def examples(content: Content) -> dict[str, Any]:
    """The first query of ten users, evenly spaced in the order of the test file: nobody picked them."""
    outputs = _example_outputs(content)
    users: dict[str, None] = {}
    for by_user in outputs.values():
        users |= dict.fromkeys(user for user, answers in by_user.items() if answers)
    rows = []
    for user in evenly_spaced(list(users), EXAMPLES):
        rows.append(_example(content, user, [by_user.get(user, {}) for by_user in outputs.values()]))
    return {"methods": list(outputs), "rows": rows}


def _example_outputs(content: Content) -> dict[str, dict[str, dict[str, str]]]:
    """Method -> user -> query -> output at the first test setting, of the methods that the examples show."""
    outputs: dict[str, dict[str, dict[str, str]]] = {}
    for method in (REFERENCE, *SHORT_LIST):  # beside the gold, whatever the others' answers are
        for user, samples in content.samples(method).items():
            by_query = {sample["id"]: sample["output"] for sample in samples}
            outputs.setdefault(method, {})[user] = by_query
    return outputs


def _example(content: Content, user: str, outputs: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    """The first query of one user with each method's answer. outputs: by method, query -> output."""
    answered = [by_query for by_query in outputs if by_query]
    query = next(iter(answered[0]))
    gold, text = content.golds[query], content.inputs.get(query, "")
    fields = " / ".join(extract(content.task, text) or (text,))
    return {
        "user": user,
        "input": shorten(fields, INPUT_LENGTH),
        "gold": shorten(gold, OUTPUT_LENGTH),
        "answers": [_answer(content.task, by_query.get(query), gold) for by_query in outputs],
    }


def _answer(task: Task, output: str | None, gold: str) -> tuple[str, str] | None:
    """An answer shortened, and its mark; None where there is none."""
    if output is None:
        return None
    return shorten(output, OUTPUT_LENGTH) or "(empty)", mark(task, output, gold)
