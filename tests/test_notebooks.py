"""Every notebook as it is committed and, under `-m notebooks`, every solved notebook executed once more."""

import json
import re
from pathlib import Path

import nbformat
import pytest
from nbformat import NotebookNode
from nbformat.v4 import new_code_cell, new_notebook, new_output

from tools import run
from tools.build import drift, stored
from tools.course import ROOT, Lesson, read_course

LESSONS = read_course().lessons
FEWEST_CLAIMS = 4
lessons = pytest.mark.parametrize("lesson", LESSONS, ids=[lesson.id for lesson in LESSONS])


def outcomes(notebook: NotebookNode) -> dict[str, str]:
    """What each check cell printed, by exercise: "correct", "not yet", "not attempted", or "" where it printed nothing."""
    found = {}
    for cell in notebook.cells:
        for tag in cell.metadata.get("tags", []):
            if tag.startswith("check-"):
                id = tag.removeprefix("check-")
                printed = "".join(output.get("text", "") for output in cell.outputs if output.get("name") == "stdout")
                match = re.search(rf"^. {re.escape(id)}: (correct|not yet|not attempted)", printed, re.MULTILINE)
                found[id] = match[1] if match else ""
    return found


@pytest.mark.parametrize(
    ("printed", "outcome"),
    [
        ("✓ 00.1: correct", "correct"),
        ("✗ 00.1: not yet: the value is not correct", "not yet"),
        ("… 00.1: not attempted: replace the dots", "not attempted"),
        ("✓ 00.2: correct", ""),
        ("", ""),
    ],
)
def test_what_a_check_cell_printed_is_read(printed: str, outcome: str) -> None:
    cell = new_code_cell('check("00.1", f)', metadata={"tags": ["check-00.1"]})
    cell.outputs = [new_output("stream", name="stdout", text=f"{printed}\n")]
    assert outcomes(new_notebook(cells=[new_code_cell("1"), cell])) == {"00.1": outcome}


def test_what_is_derived_is_in_step_with_its_source() -> None:
    assert drift() == [], "run `make notebooks`"


@lessons
@pytest.mark.parametrize(("solved", "outcome"), [(False, "not attempted"), (True, "correct")])
def test_the_committed_notebook_shows_its_exercises_untouched_or_solved(lesson: Lesson, solved: bool, outcome: str) -> None:
    found = outcomes(nbformat.read(ROOT / stored(lesson, solved), as_version=4))
    assert len(found) >= 2 and set(found.values()) == {outcome}, found


@pytest.mark.notebooks
@lessons
def test_the_solved_notebook_passes_its_checks_and_its_claims_hold(lesson: Lesson) -> None:
    out = Path(ROOT, "build", "solutions")
    assert run.main(["--solutions", "--lessons", lesson.id, "--out", str(out)]) == 0
    found = outcomes(nbformat.read(out / f"{lesson.name}.ipynb", as_version=4))
    assert len(found) >= 2 and set(found.values()) == {"correct"}, found
    (path,) = (out / lesson.id / "evidence").glob("*.json")
    claims = json.loads(path.read_text(encoding="utf-8"))
    assert len(claims) >= FEWEST_CLAIMS
    assert [claim["claim"] for claim in claims if not claim["holds"]] == []
