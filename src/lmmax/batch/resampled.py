"""The results of resampling: p-values of each response, and over all of them."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape

import numpy as np
import pandas as pd

from ..frames import plural
from ..rendering import page
from .engines import Hypothesis

TIES = 1e-6
"""A replicate this much below the observed statistic, relative to that, counts as equal."""


def score(statistics: np.ndarray, alternative: str) -> np.ndarray:
    """Return what is large if it speaks against the hypothesis."""
    if alternative == "two-sided":
        return np.abs(statistics)
    return statistics if alternative == "greater" else -statistics


@dataclass(frozen=True, eq=False)
class Resampled:
    """p-values by resampling; made by :func:`lmmax.resample`.

    Attributes:
        names: names of the responses.
        hypotheses: what was tested.
        statistic: observed statistics, t for single combinations and F for several, (k, h).
        exceeded: number of replicates that were at least that, in the direction of the
            alternative, (k, h).
        failed: number of replicates whose fit did not converge, (k, h).
        maxima: per hypothesis the largest statistic over the responses in each replicate, (n,):
            |t| if two-sided, -t if the alternative is "less".
        method: "permutation", "wild" or "parametric".
        alternative: "two-sided", "greater" or "less".
        notes: what was done.
    """

    names: pd.Index
    hypotheses: tuple[Hypothesis, ...]
    statistic: np.ndarray
    exceeded: np.ndarray
    failed: np.ndarray
    maxima: tuple[np.ndarray, ...]
    method: str
    alternative: str
    notes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.names)

    def _number(self, name: str | None) -> int:
        known = [test.name for test in self.hypotheses]
        if name is None and len(known) == 1:
            return 0
        if name not in known:
            what = "several hypotheses were tested" if name is None else f"{name!r} was not tested"
            raise KeyError(f"{what}; name one of {', '.join(known)}")
        return known.index(name)

    def _scores(self, h: int) -> np.ndarray:
        joint = len(self.hypotheses[h].L) > 1
        return score(self.statistic[:, h], "greater" if joint else self.alternative)

    def _over_all(self, h: int) -> np.ndarray:
        """Return p-values over all responses, (k,)."""
        scores, maxima = self._scores(h), np.sort(self.maxima[h])
        least = scores - TIES * np.abs(scores)
        count = len(maxima) - np.searchsorted(maxima, least, side="left")
        found = (1.0 + np.minimum(count + self.failed[:, h], len(maxima))) / (1.0 + len(maxima))
        return np.where(np.isnan(scores), np.nan, found)

    def test(self, name: str | None = None) -> pd.DataFrame:
        """Return the test of a hypothesis, which need not be named if it is the only one.

        Returns:
            A row per response: ``t`` or ``F``, ``p``, ``p_fwe`` (over all responses), and
            ``failed``, the number of replicates that did not converge.
        """
        h = self._number(name)
        n = len(self.maxima[h])
        p = (1.0 + self.exceeded[:, h] + self.failed[:, h]) / (1.0 + n)
        return pd.DataFrame(
            {
                "t" if len(self.hypotheses[h].L) == 1 else "F": self.statistic[:, h],
                "p": np.where(np.isnan(self.statistic[:, h]), np.nan, p),
                "p_fwe": self._over_all(h),
                "failed": self.failed[:, h],
            },
            index=self.names,
        )

    def critical(self, name: str | None = None, alpha: float = 0.05) -> float:
        """Return the value above which a statistic is significant over all responses.

        Args:
            name: the hypothesis.
            alpha: family-wise error rate.

        Returns:
            The critical value of |t|, of t (of -t for the alternative "less"), or of F.
        """
        if not 0.0 < alpha < 1.0:
            raise ValueError(f"alpha={alpha!r} must lie between 0 and 1")
        h = self._number(name)
        scores = self._scores(h)
        if np.isnan(scores).all():
            return np.nan
        every = np.sort(np.append(self.maxima[h], np.nanmax(scores)))[::-1]
        return float(every[int(alpha * len(every) + 1e-9)])

    def frame(self) -> pd.DataFrame:
        """Return all tests as one tidy data frame, a row per response and hypothesis."""
        parts = []
        for test in self.hypotheses:
            part = self.test(test.name).rename(columns={"t": "statistic", "F": "statistic"})
            part.insert(0, "test", test.name)
            part.insert(0, "response", self.names.to_numpy())
            parts.append(part)
        return pd.concat(parts, ignore_index=True)

    def summary(self, alpha: float = 0.05) -> pd.DataFrame:
        """Return, a row per hypothesis, what was found.

        Args:
            alpha: level of the tests.

        Returns:
            Number of replicates, critical value over all responses, smallest p-values, and how many
            responses are significant alone and over all.
        """
        rows = {}
        for test in self.hypotheses:
            table = self.test(test.name)
            rows[test.name] = {
                "replicates": len(self.maxima[self._number(test.name)]),
                "critical": self.critical(test.name, alpha),
                "min p": table["p"].min(),
                "min p_fwe": table["p_fwe"].min(),
                f"p <= {alpha:g}": int((table["p"] <= alpha).sum()),
                f"p_fwe <= {alpha:g}": int((table["p_fwe"] <= alpha).sum()),
            }
        return pd.DataFrame.from_dict(rows, orient="index")

    def _head(self) -> str:
        return f"{self.method} tests of {plural(len(self), 'response')}, {self.alternative}"

    def __str__(self) -> str:
        table = self.summary().to_string(float_format="{:.4g}".format)
        return page(self._head(), "", table, "", *self.notes)

    def __repr__(self) -> str:
        return f"<lmmax.Resampled {self._head()!r}>"

    def _repr_html_(self) -> str:
        table = self.summary().to_html(float_format="{:.4g}".format)
        notes = [f"<p>{escape(note)}</p>" for note in self.notes]
        return "\n".join([f"<p>{escape(self._head())}</p>", table, *notes])
