# %% [markdown]
# ## The question
#
# A network that has learned printed letters learns handwritten digits sooner. Why should it? And would it also learn
# textures, or faces, sooner? Or could what it knows stand in its way?
#
# Below are rows of pictures: a source task first, if the profile shows one, then the targets. Look at them and guess, before
# anything is computed, for which target the source will help most.

# %% tags=["parameters"]
PROFILE: str = "embedded"  # [embedded | imagenet] the world; the second needs a network
SEED: int = 0  # moves the few-shot subset, the head, the order and the augmentation
DEVICE: str = "auto"  # [auto | cpu | cuda | mps] where to train
OUT: str = "../build/01"  # where results go
LABELS: int = 5  # labels a class in the live runs
STEPS: int = 120  # training steps in the live runs; stored runs take 200

# %% tags=["setup"]
from functools import cache

import matplotlib.pyplot as plt
import numpy as np
import skimage.data
import torch
from PIL import Image

from course_utils.backbones import Classifier, load_backbone
from course_utils.data import augmentation, batches, few_shot, load_target, mnist_m
from course_utils.data.letters import letters
from course_utils.data.splits import generator, stack
from course_utils.evaluate import accuracy, hits
from course_utils.evidence import Claims, compare, estimate, stored, unpack_hits
from course_utils.exercises import check, hint, solution  # noqa: F401
from course_utils.plots import COLOURS, chooser, picture_grid, show, show_table
from course_utils.profile import get_profile, pick_device
from course_utils.training import adamw, fit

profile = get_profile(PROFILE)
device = pick_device(DEVICE)
claims = Claims("01_why_transfer_works", OUT)

# %% [markdown]
# Three targets of the embedded world, cut from what pip has installed. They differ in how far they are from letters: digits
# are other symbols; textures have no symbols at all; faces are things. (What is "not a face" are pieces of background, cut from the same kind
# of photographs as the faces.)

# %% tags=["evidence"]
TEXTURES = ("brick", "grass", "gravel")
BANDS = {
    "train": (0, 200),
    "valid": (200, 300),
    "test": (300, 512),
}  # columns of each photograph


def textures(split, count):
    """Patches of three photographs; splits never share a pixel, and brightness says nothing."""
    drawn = []
    for index in range(count):
        rng, label = generator("textures", split, index, 0), index % 3
        left, right = BANDS[split]
        photograph = getattr(skimage.data, TEXTURES[label])()[:, left:right]
        side = int(rng.integers(32, 65))
        top = int(rng.integers(photograph.shape[0] - side + 1))
        start = int(rng.integers(photograph.shape[1] - side + 1))
        square = Image.fromarray(photograph[top : top + side, start : start + side])
        grey = np.asarray(square.resize((32, 32), Image.Resampling.BILINEAR), float)
        grey = (grey - grey.mean()) / grey.std() * rng.uniform(15, 60) + rng.uniform(80, 176)
        grey = grey.clip(0, 255).astype(np.uint8)
        drawn.append((np.repeat(grey[..., None], 3, axis=2), label))
    return stack(drawn, TEXTURES)


def faces(split):
    """The 100 faces and 100 other pictures of scikit-image's lfw_subset, 25 × 25 enlarged to 32 × 32."""
    grey = (skimage.data.lfw_subset() * 255).astype(np.uint8)
    order = np.random.default_rng(20261121).permutation(100)
    part = {"train": order[:30], "valid": order[30:50], "test": order[50:]}[split]
    drawn = []
    for index in part:
        for label, first in enumerate((100, 0)):  # the faces come first in the file
            large = Image.fromarray(grey[first + index]).resize(
                (32, 32), Image.Resampling.BILINEAR
            )
            drawn.append((np.repeat(np.asarray(large)[..., None], 3, axis=2), label))
    return stack(drawn, ("other", "face"))


@cache
def load_task(task, split):
    """A target task of the embedded world."""
    if task == "textures":
        return textures(split, 600 if split == "test" else 300)
    return faces(split) if task == "faces" else mnist_m(split)


# %%
target_name = profile.target
train, valid, test = (load_target(profile, split) for split in ("train", "valid", "test"))
rows = {f"target: {target_name}": test}
if PROFILE == "embedded":
    rows = {
        "source: letters": letters("near", "valid", 10),
        "target: digits on photographs": test,
    }
rows |= {"target: textures": textures("test", 10), "target: face or not": faces("test")}
show(
    picture_grid(rows),
    alt="Rows of example pictures, one for the source task and one for each target task.",
)

# %% [markdown]
# ## Words and symbols
#
# A picture is $x$, its label $y$. A **domain** $\mathcal{D}$ says which pictures there are: the set $\mathcal{X}$ in which they lie, and
# how probable each is, $p(x)$. A **task** $\mathcal{T}$ says what is asked of them: the labels $\mathcal{Y}$, and how they
# follow from pictures, $p(y \mid x)$. The **source** is $(\mathcal{D}_S, \mathcal{T}_S)$, the **target** $(\mathcal{D}_T, \mathcal{T}_T)$.
#
# **Transfer learning** uses what was learned from the source to do better on the target, where the two differ in domain,
# in task, or in both (Pan and Yang 2010). "Better" needs a yardstick: the same network, the same few target labels, the same
# care, *without* the source. Write $a_T$ for target accuracy. Then the gain is
#
# $$g = a_T(\text{with source}) - a_T(\text{without}).$$
#
# Transfer *helps* where $g > 0$, and is **negative transfer** where $g < 0$. Where the interval of $g$ holds zero and is narrow, it
# *does nothing* that matters; where it holds zero and is wide, we cannot tell.
#
# | situation | $p(x)$ | $\mathcal{Y}$ | what differs |
# |---|---|---|---|
# | fruit in a studio → the same fruit through a telephone | differs | same | domain |
# | birds: which species → the same photographs: sitting or flying | same | differs | task |
# | photographs of cars → drawings of houses | differs | differs | domain and task |
#
# Some words in popular articles do not hold. Here is what to say instead.
#
# | you may read | what is so | where you see it |
# |---|---|---|
# | "copied parameters overfit" | they are a starting point; on few labels the gap between training and test shrinks | below, measured |
# | "source and target must be homomorphic" | no such condition exists; what counts is whether the features that the source taught are of use | three targets below |
# | "more pretraining is always better" | a source can do harm | below, measured |
# | "adversarial training adapts to a domain" | *adversarial adaptation* aligns two domains; *adversarial training* hardens a network against small changes of pixels | lessons 09 and 10 |

# %% [markdown]
# ## What the layers know
#
# A network is a chain of layers. Each turns its input into **feature maps**: pictures of where something was found. The
# pictures get smaller along the way, and the number of maps grows. Of each size we take the last maps before they are made
# smaller.
#
# **Predict.** What will the first filters of a trained network look like, beside those of a network that has learned nothing?


# %%
POOLING = (torch.nn.MaxPool2d, torch.nn.AdaptiveAvgPool2d)


def maps_by_side(backbone, pictures):
    """The last feature maps of each size, {side: (n, channels, side, side)}, of transformed pictures."""
    maps, hooks = {}, []

    def keep(module, inputs, output):
        if output.dim() == 4 and not isinstance(module, POOLING):
            maps[output.shape[-1]] = output

    for module in backbone.modules():
        if not list(module.children()):
            hooks.append(module.register_forward_hook(keep))
    with torch.inference_mode():
        backbone.eval()(pictures)
    for hook in hooks:
        hook.remove()
    return maps


torch.manual_seed(SEED)
networks = {
    "trained": load_backbone(profile.backbones["resnet"]).to(device),
    "random": load_backbone(profile.backbones["resnet"], pretrained=False).to(device),
}
figure, axes = plt.subplots(2, 16, figsize=(8, 1.6), gridspec_kw={"hspace": 0.6})
for row, (name, network) in zip(axes, networks.items(), strict=True):
    first = next(m for m in network.modules() if isinstance(m, torch.nn.Conv2d)).weight.detach()
    row[0].set_title(f"{name}: first 16 filters", loc="left", fontsize=9)
    for axis, weight in zip(row, first.cpu(), strict=False):
        low, high = weight.min(), weight.max()
        axis.imshow(((weight - low) / (high - low)).permute(1, 2, 0))
        axis.set_axis_off()
show(figure, alt="First filters: the trained ones show edges and blobs, the random ones noise.")

# %% [markdown]
# **Explain.** Nine pixels are little room. Yet many trained filters have a light and a dark side, and answer to an edge, or they are of
# one colour, and answer to that. The random ones are noise. (In the `imagenet` profile the filters are larger, and it is plainer to
# see.) Edges and colours are of use for almost any picture: early layers know little about the task and much about pictures.
#
# Further up, the maps answer to larger things. Here is one picture on its way through the trained network.

# %%
one = networks["trained"].transform(test[0][0][None].to(device))
stages = maps_by_side(networks["trained"], one)
sides = [side for side in sorted(stages, reverse=True) if side >= 2][:5]
size = (8, 1.3 * len(sides))
figure, axes = plt.subplots(len(sides), 8, figsize=size, gridspec_kw={"hspace": 0.3})
for row, side in zip(axes, sides, strict=True):
    maps = stages[side][0].cpu()
    busiest = maps.flatten(1).std(dim=1).argsort(descending=True)[:8]
    row[0].set_title(
        f"{side} × {side} pixels, {len(maps)} maps: the 8 that vary most",
        loc="left",
        fontsize=9,
    )
    for axis, number in zip(row, busiest, strict=True):
        axis.imshow(maps[number], cmap="cividis")
        axis.set_axis_off()
show(figure, alt="Feature maps of one picture: outlines first, then ever coarser blots.")


# %% [markdown]
# What does a layer *know*? One way to ask: do pictures that it finds alike belong together? Average each map over its
# pixels, and a picture becomes a list of numbers, its **features**. Its nearest neighbours are the pictures whose features
# point in the most similar direction. Nothing is trained for this.
#
# **Predict.** At which layer will neighbours agree most about the class: first, middle, last? In a random network too?


# %%
def features_by_side(backbone, pictures):
    """Maps averaged over their pixels, {side: (n, channels)}, for uint8 pictures."""
    size = 1600 // (profile.side or 224)  # large pictures have large maps: fewer at a time
    parts = []
    for first in range(0, len(pictures), size):
        chunk = [backbone.transform(picture) for picture in pictures[first : first + size]]
        maps = maps_by_side(backbone, torch.stack(chunk).to(device))
        parts.append({side: values.mean(dim=(2, 3)).cpu() for side, values in maps.items()})
    return {side: torch.cat([part[side] for part in parts]) for side in parts[0]}


def neighbours(features):
    """For each row of features (n, channels), all other rows from most to least alike, (n, n - 1)."""
    directions = torch.nn.functional.normalize(features - features.mean(dim=0), dim=1)
    return (
        (directions @ directions.T).fill_diagonal_(-2).argsort(dim=1, descending=True)[:, :-1]
    )


some = valid.subset(np.random.default_rng(SEED).permutation(len(valid))[:300])
looked_at = [some[i][0] for i in range(len(some))]
ranked = {name: {} for name in networks}
for name, network in networks.items():
    for side, values in features_by_side(network, looked_at).items():
        ranked[name][side] = neighbours(values)


def agrees(order):
    """Whether the nearest neighbour of each picture has its class, bool (n,)."""
    return (some.labels[order[:, 0]] == some.labels).numpy()


sides = sorted(ranked["trained"], reverse=True)
figure, axis = plt.subplots(figsize=(6, 3), layout="constrained")
for name, colour in (("trained", COLOURS["blue"]), ("random", COLOURS["black"])):
    points = [estimate([agrees(ranked[name][side])], [SEED]) for side in sides]
    axis.plot(range(len(sides)), [p.value for p in points], "o-", color=colour, label=name)
    low, high = [p.low for p in points], [p.high for p in points]
    axis.fill_between(range(len(sides)), low, high, color=colour, alpha=0.15, linewidth=0)
axis.set(xticks=range(len(sides)), xticklabels=sides, ylim=(0, 1))
axis.set(xlabel="side of the maps in pixels, from input to output", ylabel="neighbour agrees")
axis.legend()
show(
    figure,
    alt="Agreement of nearest neighbours by layer: it rises towards the output if trained.",
)

# %%
deep, shallow = agrees(ranked["trained"][sides[-1]]), agrees(ranked["trained"][sides[0]])
claims(
    "In the trained network, the last maps' neighbours agree more than the first maps'",
    compare([deep], [shallow], [SEED]),
    rule="low > 0.1",
)
claims(
    "At the last maps, the trained network's neighbours agree more than a random network's",
    compare([deep], [agrees(ranked["random"][sides[-1]])], [SEED]),
    rule="low > 0.1",
)

# %% [markdown]
# **Explain.** At the last maps, neighbours are often of the same class, though the network was never told what these classes are: what
# its source asked of it is of use here too. At the first maps that is rare. In the random network it is rare to the end.
#
# And what do neighbours at the first maps have in common? Move through the layers yourself. On the left stand three pictures, beside
# them their nearest neighbours.


# %%
def neighbours_at(side):
    """Three pictures, each beside its six nearest neighbours at one layer."""
    figure, axes = plt.subplots(3, 7, figsize=(6, 2.8), layout="constrained")
    for row, query in zip(axes, range(3), strict=True):
        shown = [query, *ranked["trained"][side][query, :6].tolist()]
        for axis, index in zip(row, shown, strict=True):
            axis.imshow(looked_at[index].permute(1, 2, 0))
            axis.set(xticks=[], yticks=[])
            same = some.labels[index] == some.labels[query]
            axis.set_xlabel("same class" if same else "other", fontsize=7)
    return figure


show(neighbours_at(sides[-1]), alt="Three pictures, each beside its six nearest neighbours.")
chooser("maps of side", sides, neighbours_at)

# %% [markdown]
# ## Help, nothing, harm
#
# Now the yardstick. Five networks of one shape, a ResNet, start from different knowledge:
#
# | start | has learned | from |
# |---|---|---|
# | scratch | nothing | – |
# | near | 52 letters, half of them blended as MNIST-M is | 40,000 pictures with labels |
# | far | 52 letters, opaque | 40,000 pictures with labels |
# | photos | to find, among many, the other view of a photo patch | 30,000 patches without labels |
# | shuffled | the near letters' labels, dealt out anew at random | the same pictures as near |
#
# The last one is a control. It saw every picture that *near* saw, for as many steps; only what it was told makes no sense. (*Photos*
# was trained for a third as many epochs as the others. It shows what such a source brings here, not the best of its kind.)
#
# Each start gets its own learning rate for each target: six rates, two seeds that are used for nothing else, validation pictures.
# That is what "the same care" means, and `python tools/tune.py 01` repeats it.

# %% tags=["evidence"]
STARTS = ("scratch", "near", "far", "photos", "shuffled")
RECIPES = {
    "digits": {"scratch": 3e-2, "near": 3e-4, "far": 1e-3, "photos": 1e-1, "shuffled": 1e-1},
    "textures": {"scratch": 3e-3, "near": 3e-3, "far": 3e-3, "photos": 1e-1, "shuffled": 3e-2},
    "faces": {"scratch": 3e-4, "near": 1e-3, "far": 1e-3, "photos": 1e-2, "shuffled": 1e-2},
}


def fine_tune(few, backbone, lr, seed, steps):
    """Train a backbone and a new head on a few labelled pictures: the whole experiment."""
    model = Classifier(backbone, len(few.classes)).to(device)
    augment = augmentation(**profile.augmentation)
    data = batches(
        few, model.transform, size=32, steps=steps, augment=augment, seed=seed, device=device
    )
    fit(model, data, optimizer=adamw(lr, head_lr=1e-2))
    return model


def trained_from(start, task, seed, lr=None):
    """A ResNet fine-tuned on five labels a class of a task of the embedded world."""
    few = few_shot(load_task(task, "train"), 5, seed)
    torch.manual_seed(seed)
    name = "near" if start == "scratch" else start
    backbone = load_backbone(f"resnet_{name}", pretrained=start != "scratch")
    return fine_tune(few, backbone, lr or RECIPES[task][start], seed, steps=200), few


# %% tags=["search"]
GRID = {
    "task": ("digits", "textures", "faces"),
    "start": STARTS,
    "lr": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    "seed": (900, 901),  # never used for a result
}


def validation_accuracy(task, start, lr, seed):
    """What one setting of the search is worth, on validation pictures."""
    model, _ = trained_from(start, task, seed, lr)
    return accuracy(model, load_task(task, "valid"))


# %% [markdown]
# First one seed, live, on digits with few labels. **Predict.** Rank the starts. Where does *shuffled* come: with near, with scratch,
# or below both?

# %%
few = few_shot(train, LABELS, seed=SEED)
starts = {"scratch": (profile.backbones["resnet"], False)}
starts["near" if PROFILE == "embedded" else "ImageNet"] = (profile.backbones["resnet"], True)
if PROFILE == "embedded":
    starts["shuffled"] = ("resnet_shuffled", True)
live, models = {}, {}
for start, (name, pretrained) in starts.items():
    torch.manual_seed(SEED)
    rate = RECIPES["digits"].get(start, 1e-3)
    models[start] = fine_tune(few, load_backbone(name, pretrained), rate, SEED, STEPS)
    live[start] = hits(models[start], test).numpy()
    print(f"{start:10} {estimate([live[start]], [SEED])}")
best_start = list(starts)[1]
claims(
    f"Transfer helps: {best_start} beats scratch at {LABELS} labels a class",
    compare([live[best_start]], [live["scratch"]], [SEED]),
    rule="low > 0",
)

# %% [markdown]
# One seed is one draw of a few pictures. The next cell has the stored evidence: ten seeds, five starts, three targets,
# five labels a class. Recompute it with `python tools/evidence.py 01 --seeds 100..109 --out DIR`.
#
# **Predict.** For each target, which starts help, and which do harm?

# %% tags=["evidence"]
BACKBONES = ("resnet_far", "resnet_near", "resnet_photos", "resnet_shuffled")


def experiment(seed):
    """Test hits and training accuracy of each start on each target."""
    for task in RECIPES:
        for start in STARTS:
            model, few = trained_from(start, task, seed)
            found = hits(model, load_task(task, "test")).numpy()
            row = {"task": task, "start": start, "pictures": len(found)}
            yield row | {"train": accuracy(model, few), "hits": found}


def runs(table, task, start):
    """Test hits by seed, the accuracies on the training pictures, and the seeds."""
    rows = table[(table["task"] == task) & (table["start"] == start)].sort_values("seed")
    found = [unpack_hits(*pair) for pair in zip(rows["hits"], rows["pictures"], strict=True)]
    return found, rows["train"].tolist(), rows["seed"].tolist()


def gain(table, task, start):
    """Accuracy gained over the start from scratch, paired by seed and picture."""
    found, _, seeds = runs(table, task, start)
    return compare(found, runs(table, task, "scratch")[0], seeds)


def stored_claims(table, claim):
    """What ten seeds say."""
    verdicts = {
        "Near letters help digits: over 30 points": ("digits", "near", "low > 0.3"),
        "Far letters help digits: over 25 points": ("digits", "far", "low > 0.25"),
        "Photo patches change accuracy on digits by less than ten points, if at all": (
            "digits",
            "photos",
            "low > -0.1 and high < 0.1",
        ),
        "Shuffled letters harm digits: over five points": (
            "digits",
            "shuffled",
            "high < -0.05",
        ),
        "Near letters help textures: over three points": ("textures", "near", "low > 0.03"),
        "Far letters help textures: over three points": ("textures", "far", "low > 0.03"),
        "Near letters change accuracy on faces by less than ten points, if at all": (
            "faces",
            "near",
            "low > -0.1 and high < 0.1",
        ),
    }
    for text, (task, start, rule) in verdicts.items():
        claim(text, gain(table, task, start), rule=rule, origin="stored")


# %%
table = stored("01_why_transfer_works")
figure, axes = plt.subplots(1, 3, figsize=(8, 2.6), sharey=True, layout="constrained")
for axis, task in zip(axes, RECIPES, strict=True):
    for height, start in enumerate(STARTS[1:]):
        point = gain(table, task, start)
        colour = (
            COLOURS["blue"] if point.low > 0 else COLOURS["red" if point.high < 0 else "black"]
        )
        axis.plot([100 * point.low, 100 * point.high], [height] * 2, color=colour)
        axis.plot(100 * point.value, height, "o", color=colour)
    axis.axvline(0, color=COLOURS["black"], linewidth=0.8)
    scratch = estimate(*[runs(table, task, "scratch")[i] for i in (0, 2)])
    axis.set(
        yticks=range(4), yticklabels=STARTS[1:], title=f"{task} (scratch: {scratch.value:.2f})"
    )
    axis.set_xlabel("points gained over scratch")
show(
    figure, alt="Gain of each start over scratch on digits, textures and faces, with intervals."
)
stored_claims(table, claims)

# %% [markdown]
# **Explain.** All three outcomes are there. The letters *help* digits, and near ones most. The
# photo patches *do nothing* for digits that ten seeds could tell from zero. And the shuffled letters do *harm*: a random start is better than
# one that has learned nonsense. The pictures were the same as near's, and so was the number of steps. So it is not the pictures alone
# that help; it is what was asked of them.
#
# Textures are further away, and yet both letters help: strokes and textures share edges. Near is no better than far there, since blending has nothing to
# do with gravel. On faces there is little to see: from scratch the network is right on almost all of them already. Where nothing is left to gain, no source
# can show what it is worth.
#
# (The best rates were taken from the search as they came. Some lie at an end of the grid, where neighbouring rates do nearly as well:
# `data/evidence/01_recipes.csv` has all of them.)

# %% [markdown]
# ## "Copied parameters overfit"
#
# So one can read. **Overfitting** is a gap: accuracy on the training pictures minus accuracy on new ones. **Predict.** On fifty
# digits, whose gap is larger: that of the network that starts from letters, or of the one that starts from nothing? Which of the two
# learns its training pictures by heart?


# %%
def gaps(start):
    """Training accuracy minus test hits on digits, one array (1000,) a seed."""
    found, trained, _ = runs(table, "digits", start)
    pairs = zip(trained, found, strict=True)
    return [on_training - on_test for on_training, on_test in pairs]


seeds_stored = runs(table, "digits", "near")[2]
for start in ("scratch", "near"):
    print(f"{start:8} training accuracy {np.mean(runs(table, 'digits', start)[1]):.3f}")
claims(
    "On five digits a class, the gap between training and test is smaller from near letters than from scratch",
    compare(gaps("near"), gaps("scratch"), seeds_stored, "gap"),
    rule="high < -0.2",
    origin="stored",
)

# %% [markdown]
# **Explain.** Both know their training pictures by heart. So the gap is what each gets wrong on new ones, and the copied parameters
# narrow it: what they know already has not to be guessed from fifty pictures.

# %% [markdown]
# ## What goes wrong: the weights that never arrived
#
# A file of weights names its tensors. If the names differ from the network's, by a prefix such as `module.`, PyTorch complains.
# Then somebody adds `strict=False`, and the complaint is gone. So are the weights: *nothing* was loaded. The code runs. The
# conclusion: "transfer does nothing for us".
#
# **Predict.** How many points does this one argument cost?

# %%
state = {
    f"module.{key}": value
    for key, value in load_backbone(profile.backbones["resnet"]).state_dict().items()
}
torch.manual_seed(SEED)
empty = load_backbone(profile.backbones["resnet"], pretrained=False)
empty.load_state_dict(state, strict=False)
mistaken = fine_tune(few, empty, RECIPES["digits"]["near"], SEED, STEPS)
claims(
    f"Weights that never arrived cost more than ten points at {LABELS} labels a class",
    compare([live[best_start]], [hits(mistaken, test).numpy()], [SEED]),
    rule="low > 0.1",
)

# %% [markdown]
# The test that catches it looks at what `load_state_dict` returns, and stops where a name was left over. In exercise 01.5 you
# write a stricter one.


# %%
def assert_all_loaded(answer):
    """Fail where tensors were missing or left over. answer: what load_state_dict returned."""
    assert not answer.missing_keys, f"{len(answer.missing_keys)} tensors got no value"
    assert not answer.unexpected_keys, f"{len(answer.unexpected_keys)} tensors were left over"


fresh = load_backbone(profile.backbones["resnet"], pretrained=False)
renamed = {key.removeprefix("module."): value for key, value in state.items()}
assert_all_loaded(fresh.load_state_dict(renamed))
try:
    assert_all_loaded(fresh.load_state_dict(state, strict=False))
except AssertionError as error:
    print("caught:", error)

# %% [markdown]
# In this course `load_backbone` is always strict, and checks the file's SHA-256 besides.

# %% [markdown]
# ## A map of the field
#
# Which part of the field is yours? It depends on what you have, and on what you may assume.
#
# | you have | and you assume | then it is called | lessons |
# |---|---|---|---|
# | a pretrained network, some target labels | source features are of use | **linear probe**, **fine-tuning** | 03 to 06 |
# | several pretrained networks | they know different things | **feature-level fusion**, late fusion | 07 |
# | source labels, target pictures *without* labels | same task, other domain | **domain adaptation** | 08, 09 |
# | very few labels a class, many earlier tasks | tasks resemble each other | **few-shot learning**, **meta-learning** | 00 and 05 touch them |
# | a large network that is good, a small one that should be | the large one's doubts are informative | **distillation** | 07, 13 |
#
# Lesson 10 is about adversarial *robustness*, which only sounds like a relative. Lessons 11 to 13 make training faster and models smaller. Lesson 02, before
# all of them, asks how you know that a number is true.

# %% [markdown]
# ## Exercises
#
# ### 01.1 · What differs?
#
# Five situations, source on the left of the arrow, target on the right. Write `"domain"`, `"task"` or `"both"` in place of the
# dots. The domain differs where $p(x)$ does: pictures that are likely on one side are not on the other. The task differs where
# the labels do, or how they follow from a picture.

# %% tags=["exercise-01.1"]
# <solution>
what_differs = {
    "plain digits -> digits on photographs": "domain",
    "cat or dog -> which breed, same photographs": "task",
    "letters on photographs -> digits on photographs": "both",
    "photographs by day -> photographs by night, same classes": "domain",
    "X-rays: which bone -> the same X-rays: broken or not": "task",
}
# <stub>
# what_differs = {
#     "plain digits -> digits on photographs": ...,
#     "cat or dog -> which breed, same photographs": ...,
#     "letters on photographs -> digits on photographs": ...,
#     "photographs by day -> photographs by night, same classes": ...,
#     "X-rays: which bone -> the same X-rays: broken or not": ...,
# }
# </stub>

# %% tags=["check-01.1", "nbval-check-output"]
check("01.1", what_differs)

# %% [markdown]
# ### 01.2 · Nearest neighbours
#
# Find the `k` rows of `features` whose direction is most like that of one row, the query. The measure is the cosine: the dot
# product of two rows, each divided by its length. The query is most like itself, so it does not count. Here the rows are taken
# as they are; `neighbours` above took their mean off first.


# %% tags=["exercise-01.2"]
def nearest(features, query, k):
    """features: float (n, channels); query: the index of a row; k: at most n - 1.

    Returns k indices of other rows, shape (k,), the most similar one first.
    """
    # <solution>
    directions = torch.nn.functional.normalize(features, dim=1)
    similarity = directions @ directions[query]
    similarity[query] = -2  # less than any cosine
    return similarity.argsort(descending=True)[:k]
    # <stub>
    # return ...
    # </stub>


# %% tags=["check-01.2", "nbval-check-output"]
check("01.2", nearest)

# %% [markdown]
# ### 01.3 · What a layer knows, in one number
#
# Give every row the label of its nearest neighbour, by cosine as in 01.2. How often is that its own label? Nothing is trained:
# each row is tested against all the others. This is called leave-one-out.


# %% tags=["exercise-01.3"]
def neighbour_accuracy(features, labels):
    """features: float (n, channels); labels: int (n,). Returns a float in [0, 1]."""
    # <solution>
    directions = torch.nn.functional.normalize(features, dim=1)
    similarity = (directions @ directions.T).fill_diagonal_(-2)
    return (labels[similarity.argmax(dim=1)] == labels).float().mean().item()
    # <stub>
    # return ...
    # </stub>


# %% tags=["check-01.3", "nbval-check-output"]
check("01.3", neighbour_accuracy)

# %% [markdown]
# ### 01.4 · Help, harm, or neither
#
# You have the 95 % interval of a gain, from `low` to `high`. Say what it shows. An interval that holds 0, or touches it, shows
# neither help nor harm.


# %% tags=["exercise-01.4"]
def verdict(low, high):
    """Two floats, low <= high. Returns "helps", "harms" or "cannot tell"."""
    # <solution>
    if low > 0:
        return "helps"
    return "harms" if high < 0 else "cannot tell"
    # <stub>
    # return ...
    # </stub>


# %% tags=["check-01.4", "nbval-check-output"]
check("01.4", verdict)

# %% [markdown]
# ### 01.5 · Did the weights arrive?
#
# `model.load_state_dict(state, strict=False)` loads the tensors whose names fit and passes over the rest. If every name begins
# with `module.`, as networks saved from several GPUs have it, it loads nothing. No error is raised, and "transfer" is compared
# with scratch by training scratch twice.
#
# Write the test that catches this. It says `True` only where `state` and `model.state_dict()` have the same names, and the
# same tensor under each: shapes, values, and buffers such as the running means of BatchNorm as well.


# %% tags=["exercise-01.5"]
def weights_arrived(model, state):
    """model: a torch.nn.Module; state: dict, name to tensor. Returns True or False."""
    # <solution>
    own = model.state_dict()
    if own.keys() != state.keys():
        return False
    return all(torch.equal(own[name].cpu(), state[name].cpu()) for name in own)
    # <stub>
    # return ...
    # </stub>


# %% tags=["check-01.5", "nbval-check-output"]
check("01.5", weights_arrived)

# %% [markdown]
# ## The claims of this lesson

# %%
found = claims.table()
show_table(found[["claim", "value", "low", "high", "n", "rule", "holds", "origin"]].round(3))

# %% [markdown]
# ## Further reading
#
# - Pan and Yang (2010), *A survey on transfer learning.* Domain, task, and the symbols used here.
# - Yosinski, Clune, Bengio, Lipson (2014), *How transferable are features in deep neural networks?* Layer by layer.
# - Wang, Dai, Póczos, Carbonell (2019), *Characterizing and avoiding negative transfer.* When the source does harm.
# - Zhang, Bengio, Hardt, Recht, Vinyals (2017), *Understanding deep learning requires rethinking generalization.* Shuffled
#   labels, learned by heart.
#
# **Next:** lesson 02 is about the data, and about numbers that one can trust.
