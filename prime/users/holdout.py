"""Which items of a history an adapter is trained on, and which it never sees: non-members of the same user.

Trained and held-out records of one user differ in nothing but training, so an attack that tells them apart sees
memory, and not that users are alike (the "controlled" experiment of mia.py).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from prime.errors import InputError
from prime.runs.forms import RECORD_SETTINGS, form_problems
from prime.runs.run import read_settings
from prime.seeds import derive_seed
from prime.users.data import User
from prime.users.prompts import Record, history_records
from prime.users.texts import Texts


class Split(NamedTuple):
    """How histories become records: a share of each user's last `recent_k` items (0: of all) is held out."""

    share: float = 0.0
    seed: int = 0
    recent_k: int = 0
    quoting: bool = True  # see `history_records`; differential privacy needs records that quote nothing

    def positions(self, user: User) -> frozenset[int]:
        """Positions in the user's history that are held out; at least one different item stays on either side.

        Each item's place in the draw is a function of the run's seed, the user's id and the item, so that one item
        more changes little. Items that are equal but for their id go together: a copy that is trained on is no
        non-member. A user with fewer than two different items keeps all.
        """
        first = max(0, len(user.profile) - self.recent_k) if self.recent_k else 0
        places: dict[int, list[int]] = {}
        for place, item in enumerate(user.profile[first:], first):
            content = sorted((name, text) for name, text in item.items() if name != "id")
            draw = derive_seed("holdout", self.seed, user.user_id, content)
            places.setdefault(draw, []).append(place)
        if self.share == 0 or len(places) < 2:
            return frozenset()
        size = min(max(1, round(self.share * len(places))), len(places) - 1)
        held_out: set[int] = set()
        for draw in sorted(places)[:size]:
            held_out |= set(places[draw])
        return frozenset(held_out)

    def item_ids(self, user: User) -> list[str]:
        """The held-out items' ids, oldest first."""
        return [user.profile[place]["id"] for place in sorted(self.positions(user))]

    def told(self, user: User) -> dict[str, list[str]]:
        """What result.json and the card say of it: nothing, where nothing was to be held out."""
        return {"held_out_ids": self.item_ids(user)} if self.share else {}


def trained_split(folder: str | Path) -> Split:
    """As the adapters in a stage's directory were trained; adapters from elsewhere held nothing out."""
    path = Path(folder) / "settings.json"
    if not path.is_file():
        return Split()
    settings = read_settings(folder)["settings"]
    if problems := form_problems(settings, RECORD_SETTINGS, f"{path}: settings"):
        raise InputError.many(problems)
    share, quoting = settings.get("holdout", 0.0), not settings.get("enable_dp", False)
    return Split(share, settings["seed"], settings["recent_k"], quoting)


def records_of(texts: Texts, user: User, recent_k: int, split: Split) -> list[Record]:
    """All records of a user's history, those of held-out items marked."""
    profile = texts.profile_of(user.user_id)
    return history_records(user, texts.task, texts.templates, profile, recent_k, split.positions(user), split.quoting)


def trained_records(texts: Texts, user: User, recent_k: int, split: Split) -> list[Record]:
    """The records of a user's history that an adapter is trained on."""
    return [record for record in records_of(texts, user, recent_k, split) if not record.held_out]


def check_split(folder: str | Path, result: Mapping[str, Any], records: Sequence[Record]) -> None:
    """InputError unless these are the records that the adapter of `result` was trained on."""
    trained = [record.id for record in records if not record.held_out]
    if trained != result.get("record_ids", trained):  # imported adapters come without
        name, count = result["user_id"], len(result["record_ids"])
        raise InputError(f"{folder}: {name} was trained on {count} other records than the {len(trained)} of the data")
