"""The dense model with several grouping factors: against SciPy, lme4, glmmTMB and its own parts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy.stats import multivariate_normal

from tests.oracles import dense
from tests.oracles.designs import KINDS, RELATED, Problem, simulate
from tests.oracles.problems import simulate as simulate_one
from tests.reference import load_data, load_record, load_records, matrix


@pytest.fixture(params=KINDS)
def problem(request: pytest.FixtureRequest) -> Problem:
    return simulate(request.param, 3)


def joint(problem: Problem) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Covariance of all effects (factor by factor), the effects' design, and the errors."""
    model, covs = problem.model, problem.by_factor(problem.covs)
    wide = np.hstack([factor.wide for factor in model.factors])
    sizes = [factor.levels * len(cov) for factor, cov in zip(model.factors, covs, strict=True)]
    prior, at = np.zeros((sum(sizes), sum(sizes))), 0
    for factor, cov, size in zip(model.factors, covs, sizes, strict=True):
        prior[at : at + size, at : at + size] = factor.prior(cov)
        at += size
    errors = np.full(len(model.y), problem.scale)
    return prior, wide, errors if model.weights is None else errors / model.weights


def test_designs_are_as_described(problem: Problem) -> None:
    assert list(problem.terms) == list(problem.levels)
    for factor, (group, levels) in zip(problem.model.factors, problem.levels.items(), strict=True):
        names = problem.data[group.split(":")].agg(":".join, axis=1)
        assert [levels[code] for code in factor.codes] == list(names)
        assert len(np.unique(factor.codes)) == factor.levels == len(levels)
    data = problem.data
    assert np.array_equal(problem.model.y, data["y"])
    table = pd.crosstab(data["a"], data["b"])
    empty = int((table.to_numpy() == 0).sum())
    singletons = int((table.sum(axis=1) == 1).sum())
    assert (len(data), empty, singletons) in {(101, 6, 1), (108, 0, 0), (94, 24, 2)}


def test_criterion_against_scipy(problem: Problem) -> None:
    """ML: the density of y at the coefficients. REML: that density integrated over them."""
    model, covs, scale = problem.model, problem.by_factor(problem.covs), problem.scale
    prior, wide, errors = joint(problem)
    V = wide @ prior @ wide.T + np.diag(errors)
    np.testing.assert_allclose(model.covariance(covs, scale), V, rtol=1e-12, atol=1e-12)
    beta, cov = model.coefficients(covs, scale)
    density = multivariate_normal(model.X @ beta, V).logpdf(model.y)
    assert model.natural_criterion(covs, scale, False) == pytest.approx(-2.0 * density, rel=1e-11)
    p = len(beta)
    integral = density + 0.5 * (p * np.log(2.0 * np.pi) + np.linalg.slogdet(cov)[1])
    assert model.natural_criterion(covs, scale, True) == pytest.approx(-2.0 * integral, rel=1e-11)


def test_effects_solve_the_mixed_model_equations(problem: Problem) -> None:
    model, covs, scale = problem.model, problem.by_factor(problem.covs), problem.scale
    prior, wide, errors = joint(problem)
    p = model.X.shape[1]
    XZ = np.column_stack([model.X, wide])
    lhs = XZ.T @ (XZ / errors[:, None])
    lhs[p:, p:] += np.linalg.inv(prior)
    solution = np.linalg.solve(lhs, XZ.T @ (model.y / errors))
    beta, cov = model.coefficients(covs, scale)
    np.testing.assert_allclose(beta, solution[:p], rtol=1e-10)
    np.testing.assert_allclose(cov, np.linalg.inv(lhs)[:p, :p], rtol=1e-9, atol=1e-14)
    modes = np.concatenate([b.ravel() for b in model.modes(covs, scale)])
    np.testing.assert_allclose(modes, solution[p:], rtol=1e-8, atol=1e-10)
    fitted = model.fitted(covs, scale)
    np.testing.assert_allclose(fitted, XZ @ solution, rtol=1e-9, atol=1e-10)
    inverse, at = np.linalg.inv(lhs[p:, p:]), 0
    for blocks in model.conditional_covariances(covs, scale):
        m, q, _ = blocks.shape
        for i in range(m):
            here = slice(at + i * q, at + (i + 1) * q)
            np.testing.assert_allclose(blocks[i], inverse[here, here], rtol=1e-8, atol=1e-11)
        at += m * q


@pytest.mark.parametrize("reml", [True, False])
def test_score_by_complex_step(problem: Problem, reml: bool) -> None:
    model, pairs = problem.model, problem.pairs()
    covs = problem.by_factor(problem.covs)
    tau = np.array([c[i, j] for c, e in zip(covs, pairs, strict=True) for i, j in e])
    tau = np.append(tau, problem.scale)

    def unpack(t: np.ndarray) -> tuple[list[np.ndarray], Any]:
        out, values = [], iter(t[:-1])
        for cov, entries in zip(covs, pairs, strict=True):
            new = np.zeros(cov.shape, dtype=t.dtype)
            for i, j in entries:
                new[i, j] = new[j, i] = next(values)
            out.append(new)
        return out, t[-1]

    score, information = model.score_and_information(*unpack(tau), reml, pairs)
    h = 1e-30
    for k, e in enumerate(np.eye(len(tau))):
        at = unpack(tau + 1j * h * e)
        slope = np.imag(model.natural_criterion(*at, reml)) / h
        assert -0.5 * slope == pytest.approx(score[k], rel=1e-8, abs=1e-9)
        slope = np.imag(model.score_and_information(*at, reml, pairs)[0]) / h
        np.testing.assert_allclose(-slope, information[k], rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("reml", [True, False])
def test_one_factor_is_the_plain_functions(reml: bool) -> None:
    data = simulate_one(13, 2, True)
    D, scale = np.array([[1.3, 0.4], [0.4, 0.9]]), 0.7
    y, X, Z, codes, w = (data[k] for k in ("y", "X", "Z", "codes", "weights"))
    model = dense.Model(y, X, (dense.Factor(codes, Z),), w)
    assert model.criterion([D], reml) == pytest.approx(dense.criterion(**data, D=D, reml=reml))
    assert model.profiled_scale([D], reml) == pytest.approx(
        dense.profiled_scale(**data, D=D, reml=reml), rel=1e-13
    )
    (modes,) = model.modes([scale * D], scale)
    np.testing.assert_allclose(modes, dense.conditional_modes(**data, D=D), rtol=1e-10)
    (blocks,) = model.conditional_covariances([scale * D], scale)
    expected = dense.conditional_covariance(Z, codes, D, scale, w)
    np.testing.assert_allclose(blocks, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kind", RELATED)
def test_identity_is_no_relationship(kind: str) -> None:
    problem = simulate(kind, 5)
    model, covs = problem.model, problem.by_factor(problem.covs)

    def with_K(K: np.ndarray | None) -> dense.Model:
        first = dense.Factor(model.factors[0].codes, model.factors[0].Z, K)
        return dense.Model(model.y, model.X, (first, *model.factors[1:]), model.weights)

    plain = with_K(None).natural_criterion(covs, problem.scale, True)
    assert with_K(np.eye(9)).natural_criterion(covs, problem.scale, True) == pytest.approx(
        plain, rel=1e-13
    )
    assert abs(model.natural_criterion(covs, problem.scale, True) - plain) > 1e-3


# --- stored fits ----------------------------------------------------------------------------

# Record: response, fixed columns; then per factor in lme4's order the grouping columns and the
# widths of lme4's terms on it.
DESIGNS: dict[str, tuple[str, list[str], list[tuple[list[str], list[list[str]]]]]] = {
    "pastes_nested": ("strength", ["1"], [(["cask", "batch"], [["1"]]), (["batch"], [["1"]])]),
    "penicillin_crossed": ("diameter", ["1"], [(["plate"], [["1"]]), (["sample"], [["1"]])]),
    "pixel_nested": (
        "pixel",
        ["1", "day", "day^2"],
        [(["Dog", "Side"], [["1"]]), (["Dog"], [["1", "day"]])],
    ),
    "cake_three": (
        "angle",
        ["1", "recipe=B", "recipe=C", "temp"],
        [(["recipe", "replicate"], [["1"]]), (["replicate"], [["temp"], ["1"]])],
    ),
    "syn_crossed_nested": (
        "y",
        ["1", "x"],
        [(["d", "a"], [["1"]]), (["a"], [["1"]]), (["b"], [["1"]]), (["c"], [["1"]])],
    ),
    "syn_crossed_slopes": (
        "y",
        ["1", "x"],
        [(["a", "d"], [["1"]]), (["a"], [["1", "x"]]), (["b"], [["1", "x"]])],
    ),
}
IDENTIFIERS = [
    record["id"]
    for record in load_records(kinds=("lmm",), several=True)
    if record["id"].rsplit("_", 1)[0] in DESIGNS
]


def columns(data: pd.DataFrame, names: list[str]) -> np.ndarray:
    """A design by hand: ``1``, numeric columns, squares, ``f=level`` indicators."""
    out: list[np.ndarray] = []
    for name in names:
        column, _, level = name.partition("=")
        base, _, square = name.partition("^")
        if level:
            out.append((data[column] == level).to_numpy(float))
        elif name == "1":
            out.append(np.ones(len(data)))
        else:
            out.append(data[base].to_numpy(float) ** (2 if square else 1))
    return np.column_stack(out)


def reference_model(identifier: str) -> tuple[dense.Model, list[list[int]]]:
    """The dense model of a record, and the widths of the terms of each factor."""
    data = load_data(load_record(identifier)["dataset"])
    response, fixed, groups = DESIGNS[identifier.rsplit("_", 1)[0]]
    factors = []
    for names, terms in groups:
        codes = data.groupby(names).ngroup().to_numpy()
        factors.append(
            dense.Factor(codes, columns(data, [name for term in terms for name in term]))
        )
    y = data[response].to_numpy(float)
    model = dense.Model(y, columns(data, fixed), tuple(factors))
    return model, [[len(term) for term in terms] for _, terms in groups]


def relative_covariances(theta: np.ndarray, widths: list[list[int]]) -> list[np.ndarray]:
    """lme4's theta, factors column by column and term by term, as D of each factor."""
    out, at = [], 0
    for terms in widths:
        D = np.zeros((sum(terms), sum(terms)))
        start = 0
        for q in terms:
            L = np.zeros((q, q))
            L.T[np.triu_indices(q)] = theta[at : at + q * (q + 1) // 2]
            at += q * (q + 1) // 2
            D[start : start + q, start : start + q] = L @ L.T
            start += q
        out.append(D)
    return out


def test_every_design_has_a_record() -> None:
    assert {name.rsplit("_", 1)[0] for name in IDENTIFIERS} == set(DESIGNS)


@pytest.mark.parametrize("identifier", IDENTIFIERS)
def test_lme4_objective(identifier: str) -> None:
    model, widths = reference_model(identifier)
    record = load_record(identifier)
    for entry in record["results"]["objective_at"]:
        Ds = relative_covariances(matrix(entry["theta"]), widths)
        assert model.criterion(Ds, record["reml"]) == pytest.approx(entry["value"], rel=1e-11)


@pytest.mark.parametrize("identifier", IDENTIFIERS)
def test_lme4_optimum(identifier: str) -> None:
    model, widths = reference_model(identifier)
    record = load_record(identifier)
    results = record["results"]
    Ds = relative_covariances(matrix(results["theta"]), widths)
    scale = model.profiled_scale(Ds, record["reml"])
    covs = [scale * D for D in Ds]
    assert model.criterion(Ds, record["reml"]) == pytest.approx(results["criterion"], rel=1e-12)
    assert np.sqrt(scale) == pytest.approx(results["sigma"], rel=1e-9)
    beta, cov = model.coefficients(covs, scale)
    np.testing.assert_allclose(beta, matrix(results["fixef"]), rtol=1e-8)
    vcov = matrix(results["vcov"])
    np.testing.assert_allclose(cov, vcov, rtol=1e-8, atol=1e-12 * np.diag(vcov).max())
    blocks = iter(results["ranef"])
    for factor, terms, modes, variances in zip(
        range(len(covs)),
        widths,
        model.modes(covs, scale),
        model.conditional_covariances(covs, scale),
        strict=True,
    ):
        at = 0
        for q in terms:
            block, here = next(blocks), slice(at, at + q)
            at += q
            for ours, stored in (
                (modes[:, here], block["values"]),
                (variances[:, here, here], block["condvar"]),
            ):
                expected = matrix(stored)
                size = np.abs(expected).max()
                shown = ours[: len(expected)]
                np.testing.assert_allclose(
                    shown, expected, rtol=0, atol=1e-8 * size, err_msg=str(factor)
                )


@pytest.mark.parametrize("identifier", [name for name in IDENTIFIERS if "slopes" not in name])
def test_lme4_information(identifier: str) -> None:
    """The observed information of the standard deviations, as lme4's deviance gives it."""
    model, widths = reference_model(identifier)
    record = load_record(identifier)
    results = record["results"]
    reml = record["reml"]
    theta, sigma = matrix(results["theta"]), results["sigma"]
    pairs = []
    for terms in widths:
        entries, start = [], 0
        for q in terms:
            entries += [(start + r, start + c) for r in range(q) for c in range(r + 1)]
            start += q
        pairs.append(entries)

    def natural(t: np.ndarray) -> np.ndarray:
        """Entries of the covariances, in the order of ``pairs``, and the scale."""
        out, at = [], 0
        for terms in widths:
            for q in terms:
                L = np.zeros((q, q), dtype=t.dtype)
                L.T[np.triu_indices(q)] = t[at : at + q * (q + 1) // 2]
                at += q * (q + 1) // 2
                out.append((t[-1] ** 2 * L @ L.T)[np.tril_indices(q)])
        return np.concatenate([*out, t[-1:] ** 2])

    t = np.append(theta, sigma).astype(complex)
    h = 1e-30
    J = np.stack([np.imag(natural(t + 1j * h * e)) / h for e in np.eye(len(t))], axis=1)
    covs = [sigma**2 * D for D in relative_covariances(theta, widths)]
    _, information = model.score_and_information(covs, sigma**2, reml, pairs)
    expected = J @ matrix(results["varpar_cov"]) @ J.T
    unit = np.sqrt(np.diag(expected))
    error = np.linalg.inv(information) - expected
    assert np.max(np.abs(error) / np.outer(unit, unit)) < 1e-6


@pytest.mark.parametrize(
    "record", load_records(kinds=("glmmTMB",)), ids=lambda record: record["id"]
)
def test_glmmtmb_objective(record: dict[str, Any]) -> None:
    """The criterion at stored covariances, and that the stored optimum is where it is said."""
    data, results = load_data(record["dataset"]), record["results"]
    response, covariate, group, levels = {
        "sleepstudy": ("Reaction", "Days", "Subject", "Days"),
        "syn_reps": ("y", "t", "id", "time"),
    }[record["dataset"]]
    if len(results["varcorr"][0]["columns"]) == 2:
        Z = columns(data, ["1", covariate])
    else:
        Z = pd.get_dummies(data[levels]).to_numpy(float)
    codes = np.unique(data[group], return_inverse=True)[1]
    X, y = columns(data, ["1", covariate]), data[response].to_numpy(float)
    model, reml = dense.Model(y, X, (dense.Factor(codes, Z),)), record["reml"]
    point = results["objective_at"]
    value = model.natural_criterion([matrix(point["cov"][0])], point["sigma"] ** 2, reml)
    assert value == pytest.approx(point["criterion"], rel=1e-10)
    cov, scale = matrix(results["varcorr"][0]["cov"]), results["sigma"] ** 2
    assert model.natural_criterion([cov], scale, reml) == pytest.approx(
        results["criterion"], rel=1e-12
    )
    assert model.profiled_scale([cov / scale], reml) == pytest.approx(scale, rel=1e-8)
    beta, vcov = model.coefficients([cov], scale)
    np.testing.assert_allclose(beta, matrix(results["fixef"]), rtol=1e-9)
    np.testing.assert_allclose(vcov, matrix(results["vcov"]), rtol=1e-8)
