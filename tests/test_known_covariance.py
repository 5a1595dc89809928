"""Covariances of which some entries are known, against the dense oracle and other structures."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize

import lmmax
from lmmax.covariances import Effects, matrix_at, slopes
from lmmax.known_covariance import PartlyKnown
from tests import compiled
from tests.oracles.dense import Array, Factor, Model

pytestmark = pytest.mark.unoptimised

GROUPS, ROWS = 24, 5
# A covariance whose entries are held in turn; correlations of 0.25 to 0.4.
GIVEN = np.array([[0.8, 0.3, 0.2], [0.3, 1.1, 0.25], [0.2, 0.25, 0.6]])
TRUE = np.array([[1.2, 0.4, -0.3], [0.4, 0.9, 0.2], [-0.3, 0.2, 0.7]])


def simulate(cov: Array, seed: int = 3) -> pd.DataFrame:
    """Groups with three random effects, and a second factor that crosses them, without effects."""
    rng = np.random.Generator(np.random.PCG64(seed))
    g = np.repeat(np.arange(GROUPS), ROWS)
    z = rng.standard_normal((len(g), 2))
    Z = np.column_stack([np.ones(len(g)), z])
    values, vectors = np.linalg.eigh(cov)
    root = vectors * np.sqrt(values.clip(min=0.0))
    effects = rng.standard_normal((GROUPS, 3)) @ root.T
    y = 1.0 + 0.5 * z[:, 0] + np.sum(Z * effects[g], axis=1) + rng.standard_normal(len(g))
    h = rng.permutation(len(g)) % 6
    return pd.DataFrame({"y": y, "u": z[:, 0], "v": z[:, 1], "g": g, "h": h})


@pytest.fixture(scope="module")
def data() -> pd.DataFrame:
    return simulate(TRUE)


def design(data: pd.DataFrame) -> tuple[Array, Array, Array]:
    ones = np.ones(len(data))
    X = np.column_stack([ones, data["u"]])
    return data["y"].to_numpy(), X, np.column_stack([ones, data["u"], data["v"]])


def fit_known(data: pd.DataFrame, known: Any, q: int, **options: Any) -> lmmax.Fit:
    y, X, Z = design(data)
    names = ["one", "u", "v"][:q]
    return lmmax.fit_arrays(y, X, data["g"], Z[:, :q], covariance=known, z_names=names, **options)


def dense(data: pd.DataFrame, q: int) -> Model:
    y, X, Z = design(data)
    return Model(y, X, (Factor(data["g"].to_numpy(), Z[:, :q]),))


def lower(mask: str) -> Array:
    """`"1 01"` -> [[1, 0], [0, 1]]: rows of the lower triangle, 1 where an entry is free."""
    rows = mask.split()
    out = np.zeros((len(rows), len(rows)), dtype=bool)
    for i, row in enumerate(rows):
        out[i, : i + 1] = [entry == "1" for entry in row]
    return out


def held(mask: Array, given: Array = GIVEN) -> Array:
    """A covariance with the held entries, zeros in the others."""
    free = mask | mask.T
    return np.where(free, 0.0, given[: len(mask), : len(mask)])


def slope_of(function: Callable[[Array], Array], x: Array) -> Array:
    """Derivatives of a vector function by complex steps."""
    return np.array([np.imag(function(x + 1e-30j * e)) / 1e-30 for e in np.eye(len(x))]).T


class Dense:
    """The dense criterion in parameters x of a relative covariance and the logarithm of the scale.

    Args:
        model: the dense model.
        covariance: from x to the relative covariance.
        reml: which criterion.
    """

    def __init__(self, model: Model, covariance: Callable[[Array], Array], reml: bool) -> None:
        self.model, self.covariance, self.reml = model, covariance, reml

    def natural(self, x: Array) -> Array:
        """The lower triangle of the natural covariance row by row, then the scale."""
        D, scale = self.covariance(x[:-1]), np.exp(x[-1])
        return np.append(scale * D[np.tril_indices(len(D))], scale)

    def value(self, x: Array) -> float:
        D, scale = self.covariance(x[:-1]), np.exp(x[-1])
        try:
            return float(self.model.natural_criterion([scale * D], scale, self.reml))
        except ValueError:  # outside of the positive definite covariances of the data
            return 1e6

    def gradient(self, x: Array) -> Array:
        D, scale = self.covariance(x[:-1]), np.exp(x[-1])
        pairs = [list(zip(*np.tril_indices(len(D)), strict=True))]
        score, _ = self.model.score_and_information([scale * D], scale, self.reml, pairs)
        return -2.0 * score @ slope_of(self.natural, x)

    def hessian(self, x: Array, h: float = 1e-5) -> Array:
        units = h * np.eye(len(x))
        H = np.array([(self.gradient(x + e) - self.gradient(x - e)) / (2 * h) for e in units])
        return 0.5 * (H + H.T)

    def optimum(self, x: Array) -> Array:
        """The minimum from x: a simplex, then Newton."""
        options = {"xatol": 1e-3, "fatol": 1e-5, "maxiter": 3000}
        x = minimize(self.value, x, method="Nelder-Mead", options=options).x
        assert np.linalg.eigvalsh(self.hessian(x))[0] > 0.0
        for _ in range(3):
            x = x - np.linalg.solve(self.hessian(x), self.gradient(x))
        return x


# Every mask by REML; by ML, which takes the same code, one of each kind.
SEARCHED = [
    ("0", "covariance", True),
    ("0 11", "covariance", True),
    ("0 11", "covariance", False),
    ("1 01", "covariance", True),
    ("0 10", "covariance", True),
    ("1 11 101", "covariance", True),
    ("1 11 101", "covariance", False),
    ("0 10 011", "covariance", True),
    ("1 10", "factor", True),
    ("1 10", "factor", False),
    ("0 11 101", "factor", True),
]


@pytest.mark.parametrize(("mask", "of", "reml"), SEARCHED)
def test_optimum_over_the_free_entries(mask: str, of: str, reml: bool, data: pd.DataFrame) -> None:
    """Criterion to 1e-8 and estimates to 1e-6 of a dense search over the free entries."""
    free = lower(mask)
    q, model = len(free), dense(data, len(free))
    rows, columns = np.nonzero(free)
    base = np.tril(np.where(free, 0.0, GIVEN[:q, :q]))

    def covariance(x: Array) -> Array:
        L = base.astype(x.dtype)
        L[rows, columns] = x
        return L @ L.T if of == "factor" else L + np.tril(L, -1).T

    fit = fit_known(data, PartlyKnown(GIVEN[:q, :q], free, of), q, reml=reml)
    assert fit.converged
    assert not fit.singular
    assert fit.n_params == 2 + len(rows) + 1
    oracle = Dense(model, covariance, reml)
    x = oracle.optimum(np.append(np.where(rows == columns, 1.0, 0.1), 0.0))
    best, scale = covariance(x[:-1]), np.exp(x[-1])
    assert np.linalg.eigvalsh(best)[0] > 0.01
    assert fit.deviance == pytest.approx(oracle.value(x), rel=1e-8)
    D = fit.cov_re.to_numpy() / fit.scale
    np.testing.assert_allclose(D, best, rtol=0, atol=1e-6)
    assert fit.scale == pytest.approx(scale, rel=1e-6)
    if of == "covariance":
        still = ~(free | free.T)
        np.testing.assert_allclose(D[still], GIVEN[:q, :q][still], rtol=1e-12)
    beta, cov = model.coefficients([scale * best], scale)
    np.testing.assert_allclose(fit.params, beta, rtol=1e-6)
    np.testing.assert_allclose(fit.cov_params(), cov, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("of", ["covariance", "factor"])
@pytest.mark.parametrize(("mask", "name"), [("1 01", "diag"), ("1 11", "us"), ("1", "us")])
def test_masks_that_are_other_structures(mask: str, name: str, of: str, data: pd.DataFrame) -> None:
    q = len(mask.split())
    given = np.diag([2.0, 3.0])[:q, :q]
    fit = fit_known(data, PartlyKnown(given, lower(mask), of), q)
    plain = fit_known(data, name, q)
    assert fit.deviance == pytest.approx(plain.deviance, rel=1e-10)
    np.testing.assert_allclose(fit.cov_re, plain.cov_re, rtol=1e-10)
    np.testing.assert_allclose(fit.theta, plain.theta, rtol=1e-10)
    assert fit.n_params == plain.n_params


def test_blocks_in_any_order(data: pd.DataFrame) -> None:
    """Effects 1 and 3 together, 2 apart: two terms of one factor."""
    known = PartlyKnown(np.zeros((3, 3)), lower("1 01 101"))
    term = lmmax.RandomTerm("1 + u + v", "g", known)
    fit = lmmax.fit(lmmax.ModelSpec("y", "u", [term]), data)
    terms = lmmax.fit("y ~ u + (1 + v | g) + (0 + u | g)", data)
    assert fit.deviance == pytest.approx(terms.deviance, rel=1e-10)
    assert fit.n_params == terms.n_params
    order = [0, 2, 1]
    np.testing.assert_allclose(
        fit.cov_re.to_numpy()[np.ix_(order, order)], terms.cov_re, rtol=1e-6, atol=1e-8
    )
    ours, theirs = fit.varcorr(), terms.varcorr()
    assert len(ours) == len(theirs)
    np.testing.assert_allclose(np.sort(ours["vcov_se"]), np.sort(theirs["vcov_se"]), rtol=1e-6)
    assert len(fit.theta) == 4
    again = lmmax.fit(fit.design.spec, data, start=fit.theta)
    assert again.deviance == pytest.approx(fit.deviance, rel=1e-12)
    assert again.estimates.solution.steps <= 3


def test_block_with_a_variance_of_zero() -> None:
    """The boundary of a block that is not contiguous is exact, and found by either model."""
    cov = TRUE * np.outer([1.0, 1.0, 0.0], [1.0, 1.0, 0.0])
    data = simulate(cov, seed=3)
    known = PartlyKnown(np.zeros((3, 3)), lower("1 01 101"))
    fit = lmmax.fit(lmmax.ModelSpec("y", "u", [lmmax.RandomTerm("1 + u + v", "g", known)]), data)
    terms = lmmax.fit("y ~ u + (1 + v | g) + (0 + u | g)", data)
    assert fit.singular == terms.singular
    assert fit.singular
    assert np.linalg.matrix_rank(fit.cov_re.to_numpy()) == 2
    assert fit.deviance == pytest.approx(terms.deviance, rel=1e-9)


@pytest.mark.parametrize("solver", ["newton", "lbfgs"])
@pytest.mark.parametrize("reml", [True, False])
def test_nothing_free(solver: str, reml: bool, data: pd.DataFrame) -> None:
    """Only the scale is estimated, in closed form; all tables work."""
    model = dense(data, 2)
    known = PartlyKnown(GIVEN[:2, :2], np.zeros((2, 2)))
    fit = fit_known(data, known, 2, reml=reml, solver=solver)
    assert fit.converged
    assert not fit.singular
    assert fit.n_params == 3
    Ds, scale = [GIVEN[:2, :2]], model.profiled_scale([GIVEN[:2, :2]], reml)
    assert fit.deviance == pytest.approx(model.criterion(Ds, reml), rel=1e-12)
    assert fit.scale == pytest.approx(scale, rel=1e-12)
    np.testing.assert_allclose(fit.cov_re, scale * GIVEN[:2, :2], rtol=1e-12)
    # The scale is a chi-squared over its degrees of freedom d: the variance is 2 scale^2 / d.
    d = len(data) - (2 if reml else 0)
    table = fit.varcorr()
    error = np.sqrt(2.0 / d)
    np.testing.assert_allclose(table["vcov_se"], np.abs(table["vcov"]) * error, rtol=1e-8)
    # Nothing but the scale is unknown, which leaves the t distribution with d degrees of freedom.
    np.testing.assert_allclose(fit.coefficients()["df"], d, rtol=1e-8)
    assert fit.natural_parameters.names == ("scale",)
    np.testing.assert_allclose(
        fit.natural_parameters.slope[:, 0], [*GIVEN[np.tril_indices(2)], 1.0], rtol=1e-12
    )
    assert fit.theta_parameters.names == ("scale",)
    assert fit.theta.shape == (0,)
    assert fit.structures().empty
    assert "known(" in str(fit.summary())
    if reml:
        np.testing.assert_allclose(fit.coefficients("kenward-roger")["df"], d, rtol=1e-8)


def test_saved_and_predicted(tmp_path: Path, data: pd.DataFrame) -> None:
    known = PartlyKnown(GIVEN[:2, :2], lower("0 11"))
    fit = fit_known(data, known, 2)
    fit.save(tmp_path / "fit")
    loaded = lmmax.load(tmp_path / "fit")
    _, X, Z = design(data)
    new = {"X": X[:7], "groups": data["g"].iloc[:7], "Z": Z[:7, :2]}
    np.testing.assert_allclose(loaded.predict(new), fit.fittedvalues.iloc[:7], rtol=1e-12)
    np.testing.assert_array_equal(loaded.varcorr()["vcov"], fit.varcorr()["vcov"])
    (modes,) = dense(data, 2).modes([fit.cov_re.to_numpy()], fit.scale)
    np.testing.assert_allclose(fit.random_effects, modes, rtol=0, atol=1e-8)
    table = fit.structures()
    assert list(table["parameter"]) == ["cor(one, u)", "sd(u)"]
    cov = fit.cov_re.to_numpy()
    sd = np.sqrt(np.diag(cov))
    np.testing.assert_allclose(table["estimate"], [cov[1, 0] / sd.prod(), sd[1]], rtol=1e-12)
    assert "cor(one, u)" in str(fit.summary())


def test_errors_from_the_dense_information(data: pd.DataFrame) -> None:
    """Standard errors of variances by the delta method; the natural parameters' derivatives."""
    known, model = PartlyKnown(GIVEN[:2, :2], lower("0 11")), dense(data, 2)
    fit = fit_known(data, known, 2)

    # In (D_10, D_11, log scale) at the optimum.
    def covariance(x: Array) -> Array:
        return np.array([[GIVEN[0, 0], x[0]], [x[0], x[1]]], dtype=x.dtype)

    oracle = Dense(model, covariance, True)
    D = fit.cov_re.to_numpy() / fit.scale
    x = np.array([D[1, 0], D[1, 1], np.log(fit.scale)])
    inverse = np.linalg.inv(0.5 * oracle.hessian(x))
    J = slope_of(oracle.natural, x)
    errors = np.sqrt(np.diag(J @ inverse @ J.T))
    table = fit.varcorr().set_index(["var1", "var2"])["vcov_se"]
    np.testing.assert_allclose(table.iloc[[0, 2, 1, 3]], errors, rtol=1e-5)

    # Psi as a function of (correlation, variance of u, scale), by its definition.
    def natural(t: Array) -> Array:
        v0, v1 = t[2] * GIVEN[0, 0], t[1]
        return np.array([v0, t[0] * np.sqrt(v0 * v1), v1, t[2]])

    parameters = fit.natural_parameters
    t = parameters.values
    np.testing.assert_allclose(natural(t)[:3], fit.cov_re.to_numpy()[np.tril_indices(2)])
    np.testing.assert_allclose(parameters.slope, slope_of(natural, t), rtol=1e-8, atol=1e-12)
    h = 1e-5
    ends = [[slope_of(natural, t + sign * h * e) for sign in (1, -1)] for e in np.eye(3)]
    bend = [(a - b) / (2 * h) for a, b in ends]
    np.testing.assert_allclose(parameters.bend, np.moveaxis(bend, 0, -1), rtol=0, atol=1e-7)
    assert np.isfinite(fit.coefficients("kenward-roger")["df"]).all()


@pytest.mark.parametrize("nested", [True, False])
def test_beside_another_factor(nested: bool, data: pd.DataFrame) -> None:
    """One term is held, and that of a nested or crossed factor free."""
    known = PartlyKnown(GIVEN[:2, :2], np.zeros((2, 2)))
    if nested:
        data = data.assign(h=data["g"] // 4)
    terms = [lmmax.RandomTerm("1 + u", "g", known), lmmax.RandomTerm("1", "h")]
    fit = lmmax.fit(lmmax.ModelSpec("y", "u", terms), data)
    assert fit.converged
    assert fit.n_params == 4
    y, X, Z = design(data)
    ones = np.ones((len(data), 1))
    factors = (Factor(data["g"].to_numpy(), Z[:, :2]), Factor(data["h"].to_numpy(), ones))
    model = Model(y, X, factors)

    def criterion(variance: float) -> float:
        return float(model.criterion([GIVEN[:2, :2], np.array([[variance]])], True))

    cov = fit.cov_re.to_numpy()
    D = cov / fit.scale
    np.testing.assert_allclose(D[:2, :2], GIVEN[:2, :2], rtol=1e-12)
    assert fit.deviance == pytest.approx(criterion(D[2, 2]), rel=1e-10)
    found = minimize(
        lambda x: criterion(x[0] ** 2), [0.4], method="Nelder-Mead", options={"xatol": 1e-9}
    )
    assert fit.deviance <= found.fun + 1e-8
    assert D[2, 2] == pytest.approx(found.x[0] ** 2, rel=1e-5, abs=1e-8)
    modes = model.modes([cov[:2, :2], cov[2:, 2:]], fit.scale)
    np.testing.assert_allclose(fit.random_effects["g"], modes[0], rtol=0, atol=1e-8)
    assert len(fit.varcorr()) == 5
    assert np.isfinite(fit.coefficients()["df"]).all()


# --- boundaries -----------------------------------------------------------------------------


def test_a_variance_of_zero() -> None:
    """A free variance at zero beside one that is held."""
    data = simulate(np.diag([1.0, 0.0, 0.0]), seed=8)
    fit = fit_known(data, PartlyKnown(GIVEN[:2, :2], lower("0 11")), 2)
    model = dense(data, 2)

    def criterion(c: float, v: float) -> float:
        return float(model.criterion([np.array([[GIVEN[0, 0], c], [c, v]])], True))

    assert fit.converged
    assert fit.singular
    D = fit.cov_re.to_numpy() / fit.scale
    assert fit.deviance == pytest.approx(criterion(D[1, 0], D[1, 1]), rel=1e-8)
    # No better point: along the boundary, where the correlation is one, nor inside it.
    for v in np.linspace(0.0, 0.3, 16):
        for r in np.linspace(-1.0, 1.0, 9):
            assert criterion(r * np.sqrt(GIVEN[0, 0] * v), v) > fit.deviance - 1e-7
    assert "known(" in fit.message


def test_a_correlation_of_one() -> None:
    """Variances are held, and the correlation wants to be one."""
    data = simulate(np.array([[0.8, 0.94, 0], [0.94, 1.1, 0], [0, 0, 0]]), seed=1)
    fit = fit_known(data, PartlyKnown(GIVEN[:2, :2], lower("0 10")), 2)
    D = fit.cov_re.to_numpy() / fit.scale
    limit = np.sqrt(GIVEN[0, 0] * GIVEN[1, 1])
    model = dense(data, 2)

    def criterion(c: float) -> float:
        return float(model.criterion([np.array([[GIVEN[0, 0], c], [c, GIVEN[1, 1]]])], True))

    assert criterion(limit) < criterion(0.999 * limit)
    assert fit.converged
    assert fit.singular
    assert D[1, 0] == pytest.approx(limit, rel=1e-8)
    assert fit.deviance == pytest.approx(criterion(limit), rel=1e-10)


def test_a_variance_held_at_zero(data: pd.DataFrame) -> None:
    """The effect is not there; that is no boundary of what was estimated."""
    fit = fit_known(data, PartlyKnown(np.zeros((2, 2)), lower("1 00")), 2)
    plain = fit_known(data, "us", 1)
    assert not fit.singular
    assert fit.deviance == pytest.approx(plain.deviance, rel=1e-10)
    np.testing.assert_allclose(fit.cov_re, [[plain.cov_re.iloc[0, 0], 0.0], [0.0, 0.0]], rtol=1e-6)
    assert fit.n_params == plain.n_params


# --- the structure itself -------------------------------------------------------------------


def every_mask(q: int) -> list[Array]:
    masks = []
    for entries in itertools.product([False, True], repeat=q * (q + 1) // 2):
        mask = np.zeros((q, q), dtype=bool)
        mask[np.tril_indices(q)] = entries
        masks.append(mask)
    return masks


@pytest.mark.parametrize("q", [2, 3])
def test_masks_in_general(q: int) -> None:
    """Held entries hold, D is positive semidefinite, and its parameters give it again."""
    rng = np.random.default_rng(q)
    # All of two effects, a random choice for three.
    masks = every_mask(q) if q == 2 else [every_mask(q)[i] for i in rng.permutation(64)[:16]]
    for number, mask in enumerate(masks):
        given = np.eye(q) if number % 3 == 0 else GIVEN[:q, :q]
        known = PartlyKnown(given, mask)
        theta = rng.normal(size=known.n_parameters(q))
        D = matrix_at(known, theta, q)
        free = mask | mask.T
        np.testing.assert_array_equal(D[~free], given[~free])
        assert np.linalg.eigvalsh(D)[0] >= -1e-10 * np.max(D)
        for target in (D, given):
            again = matrix_at(known, known.theta_of(target), q)
            np.testing.assert_allclose(again, target, rtol=1e-7, atol=1e-9 * np.max(target))
        # As many directions as parameters.
        if len(theta):
            assert np.linalg.matrix_rank(slopes(known, theta, q).reshape(q * q, -1)) == len(theta)


def test_larger_masks() -> None:
    """Chains, cycles and held variances of more effects than all orders are tried for."""
    q = 8
    chain = np.tri(q, dtype=bool) & ~np.tri(q, k=-2, dtype=bool)
    cycle = chain.copy()
    cycle[-1, 0] = True
    star = np.eye(q, dtype=bool)
    star[-1] = True
    correlations = np.tri(q, k=-1, dtype=bool)
    rng = np.random.default_rng(0)
    for mask in (chain, cycle, star, correlations):
        known = PartlyKnown(np.eye(q), mask)
        D = matrix_at(known, rng.normal(size=known.n_parameters(q)), q)
        free = mask | mask.T
        np.testing.assert_array_equal(D[~free], np.eye(q)[~free])
        assert np.linalg.eigvalsh(D)[0] > -1e-10 * np.max(D)
        again = matrix_at(known, known.theta_of(D), q)
        np.testing.assert_allclose(again, D, rtol=1e-6, atol=1e-8 * np.max(D))
    # A chain needs no division: every variance may be zero.
    zero = matrix_at(PartlyKnown(np.eye(q), chain), np.zeros(2 * q - 1), q)
    np.testing.assert_array_equal(zero, np.zeros((q, q)))


@pytest.mark.parametrize("mask", ["0 11", "0 10", "0 10 011", "1 01", "0 10 110"])
def test_two_derivatives(mask: str) -> None:
    """Against central differences, where a variance is at zero too."""
    free = lower(mask)
    q = len(free)
    known = PartlyKnown(GIVEN[:q, :q], free)
    k = known.n_parameters(q)
    theta, h = np.linspace(0.3, 0.9, k), 1e-5
    if mask == "0 11":
        theta[-1] = 0.0
    with jax.enable_x64(True):
        first = jax.jacfwd(lambda x: known.matrix(x, q))
        both = compiled.oracle(lambda x: (first(x), jax.jacfwd(first)(x)))(jnp.asarray(theta))
        slope, bend = (np.asarray(each) for each in both)
    ends = [[matrix_at(known, theta + s * h * e, q) for s in (1, -1)] for e in np.eye(k)]
    by_difference = np.stack([(a - b) / (2 * h) for a, b in ends], axis=-1)
    np.testing.assert_allclose(slope, by_difference, rtol=1e-7, atol=1e-8)
    moved = [[slopes(known, theta + s * h * e, q) for s in (1, -1)] for e in np.eye(k)]
    by_difference = np.stack([(a - b) / (2 * h) for a, b in moved], axis=-1)
    np.testing.assert_allclose(bend, by_difference, rtol=1e-6, atol=1e-7)


def test_parameters_of_a_factor() -> None:
    """The held entries set the signs of the columns."""
    known = PartlyKnown(GIVEN, lower("1 01 011"), "factor")
    theta = np.array([-0.7, 0.4, -0.2, 0.9])
    D = matrix_at(known, theta, 3)
    L = np.array([[-0.7, 0, 0], [GIVEN[1, 0], 0.4, 0], [GIVEN[2, 0], -0.2, 0.9]])
    np.testing.assert_allclose(D, L @ L.T, rtol=1e-12)
    np.testing.assert_allclose(known.theta_of(D), theta, rtol=1e-12)


def test_equal_structures_are_one() -> None:
    """Whatever stands in the place of what is free, or above the diagonal."""
    one = PartlyKnown(GIVEN, lower("0 11 000"))
    other = np.array(GIVEN)
    other[1, 1], other[0, 2] = 99.0, 99.0
    assert PartlyKnown(other, lower("0 11 000").tolist()) == one
    assert hash(PartlyKnown(other.tolist(), lower("0 11 000"))) == hash(one)
    assert one.labels(("a", "b", "c")) == ("cor(a, b)", "sd(b)")


# --- what cannot be -------------------------------------------------------------------------


def told(q: int) -> Effects:
    names = ("one", "u", "v", "w")[:q]
    return Effects(names, None, False, "known(1 + u + v | g)")


@pytest.mark.parametrize(
    ("given", "mask", "match"),
    [
        ([[1.0, 0.0], [2.0, 1.0]], "0 00", r"entry \(u, (one|u)\): no covariance matrix"),
        ([[-1.0, 0.0], [0.0, 1.0]], "0 01", r"entry \(one, one\): no covariance matrix"),
        ([[0.0, 0.0], [0.5, 1.0]], "0 01", r"entry \(u, one\): no covariance matrix"),
        ([[0.0, 0.0], [0.0, 1.0]], "0 11", r"entry \(u, one\): .* leave this one no room"),
        ([[1.0, 0.0], [0.0, 0.0]], "1 10", r"entry \(u, one\): .* leave this one no room"),
        ([[1.0, 0.0], [0.0, 1.0]], "1", "2 effects, one, u, and its known covariance is 1 x 1"),
    ],
)
def test_impossible_entries(given: Any, mask: str, match: str) -> None:
    free = lower(mask)
    known = PartlyKnown(np.array(given)[: len(free), : len(free)], free)
    with pytest.raises(lmmax.DataError, match=match):
        known.prepare(told(2))


def test_entries_beyond_this_structure() -> None:
    """A cycle of held correlations, the variances held and its chords free."""
    given = np.eye(4)
    for i, j in [(1, 0), (2, 1), (3, 2), (3, 0)]:
        given[i, j] = 0.4
    with pytest.raises(lmmax.DataError, match="depends on the estimates"):
        PartlyKnown(given, lower("0 00 100 0100")).prepare(told(4))


@pytest.mark.parametrize(
    ("given", "free", "of", "match"),
    [
        ([[1.0]], [[True]], "root", "of='root' is unknown"),
        ([1.0], [[True]], "covariance", "given must be a square matrix"),
        ([["a"]], [[True]], "covariance", "given must be a square matrix of numbers"),
        ([[np.nan]], [[True]], "covariance", "given must be finite"),
        (np.eye(2), [[True]], "covariance", "given is 2 x 2 and free 1 x 1"),
    ],
)
def test_bad_arguments(given: Any, free: Any, of: str, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        PartlyKnown(given, free, of)
