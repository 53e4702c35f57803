"""The pool of sharers: anchor users, their adapters on disk, and who is similar to whom. Sharers are known by id."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from prime.bank.lora import Adapter
from prime.checkpoints.published import has_adapter, open_adapter
from prime.errors import InputError
from prime.merging.anchors import ANCHOR_IDX, CANDIDATE_EMB, TEST_EMB, load_anchor_idx, load_embeddings
from prime.merging.nearest import top_similar
from prime.runs.run import user_dirname
from prime.users.data import User


def anchor_users(args: argparse.Namespace, candidates: Sequence[User]) -> list[User]:
    """The anchors of `--anchor_idx_path`, in its order."""
    return [candidates[index] for index in load_anchor_idx(anchor_idx_path(args), len(candidates))]


def training_anchors(args: argparse.Namespace, candidates: Sequence[User]) -> list[User]:
    """The anchors, each with something to train on; InputError naming all that have an empty history."""
    anchors = anchor_users(args, candidates)
    empty = [anchor.user_id for anchor in anchors if not anchor.profile]
    if empty:
        path = anchor_idx_path(args)
        raise InputError.many([f"{path}: anchor {name}: an empty history, nothing to train on" for name in empty])
    return anchors


def selection_dir(args: argparse.Namespace) -> Path:
    return Path(args.anchor_selection_dir or f"./anchor_selection/{args.task_name}")


def anchor_idx_path(args: argparse.Namespace) -> Path:
    return Path(args.anchor_idx_path) if args.anchor_idx_path else selection_dir(args) / ANCHOR_IDX


def add_selection(parser: argparse.ArgumentParser) -> None:
    """Options that say where stage 2 put its files."""
    group = parser.add_argument_group("anchors")
    group.add_argument("--anchor_idx_path", help=f"default <anchor_selection_dir>/{ANCHOR_IDX}")
    group.add_argument("--anchor_selection_dir", help="outputs of stage 2; default ./anchor_selection/<task_name>")


@dataclass(frozen=True)
class Pool:
    """Anchors with their adapters' directories, and for each test user the anchors by falling similarity."""

    anchors: tuple[User, ...]
    folders: tuple[Path, ...]
    ranking: tuple[tuple[int, ...], ...]  # [test users][n_sim] places among the anchors
    base: str  # directory of the model that the adapters belong to
    # Test users share sharers. Another pool of this process reads the files anew: they may have changed.
    open_once: Callable[[Path, str], Adapter] = field(
        default_factory=lambda: lru_cache(maxsize=64)(open_adapter), repr=False, compare=False
    )

    def sharers(self, user_index: int) -> list[User]:
        """The sharers of a test user, most similar first."""
        return [self.anchors[place] for place in self.ranking[user_index]]

    def adapters(self, user_index: int) -> list[Adapter]:
        """Their adapters, in the same order."""
        return [self.open_once(self.folders[place], self.base) for place in self.ranking[user_index]]


def adapter_folder(anchor_dir: str | Path, user_id: str) -> Path:
    """Where stage 3 puts an anchor's adapter."""
    return Path(anchor_dir) / "users" / user_dirname(user_id) / "adapter"


def load_pool(
    args: argparse.Namespace, candidates: Sequence[User], n_test: int, sharing: Sequence[int] | None = None
) -> Pool:
    """Anchors, adapters and similarity for a stage that merges.

    Args:
        n_test: number of test users.
        sharing: places among the anchors of those that share; None: all of them.

    Raises:
        InputError: an anchor without adapter, or embeddings that do not belong to this data.
    """
    places = load_anchor_idx(anchor_idx_path(args), len(candidates))
    anchors = tuple(candidates[place] for place in places)
    folders = tuple(adapter_folder(args.anchor_dir, anchor.user_id) for anchor in anchors)
    missing = [a.user_id for a, f in zip(anchors, folders, strict=True) if not has_adapter(f)]
    if missing:
        named = ", ".join(missing[:8]) + (" ..." if len(missing) > 8 else "")
        raise InputError(f"{args.anchor_dir}: no adapter of {len(missing)} anchors ({named}); run train_anchor_peft.py")
    selection = selection_dir(args)
    candidate_emb = load_embeddings(selection / CANDIDATE_EMB, len(candidates))
    test_emb = load_embeddings(selection / TEST_EMB, n_test)
    sharing = range(len(places)) if sharing is None else sharing
    nearest = top_similar(test_emb, candidate_emb, args.n_sim, [places[place] for place in sharing])
    ranking = tuple(tuple(sharing[number] for number in row) for row in nearest)
    return Pool(anchors, folders, ranking, args.llama_model_path)
