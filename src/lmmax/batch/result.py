"""What `fit_many` returns: estimates, tests and certificates of many fits."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from html import escape
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd

from ..characters import Visible
from ..constraints import Settings
from ..design import DataError
from ..fit import fit_prepared, prepare
from ..frames import check_finite, plural
from ..inference.denominator import f_pvalues, t_pvalues, t_quantiles
from ..inference.wald import linear_hypotheses
from ..matrices import Design
from ..options import alpha_of
from ..rendering import Frame, folded, page
from ..results import Fit
from ..solve import Status, is_optimal
from .engines import Hypothesis, Record
from .multiple import qvalues
from .sources import Columns
from .store import StoredRecord
from .varied import Varied

CHANGED = (1e-3, 1e-6)
"""Difference of log-likelihoods, absolute and relative, that rounding does not make."""


class ChangedWarning(Visible, UserWarning):
    """A response that was fitted again gives another fit than the one in the batch."""


class Source(Protocol):
    """Where a response is read again, for a fit of its own."""

    def column(self, number: int) -> np.ndarray:
        """Return one response on the rows of the design, NaN where it is missing, (n,)."""


@dataclass(frozen=True, eq=False)
class BatchFit:
    """Fits of one model to many responses; made by :func:`lmmax.fit_many`.

    ``batch[i]``, or ``batch[name]``, is the ordinary :class:`lmmax.Fit` of a response, fitted
    again, with a :class:`ChangedWarning` if it is another one; iteration goes over all of them in
    turn.

    Attributes:
        names: names of the responses.
        record: the arrays behind everything, an entry for each response; of results in a directory
            each is read when it is asked for.
        design: the design, with no response of its own.
        settings: how the models were fitted.
        hypotheses: what was tested besides the coefficients.
        n_obs: number of rows of each response that were not missing, (n,).
        engine: how the responses were fitted.
        notes: what a reader should know.
    """

    names: pd.Index
    record: Record | StoredRecord
    design: Design
    settings: Settings
    hypotheses: tuple[Hypothesis, ...]
    n_obs: np.ndarray
    engine: str
    notes: tuple[str, ...]
    source: Source

    def __len__(self) -> int:
        return len(self.names)

    # --- estimates --------------------------------------------------------------------------

    def _frame(self, values: np.ndarray) -> pd.DataFrame:
        return pd.DataFrame(values, index=self.names, columns=list(self.design.x_names))

    @property
    def params(self) -> pd.DataFrame:
        """Coefficients, a row per response; NaN where there is no fit."""
        return self._frame(self.record.params)

    @property
    def bse(self) -> pd.DataFrame:
        """Their standard errors."""
        return self._frame(self.record.bse)

    @property
    def df(self) -> pd.DataFrame:
        """Their degrees of freedom, by Satterthwaite's method."""
        return self._frame(self.record.df)

    @property
    def tvalues(self) -> pd.DataFrame:
        """Coefficients over their standard errors."""
        return self._frame(self.record.params / self.record.bse)

    @cached_property
    def pvalues(self) -> pd.DataFrame:
        """Two-sided p-values of the coefficients."""
        return self._frame(t_pvalues(self.record.params / self.record.bse, self.record.df))

    def qvalues(self, method: str = "bh") -> pd.DataFrame:
        """Return false discovery rates over the responses, for each coefficient.

        Args:
            method: "bh", "by" or "storey"; see :func:`lmmax.batch.multiple.qvalues`.
        """
        p = self.pvalues
        return p.apply(lambda column: qvalues(column.to_numpy(), method))

    def conf_int(
        self, coefficient: str, level: float | None = None, *, alpha: float | None = None
    ) -> pd.DataFrame:
        """Return confidence limits of one coefficient, a row per response.

        Args:
            coefficient: its name.
            level: the level, 0.95 if None; a number below one half is taken as ``alpha``.
            alpha: one minus the level, instead of it.
        """
        j = self._column(coefficient)
        half = t_quantiles(alpha_of(level, alpha), self.record.df[:, j]) * self.record.bse[:, j]
        centre = self.record.params[:, j]
        return pd.DataFrame({"lower": centre - half, "upper": centre + half}, index=self.names)

    def _column(self, coefficient: str) -> int:
        if coefficient not in self.design.x_names:
            raise KeyError(
                f"{coefficient!r} is no coefficient; use one of {', '.join(self.design.x_names)}"
            )
        return self.design.x_names.index(coefficient)

    @property
    def llf(self) -> pd.Series:
        """Log-likelihoods, restricted under REML."""
        return pd.Series(self.record.llf, index=self.names, name="llf")

    @property
    def scale(self) -> pd.Series:
        """Residual variances."""
        return pd.Series(self.record.scale, index=self.names, name="scale")

    @property
    def cov_re(self) -> np.ndarray:
        """Covariances of the random effects, natural units, (n, q, q)."""
        return self.record.cov_re

    @cached_property
    def variances(self) -> pd.DataFrame:
        """Variances and covariances of the random effects, and the residual variance."""
        at, columns, cov_re = 0, {}, self.record.cov_re
        order = sorted(range(len(self.design.blocks)), key=self._position)
        for number in order:
            block = self.design.blocks[number]
            group = self.design.groupings[block.grouping].name
            for i, effect in enumerate(block.names):
                for j in range(i + 1):
                    label = effect if i == j else f"{block.names[j]}, {effect}"
                    columns[f"{group}: {label}"] = cov_re[:, at + i, at + j]
            at += len(block.names)
        return pd.DataFrame({**columns, "residual": self.record.scale}, index=self.names)

    def _position(self, number: int) -> tuple[int, int]:
        return self.design.blocks[number].grouping, number

    @property
    def icc(self) -> pd.Series:
        """Share of the random effects' variances in the total, where all are intercepts.

        Raises:
            ValueError: for a model with random slopes, where the share depends on the row.
        """
        if any(block.names != ("Intercept",) for block in self.design.blocks):
            raise ValueError("the model has random slopes: the share depends on the covariates")
        parts = np.einsum("nqq->n", self.record.cov_re)
        return pd.Series(parts / (parts + self.record.scale), index=self.names, name="icc")

    # --- tests ------------------------------------------------------------------------------

    def test(self, name: str) -> pd.DataFrame:
        """Return the test of a hypothesis that `fit_many` was asked for.

        Returns:
            A row per response: ``estimate``, ``std err``, ``df``, ``t`` and ``p`` for a single
            combination; ``F``, ``df_num``, ``df_den`` and ``p`` for several.
        """
        known = [hypothesis.name for hypothesis in self.hypotheses]
        if name not in known:
            raise KeyError(f"{name!r} was not tested; there are {', '.join(known) or 'no tests'}")
        h = known.index(name)
        r, record = len(self.hypotheses[h].L), self.record
        statistic, df = record.statistic[:, h], record.df_den[:, h]
        if r == 1:
            columns = {
                "estimate": record.estimate[:, h],
                "std err": record.error[:, h],
                "df": df,
                "t": statistic,
                "p": t_pvalues(statistic, df),
            }
        else:
            p = f_pvalues(statistic, r, df)
            columns = {"F": statistic, "df_num": np.full(len(self), r), "df_den": df, "p": p}
        return Frame(columns, index=self.names)

    def frame(self, q: str = "bh") -> pd.DataFrame:
        """Return all coefficients as one tidy data frame, a row per response and coefficient.

        Args:
            q: how false discovery rates are controlled, over the responses.
        """
        params, bse = self.record.params, self.record.bse
        n, p = params.shape
        rates = self.qvalues(q).to_numpy()
        return Frame(
            {
                "response": np.repeat(self.names.to_numpy(), p),
                "coefficient": np.tile(np.array(self.design.x_names, dtype=object), n),
                "coef": params.ravel(),
                "std err": bse.ravel(),
                "df": self.record.df.ravel(),
                "t": (params / bse).ravel(),
                "p": self.pvalues.to_numpy().ravel(),
                "q": rates.ravel(),
            }
        )

    # --- certificates -----------------------------------------------------------------------

    @property
    def converged(self) -> np.ndarray:
        """Whether each optimum was reached, (n,)."""
        return np.asarray(is_optimal(self.record.status))

    @property
    def certificate(self) -> pd.DataFrame:
        """How each fit ended: status, whether it is singular, steps, gradient, rows used.

        The status is ``converged``; ``zero_scale``, if the optimum has a residual variance of
        zero; ``max_steps``, ``stalled``, ``unbounded`` or ``not_finite``,
        as for a single fit, if the search ended elsewhere; or, for a response that no search was
        begun for, ``infinite`` (it has infinite values), ``constant`` (it does not vary),
        ``explained`` (it is an exact linear combination of the fixed effects) or ``too_few`` (rows
        or groups).
        """
        words = np.array([Status(k).name.lower() for k in range(len(Status))], dtype=object)
        return Frame(
            {
                "status": words[self.record.status],
                "singular": self.record.singular,
                "steps": self.record.steps,
                "gradient": self.record.gradient,
                "nobs": self.n_obs,
            },
            index=self.names,
        )

    @property
    def status(self) -> dict[str, int]:
        """How many fits ended in each way, and how many are singular."""
        codes, counts = np.unique(self.record.status, return_counts=True)
        found = {
            Status(int(code)).name.lower(): int(count)
            for code, count in zip(codes, counts, strict=True)
        }
        return {**found, "singular": int(np.sum(self.record.singular & self.converged))}

    # --- single fits ------------------------------------------------------------------------

    def __getitem__(self, which: Any) -> Fit:
        return self._fit(self._number(which))

    def __iter__(self) -> Iterator[Fit]:
        return map(self._fit, range(len(self)))

    def __contains__(self, name: Any) -> bool:
        return name in self.names

    def _fit(self, number: int) -> Fit:
        """Fit one response, again."""
        y = self.source.column(number)
        from .rows import subset

        if np.isnan(y).all():
            raise DataError(f"the response {self.names[number]!r} has missing values only")
        design = self.design
        if isinstance(self.source, Varied):
            design = self.source.design_of(design, number)
        design = subset(design, np.flatnonzero(~np.isnan(y)), y[~np.isnan(y)])
        if isinstance(self.source, Columns) and not isinstance(self.names, pd.RangeIndex):
            design = replace(design, response_name=str(self.names[number]))
        check_finite(str(self.names[number]), design.y, design.index)
        found = fit_prepared(prepare(design, self.settings.engine), self.settings)
        self._compare(number, found)
        return found

    def _compare(self, number: int, found: Fit) -> None:
        """Warn if a fit is not the one that the batch has: the responses may be others by now."""
        here, at = self.record, number
        if isinstance(here, StoredRecord):
            at = number % here.size
            here = here.around(number)
        before, now = float(here.llf[at]), found.llf
        comparable = here.status[at] == Status.CONVERGED and found.converged
        if comparable and not abs(now - before) <= CHANGED[0] + CHANGED[1] * abs(before):
            warnings.warn(
                f"the fit of response {self.names[number]!r} is not the one in the batch: its "
                f"log-likelihood is {now:.6g}, and was {before:.6g}. The responses, or the file "
                "that they are in, have changed since; or its likelihood has several maxima",
                ChangedWarning,
                stacklevel=4,
            )

    def _number(self, which: Any) -> int:
        if not isinstance(which, Hashable) or isinstance(which, slice):
            raise TypeError(
                "a batch is indexed by the name or the number of one response, not by "
                f"{type(which).__name__}: for the estimates of several use params.loc, "
                "variances.loc, ..."
            )
        # Whole numbers are positions, but where the names are whole numbers of their own.
        by_position = isinstance(self.names, pd.RangeIndex) or self.names.dtype.kind not in "iu"
        if by_position and isinstance(which, int | np.integer) and not isinstance(which, bool):
            if not -len(self) <= which < len(self):
                raise IndexError(f"there are {len(self)} responses, not one number {which}")
            return int(which) % len(self)
        found = self.names.get_indexer(pd.Index([which]))[0]
        if found < 0:
            raise KeyError(f"{which!r} is no response")
        return int(found)

    # --- output -----------------------------------------------------------------------------

    def summary(self) -> pd.DataFrame:
        """Return the distribution of the estimates over the responses, a row per parameter."""
        every = pd.concat([self.params, self.variances], axis=1)[self.converged]
        table = every.quantile([0.0, 0.25, 0.5, 0.75, 1.0]).T
        table.columns = pd.Index(["min", "25%", "median", "75%", "max"])
        p = self.pvalues[self.converged]
        share = (p < 0.05).sum() / p.notna().sum()  # of the tests that there are
        table["share p < 0.05"] = share.reindex(table.index)
        return Frame(table)

    def _lines(self) -> list[str]:
        counts = ", ".join(f"{count} {name}" for name, count in self.status.items())
        head = f"{plural(len(self), 'fit')} of {self.design.spec.formula}"
        return [head, f"{counts}; {self.engine}", *self.notes]

    def __str__(self) -> str:
        table = self.summary().to_string(float_format="{:.4g}".format, na_rep="")
        lines = [folded(line) for line in self._lines()]
        return page(*lines[:2], "", table, *lines[2:])

    def __repr__(self) -> str:
        return f"<lmmax.BatchFit {self._lines()[0]!r}, {self.status}>"

    def _repr_html_(self) -> str:
        table = self.summary().to_html(float_format="{:.4g}".format, na_rep="")
        lines = [f"<p>{escape(line)}</p>" for line in self._lines()]
        return "\n".join([*lines[:2], table, *lines[2:]])

    def save(self, path: str | Path) -> None:
        """Write the batch to a file; :meth:`load` reads it back, with the same numbers.

        The file has arrays and text only, with a hash of all of it, and is complete or not there.
        Of responses in a file its name is kept, of an array that acts like a matrix nothing.

        Raises:
            ArchiveError: for what a file of data cannot hold.
        """
        from .saved import write

        write(path, self)

    @staticmethod
    def load(
        path: str | Path,
        *,
        responses: Any = None,
        objects: Mapping[str, Any] | None = None,
        allow_pickle: bool = False,
    ) -> BatchFit:
        """Read a batch written by `save`; nothing in the file is executed.

        Args:
            path: the file.
            responses: as in :meth:`open`.
            objects: by name, functions of `context=` and classes of covariance structures of your
                own, as in :func:`lmmax.load`.
            allow_pickle: read files of earlier versions, which are pickles: such a file can run
                anything, so open only those that you trust.

        Raises:
            ArchiveError: a ValueError, if the file does not hold a batch, is damaged, or needs
                `objects`.
        """
        from .saved import read, with_responses

        found = read(path, objects, allow_pickle)
        return found if responses is None else with_responses(found, responses)

    @staticmethod
    def open(
        path: str | Path,
        *,
        responses: Any = None,
        objects: Mapping[str, Any] | None = None,
        allow_pickle: bool = False,
    ) -> BatchFit:
        """Return the results that ``fit_many(..., out=path)`` wrote, without reading them yet.

        Nothing in the directory is executed.  The responses are not needed for the results; of
        those in a file, ``batch[i]`` reads one again.

        Args:
            path: the directory.
            responses: the responses, as `fit_many` had them, for ``batch[i]``; they are not kept
                with the results unless they are in a file.
            objects: by name, functions of `context=` and classes of covariance structures of your
                own, as in :func:`lmmax.load`.
            allow_pickle: read directories of earlier versions, which have a pickle: it can run
                anything, so open only those that you trust.

        Raises:
            StoreError: if it holds no results, or the work is not finished.
            DataError: if `responses` are not those of the results, by their number or names.

        Example:
            >>> import lmmax, numpy as np, tempfile
            >>> sleep = lmmax.datasets.load("sleepstudy")
            >>> y = sleep[["Reaction"]].to_numpy()
            >>> with tempfile.TemporaryDirectory() as here:
            ...     _ = lmmax.fit_many("~ Days + (1 | Subject)", sleep, y, out=here + "/results")
            ...     batch = lmmax.BatchFit.open(here + "/results", responses=y)
            ...     batch.params.round(3), batch[0].converged
            (   Intercept    Days
            0    251.405  10.467, True)
        """
        from .saved import opened, with_responses

        found = opened(Path(path), objects, allow_pickle)
        return found if responses is None else with_responses(found, responses)


@dataclass(frozen=True, eq=False)
class NotKept:
    """Responses that are not there any more.

    Attributes:
        rows: rows of the design in the data that there were, if they are known.
        n_data: number of rows of these data, likewise.
        why: what the matter was with their file.
    """

    rows: np.ndarray | None = None
    n_data: int | None = None
    why: str = ""

    def column(self, number: int) -> np.ndarray:
        """See `Source`.

        Raises:
            DataError: always.
        """
        if self.why:
            raise DataError(
                f"the file of the responses cannot be read again ({self.why}): put it back, or "
                "pass BatchFit.open(path, responses=...)"
            )
        raise DataError(
            "the responses were not kept with the results: pass them, BatchFit.open(path, "
            "responses=...), or fit this one with lmmax.fit; those in a .npy or .parquet file are "
            "read again"
        )


def hypotheses(asked: Any, names: Sequence[str]) -> tuple[Hypothesis, ...]:
    """Read the `tests` argument of `fit_many`.

    Args:
        asked: None, or a mapping of names to what ``Fit.t_test`` takes.
        names: names of the coefficients.
    """
    if not isinstance(asked, Mapping | None):
        raise TypeError(
            f"tests={asked!r} must be a mapping from names to hypotheses, such as "
            "tests={'slope': 'x = 0'}"
        )
    found = []
    zero = pd.Series(0.0, index=list(names))
    for name, hypothesis in (asked or {}).items():
        L, values, _ = linear_hypotheses(zero, hypothesis)
        found.append(Hypothesis(str(name), L, values))
    return tuple(found)
