"""Stage 2: embed histories, cluster the candidates, and choose the most active user of each cluster as an anchor.

Reads   --candidate_path (<data_dir>/user_anchor_candidate.json), <data_dir>/test_100/user_test_100.json, an encoder
Writes  <output_dir>/user_history_emb.pt, test_user_history_emb.pt   one row per candidate, per test user
        <output_dir>/anchor_user_idx.pt                              anchors, as indices of candidates; written last
Takes   seconds on the demo (2 CPU cores). A finished selection is left as it is.

    python history_anchor.py --candidate_path ./data/movie_tagging/user_anchor_candidate.json --task_name movie_tagging
"""

from prime import cli  # isort: skip (first: Ctrl-C ends with one line from here on)
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from prime import settings as opt


@dataclass(frozen=True, kw_only=True)
class Settings:
    data: opt.DataSettings = opt.group()
    candidate_path: str | None = opt.setting(None, "default <data_dir>/user_anchor_candidate.json")
    output_dir: str = opt.task_path("./anchor_selection/<task_name>", "where the selection goes", neutral=True)
    encoder: str = opt.setting("microsoft/deberta-v3-large", "Hugging Face encoder or causal LM, a name or a directory")
    embed: str = opt.setting(
        "history",
        "of an item: the text that is retrieved too (published), or only what the user wrote or chose; a causal "
        "encoder reads the taste better off the latter",
        choices=("history", "target"),
    )
    texts: str = opt.texts()
    prompt_path: str | None = opt.setting(None, "template file in the published schema; default: the built-in wording")
    k: int = opt.setting(50, "clusters, so anchors at most; fewer where there are fewer candidates", parse=opt.positive)
    min_items: int = opt.setting(
        opt.MIN_ITEMS, "history items of an anchor at least; clusters without such a user give none", parse=opt.positive
    )
    n_sim: int = opt.setting(
        3, "anchors that stage 4 merges for a user; no more than these are refused; 0 = all", parse=opt.natural,
        neutral=True,
    )  # fmt: skip
    device: str = opt.setting("auto", "where to compute", choices=opt.DEVICES, neutral=True)
    max_batch_tokens: int = opt.setting(4096, "tokens of one forward pass", parse=opt.positive, neutral=True)


if __name__ == "__main__":
    cli.check_options(Settings, __doc__)  # --help and wrong options end here, before the libraries load

from prime.checkpoints.identity import encoder_sources
from prime.checkpoints.loading import pick_device, settle_threads
from prime.errors import InputError, tell
from prime.merging.anchors import (
    ANCHOR_IDX,
    CANDIDATE_EMB,
    TEST_EMB,
    check_anchors,
    choose_anchors,
    cluster,
    embed_users,
    load_encoder,
    save_selection,
)
from prime.runs.inputs import Inputs
from prime.runs.run import Run
from prime.users.data import CANDIDATE_FILE, TEST_FILE, User, load_users
from prime.users.identity import all_of, wording
from prime.users.prompts import history_texts
from prime.users.tasks import Task, get_task
from prime.users.templates import load_templates


def item_texts(embed: str, prompt_path: str | None, user: User, task: Task) -> list[str]:
    """What is embedded of each of a user's items."""
    if embed == "target":
        return [item[task.target] for item in user.profile]
    return history_texts(user.profile, load_templates(prompt_path, task))


def open_run(settings: Settings, candidate_path: str, inputs: Inputs) -> Run:
    """The run in the output folder; a selection from elsewhere (the published one) is not overwritten."""
    folder = Path(settings.output_dir)
    if (folder / ANCHOR_IDX).exists() and not (folder / "settings.json").exists():
        raise InputError(f"{folder}: holds a selection that was not made here; give another --output_dir")
    return cli.open_run(settings, folder, "history_anchor", "anchors", inputs, candidate_path=candidate_path)


def select_anchors(
    settings: Settings, task: Task, candidates: Sequence[User], tests: Sequence[User], folder: Path
) -> None:
    """Embed, cluster, choose, and write the selection."""
    k, n_items = min(settings.k, len(candidates)), [len(user.profile) for user in candidates]
    if k < settings.k:
        tell(f"--k {settings.k}: there are {k} candidates, so as many clusters are made")
    device = pick_device(settings.device)
    encoder = load_encoder(settings.encoder, device)
    settle_threads(encoder.model, device)
    users = [*candidates, *tests]
    texts = [item_texts(settings.embed, settings.prompt_path, user, task) for user in users]
    embedded = embed_users([user.user_id for user in users], texts, encoder, settings.max_batch_tokens)
    embeddings, test_embeddings = embedded[: len(candidates)], embedded[len(candidates) :]
    labels = cluster(embeddings, k)
    anchors = choose_anchors(labels, n_items, settings.min_items)
    dropped = check_anchors(len(anchors), len(set(labels)), max(n_items), settings.min_items, settings.n_sim)
    save_selection(folder, embeddings, test_embeddings, anchors)
    names = ", ".join(candidates[place].user_id for place in anchors)
    print(f"{len(anchors)} anchors of {len(candidates)} candidates: {names}" + (f"\n{dropped}" if dropped else ""))


def main(argv: list[str] | None = None) -> None:
    settings = cli.parse(Settings, __doc__, argv)
    task, data_dir = get_task(settings.data.task, settings.texts), settings.data.folder
    candidate_path = settings.candidate_path or str(data_dir / CANDIDATE_FILE)
    candidates = load_users(candidate_path, task)
    tests = load_users(data_dir / TEST_FILE, task)
    shared = encoder_sources(settings.encoder, settings.device)
    shared |= wording(load_templates(settings.prompt_path, task), settings.prompt_path)
    shared |= all_of("candidates", candidate_path, candidates) | all_of("test users", data_dir / TEST_FILE, tests)
    run = open_run(settings, candidate_path, Inputs(shared, products=(ANCHOR_IDX, CANDIDATE_EMB, TEST_EMB)))
    with run.turn("the anchors"):
        if not (run.root / ANCHOR_IDX).exists():
            select_anchors(settings, task, candidates, tests, run.root)


if __name__ == "__main__":
    cli.run(main)
