"""Checks of lesson 10."""

import math
import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from course_utils.exercises import Exercise, NotAttempted, NotYet, call, number, values_of


def tensor_of(found, shape, what: str) -> torch.Tensor:
    """An answer as a float64 tensor of the shape that is expected."""
    values = values_of(found, what)
    if values.shape != shape:
        raise NotYet(f"{what} keep their shape {tuple(shape)}, and yours have {tuple(values.shape)}")
    return values


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return torch.allclose(found, expected.double(), rtol=0, atol=1e-5)


def unchanged(given, kept) -> None:
    if not all(torch.equal(mine, its) for mine, its in zip(given, kept, strict=True)):
        raise NotYet("your function changed the pictures that it was given; make new ones")


def small_network(classes: int) -> nn.Module:
    """A smooth network on pixels, so that hardly a gradient is 0."""
    layers = nn.Conv2d(3, 6, 3), nn.Tanh(), nn.Flatten(), nn.LazyLinear(classes)
    return nn.Sequential(*layers).double()


def some_pixels(n: int, side: int = 5) -> torch.Tensor:
    """Pixels in [0, 1], many of them at its ends."""
    return (1.6 * torch.rand(n, 3, side, side, dtype=torch.double) - 0.3).clamp(0, 1)


def towards(answer) -> None:
    for n, classes in ((4, 5), (3, 3), (1, 4)):
        model, pixels = small_network(classes), some_pixels(n)
        truth = model(pixels).argmax(dim=1).detach()
        wanted = (truth + torch.randint(1, classes, (n,))) % classes
        epsilon = random.uniform(0.05, 0.2)
        asked = pixels.clone().requires_grad_()
        slope = {
            name: torch.autograd.grad(F.cross_entropy(model(asked), labels), asked)[0]
            for name, labels in (("wanted", wanted), ("truth", truth))
        }
        down = slope["wanted"].sign()
        expected = (pixels - epsilon * down).clamp(0, 1)
        kept = pixels.clone()
        found = tensor_of(call(answer, model, pixels, wanted, epsilon), pixels.shape, "the moved pictures")
        unchanged([pixels], [kept])
        if same(found, expected):
            continue
        length = slope["wanted"].flatten(1).norm(dim=1)[:, None, None, None]
        mistakes = {
            "those are the pictures as they came": pixels,
            "your step makes the wanted class *less* likely: it goes up its loss, and should go down": pixels + epsilon * down,
            "the direction is right, but some pixels leave [0, 1]: such a picture does not exist": pixels - epsilon * down,
            "that moves away from the model's own answer, and not towards the class that is wanted": pixels
            + epsilon * slope["truth"].sign(),
            "the gradient itself is tiny and differs from pixel to pixel; take its sign": pixels - epsilon * slope["wanted"],
            "you divided the gradient by its length; take its sign, pixel by pixel": pixels - epsilon * slope["wanted"] / length,
            "that is the change alone; add it to the pixels": -epsilon * down,
        }
        for reason, values in mistakes.items():
            if same(found, values) or same(found, values.clamp(0, 1)):
                raise NotYet(reason)
        far = (found - pixels).abs().max()
        if far > epsilon + 1e-6:
            raise NotYet(f"epsilon is {epsilon:.3f}, and you moved a pixel by {far:.3f}")
        off = (~torch.isclose(found, expected, atol=1e-5)).float().mean()
        raise NotYet(f"{off:.0%} of the pixels are not where they belong")


def nearest(answer) -> None:
    for n in (5, 3, 1):
        pixels = some_pixels(n, 4)
        radius = random.uniform(0.3, 0.5)
        moved = pixels + torch.randn_like(pixels) * 0.4
        moved[n // 2] = pixels[n // 2] + (moved[n // 2] - pixels[n // 2]) * 0.05  # inside already
        change = moved - pixels
        length = change.flatten(1).norm(dim=1)[:, None, None, None]
        shrunk = change * (radius / length).clamp(max=1)
        expected = (pixels + shrunk).clamp(0, 1)
        kept = moved.clone(), pixels.clone()
        found = tensor_of(call(answer, moved, pixels, radius), pixels.shape, "the pictures")
        unchanged([moved, pixels], kept)
        if same(found, expected):
            continue
        whole = change * min(1.0, radius / float(change.norm()))
        mistakes = {
            "those are the moved pictures as they came": moved,
            "that is the change; add it to the pictures from which it was measured": shrunk,
            "the length is right, but some pixels leave [0, 1]: clip last": pixels + shrunk,
            "every change got the length of the radius; one that is shorter stays as it is": pixels + change * radius / length,
            "that clips every pixel by itself, the ball of the lesson; here the *length* of the change is limited": pixels
            + change.clamp(-radius, radius),
        }
        if n > 1:
            mistakes["that is one length for all pictures together; each picture has a ball of its own"] = pixels + whole
        for reason, values in mistakes.items():
            if same(found, values) or same(found, values.clamp(0, 1)):
                raise NotYet(reason)
        clipped = moved.clamp(0, 1) - pixels
        first = clipped * (radius / clipped.flatten(1).norm(dim=1)[:, None, None, None]).clamp(max=1)
        if same(found, pixels + first):
            raise NotYet("you clipped to [0, 1] before the length was limited, and so it became too short: clip last")
        far = float((found - pixels).flatten(1).norm(dim=1).max())
        raise NotYet(
            f"the radius is {radius:.3f}, your longest change {far:.3f}, and pixels lie in {found.min():.2f} … {found.max():.2f}"
        )


def robust(answer) -> None:
    for attacks in (3, 2, 4):
        while True:
            n = random.randint(80, 150)
            clean = np.random.rand(n) < 0.9
            names = random.sample(["one step", "many steps", "another loss", "from another network", "noise"], attacks)
            after = {name: np.random.rand(n) < random.uniform(0.55, 0.85) for name in names}
            for found in after.values():
                found[np.flatnonzero(~clean)[:3]] = True  # wrong as it came, right after the attack
            every = np.logical_and.reduce(list(after.values()))
            expected = (clean & every).mean()
            rates = [found.mean() for found in after.values()]
            mistakes = {
                "that is the accuracy without any attack": clean.mean(),
                "that is the accuracy under the strongest single attack; another attack turns other pictures": min(rates),
                "that is the strongest single attack on pictures that were right before; count picture by picture": min(
                    (clean & found).mean() for found in after.values()
                ),
                "the mean over attacks lets a picture count for a half; it survives all of them, or it does not count": np.mean(
                    rates
                ),
                "a picture that was wrong before any attack does not count either": every.mean(),
                "you divided by the pictures that were right before; robust accuracy is a share of all pictures": expected
                / clean.mean(),
                "you count a picture that survives *one* of the attacks; it must survive every one": (
                    clean & np.logical_or.reduce(list(after.values()))
                ).mean(),
                "that is the share that falls": 1 - expected,
                "in percent that is right; a share is asked for": 100 * expected,
                "that is their number; a share is asked for": n * expected,
                "you multiplied the accuracies, as if the attacks had nothing in common": clean.mean() * np.prod(rates),
            }
            if np.diff(sorted([expected, *mistakes.values()])).min() > 1e-4:
                break
        found = number(
            call(answer, clean.copy(), {name: rows.copy() for name, rows in after.items()}), "; robust accuracy is one"
        )
        if math.isclose(found, expected, abs_tol=1e-6):
            continue
        for reason, value in mistakes.items():
            if math.isclose(found, value, abs_tol=1e-6):
                raise NotYet(reason)
        raise NotYet(f"of {n} pictures {round(n * expected)} survive everything, a share of {expected:.4f}; you gave {found:.4f}")


SIGNS = {
    "steps": "many steps leave *more* pictures right than one step does",
    "transfer": "pictures made on another network fool the model more often than those made on the model itself",
    "noise": "noise without any gradient fools the model more often than many steps along the gradient",
    "unlimited": "with epsilon 1, where every picture can become any other, some pictures still survive",
}


def signs_of(accuracy: dict[str, float]) -> set[str]:
    many = accuracy["many steps"]
    found = {
        "steps": many > accuracy["one step"],
        "transfer": accuracy["transfer"] < many,
        "noise": accuracy["noise"] < many,
        "unlimited": accuracy["epsilon 1"] > 0,
    }
    return {name for name, seen in found.items() if seen}


def drawn(wanted: set[str]) -> dict[str, float]:
    """Accuracies with exactly these signs."""
    many = random.uniform(0.35, 0.6)

    def beside(above: bool) -> float:
        return round(many + random.uniform(0.02, 0.3) * (1 if above else -1), 3)

    accuracy = {
        "one step": beside("steps" not in wanted),
        "many steps": round(many, 3),
        "transfer": beside("transfer" not in wanted),
        "noise": beside("noise" not in wanted),
        "epsilon 1": round(random.uniform(0.02, 0.3), 3) if "unlimited" in wanted else 0.0,
    }
    assert signs_of(accuracy) == wanted
    return accuracy


def diagnose(answer) -> None:
    names = list(SIGNS)
    cases = [set(), set(names), *({name} for name in names), *(set(names) - {name} for name in names)]
    cases += [{"one"}]  # all alike, below
    random.shuffle(cases)
    for wanted in cases:
        if wanted == {"one"}:
            wanted, accuracy = set(), dict.fromkeys(("one step", "many steps", "transfer", "noise"), 0.4) | {"epsilon 1": 0.0}
        else:
            accuracy = drawn(wanted)
        found = call(answer, dict(accuracy))
        if isinstance(found, str) or not isinstance(found, set | list | tuple | frozenset):
            raise NotYet(f"a set of names is expected, some of {names}, not {type(found).__name__}")
        if any(one is ... for one in found):
            raise NotAttempted
        if strange := [one for one in found if one not in names]:
            raise NotYet(f"there is no sign {strange[0]!r}; there are {names}")
        shown = ", ".join(f"{name} {value:.3f}" for name, value in accuracy.items())
        if missed := [name for name in names if name in wanted - set(found)]:
            raise NotYet(f"you missed {missed[0]!r} in ({shown}): {SIGNS[missed[0]]}")
        if extra := [name for name in names if name in set(found) - wanted]:
            raise NotYet(f"{extra[0]!r} is no sign in ({shown}); it is one where {SIGNS[extra[0]]}")


def checked(answer) -> None:
    n, side = random.randint(2, 5), random.randint(6, 9)
    bytes_ = torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8)
    bytes_[0, 0, 0, 0], bytes_[0, 0, 0, 1] = 255, 0
    floats = some_pixels(n, side).float()
    floats[0, 0, 0, 0], floats[0, 0, 0, 1] = 0.0, 1.0
    for given, expected, what in (
        (bytes_, bytes_.double() / 255, "whole numbers from 0 to 255"),
        (floats, floats.double(), "floats from 0 to 1"),
        (torch.zeros_like(floats), torch.zeros_like(floats).double(), "a batch of black pictures"),
        (torch.zeros_like(bytes_) + 1, torch.full(bytes_.shape, 1 / 255).double(), "whole numbers that are all 1, nearly black"),
    ):
        kept = given.clone()
        found = call(answer, given)
        unchanged([given], [kept])
        found = tensor_of(found, given.shape, "the pixels")
        if same(found, expected):
            continue
        if "all 1" in what:
            raise NotYet(f"{what}: the type says whether to divide by 255, and the largest value does not")
        if given.dtype == torch.uint8 and same(found, given.double()):
            raise NotYet("whole numbers go from 0 to 255: divide them by 255")
        if given.dtype != torch.uint8 and same(found, expected / 255):
            raise NotYet("floats from 0 to 1 are pixels already; do not divide them")
        raise NotYet(f"{what} are fine; you gave pixels from {found.min():.3f} to {found.max():.3f}")
    above, below, hollow, endless = (floats.clone() for _ in range(4))
    above[-1, 1, 2, 2], below[-1, 1, 2, 2] = 1 + random.uniform(0.01, 2), -random.uniform(0.01, 2)
    hollow[-1, 0, 1, 1], endless[-1, 2, 0, 0] = torch.nan, torch.inf
    for given, why in (
        (floats * 255, "floats up to 255"),
        (above, "one pixel above 1"),
        (below, "one pixel below 0"),
        (hollow, "a pixel that is not a number"),
        (endless, "a pixel that is infinite"),
        (floats[0], "one picture without a batch, (3, height, width)"),
        (floats[:, :1], "one channel"),
        (floats.permute(0, 2, 3, 1), "channels at the end"),
        (bytes_.long(), "whole numbers of type int64"),
        (floats > 0.5, "true and false"),
    ):
        try:
            found = answer(given.clone())
        except ValueError:
            continue
        except Exception as error:
            raise NotYet(f"for {why}, raise ValueError; yours stopped with {type(error).__name__}") from error
        raise NotYet(f"you let {why} pass; raise ValueError")


EXERCISES = {
    "10.1": Exercise(
        towards,
        "FGSM goes up the loss of the right class. Here a class is wanted: go *down* its loss. Sign, epsilon, clip.",
    ),
    "10.2": Exercise(
        nearest,
        "moved - pixels is the change. Flatten it from dimension 1 on and take the norm of each picture. Shorten what is too "
        "long by the factor radius / length, never above 1. Clip the pictures last.",
    ),
    "10.3": Exercise(
        robust,
        "Start with the clean array, and keep a True only where every other array has a True. Then the mean.",
    ),
    "10.4": Exercise(
        diagnose,
        'Each sign compares two numbers, all but the last with "many steps". A proper attack beats what knows less than it does.',
    ),
    "10.5": Exercise(
        checked,
        "Ask in this order: type, dimensions and channels, then the values. A comparison with nan is false, so ask that all "
        "values lie between 0 and 1, not that none lies outside.",
    ),
}
