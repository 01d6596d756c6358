"""Lesson 12 on speed and on several processes: its own cells race, scale and train as they say."""

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.utils.data import DistributedSampler

from course_utils.backbones import centred
from course_utils.data.splits import Split
from course_utils.paths import NOTEBOOKS
from tools.evidence import definitions

SOURCE = NOTEBOOKS / "source" / "12_losses_and_regularisation.py"
TAGS = frozenset({"parameters", "setup", "speed", "by-hand-speed", "worker", "catches"})
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def lesson() -> dict:
    return definitions(SOURCE, TAGS)


def test_ways_race_by_turns_and_a_ratio_is_taken_within_a_turn(lesson: dict, monkeypatch) -> None:
    order, warm = [], []
    names = ["plain", "channels-last", "bfloat16", "DataLoader", "channels-last, bfloat16"]
    clock = dict(zip(names, (2.0, 1.0, 4.0, 8.0, 2.5), strict=True))

    def fake(device, size, **settings):
        name = next(name for name, own in lesson["WAYS"].items() if own == settings)
        return lambda steps: warm.append(name) or name

    def seconds_of(train, steps, device):
        order.append(train(steps))
        slower = 1 if len(order) <= len(names) else 3  # in the second turn, for all
        return slower * clock[order[-1]]

    monkeypatch.setitem(lesson, "trainer", fake)
    monkeypatch.setitem(lesson, "seconds_of", seconds_of)
    rows = list(lesson["speed_rows"](CPU, 2, 5, 16))
    assert warm[:5] == names, "each is warmed up once before any is timed"
    assert order == [*reversed(names), *names], "so that nobody always comes first"
    expected = dict(zip(names, (1.0, 2.0, 0.5, 0.25, 0.8), strict=True))
    assert rows == [
        {"way": name, "batch": 16, "turn": turn, "ratio": ratio} for turn in (0, 1) for name, ratio in expected.items()
    ]


def test_the_ways_that_race_on_a_cpu_train_and_no_float16_is_among_them(lesson: dict) -> None:
    rows = list(lesson["speed_rows"](CPU, 1, 1, 4))
    assert [row["way"] for row in rows] == ["plain", "channels-last", "bfloat16", "DataLoader", "channels-last, bfloat16"]
    assert all(row["ratio"] > 0 for row in rows) and rows[0]["ratio"] == 1


def test_without_a_compiler_the_race_goes_on(lesson: dict, monkeypatch, capsys) -> None:
    def broken(model):
        def call(pictures):
            raise RuntimeError("no compiler, says a message of many lines")

        return call

    monkeypatch.setattr(torch, "compile", broken)
    monkeypatch.setitem(lesson, "WAYS", {"plain": {}, "compiled": {"compiled": True}})
    rows = list(lesson["speed_rows"](CPU, 1, 1, 4, compiled=True))
    assert [row["way"] for row in rows] == ["plain"]
    assert capsys.readouterr().out == "torch.compile is left out, it does not work here: RuntimeError\n"
    monkeypatch.setitem(lesson, "WAYS", {"plain": {"compiled": True}})
    with pytest.raises(RuntimeError, match="no compiler"):
        next(lesson["speed_rows"](CPU, 1, 1, 4, compiled=True))


@pytest.mark.parametrize("source", ["resident", "loaded"])
def test_both_sources_give_the_pictures_with_their_own_labels(lesson: dict, source: str) -> None:
    pictures = torch.arange(10, dtype=torch.uint8)[:, None, None, None].repeat(1, 3, 8, 8)
    split = Split(pictures, torch.arange(10), ("a",) * 10)
    stream = lesson[source](split, centred, 4, CPU)
    for _ in range(5):
        pictures, labels = next(stream)
        assert pictures.shape == (4, 3, 8, 8)
        assert torch.allclose(pictures, centred(split.pictures[labels]))


def test_only_a_network_inside_autocast_runs_in_16_bits_and_keeps_less(lesson: dict) -> None:
    pictures, labels = torch.randint(256, (16, 3, 32, 32)).to(torch.uint8), torch.arange(16) % 4
    plain, loss, whole = (lesson["run_in"](where, pictures, labels) for where in ("nothing", "the loss alone", "everything"))
    assert torch.equal(plain[0], loss[0]) and plain[0].dtype == torch.float32 and whole[0].dtype == torch.bfloat16
    assert loss[1] >= plain[1] and whole[1] < 0.8 * plain[1]
    with pytest.raises(AssertionError, match=r"ran in torch\.float32"):
        lesson["assert_16_bits"](loss[0])
    lesson["assert_16_bits"](whole[0])
    lesson["assert_16_bits"](whole[0].half())


def test_a_small_gradient_needs_a_scale_in_float16_alone(lesson: dict) -> None:
    gradient = lesson["gradient_of"]
    assert gradient(torch.float16) == 0
    for found in (gradient(torch.float16, 65536.0), gradient(torch.bfloat16), gradient(torch.float32)):
        assert found == pytest.approx(1e-8, rel=0.02)
        lesson["assert_survives"](found)
    with pytest.raises(AssertionError, match="needs a gradient scaler"):
        lesson["assert_survives"](gradient(torch.float16))


def test_clipping_before_unscaling_shortens_the_step_by_the_scale(lesson: dict) -> None:
    assert lesson["moved_by"](True) == pytest.approx(1, rel=1e-4)
    assert lesson["moved_by"](False) == pytest.approx(1 / 65536, rel=1e-4)


def test_what_catches_weights_and_shards(lesson: dict) -> None:
    same, a = lesson["assert_same_weights"], {"w": torch.zeros(3), "b": torch.ones(2)}
    same(a, {"w": torch.full((3,), 1e-6), "b": torch.ones(2)}, 1e-5)
    for wrong in ({"w": torch.zeros(3), "b": torch.tensor([1.0, 1.1])}, {"w": torch.full((3,), torch.nan), "b": torch.ones(2)}):
        with pytest.raises(AssertionError, match="apart"):
            same(a, wrong, 1e-5)
    with pytest.raises(AssertionError, match="two different networks"):
        same(a, {"w": torch.zeros(3)}, 1e-5)
    disjoint = lesson["assert_disjoint"]
    disjoint([[0, 2], [1, 3]])
    disjoint([torch.tensor([0, 2]), torch.tensor([1, 3]), torch.tensor([4])])
    with pytest.raises(AssertionError, match="processes 0 and 2 have 1 pictures in common"):
        disjoint([torch.tensor([0, 2]), torch.tensor([1]), torch.tensor([2, 3])])


def test_the_reason_is_the_first_error_and_names_no_place(lesson: dict) -> None:
    written = """Traceback (most recent call last):
[rank1]:   File "worker.py", line 3, in main
[rank1]: ValueError: it was I
[rank0]: RuntimeError: the other one has gone
torch.distributed.elastic.multiprocessing.errors.ChildFailedError: """
    assert lesson["reason"](written) == "ValueError: it was I"
    of_torch = "torch.distributed.DistNetworkError: nobody there"
    assert lesson["reason"](of_torch) == of_torch
    assert lesson["reason"]("") == "no reason was written"


@pytest.fixture(scope="module")
def folder(lesson: dict, tmp_path_factory):
    """A folder with the worker and 70 digits, a number that batches of 64 do not divide."""
    folder = tmp_path_factory.mktemp("processes")
    (folder / "worker.py").write_text(lesson["WORKER"], encoding="utf-8")
    generator = torch.Generator().manual_seed(0)
    data = {"pictures": torch.rand(70, 1, 32, 32, generator=generator), "labels": torch.arange(70) % 10}
    save_file(data, folder / "digits.safetensors")
    return folder


def left_behind(folder) -> list:
    """Processes that still run this folder's worker."""
    return [p for p in psutil.process_iter(["cmdline"]) if str(folder / "worker.py") in (p.info["cmdline"] or [])]


needs_gloo = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="this PyTorch has no gloo"
)


@needs_gloo
def test_two_processes_end_with_the_weights_of_one_where_the_lesson_says_so(lesson: dict, folder) -> None:
    code, written = lesson["torchrun"](folder, 3)
    assert code == 0, written
    first, second = (load_file(folder / f"rank{rank}.safetensors") for rank in (0, 1))
    data = load_file(folder / "digits.safetensors")
    for name, same in {
        "shared out": True,
        "no sampler": False,
        "batch norm": False,
        "frozen statistics": True,
        "group norm": True,
    }.items():
        alone = lesson["one_process"](name, data, 3)
        ours, other = (lesson["of_run"](found, name, alone) for found in (first, second))
        lesson["assert_same_weights"](ours, other, 1e-6)
        assert (lesson["apart"](alone, ours) < 1e-5) == same, name
        assert lesson["apart"](alone, lesson["one_process"](name, data, 4)) > 1e-4, "the seed moves the order"
    seen = [found["shared out/seen"] for found in (first, second)]
    lesson["assert_disjoint"](seen)
    assert sorted(torch.cat(seen).tolist()) == list(range(70))
    sampler = DistributedSampler(data["labels"], 2, 1, seed=3)
    assert seen[1].tolist() == list(sampler), "what a sampler says before the first set_epoch is the order of epoch 0"
    with pytest.raises(AssertionError, match="70 pictures in common"):
        lesson["assert_disjoint"]([found["no sampler/seen"] for found in (first, second)])
    assert not left_behind(folder)


@needs_gloo
def test_a_worker_that_dies_ends_the_run_with_its_message(lesson: dict, folder) -> None:
    (folder / "rank0.safetensors").write_bytes(b"of an earlier run")
    code, written = lesson["torchrun"](folder, 3, "dies")
    assert code == 1
    assert lesson["reason"](written) == "RuntimeError: process 1 cannot read its pictures"
    assert not list(folder.glob("rank*")), "nothing of an earlier run can be taken for this one's"
    assert not left_behind(folder)


def test_without_gloo_nothing_is_started(lesson: dict, folder, monkeypatch) -> None:
    monkeypatch.setattr(torch.distributed, "is_gloo_available", lambda: False)
    monkeypatch.setattr(lesson["subprocess"], "Popen", lambda *a, **k: pytest.fail("it was started"))
    code, written = lesson["torchrun"](folder, 3)
    assert code and lesson["reason"](written) == "RuntimeError: this PyTorch comes without gloo"
