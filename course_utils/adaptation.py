"""Adaptation: batches of two domains, labels for the source alone, and steps for `fit` that bring the two together.

A step takes `(source pictures, source labels, target pictures)` and a model with `backbone`, `head` and, for adversarial steps,
`discriminator`, a part of the model so that its optimizer and its checkpoints hold it. Domain labels: source 1, target 0. The
domains go through one after the other: batch norm standardises each by its own statistics, and keeps the target's for later.
"""

import math
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from course_utils.data.batches import Transform, batches
from course_utils.data.splits import Split


class UnlabelledTarget:
    """Target pictures without labels, and `draw`, a recipe that gives both anew. Raises `ValueError` where it keeps the labels.

    `split` holds the pictures, shuffled, in one class "unknown", so that `accuracy` refuses it.
    """

    def __init__(self, draw: Callable[[], Split]) -> None:
        self.draw = draw
        pictures = self._shuffled().pictures
        self.split = Split(pictures, torch.zeros(len(pictures), dtype=torch.long), ("unknown",))

    def reveal(self, source: Split) -> Split:
        """`split` with its labels, for the last cell; warns of classes that the source lacks. Other pictures: `ValueError`."""
        split = self._shuffled()
        if not torch.equal(split.pictures, self.split.pictures):
            raise ValueError("the recipe gives other pictures than before, and so other labels: fix its seed")
        here, known = ({one.classes[label] for label in one.labels.unique().tolist()} for one in (split, source))
        if here - known:
            warnings.warn(f"the source lacks {', '.join(sorted(here - known))}: no such picture can be got right", stacklevel=2)
        return split

    def _shuffled(self) -> Split:
        split = self.draw()
        labels = weakref.ref(split.labels)
        split = split.subset(torch.randperm(len(split), generator=torch.Generator().manual_seed(0)))
        if labels() is not None:
            raise ValueError("the recipe keeps the labels that it gives: let it draw the split whenever it is called")
        return split


class DomainBatches:
    """Batches for `fit`: `size` source pictures, their labels, and `size` target pictures, each domain in an order of its own.

    settings: see `batches`; `augment` is for the source, `augment_target` for the target. An `epoch` ends with the shorter one.
    """

    def __init__(
        self, source: Split, target: UnlabelledTarget, transform: Transform, *, augment_target: Any = None, **settings: Any
    ) -> None:
        own = settings | {"augment": augment_target, "seed": -1 - settings.get("seed", 0)}
        self.parts: list[Any] = [batches(source, transform, **settings), batches(target.split, transform, **own)]
        self.transform, self.size, self.seed = transform, self.parts[0].size, self.parts[0].seed
        self.data = ", ".join(part.data for part in self.parts)

    def __len__(self) -> int:
        return min(map(len, self.parts))

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for (source, labels), (target, _) in zip(*(part.epoch(epoch) for part in self.parts), strict=False):
            yield source, labels, target


class GradientReversal(torch.autograd.Function):
    """`apply(features, λ)`: features; `backward`: −λ times their gradient (Ganin et al. 2016). λ in [0, 1], or `ValueError`."""

    @staticmethod
    def forward(ctx: Any, features: Tensor, factor: float) -> Tensor:
        if not 0 <= factor <= 1:
            raise ValueError(f"λ lies between 0 and 1, not at {factor}")
        ctx.factor = factor
        return features.view_as(features)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return -ctx.factor * gradients[0], None


def lambda_at(progress: float, gamma: float = 10.0) -> float:
    """λ = 2 / (1 + exp(−γ · progress)) − 1 (Ganin et al. 2016, section 5.2). Raises `ValueError` for progress outside [0, 1]."""
    if not 0 <= progress <= 1:
        raise ValueError(f"progress goes from 0 to 1, and is not {progress}")
    return 2 / (1 + math.exp(-gamma * progress)) - 1


def discriminator(width: int, hidden: int = 128) -> nn.Sequential:
    """Features `(n, width)` to one logit each, `(n,)`: a softmax over one unit would be 1, whatever comes in."""
    first, second, last = nn.Linear(width, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, 1)
    return nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last, nn.Flatten(0))


def domain_loss(discriminator: Any, features: Any, weights: Any = (None, None)) -> Tensor:
    """Cross-entropy of the domain labels, the mean of both domains: ln 2 where every logit is 0.

    features: of source and target, `(n, width)` and `(m, width)`; weights: of their pictures, `(n,)` and `(m,)`, 1 on average.
    """
    logits = [discriminator(own) for own in features]
    labels = [torch.ones_like(logits[0]), torch.zeros_like(logits[1])]
    return torch.stack(list(map(F.binary_cross_entropy_with_logits, logits, labels, weights))).mean()


def dann(model: Any, batch: Any, progress: float, strength: Any = lambda_at) -> dict[str, Tensor]:
    """DANN (Ganin et al. 2016, section 4.2): learn the source's classes, confuse the discriminator. strength: λ of progress."""
    features, _, cross_entropy = _both(model, batch)
    turned = [GradientReversal.apply(own, strength(progress)) for own in features]
    return {"cross_entropy": cross_entropy, "domain": domain_loss(model.discriminator, turned)}


def cdan(model: Any, batch: Any, progress: float, strength: Any = lambda_at, entropy: bool = True) -> dict[str, Tensor]:
    """CDAN (Long et al. 2018, section 3): DANN whose discriminator sees features ⊗ predictions, `(n, width × classes)`.

    entropy: CDAN+E, in which a picture weighs 1 + exp(−H) for the entropy H of its prediction, relative to its domain.
    """
    features, logits, cross_entropy = _both(model, batch)
    turned = [GradientReversal.apply(own, strength(progress)) for own in features]
    predictions = [own.detach().softmax(dim=1) for own in logits]  # or the head would answer what the discriminator likes
    maps = [(own[:, :, None] * answer[:, None]).flatten(1) for own, answer in zip(turned, predictions, strict=True)]
    sure = [1 + torch.exp(-torch.special.entr(own).sum(dim=1)) for own in predictions]
    weights = [own / own.mean() for own in sure] if entropy else (None, None)
    return {"cross_entropy": cross_entropy, "domain": domain_loss(model.discriminator, maps, weights)}


def adda(model: Any, batch: Any, progress: float, source: Any) -> dict[str, Tensor]:
    """ADDA (Tzeng et al. 2017, eq. 9): `model`, a copy of the trained network `source`, learns its features for the target.

    The discriminator's loss moves the discriminator alone, and that on flipped labels the backbone alone, so that one optimizer
    does the work of two. The head and `source` stay. Raises `ValueError` where both networks have one backbone.
    """
    if source.backbone is model.backbone:
        raise ValueError("the source network must stay as it is: train a copy of it, copy.deepcopy(source)")
    pictures, _, target = _checked(*batch)
    fixed, features = source.eval().backbone(pictures).detach(), model.backbone(target)
    held = {name: parameter.detach() for name, parameter in model.discriminator.named_parameters()}
    logits = functional_call(model.discriminator, held, features)
    flipped = F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits))
    return {"discriminator": domain_loss(model.discriminator, (fixed, features.detach())), "target": flipped}


def align(model: Any, batch: Any, progress: float, distance: Any, weight: float = 1.0) -> dict[str, Tensor]:
    """The source's classes, and `weight` times the `distance` of the features, such as `mmd` or `coral`."""
    features, _, cross_entropy = _both(model, batch)
    with torch.autocast(features[0].device.type, enabled=False):  # 16 bits are too few for differences of squares
        return {"cross_entropy": cross_entropy, "distance": weight * distance(*(own.float() for own in features))}


def mmd(source: Tensor, target: Tensor, factors: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)) -> Tensor:
    """Squared maximum mean discrepancy of `(n, width)` and `(m, width)`, unbiased (Gretton et al. 2012, lemma 6): it can be < 0.

    Its kernel is the mean of exp(−‖x − y‖² / (factor · median²)), after Long et al. 2015; the median of ‖x − y‖ has no gradient.
    """
    rows, n, m = torch.cat([source, target]), len(source), len(target)
    squares = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").square()
    median = torch.pdist(rows.detach()).median().square().clamp_min(1e-12)
    kernel = torch.stack([torch.exp(-squares / (factor * median)) for factor in factors]).mean(dim=0).fill_diagonal_(0)
    return kernel[:n, :n].sum() / (n * (n - 1)) + kernel[n:, n:].sum() / (m * (m - 1)) - 2 * kernel[:n, n:].mean()


def coral(source: Tensor, target: Tensor) -> Tensor:
    """‖C − C′‖²_F / (4 width²) for covariances of `(n, width)` (Sun and Saenko 2016, eq. 1): a quarter of the mean square."""
    return (source.T.cov() - target.T.cov()).square().sum() / (4 * source.shape[1] ** 2)


def _both(model: Any, batch: Any) -> tuple[list[Tensor], list[Tensor], Tensor]:
    source, labels, target = _checked(*batch)
    copies = [{name: buffer.clone() for name, buffer in part.named_buffers()} for part in (model.backbone, model.head)]
    features = [functional_call(model.backbone, copies[0], source), model.backbone(target)]  # only its statistics stay
    logits = [functional_call(model.head, copies[1], features[0]), model.head(features[1])]
    return features, logits, F.cross_entropy(logits[0], labels)


def _checked(source: Tensor, labels: Any = None, target: Any = ()) -> tuple[Tensor, Any, Tensor]:
    if min(len(source), len(target)) < 2:
        raise ValueError(f"a batch has two pictures or more of each domain, not {len(source)} and {len(target)}")
    reach = [float(own.abs().max()) for own in (source, target)]
    if source.shape[1:] != target.shape[1:] or max(reach) > 50 * min(reach) > 0:  # a forgotten division makes it 255 times
        found = [f"{tuple(own.shape[1:])} up to {top:.3g}" for own, top in zip((source, target), reach, strict=True)]
        raise ValueError(f"source pictures are {found[0]}, target pictures {found[1]}: give both one size, channels and range")
    return source, labels, target
