"""A training that is killed with SIGKILL, at any moment, ends as if it had not been."""

import json
import os
import signal
import subprocess
import sys
from typing import Any

import pytest

from course_utils.paths import ROOT
from tests.killed_run import EPOCHS, MOMENTS, STEPS

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="SIGKILL and fork are POSIX's")
WRITING = [name for name in MOMENTS if "half-way" in name or "safe" in name or "just before" in name or "two" in name]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.killed_run", str(tmp_path_factory.mktemp("killed"))]
    settings = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=settings, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_the_uninterrupted_run_has_what_a_resumed_one_could_lose(report: dict[str, Any]) -> None:
    assert len(MOMENTS) >= 10
    assert report["uninterrupted"]["exit"] == 0
    history = report["uninterrupted"]["end"]["history"]
    assert history["epoch"] == [1, 2, 3, 4, 5]
    assert history["validation"] == [-12, -6, 0, -6, -12], "the best epoch is neither the first nor the last"


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_ends_as_an_uninterrupted_one(report: dict[str, Any], moment: str) -> None:
    deaths, kept = MOMENTS[moment]
    killed, whole = report[moment], report["uninterrupted"]["end"]
    assert killed["exits"] == [-signal.SIGKILL] * len(deaths), "the moment never came"
    assert killed["last"] == 0
    assert killed["end"]["steps"] == (EPOCHS - kept) * STEPS, "it goes on from the last whole checkpoint"
    assert {**killed["end"], "steps": None} == {**whole, "steps": None}


@pytest.mark.parametrize("moment", MOMENTS)
def test_what_a_killed_write_left_is_cleared_by_the_next(report: dict[str, Any], moment: str) -> None:
    assert report[moment]["left"][-1] == (moment in WRITING), "a write was cut off, or none was"
    assert report[moment]["files"] == ["run.pt"]
