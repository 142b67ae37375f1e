"""Which layer deserves how many bits: measured, solved exactly, checked."""

from lowbit.search.allocate import Allocation, Budget, allocate
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
    "repair",
    "sensitivity",
]
