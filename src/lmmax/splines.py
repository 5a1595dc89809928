"""Natural and cyclic cubic splines whose columns suit the terms that they stand beside."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import numpy as np
from formulaic.transforms.cubic_spline import cubic_spline
from formulaic.utils.stateful_transforms import stateful_transform

__all__ = ["SPLINES", "Spline"]


class Spline:
    """The columns of a spline, with the constants among the functions they span or without.

    Either way there are as many columns as degrees of freedom were asked for: a centred basis has
    a knot more, and its columns sum to zero over the data.

    Args:
        x: (n,) values.
        options: those of formulaic's function.
        state: what was learnt of the data, by basis; filled in here.
    """

    def __init__(self, x: Any, options: Mapping[str, Any], state: dict[str, Any]) -> None:
        self._x, self._options, self._state = x, options, state
        self._columns: dict[bool, dict[int, np.ndarray]] = {}

    def columns(self, centred: bool) -> dict[int, np.ndarray]:
        """Return the columns, (n,) each, by number from 1.

        Raises:
            ValueError: if the data have too few different values for the knots.
        """
        if centred not in self._columns:
            self._check(centred)
            own = self._state.setdefault("centred" if centred else "whole", {})
            constraints = "center" if centred else None
            found = cubic_spline(self._x, **self._options, constraints=constraints, _state=own)
            self._columns[centred] = dict(found)
        return self._columns[centred]

    def _check(self, centred: bool) -> None:
        """Raise for so few knots that the function is a line, for which there is no basis."""
        df, knots = self._options["df"], self._options["knots"]
        least = 3 - centred
        few = df is not None and df < least
        if not self._options["cyclic"] and (few or (knots is not None and not len(list(knots)))):
            raise ValueError(
                f"a natural spline with df={df} is a line: write x itself, or df={least} or more"
                if df is not None
                else "a natural spline without inner knots is a line: write x itself"
            )

    @property
    def either(self) -> dict[int, np.ndarray]:
        """The columns of a basis that the data have room for, to see where they are defined."""
        try:
            return self.columns(True)
        except ValueError as error:
            try:
                return self.columns(False)
            except ValueError:
                raise error from None


def _spline(
    x: Any,
    df: int | None = None,
    knots: Iterable[float] | None = None,
    lower_bound: float | None = None,
    upper_bound: float | None = None,
    constraints: Any = None,
    extrapolation: str = "extend",
    cyclic: bool = False,
    _state: dict[str, Any] = {},  # noqa: B006  (formulaic hands in the state by this name)
) -> Any:
    """See `formulaic.transforms.cubic_spline`; without constraints, a `Spline`."""
    options = {
        "df": df,
        "knots": knots,
        "lower_bound": lower_bound,
        "upper_bound": upper_bound,
        "extrapolation": extrapolation,
        "cyclic": cyclic,
    }
    if constraints is not None:
        return cubic_spline(x, **options, constraints=constraints, _state=_state)
    return Spline(x, options, _state)


SPLINES = {
    "cr": stateful_transform(partial(_spline, cyclic=False)),
    "cs": stateful_transform(partial(_spline, cyclic=False)),
    "cc": stateful_transform(partial(_spline, cyclic=True)),
}
"""The splines, by their names in a formula."""
