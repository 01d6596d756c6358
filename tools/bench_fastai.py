"""fastai's side of the bench: `Learner.fine_tune` and its `lr_find`, on the same network and the same batches."""

from collections.abc import Iterator
from itertools import count
from pathlib import Path

import torch
from fastai.callback import schedule  # noqa: F401, which gives Learner its fine_tune and lr_find
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from torch import nn

from course_utils.backbones import Classifier
from course_utils.data.batches import Batch, Batches
from course_utils.training import stages


class Loader:
    """Batches as fastai takes them: each pass is the next epoch."""

    def __init__(self, data: Batches, device: torch.device) -> None:
        self.data, self.device, self.epochs = data, device, count()

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator[Batch]:
        return self.data.epoch(next(self.epochs))


def groups(model: Classifier) -> list[list[nn.Parameter]]:
    """Three groups with rates of their own, as fastai cuts ResNet and VGG: the lower body, the upper body, the head."""
    parts = stages(model.backbone)
    middle = len(parts) // 2
    return [[p for part in cut for p in part.parameters()] for cut in (parts[:middle], parts[middle:], [model.head])]


def learner(model: Classifier, data: Batches, folder: Path) -> Learner:
    """A `Learner` with fastai's own optimizer and treatment of batch norm, and nothing to validate on."""
    loaders = DataLoaders(Loader(data, next(model.parameters()).device), [])
    return Learner(loaders, model, loss_func=nn.CrossEntropyLoss(), splitter=groups, path=folder)


def suggested_rate(model: Classifier, data: Batches, folder: Path) -> float:
    """What `lr_find` suggests for the head of a frozen body, as fastai's guides call it; the model stays what it was."""
    found = learner(model, data, folder)
    found.freeze()
    with found.no_bar(), found.no_logging():
        return float(found.lr_find(show_plot=False).valley)


def fine_tune(model: Classifier, data: Batches, folder: Path, epochs: int, rate: float) -> None:
    """fastai's own recipe: the head for an epoch, then everything for `epochs`, lower layers at smaller rates."""
    found = learner(model, data, folder)
    with found.no_bar(), found.no_logging():
        found.fine_tune(epochs, rate)
