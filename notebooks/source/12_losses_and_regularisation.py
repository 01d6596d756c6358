# %% [markdown]
# ## The question
#
# By now we have a network that reads digits on photographs from a few labels: a backbone from letters, fine-tuned. Popular
# articles have a list of hints for it. "Use a modern activation." "Regularise." "Pick the right loss." "Average." Each is good
# advice *somewhere*. What does each give *here*?
#
# | hint | what it changes | what it is made for |
# |---|---|---|
# | another activation | the bend between two layers | gradients that pass through many layers |
# | weight decay | every step pulls all weights towards zero | networks that learn their pictures by heart |
# | dropout | leaves out a random share of the features | the same |
# | label smoothing | asks for a little less than certainty | confidence that cannot be trusted |
# | mixup | shows mixed pictures, and asks for mixed answers | both |
# | class weights, focal loss | which pictures count how much | classes of very unequal size |
# | smooth L1 | how much a large error counts | targets that are numbers, some of them wrong |
# | EMA, soups | the weights, after or during training | the last bit of noise of training |
#
# The rules are those of lesson 06. One arm changes one thing. Each has five tries of its knob on validation pictures, the
# plain network too. All take the same number of steps. The test pictures decide, over all seeds, with paired intervals.

# %% tags=["parameters"]
PROFILE: str = "embedded"  # [embedded | imagenet] the world; the second needs a network
SEED: int = 0  # moves the few-shot subset, the head and the order
DEVICE: str = "auto"  # [auto | cpu | cuda | mps] where to train
OUT: str = "../build/12"  # where results go
NET: str = "vgg"  # [vgg | resnet] the backbone of the live runs, from near letters
STEPS: int = 30  # training steps of the live runs; stored runs take 40
LABELS: int = 5  # labels a class in the live runs; stored runs take 5
TESTED: int = 500  # test pictures of the live runs; stored runs take all
TURNS: int = 3  # turns of the live race over speed; the stored table has more
COMPILE: bool = False  # let torch.compile race too: it needs a C++ compiler and half a minute


# %% tags=["setup"]
import json
import os
import re
import subprocess
import sys
from copy import deepcopy
from functools import partial
from itertools import combinations, islice
from pathlib import Path
from time import perf_counter

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchvision.models.resnet import BasicBlock

from course_utils.backbones import Classifier, load_backbone
from course_utils.data import batches, few_shot, mnist_m
from course_utils.data.digits import digit_indices, handwriting, mnist
from course_utils.data.photos import patch
from course_utils.data.splits import Split, generator
from course_utils.evaluate import hits, predict
from course_utils.evidence import Claims, compare, estimate, over_seeds, stored, unpack_hits
from course_utils.exercises import check, hint, solution  # noqa: F401
from course_utils.paths import EVIDENCE
from course_utils.plots import COLOURS, chooser, show, show_table
from course_utils.profile import get_profile, pick_device
from course_utils.training import adamw, constant, fit, supervised

profile = get_profile(PROFILE)
device = pick_device(DEVICE)
claims = Claims("12_losses_and_regularisation", OUT)
train, valid, test = (mnist_m(part) for part in ("train", "valid", "test"))
if PROFILE != "embedded":
    print(
        "The digits are the same in this world. Only the backbones differ; stored tables do not."
    )

# %% [markdown]
# The pictures are MNIST-M, the backbone is from *near* letters, and fine-tuning is that of lesson 04: AdamW, one cycle, a
# larger rate for the head. This is the plain network that every hint has to beat.


# %% tags=["evidence"]
RUN_STEPS, FEW = 40, 5  # steps of every stored run, and labels a class
BACKBONES = ("vgg_near", "vgg_far")
RECIPES = {  # the best of five each, by the search below
    "plain": 1e-3,  # rates
    "leaky ReLU": 3e-4,
    "GELU": 1e-4,
    "SiLU": 1e-4,
    "tanh": 3e-3,
    "weight decay": 3.0,
    "dropout": 0.8,  # share of the features
    "label smoothing": 0.01,
    "mixup": 0.4,  # of the Beta distribution
    "cross-entropy": 3e-3,  # rate
    "class weights": 3.0,  # the power
    "focal loss": 0.5,  # gamma
    "MSE": 1e-2,  # rates
    "L1": 1e-2,
    "smooth L1": 1e-2,
}


def recipe(rate, decay=0.0):
    """AdamW with a larger rate for the head, as in lesson 04."""
    return adamw(rate, max(rate, 1e-2), weight_decay=decay)


# %%
few, asked = few_shot(train, LABELS, SEED), test.subset(range(TESTED))


def learn(step, name=None, pretrained=True):
    """A live run: a backbone fine-tuned on the few pictures by one step of `fit`."""
    torch.manual_seed(SEED)
    backbone = load_backbone(name or profile.backbones[NET], pretrained)
    model = Classifier(backbone, len(few.classes)).to(device)
    data = batches(few, model.transform, size=32, steps=STEPS, seed=SEED, device=device)
    fit(model, data, step=step, optimizer=recipe(RECIPES["plain"]))
    return model


plain = learn(supervised)
plain_logits = predict(plain, asked)
plain_hits = (plain_logits.argmax(dim=1) == asked.labels).numpy()
print(f"plain, {LABELS} labels a class: {estimate([plain_hits], [SEED])}")

# %% [markdown]
# ## Activations
#
# Between two layers stands a function that bends. Without a bend, layers in a row would be one layer. **ReLU** cuts off what
# is below zero. Its slope is 0 there: such a unit learns nothing from this picture. The others avoid just that. *Leaky ReLU*
# keeps a small slope. *GELU* and *SiLU* are smooth, and dip below zero. *tanh* is the old one: it flattens out on both sides.

# %% tags=["evidence", "by-hand"]
ACTIVATIONS = {
    "ReLU": nn.ReLU,
    "leaky ReLU": partial(nn.LeakyReLU, 0.1),
    "GELU": nn.GELU,
    "SiLU": nn.SiLU,
    "tanh": nn.Tanh,
}


def swap(module, make):
    """Put another activation in the place of every ReLU, and leave all weights as they are."""
    for name, child in module.named_children():
        if isinstance(child, nn.ReLU):
            setattr(module, name, make())
        else:
            swap(child, make)


# %%
LINES = dict(zip(ACTIVATIONS, ("black", "orange", "blue", "green", "red"), strict=True))
figure, axes = plt.subplots(1, 2, figsize=(8.5, 3), layout="constrained")
for name, make in ACTIVATIONS.items():
    x = torch.linspace(-4, 4, 401, requires_grad=True)
    y = make()(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    for axis, values in zip(axes, (y, slope), strict=True):
        axis.plot(
            x.detach(), values.detach(), color=COLOURS[LINES[name]], linewidth=1.2, label=name
        )
axes[0].set(xlabel="what comes in", ylabel="what goes out", ylim=(-1.5, 3))
axes[1].set(xlabel="what comes in", ylabel="slope", ylim=(-0.3, 1.3))
for axis in axes:
    axis.grid(alpha=0.3)
axes[0].legend(fontsize=8)
show(
    figure,
    alt="Five activations and their slopes: ReLU is flat below zero, leaky ReLU is not, GELU and SiLU dip and are smooth, tanh is flat on both sides.",
)

# %% [markdown]
# As formulas, with $\Phi$ the normal distribution function and $\sigma(x) = 1/(1+e^{-x})$:
#
# $$\text{ReLU} = \max(x, 0), \quad \text{leaky} = \max(x, 0.1\,x), \quad \text{GELU} = x\,\Phi(x), \quad
# \text{SiLU} = x\,\sigma(x), \quad \tanh = \frac{e^x - e^{-x}}{e^x + e^{-x}}.$$
#
# Our weights were pretrained *with ReLU*. `swap` puts another function in its place, in every layer, and fine-tuning has to
# make do with it.
#
# **Predict.** Swap, and do not train at all. How far are the features from what they were? Which of the four is worst?

# %%
with torch.no_grad():
    first = load_backbone(profile.backbones[NET]).eval()
    pictures = first.transform(asked.pictures[:50])
    before = first(pictures)
    for name, make in list(ACTIVATIONS.items())[1:]:
        swapped = deepcopy(first)
        swap(swapped, make)
        off = (swapped(pictures) - before).norm() / before.norm()
        print(f"{name:10} moves the features by {off:.2f} of their length")


# %% tags=["evidence"]
def runs(table, part, arm, count=1000):
    """Test hits of an arm, by seed, and the seeds."""
    rows = table[(table["part"] == part) & (table["arm"] == arm)].sort_values("seed")
    return [unpack_hits(text, count) for text in rows["hits"]], rows["seed"].tolist()


def numbers(table, part, arm):
    """The number that goes with an arm, by seed."""
    rows = table[(table["part"] == part) & (table["arm"] == arm)].sort_values("seed")
    return rows["value"].to_numpy()


def gain(table, arm, base="plain", part="few", count=1000):
    """By how much an arm is better than another, paired."""
    ours, seeds = runs(table, part, arm, count)
    return compare(ours, runs(table, part, base, count)[0], seeds)


def claims_on_activations(table, claim):
    """What another activation gives in a pretrained backbone."""
    for arm, text, found, rule in (
        (
            "leaky ReLU",
            "changes accuracy by no more than three points",
            gain(table, "leaky ReLU"),
            "low > -0.03 and high < 0.03",
        ),
        ("GELU", "brings no gain of two points", gain(table, "GELU"), "high < 0.02"),
        ("SiLU", "brings a loss of two points or more", gain(table, "SiLU"), "high < -0.02"),
        (
            "tanh",
            "brings a loss of fifteen points or more",
            gain(table, "tanh"),
            "high < -0.15",
        ),
    ):
        claim(f"{arm} in place of ReLU {text}", found, rule=rule, origin="stored")


# %% [markdown]
# And after fine-tuning? From here on, tables are *stored*: all seeds, in the embedded world, VGG from near letters, 5 labels a
# class. (`python tools/evidence.py 12 --seeds 100..109 --out DIR` makes such a table from nothing.)

# %%
table = stored("12_losses_and_regularisation")


def spelled(found, digits=3):
    """An estimate with its interval, short."""
    return f"{found.value:.{digits}f} [{found.low:.{digits}f}, {found.high:.{digits}f}]"


rows = []
for arm in ACTIVATIONS:
    own = "plain" if arm == "ReLU" else arm
    difference = "–" if own == "plain" else spelled(gain(table, own))
    rows.append(
        [arm, RECIPES[own], f"{estimate(*runs(table, 'few', own)).value:.3f}", difference]
    )
show_table(pd.DataFrame(rows, columns=["activation", "rate", "test accuracy", "over ReLU"]))
claims_on_activations(table, claims)

# %% [markdown]
# **Explain.** Nothing is gained. And how far the features were moved before training said little about the end: leaky ReLU
# moved them far, and ties. It loses nothing on the way, and batch norm and a few steps take the rest back. tanh does lose
# something: it cuts off what is large, in every layer, and forty steps do not mend that. What the weights have learned, they
# have learned *with* their activation.
#
# Mind what was asked: *may I swap the activation of a pretrained network?* Which one to pretrain with is another question, and
# this table says nothing about it. Modern architectures come with theirs; take the weights as they were trained.
#
# ## Four regularisers
#
# All four make learning by heart harder. Two act on the network. **Weight decay** takes from every weight a small share of
# itself in each step. **Dropout** hides a random share of the features from the head in each step, so that it cannot
# lean on few of them.
#
# The other two act on the *target*. Cross-entropy asks for probability 1 on the right class. No finite logits give that, so
# training goes on raising them, long after every answer is right. **Label smoothing** (Szegedy et al. 2016) asks for
# less. With $K$ classes, amount $a$, and $e_y$ a row of zeros with a one at the label $y$:
#
# $$t = (1 - a)\, e_y + \frac{a}{K}.$$
#
# **Mixup** (Zhang et al. 2018) mixes two pictures $x_1$, $x_2$, and their targets in the same proportion:
#
# $$x = \lambda x_1 + (1 - \lambda)\, x_2, \qquad t = \lambda\, t_1 + (1 - \lambda)\, t_2, \qquad \lambda \sim
# \text{Beta}(\alpha, \alpha).$$
#
# $\lambda$ is the *share* of the first picture. A Beta distribution with a small $\alpha$ gives shares near 0 or 1 mostly; with
# $\alpha = 1$ all shares are equally likely. Either way targets are no longer class numbers, and cross-entropy becomes
#
# $$L = -\sum_{k=1}^{K} t_k \log p_k, \qquad p = \text{softmax of the logits}.$$


# %% tags=["evidence", "by-hand"]
def smoothed(labels, classes, amount):
    """Targets (n, classes): 1 − amount on the right class, and amount shared by all of them."""
    return (1 - amount) * F.one_hot(labels, classes).float() + amount / classes


def soft_cross_entropy(logits, targets):
    """Cross-entropy on targets (n, classes) that are probabilities."""
    return -(targets * logits.log_softmax(dim=1)).sum(dim=1).mean()


def mixup(pictures, targets, share):
    """Each picture mixed with its neighbour in the batch, and their targets in the same proportion."""
    return (
        share * pictures + (1 - share) * pictures.roll(1, 0),
        share * targets + (1 - share) * targets.roll(1, 0),
    )


# %% [markdown]
# Batches are shuffled, so the neighbour is a random partner. In practice: `F.cross_entropy(…, label_smoothing=…)` and `MixUp`
# of `torchvision.transforms.v2`. This lesson's tests hold ours to them.
#
# For `fit` each is a step, like everything that is new in training.


# %% tags=["evidence"]
def smoothing(amount):
    """A step for `fit`: cross-entropy on smoothed targets."""

    def step(model, batch, progress):
        logits = model(batch[0])
        targets = smoothed(batch[1], logits.shape[1], amount)
        return {"smoothed": soft_cross_entropy(logits, targets)}

    return step


def mixing(strength):
    """A step for `fit`: mixup, with one share a batch from Beta(strength, strength)."""
    shares = torch.distributions.Beta(strength, strength)

    def step(model, batch, progress):
        targets = F.one_hot(batch[1], model.head.out_features).float()
        pictures, targets = mixup(batch[0], targets, float(shares.sample()))
        return {"mixup": soft_cross_entropy(model(pictures), targets)}

    return step


def dropping(share):
    """A step for `fit`: the head does without a random share of the features."""

    def step(model, batch, progress):
        features = F.dropout(model.backbone(batch[0]), share)
        return {"dropped": F.cross_entropy(model.head(features), batch[1])}

    return step


# %% [markdown]
# **Predict.** Mix two digits half and half. What will the plain network say about the mixture? And one that was trained with
# mixup?


# %%
mixed_up = learn(mixing(1.0))


def mixture(share):
    """Two pictures, their mixture, its target, and what two networks say about it."""
    two = plain.transform(asked.pictures[[first_shown, second_shown]]).to(device)
    targets = F.one_hot(asked.labels[[first_shown, second_shown]], len(few.classes)).float()
    both, wanted = mixup(two, targets.to(device), share)
    figure, axes = plt.subplots(
        1, 2, figsize=(8, 2.6), width_ratios=(1, 2), layout="constrained"
    )
    seen = asked.pictures[[first_shown, second_shown]].float() / 255
    mean = share * seen[0] + (1 - share) * seen[1]
    axes[0].imshow(torch.cat([*seen, mean], dim=2).permute(1, 2, 0).numpy())
    axes[0].set(xticks=[], yticks=[], title="two, and their mixture")
    heights = {"target": (wanted[0], "black")}
    with torch.no_grad():
        for name, model, colour in (("plain", plain, "orange"), ("mixup", mixed_up, "blue")):
            heights[name] = (model.eval()(both)[0].softmax(dim=0), colour)
    for number, (name, (values, colour)) in enumerate(heights.items()):
        x = np.arange(len(values)) + 0.27 * (number - 1)
        axes[1].bar(x, values.cpu(), 0.25, color=COLOURS[colour], label=name)
    axes[1].set(xticks=range(len(few.classes)), ylim=(0, 1), xlabel="digit")
    axes[1].set(ylabel="probability", title=f"λ = {share:g}")
    axes[1].legend(fontsize=8)
    return figure


first_shown = 0
second_shown = int((asked.labels != asked.labels[0]).nonzero()[0])
show(
    mixture(0.7),
    alt="Two digits on photographs and their mixture; bars of its target and of what the plain and the mixup network say.",
)
chooser("λ", (1.0, 0.9, 0.7, 0.6, 0.5), mixture)

# %% [markdown]
# **Explain.** To the plain network a mixture is a picture like any other, and it mostly picks one of the two. (Which one
# depends on the strokes more than on λ.) The other one was asked for shares, and gives something like them.
#
# It also says less than 1 about pictures that are not mixed. Is that good or bad? Confidence is worth something if it can be
# *believed*: of all pictures with confidence .8, a share of .8 should be right. The **calibration error** of lesson 02 measures
# by how much that fails, on average over bins of confidence.
#
# **Predict.** For each of the four: is it more accurate than plain? Is it better calibrated? (More than one answer is no.)


# %% tags=["evidence"]
REGULARISERS = ("weight decay", "dropout", "label smoothing", "mixup")
USUAL = (
    0.1  # the amount of label smoothing that papers take; it is shown beside the searched one
)
STEP_OF = {"dropout": dropping, "label smoothing": smoothing, "mixup": mixing}


def calibration_error(logits, labels, bins=10):
    """Mean gap between confidence and accuracy over bins of confidence, as in exercise 02.5."""
    confidence, answer = logits.softmax(dim=1).max(dim=1)
    right = (answer == labels).float()
    bin_of = (confidence * bins).ceil().long().clamp(1, bins)
    parts = [bin_of == number for number in range(1, bins + 1)]
    gaps = [p.sum() * (confidence[p].mean() - right[p].mean()).abs() for p in parts if p.any()]
    return float(sum(gaps) / len(labels))


def tuned(arm, few, seed, knob=None, *, name="vgg_near", step=None, schedule=None):
    """A backbone fine-tuned on a few pictures with one arm of this lesson. knob: else what the search found."""
    knob = RECIPES[arm] if knob is None else knob
    torch.manual_seed(seed)
    model = Classifier(load_backbone(name), len(few.classes)).to(device)
    if arm in ACTIVATIONS:
        swap(model.backbone, ACTIVATIONS[arm])
    if arm in STEP_OF:
        step = STEP_OF[arm](knob)
    rate = RECIPES["plain"] if arm in REGULARISERS else knob
    decay = knob if arm == "weight decay" else 0.0
    data = batches(few, model.transform, size=32, steps=RUN_STEPS, seed=seed, device=device)
    fit(model, data, step=step or supervised, optimizer=recipe(rate, decay), schedule=schedule)
    return model


def claims_on_regularisers(table, claim):
    """What four regularisers give at few labels: accuracy, and confidence that can be believed."""
    for arm in REGULARISERS:
        claim(
            f"At few labels, {arm} brings no gain of four points",
            gain(table, arm),
            rule="high < 0.04",
            origin="stored",
        )
    claim(
        f"Label smoothing of {USUAL:g} loses half a point or more",
        gain(table, f"label smoothing, {USUAL:g}"),
        rule="high < -0.005",
        origin="stored",
    )
    seeds = runs(table, "few", "plain")[1]
    for arm in ("weight decay", "dropout", "mixup", f"label smoothing, {USUAL:g}"):
        more = numbers(table, "few", arm) - numbers(table, "few", "plain")
        claim(
            f"The calibration error rises by .03 or more with {arm}",
            over_seeds(more, seeds, "calibration error"),
            rule="low > 0.03",
            origin="stored",
        )


# %%
rows = []
for arm in ("plain", *REGULARISERS, f"label smoothing, {USUAL:g}", "twice the labels"):
    errors = over_seeds(numbers(table, "few", arm), runs(table, "few", arm)[1], "error")
    difference = "–" if arm == "plain" else spelled(gain(table, arm))
    accuracy_of = estimate(*runs(table, "few", arm)).value
    knob = USUAL if arm.startswith("label smoothing,") else RECIPES.get(arm, RECIPES["plain"])
    rows.append([arm, f"{knob:g}", f"{accuracy_of:.3f}", difference, spelled(errors)])
columns = ["arm", "knob", "test accuracy", "over plain", "calibration error"]
show_table(pd.DataFrame(rows, columns=columns))
claims_on_regularisers(table, claims)

# %% [markdown]
# **Explain.** Two columns, two surprises.
#
# *Accuracy.* None of the four brings what twice the labels bring. Of smoothing the search wanted as little as it was offered:
# it went to the lower end of its grid, which is hardly any. The row below it has the amount that papers take, and loses by
# it. All of this is about *few labels, few steps and a pretrained start*. The head has to become sure of itself in forty
# steps, and these hints hold it back. (In lesson 06, from scratch, weight decay was worth some points. It needed a strength
# far above the usual one there, too.)
#
# *Calibration.* Label smoothing and mixup are recommended because networks are too sure of themselves. Ours is not: its
# calibration error is small. Make it more modest, and it is too modest. A remedy needs the illness. So measure the error
# first, and if confidence is what you want to mend, lesson 02's temperature does it with one number and without training
# again.
#
# ## A rare class
#
# Now a task of another kind. A machine sorts nines, and has to find the few *fours* among them. In training there are 19
# nines for each four. Whoever says "nine" to everything is right in 95 cases of 100, and useless. So we test on as many fours
# as nines: the accuracy there is **balanced accuracy**, the mean of the two classes' *recalls* (the share of a class that is
# found).
#
# Three remedies are in every list. With $p$ the probability of the right class:
#
# - **Class weights**: each picture counts as $w_y \propto (\text{share of its class})^{-c}$; with $c = 1$ both classes count
#   the same.
# - **Focal loss** (Lin et al. 2017): each picture counts by how *hard* it is,
#   $-(1 - p)^\gamma \log p$. With $\gamma = 0$ it is cross-entropy.
# - **Move the threshold**: train as if nothing were wrong. Afterwards subtract from each logit the logarithm of the class's
#   share in training. That takes one line, and no training at all (Menon et al. 2021 call it *logit adjustment*).


# %% tags=["evidence", "by-hand"]
def focal_loss(logits, labels, gamma):
    """Cross-entropy, each picture weighted by (1 − p)^gamma, where p is its probability of the right class."""
    log_p = logits.log_softmax(dim=1).gather(1, labels[:, None]).squeeze(1)
    missing = (1 - log_p.exp()).clamp(min=1e-6)  # at 0, a root has no slope
    return (-(missing**gamma) * log_p).mean()


def class_weights(labels, classes, power):
    """A weight a class: its share of the labels to the power of −power; over pictures, their mean is 1."""
    share = torch.bincount(labels, minlength=classes) / len(labels)
    weights = share ** -float(power)
    return weights / (share * weights).sum()


# %%
figure, axis = plt.subplots(figsize=(6.5, 3), layout="constrained")
p = torch.linspace(0.01, 0.999, 200)
for gamma, colour in ((0, "black"), (0.5, "orange"), (2, "blue"), (5, "green")):
    name = f"γ = {gamma:g}" + (", cross-entropy" if gamma == 0 else "")
    axis.plot(p, -((1 - p) ** gamma) * p.log(), color=COLOURS[colour], label=name)
axis.set(xlabel="probability of the right class, p", ylabel="loss", ylim=(0, 3))
axis.grid(alpha=0.3)
axis.legend(fontsize=8)
show(
    figure,
    alt="Focal loss over the probability of the right class: the larger gamma, the less counts what is right and sure.",
)

# %% [markdown]
# **Predict.** Plain cross-entropy from 5 fours and 95 nines: which share of the fours does it find? Which of the three
# remedies helps most?


# %% tags=["evidence"]
RARE, COMMON = 4, 9
IMBALANCE = (5, 95)  # fours and nines to learn from
SORTED = ("cross-entropy", "class weights", "focal loss")  # what is trained for it
SORTERS = (*SORTED, "threshold moved")


def rare_and_common(split, rare, common, seed):
    """A two-class task: `rare` fours (class 1), then `common` nines (class 0) of a split, drawn by seed."""
    draw = torch.Generator().manual_seed(seed)
    chosen = []
    for digit, count in ((RARE, rare), (COMMON, common)):
        members = (split.labels == digit).nonzero().flatten()
        chosen.append(members[torch.randperm(len(members), generator=draw)[:count]])
    chosen = torch.cat(chosen)
    labels = (split.labels[chosen] == RARE).long()
    return Split(split.pictures[chosen], labels, ("nine", "four"))


balanced = rare_and_common(test, 100, 100, 0)
balanced_valid = rare_and_common(valid, 50, 50, 0)


def sorter(arm, seed, knob=None):
    """A network that tells fours from nines, from few fours, and the pictures that it learned from."""
    few = rare_and_common(train, *IMBALANCE, seed)
    knob = RECIPES[arm] if knob is None else knob
    rate = knob if arm == "cross-entropy" else RECIPES["cross-entropy"]

    def step(model, batch, progress):
        logits = model(batch[0])
        if arm == "focal loss":
            return {arm: focal_loss(logits, batch[1], knob)}
        weights = class_weights(few.labels, 2, knob).to(device)
        return {
            arm: F.cross_entropy(logits, batch[1], weights if arm == "class weights" else None)
        }

    return tuned("plain", few, seed, rate, step=step), few


def imbalanced(seed):
    """Rows of the two-class task; the test is balanced."""
    for arm in SORTED:
        model, few = sorter(arm, seed)
        logits = predict(model, balanced)
        yield answers("rare", arm, logits, balanced)
        if arm == "cross-entropy":
            prior = torch.bincount(few.labels) / len(few)
            yield answers("rare", "threshold moved", logits - prior.log(), balanced)


def claims_on_imbalance(table, claim):
    """What three remedies give where one class is rare in training."""
    seeds = runs(table, "rare", "cross-entropy", 200)[1]
    fours = {
        arm: [found[:100] for found in runs(table, "rare", arm, 200)[0]] for arm in SORTERS
    }
    for text, found, rule in (
        (
            "Cross-entropy misses one of the rare fours in twenty, or more",
            compare([np.ones(100)] * len(seeds), fours["cross-entropy"], seeds),
            "low > 0.05",
        ),
        (
            "Moving the threshold afterwards finds at least three fours in a hundred more",
            compare(fours["threshold moved"], fours["cross-entropy"], seeds),
            "low > 0.03",
        ),
        (
            "Moving the threshold raises balanced accuracy by at least a point",
            gain(table, "threshold moved", "cross-entropy", "rare", 200),
            "low > 0.01",
        ),
        (
            "Focal loss, at the gamma that was found, raises balanced accuracy by no more than three points",
            gain(table, "focal loss", "cross-entropy", "rare", 200),
            "high < 0.03",
        ),
    ):
        claim(text, found, rule=rule, origin="stored")


# %%
rows = []
for arm in SORTERS:
    found, seeds = runs(table, "rare", arm, 200)
    recalls = [
        estimate([each[part] for each in found], seeds)
        for part in (slice(100), slice(100, 200))
    ]
    difference = (
        "–" if arm == SORTERS[0] else spelled(gain(table, arm, SORTERS[0], "rare", 200))
    )
    shown = [f"{recall.value:.2f}" for recall in (estimate(found, seeds), *recalls)]
    knob = f"{RECIPES[arm]:g}" if arm in RECIPES else "–"
    worst = min(each.mean() for each in found)
    rows.append([arm, knob, *shown, difference, f"{worst:.2f}"])
columns = ["arm", "knob", "balanced accuracy", "fours found", "nines found"]
columns += ["over cross-entropy", "worst seed"]
show_table(pd.DataFrame(rows, columns=columns))
claims_on_imbalance(table, claims)

# %% [markdown]
# **Explain.** Plain cross-entropy says "nine" too often, since in training that was a good guess. The cheapest remedy does
# best: moving the threshold takes the good guess out again, after training, and costs one line. It finds far more fours, and
# hardly a nine is lost.
#
# Focal loss does not help. The search took the smallest γ that it was offered, next to cross-entropy itself. Focal loss was
# made for detectors that look at a hundred thousand easy places in a picture. Ours has a hundred pictures, and the rare class
# is not hard. It is *rare*.
#
# Class weights find more fours as well, on average. But look at the last column: at one seed or another they went wrong. A
# large weight on five pictures hands the network over to these five. And the search could not see that coming: it had one
# seed and a hundred validation pictures. Where you have as few, take the remedy with nothing to tune.
#
# (Focal loss is also on lists of *security* measures. Lesson 10 tried it there: it is none.)
#
# ## Where is the digit?
#
# Not every target is a class. Below, a digit of half the size lies somewhere on its photograph. The network has to say where:
# two numbers, in pixels, from the top and from the left. That is **regression**, the other half of every object detector.
#
# A classifier's backbone ends in an average over the whole map, which is made to forget where things are. So we leave the
# average out, and the head sees the map.


# %% tags=["evidence"]
SIDE, SMALL = 32, 16  # pixels: of the picture, and of the digit in it
PLACES = SIDE - SMALL + 1  # rows, or columns, where its upper left corner may lie
WRONG = 0.2  # share of wrong places in training


def hidden_digits(split, count, seed=0):
    """MNIST-M digits of half the size, each somewhere on its photograph. The label is the number of its place."""
    drawn, pictures = handwriting()[0], []
    places = np.random.default_rng(seed).integers(PLACES, size=(count, 2))
    for index, (row, column) in zip(digit_indices(split)[:count], places, strict=True):
        rng = generator("hidden", split, index, seed)
        ground = patch("test" if split == "test" else "train", rng, SIDE, crop=(SIDE, 2 * SIDE))
        picture = ground.astype(np.int16)
        small = drawn[index].reshape(SMALL, 2, SMALL, 2).mean(axis=(1, 3)).astype(np.int16)
        spot = picture[row : row + SMALL, column : column + SMALL]
        spot[:] = np.abs(spot - small[..., None])
        pictures.append(torch.from_numpy(picture.astype(np.uint8)))
    places = torch.from_numpy(places[:, 0] * PLACES + places[:, 1])
    names = tuple(str(place) for place in range(PLACES**2))
    return Split(torch.stack(pictures).permute(0, 3, 1, 2).contiguous(), places, names)


def centres(places):
    """The middles of the digits at these places, (n, 2): pixels from the top and from the left."""
    return torch.stack([places // PLACES, places % PLACES], dim=1) + SMALL / 2


def misplaced(split, share, seed):
    """The same pictures, a share of them with the label of a place drawn at random."""
    draw = torch.Generator().manual_seed(seed)
    wrong = torch.randperm(len(split), generator=draw)[: int(share * len(split))]
    labels = split.labels.clone()
    labels[wrong] = torch.randint(PLACES**2, (len(wrong),), generator=draw)
    return Split(split.pictures, labels, split.classes)


class Locator(nn.Module):
    """A backbone without its last average, and a head that says a place in pixels: (n, 2)."""

    def __init__(self, name):
        super().__init__()
        self.backbone = load_backbone(name)
        self.transform = self.backbone.transform
        maps = [
            part for part in self.backbone.layers if not isinstance(part, nn.AdaptiveAvgPool2d)
        ]
        self.backbone.layers = nn.Sequential(*maps)
        blank = self.transform(torch.zeros(1, 3, SIDE, SIDE))
        with torch.no_grad():
            width = self.backbone.eval()(blank).shape[1]
        self.head = nn.Linear(width, 2)

    def forward(self, pictures):
        return SIDE / 2 + SMALL / 2 * self.head(self.backbone(pictures))


# %%
hidden = hidden_digits("test", 6)
figure, axes = plt.subplots(1, len(hidden), figsize=(8, 1.7), layout="constrained")
for axis, picture, (row, column) in zip(
    axes, hidden.pictures, centres(hidden.labels), strict=True
):
    axis.imshow(picture.permute(1, 2, 0).numpy())
    axis.plot(column - 0.5, row - 0.5, "+", color="white", markersize=16, markeredgewidth=3)
    axis.plot(column - 0.5, row - 0.5, "+", color=COLOURS["red"], markersize=14)
    axis.set(xticks=[], yticks=[], title=f"{row:g}, {column:g}")
show(figure, alt="Six photographs with a small digit each, its middle marked by a cross.")

# %% [markdown]
# Let $d$ be an error in pixels. **MSE** is $d^2$: an error of ten pixels counts a hundred times as much as one of one pixel.
# Fine if it is the network's error. But labels can be wrong, too. Somebody clicked in the wrong place, and then that one
# label pulls with all its weight. **L1** is $|d|$: its slope is the same for small and large errors. It never gets finer as
# the network gets closer. **Smooth L1** takes the middle of the one and the ends of the other:
#
# $$\ell_\beta(d) = \begin{cases} d^2 / (2\beta) & \text{if } |d| < \beta, \\ |d| - \beta/2 & \text{else.} \end{cases}$$


# %% tags=["evidence", "by-hand"]
def smooth_l1(error, beta):
    """Half a square over beta where an error is below beta, the error less half of beta beyond: the mean."""
    error = error.abs()
    return torch.where(error < beta, error**2 / (2 * beta), error - beta / 2).mean()


LOSSES = {
    "MSE": lambda error: (error**2).mean(),
    "L1": lambda error: error.abs().mean(),
    "smooth L1": partial(smooth_l1, beta=1.0),
}

# %%
figure, axes = plt.subplots(1, 2, figsize=(8, 2.8), layout="constrained")
for name, colour in zip(LOSSES, ("orange", "black", "blue"), strict=True):
    error = torch.linspace(-3, 3, 301, requires_grad=True)
    each = torch.stack([LOSSES[name](one) for one in error])
    (slope,) = torch.autograd.grad(each.sum(), error)
    for axis, values in zip(axes, (each, slope), strict=True):
        axis.plot(error.detach(), values.detach(), color=COLOURS[colour], label=name)
axes[0].set(xlabel="error, pixels", ylabel="loss", ylim=(0, 4))
axes[1].set(xlabel="error, pixels", ylabel="slope: how hard it pulls", ylim=(-4, 4))
axes[0].legend(fontsize=8)
show(
    figure,
    alt="MSE, L1 and smooth L1 over the error, and their slopes: that of MSE grows without end, L1 jumps at zero, smooth L1 does neither.",
)

# %% [markdown]
# **Predict.** 400 pictures to learn from. Once all labels are right; once a fifth of them is somewhere at random. How many
# pixels does each loss lose by that?


# %% tags=["evidence"]
def located(loss, share, seed, rate=None):
    """A locator trained with one loss, a share of its labels being wrong."""
    torch.manual_seed(seed)
    model = Locator("vgg_near").to(device)
    few = misplaced(hidden_digits("train", 400, seed), share, seed)
    data = batches(few, model.transform, size=32, steps=RUN_STEPS, seed=seed, device=device)

    def step(model, batch, progress):
        return {loss: LOSSES[loss](model(batch[0]) - centres(batch[1]))}

    fit(model, data, step=step, optimizer=recipe(rate or RECIPES[loss]))
    return model


def miss(model, split):
    """How far each answer is from the middle of the digit, in pixels: (n,)."""
    return (predict(model, split) - centres(split.labels)).norm(dim=1)


def misses(seed):
    """Rows of mean distances in pixels, for each loss, with right and with some wrong labels."""
    unseen = hidden_digits("test", 300)
    for loss in LOSSES:
        for share in (0.0, WRONG):
            far_off = miss(located(loss, share, seed), unseen).mean().item()
            yield {
                "part": "place",
                "arm": f"{loss}, {share:g} wrong",
                "value": round(far_off, 4),
            }


def pixels_more(table, one, other):
    """By how many pixels the first arm is further off than the second, paired by seed."""
    difference = numbers(table, "place", one) - numbers(table, "place", other)
    seeds = table[(table["part"] == "place") & (table["arm"] == one)]["seed"].sort_values()
    return over_seeds(difference, seeds.tolist(), "pixels")


def claims_on_places(table, claim):
    """What wrong labels cost each loss."""
    for text, one, other, rule in (
        (
            "With right labels, MSE is no more than .2 pixels further off than smooth L1",
            "MSE, 0 wrong",
            "smooth L1, 0 wrong",
            "high < 0.2",
        ),
        (
            f"With a share of {WRONG:g} wrong, MSE is at least .1 pixels further off than smooth L1",
            f"MSE, {WRONG:g} wrong",
            f"smooth L1, {WRONG:g} wrong",
            "low > 0.1",
        ),
        (
            f"With a share of {WRONG:g} wrong, smooth L1 is no more than .1 pixels further off than L1",
            f"smooth L1, {WRONG:g} wrong",
            f"L1, {WRONG:g} wrong",
            "high < 0.1",
        ),
        (
            "Wrong labels put MSE at least .3 pixels further off",
            f"MSE, {WRONG:g} wrong",
            "MSE, 0 wrong",
            "low > 0.3",
        ),
    ):
        claim(text, pixels_more(table, one, other), rule=rule, origin="stored")


# %%
rows = []
for loss in LOSSES:
    row = [loss, f"{RECIPES[loss]:g}"]
    for share in (0.0, WRONG):
        row.append(f"{numbers(table, 'place', f'{loss}, {share:g} wrong').mean():.2f}")
    cost = pixels_more(table, f"{loss}, {WRONG:g} wrong", f"{loss}, 0 wrong")
    rows.append([*row, spelled(cost, 2)])
columns = [
    "loss",
    "rate",
    "pixels off, labels right",
    f"a share of {WRONG:g} wrong",
    "difference",
]
show_table(pd.DataFrame(rows, columns=columns))
claims_on_places(table, claims)

# %% [markdown]
# **Explain.** With right labels the loss hardly matters, and MSE is as good as any. With wrong ones it pays. A label that
# lies ten pixels off pulls twenty times as hard as one that lies half a pixel off, so MSE is drawn to the average of right
# and wrong. L1 and smooth L1 count votes rather than distances, and most votes are right. Smooth L1 is at least as good as
# L1, and its slope is smooth at zero.
#
# β is where the one becomes the other, in the units of the target: *about as large as an error that you would call small*.
# Here that is one pixel. (If you scale targets to 0 … 1 and leave β at its default of 1, nothing is ever beyond it. Then
# smooth L1 *is* MSE.)
#
# ## Averaging
#
# Two networks that err differently can correct each other. An **ensemble** averages what they *say* (log-probabilities, as in
# lesson 07), and has to run them all. Can one average what they *are*, their weights, and run one?
#
# - A **uniform soup** (Wortsman et al. 2022): fine-tune several times *from one start*, with other settings, and average
#   the weights.
# - **EMA**, the exponential moving average: during one training, keep a second set of weights $\bar\theta$ that follows the
#   first, $\theta$, with a decay $m$ near 1:
#
# $$\bar\theta \leftarrow m\, \bar\theta + (1 - m)\, \theta.$$
#
# One thing is not a weight. Batch norm's running means and variances were measured on the maps of *another* network.
# The average of the weights makes other maps. So measure again: show the training pictures once more, without learning.
# `torch.optim.swa_utils.update_bn` does that.


# %% tags=["evidence", "by-hand"]
def follow(average, model, decay):
    """One step of the exponential moving average: it moves by 1 − decay of the way to the weights."""
    with torch.no_grad():
        for mean, now in zip(average.parameters(), model.parameters(), strict=True):
            mean.lerp_(now, 1 - decay)


def soup(models):
    """A network whose weights are the means of those of the others."""
    mean = deepcopy(models[0])
    with torch.no_grad():
        for ours, *each in zip(
            mean.parameters(), *(m.parameters() for m in models), strict=True
        ):
            ours.copy_(torch.stack(each).mean(dim=0))
    return mean


# %% tags=["evidence"]
EMA = 0.9  # the decay, not searched: it looks back about ten steps


def refreshed(model, few, seed):
    """The same network, its batch norm measured on the training pictures once more."""
    data = batches(few, model.transform, size=32, seed=seed, device=device)
    update_bn(data.epoch(0), model, device)
    return model


def following(average):
    """A step for `fit` that also keeps a moving average of the weights."""

    def step(model, batch, progress):
        follow(average, model, EMA)
        return supervised(model, batch, progress)

    return step


# %% [markdown]
# The ingredients are there: the five networks of the section on regularisers. They start from the same backbone and the same
# head, learn from the same pictures, and each has another regulariser.
#
# **Predict.** Which is best: the one network that is best on validation pictures, the ensemble of five, or the soup? And how
# much does EMA give where the rate is constant, and the weights still jump at the end?


# %% tags=["evidence"]
def answers(part, arm, model, split):
    """A row of the table: which pictures a network, or its logits, gets right, and its calibration error."""
    logits = model if isinstance(model, torch.Tensor) else predict(model, split)
    right = (logits.argmax(dim=1) == split.labels).numpy()
    error = round(calibration_error(logits, split.labels), 5)
    return {"part": part, "arm": arm, "hits": right, "value": error}


def averaged(models, logits, few, seed):
    """Rows of what averaging gives: of outputs, of weights from one start and from two, and during training."""
    best = max(models, key=lambda arm: hits(models[arm], valid).float().mean())
    yield answers("mean", "best on validation", logits[best], test)
    mean = torch.stack([found.log_softmax(dim=1) for found in logits.values()]).mean(dim=0)
    yield answers("mean", "ensemble", mean, test)
    mixed = soup(list(models.values()))
    yield answers("mean", "soup, statistics of one", mixed, test)
    yield answers("mean", "soup", refreshed(mixed, few, seed), test)
    far = tuned("plain", few, seed, name="vgg_far")
    yield answers("mean", "far start", far, test)
    two_starts = refreshed(soup([models["plain"], far]), few, seed)
    yield answers("mean", "soup of two starts", two_starts, test)
    torch.manual_seed(seed)  # the start of the run that the average follows
    average = Classifier(load_backbone("vgg_near"), len(few.classes)).to(device)
    steady = tuned("plain", few, seed, step=following(average), schedule=constant)
    follow(average, steady, EMA)
    yield answers("mean", "constant rate", steady, test)
    yield answers("mean", "constant rate, EMA", refreshed(average, few, seed), test)


def experiment(seed):
    """Every hint against the same network without it."""
    few = few_shot(train, FEW, seed)
    for arm in list(ACTIVATIONS)[1:]:
        yield answers("few", arm, tuned(arm, few, seed), test)
    models = {arm: tuned(arm, few, seed) for arm in ("plain", *REGULARISERS)}
    logits = {arm: predict(model, test) for arm, model in models.items()}
    for arm, found in logits.items():
        yield answers("few", arm, found, test)
    usual = tuned("label smoothing", few, seed, USUAL)
    yield answers("few", f"label smoothing, {USUAL:g}", usual, test)
    twice = tuned("plain", few_shot(train, 2 * FEW, seed), seed)
    yield answers("few", "twice the labels", twice, test)
    yield from averaged(models, logits, few, seed)
    yield from imbalanced(seed)
    yield from misses(seed)


def over(table, arm, base):
    """By how much a row of the averages is better than another, paired; "plain" is one of the few-label rows."""
    ours, seeds = runs(table, "mean", arm)
    return compare(ours, runs(table, "few" if base == "plain" else "mean", base)[0], seeds)


def claims_on_averages(table, claim):
    """What averaging gives, of outputs and of weights."""
    for text, found, rule in (
        (
            "The ensemble of five brings no gain of three points over one plain network",
            over(table, "ensemble", "plain"),
            "high < 0.03",
        ),
        (
            "The soup, one network, is no more than two points from the ensemble of five",
            over(table, "soup", "ensemble"),
            "low > -0.02 and high < 0.02",
        ),
        (
            "Batch norm measured again moves the soup by no more than three points",
            over(table, "soup", "soup, statistics of one"),
            "low > -0.03 and high < 0.03",
        ),
        (
            "Where the rate is constant, EMA brings no gain of two points",
            over(table, "constant rate, EMA", "constant rate"),
            "high < 0.02",
        ),
    ):
        claim(text, found, rule=rule, origin="stored")


# %%
rows = []
for arm, runs_needed in (
    ("best on validation", 1),
    ("ensemble", 5),
    ("soup, statistics of one", 1),
    ("soup", 1),
    ("constant rate", 1),
    ("constant rate, EMA", 1),
):
    value = estimate(*runs(table, "mean", arm)).value
    rows.append([arm, runs_needed, f"{value:.3f}", spelled(over(table, arm, "plain"))])
columns = ["what", "networks to run", "test accuracy", "over plain (one cycle)"]
show_table(pd.DataFrame(rows, columns=columns))
claims_on_averages(table, claims)

# %% [markdown]
# **Explain.** All of them are within a point or two of each other. The ensemble of five adds little: its networks come from
# one start and the same few pictures, and they err alike. The soup gets as much with *one* network to run, so if you have
# tuned five settings anyway, it is free. (Here it does not matter whether batch norm is measured again, since the five lie so
# close together. Further apart it does: see *what goes wrong*.)
#
# EMA smooths what jumps. In forty steps of a small rate nothing jumps much, and one cycle has brought the rate to zero by
# itself. It earns its place in long runs at a high constant rate.
#
# ## What do the hints give?
#
# All hints for the few-label task in one picture, against the plain network. And as a yardstick, what nobody calls a trick:
# twice the labels.
#
# **Predict.** Which of them gives as much as twice the labels?


# %% tags=["evidence"]
HINTS = {
    **{arm: "few" for arm in (*list(ACTIVATIONS)[1:], *REGULARISERS)},
    **{arm: "mean" for arm in ("soup", "ensemble")},
}


def claims_on_hints(table, claim):
    """The answer to the title: every hint beside twice the labels."""
    gains = {
        arm: gain(table, arm) if part == "few" else over(table, arm, "plain")
        for arm, part in HINTS.items()
    }
    most = max(gains, key=lambda arm: gains[arm].value)
    twice, seeds = runs(table, "few", "twice the labels")
    claim(
        "Twice the labels gain more than whichever of these hints gains most",
        compare(twice, runs(table, HINTS[most], most)[0], seeds),
        rule="low > 0",
        origin="stored",
    )
    claim(
        "Whichever of these hints gains most, it gains less than four points",
        gains[most],
        rule="high < 0.04",
        origin="stored",
    )


def stored_claims(table, claim):
    """What the stored seeds say."""
    for part in (
        claims_on_activations,
        claims_on_regularisers,
        claims_on_imbalance,
        claims_on_places,
        claims_on_averages,
        claims_on_hints,
        claims_on_mistakes,
    ):
        part(table, claim)


# %%
figure, axis = plt.subplots(figsize=(7.5, 4), layout="constrained")
shown = {**HINTS, "twice the labels": "few"}
for height, (arm, part) in enumerate(reversed(shown.items())):
    found = gain(table, arm) if part == "few" else over(table, arm, "plain")
    colour = COLOURS["orange" if arm == "twice the labels" else "blue"]
    axis.plot([100 * found.low, 100 * found.high], [height, height], color=colour)
    axis.plot(100 * found.value, height, "o", color=colour)
axis.axvline(0, color=COLOURS["black"], linewidth=0.8)
axis.set(xlabel="points over plain", yticks=range(len(shown)))
axis.set_yticklabels(reversed(shown))
axis.grid(alpha=0.3, axis="x")
show(
    figure,
    alt="Points over the plain network with intervals, for each activation, regulariser and average, and for twice the labels.",
)
claims_on_hints(table, claims)

# %% [markdown]
# **Explain.** That answers the title. At few labels, on a network that is pretrained well, these hints give a point or
# nothing, and some take more than that. Twice the labels give more than any of them. The hints that did pay were those that
# fitted a *fault*: a threshold where classes are unequal, smooth L1 where labels are wrong. So look for the fault first, and
# then for the hint.
#
# One caution. Each arm got five tries on one seed. With more tries, more steps or another backbone a hint may well be worth
# more. The table says what it gave *here*; how to ask is what you take home.

# %% tags=["search"]
RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)  # where the weights shall stay near their start
LARGER = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)  # where they have further to go
STRENGTHS = {
    **dict.fromkeys(("plain", "leaky ReLU", "GELU", "SiLU"), RATES),
    **dict.fromkeys(("tanh", "cross-entropy", *LOSSES), LARGER),
    "weight decay": (1.0, 3.0, 10.0, 30.0, 100.0),
    "dropout": (0.1, 0.2, 0.5, 0.8, 0.9),  # share of the features
    "label smoothing": (0.01, 0.03, 0.1, 0.3, 0.5),
    "mixup": (0.1, 0.2, 0.4, 1.0, 2.0),  # of the Beta distribution
    "class weights": (1.0, 1.5, 2.0, 3.0, 4.0),  # the power
    "focal loss": (0.5, 1.0, 2.0, 5.0, 10.0),  # gamma
}
GRID = {
    "arm": tuple(STRENGTHS),
    "choice": (0, 1, 2, 3, 4),  # which of the five
    "seed": (900,),  # never used for a result
}


def validation_accuracy(arm, choice, seed):
    """What one strength is worth on validation pictures; for places, minus the mean distance in pixels."""
    knob = STRENGTHS[arm][choice]
    if arm in LOSSES:
        return -miss(located(arm, WRONG, seed, knob), hidden_digits("valid", 300)).mean().item()
    if arm in SORTED:
        return hits(sorter(arm, seed, knob)[0], balanced_valid).float().mean().item()
    return hits(tuned(arm, few_shot(train, FEW, seed), seed, knob), valid).float().mean().item()


# %% [markdown]
# ## Speed: what each hint gives here, and on a GPU
#
# Four hints stand in every article on fast training. Each changes *how* a step is computed, and leaves what is learned alone,
# or nearly.
#
# | hint | what it changes | what it hopes for |
# |---|---|---|
# | **mixed precision** | convolutions and matrix products compute in 16 bits; weights and sums stay in 32 | hardware with 16-bit units; half the memory to move |
# | **channels-last** | a picture lies in memory pixel by pixel, no longer channel by channel | kernels of convolutions that are made for this order |
# | **`torch.compile`** | many small operations are fused into few | less time between operations, fewer trips to memory |
# | **data on the device** | the whole set is one tensor there; a batch is an index | nobody waits for a picture to be read and copied |
#
# A hint is no law. So they race: the same small VGG takes the same steps in each way, *by turns*, so that whatever else the
# machine does hits all of them alike. One turn warms up and is not counted. What counts is the **ratio** to the plain way
# within a turn, and its median over turns. It is no number of seconds: yours are others.


# %% tags=["speed"]
WAYS = {  # name: what differs from the plain way (float32, channels first, data on the device)
    "plain": {},
    "channels-last": {"form": torch.channels_last},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},  # on a GPU only
    "DataLoader": {"loader": True},
    "compiled": {"compiled": True},
    "channels-last, bfloat16": {"form": torch.channels_last, "dtype": torch.bfloat16},
}


class Reader(Dataset):
    """Hands out one transformed picture after another, as a set that is read from disk does."""

    def __init__(self, split, transform):
        self.split, self.transform = split, transform

    def __len__(self):
        return len(self.split.labels)

    def __getitem__(self, index):
        return self.transform(self.split.pictures[index]), self.split.labels[index]


def resident(split, transform, size, device):
    """Batches without end from one tensor that lives on the device."""
    pictures, labels = split.pictures.to(device), split.labels.to(device)
    while True:
        chosen = torch.randint(len(labels), (size,), device=device)
        yield transform(pictures[chosen]), labels[chosen]


def loaded(split, transform, size, device):
    """Batches without end from a DataLoader: picture by picture, then a copy to the device."""
    far = device.type == "cuda"  # then processes read ahead, into memory that is copied fast
    ahead = {"num_workers": 4, "pin_memory": True, "persistent_workers": True} if far else {}
    loader = DataLoader(
        Reader(split, transform), batch_size=size, shuffle=True, drop_last=True, **ahead
    )
    while True:
        for pictures, labels in loader:
            yield pictures.to(device, non_blocking=True), labels.to(device, non_blocking=True)


def trainer(device, size, form=None, dtype=None, loader=False, compiled=False):
    """A function that trains a small VGG for so many steps, in one of the ways."""
    form = form or torch.contiguous_format
    model = Classifier(load_backbone("vgg_far"), 10).to(device, memory_format=form).train()
    forward = torch.compile(model) if compiled else model
    optim = torch.optim.SGD(model.parameters(), lr=0.01)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    source = loaded if loader else resident
    stream = source(mnist(), model.transform, size, device)

    def train(steps):
        for pictures, labels in islice(stream, steps):
            pictures = pictures.contiguous(memory_format=form)
            with torch.autocast(device.type, dtype=dtype, enabled=dtype is not None):
                loss = F.cross_entropy(forward(pictures), labels)
            optim.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            scaler.step(optim)
            scaler.update()

    return train


# %% [markdown]
# A GPU works on while Python goes on, so whoever reads the clock has to wait for it first: `synchronize`.


# %% tags=["speed"]
def seconds_of(train, steps, device):
    """How long so many steps take, until the device has finished."""
    synchronize = getattr(torch, device.type).synchronize
    synchronize()
    start = perf_counter()
    train(steps)
    synchronize()
    return perf_counter() - start


def speed_rows(device, turns, steps, size, compiled=False, without=()):
    """Throughput of each way, plain = 1, by turns: one row a turn and way. One turn before the first is not counted."""
    left_out = {*without, *(() if compiled else ("compiled",))}
    left_out |= {"float16"} if device.type != "cuda" else set()
    racers = {}
    for name, settings in WAYS.items():
        if name in left_out:
            continue
        try:
            train = trainer(device, size, **settings)
            train(steps)  # the warm-up; torch.compile compiles here
            racers[name] = train
        except Exception as error:
            if name != "compiled":
                raise
            print(f"torch.compile is left out, it does not work here: {type(error).__name__}")
    for turn in range(turns):
        order = list(racers) if turn % 2 else list(reversed(racers))
        seconds = {name: seconds_of(racers[name], steps, device) for name in order}
        for name in racers:
            ratio = seconds["plain"] / seconds[name]
            yield {"way": name, "batch": size, "turn": turn, "ratio": ratio}


# %% [markdown]
# **Predict.** Which hints make the small VGG faster on *your* machine, and does one make it slower? Write down a guess for
# each.
#
# (`torch.compile` does not race by default. It needs a C++ compiler and about half a minute: set COMPILE. The other hints need
# nothing.)


# %%
def speed_table(kind):
    """A stored table of this race and when it was made, or a line that says how to make one."""
    try:
        table = stored(f"12_speed_{kind}")
    except FileNotFoundError:
        what = {"cpu": "CPU", "cuda": "GPU"}[kind]
        command = f"python tools/speed.py --device {kind} --store"
        print(f"No table of a {what} has been stored yet. `{command}` makes one.")
        return {}
    made = json.loads((EVIDENCE / f"12_speed_{kind}.json").read_text(encoding="utf-8"))
    print(f"stored: {made['device']}, {made['date']}, torch {made['torch']}")
    return {f"{kind}, batch {size}": rows for size, rows in table.groupby("batch")}


def speed_figure(tables):
    """Median and range of each way's ratio over the turns, a colour a table."""
    figure, axis = plt.subplots(figsize=(8, 3.6), layout="constrained")
    for number, (name, table) in enumerate(tables.items()):
        colour = list(COLOURS.values())[number % len(COLOURS)]
        for way, ratios in table.groupby("way")["ratio"]:
            y = list(WAYS).index(way) + 0.12 * number - 0.2
            axis.plot([ratios.min(), ratios.max()], [y, y], color=colour, linewidth=1)
            label = name if way == "plain" else None
            axis.plot(ratios.median(), y, "o", color=colour, label=label)
    axis.axvline(1, color=COLOURS["black"], linewidth=0.7)
    axis.set(xscale="log", xlabel="pictures a second, plain = 1 (right is faster)")
    axis.set_yticks(range(len(WAYS)), list(WAYS))
    axis.invert_yaxis()
    axis.grid(alpha=0.3, which="both")
    figure.legend(loc="outside upper right", ncols=3)
    return figure


def speed_summary(tables):
    """Medians over turns, with the lowest and the highest: a row a way, a column a table."""
    columns = {}
    for name, table in tables.items():
        ways = table.groupby("way")["ratio"]
        columns[name] = {
            way: f"{own.median():.2f} ({own.min():.2f} to {own.max():.2f})" for way, own in ways
        }
    found = pd.DataFrame(columns).reindex(list(WAYS)).dropna(how="all").fillna("–")
    return found.rename_axis("way").reset_index()


torch.manual_seed(SEED)
track = device if device.type == "cuda" else torch.device("cpu")
raced = speed_rows(track, TURNS, 1, 16, COMPILE, without=("channels-last, bfloat16",))
races = {"live, batch 16": pd.DataFrame(raced)}
races |= speed_table("cpu") | speed_table("cuda")
show(
    speed_figure(races),
    alt="For each way of computing a step, its throughput over that of the plain way: median and range over turns, live and stored.",
)
show_table(speed_summary(races))

# %% [markdown]
# **Explain.** Left of 1, a hint costs. Why it may:
#
# - *bfloat16* gains where the processor has 16-bit units. One that has none converts back and forth, and its libraries have no
#   fast convolution for it: the same hint then costs many times over. GPUs have had such units for years (float16 longer than
#   bfloat16); many desktop processors have not.
# - *Channels-last* gains in convolutions with many channels. Our first one has three.
# - *A DataLoader* transforms picture by picture and collects them again, where the other way makes one operation of a batch.
#   On a network this small that shows. With large photographs and a large network it hides behind the computing, if processes
#   read ahead.
# - *`torch.compile`* pays for compiling first. It is for long runs, and for shapes that stay.
#
# The live run has few turns of one step each: trust it for what is large. And no row says what *your* network gains on *your*
# GPU: a small network leaves most of a GPU idle, whatever the hint. Measure by turns, as here. Lesson 13 shows what a clock
# does without a warm-up.
#
# ### Mixed precision needs two things right
#
# **The network belongs inside.** `autocast` chooses the precision of each operation *while it runs*. So the forward pass and
# the loss go inside; the backward pass follows by itself. A common mistake is to put the loss alone inside. No error, no
# warning.
#
# What it costs can be counted without a clock: the bytes that the forward pass keeps for the backward pass.


# %% tags=["by-hand-speed"]
def run_in(where, pictures, labels):
    """Logits of the small VGG, and the bytes that its forward pass keeps for the backward pass, without its weights."""
    torch.manual_seed(0)
    model = Classifier(load_backbone("vgg_far"), 10).train()
    weights = {weight.data_ptr() for weight in model.parameters()}
    kept = {}

    def keep(tensor):
        if tensor.data_ptr() not in weights:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    pictures = model.transform(pictures)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=where == "everything"):
            logits = model(pictures)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=where != "nothing"):
            loss = F.cross_entropy(logits, labels)
    assert loss.isfinite()
    return logits, sum(kept.values())


# %% tags=["catches"]
def assert_16_bits(logits):
    """Fail where a network that should have run in 16 bits ran in 32."""
    assert logits.dtype in (torch.float16, torch.bfloat16), (
        f"the network ran in {logits.dtype}: only what runs inside autocast changes its precision"
    )


# %% [markdown]
# **Predict.** Three runs: nothing in autocast, the loss alone, everything. How many bytes does each keep, the first taken as
# 1?

# %%
sixteen = mnist().subset(range(16))
runs_of_16 = {
    where: run_in(where, sixteen.pictures, sixteen.labels)
    for where in ("nothing", "the loss alone", "everything")
}
kept = {where: size for where, (_, size) in runs_of_16.items()}
for where, (logits, size) in runs_of_16.items():
    print(f"{where:14} logits in {logits.dtype!s:14}  bytes: {size / kept['nothing']:.2f}")
claims(
    "With everything in autocast, the forward pass keeps less than 0.8 of the bytes that it keeps with the loss alone in it",
    over_seeds([kept["everything"] / kept["the loss alone"]], [SEED], "ratio of bytes"),
    rule="value < 0.8",
)
try:
    assert_16_bits(runs_of_16["the loss alone"][0])
    raise RuntimeError("the test let the mistake pass")
except AssertionError as error:
    print("caught:", error)
assert_16_bits(runs_of_16["everything"][0])

# %% [markdown]
# **Explain.** With the loss alone inside, nothing was gained: the network had run before. (It is not quite one half even with
# everything inside: what max pooling keeps are places, and these have 64 bits in any precision.)
#
# **Small gradients need a scaler.** A float16 has a narrow range: below about 6e-8 there is nothing but zero. A bfloat16 has
# the range of float32, and fewer digits instead. So a **gradient scaler** multiplies the loss by a large number, the backward
# pass multiplies every gradient by the same, and the scaler divides before the optimizer steps.
#
# **Predict.** A weight whose gradient is 1e-8. What arrives in float16, in float16 with a loss scaled by 65,536, in bfloat16?


# %% tags=["by-hand-speed"]
def gradient_of(dtype, scale=1.0):
    """The gradient 1e-8 of a weight, after it has come back through an operation in 16 bits."""
    weight = torch.ones((), requires_grad=True)
    loss = 1e-8 * weight.to(dtype).float()  # coming back, the gradient is a `dtype` here
    (scale * loss).backward()
    return weight.grad.item() / scale


# %% tags=["catches"]
def assert_survives(gradient):
    """Fail where a gradient that is not zero has become zero."""
    assert gradient != 0, "a gradient of 1e-8 became 0: float16 needs a gradient scaler"


# %%
arrived = {
    "float16": gradient_of(torch.float16),
    "float16, scaled": gradient_of(torch.float16, 65536.0),
    "bfloat16": gradient_of(torch.bfloat16),
}
for name, value in arrived.items():
    print(f"{name:16} {value:.1e}")
try:
    assert_survives(arrived["float16"])
    raise RuntimeError("the test let the mistake pass")
except AssertionError as error:
    print("caught:", error)
for name in ("float16, scaled", "bfloat16"):
    assert_survives(arrived[name])

# %% [markdown]
# **Explain.** In float16 the weight would never learn, and no message says so. bfloat16 needs no scaler. `fit` does both:
# `precision="float16"` brings the scaler with it.
#
# And if gradients are clipped? Between `backward` and `step` they are still multiplied. Whoever clips at norm 1 *then* clips
# numbers that are 65,536 times too large. The order is **unscale → clip → step**.
#
# **Predict.** One step of SGD at rate 1, gradient of norm 5, clipped to norm 1. How far does the weight move in the right
# order, and how far without `unscale_`?


# %% tags=["by-hand-speed"]
def moved_by(unscale_first):
    """How far one step moves a weight whose gradient has norm 5 and is clipped to norm 1."""
    weight = nn.Parameter(torch.zeros(2))
    optim = torch.optim.SGD([weight], lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=65536.0)
    scaler.scale((weight * torch.tensor([3.0, 4.0])).sum()).backward()
    if unscale_first:
        scaler.unscale_(optim)
    nn.utils.clip_grad_norm_([weight], 1.0)
    scaler.step(optim)  # divides by the scale, unless unscale_ has done so
    scaler.update()
    return weight.detach().norm().item()


# %%
right, wrong = moved_by(unscale_first=True), moved_by(unscale_first=False)
for order, distance in {"unscale, clip, step": right, "clip, step": wrong}.items():
    print(f"{order:20} the weight moves by {distance:.6f}")
claims(
    "Clipped before it is unscaled, a step is more than ten thousand times too short",
    over_seeds([right / wrong], [SEED], "ratio of steps"),
    rule="value > 10000",
)

# %% [markdown]
# **Explain.** Such a run does not crash. It only hardly learns, and one looks for the reason in the learning rate.
#
# ## Several processes
#
# One process is not enough? Take two. In **data parallel** training each process has the whole network, and a part of each
# batch:
#
# ```text
#                    process 0                          process 1
#  batch of 64  →    32 pictures                        32 other pictures
#  forward, loss     mean over its 32                   mean over its 32
#  backward          its gradient g₀                    its gradient g₁
#  all-reduce        (g₀ + g₁) / 2          ⟷           (g₀ + g₁) / 2
#  step              the same weights                   the same weights
# ```
#
# The mean over 64 is the mean of the two means over 32. So both processes take the step that one process would take with the
# whole batch. That is all that **DistributedDataParallel** (DDP) does: it averages gradients while they are computed, and
# begins with the same weights everywhere. (Check it: it needs halves of *equal* size.)
#
# ### Who gets which pictures?
#
# DDP does not share pictures out. A *sampler* does, and each process asks its own. All shuffle with one seed, so they agree on
# one order of the epoch without a word; then process number $r$ (its **rank**) of $w$ (the **world size**) takes every $w$-th
# picture of it, beginning with the $r$-th. Where $w$ does not divide the number of pictures, the order is lengthened by its
# own beginning, so that nobody waits for a process that has run out.
#
# **Predict.** Eight pictures, two processes, two epochs. Which pictures have both? What changes in the second epoch?


# %% tags=["catches"]
def assert_disjoint(shards):
    """Fail where two processes have been given the same picture."""
    for (one, a), (other, b) in combinations(enumerate(shards), 2):
        both = {int(index) for index in a} & {int(index) for index in b}
        assert not both, f"processes {one} and {other} have {len(both)} pictures in common"


# %%
samplers = [DistributedSampler(range(8), num_replicas=2, rank=rank) for rank in (0, 1)]
for told in (True, False):
    print("with set_epoch" if told else "without")
    for epoch in (0, 1):
        for sampler in samplers:
            sampler.set_epoch(epoch if told else 0)  # 0 is what it has if nobody tells it
        print(f"  epoch {epoch}:", *(list(sampler) for sampler in samplers))
        assert_disjoint(samplers)

# %% [markdown]
# **Explain.** Each picture is with one process. But the sampler does not count epochs. Without `set_epoch`, every epoch comes
# in the order of the first, in both processes. It is the first trap: nothing fails, and training has lost its shuffling.
#
# ### The worker
#
# **torchrun** starts one script several times, and tells each process its rank. Below is such a script, in plain PyTorch. It
# trains a tiny network on digits several times: pictures shared out, or not; without batch norm, or with it. The processes
# talk through *gloo*, which works between CPUs; between GPUs one takes *nccl*.

# %% tags=["worker"]
WORKER = '''"""Train tiny networks on digits. torchrun starts this file once for each process."""

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

RUNS = {  # name: what follows the convolution, and are the pictures shared out?
    "shared out": (nn.Identity(), True),
    "no sampler": (nn.Identity(), False),
    "batch norm": (nn.BatchNorm2d(8), True),
    "frozen statistics": (nn.BatchNorm2d(8).eval(), True),
    "group norm": (nn.GroupNorm(2, 8), True),
}


def tiny_net(norm):
    torch.manual_seed(0)  # whoever builds it, it has the same weights
    convolution, head = nn.Conv2d(1, 8, 3, stride=2), nn.Linear(8 * 15 * 15, 10)
    return nn.Sequential(convolution, norm, nn.GELU(), nn.Flatten(), head)


def train(net, data, sampler, size, epochs=2):
    optim = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        for chosen in torch.tensor(list(sampler)).split(size):
            loss = F.cross_entropy(net(data["pictures"][chosen]), data["labels"][chosen])
            optim.zero_grad()
            loss.backward()  # here DDP averages the gradients
            optim.step()


def main(folder, seed, dies):
    dist.init_process_group("gloo", timeout=timedelta(minutes=2))  # nobody waits longer
    rank, world = dist.get_rank(), dist.get_world_size()
    if dies and rank == 1:
        raise RuntimeError("process 1 cannot read its pictures")
    dist.barrier()  # where the others wait for it
    data, found = load_file(folder / "digits.safetensors"), {}
    for name, (norm, shared) in RUNS.items():
        part = {"num_replicas": world, "rank": rank} if shared else {"num_replicas": 1, "rank": 0}
        sampler = DistributedSampler(data["labels"], **part, seed=seed)
        net = DistributedDataParallel(tiny_net(norm))
        found[f"{name}/seen"] = torch.tensor(list(sampler))
        train(net, data, sampler, size=64 // world)
        found |= {f"{name}/{key}": value for key, value in net.module.state_dict().items()}
    save_file(found, folder / f"rank{rank}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), dies="dies" in sys.argv)
'''

# %%
processes = Path(OUT) / "processes"
processes.mkdir(parents=True, exist_ok=True)
(processes / "worker.py").write_text(WORKER, encoding="utf-8")
shared_digits = mnist().subset(range(256))
shared_data = {
    "pictures": shared_digits.pictures[:, :1].contiguous().float() / 255,
    "labels": shared_digits.labels,
}
save_file(shared_data, processes / "digits.safetensors")


# %% [markdown]
# In a terminal one writes `torchrun --standalone --nproc-per-node=2 worker.py`. From a notebook it is a child process. We add
# that all talk on this machine alone, with one thread each, and that no one waits for ever.


# %% tags=["worker"]
PLATFORM = {
    "linux": {"GLOO_SOCKET_IFNAME": "lo"},  # the loopback interface
    "darwin": {"GLOO_SOCKET_IFNAME": "lo0"},
    "win32": {"USE_LIBUV": "0"},
}


def torchrun(folder, *arguments, patience=300):
    """Run worker.py in two processes of this machine. Returns torchrun's exit code and what was written to stderr."""
    for old in folder.glob("rank*.safetensors"):
        old.unlink()
    if not (torch.distributed.is_available() and torch.distributed.is_gloo_available()):
        return 1, "RuntimeError: this PyTorch comes without gloo"
    options = ["--standalone", "--local-addr=localhost", "--nproc-per-node=2"]
    command = [sys.executable, "-m", "torch.distributed.run", *options]
    command += [str(folder / "worker.py"), str(folder), *map(str, arguments)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **PLATFORM.get(sys.platform, {})}
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
    running = subprocess.Popen(command, env=env, text=True, errors="replace", **pipes)
    try:
        written = running.communicate(timeout=patience)[1]
    except subprocess.TimeoutExpired:
        running.terminate()  # torchrun takes its workers with it
        written = f"TimeoutError: not done after {patience} s\n{running.communicate()[1]}"
    return running.returncode, written


def reason(written):
    """The first error in what the processes wrote, without its place."""
    found = re.findall(r"(?m)^(?:\[rank\d+\]: )?([\w.]*(?:Error|Exception): .+)$", written)
    return found[0] if found else "no reason was written"


# %% [markdown]
# The functions of the script are plain functions. So *this* process can train too: alone, with whole batches of 64 in the same
# order. If DDP does what the picture says, then the weights at the end are the same.
#
# **Predict.** Of the five runs, which end with the weights of one process?


# %% tags=["catches"]
def assert_same_weights(a, b, tolerance):
    """Fail where two runs did not end with the same weights."""
    assert a.keys() == b.keys(), "these are weights of two different networks"
    far = torch.stack([(a[name] - b[name]).abs().max() for name in a]).max().item()
    assert far <= tolerance, f"the weights are up to {far:.0e} apart: {tolerance:g} is allowed"


# %% tags=["worker"]
def one_process(name, data, seed):
    """The weights that one process ends with, trained on whole batches in the order of the epoch."""
    script = {"__name__": "worker"}
    exec(WORKER, script)
    net = script["tiny_net"](script["RUNS"][name][0])
    sampler = DistributedSampler(data["labels"], num_replicas=1, rank=0, seed=seed)
    script["train"](net, data, sampler, size=64)
    return dict(net.named_parameters())


def apart(a, b):
    """The largest difference between a weight of one run and the same weight of another."""
    return torch.stack([(a[name] - b[name]).abs().max() for name in a]).max().item()


def of_run(found, name, wanted):
    """What a process has saved of one run, for the names that are wanted."""
    return {key: found[f"{name}/{key}"] for key in wanted}


# %%
code, written = torchrun(processes, SEED)
together = []  # what each process has saved
if code == 0:
    together = [load_file(processes / f"rank{rank}.safetensors") for rank in (0, 1)]
else:
    print("torchrun does not run here, so what follows is left out:", reason(written))
far_apart = {}
for name in ("shared out", "no sampler", "batch norm", "frozen statistics", "group norm"):
    if together:
        one = one_process(name, shared_data, SEED)
        two = of_run(together[0], name, one)
        far_apart[name] = apart(one, two)
        print(f"{name:18} one process and two end {far_apart[name]:.0e} apart")
        assert_same_weights(two, of_run(together[1], name, one), 1e-5)  # the two agree, always

# %%
if together:
    claims(
        "Two processes end with the weights of one process: less than 1e-5 apart (the unit is 1e-5)",
        over_seeds([far_apart["shared out"] / 1e-5], [SEED], "1e-5"),
        rule="value < 1",
    )

# %% [markdown]
# **Explain.** Shared out, they are the same to the last digits. (Not to the last bit: sums are taken in another order. That is
# why the network has GELU: at the bend of a ReLU, a last bit can decide whether a gradient passes.) The two processes also
# agree *with each other* in every run, right or wrong. So agreement shows nothing; compare with one process.
#
# ### Trap: no sampler
#
# An ordinary shuffled loader with the same seed in each process gives both the *same* pictures. The gradients are equal, their
# mean says nothing new, and two processes do the work of one with half the batch.

# %%
if together:
    claims(
        "Without a sampler, the weights end more than 0.001 from those of one process",
        over_seeds([far_apart["no sampler"]], [SEED], "difference of a weight"),
        rule="value > 0.001",
    )
    try:
        assert_disjoint([found["no sampler/seen"] for found in together])
        raise RuntimeError("the test let the mistake pass")
    except AssertionError as error:
        print("caught:", error)
    assert_disjoint([found["shared out/seen"] for found in together])

# %% [markdown]
# ### Trap: batch norm
#
# Batch norm takes mean and variance over the batch, and each process has but its half. So the network that two processes train
# is another one. And the running statistics differ between processes; what is saved is what process 0 saw.

# %%
if together:
    means = [found["batch norm/1.running_mean"] for found in together]
    far = (means[0] - means[1]).abs().max()
    print(f"running means of the two processes: up to {far:.0e} apart")
    claims(
        "With batch norm, the weights end more than 0.0001 from those of one process",
        over_seeds([far_apart["batch norm"]], [SEED], "difference of a weight"),
        rule="value > 0.0001",
    )
    one = one_process("batch norm", shared_data, SEED)
    try:
        assert_same_weights(one, of_run(together[0], "batch norm", one), 1e-5)
        raise RuntimeError("the test let the mistake pass")
    except AssertionError as error:
        print("caught:", error)
    remedied = [far_apart[name] for name in ("frozen statistics", "group norm")]
    claims(
        "With frozen statistics or group norm, they end less than 1e-5 apart again (the unit is 1e-5)",
        over_seeds([max(remedied) / 1e-5], [SEED], "1e-5"),
        rule="value < 1",
    )

# %% [markdown]
# **Explain.** Three remedies. *Frozen statistics*: batch norm in evaluation mode, which is what fine-tuning with few pictures
# wants anyway (lesson 04). *Group norm*: it looks at one picture at a time. `SyncBatchNorm`: the processes exchange their
# sums, so that the statistics are of the whole batch; it is made for GPUs, and is not run here. With 64 pictures or more for
# each process, many leave batch norm as it is. Then it is another recipe, not a mistake, as long as one knows.
#
# ### When one dies
#
# Now process 1 fails, and process 0 waits at the barrier for what will never come.
#
# **Predict.** Does the run hang?

# %%
if together:
    code, written = torchrun(processes, SEED, "dies")
    print("torchrun ended with", "no error" if code == 0 else f"an error. {reason(written)}")

# %% [markdown]
# **Explain.** torchrun watches its processes. When one ends with an error, it ends the others, and then itself, with an exit
# code that is not 0. Of all that is written in such a case, the *first* error is the one to read; the others are consequences.
#
# A process that *hangs* is harder, since nothing has failed. That is what `timeout` in `init_process_group` is for: whoever
# waits longer fails. Its default is half an hour, and a job with eight GPUs can wait a long time in half an hour.

# %% [markdown]
# ## What goes wrong
#
# ### Probabilities where logits are wanted
#
# A network ends in logits. Somebody finds that untidy, lets it end in a softmax, and keeps `F.cross_entropy`, which takes a
# softmax of its own. Nothing complains: probabilities are numbers, too.
#
# **Predict.** The largest "logit" is now 1, the smallest 0. How small can the loss get with ten classes, if every answer is
# right and certain?


# %%
def head_only(loss):
    """A new head on the plain network's features, 100 plain steps: its logits, the last loss, and the first slope's length."""
    torch.manual_seed(SEED)
    head = nn.Linear(plain.backbone.width, len(few.classes))
    features, unseen = predict(plain.backbone, few), predict(plain.backbone, asked)
    optimizer = torch.optim.SGD(head.parameters(), lr=0.05)
    slopes = []
    for _ in range(100):
        optimizer.zero_grad()
        reached = loss(head(features), few.labels)
        reached.backward()
        slopes.append(head.weight.grad.norm().item())
        optimizer.step()
    with torch.no_grad():
        return head(unseen), reached.item(), slopes[0]


def softmax_twice(logits, labels):
    """The mistake: cross-entropy of probabilities."""
    return F.cross_entropy(logits.softmax(dim=1), labels)


slope = {}
for name, loss in {"logits": F.cross_entropy, "probabilities": softmax_twice}.items():
    logits, reached, slope[name] = head_only(loss)
    right = (logits.argmax(dim=1) == asked.labels).numpy()
    print(f"{name:13} loss at the end {reached:.2f}, {estimate([right], [SEED])}")
certain = 1000 * torch.eye(10)
least = softmax_twice(certain, torch.arange(10)).item()
claims(
    "Through two softmaxes the loss stays above 1.4, right and certain as every answer may be",
    over_seeds([least], [SEED], "nats"),
    rule="value > 1.4",
)
claims(
    "Through two softmaxes the first slope of a new head is less than half as long",
    over_seeds([slope["probabilities"] / slope["logits"]], [SEED], "ratio"),
    rule="value < 0.5",
)

# %% [markdown]
# The second softmax flattens the slope, so training crawls, and the loss ends far above zero whatever one does. Accuracy need
# not tell: on features that are good already, a head gets there even so. The loss is the sign, and a test can look for it: a
# loss that takes logits is next to 0 where the answer is right and certain.


# %% tags=["catches"]
def assert_takes_logits(loss, classes=10):
    """Fail where a loss stays large though every answer is right and certain."""
    right = 100 * torch.eye(classes)
    least = loss(right, torch.arange(classes)).item()
    assert least < 0.01, (
        f"right and certain, and the loss is {least:.2f}: does it get probabilities?"
    )


# %%
assert_takes_logits(F.cross_entropy)
assert_takes_logits(partial(focal_loss, gamma=2.0))
try:
    assert_takes_logits(softmax_twice)
    raise RuntimeError("the test let the mistake pass")
except AssertionError as error:
    print("caught:", error)

# %% [markdown]
# ### Mixed pictures, labels as they were
#
# Mixup has two lines, and the second one is easily forgotten: pictures are mixed, and the loss is that of the first one's
# label.
#
# **Predict.** λ is drawn symmetrically. In how many batches does the label belong to the paler of the two pictures?


# %%
def half_a_mixup(pictures, targets, share):
    """The mistake: the pictures are mixed, the targets are not."""
    return share * pictures + (1 - share) * pictures.roll(1, 0), targets


def mixing_by(mix, strength):
    """A step for `fit` like `mixing`, with another way to mix."""
    shares = torch.distributions.Beta(strength, strength)

    def step(model, batch, progress):
        targets = F.one_hot(batch[1], len(few.classes)).float()
        pictures, targets = mix(batch[0], targets, float(shares.sample()))
        return {"mixup": soft_cross_entropy(model(pictures), targets)}

    return step


forgot = learn(mixing_by(half_a_mixup, 1.0))
given = {}
for name, model in {"mixed targets": mixed_up, "labels as they were": forgot}.items():
    logits = predict(model, asked)
    right = logits.argmax(dim=1) == asked.labels
    given[name] = logits.softmax(dim=1).gather(1, asked.labels[:, None]).squeeze(1).numpy()
    print(
        f"{name:20} right class gets {given[name].mean():.2f}; accuracy {right.float().mean():.3f}"
    )
claims(
    "With labels left as they were, mixup gives the right class at least .05 less probability",
    compare([given["mixed targets"]], [given["labels as they were"]], [SEED], "probability"),
    rule="low > 0.05",
)


# %% tags=["catches"]
def assert_mixes_both(mix):
    """Fail where targets are not mixed in the proportion of the pictures."""
    targets = torch.eye(4)
    pictures = targets[:, :, None, None].expand(
        4, 4, 2, 2
    )  # a picture that shows its own target
    for share in (0.9, 0.3):
        mixed, asked_for = mix(pictures, targets, share)
        shown_share = mixed.mean(dim=(2, 3))
        assert torch.allclose(shown_share, asked_for, atol=1e-5), (
            f"at λ = {share:g} the picture is mixed, and the target is not mixed alike"
        )


# %%
assert_mixes_both(mixup)
try:
    assert_mixes_both(half_a_mixup)
    raise RuntimeError("the test let the mistake pass")
except AssertionError as error:
    print("caught:", error)

# %% [markdown]
# ### A soup with a stranger
#
# Averaging worked, so let us average more: networks from *two* starts. To see what happens, take the cleanest case there is:
# a **twin**. It is our network with its channels in another order, in every layer but the last. What one convolution writes
# to place 5, the next one reads from place 5, wherever that is. So the twin gives the same answers, and its weights are other
# ones.
#
# **Predict.** Two networks that agree about every picture. What is their average worth?


# %%
def hidden_layers(network):
    """Each convolution with its batch norm and the one convolution that reads it."""
    blocks = [part for part in network.modules() if isinstance(part, BasicBlock)]
    if blocks:
        return [(block.conv1, block.bn1, block.conv2) for block in blocks]
    convs = [part for part in network.modules() if isinstance(part, nn.Conv2d)]
    norms = [part for part in network.modules() if isinstance(part, nn.BatchNorm2d)]
    return list(zip(convs, norms, convs[1:], strict=False))


def twin_of(model, seed):
    """A network with the same answers whose channels stand in another order."""
    twin, draw = deepcopy(model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for writes, norm, reads in hidden_layers(twin):
            order = torch.randperm(writes.out_channels, generator=draw).to(device)
            own = [
                *writes.parameters(),
                *norm.parameters(),
                norm.running_mean,
                norm.running_var,
            ]
            for values in own:
                values.copy_(values[order])
            reads.weight.copy_(reads.weight[:, order])
    return twin


twin = twin_of(plain, SEED)
average = refreshed(soup([plain, twin]), few, SEED)
twin_hits = {}
for name, model in {"network": plain, "its twin": twin, "their average": average}.items():
    twin_hits[name] = hits(model, asked).numpy()
    print(f"{name:13} {estimate([twin_hits[name]], [SEED])}")
claims(
    "Averaged with its own twin, the network loses one picture in ten, or more",
    compare([plain_hits], [twin_hits["their average"]], [SEED]),
    rule="low > 0.1",
)

# %% [markdown]
# Channel 5 of the one has nothing to do with channel 5 of the other, and their mean means nothing. Two networks from two starts
# are like that, too. From *one* start, channels stay what they were: fine-tuning moves weights a little, and all runs stay in
# one valley of the loss. A test can look at how far apart the weights are.


# %% tags=["catches"]
def assert_one_start(models):
    """Fail where two networks' backbones lie as far apart as two that have nothing in common."""
    rows = [
        torch.cat([weights.detach().flatten() for weights in model.backbone.parameters()])
        for model in models
    ]
    for row in rows[1:]:
        apart = ((row - rows[0]).norm() / rows[0].norm()).item()
        assert apart < 0.5, f"weights differ by {apart:.2f} of their length: not from one start"


# %%
assert_one_start([plain, mixed_up, forgot])
try:
    assert_one_start([plain, twin])
    raise RuntimeError("the test let the mistake pass")
except AssertionError as error:
    print("caught:", error)

# %% [markdown]
# And our own backbones? The stored table has a soup of the plain network and one that started from *far* letters. (They are not
# even complete strangers: near and far letters were learned from the same random numbers.)


# %% tags=["evidence"]
def claims_on_mistakes(table, claim):
    """What averaging costs across two starts."""
    claim(
        "A soup of near and far letters loses one picture in ten of the plain network's, or more",
        compare(
            runs(table, "few", "plain")[0],
            runs(table, "mean", "soup of two starts")[0],
            runs(table, "few", "plain")[1],
        ),
        rule="low > 0.1",
        origin="stored",
    )


# %%
for part, arm in (("few", "plain"), ("mean", "far start"), ("mean", "soup of two starts")):
    print(f"{arm:18} {estimate(*runs(table, part, arm))}")
claims_on_mistakes(table, claims)


# %% [markdown]
# ## Exercises
#
# ### 12.1 · A share for each picture
#
# The lesson mixed a whole batch by one share. Write mixup with a share for *each* picture, and with partners of its choice:
# picture $i$ keeps `share[i]` of itself and takes the rest from picture `order[i]`. Its target, a row with an entry for each
# class, is mixed in the same way.


# %% tags=["exercise-12.1"]
def mixed_batch(pictures, labels, share, order, classes):
    """pictures: float (n, 3, height, width); labels, order: int (n,); share: float (n,) in [0, 1].

    Returns mixed pictures of the same shape, and targets, float (n, classes).
    """
    # <solution>
    targets = F.one_hot(labels, classes).to(share.dtype)
    one, four = share[:, None], share[:, None, None, None]
    return (
        four * pictures + (1 - four) * pictures[order],
        one * targets + (1 - one) * targets[order],
    )
    # <stub>
    # return ...
    # </stub>


# %% tags=["check-12.1", "nbval-check-output"]
check("12.1", mixed_batch)

# %% [markdown]
# ### 12.2 · Smoothing without targets
#
# With label smoothing $s$, the target of a picture is $1 - s$ on its label, and $s$ shared equally by *all* classes, its label
# too. Write the loss, the mean over pictures, without `label_smoothing=`; you need no targets for it. Logits may lie thousands
# apart, and the loss has to stay finite there.


# %% tags=["exercise-12.2"]
def smooth_cross_entropy(logits, labels, smoothing):
    """logits: float (n, classes); labels: int (n,); smoothing: float in [0, 1). Returns a scalar with a gradient."""
    # <solution>
    log_p = logits.log_softmax(dim=1)
    on_label = log_p.gather(1, labels[:, None]).squeeze(1)
    return -((1 - smoothing) * on_label + smoothing * log_p.mean(dim=1)).mean()
    # <stub>
    # return ...
    # </stub>


# %% tags=["check-12.2", "nbval-check-output"]
check("12.2", smooth_cross_entropy)

# %% [markdown]
# ### 12.3 · Focal loss with class weights
#
# In practice focal loss comes with a weight for each class. With $p_i$, the probability that the softmax gives to the label of
# picture $i$, and $w_i$, the weight of its class, the loss is the mean of $-w_i\,(1 - p_i)^\gamma \log p_i$ over pictures.
# (Divide by their number, not by the sum of the weights.) Again, it stays finite with logits that lie thousands apart.


# %% tags=["exercise-12.3"]
def weighted_focal_loss(logits, labels, gamma, weights):
    """logits: float (n, classes); labels: int (n,); weights: float (classes,). Returns a scalar with a gradient."""
    # <solution>
    loss = F.cross_entropy(logits, labels, reduction="none")  # -log p, without the weights
    return (weights[labels] * (1 - torch.exp(-loss)) ** gamma * loss).mean()
    # <stub>
    # return ...
    # </stub>


# %% tags=["check-12.3", "nbval-check-output"]
check("12.3", weighted_focal_loss)

# %% [markdown]
# ### 12.4 · An average of everything
#
# The lesson's moving average followed the weights alone. Follow the whole state, in place: whatever is a float in
# `state_dict()`, weights *and* running statistics, keeps the share `decay` of itself and takes the rest from the model. Batch
# norm also has a whole number there, `num_batches_tracked`. A mean of counts makes no sense: copy what is no float.


# %% tags=["exercise-12.4"]
def ema_update(average, model, decay):
    """average, model: two networks of one build; decay: float in [0, 1]. Changes the average alone. Returns nothing."""
    # <solution>
    now = model.state_dict()
    for name, mean in average.state_dict().items():  # these share memory with the network
        if mean.is_floating_point():
            mean.mul_(decay).add_(now[name], alpha=1 - decay)
        else:
            mean.copy_(now[name])
    # <stub>
    # return ...
    # </stub>


# %% tags=["check-12.4", "nbval-check-output"]
check("12.4", ema_update)

# %% [markdown]
# ### 12.5 · A sampler of your own
#
# What does a distributed sampler give to one process? Write it, for process `rank` of `world`:
#
# - in one epoch all processes share out all pictures, and each gets the same number of them, as few as will do;
# - where `world` does not divide $n$, some pictures are repeated for that, none more than once; otherwise no two processes have
#   a picture in common;
# - each epoch and each seed brings another order *of all*, so that pictures change processes; the same seed and epoch always
#   bring the same;
# - no process asks another, and nobody else's random numbers change: draw from a generator of your own.


# %% tags=["exercise-12.5"]
def indices_for(rank, world, n, seed, epoch):
    """rank: 0 to world - 1; n: number of pictures, world or more. Returns indices in [0, n), a list or an int tensor."""
    # <solution>
    generator = torch.Generator().manual_seed(seed + epoch)  # the same in every process
    order = torch.randperm(n, generator=generator).tolist()
    order += order[: -n % world]  # as many as are lacking
    return order[rank::world]
    # <stub>
    # return ...
    # </stub>


# %% tags=["check-12.5", "nbval-check-output"]
check("12.5", indices_for)

# %% [markdown]
# ## The claims of this lesson

# %%
held = claims.table()
show_table(held[["claim", "value", "low", "high", "n", "rule", "holds", "origin"]].round(3))

# %% [markdown]
# ## Further reading
#
# - Szegedy, Vanhoucke, Ioffe, Shlens, Wojna (2016), *Rethinking the Inception architecture for computer vision.* Label
#   smoothing.
# - Zhang, Cissé, Dauphin, Lopez-Paz (2018), *mixup: beyond empirical risk minimization.*
# - Müller, Kornblith, Hinton (2019), *When does label smoothing help?*
# - Lin, Goyal, Girshick, He, Dollár (2017), *Focal loss for dense object detection.*
# - Menon, Jayasumana, Rawat, Jain, Veit, Kumar (2021), *Long-tail learning via logit adjustment.*
# - Girshick (2015), *Fast R-CNN.* Smooth L1.
# - Izmailov, Podoprikhin, Garipov, Vetrov, Wilson (2018), *Averaging weights leads to wider optima and better generalization.*
# - Wortsman et al. (2022), *Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing
#   inference time.*
# - Micikevicius et al. (2018), *Mixed precision training.*
# - Li et al. (2020), *PyTorch distributed: experiences on accelerating data parallel training.*
# - Goyal et al. (2017), *Accurate, large minibatch SGD: training ImageNet in 1 hour.*
# - Hendrycks, Gimpel (2016), *Gaussian error linear units.*
#
# **Next:** lesson 13 makes the network smaller and faster, one step at a time, and asks at each what it cost.
