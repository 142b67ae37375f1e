"""hls4ml projects: fixed-point networks as C++ for FPGAs, equal to the integer reference bit for bit.

hls4ml reads a plain PyTorch network and a dictionary with the type of each weight, bias, sum and result. Left
to itself it types a ReLU `fixed<16,6>` without rounding or saturation, writes float weights as short decimals
that it truncates, and takes channels in another order: so every type is given here, weights are rounded
already and typed to round, and the order of channels is always converted.
"""

from __future__ import annotations

import contextlib
import io as text
import json
import re
import shutil
import tempfile
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lowbit.core.fixed import FixedPoint
from lowbit.errors import LowbitError
from lowbit.graph.build import Call, build
from lowbit.hardware.program import Program, Step
from lowbit.hardware.softmax import SHARE

__all__ = ["IO", "NOTE", "configuration", "plain_network", "run_project", "shapes_of", "write_project"]

IO = Literal["io_parallel", "io_stream"]
BACKENDS = ("Vivado", "Vitis")
# beside the project: what `lowbit.verify` needs to know of it
NOTE = "lowbit.json"
# of a bias that is not there
_NO_BIAS = FixedPoint(1, 0, signed=False)
Widths = Mapping[str, Mapping[str, FixedPoint | str]]


def configuration(
    layers: Program | Widths,
    *,
    io: IO = "io_parallel",
    reuse: int = 1,
    strategy: Literal["Latency", "Resource"] = "Latency",
    default: FixedPoint | str = "fixed<16,6>",
) -> dict[str, Any]:
    """The dictionary that hls4ml takes as `hls_config`; plain data.

    Args:
        layers: a program, or for any network a table {layer: {"weight": ..., "bias": ..., "result": ...}} of
            types; sums are as wide as they need to be.
        reuse: how often one multiplier is used for a sample.
        default: the type of what the table leaves out.

    Raises:
        LowbitError: a name of a type that is none, a field that layers do not have.
    """
    steps: dict[str, Step] = {}
    if isinstance(layers, Program):
        _, steps = plain_network(layers)
        table = {name: _precision(step) for name, step in steps.items()}
    else:
        table = _checked(layers)
    order = "full" if io == "io_parallel" else "internal"
    model = {
        "Precision": {"default": str(default)},
        "ReuseFactor": reuse,
        "Strategy": strategy,
        "ChannelsLastConversion": order,
        "TransposeOutputs": False,
        "BramFactor": 1_000_000_000,
        "TraceOutput": False,
    }
    found = {
        name: {"Precision": precision, "ReuseFactor": reuse, "Strategy": strategy, **_tables(steps.get(name))}
        for name, precision in table.items()
    }
    return {"Model": model, "LayerName": found}


def _checked(widths: Widths) -> dict[str, dict[str, str]]:
    found = {}
    for layer, types in widths.items():
        for field in set(types) - {"weight", "bias", "result", "accum"}:
            raise LowbitError(f"'{layer}': a layer has no '{field}'; give weight, bias, result or accum")
        named = {k: str(v if isinstance(v, FixedPoint) else FixedPoint.parse(v)) for k, v in types.items()}
        found[layer] = {"result": "auto"} | ({"accum": "auto"} if "weight" in types else {}) | named
    return found


def _precision(step: Step) -> dict[str, str]:
    result = {"result": str(step.type)}
    if step.weight is not None:
        bias = _NO_BIAS if step.bias is None else step.bias.type
        rest = {} if step.rounds else {"result": "auto"}
        return {"weight": str(step.weight.type), "bias": str(bias), "accum": "auto", **(rest or result)}
    if step.op == "max_pool":
        return {"accum": "auto", **result}
    if step.op == "average_pool":
        # it sums and divides in one type: the "auto" one has too few bits behind the point
        count = step.settings["count"]
        return {
            "accum": str(FixedPoint.holding(step.low * count, step.high * count, step.fraction)),
            **result,
        }
    if step.op == "softmax":
        (classes,) = step.shape
        return {"accum": str(FixedPoint.holding(0, classes << SHARE.fraction, SHARE.fraction)), **result}
    return result


def _tables(step: Step | None) -> dict[str, Any]:
    """What hls4ml asks of the tables of a softmax; left to itself it lets half of the distances wrap."""
    if step is None or step.op != "softmax":
        return {}
    distance, total = step.settings["distance"], step.settings["total"]
    return {
        "Implementation": "stable",
        "exp_table_size": 1 << distance.width,
        "inv_table_size": 1 << total.width,
        "inp_norm_t": str(distance),
        "inv_inp_t": str(total),
        "exp_table_t": str(SHARE),
        "inv_table_t": str(SHARE),
    }


def plain_network(program: Program) -> tuple[nn.Module, dict[str, Step]]:
    """A float network of the same numbers that hls4ml can read, and the step behind each of its layers.

    Raises:
        LowbitError: a step that hls4ml cannot take.
    """
    from hls4ml.utils.torch import CustomFXTracer

    calls: list[Call] = []
    owners: list[Step] = []  # of each call
    at: list[int] = []  # the last call of each step
    for step in program.steps:
        for call in _calls(program, step, [at[i] for i in step.inputs], len(calls)):
            calls.append(replace(call, name=_identifier(call.name, {c.name for c in calls})))
            owners.append(step)
        at.append(len(calls) - 1)
    model = build(calls, [at[i] for i in program.outputs])
    # hls4ml traces again, and calls layers as that trace does
    names = [node.name for node in CustomFXTracer().trace(model).nodes if node.op != "output"]
    return model, dict(zip(names, owners, strict=True))


def _calls(program: Program, step: Step, read: Sequence[int], count: int) -> Iterator[Call]:
    """A step as plain calls, behind so many; a concatenation of many is one of pairs."""
    if step.op == "input":
        yield Call(step.name, None)
    elif step.op == "add":
        yield Call("sum", torch.add, tuple(read))
    elif step.op == "concat":
        found = read[0]
        for k, other in enumerate(read[1:]):
            yield Call("joined", torch.cat, (found, other), {"dim": step.settings["axis"]}, listed=True)
            found = count + k
    else:
        yield Call(step.name, _module(program, step), tuple(read))


def _identifier(name: str, taken: Collection[str]) -> str:
    """A name of C++, unlike those of the functions that hls4ml goes by."""
    found = re.sub(r"\W", "_", name)
    found = f"layer_{found}" if found[0].isdigit() or found in ("add", "cat") else found
    while found in taken:
        found += "_"
    return found


def _module(program: Program, step: Step) -> nn.Module:
    settings = step.settings
    source = program.steps[step.inputs[0]]
    if step.op == "relu":
        return nn.ReLU()
    if step.op == "reshape" and len(step.shape) == 1:
        return nn.Flatten()
    if step.op == "max_pool":
        return {1: nn.MaxPool1d, 2: nn.MaxPool2d}[len(settings["kernel"])](*_sizes(settings))
    if step.op == "average_pool":
        kind = {1: nn.AvgPool1d, 2: nn.AvgPool2d}[len(settings["kernel"])]
        return kind(*_sizes(settings), padding=settings["padding"])
    if step.op == "softmax":
        return nn.Softmax(-1)
    if step.op == "dense":
        if len(source.shape) > 1:
            raise LowbitError(
                f"'{step.name}': hls4ml takes a Linear on vectors, and here it reads {[*source.shape]}; "
                "use a Conv1d with a kernel of 1"
            )
        return _filled(nn.Linear(source.shape[0], step.shape[0], bias=step.bias is not None), step)
    if step.op == "conv":
        return _filled(_convolution(step, source), step)
    cure = {
        "cast": "give all readers of a tensor the same bits",
        "clamp": "use ReLU",
        "bias": "give the bias to the layer before",
        "transpose": "move it out of the network",
        "reshape": "flatten to vectors alone",
    }[step.op]
    raise LowbitError(f"'{step.name}': hls4ml has no {step.op} like this; {cure}")


def _sizes(settings: Mapping[str, Any]) -> tuple[Any, Any]:
    kernel, stride = settings["kernel"], settings["stride"]
    return (kernel[0], stride[0]) if len(kernel) == 1 else (kernel, stride)


def _convolution(step: Step, source: Step) -> nn.Module:
    settings = step.settings
    if settings["groups"] != 1:
        raise LowbitError(
            f"'{step.name}' has {settings['groups']} groups, which hls4ml reads from QONNX alone; use "
            "lowbit.export.qonnx and lowbit.export.fpga.qonnx.hls4ml_from_qonnx"
        )
    if set(settings["dilation"]) != {1}:
        raise LowbitError(f"'{step.name}' has dilation {settings['dilation']}; hls4ml takes 1")
    kind = {1: nn.Conv1d, 2: nn.Conv2d}[len(settings["kernel"])]
    channels = source.shape[0], step.shape[0], settings["kernel"]
    return kind(*channels, settings["stride"], settings["padding"], bias=step.bias is not None)


def _filled(module: nn.Module, step: Step) -> nn.Module:
    """A layer with the numbers of the step, for hls4ml to print."""
    assert step.weight is not None
    module.weight = nn.Parameter(step.weight.real(), requires_grad=False)
    if step.bias is not None:
        module.bias = nn.Parameter(step.bias.real(), requires_grad=False)
    return module


def write_project(
    program: Program, folder: Path, *, backend: str, io: IO, part: str | None, clock_ns: float, **options: Any
) -> Path:
    """Convert a program to a project in a folder that does not exist yet, or is empty.

    Raises:
        LowbitError: what hls4ml cannot take; a folder with something in it, an unknown backend.
    """
    if backend not in BACKENDS:
        raise LowbitError(f"backend='{backend}' is unknown; use one of {', '.join(BACKENDS)}")
    if io not in ("io_parallel", "io_stream"):
        raise LowbitError(f"io='{io}' is unknown; use 'io_parallel' or 'io_stream'")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise LowbitError(f"'{folder}' exists already; name another folder, or remove it first")
    if not folder.parent.is_dir():
        raise LowbitError(f"'{folder}' cannot be made: there is no folder '{folder.parent}'; create it first")
    if io == "io_stream":
        _check_streamed(program)
    config = configuration(program, io=io, **options)
    model, _ = plain_network(program)
    shapes = [step.shape for step in program.inputs]
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        made = Path(temporary) / "project"
        _convert(model, config, shapes, made, backend=backend, io=io, part=part, clock_ns=clock_ns)
        note = {"io": io, "backend": backend, "shapes": shapes_of(program), "config": config}
        (made / NOTE).write_text(json.dumps(note, indent=1), encoding="utf-8")
        _set_home(made / "hls4ml_config.yml", folder)
        if folder.exists():
            folder.rmdir()
        shutil.move(made, folder)
    return folder


def _check_streamed(program: Program) -> None:
    """What hls4ml's streams only assert when they run, and then end the process."""
    for step in program.steps:
        if not step.op.endswith("pool"):
            continue
        kernel, stride = step.settings["kernel"], step.settings["stride"]
        if kernel != stride or any(step.settings.get("padding", ())):
            raise LowbitError(
                f"'{step.name}' pools windows of {[*kernel]} every {[*stride]} values, or pads; in io_stream "
                "hls4ml takes windows side by side, without padding: use io='io_parallel'"
            )


def _set_home(path: Path, folder: Path) -> None:
    """Let the description of a project name the folder where it will stand."""
    import yaml

    described = yaml.safe_load(path.read_text(encoding="utf-8"))
    path.write_text(yaml.safe_dump({**described, "OutputDir": str(folder)}), encoding="utf-8")


def _convert(
    model: nn.Module,
    config: Mapping[str, Any],
    shapes: Sequence[tuple[int, ...]],
    folder: Path,
    *,
    backend: str,
    io: IO,
    part: str | None,
    clock_ns: float,
) -> None:
    import hls4ml

    with contextlib.redirect_stdout(text.StringIO()):
        converted = hls4ml.converters.convert_from_pytorch_model(
            model,
            output_dir=str(folder),
            project_name="lowbit",
            backend=backend,
            io_type=io,
            part=part,
            clock_period=clock_ns,
            hls_config={**config, "InputShape": [[*shape] for shape in shapes]},
        )
        # it would be written as Python objects
        del converted.config.config["PytorchModel"]
        converted.write()


def shapes_of(program: Program) -> list[list[list[int]]]:
    """Of one sample: what goes in, and what comes out."""
    results = [program.steps[i] for i in program.outputs]
    return [[[*step.shape] for step in steps] for steps in (program.inputs, results)]


def run_project(folder: Path, inputs: Sequence[Tensor]) -> list[Tensor]:
    """What the compiled C++ of a project gives for float batches, channels first: float64 results.

    Raises:
        LowbitError: no g++.
    """
    import hls4ml
    import numpy as np

    if shutil.which("g++") is None:
        raise LowbitError("a project is compiled by g++, which is not there; install it, such as package g++")
    stream = json.loads((folder / NOTE).read_text(encoding="utf-8"))["io"] == "io_stream"
    # in float64, for a sum of more than 24 bits is no float32
    given = [np.ascontiguousarray((x.movedim(1, -1) if stream else x).double().numpy()) for x in inputs]
    with contextlib.redirect_stdout(text.StringIO()):
        project = hls4ml.converters.link_existing_project(str(folder))
        project.compile()
        results = project.predict(given[0] if len(given) == 1 else given)
    results = results if isinstance(results, list) else [results]
    return [torch.from_numpy(np.asarray(result)).double() for result in results]
