"""Score contributions against complex steps through the normal density of each cluster."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest

import lmmax
from lmmax.inference import tree
from lmmax.inference.clusters import ClusterError
from lmmax.inference.robust import robust
from lmmax.inference.scores import sandwich, scores
from tests.inference.test_robust import schools
from tests.oracles.dense import Array, Factor, Model, log_det
from tests.oracles.designs import Problem, simulate
from tests.reference import load_data

pytestmark = pytest.mark.unoptimised

STEP = 1e-30


def contributions(
    model: Model,
    labels: Array,
    beta: Array,
    tau: Array,
    unpack: Callable[[Array], tuple[list[Array], Any]],
    reml: bool,
) -> Array:
    """Slopes of each cluster's log density in (beta, tau), (m, p + k).

    Under REML with what ``-log|X'V^-1 X| / 2`` adds: its derivative is that of a trace with the
    inverse held fixed, and the trace is a sum over clusters.

    Args:
        model: the dense model.
        labels: cluster of each row.
        beta: coefficients.
        tau: variance parameters.
        unpack: from them to the factors' natural covariances and the scale.
        reml: whether the likelihood is restricted.
    """
    codes = np.unique(labels, return_inverse=True)[1]
    M = np.linalg.inv(model.X.T @ np.linalg.solve(model.covariance(*unpack(tau)), model.X))

    def density(beta: Array, tau: Array) -> Array:
        V = model.covariance(*unpack(tau))
        values = []
        for i in range(codes.max() + 1):
            here = np.flatnonzero(codes == i)
            X, Vi = model.X[here], V[np.ix_(here, here)]
            r = model.y[here] - X @ beta
            value = len(r) * np.log(2 * np.pi) + log_det(Vi) + r @ np.linalg.solve(Vi, r)
            if reml:
                value = value + np.trace(M @ X.T @ np.linalg.solve(Vi, X))
            values.append(-0.5 * value)
        return np.array(values)

    point, p = np.concatenate([beta, tau]).astype(complex), len(beta)
    steps = [point + 1j * STEP * e for e in np.eye(len(point))]
    return np.stack([np.imag(density(at[:p], at[p:])) / STEP for at in steps], axis=1)


def entries(problem: Problem) -> Callable[[Array], tuple[list[Array], Any]]:
    """Free entries of the factors' covariances, in the order of the formula, then the scale."""

    def unpack(tau: Array) -> tuple[list[Array], Any]:
        out, values = [], iter(tau[:-1])
        for cov, pairs in zip(problem.by_factor(problem.covs), problem.pairs(), strict=True):
            new = np.zeros(cov.shape, dtype=tau.dtype)
            for i, j in pairs:
                new[i, j] = new[j, i] = next(values)
            out.append(new)
        return out, tau[-1]

    return unpack


def check(found: pd.DataFrame, expected: Array) -> None:
    size = np.abs(expected).max(axis=0)
    assert found.shape == expected.shape
    assert np.abs((found.to_numpy() - expected) / size).max() < 1e-9


@pytest.mark.parametrize("kind", ["nested", "nested_three", "nested_slope"])
@pytest.mark.parametrize("reml", [True, False])
@pytest.mark.parametrize("large", [tree.LARGE, 0])  # by dense matrices or level by level
def test_density(kind: str, reml: bool, large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "LARGE", large)
    problem = simulate(kind, 3)
    fit = lmmax.fit(problem.formula, problem.data, reml=reml)
    labels = problem.data["a"].to_numpy()
    tau = fit.natural_parameters.values
    for restricted in (True, False):
        found = scores(fit, reml=restricted)
        assert list(found.index) == sorted(set(labels)) and found.index.name == "a"
        assert list(found.columns) == [*fit.params.index, *fit.natural_parameters.names]
        expected = contributions(
            problem.model, labels, fit.params.to_numpy(), tau, entries(problem), restricted
        )
        check(found, expected)
    # What was maximised has slope zero; the other likelihood has not.
    assert not fit.singular
    own, other = scores(fit), scores(fit, reml=not reml)
    assert (np.abs(own.sum()) < 1e-6 * own.abs().sum()).all()
    assert np.abs(other["scale"].sum()) > 1e-3 * other["scale"].abs().sum()


@pytest.mark.parametrize("large", [tree.LARGE, 0])
def test_weights_and_coarser_clusters(large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "LARGE", large)
    problem = simulate("nested", 4)
    w = np.random.Generator(np.random.PCG64(1)).uniform(0.4, 2.5, len(problem.data))
    model = replace(problem.model, weights=w)
    fit = lmmax.fit(problem.formula, problem.data, weights=w)
    county = problem.data["a"].str[1:].astype(int) % 5
    found = scores(fit, county)
    expected = contributions(
        model,
        county.to_numpy(),
        fit.params.to_numpy(),
        fit.natural_parameters.values,
        entries(problem),
        True,
    )
    check(found.sort_index(), expected)
    by_group = scores(fit)
    parents = county.groupby(problem.data["a"]).first()
    np.testing.assert_allclose(
        by_group.groupby(parents).sum(), found.sort_index(), rtol=1e-8, atol=1e-10
    )


def test_crossed_within_clusters() -> None:
    """Factors crossed within schools, whose dense factor serves as the engine."""
    problem, labels = schools(simulate("crossed", 1), simulate("crossed", 2))
    fit = lmmax.fit(problem.formula, problem.data)
    assert fit.engine.name == "crossed"
    tau = fit.natural_parameters.values
    beta = fit.params.to_numpy()
    expected = contributions(problem.model, labels, beta, tau, entries(problem), True)
    check(scores(fit, labels), expected)


@pytest.mark.parametrize("reml", [True, False])
def test_sum_is_the_slope_anywhere(reml: bool) -> None:
    """Away from the optimum too, against the dense model's own score."""
    problem = simulate("nested_slope", 4)
    with pytest.warns(lmmax.ConvergenceWarning):
        fit = lmmax.fit(problem.formula, problem.data, reml=reml, max_steps=1, em_steps=1)
    covs = [fit.cov_re.to_numpy()[here, here] for here in fit.layout.slices]
    slope, _ = problem.model.score_and_information(covs, fit.scale, reml, problem.pairs())
    total = scores(fit).sum().to_numpy()
    assert np.abs(total[2:] - slope).max() < 1e-9 * np.abs(slope).max()
    assert np.abs(slope).max() > 0.1
    assert np.abs(total[:2]).max() < 1e-9 * np.abs(scores(fit).to_numpy()[:, :2]).sum()


def test_structure() -> None:
    """Compound symmetry of a slope and an intercept: two variances and a correlation."""
    data = load_data("sleepstudy")
    fit = lmmax.fit("Reaction ~ Days + cs(1 + Days | Subject)", data)
    X = np.column_stack([np.ones(180), data["Days"]])
    labels = data["Subject"].to_numpy()
    codes = np.unique(labels, return_inverse=True)[1]
    model = Model(data["Reaction"].to_numpy(), X, (Factor(codes, X),))

    def unpack(tau: Array) -> tuple[list[Array], Any]:
        cov = tau[2] * np.sqrt(tau[0] * tau[1])
        return [np.array([[tau[0], cov], [cov, tau[1]]])], tau[3]

    Psi = fit.cov_re.to_numpy()
    r = Psi[0, 1] / np.sqrt(Psi[0, 0] * Psi[1, 1])
    tau = np.array([Psi[0, 0], Psi[1, 1], r, fit.scale])
    np.testing.assert_allclose(fit.natural_parameters.values, tau, rtol=1e-9)
    expected = contributions(model, labels, fit.params.to_numpy(), tau, unpack, True)
    check(scores(fit), expected)


def test_what_was_not_estimated() -> None:
    """An aliased coefficient is NaN; a scale held fixed has no column."""
    problem = simulate("nested", 4)
    data = problem.data.assign(twice=2.0 * problem.data["x"])
    with pytest.warns(lmmax.RankWarning):
        fit = lmmax.fit("y ~ x + twice + (1 | a) + (1 | a:b)", data, fix={"scale": 0.5})
    found = scores(fit)
    assert found["twice"].isna().all()
    assert list(found.columns[3:]) == ["a: var(Intercept)", "a:b: var(Intercept)"]
    tau = np.append(fit.natural_parameters.values, 0.5)
    beta = fit.params.drop("twice").to_numpy()
    labels = data["a"].to_numpy()
    expected = contributions(problem.model, labels, beta, tau, entries(problem), True)
    check(found.drop(columns="twice"), expected[:, :-1])


def test_boundary() -> None:
    """At a variance of zero the likelihood falls, so that the sum is not positive."""
    fit = lmmax.fit("Yield ~ 1 + (1 | Batch)", load_data("dyestuff2"))
    assert fit.singular
    total = scores(fit).sum()
    assert total["Batch: var(Intercept)"] < -1e-3
    assert abs(total["scale"]) < 1e-9 and abs(total["Intercept"]) < 1e-9


@pytest.mark.parametrize("reml", [True, False])
def test_joint_sandwich(reml: bool) -> None:
    """The information by central differences of the score, itself by complex steps."""
    problem = simulate("nested_slope", 3)
    fit = lmmax.fit(problem.formula, problem.data, reml=reml)
    labels = problem.data["a"].to_numpy()
    beta, tau = fit.params.to_numpy(), fit.natural_parameters.values
    point, unpack = np.concatenate([beta, tau]), entries(problem)

    def at(point: Array) -> Array:
        return contributions(problem.model, labels, point[:2], point[2:], unpack, reml)

    def slope(e: Array, h: float) -> Array:
        return (at(point + h * e).sum(axis=0) - at(point - h * e).sum(axis=0)) / (2.0 * h)

    # Richardson's extrapolation: the error is of order h^4.
    h = 1e-3
    hessian = [(4.0 * slope(e, h / 2.0) - slope(e, h)) / 3.0 for e in np.eye(len(point))]
    half = np.linalg.solve(-np.array(hessian), at(point).T)
    expected, found = half @ half.T, sandwich(fit)
    unit = np.sqrt(np.diag(expected))
    assert np.abs((found.to_numpy() - expected) / np.outer(unit, unit)).max() < 1e-8
    assert list(found.index) == list(scores(fit).columns)


def test_plain_sandwich(dietox_slope: lmmax.Fit) -> None:
    """``cov (sum_i s_i s_i') cov`` of the coefficients is CR0."""
    part = scores(dietox_slope)[["Intercept", "Time"]].to_numpy()
    bread = dietox_slope.cov_params().to_numpy()
    expected = robust(dietox_slope, type="CR0").cov
    np.testing.assert_allclose(bread @ part.T @ part @ bread, expected, rtol=1e-9)


def test_crossed_factors() -> None:
    fit = lmmax.fit("diameter ~ 1 + (1 | plate) + (1 | sample)", load_data("penicillin"))
    with pytest.raises(ClusterError, match="'plate' is not nested within 'sample'"):
        scores(fit)
