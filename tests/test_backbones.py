"""Backbones: their shapes, their weights and cards, and what happens where a file is missing or altered."""

import hashlib
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from course_utils import backbones
from course_utils.backbones import EMBEDDED, Classifier, WeightsError, centred, load_backbone, read_card
from course_utils.data.letters import LETTERS, letters
from course_utils.paths import WEIGHTS

LIMIT = 8_000_000  # bytes of all embedded weights together


@pytest.fixture
def copied_weights(tmp_path, monkeypatch):
    """A copy of data/weights that a test may spoil."""
    for file in WEIGHTS.glob("vgg_near.*"):
        shutil.copy(file, tmp_path)
    monkeypatch.setattr(backbones, "WEIGHTS", tmp_path)
    return tmp_path


def test_the_course_ships_six_backbones_in_eight_megabytes():
    files = sorted(WEIGHTS.glob("*.safetensors"))
    assert [file.stem for file in files] == sorted(EMBEDDED)
    assert len(files) == 6
    assert sum(file.stat().st_size for file in files) <= LIMIT


@pytest.mark.parametrize("name", EMBEDDED)
def test_every_card_tells_where_its_weights_come_from(name):
    card = read_card(name)
    content = (WEIGHTS / f"{name}.safetensors").read_bytes()
    assert card["command"] == f"python tools/pretrain.py {name}"
    assert card["sha256"] == hashlib.sha256(content).hexdigest() and card["bytes"] == len(content)
    assert card["licence"] and isinstance(card["seed"], int) and 0 < card["accuracy"] < 1
    assert card["accuracy"] == card["accuracy_by_epoch"][-1]


@pytest.mark.parametrize("name", EMBEDDED)
def test_a_backbone_gives_features_and_its_weights_are_those_of_the_file(name):
    backbone = load_backbone(name).eval()
    assert backbone(torch.randn(2, 3, 32, 32)).shape == (2, backbone.width)
    stored = load_file(WEIGHTS / f"{name}.safetensors")
    loaded = backbone.layers.state_dict()
    assert stored.keys() == loaded.keys() and all(torch.equal(stored[key].to(loaded[key].dtype), loaded[key]) for key in stored)


def test_without_pretraining_the_weights_are_random_and_follow_the_seed():
    torch.manual_seed(1)
    first = load_backbone("vgg_near", pretrained=False)
    second = load_backbone("vgg_near", pretrained=False)
    torch.manual_seed(1)
    again = load_backbone("vgg_near", pretrained=False)
    pictures = torch.randn(2, 3, 32, 32)
    assert torch.equal(first(pictures), again(pictures))
    assert not torch.equal(first(pictures), second(pictures))
    assert not first.card


@pytest.mark.parametrize("variant", ["near", "far"])
@pytest.mark.parametrize("net", ["vgg", "resnet"])
def test_a_letters_backbone_knows_its_letters(net, variant):
    """Class means of its features, taken from 20 letters a class, name a held-out letter far above chance (1 in 52)."""
    backbone = load_backbone(f"{net}_{variant}").eval()
    with torch.inference_mode():
        train, valid = letters(variant, "train", 1040), letters(variant, "valid", 300)
        features, held_out = backbone(centred(train.pictures)), backbone(centred(valid.pictures))
    present = [label for label in range(len(LETTERS)) if (train.labels == label).any()]
    means = torch.stack([features[train.labels == label].mean(dim=0) for label in present])
    found = torch.tensor(present)[torch.cdist(held_out, means).argmin(dim=1)]
    assert (found == valid.labels).float().mean() > 0.4


def test_the_transform_centres_bytes_and_floats_alike():
    pictures = torch.tensor([0, 255], dtype=torch.uint8)
    assert centred(pictures).tolist() == [-2.0, 2.0]
    assert torch.allclose(centred(pictures), centred(pictures.float() / 255))


def test_a_classifier_puts_a_head_on_a_backbone_and_carries_its_transform():
    backbone = load_backbone("vgg_near", pretrained=False)
    model = Classifier(backbone, 7)
    assert model(torch.randn(3, 3, 32, 32)).shape == (3, 7)
    assert model.transform is backbone.transform
    with pytest.raises(ValueError, match="two classes or more, not 1"):
        Classifier(backbone, 1)


def test_missing_weights_say_how_to_get_them(copied_weights):
    (copied_weights / "vgg_near.safetensors").unlink()
    with pytest.raises(WeightsError, match=r"vgg_near\.safetensors are missing: .*git checkout .*tools/pretrain\.py vgg_near"):
        load_backbone("vgg_near")


def test_a_missing_or_broken_card_says_how_to_get_it(copied_weights):
    card = copied_weights / "vgg_near.json"
    card.write_text("{")
    with pytest.raises(WeightsError, match=r"the card vgg_near\.json .* missing or broken"):
        load_backbone("vgg_near")
    card.unlink()
    with pytest.raises(WeightsError, match=r"the card vgg_near\.json .* missing or broken"):
        load_backbone("vgg_near")


def test_altered_weights_are_refused(copied_weights):
    path = copied_weights / "vgg_near.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(WeightsError, match="were altered"):
        load_backbone("vgg_near")


def test_weights_of_another_network_are_refused(copied_weights):
    path = copied_weights / "vgg_near.safetensors"
    save_file({"weight": torch.zeros(2)}, path)
    card = read_card("vgg_near") | {"sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    (copied_weights / "vgg_near.json").write_text(json.dumps(card))
    with pytest.raises(WeightsError, match="are of another network"):
        load_backbone("vgg_near")


def test_a_backbone_that_does_not_exist_is_named():
    with pytest.raises(ValueError, match="resnet_naer"):
        load_backbone("resnet_naer")


@pytest.mark.parametrize(
    ("pictures", "got"),
    [
        (torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "uint8"),
        (torch.zeros(2, 1, 32, 32), r"\(2, 1, 32, 32\)"),
        (torch.zeros(3, 32, 32), r"\(3, 32, 32\)"),
    ],
)
def test_pictures_that_did_not_go_through_the_transform_are_refused(pictures, got):
    with pytest.raises(ValueError, match=f"vgg_near takes float pictures .* from its own transform, not .*{got}"):
        Classifier(load_backbone("vgg_near"), 10)(pictures)
