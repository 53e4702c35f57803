"""Stage 2: embed histories, cluster the candidates, and choose the most active user of each cluster as an anchor.

Reads   --candidate_path (<data_dir>/user_anchor_candidate.json), <data_dir>/test_100/user_test_100.json, an encoder
Writes  <output_dir>/user_history_emb.pt, test_user_history_emb.pt   one row per candidate, per test user
        <output_dir>/anchor_user_idx.pt                              anchors, as indices of candidates; written last
Takes   seconds on the demo (2 CPU cores). A finished selection is left as it is.

    python history_anchor.py --candidate_path ./data/movie_tagging/user_anchor_candidate.json --task_name movie_tagging
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from prime import cli
from prime.checkpoints.loading import pick_device
from prime.errors import InputError
from prime.merging.anchors import (
    ANCHOR_IDX,
    check_k,
    choose_anchors,
    cluster,
    embed_users,
    load_encoder,
    save_selection,
)
from prime.runs.run import Run
from prime.users.data import User, load_users
from prime.users.prompts import history_texts
from prime.users.tasks import Task, get_task
from prime.users.templates import load_templates


def build_parser() -> argparse.ArgumentParser:
    parser = cli.new_parser(__doc__)
    parser.add_argument("--candidate_path", help="default <data_dir>/user_anchor_candidate.json")
    parser.add_argument("--output_dir", help="default ./anchor_selection/<task_name>")
    parser.add_argument(
        "--encoder",
        default="microsoft/deberta-v3-large",
        help="Hugging Face encoder or causal LM, a name or a directory",
    )
    parser.add_argument(
        "--embed",
        default="history",
        choices=("history", "target"),
        help="of an item: the text that is retrieved too (published), or only what the user wrote or chose; a causal "
        "encoder reads the taste better off the latter",
    )
    parser.add_argument("--prompt_path", help="template file in the published schema; default: the built-in wording")
    parser.add_argument("--k", type=cli.positive, default=50, help="clusters, so anchors at most")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="where to compute")
    parser.add_argument("--max_batch_tokens", type=cli.positive, default=4096, help="tokens of one forward pass")
    return parser


def item_texts(args: argparse.Namespace, user: User, task: Task) -> list[str]:
    """What is embedded of each of a user's items."""
    if args.embed == "target":
        return [item[task.target] for item in user.profile]
    return history_texts(user.profile, load_templates(args.prompt_path, task))


def output_folder(args: argparse.Namespace) -> Path:
    return Path(args.output_dir or f"./anchor_selection/{args.task_name}")


def open_run(args: argparse.Namespace) -> Run:
    """The run in the output folder; a selection from elsewhere (the published one) is not overwritten."""
    folder = output_folder(args)
    if (folder / ANCHOR_IDX).exists() and not (folder / "settings.json").exists():
        raise InputError(f"{folder}: holds a selection that was not made here; give another --output_dir")
    return cli.open_run(args, folder, "history_anchor", "anchors")


def select_anchors(
    args: argparse.Namespace, task: Task, candidates: Sequence[User], tests: Sequence[User], folder: Path
) -> None:
    """Embed, cluster, choose, and write the selection."""
    check_k(args.k, len(candidates))
    encoder = load_encoder(args.encoder, pick_device(args.device))
    users = [*candidates, *tests]
    texts = [item_texts(args, user, task) for user in users]
    both = embed_users([user.user_id for user in users], texts, encoder, args.max_batch_tokens)
    embeddings, test_embeddings = both[: len(candidates)], both[len(candidates) :]
    anchors = choose_anchors(cluster(embeddings, args.k), [len(user.profile) for user in candidates])
    save_selection(folder, embeddings, test_embeddings, anchors)
    print(
        f"{len(anchors)} anchors of {len(candidates)} candidates: {', '.join(candidates[i].user_id for i in anchors)}"
    )


def main(argv: list[str] | None = None) -> None:
    args = build_parser().parse_args(argv)
    task = get_task(args.task_name)
    args.candidate_path = args.candidate_path or str(cli.data_dir(args) / "user_anchor_candidate.json")
    candidates = load_users(args.candidate_path, task)
    tests = load_users(cli.data_dir(args) / "test_100" / "user_test_100.json", task)
    run = open_run(args)
    with run.turn("the anchors"):
        if not (run.root / ANCHOR_IDX).exists():
            select_anchors(args, task, candidates, tests, run.root)


if __name__ == "__main__":
    cli.run(main)
