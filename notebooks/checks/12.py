"""Checks of lesson 12."""

import copy
import math
import random

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from course_utils.exercises import Exercise, NotAttempted, NotYet, apart, call, indices, number, values_of


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return found.shape == expected.shape and torch.allclose(found, expected.double(), rtol=1e-5, atol=1e-6)


def column(share: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Shares (n,) so that they multiply the rows of a tensor of more dimensions."""
    return share.reshape(-1, *[1] * (like.dim() - 1))


def between(share: torch.Tensor, own: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return column(share, own) * own + (1 - column(share, own)) * other


def mixing(answer) -> None:
    for n, classes in ((6, 4), (7, 3), (3, 5)):
        while True:  # an order that is not its own inverse, and no neighbours of one class
            order, labels = torch.randperm(n), torch.randint(0, classes, (n,))
            if not torch.equal(order[order], torch.arange(n)) and (labels != labels[order]).any():
                break
        pictures, share = torch.rand(n, 3, 4, 5, dtype=torch.double), torch.rand(n, dtype=torch.double) * 0.7 + 0.05
        hard = F.one_hot(labels, classes).double()
        given = [pictures.clone(), labels.clone(), share.clone(), order.clone()]
        found = call(answer, *given, classes)
        if not isinstance(found, tuple | list) or len(found) != 2:
            raise NotYet(f"two tensors are expected, the mixed pictures and their targets, not {type(found).__name__}")
        if any(one is ... for one in found):
            raise NotAttempted
        mine, targets = values_of(found[0], "the mixed pictures"), values_of(found[1], "the targets")
        if not all(torch.equal(a, b) for a, b in zip(given, (pictures, labels, share, order), strict=True)):
            raise NotYet("your function changed what it was given; make new tensors")
        if mine.shape != pictures.shape:
            raise NotYet(f"the mixed pictures have the shape {tuple(pictures.shape)}, and yours have {tuple(mine.shape)}")
        if targets.shape == (n,):
            raise NotYet("one number a picture cannot name two classes; targets have a share for each class, (n, classes)")
        if targets.shape != (n, classes):
            raise NotYet(f"targets have the shape {(n, classes)}, and yours have {tuple(targets.shape)}")
        inverse = order.argsort()
        for values, rows, what in ((mine, pictures, "pictures"), (targets, hard, "targets")):
            if same(values, between(share, rows, rows[order])):
                continue
            mistakes = {
                f"the {what} are not mixed": rows,
                f"the {what} of the partners came alone": rows[order],
                f"share is what a picture keeps of *itself*; your {what} give it to the partner": between(
                    share, rows[order], rows
                ),
                f"every picture has a share of its own; your {what} take the first for all": between(
                    share[:1].expand(n), rows, rows[order]
                ),
                f"every picture has a share of its own; your {what} take the mean for all": between(
                    share.mean().expand(n), rows, rows[order]
                ),
                f"picture i has the partner order[i]; your {what} have it the other way round": between(
                    share, rows, rows[inverse]
                ),
                f"your {what} have their neighbour for a partner; picture i has order[i]": between(share, rows, rows.roll(1, 0)),
                f"picture i keeps share[i], and its partner's share does not matter; your {what} mix with both": column(
                    share, rows
                )
                * rows
                + ((1 - column(share, rows)) * rows)[order],
                f"your {what} are a plain mean of two": (rows + rows[order]) / 2,
                f"your {what} are a sum of two; the weights share and 1 - share add up to 1": rows + rows[order],
            }
            for reason, wrong in mistakes.items():
                if same(values, wrong):
                    raise NotYet(reason)
            if what == "targets" and not torch.allclose(values.sum(dim=1), torch.ones(n, dtype=torch.double), atol=1e-5):
                raise NotYet(f"the targets of a picture add up to 1; one row of yours adds up to {values.sum(dim=1)[0]:.3f}")
            off = (~torch.isclose(values, between(share, rows, rows[order]), atol=1e-5)).double().mean()
            raise NotYet(f"{off:.0%} of the values of your {what} are not what they should be")


def of_labels(rows: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return rows.gather(1, labels[:, None]).squeeze(1)


def extreme(n: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits so far apart that a softmax has zeros in it, and labels, some of them where it has."""
    logits, labels = torch.randn(n, classes, dtype=torch.double), torch.randint(0, classes, (n,))
    logits[torch.arange(n), torch.randint(0, classes, (n,))] += 2000
    logits[0, labels[0]] -= 5000
    return logits, labels


def learns(answer, logits, labels, *settings) -> None:
    """Raise `NotYet` for a loss through which no gradient comes back."""
    asked = logits.clone().requires_grad_()
    found = call(answer, asked, labels, *settings)
    if not (isinstance(found, torch.Tensor) and found.requires_grad):
        raise NotYet("the value is right, but no gradient comes back from it; stay in torch, without item, numpy or detach")
    (slope,) = torch.autograd.grad(found.sum(), asked, allow_unused=True)
    if slope is None or not torch.isfinite(slope).all() or not slope.any():
        raise NotYet("the value is right, but the gradient that comes back from it is 0 or not finite")


def told(found: float, expected: float) -> bool:
    return math.isclose(found, expected, rel_tol=1e-5, abs_tol=1e-7)


def smoothing(answer) -> None:
    for n, classes in ((6, 4), (5, 10), (8, 3)):
        while True:
            logits, labels = 2 * torch.randn(n, classes, dtype=torch.double), torch.randint(0, classes, (n,))
            amount = random.uniform(0.1, 0.4)
            logs = logits.log_softmax(dim=1)
            hard = F.one_hot(labels, classes).double()
            expected = F.cross_entropy(logits, labels, label_smoothing=amount).item()
            targets = (1 - amount) * hard + amount / classes
            others = (1 - amount) * hard + amount / (classes - 1) * (1 - hard)
            lacking = (1 - amount) * hard + amount / classes * (1 - hard)
            plain = F.cross_entropy(logits, labels).item()

            def crossed(weights, logs=logs):
                return float(-(weights * logs).sum(dim=1).mean())

            mistakes = {
                "that is cross-entropy without smoothing": plain,
                "you share `smoothing` among the *wrong* classes; all classes share it, the right one too": crossed(others),
                "your targets add up to less than 1: the right class gets smoothing / classes too": crossed(lacking),
                "you give 1 to the right class, and the smoothing besides; it gets 1 - smoothing": crossed(
                    hard + amount / classes
                ),
                "every class gets `smoothing` whole; they share it, smoothing / classes each": crossed(
                    (1 - amount) * hard + amount
                ),
                "you changed the two about: 1 - smoothing belongs to the label": crossed(amount * hard + (1 - amount) / classes),
                "cross-entropy has a minus: yours is upside down": -expected,
                "that is the sum over pictures; the loss is their mean": n * expected,
                "you took the mean over classes too; sum over classes, mean over pictures": expected / classes,
                "that is the divergence, without the targets' own entropy. Its gradient is the same, its value is not": expected
                - float(-(targets * targets.log()).sum(dim=1).mean()),
                "logits are no log-probabilities yet: log_softmax": float(-(targets * logits).sum(dim=1).mean()),
                "you took probabilities where their logarithms belong": float(-(targets * logs.exp()).sum(dim=1).mean()),
            }
            if apart([expected, *mistakes.values()], 1e-3):
                break
        found = number(call(answer, logits.clone(), labels.clone(), amount), "; a loss is the mean over pictures")
        if told(found, expected):
            continue
        for reason, value in mistakes.items():
            if told(found, value):
                raise NotYet(reason)
        raise NotYet(f"with smoothing {amount:.3f} and {classes} classes the loss is {expected:.4f}; you gave {found:.4f}")
    plain = F.cross_entropy(logits, labels).item()
    if not told(number(call(answer, logits.clone(), labels.clone(), 0.0)), plain):
        raise NotYet("with smoothing 0 it is plain cross-entropy")
    far, labels = extreme(6, 4)
    found, expected = number(call(answer, far.clone(), labels, 0.1)), F.cross_entropy(far, labels, label_smoothing=0.1).item()
    if not math.isfinite(found):
        raise NotYet(f"with logits far apart your loss is {found}: a softmax has zeros there, and their logarithm is not finite")
    if not told(found, expected):
        raise NotYet(f"with logits far apart the loss is {expected:.3f}; you gave {found:.3f}. Take log_softmax, and add nothing")
    learns(answer, torch.randn(5, 4, dtype=torch.double), torch.randint(0, 4, (5,)), 0.1)


def focusing(answer) -> None:
    for n, classes, gamma in ((6, 4, 2.0), (5, 10, random.uniform(0.5, 1.5)), (8, 3, random.uniform(2.5, 4))):
        while True:
            logits, labels = 2 * torch.randn(n, classes, dtype=torch.double), torch.randint(0, classes, (n,))
            weights = torch.rand(classes, dtype=torch.double) * 1.5 + 0.3
            logs = logits.log_softmax(dim=1)
            log_p = of_labels(logs, labels)
            p, weight = log_p.exp(), weights[labels]
            loss = weight * (1 - p) ** gamma * -log_p
            expected = loss.mean().item()
            yes = logits.sigmoid()
            hard = F.one_hot(labels, classes).double()
            right = torch.where(hard.bool(), yes, 1 - yes)
            binary = (1 - right) ** gamma * -right.log()
            cross = F.cross_entropy(logits, labels, weight=weights, reduction="none").mean()
            mistakes = {
                "that is weighted cross-entropy; the factor (1 - p)^gamma is missing": cross.item(),
                "that is cross-entropy, without the factor and without the weights": F.cross_entropy(logits, labels).item(),
                "the weights of the classes are missing": ((1 - p) ** gamma * -log_p).mean().item(),
                "your factor is p^gamma, so that what is *right* counts; it is (1 - p)^gamma": (weight * p**gamma * -log_p)
                .mean()
                .item(),
                "your factor is (1 - p) · gamma; it is (1 - p) to the power of gamma": (weight * (1 - p) * gamma * -log_p)
                .mean()
                .item(),
                "cross-entropy has a minus: yours is upside down": -expected,
                "that is the sum over pictures; the loss is their mean": loss.sum().item(),
                "you divided by the sum of the weights, as F.cross_entropy does; here it is the mean over pictures": (
                    loss.sum() / weight.sum()
                ).item(),
                "p is the probability of the label, and not that of the likeliest class": (
                    weight * (1 - logs.exp().amax(dim=1)) ** gamma * -log_p
                )
                .mean()
                .item(),
                "every class by itself through a sigmoid? Here the classes share one softmax": (weight * binary.sum(dim=1))
                .mean()
                .item(),
                "p comes from a sigmoid; here the classes share one softmax": (
                    weight * (1 - of_labels(yes, labels)) ** gamma * -of_labels(yes, labels).log()
                )
                .mean()
                .item(),
                "you took the mean of the loss first; every picture has its own p": (
                    (1 - (-(-log_p).mean()).exp()) ** gamma * (weight * -log_p).mean()
                ).item(),
                "the weight belongs to the class, and you put it inside the power": ((weight * (1 - p)) ** gamma * -log_p)
                .mean()
                .item(),
                "p is exp of the loss *without* the weight": (weight * (1 - (weight * log_p).exp()) ** gamma * -log_p)
                .mean()
                .item(),
            }
            if apart([expected, *mistakes.values()], 1e-4):
                break
        found = number(call(answer, logits.clone(), labels.clone(), gamma, weights.clone()), "; a loss is the mean over pictures")
        if told(found, expected):
            continue
        for reason, value in mistakes.items():
            if told(found, value):
                raise NotYet(reason)
        raise NotYet(f"with gamma {gamma:.3f} and {classes} classes the loss is {expected:.4f}; you gave {found:.4f}")
    ones = torch.ones(classes, dtype=torch.double)
    plain = F.cross_entropy(logits, labels).item()
    if not told(number(call(answer, logits.clone(), labels.clone(), 0.0, ones)), plain):
        raise NotYet("with gamma 0 and all weights 1 it is plain cross-entropy")
    (far, labels), ones = extreme(6, 4), torch.ones(4, dtype=torch.double)
    log_p = of_labels(far.log_softmax(dim=1), labels)
    expected = ((1 - log_p.exp()) ** 2 * -log_p).mean().item()
    found = number(call(answer, far.clone(), labels, 2.0, ones.clone()))
    if not math.isfinite(found):
        raise NotYet(f"with logits far apart your loss is {found}: a softmax has zeros there, and their logarithm is not finite")
    if not told(found, expected):
        raise NotYet(f"with logits far apart the loss is {expected:.3f}; you gave {found:.3f}. Take log_softmax, and add nothing")
    learns(answer, torch.randn(5, 4, dtype=torch.double), torch.randint(0, 4, (5,)), 2.0, ones)


def normed_network() -> nn.Module:
    """A network with batch norm that has seen some batches."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3))
    with torch.no_grad():
        for _ in range(random.randint(2, 5)):
            net(torch.randn(6, 3, 4, 4) * random.uniform(0.5, 2) + random.uniform(-1, 1))
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter))
    return net


def followed(was, now, decay):
    return decay * was + (1 - decay) * now


AVERAGES = {
    "are what they were": lambda was, now, decay: was,
    "are the model's: the average has forgotten everything": lambda was, now, decay: now,
    "got decay and 1 - decay the wrong way round; the average *keeps* the share `decay` of itself": lambda was, now, decay: (
        (1 - decay) * was + decay * now
    ),
    "are a plain mean of the two; use decay": lambda was, now, decay: (was + now) / 2,
    "lack the factor 1 - decay of the model's": lambda was, now, decay: decay * was + now,
    "lack the factor decay of the old average": lambda was, now, decay: was + (1 - decay) * now,
}


def averaging(answer) -> None:
    for decay in (random.uniform(0.6, 0.8), random.uniform(0.9, 0.99)):
        average, model = normed_network(), normed_network()
        trained = {name for name, _ in model.named_parameters()}
        model[1].num_batches_tracked += random.randint(10, 50)
        for turn in range(2):
            old, new = (copy.deepcopy(net.state_dict()) for net in (average, model))
            call(answer, average, model, decay)
            found = average.state_dict()
            if any(not torch.equal(value, new[name]) for name, value in model.state_dict().items()):
                raise NotYet("the model itself has changed; it is only to be read")
            for name, value in found.items():
                if value.shape != old[name].shape or value.dtype != old[name].dtype:
                    raise NotYet(f"{name} was of {old[name].dtype} and is of {value.dtype}; it keeps its type and its shape")
            whole = [name for name in old if not old[name].is_floating_point()]
            floats = [name for name in old if name not in whole]
            kinds = {
                "weights": [name for name in floats if name in trained],
                "running statistics": [name for name in floats if name not in trained],
            }

            def made(by, names, old=old, new=new, found=found, decay=decay) -> bool:
                return all(torch.allclose(found[name], by(old[name], new[name], decay), rtol=1e-5, atol=1e-6) for name in names)

            for what, names in kinds.items():
                if made(followed, names):
                    continue
                for reason, by in AVERAGES.items():
                    if made(by, names):
                        extra = "" if what == "weights" else "; they are buffers, and state_dict() has them too"
                        raise NotYet(f"the {what} of the average {reason}{extra}")
                off = max(float((found[name] - followed(old[name], new[name], decay)).abs().max()) for name in names)
                raise NotYet(f"the {what} of the average are off by up to {off:.4f}")
            for name in whole:
                if not torch.equal(found[name], new[name]):
                    raise NotYet(
                        f"{name} counts batches, a whole number: it is {new[name].item()} in the model, {found[name].item()} in "
                        "your average; copy it"
                    )
            if turn == 0:
                with torch.no_grad():
                    for parameter in model.parameters():
                        parameter.add_(torch.randn_like(parameter))
                    model(torch.randn(6, 3, 4, 4))  # the running statistics move on


def shards(answer, world: int, n: int, seed: int, epoch: int) -> list[list[int]]:
    found = []
    for rank in range(world):
        torch.manual_seed(random.randrange(10**6))  # every process has a state of its own
        np.random.seed(random.randrange(10**6))
        before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
        found.append(indices(call(answer, rank, world, n, seed, epoch), n))
        after = torch.get_rng_state(), np.random.get_state()[1], random.getstate()
        if not (torch.equal(before[0], after[0]) and np.array_equal(before[1], after[1]) and before[2] == after[2]):
            raise NotYet(
                "you drew from a generator that everything else draws from, or seeded it: augmentation would follow. "
                "Make one of your own, torch.Generator().manual_seed(…)"
            )
    return found


def sharing(answer) -> None:
    for world, n in ((2, 40), (3, 50), (4, 61), (4, 60)):
        seed, epoch = random.randint(0, 1000), random.randint(0, 20)
        found = shards(answer, world, n, seed, epoch)
        pieces = f"{n} pictures over {world} processes"
        if shards(answer, world, n, seed, epoch) != found:
            raise NotYet("asked twice for one epoch, your function gives two orders; the order depends on seed and epoch alone")
        counts = [len(one) for one in found]
        every = np.bincount(np.concatenate(found).astype(int), minlength=n)
        share = math.ceil(n / world)
        if world > 1 and all(sorted(one) == list(range(n)) for one in found):
            raise NotYet("every process has all the pictures; each is to have its part")
        if len(set(counts)) > 1:
            raise NotYet(f"{pieces}: yours have {counts}. All have the same count, or one waits for another for ever")
        if counts[0] < share:
            raise NotYet(
                f"{pieces}: yours have {counts[0]} each, and so {n - (every > 0).sum()} are left out. Repeat the first ones "
                f"until each has {share}"
            )
        if counts[0] > share:
            raise NotYet(f"{pieces}: {share} each are enough, and yours have {counts[0]}")
        if (every == 0).any():
            raise NotYet(
                f"{pieces}: {(every == 0).sum()} are with nobody, and some with several. Do all processes share one order, "
                "drawn without the rank?"
            )
        if every.max() > 2:
            raise NotYet(f"{pieces}: one picture comes {every.max()} times; repeat as few as you can, and none more than once")
        if all(one == sorted(one) for one in found):
            raise NotYet("the pictures are not shuffled: each process has them in ascending order")
        later = shards(answer, world, n, seed, epoch + 1)
        if later == found:
            raise NotYet("the next epoch has the same order; seed and epoch both move it")
        if shards(answer, world, n, seed + random.randint(2000, 3000), epoch) == found:
            raise NotYet("another seed gives the same order; seed and epoch both move it")
        if [set(one) for one in later] == [set(one) for one in found]:
            raise NotYet(
                "in every epoch a process has the same pictures, only in another order. Shuffle all of them first, and share "
                "out then"
            )


EXERCISES = {
    "12.1": Exercise(
        mixing,
        "share has one dimension and pictures have four: share[:, None, None, None] multiplies picture by picture. "
        "F.one_hot turns labels into rows, which are mixed in the same way.",
    ),
    "12.2": Exercise(
        smoothing,
        "The target is 1 - smoothing on the label, and smoothing / classes on every class. So the loss is 1 - smoothing times a "
        "log-probability at the label, and smoothing times the mean of all of them, with a minus.",
    ),
    "12.3": Exercise(
        focusing,
        "log_softmax first, and from it the entry of each label (gather, or F.nll_loss without a reduction). Then p is its exp. "
        "weights[labels] has a weight for each picture.",
    ),
    "12.4": Exercise(
        averaging,
        "Go through both state_dict()s together, under torch.no_grad(). Their tensors share memory with the network, so change "
        "them in place: mul_ and add_, or lerp_, where is_floating_point() holds; copy_ otherwise.",
    ),
    "12.5": Exercise(
        sharing,
        "A generator of its own, seeded by seed and epoch and not by rank; one permutation of all; its beginning once more at "
        "its end, until world divides the length; then every world-th, from rank on.",
    ),
}
