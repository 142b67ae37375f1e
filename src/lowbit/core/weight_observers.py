"""From a tensor at rest, such as a weight, to its scale: by name, as a rule says.

A weight observer is a function (x, spec) -> Fit. Binary and ternary specs have their own formulas, in
`levels`; any other scale covers a range.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lowbit.core import levels
from lowbit.core.affine import choose_qparams, fake_quantize, group_amin_amax
from lowbit.core.levels import Fit
from lowbit.core.ranges import least_error_range_of
from lowbit.core.spec import QuantSpec
from lowbit.errors import LowbitError
from lowbit.registry import Registry

__all__ = ["check_weight_observer", "fit", "suits", "weight_observers"]

WeightObserver = Callable[[Tensor, QuantSpec], Fit]
weight_observers: Registry[WeightObserver] = Registry("weight observer")
# which specs the others are for
_NEEDS = {"absmean": "binary or ternary (without split)", "twn": "ternary", "ttq": "ternary"}


def fit(x: Tensor, spec: QuantSpec, observer: str = "mse") -> Fit:
    """Scale, and what else the spec has, of a float tensor.

    Args:
        observer: "mse", of least squared error; "minmax", nothing is clipped; for binary and ternary codes
            "absmean"; for ternary codes "twn" and "ttq", which set a threshold.

    Raises:
        LowbitError: no such observer, or not for that spec.
    """
    check_weight_observer(observer, spec)
    return weight_observers.get(observer)(x, spec)


def rounded(x: Tensor, spec: QuantSpec) -> Tensor:
    """A tensor at rest as it is once quantized, with the scale of least squared error."""
    found = fit(x, spec)
    return fake_quantize(x, found.scale, found.zero_point, spec)


def suits(observer: str, spec: QuantSpec) -> bool:
    """Whether a weight observer is for that spec."""
    needs = _NEEDS.get(observer)
    if needs is None:
        return True
    return (spec.is_ternary and not (spec.split and observer == "absmean")) or (
        spec.is_binary and "binary" in needs
    )


def check_weight_observer(name: str, spec: QuantSpec) -> None:
    """Raise LowbitError where a weight observer does not exist, or is not for that spec."""
    weight_observers.get(name)
    if not suits(name, spec):
        raise LowbitError(
            f"weight_observer='{name}' is for {_NEEDS[name]} codes, and the weight is {spec}; use 'mse', or "
            "another spec"
        )


@weight_observers.register("mse")
def mse(x: Tensor, spec: QuantSpec) -> Fit:
    """Least squared error: exact for binary and ternary codes, searched for others."""
    if spec.is_binary or spec.is_ternary:
        return levels.least_error(x, spec)
    return Fit(*choose_qparams(*least_error_range_of(x, spec), spec))


@weight_observers.register("minmax")
def minmax(x: Tensor, spec: QuantSpec) -> Fit:
    """From the smallest to the largest value."""
    if spec.split:
        return levels.largest(x, spec)
    return Fit(*choose_qparams(*group_amin_amax(x, spec), spec))


for _name, _observer in (("absmean", levels.absmean), ("twn", levels.twn), ("ttq", levels.ttq)):
    weight_observers.register(_name)(_observer)
