"""The workshop's first half: notebooks made from their sources, and drift between the two found."""

import errno
import os
from pathlib import Path

import jupytext
import nbformat
import pytest

from tests.toy_course import SOURCE, make_course
from tools import build
from tools.course import ToolError, declared, read_course, write_text
from tools.source import lint, render

EXERCISE = """\
def area(radius):
    # <solution>
    return 3.14 * radius**2
    # <stub>
    # if radius:
    #     return ...
    #
    # </stub>

# <solution>
side = 2
# <stub>
# side = ...
# </stub>
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy course, built and executed once; tests that change it work on a copy."""
    root = make_course(tmp_path_factory.mktemp("course"))
    assert build.build(root) == []
    return root


@pytest.fixture
def copy(built: Path, tmp_path: Path) -> Path:
    root = make_course(tmp_path)
    for path in ["README.md", "notebooks/00_toy.ipynb", "notebooks/solutions/00_toy.ipynb"]:
        (root / path).parent.mkdir(exist_ok=True)
        (root / path).write_bytes((built / path).read_bytes())
    assert build.drift(root) == []
    return root


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new, 1), encoding="utf-8")


def test_the_student_gets_the_stub_uncommented_at_its_indentation() -> None:
    student = render(EXERCISE, solved=False, where="x.py")
    assert student == "def area(radius):\n    if radius:\n        return ...\n\n\nside = ...\n"


def test_the_solved_version_keeps_the_solutions_and_no_trace_of_the_stub() -> None:
    assert render(EXERCISE, solved=True, where="x.py") == "def area(radius):\n    return 3.14 * radius**2\n\nside = 2\n"


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("x = 1\n# <stub>\n# </stub>\n", 2, "out of place"),
        ("# <solution>\nx = 1\n# </stub>\n", 3, "out of place"),
        ("# <solution>\n# <solution>\n", 2, "out of place"),
        ("# <solution>\nx = 1\n# <stub>\nx = ...\n# </stub>\n", 4, "must be a comment"),
        ("x = 1\n# <solution>\nx = 2\n", 2, "not closed"),
        ("# <solution>\n# <stub>\n# %%\n# </stub>\n", 2, "not closed before its cell ends"),
        ("# <solution>\n# </solution>\n", 2, "no marker"),
        ("# <stub >\n", 1, "no marker"),
    ],
)
def test_a_malformed_block_is_named_with_its_line(text: str, line: int, reason: str) -> None:
    with pytest.raises(ToolError, match=rf"x\.py, line {line}: .*{reason}"):
        render(text, solved=False, where="x.py")


def test_ids_come_from_content_and_stay_when_a_cell_is_inserted(tmp_path: Path) -> None:
    source = SOURCE + "\n# %%\nprint(1)\n\n# %%\nprint(1)\n"
    root = make_course(tmp_path, source)
    course = read_course(root)
    first = [cell.id for cell in build.notebook(course, course.lessons[0], False, root).cells]
    assert first == [cell.id for cell in build.notebook(course, course.lessons[0], False, root).cells]
    assert len(set(first)) == len(first)
    make_course(root, source.replace("# %%\nimport json", "# %%\nnew = 1\n\n# %%\nimport json"))
    second = [cell.id for cell in build.notebook(course, course.lessons[0], False, root).cells]
    assert [id for id in second if id in first] == first
    assert len(second) == len(first) + 1


def test_a_built_course_is_in_step_and_holds_nothing_of_this_machine(built: Path) -> None:
    assert build.drift(built) == []
    for path in built.glob("notebooks/**/*.ipynb"):
        text = path.read_text(encoding="utf-8")
        assert str(built) not in text and "papermill" not in text and "duration" not in text
    student = nbformat.read(built / "notebooks/00_toy.ipynb", as_version=4)
    solved = nbformat.read(built / "notebooks/solutions/00_toy.ipynb", as_version=4)
    assert "00.1 not attempted" in student.cells[6].outputs[0].text
    assert "00.1 correct" in solved.cells[6].outputs[0].text
    assert student.cells[0].source.startswith("# 00 · A toy lesson\n")
    assert "github/someone/toy/blob/main/notebooks/00_toy.ipynb" in student.cells[0].source
    assert not (built / "build").exists()  # the results of building a notebook go nowhere


def test_the_readme_keeps_its_own_text_around_the_table(built: Path) -> None:
    text = (built / "README.md").read_text(encoding="utf-8")
    assert text.startswith("# Toy\n\n<!-- lessons -->\n|") and text.endswith("<!-- /lessons -->\n\nThe end.\n")
    assert "| 00 | [A toy lesson](notebooks/00_toy.ipynb) | 5 min | nothing |" in text
    assert "| 01 | Another toy | | | *planned* |" in text


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("notebooks/source/00_toy.py", "print(OUT, SEED)", "print(SEED)", "cell 5 .* source differ"),
        ("notebooks/source/00_toy.py", "# %%\nimport", '# %% tags=["nbval-check-output"]\nimport', "cell 5 .* tags differ"),
        ("notebooks/source/00_toy.py", "## A section", "## Another section", "cell 2 .*Another section.* source differ"),
        ("notebooks/00_toy.ipynb", '"id": "', '"id": "x', "cell 1 .* id differ"),
        (
            "notebooks/00_toy.ipynb",
            '"execution_count": 3',
            '"execution_count": null',
            "import json.* was not executed in its turn",
        ),
        ("notebooks/solutions/00_toy.ipynb", '"executed": "', '"executed": "0', "outputs come from other code"),
        ("notebooks/00_toy.ipynb", '"pygments_lexer"', '"lexer"', "metadata differ"),
        ("notebooks/00_toy.ipynb", "{", "", "missing or no notebook"),
        ("README.md", "A toy lesson", "A lesson", "README.md: the table"),
        ("README.md", "<!-- /lessons -->", "", "README.md needs a line"),
        ("course.toml", "minutes = 5", "minutes = 6", "00_toy.ipynb, cell 1 .* source differ"),
    ],
)
def test_drift_names_the_file_and_the_cell(copy: Path, file: str, old: str, new: str, message: str) -> None:
    edit(copy / file, old, new)
    found = build.drift(copy)
    assert found
    with pytest.raises(AssertionError, match=message):
        raise AssertionError("\n".join(found))


def test_other_outputs_are_no_drift(copy: Path) -> None:
    edit(copy / "notebooks/00_toy.ipynb", "../build/lessons/00 0", "other")
    assert build.drift(copy) == []


def test_a_missing_cell_and_a_stray_file_are_drift(copy: Path) -> None:
    edit(copy / "notebooks/source/00_toy.py", "# %%\nfolder = Path", "# %%\nmore = 1\n\n# %%\nfolder = Path")
    (copy / "notebooks/99_old.ipynb").write_text("{}")
    found = "\n".join(build.drift(copy))
    assert "notebooks/00_toy.ipynb, cell 8 ('more = 1')" in found
    assert "notebooks/99_old.ipynb: no lesson" in found


def test_without_execution_no_old_output_is_carried_over(copy: Path) -> None:
    assert build.main(["--no-execute"], copy) == 0
    assert "outputs" in (copy / "notebooks/00_toy.ipynb").read_text()
    assert "not attempted\\n" not in (copy / "notebooks/00_toy.ipynb").read_text()
    assert any("not executed" in line for line in build.drift(copy))


def test_a_failed_execution_names_the_cell_and_leaves_the_earlier_notebook(
    copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (copy / "notebooks/00_toy.ipynb").read_bytes()
    edit(copy / "notebooks/source/00_toy.py", "print(OUT, SEED)", "print(Path(OUT).resolve())")
    edit(copy / "notebooks/source/00_toy.py", "    # <solution>\n    return", "    # <solution>\n    1 / 0\n    return")
    assert build.main([], copy) == 1
    assert (copy / "notebooks/00_toy.ipynb").read_bytes() == before
    solved, student = capsys.readouterr().err.splitlines()
    assert student.startswith("notebooks/00_toy.ipynb, cell In [3] prints what only this machine has")
    assert "solutions/00_toy.ipynb, cell In [5]" in solved and "ZeroDivisionError: division by zero" in solved


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("import json\n", "from ipywidgets import interact\n", "interact hangs"),
        ("import json\n", "import ipywidgets as w\nout = w.Output()\n", "Output hangs"),
        ("import json\n", "import ipywidgets as w\nw.interactive(print, x=1)\n", "interactive hangs"),
        ("import json\n", "import json (\n", "is no Python"),
        ("SEED: int = 0  # the seed\n", "", "does not declare SEED"),
        ("SEED: int = 0  # the seed", "SEED: int = 0", "SEED has no comment"),
        ("SEED: int = 0", "SEED = 0", "line 2 of the parameters cell must read"),
        ("SEED: int = 0", "SEED: int = 0.5", "the default 0.5 of SEED"),
        ('"embedded"  # [', '"tiny"  # [', "the default 'tiny' of PROFILE"),
        (' tags=["parameters"]', "", "0 cells are tagged 'parameters'"),
        ("check-00.1", "check-00.2", "exercise 00.1 needs one later cell"),
        ('check("00.1"', 'check("00.2"', "exercise 00.1 needs one later cell"),
        ("## A section", "# A title", "the title comes from course.toml"),
        ("## A section", "![](net.png)", "no alt text"),
    ],
)
def test_lint_finds(old: str, new: str, message: str) -> None:
    assert old in SOURCE
    found = lint(SOURCE.replace(old, new, 1), "x.py")
    assert len(found) == 1 and message in found[0], found


def test_lint_allows_words_in_comments_and_magics() -> None:
    assert lint(SOURCE + "\n# %%\n# interactive Output\n# %matplotlib inline\n!ls\n", "x.py") == []


def test_a_source_with_a_fault_is_not_built(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = make_course(tmp_path, SOURCE.replace("check-00.1", "check-00.9"))
    assert build.main([], root) == 1
    assert "exercise 00.1" in capsys.readouterr().err
    assert not (root / "notebooks/00_toy.ipynb").exists()


def test_parameters_are_read_without_running_them() -> None:
    text = '# %% tags=["parameters"]\nN: int = 5  # [5 | 20] läbels\nNAME: str = "é"  # a name\n'
    found = declared(jupytext.reads(text, fmt="py:percent"), "x")
    assert (found["N"].default, found["N"].choices, found["N"].help) == (5, (5, 20), "läbels")
    assert (found["NAME"].default, found["NAME"].choices, found["NAME"].help) == ("é", (), "a name")


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "whole")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ToolError, match=r"a\.txt could not be written .*No space left on device"):
        write_text(path, "more")
    assert path.read_text() == "whole"
    assert list(tmp_path.iterdir()) == [path]


def test_every_notebook_fetches_the_course_where_colab_opens_it_alone(tmp_path: Path) -> None:
    root = make_course(tmp_path)
    course = read_course(root)
    made = build.notebook(course, course.lessons[0], solved=False, root=root)
    code = [cell for cell in made.cells if cell.cell_type == "code"]
    assert "parameters" in code[0].metadata["tags"]
    assert "https://github.com/someone/toy" in code[1].source and 'os.chdir("toy/notebooks")' in code[1].source
    compile(code[1].source, "bootstrap", "exec")
