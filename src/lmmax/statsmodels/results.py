"""`MixedLMResults`: estimates in the units and under the names of statsmodels."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
from statsmodels.base import model as base
from statsmodels.base import wrapper as wrap
from statsmodels.formula._manager import FormulaManager

from ..constraints import Settings
from ..fit import fit_prepared, prepare
from ..frames import real_numbers
from ..modes import joint_covariance
from ..parameters import factor, pack_triangle
from ..results import Fit
from .components import VCSpec
from .formulas import names
from .params import MixedLMParams
from .translation import Translation

if TYPE_CHECKING:
    from statsmodels.iolib.summary2 import Summary

    from .model import MixedLM


@dataclass(frozen=True, eq=False)
class Details:
    """What the results of a fit are made of.

    Attributes:
        native: the fit by lmmax; None for a penalised fit.
        translation: its design; None after `remove_data`.
        point: coefficients, and covariances relative to the scale.
        scale: residual variance.
        llf: log-likelihood, less penalties.
        converged: whether the optimum was reached.
        singular: whether the covariance lies on the boundary.
        message: how the solve ended, in words.
        free: the mask of the fit.
        fe_cov: which covariance the coefficients have.
    """

    native: Fit | None
    translation: Translation | None
    point: MixedLMParams
    scale: float
    llf: float
    converged: bool
    singular: bool
    message: str
    free: Any
    fe_cov: str


class MixedLMResults(base.LikelihoodModelResults, base.ResultMixin):
    """Results of a fit; attributes are those of statsmodels' `MixedLMResults`.

    Attributes:
        params: coefficients, triangle of `cov_re` and `vcomp`, the latter two relative to `scale`.
        fe_params: coefficients, (k_fe,).
        cov_re: covariance of the random effects, units of the data, (k_re, k_re).
        cov_re_unscaled: the same relative to `scale`.
        vcomp: variances of the components, units of the data, (k_vc,).
        scale: residual variance.
        params_object: the parameters as :class:`MixedLMParams`.
        converged: whether the optimum was reached.
        mle_retvals: how the solve went.
        native: the lmmax :class:`lmmax.Fit` with everything more.
    """

    model: MixedLM

    def __init__(
        self, model: MixedLM, params: Any, cov_params: Any, details: Details | None = None
    ) -> None:
        super().__init__(model, params, normalized_cov_params=cov_params)
        self.nobs = model.nobs
        self.df_resid = np.int64(self.nobs - len(model._kept))
        self.k_fe, self.k_re, self.k_re2, self.k_vc = (
            model.k_fe,
            model.k_re,
            model.k_re2,
            model.k_vc,
        )
        self.use_sqrt, self.reml, self.cov_pen = model.use_sqrt, model.reml, model.cov_pen
        self.method = "REML" if self.reml else "ML"
        self.hist: Any = None
        if details is None:
            point = MixedLMParams.from_packed(params, model.k_fe, model.k_re, False, True)
            scale = model.get_scale(point.fe_params, point.cov_re, point.vcomp)
            llf = model.loglike(point, profile_fe=False)
            details = Details(
                None, model._plain[0], point, scale, llf, False, False, "", None, "gls"
            )
        self._details = details
        self.params_object = details.point
        self.fe_params = details.point.fe_params
        self.cov_re_unscaled = details.point.cov_re
        self.scale = np.float64(details.scale)
        self.cov_re = details.scale * details.point.cov_re
        self.vcomp = details.scale * details.point.vcomp
        self.converged = details.converged
        self.freepat = details.free
        self._group_sizes = model.group_sizes

    def wrapped(self) -> MixedLMResultsWrapper:
        """Return the results with the names of the data around them."""
        return MixedLMResultsWrapper(self)

    # --- lmmax ------------------------------------------------------------------------------

    @property
    def native(self) -> Fit:
        """The fit as lmmax has it.

        Raises:
            AttributeError: for penalised fits, which lmmax itself does not have, and after
                `remove_data`.
        """
        if self._details.native is None:
            raise AttributeError(
                "no native fit: the estimates are penalised, or remove_data() took it away"
            )
        return self._native

    @cached_property
    def _native(self) -> Fit:
        assert self._details.native is not None
        return self.model._with_formula(self._details.native)

    @cached_property
    def mle_retvals(self) -> dict[str, Any]:
        """How the solve went; the keys that statsmodels' optimizers share, and the trace."""
        found: dict[str, Any] = {
            "fopt": -self._details.llf / self.nobs,
            "converged": self.converged,
            "warnflag": int(not self.converged),
            "message": self._details.message,
        }
        if self._details.native is not None:
            record = self._details.native.convergence
            found |= {
                "gopt": record.gradient,
                "iterations": record.steps,
                "fcalls": record.steps,
                "gcalls": record.steps,
                "history": record.history,
            }
        return found

    @cached_property
    def _conditional(self) -> Fit:
        """A fit with these conditional effects."""
        if self._details.native is not None:
            return self._details.native
        self._need_data()
        model, point = self.model, self._details.point
        translation = model._translate(None, np.nan_to_num(point.fe_params))
        root = [self.scale * point.cov_re] if self.k_re else []
        terms = prepare(translation.design)
        q = terms.terms[-1].columns.stop
        cov = np.zeros((q, q))
        for term, block in zip(terms.terms, [*root, *self.vcomp], strict=True):
            here = term.columns
            cov[here, here] = block * np.eye(term.width) if np.ndim(block) == 0 else block
        return fit_prepared(terms, Settings(reml=False, fix={"cov_re": cov, "scale": self.scale}))

    def _need_data(self) -> None:
        if self.model.endog is None:
            raise ValueError(
                "this needs the data, which remove_data() took away: ask for it before, or fit "
                "again"
            )

    # --- estimates --------------------------------------------------------------------------

    @property
    def llf(self) -> np.float64:
        """Log-likelihood, restricted under REML, less penalties."""
        return np.float64(self._details.llf)

    @property
    def bse_fe(self) -> np.ndarray:
        """Standard errors of the coefficients."""
        return self.bse[: self.k_fe]

    @property
    def bse_re(self) -> np.ndarray:
        """What statsmodels gives as standard errors of the variance parameters.

        The root of the scale times the standard error of their ratio to it: neither in the units
        of the parameters nor free of units.  See :attr:`bse_re_natural`.
        """
        return np.sqrt(self.scale) * self.bse[self.k_fe :]

    @cached_property
    def bse_re_natural(self) -> np.ndarray:
        """Standard errors of the entries of `cov_re` (triangle) and `vcomp`, in their units.

        From the joint information on covariances and scale; NaN for variances of zero, perfect
        correlations, what is held, and penalised fits.
        """
        size = self.k_re2 + self.k_vc
        fit = self._details.native
        if fit is None:
            return np.full(size, np.nan)
        errors, found = fit.cov_re_se.to_numpy(), []
        slices = [term.columns for term in fit.terms]
        if self.k_re:
            here = slices.pop(0)
            found = pack_triangle(errors[here, here]).tolist()
        return np.array([*found, *(errors[here.start, here.start] for here in slices)])

    @property
    def _n_params(self) -> int:
        if self.freepat is None:
            return len(self.params) + 1
        return int(np.sum(self.freepat.get_packed(use_sqrt=False, has_fe=True))) + 1

    @property
    def aic(self) -> float:
        """Akaike's criterion, counting the scale; NaN under REML."""
        return np.nan if self.reml else -2.0 * (self.llf - self._n_params)

    @property
    def bic(self) -> float:
        """Schwarz's criterion, counting the scale; NaN under REML."""
        return np.nan if self.reml else -2.0 * self.llf + np.log(self.nobs) * self._n_params

    @cached_property
    def hessv(self) -> np.ndarray:
        """Hessian of the log-likelihood at the estimates."""
        return self._exact_model().hessian(self.params_object)[0]

    def _exact_model(self) -> MixedLM:
        """Return the model as it was for this fit: a later one may have been of another kind."""
        self._need_data()
        model = copy.copy(self.model)
        model.reml = self.reml
        return model

    @property
    def score_obsv(self) -> np.ndarray:
        """Not there: rows of a mixed model have no scores of their own.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            "a mixed model has scores by group, not by row: lmmax.scores(result.native), and "
            "lmmax.sandwich(result.native) for the covariance that they give"
        )

    # --- random effects ---------------------------------------------------------------------

    @cached_property
    def _effects(self) -> list[np.ndarray]:
        """Conditional means of the random effects (m, k_re) and of each component's effects."""
        fit = self._conditional
        frames = fit.random_effects
        frames = frames if isinstance(frames, dict) else {fit.group_names[0]: frames}
        blocks = []
        for term in fit.terms:
            start = term.columns.start - fit.layout.slices[term.factor].start
            modes = frames[fit.group_names[term.factor]].to_numpy()
            blocks.append(modes[:, start : start + term.width])
        found = blocks[:1] if self.k_re else []
        translation = self._details.translation
        assert translation is not None
        for effects in translation.components:
            values = blocks[effects.block][effects.level, effects.column]
            found.append(np.where(effects.level < 0, 0.0, values))
        return found

    def _effect_names(self) -> list[pd.Index]:
        """Names of the effects of each group."""
        own = list(map(str, self.model.data.exog_re_names))
        if not self.k_vc:
            return [pd.Index(own)] * self.model.n_groups
        spec = self.model.exog_vc
        return [
            pd.Index(
                own
                + [
                    f"{name}[{column}]"
                    for name, columns in zip(spec.names, spec.colnames, strict=True)
                    for column in columns[i]
                ]
            )
            for i in range(self.model.n_groups)
        ]

    @cached_property
    def random_effects(self) -> dict[Any, pd.Series]:
        """Conditional means of each group's random effects, by its label."""
        self._need_data()
        model, found = self.model, self._effects
        own, rest = (found[0], found[1:]) if self.k_re else (None, found)
        firsts = [component.first for component in model._components]
        result = {}
        for i, (label, index) in enumerate(
            zip(model.group_labels, self._effect_names(), strict=True)
        ):
            values = [own[i]] if own is not None else []
            values += [part[f[i] : f[i + 1]] for part, f in zip(rest, firsts, strict=True)]
            result[label] = pd.Series(np.concatenate(values), index=index)
        return result

    @cached_property
    def random_effects_cov(self) -> dict[Any, pd.DataFrame]:
        """Covariance of each group's random effects given the data and the coefficients."""
        self._need_data()
        model, index = self.model, self._effect_names()
        designs = [] if model.exog_re is None else [model.group_list(model.exog_re)]
        for component in model._components:
            designs.append(component.matrices(model._rows, False))
        result = {}
        root = factor(self.cov_re_unscaled) if self.k_re else np.zeros((0, 0))
        sd = np.sqrt(self.params_object.vcomp)
        for i, label in enumerate(model.group_labels):
            parts = [design[i] for design in designs]
            M = np.concatenate(parts, axis=1)
            whole = np.zeros((M.shape[1], M.shape[1]))
            whole[: self.k_re, : self.k_re] = root
            widths = [part.shape[1] for part in parts[bool(self.k_re) :]]
            at = np.arange(self.k_re, len(whole))
            whole[at, at] = np.repeat(sd, widths)
            values = self.scale * joint_covariance(M.T @ M, whole)
            result[label] = pd.DataFrame(values, index=index[i], columns=index[i])
        return result

    @cached_property
    def fittedvalues(self) -> np.ndarray:
        """Fixed part and conditional means of the random effects, (n,)."""
        return self._conditional.fittedvalues.to_numpy()

    @cached_property
    def resid(self) -> np.ndarray:
        """Response less :attr:`fittedvalues`, (n,)."""
        return self._conditional.resid.to_numpy()

    # --- inference --------------------------------------------------------------------------

    def _padded(self, r_matrix: Any) -> Any:
        """Return a hypothesis on the coefficients as one on all parameters."""
        if isinstance(r_matrix, tuple):
            return (self._padded(r_matrix[0]), *r_matrix[1:])
        if isinstance(r_matrix, str | dict) or (
            isinstance(r_matrix, list) and r_matrix and isinstance(r_matrix[0], str)
        ):
            return r_matrix
        matrix = np.atleast_2d(real_numbers(r_matrix, "r_matrix"))
        if matrix.shape[1] == len(self.params):
            return matrix
        if matrix.shape[1] != self.k_fe:
            raise ValueError(
                f"r_matrix should have {self.k_fe} columns, one for each coefficient (or "
                f"{len(self.params)}, one for each parameter), not {matrix.shape[1]}"
            )
        return np.pad(matrix, ((0, 0), (0, len(self.params) - self.k_fe)))

    def _estimable(self, r_matrix: Any) -> tuple[MixedLMResults, Any]:
        """Return results in which no coefficient is missing, and a hypothesis on those there are.

        Raises:
            ValueError: for a hypothesis on a column without a coefficient.
        """
        aliased = np.append(np.isnan(self.fe_params), np.zeros(self.k_re2 + self.k_vc, dtype=bool))
        if not aliased.any():
            return self, r_matrix
        names = self.model.data.cov_names
        read = FormulaManager().get_linear_constraints(r_matrix, names)
        for j in np.flatnonzero(aliased & (read.constraint_matrix != 0.0).any(axis=0)):
            raise ValueError(
                f"the hypothesis is on {names[j]!r}, which has no coefficient, as a linear "
                "combination of other columns"
            )
        whole = copy.copy(self)
        whole.params = np.where(aliased, 0.0, self.params)
        cov = np.array(self.normalized_cov_params)
        cov[aliased] = cov[:, aliased] = 0.0
        whole.normalized_cov_params = cov
        return whole, (read.constraint_matrix, read.constraint_values)

    def t_test(self, r_matrix: Any, use_t: bool | None = None, cov_p: Any = None) -> Any:
        """Test each linear hypothesis on its own; normal unless `use_t`.

        Args:
            r_matrix: text, ``"Time = 7"``, or a matrix with a column for each coefficient (tested
                against zero), or a tuple of a matrix and values.
            use_t: use the t distribution with `df_resid` degrees of freedom.  For honest ones see
                ``native.t_test``.
            cov_p: covariance of the parameters to use instead of the estimated one.
        """
        if isinstance(r_matrix, np.ndarray) and np.atleast_2d(r_matrix).shape[1] != self.k_fe:
            raise ValueError(
                f"r_matrix for t-test should have {self.k_fe} columns, one for each coefficient"
            )
        results, hypothesis = self._estimable(self._padded(r_matrix))
        return super(MixedLMResults, results).t_test(hypothesis, cov_p=cov_p, use_t=use_t)

    def t_test_pairwise(
        self,
        term_name: str,
        method: str = "hs",
        alpha: float = 0.05,
        factor_labels: Sequence[str] | None = None,
    ) -> Any:
        """Test all differences of the levels of a term; see statsmodels."""
        # Its contrasts have a column for each parameter: `t_test` refuses them, as it must.
        whole = copy.copy(self)
        whole.__dict__["t_test"] = super().t_test
        return super(MixedLMResults, whole).t_test_pairwise(term_name, method, alpha, factor_labels)

    def wald_test(self, r_matrix: Any, *args: Any, **kwargs: Any) -> Any:
        """Test linear hypotheses jointly; see statsmodels. Takes what :meth:`t_test` takes."""
        results, hypothesis = self._estimable(self._padded(r_matrix))
        return super(MixedLMResults, results).wald_test(hypothesis, *args, **kwargs)

    def profile_re(
        self,
        re_ix: int | str,
        vtype: str,
        num_low: int = 5,
        dist_low: float = 1.0,
        num_high: int = 5,
        dist_high: float = 1.0,
        **fit_kwargs: Any,
    ) -> np.ndarray:
        """Return the profile log-likelihood of a variance.

        The variance itself is held at each value, and all other parameters, the scale among them,
        are estimated.

        Args:
            re_ix: position of the random effect or, for a component, its name.
            vtype: "re" or "vc".
            num_low: number of values below the estimate.
            dist_low: how far they reach.
            num_high: number of values above it.
            dist_high: how far they reach.
            **fit_kwargs: taken for compatibility.

        Returns:
            Values and log-likelihoods, (num_low + 1 + num_high, 2); NaN where a search failed.

        Raises:
            ValueError: if the values would reach zero, or for another `vtype`.
        """
        from ..inference.profile import profile_at

        if vtype == "re":
            if re_ix not in range(self.k_re):
                raise ValueError(f"re_ix={re_ix!r} must be 0 to {self.k_re - 1}, a random effect")
            column, term = int(re_ix), 0
            estimate = float(self.cov_re[column, column])
        elif vtype == "vc":
            known = list(self.model.exog_vc.names)
            if re_ix not in known:
                raise ValueError(f"re_ix={re_ix!r} is no variance component; use one of {known}")
            number = known.index(re_ix)
            column, term = 0, number + bool(self.k_re)
            estimate = float(self.vcomp[number])
        else:
            raise ValueError(f"vtype={vtype!r} must be 're' or 'vc'")
        if estimate - dist_low <= 0.0:
            raise ValueError(
                f"dist_low={dist_low:g} reaches a negative variance from the estimate, "
                f"{estimate:g}; use a smaller one"
            )
        left = np.linspace(estimate - dist_low, estimate, num_low + 1)
        right = np.linspace(estimate, estimate + dist_high, num_high + 1)[1:]
        values = np.concatenate([left, right])
        fit = self.native
        deviance = profile_at(fit, fit.terms[term].columns.start + column, np.sqrt(values))
        return np.column_stack([values, -0.5 * deviance])

    def bootstrap(
        self, nrep: int = 100, method: Any = None, disp: Any = 0, store: Any = 1, rng: Any = None
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Parametric bootstrap of all parameters.

        Responses are drawn from the fitted model, which keeps the groups; statsmodels draws rows.
        For limits and statistics of your own see :func:`lmmax.bootstrap`.

        Args:
            nrep: number of replicates.
            method: taken for compatibility, like `disp`.
            disp: see `method`.
            store: keep the replicates in ``bootstrap_results``.
            rng: seed, or generator to draw it from.

        Returns:
            Mean and standard deviation of the replicates, and the replicates (nrep, k), in the
            units of :attr:`params`; NaN for those that did not converge, which are in neither.
        """
        from statsmodels.tools.rng_qrng import check_random_state

        from ..inference.bootstrap import bootstrap

        if isinstance(rng, int | np.integer):
            seed = int(rng)
        else:
            state = check_random_state(rng)
            draw = getattr(state, "integers", None) or state.randint
            seed = int(draw(2**31 - 1))
        fit = self.native
        slices = [term.columns for term in fit.terms]

        def parameters(b: Any) -> np.ndarray:
            relative = b.cov_re / np.asarray(b.scale)[..., None, None]
            parts = [b.params]
            rest = list(slices)
            if self.k_re:
                here = rest.pop(0)
                i, j = np.tril_indices(self.k_re)
                parts.append(relative[..., here, here][..., i, j])
            parts += [relative[..., here.start, here.start, None] for here in rest]
            return np.concatenate(parts, axis=-1)

        found = bootstrap(fit, n=nrep, statistic=parameters, seed=seed).replicates.to_numpy()
        replicates = np.full((nrep, len(self.params)), np.nan)
        free = np.ones(self.k_fe, dtype=bool)
        if self.freepat is not None:
            free = np.asarray(self.freepat.fe_params) != 0.0
            replicates[:, : self.k_fe] = self.fe_params
        at = np.append(np.flatnonzero(free), np.arange(self.k_fe, len(self.params)))
        replicates[:, at] = found
        if store:
            self.bootstrap_results = replicates
        with warnings.catch_warnings():
            # Of columns without a coefficient there is no mean.
            warnings.simplefilter("ignore", RuntimeWarning)
            return np.nanmean(replicates, axis=0), np.nanstd(replicates, axis=0), replicates

    # --- output -----------------------------------------------------------------------------

    def summary(
        self,
        yname: str | None = None,
        xname_fe: Sequence[str] | None = None,
        xname_re: Sequence[str] | None = None,
        title: str | None = None,
        alpha: float = 0.05,
        re_errors: str = "statsmodels",
    ) -> Summary:
        """Return the printed summary, in the layout of statsmodels.

        Args:
            yname: name of the response.
            xname_fe: names of the coefficients.
            xname_re: names of the variance parameters.
            title: title.
            alpha: one minus the level of the confidence limits.
            re_errors: standard errors of the variance parameters: "statsmodels", the numbers that
                statsmodels prints, with a note that gives the others, or "natural", in the units
                of the parameters.
        """
        from .summary import summarize

        return summarize(self, yname, xname_fe, xname_re, title, alpha, re_errors)

    def remove_data(self) -> None:
        """Drop all that grows with the number of rows, from these results only.

        Estimates, tests, the summary, and predictions for new data stay, and for these the columns
        that the formula of the fixed effects names; the model that other results share keeps all.
        """
        if np.isnan(self.fe_params).any():
            self.model._dependence  # noqa: B018  (kept in the cache, for predictions)
        model = copy.copy(self.model)
        model.data = copy.copy(model.data)
        for name in list(vars(model)):
            if name in ("_plain", "_components", "_rows", "row_indices", "_last_given"):
                del model.__dict__[name]
        for name in ("endog", "exog", "exog_re", "groups", "_codes", "_labels", "group_sizes"):
            model.__dict__.pop(name, None)
            setattr(model, name, None)
        for name in ("endog", "exog", "exog_re", "orig_endog", "orig_exog"):
            if name in vars(model.data):
                setattr(model.data, name, None)
        frame = getattr(model.data, "frame", None)
        if frame is not None:
            # statsmodels reads the formula again when it unpickles.
            used = set(names([model.formula]))
            model.data.frame = frame[[name for name in frame.columns if name in used]]
        model.exog_vc = VCSpec(model.exog_vc.names, [], [])
        model.group_labels, model._freepat = [], None
        self.bse, self.mle_retvals, self.bse_re_natural  # noqa: B018  (kept in the cache)
        self.model = model
        self._details = replace(self._details, native=None, translation=None)
        for name in ("_native", "_conditional", "_effects", "random_effects"):
            self.__dict__.pop(name, None)
        for name in ("random_effects_cov", "fittedvalues", "resid"):
            self.__dict__.pop(name, None)


class MixedLMResultsWrapper(base.LikelihoodResultsWrapper):
    """Results as pandas objects where the data were."""

    _wrap_attrs: ClassVar[dict[str, Any]] = wrap.union_dicts(
        base.LikelihoodResultsWrapper._wrap_attrs,
        {
            "bse_re": ("generic_columns", "variance_names"),
            "bse_re_natural": ("generic_columns", "variance_names"),
            "fe_params": ("generic_columns", "xnames"),
            "bse_fe": ("generic_columns", "xnames"),
            "cov_re": ("generic_columns_2d", "exog_re_names"),
            "cov_re_unscaled": ("generic_columns_2d", "exog_re_names"),
        },
    )
    _wrap_methods: ClassVar[dict[str, str]] = {"conf_int": "columns"}

    def cov_params(self, r_matrix: Any = None, column: Any = None, **kwargs: Any) -> Any:
        """Return the covariance of the parameters, or of contrasts; see statsmodels."""
        results = object.__getattribute__(self, "_results")
        found = results.cov_params(r_matrix=r_matrix, column=column, **kwargs)
        if r_matrix is None and column is None:
            return results.model.data.wrap_output(found, "cov")
        return found


wrap.populate_wrapper(MixedLMResultsWrapper, MixedLMResults)
