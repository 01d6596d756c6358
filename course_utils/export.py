"""Export: a model as an ONNX file that has passed parity, the same in eight bits, and both run without torch."""

import copy
import os
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch


class ExportError(RuntimeError):
    """A model that cannot be exported, a file that cannot be run, or pictures that it cannot be calibrated with."""


def export_onnx(model: torch.nn.Module, path: str | Path, example: torch.Tensor, tolerance: float = 1e-3) -> float:
    """Write `model` as one ONNX file for batches of any size; return by how much its logits differ from torch's, at most.

    example: two pictures or more as the model takes them, `(n, …)`. What stands at `path` is replaced only by a file that says
    what torch says, of the example and of one picture, within `tolerance` of the largest logit. Raises `ExportError` for
    a model in training mode, an operator that ONNX lacks, or other logits; `ImportError` without the extras.
    """
    _library("onnxscript")
    if len(example) < 2 or any(part.training for part in model.modules()):
        raise ExportError("call model.eval() first, and give two pictures or more: what the exporter sees, it takes for constant")
    still, example, path = copy.deepcopy(model).cpu(), example.cpu().contiguous(), Path(path)
    settings: dict[str, Any] = {"input_names": ["pictures"], "output_names": ["logits"], "external_data": False, "verbose": False}
    with TemporaryDirectory(dir=path.parent) as scratch, torch.no_grad():
        new, sizes = Path(scratch) / "new.onnx", ({0: torch.export.Dim("batch")},)
        try:
            torch.onnx.export(still, (example,), new, dynamo=True, dynamic_shapes=sizes, **settings)
        except Exception as error:  # the exporter lets out whatever it stumbles over
            raise ExportError(
                f"{type(model).__name__} cannot be exported: {str(error.__cause__ or error).splitlines()[0]}"
            ) from error
        file, asked = session(new), (example, example[:1])
        known = [still(pictures).numpy() for pictures in asked]
        found = [file.run(None, {"pictures": pictures.numpy()})[0] for pictures in asked]
        worst = max(np.abs(ours - its).max() for ours, its in zip(known, found, strict=True))
        if not worst <= tolerance * max(1.0, np.abs(known[0]).max()):  # nan fails, too
            raise ExportError(f"no parity: ONNX Runtime is {worst:.2g} away from torch; {path.name} was not written")
        os.replace(new, path)
    return float(worst)


def session(path: str | Path, threads: int = 1) -> Any:
    """An ONNX file in ONNX Runtime: `session(path).run(None, {"pictures": array})[0]` are the logits `(n, classes)`.

    Raises `ExportError` for a file that is missing, cut short or no ONNX file; `ImportError` without the extras.
    """
    runtime = _library("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    try:
        return runtime.InferenceSession(Path(path).read_bytes(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime has a class for every kind of damage
        raise ExportError(f"{path} is missing, cut short or no ONNX file: export it again") from error


def quantise(path: str | Path, calibration: np.ndarray, out: str | Path, agree: float = 0.9) -> float:
    """Write the ONNX file `path` to `out` with weights and activations in eight bits, by ONNX Runtime's static quantiser.

    calibration: 32 pictures or more, `(n, …)` as the file takes them, which set the range of every activation. `out` is replaced
    only where the share of them that keep their answer is `agree` or more; it is returned. Raises `ExportError` for
    fewer, for pictures that are too few, of another type or shape, or not finite; `ImportError` without the extras.
    """
    tools, prepare = _library("onnxruntime.quantization"), _library("onnxruntime.quantization.shape_inference").quant_pre_process
    reader_type: Any = tools.CalibrationDataReader
    given = session(path).get_inputs()[0]
    kind, shape = given.type.replace("float)", "float32)"), given.shape[1:]
    fits = kind == f"tensor({calibration.dtype})" and list(calibration.shape[1:]) == shape and len(calibration) >= 32
    if not fits or not np.isfinite(calibration).all():
        got = f"{calibration.dtype} {list(calibration.shape)}"
        raise ExportError(f"calibrate with 32 pictures or more as the file takes them, {kind} {shape}, all finite, not {got}")
    feed = iter([{given.name: part} for part in np.array_split(calibration, len(calibration) // 8)])

    class Reader(reader_type):
        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(feed, None)

    with TemporaryDirectory(dir=Path(out).parent) as scratch:
        ready, new = Path(scratch) / "ready.onnx", Path(scratch) / "new.onnx"
        prepare(str(path), str(ready), skip_symbolic_shape=True)
        tools.quantize_static(str(ready), str(new), Reader(), per_channel=True, reduce_range=True)
        before, after = (session(one).run(None, {given.name: calibration})[0].argmax(axis=1) for one in (path, new))
        if (same := float((before == after).mean())) < agree:
            raise ExportError(f"in eight bits {same:.0%} of the calibration pictures keep their answer; {out} was not written")
        os.replace(new, out)
    return same


def _library(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise ImportError(f"{name} is missing: in the course's folder, run `python -m pip install -e .[export]`") from error
