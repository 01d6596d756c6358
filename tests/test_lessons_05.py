"""What lesson 05 builds by hand: the scores against slow and direct ways to the same numbers, the stages that are kept."""

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.optimize import minimize
from scipy.stats import multivariate_normal
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from course_utils.backbones import load_backbone
from course_utils.paths import EVIDENCE, NOTEBOOKS
from course_utils.training import stages
from tests.test_lessons import cells
from tools.evidence import definitions


def by_hand() -> dict:
    libraries = {"LogisticRegression": LogisticRegression, "StandardScaler": StandardScaler}
    libraries |= {"cross_val_score": cross_val_score, "make_pipeline": make_pipeline}
    return cells("05", "by-hand", np=np, stages=stages, **libraries)


def drawn(count: int, width: int, spread: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(count) % 3)
    corners = rng.normal(size=(3, width))
    return corners[labels] + spread * rng.normal(size=(count, width)) + 1, labels


def evidence(features: np.ndarray, y: np.ndarray, alpha: float, beta: float) -> float:
    """log p(y | features): y is Gaussian, since the weights and the noise are."""
    covariance = np.eye(len(y)) / beta + features @ features.T / alpha
    return multivariate_normal(np.zeros(len(y)), covariance).logpdf(y)


@pytest.mark.parametrize(("count", "width"), [(60, 5), (30, 30), (24, 40)])
def test_logme_by_hand_is_the_largest_log_evidence_a_picture(count: int, width: int) -> None:
    features, labels = drawn(count, width, spread=2.0)
    largest = []
    for number in range(3):
        y = (labels == number).astype(float)
        found = minimize(lambda logs, y=y: -evidence(features, y, *np.exp(logs)), x0=[1.0, 1.0], method="Nelder-Mead")
        largest.append(-found.fun / count)
    assert by_hand()["logme"](features, labels, rounds=500) == pytest.approx(np.mean(largest), abs=1e-4)


def test_logme_ranks_features_that_know_the_classes_above_features_that_do_not() -> None:
    logme = by_hand()["logme"]
    scores = [logme(*drawn(60, 8, spread)) for spread in (0.5, 2.0, 8.0)]
    assert scores == sorted(scores, reverse=True)
    features, labels = drawn(60, 8)
    assert logme(10 * features, labels) == pytest.approx(logme(features, labels), abs=1e-3)  # size alone says nothing


def test_the_neighbour_score_counts_the_neighbours_that_sklearn_finds() -> None:
    features, labels = drawn(40, 6)
    found = KNeighborsClassifier(5, metric="cosine").fit(features, labels).kneighbors(return_distance=False)
    share = (labels[found] == labels[:, None]).mean()
    assert by_hand()["neighbour_score"](features, labels) == pytest.approx(share)


@pytest.mark.parametrize("name", ["vgg_near", "resnet_near"])
def test_the_stages_that_are_kept_are_the_source_s_and_share_nothing_with_it(name: str) -> None:
    source = load_backbone(name)
    for count in range(5):
        drawn = load_backbone(name, pretrained=False)
        before = {key: value.clone() for key, value in drawn.state_dict().items()}
        mixed = by_hand()["keep_first"](count, source, drawn)
        for number, (mine, its) in enumerate(zip(stages(mixed), stages(source), strict=True)):
            for key, value in mine.state_dict().items():
                assert torch.equal(value, its.state_dict()[key]) == (number < count) or value.numel() == 1, key
        assert not {p.data_ptr() for p in mixed.parameters()} & {p.data_ptr() for p in source.parameters()}
        if count == 0:
            assert all(torch.equal(value, before[key]) for key, value in mixed.state_dict().items())


def test_every_start_gets_the_best_rate_of_its_search() -> None:
    table = pd.read_csv(EVIDENCE / "05_recipes.csv")
    table["start"] = table["arm"].str.split().str[1]
    means = table.groupby(["start", "lr"])["validation"].mean()
    recipes = definitions(NOTEBOOKS / "source/05_what_to_transfer.py")["RECIPES"]
    assert set(recipes) == set(table["start"])
    for start, rate in recipes.items():
        assert means[start, rate] == means[start].max(), start
