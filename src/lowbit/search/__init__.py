"""Which layer deserves how many bits: measured, solved exactly, checked."""

from lowbit.search.allocate import Allocation, Budget, allocate
from lowbit.search.front import Point, front_table, minimum_bits, pareto, plot, uniform
from lowbit.search.measure import sensitivity
from lowbit.search.repair import Repaired, repair
from lowbit.search.table import Probe, Sensitivity, Site

__all__ = [
    "Allocation",
    "Budget",
    "Point",
    "Probe",
    "Repaired",
    "Sensitivity",
    "Site",
    "allocate",
    "front_table",
    "minimum_bits",
    "pareto",
    "plot",
    "repair",
    "sensitivity",
    "uniform",
]
