# %% [markdown]
# ## The question
#
# You have trained a probe. Forty validation pictures say that it gets 95 % right. How far could that be off? And if you try a hundred
# settings and keep the one with the best score, what is that score still worth?
#
# Below, one and the same probe is scored again and again, each time on forty validation pictures drawn anew. Nothing else changes.

# %% tags=["parameters"]
PROFILE: str = "embedded"  # [embedded | imagenet] the world; the second needs a network
SEED: int = 0  # moves the labelled pictures, the folds, the candidates and the training
DEVICE: str = "auto"  # [auto | cpu | cuda | mps] where to compute
OUT: str = "../build/06"  # where results go
NET: str = "resnet"  # [resnet | vgg] the backbone of the live runs; stored runs take both
LABELS: int = 20  # labels a class
BUDGET: int = 32  # settings that each search may try
STEPS: int = 80  # training steps in the live runs; stored runs take 150

# %% tags=["setup"]
import itertools
from functools import cache, partial

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.feature_selection import SelectKBest
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from torch import nn
from torchvision.models.resnet import BasicBlock
from torchvision.models.vgg import make_layers

from course_utils.backbones import Backbone, Classifier, centred, load_backbone
from course_utils.data import (
    Split,
    augmentation,
    batches,
    few_shot,
    load_target,
    stratified_folds,
)
from course_utils.evaluate import accuracy, hits
from course_utils.evidence import Claims, compare, estimate, stored, unpack_hits
from course_utils.exercises import check, hint, solution  # noqa: F401
from course_utils.features import stage_features
from course_utils.plots import COLOURS, chooser, show, show_table
from course_utils.profile import get_profile, pick_device
from course_utils.training import adamw, constant, fit

try:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
except ImportError:  # the search that needs it says how to get it
    optuna = None

profile = get_profile(PROFILE)
device = pick_device(DEVICE)
claims = Claims("06_validation_and_search", OUT)
train, valid, test = (load_target(profile, split) for split in ("train", "valid", "test"))

# %% [markdown]
# As in lesson 03, a backbone stays frozen and its features are computed once. Everything until the last section is then a matter of
# moments, and we can afford to do it often.

# %% tags=["evidence"]
NETS = ("vgg", "resnet")


@cache
def read(net, split):
    """Features of all pictures of a split, after each stage of a backbone: numpy (n, channels) each."""
    pictures = {"train": train, "valid": valid, "test": test}[split]
    backbone = load_backbone(profile.backbones[net]).to(device)
    return [features.numpy() for features in stage_features(backbone, pictures)]


def few_of(seed, labels=20):
    """The indices of a few-shot subset of the training pictures, and their labels."""
    numbers = Split(
        torch.arange(len(train)), train.labels, train.classes
    )  # in place of pictures
    chosen = few_shot(numbers, labels, seed)
    return chosen.pictures.numpy(), chosen.labels.numpy()


def folds_of(labels, seed):
    """Five folds, or fewer where a class has fewer pictures: arrays of held-out indices."""
    count = min(5, int(np.bincount(labels)[np.unique(labels)].min()))
    return [fold.numpy() for fold in stratified_folds(torch.from_numpy(labels), count, seed)]


def probe(C=0.1):
    """Standardise, then logistic regression."""
    return make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=1000))


# %%
few, own = few_of(SEED, LABELS)  # the labelled pictures: their indices and labels
features = read(NET, "train")[-1][few]
pictures = min(40, len(valid) // 2)
right = probe().fit(features, own).predict(read(NET, "valid")[-1]) == valid.labels.numpy()
rng = np.random.default_rng(SEED)
scores = [rng.choice(right, pictures, replace=False).mean() for _ in range(500)]
figure, axis = plt.subplots(figsize=(6, 2.6), layout="constrained")
edges = np.arange(min(scores) * pictures - 0.5, pictures + 1) / pictures
axis.hist(scores, edges, color=COLOURS["sky"])
axis.axvline(right.mean(), color=COLOURS["black"])
axis.set(xlabel=f"score on {pictures} validation pictures", ylabel="draws")
show(figure, alt="A wide histogram of one probe's scores on draws of forty pictures.")
low, high = np.quantile(scores, [0.025, 0.975])
print(f"on all {len(valid)} validation pictures: {right.mean():.3f}")
print(f"on {pictures} of them: from {low:.3f} to {high:.3f}, in 19 draws of 20")

# %% [markdown]
# The line is the score on all validation pictures. So a difference of a few points between two networks, seen on forty pictures, may be
# nothing at all. There is a formula for the width. A score on $n$ pictures, each right with probability $p$, has the standard deviation
#
# $$\sigma = \sqrt{p\,(1-p)\,/\,n}.$$
#
# Four times the pictures halve it. Where do more pictures come from, when labels are few?
#
# ## Cross-validation
#
# Cut the labelled pictures into five **folds**. Hold out the first, learn from the other four, score on the first. Then hold out the
# second, and so on. Every picture is held out once, and teaches four times. The mean of the five scores is the **cross-validated**
# accuracy.
#
# Two things to mind. Folds are **stratified**: each class is dealt out evenly among them. And *everything* that learns from data learns
# inside the loop, from the rest alone. The scaler too.


# %% tags=["evidence", "by-hand"]
def cross_validate(model, features, labels, folds):
    """The accuracy on each fold of a model that learned from the others."""
    scores = []
    for held_out in folds:
        rest = np.setdiff1d(np.arange(len(labels)), held_out)
        fitted = clone(model).fit(features[rest], labels[rest])  # scaler and all, from the rest
        scores.append(fitted.score(features[held_out], labels[held_out]))
    return np.array(scores)


# %%
folds = folds_of(own, SEED)
by_hand = cross_validate(probe(), features, own, folds)
everything = np.arange(len(own))
cuts = [(np.setdiff1d(everything, held_out), held_out) for held_out in folds]
assert np.allclose(by_hand, cross_val_score(probe(), features, own, cv=cuts))
print("scores on the folds:", *by_hand.round(3))
print(f"mean: {by_hand.mean():.3f}")

# %% [markdown]
# scikit-learn's `cross_val_score` gives the same numbers; the cell asserts it. In the package, `stratified_folds` makes the folds. What
# cannot be cut into folds is refused before anything is computed:

# %%
for labels, count in ((torch.tensor([0, 0, 0, 1, 1, 1, 2]), 3), (torch.tensor([0, 1]), 5)):
    try:
        stratified_folds(labels, count, seed=SEED)
    except ValueError as error:
        print("refused:", error)

# %% [markdown]
# **Predict.** A single fold is a validation set of a fifth of the labelled pictures. All five folds use every one of them. By how much is
# each score off, on average? To know, we need the truth: what a probe that learned from all the labelled pictures gets right among the
# training pictures whose labels we did not use. In real life you do not have those.


# %% tags=["evidence"]
def promised_and_kept(net, seed, labels=20):
    """A score on each fold, and the accuracy on training pictures whose labels were not used."""
    chosen, own = few_of(seed, labels)
    features = read(net, "train")[-1]
    scores = cross_validate(probe(), features[chosen], own, folds_of(own, seed))
    others = np.setdiff1d(np.arange(len(train)), chosen)
    kept = (
        probe().fit(features[chosen], own).score(features[others], train.labels.numpy()[others])
    )
    return scores, kept


def scatter(net, seed, draws=20, labels=20):
    """How far a validation score is off, in the mean over draws: of one fold, and of all five."""
    off = [[], []]
    for draw in range(draws):
        scores, kept = promised_and_kept(net, draws * seed + draw, labels)
        off[0].append(abs(scores[0] - kept))
        off[1].append(abs(scores.mean() - kept))
    yield {"arm": "one fold", "value": np.mean(off[0])}
    yield {"arm": "all folds", "value": np.mean(off[1])}


# %%
draws = range(40 * SEED, 40 * SEED + 40)
found = [promised_and_kept(NET, draw, LABELS) for draw in draws]
off = {
    "one fold": np.array([scores[0] - kept for scores, kept in found]),
    "all folds": np.array([scores.mean() - kept for scores, kept in found]),
}
figure, axes = plt.subplots(2, 1, figsize=(6, 3.2), sharex=True, layout="constrained")
for axis, (name, values) in zip(axes, off.items(), strict=True):
    axis.hist(100 * values, np.arange(-22, 23, 2), color=COLOURS["sky"])
    axis.axvline(0, color=COLOURS["black"])
    axis.set(title=name, ylabel="draws")
axes[1].set_xlabel("score minus truth, in points")
show(figure, alt="Two histograms around zero: scores on one fold lie wide, on all folds close.")
claims(
    "The score on one fold is further off than the score on all folds",
    compare(*([abs(value)[None] for value in off[name]] for name in off), draws),
    rule="value > 0",
)

# %% [markdown]
# **Explain.** Each draw is another set of labelled pictures. Five folds are five times the pictures, so the scatter is smaller: at best by
# $\sqrt{5}$, for the five probes share most of their pictures, and some of their mistakes. The price is that the probe learns five times.
#
# On average both scores are nearly right. Strictly they lean to the low side, since a probe in the loop learns from four fifths of the labels, and is
# judged in place of one that gets all. Here the lean is too small to see. And both speak of pictures *like these*. In the embedded world,
# training and validation pictures stand on the same photographs, test pictures on others. No cutting of your own data tells you about that.
#
# ## Grid, random, and one that learns
#
# Now there is a score that we can trust, so let us use it to choose. A **support vector machine** lets every labelled picture vote on a new
# one. `gamma` says how fast a vote fades with the distance of their features; `C`, as before, how little it is held back. Before it stand two more
# knobs: the stage of the backbone where we read, and the share of the features' variance that is kept (PCA turns the features so that the
# first few carry most of it, and drops the rest). Four knobs. What is good for one depends on the others.
#
# Three ways to search, with the same **budget** of tries:
#
# - A **grid** takes a few values of each knob, in every combination. With this budget that is two values of three knobs at each stage.
# - **Random** search draws every knob anew for each try. If only two knobs matter, a grid tries four values of them, over and over; random
#   search tries a new pair each time (Bergstra and Bengio 2012).
# - **Optuna** starts at random too. Then it looks at what it has: where do the good tries lie, and where the others? It draws more where
#   good ones are dense (a *tree-structured Parzen estimator*, TPE).
#
# `C` and `gamma` are searched by *powers of ten*: from .001 to .01 is as far as from 10 to 100.

# %% tags=["evidence"]
LOWEST = {"C": -3, "gamma": -6, "keep": 0.2}  # powers of ten, but keep
HIGHEST = {"C": 3, "gamma": 1, "keep": 0.99}


def model_of(C, gamma, keep):
    """Standardise, keep a share of the variance, then a support vector machine."""
    return make_pipeline(StandardScaler(), PCA(keep, svd_solver="full"), SVC(C=C, gamma=gamma))


@cache
def problem(net, seed, labels=20):
    """How a setting is scored, by cross-validation, and how it is tested, once it is chosen."""
    chosen, own = few_of(seed, labels)
    folds = folds_of(own, seed)

    def score(stage, **knobs):
        features = read(net, "train")[stage][chosen]
        return cross_validate(model_of(**knobs), features, own, folds).mean()

    def tested(stage, **knobs):
        fitted = model_of(**knobs).fit(read(net, "train")[stage][chosen], own)
        return fitted.score(read(net, "test")[stage], test.labels.numpy())

    return score, tested


# %% tags=["evidence"]
def by_grid(score, stages, budget, seed):
    """Two values of each knob in every combination, shuffled: a list of (setting, score)."""
    names = ("stage", "C", "gamma", "keep")
    values = (range(stages), (10**-1.5, 10**1.5), (10**-4.25, 10**-0.75), (0.4, 0.8))
    settings = [dict(zip(names, s, strict=True)) for s in itertools.product(*values)]
    order = np.random.default_rng(seed).permutation(len(settings))[:budget]
    return [(settings[i], score(**settings[i])) for i in order]


def at_random(score, stages, budget, seed):
    """Every knob drawn anew for each try."""
    rng, tried = np.random.default_rng(seed), []
    for _ in range(budget):
        drawn = {name: rng.uniform(LOWEST[name], HIGHEST[name]) for name in LOWEST}
        drawn |= {"C": 10 ** drawn["C"], "gamma": 10 ** drawn["gamma"]}
        setting = {"stage": int(rng.integers(stages))} | drawn
        tried.append((setting, score(**setting)))
    return tried


def with_optuna(score, stages, budget, seed):
    """Draws that follow what was found so far: a tree-structured Parzen estimator (TPE)."""

    def objective(trial):
        return score(
            stage=trial.suggest_int("stage", 0, stages - 1),
            C=trial.suggest_float("C", 1e-3, 1e3, log=True),
            gamma=trial.suggest_float("gamma", 1e-6, 1e1, log=True),
            keep=trial.suggest_float("keep", 0.2, 0.99),
        )

    sampler = optuna.samplers.TPESampler(seed=seed % 2**32)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    study.optimize(objective, n_trials=budget)
    return [(trial.params, trial.value) for trial in study.trials]


SEARCHES = {"grid": by_grid, "random": at_random, "Optuna": with_optuna}

# %% [markdown]
# **Predict.** Which of the three has the best score after the whole budget? And after four tries?

# %% tags=["evidence"]
AFTER = (2, 4, 8, 16, 32)  # tries after which we look


def searches(net, seed, repeats=3):
    """The best score so far of each search, and what its choice is worth, in the mean over repeats."""
    score, tested = problem(net, seed)
    stages = len(read(net, "train"))
    for name, search in SEARCHES.items():
        tries = [search(score, stages, AFTER[-1], repeats * seed + k) for k in range(repeats)]
        best = np.mean(
            [np.maximum.accumulate([s for _, s in tried]) for tried in tries], axis=0
        )
        for after in AFTER:
            yield {"arm": name, "step": after, "value": best[after - 1]}
        chosen = [max(tried, key=lambda one: one[1])[0] for tried in tries]
        yield {"arm": f"{name}, tested", "value": np.mean([tested(**one) for one in chosen])}


def values_of(table, part, net, arm, step=None, column="value"):
    """What stands in a column of the stored table: an array of one number a seed, and the seeds."""
    rows = table[(table["part"] == part) & (table["net"] == net) & (table["arm"] == arm)]
    rows = rows[rows["step"] == step] if step is not None else rows
    rows = rows.sort_values("seed")
    return [np.array([value]) for value in rows[column]], rows["seed"].tolist()


# %% [markdown]
# ### The test set, opened once
#
# While we search, the test set stays shut. `Once` wraps whatever tells about it: it answers one question, and no second one.


# %% tags=["once"]
class Once:
    """A test that answers one question, and no second one."""

    def __init__(self, tested):
        self.tested, self.asked = tested, False

    def __call__(self, **setting):
        if self.asked:
            raise RuntimeError(
                "the test set was opened before: what you choose now, you choose on it"
            )
        self.asked = True
        return self.tested(**setting)


# %% tags=["searches"]
ways = dict(SEARCHES)
if optuna is None:
    print("Optuna is not here, so we go on without it. To have it: pip install optuna")
    del ways["Optuna"]
score, tested = problem(NET, SEED, LABELS)
stages, ends = len(read(NET, "train")), {}
for name, search in ways.items():
    tried = search(score, stages, BUDGET, SEED)
    ends[name] = max(tried, key=lambda one: one[1])
    print(f"{name:7} best score of {len(tried)} tries: {ends[name][1]:.3f}")
chosen, promised = max(ends.values(), key=lambda one: one[1])
once = Once(tested)
knobs = ", ".join(f"{name} {value:.3g}" for name, value in chosen.items() if name != "stage")
print(f"chosen: after stage {chosen['stage'] + 1}, {knobs}")
print(
    f"the best of all promises {promised:.3f}; on the test set, opened once: {once(**chosen):.3f}"
)

# %% [markdown]
# One seed says little about three searches. Ten seeds and both networks, each search three times from other random numbers, stored:

# %%
table = stored("06_validation_and_search")
figure, axes = plt.subplots(1, 2, figsize=(8, 2.8), sharey=True, layout="constrained")
for axis, net in zip(axes, NETS, strict=True):
    for name, colour in zip(SEARCHES, ("orange", "blue", "green"), strict=True):
        points = [estimate(*values_of(table, "searches", net, name, after)) for after in AFTER]
        axis.plot(AFTER, [p.value for p in points], "o-", color=COLOURS[colour], label=name)
        low, high = [p.low for p in points], [p.high for p in points]
        axis.fill_between(AFTER, low, high, color=COLOURS[colour], alpha=0.15, linewidth=0)
    axis.set(title=net, xlabel="tries", xscale="log", xticks=AFTER, xticklabels=AFTER)
    axis.set_ylim(0.6, 1)
    axis.minorticks_off()
axes[0].set_ylabel("best score so far")
axes[1].legend()
show(figure, alt="The best score so far against the number of tries, for three searches.")
for net in NETS:
    for name in SEARCHES:
        tested = estimate(*values_of(table, "searches", net, f"{name}, tested"))
        print(f"{net:6} {name:6} on test pictures: {tested}")

# %% [markdown]
# **Explain.** For the first ten tries Optuna draws at random too, and is no better for it. Then it uses what it saw and goes ahead: in the end its
# *score* is the best, by a point or two. Grid and random search end about even. On *test* pictures only a part of Optuna's lead is left, at
# the edge of what ten seeds can tell. A search that finds higher scores finds more luck, too.
#
# So: with four knobs and thirty tries, any of the three will do. Random search is three lines, and nobody has to choose the values of a grid.
# Optuna pays where a try is expensive, or where knobs are many.
#
# And all three promise more than the test set keeps. Part of that is the other photographs. The other part is the next section.
#
# ## What goes wrong: choosing on the test set
#
# Why so much care about opening it once? Let us do it the other way. We have three hundred candidates: each sees another random half of the
# features, and says the class whose mean is nearest. They are about equally good; what sets them apart is luck. We score all of them on fifty
# test pictures, take the best, and report its score.
#
# To see what the report is worth, we cut the test pictures into halves. One half is *opened*: the fifty come from there. The other half stays
# *fresh*, and nothing is chosen by it.
#
# **Predict.** The best of a hundred promises some score on the fifty. What will it have on the fresh half: as much, or how many points less?

# %% tags=["evidence"]
COUNTS = (1, 3, 10, 30, 100, 300)  # candidates
SIZES = (50, 200, 500)  # test pictures that are looked at


@cache
def candidates(net, seed, labels=20):
    """Which validation and test pictures each of many candidates gets right: bool (candidates, n).

    A candidate sees half of the features, drawn at random. It says the class whose mean is nearest.
    """
    chosen, own = few_of(seed, labels)
    scaler = StandardScaler().fit(read(net, "train")[-1][chosen])
    ours, *others = (
        torch.from_numpy(scaler.transform(read(net, split)[-1]))
        for split in ("train", "valid", "test")
    )
    ours, classes = ours[chosen], len(train.classes)
    means = torch.stack([ours[own == number].mean(dim=0) for number in range(classes)])
    generator = torch.Generator().manual_seed(seed % 2**63)
    right = [], []
    for _ in range(COUNTS[-1]):
        half = torch.randperm(ours.shape[1], generator=generator)[: ours.shape[1] // 2]
        for found, features, split in zip(right, others, (valid, test), strict=True):
            nearest = torch.cdist(features[:, half], means[:, half]).argmin(dim=1)
            found.append((nearest == split.labels).numpy())
    return np.stack(right[0]), np.stack(right[1])


def look(net, seed, labels=20):
    """Two worlds, the halves of the test pictures swapped.

    Each is: hits of all candidates on validation pictures, on opened test pictures, and their accuracy on fresh ones.
    """
    on_valid, on_test = candidates(net, seed, labels)
    order = np.random.default_rng(seed).permutation(on_test.shape[1])
    halves = np.array_split(order, 2)
    return [
        (on_valid, on_test[:, opened], on_test[:, fresh].mean(axis=1))
        for opened, fresh in (halves, halves[::-1])
    ]


def chosen_on_test(world, size, count):
    """What the best of so many candidates on so many opened test pictures promises, and keeps."""
    _, opened, fresh = world
    scores = opened[:count, :size].mean(axis=1)
    return scores.max(), fresh[scores.argmax()]


def chosen_on_validation(world):
    """What the best of all candidates on validation pictures promises after one look, and keeps."""
    on_valid, opened, fresh = world
    best = on_valid.mean(axis=1).argmax()
    return opened[best].mean(), fresh[best]


def lies(net, seed, repeats=20):
    """What is promised beyond what is kept, in the mean over repeats."""
    worlds = [
        world for repeat in range(repeats) for world in look(net, repeats * seed + repeat)
    ]
    found = {
        (f"{size} pictures", count): [chosen_on_test(world, size, count) for world in worlds]
        for size in SIZES
        for count in COUNTS
    }
    found["validation", COUNTS[-1]] = [chosen_on_validation(world) for world in worlds]
    for (arm, count), pairs in found.items():
        promised, kept = np.mean(pairs, axis=0)
        yield {"arm": arm, "step": count, "value": promised - kept, "fresh": kept}


# %%
_, opened, fresh = look(NET, SEED, LABELS)[0]
promised = opened[:, : SIZES[0]].mean(axis=1)


def cloud(count):
    """What each of so many candidates promises, and what it keeps; the one that is chosen in red."""
    figure, axis = plt.subplots(figsize=(4.6, 4.2), layout="constrained")
    some, best = slice(None, count), promised[:count].argmax()
    jitter = np.random.default_rng(0).uniform(-0.004, 0.004, len(promised))
    axis.scatter(promised[some] + jitter[some], fresh[some], 12, color=COLOURS["sky"])
    axis.plot(promised[best], fresh[best], "o", markersize=10, color=COLOURS["red"])
    ends = min(promised.min(), fresh.min()) - 0.02, max(promised.max(), fresh.max()) + 0.02
    axis.plot(ends, ends, color=COLOURS["black"], linewidth=0.8)
    axis.set(xlim=ends, ylim=ends, aspect="equal", title=f"{count} candidates")
    axis.set(xlabel=f"score on {SIZES[0]} opened pictures", ylabel="accuracy on fresh pictures")
    return figure


show(
    cloud(100),
    alt="A cloud of candidates without slope; the chosen one lies far to the right of the line.",
)
chooser("candidates", COUNTS, cloud)

# %% [markdown]
# Each point is a candidate. On the line, a promise is kept. The red one is chosen, since it is furthest to the right. It is *not* higher up
# than others: the fifty pictures say next to nothing about which candidate is better. Move the slider. The more candidates, the further to the right the red
# one lies, and it stays at the height of the rest.
#
# How far to the right? Write $\sigma$ for the standard deviation of the luck in a score. Of $N$ normal numbers, the largest lies on average at most
#
# $$\sigma\,\sqrt{2 \ln N}$$
#
# above their mean. It grows without end, though slowly; and $\sigma$ shrinks as the square root of the number of pictures. The **lie** is what
# is promised minus what is kept. Below it is the mean over ten draws of labelled pictures and candidates, and each half is opened once and
# fresh once. The dashed lines are the formula, with the $\sigma$ that is seen among the candidates.

# %%
draws = range(10 * SEED, 10 * SEED + 10)
worlds = [world for draw in draws for world in look(NET, draw, LABELS)]
figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
for size, colour in zip(SIZES, ("orange", "blue", "green"), strict=True):
    pairs = np.array([[chosen_on_test(w, size, count) for w in worlds] for count in COUNTS])
    lie = 100 * (pairs[..., 0] - pairs[..., 1]).mean(axis=1)
    axis.plot(COUNTS, lie, "o-", color=COLOURS[colour], label=f"{size} test pictures")
    luck = np.mean([(opened[:, :size].mean(axis=1) - kept).std() for _, opened, kept in worlds])
    ceiling = 100 * luck * np.sqrt(2 * np.log(COUNTS))
    axis.plot(COUNTS, ceiling, "--", color=COLOURS[colour], linewidth=0.8)
axis.axhline(0, color=COLOURS["black"], linewidth=0.8)
axis.set(xscale="log", xticks=COUNTS, xticklabels=COUNTS, xlabel="candidates")
axis.set_ylabel("lie, in points")
axis.minorticks_off()
axis.legend()
show(
    figure, alt="The lie grows with the number of candidates, and is smaller on more pictures."
)

# %%
best_of_100 = np.array([chosen_on_test(world, SIZES[0], 100) for world in worlds])
honest = np.array([chosen_on_validation(world) for world in worlds])
best_of_100, honest = (pairs.reshape(10, 2, 2).mean(axis=1) for pairs in (best_of_100, honest))
claims(
    f"The best of 100 on {SIZES[0]} test pictures promises more than it keeps",
    compare(best_of_100[:, :1], best_of_100[:, 1:], draws),
    rule="low > 0.01",
)
for name, pairs in (("on test pictures", best_of_100), ("on validation pictures", honest)):
    print(f"chosen {name}: promises {pairs[:, 0].mean():.3f}, keeps {pairs[:, 1].mean():.3f}")

# %% [markdown]
# **Explain.** With one candidate nothing is chosen, and there is no lie but the luck of which pictures were opened. With more it grows, in the shape of
# the formula and mostly below it: candidates share some of their luck, since they stumble over the same pictures. On ten times the pictures the
# lie is smaller, and does not go away.
#
# What does the mistake cost? Not the network: what was chosen on test pictures keeps about as much as what was chosen on validation pictures. The *number* is
# ruined. You will report points that nobody who uses the network will ever see, and you have no pictures left to find out.
#
# The remedy is printed last. Choose on validation pictures, then open the test set once. That promise keeps: whoever did not see the test cannot
# favour one half of it, so the mean over both halves is zero by construction.
#
# **The test that catches it** is `Once`. It answers the first candidate, and refuses the second.

# %%
once = Once(lambda candidate: opened[candidate].mean())
try:
    best = max(range(100), key=lambda candidate: once(candidate=candidate))
except RuntimeError as error:
    print("caught:", error)

# %% [markdown]
# The same arithmetic holds for validation pictures: the best validation score of a hundred is too good as well. That does no harm as long as
# you use it to choose, and report another number.
#
# ## What goes wrong, again: choosing before the folds
#
# Cross-validation does not help who cheats it. A classic: there are hundreds of features and few pictures, so somebody first picks the ten
# features that tell the classes apart best. With these, the probe is cross-validated. What is wrong? The ten were chosen with *all*
# labels, those of the held-out pictures among them (Ambroise and McLachlan 2002).
#
# To see what that is worth, we deal out the labels at random. Now there is nothing to learn.
#
# **Predict.** By chance one label in ten is right (in the embedded world). What will cross-validation promise, if the features are chosen before the folds? And if
# they are chosen inside, from the rest?


# %% tags=["evidence"]
def spread(features, labels):
    """How far apart the class means of each feature lie, in its own deviations: (width,)."""
    scaled = StandardScaler().fit_transform(features)
    means = [scaled[labels == number].mean(axis=0) for number in np.unique(labels)]
    return np.var(means, axis=0)


def selected_outside(features, labels, folds):
    """The mistake: the ten best features are chosen with all labels, then cross-validated."""
    best = SelectKBest(spread, k=10).fit_transform(features, labels)
    return cross_validate(probe(), best, labels, folds).mean()


def selected_inside(features, labels, folds):
    """The remedy: the choice is a part of the model, and sees the labels of the rest alone."""
    model = make_pipeline(SelectKBest(spread, k=10), probe())
    return cross_validate(model, features, labels, folds).mean()


def on_chance(way, net, seed, labels=5, repeats=10):
    """Cross-validated accuracies on labels that were dealt out at random."""
    scores = []
    for number in range(repeats * seed, repeats * seed + repeats):
        chosen, own = few_of(number, labels)
        features = np.concatenate(read(net, "train"), axis=1)[chosen]
        dealt = np.random.default_rng(number).permutation(own)
        scores.append(way(features, dealt, folds_of(dealt, seed)))
    return np.array(scores)


def chance(net, seed):
    """What each way promises where there is nothing to learn."""
    for way in (selected_outside, selected_inside):
        yield {"arm": way.__name__, "value": on_chance(way, net, seed).mean()}


# %%
ways = (selected_outside, selected_inside)
found = {way: on_chance(way, NET, SEED, min(5, LABELS)) for way in ways}
for way, scores in found.items():
    print(
        f"{way.__name__:16} {scores.mean():.3f}, where chance is {1 / len(train.classes):.3f}"
    )
claims(
    "On dealt labels, choosing before the folds promises more than choosing inside",
    compare(*(found[way][:, None] for way in ways), range(10 * SEED, 10 * SEED + 10)),
    rule="low > 0.03",
)

# %% [markdown]
# **Explain.** With hundreds of features and fifty pictures, some features fit *any* labels by chance, those of the held-out pictures too.
# Chosen inside, they fit the rest by chance, and say nothing about what is held out. The remedy costs one line: the choice becomes a step of the
# pipeline, and the pipeline is what is cross-validated.
#
# **The test that catches it** is what we just did: deal out the labels at random, and run *everything* that you do, from the first choice to the last
# score. If the score is better than chance, something leaks, whether you have found it or not.


# %%
def assert_chance(scores, classes):
    """Fail where labels that mean nothing are predicted, by three standard errors, better than chance."""
    error = np.std(scores, ddof=1) / np.sqrt(len(scores))
    said = f"labels that mean nothing are predicted at {np.mean(scores):.0%}: something leaks"
    assert np.mean(scores) <= 1 / classes + 3 * error, said


assert_chance(found[selected_inside], len(train.classes))
try:
    assert_chance(found[selected_outside], len(train.classes))
except AssertionError as error:
    print("caught:", error)

# %% [markdown]
# ## Does my network overfit?
#
# Everybody asks it, and there is a list of answers that everybody gives: take a smaller network, regularise, get more data, stop early. Let us
# try the list. From here on a network is trained, from scratch, on 20 labels a class.
#
# **Overfitting** is measured by the *gap*: accuracy on the pictures that were learned from, minus accuracy on others. A network from scratch knows its
# 200 pictures by heart soon, so the gap is what it gets wrong on the others. But nobody wants a small gap. One wants a good network. So for each
# remedy there are two questions. Does the gap shrink? Does *test accuracy* rise?
#
# | remedy | what it does | its knob |
# |---|---|---|
# | plain | nothing | learning rate |
# | narrow | fewer parameters: a share of the channels in every layer | the share |
# | decay | weight decay: every step pulls all weights towards zero | how strongly |
# | dropout | leaves out a random share of the features in every step | the share |
# | augmented | turns, moves and recolours every picture anew (lesson 02) | how far |
# | more | five times the labels | – |
#
# Each got three tries of its knob on validation pictures, the plain network too. All take the same number of steps.

# %% tags=["evidence"]
RATES = ("plain", "more", "steady", "wrong labels")  # where the knob is the learning rate
RECIPES = {
    "vgg": {
        "plain": 0.01,
        "narrow": 0.75,
        "decay": 1.0,
        "dropout": 0.2,
        "augmented": 1.0,
        "more": 0.01,
        "steady": 0.003,
        "wrong labels": 0.001,
    },
    "resnet": {
        "plain": 0.03,
        "narrow": 0.75,
        "decay": 1.0,
        "dropout": 0.8,
        "augmented": 0.5,
        "more": 0.03,
        "steady": 0.01,
        "wrong labels": 0.001,
    },
}
RANGES = {  # of `augmentation`, at strength 1
    "rotate": 15,
    "scale": 0.15,
    "shear": 0.15,
    "shift": 0.1,
    "brightness": 0.5,
    "contrast": 0.3,
}


def narrow(net, share):
    """The small VGG or ResNet with a share of its channels in every layer, from random weights."""
    full = (32, 48, 96, 128) if net == "vgg" else (32, 32, 64, 128)
    a, b, c, d = (int(share * channels) for channels in full)
    if net == "vgg":
        parts = [make_layers([a, "M", b, b, "M", c, c, "M", d, d, "M"], batch_norm=True)]
    else:
        norm, pool = nn.BatchNorm2d(a), nn.MaxPool2d(2)
        parts = [nn.Conv2d(3, a, 3, padding=1, bias=False), norm, nn.ReLU(inplace=True), pool]
        for before, after, stride in ((a, b, 1), (b, c, 2), (c, c, 1), (c, d, 2)):
            shortcut = None
            if stride > 1:
                convolution = nn.Conv2d(before, after, 1, stride, bias=False)
                shortcut = nn.Sequential(convolution, nn.BatchNorm2d(after))
            parts.append(BasicBlock(before, after, stride, shortcut))
    layers = nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    return Backbone(f"{net}_narrow", layers, d, centred)


def with_wrong_labels(few, seed, share=0.3):
    """The same pictures, a share of them with a wrong label."""
    generator = torch.Generator().manual_seed(seed)
    labels, classes = few.labels.clone(), len(few.classes)
    wrong = torch.randperm(len(labels), generator=generator)[: int(share * len(labels))]
    moved = torch.randint(1, classes, (len(wrong),), generator=generator)
    labels[wrong] = (labels[wrong] + moved) % classes
    return Split(few.pictures, labels, few.classes)


def train_arm(net, arm, seed, strength=None, steps=150, patience=None, labels=20):
    """Train under one remedy: the model, the pictures that it learned from, and its history."""
    strength = RECIPES[net][arm] if strength is None else strength
    most = int(torch.bincount(train.labels).min())
    few = few_shot(train, min(5 * labels, most) if arm == "more" else labels, seed)
    if arm == "wrong labels":
        few = with_wrong_labels(few, seed)
    torch.manual_seed(seed)
    name = profile.backbones[net]
    backbone = (
        narrow(net, strength) if arm == "narrow" else load_backbone(name, arm == "wrong labels")
    )
    if arm == "dropout":
        backbone.layers.append(nn.Dropout(strength))
    model = Classifier(backbone, len(few.classes)).to(device)
    augment = None
    if arm == "augmented":
        augment = augmentation(**{kind: strength * most for kind, most in RANGES.items()})
    data = batches(
        few,
        model.transform,
        size=32,
        steps=max(1, steps // 10),
        augment=augment,
        seed=seed,
        device=device,
    )
    rate = strength if arm in RATES else RECIPES[net]["plain"]
    decay = strength if arm == "decay" else 0.01
    steady = arm in ("steady", "wrong labels")  # a rate that does not fall, to stop at any time
    history = fit(
        model,
        data,
        epochs=min(10, steps),
        optimizer=adamw(rate, max(rate, 1e-2), weight_decay=decay),
        schedule=constant if steady else None,
        validate=partial(accuracy, split=valid) if steady else None,
        patience=patience,
    )
    return model, few, history


# %% tags=["search"]
STRENGTHS = {
    "plain": (3e-3, 1e-2, 3e-2),  # learning rate
    "narrow": (0.75, 0.5, 0.25),  # share of the channels
    "decay": (1.0, 3.0, 10.0),  # weight decay
    "dropout": (0.2, 0.5, 0.8),  # share of the features that is left out
    "augmented": (0.5, 1.0, 1.5),  # times the ranges
    "steady": (1e-3, 3e-3, 1e-2),  # learning rate
}
GRID = {
    "net": NETS,
    "arm": tuple(STRENGTHS),
    "strength": (0, 1, 2),  # which of the three
    "seed": (900,),  # never used for a result
}


def validation_accuracy(net, arm, strength, seed):
    """What one strength of one remedy is worth, on validation pictures."""
    return accuracy(train_arm(net, arm, seed, STRENGTHS[arm][strength])[0], valid)


# %% [markdown]
# **Predict.** Which remedy shrinks the gap most? Which gives the best network? Is it the same one?

# %%
runs = {"plain": ("plain", STEPS), "a quarter": ("plain", STEPS // 4), "more": ("more", STEPS)}
live, gap = {}, {}
for name, (arm, steps) in runs.items():
    model, learned, _ = train_arm(NET, arm, SEED, steps=max(1, steps), labels=LABELS)
    live[name] = hits(model, test).numpy()
    gap[name] = accuracy(model, learned) - live[name]
    print(f"{name:9} own pictures {accuracy(model, learned):.3f}, test {live[name].mean():.3f}")
claims(
    "Stopping after a quarter of the steps makes the gap smaller",
    compare([gap["a quarter"]], [gap["plain"]], [SEED]),
    rule="high < 0",
)

# %% [markdown]
# The smallest gap belongs to the network that was stopped after a quarter of the steps: it does not know even its own pictures.
# Whether more labels helped *here* depends on the seed: so few steps cannot use them up. That was one seed, to have it before
# your eyes. Now ten seeds, both networks, all the steps, and the whole list:

# %% tags=["evidence"]
BACKBONES = ("resnet_near", "vgg_near")
PATIENCE = 3


def remedies(net, seed):
    """Accuracy on the pictures learned from, and test hits, under every remedy."""
    stops = {"steady": "stopped", "wrong labels": "wrong labels, stopped"}
    runs = [(arm, arm, None) for arm in RECIPES[net]]
    runs += [(arm, name, PATIENCE) for arm, name in stops.items()]
    for arm, name, patience in runs:
        model, few, history = train_arm(net, arm, seed, patience=patience)
        yield {
            "arm": name,
            "step": len(history),
            "train": accuracy(model, few),
            "hits": hits(model, test).numpy(),
        }


PARTS = {
    "scatter": scatter,
    "searches": searches,
    "lies": lies,
    "chance": chance,
    "remedies": remedies,
}


def experiment(seed):
    """Everything that this lesson measures, for both networks."""
    for net in NETS:
        for part, measured in PARTS.items():
            for row in measured(net, seed):
                yield {"part": part, "net": net} | row


def hits_of(table, net, arm):
    """Test hits of a network under one remedy, by seed, and the seeds."""
    rows = table[
        (table["part"] == "remedies") & (table["net"] == net) & (table["arm"] == arm)
    ].sort_values("seed")
    return [unpack_hits(text, 1000) for text in rows["hits"]], rows["seed"].tolist()


def gap_of(table, net, arm):
    """Accuracy on the pictures learned from minus each test hit, by seed, and the seeds."""
    known = values_of(table, "remedies", net, arm, column="train")[0]
    found, seeds = hits_of(table, net, arm)
    return [own - hit for own, hit in zip(known, found, strict=True)], seeds


# %% tags=["evidence"]
def stored_claims(table, claim):
    """What ten seeds say."""

    def of(net, *where, **column):
        return values_of(table, where[0], net, *where[1:], **column)

    def over(one, other):
        return compare(one[0], *other)

    def gained(arm, other, nets=NETS):
        """Test accuracy of one remedy over another, in the mean over networks."""
        ours, others = (
            np.mean([hits_of(table, net, one)[0] for net in nets], axis=0)
            for one in (arm, other)
        )
        return compare(list(ours), list(others), hits_of(table, nets[0], arm)[1])

    for net, name in (("vgg", "VGG"), ("resnet", "ResNet")):
        folds = [of(net, "scatter", arm) for arm in ("one fold", "all folds")]
        scored = {arm: of(net, "searches", arm, AFTER[-1]) for arm in SEARCHES}
        tested = {arm: of(net, "searches", f"{arm}, tested") for arm in SEARCHES}
        lie = {size: of(net, "lies", f"{size} pictures", 100) for size in SIZES}
        kept = [
            of(net, "lies", arm, COUNTS[-1], column="fresh")
            for arm in (f"{SIZES[-1]} pictures", "validation")
        ]
        for text, found, rule in (
            ("the score on one fold is further off than on all", over(*folds), "low > 0"),
            (
                "after 32 tries Optuna has a better score than random search",
                over(scored["Optuna"], scored["random"]),
                "low > 0",
            ),
            (
                "on test pictures the two choices are within three points",
                over(tested["Optuna"], tested["random"]),
                "low > -0.03 and high < 0.03",
            ),
            (
                "the best of 100 on 50 test pictures promises over three points too much",
                estimate(*lie[50]),
                "low > 0.03",
            ),
            (
                "on 500 test pictures the lie is over two points smaller",
                over(lie[50], lie[500]),
                "low > 0.02",
            ),
            ("on 500 test pictures it still promises too much", estimate(*lie[500]), "low > 0"),
            (
                "choosing on the test changes what is kept by less than two points",
                over(*kept),
                "low > -0.02 and high < 0.02",
            ),
            (
                "features chosen before the folds promise over twice chance on dealt labels",
                estimate(*of(net, "chance", "selected_outside")),
                "low > 0.2",
            ),
            (
                "chosen inside the folds, they promise about chance",
                estimate(*of(net, "chance", "selected_inside")),
                "high < 0.15",
            ),
            (
                "from scratch, five times the labels gain over four points",
                gained("more", "plain", [net]),
                "low > 0.04",
            ),
            (
                "with wrong labels, early stopping gains",
                gained("wrong labels, stopped", "wrong labels", [net]),
                "low > 0",
            ),
        ):
            claim(f"{name}: {text}", found, rule=rule, origin="stored")
    for text, found, rule in (
        ("weight decay gains", gained("decay", "plain"), "low > 0"),
        (
            "fewer parameters bring no gain of two points",
            gained("narrow", "plain"),
            "high < 0.02",
        ),
        (
            "dropout brings no gain of three points",
            gained("dropout", "plain"),
            "high < 0.03",
        ),
        (
            "with right labels, early stopping brings no gain of five points",
            gained("stopped", "steady"),
            "high < 0.05",
        ),
    ):
        claim(f"Both networks, from scratch: {text}", found, rule=rule, origin="stored")


# %%
REMEDIES = ("narrow", "decay", "dropout", "augmented", "more")
names = {gap_of: "gap", hits_of: "test accuracy"}
figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True, layout="constrained")
for axis, net in zip(axes, NETS, strict=True):
    for shift, what, colour in ((0.12, gap_of, "orange"), (-0.12, hits_of, "blue")):
        for height, arm in enumerate(reversed(REMEDIES)):
            point = compare(what(table, net, arm)[0], *what(table, net, "plain"))
            low, value, high = (100 * x for x in (point.low, point.value, point.high))
            axis.plot([low, high], [height + shift] * 2, color=COLOURS[colour])
            label = names[what] if height == 0 and net == NETS[0] else None
            axis.plot(value, height + shift, "o", color=COLOURS[colour], label=label)
    axis.axvline(0, color=COLOURS["black"], linewidth=0.8)
    axis.set(title=net, xlabel="points over plain", yticks=range(len(REMEDIES)))
    axis.set_yticklabels(reversed(REMEDIES))
figure.legend(loc="outside lower center", ncols=2)
show(
    figure,
    alt="For each remedy the change of the gap and of test accuracy, with intervals, for both networks.",
)
rows = []
for net in NETS:
    for arm in ("plain", *REMEDIES):
        own = np.mean(values_of(table, "remedies", net, arm, column="train")[0])
        others = estimate(*hits_of(table, net, arm)).value
        rows.append([net, arm, RECIPES[net][arm], own, others, own - others])
columns = ["network", "remedy", "knob", "own pictures", "test pictures", "gap"]
show_table(pd.DataFrame(rows, columns=columns).round(3))

# %% [markdown]
# **Explain.** Look at the column *own pictures* first. Every network knows nearly all of its pictures by heart, whatever the remedy. So the gap is
# just what test accuracy lacks. It shrinks where the network gets better, and tells us nothing that test accuracy did not. And where it does tell
# something else, as above, it misleads. So do not ask "does my network overfit?" Ask "what makes it better on others' pictures?" The list, one by
# one:
#
# - *More data* is far ahead, on both networks.
# - *Weight decay* helps, by some points. Mind that the knob that was found is a hundred times AdamW's usual one.
# - *Fewer parameters* do not help. A narrower network knows its pictures by heart as well, and others no better (Zhang et al. 2017).
# - *Dropout* makes no difference that we can tell.
# - *Augmentation* is a surprise: VGG loses by it, and for ResNet we cannot tell. Its three tries were scored on validation pictures, which stand
#   on the photographs of training; the test stands on others. And all remedies got the same few steps. Lesson 02 gave a ResNet more of them, and
#   there turns helped. Which of the two it is, this table does not say.
#
# In this world, that is, and with so many steps. The way to find out for yours is this section: three tries a remedy, on validation pictures.
#
# ### Stop early?
#
# One answer is missing. **Early stopping** scores the network on validation pictures after every epoch. When so many epochs in a row bring no better
# score (the **patience**), training ends, and the weights of the best epoch are put back. `fit` has it: `validate=partial(accuracy, split=valid), patience=3`.
#
# It needs a rate that does not fall, so that one can stop at any time. We try it twice: from scratch, and on a pretrained network whose
# labels are wrong for three pictures in ten. Nothing else tells a network which labels to believe.
#
# **Predict.** In which of the two will stopping help?

# %%
if PROFILE == "embedded":
    _, _, history = train_arm(NET, "wrong labels", SEED, steps=STEPS, labels=LABELS)
    figure, axes = plt.subplots(1, 2, figsize=(8, 2.6), layout="constrained")
    axes[0].plot(history["epoch"], history["cross_entropy"], "o-", color=COLOURS["orange"])
    axes[0].set(xlabel="epoch", ylabel="training loss", ylim=(0, None))
    axes[1].plot(history["epoch"], history["validation"], "o-", color=COLOURS["blue"])
    axes[1].set(xlabel="epoch", ylabel="validation accuracy")
    show(
        figure,
        alt="Training loss falls to zero; validation accuracy is best early, then falls.",
    )
for net in NETS:
    for arm, stopped in (("steady", "stopped"), ("wrong labels", "wrong labels, stopped")):
        gained = compare(hits_of(table, net, stopped)[0], *hits_of(table, net, arm))
        epochs = np.mean(values_of(table, "remedies", net, stopped, column="step")[0])
        print(f"{net:6} {arm:12} stopped after {epochs:.1f} epochs of 10: {gained}")

# %% [markdown]
# **Explain.** With right labels there is nothing to stop for: once the pictures are known by heart, validation accuracy stays where it is, and stopping
# only picks one of its wobbles. With wrong labels it is another matter. What the labels have in common is learned first, and that is right; the
# wrong ones can only be learned by heart, and that comes later. Who stops in between has the better network, and is done in less than half of
# the epochs.
#
# It needs validation pictures, though, and with right labels. Where those are scarce, ask whether they would not teach more than they can choose.

# %%
stored_claims(table, claims)

# %% [markdown]
# ## Exercises
#
# ### 06.1 · Cross-validate
#
# Write it yourself. You get the folds, as lists of held-out indices, and a function `fit_predict` that learns from one table and says the
# classes of another (it standardises by itself). Return the *mean of the folds' accuracies*. If a fold holds out every picture of a class,
# the rest cannot teach it: raise `ValueError`.


# %% tags=["exercise-06.1"]
def my_cross_validate(features, labels, folds, fit_predict):
    """features: float tensor (n, width); labels: int tensor (n,); folds: a list of int tensors, the indices held out.

    fit_predict(train_features, train_labels, new_features) gives the classes of the new rows, int (m,).
    Returns a float in [0, 1]. Raises ValueError where a rest lacks a class.
    """
    # <solution>
    scores = []
    for held_out in folds:
        rest = torch.ones(len(labels), dtype=torch.bool)
        rest[held_out] = False
        if len(labels[rest].unique()) < len(labels.unique()):
            raise ValueError("a class is held out whole: nothing is left to learn it from")
        found = fit_predict(features[rest], labels[rest], features[held_out])
        scores.append((found == labels[held_out]).float().mean().item())
    return sum(scores) / len(scores)
    # <stub>
    # return ...
    # </stub>


# %% tags=["check-06.1", "nbval-check-output"]
check("06.1", my_cross_validate)

# %% [markdown]
# ### 06.2 · Stratified folds
#
# Now make the folds. Deal each class out evenly: its numbers in any two folds differ by one at most. Each picture is held out once. The seed shuffles. If a
# class has fewer pictures than there are folds, raise `ValueError`: a fold would lack it, or be empty.


# %% tags=["exercise-06.2"]
def my_folds(labels, count, seed):
    """labels: int tensor (n,). Returns a list of `count` int tensors: the indices that each fold holds out."""
    # <solution>
    generator, folds = torch.Generator().manual_seed(seed), [[] for _ in range(count)]
    for number in labels.unique():
        members = (labels == number).nonzero().flatten()
        if len(members) < count:
            raise ValueError(f"class {number} has {len(members)} pictures for {count} folds")
        order = members[torch.randperm(len(members), generator=generator)]
        for place, index in enumerate(order.tolist()):
            folds[place % count].append(index)
    return [torch.tensor(fold) for fold in folds]
    # <stub>
    # return ...
    # </stub>


# %% tags=["check-06.2", "nbval-check-output"]
check("06.2", my_folds)

# %% [markdown]
# ### 06.3 · Random search
#
# One knob, `budget` tries. Draw its values between `low` and `high` so that every power of ten is as likely as the next. Call `score` once for
# each. Return the best value and its score. The same seed must try the same values.


# %% tags=["exercise-06.3"]
def my_random_search(score, low, high, budget, seed):
    """score: takes one float, gives one float, higher is better; 0 < low < high.

    Returns (value, score of it).
    """
    # <solution>
    rng = np.random.default_rng(seed)
    values = np.exp(rng.uniform(np.log(low), np.log(high), budget))
    scores = [score(value) for value in values]
    best = int(np.argmax(scores))
    return values[best], scores[best]
    # <stub>
    # return ...
    # </stub>


# %% tags=["check-06.3", "nbval-check-output"]
check("06.3", my_random_search)

# %% [markdown]
# ### 06.4 · Early stopping
#
# You get the validation score of every epoch, as they would come if nobody stopped. Training ends after the first epoch at which
# `patience` epochs in a row have brought no *better* score than the best so far. Which epoch's weights are kept, and how many epochs were
# trained? Both count from 1. What comes after the end has never happened.


# %% tags=["exercise-06.4"]
def my_stop(scores, patience):
    """scores: a list of floats, one an epoch, higher is better. Returns (epoch kept, epochs trained)."""
    # <solution>
    kept = 1
    for epoch, score in enumerate(scores, start=1):
        if score > scores[kept - 1]:
            kept = epoch
        if epoch - kept == patience:
            return kept, epoch
    return kept, len(scores)
    # <stub>
    # return ...
    # </stub>


# %% tags=["check-06.4", "nbval-check-output"]
check("06.4", my_stop)

# %% [markdown]
# ## The claims of this lesson

# %%
held = claims.table()
show_table(held[["claim", "value", "low", "high", "n", "rule", "holds", "origin"]].round(3))

# %% [markdown]
# ## Further reading
#
# - Kohavi (1995), *A study of cross-validation and bootstrap for accuracy estimation and model selection.*
# - Ambroise and McLachlan (2002), *Selection bias in gene extraction on the basis of microarray gene-expression data.* Choosing before the folds.
# - Cawley and Talbot (2010), *On over-fitting in model selection and subsequent selection bias in performance evaluation.*
# - Bergstra and Bengio (2012), *Random search for hyper-parameter optimization.* And Akiba et al. (2019), *Optuna: a next-generation
#   hyperparameter optimization framework.*
# - Dwork et al. (2015), *The reusable holdout: preserving validity in adaptive data analysis.* How to open a test set more than once.
# - Zhang et al. (2017), *Understanding deep learning requires rethinking generalization.* Networks that learn random labels by heart.
# - Recht et al. (2019), *Do ImageNet classifiers generalize to ImageNet?* A fresh test set for a task on which the world has chosen for years.
#
# **Next:** lesson 07 fuses the features of two networks.
