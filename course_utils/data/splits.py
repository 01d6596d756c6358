"""Sets of pictures: what every one of them can do, and the kind that lives in memory."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self

import numpy as np
import torch
from torch import Tensor

SIZE = 32  # pixels: the side of every picture of the embedded world
STREAMS = ("train", "valid", "test", "source")


def generator(task: str, split: str, index: int, seed: int) -> np.random.Generator:
    """The random numbers of one picture: a pure function of task, split, index and seed.

    Raises `ValueError` for a split that does not exist.
    """
    if split not in STREAMS:
        raise ValueError(f"no split {split!r}; there are {', '.join(STREAMS)}")
    return np.random.default_rng((seed, zlib.crc32(task.encode()), STREAMS.index(split), index))


class PictureSet(Protocol):
    """Pictures with labels: in memory (`Split`), or read from disk one by one."""

    @property
    def labels(self) -> Tensor:
        """int64 `(n,)`."""
        ...

    @property
    def classes(self) -> tuple[str, ...]: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Picture uint8 `(3, height, width)`, of any size, and its label."""
        ...

    def subset(self, indices: Sequence[int] | Tensor) -> Self: ...


@dataclass(frozen=True)
class Split:
    """Pictures in memory: uint8 `(n, 3, height, width)`, labels int64 `(n,)`, and the names of the classes.

    Raises `ValueError` where pictures and labels differ in number, or a label has no class.
    """

    pictures: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.pictures) != len(self.labels):
            raise ValueError(f"{len(self.pictures)} pictures, but {len(self.labels)} labels")
        if len(self.labels) and not 0 <= int(self.labels.min()) <= int(self.labels.max()) < len(self.classes):
            raise ValueError(f"labels must lie in 0..{len(self.classes) - 1}, one for each of the {len(self.classes)} classes")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.pictures[index], int(self.labels[index])

    def subset(self, indices: Sequence[int] | Tensor) -> "Split":
        """The pictures at `indices`, in that order."""
        chosen = torch.as_tensor(indices, dtype=torch.long)
        return Split(self.pictures[chosen], self.labels[chosen], self.classes)

    def to(self, device: torch.device | str) -> "Split":
        """The same split on another device."""
        return Split(self.pictures.to(device), self.labels.to(device), self.classes)


def stack(drawn: Sequence[tuple[np.ndarray, int]], classes: tuple[str, ...]) -> Split:
    """A split from pictures `(height, width, 3)` and their labels."""
    pictures = torch.from_numpy(np.stack([picture for picture, _ in drawn])).permute(0, 3, 1, 2).contiguous()
    return Split(pictures, torch.tensor([label for _, label in drawn]), classes)
