"""Fusion: features of several sources brought together before the decision."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from course_utils.backbones import Backbone, Transform


class Branches(Backbone):
    """Backbones as one: their features side by side, `(n, sum of widths)`.

    Its transform sets each branch's own version of a picture one after the other along the channels, so that batches,
    augmentation and predictions work as for one backbone. Raises `ValueError` for no backbone, or versions of other sizes.
    """

    def __init__(self, backbones: Sequence[Backbone]) -> None:
        names, transforms = [one.name for one in backbones], [one.transform for one in backbones]
        shapes = [tuple(transform(torch.zeros(3, 48, 64, dtype=torch.uint8)).shape) for transform in transforms]
        if len(set(shapes)) != 1 or shapes[0][0] != 3:
            raise ValueError(f"branches are one backbone or more for colour pictures of one size; here {names} take {shapes}")
        self.widths = [one.width for one in backbones]
        super().__init__("+".join(names), nn.ModuleList(backbones), sum(self.widths), partial(_versions, transforms))

    def forward(self, pictures: Tensor) -> Tensor:
        if pictures.dim() != 4 or pictures.shape[1] != 3 * len(self.widths):
            raise ValueError(f"{self.name} takes (n, {3 * len(self.widths)}, height, width), not {tuple(pictures.shape)}")
        parts = zip(self.layers.children(), pictures.split(3, dim=1), strict=True)
        return torch.cat([one(version) for one, version in parts], dim=1)


def _versions(transforms: Sequence[Transform], pictures: Tensor) -> Tensor:
    return torch.cat([transform(pictures) for transform in transforms], dim=-3)


class Fusion(nn.Module):
    """A head: features of all sources side by side, `(n, sum of widths)`, to logits `(n, classes)`.

    Each source is standardised, projected to `width` numbers and rectified. "concat" sets these side by side; "gated" adds
    them up, every number in shares of its own (after Arevalo et al. 2017); "attention" adds them up with one share a source.
    `shares` gives `(n, sources, width)` or `(n, sources, 1)`, which sum to 1 over the sources, and `None` for "concat".
    Raises `ValueError` for no source, another `how`, or features of another width.
    """

    def __init__(self, widths: Sequence[int], classes: int, how: str = "concat", width: int = 64, dropout: float = 0.5) -> None:
        super().__init__()
        scores = {"concat": (0, 0), "gated": (sum(widths), len(widths) * width), "attention": (width, 1)}
        if not widths or how not in scores:
            raise ValueError(f"a fusion takes one source or more and {', '.join(scores)}, not {how!r} of {len(widths)} sources")
        self.widths, self.how, self.out_features = list(widths), how, classes
        self.norms = nn.ModuleList(nn.BatchNorm1d(own, affine=False) for own in widths)
        self.projections = nn.ModuleList(nn.Linear(own, width) for own in widths)
        self.score = None if how == "concat" else nn.Linear(*scores[how])
        self.classify = nn.Sequential(nn.Dropout(dropout), nn.Linear(width * (len(widths) if how == "concat" else 1), classes))

    def forward(self, features: Tensor) -> Tensor:
        projected, shares = self._parts(features)
        return self.classify(projected.flatten(1) if shares is None else (shares * projected).sum(dim=1))

    def shares(self, features: Tensor) -> Tensor | None:
        return self._parts(features)[1]

    def _parts(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        if features.shape[1:] != (sum(self.widths),):
            raise ValueError(f"sources of widths {self.widths} make (n, {sum(self.widths)}), not {tuple(features.shape)}")
        if self.training and not torch.isfinite(features).all():  # batch norm would remember it
            raise ValueError("a source has a feature that is not finite: look at its weights and its pictures")
        sources = [norm(own) for norm, own in zip(self.norms, features.split(self.widths, dim=1), strict=True)]
        projected = torch.stack([layer(own).relu() for layer, own in zip(self.projections, sources, strict=True)], dim=1)
        if self.score is None:
            return projected, None
        scores = self.score(torch.cat(sources, dim=1) if self.how == "gated" else projected)
        return projected, scores.view(len(features), len(self.widths), -1).softmax(dim=1)
