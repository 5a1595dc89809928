"""Hostile inputs: a documented error or a finite fit, no leaked warning; JAX's debugging flags."""

import subprocess
import sys
import warnings
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
                    ("jax_numpy_dtype_promotion", "strict"), ("jax_transfer_guard", "disallow"),
                    ("jax_disable_jit", True)]:
    jax.clear_caches()
    before = getattr(jax.config, flag)
    jax.config.update(flag, value)
    assert abs(lmmax.fit(formula, data).deviance - plain) < 1e-9, flag
    assert getattr(jax.config, flag) == value
    jax.config.update(flag, before or "allow" if "guard" in flag else before)
"""


def test_debugging_flags_of_jax():
    subprocess.run([sys.executable, "-c", FLAGS], check=True, timeout=120)


# --- arguments of every kind, to every function; no exception or warning of somebody else ---------

SILLY = [
    None, "x", "", np.nan, np.inf, -1, 0, 2, 1e300, True, [], [1, 2], np.zeros((0, 0)),
    np.full((1, 2), np.nan), np.ones((3, 3, 3)), {}, {"x": 1}, object(), "a + b = c", "\x00", b"x",
    1 + 2j, [None], ["x", "x"],
]  # fmt: skip
OURS = (
    lmmax.ConvergenceWarning, lmmax.RankWarning, lmmax.IdentifiabilityWarning,
    lmmax.AdjustmentWarning, lmmax.ProfileWarning,
)  # fmt: skip
ASKED = {
    "t_test": lambda fit, a: fit.t_test(a),
    "f_test": lambda fit, a: fit.f_test(a),
    "conf_int": lambda fit, a: fit.conf_int(a),
    "predict": lambda fit, a: fit.predict(a),
    "predict_mean": lambda fit, a: fit.predict_mean(a),
    "refit": lambda fit, a: fit.refit(a),
    "summary": lambda fit, a: fit.summary(ddf=a),
    "coefficients": lambda fit, a: fit.coefficients(level=a),
    "confint": lambda fit, a: lmmax.confint(fit, a, method="wald"),
    "confint level": lambda fit, a: lmmax.confint(fit, level=a, method="wald"),
    "robust": lambda fit, a: lmmax.robust(fit, a),
    "robust type": lambda fit, a: lmmax.robust(fit, type=a),
    "anova type": lambda fit, a: lmmax.anova(fit, type=a),
    "anova test": lambda fit, a: lmmax.anova(fit, test=a),
    "anova of": lambda fit, a: lmmax.anova(fit, a),
    "drop1": lambda fit, a: lmmax.drop1(fit, ddf=a),
    "bootstrap n": lambda fit, a: lmmax.bootstrap(fit, a),
    "bootstrap seed": lambda fit, a: lmmax.bootstrap(fit, 3, seed=a),
    "information": lambda fit, a: lmmax.information(fit, a),
    "scores": lambda fit, a: lmmax.scores(fit, a),
    "conditional_aic": lambda fit, a: lmmax.conditional_aic(fit, a),
    "simulate": lambda fit, a: lmmax.simulate(a),
    "simulate seed": lambda fit, a: lmmax.simulate(fit, seed=a),
}
OPTIONS = (
    "reml", "weights", "offset", "contrasts", "relmat", "missing", "start", "fix", "solver", "tol",
    "max_steps", "em_steps", "engine", "seed", "context", "evaluate", "data", "formula",
)  # fmt: skip
MANY = (
    "responses", "data", "by", "names", "scan", "reml", "tests", "weights", "offset", "contrasts",
    "relmat", "missing", "solver", "tol", "max_steps", "engine", "chunk", "resume", "executor",
    "context",
)  # fmt: skip
ARRAYS = (
    "y", "X", "groups", "Z", "weights", "offset", "x_names", "z_names", "group_name", "covariance",
)  # fmt: skip


def answered(call, *arguments):
    """Ask, and look at the answer: refused by a message of ours, or answered."""
    try:
        found = call(*arguments)
        assert str(found) is not None
        getattr(found, "_repr_html_", str)()
    except (ValueError, TypeError, KeyError, IndexError, *OURS) as error:
        raised = error.__traceback__
        while raised.tb_next is not None:
            raised = raised.tb_next
        here = raised.tb_frame.f_code.co_filename
        assert "lmmax" in here, f"{error!r} comes from {here}"
        assert not isinstance(error, np.linalg.LinAlgError)
        for internal in ("object is not", "has no len", "unsupported operand", "not supported be"):
            assert internal not in str(error)


@pytest.fixture(scope="module")
def plain():
    return lmmax.fit("y ~ x + (1 | g)", DATA)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ASKED)
def test_arguments_of_every_kind(name, plain):
    for argument in SILLY:
        answered(ASKED[name], plain, argument)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("option", OPTIONS)
def test_options_of_fit(option):
    for value in SILLY:
        answered(
            lambda v: lmmax.fit(**{"formula": "y ~ x + (1 | g)", "data": DATA, option: v}), value
        )


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("option", MANY)
def test_options_of_fit_many(option):
    given = {"formula": "~ (1 | g)", "data": DATA, "responses": DATA[["y", "x"]]}
    if option == "by":
        given = {"formula": "y ~ (1 | g)", "data": DATA}
    for value in SILLY:
        answered(lambda v: lmmax.fit_many(**{**given, option: v}), value)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("option", ARRAYS)
def test_options_of_fit_arrays(option):
    given = {"y": DATA.y, "X": np.ones((N, 1)), "groups": G}
    for value in SILLY:
        answered(lambda v: lmmax.fit_arrays(**{**given, option: v}), value)


STRANGE = {
    "no coefficients": ("y ~ 0 + (1 | g)", {}, 1.0),
    "large": ("y ~ x + (1 | g)", {}, 1e80),
    "small": ("y ~ x + (1 | g)", {}, 1e-80),
    "flat": ("y ~ 1 + (1 | g) + (1 | twin)", {}, 1.0),
    "held": ("y ~ x + (1 | g)", {"fix": {"cov_re": [[1.0]], "scale": 1.0}}, 1.0),
    "stopped": ("y ~ x + (1 | g)", {"max_steps": 1, "em_steps": 0}, 1.0),
    "unbounded": ("level ~ x + (1 | g)", {}, 1.0),
    "aliased": ("y ~ x + I(2 * x) + (1 | g)", {}, 1.0),
}
METHODS = (
    "satterthwaite", "kenward-roger", "kenward-roger-linear", "between-within", "residual",
    "normal",
)  # fmt: skip
QUESTIONS = (
    "anova", "ranova", "drop1", "robust", "scores", "sandwich", "information", "joint_covariance",
    "conditional_aic",
)  # fmt: skip


@pytest.mark.parametrize("kind", STRANGE)
def test_questions_to_strange_fits(kind):
    formula, options, unit = STRANGE[kind]
    data = DATA.assign(y=DATA.y * unit, twin=G + 10, level=1.0 * G)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted = lmmax.fit(formula, data, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for ddf in METHODS:
            answered(lambda d: fitted.coefficients(ddf=d), ddf)
            answered(lambda d: lmmax.anova(fitted, ddf=d), ddf)
        for question in QUESTIONS:
            answered(getattr(lmmax, question), fitted)
        answered(lambda f: lmmax.confint(f, method="wald"), fitted)
        for asked in ("summary", "varcorr", "structures", "cov_params", "predict", "conf_int"):
            answered(getattr(fitted, asked))
        for asked in ("random_effects", "random_effects_cov", "cov_re_se", "resid", "convergence"):
            answered(lambda a: getattr(fitted, a), asked)
