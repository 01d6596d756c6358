"""Batches for `fit`: small data stay on the device; larger data come through a DataLoader.

Both kinds give the same thing, `(pictures, labels)` on the device, transformed and augmented, and a training step
cannot tell which it got. The order of epoch `e` is a pure function of the seed and `e`, so that a resumed run sees
what an uninterrupted one would have seen.
"""

import zlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from course_utils.data.splits import PictureSet, Split

Transform = Callable[[Tensor], Tensor]
Augment = Callable[[Tensor, torch.Generator], Tensor]
Batch = tuple[Tensor, Tensor]


class Batches(Protocol):
    """What `fit` needs: the number of steps in an epoch, and the batches of epoch number `epoch`."""

    def __len__(self) -> int: ...

    def epoch(self, epoch: int) -> Iterator[Batch]: ...


def batches(
    split: PictureSet,
    transform: Transform,
    *,
    size: int = 64,
    steps: int | None = None,
    augment: Augment | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    workers: int = 0,
) -> Batches:
    """Shuffled batches of `size` pictures for training.

    `steps` is the length of an epoch in batches; without it, an epoch is one pass over the split. A split smaller
    than its batches is simply gone through more often. A `Split` is moved to the device whole; any other set of
    pictures is read through a DataLoader with `workers` processes.

    Raises `ValueError` for an empty split, and for a size or a number of steps below one.
    """
    if len(split) == 0:
        raise ValueError("no batches from an empty split")
    if size < 1 or (steps is not None and steps < 1):
        raise ValueError(f"a batch needs one picture or more and an epoch one step or more, not size={size}, steps={steps}")
    count = steps or -(-len(split) // size)
    if isinstance(split, Split):
        return DeviceBatches(split, transform, size, count, augment, seed, torch.device(device))
    return LoaderBatches(split, transform, size, count, augment, seed, torch.device(device), workers)


def _name_of(pictures: PictureSet) -> str:
    """Tells one set of pictures from another, at the cost of reading one of them."""
    checksum = zlib.crc32(pictures[0][0].cpu().numpy().tobytes(), zlib.crc32(pictures.labels.cpu().numpy().tobytes()))
    return f"{len(pictures)} pictures with checksum {checksum:08x}"


def _generator(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed((1_000_003 * seed + epoch) % 2**63)


def _order(count: int, needed: int, generator: torch.Generator) -> Tensor:
    """`needed` indices: one permutation of `count` after another, so that no picture gets ahead of another."""
    rounds = -(-needed // count)
    return torch.cat([torch.randperm(count, generator=generator) for _ in range(rounds)])[:needed]


class DeviceBatches:
    """Batches cut from a `Split` that lives on the device as one tensor."""

    def __init__(self, split: Split, transform: Transform, size: int, steps: int, augment: Any, seed: int, device: Any) -> None:
        self.split, self.transform, self.augment = split.to(device), transform, augment
        self.size, self.steps, self.seed, self.data = size, steps, seed, _name_of(split)

    def __len__(self) -> int:
        return self.steps

    def epoch(self, epoch: int) -> Iterator[Batch]:
        generator = _generator(self.seed, epoch)
        for chosen in _order(len(self.split), self.steps * self.size, generator).split(self.size):
            chosen = chosen.to(self.split.labels.device)
            pictures = self.transform(self.split.pictures[chosen])
            if self.augment is not None:
                pictures = self.augment(pictures, generator)
            yield pictures, self.split.labels[chosen]


def transformed_loader(pictures: Any, transform: Transform, size: int, **settings: Any) -> DataLoader:
    """A DataLoader of `(pictures, labels)`, `size` of each a batch, transformed by its workers; settings: a DataLoader's."""
    return DataLoader(pictures, size, collate_fn=partial(_transformed, transform), **settings)


def _transformed(transform: Transform, pictures: list[tuple[Tensor, int]]) -> Batch:
    return torch.stack([transform(picture) for picture, _ in pictures]), torch.tensor([label for _, label in pictures])


class LoaderBatches:
    """Batches of pictures too many for the device: read by workers, pinned, copied without blocking."""

    def __init__(self, pictures: Any, transform: Any, size: int, steps: int, augment: Any, seed: int, device: Any, workers: int):
        self.count, self.size, self.steps, self.transform = len(pictures), size, steps, transform
        self.augment, self.seed, self.device, self.data = augment, seed, device, _name_of(pictures)
        self.order: list[int] = []  # of one epoch, set anew before each
        settings = {"num_workers": workers, "persistent_workers": workers > 0, "pin_memory": device.type == "cuda"}
        # Its own random state: otherwise it draws the workers' seed from torch's, and a resumed run would differ.
        own = torch.Generator().manual_seed(0)
        self.loader = transformed_loader(pictures, transform, size, sampler=self.order, generator=own, **settings)

    def __len__(self) -> int:
        return self.steps

    def epoch(self, epoch: int) -> Iterator[Batch]:
        generator = _generator(self.seed, epoch)
        self.order[:] = _order(self.count, self.steps * self.size, generator).tolist()
        for pictures, labels in self.loader:
            pictures = pictures.to(self.device, non_blocking=True)
            if self.augment is not None:
                pictures = self.augment(pictures, generator)
            yield pictures, labels.to(self.device, non_blocking=True)
