"""The training loop: what it minimises, when it stops, and that an interrupted run ends as an uninterrupted one."""

import errno
import os
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from course_utils.backbones import WIDTH, Backbone, Classifier, centred
from course_utils.data import Split, augmentation, batches
from course_utils.data.batches import DeviceBatches, LoaderBatches
from course_utils.training import CheckpointError, adamw, constant, fit, one_cycle, sgd, supervised
from course_utils.training.checkpoint import RunState, save_checkpoint


def toy_split(count: int = 96, side: int = 8) -> Split:
    """Two classes that differ in brightness."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % 2
    pictures = torch.randint(0, 150, (count, 3, side, side), generator=generator) + 100 * labels.view(-1, 1, 1, 1)
    return Split(pictures.to(torch.uint8), labels, ("dark", "bright"))


def toy_model(seed: int = 0, dropout: float = 0.0, classes: int = 2) -> Classifier:
    torch.manual_seed(seed)
    layers = nn.Sequential(
        nn.Conv2d(3, WIDTH, 3), nn.BatchNorm2d(WIDTH), nn.ReLU(), nn.Dropout(dropout), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )
    return Classifier(Backbone("toy", layers, WIDTH, centred), classes)


def toy_batches(device="cpu", **settings):
    return batches(toy_split(), centred, **{"size": 16, "seed": 3, "device": device, **settings})


def weights(model: nn.Module) -> torch.Tensor:
    return torch.cat([value.flatten().float().cpu() for value in model.state_dict().values()])


class PictureList:
    """The same pictures as a split, but not one in memory: `batches` reads it through a DataLoader."""

    def __init__(self, split: Split) -> None:
        self.split, self.labels, self.classes = split, split.labels, split.classes

    def __len__(self):
        return len(self.split)

    def __getitem__(self, index):
        return self.split[index]

    def subset(self, indices):
        return PictureList(self.split.subset(indices))


def test_fit_does_what_the_plain_loop_does(device):
    ours, plain = toy_model().to(device), toy_model().to(device)
    data = toy_batches(device)
    history = fit(ours, data, epochs=2, optimizer=sgd(lr=0.1, momentum=0.5), schedule=constant)

    plain.to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.5, weight_decay=5e-4, nesterov=True)
    losses = []
    for epoch in range(2):
        for pictures, labels in data.epoch(epoch):
            loss = F.cross_entropy(plain(pictures.contiguous(memory_format=torch.channels_last)), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    # A GPU adds up in no fixed order.
    same = torch.equal if device.type == "cpu" else lambda a, b: torch.allclose(a, b, atol=1e-4)
    assert same(weights(ours), weights(plain))
    assert history["cross_entropy"].tolist() == pytest.approx([np.mean(losses[:6]), np.mean(losses[6:])])
    assert history["epoch"].tolist() == [1, 2]
    assert not ours.training


def test_fit_learns_what_can_be_learned(device):
    model = toy_model().to(device)
    history = fit(model, toy_batches(device), epochs=5, optimizer=adamw(lr=0.01))
    assert history["cross_entropy"].iloc[-1] < 0.3 < history["cross_entropy"].iloc[0]


def test_the_sum_of_the_losses_is_minimised_and_each_is_recorded():
    def halves(model, batch, progress):
        loss = supervised(model, batch, progress)["cross_entropy"]
        return {"first": 0.25 * loss, "second": 0.75 * loss}

    split_up, whole = toy_model(), toy_model()
    history = fit(split_up, toy_batches(), step=halves, optimizer=sgd())
    expected = fit(whole, toy_batches(), optimizer=sgd())
    assert torch.allclose(weights(split_up), weights(whole), atol=1e-5)
    assert (history["first"] + history["second"]).tolist() == pytest.approx(expected["cross_entropy"].tolist(), rel=1e-4)


def test_every_group_keeps_its_own_rate_under_a_schedule():
    seen = []

    def watch(model, batch, progress):
        seen.append((progress, [group["lr"] for group in optimizers[0].param_groups]))
        return supervised(model, batch, progress)

    optimizers = []

    def recipe(model):
        optimizers.append(adamw(lr=0.001, head_lr=0.01)(model))
        return optimizers[0]

    fit(toy_model(), toy_batches(), step=watch, epochs=2, optimizer=recipe, schedule=one_cycle(0.25))
    assert [progress for progress, _ in seen] == pytest.approx([number / 12 for number in range(12)])
    for progress, (body, head) in seen:
        assert (body, head) == pytest.approx((0.001 * one_cycle(0.25)(progress), 0.01 * one_cycle(0.25)(progress)))


def test_one_cycle_rises_to_one_and_falls_to_zero():
    factor = one_cycle(0.2)
    assert [factor(0), factor(0.1), factor(0.2), factor(0.6), factor(1.0)] == pytest.approx([0, 0.5, 1, 0.5, 0])


def test_a_schedule_is_asked_before_every_step():
    history = fit(toy_model(), toy_batches(), epochs=2, optimizer=sgd(lr=0.1), schedule=lambda progress: 1 - progress)
    assert history["lr"].tolist() == pytest.approx([0.1 * 7 / 12, 0.1 * 1 / 12])


def test_the_head_has_a_rate_of_its_own():
    model = toy_model()
    body, head = sgd(lr=0.1, head_lr=0.5)(model).param_groups
    assert head["params"] == list(model.head.parameters()) and head["lr"] == 0.5
    assert body["params"] == list(model.backbone.parameters()) and body["lr"] == 0.1


def test_early_stopping_puts_the_best_weights_back():
    model = toy_model()
    scores = iter([0.5, 0.9, 0.8, 0.7, 1.0])
    kept = []

    def validate(model):
        kept.append(weights(model).clone())
        return next(scores)

    history = fit(model, toy_batches(), epochs=5, validate=validate, patience=2)
    assert history["validation"].tolist() == [0.5, 0.9, 0.8, 0.7]
    assert torch.equal(weights(model), kept[1])


def test_without_patience_the_last_weights_stay():
    model, kept = toy_model(), []

    def validate(model):
        kept.append(weights(model).clone())
        return -float(len(kept))

    fit(model, toy_batches(), epochs=3, validate=validate)
    assert torch.equal(weights(model), kept[-1])


def test_a_loss_that_is_not_finite_stops_and_names_the_step():
    def breaks(model, batch, progress):
        losses = supervised(model, batch, progress)
        return losses | {"domain": losses["cross_entropy"] * (float("nan") if progress >= 0.75 else 1.0)}

    with pytest.raises(FloatingPointError, match=r"step 4 of epoch 2: the loss 'domain' is not finite .*smaller learning rate"):
        fit(toy_model(), toy_batches(), step=breaks, epochs=2)


def test_clipping_bounds_the_gradient():
    norms = []

    class Watch(torch.optim.SGD):
        def step(self, closure=None):
            gradients = [parameter.grad for group in self.param_groups for parameter in group["params"]]
            norms.append(float(torch.stack([gradient.norm() for gradient in gradients]).norm()))

    def recipe(model):
        return Watch(model.parameters(), lr=0.1)

    fit(toy_model(), toy_batches(), optimizer=recipe)
    assert min(norms) > 0.01
    norms.clear()
    fit(toy_model(), toy_batches(), optimizer=recipe, clip=0.01)
    assert max(norms) <= 0.01 * 1.001


def test_bfloat16_computes_in_bfloat16_and_learns(device):
    seen = set()

    def watch(model, batch, progress):
        seen.add(model(batch[0]).dtype)
        return supervised(model, batch, progress)

    model = toy_model().to(device)
    history = fit(model, toy_batches(device), step=watch, epochs=5, optimizer=adamw(lr=0.01), precision="bfloat16")
    assert seen == {torch.bfloat16}
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    assert history["cross_entropy"].iloc[-1] < 0.3


def test_float16_scales_the_loss_and_unscales_before_clipping():
    """With a loss this small, float16 alone would lose the gradient, and a scaled gradient would be clipped."""

    def tiny(model, batch, progress):
        return {"tiny": supervised(model, batch, progress)["cross_entropy"] * 1e-4}

    def moved(**settings):
        model = toy_model()
        start = torch.cat([parameter.detach().flatten().clone() for parameter in model.parameters()])
        fit(model, toy_batches(), step=tiny, optimizer=sgd(lr=1000, momentum=0.5, weight_decay=0), **settings)
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()]) - start

    exact = moved()
    assert exact.norm() > 0.1
    assert (moved(precision="float16", clip=1.0) - exact).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize(("stop_at", "workers"), [(1, None), (2, None), (3, None), (2, 0), (2, 2)])
def test_an_interrupted_run_ends_bit_for_bit_as_an_uninterrupted_one(tmp_path, stop_at, workers):
    """Dropout draws from torch's state and the step from numpy's and Python's: all are put back, and so is the data order."""

    def new_data():
        if workers is None:
            return toy_batches(augment=augmentation())
        return batches(PictureList(toy_split()), centred, size=16, seed=3, augment=augmentation(), workers=workers)

    def noisy(model, batch, progress):
        nudge = 1 + 0.1 * (np.random.rand() + random.random())
        return {name: nudge * loss for name, loss in supervised(model, batch, progress).items()}

    def seed_all():
        random.seed(5), np.random.seed(5), torch.manual_seed(5)

    def run(model, step=noisy, **settings):
        return fit(model, new_data(), step=step, epochs=4, validate=score, patience=4, **settings)

    def score(model):
        return -float(weights(model).square().sum())

    class Killed(BaseException):
        pass

    def dies(model, batch, progress):
        if progress >= stop_at / 4 + 0.1:
            raise Killed
        return noisy(model, batch, progress)

    whole = toy_model(dropout=0.5)
    seed_all()
    expected = run(whole)

    interrupted = toy_model(dropout=0.5)
    seed_all()
    with pytest.raises(Killed):
        run(interrupted, step=dies, checkpoint=tmp_path / "run.pt")
    resumed = toy_model(seed=9, dropout=0.5)
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    history = run(resumed, checkpoint=tmp_path / "run.pt")

    assert torch.equal(weights(resumed), weights(whole))
    assert history.drop(columns="seconds").equals(expected.drop(columns="seconds"))
    again = toy_model(seed=4, dropout=0.5)
    assert run(again, checkpoint=tmp_path / "run.pt").equals(history)
    assert torch.equal(weights(again), weights(whole)), "a finished run is not trained further"


def state_of(path):
    return path.read_bytes() if path.exists() else None


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "run.pt"
    fit(toy_model(), toy_batches(), epochs=1, checkpoint=path)
    before = state_of(path)

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    model = toy_model()
    with pytest.raises(CheckpointError, match=r"could not be written .*No space left.* unchanged"):
        save_checkpoint(path, RunState({"epochs": 1}, {}), model, adamw()(model), torch.amp.GradScaler("cpu", enabled=False))
    assert state_of(path) == before
    assert os.listdir(tmp_path) == ["run.pt"]


def flip(content: bytes, place: int) -> bytes:
    return content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]


def as_torch_file(content: bytes) -> bytes:
    return content.partition(b"\n")[2]


SPOILT = {
    "cut to nothing": (lambda content: b"", "was cut short"),
    "cut in its first word": (lambda content: content[:6], "was cut short"),
    "cut in its first line": (lambda content: content[:60], "was cut short"),
    "cut after its first line": (lambda content: content[: content.index(b"\n") + 1], "was cut short"),
    "cut in half": (lambda content: content[: len(content) // 2], "was cut short"),
    "without its last byte": (lambda content: content[:-1], "was cut short"),
    "one bit altered": (lambda content: flip(content, len(content) // 2), "was altered"),
    "a bit of its hash altered": (lambda content: flip(content, content.index(b"\n") - 1), "was altered"),
    "longer": (lambda content: content + b"\0", "was altered"),
    "a text": (lambda content: b"course notes\n", "is no checkpoint of this course"),
    "torch's own file": (as_torch_file, "is no checkpoint of this course"),
    "another version": (lambda content: content.replace(b"version 2,", b"version 3,", 1), "written by another version"),
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_spoilt_checkpoint_is_refused_and_nothing_is_changed(tmp_path, how):
    path, (spoil, message) = tmp_path / "run.pt", SPOILT[how]
    fit(toy_model(), toy_batches(), epochs=1, checkpoint=path)
    path.write_bytes(spoil(path.read_bytes()))
    model, before = toy_model(seed=7), state_of(path)
    start, random_state = weights(model).clone(), torch.get_rng_state()
    with pytest.raises(CheckpointError, match=rf"run\.pt .*{message}.*: remove it, or train to another file$") as caught:
        fit(model, toy_batches(), epochs=1, checkpoint=path)
    assert "\n" not in str(caught.value)
    assert torch.equal(weights(model), start) and torch.equal(torch.get_rng_state(), random_state)
    assert state_of(path) == before


def test_every_byte_of_a_checkpoint_counts(tmp_path):
    """Torch alone reads a file with an altered weight without a word."""
    path = tmp_path / "run.pt"
    fit(toy_model(), toy_batches(), epochs=1, checkpoint=path)
    content = path.read_bytes()
    for place in torch.randint(0, len(content), (40,)).tolist():
        path.write_bytes(flip(content, place))
        with pytest.raises(CheckpointError, match="remove it"):
            fit(toy_model(), toy_batches(), epochs=1, checkpoint=path)


def test_the_leftovers_of_other_checkpoints_are_left_alone(tmp_path):
    others = {".run.pt.old.abcd1234.part", ".other.pt.abcd1234.part", "run.pt.part"}
    for name in (*others, ".run.pt.abcd1234.part"):
        (tmp_path / name).touch()
    fit(toy_model(), toy_batches(), epochs=1, checkpoint=tmp_path / "run.pt")
    assert set(os.listdir(tmp_path)) == others | {"run.pt"}


def test_another_choice_of_trained_parameters_is_refused(tmp_path):
    """As many parameters are frozen in both runs, but not the same."""

    def frozen(layer, **other):
        model = toy_model(**other)
        model.backbone.layers[layer].weight.requires_grad_(False)
        return model

    path = tmp_path / "run.pt"
    fit(frozen(0), toy_batches(), epochs=1, checkpoint=path)
    model = frozen(1, seed=5)
    start = weights(model).clone()
    with pytest.raises(
        CheckpointError, match=r"choice of trained parameters \(backbone.layers.0.weight = frozen, not group 1, b"
    ):
        fit(model, toy_batches(), epochs=1, checkpoint=path)
    assert torch.equal(weights(model), start)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    path = tmp_path / "run.pt"
    fit(toy_model(), toy_batches(), epochs=1, checkpoint=path)
    for settings, message in (
        ({"epochs": 2}, r"epochs = 1, not 2\)"),
        ({"optimizer": sgd(lr=2e-3)}, "optimizer = AdamW, not SGD"),
        ({"optimizer": adamw(lr=0.1)}, r"lr = \[0.002\], not \[0.1\]"),
        ({"optimizer": adamw(weight_decay=0.5)}, "weight_decay = 0.01, not 0.5"),
        ({"schedule": constant}, r"schedule = \[0.4, .*\], not \[1.0, 1.0, 1.0\]"),
        ({"clip": 1.0}, "clip = None, not 1.0"),
        ({"precision": "bfloat16"}, "precision = float32, not bfloat16"),
    ):
        model = toy_model(seed=5)
        start = weights(model).clone()
        with pytest.raises(CheckpointError, match=message):
            fit(model, toy_batches(), checkpoint=path, **settings)
        assert torch.equal(weights(model), start)
    with pytest.raises(CheckpointError, match="seed = 3, not 4"):
        fit(toy_model(), toy_batches(seed=4), checkpoint=path)
    with pytest.raises(CheckpointError, match="size = 16, not 12"):
        fit(toy_model(), toy_batches(size=12, steps=6), checkpoint=path)
    for other in (toy_split(94), Split(toy_split().pictures, 1 - toy_split().labels, ("a", "b")), toy_split(side=9)):
        with pytest.raises(CheckpointError, match=r"data = 96 pictures with checksum .*, not 9[46] pictures"):
            fit(toy_model(), batches(other, centred, size=16, seed=3), checkpoint=path)
    with pytest.raises(CheckpointError, match=r"another model \(head.weight = torch.float32 \(2, \d+\), not torch.float32 \(3, "):
        fit(toy_model(classes=3), toy_batches(), epochs=1, checkpoint=path)
    namesake = toy_model()
    namesake.backbone.name = "far"
    with pytest.raises(CheckpointError, match="model = toy, not far"):
        fit(namesake, toy_batches(), epochs=1, checkpoint=path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"epochs": 0}, "one epoch or more"),
        ({"precision": "float8"}, "no precision 'float8'; there are float32, bfloat16, float16"),
        ({"patience": 2}, "early stopping needs validate"),
        ({"clip": 0.0}, "must be positive"),
    ],
)
def test_settings_that_make_no_sense_are_refused_before_training(settings, message):
    model = toy_model()
    start = weights(model).clone()
    with pytest.raises(ValueError, match=message):
        fit(model, toy_batches(), **settings)
    assert torch.equal(weights(model), start)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_step_does_not_know_where_the_data_live(device, workers):
    augment = augmentation()
    small = toy_batches(device, augment=augment)
    large = batches(PictureList(toy_split()), centred, size=16, seed=3, device=device, augment=augment, workers=workers)
    assert isinstance(small, DeviceBatches) and isinstance(large, LoaderBatches)
    for epoch in (0, 1):
        pairs = list(zip(small.epoch(epoch), large.epoch(epoch), strict=True))
        assert len(pairs) == len(small) == len(large) == 6
        for (pictures, labels), (same_pictures, same_labels) in pairs:
            assert pictures.device.type == labels.device.type == device.type
            assert torch.allclose(pictures, same_pictures, atol=1e-5) and torch.equal(labels, same_labels)


def test_an_epoch_is_one_pass_and_a_short_split_is_gone_through_again():
    data = toy_split()
    order = torch.cat([labels for _, labels in batches(data, centred, size=36).epoch(0)])
    assert len(order) == 108 and order[:96].bincount().tolist() == [48, 48]
    few = data.subset(range(10))
    drawn = torch.cat([pictures for pictures, _ in batches(few, centred, size=16, steps=5).epoch(2)])
    counts = torch.unique(drawn.flatten(1), dim=0, return_counts=True)[1]
    assert counts.tolist() == [8] * 10


def test_epochs_differ_and_seeds_differ_but_the_same_epoch_is_the_same():
    def first(epoch, seed):
        return next(iter(toy_batches(seed=seed, augment=augmentation()).epoch(epoch)))[0]

    assert torch.equal(first(1, 0), first(1, 0))
    assert not torch.equal(first(1, 0), first(2, 0))
    assert not torch.equal(first(1, 0), first(1, 1))


def test_batches_refuse_what_cannot_be_cut():
    with pytest.raises(ValueError, match="empty split"):
        batches(toy_split().subset([]), centred)
    with pytest.raises(ValueError, match="size=0"):
        batches(toy_split(), centred, size=0)


def test_augmentation_with_nothing_to_do_changes_nothing():
    still = augmentation(rotate=0, scale=0, shear=0, shift=0, brightness=0, contrast=0)
    pictures = torch.randn(4, 3, 8, 8)
    assert torch.allclose(still(pictures, torch.Generator()), pictures, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({"invert": 1.0}, lambda pictures: -pictures), ({"flip": 1.0}, lambda pictures: pictures.flip(-1))],
)
def test_inversion_and_flip_do_what_they_say(settings, expected):
    none = {"rotate": 0, "scale": 0, "shear": 0, "shift": 0, "brightness": 0, "contrast": 0}
    pictures = torch.randn(4, 3, 8, 8)
    assert torch.allclose(augmentation(**none, **settings)(pictures, torch.Generator()), expected(pictures), atol=1e-5)


def test_augmentation_moves_every_picture_in_its_own_way():
    pictures = torch.randn(1, 3, 8, 8).repeat(5, 1, 1, 1)
    moved = augmentation()(pictures, torch.Generator().manual_seed(0))
    assert len(torch.unique(moved.flatten(1), dim=0)) == 5


@pytest.mark.parametrize("kind", [lambda split: split, PictureList], ids=["in memory", "read one by one"])
def test_batches_for_another_networks_transform_are_refused_before_anything_learns(kind) -> None:
    model = toy_model()
    before = weights(model)
    with pytest.raises(ValueError, match=r"another transform than the model's weights need: give them model\.transform"):
        fit(model, batches(kind(toy_split()), lambda pictures: centred(pictures) * 0.5, size=16))
    assert torch.equal(weights(model), before)
    fit(model, batches(kind(toy_split()), lambda pictures: centred(pictures), size=16))  # another function, the same pictures
    assert not torch.equal(weights(model), before)
