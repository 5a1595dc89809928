"""The forms of the likelihood, one file each, and what they share."""

from . import crossed, grouped, nested
from .problem import (
    Derivatives,
    Problem,
    constant,
    criterion,
    degrees_of_freedom,
    derivatives,
    objective,
    profiled_log_scale,
    reduce,
)

__all__ = [
    "Derivatives",
    "Problem",
    "constant",
    "criterion",
    "crossed",
    "degrees_of_freedom",
    "derivatives",
    "grouped",
    "nested",
    "objective",
    "profiled_log_scale",
    "reduce",
]
