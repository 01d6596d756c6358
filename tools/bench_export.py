"""A contest of latencies: the compressed student of lesson 13 against its fused teacher, both in ONNX Runtime.

Both get one picture at a time and one thread; the teacher's numbers are float32. What they are, how many filters stay and how
they are exported is what the lesson's own cells say. Only the training is left out: it does not change how long a picture takes.
How much accuracy the chain costs is the lesson's stored evidence, which the row quotes.
"""

from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from course_utils.evidence import compare, stored
from course_utils.export import quantise, session
from tools.bench_rows import Contest, Setting, Side
from tools.course import ROOT
from tools.evidence import definitions

NAME = "13_smaller_and_faster"
GOAL = 4.0
CALLS, WARMUP = 200, 50  # pictures that a turn times, one by one, and those before them
CALIBRATION = 256


def compressed(lesson: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    """The files of the lesson's student, cut as often as there and in eight bits, and of its teacher, both untrained.

    Raises `ImportError` without the extras.
    """
    teacher = lesson["exported"](lesson["new_teacher"](0, lesson["BACKBONES"]), folder / "teacher.onnx")
    student = lesson["new_student"](0)
    for _ in range(lesson["ROUNDS"]):
        student = lesson["cut"](student, lesson["KEEP"])
    pruned = lesson["exported"](student, folder / "pruned.onnx")
    quantise(pruned, lesson["train"].pictures[:CALIBRATION].numpy(), folder / "int8.onnx", agree=0)  # untrained answers may flip
    return folder / "int8.onnx", teacher


def accuracy_lost(lesson: dict[str, Any], table: Any) -> str:
    """What the lesson's stored seeds say about the accuracy that the chain costs."""
    teacher, seeds = lesson["arm_of"](table, "teacher")
    return f"stored accuracy lost {compare(teacher, lesson['arm_of'](table, 'int8')[0], seeds)}"


def exports(setting: Setting) -> list[Contest]:
    """p50 of one picture in ONNX Runtime, one thread: the student at the end of lesson 13's chain against its fused teacher.

    A turn's seconds are the median of many calls, after some that do not count. The note gives both files' sizes, and the
    accuracy that the chain costs, from the stored table of the lesson.
    """
    lesson = definitions(ROOT / "notebooks/source" / f"{NAME}.py")
    try:
        paths = compressed(lesson, setting.folder)
    except ImportError as error:
        print(f"left out, {error}", flush=True)
        return []
    feed = {"pictures": np.ascontiguousarray(lesson["train"].pictures[:1].numpy())}

    def side(path: Path) -> Side:
        file = session(path, threads=1)

        def run(turn: int) -> float:
            for _ in range(WARMUP):
                file.run(None, feed)
            return median(setting.time(lambda: file.run(None, feed)) for _ in range(CALLS))

        return run

    def note() -> str:
        sizes = " against ".join(f"{path.stat().st_size / 1024:.0f}" for path in paths)
        try:
            lost = accuracy_lost(lesson, stored(NAME))
        except FileNotFoundError as error:
            lost = str(error)
        return f"{sizes} KB; {lost}"

    name = "the compressed student against its fused teacher, ONNX Runtime, batch 1, one thread"
    return [Contest(name, GOAL, side(paths[0]), side(paths[1]), pictures=1, note=note)]
