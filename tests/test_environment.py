"""The table that says what is missing, before anything is imported."""

import subprocess
import sys

import pytest

from course_utils import environment as room
from course_utils.environment import environment
from course_utils.paths import ROOT


def table() -> dict[str, str]:
    return {name: verdict for name, _, _, verdict in environment()}


def test_here_everything_is_good_and_every_requirement_has_its_row():
    asked = (ROOT / "requirements.txt").read_text().split()
    assert len(environment()) == len(asked) + len(room.OPTIONAL)
    assert {verdict for name, verdict in table().items() if name not in room.OPTIONAL} == {"yes"}


@pytest.mark.parametrize(("found", "verdict"), [("missing", "NO"), ("1.13.1", "NO"), ("2.99.0", "yes"), ("2.12.0.dev1", "yes")])
def test_a_package_that_is_missing_or_too_old_is_said(monkeypatch, found, verdict):
    monkeypatch.setattr(room, "_installed", lambda name: found if name == "torch" else "99")
    assert table()["torch"].startswith(verdict)
    if verdict == "NO":
        assert table()["torch"] == 'NO: pip install "torch>=2.11"'


def test_what_is_optional_is_never_a_fault(monkeypatch):
    monkeypatch.setattr(room, "_installed", lambda name: "missing")
    assert table()["ipycanvas"] == "no: pip install ipycanvas"
    assert table()["numpy"].startswith("NO")


def test_the_table_is_made_without_importing_torch():
    code = "import sys; from course_utils.environment import environment; environment(); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_package_that_is_not_installed_is_missing():
    assert room._installed("no-such-package-anywhere") == "missing"
    assert room._installed("torch")[0].isdigit() and "+" not in room._installed("torch")
