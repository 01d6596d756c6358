"""The table of lesson 00 that says what is missing, before anything is imported."""

import importlib.metadata
import subprocess
import sys

import jupytext
import pytest

from course_utils.paths import NOTEBOOKS, ROOT
from tests.test_lessons import cells


def rows() -> list[tuple[str, str, str, str]]:
    """What the lesson's own cell makes of the requirements and of what is optional."""
    lesson = cells("00", "environment")
    return list(lesson["environment"]([*lesson["lines"], *lesson["OPTIONAL"]]))


def table() -> dict[str, str]:
    return {name: verdict for name, _, _, verdict in rows()}


def test_here_everything_is_good_and_every_requirement_has_its_row(capsys):
    lesson, asked = cells("00", "environment"), (ROOT / "requirements.txt").read_text().split()
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(rows()) == len(asked) + len(lesson["OPTIONAL"])
    assert {verdict for name, verdict in table().items() if name not in lesson["OPTIONAL"]} == {"yes"}
    assert all(line.split()[0] == name for line, name in zip(printed, table(), strict=True))


def install(monkeypatch, version_of) -> None:
    """Have the machine say that it has the version that `version_of` gives a name, or lacks the package where it is `None`."""

    def version(name: str) -> str:
        if (found := version_of(name)) is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)


@pytest.mark.parametrize(
    ("found", "verdict"),
    [(None, "NO"), ("1.13.1", "NO"), ("2.99.0", "yes"), ("2.12.0.dev1", "yes"), ("2.11.0+cpu", "yes")],
)
def test_a_package_that_is_missing_or_too_old_is_said(monkeypatch, found, verdict):
    install(monkeypatch, lambda name: found if name == "torch" else "99")
    assert table()["torch"].startswith(verdict)
    if verdict == "NO":
        assert table()["torch"] == 'NO: pip install "torch>=2.11"'


def test_what_is_optional_is_never_a_fault(monkeypatch):
    install(monkeypatch, lambda name: None)
    assert ("ipycanvas", "for drawing with the mouse", "missing", "no: pip install ipycanvas") in rows()
    assert table()["numpy"].startswith("NO")


def test_the_table_is_made_without_importing_torch():
    (source,) = (NOTEBOOKS / "source").glob("00_*.py")
    found = jupytext.read(source, fmt="py:percent").cells
    (cell,) = [cell.source for cell in found if "environment" in cell.metadata.get("tags", [])]
    code = f"{cell}\nimport sys\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
