"""Evidence: experiments repeated over seeds, intervals, and claims that are held to a rule."""

import json
import operator
import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import norm
from scipy.stats import t as student_t

from course_utils.paths import EVIDENCE, write_whole

RESAMPLES = 2000
_COMPARE = {">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le}


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with its 95 % interval. `n` is the number of seeds."""

    value: float
    low: float
    high: float
    seeds: tuple[int, ...]
    unit: str = ""

    @property
    def n(self) -> int:
        return len(self.seeds)

    def __str__(self) -> str:
        seeds = f"{self.n} seeds" if self.n > 1 else "one seed: the interval is over test pictures alone"
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}], {seeds}"


def estimate(hits: Sequence[np.ndarray], seeds: Sequence[int], unit: str = "accuracy") -> Estimate:
    """Mean accuracy with a 95 % interval that resamples seeds and test pictures together.

    hits: one bool array `(n_test,)` a seed, all over the same test pictures.
    """
    values = np.stack(hits).astype(float)
    return ratio(values, np.ones_like(values), seeds, unit)


def over_seeds(values: Sequence[float], seeds: Sequence[int], unit: str) -> Estimate:
    """The mean of one number a seed, with a 95 % interval over seeds alone."""
    return estimate([np.array([value]) for value in values], seeds, unit)


def compare(ours: Sequence[np.ndarray], other: Sequence[np.ndarray], seeds: Sequence[int], unit: str = "accuracy") -> Estimate:
    """Mean paired difference `ours − other` with a 95 % interval that resamples seeds and test pictures together.

    Both are bool arrays `(n_test,)`, one a seed, paired by seed and by picture. Raises `ValueError` where they differ
    in number or length.
    """
    if len(ours) != len(other) or any(len(a) != len(b) for a, b in zip(ours, other, strict=True)):
        raise ValueError("a paired comparison needs the same seeds and the same test pictures on both sides")
    difference = np.stack(ours).astype(float) - np.stack(other)
    return ratio(difference, np.ones_like(difference), seeds, unit)


def ratio(above: np.ndarray, below: np.ndarray, seeds: Sequence[int], unit: str) -> Estimate:
    """The ratio of two sums over the same seeds and test pictures, `(seeds, n_test)` each, which are resampled together.

    Few seeds make a bootstrap too sure of itself: its percentile interval is stretched as Student's t is wider than the normal.
    """
    count, pictures = above.shape
    if count != len(seeds):
        raise ValueError(f"{count} rows of results for {len(seeds)} seeds")
    rows, columns = resampling(count, pictures)
    sums = [np.einsum("rs,rs->r", rows, columns @ part.T) for part in (above, below)]
    value = float(above.sum() / below.sum())
    low, high = value + stretch(count) * (np.quantile(sums[0] / sums[1], [0.025, 0.975]) - value)
    return Estimate(value, float(low), float(high), tuple(int(seed) for seed in seeds), unit)


@lru_cache(maxsize=4)  # drawing takes ten times longer than using what was drawn
def resampling(*sizes: int) -> tuple[np.ndarray, ...]:
    """How much each row and each column counts in every resampled mean: `(RESAMPLES, size)` each, the same at every call."""
    rng = np.random.default_rng(0)
    return tuple(rng.multinomial(size, np.full(size, 1 / size), size=RESAMPLES) / size for size in sizes)


def stretch(seeds: int) -> float:
    """How much wider than a bootstrap's the 95 % interval of so many seeds must be; 1 for one seed, whose spread is unknown."""
    if seeds == 1:
        return 1.0
    return float(student_t.ppf(0.975, seeds - 1) / norm.ppf(0.975) * np.sqrt(seeds / (seeds - 1)))


class Claims:
    """The claims of one run of a lesson, written to `OUT/evidence/NN_name.json`, one record a claim."""

    def __init__(self, lesson: str, out: str | Path) -> None:
        self.path = Path(out) / "evidence" / f"{lesson}.json"
        self.records: dict[str, dict] = {}

    def __call__(self, claim: str, estimate: Estimate, *, rule: str, origin: str = "live") -> None:
        """Print a claim with its value, interval and seeds, and whether it held, and record it.

        rule: comparisons of `value`, `low` or `high` with numbers, joined by "and", such as "low > 0.2". origin:
        "live" or "stored". Under COURSE_STRICT=1, as in continuous integration, a claim that does not hold raises
        `AssertionError`. Raises `ValueError` for a rule that cannot be read.
        """
        holds = follows(rule, estimate)
        record = {"claim": claim, **asdict(estimate), "n": estimate.n, "rule": rule, "holds": holds, "origin": origin}
        self.records[claim] = record
        content = json.dumps(list(self.records.values()), indent=1, ensure_ascii=False).encode()
        write_whole(self.path, lambda file: file.write(content))
        print(f"{'✓' if holds else '✗'} {claim}: {estimate} ({origin})")
        if not holds:
            message = f"This claim did not hold in this run: {claim!r} asks for {rule}, and the run gave {estimate}."
            if os.environ.get("COURSE_STRICT") == "1":
                raise AssertionError(message)
            print(message)

    def table(self) -> pd.DataFrame:
        """Every claim of this run so far."""
        return pd.DataFrame(list(self.records.values()))


def follows(rule: str, estimate: Estimate) -> bool:
    """Whether an estimate keeps a rule such as "low > 0.2 and value < 1"."""
    outcomes = []
    for part in rule.split(" and "):
        match = re.fullmatch(r"\s*(value|low|high)\s*(>=|<=|>|<)\s*(-?\d*\.?\d+)\s*", part)
        if match is None:
            raise ValueError(f"cannot read the rule {part!r}; write it like 'low > 0.2', with value, low or high")
        name, sign, bound = match.groups()
        outcomes.append(bool(_COMPARE[sign](getattr(estimate, name), float(bound))))
    return all(outcomes)


def unpack_hits(text: str, count: int) -> np.ndarray:
    """The bool array `(count,)` that a stored table holds as hexadecimal text."""
    return np.unpackbits(np.frombuffer(bytes.fromhex(text), dtype=np.uint8), count=count).astype(bool)


def stored(name: str) -> pd.DataFrame:
    """A table of stored evidence, `data/evidence/NAME.csv`, whose settings and date stand in NAME.json beside it.

    Raises `FileNotFoundError` with the command that makes it.
    """
    path = EVIDENCE / f"{name}.csv"
    if not path.exists():
        raise FileNotFoundError(f"{path.name} is missing: make it with `python tools/evidence.py {name[:2]} --store`")
    return pd.read_csv(path)
