"""What a lesson needs and what is installed, found without importing any of it."""

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement

from course_utils.paths import ROOT

OPTIONAL = {"ipycanvas": "for drawing with the mouse"}


def environment(requirements: Path = ROOT / "requirements.txt") -> list[tuple[str, str, str, str]]:
    """One row a package: its name, what is asked for, what is installed, and a verdict.

    The verdict is "yes", or "NO" with what to do for a package that is missing or too old; "no" where it is optional.
    """
    rows = []
    for line in requirements.read_text(encoding="utf-8").split():
        needed = Requirement(line)
        found = _installed(needed.name)
        good = found != "missing" and needed.specifier.contains(found, prereleases=True)
        rows.append((needed.name, str(needed.specifier), found, "yes" if good else f'NO: pip install "{needed}"'))
    for name, purpose in OPTIONAL.items():
        found = _installed(name)
        rows.append((name, purpose, found, "yes" if found != "missing" else f"no: pip install {name}"))
    return rows


def _installed(name: str) -> str:
    try:
        return version(name).split("+")[0]
    except PackageNotFoundError:
        return "missing"
