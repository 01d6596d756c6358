"""What lesson 10 builds by hand attacks as it says, and its measures mean what they say."""

from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from course_utils.backbones import Classifier, load_backbone
from course_utils.data import batches
from course_utils.data.splits import Split
from course_utils.evaluate import hits
from course_utils.evidence import Claims, stored
from course_utils.paths import EVIDENCE, NOTEBOOKS
from course_utils.training import adamw, fit
from tests.test_lessons import cells
from tools.evidence import definitions, pack_hits

SOURCE = NOTEBOOKS / "source" / "10_adversarial_robustness.py"


@pytest.fixture(scope="module")
def lesson() -> dict:
    """What its cells of evidence define."""
    return definitions(SOURCE)


class Flat(nn.Module):
    """Two classes told apart by one sum of pixels: what an attack can do is known without running it."""

    def __init__(self, bias: float = 0.0, seed: int = 1) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.weight = nn.Parameter(torch.randn(3, 4, 4))
        self.bias = bias

    def forward(self, pixels):
        score = (pixels * self.weight).sum(dim=(1, 2, 3)) - self.bias
        return torch.stack([-score, score], dim=1)


def some(n: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    """Pixels, many of them at the ends of [0, 1], and two classes."""
    torch.manual_seed(0)
    return (1.6 * torch.rand(n, 3, 4, 4) - 0.3).clamp(0, 1), torch.arange(n) % 2


@pytest.mark.parametrize("epsilon", [0.02, 0.1, 0.5])
def test_no_attack_leaves_the_ball_or_the_range(lesson: dict, epsilon: float) -> None:
    pixels, labels = some()
    model = Flat()
    for moved in (
        lesson["fgsm"](model, pixels, labels, epsilon),
        lesson["pgd"](model, pixels, labels, epsilon, 0, 0.0),
        lesson["pgd"](model, pixels, labels, epsilon, 15, epsilon),  # steps that overshoot
        lesson["pgd"](model, pixels, labels, epsilon, 5, epsilon, start=pixels + 3),
        lesson["pgd"](model, pixels, labels, epsilon, 5, epsilon / 2, lesson["margin"]),
    ):
        assert moved.min() >= 0 and moved.max() <= 1
        assert (moved - pixels).abs().max() <= epsilon + 1e-6
        assert not torch.equal(moved, pixels)


def test_the_projection_leaves_what_is_legal_and_gives_the_nearest_of_what_is_not(lesson: dict) -> None:
    pixels, _ = some()
    inside = (pixels + 0.1 * (2 * torch.rand_like(pixels) - 1)).clamp(0, 1)
    assert torch.allclose(lesson["project"](inside, pixels, 0.1), inside, atol=1e-6)
    moved = pixels + torch.randn_like(pixels)
    found = lesson["project"](moved, pixels, 0.1)
    assert torch.allclose(found, torch.minimum(torch.maximum(moved, (pixels - 0.1).clamp(0)), (pixels + 0.1).clamp(max=1)))


def test_on_a_straight_slope_one_step_is_the_best_that_can_be_done(lesson: dict) -> None:
    pixels, labels = some()
    model = Flat()
    loss = partial(F.cross_entropy, reduction="none")
    sign = (1 - 2 * labels.float())[:, None, None, None] * model.weight.sign()
    expected = (pixels + 0.1 * sign).clamp(0, 1)
    assert torch.allclose(lesson["fgsm"](model, pixels, labels, 0.1, lesson["margin"]), expected)
    worst = loss(model(lesson["fgsm"](model, pixels, labels, 0.1, lesson["margin"])), labels)
    for other in (pixels, lesson["pgd"](model, pixels, labels, 0.1, 10, 0.05), lesson["pgd"](model, pixels, labels, 0.1, 0, 0.0)):
        assert (loss(model(other), labels) <= worst + 1e-5).all()


def test_a_pictures_gradient_does_not_depend_on_the_others(lesson: dict) -> None:
    pixels, labels = some(6)
    for loss in (lesson["cross_entropy"], lesson["margin"]):
        whole = lesson["gradient"](Flat(), pixels, labels, loss)
        alone = torch.cat([lesson["gradient"](Flat(), pixels[i : i + 1], labels[i : i + 1], loss) for i in range(6)])
        assert torch.allclose(whole, alone, atol=1e-6)


def test_the_margin_is_how_far_the_best_wrong_class_leads(lesson: dict) -> None:
    logits, labels = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, 9.0]]), torch.tensor([0, 1])
    assert lesson["margin"](logits, labels).item() == (2 - 3) + (9 - 5)


def test_the_transform_inside_gives_the_logits_of_the_transform_outside(lesson: dict) -> None:
    torch.manual_seed(0)
    model = lesson["new_model"]("vgg_far").eval()
    outside = Classifier(load_backbone("vgg_far"), 10).eval()
    outside.head.load_state_dict(model.head.state_dict())
    pictures = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)
    pixels = model.transform(pictures)
    assert pixels.min() >= 0 and pixels.max() <= 1
    with torch.no_grad():
        assert torch.allclose(model(pixels.to(lesson["device"])).cpu(), outside(outside.transform(pictures)), atol=1e-5)


def split_of(pixels: torch.Tensor, labels: torch.Tensor) -> Split:
    return Split((255 * pixels).round().to(torch.uint8), labels, ("a", "b"))


def test_survivors_were_right_and_a_stronger_attack_never_leaves_more(lesson: dict) -> None:
    pixels, labels = some(150)
    split, model = split_of(pixels, labels), Flat()
    x, y = lesson["ready"](split)
    model.bias = float((x * model.weight).sum(dim=(1, 2, 3)).median().detach())  # both classes are answered
    right = lesson["is_right"](model, x, y).numpy()
    assert 0 < right.sum() < len(right)
    before = right
    for steps in (2, 4, 12, 20):
        found = lesson["survivors"](model, split, 0.02, steps, seed=3)
        assert not (found & ~before).any(), "the same start, and more steps"
        before = found
    assert before.sum() < right.sum()
    for small, large in ((0.01, 0.05), (0.05, 0.5)):
        assert lesson["survivors"](model, split, large).sum() <= lesson["survivors"](model, split, small).sum()
    assert not lesson["survivors"](model, split, 1.0).any()
    exact = (model(lesson["fgsm"](model, x, y, 0.02, lesson["margin"])).argmax(dim=1) == y).numpy()  # the best on a slope
    assert not (exact & ~right).any() and (before >= exact).all()


def test_masks_change_no_gradient_but_their_own_and_fall_when_they_are_lifted(lesson: dict) -> None:
    pixels, labels = some(60)
    split, model = split_of(pixels, labels), Flat()
    x, y = lesson["ready"](split)
    loud, rounded = lesson["Loud"](model), lesson["Rounded"](model)
    assert torch.equal(loud(x).argmax(dim=1), model(x).argmax(dim=1))
    levels = (15 * x).round() / 15
    through = lesson["Rounded"](model, through=True)
    assert torch.equal(rounded(x), model(levels)) and torch.allclose(through(x), rounded(x), atol=1e-5)
    right = lesson["is_right"](loud, x, y)
    slope = lesson["gradient"](loud, x, y, lesson["cross_entropy"])
    assert (slope[right] == 0).all() and (slope[~right] != 0).any()
    assert (lesson["gradient"](rounded, x, y, lesson["margin"]) == 0).all()
    assert torch.equal(lesson["gradient"](through, x, y, lesson["margin"]), lesson["gradient"](model, x, y, lesson["margin"]))
    for mask, lifted in ((loud, loud), (rounded, through)):
        seems = lesson["survivors"](mask, split, 0.3, steps=4)
        left = lesson["survivors"](lifted, split, 0.3, steps=20, loss=lesson["margin"])
        assert seems.sum() > left.sum()


def test_pictures_made_on_one_network_are_legal_and_shown_to_another(lesson: dict) -> None:
    pixels, labels = some(30)
    split = split_of(pixels, labels)
    x, y = lesson["ready"](split)
    made = lesson["made_on"](Flat(), split, 0.1, seed=0)
    assert (made - x).abs().max() <= 0.1 + 1e-6 and made.min() >= 0 and made.max() <= 1
    own, other = ((lesson["is_right"](net, x, y) & ~lesson["is_right"](net, made, y)).sum() for net in (Flat(), Flat(seed=2)))
    assert own > other, "they turn the network that they were made on more often than another"
    found = lesson["after"](lesson["fgsm"], Flat(), split, 0.1)
    assert np.array_equal(found, lesson["is_right"](Flat(), lesson["fgsm"](Flat(), x, y, 0.1), y).numpy())


def test_the_step_of_adversarial_training_learns_from_the_attack_alone(lesson: dict) -> None:
    torch.manual_seed(0)
    model = lesson["new_model"]("vgg_far").train()
    pixels, labels = torch.rand(8, 3, 32, 32, device=lesson["device"]), torch.arange(8, device=lesson["device"])
    norm = next(part for part in model.modules() if isinstance(part, nn.BatchNorm2d))
    seen = norm.num_batches_tracked.item()
    torch.manual_seed(5)
    loss = lesson["adversarial"](0.1, 3, 0.05)(model, (pixels, labels), 0.0)["adversarial"]
    assert norm.num_batches_tracked.item() == seen + 1, "the attack moved what batch norm measures"
    assert model.training and all(parameter.grad is None for parameter in model.parameters())
    loss.backward()
    assert model.head.weight.grad is not None
    untouched = lesson["new_model"]("vgg_far")
    untouched.load_state_dict(model.state_dict())
    assert loss.item() > F.cross_entropy(untouched.train()(pixels), labels).item()


def test_steps_of_regularisation_are_what_their_names_say(lesson: dict) -> None:
    torch.manual_seed(0)
    model = lesson["new_model"]("vgg_far").eval()
    pixels, labels = torch.rand(6, 3, 32, 32, device=lesson["device"]), torch.arange(6, device=lesson["device"])
    logs = model(pixels).log_softmax(dim=1)
    right = logs[range(6), labels]
    focal = lesson["focal"](model, (pixels, labels), 0.0)["focal"]
    assert torch.allclose(focal, (-((1 - right.exp()) ** 2) * right).mean(), atol=1e-5)
    smoothed = lesson["smoothed"](model, (pixels, labels), 0.0)["smoothed"]
    assert torch.allclose(smoothed, -(0.9 * right + 0.1 * logs.mean(dim=1)).mean(), atol=1e-5)


def test_a_probe_copied_into_a_classifier_answers_as_the_regression_does(lesson: dict) -> None:
    backbone = lesson["new_model"]("vgg_far").backbone
    few = lesson["few_shot"](lesson["small_train"], 3, 0)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    model = lesson["probed"](backbone, few, 1.0)
    assert hits(model, few).float().mean() == 1
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_a_tuned_copy_leaves_the_backbone_that_it_came_from(lesson: dict) -> None:
    backbone = lesson["new_model"]("vgg_far").backbone
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    few = lesson["few_shot"](lesson["small_train"], 1, 0)
    model = lesson["tuned"](backbone, few, 1e-3, 0, steps=1)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())
    assert not all(torch.equal(value.cpu(), before[name].cpu()) for name, value in model.backbone.state_dict().items())


def test_no_picture_is_in_two_splits(lesson: dict) -> None:
    for parts in (("train", "valid", "test"), ("small_train", "small_test")):
        seen = [{picture.numpy().tobytes() for picture in lesson[part].pictures} for part in parts]
        assert sum(map(len, seen)) == len(set.union(*seen))


def test_robust_counts_a_picture_only_if_it_survives_every_attack(lesson: dict) -> None:
    arrays = {"none": [1, 1, 1, 0], "fgsm": [1, 0, 1, 1], "pgd": [1, 1, 0, 1]}
    rows = []
    for seed in (0, 1):
        for attack, found in arrays.items():
            packed = pack_hits(np.array(found * 75, dtype=bool))
            epsilon = 0.0 if attack == "none" else 0.1
            rows.append({"seed": seed, "arm": "a", "task": "mnist", "attack": attack, "epsilon": epsilon, "hits": packed})
    table = pd.DataFrame(rows)
    found, seeds = lesson["robust"](table, "a", 0.1, attacks=("none", "fgsm", "pgd"))
    assert seeds == [0, 1]
    assert all(np.array_equal(one, np.array([1, 0, 0, 0] * 75, dtype=bool)) for one in found)
    with pytest.raises(ValueError, match=r"margin on 'a' at ε = 0\.1 is not in the table"):
        lesson["robust"](table, "a", 0.1)
    with pytest.raises(ValueError, match=r"fgsm, pgd on 'a' at ε = 0\.2"):
        lesson["robust"](table, "a", 0.2)


def test_what_catches_the_mistakes_catches_them_and_nothing_else(lesson: dict) -> None:
    catches = cells("10", "catches", torch=torch, np=np)
    pixels = torch.rand(4, 3, 8, 8) * 0.5 + 0.25
    moved = pixels + 0.1
    catches["assert_legal"](moved, pixels, 0.1)
    catches["assert_spends"](moved, pixels, 0.1)
    for wrong, reason in ((pixels + 0.9, "no such picture exists"), (pixels + 0.2, "by more than epsilon")):
        with pytest.raises(AssertionError, match=reason):
            catches["assert_legal"](wrong, pixels, 0.1)
    with pytest.raises(AssertionError, match=r"moved no pixel by more than 0\.050"):
        catches["assert_spends"](pixels + 0.05, pixels, 0.1)
    weak = np.arange(100) < 90
    catches["assert_settled"](weak, np.arange(100) < 89)
    with pytest.raises(AssertionError, match="no robust accuracy"):
        catches["assert_settled"](weak, np.arange(100) < 80)


def test_the_stored_table_bears_out_every_claim_of_the_lesson(lesson: dict, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("COURSE_STRICT", "1")
    claims = Claims("10_adversarial_robustness", tmp_path)
    lesson["stored_claims"](stored("10_adversarial_robustness"), claims)
    assert len(claims.table()) >= 20


def test_fit_takes_the_step_and_the_pixels(lesson: dict) -> None:
    model = lesson["new_model"]("vgg_far")
    data = batches(lesson["train"], model.transform, size=4, steps=1, device=lesson["device"])
    history = fit(model, data, step=lesson["adversarial"](0.1, 1, 0.1), optimizer=adamw(1e-3))
    assert list(history.columns)[:2] == ["epoch", "adversarial"] and np.isfinite(history["adversarial"]).all()


def test_the_lesson_takes_the_best_rate_that_its_search_found(lesson: dict) -> None:
    table = pd.read_csv(EVIDENCE / "10_recipes.csv").groupby(["arm", "rate"])["validation"].mean()
    assert set(lesson["RECIPES"]) == set(lesson["ARMS"])
    for arm, rate in lesson["RECIPES"].items():
        assert table[arm, rate] == table[arm].max()
