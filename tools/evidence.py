"""Recompute the stored evidence of a lesson from nothing, with seeds of one's own.

    python tools/evidence.py 00 --seeds 100..109 --out DIR
    python tools/evidence.py 00 --seeds 0..9 --store        what maintainers commit to data/evidence/

What runs is the lesson itself: the cells of notebooks/source tagged `parameters`, `setup`, `evidence` and `search`, which define
`experiment(seed)` and `stored_claims(table, claims)`. DIR gets the table and the claims, in the form of a lesson's own.
"""

import argparse
import json
import os
import re
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import jupytext
import numpy as np
import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python tools/evidence.py` finds its neighbours from any folder
from course_utils.backbones import EMBEDDED, read_card
from course_utils.evidence import Claims
from course_utils.paths import write_whole
from tools.course import ROOT, Lesson, ToolError, prepare_folder, read_course

TAGS = frozenset({"parameters", "setup", "evidence", "search"})


@cache
def definitions(source: Path, tags: frozenset[str] = TAGS) -> dict[str, Any]:
    """What a lesson's own cells with these tags define, once they have been executed in order."""
    cells = jupytext.read(source, fmt="py:percent").cells
    code = [cell.source for cell in cells if tags & set(cell.metadata.get("tags", []))]
    names: dict[str, Any] = {}
    for part in code:
        exec(compile(part, str(source), "exec"), names)
    return names


def pack_hits(hits: np.ndarray) -> str:
    """A bool array as hexadecimal text, which `course_utils.evidence.unpack_hits` reads."""
    return np.packbits(np.asarray(hits, dtype=bool)).tobytes().hex()


def rows_of(source: Path, seed: int, threads: int) -> list[dict[str, Any]]:
    """The rows of one seed, ready for a table: bool arrays are packed as text."""
    torch.set_num_threads(threads)
    packed = []
    for row in definitions(source)["experiment"](seed):
        packed.append({"seed": seed, **{key: pack_hits(value) if key == "hits" else value for key, value in row.items()}})
        print(f"seed {seed}: {', '.join(str(value) for key, value in row.items() if key != 'hits')}", flush=True)
    return packed


def recompute(source: Path, seeds: list[int], workers: int) -> pd.DataFrame:
    """The table of a lesson's evidence: each seed is run in one of `workers` processes, which share the cores."""
    threads = max(1, (os.cpu_count() or 1) // workers)
    if workers == 1:
        parts = [rows_of(source, seed, threads) for seed in seeds]
    else:
        with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
            parts = list(pool.map(rows_of, [source] * len(seeds), seeds, [threads] * len(seeds)))
    return pd.DataFrame([row for part in parts for row in part])


def parse_seeds(text: str) -> list[int]:
    """ "100..109" as ten numbers, "7" as one. Raises `ToolError` for anything else."""
    match = re.fullmatch(r"(\d+)(?:\.\.(\d+))?", text)
    if not match or int(match[2] or match[1]) < int(match[1]):
        raise ToolError(f"--seeds {text}: write a number or a range such as 100..109")
    return list(range(int(match[1]), int(match[2] or match[1]) + 1))


def write_table(table: pd.DataFrame, lesson: Lesson, source: Path, folder: Path, seeds: list[int]) -> None:
    """Write NAME.csv and, beside it, NAME.json with the settings and the date."""
    settings = {
        "command": f"python tools/evidence.py {lesson.id} --seeds {seeds[0]}..{seeds[-1]} --store",
        "date": date.today().isoformat(),
        "seeds": seeds,
        "torch": torch.__version__.split("+")[0],
        "device": definitions(source).get("device", torch.device("cpu")).type,
        "weights": {name: read_card(name)["sha256"] for name in definitions(source).get("BACKBONES", sorted(EMBEDDED))},
        "settings": definitions(source).get("RECIPES", {}),
    }
    write_whole(folder / f"{lesson.name}.csv", lambda file: file.write(table.to_csv(index=False).encode()))
    write_whole(folder / f"{lesson.name}.json", lambda file: file.write(json.dumps(settings, indent=1).encode() + b"\n"))


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    """Run the command line; return 0, 1 where a claim does not hold, 2 where nothing could be started."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lesson", help="such as 00")
    parser.add_argument("--seeds", default="0..9", help="a number or a range such as 100..109 (default: 0..9)")
    parser.add_argument("--out", type=Path, help="where table and claims are written")
    parser.add_argument("--store", action="store_true", help="write the table to data/evidence/ as well")
    parser.add_argument("--workers", type=int, choices=range(1, 65), default=2, metavar="N", help="processes (default: 2)")
    options = parser.parse_args(argv)
    try:
        lesson = read_course(root).select(options.lesson)[0]
        seeds = parse_seeds(options.seeds)
        if not options.out and not options.store:
            raise ToolError("name a folder with --out, or give --store")
        source = root / "notebooks/source" / f"{lesson.name}.py"
        for folder in filter(None, [options.out, root / "data/evidence" if options.store else None]):
            prepare_folder(folder)
        if "experiment" not in definitions(source):
            raise ToolError(f"lesson {lesson.id} has no stored evidence")
    except ToolError as error:
        print(error, file=sys.stderr)
        return 2
    table = recompute(source, seeds, options.workers)
    with tempfile.TemporaryDirectory() as scratch:
        out = options.out or Path(scratch)
        write_table(table, lesson, source, out, seeds)
        if options.store:
            write_table(table, lesson, source, root / "data/evidence", seeds)
        claims = Claims(lesson.name, out)
        definitions(source)["stored_claims"](table, claims)
        return 0 if claims.table()["holds"].all() else 1


if __name__ == "__main__":
    raise SystemExit(main())
