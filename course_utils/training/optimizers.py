"""Optimizers as recipes, and schedules as pure functions of progress.

A schedule gives a factor between 0 and 1. `fit` multiplies each group's own rate by it, so that a body with a small
rate and a head with a large one keep their proportion.
"""

import math
from collections.abc import Callable

import torch
from torch import nn

OptimizerRecipe = Callable[[nn.Module], torch.optim.Optimizer]
Schedule = Callable[[float], float]


def _groups(model: nn.Module, lr: float, head_lr: float | None) -> list[dict]:
    """Trainable parameters, the head's in a group of their own where it has a rate of its own."""
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if head_lr is None:
        return [{"params": list(trainable.values()), "lr": lr}]
    head = [parameter for name, parameter in trainable.items() if name.startswith("head.")]
    body = [parameter for name, parameter in trainable.items() if not name.startswith("head.")]
    groups: list[dict] = [{"params": body, "lr": lr}, {"params": head, "lr": head_lr}]
    return [group for group in groups if group["params"]]


def adamw(lr: float = 2e-3, head_lr: float | None = None, weight_decay: float = 0.01) -> OptimizerRecipe:
    """AdamW (Loshchilov and Hutter 2019); `head_lr` is the rate of `model.head`, where it differs."""
    return lambda model: torch.optim.AdamW(_groups(model, lr, head_lr), weight_decay=weight_decay)


def sgd(lr: float = 0.1, head_lr: float | None = None, momentum: float = 0.9, weight_decay: float = 5e-4) -> OptimizerRecipe:
    """Stochastic gradient descent with Nesterov momentum."""
    return lambda model: torch.optim.SGD(_groups(model, lr, head_lr), momentum=momentum, weight_decay=weight_decay, nesterov=True)


def one_cycle(warmup: float = 0.25) -> Schedule:
    """A straight rise over the share `warmup` of training, then half a cosine down to zero (after Smith 2018)."""

    def factor(progress: float) -> float:
        if progress < warmup:
            return progress / warmup
        return 0.5 * (1 + math.cos(math.pi * (progress - warmup) / (1 - warmup)))

    return factor


def constant(progress: float) -> float:
    """The same rate from the first step to the last."""
    return 1.0
