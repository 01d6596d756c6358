# %% [markdown]
# ## The question
#
# Labels cost time and money. Two offers lie before you. On the left, five labelled pictures of each class, and a network that has learned
# something else before. On the right, five times as many, and a network that knows nothing. Each row is a class.
#
# Which one would you take? And how large would the pile on the right have to be, until you change your mind?

# %% tags=["parameters"]
PROFILE: str = "embedded"  # [embedded | imagenet] the world; the second needs a network
SEED: int = 0  # moves the few-shot subset, the head, the order and the augmentation
DEVICE: str = "auto"  # [auto | cpu | cuda | mps] where to train
OUT: str = "../build/05"  # where results go
NET: str = "resnet"  # [resnet | vgg] the backbone of the live runs
LABELS: int = 20  # labels a class in the live runs, 2 or more
STEPS: int = 120  # training steps in the live runs; stored runs take 150 or more
SCORED: str = "resnet vgg resnet_far vgg_far photos"  # the profile's backbones to choose from

# %% tags=["setup"]
import copy
from itertools import combinations

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from scipy.stats import kendalltau
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torchvision.transforms.v2.functional import center_crop, resize

from course_utils.backbones import Classifier, load_backbone
from course_utils.data import augmentation, batches, few_shot, load_target
from course_utils.evaluate import accuracy, hits, predict
from course_utils.evidence import Claims, Estimate, compare, estimate, stored, unpack_hits
from course_utils.exercises import check, hint, solution  # noqa: F401
from course_utils.paths import EVIDENCE
from course_utils.plots import COLOURS, START_COLOURS, chooser, show, show_table
from course_utils.profile import get_profile, pick_device
from course_utils.training import fit, stages

profile = get_profile(PROFILE)
device = pick_device(DEVICE)
claims = Claims("05_what_to_transfer", OUT)
train, valid, test = (load_target(profile, split) for split in ("train", "valid", "test"))


# %%
def mosaic(count):
    """Pictures of each of the first ten classes as tiles, `count` of them in a row."""
    pile, rows = few_shot(train, count, seed=SEED), []
    for number in range(min(10, len(pile.classes))):
        members = (pile.labels == number).nonzero().flatten().tolist()
        squares = [center_crop(pile[i][0], [min(pile[i][0].shape[1:])] * 2) for i in members]
        rows.append(torch.cat([resize(square, [20, 20]) for square in squares], dim=2))
    return torch.cat(rows, dim=1).permute(1, 2, 0)


figure, axes = plt.subplots(1, 2, figsize=(8, 3), width_ratios=(5, 25), layout="constrained")
for axis, count, start in zip(axes, (5, 25), ("pretrained", "from scratch"), strict=True):
    axis.imshow(mosaic(count))
    axis.set_title(start, loc="left", fontsize=10)
    axis.set_axis_off()
show(figure, alt="A small pile of labelled pictures beside one that is five times as wide.")

# %% [markdown]
# ## The price of a start, in labels
#
# What is a pretrained start worth? "So many points" is one answer, but points mean different things at different places. A better currency is
# *labels*: how many would you have to buy, to get as far without it?
#
# To find out, both starts must be trained with care. Each has a learning rate of its own, from a search over the same five rates, on validation
# pictures, with a seed that serves nothing else: `python tools/tune.py 05` repeats it. What happens without that care is the last section of this lesson. Here is the
# function that trains every model below.

# %% tags=["evidence"]
RECIPES = {  # the learning rate of the backbone
    "scratch": 1e-2,
    "near": 1e-3,
    "far": 3e-4,
    "photos": 3e-2,
    "shuffled": 3e-3,
}
HEAD_LR = 1e-2


def new_backbone(net, start):
    """A backbone of the embedded world by its start; from scratch all its numbers are drawn."""
    name = f"{net}_near" if start == "scratch" else f"{net}_{start}"
    return load_backbone(name, pretrained=start != "scratch")


def fine_tune(few, backbone, lr, seed, steps, kept=0, kept_lr=0.0):
    """Train a backbone and a new head on a few labelled pictures.

    lr: the rate of the backbone, but for its first `kept` stages: those learn at kept_lr, or not at all where it is 0.
    """
    model = Classifier(backbone, len(few.classes)).to(device)
    parts = stages(model.backbone)
    below, above = torch.nn.ModuleList(parts[:kept]), torch.nn.ModuleList(parts[kept:])
    groups = [(below, kept_lr), (above, lr), (model.head, HEAD_LR)]
    below.requires_grad_(kept_lr > 0)
    data = batches(
        few,
        model.transform,
        size=32,
        steps=steps,
        augment=augmentation(**profile.augmentation),
        seed=seed,
        device=device,
    )
    fit(
        model,
        data,
        optimizer=lambda model: torch.optim.AdamW(
            [{"params": list(part.parameters()), "lr": lr} for part, lr in groups],
            weight_decay=0.01,
        ),
    )
    return model


# %% [markdown]
# **Predict.** Both networks get the same labels and the same number of steps. How far apart will they be?


# %%
def live_backbone(pretrained):
    """The backbone of the live runs, with its weights or with numbers drawn by SEED."""
    torch.manual_seed(SEED)
    return load_backbone(profile.backbones[NET], pretrained)


few = few_shot(train, LABELS, seed=SEED)
live = {}
for start, pretrained in (("near", True), ("scratch", False)):
    lr = RECIPES[start]
    model = fine_tune(few, live_backbone(pretrained), lr, SEED, STEPS)
    live[start] = hits(model, test).numpy()
    name = "pretrained" if pretrained else "from scratch"
    print(f"{name:13} rate {lr:g}: {estimate([live[start]], [SEED])}")
claims(
    f"At {LABELS} labels a class, the pretrained start beats the one from scratch",
    compare([live["near"]], [live["scratch"]], [SEED]),
    rule="low > 0",
)

# %% [markdown]
# One seed, one number of labels. The stored table has ten seeds, both networks, and up to 200 labels a class, which is every training picture
# that there is. Up to 50 labels, both starts get 150 steps; with more, the start from scratch gets more, and 500 at 200. The rates are those
# that the search found at 20 labels. The table belongs to the embedded world, and `python tools/evidence.py 05 --seeds 100..109 --out DIR`
# makes such a one from nothing.
#
# **Predict.** Move the slider to five labels a class. The dashed lines show how far the pretrained start gets with so few. Where do they
# meet the curve from scratch? Then move on: from which number of labels on is there no crossing left?

# %% tags=["evidence"]
NETS = ("vgg", "resnet")
TITLE = {"vgg": "VGG", "resnet": "ResNet"}
SIZES = {"scratch": (5, 20, 50, 100, 200), "near": (5, 20, 200)}


def arm(table, net, start, labels=20, part="labels", kept=None):
    """Test hits by seed, and the seeds."""
    rows = table[(table["net"] == net) & (table["start"] == start) & (table["part"] == part)]
    rows = rows[rows["labels"] == labels].sort_values("seed")
    if kept is not None:
        rows = rows[rows["kept"] == kept]
    return [unpack_hits(text, 1000) for text in rows["hits"]], rows["seed"].tolist()


def claims_on_labels(table, claim):
    """What a pretrained start is worth."""
    for net in NETS:
        for labels, other, required in (
            (5, 50, 0),
            (5, 100, -0.05),
            (20, 100, 0),
            (20, 200, -0.05),
            (200, 200, 0),
        ):
            near, seeds = arm(table, net, "near", labels)
            gained = compare(near, arm(table, net, "scratch", other)[0], seeds)
            verb = "beat" if required == 0 else "are at most five points behind"
            text = f"{TITLE[net]}: near letters with {labels} labels a class {verb} scratch with {other}"
            claim(text, gained, rule=f"low > {required}", origin="stored")


# %%
table = stored("05_what_to_transfer")
points = {}  # network, start and labels a class: accuracy with its interval
for net in NETS:
    for start, sizes in SIZES.items():
        for size in sizes:
            points[net, start, size] = estimate(*arm(table, net, start, size))


def curves_at(labels):
    """Accuracy by labels from both starts, and a line across where `labels` from near letters lead."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True, layout="constrained")
    for axis, net in zip(axes, NETS, strict=True):
        for start, sizes in SIZES.items():
            line = [points[net, start, size] for size in sizes]
            axis.plot(
                sizes, [p.value for p in line], "o-", color=START_COLOURS[start], label=start
            )
            low, high = [p.low for p in line], [p.high for p in line]
            axis.fill_between(
                sizes, low, high, color=START_COLOURS[start], alpha=0.15, linewidth=0
            )
        reached = points[net, "near", labels].value
        axis.axhline(reached, color=START_COLOURS["near"], linestyle="--", linewidth=1)
        axis.plot(labels, reached, "D", color=START_COLOURS["near"], markersize=9)
        axis.set(xscale="log", xlabel="labels a class")
        axis.set(xticks=SIZES["scratch"], xticklabels=SIZES["scratch"])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
        axis.set(title=TITLE[net], ylim=(0.3, 1))
    axes[0].set_ylabel("test accuracy")
    axes[1].legend(title="start", loc="lower right")
    return figure


show(
    curves_at(5),
    alt="Accuracy by labels a class from near letters and from scratch; a line across from five labels.",
)
chooser("near letters, labels a class", (200, 20, 5), curves_at)

# %%
claims_on_labels(table, claims)
earlier = stored("00_start_here").assign(part="labels")  # lesson 00: 300 steps for every start
for net in NETS:
    near, seeds = arm(earlier, net, "near", 20)
    gained = compare(near, arm(earlier, net, "scratch", 100)[0], seeds)
    print(f"{TITLE[net]}, 300 steps each, near with 20 labels over scratch with 100: {gained}")

# %% [markdown]
# **Explain.** Five labels a class from near letters beat fifty from scratch, and twenty beat a hundred, on both networks: these are the claims above. So here the
# start is worth at least ten times, or five times, the labels. The dashed lines run on beyond that before they cross: with five labels near letters keep up with a hundred
# from scratch, with twenty about with two hundred. Exercise 05.1 turns a crossing into a number.
#
# Is it the labels, or are 150 steps too few for a start from scratch? A little of both. Lesson 00 gave every start 300 steps; the last lines are from its table. The
# lead is smaller there, and still a lead. So whoever states a price in labels states the steps as well.
#
# Is there a number of labels that makes transfer *unnecessary*? The gain shrinks as labels are added. But at 200 labels a class, which is all that we have, the
# pretrained start is still ahead, with fewer steps. Scratch has not caught up. It may do so with more labels, or with many more steps (He, Girshick, Dollár 2019);
# this table ends before that.

# %% [markdown]
# ## How many stages to keep
#
# A backbone is a chain of stages. Do we need all of them? Yosinski and others asked this in 2014: keep the first $k$ stages of a
# pretrained network, draw the others anew, and train on the target. Small $k$ keeps what is *general*: edges, colours, strokes. Large
# $k$ also keeps what is *specific* to the source.
#
# Keeping is copying, stage by stage. What is copied is more than weights: batch norm's means and variances come along.


# %% tags=["evidence", "by-hand"]
def keep_first(count, pretrained, drawn):
    """Copy the first stages of a pretrained backbone into one that was drawn at random."""
    for source, target in list(zip(stages(pretrained), stages(drawn), strict=True))[:count]:
        target.load_state_dict(source.state_dict())  # weights, and what batch norm measured
    return drawn


# %% [markdown]
# The stages that were kept can then be **frozen**, or **fine-tuned** with the rest. Where they are fine-tuned, kept stages learn at the rate of
# the pretrained start, and drawn ones at the rate from scratch. So $k = 0$ is training from scratch, and $k$ = all stages is fine-tuning as before.
#
# Below, half of the stages are kept. **Predict.** Will that bring half of the gain?

# %%
depth = len(stages(live_backbone(False)))
halfway = keep_first(depth // 2, live_backbone(True), live_backbone(False))
rates = {"lr": RECIPES["scratch"], "kept_lr": RECIPES["near"]}
model = fine_tune(few, halfway, seed=SEED, steps=STEPS, kept=depth // 2, **rates)
live["half"] = hits(model, test).numpy()
for name, start in (("none", "scratch"), ("half", "half"), ("all", "near")):
    print(f"{name:4} of {depth} stages kept: {estimate([live[start]], [SEED])}")
sizes = [sum(p.numel() for p in part.parameters()) for part in stages(halfway)]
print("share of the numbers in each stage:", ", ".join(f"{n / sum(sizes):.1%}" for n in sizes))


# %% tags=["evidence"]
def keeping(table, net, kept, part):
    """As `arm`, for the first stages of near letters kept, and then "tuned" or "frozen"."""
    if kept == 0:
        return arm(table, net, "scratch")
    if (kept, part) == (4, "tuned"):
        return arm(table, net, "near")
    return arm(table, net, "near", 20, part, kept)


def claims_on_stages(table, claim):
    """What the stages are worth."""
    for net in NETS:
        two, three, four = (keeping(table, net, kept, "tuned") for kept in (2, 3, 4))
        first, third = keeping(table, net, 1, "frozen"), keeping(table, net, 3, "frozen")
        scratch, seeds = arm(table, net, "scratch")
        for text, ours, other, rule in (
            ("the first stage alone brings less than ten points", first, scratch, "high < 0.1"),
            ("the third stage brings points", three, two[0], "low > 0"),
            ("the fourth brings less than five more", four, three[0], "high < 0.05"),
            ("freezing three costs less than three points", third, three[0], "low > -0.03"),
        ):
            gained = compare(ours[0], other, seeds)
            claim(f"{TITLE[net]}: {text}", gained, rule=rule, origin="stored")
    frozen, tuned = (
        np.mean([keeping(table, net, 4, part)[0] for net in NETS], axis=0)
        for part in ("frozen", "tuned")
    )
    text = "Mean of both networks: freezing all four stages costs points"
    claim(text, compare(tuned, frozen, seeds), rule="low > 0", origin="stored")


# %% [markdown]
# The stored table has every $k$, frozen and fine-tuned, for both networks.
#
# **Predict.** Draw the two curves before you look. At which $k$ will freezing cost most?

# %%
figure, axes = plt.subplots(1, 2, figsize=(8, 3), sharey=True, layout="constrained")
for axis, net in zip(axes, NETS, strict=True):
    for way, colour in (("tuned", COLOURS["blue"]), ("frozen", COLOURS["orange"])):
        line = [estimate(*keeping(table, net, kept, way)) for kept in range(5)]
        axis.plot(range(5), [p.value for p in line], "o-", color=colour, label=way)
        low, high = [p.low for p in line], [p.high for p in line]
        axis.fill_between(range(5), low, high, color=colour, alpha=0.15, linewidth=0)
    axis.set(title=TITLE[net], xlabel="stages kept, of 4", xticks=range(5))
    axis.grid(alpha=0.3)
axes[0].set_ylabel("test accuracy")
axes[1].legend(loc="lower right")
show(
    figure,
    alt="Accuracy by the number of stages kept, frozen and fine-tuned, for both networks.",
)
claims_on_stages(table, claims)

# %% [markdown]
# **Explain.** The curve is no straight line. The first stage alone brings little that ten seeds can tell from nothing: edges are soon learned from 200 pictures.
# The second and the third bring nearly all. The fourth holds more than half of all numbers (see the shares above), and adds little: it was made for letters, and is
# soon drawn anew.
#
# Frozen or fine-tuned makes no difference that we can tell, until the last stage is kept. Only there does freezing cost: what is specific to letters wants to be
# changed. Yosinski and others saw a dip in the *middle*, where frozen stages had lost their partners above. We see none, in this small world. "Keep the first layers,
# they are general" is true, but the first are not what helps most.

# %% [markdown]
# ## Which source? Ask before you train
#
# There are many pretrained networks, and fine-tuning all of them costs. Can a *score* say which one to take, before anything is trained? A score
# looks at the features of the few labelled pictures that you have, and at their labels. It costs one pass through each network.
#
# The candidates are those of lesson 01: near and far letters; *photos*, which learned without labels; *shuffled*, letters whose labels were dealt out at random; and
# random weights.
#
# The simplest score you know from lesson 01 too. Are a picture's nearest neighbours, by the cosine of their features, of its own class? A
# **linear probe** is another: train one on four fifths of the pictures, ask it about the rest, and do so five times.


# %% tags=["evidence", "by-hand"]
def neighbour_score(features, labels, count=5):
    """The share of every picture's nearest neighbours, by cosine, that are of its class."""
    directions = features / np.linalg.norm(features, axis=1, keepdims=True)
    alike = directions @ directions.T
    np.fill_diagonal(alike, -2)  # no picture is its own neighbour
    nearest = alike.argsort(axis=1)[:, -count:]
    return float((labels[nearest] == labels[:, None]).mean())


def probe_score(features, labels):
    """Accuracy of a linear probe on the pictures that it did not learn from: five folds."""
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=1000))
    folds = min(5, np.bincount(labels)[np.unique(labels)].min())
    return float(cross_val_score(probe, features, labels, cv=folds).mean())


# %% [markdown]
# The third score trains nothing and holds nothing out. Say the labels $y$ of one class (1 for it, 0 for the others) come from a line through the
# features, $y = F w + \text{noise}$. $F$ has a row for each of the $n$ pictures and a column for each feature. We do not know the weights $w$: any is possible, small
# ones more than large ones. How probable, averaged over all $w$, are the labels that we *see*? That probability is the **evidence**:
#
# $$p(y \mid F) = \int p(y \mid F, w)\; p(w)\; dw.$$
#
# Two numbers are to be chosen: $\alpha$, how strongly weights are held near 0, and $\beta$, one over the variance of the noise. Those are taken that make the evidence
# largest. Features get a high score if a line fits well (little noise) *and* gets by with small weights: a line that bends over backwards for
# every picture is improbable. **LogME** (You and others 2021) is the logarithm of the largest evidence, divided by $n$, averaged over the classes.
#
# The integral has a closed form. The singular value decomposition $F = U S V^\top$ turns it into sums over directions. Each round of the loop
# below finds the best weights, and from them $\alpha$ and $\beta$.


# %% tags=["evidence", "by-hand"]
def logme(features, labels, rounds=50):
    """LogME (You et al. 2021): log evidence of a Bayesian linear model, a picture and class."""
    count, width = features.shape
    left, sizes, _ = np.linalg.svd(features.astype(float), full_matrices=False)
    found = []
    for number in np.unique(labels):
        y = (labels == number).astype(float)
        along = left.T @ y  # y as the features' directions see it
        beyond = y @ y - along @ along  # what no weights can reach
        alpha = beta = 1.0  # precision of the weights, and of the noise
        for _ in range(rounds):
            precision = alpha + beta * sizes**2
            share = beta * sizes**2 / precision  # how far each direction is followed
            squares = ((beta * sizes * along / precision) ** 2).sum()  # of the weights
            missed = (((1 - share) * along) ** 2).sum() + beyond + 1e-9
            alpha, beta = share.sum() / squares, (count - share.sum()) / missed
        precision = alpha + beta * sizes**2
        squares = ((beta * sizes * along / precision) ** 2).sum()
        missed = ((alpha / precision * along) ** 2).sum() + beyond
        determinant = np.log(precision).sum() + (width - len(sizes)) * np.log(alpha)
        evidence = count * np.log(beta / (2 * np.pi)) + width * np.log(alpha)
        found.append((evidence - beta * missed - alpha * squares - determinant) / (2 * count))
    return float(np.mean(found))


SCORES = {"neighbours": neighbour_score, "probe": probe_score, "LogME": logme}

# %% [markdown]
# Every candidate now gets its three scores, from the same few labelled pictures. One has random weights: it is what a score must not choose.
#
# **Predict.** Which candidate comes first? Do the scores agree? And could you tell from them whether VGG or ResNet is the better choice?

# %%
names = [profile.backbones[part] for part in SCORED.split() if part in profile.backbones]
names += ["resnet_shuffled"] if PROFILE == "embedded" else []
rows = []
for name in [*names, "random"]:
    candidate = live_backbone(False) if name == "random" else load_backbone(name)
    features = predict(candidate.to(device), few).numpy()
    found = [score(features, few.labels.numpy()) for score in SCORES.values()]
    rows.append([name, *found])
scored = pd.DataFrame(rows, columns=["candidate", *SCORES])
show_table(scored.sort_values("LogME", ascending=False).round(3))
by_name = scored.set_index("candidate")
margin = (by_name.loc[names[0]] - by_name.loc["random"]).min()
claims(
    f"Every score puts {names[0]} above random weights",
    Estimate(margin, margin, margin, (SEED,), "score"),
    rule="value > 0",
)

# %% [markdown]
# Now the truth: each candidate is fine-tuned with the rate of its start and the same 150 steps, for ten draws of 20 labels a class. The last function of the evidence runs
# everything that this lesson has stored.

# %% tags=["evidence"]
BACKBONES = (
    "resnet_far",
    "resnet_near",
    "resnet_photos",
    "resnet_shuffled",
    "vgg_far",
    "vgg_near",
)
CANDIDATES = (
    *(("resnet", start) for start in ("scratch", "near", "far", "photos", "shuffled")),
    *(("vgg", start) for start in ("scratch", "near", "far")),
)


def trained_from(net, start, labels, seed, lr=None, kept=None, frozen=False, steps=150):
    """A model of the embedded world's target. kept: how many of the start's stages stay."""
    few, lr = few_shot(train, labels, seed), lr or RECIPES[start]
    torch.manual_seed(seed)
    backbone = new_backbone(net, start)
    if kept is None:
        return fine_tune(few, backbone, lr, seed, steps)
    mixed = keep_first(kept, backbone, new_backbone(net, "scratch"))
    return fine_tune(few, mixed, RECIPES["scratch"], seed, steps, kept, 0.0 if frozen else lr)


def experiment(seed):
    """Test hits by labels, by stages kept, and by source, and what each source scores before training."""

    def row(part, net, start, labels, kept, model, scores):
        settings = {"part": part, "net": net, "start": start, "labels": labels, "kept": kept}
        return settings | {"hits": hits(model, test).numpy()} | scores

    few, no_scores = few_shot(train, 20, seed), dict.fromkeys(SCORES)
    for net, start in CANDIDATES:
        torch.manual_seed(seed)
        features = predict(new_backbone(net, start).to(device), few).numpy()
        scores = {name: score(features, few.labels.numpy()) for name, score in SCORES.items()}
        for labels in SIZES.get(start, (20,)):
            steps = max(150, 5 * labels // 2) if start == "scratch" else 150
            model = trained_from(net, start, labels, seed, steps=steps)
            kept, found = 4 * (start != "scratch"), scores if labels == 20 else no_scores
            yield row("labels", net, start, labels, kept, model, found)
    for net in NETS:
        for kept in (1, 2, 3, 4):
            for frozen in (True, False):
                if frozen or kept < 4:  # the other one is the start near, above
                    model = trained_from(net, "near", 20, seed, kept=kept, frozen=frozen)
                    part = "frozen" if frozen else "tuned"
                    yield row(part, net, "near", 20, kept, model, no_scores)
        model = trained_from(net, "scratch", 20, seed, lr=RECIPES["near"])
        yield row("mistake", net, "scratch", 20, 0, model, no_scores)


# %% [markdown]
# This is the search that found the rates: five of them for every candidate, at 20 labels a class and for 200 steps. *Far* takes the smallest and *photos* the
# largest, at the ends of the grid. `data/evidence/05_recipes.csv` has all of it.

# %% tags=["search"]
GRID = {
    "arm": tuple(f"{net} {start} 20" for net, start in CANDIDATES),
    "lr": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "seed": (900,),  # never used for a result
}


def validation_accuracy(arm, lr, seed):
    """What one setting of the search is worth, on validation pictures."""
    net, start, labels = arm.split()
    model = trained_from(net, start, int(labels), seed, lr, steps=200)
    return accuracy(model, valid)


# %% tags=["evidence"]
def scored_rows(table, net, start):
    """A candidate's rows with its scores, one a seed."""
    rows = table[
        (table["net"] == net) & (table["start"] == start) & (table["part"] == "labels")
    ]
    return rows[rows["labels"] == 20].sort_values("seed")


def claims_on_sources(table, claim):
    """How good the scores are."""
    found = {one: arm(table, *one)[0] for one in CANDIDATES}
    truth = [np.mean(found[one]) for one in CANDIDATES]
    best, seeds = CANDIDATES[int(np.argmax(truth))], arm(table, *CANDIDATES[0])[1]
    for name in SCORES:
        scores = np.array([scored_rows(table, *one)[name] for one in CANDIDATES])
        taus = [np.array([kendalltau(column, truth).statistic]) for column in scores.T]
        text = f"Kendall's tau of the score {name!r} and the truth is over one half"
        claim(text, estimate(taus, seeds, "tau"), rule="low > 0.5", origin="stored")
        picked = [
            found[CANDIDATES[number]][seed] for seed, number in enumerate(scores.argmax(axis=0))
        ]
        text = f"What the score {name!r} picks is within three points of the best"
        regret = compare(found[best], picked, seeds)
        claim(text, regret, rule="high < 0.03", origin="stored")
    text = "From near letters, VGG and ResNet are within five points of each other"
    apart = compare(found["vgg", "near"], found["resnet", "near"], seeds)
    claim(text, apart, rule="low > -0.05 and high < 0.05", origin="stored")
    text = "Fine-tuned, shuffled letters are more than five points below random weights"
    harm = compare(found["resnet", "shuffled"], found["resnet", "scratch"], seeds)
    claim(text, harm, rule="high < -0.05", origin="stored")
    text = "Before training, the neighbours of shuffled letters agree as those of random weights do"
    shuffled, drawn = (
        [np.array([score]) for score in scored_rows(table, "resnet", start)["neighbours"]]
        for start in ("shuffled", "scratch")
    )
    blind = compare(shuffled, drawn, seeds, "share of neighbours")
    claim(text, blind, rule="low > -0.05 and high < 0.05", origin="stored")


def claims_on_rates(table, claim):
    """What one rate for all costs."""
    for net in NETS:
        right, seeds = arm(table, net, "scratch")
        wrong = arm(table, net, "scratch", part="mistake")[0]
        text = f"{TITLE[net]}: at the pretrained start's rate, scratch loses over two points"
        claim(text, compare(right, wrong, seeds), rule="low > 0.02", origin="stored")


def stored_claims(table, claim):
    """What ten seeds say."""
    for part in (claims_on_labels, claims_on_stages, claims_on_sources, claims_on_rates):
        part(table, claim)


# %% [markdown]
# Two measures say how good a score is.
#
# - **Kendall's $\tau$**: of all pairs of candidates, the share that the score puts in the true order, minus the share that it puts in the wrong
#   one. 1 is the same order, $-1$ the reverse, 0 no connection.
# - The **regret**: accuracy of the best candidate minus accuracy of the one that the score picks. It is what the choice costs.

# %%
figure, axes = plt.subplots(1, 3, figsize=(9, 3), sharey=True, layout="constrained")
for axis, score in zip(axes, SCORES, strict=True):
    for net, start in CANDIDATES:
        scores = scored_rows(table, net, start)[score]
        truth = np.mean(arm(table, net, start)[0])
        marker = "o" if net == "resnet" else "s"
        colour = {**START_COLOURS, "photos": COLOURS["green"], "shuffled": COLOURS["red"]}[
            start
        ]
        axis.plot(scores.mean(), truth, marker, color=colour, label=f"{net} {start}")
    axis.set(xlabel=score)
    axis.grid(alpha=0.3)
axes[0].set_ylabel("test accuracy, fine-tuned")
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
show(figure, alt="Fine-tuned accuracy of eight candidates against each of three scores.")
for score in SCORES:
    values = np.array([scored_rows(table, *one)[score] for one in CANDIDATES])
    picks = [" ".join(CANDIDATES[best]) for best in values.argmax(axis=0)]
    said = ", ".join(f"{one} {picks.count(one)} times" for one in sorted(set(picks)))
    print(f"{score} picks {said}")
claims_on_sources(table, claims)

# %% [markdown]
# **Explain.** All three scores put the candidates nearly in the right order, though they have seen 200 pictures and trained nothing, or next to nothing. What they
# pick is as good as the best, within a point or so. So ask before you train.
#
# Look at the picture once more, and be modest. The order is easy: near, then far, then the rest. Among the poor candidates the scores see hardly a difference, though
# fine-tuning makes a large one: by LogME and by neighbours, *photos*, *shuffled* and random weights are nearly alike, and they end far apart. That shuffled letters do *harm*, no score says; at
# best it puts them last by a hair. A score knows what features *are*, and not what they can become.
# And VGG or ResNet? From near letters the two tie, and the scores pick now one, now the other. Where two candidates tie, it does not matter which you take. Take the cheaper one.

# %% [markdown]
# ## What goes wrong: one rate for all
#
# "To be fair, every start gets the same learning rate." It sounds like care. But a pretrained start wants small steps, so as not to lose what
# it knows. A start from scratch has nothing to lose, and at that rate it hardly leaves its place. Whoever gives both the pretrained
# rate measures the rate, and calls it transfer.
#
# **Predict.** By how many points does the gain of transfer look larger than it is?

# %%
lr = RECIPES["near"]
mistaken = fine_tune(few, live_backbone(False), lr, SEED, STEPS)
live["mistake"] = hits(mistaken, test).numpy()
for name, other in (("each its own rate", "scratch"), ("one rate for both", "mistake")):
    print(f"{name}: a gain of {compare([live['near']], [live[other]], [SEED])}")
claims_on_rates(table, claims)

# %% [markdown]
# The pretrained start did not get any better. The other one got worse, and the difference is booked as a gain.
#
# The mistake is not in the code of the experiment. It is in the search, or in the lack of one. So the test looks there: every start must have been tried at the
# same rates, and must have been given the best of them.


# %%
def assert_same_care(table, recipes):
    """Fail where a start was not tried at every rate, or did not get the best of them."""
    starts = table["arm"].str.split().str[1]
    found = table.groupby([starts, "lr"])["validation"].mean().unstack()
    for start, lr in recipes.items():
        missing = ", ".join(f"{rate:g}" for rate in found.columns[found.loc[start].isna()])
        assert not missing, f"{start} was never tried at {missing}"
        assert lr == found.loc[start].idxmax(), f"{start} was not given its best rate"


searched = pd.read_csv(EVIDENCE / "05_recipes.csv")
assert_same_care(searched, RECIPES)
careless = searched[
    ~searched["arm"].str.contains("scratch") | (searched["lr"] == RECIPES["near"])
]
for table_of_search, recipes in ((careless, RECIPES), (searched, {"scratch": RECIPES["near"]})):
    try:
        assert_same_care(table_of_search, recipes)
    except AssertionError as error:
        print("caught:", error)

# %% [markdown]
# When you read that a method beats another, look for this first: who chose the settings of the other one, and how many did they try?

# %% [markdown]
# ## Exercises
#
# ### 05.1 · What is it worth?
#
# Turn the dashed line into a number. You have the curve from scratch: numbers of labels a class, and an accuracy for each; both rise. And you
# have the accuracy that a pretrained start reaches. How many labels would scratch need? Between two points of the curve, go straight, with
# the *logarithm* of the labels on the horizontal axis, as in the picture. Below the curve, return its first number of labels. Above it, no
# number of ours is enough: return `float("inf")`.


# %% tags=["exercise-05.1"]
def labels_worth(labels, scratch, accuracy):
    """labels: list of numbers, rising; scratch: list of as many accuracies, rising; accuracy: a float.

    Returns how many labels a class reach that accuracy from scratch, a float.
    """
    # <solution>
    if accuracy > scratch[-1]:
        return float("inf")
    return float(np.exp(np.interp(accuracy, scratch, np.log(labels))))
    # <stub>
    # return ...
    # </stub>


# %% tags=["check-05.1", "nbval-check-output"]
check("05.1", labels_worth)

# %% [markdown]
# ### 05.2 · Draw the rest anew
#
# `keep_first` needed a second network. Do it with one. Return a copy of `network` whose first `count` parts are as they were, and all of whose other layers
# start anew, as PyTorch starts them: convolutions are drawn, batch norms forget what they learned and measured. The network that you got must
# stay as it is.


# %% tags=["exercise-05.2"]
def redraw_rest(network, count):
    """network: a torch.nn.Sequential of parts, which may be Sequential themselves; count: how many stay.

    Returns a new torch.nn.Sequential with the same parts.
    """
    # <solution>
    new = copy.deepcopy(network)
    for layer in new[count:].modules():
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    return new
    # <stub>
    # return ...
    # </stub>


# %% tags=["check-05.2", "nbval-check-output"]
check("05.2", redraw_rest)

# %% [markdown]
# ### 05.3 · Another score
#
# The **H-score** (Bao and others 2019) asks how much of what varies in the features varies *between classes*:
#
# $$H = \operatorname{trace}\left(\Sigma^{+}\, \Sigma_c\right).$$
#
# $\Sigma$ is the covariance of the features, $\Sigma^{+}$ its pseudo-inverse. $\Sigma_c$ is the same covariance, after every picture's features have been
# replaced by the mean features of its class. Write it.


# %% tags=["exercise-05.3"]
def h_score(features, labels):
    """features: float64 tensor (n, width); labels: int tensor (n,). Returns a number."""
    # <solution>
    centred = features - features.mean(dim=0)
    means = torch.stack([centred[labels == label].mean(dim=0) for label in labels])
    return torch.trace(torch.linalg.pinv(centred.T @ centred) @ (means.T @ means)).item()
    # <stub>
    # return ...
    # </stub>


# %% tags=["check-05.3", "nbval-check-output"]
check("05.3", h_score)

# %% [markdown]
# ### 05.4 · Score the score
#
# For some candidates you have their scores and, after training, their accuracies. Return Kendall's $\tau$ and the regret. No two candidates are
# equal in either.


# %% tags=["exercise-05.4"]
def judge(scores, accuracies):
    """Two lists of as many floats. Returns tau and the regret, two floats."""
    # <solution>
    signs = []
    for a, b in combinations(range(len(scores)), 2):
        signs.append(np.sign((scores[a] - scores[b]) * (accuracies[a] - accuracies[b])))
    picked = accuracies[scores.index(max(scores))]
    return float(np.mean(signs)), max(accuracies) - picked
    # <stub>
    # return ...
    # </stub>


# %% tags=["check-05.4", "nbval-check-output"]
check("05.4", judge)

# %% [markdown]
# ## The claims of this lesson

# %%
held = claims.table()
show_table(held[["claim", "value", "low", "high", "n", "rule", "holds", "origin"]].round(3))

# %% [markdown]
# ## Further reading
#
# - Yosinski, Clune, Bengio, Lipson (2014), *How transferable are features in deep neural networks?* Where this lesson's second section comes from.
# - He, Girshick, Dollár (2019), *Rethinking ImageNet pre-training.* With enough labels and enough steps, scratch catches up.
# - Zoph and others (2020), *Rethinking pre-training and self-training.*
# - Kornblith, Shlens, Le (2019), *Do better ImageNet models transfer better?* One score, the source accuracy, against the truth.
# - You, Liu, Wang, Long (2021), *LogME: practical assessment of pre-trained models for transfer learning.* And Bao and others (2019), *An
#   information-theoretic approach to transferability in task transfer learning*: the H-score.
# - Raghu, Zhang, Kleinberg, Bengio (2019), *Transfusion: understanding transfer learning for medical imaging.* Neyshabur, Sedghi, Zhang (2020),
#   *What is being transferred in transfer learning?* Features, or well-scaled weights?
#
# **Next:** lesson 06 asks how to choose settings without fooling yourself.
