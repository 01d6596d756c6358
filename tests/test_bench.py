"""The bench: the sides take turns, both do the same arithmetic, and a goal that is missed is said to be."""

import json
from collections.abc import Callable
from copy import deepcopy
from itertools import count, cycle
from pathlib import Path

import pytest
import torch

from course_utils.backbones import Classifier, load_backbone
from course_utils.data.splits import Split
from tools import bench


class FakeTime:
    """A clock that only moves when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def side(time: FakeTime, log: list[str], name: str, seconds: list[float]) -> Callable[[], int]:
    turns = iter(seconds)

    def train() -> int:
        log.append(name)
        time.now += next(turns)
        return 120

    return train


def test_the_sides_take_turns_and_the_first_turn_of_each_does_not_count() -> None:
    time, log = FakeTime(), []
    ours, other = side(time, log, "A", [999, 1, 2, 3]), side(time, log, "B", [0.1, 4, 5, 6])
    assert bench.alternate(ours, other, runs=3, clock=time) == ([120, 60, 40], [30, 24, 20])
    assert log == ["A", "B"] * 4


@pytest.mark.parametrize("loop", [bench.plain_loop, bench.channels_last_loop])
def test_both_sides_do_the_same_arithmetic(loop: Callable) -> None:
    generator = torch.Generator().manual_seed(1)
    pictures = torch.randint(256, (300, 3, 32, 32), generator=generator).to(torch.uint8)
    split = Split(pictures, torch.randint(10, (300,), generator=generator), tuple("0123456789"))
    fresh = Classifier(load_backbone("resnet_near", pretrained=False), 10)
    ours, other = deepcopy(fresh), deepcopy(fresh)
    bench.our_loop(ours, split, steps=2)
    loop(other, split, steps=2)
    start, one, two = (torch.cat([p.detach().flatten() for p in model.parameters()]) for model in (fresh, ours, other))
    moved = (one - start).norm()
    assert moved > 0.1
    assert (one - two).norm() < 0.2 * moved  # rounding moves AdamW where a gradient is all but zero; another rate gives .5


def test_the_ratio_is_the_median_of_neighbouring_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine becomes ten times slower half way, and one turn is disturbed: ours is twice as fast all the same."""
    time = FakeTime()

    def loop(seconds: list[int]) -> Callable[..., None]:
        turns = cycle(seconds)

        def train(*_: object) -> None:
            time.now += next(turns)

        return train

    monkeypatch.setattr(bench, "our_loop", loop([99, 1, 1, 10, 10, 80]))
    for other in ("plain_loop", "channels_last_loop"):
        monkeypatch.setattr(bench, other, loop([99, 2, 2, 20, 20, 20]))
    rows = bench.measure(64, 5, torch.device("cpu"), time)
    assert [(row.ours, row.other, row.ratio) for row in rows] == [(6.4, 3.2, 2)] * 4


@pytest.fixture
def instant(monkeypatch: pytest.MonkeyPatch) -> Callable[[], float]:
    """Training that takes no time, and a clock on which each turn takes one second."""
    for loop in ("our_loop", "plain_loop", "channels_last_loop"):
        monkeypatch.setattr(bench, loop, lambda *_: None)
    ticks = count()
    return lambda: float(next(ticks))


def test_the_file_is_a_list_of_rows_and_a_missed_goal_is_marked(
    instant: Callable[[], float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--pictures", "130", "--runs", "5", "--out", str(tmp_path / "new" / "bench.json")]
    assert bench.main(arguments, instant) == 0
    assert bench.main([*arguments, "--check"], instant) == 1
    rows = json.loads((tmp_path / "new" / "bench.json").read_text())
    assert [list(row) for row in rows] == [["name", "ours", "other", "ratio", "goal", "runs"]] * 4
    assert [(row["ours"], row["other"], row["ratio"], row["goal"], row["runs"]) for row in rows] == [
        *[(128, 128, 1, 1.13, 5)] * 2,
        *[(128, 128, 1, 0.95, 5)] * 2,
    ]
    header, first, _, _, second = capsys.readouterr().out.splitlines()[:5]
    assert torch.__version__ in header and "cores" in header and "cpu" in header
    assert first.startswith("✗ missed: fit against a plain loop") and "1.00 times (goal 1.13)" in first
    assert second.startswith("✓ fit against a loop by hand with the same tricks")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--runs", "4"], "5 runs or more"),
        (["--pictures", "63"], "64 pictures or more"),
        (["--device", "gpu"], "no device 'gpu'"),
    ],
)
def test_a_wrong_setting_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
