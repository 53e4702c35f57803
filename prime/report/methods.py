"""The methods that a run compares: what each is, which stage makes it, and how it is reported. One table for everybody.

This module imports nothing heavy, so stage scripts, reports and reproduce.sh can all ask it. As a command it prints the
table, one method a line, its fields separated by tabs:

    python -m prime.report.methods
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# Whose records are an attack's members: nobody's (the base models are the blind baseline of every other attack), those
# of the sharers whose adapters were merged, or the user's own.
Members = Literal["none", "sharers", "own"]
# The parts of a result's `seconds` that personalising a user takes; predicting is not among them.
PERSONALISING = ("search", "compose", "train")


@dataclass(frozen=True)
class Method:
    """A row of the table, and the run that makes it."""

    name: str  # of its row, and of its predictions in result files
    label: str  # for people, where there is room for a few words
    folder: str  # of its own run, below <output>/<task>/
    stage: str  # the script that makes that run
    description: str  # for readers who meet the report before the README
    choice: str = ""  # the value of --objective, --baseline or --method by which the stage makes it
    gradients: bool = False  # on the user's own history
    members: Members = "sharers"
    seconds: tuple[str, ...] = PERSONALISING
    comes_with_search: bool = False  # a run of PriME predicts it, too; only its own run stores what it deploys


def _baseline(name: str, label: str, folder: str, description: str, seconds: tuple[str, ...]) -> Method:
    """What a search evaluates anyway: of its time the baseline needs the named parts."""
    return Method(
        name, label, folder, "lora_composition_evo", description, choice=name, seconds=seconds, comes_with_search=True
    )


_ALL = (  # in the order of the table
    Method("base", "base", "task-base_LLM", "task_lora", "the untouched model", members="none"),
    Method("rag", "base with retrieval", "task-base_LLM", "task_lora",
           "the untouched model with retrieved history items in its prompt", members="none"),
    Method("task_lora", "task-adapted base", "task-base_LLM", "task_lora",
           "the model adapted to the task, not to the user", members="none"),
    _baseline("best_sharer", "best sharer", "Best-sharer",
              "the one similar sharer's adapter that does best on the user's history", ("sharers",)),
    _baseline("uniform", "uniform average", "Uniform", "the mean of the similar sharers' adapters", ()),
    Method("lorahub", "LoraHub", "LoraHub", "lora_composition_evo",
           "LoraHub: weights searched by cross-entropy of the history", choice="nll"),
    Method("mta", "merge-then-adapt", "Merge-then-adapt", "train_user_peft",
           "merge-then-adapt: sharers merged, then trained on the user's history", choice="mta", gradients=True),
    Method("per_pcs", "Per-Pcs", "LoRA-Composition", "lora_composition",
           "Per-Pcs: pieces of the sharers' adapters, composed by gates"),
    Method("prime_published", "PriME as published", "LoRA-Composition-evo-published", "lora_composition_evo",
           "PriME with the published merge rule and selection"),
    Method("prime", "PriME", "LoRA-Composition-evo", "lora_composition_evo",
           "PriME: weights searched by utility minus resemblance to the sharers", choice="metric"),
    Method("oppu", "OPPU", "OPPU", "train_user_peft",
           "OPPU: an adapter trained on the user's own history", choice="oppu", gradients=True, members="own"),
)  # fmt: skip

METHODS: dict[str, Method] = {method.name: method for method in _ALL}
REFERENCE = "prime"  # the row that every other is compared with
# Rows whose leakage is the blind baseline: an attack on the task-adapted base, before anybody's adapter is merged in.
BLIND_ROWS = ("base", "task_lora")
# Where a report has room for few baselines, and for the fewest.
SHORT_LIST = ("base", "task_lora", "best_sharer", "uniform", "per_pcs")
SHORTEST_LIST = ("task_lora", "best_sharer")


def place(name: str) -> tuple[int, str]:
    """Sort key of a row: known methods in the order of the table, then others by name."""
    names = list(METHODS)
    return (names.index(name) if name in names else len(names)), name


def choices(stage: str) -> dict[str, Method]:
    """The methods that one stage makes, by the value of its option."""
    return {method.choice: method for method in _ALL if method.stage == stage and method.choice}


def main() -> None:
    for method in _ALL:
        gradients = "gradients" if method.gradients else "no gradients"
        fields = (method.name, method.folder, f"{method.stage}.py", gradients, method.members, method.description)
        print("\t".join(fields))


if __name__ == "__main__":
    main()
