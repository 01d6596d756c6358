"""A course of one tiny lesson in a temporary folder, for the tests of the workshop."""

from pathlib import Path

COURSE = """
title = "Toy"
repository = "someone/toy"
branch = "main"
[[lesson]]
id = "00"
name = "00_toy"
title = "A toy lesson"
objectives = ["add", "wait"]
needs = "nothing"
minutes = 5
seconds = 60
[[planned]]
id = "01"
title = "Another toy"
"""

SOURCE = """\
# %% [markdown]
# ## A section

# %% tags=["parameters"]
PROFILE: str = "embedded"  # [embedded | imagenet] the world
SEED: int = 0  # the seed
DEVICE: str = "auto"  # [auto | cpu | cuda | mps]
OUT: str = "../build/lessons/00"  # where results go
RATE: float = 0.5  # a learning rate
FLIP: bool = False  # whether to flip

# %%
import json
from pathlib import Path

print(OUT, SEED)

# %% tags=["exercise-00.1"]
def double(number):
    # <solution>
    return 2 * number
    # <stub>
    # if number:
    #     return ...
    # </stub>

# %% tags=["check-00.1"]
def check(name, answer):
    print(name, "correct" if answer(3) == 6 else "not attempted")

check("00.1", double)

# %%
folder = Path(OUT, "evidence")
folder.mkdir(parents=True, exist_ok=True)
record = {"claim": "seven <b>beats</b> the seed", "value": 7 - SEED, "low": 1.25, "high": 9, "n": 3, "unit": "points"}
record |= {"rule": "low > 0", "holds": SEED < 7, "origin": "live", "seeds": [SEED]}
_ = (folder / "00_toy.json").write_text(json.dumps([record]))
"""

README = "# Toy\n\n<!-- lessons -->\n<!-- /lessons -->\n\nThe end.\n"


def make_course(root: Path, source: str = SOURCE) -> Path:
    """Write the toy course under `root`, nothing derived yet, and return `root`."""
    (root / "notebooks" / "source").mkdir(parents=True, exist_ok=True)
    (root / "course.toml").write_text(COURSE)
    (root / "README.md").write_text(README)
    (root / "notebooks" / "source" / "00_toy.py").write_text(source)
    return root
