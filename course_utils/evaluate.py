"""What a model is worth: predictions, accuracy, and which pictures it got right."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchmetrics.functional.classification import multiclass_accuracy

from course_utils.backbones import Classifier
from course_utils.data.splits import PictureSet, Split

CHUNK = 256  # pictures at a time: enough to be fast, few enough for a small machine


@torch.inference_mode()
def predict(model: Classifier, split: PictureSet) -> Tensor:
    """Logits `(n, classes)` of every picture in order, on the CPU. The model is left in evaluation mode."""
    model.eval()
    device = next(model.parameters()).device
    if isinstance(split, Split):
        chunks = (model.transform(pictures.to(device)) for pictures in split.pictures.split(CHUNK))
    else:
        one_by_one = DataLoader(split, batch_size=None)  # type: ignore[arg-type]
        chunks = (model.transform(picture.to(device))[None] for picture, _ in one_by_one)
    return torch.cat([model(chunk.contiguous(memory_format=torch.channels_last)).float().cpu() for chunk in chunks])


def hits(model: Classifier, split: PictureSet) -> Tensor:
    """Which pictures the model classifies correctly: bool `(n,)`."""
    return predict(model, split).argmax(dim=1) == split.labels.cpu()


def accuracy(model: Classifier, split: PictureSet) -> float:
    """The share of pictures classified correctly, in [0, 1]."""
    logits = predict(model, split)
    return multiclass_accuracy(logits, split.labels.cpu(), num_classes=logits.shape[1], average="micro").item()


def accuracy_on(split: PictureSet) -> Callable[[Classifier], float]:
    """A validation score for `fit`: the accuracy on `split`."""
    return lambda model: accuracy(model, split)
