"""Checks of lesson 08."""

import math
import random
from functools import partial

import numpy as np
import torch

from course_utils.exercises import Exercise, NotYet, apart, call, near, number, values_of

KINDS = ("none", "covariate", "label", "concept")


close = partial(near, tolerance=1e-4)


def unchanged(given, kept, what: str) -> None:
    if not all(torch.equal(mine, its) for mine, its in zip(given, kept, strict=True)):
        raise NotYet(f"your function changed {what} themselves, and whoever gave them needs them; make new tensors")


def reason_for(found: float, mistakes: dict[str, float]) -> str | None:
    """What went wrong, told by the value that it gives."""
    return next((reason for reason, value in mistakes.items() if math.isclose(found, value, abs_tol=1e-6)), None)


def joint(kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Two tables p(picture, class) that differ in one way, and in that way clearly."""
    while True:
        source = np.random.dirichlet(np.full(15, 3.0)).reshape(5, 3) + 0.01
        source /= source.sum()
        by_picture, by_class = source.sum(axis=1, keepdims=True), source.sum(axis=0, keepdims=True)
        target = {
            "none": source.copy(),
            "covariate": source / by_picture * np.random.dirichlet(np.full(5, 2.0))[:, None],
            "label": source / by_class * np.random.dirichlet(np.full(3, 2.0)),
            "concept": np.random.dirichlet(np.full(3, 2.0), size=5) * by_picture,
        }[kind]
        other_pictures, other_classes = target.sum(axis=1, keepdims=True), target.sum(axis=0, keepdims=True)
        moved = {
            "p(x)": abs(other_pictures - by_picture).max(),
            "p(y)": abs(other_classes - by_class).max(),
            "p(y|x)": abs(target / other_pictures - source / by_picture).max(),
            "p(x|y)": abs(target / other_classes - source / by_class).max(),
        }
        stays = {"none": tuple(moved), "covariate": ("p(y|x)",), "label": ("p(x|y)",), "concept": ("p(x)",)}[kind]
        if target.min() > 1e-3 and all(name in stays or gap > 0.05 for name, gap in moved.items()):
            return source, target


def kind_of_shift(answer) -> None:
    asked = list(KINDS) * 3
    random.shuffle(asked)
    said = []
    for kind in asked:
        tables = joint(kind)
        kept = [table.copy() for table in tables]
        found = call(answer, *tables)
        if not all(np.array_equal(mine, its) for mine, its in zip(kept, tables, strict=True)):
            raise NotYet("your function changed the tables themselves, and whoever gave them needs them")
        if not isinstance(found, str) or found not in KINDS:
            raise NotYet(f"one of {', '.join(KINDS)} is expected, as text, not {found!r:.60}")
        said.append(found)
    wrong = {(kind, found) for kind, found in zip(asked, said, strict=True) if kind != found}
    if not wrong:
        return
    if len(set(said)) == 1:
        raise NotYet(f"you say {said[0]!r} whatever comes; look at the tables")
    reasons = {
        ("none", "any"): "two equal tables are no shift: compare with np.allclose",
        (
            "covariate",
            "label",
        ): "a covariate shift was called a label shift: with p(x), p(y) moves too. Ask what *stays*: p(y|x), the "
        "rows divided by their sums",
        (
            "label",
            "covariate",
        ): "a label shift was called a covariate shift: with p(y), p(x) moves too. Ask what *stays*: p(x|y), the "
        "columns divided by their sums",
        (
            "label",
            "concept",
        ): "a label shift was called a concept shift: with p(y), p(y|x) moves too. See first whether p(x|y) stays",
        ("concept", "label"): "a concept shift was called a label shift: p(y) moves with p(y|x). A label shift keeps p(x|y)",
        ("concept", "none"): "a concept shift was not seen: p(x) is the same, and p(y|x) is not",
    }
    for (kind, found), reason in reasons.items():
        if any(kind == right and (found == given or found == "any") for right, given in wrong):
            raise NotYet(reason)
    kind, found = sorted(wrong)[0]
    raise NotYet(f"for a pair in which the shift is {kind!r} you say {found!r}: compare p(y|x), p(x|y) and p(x) of both tables")


def error_of(asked: torch.Tensor, own: torch.Tensor, other: torch.Tensor, squared: bool = True) -> float:
    """The share of rows that are nearer to the other mean than to their own."""
    mine, its = ((asked - mean).square().sum(dim=1) if squared else (asked @ mean).neg() for mean in (own, other))
    return (mine > its).double().mean().item()


def distance_by_means(answer) -> None:
    for width, gap in ((4, 1.2), (7, 0.8), (3, 2.0)):
        while True:
            counts = [random.randint(30, 40), random.randint(14, 20), random.randint(15, 22), random.randint(50, 70)]
            shift = torch.zeros(width)
            shift[0] = gap
            ground = 3 * torch.rand(width) + 1
            tables = [torch.randn(count, width) + ground + shift * (place % 2) for place, count in enumerate(counts)]
            learn, asked = [own.double() for own in tables[:2]], [own.double() for own in tables[2:]]
            means = [own.mean(dim=0) for own in learn]
            errors = [error_of(asked[0], means[0], means[1]), error_of(asked[1], means[1], means[0])]
            stale = [error_of(learn[0], means[0], means[1]), error_of(learn[1], means[1], means[0])]
            late = [own.mean(dim=0) for own in asked]
            known = [error_of(asked[0], late[0], late[1]), error_of(asked[1], late[1], late[0])]
            wrong, right = [sum(pair) / 2 for pair in (errors, stale)], 2 * (1 - sum(errors))
            pooled = (errors[0] * counts[2] + errors[1] * counts[3]) / (counts[2] + counts[3])
            mistakes = {
                "that is the error of rows that the means come from; ask the others": 2 * (1 - 2 * wrong[1]),
                "your means come from the rows that are asked; the probe must not have seen them": 2 * (1 - sum(known)),
                "all rows in one pot: the larger domain weighs more. Take the mean of the two errors": 2 * (1 - 2 * pooled),
                "that is ε itself; the distance is 2 (1 - 2ε)": wrong[0],
                "that is the probe's accuracy; the distance is 2 (1 - 2ε)": 1 - wrong[0],
                "that is 1 - 2ε; twice that is asked for": 1 - 2 * wrong[0],
                "that is 2 (1 - ε); the error counts twice": 2 * (1 - wrong[0]),
                "the probe is turned round: a row belongs to the domain whose mean is nearer": -right,
                "you added the errors of both domains up; ε is their mean": 2 * (1 - 2 * sum(errors)),
            }
            if apart([right, *mistakes.values()]) and 0.1 < right < 1.8:
                break
        kept = [own.clone() for own in tables]
        found = number(call(answer, *tables), "; the distance is one number")
        unchanged(tables, kept, "the tables")
        if math.isclose(found, right, abs_tol=1e-5):
            continue
        if reason := next((r for r, value in mistakes.items() if math.isclose(found, value, abs_tol=1e-5)), None):
            raise NotYet(reason)
        raise NotYet(
            f"with errors of {errors[0]:.3f} and {errors[1]:.3f} in the two domains the distance is {right:.3f}; "
            f"you gave {found:.3f}"
        )


def mean_gap(x: torch.Tensor, y: torch.Tensor) -> float:
    return (x.mean(dim=0) - y.mean(dim=0)).norm().item()


def spread_gap(x: torch.Tensor, y: torch.Tensor) -> float:
    return (x.std(dim=0) - y.std(dim=0)).abs().sum().item()


def loudest(x: torch.Tensor, y: torch.Tensor) -> float:
    """Not the same when the samples change places, and below 0."""
    return (x.mean() - y.mean()).item() - 1


def p_value(answer) -> None:
    for measure, n, m, times in ((mean_gap, 9, 14, 39), (spread_gap, 16, 7, 60), (loudest, 11, 6, 25)):
        while True:
            source, target = torch.randn(n, 3) + 0.25, 0.85 * torch.randn(m, 3)
            orders = torch.stack([torch.randperm(n + m) for _ in range(times)])
            pot, found_value = torch.cat([source, target]), measure(source, target)
            orders[:3] = torch.arange(n + m)  # the real division, come again: it reaches itself
            by_chance = np.array([measure(pot[order[:n]], pot[order[n:]]) for order in orders])
            by_chance[:3] = found_value
            swapped = np.array([measure(pot[order[:m]], pot[order[m:]]) for order in orders])
            reached = int((by_chance >= found_value).sum())
            expected = (1 + reached) / (1 + times)
            mistakes = {
                "the real division is one of the possible ones: count it, above and below": reached / times,
                "count the real division below too: divide by 1 + times": (1 + reached) / times,
                "count the real division above too: 1 + reached": reached / (1 + times),
                "a division that is exactly as large reaches the real one too: >=": (1 + int((by_chance > found_value).sum()))
                / (1 + times),
                "that is the share that does *not* reach the real value": 1 - expected,
                "that is the share below; a p-value counts what is as large or larger": (
                    1 + int((by_chance <= found_value).sum())
                )
                / (1 + times),
                "that is how many reached it; a share is asked for": float(reached),
                "the first sample of a division has as many rows as the source, not as the target": (
                    1 + int((swapped >= found_value).sum())
                )
                / (1 + times),
            }
            clear = abs(by_chance[3:] - found_value).min() > 1e-5  # or rounding would decide
            if clear and apart([expected, *mistakes.values()]) and 5 < reached < times - 5:
                break
        kept = source.clone(), target.clone(), orders.clone()
        found = number(call(answer, measure, source, target, orders), "; a p-value is one number")
        unchanged((source, target, orders), kept, "the inputs")
        if math.isclose(found, expected, abs_tol=1e-6):
            continue
        if reason := reason_for(found, mistakes):
            raise NotYet(reason)
        raise NotYet(f"of {times} divisions {reached} reach the real value, so p is {expected:.4f}; you gave {found:.4f}")


def mixed_statistics(answer) -> None:
    for n, channels, N in ((random.randint(4, 8), 3, 16), (3, 5, 2), (random.randint(9, 12), 4, 0.5)):
        mean, variance = torch.randn(channels), 0.5 + 2 * torch.rand(channels)
        scale, centre = 1 + 2 * torch.rand(channels, 1, 1), 3 * torch.randn(channels, 1, 1)
        maps = torch.randn(n, channels, 4, 6) * scale + centre + torch.randn(n, 1, 1, 1)
        kept = mean.clone(), variance.clone(), maps.clone()
        found = call(answer, mean, variance, maps, N)
        unchanged((mean, variance, maps), kept, "the inputs")
        if not isinstance(found, tuple | list) or len(found) != 2:
            raise NotYet(f"two things are expected, mean and variance, not {type(found).__name__}")
        pair = [values_of(part, name) for part, name in zip(found, ("the mean", "the variance"), strict=True)]
        x, before = maps.double(), [mean.double(), variance.double()]
        places = (0, 2, 3)
        own = [x.mean(dim=places), x.var(dim=places, correction=0)]

        def mixed(now, share, before=before):
            return [share * old + (1 - share) * new for old, new in zip(before, now, strict=True)]

        share = N / (N + n)
        right, cells = mixed(own, share), n * 24
        if all(close(mine, its) for mine, its in zip(pair, right, strict=True)):
            continue
        if all(close(mine, its) for mine, its in zip(pair, right[::-1], strict=True)):
            raise NotYet("the mean comes first, then the variance; yours are swapped")
        shapes = [tuple(part.shape) for part in pair]
        if shapes != [(channels,)] * 2:
            raise NotYet(f"each channel has one mean and one variance, shape ({channels},); you gave {shapes[0]} and {shapes[1]}")
        of_means = [own[0], x.mean(dim=(2, 3)).var(dim=0, correction=0)]
        mistakes = {
            "those are the target's statistics alone; the source's count as N pictures": own,
            "those are the source's statistics, as they were": before,
            "half and half; the weights are N and n": mixed(own, 0.5),
            "the weights are swapped: the source's statistics weigh N, the target's n": mixed(own, 1 - share),
            "n is the number of target *pictures*, not of places in all of them": mixed(own, N / (N + cells)),
            "that variance is over the count less 1; correction=0": mixed([own[0], x.var(dim=places)], share),
            "that variance is over the pictures' means; take it over pictures and places at once": mixed(of_means, share),
            "you mixed deviations; the formula mixes variances": [
                right[0],
                (share * before[1].sqrt() + (1 - share) * own[1].sqrt()) ** 2,
            ],
            "that is a deviation; variances are asked for": [right[0], right[1].sqrt()],
        }
        for reason, values in mistakes.items():
            if all(close(mine, its) for mine, its in zip(pair, values, strict=True)):
                raise NotYet(reason)
        for name, mine, its in zip(("mean", "variance"), pair, right, strict=True):
            if not close(mine, its):
                place = int((mine - its).abs().nan_to_num(torch.inf).argmax())
                raise NotYet(
                    f"with N = {N} and {n} target pictures, the {name} of channel {place} is {its[place]:.4f}; "
                    f"you gave {mine[place]:.4f}"
                )


def recolour(answer) -> None:
    for n, m, width in ((random.randint(60, 80), random.randint(90, 120), 4), (90, 50, 3), (70, 70, 5)):
        source, target = (
            torch.randn(count, width, dtype=torch.float64) @ torch.randn(width, width, dtype=torch.float64)
            + 0.7 * torch.randn(count, width, dtype=torch.float64)
            + 4 * torch.randn(width, dtype=torch.float64)
            for count in (n, m)
        )
        kept = source.clone(), target.clone()
        found = values_of(call(answer, source, target), "the source's rows, re-coloured")
        unchanged((source, target), kept, "the tables")
        if found.shape != (n, width):
            if found.shape == target.shape:
                raise NotYet(f"the *source's* rows are asked for, {n} of them; you gave {len(found)}, as many as the target has")
            raise NotYet(f"the source's rows have shape {(n, width)}, and you gave {tuple(found.shape)}")
        if not torch.isfinite(found).all():
            raise NotYet("some of these numbers are not finite")
        moved = torch.cat([source, torch.ones(n, 1, dtype=torch.float64)], dim=1)
        line = moved @ torch.linalg.lstsq(moved, found).solution
        if not close(found, line):
            raise NotYet(
                "that is no linear map and shift of the source's rows: every row goes through the same matrix, in its own place"
            )
        own, wanted, have = (table.T.cov() for table in (source, target, found))
        centred = close(found.mean(dim=0), target.mean(dim=0))
        if close(have, wanted) and centred:
            continue
        identity = torch.eye(width, dtype=torch.float64)
        if close(found, source):
            raise NotYet("those are the source's rows as they were")
        if close(have, wanted):
            kind = "the source's own" if close(found.mean(dim=0), source.mean(dim=0)) else "another one"
            raise NotYet(
                f"the covariance is right, but the mean is {kind}: centre the source, and add the target's mean at the end"
            )
        if close(have, identity):
            raise NotYet("that is whitened, covariance 1: now put in the target's covariance")
        if close(have, own):
            raise NotYet("you moved the mean; the covariance is still the source's")
        if close(have.diagonal(), wanted.diagonal()):
            raise NotYet(
                "every feature has the target's variance, but features still vary together as the source's do: use the matrices"
            )
        root = torch.linalg.cholesky(wanted)
        if close(have, root @ own @ root.T):
            raise NotYet("coloured without whitening first: the source's own covariance is still in it")
        inverse = torch.linalg.inv(torch.linalg.cholesky(own))
        if close(have, wanted @ wanted) or close(have, wanted @ inverse @ own @ inverse.T @ wanted):
            raise NotYet("you multiplied by the covariance; its root is wanted")
        if close(have, root.T @ root):
            raise NotYet("R Rᵀ = C is turned round: rows are coloured by white @ R.T, columns by R @ white")
        row, column = divmod(int((have - wanted).abs().argmax()), width)
        raise NotYet(
            f"the covariance of features {row} and {column} is {have[row, column]:.3f} now, and the target's is "
            f"{wanted[row, column]:.3f}. Rows go through the transpose of a matrix that columns go through"
        )


EXERCISES = {
    "08.1": Exercise(
        kind_of_shift,
        "table.sum(axis=1, keepdims=True) is p(x), and the table divided by it is p(y|x). With axis=0 they are p(y) and p(x|y). "
        "Look for what stays: np.allclose of both tables, of p(y|x), of p(x|y); what is left over is a concept shift.",
    ),
    "08.2": Exercise(
        distance_by_means,
        "Stack the two means to a table of two rows. torch.cdist(asked, means) has two distances a row, and argmin(dim=1) is 0 "
        "for the source's mean, 1 for the target's. Compare with the domain that the rows come from, for each domain by itself.",
    ),
    "08.3": Exercise(
        p_value,
        "torch.cat puts all rows into one pot; pot[order] is one re-ordering of it. Count how many of their values are >= "
        "the real one, then add one to the count and one to the number of divisions.",
    ),
    "08.4": Exercise(
        mixed_statistics,
        "A channel's statistics go over the other three dimensions: dim=(0, 2, 3). len(target_maps) is the number of pictures. "
        "The two weights, N / (N + n) and n / (N + n), serve mean and variance alike.",
    ),
    "08.5": Exercise(
        recolour,
        "With L the Cholesky root of the source's covariance, columns are whitened by inverse(L) @ column, so centred *rows* by "
        "rows @ inverse(L).T. Colour the same way with the target's root, and add the target's mean.",
    ),
}
