"""Measure the course's code against what one would write by hand, and write build/bench.json.

Both sides of a row take turns in one run, so that a machine that slows down slows both. The numbers are pictures a
second, the median over the turns. The ratio says how many times better ours is: the median of the ratios of neighbouring
turns.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python tools/bench.py` finds its neighbours from any folder
from course_utils.backbones import Classifier, centred, load_backbone
from course_utils.data.batches import batches
from course_utils.data.splits import SIZE, Split
from course_utils.profile import pick_device
from course_utils.training import adamw, constant, fit
from tools.course import ROOT, ToolError, write_text

BATCH, CLASSES, LR, DECAY = 64, 10, 2e-3, 0.01
FEWEST = 5  # turns of each side, below which a median says little

Clock = Callable[[], float]
Side = Callable[[], int]  # trains once and returns how many pictures it went through


@dataclass(frozen=True)
class Row:
    """One line of bench.json: speeds in pictures a second, their ratio, the goal of that, and the turns of each side."""

    name: str
    ours: float
    other: float
    ratio: float
    goal: float
    runs: int


def plain_loop(model: nn.Module, split: Split, steps: int) -> None:
    """What one writes first: a loop over tensors in their usual memory order."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=DECAY)
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0)).to(split.labels.device)
    model.train()
    for chosen in order[: steps * BATCH].split(BATCH):
        pictures = (split.pictures[chosen].float() / 255 - 0.5) / 0.25
        loss = F.cross_entropy(model(pictures), split.labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def channels_last_loop(model: nn.Module, split: Split, steps: int) -> None:
    """The same by somebody who knows that convolutions are fastest with the channels last in memory."""
    model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=DECAY)
    order = torch.randperm(len(split), generator=torch.Generator().manual_seed(0)).to(split.labels.device)
    model.train()
    for chosen in order[: steps * BATCH].split(BATCH):
        pictures = (split.pictures[chosen].float() / 255 - 0.5) / 0.25
        loss = F.cross_entropy(model(pictures.contiguous(memory_format=torch.channels_last)), split.labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def our_loop(model: nn.Module, split: Split, steps: int) -> None:
    """`fit`, set to do the same arithmetic: the same order, no augmentation, one rate throughout."""
    data = batches(split, centred, size=BATCH, steps=steps, device=split.labels.device)
    fit(model, data, optimizer=adamw(LR, weight_decay=DECAY), schedule=constant)


def alternate(ours: Side, other: Side, runs: int, clock: Clock = time.perf_counter) -> tuple[list[float], list[float]]:
    """Speeds of both sides, which take turns `runs` times after one turn each that does not count."""
    ours()
    other()
    speeds: tuple[list[float], list[float]] = ([], [])
    for _ in range(runs):
        for side, kept in zip((ours, other), speeds, strict=True):
            started = clock()
            pictures = side()
            kept.append(pictures / (clock() - started))
    return speeds


def measure(pictures: int, runs: int, device: torch.device, clock: Clock = time.perf_counter) -> list[Row]:
    """The rows of bench.json: untrained small networks go once through `pictures` random pictures of ten classes."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(256, (pictures, 3, SIZE, SIZE), generator=generator).to(torch.uint8)
    labels = torch.randint(CLASSES, (pictures,), generator=generator)
    split = Split(drawn, labels, tuple("0123456789")).to(device)
    torch.manual_seed(0)
    nets = {
        name: Classifier(load_backbone(key, pretrained=False), CLASSES).to(device)
        for name, key in (("small ResNet", "resnet_near"), ("small VGG", "vgg_near"))
    }
    steps = pictures // BATCH

    def side(loop: Callable[[nn.Module, Split, int], None], net: str) -> Side:
        def train() -> int:
            loop(deepcopy(nets[net]), split, steps)
            if device.type == "cuda":
                torch.cuda.synchronize()
            return steps * BATCH

        return train

    rows = []
    for name, loop, goal in (
        ("fit against a plain loop by hand", plain_loop, 1.13),
        ("fit against a loop by hand with the same tricks", channels_last_loop, 0.95),
    ):
        for net in nets:
            ours, other = alternate(side(our_loop, net), side(loop, net), runs, clock)
            ratio = median(a / b for a, b in zip(ours, other, strict=True))
            speeds = round(median(ours), 1), round(median(other), 1)
            rows.append(Row(f"{name}, {net}, pictures a second", *speeds, round(ratio, 4), goal, runs))
    return rows


def main(argv: list[str] | None = None, clock: Clock = time.perf_counter) -> int:
    """Run the command line; return 0, or with --check 1 where a goal is missed, or 2 where nothing could be started."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="return 1 where a goal is missed")
    parser.add_argument("--runs", type=int, default=9, help="turns of each side (default: 9)")
    parser.add_argument("--pictures", type=int, default=4000, help="pictures a turn (default: 4000)")
    parser.add_argument("--device", default="cpu", help="cpu (the default), cuda or mps")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench.json", help="default: build/bench.json")
    options = parser.parse_args(argv)
    try:
        if options.runs < FEWEST or options.pictures < BATCH:
            raise ToolError(f"measuring takes {FEWEST} runs or more, of {BATCH} pictures or more")
        device = pick_device(options.device)
        now = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
        where = f"{device}, {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
        print(f"{now}, torch {torch.__version__}, Python {platform.python_version()}, {where}", flush=True)
        rows = measure(options.pictures, options.runs, device, clock)
        write_text(options.out, json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    except (ToolError, ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2
    for row in rows:
        mark = "✓" if row.ratio >= row.goal else "✗ missed:"
        print(f"{mark} {row.name}: {row.ours:.0f} against {row.other:.0f}, {row.ratio:.2f} times (goal {row.goal})")
    return int(options.check and any(row.ratio < row.goal for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
