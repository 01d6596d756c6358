"""tools/speed.py: the lesson's own race, run on a device, and stored as a table of ratios with a date."""

import json
from pathlib import Path

import pandas as pd
import pytest
import torch

from tools import evidence, speed

SOURCE = """
# %% tags=["parameters"]
SEED: int = 0  # the seed
# %% tags=["setup"]
import torch
# %%
raise RuntimeError("this cell does not race and must not run")
# %% tags=["evidence"]
raise RuntimeError("this cell does not race and must not run")
# %% tags=["speed"]
def speed_rows(device, turns, steps, size, compiled):
    assert isinstance(device, torch.device) and steps == 7
    for turn in range(turns):
        for way, ratio in {"plain": 1.0, "channels-last": 1.0 + size / 3, **({"compiled": 2.0} if compiled else {})}.items():
            yield {"way": way, "batch": size, "turn": turn, "ratio": ratio}
"""


@pytest.fixture
def course(tmp_path: Path) -> Path:
    (tmp_path / "notebooks/source").mkdir(parents=True)
    lesson = 'id = "12"\nname = "12_toy"\ntitle = "Toy"\nobjectives = ["a"]\nneeds = "nothing"\nminutes = 1\nseconds = 1\n'
    (tmp_path / "course.toml").write_text(f'title = "T"\nrepository = "a/b"\nbranch = "main"\n[[lesson]]\n{lesson}')
    (tmp_path / "notebooks/source/12_toy.py").write_text(SOURCE)
    return tmp_path


def test_the_race_of_the_lesson_is_written_with_what_it_was_measured_on(course: Path, capsys) -> None:
    out = course / "out"
    assert speed.main(["--device", "cpu", "--turns", "2", "--steps", "7", "--out", str(out)], course) == 0
    table = pd.read_csv(out / "12_speed_cpu.csv")
    assert list(table.columns) == ["way", "batch", "turn", "ratio"], "ratios, and no time"
    assert len(table) == 2 * 2 * 3 and set(table["batch"]) == set(speed.SIZES["cpu"]) and set(table["turn"]) == {0, 1}
    facts = json.loads((out / "12_speed_cpu.json").read_text())
    assert facts["command"] == "python tools/speed.py --device cpu --turns 2 --steps 7 --store"
    assert facts["date"] and facts["compiled"] and torch.__version__.startswith(facts["torch"])
    assert facts["device"].startswith("a CPU (") and facts["device"].endswith("threads")
    assert "channels-last" in capsys.readouterr().out
    assert not (course / "data").exists(), "only --store writes into the course"


def test_store_writes_into_the_course_and_compile_can_be_left_out(course: Path) -> None:
    assert speed.main(["--device", "cpu", "--turns", "1", "--steps", "7", "--no-compile", "--store"], course) == 0
    folder = course / "data/evidence"
    assert set(pd.read_csv(folder / "12_speed_cpu.csv")["way"]) == {"plain", "channels-last"}
    assert not json.loads((folder / "12_speed_cpu.json").read_text())["compiled"]


def test_a_wrong_call_is_refused_in_one_line(course: Path, capsys, monkeypatch) -> None:
    assert speed.main(["--device", "cpu"], course) == 2
    assert capsys.readouterr().err == "name a folder with --out, or give --store\n"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert speed.main(["--device", "cuda", "--out", str(course / "out")], course) == 2
    assert capsys.readouterr().err == "nothing can be measured: this machine has no cuda\n"
    (course / "notebooks/source/12_toy.py").write_text(SOURCE.replace("def speed_rows", "def other_rows"))
    evidence.definitions.cache_clear()
    assert speed.main(["--device", "cpu", "--out", str(course / "out")], course) == 2
    assert "no cell tagged speed" in capsys.readouterr().err
    assert not list((course / "out").iterdir())
