# %% tags=["parameters"]
PROFILE: str = "embedded"  # [embedded | imagenet] the world; the second needs a network
SEED: int = 0  # moves the head, the order, the start of every attack and the few-shot subset
DEVICE: str = "auto"  # [auto | cpu | cuda | mps] where to train
OUT: str = "../build/10"  # where results go
NET: str = "vgg_far"  # the backbone of the live runs, by its name in the profile
STEPS: int = 120  # training steps of the live runs; stored runs take 200
ATTACKED: int = 200  # test pictures that are attacked live; stored runs take all 300
EPSILON: float = 0.1  # how far a pixel may be moved in the live runs; black is 0, white is 1
LABELS: int = 20  # labels a class for the task to which robustness is carried


# %% tags=["setup"]
from functools import partial

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import nn

from course_utils.backbones import Backbone, Classifier, load_backbone
from course_utils.data import batches, few_shot
from course_utils.data.digits import mnist, small_digits
from course_utils.evaluate import hits, predict
from course_utils.evidence import Claims, Estimate, compare, estimate, stored, unpack_hits
from course_utils.exercises import check, hint, solution  # noqa: F401
from course_utils.plots import COLOURS, chooser, show, show_table
from course_utils.profile import get_profile, pick_device
from course_utils.training import adamw, fit, supervised, train_mode

profile = get_profile(PROFILE)
device = pick_device(DEVICE)
claims = Claims("10_adversarial_robustness", OUT)
digits, small = mnist(), small_digits()  # both come shuffled, in an order that never changes
train, valid, test = (
    digits.subset(range(*ends)) for ends in ((1000,), (1000, 1200), (1200, 1500))
)
small_train, small_valid, small_test = (
    small.subset(range(*ends)) for ends in ((1000,), (1000, 1300), (1300, 1600))
)


# %% tags=["evidence", "by-hand"]
def to_pixels(pictures):
    """uint8 pictures as floats in [0, 1]; floats stay as they are."""
    return pictures.float() / 255 if pictures.dtype == torch.uint8 else pictures


class FromPixels(nn.Module):
    """Layers that take pixels in [0, 1]: the transform has become their first step."""

    def __init__(self, transform, layers):
        super().__init__()
        self.transform, self.layers = transform, layers

    def forward(self, pixels):
        return self.layers(self.transform(pixels))


def new_model(name, pretrained=True):
    """A classifier of digits whose input is pixels in [0, 1]."""
    own = load_backbone(name, pretrained)
    inside = FromPixels(own.transform, own.layers)
    backbone = Backbone(own.name, inside, own.width, to_pixels, own.card)
    return Classifier(backbone, len(digits.classes)).to(device)


# %% tags=["evidence", "by-hand"]
def gradient(model, pixels, labels, loss):
    """How the loss of each picture changes with each of its pixels: (n, 3, height, width)."""
    pixels = pixels.detach().requires_grad_()
    return torch.autograd.grad(loss(model(pixels), labels), pixels)[0]


def project(moved, pixels, epsilon):
    """The nearest legal picture: no pixel further than epsilon from where it was, and all in [0, 1]."""
    return (pixels + (moved - pixels).clamp(-epsilon, epsilon)).clamp(0, 1)


def cross_entropy(logits, labels):
    """The loss that training minimises, summed, so that no picture's gradient depends on the others."""
    return F.cross_entropy(logits, labels, reduction="sum")


def fgsm(model, pixels, labels, epsilon, loss=cross_entropy):
    """One step of epsilon in the direction of the sign (Goodfellow et al. 2015)."""
    uphill = gradient(model, pixels, labels, loss).sign()
    return project(pixels + epsilon * uphill, pixels, epsilon)


def pgd(model, pixels, labels, epsilon, steps, rate, loss=cross_entropy, start=None):
    """Many small steps, each followed by a projection (Madry et al. 2018). start: else a random legal picture."""
    if start is None:
        start = pixels + epsilon * (2 * torch.rand_like(pixels) - 1)
    moved = project(start, pixels, epsilon)
    for _ in range(steps):
        uphill = gradient(model, moved, labels, loss).sign()
        moved = project(moved + rate * uphill, pixels, epsilon)
    return moved


# %% tags=["evidence"]
def margin(logits, labels):
    """By how much the best wrong class leads the right one, summed over the pictures (Carlini and Wagner 2017)."""
    right = logits.gather(1, labels[:, None])
    wrong = logits.scatter(1, labels[:, None], -torch.inf).amax(dim=1, keepdim=True)
    return (wrong - right).sum()


def ready(split):
    """Pixels in [0, 1] and labels of a split, on the device, in the memory order that convolutions like."""
    pixels = to_pixels(split.pictures).contiguous(memory_format=torch.channels_last)
    return pixels.to(device), split.labels.to(device)


def is_right(model, pixels, labels):
    """Which pixels are classified correctly: bool (n,)."""
    with torch.no_grad():
        parts = [model(part).argmax(dim=1) for part in pixels.split(100)]
    return torch.cat(parts) == labels


def survivors(model, split, epsilon, steps=20, loss=cross_entropy, seed=0):
    """Which pictures PGD never turns: bool array (n,). It looks after 2, 4, 8 … steps, and goes on with those still right."""
    model.eval()
    torch.manual_seed(seed)
    pixels, labels = ready(split)
    found = is_right(model, pixels, labels)
    for alive in found.nonzero().flatten().split(100):
        moved, done = None, 0
        while done < steps and len(alive):
            more = min(max(done, 2), steps - done)
            x, y = pixels[alive], labels[alive]
            moved = pgd(model, x, y, epsilon, more, epsilon / 4, loss, moved)
            right = is_right(model, moved, y)
            found[alive[~right]] = False
            alive, moved, done = alive[right], moved[right], done + more
    return found.cpu().numpy()


def after(attack, model, split, epsilon, source=None):
    """Which pictures are right after an attack that looks once: bool array (n,). source: the network attacked, else the model."""
    model.eval()
    pixels, labels = ready(split)
    parts = [
        attack((source or model).eval(), x, y, epsilon)
        for x, y in zip(pixels.split(100), labels.split(100), strict=True)
    ]
    return is_right(model, torch.cat(parts), labels).cpu().numpy()


# %% tags=["evidence"]
def adversarial(epsilon, steps, rate):
    """A step for `fit`: learn from the pictures that an attack makes, not from those that came."""

    def step(model, batch, progress):
        pixels, labels = batch
        model.eval()  # the attack must not move what batch norm measures
        moved = pgd(model, pixels, labels, epsilon, steps, rate)
        train_mode(model)
        return {"adversarial": F.cross_entropy(model(moved), labels)}

    return step


def smoothed(model, batch, progress):
    """Label smoothing: the right class is asked for .9 and a share of the rest goes to each class."""
    return {"smoothed": F.cross_entropy(model(batch[0]), batch[1], label_smoothing=0.1)}


def dropped(model, batch, progress):
    """Dropout: the head sees half of the features."""
    features = F.dropout(model.backbone(batch[0]), 0.5)
    return {"dropped": F.cross_entropy(model.head(features), batch[1])}


def focal(model, batch, progress):
    """Focal loss (Lin et al. 2017): what is right and sure counts less, by (1 - p)^2."""
    each = F.cross_entropy(model(batch[0]), batch[1], reduction="none")
    return {"focal": ((1 - torch.exp(-each)) ** 2 * each).mean()}


# %% tags=["evidence"]
RUN_STEPS, TUNE_STEPS = 200, 100
RUN_EPSILON = 0.1  # trained for, and where everything is compared
MASK_EPSILON = 0.05  # where masks are lifted: noise alone does little there
EPSILONS = (0.02, 0.05, 0.1, 0.2)
BACKBONES = ("vgg_far",)
PGD_3 = adversarial(RUN_EPSILON, steps=3, rate=RUN_EPSILON / 2)
FGSM_RANDOM = adversarial(RUN_EPSILON, steps=1, rate=1.25 * RUN_EPSILON)  # Wong et al. 2020
ARMS = {  # name: pretrained?, the step, weight decay
    "plain": (True, supervised, 0.01),
    "weight decay": (True, supervised, 1.0),
    "label smoothing": (True, smoothed, 0.01),
    "dropout": (True, dropped, 0.01),
    "focal loss": (True, focal, 0.01),
    "adversarial": (True, PGD_3, 0.01),
    "adversarial, one step": (True, FGSM_RANDOM, 0.01),
    "plain, random start": (False, supervised, 0.01),
    "adversarial, random start": (False, PGD_3, 0.01),
}
CARRIED = ("far", "plain", "adversarial")  # backbones carried to the small digits
WAYS = ("probe", "tuned")
RATES = (1e-3, 3e-3)  # what is searched for every arm of ARMS
CARRY = {
    "C": 0.1,
    "rate": 1e-3,
}  # the same for every backbone that is carried, and not searched


def searched():
    """The best rate of each arm, by the search below; the first of them before it has run."""
    try:
        found = stored("10_recipes").groupby(["arm", "rate"])["validation"].mean()
    except FileNotFoundError:
        return dict.fromkeys(ARMS, RATES[0])
    return {arm: float(found[arm].idxmax()) for arm in ARMS}


RECIPES = searched()


def trained(arm, seed, rate=None, steps=None, net="vgg_far", pictures=train):
    """A network of one arm, from far letters or a random start."""
    pretrained, step, decay = ARMS[arm]
    torch.manual_seed(seed)
    model = new_model(net, pretrained)
    data = batches(
        pictures, model.transform, size=32, steps=steps or RUN_STEPS, seed=seed, device=device
    )
    fit(model, data, step=step, optimizer=adamw(rate or RECIPES[arm], weight_decay=decay))
    return model


def probed(backbone, few, C):
    """A linear probe on a backbone that stays as it is, as one classifier."""
    model = Classifier(backbone, len(few.classes)).to(device)
    features = predict(backbone, few)
    mean, deviation = features.mean(dim=0), features.std(dim=0) + 1e-5
    learned = LogisticRegression(C=C, max_iter=500).fit(
        (features - mean) / deviation, few.labels
    )
    weight = torch.from_numpy(learned.coef_).float() / deviation
    bias = torch.from_numpy(learned.intercept_).float() - weight @ mean
    with torch.no_grad():
        model.head.weight.copy_(weight)
        model.head.bias.copy_(bias)
    return model.eval()


def tuned(backbone, few, rate, seed, step=supervised, steps=None):
    """Everything fine-tuned, a copy of the backbone and a new head."""
    model = new_model("vgg_far", pretrained=False)
    model.backbone.load_state_dict(backbone.state_dict())
    torch.manual_seed(seed)
    model.head.reset_parameters()
    data = batches(
        few, model.transform, size=32, steps=steps or TUNE_STEPS, seed=seed, device=device
    )
    fit(model, data, step=step, optimizer=adamw(rate))
    return model


def carried(arm, backbone, seed):
    """A backbone on the small digits, 20 labels a class: arm is "NAME, probe", "NAME, tuned" or "far, hardened"."""
    few = few_shot(small_train, 20, seed)
    if arm.endswith(", probe"):
        return probed(backbone, few, CARRY["C"])
    step = PGD_3 if arm == "far, hardened" else supervised
    return tuned(backbone, few, CARRY["rate"], seed, step)


# %% tags=["evidence"]
class Loud(nn.Module):
    """A defence that is none: all logits times a thousand. Not one answer changes."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixels):
        return 1000 * self.model(pixels)


class Rounded(nn.Module):
    """A defence that is none: pixels rounded to 16 levels. through: its gradient passes as if nothing had been rounded."""

    def __init__(self, model, through=False):
        super().__init__()
        self.model, self.through = model, through

    def forward(self, pixels):
        rounded = (15 * pixels).round() / 15
        return self.model(pixels + (rounded - pixels).detach() if self.through else rounded)


def attacked(model, split, epsilons, seed, arm, task="mnist"):
    """Rows of one network: no attack, and FGSM and PGD at each epsilon; at RUN_EPSILON also PGD on the margin."""
    row = {"arm": arm, "task": task}
    pixels, labels = ready(split)
    clean = is_right(model.eval(), pixels, labels).cpu().numpy()
    yield {**row, "attack": "none", "epsilon": 0.0, "hits": clean}
    for epsilon in epsilons:
        row["epsilon"] = epsilon
        yield {**row, "attack": "fgsm", "hits": after(fgsm, model, split, epsilon)}
        yield {**row, "attack": "pgd", "hits": survivors(model, split, epsilon, seed=seed)}
        if epsilon == RUN_EPSILON:
            found = survivors(model, split, epsilon, loss=margin, seed=seed + 1)
            yield {**row, "attack": "margin", "hits": found}


def made_on(model, split, epsilon, seed):
    """Pictures that PGD has moved as far as it could against one network, to be shown to another."""
    pixels, labels = ready(split)
    model.eval()
    torch.manual_seed(seed)
    parts = zip(pixels.split(100), labels.split(100), strict=True)
    return torch.cat([pgd(model, x, y, epsilon, 20, epsilon / 4, margin) for x, y in parts])


def masks_lifted(plain, others, seed):
    """Two masks on the plain network at MASK_EPSILON: they look robust, and then they do not. others: other networks."""
    labels, noise = ready(test)[1], partial(pgd, steps=0, rate=0.0)
    moved = {name: made_on(other, test, MASK_EPSILON, seed) for name, other in others.items()}
    for name, mask in {"plain": plain, "loud": Loud(plain), "rounded": Rounded(plain)}.items():
        row = {"arm": name, "task": "mnist", "epsilon": MASK_EPSILON}
        if name != "plain":
            yield from attacked(mask, test, (MASK_EPSILON,), seed, name)
        for other, pictures in moved.items():
            found = is_right(mask, pictures, labels).cpu().numpy()
            yield {**row, "attack": f"made on {other}", "hits": found}
        yield {**row, "attack": "noise", "hits": after(noise, mask, test, MASK_EPSILON)}
        lifted = Rounded(plain, through=True) if name == "rounded" else mask
        found = survivors(lifted, test, MASK_EPSILON, loss=margin, seed=seed + 1)
        yield {**row, "attack": "unmasked", "hits": found}


def experiment(seed):
    """Every arm under attack, two masks on the plain network and what lifts them, and the backbones on small digits."""
    models = {}
    for arm in ARMS:
        models[arm] = trained(arm, seed)
        epsilons = EPSILONS if arm in CARRIED else (EPSILONS[0], RUN_EPSILON)
        if not ARMS[arm][0]:
            epsilons = (RUN_EPSILON,)
        yield from attacked(models[arm], test, epsilons, seed, arm)
    for again in (2, 3):  # more steps, from other starts
        hard = survivors(models["adversarial"], test, RUN_EPSILON, 40, margin, seed + again)
        row = {
            "arm": "adversarial",
            "task": "mnist",
            "attack": f"margin, 40 steps, start {again}",
        }
        yield {**row, "epsilon": RUN_EPSILON, "hits": hard}
    backbones = {"far": new_model("vgg_far").backbone}
    backbones |= {name: models[name].backbone for name in CARRIED[1:]}
    others = {
        "same start": trained("plain", seed + 10_000),  # another head, another order
        "same start, small digits": carried("far, tuned", backbones["far"], seed + 10_000),
        "random start": models["plain, random start"],
    }
    yield from masks_lifted(models["plain"], others, seed)
    for arm in [f"{name}, {way}" for name in CARRIED for way in WAYS] + ["far, hardened"]:
        model = carried(arm, backbones[arm.split(",")[0]], seed)
        yield from attacked(model, small_test, (0.05, RUN_EPSILON), seed, arm, "small digits")


# %% tags=["search"]
GRID = {"arm": tuple(ARMS), "rate": RATES, "seed": (900,)}  # a seed that serves nothing else


def validation_accuracy(arm, rate, seed):
    """What one rate is worth on validation pictures: under attack for what is trained under attack, as it is for the rest."""
    model = trained(arm, seed, rate)
    if arm.startswith("adversarial"):
        return float(survivors(model, valid, RUN_EPSILON, 10).mean())
    return hits(model, valid).float().mean().item()


# %% tags=["evidence"]
def stored_claims(table, claim):
    """What the stored seeds say."""
