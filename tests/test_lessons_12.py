"""What lesson 12 builds by hand is what torch and torchvision have, and its measures mean what they say."""

from copy import deepcopy
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms import v2

from course_utils.backbones import load_backbone
from course_utils.data import batches, few_shot
from course_utils.data.splits import Split
from course_utils.evaluate import predict
from course_utils.evidence import Claims, stored
from course_utils.paths import EVIDENCE, NOTEBOOKS
from tests.test_fit import toy_model, weights
from tests.test_lessons import cells
from tools.evidence import definitions, pack_hits

SOURCE = NOTEBOOKS / "source" / "12_losses_and_regularisation.py"


@pytest.fixture(scope="module")
def lesson() -> dict:
    """What its cells of evidence define."""
    return definitions(SOURCE)


def some(n: int = 12, classes: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return 3 * torch.randn(n, classes), torch.arange(n) % classes


@pytest.mark.parametrize("amount", [0.0, 0.1, 0.5])
def test_label_smoothing_by_hand_is_that_of_torch(lesson: dict, amount: float) -> None:
    logits, labels = some()
    targets = lesson["smoothed"](labels, 5, amount)
    assert torch.allclose(targets.sum(dim=1), torch.ones(len(labels)))
    ours = lesson["soft_cross_entropy"](logits, targets)
    assert torch.allclose(ours, F.cross_entropy(logits, labels, label_smoothing=amount))
    assert torch.allclose(lesson["soft_cross_entropy"](logits, targets), F.cross_entropy(logits, targets))


def test_mixup_by_hand_is_that_of_torchvision(lesson: dict) -> None:
    torch.manual_seed(0)
    pictures, labels = torch.rand(6, 3, 4, 4), torch.arange(6)
    torch.manual_seed(7)
    theirs, their_targets = v2.MixUp(alpha=0.4, num_classes=6)(pictures.clone(), labels)
    torch.manual_seed(7)
    share = float(torch.distributions.Beta(torch.tensor([0.4]), torch.tensor([0.4])).sample())
    assert 0.01 < share < 0.99, "a share that mixes something"
    ours, our_targets = lesson["mixup"](pictures, F.one_hot(labels, 6).float(), share)
    assert torch.allclose(ours, theirs, atol=1e-6) and torch.allclose(our_targets, their_targets, atol=1e-6)


@pytest.mark.parametrize("beta", [0.5, 1.0, 3.0])
def test_smooth_l1_by_hand_is_that_of_torch_and_so_are_its_slopes(lesson: dict, beta: float) -> None:
    error = torch.linspace(-6, 6, 241, requires_grad=True)
    ours, theirs = lesson["smooth_l1"](error, beta), F.smooth_l1_loss(error, torch.zeros_like(error), beta=beta)
    assert torch.allclose(ours, theirs)
    (one,), (two,) = torch.autograd.grad(ours, error), torch.autograd.grad(theirs, error)
    assert torch.allclose(one, two, atol=1e-6)


def test_the_losses_of_places_are_those_of_torch(lesson: dict) -> None:
    error = torch.linspace(-3, 3, 20)
    for name, theirs in (("MSE", F.mse_loss), ("L1", F.l1_loss), ("smooth L1", F.smooth_l1_loss)):
        assert torch.allclose(lesson["LOSSES"][name](error), theirs(error, torch.zeros_like(error)))


def test_focal_loss_is_cross_entropy_at_gamma_0_and_weighs_by_what_is_missing(lesson: dict) -> None:
    logits, labels = some()
    assert torch.allclose(lesson["focal_loss"](logits, labels, 0), F.cross_entropy(logits, labels))
    log_p = logits.log_softmax(dim=1)[range(len(labels)), labels]
    expected = -((1 - log_p.exp()) ** 2 * log_p).mean()
    assert torch.allclose(lesson["focal_loss"](logits, labels, 2.0), expected)
    for huge in (1e4, -1e4):
        extreme = torch.tensor([[huge, 0.0]], requires_grad=True)
        loss = lesson["focal_loss"](extreme, torch.tensor([0]), 2.0)
        loss.backward()
        assert torch.isfinite(loss) and torch.isfinite(extreme.grad).all()


def test_class_weights_make_up_for_the_share_of_a_class(lesson: dict) -> None:
    labels = torch.tensor([0] * 19 + [1])
    assert torch.allclose(lesson["class_weights"](labels, 2, 0), torch.ones(2))
    weights = lesson["class_weights"](labels, 2, 1)
    assert torch.isclose(19 * weights[0], weights[1]), "both classes count the same in all"
    assert torch.isclose(weights[labels].mean(), torch.tensor(1.0))
    half = lesson["class_weights"](labels, 2, 0.5)
    assert torch.isclose(half[1] / half[0], torch.tensor(19.0).sqrt())


def test_swapped_activations_leave_the_weights_and_no_relu(lesson: dict) -> None:
    for name in ("vgg_near", "resnet_near"):
        backbone = load_backbone(name).eval()
        pictures = backbone.transform(torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8))
        for kind, make in lesson["ACTIVATIONS"].items():
            swapped = deepcopy(backbone)
            lesson["swap"](swapped, make)
            assert all(torch.equal(a, b) for a, b in zip(backbone.parameters(), swapped.parameters(), strict=True))
            same = torch.equal(swapped(pictures), backbone(pictures))
            assert same == (kind == "ReLU")
            left = [type(part) for part in swapped.modules() if isinstance(part, nn.ReLU)]
            assert bool(left) == (kind == "ReLU")


def test_the_moving_average_by_hand_is_that_of_torch(lesson: dict) -> None:
    model = toy_model()
    ours, theirs = deepcopy(model), AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    theirs.update_parameters(model)  # its first update is a copy
    for _ in range(5):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        lesson["follow"](ours, model, 0.9)
        theirs.update_parameters(model)
    assert torch.allclose(weights(ours), weights(theirs.module), atol=1e-6)
    assert not torch.allclose(weights(ours), weights(model), atol=1e-3)


def test_a_step_that_follows_leaves_training_as_it_is(lesson: dict) -> None:
    few = few_shot(lesson["train"], 1, 0)
    lesson["RUN_STEPS"], steps = 3, lesson["RUN_STEPS"]
    try:
        alone = lesson["tuned"]("plain", few, 0, 1e-3)
        average = deepcopy(alone)
        followed = lesson["tuned"]("plain", few, 0, 1e-3, step=lesson["following"](average))
    finally:
        lesson["RUN_STEPS"] = steps
    assert torch.equal(weights(alone), weights(followed))
    assert not torch.equal(weights(average), weights(alone))


def test_a_soup_is_the_mean_of_its_networks_and_leaves_them(lesson: dict) -> None:
    models = [toy_model(seed) for seed in range(3)]
    before = [weights(model).clone() for model in models]
    theirs = AveragedModel(models[0])
    for model in models:
        theirs.update_parameters(model)
    mixed = lesson["soup"](models)
    assert torch.allclose(weights(mixed), torch.stack(before).mean(dim=0), atol=1e-6)
    assert torch.allclose(weights(mixed), weights(theirs.module), atol=1e-6)
    assert all(torch.equal(weights(model), was) for model, was in zip(models, before, strict=True))


def test_refreshed_measures_batch_norm_on_the_training_pictures_and_learns_nothing(lesson: dict) -> None:
    few = few_shot(lesson["train"], 3, 0)
    torch.manual_seed(0)
    model = lesson["Classifier"](load_backbone("vgg_far"), 10).to(lesson["device"])
    norm = next(part for part in model.modules() if isinstance(part, nn.BatchNorm2d))
    convolution = next(part for part in model.modules() if isinstance(part, nn.Conv2d))
    norm.running_mean.fill_(7.0)
    before = nn.utils.parameters_to_vector(model.parameters()).clone()
    lesson["refreshed"](model, few, 0)
    assert torch.equal(nn.utils.parameters_to_vector(model.parameters()), before)
    with torch.no_grad():
        data = batches(few, model.transform, size=32, seed=0, device=lesson["device"])
        maps = torch.cat([convolution(pictures) for pictures, _ in data.epoch(0)])
    assert torch.allclose(norm.running_mean, maps.mean(dim=(0, 2, 3)), atol=0.02)


def test_hidden_digits_lie_where_their_labels_say(lesson: dict) -> None:
    side, small = lesson["SIDE"], lesson["SMALL"]
    split = lesson["hidden_digits"]("valid", 5, seed=3)
    assert torch.equal(split.pictures, lesson["hidden_digits"]("valid", 5, seed=3).pictures)
    assert not torch.equal(split.labels, lesson["hidden_digits"]("valid", 5, seed=4).labels)
    middles = lesson["centres"](split.labels)
    assert middles.min() >= small / 2 and middles.max() <= side - small / 2
    for number, (picture, middle) in enumerate(zip(split.pictures, middles, strict=True)):
        rng = lesson["generator"]("hidden", "valid", lesson["digit_indices"]("valid")[number], 3)
        ground = torch.from_numpy(lesson["patch"]("train", rng, side, crop=(side, 2 * side)).copy()).permute(2, 0, 1)
        rows, columns = (picture != ground).any(dim=0).nonzero().T
        assert len(rows), "there is a digit"
        for found, centre in ((rows, middle[0]), (columns, middle[1])):
            assert found.min() >= centre - small / 2 and found.max() < centre + small / 2
            assert abs(found.float().mean() - centre) < 3, "its ink lies around the middle"


def test_misplaced_moves_the_share_and_nothing_else(lesson: dict) -> None:
    split = lesson["hidden_digits"]("valid", 50)
    was = split.labels.clone()
    moved = lesson["misplaced"](split, 0.2, 0)
    changed = (moved.labels != was).sum()
    assert 8 <= changed <= 10 and torch.equal(split.labels, was) and torch.equal(moved.pictures, split.pictures)
    assert torch.equal(lesson["misplaced"](split, 0.0, 0).labels, was)


def test_a_locator_sees_where_things_are_and_answers_in_pixels(lesson: dict) -> None:
    torch.manual_seed(0)
    for name in ("vgg_near", "resnet_near"):
        model = lesson["Locator"](name)
        assert not any(isinstance(part, nn.AdaptiveAvgPool2d) for part in model.modules())
        split = lesson["hidden_digits"]("valid", 4)
        assert predict(model, split).shape == (4, 2)
        with torch.no_grad():
            model.head.weight.zero_(), model.head.bias.zero_()
        assert (predict(model, split) == lesson["SIDE"] / 2).all(), "0 is the middle of the picture"
        expected = (lesson["SIDE"] / 2 - lesson["centres"](split.labels)).norm(dim=1)
        assert torch.allclose(lesson["miss"](model, split), expected)


def test_fours_are_rare_in_training_and_not_in_the_test(lesson: dict) -> None:
    few = lesson["rare_and_common"](lesson["train"], 3, 17, 0)
    assert few.labels.tolist() == [1] * 3 + [0] * 17
    known = {picture.numpy().tobytes(): int(label) for picture, label in zip(*parts(lesson["train"]), strict=True)}
    assert [known[picture.numpy().tobytes()] for picture in few.pictures] == [4] * 3 + [9] * 17
    assert lesson["balanced"].labels.tolist() == [1] * 100 + [0] * 100
    assert torch.bincount(lesson["balanced_valid"].labels).tolist() == [50, 50]


def parts(split: Split) -> tuple[torch.Tensor, torch.Tensor]:
    return split.pictures, split.labels


def test_the_calibration_error_of_what_is_sure_and_half_right_is_a_half(lesson: dict) -> None:
    sure = torch.tensor([[50.0, 0.0]] * 10)
    assert lesson["calibration_error"](sure, torch.tensor([0] * 10)) == pytest.approx(0.0, abs=1e-6)
    assert lesson["calibration_error"](sure, torch.tensor([0, 1] * 5)) == pytest.approx(0.5, abs=1e-6)
    even = torch.tensor([[0.0, 1e-4]] * 10)
    assert lesson["calibration_error"](even, torch.tensor([0, 1] * 5)) == pytest.approx(0.0, abs=1e-3)


def test_steps_are_what_their_names_say(lesson: dict) -> None:
    model = toy_model().eval()
    pictures, labels = torch.rand(8, 3, 8, 8), torch.arange(8) % model.head.out_features
    logits = model(pictures)
    (smooth,) = lesson["smoothing"](0.2)(model, (pictures, labels), 0.0).values()
    assert torch.allclose(smooth, F.cross_entropy(logits, labels, label_smoothing=0.2))
    (dropped,) = lesson["dropping"](0.0)(model, (pictures, labels), 0.0).values()
    assert torch.allclose(dropped, F.cross_entropy(logits, labels))
    torch.manual_seed(3)
    (mixed,) = lesson["mixing"](1.0)(model, (pictures, labels), 0.0).values()
    torch.manual_seed(3)
    share = float(torch.distributions.Beta(1.0, 1.0).sample())
    targets = F.one_hot(labels, model.head.out_features).float()
    both = share * pictures + (1 - share) * pictures.roll(1, 0)
    expected = F.cross_entropy(model(both), share * targets + (1 - share) * targets.roll(1, 0))
    assert torch.allclose(mixed, expected, atol=1e-6)


def test_gains_are_paired_by_seed_whatever_the_order_of_the_rows(lesson: dict) -> None:
    rng = np.random.default_rng(0)
    rows, found = [], {}
    for seed in (2, 0, 1):
        for part, arm in (("few", "plain"), ("few", "GELU"), ("mean", "soup")):
            found[arm, seed] = rng.random(1000) < 0.5
            rows.append({"seed": seed, "part": part, "arm": arm, "hits": pack_hits(found[arm, seed]), "value": 10 * seed})
        for arm, value in (("a", seed), ("b", 3 * seed)):
            rows.append({"seed": seed, "part": "place", "arm": arm, "hits": None, "value": value})
    table = pd.DataFrame(rows).sample(frac=1, random_state=0)
    hits, seeds = lesson["runs"](table, "few", "GELU")
    assert seeds == [0, 1, 2] and all(np.array_equal(one, found["GELU", seed]) for one, seed in zip(hits, seeds, strict=True))
    assert lesson["numbers"](table, "few", "plain").tolist() == [0, 10, 20]

    def mean(arm: str) -> float:
        return np.mean([found[arm, seed] for seed in range(3)])

    assert lesson["gain"](table, "GELU").value == pytest.approx(mean("GELU") - mean("plain"))
    assert lesson["over"](table, "soup", "plain").value == pytest.approx(mean("soup") - mean("plain"))
    assert lesson["pixels_more"](table, "b", "a").value == pytest.approx(2.0)


def test_what_catches_the_mistakes_catches_them_and_nothing_else(lesson: dict) -> None:
    catches = cells("12", "catches", torch=torch, nn=nn)
    catches["assert_takes_logits"](F.cross_entropy)
    catches["assert_takes_logits"](partial(lesson["focal_loss"], gamma=2.0), classes=3)
    with pytest.raises(AssertionError, match="does it get probabilities"):
        catches["assert_takes_logits"](lambda logits, labels: F.cross_entropy(logits.softmax(dim=1), labels))
    with pytest.raises(AssertionError, match="does it get probabilities"):
        catches["assert_takes_logits"](lambda logits, labels: F.cross_entropy(logits.sigmoid(), labels))
    catches["assert_mixes_both"](lesson["mixup"])
    for wrong in (
        lambda x, t, share: (share * x + (1 - share) * x.roll(1, 0), t),
        lambda x, t, share: (x, share * t + (1 - share) * t.roll(1, 0)),
        lambda x, t, share: (share * x + (1 - share) * x.roll(1, 0), (1 - share) * t + share * t.roll(1, 0)),
    ):
        with pytest.raises(AssertionError, match="not mixed alike"):
            catches["assert_mixes_both"](wrong)
    one, other = toy_model(), toy_model(seed=1)
    near = deepcopy(one)
    with torch.no_grad():
        for parameter in near.parameters():
            parameter.mul_(1.1)
    catches["assert_one_start"]([one, near])
    with pytest.raises(AssertionError, match="not from one start"):
        catches["assert_one_start"]([one, near, other])


def test_the_rows_of_a_seed_are_the_table_of_the_lesson(lesson: dict) -> None:
    table = stored("12_losses_and_regularisation")
    seeds = sorted(table["seed"].unique())
    assert seeds == list(range(len(seeds))) and len(seeds) >= 6
    for (part, arm), rows in table.groupby(["part", "arm"]):
        assert sorted(rows["seed"]) == seeds, f"{part}, {arm}"
    assert set(lesson["HINTS"]) <= set(table["arm"])


def test_the_stored_table_bears_out_every_claim_of_the_lesson(lesson: dict, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("COURSE_STRICT", "1")
    claims = Claims("12_losses_and_regularisation", tmp_path)
    lesson["stored_claims"](stored("12_losses_and_regularisation"), claims)
    assert len(claims.table()) >= 10


def test_the_lesson_takes_the_best_of_what_its_search_tried(lesson: dict) -> None:
    table = pd.read_csv(EVIDENCE / "12_recipes.csv").groupby(["arm", "choice"])["validation"].mean()
    assert set(lesson["RECIPES"]) == set(lesson["STRENGTHS"])
    for arm, knob in lesson["RECIPES"].items():
        tried = lesson["STRENGTHS"][arm]
        assert len(tried) == len(table[arm]) == len(lesson["STRENGTHS"]["plain"])
        assert table[arm, tried.index(knob)] == table[arm].max()
