"""An export says what torch says, replaces nothing before it has proved it, and refuses bad input with one clear line."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from course_utils import export
from course_utils.export import ExportError, export_onnx, quantise, session

pytest.importorskip("onnxruntime", reason="the extras `export` are not installed")
pytest.importorskip("onnxscript", reason="the extras `export` are not installed")


class Small(nn.Module):
    """Pixels as a file holds them to three logits, through a convolution and a batch norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.layers[1].running_mean.normal_()
        self.head = nn.Linear(32, 3)

    def forward(self, pictures: Tensor) -> Tensor:
        return self.head(self.layers(pictures.float() / 255))


def pictures(count: int = 40) -> Tensor:
    return torch.randint(256, (count, 3, 8, 8), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


def logits(path: Path, count: int) -> np.ndarray:
    return session(path).run(None, {"pictures": pictures(count).numpy()})[0]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "small.onnx"
    assert export_onnx(Small().eval(), path, pictures(3)) < 1e-5
    return path


def test_the_file_says_what_torch_says_for_batches_of_any_size(exported: Path) -> None:
    file = session(exported)
    assert (file.get_inputs()[0].type, file.get_inputs()[0].shape[1:]) == ("tensor(uint8)", [3, 8, 8])
    for count in (1, 2, 7):
        with torch.no_grad():
            expected = Small().eval()(pictures(count)).numpy()
        assert np.abs(logits(exported, count) - expected).max() < 1e-5
    assert [path.name for path in exported.parent.iterdir()] == ["small.onnx"]  # nothing beside it


def test_exporting_leaves_the_model_as_it_was(tmp_path: Path) -> None:
    model = Small().eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    export_onnx(model, tmp_path / "x.onnx", pictures(2))
    assert not model.training and all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Unsupported(Small):
    def forward(self, pictures: Tensor) -> Tensor:
        return torch.linalg.eigvals(pictures[:, 0].float()).real[:, :3]


class Branching(Small):
    """What it computes depends on a number in the picture, which no graph can follow."""

    def forward(self, pictures: Tensor) -> Tensor:
        return super().forward(pictures) if pictures.float().mean() > 100 else super().forward(255 - pictures)


def half_trained() -> nn.Module:
    model = Small().eval()
    model.layers[1].train()
    return model


@pytest.mark.parametrize(
    ("model", "count", "message"),
    [
        (Small(), 3, "call model.eval"),
        (half_trained(), 3, "call model.eval"),
        (Small().eval(), 1, "two pictures or more"),
        (Unsupported().eval(), 3, "Unsupported cannot be exported: .*eig"),
        (Branching().eval(), 3, "Branching cannot be exported"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_one_line_and_the_old_file_stays(
    model: nn.Module, count: int, message: str, tmp_path: Path
) -> None:
    old = tmp_path / "model.onnx"
    old.write_bytes(b"an earlier export")
    with pytest.raises(ExportError, match=message) as caught:
        export_onnx(model, old, pictures(count))
    assert "\n" not in str(caught.value)
    assert old.read_bytes() == b"an earlier export" and list(tmp_path.iterdir()) == [old]


@pytest.mark.parametrize("wrong", [0.1, np.nan])
def test_an_export_without_parity_replaces_nothing(wrong: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = tmp_path / "model.onnx"
    old.write_bytes(b"an earlier export")
    real = export.session

    class Off:
        """A runtime that is right for every batch but one of a single picture."""

        def __init__(self, path: Path) -> None:
            self.file = real(path)

        def run(self, outputs: None, given: dict[str, np.ndarray]) -> list[np.ndarray]:
            return [self.file.run(outputs, given)[0] + wrong * (len(given["pictures"]) == 1)]

    monkeypatch.setattr(export, "session", Off)
    with pytest.raises(ExportError, match=r"no parity.*model\.onnx was not written"):
        export_onnx(Small().eval(), old, pictures(3))
    assert old.read_bytes() == b"an earlier export" and list(tmp_path.iterdir()) == [old]


def test_a_file_cut_short_anywhere_is_named(exported: Path, tmp_path: Path) -> None:
    whole, cut = exported.read_bytes(), tmp_path / "cut.onnx"
    for kept in (0, 1, 10, len(whole) // 4, len(whole) // 2, len(whole) - 100):
        cut.write_bytes(whole[:kept])
        with pytest.raises(ExportError, match=r"cut\.onnx is missing, cut short or no ONNX file") as caught:
            session(cut)
        assert "\n" not in str(caught.value)
        with pytest.raises(ExportError, match="cut short"):
            quantise(cut, pictures().numpy(), tmp_path / "out.onnx")
    assert not (tmp_path / "out.onnx").exists()
    cut.write_text("no model at all")
    with pytest.raises(ExportError, match="no ONNX file"):
        session(cut)
    with pytest.raises(ExportError, match="is missing"):
        session(tmp_path / "none.onnx")


def test_eight_bits_are_smaller_and_answer_alike(exported: Path, tmp_path: Path) -> None:
    out = tmp_path / "small8.onnx"
    share = quantise(exported, pictures(200).numpy(), out, agree=0.8)
    same = logits(out, 200).argmax(axis=1) == logits(exported, 200).argmax(axis=1)
    assert share == pytest.approx(same.mean()) and list(tmp_path.iterdir()) == [out]
    held = pytest.importorskip("onnx").load(out)
    assert any(weight.data_type == 3 for weight in held.graph.initializer)  # int8
    assert {node.op_type for node in held.graph.node} >= {"QuantizeLinear", "DequantizeLinear"}


@pytest.mark.parametrize(
    "calibration",
    [
        pictures(31).numpy(),
        pictures()[:, :1].numpy(),
        pictures()[..., :7].numpy(),
        pictures()[0].numpy(),
        pictures().float().numpy(),
    ],
)
def test_calibration_pictures_that_do_not_fit_are_refused(calibration: np.ndarray, exported: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    out.write_bytes(b"an earlier one")
    with pytest.raises(ExportError, match=r"calibrate with 32 .*tensor\(uint8\) \[3, 8, 8\], all finite, not ") as caught:
        quantise(exported, calibration, out)
    assert "\n" not in str(caught.value) and out.read_bytes() == b"an earlier one"


def test_a_number_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "floats.onnx"
    export_onnx(Small().eval(), path, pictures(3).float())
    bad = pictures().float().numpy()
    bad[3, 0, 0, 0] = np.inf
    with pytest.raises(ExportError, match="all finite"):
        quantise(path, bad, tmp_path / "out.onnx")
    assert list(tmp_path.iterdir()) == [path]


def test_what_answers_otherwise_in_eight_bits_is_not_written(exported: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.onnx"
    out.write_bytes(b"an earlier one")
    with pytest.raises(ExportError, match="keep their answer"):
        quantise(exported, pictures().numpy(), out, agree=1.01)
    assert out.read_bytes() == b"an earlier one" and list(tmp_path.iterdir()) == [out]


def test_without_the_extras_one_line_says_how_to_get_them(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("onnxruntime", "onnxruntime.quantization", "onnxscript"):
        monkeypatch.setitem(sys.modules, name, None)
    acts = (
        lambda: session(exported),
        lambda: export_onnx(Small().eval(), tmp_path / "x.onnx", pictures(3)),
        lambda: quantise(exported, pictures().numpy(), tmp_path / "x.onnx"),
    )
    for act in acts:
        with pytest.raises(ImportError, match=r"missing: .*pip install -e \.\[export\]") as caught:
            act()
        assert "\n" not in str(caught.value)


def test_the_room_opens_without_the_extras() -> None:
    code = "import sys; sys.modules.update(onnx=None, onnxruntime=None, onnxscript=None); import course_utils.export"
    subprocess.run([sys.executable, "-c", code], check=True)
