"""The pool of sharers: anchor users, their adapters on disk, and who is similar to whom. Sharers are known by id."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from prime.bank.lora import Adapter
from prime.checkpoints.identity import adapter_source
from prime.checkpoints.published import has_adapter, open_adapter
from prime.errors import InputError
from prime.merging.anchors import ANCHOR_IDX, CANDIDATE_EMB, TEST_EMB, load_anchor_idx, load_embeddings
from prime.merging.nearest import top_similar
from prime.runs.inputs import Inputs, Source, digest_of
from prime.runs.run import user_dirname
from prime.seeds import derive_seed
from prime.settings import ModelSettings, SelectionSettings
from prime.users.data import BASE_FILE, TEST_FILE, User
from prime.users.identity import user_sources, wording
from prime.users.texts import Texts


@dataclass(frozen=True)
class Selection:
    """What stage 2 chose among the candidates, and where its files lie."""

    folder: Path
    idx_path: Path
    candidates: Sequence[User]

    @classmethod
    def of(cls, settings: SelectionSettings, task_name: str, candidates: Sequence[User]) -> "Selection":
        folder = Path(settings.anchor_selection_dir or f"./anchor_selection/{task_name}")
        return cls(folder, Path(settings.anchor_idx_path or folder / ANCHOR_IDX), candidates)

    def places(self) -> list[int]:
        """Places of the anchors among the candidates."""
        return load_anchor_idx(self.idx_path, len(self.candidates))

    def anchors(self) -> list[User]:
        return [self.candidates[place] for place in self.places()]

    def training_anchors(self) -> list[User]:
        """The anchors, each with something to train on; InputError naming all that have an empty history."""
        anchors = self.anchors()
        empty = [anchor.user_id for anchor in anchors if not anchor.profile]
        if empty:
            problems = [f"{self.idx_path}: anchor {name}: an empty history, nothing to train on" for name in empty]
            raise InputError.many(problems)
        return anchors


@dataclass(frozen=True)
class Pool:
    """Anchors with their adapters' directories, and for each test user the anchors by falling similarity."""

    anchors: tuple[User, ...]
    folders: tuple[Path, ...]
    ranking: tuple[tuple[int, ...], ...]  # [test users][n_sim] places among the anchors
    base: str  # directory of the model that the adapters belong to
    used_on: str = ""  # that model as adapters name it, see `ModelSettings.adapted_base`
    # Test users share sharers. Another pool of this process reads the files anew: they may have changed.
    open_once: Callable[[Path, str, str], Adapter] = field(
        default_factory=lambda: lru_cache(maxsize=64)(open_adapter), repr=False, compare=False
    )

    def sharers(self, user_index: int) -> list[User]:
        """The sharers of a test user, most similar first."""
        return [self.anchors[place] for place in self.ranking[user_index]]

    def adapters(self, user_index: int) -> list[Adapter]:
        """Their adapters, in the same order."""
        return [self.open_once(self.folders[place], self.base, self.used_on) for place in self.ranking[user_index]]

    def sources(self, user_index: int) -> dict[str, Source]:
        """Who they are, and their adapters, as a run records what it read."""
        names = [sharer.user_id for sharer in self.sharers(user_index)]
        found = {"sharers": Source(", ".join(names), f"{ANCHOR_IDX}, {CANDIDATE_EMB}, {TEST_EMB}")}
        for name, place in zip(names, self.ranking[user_index], strict=True):
            found |= adapter_source(f"adapter of {name}", self.folders[place])
        return found


def initial_seed(init: str, seed: int, user_id: str) -> int:
    """Of an anchor's initial A, as anybody can tell who knows the run's seed: the anchor's own, or the shared one."""
    return derive_seed("shared A", seed) if init == "shared" else derive_seed("anchor", seed, user_id)


def adapter_folder(anchor_dir: str | Path, user_id: str) -> Path:
    """Where stage 3 puts an anchor's adapter."""
    return Path(anchor_dir) / "users" / user_dirname(user_id) / "adapter"


def load_pool(
    selection: Selection,
    model: ModelSettings,
    anchor_dir: str,
    n_test: int,
    n_sim: int,
    sharing: Sequence[int] | None = None,
) -> Pool:
    """Anchors, adapters and similarity for a stage that merges.

    Args:
        anchor_dir: the anchors' adapters, output of stage 3.
        n_test: number of test users.
        n_sim: most similar sharers of a test user; 0 = all.
        sharing: places among the anchors of those that share; None: all of them.

    Raises:
        InputError: an anchor without adapter, or embeddings that do not belong to this data.
    """
    places = selection.places()
    anchors = tuple(selection.candidates[place] for place in places)
    folders = tuple(adapter_folder(anchor_dir, anchor.user_id) for anchor in anchors)
    missing = [a.user_id for a, f in zip(anchors, folders, strict=True) if not has_adapter(f)]
    if missing:
        named = ", ".join(missing[:8]) + (" ..." if len(missing) > 8 else "")
        raise InputError(f"{anchor_dir}: no adapter of {len(missing)} anchors ({named}); run train_anchor_peft.py")
    candidate_emb = load_embeddings(selection.folder / CANDIDATE_EMB, len(selection.candidates))
    test_emb = load_embeddings(selection.folder / TEST_EMB, n_test)
    sharing = range(len(places)) if sharing is None else sharing
    nearest = top_similar(test_emb, candidate_emb, n_sim, [places[place] for place in sharing])
    ranking = []
    for row in nearest:
        ranking.append(tuple(sharing[number] for number in row))
    return Pool(anchors, folders, tuple(ranking), model.llama_model_path, model.adapted_base)


def merging_inputs(
    folder: Path, prompt_path: str | None, users: Sequence[User], texts: Texts, pool: Pool | None
) -> Inputs:
    """What results of test users depend on: their files in a task's data folder, and their sharers where they merge."""
    by_user = user_sources(folder, TEST_FILE, users, texts, asked=True)
    for index, user in enumerate(users):
        by_user[user.user_id] |= pool.sources(index) if pool else {}
    shared = wording(texts.templates, prompt_path)
    if texts.others:
        shared["base users"] = Source(digest_of([dict(item) for item in texts.others]), str(folder / BASE_FILE))
    return Inputs(shared, by_user)
