"""Is the file the model that was measured? Codes of the exported file, read while ONNX Runtime runs it.

Every quantized tensor of the file is compared with the integer reference, which must be equal, and with the
float simulation, which differs by the rounding of single codes that later layers carry on.

    python benchmarks/parity.py --data ../shared/data
"""

from __future__ import annotations

import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import cifar
import lowbit
from common import Claim, Table, arguments, progress, report
from lowbit.demo import load_images, load_network
from networks import load_cifar

COLUMNS = (
    "network",
    "bits",
    "tensors",
    "codes",
    "equal",
    "max LSB",
    "output equal",
    "sim. equal",
    "sim. max LSB",
    "sim. top-1",
)
FORMATS = {"codes": ",d", "equal": ".6%", "output equal": ".6%", "sim. equal": ".3%", "sim. top-1": ".2%"}
CIFAR_NETWORKS = ("resnet20-A", "resnet20-B")


def networks(options: Namespace) -> Iterator[tuple[str, nn.Module, list[Tensor], list[Tensor]]]:
    """Name, float network, calibration batches and test batches."""
    train, test = load_images("train")[0][:512], load_images("test")[0][: options.images]
    yield "demo", load_network(), list(train.split(64)), list(test.split(100))
    for name in CIFAR_NETWORKS:
        batches = cifar.calibration_batches(options.data, name, 512)
        x = cifar.load_images(options.data, "test", name, options.images).x
        yield name, load_cifar(name, options.data), batches, list(x.split(100))


def measure(
    name: str, bits: str, model: nn.Module, batches: list[Tensor], test: list[Tensor], folder: Path
) -> dict[str, object]:
    """One row: the worst of all tensors for each figure but the counts."""
    q = lowbit.quantize(model, bits, batches)
    parity = lowbit.verify(q, lowbit.export.onnx(q, folder / f"{name}.onnx"), test)
    codes = sum(layer.codes for layer in parity.layers)
    return {
        "network": name,
        "bits": bits,
        "tensors": len(parity.layers),
        "codes": codes,
        "equal": sum(layer.equal * layer.codes for layer in parity.layers) / codes,
        "max LSB": max(layer.max_lsb for layer in parity.layers),
        "output equal": parity.output_equal,
        "sim. equal": sum(layer.simulation_equal * layer.codes for layer in parity.layers) / codes,
        "sim. max LSB": max(layer.simulation_max_lsb for layer in parity.layers),
        "sim. top-1": parity.top1_agreement,
    }


def claims(table: Table) -> Iterator[Claim]:
    """Every code of every tensor, and every output."""
    for row in table.rows:
        for column in ("equal", "output equal"):
            value = row[column]
            assert isinstance(value, float)
            yield Claim(claim=f"{row['network']} {row['bits']} {column}", measured=value, bound=1.0)


def main() -> int:
    """Measure every network; return the exit code."""
    parser = arguments(__doc__)
    parser.add_argument("--data", type=Path, required=True, help="the folder with cifar10/ and models/")
    parser.add_argument("--images", type=int, default=1000, help="test images")
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = Table(
        title=f"codes of the file in ONNX Runtime, {options.images} test images",
        columns=COLUMNS,
        formats=FORMATS,
    )
    with tempfile.TemporaryDirectory(prefix="lowbit-bench-") as folder:
        for name, model, batches, test in networks(options):
            for bits in ("w8a8", "w4a8"):
                progress(f"{name} {bits}")
                table.add(**measure(name, bits, model, batches, test, Path(folder)))  # type: ignore[arg-type]
    return report([table], list(claims(table)), as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
