"""The house itself: its files are all there, agree with each other, and say only what is true."""

import ast
import json
import os
import re
import shutil
import subprocess
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from course_utils.data.digits import SPLIT_SEED, SPLITS
from course_utils.data.photos import PHOTOGRAPHS
from course_utils.paths import ROOT
from tools.course import read_course

# The rooms of course_utils in the order in which data flow.
ROOMS = [
    "paths",
    "profile",
    "download",
    "data",
    "backbones",
    "fusion",
    "adaptation",
    "training",
    "evaluate",
    "features",
    "evidence",
    "plots",
    "export",
    "exercises",
]
PACKAGE = sorted((ROOT / "course_utils").rglob("*.py"))
GUIDES = ["README.md", "CONTRIBUTING.md", "data/README.md"]


def text(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def requirements(path: str) -> dict[str, Requirement]:
    lines = [line.partition("#")[0].strip() for line in text(path).splitlines()]
    found = [Requirement(line) for line in lines if line and not line.startswith("-")]
    return {canonicalize_name(requirement.name): requirement for requirement in found}


def tracked() -> list[Path]:
    """The files of the repository, new ones that git does not ignore among them."""
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip(reason="not in a git repository")
    command = ["git", "-c", f"safe.directory={ROOT}", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return [path for path in (ROOT / name for name in done.stdout.split("\0") if name) if path.is_file()]


@pytest.mark.parametrize("lesson", read_course().lessons, ids=lambda lesson: lesson.id)
def test_every_lesson_has_its_files(lesson) -> None:
    for path in (f"source/{lesson.name}.py", f"checks/{lesson.id}.py", f"{lesson.name}.ipynb", f"solutions/{lesson.name}.ipynb"):
        assert (ROOT / "notebooks" / path).is_file(), path
    assert lesson.name.startswith(f"{lesson.id}_")
    assert 3 <= len(lesson.objectives) <= 5
    assert lesson.minutes <= 60


def test_conda_and_pip_ask_for_the_same_floors() -> None:
    lines = re.findall(r"^  - (\S+)$", text("environment.yml").split("dependencies:")[1], re.MULTILINE)
    conda = {Requirement(line).name: Requirement(line).specifier for line in lines}
    conda["torch"] = conda.pop("pytorch")
    project = tomllib.loads(text("pyproject.toml"))["project"]
    assert conda.pop("python") == project["requires-python"]
    del conda["pip"]
    extra = {name: conda.pop(name) for name in ("jupyterlab", "ipycanvas")}
    assert conda == {name: requirement.specifier for name, requirement in requirements("requirements.txt").items()}
    developers = requirements("requirements-dev.txt")
    assert extra == {name: developers[name].specifier for name in extra}


def test_constraints_pin_what_is_required_to_one_version_that_fits() -> None:
    pins = requirements("constraints.txt")
    for name, pin in pins.items():
        assert [specifier.operator for specifier in pin.specifier] == ["=="], name
        assert "+" not in str(pin.specifier) and "*" not in str(pin.specifier), name
        assert not name.startswith(("nvidia-", "cuda-", "triton")), f"{name} is for one kind of machine"
    for name, requirement in (requirements("requirements.txt") | requirements("requirements-dev.txt")).items():
        assert name in pins, f"constraints.txt does not pin {name}"
        (version,) = (specifier.version for specifier in pins[name].specifier)
        assert requirement.specifier.contains(version), f"{name} {version} is not {requirement.specifier}"


def test_requirements_stay_plain() -> None:
    """setuptools reads requirements.txt as the package's dependencies, and fails on options."""
    assert not [line for line in text("requirements.txt").splitlines() if line.startswith("-")]
    assert "-r requirements.txt" in text("requirements-dev.txt")
    assert "-r ../requirements.txt" in text("binder/requirements.txt")


def test_no_file_names_a_place_on_one_machine() -> None:
    place = re.compile(r"(?<![\w+/=.])/(?:home|root|tmp|work|Users)/\w")
    for path in tracked():
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        found = [f"{path.relative_to(ROOT)}:{number}" for number, line in enumerate(lines, 1) if place.search(line)]
        assert not found, f"{found} name a path that only one machine has"


def test_the_guides_are_finished_and_plain() -> None:
    unfinished = re.compile(r"\b(?:TODO|FIXME|XXX|TBD)\b")
    hype = re.compile(
        r"\b(?:cutting[- ]edge|state[- ]of[- ]the[- ]art|powerful|seamless\w*|effortless\w*|blazing\w*)\b", re.IGNORECASE
    )
    sources = [path.relative_to(ROOT).as_posix() for path in (ROOT / "notebooks/source").glob("*.py")]
    for path in [*GUIDES, *sources]:
        found = [line for line in text(path).splitlines() if unfinished.search(line) or hype.search(line)]
        assert not found, f"{path}: {found}"


def test_every_make_target_that_a_guide_names_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", text("Makefile"), re.MULTILINE))
    asked = {target for guide in GUIDES for target in re.findall(r"(?:`|^)make ([a-z-]+)", text(guide), re.MULTILINE)}
    assert {"setup", "run", "lab", "test", "test-imagenet", "notebooks", "bench", "help"} <= targets
    assert {"run", "test"} <= asked <= targets


FAKE_PYTHON = """#!/bin/sh
echo "$@" >> log
case "$*" in
  "-m venv .venv") mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  *"$FAILS"*) exit 1 ;;
esac
"""


@pytest.mark.skipif(not shutil.which("make"), reason="no make on this machine")
def test_an_install_that_was_cut_off_is_done_again_and_one_that_was_not_is_left_alone(tmp_path: Path) -> None:
    inputs = ["requirements.txt", "requirements-dev.txt", "constraints.txt", "pyproject.toml"]
    for name in ["Makefile", *inputs]:
        shutil.copy(ROOT / name, tmp_path)
    python, log = tmp_path / "python", tmp_path / "log"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)

    def setup(fails: str = "never", name: str = str(python)) -> tuple[int, str, str]:
        log.write_text("")
        command = ["make", "setup", f"PYTHON={name}"]
        done = subprocess.run(command, cwd=tmp_path, env={**os.environ, "FAILS": fails}, capture_output=True, text=True)
        return done.returncode, log.read_text(), done.stderr

    assert "no-python is not installed" in setup(name="no-python")[2]
    for fails in ("-r requirements-dev.txt", "-e .", "import torch, torchvision"):
        assert setup(fails)[0] != 0
        assert not (tmp_path / ".venv/.stamp").exists()
    assert "do not fit together" in setup("import torch, torchvision")[2]
    code, asked, _ = setup()
    assert code == 0 and "pip install" in asked and "-r requirements-dev.txt -c constraints.txt" in asked
    assert setup()[:2] == (0, "")
    for name in inputs:
        later = (tmp_path / ".venv/.stamp").stat().st_mtime + 5
        os.utime(tmp_path / name, (later, later))
        assert "pip install" in setup()[1]
        os.utime(tmp_path / ".venv/.stamp", (later + 5, later + 5))


def test_a_test_that_is_skipped_says_why() -> None:
    for path in sorted((ROOT / "tests").rglob("*.py")):
        nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
        reasoned = {
            id(node.func)
            for node in nodes
            if isinstance(node, ast.Call) and any(keyword.arg == "reason" for keyword in node.keywords)
        }
        marks = [node for node in nodes if isinstance(node, ast.Attribute) and node.attr in ("skip", "skipif", "xfail")]
        assert [f"{path.name}:{mark.lineno}" for mark in marks if id(mark) not in reasoned] == []


def test_ci_runs_what_the_guides_say() -> None:
    assert (ROOT / ".ci/run").stat().st_mode & 0o111 and (ROOT / "binder/postBuild").stat().st_mode & 0o111
    commands = [line for line in text(".ci/run").splitlines() if line.startswith("make ")]
    assert commands[-2:] == ["make test", "make test-imagenet"]
    assert "bash .ci/run" in text(".github/workflows/ci.yml")


@pytest.mark.parametrize("guide", GUIDES)
def test_links_to_files_resolve(guide: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", text(guide)):
        if not re.match(r"[a-z]+:|#", target):
            assert ((ROOT / guide).parent / target.partition("#")[0]).exists(), f"{guide} links to {target}"


@pytest.mark.parametrize("guide", GUIDES)
def test_files_that_a_guide_names_exist(guide: str) -> None:
    """Paths such as `tools/run.py`; those with a NAME or NN in them are patterns."""
    named = re.findall(r"\b(?:course_utils|tools|tests|binder|notebooks|data)/[\w./]*\w\.(?:py|md|txt|toml)\b", text(guide))
    for path in named:
        assert re.search("NN|NAME", path) or (ROOT / path).exists(), f"{guide} names {path}"


def test_the_data_card_has_the_sizes_and_photographs_of_the_code() -> None:
    card = text("data/README.md")
    names = {"source": "source", "train": "training", "valid": "validation", "test": "test"}
    for split, count in SPLITS.items():
        assert f"| {names[split]} | {count:,} |" in card
    assert f"seed {SPLIT_SEED}" in card
    for group in PHOTOGRAPHS.values():
        for name in group:
            assert re.search(rf"^\| {name.split('.')[0]} \| scikit-(image|learn) \|", card, re.MULTILINE), name


def test_every_weight_file_has_a_card_and_all_are_small() -> None:
    weights, cards = ({path.stem for path in (ROOT / "data/weights").glob(f"*.{kind}")} for kind in ("safetensors", "json"))
    assert weights == cards
    assert sum(path.stat().st_size for path in (ROOT / "data/weights").glob("*.safetensors")) <= 8_000_000
    for name in cards:
        card = json.loads(text(f"data/weights/{name}.json"))
        assert {"command", "seed", "accuracy", "licence", "sha256"} <= set(card)


def room(path: Path) -> str:
    return path.relative_to(ROOT / "course_utils").parts[0].removesuffix(".py")


def imported(path: Path) -> list[tuple[str, int]]:
    """The rooms that a file imports from, anywhere in it, with their lines."""
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        modules: list[str] = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno} imports relatively"
            modules = (
                [f"{node.module}.{alias.name}" for alias in node.names] if node.module == "course_utils" else [str(node.module)]
            )
        for module in modules:
            if module.startswith("course_utils."):
                found.append((module.split(".")[1], node.lineno))
            assert module.split(".")[0] not in ("tools", "tests"), f"{path.name}:{node.lineno} imports {module}"
    return found


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: path.relative_to(ROOT / "course_utils").as_posix())
def test_imports_point_one_way(path: Path) -> None:
    if path == ROOT / "course_utils/__init__.py":
        assert imported(path) == []
        return
    for other, line in imported(path):
        assert ROOMS.index(other) <= ROOMS.index(room(path)), f"{path.name}:{line} imports from {other}, a room below its own"


def test_the_guide_lists_the_rooms_in_that_order() -> None:
    section = text("CONTRIBUTING.md").split("## The rooms of course_utils")[1].split("\n## ")[0]
    assert re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE) == ROOMS
    assert {room(path) for path in PACKAGE} - {"__init__"} == set(ROOMS)


def test_the_package_that_is_installed_is_all_of_it() -> None:
    packages = tomllib.loads(text("pyproject.toml"))["tool"]["setuptools"]["packages"]
    assert set(packages) == {".".join(path.relative_to(ROOT).parent.parts) for path in PACKAGE}


def test_the_package_stays_small() -> None:
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in PACKAGE) <= 2500


def public_names(path: Path) -> list[tuple[str, bool]]:
    """Public functions, classes and methods of a file, each with whether it is documented.

    A method may be documented by its class, which then names it in backticks, or by the protocol that it implements.
    """
    tree = ast.parse(path.read_text(encoding="utf-8"))
    documented = {"forward"}  # documented by the class, whose one purpose it is
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            documented |= {
                member.name
                for member in node.body
                if isinstance(member, ast.FunctionDef) and f"`{member.name}" in (ast.get_docstring(node) or "")
            }
    found = []
    for node in tree.body:
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
            continue
        found.append((node.name, ast.get_docstring(node) is not None))
        for member in node.body if isinstance(node, ast.ClassDef) else []:
            if isinstance(member, ast.FunctionDef) and not member.name.startswith("_"):
                bare = len(member.body) == 1 and ast.unparse(member.body[0]) == "..."
                found.append(
                    (f"{node.name}.{member.name}", bare or member.name in documented or ast.get_docstring(member) is not None)
                )
    return found


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: path.relative_to(ROOT / "course_utils").as_posix())
def test_public_names_have_docstrings(path: Path) -> None:
    assert [name for name, documented in public_names(path) if not documented] == []


def test_sections_of_the_readme_stand_in_order() -> None:
    """The two commands come first; the markers of the table stand once each."""
    readme = text("README.md")
    places = [
        readme.index(part)
        for part in ("make run", "make test", "py -m venv", "<!-- lessons -->", "<!-- /lessons -->", "## Licence")
    ]
    assert all(first < second for first, second in pairwise(places))
