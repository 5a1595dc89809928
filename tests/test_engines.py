"""Which form of the likelihood serves a model, that all forms agree, and what they refuse."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from jax import Array

import lmmax
from lmmax.compress import Engine, FactorColumns, layout
from lmmax.compress.layout import choose_engine
from lmmax.covariances import Covariance
from lmmax.design import build_design
from lmmax.fit import arrange
from tests.oracles.dense import Factor, Model

CROSSED = "y ~ x + (1 | a) + (1 | b)"
NESTED = "y ~ x + (1 | a/c)"
LABELS = ["early", "late", "mid"]  # of f


def _data(seed: int) -> pd.DataFrame:
    """12 x 8 crossed groups a and b, c nested in a, three levels f; in random order."""
    rng = np.random.Generator(np.random.PCG64(seed))
    a, b, f = (grid.ravel() for grid in np.indices((12, 8, 3)))
    keep = rng.permutation(len(a))[:240]
    a, b, f = a[keep], b[keep], f[keep]
    c = (b + f) % 4
    x = rng.standard_normal(len(a))
    y = 1.0 + 0.5 * x + rng.standard_normal(12)[a] + 0.8 * rng.standard_normal(8)[b]
    y += 0.9 * rng.standard_normal((12, 4))[a, c] + 0.7 * rng.standard_normal((12, 3))[a, f]
    y += 0.3 * rng.standard_normal(8)[b] * x + 0.6 * rng.standard_normal(len(a))
    return pd.DataFrame(
        {
            "y": y,
            "x": x,
            "a": [f"a{i:02d}" for i in a],
            "b": [f"b{i}" for i in b],
            "c": [f"c{i}" for i in c],
            "t": f,
            "f": np.array(LABELS)[f],
        }
    )


@pytest.fixture(scope="module")
def data() -> pd.DataFrame:
    return _data(3)


@pytest.fixture(scope="module")
def crossed(data: pd.DataFrame) -> lmmax.Fit:
    return lmmax.fit(CROSSED, data)


@pytest.fixture(scope="module")
def nested(data: pd.DataFrame) -> lmmax.Fit:
    return lmmax.fit(NESTED, data)


@pytest.fixture(scope="module")
def iterative(data: pd.DataFrame) -> lmmax.Fit:
    return lmmax.fit(CROSSED, data, engine="iterative")


@pytest.fixture(scope="module")
def structured(data: pd.DataFrame) -> lmmax.Fit:
    return lmmax.fit("y ~ x + ar1(0 + C(t) | a) + (1 | b)", data)


def relationship(levels: pd.Series) -> pd.DataFrame:
    """Neighbours have a correlation of a half."""
    names = sorted(set(levels))
    lag = np.abs(np.subtract.outer(np.arange(len(names)), np.arange(len(names))))
    return pd.DataFrame(0.5**lag, index=names, columns=names)


def assert_same_optimum(one: lmmax.Fit, two: lmmax.Fit) -> None:
    assert one.converged
    assert two.converged
    assert one.deviance == pytest.approx(two.deviance, abs=1e-9)
    np.testing.assert_allclose(one.params, two.params, rtol=1e-6)
    size = np.abs(two.cov_re.to_numpy()).max()
    np.testing.assert_allclose(one.cov_re, two.cov_re, rtol=0, atol=1e-6 * size)
    assert one.scale == pytest.approx(two.scale, rel=1e-6)


# --- which one, and why ---------------------------------------------------------------------


def engine_of(random: str, data: pd.DataFrame, asked: str = "auto", **options: Any) -> Engine:
    """The engine of a fit of these random terms, without the fit."""
    design = build_design(f"y ~ x + {random}", data, **options)
    factors, _ = arrange(design)
    return layout(design.X, factors, engine=asked).engine


@pytest.mark.parametrize(
    ("random", "name", "reason"),
    [
        ("(1 | a)", "grouped", "one grouping factor, a"),
        ("(1 | a) + (0 + x | a)", "grouped", "one grouping factor, a"),
        ("(1 | a/c)", "nested", "a:c in a, level by level"),
        ("(1 | a:c:f) + (1 | a) + (1 | a:c)", "nested", "a:c:f in a:c in a, level by level"),
        ("(1 | a) + (1 | b)", "crossed", "a eliminated first, {} 8 effects"),
        ("(1 | a) + (1 + x | b)", "crossed", "b eliminated first, {} 12 effects"),
        ("(1 | a/c) + (1 | b)", "crossed", "a:c eliminated first, {} 20 effects"),
    ],
)
def test_name_and_reason(random: str, name: str, reason: str, data: pd.DataFrame) -> None:
    expected = (name, reason.format("a dense factor for the other"))
    assert engine_of(random, data) == expected
    assert engine_of(random, data, name) == expected


@pytest.mark.parametrize(
    ("random", "reason"),
    [
        ("(1 | a)", "a dense factor for the 12 related effects"),
        ("(1 | a) + (1 | b)", "b eliminated first, a dense factor for the other 12 effects"),
        ("(1 | a/c)", "a:c eliminated first, a dense factor for the other 12 effects"),
    ],
)
def test_relationship_matrix_calls_for_the_crossed_form(
    random: str, reason: str, data: pd.DataFrame
) -> None:
    """A factor with related levels is never the one eliminated, however large."""
    relmat = {"a": relationship(data["a"])}
    for asked in ("auto", "crossed"):
        assert engine_of(random, data, asked, relmat=relmat) == ("crossed", reason)
    with pytest.raises(lmmax.EngineError):
        engine_of(random, data, "nested", relmat=relmat)


def test_engine_of_a_fit(
    crossed: lmmax.Fit, nested: lmmax.Fit, structured: lmmax.Fit, data: pd.DataFrame
) -> None:
    for fit, name in ((crossed, "crossed"), (nested, "nested"), (structured, "crossed")):
        assert fit.engine.name == name
        assert fit.engine == engine_of(fit.formula.removeprefix("y ~ x + "), data)
        assert str(fit.engine) == f"{name} ({fit.engine.reason})"
        assert fit.criterion_error == 0.0


def test_iterative_says_that_it_was_asked_for(iterative: lmmax.Fit) -> None:
    assert iterative.engine == ("iterative", "as asked for")


def test_summary_states_the_error_of_the_criterion(
    crossed: lmmax.Fit, iterative: lmmax.Fit
) -> None:
    text = str(iterative.summary())
    assert "Monte Carlo estimate" in text
    assert "(seed" in text
    assert "Monte Carlo" not in str(crossed.summary())


# --- all forms agree ------------------------------------------------------------------------


@pytest.mark.parametrize("reml", [True, False])
def test_nested_data_in_the_crossed_form(reml: bool, data: pd.DataFrame, nested: lmmax.Fit) -> None:
    one = nested if reml else lmmax.fit(NESTED, data, reml=False)
    two = lmmax.fit(NESTED, data, reml=reml, engine="crossed")
    assert (one.engine.name, two.engine.name) == ("nested", "crossed")
    assert_same_optimum(one, two)
    np.testing.assert_allclose(one.bse, two.bse, rtol=1e-6)
    np.testing.assert_allclose(one.varcorr()["vcov_se"], two.varcorr()["vcov_se"], rtol=1e-5)
    for name, effects in one.random_effects.items():
        pd.testing.assert_frame_equal(effects, two.random_effects[name], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(
            one.random_effects_cov[name], two.random_effects_cov[name], rtol=1e-5
        )


@pytest.mark.parametrize(
    ("n_fixed", "parents", "name"),
    [(20, 10, "nested"), (800, 10, "crossed"), (20, 50_000, "nested"), (100, 100_000, "nested")],
)
def test_nested_factors_with_many_columns(n_fixed: int, parents: int, name: str) -> None:
    """Cross-products of many columns by group are larger than a dense factor of few groups."""
    coarse = np.arange(parents)
    Z = (np.ones((2 * parents, 1)),)
    factors = (
        FactorColumns("fine", np.arange(2 * parents), 2 * parents, Z, (True,)),
        FactorColumns("coarse", np.repeat(coarse, 2), parents, Z, (True,)),
    )
    assert choose_engine(factors, "auto", n_fixed)[0].name == name
    assert choose_engine(factors, "nested", n_fixed)[0].name == "nested"


def test_asking_for_what_auto_takes_changes_nothing(
    data: pd.DataFrame, crossed: lmmax.Fit, nested: lmmax.Fit
) -> None:
    assert lmmax.fit(CROSSED, data, engine="crossed").deviance == crossed.deviance
    assert lmmax.fit(NESTED, data, engine="nested").deviance == nested.deviance


def test_iterative_agrees_within_its_error(crossed: lmmax.Fit, iterative: lmmax.Fit) -> None:
    assert iterative.converged
    assert iterative.criterion_error > 0.0
    difference = abs(iterative.deviance - crossed.deviance)
    assert difference <= 4.0 * iterative.criterion_error + 1e-6
    # The estimates are those of a criterion that is off by as much: a fraction of a standard error.
    assert np.all(np.abs(iterative.params - crossed.params) < 0.05 * crossed.bse)
    np.testing.assert_allclose(iterative.bse, crossed.bse, rtol=0.05)
    table, exact = iterative.varcorr(), crossed.varcorr()
    assert np.all(np.abs(table["vcov"] - exact["vcov"]) < 0.2 * exact["vcov_se"])
    assert list(iterative.random_effects) == list(crossed.random_effects)
    for name, effects in crossed.random_effects.items():
        assert list(iterative.random_effects[name].index) == list(effects.index)
        spread = effects.to_numpy().std()
        assert np.max(np.abs(iterative.random_effects[name] - effects).to_numpy()) < 0.1 * spread


def test_seed_decides_the_numbers(data: pd.DataFrame, iterative: lmmax.Fit) -> None:
    again = lmmax.fit(CROSSED, data, engine="iterative")
    assert again.deviance == iterative.deviance
    assert again.criterion_error == iterative.criterion_error
    np.testing.assert_array_equal(again.theta, iterative.theta)
    np.testing.assert_array_equal(again.params, iterative.params)
    other = lmmax.fit(CROSSED, data, engine="iterative", seed=1)
    error = np.hypot(other.criterion_error, iterative.criterion_error)
    assert abs(other.deviance - iterative.deviance) <= 4.0 * error + 1e-6


# --- what they refuse -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("formula", "engine", "message"),
    [
        (
            CROSSED,
            "dense",
            "engine='dense' is unknown; use one of 'auto', 'grouped', 'nested', 'crossed', "
            "'iterative'",
        ),
        (
            CROSSED,
            "nested",
            "engine='nested' needs two or more factors, each nested in the next, with independent "
            "levels; this model has a, b",
        ),
        (
            CROSSED,
            "grouped",
            "engine='grouped' needs one grouping factor with independent levels; this model has "
            "a, b",
        ),
        (
            "y ~ x + (1 | a)",
            "crossed",
            "engine='crossed' is for several grouping factors; this model has one, a",
        ),
        (
            "y ~ x + (1 | a)",
            "iterative",
            "engine='iterative' is for several grouping factors; this model has one, a",
        ),
        (
            "y ~ x + homcs(0 + f | a) + (1 | b)",
            "iterative",
            "engine='iterative' does not take covariance structures; use engine='crossed'",
        ),
    ],
)  # fmt: skip
def test_engine_that_does_not_fit(
    formula: str, engine: str, message: str, data: pd.DataFrame
) -> None:
    with pytest.raises(lmmax.EngineError) as caught:
        lmmax.fit(formula, data, engine=engine)
    assert str(caught.value) == message
    assert isinstance(caught.value, ValueError)


def test_nested_is_not_for_one_factor(data: pd.DataFrame) -> None:
    with pytest.raises(lmmax.EngineError, match="'nested' needs two or more factors"):
        lmmax.fit("y ~ x + (1 | a)", data, engine="nested")


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ({"fix": {"scale": 0.5}}, "fix="),
        ({"fix": {"cov_re": {"(1 | a)": [[1.0]]}}}, "fix="),
        ({"relmat": True}, "relationship matrices (of a)"),
    ],
)
def test_what_the_iterative_engine_does_not_take(
    options: dict[str, Any], what: str, data: pd.DataFrame
) -> None:
    if "relmat" in options:
        options = {"relmat": {"a": relationship(data["a"])}}
    with pytest.raises(lmmax.EngineError) as caught:
        lmmax.fit(CROSSED, data, engine="iterative", **options)
    assert what in str(caught.value)
    assert "engine='iterative' does not take" in str(caught.value)


def test_iterative_has_no_conditional_covariances(iterative: lmmax.Fit) -> None:
    with pytest.raises(lmmax.EngineError, match=r"no conditional covariances.*engine='crossed'"):
        _ = iterative.random_effects_cov


@pytest.fixture
def small_machine(monkeypatch: pytest.MonkeyPatch) -> int:
    """A machine whose memory holds five effects of the tail, and no more."""
    # By name, because the package has a function of the name of the module.
    layout = importlib.import_module("lmmax.compress.layout")
    limit = 5
    size = layout.COPIES * 8.0 * (limit + 0.5) ** 2 / 0.8
    for module in ("layout", "crossed"):
        monkeypatch.setattr(
            importlib.import_module(f"lmmax.compress.{module}"), "memory", lambda: size
        )
    return limit


def test_without_memory_auto_takes_the_iterative_form(
    small_machine: int, data: pd.DataFrame, crossed: lmmax.Fit, iterative: lmmax.Fit
) -> None:
    fit = lmmax.fit(CROSSED, data)
    assert fit.engine.name == "iterative"
    assert fit.engine.reason == (
        f"8 effects beside a, more than a dense factor should hold here, {small_machine}"
    )
    assert fit.deviance == iterative.deviance


def test_without_memory_the_crossed_form_says_so(small_machine: int, data: pd.DataFrame) -> None:
    with pytest.raises(lmmax.EngineError) as caught:
        lmmax.fit(CROSSED, data, engine="crossed")
    text = str(caught.value)
    assert "a dense matrix of order 8 " in text
    assert "for the effects of b, about" in text
    assert "use engine='iterative', or fewer levels" in text


@pytest.mark.parametrize("formula", ["y ~ x + (1 | a)", NESTED])
def test_without_memory_other_forms_still_serve(
    formula: str, small_machine: int, data: pd.DataFrame
) -> None:
    assert lmmax.fit(formula, data).engine.name in ("grouped", "nested")


# --- arrays ---------------------------------------------------------------------------------


def test_arrays_by_factor(data: pd.DataFrame) -> None:
    """Mappings of groups, designs, names and structures are the formula's terms."""
    X = np.column_stack([np.ones(len(data)), data["x"]])
    fit = lmmax.fit_arrays(
        data["y"].to_numpy(),
        X,
        {"a": data["a"].to_numpy(), "b": data["b"].to_numpy()},
        {"b": X},
        x_names=["Intercept", "x"],
        z_names={"b": ["Intercept", "x"]},
        covariance={"b": "diag"},
    )
    other = lmmax.fit("y ~ x + (1 | a) + (1 + x || b)", data)
    assert fit.group_names == ("a", "b")
    assert fit.n_groups == {"a": 12, "b": 8}
    assert_same_optimum(fit, other)
    np.testing.assert_allclose(fit.random_effects["b"], other.random_effects["b"], atol=1e-6)
    assert list(fit.random_effects["b"].columns) == ["Intercept", "x"]
    new = {
        "X": X[:3],
        "groups": {"a": data["a"][:3], "b": ["b0", "b1", "other"]},
        "Z": {"b": X[:3]},
    }
    frame = data[:3].assign(b=["b0", "b1", "other"])
    np.testing.assert_allclose(
        fit.predict(new, new_levels="population"),
        other.predict(frame, new_levels="population"),
        rtol=1e-6,
    )


def test_arrays_in_a_data_frame_of_groups(data: pd.DataFrame, crossed: lmmax.Fit) -> None:
    X = np.column_stack([np.ones(len(data)), data["x"]])
    fit = lmmax.fit_arrays(data["y"], X, data[["a", "b"]])
    assert fit.deviance == pytest.approx(crossed.deviance, abs=1e-9)
    assert fit.engine == crossed.engine


# --- prediction -----------------------------------------------------------------------------


def test_predicting_with_some_terms(data: pd.DataFrame, crossed: lmmax.Fit) -> None:
    marginal = crossed.predict(random_effects=False)
    parts = {
        name: crossed.random_effects[name]["Intercept"].loc[data[name]].to_numpy()
        for name in ("a", "b")
    }
    for asked, expected in [
        (["a"], parts["a"]),
        ("a", parts["a"]),
        ("(1 | b)", parts["b"]),
        (["(1 | a)"], parts["a"]),
        (["(1 | a)", "a"], parts["a"]),
        ({"b", "(1 | a)"}, parts["a"] + parts["b"]),
        ([], 0.0),
        (True, parts["a"] + parts["b"]),
    ]:
        for rows in (None, data):
            predicted = crossed.predict(rows, random_effects=asked)
            np.testing.assert_allclose(predicted, marginal + expected, rtol=1e-12)


def test_predicting_with_one_of_two_terms_of_a_factor(data: pd.DataFrame) -> None:
    labels = ["(1 | b)", "(0 + x | b)", "(1 | a)"]
    fit = lmmax.fit(f"y ~ x + {' + '.join(labels)}", data)
    slope = labels[1]
    total = fit.predict(random_effects=False)
    for label in labels:
        total = total + fit.predict(random_effects=[label]) - fit.predict(random_effects=False)
    np.testing.assert_allclose(total, fit.fittedvalues, rtol=1e-12)
    expected = fit.random_effects["b"]["x"].loc[data["b"]].to_numpy() * data["x"]
    predicted = fit.predict(data, random_effects=slope) - fit.predict(data, random_effects=False)
    np.testing.assert_allclose(predicted, expected, atol=1e-12)


def test_predicting_needs_the_columns_of_chosen_factors_only(
    data: pd.DataFrame, crossed: lmmax.Fit
) -> None:
    rows = data[:5]
    expected = crossed.predict(random_effects=["a"])[:5]
    np.testing.assert_allclose(
        crossed.predict(rows.drop(columns="b"), random_effects=["a"]), expected, rtol=1e-12
    )
    with pytest.raises(lmmax.DataError, match="'b'"):
        crossed.predict(rows.drop(columns="b"))


@pytest.mark.parametrize("asked", [["c"], "(1 | c)", ["a", "A"]])
def test_predicting_with_unknown_terms(asked: Any, crossed: lmmax.Fit) -> None:
    with pytest.raises(ValueError, match=r"this model has .* 'a', 'b', '\(1 \| a\)'"):
        crossed.predict(random_effects=asked)


@pytest.mark.parametrize(("factor", "other"), [("a", "b"), ("b", "a")])
def test_new_levels_of_one_factor(
    factor: str, other: str, data: pd.DataFrame, crossed: lmmax.Fit
) -> None:
    rows = data[:4].copy()
    rows.loc[rows.index[2], factor] = "new"
    with pytest.raises(lmmax.DataError, match=rf"groups of '{factor}'.*new_levels='population'"):
        crossed.predict(rows)
    predicted = crossed.predict(rows, new_levels="population")
    only_other = crossed.predict(rows, random_effects=[other])
    whole = crossed.predict(data[:4])
    assert predicted.iloc[2] == pytest.approx(only_other.iloc[2], rel=1e-12)
    np.testing.assert_allclose(predicted.iloc[[0, 1, 3]], whole.iloc[[0, 1, 3]], rtol=1e-12)


# --- start and fix --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["crossed", "nested", "structured"])
def test_starting_from_an_earlier_fit(
    name: str, data: pd.DataFrame, request: pytest.FixtureRequest
) -> None:
    fit = request.getfixturevalue(name)
    for start in (fit, fit.theta, {"cov_re": fit.cov_re, "scale": fit.scale}):
        again = lmmax.fit(fit.formula, data, start=start, em_steps=0)
        assert_same_optimum(again, fit)
        assert again.convergence.steps <= 4 < fit.convergence.steps


def test_theta_has_the_entries_of_all_terms(structured: lmmax.Fit, crossed: lmmax.Fit) -> None:
    assert crossed.theta.shape == (2,)
    np.testing.assert_allclose(
        crossed.theta, np.sqrt(np.diag(crossed.cov_re) / crossed.scale), rtol=1e-12
    )
    assert structured.theta.shape == (2 + 1,)


def test_start_of_the_wrong_length(data: pd.DataFrame) -> None:
    with pytest.raises(lmmax.ConstraintError, match="2"):
        lmmax.fit(CROSSED, data, start=[1.0, 1.0, 1.0])


@pytest.mark.parametrize("name", ["crossed", "nested"])
def test_fixing_one_term_or_all(
    name: str, data: pd.DataFrame, request: pytest.FixtureRequest
) -> None:
    """Held at their estimates nothing moves, and each costs no parameter."""
    fit = request.getfixturevalue(name)
    cov = fit.cov_re.to_numpy()
    labels = [term.label for term in fit.terms]
    blocks = {term.label: cov[term.columns, term.columns] for term in fit.terms}
    for held in (labels[:1], labels[1:], labels):
        fixed = lmmax.fit(
            fit.formula, data, fix={"cov_re": {label: blocks[label] for label in held}}
        )
        assert_same_optimum(fixed, fit)
        assert fixed.n_params == fit.n_params - len(held)
        table = fixed.varcorr().set_index("group")["vcov_se"]
        free = [term.factor for term in fit.terms if term.label not in held]
        names = [fit.group_names[at] for at in free]
        assert list(table.index[table.notna()]) == [*names, "Residual"]
    whole = lmmax.fit(fit.formula, data, fix={"cov_re": cov, "scale": fit.scale})
    assert whole.deviance == pytest.approx(fit.deviance, abs=1e-9)
    assert whole.n_params == 2


def test_fixing_a_term_that_is_not_there(data: pd.DataFrame) -> None:
    with pytest.raises(lmmax.ConstraintError, match=r"'\(1 \| c\)'.*'\(1 \| a\)', '\(1 \| b\)'"):
        lmmax.fit(CROSSED, data, fix={"cov_re": {"(1 | c)": [[1.0]]}})


def test_fixing_covariances_between_factors(data: pd.DataFrame) -> None:
    with pytest.raises(lmmax.ConstraintError, match="uncorrelated"):
        lmmax.fit(CROSSED, data, fix={"cov_re": [[1.0, 0.1], [0.1, 1.0]]})


# --- structures -----------------------------------------------------------------------------


def test_table_of_structures(structured: lmmax.Fit, crossed: lmmax.Fit) -> None:
    table = structured.structures()
    assert list(table.columns) == ["term", "parameter", "estimate", "std err"]
    assert set(table["term"]) == {structured.terms[0].label}
    cov = structured.cov_re.to_numpy()
    sd = np.sqrt(cov[0, 0])
    np.testing.assert_allclose(table["estimate"], [sd, cov[1, 0] / cov[0, 0]], rtol=1e-10)
    assert np.all(table["std err"] > 0.0)
    assert crossed.structures().empty


@dataclass(frozen=True)
class Proportional(Covariance):
    """A known matrix times one unknown variance."""

    shape: tuple[tuple[float, ...], ...]
    name = "proportional"

    def n_parameters(self, q: int) -> int:
        return 1

    def matrix(self, theta: Array, q: int) -> Array:
        return theta[0] ** 2 * jnp.asarray(self.shape, theta.dtype)

    def theta_of(self, D: np.ndarray) -> np.ndarray:
        return np.sqrt([np.trace(D) / np.trace(self.shape)])


def test_structure_of_ones_own(data: pd.DataFrame, tmp_path: Path) -> None:
    """Beside a crossed factor, against the dense model."""
    shape = np.array([[2.0, 1.0, 0.5], [1.0, 1.5, 0.2], [0.5, 0.2, 1.0]])
    own = Proportional(tuple(map(tuple, shape.tolist())))
    spec = lmmax.ModelSpec(
        "y", "1 + x", [lmmax.RandomTerm("0 + f", "a", own), lmmax.RandomTerm("1", "b")]
    )
    fit = lmmax.fit(spec, data)
    assert fit.converged
    assert not fit.singular
    assert fit.n_params == 2 + 3
    cov = fit.cov_re.to_numpy()
    size = cov[0, 0] / shape[0, 0]
    np.testing.assert_allclose(cov[:3, :3], size * shape, rtol=1e-10)
    table = fit.structures()
    assert list(table["parameter"]) == ["proportional1"]

    X = np.column_stack([np.ones(len(data)), data["x"]])
    Z = pd.get_dummies(data["f"])[LABELS].to_numpy(float)
    codes = [pd.Categorical(data[name]).codes for name in ("a", "b")]
    factors = (Factor(codes[0], Z), Factor(codes[1], np.ones((len(data), 1))))
    model = Model(data["y"].to_numpy(), X, factors)

    def criterion(t: np.ndarray) -> Any:
        blocks = [np.exp(t[0]) * shape, np.exp(t[1]) * np.ones((1, 1))]
        return model.natural_criterion(blocks, np.exp(t[2]), True)

    at = np.log([size, cov[3, 3], fit.scale])
    assert fit.deviance == pytest.approx(criterion(at), rel=1e-11)
    slopes = [np.imag(criterion(at + 1e-30j * e)) / 1e-30 for e in np.eye(3)]
    assert np.max(np.abs(slopes)) < 1e-4
    fit.save(tmp_path / "own.lmmax")
    loaded = lmmax.load(tmp_path / "own.lmmax", objects={"Proportional": Proportional})
    assert loaded.deviance == fit.deviance


def test_factor_with_one_level(data: pd.DataFrame) -> None:
    with pytest.raises(lmmax.DataError) as caught:
        lmmax.fit("y ~ x + (1 | a) + (1 | only)", data.assign(only="o"))
    text = str(caught.value)
    assert "'only' has one level, 'o'" in text
    assert "leave out (1 | only)" in text


@pytest.mark.parametrize("beside", ["b", "a"])
def test_as_many_levels_as_observations(beside: str, data: pd.DataFrame) -> None:
    """The term of this factor is the residual, crossed or nested; not with that one known."""
    rows = data.assign(row=np.arange(len(data)))
    formula = f"y ~ x + (1 | {beside}) + (1 | row)"
    with pytest.raises(lmmax.DataError) as caught:
        lmmax.fit(formula, rows)
    text = str(caught.value)
    assert "no group of 'row' has more than 1 row," in text
    assert "(1 | row)" in text
    assert "fix={'scale': ...}" in text
    known = lmmax.fit(formula, rows, fix={"scale": 0.1})
    plain = lmmax.fit(f"y ~ x + (1 | {beside})", data)
    assert known.deviance == pytest.approx(plain.deviance, rel=1e-9)
    assert known.cov_re.loc[("row", "Intercept"), ("row", "Intercept")] == pytest.approx(
        plain.scale - 0.1, rel=1e-6
    )


def test_autoregression_over_levels_without_an_order(data: pd.DataFrame) -> None:
    with pytest.raises(lmmax.DataError) as caught:
        lmmax.fit("y ~ x + ar1(0 + f | a) + (1 | b)", data)
    text = str(caught.value)
    assert "ar1(0 + f | a)" in text
    assert "'early', 'late', 'mid'" in text
    assert "ordered pd.Categorical" in text


# --- fitting again, and storing -------------------------------------------------------------


@pytest.mark.parametrize("name", ["crossed", "nested"])
def test_refit_is_a_fresh_fit(
    name: str, data: pd.DataFrame, request: pytest.FixtureRequest
) -> None:
    fit = request.getfixturevalue(name)
    y = _data(3)["y"].to_numpy()[::-1] + 2.0 * data["x"].to_numpy()
    y += fit.fittedvalues.to_numpy()
    again, fresh = fit.refit(y), lmmax.fit(fit.formula, data.assign(y=y))
    assert_same_optimum(again, fresh)
    assert again.engine == fit.engine
    for group, effects in fresh.random_effects.items():
        pd.testing.assert_frame_equal(
            again.random_effects[group], effects, rtol=1e-5, atol=1e-6 * np.std(y)
        )
    assert_same_optimum(again.refit(data["y"]), fit)


def test_stored_fit(data: pd.DataFrame, crossed: lmmax.Fit, tmp_path: Path) -> None:
    crossed.save(tmp_path / "fit.lmmax")
    loaded = lmmax.load(tmp_path / "fit.lmmax")
    assert loaded.deviance == crossed.deviance
    assert loaded.engine == crossed.engine
    assert str(loaded.summary()) == str(crossed.summary())
    np.testing.assert_array_equal(loaded.theta, crossed.theta)
    for name, effects in crossed.random_effects.items():
        pd.testing.assert_frame_equal(loaded.random_effects[name], effects)
        np.testing.assert_array_equal(
            loaded.random_effects_cov[name], crossed.random_effects_cov[name]
        )
    np.testing.assert_array_equal(loaded.predict(data), crossed.predict(data))
    assert_same_optimum(loaded.refit(data["y"].to_numpy()), crossed)
