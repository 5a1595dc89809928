"""Structures in time: declared grids, uneven spacing and single series, against dense Gaussians."""

import warnings

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize

import lmmax
from lmmax import DataError
from lmmax.covariances import Autoregressive, Toeplitz, matrix_at
from lmmax.design import build_design

TIMES = np.array([1, 2, 4])
GRID = "C(t, levels=[1, 2, 3, 4])"


def deviance(V, y, X):
    """REML criterion of a dense Gaussian model."""
    L = np.linalg.cholesky(V)
    A = np.linalg.solve(L, np.column_stack([X, y]))
    R = np.linalg.qr(A, mode="r")
    p = X.shape[1]
    logs = np.log(np.diag(L)).sum() + np.log(np.abs(np.diag(R)[:p])).sum()
    return 2.0 * logs + R[p, p] ** 2 + (len(y) - p) * np.log(2.0 * np.pi)


@pytest.fixture(scope="module")
def panel():
    rng = np.random.default_rng(7)
    root = np.linalg.cholesky(0.7 ** np.abs(np.subtract.outer(TIMES, TIMES)))
    u = 1.5 * rng.normal(size=(12, 3)) @ root.T
    rows = [(i, t, u[i, j]) for i in range(12) for j, t in enumerate(TIMES) for _ in range(2)]
    data = pd.DataFrame(rows, columns=["id", "t", "y"])
    data["y"] += 0.7 * rng.normal(size=len(data))
    data["grid"] = pd.Categorical(data["t"], categories=range(1, 5), ordered=True)
    return data


def optimum(fun, starts):
    options = {"xatol": 1e-9, "fatol": 1e-11, "maxiter": 4000}
    found = [minimize(fun, s, method="Nelder-Mead", options=options) for s in starts]
    return min(found, key=lambda z: z.fun)


def test_declared_grids_keep_their_steps(panel):
    t, y = panel["t"].to_numpy(), panel["y"].to_numpy()
    same = np.equal.outer(panel["id"].to_numpy(), panel["id"].to_numpy())
    lags = np.abs(np.subtract.outer(t, t))

    def dense(v):
        V = np.exp(v[0]) * same * np.tanh(v[1]) ** lags + np.exp(v[2]) * np.eye(len(y))
        return deviance(V, y, np.ones((len(y), 1)))

    want = optimum(dense, [[0.5, 0.5, -0.5]])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fits = [lmmax.fit(f"y ~ 1 + ar1(0 + {f} | id)", panel) for f in (GRID, "grid")]
    for fit in fits:
        assert -2.0 * fit.llf == pytest.approx(want.fun, abs=1e-8)
        assert fit.structures()["estimate"].iloc[1] == pytest.approx(np.tanh(want.x[1]), abs=1e-5)
        assert fit.cov_re.shape == (3, 3)


def test_every_family_has_the_steps(panel):
    for name, structure in {
        "ar1": Autoregressive(True, (0, 1, 3)),
        "hetar1": Autoregressive(False, (0, 1, 3)),
        "toep": Toeplitz(False, (0, 1, 3)),
        "homtoep": Toeplitz(True, (0, 1, 3)),
    }.items():
        for factor in (GRID, "grid"):
            block = build_design(f"y ~ 1 + {name}(0 + {factor} | id)", panel).blocks[0]
            assert block.covariance == structure
    assert Toeplitz(True, (0, 1, 3)).labels(("a", "b", "c")) == (
        *("sd", "cor(lag 1)", "cor(lag 2)", "cor(lag 3)"),
    )


@pytest.mark.parametrize(
    "structure",
    [
        Autoregressive(True, (0, 1, 4)),
        Autoregressive(False, (0, 2, 6)),
        Toeplitz(True, (0, 1, 2, 4, 8)),
        Toeplitz(False, (0, 2, 6)),
    ],
)
def test_gaps_are_in_the_matrix_and_back(structure):
    q, rng = len(structure.places), np.random.default_rng(1)
    theta = rng.uniform(0.2, 1.0, structure.n_parameters(q))
    D = matrix_at(structure, theta, q)
    np.testing.assert_allclose(matrix_at(structure, structure.theta_of(D), q), D, atol=1e-13)
    correlation = D / np.sqrt(np.outer(np.diag(D), np.diag(D)))
    lags = np.abs(np.subtract.outer(structure.places, structure.places))
    for lag in np.unique(lags):
        assert np.ptp(correlation[lags == lag]) < 1e-14
    if isinstance(structure, Autoregressive):
        np.testing.assert_allclose(correlation, np.tanh(theta[-1]) ** lags, atol=1e-14)


def test_uneven_numbers_are_a_warning(panel):
    model = "y ~ 1 + ar1(0 + C(t) | id)"
    with pytest.warns(UserWarning, match=r"not equally far apart.*'ou'"):
        fit = lmmax.fit(model, panel)
    with pytest.warns(UserWarning, match="not equally far apart"):
        lmmax.fit_many(f"~{model.split('~')[1]}", panel, ["y"])
    with pytest.warns(UserWarning, match="not equally far apart"):
        Z = np.equal.outer(panel["t"].to_numpy(), TIMES).astype(float)
        ones = np.ones((len(panel), 1))
        again = lmmax.fit_arrays(
            panel["y"], ones, panel["id"], Z, covariance="ar1", z_names=["1", "2", "4"]
        )
    assert again.llf == pytest.approx(fit.llf, abs=1e-9)


@pytest.mark.parametrize(
    ("levels", "said"),
    [
        ([1, 2, 4], True),
        ([10, 20, 30], False),
        ([0.1, 0.2, 0.3], False),
        (["1", "2", "4"], True),
        (pd.to_datetime(["2020-01-31", "2020-02-29", "2020-03-31"]), False),
        (pd.to_datetime(["2020-01-01", "2020-01-02", "2020-01-04"]), True),
        (pd.Categorical([1, 2, 4]), True),
        (pd.Categorical([1, 2, 4], categories=[1, 2, 3, 4]), False),
        (pd.Categorical([1, 2, 4], ordered=True), False),
    ],
)
def test_which_levels_are_uneven(levels, said, panel):
    t = pd.Series(levels).iloc[np.searchsorted(TIMES, panel["t"])].reset_index(drop=True)
    design = build_design("y ~ 1 + ar1(0 + C(u) | id)", panel.assign(u=t))
    assert bool(design.blocks[0].covariance.uneven) == said


# --- one series -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def series():
    n, rng = 10, np.random.default_rng(3)
    lags = np.abs(np.subtract.outer(np.arange(n), np.arange(n)))
    y = 2.0 * np.linalg.cholesky(0.7**lags) @ rng.normal(size=n) + 0.5 * rng.normal(size=n)
    return pd.DataFrame({"t": np.arange(n), "k": "a", "y": y}), lags


def test_one_series_is_fitted_by_every_door(series):
    data, lags = series
    n, ones = len(data), np.ones((len(data), 1))

    def dense(v):
        V = np.exp(v[0]) * np.tanh(v[1]) ** lags + np.exp(v[2]) * np.eye(n)
        return deviance(V, data["y"].to_numpy(), ones)

    want = optimum(dense, [[1, 0.5, -1], [0, 1, 0], [2, 0.2, -2]])
    fit = lmmax.fit("y ~ 1 + ar1(0 + C(t) | k)", data)
    assert fit.converged and -2.0 * fit.llf == pytest.approx(want.fun, abs=1e-8)
    assert fit.scale == pytest.approx(np.exp(want.x[2]), rel=1e-4)
    ou = lmmax.fit("y ~ 1 + ou(0 + C(t) | k)", data)
    assert ou.llf == pytest.approx(fit.llf, abs=1e-8)
    arrays = lmmax.fit_arrays(data["y"], ones, data["k"], np.eye(n), covariance="ar1")
    assert arrays.llf == pytest.approx(fit.llf, abs=1e-10)
    many = lmmax.fit_many("~ 1 + ar1(0 + C(t) | k)", data, ["y"])
    assert many.llf.iloc[0] == pytest.approx(fit.llf, abs=1e-10)
    two = pd.concat([data, data.assign(k="b", y=2.0 * data["y"])])
    apart = lmmax.fit_many("y ~ 1 + ar1(0 + C(t) | k)", two, by="k")
    assert apart.llf.iloc[0] == pytest.approx(fit.llf, abs=1e-8)


def test_one_group_without_information_is_refused(series):
    data, _ = series
    for term in ("(1 | k)", "diag(0 + C(t) | k)", "hetar1(0 + C(t) | k)", "cs(0 + C(t) | k)"):
        with pytest.raises(DataError, match=r"'k' has one level, 'a'.*leave out"):
            lmmax.fit(f"y ~ 1 + {term}", data)
    for term in ("homdiag(0 + C(t) | k)", "homcs(0 + C(t) | k)"):
        with pytest.raises(DataError, match="'k' has one level, 'a', which does not tell"):
            lmmax.fit(f"y ~ 1 + {term}", data)
