"""Measure the course's code against what one would write by hand or take instead, and write build/bench.json.

    python tools/bench.py                          everything
    python tools/bench.py --only data probe        some of it: loops, data, probe, fine-tuning, export

Both sides of a row take turns in one run, so that a machine that slows down slows both. The numbers are pictures a
second, or seconds where a whole training counts: the median over the turns. The ratio says how many times better ours is:
the median of the ratios of neighbouring turns. fine-tuning needs fastai: see requirements-bench.txt. export needs the extras of
that name.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python tools/bench.py` finds its neighbours from any folder
from course_utils.profile import pick_device
from tools.bench_export import exports
from tools.bench_races import fine_tunings, probes
from tools.bench_rows import BATCH, Clock, Contest, Setting, Side, training_loops, where_data_live
from tools.course import ROOT, ToolError, write_text

FEWEST = 5  # turns of each side, below which a median says little
GROUPS: dict[str, Callable[[Setting], list[Contest]]] = {
    "loops": training_loops,
    "data": where_data_live,
    "probe": probes,
    "fine-tuning": fine_tunings,
    "export": exports,
}


@dataclass(frozen=True)
class Row:
    """One line of bench.json: what both sides took or gave, how many times better ours is, the goal of that, the turns."""

    name: str
    unit: str
    ours: float
    other: float
    ratio: float
    goal: float
    runs: int
    note: str


def alternate(ours: Side, other: Side, runs: int) -> tuple[list[float], list[float]]:
    """Seconds of both sides, which take turns 1 to `runs` after a turn 0 each that does not count."""
    ours(0)
    other(0)
    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(1, runs + 1):
        for side, kept in zip((ours, other), seconds, strict=True):
            kept.append(side(turn))
    return seconds


def measure(contest: Contest, runs: int | None = None) -> Row:
    """A row of bench.json: the contest, in `runs` turns of each side or as many as it asks for."""
    runs = runs or contest.runs
    ours, other = alternate(contest.ours, contest.other, runs)
    ratio = median(b / a for a, b in zip(ours, other, strict=True))
    unit, one, two = "seconds", median(ours), median(other)
    if contest.pictures:
        unit, one, two = "pictures a second", contest.pictures / one, contest.pictures / two
    note = contest.note()
    return Row(contest.name, unit, round(one, 4), round(two, 4), round(ratio, 4), contest.goal, runs, note)


def line(row: Row) -> str:
    """A row for people."""
    mark = "✓" if row.ratio >= row.goal else "✗ missed:"
    digits = 0 if row.unit == "pictures a second" else 2
    figures = f"{row.ours:.{digits}f} against {row.other:.{digits}f} {row.unit}, {row.ratio:.2f} times (goal {row.goal})"
    return f"{mark} {row.name}: {figures}" + (f"; {row.note}" if row.note else "")


def main(argv: list[str] | None = None, clock: Clock = time.perf_counter) -> int:
    """Run the command line; return 0, or with --check 1 where a goal is missed, or 2 where nothing could be measured."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(GROUPS), default=list(GROUPS), help="default: all of them")
    parser.add_argument("--check", action="store_true", help="return 1 where a goal is missed")
    parser.add_argument("--runs", type=int, help="turns of each side (default: 9, or 5 where a turn is a whole training)")
    parser.add_argument("--pictures", type=int, default=4000, help="pictures a turn of a loop (default: 4000)")
    parser.add_argument("--device", default="cpu", help="cpu (the default), cuda or mps")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "bench.json", help="default: build/bench.json")
    options = parser.parse_args(argv)
    try:
        if options.pictures < BATCH or (options.runs is not None and options.runs < FEWEST):
            raise ToolError(f"measuring takes {FEWEST} runs or more, of {BATCH} pictures or more")
        device = pick_device(options.device)
        now = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
        where = f"{device}, {platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
        print(f"{now}, torch {torch.__version__}, Python {platform.python_version()}, {where}", flush=True)
        rows = []
        with TemporaryDirectory() as folder:
            setting = Setting(device, Path(folder), options.pictures, clock)
            for contest in (contest for name in options.only for contest in GROUPS[name](setting)):
                rows.append(measure(contest, options.runs))
                print(line(rows[-1]), flush=True)
        if not rows:
            return 2
        write_text(options.out, json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    except (ToolError, ValueError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2
    return int(options.check and any(row.ratio < row.goal for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
