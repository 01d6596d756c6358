"""Execute lessons with parameters of one's own; write the executed notebooks, their HTML and one report.html."""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import nbformat
from nbconvert import HTMLExporter
from nbformat import NotebookNode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python tools/run.py` finds its neighbours from any folder
from tools.course import ROOT, Lesson, Parameter, ToolError, declared, nearest, prepare_folder, read_course, write_text
from tools.engine import execute

PACKAGES = ("torch", "torchvision", "numpy", "pandas", "scikit-learn", "papermill")


@dataclass
class Job:
    """A lesson about to be executed: its notebook and the parameters it is given."""

    lesson: Lesson
    notebook: NotebookNode
    parameters: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def plan(root: Path, lessons: str | None, settings: list[str], solutions: bool = False) -> list[Job]:
    """Check every "NAME=VALUE" against what the notebooks declare, before any is run; ToolError says what does not fit."""
    folder = root / "notebooks" / ("solutions" if solutions else "")
    wanted: dict[str, str] = {}
    for setting in settings:
        name, sign, value = setting.partition("=")
        if not sign or not name.strip():
            raise ToolError(f"--set {setting}: write NAME=VALUE, such as SEED=7")
        if name.strip() == "OUT":
            raise ToolError(f"--set {setting}: where results go is set with --out")
        wanted[name.strip()] = value.strip()
    jobs: list[Job] = []
    known: dict[str, Parameter] = {}
    for lesson in read_course(root).select(lessons):
        path = folder / f"{lesson.name}.ipynb"
        try:
            notebook = nbformat.read(path, as_version=4)
        except (OSError, nbformat.reader.NotJSONError) as error:
            raise ToolError(f"{path.relative_to(root).as_posix()} cannot be read: make it with `make notebooks`") from error
        parameters = declared(notebook, path.name)
        known |= parameters
        given = {name: parameters[name].convert(value) for name, value in wanted.items() if name in parameters}
        left_out = [f"{name} is no parameter of {lesson.name}: left out there" for name in wanted if name not in parameters]
        jobs.append(Job(lesson, notebook, given, left_out))
    for name in wanted:
        if name not in known:
            raise ToolError(f"no selected lesson has a parameter {name}{nearest(name, known)}; there are {', '.join(known)}")
    return jobs


@contextmanager
def fresh_evidence(folder: Path) -> Iterator[list[bool]]:
    """Give a run an empty evidence folder; at its end keep its records if it set `good[0]`, or else put the earlier ones back."""
    new, earlier, good = folder / "evidence", folder / "evidence.earlier", [False]
    if earlier.exists():  # a run was cut off: what it had begun is worth less than what was whole before
        shutil.rmtree(new, ignore_errors=True)
    elif new.exists():
        new.rename(earlier)
    try:
        yield good
    finally:
        if earlier.exists() and good[0]:
            shutil.rmtree(earlier)
        elif earlier.exists():
            shutil.rmtree(new, ignore_errors=True)
            earlier.rename(new)


def read_claims(folder: Path, lesson: str) -> list[dict[str, Any]]:
    """Return the records in folder/evidence/*.json, each with its lesson; ToolError where a file holds none."""
    claims = []
    for path in sorted((folder / "evidence").glob("*.json")):
        try:
            claims += [
                {**record, "lesson": lesson, "holds": record["holds"] is True} for record in json.loads(path.read_text("utf-8"))
            ]
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise ToolError(f"evidence/{path.name} holds no list of claims") from error
    return claims


def run_lesson(job: Job, root: Path, out: Path, timeout: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Execute one lesson and write its notebook and page; return its row of the report and its claims."""
    name, results, folder = job.lesson.name, out / job.lesson.id, root / "notebooks"
    inside = results.is_relative_to(root)  # then what a lesson prints is the same wherever the course stands
    job.parameters["OUT"] = Path(os.path.relpath(results, folder)).as_posix() if inside else str(results)
    claims: list[dict[str, Any]] = []
    with fresh_evidence(results) as good:
        outcome = execute(job.notebook, folder, job.parameters, timeout)
        error = outcome.error
        try:
            claims = read_claims(results, job.lesson.id)
        except ToolError as problem:
            error = error or str(problem)
        stem = f"{name}.failed" if error else name
        write_text(out / f"{stem}.ipynb", nbformat.writes(outcome.notebook) + "\n")
        write_text(out / f"{stem}.html", page(outcome.notebook, name))
        good[0] = not error
    if not error:
        for old in out.glob(f"{name}.failed.*"):
            old.unlink()
    row = {"id": job.lesson.id, "title": job.lesson.title, "page": f"{stem}.html", "error": error, "seconds": outcome.seconds}
    return {**row, "budget": job.lesson.seconds, "memory": outcome.memory, "parameters": job.parameters}, claims


def page(notebook: NotebookNode, title: str) -> str:
    """Return a notebook as HTML with its pictures inside and without the script that only live widgets need."""
    html, _ = HTMLExporter(embed_images=True, require_js_url="data:,").from_notebook_node(notebook, {"metadata": {"name": title}})
    return str(html)


def short(value: Any) -> str:
    """Return a number with three significant digits, anything else as a dash."""
    return f"{value:.3g}" if isinstance(value, int | float) and not isinstance(value, bool) else "–"


def report(title: str, rows: list[dict[str, Any]], claims: list[dict[str, Any]]) -> str:
    """Return the report as one HTML page that needs no other file; everything the lessons wrote is escaped."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, loader=jinja2.FileSystemLoader(Path(__file__).parent))
    environment.filters["short"] = short
    versions = {"Python": platform.python_version(), platform.system(): platform.release()}
    installed = {distribution.name: distribution.version for distribution in importlib.metadata.distributions()}
    versions |= {package: installed[package] for package in PACKAGES if package in installed}
    date = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    return environment.get_template("report.html").render(title=title, lessons=rows, claims=claims, versions=versions, date=date)


def run(jobs: list[Job], root: Path, out: Path, timeout: int) -> int:
    """Execute the jobs one by one, a line of progress each, and write the report; return the number of failed lessons."""
    rows, claims = [], []
    for job in jobs:
        for note in job.notes:
            print(note)
        print(f"{job.lesson.name}: ", end="", flush=True)
        row, new = run_lesson(job, root, out, timeout)
        rows.append(row)
        claims += new
        over = " (over)" if row["seconds"] > row["budget"] else ""
        held = sum(claim["holds"] for claim in new)
        numbers = f"{row['seconds']:.0f} s of {row['budget']}{over}, {row['memory']} MB, {held} of {len(new)} claims hold"
        print(f"failed, {row['error']}" if row["error"] else numbers, flush=True)
        write_text(out / "report.html", report(read_course(root).title, rows, claims))
    print(f"Report: {(out.relative_to(Path.cwd()) if out.is_relative_to(Path.cwd()) else out) / 'report.html'}")
    return sum(row["error"] is not None for row in rows)


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    """Run the command line; return 0, 1 where a lesson failed, 2 where nothing could be started."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--lessons", help="such as 00,02; all where left out")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="a parameter; repeat for more")
    parser.add_argument("--profile", help="the same as --set PROFILE=...")
    parser.add_argument("--out", type=Path, default=root / "build", help="where everything is written (default: build)")
    parser.add_argument("--solutions", action="store_true", help="execute the solved notebooks")
    parser.add_argument("--cell-timeout", type=int, default=600, help="seconds after which a cell is ended (default: 600)")
    options = parser.parse_args(argv)
    settings = options.set + ([f"PROFILE={options.profile}"] if options.profile else [])
    out, code = options.out.expanduser().resolve(), 2
    try:
        if options.cell_timeout < 1:
            raise ToolError("--cell-timeout must be 1 second or more")
        jobs = plan(root, options.lessons, settings, options.solutions)
        prepare_folder(out)
        code = 1
        return 1 if run(jobs, root, out, options.cell_timeout) else 0
    except (ToolError, OSError) as error:
        if code == 1:
            print(flush=True)  # end the line of progress
        print(f"{'' if isinstance(error, ToolError) else 'stopped: '}{error}", file=sys.stderr)
        return code
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
