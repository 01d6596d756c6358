"""What lesson 13 builds by hand makes a network smaller as it says, and its tests of mistakes catch them."""

import copy
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from course_utils.evidence import Claims, stored
from course_utils.paths import NOTEBOOKS
from tests.test_lessons import cells
from tools.evidence import definitions, pack_hits

SOURCE = NOTEBOOKS / "source" / "13_smaller_and_faster.py"
EXTRAS = "the extras `export` are not installed"


@pytest.fixture(scope="module")
def lesson() -> dict:
    """What its cells of evidence define."""
    return definitions(SOURCE)


@pytest.fixture(scope="module")
def by_hand(lesson: dict) -> dict:
    """The cells that are built by hand and are no evidence: the mask and the stopwatch."""
    return cells("13", "by-hand", **lesson)


def settled(model: nn.Module) -> nn.Module:
    """A model whose batch norms have numbers of their own, as after training."""
    generator = torch.Generator().manual_seed(3)
    for part in model.modules():
        if isinstance(part, nn.BatchNorm2d):
            for values in (part.weight.data, part.bias.data, part.running_mean, part.running_var):
                values.copy_(0.5 + torch.rand(values.shape, generator=generator))
    return model.eval()


def widths(model: nn.Module) -> list[int]:
    return [layer.out_channels for layer in model.backbone.layers[0] if isinstance(layer, nn.Conv2d)]


@pytest.mark.parametrize("keep", [0.5, 0.8])
def test_a_cut_network_computes_what_the_masked_one_does(keep: float, lesson: dict, by_hand: dict) -> None:
    model = settled(lesson["new_student"](0))
    pictures = torch.randn(4, 3, 32, 32).to(lesson["device"])
    cut, masked = lesson["cut"](model, keep), by_hand["masked"](model, keep)
    with torch.no_grad():
        whole = model(pictures)
        assert torch.allclose(cut(pictures), masked(pictures), atol=1e-4)
        assert not torch.allclose(cut(pictures), whole, atol=1e-2)
        assert torch.equal(model(pictures), whole)  # neither touches the model itself
    assert all(after == max(4, 4 * round(keep * before / 4)) for before, after in zip(widths(model), widths(cut), strict=True))
    assert widths(masked) == widths(model)
    assert not cut.training and cut.backbone.width == widths(cut)[-1] == cut.head.in_features


def test_what_is_cut_learns_on_its_own(lesson: dict) -> None:
    model = settled(lesson["new_student"](0))
    before = copy.deepcopy(model.state_dict())
    cut = lesson["cut"](model, 0.8)
    for value in cut.parameters():
        value.data.add_(1.0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_strongest_filters_have_the_largest_norms_and_stay_in_order(lesson: dict) -> None:
    conv = nn.Conv2d(2, 8, 3)
    for number, size in enumerate((1.0, 8.0, 3.0, 7.0, 2.0, 6.0, 5.0, 4.0)):
        conv.weight.data[number] = size * (-1) ** number / 100
    assert lesson["strongest"](conv, 0.5).tolist() == [1, 3, 5, 6]
    assert lesson["strongest"](conv, 1.0).tolist() == list(range(8))


def test_multiplications_are_half_of_the_operations_that_torch_counts(lesson: dict, by_hand: dict) -> None:
    model, one = lesson["new_student"](0).eval(), lesson["train"].pictures[:1]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(model.transform(one.to(lesson["device"])))
    assert lesson["multiplications"](model, one) == counter.get_total_flops() / 2
    assert lesson["multiplications"](by_hand["masked"](model, 0.5), one) == counter.get_total_flops() / 2
    assert lesson["multiplications"](lesson["cut"](model, 0.5), one) < counter.get_total_flops() / 6


class Say(nn.Module):
    """A model that says what it was told, whatever it is shown."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return self.logits


def test_distillation_is_the_formula(lesson: dict) -> None:
    torch.manual_seed(0)
    teacher, said = torch.randn(6, 10), torch.randn(4, 10)
    labels, places = torch.tensor([3, -1, 5, -1, 0, -1]), torch.tensor([4, 1, 2, 5])
    found = lesson["distillation"](teacher, labels, 2.0, 0.9)(Say(said), (torch.zeros(4, 3, 2, 2), places), 0.0)
    p, q = (teacher[places] / 2).softmax(dim=1), (said / 2).softmax(dim=1)
    assert torch.allclose(found["soft"], 0.9 * 4 * (p * (p / q).log()).sum(dim=1).mean())
    assert torch.allclose(found["hard"], 0.1 * F.cross_entropy(said[[0, 2]], torch.tensor([0, 5])))
    silent = lesson["distillation"](teacher, labels, 2.0, 0.9)(
        Say(said[:2]), (torch.zeros(2, 3, 2, 2), torch.tensor([1, 3])), 0.0
    )
    assert list(silent) == ["soft"]  # no label, no loss, and no nan
    same = lesson["distillation"](teacher, labels, 1.0, 1.0)(Say(teacher[places]), (torch.zeros(4, 3, 2, 2), places), 0.0)
    assert abs(same["soft"].item()) < 1e-6


def test_every_stage_of_a_run_sees_the_same_labels(lesson: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    places = lesson["labelled"](7)
    assert len(set(places.tolist())) == 10 * lesson["LABELS"] == len(places)
    assert lesson["train"].labels[places].bincount().tolist() == [lesson["LABELS"]] * 10
    few = lesson["few_shot"](lesson["train"], lesson["LABELS"], 7)
    assert torch.equal(few.pictures, lesson["train"].pictures[places])  # the teacher's are the student's
    heard, orders = [], []

    def distillation(teacher: torch.Tensor, labels: torch.Tensor, **how: object):
        heard.append(labels.cpu())

    def batches(split, transform, **settings):
        orders.append(settings["seed"])

    for name, double in {"distillation": distillation, "batches": batches, "fit": lambda *given, **named: None}.items():
        monkeypatch.setitem(lesson, name, double)
    for order in (0, 1, 2):
        lesson["taught"](lesson["new_student"](7), 7, torch.zeros(2000, 10), 1, 1e-3, order=order)
    assert all(torch.equal((labels >= 0).nonzero().flatten(), places.sort().values) for labels in heard)
    assert all(torch.equal(labels[places], lesson["train"].labels[places]) for labels in heard)
    assert len(set(orders)) == 3


def test_latencies_leave_the_warm_up_out_and_take_turns(by_hand: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, order = [0.0], []
    monkeypatch.setattr(by_hand["time"], "perf_counter", lambda: clock[0])

    def run(name: str, seconds: float) -> None:
        order.append(name)
        clock[0] += 9.0 if len(order) <= 4 else seconds + 0.001 * len(order) * (name == "b")

    found = by_hand["latencies"]({"a": lambda: run("a", 0.002), "b": lambda: run("b", 0.0)}, 100, warmup=2)
    assert order == ["a", "b"] * 102
    assert found["a"] == pytest.approx([2, 2])
    assert found["b"] == pytest.approx(np.percentile(range(6, 206, 2), [50, 95]))


@pytest.fixture(scope="module")
def catches() -> dict:
    return cells("13", "catches", torch=torch, np=np, F=F)


def test_the_divergence_test_catches_a_mean_over_classes(lesson: dict, catches: dict) -> None:
    teacher, places = torch.randn(6, 10), torch.arange(6)
    model, batch = Say(torch.randn(6, 10)), (torch.zeros(6, 3, 2, 2), places)
    for reduction, fine in (("batchmean", True), ("sum", False), ("mean", False)):
        step = lesson["distillation"](teacher, torch.full((6,), -1), 2.0, 0.9, reduction)
        if fine:
            catches["assert_per_picture"](step, model, batch, teacher, 2.0, 0.9)
        else:
            with (
                pytest.raises(AssertionError, match="the formula gives"),
                pytest.warns() if reduction == "mean" else nullcontext(),
            ):
                catches["assert_per_picture"](step, model, batch, teacher, 2.0, 0.9)
    unsquared = lesson["distillation"](2 * teacher / 2, torch.full((6,), -1), 2.0, 0.45)
    with pytest.raises(AssertionError, match="the formula gives"):
        catches["assert_per_picture"](unsquared, model, batch, teacher, 2.0, 0.9)


def test_the_warm_up_test_catches_a_first_call_that_took_longer(catches: dict) -> None:
    catches["assert_warm"]([0.011, 0.01, 0.012, 0.01])
    with pytest.raises(AssertionError, match="the first call took 60 times"):
        catches["assert_warm"]([0.6, 0.01, 0.012, 0.01])


def test_the_learning_test_catches_what_has_no_gradient_or_did_not_move(catches: dict) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    model(torch.randn(5, 3)).square().sum().backward()
    with pytest.raises(AssertionError, match="4 of 4 parameters have not moved"):
        catches["assert_learns"](model, before)
    torch.optim.SGD(model[1].parameters(), lr=0.1).step()
    with pytest.raises(AssertionError, match="2 of 4 parameters have not moved"):
        catches["assert_learns"](model, before)
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    catches["assert_learns"](model, before)
    model[0].weight.grad = None
    with pytest.raises(AssertionError, match="1 of 4 parameters have no gradient"):
        catches["assert_learns"](model, before)
    model[0].requires_grad_(False)  # what is frozen on purpose need not learn
    catches["assert_learns"](model, before)


def test_the_test_of_one_picture_catches_batch_norm_in_training_mode(lesson: dict, catches: dict) -> None:
    model, pictures = settled(lesson["new_student"](0)), torch.randn(6, 3, 32, 32).to(lesson["device"])
    catches["assert_alone"](model, pictures)
    with pytest.raises(AssertionError, match="pictures beside it"):
        catches["assert_alone"](copy.deepcopy(model).train(), pictures)


def test_the_script_needs_no_torch_and_says_what_the_file_says(lesson: dict, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason=EXTRAS)
    pytest.importorskip("onnxscript", reason=EXTRAS)
    script = cells("13", "script")["SCRIPT"]
    assert len(script.strip().splitlines()) <= 20 and "torch" not in script
    path = lesson["exported"](lesson["new_student"](0), tmp_path / "model.onnx")
    few = lesson["test"].subset(range(5))
    expected = lesson["answers"](path, few).argmax(axis=1)
    (tmp_path / "classify.py").write_text("import sys; sys.modules['torch'] = None\n" + script, encoding="utf-8")
    for number in range(2):
        picture = few.pictures[number].permute(1, 2, 0).numpy()
        Image.fromarray(picture).save(tmp_path / "digit.png")
        command = [sys.executable, "classify.py", "model.onnx", "digit.png"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert f"shows a {expected[number]}," in done.stdout


def test_a_run_goes_the_whole_way_and_tests_what_comes_from_files(lesson: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime", reason=EXTRAS)
    pytest.importorskip("onnxscript", reason=EXTRAS)
    monkeypatch.setitem(lesson, "RUN_STEPS", dict.fromkeys(lesson["RUN_STEPS"], 1))
    few = lesson["asked"]().subset(range(20))
    monkeypatch.setitem(lesson, "asked", lambda: few)
    rows = {row["arm"]: row for row in lesson["experiment"](3)}
    assert list(rows) == ["teacher", "student", "cut", "pruned", "int8"]
    assert all(row["hits"].shape == (20,) and row["hits"].dtype == bool for row in rows.values())
    needs = [row["multiplications"] for row in rows.values()]
    assert needs == sorted(needs, reverse=True) and needs[3] == needs[4]
    for name in ("bytes", "memory"):
        sizes = [rows[arm][name] for arm in ("teacher", "student", "pruned", "int8")]
        assert sizes == sorted(sizes, reverse=True)
    assert rows["teacher"]["bytes"] > 4 * sum(
        value.numel() for value in lesson["new_teacher"](0, lesson["BACKBONES"]).parameters()
    )


def table_of(lost: float) -> pd.DataFrame:
    """Ten seeds in which int8 loses that share of the teacher's pictures, and the sizes are as they are."""
    rng = np.random.default_rng(0)
    rows = []
    for seed in range(10):
        teacher = rng.random(3000) < 0.96
        int8 = teacher & (rng.random(3000) >= lost)
        rows += [
            {"seed": seed, "arm": arm, "multiplications": count, "bytes": size, "memory": size, "hits": pack_hits(found)}
            for arm, count, size, found in (
                ("teacher", 39, 3400, teacher),
                ("student", 22, 1700, teacher),
                ("cut", 14, np.nan, teacher & (rng.random(3000) < 0.8)),
                ("pruned", 9, 750, int8),
                ("int8", 9, 200, int8),
            )
        ]
    return pd.DataFrame(rows)


def test_every_test_digit_is_asked_on_several_grounds(lesson: dict) -> None:
    asked, test, grounds = lesson["asked"](), lesson["test"], lesson["GROUNDS"]
    assert len(asked) == grounds * len(test)
    assert asked.labels.view(grounds, -1).eq(test.labels).all()  # the same digits in the same order
    assert torch.equal(asked.pictures[: len(test)], test.pictures)
    assert not torch.equal(asked.pictures[len(test) : 2 * len(test)], test.pictures)
    found = np.arange(grounds * 1000) % 7 < 3
    table = pd.DataFrame([{"seed": 0, "arm": "int8", "hits": pack_hits(found)}])
    (shares,), seeds = lesson["arm_of"](table, "int8")
    assert shares.shape == (1000,) and shares[4] == pytest.approx(found[[4, 1004, 2004]].mean()) and seeds == [0]


@pytest.mark.parametrize(("lost", "holds"), [(0.0, True), (0.03, False)])
def test_the_claim_of_the_title_falls_where_three_pictures_in_a_hundred_are_lost(
    lost: float, holds: bool, lesson: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COURSE_STRICT", raising=False)
    claims = Claims("13", tmp_path)
    lesson["stored_claims"](table_of(lost), claims)
    records = claims.table().set_index("claim")["holds"]
    (title,) = [name for name in records.index if "point of accuracy" in name]
    assert records[title] == holds
    assert records.drop(title).all()


def test_the_lesson_takes_what_the_search_found_and_no_end_of_the_grid(lesson: dict) -> None:
    table = stored("13_recipes")
    grid = lesson["GRID"]
    assert len(table) == len(grid["arm"]) * len(grid["rate"]) * len(grid["seed"])
    assert not set(table["seed"]) & set(range(300))
    found = table.groupby(["arm", "rate"])["validation"].mean()
    for arm in grid["arm"]:
        assert set(found[arm].index) == set(grid["rate"])
        assert lesson["RECIPES"][arm] == found[arm].idxmax()
        assert min(grid["rate"]) < found[arm].idxmax() < max(grid["rate"])


def test_the_stored_table_has_ten_seeds_of_every_arm() -> None:
    table = stored("13_smaller_and_faster")
    assert table.groupby("arm")["seed"].nunique().to_dict() == dict.fromkeys(("teacher", "student", "cut", "pruned", "int8"), 10)
