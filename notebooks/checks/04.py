"""Checks of lesson 04."""

import copy
import math
import random
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import nn

from course_utils.exercises import Exercise, NotYet, call, number


def same(found: float, expected: float, tolerance: float = 1e-5) -> bool:
    return math.isclose(found, expected, rel_tol=tolerance)


def conv(before: int, after: int) -> list[nn.Module]:
    return [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]


def state_of(network: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every number in a network."""
    return {name: value.detach().clone() for name, value in network.state_dict().items()}


def altered(network: nn.Module, before: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors that are not what they were, counters last."""
    now = network.state_dict()
    alike = {name for name, value in before.items() if name in now and torch.equal(now[name], value)}
    return sorted((before.keys() | now.keys()) - alike, key=lambda name: (name.endswith("num_batches_tracked"), name))


def call_alone(function, *arguments):
    """As `call`, and `NotYet` where gradients are off afterwards for everything."""
    enabled = torch.is_grad_enabled()
    try:
        found = call(function, *arguments)
        left_off = enabled and not torch.is_grad_enabled()
    finally:
        torch.set_grad_enabled(enabled)
    if left_off:
        raise NotYet("torch.set_grad_enabled(False) stays: nothing in the notebook gets a gradient from then on, in any network")
    return found


def groups_of(found) -> tuple[list[dict], list[list[torch.Tensor]], bool]:
    """An answer as groups that an optimizer can read, the parameters of each, and whether a generator gave none."""
    if isinstance(found, dict) or not isinstance(found, Iterable):
        raise NotYet(f"a list of dicts is expected, not {type(found).__name__}")
    groups, members, spent = [], [], False
    for group in call(list, found):  # a generator runs only now
        if not isinstance(group, dict):
            raise NotYet(f"a list of dicts is expected, and one thing in yours is a {type(group).__name__}")
        for key in ("params", "lr"):
            if key not in group:
                raise NotYet(f"a group has no {key!r}; its keys are {', '.join(map(repr, group)) or 'none'}")
        params = group["params"]
        if not isinstance(params, Iterable) or isinstance(params, nn.Module):
            raise NotYet(f"'params' of a group is a {type(params).__name__}; give it parameters, stage.parameters()")
        if isinstance(params, Iterator):
            params = call(list, params)
            spent |= not params
        groups.append({**group, "params": params})
        tensors = [params] if isinstance(params, torch.Tensor) else list(params)
        # torch takes pairs of a name and a parameter too
        tensors = [part[1] if isinstance(part, tuple) and len(part) == 2 else part for part in tensors]
        for tensor in tensors:
            if not isinstance(tensor, torch.Tensor):
                raise NotYet(f"'params' of a group holds a {type(tensor).__name__}; parameters are expected, stage.parameters()")
        members.append(tensors)
    return groups, members, spent


def ladders(lr: float, head_lr: float, factor: float, count: int) -> list[tuple[list[float], str]]:
    """Rates of the stages from input to output: the right ones first, then mistaken ones with their reasons."""
    up, down = range(count), range(count)[::-1]
    return [
        ([lr / factor**n for n in down], ""),
        (
            [lr / factor**n for n in up],
            "that is turned round, your first stage is the fastest; lr goes to the last one, the smallest rate to the first",
        ),
        (
            [lr / factor ** (n + 1) for n in down],
            "the last stage has lr itself, and yours is divided by factor once: count from 0 there",
        ),
        (
            [lr * factor**n for n in down],
            "you multiplied by factor, so the first stage is the fastest; a rate before the last one is smaller: divide",
        ),
        (
            [lr * factor**n for n in up],
            "you began with lr at the first stage and went up; lr goes to the last one, and the others are smaller",
        ),
        ([head_lr / factor**n for n in down], "your stages begin with head_lr; the last one has lr, head_lr goes to the head"),
        ([lr] * count, "all your stages have lr; each one before the last is a factor slower than the one after it"),
    ]


def my_param_groups(answer) -> None:
    for count, plain in ((random.randint(3, 5), True), (random.randint(3, 5), False), (1, False)):
        while True:  # until every mistake shows
            lr, head_lr, factor = 10 ** random.uniform(-4, -3), 10 ** random.uniform(-3, -1.5), random.uniform(2.2, 4)
            mistakes = ladders(lr, head_lr, factor, count)
            pairs = [(np.log(a), np.log(b)) for n, (a, _) in enumerate(mistakes) for b, _ in mistakes[:n]]
            if not same(lr, head_lr, 0.05) and (count == 1 or all(abs(a - b).max() > 0.05 for a, b in pairs)):
                break
        kind = nn.Sequential if plain else lambda *layers: nn.ModuleList([nn.Sequential(*layers)])  # as course_utils has them
        stages = [kind(*conv(4, 4), *conv(4, 4)) for _ in range(count)]
        head = nn.Linear(4, 3) if plain else nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3))
        for stage in stages[: random.randint(1, max(1, count - 1))]:
            stage.requires_grad_(False)
        next(stages[-1].parameters()).requires_grad_(False)
        parts = {f"stages[{n}]": stage for n, stage in enumerate(stages)} | {"head": head}
        places = {id(p): (part, name) for part, module in parts.items() for name, p in module.named_parameters()}
        frozen = {id(p) for stage in stages for p in stage.parameters() if not p.requires_grad}

        given = list(stages)
        groups, members, spent = groups_of(call(answer, given, head, lr, head_lr, factor))
        if given != stages:
            raise NotYet("your function changed the list `stages` itself, and whoever gave it needs it; reversed() makes another")
        if frozen != {id(p) for module in parts.values() for p in module.parameters() if not p.requires_grad}:
            raise NotYet("your function changed which parameters get a gradient; it makes groups, and leaves that as it is")
        rates: dict[int, float] = {}
        for group, tensors in zip(groups, members, strict=True):
            rate = number(group["lr"])
            for tensor in tensors:
                if id(tensor) not in places:
                    raise NotYet("a group holds a tensor that is no parameter of the stages or the head; give them, not copies")
                if id(tensor) in rates:
                    part, name = places[id(tensor)]
                    raise NotYet(f"{name!r} of {part} is there twice; every parameter goes into one group, once")
                rates[id(tensor)] = rate
        lost = [key for key in places if key not in rates]
        if lost:
            part, name = places[lost[0]]
            gone = [part for part in parts if all(key in lost for key, (its, _) in places.items() if its == part)]
            if set(lost) == frozen:
                raise NotYet(
                    f"{part} is frozen, and you left out what is; give it a place, since it may be unfrozen later, and until "
                    "then the optimizer passes over it"
                )
            if gone == ["head"]:
                raise NotYet("the head is in no group, so it would stay as it was drawn; it gets one, with head_lr")
            if gone and spent:
                raise NotYet(f"a generator in 'params' gave nothing for {gone[0]}: it runs once; list(stage.parameters()) stays")
            if gone:
                raise NotYet(f"nothing of {gone[0]} is in any group; every stage gets one, and the head too")
            raise NotYet(
                f"{len(lost)} of {len(places)} parameters are in no group, such as {name!r} of {part}; parameters() has them "
                "all, weights and biases, however deep"
            )
        found = {}
        for part, module in parts.items():
            its = [rates[id(p)] for p in module.parameters()]
            if not all(same(rate, its[0]) for rate in its):
                raise NotYet(f"{part} has more than one rate, such as {min(its):.3g} and {max(its):.3g}; one is asked for")
            found[part] = its[0]
        climb, expected = [found[f"stages[{n}]"] for n in range(count)], mistakes[0][0]
        if not all(map(same, climb, expected)):
            for ladder, reason in mistakes[1:]:
                if count > 1 and all(map(same, climb, ladder)):
                    raise NotYet(reason)
            n = max(n for n in range(count) if not same(climb[n], expected[n]))
            said = f"with lr = {lr:.3g} and factor = {factor:.2f}, stages[{n}] of {count} has the rate {climb[n]:.3g}"
            if n == count - 1:
                raise NotYet(f"{said}; it is the last one, so its rate is lr")
            raise NotYet(
                f"{said}, and {expected[n]:.3g} was expected: the next stage's {expected[n + 1]:.3g} divided by factor. Each "
                "step divides once more, so factors multiply"
            )
        if not same(found["head"], head_lr):
            said = f"the head has the rate {found['head']:.3g}, and head_lr is {head_lr:.3g}"
            for tensors in members:
                mixed = {places[id(tensor)][0] for tensor in tensors}
                if "head" in mixed and len(mixed) > 1:
                    raise NotYet(f"{said}: it shares a group with {min(mixed - {'head'})}; give it one of its own")
            raise NotYet(f"{said}" + ("; yours is lr, that of the last stage" if same(found["head"], lr) else ""))
        try:
            torch.optim.AdamW(groups)
        except Exception as error:
            raise NotYet(f"the rates are right, but torch.optim.AdamW stopped with {type(error).__name__}: {error}") from error


class Part(nn.Sequential):
    """Layers in a row that remember whether they were put in evaluation mode, and frozen."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__(*layers)
        self.was_still = self.was_frozen = False

    def train(self, mode: bool = True):
        self.was_still |= not mode
        return super().train(mode)

    def requires_grad_(self, requires_grad: bool = True):
        self.was_frozen |= not requires_grad
        return super().requires_grad_(requires_grad)


class Network(nn.Module):
    """A small network with batch norm and dropout everywhere, parts within parts, and a bare parameter."""

    def __init__(self) -> None:
        super().__init__()
        a, b, c, classes = (random.randint(4, 8) for _ in range(4))
        self.stem = Part(*conv(3, a), nn.Dropout(0.3))
        inner = Part(*conv(c, c), nn.Dropout(0.3))
        self.body = Part(Part(*conv(a, b), nn.Dropout(0.3)), Part(nn.Conv2d(b, c, 1), inner, nn.BatchNorm2d(c)))
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.3), nn.Linear(c, classes))
        self.scale = nn.Parameter(torch.rand(classes) + 0.5)

    def forward(self, pictures):
        return self.head(self.body(self.stem(pictures))) * self.scale


def pictures_of(count: int) -> torch.Tensor:
    """Pictures of any size, away from batch norm's first means."""
    return 2 * torch.randn(count, 3, random.randint(6, 8), random.randint(9, 11)) + 1


def drawn_network(training: bool, learning: bool) -> Network:
    """A network that has seen pictures, so that its two modes differ."""
    network = Network()
    with torch.no_grad():
        for _ in range(2):
            network(pictures_of(9))
    return network.train(training).requires_grad_(learning)


# the place of `frozen`, whether the network comes in training mode, and with gradients
ARRIVALS = [("body", True, True), ("body.1.1", False, False), ("stem", False, True), ("body.0", True, False)]


def train_all_but(answer) -> None:
    for place, training, learning in ARRIVALS:
        network = drawn_network(training, learning)
        frozen = network.get_submodule(place)
        before, reference = state_of(network), copy.deepcopy(frozen).eval()
        frozen.was_still = frozen.was_frozen = False
        call_alone(answer, network, frozen)
        if names := altered(network, before):
            raise NotYet(f"{names[0]!r} is not what it was; freezing changes no number, and takes none away")
        said = f"with `frozen` at {place!r}, "

        mine, rest = {}, {}
        for name, parameter in network.named_parameters():
            (mine if f"{name}.".startswith(f"{place}.") else rest)[name] = parameter.requires_grad
        loose, stuck = [name for name in mine if mine[name]], [name for name in rest if not rest[name]]
        if loose:
            said += f"{len(loose)} of its {len(mine)} parameters would still get a gradient, such as {loose[0]!r}"
            if "requires_grad" in vars(frozen):
                raise NotYet(f"{said}: frozen.requires_grad = ... makes a new attribute, requires_grad_(False) is the method")
            if frozen.was_frozen and len(loose) == len(mine):
                raise NotYet(f"{said}: you froze it, and what came after undid it; network.requires_grad_(True) goes first")
            if len(loose) == len(mine):
                raise NotYet(f"{said}: the mode does not change that, frozen.requires_grad_(False) does")
            raise NotYet(f"{said}; frozen.parameters() has them all, however deep")
        if stuck:
            said += f"{len(stuck)} of {len(rest)} parameters outside it get no gradient, such as {stuck[0]!r}"
            if not learning:
                raise NotYet(f"{said}: the network came without gradients, and all but `frozen` needs them back")
            raise NotYet(f"{said}; of `frozen` alone they are switched off")

        inside = set(frozen.modules())
        outside = {name or "the network itself": module for name, module in network.named_modules() if module not in inside}
        still = [name for name, module in outside.items() if not module.training]
        if len(still) == len(outside):
            if training:
                raise NotYet(f"{said}the whole network is in evaluation mode; only `frozen` goes there")
            raise NotYet(f"{said}the rest is in evaluation mode, as it came; network.train() puts it in training mode")
        if still:
            raise NotYet(f"{said}{still[0]!r} is outside it, and in evaluation mode; network.train() reaches every part")

        into, out = [], []

        def read(module, inputs, output, into=into, out=out):
            into.append(inputs[0].detach().clone()), out.append(output.detach().clone())

        frozen.register_forward_hook(read)
        pictures = pictures_of(7)
        try:
            with torch.enable_grad():
                for _ in range(2):
                    network(pictures.clone()).sum().backward()
        except Exception as error:
            raise NotYet(f"pictures do not go through it any more: {type(error).__name__}: {error}") from error
        moved = [name for name in altered(network, before) if name.startswith(f"{place}.")]
        with torch.no_grad():
            kept = all(torch.allclose(b, reference(a), rtol=1e-4, atol=1e-4) for a, b in zip(into, out, strict=True))
        if moved or not kept:
            awake = {name: part for name, part in network.named_modules() if part in inside and part.training}
            norms = [name for name, part in awake.items() if isinstance(part, nn.BatchNorm2d)]
            drops = [name for name, part in awake.items() if isinstance(part, nn.Dropout)]
            said += f"{moved[0]!r} moved when pictures went through" if moved else "what comes out of it is not what it was"
            if not frozen.training and norms + drops:
                raise NotYet(f"{said}: it is in evaluation mode, {(norms + drops)[0]!r} in it is not; frozen.eval() reaches all")
            if norms and frozen.was_still:
                raise NotYet(f"{said}: it was in evaluation mode, and network.train() came after and undid it; do that first")
            if norms:
                raise NotYet(f"{said}: no gradient reaches it, but in training mode batch norm measures anew: frozen.eval()")
            if drops:
                raise NotYet(f"{said}: batch norm is still, but dropout at {drops[0]!r} is on; frozen.eval() reaches both")
            raise NotYet(f"{said}; its parameters and its mode are all there is to change")
        cut = [name for name, parameter in network.named_parameters() if name in rest and parameter.grad is None]
        if cut:
            raise NotYet(f"{said}{cut[0]!r} got no gradient: gradients must pass through `frozen` to what comes before it")


def values_of(found, what: str) -> torch.Tensor:
    """An answer as a tensor of float64."""
    try:
        values = found.detach().cpu() if isinstance(found, torch.Tensor) else torch.as_tensor(np.asarray(found))
        return values.double()
    except (TypeError, ValueError, RuntimeError):
        raise NotYet(f"{what} is expected as a tensor, not {type(found).__name__}") from None


def near(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> bool:
    return found.shape == expected.shape and torch.allclose(found, expected.double(), rtol=tolerance, atol=tolerance)


def head_from_probe(answer) -> None:
    for square in (True, False, False):  # in a square, what is divided along the wrong side fits too
        while True:  # until every mistake shows
            classes = random.randint(3, 6)
            width = classes if square else classes + random.randint(2, 6)
            tensors = {
                "weight": torch.randn(classes, width),
                "offset": torch.randn(classes),
                "mean": torch.randn(width) * 2 + 1,
                "deviation": torch.empty(width).uniform_(-1.5, 1.5).exp(),
            }
            w, b, m, s = (value.double() for value in tensors.values())
            weight, bias = w / s, b - w / s @ m
            weights = [
                (w * s, "you multiplied the weights by the deviation; f is divided by it, so the weights are too"),
                (w, "the weights came back as they were; the division by the deviation goes into them"),
                (w / s**2, "you divided by the variance; by the deviation itself, once"),
                (w / s.sqrt(), "you divided by the root of the deviation; it is no variance, so divide by it as it is"),
            ]
            biases = [
                (b, "the mean's part is missing: W (f - m) / s has a part without f, which belongs there"),
                (b + weight @ m, "the mean is subtracted, so the sign of its part is -"),
                (b - w @ m, "the mean is divided by the deviation too"),
                (b - w * s @ m, "divide the mean by the deviation, as f is"),
                (-weight @ m, "the probe's own offset is missing"),
            ]
            if square:
                rows = (w.T / s).T
                weights += [
                    (weight.T, "the weights are transposed; one row is one class"),
                    (rows, "you divided along the classes; each feature, one column of the weights, has its own deviation"),
                ]
                divided = "the probe's offset is added after the division; leave it whole"
                biases += [(b / s - weight @ m, divided), (b / s, divided), ((b - w @ m) / s, divided)]
                biases.append((b - weight.T @ m, "you summed along the classes; sum W m / s over the features"))
            options = [[weight, *(mistake for mistake, _ in weights)], [bias, *(mistake for mistake, _ in biases)]]
            if not any(near(a, b, 0.02) for parts in options for n, a in enumerate(parts) for b in parts[:n]):
                break
        given = {name: value.clone() for name, value in tensors.items()}
        found = call(answer, *given.values())
        for name, value in tensors.items():
            if not torch.equal(given[name], value):
                raise NotYet(f"your function changed {name} itself, and whoever gave it needs it; make a new tensor")
        if not isinstance(found, tuple | list) or len(found) != 2:
            raise NotYet(f"two tensors are expected, the head's weight and its bias, not {type(found).__name__}")
        first, second = (values_of(part, what) for part, what in zip(found, ("the weight", "the bias"), strict=True))
        shapes = [tuple(first.shape), tuple(second.shape)]
        wanted = [(classes, width), (classes,)]
        if shapes == wanted[::-1]:
            raise NotYet("the weight comes first, then the bias; yours are swapped")
        if shapes[0] == wanted[0][::-1] and not square:
            raise NotYet(f"the weight is transposed: you gave shape {shapes[0]}, and one row is one class, {wanted[0]}")
        if shapes != wanted:
            raise NotYet(f"shapes {wanted[0]} and {wanted[1]} are expected, and you gave {shapes[0]} and {shapes[1]}")
        for what, values, right, mistakes in (("weight", first, weight, weights), ("bias", second, bias, biases)):
            if near(values, right):
                continue
            for mistake, reason in mistakes:
                if near(values, mistake):
                    raise NotYet(("the weights are right, the bias is not: " if what == "bias" else "") + reason)
            flat = (values - right).abs().nan_to_num(torch.inf).flatten()
            place = [int(i) for i in np.unravel_index(int(flat.argmax()), right.shape)]
            raise NotYet(
                f"in the {what}, at {place}, you gave {values[tuple(place)]:.3f} where {right[tuple(place)]:.3f} belongs; on any "
                "f, both heads must give the same logits"
            )


class Model(nn.Module):
    """A backbone with batch norm, whose running means are no zeros, and a head; nothing in it is zero."""

    def __init__(self) -> None:
        super().__init__()
        a, b = random.randint(2, 4), random.randint(3, 5)
        last = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(b, b))
        self.backbone = nn.Sequential(nn.Sequential(*conv(3, a)), nn.Sequential(*conv(a, b)), last)
        self.head = nn.Linear(b, random.randint(3, 6))
        with torch.no_grad():
            for value in self.parameters():
                value += 0.4 * torch.randn_like(value)
            for value in self.backbone.buffers():
                value += torch.rand_like(value) + 0.3 if value.is_floating_point() else random.randint(2, 5)


def penalties(model: Model, start: dict, alpha: float, beta: float) -> list[tuple[float, str]]:
    """What L2-SP is, first, then what mistakes make of it, with reasons."""
    now = {name: value.detach().double() for name, value in model.backbone.named_parameters()}
    steps = {name: value - start[name].double() for name, value in now.items()}
    buffers = {name: value.double() for name, value in model.backbone.named_buffers()}
    head = {name: value.detach().double() for name, value in model.head.named_parameters()}
    norms = {name for name, value in now.items() if name.startswith(("0.1.", "1.1."))}

    def squares(parts, keep=lambda name: True):
        return sum((value**2).sum().item() for name, value in parts.items() if keep(name))

    def together(of, backbone=steps):
        return alpha / 2 * of(backbone.values()) + beta / 2 * of(head.values())

    def flat(parts):
        return torch.cat([value.flatten() for value in parts])

    moved, size, whole = squares(steps), squares(head), squares(now)
    means = squares(buffers, lambda name: not name.endswith("tracked"))
    counted = "you counted batch norm's running means and variances; they are buffers, and named_parameters() leaves them out"
    bias_only = squares(head, lambda name: name == "bias")
    weights = squares(steps, lambda name: name.endswith("weight"))
    halves = "the halves are missing: alpha / 2 and beta / 2"
    root = "the norms are squared in it: sum the squares, and take no root"
    mean = "those are means; sum over all numbers"
    alone = "alpha pulls the backbone alone; the head has beta"
    return [
        (alpha / 2 * moved + beta / 2 * size, ""),
        (alpha * moved + beta * size, halves),
        (alpha / 2 * moved + beta * size, "the half is missing before the head's part: beta / 2"),
        (alpha * moved + beta / 2 * size, "the half is missing before the backbone's part: alpha / 2"),
        (beta / 2 * moved + alpha / 2 * size, "alpha and beta are swapped: alpha belongs to the backbone, beta to the head"),
        (together(lambda parts: flat(parts).norm().item()), root),
        (together(lambda parts: sum(value.norm().item() for value in parts)), root),
        (together(lambda parts: flat(parts).abs().sum().item()), "those are absolute values; square the numbers"),
        (together(lambda parts: flat(parts).sum().item() ** 2), "you summed, then squared; square each number first"),
        (together(lambda parts: sum(value.sum().item() ** 2 for value in parts)), "you summed, then squared; square first"),
        (together(lambda parts: (flat(parts) ** 2).mean().item()), mean),
        (together(lambda parts: sum((value**2).mean().item() for value in parts)), mean),
        (alpha / 2 * moved, "the head's part is missing: beta / 2 times the squares of its weights and biases"),
        (beta / 2 * size, "the backbone's part is missing: alpha / 2 times the squares of its way from start"),
        (alpha / 2 * (moved + size), alone),
        (alpha / 2 * (moved + size) + beta / 2 * size, alone),
        (alpha / 2 * whole + beta / 2 * size, "that pulls the backbone towards zero; subtract start[name] before you square"),
        (
            alpha / 2 * moved + beta / 2 * (size + whole),
            "beta pulls the whole model towards zero there; it belongs to the head alone",
        ),
        (alpha / 2 * (moved + means) + beta / 2 * size, counted),
        (alpha / 2 * (moved + squares(buffers)) + beta / 2 * size, counted),
        (alpha / 2 * moved + beta / 2 * (size - bias_only), "the head's bias counts too"),
        (alpha / 2 * weights + beta / 2 * size, "the backbone's biases count too; named_parameters() has them"),
        (alpha / 2 * weights + beta / 2 * (size - bias_only), "biases count too, the backbone's and the head's"),
        (
            alpha / 2 * squares(steps, lambda name: name not in norms) + beta / 2 * size,
            "batch norm's weight and bias count too; they are parameters, its running means are not",
        ),
    ]


def l2_sp(answer) -> None:
    for case in ("drawn", "drawn", "shuffled", "at the start"):
        while True:  # until every mistake shows
            model = Model()
            alpha, beta = random.uniform(0.1, 0.9), random.uniform(0.1, 0.9)
            start = {name: value.detach().clone() for name, value in model.backbone.named_parameters()}
            if case != "at the start":
                start = {name: value + 0.4 * torch.randn_like(value) for name, value in start.items()}
            if case == "shuffled":
                start = {name: start[name] for name in random.sample(list(start), len(start))}
            options = penalties(model, start, alpha, beta)
            values = np.sort([value for value, _ in options])
            if case == "at the start" or (values[1:] / values[:-1]).min() > 1.002:
                break
        before, given = state_of(model), {name: value.clone() for name, value in start.items()}
        try:
            found = call_alone(answer, model, given, alpha, beta)
            if names := altered(model, before):
                raise NotYet(f"your function changed {names[0]!r} of the model; it measures, and leaves steps to the optimizer")
            if any(not torch.equal(given[name], value) for name, value in start.items()):
                raise NotYet("your function changed the tensors in start, and the next step needs them")
            judge_penalty(found, model, start, alpha, beta, options)
        except NotYet as reason:
            if isinstance(reason.__cause__, KeyError) and case == "drawn":
                key, buffers = str(reason.__cause__.args[0]), dict(model.backbone.named_buffers())
                more = "names in start are those of model.backbone.named_parameters()"
                more = "a buffer is no parameter, and start has none; use named_parameters()" if key in buffers else more
                more = "start has nothing of the head, which goes towards zero" if key.startswith("head.") else more
                raise NotYet(f"{reason}: {more}") from reason
            if case == "shuffled":
                raise NotYet(f"{reason}; start came in another order here: find its tensors by their names") from reason
            raise


def judge_penalty(found, model: Model, start: dict, alpha: float, beta: float, options: list[tuple[float, str]]) -> None:
    """`NotYet` where the number or its gradient is wrong."""
    expected = options[0][0]
    value = number(found, ": sum over all numbers, and both parts")
    if not same(value, expected, 1e-4):
        for mistake, reason in options[1:]:
            if same(value, mistake, 1e-4):
                raise NotYet(reason)
        raise NotYet(f"with alpha = {alpha:.3f} and beta = {beta:.3f} you gave {value:.4f}, and {expected:.4f} was expected")
    if any(parameter.grad is not None for parameter in model.parameters()):
        raise NotYet("the number is right, but your function called backward; whoever adds it to a loss does that, once")
    if not isinstance(found, torch.Tensor):
        raise NotYet(
            f"the number is right, but it came as {type(found).__name__}, without a gradient; return a tensor, no item()"
        )
    if not found.requires_grad:
        raise NotYet("the number is right, but no gradient flows back: detach(), data, state_dict() and no_grad cut it off")
    try:
        found.sum().backward()
    except Exception as error:
        raise NotYet(f"the number is right, but backward stopped with {type(error).__name__}: {error}") from error
    wanted = {f"backbone.{name}": alpha * (v.detach() - start[name]) for name, v in model.backbone.named_parameters()}
    wanted |= {f"head.{name}": beta * v.detach() for name, v in model.head.named_parameters()}
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    for part in ("backbone", "head"):
        if all(grads[name] is None for name in wanted if name.startswith(part)):
            raise NotYet(f"the number is right, but no gradient reaches the {part}; its part was cut off")
    for name, gradient in wanted.items():
        mine = torch.zeros_like(gradient) if grads[name] is None else grads[name]
        if mine.isnan().any():
            raise NotYet(
                f"the number is right, its gradient at {name!r} is nan: where nothing has moved yet, a root has no slope, and "
                "training begins there; sum squares, without a root"
            )
        if not near(mine.double(), gradient):
            at = "alpha (w - start)" if name.startswith("backbone") else "beta w"
            raise NotYet(f"the number is right, its gradient at {name!r} is not: {at} is expected; was something detached?")


EXERCISES = {
    "04.1": Exercise(
        my_param_groups,
        "How many stages come after a stage? For the last one it is 0, for the first len(stages) - 1, and that is how often "
        "lr is divided by factor. What is frozen gets its place too.",
    ),
    "04.2": Exercise(
        train_all_but,
        "There are two switches, requires_grad_ and the mode, and each reaches everything below a module. So set both for the "
        "whole network first, and then for `frozen`.",
    ),
    "04.3": Exercise(
        head_from_probe,
        "Multiply W (f - m) / s + b out: one part has f in it, the rest has not. Every column of W belongs to one feature, and "
        "so does one number of s. W @ m sums over features.",
    ),
    "04.4": Exercise(
        l2_sp,
        "For every name and value in model.backbone.named_parameters(), take (value - start[name]) ** 2 and sum. The head goes "
        "the same way, with nothing to subtract. item() and detach() would cut the gradient.",
    ),
}
