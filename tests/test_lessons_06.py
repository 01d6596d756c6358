"""Lesson 06: what it builds by hand, what it refuses, what its search found, and that it goes on without Optuna."""

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.base import clone
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from course_utils.data import stratified_folds
from course_utils.paths import EVIDENCE, NOTEBOOKS
from course_utils.training import constant, fit
from tests.test_fit import toy_batches, toy_model, weights
from tests.test_lessons import cells
from tools.evidence import definitions

SOURCE = NOTEBOOKS / "source/06_validation_and_search.py"


def probe() -> object:
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))


def toy_features(pictures: int = 60, classes: int = 3, width: int = 5) -> tuple[np.ndarray, np.ndarray]:
    """Features of classes that overlap, and labels."""
    rng, labels = np.random.default_rng(0), np.arange(pictures) % classes
    return (rng.normal(size=(pictures, width)) + 0.7 * labels[:, None]) * rng.uniform(0.1, 10, width), labels


def test_cross_validation_by_hand_scores_as_scikit_learn_does() -> None:
    cross_validate = cells("06", "by-hand", np=np, clone=clone)["cross_validate"]
    features, labels = toy_features()
    folds = [fold.numpy() for fold in stratified_folds(torch.from_numpy(labels), 5, seed=1)]
    cuts = [(np.setdiff1d(np.arange(len(labels)), held_out), held_out) for held_out in folds]
    expected = cross_val_score(probe(), features, labels, cv=cuts)
    assert np.allclose(cross_validate(probe(), features, labels, folds), expected)
    assert 0.4 < expected.mean() < 1, "a task on which every mistake scores alike would prove nothing"


def test_the_lessons_own_solution_cross_validates_and_deals_folds_too() -> None:
    names = cells("06", "exercise-06.1", torch=torch) | cells("06", "exercise-06.2", torch=torch)
    features, labels = map(torch.from_numpy, toy_features())
    folds = names["my_folds"](labels, 5, 3)
    cuts = [(np.setdiff1d(np.arange(len(labels)), held_out.numpy()), held_out.numpy()) for held_out in folds]

    def fit_predict(train_features, train_labels, new_features):
        return torch.from_numpy(probe().fit(train_features, train_labels).predict(new_features))

    found = names["my_cross_validate"](features, labels, folds, fit_predict)
    assert found == pytest.approx(cross_val_score(probe(), features.numpy(), labels.numpy(), cv=cuts).mean())


@pytest.mark.parametrize("scores", [[0.1, 0.5, 0.4, 0.5, 0.3, 0.9], [0.3, 0.2, 0.4, 0.3, 0.2], [0.1, 0.2, 0.3]])
def test_fit_stops_by_the_rule_of_the_exercise(scores: list[float]) -> None:
    kept, trained = cells("06", "exercise-06.4")["my_stop"](scores, 2)
    model, seen = toy_model(), []

    def validate(model) -> float:
        seen.append(weights(model).clone())
        return scores[len(seen) - 1]

    fit(model, toy_batches(), epochs=len(scores), schedule=constant, validate=validate, patience=2)
    assert len(seen) == trained
    assert torch.equal(weights(model), seen[kept - 1])


def test_a_test_set_is_opened_once() -> None:
    once = cells("06", "once")["Once"](lambda C: 10 * C)
    assert once(C=2) == 20
    with pytest.raises(RuntimeError, match="was opened before"):
        once(C=3)


def test_without_optuna_the_lesson_says_how_to_get_it_and_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "optuna", None)  # as if it were not installed
    places = {"PROFILE": "embedded", "DEVICE": "cpu", "OUT": str(tmp_path)}
    names = cells("06", "setup", **places)
    assert names["optuna"] is None

    def no_search(*arguments: object) -> list:
        raise AssertionError("this search needs Optuna")

    names |= {"NET": "resnet", "SEED": 0, "LABELS": 2, "BUDGET": 1, "read": lambda net, split: [0]}
    names["problem"] = lambda *arguments: (lambda **setting: 0.5, lambda **setting: 0.4)
    names["SEARCHES"] = {"random": lambda score, *rest: [({"stage": 0, "C": 1.0}, score(C=1.0))], "Optuna": no_search}
    cells("06", "once", **names)
    names |= {"Once": cells("06", "once")["Once"]}
    cells("06", "searches", **names)
    printed = capsys.readouterr().out
    assert "pip install optuna" in printed and "best score of 1 tries: 0.500" in printed and "0.400" in printed


def test_every_remedy_takes_the_strength_that_its_search_found() -> None:
    names, table = definitions(SOURCE), pd.read_csv(EVIDENCE / "06_recipes.csv")
    for net, chosen in names["RECIPES"].items():
        for arm, strengths in names["STRENGTHS"].items():
            scores = table[(table["net"] == net) & (table["arm"] == arm)].sort_values("strength")["validation"].to_numpy()
            assert scores[strengths.index(chosen[arm])] == scores.max(), (net, arm)
        assert chosen["more"] == chosen["plain"]


@pytest.mark.parametrize("net", ["vgg", "resnet"])
def test_a_narrow_network_is_the_small_one_with_fewer_channels(net: str) -> None:
    names = definitions(SOURCE)
    whole, backbone = names["narrow"](net, 1.0), names["load_backbone"](f"{net}_near", False)
    sizes = [[tuple(p.shape) for p in network.parameters()] for network in (whole, backbone)]
    assert sizes[0] == sizes[1]
    half = names["narrow"](net, 0.5)
    assert half.width == 64 and half(torch.zeros(2, 3, 32, 32)).shape == (2, 64)
    count = [sum(p.numel() for p in network.parameters()) for network in (half, whole)]
    assert count[0] < 0.3 * count[1]
