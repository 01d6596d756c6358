"""The checks of lesson 06 against answers that are right, wrong and missing."""

import math
import random

import numpy as np
import pytest
import torch
from sklearn.model_selection import KFold, StratifiedKFold

from tests.exercise_tests import *  # noqa: F403

pytestmark = pytest.mark.filterwarnings("ignore:The least populated class")


def cross_validate(
    features,
    labels,
    folds,
    fit_predict,
    leak=None,
    scaled=False,
    refuse=True,
    total=lambda scores, sizes: sum(scores) / len(scores),
    asked=lambda rest, fold: fold,
    taught=lambda labels, rest, fold: labels[rest],
    score=lambda right: right.float().mean().item(),
):
    """An answer to 06.1, right unless told otherwise."""
    if scaled:
        features = (features - features.mean(dim=0)) / features.std(dim=0)
    scores, everything = [], torch.arange(len(labels))
    for fold in folds:
        rest = everything[~torch.isin(everything, fold)]
        if refuse and len(labels[rest].unique()) < len(labels.unique()):
            raise ValueError("a class is missing from the rest")
        learned = rest if leak is None else leak(rest, fold)
        wanted = asked(rest, fold)
        scores.append(score(fit_predict(features[learned], taught(labels, learned, fold), features[wanted]) == labels[wanted]))
    return total(scores, [len(fold) for fold in folds])


def cross_validated(**changes):
    return lambda *arguments: cross_validate(*arguments, **changes)


def cross_validate_in_numpy(features, labels, folds, fit_predict):
    features, labels, scores = features.numpy(), labels.numpy(), []
    for fold in folds:
        rest = np.setdiff1d(np.arange(len(labels)), fold.numpy())
        if len(np.unique(labels[rest])) < len(np.unique(labels)):
            raise ValueError
        said = np.asarray(fit_predict(features[rest], labels[rest], features[fold.numpy()]))
        scores.append((said == labels[fold.numpy()]).mean())
    return np.mean(scores)


def cross_validate_in_loops(features, labels, folds, fit_predict):
    total = 0.0
    for held_out in folds:
        inside = set(held_out.tolist())
        rest = [i for i in range(len(labels)) if i not in inside]
        if {int(labels[i]) for i in held_out} - {int(labels[i]) for i in rest}:
            raise ValueError("nobody teaches that class")
        said = fit_predict([features[i].tolist() for i in rest], [int(labels[i]) for i in rest], features[held_out].tolist())
        total += sum(int(a) == int(labels[i]) for a, i in zip(said, held_out, strict=True)) / len(held_out)
    return torch.tensor(total / len(folds))


def shuffled_labels(labels, rest, fold):
    return labels[rest][torch.randperm(len(rest))]


def all_at_once(features, labels, folds, fit_predict):
    """Learns once from what no fold... has: from everything but the last fold."""
    rest = torch.cat(folds[:-1])
    return (fit_predict(features[rest], labels[rest], features[folds[-1]]) == labels[folds[-1]]).float().mean()


def folds_by_class(labels, count, seed, least=None, shuffle=True, share=None):
    """An answer to 06.2, right unless told otherwise."""
    generator, folds = torch.Generator().manual_seed(seed), [[] for _ in range(count)]
    if share is not None and len(labels) < count:
        raise ValueError
    for number in labels.unique():
        members = (labels == number).nonzero().flatten()
        if len(members) < (count if least is None else least):
            raise ValueError("too few")
        if shuffle:
            members = members[torch.randperm(len(members), generator=generator)]
        for place, index in enumerate(members.tolist()):
            folds[place % count].append(index)
    return [torch.tensor(fold, dtype=torch.long) for fold in folds]


def folds_by(**changes):
    return lambda *arguments: folds_by_class(*arguments, **changes)


def folds_in_numpy(labels, count, seed):
    values, (rng, order) = labels.numpy(), (np.random.default_rng(seed), np.empty(len(labels), int))
    for number in np.unique(values):
        members = rng.permutation(np.flatnonzero(values == number))
        if len(members) < count:
            raise ValueError(f"class {number} has {len(members)} pictures for {count} folds")
        order[members] = np.arange(len(members)) % count
    return tuple(np.flatnonzero(order == fold) for fold in range(count))


def folds_of_sklearn(labels, count, seed, careful=True, kind=StratifiedKFold):
    if careful and torch.bincount(labels).min() < count:
        raise ValueError("a class is too small")
    return [held_out for _, held_out in kind(count, shuffle=True, random_state=seed).split(labels, labels)]


def folds_at_random(labels, count, seed):
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return list(order.tensor_split(count))


def folds_of_equal_size(labels, count, seed):
    """Each class in equal parts, and what is left over is left out."""
    whole = folds_by_class(labels, count, seed)
    least = [min(int((labels[fold] == number).sum()) for fold in whole) for number in labels.unique()]
    return [torch.cat([fold[labels[fold] == number][: least[number]] for number in labels.unique()]) for fold in whole]


def rests(labels, count, seed):
    folds = folds_by_class(labels, count, seed)
    return [torch.cat([other for other in folds if other is not fold]) for fold in folds]


def pairs(labels, count, seed):
    return list(zip(rests(labels, count, seed), folds_by_class(labels, count, seed), strict=True))


def folds_by_global_seed(labels, count, seed):
    torch.seed()
    return folds_by_class(labels, count, torch.randint(10**6, ()).item())


def folds_that_sort(labels, count, seed):
    labels.copy_(labels.sort().values)
    return folds_by_class(labels, count, seed)


def one_fold_gets_the_rest(labels, count, seed):
    folds, generator = [[] for _ in range(count)], torch.Generator().manual_seed(seed)
    for number in labels.unique():
        members = (labels == number).nonzero().flatten()
        if len(members) < count:
            raise ValueError
        members = members[torch.randperm(len(members), generator=generator)]
        size = len(members) // count
        for fold in range(count):
            folds[fold] += members[fold * size : (fold + 1) * size if fold < count - 1 else None].tolist()
    return folds


def search(score, low, high, budget, seed, draw=None, keep=max, count=0, answer=None):
    """An answer to 06.3, right unless told otherwise."""
    rng = np.random.default_rng(seed)
    draw = draw or (lambda rng: low * (high / low) ** rng.random())
    tried = []
    for _ in range(budget + count):
        value = draw(rng)
        tried.append((value, score(value)))
    best = keep(tried, key=lambda pair: pair[1])
    return best if answer is None else answer(best, tried)


def searching(**changes):
    return lambda *arguments: search(*arguments, **changes)


def search_in_torch(score, low, high, budget, seed):
    generator = torch.Generator().manual_seed(seed)
    ends = torch.tensor([low, high], dtype=torch.float64).log()
    values = (ends[0] + (ends[1] - ends[0]) * torch.rand(budget, generator=generator, dtype=torch.float64)).exp()
    scores = torch.tensor([score(value) for value in values], dtype=torch.float64)
    return values[scores.argmax()], scores.max()


def search_in_loops(score, low, high, budget, seed):
    rng, best, its = random.Random(seed), None, -math.inf
    for _ in range(budget):
        value = 10 ** rng.uniform(math.log10(low), math.log10(high))
        if (found := score(value)) > its:
            best, its = value, found
    return best, its


def linear_search(score, low, high, budget, seed):
    return search(score, low, high, budget, seed, draw=lambda rng: rng.uniform(low, high))


def wrong_base(score, low, high, budget, seed):
    return search(score, low, high, budget, seed, draw=lambda rng: 10 ** rng.uniform(math.log(low), math.log(high)))


def search_a_grid(score, low, high, budget, seed):
    values = iter(np.geomspace(low, high, budget))
    return search(score, low, high, budget, seed, draw=lambda rng: next(values))


def score_twice(score, low, high, budget, seed):
    value, _ = search(score, low, high, budget, seed)
    return value, score(value)


def search_without_seed(score, low, high, budget, seed):
    return search(score, low, high, budget, None)


def stop(scores, patience, better=lambda score, best: score > best, wait=0, first=1):
    """An answer to 06.4, right unless told otherwise."""
    best, kept, waited = -math.inf, 0, 0
    for epoch, score in enumerate(scores, start=first):
        if better(score, best):
            best, kept, waited = score, epoch, 0
        else:
            waited += 1
        if waited == patience + wait:
            return kept, epoch
    return kept, len(scores) - 1 + first


def stopping(**changes):
    return lambda *arguments: stop(*arguments, **changes)


def stop_in_numpy(scores, patience):
    scores = np.asarray(scores)
    for epoch in range(len(scores)):
        best = int(np.argmax(scores[: epoch + 1]))
        if epoch - best >= patience:
            return best + 1, epoch + 1
    return int(np.argmax(scores)) + 1, len(scores)


def stop_in_torch(scores, patience):
    values = torch.tensor(scores, dtype=torch.float64)
    best = values.cummax(dim=0).values
    fresh = torch.cat([torch.tensor([True]), values[1:] > best[:-1]])
    kept = torch.where(fresh, torch.arange(len(values)), 0).cummax(dim=0).values
    ended = ((torch.arange(len(values)) - kept) >= patience).nonzero().flatten()
    last = int(ended[0]) if len(ended) else len(values) - 1
    return [kept[last] + 1, torch.tensor(last + 1)]


def stop_against_last(scores, patience):
    waited, kept = 0, 1
    for epoch in range(2, len(scores) + 1):
        waited = 0 if scores[epoch - 1] > scores[epoch - 2] else waited + 1
        kept = max(range(1, epoch + 1), key=lambda one: scores[one - 1])
        if waited == patience:
            return kept, epoch
    return kept, len(scores)


RIGHT = {
    "06.1": [cross_validate, cross_validate_in_numpy, cross_validate_in_loops],
    "06.2": [folds_by_class, folds_in_numpy, folds_of_sklearn],
    "06.3": [search, search_in_torch, search_in_loops],
    "06.4": [stop, stop_in_numpy, stop_in_torch],
}
WRONG = {
    "06.1": [
        (lambda *arguments: 0.8, "fit_predict was never called"),
        (cross_validated(leak=lambda rest, fold: torch.cat([rest, fold])), "it must learn from the rest alone"),
        (cross_validated(leak=lambda rest, fold: fold), "it must learn from the rest alone"),
        (cross_validated(leak=lambda rest, fold: fold, asked=lambda rest, fold: rest), "that are no fold"),
        (cross_validated(asked=lambda rest, fold: rest), "it must learn from the rest alone"),
        (cross_validated(asked=lambda rest, fold: fold[1:]), "that are no fold"),
        (cross_validated(leak=lambda rest, fold: rest[1:]), "outside the fold there are"),
        (cross_validated(scaled=True), "hand them on as they are"),
        (cross_validated(taught=shuffled_labels), "index features and labels alike"),
        (cross_validated(taught=lambda labels, rest, fold: labels[fold]), "to learn from and"),
        (cross_validated(total=lambda scores, sizes: scores[-1]), "the last fold's accuracy alone"),
        (cross_validated(total=lambda scores, sizes: sum(scores)), "divide by their number"),
        (cross_validated(total=lambda scores, sizes: max(scores)), "take the mean over the folds"),
        (
            cross_validated(total=lambda scores, sizes: np.average(scores, weights=sizes)),
            "take the mean of the folds' accuracies",
        ),
        (cross_validated(total=lambda scores, sizes: 1 - sum(scores) / len(scores)), "the share of errors"),
        (cross_validated(total=lambda scores, sizes: sum(scores) / len(scores) + 0.013), "so their mean is"),
        (cross_validated(total=lambda scores, sizes: torch.tensor(scores)), "give the mean over the folds"),
        (cross_validated(total=lambda scores, sizes: None), "not NoneType"),
        (cross_validated(refuse=False), "raise ValueError"),
        (all_at_once, "was called 1 times for 3 folds"),
        (lambda features, labels, folds, fit_predict: fit_predict(features, labels), "stopped with TypeError"),
    ],
    "06.2": [
        (lambda labels, count, seed: [[0], [1], [2], [3], [4], [5]][:count], "every one must be, once"),
        (lambda labels, count, seed: [[0, 1]] * count, "held out more than once"),
        (folds_at_random, "deal each class out evenly"),
        (lambda *arguments: folds_of_sklearn(*arguments, kind=KFold), "deal each class out evenly"),
        (one_fold_gets_the_rest, "differ by one at most"),
        (folds_of_equal_size, "every one must be, once"),
        (rests, "held out more than once"),
        (pairs, "give the held-out indices alone"),
        (folds_by(shuffle=False), "every seed gives the same folds"),
        (lambda labels, count, seed: folds_by_class(labels, count, 0), "every seed gives the same folds"),
        (folds_by_global_seed, "the same seed gave other folds"),
        (folds_that_sort, "changed labels itself"),
        (folds_by(least=1), "one of"),
        (lambda *arguments: folds_of_sklearn(*arguments, careful=False), "would lack it"),
        (folds_by(least=1, share=True), "would lack it"),
        (lambda labels, count, seed: folds_by_class(labels, count - 1, seed), "folds were asked for"),
        (lambda labels, count, seed: [fold + 1 for fold in folds_by_class(labels, count, seed)], "indices lie between 0 and"),
        (lambda labels, count, seed: torch.arange(len(labels)) % count, "a list of"),
        (lambda *arguments: None, "not NoneType"),
    ],
    "06.3": [
        (lambda score, low, high, budget, seed: (low, 1.0), "score was called 0 times"),
        (linear_search, "draw the logarithm evenly"),
        (wrong_base, "does not lie between"),
        (search_a_grid, "every seed tries the same values"),
        (score_twice, "keep the scores that you have"),
        (searching(count=-1), "score was called"),
        (searching(keep=min), "higher scores are better"),
        (searching(answer=lambda best, tried: tried[-1]), "the last try"),
        (searching(answer=lambda best, tried: tried[0]), "the first try"),
        (searching(answer=lambda best, tried: max(tried)), "the largest value"),
        (searching(answer=lambda best, tried: best[::-1]), "yours are swapped"),
        (searching(answer=lambda best, tried: best[0]), "a pair is expected"),
        (searching(answer=lambda best, tried: (best[0], 0.0)), "had the score"),
        (searching(answer=lambda best, tried: (2 * best[0], best[1])), "the best of the values tried"),
        (search_without_seed, "the same seed drew other values"),
        (lambda score, low, high, budget, seed: search(score, low, high, budget, 0), "every seed tries the same values"),
        (
            lambda score, low, high, budget, seed: search(lambda value: score([value]), low, high, budget, seed),
            "takes one number",
        ),
        (lambda *arguments: None, "score was called 0 times"),
    ],
    "06.4": [
        (lambda scores, patience: (6, 8), "it is ("),
        (lambda scores, patience: (int(np.argmax(scores)) + 1, len(scores)), "you went on to the last score"),
        (lambda scores, patience: (int(np.argmax(scores)) + 1, stop(scores, patience)[1]), "after the end"),
        (lambda scores, patience: (stop(scores, patience)[1],) * 2, "you kept the last epoch"),
        (lambda scores, patience: stop(scores, patience)[::-1], "yours are swapped"),
        (stopping(first=0), "you count epochs from 0"),
        (lambda scores, patience: (stop(scores, patience)[0] - 1, stop(scores, patience)[1]), "is counted from 0"),
        (lambda scores, patience: (stop(scores, patience)[0], stop(scores, patience)[1] - 1), "one too few"),
        (stopping(wait=1), "one epoch too long"),
        (stopping(wait=-1), "one epoch too few"),
        (stopping(better=lambda score, best: score >= best), "no better"),
        (stop_against_last, "not with the one before"),
        (lambda scores, patience: stop(scores, patience)[0], "two epochs are expected"),
        (lambda scores, patience: None, "not NoneType"),
    ],
}
REPEATS = 12
