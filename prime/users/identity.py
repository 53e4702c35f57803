"""Tasks, users and the wording of prompts by their content, as a run records what it read (`prime.runs.inputs`)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prime.runs.inputs import PLACE, Source, digest_of
from prime.users.data import PROFILE_FILE, User
from prime.users.tasks import get_task
from prime.users.texts import Texts


def task_source(name: str) -> dict[str, Source]:
    """A task, given as `get_task` takes it, without its wording."""
    return {"task": Source(digest_of(get_task(name).content()), name)}


def wording(templates: Mapping[str, str], prompt_path: str | None) -> dict[str, Source]:
    return {"templates": Source(digest_of(dict(templates)), prompt_path or "the task's wording")}


def user_sources(
    folder: Path, file: str, users: Sequence[User], texts: Texts, *, asked: bool = False
) -> dict[str, dict[str, Source]]:
    """What a stage reads of each user: the history, the profile in words, where they are `asked` the queries.

    Args:
        folder: the task's data.
        file: the users' file in it.
    """
    path, profiles = str(folder / file), str(folder / PROFILE_FILE)
    found = {}
    for place, user in enumerate(users):
        sources = {
            PLACE: Source(str(place), path),
            "history": Source(digest_of(_history(user)), path),
            "profile in words": Source(digest_of(_words(user, texts)), profiles),
        }
        if asked:
            sources["queries"] = Source(digest_of([[query.id, query.input] for query in user.queries]), path)
        found[user.user_id] = sources
    return found


def all_of(
    what: str, path: Path | str, users: Sequence[User], texts: Texts | None = None, *, trained_on: bool = False
) -> dict[str, Source]:
    """Histories of some users, with `texts` their profiles in words, as one thing that everybody's results depend on.

    Args:
        trained_on: their queries are, with the answers.
    """
    known: list[Any] = []
    for user in users:
        queries = [[query.id, query.input, query.gold] for query in user.queries] if trained_on else []
        known.append([user.user_id, _history(user), _words(user, texts) if texts else None, queries])
    return {what: Source(digest_of(known), str(path))}


def _history(user: User) -> list[dict[str, str]]:
    return [dict(item) for item in user.profile]


def _words(user: User, texts: Texts) -> list[Any]:
    """Whether there are profiles at all, since without any no prompt has one; and the user's."""
    return [texts.profiles is not None, texts.profile_of(user.user_id)]
