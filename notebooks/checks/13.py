"""Checks of lesson 13."""

import math
import random
from copy import deepcopy

import numpy as np
import torch
from torch import nn

from course_utils.exercises import Exercise, NotAttempted, NotYet, apart, call, near, number, values_of

VECTORS = ("running_mean", "running_var", "weight", "bias")  # of a batch norm


def some_layers(kernel: int, stride: int, bias: bool) -> tuple[nn.Conv2d, nn.BatchNorm2d, nn.Conv2d]:
    """Two convolutions with a batch norm between them that has seen something, ready to be asked."""
    filters = random.randint(6, 9)
    first = nn.Conv2d(3, filters, kernel, stride, padding=kernel // 2, bias=bias)
    norm = nn.BatchNorm2d(filters, eps=0.05)
    second = nn.Conv2d(filters, random.randint(3, 5), 3, padding=1, bias=bias)
    with torch.no_grad():
        for values, low, high in (
            (norm.weight, 0.5, 2),
            (norm.bias, 0.3, 1),
            (norm.running_mean, 0.3, 1),
            (norm.running_var, 0.1, 0.3),
            *([(first.bias, 0.5, 1), (second.bias, 0.5, 1)] if bias else []),
        ):
            values.uniform_(low, high)
    return first.eval(), norm.eval(), second.eval()


def same(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return near(found.double(), expected)


def asked(layer: nn.Module, maps: torch.Tensor, what: str) -> torch.Tensor:
    try:
        return values_of(layer(maps), f"what {what} gives").float()
    except RuntimeError as error:
        raise NotYet(f"{what} cannot take the maps that come to it: {str(error).splitlines()[0]}") from error


def cut(answer) -> None:
    for kernel, stride, bias, size in ((3, 1, True, 3), (5, 2, True, None), (3, 2, False, 1)):
        layers = some_layers(kernel, stride, bias)
        first, norm, second = layers
        kept = random.sample(range(first.out_channels), size or first.out_channels - 1)
        before = deepcopy(layers)
        found = call(answer, *layers, list(kept))
        for mine, its in zip(layers, before, strict=True):
            for name, value in its.state_dict().items():
                if not torch.equal(mine.state_dict()[name], value):
                    raise NotYet("your function changed the layers that it was given; make new ones")
        try:
            one, two, three = found
        except (TypeError, ValueError):
            raise NotYet(f"three layers are expected, convolution, norm, convolution, not {type(found).__name__}") from None
        if any(part is ... for part in (one, two, three)):
            raise NotAttempted
        for part, kind in ((one, nn.Conv2d), (two, nn.BatchNorm2d), (three, nn.Conv2d)):
            if not isinstance(part, kind):
                raise NotYet(f"a {kind.__name__} is expected where you gave {type(part).__name__}")
            part.eval()
        if any(getattr(two, name) is None for name in VECTORS):
            raise NotYet(f"the norm has four vectors, {', '.join(VECTORS)}; yours lacks one of them")
        counts = {
            "the first convolution has filters, dimension 0 of its weight": one.weight.shape[0],
            "the norm has channels": two.running_mean.shape[0],
            "the second convolution takes channels, dimension 1 of its weight": three.weight.shape[1],
        }
        for what, count in counts.items():
            if count != len(kept):
                raise NotYet(f"{len(kept)} filters are kept; {what}, and yours are {count}")
        if three.weight.shape[0] != second.weight.shape[0] or one.weight.shape[1] != first.weight.shape[1]:
            raise NotYet("what goes into the first convolution and what comes out of the second keep their number of channels")
        owned = {value.data_ptr() for layer in layers for value in layer.state_dict().values()}
        if any(value.data_ptr() in owned for part in (one, two, three) for value in part.state_dict().values()):
            raise NotYet("your layers share weights with those that you were given: training the new would move the old; copy")
        if not all(value.is_leaf and value.requires_grad for part in (one, two, three) for value in part.parameters()):
            raise NotYet("the new weights cannot be trained: make each an nn.Parameter of its own, or fill it under no_grad")
        pictures = torch.randn(4, 3, 8, 8)
        with torch.no_grad():
            maps = first(pictures)
            normed = norm(maps)
            silent = torch.zeros_like(normed)
            silent[:, kept] = normed[:, kept].relu()
            expected = second(silent)
            mine = asked(three, asked(two, asked(one, pictures, "your first layer"), "your norm").relu(), "your last layer")
            if same(mine, expected):
                continue
            for part, its, given, wanted, name in (
                (one, first, pictures, maps[:, kept], "the first convolution"),
                (two, norm, maps[:, kept], normed[:, kept], "the norm"),
                (three, second, silent[:, kept], expected, "the second convolution"),
            ):
                gives = asked(part, given, name)
                if gives.shape != wanted.shape:
                    sizes = [f"{tuple(maps.shape[2:])}" for maps in (gives, wanted)]
                    raise NotYet(f"{name} gives maps of {sizes[0]}, and its original of {sizes[1]}: stride, padding, kernel size")
                if same(gives, wanted):
                    continue
                if isinstance(part, nn.BatchNorm2d):
                    for name in VECTORS:
                        if not same(getattr(part, name), getattr(norm, name)[kept]):
                            raise NotYet(f"the norm's {name} is not that of the kept channels, in the order of `kept`")
                    raise NotYet(f"the norm's eps is {part.eps:g}, and its original's is {norm.eps:g}")
                if (part.bias is None) != (its.bias is None):
                    raise NotYet(f"the bias of {name} is {'missing' if part.bias is None else 'new: its original has none'}")
                of_bias = its.bias if its is second else its.bias[kept] if its.bias is not None else None
                if of_bias is not None and not same(part.bias, of_bias):
                    raise NotYet(f"the bias of {name} is not the one that belongs there")
                raise NotYet(f"the weights of {name} are not those of the kept filters, in the order of `kept`")
        raise NotYet("what comes out is not what the original gives with the other filters silenced")


def quantised(found, values: torch.Tensor, bits: int) -> tuple[torch.Tensor, float, float]:
    """The three parts of an answer, each of the kind that it should have."""
    try:
        whole, scale, zero = found
    except (TypeError, ValueError):
        raise NotYet(f"three things are expected, whole, scale and zero, not {type(found).__name__}") from None
    if any(part is ... for part in (whole, scale, zero)):
        raise NotAttempted
    scale, zero = number(scale, "; one scale for all"), number(zero, "; one zero point for all")
    whole, top = values_of(whole, "a tensor of whole numbers"), 2**bits - 1
    if whole.shape != values.shape:
        raise NotYet(f"the values keep their shape {tuple(values.shape)}, and yours have {tuple(whole.shape)}")
    if not (math.isfinite(scale) and scale > 0):
        raise NotYet(f"the scale is {scale:g} for values from {values.min():.3f} to {values.max():.3f}; it is above 0, always")
    if zero != round(zero):
        raise NotYet(f"your zero point is {zero:.3f}: a whole number is meant, or no whole number stands for 0.0")
    if not torch.equal(whole, whole.round()):
        raise NotYet("your values are not whole numbers")
    if not 0 <= zero <= top:
        raise NotYet(
            f"for values from {values.min():.3f} to {values.max():.3f} your zero point is {zero:.0f}, which {bits} bits cannot "
            f"hold (0 to {top}): stretch the range until 0.0 lies in it"
        )
    if whole.min() < 0 or whole.max() > top:
        raise NotYet(f"with {bits} bits, whole numbers go from 0 to {top}; yours go from {whole.min():.0f} to {whole.max():.0f}")
    return whole, scale, zero


def quantise(answer) -> None:
    many = random.randint(200, 400)
    wide = torch.randn(many) * random.uniform(0.5, 5)
    cases = [
        (torch.cat([wide, torch.zeros(5), torch.tensor([12 * wide.std()])]), 8),  # a long tail on one side
        (torch.rand(7, 30) + random.uniform(1, 2), 8),  # all above 0
        (-torch.rand(90) - random.uniform(1, 2), 8),  # all below
        (torch.cat([torch.randn(60), torch.zeros(3)]), random.randint(3, 6)),
        (torch.zeros(6), 8),
    ]
    for values, bits in cases:
        kept = values.clone()
        found = call(answer, values, bits)
        if not torch.equal(values, kept):
            raise NotYet("your function changed the values that it was given; make new ones")
        whole, scale, zero = quantised(found, values, bits)
        restored = scale * (whole - zero)
        if not torch.equal(restored[values == 0], torch.zeros_like(restored[values == 0])):
            raise NotYet(f"0.0 comes back as {restored[values == 0][0]:.4f}; it must come back exactly")
        low, high = min(0.0, values.min().item()), max(0.0, values.max().item())
        needed = (high - low) / (2**bits - 1) or scale
        off = (restored - values.double()).abs().max().item()
        if off > 0.505 * scale:
            where = (restored - values.double()).abs().argmax()
            before, after = values.flatten()[where], restored.flatten()[where]
            raise NotYet(
                f"{before:.4f} comes back as {after:.4f}: wrong by {off / scale:.2f} scales, and half a scale is allowed. Round, "
                "and see that both ends of the range have a whole number"
            )
        if scale > 1.01 * needed:
            raise NotYet(
                f"right, but coarse: values from {values.min():.3f} to {values.max():.3f} in {bits} bits need a scale of "
                f"{needed:.4f}, and yours is {scale:.4f}"
            )


class FakeClock:
    """Moves only when somebody works. Work costs seconds, the first calls of it most."""

    def __init__(self, costs: list[float]) -> None:
        self.now, self.costs, self.calls, self.looks = random.uniform(10, 1000), costs, 0, 0

    def __call__(self) -> float:
        self.looks += 1
        return self.now

    def run(self) -> None:
        self.now += self.costs[min(self.calls, len(self.costs) - 1)]
        self.calls += 1


def percentiles(answer) -> None:
    for warmup, times in ((3, 40), (1, 21), (0, 30)):
        while True:
            slow = [random.uniform(3, 6) for _ in range(warmup)]
            quick = [random.uniform(0.01, 0.02) for _ in range(times)]
            for late in random.sample(range(times), 4):
                quick[late] = random.uniform(0.1, 0.5)
            expected = np.percentile(quick, [50, 95])
            said = {
                "that is the mean; a slow call or two move it, and the median they do not": np.mean(quick),
                "you count the calls that only warm up": np.median(slow + quick),
                "that is the time of all calls together": sum(quick),
                "that is the fastest call": min(quick),
            }
            ninety = {
                "that is the slowest call; 5 in 100 are slower than p95": max(quick),
                "that is p90": np.percentile(quick, 90),
            }
            options = [*expected, *(v for reason, v in said.items() if warmup or "warm" not in reason), *ninety.values()]
            if apart(options, 1e-5) and 1.02 * expected[0] < np.mean(quick):
                break
        clock = FakeClock(slow + quick)
        found = call(answer, clock.run, clock, warmup, times)
        try:
            p50, p95 = found
        except (TypeError, ValueError):
            raise NotYet(f"two numbers are expected, p50 and p95, not {type(found).__name__}") from None
        if p50 is ... or p95 is ...:
            raise NotAttempted
        p50, p95 = number(p50), number(p95)
        if not clock.looks:
            raise NotYet("you never looked at the clock that you were given")
        if clock.calls != warmup + times:
            raise NotYet(f"with warmup={warmup} and times={times} the work is to run {warmup + times} times, not {clock.calls}")
        if math.isclose(p50, expected[0], rel_tol=1e-6) and math.isclose(p95, expected[1], rel_tol=1e-6):
            continue
        for name, mine, right, mistakes in (("p50", p50, expected[0], said), ("p95", p95, expected[1], said | ninety)):
            if math.isclose(mine, right, rel_tol=1e-6):
                continue
            if math.isclose(mine, 1000 * right, rel_tol=1e-6):
                raise NotYet(f"{name} in milliseconds; seconds are asked for")
            for reason, value in mistakes.items():
                if math.isclose(mine, value, rel_tol=1e-6):
                    raise NotYet(f"{name}: {reason}")
        if warmup and math.isclose(p95, np.percentile(slow + quick, 95), rel_tol=1e-6):
            raise NotYet("p95: you count the calls that only warm up")
        if math.isclose(p50, expected[1], rel_tol=1e-6) and math.isclose(p95, expected[0], rel_tol=1e-6):
            raise NotYet("p50 comes first, then p95")
        raise NotYet(f"p50 and p95 are {expected[0]:.4f} and {expected[1]:.4f} seconds here; you gave {p50:.4f} and {p95:.4f}")


def beats(one: dict, other: dict) -> bool:
    at_least = one["accuracy"] >= other["accuracy"] and one["p50"] <= other["p50"]
    return at_least and (one["accuracy"] > other["accuracy"] or one["p50"] < other["p50"])


def some_rows(points: list[tuple[float, float]]) -> list[dict]:
    names = random.sample(["teacher", "student", "pruned", "int8", "tiny", "wide", "deep", "old"], len(points))
    rows = [
        {"name": name, "accuracy": accuracy, "bytes": random.randint(10_000, 900_000), "p50": p50}
        for name, (accuracy, p50) in zip(names, points, strict=True)
    ]
    random.shuffle(rows)
    return rows


def front(answer) -> None:
    def drawn(n: int) -> list[tuple[float, float]]:
        return [(round(random.uniform(0.8, 0.97), 2), round(random.uniform(0.2, 3), 1)) for _ in range(n)]

    cases = [
        [(0.96, 2.0), (0.95, 1.0), (0.90, 0.5), (0.94, 1.5), (0.89, 0.9), (0.92, 2.5)],
        [(0.95, 2.0), (0.95, 1.0), (0.90, 0.5)],  # as accurate, and faster
        [(0.95, 1.0), (0.93, 1.0), (0.90, 0.5)],  # as fast, and more accurate
        [(0.95, 1.0), (0.95, 1.0), (0.90, 2.0)],  # the same twice
        [(0.9, 1.0)],
        drawn(8),
        drawn(7),
    ]
    for points in cases:
        rows = some_rows(points)
        found = call(answer, deepcopy(rows))
        if isinstance(found, str | dict) or not isinstance(found, set | list | tuple | frozenset):
            raise NotYet(f"the names are expected, as a list or a set, not {type(found).__name__}")
        if any(one is ... for one in found):
            raise NotAttempted
        found = [one.get("name") if isinstance(one, dict) else one for one in found]
        names = {row["name"]: row for row in rows}
        if strange := [one for one in found if not isinstance(one, str) or one not in names]:
            raise NotYet(f"there is no model {strange[0]!r}")

        def shown(row: dict) -> str:
            return f"{row['name']} ({row['accuracy']:.2f}, {row['p50']:.1f} ms)"

        for row in rows:
            if row["name"] in found and (better := [other for other in rows if beats(other, row)]):
                raise NotYet(f"{shown(row)} does not belong to the front: {shown(better[0])} beats it")
        for row in rows:
            if row["name"] not in found and not any(beats(other, row) for other in rows):
                twin = [other for other in rows if other is not row and all(other[k] == row[k] for k in ("accuracy", "p50"))]
                why = f"{shown(twin[0])} is its equal, and does not beat it" if twin else "no other model beats it"
                raise NotYet(f"{shown(row)} belongs to the front: {why}")


EXERCISES = {
    "13.1": Exercise(
        cut,
        "A filter is a row of the first weight (dimension 0), an entry of each of the norm's four vectors, and a column of the "
        "second weight (dimension 1). Make the new layers with the smaller sizes and the same stride, padding and eps.",
    ),
    "13.2": Exercise(
        quantise,
        "Take 0 into the range: low is at most 0, high at least 0. The scale is the range divided by the number of steps, "
        "2**bits - 1. The zero point is where 0.0 lands: round(-low / scale). Mind a range of no width.",
    ),
    "13.3": Exercise(
        percentiles,
        "Call run() warmup times without looking. Then times times: look at the clock, run, look again, keep the difference. "
        "np.percentile does the rest.",
    ),
    "13.4": Exercise(
        front,
        "For each row, ask of every other whether it is at least as accurate and at least as fast, and better in one of the two. "
        "Keep the row if the answer is never yes.",
    ),
}
