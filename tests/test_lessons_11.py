"""What lesson 11 builds by hand does what torch's optimisers do, and its measures mean what they say."""

import math
from functools import cache

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from course_utils.evidence import Claims, stored
from course_utils.paths import EVIDENCE, NOTEBOOKS
from course_utils.plots import COLOURS
from course_utils.training import one_cycle
from tests.test_lessons import cells
from tools.evidence import definitions, pack_hits

SOURCE = NOTEBOOKS / "source" / "11_optimisers_and_schedules.py"


@pytest.fixture(scope="module")
def lesson() -> dict:
    """What its cells of evidence define."""
    return definitions(SOURCE)


@pytest.fixture(scope="module")
def by_hand() -> dict:
    """The rules, and the gradients taken in parts."""
    return cells("11", "by-hand", torch=torch, F=F)


@pytest.fixture(scope="module")
def valley(by_hand: dict) -> dict:
    """The surface, and what is drawn of it."""
    names = by_hand | {"torch": torch, "math": math, "np": np, "plt": plt, "cache": cache, "COLOURS": COLOURS}
    return cells("11", "picture", **cells("11", "surface", **names))


def by_torch(made, settings: dict, gradients: list[torch.Tensor], start: torch.Tensor, rate: float) -> torch.Tensor:
    """The weights after torch's optimiser has had these gradients."""
    weight = start.clone().requires_grad_()
    optimizer = made([weight], lr=rate, **settings)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
    return weight.detach()


def drawn(count: int = 200) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Gradients of very different sizes, and a start."""
    generator = torch.Generator().manual_seed(0)
    sizes = 10.0 ** torch.linspace(-3, 2, 12, dtype=torch.float64).reshape(3, 4)
    make = {"generator": generator, "dtype": torch.float64}
    return [sizes * torch.randn(3, 4, **make) for _ in range(count)], torch.randn(3, 4, **make)


@pytest.mark.parametrize("name", ["SGD", "momentum", "Nesterov", "Adagrad", "RMSprop", "Adam", "AdamW"])
def test_each_rule_by_hand_ends_with_the_weights_of_torch(lesson: dict, by_hand: dict, name: str) -> None:
    rule = by_hand["RULES"][name]
    gradients, start = drawn()
    for rate in (1e-3, 0.03):
        weight, state = start, {}
        for gradient in gradients:
            given = weight.clone(), gradient.clone()
            moved = rule(weight, gradient, state, rate)
            assert torch.equal(weight, given[0]) and torch.equal(gradient, given[1]), "a rule changes what it was given"
            weight = moved
        expected = by_torch(*lesson["OPTIMISERS"][name], gradients, start, rate)
        assert torch.allclose(weight, expected, rtol=1e-6, atol=1e-6)
        assert not torch.allclose(weight, start, atol=1e-4)
    ends = [by_torch(*lesson["OPTIMISERS"][other], gradients, start, 0.03) for other in lesson["OPTIMISERS"] if other != name]
    assert not any(torch.allclose(weight, end, rtol=1e-6, atol=1e-6) for end in ends), "two rules that cannot be told apart"


def test_the_lesson_has_the_same_seven_by_hand_and_on_the_task(lesson: dict, by_hand: dict) -> None:
    assert list(by_hand["RULES"]) == list(lesson["OPTIMISERS"]) and len(by_hand["RULES"]) == 7


def test_decay_through_adam_is_what_torchs_adam_does(by_hand: dict) -> None:
    gradients, start = drawn()
    weight, state = start, {}
    for gradient in gradients:
        weight = by_hand["adam_l2"](weight, gradient, state, 0.01, decay=0.1)
    assert torch.allclose(weight, by_torch(torch.optim.Adam, {"weight_decay": 0.1}, gradients, start, 0.01), atol=1e-6)
    assert not torch.allclose(weight, by_torch(torch.optim.AdamW, {"weight_decay": 0.1}, gradients, start, 0.01), atol=1e-3)


def test_the_slope_is_the_gradient_of_the_height_and_the_bottom_is_the_lowest(valley: dict) -> None:
    points = torch.randn(20, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    for angle in (0.0, 0.4, valley["TURN"]):
        (expected,) = torch.autograd.grad(valley["height"](points, angle).sum(), points)
        assert torch.allclose(valley["slope"](points, angle).detach(), expected)
        bottom = valley["point"](valley["BOTTOM"])
        assert float(valley["height"](bottom, angle)) == 0 and (valley["height"](points, angle) > 0).all()
    straight = valley["slope"](valley["point"](valley["BOTTOM"]) + torch.eye(2, dtype=torch.float64), 0.0)
    assert torch.allclose(straight, torch.diag(torch.tensor(valley["CURVES"], dtype=torch.float64)))


def test_a_walk_takes_the_rule_with_each_rate_and_turns_with_the_valley(valley: dict, by_hand: dict) -> None:
    ways = valley["walk"](by_hand["sgd"], [0.001, 0.01], steps=5, angle=0.0)
    assert ways.shape == (2, 6, 2)
    for rate, way in zip((0.001, 0.01), ways, strict=True):
        assert torch.allclose(way[0], torch.tensor(valley["START"], dtype=torch.float64))
        assert torch.allclose(way[1:], way[:-1] - rate * valley["slope"](way[:-1], 0.0))
    for name, same in {"momentum": True, "Nesterov": True, "Adagrad": False, "Adam": False}.items():
        heights = [valley["height"](valley["walk"](by_hand["RULES"][name], [0.005], 50, angle)[0], angle) for angle in (0.0, 1.0)]
        assert torch.allclose(heights[0][:1], heights[1][:1])
        assert torch.allclose(*heights, rtol=1e-6) == same


def test_down_is_down_for_good(valley: dict) -> None:
    bottom = torch.tensor(valley["BOTTOM"], dtype=torch.float64)
    away = torch.tensor([[1.0, 1, 1, 1], [1.0, 0, 1, 0], [1.0, 0, 0, 0], [1.0, math.nan, 0, math.nan]], dtype=torch.float64)
    ways = bottom + away[..., None] * torch.tensor([1.0, 0.0], dtype=torch.float64)
    assert valley["steps_down"](ways, 0.0).tolist() == [math.inf, 3, 1, math.inf]


def test_the_picture_of_a_rate_shows_the_walk_with_that_rate(valley: dict, by_hand: dict) -> None:
    figure = valley["at_rate"](0.01)
    assert len(figure.axes) == len(valley["DRAGGED"])
    for axis, name in zip(figure.axes, valley["DRAGGED"], strict=True):
        way = valley["walk"](by_hand["RULES"][name], [0.01], steps=40)[0]
        assert np.allclose(np.stack(axis.lines[0].get_data(), axis=1), way) and name in axis.get_title()
    assert "0.01" in figure.get_suptitle()
    plt.close(figure)


def test_the_best_rate_needs_the_fewest_steps(valley: dict, by_hand: dict) -> None:
    rate, way, steps = valley["best_of"]("SGD")
    counts = valley["steps_down"](valley["walk"](by_hand["sgd"], valley["RATES_2D"]))
    assert steps == counts.min() and math.isfinite(steps)
    assert torch.allclose(way, valley["walk"](by_hand["sgd"], [rate])[0])


def test_schedules_are_functions_of_progress(lesson: dict) -> None:
    schedules = lesson["SCHEDULES"]
    progress = np.linspace(0, 1, 101)
    curves = {name: np.array([factor(p) for p in progress]) for name, factor in schedules.items()}
    assert all(curve.min() >= 0 and curve.max() <= 1 for curve in curves.values())
    assert (curves["constant"] == 1).all()
    assert np.allclose(curves["cosine"], (1 + np.cos(np.pi * progress)) / 2)
    warm = curves["warm-up + cosine"]
    assert warm[0] == 0 and (np.diff(warm[:11]) > 0).all() and np.allclose(warm[10:], curves["cosine"][10:])
    assert np.allclose(curves["one-cycle"], [one_cycle()(p) for p in progress]) and curves["one-cycle"].argmax() == 25


class Tiny(nn.Module):
    """Two classes from four numbers, with or without batch norm."""

    def __init__(self, norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.BatchNorm1d(4) if norm else nn.Identity(), nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))

    def forward(self, x):
        return self.layers(x)


def a_batch(n: int = 22) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(n, 4), torch.arange(n) % 2


def gradient_of(model: nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """By one backward pass."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(F.cross_entropy(model(x), y), list(model.parameters()))])


@pytest.mark.parametrize("part", [1, 4, 7, 22, 50])  # 22 pictures: most of these leave a smaller last part
def test_gradients_in_parts_are_those_of_the_whole_batch(by_hand: dict, part: int) -> None:
    x, y = a_batch()
    model = Tiny()
    expected = gradient_of(model, x, y)
    for _ in range(2):  # what stood in .grad before does not count
        assert torch.allclose(by_hand["in_parts"](model, x, y, part), expected, atol=1e-6)
    assert by_hand["distance"](by_hand["in_parts"](model, x, y, part), expected) < 1e-5


def test_batch_norm_at_work_sees_the_parts(by_hand: dict) -> None:
    x, y = a_batch()
    model = Tiny(norm=True)
    model.eval()
    assert by_hand["distance"](by_hand["in_parts"](model, x, y, 4), by_hand["in_parts"](model, x, y, 22)) < 1e-5
    model.train()
    assert by_hand["distance"](by_hand["in_parts"](model, x, y, 4), by_hand["in_parts"](model, x, y, 22)) > 0.01


def test_what_is_not_divided_is_as_many_times_as_long(by_hand: dict) -> None:
    x, y = a_batch(20)
    model = Tiny()
    assert torch.allclose(by_hand["not_divided"](model, x, y, 4), 5 * gradient_of(model, x, y), atol=1e-5)


def test_what_catches_the_mistakes_catches_them_and_nothing_else(by_hand: dict) -> None:
    catches = cells("11", "catches", **by_hand)
    catches["assert_decays_alike"](by_hand["adamw"])
    with pytest.raises(AssertionError, match="times the decay"):
        catches["assert_decays_alike"](by_hand["adam_l2"])
    catches["assert_same_gradient"](torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.0001]))
    with pytest.raises(AssertionError, match=r"4\.00 times as long"):
        catches["assert_same_gradient"](torch.tensor([4.0, 8.0]), torch.tensor([1.0, 2.0]))
    with pytest.raises(AssertionError):  # of the same length, in another direction
        catches["assert_same_gradient"](torch.tensor([2.0, 1.0]), torch.tensor([1.0, 2.0]))
    inside = {0.1: 0.5, 0.3: 0.9, 1.0: 0.4}
    catches["assert_searched"]({"a": inside, "b": {1e-3: 0.2, 3e-3: 0.6, 1e-2: 0.1}})
    for wrong, reason in (
        ({"a": inside, "b": {0.1: 0.9, 0.3: 0.5, 1.0: 0.4}}, "b: 0.1 lies at an end"),
        ({"a": inside, "b": {0.1: 0.4, 0.3: 0.5, 1.0: 0.9}}, "b: 1 lies at an end"),
        ({"a": inside, "b": inside | {3.0: 0.1}}, "as many tries"),
        ({"a": {0.1: 0.9}, "b": {0.1: 0.2}}, "lies at an end"),
    ):
        with pytest.raises(AssertionError, match=reason):
            catches["assert_searched"](wrong)


class Slope(nn.Module):
    """Two logits from one weight a class: a loss that explodes once the rate is too large."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(x) ** 2


class Few:
    """Batches for a range test."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def epoch(self, epoch: int):
        torch.manual_seed(epoch)
        for _ in range(self.count):
            x = torch.randn(16, 3)
            yield x, (x[:, 0] > 0).long()


def test_the_range_test_sweeps_its_rates_and_stops_where_the_loss_explodes(lesson: dict) -> None:
    low, high = lesson["SWEEPS"]["momentum"]
    torch.manual_seed(0)
    rates, losses = lesson["range_test"](nn.Linear(3, 2), Few(12), "momentum")
    assert rates[0] == low and len(rates) == len(losses) and np.allclose(rates[1:] / rates[:-1], (high / low) ** (1 / 11))
    rates, losses = lesson["range_test"](Slope(), Few(60), "momentum")
    assert len(rates) < 60 and np.isfinite(losses).all() and losses.max() <= 4 * losses[0] + 1e-6
    assert len(lesson["range_test"](nn.Linear(3, 2), Few(1), "AdamW")[0]) == 1


def test_the_rate_chosen_is_a_tenth_of_that_of_the_lowest_smoothed_loss(lesson: dict) -> None:
    rates = 10.0 ** np.arange(-4.0, 2.0, 0.1)
    losses = 2 + np.minimum(np.abs(np.log10(rates) + 0.5), 1.5)
    smooth = lesson["smoothed"](losses)
    assert smooth[0] == losses[0] and smooth[1] == pytest.approx((0.16 * losses[0] + 0.2 * losses[1]) / 0.36)
    assert np.allclose(lesson["smoothed"]([3.0] * 5), 3.0), "a constant stays what it is"
    assert lesson["chosen_rate"](rates, losses) == pytest.approx(rates[smooth.argmin()] / 10)
    spiked = losses.copy()
    spiked[5] = 0.5  # one lucky batch long before
    assert lesson["chosen_rate"](rates, spiked) == pytest.approx(lesson["chosen_rate"](rates, losses), rel=0.3)


def test_every_quarter_is_looked_at_also_where_training_breaks_off(lesson: dict, monkeypatch) -> None:
    few = lesson["train"].subset(range(40))
    monkeypatch.setitem(lesson["trained"].__globals__, "few_shot", lambda split, labels, seed: few)
    for rate in (1e-3, 1e30):
        seen = []
        settings = {"size": 4, "steps": 4, "look": lambda model, quarter, seen=seen: seen.append(quarter)}
        lesson["trained"]("resnet_near", 0, "SGD", rate, **settings)
        assert seen[:4] == [1, 2, 3, 4], rate


def test_arms_that_are_one_run_are_found_under_both_names(lesson: dict) -> None:
    rng = np.random.default_rng(0)
    rows, settings = [], lesson["SETTINGS"]
    for seed in (1, 0):
        for arm in ("momentum", "AdamW", "momentum, one rate"):
            named = dict(zip(("optimiser", "schedule", "size", "rate"), settings[arm], strict=True))
            rows.append({"seed": seed, **named, "arm": arm, "at": "end", "hits": pack_hits(rng.random(1000) < 0.5 + 0.2 * seed)})
        rows.append({**rows[-1], "arm": "momentum, range test", "hits": pack_hits(np.ones(1000, dtype=bool))})
    table = pd.DataFrame(rows)
    assert lesson["arm_at_one_rate"]("AdamW") == "AdamW" and lesson["batch_arm"](32, "searched") == "momentum"
    same = lesson["runs"](table, "momentum, batches of 32, one rate"), lesson["runs"](table, "momentum")
    assert all(np.array_equal(one, other) for one, other in zip(same[0][0], same[1][0], strict=True))
    assert same[0][1] == [0, 1] and same[0][0][0].mean() < same[0][0][1].mean()
    assert all(found.all() for found in lesson["runs"](table, "momentum, range test")[0])
    assert not lesson["runs"](table, "momentum, one rate")[0][0].all()
    for arm in ("SGD", "no such arm"):
        with pytest.raises(ValueError, match="is not in the table"):
            lesson["runs"](table, arm)


def test_every_arm_has_as_many_rates_and_the_lesson_takes_the_best_which_lies_inside(lesson: dict) -> None:
    table = pd.read_csv(EVIDENCE / "11_recipes.csv").groupby(["arm", "place"])["validation"].mean()
    assert set(table.index) == {(arm, place) for arm in lesson["ARMS"] for place in lesson["PLACES"]}
    assert set(lesson["RECIPES"]) == set(lesson["ARMS"])
    for arm, rate in lesson["RECIPES"].items():
        best = table[arm].idxmax()
        assert rate == lesson["rate_of"](arm, best) and min(lesson["PLACES"]) < best < max(lesson["PLACES"]), arm


def test_the_stored_table_bears_out_every_claim_of_the_lesson(lesson: dict, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("COURSE_STRICT", "1")
    claims = Claims("11_optimisers_and_schedules", tmp_path)
    lesson["stored_claims"](stored("11_optimisers_and_schedules"), claims)
    assert len(claims.table()) >= 8
