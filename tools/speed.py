"""Measure what each hint on speed gives on a device, by turns in one run, and store it as the table that lesson 12 reads.

    python tools/speed.py --device cpu --store         what maintainers commit to data/evidence/
    python tools/speed.py --device cuda --store        the same on a machine with such a GPU
    python tools/speed.py --device cpu --turns 3 --out DIR

What runs is the lesson itself: the cells of notebooks/source tagged `parameters`, `setup` and `speed`, which define
`speed_rows(device, turns, steps, size, compiled)`. The table holds ratios to the plain way, and no time.
"""

import argparse
import json
import platform
import sys
from datetime import date
from pathlib import Path
from typing import Any

import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `python tools/speed.py` finds its neighbours from any folder
from course_utils.paths import write_whole
from course_utils.profile import pick_device
from tools.course import ROOT, ToolError, prepare_folder, read_course
from tools.evidence import definitions

LESSON = "12"
TAGS = frozenset({"parameters", "setup", "speed"})
SIZES = {"cpu": (16, 64), "cuda": (64, 1024)}  # pictures a batch: few, and many more


def present(name: str) -> torch.device:
    """The device of that name. Raises `ToolError` where this machine has none."""
    try:
        return pick_device(name)
    except RuntimeError as error:
        raise ToolError(f"nothing can be measured: this machine has no {name}") from error


def machine(device: torch.device) -> str:
    """What kind of device it was, without a word on whose."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    units = torch.backends.cpu.get_cpu_capability()
    return f"a CPU ({platform.machine()}, {units}) with {torch.get_num_threads()} threads"


def measure(source: Path, device: torch.device, turns: int, steps: int, compiled: bool) -> pd.DataFrame:
    """The rows of every size of batch, one a turn and way. Raises `ToolError` where the lesson cannot be measured."""
    names = definitions(source, TAGS)
    if "speed_rows" not in names:
        raise ToolError(f"lesson {LESSON} has no cell tagged speed that defines speed_rows")
    rows: list[dict[str, Any]] = []
    for size in SIZES[device.type]:
        rows += names["speed_rows"](device, turns, steps, size, compiled)
        medians = pd.DataFrame(rows).query("batch == @size").groupby("way", sort=False)["ratio"].median()
        print(f"batches of {size}: " + ", ".join(f"{way} {ratio:.2f}" for way, ratio in medians.items()), flush=True)
    return pd.DataFrame(rows).round({"ratio": 4})


def write_table(table: pd.DataFrame, folder: Path, device: torch.device, turns: int, steps: int) -> None:
    """Write 12_speed_DEVICE.csv and, beside it, 12_speed_DEVICE.json with the date and what it was measured on."""
    name = f"{LESSON}_speed_{device.type}"
    facts = {
        "command": f"python tools/speed.py --device {device.type} --turns {turns} --steps {steps} --store",
        "date": date.today().isoformat(),
        "torch": torch.__version__.split("+")[0],
        "device": machine(device),
        "compiled": "compiled" in set(table["way"]),
    }
    write_whole(folder / f"{name}.csv", lambda file: file.write(table.to_csv(index=False).encode()))
    write_whole(folder / f"{name}.json", lambda file: file.write(json.dumps(facts, indent=1).encode() + b"\n"))


def main(argv: list[str] | None = None, root: Path = ROOT) -> int:
    """Run the command line; return 0, or 2 where nothing could be started."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=sorted(SIZES), required=True, help="what to measure on")
    parser.add_argument("--turns", type=int, choices=range(1, 100), default=9, metavar="N", help="turns counted (default: 9)")
    parser.add_argument("--steps", type=int, choices=range(1, 1001), default=3, metavar="N", help="steps a turn (default: 3)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--out", type=Path, help="where the table is written")
    parser.add_argument("--store", action="store_true", help="write the table to data/evidence/ as well")
    options = parser.parse_args(argv)
    try:
        if not options.out and not options.store:
            raise ToolError("name a folder with --out, or give --store")
        source = root / "notebooks/source" / f"{read_course(root).select(LESSON)[0].name}.py"
        folders = [folder for folder in (options.out, root / "data/evidence" if options.store else None) if folder]
        for folder in folders:
            prepare_folder(folder)
        device = present(options.device)
        table = measure(source, device, options.turns, options.steps, not options.no_compile)
    except ToolError as error:
        print(error, file=sys.stderr)
        return 2
    for folder in folders:
        write_table(table, folder, device, options.turns, options.steps)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
