"""Few-shot subsets."""

from typing import TypeVar

import torch

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
