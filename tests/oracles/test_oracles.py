"""The two oracles agree with each other, with complex-step derivatives, and with lme4."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest

from tests.oracles import dense
from tests.oracles import lindstrom_bates as lb
from tests.oracles.problems import simulate, unpack_symmetric
from tests.reference import load_data, load_record, matrix


def complex_step(f: Callable[[np.ndarray], Any], x: np.ndarray) -> np.ndarray:
    """Derivative of an analytic f along each entry of x, in the last axis."""
    h = 1e-30
    return np.stack([np.imag(f(x + 1j * h * e)) / h for e in np.eye(len(x))], axis=-1)


CASES = [(q, reml, weighted) for q in (1, 2, 3) for reml in (True, False) for weighted in (0, 1)]


@pytest.fixture(params=CASES, ids=lambda c: f"q{c[0]}-{'reml' if c[1] else 'ml'}-w{c[2]}")
def case(request: pytest.FixtureRequest) -> dict[str, Any]:
    q, reml, weighted = request.param
    rng = np.random.Generator(np.random.PCG64(7 + q))
    theta = rng.standard_normal(q * (q + 1) // 2)
    return {"data": simulate(q, q, bool(weighted)), "theta": theta, "q": q, "reml": reml}


def test_criteria_agree(case: dict[str, Any]) -> None:
    factor = lb.unpack_factor(case["theta"], case["q"])
    for L in (factor, 0 * factor, factor * (np.arange(case["q"]) > 0)):
        expected = dense.criterion(**case["data"], D=L @ L.T, reml=case["reml"])
        got = lb.criterion(**case["data"], D=L @ L.T, reml=case["reml"])
        assert got == pytest.approx(expected, rel=1e-13)


def test_profiled_scale_is_the_maximum(case: dict[str, Any]) -> None:
    factor = lb.unpack_factor(case["theta"], case["q"])
    D, reml, data = factor @ factor.T, case["reml"], case["data"]
    scale = dense.profiled_scale(**data, D=D, reml=reml)

    def f(s: np.ndarray) -> Any:
        return dense.natural_criterion(**data, cov_re=s[0] * D, scale=s[0], reml=reml)

    assert abs(complex_step(f, np.array([scale]))[0] * scale) < 1e-9


def test_gradient_in_D(case: dict[str, Any]) -> None:
    q, reml, data = case["q"], case["reml"], case["data"]
    factor = lb.unpack_factor(case["theta"], q)
    vech = (factor @ factor.T)[np.tril_indices(q)]
    got, _ = lb.derivatives_D(**data, D=factor @ factor.T, reml=reml)

    def f(v: np.ndarray) -> Any:
        return dense.criterion(**data, D=unpack_symmetric(v, q), reml=reml)

    np.testing.assert_allclose(got, complex_step(f, vech), rtol=1e-10, atol=1e-10)


def test_hessian_in_D(case: dict[str, Any]) -> None:
    q, reml, data = case["q"], case["reml"], case["data"]
    factor = lb.unpack_factor(case["theta"], q)
    vech = (factor @ factor.T)[np.tril_indices(q)]
    _, got = lb.derivatives_D(**data, D=factor @ factor.T, reml=reml)

    def f(v: np.ndarray) -> Any:
        return lb.derivatives_D(**data, D=unpack_symmetric(v, q), reml=reml)[0]

    np.testing.assert_allclose(got, complex_step(f, vech), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(got, got.T, rtol=1e-12, atol=1e-12)


def test_derivatives_in_theta(case: dict[str, Any]) -> None:
    q, reml, data = case["q"], case["reml"], case["data"]
    for theta in (case["theta"], np.zeros_like(case["theta"])):
        gradient, hessian = lb.derivatives_theta(**data, theta=theta, reml=reml)

        def f(t: np.ndarray) -> Any:
            L = lb.unpack_factor(t, q)
            return dense.criterion(**data, D=L @ L.T, reml=reml)

        def g(t: np.ndarray) -> Any:
            return lb.derivatives_theta(**data, theta=t, reml=reml)[0]

        np.testing.assert_allclose(gradient, complex_step(f, theta), rtol=1e-9, atol=1e-9)
        np.testing.assert_allclose(hessian, complex_step(g, theta), rtol=1e-9, atol=1e-9)


def test_hessian_against_central_differences() -> None:
    """Fourth-order differences of the dense criterion: no derivative rule on either side."""
    data, theta, h = simulate(3, 2, True), np.array([0.8, 0.3, 0.6]), 1e-3
    steps = h * np.eye(3)

    def f(t: np.ndarray) -> float:
        L = lb.unpack_factor(t, 2)
        return dense.criterion(**data, D=L @ L.T, reml=True)

    def slope(t: np.ndarray, e: np.ndarray) -> float:
        return (8 * (f(t + e) - f(t - e)) - (f(t + 2 * e) - f(t - 2 * e))) / (12 * h)

    numeric = [
        [
            (
                8 * (slope(theta + a, b) - slope(theta - a, b))
                - (slope(theta + 2 * a, b) - slope(theta - 2 * a, b))
            )
            / (12 * h)
            for b in steps
        ]
        for a in steps
    ]
    _, hessian = lb.derivatives_theta(**data, theta=theta, reml=True)
    np.testing.assert_allclose(hessian, numeric, rtol=1e-6, atol=1e-6)


def test_information(case: dict[str, Any]) -> None:
    q, reml, data = case["q"], case["reml"], case["data"]
    factor = lb.unpack_factor(case["theta"], q)
    tau = np.append((factor @ factor.T)[np.tril_indices(q)], 0.7)

    def args(t: np.ndarray) -> dict[str, Any]:
        return {**data, "cov_re": unpack_symmetric(t[:-1], q), "scale": t[-1], "reml": reml}

    score, information = dense.score_and_information(**args(tau))
    numeric = complex_step(lambda t: -0.5 * dense.natural_criterion(**args(t)), tau)
    np.testing.assert_allclose(score, numeric, rtol=1e-9, atol=1e-9)
    numeric = complex_step(lambda t: -dense.score_and_information(**args(t))[0], tau)
    np.testing.assert_allclose(information, numeric, rtol=1e-9, atol=1e-9)


def test_information_of_some_entries_is_a_submatrix() -> None:
    data = simulate(5, 3, False)
    args = {**data, "cov_re": np.diag([1.0, 0.5, 2.0]), "scale": 0.7, "reml": True}
    score, information = dense.score_and_information(**args)
    pairs = [(0, 0), (1, 1), (2, 2)]
    rows = [dense.vech_pairs(3).index(pair) for pair in pairs] + [6]
    score_d, information_d = dense.score_and_information(**args, pairs=pairs)
    np.testing.assert_allclose(score_d, score[rows], rtol=1e-12)
    np.testing.assert_allclose(information_d, information[np.ix_(rows, rows)], rtol=1e-12)


def test_conditional_modes_solve_the_mixed_model_equations() -> None:
    """Henderson's equations give the same coefficients, modes, and conditional covariances."""
    data = simulate(11, 2, True)
    y, X, Z, codes, w = (data[k] for k in ("y", "X", "Z", "codes", "weights"))
    D, (n, p), q, m = np.array([[1.3, 0.4], [0.4, 0.9]]), X.shape, 2, codes.max() + 1
    wide = np.zeros((n, m * q))
    for i in range(n):
        wide[i, codes[i] * q : (codes[i] + 1) * q] = Z[i]
    XZ = np.column_stack([X, wide])
    lhs = XZ.T @ (w[:, None] * XZ)
    lhs[p:, p:] += np.kron(np.eye(m), np.linalg.inv(D))
    solution = np.linalg.solve(lhs, XZ.T @ (w * y))
    beta, _, _ = dense.gls(y, X, dense.covariance(Z, codes, D, w))
    np.testing.assert_allclose(beta, solution[:p], rtol=1e-11)
    modes = dense.conditional_modes(y, X, Z, codes, D, w)
    np.testing.assert_allclose(modes.ravel(), solution[p:], rtol=1e-10, atol=1e-12)
    blocks = dense.conditional_covariance(Z, codes, D, 0.7, w)
    inverse = 0.7 * np.linalg.inv(lhs[p:, p:])
    for i in range(m):
        block = inverse[i * q : (i + 1) * q, i * q : (i + 1) * q]
        np.testing.assert_allclose(blocks[i], block, rtol=1e-10)


def lme4_factor(theta: list[float], q: int) -> np.ndarray:
    """lme4's theta is the lower triangle column by column."""
    factor = np.zeros((q, q))
    factor.T[np.triu_indices(q)] = theta
    return factor


def columns(data: pd.DataFrame, names: list[str]) -> np.ndarray:
    """A design by hand: ``1``, numeric columns, ``f=level`` indicators."""
    out: list[np.ndarray] = []
    for name in names:
        column, _, level = name.partition("=")
        if level:
            out.append((data[column] == level).to_numpy(float))
        else:
            out.append(np.ones(len(data)) if name == "1" else data[name].to_numpy(float))
    return np.column_stack(out)


# Record: response, fixed columns, random columns, group.
DESIGNS: dict[str, tuple[str, list[str] | None, list[str], str]] = {
    "sleepstudy_slope_reml": ("Reaction", ["1", "Days"], ["1", "Days"], "Subject"),
    "sleepstudy_slope_ml": ("Reaction", ["1", "Days"], ["1", "Days"], "Subject"),
    "sleepstudy_weights_reml": ("Reaction", ["1", "Days"], ["1", "Days"], "Subject"),
    "sleepstudy_weights_ml": ("Reaction", ["1", "Days"], ["1", "Days"], "Subject"),
    "sleepstudy_offset_reml": ("Reaction", ["1", "Days"], ["1"], "Subject"),
    "machines_cat0_reml": (
        "score",
        ["1", "Machine=B", "Machine=C"],
        ["Machine=A", "Machine=B", "Machine=C"],
        "Worker",
    ),
    "syn_fourdim_full_reml": ("y", ["1", "x1", "x2", "x3"], ["1", "x1", "x2", "x3"], "g"),
    "syn_fourdim_full_ml": ("y", ["1", "x1", "x2", "x3"], ["1", "x1", "x2", "x3"], "g"),
    "syn_nearsing_corr_reml": ("y_corr", ["1", "x"], ["1", "x"], "g"),
    "syn_weights_weights_ml": ("y", None, ["1"], "g"),
}


def reference_problem(identifier: str) -> tuple[dict[str, Any], dict[str, Any]]:
    record = load_record(identifier)
    data = load_data(record["dataset"])
    response, fixed, random, group = DESIGNS[identifier]
    if fixed is None:
        levels = sorted(data["cl"].unique())[1:]
        fixed = ["1", "x", *(f"cl={level}" for level in levels)]
    y = data[response].to_numpy(float)
    if record["offset"]:
        y = y - data[record["offset"]].to_numpy(float)
    problem = {
        "y": y,
        "X": columns(data, fixed),
        "Z": columns(data, random),
        "codes": np.unique(data[group], return_inverse=True)[1],
        "weights": data[record["weights"]].to_numpy(float) if record["weights"] else None,
    }
    return record, problem


@pytest.mark.parametrize("identifier", DESIGNS)
def test_lme4_objective_and_gradient(identifier: str) -> None:
    record, problem = reference_problem(identifier)
    q, reml = problem["Z"].shape[1], record["reml"]
    # Where an entry of lme4's theta sits in the triangle taken row by row.
    order = [dense.vech_pairs(q).index((r, c)) for c in range(q) for r in range(c, q)]
    for entry in record["results"]["objective_at"]:
        factor = lme4_factor(entry["theta"], q)
        D = factor @ factor.T
        assert dense.criterion(**problem, D=D, reml=reml) == pytest.approx(
            entry["value"], rel=1e-11
        )
        assert lb.criterion(**problem, D=D, reml=reml) == pytest.approx(entry["value"], rel=1e-11)
        if "gradient" not in entry:  # none is stored at zero, on the edge of lme4's domain
            continue
        theta = factor[np.tril_indices(q)]
        gradient, _ = lb.derivatives_theta(**problem, theta=theta, reml=reml)
        expected = matrix(entry["gradient"])
        scale = max(1.0, np.abs(expected).max())
        np.testing.assert_allclose(gradient[order], expected, rtol=0, atol=1e-6 * scale)


@pytest.mark.parametrize("identifier", DESIGNS)
def test_lme4_optimum(identifier: str) -> None:
    record, problem = reference_problem(identifier)
    results, q, reml = record["results"], problem["Z"].shape[1], record["reml"]
    factor = lme4_factor(results["theta"]["values"], q)
    D = factor @ factor.T
    scale = dense.profiled_scale(**problem, D=D, reml=reml)
    assert np.sqrt(scale) == pytest.approx(results["sigma"], rel=1e-9)
    Z, codes, weights = (problem[k] for k in ("Z", "codes", "weights"))
    V = dense.covariance(Z, codes, D, weights)
    beta, A, _ = dense.gls(problem["y"], problem["X"], V)
    np.testing.assert_allclose(beta, matrix(results["fixef"]), rtol=1e-8)
    np.testing.assert_allclose(scale * np.linalg.inv(A), matrix(results["vcov"]), rtol=1e-8)
    block = results["ranef"][0]
    shown = block["levels_shown"]
    modes = matrix(block["values"])
    np.testing.assert_allclose(
        dense.conditional_modes(**problem, D=D)[:shown],
        modes,
        rtol=0,
        atol=1e-8 * np.abs(modes).max(),
    )
    condvar = matrix(block["condvar"])
    np.testing.assert_allclose(
        dense.conditional_covariance(Z, codes, D, scale, weights)[:shown],
        condvar,
        rtol=0,
        atol=1e-8 * np.abs(condvar).max(),
    )


def test_variance_standard_error_on_dietox() -> None:
    """Random intercept per pig: the standard error of the group variance is about 6.939."""
    data, record = load_data("dietox"), load_record("dietox_int_reml")
    results = record["results"]
    _, information = dense.score_and_information(
        data["Weight"].to_numpy(float),
        columns(data, ["1", "Time"]),
        columns(data, ["1"]),
        np.unique(data["Pig"], return_inverse=True)[1],
        matrix(results["varcorr"][0]["cov"]),
        results["sigma"] ** 2,
        reml=True,
    )
    assert np.sqrt(np.linalg.inv(information)[0, 0]) == pytest.approx(6.939, abs=5e-4)
