"""onnxruntime's own quantizer, used as its documentation says, as the peer to measure against.

float model -> FP32 ONNX -> quant_pre_process (shape inference, BatchNorm folding) -> quantize_static: QDQ,
unsigned 8-bit activations, signed symmetric 8-bit weights per channel, one of its three calibration methods.

Seen in onnxruntime 1.31: "entropy" has as many histogram bins as quantized bins (128, and quantize_static
offers no way to change it), so it weighs a single candidate, the full range, and its file equals min-max's.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnxruntime as ort
import torch
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_static,
)
from onnxruntime.quantization.calibrate import create_calibrator
from onnxruntime.quantization.shape_inference import quant_pre_process
from torch import Tensor, nn

METHODS = {
    "minmax": CalibrationMethod.MinMax,
    "entropy": CalibrationMethod.Entropy,
    "percentile": CalibrationMethod.Percentile,
}
_OPSET = 18


def export_float(model: nn.Module, example: Tensor, path: Path) -> Path:
    """`model` as an FP32 ONNX file by the dynamo exporter; example [B, ...] gives the shape, B is dynamic."""
    if len(example) < 2:
        example = torch.cat([example, example])  # torch.export would take a batch of 1 for a constant
    with _quiet():
        torch.onnx.export(
            model,
            (example,),
            path,
            dynamo=True,
            opset_version=_OPSET,
            input_names=["input"],
            output_names=["output"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            external_data=False,
            verbose=False,
        )
    return path


def preprocess(float_path: Path, path: Path) -> Path:
    """The FP32 file after onnxruntime's own preparation: shapes inferred, BatchNorm folded."""
    with _quiet():
        quant_pre_process(str(float_path), str(path))
    return path


def quantize(prepared: Path, path: Path, batches: Sequence[Tensor], method: str) -> Path:
    """onnxruntime's INT8 QDQ file of a `preprocess`ed one; batches of equal shape, a key of METHODS."""
    with _quiet():
        quantize_static(
            str(prepared),
            str(path),
            Batches(batches),
            quant_format=QuantFormat.QDQ,
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=METHODS[method],
        )
    return path


class Batches(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime ships no types
    """A list of tensors [B, ...] as the reader onnxruntime asks for."""

    def __init__(self, batches: Sequence[Tensor]) -> None:
        self._batches = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next batch by input name; None after the last."""
        batch = next(self._batches, None)
        return None if batch is None else {"input": batch.numpy()}


def session(path: Path, *, optimized_to: Path | None = None, optimize: bool = True) -> ort.InferenceSession:
    """A session on one thread with every optimization; `optimized_to` keeps the optimized graph as a file."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    levels = ort.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    if optimized_to is not None:
        options.optimized_model_filepath = str(optimized_to)
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def runner(path: Path) -> Callable[[Tensor], Tensor]:
    """The file at `path` as a function of one tensor [B, ...], on one thread."""
    opened = session(path)
    name = opened.get_inputs()[0].name

    def run(x: Tensor) -> Tensor:
        return torch.from_numpy(opened.run(None, {name: x.numpy()})[0])

    return run


def calibration(prepared: Path, batches: Sequence[Tensor], method: str) -> Callable[[], object]:
    """onnxruntime's calibration alone, on one thread: collect over `batches`, then compute every range.

    Its calibrator opens a session with all the machine's threads; that session is replaced by the same one
    (unoptimized graph, every activation an output) on one thread. Building both is not part of the run.
    """
    folder = tempfile.TemporaryDirectory(prefix="lowbit-bench-")
    augmented = Path(folder.name) / "augmented.onnx"

    def run() -> object:
        with _quiet():
            calibrator.collect_data(Batches(batches))
            return calibrator.compute_data()

    with _quiet(), folder:
        calibrator = create_calibrator(
            prepared, None, augmented_model_path=str(augmented), calibrate_method=METHODS[method]
        )
        calibrator.infer_session = session(augmented, optimize=False)
    return run


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """onnxruntime's prints go to stderr (stdout may be one JSON object); notes and warnings are dropped."""
    previous = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(previous)
