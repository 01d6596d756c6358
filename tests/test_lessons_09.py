"""What lesson 09 builds by hand does what the package does, its measures mean what they say, and target labels come last."""

import ast
import copy
import math

import jupytext
import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from course_utils.adaptation import DomainBatches, UnlabelledTarget, cdan, dann, discriminator, domain_loss, lambda_at
from course_utils.backbones import Classifier, load_backbone
from course_utils.data import Split
from course_utils.paths import EVIDENCE, NOTEBOOKS
from course_utils.training import fit, sgd
from tests.test_lessons import cells
from tests.test_lessons_08 import assert_no_recipe_is_called, calls
from tools.evidence import definitions, pack_hits

SOURCE = NOTEBOOKS / "source" / "09_adversarial_adaptation.py"


@pytest.fixture(scope="module")
def lesson() -> dict:
    """What its cells of evidence define."""
    return definitions(SOURCE)


@pytest.fixture(scope="module")
def by_hand() -> dict:
    return cells("09", "by-hand", torch=torch, nn=nn, F=F, math=math)


def pictures(count: int, seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 32, 32), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def model_of(classes: int = 3, conditional: bool = False) -> Classifier:
    torch.manual_seed(0)
    model = Classifier(load_backbone("vgg_far", pretrained=False), classes)
    model.discriminator = discriminator(model.backbone.width * (classes if conditional else 1))
    return model


def domains() -> tuple[Split, UnlabelledTarget]:
    source = Split(pictures(24, 1), torch.arange(24) % 3, ("a", "b", "c"))
    return source, UnlabelledTarget(lambda: Split(pictures(20, 2), torch.arange(20) % 3, ("a", "b", "c")))


def test_dann_by_hand_ends_with_the_weights_of_the_package_s(by_hand: dict) -> None:
    ends = []
    for step in (by_hand["dann_by_hand"], dann):
        model = model_of()
        data = DomainBatches(*domains(), model.transform, size=8, steps=2)
        history = fit(model, data, step=step, optimizer=sgd(0.02), schedule=by_hand["annealed"])
        assert list(history)[1:3] == ["cross_entropy", "domain"]
        ends.append(model)
    mine, its, first = (model.state_dict() for model in (*ends, model_of()))
    # How many batches a norm has seen is the one thing that differs, and nothing uses it.
    floats = [name for name, value in mine.items() if value.is_floating_point()]
    apart = max((mine[name] - its[name]).abs().max().item() for name in floats)
    moved = min((mine[name] - first[name]).abs().max().item() for name, value in ends[0].named_parameters() if value.dim() > 1)
    assert apart < 0.01 * moved, "rounding alone lies between them"


def test_the_rate_falls_from_one_to_a_sixth(by_hand: dict) -> None:
    assert [by_hand["annealed"](progress) for progress in (0, 0.1, 1)] == pytest.approx([1, 2**-0.75, 11**-0.75])


def test_the_reversal_by_hand_turns_the_gradient_and_nothing_else(by_hand: dict) -> None:
    features = torch.randn(4, 5, requires_grad=True)
    turned = by_hand["reverse"](features, 0.3)
    assert torch.equal(turned, features)
    (plain,) = torch.autograd.grad((features**3).sum(), features)
    (found,) = torch.autograd.grad((turned**3).sum(), features)
    assert torch.allclose(found, -0.3 * plain)


def test_the_domain_loss_and_lambda_by_hand_are_the_package_s(by_hand: dict) -> None:
    torch.manual_seed(0)
    features, network = (torch.randn(6, 4), torch.randn(9, 4)), discriminator(4)
    assert by_hand["domain_by_hand"](network, *features).item() == pytest.approx(domain_loss(network, features).item())
    assert by_hand["new_discriminator"](4)(features[0]).shape == (6,)
    for progress in (0, 0.1, 0.5, 1):
        assert by_hand["rising"](progress) == pytest.approx(lambda_at(progress))


def test_each_domain_is_normalised_alone_and_the_target_is_remembered(by_hand: dict) -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(3)
    source, target = torch.randn(8, 3, 4, 4) + 5, 3 * torch.randn(8, 3, 4, 4)
    features = by_hand["each_alone"](nn.Sequential(norm), source, target)
    for own in features:
        assert torch.allclose(own.mean(dim=(0, 2, 3)), torch.zeros(3), atol=1e-5)
    only = nn.BatchNorm2d(3)
    only(target)
    assert torch.allclose(norm.running_mean, only.running_mean) and torch.allclose(norm.running_var, only.running_var)
    assert norm.momentum == only.momentum


def test_the_mistakes_are_the_mistakes_and_the_tests_of_the_lesson_catch_them(lesson: dict) -> None:
    catches = cells("09", "catches", **lesson)
    source, target = domains()
    model = model_of(conditional=True)
    (batch,) = DomainBatches(source, target, model.transform, size=8, steps=1).epoch(0)
    found = []
    for step in (cdan, lesson["cdan_attached"]):
        own = copy.deepcopy(model)
        gradients = torch.autograd.grad(step(own, batch, 0.5)["domain"], list(own.head.parameters()), allow_unused=True)
        found.append(any(part is not None and bool(part.any()) for part in gradients))
    assert found == [False, True]
    catches["assert_detached"](cdan, model, batch)
    with pytest.raises(AssertionError, match="reaches the head"):
        catches["assert_detached"](lesson["cdan_attached"], model, batch)

    model, other = model_of(), (*batch[:2], batch[2].flip(0) * 0.5)
    said = {}
    for name, step in (("alone", dann), ("mixed", lesson["dann_mixed"])):
        said[name] = [step(copy.deepcopy(model).train(), one, 0.5)["cross_entropy"].item() for one in (batch, other)]
    assert said["alone"][0] == pytest.approx(said["alone"][1], abs=1e-6)
    assert abs(said["mixed"][0] - said["mixed"][1]) > 1e-4
    model = Classifier(load_backbone("vgg_far", pretrained=False), 10)
    model.discriminator = discriminator(model.backbone.width)
    catches["assert_by_domain"](dann, model)
    with pytest.raises(AssertionError, match="change what is said of the source"):
        catches["assert_by_domain"](lesson["dann_mixed"], model)

    dead, features = lesson["ended_in_softmax"](discriminator(4)), torch.randn(6, 4, requires_grad=True)
    loss = domain_loss(dead, (features[:3], features[3:]))
    assert torch.equal(dead(features), torch.ones(6))
    assert not torch.autograd.grad(loss, features)[0].any()
    catches["domain_by_hand"] = lambda network, *features: domain_loss(network, features)
    catches["assert_alive"](discriminator(4), 4)
    with pytest.raises(AssertionError, match="no gradient comes back"):
        catches["assert_alive"](dead, 4)
    catches["assert_full_strength"](lambda_at)
    with pytest.raises(AssertionError, match="γ caps it"):
        catches["assert_full_strength"](lesson["STEP_OF"]["dann capped"].keywords["strength"])


def test_re_estimated_statistics_are_those_of_the_pictures_and_nothing_is_learned(lesson: dict) -> None:
    model, shown = model_of(), pictures(256, 3)
    before = copy.deepcopy(model.state_dict())
    found = lesson["re_estimated"](model, shown)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(torch.equal(value, before[name]) for name, value in found.named_parameters()) and not found.training
    convolution, norm = found.backbone.layers[0][:2]
    with torch.no_grad():
        maps = convolution(model.transform(shown))
    assert torch.allclose(norm.running_mean, maps.mean(dim=(0, 2, 3)), atol=1e-4)
    assert torch.allclose(norm.running_var, maps.var(dim=(0, 2, 3)), rtol=0.05)


def test_a_fresh_probe_tells_shifted_features_apart_and_equal_ones_not(lesson: dict) -> None:
    random = torch.Generator().manual_seed(0)
    x, y = torch.randn(300, 20, generator=random), torch.randn(300, 20, generator=random)
    assert 0.4 < lesson["fresh_probe"](x, y) < 0.6
    assert lesson["fresh_probe"](x, y + 3) == 1
    assert 0.6 < lesson["fresh_probe"](x, y + 0.3) < 0.95


def test_the_scores_say_what_their_table_says(lesson: dict) -> None:
    features = torch.zeros(30, 2)
    sure = 50.0 * F.one_hot(torch.arange(30) % 10, 10)
    alike, unsure = sure[:1].repeat(30, 1), torch.zeros(30, 10)
    found = {name: lesson["scores_of"](features, own) for name, own in (("sure", sure), ("alike", alike), ("unsure", unsure))}
    assert found["sure"]["im"] == pytest.approx(math.log(10), abs=1e-4)
    assert found["alike"]["im"] == pytest.approx(0, abs=1e-4) and found["unsure"]["im"] == pytest.approx(0, abs=1e-4)
    assert found["sure"]["ent"] == pytest.approx(0, abs=1e-4) == found["alike"]["ent"]
    assert found["unsure"]["ent"] == pytest.approx(-math.log(10), abs=1e-4)
    assert found["sure"]["bnm"] == pytest.approx(10 * math.sqrt(3) / 30, abs=1e-4)  # ten classes, three pictures each
    assert found["alike"]["bnm"] == pytest.approx(math.sqrt(30) / 30, abs=1e-4)
    assert found["sure"]["snd"] == pytest.approx(math.log(2), abs=1e-3)  # two neighbours each
    assert found["alike"]["snd"] == pytest.approx(math.log(29), abs=1e-3)


def rows(hits: dict[tuple, list[np.ndarray]], **columns) -> pd.DataFrame:
    """A table of evidence with these hits by (start, method, augmented), a list over seeds."""
    found = []
    for (start, method, augmented), by_seed in hits.items():
        for seed, own in enumerate(by_seed):
            row = {"seed": seed, "start": start, "method": method, "augmented": augmented, "world": "usual", "epoch": 6}
            found.append(row | {"hits": pack_hits(own), "count": len(own)} | columns)
    return pd.DataFrame(found)


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_share_of_the_gap_is_measured_between_source_only_and_on_target(lesson: dict, share: float) -> None:
    def right(count: int) -> list[np.ndarray]:
        return [np.arange(1000) < count + 10 * seed for seed in range(5)]

    table = rows(
        {
            ("random", "source", True): right(300),
            ("random", "on target", True): right(900),
            ("random", "bnm", True): right(int(300 + 600 * share)),
        }
    )
    found = lesson["gap_closed"](table, ("random", "bnm"), ("random", "source"))
    assert found.value == pytest.approx(share)
    assert found.low <= found.value <= found.high and found.n == 5


def test_a_choice_takes_the_epoch_of_the_highest_score_and_the_oracle_that_of_the_most_hits(lesson: dict) -> None:
    accuracies = (0.2, 0.8, 0.5)
    own = pd.DataFrame(
        {"hits": pack_hits(np.arange(100) < 100 * accuracy), "count": 100, **{name: 0.0 for name in lesson["SCORES"]}}
        for accuracy in accuracies
    )
    own.loc[0, "src"] = 1.0
    own.loc[2, "im"] = 1.0
    found = {name: hits.mean() for name, hits in lesson["choices"](own).items()}
    assert (found["src"], found["im"], found["last"], found["oracle"]) == (0.2, 0.5, 0.5, 0.8)


def test_a_shifted_world_has_the_class_frequencies_that_it_names_and_gives_no_labels(lesson: dict) -> None:
    counts = torch.bincount(lesson["shifted"]("test", lesson["RARE"]).labels, minlength=10)
    assert counts[:5].max() <= 0.2 * counts[5:].min()
    counts = torch.bincount(lesson["shifted"]("test", 0).labels, minlength=10)
    assert counts[:5].min() > 0 and not counts[5:].any()
    for targets in lesson["WORLDS"].values():
        for target in targets:
            assert target.split.classes == ("unknown",) and not target.split.labels.any()


def test_rates_and_the_best_method_are_those_that_the_search_without_labels_found(lesson: dict) -> None:
    table = pd.read_csv(EVIDENCE / "09_recipes.csv")
    assert len(table) == len(lesson["GRID"]["method"]) * len(lesson["GRID"]["place"]) and table["seed"].min() >= 900
    for method, own in table.groupby("method"):
        best = own.loc[own["validation"].idxmax()]
        assert lesson["rate_of"](method) == lesson["RATES"][method][int(best["place"])]
    others = table[table["method"] != "source"]
    assert lesson["chosen_method"]() == others.loc[others["validation"].idxmax(), "method"]
    assert lesson["rate_of"]("dann mixed") == lesson["rate_of"]("dann")


def test_target_labels_are_drawn_inside_one_recipe_and_revealed_last() -> None:
    parts = [cell for cell in jupytext.read(SOURCE, fmt="py:percent").cells if cell.cell_type == "code"]
    trees = [ast.parse(cell.source) for cell in parts]
    drawing = [
        getattr(node, "name", "")
        for tree in trees
        for node in tree.body
        if {"mnist_m", "load_target", "vision_data"} & {name for name, _ in calls(node)}
    ]
    assert drawing == ["shifted"], "a recipe, which `UnlabelledTarget` alone calls"
    assert_no_recipe_is_called(trees, ("shifted",))
    revealing = [number for number, tree in enumerate(trees) if any(name == "reveal" for name, _ in calls(tree))]
    stored = [number for number in revealing if "evidence" in parts[number].metadata.get("tags", [])]
    (live,) = set(revealing) - set(stored)
    exercises = [number for number, cell in enumerate(parts) if any("check-" in tag for tag in cell.metadata.get("tags", []))]
    assert len(stored) == 1 and live > max(exercises)
    (experiment,) = (node for node in trees[stored[0]].body if getattr(node, "name", "") == "experiment")
    adapting = [line for name, line in calls(experiment) if name == "adapted"]
    assert min(line for name, line in calls(experiment) if name == "reveal") > max(adapting)


def test_every_picture_of_an_arm_is_told_before_any_label_is_looked_at(lesson: dict, monkeypatch) -> None:
    """The experiment itself, with arms that cost nothing: `reveal` comes after the last prediction but the ceiling's."""
    order: list[str] = []
    reveal = UnlabelledTarget.reveal

    def noted(self, source):
        order.append("reveal")
        return reveal(self, source)

    def adapted(start, method, seed, augmented=True, *, base=None, world="usual", **rest):
        order.append(method)
        asked = lesson["WORLDS"][world][1] if world in lesson["WORLDS"] else lesson["exam"]
        said = torch.zeros(len(asked.split), dtype=torch.long)
        row = {"said": said, "start": start, "augmented": augmented, "method": method, "world": world, "epoch": 6}
        return None, [row]

    monkeypatch.setattr(UnlabelledTarget, "reveal", noted)
    fakes = {
        "adapted": adapted,
        "re_estimated": lambda model, pictures: None,
        "learn": lambda *given, **rest: order.append("learn"),
    }
    fakes["network"] = lambda *given, **rest: None
    fakes["look"] = lambda model, method, target=None, asked=lesson["exam"]: {
        "said": torch.zeros(len(asked.split), dtype=torch.long)
    }
    kept = {name: lesson[name] for name in fakes}
    try:
        lesson.update(fakes)
        found = list(lesson["experiment"](0))
    finally:
        lesson.update(kept)
    first = order.index("reveal")
    assert set(order[first:]) == {"reveal", "learn"}, "after the first label only the ceiling learns"
    assert {"dann", "cdan", "adda", "bnm", "dann softmax"} <= set(order[:first])
    assert all(row["hits"].dtype == bool and len(row["hits"]) == row["count"] for row in found)
    truth = reveal(lesson["exam"], lesson["source"]).labels
    usual = next(row for row in found if row["world"] == "usual")
    assert np.array_equal(usual["hits"], (truth == 0).numpy())
