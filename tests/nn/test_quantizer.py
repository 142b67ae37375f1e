"""A quantizer watches, then rounds: the same numbers as the formula on bare tensors."""

from __future__ import annotations

import copy

import pytest
import torch

from lowbit import FP16, INT8, UINT8, LowbitError, PerChannel, QTensor, QuantSpec, observers
from lowbit.core.observers import Observer
from lowbit.core.spec import PerTensor
from lowbit.nn.quantizer import Quantizer

SPECS = {
    "uint8": UINT8,
    "int8": QuantSpec(bits=8),
    "int4 per channel": QuantSpec(bits=4, granularity=PerChannel(1)),
    "pow2": QuantSpec(bits=8, scale="pow2"),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
@pytest.mark.parametrize("observer", ["minmax", "mse"])
def test_it_rounds_to_what_it_observed(spec: QuantSpec, observer: str) -> None:
    """The oracle: the observer by itself and QTensor."""
    batches = [torch.randn(4, 3, 5), 2 * torch.randn(6, 3, 5)]
    quantizer, alone = Quantizer(spec, observer), observers.get(observer)(spec)
    quantizer.mode = "observe"
    for x in batches:
        assert quantizer(x) is x
        alone.update(x)
    assert quantizer.finish_observing()
    assert quantizer.mode == "quantize"
    assert quantizer.observer is None, "nothing observed is kept"
    x = torch.randn(2, 3, 5)
    want = QTensor.quantize(x, spec, alone.range())
    assert torch.equal(quantizer(x), want.dequantize())
    assert torch.equal(quantizer.quantize(x).codes, want.codes)


def test_off_is_the_identity() -> None:
    x = torch.randn(3)
    assert Quantizer(UINT8)(x) is x


def test_fp16_needs_no_range() -> None:
    quantizer, x = Quantizer(FP16), torch.randn(100)
    assert quantizer.ready
    quantizer.mode = "observe"
    assert quantizer(x) is x
    assert quantizer.finish_observing()
    assert torch.equal(quantizer(x), x.half().float())


def test_without_data_it_stays_off() -> None:
    quantizer = Quantizer(UINT8)
    quantizer.mode = "observe"
    assert not quantizer.finish_observing()
    assert quantizer.mode == "off"


def test_without_a_scale_it_says_what_to_do() -> None:
    quantizer = Quantizer(UINT8)
    quantizer.mode = "quantize"
    with pytest.raises(LowbitError, match=r"call lowbit\.calibrate"):
        quantizer(torch.randn(3))


def test_an_observer_may_be_a_class() -> None:
    assert isinstance(Quantizer(INT8, observers.get("kl")).observer, Observer)


def test_a_copy_of_an_observing_quantizer_observes_by_itself() -> None:
    quantizer = Quantizer(QuantSpec(bits=8, granularity=PerTensor()), "mse")
    quantizer.mode = "observe"
    quantizer(torch.ones(4))
    other = copy.deepcopy(quantizer)
    other(torch.full((4,), 9.0))
    quantizer.finish_observing()
    other.finish_observing()
    assert other.scale > 5 * quantizer.scale
