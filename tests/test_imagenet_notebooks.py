"""`make test-imagenet`: notebooks in the imagenet world, on random networks and a handful of pictures served from loopback."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from course_utils.paths import ROOT
from course_utils.profile import get_profile
from tests.mirror import Mirror, serve_handful

QUICK = {lesson: ["LABELS=2", "STEPS=2"] for lesson in ("00", "01", "02", "04")}
QUICK["03"] = ["LABELS=2", "EPOCHS=2", "NET=resnet"]
QUICK["05"] = ["LABELS=2", "STEPS=2", "SCORED=resnet"]
QUICK["06"] = ["LABELS=2", "STEPS=2", "BUDGET=4"]
QUICK["07"] = ["LABELS=2", "NETS=resnet+resnet", "THIRD=resnet", "STEPS=1", "POOL=40"]
QUICK["08"] = ["NET=resnet", "STEPS=1", "SAMPLE=60"]
QUICK["09"] = ["NET=resnet", "STEPS=5", "BATCH=4", "PICTURES=40"]
QUICK["10"] = ["LABELS=2", "NET=resnet", "STEPS=1", "ATTACKED=12"]
QUICK["11"] = ["LABELS=2", "NET=resnet", "STEPS=4", "SWEEP=4", "PICTURES=20"]
QUICK["12"] = ["LABELS=2", "NET=resnet", "STEPS=1", "TESTED=20", "TURNS=1"]
QUICK["13"] = ["NETS=resnet+resnet", "STEPS=1", "POOL=40", "TESTED=12", "RUNS=2"]
DIGITS = {"08", "09", "10", "11", "12", "13"}  # lessons on digits in both worlds: the backbones alone differ


@pytest.mark.imagenet
@pytest.mark.parametrize("lesson", QUICK)
def test_lesson_in_the_imagenet_world(lesson: str, tmp_path: Path) -> None:
    served = tmp_path / "served"
    served.mkdir()
    profile = get_profile("imagenet")
    serve_handful(served, networks=(profile.backbones["resnet"],), trainval=2 * max(profile.labels))
    with Mirror() as mirror:
        mirror.put_folder(served)
        places = {"COURSE_MIRROR": mirror.url, "COURSE_CACHE": str(tmp_path / "cache"), "no_proxy": "127.0.0.1"}
        # What a random network scores proves nothing: claims are written, not required.
        environment = {key: value for key, value in os.environ.items() if key != "COURSE_STRICT"} | places
        command = [sys.executable, "tools/run.py", "--profile", "imagenet", "--lessons", lesson, "--out", str(tmp_path / "out")]
        command += [part for setting in QUICK[lesson] for part in ("--set", setting)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "/index.json" in mirror.requests
    assert ("/images.tar.gz" in mirror.requests) == (lesson not in DIGITS)
