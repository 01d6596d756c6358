"""Freezing: which parameters learn, from which epoch on, and what batch norm does meanwhile."""

from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from course_utils.backbones import Backbone, Classifier

Unfreezing = Callable[[Any, int], None]


def train_mode(model: nn.Module) -> None:
    """Put `model` in training mode, and every part whose parameters are all frozen in evaluation mode.

    So the running statistics of a frozen batch norm stay still too, and its dropout is off: it computes what it computed
    when it was pretrained.
    """
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()


def stages(backbone: Backbone) -> list[nn.ModuleList]:
    """The layers of a backbone from input to output, in parts: a new one begins where the maps get smaller."""
    parts: list[list[nn.Module]] = [[]]
    for layer in _in_order(backbone.layers):
        if isinstance(layer, nn.MaxPool2d) or getattr(layer, "stride", 1) in (2, (2, 2)):
            parts.append([])
        parts[-1].append(layer)
    return [part for part in map(nn.ModuleList, parts) if list(part.parameters())]


def unfreeze_top(model: Classifier, count: int) -> None:
    """Let the head and the last `count` stages of the backbone learn, and freeze the others.

    Raises `ValueError` where there are not so many stages.
    """
    parts = stages(model.backbone)
    if not 0 <= count <= len(parts):
        raise ValueError(f"{model.backbone.name} has {len(parts)} stages: unfreeze 0 to {len(parts)} of them, not {count}")
    model.requires_grad_(True)
    model.backbone.requires_grad_(count == len(parts))  # with it, parameters that belong to no stage
    for part in parts[len(parts) - count :]:
        part.requires_grad_(True)


def _in_order(layers: nn.Module) -> Iterator[nn.Module]:
    """The layers of a chain, chains within it opened; a residual block stays whole."""
    for layer in layers.children():
        if isinstance(layer, nn.Sequential):
            yield from _in_order(layer)
        else:
            yield layer
