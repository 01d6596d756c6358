"""Answers to the exercises of lesson 10, right and wrong."""

import numpy as np
import torch
import torch.nn.functional as F

from tests.exercise_tests import *  # noqa: F403


def slope(model, pixels, labels):
    asked = pixels.clone().requires_grad_()
    return torch.autograd.grad(F.cross_entropy(model(asked), labels), asked)[0]


def towards(model, pixels, wanted, epsilon):
    return (pixels - epsilon * slope(model, pixels, wanted).sign()).clamp(0, 1)


def towards_by_backward(model, pixels, wanted, epsilon):
    asked = pixels.detach().clone().requires_grad_()
    model(asked).log_softmax(dim=1)[torch.arange(len(wanted)), wanted].sum().backward()
    return torch.clamp(asked.detach() + epsilon * torch.sign(asked.grad), 0, 1)


def away(model, pixels, wanted, epsilon):
    own = model(pixels).argmax(dim=1)
    return (pixels + epsilon * slope(model, pixels, own).sign()).clamp(0, 1)


def towards_in_place(model, pixels, wanted, epsilon):
    return pixels.copy_(towards(model, pixels, wanted, epsilon))


def nearest(moved, pixels, radius, cap=1.0, clip=True):
    change = moved - pixels
    length = change.flatten(1).norm(dim=1)[:, None, None, None]
    factor = radius / length
    found = pixels + change * (factor.clamp(max=cap) if cap else factor)
    return found.clamp(0, 1) if clip else found


def nearest_by_renorm(moved, pixels, radius):
    change = torch.renorm(moved - pixels, p=2, dim=0, maxnorm=radius)
    return (pixels + change).clamp(0, 1)


def nearest_in_loops(moved, pixels, radius):
    found = []
    for after, before in zip(moved.numpy(), pixels.numpy(), strict=True):
        length = np.sqrt(((after - before) ** 2).sum())
        found.append(np.clip(before + (after - before) * min(1, radius / length), 0, 1))
    return np.stack(found)


def together(moved, pixels, radius):
    change = moved - pixels
    return (pixels + change * min(1.0, radius / change.norm().item())).clamp(0, 1)


def robust(clean, after):
    return np.logical_and.reduce([clean, *after.values()]).mean()


def robust_in_loops(clean, after):
    return sum(all([right, *(found[i] for found in after.values())]) for i, right in enumerate(clean)) / len(clean)


def robust_in_torch(clean, after):
    kept = torch.from_numpy(clean)
    for found in after.values():
        kept = kept & torch.from_numpy(found)
    return kept.float().mean()


def signs(accuracy, steps=True, transfer=True, noise=True, unlimited=True):
    many, found = accuracy["many steps"], set()
    if steps and many > accuracy["one step"]:
        found.add("steps")
    if transfer and accuracy["transfer"] < many:
        found.add("transfer")
    if noise and accuracy["noise"] < many:
        found.add("noise")
    if unlimited and accuracy["epsilon 1"] > 0:
        found.add("unlimited")
    return found


def signs_as_a_list(accuracy):
    return sorted(signs(accuracy))


def turned(accuracy):
    return {"steps", "transfer", "noise", "unlimited"} - signs(accuracy)


def loose(accuracy):
    found = signs(accuracy)
    return found | ({"steps"} if accuracy["many steps"] >= accuracy["one step"] else set())


def checked(pictures, low=True, high=True, finite=True, dims=True, types=True):
    if types and pictures.dtype != torch.uint8 and not pictures.is_floating_point():
        raise ValueError("type")
    if dims and (pictures.dim() != 4 or pictures.shape[1] != 3):
        raise ValueError("shape")
    pixels = pictures.float() / 255 if pictures.dtype == torch.uint8 else pictures
    if finite and not torch.isfinite(pixels).all():
        raise ValueError("finite")
    if (low and (pixels < 0).any()) or (high and (pixels > 1).any()):
        raise ValueError("range")
    return pixels


def checked_at_once(pictures):
    pixels = pictures / 255 if pictures.dtype == torch.uint8 else pictures
    known = pictures.dtype in (torch.uint8, torch.float16, torch.float32, torch.float64)
    if known and pixels.ndim == 4 and pixels.shape[1] == 3 and ((pixels >= 0) & (pixels <= 1)).all():
        return pixels
    raise ValueError("no pictures")


def checked_by_assert(pictures):
    assert pictures.dim() == 4
    return checked(pictures)


def guessed(pictures):
    """Divides where a value is above 1, whatever its type."""
    return checked(pictures.float() / 255 if pictures.max() > 1 else pictures.float())


RIGHT = {
    "10.1": [towards, towards_by_backward],
    "10.2": [nearest, nearest_by_renorm, nearest_in_loops],
    "10.3": [robust, robust_in_loops, robust_in_torch],
    "10.4": [signs, signs_as_a_list],
    "10.5": [checked, checked_at_once],
}
WRONG = {
    "10.1": [
        (lambda model, x, wanted, epsilon: torch.full((4, 3, 5, 5), 0.5), "you moved a pixel by"),
        (lambda model, x, wanted, epsilon: x, "as they came"),
        (lambda model, x, wanted, epsilon: (x + epsilon * slope(model, x, wanted).sign()).clamp(0, 1), "*less* likely"),
        (lambda model, x, wanted, epsilon: x - epsilon * slope(model, x, wanted).sign(), "leave [0, 1]"),
        (lambda model, x, wanted, epsilon: (x - epsilon * slope(model, x, wanted)).clamp(0, 1), "take its sign"),
        (lambda model, x, wanted, epsilon: towards(model, x, wanted, 2 * epsilon), "you moved a pixel by"),
        (lambda model, x, wanted, epsilon: -epsilon * slope(model, x, wanted).sign(), "the change alone"),
        (away, "own answer"),
        (towards_in_place, "changed the pictures"),
        (lambda model, x, wanted, epsilon: towards(model, x, wanted, epsilon)[0], "keep their shape"),
        (lambda *a: None, "not NoneType"),
    ],
    "10.2": [
        (lambda moved, pixels, radius: torch.zeros(5, 3, 4, 4), "your longest change"),
        (lambda moved, pixels, radius: moved, "as they came"),
        (lambda moved, pixels, radius: moved.clamp(0, 1), "as they came"),
        (lambda moved, pixels, radius: nearest(moved, pixels, radius, cap=None), "stays as it is"),
        (lambda moved, pixels, radius: nearest(moved, pixels, radius, clip=False), "clip last"),
        (lambda moved, pixels, radius: nearest(moved.clamp(0, 1), pixels, radius), "before the length was limited"),
        (lambda moved, pixels, radius: (pixels + (moved - pixels).clamp(-radius, radius)).clamp(0, 1), "every pixel by itself"),
        (together, "a ball of its own"),
        (lambda moved, pixels, radius: nearest(moved, pixels, radius, clip=False) - pixels, "that is the change"),
        (lambda moved, pixels, radius: moved.copy_(nearest(moved, pixels, radius)), "changed the pictures"),
        (lambda *a: None, "not NoneType"),
    ],
    "10.3": [
        (lambda clean, after: 0.5, "you gave 0.5000"),
        (lambda clean, after: clean.mean(), "without any attack"),
        (lambda clean, after: min(found.mean() for found in after.values()), "the strongest single attack; another"),
        (lambda clean, after: min((clean & found).mean() for found in after.values()), "picture by picture"),
        (lambda clean, after: np.mean([found.mean() for found in after.values()]), "the mean over attacks"),
        (lambda clean, after: np.logical_and.reduce(list(after.values())).mean(), "wrong before any attack"),
        (lambda clean, after: robust(clean, after) / clean.mean(), "a share of all pictures"),
        (lambda clean, after: (clean & np.logical_or.reduce(list(after.values()))).mean(), "it must survive every one"),
        (lambda clean, after: 1 - robust(clean, after), "the share that falls"),
        (lambda clean, after: 100 * robust(clean, after), "in percent"),
        (lambda clean, after: np.logical_and.reduce([clean, *after.values()]), "robust accuracy is one"),
        (lambda *a: None, "not NoneType"),
    ],
    "10.4": [
        (lambda accuracy: set(), "you missed"),
        (lambda accuracy: {"steps", "transfer", "noise", "unlimited"}, "is no sign in"),
        (lambda accuracy: signs(accuracy, steps=False), "you missed 'steps'"),
        (lambda accuracy: signs(accuracy, transfer=False), "you missed 'transfer'"),
        (lambda accuracy: signs(accuracy, noise=False), "you missed 'noise'"),
        (lambda accuracy: signs(accuracy, unlimited=False), "you missed 'unlimited'"),
        (loose, "'steps' is no sign"),
        (turned, "in ("),
        (lambda accuracy: bool(signs(accuracy)), "a set of names"),
        (lambda accuracy: {"masked"}, "there is no sign 'masked'"),
        (lambda *a: None, "not NoneType"),
    ],
    "10.5": [
        (lambda pictures: torch.zeros(4, 3, 8, 8), "the pixels keep their shape"),
        (lambda pictures: pictures.float(), "divide them by 255"),
        (lambda pictures: pictures.float() / 255, "do not divide them"),
        (guessed, "the largest value does not"),
        (lambda pictures: checked(pictures, low=False), "below 0"),
        (lambda pictures: checked(pictures, high=False), "up to 255"),
        (lambda pictures: checked(pictures, finite=False), "not a number"),
        (lambda pictures: checked(pictures, dims=False), "without a batch"),
        (lambda pictures: checked(pictures.float() if pictures.dtype != torch.uint8 else pictures), "true and false"),
        (lambda pictures: checked(pictures).clamp(0, 1) if pictures.dtype == torch.uint8 else pictures.clamp(0, 1), "up to 255"),
        (checked_by_assert, "AssertionError"),
        (lambda *a: None, "not NoneType"),
    ],
}
