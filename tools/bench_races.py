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

from course_utils.backbones import Backbone, Classifier, load_backbone
from course_utils.data import Split, augmentation, few_shot, mnist_m
from course_utils.data.batches import Batch, Batches, batches
from course_utils.evaluate import hits, predict
from course_utils.features import cached_features
from course_utils.training import adamw, fit, unfreeze_top
from tools.bench_rows import NETS, Contest, Setting, Stopwatch

LABELS, SIZE = 20, 32  # labels a class, and pictures a batch
RUNS = 5  # turns of each side, of seconds each

# Of rates .003, .01, .03, .1 and 10, 20, 30, 50, 100, 200 epochs, seeds 900..909: from here on the accuracy of the usual probe
# rises no more. Stopping it at the accuracy of the other favours it, since it is first reached well before the end.
PROBE_LR, PROBE_EPOCHS = 1e-2, 50
STRENGTH = 0.1  # scikit-learn's C, of .01, .03, .1, .3, 1, with the same seeds

GOAL = 0.88  # validation accuracy
STEPS, LR, HEAD_LR = 60, 1e-3, 1e-2
FASTAI_EPOCHS, FASTAI_RATES = 10, (1e-3, 3e-3, 1e-2)
EVERY = 3  # steps between two looks at the validation pictures
INSTALL = "python -m pip install -r requirements-bench.txt -c constraints.txt"


class Reached(Exception):
    """The end of a race."""


class Race:
    """Batches for `fit` or fastai that end the training when `model` gets `goal` of the pictures of `valid` right.

    They look at it after every so many steps, with the watch stopped.
    """

    def __init__(self, data: Batches, model: Classifier, watch: Stopwatch, valid: Split, goal: int, every: int) -> None:
        self.data, self.model, self.watch, self.valid, self.goal, self.every = data, model, watch, valid, goal, every
        self.steps, self.reached = 0, False

    def __len__(self) -> int:
        return len(self.data)

    def epoch(self, epoch: int) -> Iterator[Batch]:
        """The batches of an epoch: the next one is asked for when the step with the last one is done."""
        for batch in self.data.epoch(epoch):
            yield batch
            self.steps += 1
            if self.steps % self.every == 0:
                self._look()

    def seconds(self, train: Callable[[], object]) -> float:
        """The seconds of `train` until the goal, or all of them where it ends without."""
        self.watch.start()
        try:
            train()
            self.watch.stop()
        except Reached:
            self.reached = True
        return self.watch.seconds

    def _look(self) -> None:
        self.watch.stop()
        modes = [(module, module.training) for module in self.model.modules()]
        if int(hits(self.model, self.valid).sum()) >= self.goal:
            raise Reached
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


def probes(setting: Setting, train: Split | None = None, valid: Split | None = None, epochs: int = PROBE_EPOCHS) -> list[Contest]:
    """Seconds until the usual probe is, at an epoch's end, as accurate as the one on features that are computed once.

    Computing them counts. Where the usual probe never is as accurate, all its epochs count.
    """
    train, valid = train or mnist_m("train"), valid or mnist_m("valid")
    return [_probe(setting, net, key, train, valid, epochs) for net, key in NETS.items()]


def _probe(setting: Setting, net: str, key: str, train: Split, valid: Split, epochs: int) -> Contest:
    right: list[int] = []  # validation pictures that the cached probe of each turn gets right
    taken: list[float] = []  # epochs of the usual one until then
    reached: list[bool] = []

    def ours(turn: int) -> float:
        model, few = start(setting, key, train, turn)
        watch = setting.watch()
        watch.start()
        head = cached_probe(model.backbone, few, setting.folder / f"{key}.safetensors")
        watch.stop()
        right.append(int((head.predict(predict(model.backbone, valid).numpy()) == valid.labels.numpy()).sum()))
        return watch.seconds

    def other(turn: int) -> float:
        model, few = start(setting, key, train, turn)
        data = batches(few, model.transform, size=SIZE, seed=turn, device=setting.device)
        race = Race(data, model, setting.watch(), valid, right[-1], every=len(data))
        seconds = race.seconds(lambda: usual_probe(race, epochs))
        reached.append(race.reached)
        taken.append(race.steps / len(data))
        return seconds

    def note() -> str:
        score, after = median(right[1:]) / len(valid), median(taken[1:])
        return (
            f"validation accuracy {score:.3f}; the usual one reached it in {share(reached)}, after {after:g} of {epochs} epochs"
        )

    return Contest(f"a probe on cached features against the usual one, {net}", 20.0, ours, other, RUNS, note=note)


def share(reached: list[bool]) -> str:
    """In how many turns a goal was reached, the first turn, which does not count, left out."""
    return f"{sum(reached[1:])} of {len(reached[1:])} turns"


def fine_tunings(setting: Setting, train: Split | None = None, valid: Split | None = None) -> list[Contest]:
    """Seconds of training until the validation accuracy is .88: `fit` against fastai's `fine_tune`.

    fastai gets the same start, batches and augmentation, and in every turn the best for it of several rates, which its own
    `lr_find` adds to; the search is off the clock.
    """
    try:
        from tools import bench_fastai
    except ImportError as error:
        print(f"left out, {error}: {INSTALL}", flush=True)
        return []
    train, valid = train or mnist_m("train"), valid or mnist_m("valid")
    return [_fine_tuning(setting, net, key, train, valid, bench_fastai) for net, key in NETS.items()]


def _fine_tuning(setting: Setting, net: str, key: str, train: Split, valid: Split, fastai: ModuleType) -> Contest:
    ours_reached: list[bool] = []
    other_reached: list[bool] = []

    def prepare(turn: int, steps: int | None = None) -> Race:
        model, few = start(setting, key, train, turn)
        augment = augmentation()
        data = batches(few, model.transform, size=SIZE, steps=steps, augment=augment, seed=turn, device=setting.device)
        return Race(data, model, setting.watch(), valid, round(GOAL * len(valid)), EVERY)

    def ours(turn: int) -> float:
        race = prepare(turn, STEPS)
        seconds = race.seconds(lambda: fit(race.model, race, optimizer=adamw(LR, HEAD_LR)))
        ours_reached.append(race.reached)
        return seconds if race.reached else inf

    def other(turn: int) -> float:
        first = prepare(turn)
        suggested = fastai.suggested_rate(first.model, first.data, setting.folder)
        found: dict[bool, list[float]] = {True: [], False: []}  # seconds, by whether the goal was reached
        for rate in (*FASTAI_RATES, suggested):
            race = prepare(turn)
            seconds = race.seconds(partial(fastai.fine_tune, race.model, race, setting.folder, FASTAI_EPOCHS, rate))
            found[race.reached].append(seconds)
        other_reached.append(bool(found[True]))
        return min(found[True] or found[False])

    def note() -> str:
        return f"fit reached it in {share(ours_reached)}, fastai in {share(other_reached)}"

    name = f"training to a validation accuracy of {GOAL}, fit against fastai's fine_tune, {net}"
    return Contest(name, 2.0, ours, other, RUNS, note=note)
