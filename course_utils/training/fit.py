"""The loop of the whole course, and its usual step. A step turns a batch into a dict of losses; `fit` minimises their sum.

A new method is a new step: `step(model, batch, progress) -> {"name": loss}`, with progress going from 0 to 1.
"""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from course_utils.data.batches import Batches, Transform
from course_utils.training.checkpoint import RunState, load_checkpoint, save_checkpoint, trained_parameters
from course_utils.training.freezing import Unfreezing, train_mode
from course_utils.training.optimizers import OptimizerRecipe, Schedule, adamw, one_cycle

Step = Callable[[nn.Module, Any, float], dict[str, Tensor]]
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


def supervised(model: nn.Module, batch: tuple[Tensor, Tensor], progress: float) -> dict[str, Tensor]:
    """Cross-entropy of logits `(n, classes)` on labels `(n,)`. Raises `ValueError` for a label that the head lacks."""
    pictures, labels = batch
    logits = model(pictures)
    if (largest := int(labels.max())) >= logits.shape[1]:
        # Asked here since a GPU answers an unknown class with a crash that names no reason.
        raise ValueError(f"the head has {logits.shape[1]} classes, but a label is {largest}: build it for the split's classes")
    return {"cross_entropy": F.cross_entropy(logits, labels)}


def fit(
    model: nn.Module,
    batches: Batches,
    *,
    step: Step = supervised,
    epochs: int = 1,
    optimizer: OptimizerRecipe | None = None,
    schedule: Schedule | None = None,
    unfreeze: Unfreezing | None = None,
    validate: Callable[[nn.Module], float] | None = None,
    patience: int | None = None,
    precision: str = "float32",
    clip: float | None = None,
    checkpoint: str | Path | None = None,
) -> pd.DataFrame:
    """Train `model` in place and return its history, one row an epoch.

    step: what a batch costs, as a dict of losses whose sum is minimised. optimizer, schedule: AdamW and one cycle if
    not given. unfreeze: called with the model and the number of each epoch, from 0 on, before the epoch: it says which
    parameters learn in it. What is frozen stays in evaluation mode. validate: a score of the model, higher is better,
    taken after every epoch on *validation* data; with `patience`, training stops after that many epochs without a better
    score, and the best weights are put back. precision: "float32", "bfloat16" or "float16" (autocast around the step;
    float16 with a gradient scaler). clip: the largest norm of the gradient. checkpoint: a file that is written after every
    epoch; a run that finds it goes on from there and ends with the weights that it would have had.

    The history holds epoch, the mean of each loss, the score under `validation`, the rate of the first group and
    the seconds of the epoch.

    Raises `FloatingPointError` where a loss is not finite, naming the step; `CheckpointError` for a checkpoint of
    another run; `ValueError` for settings that make no sense, or batches that come through another transform than the model's.
    """
    _check_settings(epochs, validate, patience, precision, clip)
    _check_transforms(getattr(model, "transform", None), getattr(batches, "transform", None))
    device = next(model.parameters()).device
    model.to(memory_format=torch.channels_last)
    if unfreeze is not None:
        unfreeze(model, 0)
    optim = (optimizer or adamw())(model)
    rates = [group["lr"] for group in optim.param_groups]
    factor = schedule or one_cycle()
    autocast_to = PRECISIONS[precision]
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "float16")
    total = epochs * len(batches)

    settings: dict[str, Any] = {"epochs": epochs, "steps": len(batches), "optimizer": type(optim).__name__}
    settings |= {name: getattr(batches, name, None) for name in ("seed", "size", "data")}
    settings |= {"model": getattr(getattr(model, "backbone", None), "name", type(model).__name__), "clip": clip}
    settings |= {name: optim.defaults.get(name) for name in ("weight_decay", "momentum", "betas")}
    settings |= {"schedule": [factor(progress) for progress in (0.1, 0.5, 0.9)], "lr": rates}
    settings |= {"precision": precision, "patience": patience}
    run = RunState(settings, trained_parameters(model, optim))
    if checkpoint is not None:
        run = load_checkpoint(checkpoint, run, model, optim, scaler)

    for epoch in range(run.epoch, epochs):
        if patience is not None and run.epochs_since_best >= patience:
            break
        started = time.perf_counter()
        if unfreeze is not None:
            unfreeze(model, epoch)
        train_mode(model)
        sums: dict[str, Tensor] = {}
        bar = tqdm(batches.epoch(epoch), desc=f"epoch {epoch + 1}/{epochs}", total=len(batches), leave=False)
        for number, batch in enumerate(bar):
            progress = (epoch * len(batches) + number) / total
            for group, rate in zip(optim.param_groups, rates, strict=True):
                group["lr"] = rate * factor(progress)

            with torch.autocast(device.type, dtype=autocast_to) if autocast_to else nullcontext():
                losses = step(model, _channels_last(batch), progress)
                loss = torch.stack(list(losses.values())).sum()
            if not torch.isfinite(loss):
                raise FloatingPointError(_not_finite(losses, epoch, number))

            optim.zero_grad(set_to_none=True)
            scaler.scale(loss).backward()
            if clip is not None:
                scaler.unscale_(optim)
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            scaler.step(optim)
            scaler.update()
            for name, value in losses.items():
                sums[name] = sums.get(name, 0.0) + value.detach().float()

        row = {"epoch": epoch + 1, **{name: float(value) / len(batches) for name, value in sums.items()}}
        row |= {"lr": optim.param_groups[0]["lr"], "seconds": time.perf_counter() - started}
        if validate is not None:
            row["validation"] = float(validate(model))
            run.note_score(row["validation"], model)
        run.history.append(row)
        run.epoch = epoch + 1
        if checkpoint is not None:
            save_checkpoint(checkpoint, run, model, optim, scaler)

    if patience is not None and run.best_weights is not None:
        model.load_state_dict(run.best_weights)
    model.eval()
    return pd.DataFrame(run.history)


def _check_settings(epochs: int, validate: object, patience: int | None, precision: str, clip: float | None) -> None:
    if epochs < 1:
        raise ValueError(f"training takes one epoch or more, not {epochs}")
    if precision not in PRECISIONS:
        raise ValueError(f"no precision {precision!r}; there are {', '.join(PRECISIONS)}")
    if patience is not None and (validate is None or patience < 1):
        raise ValueError("early stopping needs validate=... and a patience of one epoch or more")
    if clip is not None and not clip > 0:
        raise ValueError(f"clip is a norm and must be positive, not {clip}")


def _check_transforms(needed: Transform | None, given: Transform | None) -> None:
    if needed is given or needed is None or given is None:
        return
    sample = torch.randint(256, (3, 48, 64), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    if not torch.equal(needed(sample), given(sample)):
        raise ValueError("the batches come through another transform than the model's weights need: give them model.transform")


def _channels_last(batch: Any) -> Any:
    """The same batch with its pictures in the memory order in which convolutions are fastest."""
    if isinstance(batch, Tensor):
        return batch.contiguous(memory_format=torch.channels_last) if batch.dim() == 4 else batch
    if isinstance(batch, (tuple, list)):
        return tuple(_channels_last(part) for part in batch)
    return batch


def _not_finite(losses: dict[str, Tensor], epoch: int, number: int) -> str:
    values = {name: value.item() for name, value in losses.items()}
    bad = " and ".join(repr(name) for name, value in values.items() if not math.isfinite(value)) or "sum"
    said = ", ".join(f"{name} = {value:.4g}" for name, value in values.items())
    return (
        f"step {number + 1} of epoch {epoch + 1}: the loss {bad} is not finite ({said}). "
        "Try a smaller learning rate, clip=1.0, or look at the batch."
    )
