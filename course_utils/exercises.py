"""Exercises: `check`, `hint` and `solution`. The checks of lesson NN stand in notebooks/checks/NN.py."""

import runpy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import nbformat
import numpy as np
import torch

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


def number(found: Any, nudge: str = "") -> float:
    """An answer as one number, also from a tensor or array of one. Raises `NotYet` for others, with the nudge for several."""
    try:
        return float((found.item() if hasattr(found, "item") else found) + 0.0)  # + 0.0: a str is no number
    except (TypeError, ValueError, RuntimeError):
        several = f" of shape {tuple(found.shape)}{nudge}" if getattr(found, "shape", ()) else ""
        raise NotYet(f"{'one' if several else 'a'} number is expected, not {type(found).__name__}{several}") from None


def indices(found: Any, below: int, size: int | None = None, of: str = "pictures") -> list[int]:
    """An answer as indices of things named `of`, in [0, below); `size` of them if that is given. Raises `NotYet` for others."""
    try:
        values = np.asarray(found.detach().cpu() if isinstance(found, torch.Tensor) else found)
    except (TypeError, ValueError, RuntimeError):
        raise NotYet(f"one list of indices is expected, and this {type(found).__name__} is none") from None
    if values.size and values.dtype.kind not in "iu":
        got = "a mask: mask.nonzero().flatten() has them" if values.dtype == bool else f"{type(found).__name__} of {values.dtype}"
        raise NotYet(f"indices are expected, whole numbers, not {got}")
    if values.ndim != 1 or size not in (None, len(values)):
        raise NotYet(f"one row of indices is expected, shape ({size or 'count'},), and you gave shape {values.shape}")
    if values.size and (values.min() < 0 or values.max() >= below):
        raise NotYet(f"with {below} {of}, indices lie between 0 and {below - 1}; you gave {values.tolist()}")
    return values.tolist()


def values_of(found: Any, what: str) -> torch.Tensor:
    """An answer as a tensor of float64, on the CPU, of any shape. Raises `NotYet`, which calls it `what`, for others."""
    try:
        values = found.detach().cpu() if isinstance(found, torch.Tensor) else torch.as_tensor(np.asarray(found))
        return values.double()
    except (TypeError, ValueError, RuntimeError):
        raise NotYet(f"{what} is expected, a tensor, not {type(found).__name__}") from None


def near(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-3) -> bool:
    """Whether an answer, as `values_of` gives it, has the shape of `expected` and its values."""
    return found.shape == expected.shape and torch.allclose(found, expected.double(), rtol=tolerance, atol=tolerance)


def apart(values: list[float], gap: float = 1e-4) -> bool:
    """Whether no two of the values are as close as `gap`, so that an answer can be told by its value."""
    return bool(np.diff(sorted(values)).min() > gap)


def grade(exercise: str, answer: Any) -> Outcome:
    """The outcome of one exercise, such as "00.1". Raises `KeyError` for an exercise that does not exist."""
    try:
        if answer is ...:
            raise NotAttempted
        _find(exercise).check(answer)
    except NotAttempted:
        advice = f'replace the dots in the cell above, run it, and run this cell again; hint("{exercise}") helps.'
        return Outcome(NOT_ATTEMPTED, advice)
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
    return runpy.run_path(str(path))["EXERCISES"]


def _find(exercise: str) -> Exercise:
    exercises = checks_of(exercise[:2])
    if exercise not in exercises:
        raise KeyError(f"no exercise {exercise!r}; lesson {exercise[:2]} has {', '.join(exercises)}")
    return exercises[exercise]
