"""The checks of lesson 07 against answers that are right, wrong and missing."""

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.preprocessing import StandardScaler

from tests.exercise_tests import *  # noqa: F403


def concatenate(known, asked, by=lambda own, other: own, root=lambda width: width**0.5, correction=0, dim=0):
    """A right answer to 07.1, or one with a mistake."""
    sides = [], []
    for own, other in zip(known, asked, strict=True):
        for side, table in zip(sides, (own, other), strict=True):
            measured = by(own, table)
            mean, deviation = measured.mean(dim=dim), measured.std(dim=dim, correction=correction)
            side.append((table - mean) / deviation / root(own.shape[1]))
    return [torch.cat(side, dim=1) for side in sides]


def concatenate_in_sklearn(known, asked):
    pairs = [(StandardScaler().fit(own), own, other) for own, other in zip(known, asked, strict=True)]
    return tuple(
        np.hstack([scaler.transform(tables[at]) / np.sqrt(tables[0].shape[1]) for scaler, *tables in pairs]) for at in (0, 1)
    )


def concatenate_in_loops(known, asked):
    sides = []
    for tables in (known, asked):
        columns = []
        for own, table in zip(known, tables, strict=True):
            for place in range(own.shape[1]):
                values = own[:, place].tolist()
                mean = sum(values) / len(values)
                deviation = (sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5
                columns.append((table[:, place] - mean) / deviation / own.shape[1] ** 0.5)
        sides.append(torch.stack(columns, dim=1))
    return sides


def concatenate_in_place(known, asked):
    found = concatenate(known, asked)
    for table in known:
        table.zero_()
    return found


def by_root_of_the_sum(known, asked):
    total = sum(table.shape[1] for table in known)
    return concatenate(known, asked, root=lambda width: total**0.5)


def attend(projected, scores, dim=1):
    shares = scores.softmax(dim=dim)
    return (shares[:, :, None] * projected).sum(dim=1), shares


def attend_by_einsum(projected, scores):
    powers = torch.exp(scores - scores.max(dim=1, keepdim=True).values)
    shares = powers / powers.sum(dim=1, keepdim=True)
    return torch.einsum("nsw,ns->nw", projected, shares), shares


def attend_in_numpy(projected, scores):
    powers = np.exp(scores.numpy())
    shares = powers / powers.sum(axis=1, keepdims=True)
    return [(shares[..., None] * projected.numpy()).sum(axis=1), shares]


def attend_in_loops(projected, scores):
    fused, shares = [], []
    for sources, own in zip(projected, scores, strict=True):
        share = own.softmax(dim=0)
        shares.append(share.tolist())
        fused.append(sum(float(part) * source for part, source in zip(share, sources, strict=True)).tolist())
    return fused, shares


def with_shares(make, use=lambda projected, shares: (shares[:, :, None] * projected).sum(dim=1)):
    """An answer to 07.2 with shares of another make, or another use of them."""

    def attend(projected, scores):
        shares = make(scores)
        return use(projected, shares), shares

    return attend


def removed(valid, test, fused):
    best = valid.mean(axis=1).argmax()
    before, after = 1 - test[best].mean(), 1 - fused.mean()
    return (before - after) / before


def removed_in_loops(valid, test, fused):
    best = max(range(len(valid)), key=lambda net: sum(valid[net].tolist()))
    wrong, still = (sum(not hit for hit in hits.tolist()) for hits in (test[best], fused))
    return 1 - still / wrong


def removed_in_torch(valid, test, fused):
    valid, test, fused = (torch.from_numpy(part).float() for part in (valid, test, fused))
    return 1 - (1 - fused.mean()) / (1 - test[valid.mean(dim=1).argmax()].mean())


def cka(x, y):
    x, y = x - x.mean(dim=0), y - y.mean(dim=0)
    return (y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())


def cka_by_gram_matrices(x, y):
    n = len(x)
    centre = torch.eye(n).double() - 1 / n
    k, other = (centre @ table.double() @ table.double().T @ centre for table in (x, y))
    return ((k * other).sum() / (k.norm() * other.norm())).item()


def cka_in_numpy(x, y):
    x, y = (table.numpy() - table.numpy().mean(axis=0) for table in (x, y))
    return np.linalg.norm(y.T @ x) ** 2 / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y)


def centred(x, y, how=lambda table: table - table.mean(dim=0)):
    """Both tables without their means, or with the means taken off in another way."""
    return how(x), how(y)


def uncentred(x, y):
    return (y.T @ x).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm())


def loss(student, teacher, labels, temperature, alpha, factor=lambda logits: 1, square=True, turned=False, cold=False):
    """A right answer to 07.5, or one with a mistake. factor: what another reduction makes of the KL."""
    T = 1 if cold else temperature
    one, other = (teacher, student) if turned else (student, teacher)
    told = factor(student) * F.kl_div((one / T).log_softmax(dim=1), (other / T).softmax(dim=1), reduction="batchmean")
    return (1 - alpha) * F.cross_entropy(student, labels) + alpha * (temperature**2 if square else 1) * told


def loss_by_hand(student, teacher, labels, temperature, alpha):
    p = torch.softmax(teacher / temperature, dim=1)
    logs = torch.log_softmax(student / temperature, dim=1)
    told = (p * (p.log() - logs)).sum(dim=1).mean()
    hard = -torch.log_softmax(student, dim=1)[torch.arange(len(labels)), labels].mean()
    return ((1 - alpha) * hard + alpha * temperature**2 * told).item()


def loss_in_numpy(student, teacher, labels, temperature, alpha):
    def softmax(logits):
        powers = np.exp(logits - logits.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)

    student, teacher = student.double().numpy(), teacher.double().numpy()
    p, q = softmax(teacher / temperature), softmax(student / temperature)
    hard = -np.log(softmax(student)[np.arange(len(labels)), labels.numpy()]).mean()
    return (1 - alpha) * hard + alpha * temperature**2 * (p * np.log(p / q)).sum(axis=1).mean()


def without_logarithm(student, teacher, labels, T, alpha):
    told = F.kl_div((student / T).softmax(dim=1), (teacher / T).softmax(dim=1), reduction="batchmean")
    return (1 - alpha) * F.cross_entropy(student, labels) + alpha * T**2 * told


def with_soft_cross_entropy(student, teacher, labels, T, alpha):
    told = F.cross_entropy(student / T, (teacher / T).softmax(dim=1))
    return (1 - alpha) * F.cross_entropy(student, labels) + alpha * T**2 * told


RIGHT = {
    "07.1": [concatenate, concatenate_in_sklearn, concatenate_in_loops],
    "07.2": [attend, attend_by_einsum, attend_in_numpy, attend_in_loops],
    "07.3": [removed, removed_in_loops, removed_in_torch],
    "07.4": [cka, cka_by_gram_matrices, cka_in_numpy],
    "07.5": [loss, loss_by_hand, loss_in_numpy],
}
WRONG = {
    "07.1": [
        (lambda known, asked: (torch.zeros(50, 9), torch.zeros(20, 9)), "make ("),
        (lambda known, asked: [torch.cat([torch.zeros_like(t) for t in side], 1) for side in (known, asked)], "in the training"),
        (lambda known, asked: (torch.cat(known, 1), torch.cat(asked, 1)), "as they are"),
        (lambda known, asked: concatenate(known, asked, root=lambda width: 1), "a wide source weighs more"),
        (lambda known, asked: concatenate(known, asked, root=lambda width: width), "asks for its square root"),
        (by_root_of_the_sum, "its own width, not of the sum"),
        (lambda known, asked: concatenate(known, asked, by=lambda own, table: table), "by themselves"),
        (lambda known, asked: concatenate(known, asked, correction=1), "over n - 1"),
        (lambda known, asked: concatenate(known, asked, dim=None), "every feature has its own"),
        (lambda known, asked: concatenate(known[::-1], asked[::-1]), "another order"),
        (lambda known, asked: concatenate(known, asked)[::-1], "yours are swapped"),
        (concatenate_in_place, "changed the tables themselves"),
        (lambda known, asked: concatenate(known, asked)[0], "two things are expected"),
        (lambda known, asked: torch.cat(known), "your function stopped"),
        (lambda known, asked: None, "two things are expected"),
    ],
    "07.2": [
        (lambda projected, scores: (torch.zeros(20, 4), torch.zeros(20, 3)), "has shape"),
        (lambda projected, scores: attend(projected, scores, dim=0), "over the pictures"),
        (with_shares(lambda scores: scores), "those are the scores"),
        (with_shares(torch.sigmoid), "a sigmoid looks at one score alone"),
        (with_shares(lambda scores: scores.log_softmax(dim=1)), "not log_softmax"),
        (with_shares(lambda scores: torch.full_like(scores, 1 / scores.shape[1])), "the scores have no say"),
        (with_shares(lambda scores: scores / scores.sum(dim=1, keepdim=True)), "dividing by their sum"),
        (with_shares(lambda scores: F.one_hot(scores.argmax(dim=1), scores.shape[1]).float()), "the best source alone"),
        (with_shares(lambda scores: scores.softmax(1), lambda projected, shares: projected.sum(dim=1)), "without them"),
        (
            with_shares(lambda scores: scores.softmax(1), lambda projected, shares: projected.mean(dim=1)),
            "the mean of the sources",
        ),
        (
            with_shares(lambda scores: scores.softmax(1), lambda projected, shares: (shares[:, :, None] * projected).mean(dim=1)),
            "divided by the number of sources",
        ),
        (lambda *a: attend(*a)[::-1], "yours are swapped"),
        (lambda *a: attend(*a)[0], "two things are expected"),
        (lambda projected, scores: attend(projected, scores[:, :, None]), "your function stopped"),
        (lambda projected, scores: attend(projected.zero_(), scores), "changed the inputs"),
        (lambda *a: None, "not NoneType"),
    ],
    "07.3": [
        (lambda valid, test, fused: 0.2, "you gave 0.200"),
        (lambda valid, test, fused: removed(test, test, fused), "best on test pictures"),
        (lambda valid, test, fused: 1 - (1 - fused.mean()) / (1 - test.mean()), "not their mean"),
        (lambda valid, test, fused: fused.mean() - test[valid.mean(axis=1).argmax()].mean(), "the difference in accuracy"),
        (lambda valid, test, fused: 1 - removed(valid, test, fused), "that is left"),
        (lambda *a: -removed(*a), "the other way round"),
        (lambda *a: 100 * removed(*a), "in percent"),
        (lambda valid, test, fused: fused.mean() / test[valid.mean(axis=1).argmax()].mean() - 1, "divided by the accuracy"),
        (
            lambda valid, test, fused: (1 - test[valid.mean(axis=1).argmax()].mean()) / (1 - fused.mean()) - 1,
            "of the fused model",
        ),
        (lambda valid, test, fused: removed(valid, valid, fused), "on validation pictures"),
        (lambda valid, test, fused: 1 - (~fused).mean() / (~test).mean(axis=1), "a share of errors is one number"),
        (lambda *a: "a lot", "not str"),
        (lambda *a: None, "not NoneType"),
    ],
    "07.4": [
        (lambda x, y: 0.5, "you gave 0.5000"),
        (uncentred, "the mean of each feature first"),
        (lambda x, y: uncentred(*centred(x, y, lambda table: table - table.mean())), "one mean for the whole table"),
        (lambda x, y: uncentred(*centred(x, y, lambda t: t - t.mean(dim=1, keepdim=True))), "the mean of each row"),
        (lambda x, y: cka(x, y) ** 0.5, "the root of it"),
        (lambda x, y: 1 - cka(x, y), "*unlike*"),
        (
            lambda x, y: (lambda a, b: (b.T @ a).norm() / ((a.T @ a).norm() * (b.T @ b).norm()))(*centred(x, y)),
            "above is squared",
        ),
        (lambda x, y: (lambda a, b: (b.T @ a).norm() ** 2)(*centred(x, y)), "above the line"),
        (lambda x, y: (lambda a, b: ((b.T @ a).norm() / (a.norm() * b.norm())) ** 2)(*centred(x, y)), "the norms of X and Y"),
        (lambda x, y: x.T @ y, "one number for both tables"),
        (lambda x, y: F.cosine_similarity(x, y), "your function stopped"),
        (lambda x, y: cka(x.sub_(x.mean(dim=0)), y), "changed the tables themselves"),
        (lambda *a: None, "not NoneType"),
    ],
    "07.5": [
        (lambda *a: 1.0, "you gave 1.0000"),
        (lambda *a: loss(*a, factor=lambda logits: 1 / logits.shape[1]), '"batchmean" is the mean over pictures'),
        (lambda *a: loss(*a, factor=len), "grows with the batch"),
        (lambda *a: loss(*a, square=False), "T² is missing"),
        (lambda *a: loss(*a, turned=True), "the other way"),
        (lambda *a: loss(*a, cold=True), "no temperature in the KL"),
        (lambda s, t, labels, T, alpha: loss(s, t, labels, T, 1 - alpha), "yours are swapped"),
        (without_logarithm, "log_softmax"),
        (with_soft_cross_entropy, "the teacher's own entropy"),
        (lambda s, t, labels, T, alpha: F.cross_entropy(s, labels), "the cross-entropy alone"),
        (lambda s, t, labels, T, alpha: loss(s, t, labels, T, 1.0) * alpha, "the teacher's part alone"),
        (lambda s, t, labels, T, alpha: F.cross_entropy(s, labels) + loss(s, t, labels, T, 1.0), "without alpha"),
        (lambda s, t, labels, T, alpha: F.cross_entropy(s, labels, reduction="none"), "a loss is one number"),
        (lambda s, t, labels, T, alpha: loss(s.zero_(), t, labels, T, alpha), "changed the logits"),
        (lambda *a: None, "not NoneType"),
    ],
}
