"""Time and memory, measured so that a noisy shared machine does not decide the result."""

from __future__ import annotations

import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")
Run = Callable[[], object]


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One callable beside the first of its group; a ratio above 1 means slower than the first."""

    name: str
    seconds: float  # median over the rounds
    ratio: float  # median / the first one's median
    paired: float  # median over the rounds of (this / first in the same round)
    low: float  # smallest per-round ratio
    high: float  # largest per-round ratio
    cpu: float  # `paired`, of the processor time of this process: what others run here matters less to it

    @property
    def speedup(self) -> float:
        """How many times faster than the first, from the paired ratio."""
        return 1 / self.paired


def interleave(
    runs: Mapping[str, Run],
    *,
    rounds: int,
    warmup: int = 1,
    before: Mapping[str, Run] | None = None,
    fill: float = 0.0,
) -> dict[str, Timing]:
    """Time the callables in turn, A B C A B C ..., `rounds` times, after `warmup` untimed turns.

    Whatever slows the machine for a while slows one round of all of them, so the paired ratio holds where
    absolute times do not. `before[name]` is called, untimed, before each turn of `runs[name]`. With `fill` a
    turn is as many calls as take so many seconds, and what is timed is one of them: the first call after
    another's finds cold caches, which a layer that is called all the time does not. The garbage collector is
    off during a turn.
    """
    if rounds < 1:
        raise ValueError(f"rounds is {rounds}; at least 1 is needed")
    prepare = before or {}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    gc.collect()
    # what is there now stays: walking over it before each turn would empty the caches
    gc.freeze()
    calls = {name: _calls(run, fill) for name, run in runs.items()}
    for turn in range(warmup + rounds):
        for name, run in runs.items():
            prepare.get(name, _nothing)()
            seconds = _time(run, calls[name])
            if turn >= warmup:
                times[name].append(seconds)
    gc.unfreeze()
    first = next(iter(times.values()))
    return {name: _timing(name, seconds, first) for name, seconds in times.items()}


def _timing(name: str, seconds: list[tuple[float, float]], first: list[tuple[float, float]]) -> Timing:
    median = statistics.median(wall for wall, _ in seconds)
    ratios = [a / b for (a, _), (b, _) in zip(seconds, first, strict=True)]
    return Timing(
        name=name,
        seconds=median,
        ratio=median / statistics.median(wall for wall, _ in first),
        paired=statistics.median(ratios),
        low=min(ratios),
        high=max(ratios),
        cpu=statistics.median(a / b for (_, a), (_, b) in zip(seconds, first, strict=True)),
    )


def _calls(run: Run, fill: float) -> int:
    """How many calls take so many seconds."""
    calls = 1
    while fill and (seconds := _time(run, calls)[0] * calls) < fill:
        calls = max(2 * calls, int(calls * fill / seconds))
    return calls


def _time(run: Run, calls: int) -> tuple[float, float]:
    """Wall and processor seconds of one call, from so many in a row."""
    gc.collect()
    gc.disable()
    try:
        start, cpu = time.perf_counter(), time.process_time()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls, (time.process_time() - cpu) / calls
    finally:
        gc.enable()


def _nothing() -> None:
    """What happens before a run that needs no preparation."""


def peak_bytes(run: Run) -> int:
    """The largest resident size of this process while `run` runs, in bytes.

    Linux only: the kernel's high-water mark (VmHWM) is reset through /proc/self/clear_refs; no peak is missed
    between two samples. It counts the whole process: compare two runs in one child process, and subtract.
    """
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    run()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("no VmHWM line in /proc/self/status: peak memory needs a Linux kernel")


def in_child(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """function(...) in a fresh process, so that what ran before leaves neither memory nor threads behind.

    `function`, its arguments and its result are pickled: a module-level function, plain records.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=1, mp_context=context) as pool:
        return pool.submit(function, *args, **kwargs).result()
