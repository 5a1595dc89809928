"""Arguments of `fit` and `fit_regularized`, above all where statsmodels gets them wrong.

What holds at an optimum is checked with the dense Gaussian density below or with statsmodels' own
score, and by optimizers of SciPy from other starts.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
import statsmodels.regression.mixed_linear_model as theirs
from scipy.optimize import minimize
from statsmodels.base._penalties import L2, PSD, PseudoHuber
from statsmodels.tools.numdiff import approx_fprime
from statsmodels.tools.sm_exceptions import SingularMatrixWarning

import lmmax.statsmodels.estimation as estimation
from lmmax.fit import RankWarning
from lmmax.statsmodels import MixedLM, MixedLMParams, mixedlm
from tests.statsmodels_dropin.cases import fit, pair, prepared, simulated

pytestmark = pytest.mark.unoptimised

DATA = simulated()


def whole_covariance(model: Any, cov_re: Any, vcomp: Any) -> np.ndarray:
    """V relative to the scale, (n, n), from the matrices of the model."""
    V = np.eye(model.nobs)
    for i, rows in enumerate(model.row_indices.values()):
        here = np.ix_(rows, rows)
        if model.k_re:
            Z = model.exog_re[rows]
            V[here] += Z @ np.asarray(cov_re) @ Z.T
        for variance, mats in zip(np.atleast_1d(vcomp), model.exog_vc.mats, strict=True):
            V[here] += variance * mats[i] @ mats[i].T
    return V


def log_likelihood(model: Any, fe: Any, cov_re: Any, vcomp: Any, reml: bool) -> float:
    """The Gaussian log-likelihood with the scale profiled out, all matrices dense."""
    V = whole_covariance(model, cov_re, vcomp)
    r = model.endog - model.exog @ np.asarray(fe)
    n, p = model.exog.shape
    d = n - p * reml
    value = np.linalg.slogdet(V)[1] + d * (np.log(2 * np.pi * (r @ np.linalg.solve(V, r)) / d) + 1)
    if reml:
        value += np.linalg.slogdet(model.exog.T @ np.linalg.solve(V, model.exog))[1]
    return -0.5 * float(value)


@pytest.fixture(scope="module")
def slopes() -> Any:
    """Two random effects and a component on one factor, which compiles fast."""
    return mixedlm("ys ~ x + z1", DATA, groups="g", re_formula="~ z1", vc_formula={"s": "0 + z3"})


@pytest.fixture(scope="module")
def plain(slopes: Any) -> Any:
    return slopes.fit()


START = MixedLMParams.from_components(
    np.array([1.0, 0.3, 0.0]), np.array([[2.0, 0.1], [0.1, 1.0]]), vcomp=np.array([0.7])
)


def mask(fe: Any = (1, 1, 1), cov_re: Any = ((1, 1), (1, 1)), vcomp: Any = (1,)) -> MixedLMParams:
    return MixedLMParams.from_components(
        *(np.array(a, dtype=float) for a in (fe, cov_re)), None, np.array(vcomp, dtype=float)
    )


# --- variances of zero ----------------------------------------------------------------------


@pytest.mark.parametrize("reml", [True, False])
@pytest.mark.parametrize("variance", [0.0, 1e-14, 0.9e-10, 1.1e-10, 1e-6])
def test_likelihood_at_variances_near_zero(slopes: Any, reml: bool, variance: float) -> None:
    """statsmodels (#10239) jumps to that of infinite variances below 1e-10."""
    point = MixedLMParams.from_components(
        np.array([1.0, 0.5, 0.1]), variance * np.eye(2), vcomp=np.array([variance])
    )
    model = prepared(slopes, reml)
    expected = log_likelihood(model, point.fe_params, point.cov_re, point.vcomp, reml)
    assert abs(model.loglike(point, profile_fe=False) - expected) <= 1e-12 * abs(expected)
    V = whole_covariance(model, point.cov_re, point.vcomp)
    X = model.exog
    best = np.linalg.solve(X.T @ np.linalg.solve(V, X), X.T @ np.linalg.solve(V, model.endog))
    fe, singular = model.get_fe_params(point.cov_re, point.vcomp)
    np.testing.assert_allclose(fe, best, rtol=1e-11)
    assert singular is (variance <= 1e-10)
    assert np.isfinite(model.score(point)).all() and np.isfinite(model.hessian(point)[0]).all()
    prepared(slopes, True)


@pytest.mark.parametrize("seed", range(12))
def test_data_without_group_variance(seed: int) -> None:
    """statsmodels converges in 24 of 60 such fits; the maximum at zero is least squares."""
    rng = np.random.default_rng(seed)
    groups = np.repeat(np.arange(20), 10)
    exog = np.column_stack([np.ones(200), rng.normal(size=20)[groups], rng.normal(size=200)])
    model = MixedLM(exog @ [1.0, 1.0, 1.0] + rng.normal(size=200), exog, groups)
    result = fit(model)
    assert result.converged
    zero = log_likelihood(model, *_least_squares(model), [[0.0]], [], True)
    assert result.llf >= zero - 1e-12 * abs(zero)
    slope = model.score_full(
        MixedLMParams.from_components(result.fe_params, result.cov_re_unscaled), calc_fe=False
    )[1]
    if result.cov_re[0, 0] == 0.0:
        assert slope[0] <= 0.0
        assert abs(result.llf - zero) <= 1e-12 * abs(zero)
        assert np.isnan(result.bse_re[0]) and np.isfinite(result.bse_fe).all()
        assert not result.random_effects[0].any()
        np.testing.assert_array_equal(result.random_effects_cov[0], 0.0)
    else:
        assert abs(slope[0]) <= 1e-6


def _least_squares(model: Any) -> tuple[np.ndarray]:
    return (np.linalg.lstsq(model.exog, model.endog)[0],)


def test_singular_fits_are_said_and_have_results() -> None:
    model = pair("lme01")[0]
    with pytest.warns(SingularMatrixWarning, match="maximum lies on the boundary"):
        result = model.fit(fe_cov="hessian")
    assert result.cov_re[0, 0] == 0.0
    assert "boundary" in str(result.summary())
    # No coefficient knows of a variance without an error.
    np.testing.assert_allclose(result.bse_fe, fit(model).bse_fe, rtol=1e-12)


# --- results do not change ------------------------------------------------------------------


def test_later_fits_do_not_change_results(slopes: Any) -> None:
    first = slopes.fit(reml=True)
    unread = slopes.fit(reml=True)
    before = first.llf, first.bse.copy(), first.hessv.copy(), first.summary().as_text()
    second = slopes.fit(reml=False, free=mask(vcomp=[0]), start_params=START)
    assert (unread.method, second.method) == ("REML", "ML")
    assert unread.llf == before[0]
    np.testing.assert_array_equal(unread.bse, before[1])
    np.testing.assert_array_equal(unread.hessv, before[2])
    assert unread.summary().as_text() == before[3]
    assert np.isnan(unread.aic) and np.isfinite(second.aic)
    assert unread.freepat is None and second.freepat is not None


# --- free -----------------------------------------------------------------------------------


@pytest.mark.parametrize("reml", [True, False])
@pytest.mark.parametrize("free", [(1, 0, 1), (0, 1, 0), (0, 0, 0)])
def test_coefficients_that_are_held(slopes: Any, free: Any, reml: bool) -> None:
    """The likelihood is that of the response less what is held, on the other columns."""
    held = np.array(free) == 0
    result = slopes.fit(start_params=START, free=mask(fe=free), reml=reml)
    np.testing.assert_array_equal(result.fe_params[held], START.fe_params[held])
    assert not result.bse_fe[held].any()
    y = slopes.endog - slopes.exog[:, held] @ START.fe_params[held]
    X = slopes.exog[:, ~held]
    if X.shape[1]:
        other = theirs.MixedLM(y, X, DATA.g, slopes.exog_re, exog_vc=slopes.exog_vc)
        point = theirs.MixedLMParams.from_components(
            result.fe_params[~held], result.cov_re_unscaled, vcomp=result.params_object.vcomp
        )
        prepared(other, reml)
        np.testing.assert_allclose(result.llf, other.loglike(point), rtol=1e-12)
        score = np.concatenate(other.score_full(point, calc_fe=True))
        np.testing.assert_allclose(score, 0.0, atol=1e-5)
    if not reml:
        np.testing.assert_allclose(result.aic, -2 * result.llf + 2 * (sum(free) + 4 + 1))


def test_everything_held(slopes: Any) -> None:
    result = slopes.fit(start_params=START, free=mask((0, 0, 0), np.zeros((2, 2)), [0]), reml=False)
    expected = log_likelihood(slopes, START.fe_params, START.cov_re, START.vcomp, False)
    np.testing.assert_allclose(result.params, START.get_packed(False, True), atol=1e-15)
    np.testing.assert_allclose(result.llf, expected, rtol=1e-12)


@pytest.mark.parametrize(
    ("use_sqrt", "cov_re", "vcomp"),
    [
        (True, np.eye(2), [1]),
        (True, np.zeros((2, 2)), [1]),
        (True, [[0, 1], [1, 1]], [1]),
        (True, np.ones((2, 2)), [0]),
        (False, np.eye(2), [1]),
        (False, [[1, 1], [1, 0]], [0]),
    ],
    ids=["diagonal", "rest", "last", "cov_re", "diagonal of variances", "first of variances"],
)
def test_covariances_that_are_held(use_sqrt: bool, cov_re: Any, vcomp: Any) -> None:
    """What is held is that of the start, and statsmodels' score of the rest is zero."""
    kwargs: dict[str, Any] = {
        "groups": "g",
        "re_formula": "~ z1",
        "vc_formula": {"s": "0 + z3"},
        "use_sqrt": use_sqrt,
    }
    model = mixedlm("ys ~ x + z1", DATA, **kwargs)
    start = START.copy()
    if np.array_equal(cov_re, np.eye(2)):
        start.cov_re = np.diag([2.0, 1.0])
    free = mask(cov_re=cov_re, vcomp=vcomp)
    result = fit(model, start_params=start, free=free)
    assert result.converged
    packed = free.get_packed(use_sqrt=False) != 0
    found = result.params_object.get_packed(use_sqrt=use_sqrt)
    np.testing.assert_allclose(found[~packed], start.get_packed(use_sqrt)[~packed], atol=1e-12)
    other = prepared(theirs.MixedLM.from_formula("ys ~ x + z1", DATA, **kwargs), True, use_sqrt)
    point = theirs.MixedLMParams.from_components(
        result.fe_params, result.cov_re_unscaled, vcomp=result.params_object.vcomp
    )
    np.testing.assert_allclose(other.score(point)[packed], 0.0, atol=2e-5)
    # Errors: the inverse of the information on what is free.
    at = np.append(np.ones(3, dtype=bool), packed)
    full = fit(model, start_params=start, free=free, fe_cov="hessian").cov_params()
    full = np.asarray(full)
    assert not full[~at].any() and not full[:, ~at].any()
    expected = np.linalg.inv(-other.hessian(point)[0][np.ix_(at, at)])
    np.testing.assert_allclose(full[np.ix_(at, at)], expected, atol=1e-8 * np.abs(expected).max())


def test_wrong_masks(slopes: Any) -> None:
    with pytest.raises(ValueError, match="free must be MixedLMParams"):
        slopes.fit(free=np.ones(7))
    with pytest.raises(ValueError, match=r"free has shapes \(2,\)"):
        slopes.fit(free=mask(fe=(1, 1)))


# --- penalties ------------------------------------------------------------------------------


def _weighted(penalty: Any, weights: float) -> Any:
    penalty.weights = weights
    return penalty


@pytest.mark.parametrize("reml", [True, False])
@pytest.mark.parametrize(
    "penalty", [_weighted(L2(), 3.0), _weighted(PseudoHuber(0.5), 4.0)], ids=["L2", "PseudoHuber"]
)
def test_penalised_coefficients(slopes: Any, penalty: Any, reml: bool) -> None:
    """statsmodels leaves the coefficients where they were, and moves the variances."""
    result = slopes.fit(fe_pen=penalty, reml=reml)
    assert result.converged

    def objective(x: np.ndarray) -> float:
        at = MixedLMParams.from_packed(x, 3, 2, use_sqrt=True, has_fe=True)
        value = log_likelihood(slopes, at.fe_params, at.cov_re, at.vcomp, reml)
        return float(np.sum(penalty.func(at.fe_params))) - value

    x = result.params_object.get_packed(use_sqrt=True, has_fe=True)
    np.testing.assert_allclose(result.llf, -objective(x), rtol=1e-12)
    slope = approx_fprime(x, objective, epsilon=1e-5, centered=True)
    np.testing.assert_allclose(slope, 0.0, atol=1e-6)
    for start in ([0.0, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0], [2.0, -1.0, 1.0, 0.5, 0.3, 2.0, 0.2]):
        best = minimize(objective, start, method="BFGS", options={"gtol": 1e-5})
        assert -objective(x) >= -best.fun - 1e-7
        np.testing.assert_allclose(best.x[:3], x[:3], atol=1e-4)


def test_penalised_covariance(slopes: Any) -> None:
    """A barrier against singular matrices; the slope of the penalised likelihood is zero."""
    result = slopes.fit(cov_pen=PSD(0.5))
    assert result.converged

    def objective(x: np.ndarray) -> float:
        at = MixedLMParams.from_packed(x, 3, 2, use_sqrt=True, has_fe=True)
        barrier = -0.5 * np.linalg.slogdet(at.cov_re)[1]
        return barrier - log_likelihood(slopes, at.fe_params, at.cov_re, at.vcomp, True)

    x = result.params_object.get_packed(use_sqrt=True, has_fe=True)
    np.testing.assert_allclose(result.llf, -objective(x), rtol=1e-12)
    slope = approx_fprime(x, objective, epsilon=1e-5, centered=True)
    np.testing.assert_allclose(slope, 0.0, atol=1e-6)


def test_no_penalty_is_the_plain_fit(slopes: Any, plain: Any) -> None:
    result = slopes.fit(fe_pen=_weighted(L2(), 0.0))
    np.testing.assert_allclose(result.params, plain.params, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(result.llf, plain.llf, rtol=1e-11)


def test_penalty_object_of_fit_regularized(slopes: Any) -> None:
    penalty = L2()
    given = slopes.fit_regularized(method=penalty, alpha=3.0)
    assert penalty.alpha == 3.0
    np.testing.assert_allclose(given.params, slopes.fit(fe_pen=penalty).params, rtol=1e-6)


# --- L1 -------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 10.0, 40.0, [0.0, 60.0, 5.0], 1e6])
def test_lasso(slopes: Any, plain: Any, alpha: Any) -> None:
    """Subgradient of ``r'V^-1 r + sum alpha |b|``, and a direct minimiser on split variables."""
    result = slopes.fit_regularized(alpha=alpha)
    assert result.converged
    V = plain.scale * whole_covariance(slopes, plain.cov_re_unscaled, plain.params_object.vcomp)
    X, y = slopes.exog, slopes.endog
    weights = np.asarray(alpha) * np.ones(3)
    b = result.fe_params.to_numpy()
    slope = 2.0 * X.T @ np.linalg.solve(V, y - X @ b)
    active = b != 0.0
    np.testing.assert_allclose(slope[active], weights[active] * np.sign(b[active]), atol=1e-6)
    assert (np.abs(slope[~active]) <= weights[~active] * (1 + 1e-12)).all()

    A, c = X.T @ np.linalg.solve(V, X), X.T @ np.linalg.solve(V, y)

    def objective(parts: np.ndarray) -> tuple[float, np.ndarray]:
        up, down = np.split(parts, 2)
        beta = up - down
        value = beta @ A @ beta - 2 * c @ beta + weights @ (up + down)
        g = 2 * (A @ beta - c)
        return float(value), np.concatenate([g + weights, weights - g])

    best = minimize(
        objective,
        np.ones(6),
        jac=True,
        bounds=[(0, None)] * 6,
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    up, down = np.split(best.x, 2)
    np.testing.assert_allclose(b, up - down, atol=2e-5)
    # The variances are those of the plain fit, the scale its own.
    np.testing.assert_array_equal(result.params[3:], plain.params[3:])
    assert np.isnan(result.bse_fe[~active]).all()
    expected = np.linalg.inv(A[np.ix_(active, active)])
    sd = np.sqrt(np.diag(expected) * result.scale / plain.scale)
    np.testing.assert_allclose(result.bse_fe[active], sd, rtol=1e-9)
    own = log_likelihood(slopes, b, plain.cov_re_unscaled, plain.params_object.vcomp, True)
    np.testing.assert_allclose(result.llf, own, rtol=1e-12)
    assert np.isnan(result.aic) and len(result.random_effects) == 15
    np.testing.assert_allclose(result.resid, y - result.fittedvalues, rtol=0, atol=1e-12)
    assert "z1" in str(result.summary())


def test_lasso_without_weight_is_the_plain_fit(slopes: Any, plain: Any) -> None:
    result = slopes.fit_regularized(alpha=0)
    np.testing.assert_allclose(result.bse, plain.bse, rtol=1e-9)
    np.testing.assert_allclose(result.llf, plain.llf, rtol=1e-12)


@pytest.mark.parametrize("alpha", [-1.0, [1.0, 2.0], [1.0, np.nan, 1.0]])
def test_wrong_weights(slopes: Any, alpha: Any) -> None:
    with pytest.raises(ValueError, match="alpha must be a number or 3 numbers"):
        slopes.fit_regularized(alpha=alpha)
    with pytest.raises(ValueError, match="method='l2' must be 'l1' or a Penalty"):
        slopes.fit_regularized(method="l2")


# --- starts and optimizers ------------------------------------------------------------------


def test_starts_are_hints(slopes: Any, plain: Any) -> None:
    for start in (
        START,
        theirs.MixedLMParams.from_components(np.zeros(3), np.eye(2), vcomp=np.ones(1)),
        plain.params,
        plain.params.to_numpy()[3:],
        MixedLMParams.from_components(np.zeros(3), np.array([[1.0, 2.0], [2.0, 1.0]]), None, [1.0]),
        MixedLMParams.from_components(cov_re=np.eye(2), vcomp=np.ones(1)),
    ):
        result = slopes.fit(start_params=start)
        np.testing.assert_allclose(result.llf, plain.llf, rtol=1e-12)
        np.testing.assert_allclose(result.params, plain.params, rtol=1e-6)


def test_wrong_starts(slopes: Any) -> None:
    with pytest.raises(ValueError, match="invalid start_params: 3 numbers"):
        slopes.fit(start_params=np.ones(3))
    with pytest.raises(ValueError, match="start_params has covariances that are missing"):
        slopes.fit(start_params=np.full(4, np.nan))
    with pytest.raises(ValueError, match=r"start_params has \(2, 2, 1\) coefficients"):
        slopes.fit(start_params=MixedLMParams.from_components(np.ones(2), np.eye(2), None, [1.0]))
    indefinite = MixedLMParams.from_components(np.zeros(3), np.array([[1, 2], [2, 1]]), None, [1.0])
    with pytest.raises(ValueError, match="not positive semidefinite"):
        slopes.fit(start_params=indefinite, do_cg=False)


def test_no_optimization(slopes: Any) -> None:
    """``do_cg=False``, at which statsmodels fails, gives results at the start."""
    result = slopes.fit(start_params=START, do_cg=False)
    expected = log_likelihood(slopes, result.fe_params, START.cov_re, START.vcomp, True)
    np.testing.assert_allclose(result.params[3:], START.get_packed(False), atol=1e-13)
    best, _ = slopes.get_fe_params(START.cov_re, START.vcomp)
    np.testing.assert_allclose(result.fe_params, best, rtol=1e-12)
    np.testing.assert_allclose(result.llf, expected, rtol=1e-12)
    assert not result.converged


def test_optimizers_are_noted_once(slopes: Any, plain: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(estimation, "_noted", set())
    with pytest.warns(estimation.OptimizerNote, match="method, gtol, maxiter"):
        result = slopes.fit(method=["nm", "bfgs"], gtol=0.1, maxiter=1)
    assert result.llf == plain.llf
    slopes.fit(method="powell", maxiter=3)  # no more notes
    with pytest.warns(estimation.OptimizerNote, match="niter_sa"):
        slopes.fit(niter_sa=2)
    for method in ("newton", "ncg"):
        with pytest.raises(ValueError, match=f"method {method} not available"):
            slopes.fit(method=method)
    with pytest.warns(FutureWarning, match="Arguments cov_type, weights not used"):
        slopes.fit(weights=1, cov_type="HC1")
    with pytest.raises(ValueError, match="fe_cov='HC'"):
        slopes.fit(fe_cov="HC")


def test_record_of_the_optimization(slopes: Any, plain: Any) -> None:
    assert plain.hist is None
    (record,) = slopes.fit(full_output=True).hist
    assert record["converged"] and record["iterations"] >= 1
    np.testing.assert_allclose(record["fopt"], -plain.llf / plain.nobs)
    assert np.abs(record["gopt"]).max() < 1e-6


# --- what can be estimated ------------------------------------------------------------------


def test_collinear_columns() -> None:
    """statsmodels fails with a singular matrix; the fit is that without the last of them."""
    exog = DATA[["x", "z2"]].assign(const=1.0)
    with pytest.warns(RankWarning, match="linear combinations of others.*: again"):
        result = MixedLM(DATA.y, exog.assign(again=exog.x - exog.const), DATA.g).fit(reml=False)
    expected = MixedLM(DATA.y, exog, DATA.g).fit(reml=False)
    assert np.isnan(result.fe_params["again"]) and np.isnan(result.bse_fe["again"])
    assert result.df_resid == expected.df_resid == 87
    np.testing.assert_allclose(result.llf, expected.llf, rtol=1e-12)
    np.testing.assert_allclose(result.fe_params[:3], expected.fe_params, rtol=1e-9)
    np.testing.assert_allclose(result.bse_fe[:3], expected.bse_fe, rtol=1e-9)
    np.testing.assert_allclose(result.predict(), expected.predict(), rtol=1e-9)
    # Hypotheses, draws and replicates are those of the columns that have coefficients.
    mine, other = result.t_test("x = 0.1"), expected.t_test("x = 0.1")
    np.testing.assert_allclose(mine.pvalue, other.pvalue, rtol=1e-8)
    mine, other = (each.wald_test("x = z2, const = 0", scalar=True) for each in (result, expected))
    np.testing.assert_allclose(mine.statistic, other.statistic, rtol=1e-8)
    with pytest.raises(ValueError, match="hypothesis is on 'again', which has no coefficient"):
        result.t_test("again = 0")
    draws = [
        each.model.get_distribution(each.params, each.scale).rvs(rng=np.random.RandomState(2))
        for each in (result, expected)
    ]
    np.testing.assert_allclose(*draws, rtol=1e-8, atol=1e-8)
    mean, _, replicates = result.bootstrap(3, rng=1)
    assert np.isnan(replicates[:, 3]).all() and np.isfinite(np.delete(mean, 3)).all()


def test_generalised_least_squares_errors(slopes: Any, plain: Any) -> None:
    """Standard errors of coefficients are those that lme4 gives, without the cross block."""
    V = whole_covariance(slopes, plain.cov_re_unscaled, plain.params_object.vcomp)
    expected = plain.scale * np.linalg.inv(slopes.exog.T @ np.linalg.solve(V, slopes.exog))
    np.testing.assert_allclose(plain.cov_params().iloc[:3, :3], expected, rtol=1e-10)
    assert not plain.cov_params().iloc[:3, 3:].to_numpy().any()


# --- draws ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nested", "arrays", "default"])
def test_draws_are_those_of_statsmodels(name: str) -> None:
    """Where it draws at all, a seed gives the same response."""
    found, expected = pair(name)
    result = fit(found)
    params, scale = np.asarray(result.params), result.scale
    draws = [
        model.get_distribution(params, scale, model.exog).rvs(1, np.random.RandomState(3))
        for model in (found, expected)
    ]
    np.testing.assert_allclose(*draws, rtol=1e-12, atol=1e-12)
    again = found.get_distribution(result.params, scale).rvs(None, np.random.RandomState(3))
    np.testing.assert_array_equal(draws[0], again)


def test_draws_of_components_alone() -> None:
    """Their covariance over 4,000 draws, at which statsmodels fails; error 1/sqrt(4000) each."""
    model = mixedlm("y ~ x", DATA[:12], groups="g", vc_formula={"v": "0 + C(v)", "z": "0 + z1"})
    params = pd.Series([1.0, 2.0, 0.5, 0.3])
    rng = np.random.default_rng(7)
    law = model.get_distribution(params, 2.0)
    draws = np.array([law.rvs(rng=rng) for _ in range(4000)])
    np.testing.assert_allclose(draws.mean(axis=0), model.exog @ [1.0, 2.0], atol=0.15)
    V = 2.0 * whole_covariance(model, None, [0.5, 0.3])
    np.testing.assert_allclose(np.cov(draws.T), V, atol=0.12 * np.diag(V).max())
    with pytest.raises(ValueError, match="exog has 3 rows; it needs 12"):
        model.get_distribution(params, 2.0, np.ones((3, 2)))


# --- the likelihood as a function -----------------------------------------------------------


def test_likelihood_before_any_fit() -> None:
    model = MixedLM(DATA.y, DATA[["x"]], DATA.g)
    value = model.loglike(np.array([0.8]))
    expected = log_likelihood(
        model, model.get_fe_params(np.array([[0.64]]), [])[0], [[0.64]], [], True
    )
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    assert model.score(np.array([0.8])).shape == (1,)


@pytest.mark.parametrize(
    ("cov_re", "vcomp"), [(np.eye(3), [1.0]), (np.eye(2), []), (np.eye(2), [1.0, 1.0])]
)
def test_parameters_of_another_shape(slopes: Any, cov_re: Any, vcomp: Any) -> None:
    with pytest.raises(ValueError, match="2 random effects and 1 variance components"):
        slopes.get_fe_params(cov_re, vcomp)
    with pytest.raises(ValueError, match=r"params has shape \(2,\)"):
        slopes.loglike(np.ones(2))
    with pytest.raises(ValueError, match="vcomp 2 entries"):
        slopes.loglike(np.ones(5))


def test_covariances_that_are_none() -> None:
    """A relative covariance that is indefinite has a likelihood where V is positive definite."""
    model = pair("arrays")[0]
    cov_re = np.array([[1.0, 1.05], [1.05, 1.0]])
    point = MixedLMParams.from_components(np.array([1.0, 0.5]), cov_re)
    assert np.linalg.eigvalsh(whole_covariance(model, cov_re, []))[0] > 0.0
    expected = log_likelihood(model, point.fe_params, cov_re, [], True)
    np.testing.assert_allclose(model.loglike(point, profile_fe=False), expected, rtol=1e-12)


def test_indefinite_covariances_with_several_factors() -> None:
    model = pair("nested")[0]
    with pytest.raises(ValueError, match="must be positive semidefinite"):
        model.loglike(MixedLMParams.from_components(np.zeros(2), np.eye(1), None, [-0.1]))


def test_a_plain_fit_warns_of_nothing(slopes: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert slopes.fit(reml=False).converged
