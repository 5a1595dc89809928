"""Covariance structures and relationship matrices, against glmmTMB and the dense oracle."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lmmax
from tests.oracles.dense import Array, Factor, Model
from tests.oracles.designs import RELATED, simulate
from tests.reference import load_data, load_records, matrix

pytestmark = pytest.mark.unoptimised

TMB = load_records(kinds=("glmmTMB",))
few = settings(max_examples=3, deadline=None, derandomize=True, database=None)


# --- glmmTMB --------------------------------------------------------------------------------


def test_there_are_as_many_records_as_expected() -> None:
    assert len(TMB) >= 19
    structures = {record["formula_py"].split("+ ")[1].split("(")[0] for record in TMB}
    assert structures == {"us", "diag", "cs", "ar1", "toep", "ou"}


@pytest.mark.parametrize("record", TMB, ids=lambda record: record["id"])
def test_glmmtmb(record: dict[str, Any]) -> None:
    stored = record["results"]
    fit = lmmax.fit(record["formula_py"], load_data(record["dataset"]), reml=record["reml"])
    assert fit.converged
    assert not fit.singular
    assert fit.nobs == stored["n"]
    assert fit.n_params == stored["npar"]

    # The criterion to 1e-8 relative.
    assert fit.deviance == pytest.approx(stored["criterion"], rel=1e-8)
    assert fit.aic == pytest.approx(stored["AIC"], rel=1e-8)
    # Coefficients and their errors to 1e-6, variances to 1e-5 of the largest.
    np.testing.assert_allclose(fit.params, matrix(stored["fixef"]), rtol=1e-6)
    np.testing.assert_allclose(fit.bse, matrix(stored["se"]), rtol=1e-6)
    vcov = matrix(stored["vcov"])
    np.testing.assert_allclose(fit.cov_params(), vcov, rtol=0.0, atol=2e-6 * vcov.max())
    cov = matrix(stored["varcorr"][0]["cov"])
    size = max(np.abs(cov).max(), stored["sigma"] ** 2)
    assert fit.scale == pytest.approx(stored["sigma"] ** 2, rel=1e-5)
    np.testing.assert_allclose(fit.cov_re.to_numpy(), cov, rtol=0.0, atol=1e-5 * size)
    # Conditional modes to 1e-5 of their spread.
    (block,) = stored["ranef"]
    modes = matrix(block["values"])
    assert len(fit.random_effects) == block["n_levels"]
    ours = fit.random_effects.loc[block["levels"]].to_numpy()
    np.testing.assert_allclose(ours, modes, rtol=0.0, atol=1e-5 * np.abs(modes).max())


# --- every structure against its definition -------------------------------------------------

LEVELS, TIMES = 4, np.array([0.0, 1.0, 2.5, 3.0])


def _lags() -> Array:
    return np.abs(np.subtract.outer(np.arange(LEVELS), np.arange(LEVELS)))


def _toeplitz(correlations: Array) -> Array:
    return np.concatenate([np.ones(1), correlations])[_lags()]


def _equal(rho: Any) -> Array:
    return np.where(_lags() == 0, 1.0, rho)


def _scaled(log_sd: Array, correlation: Array) -> Array:
    sd = np.exp(log_sd) * np.ones(LEVELS)
    return sd[:, None] * correlation * sd[None, :]


# Structure: parameters of a covariance -> the covariance, and back. The parameters are logs of
# standard deviations, then correlations (the log of the rate for ou).
STRUCTURES: dict[str, tuple[Any, Any]] = {
    "homdiag": (
        lambda v: _scaled(v[:1], np.eye(LEVELS)),
        lambda sd, r: np.log(sd[:1]),
    ),
    "diag": (lambda v: _scaled(v, np.eye(LEVELS)), lambda sd, r: np.log(sd)),
    "homcs": (
        lambda v: _scaled(v[:1], _equal(v[1])),
        lambda sd, r: np.append(np.log(sd[:1]), r[1, 0]),
    ),
    "cs": (
        lambda v: _scaled(v[:LEVELS], _equal(v[LEVELS])),
        lambda sd, r: np.append(np.log(sd), r[1, 0]),
    ),
    "ar1": (
        lambda v: _scaled(v[:1], v[1] ** _lags()),
        lambda sd, r: np.append(np.log(sd[:1]), r[1, 0]),
    ),
    "hetar1": (
        lambda v: _scaled(v[:LEVELS], v[LEVELS] ** _lags()),
        lambda sd, r: np.append(np.log(sd), r[1, 0]),
    ),
    "homtoep": (
        lambda v: _scaled(v[:1], _toeplitz(v[1:])),
        lambda sd, r: np.append(np.log(sd[:1]), r[1:, 0]),
    ),
    "toep": (
        lambda v: _scaled(v[:LEVELS], _toeplitz(v[LEVELS:])),
        lambda sd, r: np.append(np.log(sd), r[1:, 0]),
    ),
    "ou": (
        lambda v: _scaled(v[:1], np.exp(-np.exp(v[1]) * np.abs(np.subtract.outer(TIMES, TIMES)))),
        lambda sd, r: np.append(np.log(sd[:1]), np.log(-np.log(r[1, 0]))),
    ),
}


@pytest.fixture(scope="module")
def repeated() -> pd.DataFrame:
    """Two rows at each of four times in 20 groups; autocorrelated effects with unequal spread."""
    rng = np.random.Generator(np.random.PCG64(11))
    cov = _scaled(np.log([1.0, 1.3, 1.7, 1.2]), 0.6 ** _lags())
    effects = rng.standard_normal((20, LEVELS)) @ np.linalg.cholesky(cov).T
    g, f, _ = (grid.ravel() for grid in np.indices((20, LEVELS, 2)))
    x = rng.standard_normal(len(g))
    y = 1.0 + 0.5 * x + effects[g, f] + 0.7 * rng.standard_normal(len(g))
    labels = [f"t{i}" for i in range(LEVELS)]
    times = pd.Categorical.from_codes(f, labels, ordered=True)
    return pd.DataFrame({"y": y, "x": x, "g": g, "t": TIMES[f], "f": times})


@pytest.fixture(scope="module")
def dense_model(repeated: pd.DataFrame) -> Model:
    X = np.column_stack([np.ones(len(repeated)), repeated["x"]])
    Z = pd.get_dummies(repeated["f"]).to_numpy(float)
    return Model(repeated["y"].to_numpy(), X, (Factor(repeated["g"].to_numpy(), Z),))


def fit_structure(structure: str, data: pd.DataFrame, *, reml: bool = True) -> lmmax.Fit:
    factor = "C(t)" if structure == "ou" else "f"
    return lmmax.fit(f"y ~ x + {structure}(0 + {factor} | g)", data, reml=reml)


@pytest.mark.parametrize("reml", [True, False])
@pytest.mark.parametrize("structure", STRUCTURES)
def test_structure(structure: str, reml: bool, repeated: pd.DataFrame, dense_model: Model) -> None:
    """The covariance has its form, and the gradient in the form's own parameters is zero."""
    build, read = STRUCTURES[structure]
    fit = fit_structure(structure, repeated, reml=reml)
    assert fit.converged
    assert not fit.singular
    cov, scale = fit.cov_re.to_numpy(), fit.scale
    sd = np.sqrt(np.diag(cov))
    tau = np.append(read(sd, cov / np.outer(sd, sd)), np.log(scale))
    np.testing.assert_allclose(build(tau[:-1]), cov, rtol=1e-9, atol=1e-9 * cov.max())
    assert fit.n_params == 2 + len(tau)

    def criterion(t: Array) -> Any:
        return dense_model.natural_criterion([build(t[:-1])], np.exp(t[-1]), reml)

    assert fit.deviance == pytest.approx(criterion(tau), rel=1e-10)
    beta, vcov = dense_model.coefficients([cov], scale)
    np.testing.assert_allclose(fit.params, beta, rtol=1e-8)
    np.testing.assert_allclose(fit.cov_params(), vcov, rtol=1e-7, atol=1e-12)
    (modes,) = dense_model.modes([cov], scale)
    np.testing.assert_allclose(fit.random_effects, modes, rtol=0, atol=1e-8 * modes.max())
    (variances,) = dense_model.conditional_covariances([cov], scale)
    np.testing.assert_allclose(
        fit.random_effects_cov, variances, rtol=0, atol=1e-8 * variances.max()
    )

    def gradient(t: Array) -> Array:
        h = 1e-30
        return np.array([np.imag(criterion(t + 1j * h * e)) / h for e in np.eye(len(t))])

    slope, h = gradient(tau), 1e-4
    hessian = np.array(
        [(gradient(tau + h * e) - gradient(tau - h * e)) / (2 * h) for e in np.eye(len(tau))]
    )
    assert np.linalg.eigvalsh(0.5 * (hessian + hessian.T))[0] > 0.0
    assert abs(slope @ np.linalg.solve(hessian, slope)) < 1e-9


@pytest.mark.parametrize(
    "chain",
    [
        ("homdiag", "homcs", "homtoep", "toep", "us"),
        ("homdiag", "ar1", "hetar1", "toep", "us"),
        ("homdiag", "diag", "cs", "toep", "us"),
        ("ar1", "homtoep"),
    ],
    ids="-".join,
)
def test_more_general_structures_fit_better(chain: tuple[str, ...], repeated: pd.DataFrame) -> None:
    fits = [fit_structure(structure, repeated) for structure in chain]
    values = np.array([fit.deviance for fit in fits])
    assert np.all(np.diff(values) < 1e-8)
    assert np.all(np.diff([fit.n_params for fit in fits]) > 0)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("us(0 + f | g)", "(0 + f | g)"),
        ("diag(0 + f | g)", "(0 + f || g)"),
        ("id(0 + f | g)", "homdiag(0 + f | g)"),
        ("homdiag(0 + f | g)", "(1 | g:f)"),
        ("us(1 | g)", "(1 | g)"),
        ("cs(1 + x | g)", "(1 + x | g)"),
        ("homcs(0 + f | g)", "(1 | g) + homdiag(0 + f | g)"),
        ("(1 | g) + homdiag(0 + f | g)", "(1 | g) + (1 | g:f)"),
    ],
)
def test_two_ways_to_say_the_same(one: str, other: str, repeated: pd.DataFrame) -> None:
    fits = [lmmax.fit(f"y ~ x + {random}", repeated) for random in (one, other)]
    assert all(fit.converged for fit in fits)
    assert fits[0].deviance == pytest.approx(fits[1].deviance, rel=1e-10)
    assert fits[0].n_params == fits[1].n_params
    np.testing.assert_allclose(fits[0].params, fits[1].params, rtol=1e-6)
    assert fits[0].scale == pytest.approx(fits[1].scale, rel=1e-6)


def test_order_of_levels_matters_to_ar1_alone(repeated: pd.DataFrame) -> None:
    """Compound symmetry is blind to an exchange of two times, autoregression is not."""
    order = ["t2", "t1", "t0", "t3"]
    exchanged = repeated.assign(f=repeated["f"].cat.reorder_categories(order, ordered=True))
    for structure, same in (("homcs", True), ("ar1", False)):
        one, two = (fit_structure(structure, data).deviance for data in (repeated, exchanged))
        assert (abs(one - two) < 1e-8 * abs(one)) == same


def test_structure_beside_another_factor(repeated: pd.DataFrame) -> None:
    """An autoregressive term and a crossed intercept, against the dense model."""
    rng = np.random.Generator(np.random.PCG64(2))
    h = rng.integers(0, 8, len(repeated))
    data = repeated.assign(h=h, y=repeated["y"] + rng.standard_normal(8)[h])
    fit = lmmax.fit("y ~ x + ar1(0 + f | g) + (1 | h)", data)
    assert fit.converged
    Z = pd.get_dummies(data["f"]).to_numpy(float)
    factors = (Factor(data["g"].to_numpy(), Z), Factor(h, np.ones((len(h), 1))))
    X = np.column_stack([np.ones(len(data)), data["x"]])
    model = Model(data["y"].to_numpy(), X, factors)
    cov = fit.cov_re.to_numpy()
    blocks = [cov[:LEVELS, :LEVELS], cov[LEVELS:, LEVELS:]]
    assert not cov[:LEVELS, LEVELS:].any()
    assert fit.deviance == pytest.approx(
        model.natural_criterion(blocks, fit.scale, True), rel=1e-10
    )
    build, _ = STRUCTURES["ar1"]
    sd = np.sqrt(cov[0, 0])
    tau = np.array([np.log(sd), cov[1, 0] / sd**2, np.log(cov[-1, -1]), np.log(fit.scale)])
    np.testing.assert_allclose(build(tau[:2]), blocks[0], rtol=1e-9)

    def criterion(t: Array) -> Any:
        covs = [build(t[:2]), np.exp(t[2]) * np.ones((1, 1))]
        return model.natural_criterion(covs, np.exp(t[3]), True)

    slopes = [np.imag(criterion(tau + 1e-30j * e)) / 1e-30 for e in np.eye(4)]
    assert np.max(np.abs(slopes)) < 1e-4
    (modes_g, modes_h), (_, variances_h) = (
        model.modes(blocks, fit.scale),
        model.conditional_covariances(blocks, fit.scale),
    )
    np.testing.assert_allclose(fit.random_effects["g"], modes_g, rtol=0, atol=1e-8 * modes_g.max())
    np.testing.assert_allclose(fit.random_effects["h"], modes_h, rtol=0, atol=1e-8 * modes_h.max())
    np.testing.assert_allclose(fit.random_effects_cov["h"], variances_h, rtol=1e-8)


# --- relationship matrices ------------------------------------------------------------------


@pytest.mark.parametrize("kind", RELATED)
@few
@given(seed=st.integers(min_value=0, max_value=2**20), reml=st.booleans())
def test_related_levels_at_fixed_parameters(kind: str, seed: int, reml: bool) -> None:
    problem = simulate(kind, seed)
    fit = lmmax.fit(
        problem.formula,
        problem.data,
        reml=reml,
        relmat=problem.relmat,
        fix={"cov_re": problem.covs, "scale": problem.scale},
    )
    model, covs = problem.model, problem.by_factor(problem.covs)
    expected = model.natural_criterion(covs, problem.scale, reml)
    assert fit.deviance == pytest.approx(expected, rel=1e-10)
    beta, cov = model.coefficients(covs, problem.scale)
    np.testing.assert_allclose(fit.params, beta, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(fit.cov_params(), cov, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(
        fit.fittedvalues, model.fitted(covs, problem.scale), rtol=0, atol=1e-8
    )
    several = len(problem.terms) > 1
    for group, modes, variances in zip(
        problem.terms,
        model.modes(covs, problem.scale),
        model.conditional_covariances(covs, problem.scale),
        strict=True,
    ):
        effects = fit.random_effects[group] if several else fit.random_effects
        ours = fit.random_effects_cov[group] if several else fit.random_effects_cov
        order = effects.index.get_indexer(problem.levels[group])
        np.testing.assert_allclose(effects.to_numpy()[order], modes, rtol=0, atol=1e-8)
        np.testing.assert_allclose(ours[order], variances, rtol=0, atol=1e-8)


@pytest.mark.parametrize("reml", [True, False])
@pytest.mark.parametrize("kind", RELATED)
def test_related_levels_at_the_optimum(kind: str, reml: bool) -> None:
    problem = simulate(kind, 1)
    fit = lmmax.fit(problem.formula, problem.data, reml=reml, relmat=problem.relmat)
    assert fit.converged
    terms = problem.by_term(fit.cov_re.to_numpy())
    model, covs, scale = problem.model, problem.by_factor(terms), fit.scale
    value = model.natural_criterion(covs, scale, reml)
    assert fit.deviance == pytest.approx(value, rel=1e-10)
    rng = np.random.Generator(np.random.PCG64(0))
    for step in (1e-3, 1e-2, 0.1, 0.5):
        for _ in range(4):
            other = {}
            for label, cov in terms.items():
                root = np.linalg.cholesky(cov + 1e-12 * scale * np.eye(len(cov)))
                root = root + step * np.sqrt(scale) * rng.standard_normal(root.shape)
                other[label] = root @ root.T
            factor = np.exp(step * rng.standard_normal())
            perturbed = model.natural_criterion(problem.by_factor(other), scale * factor, reml)
            assert perturbed >= value - 1e-9
    assert not fit.singular
    score, information = model.score_and_information(covs, scale, reml, problem.pairs())
    assert abs(score @ np.linalg.solve(information, score)) < 1e-9
    errors = np.sqrt(np.diag(np.linalg.inv(information)))
    assert fit.varcorr()["vcov_se"].iloc[-1] == pytest.approx(errors[-1], rel=1e-5)


@pytest.mark.parametrize("kind", RELATED)
def test_relationship_of_identity_is_none(kind: str) -> None:
    problem = simulate(kind, 0)
    K = problem.relmat["a"]
    identity = pd.DataFrame(np.eye(len(K)), index=K.index, columns=K.columns)
    plain = lmmax.fit(problem.formula, problem.data)
    unit = lmmax.fit(problem.formula, problem.data, relmat={"a": identity})
    related = lmmax.fit(problem.formula, problem.data, relmat=problem.relmat)
    assert unit.deviance == pytest.approx(plain.deviance, rel=1e-10)
    assert unit.scale == pytest.approx(plain.scale, rel=1e-7)
    np.testing.assert_allclose(unit.params, plain.params, rtol=1e-6)
    assert abs(related.deviance - plain.deviance) > 1e-3


def test_relationship_goes_by_labels() -> None:
    """The order of its rows and columns does not matter, and levels without data cost nothing."""
    problem = simulate("related", 0)
    K = problem.relmat["a"]
    fit = lmmax.fit(problem.formula, problem.data, relmat={"a": K})
    order = list(K.index[::-1])
    shuffled = lmmax.fit(problem.formula, problem.data, relmat={"a": K.loc[order, order]})
    assert shuffled.deviance == pytest.approx(fit.deviance, rel=1e-10)
    effects = fit.random_effects["a"].loc[problem.levels["a"]]
    ours = shuffled.random_effects["a"].loc[problem.levels["a"]]
    np.testing.assert_allclose(ours, effects, rtol=1e-6, atol=1e-8)
    larger = pd.DataFrame(
        np.block(
            [[K.to_numpy(), 0.1 * np.ones((len(K), 1))], [0.1 * np.ones((1, len(K))), np.eye(1)]]
        ),
        index=[*K.index, "a99"],
        columns=[*K.columns, "a99"],
    )
    assert np.linalg.eigvalsh(larger)[0] > 0.0
    more = lmmax.fit(problem.formula, problem.data, relmat={"a": larger})
    assert more.deviance == pytest.approx(fit.deviance, rel=1e-10)
    ours = more.random_effects["a"].loc[problem.levels["a"]]
    np.testing.assert_allclose(ours, effects, rtol=1e-6, atol=1e-8)


def test_multiple_of_a_relationship() -> None:
    """Twice the matrix is half the variance."""
    problem = simulate("related_slope", 0)
    fit = lmmax.fit(problem.formula, problem.data, relmat=problem.relmat)
    twice = lmmax.fit(problem.formula, problem.data, relmat={"a": 2.0 * problem.relmat["a"]})
    assert twice.deviance == pytest.approx(fit.deviance, rel=1e-10)
    cov = fit.cov_re.loc["a", "a"].to_numpy()
    half = twice.cov_re.loc["a", "a"].to_numpy()
    np.testing.assert_allclose(2.0 * half, cov, rtol=1e-6, atol=1e-7 * cov.max())
    np.testing.assert_allclose(
        twice.random_effects["a"], fit.random_effects["a"], rtol=0, atol=1e-6
    )


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda K: {"a": K.drop(index="a03", columns="a03")}, "a03"),
        (lambda K: {"a": K.assign(a01=K["a01"] + 1.0)}, "symmetric"),
        (lambda K: {"nothing": K}, "nothing"),
        (lambda K: {"a": -K}, "positive"),
        (lambda K: {"a": K.where(K.iloc[0, 0] != K)}, "finite|missing"),
    ],
    ids=["level", "asymmetric", "factor", "negative", "missing"],
)
def test_unfit_relationships(change: Any, match: str) -> None:
    """An error before anything is fitted, naming the level, the factor or the property."""
    problem = simulate("related", 0)
    with pytest.raises(lmmax.DataError, match=match):
        lmmax.fit(problem.formula, problem.data, relmat=change(problem.relmat["a"]))
