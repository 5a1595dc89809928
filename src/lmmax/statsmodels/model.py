"""`MixedLM`: the model of statsmodels, its likelihood and fits by lmmax."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from statsmodels.base import model as base
from statsmodels.base._penalties import Penalty

from ..compress.columns import Dependence
from ..fit import Prepared, RankWarning, arrange, prepare
from ..frames import DataError, check_same_rows, plural
from ..inference.given_coefficients import GivenCovariance, given_covariance
from ..results import Fit
from . import arguments, estimation, formulas
from .components import Component, FormulaVCSpec, VCSpec, from_mapping, from_matrices
from .distribution import Distribution
from .params import MixedLMParams
from .results import MixedLMResults
from .translation import Groups, Translation, native_design, translate

_KEYWORDS = ("missing_idx", "model_spec", "formula")
_MISSING = ("none", "drop", "raise")


class MixedLM(base.LikelihoodModel):
    """A linear mixed model with one grouping factor and variance components.

    In group i: ``y = X b + Z g + sum_j Q_j h_j + e`` with ``cov(g) = cov_re``,
    ``cov(h_j) = vcomp[j] I`` and ``cov(e) = scale I``.  Arguments and attributes are those of
    ``statsmodels.regression.mixed_linear_model.MixedLM``.

    Args:
        endog: response, (n,).
        exog: fixed-effects design with its constant, (n, p).
        groups: label of each row's group, (n,).
        exog_re: random-effects design, (n, q); a random intercept if neither this nor `exog_vc` is
            given.
        exog_vc: variance components, a :class:`VCSpec`, or (deprecated, as in statsmodels) a
            mapping of names to mappings of groups to matrices.
        use_sqrt: whether packed covariances are Cholesky factors, in `score`, `start_params` and
            `free`.  Estimation never leaves the positive semidefinite matrices.
        missing: "none", "drop" (rows with missing values, those of `exog_vc` too) or "raise".

    Raises:
        DataError: for lengths that differ, missing or infinite values, and the like.

    Example:
        >>> import lmmax
        >>> from lmmax.statsmodels import MixedLM
        >>> data = lmmax.datasets.load("dietox")
        >>> exog = data.assign(const=1.0)[["const", "Time"]]
        >>> result = MixedLM(data["Weight"], exog, groups=data["Pig"]).fit()
        >>> result.params.round(3).to_dict()
        {'const': 15.724, 'Time': 6.943, 'Group Var': 3.554}
    """

    endog: Any
    exog: Any
    exog_re: Any
    groups: Any

    def __init__(
        self,
        endog: Any,
        exog: Any,
        groups: Any,
        exog_re: Any = None,
        exog_vc: Any = None,
        use_sqrt: bool = True,
        missing: str = "none",
        **kwargs: Any,
    ) -> None:
        for name in kwargs:
            if name not in _KEYWORDS:
                raise ValueError(f"argument {name} not permitted: MixedLM does not know it")
        if missing not in _MISSING:
            raise ValueError(f"missing={missing!r} must be one of {', '.join(map(repr, _MISSING))}")
        self.use_sqrt = use_sqrt
        self.reml = True
        self.fe_pen = self.re_pen = self.cov_pen = None
        self._freepat: MixedLMParams | None = None
        if isinstance(exog_vc, Mapping):
            warnings.warn(
                "Using deprecated variance components format: pass a VCSpec",
                FutureWarning,
                stacklevel=2,
            )
            exog_vc = from_mapping(exog_vc)
        arguments.check_groups(groups)
        check_same_rows({"exog": exog, "groups": groups, "exog_re": exog_re})
        arguments.check_spec(exog_vc)
        if missing == "drop":
            endog, exog, groups, exog_re, exog_vc = arguments.drop_rows(
                endog, exog, groups, exog_re, exog_vc
            )
        default = exog_re is None and (exog_vc is None or not len(exog_vc.names))
        exog, exog_re = arguments.as_column(exog), arguments.as_column(exog_re)
        for name, values in (("endog", endog), ("exog", exog), ("exog_re", exog_re)):
            arguments.check_numbers(name, values, groups)
        super().__init__(
            endog, exog, groups=groups, exog_re=exog_re, missing=_checking(missing), **kwargs
        )
        self._init_keys.extend(["use_sqrt", "exog_vc"])
        self.exog_vc = VCSpec([], [], []) if exog_vc is None else exog_vc
        self.k_vc = len(self.exog_vc.names)
        self.k_fe = self.exog.shape[1]
        self.nobs = self.n_totobs = len(self.endog)
        self._codes, self._labels = arguments.grouping(self.groups, self.nobs)
        self.group_labels = arguments.own_labels(groups, self._codes)
        self.n_groups = len(self.group_labels)
        if default:
            self.exog_re = np.ones((self.nobs, 1))
            names = ["Group"]
        elif exog_re is None:
            names = []
        else:
            names = arguments.re_names(exog_re)
            self.exog_re = np.asarray(self.exog_re, dtype=float)
        self.data.exog_re = self.exog_re
        self._group_name, self._group_column = "Group", None
        self.k_re = 0 if self.exog_re is None else self.exog_re.shape[1]
        self.k_re2 = self.k_re * (self.k_re + 1) // 2
        self.k_params = self.k_fe + self.k_re2
        self._name_parameters(names)
        self._components  # noqa: B018  (what is wrong with them is said now)
        if default:
            # statsmodels gives the effect the name of its variance.
            self.data.exog_re_names = self.data.exog_re_names_full

    def _name_parameters(self, re_names: Sequence[str]) -> None:
        """Set the names of random effects and parameters."""
        full = [
            f"{re_names[i]} Var" if i == j else f"{re_names[j]} x {re_names[i]} Cov"
            for i in range(len(re_names))
            for j in range(i + 1)
        ]
        self.data.exog_re_names = list(re_names)
        self.data.exog_re_names_full = full
        self.data.vcomp_names = list(self.exog_vc.names)
        components = [f"{name} Var" for name in self.exog_vc.names]
        self.data.variance_names = [*full, *components]
        self.data.param_names = [*self.exog_names, *full, *components]

    @classmethod
    def from_formula(
        cls,
        formula: str,
        data: Any,
        re_formula: str | None = None,
        vc_formula: Mapping[str, str] | None = None,
        subset: Any = None,
        use_sparse: bool = False,
        missing: str = "none",
        *args: Any,
        **kwargs: Any,
    ) -> MixedLM:
        """Make a model from formulas and a data frame.

        Formulas are read by statsmodels, with the engine that its options name, which runs their
        expressions as Python: a formula is code.  For text of others use :func:`lmmax.fit` with
        ``evaluate="safe"``.

        Args:
            formula: response and fixed effects, ``"y ~ x"``.
            data: data frame.
            re_formula: random effects, ``"1"`` or ``"~ x"``; a random intercept if neither this nor
                `vc_formula` is given.
            vc_formula: formula of each variance component, by name.  It is evaluated in each group
                by itself: labels used again in other groups are other effects.
            subset: rows to use, as ``data.loc`` takes them (statsmodels ignores this).
            use_sparse: whether the matrices in `exog_vc` are sparse.
            missing: "drop" rows with missing values in any variable used, or "none" / "raise".
            *args: positional arguments of the constructor.
            **kwargs: ``groups``, a column name or labels (n,), required; ``eval_env`` and
                ``drop_cols`` as in statsmodels; and arguments of the constructor.

        Raises:
            AttributeError: if ``groups`` is not given.
        """
        if "groups" not in kwargs:
            raise AttributeError("'groups' is a required keyword argument of from_formula")
        groups = kwargs.pop("groups")
        group_name = groups if isinstance(groups, str) else "Group"
        group_column = groups if isinstance(groups, str) else getattr(groups, "name", None)
        vc_formula = vc_formula or None
        formulas.check_formulas(formula, re_formula, vc_formula)
        data, groups = formulas.select_rows(
            data, groups, subset, missing, formula, re_formula, vc_formula
        )
        env = kwargs.pop("eval_env", None)
        exog_re: np.ndarray | None = None
        re_names: list[str] = []
        if re_formula is not None:
            exog_re, re_names = formulas.random_effects(
                re_formula, data, group_name, formulas.depth(env, 1)
            )
        elif vc_formula is None:
            re_names = [group_name]
        if exog_re is not None and not exog_re.shape[1]:
            if vc_formula is None:
                raise DataError(f"re_formula={re_formula!r} leaves no random effect")
            exog_re = None
        exog_vc = None
        if vc_formula is not None:
            codes, labels = arguments.grouping(groups, len(data))
            exog_vc = formulas.variance_components(
                vc_formula, data, codes, labels, use_sparse, formulas.depth(env, 1)
            )
        kwargs |= {
            "groups": groups,
            "exog_re": exog_re,
            "exog_vc": exog_vc,
            "missing": "none",
            "eval_env": formulas.depth(env, 2),
        }
        model = super().from_formula(formula, data, *args, **kwargs)
        model._group_name, model._group_column = group_name, group_column
        model._name_parameters(re_names)
        model._formulas = (formula, re_formula, vc_formula)
        return model

    # --- the data by group ------------------------------------------------------------------

    @cached_property
    def _rows(self) -> list[np.ndarray]:
        """Rows of each group, ascending."""
        order = np.argsort(self._codes, kind="stable")
        return np.split(order, np.cumsum(self.group_sizes)[:-1])

    @cached_property
    def group_sizes(self) -> np.ndarray:
        """Number of rows of each group, (n_groups,)."""
        return np.bincount(self._codes, minlength=self.n_groups)

    @cached_property
    def row_indices(self) -> dict[Any, list[int]]:
        """Rows of each group, by its label."""
        return {
            label: rows.tolist() for label, rows in zip(self.group_labels, self._rows, strict=True)
        }

    @property
    def endog_li(self) -> list[np.ndarray] | None:
        """Response by group."""
        return self.group_list(self.endog)

    @property
    def exog_li(self) -> list[np.ndarray] | None:
        """Fixed-effects design by group."""
        return self.group_list(self.exog)

    @property
    def exog_re_li(self) -> list[np.ndarray] | None:
        """Random-effects design by group."""
        return self.group_list(self.exog_re)

    def group_list(self, array: Any) -> Any:
        """Return the parts of an array (n, ...) that belong to each group; None for None."""
        if array is None:
            return None
        array = np.asarray(array)
        return [array[rows] for rows in self._rows]

    # --- lmmax's view -----------------------------------------------------------------------

    @cached_property
    def _components(self) -> tuple[Component, ...]:
        spec = self.exog_vc
        if isinstance(spec, FormulaVCSpec):
            return spec.components
        return tuple(
            from_matrices(name, mats, self._rows, self.group_labels)
            for name, mats in zip(spec.names, spec.mats, strict=True)
        )

    def _translate(
        self, structures: Sequence[Any] | None = None, held: np.ndarray | None = None
    ) -> Translation:
        """Return the design; coefficients in `held` (NaN for free ones) are in the offset."""
        exog, names, offset = self.exog, list(self.exog_names), None
        if held is not None:
            free = np.isnan(held)
            offset = exog[:, ~free] @ held[~free]
            exog, names = exog[:, free], [n for n, f in zip(names, free, strict=True) if f]
        return translate(
            self.endog,
            exog,
            names,
            str(self.endog_names),
            Groups(self._group_name, self._codes, self._labels),
            self.exog_re,
            self.data.exog_re_names,
            self._components,
            structures,
            offset,
        )

    @cached_property
    def _plain(self) -> tuple[Translation, Prepared]:
        """The model without constraints, compressed once for any number of fits."""
        translation = self._translate()
        return translation, prepare(translation.design)

    @property
    def _kept(self) -> np.ndarray:
        """Columns of exog that are no linear combinations of those before them."""
        return self._plain[1].layout.fixed.kept

    @cached_property
    def _dependence(self) -> Dependence:
        """How the columns without a coefficient follow from the others."""
        return self._plain[1].layout.dependence

    @cached_property
    def _slices(self) -> list[slice]:
        """Columns of D of the random effects (if any) and of each component."""
        return [term.columns for term in self._plain[1].terms]

    @cached_property
    def _directions(self) -> np.ndarray:
        """Derivatives of D in the covariance parameters, (k, q, q)."""
        return estimation.directions(self._slices, self.k_re)

    def _with_formula(self, fit: Fit) -> Fit:
        """Return a fit with its design from lmmax's formula, where there is one.

        Then it predicts new rows and tests terms.
        """
        design = native_design(self, fit.design)
        if design is None:
            return fit
        return replace(fit, design=design, terms=arrange(design)[1])

    def _given(self, cov_re: Any, vcomp: Any) -> GivenCovariance:
        """Look at the data through a relative covariance; the last one is remembered."""
        shapes, needed = (np.shape(cov_re), np.size(vcomp)), ((self.k_re, self.k_re), self.k_vc)
        if shapes != needed:
            raise ValueError(
                f"cov_re has shape {shapes[0]} and vcomp {shapes[1]} entries; the model has "
                f"{self.k_re} random effects and {self.k_vc} variance components"
            )
        q = self._directions.shape[1]
        D = estimation.joined(self._slices, self.k_re, cov_re, vcomp, q)
        several = len(self._plain[0].design.groupings) > 1
        if several and np.linalg.eigvalsh(D)[0] < -1e-10 * np.abs(D).max():
            raise ValueError(
                "cov_re and vcomp must be positive semidefinite: a model with several grouping "
                "factors has no likelihood otherwise"
            )
        known = self.__dict__.get("_last_given")
        if known is None or not np.array_equal(known[0], D):
            known = D, given_covariance(self._plain[1].compression, D, self._directions)
            self.__dict__["_last_given"] = known
        return known[1]

    def _gls(self, given: GivenCovariance) -> np.ndarray:
        """Return the coefficients that are best given the covariance; NaN for aliased ones."""
        found = np.full(self.k_fe, np.nan)
        found[self._kept] = given.coefficients
        return found

    # --- likelihood -------------------------------------------------------------------------

    def _params(self, params: Any, has_fe: bool, use_sqrt: bool) -> MixedLMParams:
        if all(hasattr(params, name) for name in ("fe_params", "cov_re", "vcomp")):
            return params
        return MixedLMParams.from_packed(params, self.k_fe, self.k_re, use_sqrt, has_fe)

    def loglike(self, params: Any, profile_fe: bool = True) -> np.float64:
        """Return the log-likelihood, the residual variance profiled out.

        Restricted if :attr:`reml`, and less the penalties: both as in the last fit.

        Args:
            params: :class:`MixedLMParams`, or a packed vector of covariance parameters, in the
                form of :attr:`use_sqrt`.
            profile_fe: put the generalised least-squares coefficients in place of those given.
        """
        params = self._params(params, False, self.use_sqrt)
        given = self._given(params.cov_re, params.vcomp)
        fe = self._gls(given) if profile_fe else np.asarray(params.fe_params)
        value = given.log_likelihood(fe[self._kept], self.reml)
        if self.cov_pen is not None and self.k_re:
            value -= self.cov_pen.func(params.cov_re, np.linalg.pinv(params.cov_re))
        if self.fe_pen is not None:
            value -= float(np.sum(self.fe_pen.func(fe)))
        return np.float64(value)

    def score(self, params: Any, profile_fe: bool = True) -> np.ndarray:
        """Return the gradient of :meth:`loglike`, in the parameters of :attr:`use_sqrt`.

        Args:
            params: as in :meth:`loglike`.
            profile_fe: take the derivative at the generalised least-squares coefficients, in the
                covariance parameters only.
        """
        params = self._params(params, False, self.use_sqrt).copy()
        if profile_fe:
            params.fe_params = self._gls(self._given(params.cov_re, params.vcomp))
        of = self.score_sqrt if self.use_sqrt else self.score_full
        fe, re, vc = of(params, calc_fe=not profile_fe)
        if self._freepat is not None:
            mask = self._freepat.get_packed(use_sqrt=False, has_fe=True)
            fe, re = fe * mask[: self.k_fe], re * mask[self.k_fe : self.k_fe + self.k_re2]
            vc = vc * mask[self.k_fe + self.k_re2 :]
        return np.concatenate([re, vc] if profile_fe else [fe, re, vc])

    def score_full(self, params: Any, calc_fe: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the gradient in coefficients, entries of `cov_re`, and variance components.

        Args:
            params: :class:`MixedLMParams`, or a packed vector of covariances.
            calc_fe: whether to find the first part, which is zero otherwise.
        """
        params = self._params(params, False, False)
        kept, fe = self._kept, np.zeros(self.k_fe)
        at = np.asarray(params.fe_params)
        score = self._given(params.cov_re, params.vcomp).score(at[kept], self.reml)
        if calc_fe:
            fe[kept] = score[: len(kept)]
            if self.fe_pen is not None:
                fe = fe - self.fe_pen.deriv(at)
        re, vc = np.split(score[len(kept) :], [self.k_re2])
        if self.cov_pen is not None and self.k_re:
            re = re - self.cov_pen.deriv(params.cov_re, np.linalg.pinv(params.cov_re))
        return fe, re, vc

    def score_sqrt(
        self, params: Any, calc_fe: bool = True
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the gradient in coefficients, the Cholesky factor, and roots of `vcomp`."""
        params = self._params(params, False, True)
        fe, re, vc = self.score_full(params, calc_fe)
        packed = params.get_packed(use_sqrt=True)
        return fe, *estimation.to_roots(packed, re, vc)

    def hessian(self, params: Any) -> tuple[np.ndarray, bool]:
        """Return the Hessian of the log-likelihood, without penalties, and a flag.

        Args:
            params: :class:`MixedLMParams`, or a packed vector with the coefficients.

        Returns:
            Second derivatives in coefficients, entries of `cov_re` and variance components, which
            hold away from the best coefficients too; and whether the covariance is singular.
        """
        params = self._params(params, True, self.use_sqrt)
        kept = self._kept
        given = self._given(params.cov_re, params.vcomp)
        found = given.hessian(np.asarray(params.fe_params)[kept], self.reml)
        size = self.k_fe + self.k_re2 + self.k_vc
        hess = np.zeros((size, size))
        at = np.append(kept, np.arange(self.k_fe, size))
        hess[np.ix_(at, at)] = found
        return hess, _singular(params.cov_re, params.vcomp, 0.0)

    def get_fe_params(self, cov_re: Any, vcomp: Any, tol: float = 1e-10) -> tuple[np.ndarray, bool]:
        """Return the generalised least-squares coefficients, and whether a variance is zero.

        Args:
            cov_re: relative covariance of the random effects.
            vcomp: relative variances of the components.
            tol: what counts as zero; the coefficients are right in any case.
        """
        return self._gls(self._given(cov_re, vcomp)), _singular(cov_re, vcomp, tol)

    def get_scale(self, fe_params: Any, cov_re: Any, vcomp: Any) -> np.float64:
        """Return the residual variance that is best given the other parameters."""
        fe = np.asarray(fe_params)[self._kept]
        return np.float64(self._given(cov_re, vcomp).scale(fe, self.reml))

    def predict(self, params: Any, exog: Any = None) -> np.ndarray:
        """Return ``exog @ coefficients``, without random effects.

        Args:
            params: :class:`MixedLMParams`, or a vector that begins with the coefficients.
            exog: design, (m, p); that of the model if None.

        Returns:
            A prediction per row; NaN, with a warning, where a column without a coefficient is not
            what it was in the model's design: the same combination of the other columns.
        """
        own = exog is None
        exog = self.exog if own else np.asarray(exog)
        if exog is None:
            raise ValueError("exog is needed: remove_data() took that of the model away")
        if hasattr(params, "fe_params"):
            fe = np.asarray(params.fe_params)
        else:
            fe = np.asarray(params)[: self.k_fe]
        predicted = np.dot(exog, np.where(np.isnan(fe), 0.0, fe))
        if own or not np.isnan(fe).any():
            return predicted
        lost = self._dependence.missed(np.atleast_2d(exog)).any(axis=1)
        if not lost.any():
            return predicted
        warnings.warn(
            f"the mean of {plural(int(lost.sum()), 'row')} of exog cannot be estimated and is NaN: "
            "columns that have no coefficient are not the combination of the others that they were",
            RankWarning,
            stacklevel=2,
        )
        return np.where(lost.reshape(predicted.shape), np.nan, predicted)

    def get_distribution(self, params: Any, scale: float, exog: Any = None) -> Distribution:
        """Return the distribution of the response, to draw from with ``rvs``.

        Args:
            params: packed coefficients, `cov_re` and `vcomp`, the latter two relative to the scale.
            scale: residual variance.
            exog: fixed-effects design; that of the model if None.
        """
        point = self._params(params, True, False)
        return Distribution(self, point, scale, self.exog if exog is None else exog)

    # --- fits -------------------------------------------------------------------------------

    def fit(
        self,
        start_params: Any = None,
        reml: bool = True,
        niter_sa: int = 0,
        do_cg: bool = True,
        fe_pen: Penalty | None = None,
        cov_pen: Any = None,
        free: MixedLMParams | None = None,
        full_output: bool = False,
        method: str | Sequence[str] | None = None,
        fe_cov: str = "gls",
        **fit_kwargs: Any,
    ) -> MixedLMResults:
        """Fit the model.

        Args:
            start_params: a hint where to start, and the values of parameters that `free` holds:
                :class:`MixedLMParams` or a packed vector, with or without coefficients.
            reml: restricted maximum likelihood or, if False, maximum likelihood.
            niter_sa: taken for compatibility, like `method` and options of the optimizer: lmmax
                solves to the optimum with its own.
            do_cg: if False, do not estimate: the result is for `start_params`.
            fe_pen: penalty on the coefficients, which are then estimated with it.
            cov_pen: penalty on the relative covariance of the random effects.
            free: 1 for what is estimated and 0 for what stays at its starting value, relative to
                the residual variance; coefficients too.  With `use_sqrt` a covariance is held by
                its Cholesky factor.
            full_output: keep a record of the optimization in ``hist``.
            method: see `niter_sa`; ``"newton"`` and ``"ncg"`` are refused, as in statsmodels.
            fe_cov: covariance of the coefficients: "gls", the one everyone reports, or "hessian",
                that of statsmodels, from the joint Hessian with the variances.
            **fit_kwargs: options of statsmodels' optimizers.

        Returns:
            The results, which later fits of this model do not change.

        Warns:
            SingularMatrixWarning: if the covariance of the random effects is singular.
            ConvergenceWarning: if the solve did not converge.
        """
        return estimation.fit(
            self,
            start_params=start_params,
            reml=reml,
            do_cg=do_cg,
            fe_pen=fe_pen,
            cov_pen=cov_pen,
            free=free,
            full_output=full_output,
            fe_cov=fe_cov,
            steering={"niter_sa": niter_sa or None, "method": method, **fit_kwargs},
        )

    def fit_regularized(
        self,
        start_params: Any = None,
        method: str | Penalty = "l1",
        alpha: Any = 0,
        ceps: float = 1e-4,
        ptol: float = 1e-6,
        maxit: int = 200,
        **fit_kwargs: Any,
    ) -> MixedLMResults:
        """Fit with penalised coefficients.

        Args:
            start_params: as in :meth:`fit`.
            method: "l1" minimises ``(y - Xb)' V^-1 (y - Xb) + sum_j alpha_j |b_j|`` with V that of
                the fit without penalty; a penalty object is passed to :meth:`fit` as `fe_pen`.
            alpha: weight of the penalty, or one for each coefficient.
            ceps: coefficients below this are taken as zero, after the minimum was found.
            ptol: taken for compatibility: the minimum is found to rounding.
            maxit: most rounds through the coefficients; a fit that needs more is not converged.
            **fit_kwargs: arguments of :meth:`fit`.
        """
        if isinstance(method, Penalty):
            method.alpha = alpha
            return self.fit(start_params=start_params, fe_pen=method, **fit_kwargs)
        if not isinstance(method, str) or method.lower() != "l1":
            raise ValueError(f"method={method!r} must be 'l1' or a Penalty object")
        result = self.fit(start_params=start_params, **fit_kwargs)
        return estimation.lasso_fit(self, result._results, alpha, ceps, maxit)


mixedlm = MixedLM.from_formula


def _checking(missing: str) -> str:
    return "raise" if missing == "raise" else "none"


def _singular(cov_re: Any, vcomp: Any, tol: float) -> bool:
    cov, vc = np.asarray(cov_re), np.asarray(vcomp)
    return bool((cov.size and np.linalg.eigvalsh(cov)[0] <= tol) or (vc.size and vc.min() <= tol))
