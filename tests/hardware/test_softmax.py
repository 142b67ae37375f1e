"""The softmax of look-up tables: every entry against hls4ml's C++, its sums by hand, and refusals."""

from __future__ import annotations

import math
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import lowbit
from lowbit import LowbitError
from lowbit.core.fixed import FixedPoint, to_real
from lowbit.hardware import Program, lower
from lowbit.hardware.softmax import SHARE, tables

# how many classes, lowest and highest code, bits behind the point
INPUTS = [
    (2, -4, 3, 0),
    (3, -8, 7, 2),
    (5, -32, 31, 4),
    (10, -512, 511, 7),
    (5, -9000, 9000, 9),
    (40, 0, 255, 11),
]


def classifier(last: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5), last).eval()


def lowered(last: nn.Module, bits: int = 6) -> tuple[Program, Tensor]:
    x = 2 * torch.randn(300, 6)
    return lower(lowbit.quantize(classifier(last), f"fixed{bits}", calibration=[x])), x


@pytest.mark.parametrize("make", [lambda: nn.Softmax(1), lambda: nn.Softmax(dim=-1)], ids=["1", "-1"])
@pytest.mark.parametrize("bits", [6, 14])
def test_shares_are_near_those_of_floats(make: type[nn.Module], bits: int) -> None:
    program, x = lowered(make(), bits)
    step = program.steps[-1]
    assert (step.op, step.type) == ("softmax", SHARE)
    logits = Program(program.steps, (len(program.steps) - 2,))
    (values,) = logits.real(logits.run(x))
    (found,) = program.real(program.run(x))
    assert (found - values.softmax(1)).abs().max() < 0.005
    assert torch.equal(found.gather(1, values.argmax(1, keepdim=True))[:, 0], found.amax(1))


def test_shares_by_hand() -> None:
    """Python's own numbers, one class after another."""
    program, x = lowered(nn.Softmax(1))
    logits = Program(program.steps, (len(program.steps) - 2,))
    fraction = program.steps[-2].type.fraction
    for codes, shares in zip(logits.run(x[:40])[0].tolist(), program.run(x[:40])[0].tolist(), strict=True):
        real = [math.exp(-(max(codes) - c) / 2**fraction) for c in codes]
        exponentials = [math.floor(e * 2**16 + 0.5) for e in real]
        total = math.floor(sum(exponentials) / 2**9 + 0.5)  # 7 bits behind the point
        reciprocal = math.floor(2**16 / (total / 2**7) + 0.5)
        assert shares == [math.floor(e * reciprocal / 2**16 + 0.5) for e in exponentials]


SOURCE = """
#include <cstdio>
#include "ap_fixed.h"
#include "nnet_utils/nnet_activation.h"
template <class D, class S> struct Config {
  static const unsigned exp_table_size = 1 << D::width, inv_table_size = 1 << S::width;
  static constexpr float exp_scale = 1.0;
  typedef ap_ufixed<17, 1, AP_RND, AP_SAT> exp_table_t, inv_table_t;
};
template <class D, class S> void show() {
  typedef Config<D, S> C;
  static typename C::exp_table_t e[C::exp_table_size];
  static typename C::inv_table_t r[C::inv_table_size];
  nnet::init_exp_table<D, C>(e, true);
  nnet::init_invert_table<S, C>(r);
  for (unsigned i = 0; i < C::exp_table_size; i++) printf("%d ", (int)(e[i].to_double() * 65536));
  for (unsigned i = 1; i < C::inv_table_size; i++) printf("%d ", (int)(r[i].to_double() * 65536));
  printf("\\n");
}
int main() { CALLS }
"""


def test_every_entry_of_the_tables_is_that_of_hls4ml(quick_compiler: Path, tmp_path: Path) -> None:
    hls4ml = pytest.importorskip("hls4ml", reason="hls4ml is not installed")
    made = [tables(*given) for given in INPUTS]
    calls = [f"show<{_cpp(how['distance'])}, {_cpp(how['total'])}>();" for how in made]
    (tmp_path / "tables.cpp").write_text(SOURCE.replace("CALLS", " ".join(calls)))
    headers = Path(hls4ml.__file__).parent / "templates" / "vivado"
    include = [f"-I{headers / part}" for part in ("", "ap_types")]
    compiler = quick_compiler / "g++"
    subprocess.run(
        [compiler, "-std=c++14", "-w", *include, "tables.cpp", "-o", "tables"], cwd=tmp_path, check=True
    )
    lines = subprocess.run(
        [tmp_path / "tables"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for how, line in zip(made, lines, strict=True):
        want = [*how["exponentials"].tolist(), *how["reciprocals"][1:].tolist()]
        assert [int(n) for n in line.split()] == want
        assert how["exponentials"][0] == 1 << 16


def _cpp(to: FixedPoint) -> str:
    return f"ap_ufixed<{to.width}, {to.integer}>"


def test_far_classes_share_the_last_entry() -> None:
    """Distances beyond 16 saturate, where hls4ml's own type would wrap."""
    how = tables(5, -9000, 9000, 9)
    assert (how["distance"].width, how["distance"].integer) == (10, 4)
    assert to_real(torch.tensor(how["distance"].qmax), how["distance"].fraction) > 15.9
    assert how["exponentials"][-1] == 0


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Conv1d(2, 3, 3), nn.Softmax(1)), "'1' is a softmax along axis 1 of samples"),
        (nn.Sequential(nn.Linear(6, 3), nn.LogSoftmax(-1)), r"'1' \(LogSoftmax\) has no fixed-point form"),
    ],
    ids=["of an image", "logarithms"],
)
def test_others_are_refused(model: nn.Module, message: str) -> None:
    q = lowbit.quantize(model.eval(), "fixed6", calibration=[torch.randn(8, 2, 6)])
    with pytest.raises(LowbitError, match=message):
        lower(q)


def test_back_ends_without_tables_refuse_it(tmp_path: Path) -> None:
    program, _ = lowered(nn.Softmax(1))
    cure = "leave it out, for the order of the classes is that of the logits"
    for package, export in (("qonnx", lowbit.export.qonnx), ("da4ml", lowbit.export.verilog)):
        pytest.importorskip(package, reason=f"{package} is not installed")
        with pytest.raises(LowbitError, match=f"'3' is a softmax.*{cure}"):
            export(program, tmp_path / "made")
    assert not list(tmp_path.iterdir())
