# %% [markdown]
# ## The question
#
# Over thirteen lessons our models have grown. The best of them fuses two networks (lesson 07), and a prediction costs what
# both of them cost. Now it has to go where a prediction must be quick and the disk is small. How much smaller and faster can it
# become, and what accuracy does that cost?
#
# One model goes all the way here, and each step is held against the one before:
#
# | step | what it does | what it takes away |
# |---|---|---|
# | the **teacher** | two networks, VGG and ResNet, fused and fine-tuned on few labels | |
# | **distillation** | one network, the **student**, learns to say what the teacher says | a whole network |
# | **pruning** | filters that matter least are cut out, in rounds, with training in between | filters |
# | **eight bits** | weights and maps become whole numbers of eight bits | three bytes in four |
# | **ONNX Runtime** | the model becomes a file that runs without PyTorch | PyTorch |
#
# At each step we ask four things. How accurate is it? How many bytes has its file? How long does one picture take? And how much
# memory?

# %% tags=["parameters"]
PROFILE: str = "embedded"  # [embedded | imagenet] the world; the second needs a network
SEED: int = 0  # moves the few-shot subset, the head, the order and the augmentation
DEVICE: str = "auto"  # [auto | cpu | cuda | mps] where to train
OUT: str = "../build/13"  # where results go
NETS: str = "vgg+resnet"  # the teacher's networks; the student is always a small VGG
STEPS: int = 30  # training steps of each live stage; stored runs take more
POOL: int = 1000  # training pictures without labels that the student learns from, 32 to 2000
TESTED: int = 300  # test pictures of the live runs, at most 1000; stored runs take all
RUNS: int = 60  # turns of every timing

# %% tags=["setup"]
import copy
import json
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from functools import lru_cache
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from course_utils.backbones import Backbone, Classifier, load_backbone
from course_utils.data import augmentation, batches, few_shot, mnist_m
from course_utils.data.splits import Split
from course_utils.evaluate import hits, predict
from course_utils.evidence import Claims, compare, estimate, over_seeds, stored, unpack_hits
from course_utils.exercises import check, hint, solution  # noqa: F401
from course_utils.export import ExportError, export_onnx, quantise, session
from course_utils.fusion import Branches, Fusion
from course_utils.plots import COLOURS, chooser, show, show_table
from course_utils.profile import get_profile, pick_device
from course_utils.training import adamw, fit

profile = get_profile(PROFILE)
device = pick_device(DEVICE)
claims = Claims("13_smaller_and_faster", OUT)
train, valid, test = (mnist_m(split) for split in ("train", "valid", "test"))
extras = all(find_spec(name) for name in ("onnx", "onnxruntime", "onnxscript"))
GET_EXTRAS = (
    "Skipped: ONNX is not installed. In the course's folder: python -m pip install -e .[export]"
)
folder = Path(OUT)
if not extras:
    print(GET_EXTRAS)
if PROFILE != "embedded":
    print(
        "The digits and the student are the same in this world. Only the teacher's networks differ."
    )

# %% [markdown]
# The pictures are MNIST-M, 2,000 for training. Half of them have labels, a hundred a class; the other half comes without. The
# test pictures are used for reports alone.
#
# ## A teacher
#
# `Branches` and `Fusion` are lesson 07's: two networks side by side, one head on top. The live teacher gets few
# steps; the stored runs below give it more.


# %% tags=["evidence"]
BACKBONES = ("vgg_near", "resnet_near")
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)  # what is searched for each arm
RUN_STEPS = {"teacher": 150, "student": 150, "round": 100, "last round": 400}
TUNE_STEPS = 150  # of both arms of the search
LABELS = 100  # labels a class: every other training picture comes without
TEMPERATURE, ALPHA = 2.0, 0.9
KEEP, ROUNDS = 0.8, 2  # the share of filters that a round of pruning keeps
RECIPES = {"teacher": 3e-4, "student": 3e-3}  # rates: what the search below found


def labelled(seed):
    """Which training pictures come with a label: places int64 (n,)."""
    places = Split(torch.arange(len(train)), train.labels, train.classes)
    return few_shot(places, LABELS, seed).pictures


def learn(model, seed, steps, rate):
    """Fine-tune on the labels alone."""
    few = train.subset(labelled(seed))
    settings = {"size": 32, "steps": steps, "augment": augmentation(), "seed": seed}
    fit(
        model,
        batches(few, model.transform, device=device, **settings),
        optimizer=adamw(rate, 1e-2),
    )
    return model


class Fused(nn.Module):
    """Several backbones under a fusion's head, as in lesson 07."""

    def __init__(self, names):
        super().__init__()
        self.backbone = Branches([load_backbone(name) for name in names])
        self.head = Fusion(self.backbone.widths, len(train.classes))
        self.transform = self.backbone.transform

    def forward(self, pictures):
        return self.head(self.backbone(pictures))


def new_teacher(seed, names):
    """Networks side by side under one new head."""
    torch.manual_seed(seed)
    return Fused(names).to(device)


def new_student(seed):
    """A small VGG with a new head."""
    torch.manual_seed(seed)
    return Classifier(load_backbone("vgg_near"), len(train.classes)).to(device)


# %%
folder.mkdir(parents=True, exist_ok=True)
names = [profile.backbones.get(name, name) for name in NETS.split("+")]
shown = test.subset(range(TESTED))
teacher = learn(new_teacher(SEED, names), SEED, STEPS, RECIPES["teacher"])
print(f"the teacher: {estimate([hits(teacher, shown).numpy()], [SEED])}")

# %% [markdown]
# ## Distillation
#
# A label says "seven". A teacher says "seven, most likely, but it looks a little like a one". That is more to learn from: a
# number for every class. And a teacher can speak about pictures that *nobody* has labelled.
#
# **Predict.** Below is what the teacher says about one picture, at three temperatures. Which one would you rather learn from?

# %%
pool = train.subset(range(POOL))
logits = predict(teacher, pool)
doubtful = int(logits.softmax(dim=1).amax(dim=1).sub(0.8).abs().argmin())
figure, axes = plt.subplots(
    1, 4, figsize=(8.5, 2.4), width_ratios=(1, 1.4, 1.4, 1.4), layout="constrained"
)
axes[0].imshow(pool.pictures[doubtful].permute(1, 2, 0).numpy())
axes[0].set_axis_off()
for axis, temperature in zip(axes[1:], (1, 2, 5), strict=True):
    said = (logits[doubtful] / temperature).softmax(dim=0)
    axis.bar(range(len(said)), said.tolist(), color=COLOURS["blue"])
    axis.set(ylim=(0, 1), xticks=range(len(said)), xlabel="class", title=f"T = {temperature}")
axes[1].set_ylabel("probability")
show(
    figure,
    alt="A digit and what the teacher says about it at three temperatures: the higher it is, the flatter the bars.",
)

# %% [markdown]
# **Explain.** The **temperature** $T$ divides the logits before the softmax. At 1 the bars are the teacher's probabilities.
# Above, they are flatter, and the small ones can be seen, and learned. With $z$ for the student's logits, $v$ for the
# teacher's, $p$ for a softmax and $y$ for the label, the loss of the student is (Hinton et al. 2015)
#
# $$(1-\alpha)\,\mathrm{CE}(z, y) + \alpha\,T^2\,\mathrm{KL}\big(p(v/T)\,\|\,p(z/T)\big).$$
#
# CE is cross-entropy, and needs a label, so it counts where there is one. KL, the *Kullback–Leibler divergence*, is how far the
# student's bars are from the teacher's: $\sum_c p_c(v/T)\,\log\frac{p_c(v/T)}{p_c(z/T)}$. Why $T^2$? Flatter bars have smaller
# gradients, by about $1/T^2$, and the factor makes up for it. α shares out between the two.


# %% tags=["evidence", "by-hand"]
def distillation(teacher, labels, temperature=TEMPERATURE, alpha=ALPHA, reduction="batchmean"):
    """A step for `fit`: (1 - alpha) cross-entropy where there is a label, alpha T^2 KL to the teacher everywhere.

    teacher: its logits (n, classes) for all pictures; labels: (n,), -1 for none. A batch brings pictures and their places.
    """

    def step(model, batch, progress):
        pictures, places = batch
        logits = model(pictures)
        asked = (teacher[places] / temperature).softmax(dim=1)
        said = (logits / temperature).log_softmax(dim=1)
        soft = alpha * temperature**2 * F.kl_div(said, asked, reduction=reduction)
        if (labels[places] < 0).all():
            return {"soft": soft}
        hard = F.cross_entropy(logits, labels[places], ignore_index=-1)
        return {"soft": soft, "hard": (1 - alpha) * hard}

    return step


# %% [markdown]
# `reduction="batchmean"` is the sum over classes and the mean over pictures, as the formula has it. (Remember the word.)
#
# The student is *one* network, the small VGG from near letters. It sees the whole pool, augmented anew at each step. What the
# teacher says was computed once, for each picture as it is. That is cheap; better students see what the teacher sees, the same
# augmented picture (Beyer et al. 2022), and that costs a run of the teacher at each step.


# %% tags=["evidence"]
def taught(model, seed, teacher, steps, rate, head_rate=1e-2, pool=2000, order=0, **how):
    """Distil: learn from a teacher's logits (n, classes) on `pool` training pictures, and from the labels there are."""
    places = labelled(seed)
    labels = torch.full((len(train),), -1).scatter(0, places, train.labels[places]).to(device)
    numbers = torch.arange(len(train))
    numbered = replace(train, labels=numbers, classes=tuple(map(str, numbers.tolist())))
    data = batches(
        numbered.subset(range(pool)),
        model.transform,
        size=32,
        steps=steps,
        augment=augmentation(),
        seed=seed + 1000 * order,
        device=device,
    )
    step = distillation(teacher.to(device), labels, **how)
    fit(model, data, step=step, optimizer=adamw(rate, head_rate))
    return model


# %%
student = taught(new_student(SEED), SEED, logits, STEPS, RECIPES["student"], pool=POOL)
for name, model in {"teacher": teacher, "student": student}.items():
    print(f"{name}: {estimate([hits(model, shown).numpy()], [SEED])}")

# %% [markdown]
# ## A mask is not a cut
#
# A network has more weights than it needs. So one *prunes*: the smallest weights are set to zero. Articles say that this makes
# networks smaller and faster. Does it?
#
# Count first. The price of a layer is its **multiplications**: for each number of the output, as many as a filter has weights.


# %% tags=["evidence", "by-hand"]
def multiplications(model, picture):
    """How many multiplications one picture (1, 3, height, width) takes in convolutions and linear layers."""
    found = []

    def count(layer, given, maps):
        each = layer.weight[0].numel()  # for one number of the output
        found.append(each * maps[0].numel())

    layers = [part for part in model.modules() if isinstance(part, nn.Conv2d | nn.Linear)]
    hooks = [layer.register_forward_hook(count) for layer in layers]
    with torch.no_grad():
        model.eval()(model.transform(picture.to(device)))
    for hook in hooks:
        hook.remove()
    return sum(found)


# %% [markdown]
# Now two ways to remove a filter. The **mask** sets its weights to zero, and those of its batch norm. The **cut** takes it out:
# the convolution gets smaller, so does its batch norm, and the *next* convolution loses the input channel that came from it.
#
# Which filters? Those whose weights have the smallest sum of absolute values, the *L1 norm*, layer by layer (Li et al. 2017).


# %% tags=["evidence", "by-hand"]
def strongest(conv, keep):
    """Which filters of a convolution stay: those with the largest L1 norms, in order (Li et al. 2017)."""
    norms = conv.weight.detach().abs().sum(dim=(1, 2, 3))
    count = max(4, 4 * round(keep * len(norms) / 4))  # processors take several at once
    return norms.topk(min(count, len(norms))).indices.sort().values


def cut(model, keep):
    """A VGG with that share of its filters, the strongest: convolution, batch norm, and the inputs of what comes next."""
    chain, *rest = copy.deepcopy(model.backbone.layers)
    kept, layers = torch.arange(chain[0].in_channels), []
    for layer in chain:
        if isinstance(layer, nn.Conv2d):
            stay = strongest(layer, keep).cpu()
            smaller = nn.Conv2d(
                len(kept), len(stay), layer.kernel_size, layer.stride, layer.padding
            )
            weights = layer.weight[stay][:, kept]
            smaller.load_state_dict({"weight": weights, "bias": layer.bias[stay]})
            kept, layer = stay, smaller
        elif isinstance(layer, nn.BatchNorm2d):
            smaller = nn.BatchNorm2d(len(kept))
            own = {
                name: value[kept] if value.dim() else value
                for name, value in layer.state_dict().items()
            }
            smaller.load_state_dict(own)
            layer = smaller
        layers.append(layer)
    layers = nn.Sequential(nn.Sequential(*layers), *rest)
    backbone = Backbone(
        model.backbone.name, layers, len(kept), model.transform, model.backbone.card
    )
    smaller = Classifier(backbone, model.head.out_features)
    smaller.head.load_state_dict(
        {"weight": model.head.weight[:, kept], "bias": model.head.bias}
    )
    return smaller.to(model.head.weight.device).eval()


# %% tags=["by-hand"]
def masked(model, keep):
    """The same network with the other filters set to zero, and their batch norms."""
    model = copy.deepcopy(model).eval()
    chain = list(model.backbone.layers[0])
    for conv, norm in pairwise(chain):
        if isinstance(conv, nn.Conv2d):
            gone = torch.ones(conv.out_channels, dtype=torch.bool)
            gone[strongest(conv, keep).cpu()] = False
            with torch.no_grad():
                for values in (conv.weight, conv.bias, norm.weight, norm.bias):
                    values[gone.to(values.device)] = 0
    return model


# %% [markdown]
# **Predict.** Both keep eight filters in ten. Do they give the same logits? How many multiplications does the mask save, and
# how many the cut? And how long does one picture take?


# %% tags=["by-hand"]
def latencies(runs, turns, warmup=5):
    """p50 and p95 in milliseconds of each function of a dict. They take turns, so that a busy machine is busy for all."""
    spent = {name: [] for name in runs}
    for _ in range(warmup + turns):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            spent[name].append(1000 * (time.perf_counter() - began))
    return {name: np.percentile(own[warmup:], [50, 95]) for name, own in spent.items()}


# %%
one = train.pictures[:1]
threads = torch.get_num_threads()
torch.set_num_threads(1)  # one thread, here and in ONNX Runtime
models = {"whole": student, "masked": masked(student, KEEP), "cut": cut(student, KEEP)}
inputs = student.transform(one.to(device))
with torch.inference_mode():
    told = {
        name: model.eval()(student.transform(pool.pictures[:64].to(device)))
        for name, model in models.items()
    }
    took = latencies(
        {name: lambda model=model: model(inputs) for name, model in models.items()}, RUNS
    )
torch.set_num_threads(threads)
needs = {name: multiplications(model, one) for name, model in models.items()}
priced = [
    [
        name,
        sum(values.numel() for values in model.parameters()),
        f"{needs[name] / 1e6:.1f}",
        f"{took[name][0] / took['whole'][0]:.2f}",
    ]
    for name, model in models.items()
]
show_table(
    pd.DataFrame(
        priced, columns=["network", "parameters", "million multiplications", "p50, whole = 1"]
    )
)
claims(
    "Mask and cut give the same logits, within a thousandth",
    over_seeds([(told["masked"] - told["cut"]).abs().max().item()], [SEED], "logits"),
    rule="value < 0.001",
)
claims(
    "The mask leaves all multiplications in",
    over_seeds([needs["masked"] / needs["whole"]], [SEED], "ratio"),
    rule="value >= 1 and value <= 1",
)
claims(
    "The cut takes out a quarter of the multiplications, or more",
    over_seeds([needs["cut"] / needs["whole"]], [SEED], "ratio"),
    rule="value <= 0.75",
)

# %% [markdown]
# **Explain.** The two *are* the same function. But the mask multiplies by zero, and a multiplication by zero takes as long as
# any other: look at the last column. (The claims are by counting, which no busy machine can disturb.) Nor does the file
# shrink: a zero is a float of four bytes. A cut makes the arrays smaller, and that is less work for any library. Why a quarter
# and more, when only a fifth of the filters went? A layer in the middle loses outputs *and* inputs, so that $0.8 \times 0.8$
# are left.
#
# (There is hardware that skips zeros in fixed patterns, and there are libraries for weights that are nearly all zero. Without
# those, a mask is a note to yourself.)
#
# ## Rounds
#
# A cut hurts. What is left has to learn again, so we cut a little, distil a little, and cut again.
#
# **Predict.** How deep does the accuracy fall after a cut? Does it come back?

# %%
pruned, heights = student, [("student", hits(student, shown).numpy())]
for number in range(1, ROUNDS + 1):
    pruned = cut(pruned, KEEP)
    heights.append((f"cut {number}", hits(pruned, shown).numpy()))
    again = RECIPES["student"] / 3  # it has learned already
    taught(pruned, SEED, logits, max(1, STEPS // 2), again, again, POOL, order=number)
    heights.append((f"trained {number}", hits(pruned, shown).numpy()))
for name, found in heights:
    print(f"{name:10} {estimate([found], [SEED])}")
widths = [
    layer.out_channels for layer in pruned.backbone.layers[0] if isinstance(layer, nn.Conv2d)
]
print(f"filters that are left: {widths}")
print(
    f"million multiplications: {needs['whole'] / 1e6:.1f} before, {multiplications(pruned, one) / 1e6:.1f} now"
)

# %% [markdown]
# The loss is the same as before, and so are the teacher and the labels. (`cut` takes a chain of convolutions, each with a bias
# and a batch norm. A ResNet's skip connections tie the filters of several layers together, and these must be cut alike.)
#
# ## Out of PyTorch
#
# **ONNX** is a format for networks: a graph of operators with the weights beside it. **ONNX Runtime** is a library that runs
# such files, from Python, C++, C#, Java or JavaScript. It needs no PyTorch.
#
# Three rules for an export:
#
# 1. *Everything goes into the graph*, the transform too. Who calls the file hands over pixels, and cannot forget anything.
# 2. *The size of the batch stays open.* So the example has two pictures or more: a batch of one looks like a constant.
# 3. **Parity.** The file must say what PyTorch says, for the example and for a batch of another size. Only then does it take
#    its place. `export_onnx` writes beside the old file and moves it there last.


# %% tags=["evidence"]
class FromPixels(nn.Module):
    """A model whose input is pixels as a file holds them, uint8 (n, 3, 32, 32): the transform is in the graph."""

    def __init__(self, model):
        super().__init__()
        self.model, self.transform = model, model.transform

    def forward(self, pictures):
        return self.model(self.transform(pictures))


def exported(model, path):
    """Write a model, transform and all, to `path`; a batch of eight proves parity."""
    export_onnx(FromPixels(model).eval(), path, train.pictures[:8])
    return path


def answers(path, split):
    """What an ONNX file says in ONNX Runtime: logits (n, classes)."""
    file = session(path)
    parts = [file.run(None, {"pictures": part.numpy()})[0] for part in split.pictures.split(50)]
    return np.concatenate(parts)


def right(path, split):
    """Which pictures an ONNX file classifies correctly: bool array (n,)."""
    return answers(path, split).argmax(axis=1) == split.labels.numpy()


def memory(path):
    """Bytes that one picture needs in ONNX Runtime: the file, and the largest input and output of a layer."""
    import onnxruntime

    with TemporaryDirectory() as folder:
        options = onnxruntime.SessionOptions()
        options.enable_profiling, options.profile_file_prefix = True, f"{folder}/profile"
        file = onnxruntime.InferenceSession(str(path), options)
        file.run(None, {"pictures": train.pictures[:1].numpy()})
        events = json.loads(Path(file.end_profiling()).read_text(encoding="utf-8"))
    sizes = [event["args"] for event in events if "activation_size" in event.get("args", {})]
    maps = max(int(own["activation_size"]) + int(own["output_size"]) for own in sizes)
    return Path(path).stat().st_size + maps


# %%
paths = {name: folder / f"{name}.onnx" for name in ("teacher", "student", "pruned", "int8")}
for path in paths.values():
    path.unlink(missing_ok=True)  # of an earlier run
if extras:
    away = []
    for name, model in {"teacher": teacher, "student": student, "pruned": pruned}.items():
        try:
            away.append(export_onnx(FromPixels(model).eval(), paths[name], train.pictures[:8]))
        except ExportError as error:
            # torchvision's transform looks at numbers, which a graph cannot.
            print(f"{name} stays in PyTorch: {str(error)[:80]}")
            continue
        size = paths[name].stat().st_size / 1024
        print(f"{name}: {size:.0f} KB; logits differ by {away[-1]:.1e} at most")
    claims(
        "Every exported model says what PyTorch says, within a thousandth of a logit",
        over_seeds([max(away)], [SEED], "logits"),
        rule="value < 0.001",
    )
else:
    print(GET_EXTRAS)

# %% [markdown]
# ### What cannot be exported
#
# A graph cannot follow Python. If what is computed depends on a *number in the picture*, or if ONNX has no such operator, there
# is no file. The old one must survive that, and so must a file that was cut short be recognised.
#
# **Predict.** Four things that go wrong. What does each leave behind?


# %%
class Eigenvalues(nn.Module):
    """A model with an operator that ONNX lacks."""

    def forward(self, pictures):
        return torch.linalg.eigvals(pictures[:, 0].float()).real


if extras:
    before = paths["pruned"].read_bytes()
    (folder / "short.onnx").write_bytes(before[: len(before) // 2])
    wrong = {
        "an operator that ONNX lacks": lambda: export_onnx(
            Eigenvalues().eval(), paths["pruned"], one.repeat(2, 1, 1, 1)
        ),
        "an example of one": lambda: export_onnx(
            FromPixels(pruned).eval(), paths["pruned"], one
        ),
        "a file cut short": lambda: session(folder / "short.onnx"),
        "calibration pictures of one channel": lambda: quantise(
            paths["pruned"], train.pictures[:64, :1].numpy(), paths["int8"]
        ),
    }
    for name, act in wrong.items():
        try:
            act()
            raise RuntimeError("it was not refused")
        except ExportError as error:
            print(f"{name}: {str(error).replace(str(folder), '…')[:150]}")
    assert paths["pruned"].read_bytes() == before
else:
    print(GET_EXTRAS)

# %% [markdown]
# ## Eight bits
#
# A float has 32 bits. Most of what a network computes needs fewer. **Quantisation** writes a number $x$ as a whole number $q$
# with 8 bits, a *scale* $s$ and a *zero point* $z$:
#
# $$q = \mathrm{round}(x/s) + z, \qquad x \approx s\,(q - z).$$
#
# Weights are known, so their scale is too: here one for each filter (*per channel*). Maps depend on the picture. So the
# quantiser runs **calibration** pictures through the network, notes the range of every map, and takes the scale from that.
# That is *static* quantisation. (Its weights have seven bits, to be exact: without special instructions, sums of products of
# eight bits can overflow.) The pictures are training pictures, without their labels. (Exercise 13.2 has you write the
# formula.)
#
# `quantise` is ONNX Runtime's own quantiser, with a check at both ends: calibration pictures must be what the file takes, and a
# share of the answers must stay as they were, or nothing is written.
#
# **Predict.** How much smaller does the file get? Which share of the answers changes?

# %%
if extras:
    kept = quantise(paths["pruned"], pool.pictures[:256].numpy(), paths["int8"], agree=0.5)
sizes = (
    {name: path.stat().st_size for name, path in paths.items() if path.exists()}
    if extras
    else {}
)
if "int8" in sizes:
    print(
        f"{sizes['pruned'] / 1024:.0f} KB become {sizes['int8'] / 1024:.0f} KB; {kept:.3f} of the answers stay"
    )
    claims(
        "In eight bits the file has less than four tenths of its bytes",
        over_seeds([sizes["int8"] / sizes["pruned"]], [SEED], "ratio"),
        rule="value < 0.4",
    )

# %% [markdown]
# **Explain.** A quarter of the bytes for the weights, and then what the file needs besides: scales, zero points, the graph.
#
# ## How long does it take?
#
# Both sides in the *same* runtime, on one thread, one picture at a time: otherwise we would measure the runtime. They take
# turns. We look at **p50**, the median, and **p95**, which one call in twenty exceeds: whoever waits, waits for the slow ones
# too.
#
# **Predict.** Which step saves most time? Eight bits are a quarter of the bytes: are they a quarter of the time?

# %%
rows = []
if extras:
    files = {name: session(path) for name, path in paths.items() if path.exists()}
    given = {"pictures": one.numpy()}
    took = latencies(
        {name: lambda file=file: file.run(None, given) for name, file in files.items()}, RUNS
    )
    for name in files:
        rows.append(
            {
                "name": name,
                "accuracy": float(right(paths[name], shown).mean()),
                "bytes": sizes[name],
                "p50": float(took[name][0]),
                "p95": float(took[name][1]),
                "memory": memory(paths[name]),
            }
        )
    table = pd.DataFrame(rows)
    table["times as fast as the first"] = table["p50"].iloc[0] / table["p50"]
    show_table(
        table.round({"accuracy": 3, "p50": 2, "p95": 2, "times as fast as the first": 1})
    )
else:
    print(GET_EXTRAS)

# %% [markdown]
# *p50* and *p95* are in milliseconds, on the machine that ran this. *memory*, in bytes, is an estimate: the
# file, and the layer with the largest input and output in ONNX Runtime's own profile.
#
# **Explain.** Look at the last column. One network instead of two is the first gain, the cuts are the second. Eight bits give
# less time than bytes, and on some processors none: it takes special instructions to multiply whole numbers faster than
# floats, and this small network spends a part of its time between the layers. What holds everywhere is the size. So measure
# where it will run. (`make bench` repeats this comparison and holds it to the goal of four times the teacher's speed.)
#
# ## All seeds
#
# The live models had few steps. The stored table has ten seeds of the whole way, and the last round is the longest one: by
# then the network is small, and a step is cheap. The learning rates of the teacher and of the student were searched on
# validation pictures, over the same values for both. After a cut the rate is a third of the student's; in a trial on
# validation pictures that did better than the full rate. *cut* is the student right after its first cut, before it learns
# again. Every row that has a file was tested in ONNX Runtime, *from the file*, and every test digit was asked on `GROUNDS`
# squares of test photographs, so that less hangs on one of them.


# %% tags=["evidence"]
GROUNDS = 3  # squares of the test photographs on which each test digit is asked


@lru_cache(maxsize=1)
def asked():
    """The test digits, all of them on one square of a test photograph each, then all on another, and so on."""
    parts = [mnist_m("test", ground) for ground in range(GROUNDS)]
    pictures, labels = (
        torch.cat([getattr(part, name) for part in parts]) for name in ("pictures", "labels")
    )
    return Split(pictures, labels, test.classes)


def experiment(seed):
    """The whole way from the teacher to eight bits."""
    folder = TemporaryDirectory()
    one = train.pictures[:1]

    def row(arm, model, path=None):
        found = hits(model, asked()).numpy() if path is None else right(path, asked())
        size = {} if path is None else {"bytes": path.stat().st_size, "memory": memory(path)}
        return {
            "arm": arm,
            "multiplications": multiplications(model, one),
            **size,
            "hits": found,
        }

    def file(arm, model):
        return row(arm, model, exported(model, Path(folder.name) / f"{arm}.onnx"))

    teacher = learn(
        new_teacher(seed, BACKBONES), seed, RUN_STEPS["teacher"], RECIPES["teacher"]
    )
    yield file("teacher", teacher)
    logits = torch.from_numpy(answers(Path(folder.name) / "teacher.onnx", train))
    rate, again = RECIPES["student"], RECIPES["student"] / 3  # it has learned already
    model = taught(new_student(seed), seed, logits, RUN_STEPS["student"], rate)
    yield file("student", model)
    for number in range(1, ROUNDS + 1):
        model = cut(model, KEEP)
        if number == 1:
            yield row("cut", model)  # before it learns again
        steps = RUN_STEPS["round" if number < ROUNDS else "last round"]
        model = taught(model, seed, logits, steps, again, again, order=number)
    yield file("pruned", model)
    small = Path(folder.name) / "int8.onnx"
    quantise(Path(folder.name) / "pruned.onnx", train.pictures[:256].numpy(), small, agree=0.5)
    yield row("int8", model, small)


# %% tags=["evidence"]
def arm_of(table, arm):
    """By seed: how often each test digit was classified correctly, as a share of its GROUNDS; and the seeds."""
    rows = table[table["arm"] == arm].sort_values("seed")
    found = [unpack_hits(text, GROUNDS * 1000).reshape(GROUNDS, 1000) for text in rows["hits"]]
    return [grounds.mean(axis=0) for grounds in found], rows["seed"].tolist()


def shares(table, name, arm, other):
    """A column of one arm as a share of another arm's, over seeds."""
    ours, theirs = (table[table["arm"] == one].sort_values("seed") for one in (arm, other))
    values = (ours[name].to_numpy() / theirs[name].to_numpy()).tolist()
    return over_seeds(values, ours["seed"].tolist(), "ratio")


# %% tags=["evidence"]
def stored_claims(table, claim):
    """What the stored seeds say."""
    int8, seeds = arm_of(table, "int8")
    teacher, raw, pruned = (arm_of(table, arm)[0] for arm in ("teacher", "cut", "pruned"))

    def says(text, found, rule):
        claim(text, found, rule=rule, origin="stored")

    says(
        "The whole way, from the fused teacher to a pruned student in eight bits, costs a point of accuracy or less",
        compare(teacher, int8, seeds),
        "high <= 0.01",
    )
    says(
        "Eight bits alone cost less than half a point",
        compare(pruned, int8, seeds),
        "high < 0.005",
    )
    says(
        "Training between the rounds wins back three points or more of what the first cut took",
        compare(pruned, raw, seeds),
        "low > 0.03",
    )
    says(
        "The pruned student takes less than a quarter of the teacher's multiplications",
        shares(table, "multiplications", "pruned", "teacher"),
        "high < 0.25",
    )
    says(
        "Its file in eight bits has less than a tenth of the bytes of the teacher's",
        shares(table, "bytes", "int8", "teacher"),
        "high < 0.1",
    )


# %% [markdown]
# **Predict.** The pruned student in eight bits has seen a hundred labels a class, as the teacher has. Is it better or worse
# than the teacher? By how much?

# %%
table = stored("13_smaller_and_faster")
arms = ("teacher", "student", "cut", "pruned", "int8")
lines = []
for arm in arms:
    own = table[table["arm"] == arm]
    point = estimate(*arm_of(table, arm))
    size = own["bytes"].mean() / 1024
    lines.append(
        [
            arm,
            f"{point.value:.3f} [{point.low:.3f}, {point.high:.3f}]",
            f"{own['multiplications'].mean() / 1e6:.1f}",
            "" if np.isnan(size) else f"{size:.0f}",
            "" if np.isnan(size) else f"{own['memory'].mean() / 1024:.0f}",
        ]
    )
columns = ["step", "test accuracy", "million multiplications", "file, KB", "memory, KB"]
show_table(pd.DataFrame(lines, columns=columns))
stored_claims(table, claims)

# %% [markdown]
# **Explain.** Read the table from the top. The first cut takes most, and the training after it brings it back. Eight bits take
# next to nothing. The first claim answers the question of the lesson for this task: what the whole way costs in accuracy, with
# its interval.
#
# Mind what was compared. The pruned student has seen more pictures than the teacher, all those without labels, and has made
# more steps. That is the point of distillation, and it is paid once, before anybody waits for an answer. But it follows that
# the table does not say that pruning alone is free, nor what a teacher would reach that was trained as long. (What a teacher
# adds to labels alone is a question of lesson 07.) And ten digits are an easy task: how much can be cut elsewhere has to be
# measured there.
#
# ## Without PyTorch
#
# Now somebody else gets the file: a program that has never heard of PyTorch. Here it is, whole. It runs in a process of its
# own, in which importing torch is an error.

# %% tags=["script"]
SCRIPT = """
import sys
import numpy as np
import onnxruntime
from PIL import Image

model, path = sys.argv[1:]
picture = Image.open(path).convert("RGB").resize((32, 32))
pixels = np.asarray(picture, dtype=np.uint8).transpose(2, 0, 1)[None]  # (1, 3, height, width)
logits = onnxruntime.InferenceSession(model).run(None, {"pictures": pixels})[0][0]
shares = np.exp(logits - logits.max())
shares /= shares.sum()
print(f"{path.split('/')[-1]} shows a {'0123456789'[shares.argmax()]}, says the model, with {shares.max():.0%}")
"""

# %%
NO_TORCH = "import sys; sys.modules['torch'] = None\n"  # now `import torch` raises ImportError
if "int8" in sizes:
    script, sample = folder / "classify.py", folder / "digit.png"
    script.write_text(NO_TORCH + SCRIPT, encoding="utf-8")
    Image.fromarray(shown.pictures[0].permute(1, 2, 0).numpy()).save(sample)
    command = [sys.executable, script.name, paths["int8"].name, sample.name]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    print(done.stdout or done.stderr)
    answer = (
        session(paths["int8"]).run(None, {"pictures": shown.pictures[:1].numpy()})[0].argmax()
    )
    assert f"shows a {answer}," in done.stdout
    print(
        f"it is a {int(shown.labels[0])}; the script has {len(SCRIPT.strip().splitlines())} lines"
    )
else:
    print(GET_EXTRAS)

# %% [markdown]
# The transform is in the file, so the script cannot get it wrong. What it still has to know: three channels, in the order red,
# green, blue; 32 pixels a side; channels first.
#
# ## If you come from TensorFlow or Keras
#
# There are two ways to use what you have learned here.
#
# - **The model as a file.** ONNX does not care what a model was made with. A TensorFlow program calls `onnxruntime` as the
#   script above does. The other direction exists too: the package `tf2onnx` turns TensorFlow models into ONNX.
# - **The layers as layers.** Keras 3 runs on TensorFlow, JAX or PyTorch: set the environment variable `KERAS_BACKEND` to
#   `torch` before the import. A Keras layer is then a `torch.nn.Module` as well, and `keras.layers.TorchModuleWrapper` makes a
#   layer of a PyTorch module.
#
# Three things to look at when weights or pictures cross over:
#
# | | PyTorch, and so this file | TensorFlow and Keras, by default |
# |---|---|---|
# | pictures | `(n, channels, height, width)`, "NCHW" | `(n, height, width, channels)`, "NHWC" |
# | weights of a convolution | `(out, in, height, width)` | `(height, width, in, out)` |
# | batch norm | `momentum` is the share of the *new* value, 0.1; ε is 1e-5 | `momentum` is the share of the *old* value, 0.99; ε is 1e-3 |
#
# **Predict.** Somebody hands our file a picture with channels last. What happens?

# %%
if extras:
    last = one.permute(0, 2, 3, 1).contiguous()
    try:
        session(paths["pruned"]).run(None, {"pictures": last.numpy()})
        raise RuntimeError("it was not refused")
    except Exception as error:
        assert "32" in str(error) and not isinstance(error, RuntimeError)
        print(f"{tuple(last.shape)} is refused by the runtime: {type(error).__name__}")
weights = student.backbone.layers[0][0].weight.detach().cpu()
other = weights.permute(2, 3, 1, 0).contiguous()  # as TensorFlow keeps them
print(f"{tuple(weights.shape)} becomes {tuple(other.shape)}")
assert torch.equal(other.permute(3, 2, 0, 1), weights)

# %% [markdown]
# **Explain.** The file fixes channels, height and width, and only the batch is open. So it is refused, and not misread. Do not
# rely on it: a file for pictures of 3 × 3 pixels could not tell.

# %% [markdown]
# ## The front
#
# Every model that we made is a point: how long it takes, and how often it is right. One model *beats* another if it is at least
# as fast and at least as accurate, and better in one of the two. The line joins those that nobody beats. It is called the
# *front*: along it, more accuracy costs time.
#
# **Predict.** Which steps of the chain are on the front? Which did no more than prepare the next one?


# %% tags=["front"]
def fastest(rows, wanted):
    """The fastest model with that accuracy or more, or None."""
    enough = [row for row in rows if row["accuracy"] >= wanted]
    return min(enough, key=lambda row: (row["p50"], -row["accuracy"]), default=None)


def area(row):
    """How large a point is drawn: it grows with the size of the file."""
    return 20 + row["bytes"] ** 0.5 / 5


def front_figure(rows, wanted=None):
    """Latency and accuracy of each model, and the front; the fastest that is good enough wears a ring."""
    figure, axis = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    ranked = sorted(rows, key=lambda row: (row["p50"], -row["accuracy"]))
    best = np.maximum.accumulate([row["accuracy"] for row in ranked])
    unbeaten = [n for n, row in enumerate(ranked) if not n or row["accuracy"] > best[n - 1]]
    line = np.array([(ranked[n]["p50"], ranked[n]["accuracy"]) for n in unbeaten])
    axis.step(*line.T, where="post", color=COLOURS["blue"], lw=1, zorder=1)
    for n, row in enumerate(ranked):
        colour = COLOURS["blue"] if n in unbeaten else COLOURS["black"]
        axis.scatter(row["p50"], row["accuracy"], area(row), color=colour, alpha=0.7, zorder=2)
        place = (6, 6) if n % 2 else (6, -12)
        spot = (row["p50"], row["accuracy"])
        axis.annotate(row["name"], spot, place, textcoords="offset points", fontsize=8)
    if wanted is not None:
        axis.axhline(wanted, color=COLOURS["orange"], ls="--", lw=1)
        if chosen := fastest(rows, wanted):
            spot = (chosen["p50"], chosen["accuracy"])
            ring = dict(facecolors="none", lw=2, zorder=3)
            axis.scatter(*spot, area(chosen) + 150, edgecolors=COLOURS["orange"], **ring)
            title = f"{chosen['name']}: {chosen['p50']:.2f} ms, {chosen['bytes'] / 1024:.0f} KB"
        else:
            title = "no model is that accurate"
        axis.set_title(title, loc="left", fontsize=10)
    axis.set(xscale="log", xlabel="p50 of one picture (ms)", ylabel="test accuracy")
    axis.xaxis.set_major_locator(plt.LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_minor_locator(plt.NullLocator())
    axis.xaxis.set_major_formatter("{x:g}")
    axis.margins(x=0.25, y=0.15)
    return figure


# %%
if rows:
    show(
        front_figure(rows),
        alt="A point for each model: the time of one picture against test accuracy. A stepped line joins those that no other "
        "model beats.",
    )
    levels = sorted({int(1000 * row["accuracy"]) / 1000 for row in rows})
    chooser("accuracy wanted", levels, lambda wanted: front_figure(rows, wanted))
else:
    print(GET_EXTRAS)

# %% [markdown]
# **Explain.** Blue points are on the front, black ones are beaten. Move the slider: it asks for a minimal accuracy, and the
# ring marks the fastest model that reaches it. The larger a point, the larger its file. That is how one chooses a model in
# practice: say first what is good enough, then take the cheapest. Two things to keep in mind. The points carry the noise of a
# test set, so a step of less than their interval is no step. And choosing by this picture is choosing on test pictures: we
# draw it to look, not to decide. To decide, draw it with validation accuracy.

# %% [markdown]
# ## What goes wrong
#
# ### KL with `reduction="mean"`
#
# `F.kl_div` has a default, and the default is wrong here: `"mean"` divides by the number of pictures *and* by the number of
# classes.
#
# **Predict.** By which factor is the teacher's part of the loss too small? Does training complain?


# %% tags=["catches"]
def assert_per_picture(step, model, batch, teacher, temperature, alpha):
    """Fail where the soft loss is not the divergence that the formula has, summed over classes, averaged over pictures."""
    pictures, places = batch
    with torch.no_grad():
        soft = step(model, batch, 0.0)["soft"].item()
        asked = (teacher[places] / temperature).softmax(dim=1)
        said = (model(pictures) / temperature).softmax(dim=1)
        formula = (
            alpha * temperature**2 * (asked * (asked / said).log()).sum(dim=1).mean().item()
        )
    assert abs(soft - formula) < 1e-3 * formula, (
        f"the soft loss is {soft:.4f}, the formula gives {formula:.4f}"
    )


# %%
places = torch.arange(min(64, POOL)).to(device)
batch = student.transform(pool.pictures[: len(places)].to(device)), places
unlabelled = torch.full((POOL,), -1).to(device)
said = logits.to(device)
fresh = new_student(SEED).eval()
good, bad = (distillation(said, unlabelled, reduction=how) for how in ("batchmean", "mean"))
with torch.no_grad(), warnings.catch_warnings(record=True) as heard:
    warnings.simplefilter("always")
    ratio_of_losses = (good(fresh, batch, 0.0)["soft"] / bad(fresh, batch, 0.0)["soft"]).item()
print(f"PyTorch says: {str(heard[0].message)[:100]}…" if heard else "PyTorch says nothing.")
claims(
    "With reduction='mean' the teacher's part is too small by the number of classes, ten",
    over_seeds([ratio_of_losses], [SEED], "ratio"),
    rule="value > 9.99 and value < 10.01",
)
assert_per_picture(good, fresh, batch, said, TEMPERATURE, ALPHA)
try:
    with warnings.catch_warnings(action="ignore"):
        assert_per_picture(bad, fresh, batch, said, TEMPERATURE, ALPHA)
    raise RuntimeError("the test let the mistake pass")
except AssertionError as error:
    print("caught:", error)

# %% [markdown]
# α = 0.9 says that the teacher counts nine times as much as the label; in truth it
# would count a little less than the label. With a thousand classes next to nothing would be left of it. Training runs all the
# same:

# %%
with warnings.catch_warnings(action="ignore"):
    misled = taught(
        new_student(SEED), SEED, logits, STEPS, RECIPES["student"], pool=POOL, reduction="mean"
    )
for name, model in {"batchmean": student, "mean": misled}.items():
    print(f"{name:9} {estimate([hits(model, shown).numpy()], [SEED])}")

# %% [markdown]
# Whether that shows in the accuracy after so few steps, on pictures half of which have labels, is a matter of luck. The factor
# is not.
#
# ### Timing without warm-up
#
# `torch.compile` rewrites a model for the inputs that it meets, *when* it meets them. The first call pays for that. (We use the
# backend `"eager"`, which compiles nothing in the end: it only traces, and needs no C++ compiler.)
#
# **Predict.** Ten calls, timed and averaged, the first included. How far off is that mean?


# %% tags=["catches"]
def assert_warm(seconds, most=5):
    """Fail where the first call took far longer than the others usually do: it does not belong to them."""
    times = seconds[0] / float(np.median(seconds[1:]))
    assert times < most, (
        f"the first call took {times:.0f} times as long as the others: warm up first"
    )


# %%
torch.compiler.reset()
frozen = new_student(SEED)
frozen.backbone.requires_grad_(False)
compiled = torch.compile(frozen, backend="eager")
pictures, labels = student.transform(pool.pictures[:8].to(device)), pool.labels[:8].to(device)
seconds = []
for _ in range(10):
    began = time.perf_counter()
    F.cross_entropy(compiled(pictures), labels).backward()
    seconds.append(time.perf_counter() - began)
claims(
    "With the first call among ten, the mean is half as large again as the median, or more",
    over_seeds([np.mean(seconds) / np.median(seconds)], [SEED], "ratio"),
    rule="value > 1.5",
)
try:
    assert_warm(seconds)
    raise RuntimeError("the test let the mistake pass")
except AssertionError as error:
    print("caught:", error)
assert_warm([0.011, 0.010, 0.012, 0.010])  # seconds as they come after a warm-up

# %% [markdown]
# ONNX Runtime and plain PyTorch have such first calls too, smaller ones: memory is asked for, weights are rearranged. So
# `latencies` throws the first turns away.
#
# ### A compiled model, unfrozen
#
# Lesson 04 trained the head first and unfroze the rest later. What if the model was compiled in between? Versions of PyTorch
# are known in which the compiled graph stayed as it was: the backbone got no gradients, and nothing said so. Let us look at
# *this* one.
#
# **Predict.** The model above was compiled while its backbone was frozen. We unfreeze it. Does every parameter get a gradient?
# And does every one move, with the optimizer that was there before?


# %% tags=["catches"]
def assert_learns(model, before):
    """Fail where a parameter that should learn has no gradient, or has not moved from where it was before the step."""
    named = [(name, value) for name, value in model.named_parameters() if value.requires_grad]
    silent = [name for name, value in named if value.grad is None]
    assert not silent, (
        f"{len(silent)} of {len(named)} parameters have no gradient, {silent[0]} among them"
    )
    still = [name for name, value in named if torch.equal(value, before[name])]
    assert not still, (
        f"{len(still)} of {len(named)} parameters have not moved, {still[0]} among them"
    )


def one_step(model, run, optimizer):
    """One step of training; returns the weights before it."""
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer.zero_grad(set_to_none=True)
    F.cross_entropy(run(pictures), labels).backward()
    optimizer.step()
    return before


# %%
early = torch.optim.AdamW(
    [value for value in frozen.parameters() if value.requires_grad], lr=1e-3
)
one_step(frozen, compiled, early)  # the head alone
frozen.requires_grad_(True)
before = one_step(frozen, compiled, early)
got = sum(value.grad is not None for value in frozen.parameters())
print(
    f"PyTorch {torch.__version__.split('+')[0]}: {got} of {len(before)} parameters have a gradient"
)
try:
    assert_learns(frozen, before)
    raise RuntimeError("the test let the mistake pass")
except AssertionError as error:
    print("caught:", error)
stuck = [torch.equal(value, before[name]) for name, value in frozen.named_parameters()]
claims(
    "An optimizer made before the unfreezing leaves nine parameters in ten where they were",
    over_seeds([float(np.mean(stuck))], [SEED], "share"),
    rule="value > 0.9",
)
compiled = torch.compile(frozen, backend="eager")  # compiled again, after the last unfreezing
assert_learns(
    frozen, one_step(frozen, compiled, torch.optim.AdamW(frozen.parameters(), lr=1e-3))
)

# %% [markdown]
# **Explain.** The line above says what this version does with the gradients. Where all of them are there, compilation is not
# the trap (older versions: see the report pytorch#139476). But the *optimizer* is: it was handed the head alone and never
# hears of the rest. Both look alike from outside, and one test catches both: after a step, every parameter that should learn
# has a gradient and has moved. The safe order is to unfreeze, then to make the optimizer, then to compile. (`parameter_groups`
# of the course hands over everything from the start.)
#
# ### No `eval()` at export
#
# In training mode batch norm uses the batch at hand, and dropout drops. What would such a model say in production?
#
# **Predict.** The same picture, alone and among others. In training mode, does its answer stay?


# %% tags=["catches"]
def assert_alone(model, pictures):
    """Fail where what a model says about a picture depends on the pictures beside it."""
    with torch.no_grad():
        among, alone = model(pictures)[:1], model(pictures[:1])
    gap = (among - alone).abs().max().item()
    assert gap < 1e-3, (
        f"the first picture's logits move by {gap:.2f} with the pictures beside it"
    )


# %%
loose = copy.deepcopy(pruned).train()
with torch.no_grad():
    gap = (loose(pictures)[:1] - loose(pictures[:1])).abs().max().item()
claims(
    "In training mode, a picture's logits move by a tenth or more with the pictures beside it",
    over_seeds([gap], [SEED], "logits"),
    rule="value > 0.1",
)
single = student.transform(shown.pictures[:60].to(device))
with torch.no_grad():
    for name, model in {"evaluation": pruned.eval(), "training": loose}.items():
        found = (
            torch.cat([model(picture[None]).argmax(dim=1) for picture in single]).cpu()
            == shown.labels[:60]
        )
        print(f"{name} mode, one picture at a time: {estimate([found.numpy()], [SEED])}")
assert_alone(pruned, pictures)
try:
    assert_alone(loose, pictures)
    raise RuntimeError("the test let the mistake pass")
except AssertionError as error:
    print("caught:", error)
if extras:
    try:
        export_onnx(FromPixels(loose), paths["pruned"], train.pictures[:8])
        raise RuntimeError("it was not refused")
    except ExportError as error:
        print("caught:", error)

# %% [markdown]
# What an exporter makes of such a model depends on the exporter and its version: some write the training graph, some the other
# one with a warning. So `export_onnx` refuses. Looking at `model.training` is not enough, by the way: one layer that was left
# in training mode will do.

# %% tags=["search"]
# The seed serves nothing else. The teacher that students are searched with has the rate that was found for it.
GRID = {"arm": ("teacher", "student"), "rate": RATES, "seed": (900,)}


@lru_cache(maxsize=1)
def said_by_teacher(seed):
    """A teacher's logits for the pool, at one rate: the same for every student of the search."""
    return predict(learn(new_teacher(seed, BACKBONES), seed, TUNE_STEPS, RATES[1]), train)


def validation_accuracy(arm, rate, seed):
    """What one rate is worth, on validation pictures."""
    if arm == "teacher":
        model = learn(new_teacher(seed, BACKBONES), seed, TUNE_STEPS, rate)
    else:
        logits = said_by_teacher(seed)
        model = taught(new_student(seed), seed, logits, TUNE_STEPS, rate)
    return hits(model, valid).float().mean().item()


# %% [markdown]
# ## Exercises
#
# ### 13.1 · Cut the filters out
#
# `cut` above knows one kind of network. Write what it does at one place, for any: a convolution, its batch norm, the next
# convolution, and a list of the filters of the first that stay. Stride, padding and eps may be anything, and a bias may be
# missing. Make three *new*, smaller layers. Together, with a ReLU after the norm, they must give what the old ones give when
# the channels of the other filters are set to 0 *after* the norm. The new weights are to be trained on, so they share nothing
# with the old.


# %% tags=["exercise-13.1"]
def keep_filters(first, norm, second, kept):
    """first, second: nn.Conv2d; norm: nn.BatchNorm2d between them; kept: a list of filters. Returns three new layers."""
    # <solution>
    smaller = [
        nn.Conv2d(
            first.in_channels,
            len(kept),
            first.kernel_size,
            first.stride,
            first.padding,
            bias=first.bias is not None,
        ),
        nn.BatchNorm2d(len(kept), eps=norm.eps),
        nn.Conv2d(
            len(kept),
            second.out_channels,
            second.kernel_size,
            second.stride,
            second.padding,
            bias=second.bias is not None,
        ),
    ]
    for layer, old in zip(smaller[:2], (first, norm), strict=True):
        own = old.state_dict()
        layer.load_state_dict({k: v[kept] if v.dim() else v for k, v in own.items()})
    own = second.state_dict()
    smaller[2].load_state_dict(own | {"weight": own["weight"][:, kept]})
    return smaller
    # <stub>
    # return ...
    # </stub>


# %% tags=["check-13.1", "nbval-check-output"]
check("13.1", keep_filters)

# %% [markdown]
# ### 13.2 · Whole numbers for floats
#
# Write the rule behind int8 yourself, with any number of bits. A value becomes a whole number from 0 to 2^bits − 1, and comes
# back as
#
# $$\text{value} \approx \text{scale} \cdot (\text{whole} - \text{zero})$$
#
# Here *scale* is a float above 0, the step between two neighbours, and *zero* is the whole number that stands for 0.0. Choose
# both from the values:
#
# - 0.0 comes back as exactly 0.0, also where no value is 0 (padding and ReLU make many);
# - no value comes back wrong by more than half a scale;
# - the scale is no larger than that needs.
#
# If all values are 0, any scale above 0 will do.


# %% tags=["exercise-13.2"]
def whole_numbers(values, bits=8):
    """values: a float tensor of any shape. Returns whole (int tensor, the same shape), scale (float) and zero (int)."""
    # <solution>
    low, high = min(0.0, values.min().item()), max(0.0, values.max().item())
    top = 2**bits - 1
    scale = (high - low) / top or 1.0
    zero = round(-low / scale)
    whole = ((values / scale).round() + zero).clamp(0, top).int()
    return whole, scale, zero
    # <stub>
    # return ...
    # </stub>


# %% tags=["check-13.2", "nbval-check-output"]
check("13.2", whole_numbers)

# %% [markdown]
# ### 13.3 · How long does it take?
#
# Measure p50 and p95 of some work, in seconds. `run()` does the work once. `clock()` says how late it is, in seconds. Let the
# work run `warmup` times without counting, then `times` times, each timed by itself. p50 is the median: half of the calls are
# slower. p95 is what 5 calls in 100 exceed; take `np.percentile`, as it comes.
#
# The check hands you a clock of its own, which moves only when the work runs. So it is never wrong by chance.


# %% tags=["exercise-13.3"]
def percentiles(run, clock, warmup, times):
    """run, clock: functions without arguments; warmup, times: int. Returns p50 and p95, in the seconds of the clock."""
    # <solution>
    for _ in range(warmup):
        run()
    seconds = []
    for _ in range(times):
        start = clock()
        run()
        seconds.append(clock() - start)
    return np.percentile(seconds, [50, 95])
    # <stub>
    # return ...
    # </stub>


# %% tags=["check-13.3", "nbval-check-output"]
check("13.3", percentiles)

# %% [markdown]
# ### 13.4 · The front
#
# One model *beats* another if it is at least as accurate and at least as fast, and better in one of the two. The models that
# no other beats are the front: among them, more accuracy costs time. Two models that are equal in both do not beat each other.


# %% tags=["exercise-13.4"]
def front(rows):
    """rows: dicts with name (str), accuracy (float) and p50 (float, ms). Returns the names of the front, in any order."""

    # <solution>
    def beats(one, other):
        gains = one["accuracy"] - other["accuracy"], other["p50"] - one["p50"]
        return min(gains) >= 0 and max(gains) > 0

    return {row["name"] for row in rows if not any(beats(other, row) for other in rows)}
    # <stub>
    # return ...
    # </stub>


# %% tags=["check-13.4", "nbval-check-output"]
check("13.4", front)

# %% [markdown]
# ## The claims of this lesson
#
# *Smaller* is held by the claims on bytes and multiplications, and what it costs by those on accuracy. *Faster* depends on the
# machine, so it stands in no claim: `make bench` holds it to its goal where you are.

# %%
held = claims.table()
show_table(held[["claim", "value", "low", "high", "n", "rule", "holds", "origin"]].round(3))

# %% [markdown]
# ## Choosing a framework
#
# This course was written in plain PyTorch, because it was about what happens inside. Your next project may not be. Here is what
# others do for you. They all move fast: look at their current pages before you decide.
#
# | | takes off your hands | asks of you | take it when |
# |---|---|---|---|
# | **plain PyTorch** | gradients, layers, optimisers, and no more | the loop, `eval()`, devices, checkpoints | a step of your method is unusual, or you want to see every line |
# | **Lightning** | the loop around your step: devices, several processes, precision, checkpoints, early stopping, logs | your step as a method of a `LightningModule`; what its `Trainer` does, you look up | runs on many devices, code that a team shares |
# | **fastai** | a whole recipe of transfer: `vision_learner` cuts the pretrained model and adds a head, `fine_tune` trains the head first, then all of it with smaller rates below; `lr_find` suggests a rate | its data blocks and its `Learner`; what differs from the recipe becomes a callback | a usual task, and a good result today |
# | **Keras** | layers, `fit`, callbacks; the same code runs on TensorFlow, JAX or PyTorch; `model.export` writes a SavedModel or ONNX | a model built of its layers and operations | the rest of your system is TensorFlow or JAX, or it may change |
# | **timm** | backbones: one `create_model` for hundreds, pretrained weights, and the transform that each needs | the loop: it has scripts for training, but is no framework for it | you want another backbone in a loop that you have |
#
# They mix. A timm backbone trains in a Lightning loop, and whatever a PyTorch model was trained with, its export is the one of
# this lesson. Some of it you have met: lesson 04 built the parts of fastai's recipe by hand: a frozen start, smaller rates
# below, one cycle. `make bench` lets the course's loop and fastai race.
#
# None of them keeps the test pictures away from your decisions, repeats over seeds, or pairs a comparison. That part stays
# yours, in every framework.
#
# ## Where the field goes
#
# Four directions that are well documented. None of them was measured in this course; the papers below have the numbers.
#
# - **Other backbones, pretrained on more.** Vision transformers cut a picture into patches and let these attend to one another
#   (Dosovitskiy et al. 2021). They want more pretraining than convolutions do, and so one takes them pretrained.
# - **Pretraining without labels of classes.** CLIP learns from pictures and the text that came with them, and can then classify
#   by a description (Radford et al. 2021). DINOv2 learns from pictures alone, and its frozen features are meant to be probed
#   as in lesson 03 (Oquab et al. 2023).
# - **Tuning fewer weights.** LoRA leaves a weight *W* frozen and learns a small change *BA*, where *B* is tall and thin and *A*
#   short and wide, so that both together have few numbers (Hu et al. 2022). It stands between the probe of lesson 03 and the
#   fine-tuning of lesson 04. Afterwards *W* + *BA* is one weight again, and costs no time.
# - **Combining models without paying for all of them.** Average the weights of several fine-tuned models (Wortsman et al.
#   2022a), or of a model before and after fine-tuning, which keeps more of what it could do on other data (2022b). Or distil,
#   with much patience and the same view of the picture for both sides (Beyer et al. 2022).
#
# Two things get harder as pretraining grows. Nobody can be sure any more that the test pictures were not among what the model
# was pretrained on; the CLIP paper looks for such an overlap itself. And fine-tuning can cost accuracy on data that lie a
# little off, while it gains on those that do not (Kumar et al. 2022). Both are questions that you can measure now: a split
# that you made yourself, a probe beside the fine-tuned model, several seeds, paired.
#
# ## Further reading
#
# - Hinton, Vinyals, Dean (2015), *Distilling the knowledge in a neural network.* The temperature, and its square.
# - Beyer, Zhai, Royer, Markeeva, Anil, Kolesnikov (2022), *Knowledge distillation: a good teacher is patient and consistent.*
# - Li, Kadav, Durdanovic, Samet, Graf (2017), *Pruning filters for efficient ConvNets.* Whole filters, by the sum of their
#   absolute weights.
# - Jacob et al. (2018), *Quantization and training of neural networks for efficient integer-arithmetic-only inference.* Scale
#   and zero point.
# - Dosovitskiy et al. (2021), *An image is worth 16x16 words: transformers for image recognition at scale.*
# - Radford et al. (2021), *Learning transferable visual models from natural language supervision.* CLIP.
# - Oquab et al. (2023), *DINOv2: learning robust visual features without supervision.*
# - Hu et al. (2022), *LoRA: low-rank adaptation of large language models.*
# - Wortsman et al. (2022a), *Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing
#   inference time.*
# - Wortsman et al. (2022b), *Robust fine-tuning of zero-shot models.*
# - Kumar, Raghunathan, Jones, Ma, Liang (2022), *Fine-tuning can distort pretrained features and underperform
#   out-of-distribution.*
#
# **The end.** There is no next lesson. Take pictures of your own: a folder for each class, which `picture_folder` of
# `course_utils.data` reads. Split them before you look at them, write down what you expect, and measure it.
