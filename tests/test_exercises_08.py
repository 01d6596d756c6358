"""The checks of lesson 08: right answers in several forms are correct, plausible wrong ones are told why."""

import numpy as np
import torch

from tests.exercise_tests import *  # noqa: F403


def given(table, axis):
    return table / table.sum(axis=axis, keepdims=True)


def kind(source, target):
    for name, parts in (
        ("none", (source, target)),
        ("covariate", (given(source, 1), given(target, 1))),
        ("label", (given(source, 0), given(target, 0))),
    ):
        if np.allclose(*parts):
            return name
    return "concept"


def kind_by_ratios(source, target):
    ratio = target / source
    if np.ptp(ratio) < 1e-9:
        return "none"
    if np.ptp(ratio, axis=1).max() < 1e-9:
        return "covariate"
    return "label" if np.ptp(ratio, axis=0).max() < 1e-9 else "concept"


def kind_in_loops(source, target):
    if all(abs(a - b) < 1e-9 for a, b in zip(source.flat, target.flat, strict=True)):
        return "none"
    if all(np.allclose(a / a.sum(), b / b.sum()) for a, b in zip(source, target, strict=True)):
        return "covariate"
    if np.allclose(source.sum(axis=1), target.sum(axis=1)):
        return "concept"
    return "label"


def kind_by_marginals(source, target):
    """What a reader does who takes the names for the definitions."""
    if np.allclose(source, target):
        return "none"
    if not np.allclose(source.sum(axis=0), target.sum(axis=0)):
        return "label"
    return "covariate" if not np.allclose(source.sum(axis=1), target.sum(axis=1)) else "concept"


def kind_by_pictures(source, target):
    if np.allclose(source, target):
        return "none"
    return "concept" if np.allclose(source.sum(axis=1), target.sum(axis=1)) else "covariate"


def kind_without_classes(source, target):
    if np.allclose(source, target):
        return "none"
    return "covariate" if np.allclose(given(source, 1), given(target, 1)) else "concept"


def kind_blind_to_concepts(source, target):
    found = kind(source, target)
    return "none" if found == "concept" else found


def kind_without_none(source, target):
    return "covariate" if kind(source, target) == "none" else kind(source, target)


def errors(learn, asked):
    means = [own.double().mean(dim=0) for own in learn]
    found = []
    for own, table in enumerate(asked):
        nearer = [(table.double() - mean).square().sum(dim=1) for mean in means]
        found.append((nearer[own] > nearer[1 - own]).double().mean().item())
    return found


def by_means(a, b, c, d):
    return 2 * (1 - sum(errors((a, b), (c, d))))


def by_means_linear(a, b, c, d):
    """The same probe as a plane between the two means, in numpy."""
    a, b, c, d = (table.double().numpy() for table in (a, b, c, d))
    normal, middle = a.mean(0) - b.mean(0), (a.mean(0) + b.mean(0)) / 2
    return 2 * (1 - (((c - middle) @ normal < 0).mean() + ((d - middle) @ normal > 0).mean()))


def by_means_in_loops(a, b, c, d):
    wrong = []
    for table, own, other in ((c, a, b), (d, b, a)):
        hits = [(row - own.mean(0)).norm() < (row - other.mean(0)).norm() for row in table]
        wrong.append(1 - sum(map(float, hits)) / len(hits))
    return torch.tensor(2 * (1 - 2 * np.mean(wrong)))


def by_means_pooled(a, b, c, d):
    wrong = errors((a, b), (c, d))
    return 2 * (1 - 2 * (wrong[0] * len(c) + wrong[1] * len(d)) / (len(c) + len(d)))


def chance(measure, source, target, orders, size=None):
    pot, size = torch.cat([source, target]), size or len(source)
    return np.array([float(measure(pot[order[:size]], pot[order[size:]])) for order in orders])


def same(measure, source, target, values):
    """Values with those made exactly the real one that differ from it by rounding alone."""
    found = float(measure(source, target))
    return found, np.where(np.isclose(values, found, atol=1e-7), found, values)


def p(measure, source, target, orders, above=1, below=1, reaches=np.greater_equal, size=None):
    found, values = same(measure, source, target, chance(measure, source, target, orders, size))
    return (above + reaches(values, found).sum()) / (below + len(orders))


def p_in_one_list(measure, source, target, orders):
    values = chance(measure, source, target, torch.cat([torch.arange(orders.shape[1])[None], orders]))
    return float((values >= values[0]).mean())


def p_in_torch(measure, source, target, orders):
    pot = torch.cat([source, target])[orders]
    values = torch.tensor([measure(both[: len(source)], both[len(source) :]) for both in pot])
    return ((values >= torch.tensor(measure(source, target))).sum() + 1) / (len(orders) + 1)


def statistics(mean, variance, maps, N, dim=(0, 2, 3), correction=0, share=None):
    share = N / (N + len(maps)) if share is None else share
    own = maps.mean(dim=dim), maps.var(dim=dim, correction=correction)
    return share * mean + (1 - share) * own[0], share * variance + (1 - share) * own[1]


def statistics_in_numpy(mean, variance, maps, N):
    rows = maps.numpy().transpose(1, 0, 2, 3).reshape(len(mean), -1)
    n = len(maps)
    return (N * mean.numpy() + n * rows.mean(1)) / (N + n), (N * variance.numpy() + n * rows.var(1)) / (N + n)


def statistics_by_squares(mean, variance, maps, N):
    maps, n = maps.double(), len(maps)
    own = maps.mean(dim=(0, 2, 3))
    spread = maps.square().mean(dim=(0, 2, 3)) - own.square()
    return [(N * mean + n * own) / (N + n), (N * variance + n * spread) / (N + n)]


def statistics_by_batch_norm(mean, variance, maps, N):
    layer = torch.nn.BatchNorm2d(len(mean), momentum=1.0)
    layer(maps)
    count = maps.numel() / len(mean)
    n, spread = len(maps), layer.running_var * (count - 1) / count
    return (N * mean + n * layer.running_mean) / (N + n), (N * variance + n * spread) / (N + n)


def statistics_of_deviations(mean, variance, maps, N):
    share = N / (N + len(maps))
    right = statistics(mean, variance, maps, N)[0]
    deviation = share * variance.sqrt() + (1 - share) * maps.std(dim=(0, 2, 3), correction=0)
    return right, deviation.square()


def statistics_in_place(mean, variance, maps, N):
    mean.mul_(N / (N + len(maps)))
    return statistics(mean, variance, maps, N)


def root(table):
    return torch.linalg.cholesky(table.T.cov())


def colour(source, target):
    white = (source - source.mean(dim=0)) @ torch.linalg.inv(root(source)).T
    return white @ root(target).T + target.mean(dim=0)


def power(matrix, exponent):
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values**exponent) @ vectors.T


def colour_symmetric(source, target):
    moved = (source - source.mean(dim=0)) @ power(source.T.cov(), -0.5) @ power(target.T.cov(), 0.5)
    return moved + target.mean(dim=0)


def colour_in_numpy(source, target):
    source, target = source.numpy(), target.numpy()
    down, up = (np.linalg.cholesky(np.cov(table.T)) for table in (source, target))
    return np.linalg.solve(down, (source - source.mean(0)).T).T @ up.T + target.mean(0)


def colour_by_feature(source, target):
    return (source - source.mean(0)) / source.std(0) * target.std(0) + target.mean(0)


def centred(source):
    return source - source.mean(dim=0)


RIGHT = {
    "08.1": [kind, kind_by_ratios, kind_in_loops],
    "08.2": [by_means, by_means_linear, by_means_in_loops],
    "08.3": [p, p_in_one_list, p_in_torch],
    "08.4": [statistics, statistics_in_numpy, statistics_by_squares, statistics_by_batch_norm],
    "08.5": [colour, colour_symmetric, colour_in_numpy],
}
WRONG = {
    "08.1": [
        (lambda *a: "covariate", "whatever comes"),
        (kind_by_marginals, "a covariate shift was called a label shift"),
        (kind_by_pictures, "a label shift was called a covariate shift"),
        (kind_without_classes, "a label shift was called a concept shift"),
        (kind_blind_to_concepts, "a concept shift was not seen"),
        (kind_without_none, "two equal tables are no shift"),
        (lambda *a: "Covariate shift", "one of none, covariate"),
        (lambda source, target: kind(given(source, 1), given(target, 1)), "a label shift was called a concept shift"),
        (lambda source, target: kind(source, np.divide(target, 2, out=target)), "changed the tables"),
        (lambda source, target: source + target[9], "your function stopped"),
        (lambda *a: None, "is expected, as text"),
    ],
    "08.2": [
        (lambda *a: 1.0, "you gave 1.000"),
        (lambda a, b, c, d: by_means(a, b, a, b), "ask the others"),
        (lambda a, b, c, d: by_means(c, d, c, d), "must not have seen them"),
        (by_means_pooled, "the larger domain weighs more"),
        (lambda *a: sum(errors(a[:2], a[2:])) / 2, "that is ε itself"),
        (lambda *a: 1 - sum(errors(a[:2], a[2:])) / 2, "the probe's accuracy"),
        (lambda *a: by_means(*a) / 2, "twice that is asked for"),
        (lambda *a: 2 - sum(errors(a[:2], a[2:])), "the error counts twice"),
        (lambda *a: -by_means(*a), "turned round"),
        (lambda *a: 2 * (1 - 2 * sum(errors(a[:2], a[2:]))), "ε is their mean"),
        (lambda *a: a[0].mean(dim=0), "one number"),
        (lambda a, b, c, d: by_means(a.sub_(1), b, c, d), "changed the tables themselves"),
        (lambda *a: None, "not NoneType"),
    ],
    "08.3": [
        (lambda *a: 0.05, "you gave 0.0500"),
        (lambda *a: p(*a, above=0, below=0), "above and below"),
        (lambda *a: p(*a, below=0), "divide by 1 + times"),
        (lambda *a: p(*a, above=0), "1 + reached"),
        (lambda *a: p(*a, reaches=np.greater), ">="),
        (lambda *a: 1 - p(*a), "does *not* reach"),
        (lambda *a: p(*a, reaches=np.less_equal), "the share below"),
        (lambda *a: p(*a, above=0, below=0) * len(a[3]), "a share is asked for"),
        (lambda measure, x, y, orders: p(measure, x, y, orders, size=len(y)), "as the source, not as the target"),
        (lambda measure, x, y, orders: p(measure, x, y, orders.sort(dim=1)[0]), "you gave 1.0000"),
        (lambda measure, x, y, orders: measure(x[orders], y), "your function stopped"),
        (lambda measure, x, y, orders: p(measure, x.mul_(2), y, orders), "changed the inputs"),
        (lambda *a: None, "not NoneType"),
    ],
    "08.4": [
        (lambda *a: (torch.zeros(3), torch.ones(3)), "with N ="),
        (lambda *a: statistics(*a, share=0), "the target's statistics alone"),
        (lambda *a: a[:2], "as they were"),
        (lambda *a: statistics(*a, share=0.5), "half and half"),
        (lambda *a: statistics(*a, share=len(a[2]) / (a[3] + len(a[2]))), "the weights are swapped"),
        (lambda *a: statistics(*a, share=a[3] / (a[3] + 24 * len(a[2]))), "target *pictures*"),
        (lambda *a: statistics(*a, correction=1), "correction=0"),
        (lambda mean, variance, maps, N: statistics(mean, variance, maps.mean(dim=(2, 3)), N, dim=0), "over the pictures' means"),
        (statistics_of_deviations, "mixes variances"),
        (lambda *a: (statistics(*a)[0], statistics(*a)[1].sqrt()), "that is a deviation"),
        (lambda *a: statistics(*a)[::-1], "yours are swapped"),
        (lambda *a: statistics(*a)[0], "two things are expected"),
        (lambda *a: (a[2].mean(), a[2].var()), "each channel has one mean"),
        (statistics_in_place, "changed the inputs"),
        (lambda *a: statistics(a[0][:2], a[1], a[2], a[3]), "your function stopped"),
        (lambda *a: None, "two things are expected"),
    ],
    "08.5": [
        (lambda source, target: torch.zeros_like(source), "the covariance of features"),
        (lambda source, target: source, "as they were"),
        (lambda source, target: target.repeat(3, 1)[: len(source)], "no linear map"),
        (lambda source, target: colour(source, target) - target.mean(0), "the mean is another one"),
        (lambda source, target: colour(source, target) - target.mean(0) + source.mean(0), "the source's own"),
        (lambda source, target: centred(source) @ torch.linalg.inv(root(source)).T, "that is whitened"),
        (lambda source, target: centred(source) + target.mean(0), "you moved the mean"),
        (colour_by_feature, "as the source's do"),
        (lambda source, target: centred(source) @ root(target).T + target.mean(0), "without whitening first"),
        (
            lambda source, target: centred(source) @ torch.linalg.inv(root(source)).T @ target.T.cov() + target.mean(0),
            "its root is wanted",
        ),
        (
            lambda source, target: centred(source) @ torch.linalg.inv(root(source)).T @ root(target) + target.mean(0),
            "turned round",
        ),
        (lambda source, target: colour(source, target)[torch.arange(len(source)).flip(0)], "no linear map"),
        (lambda source, target: colour(source.sub_(1), target), "changed the tables themselves"),
        (lambda source, target: source @ target, "your function stopped"),
        (lambda *a: "red", "a tensor"),
        (lambda *a: None, "a tensor"),
    ],
}
