"""tools/evidence.py: the lesson's own cells, run again with other seeds, in the form of the stored evidence."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from course_utils.backbones import read_card
from course_utils.evidence import unpack_hits
from course_utils.paths import EVIDENCE, ROOT
from tools import evidence
from tools.course import ToolError

SOURCE = """
# %% tags=["parameters"]
SEED: int = 0  # the seed
# %% tags=["setup"]
import numpy as np
from course_utils.evidence import estimate, unpack_hits
# %%
raise RuntimeError("this cell is not evidence and must not run")
# %% tags=["evidence"]
RECIPES = {"lr": 0.1}


def experiment(seed):
    rng = np.random.default_rng(seed)
    for labels in (5, 20):
        yield {"labels": labels, "hits": rng.random(100) < 0.5}


def stored_claims(table, claim):
    rows = table[table["labels"] == 5]
    hits = [unpack_hits(text, 100) for text in rows["hits"]]
    claim("half are right", estimate(hits, rows["seed"].tolist()), rule=RULE, origin="stored")
"""


@pytest.fixture
def course(tmp_path: Path) -> Path:
    (tmp_path / "notebooks/source").mkdir(parents=True)
    lesson = 'id = "00"\nname = "00_toy"\ntitle = "Toy"\nobjectives = ["a"]\nneeds = "nothing"\nminutes = 1\nseconds = 1\n'
    (tmp_path / "course.toml").write_text(f'title = "T"\nrepository = "a/b"\nbranch = "main"\n[[lesson]]\n{lesson}')
    (tmp_path / "notebooks/source/00_toy.py").write_text(SOURCE.replace("RULE", '"value > 0.3"'))
    return tmp_path


def test_a_lesson_is_recomputed_with_the_seeds_asked_for(course: Path) -> None:
    out = course / "out"
    assert evidence.main(["00", "--seeds", "100..102", "--out", str(out), "--workers", "1"], course) == 0
    table = pd.read_csv(out / "00_toy.csv")
    assert table["seed"].tolist() == [100, 100, 101, 101, 102, 102]
    expected = np.random.default_rng(101).random(100) < 0.5
    assert np.array_equal(unpack_hits(table["hits"][2], 100), expected)
    (claim,) = json.loads((out / "evidence/00_toy.json").read_text())
    assert claim["seeds"] == [100, 101, 102] and claim["origin"] == "stored" and claim["holds"]
    settings = json.loads((out / "00_toy.json").read_text())
    assert settings["seeds"] == [100, 101, 102] and settings["settings"] == {"lr": 0.1} and settings["date"]
    assert not (course / "data").exists(), "only --store writes into the course"


def test_a_claim_that_does_not_hold_is_an_exit_code(course: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COURSE_STRICT", raising=False)
    source = course / "notebooks/source/00_toy.py"
    source.write_text(source.read_text().replace("value > 0.3", "value > 0.9"))
    evidence.definitions.cache_clear()
    assert evidence.main(["00", "--seeds", "1", "--store", "--workers", "1"], course) == 1
    assert (course / "data/evidence/00_toy.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["07", "--out", "x"], "no lesson '07'"),
        (["00", "--seeds", "9..1", "--out", "x"], "write a number or a range"),
        (["00", "--seeds", "a", "--out", "x"], "write a number or a range"),
        (["00"], "name a folder with --out"),
    ],
)
def test_a_wrong_call_is_refused_in_one_line(course: Path, arguments, message, capsys: pytest.CaptureFixture[str]) -> None:
    assert evidence.main(arguments, course) == 2
    assert message in capsys.readouterr().err


def test_seeds() -> None:
    assert evidence.parse_seeds("3..5") == [3, 4, 5] and evidence.parse_seeds("7") == [7]
    with pytest.raises(ToolError):
        evidence.parse_seeds("3..")


LONG = {"08", "09", "10", "11", "12"}  # lessons in which the experiment of one seed takes many minutes on one core


def test_the_stored_evidence_is_of_the_lesson_as_it_stands() -> None:
    """Each lesson with an experiment has its table, made with the settings in its source and the weights that are shipped."""
    sources = [path for path in (ROOT / "notebooks/source").glob("*.py") if "def experiment(" in path.read_text("utf-8")]
    assert sources
    for source_path in sources:
        path = EVIDENCE / f"{source_path.stem}.csv"
        settings = json.loads(path.with_suffix(".json").read_text())
        names = evidence.definitions(source_path)
        assert settings["settings"] == names["RECIPES"]
        assert settings["weights"] == {name: read_card(name)["sha256"] for name in names["BACKBONES"]}
        assert sorted(pd.read_csv(path)["seed"].unique()) == settings["seeds"]
        assert len(settings["seeds"]) >= (6 if source_path.stem[:2] in LONG else 10)
