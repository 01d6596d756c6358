# %% [markdown]
# ## The question
#
# Training goes down a slope, step by step. The **optimiser** says how a step is made from the gradient. The **schedule** says
# how the size of steps changes on the way. Which of them get there sooner?
#
# Reports on this disagree more than they should. One reason is simple: an optimiser is judged at a learning rate that suits
# another. So in this lesson nobody is. Each may choose its own rate, and each gets the same number of tries to find it.
#
# *Sooner* is measured in training pictures: what is right after a quarter of them, and what is right at the end?

# %% tags=["parameters"]
PROFILE: str = "embedded"  # [embedded | imagenet] the world; the second needs a network
SEED: int = 0  # moves the few-shot subset, the head, the order and the augmentation
DEVICE: str = "auto"  # [auto | cpu | cuda | mps] where to train
OUT: str = "../build/11"  # where results go
NET: str = "resnet"  # [resnet | vgg] the backbone of the live runs, from near letters
LABELS: int = 20  # labels a class, in the live runs
STEPS: int = 32  # training steps of a live run, four or more; stored runs take 32
SWEEP: int = 32  # training steps of a range test
PICTURES: int = 500  # test pictures of the live runs, at most 1,000


# %% tags=["setup"]
import itertools
import math
from functools import cache, partial

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F

from course_utils.backbones import Classifier, load_backbone
from course_utils.data import augmentation, batches, few_shot
from course_utils.data.digits import mnist_m
from course_utils.evaluate import hits
from course_utils.evidence import (
    Claims,
    Estimate,
    compare,
    estimate,
    stored,
    unpack_hits,
)
from course_utils.exercises import check, hint, solution  # noqa: F401
from course_utils.plots import COLOURS, chooser, show, show_table
from course_utils.profile import get_profile, pick_device
from course_utils.training import constant, fit, one_cycle

profile = get_profile(PROFILE)
device = pick_device(DEVICE)
claims = Claims("11_optimisers_and_schedules", OUT)
train, valid, test = (mnist_m(split) for split in ("train", "valid", "test"))
if PROFILE != "embedded":
    print(
        "The digits are the same in this world. Only the backbones differ; stored tables do not."
    )


# %% [markdown]
# The task is that of lesson 04: MNIST-M, 20 labels a class, a backbone from *near* letters, everything learns. But before
# networks, a surface that one can see.
#
# ## One valley, one rule
#
# Two weights make a surface. This one is a straight valley: across, it is a hundred times as steep as along. Losses of
# networks have such valleys, in more directions than two. The simplest rule is **SGD**, stochastic gradient descent: with the
# weights $w$, the gradient $g$, and the learning rate $\eta$, the next weights are $w - \eta\, g$.
#
# **Predict.** SGD walks through the valley with three rates, the largest ten times the smallest. Which is down first?


# %% tags=["surface"]
START, BOTTOM = (-3.0, 2.0), (1.0, 1.0)
CURVES = (1.0, 100.0)  # how fast the slope grows along and across
TURN = math.pi / 6  # how the valley lies: half a turn is π
RATES_2D = 10 ** torch.linspace(-3, 1, 17, dtype=torch.float64)  # four rates a decade


def point(pair):
    return torch.tensor([pair], dtype=torch.float64)


def turned(away, angle):
    """Points (n, 2), turned about (0, 0) by an angle in radians."""
    c, s = math.cos(angle), math.sin(angle)
    return away @ torch.tensor([[c, s], [-s, c]], dtype=away.dtype)


def height(points, angle=TURN):
    """The height of each point (n, 2) over the bottom of the valley."""
    away = turned(points - point(BOTTOM), -angle)
    return 0.5 * (away**2 * point(CURVES)).sum(dim=1)


def slope(points, angle=TURN):
    """The gradient of `height` at each point (n, 2)."""
    away = turned(points - point(BOTTOM), -angle)
    return turned(away * point(CURVES), angle)


def walk(rule, rates, steps=300, angle=TURN):
    """The way of a rule with each of several rates, (rates, steps + 1, 2), from a start that turns with the valley."""
    rates = torch.as_tensor(rates, dtype=torch.float64)[:, None]
    start = point(BOTTOM) + turned(point(START) - point(BOTTOM), angle)
    points, state = start.repeat(len(rates), 1), {}
    way = [points]
    for _ in range(steps):
        points = rule(points, slope(points, angle), state, rates)
        way.append(points)
    return torch.stack(way, dim=1)


def steps_down(way, angle=TURN):
    """After how many steps each way is below a thousandth of its first height for good; inf where it never is."""
    heights = height(way.flatten(0, 1), angle).reshape(way.shape[:2])
    above = ~(heights <= heights[:, :1] / 1000)  # true for nan, too
    last = above.cumsum(dim=1).argmax(dim=1) + 1.0
    return torch.where(above[:, -1], math.inf, last)


# %% tags=["by-hand"]
def sgd(weight, gradient, state, rate):
    """One step down the slope."""
    return weight - rate * gradient


# %% tags=["picture"]
def draw_way(axis, way, colour, shown=80):
    """The valley from above, a line through the first steps of one way (steps + 1, 2), and a star at the bottom."""
    x, y = np.meshgrid(np.linspace(-4, 3, 120), np.linspace(-2.5, 3.5, 120))
    ground = height(torch.as_tensor(np.stack([x.ravel(), y.ravel()], axis=1)))
    levels = 0.02 * 4.0 ** np.arange(9)
    axis.contour(x, y, ground.reshape(x.shape), levels, colors="0.8", linewidths=0.7)
    axis.plot(*way[: shown + 1].T, ".-", color=COLOURS[colour], markersize=3, linewidth=0.8)
    axis.plot(*BOTTOM, "*", color=COLOURS["black"])
    axis.set(
        xlim=(-4, 3), ylim=(-2.5, 3.5), aspect="equal", xticks=[-3, 0, 3], yticks=[-2, 0, 2]
    )


def said(steps):
    """A number of steps in words."""
    return f"{steps:.0f} steps" if math.isfinite(steps) else "not down"


# %%
three = (0.002, 0.0178, 0.02)
ways = walk(sgd, three)
figure, axes = plt.subplots(1, 3, figsize=(8.5, 2.9), layout="constrained")
for axis, rate, way, steps in zip(axes, three, ways, steps_down(ways), strict=True):
    draw_way(axis, way, "blue")
    axis.set_title(f"η = {rate:g}: {said(steps)}", fontsize=10)
    axis.set_xlabel("first weight")
axes[0].set_ylabel("second weight")
show(
    figure,
    alt="SGD in a narrow valley: with a small rate it creeps along the bottom, with a larger one it bounces and gets down, with one a little larger it bounces from side to side for ever.",
)

# %% [markdown]
# **Explain.** Across the valley, a step overshoots. With a curvature of 100 and a rate of $2/100$, each step lands as far up
# on the other side as it started, for ever. So the *steep* direction caps the rate, and the *flat* one has to live with it.
# The best rate lies just below the one that fails. Most of what follows comes from this picture.
#
# ## Six more rules
#
# They all get the weights and the gradient, as SGD does. They differ in what they keep from earlier steps: their **state**.
#
# | | what it keeps | the step |
# |---|---|---|
# | **momentum** | a velocity: $v \leftarrow 0.9\, v + g$ | $w - \eta\, v$ |
# | **Nesterov** | the same velocity | $w - \eta\, (g + 0.9\, v)$, which looks one step ahead |
# | **Adagrad** | the sum of all squares: $s \leftarrow s + g^2$ | $w - \eta\, g / \sqrt{s}$ |
# | **RMSprop** | their running mean: $s \leftarrow 0.99\, s + 0.01\, g^2$ | $w - \eta\, g / \sqrt{s}$ |
# | **Adam** | running means of $g$ and of $g^2$: $m$ and $s$ | $w - \eta\, \hat m / \sqrt{\hat s}$ |
# | **AdamW** | the same two | Adam's, after $w$ was made smaller by the share $\eta\lambda$ |
#
# A hat takes out the bias of a mean that started at 0. $\lambda$ is the **weight decay**. Squares, roots and quotients are
# taken number by number, so that *each weight has a scale of its own*. That is the idea of the last four. The first three
# have one scale for all.


# %% tags=["by-hand"]
def momentum(weight, gradient, state, rate, keep=0.9):
    """A ball that rolls: what pushed it before still counts (Polyak 1964)."""
    state["velocity"] = keep * state.get("velocity", 0) + gradient
    return weight - rate * state["velocity"]


def nesterov(weight, gradient, state, rate, keep=0.9):
    """Momentum that looks one step ahead (Nesterov 1983, as Sutskever et al. 2013 write it)."""
    state["velocity"] = keep * state.get("velocity", 0) + gradient
    return weight - rate * (gradient + keep * state["velocity"])


def adagrad(weight, gradient, state, rate, tiny=1e-10):
    """Each number is divided by the root of all its squares so far (Duchi et al. 2011)."""
    state["squares"] = state.get("squares", 0) + gradient**2
    return weight - rate * gradient / (state["squares"].sqrt() + tiny)


def rmsprop(weight, gradient, state, rate, keep=0.99, tiny=1e-8):
    """As Adagrad, but squares of long ago are forgotten (Tieleman and Hinton 2012)."""
    state["squares"] = keep * state.get("squares", 0) + (1 - keep) * gradient**2
    return weight - rate * gradient / (state["squares"].sqrt() + tiny)


def adam(weight, gradient, state, rate, keep=(0.9, 0.999), tiny=1e-8):
    """RMSprop of a running mean, both without the bias of their start (Kingma and Ba 2015)."""
    state["steps"] = state.get("steps", 0) + 1
    state["mean"] = keep[0] * state.get("mean", 0) + (1 - keep[0]) * gradient
    state["squares"] = keep[1] * state.get("squares", 0) + (1 - keep[1]) * gradient**2
    mean = state["mean"] / (1 - keep[0] ** state["steps"])
    squares = state["squares"] / (1 - keep[1] ** state["steps"])
    return weight - rate * mean / (squares.sqrt() + tiny)


def adamw(weight, gradient, state, rate, decay=0.01):
    """Adam, after every weight has lost the same share of itself (Loshchilov and Hutter 2019)."""
    return adam(weight * (1 - rate * decay), gradient, state, rate)


RULES = {
    "SGD": sgd,
    "momentum": momentum,
    "Nesterov": nesterov,
    "Adagrad": adagrad,
    "RMSprop": rmsprop,
    "Adam": adam,
    "AdamW": adamw,
}

# %% [markdown]
# (`tiny` keeps quotients finite. A test of this lesson holds each rule against `torch.optim`, weight by weight, over many
# steps.)
#
# Now all seven walk through the same valley. Each has a rate of its own: of the same seventeen, the one with which it is down
# for good in the fewest steps. "Down" is a thousandth of the height at the start.
#
# **Predict.** Which rule needs the fewest steps? How far apart do the best rates lie?

# %% tags=["picture"]
STYLES = {
    "SGD": ("black", "-"),
    "momentum": ("blue", "-"),
    "Nesterov": ("sky", "-"),
    "Adagrad": ("green", "-"),
    "RMSprop": ("orange", "-"),
    "Adam": ("red", "-"),
    "AdamW": ("red", "--"),
}


@cache
def best_of(name, angle=TURN):
    """The best of the seventeen rates for one rule, the way that it takes, and its steps."""
    ways = walk(RULES[name], RATES_2D, angle=angle)
    steps = steps_down(ways, angle)
    best = int(steps.argmin())
    return float(RATES_2D[best]), ways[best], float(steps[best])


# %%
figure, axes = plt.subplots(2, 4, figsize=(9.5, 5), layout="constrained")
for axis, name in zip(axes.flat, RULES, strict=False):
    rate, way, steps = best_of(name)
    draw_way(axis, way, STYLES[name][0])
    axis.set_title(f"{name}, η = {rate:.2g}: {said(steps)}", fontsize=8)
    heights = height(way).clamp(min=1e-6)
    colour, style = STYLES[name]
    axes[1, 3].plot(heights / heights[0], style, color=COLOURS[colour], label=name, linewidth=1)
axes[1, 3].axhline(1e-3, color="0.6", linewidth=0.7)
axes[1, 3].set(yscale="log", ylim=(1e-6, 1e4), xlim=(0, 230), xlabel="steps")
axes[1, 3].set_title("height, of that at the start", fontsize=9)
axes[1, 3].legend(fontsize=6, ncols=2, loc="upper right")
for axis in (axes[0, 0], axes[1, 0]):
    axis.set_ylabel("second weight")
for axis in axes[1, :3]:
    axis.set_xlabel("first weight")
show(
    figure,
    alt="The ways of seven optimisers through the same narrow valley, each with its own best learning rate, and their heights over the steps.",
)

# %% [markdown]
# **Explain.** Momentum adds up what points the same way, along the valley, while pushes across it cancel. Rules that scale
# each weight by itself would like to make the valley round. But this one lies *askew*: its steep direction is no weight of
# its own, but a mixture of both.
#
# **Predict.** Turn the valley until it lies along the first weight, and the start with it. Who needs fewer steps now, and who
# does not notice?

# %%
rows, lying = [], {}
for name, rule in RULES.items():
    (askew, _, steps), (along, _, lying[name]) = best_of(name), best_of(name, 0.0)
    state = {}
    rule(torch.ones(1), torch.ones(1), state, 0.1)
    kept = sum(torch.is_tensor(value) for value in state.values())
    rows.append([name, kept, f"{askew:.2g}", said(steps), f"{along:.2g}", said(lying[name])])
columns = ["rule", "numbers kept a weight", "best η, askew", "needs", "best η, along", "needs "]
show_table(pd.DataFrame(rows, columns=columns))


def exactly(value, unit):
    """A value that no seed moves."""
    return Estimate(value, value, value, (SEED,), unit)


askew = {name: best_of(name)[2] for name in RULES}
claims(
    "In this valley momentum is down in less than two thirds of SGD's steps, each with its own best rate",
    exactly(askew["momentum"] / askew["SGD"], "ratio of steps"),
    rule="value < 0.67",
)
claims(
    "How the valley lies changes no step of SGD, momentum or Nesterov",
    exactly(
        max(abs(askew[name] - lying[name]) for name in ("SGD", "momentum", "Nesterov")), "steps"
    ),
    rule="value <= 0",
)
claims(
    "Adagrad and RMSprop need ten times the steps or more when the valley lies askew",
    exactly(
        min(askew[name] / lying[name] for name in ("Adagrad", "RMSprop")), "ratio of steps"
    ),
    rule="value >= 10",
)

# %% [markdown]
# **Explain.** For rules with one scale, a turned valley is the same valley. For those with a scale for each weight it is not:
# along the axes, they divide the steepness out, and nearly jump to the bottom. Askew, there is nothing to divide out. Which
# kind of valley do networks have? Partly the first kind: gradients of different layers differ in size, and a layer's weights
# are axes. No surface with two weights can tell how much. We have to try it on the network.
#
# And mind the rates: the best ones lie orders of magnitude apart. There is no rate that is "normal" for all.
#
# ## Drag the rate
#
# The same rate for three rules, forty steps.
#
# **Predict.** Is there any rate that suits all three?

# %% tags=["picture"]
DRAGGED = ("SGD", "momentum", "Adam")


def at_rate(rate):
    """The valley three times, with the first steps of three rules at one rate."""
    figure, axes = plt.subplots(1, 3, figsize=(8.5, 2.9), layout="constrained")
    for axis, name in zip(axes, DRAGGED, strict=True):
        way = walk(RULES[name], [rate], steps=40)[0]
        draw_way(axis, way, STYLES[name][0], shown=40)
        left = float(height(way[-1:]) / height(way[:1]))
        end = f"{left:.2g} of the height left" if left < 1 else "higher than at the start"
        axis.set_title(f"{name}: {end}", fontsize=9)
        axis.set_xlabel("first weight")
    axes[0].set_ylabel("second weight")
    figure.suptitle(f"η = {rate:g}", fontsize=10)
    return figure


# %%
show(
    at_rate(0.3),
    alt="Three rules at a learning rate of 0.3: Adam is on its way down, SGD and momentum are thrown out of the valley.",
)
chooser("η", (1.0, 0.3, 0.1, 0.05, 0.02, 0.01, 0.005, 0.001), at_rate)

# %% [markdown]
# **Explain.** No. Where Adam is at home, SGD is thrown out; where SGD is at home, Adam has hardly left. The reason is in the
# rules: SGD's step is as long as the gradient says, Adam's is about $\eta$ long *whatever* the gradient.
#
# ## The same on a network
#
# Now the optimisers of `torch.optim`, on the task of lesson 04. All weights have one rate, which stays constant for now;
# batches of 32, as many steps for all. Colours of the pictures change, as in that lesson.


# %% tags=["evidence"]
OPTIMISERS = {  # name: torch's class, and its settings but for the learning rate
    "SGD": (torch.optim.SGD, {}),
    "momentum": (torch.optim.SGD, {"momentum": 0.9}),
    "Nesterov": (torch.optim.SGD, {"momentum": 0.9, "nesterov": True}),
    "Adagrad": (torch.optim.Adagrad, {}),
    "RMSprop": (torch.optim.RMSprop, {}),
    "Adam": (torch.optim.Adam, {}),
    "AdamW": (torch.optim.AdamW, {"weight_decay": 0.01}),
}
QUARTERS = 4  # a run is looked at after every quarter of its pictures
STILL = {"rotate": 0, "scale": 0, "shear": 0, "shift": 0}
COLOUR = augmentation(**STILL)  # colours change, as in lesson 04


def optimizer_of(name, rate):
    """A recipe for `fit`: one of torch's optimisers with one rate for all parameters."""
    made, settings = OPTIMISERS[name]
    return lambda model: made(model.parameters(), lr=rate, **settings)


def new_model(name, seed):
    """A pretrained backbone with a new head for the ten digits."""
    torch.manual_seed(seed)
    return Classifier(load_backbone(name), len(train.classes)).to(device)


def data_of(model, labels, size, steps, seed):
    """Batches of a few-shot subset: `steps` of them before `fit` looks up."""
    few = few_shot(train, labels, seed)
    settings = {"size": size, "steps": max(1, steps), "augment": COLOUR, "seed": seed}
    return batches(few, model.transform, **settings, device=device)


def trained(
    backbone,
    seed,
    optimiser,
    rate,
    schedule=constant,
    size=32,
    steps=32,
    labels=20,
    look=lambda model, quarter: None,
):
    """A model after `steps` steps. look(model, quarter) is called after every quarter of them."""
    model = new_model(backbone, seed)
    data = data_of(model, labels, size, steps // QUARTERS, seed)
    done = itertools.count(1)

    def look_up(model):
        if (quarter := next(done)) <= QUARTERS:
            look(model, quarter)
        return 0.0

    try:
        fit(
            model,
            data,
            epochs=QUARTERS,
            optimizer=optimizer_of(optimiser, rate),
            schedule=schedule,
            validate=look_up,
        )
    except FloatingPointError:  # training broke off: look at what it left
        for _ in range(QUARTERS):
            look_up(model)
    return model


# %% [markdown]
# Four schedules, which a later section is about. Each is a function of progress, from 0 to 1, and gives a factor for the
# rate.


# %% tags=["evidence"]
def cosine(progress):
    """From 1 down to 0 along half a wave, slowly at both ends (Loshchilov and Hutter 2017)."""
    return 0.5 * (1 + math.cos(math.pi * progress))


def warmed_cosine(progress):
    """A cosine, held down during the first tenth of training, in which the rate rises from 0."""
    return min(1.0, progress / 0.1) * cosine(progress)


SCHEDULES = {
    "constant": constant,
    "cosine": cosine,
    "warm-up + cosine": warmed_cosine,
    "one-cycle": one_cycle(),
}

# %% [markdown]
# Who is compared with whom, and the search. `ARMS` names an optimiser, a schedule and a batch size. Every arm has five rates,
# on a grid around `CENTRES`, and takes the best of them. All learn from as many pictures.

# %% tags=["evidence"]
BACKBONES = ("resnet_near",)
RUN_STEPS, RUN_SIZE = 32, 32  # of a stored run
TOTAL = RUN_STEPS * RUN_SIZE  # pictures that every stored run learns from
BATCHES = (8, 32, 128)
CENTRES = {  # the middle of each family's grid, which goes two places down and two up
    "SGD": 0.3,
    "momentum": 0.03,
    "Nesterov": 0.03,
    "Adagrad": 0.01,
    "RMSprop": 0.001,
    "Adam": 0.001,
    "AdamW": 0.001,
}
PLACES = (-2, -1, 0, 1, 2)
ARMS = {name: (name, "constant", RUN_SIZE) for name in OPTIMISERS}
ARMS |= {
    f"{name}, {schedule}": (name, schedule, RUN_SIZE)
    for name in ("momentum", "AdamW")
    for schedule in SCHEDULES
    if schedule != "constant"
}
ARMS |= {
    f"momentum, batches of {size}": ("momentum", "constant", size)
    for size in BATCHES
    if size != RUN_SIZE
}


def rate_of(arm, place):
    """The learning rate of one arm at one place of its grid; from place to place it grows by a factor of about 3."""
    return float(f"{CENTRES[ARMS[arm][0]] * 10 ** (place / 2):.0e}")


def searched():
    """The best rate of each arm, by the search below; the middle of its grid before that has run."""
    try:
        found = stored("11_recipes").groupby(["arm", "place"])["validation"].mean()
    except FileNotFoundError:
        return {arm: rate_of(arm, 0) for arm in ARMS}
    return {arm: rate_of(arm, int(found[arm].idxmax())) for arm in ARMS}


RECIPES = searched()


# %% tags=["search"]
# Seeds that serve nothing else.
GRID = {"arm": tuple(ARMS), "place": PLACES, "seed": (900, 901)}


def validation_accuracy(arm, place, seed):
    """What one rate is worth at the end of training, on validation pictures."""
    optimiser, schedule, size = ARMS[arm]
    rate, steps = rate_of(arm, place), TOTAL // size
    settings = {"schedule": SCHEDULES[schedule], "size": size, "steps": steps}
    model = trained("resnet_near", seed, optimiser, rate, **settings)
    return hits(model, valid).float().mean().item()


# %% [markdown]
# And what the stored table holds: each arm at its own rate, a few at a rate that is not theirs, and two at the rate that a
# range test chose (a section below).

# %% tags=["evidence"]
ONE_RATE = RECIPES["AdamW"]  # what suits AdamW, for everybody
SETTINGS = {arm: (*ARMS[arm], RECIPES[arm]) for arm in ARMS}
SETTINGS |= {
    f"{name}, one rate": (name, "constant", RUN_SIZE, ONE_RATE) for name in ("SGD", "momentum")
}
SETTINGS |= {
    f"momentum, batches of {size}, one rate": (
        "momentum",
        "constant",
        size,
        RECIPES["momentum"],
    )
    for size in BATCHES
}


def swept(name, seed, optimiser, steps, labels=20):
    """The range test of one optimiser: rates and losses."""
    model = new_model(name, seed)
    return range_test(model, data_of(model, labels, RUN_SIZE, steps, seed), optimiser)


def looked_at(seed, optimiser, schedule, size, rate):
    """Test hits of one run: of the first 500 pictures after a quarter of it, of all at its end."""
    found = {}

    def look(model, quarter):
        if quarter == 1:
            found["quarter"] = hits(model, test.subset(range(500))).numpy()
        if quarter == QUARTERS:
            found["end"] = hits(model, test).numpy()

    settings = {"schedule": SCHEDULES[schedule], "size": size, "steps": TOTAL // size}
    trained("resnet_near", seed, optimiser, rate, **settings, look=look)
    return found


def experiment(seed):
    """Every setting once, and two runs with the rate that a range test chose."""
    chosen = {
        f"{name}, range test": (
            name,
            "constant",
            RUN_SIZE,
            float(f"{chosen_rate(*swept('resnet_near', seed, name, RUN_STEPS)):.2g}"),
        )
        for name in SWEEPS
    }
    done = set()
    for arm, setting in (SETTINGS | chosen).items():
        if setting in done and arm not in chosen:
            continue  # some arms are the same run under two names
        done.add(setting)
        named = dict(zip(("optimiser", "schedule", "size", "rate"), setting, strict=True))
        for at, found in looked_at(seed, *setting).items():
            yield named | {"arm": arm, "at": at, "right": int(found.sum()), "hits": found}


# %% [markdown]
# Each optimiser was run with five rates, around the middle that its family is known for, a factor of about 3 apart
# (`python tools/tune.py 11`). Here is what they gave on *validation* pictures, with two seeds that serve nothing else.
#
# **Predict.** The dashed line is 0.001, which `torch.optim.AdamW` takes if you say nothing. Which optimiser looks best there,
# which worst? And which is best if each may stand at its own peak?

# %%
found = stored("11_recipes").groupby(["arm", "place"])["validation"].mean()
peaks = {
    arm: {rate_of(arm, place): float(found[arm, place]) for place in PLACES} for arm in ARMS
}
figure, axis = plt.subplots(figsize=(8.5, 3.4), layout="constrained")
for name in OPTIMISERS:
    colour, style = STYLES[name]
    x, y = list(peaks[name]), list(peaks[name].values())
    axis.plot(x, y, style, marker="o", markersize=4, color=COLOURS[colour], label=name)
axis.axvline(0.001, color=COLOURS["black"], linestyle="--", linewidth=0.8)
axis.set(xscale="log", xlabel="learning rate", ylabel="validation accuracy", ylim=(0, 1))
axis.grid(alpha=0.3)
figure.legend(loc="outside right center")
show(
    figure,
    alt="Validation accuracy of seven optimisers over the learning rate: seven hills of nearly the same height, at rates that lie far apart.",
)
print("chosen:", ", ".join(f"{name} {RECIPES[name]:g}" for name in OPTIMISERS))

# %% [markdown]
# **Explain.** Hills of nearly one height, in places far apart. Where you stand decides who "wins". Nearly: the tops differ a
# little, and to say more we need test pictures and more seeds.
#
# ### Two of them, live
#
# Momentum and AdamW, each at its own rate. After each quarter of the steps we look at test pictures.
#
# **Predict.** Which is ahead after a quarter? Is it still ahead at the end?

# %%
shown = test.subset(range(PICTURES))


def live(optimiser, rate):
    """One run of the chosen backbone: test hits after each quarter of its steps, by the number of the quarter."""
    looks = {}

    def look(model, quarter):
        looks[quarter] = hits(model, shown).numpy()

    settings = {"steps": STEPS, "labels": LABELS, "look": look}
    trained(profile.backbones[NET], SEED, optimiser, rate, **settings)
    return looks


lives = {name: live(name, RECIPES[name]) for name in ("momentum", "AdamW")}
for name, looks in lives.items():
    line = "  ".join(f"{found.mean():.3f}" for found in looks.values())
    print(f"{name:9} at {RECIPES[name]:<6g} after each quarter: {line}")
claims(
    "At the end, momentum and AdamW are less than eight points apart, each at its own rate",
    compare([lives["momentum"][QUARTERS]], [lives["AdamW"][QUARTERS]], [SEED]),
    rule="low > -0.08 and high < 0.08",
)

# %% [markdown]
# ### All seven, more seeds
#
# One seed says little. The stored table has all seven, at their own rates.
# `python tools/evidence.py 11 --seeds 100..109 --out DIR` makes such a table from nothing; it is of the embedded world.


# %% tags=["evidence"]
def runs(table, arm, at="end"):
    """Test hits of one arm of the table, by seed, and the seeds. at: "quarter" (500 pictures) or "end" (1,000)."""
    optimiser, schedule, size, rate = SETTINGS.get(arm, (None,) * 4)
    if optimiser is None:  # a range test chooses another rate for each seed
        rows = table[table["arm"] == arm]
    else:  # arms that are the same run stand in the table once
        rows = table[
            (table["optimiser"] == optimiser)
            & (table["schedule"] == schedule)
            & (table["size"] == size)
            & np.isclose(table["rate"], rate)
            & ~table["arm"].str.endswith("range test")
        ]
    rows = rows[rows["at"] == at].sort_values("seed")
    if rows.empty:
        raise ValueError(f"{arm!r} is not in the table")
    count = 500 if at == "quarter" else 1000
    return [unpack_hits(text, count) for text in rows["hits"]], rows["seed"].tolist()


def ahead(table, ours, other, at="end"):
    """By how much one arm is ahead of another, paired by seed and picture."""
    found, seeds = runs(table, ours, at)
    return compare(found, runs(table, other, at)[0], seeds)


# %% tags=["evidence"]
def claims_on_optimisers(table, claim):
    """Which optimiser gets there sooner, each at its own rate."""
    says = partial(claim, origin="stored")
    says(
        "At the end, SGD and AdamW are less than four points apart, each at its own rate",
        ahead(table, "AdamW", "SGD"),
        rule="low > -0.04 and high < 0.04",
    )
    says(
        "At the end, momentum is less than two points ahead of plain SGD, each at its own rate",
        ahead(table, "momentum", "SGD"),
        rule="high < 0.02",
    )
    says(
        "After a quarter of the pictures, RMSprop is at least three points ahead of momentum on average",
        ahead(table, "RMSprop", "momentum", "quarter"),
        rule="value > 0.03",
    )
    says(
        "At the end, RMSprop and AdamW are less than two points apart",
        ahead(table, "RMSprop", "AdamW"),
        rule="low > -0.02 and high < 0.02",
    )
    says(
        "At the end, RMSprop is half a point or more ahead of momentum on average, but less than five",
        ahead(table, "RMSprop", "momentum"),
        rule="value > 0.005 and high < 0.05",
    )
    says(
        "At the end, Adam and AdamW are less than a point apart",
        ahead(table, "Adam", "AdamW"),
        rule="low > -0.01 and high < 0.01",
    )


# %% tags=["picture"]
def dots(axis, rows, table, at, colour, label=None, marker="o", shift=0.0):
    """One dot with its interval for each arm, from top to bottom."""
    points = [estimate(*runs(table, arm, at)) for arm in rows]
    x = [p.value for p in points]
    reach = [[p.value - p.low for p in points], [p.high - p.value for p in points]]
    y = np.arange(len(rows)) + shift
    axis.errorbar(
        x, y, xerr=reach, fmt=marker, color=COLOURS[colour], label=label, markersize=5
    )


# %%
table = stored("11_optimisers_and_schedules")
figure, axes = plt.subplots(1, 2, figsize=(8.5, 3), sharey=True, layout="constrained")
for axis, at, title in zip(
    axes, ("quarter", "end"), ("after a quarter", "at the end"), strict=True
):
    dots(axis, list(OPTIMISERS), table, at, "blue")
    axis.set(title=title, xlabel="test accuracy", yticks=range(7), yticklabels=OPTIMISERS)
    axis.grid(alpha=0.3)
axes[0].invert_yaxis()
show(
    figure,
    alt="Test accuracy of seven optimisers at their own rates, after a quarter of training and at its end.",
)
claims_on_optimisers(table, claims)

# %% [markdown]
# **Explain.** This answers half of the title. After a quarter of the pictures, Adagrad and RMSprop have more right than
# momentum. By the end most of that lead is gone. The rules that scale each weight by itself end together, a little ahead of
# those with one scale. Plain SGD is as good as momentum, at ten times its rate. That is no accident: a velocity that keeps
# nine tenths adds up about ten pushes, so momentum at $\eta$ goes about as far as SGD at $10\,\eta$, and a run as short as
# this has no long valley to roll along. Adam and AdamW are one: the decay takes next to nothing in so few steps.
#
# Mind what was searched: rates were chosen for the *end*. Whoever wants the most after a quarter would choose others. And do
# not carry the order to other tasks: from scratch, and with networks that mix very different layers, such as transformers,
# the differences are known to be larger.
#
# ## A range test
#
# The search took five runs for each optimiser. Can one find a rate with one? Smith (2017) has an idea: begin with a rate that
# is much too small, multiply it by the same factor at every step, and watch the loss. At first nothing happens. Then it
# falls. Then the rate is too large, and it explodes.
#
# We read the curve like this. Smooth it, since a batch is noisy. Take the rate where it is *lowest*. That rate is too large
# already: the loss still falls there from what earlier steps did. So take a tenth of it.

# %% tags=["evidence"]
SWEEPS = {  # from which rate to which
    "momentum": (1e-4, 10.0),
    "AdamW": (1e-5, 1.0),
}


def range_test(model, data, optimiser):
    """One pass over the batches while the rate grows over the whole sweep, each step by the same factor.

    Returns the rates and the losses, before each step. It ends early where the loss is no longer finite, or four times
    what it was at first.
    """
    (low, high), count = SWEEPS[optimiser], len(data)
    optimizer = optimizer_of(optimiser, low)(model)
    model.train()
    rates, losses = [], []
    for number, (pictures, labels) in enumerate(data.epoch(0)):
        rate = low * (high / low) ** (number / max(1, count - 1))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = F.cross_entropy(model(pictures), labels)
        if not loss.item() <= 4 * (losses or [loss.item()])[0]:
            break
        rates.append(rate)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return np.array(rates), np.array(losses)


def smoothed(losses, keep=0.8):
    """A running mean in which a step counts less the longer ago it was, without a bias at the start."""
    mean, weight, out = 0.0, 0.0, []
    for loss in losses:
        mean, weight = keep * mean + (1 - keep) * loss, keep * weight + 1 - keep
        out.append(mean / weight)
    return np.array(out)


def chosen_rate(rates, losses):
    """A tenth of the rate at which the smoothed loss is lowest."""
    return float(rates[np.argmin(smoothed(losses))]) / 10


# %% [markdown]
# **Predict.** Is a tenth of the lowest close to what the search chose, for momentum? For AdamW?

# %%
figure, axes = plt.subplots(1, 2, figsize=(8.5, 3.2), sharey=True, layout="constrained")
for axis, (name, colour) in zip(
    axes, {"momentum": "blue", "AdamW": "red"}.items(), strict=True
):
    rates, losses = swept(profile.backbones[NET], SEED, name, SWEEP, LABELS)
    mine = chosen_rate(rates, losses)
    axis.plot(rates, losses, ".", color="0.6", label="loss of a batch")
    axis.plot(rates, smoothed(losses), color=COLOURS[colour], label="smoothed")
    axis.axvline(mine, color=COLOURS["black"], label="a tenth of the lowest")
    axis.axvline(RECIPES[name], color=COLOURS["green"], linestyle="--", label="searched")
    axis.set(xscale="log", xlabel="learning rate", title=name)
    axis.legend(fontsize=7)
    print(f"{name:9} range test: {mine:.2g}; search: {RECIPES[name]:g}")
axes[0].set_ylabel("loss")
show(
    figure,
    alt="Loss over a growing learning rate for momentum and AdamW: flat, falling, exploding; a tenth of the rate of the lowest loss and the searched rate are marked.",
)


# %% tags=["evidence"]
def rates_chosen(table, name):
    """What the range test chose for each seed, as a multiple of what the search chose."""
    rows = table[(table["arm"] == f"{name}, range test") & (table["at"] == "end")]
    return rows["rate"].to_numpy() / RECIPES[name], rows["seed"].tolist()


def claims_on_range_tests(table, claim):
    """What one run for a rate costs, against a search of five."""
    says = partial(claim, origin="stored")
    says(
        "With the rate of a range test, momentum ends less than five points behind its searched rate on average",
        ahead(table, "momentum", "momentum, range test"),
        rule="value < 0.05",
    )
    says(
        "With the rate of a range test, AdamW ends a point or more behind its searched rate on average",
        ahead(table, "AdamW", "AdamW, range test"),
        rule="value > 0.01",
    )


# %%
for name in SWEEPS:
    factor, _ = rates_chosen(table, name)
    own, other = (np.mean(runs(table, arm)[0], axis=1) for arm in (name, f"{name}, range test"))
    lost = " ".join(f"{points:.3f}" for points in own - other)
    print(f"{name:9} chosen / searched: from {factor.min():.2g} to {factor.max():.2g}")
    print(f"          accuracy lost, by seed: {lost}")
claims_on_range_tests(table, claims)

# %% [markdown]
# **Explain.** It finds the right region, for the price of one run. For momentum that is enough for most seeds, though not for
# all. For AdamW it is too high, for every seed, and costs more: the loss in the middle of a sweep says whether training
# *still gets down*, not whether what was learned holds on other pictures. Take it as the top of a small search, and look
# below it.
#
# ## Schedules
#
# A **schedule** is a function of progress $p$, from 0 at the start to 1 at the end. It gives a factor, by which `fit`
# multiplies the rate. Large steps get far, and small ones settle: that is the idea of going down.
#
# - **constant**: the factor is 1.
# - **cosine**: $\tfrac12 (1 + \cos \pi p)$, from 1 to 0 along half a wave (Loshchilov and Hutter 2017).
# - **warm-up + cosine**: the same, but during the first tenth the rate rises from 0. The first gradients of a new head mean
#   little.
# - **one-cycle**: a rise over the first quarter, then half a cosine to 0 (after Smith 2018, who lets momentum go the other
#   way meanwhile; we leave it).
#
# They stand above as functions of a few lines, and `one_cycle` is the package's, which `fit` takes if you say nothing. Being
# functions of *progress*, they fit any number of steps.
#
# **Predict.** With the same five rates to choose from, what does a schedule give at the end? And after a quarter of the
# steps, where one-cycle has only just reached its top?


# %% tags=["evidence"]
def arm_of(name, schedule):
    """The arm of one optimiser with one schedule."""
    return name if schedule == "constant" else f"{name}, {schedule}"


def claims_on_schedules(table, claim):
    """What a schedule gives after a quarter and at the end, with a rate searched for each."""
    for name in SWEEPS:
        for schedule in ("cosine", "one-cycle"):
            claim(
                f"At the end, {name} with {schedule} is less than four points from {name} at a constant rate",
                ahead(table, arm_of(name, schedule), name),
                rule="low > -0.04 and high < 0.04",
                origin="stored",
            )
    claim(
        "After a quarter of the pictures, momentum with one-cycle is at least two points behind a constant rate",
        ahead(table, "momentum", arm_of("momentum", "one-cycle"), "quarter"),
        rule="low > 0.02",
        origin="stored",
    )


# %%
progress = np.linspace(0, 1, 200, endpoint=False)
hues = dict(zip(SCHEDULES, ("black", "green", "orange", "blue"), strict=True))
figure, axes = plt.subplots(1, 3, figsize=(9.5, 3.2), layout="constrained")
for schedule, factor in SCHEDULES.items():
    axes[0].plot(progress, [factor(p) for p in progress], color=COLOURS[hues[schedule]])
axes[0].set(xlabel="progress", ylabel="factor of the rate", title="four schedules")
for axis, at, title in zip(
    axes[1:], ("quarter", "end"), ("after a quarter", "at the end"), strict=True
):
    for place, schedule in enumerate(SCHEDULES):
        rows = [arm_of(name, schedule) for name in SWEEPS]
        shift = 0.15 * (place - 1.5)
        label = schedule if at == "end" else None
        dots(axis, rows, table, at, hues[schedule], label, shift=shift)
    axis.set(title=title, xlabel="test accuracy", yticks=(0, 1), yticklabels=SWEEPS)
    axis.grid(alpha=0.3)
    axis.invert_yaxis()
figure.legend(loc="outside lower center", ncols=4)
show(
    figure,
    alt="Four schedules over progress, and the test accuracy that momentum and AdamW reach with each, after a quarter of training and at its end.",
)
for name in SWEEPS:
    chosen = [f"{s} {RECIPES[arm_of(name, s)]:g}" for s in SCHEDULES]
    print(f"{name:9} rates: {', '.join(chosen)}")
claims_on_schedules(table, claims)

# %% [markdown]
# **Explain.** And this is the other half of the title: at the end, schedules and a constant rate lie close together, each
# with a rate of its own. After a quarter, momentum that has spent the time on rising is behind; for AdamW, seeds differ too
# much to tell. Look at the rates as well: what falls in the end may start higher, so a schedule tried at the rate of another
# is again an unfair comparison.
#
# Is a schedule good for nothing, then? A run of 32 steps is short, and its best constant rate is small enough to settle. In
# long runs a constant rate cannot both get far and settle, and there schedules are known to pay. Then take one that is a
# function of progress, and search its rate.
#
# ## Batch size
#
# A batch of 128 gives a better gradient than one of 8, and costs sixteen times as much. So at the *same number of pictures*
# it makes a sixteenth of the steps. What should its rate be? A rule of thumb says: **scale it linearly** (Goyal et al. 2017).
# With four times the batch there are a quarter of the steps, so each should be four times as long.
#
# Momentum again, batches of 8, 32 and 128, as many pictures for all. The rate is that of 32 for all sizes, or searched for
# each, with five tries.
#
# **Predict.** With one rate for all sizes, which size loses? And how far is the linear rule from the rate that a search
# finds?


# %% tags=["evidence"]
def batch_arm(size, way):
    """The arm of momentum with batches of one size."""
    if way == "searched":
        return "momentum" if size == RUN_SIZE else f"momentum, batches of {size}"
    return f"momentum, batches of {size}, {way}"


def claims_on_batches(table, claim):
    """What the batch size does, with one rate and with a rate for each size."""
    for size in (8, 128):
        claim(
            f"At the rate of {RUN_SIZE}, batches of {size} end at least a point behind their own rate",
            ahead(table, batch_arm(size, "searched"), batch_arm(size, "one rate")),
            rule="low > 0.01",
            origin="stored",
        )
    claim(
        "At the end, batches of 8 are a point or more ahead of batches of 128 on average, each at its own rate",
        ahead(table, batch_arm(8, "searched"), batch_arm(128, "searched")),
        rule="value > 0.01",
        origin="stored",
    )
    claim(
        "After a quarter of the pictures, batches of 8 are three pictures in ten ahead of batches of 128",
        ahead(table, batch_arm(8, "searched"), batch_arm(128, "searched"), "quarter"),
        rule="low > 0.3",
        origin="stored",
    )


# %%
WAYS = {"one rate": ("orange", "s"), "searched": ("blue", "o")}
figure, axis = plt.subplots(figsize=(7.5, 2.8), layout="constrained")
for place, (way, (colour, marker)) in enumerate(WAYS.items()):
    rows = [batch_arm(size, way) for size in BATCHES]
    dots(axis, rows, table, "end", colour, way, marker, 0.2 * (place - 0.5))
for size in BATCHES:
    rule, own = RECIPES["momentum"] * size / RUN_SIZE, SETTINGS[batch_arm(size, "searched")][3]
    print(f"batches of {size:3}: searched {own:g}, by the linear rule {rule:g}")
labels = [f"{TOTAL // size} steps of {size}" for size in BATCHES]
axis.set(xlabel="test accuracy", yticks=range(len(BATCHES)), yticklabels=labels)
axis.invert_yaxis()
axis.grid(alpha=0.3)
figure.legend(loc="outside right center")
show(
    figure,
    alt="Test accuracy with batches of 8, 32 and 128 at as many pictures, with one rate for all sizes and with a searched rate for each.",
)
claims_on_batches(table, claims)

# %% [markdown]
# **Explain.** At the rate of 32, small batches step too far and large ones not far enough. With a rate for each size both
# gain, and the linear rule points to the neighbourhood of what the search found. But at the same number of *pictures* the
# large batch is not sooner: after a quarter, 128 has made two steps, and at the end it is still behind. What large batches
# give is time, on hardware that computes 128 pictures as fast as 8. That is a question of machines, and lesson 12 measures
# some.
#
# ### A large batch in a small memory
#
# What if 64 pictures do not fit? Gradients add up. So take the batch in parts, call `backward` for each, and make *one* step
# at the end. PyTorch adds to `.grad` until it is told to zero it. This is **gradient accumulation**. One thing has to be
# minded: the loss is a *mean* over pictures, and the mean of the whole is not the sum of the means of its parts. Each part
# counts by its share.


# %% tags=["by-hand"]
def in_parts(model, pictures, labels, part):
    """The gradient of a batch, taken `part` pictures at a time: one row of numbers."""
    model.zero_grad()
    for x, y in zip(pictures.split(part), labels.split(part), strict=True):
        share = len(x) / len(pictures)
        (share * F.cross_entropy(model(x), y)).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def distance(ours, other):
    """How far two gradients are apart, as a share of the other's length."""
    return float((ours - other).norm() / other.norm())


# %% [markdown]
# **Predict.** One batch of 64, then the same pictures as four parts of 16. Are the gradients equal? Does it matter whether
# the network is in training mode?

# %%
model = new_model(profile.backbones[NET], SEED)
x, y = next(iter(data_of(model, LABELS, 64, 1, SEED).epoch(0)))
apart = {}
for mode in ("evaluation", "training"):
    model.train(mode == "training")
    apart[mode] = distance(in_parts(model, x, y, 16), in_parts(model, x, y, 64))
    print(f"{mode} mode: {apart[mode]:.1e} of the gradient's length apart")
claims(
    "With batch norm at rest, four parts of 16 give the gradient of one batch of 64, but for the last digits",
    exactly(apart["evaluation"], "share of its length"),
    rule="value < 0.001",
)
claims(
    "With batch norm at work, they are more than a twentieth of the gradient's length apart",
    exactly(apart["training"], "share of its length"),
    rule="value > 0.05",
)

# %% [markdown]
# **Explain.** Addition does not care how it is grouped, but for rounding. **Batch norm** does: in training mode it measures
# mean and spread of the pictures that it sees *at once*, and 16 are not 64. So accumulation is the large batch for everything
# but batch norm. Where that matters, freeze its statistics (lesson 04) or take a norm that looks at one picture at a time.
#
# ## What goes wrong
#
# ### One learning rate for all
#
# Somebody compares optimisers, and to be fair gives all of them the same rate: the one that suits AdamW.
#
# **Predict.** You have seen the hills. Who will be called slow?


# %%
unfair = live("momentum", ONE_RATE)
print(
    f"momentum at {ONE_RATE:g}, after each quarter:",
    "  ".join(f"{found.mean():.3f}" for found in unfair.values()),
)
claims(
    "At the rate of AdamW, momentum gets at least two pictures in ten fewer at the end than at its own",
    compare([lives["momentum"][QUARTERS]], [unfair[QUARTERS]], [SEED]),
    rule="low > 0.2",
)


# %% tags=["evidence"]
def arm_at_one_rate(name):
    """The arm of one optimiser at the rate of AdamW, which is AdamW's own."""
    return name if name == "AdamW" else f"{name}, one rate"


def claims_on_one_rate(table, claim):
    """What one rate for all costs those whom it does not suit."""
    for name, least in {"SGD": 7, "momentum": 3}.items():
        claim(
            f"At the rate of AdamW, {name} ends at least {least} pictures in ten behind its own rate",
            ahead(table, name, arm_at_one_rate(name)),
            rule=f"low > {least / 10}",
            origin="stored",
        )


def stored_claims(table, claim):
    """What the stored seeds say."""
    for part in (
        claims_on_optimisers,
        claims_on_range_tests,
        claims_on_schedules,
        claims_on_batches,
        claims_on_one_rate,
    ):
        part(table, claim)


# %%
names = ("SGD", "momentum", "AdamW")
figure, axes = plt.subplots(1, 2, figsize=(8.5, 2.4), sharey=True, layout="constrained")
for axis, at, title in zip(
    axes, ("quarter", "end"), ("after a quarter", "at the end"), strict=True
):
    dots(axis, names, table, at, "blue", "own rate")
    dots(
        axis,
        [arm_at_one_rate(name) for name in names],
        table,
        at,
        "orange",
        "one rate",
        "s",
        0.2,
    )
    axis.set(title=title, xlabel="test accuracy", yticks=range(len(names)), yticklabels=names)
    axis.grid(alpha=0.3)
axes[0].invert_yaxis()
axes[0].legend(fontsize=8)
show(
    figure,
    alt="Test accuracy of three optimisers at their own rates and at AdamW's: with one rate for all, SGD and momentum fall far behind.",
)
claims_on_one_rate(table, claims)

# %% [markdown]
# SGD has hardly moved: it guesses. Momentum is on its way. A report would now say that AdamW "converges faster", and all it
# has measured is that 0.001 is AdamW's rate. At their own rates you have seen them next to each other.
#
# The test that catches it asks two things of a comparison. Has each side been given the same number of rates? And does the
# best lie *inside* of what was tried? At an end, a better one may lie beyond.


# %% tags=["catches"]
def assert_searched(found):
    """Fail where sides had different numbers of rates, or a best rate lies at an end. found: {side: {rate: accuracy}}."""
    assert len({len(rates) for rates in found.values()}) == 1, "not everybody had as many tries"
    for side, accuracy in found.items():
        best = max(accuracy, key=accuracy.get)
        assert min(accuracy) < best < max(accuracy), (
            f"{side}: {best:g} lies at an end of what was tried, so a better rate may lie beyond"
        )


# %%
assert_searched(peaks)
one_for_all = {
    name: {ONE_RATE: float(np.mean(runs(table, arm_at_one_rate(name))[0]))} for name in names
}
try:
    assert_searched(one_for_all)
    raise RuntimeError("the test let the mistake pass")
except AssertionError as error:
    print("caught:", error)

# %% [markdown]
# ### Weight decay through Adam
#
# **Weight decay** pulls every weight towards 0, by a share of itself. There are two ways to write it. One adds
# $\tfrac{\lambda}{2} w^2$ to the loss, so $\lambda w$ to the gradient: `torch.optim.Adam(weight_decay=…)` does that. The
# other shrinks the weight itself: `AdamW`. With SGD they are the same.
#
# **Predict.** Two weights of 1. The gradient of one goes up and down by 1, that of the other by 0.01; on average both are 0.
# Which decays more under each rule?


# %% tags=["by-hand"]
def adam_l2(weight, gradient, state, rate, decay=0.01):
    """The mistake: the decay goes through Adam, and is divided like any gradient."""
    return adam(weight, gradient + decay * weight, state, rate)


def lost_to_decay(rule, size, decay=0.01, rate=0.01, steps=100):
    """How much of a weight of 1 the decay takes, where the gradient goes up and down by `size`."""
    ends = []
    for strength in (0.0, decay):
        weight, state = torch.ones(1, dtype=torch.float64), {}
        for step in range(steps):
            gradient = torch.full_like(weight, size * (-1) ** step)
            weight = rule(weight, gradient, state, rate, decay=strength)
        ends.append(float(weight))
    return ends[0] - ends[1]


# %%
lost = {}
for name, rule in {"L2 through Adam": adam_l2, "AdamW": adamw}.items():
    lost[name] = [lost_to_decay(rule, size) for size in (0.01, 1.0)]
    small, large = lost[name]
    print(
        f"{name:15} gradient 0.01: {small:.4f} lost; gradient 1: {large:.4f}; ratio {small / large:.3g}"
    )
claims(
    "Through Adam, the weight with the small gradient decays at least ten times as much as the other",
    exactly(lost["L2 through Adam"][0] / lost["L2 through Adam"][1], "ratio of decay"),
    rule="value > 10",
)
claims(
    "With AdamW, both decay alike within a hundredth",
    exactly(lost["AdamW"][0] / lost["AdamW"][1], "ratio of decay"),
    rule="value > 0.99 and value < 1.01",
)

# %% [markdown]
# Adam divides what it gets by the size of the gradient, and the decay with it. So what is meant to hold *all* weights back
# holds back those that the loss hardly pulls at. $\lambda$ no longer says how much a weight decays. (What it costs on a task
# depends on $\lambda$, and was not measured here.) The test that catches it changes nothing but the size of the gradient:


# %% tags=["catches"]
def assert_decays_alike(rule):
    """Fail where the decay of a weight depends on the size of its gradient."""
    small, large = (lost_to_decay(rule, size) for size in (0.01, 1.0))
    assert abs(small / large - 1) < 0.1, (
        f"a gradient a hundred times as small, and {small / large:.2g} times the decay"
    )


# %%
assert_decays_alike(adamw)
try:
    assert_decays_alike(adam_l2)
    raise RuntimeError("the test let the mistake pass")
except AssertionError as error:
    print("caught:", error)

# %% [markdown]
# ### Accumulation that forgets to divide
#
# The classic: `loss.backward()` for each part, and nobody divides by the number of parts.
#
# **Predict.** Four parts. How long is the gradient? What does that do to momentum, and what to Adam?


# %% tags=["by-hand"]
def not_divided(model, pictures, labels, part):
    """The mistake: each part counts as if it were the whole batch."""
    model.zero_grad()
    for x, y in zip(pictures.split(part), labels.split(part), strict=True):
        F.cross_entropy(model(x), y).backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


# %%
model.eval()
whole, summed = in_parts(model, x, y, 64), not_divided(model, x, y, 16)
claims(
    "Four parts that nobody divides give four times the gradient",
    exactly(float(summed.norm() / whole.norm()), "ratio of lengths"),
    rule="value > 3.99 and value < 4.01",
)
for name in ("momentum", "Adam"):
    steps = [1.0 - RULES[name](torch.ones(1), g * torch.ones(1), {}, 0.1) for g in (1.0, 4.0)]
    print(
        f"{name:9} a gradient four times as long: a step {float(steps[1] / steps[0]):.1f} times as long"
    )
undivided = live("momentum", 8 * RECIPES["momentum"])
claims(
    "Eight parts that nobody divides, an eightfold rate, cost momentum at least five points at the end",
    compare([lives["momentum"][QUARTERS]], [undivided[QUARTERS]], [SEED]),
    rule="low > 0.05",
)

# %% [markdown]
# For momentum, to forget it is to train at a multiple of the rate, on the far side of the hill. Adam divides by the size of
# the gradient, so its step stays as it was, and nobody notices: until the optimiser is changed, or gradients are clipped at a
# length.
#
# The test that catches it compares with the whole batch, once, in evaluation mode:


# %% tags=["catches"]
def assert_same_gradient(ours, whole):
    """Fail where an accumulated gradient is not that of the whole batch."""
    off = float((ours - whole).norm() / whole.norm())
    times = float(ours.norm() / whole.norm())
    assert off < 0.01, f"the gradient is {times:.2f} times as long as that of the whole batch"


# %%
assert_same_gradient(in_parts(model, x, y, 16), whole)
try:
    assert_same_gradient(summed, whole)
    raise RuntimeError("the test let the mistake pass")
except AssertionError as error:
    print("caught:", error)

# %% [markdown]
# ## Exercises
#
# ### 11.1 · A step that looks ahead
#
# Write one step of momentum in Nesterov's form, as `torch.optim.SGD(nesterov=True)` takes it. The velocity $v$ is a sum of
# gradients that fades: $v \leftarrow \mu v + g$, with the gradient $g$ and the momentum $\mu$. Plain momentum then moves the
# weight by $-\eta v$, with the learning rate $\eta$. Nesterov's form moves it by $-\eta\,(g + \mu v)$, with the *new* $v$: it
# looks where the velocity would take it next.


# %% tags=["exercise-11.1"]
def nesterov_step(weight, gradient, velocity, lr, momentum):
    """Tensors of one shape, and two floats. Returns the new weight and the new velocity; leaves the given ones as they are."""
    # <solution>
    velocity = momentum * velocity + gradient
    return weight - lr * (gradient + momentum * velocity), velocity
    # <stub>
    # return ...
    # </stub>


# %% tags=["check-11.1", "nbval-check-output"]
check("11.1", nesterov_step)

# %% [markdown]
# ### 11.2 · Up, and not quite down
#
# A schedule is a function of progress: 0 is the first step, 1 the end of training. It returns a factor for the learning rate.
# This one rises in a straight line from 0 at progress 0 to 1 at progress `warmup`. From there it falls, as half a cosine, to
# `floor` at progress 1. With `warmup` 0 there is no rise: it begins at 1. (Mind the difference to a product of a rise and a
# cosine: here the cosine begins only where the rise ends.)


# %% tags=["exercise-11.2"]
def warmup_cosine(progress, warmup, floor):
    """progress: float in [0, 1]; warmup, floor: floats in [0, 1). Returns a float in [0, 1]."""
    # <solution>
    if progress < warmup:
        return progress / warmup
    fallen = (progress - warmup) / (1 - warmup)
    return floor + (1 - floor) * (1 + np.cos(np.pi * fallen)) / 2
    # <stub>
    # return ...
    # </stub>


# %% tags=["check-11.2", "nbval-check-output"]
check("11.2", warmup_cosine)

# %% [markdown]
# ### 11.3 · A rate from a range test
#
# A range test has tried rates from small to large and noted a loss at each. Choose a rate by this rule:
#
# 1. From the first loss on that is not finite (nan or infinite), nothing counts: training has diverged. Cut there.
# 2. Smooth what is left: each loss becomes the mean of itself and its two neighbours. The first and the last have only one.
#    (A mean of *earlier* losses would lag behind, and choose too late.)
# 3. Find the rate at which the smoothed loss is lowest. It is the edge of what works; return a tenth of it.


# %% tags=["exercise-11.3"]
def rate_from(rates, losses):
    """rates, losses: float arrays (n,), rates ascending; the first three losses are finite. Returns a float."""
    # <solution>
    finite = np.isfinite(losses)
    kept = losses if finite.all() else losses[: finite.argmin()]  # argmin: the first False
    smooth = [kept[max(i - 1, 0) : i + 2].mean() for i in range(len(kept))]
    return rates[np.argmin(smooth)] / 10
    # <stub>
    # return ...
    # </stub>


# %% tags=["check-11.3", "nbval-check-output"]
check("11.3", rate_from)

# %% [markdown]
# ### 11.4 · A large batch in small parts
#
# A batch does not fit into memory, so it comes in parts, and they are *not* equally large. Leave in `.grad` of every
# parameter what one backward pass of the mean loss over **all** pictures would leave there. Give the network one part at a
# time. What `.grad` held before is to be forgotten. Take no step: that is the optimiser's.


# %% tags=["exercise-11.4"]
def accumulated(model, loss, parts):
    """loss: (logits, labels) to their mean loss, a scalar; parts: a list of (pictures, labels). Returns nothing."""
    # <solution>
    model.zero_grad()
    n = sum(len(labels) for _, labels in parts)
    for pictures, labels in parts:
        share = len(labels) / n
        (share * loss(model(pictures), labels)).backward()
    # <stub>
    # return ...
    # </stub>


# %% tags=["check-11.4", "nbval-check-output"]
check("11.4", accumulated)

# %% [markdown]
# ## The claims of this lesson

# %%
held = claims.table()
show_table(held[["claim", "value", "low", "high", "n", "rule", "holds", "origin"]].round(3))

# %% [markdown]
# ## Further reading
#
# - Polyak (1964), *Some methods of speeding up the convergence of iteration methods.* Momentum.
# - Sutskever, Martens, Dahl, Hinton (2013), *On the importance of initialization and momentum in deep learning.*
# - Duchi, Hazan, Singer (2011), *Adaptive subgradient methods for online learning and stochastic optimization.* Adagrad.
# - Kingma, Ba (2015), *Adam: a method for stochastic optimization.*
# - Loshchilov, Hutter (2019), *Decoupled weight decay regularization.* AdamW; and (2017), *SGDR: stochastic gradient descent
#   with warm restarts*, the cosine.
# - Smith (2017), *Cyclical learning rates for training neural networks.* The range test. And (2018), *A disciplined approach
#   to neural network hyper-parameters*, one cycle.
# - Goyal et al. (2017), *Accurate, large minibatch SGD: training ImageNet in 1 hour.* Linear scaling, and warm-up.
# - Choi et al. (2019), *On empirical comparisons of optimizers for deep learning.* Why the search space decides who wins.
#
# **Next:** lesson 12 asks what the loss and regularisation give, and what makes a step faster.
