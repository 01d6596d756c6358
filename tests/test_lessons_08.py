"""What lesson 08 builds by hand does what the package does, its measures mean what they say, and target labels come last."""

import ast
import copy

import jupytext
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import update_bn

from course_utils.adaptation import mmd
from course_utils.backbones import Classifier, centred, load_backbone
from course_utils.data import Split
from course_utils.paths import EVIDENCE, NOTEBOOKS
from tests.test_lessons import cells
from tools.evidence import definitions, pack_hits

SOURCE = NOTEBOOKS / "source" / "08_domain_shift.py"


@pytest.fixture(scope="module")
def lesson() -> dict:
    """What its cells of evidence define."""
    return definitions(SOURCE)


@pytest.fixture(scope="module")
def by_hand() -> dict:
    return cells("08", "by-hand", torch=torch)


def samples(n: int = 30, m: int = 50, shift: float = 0.5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=random), torch.randn(m, 6, generator=random) + shift


def test_mmd_by_hand_is_the_package_s(by_hand: dict) -> None:
    for n, m, shift in ((30, 50, 0.5), (12, 9, 0.0), (40, 40, 3.0)):
        x, y = samples(n, m, shift)
        found = by_hand["mmd_of"](by_hand["kernel_of"](torch.cat([x, y])), torch.arange(n + m) < n)
        assert found.item() == pytest.approx(mmd(x, y).item(), abs=1e-6)


def test_many_divisions_at_once_are_the_divisions_one_by_one(by_hand: dict) -> None:
    x, y = samples()
    pot, random = torch.cat([x, y]), torch.Generator().manual_seed(1)
    first = torch.stack([torch.randperm(80, generator=random) < 30 for _ in range(5)])
    together = by_hand["mmd_of"](by_hand["kernel_of"](pot), first)
    each = [mmd(pot[own], pot[~own]).item() for own in first]
    assert together.tolist() == pytest.approx(each, abs=1e-5)


def test_a_permutation_test_notices_a_shift_and_keeps_its_word_without_one(by_hand: dict) -> None:
    value, by_chance, p = by_hand["permutation_test"](*samples(shift=1.0), seed=0)
    assert value > by_chance.max().item() and by_chance.shape == (200,)
    assert p == pytest.approx(1 / 201)
    alarms = [by_hand["permutation_test"](*samples(15, 20, 0.0, seed), seed, times=60)[2] <= 0.05 for seed in range(300)]
    assert 0.01 < np.mean(alarms) < 0.1


def test_the_biased_mmd_is_the_mean_with_every_row_itself_and_never_below_0(by_hand: dict, lesson: dict) -> None:
    x, y = samples(6, 9, 0.0)
    kernel, first = by_hand["kernel_of"](torch.cat([x, y])), torch.arange(15) < 6
    whole = kernel.clone().fill_diagonal_(1)
    plain = whole[:6, :6].mean() + whole[6:, 6:].mean() - 2 * whole[:6, 6:].mean()
    assert lesson["biased_mmd_of"](kernel, first).item() == pytest.approx(plain.item(), abs=1e-6)
    found = []
    for seed in range(40):
        kernel = by_hand["kernel_of"](torch.cat(samples(6, 6, 0.0, seed)))
        half = torch.arange(12) < 6
        found.append((lesson["biased_mmd_of"](kernel, half).item(), by_hand["mmd_of"](kernel, half).item()))
    biased, unbiased = np.array(found).T
    assert biased.min() > 0 and biased.mean() > 0.1
    assert unbiased.min() < 0 and abs(unbiased.mean()) < 0.03


def test_a_fresh_probe_finds_no_distance_without_a_shift_and_a_stale_one_does(lesson: dict) -> None:
    random = torch.Generator().manual_seed(0)
    x, y = torch.randn(200, 100, generator=random), torch.randn(150, 100, generator=random)
    assert abs(lesson["proxy_distance"](x, y, 0)) < 0.4
    assert lesson["proxy_distance"](x, y, 0, fresh=False, C=100.0) > 1.9
    assert lesson["proxy_distance"](x, y + 3, 0) == 2
    near, far = (lesson["proxy_distance"](x, y + shift, 0) for shift in (0.1, 0.3))
    assert near < far


def test_what_catches_the_mistakes_catches_them_and_nothing_else(by_hand: dict, lesson: dict) -> None:
    catches = cells("08", "catches", torch=torch)

    def biased(x, y):
        kernel = by_hand["kernel_of"](torch.cat([x, y]))
        return lesson["biased_mmd_of"](kernel, torch.arange(len(x) + len(y)) < len(x))

    catches["assert_unbiased"](mmd)
    with pytest.raises(AssertionError, match="finds a shift where there is none"):
        catches["assert_unbiased"](biased)
    table = torch.randn(200, 100, generator=torch.Generator().manual_seed(0))
    catches["assert_null"](lambda x, y: lesson["proxy_distance"](x, y, 0, C=100.0), table)
    with pytest.raises(AssertionError, match="the probe is not fresh"):
        catches["assert_null"](lambda x, y: lesson["proxy_distance"](x, y, 0, fresh=False, C=100.0), table)
    catches["assert_mixed"](torch.arange(50) % 10)
    with pytest.raises(AssertionError, match="60 % of these pictures look like one class"):
        catches["assert_mixed"](torch.tensor([3] * 6 + [1, 2, 4, 5]))


def small_model(seed: int = 0) -> Classifier:
    torch.manual_seed(seed)
    return Classifier(load_backbone("vgg_far", pretrained=False), 10)


def test_re_estimated_statistics_are_those_of_the_pictures_and_no_weight_moves(lesson: dict) -> None:
    model = small_model()
    pictures = torch.randint(0, 256, (70, 3, 32, 32), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    before = copy.deepcopy(model.state_dict())
    found = lesson["re_estimated"](model, pictures)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not found.training
    for name, parameter in found.named_parameters():
        assert torch.equal(parameter, before[name])
    convolution, norm = next(
        (a, b) for a, b in zip(found.modules(), list(found.modules())[1:], strict=False) if isinstance(b, nn.BatchNorm2d)
    )
    with torch.no_grad():
        maps = [convolution(centred(part)) for part in pictures[:64].split(32)]
    expected = torch.stack([part.mean(dim=(0, 2, 3)) for part in maps]).mean(dim=0)
    assert torch.allclose(norm.running_mean, expected, atol=1e-4)
    expected = torch.stack([part.var(dim=(0, 2, 3)) for part in maps]).mean(dim=0)
    assert torch.allclose(norm.running_var, expected, atol=1e-3)
    ready = copy.deepcopy(model)
    update_bn((centred(part) for part in pictures[:64].split(32)), ready)
    for name, value in ready.state_dict().items():
        assert torch.allclose(value.float(), found.state_dict()[name].float(), atol=1e-6), name
    four = lesson["re_estimated"](model, pictures[:4])  # fewer than one batch
    assert not torch.equal(next(b for n, b in four.named_buffers() if "mean" in n), before["backbone.layers.0.1.running_mean"])


def test_a_standardised_picture_has_its_own_units_alone_and_in_a_batch(lesson: dict) -> None:
    pictures = torch.randint(0, 256, (5, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    transform = lesson["standardised"](centred)
    found = transform(pictures)
    assert torch.allclose(found.mean(dim=(1, 2, 3)), torch.zeros(5), atol=1e-5)
    assert torch.allclose(found.std(dim=(1, 2, 3), correction=0), torch.ones(5), atol=1e-4)
    assert torch.allclose(transform(pictures[2]), found[2], atol=1e-5)
    tinted = pictures // 2 + torch.tensor([0, 40, 90], dtype=torch.uint8).view(3, 1, 1)
    assert transform(tinted).mean(dim=(2, 3)).std(dim=1).min() > 0.3  # all channels have one mean: colours stay
    assert torch.isfinite(transform(torch.zeros(3, 8, 8, dtype=torch.uint8))).all()


def test_information_rewards_being_sure_of_every_class_in_turn(lesson: dict) -> None:
    sure = 50 * torch.eye(10)
    assert lesson["information"](sure) == pytest.approx(np.log(10), abs=1e-4)
    assert lesson["information"](sure[:1].repeat(10, 1)) == pytest.approx(0, abs=1e-4)
    assert lesson["information"](torch.zeros(10, 10)) == pytest.approx(0, abs=1e-4)
    assert lesson["confidence_of"](torch.tensor([[np.log(3.0), 0.0]])) == pytest.approx(0.75)


@pytest.mark.parametrize("gained, value", [(0.0, 0.0), (0.3, 0.5), (0.6, 1.0)])
def test_what_is_won_back_is_a_share_of_the_loss(lesson: dict, gained: float, value: float) -> None:
    rows = []
    for seed in range(5):
        right = np.arange(1000) < 300 + 10 * seed
        more = np.arange(1000) < 300 + 10 * seed + 1000 * gained
        for remedy, hits in (("plain", right), ("mmd", more)):
            row = {"seed": seed, "pair": "MNIST→MNIST-M", "start": "far", "remedy": remedy, "hits": pack_hits(hits)}
            rows.append(row | {"source": 0.9 + 0.01 * seed})
    found = lesson["won_back"](pd.DataFrame(rows), "MNIST→MNIST-M", "far", "mmd")
    assert found.value == pytest.approx(value)
    assert found.low <= found.value <= found.high and found.n == 5


def test_the_weights_are_those_that_the_label_free_search_found(lesson: dict) -> None:
    table = pd.read_csv(EVIDENCE / "08_recipes.csv")
    grid = lesson["GRID"]
    assert len(table) == len(grid["distance"]) * len(grid["weight"])
    assert set(table["seed"]) == set(grid["seed"]) and min(grid["seed"]) >= 900
    for distance, rows in table.groupby("distance"):
        assert lesson["RECIPES"][distance] == rows.loc[rows["validation"].idxmax(), "weight"]


def test_the_domains_share_no_digit_and_no_target_picture_has_a_label(lesson: dict) -> None:
    train, valid = lesson["source_of"]("MNIST")
    assert (len(train), len(valid)) == (1200, 300)
    for name, size in lesson["SIZES"].items():
        adapt, exam = lesson["targets_of"](name)
        assert len(exam.split) == size
        assert adapt.split.classes == exam.split.classes == ("unknown",)
        if name != "MNIST-M":  # other halves of one set
            rows = [{one.numpy().tobytes() for one in part.split.pictures} for part in (adapt, exam)]
            assert not rows[0] & rows[1]


def calls(tree: ast.AST) -> list[tuple[str, int]]:
    """Names of what is called, with lines."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [(getattr(node.func, "attr", getattr(node.func, "id", "")), node.lineno) for node in found]


def assert_no_recipe_is_called(trees: list[ast.AST], recipes: tuple[str, ...] = ()) -> None:
    """Fail where a lesson calls a recipe itself, which gives out labels. recipes: functions that are recipes."""
    for node in (node for tree in trees for node in tree.body if getattr(node, "name", "") not in recipes):
        assert "draw" not in {name for name, _ in calls(node)}
        called = [one.func for one in ast.walk(node) if isinstance(one, ast.Call) and isinstance(one.func, ast.Call)]
        assert not any(getattr(function.func, "id", "") == "partial" for function in called), "a recipe is called where it stands"


def test_a_recipe_that_is_called_is_noticed() -> None:
    for mistaken in ("exam.draw().labels", 'partial(mnist_m, "test")().labels'):
        with pytest.raises(AssertionError):
            assert_no_recipe_is_called([ast.parse(mistaken)])
    assert_no_recipe_is_called([ast.parse('UnlabelledTarget(partial(mnist_m, "test")).split')])


def test_target_labels_are_revealed_in_one_cell_after_the_exercises_and_last_in_an_experiment() -> None:
    parts = [cell for cell in jupytext.read(SOURCE, fmt="py:percent").cells if cell.cell_type == "code"]
    trees = [ast.parse(cell.source) for cell in parts]
    for tree in trees:
        assert not {"mnist_m", "load_target"} & {name for name, _ in calls(tree)}
    assert_no_recipe_is_called(trees, ("part_of",))
    revealing = [number for number, tree in enumerate(trees) if any(name == "reveal" for name, _ in calls(tree))]
    stored = [number for number in revealing if "evidence" in parts[number].metadata.get("tags", [])]
    (live,) = set(revealing) - set(stored)
    exercises = [n for n, cell in enumerate(parts) if any("check-" in tag for tag in cell.metadata.get("tags", []))]
    assert len(stored) == 1 and live > max(exercises)
    (experiment,) = (node for node in trees[stored[0]].body if getattr(node, "name", "") == "experiment")
    (line,) = (line for name, line in calls(experiment) if name == "reveal")
    assert line > max(own for name, own in calls(experiment) if name in ("measured", "adapted_to", "trained", "tested", "read"))
    others = [node for node in trees[stored[0]].body if node is not experiment]
    assert not any(name == "reveal" for node in others for name, _ in calls(node))


def test_an_aligned_network_is_trained_on_pictures_of_both_domains(lesson: dict) -> None:
    train = lesson["source_of"]("MNIST")[0]
    few = Split(train.pictures[:64], train.labels[:64], train.classes)
    target, _ = lesson["targets_of"]("MNIST-M")
    weights = []
    for remedy, weight in (("augmented", None), ("mmd", 1e-9), ("mmd", 5.0)):
        model = lesson["trained"](lesson["backbone_of"]("far", 0), few, target, remedy, 0, 2, weight)
        assert not model.training
        weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    assert (weights[0] - weights[1]).abs().max() < 1e-3  # the source's part is the same
    assert (weights[1] - weights[2]).abs().max() > 1e-3
