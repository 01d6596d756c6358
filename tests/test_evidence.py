"""Evidence: intervals that cover, claims that are held to their rule, tables that come back as they were written."""

import json

import numpy as np
import pytest

from course_utils import evidence
from course_utils.evidence import Claims, Estimate, compare, estimate, follows, stored, stretch, unpack_hits
from tools.evidence import pack_hits


def runs(rng, accuracy, seeds=10, pictures=400, seed_spread=0.03, picture_spread=0.0):
    """Hits of `seeds` runs whose true accuracy moves with the seed and whose pictures differ in difficulty."""
    difficulty = rng.normal(0, picture_spread, size=pictures)
    level = rng.normal(accuracy, seed_spread, size=(seeds, 1))
    return list(rng.random((seeds, pictures)) < level + difficulty)


def test_estimate_is_the_mean_with_an_interval_around_it():
    found = estimate(runs(np.random.default_rng(0), 0.7), range(10))
    assert found.low < found.value < found.high
    assert found.value == pytest.approx(0.7, abs=0.05)
    assert found.n == 10 and found.seeds == tuple(range(10))


def test_the_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(1)
    covered = [estimate(runs(rng, 0.7, seed_spread=0.1), range(10)) for _ in range(60)]
    assert sum(found.low <= 0.7 <= found.high for found in covered) >= 55


def test_the_interval_resamples_seeds_and_pictures():
    """Runs that agree on every picture leave only the pictures to chance; pictures that all agree leave only the seeds."""
    rng = np.random.default_rng(2)
    one_run = rng.random(400) < 0.7
    same_runs = estimate([one_run] * 10, range(10))
    assert same_runs.high - same_runs.low == pytest.approx(stretch(10) * 2 * 1.96 * np.sqrt(0.7 * 0.3 / 400), rel=0.15)
    seeds_only = estimate([np.full(400, seed % 2 == 0) for seed in range(10)], range(10))
    # Student's interval of ten halves and wholes: 2.262 standard errors to either side.
    assert seeds_only.high - seeds_only.low == pytest.approx(2 * 2.262 * np.sqrt(0.25 / 9), rel=0.15)
    assert stretch(1) == 1 < stretch(1000) < 1.01


def test_compare_is_paired():
    """A picture that is hard for both sides does not widen the interval of their difference."""
    rng = np.random.default_rng(3)
    other = runs(rng, 0.6)
    ours = [hits | (rng.random(hits.size) < 0.1) for hits in other]
    difference, alone = compare(ours, other, range(10)), estimate(ours, range(10))
    assert difference.value == pytest.approx(np.mean(ours) - np.mean(other))
    assert difference.high - difference.low < 0.5 * (alone.high - alone.low)
    assert difference.low > 0
    tie = compare(other, other, range(10))
    assert (tie.value, tie.low, tie.high) == (0, 0, 0)


def test_a_comparison_needs_pairs():
    hits = np.ones(5, dtype=bool)
    with pytest.raises(ValueError, match="same seeds and the same test pictures"):
        compare([hits], [hits, hits], [0])
    with pytest.raises(ValueError, match="same seeds and the same test pictures"):
        compare([hits], [hits[:4]], [0])
    with pytest.raises(ValueError, match="2 rows of results for 1 seeds"):
        estimate([hits, hits], [0])


@pytest.mark.parametrize(
    ("rule", "holds"),
    [
        ("low > 0.2", False),
        ("low >= 0.2", True),
        ("value < 0.31 and high <= 0.4", True),
        ("value < 0.31 and high < 0.4", False),
        ("value > -1", True),
    ],
)
def test_a_rule_is_kept_or_not(rule, holds):
    assert follows(rule, Estimate(0.3, 0.2, 0.4, (1,))) is holds


@pytest.mark.parametrize("rule", ["", "mean > 1", "low", "low > x", "low = 1", "low > 1 or value > 0", "__import__('os') > 1"])
def test_a_rule_that_cannot_be_read_is_an_error(rule):
    with pytest.raises(ValueError, match="cannot read the rule"):
        follows(rule, Estimate(0.3, 0.2, 0.4, (1,)))


def test_a_claim_is_printed_and_recorded_once(tmp_path, capsys):
    claims = Claims("00_toy", tmp_path)
    assert claims.table().empty
    claims("a beats b", Estimate(0.3, 0.2, 0.4, (1, 2)), rule="low > 0")
    claims("c beats d", Estimate(0.1, 0.05, 0.2, (1,)), rule="low > 0", origin="stored")
    claims("a beats b", Estimate(0.5, 0.4, 0.6, (3,), "accuracy"), rule="low > 0.1")
    records = json.loads((tmp_path / "evidence" / "00_toy.json").read_text())
    assert [record["claim"] for record in records] == ["a beats b", "c beats d"]
    keys = {"claim", "value", "low", "high", "n", "unit", "rule", "holds", "origin", "seeds"}
    assert set(records[0]) == keys
    assert records[0] == {
        **{"claim": "a beats b", "value": 0.5, "low": 0.4, "high": 0.6, "n": 1, "unit": "accuracy"},
        **{"rule": "low > 0.1", "holds": True, "origin": "live", "seeds": [3]},
    }
    assert "✓ a beats b: 0.300 [0.200, 0.400], 2 seeds (live)" in capsys.readouterr().out


def test_claims_of_an_earlier_run_are_not_taken_for_this_run(tmp_path):
    Claims("00_toy", tmp_path)("old", Estimate(0.3, 0.2, 0.4, (1, 2)), rule="low > 0")
    claims = Claims("00_toy", tmp_path)
    assert claims.table().empty
    claims("new", Estimate(0.3, 0.2, 0.4, (1, 2)), rule="low > 0")
    assert [record["claim"] for record in json.loads((tmp_path / "evidence" / "00_toy.json").read_text())] == ["new"]


def test_one_seed_is_said_to_be_one():
    assert "one seed: the interval is over test pictures alone" in str(Estimate(0.3, 0.2, 0.4, (1,)))


def test_a_claim_that_fails_is_said_to_a_learner_and_fails_in_ci(tmp_path, monkeypatch, capsys):
    claims, weak = Claims("00_toy", tmp_path), Estimate(0.01, -0.1, 0.1, (1,))
    monkeypatch.delenv("COURSE_STRICT", raising=False)
    claims("a beats b", weak, rule="low > 0")
    assert "did not hold in this run" in capsys.readouterr().out
    monkeypatch.setenv("COURSE_STRICT", "1")
    with pytest.raises(AssertionError, match=r"'a beats b' asks for low > 0, and the run gave 0\.010 \[-0\.100"):
        claims("a beats b", weak, rule="low > 0")
    assert not claims.table()["holds"].any(), "it is recorded all the same"


@pytest.mark.parametrize("count", [1, 8, 1000, 1797])
def test_packed_hits_come_back(count):
    hits = np.random.default_rng(0).random(count) < 0.5
    assert np.array_equal(unpack_hits(pack_hits(hits), count), hits)


def test_a_missing_table_names_its_command(tmp_path, monkeypatch):
    monkeypatch.setattr(evidence, "EVIDENCE", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"00_start_here\.csv is missing: .*tools/evidence\.py 00 --store"):
        stored("00_start_here")
