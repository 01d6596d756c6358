"""Checkpoints: written whole or not at all, and refused where they belong to another run."""

import pickle
import random
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from course_utils.paths import write_whole

VERSION = 1


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, or that belongs to another run."""


@dataclass
class RunState:
    """How far a run has come. `settings` says which run it is; the rest changes as it goes."""

    settings: dict[str, Any]
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
    content = {
        "version": VERSION,
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "run": asdict(run),
        "random": _random_state(),
    }
    try:
        write_whole(Path(path), lambda file: torch.save(content, file))
    except (OSError, RuntimeError) as error:  # torch's own writer turns a full disk into a RuntimeError
        raise CheckpointError(f"{path} could not be written ({error}): free some space; what was there is unchanged") from error


def load_checkpoint(path: str | Path, run: RunState, model: nn.Module, optimizer: torch.optim.Optimizer, scaler: Any) -> RunState:
    """Put model, optimizer, scaler and random states back, and return the progress; `run` itself where there is no file.

    Nothing is changed unless the whole checkpoint fits. Raises `CheckpointError`, saying why it does not.
    """
    path = Path(path)
    if not path.exists():
        return run
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            f"{path} is no whole checkpoint (cut short or altered): remove it, or train to another file"
        ) from error
    if not isinstance(content, dict) or content.get("version") != VERSION:
        raise CheckpointError(f"{path} was written by another version of this course: remove it, or train to another file")
    stored = RunState(**content["run"])
    differing = [name for name in run.settings if stored.settings.get(name) != run.settings[name]]
    if differing:
        was = ", ".join(f"{name} = {stored.settings.get(name)}, not {run.settings[name]}" for name in differing)
        raise CheckpointError(f"{path} is from another run ({was}): remove it, or train to another file")
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    groups = [len(group["params"]) for group in optimizer.state_dict()["param_groups"]]
    if shapes != {name: value.shape for name, value in content["model"].items()} or groups != [
        len(group["params"]) for group in content["optimizer"]["param_groups"]
    ]:
        raise CheckpointError(
            f"{path} is from another model or another choice of parameters: remove it, or train to another file"
        )
    model.load_state_dict(content["model"])
    optimizer.load_state_dict(content["optimizer"])
    scaler.load_state_dict(content["scaler"])
    _restore_random_state(content["random"])
    return stored


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
    words = np.array(state["numpy"]["state"]["key"], dtype=np.uint32)
    np.random.set_state({**state["numpy"], "state": {**state["numpy"]["state"], "key": words}})
    random.setstate(state["python"])
