"""The forms of the likelihood, one file each, and what they share."""

from . import crossed, grouped, nested
from .problem import (
    Derivatives,
    Expansion,
    Hold,
    Problem,
    block_entries,
    constant,
    criterion,
    degrees_of_freedom,
    derivatives,
    expand,
    objective,
    profiled_log_scale,
    reduce,
    user_entries,
)

__all__ = [
    "Derivatives",
    "Expansion",
    "Hold",
    "Problem",
    "block_entries",
    "constant",
    "criterion",
    "crossed",
    "degrees_of_freedom",
    "derivatives",
    "expand",
    "grouped",
    "nested",
    "objective",
    "profiled_log_scale",
    "reduce",
    "user_entries",
]
