"""Predictions for new rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from .design import DataError

if TYPE_CHECKING:
    from .results import Fit

NewLevels = Literal["error", "population"]


def predict(
    fit: Fit, newdata: Any, *, random_effects: bool, new_levels: NewLevels, offset: Any
) -> pd.Series:
    """Return predictions; see :meth:`lmmax.Fit.predict`."""
    if new_levels not in ("error", "population"):
        raise ValueError(f"new_levels={new_levels!r} is unknown; use 'error' or 'population'")
    if newdata is None:
        if offset is not None:
            raise ValueError("offset= goes with newdata; the rows of the fit have theirs already")
        rows = fit.fittedvalues if random_effects else fit.fittedvalues_marginal
        return rows.rename("predicted")

    new = fit.design.new_data(newdata, need_groups=random_effects, offset=offset)
    values = new.X[:, fit.layout.fixed.kept] @ fit.estimates.beta
    if new.offset is not None:
        values = values + new.offset
    if random_effects:
        codes = new.codes[0]
        unseen = (codes < 0) & ~new.missing
        if new_levels == "error" and unseen.any():
            grouping = fit.design.groupings[0].name
            count = int(unseen.sum())
            belong = "1 row of newdata belongs" if count == 1 else f"{count} rows of newdata belong"
            raise DataError(
                f"{belong} to groups of {grouping!r} that were not in the fit, the first at row "
                f"{new.index[int(np.argmax(unseen))]!r}; pass new_levels='population' to predict "
                "new groups with random effects of zero"
            )
        modes = np.vstack([fit.random_effects.to_numpy(), np.zeros(len(fit.effect_names))])
        values = values + np.einsum("ij,ij->i", np.hstack(new.Z), modes[codes])
    values = np.where(new.missing, np.nan, values)
    return pd.Series(values, index=new.index, name="predicted")
