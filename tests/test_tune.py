"""The recipes of lesson 00: every start was searched over the same grid, and the lesson uses what the search found."""

import itertools

import pandas as pd

from course_utils.paths import EVIDENCE, ROOT
from tools import tune


def recipes() -> dict:
    source = (ROOT / "notebooks/source/00_start_here.py").read_text(encoding="utf-8")
    start = source.index("RECIPES = ")
    names: dict = {}
    exec(source[start : source.index("\n}", start) + 2], names)
    return names["RECIPES"]


def means() -> pd.DataFrame:
    table = pd.read_csv(EVIDENCE / "00_recipes.csv")
    return table.groupby(["start", "lr", "steps"])["validation"].mean().unstack("start")


def test_every_start_has_the_whole_grid() -> None:
    table = pd.read_csv(EVIDENCE / "00_recipes.csv")
    wanted = itertools.product(tune.STARTS, ("vgg", "resnet"), (tune.LABELS,), *tune.GRID.values(), tune.SEEDS)
    assert sorted(table[tune.COLUMNS].itertuples(index=False, name=None)) == sorted(wanted)


def test_from_scratch_has_the_best_rate_of_its_search_and_the_number_of_steps_is_the_same_for_all() -> None:
    chosen, found = recipes(), means()
    assert chosen["scratch"]["steps"] == chosen["pretrained"]["steps"] == max(tune.GRID["steps"])
    at_these_steps = found.xs(chosen["scratch"]["steps"], level="steps")
    assert at_these_steps["scratch"].idxmax() == chosen["scratch"]["lr"]
    assert at_these_steps[["near", "far"]].mean(axis=1).idxmax() == chosen["pretrained"]["lr"]
    for start in chosen.values():
        assert min(tune.GRID["lr"]) < start["lr"] < max(tune.GRID["lr"]), "the best rate lies at the edge of the grid"


def test_the_search_uses_seeds_of_its_own() -> None:
    assert not set(tune.SEEDS) & set(pd.read_csv(EVIDENCE / "00_start_here.csv")["seed"])
