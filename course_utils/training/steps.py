"""Steps: a step turns a batch into a dict of losses, and `fit` minimises their sum.

A new method is a new step: `step(model, batch, progress) -> {"name": loss}`, with progress going from 0 to 1.
"""

from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

Losses = dict[str, Tensor]
Step = Callable[[nn.Module, Any, float], Losses]


def supervised(model: nn.Module, batch: tuple[Tensor, Tensor], progress: float) -> Losses:
    """Cross-entropy of logits `(n, classes)` on labels `(n,)`. Raises `ValueError` for a label that the head lacks."""
    pictures, labels = batch
    logits = model(pictures)
    if (largest := int(labels.max())) >= logits.shape[1]:
        # Asked here since a GPU answers an unknown class with a crash that names no reason.
        raise ValueError(
            f"the head has {logits.shape[1]} classes, but a label is {largest}: build it for the classes of the split"
        )
    return {"cross_entropy": F.cross_entropy(logits, labels)}
