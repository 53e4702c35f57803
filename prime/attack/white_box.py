"""The attack on the file: what it falls apart into (`prime.attack.pieces`), each piece attacked as an adapter.

A sharer's trained records are told from his held-out ones by the piece that is most like his own update, so the set is
the controlled one, record for record, and the file as it is stands beside each figure in place of a blind baseline.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from prime.attack import scoring
from prime.attack.evidence import Attack, Scorer, TokenStatistics
from prime.attack.pieces import WHOLE, Known, cosine, pieces_of
from prime.attack.subjects import Owners, Subject
from prime.bank.initial import initial_a
from prime.bank.lora import Adapter
from prime.checkpoints.published import open_adapter
from prime.merging.sharers import initial_seed

NOTHING = np.empty(0)
SIDES = ("member", "held_out")


@dataclass(frozen=True)
class Files:
    """All files of a run, and the adapters that went into them."""

    owners: Owners
    subjects: Sequence[Subject]
    model: str  # directory of the base model

    def sources(self, subject: Subject) -> dict[str, Path]:
        """What is read of others when a subject's file is taken apart, by what it is."""
        if subject.adapter is None:
            return {}
        found = {}
        for member in subject.members:
            found[f"member {member}"] = self.owners.adapter(member)
            other = self.together(subject, member)
            found |= {f"file with {member}": other} if other else {}
        return found

    def together(self, subject: Subject, member: str) -> Path | None:
        """The other file with this sharer that has the fewest of the others in it."""
        others = []
        for other in self.subjects:
            if other.adapter and other.user_id != subject.user_id and member in other.members:
                others.append((len({*other.members} & {*subject.members}), other.user_id, other.adapter))
        return min(others)[-1] if others else None

    def known(self, subject: Subject) -> Known:
        """What the strongest holder of a subject's file knows."""
        read = lru_cache(maxsize=None)(lambda path: open_adapter(path, self.model))
        own = {member: read(self.owners.adapter(member)) for member in subject.members}
        settings = self.owners.settings

        def initial(member: str) -> dict[str, Any]:
            seed = initial_seed(settings.get("init", "seed"), settings.get("seed", 0), member)
            return {name: initial_a(seed, name, *a.shape) for name, (a, _) in own[member].factors.items()}

        def together(member: str) -> Adapter | None:
            path = self.together(subject, member)
            return read(path) if path else None

        return Known(own, initial, together)


def taken_apart(
    scorer: Scorer, attack: Attack, files: Files, subject: Subject, scores: Mapping[str, Mapping[str, list[float]]]
) -> dict[str, Any]:
    """By kind of pieces: each sharer's cosine, and (where records were held out) every attack's scores by side.

    Args:
        scores: of the file as it is, by attack and side.
    """
    if subject.adapter is None:
        return {}
    known = files.known(subject)
    pieces = pieces_of(open_adapter(subject.adapter, files.model), known)
    found: dict[str, Any] = {}
    for kind, by_sharer in pieces.items():
        cosines = {name: round(abs(cosine(piece, known.own[name])), 4) for name, piece in by_sharer.items()}
        found[kind] = {"cosines": cosines, "scores": {}}
    of_whole = {name: sides for name, sides in scores.items() if "held_out" in sides}
    found[WHOLE]["scores"] = {name: {side: of_whole[name][side] for side in SIDES} for name in of_whole}
    complete = [kind for kind, by_sharer in pieces.items() if len(by_sharer) == len(subject.members)]
    attacked = [kind for kind in complete if of_whole and kind != WHOLE]
    flat = [(kind, name) for kind in attacked for name in pieces[kind]]
    rows = scorer.of_pieces([pieces[kind][name] for kind, name in flat], [name for _, name in flat])
    for kind in attacked:
        model = {name: rows[place] for place, (of_kind, name) in enumerate(flat) if of_kind == kind}
        found[kind]["scores"] = _scores(attack, subject, model)
    return found


def _scores(attack: Attack, subject: Subject, model: TokenStatistics) -> dict[str, dict[str, list[float]]]:
    """Every attack's scores by side, in the order of the controlled set."""
    by_side: dict[str, Mapping[str, list[float]]] = {}
    for side in SIDES:
        places = attack.places(side, subject.members)
        evidence = [attack.evidence(model, owner, place, NOTHING, NOTHING) for owner, place in places]
        by_side[side] = scoring.record_scores(evidence)
    return {name: {side: scores[name] for side, scores in by_side.items()} for name in by_side["member"]}
