"""Checks of lesson 06."""

import math
import random

import numpy as np
import torch

from course_utils.exercises import Exercise, NotYet, apart, call, indices, number


def rows_of(values, what: str) -> torch.Tensor:
    """What came to the spy as a table of float64."""
    try:
        table = values.detach().cpu() if isinstance(values, torch.Tensor) else torch.as_tensor(np.asarray(values))
        table = table.double()
    except (TypeError, ValueError, RuntimeError):
        raise NotYet(f"fit_predict got no table as its {what}, but {type(values).__name__}") from None
    return table


class Spy:
    """A fit_predict that notes which pictures it learned from and which it was asked about."""

    def __init__(self, features: torch.Tensor, labels: torch.Tensor, opinions: torch.Tensor) -> None:
        self.features, self.labels, self.opinions = features.double(), labels, opinions
        self.learned: list[list[int]] = []
        self.asked: list[list[int]] = []

    def find(self, values, what: str) -> list[int]:
        """The indices of the rows that were handed in."""
        table = rows_of(values, what)
        width = self.features.shape[1]
        if table.dim() != 2 or table.shape[1] != width:
            raise NotYet(f"fit_predict got {what} of shape {tuple(table.shape)}; (n, {width}) is expected")
        if len(table) == 0:
            raise NotYet(f"fit_predict got no rows as its {what}")
        distance = torch.cdist(table, self.features)
        if distance.min(dim=1).values.max() > 1e-4:
            raise NotYet(
                f"fit_predict got {what} that are no rows of `features`; hand them on as they are, it standardises itself"
            )
        return distance.argmin(dim=1).tolist()

    def __call__(self, train_features, train_labels, new_features):
        rest = self.find(train_features, "training features")
        own = rows_of(train_labels, "training labels").flatten().long()
        if len(own) != len(rest):
            raise NotYet(f"fit_predict got {len(rest)} rows to learn from and {len(own)} labels")
        if not torch.equal(own, self.labels[rest]):
            raise NotYet("fit_predict got labels that do not belong to their rows; index features and labels alike")
        held_out = self.find(new_features, "new features")
        self.learned.append(rest)
        self.asked.append(held_out)
        return self.opinions[held_out].clone()


def spied(answer, spy: Spy, *arguments):
    """What the answer returns; a complaint of the spy is the reason, though `call` takes it for a crash."""
    try:
        return call(answer, *arguments, spy)
    except NotYet as error:
        raise error.__cause__ if isinstance(error.__cause__, NotYet) else error from None


def cross_validate(answer) -> None:
    for _ in range(2):
        classes = random.randint(3, 5)
        sizes = random.sample(range(3, 9), 3)  # of the folds
        n = sum(sizes)
        while True:  # until every rest has every class; one that lacks a class comes below
            labels, folds = torch.randint(classes, (n,)), list(torch.randperm(n).split(sizes))
            rests = [torch.cat([fold for fold in folds if fold is not held_out]) for held_out in folds]
            if all(len(labels[rest].unique()) == classes for rest in rests):
                break
        features = torch.randn(n, random.randint(4, 6)) + torch.arange(n)[:, None]
        while True:  # until every mistake shows
            opinions = torch.where(torch.rand(n) < 0.6, labels, (labels + 1) % classes)
            right = (opinions == labels).double()
            scores = [right[fold].mean().item() for fold in folds]
            expected = sum(scores) / len(scores)
            mistakes = [
                (right.mean().item(), "that is the share over all pictures; take the mean of the folds' accuracies"),
                (scores[-1], "that is the last fold's accuracy alone; take the mean over the folds"),
                (scores[0], "that is the first fold's accuracy alone; take the mean over the folds"),
                (sum(scores), "that is the sum over the folds; divide by their number"),
                (1 - expected, "that is the share of errors; the accuracy is asked for"),
                (max(scores), "that is the best fold's accuracy; take the mean over the folds"),
            ]
            told_apart = [expected, *(value for value, _ in mistakes[:-1])]
            if apart(told_apart) and abs(max(scores) - expected) > 1e-3:
                break
        spy = Spy(features, labels, opinions)
        found = spied(answer, spy, features.clone(), labels.clone(), [fold.clone() for fold in folds])
        if not spy.asked:
            raise NotYet("fit_predict was never called; call it once for each fold")
        for rest, held_out in zip(spy.learned, spy.asked, strict=True):
            both = set(rest) & set(held_out)
            if both:
                raise NotYet(
                    f"{len(both)} of {len(held_out)} pictures that fit_predict was asked about were among those that it learned "
                    "from: it must learn from the rest alone"
                )
        for rest, held_out in zip(spy.learned, spy.asked, strict=True):
            fold = next((number for number, fold in enumerate(folds) if set(fold.tolist()) == set(held_out)), None)
            if fold is None:
                raise NotYet(f"fit_predict was asked about {len(held_out)} pictures that are no fold; folds are held-out indices")
            if sorted(rest) != sorted(rests[fold].tolist()):
                raise NotYet(f"fit_predict learned from {len(rest)} pictures; outside the fold there are {len(rests[fold])}")
        if len(spy.asked) != len(folds):
            raise NotYet(f"fit_predict was called {len(spy.asked)} times for {len(folds)} folds")
        value = number(found, "; give the mean over the folds")
        if abs(value - expected) > 1e-4:
            for wrong, reason in mistakes:
                if abs(value - wrong) < 1e-4:
                    raise NotYet(f"{reason}: {expected:.3f}, not {value:.3f}")
            said = ", ".join(f"{score:.3f}" for score in scores)
            raise NotYet(f"the accuracies on the folds were {said}, so their mean is {expected:.3f}, and you gave {value:.3f}")
    missing_class(answer)


def missing_class(answer) -> None:
    """A fold that holds out all pictures of a class: the rest cannot teach it."""
    classes = random.randint(3, 4)
    labels = torch.arange(classes).repeat(4)
    lonely = random.randrange(classes)
    alone = (labels == lonely).nonzero().flatten()
    others = (labels != lonely).nonzero().flatten()
    folds = [torch.cat([alone, others[:2]]), others[2:]]
    features = torch.randn(len(labels), 4) + torch.arange(len(labels))[:, None]
    try:
        call(answer, features, labels, folds, Spy(features, labels, labels))
    except NotYet as error:
        if isinstance(error.__cause__, ValueError):
            return
        raise
    raise NotYet(
        f"right where all is well. But of a fold that holds out every picture of class {lonely}, the rest cannot teach it, and a "
        "number came back: raise ValueError"
    )


def drawn_labels(classes: int, least: int) -> torch.Tensor:
    """Labels of classes of different sizes, `least` or more, in any order."""
    sizes = torch.randint(least, 2 * least + 5, (classes,))
    labels = torch.arange(classes).repeat_interleave(sizes)
    return labels[torch.randperm(len(labels))]


def folds_from(found, labels: torch.Tensor, count: int) -> list[list[int]]:
    """An answer as folds of indices."""
    if not isinstance(found, list | tuple):
        raise NotYet(f"a list of {count} folds is expected, not {type(found).__name__}")
    if len(found) != count:
        raise NotYet(f"{count} folds were asked for, and you gave {len(found)}")
    if all(isinstance(part, list | tuple) and len(part) == 2 and not isinstance(part[0], int) for part in found):
        raise NotYet("each fold came as a pair; give the held-out indices alone")
    return [indices(fold, len(labels)) for fold in found]


def stratified(answer) -> None:
    for _ in range(3):
        count, classes = random.randint(3, 5), random.randint(3, 6)
        labels, seed = drawn_labels(classes, count + 2), random.randrange(1000)
        given = labels.clone()
        folds = folds_from(call(answer, given, count, seed), labels, count)
        if not torch.equal(given, labels):
            raise NotYet("your function changed labels itself, and whoever gave them needs them; make a new tensor")
        everything = sorted(index for fold in folds for index in fold)
        if len(everything) != len(set(everything)):
            raise NotYet("a picture is held out more than once")
        if len(everything) != len(labels):
            raise NotYet(f"{len(everything)} of {len(labels)} pictures are held out by some fold; every one must be, once")
        table = torch.stack([torch.bincount(labels[fold], minlength=classes) for fold in folds])
        uneven = (table.max(dim=0).values - table.min(dim=0).values).argmax().item()
        most, least = table[:, uneven].max().item(), table[:, uneven].min().item()
        if most - least > 1:
            raise NotYet(
                f"of class {uneven}, one fold holds out {most} pictures and another {least}; deal each class out evenly, so that "
                "they differ by one at most"
            )
        again = folds_from(call(answer, labels.clone(), count, seed), labels, count)
        if [sorted(fold) for fold in folds] != [sorted(fold) for fold in again]:
            raise NotYet("the same seed gave other folds the second time")
        others = [folds_from(call(answer, labels.clone(), count, seed + more), labels, count) for more in (1, 2, 3)]
        if all([sorted(fold) for fold in folds] == [sorted(fold) for fold in other] for other in others):
            raise NotYet("every seed gives the same folds; shuffle the pictures of each class by the seed")
    refuses(answer)


def refuses(answer) -> None:
    """Bad input: a class smaller than the folds, and fewer pictures than folds."""
    count = random.randint(4, 6)
    small = torch.cat([drawn_labels(3, count + 2), torch.full((count - 1,), 3)])
    small = small[torch.randperm(len(small))]
    few = torch.randint(2, (count - 1,))
    for labels, said in (
        (small, f"class 3 has {count - 1} pictures: one of {count} folds would lack it"),
        (few, f"there are {len(few)} pictures for {count} folds: one fold would be empty"),
    ):
        try:
            call(answer, labels, count, 0)
        except NotYet as error:
            if isinstance(error.__cause__, ValueError):
                continue
            raise
        raise NotYet(f"right where all is well. But {said}, and folds came back: raise ValueError")


class Score:
    """A score of one number, higher is better, that notes what it was asked and has no pattern."""

    def __init__(self) -> None:
        self.asked: list[float] = []
        self.given: list[float] = []

    def __call__(self, value):
        try:
            self.asked.append(float(value))
        except (TypeError, ValueError, RuntimeError):
            raise NotYet(f"score takes one number, and got {type(value).__name__}") from None
        self.given.append(random.random())
        return self.given[-1]


def off_even(values: list[float]) -> float:
    """How far values in [0, 1] are from evenly spread: the Kolmogorov-Smirnov distance."""
    ordered, n = np.sort(values), len(values)
    steps = np.arange(n)
    return float(max((ordered - steps / n).max(), ((steps + 1) / n - ordered).max()))


def searched(answer, low: float, high: float, budget: int, seed: int) -> tuple[Score, float, float]:
    """One search of the answer's: what was asked, and the pair that it gave."""
    score = Score()
    try:
        found = call(answer, score, low, high, budget, seed)
    except NotYet as error:
        raise error.__cause__ if isinstance(error.__cause__, NotYet) else error from None
    if len(score.asked) != budget:
        more = "; keep the scores that you have" if len(score.asked) > budget else ""
        raise NotYet(f"the budget is {budget} tries, and score was called {len(score.asked)} times{more}")
    if not isinstance(found, list | tuple) or len(found) != 2:
        raise NotYet(f"a pair is expected, the best value and its score, not {type(found).__name__}")
    return score, number(found[0]), number(found[1])


def random_search(answer) -> None:
    for budget in (random.randint(8, 15), 400):
        low, decades, seed = 10 ** random.uniform(-5, -2), random.uniform(3, 6), random.randrange(1000)
        high = low * 10**decades
        score, value, its_score = searched(answer, low, high, budget, seed)
        outside = [one for one in score.asked if not low * 0.999 <= one <= high * 1.001]
        if outside:
            raise NotYet(f"{outside[0]:.3g} was tried, and does not lie between {low:.3g} and {high:.3g}")
        if budget == 400:
            places = [math.log(one / low) / math.log(high / low) for one in score.asked]
            if off_even(places) > 0.15:
                middle = sum(place > 0.5 for place in places) / budget
                linear = [(one - low) / (high - low) for one in score.asked]
                said = f"{middle:.0%} of your draws lie above {low * 10 ** (decades / 2):.2g}, the middle of the powers of ten"
                why = ": draw the logarithm evenly, then take it back" if off_even(linear) < 0.15 else "; half of them should"
                raise NotYet(f"{said}{why}")
        best, last = int(np.argmax(score.given)), len(score.given) - 1
        if (value, its_score) == (score.given[best], score.asked[best]):
            raise NotYet("the value comes first, then its score; yours are swapped")
        others = [
            (int(np.argmin(score.given)), "that is the worst try; higher scores are better"),
            (last, "that is the last try; keep the best"),
            (0, "that is the first try; keep the best"),
            (int(np.argmax(score.asked)), "that is the largest value; the best is the one with the highest score"),
        ]
        same = [why for which, why in others if which != best and math.isclose(value, score.asked[which], rel_tol=1e-6)]
        if same:
            raise NotYet(" Or: ".join(same))
        if not math.isclose(value, score.asked[best], rel_tol=1e-4):
            raise NotYet(f"the best of the values tried was {score.asked[best]:.4g}, and you gave {value:.4g}")
        if not math.isclose(its_score, score.given[best], rel_tol=1e-4):
            raise NotYet(f"{value:.4g} had the score {score.given[best]:.4f}, and you gave {its_score:.4f}")
        again = searched(answer, low, high, budget, seed)[0]
        if not np.allclose(score.asked, again.asked, rtol=1e-6):
            raise NotYet("the same seed drew other values the second time")
        other = searched(answer, low, high, budget, seed + 1)[0]
        if np.allclose(sorted(score.asked), sorted(other.asked), rtol=1e-6):
            raise NotYet("every seed tries the same values; draw them at random, by the seed")


def stopped(scores, patience, better=lambda score, best: score > best, wait=0, against_last=False) -> tuple[int, int]:
    """The epoch whose weights are kept and the epochs that were trained, from 1 on, by the rule or by a mistake."""
    best, kept, since = -math.inf, 0, 0
    for epoch, score in enumerate(scores, 1):
        reference = scores[epoch - 2] if against_last and epoch > 1 else best
        if better(score, reference):
            since = 0
        else:
            since += 1
        if better(score, best):
            best, kept = score, epoch
        if since >= patience + wait:
            return kept, epoch
    return kept, len(scores)


def stop(answer) -> None:
    patience = random.randint(2, 3)
    rising = sorted(random.sample(range(30, 70), 6))
    top = rising[-1]
    lower = [random.choice(rising[:-1]) - 20 for _ in range(3)]
    late = [*rising, *lower[:patience], *range(top + 1, top + 5)]  # what is best comes after the end
    wave = [top, *(top - 5 + k for k in range(patience)), top + 3]  # rises again, too late
    tie = [rising[0], top, *[top] * patience, top + 9]  # as good is not better
    dip = [rising[0], rising[1], *([rising[0]] * (patience - 1)), rising[2], rising[3]]  # patient enough
    cases = [late, wave, tie, dip, rising, sorted(rising, reverse=True), [rising[0]]]
    found = []
    for scores in ([score / 100 for score in case] for case in cases):
        pair = call(answer, list(scores), patience)
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise NotYet(f"two epochs are expected, (kept, trained), not {type(pair).__name__}")
        found.append((scores, stopped(scores, patience), tuple(number(part) for part in pair)))
    wrong = next((one for one in found if one[2] != one[1]), None)
    if wrong is None:
        return
    mistakes = [
        (lambda s, e: e[::-1], "the epoch that is kept comes first, then how many were trained; yours are swapped"),
        (lambda s, e: (e[0] - 1, e[1] - 1), "you count epochs from 0; count them from 1"),
        (lambda s, e: (e[0] - 1, e[1]), "the epoch that is kept is counted from 0; count it from 1"),
        (lambda s, e: (e[0], e[1] - 1), "the epochs that were trained are one too few"),
        (lambda s, e: (int(np.argmax(s)) + 1, len(s)), "you went on to the last score; training ends when patience does"),
        (lambda s, e: (int(np.argmax(s)) + 1, e[1]), "the best score of all came after the end, where nobody trained any more"),
        (lambda s, e: (e[1], e[1]), "you kept the last epoch; the weights of the best one are put back"),
        (lambda s, e: stopped(s, patience, wait=1), "you waited one epoch too long"),
        (lambda s, e: stopped(s, patience, wait=-1), "you waited one epoch too few"),
        (lambda s, e: stopped(s, patience, lambda a, b: a >= b), "a score that is only as good is no better: go on counting"),
        (lambda s, e: stopped(s, patience, against_last=True), "compare with the best score so far, not with the one before"),
    ]
    explained = (why for mistake, why in mistakes if all(mistake(s, e) == pair for s, e, pair in found))
    scores, expected, pair = wrong
    because = next(explained, "")
    raise NotYet(
        f"{because}{': ' if because else ''}for scores {scores} and a patience of {patience} it is {expected}, "
        f"and you gave ({pair[0]:g}, {pair[1]:g})"
    )


EXERCISES = {
    "06.1": Exercise(
        cross_validate,
        "For each fold, the rest is every index that is not in it. fit_predict learns from the rest and says the classes of the "
        "fold; compare them with the fold's labels. Before that, look whether labels[rest] has every class.",
    ),
    "06.2": Exercise(
        stratified,
        "Go through the classes one by one. Shuffle the indices of a class by the seed, and deal them out like cards: the first "
        "to the first fold, the second to the second, and round again. A class with fewer cards than folds is the bad case.",
    ),
    "06.3": Exercise(
        random_search,
        "Draw the exponent evenly between the logarithms of low and high, and take the power. Keep every value with its score, "
        "and pick the pair with the highest score at the end.",
    ),
    "06.4": Exercise(
        stop,
        "Go through the scores with their numbers. Remember the best one and its epoch. Count the epochs since then: a better "
        "score sets the count to 0, any other adds 1. When the count reaches the patience, training ends.",
    ),
}
