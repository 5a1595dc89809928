"""Fits of a `MixedLM`: arguments of statsmodels to those of lmmax, and estimates back."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from statsmodels.tools.sm_exceptions import ConvergenceWarning, SingularMatrixWarning

from ..constraints import Settings
from ..covariances import Covariance
from ..fit import ConvergenceWarning as NotConverged
from ..fit import IdentifiabilityWarning, RankWarning, fit_prepared, prepare
from ..inference.lasso import lasso
from ..known_covariance import PartlyKnown
from ..likelihood import user_entries
from ..parameters import pack_triangle, unpack_lower
from ..results import Fit
from .params import MixedLMParams
from .results import Details, MixedLMResults, MixedLMResultsWrapper
from .translation import Translation

if TYPE_CHECKING:
    from .model import MixedLM

STEERING = (
    "method",
    "niter_sa",
    "gtol",
    "maxiter",
    "eps",
    "maxcor",
    "ftol",
    "tol",
    "disp",
    "maxls",
)
"""Arguments that only steer the optimizer of statsmodels."""
_noted: set[str] = set()


class OptimizerNote(UserWarning):
    """An argument that steers statsmodels' optimizer, for which lmmax has no use."""


# --- coordinates ----------------------------------------------------------------------------


def joined(slices: Sequence[slice], k_re: int, cov_re: Any, vcomp: Any, q: int) -> np.ndarray:
    """Return D (q, q) with the covariance of the random effects and the components' variances."""
    D = np.zeros((q, q))
    rest = list(slices)
    if k_re:
        here = rest.pop(0)
        D[here, here] = np.asarray(cov_re)
    for here, variance in zip(rest, np.atleast_1d(np.asarray(vcomp)), strict=True):
        D[here, here] = variance * np.eye(here.stop - here.start)
    return D


def directions(slices: Sequence[slice], k_re: int) -> np.ndarray:
    """Return the derivatives of D in the triangle of `cov_re` and in `vcomp`, (k, q, q)."""
    q = max(here.stop for here in slices)
    found = []
    rest = list(slices)
    if k_re:
        start = rest.pop(0).start
        for i, j in zip(*np.tril_indices(k_re), strict=True):
            G = np.zeros((q, q))
            G[start + i, start + j] = G[start + j, start + i] = 1.0
            found.append(G)
    for here in rest:
        G = np.zeros((q, q))
        G[here, here] = np.eye(here.stop - here.start)
        found.append(G)
    return np.array(found)


def parts(D: np.ndarray, slices: Sequence[slice], k_re: int) -> tuple[np.ndarray, np.ndarray]:
    """Return `cov_re` and `vcomp` of a matrix D."""
    rest = list(slices)
    cov_re = np.zeros((0, 0))
    if k_re:
        here = rest.pop(0)
        cov_re = np.array(D[here, here])
    return cov_re, np.array([D[here.start, here.start] for here in rest])


def to_roots(packed: np.ndarray, re: np.ndarray, vc: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return gradients in the roots from those in entries of `cov_re` and in `vcomp`.

    Args:
        packed: the roots, packed.
        re: gradient in the triangle of `cov_re`.
        vc: gradient in `vcomp`.
    """
    roots, sd = np.split(packed, [len(re)])
    if len(re):
        lower = unpack_lower(roots)
        G = np.zeros_like(lower)
        G[np.tril_indices(len(G))] = re
        re = pack_triangle((G + G.T) @ lower)
    return re, 2.0 * sd * vc


class Information(NamedTuple):
    """The information on u of a fit, coefficients and scale profiled out.

    Attributes:
        working: on the entries of D in working coordinates, (q (q + 1) / 2,) squared.
        to: derivatives of these entries in u, (q (q + 1) / 2, k).
    """

    working: np.ndarray
    to: np.ndarray


def information(fit: Fit, G: np.ndarray) -> Information:
    """Return the information on u of a fit, from the solver's last evaluation.

    Args:
        fit: the fit.
        G: derivatives of D in u, (k, q, q).
    """
    to = user_entries(fit.compression.problem) @ np.array([pack_triangle(g) for g in G]).T
    hessian = np.asarray(fit.estimates.solution.point.at.hessian)
    inner, cross, scale = hessian[:-1, :-1], hessian[:-1, -1], hessian[-1, -1]
    return Information(0.5 * (inner - np.outer(cross, cross) / scale), to)


# --- what was asked -------------------------------------------------------------------------


def note_unused(steering: Mapping[str, Any]) -> None:
    """Check arguments that lmmax does not use, and say so: once for those of the optimizer."""
    unknown = sorted(name for name in steering if name not in STEERING)
    if unknown:
        several = "s" if len(unknown) > 1 else ""
        warnings.warn(
            f"Argument{several} {', '.join(unknown)} not used by MixedLM.fit",
            FutureWarning,
            stacklevel=4,
        )
    method = steering.get("method")
    for name in [method] if isinstance(method, str) else method or ():
        if str(name).lower() in ("newton", "ncg"):
            raise ValueError(f"method {name} not available for MixedLM")
    used = [name for name in STEERING if steering.get(name) is not None]
    if set(used) - _noted:
        _noted.update(used)
        warnings.warn(
            f"MixedLM.fit does not use {', '.join(used)}: made for the optimizers of statsmodels, "
            "where lmmax solves to the optimum with its own (this is said once)",
            OptimizerNote,
            stacklevel=4,
        )


def starting_point(model: MixedLM, start: Any) -> MixedLMParams:
    """Read `start_params`; by default no effect of anything, and all relative variances one.

    Raises:
        ValueError: for a vector of another length, and for missing values in covariances.
    """
    k_fe, k_re, k_vc = model.k_fe, model.k_re, model.k_vc
    if start is None:
        return MixedLMParams.from_components(np.zeros(k_fe), np.eye(k_re), None, np.ones(k_vc))
    if hasattr(start, "cov_re"):
        found = MixedLMParams.from_components(
            getattr(start, "fe_params", np.zeros(k_fe)),
            start.cov_re,
            None,
            getattr(start, "vcomp", np.zeros(0)),
        )
        sizes = len(found.fe_params) or k_fe, len(found.cov_re), len(found.vcomp)
        if sizes != (k_fe, k_re, k_vc):
            raise ValueError(
                f"start_params has {sizes} coefficients, random effects and variance components; "
                f"the model has {(k_fe, k_re, k_vc)}"
            )
        return _complete(found)
    size, covariances = len(start), model.k_re2 + k_vc
    if size not in (covariances, k_fe + covariances):
        raise ValueError(
            f"invalid start_params: {size} numbers; the model has {k_fe} coefficients and "
            f"{covariances} covariance parameters"
        )
    packed = MixedLMParams.from_packed(start, k_fe, k_re, model.use_sqrt, size > covariances)
    return _complete(packed)


def _complete(start: MixedLMParams) -> MixedLMParams:
    if not (np.isfinite(start.cov_re).all() and np.isfinite(start.vcomp).all()):
        raise ValueError("start_params has covariances that are missing or infinite")
    return start


@dataclass(frozen=True)
class _Mask:
    """What `free` says.

    Attributes:
        fe: which coefficients are estimated, (k_fe,).
        structures: covariance of the random effects and of each component; None where free.
        packed: all of it, in the order of the parameters.
    """

    fe: np.ndarray
    structures: tuple[Covariance | str | None, ...]
    packed: np.ndarray


def read_mask(model: MixedLM, free: Any, start: MixedLMParams) -> _Mask:
    """Read `free`.

    Raises:
        ValueError: if it does not fit the model.
    """
    k_re, k_vc = model.k_re, model.k_vc
    if not (hasattr(free, "fe_params") and hasattr(free, "cov_re")):
        raise ValueError("free must be MixedLMParams of 0 and 1: use MixedLMParams.from_components")
    fe = np.asarray(free.fe_params, dtype=float)
    cov = np.asarray(free.cov_re, dtype=float).reshape(-1, k_re) if k_re else np.zeros((0, 0))
    vc = np.asarray(getattr(free, "vcomp", np.zeros(0)), dtype=float)
    if fe.shape != (model.k_fe,) or cov.shape != (k_re, k_re) or vc.shape != (k_vc,):
        raise ValueError(
            f"free has shapes {fe.shape}, {np.shape(free.cov_re)} and {vc.shape} of fe_params, "
            f"cov_re and vcomp; the model needs ({model.k_fe},), ({k_re}, {k_re}) and ({k_vc},)"
        )
    found: list[Covariance | str | None] = []
    if k_re:
        found.append(_held(cov != 0.0, np.asarray(start.cov_re, dtype=float), model.use_sqrt))
    widths = [here.stop - here.start for here in model._slices[bool(k_re) :]]
    for mask, variance, width in zip(vc, np.asarray(start.vcomp), widths, strict=True):
        known = None
        if not mask:
            values = variance * np.eye(width)
            known = PartlyKnown(_rows(values), _rows(np.zeros((width, width), dtype=bool)))
        found.append(known)
    packed = np.concatenate([fe != 0.0, (cov != 0.0)[np.tril_indices(k_re)], vc != 0.0])
    return _Mask(fe != 0.0, tuple(found), packed)


def _held(mask: np.ndarray, cov: np.ndarray, use_sqrt: bool) -> Covariance | str | None:
    """Return the structure of a covariance of which some entries are held."""
    lower = np.tril(mask)
    if lower[np.tril_indices(len(mask))].all():
        return None
    if use_sqrt:
        packed = MixedLMParams.from_components(None, cov).get_packed(use_sqrt=True)
        values, of = unpack_lower(packed), "factor"
    else:
        values, of = cov, "covariance"
    if np.array_equal(lower, np.eye(len(mask))) and not np.tril(values, -1).any():
        return "diag"
    return PartlyKnown(_rows(values), _rows(lower | lower.T), of)


def _rows(matrix: np.ndarray) -> Any:
    return tuple(tuple(row.tolist()) for row in matrix)


# --- fits -----------------------------------------------------------------------------------


def native_fit(
    model: MixedLM,
    reml: bool,
    start: MixedLMParams | None,
    mask: _Mask | None,
    point: MixedLMParams,
) -> tuple[Translation, Fit]:
    """Fit with lmmax; its warnings are said in statsmodels' terms by the caller.

    Args:
        model: the model.
        reml: whether by restricted maximum likelihood.
        start: where to start.
        mask: what is held.
        point: values of what is held.
    """
    if mask is None or (mask.fe.all() and all(part is None for part in mask.structures)):
        translation, prepared = model._plain
    else:
        held = None if mask.fe.all() else np.where(mask.fe, np.nan, point.fe_params)
        translation = model._translate(mask.structures, held)
        prepared = prepare(translation.design)
    guess = None
    if start is not None:
        q = model._directions.shape[1]
        D = joined(model._slices, model.k_re, start.cov_re, start.vcomp, q)
        if np.linalg.eigvalsh(D)[0] >= 0.0:
            guess = {"cov_re": D, "scale": 1.0}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotConverged)
        warnings.simplefilter("ignore", RankWarning)
        warnings.simplefilter("ignore", IdentifiabilityWarning)
        return translation, fit_prepared(prepared, Settings(reml=reml, start=guess))


def fit(
    model: MixedLM,
    *,
    start_params: Any,
    reml: bool,
    do_cg: bool,
    fe_pen: Any,
    cov_pen: Any,
    free: Any,
    full_output: bool,
    fe_cov: str,
    steering: Mapping[str, Any],
) -> MixedLMResultsWrapper:
    """Fit a model; see :meth:`MixedLM.fit`."""
    note_unused(steering)
    if fe_cov not in ("gls", "hessian"):
        raise ValueError(f"fe_cov={fe_cov!r} must be 'gls' or 'hessian'")
    point = starting_point(model, start_params)
    mask = None if free is None else read_mask(model, free, point)
    model.reml, model.fe_pen, model.cov_pen, model._freepat = bool(reml), fe_pen, cov_pen, free
    start = None if start_params is None else point
    if not do_cg:
        return at_point(model, point, fe_cov)
    translation, found = native_fit(model, bool(reml), start, mask, point)
    if fe_pen is not None or (cov_pen is not None and model.k_re):
        result = _penalised(model, translation, found, mask, point)
    else:
        result = _results(model, translation, found, mask, point, fe_cov)
    _warn(model, result)
    result.hist = [result.mle_retvals] if full_output else None
    return result.wrapped()


def _results(
    model: MixedLM,
    translation: Translation,
    found: Fit,
    mask: _Mask | None,
    point: MixedLMParams,
    fe_cov: str,
) -> MixedLMResults:
    """Return the results of a fit by lmmax."""
    k_fe, estimates = model.k_fe, found.estimates
    fe = np.full(k_fe, np.nan) if mask is None else np.where(mask.fe, np.nan, point.fe_params)
    of_fit = np.arange(k_fe) if mask is None else np.flatnonzero(mask.fe)
    kept = of_fit[found.layout.fixed.kept]
    fe[kept] = estimates.beta
    cov_re, vcomp = parts(estimates.D, model._slices, model.k_re)
    params = MixedLMParams.from_components(fe, cov_re, None, vcomp)
    size = params.k_tot
    cov = np.zeros((size, size))
    free = np.ones(size, dtype=bool) if mask is None else mask.packed.copy()
    aliased = np.setdiff1d(of_fit, kept)
    free[aliased] = False
    cov[np.ix_(kept, kept)] = estimates.scale * estimates.beta_unscaled
    own = np.arange(k_fe, size)
    variances = _variance_covariance(information(found, model._directions), params, free[k_fe:])
    cov[np.ix_(own, own)] = variances.covariance
    if fe_cov == "hessian":
        # The inverse of the joint information by blocks; variances without errors count as held.
        joint = -model.hessian(params)[0][np.ix_(kept, own)]
        change = variances.along(-cov[np.ix_(kept, kept)] @ joint)
        cov[np.ix_(kept, kept)] += change @ change.T
        cross = np.where(np.isnan(np.diag(cov)[own]), np.nan, change @ variances.root.T)
        cov[np.ix_(kept, own)], cov[np.ix_(own, kept)] = cross, cross.T
    cov[aliased] = cov[:, aliased] = np.nan
    if found.unidentified is not None:
        hidden = kept[found.unidentified.concerns(np.eye(len(kept)))]
        cov[hidden] = cov[:, hidden] = np.nan
    details = Details(
        native=found,
        translation=translation,
        point=params,
        scale=estimates.scale,
        llf=found.llf,
        converged=found.converged,
        singular=bool(found.estimates.boundary),
        message=found.message,
        free=None if mask is None else model._freepat,
        fe_cov=fe_cov,
    )
    return MixedLMResults(model, params.get_packed(False, True), cov / estimates.scale, details)


class _Variances(NamedTuple):
    """How certain the covariances are.

    Attributes:
        covariance: zero for what is held, NaN where there is none, (k, k).
        inside: which have one.
        R: triangular, from them to orthonormal directions of D, (i, i).
        half: root of the covariance of these directions, (i, i).
    """

    covariance: np.ndarray
    inside: np.ndarray
    R: np.ndarray
    half: np.ndarray

    def along(self, slopes: np.ndarray) -> np.ndarray:
        """Return slopes (p, k) in the covariances along the columns of the root."""
        return np.asarray(np.linalg.solve(self.R.T, slopes[:, self.inside].T).T @ self.half)

    @property
    def root(self) -> np.ndarray:
        """Root of the covariance, zero where there is none, (k, i)."""
        root = np.zeros((len(self.covariance), len(self.inside)))
        root[self.inside] = np.linalg.solve(self.R, self.half)
        return root


def _variance_covariance(known: Information, params: MixedLMParams, free: np.ndarray) -> _Variances:
    """Invert the information on covariances.

    NaN for variances of zero with their covariances, and for all where the information is not
    positive definite, as at a boundary.
    """
    rows, columns = np.tril_indices(params.k_re)
    zero = np.diag(params.cov_re) <= 0.0
    empty = np.append(zero[rows] | zero[columns], params.vcomp <= 0.0).astype(bool)
    inside = np.flatnonzero(free & ~empty)
    found = np.zeros((len(free), len(free)))
    found[free & empty] = np.nan
    found[:, free & empty] = np.nan
    # In directions that do not depend on where the covariates' origins are.
    Q, R = np.linalg.qr(known.to[:, inside])
    own = Q.T @ known.working @ Q
    size = np.sqrt(np.abs(np.diag(own)))
    size = np.where(size > 0.0, size, 1.0)
    values, vectors = np.linalg.eigh(own / np.outer(size, size))
    apart = np.abs(np.diag(R)) > 1e-14 * np.linalg.norm(R, axis=0)
    if (values > 1e-10).all() and apart.all():
        half = vectors / size[:, None] / np.sqrt(values)
        root = np.linalg.solve(R, half)
        found[np.ix_(inside, inside)] = root @ root.T
    else:
        R, half = np.eye(len(inside)), np.zeros_like(own)
        found[np.ix_(inside, inside)] = np.nan
    return _Variances(found, inside, R, half)


def at_point(model: MixedLM, point: MixedLMParams, fe_cov: str) -> MixedLMResultsWrapper:
    """Return results for covariances that are given, with the best coefficients and scale."""
    q = model._directions.shape[1]
    D = joined(model._slices, model.k_re, point.cov_re, point.vcomp, q)
    if np.linalg.eigvalsh(D)[0] < -1e-10 * np.abs(D).max():
        raise ValueError("start_params has a covariance that is not positive semidefinite")
    given = model._given(point.cov_re, point.vcomp)
    translation, prepared = model._plain
    scale = given.scale(given.coefficients, model.reml)
    settings = Settings(reml=model.reml, fix={"cov_re": scale * D, "scale": scale})
    found = fit_prepared(prepared, settings)
    result = _results(model, translation, found, None, point, fe_cov)
    result.converged = False
    return result.wrapped()


def _penalised(
    model: MixedLM,
    translation: Translation,
    found: Fit,
    mask: _Mask | None,
    point: MixedLMParams,
) -> MixedLMResults:
    """Maximise the penalised likelihood over coefficients and roots together, from a fit's end."""
    from scipy.optimize import minimize

    start = _results(model, translation, found, mask, point, "gls").params_object
    k_fe, k_re, k_re2 = model.k_fe, model.k_re, model.k_re2
    roots = start.get_packed(use_sqrt=True, has_fe=False)
    free = np.ones(k_fe + len(roots), dtype=bool) if mask is None else mask.packed.copy()
    if not model.use_sqrt and not free[k_fe : k_fe + k_re2].all():
        raise ValueError("penalties and a mask of cov_re need use_sqrt=True")
    # The slope in a root of zero is zero, whether or not the variance wants to grow.
    diagonal = np.append(np.equal(*np.tril_indices(k_re)), np.ones(model.k_vc)).astype(bool)
    low = diagonal & free[k_fe:] & (roots < 0.1)
    roots = np.where(low, 0.1, roots)
    fe = np.where(np.isnan(start.fe_params), 0.0, start.fe_params)
    free[:k_fe] &= ~np.isnan(start.fe_params)
    x0 = np.append(fe, roots)
    precision = np.sqrt(np.diag(model._given(start.cov_re, start.vcomp).precision))
    unit = np.ones_like(x0)
    unit[model._kept] = np.sqrt(found.scale) / precision
    unit = unit[free]

    def at(z: np.ndarray) -> MixedLMParams:
        x = x0.copy()
        x[free] = z * unit
        return MixedLMParams.from_packed(x, k_fe, k_re, use_sqrt=True, has_fe=True)

    def objective(z: np.ndarray) -> tuple[float, np.ndarray]:
        params = at(z)
        x = x0.copy()
        x[free] = z * unit
        fe, re, vc = model.score_full(params, calc_fe=True)
        score = np.concatenate([fe, *to_roots(x[k_fe:], re, vc)])
        return -model.loglike(params, profile_fe=False), -score[free] * unit

    z, done = x0[free] / unit, None
    for _ in range(5):
        done = minimize(objective, z, jac=True, method="BFGS", options={"gtol": 1e-9})
        if np.max(np.abs(done.jac), initial=0.0) <= 1e-6 or np.array_equal(done.x, z):
            break
        z = done.x
    assert done is not None
    params = at(done.x)
    params.fe_params = np.where(np.isnan(start.fe_params), np.nan, params.fe_params)
    kept = np.flatnonzero(free[:k_fe])
    hessian = -model.hessian(params)[0]
    if model.fe_pen is not None and hasattr(model.fe_pen, "deriv2"):
        curvature = np.asarray(model.fe_pen.deriv2(np.nan_to_num(params.fe_params)))
        hessian[:k_fe, :k_fe] += np.diag(curvature) if curvature.ndim == 1 else curvature
    cov = np.zeros_like(hessian)
    cov[np.ix_(kept, kept)] = np.linalg.inv(hessian[np.ix_(kept, kept)])
    own = np.arange(k_fe, len(hessian))
    inner = hessian[np.ix_(own, own)]
    cross = hessian[np.ix_(kept, own)]
    inner = inner - cross.T @ cov[np.ix_(kept, kept)] @ cross
    known = Information(inner, np.eye(len(inner)))
    cov[np.ix_(own, own)] = _variance_covariance(known, params, free[k_fe:]).covariance
    aliased = np.flatnonzero(np.isnan(params.fe_params))
    cov[aliased] = cov[:, aliased] = np.nan
    converged = bool(np.max(np.abs(done.jac), initial=0.0) <= 1e-4)
    return _at_estimates(
        model,
        params,
        cov,
        converged,
        "converged" if converged else f"the penalised fit did not converge: {done.message}",
    )


def _at_estimates(
    model: MixedLM, params: MixedLMParams, cov: np.ndarray, converged: bool, message: str
) -> MixedLMResults:
    """Return results for estimates that are not of a fit by lmmax."""
    scale = model.get_scale(params.fe_params, params.cov_re, params.vcomp)
    details = Details(
        native=None,
        translation=model._plain[0],
        point=params,
        scale=scale,
        llf=model.loglike(params, profile_fe=False),
        converged=converged,
        singular=False,
        message=message,
        free=model._freepat,
        fe_cov="gls",
    )
    return MixedLMResults(model, params.get_packed(False, True), cov / scale, details)


def lasso_fit(
    model: MixedLM, fitted: MixedLMResults, alpha: Any, ceps: float, max_rounds: int
) -> MixedLMResultsWrapper:
    """Return results with L1-penalised coefficients at the covariance of a fit."""
    weights = np.asarray(alpha, dtype=float)
    weights = np.full(model.k_fe, weights) if weights.ndim == 0 else weights
    if weights.shape != (model.k_fe,) or not (weights >= 0.0).all():
        raise ValueError(
            f"alpha must be a number or {model.k_fe} numbers, none of them negative, not {alpha!r}"
        )
    start, kept = fitted.params_object, model._kept
    given = model._given(start.cov_re, start.vcomp)
    A = given.precision / fitted.scale
    c = A @ given.coefficients
    found = lasso(A, c, weights[kept], np.asarray(start.fe_params)[kept], max_rounds)
    fe = np.asarray(start.fe_params).copy()
    fe[kept] = np.where(np.abs(found.coefficients) < ceps, 0.0, found.coefficients)
    params = MixedLMParams.from_components(fe, start.cov_re, None, start.vcomp)
    scale = model.get_scale(fe, params.cov_re, params.vcomp)
    cov = np.array(fitted.cov_params())
    cov[: model.k_fe] = cov[:, : model.k_fe] = np.nan
    active = np.flatnonzero(fe[kept] != 0.0)
    at = kept[active]
    cov[np.ix_(at, at)] = scale * np.linalg.inv(given.precision[np.ix_(active, active)])
    cov[np.ix_(at, np.arange(model.k_fe, len(cov)))] = 0.0
    cov[np.ix_(np.arange(model.k_fe, len(cov)), at)] = 0.0
    message = "converged" if found.converged else "the L1 fit did not converge; raise maxit"
    result = _at_estimates(model, params, cov, found.converged, message)
    _warn(model, result)
    return result.wrapped()


def _warn(model: MixedLM, result: MixedLMResults) -> None:
    """Say what a user of the estimates must know, in the categories of statsmodels."""
    details = result._details
    if not details.converged:
        warnings.warn(details.message, ConvergenceWarning, stacklevel=4)
    if details.singular:
        warnings.warn(
            "The covariance of the random effects is singular (a variance is zero or a correlation "
            "one): the maximum lies on the boundary, where standard errors of variances are not "
            "defined",
            SingularMatrixWarning,
            stacklevel=4,
        )
    if details.native is not None and details.native.unidentified is not None:
        warnings.warn(
            f"{details.native.unidentified}; they have no standard errors, nor do coefficients "
            "that depend on them",
            IdentifiabilityWarning,
            stacklevel=4,
        )
    aliased = np.flatnonzero(np.isnan(details.point.fe_params))
    if len(aliased):
        names = ", ".join(str(model.exog_names[j]) for j in aliased)
        warnings.warn(
            f"columns of exog are linear combinations of others, and have no coefficient: {names}",
            RankWarning,
            stacklevel=4,
        )
