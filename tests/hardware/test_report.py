"""The table of types, costs and overflows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import lowbit
from lowbit.core.fixed import FixedPoint
from lowbit.hardware import lower
from lowbit.hardware.cost import significant_bits
from lowbit.hardware.report import describe


def test_counts_by_hand() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(100, 4)
    program = lower(lowbit.quantize(model, "fixed6", calibration=[x]))
    report = describe(program, [8 * x])
    first, relu = report.rows[1], report.rows[2]
    assert (first.macs, first.shape, first.result) == (32, (8,), str(program.steps[1].type))
    weight, source = program.steps[1].weight, program.steps[0].type
    assert weight is not None
    assert first.ebops == int(significant_bits(weight.codes).sum()) * source.width
    assert report.ebops == first.ebops + report.rows[3].ebops
    to = program.steps[0].type
    codes = (8 * x / to.scale).round()
    lost = ((codes < to.qmin) | (codes > to.qmax)).float().mean().item()
    assert lost > 0.1
    assert report.rows[0].overflow == pytest.approx(lost)
    assert relu.overflow is not None
    assert first.overflow is None
    assert "effective bit operations" in str(report)


def test_without_data_nothing_overflows() -> None:
    model = nn.Sequential(nn.Linear(4, 2))
    program = lower(lowbit.quantize(model, "fixed8", calibration=[torch.randn(8, 4)]))
    assert [row.overflow for row in describe(program).rows] == [None, None]
    assert FixedPoint.parse(describe(program).rows[0].result) == program.steps[0].type
