"""What computes here, for a run's record: library versions that can change a result, system, cores, GPUs."""

import os
import platform
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from prime.errors import tell

DRIVER = Path("/proc/driver/nvidia/gpus")
LIBRARIES = ("torch", "transformers", "peft", "nevergrad", "cma", "numpy")


def library_versions() -> dict[str, str]:
    """Versions that can change a result, for the run's record."""
    return {"python": platform.python_version()} | {name: version(name) for name in LIBRARIES}


def machine() -> str:
    """What computes here, for the run's record: system, CPU cores, NVIDIA's GPUs as their driver names them.

    CUDA is not asked, since starting it takes seconds and memory of every GPU.
    """
    names: list[str] = []
    for path in sorted(DRIVER.glob("*/information")):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        names += [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")]
    gpus = [f"{count} x {name}" for name, count in Counter(names).items()]
    return ", ".join([f"{platform.system()} {platform.machine()}", f"{os.cpu_count()} CPU cores", *gpus])


def tell_versions(path: Path, began: Mapping[str, str]) -> None:
    """Warn where other versions of libraries began the run of a settings.json."""
    others = []
    for name, now in library_versions().items():
        if began.get(name, now) != now:
            others.append(f"{name} {began[name]}, now {now}")
    if others:
        tell(f"{path}: begun with {'; '.join(others)}: results may differ")
