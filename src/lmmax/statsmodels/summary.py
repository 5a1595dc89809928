"""The printed summary, in the layout of statsmodels, with notes on its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

if TYPE_CHECKING:
    from statsmodels.iolib.summary2 import Summary

    from .results import MixedLMResults


def summarize(
    result: MixedLMResults,
    yname: str | None,
    xname_fe: Sequence[str] | None,
    xname_re: Sequence[str] | None,
    title: str | None,
    alpha: float,
    re_errors: str,
) -> Summary:
    """Return the summary; see `MixedLMResults.summary`."""
    from scipy.special import ndtr, ndtri
    from statsmodels.iolib import summary2

    if re_errors not in ("statsmodels", "natural"):
        raise ValueError(f"re_errors={re_errors!r} must be 'statsmodels' or 'natural'")
    model, p = result.model, result.k_fe
    names = list(model.data.param_names)
    for what, given, here in (
        ("xname_fe", xname_fe, slice(0, p)),
        ("xname_re", xname_re, slice(p, None)),
    ):
        if given is not None:
            if len(given) != len(names[here]):
                raise ValueError(f"{what} should be a list of length {len(names[here])}")
            names[here] = given

    sizes = result._group_sizes
    found = summary2.Summary()
    found.add_dict(
        {
            "Model:": "MixedLM",
            "No. Observations:": str(result.nobs),
            "No. Groups:": str(len(sizes)),
            "Min. group size:": f"{sizes.min():.0f}",
            "Max. group size:": f"{sizes.max():.0f}",
            "Mean group size:": f"{sizes.mean():.1f}",
            "Dependent Variable:": model.endog_names if yname is None else yname,
            "Method:": result.method,
            "Scale:": result.scale,
            "Log-Likelihood:": result.llf,
            "Converged:": "Yes" if result.converged else "No",
        }
    )
    found.add_title("Mixed Linear Model Regression Results" if title is None else title)

    variances = [*result.cov_re[np.tril_indices(result.k_re)], *result.vcomp]
    errors = result.bse_re if re_errors == "statsmodels" else result.bse_re_natural
    table = np.full((len(names), 6), np.nan)
    table[:, 0] = [*result.fe_params, *variances]
    table[:, 1] = [*result.bse_fe, *errors]
    with np.errstate(invalid="ignore", divide="ignore"):
        table[:p, 2] = table[:p, 0] / table[:p, 1]
    table[:p, 3] = 2.0 * ndtr(-np.abs(table[:p, 2]))
    half = -ndtri(0.5 * alpha) * table[:p, 1]
    table[:p, 4], table[:p, 5] = table[:p, 0] - half, table[:p, 0] + half
    columns = ["Coef.", "Std.Err.", "z", "P>|z|", f"[{alpha / 2}", f"{1 - alpha / 2}]"]
    texts = [[f"{x:.3f}" if np.isfinite(x) else "" for x in row] for row in table]
    found.add_df(pd.DataFrame(texts, index=names, columns=columns), align="r")
    for number, text in enumerate(_notes(result, names[p:], re_errors), start=1):
        found.add_text(f"[{number}] {text}")
    return found


def _notes(result: MixedLMResults, names: Sequence[str], re_errors: str) -> list[str]:
    notes = []
    if re_errors == "statsmodels" and names:
        natural = ", ".join(
            f"{name} {error:.3f}" if np.isfinite(error) else f"{name} none"
            for name, error in zip(names, result.bse_re_natural, strict=True)
        )
        notes.append(
            "Std.Err. of variances is, as statsmodels prints it, sqrt(Scale) times the standard "
            "error of their ratio to Scale, which is not in the units of Coef. In these units the "
            f"standard errors are: {natural} (summary(re_errors='natural'))."
        )
    elif names:
        notes.append("Std.Err. of variances is in the units of Coef.")
    if result._details.singular:
        notes.append(
            "The covariance of the random effects is singular: the maximum lies on the boundary."
        )
    if not result.converged:
        notes.append(f"Not converged: {result._details.message or 'not fitted'}.")
    native = result._details.native
    if native is not None and native.unidentified is not None:
        text = str(native.unidentified)
        notes.append(f"{text[:1].upper()}{text[1:]}.")
    return notes
