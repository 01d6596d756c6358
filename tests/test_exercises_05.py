"""The checks of lesson 05 against answers that are right, wrong and missing."""

import copy
import math
from itertools import combinations, permutations

import numpy as np
import torch
from scipy.stats import kendalltau, pearsonr, spearmanr
from torch import nn

from tests.exercise_tests import *  # noqa: F403


def worth(labels, scratch, accuracy):
    if accuracy > max(scratch):
        return float("inf")
    return np.exp(np.interp(accuracy, scratch, np.log(labels)))


def worth_in_loops(labels, scratch, accuracy):
    if accuracy <= scratch[0]:
        return labels[0]
    for n, m, low, high in zip(labels, labels[1:], scratch, scratch[1:], strict=False):
        if low < accuracy <= high:
            return n * (m / n) ** ((accuracy - low) / (high - low))
    return math.inf


def worth_in_torch(labels, scratch, accuracy):
    x, y = torch.tensor(scratch, dtype=torch.float64), torch.tensor(labels, dtype=torch.float64).log2()
    if accuracy > x[-1]:
        return torch.tensor(float("inf"))
    at = int(torch.searchsorted(x, accuracy).clamp(1, len(x) - 1))
    share = ((accuracy - x[at - 1]) / (x[at] - x[at - 1])).clamp(min=0)
    return 2 ** (y[at - 1] + share * (y[at] - y[at - 1]))


def beyond(function):
    """An answer to 05.1 that knows where the curve ends, and asks `function` elsewhere."""
    return lambda labels, scratch, accuracy: math.inf if accuracy > scratch[-1] else function(labels, scratch, accuracy)


def nearest_point(labels, scratch, accuracy):
    return labels[min(range(len(labels)), key=lambda i: abs(scratch[i] - accuracy))]


def next_point(labels, scratch, accuracy):
    return next(n for n, a in zip(labels, scratch, strict=True) if a >= accuracy)


def redraw(network, count):
    new = copy.deepcopy(network)
    for layer in new[count:].modules():
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    return new


def redraw_by_kind(network, count):
    new = copy.deepcopy(network)
    for number, part in enumerate(new):
        for layer in part.modules():
            if number >= count and isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)
                nn.init.zeros_(layer.bias)
            if number >= count and isinstance(layer, nn.BatchNorm2d):
                nn.init.ones_(layer.weight)
                nn.init.zeros_(layer.bias)
                layer.reset_running_stats()
    return new


def redraw_by_apply(network, count):
    parts = [copy.deepcopy(part) for part in network]
    for part in parts[count:]:
        part.apply(lambda layer: layer.reset_parameters() if list(layer.parameters(recurse=False)) else None)
    return nn.Sequential(*parts)


def copy_into_a_new_one(network, count):
    new = redraw(network, 0)
    for mine, its in zip(new[:count], network[:count], strict=True):
        mine.load_state_dict(its.state_dict())
    return new


def reset(network, count, kinds=(nn.Conv2d, nn.BatchNorm2d), parts=None):
    """An answer to 05.2 that resets layers of some kinds in some parts of a copy."""
    new = copy.deepcopy(network)
    for part in new[count:] if parts is None else parts(new, count):
        for layer in part.modules():
            if isinstance(layer, kinds):
                layer.reset_parameters()
    return new


def reset_statistics_too(network, count):
    new = reset(network, count, nn.Conv2d)
    for layer in new[count:].modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
    return new


def reset_in_place(network, count):
    for layer in network[count:].modules():
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    return network


def shallow(network, count):
    return nn.Sequential(*network[:count], *redraw(network, 0)[count:])


def top_layers_alone(network, count):
    new = copy.deepcopy(network)
    for part in new[count:]:
        for layer in part:
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()
    return new


def filled(fill):
    """An answer to 05.2 that fills the weights of convolutions with something of its own."""

    def answer(network, count):
        new = redraw(network, count)
        for layer in new[count:].modules():
            if isinstance(layer, nn.Conv2d):
                fill(layer.weight)
        return new

    return answer


def seeded(network, count):
    torch.manual_seed(0)
    return redraw(network, count)


def measured_alone(network, count):
    new = redraw(network, count)
    for name, value in network.state_dict().items():
        if "running" in name:
            new.state_dict()[name].copy_(value)
    return new


def h_score(features, labels, inverse=torch.linalg.pinv):
    centred = features - features.mean(dim=0)
    means = torch.stack([centred[labels == one].mean(dim=0) for one in labels])
    return torch.trace(inverse(centred.T @ centred) @ (means.T @ means))


def h_score_in_numpy(features, labels):
    features, labels = features.numpy(), labels.numpy()
    means = np.array([features[labels == one].mean(axis=0) for one in labels])
    return np.trace(np.linalg.pinv(np.cov(features, rowvar=False)) @ np.cov(means, rowvar=False))


def h_score_by_angles(features, labels):
    """The same number: squared cosines between what the features span and what the classes span."""
    centred = (features - features.mean(dim=0)).numpy()
    values, sizes, _ = np.linalg.svd(centred, full_matrices=False)
    of_classes = np.linalg.qr(np.eye(int(labels.max()) + 1)[labels])[0]
    return float(((of_classes.T @ values[:, sizes > 1e-9 * sizes[0]]) ** 2).sum())


def covariances(total, between, over=1.0):
    """An answer to 05.3 that builds its two covariances in some other way."""

    def answer(features, labels):
        centred = features - features.mean(dim=0)
        means = torch.stack([centred[labels == one].mean(dim=0) for one in labels])
        return over * torch.trace(torch.linalg.pinv(total(centred, means)) @ between(centred, means))

    return answer


def square(table):
    return table.T @ table / len(table)


def each_class_once(features, labels):
    centred = features - features.mean(dim=0)
    means = torch.stack([centred[labels == one].mean(dim=0) for one in labels.unique()])
    return torch.trace(torch.linalg.pinv(centred.T.cov(correction=0)) @ means.T.cov(correction=0))


def not_centred(features, labels):
    means = torch.stack([features[labels == one].mean(dim=0) for one in labels])
    return torch.trace(torch.linalg.pinv(square(features)) @ square(means))


def judge(scores, accuracies):
    pairs = list(combinations(zip(scores, accuracies, strict=True), 2))
    signs = [1 if (a[0] - b[0]) * (a[1] - b[1]) > 0 else -1 for a, b in pairs]
    return sum(signs) / len(pairs), max(accuracies) - accuracies[scores.index(max(scores))]


def judge_in_numpy(scores, accuracies):
    a, b = (np.sign(np.subtract.outer(values, values)) for values in (scores, accuracies))
    n = len(scores)
    return np.array([(a * b).sum() / (n * (n - 1)), np.max(accuracies) - np.array(accuracies)[np.argmax(scores)]])


def judge_by_scipy(scores, accuracies):
    _, picked = max(zip(scores, accuracies, strict=True))
    return kendalltau(scores, accuracies).statistic, max(accuracies) - picked


def judge_in_torch(scores, accuracies):
    s, a = torch.tensor(scores, dtype=torch.float64), torch.tensor(accuracies, dtype=torch.float64)
    signs = [torch.sign((s[i] - s[j]) * (a[i] - a[j])) for i, j in permutations(range(len(s)), 2)]
    return [torch.stack(signs).mean(), a.max() - a[s.argmax()]]


def tau(change):
    """An answer to 05.4 whose regret is right, and whose tau is not."""
    return lambda scores, accuracies: (change(scores, accuracies), judge(scores, accuracies)[1])


def regret(change):
    """An answer to 05.4 whose tau is right, and whose regret is not."""
    return lambda scores, accuracies: (judge(scores, accuracies)[0], change(scores, accuracies))


def pairs_of(scores):
    return len(scores) * (len(scores) - 1) / 2


def picked(scores, accuracies):
    return accuracies[scores.index(max(scores))]


# exercise: answers that are right, in several styles
RIGHT = {
    "05.1": [worth, worth_in_loops, worth_in_torch, beyond(worth)],
    "05.2": [redraw, redraw_by_kind, redraw_by_apply, copy_into_a_new_one, reset],
    "05.3": [
        h_score,
        h_score_in_numpy,
        h_score_by_angles,
        lambda f, y: h_score(f.float(), y),
        covariances(lambda c, m: square(c), lambda c, m: square(m)),
    ],
    "05.4": [judge, judge_in_numpy, judge_by_scipy, judge_in_torch],
}
# exercise: [(a plausible wrong answer, a word of the reason that must help)]
WRONG = {
    "05.1": [
        (lambda labels, scratch, accuracy: 25, "it lies between"),
        (beyond(lambda labels, scratch, accuracy: float(np.interp(accuracy, scratch, labels))), "straight along their logarithm"),
        (lambda labels, scratch, accuracy: float(np.exp(np.interp(accuracy, scratch, np.log(labels)))), 'return float("inf")'),
        (beyond(lambda labels, scratch, accuracy: float(np.interp(accuracy, scratch, np.log(labels)))), "take exp of it"),
        (beyond(lambda *a: np.exp(np.interp(a[2], a[1], np.log10(a[0])))), "it lies between"),
        (beyond(nearest_point), "that is a point of the curve"),
        (beyond(next_point), "that is a point of the curve"),
        (lambda labels, scratch, accuracy: accuracy, "labels are asked for"),
        (
            lambda labels, scratch, accuracy: math.inf if accuracy < scratch[0] else worth(labels, scratch, accuracy),
            "the curve begins above",
        ),
        (lambda labels, scratch, accuracy: np.interp(labels, scratch, accuracy), "stopped with"),
        (lambda labels, scratch, accuracy: (labels[0], labels[1]), "not tuple"),
        (lambda *a: None, "not NoneType"),
        (25, "a function is expected here, not int"),
    ],
    "05.2": [
        (lambda network, count: None, "nothing came back"),
        (lambda network, count: network[:count], "the same 5 parts"),
        (lambda network, count: list(redraw(network, count)), "not list"),
        (lambda network, count: network, "that is the network that you got"),
        (lambda network, count: copy.deepcopy(network), "all still have the numbers"),
        (lambda network, count: redraw(network, 0), "stay as they are, and part 0 did not"),
        (reset_in_place, "that is the network that you got"),
        (lambda network, count: copy.deepcopy(reset_in_place(network, count)), "is not what it was"),
        (shallow, "shares numbers with the old one"),
        (lambda network, count: redraw(network, count + 1), "still has the old numbers"),
        (lambda network, count: redraw(network, max(count - 1, 0)), "and part "),
        (lambda network, count: reset(network, count, parts=lambda new, count: new[: 5 - count]), "you kept the last"),
        (lambda network, count: reset(network, count, nn.Conv2d), "a batch norm is new"),
        (reset_statistics_too, "a batch norm is new"),
        (measured_alone, "a batch norm is new"),
        (top_layers_alone, "part.modules() reaches every one"),
        (filled(nn.init.zeros_), "all of it is one number"),
        (filled(lambda weight: nn.init.constant_(weight, 0.1)), "all of it is one number"),
        (filled(nn.init.normal_), "too far from what PyTorch"),
        (seeded, "the same at every call"),
        (lambda network, count: network.reset_parameters(), "stopped with AttributeError"),
        (lambda network, count: [part.reset_parameters() for part in network[count:]], "stopped with AttributeError"),
    ],
    "05.3": [
        (lambda features, labels: 1.0, "and it is "),
        (covariances(lambda c, m: square(c), lambda c, m: square(c - m)), "that is within classes"),
        (covariances(lambda c, m: square(c - m), lambda c, m: square(m)), "divide by that of all features"),
        (each_class_once, "every class counts alike"),
        (not_centred, "you did not subtract the mean"),
        (lambda f, y: h_score(f, y, inverse=lambda table: table), "and it is "),
        (covariances(lambda c, m: torch.linalg.pinv(square(c)), lambda c, m: square(m)), "there is no inverse"),
        (covariances(lambda c, m: square(c), lambda c, m: m.T @ m), "a sum over the pictures"),
        (covariances(lambda c, m: c.T.cov(), lambda c, m: square(m)), "n - 1"),
        (covariances(lambda c, m: square(c), lambda c, m: m.T.cov()), "n - 1"),
        (covariances(lambda c, m: square(c), lambda c, m: square(m), over=100), "per cent"),
        (lambda f, y: h_score(f, y, inverse=torch.linalg.inv), "the pseudo-inverse, pinv"),
        (lambda features, labels: features, "the trace is one number"),
        (lambda features, labels: None, "not NoneType"),
    ],
    "05.4": [
        (lambda scores, accuracies: (0.5, 0.02), "you gave 0.500"),
        (lambda scores, accuracies: judge(scores, accuracies)[0], "two numbers are expected"),
        (lambda scores, accuracies: (*judge(scores, accuracies), 0), "and you gave 3"),
        (lambda scores, accuracies: judge(scores, accuracies)[::-1], "yours are swapped"),
        (tau(lambda s, a: (judge(s, a)[0] + 1) / 2), "subtract the share of pairs out of order"),
        (tau(lambda s, a: judge(s, a)[0] * pairs_of(s)), "divide by how many pairs"),
        (tau(lambda s, a: -judge(s, a)[0]), "its sign is turned round"),
        (tau(lambda s, a: judge(s, a)[0] / 2), "every pair counts once"),
        (tau(lambda s, a: pearsonr(s, a).statistic), "Pearson"),
        (tau(lambda s, a: spearmanr(s, a).statistic), "Spearman"),
        (regret(picked), "subtract it from the best"),
        (regret(lambda s, a: picked(s, a) - max(a)), "never negative"),
        (regret(lambda s, a: max(a) - a[s.index(min(s))]), "smallest"),
        (regret(lambda s, a: max(a) - sum(a) / len(a)), "minus the mean"),
        (regret(lambda s, a: picked(s, a) - min(a)), "regret is what was lost"),
        (lambda scores, accuracies: None, "not NoneType"),
    ],
}
