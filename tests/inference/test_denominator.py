"""Degrees of freedom against the n x n formulas of the papers, on small random designs.

The values of lmerTest, pbkrtest and nlme are in tests/test_reference.py and
tests/reference/test_nlme.py.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest

import lmmax
from lmmax.design import build_design
from lmmax.fit import prepare
from lmmax.inference import between_within
from lmmax.options import DDF_METHODS
from tests.oracles.dense import Factor, Model
from tests.oracles.designs import Problem, simulate
from tests.oracles.problems import simulate as simulate_one

KINDS = (
    "one_factor",
    "nested_slope",
    "weights",
    "crossed_slopes",
    "terms_of_one_factor",
    "related_slope",
)
L = np.array([[1.0, -2.0], [0.5, 1.0]])
CORRELATIONS = {"ar1": "cor(lag 1)", "homcs": "cor"}


class Dense(NamedTuple):
    """A fitted model as n x n matrices: covariance, its first and second derivatives, design."""

    Sigma: np.ndarray
    G: list[np.ndarray]
    second: dict[tuple[int, int], np.ndarray]
    X: np.ndarray
    y: np.ndarray


class OneFactor(NamedTuple):
    """What the tests use of a simulated problem, with one factor."""

    model: Model

    def by_term(self, cov_re: np.ndarray) -> np.ndarray:
        return cov_re

    def by_factor(self, covs: np.ndarray) -> list[np.ndarray]:
        return [covs]

    def pairs(self) -> list[list[tuple[int, int]]]:
        return [[(0, 0), (1, 0), (1, 1)]]


@cache
def fitted(kind: str, reml: bool = True) -> tuple[lmmax.Fit, Problem | OneFactor]:
    if kind == "one_factor":
        made = simulate_one(0, 2, True)
        y, X, codes, Z, weights = (made[k] for k in ("y", "X", "codes", "Z", "weights"))
        fit = lmmax.fit_arrays(y, X[:, :2], codes, Z, weights=weights, reml=reml)
        assert not fit.singular
        return fit, OneFactor(Model(y, X[:, :2], (Factor(codes, Z),), weights))
    case = simulate(kind, 1)
    fit = lmmax.fit(
        case.formula, case.data, reml=reml, weights=case.weights, relmat=case.relmat or None
    )
    return fit, case


def dense_of(fit: lmmax.Fit, case: Problem | OneFactor) -> Dense:
    model = case.model
    cov_re = fit.cov_re.to_numpy()
    covs = case.by_factor(case.by_term(cov_re))
    G = []
    for factor, entries in zip(model.factors, case.pairs(), strict=True):
        for r, c in entries:
            outer = np.outer(factor.Z[:, r], factor.Z[:, c])
            G.append(factor.related() * (outer if r == c else outer + outer.T))
    n = len(model.y)
    G.append(np.diag(np.ones(n) if model.weights is None else 1.0 / model.weights))
    return Dense(model.covariance(covs, fit.scale), G, {}, model.X, model.y)


def projection(at: Dense) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    inverse = np.linalg.inv(at.Sigma)
    Phi = np.linalg.inv(at.X.T @ inverse @ at.X)
    return inverse, Phi, inverse - inverse @ at.X @ Phi @ at.X.T @ inverse


def kenward_roger(at: Dense) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[np.ndarray]]:
    """Phi, adjusted Phi, W and P_i, as in section 2 of the paper; P_i has its sign."""
    inverse, Phi, R = projection(at)
    k = len(at.G)
    information = np.empty((k, k))
    for i in range(k):
        for j in range(k):
            information[i, j] = 0.5 * np.trace(R @ at.G[i] @ R @ at.G[j])
    W = np.linalg.inv(information)
    half = inverse @ at.X
    P = [-half.T @ g @ half for g in at.G]
    total = np.zeros_like(Phi)
    for i in range(k):
        for j in range(k):
            Q = half.T @ at.G[i] @ inverse @ at.G[j] @ half
            curved = at.second.get((i, j))
            bend = 0.0 if curved is None else half.T @ curved @ half
            total = total + W[i, j] * (Q - P[i] @ Phi @ P[j] - 0.25 * bend)
    return Phi, Phi + 2.0 * Phi @ total @ Phi, W, P


def kenward_roger_f(at: Dense, L: np.ndarray, beta: np.ndarray) -> tuple[float, float]:
    """The scaled F statistic and its degrees of freedom, as in section 3 of the paper."""
    Phi, adjusted, W, P = kenward_roger(at)
    ell = len(L)
    Theta = L.T @ np.linalg.inv(L @ Phi @ L.T) @ L
    M = [Theta @ Phi @ p @ Phi for p in P]
    k = len(P)
    A1 = sum(W[i, j] * np.trace(M[i]) * np.trace(M[j]) for i in range(k) for j in range(k))
    A2 = sum(W[i, j] * np.trace(M[i] @ M[j]) for i in range(k) for j in range(k))
    B = (A1 + 6 * A2) / (2 * ell)
    g = ((ell + 1) * A1 - (ell + 4) * A2) / ((ell + 2) * A2)
    base = 3 * ell + 2 * (1 - g)
    c1, c2, c3 = g / base, (ell - g) / base, (ell + 2 - g) / base
    mean = 1 / (1 - A2 / ell)
    variance = (2 / ell) * (1 + c1 * B) / ((1 - c2 * B) ** 2 * (1 - c3 * B))
    rho = variance / (2 * mean**2)
    m = 4 + (ell + 2) / (ell * rho - 1)
    lam = m / (mean * (m - 2))
    difference = L @ beta
    F = difference @ np.linalg.solve(L @ adjusted @ L.T, difference) / ell
    return lam * F, m


def satterthwaite(at: Dense, L: np.ndarray, reml: bool, average: bool = False) -> np.ndarray:
    """With the observed information, or the mean of observed and expected, without traces."""
    inverse, Phi, R = projection(at)
    T = R if reml else inverse
    Ry = R @ at.y
    forms = np.array([[Ry @ a @ R @ b @ Ry for b in at.G] for a in at.G])
    traces = np.array([[np.trace(T @ a @ T @ b) for b in at.G] for a in at.G])
    information = 0.5 * forms if average else forms - 0.5 * traces
    A = np.linalg.inv(information)
    half = inverse @ at.X @ Phi
    found = []
    for row in L:
        g = np.array([row @ half.T @ d @ half @ row for d in at.G])
        found.append(2.0 * (row @ Phi @ row) ** 2 / (g @ A @ g))
    return np.array(found)


@pytest.mark.parametrize("kind", KINDS)
def test_kenward_roger_is_that_of_the_paper(kind: str) -> None:
    fit, case = fitted(kind)
    at = dense_of(fit, case)
    Phi, adjusted, W, P = kenward_roger(at)
    test = fit.denominator("kenward-roger")
    np.testing.assert_allclose(test.cov, adjusted, rtol=1e-9)
    v = L @ Phi
    g = np.einsum("ix,cxy,iy->ic", v, np.array(P), v)
    df = 2.0 * np.einsum("ix,ix->i", v, L) ** 2 / np.einsum("ic,cd,id->i", g, W, g)
    np.testing.assert_allclose(test.degrees(L), df, rtol=1e-9)
    beta = fit.params.to_numpy()
    F, m = kenward_roger_f(at, L, beta)
    joint = test.joint(L, L @ beta)
    assert joint.statistic == pytest.approx(F, rel=1e-9)
    assert joint.df_den == pytest.approx(m, rel=1e-9)
    linear = fit.denominator("kenward-roger-linear")
    np.testing.assert_array_equal(linear.cov, test.cov)


@pytest.mark.parametrize("reml", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_satterthwaite_is_its_definition(kind: str, reml: bool) -> None:
    fit, case = fitted(kind, reml)
    expected = satterthwaite(dense_of(fit, case), L, reml)
    np.testing.assert_allclose(fit.denominator().degrees(L), expected, rtol=1e-6)


def structured(structure: str) -> tuple[lmmax.Fit, Dense]:
    """A fit with a structured term, its covariance as one of variance and correlation."""
    rng = np.random.default_rng(4)
    codes, times = np.repeat(np.arange(12), 10), np.tile(np.repeat(np.arange(5), 2), 12)
    x = rng.normal(size=120)
    root = np.linalg.cholesky(0.6 ** np.abs(np.subtract.outer(np.arange(5), np.arange(5))))
    effects = 1.5 * rng.normal(size=(12, 5)) @ root.T
    y = 1.0 + 0.5 * x + effects[codes, times] + rng.normal(size=120)
    data = pd.DataFrame({"y": y, "x": x, "t": times, "g": codes.astype(str)})
    fit = lmmax.fit(f"y ~ x + {structure}(0 + C(t) | g)", data)
    same = codes[:, None] == codes
    lag = np.abs(np.subtract.outer(times, times))

    def covariance(tau: np.ndarray) -> np.ndarray:
        rho = tau[1] ** lag if structure == "ar1" else np.where(lag == 0, 1.0, tau[1])
        return tau[0] * rho * same + tau[2] * np.eye(120)

    tau = np.array([*fit.structures()["estimate"] ** [2, 1], fit.scale])
    h = 1e-20

    def slope(tau: np.ndarray, i: int) -> np.ndarray:
        return np.asarray(covariance(tau + 1j * h * np.eye(3)[i]).imag / h)

    step = 1e-5 * tau
    second = {
        (i, j): (slope(tau + step * np.eye(3)[j], i) - slope(tau - step * np.eye(3)[j], i))
        / (2.0 * step[j])
        for i in range(3)
        for j in range(3)
    }
    G = [slope(tau, i) for i in range(3)]
    return fit, Dense(covariance(tau), G, second, np.column_stack([np.ones(120), x]), y)


@pytest.mark.parametrize("structure", ["ar1", "homcs"])
def test_structures_by_variance_and_correlation(structure: str) -> None:
    """Kenward and Roger's second derivatives are there, and the linear method leaves them out."""
    fit, at = structured(structure)
    assert fit.natural_parameters.names == ("g: var", f"g: {CORRELATIONS[structure]}", "scale")
    for ddf, used in (("kenward-roger", at), ("kenward-roger-linear", at._replace(second={}))):
        _, adjusted, _, _ = kenward_roger(used)
        np.testing.assert_allclose(fit.denominator(ddf).cov, adjusted, rtol=1e-7)
    F, m = kenward_roger_f(at, L, fit.params.to_numpy())
    joint = fit.denominator("kenward-roger").joint(L, L @ fit.params.to_numpy())
    assert (joint.statistic, joint.df_den) == pytest.approx((F, m), rel=1e-7)


def test_iterative_engine_uses_the_average_information() -> None:
    """Its slopes are exact; the average information replaces the observed one."""
    case = simulate("crossed", 1)
    iterative = lmmax.fit(case.formula, case.data, engine="iterative")
    Phi, P, to_x = iterative.covariance_slopes
    exact = lmmax.fit(
        case.formula,
        case.data,
        fix={"cov_re": iterative.cov_re.to_numpy(), "scale": iterative.scale},
    )
    target = exact.sensitivity
    np.testing.assert_allclose(to_x @ Phi @ to_x.T, exact.cov_params(), rtol=1e-7)
    moved = np.einsum("ax,cxy,by->cab", to_x @ Phi, P, to_x @ Phi)
    expected = np.einsum(
        "ax,cxy,by->cab", target.to_x @ target.Phi, target.P_x, target.to_x @ target.Phi
    )
    np.testing.assert_allclose(moved, expected, rtol=1e-6, atol=1e-12 * np.abs(expected).max())
    average = satterthwaite(dense_of(iterative, case), np.eye(2), True, average=True)
    np.testing.assert_allclose(iterative.coefficients()["df"], average, rtol=1e-5)
    with pytest.raises(lmmax.EngineError, match="ddf='satterthwaite', or engine='crossed'"):
        iterative.coefficients("kenward-roger")


def test_errors(sleepstudy_slope: lmmax.Fit) -> None:
    ml = sleepstudy_slope.refit_ml()
    with pytest.raises(ValueError, match=r"defined for REML fits.*fit with reml=True"):
        ml.coefficients(ddf="kenward-roger")
    with pytest.raises(ValueError, match="ddf='kenward' is unknown; use one of 'satterthwaite'"):
        ml.t_test("Days", ddf="kenward")
    crossed, _ = fitted("crossed")
    with pytest.raises(ValueError, match=r"'b' crosses 'a'; use ddf='satterthwaite'"):
        crossed.f_test("x", ddf="between-within")


def test_what_is_fixed_has_no_uncertainty(sleepstudy_slope: lmmax.Fit) -> None:
    """With all variances known the tests are normal ones."""
    cov, scale = sleepstudy_slope.cov_re.to_numpy(), sleepstudy_slope.scale
    data = lmmax.datasets.load("sleepstudy")
    known = lmmax.fit(sleepstudy_slope.formula, data, fix={"cov_re": cov, "scale": scale})
    assert np.isinf(known.coefficients()["df"]).all()
    assert np.isinf(known.coefficients("kenward-roger")["df"]).all()
    normal = known.coefficients("normal")["p"]
    np.testing.assert_allclose(known.pvalues, normal, rtol=1e-12)


@pytest.mark.parametrize("ddf", DDF_METHODS)
def test_one_contrast_is_its_own_joint_test(sleepstudy_slope: lmmax.Fit, ddf: str) -> None:
    test = sleepstudy_slope.denominator(ddf)
    beta = sleepstudy_slope.params.to_numpy()
    for row in L:
        joint = test.joint(row[None], np.atleast_1d(row @ beta))
        t = (row @ beta) / test.errors(row[None])[0]
        assert joint.statistic == pytest.approx(t**2, rel=1e-12)
        assert joint.df_den == pytest.approx(test.degrees(row[None])[0], rel=1e-12)
        assert joint.pvalue == pytest.approx(
            sleepstudy_slope.t_test(row, ddf=ddf).table["p"].iloc[0], rel=1e-9
        )


@pytest.mark.parametrize("own_slopes", [0.0, 1.0], ids=["singular", "regular"])
def test_degrees_of_freedom_do_not_depend_on_the_origin_of_a_covariate(own_slopes: float) -> None:
    rng = np.random.default_rng(3)
    g = np.repeat(np.arange(30), 6)
    x = rng.uniform(-1.0, 1.0, len(g))
    b = rng.normal(size=(2, 30))
    y = 1.0 + 0.5 * x + b[0, g] * (1.0 + 0.8 * x) + own_slopes * b[1, g] * x
    y += rng.normal(size=len(g))
    found = []
    for origin in (0.0, 1000.0):
        data = pd.DataFrame({"y": y, "x": origin + 10.0 * x, "g": g})
        fit = lmmax.fit("y ~ x + (1 + x | g)", data)
        assert fit.singular == (own_slopes == 0.0)
        # The mean at the middle of x, and the slope.
        found.append(fit.denominator().degrees(np.array([[1.0, origin], [0.0, 1.0]])))
    # The search ends within 1e-8 standard errors of the optimum.
    np.testing.assert_allclose(found[1], found[0], rtol=1e-9)


# nlme 3.1: lme(y ~ ..., random = ~ 1 | g) or ~ 1 | g/s, and its fixDF$X.
NLME = [
    ("x", "g", [24, 24]),
    ("x", "g/s", [15, 9]),
    ("0 + f", "g", [23, 23, 23]),
    ("0 + f", "g/s", [8, 8, 8]),
    ("0 + t + x", "g", [3, 3, 25]),
    ("0 + t + x", "g/s", [3, 3, 10]),
    ("1", "g", [25]),
    ("1", "g/s", [15]),
    ("x + z + w", "g/s", [15, 7, 7, 7]),
    ("0 + t", "g/s", [3, 3]),
    ("t + f", "g", [23, 3, 23, 23]),
    ("t + f", "g/s", [15, 3, 8, 8]),
]


@pytest.mark.parametrize(("fixed", "groups", "df"), NLME)
def test_between_within_counts_as_nlme(fixed: str, groups: str, df: list[float]) -> None:
    i = np.arange(30)
    data = pd.DataFrame({"g": i // 6, "x": i * 7 % 11, "z": i * 5 % 7, "w": i * 3 % 13})
    data["s"] = np.array([0, 0, 1, 1, 2, 3])[i % 6]
    data["f"], data["t"] = np.array(list("abc"))[i % 3], np.array(list("AB"))[i // 6 % 2]
    data["y"] = i * i % 17 / 5.0
    # What a fit is before it is solved has all that is counted.
    prepared = prepare(build_design(f"y ~ {fixed} + (1 | {groups})", data))
    assert between_within.degrees(prepared).tolist() == df  # type: ignore[arg-type]
