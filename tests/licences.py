"""Licences of what is installed, by its own word: `python tests/licences.py`."""

from importlib.metadata import Distribution, distributions


def licence(distribution: Distribution) -> str:
    """A package's licence: as an expression, by the classifiers, or the first line of what it says."""
    about = distribution.metadata
    classified = [line.split(" :: ")[-1] for line in about.get_all("Classifier", []) if line.startswith("License ::")]
    said = [about["License-Expression"], ", ".join(classified), (about["License"] or "").strip().split("\n")[0]]
    return next((text for text in said if text), "not said")


def licences() -> dict[str, tuple[str, str]]:
    """(version, licence) of each installed package, by name."""
    found = {}
    for distribution in distributions():
        found[distribution.name.lower().replace("_", "-")] = (distribution.version, licence(distribution))
    return dict(sorted(found.items()))


if __name__ == "__main__":
    for name, (version, text) in licences().items():
        print(f"{name:24} {version:16} {text[:60]}")
