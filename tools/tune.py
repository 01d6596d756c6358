"""Search the recipes of a lesson on validation pictures: every start gets the same grid, and seeds of its own.

python tools/tune.py 01         writes data/evidence/01_recipes.csv and prints the best setting of each start

What is searched stands in the lesson: a cell tagged `search` defines `GRID`, names with their values, and
`validation_accuracy(**setting)`. Settings that the table has already are not run again: remove it to start from nothing.
"""

import argparse
import itertools
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python tools/tune.py` finds its neighbours from any folder
from course_utils.paths import EVIDENCE, ROOT, write_whole
from tools.course import ToolError, read_course
from tools.evidence import definitions


def settings_of(grid: dict[str, Iterable]) -> list[dict]:
    """Every combination of the values of a grid, the last name changing fastest."""
    return [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]


def trial(source: Path, setting: dict) -> dict:
    """A setting with its validation accuracy in [0, 1]."""
    torch.set_num_threads(1)
    row = {**setting, "validation": round(definitions(source)["validation_accuracy"](**setting), 4)}
    print(row, flush=True)
    return row


def search(source: Path, path: Path) -> pd.DataFrame:
    """The table of a lesson's search at `path`, completed in two processes."""
    settings = settings_of(definitions(source)["GRID"])
    earlier = pd.read_csv(path) if path.exists() else pd.DataFrame(columns=list(settings[0]))
    known = set(earlier[list(settings[0])].itertuples(index=False, name=None))
    wanted = [setting for setting in settings if tuple(setting.values()) not in known]
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        found = list(pool.map(trial, [source] * len(wanted), wanted))
    table = pd.concat([part for part in (earlier, pd.DataFrame(found)) if len(part)], ignore_index=True)
    write_whole(path, lambda file: file.write(table.to_csv(index=False).encode()))
    return table


def main(argv: list[str] | None = None, root: Path = ROOT, folder: Path = EVIDENCE) -> int:
    """Run the command line; return 0, or 2 where nothing could be started."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lesson", help="such as 00")
    options = parser.parse_args(argv)
    try:
        lesson = read_course(root).select(options.lesson)[0]
        source = root / "notebooks/source" / f"{lesson.name}.py"
        if "GRID" not in definitions(source):
            raise ToolError(f"lesson {lesson.id} has no search")
    except ToolError as error:
        print(error, file=sys.stderr)
        return 2
    table = search(source, folder / f"{lesson.id}_recipes.csv")
    names = [name for name in definitions(source)["GRID"] if name != "seed"]
    print(table.groupby(names)["validation"].mean().sort_values(ascending=False).to_string())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
