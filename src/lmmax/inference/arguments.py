"""Checks of the arguments that functions of fits share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..results import Fit


def as_fit(value: Any, what: str = "fit") -> Fit:
    """Return the value if it is a fit, else raise a TypeError that names the argument."""
    from ..results import Fit

    if not isinstance(value, Fit):
        raise TypeError(
            f"{what} must be a fit, as lmmax.fit returns it, not {type(value).__name__}"
        )
    return value
