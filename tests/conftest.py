"""Light fixtures; nothing here imports torch."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

# Whether a test passes is not a matter of how busy the machine is.
settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data" / "demo")]  # plain `pytest` finds the package and the demo's makers


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: no worker is left alone with one at the end."""
    items.sort(key=lambda item: item.path.name not in ("test_pipeline.py", "test_user_peft.py", "test_page.py"))


@pytest.fixture(scope="session", autouse=True)
def nothing_is_told_by_the_minute() -> None:
    """What a test finds on stderr does not depend on how long it takes; test_progress.py has a clock of its own."""
    from prime.runs import progress

    progress.EVERY = math.inf


@pytest.fixture
def inside(here: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the test module's own fixture `here`, as the current directory."""
    monkeypatch.chdir(here)
    return here


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str, Any], Path]:
    """write(name, value) -> path of a new JSON file (a str is written as it is)."""

    def write_file(name: str, value: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
        return path

    return write_file
