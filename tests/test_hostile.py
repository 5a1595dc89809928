"""Hostile inputs: a documented error or a finite fit, no leaked warning; JAX's debugging flags."""

import subprocess
import sys
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

import lmmax

RNG = np.random.default_rng(0)
N = 24
G = np.repeat(np.arange(6), 4)
DATA = pd.DataFrame({"y": RNG.normal(size=N), "x": RNG.normal(size=N), "g": G})
X = np.column_stack([np.ones(N), DATA.x])
DOCUMENTED = (lmmax.DataError, lmmax.FormulaError, lmmax.ConstraintError, lmmax.EngineError)
MONTHS = pd.date_range("2020-01-31", periods=N, freq="D")

COLUMNS = {
    "None": [None] * N,
    "text": list("abcd") * 6,
    "objects": [object() for _ in range(N)],
    "sets": [{i % 3} for i in range(N)],
    "lists": [[i % 3] for i in range(N)],
    "dicts": [{"a": i % 3} for i in range(N)],
    "tuples": [(i % 3, 1) for i in range(N)],
    "Decimal": [Decimal(i * i % 7) for i in range(N)],
    "Fraction": [Fraction(i * i % 7, 3) for i in range(N)],
    "complex": DATA.x.to_numpy() + 1j,
    "bytes": [b"a", b"b", b"c"] * 8,
    "dates": MONTHS,
    "dates with zones": MONTHS.tz_localize("UTC"),
    "timedelta": pd.to_timedelta(np.arange(N), unit="D"),
    "periods": pd.PeriodIndex(MONTHS[G], freq="D"),
    "intervals": pd.cut(DATA.x, 3),
    "sparse": pd.arrays.SparseArray(np.round(DATA.x.to_numpy(), 1)),
    "float16": DATA.x.to_numpy().astype("f2"),
    "longdouble": DATA.x.to_numpy().astype(np.longdouble),
    "big-endian": DATA.x.to_numpy().astype(">f8"),
    "masked Int64": pd.array([*range(N - 1), None], dtype="Int64"),
    "infinite": np.where(np.arange(N) == 3, np.inf, DATA.x),
    "NaN": np.full(N, np.nan),
    "huge": DATA.x.to_numpy() * 1e300,
    "subnormal": np.round(DATA.x.to_numpy() * 100) * 5e-324,
    "zero": np.zeros(N),
    "arrow lists": pd.array([[i % 3] for i in range(N)], pd.ArrowDtype(pa.list_(pa.int64()))),
    "arrow binary": pd.array([b"a", b"b"] * 12, pd.ArrowDtype(pa.binary())),
}


def documented(call):
    """Call; the error must be one of ours, a fit must be finite or flagged."""
    try:
        fitted = call()
    except (*DOCUMENTED, lmmax.IdentifiabilityWarning, lmmax.RankWarning) as error:
        assert str(error)
    except lmmax.ConvergenceWarning:
        pass
    except UserWarning as warning:
        assert "beyond 2**53" in str(warning)
    else:
        assert np.isfinite(fitted.deviance) or not fitted.converged


@pytest.mark.parametrize("place", ["y", "x", "g", "weights", "offset"])
@pytest.mark.parametrize("kind", COLUMNS)
def test_column(kind, place):
    values = COLUMNS[kind]
    if place in ("weights", "offset"):
        documented(lambda: lmmax.fit("y ~ 1 + (1 | g)", DATA, **{place: values}))
        return
    data = {**{name: DATA[name].to_numpy() for name in DATA}, place: values}
    documented(lambda: lmmax.fit(f"y ~ {'x' if place == 'x' else '1'} + (1 | g)", data))


@pytest.mark.parametrize("place", ["y", "X", "groups", "Z"])
@pytest.mark.parametrize("kind", COLUMNS)
def test_array(kind, place):
    given = {"y": DATA.y.to_numpy(), "X": np.ones(N), "groups": G, place: COLUMNS[kind]}
    documented(lambda: lmmax.fit_arrays(**given))


def test_containers_and_options():
    batch = pa.RecordBatch.from_pandas(DATA)
    assert lmmax.fit("y ~ x + (1 | g)", batch).deviance == pytest.approx(
        lmmax.fit("y ~ x + (1 | g)", DATA).deviance, rel=1e-12
    )
    with pytest.raises(lmmax.DataError, match="'y' is an iterator"):
        lmmax.fit("y ~ x + (1 | g)", {name: iter(list(DATA[name])) for name in DATA})
    with pytest.raises(lmmax.DataError, match="context must be a mapping"):
        lmmax.fit("y ~ x + (1 | g)", DATA, context=3.7)
    with pytest.raises(lmmax.DataError, match="group_name must be text"):
        lmmax.fit_arrays(DATA.y, X, G, group_name=["a"])


@pytest.mark.parametrize("ddf", ["satterthwaite", "residual", "normal", "between-within"])
def test_no_fixed_effects(ddf):
    fitted = lmmax.fit("y ~ 0 + (1 | g)", DATA)
    assert len(fitted.coefficients(ddf=ddf)) == 0
    with pytest.raises(lmmax.HypothesisError, match="no fixed effects"):
        fitted.t_test("x = ")


@pytest.mark.parametrize("unit", [1e80, 1e-120])
def test_units_far_from_one(unit):
    fitted = lmmax.fit("y ~ x + (1 | g)", DATA.assign(y=DATA.y * unit))
    table = fitted.coefficients()
    assert np.isfinite(fitted.bse).all()
    assert table["df"].isna().all()
    assert str(fitted)
    with pytest.raises(lmmax.DataError, match="measure the response in other units"):
        lmmax.joint_covariance(fitted)


def test_deeply_nested_hypothesis():
    with pytest.raises(lmmax.HypothesisError, match="cannot read"):
        lmmax.fit("y ~ x + (1 | g)", DATA).t_test("-" * 3000 + "x")


FLAGS = """
import jax, numpy as np, lmmax
data = lmmax.datasets.load("sleepstudy")
formula = "Reaction ~ Days + (1 + Days | Subject)"
plain = lmmax.fit(formula, data).deviance
for flag, value in [("jax_debug_nans", True), ("jax_debug_infs", True),
                    ("jax_numpy_rank_promotion", "raise"),
                    ("jax_numpy_dtype_promotion", "strict"), ("jax_transfer_guard", "disallow")]:
    jax.clear_caches()
    before = getattr(jax.config, flag)
    jax.config.update(flag, value)
    assert abs(lmmax.fit(formula, data).deviance - plain) < 1e-9, flag
    assert getattr(jax.config, flag) == value
    jax.config.update(flag, before or "allow" if "guard" in flag else before)
"""


def test_debugging_flags_of_jax():
    subprocess.run([sys.executable, "-c", FLAGS], check=True, timeout=120)
