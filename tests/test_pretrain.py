"""The weights are made by our own script: its beginning is run again, and lands where the card says."""

import json
import os
import subprocess
import sys
from itertools import pairwise

import pytest
import torch

from course_utils import backbones
from course_utils.backbones import EMBEDDED, WIDTH, Backbone, Classifier, centred, load_backbone, read_card
from course_utils.data import few_shot, mnist_m
from course_utils.evaluate import accuracy
from course_utils.paths import ROOT
from tools import pretrain


def test_the_first_half_minute_of_pretraining_lands_where_the_card_says():
    """One epoch of the photo backbone, on the schedule of the whole run; chance would be one pair in 256."""
    _, scores = pretrain.pretrain("resnet_photos", epochs=1)
    card = read_card("resnet_photos")["accuracy_by_epoch"]
    assert scores == [pytest.approx(card[0], abs=0.05)]
    assert scores[0] > 5 / 256


def test_shuffled_labels_are_the_same_labels_on_other_pictures():
    drawn = pretrain.letters("near", "train", 200)
    dealt = pretrain.shuffled(drawn)
    assert torch.equal(dealt.pictures, drawn.pictures)
    assert torch.equal(dealt.labels.sort().values, drawn.labels.sort().values)
    assert (dealt.labels == drawn.labels).float().mean() < 0.2


def test_the_card_of_the_control_tells_of_no_learning():
    """Labels dealt out at random teach nothing about letters that were held out: 52 classes, 4,000 letters."""
    assert all(abs(score - 1 / 52) < 0.01 for score in read_card("resnet_shuffled")["accuracy_by_epoch"])


@pytest.mark.parametrize("name", [name for name in EMBEDDED if name != "resnet_shuffled"])
def test_a_card_tells_of_learning(name):
    scores = read_card(name)["accuracy_by_epoch"]
    assert scores[-1] > 2 * scores[0] or scores[-1] > 0.9
    assert sum(later > earlier for earlier, later in pairwise(scores)) > len(scores) / 2


def test_photographs_alone_teach_something_about_digits():
    """The frozen probe on MNIST-M stands fifteen points or more above the same net untrained."""
    few, test = few_shot(mnist_m("train"), 100, seed=0), mnist_m("test")

    def probe(pretrained: bool) -> float:
        torch.manual_seed(0)
        backbone = load_backbone("resnet_photos", pretrained).eval()
        with torch.inference_mode():
            features = backbone(centred(few.pictures))
            mean, spread = features.mean(dim=0), features.std(dim=0) + 1e-6
        model = Classifier(backbone, 10)
        rows = ((features - mean) / spread).clone()
        optimizer = torch.optim.LBFGS(model.head.parameters(), max_iter=200)

        def closure():
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(model.head(rows), few.labels) + 1e-3 * model.head.weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        with torch.no_grad():
            model.head.bias -= model.head.weight @ (mean / spread)
            model.head.weight /= spread
        return accuracy(model, test)

    assert probe(True) > probe(False) + 0.15


def test_weights_and_card_are_written_together_and_can_be_loaded(tmp_path, monkeypatch):
    torch.manual_seed(3)
    trained = Backbone("vgg_far", EMBEDDED["vgg_far"](), WIDTH, centred)
    pretrain.write(trained, [0.1, 0.5], tmp_path)
    monkeypatch.setattr(backbones, "WEIGHTS", tmp_path)
    loaded = load_backbone("vgg_far")
    pictures = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded.eval()(pictures), trained.eval()(pictures))
    card = json.loads((tmp_path / "vgg_far.json").read_text())
    assert card["accuracy"] == 0.5 and card["command"] == "python tools/pretrain.py vgg_far"


def test_half_precision_loses_less_than_a_thousandth(tmp_path, monkeypatch):
    torch.manual_seed(3)
    trained = Backbone("resnet_photos", EMBEDDED["resnet_photos"](), WIDTH, centred)
    pretrain.write(trained, [0.1, 0.5], tmp_path)
    monkeypatch.setattr(backbones, "WEIGHTS", tmp_path)
    features = load_backbone("resnet_photos").eval()(torch.ones(1, 3, 32, 32))
    assert torch.allclose(features, trained.eval()(torch.ones(1, 3, 32, 32)), atol=1e-3)
    assert (tmp_path / "resnet_photos.safetensors").stat().st_size < 0.6 * 1_537_096


def test_two_views_of_a_patch_differ_and_have_the_size_of_a_picture():
    patches = centred(pretrain.photo_patches("valid", 4).pictures)
    first, second = pretrain.view(patches), pretrain.view(patches)
    assert first.shape == (4, 3, 32, 32)
    assert not torch.allclose(first, second)


def test_the_contrastive_loss_is_low_when_views_find_each_other():
    class Known(torch.nn.Module):
        """Features that say which patch a view came from, or that mislead."""

        def __init__(self, shift: int) -> None:
            super().__init__()
            self.shift = shift

        def forward(self, views):
            half = len(views) // 2
            return torch.eye(half)[torch.cat([torch.arange(half), (torch.arange(half) + self.shift) % half])]

    patches = torch.zeros(8, 3, 48, 48)
    right = pretrain.contrastive_step(Known(0), (patches, None), 0.0)["nt_xent"]
    wrong = pretrain.contrastive_step(Known(1), (patches, None), 0.0)["nt_xent"]
    assert right < 0.2 < 2 < wrong


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["resnet_naer"], "no embedded backbone 'resnet_naer'"),
        (["vgg_near", "--epochs", "1"], "to another folder given with --out"),
    ],
)
def test_a_wrong_call_is_refused_before_any_work(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["pretrain.py", *arguments])
    monkeypatch.setattr(pretrain, "pretrain", lambda *_: pytest.fail("work was begun"))
    with pytest.raises(SystemExit) as caught:
        pretrain.main()
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_the_command_of_the_cards_starts_from_any_folder(tmp_path):
    command = [sys.executable, str(ROOT / "tools/pretrain.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": ""})
    assert done.returncode == 0, done.stderr
