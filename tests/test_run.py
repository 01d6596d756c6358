"""The workshop's second half: lessons executed with parameters that were checked, and one report."""

import json
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from tests.toy_course import COURSE, SOURCE, make_course
from tools import build, engine, run
from tools.course import ToolError


@pytest.fixture(scope="module")
def course(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy course whose notebooks are made but not executed; two lessons, the second with a parameter of its own."""
    second = COURSE.split("[[planned]]")[0].split("[[lesson]]")[1].replace("00", "01", 2).replace("_toy", "_other")
    root = make_course(tmp_path_factory.mktemp("course"))
    (root / "course.toml").write_text(COURSE.split("[[planned]]")[0] + f"[[lesson]]{second}")
    other = SOURCE.replace("FLIP: bool", "LABELS: int = 5  # [5 | 20] labels a class\nFLIP: bool").replace("00.1", "01.1")
    other = other.replace("print(OUT, SEED)", "if SEED == 1:\n    while True:\n        pass")
    (root / "notebooks/source/01_other.py").write_text(other)
    assert build.build(root, run=False) == []
    return root


@pytest.fixture(scope="module")
def finished(course: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first lesson, executed with SEED=7, under which its claim does not hold."""
    out = tmp_path_factory.mktemp("out")
    assert run.main(["--lessons", "00", "--set", "SEED=7", "--set", "FLIP=True", "--out", str(out)], course) == 0
    return out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--set", "SEDE=7"], "no selected lesson has a parameter SEDE; did you mean SEED?"),
        (["--set", "LABELS=5", "--lessons", "00"], "no selected lesson has a parameter LABELS; there are PROFILE, SEED"),
        (["--set", "SEED=seven"], "SEED=seven: the value must be of type int (the default is 0)"),
        (["--set", "SEED=7.5"], "SEED=7.5: the value must be of type int"),
        (["--set", "RATE=nan"], "RATE=nan: the value must be of type float"),
        (["--set", "FLIP=yes"], "FLIP=yes: the value must be true or false"),
        (["--set", "LABELS=6"], "LABELS=6: choose one of 5, 20"),
        (["--profile", "imagent"], "PROFILE=imagent: choose one of embedded, imagenet; did you mean imagenet?"),
        (["--set", "SEED"], "--set SEED: write NAME=VALUE"),
        (["--set", "OUT=x"], "--set OUT=x: where results go is set with --out"),
        (["--lessons", "00,09"], "no lesson '09' in course.toml; there are 00, 01"),
        (["--lessons", ","], "no lesson was named"),
        (["--cell-timeout", "0"], "--cell-timeout must be 1 second or more"),
        (["--solutions", "--out", "course.toml/x"], "nothing can be written there"),
    ],
)
def test_a_wrong_argument_is_one_line_before_anything_runs(
    course: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    monkeypatch.chdir(course)
    monkeypatch.setattr(run, "execute", lambda *_: pytest.fail("a notebook was executed"))
    assert run.main(arguments, course) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (course / "build").exists()


def test_a_notebook_that_is_missing_or_broken_is_one_line(course: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = course / "notebooks/00_toy.ipynb"
    text = path.read_text()
    for content in ("{", None):
        path.write_text(content) if content else path.unlink()
        assert run.main([], course) == 2
        assert capsys.readouterr().err == "notebooks/00_toy.ipynb cannot be read: make it with `make notebooks`\n"
    path.write_text(text)


def test_each_lesson_gets_the_parameters_that_it_declares(course: Path) -> None:
    first, second = run.plan(course, None, ["LABELS=20", "SEED=3", "FLIP=true", "RATE=1"])
    assert first.parameters == {"SEED": 3, "FLIP": True, "RATE": 1.0}
    assert second.parameters == {"LABELS": 20, "SEED": 3, "FLIP": True, "RATE": 1.0}
    assert first.notes == ["LABELS is no parameter of 00_toy: left out there"] and not second.notes


def test_a_run_writes_the_notebook_its_page_and_its_evidence(finished: Path) -> None:
    executed = nbformat.read(finished / "00_toy.ipynb", as_version=4)
    injected = next(cell for cell in executed.cells if "injected-parameters" in cell.metadata.get("tags", []))
    assert "SEED = 7" in injected.source and "FLIP = True" in injected.source
    assert "papermill" not in executed.metadata
    assert "A toy lesson" in (finished / "00_toy.html").read_text()
    assert json.loads((finished / "00/evidence/00_toy.json").read_text())[0]["seeds"] == [7]
    assert sorted(path.name for path in finished.iterdir()) == ["00", "00_toy.html", "00_toy.ipynb", "report.html"]


def test_the_report_shows_claims_escaped_and_the_one_that_fails(finished: Path) -> None:
    html = (finished / "report.html").read_text()
    assert "seven &lt;b&gt;beats&lt;/b&gt; the seed" in html and "<b>beats" not in html
    assert "does not hold" in html and "0 of 1 claims hold" in html and "1 of 1 lessons ran" in html
    assert "1.25 to 9" in html and "<code>low &gt; 0</code>" in html
    assert 'href="00_toy.html"' in html and "SEED=7" in html and "papermill" in html
    assert "http" not in html  # it needs no other file


def test_two_runs_give_the_same_notebook(course: Path, finished: Path, tmp_path: Path) -> None:
    assert run.main(["--lessons", "00", "--set", "SEED=7", "--set", "FLIP=true", "--out", str(tmp_path)], course) == 0
    one, two = (folder.joinpath("00_toy.ipynb").read_text() for folder in (finished, tmp_path))
    assert one.replace(str(finished), "") == two.replace(str(tmp_path), "")


def test_a_slow_cell_is_ended_and_named_and_the_next_lesson_and_earlier_results_stand(
    course: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in ("01_other.ipynb", "01_other.html", "01/evidence/x.json"):
        (tmp_path / file).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / file).write_text("earlier")
    both = run.plan(course, None, ["SEED=1"])[::-1]  # the slow lesson first
    assert run.run(both, course, tmp_path, timeout=2) == 1
    printed = capsys.readouterr().out
    assert "01_other: failed, cell In [4] 'import json': CellTimeout: the cell was ended after 2 s" in printed
    assert "1 of 1 claims hold" in printed  # the lesson after it
    for file in ("01_other.ipynb", "01_other.html", "01/evidence/x.json"):
        assert (tmp_path / file).read_text() == "earlier"
    failed = nbformat.read(tmp_path / "01_other.failed.ipynb", as_version=4)
    assert "CellTimeout" in str([cell.get("outputs") for cell in failed.cells])
    html = (tmp_path / "report.html").read_text()
    assert "1 of 2 lessons ran" in html and "CellTimeout" in html and 'href="01_other.failed.html"' in html


class Executed:
    """Stands in for the engine: writes what a lesson would, without a kernel."""

    def __init__(self, records: Any, error: str | None = None, seconds: float = 1.0) -> None:
        self.records, self.error, self.seconds = records, error, seconds

    def __call__(self, notebook: Any, folder: Path, parameters: dict[str, Any], timeout: int) -> engine.Outcome:
        evidence = Path(folder, parameters["OUT"], "evidence")
        evidence.mkdir(parents=True)
        (evidence / "00_toy.json").write_text(json.dumps(self.records))
        return engine.Outcome(notebook, self.error, self.seconds, 100)


RECORD = {"claim": "new", "value": 1, "low": None, "high": None, "n": 1, "unit": "", "rule": "", "origin": "live", "holds": True}


def test_only_records_of_this_run_are_kept_and_a_failure_brings_the_earlier_ones_back(
    course: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evidence = tmp_path / "00/evidence"
    jobs = run.plan(course, "00", [])
    monkeypatch.setattr(run, "execute", Executed([RECORD]))
    assert run.run(jobs, course, tmp_path, 1) == 0
    (evidence / "stale.json").write_text("[]")
    assert run.run(jobs, course, tmp_path, 1) == 0
    assert [path.name for path in evidence.iterdir()] == ["00_toy.json"]
    monkeypatch.setattr(run, "execute", Executed([{**RECORD, "claim": "half"}], error="cell In [3]: boom"))
    assert run.run(jobs, course, tmp_path, 1) == 1
    assert "boom" in (tmp_path / "report.html").read_text() and "half" in (tmp_path / "report.html").read_text()
    assert json.loads((evidence / "00_toy.json").read_text()) == [RECORD]
    monkeypatch.setattr(run, "execute", Executed({"no": "list"}))
    assert run.run(jobs, course, tmp_path, 1) == 1
    assert "evidence/00_toy.json holds no list of claims" in (tmp_path / "report.html").read_text()
    assert (tmp_path / "00_toy.failed.ipynb").exists()
    monkeypatch.setattr(run, "execute", Executed([RECORD], seconds=61))
    assert run.run(jobs, course, tmp_path, 1) == 0
    assert "over budget" in (tmp_path / "report.html").read_text()
    assert not list(tmp_path.glob("*.failed.*"))


def test_a_full_disk_stops_the_run_with_one_line(
    course: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, text: str) -> None:
        raise ToolError(f"{path.name} could not be written")

    monkeypatch.setattr(run, "execute", Executed([RECORD]))
    monkeypatch.setattr(run, "write_text", full)
    assert run.main(["--lessons", "00", "--out", str(tmp_path)], course) == 1
    assert capsys.readouterr().err == "00_toy.ipynb could not be written\n"


def test_what_changes_from_run_to_run_is_dropped() -> None:
    widget = new_output("display_data", {engine.WIDGET: {"model_id": "1"}, "text/plain": "FloatProgress(0)"})
    picture = new_output("display_data", {engine.WIDGET: {"model_id": "1"}, "image/png": "aa", "text/plain": "HBox()"})
    plain = new_output("stream", text="42\n")
    cell = new_code_cell("1", outputs=[widget, picture, plain], metadata={"tags": [], "execution": {"a": "1"}, "papermill": {}})
    cleaned = engine.clean(new_notebook(cells=[cell], metadata={"papermill": {}, "widgets": {}}))
    assert cleaned.metadata == engine.METADATA and cleaned.cells[0].metadata == {}
    assert cleaned.cells[0].outputs == [new_output("display_data", {"image/png": "aa"}), plain]
