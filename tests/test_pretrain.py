"""The weights are made by our own script: its beginning is run again, and lands where the card says."""

import json
from itertools import pairwise

import pytest
import torch

from course_utils import backbones
from course_utils.backbones import EMBEDDED, WIDTH, Backbone, Classifier, centred, load_backbone, read_card
from course_utils.data import few_shot, mnist_m
from course_utils.evaluate import accuracy
from tools import pretrain


def test_the_first_half_minute_of_pretraining_lands_where_the_card_says():
    """One epoch of the photo backbone, on the schedule of the whole run; chance would be one pair in 256."""
    _, scores = pretrain.pretrain("resnet_photos", epochs=1)
    card = read_card("resnet_photos")["accuracy_by_epoch"]
    assert scores == [pytest.approx(card[0], abs=0.05)]
    assert scores[0] > 5 / 256


@pytest.mark.parametrize("name", EMBEDDED)
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
