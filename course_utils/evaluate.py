"""What a model is worth: predictions, accuracy, and which pictures it got right."""

import torch
from torch import Tensor

from course_utils.backbones import Backbone, Classifier
from course_utils.data.batches import transformed_loader
from course_utils.data.splits import PictureSet, Split

CHUNK = 128  # pictures at a time: the fastest of 8 to 256 on two cores, and few enough for a small machine


@torch.no_grad()  # not inference_mode: heads learn from what comes out
def predict(model: Classifier | Backbone, split: PictureSet) -> Tensor:
    """Logits `(n, classes)` of every picture in order, or a backbone's features `(n, width)`, on the CPU.

    The model is left in evaluation mode.
    """
    model.eval()
    device = next(model.parameters()).device
    if isinstance(split, Split):
        chunks = (model.transform(pictures.to(device)) for pictures in split.pictures.split(CHUNK))
    else:
        chunks = (pictures.to(device) for pictures, _ in transformed_loader(split, model.transform, size=32))
    return torch.cat([model(chunk.contiguous(memory_format=torch.channels_last)).float().cpu() for chunk in chunks])


def hits(model: Classifier, split: PictureSet) -> Tensor:
    """Which pictures the model classifies correctly: bool `(n,)`.

    Raises `ValueError` where the model has another number of classes than the split.
    """
    if model.head.out_features != len(split.classes):
        raise ValueError(f"the model has {model.head.out_features} classes and the pictures have {len(split.classes)}")
    return predict(model, split).argmax(dim=1) == split.labels.cpu()


def accuracy(model: Classifier, split: PictureSet) -> float:
    """The share of pictures classified correctly, in [0, 1]. Raises what `hits` raises."""
    return hits(model, split).float().mean().item()
