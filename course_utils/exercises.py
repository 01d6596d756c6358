"""Exercises: `check`, `hint` and `solution`. The checks of lesson NN stand in notebooks/checks/NN.py."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import nbformat

from course_utils.paths import NOTEBOOKS

CORRECT, NOT_YET, NOT_ATTEMPTED = "correct", "not yet", "not attempted"


class NotYet(Exception):
    """Raised by a check: the answer is wrong, and why."""


class NotAttempted(Exception):
    """Raised by a check: the stub is still there."""


@dataclass(frozen=True)
class Exercise:
    """A check, which raises `NotYet` for a wrong answer and returns for a correct one, and a hint."""

    check: Callable[[Any], None]
    hint: str


@dataclass(frozen=True)
class Outcome:
    """What a check found: `status` is one of the three, `message` helps on."""

    status: str
    message: str


def call(function: Any, *arguments: Any) -> Any:
    """What the learner's own function returns. Raises `NotAttempted` for a stub, `NotYet` where it fails."""
    if function is ...:
        raise NotAttempted
    if not callable(function):
        raise NotYet(f"a function is expected here, not {type(function).__name__}")
    try:
        result = function(*arguments)
    except Exception as error:
        raise NotYet(f"your function stopped with {type(error).__name__}: {error}") from error
    if result is ...:
        raise NotAttempted
    return result


def grade(exercise: str, answer: Any) -> Outcome:
    """The outcome of one exercise, such as "00.1". Raises `KeyError` for an exercise that does not exist."""
    try:
        if answer is ...:
            raise NotAttempted
        _find(exercise).check(answer)
    except NotAttempted:
        return Outcome(
            NOT_ATTEMPTED, f'replace the dots in the cell above, run it, and run this cell again; hint("{exercise}") helps.'
        )
    except NotYet as reason:
        return Outcome(NOT_YET, str(reason))
    return Outcome(CORRECT, "")


def check(exercise: str, answer: Any) -> None:
    """Print whether an answer is correct, not yet correct (and why), or not attempted."""
    outcome = grade(exercise, answer)
    sign = {CORRECT: "✓", NOT_YET: "✗", NOT_ATTEMPTED: "…"}[outcome.status]
    print(f"{sign} {exercise}: {outcome.status}" + (f": {outcome.message}" if outcome.message else ""))


def hint(exercise: str) -> None:
    """Print a nudge in the right direction."""
    print(_find(exercise).hint)


def solution(exercise: str) -> None:
    """Print one solution: the cell of the solved notebook."""
    _find(exercise)
    (path,) = (NOTEBOOKS / "solutions").glob(f"{exercise[:2]}_*.ipynb")
    for cell in nbformat.read(path, as_version=4).cells:
        if f"exercise-{exercise}" in cell.metadata.get("tags", []):
            print(cell.source)


def checks_of(lesson: str) -> dict[str, Exercise]:
    """The exercises of lesson "NN", by their numbers. Raises `KeyError` for a lesson without any."""
    path = NOTEBOOKS / "checks" / f"{lesson}.py"
    if not path.exists():
        raise KeyError(f"there are no exercises for lesson {lesson!r}")
    spec = importlib.util.spec_from_file_location(f"checks_{lesson}", path)
    assert spec is not None and spec.loader is not None
    module: ModuleType = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.EXERCISES


def _find(exercise: str) -> Exercise:
    exercises = checks_of(exercise[:2])
    if exercise not in exercises:
        raise KeyError(f"no exercise {exercise!r}; lesson {exercise[:2]} has {', '.join(exercises)}")
    return exercises[exercise]
