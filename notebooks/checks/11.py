"""Checks of lesson 11."""

import copy
import math
import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from course_utils.exercises import Exercise, NotAttempted, NotYet, call, number, values_of


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.shape == expected.shape and torch.allclose(found, expected.double(), rtol=1e-5, atol=1e-7)


def pair_of(found) -> tuple:
    """An answer as the two things that were asked for."""
    if not isinstance(found, tuple | list) or len(found) != 2:
        raise NotYet(f"two tensors are expected, the new weight and the new velocity, not {type(found).__name__}")
    if any(one is ... for one in found):
        raise NotAttempted
    return tuple(found)


def nesterov_by_torch(weight, gradient, velocity, lr, momentum):
    """The weight and the velocity after one step of PyTorch's own."""
    asked = nn.Parameter(weight.clone())
    optimizer = torch.optim.SGD([asked], lr=lr, momentum=momentum, nesterov=True)
    optimizer.state[asked]["momentum_buffer"] = velocity.clone()
    asked.grad = gradient.clone()
    optimizer.step()
    return asked.detach(), optimizer.state[asked]["momentum_buffer"]


def nesterov(answer) -> None:
    for shape in ((3, 4), (5,), (2, 2, 3)):
        weight, gradient, velocity = (torch.randn(shape, dtype=torch.double) for _ in range(3))
        lr, momentum = random.uniform(0.05, 0.3), random.uniform(0.6, 0.95)
        moved, fast = nesterov_by_torch(weight, gradient, velocity, lr, momentum)
        given = [one.clone() for one in (weight, gradient, velocity)]
        found = pair_of(call(answer, *given, lr, momentum))
        mine, pace = (values_of(one, what) for one, what in zip(found, ("the new weight", "the new velocity"), strict=True))
        if not all(torch.equal(a, b) for a, b in zip(given, (weight, gradient, velocity), strict=True)):
            raise NotYet("your function changed a tensor that it was given; make new ones")
        if mine.shape != moved.shape or pace.shape != moved.shape:
            raise NotYet(
                f"weight and velocity keep their shape {tuple(shape)}; yours have {tuple(mine.shape)} and {tuple(pace.shape)}"
            )
        if same(mine, moved) and same(pace, fast):
            continue
        if same(mine, fast) and same(pace, moved):
            raise NotYet("the weight comes first, then the velocity")
        weak = momentum * velocity + (1 - momentum) * gradient
        ahead = gradient + momentum * fast
        paces = {
            "the velocity is still the old one; return momentum · velocity + gradient": velocity,
            "your velocity gives the gradient a weight of 1 - momentum: *dampened*. Here its weight is 1": weak,
            "your velocity is the step that the weight takes; the velocity itself is momentum · velocity + gradient": ahead,
            "your velocity has the learning rate in it; here the rate comes in only where the weight moves": momentum * velocity
            - lr * gradient,
            "your velocity subtracts the gradient; it is a sum of gradients, and the minus comes where the weight moves": momentum
            * velocity
            - gradient,
            "your velocity is the gradient alone": gradient,
        }
        moves = {
            "the weight did not move": weight,
            "that is plain momentum, the weight follows the velocity. Nesterov adds the gradient to momentum · the *new* "
            "velocity": weight - lr * fast,
            "that is gradient descent without any momentum": weight - lr * gradient,
            "the weight goes up the slope: subtract": weight + lr * ahead,
            "the step lacks the learning rate": weight - ahead,
            "that is the step alone; add it to the weight": -lr * ahead,
            "your step gives the gradient a weight of 1 - momentum: *dampened*. Here its weight is 1": weight
            - lr * (gradient + momentum * weak),
            "the velocity with which the weight moves is momentum · velocity + gradient; the gradient comes once more": weight
            - lr * momentum * fast,
        }
        for reason, values in paces.items():
            if same(pace, values):
                raise NotYet(reason)
        for reason, values in moves.items():
            if same(mine, values):
                raise NotYet(reason)
        which = "velocity" if not same(pace, fast) else "weight"
        off = (mine - moved if which == "weight" else pace - fast).abs().max()
        raise NotYet(f"the new {which} is off by up to {off:.4f} from torch.optim.SGD(nesterov=True)")
    scale = torch.rand(4, dtype=torch.double) + 0.5  # now several steps, on a valley
    ours, velocity = torch.randn(4, dtype=torch.double), torch.zeros(4, dtype=torch.double)
    theirs = nn.Parameter(ours.clone())
    optimizer = torch.optim.SGD([theirs], lr=0.1, momentum=0.9, nesterov=True)
    for step in range(8):
        found = pair_of(call(answer, ours.clone(), 2 * scale * ours, velocity.clone(), 0.1, 0.9))
        ours, velocity = (values_of(one, "the weight") for one in found)
        theirs.grad = 2 * scale * theirs.detach()
        optimizer.step()
        if not same(ours, theirs.detach()):
            raise NotYet(f"from step {step + 1} on your weight is not that of torch.optim.SGD(nesterov=True)")


def wave(p: float, w: float) -> float:
    """Half a cosine, from 1 at progress w to 0 at progress 1."""
    return (1 + math.cos(math.pi * (p - w) / (1 - w))) / 2


def risen(p: float, w: float, low: float) -> float:
    return p / w if p < w else low + (1 - low) * wave(p, w)


def otherwise(fall):
    """The right rise, and a fall of another kind."""
    return lambda p, w, low: p / w if p < w else fall(p, w, low)


SCHEDULES = {
    "that is the same rate all the time": lambda p, w, low: 1.0,
    "the rise is right; after it the rate has to fall": otherwise(lambda p, w, low: 1.0),
    "there is no warm-up: before `warmup` the rate rises from 0": lambda p, w, low: risen(p, 0.0, low),
    "the fall is right, but before it the rate has to rise from 0 in a line": lambda p, w, low: (
        1.0 if p < w else risen(p, w, low)
    ),
    "your cosine starts at progress 0, so that the rate jumps where the warm-up ends; it starts at `warmup`": otherwise(
        lambda p, w, low: low + (1 - low) * wave(p, 0.0)
    ),
    "you multiplied the rise with a cosine over the whole of training; the cosine starts at `warmup`": lambda p, w, low: (
        min(1.0, p / w) * risen(p, 0.0, low)
    ),
    "the fall ends at 0; it is to end at `floor`": otherwise(lambda p, w, low: wave(p, w)),
    "the wave is cut off at `floor`, and the rate stands still there; let the wave itself end at `floor`": otherwise(
        lambda p, w, low: max(low, wave(p, w))
    ),
    "you lifted the whole wave, and so it starts above 1; it goes from 1 to `floor`": otherwise(
        lambda p, w, low: low + wave(p, w)
    ),
    "the fall is right; the rise starts at 0, and not at `floor`": lambda p, w, low: (
        low + (1 - low) * p / w if p < w else risen(p, w, low)
    ),
    "the fall is a line; half a cosine is asked for": otherwise(lambda p, w, low: 1 - (1 - low) * (p - w) / (1 - w)),
    "that is a whole wave: the rate comes back at the end. Half of one is asked for": otherwise(
        lambda p, w, low: low + (1 - low) * (1 + math.cos(2 * math.pi * (p - w) / (1 - w))) / 2
    ),
    "that is a quarter of a wave; half of one, lifted by 1 and halved, leaves gently and arrives gently": otherwise(
        lambda p, w, low: low + (1 - low) * math.cos(math.pi / 2 * (p - w) / (1 - w))
    ),
    "1 + cos goes from 2 to 0: halve it": otherwise(lambda p, w, low: low + (1 - low) * 2 * wave(p, w)),
    "the cosine alone falls to -1; add 1 and halve": otherwise(lambda p, w, low: low + (1 - low) * (2 * wave(p, w) - 1)),
    "the rise is a line from 0 to 1; yours is progress itself": lambda p, w, low: p if p < w else risen(p, w, low),
    "the rise is a line; yours is half a cosine too": lambda p, w, low: 1 - wave(p / w, 0.0) if p < w else risen(p, w, low),
    "your fall would end at progress 1 + warmup: it has only 1 - warmup of training": otherwise(
        lambda p, w, low: low + (1 - low) * wave(p - w, 0.0)
    ),
    "that is the schedule upside down": lambda p, w, low: 1 - risen(p, w, low),
}


def schedule(answer) -> None:
    for warmup in (random.uniform(0.2, 0.45), random.uniform(0.05, 0.2), 0.5):
        floor = random.uniform(0.1, 0.3)
        points = [0.0, *(warmup * random.uniform(0.1, 0.9) for _ in range(3)), warmup]
        points += [random.uniform(warmup + 0.02, 0.98) for _ in range(5)] + [0.99, 1.0]
        found = [number(call(answer, p, warmup, floor), "; one progress gives one") for p in points]

        def told(by, points=points, given=(warmup, floor), found=found):
            return all(math.isclose(mine, by(p, *given), abs_tol=1e-6) for p, mine in zip(points, found, strict=True))

        if told(risen):
            continue
        for reason, values in SCHEDULES.items():
            if told(values):
                raise NotYet(reason)
        worst = max(range(len(points)), key=lambda i: abs(found[i] - risen(points[i], warmup, floor)))
        at, side = points[worst], "rise" if points[worst] < warmup else "fall"
        raise NotYet(
            f"with warmup {warmup:.3f} and floor {floor:.3f}, at progress {at:.3f}, in the {side}, the factor is "
            f"{risen(at, warmup, floor):.4f}; you gave {found[worst]:.4f}"
        )
    for p, floor in ((0.0, 0.2), (random.uniform(0.1, 0.9), 0.0), (1.0, 0.0)):
        try:
            found = number(call(answer, p, 0.0, floor))
        except NotYet as reason:
            raise NotYet(f"warmup 0 means no rise, only the fall from 1; there {reason}") from None
        if not math.isclose(found, expected := risen(p, 0.0, floor), abs_tol=1e-6):
            raise NotYet(
                f"warmup 0 means no rise, only the fall from 1: with floor {floor}, at progress {p:.3f}, it is {expected:.4f}, "
                f"not {found:.4f}"
            )


def smoothed(losses: np.ndarray) -> np.ndarray:
    """The mean of each loss and its neighbours, two or one."""
    return np.array([losses[max(i - 1, 0) : i + 2].mean() for i in range(len(losses))])


def finite_part(losses: np.ndarray) -> np.ndarray:
    gone = np.flatnonzero(~np.isfinite(losses))
    return losses[: gone[0]] if len(gone) else losses


def range_test(kind: str) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
    """Rates, losses and answers: the right one under "", mistakes under their reasons."""
    n = random.randint(24, 32)
    rates = 10 ** np.linspace(random.uniform(-6, -5), random.uniform(0, 1), n)
    low, top = random.randint(n // 2, 2 * n // 3), random.uniform(2.2, 2.6)
    steps = np.arange(n)
    losses = top - random.uniform(0.5, 0.7) / (1 + np.exp(0.6 * low - steps)) + np.random.uniform(-0.02, 0.02, n)
    losses = losses + 0.02 * np.maximum(0, steps - low) ** 2
    if kind == "it jumps":  # the best rate is the last one before
        losses[low - 2 : low + 1] -= np.array([0.05, 0.15, 0.25])
    losses[random.randint(2, int(0.6 * low) - 3)] = losses.min() - random.uniform(0.1, 0.2)  # one easy batch
    if kind == "it jumps":
        losses[low + 1 :] = np.nan
    elif kind == "nan":
        losses[low + 4 :] = np.nan
    elif kind == "inf, and back":
        losses[low + 3] = np.inf
        losses[low + 4 :] = np.linspace(0.4, 0.1, n - low - 4)
    kept = finite_part(losses)
    smooth = smoothed(kept)
    best = rates[smooth.argmin()]
    answers = {
        "": best / 10,
        "that is the rate where the smoothed loss is lowest, the edge of what works; take a tenth of it": best,
        "you took the lowest single loss; one easy batch is lucky. Smooth first": rates[kept.argmin()] / 10,
        "you took the lowest single loss, and its own rate; smooth first, and take a tenth": rates[kept.argmin()],
        "you stopped where the loss falls steepest; take a tenth of the rate where it is lowest": rates[
            np.gradient(kept, np.log10(rates[: len(kept)])).argmin()
        ],
        "take a tenth of the rate, not ten times as much": best * 10,
        "that is the lowest loss; the rate is asked for": smooth.min(),
        "that is the place in the list; the rate is asked for": float(smooth.argmin()),
        "that is the smallest rate of the test": rates[0],
        "that is the largest rate of the test": rates[-1],
    }
    if kind == "it jumps":
        answers["smooth after the cut: a neighbour that is not finite spoils the mean of the last good loss"] = (
            rates[smooth.argmin() - 1] / 10
        )
    elif kind == "plain":
        padded = np.convolve(kept, np.ones(3) / 3, mode="same")
        answers["at the ends there are only two losses, and you divided their sum by three"] = rates[padded.argmin()] / 10
    if kind == "nan":
        answers["numpy takes nan for the lowest; cut where losses stop being finite, then smooth"] = rates[len(kept) - 1] / 10
    return rates, losses, answers


KINDS = {
    "plain": "where all losses are finite",
    "nan": "where losses end as nan",
    "it jumps": "where the lowest loss is the last before nan",
    "inf, and back": "with an infinite loss in between",
}


def chosen(answer) -> None:
    for kind, shown in KINDS.items():
        while True:
            rates, losses, answers = range_test(kind)
            mistakes = {reason: value for reason, value in answers.items() if reason}
            right = answers[""]
            if not any(math.isclose(right, value, rel_tol=1e-3) for value in mistakes.values()):
                break
        found = number(call(answer, rates.copy(), losses.copy()), "; one rate is asked for")
        if math.isclose(found, right, rel_tol=1e-6):
            continue
        if not math.isfinite(found):
            raise NotYet("your rate is not a finite number; cut the losses where they stop being finite")
        behind = rates[len(finite_part(losses)) :]
        if np.isclose(found, [behind, behind / 10], rtol=1e-6, atol=0).any():
            raise NotYet("from the first loss that is not finite on nothing counts, finite or not; cut there before you smooth")
        for reason, value in mistakes.items():
            if math.isclose(found, value, rel_tol=1e-6):
                raise NotYet(reason)
        raise NotYet(f"in a test {shown} the rate is {right:.3g}; you gave {found:.3g}")


def small_network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in model.parameters()]


def accumulation(answer) -> None:
    for loss, sizes, stale in (
        (F.cross_entropy, (5, 2, 7), False),
        (F.multi_margin_loss, (1, 6), True),
        (F.cross_entropy, (4, 4, 4, 3), True),
    ):
        model = small_network()
        parts = [(torch.randn(n, 3, 2, 2, dtype=torch.double), torch.randint(0, 3, (n,))) for n in sizes]
        n = sum(sizes)

        def slope(pictures, labels, model=model, loss=loss):
            return torch.autograd.grad(loss(model(pictures), labels), list(model.parameters()))

        each = [slope(*part) for part in parts]
        own = [torch.zeros_like(p) for p in model.parameters()]
        if stale:  # what an earlier step left
            own = [torch.randn_like(p) for p in model.parameters()]
            for parameter, left in zip(model.parameters(), own, strict=True):
                parameter.grad = left.clone()

        def summed(factors, each=each, start=None):
            start = [0.0] * len(each[0]) if start is None else start
            return [sum((f * g[k] for f, g in zip(factors, each, strict=True)), start[k]) for k in range(len(each[0]))]

        share = [size / n for size in sizes]
        last = [0.0] * (len(sizes) - 1)
        expected = summed(share)
        largest = []
        hook = model.register_forward_hook(lambda module, given, out, seen=largest: seen.append(len(given[0])))
        before = copy.deepcopy(model.state_dict())
        try:
            call(answer, model, loss, [(pictures.clone(), labels.clone()) for pictures, labels in parts])
        finally:
            hook.remove()
        found = gradients(model)

        def told(values, found=found):
            return all(same(mine, its) for mine, its in zip(found, values, strict=True))

        if any(not torch.equal(value, before[name]) for name, value in model.state_dict().items()):
            raise NotYet("your function changed the weights; it is to leave gradients, and the optimiser's step comes later")
        if max(largest, default=0) > max(sizes):
            raise NotYet(
                f"{max(largest)} pictures went through the network at once, and the largest part has {max(sizes)}: "
                "give it one part at a time, that is what saves memory"
            )
        if told(expected):
            continue
        mistakes = {
            "no gradient arrived in .grad": [torch.zeros_like(p) for p in model.parameters()],
            "only the last part is left: forget the gradients before the first part, and not between": summed([*last, 1.0]),
            "only the last part is left, with its share: forget the gradients before the first part, and not between": summed(
                [*last, share[-1]]
            ),
            "the gradients of the parts are summed: with every part the step gets longer. Weigh each by its share of all "
            "pictures": summed([1.0] * len(sizes)),
            "that is the mean over parts; a picture in a small part counts for more than one in a large part. Weigh each part by "
            "its share of all pictures": summed([1 / len(sizes)] * len(sizes)),
            "that is the gradient of the *sum* over pictures; divide by their number": summed(list(sizes)),
            "every part got the weight of the first": summed([sizes[0] / n] * len(sizes)),
        }
        if stale:
            mistakes |= {
                "there is still what .grad held before; forget it first": summed(share, start=own),
                "you left what .grad held before, and added nothing": own,
            }
        for reason, values in mistakes.items():
            if told(values):
                raise NotYet(reason)
        if stale and told([mine + left for mine, left in zip(expected, own, strict=True)]):
            raise NotYet("there is still what .grad held before; forget it first")
        off = max(float((mine - its).abs().max()) for mine, its in zip(found, expected, strict=True))
        raise NotYet(f"with parts of {', '.join(map(str, sizes))} pictures, a gradient is off by {off:.4f}")


EXERCISES = {
    "11.1": Exercise(
        nesterov,
        "The velocity first: momentum times the old one, and the gradient. Then the weight goes down by lr times (the gradient, "
        "and momentum times the *new* velocity). Two lines.",
    ),
    "11.2": Exercise(
        schedule,
        "Ask first whether progress is below warmup. If not, how far is it on its way from warmup to 1? That share of half a "
        "turn, π, goes into the cosine. Last, squeeze what goes from 1 to 0 so that it goes from 1 to floor.",
    ),
    "11.3": Exercise(
        chosen,
        "np.isfinite says where losses still count, and the first False ends them. The slice [max(i - 1, 0) : i + 2] has a loss "
        "and the neighbours that there are.",
    ),
    "11.4": Exercise(
        accumulation,
        "backward adds to .grad. So what is to be added is the mean loss of a part times its share of all pictures. Count them "
        "first.",
    ),
}
