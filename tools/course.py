"""What the course declares: its lessons (course.toml) and the parameters of each notebook."""

import ast
import difflib
import math
import tempfile
import tomllib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbformat import NotebookNode

from course_utils.paths import ROOT, write_whole

TYPES: dict[str, type] = {"str": str, "int": int, "float": float, "bool": bool}


class ToolError(Exception):
    """Something its reader can put right: shown as one line, without a traceback."""


@dataclass(frozen=True)
class Lesson:
    """One [[lesson]] of course.toml; `minutes` is a learner's time, `seconds` the execution budget."""

    id: str
    name: str
    title: str
    objectives: list[str]
    needs: str
    minutes: int
    seconds: int


@dataclass(frozen=True)
class Course:
    """course.toml as a whole; `planned` holds the (id, title) of lessons not yet written."""

    title: str
    repository: str
    branch: str
    lessons: list[Lesson]
    planned: list[tuple[str, str]]

    def select(self, ids: str | None) -> list[Lesson]:
        """Return the lessons named by "00,02", in the course's order, or all of them; ToolError names an unknown one."""
        known = {lesson.id: lesson for lesson in self.lessons}
        wanted = list(known) if ids is None else [part.strip() for part in ids.split(",") if part.strip()]
        for id in wanted:
            if id not in known:
                raise ToolError(f"no lesson {id!r} in course.toml; there are {', '.join(known)}")
        if not wanted:
            raise ToolError(f"no lesson was named; there are {', '.join(known)}")
        return [lesson for lesson in self.lessons if lesson.id in wanted]


def read_course(root: Path = ROOT) -> Course:
    """Read course.toml under `root`; ToolError where it is missing, is no TOML or lacks a field."""
    try:
        table = tomllib.loads((root / "course.toml").read_text(encoding="utf-8"))
        lessons = [Lesson(**entry) for entry in table.pop("lesson", [])]
        planned = [(entry["id"], entry["title"]) for entry in table.pop("planned", [])]
        return Course(lessons=lessons, planned=planned, **table)
    except (OSError, tomllib.TOMLDecodeError, TypeError, KeyError) as error:
        raise ToolError(f"course.toml cannot be read: {error}") from error


@dataclass(frozen=True)
class Parameter:
    """One annotated assignment of a parameters cell: `LABELS: int = 5  # [5 | 20] labels a class`."""

    name: str
    kind: type
    default: Any
    choices: tuple[Any, ...]
    help: str

    def convert(self, text: str) -> Any:
        """Return `text` as this parameter's type; ToolError where it does not fit the type or the choices."""
        try:
            if self.kind is bool:
                value: Any = {"true": True, "false": False}[text.lower()]
            else:
                value = self.kind(text)
            if self.kind is float and not math.isfinite(value):
                raise ValueError
        except (KeyError, ValueError):
            kind = "true or false" if self.kind is bool else f"of type {self.kind.__name__}"
            raise ToolError(f"{self.name}={text}: the value must be {kind} (the default is {self.default!r})") from None
        if self.choices and value not in self.choices:
            raise ToolError(f"{self.name}={text}: choose one of {', '.join(map(str, self.choices))}{nearest(text, self.choices)}")
        return value


def nearest(word: str, known: Iterable[Any]) -> str:
    """Return "; did you mean X?" for the known word closest to `word`, or nothing."""
    close = difflib.get_close_matches(word.upper(), {str(name).upper(): name for name in known}, n=1, cutoff=0.5)
    originals = {str(name).upper(): name for name in known}
    return f"; did you mean {originals[close[0]]}?" if close else ""


def declared(notebook: NotebookNode, where: str) -> dict[str, Parameter]:
    """Return the parameters of the one cell tagged `parameters`, by name, without running it; ToolError if malformed."""
    cells = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    if len(cells) != 1:
        raise ToolError(f"{where}: {len(cells)} cells are tagged 'parameters'; there must be one")
    lines = cells[0].source.splitlines()
    found: dict[str, Parameter] = {}
    try:
        statements = ast.parse(cells[0].source).body
    except SyntaxError as error:
        raise ToolError(f"{where}: the parameters cell is no Python (its line {error.lineno}: {error.msg})") from error
    for statement in statements:
        line = f"{where}: line {statement.lineno} of the parameters cell"
        match statement:
            case ast.AnnAssign(target=ast.Name(id=name), annotation=ast.Name(id=kind), value=ast.expr() as value) if (
                kind in TYPES
            ):
                pass
            case _:
                raise ToolError(f"{line} must read `NAME: type = value  # comment`, with a type of {', '.join(TYPES)}")
        comment = lines[(statement.end_lineno or 1) - 1].encode()[statement.end_col_offset or 0 :].decode().strip(" #")
        bracket, _, rest = comment[1:].partition("]") if comment.startswith("[") else ("", "", comment)
        free = Parameter(name, TYPES[kind], None, (), rest.strip())
        choices = tuple(free.convert(choice.strip()) for choice in bracket.split("|")) if bracket else ()
        try:
            default = ast.literal_eval(value)
        except ValueError:
            raise ToolError(f"{line}: {name} must be a plain value") from None
        if type(default) is not free.kind or (choices and default not in choices):
            raise ToolError(f"{line}: the default {default!r} of {name} does not fit its own type or choices")
        found[name] = Parameter(name, free.kind, default, choices, free.help)
    return found


def first_line(source: str) -> str:
    """Return the first line of a cell that is not blank, by which a reader finds it again."""
    return next((line.strip() for line in source.splitlines() if line.strip()), "")


def prepare_folder(out: Path) -> None:
    """Make the folder `out` and try to write into it; ToolError where that fails."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ToolError(f"--out {out}: nothing can be written there ({error.strerror}); name another folder") from error


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` whole or not at all, whatever was there staying until then; ToolError if it cannot be done."""
    try:
        write_whole(path, lambda file: file.write(text.encode()))
    except OSError as error:
        reason = error.strerror or error
        raise ToolError(f"{path.name} could not be written to {path.parent}: {reason}. What was there is untouched.") from error
