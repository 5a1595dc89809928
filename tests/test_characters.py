"""Control characters in the data's names and labels: none reaches a terminal."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest

import lmmax
from lmmax.characters import Visible, neutral, one_wide, visible

RED = "\x1b[31m"
Y, X, F, G = (f"{name}{RED}" for name in "yxfg")
FORMULA = f"`{Y}` ~ `{X}` + `{F}` + (1 | `{G}`)"


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    rng = np.random.default_rng(0)
    groups = np.repeat(np.arange(8), 6)
    return pd.DataFrame(
        {
            Y: rng.normal(size=48) + 0.5 * groups,
            X: rng.normal(size=48),
            F: np.tile([f"a{RED}", "b\x9b\u202e", "c\x07"], 16),
            G: [f"{RED}s{group}" for group in groups],
        }
    )


@pytest.fixture(scope="module")
def fit(frame: pd.DataFrame) -> lmmax.Fit:
    return lmmax.fit(FORMULA, frame)


def clean(text: str) -> bool:
    return visible(text, lines=True) == text


@pytest.mark.parametrize(
    "result",
    [
        lambda fit: fit,
        lambda fit: fit.summary(),
        lambda fit: fit.coefficients(),
        lambda fit: fit.conf_int(),
        lambda fit: fit.varcorr(),
        lambda fit: fit.random_effects,
        lambda fit: fit.design,
        lambda fit: fit.engine,
        lambda fit: fit.t_test(np.eye(4)),
        lambda fit: lmmax.anova(fit),
        lambda fit: lmmax.ranova(fit),
        lambda fit: lmmax.robust(fit),
    ],
)
def test_results(fit: lmmax.Fit, result: Callable[[lmmax.Fit], Any]) -> None:
    shown = result(fit)
    assert clean(str(shown))
    assert clean(repr(shown))


def test_lines_keep_their_width(fit: lmmax.Fit) -> None:
    rows = str(fit.t_test(np.eye(4)[:2])).split("\n")
    assert [row.split("  ")[0] for row in rows] == ["", "Intercept = 0", "x\\x1b[31m = 0"]
    assert len({len(row) for row in rows}) == 1


def test_names_stay_as_they_are(fit: lmmax.Fit, frame: pd.DataFrame) -> None:
    """Only what is printed changes: columns and groups are found by their names."""
    assert list(fit.params.index[:2]) == ["Intercept", X]
    assert fit.random_effects.loc[f"{RED}s3"].notna().all()
    assert fit.formula == FORMULA
    assert len(fit.predict(frame)) == 48


@pytest.mark.parametrize(
    "call",
    [
        lambda fit, frame: fit.t_test("nothing = 0"),
        lambda fit, frame: fit.predict(frame.drop(columns=X)),
        lambda fit, frame: fit.predict(frame.assign(**{G: f"{RED}new"})),
        lambda fit, frame: fit.predict(frame.assign(**{F: f"{RED}new"})),
        lambda fit, frame: lmmax.fit(FORMULA, frame.drop(columns=Y)),
        lambda fit, frame: lmmax.fit(FORMULA, frame.assign(**{G: "one"})),
        lambda fit, frame: lmmax.fit(FORMULA, frame, weights=f"w{RED}"),
        lambda fit, frame: lmmax.fit(f"{FORMULA} + (1 | ", frame),
    ],
)
def test_messages(fit: lmmax.Fit, frame: pd.DataFrame, call: Callable[..., Any]) -> None:
    with pytest.raises(ValueError) as caught:
        call(fit, frame)
    assert clean(str(caught.value))


def test_warnings(frame: pd.DataFrame) -> None:
    with pytest.warns(lmmax.RankWarning) as caught:
        twice = lmmax.fit(f"{FORMULA} + `z{RED}`", frame.assign(**{f"z{RED}": 2 * frame[X]}))
    assert all(clean(str(warning.message)) for warning in caught)
    assert clean(str(twice.summary()))


def test_errors_and_warnings_of_the_package_say_it_so() -> None:
    """All that quote the data; those of formulas have their own way, with the caret below."""
    for name in lmmax.__all__:
        value = getattr(lmmax, name)
        if isinstance(value, type) and issubclass(value, Exception):
            if name in ("FormulaError",):
                continue
            assert issubclass(value, Visible), name
            error = value(f"a{RED}\nb")
            assert str(error) == "a\\x1b[31m\nb"
            assert str(pickle.loads(pickle.dumps(error))) == str(error)


def test_a_batch(frame: pd.DataFrame) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        batch = lmmax.fit_many(f"`{Y}` ~ `{X}` + (1 | `{G}`)", frame, by=F)
    assert clean(str(batch)) and clean(repr(batch)) and clean(repr(batch.summary()))


def test_kinds_of_characters() -> None:
    assert visible("a\x1b[2J\nb\x9b\u2028\u202e") == "a\\x1b[2J\\nb\\x9b\\u2028\\u202e"
    assert visible("ä ± 漢\n", lines=True) == "ä ± 漢\n"
    assert one_wide("a\x1bb") == "a\ufffdb"
    assert [neutral(text) for text in ("=1", "+1", "-1", "@a", "\ta", "\ra", "a=1", "")] == [
        *("'=1", "'+1", "'-1", "'@a", "'\ta", "'\ra"),
        *("a=1", ""),
    ]
