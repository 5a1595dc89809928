"""Responses drawn by row have the mean and covariance of the dense model."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import lmmax
from lmmax.simulate import simulate
from tests.oracles import designs

N = 3000


@pytest.mark.parametrize(
    "kind", ["nested_slope", "weights", "related_slope", "terms_of_one_factor"]
)
def test_covariance_is_that_of_the_dense_model(kind: str) -> None:
    problem = designs.simulate(kind, 3)
    data = problem.data.assign(known=np.linspace(-3.0, 3.0, len(problem.data)))
    fit = lmmax.fit(
        f"{problem.formula} + offset(known)",
        data,
        weights=problem.weights,
        relmat=problem.relmat or None,
    )
    drawn = simulate(fit, N, seed=1)
    covs = [fit.cov_re.to_numpy()[here, here] for here in fit.layout.slices]
    order = [list(problem.levels).index(name) for name in fit.group_names]
    model = replace(problem.model, factors=tuple(problem.model.factors[at] for at in order))
    V = model.covariance(covs, fit.scale)
    mean = model.X @ fit.params.to_numpy() + data["known"].to_numpy()
    values = drawn.to_numpy()
    assert values.shape == (fit.nobs, N)
    sd = np.sqrt(np.diag(V))
    # All of about 10^4 pairs, each within its Monte Carlo error; products are skew.
    assert np.max(np.abs(values.mean(axis=1) - mean) / sd) < 4.9 / np.sqrt(N)
    own = np.cov(values - mean[:, None], bias=True)
    error = np.sqrt((np.outer(sd, sd) ** 2 + V**2) / N)
    assert np.max(np.abs(own - V) / error) < 5.5


def test_a_single_sum_tells_the_covariance_exactly(sleepstudy_slope: lmmax.Fit) -> None:
    """``r' V^-1 r / n`` over many responses: chi-squared, so known to 0.3%."""
    fit = sleepstudy_slope
    X, codes = fit.design.X, fit.design.groupings[0].codes
    V = (codes[:, None] == codes) * (X @ fit.cov_re.to_numpy() @ X.T) + fit.scale * np.eye(180)
    left = simulate(fit, N, seed=2).to_numpy() - fit.fittedvalues_marginal.to_numpy()[:, None]
    quadratic = np.sum(left * np.linalg.solve(V, left), axis=0)
    assert abs(quadratic.mean() - 180.0) < 4.5 * np.sqrt(360.0 / N)
    assert abs(quadratic.var() / 360.0 - 1.0) < 4.5 * np.sqrt((2.0 + 12.0 / 180.0) / N)


def test_conditional_responses_keep_the_modes(sleepstudy_slope: lmmax.Fit) -> None:
    fit = sleepstudy_slope
    left = simulate(fit, N, seed=3, random_effects="conditional").to_numpy()
    left = left - fit.fittedvalues.to_numpy()[:, None]
    assert np.max(np.abs(left.mean(axis=1))) < 4.5 * np.sqrt(fit.scale / N)
    assert abs(left.var() / fit.scale - 1.0) < 4.5 * np.sqrt(2.0 / left.size)


def test_columns_depend_on_the_seed_and_their_position(sleepstudy_slope: lmmax.Fit) -> None:
    few, many = simulate(sleepstudy_slope, 2, seed=4), simulate(sleepstudy_slope, 5, seed=4)
    assert np.array_equal(few, many.iloc[:, :2])
    assert few.index.equals(sleepstudy_slope.design.index)
    assert not np.isclose(many, simulate(sleepstudy_slope, 5, seed=5)).any()
    assert len(np.unique(many)) == many.size


def test_bad_requests(sleepstudy_slope: lmmax.Fit) -> None:
    with pytest.raises(ValueError, match="n=0 must be a whole number"):
        simulate(sleepstudy_slope, 0)
    with pytest.raises(ValueError, match=r"n=2\.5 must be"):
        simulate(sleepstudy_slope, 2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seed=-1 must be"):
        simulate(sleepstudy_slope, seed=-1)
    with pytest.raises(ValueError, match="use 'new' or 'conditional'"):
        simulate(sleepstudy_slope, random_effects="old")  # type: ignore[arg-type]
