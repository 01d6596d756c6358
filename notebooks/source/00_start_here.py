# %% [markdown]
# ## The question
#
# You have a handful of labelled pictures: five of each class. Is that enough to train a network? And does it help if the
# network has learned something else before, such as printed letters?
#
# Below you see both tasks. Later in this lesson you will have the answer, with an error bar.

# %% tags=["parameters"]
PROFILE: str = "embedded"  # [embedded | imagenet] the world; the second needs a network
SEED: int = 0  # moves the few-shot subset, the head, the order and the augmentation
DEVICE: str = "auto"  # [auto | cpu | cuda | mps] where to train
OUT: str = "../build/00"  # where results go
NET: str = "resnet"  # [resnet | vgg] the backbone of the live runs
LABELS: int = 5  # labels a class in the live runs
STEPS: int = 200  # training steps in the live runs; fewer than stored runs take, to save time

# %% tags=["environment"]
from importlib.metadata import PackageNotFoundError, version

from packaging.requirements import Requirement

from course_utils.paths import ROOT

OPTIONAL = {"ipycanvas": "for drawing with the mouse"}


def environment(requirements):
    """One row a package: its name, what is asked for, what is installed, and a verdict."""
    for line in requirements:
        needed = Requirement(line)
        try:
            found = version(needed.name).split("+")[0]
        except PackageNotFoundError:
            found = "missing"
        good = found != "missing" and needed.specifier.contains(found, prereleases=True)
        asked = OPTIONAL.get(needed.name, str(needed.specifier))
        missed = f"no: pip install {line}" if line in OPTIONAL else f'NO: pip install "{line}"'
        yield needed.name, asked, found, "yes" if good else missed


lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").split()
for row in environment([*lines, *OPTIONAL]):
    print("{:14} {:28} {:10} {}".format(*row))

# %% [markdown]
# One line for each package: what is asked for, what is installed, and whether that is good. Every line must end in *yes*; only
# ipycanvas is optional. If one says *NO*, run the command behind it and restart the kernel.

# %% tags=["setup"]
from pathlib import Path

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
import torch
from torchvision.io import write_png
from torchvision.transforms.v2.functional import resize

from course_utils.backbones import Classifier, load_backbone
from course_utils.data import augmentation, batches, few_shot, load_target, read_picture
from course_utils.data.letters import letters
from course_utils.evaluate import hits
from course_utils.evidence import Claims, compare, estimate, stored, unpack_hits
from course_utils.exercises import check, hint, solution  # noqa: F401
from course_utils.plots import COLOURS, START_COLOURS, as_png, picture_grid, show, show_table
from course_utils.profile import get_profile, pick_device
from course_utils.training import adamw, fit

profile = get_profile(PROFILE)
device = pick_device(DEVICE)
claims = Claims("00_start_here", OUT)
train, valid, test = (load_target(profile, split) for split in ("train", "valid", "test"))
backbone = load_backbone(profile.backbones[NET])

# %%
rows = {f"target: the task that we want to solve ({profile.target})": test}
if PROFILE == "embedded":
    rows = {
        "source: the task learned before (letters, near)": letters("near", "valid", 10)
    } | rows
show(
    picture_grid(rows),
    alt="A row of printed letters on photographs above a row of handwritten digits blended with photographs.",
)

# %% [markdown]
# ## Two worlds, one code path
#
# Every lesson runs in one of two worlds. You choose with the parameter `PROFILE` in the first code cell. No other cell changes.
#
# | | `embedded` | `imagenet` |
# |---|---|---|
# | needs | nothing but what pip installed | a network once; better a GPU |
# | source task | 52 printed letters on photographs | ImageNet's 1,000 classes |
# | target task | MNIST-M: handwritten digits on photographs | Oxford-IIIT Pet: cats and dogs |
# | backbones | a small VGG and a small ResNet, trained by this project | torchvision's `vgg16_bn`, `resnet18`, … |
#
# A few words that we use throughout. The **source** is the task learned first. The **target** is the one we want to solve.
# The **backbone** turns a picture into features; the **head** turns features into classes. **Fine-tuning** goes on training a
# pretrained backbone, with a new head, on the target.
#
# The letters come in two variants. *Near*: half of them are blended as MNIST-M is, |photograph − letter|. *Far*: all lie opaque
# on their photograph. Near is the default here, since a source close to the target is a good choice when you have it.

# %% [markdown]
# ## How we measure, in five lines
#
# 1. We choose on *validation* pictures and report on *test* pictures. Nothing is chosen on the test set.
# 2. No digit and no background photograph of the test stands anywhere in training. No digit stands in the source.
# 3. A run is repeated over seeds. A seed moves the few labelled pictures, the new head, the order and the augmentation.
# 4. A number comes with its 95 % interval: how far it would move with other seeds and other test pictures. A run of one
#    seed cannot know the first part, and says so.
# 5. A statement that matters is a `claim`. It has a rule, the run decides whether it holds, and a tie is called a tie.

# %% [markdown]
# ## A first transfer
#
# **Predict.** Two networks of the same shape get the same few labels: one starts from random numbers, one is pretrained. What
# test accuracy will each reach? Write down two numbers before you run the cell.
#
# The function below is the whole experiment. All starts get the same number of steps. Each gets its own learning rate, searched
# on validation pictures over the same grid, with other seeds than those shown here: `python tools/tune.py 00` repeats the search.

# %% tags=["evidence"]
RECIPES = {
    "scratch": {"lr": 1e-2, "head_lr": 1e-2, "steps": 300},
    "pretrained": {"lr": 1e-3, "head_lr": 1e-2, "steps": 300},
}


def train_on(few, net_name, pretrained, seed, **changes):
    """Train a backbone with a new head on a few labelled pictures."""
    recipe = RECIPES["pretrained" if pretrained else "scratch"] | changes
    torch.manual_seed(seed)
    model = Classifier(load_backbone(net_name, pretrained), len(few.classes)).to(device)
    augment = augmentation(**profile.augmentation)
    data = batches(
        few,
        model.transform,
        size=32,
        steps=recipe["steps"],
        augment=augment,
        seed=seed,
        device=device,
    )
    fit(model, data, optimizer=adamw(recipe["lr"], recipe["head_lr"]))
    return model


# %%
few = few_shot(train, LABELS, seed=SEED)
scratch = train_on(few, backbone.name, pretrained=False, seed=SEED, steps=STEPS)
transferred = train_on(few, backbone.name, pretrained=True, seed=SEED, steps=STEPS)
scratch_hits, transferred_hits = hits(scratch, test).numpy(), hits(transferred, test).numpy()
print(f"{len(few)} labelled pictures, {len(test)} test pictures")
print(f"from scratch: {estimate([scratch_hits], [SEED])}")
print(f"transferred:  {estimate([transferred_hits], [SEED])}")

# %% [markdown]
# **Explain.** The gain is the difference between the two, picture by picture: the same test pictures, the same few labels. An
# interval of a *paired* difference is narrower than the two intervals above make you think, since a picture that is hard for
# one network is often hard for the other.

# %%
gain = compare([transferred_hits], [scratch_hits], [SEED])
claims(
    f"Starting from a pretrained network beats starting from scratch at {LABELS} labels a class",
    gain,
    rule="low > 0",
)

# %% [markdown]
# One run is one draw of a few pictures. Is it luck? The next cell reads *stored evidence*: the same function with the recipes' own
# number of steps, ten seeds, both networks, three starts, three numbers of labels. `python tools/evidence.py 00 --seeds 100..109 --out DIR` makes such a table
# from nothing, with seeds of your own. It belongs to the embedded world.
#
# **Predict.** Where will the lines meet: at 5, at 20 or at 100 labels a class, or nowhere?

# %% tags=["evidence"]
NETS, STARTS, SIZES = ("vgg", "resnet"), ("scratch", "far", "near"), (5, 20, 100)
BACKBONES = ("resnet_far", "resnet_near", "vgg_far", "vgg_near")  # whose weights it stands on


def experiment(seed):
    """Test hits of both networks from each start, at each number of labels a class."""
    for net in NETS:
        for start in STARTS:
            for labels in SIZES:
                name = f"{net}_near" if start == "scratch" else f"{net}_{start}"
                model = train_on(few_shot(train, labels, seed), name, start != "scratch", seed)
                yield {
                    "net": net,
                    "start": start,
                    "labels": labels,
                    "hits": hits(model, test).numpy(),
                }


def stored_claims(table, claim):
    """What ten seeds say, for each network."""

    def runs(net, start, labels):
        rows = table[
            (table["net"] == net) & (table["start"] == start) & (table["labels"] == labels)
        ].sort_values("seed")
        return [unpack_hits(text, 1000) for text in rows["hits"]], rows["seed"].tolist()

    for net, name in (("vgg", "VGG"), ("resnet", "ResNet")):
        for labels, required in ((5, 0.80), (100, 0.93)):
            correct, seeds = runs(net, "near", labels)
            text = f"{name}, near letters, {labels} labels a class: test accuracy is {required} or more"
            claim(text, estimate(correct, seeds), rule=f"value >= {required}", origin="stored")
        for labels in SIZES:
            correct, seeds = runs(net, "far", labels)
            text = f"{name}, far letters beat from scratch at {labels} labels a class"
            claim(
                text,
                compare(correct, runs(net, "scratch", labels)[0], seeds),
                rule="low > 0",
                origin="stored",
            )
        text = f"{name}, near letters beat far letters at 5 labels a class"
        correct, seeds = runs(net, "near", 5)
        claim(
            text,
            compare(correct, runs(net, "far", 5)[0], seeds),
            rule="low > 0",
            origin="stored",
        )
        gains = {}
        for labels in (5, 100):
            near, scratch = runs(net, "near", labels)[0], runs(net, "scratch", labels)[0]
            gains[labels] = [a.astype(int) - b for a, b in zip(near, scratch, strict=True)]
        text = f"{name}, the gain of near letters over scratch shrinks from 5 to 100 labels a class"
        claim(text, compare(gains[5], gains[100], seeds), rule="low > 0", origin="stored")


# %% [markdown]
# The search that found the recipes, as `python tools/tune.py 00` runs it: the same grid for every start.

# %% tags=["search"]
GRID = {
    "start": ("scratch", "far", "near"),
    "net": NETS,
    "labels": (20,),  # the middle of what is shown
    "lr": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
    "steps": (150, 300),
    "seed": (900,),  # never used for a result
}


def validation_accuracy(start, net, labels, lr, steps, seed):
    """What one setting of the search is worth, on validation pictures."""
    name = f"{net}_near" if start == "scratch" else f"{net}_{start}"
    rates = {"lr": lr, "head_lr": max(lr, 1e-2), "steps": steps}
    model = train_on(few_shot(train, labels, seed), name, start != "scratch", seed, **rates)
    return hits(model, valid).float().mean().item()


# %% tags=["curves"]
def accuracy_by_labels(table):
    """Test accuracy against labels a class: a panel for each network, a line for each start, 95 % intervals."""
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.2), sharey=True, layout="constrained")
    for axis, net in zip(axes, NETS, strict=True):
        for start in STARTS:
            part = table[(table["net"] == net) & (table["start"] == start)]
            points = []
            for count in SIZES:
                rows = part[part["labels"] == count]
                found = [unpack_hits(text, 1000) for text in rows["hits"]]
                points.append(estimate(found, rows["seed"].tolist()))
            colour, values = START_COLOURS[start], [point.value for point in points]
            axis.plot(SIZES, values, "o-", color=colour, label=start)
            low, high = [point.low for point in points], [point.high for point in points]
            axis.fill_between(SIZES, low, high, color=colour, alpha=0.15, linewidth=0)
        axis.set(xscale="log", xticks=SIZES, xticklabels=SIZES, xlabel="labels a class")
        axis.set(title=net, ylim=(0, 1))
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("test accuracy")
    axes[1].legend(title="start", loc="lower right")
    return figure


# %%
table = stored("00_start_here")
show(
    accuracy_by_labels(table),
    alt="Test accuracy rises with the number of labels a class, most from scratch; near letters lie above far letters, far above scratch.",
)
stored_claims(table, claims)

# %% [markdown]
# **Explain.** Read the picture from left to right. With five labels a class the start decides. The gain shrinks as labels are
# added, but the lines do not meet: at a hundred labels a class a pretrained start is still ahead of the same number of steps
# from scratch. With few labels the source that is closer to the target (near) gives more than the one that is further away
# (far). Each of these sentences is a claim above. Lessons 01 and 05 ask what "close" means, and when transfer does nothing or
# does harm.

# %% [markdown]
# ## A picture of your own
#
# A model that only knows its test set is of little use. `classify` takes the path of any picture: the middle square is cut
# out, and from there it goes through the transform that the backbone was trained with.
#
# Put a photograph of a digit next to this notebook and call `classify("my_digit.jpg")`. A file that is no picture gets an
# answer too, in one line. The cell below saves a test picture to a file and reads it back, so that it runs without yours.


# %% tags=["bars"]
def bars(picture, probabilities):
    """A picture uint8 (3, height, width) beside the probability of each class."""
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(6, 2.6), width_ratios=(1, 2), layout="constrained"
    )
    left.imshow(picture.permute(1, 2, 0))
    left.set_axis_off()
    right.barh(list(probabilities), list(probabilities.values()), color=COLOURS["blue"])
    right.invert_yaxis()
    right.set(xlim=(0, 1), xlabel="probability")
    return figure


# %%
def probabilities_of(picture):
    """Class probabilities of one picture uint8 (3, height, width)."""
    with torch.inference_mode():
        logits = transferred(transferred.transform(picture.to(device))[None])
    best = logits.softmax(dim=1)[0].sort(descending=True)
    return {
        few.classes[int(index)]: float(value)
        for value, index in zip(best.values[:10], best.indices[:10], strict=True)
    }


def classify(path):
    """Show a picture file and what the transferred network takes it for."""
    picture = read_picture(path, profile.side)
    answer = probabilities_of(picture)
    show(
        bars(picture, dict(sorted(answer.items()))),
        alt="A picture beside the probability of each class.",
    )
    return next(iter(answer))


own = Path(OUT) / "a_test_picture.png"
own.parent.mkdir(parents=True, exist_ok=True)
write_png(test[0][0], str(own))
print("taken for:", classify(own), "- and labelled:", test.classes[test[0][1]])

# %% [markdown]
# ### Draw one
#
# In the embedded world, draw a digit with the mouse; the bars follow when you lift the pen. The picture below is what the
# pad shows for a digit from the test set, for readers whose viewer runs no widgets. If no pad appears,
# `pip install ipycanvas` and restart.


# %% tags=["pad"]
def drawing_pad(respond, side=224):
    """A canvas for the mouse, and beside it the figure that `respond` makes of the drawing.

    The drawing is uint8 (side, side, 3), white on black. Without ipycanvas there is no pad: None.
    """
    try:
        from ipycanvas import Canvas
    except ImportError:
        return None
    layout = {"width": f"{side}px", "height": f"{side}px"}
    canvas = Canvas(width=side, height=side, sync_image_data=True, layout=layout)
    empty = np.zeros((side, side, 3), np.uint8)
    answer = ipywidgets.Image(format="png", value=as_png(respond(empty)))
    clear = ipywidgets.Button(description="Clear")
    pen = []  # where it has been since it was set down

    def wipe(_=None):
        canvas.fill_style = "black"
        canvas.fill_rect(0, 0, side, side)
        canvas.stroke_style, canvas.line_width, canvas.line_cap = "white", side / 14, "round"

    def move(x, y):
        if pen:
            canvas.stroke_line(*pen[-1], x, y)
            pen.append((x, y))

    def lift(x, y):
        pen.clear()
        canvas.fill_rect(0, 0, 0, 0)  # draws nothing, but has the browser send the canvas again

    def redraw(_):
        if not pen:  # the browser sends the canvas at every move, too often to answer
            answer.value = as_png(respond(canvas.get_image_data()[..., :3]))

    canvas.on_mouse_down(lambda x, y: pen.append((x, y)))
    canvas.on_mouse_move(move)
    canvas.on_mouse_up(lift)
    canvas.on_mouse_out(lift)
    canvas.observe(redraw, "image_data")
    clear.on_click(wipe)
    wipe()
    return ipywidgets.HBox([ipywidgets.VBox([canvas, clear]), answer])


# %%
def respond(drawing):
    """The figure that answers a drawing uint8 (side, side, 3), white on black."""
    small = torch.from_numpy(drawing.copy()).permute(2, 0, 1)
    small = resize(small, [profile.side or 224] * 2, antialias=True)
    return bars(small, dict(sorted(probabilities_of(small).items())))


example = resize(test[1][0], [224, 224], antialias=True)
show(
    respond(example.permute(1, 2, 0).numpy()),
    alt="A test picture beside the probability of each class.",
)
drawing_pad(respond)

# %% [markdown]
# ## What goes wrong
#
# The most common mistake with pretrained networks gives no error message. A backbone expects its pictures in the scale in
# which it learned. In the embedded world mid-grey is 0, black −2 and white 2. Leave the transform out, and it gets up to 255.
# The code runs. Only the accuracy tells.
#
# **Predict.** How many points does the mistake cost?


# %%
def hits_without_transform(model, split):
    """The mistake: pixels from 0 to 255, straight into the network."""
    side, predicted = profile.side or 224, []
    with torch.inference_mode():
        for first in range(0, len(split), 50):
            part = [split[index][0] for index in range(first, min(first + 50, len(split)))]
            raw = torch.stack([resize(picture, [side, side]).float() for picture in part])
            predicted.append(model(raw.to(device)).argmax(dim=1).cpu())
    return (torch.cat(predicted) == split.labels).numpy()


some = test.subset(range(min(500, len(test))))
wrong = hits_without_transform(transferred, some)
cost = compare([transferred_hits[: len(some)]], [wrong], [SEED])
claims("Forgetting the backbone's transform costs more than ten points", cost, rule="low > 0.1")

# %% [markdown]
# The test that catches it asks whether the pictures that a model gets are in the range of a transform. It passes on what
# `batches` gives, and stops the mistake.


# %%
def assert_transformed(pictures):
    """Fail for pictures that did not go through a transform: those stay within a few units of zero."""
    assert pictures.abs().max() <= 10, "these pictures did not go through model.transform"


good, _ = next(iter(batches(few, transferred.transform).epoch(0)))
assert_transformed(good)
try:
    assert_transformed(few[0][0].float())
except AssertionError as error:
    print("caught:", error)

# %% [markdown]
# In this course a backbone carries its transform, and `batches` cannot be called without one. That makes the mistake harder
# to make.

# %% [markdown]
# ## Exercises
#
# An exercise is a stub and a `check`. A check says one of three things: *correct*, *not yet* (and why), or *not attempted*.
# Replace the dots and run both cells. `hint("00.1")` gives a nudge, and `solution("00.1")` shows one way to do it.
#
# ### 00.1 · Accuracy
#
# Write the measure that this lesson uses: the share of pictures whose largest logit is that of their class.


# %% tags=["exercise-00.1"]
def my_accuracy(logits, labels):
    """logits: float (n, classes); labels: int (n,). Returns a float in [0, 1]."""
    # <solution>
    return (logits.argmax(dim=1) == labels).float().mean().item()
    # <stub>
    # return ...
    # </stub>


# %% tags=["check-00.1", "nbval-check-output"]
check("00.1", my_accuracy)

# %% tags=["nbval-check-output"]
hint("00.1")

# %% [markdown]
# ### 00.2 · How much of the error is gone?
#
# From .50 to .60 and from .90 to .95 are different things: the first removes a fifth of the errors, the second half of them.
# Write the share of from-scratch *errors* that transfer removes. If transfer does harm, the share is negative. If there were
# no errors to remove, return `float("nan")`.


# %% tags=["exercise-00.2"]
def errors_removed(scratch_accuracy, transferred_accuracy):
    """Two floats in [0, 1]. Returns the share of errors removed."""
    # <solution>
    errors = 1 - scratch_accuracy
    return (transferred_accuracy - scratch_accuracy) / errors if errors > 0 else float("nan")
    # <stub>
    # return ...
    # </stub>


# %% tags=["check-00.2", "nbval-check-output"]
check("00.2", errors_removed)

# %% [markdown]
# ## The claims of this lesson
#
# What this run found, in one table. *live* was measured just now; *stored* comes from ten seeds.

# %%
found = claims.table()
show_table(found[["claim", "value", "low", "high", "n", "rule", "holds", "origin"]].round(3))

# %% [markdown]
# ## Further reading
#
# - Yosinski, Clune, Bengio, Lipson (2014), *How transferable are features in deep neural networks?* Which layers carry over.
# - Kornblith, Shlens, Le (2019), *Do better ImageNet models transfer better?* Source accuracy against target accuracy.
# - Ganin et al. (2016), *Domain-adversarial training of neural networks.* Where MNIST-M comes from.
#
# **Next:** lesson 01 asks *why* this works, and shows where it does not.
