"""Answers to the exercises of lesson 12, right and wrong."""

import copy
import random

import numpy as np
import torch
import torch.nn.functional as F

from tests.exercise_tests import *  # noqa: F403


def blend(share, own, other):
    column = share.reshape(-1, *[1] * (own.dim() - 1))
    return column * own + (1 - column) * other


def mixed(pictures, labels, share, order, classes):
    targets = F.one_hot(labels, classes).double()
    return blend(share, pictures, pictures[order]), blend(share, targets, targets[order])


def mixed_in_loops(pictures, labels, share, order, classes):
    out, targets = np.empty(pictures.shape), np.zeros((len(labels), classes))
    for i, (keep, j) in enumerate(zip(share.tolist(), order.tolist(), strict=True)):
        out[i] = keep * pictures[i].numpy() + (1 - keep) * pictures[j].numpy()
        targets[i, labels[i]] += keep
        targets[i, labels[j]] += 1 - keep
    return [out, targets]


def mixed_by_lerp(pictures, labels, share, order, classes):
    targets = torch.eye(classes, dtype=torch.double)[labels]
    return torch.lerp(pictures[order], pictures, share[:, None, None, None]), torch.lerp(targets[order], targets, share[:, None])


def mixed_in_place(pictures, labels, share, order, classes):
    found, targets = mixed(pictures, labels, share, order, classes)
    return pictures.copy_(found), targets


def pictures_alone(pictures, labels, share, order, classes):
    return mixed(pictures, labels, share, order, classes)[0], F.one_hot(labels, classes)


def targets_alone(pictures, labels, share, order, classes):
    return pictures, mixed(pictures, labels, share, order, classes)[1]


def targets_turned(pictures, labels, share, order, classes):
    given = pictures, labels
    return mixed(*given, share, order, classes)[0], mixed(*given, 1 - share, order, classes)[1]


def weights_of_both(pictures, labels, share, order, classes):
    targets = F.one_hot(labels, classes).double()
    own, other = share[:, None, None, None] * pictures, (1 - share)[:, None, None, None] * pictures
    return own + other[order], share[:, None] * targets + ((1 - share)[:, None] * targets)[order]


def with_share(change):
    return lambda pictures, labels, share, order, classes: mixed(pictures, labels, change(share), order, classes)


def with_order(change):
    return lambda pictures, labels, share, order, classes: mixed(pictures, labels, share, change(order), classes)


def smooth_cross_entropy(logits, labels, smoothing):
    logs = logits.log_softmax(dim=1)
    right = logs.gather(1, labels[:, None]).squeeze(1)
    return -((1 - smoothing) * right + smoothing * logs.mean(dim=1)).mean()


def smooth_on_targets(logits, labels, smoothing):
    targets = (1 - smoothing) * F.one_hot(labels, logits.shape[1]) + smoothing / logits.shape[1]
    return F.cross_entropy(logits, targets)


def smooth_by_torch(logits, labels, smoothing):
    return F.cross_entropy(logits, labels, label_smoothing=smoothing)


def crossed(targets_of):
    """Cross-entropy on targets made of one-hot rows, the smoothing and the number of classes."""

    def loss(logits, labels, smoothing):
        hard = F.one_hot(labels, logits.shape[1])
        return -(targets_of(hard, smoothing, logits.shape[1]) * logits.log_softmax(dim=1)).sum(dim=1).mean()

    return loss


def smooth_of_softmax(logits, labels, smoothing):
    logs = logits.softmax(dim=1).log()
    return -((1 - smoothing) * logs[torch.arange(len(labels)), labels] + smoothing * logs.mean(dim=1)).mean()


def smooth_with_an_end(logits, labels, smoothing):
    logs = (logits.softmax(dim=1) + 1e-12).log()
    return -((1 - smoothing) * logs[torch.arange(len(labels)), labels] + smoothing * logs.mean(dim=1)).mean()


def smooth_divergence(logits, labels, smoothing):
    targets = (1 - smoothing) * F.one_hot(labels, logits.shape[1]) + smoothing / logits.shape[1]
    return F.kl_div(logits.log_softmax(dim=1), targets, reduction="batchmean")


def of_labels(rows, labels):
    return rows[torch.arange(len(labels)), labels]


def focal(logits, labels, gamma, weights):
    log_p = of_labels(logits.log_softmax(dim=1), labels)
    return -(weights[labels] * (1 - log_p.exp()) ** gamma * log_p).mean()


def focal_by_torch(logits, labels, gamma, weights):
    loss = F.cross_entropy(logits, labels, reduction="none")
    return ((1 - torch.exp(-loss)).pow(gamma) * loss * weights[labels]).sum() / len(labels)


def focal_with_a_constant_factor(logits, labels, gamma, weights):
    """Its factor is a weight from outside, and no gradient goes through it."""
    loss = F.nll_loss(logits.log_softmax(dim=1), labels, reduction="none")
    return (weights[labels] * (1 - (-loss).exp()).detach() ** gamma * loss).mean()


def focal_of(p_of, factor=lambda p, gamma: (1 - p) ** gamma):
    def loss(logits, labels, gamma, weights):
        log_p = of_labels(logits.log_softmax(dim=1), labels)
        return -(weights[labels] * factor(p_of(logits, labels), gamma) * log_p).mean()

    return loss


def probability(logits, labels):
    return of_labels(logits.softmax(dim=1), labels)


def focal_on_sigmoids(logits, labels, gamma, weights):
    hard = F.one_hot(labels, logits.shape[1]).double()
    loss = F.binary_cross_entropy_with_logits(logits, hard, reduction="none")
    return (weights[labels] * ((1 - (-loss).exp()) ** gamma * loss).sum(dim=1)).mean()


def focal_of_softmax(logits, labels, gamma, weights):
    p = probability(logits, labels)
    return -(weights[labels] * (1 - p) ** gamma * p.log()).mean()


def focal_with_weights_inside(logits, labels, gamma, weights):
    loss = F.cross_entropy(logits, labels, weight=weights, reduction="none")
    return ((1 - torch.exp(-loss)) ** gamma * loss).mean()


def focal_of_the_mean(logits, labels, gamma, weights):
    loss = F.cross_entropy(logits, labels, reduction="none")
    return (1 - torch.exp(-loss.mean())) ** gamma * (weights[labels] * loss).mean()


def followed(average, model, decay, names=lambda name: True, whole=True):
    now = model.state_dict()
    for name, value in average.state_dict().items():
        if value.is_floating_point() and names(name):
            value.mul_(decay).add_(now[name], alpha=1 - decay)
        elif whole and not value.is_floating_point():
            value.copy_(now[name])


def followed_by_lists(average, model, decay):
    with torch.no_grad():
        for mine, its in zip(average.parameters(), model.parameters(), strict=True):
            mine.lerp_(its, 1 - decay)
        for mine, its in zip(average.buffers(), model.buffers(), strict=True):
            mine.copy_(decay * mine + (1 - decay) * its if mine.is_floating_point() else its)


def followed_by_loading(average, model, decay):
    old, now = average.state_dict(), model.state_dict()
    average.load_state_dict(
        {name: decay * old[name] + (1 - decay) * now[name] if now[name].dtype.is_floating_point else now[name] for name in now}
    )


def all_by_loading(average, model, decay):
    """Counters too, which come out as whole numbers again."""
    old, now = average.state_dict(), model.state_dict()
    average.load_state_dict({name: decay * old[name] + (1 - decay) * now[name] for name in now})


def all_in_place(average, model, decay):
    now = model.state_dict()
    for name, value in average.state_dict().items():
        value.mul_(decay).add_(now[name], alpha=1 - decay)


def weights_alone(average, model, decay):
    with torch.no_grad():
        for mine, its in zip(average.parameters(), model.parameters(), strict=True):
            mine.lerp_(its, 1 - decay)


def buffers_of_the_model(average, model, decay):
    weights_alone(average, model, decay)
    for mine, its in zip(average.buffers(), model.buffers(), strict=True):
        mine.copy_(its)


def both_ways(average, model, decay):
    followed(average, model, decay)
    model.load_state_dict(average.state_dict())


def on_a_copy(average, model, decay):
    found = copy.deepcopy(average)
    followed(found, model, decay)
    return found


def indices_for(rank, world, n, seed, epoch):
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1000 * seed + epoch))
    return torch.cat([order, order[: -n % world]])[rank::world]


def indices_by_torch(rank, world, n, seed, epoch):
    sampler = torch.utils.data.DistributedSampler(range(n), world, rank, seed=seed)
    sampler.set_epoch(epoch)
    return list(sampler)


def indices_in_blocks(rank, world, n, seed, epoch):
    order = np.random.default_rng([seed, epoch]).permutation(n)
    size = -(-n // world)
    return np.resize(order, size * world)[rank * size : (rank + 1) * size]


def order_of(seed, n):
    return random.Random(seed).sample(range(n), n)


def shared_out(order, rank, world):
    return [*order, *order[: -len(order) % world]][rank::world]


def own_order(rank, world, n, seed, epoch):
    return shared_out(order_of(f"{seed} {epoch} {rank}", n), rank, world)


def global_seed(rank, world, n, seed, epoch):
    torch.manual_seed(seed + epoch)
    return shared_out(torch.randperm(n).tolist(), rank, world)


def no_seed(rank, world, n, seed, epoch):
    return shared_out(np.random.permutation(n).tolist(), rank, world)


def fixed_shares(rank, world, n, seed, epoch):
    mine = shared_out(list(range(n)), rank, world)
    return random.Random(f"{seed} {epoch}").sample(mine, len(mine))


def repeating_one(rank, world, n, seed, epoch):
    order = order_of(f"{seed} {epoch}", n)
    return [*order, *[order[0]] * (-n % world)][rank::world]


def one_too_many(rank, world, n, seed, epoch):
    order = order_of(f"{seed} {epoch}", n)
    return [*order, *order[: world - n % world]][rank::world]


RIGHT = {
    "12.1": [mixed, mixed_in_loops, mixed_by_lerp],
    "12.2": [smooth_cross_entropy, smooth_on_targets, smooth_by_torch],
    "12.3": [focal, focal_by_torch, focal_with_a_constant_factor],
    "12.4": [followed, followed_by_lists, followed_by_loading],
    "12.5": [indices_for, indices_by_torch, indices_in_blocks],
}
WRONG = {
    "12.1": [
        (lambda *given: (torch.zeros(6, 3, 4, 5), torch.full((6, 4), 0.25)), "of the values of your pictures"),
        (pictures_alone, "the targets are not mixed"),
        (targets_alone, "the pictures are not mixed"),
        (targets_turned, "your targets give it to the partner"),
        (weights_of_both, "mix with both"),
        (mixed_in_place, "changed what it was given"),
        (with_share(lambda share: 1 - share), "your pictures give it to the partner"),
        (with_share(lambda share: share[:1].expand(len(share))), "take the first for all"),
        (with_share(lambda share: share.mean().expand(len(share))), "take the mean for all"),
        (with_share(torch.zeros_like), "came alone"),
        (with_share(lambda share: torch.full_like(share, 0.5)), "a plain mean"),
        (with_order(lambda order: order.argsort()), "the other way round"),
        (with_order(lambda order: torch.arange(len(order)).roll(1)), "their neighbour"),
        (lambda *given: (mixed(*given)[0], given[1]), "cannot name two classes"),
        (lambda *given: (mixed(*given)[0], mixed(*given)[1][:, :2]), "targets have the shape"),
        (lambda *given: (mixed(*given)[0][0], mixed(*given)[1]), "the mixed pictures have the shape"),
        (lambda *given: (mixed(*given)[0], mixed(*given)[1] * 0.9), "add up to 1"),
        (lambda *given: mixed(*given)[0], "two tensors are expected"),
        (lambda *given: (None, None), "not NoneType"),
        (lambda *given: None, "not NoneType"),
    ],
    "12.2": [
        (lambda *given: 1.5, "you gave 1.5000"),
        (lambda logits, labels, smoothing: F.cross_entropy(logits, labels), "without smoothing"),
        (crossed(lambda hard, s, k: (1 - s) * hard + s / (k - 1) * (1 - hard)), "among the *wrong* classes"),
        (crossed(lambda hard, s, k: (1 - s) * hard + s / k * (1 - hard)), "add up to less than 1"),
        (crossed(lambda hard, s, k: hard + s / k), "and the smoothing besides"),
        (crossed(lambda hard, s, k: (1 - s) * hard + s), "`smoothing` whole"),
        (crossed(lambda hard, s, k: s * hard + (1 - s) / k), "changed the two about"),
        (lambda *given: -smooth_cross_entropy(*given), "upside down"),
        (lambda *given: smooth_cross_entropy(*given) * len(given[1]), "the sum over pictures"),
        (lambda *given: smooth_cross_entropy(*given) / given[0].shape[1], "the mean over classes too"),
        (smooth_divergence, "that is the divergence"),
        (smooth_of_softmax, "a softmax has zeros there"),
        (smooth_with_an_end, "far apart"),
        (lambda *given: smooth_cross_entropy(*given).item(), "no gradient comes back"),
        (lambda logits, labels, s: smooth_cross_entropy(logits, labels, s or 0.1), "plain cross-entropy"),
        (lambda logits, labels, s: logits.log_softmax(dim=1), "the mean over pictures"),
        (lambda *given: None, "not NoneType"),
    ],
    "12.3": [
        (lambda *given: 0.7, "you gave 0.7000"),
        (lambda logits, labels, gamma, weights: focal(logits, labels, 0, weights), "weighted cross-entropy"),
        (lambda logits, labels, gamma, weights: F.cross_entropy(logits, labels), "without the weights"),
        (lambda logits, labels, gamma, weights: focal(logits, labels, gamma, torch.ones_like(weights)), "classes are missing"),
        (lambda *given: focal(*given) * len(given[1]) / given[3][given[1]].sum(), "sum of the weights"),
        (focal_of(probability, lambda p, gamma: p**gamma), "your factor is p^gamma"),
        (focal_of(probability, lambda p, gamma: (1 - p) * gamma), "(1 - p) · gamma"),
        (focal_of(lambda logits, labels: logits.softmax(dim=1).amax(dim=1)), "likeliest class"),
        (focal_on_sigmoids, "share one softmax"),
        (focal_with_weights_inside, "*without* the weight"),
        (focal_of_the_mean, "every picture has its own p"),
        (focal_of_softmax, "a softmax has zeros there"),
        (lambda *given: -focal(*given), "upside down"),
        (lambda *given: focal(*given) * len(given[1]), "the sum over pictures"),
        (lambda *given: focal(*given).detach(), "no gradient comes back"),
        (lambda *given: given[0], "the mean over pictures"),
        (lambda *given: None, "not NoneType"),
    ],
    "12.4": [
        (lambda average, model, decay: 0.9, "weights of the average are what they were"),
        (lambda average, model, decay: None, "weights of the average are what they were"),
        (on_a_copy, "weights of the average are what they were"),
        (lambda average, model, decay: average.load_state_dict(model.state_dict()), "has forgotten everything"),
        (lambda average, model, decay: followed(average, model, 1 - decay), "the wrong way round"),
        (lambda average, model, decay: followed(average, model, 0.5), "a plain mean"),
        (weights_alone, "running statistics of the average are what they were"),
        (buffers_of_the_model, "running statistics of the average are the model's"),
        (lambda average, model, decay: followed(average, model, decay, lambda name: "running" in name), "weights of the average"),
        (lambda average, model, decay: followed(average, model, decay, whole=False), "copy it"),
        (all_by_loading, "copy it"),
        (all_in_place, "your function stopped with RuntimeError"),
        (both_ways, "only to be read"),
        (lambda average, model, decay: followed(average, model, 0.99 * decay), "are off by up to"),
    ],
    "12.5": [
        (lambda *given: list(range(20)), "with nobody"),
        (lambda rank, world, n, seed, epoch: order_of(f"{seed} {epoch}", n), "all the pictures"),
        (own_order, "drawn without the rank"),
        (global_seed, "augmentation would follow"),
        (no_seed, "augmentation would follow"),
        (fixed_shares, "only in another order"),
        (repeating_one, "none more than once"),
        (one_too_many, "are enough"),
        (lambda rank, world, n, seed, epoch: order_of(f"{seed} {epoch}", n)[rank::world], "All have the same count"),
        (lambda rank, world, n, seed, epoch: order_of(f"{seed} {epoch}", n)[rank::world][: n // world], "are left out"),
        (lambda rank, world, n, seed, epoch: shared_out(order_of(seed, n), rank, world), "the next epoch has the same order"),
        (lambda rank, world, n, seed, epoch: shared_out(order_of(epoch, n), rank, world), "another seed gives the same"),
        (lambda rank, world, n, seed, epoch: shared_out(list(range(n)), rank, world), "not shuffled"),
        (lambda rank, world, n, seed, epoch: shared_out(random.SystemRandom().sample(range(n), n), rank, world), "asked twice"),
        (lambda rank, world, n, seed, epoch: [n], "indices lie between"),
        (lambda *given: None, "indices are expected"),
    ],
}
