# %% [markdown]
# ## The question

# %% tags=["parameters"]
PROFILE: str = (
    "embedded"  # [embedded | imagenet] the world of the networks; the second needs a network
)
SEED: int = 0  # moves the head, the order, the augmentation, and what is drawn at random
DEVICE: str = "auto"  # [auto | cpu | cuda | mps] where to compute
OUT: str = "../build/08"  # where results go
NET: str = "vgg"  # [vgg | resnet] the backbone of the live runs, from far letters where the profile has them
STEPS: int = 100  # training steps of each live run; stored runs take 300
SAMPLE: int = 300  # pictures of each domain that the live measures look at, 60 to 300

# %% tags=["setup"]
import copy
from functools import cache, partial

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.manifold import TSNE
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from course_utils.adaptation import DomainBatches, UnlabelledTarget, align, coral, mmd
from course_utils.backbones import Classifier, load_backbone
from course_utils.data import Split, augmentation, batches
from course_utils.data.digits import mnist, mnist_m, small_digits
from course_utils.evaluate import predict
from course_utils.evidence import (
    Claims,
    Estimate,
    compare,
    estimate,
    resampling,
    stored,
    stretch,
    unpack_hits,
)
from course_utils.exercises import check, hint, solution  # noqa: F401
from course_utils.plots import COLOURS, chooser, picture_grid, show, show_table
from course_utils.profile import get_profile, pick_device
from course_utils.training import adamw, fit

profile = get_profile(PROFILE)
device = pick_device(DEVICE)
claims = Claims("08_domain_shift", OUT)
digits = mnist()  # the source; the order is random already
source, source_valid = digits.subset(range(1200)), digits.subset(range(1200, 1500))
adapt = UnlabelledTarget(partial(mnist_m, "train"))
exam = UnlabelledTarget(partial(mnist_m, "test"))


# %% tags=["evidence"]
def standardised(transform):
    """A transform after which every picture has mean 0 and deviation 1, over all its pixels and channels."""

    def own_units(picture):
        pixels, whole = transform(picture), {"dim": (-3, -2, -1), "keepdim": True}
        deviation = pixels.std(**whole, correction=0).clamp(min=1e-3)
        return (pixels - pixels.mean(**whole)) / deviation

    return own_units


def re_estimated(model, pictures):
    """A copy of a network whose batch norms hold mean and variance of these pictures; weights stay.

    pictures: uint8 (n, 3, height, width). Up to 32 at a time, and what is left over is left out.
    """
    model = copy.deepcopy(model).train()
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.reset_running_stats()
            layer.momentum = None  # the plain mean of all batches
    whole = max(1, len(pictures) // 32) * 32
    with torch.no_grad():
        for some in pictures[:whole].split(32):
            model(model.transform(some.to(device)))
    return model.eval()


# %% tags=["by-hand", "evidence"]
def kernel_of(rows, factors=(0.25, 0.5, 1.0, 2.0, 4.0)):
    """How alike any two rows are, (n, n): the mean of several exp(-distance² / (factor · median²)), 0 for a row itself."""
    distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    median = torch.pdist(rows).median()
    alike = [torch.exp(-distances.square() / (factor * median.square())) for factor in factors]
    return torch.stack(alike).mean(dim=0).fill_diagonal_(0)


def mmd_of(kernel, first):
    """The unbiased squared MMD. first: bool (..., n), which rows are the first sample; the others are the second."""
    a, b = first.float(), (~first).float()
    n, m = a.sum(dim=-1), b.sum(dim=-1)
    within_a = ((a @ kernel) * a).sum(dim=-1) / (n * (n - 1))
    within_b = ((b @ kernel) * b).sum(dim=-1) / (m * (m - 1))
    between = ((a @ kernel) * b).sum(dim=-1) / (n * m)
    return within_a + within_b - 2 * between


def permutation_test(x, y, seed, times=200):
    """The MMD of two samples (n, width) and (m, width), and of as many divisions at random, (times,); and the p-value."""
    kernel = kernel_of(torch.cat([x, y]))
    first = torch.arange(len(x) + len(y)) < len(x)
    random = torch.Generator().manual_seed(seed)
    shuffled = torch.rand(times, len(first), generator=random).argsort(dim=1)
    found, by_chance = mmd_of(kernel, first), mmd_of(kernel, first[shuffled])
    p = (1 + (by_chance >= found).sum().item()) / (1 + times)
    return found.item(), by_chance, p


# %% tags=["evidence"]
def proxy_distance(x, y, seed, fresh=True, splits=5):
    """Proxy A-distance 2 (1 - 2ε) of features (n, width) and (m, width): a new probe learns on half of them.

    ε is its error on the other half, or, by mistake (not `fresh`), on the half that it learned from. Mean of `splits` divisions.
    """
    rng, count, errors = np.random.default_rng(seed), min(len(x), len(y)), []
    domain = np.repeat([1, 0], count)
    for _ in range(splits):
        both = torch.cat([own[rng.permutation(len(own))[:count]] for own in (x, y)]).numpy()
        learn = np.tile(np.arange(count) < count // 2, 2)
        probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500))
        probe.fit(both[learn], domain[learn])
        asked = ~learn if fresh else learn
        errors.append(1 - probe.score(both[asked], domain[asked]))
    return 2 * (1 - 2 * float(np.mean(errors)))


def confidence_of(logits):
    """The mean of the highest probability of each picture."""
    return logits.softmax(dim=1).amax(dim=1).mean().item()


def information(logits):
    """Information maximisation, H(mean p) - mean H(p), in nats: sure of each picture, and of all classes in turn."""
    p = logits.softmax(dim=1)
    return (
        torch.special.entr(p.mean(dim=0)).sum() - torch.special.entr(p).sum(dim=1).mean()
    ).item()


# %% tags=["evidence"]
RUN_STEPS = 300
BACKBONES = ("vgg_far",)
COLOURFUL = {"invert": 0.5, "brightness": 1.0, "contrast": 0.5}  # no photographs, no blending
DISTANCES = {"coral": coral, "mmd": mmd}


def searched():
    """The weight of each distance with the best label-free score, by the search below; none before it has run."""
    try:
        table = stored("08_recipes")
    except FileNotFoundError:
        return {}
    best = table.loc[table.groupby("distance")["validation"].idxmax()]
    return dict(zip(best["distance"], best["weight"], strict=True))


RECIPES = searched()


def trained(backbone, pictures, target, remedy, seed, steps, weight=None):
    """A network after its last step on labelled source pictures and, for "coral" and "mmd", target pictures without labels.

    remedy: "plain", "standardised", "augmented", or a distance, which is augmented too.
    """
    if remedy == "standardised":
        backbone.transform = standardised(backbone.transform)
    model = Classifier(backbone, len(pictures.classes)).to(device)
    settings = {"size": 32, "steps": steps, "seed": seed, "device": device}
    if remedy not in ("plain", "standardised"):
        settings["augment"] = augmentation(**COLOURFUL)
    if remedy not in DISTANCES:
        fit(model, batches(pictures, model.transform, **settings), optimizer=adamw(2e-3))
        return model
    step = partial(align, distance=DISTANCES[remedy], weight=weight or RECIPES[remedy])
    both = DomainBatches(pictures, target, model.transform, **settings)
    fit(model, both, step=step, optimizer=adamw(2e-3))
    return model


# %% tags=["evidence"]
def part_of(draw, first, last):
    """Some pictures of a data set, by their place; a recipe for a target that has no splits."""
    return draw().subset(range(first, last))


TARGETS = {  # where to adapt, and where to be examined
    "MNIST-M": (partial(mnist_m, "train"), partial(mnist_m, "test")),
    "small digits": (
        partial(part_of, small_digits, 0, 897),
        partial(part_of, small_digits, 897, 1797),
    ),
    "MNIST": (partial(part_of, mnist, 0, 750), partial(part_of, mnist, 750, 1500)),
}
SOURCES = {"MNIST": mnist, "small digits": small_digits}
PAIRS = (("MNIST", "MNIST-M"), ("MNIST", "small digits"), ("small digits", "MNIST"))
SIZES = {"MNIST-M": 1000, "small digits": 900, "MNIST": 750}  # exam pictures


@cache
def targets_of(name):
    """Pictures of a target without labels: to adapt to, and of the exam."""
    return tuple(UnlabelledTarget(draw) for draw in TARGETS[name])


@cache
def source_of(name):
    """1,200 training pictures of a source and 300 for validation."""
    whole = SOURCES[name]()
    return whole.subset(range(1200)), whole.subset(range(1200, 1500))


def backbone_of(start, seed):
    """The embedded VGG, "random" or from "far" letters."""
    torch.manual_seed(seed)
    return load_backbone("vgg_far", pretrained=start == "far")


def read(model, pictures):
    """Features (n, width) and logits (n, classes)."""
    features = predict(model.backbone, pictures)
    with torch.no_grad():
        return features, model.head(features.to(device)).cpu()


def measured(model, valid, target, seed):
    """What can be said of a network and a target without labels, and the classes that it predicts."""
    (known, own), (features, logits) = read(model, valid), read(model, target.split)
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(seed))
    halves = known[order[: len(known) // 2]], known[order[len(known) // 2 :]]
    return {
        "source": (own.argmax(dim=1) == valid.labels).float().mean().item(),
        "source_confidence": confidence_of(own),
        "confidence": confidence_of(logits),
        "information": information(logits),
        "adistance": proxy_distance(known, features, seed),
        "none": proxy_distance(*halves, seed),
        "mmd": mmd(known, features[: len(known)]).item(),
        "hits": logits.argmax(dim=1),
    }


# %% tags=["evidence"]
def biased_mmd_of(kernel, first):
    """Squared MMD with every row compared with itself too, which is always 1: it is never below 0, and so biased."""
    a, b = first.float(), (~first).float()
    kernel, a, b = kernel + torch.eye(len(kernel)), a / a.sum(), b / b.sum()
    return a @ kernel @ a + b @ kernel @ b - 2 * a @ kernel @ b


def tested(known, other, count, seed, times):
    """Many small samples of `count` rows each: hits of permutation tests at 0.05, and the mean MMD, unbiased and biased.

    other: the second domain, or None for a second sample of the first.
    """
    rng, found, first = np.random.default_rng(seed), [], torch.arange(2 * count) < count
    for number in range(times):
        order = torch.from_numpy(rng.permutation(len(known)))
        x, y = known[order[:count]], known[order[count : 2 * count]]
        if other is not None:
            y = other[torch.from_numpy(rng.permutation(len(other))[:count])]
        kernel = kernel_of(torch.cat([x, y]))
        value, _, p = permutation_test(x, y, seed=1000 * seed + number)
        found.append((p <= 0.05, value, biased_mmd_of(kernel, first).item()))
    hits, unbiased, biased = (np.array(column) for column in zip(*found, strict=True))
    return {"hits": hits, "mmd": unbiased.mean(), "biased": biased.mean()}


def adapted_to(pair, start, models, seed, steps):
    """Every remedy of one pair, by name, made from the networks that know the source alone."""
    (train, _), (target, _) = source_of(pair[0]), targets_of(pair[1])
    found, pictures = dict(models), target.split.pictures
    for name in ("plain", "augmented"):
        found[f"{name}, re-estimated"] = re_estimated(models[name], pictures)
    for count in (4, 32):
        found[f"augmented, re-estimated from {count}"] = re_estimated(
            models["augmented"], pictures[:count]
        )
    for remedy in DISTANCES if pair[1] == "MNIST-M" else ("mmd",):
        found[remedy] = trained(backbone_of(start, seed), train, target, remedy, seed, steps)
    return found


def experiment(seed, steps=RUN_STEPS, times=200):
    """Every remedy from both starts on all pairs. All is predicted before the first label of a target is revealed."""
    waiting = []
    for origin in SOURCES:
        train, valid = source_of(origin)
        for start in ("random", "far"):
            models = {
                remedy: trained(backbone_of(start, seed), train, None, remedy, seed, steps)
                for remedy in ("plain", "standardised", "augmented")
                if origin == "MNIST" or remedy != "standardised"
            }
            for pair in PAIRS:
                if pair[0] == origin:
                    for remedy, model in adapted_to(pair, start, models, seed, steps).items():
                        row = {"pair": "→".join(pair), "start": start, "remedy": remedy}
                        said = measured(model, valid, targets_of(pair[1])[1], seed)
                        waiting.append((pair[1], row | said))
            if origin == "MNIST":
                yield from on_the_source(models["augmented"], train, valid, start, seed)
                known = read(models["plain"], valid)[0]
                for name in ("none", "MNIST-M", "small digits"):
                    other = (
                        None
                        if name == "none"
                        else read(models["plain"], targets_of(name)[1].split)[0]
                    )
                    for count in (8, 32, 128):
                        row = {"pair": f"test: {name}", "start": start, "remedy": str(count)}
                        yield row | tested(known, other, count, seed, times)
    truth = {name: targets_of(name)[1].reveal(source_of("MNIST")[0]).labels for name in TARGETS}
    for name, row in waiting:
        yield row | {"hits": (row["hits"] == truth[name]).numpy()}


def on_the_source(model, train, valid, start, seed):
    """Statistics re-estimated where nothing has shifted: from all classes, and from one class alone."""
    one = train.pictures[train.labels == seed % 10]
    for remedy, other in (
        ("augmented", model),
        ("re-estimated", re_estimated(model, train.pictures)),
        ("re-estimated, one class", re_estimated(model, one)),
    ):
        right = read(other, valid)[1].argmax(dim=1) == valid.labels
        yield {"pair": "MNIST→MNIST", "start": start, "remedy": remedy, "hits": right.numpy()}


# %% tags=["search"]
GRID = {
    "distance": ("coral", "mmd"),
    "weight": (0.1, 1.0, 10.0, 100.0),
    "seed": (900,),  # never used for a result
}


def validation_accuracy(distance, weight, seed):
    """What one weight is worth without a label of the target: information maximisation on the pictures to adapt to."""
    (train, _), (target, _) = source_of("MNIST"), targets_of("MNIST-M")
    model = trained(
        backbone_of("random", seed), train, target, distance, seed, RUN_STEPS, weight
    )
    return information(predict(model, target.split))


# %% tags=["evidence"]
def stored_claims(table, claim):
    """What the seeds say."""
