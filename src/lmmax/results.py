"""The fitted model: estimates by name, conditional effects, tests, tables."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .archive import NoArchiveError, is_archive, pickled, read, refuse_pickle, write
from .compress import Compression, Engine, EngineError, Layout
from .constraints import Settings, TermColumns
from .design import Design
from .estimation import Estimates
from .identifiability import Unidentified
from .inference import variance, wald
from .inference.denominator import Denominator, method_name
from .inference.denominator import denominator as method_of
from .inference.parameters import VarianceParameters, natural_parameters, theta_parameters
from .inference.sensitivity import (
    CovarianceSlopes,
    Sensitivity,
    covariance_slopes,
    sensitivity,
)
from .modes import Effects, conditional_effects
from .optima import distinct
from .options import Ddf, alpha_of
from .parameters import pack_triangle
from .predict import NewLevels, predict
from .rendering import ByFactor, Frame, folded, paragraphs
from .safe import Evaluate, check_evaluate
from .solve import Status, is_optimal

if TYPE_CHECKING:
    from .summary import Summary

FORMAT, VERSION, WHAT = "lmmax fit", 1, "saved lmmax fit"
"""Of the files that fits are saved to."""

MESSAGES = {
    Status.CONVERGED: "converged",
    Status.MAX_STEPS: "stopped at the limit of steps before converging; raise max_steps",
    Status.STALLED: "no step lowers the criterion further, yet its gradient is not zero",
    Status.NOT_FINITE: "the criterion is not finite at the starting values",
    Status.UNBOUNDED: (
        "the likelihood has no maximum: random effects and coefficients together describe the data "
        "without a residual, and it rises without end as the residual variance goes to zero; use "
        "fewer random effects, or fix={'scale': ...}"
    ),
    Status.ZERO_SCALE: (
        "converged with a residual variance of zero: the likelihood is largest at this boundary, "
        "where the random effects alone describe the data; standard errors take it as given"
    ),
    # Of many responses; for a single one these are errors.
    Status.INFINITE: "the response has infinite values",
    Status.CONSTANT: "the response does not vary",
    Status.EXPLAINED: "the response is an exact linear combination of the fixed effects",
    Status.TOO_FEW: "there are too few rows or groups to tell the parameters apart",
}


@dataclass(frozen=True, repr=False)
class Convergence:
    """How the solve ended, for whoever wants to check.

    Attributes:
        status: name of the status.
        message: the same in words.
        steps: evaluations of the criterion (EM, then Newton or L-BFGS).
        decrement: Newton decrement ``g' H^-1 g``, the distance to the optimum in -2 logL.
        gradient: gradient of the criterion in the free working parameters (log scale first).
        gradient_norm: its Euclidean norm.
        hessian_eigenvalues: of the Hessian in the same parameters, ascending.
        boundary: terms whose covariance is singular.
        history: per evaluation, criterion, decrement, damping, whether it was accepted, and the
            kind of step that followed (the first 64 evaluations).
        optima: the criterion at the distinct optima that searches ended at, ascending: the first
            is that of the fit.  More than one where the likelihood has several maxima.
        searches: how many searches converged, from one start or several far apart.
        unidentified: groups of variance parameters that the data do not tell apart.
    """

    status: str
    message: str
    steps: int
    decrement: float
    gradient: np.ndarray
    gradient_norm: float
    hessian_eigenvalues: np.ndarray
    boundary: tuple[str, ...]
    history: pd.DataFrame
    optima: np.ndarray
    searches: int
    unidentified: tuple[tuple[str, ...], ...] = ()

    def __str__(self) -> str:
        if not len(self.hessian_eigenvalues):
            return f"{self.message}: nothing was free"
        text = (
            f"{self.message} after {self.steps} evaluations; Newton decrement "
            f"{self.decrement:.1e}, gradient norm {self.gradient_norm:.1e}, smallest eigenvalue of "
            f"the Hessian {self.hessian_eigenvalues[0]:.3g}"
        )
        if len(self.optima) > 1:
            text += (
                f"; {self.searches} searches from starts far apart ended at {len(self.optima)} "
                f"optima, the next one {self.optima[1] - self.optima[0]:.3g} higher"
            )
        return folded(text)

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return paragraphs(str(self))


@dataclass(frozen=True, eq=False)
class Fit:
    """A fitted linear mixed model; immutable, everything derived is computed when first asked for.

    Made by :func:`lmmax.fit` and :func:`lmmax.fit_arrays`.

    Attributes:
        design: matrices, names and groups of the data that were used.
        settings: the options of the fit.
        estimates: the solved model in plain arrays.
        unidentified: what the data do not tell apart, None if that is nothing: variance parameters
            that other values fit as well, and the coefficients whose errors depend on them.

    Example:
        >>> import lmmax
        >>> data = lmmax.datasets.load("dietox")
        >>> result = lmmax.fit("Weight ~ Time + (1 | Pig)", data)
        >>> round(result.scale, 4), round(result.llf, 4)
        (11.3669, -2404.7753)
    """

    design: Design
    settings: Settings
    estimates: Estimates
    layout: Layout
    compression: Compression
    terms: tuple[TermColumns, ...]
    notes: tuple[str, ...] = ()
    unidentified: Unidentified | None = None

    # --- model ------------------------------------------------------------------------------

    @property
    def formula(self) -> str:
        """The model as a formula."""
        return self.design.spec.formula

    @property
    def reml(self) -> bool:
        """Whether the fit is by restricted maximum likelihood."""
        return self.settings.reml

    @property
    def nobs(self) -> int:
        """Number of observations used."""
        return len(self.design.y)

    @property
    def engine(self) -> Engine:
        """The form of the likelihood that served this model, and why."""
        return self.layout.engine

    @property
    def n_groups(self) -> int | dict[str, int]:
        """Number of levels of the grouping factor; by name if there are several."""
        return self._by_factor([len(grouping.levels) for grouping in self.design.groupings])

    @property
    def group_names(self) -> tuple[str, ...]:
        """Names of the grouping factors, in the order in which the formula names them."""
        return tuple(grouping.name for grouping in self.design.groupings)

    @cached_property
    def effect_names(self) -> tuple[str, ...]:
        """Names of the random effects, factor by factor, (q,)."""
        names = [""] * len(self.estimates.root)
        for term, block in zip(self.terms, self.design.blocks, strict=True):
            names[term.columns] = block.names
        return tuple(names)

    def _by_factor(self, values: Sequence[Any]) -> Any:
        """Return the only value, or a dict by the name of the factor if there are several."""
        if len(self.group_names) == 1:
            return values[0]
        return ByFactor(zip(self.group_names, values, strict=True))

    # --- fixed effects ----------------------------------------------------------------------

    @cached_property
    def params(self) -> pd.Series:
        """Fixed-effects coefficients; NaN for aliased columns."""
        values = np.full(len(self.design.x_names), np.nan)
        values[self.layout.fixed.kept] = self.estimates.beta
        return pd.Series(values, index=list(self.design.x_names), name="coef")

    def cov_params(self) -> pd.DataFrame:
        """Covariance of the coefficients, ``scale (X' V^-1 X)^-1``.

        NaN for aliased columns, and for coefficients whose error depends on variances that the data
        do not tell apart.
        """
        names = list(self.design.x_names)
        values = np.full((len(names), len(names)), np.nan)
        kept = self.layout.fixed.kept
        if self.unidentified is None:
            values[np.ix_(kept, kept)] = self.estimates.scale * self.estimates.beta_unscaled
        else:
            sure = ~self.unidentified.concerns(np.eye(len(kept)))
            inside = self.estimates.scale * self.estimates.beta_unscaled[np.ix_(sure, sure)]
            values[np.ix_(kept[sure], kept[sure])] = inside
        return pd.DataFrame(values, index=names, columns=names)

    @cached_property
    def bse(self) -> pd.Series:
        """Standard errors of the coefficients."""
        values = np.sqrt(np.diag(self.cov_params().to_numpy()))
        return pd.Series(values, index=self.params.index, name="std err")

    @cached_property
    def tvalues(self) -> pd.Series:
        """Coefficients over their standard errors."""
        return (self.params / self.bse).rename("t")

    @property
    def df(self) -> pd.Series:
        """Satterthwaite's degrees of freedom of each coefficient; see :meth:`coefficients`."""
        return self.coefficients()["df"]

    @property
    def pvalues(self) -> pd.Series:
        """Two-sided p-values with Satterthwaite's degrees of freedom; see :meth:`coefficients`."""
        return self.coefficients()["p"]

    def coefficients(
        self, ddf: Ddf | None = None, level: float | None = None, *, alpha: float | None = None
    ) -> pd.DataFrame:
        """Return the tests of the single coefficients.

        Args:
            ddf: the degrees of freedom: "satterthwaite" (None), "kenward-roger" (REML; with the
                adjusted standard errors), "kenward-roger-linear" (without second derivatives of a
                covariance structure), "between-within" (nested factors, counted as in nlme),
                "residual" (n - p), or "normal".  Spelled in any way: "KR", "Kenward-Roger",
                "satt", ...
            level: the level of the confidence limits, 0.95 if None; a number below one half is
                taken as ``alpha``.
            alpha: one minus the level, instead of it.

        Returns:
            A row per coefficient: ``coef``, ``std err``, ``df``, ``t``, ``p`` and the limits
            ``lower`` and ``upper`` (``z`` and no ``df`` with "normal"); NaN for aliased columns,
            and, with a warning, where Kenward and Roger's second derivatives of a covariance
            structure leave no variance.

        Raises:
            ValueError: for an unknown method, one that the fit does not allow, or a level that
                does not lie between 0 and 1.
            TypeError: if both ``level`` and ``alpha`` are given.

        Example:
            >>> import lmmax
            >>> pastes = lmmax.datasets.load("pastes")
            >>> fit = lmmax.fit("strength ~ 1 + (1 | batch/cask)", pastes)
            >>> fit.coefficients(ddf="kenward-roger")[["coef", "std err", "df"]].round(3)
                         coef  std err   df
            Intercept  60.053    0.677  9.0
        """
        test = self.denominator(ddf)
        L = np.eye(len(self.estimates.beta))
        one_minus = alpha_of(level, alpha)
        table = wald.coefficient_table(test, L, self.estimates.beta, np.zeros(len(L)), one_minus)
        names = list(self.design.x_names)
        table.index = pd.Index([names[j] for j in self.layout.fixed.kept])
        wald.warn_of_missing(test, table.index, table["std err"])
        return table.reindex(names)

    def denominator(self, ddf: Ddf | None = None) -> Denominator:
        """Return a method for degrees of freedom, ready for any contrasts of the coefficients.

        For tests and confidence limits see :meth:`coefficients`, :meth:`t_test` and
        :meth:`f_test`; this is what they share, evaluated once for each method.
        """
        name = method_name(ddf)
        if name not in self._denominators:
            self._denominators[name] = method_of(self, name)
        return self._denominators[name]

    @cached_property
    def _denominators(self) -> dict[str, Denominator]:
        return {}

    @cached_property
    def covariance_slopes(self) -> CovarianceSlopes:
        """How the coefficients' covariance moves with the variance parameters; for inference."""
        return covariance_slopes(self.compression, self.estimates)

    @cached_property
    def sensitivity(self) -> Sensitivity:
        """How the precision of the data moves with the variance parameters; for inference."""
        return sensitivity(self.compression, self.estimates)

    @cached_property
    def natural_parameters(self) -> VarianceParameters:
        """Variances, covariances and scale that were estimated, by name, with derivatives."""
        return natural_parameters(
            self.estimates, self.terms, self.effect_names, self.group_names, self.design.x_names
        )

    @cached_property
    def theta_parameters(self) -> VarianceParameters:
        """The same for theta and the scale."""
        return theta_parameters(
            self.estimates, self.terms, self.effect_names, self.group_names, self.design.x_names
        )

    def conf_int(
        self, level: float | None = None, ddf: Ddf | None = None, *, alpha: float | None = None
    ) -> pd.DataFrame:
        """Wald confidence limits of the coefficients, ``lower`` and ``upper``.

        Args:
            level: the level, 0.95 if None; a number below one half is taken as ``alpha``.
            ddf: the degrees of freedom, as in :meth:`coefficients`.
            alpha: one minus the level, instead of it.

        For profile and bootstrap limits, of variance parameters too, see :func:`lmmax.confint`.
        """
        return self.coefficients(ddf, level, alpha=alpha)[["lower", "upper"]]

    @property
    def df_resid(self) -> int:
        """Observations minus estimated coefficients."""
        return self.nobs - len(self.estimates.beta)

    # --- variance parameters ----------------------------------------------------------------

    @property
    def scale(self) -> float:
        """Residual variance (of an observation with weight one).

        Exactly zero where the likelihood is largest there, which :attr:`status` tells.
        """
        return 0.0 if self.estimates.zero_scale else self.estimates.scale

    @cached_property
    def cov_re(self) -> pd.DataFrame:
        """Covariance of the random effects, natural units, (q, q).

        With several grouping factors it is block diagonal, and its labels are pairs of factor and
        effect.
        """
        labels = self._effect_labels
        values = self.estimates.scale * self.estimates.D
        return pd.DataFrame(values, index=labels, columns=labels)

    @property
    def _effect_labels(self) -> pd.Index:
        if len(self.group_names) == 1:
            return pd.Index(self.effect_names)
        groups = [
            name
            for name, here in zip(self.group_names, self.layout.slices, strict=True)
            for _ in range(here.stop - here.start)
        ]
        return pd.MultiIndex.from_arrays([groups, self.effect_names], names=["group", "effect"])

    @property
    def theta(self) -> np.ndarray:
        """Relative Cholesky factor, lower triangle row by row, term after term, (k,).

        lme4 lists the same numbers column by column.  A term with a covariance structure has the
        structure's own parameters instead (see :mod:`lmmax.covariances`).  All are NaN where the
        residual variance, which they are relative to, is zero.
        """
        parts = []
        own = {part.columns: part.parameters for part in self.estimates.constraints.structures}
        for term in self.terms:
            here = (term.columns.start, term.columns.stop)
            lower = self.estimates.lower[term.columns, term.columns]
            pattern = term.pattern
            if here in own:
                parts.append(self.estimates.structure_theta[slice(*own[here])])
            elif pattern is None:
                parts.append(term.covariance.theta_of(lower @ lower.T))
            else:
                parts.append(pack_triangle(lower)[pack_triangle(pattern) > 0.0])
        theta = np.concatenate(parts)
        return np.full_like(theta, np.nan) if self.estimates.zero_scale else theta

    def varcorr(self) -> pd.DataFrame:
        """Variances, covariances and the residual, a row each, in the way of lme4's ``VarCorr``.

        Returns:
            Columns ``group``, ``var1``, ``var2`` (None for a variance), ``vcov`` and its standard
            error ``vcov_se``, ``sdcor`` (standard deviation or correlation) and ``sdcor_se``.
            Standard errors come from the observed information of all covariances and the scale
            together, by the delta method.  A singular covariance has them given its rank; zero
            variances, perfect correlations and fixed parameters have none (NaN).
        """
        return variance.table(self.estimates, self.terms, self.effect_names, self.group_names)

    def structures(self) -> pd.DataFrame:
        """Parameters of the terms with a covariance structure, in natural units.

        Returns:
            A row per parameter: ``term``, ``parameter`` (a standard deviation, a correlation, a
            rate), ``estimate``, and its ``std err`` by the delta method.  A standard deviation of
            zero has no error, and a correlation between effects of variance zero no value: NaN.
            Empty without such terms.
        """
        return self._structures.copy()

    @cached_property
    def _structures(self) -> pd.DataFrame:
        return variance.structure_table(self.estimates, self.terms, self.effect_names)

    @cached_property
    def cov_re_se(self) -> pd.DataFrame:
        """Standard errors of the entries of :attr:`cov_re`; NaN where there is none."""
        values = variance.matrix_errors(self.estimates)
        return pd.DataFrame(values, index=self.cov_re.index, columns=self.cov_re.columns)

    @cached_property
    def scale_se(self) -> float:
        """Standard error of the residual variance."""
        return variance.scale_error(self.estimates)

    # --- likelihood -------------------------------------------------------------------------

    @property
    def llf(self) -> float:
        """Log-likelihood (restricted under REML), with all constants, as in lme4."""
        return -0.5 * self.estimates.criterion

    @property
    def deviance(self) -> float:
        """-2 log-likelihood; under REML the REML criterion."""
        return self.estimates.criterion

    @property
    def n_params(self) -> int:
        """Number of estimated parameters: coefficients, covariances, scale."""
        return len(self.estimates.beta) + self.estimates.n_free

    @property
    def criterion_error(self) -> float:
        """Monte Carlo standard error of :attr:`deviance`; zero but for the iterative engine.

        Includes how far from the optimum the search may have stopped.
        """
        return self.estimates.criterion_error

    @property
    def aic(self) -> float:
        """``deviance + 2 n_params`` (under REML comparable only between equal fixed effects)."""
        return self.deviance + 2 * self.n_params

    @property
    def bic(self) -> float:
        """``deviance + n_params log(nobs)``."""
        return self.deviance + self.n_params * float(np.log(self.nobs))

    # --- random effects ---------------------------------------------------------------------

    @cached_property
    def _effects(self) -> tuple[Effects, ...]:
        return conditional_effects(self.compression, self.layout, self.estimates)

    @cached_property
    def random_effects(self) -> pd.DataFrame | dict[str, pd.DataFrame]:
        """Conditional modes (BLUPs): a row per level, a column per effect.

        With several grouping factors a dict of such data frames, by the name of the factor.
        """
        frames = [
            Frame(
                effects.modes,
                index=pd.Index(grouping.levels, name=grouping.name),
                columns=list(self.effect_names[here]),
            )
            for effects, grouping, here in zip(
                self._effects, self.design.groupings, self.layout.slices, strict=True
            )
        ]
        return self._by_factor(frames)

    @cached_property
    def random_effects_cov(self) -> np.ndarray | dict[str, np.ndarray]:
        """Conditional covariance of each level's effects given the data, (m, q, q).

        The coefficients count as known (lme4's ``condVar``).  Levels in the order of
        :attr:`random_effects`; likewise a dict with several grouping factors.

        Raises:
            EngineError: if the fit is by the iterative engine.
        """
        if any(effects.covariance is None for effects in self._effects):
            raise EngineError(
                "the iterative engine finds no conditional covariances, which take a solve for "
                "each level; engine='crossed' finds them where its dense factor fits into memory"
            )
        return self._by_factor([effects.covariance for effects in self._effects])

    def contributions(
        self,
        Z: Sequence[np.ndarray | None],
        codes: Sequence[np.ndarray | None],
        terms: Sequence[int],
    ) -> np.ndarray:
        """Sum the random terms' parts of the linear predictor over rows, (n,).

        Args:
            Z: per term, in the order of the formula, its columns (n, q_t).
            codes: per grouping factor the level of each row, (n,); -1 for effects of zero.
            terms: positions of the terms to add.
        """
        total = 0.0
        for position in terms:
            term = self.terms[position]
            start = self.layout.slices[term.factor].start
            here = slice(term.columns.start - start, term.columns.stop - start)
            modes = self._effects[term.factor].modes[:, here]
            modes = np.vstack([modes, np.zeros(term.width)])
            columns, code = Z[position], codes[term.factor]
            assert columns is not None and code is not None
            total = total + np.einsum("ij,ij->i", columns, modes[code])
        return np.asarray(total)

    # --- fitted values ----------------------------------------------------------------------

    @cached_property
    def fittedvalues_marginal(self) -> pd.Series:
        """``X beta`` plus offset, for the rows used."""
        values = self.design.X[:, self.layout.fixed.kept] @ self.estimates.beta
        if self.design.offset is not None:
            values = values + self.design.offset
        return pd.Series(values, index=self.design.index, name="fitted")

    @cached_property
    def fittedvalues(self) -> pd.Series:
        """``X beta + Z b`` plus offset, with the conditional modes, for the rows used."""
        design = self.design
        values = self.fittedvalues_marginal + self.contributions(
            [block.Z for block in design.blocks],
            [grouping.codes for grouping in design.groupings],
            range(len(self.terms)),
        )
        return values.rename("fitted")

    @property
    def resid(self) -> pd.Series:
        """Response minus :attr:`fittedvalues`."""
        return (self.design.y - self.fittedvalues).rename("resid")

    @property
    def resid_marginal(self) -> pd.Series:
        """Response minus :attr:`fittedvalues_marginal`."""
        return (self.design.y - self.fittedvalues_marginal).rename("resid")

    def predict(
        self,
        newdata: Any = None,
        *,
        random_effects: bool | str | Collection[str] = True,
        new_levels: NewLevels = "error",
        offset: Any = None,
    ) -> pd.Series:
        """Predict the response for new rows, or for the rows of the fit.

        Args:
            newdata: data frame (or mapping) with the columns of the formula, without the response;
                for a fit to arrays a mapping ``{"X": ..., "groups": ..., "Z": ...}``.
            random_effects: add the conditional modes of the rows' groups; if False, the grouping
                columns may be absent.  Names of grouping factors, or terms as in the formula, add
                those only: ``["a"]``, ``["(0 + x | a)"]``.
            new_levels: "error", or "population" to predict new groups with effects of zero.
            offset: array or column name, needed if the fit had one as an array.

        Returns:
            One prediction per row; NaN where a needed value is missing, and, with a
            :class:`lmmax.RankWarning`, where the fixed effects cannot be estimated: a row of the
            design that is no linear combination of those of the fit, such as an empty cell.

        Raises:
            DataError: for an absent column, an unseen level of a factor, or a new group under
                ``new_levels="error"``.
        """
        return predict(
            self, newdata, random_effects=random_effects, new_levels=new_levels, offset=offset
        )

    def predict_mean(
        self,
        newdata: Any = None,
        *,
        ddf: Ddf | None = None,
        level: float | None = None,
        alpha: float | None = None,
        offset: Any = None,
    ) -> pd.DataFrame:
        """Predict the population mean for new rows, with standard errors and confidence limits.

        The limits are for the mean ``x'beta`` of all groups, random effects left out: not for one
        group, and not for a new observation.

        Args:
            newdata: as in :meth:`predict`; the rows of the fit by default.
            ddf: the degrees of freedom, as in :meth:`coefficients`.
            level: the level of the limits, as there.
            alpha: one minus the level, instead of it.
            offset: as in :meth:`predict`.

        Returns:
            A row per row of newdata: ``predicted``, ``std err``, ``df``, ``lower`` and ``upper``;
            NaN where a needed value is missing or the mean cannot be estimated, as in
            :meth:`predict`.

        Example:
            >>> import lmmax
            >>> sleep = lmmax.datasets.load("sleepstudy")
            >>> fit = lmmax.fit("Reaction ~ Days + (1 + Days | Subject)", sleep)
            >>> fit.predict_mean({"Days": [0, 9]}).round(2)
               predicted  std err    df   lower   upper
            0     251.41     6.82  17.0  237.01  265.80
            1     345.61    14.63  17.0  314.75  376.47
        """
        return wald.mean_predictions(self, newdata, ddf, alpha_of(level, alpha), offset)

    # --- tests ------------------------------------------------------------------------------

    def t_test(
        self,
        hypothesis: Any,
        level: float | None = None,
        ddf: Ddf | None = None,
        *,
        alpha: float | None = None,
    ) -> wald.ContrastTable:
        """Test each linear hypothesis on the coefficients on its own.

        Args:
            hypothesis: ``"Time = 7"``, several joined by commas or in a list, or a matrix with a
                column per coefficient (tested against zero), or a tuple (matrix, values).
            level: the level of the confidence limits, as in :meth:`coefficients`.
            ddf: the degrees of freedom, as there.
            alpha: one minus the level, instead of it.

        Raises:
            wald.HypothesisError: if a name is not a coefficient, or the shape does not fit.
        """
        return wald.t_test(self, hypothesis, alpha_of(level, alpha), ddf)

    def f_test(self, hypothesis: Any, ddf: Ddf | None = None) -> wald.WaldTest:
        """Test linear hypotheses jointly by F.

        Args:
            hypothesis: as in :meth:`t_test`.
            ddf: the denominator degrees of freedom, as in :meth:`coefficients`.

        Raises:
            wald.HypothesisError: as in :meth:`t_test`, or if the hypotheses are dependent.
        """
        return wald.joint_test(self, hypothesis, ddf)

    def wald_test(self, hypothesis: Any) -> wald.WaldTest:
        """Test linear hypotheses jointly by the chi-squared Wald statistic (large-sample)."""
        return wald.joint_test(self, hypothesis, "normal")

    # --- convergence ------------------------------------------------------------------------

    @property
    def converged(self) -> bool:
        """Whether the optimum was reached, judged by the gradient."""
        return bool(is_optimal(self.estimates.status))

    @property
    def status(self) -> str:
        """Name of the solver's status: "converged", "zero_scale", "max_steps", "stalled", ...

        With "zero_scale" the fit has converged too, to a residual variance of zero.
        """
        return self.estimates.status.name.lower()

    @property
    def singular(self) -> bool:
        """Whether some variance is zero or some correlation one: a maximum on the boundary."""
        return bool(self.estimates.boundary) or self.estimates.zero_scale

    @property
    def message(self) -> str:
        """The status in words, which terms are singular, and what is not identified."""
        text = MESSAGES[self.estimates.status]
        if self.estimates.boundary:
            terms = ", ".join(self.estimates.boundary)
            text += f"; singular: the covariance of {terms} lies on the boundary"
        if self.unidentified is not None:
            text += f"; {self.unidentified}"
        return text

    @cached_property
    def convergence(self) -> Convergence:
        """The convergence record."""
        estimates, solution = self.estimates, self.estimates.solution
        point = solution.point
        gradient = np.asarray(point.gradient)[point.free > 0.0]
        history = pd.DataFrame(
            solution.trace[: int(solution.steps)],
            columns=["criterion", "decrement", "damping", "accepted", "next"],
        )
        history["criterion"] += estimates.criterion - float(point.at.value)
        history["accepted"] = history["accepted"] > 0.0
        history["next"] = np.where(history["next"] > 0.0, "EM", estimates.solver)
        history.loc[history.index[-1:], "next"] = ""
        return Convergence(
            status=self.status,
            message=self.message,
            steps=int(solution.steps),
            decrement=float(solution.decrement),
            gradient=gradient,
            gradient_norm=float(np.linalg.norm(gradient)),
            hessian_eigenvalues=estimates.hessian_eigenvalues,
            boundary=estimates.boundary,
            history=history,
            optima=distinct(estimates.ends),
            searches=len(estimates.ends),
            unidentified=() if self.unidentified is None else self.unidentified.names,
        )

    # --- fitting again ----------------------------------------------------------------------

    def refit(self, y: Any) -> Fit:
        """Fit the same model to another response of the rows used, shape (nobs,).

        The designs are not analysed again, so this costs little more than the solve.
        """
        from .fit import refit_response

        return refit_response(self, y)

    def refit_ml(self) -> Fit:
        """Fit the same model by maximum likelihood (itself, if it already is)."""
        from .fit import refit_settings

        return self if not self.reml else refit_settings(self, reml=False)

    # --- output -----------------------------------------------------------------------------

    def summary(
        self, level: float | None = None, ddf: Ddf | None = None, *, alpha: float | None = None
    ) -> Summary:
        """Return the printed summary: text by ``print``, HTML in a notebook.

        Args:
            level: the level of the confidence limits, as in :meth:`coefficients`.
            ddf: the degrees of freedom of the coefficients, as there.
            alpha: one minus the level, instead of it.
        """
        from .summary import summarize

        return summarize(self, alpha_of(level, alpha), ddf)

    def __str__(self) -> str:
        return str(self.summary())

    def __repr__(self) -> str:
        return (
            f"<lmmax.Fit {self.formula!r}, {'REML' if self.reml else 'ML'}, nobs={self.nobs}, "
            f"llf={self.llf:.4f}, {self.status}{', singular' if self.singular else ''}>"
        )

    def _repr_html_(self) -> str:
        return self.summary()._repr_html_()

    def save(self, path: str | Path) -> None:
        """Write the fit to a file; :func:`lmmax.load` reads it back, with the same numbers.

        The file has arrays and text only, with a hash of all of it.  It is complete or not there: a
        save that fails leaves an earlier file as it is.  Functions that were given in `context=`,
        and covariance structures of classes of your own, are kept by name, and handed to
        :func:`lmmax.load` again.

        Raises:
            ArchiveError: for what a file of data cannot hold.
        """
        from . import __version__
        from .saved import Writer, classes

        writer = Writer(classes())
        described = writer.describe(self, "the fit")
        about = {"format": FORMAT, "version": VERSION, "lmmax": __version__, "fit": described}
        write(path, {**about, "objects": sorted(writer.own)}, writer.arrays)


def load(
    path: str | Path,
    *,
    objects: Mapping[str, Any] | None = None,
    allow_pickle: bool = False,
    evaluate: Evaluate = "python",
) -> Fit:
    """Read a fit written by :meth:`Fit.save`; nothing in the file is executed.

    The formula of a fit is code once it is evaluated, which :meth:`Fit.predict` does with new data:
    use ``evaluate="safe"`` where the file is not of someone you trust.

    Args:
        path: the file.
        objects: by name, what is not data and therefore not in the file: functions that were given
            in `context=`, and your own classes of covariance structures.
        allow_pickle: read files of earlier versions of lmmax, which are pickles: such a file can
            run anything, so open only those that you trust.
        evaluate: "safe" for a formula that is read without running any code, as in
            :func:`lmmax.fit`, however the fit was made; "python" for the way it was made.

    Raises:
        ArchiveError: a ValueError, if the file does not hold a fit of this library, is damaged, or
            needs `objects`.
    """
    from .saved import Reader, classes

    check_evaluate(evaluate)
    if allow_pickle and not is_archive(path):
        return pickled(path, Fit)
    try:
        about, arrays = read(path, FORMAT, VERSION, WHAT)
    except NoArchiveError:
        refuse_pickle(path, WHAT, "lmmax.load")
        raise
    found = Reader(classes(), arrays, objects, repr(str(path))).read(about["fit"], Fit)
    return found if evaluate == "python" else replace(found, design=found.design.safely())
