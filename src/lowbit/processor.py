"""What the processor can do."""

from __future__ import annotations

import torch

__all__ = ["instructions"]

# those that decide which kernels of PyTorch and of the runtimes are used, by the names of x86 and ARM
INSTRUCTIONS = (
    *("avx2", "avx512_f", "avx512_vnni", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16"),
    *("neon", "dot", "i8mm", "bf16", "sve", "sve2"),
)


def instructions() -> tuple[str, ...] | None:
    """Those of INSTRUCTIONS that the processor has; None where PyTorch cannot tell."""
    if not hasattr(torch.cpu, "get_capabilities"):  # it came after PyTorch 2.11
        return None
    has = torch.cpu.get_capabilities()
    return tuple(name for name in INSTRUCTIONS if has.get(name))
