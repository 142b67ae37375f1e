"""Tensor networks in place of dense weights: made from trained layers, and reduced by what rounding hides."""

from lowbit.decompose.ranks import Budget, Energy, Error, Fixed, Vbmf
from lowbit.nn.tensorized import TTLinear
from lowbit.nn.tensorized_conv import CPConv2d, TTConv2d, TuckerConv2d
from lowbit.tensor_networks.allocate import Plan, allocate_ranks
from lowbit.tensor_networks.reduce import Reduced, reduce_ranks
from lowbit.tensor_networks.tensorize import Tensorized, TensorRule, tensorize

__all__ = [
    "Budget",
    "CPConv2d",
    "Energy",
    "Error",
    "Fixed",
    "Plan",
    "Reduced",
    "TTConv2d",
    "TTLinear",
    "TensorRule",
    "Tensorized",
    "TuckerConv2d",
    "Vbmf",
    "allocate_ranks",
    "reduce_ranks",
    "tensorize",
]
