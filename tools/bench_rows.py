"""Contests of speed: training loops, and the places in which data can live.

A contest is two ways to the same end. Its sides run by turns, and say themselves how many seconds count.
"""

import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from course_utils.backbones import Classifier, centred, load_backbone
from course_utils.data import PictureSet, Split, mnist_m, picture_folder
from course_utils.data.batches import batches, transformed_loader
from course_utils.data.splits import SIZE
from course_utils.training import adamw, constant, fit

BATCH, CLASSES, LR, DECAY = 64, 10, 2e-3, 0.01
NETS = {"small ResNet": "resnet_near", "small VGG": "vgg_near"}

Clock = Callable[[], float]
Side = Callable[[int], float]  # runs the turn of that number, and returns the seconds that count


class Stopwatch:
    """Adds up `seconds` on a clock from each `start` to the next `stop`; a GPU does the work it was given first."""

    def __init__(self, clock: Clock, device: torch.device) -> None:
        self.clock, self.device, self.seconds, self.started = clock, device, 0.0, 0.0

    def start(self) -> None:
        """Let it run."""
        self.started = self._now()

    def stop(self) -> None:
        """Stop it, and keep the seconds so far."""
        self.seconds += self._now() - self.started

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()
        return self.clock()


@dataclass(frozen=True)
class Setting:
    """Where a bench runs: on which device, with a folder for files, pictures a turn of a training loop, and the clock."""

    device: torch.device
    folder: Path
    pictures: int = 4000
    clock: Clock = time.perf_counter

    def watch(self) -> Stopwatch:
        """A stopwatch at zero."""
        return Stopwatch(self.clock, self.device)

    def time(self, work: Callable[[], object]) -> float:
        """The seconds that `work` takes."""
        watch = self.watch()
        watch.start()
        work()
        watch.stop()
        return watch.seconds


@dataclass(frozen=True)
class Contest:
    """Ours against another way, the goal of the ratio, and the turns of each side.

    `pictures` is how many a turn goes through where speed is what counts, and 0 where it is seconds. `note` says after the
    turns what else was seen.
    """

    name: str
    goal: float
    ours: Side
    other: Side
    runs: int = 9
    pictures: int = 0
    note: Callable[[], str] = str


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


def training_loops(setting: Setting) -> list[Contest]:
    """`fit` against loops by hand: untrained small networks go once through random pictures of ten classes."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(256, (setting.pictures, 3, SIZE, SIZE), generator=generator).to(torch.uint8)
    labels = torch.randint(CLASSES, (setting.pictures,), generator=generator)
    split = Split(drawn, labels, tuple("0123456789")).to(setting.device)
    torch.manual_seed(0)
    nets = {net: Classifier(load_backbone(key, pretrained=False), CLASSES).to(setting.device) for net, key in NETS.items()}
    steps = setting.pictures // BATCH

    def side(loop: Callable[[nn.Module, Split, int], None], net: str) -> Side:
        def train(turn: int) -> float:
            model = deepcopy(nets[net])
            return setting.time(lambda: loop(model, split, steps))

        return train

    return [
        Contest(f"{name}, {net}", goal, side(our_loop, net), side(loop, net), pictures=steps * BATCH)
        for name, loop, goal in (
            ("fit against a plain loop by hand", plain_loop, 1.13),
            ("fit against a loop by hand with the same tricks", channels_last_loop, 0.95),
        )
        for net in nets
    ]


def as_files(split: Split, folder: Path) -> PictureSet:
    """The same pictures as PNG files, one folder a class."""
    for name in split.classes:
        (folder / name).mkdir(parents=True, exist_ok=True)
    for index in range(len(split)):
        picture, label = split[index]
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / split.classes[label] / f"{index}.png")
    return picture_folder(folder)


def where_data_live(setting: Setting, train: Split | None = None) -> list[Contest]:
    """An epoch of nothing but batches, on the device against torch's DataLoader, which reads in this process.

    The files were written just before, so that they come from the system's memory and no disk is waited for.
    """
    train, device = train or mnist_m("train"), setting.device
    on_device = batches(train, centred, size=BATCH, device=device)

    def ours(turn: int) -> float:
        def epoch() -> None:
            for _ in on_device.epoch(turn):
                pass

        return setting.time(epoch)

    def other(stored: PictureSet) -> Side:
        loader = transformed_loader(stored, centred, BATCH, shuffle=True, pin_memory=device.type == "cuda")

        def epoch() -> None:
            for pictures, labels in loader:
                pictures.to(device, non_blocking=True), labels.to(device, non_blocking=True)

        return lambda turn: setting.time(epoch)

    return [
        Contest(f"batches on the device against a DataLoader from {place}", 1.0, ours, other(stored), pictures=len(train))
        for place, stored in (("memory", train), ("files", as_files(train, setting.folder / "pictures")))
    ]
