"""Checks of lesson 05."""

import math
import random
from itertools import combinations, pairwise

import numpy as np
import torch
from torch import nn

from course_utils.exercises import Exercise, NotYet, apart, call, number


def drawn_curve() -> tuple[list[int], list[float]]:
    """Numbers of labels a class, and accuracies that rise with them."""
    count = random.randint(4, 6)
    labels = [random.randint(2, 8)]
    while len(labels) < count:
        labels.append(round(labels[-1] * random.uniform(1.6, 4)))
    accuracies = [random.uniform(0.2, 0.5)]
    while len(accuracies) < count:
        accuracies.append(accuracies[-1] + (0.97 - accuracies[-1]) * random.uniform(0.3, 0.6))
    return labels, accuracies


def worth(answer) -> None:
    for where in ("between", "between", "between", "at", "above", "below"):
        while True:  # until every mistake shows
            labels, scratch = drawn_curve()
            place = random.randrange(1, len(labels))
            low, high = scratch[place - 1], scratch[place]
            accuracy = {
                "between": low + random.uniform(0.25, 0.75) * (high - low),
                "at": low,
                "above": scratch[-1] + random.uniform(0.2, 0.8) * (1 - scratch[-1]),
                "below": scratch[0] * random.uniform(0.5, 0.9),
            }[where]
            logarithm = float(np.interp(accuracy, scratch, np.log(labels)))
            expected = math.inf if where == "above" else math.exp(logarithm)
            straight = float(np.interp(accuracy, scratch, labels))
            mistakes = {
                "you went straight along the labels; go straight along their logarithm, and take exp of it at the end": straight,
                "that is the logarithm of the labels; take exp of it": logarithm,
                "that is the accuracy; labels are asked for": accuracy,
            }
            if where == "at":
                expected = labels[place - 1]
            if where != "between" or apart([expected, straight, logarithm, labels[place], labels[place - 1]]):
                break
        value = number(call(answer, list(labels), list(scratch), accuracy))
        if math.isclose(value, expected, rel_tol=1e-4):
            continue
        curve = ", ".join(f"{n}: {a:.3f}" for n, a in zip(labels, scratch, strict=True))
        said = f"for {accuracy:.3f} on the curve {curve} you gave {value:.2f}"
        if where == "above":
            raise NotYet(f'{said}; the curve does not reach {accuracy:.3f}: return float("inf")')
        if where == "below":
            raise NotYet(f"{said}; the curve begins above {accuracy:.3f}: return its first number of labels, {labels[0]}")
        if where == "at":
            raise NotYet(f"{said}; the curve has {accuracy:.3f} at {labels[place - 1]} labels")
        for reason, mistake in mistakes.items():
            if math.isclose(value, mistake, rel_tol=1e-3):
                raise NotYet(f"{said}: {reason}")
        if value in labels:
            raise NotYet(f"{said}: that is a point of the curve; what is asked for lies between two of them")
        raise NotYet(f"{said}; it lies between {labels[place - 1]} and {labels[place]} labels, at {expected:.2f}")


def drawn_network() -> nn.Sequential:
    """Parts with layers inside layers and batch norms, all away from where they began."""
    widths = random.sample(range(6, 11), 5)
    parts: list[nn.Module] = [nn.Sequential(nn.Conv2d(3, widths[0], 3, padding=1), nn.BatchNorm2d(widths[0]), nn.ReLU())]
    for before, after in pairwise(widths):
        inner = nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU())
        parts.append(nn.Sequential(inner, nn.Conv2d(after, after, 1)))
    network = nn.Sequential(*parts).train()
    with torch.no_grad():
        for value in network.parameters():
            value += 0.5 + torch.rand_like(value)
        for _ in range(3):
            network(2 * torch.randn(8, 3, 6, 6) + 1)
    return network.eval()


def state_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def memory(module: nn.Module) -> set[int]:
    return {value.data_ptr() for value in module.state_dict().values()}


def kept(found: nn.Sequential, before: dict[str, torch.Tensor]) -> list[int]:
    """The parts in which every number is the source's."""
    now = state_of(found)
    parts = range(len(found))
    return [n for n in parts if all(torch.equal(now[k], v) for k, v in before.items() if k.startswith(f"{n}."))]


def redraw_rest(answer) -> None:
    size = 5
    for count in (random.randint(1, 3), random.randint(1, 4), 0, size):
        network = drawn_network()
        before = state_of(network)
        results = []
        for _ in range(2):
            found = call(answer, network, count)
            if found is None:
                raise NotYet("nothing came back; return the new network")
            if not isinstance(found, nn.Sequential):
                raise NotYet(f"a torch.nn.Sequential is expected back, not {type(found).__name__}")
            if found is network:
                raise NotYet("that is the network that you got; make a copy, copy.deepcopy(network), and change that")
            if not same(state_of(network), before):
                raise NotYet("the network that you got is not what it was: copy.deepcopy(network) first, then change the copy")
            if {k: v.shape for k, v in state_of(found).items()} != {k: v.shape for k, v in before.items()}:
                raise NotYet(f"the new network needs the same {size} parts with the same names and shapes, so that weights fit")
            if memory(found) & memory(network):
                raise NotYet(
                    "the new network shares numbers with the old one, so training one would change the other: "
                    "copy.deepcopy copies them"
                )
            results.append(found)
        stay = kept(results[0], before)
        if len(stay) == size and count < size:
            raise NotYet(f"with count = {count} of {size} parts, all still have the numbers of the network that you got")
        said = f"with count = {count} of {size} parts, the first {count} stay as they are"
        for part in range(count):
            if part not in stay:
                if stay == list(range(size - count, size)):
                    raise NotYet(f"{said}; you kept the last {count}")
                moved = [k for k, v in state_of(results[0]).items() if k.startswith(f"{part}.") and not torch.equal(v, before[k])]
                raise NotYet(f"{said}, and part {part} did not: {moved[0]!r} is another now")
        for part in range(count, size):
            if part in stay:
                raise NotYet(f"{said}, the others are drawn anew; part {part} still has the old numbers")
            now, again = (state_of(found[part]) for found in results)
            old = state_of(network[part])
            for name in now:
                layer, _, kind = name.rpartition(".")
                place = f"{part}.{name}"
                if isinstance(network[part].get_submodule(layer), nn.BatchNorm2d):
                    fresh = 1.0 if kind in ("weight", "running_var") else 0.0
                    if (now[name] == fresh).all():
                        continue
                    if torch.equal(now[name], old[name]):
                        raise NotYet(f"{said}, and {place!r} did too: a batch norm is new with its weights and what it measured")
                    raise NotYet(f"{place!r} has {now[name].flatten()[0]:.2f}; a new batch norm has {fresh:.0f} there")
                if torch.equal(now[name], old[name]):
                    raise NotYet(
                        f"{said}, and {place!r} did too: layers stand inside layers, and part.modules() reaches every one"
                    )
                if kind == "weight" and torch.equal(now[name], again[name]):
                    why = "all of it is one number" if now[name].std() < 1e-6 else "it comes out the same at every call"
                    raise NotYet(f"{place!r} is not drawn: {why}; reset_parameters() draws")
                if kind == "weight" and not 1e-3 < now[name].std() < 0.85:
                    raise NotYet(
                        f"{place!r} is drawn with a deviation of {now[name].std():.3f}: too far from what PyTorch "
                        "takes for a new layer; reset_parameters() draws it right"
                    )


def shares(features: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """The H-score under "", and what mistakes give, by their reasons."""
    centred = features - features.mean(axis=0)
    classes = np.unique(labels)
    means = np.stack([centred[labels == name].mean(axis=0) for name in classes])
    rows = means[np.searchsorted(classes, labels)]
    n = len(features)
    total, between, within = centred.T @ centred / n, rows.T @ rows / n, (centred - rows).T @ (centred - rows) / n
    raw = np.stack([features[labels == name].mean(axis=0) for name in classes])[np.searchsorted(classes, labels)]
    expected = float(np.trace(np.linalg.pinv(total) @ between))
    return {
        "": expected,
        "that is within classes; take the covariance of the class means, one row for every picture": float(
            np.trace(np.linalg.pinv(total) @ within)
        ),
        "you divided by the covariance within classes; divide by that of all features": float(
            np.trace(np.linalg.pinv(within) @ between)
        ),
        "every class counts alike there; give every picture a row, its class's mean, so that large classes count more": float(
            np.trace(np.linalg.pinv(total) @ (means - means.mean(axis=0)).T @ (means - means.mean(axis=0)) / len(classes))
        ),
        "every class counts alike there, and over classes - 1; give every picture a row, its class's mean": float(
            np.trace(np.linalg.pinv(total) @ np.cov(means, rowvar=False))
        ),
        "you did not subtract the mean over all pictures": float(
            np.trace(np.linalg.pinv(features.T @ features / n) @ (raw.T @ raw / n))
        ),
        "that is a ratio of two traces; take the trace of the product, with the inverse of one": float(
            np.trace(between) / np.trace(total)
        ),
        "there is no inverse in it; take that of the covariance of all features": float(np.trace(total @ between)),
        "that is the sum over the whole product; its trace is asked for, the sum of the diagonal": float(
            (np.linalg.pinv(total) @ between).sum()
        ),
        "one covariance is over n and the other over n - 1; take both over the same": expected * (n - 1) / n,
        "one covariance is over n and the other over n - 1; take both over the same ": expected * n / (n - 1),
        "one of them is a sum over the pictures and the other a mean; take both over the same": expected * n,
    }


def h_score(answer) -> None:
    for constant in (False, False, True):
        while True:  # until every mistake shows
            classes, width = random.randint(3, 5), random.randint(4, 7)
            labels = torch.cat([torch.full((random.randint(8, 30),), name) for name in range(classes)])
            labels = labels[torch.randperm(len(labels))]
            turn = torch.linalg.qr(torch.randn(width, width, dtype=torch.float64)).Q
            mixing = turn * torch.empty(width, dtype=torch.float64).uniform_(0.5, 2)  # no direction so small that float32 fails
            corners = torch.randn(classes, width, dtype=torch.float64)
            features = (corners[labels] + torch.randn(len(labels), width, dtype=torch.float64)) @ mixing + 2
            if constant:
                features[:, random.randrange(width)] = random.choice([0.0, 1.0, -2.0])
            values = shares(features.numpy(), labels.numpy())
            if min(abs(value / values[""] - 1) for reason, value in values.items() if reason) > 2e-3:
                break
        try:
            found = call(answer, features.clone(), labels.clone())
        except NotYet as reason:
            if constant and "stopped with" in str(reason):
                raise NotYet(f"{reason}; a feature that never changes has no inverse: the pseudo-inverse, pinv, has") from None
            raise
        value = number(found, ": the trace is one number")
        if math.isclose(value, values[""], rel_tol=5e-4):
            continue
        said = f"for {len(labels)} pictures of {classes} classes you gave {value:.3f}, and it is {values['']:.3f}"
        if constant:
            raise NotYet(f"{said}, where one feature never changes: take the pseudo-inverse, pinv, instead of an inverse")
        for reason, mistake in values.items():
            if reason and math.isclose(value, mistake, rel_tol=5e-4):
                raise NotYet(f"{said}: {reason.strip()}")
        if math.isclose(value, 100 * values[""], rel_tol=5e-4):
            raise NotYet(f"{said}: that is in per cent")
        raise NotYet(said)


def judged(scores: list[float], accuracies: list[float]) -> tuple[float, float]:
    """Kendall's tau and the regret."""
    pairs = list(combinations(range(len(scores)), 2))
    agree = sum((scores[a] - scores[b]) * (accuracies[a] - accuracies[b]) > 0 for a, b in pairs)
    return 2 * agree / len(pairs) - 1, max(accuracies) - accuracies[int(np.argmax(scores))]


def judge(answer) -> None:
    for kind in ("drawn", "drawn", "drawn", "best", "turned"):
        while True:  # until every mistake shows
            count = random.randint(5, 8)
            accuracies = [random.uniform(0.3, 0.95) for _ in range(count)]
            scores = [random.uniform(-3, 3) for _ in range(count)]
            if kind == "best":
                scores = [10 * value - 8 for value in accuracies]
            if kind == "turned":
                scores = [-value for value in accuracies]
            tau, regret = judged(scores, accuracies)
            pairs = count * (count - 1) / 2
            wrong_tau = {
                "that is the share of pairs in order; subtract the share of pairs out of order": (tau + 1) / 2,
                "that is a number of pairs; divide by how many pairs there are": tau * pairs,
                "its sign is turned round": -tau,
                "you divided by n(n - 1); every pair counts once, so there are n(n - 1)/2": tau / 2,
                "that is Pearson's correlation, which looks at sizes; tau looks at order alone": float(
                    np.corrcoef(scores, accuracies)[0, 1]
                ),
                "that is Spearman's correlation of ranks; tau counts pairs": float(
                    np.corrcoef(np.argsort(np.argsort(scores)), np.argsort(np.argsort(accuracies)))[0, 1]
                ),
            }
            picked = accuracies[int(np.argmax(scores))]
            wrong_regret = {
                "that is the accuracy of the candidate that the score picks; subtract it from the best": picked,
                "its sign is turned round: best minus picked is never negative": -regret,
                "that is the best accuracy minus that of the candidate with the *smallest* score": max(accuracies)
                - accuracies[int(np.argmin(scores))],
                "that is the best accuracy minus the mean": max(accuracies) - float(np.mean(accuracies)),
                "that is what was gained over the worst candidate; regret is what was lost to the best": picked - min(accuracies),
            }
            near = min(a - b for a, b in combinations(sorted(scores, reverse=True), 2))
            if near < 1e-3 or not apart(accuracies):
                continue
            if kind != "drawn" or (
                apart([tau, *wrong_tau.values()]) and apart([regret, *wrong_regret.values()]) and regret > 0.01
            ):
                break
        found = call(answer, list(scores), list(accuracies))
        try:
            parts = [number(part) for part in found]
        except TypeError:
            raise NotYet(f"two numbers are expected, tau and regret, not {type(found).__name__}") from None
        if len(parts) != 2:
            raise NotYet(f"two numbers are expected, tau and regret, and you gave {len(parts)}")
        shown = " ".join(f"({score:.2f}, {accuracy:.2f})" for score, accuracy in zip(scores, accuracies, strict=True))
        said = f"for the scores and accuracies {shown}"
        right = [math.isclose(part, wanted, abs_tol=1e-5) for part, wanted in zip(parts, (tau, regret), strict=True)]
        if all(right):
            continue
        if all(math.isclose(part, wanted, abs_tol=1e-5) for part, wanted in zip(parts, (regret, tau), strict=True)):
            raise NotYet(f"{said}, tau comes first and then the regret; yours are swapped")
        for name, part, wanted, wrong in (("tau", parts[0], tau, wrong_tau), ("regret", parts[1], regret, wrong_regret)):
            if math.isclose(part, wanted, abs_tol=1e-5):
                continue
            stated = f"{said}, {name} is {wanted:.3f} and you gave {part:.3f}"
            for reason, mistake in wrong.items():
                if math.isclose(part, mistake, abs_tol=1e-5):
                    raise NotYet(f"{stated}: {reason}")
            raise NotYet(stated)


EXERCISES = {
    "05.1": Exercise(
        worth,
        "np.interp(x, xs, ys) goes straight between points whose xs rise. Here the accuracies are the xs, and the logarithms "
        "of the labels are the ys. It stays at the last point beyond the end, so ask first whether the curve gets there.",
    ),
    "05.2": Exercise(
        redraw_rest,
        "copy.deepcopy(network) copies everything. Then go through the parts from `count` on, and in each through its modules(): "
        "every layer that has numbers of its own has a method reset_parameters().",
    ),
    "05.3": Exercise(
        h_score,
        "Subtract the mean from the features. Make a second table of the same shape: in every row the mean of that picture's "
        "class. Each table T has the covariance T.T @ T / n. torch.linalg.pinv and torch.trace do the rest.",
    ),
    "05.4": Exercise(
        judge,
        "Take every pair of candidates once, with itertools.combinations. Is the one with the higher score also the one with the "
        "higher accuracy? For the regret, scores.index(max(scores)) is the candidate that the score picks.",
    ),
}
