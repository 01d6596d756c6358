"""The recipes of the lessons: every start was searched over the same grid, and a lesson uses what its search found."""

from pathlib import Path

import pandas as pd
import pytest

from course_utils.paths import EVIDENCE, ROOT
from tools import tune
from tools.evidence import definitions

SOURCES = {
    path.name[:2]: path for path in sorted((ROOT / "notebooks/source").glob("*.py")) if "GRID = {" in path.read_text("utf-8")
}


def searched(lesson: str) -> tuple[dict, pd.DataFrame]:
    """What a lesson defines, and the table of its search."""
    return definitions(SOURCES[lesson]), pd.read_csv(EVIDENCE / f"{lesson}_recipes.csv")


def test_the_lessons_that_search_are_known() -> None:
    assert {"00", "01"} <= set(SOURCES)


@pytest.mark.parametrize("lesson", SOURCES)
def test_every_start_has_the_whole_grid_and_the_search_has_seeds_of_its_own(lesson: str) -> None:
    names, table = searched(lesson)
    wanted = [tuple(setting.values()) for setting in tune.settings_of(names["GRID"])]
    assert sorted(table[list(names["GRID"])].itertuples(index=False, name=None)) == sorted(wanted)
    assert not set(table["seed"]) & set(pd.read_csv(EVIDENCE / f"{SOURCES[lesson].stem}.csv")["seed"])


def test_lesson_00_takes_the_best_rate_of_each_start_and_the_same_number_of_steps_for_all() -> None:
    names, table = searched("00")
    chosen, grid = names["RECIPES"], names["GRID"]
    assert chosen["scratch"]["steps"] == chosen["pretrained"]["steps"] == max(grid["steps"])
    means = table[table["steps"] == max(grid["steps"])].groupby(["start", "lr"])["validation"].mean().unstack("start")
    assert means["scratch"].idxmax() == chosen["scratch"]["lr"]
    assert means[["near", "far"]].mean(axis=1).idxmax() == chosen["pretrained"]["lr"]
    for start in chosen.values():
        assert min(grid["lr"]) < start["lr"] < max(grid["lr"]), "the best rate lies at the edge of the grid"


def test_lesson_01_takes_the_best_rate_of_each_start_on_each_target() -> None:
    names, table = searched("01")
    means = table.groupby(["task", "start", "lr"])["validation"].mean()
    for task, rates in names["RECIPES"].items():
        for start, rate in rates.items():
            assert means[task, start, rate] == means[task, start].max(), (task, start)


TOY = """
# %% tags=["search"]
GRID = {"start": ("a", "b"), "lr": (0.1, 0.2), "seed": (900,)}
def validation_accuracy(start, lr, seed):
    return lr if start == "a" else 1 - lr
"""


def test_a_search_is_completed_and_what_is_known_is_not_run_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "lesson.py").write_text(TOY)
    known = pd.DataFrame([{"start": "a", "lr": 0.1, "seed": 900, "validation": 0.7}])
    known.to_csv(tmp_path / "found.csv", index=False)
    table = tune.search(tmp_path / "lesson.py", tmp_path / "found.csv")
    scores = table.set_index(["start", "lr"])["validation"].to_dict()
    assert scores == {("a", 0.1): 0.7, ("a", 0.2): 0.2, ("b", 0.1): 0.9, ("b", 0.2): 0.8}
    assert table.equals(pd.read_csv(tmp_path / "found.csv"))
    assert capfd.readouterr().out.count("validation") == 3


def test_a_wrong_call_is_refused_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main(["77"]) == 2
    assert "no lesson '77'" in capsys.readouterr().err
