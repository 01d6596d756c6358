"""Checks of lesson 04."""

import copy
import random
from itertools import combinations, pairwise

import numpy as np
import torch
from torch import nn

from course_utils.exercises import Exercise, NotYet, call


def some_stage(before: int, after: int) -> nn.Sequential:
    """A stage with parameters of several kinds, some of them deep."""
    inner = nn.Sequential(nn.Conv2d(after, after, 3, padding=1, bias=False), nn.BatchNorm2d(after))
    return nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU(), inner)


def rate_groups(answer) -> None:
    for frozen in (0, 2):
        count = random.randint(3, 5)
        widths = [3, *random.sample(range(4, 12), count)]
        parts = [some_stage(*pair) for pair in pairwise(widths)]
        head = nn.Linear(widths[-1], random.randint(2, 5))
        for part in parts[:frozen]:
            part.requires_grad_(False)
        lr, factor, head_lr = random.uniform(0.001, 0.01), random.uniform(2, 3), random.uniform(0.05, 0.1)
        name_of = {id(p): f"stage {number}" for number, part in enumerate(parts, 1) for p in part.parameters()}
        name_of |= {id(p): "the head" for p in head.parameters()}
        wanted = {f"stage {number}": lr / factor ** (count - number) for number in range(1, count + 1)} | {"the head": head_lr}

        found = call(answer, list(parts), head, lr, factor, head_lr)
        if found is None:
            raise NotYet("nothing came back; return the list of groups")
        if isinstance(found, dict) or not isinstance(found, list | tuple):
            raise NotYet(f"a list of groups is expected, not {type(found).__name__}")
        if not all(isinstance(group, dict) and "params" in group for group in found):
            raise NotYet('each group is a dict with "params", and "lr"')
        if not all("lr" in group for group in found):
            raise NotYet('a group without "lr" gets the rate of the optimizer; give each its own')
        if any(not isinstance(p, nn.Parameter) for group in found for p in as_list(group["params"])):
            raise NotYet('"params" holds parameters: part.parameters() gives them, not the part itself, nor their names')
        held = [(id(p), float(group["lr"])) for group in found for p in as_list(group["params"], spend=True)]
        if unknown := sum(place not in name_of for place, _ in held):
            raise NotYet(f"{unknown} parameters in your groups are of neither stages nor head; no copies, please")
        places = [place for place, _ in held]
        twice = sorted({name_of[place] for place in places if places.count(place) > 1})
        if twice:
            raise NotYet(f"parameters of {twice[0]} stand in two places; the optimizer would refuse that")
        rate = dict(held)
        for name in wanted:
            mine = [place for place, its in name_of.items() if its == name]
            missing = sum(place not in rate for place in mine)
            if missing and frozen and name in [f"stage {n}" for n in range(1, frozen + 1)]:
                raise NotYet(f"{name} is frozen and has no group; give it its place, so that it learns once it is unfrozen")
            if missing == len(mine):
                raise NotYet(f"{name} stands in no group, so it would never learn")
            if missing:
                raise NotYet(f"{missing} of the {len(mine)} parameters of {name} stand in no group; part.parameters() has all")
        given = {name: {rate[place] for place, its in name_of.items() if its == name} for name in wanted}
        if all(close(value, wanted[name]) for name, values in given.items() for value in values):
            continue
        stages = [f"stage {number}" for number in range(1, count + 1)]
        said = ", ".join(f"{name}: {min(given[name]):.2g}" for name in wanted)
        for rates, reason in (
            ([lr * factor**n for n in range(count)][::-1], "rates rise towards the input; divide by factor on the way down"),
            ([lr / factor**n for n in range(count)], "the input has the rate lr; the last stage should, the input has the least"),
            ([lr / factor ** (count - n) for n in range(count)], "the last stage is divided too; it gets lr itself"),
            (
                [lr / (factor * max(count - 1 - n, 1 / factor)) for n in range(count)],
                "divide again for each stage: factor**depth",
            ),
            ([lr] * count, "all stages have one rate; each gets a factor less than the one above"),
            ([lr / factor] * count, "all stages have one rate; each gets a factor less than the one above"),
            ([lr * factor**n for n in range(count)], "the last stage gets lr, and those below it less; yours grow from lr"),
            ([head_lr / factor ** (count - n) for n in range(count)], "you went down from head_lr; the last stage gets lr"),
        ):
            if all(close(value, want) for name, want in zip(stages, rates, strict=True) for value in given[name]):
                raise NotYet(f"{reason} ({said})")
        if all(close(value, wanted[name]) for name in stages for value in given[name]):
            raise NotYet(f"the stages are right; the head has {min(given['the head']):.2g}, and head_lr is {head_lr:.2g}")
        name = next(name for name in wanted if not all(close(value, wanted[name]) for value in given[name]))
        raise NotYet(f"with {count} stages, lr={lr:.2g} and factor={factor:.2g}, {name} should have {wanted[name]:.2g} ({said})")


def as_list(parameters, spend: bool = False) -> list:
    """Parameters of a group. An iterator is looked at once only, as the optimizer does."""
    if isinstance(parameters, nn.Parameter):
        return [parameters]
    if not spend and not isinstance(parameters, list | tuple):
        return [parameters] if isinstance(parameters, nn.Module) else []
    try:
        return list(parameters)
    except TypeError:
        return [None]


def close(value: float, wanted: float) -> bool:
    return abs(value - wanted) <= 1e-4 * abs(wanted)


NORMS = ("first.1", "block.1", "block.3.0", "head.3")  # of `Statistics`, with statistics and parameters


class Statistics(nn.Module):
    """A network with batch norms in every state: learning or frozen, in training mode or not, with statistics or without."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
        self.block = nn.Sequential(
            nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Sequential(nn.BatchNorm2d(5), nn.Dropout())
        )
        self.top = nn.Sequential(
            nn.Conv2d(5, 6, 1), nn.BatchNorm2d(6, track_running_stats=False), nn.BatchNorm2d(6, affine=False)
        )
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 7), nn.BatchNorm1d(7), nn.LayerNorm(7))

    def forward(self, pictures):
        return self.head(self.top(self.block(self.first(pictures))))


def statistics_network(plan: dict[str, str]) -> Statistics:
    """A network whose batch norms are each in the state that the plan names."""
    network = Statistics().train(random.random() < 0.5)
    network.requires_grad_(random.random() < 0.5)
    network.top[1].train(True).requires_grad_(False)
    for name, state in plan.items():
        norm = network.get_submodule(name)
        norm.train(state != "eval").requires_grad_(state in ("learning", "bias"))
        if state == "bias":
            norm.weight.requires_grad_(False)
    return network


def moving(answer) -> None:
    norms, states = random.sample(NORMS, 4), ("moves", "eval", "moves", "learning")
    for turn in range(4):  # so that each batch norm is once in each state
        plan = {name: states[(place + turn) % 4] for place, name in enumerate(norms)}
        plan["top.2"] = "moves" if turn % 2 else "eval"
        if turn == 1:
            plan[next(name for name, state in plan.items() if state == "learning")] = "bias"
        network = statistics_network(plan)
        if turn == 2:  # the mode of the whole says nothing
            network.training = not network.training
        modes = {name: part.training for name, part in network.named_modules()}
        grads = {name: p.requires_grad for name, p in network.named_parameters()}
        before = copy.deepcopy(network.state_dict())
        pictures = 2 * torch.randn(random.randint(5, 9), 3, 8, 8) + 1
        found = call(answer, network, pictures.clone())

        changed = sorted(key for key, value in network.state_dict().items() if not torch.equal(value, before[key]))
        if changed:
            raise NotYet(f"{changed[0]!r} of the network itself moved; look without letting pictures through, or try on a copy")
        if modes != {name: part.training for name, part in network.named_modules()}:
            raise NotYet("the network is in another mode now; leave it as it is, or work on a copy")
        if grads != {name: p.requires_grad for name, p in network.named_parameters()}:
            raise NotYet("requires_grad is not what it was; leave the network as it is, or work on a copy")
        if found is None:
            raise NotYet("nothing came back; return the list of names, an empty one where nothing would move")
        if isinstance(found, str) or not hasattr(found, "__iter__"):
            raise NotYet(f"a list of names is expected, not {type(found).__name__}")
        names = list(found)
        if any(not isinstance(name, str) for name in names):
            odd = next(name for name in names if not isinstance(name, str))
            raise NotYet(
                f"names are expected, and you gave a {type(odd).__name__}; named_modules() gives pairs of name and module"
            )
        compare_names(set(names), plan, network)
        if len(names) != len(set(names)):
            raise NotYet("each name once, please")


def compare_names(names: set[str], plan: dict[str, str], network: nn.Module) -> None:
    """Raise `NotYet` where the names are not those that the plan lets move."""
    known = {name for name, _ in network.named_modules()}
    tails = ("running_mean", "running_var", "num_batches_tracked", "weight", "bias")
    if strange := sorted(names - known):
        if strange[0].endswith(tails):
            raise NotYet(f"{strange[0]!r} is a tensor in a batch norm; the name of the layer is asked for, up to the last dot")
        raise NotYet(f"no layer is called {strange[0]!r}; named_modules() gives the names, such as 'block.3.0'")
    norms = (nn.BatchNorm1d, nn.BatchNorm2d)
    for name in sorted(names):
        if not isinstance(network.get_submodule(name), norms):
            raise NotYet(f"{name!r} is a {type(network.get_submodule(name)).__name__}, no batch norm")
    wanted = {name for name, state in plan.items() if state == "moves"}
    for name in sorted(names - wanted):
        state = plan.get(name, "none")
        reason = {
            "eval": f"{name!r} is in evaluation mode, so its statistics stay; each layer has a mode of its own",
            "learning": f"{name!r} learns, so its statistics may move; asked for are those of which no parameter learns",
            "bias": f"the bias of {name!r} learns; asked for are layers of which no parameter learns",
            "none": f"{name!r} keeps no statistics: its running_mean is None",
        }[state]
        raise NotYet(reason)
    for name in sorted(wanted - names):
        norm = network.get_submodule(name)
        extra = " (it has no parameters at all)" if not norm.affine else " (a BatchNorm1d)" if isinstance(norm, norms[0]) else ""
        raise NotYet(f"{name!r}{extra} is in training mode and nothing of it learns: it would move, and is not on your list")


def penalty(answer) -> None:
    for frozen in (False, True):
        network, head = some_stage(3, random.randint(4, 6)), nn.Linear(random.randint(4, 6), random.randint(2, 4))
        start = {name: value.clone() for name, value in network.state_dict().items()}
        with torch.no_grad():
            for tensor in [*network.parameters(), *(b for b in network.buffers() if b.is_floating_point()), *head.parameters()]:
                tensor.add_(torch.randn_like(tensor))
        if frozen:
            network[0].requires_grad_(False)
        alpha, beta = random.uniform(0.5, 1), random.uniform(1.5, 3)
        kept, now = {name: value.clone() for name, value in start.items()}, copy.deepcopy(network.state_dict())
        gaps = [(w - start[name]).detach().double() for name, w in network.named_parameters()]
        heads = [v.detach().double() for v in head.parameters()]
        buffers = [(b - start[name]).double() for name, b in network.named_buffers() if b.is_floating_point()]
        squares, large, moved = (sum(float((x**2).sum()) for x in xs) for xs in (gaps, heads, buffers))
        weights_alone = float((head.weight.detach().double() ** 2).sum())
        zero = sum(float((w.detach().double() ** 2).sum()) for w in network.parameters())
        learning = sum(
            float(((w - start[name]).detach().double() ** 2).sum()) for name, w in network.named_parameters() if w.requires_grad
        )
        expected = alpha / 2 * squares + beta / 2 * large

        found = call(answer, network, start, head, alpha, beta)
        if any(not torch.equal(start[name], kept[name]) for name in kept) or start.keys() != kept.keys():
            raise NotYet("your function changed start, and needs it in every step; leave it as it is")
        if any(not torch.equal(value, now[name]) for name, value in network.state_dict().items()):
            raise NotYet("your function changed the backbone; a penalty only looks at it")
        if found is None:
            raise NotYet("nothing came back; return the penalty")
        if not isinstance(found, torch.Tensor):
            if isinstance(found, int | float | np.number):
                raise NotYet("a plain number gives no gradients, so nothing would be pulled; return the tensor, without item()")
            raise NotYet(f"a tensor of one number is expected, not {type(found).__name__}")
        if found.numel() != 1:
            raise NotYet(f"a tensor of one number is expected, and yours has shape {tuple(found.shape)}; sum over everything")
        value = float(found.detach())
        roots, root = sum(float(gap.norm()) for gap in gaps), squares**0.5
        counts = sum(gap.numel() for gap in gaps), sum(v.numel() for v in heads)
        halves = alpha / 2, beta / 2
        for other, reason in (
            (halves[0] * (squares + moved) + halves[1] * large, "running means and variances are in it; they are no parameters"),
            (2 * expected, "it is twice as large; halve alpha and beta"),
            (alpha * squares + halves[1] * large, "the backbone's part is twice as large; it is alpha / 2"),
            (halves[0] * squares + beta * large, "the head's part is twice as large; it is beta / 2"),
            (halves[0] * squares, "the head's part is missing"),
            (halves[1] * large, "the backbone's part is missing"),
            (halves[0] * squares + halves[1] * weights_alone, "the head's bias is missing; it is pulled to zero as well"),
            (halves[0] * zero + halves[1] * large, "that pulls the backbone to zero, as weight decay does; take w - w0"),
            (halves[0] * roots + halves[1] * sum(float(v.norm()) for v in heads), "the norms are not squared"),
            (halves[0] * root + halves[1] * large**0.5, "the norms are not squared"),
            (halves[0] * squares / counts[0] + halves[1] * large / counts[1], "those are means of squares; sums are asked for"),
            (
                halves[0] * sum(float((gap**2).mean()) for gap in gaps) + halves[1] * sum(float((v**2).mean()) for v in heads),
                "those are means of squares; sums are asked for",
            ),
            (halves[1] * squares + halves[0] * large, "alpha and beta are swapped; alpha is the backbone's"),
            (squares + large, "alpha / 2 and beta / 2 are missing"),
            (-expected, "the sign is wrong; being far must cost"),
            (halves[0] * learning + halves[1] * large, "what is frozen is left out; all parameters of the backbone count"),
        ):
            if close(value, other) and not close(value, expected):
                raise NotYet(f"{reason} (you gave {value:.4g}, and it is {expected:.4g})")
        if not close(value, expected):
            raise NotYet(f"you gave {value:.4g}, and it is {expected:.4g}")
        learns = [w for w in network.parameters() if w.requires_grad]
        pulls = [gap for gap, w in zip(gaps, network.parameters(), strict=True) if w.requires_grad]
        if not found.requires_grad:
            raise NotYet("the value is right, but it gives no gradients: something was detached, or computed without them")
        given = torch.autograd.grad(found, [*learns, *head.parameters()], allow_unused=True)
        wanted = [alpha * gap for gap in pulls] + [beta * v for v in heads]
        for gradient, pull in zip(given, wanted, strict=True):
            if gradient is None or not torch.allclose(gradient.double(), pull, rtol=1e-3, atol=1e-4):
                raise NotYet("the value is right, but some parameter gets no gradient, or a wrong one: take w itself, not w.data")


def drawn_source() -> tuple[list[torch.Tensor], tuple[float, float], list[tuple[tuple[float, float], str]]]:
    """Tables for 04.4, what is lost in them, and what mistakes give: `classes` lie apart, and after fine-tuning elsewhere."""
    classes, width = random.randint(5, 7), random.randint(9, 12)
    each, m = random.randint(12, 16), random.randint(150, 200)
    labels = torch.arange(classes).repeat(each)[torch.randperm(classes * each)]
    held_out = torch.cat([torch.arange(classes), torch.randint(classes, (m - classes,))])[torch.randperm(m)]
    old = 6 * torch.linalg.qr(torch.randn(width, width)).Q[:classes]
    turn, moved = torch.arange(classes), random.sample(range(classes), random.randint(3, classes - 1))
    turn[moved] = turn[moved[1:] + moved[:1]]  # these classes now lie where others lay: an old probe takes them for those
    blurred, gone = torch.rand(m) < random.uniform(0.05, 0.1), torch.rand(m) < random.uniform(0.15, 0.25)
    before_looks, after_looks = (torch.where(odd, (held_out + 1) % classes, held_out) for odd in (blurred, gone))
    places = [labels, turn[labels], before_looks, turn[after_looks]]
    tables = [old[place] + 0.3 * torch.randn(len(place), width) for place in places]

    was, by_old, by_new = ((found == held_out).double().mean().item() for found in (before_looks, turn[after_looks], after_looks))
    first, second = was - by_old, was - by_new
    on_training = (turn[labels] != labels).double().mean().item()
    mistakes = [
        ((second, first), "the two are swapped: the old probe first"),
        ((-first, -second), "what is lost is before minus after, so a loss is positive"),
        ((by_old, by_new), "those are the accuracies that are left; asked for is what was lost"),
        ((was, by_old), "those are accuracies; asked for is what was lost"),
        ((1 - by_old, 1 - by_new), "that is one minus what is left; before fine-tuning it was not one"),
        ((on_training, 0.0), "you measured on the pictures that the probes learned from; take those held out"),
        ((first / was, second / was), "those are shares of the accuracy before; a plain difference is asked for"),
        ((100 * first, 100 * second), "those are points; give shares, between -1 and 1"),
        ((second, second), "both are by a new probe; the old one learned from `before`, and looks at after_held_out"),
        ((first, first), "both are by the old probe; the new one learns from `after`"),
        ((first, first - second), "the second is what a new probe wins back; asked for is what stays lost"),
        ((first, 0.0), "the second is nothing: a new probe must look at after_held_out, not at before_held_out"),
        ((0.0, second), "the first is nothing: the old probe must look at after_held_out"),
    ]
    return [*tables, labels, held_out], (first, second), mistakes


def same(pair: tuple[float, float], other: tuple[float, float], tolerance: float = 0.012) -> bool:
    return max(abs(one - two) for one, two in zip(pair, other, strict=True)) < tolerance


def lost(answer) -> None:
    for _ in range(2):
        while True:  # until every mistake shows
            tables, wanted, mistakes = drawn_source()
            pairs = [wanted, *(pair for pair, _ in mistakes)]
            if not any(same(one, other, 0.025) for one, other in combinations(pairs, 2)):
                break
        given = [table.clone() for table in tables]
        found = two_numbers(call(answer, *given))
        if any(not torch.equal(one, other) for one, other in zip(given, tables, strict=True)):
            raise NotYet("your function changed a table that it was given; make new ones")
        if same(found, wanted):
            continue
        said = f"lost are {wanted[0]:.2f} and {wanted[1]:.2f}, and you gave {found[0]:.2f} and {found[1]:.2f}"
        for pair, reason in mistakes:
            if same(found, pair):
                raise NotYet(f"{reason} ({said})")
        raise NotYet(said)


def two_numbers(found) -> tuple[float, float]:
    """An answer as two numbers."""
    if found is None:
        raise NotYet("nothing came back; return the two numbers")
    try:
        values = [float(value) for value in found]
    except (TypeError, ValueError, RuntimeError):
        raise NotYet(f"two numbers are expected, not {type(found).__name__}") from None
    if len(values) != 2:
        raise NotYet(f"two numbers are expected, and you gave {len(values)}")
    return values[0], values[1]


EXERCISES = {
    "04.1": Exercise(
        rate_groups,
        "Go through the stages from the last to the first, and divide the rate after each. list(stage.parameters()) has all of a "
        "stage's parameters, frozen or not. The head is one more group.",
    ),
    "04.2": Exercise(
        moving,
        "Three things must be so: the layer's own .training is True, running_mean is not None, and none of its parameters has "
        "requires_grad. The mode of the whole network says nothing about a layer in it.",
    ),
    "04.3": Exercise(
        penalty,
        "named_parameters() gives names and tensors; start[name] is where each began. Sum ((w - start[name]) ** 2).sum() over "
        "them, and (v ** 2).sum() over the head's. Keep tensors: item() and data cut the gradients off.",
    ),
    "04.4": Exercise(
        lost,
        "Fit one probe on `before` and one on `after`. Three accuracies on held-out pictures are all you need: the old probe on "
        "the features before, the old probe on those after, the new probe on those after.",
    ),
}
