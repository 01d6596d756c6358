"""Where things are, whatever folder a notebook is opened from, and how a file is written."""

import os
import tempfile
from collections.abc import Callable
from glob import escape
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = ROOT / "data" / "weights"
EVIDENCE = ROOT / "data" / "evidence"
NOTEBOOKS = ROOT / "notebooks"


def write_whole(path: Path, write: Callable[[IO[bytes]], Any], *, alone: bool = False) -> None:
    """Call `write(file)` on a new binary file beside `path`, then move it there: whole, or not at all.

    alone: no other process writes `path` now, so that what killed ones left beside it can go.

    Raises what `write` and the disk raise, after which whatever stood at `path` stands there still.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if alone:  # first, since the disk may need the room; eight letters, as tempfile draws them, match no other file's leftovers
        for orphan in path.parent.glob(f".{escape(path.name)}.????????.part"):
            orphan.unlink(missing_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        Path(name).chmod(0o644)  # temporary files are private, results are not
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
