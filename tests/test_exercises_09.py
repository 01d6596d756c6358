"""The checks of lesson 09 against answers that are right, wrong and missing."""

import numpy as np
import torch
import torch.nn.functional as F

from tests.exercise_tests import *  # noqa: F403


def loss_of(source, target, weight, bias):
    return (F.softplus(-(source @ weight + bias)).mean() + F.softplus(target @ weight + bias).mean()) / 2


def felt_by_autograd(source, target, weight, bias, strength):
    given = [own.clone().requires_grad_() for own in (source, target)]
    return [-strength * own for own in torch.autograd.grad(loss_of(*given, weight, bias), given)]


def felt(source, target, weight, bias, strength, sign=1.0, half=2, count=len, turned=False, forget=False):
    sure = [torch.sigmoid(own @ weight + (0 if forget else bias)) for own in (source, target)]
    pulls = (-sure[0], 1 - sure[1]) if turned else (1 - sure[0], -sure[1])
    return tuple(
        sign * strength * pull[:, None] * weight / (half * count(own)) for own, pull in zip((source, target), pulls, strict=True)
    )


def felt_in_numpy(source, target, weight, bias, strength):
    w = weight.numpy()
    parts = []
    for own, shift in ((source, 1), (target, 0)):
        sure = 1 / (1 + np.exp(-(own.numpy() @ w + bias)))
        parts.append(strength * (shift - sure)[:, None] * w / (2 * len(own)))
    return parts


def in_place(source, target, weight, bias, strength):
    found = felt(source, target, weight, bias, strength)
    source.zero_()
    return found


def cdan(discriminate, features, logits, detach=True, weigh=True, norm="own", sign=-1, order=(2, 1), labels=(1.0, 0.0), half=0.5):
    said = [(own.detach() if detach else own).softmax(dim=1) for own in logits]
    weights = [1 + torch.exp(sign * torch.special.entr(own).sum(dim=1)) for own in said]
    if norm == "own":
        weights = [own / own.mean() for own in weights]
    if norm == "both":
        weights = [own / torch.cat(weights).mean() for own in weights]
    total = 0.0
    for own, answers, weight, label in zip(features, said, weights, labels, strict=True):
        maps = (own.unsqueeze(order[0]) * answers.unsqueeze(order[1])).flatten(1)
        z = discriminate(maps)
        each = F.binary_cross_entropy_with_logits(z, torch.full_like(z, label), reduction="none")
        total = total + (weight * each if weigh else each).mean()
    return half * total


def cdan_in_loops(discriminate, features, logits):
    parts = []
    for own, said, label in zip(features, logits, (1, 0), strict=True):
        answers = torch.softmax(said, dim=1).detach()
        rows = [torch.outer(f, g).flatten() for f, g in zip(own, answers, strict=True)]
        sure = torch.sigmoid(discriminate(torch.stack(rows)))
        weights = torch.stack([1 + torch.exp((g * g.log()).sum()) for g in answers])
        parts.append(-(weights * torch.log(sure if label else 1 - sure)).sum() / weights.sum())
    return torch.stack(parts).mean()


def with_logits(discriminate, features, logits):
    """Multiplied with logits, and weighed by the softmax."""
    losses = []
    for own, said, sign in zip(features, logits, (-1, 1), strict=True):
        said = said.detach()
        weights = 1 + torch.exp(-torch.special.entr(said.softmax(dim=1)).sum(dim=1))
        maps = (own[:, :, None] * said[:, None]).flatten(1)
        losses.append((weights / weights.mean() * F.softplus(sign * discriminate(maps))).mean())
    return sum(losses) / 2


def features_detached(discriminate, features, logits):
    return cdan(discriminate, [own.detach() for own in features], logits)


def one_detached(discriminate, features, logits):
    return cdan(discriminate, [features[0], features[1].detach()], logits)


def verdict(discriminate, source, target, alive=lambda own: own is not None and bool((own != 0).any()), bound=0.6):
    given = [own.detach().clone().requires_grad_() for own in (source, target)]
    said = [discriminate(own) for own in given]
    loss = (F.softplus(-said[0]).mean() + F.softplus(said[1]).mean()) / 2
    if not any(map(alive, torch.autograd.grad(loss, given, allow_unused=True))):
        return "dead"
    return "at work" if ((said[0] > 0).float().mean() + (said[1] < 0).float().mean()) / 2 >= bound else "confused"


def verdict_by_logits(discriminate, source, target):
    """Dead where the logits are constant, which comes to the same here."""
    with torch.no_grad():
        said = [discriminate(own) for own in (source, target)]
    if torch.cat(said).unique().numel() == 1:
        return "dead"
    right = [(said[0] > 0).double().mean().item(), (said[1] < 0).double().mean().item()]
    return "confused" if np.mean(right) < 0.6 else "at work"


def verdict_by_loss(discriminate, source, target):
    loss = (F.softplus(-discriminate(source)).mean() + F.softplus(discriminate(target)).mean()) / 2
    return "dead" if abs(loss.item() - np.log(2)) < 0.02 else "at work" if loss < np.log(2) else "confused"


def verdict_by_accuracy(discriminate, source, target):
    right = (discriminate(source) > 0).float().mean() + (discriminate(target) < 0).float().mean()
    return "confused" if right / 2 < 0.6 else "at work"


def price(scores, accuracies):
    return float(np.mean([100 * (own.max() - own[said.argmax()]) for said, own in zip(scores, accuracies, strict=True)]))


def price_in_torch(scores, accuracies):
    scores, accuracies = torch.from_numpy(scores), torch.from_numpy(accuracies)
    return 100 * (accuracies.amax(dim=1) - accuracies.gather(1, scores.argmax(dim=1, keepdim=True))[:, 0]).mean()


def chosen(scores, accuracies):
    return accuracies[np.arange(len(scores)), scores.argmax(axis=1)]


RIGHT = {
    "09.1": [felt, felt_by_autograd, felt_in_numpy],
    "09.2": [cdan, cdan_in_loops],
    "09.3": [verdict, verdict_by_logits],
    "09.4": [price, price_in_torch],
}
WRONG = {
    "09.1": [
        (lambda *given: felt(*given[:4], 1.0, sign=-1), "plain gradient"),
        (lambda *given: felt(*given[:4], 1.0), "λ is missing"),
        (lambda *given: felt(*given, sign=-1), "wrong sign"),
        (lambda *given: felt(*given, half=1), "a half is missing"),
        (lambda *given: felt(*given, half=1, count=lambda own: len(given[0]) + len(given[1])), "its own number of pictures"),
        (lambda *given: felt(*given, count=lambda own: 1), "did not divide"),
        (lambda *given: felt(*given, turned=True), "other way round"),
        (lambda *given: felt(*given, forget=True), "the bias is missing"),
        (lambda *given: felt(*given)[::-1], "yours are swapped"),
        (lambda *given: [own.sum(dim=0) for own in felt(*given)], "every feature has its own"),
        (lambda source, target, *rest: (torch.zeros_like(source), torch.zeros_like(target)), "you gave 0.0000"),
        (lambda *given: 0.5, "two tensors are expected"),
        (in_place, "changed the tensors"),
    ],
    "09.2": [
        (lambda *given: cdan(*given, detach=False), "its gradient reaches the logits"),
        (lambda *given: cdan(*given, weigh=False), "the entropy is missing"),
        (lambda *given: cdan(*given, norm="raw"), "divide the weights by their mean"),
        (lambda *given: cdan(*given, norm="both"), "over that domain alone"),
        (lambda *given: cdan(*given, sign=1), "it is exp(-H)"),
        (lambda *given: cdan(*given, order=(1, 2)), "the classes outside"),
        (lambda *given: cdan(*given, labels=(0.0, 1.0)), "other way round"),
        (lambda *given: cdan(*given, half=1), "the sum of both domains"),
        (with_logits, "by a softmax"),
        (features_detached, "the gradient at the features is another one"),
        (one_detached, "the gradient at the features is another one"),
        (lambda *given: cdan(*given).item(), "no gradient comes back"),
        (lambda *given: torch.tensor(0.6931), "you gave 0.6931"),
    ],
    "09.3": [
        (lambda *given: "at work", "that is"),
        (lambda *given: "confused", "that is"),
        (lambda *given: "dead", "that is"),
        (lambda *given: "alive", "is expected, and you gave"),
        (verdict_by_loss, "that is"),
        (verdict_by_accuracy, "that is 'dead'"),
        (lambda *given: verdict(*given, alive=lambda own: own is not None and own.abs().max() > 1e-3), "but not zero"),
    ],
    "09.4": [
        (lambda *given: price(*given) / 100, "that is a share"),
        (lambda *given: -price(*given), "the price is positive"),
        (lambda s, a: 100 * (a.max(axis=1) - a[:, s.mean(axis=0).argmax()]).mean(), "chose one for all"),
        (lambda s, a: 100 * (a.mean(axis=0).max() - chosen(s, a).mean()), "one epoch for all"),
        (lambda s, a: 100 * (a.max() - chosen(s, a).mean()), "the best run alone"),
        (lambda s, a: 100 * (a.max(axis=1) - a[:, -1]).mean(), "the last epoch"),
        (lambda s, a: price(-s, a), "you took the lowest"),
        (lambda s, a: price(s, a) * len(s), "sum over runs"),
        (lambda s, a: 100 * chosen(s, a).mean(), "accuracy of what was chosen"),
        (lambda s, a: 100 * (a.max(axis=1) - chosen(s, a)), "one number, the mean over runs"),
        (lambda s, a: 2.0, "you gave 2.000"),
    ],
}
