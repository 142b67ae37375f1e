"""What lowbit runs on here: versions, the compiled kernels, threads, instructions of the processor."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import dataclass

import torch

from lowbit import kernels
from lowbit.kernels import bits, tensor_train
from lowbit.processor import instructions
from lowbit.tables import text_table

__all__ = ["Environment", "environment"]

# package: what lowbit does with it
OPTIONAL = {
    "onnx": "writes and reads ONNX files",
    "onnxscript": "writes ONNX files",
    "onnxruntime": "runs and verifies ONNX files",
    "openvino": "runs and times ONNX files",
    "tensorboardX": "writes events of training",
}


@dataclass(frozen=True, kw_only=True)
class Environment:
    """Versions and abilities of one machine; `str()` is a table."""

    lowbit: str
    python: str
    torch: str
    # operating system and processor
    platform: str
    # logical processors that this process may use, and threads that PyTorch takes
    processors: int
    threads: int
    # name of the CUDA device; None without one
    gpu: str | None
    # what quantizes in training: "native, AVX512", or "pure torch: " and the reason
    kernels: str
    # what runs binary and ternary networks, likewise
    bit_kernels: str
    # what multiplies tensor trains in evaluation, likewise
    train_kernels: str
    # those that decide about kernels; None where PyTorch cannot tell
    instructions: tuple[str, ...] | None
    # version of each optional package; None where it is missing
    packages: dict[str, str | None]

    def __str__(self) -> str:
        found = "unknown" if self.instructions is None else ", ".join(self.instructions) or "none that matter"
        rows = [
            ("lowbit", self.lowbit, ""),
            ("python", self.python, ""),
            ("torch", self.torch, f"{self.threads} of {self.processors} threads"),
            ("platform", self.platform, ""),
            ("gpu", self.gpu or "none", ""),
            ("kernels", self.kernels, "fake quantization in training"),
            ("bit kernels", self.bit_kernels, "binary and ternary layers, after q.compile_kernels()"),
            ("train kernels", self.train_kernels, "tensor trains in evaluation"),
            ("instructions", found, ""),
            *((name, version or "missing", OPTIONAL[name]) for name, version in self.packages.items()),
        ]
        # as text: a version is no number to be set to the right
        width = max(len(name) for name, _, _ in rows)
        return text_table(("what", "here", "for"), [(name.ljust(width), *rest) for name, *rest in rows])


def environment() -> Environment:
    """Look at this process."""
    return Environment(
        lowbit=_version("lowbit") or "not installed",
        python=platform.python_version(),
        torch=torch.__version__,
        platform=f"{platform.system()} {platform.machine()}",
        processors=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        gpu=torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        kernels=kernels.description(),
        bit_kernels=bits.description(),
        train_kernels=tensor_train.description(),
        instructions=instructions(),
        packages={name: _version(name) for name in OPTIONAL},
    )


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
