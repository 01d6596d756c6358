"""Lesson 04: what it builds by hand does what the package does, and it takes the rates that its search found."""

import copy

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from course_utils.paths import EVIDENCE, ROOT
from course_utils.training import adamw, constant, fit, one_cycle, stages, unfreeze_top
from tests.test_fit import weights
from tests.test_freezing import few_batches, moved, small
from tests.test_lessons import cells
from tools.evidence import definitions

SOURCE = ROOT / "notebooks/source/04_fine_tuning.py"
UNFREEZING = cells("04", "unfreezing", unfreeze_top=unfreeze_top, stages=stages)
gradually, head_first = UNFREEZING["gradually"], UNFREEZING["head_first"]


@pytest.fixture(scope="module")
def by_hand() -> dict:
    libraries = {"StandardScaler": StandardScaler, "LogisticRegression": LogisticRegression, "np": np}
    return cells("04", "by-hand", torch=torch, F=F, one_cycle=one_cycle, **libraries)


@pytest.mark.parametrize(
    ("unfreeze", "learning"),
    [(gradually(), lambda epoch: 1 + epoch), (head_first(2), lambda epoch: 1 if epoch < 2 else 5), (None, lambda epoch: 5)],
)
@pytest.mark.parametrize("net", ["resnet_near", "vgg_near"])
def test_fine_tuning_by_hand_ends_with_the_weights_of_fit(by_hand, net, unfreeze, learning) -> None:
    ours, other = small(net), small(net)
    data = few_batches(ours)
    fit(ours, data, epochs=5, optimizer=adamw(1e-3, head_lr=1e-2, factor=2.6), unfreeze=unfreeze)
    parts = [*stages(other.backbone), other.head]
    rates = [1e-3 / 2.6**below for below in (3, 2, 1, 0)] + [1e-2]
    by_hand["fine_tune_by_hand"](other, parts, rates, learning, data, epochs=5)
    assert torch.equal(weights(ours), weights(other))
    assert not torch.equal(weights(ours), weights(small(net)))
    assert not any(part.training for part in other.modules())


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [(gradually(), [0, 1, 2, 3, 4, 4]), (gradually(2), [0, 0, 1, 1, 2, 2]), (head_first(2), [0, 0, 4, 4, 4, 4])],
)
def test_a_schedule_unfreezes_from_epoch_to_epoch_and_the_optimizer_follows(schedule, expected: list[int]) -> None:
    model, learned = small(), []
    before = copy.deepcopy(model.state_dict())

    def watch(model) -> float:
        named = {id(parameter): name for name, parameter in model.named_parameters()}
        parts = [{named[id(parameter)] for parameter in part.parameters()} for part in stages(model.backbone)]
        now = moved(model, before)
        learned.append(sum(part <= now for part in parts))
        assert all(part <= now or not part & now for part in parts), "a stage moves as a whole"
        before.update(copy.deepcopy(model.state_dict()))
        return 0.0

    fit(model, few_batches(model), epochs=6, optimizer=adamw(0.01), schedule=constant, unfreeze=schedule, validate=watch)
    assert learned == expected


@pytest.mark.parametrize("classes", [2, 3, 10])
def test_a_copied_head_gives_the_answers_of_the_probe(by_hand, classes: int) -> None:
    rng = np.random.default_rng(0)
    labels = torch.arange(60) % classes
    scale = 10.0 ** rng.uniform(-1, 1, 8)
    features = torch.tensor((rng.normal(size=(60, 8)) + rng.normal(size=(classes, 8))[labels]) * scale + 1, dtype=torch.float32)
    head = nn.Linear(8, classes)
    by_hand["copy_probe"](head, features, labels, C=0.5)
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.5, max_iter=1000)).fit(features, labels)
    with torch.no_grad():
        given = head(features).softmax(dim=1).numpy()
    assert np.allclose(given, probe.predict_proba(features), atol=1e-4)


def test_each_recipe_takes_the_rate_that_is_best_on_validation_pictures_and_changes_what_helps() -> None:
    names, table = definitions(SOURCE), pd.read_csv(EVIDENCE / "04_recipes.csv")
    means = table.groupby(["net", "recipe", "lr"])["validation"].mean()
    for net, rates in names["RECIPES"].items():
        assert rates.keys() == names["UNFREEZE"].keys()
        for recipe, rate in rates.items():
            assert means[net, recipe, rate] == means[net, recipe].max(), (net, recipe)
        assert means[net, "all at once"].max() >= means[net, "all at once, turned and cropped"].max()


def test_what_catches_the_mistakes_catches_them_and_nothing_else() -> None:
    names = cells("04", "catches", torch=torch)
    model = small()
    before = copy.deepcopy(model.state_dict())
    for unfreeze in (head_first(1), gradually(), None):
        fit(model, few_batches(model), unfreeze=unfreeze)
        if unfreeze:
            names["assert_frozen_is_still"](model, before)
    model.requires_grad_(False)
    with pytest.raises(AssertionError, match="is frozen, but"):
        names["assert_frozen_is_still"](model, before)
    model.head.requires_grad_(True)
    optimizer = torch.optim.SGD(model.head.parameters(), 0.1)
    names["assert_optimizer_has_all"](model, optimizer)
    model.backbone.requires_grad_(True)
    with pytest.raises(AssertionError, match="are in no group, such as backbone"):
        names["assert_optimizer_has_all"](model, optimizer)
    names["assert_optimizer_has_all"](model, adamw(0.1, factor=2.0)(model))
