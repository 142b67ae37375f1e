"""The command line: `lowbit demo | quantize | train | search | tensorize | export | verify | bench | ...`.

Thin: it reads names, calls the library, prints. Text or, with --json, one JSON object goes to stdout;
progress and whatever a model prints go to stderr. The exit code is 0, or 1 when an exported file is another
model, or 2 with one line `error: ...` when the input is bad, or 130 when the user stops it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml

import lowbit
from lowbit import cli_inputs, cli_quantize, cli_search, cli_tensorize, cli_train
from lowbit.cli_options import (
    MODEL_HELP,
    BatchSize,
    Checkpoint,
    Data,
    Json,
    ModelOption,
    NumBatches,
    OptionalData,
    Shape,
)
from lowbit.cli_output import Answer, answering
from lowbit.errors import LowbitError, near_miss

__all__ = ["app", "main"]

app = typer.Typer(
    help="Quantize PyTorch networks, and prove the result in the file that runs.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
# click's class, or the copy of it inside newer typers
USAGE_ERROR: Any = typer.BadParameter.__base__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command line, by default that of the process; return the exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return int(app(given or ["--help"], prog_name="lowbit", standalone_mode=False) or 0)
    except USAGE_ERROR as error:
        reason = f"{error.format_message()}; see lowbit {' '.join(given[:1])} --help"
    except ModuleNotFoundError as error:
        if error.name not in EXTRAS:
            raise
        reason = f"this needs the package {error.name}; install lowbit[{EXTRAS[error.name]}]"
    except (LowbitError, OSError) as error:
        reason = str(error)
    except (KeyboardInterrupt, typer.Abort):
        print("stopped", file=sys.stderr)
        return 130
    print("error:", " ".join(reason.split()), file=sys.stderr)
    return 2


# package: the extra of lowbit that brings it
EXTRAS = {
    **dict.fromkeys(("onnx", "onnxscript", "onnxruntime"), "onnx"),
    "openvino": "openvino",
    "tensorboardX": "train",
    "tensorly": "tensor",
    **dict.fromkeys(("hls4ml", "qonnx", "da4ml"), "fpga"),
}


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="folder for the files")] = Path("out"), as_json: Json = False
) -> None:
    """Quantize the network that ships with lowbit, and show everything: under a minute."""
    from lowbit.demo.run import run

    with answering(as_json) as answer:
        answer.record = run(out, answer.say)


@app.command()
def export(
    checkpoint: Checkpoint,
    model: ModelOption,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="PATH", help="file to write, or folder of a project")
    ],
    to: Annotated[str, typer.Option(help="onnx, qonnx (files); hls4ml, verilog (projects)")] = "onnx",
    as_json: Json = False,
) -> None:
    """Write a checkpoint as an ONNX file for ONNX Runtime and OpenVINO, or for an FPGA."""
    writers: dict[str, Callable[[Any, Path], object]] = {
        "onnx": lowbit.export.onnx,
        "qonnx": lowbit.export.qonnx,
        "hls4ml": lowbit.export.hls4ml,
        "verilog": lowbit.export.verilog,
    }
    if to not in writers:
        raise LowbitError(f"--to {to} is unknown{near_miss(to, list(writers))}")
    with answering(as_json) as answer:
        if to.endswith("onnx"):
            cli_inputs.writable(output, "-o")
        q = lowbit.load(cli_inputs.existing(checkpoint, "CHECKPOINT"), cli_inputs.load_model(model))
        writers[to](q, output)
        files = [output] if output.is_file() else [path for path in output.rglob("*") if path.is_file()]
        size = sum(path.stat().st_size for path in files)
        answer.say(f"{output}: {size:,} bytes")
        answer.record |= {"file": str(output), "to": to, "bytes": size}


@app.command()
def verify(
    checkpoint: Checkpoint,
    model: ModelOption,
    exported: Annotated[
        Path, typer.Option("--exported", "--onnx", metavar="PATH", help="the exported file or project")
    ],
    data: Data,
    num_batches: NumBatches = None,
    batch_size: BatchSize = None,
    as_json: Json = False,
) -> None:
    """Run what was exported and compare it code by code with its model; exit code 1 where it is another."""
    with answering(as_json) as answer:
        cli_inputs.existing(exported, "--exported", folder=True)
        q = lowbit.load(cli_inputs.existing(checkpoint, "CHECKPOINT"), cli_inputs.load_model(model))
        batches = cli_inputs.load_data(data, batch_size, num_batches)
        parity = lowbit.verify(q, exported, batches, num_batches)
        answer.say(parity)
        answer.record |= {"ok": parity.ok, "exact": parity.exact, **asdict(parity)}
    if not parity.ok:
        raise typer.Exit(1)


@app.command()
def bench(
    files: Annotated[list[Path], typer.Argument(metavar="A.onnx [B.onnx]...", help="one or more")],
    runtime: Annotated[str, typer.Option(help="onnxruntime or openvino")] = "onnxruntime",
    rounds: Annotated[int, typer.Option(min=1, help="timed runs of each file")] = 50,
    input_shape: Shape = None,
    as_json: Json = False,
) -> None:
    """Time files in turn on one thread; speed is the median ratio to the first file."""
    from lowbit.bench import time_files, timing_table

    with answering(as_json) as answer:
        paths = [cli_inputs.existing(path, "file") for path in files]
        shape = None if input_shape is None else cli_inputs.dims(input_shape)
        timings = time_files(paths, runtime=runtime, rounds=rounds, shape=shape)
        answer.say(timing_table(timings))
        answer.say(f"{runtime}, one thread, {rounds} rounds in turn; speed against the first file")
        answer.record |= {"runtime": runtime, "rounds": rounds, "files": [asdict(t) for t in timings]}


@app.command()
def inspect(
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="a checkpoint, or any ONNX file")
    ] = None,
    env: Annotated[
        bool, typer.Option("--env", help="versions, kernels and processor of this machine")
    ] = False,
    hardware: Annotated[
        bool, typer.Option("--hardware", help="fixed-point types and costs of a checkpoint; needs --model")
    ] = False,
    model: Annotated[str | None, typer.Option("--model", metavar="MODEL", help=MODEL_HELP)] = None,
    data: OptionalData = None,
    as_json: Json = False,
) -> None:
    """Bytes and bits of each layer of a file, and its recipe; or, with --env, what lowbit runs on here.

    With --hardware the type of every weight, sum and result on an FPGA, what it costs, and on --data how
    often values do not fit.
    """
    from lowbit.contents import contents
    from lowbit.environment import environment

    if (file is None) != env:
        raise LowbitError("inspect looks at a FILE or, with --env, at this machine; give one of the two")
    with answering(as_json) as answer:
        if file is None:
            machine = environment()
            answer.say(machine)
            answer.record |= asdict(machine)
            return
        if hardware:
            _show_hardware(answer, file, model, data)
            return
        found = contents(cli_inputs.existing(file, "file"))
        answer.say(found)
        if found.recipe is not None:
            answer.say("\n" + yaml.safe_dump(found.recipe, sort_keys=False, default_flow_style=None))
        answer.record |= asdict(found)


def _show_hardware(answer: Answer, file: Path, model: str | None, data: str | None) -> None:
    from lowbit.hardware import lower
    from lowbit.hardware.parity import inputs_of
    from lowbit.hardware.report import describe
    from lowbit.passes.calibrate import batches

    if model is None:
        raise LowbitError("--hardware needs the network behind the checkpoint; pass --model module:callable")
    q = lowbit.load(cli_inputs.existing(file, "FILE"), cli_inputs.load_model(model))
    seen = None if data is None else inputs_of(q, list(batches(cli_inputs.load_data(data))))
    found = describe(lower(q), seen)
    answer.say(found)
    answer.record |= {"ebops": found.ebops, "steps": [asdict(row) for row in found.rows]}


app.command()(cli_quantize.quantize)
app.command()(cli_train.train)
app.command()(cli_search.search)
app.command()(cli_tensorize.tensorize)


if __name__ == "__main__":
    sys.exit(main())
