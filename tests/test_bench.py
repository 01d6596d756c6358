"""The bench: sides take turns and do the same work, only training is on the clock, and a missed goal is said to be one."""

import json
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from itertools import count
from math import inf
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from course_utils.backbones import Classifier, load_backbone
from course_utils.data.batches import batches
from course_utils.data.splits import Split
from course_utils.evaluate import predict
from course_utils.evidence import unpack_hits
from tools import bench, bench_export, bench_races, bench_rows
from tools.bench_rows import Contest, Setting

CPU = torch.device("cpu")


class FakeTime:
    """A clock that only moves when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def costs(self, seconds: float, work: Callable) -> Callable:
        """The same work, which takes so long on this clock."""

        def slow(*args: object, **kwargs: object) -> object:
            self.now += seconds
            return work(*args, **kwargs)

        return slow


@pytest.fixture
def time() -> FakeTime:
    return FakeTime()


@pytest.fixture
def setting(time: FakeTime, tmp_path: Path) -> Setting:
    return Setting(CPU, tmp_path, pictures=130, clock=time)


def random_split(count: int) -> Split:
    """Random pictures of three classes."""
    generator = torch.Generator().manual_seed(1)
    pictures = torch.randint(256, (count, 3, 32, 32), generator=generator).to(torch.uint8)
    return Split(pictures, torch.arange(count) % 3, tuple("abc"))


def side(log: list[str], name: str, seconds: list[float]) -> Callable[[int], float]:
    def run(turn: int) -> float:
        log.append(f"{name}{turn}")
        return seconds[turn]

    return run


def test_the_sides_take_turns_and_the_first_turn_of_each_does_not_count() -> None:
    log: list[str] = []
    assert bench.alternate(side(log, "A", [999, 1, 2]), side(log, "B", [0.1, 4, 5]), runs=2) == ([1, 2], [4, 5])
    assert log == ["A0", "B0", "A1", "B1", "A2", "B2"]


def test_the_ratio_is_the_median_of_neighbouring_turns() -> None:
    """The machine becomes ten times slower half way, and one turn is disturbed: ours is twice as fast all the same."""
    ours, other = side([], "A", [99, 1, 1, 10, 10, 80]), side([], "B", [99, 2, 2, 20, 20, 20])
    row = bench.measure(Contest("X", 1.5, ours, other, runs=5, note=lambda: "seen"))
    assert (row.unit, row.ours, row.other, row.ratio, row.runs, row.note) == ("seconds", 10, 20, 2, 5, "seen")
    row = bench.measure(Contest("X", 1.5, ours, other, runs=3, pictures=100), runs=5)
    assert (row.unit, row.ours, row.other, row.ratio, row.runs) == ("pictures a second", 10, 5, 2, 5)


def test_a_stopwatch_counts_what_lies_between_start_and_stop(setting: Setting, time: FakeTime) -> None:
    watch = setting.watch()
    for on, off in ((1, 10), (2, 20)):
        watch.start()
        time.now += on
        watch.stop()
        time.now += off
    assert watch.seconds == 3
    assert setting.time(time.costs(5, print)) == 5


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_stopwatch_waits_for_the_gpu(monkeypatch: pytest.MonkeyPatch, time: FakeTime) -> None:
    waited: list[object] = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    Setting(torch.device("cuda"), Path(), clock=time).time(lambda: None)
    assert len(waited) == 2


@pytest.mark.parametrize("loop", [bench_rows.plain_loop, bench_rows.channels_last_loop])
def test_both_sides_do_the_same_arithmetic(loop: Callable) -> None:
    split = random_split(300)
    fresh = Classifier(load_backbone("resnet_near", pretrained=False), 3)
    ours, other = deepcopy(fresh), deepcopy(fresh)
    bench_rows.our_loop(ours, split, steps=2)
    loop(other, split, steps=2)
    start, one, two = (torch.cat([p.detach().flatten() for p in model.parameters()]) for model in (fresh, ours, other))
    moved = (one - start).norm()
    assert moved > 0.1
    assert (one - two).norm() < 0.2 * moved  # rounding moves AdamW where a gradient is all but zero; another rate gives .5


def test_loops_start_from_the_same_network_and_making_it_is_off_the_clock(
    setting: Setting, time: FakeTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bytes, int]] = []

    def loop(model: Classifier, split: Split, steps: int) -> None:
        seen.append((model.head.weight.detach().numpy().tobytes(), steps))
        torch.nn.init.zeros_(model.head.weight)

    monkeypatch.setattr(bench_rows, "deepcopy", time.costs(50, deepcopy))
    for name, seconds in (("our_loop", 1), ("plain_loop", 2), ("channels_last_loop", 3)):
        monkeypatch.setattr(bench_rows, name, time.costs(seconds, loop))
    contests = bench_rows.training_loops(setting)
    assert [(contest.ours(0), contest.other(0), contest.pictures) for contest in contests] == [(1, 2, 128)] * 2 + [
        (1, 3, 128)
    ] * 2
    assert {steps for _, steps in seen} == {2}
    assert len({weights for weights, _ in seen}) == 2  # one start for each network


def test_pictures_survive_as_files(tmp_path: Path) -> None:
    split = random_split(7)
    stored = bench_rows.as_files(split, tmp_path)
    assert stored.classes == split.classes
    there = {(picture.numpy().tobytes(), label) for picture, label in (stored[index] for index in range(7))}
    assert there == {(picture.numpy().tobytes(), label) for picture, label in (split[index] for index in range(7))}


def test_every_place_gives_every_picture_once_and_nothing_else_is_on_the_clock(
    setting: Setting, time: FakeTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second for each call of the transform: one for a batch on the device, one for each picture of a DataLoader."""
    seen: list[bytes] = []

    def transform(pictures: torch.Tensor) -> torch.Tensor:
        seen.extend(picture.numpy().tobytes() for picture in (pictures if pictures.dim() == 4 else pictures[None]))
        return pictures

    split = random_split(70)
    monkeypatch.setattr(bench_rows, "centred", time.costs(1, transform))
    memory, files = bench_rows.where_data_live(setting, split)
    assert "memory" in memory.name and "files" in files.name and memory.pictures == files.pictures == 70
    for run, seconds in ((memory.ours, 2), (memory.other, 70), (files.other, 70)):
        seen.clear()
        assert run(1) == seconds
        assert set(seen) == {picture.numpy().tobytes() for picture in split.pictures}


class FakeTraining:
    """A model that gets `rate` more pictures right after each step, each of one second; looking at it takes 50."""

    def __init__(self, time: FakeTime, monkeypatch: pytest.MonkeyPatch, rate: int = 1) -> None:
        self.time, self.rate, self.right = time, rate, 0
        monkeypatch.setattr(bench_races, "hits", time.costs(50, lambda model, valid: torch.arange(500) < self.right))

    def __call__(self, race: bench_races.Race, epochs: int) -> None:
        for epoch in range(epochs):
            for _ in race.epoch(epoch):
                self.time.now += 1
                self.right += self.rate


def a_race(setting: Setting, goal: int, every: int, steps: int = 10) -> bench_races.Race:
    model = Classifier(load_backbone("resnet_near", pretrained=False), 3)
    data = batches(random_split(6), model.transform, size=2, steps=steps)
    return bench_races.Race(data, model, setting.watch(), random_split(500), goal, every)


@pytest.mark.parametrize(
    ("goal", "every", "seconds", "reached"),
    [(8, 1, 8, True), (8, 4, 8, True), (8, 5, 10, True), (13, 5, 15, True), (20, 10, 20, True), (21, 5, 20, False)],
)
def test_a_race_ends_at_the_first_look_that_finds_the_goal_and_looking_is_off_the_clock(
    goal: int, every: int, seconds: int, reached: bool, setting: Setting, time: FakeTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    race, train = a_race(setting, goal, every), FakeTraining(time, monkeypatch)
    assert (race.seconds(lambda: train(race, epochs=2)), race.reached) == (seconds, reached)


def test_looking_leaves_every_part_in_its_mode() -> None:
    """A frozen body stays in evaluation mode while the head trains."""
    race = a_race(Setting(CPU, Path()), goal=501, every=1, steps=2)
    race.model.train()
    race.model.backbone.eval()
    before = [module.training for module in race.model.modules()]
    race.seconds(lambda: list(race.epoch(0)))
    assert [module.training for module in race.model.modules()] == before and not all(before) and any(before)


@pytest.fixture
def few_labels(monkeypatch: pytest.MonkeyPatch) -> tuple[Split, Split]:
    """Training and validation pictures for contests of four labels a class."""
    monkeypatch.setattr(bench_races, "LABELS", 4)
    return random_split(60), random_split(30)


def test_the_usual_probe_moves_its_head_only_and_the_race_is_looked_at_after_each_epoch(
    setting: Setting, few_labels: tuple[Split, Split], monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[int] = []
    race = a_race(setting, goal=501, every=3, steps=3)
    monkeypatch.setattr(bench_races, "hits", lambda model, valid: looked.append(race.steps) or torch.zeros(500))
    before = deepcopy(race.model.state_dict())
    bench_races.usual_probe(race, epochs=2)
    changed = {name for name, value in race.model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"head.weight", "head.bias"} and looked == [3, 6]


def test_the_cached_probe_computes_its_features_within_its_time_and_sets_the_goal(
    setting: Setting, few_labels: tuple[Split, Split], time: FakeTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    goals: list[int] = []
    learned: list[bytes] = []

    def features(backbone: object, split: Split, path: Path) -> torch.Tensor:
        assert not path.exists()
        path.touch()
        learned.append(split.pictures.numpy().tobytes())
        return split.pictures.flatten(1)[:, :8].float()

    def usual(race: bench_races.Race, epochs: int) -> None:
        goals.append(race.goal)
        learned.append(race.data.split.pictures.numpy().tobytes())  # type: ignore[attr-defined]
        assert race.every == len(race) == 1 and epochs == 7 and race.go_on
        FakeTraining(time, monkeypatch, 4)(race, epochs)

    train, valid = few_labels
    monkeypatch.setattr(bench_races, "cached_features", time.costs(2, features))
    monkeypatch.setattr(bench_races, "predict", time.costs(70, lambda backbone, split: torch.zeros(30, 8)))
    monkeypatch.setattr(bench_races, "usual_probe", usual)
    row = bench.measure(bench_races.probes(setting, train, valid, epochs=7)[0], runs=2)
    assert (row.ours, row.other, row.ratio, row.goal) == (2, 7, 3.5, 20)
    assert goals == [10] * 3  # all in one class, of three
    assert row.note == (
        "validation accuracy 0.333 and, after 7 epochs, 0.056; "
        "1.50 times, were the usual one stopped as soon as it is as accurate"
    )
    assert learned[::2] == learned[1::2] and len(set(learned)) == 3


def test_both_probes_run_for_real(setting: Setting, few_labels: tuple[Split, Split]) -> None:
    contest = bench_races.probes(setting, *few_labels, epochs=2)[1]
    assert (contest.ours(0), contest.ours(1), contest.other(1)) == (0, 0, 0)


@pytest.fixture
def fastai(monkeypatch: pytest.MonkeyPatch, time: FakeTime) -> Iterator[SimpleNamespace]:
    """A stub for fastai's side that keeps the rates which it was asked for."""
    stub = SimpleNamespace(rates=[], suggested_rate=time.costs(1000, lambda *_: 0.5))
    monkeypatch.setitem(sys.modules, "tools.bench_fastai", stub)
    monkeypatch.delattr("tools.bench_fastai", raising=False)
    yield stub


def test_fastai_counts_with_its_best_rate_and_the_search_is_off_the_clock(
    setting: Setting, few_labels: tuple[Split, Split], fastai: SimpleNamespace, time: FakeTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rate of .5, which lr_find suggests, gets there in 3 steps; smaller ones later or never."""
    steps = {1e-3: 1, 3e-3: 5, 1e-2: 9, 0.5: 27}

    def fine_tune(model: Classifier, race: bench_races.Race, folder: Path, epochs: int, rate: float) -> None:
        assert folder == setting.folder
        fastai.rates.append(rate)
        FakeTraining(time, monkeypatch, steps[rate])(race, epochs)

    fastai.fine_tune = fine_tune
    monkeypatch.setattr(bench_races, "fit", lambda model, race, **_: FakeTraining(time, monkeypatch, 14)(race, 10))
    monkeypatch.setattr(bench_races, "cached_probe", time.costs(6, bench_races.cached_probe))
    monkeypatch.setattr(bench_races, "GOAL", 2.7)  # of 30 pictures: 81 right
    row = bench.measure(bench_races.fine_tunings(setting, *few_labels)[1], runs=1)
    assert fastai.rates == [1e-3, 3e-3, 1e-2, 0.5] * 4  # two sizes of batches, two turns
    assert (row.ours, row.other, row.ratio) == (6 + 6, 3, 0.25)
    assert row.note == (
        "fit reached it in 1 of 1 turns, after 6 steps, fastai in 1 of 1 turns; 0.50 times, were fit to train all at once"
    )


def test_a_rate_of_fastai_that_is_slower_than_its_best_is_not_run_to_the_end(
    setting: Setting, few_labels: tuple[Split, Split], fastai: SimpleNamespace, time: FakeTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[int] = []

    def fine_tune(model: Classifier, race: bench_races.Race, folder: Path, epochs: int, rate: float) -> None:
        try:
            FakeTraining(time, monkeypatch, 9 if rate == 1e-3 else 0)(race, 30)
        finally:
            ran.append(race.steps)

    fastai.fine_tune = fine_tune
    monkeypatch.setattr(bench_races, "GOAL", 2.7)  # of 30 pictures: 81 right
    assert bench_races.fine_tunings(setting, *few_labels)[0].other(0) == 9
    assert ran == [9, 12, 12, 12] * 2  # the first look after 9 seconds


def test_lp_ft_starts_from_a_probe_that_is_made_on_the_clock(
    setting: Setting, few_labels: tuple[Split, Split], fastai: SimpleNamespace, time: FakeTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, valid = few_labels
    probes = []

    def probe(*given: object) -> object:
        probes.append(made(*given))
        return probes[-1]

    def fit(model: Classifier, race: bench_races.Race, **_: object) -> None:
        features = predict(model.backbone, valid)
        if probes:  # the plain recipe, which comes first, has none
            with torch.no_grad():
                assert (model.head(features).argmax(dim=1).numpy() == probes[-1].predict(features.numpy())).all()
        FakeTraining(time, monkeypatch, 14)(race, 10)

    made = bench_races.cached_probe
    monkeypatch.setattr(bench_races, "cached_probe", time.costs(5, probe))
    monkeypatch.setattr(bench_races, "fit", fit)
    monkeypatch.setattr(bench_races, "GOAL", 2.7)  # of 30 pictures: 81 right
    contest = bench_races.fine_tunings(setting, *few_labels)[0]
    assert contest.ours(0) == 5 + 6 and len(probes) == 1


def test_who_never_gets_there_takes_forever_if_it_is_us_and_all_its_time_if_it_is_fastai(
    setting: Setting, few_labels: tuple[Split, Split], fastai: SimpleNamespace, time: FakeTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    fastai.fine_tune = lambda model, race, folder, epochs, rate: FakeTraining(time, monkeypatch, 0)(race, 4)
    monkeypatch.setattr(bench_races, "fit", lambda model, race, **_: FakeTraining(time, monkeypatch, 0)(race, 9))
    contest = bench_races.fine_tunings(setting, *few_labels)[0]
    assert (contest.ours(0), contest.other(0)) == (inf, 4)


def test_without_fastai_its_rows_are_left_out_with_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "tools.bench_fastai", None)
    monkeypatch.delattr("tools.bench_fastai", raising=False)
    assert bench.main(["--only", "fine-tuning", "--out", str(tmp_path / "bench.json")]) == 2
    _, said = capsys.readouterr().out.splitlines()
    assert "fastai" in said and "pip install -r requirements-bench.txt -c constraints.txt" in said
    assert not (tmp_path / "bench.json").exists()


def test_fastai_itself_fine_tunes_the_same_network(setting: Setting) -> None:
    pytest.importorskip("fastai", reason="fastai is not installed")
    from tools import bench_fastai

    race = a_race(setting, goal=501, every=99, steps=2)
    parameters = [id(parameter) for group in bench_fastai.groups(race.model) for parameter in group]
    assert sorted(parameters) == sorted(map(id, race.model.parameters()))
    before = deepcopy(race.model.state_dict())
    assert 1e-7 < bench_fastai.suggested_rate(race.model, race.data, setting.folder) < 10
    assert all(torch.equal(value, before[name]) for name, value in race.model.state_dict().items())
    race.seconds(lambda: bench_fastai.fine_tune(race.model, race, setting.folder, 3, 1e-2))
    assert race.steps == 2 * (1 + 3)
    assert all(not torch.equal(value, before[name]) for name, value in race.model.named_parameters())


def arm_of_eight(table: pd.DataFrame, arm: str) -> tuple[list[np.ndarray], list[int]]:
    """The hits of eight pictures by seed, and the seeds, as the lesson's `arm_of` gives those of all."""
    rows = table[table["arm"] == arm].sort_values("seed")
    return [unpack_hits(text, 8) for text in rows["hits"]], rows["seed"].tolist()


class FakeFiles:
    """Stands for the lesson and for ONNX Runtime: notes what is made of what, and answers in so many seconds on a fake clock."""

    def __init__(self, time: FakeTime, monkeypatch: pytest.MonkeyPatch, **seconds: float) -> None:
        self.time, self.seconds, self.made, self.asked = time, seconds, {}, []
        monkeypatch.setattr(bench_export, "definitions", lambda source: self.lesson(source))
        monkeypatch.setattr(bench_export, "quantise", self.quantise)
        monkeypatch.setattr(bench_export, "session", self.session)

    def lesson(self, source: Path) -> dict[str, object]:
        assert source.name == "13_smaller_and_faster.py"
        return {
            "BACKBONES": ("A", "B"),
            "ROUNDS": 3,
            "KEEP": 0.5,
            "new_teacher": lambda seed, names: f"teacher of {'+'.join(names)}",
            "new_student": lambda seed: "student",
            "cut": lambda model, keep: f"{model} cut {keep}",
            "exported": self.exported,
            "train": random_split(300),
            "arm_of": lambda table, arm: ([np.array([arm == "teacher", True])] * 2, [0, 1]),
        }

    def exported(self, model: str, path: Path) -> Path:
        self.made[path.stem] = model
        path.write_bytes(bytes(2048))
        return path

    def quantise(self, path: Path, calibration: np.ndarray, out: Path, agree: float) -> None:
        assert calibration.shape == (256, 3, 32, 32) and agree == 0
        self.made[out.stem] = f"{self.made[path.stem]} in eight bits"
        out.write_bytes(bytes(1024))

    def session(self, path: Path, threads: int) -> SimpleNamespace:
        assert threads == 1

        def run(outputs: None, feed: dict[str, np.ndarray]) -> None:
            assert feed["pictures"].shape == (1, 3, 32, 32) and feed["pictures"].dtype == np.uint8
            self.asked.append(path.stem)
            turn = self.asked.count(path.stem) - 1
            first = turn % (bench_export.WARMUP + bench_export.CALLS) < bench_export.WARMUP
            self.time.now += 1000 if first else self.seconds[path.stem] * (50 if turn % 20 == 7 else 1)  # one in 20 is disturbed

        return SimpleNamespace(run=run)


def test_the_latencies_are_medians_of_single_pictures_after_a_warm_up(
    setting: Setting, time: FakeTime, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_table(name: str) -> None:
        raise FileNotFoundError(f"{name}.csv is missing")

    files = FakeFiles(time, monkeypatch, int8=0.125, teacher=0.5)
    monkeypatch.setattr(bench_export, "stored", no_table)
    row = bench.measure(bench_export.exports(setting)[0], runs=5)
    assert (row.unit, row.ours, row.other, row.ratio, row.goal) == ("pictures a second", 8, 2, 4, 4)
    assert files.made["teacher"] == "teacher of A+B"
    assert files.made["int8"] == "student cut 0.5 cut 0.5 cut 0.5 in eight bits"
    calls = bench_export.WARMUP + bench_export.CALLS
    assert files.asked == (["int8"] * calls + ["teacher"] * calls) * 6
    assert row.note == "1 against 2 KB; 13_smaller_and_faster.csv is missing"
    assert bench.line(row).startswith("✓ the compressed student")


def test_a_student_that_is_not_four_times_faster_misses_the_goal(
    time: FakeTime, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    FakeFiles(time, monkeypatch, int8=0.126, teacher=0.5)
    arguments = ["--only", "export", "--runs", "5", "--out", str(tmp_path / "bench.json"), "--check"]
    assert bench.main(arguments, time) == 1
    assert "✗ missed: the compressed student" in capsys.readouterr().out


def test_the_row_quotes_the_accuracy_that_the_stored_seeds_lost() -> None:
    """Of eight pictures the teacher gets all, the student all but one, in each of two seeds; other arms do not count."""
    rows = [
        {"seed": seed, "arm": arm, "hits": text}
        for seed in (1, 0)
        for arm, text in (("int8", "fe"), ("teacher", "ff"), ("x", "00"))
    ]
    said = bench_export.accuracy_lost({"arm_of": arm_of_eight}, pd.DataFrame(rows))
    assert said.startswith("stored accuracy lost 0.125 [") and said.endswith("2 seeds")


def test_without_onnx_the_row_is_left_out_with_a_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, time: FakeTime
) -> None:
    def no_library(model: object, path: Path) -> None:
        raise ImportError("onnxscript is missing: run `python -m pip install -e .[export]`")

    files = FakeFiles(time, monkeypatch)
    files.exported = no_library  # type: ignore[method-assign]
    assert bench.main(["--only", "export", "--out", str(tmp_path / "bench.json")]) == 2
    _, said = capsys.readouterr().out.splitlines()
    assert said.startswith("left out, onnxscript is missing") and ".[export]" in said
    assert not (tmp_path / "bench.json").exists()


def test_the_lesson_itself_is_exported_and_timed(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    for library in ("onnxruntime", "onnxscript"):
        pytest.importorskip(library, reason="the extras `export` are not installed")
    monkeypatch.setattr(bench_export, "CALLS", 3)
    contest = bench_export.exports(setting)[0]
    assert (contest.ours(0), contest.other(0)) == (0, 0)  # by the fake clock
    lesson = bench_export.definitions(bench_export.ROOT / "notebooks/source" / f"{bench_export.NAME}.py")
    whole, cut = (
        lesson["exported"](model, setting.folder / "one.onnx").stat().st_size
        for model in (lesson["new_student"](0), lesson["cut"](lesson["new_student"](0), lesson["KEEP"]))
    )
    int8, pruned, teacher = ((setting.folder / f"{name}.onnx").stat().st_size for name in ("int8", "pruned", "teacher"))
    assert int8 < 0.5 * pruned and pruned < cut < whole < teacher


@pytest.fixture
def instant(monkeypatch: pytest.MonkeyPatch) -> Callable[[], float]:
    """Training that takes no time, and a clock on which each turn takes one second."""
    for loop in ("our_loop", "plain_loop", "channels_last_loop"):
        monkeypatch.setattr(bench_rows, loop, lambda *_: None)
    ticks = count()
    return lambda: float(next(ticks))


def test_the_file_is_a_list_of_rows_and_a_missed_goal_is_marked(
    instant: Callable[[], float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--only", "loops", "--pictures", "130", "--runs", "5", "--out", str(tmp_path / "new" / "bench.json")]
    assert bench.main(arguments, instant) == 0
    assert bench.main([*arguments, "--check"], instant) == 1
    rows = json.loads((tmp_path / "new" / "bench.json").read_text())
    assert [list(row) for row in rows] == [["name", "unit", "ours", "other", "ratio", "goal", "runs", "note"]] * 4
    assert [(row["ours"], row["other"], row["ratio"], row["goal"], row["runs"]) for row in rows] == [
        *[(128, 128, 1, 1.13, 5)] * 2,
        *[(128, 128, 1, 0.95, 5)] * 2,
    ]
    header, first, _, second = capsys.readouterr().out.splitlines()[:4]
    assert torch.__version__ in header and "cores" in header and "cpu" in header
    assert first.startswith("✗ missed: fit against a plain loop") and "1.00 times (goal 1.13)" in first
    assert second.startswith("✓ fit against a loop by hand with the same tricks") and "pictures a second" in second


def test_all_groups_are_measured_unless_some_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def group(name: str) -> Callable[[Setting], list[Contest]]:
        return lambda setting: [Contest(name, 1, lambda turn: 1, lambda turn: 2)]

    groups = ("loops", "data", "probe", "fine-tuning", "export")
    monkeypatch.setattr(bench, "GROUPS", {name: group(name) for name in bench.GROUPS})
    for arguments, names in (([], list(groups)), (["--only", "probe", "data"], ["probe", "data"])):
        assert bench.main([*arguments, "--out", str(tmp_path / "bench.json")]) == 0
        assert [row["name"] for row in json.loads((tmp_path / "bench.json").read_text())] == names


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--runs", "4"], "5 runs or more"),
        (["--runs", "0"], "5 runs or more"),
        (["--pictures", "63"], "64 pictures or more"),
        (["--device", "gpu"], "no device 'gpu'"),
    ],
)
def test_a_wrong_setting_is_one_line(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
