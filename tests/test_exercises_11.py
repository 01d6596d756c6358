"""Answers to the exercises of lesson 11, right and wrong."""

import copy
import math

import numpy as np
import torch

from course_utils.training.optimizers import one_cycle
from tests.exercise_tests import *  # noqa: F403


def nesterov(weight, gradient, velocity, lr, momentum):
    velocity = momentum * velocity + gradient
    return weight - lr * (gradient + momentum * velocity), velocity


def nesterov_from_where_it_would_be(weight, gradient, velocity, lr, momentum):
    """The weight and the velocity moved at once, then the velocity's share of the look ahead."""
    fast = torch.add(gradient, velocity, alpha=momentum)
    return [torch.sub(weight, fast, alpha=lr * momentum) - lr * gradient, fast]


def nesterov_by_torch(weight, gradient, velocity, lr, momentum):
    asked = weight.clone().requires_grad_()
    optimizer = torch.optim.SGD([asked], lr=lr, momentum=momentum, nesterov=True)
    optimizer.state[asked]["momentum_buffer"] = velocity.clone()
    asked.grad = gradient
    optimizer.step()
    return asked, optimizer.state[asked]["momentum_buffer"]


def plain(weight, gradient, velocity, lr, momentum):
    velocity = momentum * velocity + gradient
    return weight - lr * velocity, velocity


def dampened(weight, gradient, velocity, lr, momentum):
    velocity = momentum * velocity + (1 - momentum) * gradient
    return weight - lr * (gradient + momentum * velocity), velocity


def with_the_rate_inside(weight, gradient, velocity, lr, momentum):
    velocity = momentum * velocity - lr * gradient
    return weight + momentum * velocity - lr * gradient, velocity


def in_place(weight, gradient, velocity, lr, momentum):
    velocity.mul_(momentum).add_(gradient)
    return weight - lr * (gradient + momentum * velocity), velocity


def keeps_the_step(weight, gradient, velocity, lr, momentum):
    moved, velocity = nesterov(weight, gradient, velocity, lr, momentum)
    return moved, gradient + momentum * velocity


def turned(answer):
    """The same with its two results changed about."""
    return lambda *given: answer(*given)[::-1]


def half(share):
    return (1 + math.cos(math.pi * share)) / 2


def warmup_cosine(progress, warmup, floor):
    if progress < warmup:
        return progress / warmup
    return floor + (1 - floor) * half((progress - warmup) / (1 - warmup))


def by_the_package(progress, warmup, floor):
    factor = one_cycle(warmup)(progress)
    return factor if progress < warmup else np.float64(floor + (1 - floor) * factor)


def by_sines(progress, warmup, floor):
    if progress < warmup:
        return torch.tensor(progress / warmup, dtype=torch.double)
    return 1 - (1 - floor) * math.sin(math.pi / 2 * (progress - warmup) / (1 - warmup)) ** 2


def then(fall, rise=lambda progress, warmup, floor: progress / warmup):
    return lambda progress, warmup, floor: (rise if progress < warmup else fall)(progress, warmup, floor)


def from_below(progress, warmup, floor):
    """Divides by the warm-up, whatever it is."""
    rise = min(1.0, progress / warmup)
    return rise if progress < warmup else warmup_cosine(progress, warmup, floor)


def stuck_at_the_start(progress, warmup, floor):
    return progress / max(warmup, 1e-9) if progress <= warmup else warmup_cosine(progress, warmup, floor)


def kept(losses):
    finite = np.isfinite(losses)
    return losses if finite.all() else losses[: finite.argmin()]


def smoothed(losses):
    return [np.mean(losses[max(0, i - 1) : i + 2]) for i in range(len(losses))]


def chosen_rate(rates, losses):
    return rates[np.argmin(smoothed(kept(losses)))] / 10


def chosen_by_convolution(rates, losses):
    good = kept(losses)
    ones = np.ones(len(good))
    smooth = np.convolve(good, np.ones(3), "same") / np.convolve(ones, np.ones(3), "same")
    return float(rates[smooth.argmin()]) * 0.1


def chosen_in_loops(rates, losses):
    good = []
    for loss in losses.tolist():
        if not math.isfinite(loss):
            break
        good.append(loss)
    best, at = math.inf, 0
    for i in range(len(good)):
        near = [good[j] for j in (i - 1, i, i + 1) if 0 <= j < len(good)]
        if sum(near) / len(near) < best:
            best, at = sum(near) / len(near), i
    return torch.tensor(rates)[at] / 10


def ignoring_what_is_not_finite(rates, losses):
    smooth = np.array(smoothed(losses))
    return rates[np.where(np.isfinite(smooth), smooth, np.inf).argmin()] / 10


def dropping_what_is_not_finite(rates, losses):
    finite = np.isfinite(losses)
    return rates[finite][np.argmin(smoothed(losses[finite]))] / 10


def steepest(rates, losses):
    good = kept(losses)
    return rates[np.gradient(good, np.log10(rates[: len(good)])).argmin()]


def forget(model):
    model.zero_grad()


def accumulated(model, loss, parts):
    forget(model)
    n = sum(len(labels) for _, labels in parts)
    for pictures, labels in parts:
        (loss(model(pictures), labels) * len(labels) / n).backward()


def accumulated_as_a_sum(model, loss, parts):
    model.zero_grad(set_to_none=False)
    for pictures, labels in parts:
        loss(model(pictures), labels, reduction="sum").backward()
    for parameter in model.parameters():
        parameter.grad /= sum(len(labels) for _, labels in parts)


def accumulated_by_hand(model, loss, parts):
    sums = [torch.zeros_like(parameter) for parameter in model.parameters()]
    for pictures, labels in parts:
        found = torch.autograd.grad(loss(model(pictures), labels), list(model.parameters()))
        sums = [one + len(labels) * gradient for one, gradient in zip(sums, found, strict=True)]
    n = sum(len(labels) for _, labels in parts)
    for parameter, one in zip(model.parameters(), sums, strict=True):
        parameter.grad = one / n


def weighed(factor, start=True, between=False):
    """Gradients of all parts, with `factor` of (sizes, place) as their weights."""

    def answer(model, loss, parts):
        sizes = [len(labels) for _, labels in parts]
        if start:
            forget(model)
        for k, (pictures, labels) in enumerate(parts):
            if between:
                forget(model)
            (loss(model(pictures), labels) * factor(sizes, k)).backward()

    return answer


def share(sizes, k):
    return sizes[k] / sum(sizes)


def at_once(model, loss, parts):
    forget(model)
    pictures, labels = (torch.cat(rows) for rows in zip(*parts, strict=True))
    loss(model(pictures), labels).backward()


def also_steps(model, loss, parts):
    accumulated(model, loss, parts)
    torch.optim.SGD(model.parameters(), lr=0.1).step()


def on_a_copy(model, loss, parts):
    accumulated(copy.deepcopy(model), loss, parts)


RIGHT = {
    "11.1": [nesterov, nesterov_from_where_it_would_be, nesterov_by_torch],
    "11.2": [warmup_cosine, by_the_package, by_sines],
    "11.3": [chosen_rate, chosen_by_convolution, chosen_in_loops],
    "11.4": [accumulated, accumulated_as_a_sum, accumulated_by_hand],
}
WRONG = {
    "11.1": [
        (lambda *given: (torch.zeros(3, 4), torch.zeros(3, 4)), "is off by up to"),
        (plain, "plain momentum"),
        (dampened, "*dampened*"),
        (with_the_rate_inside, "the learning rate in it"),
        (in_place, "changed a tensor"),
        (keeps_the_step, "the step that the weight takes"),
        (turned(nesterov), "the weight comes first"),
        (lambda w, g, v, lr, m: (2 * w - nesterov(w, g, v, lr, m)[0], m * v + g), "up the slope"),
        (lambda w, g, v, lr, m: (w - lr * g, m * v + g), "without any momentum"),
        (lambda w, g, v, lr, m: (w - lr * (g + m * v), m * v + g), "plain momentum"),
        (lambda w, g, v, lr, m: (w - (g + m * (m * v + g)), m * v + g), "lacks the learning rate"),
        (lambda w, g, v, lr, m: (w - lr * m * (m * v + g), m * v + g), "the gradient comes once more"),
        (lambda w, g, v, lr, m: (nesterov(w, g, v, lr, m)[0], v), "still the old one"),
        (lambda w, g, v, lr, m: (nesterov(w, g, v, lr, m)[0], m * v - g), "subtracts the gradient"),
        (lambda w, g, v, lr, m: (nesterov(w, g, v, lr, m)[0] - w, m * v + g), "the step alone"),
        (lambda w, g, v, lr, m: nesterov(w, g, v, m, lr), "is off by up to"),
        (lambda *given: nesterov(*given)[0], "two tensors are expected"),
        (lambda w, g, v, lr, m: (w[0], v[0]), "keep their shape"),
        (lambda *given: (None, None), "not NoneType"),
        (lambda *given: None, "not NoneType"),
    ],
    "11.2": [
        (lambda *given: 0.5, "the factor is"),
        (lambda *given: 1.0, "the same rate all the time"),
        (lambda progress, warmup, floor: warmup_cosine(progress, 0, floor), "there is no warm-up"),
        (then(warmup_cosine, lambda *given: 1.0), "in a line"),
        (then(lambda progress, warmup, floor: floor + (1 - floor) * half(progress)), "jumps where the warm-up ends"),
        (lambda p, w, floor: min(1, p / w) * (floor + (1 - floor) * half(p)), "multiplied the rise"),
        (then(lambda p, w, floor: half((p - w) / (1 - w))), "it is to end at `floor`"),
        (then(lambda p, w, floor: max(floor, half((p - w) / (1 - w)))), "cut off at `floor`"),
        (then(lambda p, w, floor: floor + half((p - w) / (1 - w))), "starts above 1"),
        (then(warmup_cosine, lambda p, w, floor: floor + (1 - floor) * p / w), "not at `floor`"),
        (then(lambda p, w, floor: 1 - (1 - floor) * (p - w) / (1 - w)), "the fall is a line"),
        (then(lambda p, w, floor: floor + (1 - floor) * half(2 * (p - w) / (1 - w))), "a whole wave"),
        (then(lambda p, w, floor: floor + (1 - floor) * half(p - w)), "1 + warmup"),
        (lambda p, w, floor: 1 - warmup_cosine(p, w, floor), "upside down"),
        (from_below, "warmup 0 means no rise"),
        (stuck_at_the_start, "warmup 0 means no rise"),
        (lambda *given: torch.zeros(5), "one progress gives one"),
        (lambda *given: "rises", "a number is expected"),
        (lambda *given: None, "not NoneType"),
    ],
    "11.3": [
        (lambda rates, losses: 1e-3, "you gave 0.001"),
        (lambda rates, losses: rates[np.argmin(smoothed(kept(losses)))], "take a tenth of it"),
        (lambda rates, losses: rates[np.argmin(kept(losses))] / 10, "the lowest single loss; one"),
        (lambda rates, losses: rates[np.argmin(kept(losses))], "the lowest single loss, and its own rate"),
        (lambda rates, losses: rates[np.argmin(smoothed(losses))] / 10, "numpy takes nan for the lowest"),
        (steepest, "falls steepest"),
        (lambda rates, losses: rates[np.convolve(kept(losses), np.ones(3) / 3, "same").argmin()] / 10, "at the ends"),
        (ignoring_what_is_not_finite, "a neighbour that is not finite"),
        (dropping_what_is_not_finite, "finite or not"),
        (lambda rates, losses: min(smoothed(kept(losses))), "that is the lowest loss"),
        (lambda rates, losses: np.argmin(smoothed(kept(losses))), "the place in the list"),
        (lambda rates, losses: rates[0], "the smallest rate"),
        (lambda rates, losses: rates[np.argmin(losses)] / 10, "the lowest single loss; one"),
        (lambda rates, losses: rates[-1], "the largest rate"),
        (lambda rates, losses: math.nan, "not a finite number"),
        (lambda rates, losses: rates / 10, "one rate is asked for"),
        (lambda rates, losses: None, "not NoneType"),
    ],
    "11.4": [
        (lambda model, loss, parts: torch.zeros(3), "no gradient arrived"),
        (lambda model, loss, parts: None, "no gradient arrived"),
        (weighed(lambda sizes, k: 1), "are summed"),
        (weighed(lambda sizes, k: 1 / len(sizes)), "the mean over parts"),
        (weighed(lambda sizes, k: sizes[k]), "the *sum* over pictures"),
        (weighed(lambda sizes, k: 1, between=True), "and not between"),
        (weighed(share, between=True), "with its share"),
        (weighed(lambda sizes, k: sizes[0] / sum(sizes)), "the weight of the first"),
        (weighed(share, start=False), "what .grad held before"),
        (weighed(lambda sizes, k: 0.1), "is off by"),
        (at_once, "one part at a time"),
        (also_steps, "changed the weights"),
        (on_a_copy, "no gradient arrived"),
        (lambda model, loss, parts: model.backward(), "stopped with AttributeError"),
    ],
}
