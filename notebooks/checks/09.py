"""Checks of lesson 09."""

import math
import random
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from course_utils.exercises import Exercise, NotYet, apart, call, near, number, values_of

close = partial(near, tolerance=1e-4)


def told(source, target, weight, bias, strength, halves=2.0, swapped=False, mean="own", derivative=True):
    """What arrives at the features in 09.1, or with one mistake."""
    sure = [torch.sigmoid(own @ weight + bias) for own in (source, target)]
    pull = [1 - sure[0], sure[1]] if derivative else sure
    if swapped:
        pull = [sure[0], 1 - sure[1]]
    signs = (-1, 1) if swapped else (1, -1)
    both = len(source) + len(target)
    counts = {"own": (len(source), len(target)), "both": (both / 2, both / 2), "none": (1, 1)}[mean]
    return [
        strength * sign * own[:, None] * weight / (halves * count) for sign, own, count in zip(signs, pull, counts, strict=True)
    ]


def felt(answer) -> None:
    for _ in range(3):
        n, m, width = random.randint(4, 6), random.randint(8, 11), random.randint(3, 7)
        source, target = torch.randn(n, width) + 0.5, torch.randn(m, width) - 0.5
        weight, bias, strength = torch.randn(width), random.uniform(0.2, 1.0), random.uniform(0.3, 0.8)
        kept = source.clone(), target.clone(), weight.clone()
        found = call(answer, source, target, weight, bias, strength)
        if not all(torch.equal(mine, its) for mine, its in zip((source, target, weight), kept, strict=True)):
            raise NotYet("your function changed the tensors themselves, and whoever gave them needs them")
        if not isinstance(found, tuple | list) or len(found) != 2:
            raise NotYet(f"two tensors are expected, for the source and for the target, not {type(found).__name__}")
        mine = [values_of(part, name) for part, name in zip(found, ("a gradient", "a gradient"), strict=True)]
        shapes = [tuple(part.shape) for part in mine]
        if shapes == [(m, width), (n, width)]:
            raise NotYet("the source comes first, then the target; yours are swapped")
        if shapes != [(n, width), (m, width)]:
            raise NotYet(f"every feature has its own: shapes {(n, width)} and {(m, width)}; you gave {shapes[0]} and {shapes[1]}")
        given = [part.double() for part in (source, target, weight)]
        right = told(*given, bias, strength)
        plain = [part / strength for part in right]
        mistakes = {
            "that is the plain gradient; the reversal multiplies it by -λ": [-part for part in plain],
            "the sign is turned, but λ is missing": plain,
            "right size, wrong sign: that is λ times the plain gradient, and the reversal multiplies by -λ": [
                -part for part in right
            ],
            "the loss is the mean of both domains: a half is missing": told(*given, bias, strength, halves=1.0),
            "each domain has a mean of its own: divide by its own number of pictures": told(*given, bias, strength, mean="both"),
            "every domain's part is a mean over its pictures; you did not divide by their number": told(
                *given, bias, strength, mean="none"
            ),
            "the source is 1 and the target 0; yours are the other way round": told(*given, bias, strength, swapped=True),
            "the derivative of log σ(z) is 1 - σ(z); you took σ(z) for the source": [
                told(*given, bias, strength, derivative=False)[0],
                right[1],
            ],
            "the bias is missing": told(*given, 0.0, strength),
        }
        if all(close(part, its) for part, its in zip(mine, right, strict=True)):
            continue
        for reason, parts in mistakes.items():
            if all(close(part, its) for part, its in zip(mine, parts, strict=True)):
                raise NotYet(reason)
        for name, part, its in zip(("source", "target"), mine, right, strict=True):
            if not close(part, its):
                raise NotYet(
                    f"at the first feature of the first {name} picture you gave {part[0, 0]:.4f}, and {its[0, 0]:.4f} arrives"
                )


def conditional(
    discriminate, features, logits, weigh="own", sign=-1, order="fc", soft=True, swapped=False, total=False, attach=False
):
    """The loss of 09.2, or with one mistake."""
    said = [own if attach else own.detach() for own in logits]
    answers = [own.softmax(dim=1) for own in said]
    factors = answers if soft else said
    shape = "nf,nc->nfc" if order == "fc" else "nf,nc->ncf"
    maps = [torch.einsum(shape, own, factor).flatten(1) for own, factor in zip(features, factors, strict=True)]
    weights = [1 + torch.exp(sign * torch.special.entr(own).sum(dim=1)) for own in answers]
    if weigh == "own":
        weights = [own / own.mean() for own in weights]
    elif weigh == "both":
        mean = torch.cat(weights).mean()
        weights = [own / mean for own in weights]
    elif weigh == "none":
        weights = [torch.ones_like(own) for own in weights]
    losses = [
        own * F.softplus(side * discriminate(part))
        for own, side, part in zip(weights, (1, -1) if swapped else (-1, 1), maps, strict=True)
    ]
    if total:
        return torch.cat(losses).mean()
    return (losses[0].mean() + losses[1].mean()) / 2


def cdan(answer) -> None:
    for _ in range(3):
        while True:
            n, m, width, classes = random.randint(4, 6), random.randint(7, 9), random.randint(3, 6), random.randint(3, 5)
            discriminate = nn.Sequential(nn.Linear(width * classes, 16), nn.Tanh(), nn.Linear(16, 1), nn.Flatten(0))
            for layer in (discriminate[0], discriminate[2]):
                nn.init.normal_(layer.weight, std=1.0)
            features = tuple(torch.randn(count, width, requires_grad=True) for count in (n, m))
            logits = tuple((2 * torch.randn(count, classes)).requires_grad_() for count in (n, m))
            given = discriminate, features, logits
            right = conditional(*given)
            expected = right.item()
            mistakes = {
                "no picture weighs more than another: the entropy is missing": conditional(*given, weigh="none"),
                "divide the weights by their mean, or the loss grows with them": conditional(*given, weigh="raw"),
                "each domain's weights are divided by their mean over that domain alone": conditional(*given, weigh="both"),
                "you let unsure pictures count for more: it is exp(-H)": conditional(*given, sign=1),
                "place i * classes + j is feature i times probability j; yours has the classes outside": conditional(
                    *given, order="cf"
                ),
                "you multiplied with the logits; probabilities are asked for, by a softmax": conditional(*given, soft=False),
                "the source is 1 and the target 0; yours are the other way round": conditional(*given, swapped=True),
                "that is one mean over all pictures; take each domain's mean, then the mean of both": conditional(
                    *given, total=True
                ),
                "that is the sum of both domains; the loss is their mean": 2 * conditional(*given),
            }
            values = {reason: value.item() for reason, value in mistakes.items()}
            if apart([expected, *values.values()], gap=1e-3):
                break
        found = call(answer, *given)
        value = number(found, "; a loss is one number")
        if not math.isclose(value, expected, rel_tol=1e-5, abs_tol=1e-4):
            for reason, other in values.items():
                if math.isclose(value, other, rel_tol=1e-5, abs_tol=1e-4):
                    raise NotYet(reason)
            raise NotYet(f"for {n} source and {m} target pictures you gave {value:.4f}, and the loss is {expected:.4f}")
        if not isinstance(found, torch.Tensor) or not found.requires_grad:
            raise NotYet("right number, but no gradient comes back: give the tensor itself, and detach the logits alone")
        mine = torch.autograd.grad(found, [*features, *logits], allow_unused=True)
        if any(own is not None and own.any() for own in mine[2:]):
            raise NotYet("right number, but its gradient reaches the logits: detach the predictions")
        wanted = torch.autograd.grad(right, features)
        if not all(own is not None and close(own.double(), its) for own, its in zip(mine[:2], wanted, strict=True)):
            raise NotYet(
                "right number, but the gradient at the features is another one: detach the predictions, and nothing else"
            )


class Held(nn.Module):
    """A linear discriminator: where the domains differ, along the first feature, its logit is `slope` times that feature."""

    def __init__(self, width: int, slope: float) -> None:
        super().__init__()
        self.last = nn.Linear(width, 1)
        with torch.no_grad():
            self.last.weight.zero_()
            self.last.weight[0, 0] = slope
            self.last.bias.zero_()

    def forward(self, features):
        return self.last(features).flatten()


def never_on(width: int) -> nn.Module:
    """A discriminator whose units are all off."""
    layers = nn.Linear(width, 8), nn.Linear(8, 1)
    with torch.no_grad():
        layers[0].bias.fill_(-1000.0)
    return nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.Flatten(0))


def in_softmax(width: int) -> nn.Module:
    """A discriminator that ends in a softmax over one unit."""
    return nn.Sequential(nn.Linear(width, 8), nn.ReLU(), nn.Linear(8, 1), nn.Softmax(dim=1), nn.Flatten(0))


CASES = {  # what it is: what makes it, whether the domains differ, the verdict, and what a mistaken verdict overlooks
    "softmax": (
        in_softmax,
        True,
        "dead",
        "its last layer is a softmax over one unit: no gradient comes back, whatever its loss is",
    ),
    "off": (never_on, True, "dead", "all its units are off and its logit is constant: no gradient comes back"),
    "zero": (lambda width: Held(width, 0.0), False, "dead", "its weights are zero: no gradient comes back"),
    "good": (lambda width: Held(width, 2.0), True, "at work", "a gradient comes back, and it is nearly always right"),
    "faint": (
        lambda width: Held(width, 0.01),
        True,
        "at work",
        "its loss is close to ln 2 and its gradient small, but not zero, and it is nearly always right; a loss does not tell",
    ),
    "fooled": (lambda width: Held(width, 1.5), False, "confused", "a gradient comes back, and it is right as often as a coin"),
    "upside down": (
        lambda width: Held(width, -1.0),
        True,
        "confused",
        "a gradient comes back, and it is nearly always wrong: source is above 0",
    ),
}


def verdict(answer) -> None:
    for name in random.sample(list(CASES), len(CASES)):
        make, differ, expected, reason = CASES[name]
        n, m, width = random.choice([40, 50]), random.choice([60, 80]), random.randint(3, 6)
        discriminate = make(width)
        source, target = torch.randn(n, width), torch.randn(m, width)
        half = torch.ones(m)
        half[::2] = -1
        source[:, 0], target[:, 0] = source[:, 0].abs() + 0.1, (target[:, 0].abs() + 0.1) * (-1 if differ else half)
        if not differ:
            source[::2, 0] *= -1
        found = call(answer, discriminate, source, target)
        if found not in {"dead", "confused", "at work"}:
            raise NotYet(f'"dead", "confused" or "at work" is expected, and you gave {found!r}')
        if found != expected:
            raise NotYet(f"{reason}; that is {expected!r}, and you said {found!r}")


def price(answer) -> None:
    for _ in range(3):
        while True:
            runs, epochs = random.randint(4, 7), random.randint(5, 8)
            accuracies = np.random.uniform(0.5, 0.9, (runs, epochs))
            scores = np.random.normal(size=(runs, epochs))
            at = scores.argmax(axis=1)
            own = accuracies[np.arange(runs), at]
            expected = 100 * (accuracies.max(axis=1) - own).mean()
            mistakes = {
                "that is a share; in points it is a hundred times as much": expected / 100,
                "the oracle gains, so the price is positive: yours is the other way round": -expected,
                "every run chooses its own epoch; you chose one for all by the mean score": 100
                * (accuracies.max(axis=1) - accuracies[:, scores.mean(axis=0).argmax()]).mean(),
                "the oracle chooses in every run; yours takes one epoch for all": 100
                * (accuracies.mean(axis=0).max() - own.mean()),
                "the oracle chooses in every run; yours looks at the best run alone": 100 * (accuracies.max() - own.mean()),
                "that compares with the last epoch; the score shall choose": 100
                * (accuracies.max(axis=1) - accuracies[:, -1]).mean(),
                "higher scores are better; you took the lowest": 100
                * (accuracies.max(axis=1) - accuracies[np.arange(runs), scores.argmin(axis=1)]).mean(),
                "that is the sum over runs; take the mean": expected * runs,
                "that is the accuracy of what was chosen": 100 * own.mean(),
            }
            if apart([expected, *mistakes.values()]) and expected > 0.5:
                break
        kept = scores.copy(), accuracies.copy()
        found = number(call(answer, scores, accuracies), "; a price is one number, the mean over runs")
        if not (np.array_equal(scores, kept[0]) and np.array_equal(accuracies, kept[1])):
            raise NotYet("your function changed the arrays themselves, and whoever gave them needs them")
        if math.isclose(found, expected, abs_tol=1e-6):
            continue
        for reason, other in mistakes.items():
            if math.isclose(found, other, abs_tol=1e-6):
                raise NotYet(reason)
        raise NotYet(f"for {runs} runs of {epochs} epochs you gave {found:.3f}, and it is {expected:.3f} points")


EXERCISES = {
    "09.1": Exercise(
        felt,
        "z = source @ weight + bias is a logit for each picture. Chain rule: the derivative of the loss by z, times that of z "
        "by the feature: weight. Mind the minus before the loss, the half, and the mean over each domain. Then times -λ.",
    ),
    "09.2": Exercise(
        cdan,
        "softmax(dim=1) of the detached logits. own[:, :, None] * answers[:, None, :] is (n, width, classes); flatten(1). "
        "-log σ(z) is F.softplus(-z). torch.special.entr(p) is -p log p, number by number. One domain after the other.",
    ),
    "09.3": Exercise(
        verdict,
        "Clone the features and let them require a gradient. torch.autograd.grad(loss, [source, target], allow_unused=True) has "
        "one for each. A loss near ln 2 proves nothing; a gradient of exactly 0 does.",
    ),
    "09.4": Exercise(
        price,
        "scores.argmax(axis=1) has one epoch a run. accuracies[np.arange(runs), epochs] takes one number from each row. The "
        "oracle's choice is the maximum of each row.",
    ),
}
