"""What is installed: locked with hashes, as required, and under which licences."""

import re
import shutil
import signal
import subprocess
import sys
from importlib.metadata import distribution, version
from pathlib import Path

import licences
import pytest
import world
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

LOCKS = ("requirements.lock", "requirements-cuda.lock", "requirements-dev.lock")
PIN = re.compile(r"([A-Za-z0-9_.-]+)==([^ ;]+)")


def pins(name: str) -> dict[str, str]:
    """Versions by name in a file of requirements."""
    lines = (world.ROOT / name).read_text().splitlines()
    return {canonicalize_name(match[1]): match[2] for line in lines if (match := PIN.match(line))}


def locked() -> dict[str, str]:
    return pins(LOCKS[0]) | pins(LOCKS[1]) | pins(LOCKS[2])


def needed(name: str) -> dict[str, str]:
    """Installed versions of all that a file of requirements brings, by the packages' own metadata."""
    waiting, found = list(pins(name)), {}
    while waiting:
        package = canonicalize_name(waiting.pop())
        if package in found:
            continue
        found[package] = version(package)
        for line in distribution(package).requires or ():
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return found


@pytest.mark.parametrize("kind", ["requirements", "requirements-dev"])
def test_the_lock_is_of_the_requirements(kind: str) -> None:
    assert pins(f"{kind}.txt").items() <= pins(f"{kind}.lock").items()


@pytest.mark.parametrize("kind", ["requirements", "requirements-dev"])
def test_the_whole_tree_is_locked_and_installed_as_locked(kind: str) -> None:
    installed = {package: number.partition("+")[0] for package, number in needed(f"{kind}.txt").items()}
    assert installed.items() <= locked().items()


@pytest.mark.parametrize("name", LOCKS)
def test_every_locked_package_has_hashes_and_nothing_is_taken_from_elsewhere(name: str) -> None:
    text = (world.ROOT / name).read_text()
    assert "://" not in text and " @ " not in text and "\n-" not in text
    for block in re.split(r"\n(?=[^ ])", text.strip()):
        head, *hashes = block.replace("\\\n", "\n").splitlines()
        assert PIN.match(head), head
        assert hashes and all(re.fullmatch(r" +--hash=sha256:[0-9a-f]{64} *", line) for line in hashes), head


def test_the_cpu_build_is_of_the_locked_version() -> None:
    script = (world.ROOT / "setup_env.sh").read_text()
    (build,) = re.findall(r'TORCH_CPU="torch==(\S+)\+cpu --hash=sha256:[0-9a-f]{64}"', script)
    assert build == pins("requirements.txt")["torch"]


@pytest.mark.slow
def test_one_package_is_under_the_gpl_and_the_search_does_without_it() -> None:
    """It comes with nevergrad; only optimizers with DS in their names import it (SECURITY.md)."""
    strict = {name for name, (_, text) in licences.licences().items() if re.search(r"GPL|General Public", text)}
    assert strict & needed("requirements.txt").keys() == {"directsearch"}
    code = (
        "import sys, numpy\nfrom prime.merging.optimizer import Search\n"
        "for name in ('cma', 'ngopt', 'tbpsa'):\n"
        "    search = Search(numpy.zeros(3), name, 12, 0)\n"
        "    while search.open:\n"
        "        points = search.ask()\n"
        "        search.tell([float((point ** 2).sum()) for point in points])\n"
        "assert 'nevergrad' in sys.modules and 'directsearch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=world.ROOT, check=True)


# -- setup_env.sh, with a stand-in for Python that takes notes -------------------------------------------------------

STAND_IN = r"""#!/bin/bash
echo "$@" >> "$NOTES"
case "$*" in
    *"-m venv"*) rm -rf "${@: -1}" && mkdir -p "${@: -1}/bin" && cp "$0" "${@: -1}/bin/python" ;;
    *requirements-cuda.lock) touch "$(dirname "$0")/cuda" ;;
    *"pip install"*"$BREAKS"*) [ -z "$BREAKS" ] || { [ -z "$KILLS" ] || kill -9 $PPID; exit 1; } ;;
    *"pip check"*) [ -z "$LACKS" ] || [ -e "$(dirname "$0")/cuda" ] ;;
esac
"""


def set_up(folder: Path, **env: str) -> tuple[int, str]:
    """Exit code, and the calls of Python."""
    python, notes = folder / "stand-in", folder / "notes"
    if not python.exists():
        for name in ("setup_env.sh", *LOCKS):
            shutil.copy(world.ROOT / name, folder)
        python.write_text(STAND_IN)
        python.chmod(0o755)
    notes.write_text("")
    unset = dict.fromkeys(("BREAKS", "KILLS", "LACKS"), "")
    env = {"PATH": "/usr/bin:/bin", "PYTHON": str(python), "NOTES": str(notes), **unset, **env}
    ended = subprocess.run(["bash", str(folder / "setup_env.sh")], env=env, capture_output=True, text=True)
    return ended.returncode, notes.read_text()


def test_an_installation_that_failed_is_not_recorded_as_done(tmp_path: Path) -> None:
    mark = tmp_path / ".venv" / "installed-requirements.lock"
    assert set_up(tmp_path, BREAKS="requirements.lock")[0] and not mark.exists()
    code, calls = set_up(tmp_path)
    assert code == 0 and mark.read_bytes() == (tmp_path / "requirements.lock").read_bytes()
    assert "-m venv" not in calls and "--require-hashes --no-deps -r" in calls and "cuda" not in calls
    assert set_up(tmp_path) == (0, "")


def test_after_pip_was_killed_the_environment_is_made_anew(tmp_path: Path) -> None:
    assert set_up(tmp_path, BREAKS="requirements.lock", KILLS="yes")[0] == -signal.SIGKILL
    code, calls = set_up(tmp_path)
    assert code == 0 and "venv --clear" in calls
    assert set_up(tmp_path) == (0, "")


def test_libraries_of_cuda_come_where_torch_wants_them(tmp_path: Path) -> None:
    code, calls = set_up(tmp_path, LACKS="yes")
    assert code == 0 and "requirements-cuda.lock" in calls
    (tmp_path / "other").mkdir()
    assert set_up(tmp_path / "other", LACKS="yes", BREAKS="requirements.lock")[0]
    assert not (tmp_path / "other" / ".venv" / "installed-requirements.lock").exists()
