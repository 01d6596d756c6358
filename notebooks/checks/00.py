"""Checks of lesson 00."""

import math
import random

import torch

from course_utils.exercises import Exercise, NotYet, call


def accuracy(answer) -> None:
    for _ in range(5):
        count, classes = random.randint(20, 60), random.randint(3, 9)
        logits = torch.randn(count, classes)
        labels = torch.where(torch.rand(count) < random.random(), logits.argmax(dim=1), torch.randint(classes, (count,)))
        labels[:3] = logits.argmax(dim=1)[:3]
        labels[3:13] = (logits.argmax(dim=1)[3:13] + 1) % classes  # so that no trivial answer is right by chance
        expected = int((logits.argmax(dim=1) == labels).sum()) / count
        if math.isclose(expected, 0.5):
            continue  # where right and wrong cannot be told apart
        found = call(answer, logits, labels)
        if isinstance(found, torch.Tensor) and found.numel() != 1:
            raise NotYet(f"one number is expected, not a tensor of shape {tuple(found.shape)}: average over the pictures")
        try:
            value = float(found)
        except (TypeError, ValueError):
            raise NotYet(f"a number is expected, not {type(found).__name__}") from None
        if math.isclose(value, expected, abs_tol=1e-5):
            continue
        if math.isclose(value, expected * count, abs_tol=1e-3):
            raise NotYet("that is how many are right; divide by the number of pictures")
        if math.isclose(value, expected * 100, abs_tol=1e-2):
            raise NotYet("that is in per cent; a share lies between 0 and 1")
        if math.isclose(value, 1 - expected, abs_tol=1e-5):
            raise NotYet("that is the share of errors; accuracy is the share that is right")
        raise NotYet(f"for {count} pictures of which {round(expected * count)} are right, you gave {value:.3f}")


def errors_removed(answer) -> None:
    pairs = [(random.uniform(0.2, 0.9), random.uniform(0.2, 0.95)) for _ in range(5)]
    for scratch, transferred in [*pairs, (0.5, 0.5), (0.8, 0.7)]:
        expected = (transferred - scratch) / (1 - scratch)
        found = call(answer, scratch, transferred)
        if not isinstance(found, int | float):
            raise NotYet(f"a number is expected, not {type(found).__name__}")
        if math.isclose(found, expected, abs_tol=1e-6):
            continue
        said = f"for {scratch:.3f} and {transferred:.3f} you gave {found:.3f}"
        if math.isclose(found, transferred - scratch, abs_tol=1e-6):
            raise NotYet(f"{said}: that is the gain in accuracy; divide it by the errors that there were")
        if math.isclose(found, -expected, abs_tol=1e-6):
            raise NotYet(f"{said}: the sign is turned round; errors removed are positive when transfer helps")
        if math.isclose(found, (transferred - scratch) / scratch, abs_tol=1e-6):
            raise NotYet(f"{said}: you divided by the accuracy; divide by the errors, 1 - accuracy")
        if expected < 0 and found == 0:
            raise NotYet(f"{said}: transfer did harm there; let the share be negative")
        raise NotYet(said)
    if not math.isnan(call(answer, 1.0, 0.9)):
        raise NotYet('with a from-scratch accuracy of 1.0 there are no errors to remove; return float("nan")')


EXERCISES = {
    "00.1": Exercise(accuracy, "logits.argmax(dim=1) gives the class of the largest logit of each row; compare it with labels."),
    "00.2": Exercise(errors_removed, "The errors from scratch are 1 - scratch_accuracy. What share of them did transfer remove?"),
}
