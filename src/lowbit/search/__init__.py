"""Which layer deserves how many bits: measured, solved exactly, checked."""

from lowbit.search.allocate import allocate, minimum_bits
from lowbit.search.allocation import Allocation, uniform
from lowbit.search.budget import Budget
from lowbit.search.front import front_table, pareto, plot
from lowbit.search.measure import sensitivity
from lowbit.search.repair import Repaired, repair
from lowbit.search.table import Probe, Sensitivity, Site

__all__ = [
    "Allocation",
    "Budget",
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
