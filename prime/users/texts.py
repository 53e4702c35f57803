"""What a task's prompts are made of (its templates and the users' textual profiles), and which users there are.

Everything is read from the task's data folder, which holds the files of data/README.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from prime.errors import tell
from prime.users.data import (
    BASE_FILE,
    CANDIDATE_FILE,
    PROFILE_FILE,
    PUBLISHED_PROFILE_FILE,
    TEST_FILE,
    User,
    load_profiles,
    load_users,
)
from prime.users.tasks import Task, get_task
from prime.users.templates import load_templates


class Texts(NamedTuple):
    """What every prompt of a task is made of."""

    task: Task
    templates: Mapping[str, str]
    profiles: Mapping[str, str] | None  # by user id; None: the data folder has no profile file
    others: Sequence[Mapping[str, str]] = ()  # history items of other users, see `asked_as_queries`

    def profile_of(self, user_id: str) -> str | None:
        """The user's textual profile, None where there is none."""
        return (self.profiles or {}).get(user_id)


def load_texts(data_dir: Path, task: str, prompt_path: str | None, texts: str = "faithful") -> Texts:
    """Task, templates and profiles; without a profile file there are no prompts with a profile.

    Args:
        task: a name or a file, see `get_task`.
    """
    found = get_task(task, texts)
    path = data_dir / PROFILE_FILE
    if not path.exists() and (data_dir / PUBLISHED_PROFILE_FILE).exists():
        path = data_dir / PUBLISHED_PROFILE_FILE
    profiles = load_profiles(path) if path.exists() else None
    if profiles is None:
        tell(f"{path}: not there; prompts with a textual profile are left out (gen_profile.py makes it)")
    return Texts(found, load_templates(prompt_path, found), profiles)


def asked_as_queries(data_dir: Path, texts: Texts) -> Texts:
    """The same texts for histories that are asked as test queries: judged by the test's metrics and labels.

    A task whose queries offer two references (citation) also needs wrong ones: the base users' items come along.
    """
    task = dataclasses.replace(texts.task, history_metrics=texts.task.metrics, history_labels=texts.task.labels)
    if task.query_parts == 1:
        return texts._replace(task=task)
    base_users = load_users(data_dir / BASE_FILE, task)
    return texts._replace(task=task, others=list(chain.from_iterable(user.profile for user in base_users)))


def load_test_users(data_dir: Path, task: Task) -> list[User]:
    """The users of the test, with their queries."""
    return load_users(data_dir / TEST_FILE, task, need_queries=True)


def load_candidates(data_dir: Path, task: Task) -> list[User]:
    """The users who may become anchors."""
    return load_users(data_dir / CANDIDATE_FILE, task)
