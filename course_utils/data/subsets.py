"""Few-shot subsets, and folds for cross-validation."""

from typing import TypeVar

import torch
from sklearn.model_selection import StratifiedKFold
from torch import Tensor

from course_utils.data.splits import PictureSet

S = TypeVar("S", bound=PictureSet)


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
            raise ValueError(
                f"{per_class} pictures a class were asked for; class {name!r} has {len(members)}: choose 1 to {len(members)}"
            )
        chosen.append(members[torch.randperm(len(members), generator=generator)[:per_class]])
    indices = torch.cat(chosen)
    return split.subset(indices[torch.randperm(len(indices), generator=generator)])


def stratified_folds(labels: Tensor, count: int, seed: int) -> list[Tensor]:
    """The indices that each of `count` folds holds out: every picture once, every class in every fold.

    Raises `ValueError` for fewer than two folds, or more than the pictures of a class.
    """
    sizes = torch.bincount(labels.cpu())
    sizes = sizes[sizes > 0]
    if count < 2:
        raise ValueError(f"cross-validation takes two folds or more, not {count}")
    if len(labels) < count:
        raise ValueError(f"{count} folds of {len(labels)} pictures: a fold would be empty; take fewer folds")
    if sizes.min() < count:
        raise ValueError(f"{count} folds, but a class has {int(sizes.min())} pictures: a fold would lack it; take fewer folds")
    split = StratifiedKFold(count, shuffle=True, random_state=seed % 2**32).split(labels, labels.cpu())
    return [torch.from_numpy(held_out) for _, held_out in split]
