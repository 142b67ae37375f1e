"""Arguments and options that several commands take, each under one name."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

__all__ = [
    "MODEL_HELP",
    "AlsoOnnx",
    "BatchSize",
    "Checkpoint",
    "Data",
    "Json",
    "Model",
    "ModelOption",
    "NumBatches",
    "OptionalData",
    "Output",
    "Resume",
    "Shape",
    "Weights",
]

MODEL_HELP = "module:callable or file.py:callable; called without arguments it returns the nn.Module"
DATA_HELP = ".npz, .npy or .safetensors with x (and y), or module:callable that returns batches"
Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
ModelOption = Annotated[str, typer.Option("--model", metavar="MODEL", help=MODEL_HELP)]
Checkpoint = Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="a file that quantize wrote")]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="FILE.safetensors", help="file to write")]
AlsoOnnx = Annotated[Path | None, typer.Option(metavar="FILE.onnx", help="also write this file")]
Weights = Annotated[str | None, typer.Option(metavar="FILE.safetensors", help="state dict of the model")]
Data = Annotated[str, typer.Option(metavar="DATA", help=DATA_HELP)]
OptionalData = Annotated[str | None, typer.Option(metavar="DATA", help=DATA_HELP)]
NumBatches = Annotated[int | None, typer.Option(min=1, help="use only so many batches")]
BatchSize = Annotated[int | None, typer.Option(min=1, help="samples in a batch of an array file [64]")]
Shape = Annotated[str | None, typer.Option(metavar="N,C,H,W", help="shape of the input")]
Resume = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="keep every layer that is rounded here, and go on from those that are"),
]
Json = Annotated[bool, typer.Option("--json", help="one JSON object on stdout, nothing else")]
