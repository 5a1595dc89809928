"""Many responses at once give what one fit after the other gives, at the boundary as well."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

import lmmax
from lmmax.batch import estimates_of, refit_responses, refit_statistics, vectorises
from lmmax.batch import statistics as st
from lmmax.compress import Engine, EngineError
from lmmax.fit import RankWarning
from lmmax.likelihood import reduce
from lmmax.simulate import generator, simulate
from lmmax.solve import Status
from tests.oracles import dense
from tests.reference import load_data

MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "patterns": ("sleepstudy", "Reaction ~ Days + (1 + Days | Subject)", {}),
    "weights and offset, ML": (
        "sleepstudy",
        "Reaction ~ Days + offset(off) + (1 + Days | Subject)",
        {"weights": "w", "reml": False},
    ),
    "scale fixed": (
        "sleepstudy",
        "Reaction ~ Days + (1 + Days | Subject)",
        {"fix": {"scale": 650.0}},
    ),
    "a covariance fixed": (
        "sleepstudy",
        "Reaction ~ Days + (1 | Subject) + (0 + Days | Subject)",
        {"fix": {"cov_re": {"(1 | Subject)": [[600.0]]}}},
    ),
    "singular": ("dyestuff2", "Yield ~ 1 + (1 | Batch)", {}),
    "singletons": ("syn_unbalanced", "y ~ x + z + (x | g)", {}),
    "aliased columns": ("syn_rankdef", "y ~ x1 + x2 + x3 + f + h + (1 | g)", {}),
    "a structure": ("machines", "score ~ Machine + homcs(0 + Machine | Worker)", {}),
    "three effects": ("machines", "score ~ Machine + (0 + Machine | Worker)", {}),
    "crossed": ("penicillin", "diameter ~ 1 + (1 | plate) + (1 | sample)", {}),
    "nested": ("pastes", "strength ~ 1 + (1 | batch/cask)", {}),
}


def fitted(name: str) -> lmmax.Fit:
    data, formula, options = MODELS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RankWarning)
        return lmmax.fit(formula, load_data(data), **options)


@pytest.fixture(scope="module")
def slope() -> lmmax.Fit:
    return fitted("patterns")


@pytest.mark.parametrize("name", MODELS)
def test_each_response_is_fitted_as_by_refit(name: str) -> None:
    fit = fitted(name)
    rng = np.random.default_rng(1)
    # Responses without random effects: about half of these fits are singular.
    flat = fit.fittedvalues_marginal.to_numpy() + np.sqrt(fit.scale) * rng.normal(
        size=(5, fit.nobs)
    )
    y = np.concatenate([simulate(fit, 4, seed=2).to_numpy().T, flat, 1e3 * flat[:1]])
    found = refit_responses(fit, y)
    assert vectorises(fit) == (name not in ("crossed", "nested"))
    assert found.singular.any()
    for j, response in enumerate(y):
        one = fit.refit(response)
        assert found.converged[j]
        assert found.singular[j] == one.singular
        np.testing.assert_allclose(-2.0 * found.llf[j], one.deviance, rtol=1e-12, atol=1e-8)
        se = one.bse.to_numpy()
        np.testing.assert_allclose((found.params[j] - one.params) / se, 0.0 * se, atol=1e-7)
        # Standard errors and variances are as good as the tolerance of the solver squared.
        np.testing.assert_allclose(found.bse[j], se, rtol=1e-6)
        np.testing.assert_allclose(found.scale[j], one.scale, rtol=1e-6)
        np.testing.assert_allclose(
            found.cov_re[j], one.cov_re, rtol=1e-6, atol=1e-6 * max(one.cov_re.max().max(), 1e-6)
        )


def test_the_likelihood_is_that_of_the_dense_density(slope: lmmax.Fit) -> None:
    y = simulate(slope, 3, seed=5).to_numpy().T
    found = refit_responses(slope, y)
    codes, X = slope.design.groupings[0].codes, slope.design.X
    for j in range(3):
        expected = dense.natural_criterion(
            y[j], X, X, codes, found.cov_re[j], found.scale[j], reml=True
        )
        np.testing.assert_allclose(-2.0 * found.llf[j], expected, rtol=1e-11)


def test_the_response_of_the_fit_gives_its_estimates(slope: lmmax.Fit) -> None:
    found = refit_responses(slope, slope.design.y[None]).take(0)
    own = estimates_of(slope)
    np.testing.assert_allclose(found.params, own.params, rtol=1e-9)
    np.testing.assert_allclose(found.cov_re, own.cov_re, rtol=1e-6)
    np.testing.assert_allclose(found.llf, own.llf, rtol=1e-12)
    np.testing.assert_allclose(own.sd, slope.varcorr()["sdcor"][:2], rtol=1e-12)
    np.testing.assert_allclose(own.corr[0, 1], slope.varcorr()["sdcor"][2], rtol=1e-12)


def test_correlations_with_a_variance_of_zero_are_undefined(slope: lmmax.Fit) -> None:
    own = replace(estimates_of(slope), cov_re=np.diag([4.0, 0.0]))
    assert own.corr[0, 0] == 1.0
    assert np.isnan(own.corr[0, 1]) and np.isnan(own.corr[1, 1])


def test_a_lane_that_stops_early_says_so(slope: lmmax.Fit) -> None:
    hurried = replace(slope, settings=replace(slope.settings, max_steps=1, em_steps=0))
    y = simulate(slope, 6, seed=3).to_numpy().T
    found = refit_responses(hurried, y)
    assert not found.converged.all()
    assert set(found.status[~found.converged]) == {Status.MAX_STEPS}


def test_the_iterative_engine_is_refused(slope: lmmax.Fit) -> None:
    iterative = replace(slope, layout=replace(slope.layout, engine=Engine("iterative", "")))
    with pytest.raises(EngineError, match="engine='crossed'"):
        refit_responses(iterative, slope.design.y[None])


# --- statistics ---------------------------------------------------------------------------------


def whitened(shared: st.SharedDesigns, responses: st.Responses, D: np.ndarray) -> Iterator[Any]:
    """The reduction of each response at a natural relative covariance."""
    problem = st.with_responses(shared, responses)
    A = problem.z_factor
    for j in range(len(responses.C)):
        with jax.enable_x64(True):
            S, _ = reduce(replace(problem, Y=problem.Y[j], C=problem.C[j]), A @ D @ A.T)
        yield np.asarray(S)


@pytest.mark.parametrize("name", ["patterns", "weights and offset, ML", "singletons"])
def test_drawn_statistics_have_the_moments_of_rows(name: str) -> None:
    """Quadratic forms ``r' V^-1 r`` and ``X' V^-1 r`` of errors with covariance ``scale V0``.

    Their means and variances are traces of the dense matrices; with V = V0 they are those of
    chi-squared and of the coefficients' information.
    """
    fit = fitted(name)
    shared = st.shared_designs(fit)
    assert bool(shared.patterns) == (name == "patterns")
    n = 4000
    drawn = st.sampler(fit, shared).draw(generator(7, 0), n)
    design, D = fit.design, fit.estimates.D
    Z = np.column_stack([block.Z for block in design.blocks])
    codes, weights = design.groupings[0].codes, design.weights
    V0 = dense.covariance(Z, codes, D, weights)
    kept, p = fit.layout.fixed.kept, shared.n_fixed
    problem = st.with_responses(shared, drawn)
    U, Y_X, y = problem.U, problem.Y[0, :, :p], problem.Y[:, :, -1]
    unit = fit.scale / drawn.y_scale[0] ** 2
    X = design.X[:, kept] @ fit.layout.fixed.inverse
    for relative in (D, np.zeros_like(D), 4.0 * D):
        A = problem.z_factor @ relative @ problem.z_factor.T
        H = np.einsum("iam,ab,jbm->mij", U, A, U) + np.eye(len(A))
        right = np.einsum("mij,njm->nim", np.linalg.inv(H), y)
        quadratic = (problem.C[:, -1, -1] + np.einsum("nim,nim->n", y, right)) / unit
        cross = problem.C[:, :p, -1] + np.einsum("ixm,nim->nx", Y_X, right)

        inverse = np.linalg.inv(dense.covariance(Z, codes, relative, weights))
        product = inverse @ V0
        mean, variance = np.trace(product), 2.0 * np.trace(product @ product)
        fourth = 48.0 * np.trace(np.linalg.matrix_power(product, 4))  # cumulant
        assert abs(quadratic.mean() - mean) < 4.5 * np.sqrt(variance / n)
        spread = np.sqrt((fourth + 2.0 * variance**2) / n)
        assert abs(quadratic.var() - variance) < 4.5 * spread
        expected = unit * X.T @ inverse @ V0 @ inverse @ X
        error = np.sqrt((np.outer(np.diag(expected), np.diag(expected)) + expected**2) / n)
        assert np.max(np.abs(cross.T @ cross / n - expected) / error) < 4.5


def test_projected_rows_have_the_dense_quadratic_forms(slope: lmmax.Fit) -> None:
    y = simulate(slope, 2, seed=4).to_numpy().T
    shared = st.shared_designs(slope)
    responses = st.project(shared, y)
    codes, X, D = slope.design.groupings[0].codes, slope.design.X, 2.0 * slope.estimates.D
    V = dense.covariance(X, codes, D)
    for j, S in enumerate(whitened(shared, responses, D)):
        beta, information, rss = dense.gls(y[j], X, V)
        inside = np.linalg.solve(S[:2, :2], S[:2, 2])
        unit = responses.y_scale[j]
        np.testing.assert_allclose((S[2, 2] - S[:2, 2] @ inside) * unit**2, rss, rtol=1e-10)
        R = slope.layout.fixed.R
        np.testing.assert_allclose(R.T @ S[:2, :2] @ R, information, rtol=1e-10)
        np.testing.assert_allclose(
            np.linalg.solve(R, inside * unit + responses.origin[j]), beta, rtol=1e-10
        )


def test_balanced_groups_shrink_to_a_handful(slope: lmmax.Fit) -> None:
    shared = st.shared_designs(slope)
    # All subjects have the same days, so X has one direction across them, and y two effects.
    assert shared.sizes == [3]
    assert shared.problem.U.shape[2] == 4
    assert shared.residual_df == 180 - 18 * 2
    assert shared.problem.weight.sum() == pytest.approx(18.0, rel=1e-14)


def test_results_do_not_depend_on_the_number_of_devices(slope: lmmax.Fit, tmp_path: Any) -> None:
    script = (
        "import sys, numpy as np, jax, lmmax\n"
        "from lmmax.inference.bootstrap import bootstrap\n"
        "assert jax.local_device_count() == 2\n"
        "data = lmmax.datasets.load('sleepstudy')\n"
        "fit = lmmax.fit('Reaction ~ Days + (1 + Days | Subject)', data)\n"
        "np.save(sys.argv[1], bootstrap(fit, 70, seed=3).replicates.to_numpy())\n"
    )
    path = tmp_path / "two.npy"
    flags = "--xla_force_host_platform_device_count=2"
    subprocess.run(
        [sys.executable, "-c", script, str(path)],
        check=True,
        timeout=240,
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
    )
    from lmmax.inference.bootstrap import bootstrap

    here = bootstrap(slope, 70, seed=3).replicates.to_numpy()
    np.testing.assert_allclose(np.load(path), here, rtol=1e-9)


def test_the_order_of_lanes_does_not_matter(slope: lmmax.Fit) -> None:
    shared = st.shared_designs(slope)
    drawn = st.sampler(slope, shared).draw(generator(2, 0), 300)
    forward = refit_statistics(slope, shared, drawn)
    backward = refit_statistics(slope, shared, st.Responses(*(part[::-1] for part in drawn)))
    np.testing.assert_allclose(forward.llf, backward.llf[::-1], rtol=1e-13)
    np.testing.assert_allclose(forward.params, backward.params[::-1], rtol=1e-9)
