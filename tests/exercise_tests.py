"""What holds of every exercise. A module with the answers to a lesson's exercises imports these tests.

The module has RIGHT, answers by exercise, and WRONG, pairs of an answer and a part of the reason that it is given. REPEATS, five
if it has none, says how often each right answer is tried, on inputs drawn anew.
"""

import random

import numpy as np
import pytest
import torch

from course_utils.exercises import CORRECT, NOT_ATTEMPTED, NOT_YET, checks_of, grade, hint

__all__ = [
    "each",
    "pytest_generate_tests",
    "test_a_hint_is_no_solution",
    "test_a_right_answer_is_correct",
    "test_a_stub_is_not_attempted",
    "test_a_wrong_answer_is_not_yet_correct_and_learns_why",
    "test_every_exercise_of_the_lesson_has_its_answers_here",
]


def each(answers):
    return [pytest.param(id, answer, id=f"{id}-{n}") for id, found in answers.items() for n, answer in enumerate(found)]


def seed_all(seed):
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def pytest_generate_tests(metafunc):
    module, names = metafunc.module, metafunc.fixturenames
    if "right" in names:
        metafunc.parametrize(("exercise", "right"), each(module.RIGHT))
    elif "wrong" in names:
        metafunc.parametrize(("exercise", "wrong"), each(module.WRONG))
    elif "any_exercise" in names:
        metafunc.parametrize("any_exercise", module.RIGHT)


def test_every_exercise_of_the_lesson_has_its_answers_here(request):
    lesson = request.module.__name__[-2:]
    assert set(checks_of(lesson)) == set(request.module.RIGHT) == set(request.module.WRONG)
    assert min(len(cases) for cases in request.module.WRONG.values()) >= 3


def test_a_right_answer_is_correct(request, exercise, right):
    for seed in range(getattr(request.module, "REPEATS", 5)):
        seed_all(seed)
        outcome = grade(exercise, right)
        assert outcome.status == CORRECT, outcome.message


def test_a_wrong_answer_is_not_yet_correct_and_learns_why(exercise, wrong):
    answer, reason = wrong
    for seed in range(5):
        seed_all(seed)
        outcome = grade(exercise, answer)
        assert outcome.status == NOT_YET
        assert reason in outcome.message


def test_a_stub_is_not_attempted(any_exercise):
    for stub in (..., lambda *arguments: ...):
        outcome = grade(any_exercise, stub)
        assert outcome.status == NOT_ATTEMPTED and f'hint("{any_exercise}")' in outcome.message


def test_a_hint_is_no_solution(any_exercise, capsys):
    hint(any_exercise)
    nudge = capsys.readouterr().out
    assert len(nudge) > 20 and "return" not in nudge
