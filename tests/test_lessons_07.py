"""What lesson 07 builds by hand does what the package does, and its measures mean what they say."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from course_utils.fusion import Fusion
from course_utils.paths import NOTEBOOKS
from tests.test_fit import weights
from tests.test_fusion import toy_backbone
from tests.test_lessons import cells
from tools.evidence import definitions


def learned(model: nn.Module) -> torch.Tensor:
    """All parameters in one row; what a batch norm keeps is none."""
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("how", ["concat", "gated", "attention"])
def test_a_fusion_by_hand_ends_with_the_weights_of_the_package(how: str) -> None:
    by_hand = cells("07", "by-hand", torch=torch, nn=nn)
    tables, labels = [3 * torch.rand(40, 6) + 5, 100 * torch.randn(40, 9)], torch.arange(40) % 4
    torch.manual_seed(0)
    layers = by_hand["new_layers"]([6, 9], 4, how)
    torch.manual_seed(0)
    package = Fusion([6, 9], 4, how, dropout=0.0).train()
    assert torch.equal(learned(layers), learned(package))
    first = learned(package)
    sources = [by_hand["standardise"](table, table) for table in tables]
    for model, logits_of in (
        (layers, lambda: by_hand["fuse"](layers, how, sources)),
        (package, lambda: package(torch.cat(tables, dim=1))),
    ):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(20):
            optimizer.zero_grad()
            F.cross_entropy(logits_of(), labels).backward()
            optimizer.step()
    assert torch.allclose(learned(layers), learned(package), atol=1e-4)
    assert not torch.allclose(learned(layers), first, atol=1e-2)


@pytest.fixture(scope="module")
def lesson() -> dict:
    """What its cells of evidence define."""
    return definitions(NOTEBOOKS / "source" / "07_feature_level_fusion.py")


def test_errors_removed_is_a_share_of_the_others_errors(lesson: dict) -> None:
    rng = np.random.default_rng(0)
    single = [rng.random(400) < 0.8 for _ in range(6)]
    fused = [hits | (rng.random(400) < 0.25) for hits in single]
    found = lesson["errors_removed"](fused, single, list(range(6)))
    wrong, left = (~np.stack(single)).sum(), (~np.stack(fused)).sum()
    assert found.value == pytest.approx(1 - left / wrong)
    assert found.low < found.value < found.high and found.n == 6
    same = lesson["errors_removed"](single, single, list(range(6)))
    assert (same.value, same.low, same.high) == (0, 0, 0)


def test_a_wide_head_on_one_source_has_the_parameters_of_a_fusion_of_two(lesson: dict) -> None:
    sizes = [
        sum(parameter.numel() for parameter in lesson["new_head"](way, widths).parameters())
        for way, widths in (("wide", [128]), ("concat", [128, 128]))
    ]
    assert sizes[0] == sizes[1]


def test_opinions_out_of_fold_never_come_from_a_member_that_saw_the_picture(lesson: dict) -> None:
    """By heart, everything is right in fold; out of fold, features that say nothing are worth nothing."""
    torch.manual_seed(0)
    table, labels = torch.randn(60, 200), torch.arange(60) % 3
    folds = [torch.arange(60)[start::5] for start in range(5)]
    heard = lesson["out_of_fold"](100.0, [table], labels, folds)
    member = lesson["probe"](100.0).fit(table, labels)
    assert member.score(table, labels) == 1
    assert (heard.argmax(axis=1) == labels.numpy()).mean() < 0.6


def test_the_students_loss_uses_labels_only_where_there_are_some(lesson: dict) -> None:
    torch.manual_seed(0)
    teacher, labels = torch.randn(6, 3), torch.tensor([2, -1, -1, 0, -1, -1])
    step, model = lesson["distillation"](teacher, labels, 2.0, 0.75), nn.Linear(4, 3)
    pictures = torch.randn(4, 4)
    logits = model(pictures)
    places = torch.tensor([0, 1, 3, 5])
    losses = step(model, (pictures, places), 0.0)
    p, q = (teacher[places] / 2).softmax(dim=1), (logits / 2).softmax(dim=1)
    assert torch.allclose(losses["teacher"], 0.75 * 4 * (p * (p / q).log()).sum(dim=1).mean(), atol=1e-5)
    assert torch.allclose(losses["labels"], 0.25 * F.cross_entropy(logits[[0, 2]], torch.tensor([2, 0])), atol=1e-5)
    assert set(step(model, (pictures[:2], torch.tensor([1, 4])), 0.0)) == {"teacher"}


def test_two_networks_are_joined_by_an_adapter_whose_shapes_are_checked(lesson: dict) -> None:
    TransferModel = lesson["TransferModel"]
    source, target = toy_backbone("source", 5), nn.Linear(4, 3)
    with pytest.raises(ValueError, match=r"the target cannot take \(2, 5\).*2x5 and 4x3"):
        TransferModel(source, target)
    model = TransferModel(source, target, nn.Linear(5, 4))
    assert model.head.out_features == 3 and model.transform is source.transform and not model.training
    maps = TransferModel(nn.Conv2d(1, 6, 3), nn.Conv2d(8, 2, 3), nn.Conv2d(6, 8, 1), example=torch.zeros(2, 1, 9, 9))
    assert maps(torch.zeros(5, 1, 9, 9)).shape == (5, 2, 5, 5)
    with pytest.raises(ValueError, match=r"the source cannot take \(2, 3, 9, 9\)"):
        TransferModel(nn.Conv2d(1, 6, 3), nn.Conv2d(6, 2, 3), example=torch.zeros(2, 3, 9, 9))
    with torch.no_grad():
        source.layers[0].bias.fill_(float("nan"))
    with pytest.raises(ValueError, match="the source gives numbers that are not finite"):
        TransferModel(source, nn.Linear(5, 3))


def test_joining_networks_moves_no_random_number_and_no_statistic(lesson: dict) -> None:
    source, target = toy_backbone("source", 5), Fusion([5], 3)
    state, before = torch.get_rng_state(), weights(target)
    lesson["TransferModel"](source, target)
    assert torch.equal(torch.get_rng_state(), state) and torch.equal(weights(target), before)
    assert int(target.norms[0].num_batches_tracked) == 0
