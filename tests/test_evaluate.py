"""What a model is worth: predictions in order, hits, accuracy."""

from functools import partial

import pytest
import torch
from sklearn.metrics import accuracy_score
from torch import nn

from course_utils.backbones import Backbone, Classifier, centred
from course_utils.data import Split, batches
from course_utils.evaluate import CHUNK, accuracy, hits, predict
from course_utils.training import fit
from tests.test_fit import PictureList, toy_model


def bright_model(classes: int = 3, device: str = "cpu") -> Classifier:
    """A model that reads the class off the brightness: 0, 1, 2 for dark, grey, bright."""
    model = Classifier(Backbone("mean", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), 3, centred), classes)
    with torch.no_grad():
        model.head.weight.copy_(torch.tensor([-1.0, 0.0, 1.0][:classes])[:, None].expand(classes, 3))
        model.head.bias.copy_(torch.tensor([0.0, 1.5, 0.0][:classes]))
    return model.to(device)


def graded_split(count: int = CHUNK + 30) -> Split:
    labels = torch.randint(3, (count,), generator=torch.Generator().manual_seed(0))
    pictures = (labels * 120).view(-1, 1, 1, 1).expand(-1, 3, 4, 4).to(torch.uint8)
    return Split(pictures, labels, ("dark", "grey", "bright"))


def test_predictions_come_in_order_and_for_every_picture(device):
    split = graded_split()
    model = bright_model(device=device)
    model.train()
    logits = predict(model, split)
    assert logits.shape == (len(split), 3) and logits.device.type == "cpu" and not logits.requires_grad
    assert torch.equal(logits.argmax(dim=1), split.labels)
    assert not model.training


def test_pictures_read_one_by_one_give_the_same_predictions():
    split = graded_split(70)
    assert torch.allclose(predict(bright_model(), split), predict(bright_model(), PictureList(split)), atol=1e-6)


def test_hits_and_accuracy_count_the_right_ones():
    split = graded_split(100)
    labels = split.labels.clone()
    labels[:25] = (labels[:25] + 1) % 3
    spoilt = Split(split.pictures, labels, split.classes)
    assert hits(bright_model(), spoilt).tolist() == [False] * 25 + [True] * 75
    assert accuracy(bright_model(), spoilt) == pytest.approx(0.75)
    assert partial(accuracy, split=spoilt)(bright_model()) == accuracy(bright_model(), spoilt)  # as lessons hand it to `fit`
    assert accuracy(bright_model(), spoilt) == pytest.approx(accuracy_score(labels, predict(bright_model(), spoilt).argmax(1)))


def test_a_number_of_classes_that_does_not_fit_is_said():
    split = graded_split(10)
    with pytest.raises(ValueError, match="the model has 2 classes and the pictures have 3"):
        accuracy(toy_model(classes=2), split)
    with pytest.raises(ValueError, match="the head has 2 classes, but a label is 2"):
        fit(toy_model(classes=2), batches(split, centred))
