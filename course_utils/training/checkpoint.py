"""Checkpoints: written whole or not at all, and refused where they belong to another run."""

import hashlib
import io
import random
import re
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from course_utils.paths import write_whole

VERSION = 2
MAGIC = b"course_utils checkpoint, "
# The first line of the file, for people too; torch's bytes follow. Torch alone would not notice an altered weight.
HEAD = re.compile(MAGIC + rb"version (\d+), (\d+) bytes, sha256 (\w{64})\n")


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read or written, or that belongs to another run."""


@dataclass
class RunState:
    """How far a run has come. `settings` and `trained`, as it began, say which run it is; the rest changes as it goes."""

    settings: dict[str, Any]
    trained: dict[str, str]
    epoch: int = 0
    history: list[dict[str, float]] = field(default_factory=list)
    best_score: float = float("-inf")
    epochs_since_best: int = 0
    best_weights: dict[str, Tensor] | None = None

    def note_score(self, score: float, model: nn.Module) -> None:
        """Keep the weights where `score` is the best so far."""
        if score > self.best_score:
            self.best_score, self.epochs_since_best = score, 0
            self.best_weights = deepcopy(model.state_dict())
        else:
            self.epochs_since_best += 1


def save_checkpoint(path: str | Path, run: RunState, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: Any) -> None:
    """Write everything that a run needs to go on: weights, optimizer, scaler, progress and random states.

    The file is written beside its place and then moved there, so that a crash leaves the earlier one. Raises
    `CheckpointError` where it cannot be written.
    """
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
    content = {name: part.state_dict() for name, part in parts.items()} | {"run": asdict(run), "random": _random_state()}
    buffer = io.BytesIO()
    torch.save(content, buffer)
    payload = buffer.getbuffer()
    head = b"%bversion %d, %d bytes, sha256 %b\n" % (MAGIC, VERSION, len(payload), hashlib.sha256(payload).hexdigest().encode())
    try:
        write_whole(Path(path), lambda file: file.writelines([head, payload]), alone=True)
    except OSError as error:
        raise CheckpointError(f"{path} could not be written ({error}): free some space; what was there is unchanged") from error


def load_checkpoint(path: str | Path, run: RunState, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: Any) -> RunState:
    """Put model, optimizer, scaler and random states back, and return the progress; `run` itself where there is no file.

    Nothing is changed unless the whole checkpoint fits. Raises `CheckpointError`, saying why it does not.
    """
    path = Path(path)
    if not path.exists():
        return run
    content = _read(path)
    stored = RunState(**content["run"])
    for what, there, here in (
        ("run", stored.settings, run.settings),
        ("model", _shapes(content["model"]), _shapes(model.state_dict())),
        ("choice of trained parameters", stored.trained, run.trained),
    ):
        was = [f"{name} = {there.get(name)}, not {here.get(name)}" for name in there | here if there.get(name) != here.get(name)]
        if was:
            more = f", and {len(was) - 3} more" if len(was) > 3 else ""
            raise _refusal(path, f"is from another {what} ({', '.join(was[:3])}{more})")
    optimizer.load_state_dict(content["optimizer"])
    model.load_state_dict(content["model"])
    scaler.load_state_dict(content["scaler"])
    _restore_random_state(content["random"])
    return stored


def _refusal(path: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{path} {why}: remove it, or train to another file")


def _read(path: Path) -> dict[str, Any]:
    """What was saved, to the byte."""
    try:
        with path.open("rb") as file:
            head, payload = file.readline(200), file.read()
    except OSError as error:
        raise _refusal(path, f"cannot be read ({error.strerror})") from error
    found = HEAD.fullmatch(head)
    if not MAGIC.startswith(head[: len(MAGIC)]):
        raise _refusal(path, "is no checkpoint of this course")
    if found and int(found[1]) != VERSION:
        raise _refusal(path, "was written by another version of this course")
    if len(payload) < int(found[2]) if found else not payload:
        raise _refusal(path, "was cut short")
    if not found or hashlib.sha256(payload).hexdigest().encode() != found[3]:
        raise _refusal(path, "was altered after it was written")
    return torch.load(io.BytesIO(payload), map_location="cpu", weights_only=True)


def _shapes(state: dict[str, Tensor]) -> dict[str, str]:
    return {name: f"{value.dtype} {tuple(value.shape)}" for name, value in state.items()}


def trained_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, str]:
    """The optimizer's group of every parameter that is not frozen. Their numbers alone can agree by chance."""
    groups = enumerate(optimizer.param_groups, 1)
    group_of = {id(one): f"group {number}" for number, group in groups for one in group["params"] if one.requires_grad}
    return {name: group_of.get(id(parameter), "frozen") for name, parameter in model.named_parameters()}


def _random_state() -> dict[str, Any]:
    generator: Any = np.random.get_state(legacy=False)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": {**generator, "state": {**generator["state"], "key": generator["state"]["key"].tolist()}},
        "python": random.getstate(),
    }


def _restore_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
