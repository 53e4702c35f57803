"""Sets of members and non-members, and what the attacks' results say about each.

A result is what `prime.attack.subjects` stores for one user (or sharer): {key: {attack: {side: scores}}}, and for each
side its numbers of records by anchor as `<side>_num_samples`. The key is "scores" for what was deployed, "blind" for
the same attack on the base; the scores are those of the side's records, anchor after anchor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain

import numpy as np

from prime.attack.pieces import WHOLE
from prime.attack.scoring import ATTACKS, PUBLISHED_ATTACK
from prime.attack.statistics import attack_summary, auroc, two_way_auroc

# name -> the sides that an attack has to tell apart, members first
SETS: dict[str, tuple[str, str]] = {
    "published": ("member", "non_member"),  # sharers' records, and those of all other anchors
    "controlled": ("member", "held_out"),  # sharers' records, and records of the same sharers that were held out
    "user": ("member", "non_member"),  # sharers, and all other anchors: an anchor's score is its records' mean
}
# Names of one user's AUROCs, those of the attack and of its blind baseline, by set.
USER_AUROCS = {"published": ("auroc", "blind"), "controlled": ("controlled", "controlled_blind")}


def set_scores(result: Mapping, key: str, attack: str, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Members' and non-members' scores of one user in the named set."""
    members, non_members = (np.array(result[key][attack].get(side, ()), dtype=float) for side in SETS[name])
    if name != "user":
        return members, non_members
    return (
        _anchor_means(members, result["member_num_samples"]),
        _anchor_means(non_members, result["non_member_num_samples"]),
    )


def _anchor_means(scores: np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """Mean score of each anchor that has records."""
    parts = np.split(scores, np.cumsum(sizes)[:-1])
    return np.array([part.mean() for part in parts if len(part)])


def scores_by_user(
    results: Sequence[Mapping], key: str, attack: str, name: str
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Members' and non-members' scores in the named set, one array per user in each."""
    pairs = [set_scores(result, key, attack, name) for result in results]
    return [members for members, _ in pairs], [non_members for _, non_members in pairs]


def in_set(results: Sequence[Mapping], name: str) -> list[Mapping]:
    """The users who have members and non-members in the named set."""
    return [result for result in results if _has_both_sides(result, name)]


def _has_both_sides(result: Mapping, name: str) -> bool:
    members, non_members = set_scores(result, "scores", PUBLISHED_ATTACK, name)
    return len(members) > 0 and len(non_members) > 0


def attacks_on(results: Sequence[Mapping]) -> list[str]:
    """The attacks that all of these results hold; none without results."""
    if not results:
        return []
    common = set.intersection(*(set(result["scores"]) for result in results))
    return [attack for attack in ATTACKS if attack in common]


def attack_summaries(
    results: Sequence[Mapping], name: str = "published", *, n: int = 2000, seed: int = 0
) -> dict[str, dict[str, object]]:
    """`attack_summary` of every attack in the results, the strongest first; empty where nobody has the set."""
    users = in_set(results, name)
    summaries = {}
    for attack in attacks_on(users):
        attacked = scores_by_user(users, "scores", attack, name)
        blind = scores_by_user(users, "blind", attack, name)
        summaries[attack] = attack_summary(*attacked, *blind, n=n, seed=seed)
    return strongest_first(summaries)


def strongest_first(summaries: Mapping[str, dict]) -> dict[str, dict]:
    """Attacks by falling AUROC."""
    return dict(sorted(summaries.items(), key=lambda item: -item[1]["auroc"]["mean"]))


def white_box_summary(results: Sequence[Mapping], *, n: int = 2000, seed: int = 0) -> dict[str, dict[str, object]]:
    """By kind of pieces (`prime.attack.pieces`) how much of the sharers' updates they are, and every attack on them.

    A piece's cosine is that with its sharer's own update, a mean over all sharers of all files; `whole` is the file as
    it is. An attack is summarised as in the controlled set, its `blind` figures being those of the whole file, so that
    `auroc_above_blind` is what taking the file apart brings. Without held-out records there are cosines alone.
    """
    apart = [result["white_box"] for result in results if result.get("white_box")]
    found: dict[str, dict[str, object]] = {}
    for kind in dict.fromkeys(chain.from_iterable(apart)):
        of_kind = [pieces for pieces in apart if kind in pieces]
        cosines = [value for pieces in of_kind for value in pieces[kind]["cosines"].values()]
        whole = [pieces[WHOLE]["cosines"][name] for pieces in of_kind for name in pieces[kind]["cosines"]]
        attacks = {}
        attacked = [pieces for pieces in of_kind if _told_apart(pieces[kind]["scores"])]
        for attack in attacked[0][kind]["scores"] if attacked else ():
            sides = [_sides(attacked, of, attack) for of in (kind, WHOLE)]
            attacks[attack] = attack_summary(*sides[0], *sides[1], n=n, seed=seed)
        numbers = {"files": len(of_kind), "sharers": len(cosines)}
        found[kind] = numbers | {
            "cosine": float(np.mean(cosines)),
            "cosine_of_whole": float(np.mean(whole)),
            "attacks": strongest_first(attacks),
        }
    return found


def _told_apart(scores: Mapping[str, Mapping[str, Sequence[float]]]) -> bool:
    return bool(scores) and all(all(sides.values()) for sides in scores.values())


def _sides(attacked: Sequence[Mapping], kind: str, attack: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Members' and held-out records' scores of each file."""
    pairs = [pieces[kind]["scores"][attack] for pieces in attacked]
    return [np.array(pair["member"]) for pair in pairs], [np.array(pair["held_out"]) for pair in pairs]


def set_summary(results: Sequence[Mapping], name: str, *, n: int = 2000, seed: int = 0) -> dict[str, object]:
    """The named set's numbers of users, members and non-members, and its `attack_summaries`."""
    users = in_set(results, name)
    members, non_members = scores_by_user(users, "scores", PUBLISHED_ATTACK, name)
    attacks = attack_summaries(users, name, n=n, seed=seed)
    known = all(0 < len(user.get("member_ids", ())) == len(user.get("held_out_num_samples", ())) for user in users)
    if users and name == "controlled" and known:
        for attack, summary in attacks.items():
            summary["auroc_users_and_sharers"] = _two_way(users, attack, n, seed)
    return {
        "users": len(users),
        "members": sum(map(len, members)),
        "non_members": sum(map(len, non_members)),
        "attacks": attacks,
    }


def _two_way(results: Sequence[Mapping], attack: str, n: int, seed: int) -> dict[str, float]:
    """AUROC in the controlled set, its interval drawn over users and sharers."""
    sharers: dict[str, int] = {}
    sides: dict[str, list[np.ndarray]] = {"member": [], "held_out": []}
    users: list[int] = []
    cells: list[int] = []
    for number, result in enumerate(results):
        for name in result["member_ids"]:
            users.append(number)
            cells.append(sharers.setdefault(name, len(sharers)))
        for side, parts in sides.items():
            borders = np.cumsum(result[f"{side}_num_samples"])[:-1]
            parts += np.split(np.array(result["scores"][attack][side], dtype=float), borders)
    return two_way_auroc(sides["member"], sides["held_out"], users, cells, n=n, seed=seed)


def user_aurocs(result: Mapping) -> dict[str, dict[str, float]]:
    """AUROC of every attack on one user, and of the same attack on the base (`blind`).

    Where records were held out, also `controlled` and `controlled_blind`.
    """
    aurocs: dict[str, dict[str, float]] = {}
    for name, (attacked, blind) in USER_AUROCS.items():
        for attack in attacks_on(in_set([result], name)):
            of_attack = aurocs.setdefault(attack, {})
            of_attack[attacked] = auroc(*set_scores(result, "scores", attack, name))
            of_attack[blind] = auroc(*set_scores(result, "blind", attack, name))
    return aurocs
