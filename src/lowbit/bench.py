"""How fast ONNX files run beside each other: one thread, in turn, so that a busy machine slows them alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lowbit import runtime
from lowbit.errors import LowbitError, near_miss
from lowbit.progress import track
from lowbit.tables import text_table

__all__ = ["RUNTIMES", "Timing", "check_runtime", "time_files", "timing_table"]

# input name -> array
Feed = dict[str, Any]
Run = Callable[[], object]
WARMUP = 5


@dataclass(frozen=True)
class Timing:
    """One file beside the first of its group."""

    file: str
    # median of one inference
    milliseconds: float
    # median over the rounds of (time of the first file / time of this one): above 1 is faster than the first
    speedup: float
    # smallest and largest such ratio of a round
    low: float
    high: float
    # size on disk
    bytes: int


def time_files(
    paths: Sequence[str | Path],
    *,
    runtime: str = "onnxruntime",
    rounds: int = 50,
    shape: Sequence[int] | None = None,
) -> list[Timing]:
    """Time one inference of each file on the CPU, `rounds` times in turn: A B C A B C ...

    Inputs are random normal numbers, zeros where the file asks for integers, the same for every file.

    Args:
        runtime: "onnxruntime" or "openvino", in float32 where nothing is quantized.
        shape: of the one input; by default as the file declares it, with one sample.

    Raises:
        LowbitError: no such runtime, no ONNX file, a shape that it leaves open, a file that does not run.
    """
    check_runtime(runtime)
    if rounds < 1:
        raise LowbitError(f"{rounds} rounds measure nothing; use 1 or more, 50 are wise")
    runs = [_prepared(Path(path), runtime, shape) for path in paths]
    seconds: list[list[float]] = [[] for _ in runs]
    for turn in track(range(WARMUP + rounds), "timing", total=WARMUP + rounds):
        for run, taken in zip(runs, seconds, strict=True):
            start = time.perf_counter()
            run()
            if turn >= WARMUP:
                taken.append(time.perf_counter() - start)
    return [_timing(Path(path), taken, seconds[0]) for path, taken in zip(paths, seconds, strict=True)]


def check_runtime(name: str) -> None:
    """Raise LowbitError unless there is a runtime of that name."""
    if name not in RUNTIMES:
        raise LowbitError(f"no runtime is named '{name}'{near_miss(name, RUNTIMES)}")


def timing_table(timings: Sequence[Timing]) -> str:
    """The timings as text."""
    rows = [
        (t.file, f"{t.milliseconds:.3f}", f"{t.speedup:.2f}x", f"{t.low:.2f}..{t.high:.2f}", f"{t.bytes:,}")
        for t in timings
    ]
    return text_table(("file", "ms", "speed", "range", "bytes"), rows)


def _timing(path: Path, seconds: list[float], first: list[float]) -> Timing:
    ratios = [a / b for a, b in zip(first, seconds, strict=True)]
    middle = 1e3 * statistics.median(seconds)
    return Timing(str(path), middle, statistics.median(ratios), min(ratios), max(ratios), path.stat().st_size)


def _prepared(path: Path, runtime: str, shape: Sequence[int] | None) -> Run:
    feed = _feed(path, shape)
    try:
        run = RUNTIMES[runtime](path, feed)
        run()
    except ImportError as error:
        raise LowbitError(f"runtime '{runtime}' is not installed ({error}); choose another") from None
    except Exception as error:  # each runtime has its own
        reason = str(error).strip().splitlines()[0]
        raise LowbitError(f"'{path}' does not run in {runtime}: {reason}") from error
    return run


def _feed(path: Path, shape: Sequence[int] | None) -> Feed:
    """The inputs a file asks for."""
    import onnx

    try:
        graph = onnx.load(str(path), load_external_data=False).graph
    except Exception as error:
        raise LowbitError(f"'{path}' is not a readable ONNX file: {type(error).__name__}") from error
    stored = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in stored]
    if not inputs:
        raise LowbitError(f"'{path}' has no inputs, so it is no network to time")
    if shape is not None and len(inputs) != 1:
        raise LowbitError(f"'{path}' has {len(inputs)} inputs; a shape can be given where there is one")
    rng = np.random.default_rng(0)
    feed: Feed = {}
    for value in inputs:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)
        dims = shape or _declared(path, value)
        is_float = np.issubdtype(dtype, np.floating)
        feed[value.name] = rng.standard_normal(dims).astype(dtype) if is_float else np.zeros(dims, dtype)
    return feed


def _declared(path: Path, value: Any) -> list[int]:
    """The declared shape of an input, with one sample where the first axis is open."""
    dims = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
    dims[:1] = [dim or 1 for dim in dims[:1]]
    if 0 in dims:
        raise LowbitError(f"'{path}' leaves axis {dims.index(0)} of '{value.name}' open; give its shape")
    return dims


def _in_onnxruntime(path: Path, feed: Feed) -> Run:
    session = runtime.session(path, threads=1)
    return lambda: session.run(None, feed)


def _in_openvino(path: Path, feed: Feed) -> Run:
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    model.reshape({name: list(array.shape) for name, array in feed.items()})
    # unasked, OpenVINO runs float32 in bfloat16 on AMX
    settings = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    request = core.compile_model(model, "CPU", settings).create_infer_request()
    return lambda: request.infer(feed)


RUNTIMES: dict[str, Callable[[Path, Feed], Run]] = {"onnxruntime": _in_onnxruntime, "openvino": _in_openvino}
"""Where files can be timed, by name."""
