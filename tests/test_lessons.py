"""What lessons build by hand does what the package does: the lessons' own cells are executed, not copies of them."""

import jupytext
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F

from course_utils.data import augmentation
from course_utils.evidence import estimate, unpack_hits
from course_utils.paths import NOTEBOOKS
from course_utils.plots import COLOURS, START_COLOURS
from course_utils.training import adamw, constant, fit, one_cycle, unfreeze_top
from tests.test_fit import toy_batches, toy_model, weights
from tools.evidence import pack_hits


def cells(lesson: str, tag: str, **names) -> dict:
    """What the cells of a lesson with that tag define."""
    (source,) = (NOTEBOOKS / "source").glob(f"{lesson}_*.py")
    found = [cell.source for cell in jupytext.read(source, fmt="py:percent").cells if tag in cell.metadata.get("tags", [])]
    assert found, f"lesson {lesson} has no cell tagged {tag}"
    for cell in found:
        exec(cell, names)
    return names


def test_the_loop_by_hand_of_lesson_02_ends_with_the_weights_of_fit() -> None:
    train_by_hand = cells("02", "by-hand", torch=torch, F=F, one_cycle=one_cycle)["train_by_hand"]
    ours, by_hand = toy_model(), toy_model()
    fit(ours, toy_batches(augment=augmentation()), epochs=3, optimizer=adamw(lr=0.01))
    train_by_hand(by_hand, toy_batches(augment=augmentation()), epochs=3, lr=0.01)
    assert torch.equal(weights(ours), weights(by_hand))
    assert not torch.equal(weights(ours), weights(toy_model()))
    assert not by_hand.training


def test_the_loop_by_hand_has_twenty_lines() -> None:
    (source,) = (NOTEBOOKS / "source").glob("02_*.py")
    (cell,) = [c for c in jupytext.read(source, fmt="py:percent").cells if "by-hand" in c.metadata.get("tags", [])]
    assert len(cell.source.strip().splitlines()) <= 20


def test_the_probe_by_hand_of_lesson_03_ends_with_the_head_of_fit() -> None:
    names = cells("03", "by-hand", torch=torch, F=F)
    ours, by_hand = toy_model(), toy_model()
    data = toy_batches()
    fit(ours, data, epochs=3, optimizer=adamw(lr=0.01), schedule=constant, unfreeze=lambda model, epoch: unfreeze_top(model, 0))
    backbone = names["freeze"](by_hand.backbone)
    names["train_head"](by_hand.head, lambda epoch: ((backbone(x), y) for x, y in data.epoch(epoch)), epochs=3, lr=0.01)
    assert torch.allclose(weights(ours), weights(by_hand), atol=1e-5)
    assert not torch.allclose(weights(ours), weights(toy_model()), atol=1e-3)


def test_the_curves_of_lesson_00_are_the_means_of_the_seeds() -> None:
    rng = np.random.default_rng(0)
    rows = [
        {"net": net, "start": start, "labels": labels, "seed": seed, "hits": pack_hits(rng.random(1000) < 0.3 + 0.005 * labels)}
        for net in ("vgg", "resnet")
        for start in ("scratch", "far", "near")
        for labels in (100, 20, 5)
        for seed in (0, 1)
    ]
    table = pd.DataFrame(rows)
    names = {"plt": plt, "START_COLOURS": START_COLOURS, "estimate": estimate, "unpack_hits": unpack_hits}
    names |= {"NETS": ("vgg", "resnet"), "STARTS": ("scratch", "far", "near"), "SIZES": (5, 20, 100)}
    figure = cells("00", "curves", **names)["accuracy_by_labels"](table)
    assert [axis.get_title() for axis in figure.axes] == ["vgg", "resnet"]
    line = figure.axes[1].lines[1]
    assert line.get_label() == "far" and line.get_xdata().tolist() == [5, 20, 100]
    part = table[(table.net == "resnet") & (table.start == "far") & (table.labels == 5)]
    mean = np.mean([unpack_hits(text, 1000).mean() for text in part.hits])
    assert line.get_ydata()[0] == pytest.approx(mean)
    assert figure.axes[0].get_xlabel() and figure.axes[0].get_ylabel()


def test_the_bars_of_lesson_00_have_the_length_of_the_probabilities():
    bars = cells("00", "bars", plt=plt, COLOURS=COLOURS)["bars"]
    figure = bars(torch.zeros(3, 8, 8, dtype=torch.uint8), {"a": 0.7, "b": 0.3})
    assert [bar.get_width() for bar in figure.axes[1].patches] == [0.7, 0.3]
