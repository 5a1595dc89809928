"""Random effects up to ten thousand times as large as the residual, in every form and basis.

Criteria and optima are compared with dense formulas in 50 digits.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

import lmmax

from .oracles import exact

LETTERS = np.array(["a", "b", "c"])


def example(ratio: float, seed: int = 3) -> pd.DataFrame:
    """Return data with two factors whose effects have standard deviations of ``ratio``."""
    rng = np.random.default_rng(seed)
    n = 48
    data = pd.DataFrame(
        {
            "g": np.arange(n) % 8,
            "s": rng.integers(0, 5, n),
            "f": LETTERS[np.arange(n) // 8 % 3],
            "x": rng.normal(size=n),
            "w": rng.uniform(0.5, 2.0, n),
        }
    )
    data["h"] = data.g // 2
    cells, slopes = rng.normal(size=(8, 3)), rng.normal(size=8)
    own = rng.normal(size=n) + 2.0 * data.x + 5.0 * cells[data.g, np.arange(n) // 8 % 3]
    far = rng.normal(size=8)
    data["y"] = own + ratio * far[data.g]
    data["crossed"] = data.y + 0.5 * ratio * rng.normal(size=5)[data.s]
    data["nested"] = data.y + 3.0 * ratio * np.linspace(-1.0, 1.0, 4)[data.h]
    # Lines that meet in one point, far from where they are seen.
    data["lines"] = own + ratio * far[data.g] * (1.0 + 0.5 * data.x) + 3.0 * slopes[data.g] * data.x
    return data


def relationship() -> pd.DataFrame:
    """Return a relationship matrix between the levels of g."""
    roots = np.random.default_rng(5).normal(size=(8, 24))
    covariance = roots @ roots.T
    sd = np.sqrt(np.diag(covariance))
    return pd.DataFrame(covariance / np.outer(sd, sd), index=range(8), columns=range(8))


CROSSED = "crossed ~ x + (1 | g) + (1 | s)"
CASES = [
    (CROSSED, {}, 1e2),
    (CROSSED, {}, 1e4),
    (CROSSED, {"reml": False, "weights": "w"}, 1e4),
    (CROSSED, {"relmat": {"g": relationship()}}, 1e4),
    ("y ~ f + (0 + f | g)", {}, 1e4),
    ("lines ~ x + (x | g)", {"reml": False}, 1e4),
    ("nested ~ x + (1 | h) + (1 | g)", {}, 1e4),
]


@pytest.mark.parametrize(("formula", "options", "ratio"), CASES)
def test_criterion_and_optimum_in_50_digits(formula, options, ratio):
    fit = lmmax.fit(formula, example(ratio), **options)
    assert fit.converged
    assert not fit.singular
    error, distance = exact.check(fit)
    assert abs(error) < 1e-12
    assert distance < 1e-6


STRUCTURES = ("cs", "homcs", "ar1", "hetar1", "toep", "homtoep", "ou")
STRUCTURED = [
    *((f"y ~ x + {name}(0 + t | g)", ratio) for name in STRUCTURES for ratio in (10.0, 300.0, 1e4)),
    ("steep ~ x + cs(0 + t | g)", 1e4),
    ("steep ~ x + toep(0 + t | g)", 1e4),
    ("crossed ~ x + toep(0 + t | g) + (1 | s)", 1e4),
    ("steep ~ x + hetar1(0 + t | g) + (1 | h)", 300.0),
]


def steps(ratio: float, seed: int = 3) -> pd.DataFrame:
    """Return the same data with steps in time in the place of cells."""
    data = example(ratio, seed)
    t = np.arange(48) // 8 % 3 + 1
    # Trends of a group are proportional to its mean: standard deviations are far from equal.
    group = data.groupby("g").y.transform("mean")
    data["steep"] = data.y + 0.3 * t * group + 3.0 * ratio * np.linspace(-1.0, 1.0, 4)[data.h]
    data["t"] = pd.Categorical(t, ordered=True)
    return data


@pytest.mark.parametrize(("formula", "ratio"), STRUCTURED)
def test_structures_in_50_digits(formula, ratio):
    fit = lmmax.fit(formula, steps(ratio), reml="toep" not in formula)
    assert fit.converged
    error, distance = exact.check(fit)
    assert abs(error) < 1e-9
    assert distance < 1e-4


def test_responses_with_a_structure_of_which_the_first_is_near():
    # The search from moderate correlations ends twelve units short.
    data = steps(1.0)
    formula = "crossed ~ x + toep(0 + t | g) + (1 | s)"
    y = np.column_stack([steps(ratio).crossed for ratio in (1.0, 1e4)])
    batch = lmmax.fit_many(formula, data, responses=y, reml=False)
    assert batch.converged.all()
    for column, llf in zip(y.T, batch.llf, strict=True):
        fit = lmmax.fit(formula, data.assign(crossed=column), reml=False)
        assert llf == pytest.approx(fit.llf, rel=1e-9)


def test_coefficients_far_larger_than_the_effects():
    data = example(1e4)
    fit = lmmax.fit(CROSSED, data)
    shifted = data.assign(crossed=data.crossed + 1e7 * data.x)
    again = lmmax.fit(CROSSED, shifted)
    assert again.converged
    assert again.llf == pytest.approx(fit.llf, rel=1e-9)
    assert again.params["x"] - 1e7 == pytest.approx(fit.params["x"], abs=1e-6)


def test_inference_is_that_of_the_nested_form():
    data = example(1e4)
    formula = "nested ~ x + (1 | h) + (1 | g)"
    crossed = lmmax.fit(formula, data, engine="crossed")
    nested = lmmax.fit(formula, data)
    assert (crossed.engine.name, nested.engine.name) == ("crossed", "nested")
    for name in ("llf", "scale", "bse", "df", "resid"):
        np.testing.assert_allclose(getattr(crossed, name), getattr(nested, name), rtol=1e-6)
    one, other = (fit.t_test("x", ddf="kenward-roger").table for fit in (crossed, nested))
    pd.testing.assert_frame_equal(one, other, rtol=1e-6)
    one, other = (lmmax.confint(fit, method="profile") for fit in (crossed, nested))
    pd.testing.assert_frame_equal(one, other, rtol=1e-6)
    for factor in ("g", "h"):
        one, other = (fit.random_effects[factor].to_numpy() for fit in (crossed, nested))
        np.testing.assert_allclose(one, other, atol=1e-9 * np.abs(other).max())


@pytest.mark.parametrize(
    ("formula", "response"),
    [("y ~ x + (1 | g) + (1 | s)", "crossed"), ("y ~ f + (0 + f | g)", "y")],
)
def test_responses_of_a_batch_of_which_the_first_is_near(formula, response):
    ratios = [1.0, 1e4, 1e2]
    data = example(1.0)
    y = np.column_stack([example(ratio, 7)[response] for ratio in ratios])
    batch = lmmax.fit_many(formula, data, responses=y)
    assert batch.converged.all()
    for column, llf, scale in zip(y.T, batch.llf, batch.scale, strict=True):
        fit = lmmax.fit(formula, data.assign(y=column))
        assert llf == pytest.approx(fit.llf, rel=1e-11)
        assert scale == pytest.approx(fit.scale, rel=1e-6)


def test_subsets():
    parts = [example(ratio, 11 + i).assign(part=i) for i, ratio in enumerate([1.0, 1e4, 1e3])]
    formula = "lines ~ x + (x | g)"
    batch = lmmax.fit_many(formula, pd.concat(parts, ignore_index=True), by="part")
    assert batch.converged.all()
    for part, llf in zip(parts, batch.llf, strict=True):
        assert llf == pytest.approx(lmmax.fit(formula, part).llf, rel=1e-11)


def test_em_steps_before_lbfgs_keep_covariances_positive():
    data = example(1e4)
    fit = lmmax.fit("y ~ f + (0 + f | g)", data, solver="lbfgs", em_steps=50)
    assert fit.converged
    assert fit.llf == pytest.approx(lmmax.fit("y ~ f + (0 + f | g)", data).llf, rel=1e-10)


def test_rows_are_kept_only_where_they_are_few(monkeypatch):
    from lmmax.compress import crossed

    monkeypatch.setattr(crossed, "ROTATED_LIMIT", 0)
    fit = lmmax.fit(CROSSED, example(1e2))
    assert fit.compression.problem.outside is None
    assert fit.converged
