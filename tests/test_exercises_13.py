"""Answers to the exercises of lesson 13, right and wrong."""

import time
from copy import deepcopy

import numpy as np
import torch
from torch import nn
from torch.nn.utils import prune

from tests.exercise_tests import *  # noqa: F403


def cut(
    first,
    norm,
    second,
    kept,
    geometry=True,
    eps=True,
    statistics=True,
    bias=True,
    affine=True,
    rows=lambda kept: kept,
    columns=lambda kept: kept,
):
    """The solution, with one thing or another forgotten."""
    size = len(kept)
    shape = [(layer.stride, layer.padding) if geometry else (1, layer.padding) for layer in (first, second)]
    one = nn.Conv2d(first.in_channels, size, first.kernel_size, *shape[0], bias=first.bias is not None)
    two = nn.BatchNorm2d(size, eps=norm.eps if eps else 1e-5)
    three = nn.Conv2d(size, second.out_channels, second.kernel_size, *shape[1], bias=second.bias is not None)
    with torch.no_grad():
        one.weight.copy_(first.weight[rows(kept)])
        three.weight.copy_(second.weight[:, columns(kept)])
        if bias and one.bias is not None:
            one.bias.copy_(first.bias[kept])
            three.bias.copy_(second.bias)
        if affine:
            two.weight.copy_(norm.weight[kept])
            two.bias.copy_(norm.bias[kept])
        if statistics:
            two.running_mean.copy_(norm.running_mean[kept])
            two.running_var.copy_(norm.running_var[kept])
    return one, two, three


def cut_copies(first, norm, second, kept):
    """Copies whose tensors are replaced; their numbers of channels stay wrong, which nothing asks for."""
    one, two, three = deepcopy(first), deepcopy(norm), deepcopy(second)
    one.weight = nn.Parameter(first.weight[kept].detach().clone())
    if one.bias is not None:
        one.bias = nn.Parameter(first.bias[kept].detach().clone())
    two.weight, two.bias = nn.Parameter(norm.weight[kept].detach()), nn.Parameter(norm.bias[kept].detach())
    two.running_mean, two.running_var = norm.running_mean[kept], norm.running_var[kept]
    three.weight = nn.Parameter(second.weight[:, kept].detach().clone())
    return [one, two, three]


def cut_sorted(first, norm, second, kept):
    return cut(first, norm, second, sorted(kept))


def masked(first, norm, second, kept):
    """Zeroes what is not kept, and makes nothing smaller."""
    one, two, three = deepcopy(first), deepcopy(norm), deepcopy(second)
    off = [channel for channel in range(norm.num_features) if channel not in kept]
    with torch.no_grad():
        for values in (one.weight, two.weight, two.bias):
            values[off] = 0
    return one, two, three


def masked_by_torch(first, norm, second, kept):
    one = deepcopy(first)
    prune.ln_structured(one, "weight", amount=first.out_channels - len(kept), n=1, dim=0)
    return one, deepcopy(norm), deepcopy(second)


def cut_in_place(first, norm, second, kept):
    one, two, three = cut_copies(first, norm, second, kept)
    first.weight, second.weight = one.weight, three.weight
    return first, two, second


def cut_sharing(first, norm, second, kept):
    """The last bias stands for what is not even sliced."""
    one, two, three = cut(first, norm, second, kept)
    three.bias = second.bias
    return one, two, three


def cut_untrainable(first, norm, second, kept):
    one, two, three = cut(first, norm, second, kept)
    return one, two.requires_grad_(False), three


def cut_without_norm(first, norm, second, kept):
    one, _, three = cut(first, norm, second, kept)
    return one, nn.BatchNorm2d(len(kept), affine=False), three


def quantise(values, bits=8, zero_in=True, top=None, round_=torch.round, whole_zero=True, clamp=True, shift=0):
    """The solution, with one thing or another changed."""
    low, high = values.min().item(), values.max().item()
    if zero_in:
        low, high = min(0.0, low), max(0.0, high)
    top = (top or (lambda bits: 2**bits - 1))(bits)
    scale = (high - low) / top or 1.0
    zero = round(-low / scale) if whole_zero else -low / scale
    whole = round_(values / scale) + round(zero)
    if clamp:
        whole = whole.clamp(0, 2**bits - 1)
    return whole.int() + shift, scale, zero + shift


def quantise_in_numpy(values, bits=8):
    found = values.double().numpy()
    low, high = min(found.min(), 0), max(found.max(), 0)
    scale = max(high - low, 1e-8) / (2**bits - 1)
    zero = int(np.round(-low / scale))
    return np.clip(np.round(found / scale) + zero, 0, 2**bits - 1).astype(np.uint8), scale, zero


def quantise_by_torch(values, bits=8):
    """torch's own kernel, with the range by hand."""
    low, high = torch.clamp(values.min(), max=0), torch.clamp(values.max(), min=0)
    scale = max((high - low).item() / (2**bits - 1), 1e-8)
    zero = round(-low.item() / scale)
    lattice = torch.fake_quantize_per_tensor_affine(values, scale, zero, 0, 2**bits - 1)
    return (lattice / scale).round().int() + zero, torch.tensor(scale), zero


def symmetric(values, bits=8):
    half = 2 ** (bits - 1)
    scale = values.abs().max().item() / (half - 1) or 1.0
    return ((values / scale).round() + half).clamp(0, 2**bits - 1).int(), scale, half


def percentiles(run, clock, warmup, times, q=(50, 95), skip=True, unit=1):
    if skip:
        for _ in range(warmup):
            run()
    seconds = []
    for _ in range(times if skip else warmup + times):
        start = clock()
        run()
        seconds.append((clock() - start) * unit)
    return np.percentile(seconds, q)


def percentiles_by_hand(run, clock, warmup, times):
    looks = []
    for call in range(warmup + times):
        looks.append(clock())
        run()
        if call == warmup + times - 1:
            looks.append(clock())
    seconds = sorted(np.diff(looks)[warmup:])

    def at(share):
        place = share * (times - 1)
        below = int(place)
        return seconds[below] + (place - below) * (seconds[min(below + 1, times - 1)] - seconds[below])

    return at(0.5), at(0.95)


def percentiles_in_torch(run, clock, warmup, times):
    for _ in range(warmup):
        run()
    seconds = torch.empty(times, dtype=torch.double)
    for turn in range(times):
        start = clock()
        run()
        seconds[turn] = clock() - start
    return [seconds.median() if times % 2 else seconds.quantile(0.5), seconds.quantile(0.95)]


def by_the_wall(run, clock, warmup, times):
    return percentiles(run, time.perf_counter, warmup, times)


def mean_and_p95(run, clock, warmup, times):
    kept = []

    def seen():
        kept.append(clock())
        return kept[-1]

    _, p95 = percentiles(run, seen, warmup, times)
    return np.mean(np.diff(kept)[::2]), p95


def one_span(run, clock, warmup, times):
    for _ in range(warmup):
        run()
    start = clock()
    for _ in range(times):
        run()
    return clock() - start, clock() - start


def loosely(a, b):
    return a is not b and a["accuracy"] >= b["accuracy"] and a["p50"] <= b["p50"]


def properly(a, b):
    return loosely(a, b) and (a["accuracy"], a["p50"]) != (b["accuracy"], b["p50"])


def front(rows, ahead=properly):
    return {row["name"] for row in rows if not any(ahead(other, row) for other in rows)}


def front_by_sorting(rows):
    kept, best = [], (-1.0, None)
    for row in sorted(rows, key=lambda row: (row["p50"], -row["accuracy"])):
        point = row["accuracy"], row["p50"]
        if row["accuracy"] > best[0] or point == best:
            kept.append(row["name"])
            best = point
    return kept


def front_without_twins(rows):
    kept, best = [], -1.0
    for row in sorted(rows, key=lambda row: (row["p50"], -row["accuracy"])):
        if row["accuracy"] > best:
            kept.append(row["name"])
            best = row["accuracy"]
    return kept


def strictly(a, b):
    return a["accuracy"] > b["accuracy"] and a["p50"] < b["p50"]


def upside_down(a, b):
    return a["accuracy"] >= b["accuracy"] and a["p50"] >= b["p50"] and a is not b


RIGHT = {
    "13.1": [cut, cut_copies, cut_sorted],
    "13.2": [quantise, quantise_in_numpy, quantise_by_torch],
    "13.3": [percentiles, percentiles_by_hand, percentiles_in_torch],
    "13.4": [front, front_by_sorting],
}
WRONG = {
    "13.1": [
        (lambda *a: (nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 7, 3)), "keep their number of channels"),
        (lambda first, norm, second, kept: (first, norm, second), "and yours are"),
        (masked, "filters are kept; the first convolution has filters"),
        (masked_by_torch, "filters are kept; the first convolution has filters"),
        (lambda *a: cut(*a, statistics=False), "running_mean is not that of the kept channels"),
        (lambda *a: cut(*a, affine=False), "the norm's weight is not that"),
        (lambda *a: cut(*a, eps=False), "the norm's eps is 1e-05"),
        (lambda *a: cut(*a, bias=False), "the bias of the first convolution is not"),
        (lambda *a: cut(*a, rows=lambda kept: list(range(len(kept)))), "the weights of the first convolution"),
        (lambda *a: cut(*a, columns=lambda kept: list(range(len(kept)))), "the weights of the second convolution"),
        (lambda *a: cut(*a, columns=lambda kept: kept[::-1]), "in the order of `kept`"),
        (lambda *a: cut(*a, geometry=False), "stride, padding"),
        (cut_in_place, "changed the layers"),
        (cut_sharing, "share weights"),
        (cut_untrainable, "cannot be trained"),
        (cut_without_norm, "yours lacks one of them"),
        (lambda first, norm, second, kept: cut(first, norm, second, kept)[:2], "three layers are expected"),
        (lambda first, norm, second, kept: [layer.weight for layer in cut(first, norm, second, kept)], "a Conv2d is expected"),
        (lambda *a: None, "not NoneType"),
    ],
    "13.2": [
        (lambda values, bits: (torch.zeros_like(values), 1.0, 0), "comes back as 0.0000: wrong by"),
        (lambda values, bits: (torch.zeros(6), 1.0, 0), "keep their shape"),
        (lambda values, bits: quantise(values, bits, zero_in=False), "stretch the range"),
        (lambda values, bits: quantise(values, 8), "cannot hold"),
        (lambda values, bits: quantise(values, bits, top=lambda bits: 2**bits), "both ends"),
        (lambda values, bits: quantise(values, bits, top=lambda bits: 2**bits, clamp=False), "whole numbers go from 0 to"),
        (lambda values, bits: quantise(values, bits, round_=torch.floor), "half a scale is allowed"),
        (lambda values, bits: quantise(values, bits, round_=torch.trunc), "half a scale is allowed"),
        (lambda values, bits: quantise(values, bits, whole_zero=False), "or no whole number stands for 0.0"),
        (lambda values, bits: quantise(values, bits, shift=-(2 ** (bits - 1))), "cannot hold"),
        (symmetric, "right, but coarse"),
        (lambda values, bits: (values / quantise(values, bits)[1], *quantise(values, bits)[1:]), "not whole numbers"),
        (lambda values, bits: quantise(values, bits)[0], "are expected, whole, scale and zero"),
        (lambda values, bits: quantise(values.copy_(values.round()), bits), "changed the values"),
        (lambda values, bits: (values.int(), 0.0, 0), "above 0, always"),
        (lambda *a: None, "not NoneType"),
    ],
    "13.3": [
        (lambda run, clock, warmup, times: (0.015, 0.3), "never looked at the clock"),
        (by_the_wall, "never looked at the clock"),
        (lambda *a: percentiles(*a, skip=False), "you count the calls that only warm up"),
        (lambda run, clock, warmup, times: percentiles(run, clock, 0, times), "the work is to run 43 times, not 40"),
        (lambda *a: percentiles(*a, q=(95, 50)), "p50 comes first"),
        (lambda *a: percentiles(*a, q=(50, 100)), "p95: that is the slowest"),
        (lambda *a: percentiles(*a, q=(50, 90)), "p95: that is p90"),
        (lambda *a: percentiles(*a, unit=1000), "in milliseconds"),
        (mean_and_p95, "p50: that is the mean"),
        (one_span, "the time of all calls together"),
        (lambda *a: percentiles(*a)[0], "two numbers are expected"),
        (lambda *a: None, "not NoneType"),
    ],
    "13.4": [
        (lambda rows: {"teacher"}, ""),
        (lambda rows: {row["name"] for row in rows}, "does not belong to the front"),
        (lambda rows: front(rows, strictly), "does not belong to the front"),
        (lambda rows: front(rows, loosely), "is its equal"),
        (front_without_twins, "is its equal"),
        (lambda rows: front(rows, upside_down), "front: "),
        (lambda rows: max(rows, key=lambda row: row["accuracy"])["name"], "the names are expected"),
        (lambda rows: [max(rows, key=lambda row: row["accuracy"])["name"]], "no other model beats it"),
        (lambda rows: {row["p50"] for row in rows}, "there is no model"),
        (lambda *a: None, "not NoneType"),
    ],
}
