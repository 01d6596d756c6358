"""The checks of lesson 04 against answers that are right, wrong and missing."""

import copy

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn
from torch.nn.functional import cross_entropy

from tests.exercise_tests import *  # noqa: F403


def groups(
    rate=lambda lr, factor, below: lr / factor**below, head=lambda lr, head_lr: head_lr, of=lambda part: part.parameters()
):
    """An answer to 04.1. rate: of the stage that is so many below the last."""

    def my_groups(parts, top, lr, factor, head_lr):
        rates = [rate(lr, factor, len(parts) - 1 - number) for number in range(len(parts))]
        made = [{"params": list(of(part)), "lr": value} for part, value in zip(parts, rates, strict=True)]
        return [*made, {"params": list(of(top)), "lr": head(lr, head_lr)}]

    return my_groups


def groups_of_single_parameters(parts, head, lr, factor, head_lr):
    found = [{"params": p, "lr": head_lr} for p in head.parameters()]
    for below, part in enumerate(parts[::-1]):
        found += [{"params": [p], "lr": np.float64(lr) * factor ** (-below)} for p in part.parameters()]
    return found


def groups_of_iterators(parts, head, lr, factor, head_lr):
    found = [{"params": head.parameters(), "lr": head_lr, "weight_decay": 0.0}]
    for part in parts[::-1]:
        found.append({"params": part.parameters(), "lr": lr})
        lr /= factor
    return tuple(found)


def stage_twice(parts, head, lr, factor, head_lr):
    return [*groups()(parts, head, lr, factor, head_lr), {"params": list(parts[0].parameters()), "lr": lr}]


def only_learning(part):
    return [p for p in part.parameters() if p.requires_grad]


def statistics_by_trying(network, pictures):
    network = copy.deepcopy(network)
    before = copy.deepcopy(network.state_dict())
    network(pictures)
    found = []
    for name, part in network.named_modules():
        frozen = not any(p.requires_grad for p in part.parameters())
        old = before.get(f"{name}.running_mean")
        if frozen and old is not None and not torch.equal(part.running_mean, old):
            found.append(name)
    return found


def statistics(kinds=(nn.BatchNorm1d, nn.BatchNorm2d), ask=lambda part: part.training, frozen=None, name=lambda name: name):
    """An answer to 04.2 by looking at the layers."""
    frozen = frozen or (lambda part: not any(p.requires_grad for p in part.parameters()))

    def moving_statistics(network, pictures):
        parts = [(place, part) for place, part in network.named_modules() if isinstance(part, kinds)]
        return [name(place) for place, part in parts if ask(part) and frozen(part) and part.running_mean is not None]

    return moving_statistics


def statistics_in_a_loop(network, pictures):
    found = set()
    for name, part in network.named_modules():
        if type(part).__name__.startswith("BatchNorm") and part.training and part.track_running_stats:
            for parameter in part.parameters():
                if parameter.requires_grad:
                    break
            else:
                found.add(name)
    return found


def without_statistics_too(network, pictures):
    kinds = nn.BatchNorm1d | nn.BatchNorm2d
    parts = [(name, part) for name, part in network.named_modules() if isinstance(part, kinds)]
    return [name for name, part in parts if part.training and not any(p.requires_grad for p in part.parameters())]


def mode_of_the_whole(network, pictures):
    if not network.training:
        return []
    return statistics(ask=lambda part: True)(network, pictures)


def tried_on_itself(network, pictures):
    network(pictures)
    return statistics()(network, pictures)


def switched(network, pictures):
    network.train()
    return statistics()(network, pictures)


def thawed(network, pictures):
    found = statistics()(network, pictures)
    network.requires_grad_(True)
    return found


def tried_and_left_frozen(network, pictures):
    network = copy.deepcopy(network)
    before = copy.deepcopy(network.state_dict())
    network(pictures)
    moved = [key for key, value in network.state_dict().items() if not torch.equal(value, before[key])]
    return [key.removesuffix(".running_mean") for key in moved if key.endswith("running_mean")]


def l2_sp(far=lambda gap: (gap**2).sum(), large=lambda v: (v**2).sum(), shares=(0.5, 0.5), w=lambda w: w):
    """An answer to 04.3 of two sums over tensors."""

    def penalty(backbone, start, head, alpha, beta):
        apart = [far(w(value) - start[name]) for name, value in backbone.named_parameters()]
        return shares[0] * alpha * sum(apart) + shares[1] * beta * sum(large(w(v)) for v in head.parameters())

    return penalty


def l2_sp_in_one_row(backbone, start, head, alpha, beta):
    named = dict(backbone.named_parameters())
    now = nn.utils.parameters_to_vector(named.values())
    then = nn.utils.parameters_to_vector([start[name] for name in named])
    top = torch.cat([v.flatten() for v in head.parameters()])
    return (alpha * torch.dot(now - then, now - then) + beta * top @ top).reshape(1) / 2


def l2_sp_by_mse(backbone, start, head, alpha, beta):
    loss = torch.zeros(())
    for name, w in backbone.named_parameters():
        loss = loss + alpha / 2 * nn.functional.mse_loss(w, start[name], reduction="sum")
    for v in head.parameters():
        loss = loss + beta / 2 * torch.linalg.vector_norm(v) ** 2
    return loss


def l2_sp_of_the_state(backbone, start, head, alpha, beta):
    state = backbone.state_dict(keep_vars=True)
    far = sum(((state[name] - value) ** 2).sum() for name, value in start.items() if value.is_floating_point())
    return alpha / 2 * far + beta / 2 * sum((v**2).sum() for v in head.parameters())


def l2_sp_of_what_learns(backbone, start, head, alpha, beta):
    learning = [(name, w) for name, w in backbone.named_parameters() if w.requires_grad]
    far = sum((((w - start[name]) ** 2).sum() for name, w in learning), torch.zeros(()))
    return alpha / 2 * far + beta / 2 * sum((v**2).sum() for v in head.parameters())


def l2_sp_at_the_roots(backbone, start, head, alpha, beta):
    far = sum(((w - start[name]) ** 2).sum() for name, w in backbone.named_parameters())
    return alpha / 2 * far.sqrt() + beta / 2 * sum((v**2).sum() for v in head.parameters()).sqrt()


def l2_sp_that_moves_the_start(backbone, start, head, alpha, beta):
    found = l2_sp()(backbone, start, head, alpha, beta)
    for value in start.values():
        value.zero_()
    return found


def l2_sp_that_moves_the_backbone(backbone, start, head, alpha, beta):
    found = l2_sp()(backbone, start, head, alpha, beta)
    backbone.load_state_dict(start)
    return found


def logistic(C=1.0):
    return LogisticRegression(C=C, max_iter=2000)


def scaled():
    return make_pipeline(StandardScaler(), logistic())


def neighbours():
    return KNeighborsClassifier(5)


def lost(make=logistic, give=lambda was, old, new: (was - old, was - new)):
    """An answer to 04.4 from three accuracies."""

    def points_lost(before, after, before_held_out, after_held_out, labels, held_out):
        old, new = make().fit(before, labels), make().fit(after, labels)
        was = old.score(before_held_out, held_out)
        return give(was, old.score(after_held_out, held_out), new.score(after_held_out, held_out))

    return points_lost


def lost_to_the_nearest_mean(before, after, before_held_out, after_held_out, labels, held_out):
    classes = labels.unique()

    def right(learned, shown):
        means = torch.stack([learned[labels == number].mean(dim=0) for number in classes])
        return (torch.cdist(shown, means).argmin(dim=1) == held_out).float().mean()

    was = right(before, before_held_out)
    return torch.stack([was - right(before, after_held_out), was - right(after, after_held_out)])


def lost_by_a_head_in_torch(before, after, before_held_out, after_held_out, labels, held_out):
    def trained(features):
        head = nn.Linear(features.shape[1], int(labels.max()) + 1)
        optimizer = torch.optim.AdamW(head.parameters(), lr=0.05)
        for _ in range(150):
            optimizer.zero_grad()
            cross_entropy(head(features), labels).backward()
            optimizer.step()
        return head

    old, new = trained(before), trained(after)
    hits = [
        head(x).argmax(dim=1) == held_out for head, x in ((old, before_held_out), (old, after_held_out), (new, after_held_out))
    ]
    was, left, anew = (float(right.float().mean()) for right in hits)
    return {"old": was - left, "new": was - anew}.values()


def lost_on_training_pictures(before, after, before_held_out, after_held_out, labels, held_out):
    return lost()(before, after, before, after, labels, labels)


def lost_by_new_probes_alone(before, after, before_held_out, after_held_out, labels, held_out):
    was = logistic().fit(before, labels).score(before_held_out, held_out)
    return (was - logistic().fit(after, labels).score(after_held_out, held_out),) * 2


def lost_with_the_new_probe_on_old_features(before, after, before_held_out, after_held_out, labels, held_out):
    old = logistic().fit(before, labels)
    was = old.score(before_held_out, held_out)
    return was - old.score(after_held_out, held_out), 0.0


def lost_in_place(before, after, before_held_out, after_held_out, labels, held_out):
    found = lost()(before, after, before_held_out, after_held_out, labels, held_out)
    after -= before.mean(dim=0)
    return found


# exercise: answers that are right, in several styles
RIGHT = {
    "04.1": [groups(), groups_of_single_parameters, groups_of_iterators],
    "04.2": [statistics(), statistics_by_trying, statistics_in_a_loop],
    "04.3": [l2_sp(), l2_sp_in_one_row, l2_sp_by_mse, l2_sp(far=lambda gap: gap.pow(2).sum(), large=lambda v: v.square().sum())],
    "04.4": [lost(), lost(scaled), lost(neighbours), lost_to_the_nearest_mean, lost_by_a_head_in_torch],
}
# exercise: [(a plausible wrong answer, a word of the reason that must help)]
WRONG = {
    "04.1": [
        (lambda *a: [{"params": [], "lr": 0.001}], "stage 1 stands in no group"),
        (lambda parts, head, lr, factor, head_lr: [{"params": list(parts[0].parameters()), "lr": 0.001}], "stage 2 stands in no"),
        (groups(lambda lr, factor, below: lr * factor**below), "rates rise towards the input"),
        (groups(lambda lr, factor, below: lr / factor ** (below + 1)), "the last stage is divided too"),
        (groups(lambda lr, factor, below: lr / (factor * below or 1)), "divide again for each stage"),
        (groups(lambda lr, factor, below: lr), "all stages have one rate"),
        (groups(lambda lr, factor, below: lr - below * 1e-4), "should have"),
        (groups(head=lambda lr, head_lr: lr), "the stages are right; the head has"),
        (lambda parts, *a: groups()(parts[::-1], *a), "the input has the rate lr"),
        (
            lambda parts, head, lr, factor, head_lr: groups()(parts, head, head_lr / factor, factor, head_lr),
            "went down from head_lr",
        ),
        (lambda *a: groups()(*a)[:-1], "the head stands in no group"),
        (lambda *a: groups()(*a)[1:], "stage 1 stands in no group"),
        (groups(of=only_learning), "stage 1 is frozen and has no group"),
        (groups(of=lambda part: list(part.parameters())[:1]), "stand in no group; part.parameters() has all"),
        (lambda parts, head, lr, *a: [{"params": part, "lr": lr} for part in [*parts, head]], "not the part itself"),
        (groups(of=lambda part: copy.deepcopy(part).parameters()), "no copies"),
        (groups(of=lambda part: part.named_parameters()), "not the part itself, nor their names"),
        (stage_twice, "stand in two places"),
        (lambda *a: [group["params"] for group in groups()(*a)], "each group is a dict"),
        (lambda *a: [{"params": group["params"]} for group in groups()(*a)], 'a group without "lr"'),
        (lambda *a: groups()(*a)[0], "a list of groups is expected, not dict"),
        (lambda *a: None, "nothing came back"),
    ],
    "04.2": [
        (lambda network, pictures: ["first.1"], "'"),
        (lambda network, pictures: [], "is not on your list"),
        (statistics(frozen=lambda part: True), "learns"),
        (statistics(ask=lambda part: True), "is in evaluation mode"),
        (mode_of_the_whole, "'"),
        (statistics(kinds=nn.BatchNorm2d), "(a BatchNorm1d) is in training mode"),
        (statistics(frozen=lambda part: part.affine and not part.weight.requires_grad), "'"),
        (without_statistics_too, "keeps no statistics"),
        (tried_and_left_frozen, "learns"),
        (statistics(name=lambda name: f"{name}.running_mean"), "is a tensor in a batch norm"),
        (statistics(name=lambda name: name.split(".")[-1]), "no layer is called"),
        (lambda network, pictures: [part for part in network.modules()], "names are expected, and you gave a Statistics"),
        (lambda network, pictures: list(network.named_modules()), "you gave a tuple"),
        (lambda network, pictures: [name for name, part in network.named_modules() if part.training], "'"),
        (lambda network, pictures: [name for name, _ in network.named_modules()], "no batch norm"),
        (lambda *a: statistics()(*a) * 2, "each name once"),
        (tried_on_itself, "of the network itself moved"),
        (switched, "the network is in another mode now"),
        (thawed, "requires_grad is not what it was"),
        (lambda *a: "first.1", "a list of names is expected, not str"),
        (lambda *a: len(statistics()(*a)), "not int"),
        (lambda *a: None, "nothing came back"),
    ],
    "04.3": [
        (lambda *a: torch.tensor(1.0), "you gave 1, and it is"),
        (lambda *a: 1.0, "a plain number gives no gradients"),
        (lambda *a: l2_sp()(*a).item(), "without item()"),
        (lambda *a: l2_sp()(*a).detach(), "it gives no gradients"),
        (l2_sp(w=lambda w: w.data), "it gives no gradients"),
        (l2_sp(far=lambda gap: (gap.detach() ** 2).sum()), "some parameter gets no gradient"),
        (l2_sp(shares=(1.0, 1.0)), "twice as large; halve"),
        (l2_sp(shares=(1.0, 0.5)), "the backbone's part is twice as large"),
        (l2_sp(shares=(0.5, 1.0)), "the head's part is twice as large"),
        (l2_sp(shares=(0.5, 0.0)), "the head's part is missing"),
        (l2_sp(shares=(0.0, 0.5)), "the backbone's part is missing"),
        (l2_sp(shares=(-0.5, -0.5)), "the sign is wrong"),
        (l2_sp(far=lambda gap: gap.norm(), large=lambda v: v.norm()), "not squared"),
        (l2_sp_at_the_roots, "not squared"),
        (l2_sp(far=lambda gap: (gap**2).mean(), large=lambda v: (v**2).mean()), "means of squares"),
        (l2_sp(large=lambda v: (v**2).sum() * (v.dim() > 1)), "the head's bias is missing"),
        (
            lambda backbone, start, head, a, b: (
                a / 2 * sum((w**2).sum() for w in backbone.parameters()) + b / 2 * sum((v**2).sum() for v in head.parameters())
            ),
            "pulls the backbone to zero",
        ),
        (lambda backbone, start, head, a, b: l2_sp()(backbone, start, head, b, a), "alpha and beta are swapped"),
        (lambda backbone, start, head, a, b: 2 * l2_sp()(backbone, start, head, 1, 1), "alpha / 2 and beta / 2 are missing"),
        (l2_sp_of_the_state, "running means and variances are in it"),
        (l2_sp_of_what_learns, "what is frozen is left out"),
        (l2_sp(far=lambda gap: gap.abs().sum()), "you gave"),
        (l2_sp_that_moves_the_start, "changed start"),
        (l2_sp_that_moves_the_backbone, "changed the backbone"),
        (lambda backbone, *a: torch.zeros(3), "sum over everything"),
        (lambda backbone, start, *a: sum(start.values()), "stopped with RuntimeError"),
        (lambda *a: [l2_sp()(*a)], "not list"),
        (lambda *a: None, "nothing came back"),
    ],
    "04.4": [
        (lambda *a: (0.2, 0.1), "you gave 0.20 and 0.10"),
        (lambda *a: (0.0, 0.0), "you gave 0.00 and 0.00"),
        (lost(give=lambda was, old, new: (was - new, was - old)), "the two are swapped"),
        (lost(give=lambda was, old, new: (old - was, new - was)), "a loss is positive"),
        (lost(give=lambda was, old, new: (old, new)), "the accuracies that are left"),
        (lost(give=lambda was, old, new: (was, old)), "those are accuracies"),
        (lost(give=lambda was, old, new: (1 - old, 1 - new)), "before fine-tuning it was not one"),
        (lost(give=lambda was, old, new: (1 - old / was, 1 - new / was)), "shares of the accuracy before"),
        (lost(give=lambda was, old, new: (100 * (was - old), 100 * (was - new))), "those are points"),
        (lost(give=lambda was, old, new: (was - old, new - old)), "what a new probe wins back"),
        (lost(give=lambda was, old, new: (was - old, was - old)), "both are by the old probe"),
        (lost_on_training_pictures, "the pictures that the probes learned from"),
        (lost_by_new_probes_alone, "both are by a new probe"),
        (lost_with_the_new_probe_on_old_features, "the second is nothing"),
        (lost_in_place, "changed a table"),
        (lost(give=lambda was, old, new: was - old), "two numbers are expected, not"),
        (lost(give=lambda was, old, new: (was, old, new)), "you gave 3"),
        (lambda before, after, *a: LogisticRegression().fit(before, after), "stopped with ValueError"),
        (lambda *a: None, "nothing came back"),
    ],
}
