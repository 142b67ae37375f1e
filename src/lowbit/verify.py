"""Is the file the model that was measured? Run it, and compare codes with integers and the simulation."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from lowbit import runtime
from lowbit.errors import LowbitError, expect
from lowbit.graph.ops import kind_of, module_of
from lowbit.graph.run import bind_inputs, flat_tensors
from lowbit.graph.trace import Inputs
from lowbit.model import QuantizedModel
from lowbit.nn.dynamic import DynamicQuantizer
from lowbit.nn.quantizer import Quantizer, grid_of
from lowbit.passes.calibrate import batches
from lowbit.progress import track
from lowbit.reference import AnyCodes, Codes, run_on_codes
from lowbit.tables import text_table

if TYPE_CHECKING:
    from lowbit.hardware.parity import HardwareParity

__all__ = ["LayerParity", "Parity", "verify"]

# What may lie between two ways to compute a step in floating point: of the peak of an output, and the share
# of codes that are one off.
CLOSE, FLIPS = 0.01, 0.01


@dataclass(frozen=True)
class LayerParity:
    """Codes of one tensor in the file, against the integer reference and the float simulation.

    The reference goes on from the codes of the file at every tensor, so a step is judged by what the file
    gave it, and a code that floating point rounded the other way counts once. The simulation runs on its own.
    """

    name: str
    # codes compared
    codes: int
    # share of codes equal to the integer reference, and the largest difference in units of the last place
    equal: float
    max_lsb: int
    # the same against the float simulation
    simulation_equal: float
    simulation_max_lsb: int


@dataclass(frozen=True)
class Parity:
    """The file against the model, tensor by tensor and at the output."""

    path: str
    samples: int
    layers: tuple[LayerParity, ...]
    # share of output values bit-equal to the reference's, and the largest difference in the output's units
    output_equal: float
    output_max: float
    # largest magnitude in the output
    output_peak: float
    # largest difference of the output from the simulation's
    simulation_output_max: float
    # share of samples with the same top-1 class as in the simulation; None where the output holds no classes
    top1_agreement: float | None
    # what it takes to run the file like this on such a processor; "" where nothing
    advice: str = ""
    # products with two bits a weight, whose inputs the runtime rounds to 8 bits; all figures above are
    # without that rounding. And the largest difference of the output that it makes
    rounded_products: int = 0
    rounded_output_max: float = 0.0

    @property
    def exact(self) -> bool:
        """Whether every code and every output value equals the integer reference."""
        return self.output_equal == 1.0 and all(layer.equal == 1.0 for layer in self.layers)

    @property
    def ok(self) -> bool:
        """Whether the file is the model: exact, or as close as operations in floating point allow.

        A float kernel sums in its own order and may round a code the other way. So every step, on what the
        file gave it, may be one off in 1 % of its codes, and the output off by 1 % of its peak.
        """
        close = all(layer.max_lsb <= 1 and layer.equal >= 1 - FLIPS for layer in self.layers)
        return self.exact or (close and self.output_max <= CLOSE * self.output_peak)

    def __str__(self) -> str:
        header = ("tensor", "codes", "equal", "max LSB", "simulation equal", "max LSB")
        rows = [
            (
                r.name,
                f"{r.codes:,}",
                _percent(r.equal),
                str(r.max_lsb),
                _percent(r.simulation_equal),
                str(r.simulation_max_lsb),
            )
            for r in self.layers
        ]
        rows = rows or [("(no activation is quantized: the file computes in float)", "", "", "", "", "")]
        table = text_table(header, rows)
        equal = f"{_percent(self.output_equal)} of the outputs bit-equal"
        text = (
            f"{table}\n{self.path}, {self.samples} samples: {equal}, largest difference {self.output_max:.2g}"
        )
        if self.top1_agreement is not None:
            text += f", top-1 agreement with the simulation {_percent(self.top1_agreement)}"
        rounded = (
            f"in {self.rounded_products} products of two bits a weight the runtime rounds the inputs to 8 "
            f"bits: that moves the output by {self.rounded_output_max:.2g} at most, "
            f"{_percent_of(self)} of its peak"
            if self.rounded_products
            else ""
        )
        return "\n".join(filter(None, (text, rounded, self.advice)))


def _percent(share: float) -> str:
    """Never rounded up to 100."""
    return "100 %" if share == 1.0 else f"{np.floor(share * 1e6) / 1e4:.4f} %"


def _percent_of(parity: Parity) -> str:
    return f"{100 * parity.rounded_output_max / parity.output_peak:.1f} %" if parity.output_peak else "all"


@dataclass
class _Tally:
    """Running counts of one tensor."""

    count: int = 0
    equal: int = 0
    worst: float = 0.0
    peak: float = 0.0
    simulation_equal: int = 0
    simulation_worst: float = 0.0

    def add(self, found: Tensor, reference: Tensor, simulation: Tensor) -> None:
        self.count += found.numel()
        self.equal += int((found == reference).sum())
        self.simulation_equal += int((found == simulation).sum())
        if found.numel():
            self.peak = max(self.peak, reference.double().abs().max().item())
            self.worst = max(self.worst, (found.double() - reference.double()).abs().max().item())
            self.simulation_worst = max(
                self.simulation_worst, (found.double() - simulation.double()).abs().max().item()
            )


@dataclass
class _Tallies:
    layers: dict[str, _Tally] = field(default_factory=dict)
    output: _Tally = field(default_factory=_Tally)
    samples: int = 0
    agree: int = 0
    classes: bool = True
    # between the file with and without the rounding of inputs to 8 bits
    rounding: float = 0.0


@dataclass(frozen=True)
class _File:
    """A file that is run: a session with the codes as extra outputs, and the names of these by quantizer."""

    session: Any
    names: dict[str, str]
    # products whose inputs the runtime rounds to 8 bits, and a session that does; `session` does not
    rounded: int
    as_deployed: Any
    # layers whose float weights the runtime would round, unless it is told not to
    float_layers: int


def verify(
    q: QuantizedModel, path: str | Path, data: Any, num_batches: int | None = None
) -> Parity | HardwareParity:
    """Run what was exported and compare it with the model, code by code.

    An hls4ml project is compiled with g++, Verilog simulated by iverilog, a QONNX file run by qonnx: every
    code of the results must equal the integer reference. Any other ONNX file runs in ONNX Runtime.

    The codes of every quantized tensor are read from the running ONNX file. They must equal the integer
    reference, which follows the arithmetic of the kernels; the float simulation, `q(x)`, is shown beside it:
    it may differ by the rounding of a code here and there.

    Args:
        q: the frozen model that the file was exported from.
        data: as for `quantize`; labels are not needed.

    Raises:
        LowbitError: the file does not exist, is none that lowbit writes, or was not exported from this model.
    """
    from lowbit.hardware.parity import is_qonnx, verify_hardware

    expect(q, QuantizedModel, "q", "make it with lowbit.quantize(model, ...)")
    q = copy.deepcopy(q).cpu()
    if Path(path).is_dir() or is_qonnx(Path(path)):
        return verify_hardware(q, Path(path), list(batches(data, num_batches)))
    return _verify_onnx(q, path, data, num_batches)


def _verify_onnx(q: QuantizedModel, path: str | Path, data: Any, num_batches: int | None) -> Parity:
    file, tallies = _open(Path(path), q), _Tallies()
    for inputs in track(batches(data, num_batches), "verifying"):
        _compare(q, file, inputs, tallies)
    if not tallies.samples:
        raise LowbitError("there is no data to verify with; pass at least one batch")
    shown = {
        str(n.target): str(n.args[0].meta["name"]) for n in q.graph.graph.nodes if kind_of(n) == "quantizer"
    }
    layers = tuple(
        LayerParity(
            name=shown.get(name, name),
            codes=t.count,
            equal=t.equal / t.count,
            max_lsb=int(t.worst),
            simulation_equal=t.simulation_equal / t.count,
            simulation_max_lsb=int(t.simulation_worst),
        )
        for name, t in tallies.layers.items()
    )
    out = tallies.output
    agreement = tallies.agree / tallies.samples if tallies.classes else None
    return Parity(
        str(path),
        tallies.samples,
        layers,
        out.equal / max(out.count, 1),
        out.worst,
        out.peak,
        out.simulation_worst,
        agreement,
        advice=runtime.advice(file.float_layers),
        rounded_products=file.rounded,
        rounded_output_max=tallies.rounding,
    )


def _compare(q: QuantizedModel, file: _File, inputs: Inputs, tallies: _Tallies) -> None:
    from lowbit.export.qdq import SIGN_ZERO

    session, names = file.session, file.names
    bound = bind_inputs(q.graph, inputs)
    fed = [i.name for i in session.get_inputs()]
    values = [v for v in bound.values() if isinstance(v, Tensor)]
    outputs = [o.name for o in session.get_outputs()]
    with inputs.explaining(q):
        feed = {name: v.detach().numpy() for name, v in zip(fed, values, strict=True)}
        found = dict(zip(outputs, session.run(None, feed), strict=True))
    reference: dict[str, tuple[Tensor, Tensor]] = {}
    simulation: dict[str, Tensor] = {}

    def go_on_from_file(name: str, codes: AnyCodes) -> AnyCodes:
        if name not in names:
            return codes
        is_sign = isinstance(codes, Codes) and codes.grid.spec.is_binary
        there = torch.from_numpy(found[names[name]].astype(np.int32)) - SIGN_ZERO * is_sign
        reference[name] = codes.codes(), there
        return codes.with_codes(there)

    with torch.inference_mode():
        expected = flat_tensors(run_on_codes(q.graph, inputs, go_on_from_file))
        with _simulated_codes(q, simulation):
            simulated = flat_tensors(inputs.call(q))
    for name, (codes, there) in reference.items():
        tallies.layers.setdefault(name, _Tally()).add(there, codes, simulation[name])
    own = [o for o in outputs if o not in names.values()]
    results = [torch.from_numpy(found[o]) for o in own]
    if file.rounded:
        for o, deployed in zip(own, file.as_deployed.run(own, feed), strict=True):
            tallies.rounding = max(tallies.rounding, float(np.abs(deployed - found[o]).max(initial=0.0)))
    for result, want, simulated_one in zip(results, expected, simulated, strict=True):
        tallies.output.add(result, want, simulated_one)
    _count_classes(results, simulated, tallies)


def _count_classes(results: Sequence[Tensor], simulated: Sequence[Tensor], tallies: _Tallies) -> None:
    tallies.samples += results[0].shape[0] if results and results[0].ndim else 1
    if len(results) == 1 and results[0].ndim == 2 and results[0].shape[1] > 1:
        tallies.agree += int((results[0].argmax(1) == simulated[0].argmax(1)).sum())
    else:
        tallies.classes = False


class _simulated_codes:  # noqa: N801  (a context manager, read as a verb)
    """While open, records the codes that the simulation stands for, behind each quantizer."""

    def __init__(self, q: QuantizedModel, into: dict[str, Tensor]) -> None:
        self.q, self.into = q, into
        self.hooks: list[Any] = []

    def __enter__(self) -> None:
        for node in self.q.graph.graph.nodes:
            if kind_of(node) == "quantizer":
                module = module_of(node)
                assert isinstance(module, Quantizer)
                self.hooks.append(module.register_forward_hook(self._record(str(node.target), module)))

    def _record(self, name: str, quantizer: Quantizer) -> Any:
        grid = grid_of(quantizer)

        def hook(module: Any, args: Any, output: Tensor) -> None:
            if isinstance(quantizer, DynamicQuantizer):
                self.into[name] = quantizer.quantize(args[0]).codes.to(torch.int32)
            elif grid is not None:
                self.into[name] = (torch.round(output / grid.scale) + grid.zero_point).to(torch.int32)

        return hook

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()


def _open(path: Path, q: QuantizedModel) -> _File:
    import onnx

    from lowbit.export.qdq import CODES

    if not path.is_file():
        raise LowbitError(f"file '{path}' does not exist; write it with lowbit.export.onnx(q, path)")
    try:
        proto = onnx.load(str(path))
    except Exception as error:
        raise LowbitError(f"'{path}' is not an ONNX file: {str(error).splitlines()[0]}") from None
    names: dict[str, str] = {}
    for node in proto.graph.node:
        for entry in node.metadata_props:
            if entry.key == CODES:
                names[entry.value] = node.output[0]
    own = {str(n.target): module_of(n) for n in q.graph.graph.nodes if kind_of(n) == "quantizer"}
    expected = {name for name, m in own.items() if isinstance(m, Quantizer) and _has_codes(m)}
    unknown = [n for n in names if n.startswith("activation_quantizers.") and n not in own]
    if unknown or not expected <= set(names):
        odd = min(unknown or expected - set(names))
        raise LowbitError(
            f"'{path}' was not exported from this model: tensor '{odd}' is in only one of them; "
            "export it again"
        )
    for name in own:
        if name in names:
            proto.graph.output.append(onnx.helper.make_empty_tensor_value_info(names[name]))
    as_deployed = runtime.session(path)
    rounded = _forbid_rounding(proto)
    # unasked, the runtime rounds the activations of a linear layer to 8 bits where only its weight is
    # quantized
    opened = runtime.session(proto.SerializeToString(), qdq_matmulnbits_accuracy_level="0")
    found = {name: names[name] for name in own if name in names}
    return _File(opened, found, rounded, as_deployed, runtime.float_layers(proto))


def _has_codes(quantizer: Quantizer) -> bool:
    return isinstance(quantizer, DynamicQuantizer) or grid_of(quantizer) is not None


def _forbid_rounding(proto: Any) -> int:
    """Ask for float inputs in products of two bits a weight, in place; returns how many there are."""
    from lowbit.export.qdq import LEVEL, PRODUCT

    found = [node for node in proto.graph.node if node.op_type == PRODUCT.rpartition(":")[2]]
    for node in found:
        for attribute in node.attribute:
            if attribute.name == LEVEL[0]:
                attribute.i = 0
    return len(found)
