"""Contests of seconds: how long two ways train until they classify the same number of validation pictures correctly.

A turn's number is its seed. It draws the few labelled pictures, the new head and the order, the same for both sides. The
start, and looking at validation pictures, are off the clock. Recipes were searched with seeds 900 and above, which no turn has.
"""

from collections.abc import Callable, Iterator
from functools import partial
from math import inf
from pathlib import Path
from statistics import median
from types import ModuleType

import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import nn

from course_utils.backbones import Backbone, Classifier, load_backbone
from course_utils.data import Split, augmentation, few_shot, mnist_m
from course_utils.data.batches import Batch, Batches, batches
from course_utils.evaluate import hits, predict
from course_utils.features import cached_features
from course_utils.training import adamw, fit, one_cycle, unfreeze_top
from tools.bench_rows import NETS, Contest, Setting, Stopwatch

LABELS, SIZE = 20, 32  # labels a class, and pictures a batch of the usual probe
RUNS = 5  # turns of each side, of seconds each

STRENGTH = 0.1  # scikit-learn's C, of .01, .03, .1, .3, 1, with seeds 900..909
# The usual probe gets the best of the rates .003, .01, .03, .1, and the most epochs, of 20, 30, 50 and for the ResNet 25, that
# bring it, in the mean of the same seeds, no further than the cached one: .9240 and .9244 (ResNet), .9356 and .9362 (VGG).
PROBE_LR, PROBE_EPOCHS = 1e-2, {"small ResNet": 25, "small VGG": 30}

GOAL = 0.88  # validation accuracy
# Searched with seeds 900..903: batches of 12 to 24 pictures, rates .0005 to .002 (head .005 to .03), warm-up .02 to .1.
OUR_SIZE, STEPS, LR, HEAD_LR, WARMUP = 16, 40, 1e-3, 1e-2, 0.1
FASTAI_EPOCHS, FASTAI_SIZES, FASTAI_RATES = 10, (16, 32), (1e-3, 3e-3, 1e-2)
EVERY = 3  # steps between two looks at the validation pictures
INSTALL = "python -m pip install -r requirements-bench.txt -c constraints.txt"


class Ended(Exception):
    """The end of a race, reached or hopeless."""


class Race:
    """Batches for `fit` or fastai that end the training when `model` gets `goal` of the pictures of `valid` right.

    They look at it after every so many steps, with the watch stopped. `first` is the seconds until then. With `go_on`, the
    training goes on all the same. After `limit` seconds it ends in any case.
    """

    def __init__(
        self,
        data: Batches,
        model: Classifier,
        watch: Stopwatch,
        valid: Split,
        goal: int,
        every: int,
        go_on: bool = False,
        limit: float = inf,
    ) -> None:
        self.data, self.model, self.watch, self.valid, self.goal, self.every = data, model, watch, valid, goal, every
        self.go_on, self.limit, self.steps, self.first = go_on, limit, 0, inf

    def __len__(self) -> int:
        return len(self.data)

    @property
    def reached(self) -> bool:
        """Whether a look found the goal."""
        return self.first < inf

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of an epoch: the next one is asked for when the step with the last one is done."""
        for batch in self.data.epoch(epoch):
            yield batch
            self.steps += 1
            if self.steps % self.every == 0 and not self.reached:
                self._look()

    def seconds(self, train: Callable[[], object]) -> float:
        """The seconds of `train` until the goal, or all of them where it ends without or goes on."""
        self.watch.start()
        try:
            train()
            self.watch.stop()
        except Ended:
            pass
        return self.watch.seconds

    def _look(self) -> None:
        self.watch.stop()
        modes = [(module, module.training) for module in self.model.modules()]
        if int(hits(self.model, self.valid).sum()) >= self.goal:
            self.first = self.watch.seconds
            if not self.go_on:
                raise Ended
        if self.watch.seconds > self.limit:
            raise Ended
        for module, training in modes:
            module.training = training
        self.watch.start()


def start(setting: Setting, key: str, train: Split, turn: int) -> tuple[Classifier, Split]:
    """A pretrained backbone with a new head, and the few pictures that it learns from."""
    torch.manual_seed(turn)
    return Classifier(load_backbone(key), len(train.classes)).to(setting.device), few_shot(train, LABELS, turn)


def cached_probe(backbone: Backbone, few: Split, path: Path) -> Pipeline:
    """Logistic regression on features that are computed once, and written to `path` for the next time."""
    path.unlink(missing_ok=True)
    features = cached_features(backbone, few, path)
    head = make_pipeline(StandardScaler(), LogisticRegression(C=STRENGTH, max_iter=1000))
    return head.fit(features.numpy(), few.labels.numpy())


def usual_probe(race: Race, epochs: int) -> None:
    """A head trained as networks are: the frozen backbone goes over every batch in every epoch."""
    fit(race.model, race, epochs=epochs, optimizer=adamw(PROBE_LR), unfreeze=lambda model, epoch: unfreeze_top(model, 0))


def probes(setting: Setting, train: Split | None = None, valid: Split | None = None, epochs: int | None = None) -> list[Contest]:
    """Seconds of the usual probe, and of the one on features that are computed once. Computing them counts.

    The note gives the accuracies that both end with, and what the ratio would be if somebody stopped the usual probe at the
    first epoch, lucky or not, that is as accurate as the cached one.
    """
    train, valid = train or mnist_m("train"), valid or mnist_m("valid")
    return [_probe(setting, net, key, train, valid, epochs or PROBE_EPOCHS[net]) for net, key in NETS.items()]


def _probe(setting: Setting, net: str, key: str, train: Split, valid: Split, epochs: int) -> Contest:
    cached: list[float] = []  # validation accuracy of each turn
    usual: list[float] = []
    seconds: list[tuple[float, float]] = []  # of the cached one, and of the usual one until it first is as accurate

    def ours(turn: int) -> float:
        model, few = start(setting, key, train, turn)
        watch = setting.watch()
        watch.start()
        head = cached_probe(model.backbone, few, setting.folder / f"{key}.safetensors")
        watch.stop()
        cached.append(float((head.predict(predict(model.backbone, valid).numpy()) == valid.labels.numpy()).mean()))
        seconds.append((watch.seconds, inf))
        return watch.seconds

    def other(turn: int) -> float:
        model, few = start(setting, key, train, turn)
        data = batches(few, model.transform, size=SIZE, seed=turn, device=setting.device)
        race = Race(data, model, setting.watch(), valid, round(cached[-1] * len(valid)), every=len(data), go_on=True)
        whole = race.seconds(lambda: usual_probe(race, epochs))
        usual.append(hits(model, valid).float().mean().item())
        seconds[-1] = (seconds[-1][0], min(race.first, whole))
        return whole

    def note() -> str:
        one, two = (median(seen[1:]) for seen in (cached, usual))
        times = median(first / ours for ours, first in seconds[1:])
        return (
            f"validation accuracy {one:.3f} and, after {epochs} epochs, {two:.3f}; {times:.2f} times, were the usual one "
            "stopped as soon as it is as accurate"
        )

    return Contest(f"a probe on cached features against the usual one, {net}", 20.0, ours, other, RUNS, note=note)


def share(reached: list[bool]) -> str:
    """In how many turns a goal was reached, the first turn, which does not count, left out."""
    return f"{sum(reached[1:])} of {len(reached[1:])} turns"


def fine_tunings(setting: Setting, train: Split | None = None, valid: Split | None = None) -> list[Contest]:
    """Seconds of training until the validation accuracy is .88: `fit` against fastai's `fine_tune`.

    `fit` runs by LP-FT of lesson 04, where the head starts with the weights of a probe on cached features; making these is on
    the clock. The note gives the ratio of its plainest recipe too: all at once, from a random head. fastai gets the same start,
    pictures and augmentation, and in every turn the best for it of two sizes of batches and several rates, which its own
    `lr_find` adds to; the search is off the clock.
    """
    try:
        from tools import bench_fastai
    except ImportError as error:
        print(f"left out, {error}: {INSTALL}", flush=True)
        return []
    train, valid = train or mnist_m("train"), valid or mnist_m("valid")
    return [_fine_tuning(setting, net, key, train, valid, bench_fastai) for net, key in NETS.items()]


def copy_probe(head: nn.Linear, probe: Pipeline) -> None:
    """Give a head the weights of a probe on standardised features, in units of the features as they are."""
    scaler, regression = probe
    weight = regression.coef_ / scaler.scale_
    with torch.no_grad():
        head.weight.copy_(torch.as_tensor(weight))
        head.bias.copy_(torch.as_tensor(regression.intercept_ - weight @ scaler.mean_))


def _fine_tuning(setting: Setting, net: str, key: str, train: Split, valid: Split, fastai: ModuleType) -> Contest:
    lp_ft: list[Race] = []
    at_once: list[float] = []  # seconds of each turn, and so below
    theirs: list[float] = []
    theirs_reached: list[bool] = []

    def prepare(turn: int, size: int, steps: int | None = None, limit: float = inf) -> tuple[Race, Split]:
        model, few = start(setting, key, train, turn)
        augment = augmentation()
        data = batches(few, model.transform, size=size, steps=steps, augment=augment, seed=turn, device=setting.device)
        return Race(data, model, setting.watch(), valid, round(GOAL * len(valid)), EVERY, limit=limit), few

    def ours(turn: int) -> float:
        race, _ = prepare(turn, OUR_SIZE, STEPS)
        race.seconds(lambda: fit(race.model, race, optimizer=adamw(LR, HEAD_LR), schedule=one_cycle(WARMUP)))
        at_once.append(race.first)
        copied, few = prepare(turn, OUR_SIZE, STEPS)

        def probe_and_fine_tune() -> None:
            copy_probe(copied.model.head, cached_probe(copied.model.backbone, few, setting.folder / f"{key}.safetensors"))
            fit(copied.model, copied, optimizer=adamw(LR), schedule=one_cycle(WARMUP))

        copied.seconds(probe_and_fine_tune)
        lp_ft.append(copied)
        return copied.first

    def other(turn: int) -> float:
        best, longest = inf, 0.0
        for size in FASTAI_SIZES:
            first, _ = prepare(turn, size)
            suggested = fastai.suggested_rate(first.model, first.data, setting.folder)
            for rate in (*FASTAI_RATES, suggested):
                race, _ = prepare(turn, size, limit=best)  # who is slower cannot win
                seconds = race.seconds(partial(fastai.fine_tune, race.model, race, setting.folder, FASTAI_EPOCHS, rate))
                best, longest = min(best, race.first), max(longest, seconds)
        theirs_reached.append(best < inf)
        theirs.append(best if best < inf else longest)
        return theirs[-1]

    def note() -> str:
        times = median(b / a for a, b in zip(at_once[1:], theirs[1:], strict=True))
        steps = median(race.steps for race in lp_ft[1:])
        reached = share([race.reached for race in lp_ft]), share(theirs_reached)
        return (
            f"fit reached it in {reached[0]}, after {steps:g} steps, fastai in {reached[1]}; {times:.2f} times, were fit to "
            "train all at once"
        )

    name = f"training to a validation accuracy of {GOAL}, fit against fastai's fine_tune, {net}"
    return Contest(name, 2.0, ours, other, RUNS, note=note)
