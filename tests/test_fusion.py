"""The room `fusion`: branches with their own transforms, heads, and what is refused before training."""

from typing import Any

import pytest
import torch
from torch import nn

from course_utils.backbones import Backbone, Classifier, load_backbone
from course_utils.data import Split, augmentation, batches
from course_utils.evaluate import hits, predict
from course_utils.features import cached_features
from course_utils.fusion import Branches, Fusion
from course_utils.training import adamw, fit, unfreeze_top
from tests.test_fit import weights
from tests.test_lessons import cells


def toy_backbone(name: str, width: int, scale: float = 1.0, side: int | None = None) -> Backbone:
    """A small backbone whose transform multiplies, and cuts to a side if one is given."""
    layers = nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Backbone(name, layers, width, lambda pictures: scale * pictures[..., :side, :side].float() / 255)


@pytest.fixture
def pictures() -> Split:
    drawn = torch.randint(256, (12, 3, 10, 10), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    return Split(drawn, torch.arange(12) % 3, ("a", "b", "c"))


def test_each_branch_gets_its_own_version_of_the_same_picture(pictures: Split) -> None:
    torch.manual_seed(0)
    first, second = toy_backbone("first", 5), toy_backbone("second", 7, scale=-3.0)
    both = Branches([first, second])
    assert (both.name, both.widths, both.width) == ("first+second", [5, 7], 12)
    expected = torch.cat([predict(first, pictures), predict(second, pictures)], dim=1)
    assert torch.allclose(predict(both, pictures), expected, atol=1e-6)
    version = both.transform(pictures.pictures)
    assert version.shape == (12, 6, 10, 10) and torch.allclose(version[:, 3:], -3 * version[:, :3])


def test_augmentation_moves_all_versions_alike(pictures: Split) -> None:
    both = Branches([toy_backbone("first", 5), toy_backbone("second", 5)])
    augment = augmentation(brightness=0.0)
    shown, _ = next(iter(batches(pictures, both.transform, size=12, augment=augment).epoch(0)))
    assert torch.equal(shown[:, :3], shown[:, 3:])


def test_a_cache_of_branches_follows_the_transform_of_each(pictures: Split, tmp_path) -> None:
    torch.manual_seed(0)
    first, second = toy_backbone("first", 5), toy_backbone("second", 5)
    cached_features(Branches([first, second]), pictures, tmp_path / "kept")
    second.transform = lambda drawn: drawn.float()
    with pytest.raises(RuntimeError, match="made with other transform"):
        cached_features(Branches([first, second]), pictures, tmp_path / "kept")


def test_branches_of_other_sizes_and_no_branches_are_refused() -> None:
    with pytest.raises(ValueError, match=r"small.*\(3, 8, 8\)"):
        Branches([toy_backbone("large", 5), toy_backbone("small", 5, side=8)])
    with pytest.raises(ValueError, match="one backbone or more"):
        Branches([])
    grey = Backbone("grey", nn.Flatten(), 5, lambda pictures: pictures[..., :1, :, :].float())
    with pytest.raises(ValueError, match=r"colour pictures.*\(1, 48, 64\)"):
        Branches([grey, grey])
    both = Branches([toy_backbone("first", 5), toy_backbone("second", 7)])
    for shape in ((2, 3, 10, 10), (2, 9, 10, 10), (6, 10, 10)):
        with pytest.raises(ValueError, match=r"first\+second takes \(n, 6, height, width\)"):
            both(torch.zeros(shape))


def test_tables_are_set_side_by_side_and_those_that_do_not_belong_together_are_refused() -> None:
    side_by_side = cells("07", "side-by-side", torch=torch)["side_by_side"]
    a, b, keys = torch.rand(4, 2), torch.rand(4, 3), torch.arange(4)
    assert torch.equal(side_by_side([a, b], [keys, keys]), torch.cat([a, b], dim=1))
    with pytest.raises(ValueError, match="one source or more"):
        side_by_side([], [])
    for own in (keys, keys[:3]):
        with pytest.raises(ValueError, match="source 1 has 3 rows for 4 pictures"):
            side_by_side([a, b[:3]], [keys, own])
    with pytest.raises(ValueError, match=r"source 1 .* in another order"):
        side_by_side([a, b], [keys, keys.flip(0)])
    b[2, 1] = float("nan")
    with pytest.raises(ValueError, match="source 1 has a feature that is not finite"):
        side_by_side([a, b], [keys, keys])


@pytest.mark.parametrize("how", ["concat", "gated", "attention"])
@pytest.mark.parametrize("widths", [[4], [4, 9], [3, 8, 5]])
def test_a_fusion_takes_any_number_of_sources_of_any_width(how: str, widths: list[int]) -> None:
    head = Fusion(widths, 6, how, width=7)
    assert head(torch.randn(10, sum(widths))).shape == (10, 6)
    assert head.out_features == 6


@pytest.mark.parametrize("how", ["concat", "gated", "attention"])
def test_the_scale_of_a_source_does_not_matter(how: str) -> None:
    torch.manual_seed(0)
    head, features = Fusion([4, 5], 3, how, dropout=0.0).train(), torch.randn(30, 9)
    louder = features * torch.cat([torch.ones(4), torch.full((5,), 1000.0)])
    assert torch.allclose(head(features), head(louder), atol=1e-3)


def test_shares_sum_to_one_and_decide() -> None:
    torch.manual_seed(0)
    features = torch.randn(10, 12)
    for how, width in (("gated", 7), ("attention", 1)):
        shares = Fusion([4, 5, 3], 2, how, width=7).eval().shares(features)
        assert shares.shape == (10, 3, width)
        assert torch.allclose(shares.sum(dim=1), torch.ones(10, width))
    head = Fusion([4, 5], 2, "gated", width=7).eval()
    with torch.no_grad():  # all shares to the first source
        head.score.weight.zero_()
        head.score.bias.copy_(torch.tensor([100.0] * 7 + [0.0] * 7))
        other = features[:, :9].clone()
        other[:, 4:] += 1
        assert torch.allclose(head(features[:, :9]), head(other))
        other[:, :4] += 1
        assert not torch.allclose(head(features[:, :9]), head(other))


def test_a_fusion_refuses_what_it_cannot_use() -> None:
    with pytest.raises(ValueError, match="one source or more"):
        Fusion([], 3)
    with pytest.raises(ValueError, match="concat, gated, attention, not 'sum'"):
        Fusion([4], 3, "sum")
    with pytest.raises(ValueError, match=r"widths \[4, 5\] make \(n, 9\), not \(2, 8\)"):
        Fusion([4, 5], 3)(torch.zeros(2, 8))
    assert Fusion([4, 5], 3).eval().shares(torch.zeros(2, 9)) is None
    head, spoilt = Fusion([4, 5], 3).train(), torch.zeros(6, 9)
    spoilt[2, 7] = float("nan")
    with pytest.raises(ValueError, match="not finite"):
        head(spoilt)
    assert torch.isfinite(head.norms[1].running_mean).all()


def test_fit_and_hits_and_freezing_take_fused_networks_as_any_other(pictures: Split) -> None:
    torch.manual_seed(0)
    both = Branches([toy_backbone("first", 5), toy_backbone("second", 7, scale=-2.0)])
    model: Any = Classifier(both, 3)
    model.head = Fusion(both.widths, 3)
    before, head = weights(both), weights(model.head)
    data = batches(pictures, model.transform, size=6, steps=2)
    fit(model, data, optimizer=adamw(0.01, 0.02), unfreeze=lambda model, epoch: unfreeze_top(model, 0))
    assert torch.equal(weights(both), before) and not torch.equal(weights(model.head), head)
    fit(model, data, optimizer=adamw(0.01, 0.02), unfreeze=lambda model, epoch: unfreeze_top(model, 1))
    assert not torch.equal(weights(both), before)
    assert hits(model, pictures).shape == (12,)
    with pytest.raises(ValueError, match="3 classes and the pictures have 4"):
        hits(model, Split(pictures.pictures, pictures.labels, ("a", "b", "c", "d")))


def test_one_branch_is_the_backbone_itself(pictures: Split) -> None:
    backbone = load_backbone("vgg_near")
    torch.manual_seed(0)
    alone = Classifier(backbone, 3)
    joined: Any = Classifier(Branches([backbone]), 3)
    joined.head = alone.head
    enlarged = Split(pictures.pictures.repeat(1, 1, 2, 2), pictures.labels, pictures.classes)
    assert torch.allclose(predict(alone, enlarged), predict(joined, enlarged), atol=1e-5)
