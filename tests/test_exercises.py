"""The engine of the exercises, and every check against answers that are right, wrong and missing."""

import pytest
import torch

from course_utils.exercises import CORRECT, NOT_ATTEMPTED, NOT_YET, check, checks_of, grade, hint, solution

RIGHT = {
    "00.1": lambda logits, labels: (logits.argmax(dim=1) == labels).float().mean().item(),
    "00.2": lambda s, t: (t - s) / (1 - s) if s < 1 else float("nan"),
}
# exercise: [(a plausible wrong answer, a word of the reason that must help)]
WRONG = {
    "00.1": [
        (lambda logits, labels: 0.9, "you gave 0.900"),
        (lambda logits, labels: (logits.argmax(dim=1) == labels).sum().item(), "divide by the number"),
        (lambda logits, labels: 100 * (logits.argmax(dim=1) == labels).float().mean().item(), "per cent"),
        (lambda logits, labels: (logits.argmax(dim=1) != labels).float().mean().item(), "share of errors"),
        (lambda logits, labels: (logits.argmin(dim=1) == labels).float().mean().item(), "you gave"),
        (lambda logits, labels: logits.argmax(dim=1) == labels, "one number is expected"),
        (lambda logits, labels: (logits.argmax(dim=0) == labels).float().mean().item(), "stopped with RuntimeError"),
        (lambda logits, labels: "0.9 or so", "a number is expected, not str"),
        (0.9, "a function is expected here, not float"),
    ],
    "00.2": [
        (lambda s, t: 0.2, "you gave 0.200"),
        (lambda s, t: t - s, "gain in accuracy"),
        (lambda s, t: (s - t) / (1 - s), "sign is turned round"),
        (lambda s, t: (t - s) / s, "divided by the accuracy"),
        (lambda s, t: (t - s) / (1 - s), "ZeroDivisionError"),
        (lambda s, t: max(0.0, (t - s) / (1 - s)), "harm"),
        (lambda s, t: (t - s) / (1 - s) if s < 1 else 0.0, "no errors to remove"),
        (lambda s, t: None, "a number is expected, not NoneType"),
    ],
}


def test_every_exercise_has_its_answers_here():
    assert set(checks_of("00")) == set(RIGHT) == set(WRONG)


@pytest.mark.parametrize("exercise", RIGHT)
def test_a_right_answer_is_correct(exercise):
    for _ in range(20):
        assert grade(exercise, RIGHT[exercise]).status == CORRECT


def test_an_answer_as_a_tensor_is_a_number_too():
    assert grade("00.1", lambda logits, labels: (logits.argmax(dim=1) == labels).float().mean()).status == CORRECT


@pytest.mark.parametrize(("exercise", "answer", "reason"), [(id, *case) for id, cases in WRONG.items() for case in cases])
def test_a_wrong_answer_is_not_yet_correct_and_learns_why(exercise, answer, reason):
    for seed in range(20):
        torch.manual_seed(seed)
        outcome = grade(exercise, answer)
        assert outcome.status == NOT_YET
    assert reason in outcome.message


@pytest.mark.parametrize("exercise", RIGHT)
@pytest.mark.parametrize("stub", [..., lambda *arguments: ...])
def test_a_stub_is_not_attempted(exercise, stub):
    outcome = grade(exercise, stub)
    assert outcome.status == NOT_ATTEMPTED and f'hint("{exercise}")' in outcome.message


def test_check_prints_one_line(capsys):
    check("00.2", RIGHT["00.2"])
    check("00.2", lambda s, t: 0.2)
    check("00.2", ...)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["✓ 00.2", "✗ 00.2", "… 00.2"]


@pytest.mark.parametrize("exercise", RIGHT)
def test_a_hint_is_not_the_solution_and_the_solution_is_right(exercise, capsys):
    hint(exercise)
    nudge = capsys.readouterr().out
    solution(exercise)
    code = capsys.readouterr().out
    assert len(nudge) > 20 and "return" not in nudge and "<stub>" not in code
    names: dict = {}
    exec(code, names)
    function = next(value for name, value in names.items() if not name.startswith("__"))
    assert grade(exercise, function).status == CORRECT


def test_an_exercise_that_does_not_exist_is_named():
    with pytest.raises(KeyError, match=r"no exercise '00\.9'; lesson 00 has 00\.1, 00\.2"):
        check("00.9", 1)
    with pytest.raises(KeyError, match="no exercises for lesson '77'"):
        check("77.1", 1)
