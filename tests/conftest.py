"""What every test session has: no network but loopback, and the same random numbers."""

import importlib.util
import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
GUARD = str(ROOT / "tests" / "guard")

# Notebook kernels and worker processes that the session starts inherit the guard through PYTHONPATH.
os.environ["PYTHONPATH"] = os.pathsep.join([GUARD, *filter(None, [os.environ.get("PYTHONPATH")])])
_spec = importlib.util.spec_from_file_location("network_guard", Path(GUARD) / "sitecustomize.py")
assert _spec is not None and _spec.loader is not None
_spec.loader.exec_module(importlib.util.module_from_spec(_spec))

pytest.register_assert_rewrite("tests.exercise_tests")

# Claims that do not hold fail in the session's notebooks.
os.environ.setdefault("COURSE_STRICT", "1")


@pytest.fixture(autouse=True)
def _seeded():
    random.seed(0), np.random.seed(0), torch.manual_seed(0)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))])
def device(request) -> torch.device:
    return torch.device(request.param)


@pytest.fixture(scope="session")
def data_card() -> str:
    return (ROOT / "data" / "README.md").read_text(encoding="utf-8")
