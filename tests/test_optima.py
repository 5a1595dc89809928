"""Likelihoods with several maxima: the fit is the highest, and says how many were seen.

The oracle is a dense Gaussian criterion, minimised by SciPy from many starts, or on a grid.
"""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.optimize import minimize

import lmmax
from lmmax.optima import distinct, is_balanced, least_determined
from tests.oracles import dense

pytestmark = pytest.mark.unoptimised

KINDS = (
    "(1 + x | g)",
    "(0 + x + z | g)",
    "(1 + x + z | g)",
    "(x || g)",
    "(1 | a) + (1 | b)",
    "(1 + x | a) + (1 | b)",
    "(1 | a) + (1 | a:b)",
    "(1 | g)",
)


def small(seed: int) -> tuple[str, pd.DataFrame, bool]:
    """Twelve to sixty rows in a few groups, and a model that is nearly too large for them."""
    rng = np.random.default_rng([77, seed])
    kind = KINDS[seed % len(KINDS)]
    n = int(rng.choice([12, 16, 20, 30, 45, 60]))
    data = pd.DataFrame({"x": rng.normal(size=n), "z": rng.normal(size=n)})
    if "| g" in kind:
        m = int(rng.integers(3, max(4, n // 3)))
        data["g"] = np.concatenate([np.arange(m), rng.integers(0, m, n - m)])
    else:
        data["a"] = np.concatenate([np.arange(4), rng.integers(0, max(4, n // 4), n - 4)])
        data["b"] = rng.integers(0, 3, n)
        data.loc[:2, "b"] = [0, 1, 2]
    group = data["g" if "g" in data else "a"]
    sd = rng.choice([0.0, 0.3, 1.0], size=3)
    effects = [s * rng.normal(size=80)[group] for s in sd]
    data["y"] = data.x + effects[0] + effects[1] * data.x + effects[2] * data.z + rng.normal(size=n)
    fixed = str(rng.choice(["1", "x", "x + z"]))
    return f"y ~ {fixed} + {kind}", data, bool(rng.random() < 0.5)


def subfactors(seed: int) -> pd.DataFrame:
    """Sites with days and hours, some missing, and differences between sites."""
    rng = np.random.default_rng(seed)
    cells = [(s, d, h) for s in range(8) for d in range(5) for h in range(4) if rng.random() < 0.8]
    data = pd.DataFrame(cells, columns=["site", "day", "hour"])
    data["x"] = rng.normal(size=len(data))
    day = data.site * 5 + data.day
    noise = rng.normal(size=8)[data.site] * 2 + 0.7 * rng.normal(size=40)[day]
    data["y"] = noise + rng.normal(size=len(data))
    return data


def dense_criterion(fit: lmmax.Fit, factors: list[np.ndarray]) -> float:
    """-2 log-likelihood with the scale profiled, from a factor of D for each term."""
    design, X = fit.design, fit.design.X[:, fit.layout.fixed.kept]
    V = np.eye(fit.nobs)
    for block, L in zip(design.blocks, factors, strict=True):
        codes = design.groupings[block.grouping].codes
        V += (codes[:, None] == codes) * (block.Z @ L @ L.T @ block.Z.T)
    _, _, rss = dense.gls(design.y, X, V)
    scale = rss / (fit.nobs - fit.reml * X.shape[1])
    return float(dense.criterion_at(design.y, X, scale * V, fit.reml))


def least(fit: lmmax.Fit, starts: int = 12) -> float:
    """The least criterion that searches from random starts find."""
    rng = np.random.default_rng(0)
    masks = [np.tril(term.pattern) > 0.0 for term in fit.terms]

    def value(x: np.ndarray) -> float:
        factors, at = [], 0
        for mask in masks:
            L = np.zeros(mask.shape)
            L[mask] = x[at : at + mask.sum()]
            at += int(mask.sum())
            factors.append(L)
        return dense_criterion(fit, factors)

    size = sum(int(mask.sum()) for mask in masks)
    return min(
        float(minimize(value, 10.0 ** rng.uniform(-1, 1.5) * rng.normal(size=size)).fun)
        for _ in range(starts)
    )


# Seeds whose likelihood has a local maximum at which a search from moments ends.
@pytest.mark.parametrize("seed", [5, 27, 421, 498, 550, 725, 880, 3, 8])
def test_no_search_finds_a_higher_likelihood(seed: int) -> None:
    formula, data, reml = small(seed)
    fit = lmmax.fit(formula, data, reml=reml)
    assert fit.converged
    found = least(fit)
    # What a search without derivatives finds may be a little above the minimum, never below.
    assert fit.deviance < found + 1e-7
    assert found < fit.deviance + 1e-2


@pytest.mark.parametrize("seed", [27, 421, 498, 880])
def test_lanes_end_where_fits_do(seed: int) -> None:
    formula, data, reml = small(seed)
    fit = lmmax.fit(formula, data, reml=reml)
    others = np.random.default_rng(0).normal(size=(len(data), 2)) + data.x.to_numpy()[:, None]
    Y = np.column_stack([data.y, others])
    many = lmmax.fit_many(formula.removeprefix("y "), data, Y, reml=reml)
    for column, llf in enumerate(many.llf):
        alone = lmmax.fit(formula, data.assign(y=Y[:, column]), reml=reml)
        assert -2 * llf == pytest.approx(alone.deviance, abs=1e-7)
    assert -2 * many.llf.iloc[0] == pytest.approx(fit.deviance, abs=1e-7)


def test_a_variance_far_from_where_moments_put_it() -> None:
    """Ten different rows, repeated: the variance is zero at one minimum, large at the other."""
    rows: list[Any] = [
        (-0.4935759, -0.3817270, "a", 0, 9),
        (1.9620930, 0.3228200, "b", 0, 3),
        (-1.6637960, -0.2442100, "c", 1, 3),
        (7.1508350, 1.9534980, "b", 1, 3),
        (0.5069580, -0.7968560, "b", 2, 6),
        (-1.2150060, -0.7656210, "b", 2, 9),
        (0.8275240, 0.4353110, "b", 2, 3),
        (-1.7634640, -0.9180890, "c", 3, 3),
        (2.9645520, 0.7127610, "c", 4, 3),
        (3.0767210, 1.0623410, "b", 4, 3),
    ]
    data = pd.DataFrame(rows, columns=["y", "x", "f", "g", "k"])
    data = data.loc[data.index.repeat(data.k)].reset_index(drop=True)
    with pytest.warns(lmmax.RankWarning):
        fit = lmmax.fit("y ~ x * f + (1 | g)", data)
    grid = [dense_criterion(fit, [np.array([[t]])]) for t in np.r_[0.0, np.logspace(-2, 3, 300)]]
    assert fit.deviance == pytest.approx(min(grid), abs=1e-2)
    assert fit.deviance <= min(grid)
    assert not fit.singular
    at = [np.array([[float(np.sqrt(fit.cov_re.iloc[0, 0] / fit.scale))]])]
    assert fit.deviance == pytest.approx(dense_criterion(fit, at), rel=1e-10)
    record = fit.convergence
    assert record.optima == pytest.approx([fit.deviance, grid[0]], abs=1e-6)
    assert record.searches > 2
    assert "2 optima, the next one 18.6 higher" in str(record)


def test_a_narrow_optimum_between_large_and_small_on_a_line() -> None:
    """Its basin begins and ends within a factor of thirty of the variance."""
    x = """7.22 10.8 10.8 14.4 7.22 10.8 10.8 10.8 10.8 7.22 10.8 14.4 14.4 10.8 7.22 10.8 14.4
    10.8 14.4 14.4 18.1 10.8 10.8 10.8"""
    y = """1.04 1.18 2.59 3.13 1.66 2.85 2.97 4.14 1.85 3.52 3.84 4.25 3.05 2.0 0.754 2.53 4.47
    2.41 4.17 4.36 5.19 3.32 1.95 2.99"""
    data = pd.DataFrame({"x": x.split(), "y": y.split()}, dtype=float)
    data["g"] = np.repeat(range(4), [5, 9, 3, 7])
    fit = lmmax.fit("y ~ 1 + (0 + x | g)", data, reml=False)
    grid = [dense_criterion(fit, [np.array([[sd]])]) for sd in np.geomspace(1e-2, 1e1, 400)]
    assert -2.0 * fit.llf == pytest.approx(min(grid), abs=1e-3)
    assert -2.0 * fit.llf < min(grid) + 1e-9


@pytest.mark.parametrize("seed", [1, 2, 14])
def test_subfactors_without_their_parent_in_either_order(seed: int) -> None:
    data = subfactors(seed)
    one = lmmax.fit("y ~ x + (1 | site:day) + (1 | site:hour)", data)
    two = lmmax.fit("y ~ x + (1 | site:hour) + (1 | site:day)", data)
    parts = [lmmax.fit(f"y ~ x + (1 | site:{name})", data).llf for name in ("day", "hour")]
    assert one.llf == pytest.approx(two.llf, abs=1e-7)
    other = lmmax.fit("y ~ x + (1 | site:day) + (1 | site:hour)", data, solver="lbfgs")
    assert other.llf == pytest.approx(one.llf, abs=1e-6)
    assert min(one.llf, two.llf) >= max(parts) - 1e-7
    sd = [np.array([[np.sqrt(v / one.scale)]]) for v in one.varcorr()["vcov"][:2]]
    assert one.deviance == pytest.approx(dense_criterion(one, sd), rel=1e-9)


def test_a_likelihood_without_a_maximum_is_not_called_converged() -> None:
    """As many covariates as contrasts within groups of two rows: ML rises without end."""
    for seed in range(12):
        rng = np.random.default_rng(seed)
        m = int(rng.integers(4, 8))
        g = np.repeat(np.arange(m), 2)
        X = np.column_stack([np.ones(2 * m), rng.normal(size=(2 * m, m))])
        y = rng.normal(size=m)[g] + rng.normal(size=2 * m)
        with pytest.warns(lmmax.ConvergenceWarning):
            fit = lmmax.fit_arrays(y, X, g, reml=False)
        assert fit.status == "unbounded"


def test_a_start_of_the_users_own_is_the_only_one() -> None:
    formula, data, reml = small(421)
    free = lmmax.fit(formula, data, reml=reml)
    assert free.convergence.searches > 1
    again = lmmax.fit(formula, data, reml=reml, start=free)
    assert again.convergence.searches == 1
    assert again.deviance == pytest.approx(free.deviance, abs=1e-8)


def test_one_search_is_enough_where_the_maximum_is_known_to_be_the_only_one() -> None:
    sleep = lmmax.datasets.load("sleepstudy")
    fit = lmmax.fit("Reaction ~ Days + (1 + Days | Subject)", sleep)
    assert fit.convergence.searches == 1
    assert is_balanced(fit.compression.problem, fit.estimates.constraints)
    unbalanced = lmmax.fit("Reaction ~ Days + (1 + Days | Subject)", sleep[3:])
    assert not is_balanced(unbalanced.compression.problem, unbalanced.estimates.constraints)
    assert unbalanced.convergence.searches > 1
    assert len(unbalanced.convergence.optima) == 1


def test_curvature_in_relative_changes_counts_groups() -> None:
    """Of a variance that m groups tell without error the criterion is ``m log v + S / v``."""
    m, v = 30.0, 4.0
    hessian = np.array([[[m / v**2, 0.0], [0.0, 100.0]]])
    fit = lmmax.fit("Reaction ~ Days + (1 | Subject)", lmmax.datasets.load("sleepstudy"))
    found = least_determined(np.array([[[np.sqrt(v)]]]), hessian, fit.estimates.constraints)
    assert found == pytest.approx([m])


def test_equal_ends_are_one_optimum() -> None:
    assert distinct([3.0, 1.0, 1.0 + 1e-9, 3.0 - 1e-8]).tolist() == [1.0, 3.0 - 1e-8]
    assert distinct([]).tolist() == []


@pytest.mark.parametrize("seed", [0, 1, 5, 10, 11])
def test_crossed_factors_and_coefficients_that_span_all_rows(seed: int) -> None:
    """Without a residual everything is fitted, and V is singular: ML falls with its logarithm."""
    rng = np.random.default_rng(seed)
    data = pd.DataFrame({"a": rng.integers(0, 8, 13), "b": rng.integers(0, 6, 13)})
    data["x"], data["z"], data["y"] = rng.normal(size=(3, 13))
    Z = np.column_stack([pd.get_dummies(data[name]) for name in "ab"]).astype(float)
    X = np.column_stack([np.ones(13), data[["x", "z"]]])
    assert np.linalg.matrix_rank(Z) < 13 == np.linalg.matrix_rank(np.column_stack([X, Z]))
    with pytest.warns(lmmax.ConvergenceWarning, match="no maximum"):
        fit = lmmax.fit("y ~ x + z + (1 | a) + (1 | b)", data, reml=False)
    assert fit.status == "unbounded"
    # A restricted likelihood of these data has one.
    assert lmmax.fit("y ~ x + z + (1 | a) + (1 | b)", data).converged


@pytest.mark.parametrize("seed", range(6))
def test_lanes_on_a_line_know_whether_the_likelihood_has_a_maximum(seed: int) -> None:
    """It has none where coefficients and effects fit any response, and effects alone do not."""
    rng = np.random.default_rng([5, seed])
    n, m = 8, 4 + seed % 3
    data = pd.DataFrame({"x": rng.normal(size=n), "g": [*range(m), *rng.integers(0, m, n - m)]})
    names = ["x", "z", "v"][: 1 + seed % 3]
    data[["z", "v"]] = rng.normal(size=(n, 2))
    responses = rng.normal(size=(n, 5))
    X = np.column_stack([np.ones(n), data[names]])
    Z = np.eye(m)[data["g"]]
    spanned = np.linalg.matrix_rank(np.hstack([X, Z])) == n
    formula = f"~ {' + '.join(names)} + (1 | g)"
    batch = lmmax.fit_many(formula, data, responses, reml=False)
    assert batch.status.get("unbounded", 0) == 5 * spanned
    assert "unbounded" not in lmmax.fit_many(formula, data, responses).status


@pytest.mark.parametrize(
    ("seed", "expected"), [(8, True), (26, True), (2, False), (27, True), (3, True), (9, False)]
)
def test_ranks_tell_whether_there_is_a_maximum(seed: int, expected: bool) -> None:
    """Without an end where effects of a set and coefficients span all rows, effects alone less."""
    rng = np.random.default_rng([5, seed])
    n = int(rng.integers(9, 20))
    m = int(rng.integers(3, max(4, n // 2)))
    data = pd.DataFrame({"a": rng.integers(0, m, n), "b": rng.integers(0, max(3, m - 2), n)})
    data["x"], data["y"] = rng.normal(size=(2, n))
    covariates = [f"w{j}" for j in range(int(rng.integers(0, 6)))]
    for name in covariates:
        data[name] = rng.normal(size=n)
    random = ("(x || a)", "(1 + x | a) + (1 | b)")[seed % 2]
    A, B = (pd.get_dummies(data[name]).to_numpy(float) for name in "ab")
    slopes = A * data[["x"]].to_numpy()
    generic = 0.3 * A - 1.7 * slopes
    sets = {
        "(x || a)": [[A], [slopes], [A, slopes]],
        "(1 + x | a) + (1 | b)": [
            [generic], [A, slopes], [B], [generic, B], [A, slopes, B],
        ],
    }[random]  # fmt: skip
    X = np.column_stack([np.ones(n), data[covariates]])
    endless = False
    for columns in sets:
        Z = np.hstack(columns)
        rank = np.linalg.matrix_rank
        endless |= bool(rank(Z) < n == rank(np.hstack([X, Z])))
    assert endless == expected
    right = " + ".join(["1", *covariates, random])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit = lmmax.fit(f"y ~ {right}", data, reml=False)
        lanes = lmmax.fit_many(
            f"~ {right}", data, data[["y", "x"]].assign(x=data.y[::-1]), reml=False
        )
    assert (fit.status == "unbounded") == expected
    assert set(lanes.certificate["status"]) == ({"unbounded"} if expected else {"converged"})
