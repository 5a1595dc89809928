"""What the constructor and `from_formula` take, and what they say to what they do not take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
import statsmodels.regression.mixed_linear_model as theirs
from statsmodels.formula import options
from statsmodels.tools.sm_exceptions import MissingDataError

from lmmax.frames import DataError
from lmmax.statsmodels import MixedLM, VCSpec, formulas, mixedlm
from lmmax.statsmodels.formulas import variance_components
from tests.statsmodels_dropin.cases import quiet, simulated

pytestmark = pytest.mark.unoptimised

DATA = simulated()
Y, G = DATA.y.to_numpy(), DATA.g.to_numpy()
X = np.column_stack([np.ones(len(DATA)), DATA.x])


def with_nan(values: np.ndarray, row: int) -> np.ndarray:
    found = np.array(values, dtype=float)
    found[row] = np.nan
    return found


# --- wrong arguments ------------------------------------------------------------------------

spec = lambda mats: VCSpec(["a"], [[["1"]] * len(mats)], [mats])  # noqa: E731
WRONG: dict[str, tuple[Callable[[], Any], type[Exception], str]] = {
    "no exog": (lambda: MixedLM(Y, None, G), DataError, r"exog is None.*np.ones"),
    "no endog": (lambda: MixedLM(None, X, G), DataError, "endog is None"),
    "no groups": (lambda: MixedLM(Y, X, None), DataError, "groups is None"),
    "no groups to drop from": (
        lambda: MixedLM(Y, X, None, missing="drop"),
        DataError,
        "groups is None",
    ),
    "few groups": (lambda: MixedLM(Y, X, G[:-1]), DataError, "endog has 90 rows.* 89 labels"),
    "short exog_re": (lambda: MixedLM(Y, X, G, X[1:]), DataError, "exog_re has 89 rows"),
    "groups of two columns": (
        lambda: MixedLM(Y, X, np.column_stack([G, G])),
        DataError,
        r"groups has shape \(90, 2\)",
    ),
    "no rows": (lambda: MixedLM(Y[:0], X[:0], G[:0]), DataError, "endog has no rows"),
    "no random effects": (lambda: MixedLM(Y, X, G, X[:, :0]), DataError, "exog_re has no columns"),
    "missing endog": (
        lambda: MixedLM(with_nan(Y, 3), X, G),
        MissingDataError,
        "endog is missing or infinite in 1 row, first in row 3: use missing='drop'",
    ),
    "missing exog": (
        lambda: MixedLM(DATA.y, DATA[["x"]].assign(x=with_nan(DATA.x, 7)), G),
        MissingDataError,
        "column x of exog .* first in row 7",
    ),
    "infinite exog_re": (
        lambda: MixedLM(Y, X, G, np.where(np.arange(90) == 4, np.inf, 1.0)),
        MissingDataError,
        "exog_re .* row 4",
    ),
    "missing groups": (
        lambda: MixedLM(Y, X, with_nan(G, 2)),
        MissingDataError,
        "groups has missing values",
    ),
    "text in endog": (lambda: MixedLM(Y.astype(str), X, G), DataError, "endog has the type"),
    "text in exog": (
        lambda: MixedLM(DATA.y, DATA[["x"]].assign(f="a"), DATA.g),
        DataError,
        "column f of exog has the type .* from_formula",
    ),
    "unknown keyword": (lambda: MixedLM(Y, X, G, weights=1), ValueError, "argument weights"),
    "missing": (lambda: MixedLM(Y, X, G, missing="omit"), ValueError, "missing='omit'"),
    "exog_vc no spec": (lambda: MixedLM(Y, X, G, exog_vc=[1]), DataError, "must be a VCSpec"),
    "exog_vc lengths": (
        lambda: MixedLM(Y, X, G, exog_vc=VCSpec(["a", "b"], [[]], [[]])),
        DataError,
        r"exog_vc has \(2, 1, 1\) names, colnames and mats",
    ),
    "exog_vc few groups": (
        lambda: MixedLM(Y, X, G, exog_vc=spec([np.ones((6, 1))] * 14)),
        DataError,
        "14 designs for the component 'a', but there are 15 groups",
    ),
    "exog_vc rows": (
        lambda: MixedLM(Y, X, G, exog_vc=spec([np.ones((6, 1))] * 14 + [np.ones((5, 1))])),
        DataError,
        "exog_vc has 5 rows for the component 'a' in group 14, which has 6",
    ),
    "exog_vc missing": (
        lambda: MixedLM(Y, X, G, exog_vc=spec([np.ones((6, 1))] * 14 + [np.full((6, 1), np.nan)])),
        DataError,
        "missing or infinite values in the component 'a'",
    ),
    "constant response": (lambda: MixedLM(np.ones(90), X, G).fit(), DataError, "is constant"),
    "as many groups as rows": (
        lambda: MixedLM(Y, X, np.arange(90)).fit(),
        DataError,
        "residual variance is not identified.*Group more coarsely",
    ),
    "formula without groups": (lambda: mixedlm("y ~ x", DATA), AttributeError, "'groups' is a req"),
    "unknown group": (
        lambda: mixedlm("y ~ x", DATA, groups="G"),
        DataError,
        r"no column 'G' in the data \(groups\). Did you mean 'g'",
    ),
    "groups None": (lambda: mixedlm("y ~ x", DATA, groups=None), DataError, "groups is None"),
    "data None": (lambda: mixedlm("y ~ x", None, groups="g"), DataError, "data is None"),
    "labels of another length": (
        lambda: mixedlm("y ~ x", DATA, groups=G[1:]),
        DataError,
        "groups has 89 labels, data have 90 rows",
    ),
    "no response": (lambda: mixedlm("~ x", DATA, groups="g"), DataError, "no response"),
    "re_formula of another type": (
        lambda: mixedlm("y ~ x", DATA, groups="g", re_formula=1),
        TypeError,
        "re_formula=1 must be a string",
    ),
    "two-sided re_formula": (
        lambda: mixedlm("y ~ x", DATA, groups="g", re_formula="y ~ x"),
        DataError,
        "re_formula 'y ~ x' has a response",
    ),
    "empty re_formula": (
        lambda: mixedlm("y ~ x", DATA, groups="g", re_formula="0"),
        DataError,
        "re_formula='0' leaves no random effect",
    ),
    "vc_formula no dict": (
        lambda: mixedlm("y ~ x", DATA, groups="g", vc_formula="0 + C(v)"),
        TypeError,
        "vc_formula must be a dict",
    ),
    "vc_formula of another type": (
        lambda: mixedlm("y ~ x", DATA, groups="g", vc_formula={"a": 1}),
        TypeError,
        r"vc_formula\['a'\]=1 must be a string",
    ),
    "two-sided vc_formula": (
        lambda: mixedlm("y ~ x", DATA, groups="g", vc_formula={"a": "y ~ 0 + C(v) + z1"}),
        DataError,
        "vc_formula of 'a' .* has a response",
    ),
    "missing in re_formula": (
        lambda: mixedlm("y ~ 1", DATA.assign(x=with_nan(DATA.x, 4)), groups="g", re_formula="~x"),
        MissingDataError,
        "re_formula '~x' has missing values: use missing='drop'",
    ),
    "missing in vc_formula": (
        lambda: mixedlm(
            "y ~ 1", DATA.assign(z=with_nan(DATA.x, 40)), groups="g", vc_formula={"a": "0 + z"}
        ),
        MissingDataError,
        "vc_formula of 'a' '0 \\+ z' has missing values",
    ),
    "missing in groups": (
        lambda: mixedlm("y ~ x", DATA.assign(g=with_nan(DATA.g, 4)), groups="g"),
        MissingDataError,
        "groups has missing values: use missing='drop'",
    ),
    "nothing left": (
        lambda: mixedlm("y ~ x", DATA, groups="g", subset=DATA.g > 99),
        DataError,
        "no row is left",
    ),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_arguments(what: str) -> None:
    make, error, message = WRONG[what]
    with pytest.raises(error, match=message):
        make()


# --- rows -----------------------------------------------------------------------------------


def test_missing_drop_with_arrays() -> None:
    """statsmodels fails here (#7978); the fit is that of the complete rows."""
    y, x, labels = with_nan(Y, 3), X.copy(), np.array(G, dtype=float)
    x[10, 1], labels[20] = np.nan, np.nan
    gone = np.isin(np.arange(90), [3, 10, 20])
    found = MixedLM(y, x, labels, missing="drop").fit()
    expected = MixedLM(Y[~gone], X[~gone], G[~gone]).fit()
    assert found.nobs == 87
    np.testing.assert_array_equal(found.params, expected.params)


def test_missing_drop_reaches_the_matrices_of_components() -> None:
    mats = [DATA[DATA.g == i][["z1", "z2"]].to_numpy(copy=True) for i in range(15)]
    names = [[["a", "b"]] * 15]
    gone = np.isin(np.arange(90), [8, 30])
    left = [mats[i][~gone[DATA.g == i]] for i in range(15)]
    mats[1][2, 0] = np.nan  # row 8
    found = MixedLM(
        with_nan(Y, 30), X, DATA.g, X[:, :1], exog_vc=VCSpec(["q"], names, [mats]), missing="drop"
    )
    expected = MixedLM(
        Y[~gone], X[~gone], G[~gone], X[~gone, :1], exog_vc=VCSpec(["q"], names, [left])
    )
    point = np.array([0.5, 0.7])
    assert found.loglike(point) == expected.loglike(point)


def test_missing_drop_with_labels_of_several_types() -> None:
    labels = np.array([int(g) if g % 2 else str(g) for g in G], dtype=object)
    found = MixedLM(with_nan(Y, 3), X, labels, missing="drop")
    assert found.nobs == 89
    assert found.group_labels[:2] == [1, 3] and found.group_labels[-1] == "8"


@pytest.mark.parametrize("formula", ["y ~ Q('a b')", "y ~ Q('a b') + np.exp(z1)"])
def test_missing_drop_with_quoted_names(formula: str) -> None:
    """statsmodels does not find the column, and fails."""
    data = DATA.rename(columns={"x": "a b"})
    data.loc[7, "a b"] = np.nan
    data.loc[50, "z2"] = np.nan  # not in the formula
    found = mixedlm(formula, data, groups="g", missing="drop")
    assert found.nobs == 89 and found.n_groups == 15


@pytest.mark.parametrize(
    "subset",
    [DATA.g < 10, (DATA.g < 10).to_numpy(), DATA.index[:60]],
    ids=["Series", "array", "labels"],
)
@pytest.mark.parametrize("groups", ["g", G], ids=["column", "labels"])
def test_subset(subset: Any, groups: Any) -> None:
    """statsmodels ignores it."""
    found = mixedlm("y ~ x", DATA, groups=groups, re_formula="1", subset=subset)
    expected = theirs.MixedLM.from_formula("y ~ x", DATA[:60], groups=G[:60], re_formula="1")
    assert found.nobs == 60 and found.n_groups == 10
    np.testing.assert_allclose(
        found.loglike(np.array([0.7])), MixedLM(Y[:60], X[:60], G[:60]).loglike(np.array([0.7]))
    )
    np.testing.assert_array_equal(found.exog, expected.exog)


def test_rows_with_one_index_label() -> None:
    """Components of statsmodels' groups are those of all rows with a label of the group's."""
    kwargs: dict[str, Any] = {
        "groups": "g",
        "re_formula": "~ z1",
        "vc_formula": {"v": "0 + C(v)", "z": "0 + z1 + z2"},
    }
    found = mixedlm("y ~ x", DATA.set_axis(np.zeros(90, dtype=int)), **kwargs)
    point = np.array([0.7, 0.1, 0.5, 0.3, 0.6])
    assert found.loglike(point) == mixedlm("y ~ x", DATA, **kwargs).loglike(point)


# --- kinds of data --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "convert",
    [pl.from_pandas, lambda data: data.to_dict("list"), lambda data: data.to_records()],
    ids=["polars", "dict", "records"],
)
def test_other_tables(convert: Callable[[pd.DataFrame], Any]) -> None:
    kwargs: dict[str, Any] = {"groups": "g", "re_formula": "~ z1", "vc_formula": {"v": "0 + C(v)"}}
    found = mixedlm("y ~ x", convert(DATA), **kwargs)
    expected = mixedlm("y ~ x", DATA, **kwargs)
    point = np.array([0.7, 0.1, 0.5, 0.6])
    assert found.loglike(point) == expected.loglike(point)
    assert found.data.param_names == expected.data.param_names


@pytest.mark.parametrize(
    "labels",
    [
        DATA.g,
        G,
        G.tolist(),
        DATA.g.map("g{}".format),
        DATA.g.map("g{}".format).astype("category"),
        pd.to_datetime(DATA.g, unit="D"),
        G > 6,
    ],
    ids=["Series", "array", "list", "text", "categorical", "dates", "logical"],
)
def test_labels_are_those_of_statsmodels(labels: Any) -> None:
    found, expected = (each(DATA.y, DATA[["x"]], labels) for each in (MixedLM, theirs.MixedLM))
    assert found.group_labels == expected.group_labels
    assert [type(g) for g in found.group_labels] == [type(g) for g in expected.group_labels]
    assert found.row_indices == expected.row_indices


def test_one_dimensional_designs() -> None:
    found = MixedLM(Y, np.ones(90), G, DATA.z1.to_numpy())
    expected = theirs.MixedLM(Y, np.ones(90), G, DATA.z1.to_numpy())
    assert found.data.param_names == expected.data.param_names == ["const", "x_re1 Var"]
    series = MixedLM(DATA.y, DATA.x, DATA.g, exog_re=DATA.z1)  # statsmodels fails at the first
    assert series.data.param_names == ["x", "z1 Var"]


def test_numbers_of_other_types() -> None:
    exog = pd.DataFrame({"c": 1, "b": DATA.x > 0})
    found = MixedLM(np.round(10 * Y).astype(int), exog, G)
    expected = MixedLM(np.round(10 * Y), exog.astype(float), G)
    assert found.loglike(np.ones(1)) == expected.loglike(np.ones(1))


def test_older_form_of_components() -> None:
    groups = {i: DATA[DATA.g == i] for i in range(15)}
    older = {
        "b": {i: rows[["z1"]].to_numpy() for i, rows in groups.items()},
        "a": {i: rows[["z2"]] for i, rows in groups.items()},
    }
    models = []
    for each in (MixedLM, theirs.MixedLM):
        with pytest.warns(FutureWarning, match="deprecated variance components"):
            models.append(each(Y, X, G, exog_vc=older))
    found, expected = models
    assert found.data.param_names == expected.data.param_names
    assert found.exog_vc.colnames == expected.exog_vc.colnames
    expected.cov_pen = None
    np.testing.assert_allclose(
        found.loglike(np.array([0.4, 0.8])), expected.loglike(np.array([0.4, 0.8])), rtol=1e-12
    )


def test_components_alone() -> None:
    """``re_formula="0"`` with components is a model without other random effects."""
    kwargs: dict[str, Any] = {"groups": "g", "vc_formula": {"v": "0 + C(v)"}}
    found = mixedlm("y ~ x", DATA, re_formula="0", **kwargs)
    assert found.k_re == 0 and found.data.param_names == ["Intercept", "x", "v Var"]
    assert mixedlm("y ~ x", DATA, groups="g", vc_formula={}).data.param_names[2:] == ["g Var"]


# --- formulas -------------------------------------------------------------------------------


@pytest.fixture(params=["patsy", "formulaic"])
def engine(request: pytest.FixtureRequest) -> Iterator[str]:
    before = options.formula_engine
    options.formula_engine = request.param
    yield request.param
    options.formula_engine = before


COMPONENTS = {
    "labels used again": "0 + C(v)",
    "text": "0 + t",
    "text in C": "0 + C(t)",
    "categories": "0 + k",
    "logical": "0 + b",
    "number": "0 + z1",
    "two numbers": "0 + z1 + z2",
    "transform": "0 + I(z1 * factor)",
    "centred": "0 + center(z1)",
    "interaction": "0 + C(v):z1",
    "one-sided": "~ 0 + C(w)",
}


@pytest.mark.parametrize("what", COMPONENTS)
def test_components_are_those_of_statsmodels(engine: str, what: str) -> None:
    """Each formula is evaluated in each group by itself, by either engine."""
    factor = 2.0
    present = DATA.g.to_numpy() * 3 + DATA.v.to_numpy()
    data = DATA.assign(
        t=[f"t{i % 7}" for i in present],
        k=pd.Categorical([f"k{i % 4}" for i in present], ["k3", "k1", "k0", "k2", "none"]),
        b=DATA.z2 > 0.0,
    )
    kwargs: dict[str, Any] = {"groups": "g", "re_formula": "~ I(z1 * factor)"}
    kwargs["vc_formula"] = {"a": COMPONENTS[what]}
    with quiet():
        found = mixedlm("y ~ x + I(z2 * factor)", data, **kwargs)
        expected = theirs.MixedLM.from_formula("y ~ x + I(z2 * factor)", data, **kwargs)
    assert factor == 2.0
    assert found.data.param_names == expected.data.param_names
    np.testing.assert_array_equal(found.exog, expected.exog)
    np.testing.assert_array_equal(found.exog_re, expected.exog_re)
    mine, other = found.exog_vc, expected.exog_vc
    assert [list(names) for names in mine.colnames[0]] == [list(n) for n in other.colnames[0]]
    for a, b in zip(mine.mats[0], other.mats[0], strict=True):
        np.testing.assert_array_equal(a, b)
    expected.cov_pen = None
    point = np.array([0.7, 0.1, 0.5, 0.6])
    np.testing.assert_allclose(found.loglike(point), expected.loglike(point), rtol=1e-12)


@pytest.mark.parametrize("formula", ["0 + C(v)", "0 + t", "0 + k", "0 + b", "0 + z1", "~ 0 + C(w)"])
def test_all_groups_at_once_is_group_by_group(
    engine: str, formula: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    present = DATA.g.to_numpy() * 3 + DATA.v.to_numpy()
    data = DATA.assign(
        t=[f"t{i % 7}" for i in present],
        k=pd.Categorical([f"k{i % 4}" for i in present]),
        b=DATA.z2 > 0.0,
    )

    def evaluate() -> Any:
        return variance_components({"a": formula}, data, G, range(15), False, -1)

    monkeypatch.setattr(formulas, "depth", lambda env, above: above)
    fast = evaluate()
    monkeypatch.setattr(formulas, "_one_factor", lambda *args: None)
    slow = evaluate()
    for a, b in zip(fast.mats[0], slow.mats[0], strict=True):
        np.testing.assert_array_equal(a, b)
    assert [list(n) for n in fast.colnames[0]] == [list(n) for n in slow.colnames[0]]


def test_formulas_predict(engine: str) -> None:
    found = mixedlm("y ~ x + C(v)", DATA, groups="g").fit()
    new = pd.DataFrame({"x": [1.0, 3.0, 2.0], "v": [0, 1, 2]}, index=["a", "b", "c"])
    values = found.predict(new)
    assert list(values.index) == ["a", "b", "c"]
    fe = found.fe_params
    np.testing.assert_allclose(values["c"], fe["Intercept"] + 2 * fe["x"] + fe.iloc[2], rtol=1e-14)
