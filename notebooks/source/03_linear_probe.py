# %% [markdown]
# ## The question
#
# A pretrained backbone turns a picture into a row of numbers, its features: 128 of them in the embedded world. Suppose you may not
# change the backbone at all. You may only draw straight lines between the rows that come out. How far does that get you, and how
# long does it take?
#
# Below, pictures go in on the left: six of one class, then six of another. What comes out stands beside each, a cell for each
# number, the brighter the larger. Which stripes would you go by, to tell the two classes apart?

# %% tags=["parameters"]
PROFILE: str = "embedded"  # [embedded | imagenet] the world; the second needs a network
SEED: int = 0  # moves the few-shot subset, the head, the order and the augmentation
DEVICE: str = "auto"  # [auto | cpu | cuda | mps] where to compute
OUT: str = "../build/03"  # where results go
NET: str = "vgg"  # [resnet | vgg] the backbone of the live runs
LABELS: int = 20  # labels a class
EPOCHS: int = 30  # passes over the labelled pictures by hand (imagenet without a GPU: take 2)

# %% tags=["setup"]
import hashlib
import time
from functools import cache
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from sklearn.manifold import TSNE
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from course_utils.backbones import Classifier, load_backbone
from course_utils.data import Split, augmentation, batches, few_shot, load_target
from course_utils.evaluate import hits, predict
from course_utils.evidence import Claims, Estimate, compare, estimate, stored, unpack_hits
from course_utils.exercises import check, hint, solution  # noqa: F401
from course_utils.features import CacheError, cached_features, stage_features
from course_utils.plots import COLOURS, chooser, show, show_table
from course_utils.profile import get_profile, pick_device
from course_utils.training import adamw, fit, unfreeze_top

profile = get_profile(PROFILE)
device = pick_device(DEVICE)
claims = Claims("03_linear_probe", OUT)
train, valid, test = (load_target(profile, split) for split in ("train", "valid", "test"))
few = few_shot(train, LABELS, seed=SEED)

# %%
backbone = load_backbone(profile.backbones[NET]).to(device)
two = [i for number in (0, 1) for i in (few.labels == number).nonzero().flatten()[:6].tolist()]
figure, (left, right) = plt.subplots(
    1, 2, figsize=(8, 4.4), width_ratios=(1, 12), layout="constrained"
)
shown = torch.stack([backbone.transform(few[i][0]) for i in two])  # as the backbone gets them
shown = ((shown - shown.min()) / (shown.max() - shown.min())).permute(0, 2, 3, 1)
left.imshow(shown.flatten(0, 1))  # one below the other
left.set_axis_off()
right.imshow(predict(backbone, few.subset(two)), aspect="auto", cmap="cividis")
right.axhline(len(two) / 2 - 0.5, color=COLOURS["orange"])
right.set(xlabel="feature", yticks=[])
show(
    figure, alt="Pictures of two classes, and their features as rows of bright and dark cells."
)

# %% [markdown]
# ## A probe by hand
#
# **Freezing** a network means two things. No weight of it learns. And nothing in it changes when pictures go through: batch
# norm keeps the means and variances of its pretraining, and dropout is off. The second is forgotten often; lesson 04 shows what
# that does.
#
# A **linear probe** is a frozen backbone with a linear head. Only the head learns: one weight for every feature and class, and one
# more number a class. Here is all of it in plain PyTorch.


# %% tags=["by-hand"]
def freeze(network):
    """Nothing in a network learns, and nothing in it changes when pictures go through."""
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    return network.eval()


def train_head(head, data, epochs, lr):
    """Train a linear head. data(epoch): batches of features (n, width) and labels (n,)."""
    optimizer = torch.optim.AdamW(head.parameters(), lr=lr, weight_decay=0.01)
    for epoch in range(epochs):
        for features, labels in data(epoch):
            loss = F.cross_entropy(head(features), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


# %% [markdown]
# The usual way sends every batch through the backbone, in every epoch. But a frozen backbone gives the same features for the same
# picture, every time. So we may compute them once, and train the head on what we kept: a **feature cache**.
#
# **Predict.** Does the head end with the same weights? How much sooner is it trained?


# %%
def order(epoch):
    """The indices of each batch of an epoch."""
    return torch.randperm(len(few), generator=torch.Generator().manual_seed(epoch)).split(32)


def usual(epoch):
    """Batches whose pictures go through the backbone now."""
    for chosen in order(epoch):
        pictures = torch.stack([backbone.transform(few[i][0]) for i in chosen.tolist()])
        yield backbone(pictures.to(device)), few.labels[chosen].to(device)


def from_cache(epoch):
    """The same batches, of features that were computed before."""
    for chosen in order(epoch):
        yield features[chosen].to(device), few.labels[chosen].to(device)


def new_head():
    """An untrained head, the same at every call."""
    torch.manual_seed(SEED)
    return torch.nn.Linear(backbone.width, len(few.classes)).to(device)


freeze(backbone)
seconds, heads = {}, {}
for way, data in {"usual": usual, "cached": from_cache}.items():
    began, heads[way] = time.perf_counter(), new_head()
    if way == "cached":
        features = predict(backbone, few)  # each picture once
    train_head(heads[way], data, EPOCHS, lr=1e-2)
    seconds[way] = time.perf_counter() - began
print(f"the usual way takes {seconds['usual'] / seconds['cached']:.0f} times as long")
furthest = (heads["usual"].weight - heads["cached"].weight).abs().max().item()
claims(
    "A head trained on cached features ends with the weights of one trained the usual way",
    Estimate(furthest, furthest, furthest, (SEED,), "weight"),
    rule="value < 0.001",
)

# %% [markdown]
# **Explain.** The heads are the same, up to the last digits of floating-point arithmetic. (The largest difference between two of their
# weights is the value above.) So from here on, features are computed once, and a probe is a matter of a moment. That changes what you
# can afford: many seeds, many settings, many layers. A factor from one run is a rough one; `make bench` measures it with care.
#
# In the package, `fit` with `unfreeze_top(model, 0)` trains a probe the usual way, and `cached_features` keeps features in a file.
#
# ## It is logistic regression
#
# A linear layer, a softmax, and cross-entropy: statisticians have called this **logistic regression** for decades. A penalty on large
# weights is added to the loss, as weight decay does. This sum has one minimum, so any method that gets there gives the same answer.
# scikit-learn's needs no learning rate and no epochs. It has one knob: `C`. The larger `C` is, the smaller the penalty.
#
# One thing before. Features differ in size: some move between 0 and 3, others between 0 and .1. A method that takes equal steps in all of
# them is slow, and a penalty on weights weighs on the small ones most. **Standardising** subtracts each feature's mean and divides by its
# standard deviation. Both are measured on *training* pictures, and on no others.
#
# **Predict.** Two ways to a head: the loop above, and this. On how many test pictures out of a hundred will they agree?


# %% tags=["evidence"]
def probe(C=0.1):
    """Standardise, then logistic regression."""
    return make_pipeline(StandardScaler(), LogisticRegression(C=C, max_iter=1000))


# %%
low, high = features.std(dim=0).quantile(torch.tensor([0.1, 0.9]))
print(f"standard deviation of a feature: {low:.2f} to {high:.2f} for eight in ten of them")
test_features, test_labels = predict(backbone, test), test.labels.numpy()
regression = probe().fit(features, few.labels)
with torch.inference_mode():
    by_hand = heads["cached"](test_features.to(device)).argmax(dim=1).cpu().numpy()
found = {"head by hand": by_hand, "logistic regression": regression.predict(test_features)}
for name, predicted in found.items():
    print(f"{name:20} {estimate([predicted == test_labels], [SEED])}")
agree = np.mean(found["head by hand"] == found["logistic regression"])
print(f"they give the same answer for {agree:.0%} of the test pictures")
claims(
    "A head trained by hand and logistic regression differ by less than five points",
    compare(*([found[name] == test_labels] for name in found), [SEED]),
    rule="low > -0.05 and high < 0.05",
)

# %% [markdown]
# **Explain.** Nearly the same answers. Where they differ, the head by hand has not quite arrived at the minimum, or its penalty is a
# little larger or smaller. From now on the probe is scikit-learn's.
#
# ## Where to read
#
# The usual place to read features is the end of the backbone, its *output*. But the last layers were made for the *source* task: 52
# letters, or ImageNet's classes. Maybe the layers before are of more use to us? On its way a picture becomes **feature maps**, which
# show where something was found, and get smaller from time to time. The layers that work at one size are a **stage**. We read after
# each stage, averaging every map over its pixels.
#
# PyTorch lets us look on: a **hook** is a function that it calls when a layer has run, with what came out. `stage_features` sets one
# after each stage. The function below does the same for any layer, by its name, and says which there are if you name one that is not
# there.


# %% tags=["layer"]
def layer_features(backbone, pictures, name):
    """What stands after the layer of that name: maps averaged over their pixels, (n, channels)."""
    layers = dict(backbone.layers.named_modules())
    if name not in layers:
        there = ", ".join(repr(other) for other, _ in backbone.layers.named_children())
        raise ValueError(f"there is no layer {name!r}, but {there}, and those within them")
    found = []

    def keep(module, inputs, maps):  # averaged here: the next layer may write into the maps
        found.append(maps.flatten(2).mean(dim=2).cpu() if maps.dim() == 4 else maps.cpu())

    hook = layers[name].register_forward_hook(keep)
    try:
        predict(backbone, pictures)
    finally:
        hook.remove()
    if sum(map(len, found)) != len(pictures):
        raise ValueError(f"{name!r} runs more than once: read after the block around it")
    return torch.cat(found).float()


# %%
some = few.subset(range(5))
for name in [name for name, _ in backbone.layers.named_modules() if name][:4]:
    print(f"{name:12} {tuple(layer_features(backbone, some, name).shape)}")

# %% [markdown]
# **Predict.** After which stage does a probe classify best? Is it the last?

# %% tags=["evidence"]
NETS = ("vgg", "resnet")
PLACES = ("stage 1", "stage 2", "stage 3", "stage 4", "output")
C_AT = {
    "vgg": {"stage 1": 10.0, "stage 2": 1.0, "stage 3": 0.1, "stage 4": 0.1, "output": 0.1},
    "resnet": {"stage 1": 1.0, "stage 2": 10.0, "stage 3": 0.1, "stage 4": 0.1, "output": 0.1},
}


@cache
def read_at(net, place, split):
    """Features (n, channels) of a whole split of the embedded world's target, from near letters."""
    backbone = load_backbone(f"{net}_near").to(device)
    pictures = {"train": train, "valid": valid, "test": test}[split]
    if place == "output":
        return predict(backbone, pictures)
    return stage_features(backbone, pictures)[PLACES.index(place)]


def few_of(seed, labels=20):
    """The indices of a few-shot subset of the training pictures, and their labels."""
    numbers = Split(
        torch.arange(len(train)), train.labels, train.classes
    )  # in place of pictures
    chosen = few_shot(numbers, labels, seed)
    return chosen.pictures, chosen.labels


def probed(net, place, seed, split, C=None, scaled=True):
    """Which pictures of a split a probe gets right that read at one place and learned from 20 labels a class."""
    chosen, labels = few_of(seed)
    model = probe(C or C_AT[net][place])
    if not scaled:
        model = model[-1]  # without the scaler
    model.fit(read_at(net, place, "train")[chosen], labels)
    pictures = {"valid": valid, "test": test}[split]
    return model.predict(read_at(net, place, split)) == pictures.labels.numpy()


# %% tags=["search"]
GRID = {
    "net": NETS,
    "place": PLACES,
    "C": (0.001, 0.01, 0.1, 1.0, 10.0, 100.0),
    "seed": (900, 901, 902, 903, 904),  # never used for a result
}


def validation_accuracy(net, place, C, seed):
    """What one setting of the search is worth, on validation pictures."""
    return float(probed(net, place, seed, "valid", C).mean())


# %%
def tsne(features):
    """Two numbers a picture, (n, 2), that keep neighbours together (van der Maaten and Hinton 2008)."""
    near = min(20, len(features) // 4)  # how many neighbours count as close
    return TSNE(init="pca", perplexity=near, max_iter=500, random_state=0).fit_transform(
        features
    )


ours = valid.subset(np.random.default_rng(SEED).permutation(len(valid))[:300])
at = [*stage_features(backbone, ours), predict(backbone, ours)]
places = [f"stage {number}" for number in range(1, len(at))] + ["output"]
flat = {place: tsne(read.numpy()) for place, read in zip(places, at, strict=True)}


def map_at(place):
    """The pictures as the numbers of their classes, close together where their features are alike."""
    figure, axis = plt.subplots(figsize=(4.5, 3.6), layout="constrained")
    palette = list(COLOURS.values())
    for number in range(min(10, len(ours.classes))):
        points = flat[place][ours.labels == number]
        axis.scatter(*points.T, marker=f"${number}$", color=palette[number % 6], linewidths=0.3)
    axis.set(xticks=[], yticks=[], title=place)
    return figure


show(
    map_at("output"),
    alt="A map of pictures by their features: digits of a class lie in clusters at the output.",
)
chooser("read at", places, map_at)

# %% [markdown]
# Move the slider to the first stage and back. A map by **t-SNE** keeps neighbours together and nothing else: distances between clusters, their
# sizes and the axes mean nothing. (A figure stands for a picture, and says its class; at most ten classes are drawn.)
#
# So look at the neighbours themselves. Here is one picture, and beside it those whose features point in the most similar direction
# (lesson 01), one row for each place at which we may read.

# %%
nearest = {}
for place, read in zip(places, at, strict=True):
    directions = F.normalize(read - read.mean(dim=0), dim=1)
    likeness = (directions @ directions.T).fill_diagonal_(-2)  # no picture is its own neighbour
    nearest[place] = likeness.argsort(dim=1, descending=True)

figure, axes = plt.subplots(
    len(places), 8, figsize=(7, 0.9 * len(places)), layout="constrained"
)
for row, place in zip(axes, places, strict=True):
    row[0].set_ylabel(place, fontsize=8)
    for axis, index in zip(row, [0, *nearest[place][0, :7].tolist()], strict=True):
        axis.imshow(ours[index][0].permute(1, 2, 0))
        axis.set(xticks=[], yticks=[])
        if ours.labels[index] == ours.labels[0]:
            axis.spines[:].set(color=COLOURS["orange"], linewidth=3)
show(
    figure,
    alt="A picture and its nearest neighbours, one row for each place; those of its class are framed.",
)
learned_from = [*stage_features(backbone, few), features]
for place, known, asked in zip(places, learned_from, at, strict=True):
    searched = C_AT[NET] if PROFILE == "embedded" else {}
    regression = probe(searched.get(place, 0.1)).fit(known, few.labels)
    score = estimate([regression.predict(asked) == ours.labels.numpy()], [SEED])
    same = (ours.labels[nearest[place][:, 0]] == ours.labels).float().mean()
    print(f"{place:8} nearest neighbour of the same class: {same:4.0%}   probe: {score}")

# %% [markdown]
# **Explain.** The first column is the picture itself, and an orange frame says: of its class. Early neighbours share its colours and its
# background, late ones what it shows. Under the pictures you read how many of the validation pictures have a nearest neighbour of their
# own class, and how many a probe gets right that reads at this place. Both rise together.
#
# That was one seed. Now ten, both networks, each place with its own `C`, searched on validation pictures:

# %% tags=["evidence"]
BACKBONES = ("resnet_near", "vgg_near")
RECIPES = C_AT
TWO_POINTS = "low > -0.02 and high < 0.02"
COPIES = 4  # changed copies of each picture in a cache


@torch.inference_mode()
def with_copies(net, seed):
    """Features and labels of the few pictures and of changed copies of each: frozen augmentation."""
    backbone, few = load_backbone(f"{net}_near").to(device).eval(), few_shot(train, 20, seed)
    shown = backbone.transform(few.pictures.to(device))
    augment, generator = augmentation(), torch.Generator().manual_seed(seed)
    parts = [shown, *(augment(shown, generator) for _ in range(COPIES))]
    found = torch.cat([backbone(part).cpu() for part in parts])
    return found, few.labels.repeat(COPIES + 1)


def fresh(net, seed):
    """Test hits of a probe trained the usual way, its pictures changed anew in every epoch."""
    torch.manual_seed(seed)
    few = few_shot(train, 20, seed)
    model = Classifier(load_backbone(f"{net}_near"), len(few.classes)).to(device)
    data = batches(
        few,
        model.transform,
        size=32,
        steps=300,
        augment=augmentation(),
        seed=seed,
        device=device,
    )
    fit(
        model, data, optimizer=adamw(1e-2), unfreeze=lambda model, epoch: unfreeze_top(model, 0)
    )
    return hits(model, test).numpy()


def experiment(seed):
    """Validation accuracy and test hits of probes at each place, and at the output with augmentation."""
    for net in NETS:
        for place in PLACES:
            scores = {
                "valid": probed(net, place, seed, "valid").mean(),
                "hits": probed(net, place, seed, "test"),
            }
            yield {"net": net, "arm": place} | scores
        yield {
            "net": net,
            "arm": "not scaled",
            "valid": None,
            "hits": probed(net, "output", seed, "test", scaled=False),
        }
        model = probe(C_AT[net]["output"] / (COPIES + 1)).fit(*with_copies(net, seed))
        found = model.predict(read_at(net, "output", "test")) == test.labels.numpy()
        yield {"net": net, "arm": "frozen copies", "valid": None, "hits": found}
        yield {"net": net, "arm": "fresh copies", "valid": None, "hits": fresh(net, seed)}


def arm_hits(table, net, arm):
    """Test hits by seed, and the seeds."""
    rows = table[(table["net"] == net) & (table["arm"] == arm)].sort_values("seed")
    return [unpack_hits(text, 1000) for text in rows["hits"]], rows["seed"].tolist()


def difference(table, net, arm, other):
    """Accuracy of one arm over another, paired by seed and picture."""
    return compare(arm_hits(table, net, arm)[0], *arm_hits(table, net, other))


def stored_claims(table, claim):
    """What ten seeds say."""
    close, no_gain = "low > -0.05 and high < 0.05", "high < 0.01"
    for net, name in (("vgg", "VGG"), ("resnet", "ResNet")):
        text = "a linear probe classifies over 85 % of the test pictures correctly"
        right = estimate(*arm_hits(table, net, "output"))
        claim(f"{name}, 20 labels a class: {text}", right, rule="low > 0.85", origin="stored")
        for text, arm, other, rule in (
            (
                "the output beats stage 2 by over thirty points",
                "output",
                "stage 2",
                "low > 0.3",
            ),
            ("stage 3 is within five points of the output", "stage 3", "output", close),
            ("not scaling changes less than two points", "not scaled", "output", TWO_POINTS),
            ("fresh augmentation brings no gain of a point", "fresh copies", "output", no_gain),
            (
                "frozen augmentation brings no gain of a point",
                "frozen copies",
                "output",
                no_gain,
            ),
        ):
            gained = difference(table, net, arm, other)
            claim(f"{name}, 20 labels a class: {text}", gained, rule=rule, origin="stored")


# %%
table = stored("03_linear_probe")
figure, axes = plt.subplots(1, 2, figsize=(8, 2.8), sharey=True, layout="constrained")
for axis, net in zip(axes, NETS, strict=True):
    points = [estimate(*arm_hits(table, net, place)) for place in PLACES]
    axis.plot(PLACES, [point.value for point in points], "o-", color=COLOURS["blue"])
    low, high = [point.low for point in points], [point.high for point in points]
    axis.fill_between(PLACES, low, high, color=COLOURS["blue"], alpha=0.15, linewidth=0)
    axis.set(title=net, xlabel="read at", ylim=(0, 1))
axes[0].set_ylabel("test accuracy of the probe")
show(
    figure,
    alt="Test accuracy of a probe by the place at which features are read, for both networks.",
)
for net in NETS:
    rows = table[(table["net"] == net) & table["arm"].isin(PLACES)]
    chosen = rows.groupby("arm")["valid"].mean().idxmax()
    score = estimate(*arm_hits(table, net, chosen))
    print(f"{net}: {chosen} is best on validation pictures; on test pictures it has {score}")

# %% [markdown]
# **Explain.** The first two stages know edges and colours, and averaged over the picture those say little about a digit. One stage
# later nearly all of it is there. The output was made for letters, and still nothing before it is better for digits: near letters are near. (After
# a ResNet's last stage comes nothing but the average, so the last two places are one.) With a source further away it can be
# otherwise. Choose the place on validation pictures, like everything else.
#
# And this answers the question at the top: nothing but straight lines, on a backbone that nobody touched, and about nine digits in
# ten are right.
#
# ## What a cache gives up
#
# Features that were computed once are always the same. So the pictures cannot be turned and moved anew in every epoch: a cache has no
# **augmentation**, or it has a *frozen* one, with a few changed copies of each picture. How much does that cost? Against it stands a probe
# trained the usual way, with fresh copies in every step.
#
# The same question for the scaler: what if we leave it out?
#
# **Predict.** Put these in order: no copies, four frozen copies, fresh copies. (The table counts from the probe with no copies.)

# %%
rows = []
for net in NETS:
    for arm in ("not scaled", "frozen copies", "fresh copies"):
        gained = difference(table, net, arm, "output")
        points = [round(100 * number, 1) for number in (gained.value, gained.low, gained.high)]
        rows.append([net, arm, *points])
columns = ["network", "probe", "points over the plain probe", "low", "high"]
show_table(pd.DataFrame(rows, columns=columns))
stored_claims(table, claims)

# %% [markdown]
# **Explain.** Here the cache gives up nothing: copies, fresh or frozen, do not help these probes. The likely reason: the backbone has met
# turns and shifts in its pretraining, and a probe has few weights, so copies teach it nothing new. (Lesson 02 saw the same when all
# layers learn from near letters.) Read a minus in the table as "no gain", and no more: the probe with fresh copies is trained by AdamW,
# for 300 steps at one rate that nobody searched, so part of its minus may be a head that has not quite arrived.
#
# And the scaler makes less than two points of difference: the standard deviations of these features, printed above, are not far apart.
# Where they are, it matters: exercise 03.3.

# %% [markdown]
# ## What goes wrong: a cache of another network
#
# A cache is a file, and files stay when networks change. Here features of the training pictures were kept last week, from *far* letters.
# Since then somebody has switched to *near*. Both networks give 128 features, so everything fits. The code runs.
#
# **Predict.** Will it do better than chance? As well as before?

# %%
kept = Path(OUT) / "features" / f"{backbone.name}_{LABELS}_{SEED}.safetensors"
kept.unlink(missing_ok=True)
other = load_backbone(
    profile.backbones[f"{NET}_far"] if PROFILE == "embedded" else backbone.name,
    PROFILE == "embedded",
)
stale = cached_features(other.to(device), few, kept)
mistaken = probe().fit(stale, few.labels).predict(test_features) == test_labels
right = found["logistic regression"] == test_labels
for name, correct in {"its own cache": right, "the other one's": mistaken}.items():
    print(f"{name:15} {estimate([correct], [SEED])}")
claims(
    "A probe that learned from another network's cache loses more than five points",
    compare([right], [mistaken], [SEED]),
    rule="low > 0.05",
)

# %% [markdown]
# In the embedded world this is worse than a crash: the number is bad, but far from chance, a tenth. Both networks were trained from the
# same random weights, and some features have kept their places. A number that is merely bad gets reported.
#
# The test that catches it computes the features of a few pictures again. It passes on what this backbone gave, and stops the mistake.


# %%
def assert_made_by(backbone, pictures, features):
    """Fail for features that are not what this backbone makes of these pictures."""
    some = list(range(min(8, len(pictures))))  # a spot check: eight pictures
    again = predict(backbone, pictures.subset(some))
    assert torch.allclose(again, features[some], atol=1e-2), "features of another backbone"


assert_made_by(backbone, few, features)
try:
    assert_made_by(backbone, few, stale)
except AssertionError as error:
    print("caught:", error)
else:
    raise RuntimeError("the test let another backbone's features pass")

# %% [markdown]
# A spot check sees what is far off, in eight pictures. `cached_features` is stricter. It notes in the file what the features were made
# from: the layers and their weights, the transform, the pictures. If one of them is another now, it refuses. In exercise 03.5 you
# write such a note.

# %%
try:
    cached_features(backbone, few, kept)
except CacheError as error:
    print("caught:", str(error).replace(str(kept), kept.name))
else:
    raise RuntimeError("a stale cache was used")
kept.unlink()
assert torch.equal(cached_features(backbone, few, kept), features)  # computed anew
assert torch.equal(cached_features(backbone, few, kept), features)  # read from the file

# %% [markdown]
# ## Exercises
#
# ### 03.1 · Freeze
#
# Write `freeze`. Afterwards, no parameter of the network gets a gradient. And no number in it moves when pictures go through: the running
# means and variances of batch norm stay what they were.


# %% tags=["exercise-03.1"]
def my_freeze(network):
    """network: a torch.nn.Module. Changes it, and returns it."""
    # <solution>
    network.requires_grad_(False)
    return network.eval()
    # <stub>
    # return ...
    # </stub>


# %% tags=["check-03.1", "nbval-check-output"]
check("03.1", my_freeze)

# %% [markdown]
# ### 03.2 · Standardise
#
# Subtract from each feature its mean, and divide by its standard deviation. Both come from the *training* features, for both tables. A
# feature that never changes in training has a standard deviation of 0: divide it by 1.


# %% tags=["exercise-03.2"]
def standardise(train_features, other_features):
    """float tensors (n, width) and (m, width). Returns both, standardised.

    The standard deviation is over n, not n - 1: torch.std(..., correction=0).
    """
    # <solution>
    mean = train_features.mean(dim=0)
    deviation = train_features.std(dim=0, correction=0)
    deviation[deviation == 0] = 1.0
    return (train_features - mean) / deviation, (other_features - mean) / deviation
    # <stub>
    # return ...
    # </stub>


# %% tags=["check-03.2", "nbval-check-output"]
check("03.2", standardise)

# %% [markdown]
# ### 03.3 · A linear probe of your own
#
# Given features and labels, find the weights of a linear head that classifies. Any way will do: a loop, or scikit-learn. The check gives
# you classes that straight lines can separate, and asks for most of the *new* points right. Mind that features may differ in size by a
# factor of a thousand.


# %% tags=["exercise-03.3"]
def my_linear_probe(features, labels, new_features):
    """features: float tensor (n, width); labels: int tensor (n,); new_features: float tensor (m, width).

    Returns the predicted classes of the new features, shape (m,).
    """
    # <solution>
    return probe(C=1.0).fit(features, labels).predict(new_features)
    # <stub>
    # return ...
    # </stub>


# %% tags=["check-03.3", "nbval-check-output"]
check("03.3", my_linear_probe)

# %% [markdown]
# ### 03.4 · Read after any layer
#
# Let pictures through a network, and return what stands after one of its layers: its maps, each averaged over its pixels. A *forward hook*
# is a function that PyTorch calls with a layer's output. Take it off again afterwards: the next one who uses the network does not want
# yours.


# %% tags=["exercise-03.4"]
def features_after(network, layer, pictures):
    """network: a torch.nn.Module; layer: one of its modules; pictures: float (n, 3, height, width).

    layer's output is float (n, channels, h, w). Returns float (n, channels).
    """
    # <solution>
    kept = []
    hook = layer.register_forward_hook(
        lambda module, inputs, output: kept.append(output.mean(dim=(2, 3)))
    )
    with torch.no_grad():
        network(pictures)
    hook.remove()
    return kept[0]
    # <stub>
    # return ...
    # </stub>


# %% tags=["check-03.4", "nbval-check-output"]
check("03.4", features_after)

# %% [markdown]
# ### 03.5 · A note against stale caches
#
# Write a text that stays the same as long as features would, and changes with whatever they follow from: any number in the network
# (batch norm's running means too), the transform, any of the pictures, their order. Then store it beside the features, and compare. Do
# not send pictures through the network: that is the cost which the cache saves. `hashlib.sha256(...).hexdigest()` makes a short text
# of many bytes. (`hash` will not do: it gives other numbers in the next session.)


# %% tags=["exercise-03.5"]
def my_note(network, transform, pictures):
    """network: a torch.nn.Module; transform: a function of pictures; pictures: uint8 (n, 3, height, width).

    Returns a str.
    """
    # <solution>
    digest = hashlib.sha256()
    for name, value in network.state_dict().items():
        digest.update(name.encode() + value.cpu().numpy().tobytes())
    digest.update(
        transform(pictures).numpy().tobytes()
    )  # the transform and the pictures at once
    return digest.hexdigest()
    # <stub>
    # return ...
    # </stub>


# %% tags=["check-03.5", "nbval-check-output"]
check("03.5", my_note)

# %% [markdown]
# ## The claims of this lesson

# %%
held = claims.table()
show_table(held[["claim", "value", "low", "high", "n", "rule", "holds", "origin"]].round(3))

# %% [markdown]
# ## Further reading
#
# - Donahue et al. (2014), *DeCAF: a deep convolutional activation feature for generic visual recognition.* Reading from layers.
# - Alain and Bengio (2017), *Understanding intermediate layers using linear classifier probes.*
# - Kornblith, Shlens, Le (2019), *Do better ImageNet models transfer better?* Sixteen networks, as fixed features and fine-tuned.
# - van der Maaten and Hinton (2008), *Visualizing data using t-SNE.* And Wattenberg, Viégas, Johnson (2016), *How to use t-SNE
#   effectively.*
#
# **Next:** lesson 04 lets the backbone learn too.
