"""Freezing: what learns, from when on and at which rate, and that the statistics of batch norm keep still."""

import copy

import pytest
import torch
from torch import nn

from course_utils.backbones import Classifier, load_backbone
from course_utils.data import batches
from course_utils.training import (
    CheckpointError,
    adamw,
    constant,
    fit,
    parameter_groups,
    sgd,
    stages,
    supervised,
    train_mode,
    unfreeze_top,
)
from tests.test_fit import toy_split

NETS = ("resnet_near", "vgg_near")


def small(net: str = "resnet_near", pretrained: bool = True) -> Classifier:
    torch.manual_seed(0)
    return Classifier(load_backbone(net, pretrained), 2)


def few_batches(model: Classifier, steps: int = 2):
    return batches(toy_split(side=32), model.transform, size=16, steps=steps)


def moved(model: Classifier, before: dict[str, torch.Tensor]) -> set[str]:
    """What has changed, by name, parameters and statistics."""
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def sizes(model: Classifier) -> list[int]:
    return [sum(parameter.numel() for parameter in part.parameters()) for part in stages(model.backbone)]


@pytest.mark.parametrize(
    ("net", "count"),
    [("resnet_near", 4), ("vgg_near", 4), ("resnet18", 5), ("resnet50", 5), ("vgg16_bn", 6), ("convnext_tiny", 4)],
)
def test_stages_end_where_maps_get_smaller_and_hold_every_parameter_once(net: str, count: int) -> None:
    backbone = load_backbone(net, pretrained=False)
    parts = stages(backbone)
    assert len(parts) == count
    held = [id(parameter) for part in parts for parameter in part.parameters()]
    assert held == [id(parameter) for parameter in backbone.parameters()], "in order, each once"


@pytest.mark.parametrize("net", NETS)
def test_what_is_frozen_does_not_move_and_neither_do_its_statistics(net: str) -> None:
    model = small(net)
    unfreeze_top(model, 1)
    before = copy.deepcopy(model.state_dict())
    fit(model, few_batches(model), optimizer=adamw(0.01, weight_decay=0.5), schedule=constant)
    *frozen, top = stages(model.backbone)
    learned = {id(value) for value in [*top.parameters(), *top.buffers(), *model.head.parameters()]}
    named = [*model.named_parameters(), *model.named_buffers()]
    assert moved(model, before) == {name for name, value in named if id(value) in learned}
    assert frozen


def test_the_plain_training_mode_lets_the_statistics_drift() -> None:
    """The mistake that `train_mode` is there for: nothing learns, and the backbone is another one afterwards."""
    model = small()
    unfreeze_top(model, 0)
    before = copy.deepcopy(model.state_dict())

    def mistaken(model, batch, progress):
        model.train()
        return supervised(model, batch, progress)

    fit(model, few_batches(model), step=mistaken, optimizer=sgd(0.01))
    assert any("running_mean" in name for name in moved(model, before))


def test_training_mode_reaches_whatever_is_not_frozen() -> None:
    model = nn.Sequential(
        nn.BatchNorm2d(3), nn.Sequential(nn.Conv2d(3, 3, 1), nn.Dropout()), nn.BatchNorm2d(3, affine=False)
    ).eval()
    model[1].requires_grad_(False)
    train_mode(model)
    assert model[0].training and model[2].training
    assert not model[1].training and not model[1][1].training


def test_unfreezing_counts_stages_from_the_top() -> None:
    model = small()
    for count in range(5):
        unfreeze_top(model, count)
        learning = [all(parameter.requires_grad for parameter in part.parameters()) for part in stages(model.backbone)]
        assert learning == [False] * (4 - count) + [True] * count
        assert all(parameter.requires_grad for parameter in model.head.parameters())
    for count in (-1, 5):
        with pytest.raises(ValueError, match=f"resnet_near has 4 stages: unfreeze 0 to 4 of them, not {count}"):
            unfreeze_top(model, count)


def test_a_parameter_that_belongs_to_no_stage_is_frozen_with_the_backbone() -> None:
    model = small()
    model.backbone.layers.token = nn.Parameter(torch.zeros(3))
    for count in range(5):
        unfreeze_top(model, count)
        assert model.backbone.layers.token.requires_grad == (count == 4)


def test_a_gradual_run_that_was_cut_off_goes_on_as_if_it_had_not_been(tmp_path) -> None:
    whole, cut, other = small(), small(), small()
    settings = {"epochs": 4, "optimizer": adamw(0.01), "unfreeze": lambda model, epoch: unfreeze_top(model, epoch)}

    class CutOff(Exception):
        pass

    def until(model, batch, progress):
        if progress >= 0.7:
            raise CutOff
        return supervised(model, batch, progress)

    fit(whole, few_batches(whole), **settings)
    with pytest.raises(CutOff):
        fit(cut, few_batches(cut), step=until, checkpoint=tmp_path / "run", **settings)
    cut = small()
    fit(cut, few_batches(cut), checkpoint=tmp_path / "run", **settings)
    assert moved(whole, cut.state_dict()) == set()
    with pytest.raises(CheckpointError, match="another choice of trained parameters"):
        fit(other, few_batches(other), checkpoint=tmp_path / "run", epochs=4, optimizer=adamw(0.01))


@pytest.mark.parametrize("net", NETS)
def test_rates_fall_by_a_factor_from_stage_to_stage(net: str) -> None:
    model = small(net)
    unfreeze_top(model, 0)
    groups = parameter_groups(model, 0.01, head_lr=0.5, factor=2.0)
    assert [group["lr"] for group in groups] == pytest.approx([0.00125, 0.0025, 0.005, 0.01, 0.5])
    assert [sum(parameter.numel() for parameter in group["params"]) for group in groups[:-1]] == sizes(model)
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert held == [id(parameter) for parameter in model.parameters()]
    assert [group["lr"] for group in parameter_groups(model, 0.01, factor=2.0)][-2:] == [0.01, 0.01]
    assert [group["lr"] for group in parameter_groups(model, 0.01)] == [0.01]
    assert [group["lr"] for group in adamw(0.01, 0.5, factor=2.0)(model).param_groups] == [group["lr"] for group in groups]


@pytest.mark.parametrize(
    "mistaken",
    [
        lambda model: parameter_groups(model, 0.01, factor=0.0),
        lambda model: adamw(-0.01)(model),
        lambda model: sgd(0.1, head_lr=-0.1)(model),
    ],
)
def test_rates_that_make_no_sense_are_refused(mistaken) -> None:
    with pytest.raises(ValueError, match="not lr="):
        mistaken(small())
