"""The cache of features: the backbone runs once, and a cache of anything else is refused."""

import pytest
import torch
from safetensors.torch import load, save

from course_utils.backbones import Backbone, centred, load_backbone
from course_utils.data import Split
from course_utils.evaluate import predict
from course_utils.features import CacheError, cached_features, stage_features
from tests.test_fit import PictureList, toy_split
from tests.test_lessons import cells

SPLIT = toy_split(side=32)


def layer_features(backbone: Backbone, split: Split, name: str) -> torch.Tensor:
    """What lesson 03's own cell reads."""
    return cells("03", "layer", torch=torch, predict=predict)["layer_features"](backbone, split, name)


class Counting(torch.nn.Module):
    """Layers that count how often they are run."""

    runs = 0

    def forward(self, pictures):
        Counting.runs += 1
        return pictures.mean(dim=(2, 3))


def counting() -> Backbone:
    return Backbone("counting", torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), Counting()), 4, centred)


def test_features_are_computed_once_and_read_back_to_the_bit(tmp_path) -> None:
    backbone = counting()
    expected = predict(backbone, SPLIT)
    Counting.runs = 0
    first = cached_features(backbone, SPLIT, tmp_path / "made" / "features")
    assert Counting.runs > 0
    Counting.runs = 0
    again = cached_features(backbone, SPLIT, tmp_path / "made" / "features")
    assert Counting.runs == 0
    assert torch.equal(first, expected) and torch.equal(again, expected)
    for features in (first, again):
        torch.nn.Linear(4, 2)(features).sum().backward()  # a head learns from either
    assert first.shape == (len(SPLIT), 4)


def test_pictures_that_are_read_one_by_one_have_the_same_cache(tmp_path) -> None:
    backbone = load_backbone("vgg_far")
    first = cached_features(backbone, SPLIT, tmp_path / "features")
    assert torch.equal(cached_features(backbone, PictureList(SPLIT), tmp_path / "features"), first)


@pytest.fixture
def cache(tmp_path):
    backbone, path = load_backbone("resnet_far"), tmp_path / "features"
    cached_features(backbone, SPLIT, path)
    return backbone, path


def other_weights(backbone, split):
    with torch.no_grad():
        next(backbone.layers.parameters())[0, 0, 0, 0] += 1e-3
    return backbone, split


def other_statistics(backbone, split):
    next(buffer for name, buffer in backbone.layers.named_buffers() if "running_mean" in name)[0] += 1e-3
    return backbone, split


def other_last_picture(backbone, split):
    pictures = split.pictures.clone()
    pictures[-1, 2, -1, -1] ^= 1
    return backbone, Split(pictures, split.labels, split.classes)


def other_shape(backbone, split):
    """The same bytes in the same order, as pictures of another shape."""
    count, channels, height, width = split.pictures.shape
    return backbone, Split(split.pictures.reshape(count, channels, height // 2, 2 * width), split.labels, split.classes)


def other_layers(backbone, split):
    backbone.layers = torch.nn.Sequential(*backbone.layers, torch.nn.ReLU())
    return backbone, split


def other_transform(backbone, split):
    backbone.transform = lambda pictures: centred(pictures) * 1.01
    return backbone, split


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (other_weights, "weights"),
        (other_statistics, "weights"),
        (other_layers, "layers"),
        (other_transform, "transform"),
        (other_last_picture, "pictures"),
        (other_shape, "pictures"),
        (lambda backbone, split: (backbone, split.subset(range(50))), "pictures"),
        (lambda backbone, split: (backbone, split.subset(range(len(split))[::-1])), "pictures"),
    ],
)
def test_a_stale_cache_is_refused_by_name_and_left_alone(cache, change, what: str) -> None:
    backbone, path = cache
    before = path.read_bytes()
    with pytest.raises(CacheError, match=f"features was made with other {what}: remove it"):
        cached_features(*change(backbone, SPLIT), path)
    assert path.read_bytes() == before


def altered(content: bytes) -> bytes:
    return content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda content: content[:-100], "damaged"),
        (lambda content: b"", "damaged"),
        (lambda content: b"features", "damaged"),
        (lambda content: save({"other": torch.ones(3)}), "no cache of features"),
        (lambda content: save(load(content)), "made with other layers"),
        (altered, "altered after it was written"),
    ],
)
def test_a_spoilt_cache_is_refused(cache, spoil, why: str) -> None:
    backbone, path = cache
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(CacheError, match=why):
        cached_features(backbone, SPLIT, path)


def test_a_layer_is_read_by_name_as_it_was_before_the_next_one_wrote_into_it() -> None:
    backbone = load_backbone("vgg_near").eval()
    norm = backbone.layers[0][1]  # an in-place ReLU comes next
    with torch.inference_mode():
        expected = norm(backbone.layers[0][0](centred(SPLIT.pictures))).mean(dim=(2, 3))
    found = layer_features(backbone, SPLIT, "0.1")
    assert torch.allclose(found, expected, atol=1e-5) and (found < 0).any()
    assert not any(module._forward_hooks for module in backbone.modules())


@pytest.mark.parametrize(("net", "pooled"), [("vgg_near", False), ("resnet_near", True)])
def test_the_last_layer_and_the_last_stage_stand_before_the_head(net: str, pooled: bool) -> None:
    backbone = load_backbone(net)
    expected = predict(backbone, SPLIT)
    read = stage_features(backbone, SPLIT)
    assert [len(features) for features in read] == [len(SPLIT)] * 4
    # A ResNet's last stage holds the average over the pixels; behind a VGG's there is one more pooling.
    assert torch.allclose(read[-1], expected, atol=1e-5) == pooled
    (*_, name) = dict(backbone.layers.named_children())
    assert torch.equal(layer_features(backbone, SPLIT, name), expected)


def test_a_layer_that_does_not_exist_is_named_with_those_that_do() -> None:
    with pytest.raises(ValueError, match=r"there is no layer 'fc7', but '0', '1', '2', and those within them$"):
        layer_features(load_backbone("vgg_near"), SPLIT, "fc7")


def test_a_layer_that_runs_twice_a_picture_is_refused() -> None:
    """torchvision's residual blocks have one ReLU in two places: what stands after it is not one row a picture."""
    with pytest.raises(ValueError, match=r"'1\.relu' runs more than once: read after the block"):
        layer_features(load_backbone("resnet_near"), SPLIT, "1.relu")
    relu = torch.nn.ReLU()
    layers = [torch.nn.Conv2d(3, 4, 3), relu, torch.nn.Conv2d(4, 4, 3, stride=2), relu, torch.nn.Flatten()]
    twice = Backbone("twice", torch.nn.Sequential(*layers), 4, centred)
    with pytest.raises(ValueError, match="twice does not run the last layer of a stage once a picture"):
        stage_features(twice, SPLIT)


def test_no_hook_stays_on_a_network_that_stopped() -> None:
    backbone = load_backbone("vgg_near")
    grey = Split(SPLIT.pictures[:, :1], SPLIT.labels, SPLIT.classes)
    for read in (stage_features, lambda *given: layer_features(*given, "0.1")):
        with pytest.raises(ValueError, match="not torch"):
            read(backbone, grey)
    assert not any(module._forward_hooks for module in backbone.modules())
