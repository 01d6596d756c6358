"""Trains a toy model, kills it with SIGKILL at one moment after another, resumes it, and prints how each run ended.

`python -m tests.killed_run FOLDER` imports torch once and forks a process for every run, each with a folder of its own.
"""

import hashlib
import json
import os
import random
import signal
import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch

from course_utils.data import augmentation
from course_utils.training import adamw, fit, supervised
from tests.test_fit import toy_batches, toy_model

EPOCHS, STEPS = 5, 6
# By name: at which occurrence of which event each process of the run dies, and the epochs that it then need not repeat.
MOMENTS: dict[str, tuple[list[tuple[str, int]], int]] = {
    "at the first step": ([("step", 1)], 0),
    "in the middle of an epoch": ([("step", 9)], 1),
    "between backward and the optimizer's step": ([("backward", 10)], 1),
    "after the last step of an epoch": ([("stepped", 12)], 1),
    "during validation": ([("validation", 2)], 1),
    "half-way through the first write": ([("half", 1)], 0),
    "half-way through a write": ([("half", 2)], 1),
    "before the bytes are safe": ([("fsync", 2)], 1),
    "just before the file is moved": ([("move", 2)], 1),
    "just after the file was moved": ([("moved", 2)], 2),
    "half-way through a later write": ([("half", 4)], 3),
    "two times": ([("step", 9), ("half", 2)], 2),
}


class Events:
    """Counts what happens in this process, and ends it with SIGKILL when `deadly` does."""

    def __init__(self, deadly: tuple[str, int] | None) -> None:
        self.seen, self.deadly = Counter[str](), deadly

    def happen(self, event: str) -> None:
        self.seen[event] += 1
        if (event, self.seen[event]) == self.deadly:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch_writing(self) -> None:
        fdopen, fsync, replace = os.fdopen, os.fsync, os.replace

        class Halting:
            """A file that says when half of the bytes of a long write are on the disk."""

            def __init__(self, file: Any) -> None:
                self.file = file

            def __enter__(self) -> "Halting":
                return self

            def __exit__(self, *error: object) -> None:
                self.file.close()

            def __getattr__(self, name: str) -> Any:
                return getattr(self.file, name)

            def writelines(halting, lines: list[Any]) -> None:
                content = b"".join(lines)
                halting.file.write(content[: len(content) // 2])
                halting.file.flush()
                self.happen("half")
                halting.file.write(content[len(content) // 2 :])

        def watched_fsync(handle: int) -> None:
            self.happen("fsync")
            fsync(handle)

        def watched_replace(old: str, new: str) -> None:
            self.happen("move")
            replace(old, new)
            self.happen("moved")

        os.fdopen = lambda *arguments: Halting(fdopen(*arguments))
        os.fsync, os.replace = watched_fsync, watched_replace


def train(checkpoint: Path | None, deadly: tuple[str, int] | None) -> dict[str, Any]:
    """One process of a run, from its start or its checkpoint; what it ended with, where it was not killed."""
    events, made = Events(deadly), []

    def step(model, batch, progress):
        events.happen("step")
        nudge = 1 + 0.1 * (np.random.rand() + random.random())
        return {name: nudge * loss for name, loss in supervised(model, batch, progress).items()}

    def recipe(model):
        made.append(adamw(lr=0.01)(model))
        made[0].register_step_pre_hook(lambda *_: events.happen("backward"))
        made[0].register_step_post_hook(lambda *_: events.happen("stepped"))
        return made[0]

    def score(model):
        events.happen("validation")
        passed = int(model.backbone.layers[1].num_batches_tracked)
        return -abs(passed - 3 * STEPS)  # the third epoch is the best, so that what is kept is not the last

    # A resumed run gets everything from its checkpoint: whatever it finds at its start is wrong.
    resumes = checkpoint is not None and checkpoint.exists()
    seed = 77 if resumes else 5
    random.seed(seed), np.random.seed(seed)
    model = toy_model(seed=seed, dropout=0.5)
    events.watch_writing()
    history = fit(
        model,
        toy_batches(augment=augmentation()),
        step=step,
        epochs=EPOCHS,
        optimizer=recipe,
        validate=score,
        patience=3,
        checkpoint=checkpoint,
    )
    return {
        "weights": digest(model.state_dict()),
        "optimizer": digest(made[0].state_dict()),
        "history": history.drop(columns="seconds").to_dict("list"),
        "torch": digest(torch.get_rng_state()),
        "numpy": digest(np.random.get_state()),
        "python": digest(random.getstate()),
        "steps": events.seen["step"],
    }


def digest(state: Any) -> str:
    """The same for states that are the same to the bit."""
    if isinstance(state, dict):
        state = [[str(name), digest(value)] for name, value in state.items()]
    elif isinstance(state, list | tuple):
        state = [digest(value) for value in state]
    elif isinstance(state, torch.Tensor):
        state = [str(state.dtype), list(state.shape), hashlib.sha256(state.contiguous().numpy().tobytes()).hexdigest()]
    elif isinstance(state, np.ndarray):
        state = state.tolist()
    return hashlib.sha256(repr(state).encode()).hexdigest()


def in_a_process(checkpoint: Path | None, deadly: tuple[str, int] | None, result: Path) -> int:
    """Train in a fork of this process; the status with which it ended, negative for a signal."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        result.write_text(json.dumps(train(checkpoint, deadly)))
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def main(folder: Path) -> None:
    result = folder / "result.json"
    report: dict[str, Any] = {"uninterrupted": {"exit": in_a_process(None, None, result), "end": json.loads(result.read_text())}}
    for number, (name, (deaths, _)) in enumerate(MOMENTS.items()):
        home = folder / str(number)
        home.mkdir()
        result.unlink(missing_ok=True)
        exits, left = [], []
        for deadly in deaths:
            exits.append(in_a_process(home / "run.pt", deadly, result))
            left.append(len(list(home.iterdir())) - (home / "run.pt").exists())
        last = in_a_process(home / "run.pt", None, result)
        files = sorted(path.name for path in home.iterdir())
        end = json.loads(result.read_text()) if result.exists() else None
        report[name] = {"exits": exits, "left": left, "last": last, "files": files, "end": end}
    print(json.dumps(report))


if __name__ == "__main__":
    torch.set_num_threads(1)  # a process with threads cannot be forked safely
    main(Path(sys.argv[1]))
