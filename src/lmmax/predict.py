"""Predictions for new rows."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import pandas as pd

from .design import DataError
from .frames import listing, plural, row_text
from .options import choose

if TYPE_CHECKING:
    from .results import Fit

NewLevels = Literal["error", "population"]
NEW_LEVELS: tuple[NewLevels, ...] = get_args(NewLevels)


def predict(
    fit: Fit,
    newdata: Any,
    *,
    random_effects: bool | str | Collection[str],
    new_levels: NewLevels,
    offset: Any,
    depth: int = 3,
) -> pd.Series:
    """Return predictions; see :meth:`lmmax.Fit.predict`.

    A warning points at the caller ``depth`` levels up.
    """
    new_levels = choose("new_levels", new_levels, NEW_LEVELS)
    terms = chosen_terms(fit, random_effects)
    design = fit.design
    if newdata is None:
        if offset is not None:
            raise ValueError("offset= goes with newdata; the rows of the fit have theirs already")
        values = fit.fittedvalues_marginal
        if terms:
            blocks = [block.Z for block in design.blocks]
            codes = [grouping.codes for grouping in design.groupings]
            values = values + fit.contributions(blocks, codes, terms)
        return values.rename("predicted")

    factors = sorted({fit.terms[at].factor for at in terms})
    names = [fit.group_names[at] for at in factors]
    new = design.new_data(newdata, need_groups=names if names else False, offset=offset)
    predicted = new.X[:, fit.layout.fixed.kept] @ fit.estimates.beta
    if new.offset is not None:
        predicted = predicted + new.offset
    for factor in factors:
        found = new.codes[factor]
        assert found is not None  # asked for above
        unseen = (found < 0) & ~new.missing
        if new_levels == "error" and unseen.any():
            count = int(unseen.sum())
            belong = "1 row of newdata belongs" if count == 1 else f"{count} rows of newdata belong"
            raise DataError(
                f"{belong} to groups of {fit.group_names[factor]!r} that were not in the fit, the "
                f"first {_group_text(newdata, fit.group_names[factor], int(np.argmax(unseen)))}in "
                f"{row_text(new.index, np.argmax(unseen))}; pass new_levels='population' to "
                "predict new groups with random effects of zero"
            )
    if terms:
        predicted = predicted + fit.contributions(new.Z, new.codes, terms)
    lost = new.missing | _not_estimable(fit, new.X, new.missing, new.index, depth + 1)
    predicted = np.where(lost, np.nan, predicted)
    return pd.Series(predicted, index=new.index, name="predicted")


def _group_text(newdata: Any, name: str, row: int) -> str:
    """Return the label of a row's group for a message, with a blank; empty if it is not found."""
    table, parts = newdata, name.split(":")
    if isinstance(newdata, Mapping) and "groups" in newdata:
        table, parts = newdata["groups"], [name]
        if not isinstance(table, Mapping | pd.DataFrame):
            table = {name: table}
    try:
        found = [np.atleast_1d(np.asarray(table[part], dtype=object)) for part in parts]
        labels = [str(values[min(row, len(values) - 1)]) for values in found]
    except (KeyError, TypeError, ValueError, IndexError):
        return ""
    return f"{':'.join(labels)!r} "


def _not_estimable(
    fit: Fit, X: np.ndarray, missing: np.ndarray, index: pd.Index, depth: int
) -> np.ndarray:
    """Return which rows ask for more than the data tell of the fixed effects, (n,), and warn."""
    from .fit import RankWarning

    dependent = fit.layout.dependence
    missed = dependent.missed(X) & ~missing[:, None]
    rows, columns = missed.any(axis=1), missed.any(axis=0)
    if rows.any():
        count = int(rows.sum())
        names = listing(repr(fit.design.x_names[j]) for j in dependent.aliased[columns])
        warnings.warn(
            f"the mean of {plural(count, 'row')} of newdata (the first: "
            f"{row_text(index, np.argmax(rows))}) cannot be estimated and is NaN: {names} "
            f"{'is' if columns.sum() == 1 else 'are'} not the linear combination of other columns "
            "there that it was in the rows of the fit",
            RankWarning,
            stacklevel=depth,
        )
    return rows


def chosen_terms(fit: Fit, random_effects: bool | str | Collection[str]) -> list[int]:
    """Return the positions of the random terms that a user asks for by factor or by term."""
    if isinstance(random_effects, bool | np.bool_):
        return list(range(len(fit.terms))) if random_effects else []
    asked = [random_effects] if isinstance(random_effects, str) else list(random_effects)
    found: set[int] = set()
    for name in asked:
        hits = {
            at
            for at, term in enumerate(fit.terms)
            if name in (term.label, fit.group_names[term.factor])
        }
        if not hits:
            known = [*fit.group_names, *(term.label for term in fit.terms)]
            raise ValueError(
                f"random_effects names {name!r}; this model has the grouping factors and terms "
                + ", ".join(map(repr, dict.fromkeys(known)))
            )
        found |= hits
    return sorted(found)
