"""A sharer leaves: his adapter, gates, embedding and every record of his losses are removed, merges with him reopened.

Reads   <data_dir>/user_anchor_candidate.json, user_base_LLM.json; all run directories in --output_dir
Writes  <output_dir>/**              without him: his folders of stages 3 and 3b, results that merged him (4, 4b, 4c) or
                                     looked at his records (5), tables and pages made of those are gone
        anchor_user_idx.pt, user_history_emb.pt   without him; in --anchor_selection_dir too
        <receipt>                    what was removed, whose merges are made again, and what cannot be removed
Takes   seconds; the same command again goes on where it was interrupted. No stage may be at work meanwhile.

    python withdraw.py --task_name movie_tagging --user 1040

Then run stages 4 to 6 as before: whoever had merged him is merged again without him, exactly as if he had never shared;
all others are left alone. A request for deletion asks for this as far as files here go; the receipt says the rest.
"""

from prime import cli  # isort: skip (first: Ctrl-C ends with one line from here on)
from dataclasses import dataclass
from pathlib import Path

from prime import settings as opt


@dataclass(frozen=True, kw_only=True)
class Settings:
    data: opt.DataSettings = opt.group(without=("refresh",))
    user: str = opt.setting(help="id of the sharer who leaves")
    output_dir: str = opt.task_path("./output/<task_name>", "folder of the stages' outputs")
    anchors: opt.SelectionSettings = opt.group()
    receipt: str | None = opt.setting(None, "file to write; default ./withdrawal-<user>.json, outside of --output_dir")


if __name__ == "__main__":
    cli.check_options(Settings, __doc__)  # --help and wrong options end here, before the libraries load

from prime.errors import InputError
from prime.merging.sharers import Selection
from prime.merging.withdrawal import withdraw
from prime.runs.files import read_json
from prime.runs.run import user_dirname
from prime.users.data import BASE_FILE, CANDIDATE_FILE, DATA_BYTES, PROFILE_FILE, load_profiles
from prime.users.tasks import get_task
from prime.users.texts import load_candidates


def what_is_left(settings: Settings, root: Path) -> list[str]:
    """What no command here can remove."""
    folder, user = settings.data.folder, settings.user
    left = [
        "copies that were given away or backed up: of his adapter, of merges with it, of tables and pages",
        f"{folder / CANDIDATE_FILE}: his history, from which stage 2 would choose him again if it began anew",
    ]
    path = folder / PROFILE_FILE
    if path.is_file() and user in load_profiles(path):
        left.append(f"{path}: his profile in words")
    path = folder / BASE_FILE
    rows = read_json(path, DATA_BYTES) if path.is_file() else []
    if any(str(row.get("user_id")) == user for row in rows if isinstance(row, dict)):
        left.append(f"the task adapter under {root}, and all that stands on it: he is in its training data, {path}")
    return left


def main(argv: list[str] | None = None) -> None:
    settings = cli.parse(Settings, __doc__, argv)
    task, root = get_task(settings.data.task), Path(settings.output_dir)
    candidates = load_candidates(settings.data.folder, task)
    places = {user.user_id: place for place, user in enumerate(candidates)}
    if settings.user not in places:
        raise InputError(f"{settings.data.folder / CANDIDATE_FILE}: no user {settings.user} there (--user)")
    selection = Selection.of(settings.anchors, task.name, candidates)
    roots = [root] if selection.folder.resolve().is_relative_to(root.resolve()) else [root, selection.folder]
    receipt = Path(settings.receipt or f"withdrawal-{user_dirname(settings.user)}.json")
    left = what_is_left(settings, root)
    done = withdraw(settings.user, roots, places[settings.user], len(candidates), left, receipt)
    merges = sum(map(len, done["reopened"].values()))
    print(f"{receipt}: {len(done['removed'])} folders removed, {merges} merges to make again; left:")
    print("\n".join(f"  {line}" for line in left))


if __name__ == "__main__":
    cli.run(main)
