"""Sets of pictures: what every one of them can do, the kind that lives in memory, few-shot subsets, and folds."""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, Self, TypeVar

import numpy as np
import torch
from sklearn.model_selection import StratifiedKFold
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


S = TypeVar("S", bound=PictureSet)


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


def few_shot(split: S, per_class: int, seed: int) -> S:
    """`per_class` pictures of every class, drawn by `seed` and shuffled.

    Raises `ValueError` for an empty class, or where a class has too few pictures.
    """
    generator = torch.Generator().manual_seed(seed % 2**63)
    chosen = []
    for number, name in enumerate(split.classes):
        members = (split.labels == number).nonzero().flatten()
        if len(members) == 0:
            raise ValueError(f"class {name!r} is empty: remove it from the classes or give it pictures")
        if not 1 <= per_class <= len(members):
            raise ValueError(f"{per_class} pictures a class, but class {name!r} has {len(members)}: choose 1 to {len(members)}")
        chosen.append(members[torch.randperm(len(members), generator=generator)[:per_class]])
    indices = torch.cat(chosen)
    return split.subset(indices[torch.randperm(len(indices), generator=generator)])


def stratified_folds(labels: Tensor, count: int, seed: int) -> list[Tensor]:
    """The indices that each of `count` folds holds out: every picture once, every class in every fold.

    Raises `ValueError` for fewer than two folds, or more than the pictures of a class.
    """
    _, sizes = labels.unique(return_counts=True)
    if count < 2:
        raise ValueError(f"cross-validation takes two folds or more, not {count}")
    if sizes.min() < count:
        raise ValueError(f"{count} folds, but a class has {int(sizes.min())} pictures: a fold would lack it; take fewer folds")
    split = StratifiedKFold(count, shuffle=True, random_state=seed % 2**32).split(labels, labels.cpu())
    return [torch.from_numpy(held_out) for _, held_out in split]
