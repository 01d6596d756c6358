"""Search the recipes of lesson 00 on validation pictures: every start gets the same grid, and seeds of its own.

python tools/tune.py            writes data/evidence/00_recipes.csv and prints the best recipe of each start

Settings that the table has already are not run again: remove it to start from nothing.
"""

import itertools
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python tools/tune.py` finds its neighbours from any folder
from course_utils.data import few_shot
from course_utils.evaluate import accuracy
from course_utils.paths import EVIDENCE, ROOT, write_whole
from tools.evidence import definitions

COLUMNS = ["start", "net", "labels", "lr", "steps", "seed"]
SEEDS = (900,)  # never used for a result
GRID = {"lr": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), "steps": (150, 300)}
STARTS = {"scratch": "near", "far": "far", "near": "near"}  # which registry entry a start takes its layers from
LABELS = 20  # labels a class: the middle of what the lesson shows


def trial(start: str, net: str, labels: int, lr: float, steps: int, seed: int) -> dict:
    """Validation accuracy of one setting: accuracy in [0, 1]."""
    torch.set_num_threads(1)
    lesson = definitions(ROOT / "notebooks/source/00_start_here.py")
    few = few_shot(lesson["train"], labels, seed)
    name = f"{net}_{STARTS[start]}"
    model = lesson["train_on"](few, name, start != "scratch", seed, lr=lr, head_lr=max(lr, 1e-2), steps=steps)
    row = {"start": start, "net": net, "labels": labels, "lr": lr, "steps": steps, "seed": seed}
    row["validation"] = accuracy(model, lesson["valid"])
    print(row, flush=True)
    return row


def main() -> None:
    """Run the grid in two processes and print the mean validation accuracy of each setting."""
    path = EVIDENCE / "00_recipes.csv"
    earlier = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=COLUMNS)
    known = set(earlier[COLUMNS].itertuples(index=False, name=None))
    settings = itertools.product(STARTS, ("vgg", "resnet"), (LABELS,), *GRID.values(), SEEDS)
    wanted = [setting for setting in settings if setting not in known]
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        found = list(pool.map(trial, *zip(*wanted, strict=True))) if wanted else []
    table = pd.concat([part for part in (earlier, pd.DataFrame(found)) if len(part)], ignore_index=True)
    write_whole(path, lambda file: file.write(table.to_csv(index=False).encode()))
    means = table.groupby(["start", "lr", "steps"])["validation"].mean().unstack("start").round(3)
    print(means)
    print("best:", means.idxmax().to_dict())


if __name__ == "__main__":
    main()
