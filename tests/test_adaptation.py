"""The room `adaptation`: what each method means, target labels that cannot be reached, and domains that do not fit."""

import gc
import math
from copy import deepcopy
from functools import cache, partial
from types import FunctionType, ModuleType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from course_utils.adaptation import (
    DomainBatches,
    GradientReversal,
    UnlabelledTarget,
    adda,
    align,
    cdan,
    coral,
    dann,
    discriminator,
    domain_loss,
    lambda_at,
    mmd,
)
from course_utils.backbones import WIDTH, Classifier, centred
from course_utils.data import Split, augmentation
from course_utils.data.digits import mnist, mnist_m
from course_utils.evaluate import accuracy, predict
from course_utils.fusion import Fusion
from course_utils.training import adamw, constant, fit, sgd, supervised
from tests.test_fit import toy_model, toy_split, weights

LN2 = math.log(2)


def draw_target(count: int = 96, classes: tuple[str, ...] = ("dark", "bright"), seed: int = 1) -> Split:
    """Sorted by class, as many data sets are: two classes that differ in brightness, on a ground brighter than the source's."""
    labels = torch.arange(count) * len(classes) // count
    pictures = torch.randint(0, 100, (count, 3, 8, 8), generator=torch.Generator().manual_seed(seed))
    return Split((pictures + 60 + 95 * labels.clamp(max=1).view(-1, 1, 1, 1)).to(torch.uint8), labels, classes)


def adversarial(seed: int = 0, width: int = WIDTH) -> Any:
    model: Any = toy_model(seed)
    model.discriminator = discriminator(width, 16)
    return model


def toy_domains(**settings: Any) -> DomainBatches:
    return DomainBatches(toy_split(), UnlabelledTarget(draw_target), centred, **{"size": 16, "steps": 4, "seed": 3, **settings})


def one_batch() -> tuple[Tensor, Tensor, Tensor]:
    return next(iter(toy_domains().epoch(0)))


def gradients(part: nn.Module, loss: Tensor) -> list[Tensor | None]:
    return list(torch.autograd.grad(loss, list(part.parameters()), retain_graph=True, allow_unused=True))


@pytest.mark.parametrize("factor", [0.0, 0.3, 1.0])
def test_the_reversed_gradient_is_minus_lambda_times_the_plain_one(factor: float) -> None:
    features, upstream = torch.randn(5, 4, requires_grad=True), torch.randn(5, 4)
    passed = GradientReversal.apply(features, factor)
    assert torch.equal(passed, features)
    (plain,) = torch.autograd.grad(features.clone(), features, upstream)
    (turned,) = torch.autograd.grad(passed, features, upstream)
    assert torch.equal(turned, -factor * plain)


@pytest.mark.parametrize("factor", [-0.1, 1.1, math.nan])
def test_a_lambda_outside_0_to_1_is_refused(factor: float) -> None:
    with pytest.raises(ValueError, match="λ lies between 0 and 1"):
        GradientReversal.apply(torch.zeros(2, 3), factor)
    with pytest.raises(ValueError, match="λ lies between 0 and 1"):
        dann(adversarial(), one_batch(), 0.5, strength=lambda progress: factor)


def test_lambda_depends_on_progress_alone_and_a_small_gamma_caps_it() -> None:
    assert lambda_at(0.0) == 0 and lambda_at(0.1) == pytest.approx(math.tanh(0.5))
    assert lambda_at(1.0) == pytest.approx(0.9999, abs=1e-4)
    assert lambda_at(1.0, gamma=1.0) == pytest.approx(0.462, abs=1e-3)
    for progress in (-0.01, 37.0):  # a clock in steps
        with pytest.raises(ValueError, match="progress goes from 0 to 1"):
            lambda_at(progress)


def test_dann_confuses_through_the_backbone_and_leaves_the_discriminator_its_own_gradient() -> None:
    model, batch, factor = adversarial().train(), one_batch(), lambda_at(0.2)
    losses = dann(model, batch, 0.2)
    plain = domain_loss(model.discriminator, [model.backbone(batch[0]), model.backbone(batch[2])])
    assert losses["domain"].item() == pytest.approx(plain.item(), rel=1e-5)
    turned, straight = gradients(model.backbone, losses["domain"]), gradients(model.backbone, plain)
    assert all(torch.allclose(mine, -factor * other, atol=1e-6) for mine, other in zip(turned, straight, strict=True))
    own, other = gradients(model.discriminator, losses["domain"]), gradients(model.discriminator, plain)
    assert all(torch.allclose(mine, theirs, atol=1e-6) for mine, theirs in zip(own, other, strict=True))
    assert gradients(model.head, losses["domain"]) == [None, None]
    expected = F.cross_entropy(model(batch[0]), batch[1])
    assert losses["cross_entropy"].item() == pytest.approx(expected.item(), rel=1e-5)


def domain_accuracy(shift: float) -> float:
    """A discriminator's accuracy on new samples of two Gaussians whose means are `shift` apart in each of 8 numbers."""
    network = discriminator(8, 32)
    optimizer = torch.optim.Adam(network.parameters(), 0.01)
    for _ in range(150):
        loss = domain_loss(network, (torch.randn(64, 8) + shift, torch.randn(64, 8)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        right = torch.cat([network(torch.randn(2000, 8) + shift) > 0, network(torch.randn(2000, 8)) < 0])
    return right.float().mean().item()


def test_a_discriminator_separates_shifted_gaussians_and_not_equal_ones() -> None:
    assert domain_accuracy(1.5) > 0.95
    assert abs(domain_accuracy(0.0) - 0.5) < 0.05


def test_a_discriminator_gives_one_logit_and_a_softmax_over_one_unit_would_be_dead() -> None:
    network = discriminator(6, 8)
    logits = network(100 * torch.randn(50, 6))
    assert logits.shape == (50,) and logits.min() < 0 and logits.max() > 1  # no probability
    pair = (torch.randn(5, 6), torch.randn(5, 6))
    assert any(gradient.abs().max() > 0 for gradient in gradients(network, domain_loss(network, pair)))
    dead = nn.Sequential(nn.Linear(6, 1), nn.Softmax(dim=1), nn.Flatten(0))
    assert all(gradient.abs().max() == 0 for gradient in gradients(dead, domain_loss(dead, pair)))


def test_a_guess_costs_ln_2_whatever_the_sizes_and_weights_count_within_a_domain() -> None:
    source, target = torch.randn(3, 1), torch.randn(9, 1)
    assert domain_loss(lambda features: 0 * features[:, 0], (source, target)).item() == pytest.approx(LN2)

    def identity(features: Tensor) -> Tensor:
        return features[:, 0]

    each = [-F.logsigmoid(source[:, 0]), -F.logsigmoid(-target[:, 0])]  # source 1, target 0
    assert domain_loss(identity, (source, target)).item() == pytest.approx(sum(one.mean() for one in each).item() / 2)
    shares = [torch.tensor([3.0, 0.0, 0.0]), torch.ones(9)]
    weighted = domain_loss(identity, (source, target), shares)
    assert weighted.item() == pytest.approx((each[0][0] + each[1].mean()).item() / 2)


class Recorder(nn.Module):
    """A discriminator that keeps what it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.shown: list[Tensor] = []

    def forward(self, features: Tensor) -> Tensor:
        self.shown.append(features)
        return features.mean(dim=1)


def test_the_discriminator_of_cdan_sees_features_times_predictions() -> None:
    model: Any = toy_model().train()
    model.discriminator = Recorder()
    batch = one_batch()
    cdan(model, batch, 0.5)
    for shown, pictures in zip(model.discriminator.shown, (batch[0], batch[2]), strict=True):
        features = model.backbone(pictures).detach()
        predictions = model.head(features).softmax(dim=1).detach()
        for row, own, answer in zip(shown, features, predictions, strict=True):
            assert torch.allclose(row, torch.from_numpy(np.outer(own, answer)).flatten(), atol=1e-5)


@pytest.mark.parametrize("entropy", [True, False])
def test_no_gradient_goes_through_the_predictions_of_cdan(entropy: bool) -> None:
    model, batch = adversarial(width=2 * WIDTH).train(), one_batch()
    domain = cdan(model, batch, 0.7, entropy=entropy)["domain"]
    assert gradients(model.head, domain) == [None, None]
    fixed = [model(pictures).softmax(dim=1).detach() for pictures in (batch[0], batch[2])]
    maps = [
        torch.einsum("nw,nc->nwc", model.backbone(pictures), answer).flatten(1)
        for pictures, answer in zip((batch[0], batch[2]), fixed, strict=True)
    ]
    shares: Any = (None, None)
    if entropy:
        shares = [1 + torch.exp((answer * answer.log()).sum(dim=1)) for answer in fixed]
        shares = [share / share.mean() for share in shares]
    plain = domain_loss(model.discriminator, maps, shares)
    assert domain.item() == pytest.approx(plain.item(), rel=1e-5)
    pairs = zip(gradients(model.backbone, domain), gradients(model.backbone, plain), strict=True)
    assert all(torch.allclose(mine, -lambda_at(0.7) * other, atol=1e-6) for mine, other in pairs)


def test_cdan_trusts_a_sure_prediction_up_to_twice_as_much() -> None:
    sure, unsure = torch.tensor([[50.0, 0.0]]), torch.zeros(1, 2)
    model: Any = nn.Module()
    model.backbone, model.head, model.discriminator = nn.Identity(), nn.Identity(), lambda maps: maps[:, 0]
    batch = (torch.cat([sure, unsure]), torch.tensor([0, 0]), torch.cat([unsure, unsure]))
    heavy, light = 2.0, 1.5  # 1 + exp(-0) and 1 + exp(-ln 2)
    each = F.softplus(-torch.tensor([50.0, 0.0]))
    expected = ((heavy * each[0] + light * each[1]) / (heavy + light) + LN2) / 2
    assert cdan(model, batch, 0.5)["domain"].item() == pytest.approx(expected.item(), rel=1e-5)


def trained_source() -> Any:
    source = toy_model()
    fit(source, toy_domains(), step=lambda model, batch, progress: supervised(model, batch[:2], progress))
    return source


def adda_pair() -> tuple[Any, Any]:
    source = trained_source()
    target = deepcopy(source)
    target.discriminator = discriminator(WIDTH, 16)
    return source, target


def test_adda_leaves_the_source_network_bit_identical_and_moves_the_target_network() -> None:
    source, target = adda_pair()
    before, head = deepcopy(source.state_dict()), weights(target.head)
    started = {name: deepcopy(part.state_dict()) for name, part in target.named_children()}
    source.train()  # as a careless cell might leave it
    history = fit(target, toy_domains(), step=partial(adda, source=source), epochs=2, optimizer=adamw(0.01, weight_decay=0.1))
    assert all(torch.equal(value, before[name]) for name, value in source.state_dict().items())
    assert torch.equal(weights(target.head), head)
    for part in ("backbone", "discriminator"):
        now = getattr(target, part).named_parameters()
        assert all(not torch.equal(value, started[part][name]) for name, value in now if "bias" not in name), part
    assert {"discriminator", "target"} <= set(history.columns)


def test_each_loss_of_adda_moves_its_own_part_only() -> None:
    source, target = adda_pair()
    losses = adda(target.train(), one_batch(), 0.0, source=source)
    assert all(gradient is None for part in (target, source) for gradient in gradients(part.backbone, losses["discriminator"]))
    assert all(gradient is None for gradient in gradients(target.discriminator, losses["target"]))
    assert any(gradient.abs().max() > 0 for gradient in gradients(target.backbone, losses["target"]))
    assert any(gradient.abs().max() > 0 for gradient in gradients(target.discriminator, losses["discriminator"]))
    assert all(parameter.requires_grad for parameter in target.parameters())


def test_one_optimizer_does_for_adda_what_two_would_do() -> None:
    source, ours = adda_pair()
    plain, data = deepcopy(ours), toy_domains()
    settings: Any = {"momentum": 0.9, "weight_decay": 5e-4}
    fit(ours, data, step=partial(adda, source=source), optimizer=sgd(0.05, **settings), schedule=constant)

    plain.train().to(memory_format=torch.channels_last)
    parts = (plain.discriminator, plain.backbone)
    two = [torch.optim.SGD(part.parameters(), 0.05, nesterov=True, **settings) for part in parts]
    for pictures, _, target in data.epoch(0):
        pictures, target = (one.contiguous(memory_format=torch.channels_last) for one in (pictures, target))
        features = plain.backbone(target)
        real, fake = plain.discriminator(source.backbone(pictures).detach()), plain.discriminator(features.detach())
        tell = (-F.logsigmoid(real).mean() - F.logsigmoid(-fake).mean()) / 2
        flipped = -F.logsigmoid(plain.discriminator(features)).mean()  # the target called a source
        found = [gradients(part, loss) for part, loss in zip(parts, (tell, flipped), strict=True)]
        for part, optimizer, own in zip(parts, two, found, strict=True):
            for parameter, gradient in zip(part.parameters(), own, strict=True):
                parameter.grad = gradient
            optimizer.step()
    assert torch.allclose(weights(ours), weights(plain), atol=1e-5)


def test_adda_refuses_a_source_network_that_would_learn() -> None:
    target = adversarial()
    for source in (target, Classifier(target.backbone, 2)):
        with pytest.raises(ValueError, match=r"copy\.deepcopy"):
            adda(target, one_batch(), 0.0, source=source)


def mmd_by_hand(source: np.ndarray, target: np.ndarray, bandwidths: list[float]) -> float:
    def mean(first, second, skip: bool) -> float:
        pairs = [(x, y) for i, x in enumerate(first) for j, y in enumerate(second) if not (skip and i == j)]
        return float(np.mean([np.mean([np.exp(-((x - y) ** 2).sum() / one) for one in bandwidths]) for x, y in pairs]))

    return mean(source, source, True) + mean(target, target, True) - 2 * mean(source, target, False)


def test_mmd_is_the_sum_over_pairs() -> None:
    source, target = torch.randn(6, 3), torch.randn(5, 3) + 0.5
    median = torch.pdist(torch.cat([source, target])).median().item() ** 2
    expected = mmd_by_hand(source.numpy(), target.numpy(), [0.5 * median, 2 * median])
    assert mmd(source, target, (0.5, 2.0)).item() == pytest.approx(expected, abs=1e-5)


def test_mmd_of_one_distribution_is_zero_on_average_and_so_unbiased() -> None:
    found = torch.stack([mmd(torch.randn(12, 4), torch.randn(9, 4)) for _ in range(1000)])
    error = found.std() / math.sqrt(len(found))
    assert found.mean().abs() < 4 * error and error < 0.002  # a biased estimate has a mean near 0.1
    assert found.min() < 0


def test_mmd_grows_with_the_shift() -> None:
    source, target = torch.randn(200, 4), torch.randn(200, 4)
    found = [mmd(source, target + shift).item() for shift in (0.0, 0.5, 1.0, 2.0)]
    assert found == sorted(found) and found[0] < 0.01 < found[1]


def test_no_gradient_of_mmd_goes_through_the_bandwidth() -> None:
    source, target = torch.randn(7, 3, requires_grad=True), torch.randn(6, 3) + 1
    (found,) = torch.autograd.grad(mmd(source, target, (1.0,)), source)
    median = torch.pdist(torch.cat([source, target])).median().item() ** 2
    rows = torch.cat([source, target])
    kernel = torch.exp(-(rows[:, None] - rows[None]).square().sum(dim=2) / median) * (1 - torch.eye(13))
    fixed = kernel[:7, :7].sum() / 42 + kernel[7:, 7:].sum() / 30 - 2 * kernel[:7, 7:].mean()
    (expected,) = torch.autograd.grad(fixed, source)
    assert torch.allclose(found, expected, atol=1e-6)


def test_mmd_of_features_that_have_collapsed_is_zero_with_a_finite_gradient() -> None:
    source, target = torch.zeros(5, 3, requires_grad=True), torch.zeros(4, 3)
    found = mmd(source, target)
    assert found.item() == pytest.approx(0, abs=1e-6)
    assert torch.isfinite(torch.autograd.grad(found, source)[0]).all()


def test_coral_is_zero_on_equal_covariance_and_agrees_with_numpy() -> None:
    source, target = torch.randn(40, 5), torch.randn(30, 5) @ torch.randn(5, 5)
    assert coral(source, source + 3).item() == pytest.approx(0, abs=1e-10)
    gap = np.cov(source.numpy(), rowvar=False) - np.cov(target.numpy(), rowvar=False)
    assert coral(source, target).item() == pytest.approx((gap**2).sum() / (4 * 5**2), rel=1e-4)


@pytest.mark.parametrize(
    ("distance", "moved", "start", "goal"),
    [(mmd, lambda rows, shift: rows + shift, 2.0, 0.0), (coral, lambda rows, scale: rows * scale, 3.0, 1.0)],
)
def test_descending_a_distance_brings_two_samples_together(distance, moved, start: float, goal: float) -> None:
    source, target, place = torch.randn(150, 2), torch.randn(150, 2), torch.tensor(start, requires_grad=True)
    optimizer = torch.optim.Adam([place], 0.05)
    for _ in range(120):
        optimizer.zero_grad()
        distance(source, moved(target, place)).backward()
        optimizer.step()
    assert abs(place.item() - goal) < 0.2


@pytest.mark.parametrize("distance", [mmd, coral])
def test_align_weighs_the_distance_of_the_features_against_the_classes(distance) -> None:
    model, batch = toy_model().train(), one_batch()
    losses = align(model, batch, 0.5, distance=distance, weight=3.0)
    features = [model.backbone(pictures) for pictures in (batch[0], batch[2])]
    expected = F.cross_entropy(model.head(features[0]), batch[1]), 3 * distance(*features)
    for found, wanted in zip(losses.values(), expected, strict=True):
        assert found.item() == pytest.approx(wanted.item(), rel=1e-4, abs=1e-7)
        pairs = zip(gradients(model.backbone, found), gradients(model.backbone, wanted), strict=True)
        assert all(torch.allclose(mine, other, atol=1e-5) for mine, other in pairs)


def test_distances_keep_their_precision_under_autocast() -> None:
    model: Any = nn.Module()
    model.backbone = model.head = nn.Identity()
    source, target = torch.randn(30, 4), torch.randn(30, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = align(model, (source, torch.zeros(30, dtype=torch.long), target), 0.5, distance=coral)["distance"]
    assert found.item() == pytest.approx(coral(source, target).item(), rel=1e-5)


def test_each_domain_is_standardised_by_itself_and_the_targets_statistics_stay() -> None:
    backbone = toy_model().backbone
    torch.manual_seed(0)
    model: Any = Classifier(backbone, 2)
    model.head = Fusion([WIDTH], 2, dropout=0.0)
    model.discriminator = discriminator(WIDTH)
    alone, batch = deepcopy(model).train(), one_batch()
    losses = dann(model.train(), batch, 0.5)
    with torch.no_grad():
        alone(batch[2])
        assert torch.equal(weights(model), weights(alone))  # in the backbone and in the head
        expected = F.cross_entropy(alone(batch[0]), batch[1])
    assert losses["cross_entropy"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_frozen_batch_norm_stays_frozen() -> None:
    model = adversarial()
    model.backbone.requires_grad_(False)
    before = weights(model.backbone)
    fit(model, toy_domains(), step=dann)
    assert torch.equal(weights(model.backbone), before)


def reachable(root: Any) -> list[Any]:
    """Everything that an object leads to, closures and caches among them, but not whole modules."""
    found: dict[int, Any] = {}
    queue = [root]
    while queue:
        one = queue.pop()
        if id(one) in found or isinstance(one, (ModuleType, type)):
            continue
        found[id(one)] = one
        hidden = id(one.__globals__) if isinstance(one, FunctionType) else None
        queue += [other for other in gc.get_referents(one) if id(other) != hidden]
    return list(found.values())


def holds(root: Any, labels: Tensor) -> bool:
    """Whether tensors, arrays or lists with these labels can be reached."""
    for one in reachable(root):
        if isinstance(one, (Tensor, np.ndarray)):
            one = one.flatten().tolist()
        if isinstance(one, (list, tuple)) and len(one) == len(labels) and list(one) == labels.tolist():
            return True
    return False


@pytest.mark.parametrize("draw", [draw_target, partial(mnist_m, "valid")], ids=["toy", "mnist_m"])
def test_target_labels_cannot_be_reached_before_they_are_revealed_nor_after(draw) -> None:
    source = toy_split() if draw is draw_target else mnist()
    target = UnlabelledTarget(draw)
    data = DomainBatches(source, target, centred, size=16, steps=2, augment=augmentation(), augment_target=augmentation())
    list(data.epoch(0))
    revealed = target.reveal(source)
    for labels in (revealed.labels, draw().labels):
        assert not holds((target, data), labels)
        assert holds((target, data, lambda kept=labels: kept), labels)  # the search would find them
    assert torch.equal(revealed.pictures, target.split.pictures)


def test_revealed_labels_belong_to_their_pictures_and_the_order_says_nothing_of_the_class() -> None:
    drawn, target = draw_target(), UnlabelledTarget(draw_target)
    split = target.reveal(toy_split())
    label_of = {picture.numpy().tobytes(): label for picture, label in (drawn[index] for index in range(len(drawn)))}
    assert [label_of[picture.numpy().tobytes()] for picture in split.pictures] == split.labels.tolist()
    place = np.arange(len(split))
    assert abs(np.corrcoef(place, drawn.labels)[0, 1]) > 0.8  # the recipe's order tells the class
    assert abs(np.corrcoef(place, split.labels)[0, 1]) < 0.25
    assert 0.35 < (split.labels[1:] == split.labels[:-1]).float().mean() < 0.65


def test_a_recipe_that_keeps_its_labels_or_changes_its_pictures_is_refused() -> None:
    kept = draw_target()
    for recipe in (lambda: kept, cache(draw_target)):
        with pytest.raises(ValueError, match="keeps the labels"):
            UnlabelledTarget(recipe)
    seeds = iter((1, 2))
    target = UnlabelledTarget(lambda: draw_target(seed=next(seeds)))
    with pytest.raises(ValueError, match="other pictures than before"):
        target.reveal(kept)


def test_revealing_warns_of_classes_that_the_source_lacks(recwarn) -> None:
    target = UnlabelledTarget(partial(draw_target, classes=("dark", "bright", "striped")))
    with pytest.warns(UserWarning, match="the source lacks striped:"):
        target.reveal(toy_split())
    listed = Split(toy_split().pictures, toy_split().labels, ("dark", "bright", "striped"))  # a class without a picture
    with pytest.warns(UserWarning, match="the source lacks striped:"):
        target.reveal(listed)
    UnlabelledTarget(draw_target).reveal(toy_split())
    assert not [warning for warning in recwarn if "lacks" in str(warning.message)]


def test_predictions_on_a_target_without_labels_are_possible_and_an_accuracy_is_not() -> None:
    model, target = toy_model(), UnlabelledTarget(draw_target)
    assert predict(model, target.split).shape == (96, 2)
    with pytest.raises(ValueError, match="2 classes and the pictures have 1"):
        accuracy(model, target.split)


def test_batches_of_two_domains_are_a_pure_function_of_seed_and_epoch() -> None:
    data = toy_domains(augment=augmentation())
    first = [list(toy_domains(augment=augmentation()).epoch(epoch)) for epoch in (1, 1, 2)]
    assert len(data) == len(first[0]) == 4
    assert all(torch.equal(a, b) for one, other in zip(first[0], first[1], strict=True) for a, b in zip(one, other, strict=True))
    assert not torch.equal(first[0][0][2], first[2][0][2])
    source, labels, target = first[0][0]
    assert source.shape == target.shape == (16, 3, 8, 8) and labels.shape == (16,)
    assert len(DomainBatches(toy_split(64), UnlabelledTarget(draw_target), centred, size=16)) == 4


def test_each_domain_has_an_order_and_an_augmentation_of_its_own() -> None:
    twin = partial(Split, toy_split().pictures, classes=("dark", "bright"))
    target = UnlabelledTarget(lambda: twin(labels=toy_split().labels.clone()))
    data = DomainBatches(target.reveal(toy_split()), target, centred, size=96, steps=1)
    (pictures, _, others) = next(iter(data.epoch(0)))
    assert not torch.equal(pictures, others)
    assert torch.equal(pictures.flatten(1).sum(dim=1).sort()[0], others.flatten(1).sum(dim=1).sort()[0])
    still = augmentation(rotate=0, scale=0, shear=0, shift=0, brightness=0, contrast=0, invert=1.0)
    dark = next(iter(toy_domains(augment=still).epoch(0)))
    plain = next(iter(toy_domains().epoch(0)))
    assert torch.allclose(dark[0], -plain[0], atol=1e-5) and torch.equal(dark[2], plain[2])
    assert torch.allclose(next(iter(toy_domains(augment_target=still).epoch(0)))[2], -plain[2], atol=1e-5)


def ramp(count: int = 4, channels: int = 3, side: int = 8, top: float = 1.0) -> Tensor:
    return torch.linspace(0, top, count * channels * side * side).view(count, channels, side, side)


@pytest.mark.parametrize(
    ("source", "target", "message"),
    [
        (ramp(), ramp(side=9), r"source pictures are \(3, 8, 8\) .*, target pictures \(3, 9, 9\) .*one size"),
        (ramp(), ramp(channels=1), r"source pictures are \(3, 8, 8\) .*, target pictures \(1, 8, 8\) .*channels"),
        (ramp(), ramp(top=255), r"source pictures are \(3, 8, 8\) up to 1, target pictures \(3, 8, 8\) up to 255: .*range"),
        (centred(ramp(top=255)), centred(ramp()), r"up to 1\.02e\+03, target pictures .* up to 2: .*range"),
        (ramp(), ramp(0), "of each domain, not 4 and 0"),
        (ramp(1), ramp(), "of each domain, not 1 and 4"),
    ],
)
def test_domains_that_do_not_fit_are_refused(source: Tensor, target: Tensor, message: str) -> None:
    model, other = adversarial(), toy_model()
    for step in (dann, cdan, partial(align, distance=mmd), partial(adda, source=other)):
        with pytest.raises(ValueError, match=message):
            step(model, (source, torch.zeros(len(source), dtype=torch.long), target), 0.5)


def test_domains_that_differ_much_but_in_one_range_pass() -> None:
    dann(adversarial(), (ramp(top=0.1), torch.zeros(4, dtype=torch.long), ramp()), 0.5)
    dann(adversarial(), (0 * ramp(), torch.zeros(4, dtype=torch.long), ramp(top=2)), 0.5)


def test_a_batch_without_a_target_is_refused() -> None:
    with pytest.raises(ValueError, match="of each domain, not 16 and 0"):
        dann(adversarial(), one_batch()[:2], 0.5)


STEPS = {
    "dann": (dann, WIDTH),
    "cdan": (cdan, 2 * WIDTH),
    "mmd": (partial(align, distance=mmd), WIDTH),
    "coral": (partial(align, distance=coral), WIDTH),
    "adda": (adda, WIDTH),
}


@pytest.mark.parametrize("name", STEPS)
def test_fit_resumes_an_adaptation_as_if_it_had_never_stopped(name: str, tmp_path) -> None:
    step, width = STEPS[name]
    if name == "adda":
        step = partial(adda, source=toy_model(seed=7))
    whole, resumed = adversarial(width=width), adversarial(width=width)
    history = fit(whole, toy_domains(), step=step, epochs=2)

    def stop(model: nn.Module) -> float:
        if (tmp_path / "run").exists():
            raise KeyboardInterrupt
        return 0.0

    with pytest.raises(KeyboardInterrupt):
        fit(resumed, toy_domains(), step=step, epochs=2, checkpoint=tmp_path / "run", validate=stop)
    fit(fresh := adversarial(seed=9, width=width), toy_domains(), step=step, epochs=2, checkpoint=tmp_path / "run")
    assert torch.equal(weights(fresh), weights(whole))
    assert np.isfinite(history.to_numpy(dtype=float)).all()


@pytest.mark.parametrize("name", STEPS)
def test_every_step_takes_16_bits(name: str) -> None:
    step, width = STEPS[name]
    if name == "adda":
        step = partial(adda, source=toy_model(seed=7))
    rows = [
        fit(adversarial(width=width), toy_domains(), step=step, optimizer=sgd(0.01), precision=precision).iloc[0]
        for precision in ("float32", "bfloat16")
    ]
    assert rows[1].drop("seconds").tolist() == pytest.approx(rows[0].drop("seconds").tolist(), abs=0.05)


def test_a_rate_for_the_head_holds_for_the_discriminator_too() -> None:
    model = adversarial()
    for recipe in (adamw(0.001), adamw(0.001, head_lr=0.01), sgd(0.1, head_lr=0.5)):
        listed = [id(parameter) for group in recipe(model).param_groups for parameter in group["params"]]
        assert sorted(listed) == sorted(map(id, model.parameters()))
