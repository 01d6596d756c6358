"""Checks of lesson 07."""

import math
import random

import numpy as np
import torch
import torch.nn.functional as F

from course_utils.exercises import Exercise, NotYet, apart, call, near, number, values_of


def pair_of(found, first: str, second: str) -> list[torch.Tensor]:
    """An answer that holds two tensors."""
    if not isinstance(found, tuple | list) or len(found) != 2:
        raise NotYet(f"two things are expected, {first} and {second}, not {type(found).__name__}")
    return [values_of(part, name) for part, name in zip(found, (first, second), strict=True)]


def reason_for(found: float, mistakes: dict[str, float], tolerance: float = 1e-4) -> str | None:
    """What went wrong, told by the value that it gives."""
    for reason, value in mistakes.items():
        if math.isclose(found, value, rel_tol=tolerance, abs_tol=tolerance):
            return reason
    return None


def unchanged(given, kept, what: str) -> None:
    if not all(torch.equal(mine, its) for mine, its in zip(given, kept, strict=True)):
        raise NotYet(f"your function changed {what} themselves, and whoever gave them needs them; make new tensors")


def blocks(known, asked, by_source=True, deviation="own", correction=0, root=True) -> list[torch.Tensor]:
    """Both sides as the exercise asks, or with one mistake."""
    sides: list[list[torch.Tensor]] = [[], []]
    for source, other in zip(known, asked, strict=True):
        for side, table in zip(sides, (source, other), strict=True):
            by = table if deviation == "each" else torch.cat([source, other]) if deviation == "both" else source
            mean, spread = by.mean(dim=0), by.std(dim=0, correction=correction)
            if not by_source:
                mean, spread = by.mean(), by.std(correction=correction)
            width = source.shape[1]
            side.append((table - mean) / spread / (width**0.5 if root is True else width if root == "width" else 1))
    return [torch.cat(side, dim=1) for side in sides]


def concatenate(answer) -> None:
    for sources in (2, 3, 1):
        n, m = random.randint(20, 30), random.randint(8, 15)
        widths = random.sample(range(2, 9), sources)
        known, asked = [], []
        for width in widths:
            scale, centre = 10 ** torch.empty(width).uniform_(-1, 2), torch.empty(width).uniform_(-3, 3)
            known.append(torch.randn(n, width) * scale + centre * scale)
            asked.append(torch.randn(m, width) * 2 * scale + 2 * centre * scale)
        kept = [table.clone() for table in (*known, *asked)]
        a, b = ([table.double() for table in tables] for tables in (known, asked))
        found = call(answer, list(known), list(asked))
        unchanged((*known, *asked), kept, "the tables")
        first, second = pair_of(found, "the training features", "the other features")
        shapes, wanted = [tuple(first.shape), tuple(second.shape)], [(n, sum(widths)), (m, sum(widths))]
        if shapes == wanted[::-1]:
            raise NotYet("the training features come first, then the others; yours are swapped")
        if shapes != wanted:
            raise NotYet(f"sources of widths {widths} make {wanted[0]} and {wanted[1]}, and you gave {shapes[0]} and {shapes[1]}")
        right = blocks(a, b)
        if near(first, right[0]) and near(second, right[1]):
            continue
        mistakes = {
            "you set them side by side as they are; the loudest source drowns the others": [torch.cat(a, 1), torch.cat(b, 1)],
            "standardised, but not divided by the square root of the width: a wide source weighs more": blocks(a, b, root=False),
            "you divided by the width; a squared length of 1 asks for its square root": blocks(a, b, root="width"),
            "you measured the other tables by themselves; mean and deviation come from training, for both": blocks(
                a, b, deviation="each"
            ),
            "you measured both tables together; measure the training features alone": blocks(a, b, deviation="both"),
            "that deviation is over n - 1; correction=0 makes it over n": blocks(a, b, correction=1),
            "that is one mean and deviation a source; every feature has its own, dim=0": blocks(a, b, by_source=False),
            "the sources stand in another order than they came": blocks(a[::-1], b[::-1]),
        }
        total = sum(widths) ** 0.5
        plain = blocks(a, b, root=False)
        mistakes["divide each source by the square root of its own width, not of the sum of all"] = [x / total for x in plain]
        for reason, tables in mistakes.items():
            if near(first, tables[0]) and near(second, tables[1]):
                raise NotYet(reason)
        for name, table, expected in (("training", first, right[0]), ("other", second, right[1])):
            if not near(table, expected):
                row, place = divmod(int((table - expected).abs().nan_to_num(torch.inf).argmax()), sum(widths))
                raise NotYet(
                    f"in the {name} features, row {row} and column {place}, you gave {table[row, place]:.3f} where "
                    f"{expected[row, place]:.3f} belongs"
                )


def attend(answer) -> None:
    for n, sources, width in ((random.randint(5, 9), 3, 4), (random.randint(5, 9), 2, 5), (1, 4, 3)):
        projected, scores = torch.randn(n, sources, width), 2 * torch.randn(n, sources)
        kept = projected.clone(), scores.clone()
        found = call(answer, projected, scores)
        unchanged((projected, scores), kept, "the inputs")
        total, shares = pair_of(found, "the sum", "the shares")
        wanted = (n, width), (n, sources)
        shapes = tuple(total.shape), tuple(shares.shape)
        if shapes == wanted[::-1]:
            raise NotYet("the sum comes first, then the shares; yours are swapped")
        if shapes != wanted:
            raise NotYet(f"the sum has shape {wanted[0]} and the shares {wanted[1]}; you gave {shapes[0]} and {shapes[1]}")
        x, s = projected.double(), scores.double()
        right = s.softmax(dim=1)
        if not near(shares, right):
            mistakes = {
                "those are the scores; a softmax makes shares of them": s,
                "your softmax is over the pictures; it goes over the sources, dim=1": s.softmax(dim=0),
                "a sigmoid looks at one score alone; shares must sum to 1 over the sources, by a softmax": s.sigmoid(),
                "those are logarithms of shares: softmax, not log_softmax": s.log_softmax(dim=1),
                "all sources have the same share; the scores have no say": torch.full_like(s, 1 / sources),
                "scores can be negative, so dividing by their sum makes no shares; take a softmax": s / s.sum(1, keepdim=True),
                "that takes the best source alone; a softmax gives each a share": F.one_hot(s.argmax(1), sources).double(),
            }
            for reason, values in mistakes.items():
                if near(shares, values):
                    raise NotYet(reason)
            raise NotYet(f"the shares of picture 0 are {shares[0].tolist()}, and should be {right[0].tolist()}")
        fused = (right[:, :, None] * x).sum(dim=1)
        if not near(total, fused):
            mistakes = {
                "right shares, but the sum is without them: multiply first": x.sum(dim=1),
                "right shares, but that is the mean of the sources: multiply by the shares and add up": x.mean(dim=1),
                "you divided by the number of sources as well; the shares sum to 1 already": fused / sources,
            }
            for reason, values in mistakes.items():
                if near(total, values):
                    raise NotYet(reason)
            raise NotYet(f"right shares, but the sum of picture 0 is {total[0].tolist()}, and should be {fused[0].tolist()}")


def drawn_hits(networks: int, n: int, m: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Validation and test hits of networks, of which one is best in validation and another in testing, and of a fusion."""
    order = random.sample(range(networks), networks)  # the first is best in validation, the second in testing
    valid, test = np.zeros((networks, n), dtype=bool), np.zeros((networks, m), dtype=bool)
    for place, net in enumerate(order):
        for table, count, right in (
            (valid, n, int(n * (0.9 - 0.08 * place))),
            (test, m, int(m * (0.8, 0.86, 0.7, 0.62)[place])),
        ):
            table[net, np.random.permutation(count)[:right]] = True
    fused = np.zeros(m, dtype=bool)
    fused[np.random.permutation(m)[: int(m * random.choice([0.74, 0.89, 0.93]))]] = True
    return valid, test, fused


def removed(answer) -> None:
    for networks in (3, 4, 2):
        while True:
            n, m = random.randint(80, 120), random.randint(130, 180)
            valid, test, fused = drawn_hits(networks, n, m)
            best, luckiest = valid.mean(axis=1).argmax(), test.mean(axis=1).argmax()
            errors, mean_errors = 1 - test.mean(axis=1), 1 - test.mean()
            after = 1 - fused.mean()
            expected = (errors[best] - after) / errors[best]
            mistakes = {
                "you took the network that is best on test pictures; choose on validation pictures": (errors[luckiest] - after)
                / errors[luckiest],
                "the best single network is one of them, not their mean": (mean_errors - after) / mean_errors,
                "that is the difference in accuracy; divide by the errors of the single network": errors[best] - after,
                "you divided by the accuracy; a share of *errors* is asked for": (errors[best] - after) / (1 - errors[best]),
                "you divided by the errors of the fused model; they are a share of the single network's": (errors[best] - after)
                / after,
                "that is the share of errors that is left": after / errors[best],
                "a gain is positive, a loss is negative: yours is the other way round": -expected,
                "that compares with the single network's errors on validation pictures; take its test errors": (
                    (1 - valid[best].mean()) - after
                )
                / (1 - valid[best].mean()),
                "in percent that is right; a share is asked for": 100 * expected,
            }
            if apart([expected, *mistakes.values()], 1e-4) and abs(expected) > 0.01:
                break
        kept = [part.copy() for part in (valid, test, fused)]
        found = number(call(answer, valid, test, fused), "; a share of errors is one number")
        if not all(np.array_equal(mine, its) for mine, its in zip(kept, (valid, test, fused), strict=True)):
            raise NotYet("your function changed the arrays themselves, and whoever gave them needs them")
        if math.isclose(found, expected, abs_tol=1e-6):
            continue
        if reason := reason_for(found, mistakes, 1e-6):
            raise NotYet(reason)
        raise NotYet(f"the best single network makes {errors[best]:.3f} errors, the fused {after:.3f}; you gave {found:.3f}")


def plain_cka(x: torch.Tensor, y: torch.Tensor) -> float:
    return float((y.T @ x).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm()))


def cka(answer) -> None:
    for n, width, other in ((random.randint(30, 40), 5, 8), (12, 20, 7), (25, 6, 6)):
        while True:
            x = torch.randn(n, width) + torch.randn(width)
            y = x @ torch.randn(width, other) / width**0.5 + torch.randn(n, other) + 2 * torch.randn(other)
            a, b = (table.double() - table.double().mean(dim=0) for table in (x, y))
            expected = plain_cka(a, b)
            over_rows = [table.double() - table.double().mean(dim=1, keepdim=True) for table in (x, y)]
            once = [table.double() - table.double().mean() for table in (x, y)]
            cross, own = (b.T @ a).norm(), ((a.T @ a).norm() * (b.T @ b).norm())
            mistakes = {
                "take off the mean of each feature first": plain_cka(x.double(), y.double()),
                "you took the mean of each row; a feature is a column, dim=0": plain_cka(*over_rows),
                "that is one mean for the whole table; every feature has its own, dim=0": plain_cka(*once),
                "the norm above is squared": float(cross / own),
                "you took the root of it": expected**0.5,
                "norms below are of X'X and Y'Y, not squared": float(cross**2 / own**2),
                "below you divided by the norms of X and Y; the formula has X'X and Y'Y": float(
                    cross**2 / (a.norm() * b.norm()) ** 2
                ),
                "that is what stands above the line; divide": float(cross**2),
                "1 minus CKA is how *unlike* they are": 1 - expected,
            }
            if apart([expected, *mistakes.values()], 1e-3):
                break
        kept = x.clone(), y.clone()
        found = number(call(answer, x, y), "; CKA is one number for both tables")
        unchanged((x, y), kept, "the tables")
        if math.isclose(found, expected, abs_tol=1e-4):
            continue
        if reason := reason_for(found, mistakes):
            raise NotYet(reason)
        raise NotYet(f"for tables of {n} rows and widths {width} and {other} you gave {found:.4f}, and it is {expected:.4f}")


def softened(student, teacher, labels, temperature, alpha, factor=1.0, squared=True, swapped=False):
    """The loss, or with one mistake. factor: what another reduction makes of the KL."""
    one, other = (student, teacher) if not swapped else (teacher, student)
    logs, probabilities = (one / temperature).log_softmax(dim=1), (other / temperature).softmax(dim=1)
    told = factor * F.kl_div(logs, probabilities, reduction="batchmean")
    return float((1 - alpha) * F.cross_entropy(student, labels) + alpha * (temperature**2 if squared else 1) * told)


def distil(answer) -> None:
    for temperature, alpha in ((2.0, 0.9), (4.0, 0.3), (1.5, 0.7)):
        while True:
            n, classes = random.randint(5, 9), random.randint(3, 7)
            student, teacher = 2 * torch.randn(n, classes), 3 * torch.randn(n, classes)
            labels = torch.randint(classes, (n,))
            given = student.double(), teacher.double(), labels, temperature, alpha
            hard = float(F.cross_entropy(given[0], labels))
            expected = softened(*given)
            told = (expected - (1 - alpha) * hard) / alpha  # with T squared
            probabilities = (given[1] / temperature).softmax(dim=1)
            forgotten = float(
                F.kl_div((given[0] / temperature).softmax(dim=1), probabilities, reduction="batchmean")
            )  # no logarithm
            cold = float(F.kl_div(given[0].log_softmax(dim=1), given[1].softmax(dim=1), reduction="batchmean"))
            half = float(F.kl_div(given[0].log_softmax(dim=1), probabilities, reduction="batchmean"))
            hot = float(F.cross_entropy(given[0] / temperature, labels))
            soft = float(F.cross_entropy(given[0] / temperature, probabilities)) * temperature**2
            mistakes = {
                'reduction="mean" divides by the classes as well; "batchmean" is the mean over pictures': softened(
                    *given, factor=1 / classes
                ),
                'reduction="sum" grows with the batch; "batchmean" is the mean over pictures': softened(*given, factor=n),
                "T² is missing: softer answers have smaller gradients, and it makes up for that": softened(*given, squared=False),
                "the KL goes from the teacher to the student; yours goes the other way": softened(*given, swapped=True),
                "alpha weighs the teacher, and 1 - alpha the labels; yours are swapped": alpha * hard + (1 - alpha) * told,
                "kl_div takes logarithms of the student's probabilities: log_softmax": (1 - alpha) * hard
                + alpha * temperature**2 * forgotten,
                "no temperature in the KL: divide both logits by T before the softmax": (1 - alpha) * hard
                + alpha * temperature**2 * cold,
                "the student's logits are divided by T in the KL too": (1 - alpha) * hard + alpha * temperature**2 * half,
                "labels take the student's own logits, without a temperature": (1 - alpha) * hot + alpha * told,
                "that is the cross-entropy alone; the teacher says nothing": hard,
                "that is the teacher's part alone; labels count for 1 - alpha": alpha * told,
                "you took T where T² belongs": (1 - alpha) * hard + alpha * told / temperature,
                "both parts are added without alpha": hard + told,
                "that is the cross-entropy with the teacher's probabilities; KL takes the teacher's own entropy off": (1 - alpha)
                * hard
                + alpha * soft,
            }
            if apart([expected, *mistakes.values()], 2e-3):
                break
        kept = student.clone(), teacher.clone()
        found = number(
            call(answer, student, teacher, labels, temperature, alpha), "; a loss is one number, the mean over pictures"
        )
        unchanged((student, teacher), kept, "the logits")
        if math.isclose(found, expected, rel_tol=1e-4, abs_tol=1e-4):
            continue
        if reason := reason_for(found, mistakes):
            raise NotYet(reason)
        raise NotYet(f"with T = {temperature} and alpha = {alpha} you gave {found:.4f}, and the loss is {expected:.4f}")


EXERCISES = {
    "07.1": Exercise(
        concatenate,
        "One source at a time: its training table has a mean and a deviation for every column, which serve both of its tables. "
        "Divide by width ** 0.5, keep both in lists, and put each list together with torch.cat(..., dim=1).",
    ),
    "07.2": Exercise(
        attend,
        "softmax(dim=1) goes over the sources. Shares are (n, sources); with [:, :, None] they can be multiplied with "
        "(n, sources, width). Then add up over dim=1.",
    ),
    "07.3": Exercise(
        removed,
        "valid_hits.mean(axis=1) has one accuracy a network; argmax finds the best. Errors are where a hit is False. What goes "
        "away is the difference of two error rates, and it is measured by the first of them.",
    ),
    "07.4": Exercise(
        cka,
        "x - x.mean(dim=0) has mean 0 in every column. tensor.norm() is the root of the sum of squares of all entries, also of a "
        "matrix. Three matrices are needed: Y'X, X'X and Y'Y.",
    ),
    "07.5": Exercise(
        distil,
        "F.kl_div(input, target) takes the student's log_softmax and the teacher's softmax, both of logits / temperature, with "
        'reduction="batchmean". The labels take the student\'s logits as they are.',
    ),
}
