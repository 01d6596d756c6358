"""Optimizers as recipes, and schedules as pure functions of progress.

A schedule gives a factor between 0 and 1. `fit` multiplies each group's own rate by it, so that a body with a small
rate and a head with a large one keep their proportion.
"""

import math
from collections.abc import Callable
from typing import Any

import torch

from course_utils.backbones import Classifier
from course_utils.training.freezing import stages

OptimizerRecipe = Callable[[Any], torch.optim.Optimizer]
Schedule = Callable[[float], float]


def parameter_groups(model: Classifier, lr: float, head_lr: float | None = None, factor: float = 1.0) -> list[dict]:
    """Every parameter in a group with its rate: the head, and the stages of the backbone from input to output.

    The last stage has the rate `lr`, each one below it a `factor` less (discriminative rates: Howard and Ruder 2018 take
    2.6); the head has `head_lr`, or else `lr`. What is frozen has its place too, so that it can be unfrozen later: an
    optimizer passes over parameters without a gradient. Raises `ValueError` for a rate below 0 or a factor that is not above.
    """
    if min(lr, head_lr or 0.0) < 0 or factor <= 0:
        raise ValueError(f"rates are 0 or more and the factor above 0, not lr={lr}, head_lr={head_lr}, factor={factor}")
    if head_lr is None and factor == 1:
        return [{"params": list(model.parameters()), "lr": lr}]
    parts = stages(model.backbone) if factor != 1 else [model.backbone]
    rates = [lr / factor**depth for depth in reversed(range(len(parts)))]
    groups = [{"params": list(part.parameters()), "lr": rate} for part, rate in zip(parts, rates, strict=True)]
    rest = [parameter for name, parameter in model.named_parameters() if not name.startswith("backbone.")]
    return [*groups, {"params": rest, "lr": lr if head_lr is None else head_lr}]


def adamw(lr: float = 2e-3, head_lr: float | None = None, weight_decay: float = 0.01, factor: float = 1.0) -> OptimizerRecipe:
    """AdamW (Loshchilov and Hutter 2019). `head_lr` and `factor`: see `parameter_groups`."""
    return lambda model: torch.optim.AdamW(parameter_groups(model, lr, head_lr, factor), weight_decay=weight_decay)


def sgd(lr: float = 0.1, head_lr: float | None = None, momentum: float = 0.9, weight_decay: float = 5e-4) -> OptimizerRecipe:
    """Stochastic gradient descent with Nesterov momentum. `head_lr`: see `parameter_groups`."""
    settings: dict[str, Any] = {"momentum": momentum, "weight_decay": weight_decay, "nesterov": True}
    return lambda model: torch.optim.SGD(parameter_groups(model, lr, head_lr), **settings)


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
