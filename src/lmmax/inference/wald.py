"""Wald tests of linear hypotheses on the coefficients."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from .. import rendering
from ..compress.columns import Dependence
from ..frames import DataError, real_numbers
from ..options import Ddf
from ..predict import predict
from ..rendering import format_pvalue
from .denominator import (
    AdjustmentWarning,
    Denominator,
    HypothesisError,
    t_pvalues,
    t_quantiles,
)

if TYPE_CHECKING:
    from ..results import Fit

MANY = 8
"""Most names that a warning lists."""


@dataclass(frozen=True, repr=False)
class ContrastTable:
    """Tests of single hypotheses; ``print`` shows text, a notebook shows HTML.

    Attributes:
        table: a row per hypothesis: ``coef``, ``std err``, ``df``, ``t``, ``p``, and the limits
            ``lower`` and ``upper`` (``z`` and no ``df`` for the normal distribution).
        level: the level of the limits.
    """

    table: pd.DataFrame
    level: float = 0.95

    def __str__(self) -> str:
        return rendering.page(*rendering.table_lines(self.cells))

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return rendering.boxed(rendering.html_table("", self.cells))

    @property
    def cells(self) -> rendering.Cells:
        """The table as text."""
        formats: dict[str, Any] = {
            "df": "{:.2f}".format,
            **dict.fromkeys("tz", "{:.3f}".format),
            "p": format_pvalue,
        }
        rows = [
            [
                rendering.MISSING
                if np.isnan(value)
                else formats.get(str(name), "{:.4g}".format)(value)
                for name, value in zip(self.table, row, strict=True)
            ]
            for row in self.table.to_numpy(float)
        ]
        labels = [[str(label)] for label in self.table.index]
        return rendering.Cells([""], labels, rendering.headings(self.table, self.level), rows)


@dataclass(frozen=True, repr=False)
class WaldTest:
    """A joint test.

    Attributes:
        statistic: chi-squared, or F where there are denominator degrees of freedom.
        df_num: number of independent hypotheses.
        df_denom: denominator degrees of freedom; None for the chi-squared test.
        pvalue: upper tail probability.
    """

    statistic: float
    df_num: int
    df_denom: float | None
    pvalue: float

    def __str__(self) -> str:
        if self.df_denom is None:
            head = f"chi2({self.df_num}) = {self.statistic:.4g}"
        else:
            head = f"F({self.df_num}, {self.df_denom:.4g}) = {self.statistic:.4g}"
        p = "p < 0.001" if self.pvalue < 0.0005 else f"p = {self.pvalue:.3f}"
        return f"Wald test: {head}, {p}"

    def __repr__(self) -> str:
        return str(self)

    def _repr_html_(self) -> str:
        return rendering.paragraphs(str(self))


def t_test(fit: Fit, hypothesis: Any, alpha: float, ddf: Ddf | None) -> ContrastTable:
    """Test each row of a hypothesis on its own; see :meth:`lmmax.Fit.t_test`."""
    R, values, names = linear_hypotheses(fit.params, hypothesis, fit.layout.dependence)
    test, L = fit.denominator(ddf), R[:, fit.layout.fixed.kept]
    table = coefficient_table(test, L, L @ fit.estimates.beta, values, alpha)
    warn_of_missing(test, names, table["std err"])
    return ContrastTable(table.set_axis(names), 1.0 - alpha)


def missing(test: Denominator, names: Iterable[Any], numbers: Any) -> str:
    """Return which numbers (r,) a method does not have, and why, in words; empty if none."""
    lost = [str(name) for name, number in zip(names, numbers, strict=True) if np.isnan(number)]
    if not lost or not test.limits:
        return ""
    shown = ", ".join(lost[:MANY]) + (f" and {len(lost) - MANY} more" if len(lost) > MANY else "")
    return f"no standard error or test of {shown} by ddf={test.method!r}: {test.limits}"


def warn_of_missing(test: Denominator, names: Iterable[Any], numbers: Any) -> None:
    """Warn of the numbers that a method does not have."""
    message = missing(test, names, numbers)
    if message:
        warnings.warn(message, AdjustmentWarning, stacklevel=4)


def coefficient_table(
    test: Denominator, L: np.ndarray, estimate: np.ndarray, values: np.ndarray, alpha: float
) -> pd.DataFrame:
    """Return the table of tests of ``L beta = values``, one by one.

    Args:
        test: the method for the degrees of freedom.
        L: contrasts of the coefficients that were kept, (r, p).
        estimate: ``L beta``, (r,).
        values: hypothetical values, (r,).
        alpha: one minus the level of the confidence limits.
    """
    error, df = test.errors(L), test.degrees(L)
    half = t_quantiles(alpha, df) * error
    with np.errstate(divide="ignore", invalid="ignore"):
        t = (estimate - values) / error
    letter = "z" if test.method == "normal" else "t"
    columns = {
        "coef": estimate,
        "std err": error,
        "df": df,
        letter: t,
        "p": t_pvalues(t, df),
        "lower": estimate - half,
        "upper": estimate + half,
    }
    if letter == "z":
        del columns["df"]
    return rendering.Frame(columns)


def mean_predictions(
    fit: Fit, newdata: Any, ddf: Ddf | None, alpha: float, offset: Any
) -> pd.DataFrame:
    """Return predictions of the mean; see :meth:`lmmax.Fit.predict_mean`."""
    predicted = predict(
        fit, newdata, random_effects=False, new_levels="error", offset=offset, depth=4
    )
    X = fit.design.X if newdata is None else fit.design.new_data(newdata, need_groups=False).X
    known = predicted.notna().to_numpy()
    L, at = X[known][:, fit.layout.fixed.kept], predicted.to_numpy()[known]
    test = fit.denominator(ddf)
    table = coefficient_table(test, L, at, np.zeros(len(L)), alpha)
    rows = [f"row {label!r}" for label in predicted.index[known]]
    warn_of_missing(test, rows, table["std err"])
    table = table.drop(columns=["t", "z", "p"], errors="ignore")
    table = table.rename(columns={"coef": "predicted"}).set_axis(predicted.index[known])
    return table.reindex(predicted.index)


def joint_test(fit: Fit, hypothesis: Any, ddf: Ddf | None) -> WaldTest:
    """Test hypotheses jointly; see :meth:`lmmax.Fit.f_test` and :meth:`lmmax.Fit.wald_test`."""
    R, values, labels = linear_hypotheses(fit.params, hypothesis, fit.layout.dependence)
    L = R[:, fit.layout.fixed.kept]
    test = fit.denominator(ddf)
    found = test.joint(L, L @ fit.estimates.beta - values)
    warn_of_missing(test, [", ".join(labels)], [found.statistic])
    if test.method == "normal":
        return WaldTest(found.statistic * found.df_num, found.df_num, None, found.pvalue)
    return WaldTest(found.statistic, found.df_num, found.df_den, found.pvalue)


def linear_hypotheses(
    params: pd.Series, hypothesis: Any, dependence: Dependence | None = None
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return ``(R, r, labels)`` of the hypotheses ``R beta = r``.

    Args:
        params: the coefficients by name.
        hypothesis: in words or numbers.
        dependence: how aliased columns follow from the others.  With it a hypothesis may involve
            aliased coefficients as a row of the design does: then it can be estimated, and the
            coefficients that were kept are all that it takes.

    Raises:
        HypothesisError: for a name that is no coefficient, a shape that does not fit, or a
            hypothesis about an aliased coefficient.
    """
    names = [str(name) for name in params.index]
    if not names:
        raise HypothesisError("the model has no fixed effects, so there is nothing to test")
    if isinstance(hypothesis, str):
        hypothesis = [hypothesis]
    if (
        isinstance(hypothesis, Sequence)
        and len(hypothesis)
        and all(isinstance(part, str) for part in hypothesis)
    ):
        found = [each for part in hypothesis for each in _read(part, names)]
        labels = [label for label, _, _ in found]
        R = np.vstack([row for _, row, _ in found])
        r = np.array([value for _, _, value in found])
    else:
        matrix, target = hypothesis if isinstance(hypothesis, tuple) else (hypothesis, 0.0)
        matrix = _by_coefficient(matrix, names)
        try:
            R = np.atleast_2d(real_numbers(matrix, "a hypothesis matrix"))
        except DataError as error:
            raise HypothesisError(str(error)) from None
        except (TypeError, ValueError) as error:
            raise HypothesisError(
                f"a hypothesis is text such as '{names[-1]} = 0', a matrix of numbers with a "
                f"column per coefficient, or a tuple (matrix, values); got {hypothesis!r}"
            ) from error
        if R.ndim != 2 or R.shape[1] != len(names):
            raise HypothesisError(
                f"a hypothesis matrix needs one column for each of the {len(names)} coefficients "
                f"({', '.join(names)}); got shape {R.shape}"
            )
        if not np.isfinite(R).all():
            raise HypothesisError("a hypothesis matrix must be finite")
        try:
            r = np.broadcast_to(np.asarray(target, dtype=float), (len(R),))
        except (TypeError, ValueError) as error:
            raise HypothesisError(
                f"{len(R)} hypotheses need {len(R)} values, got shape {np.shape(target)}"
            ) from error
        labels = [_label(row, value, names) for row, value in zip(R, r, strict=True)]
    empty = ~np.any(R != 0.0, axis=1)
    if empty.any():
        raise HypothesisError(f"hypothesis {int(np.argmax(empty)) + 1} involves no coefficient")
    involved = params.isna().to_numpy() & (R != 0.0)
    if dependence is not None:
        involved[~dependence.missed(R, exact=True).any(axis=1)] = False
    aliased = involved.any(axis=0)
    if aliased.any():
        raise HypothesisError(
            f"the coefficient of {names[int(np.argmax(aliased))]!r} is aliased (not estimable), so "
            "no hypothesis about it can be tested"
        )
    return R, np.asarray(r), labels


def _by_coefficient(matrix: Any, names: list[str]) -> Any:
    """Return a hypothesis matrix without labels, its columns in the order of the coefficients.

    Args:
        matrix: a frame with a column for each coefficient, or a series with a value for each, in
            any order; or what has no such labels.
        names: the coefficients.
    """
    if isinstance(matrix, pd.Series):
        labels, values = matrix.index, np.asarray(matrix)
    elif isinstance(matrix, pd.DataFrame):
        labels, values = matrix.columns, np.asarray(matrix)
    else:
        return matrix
    if isinstance(labels, pd.RangeIndex) or len(labels) != len(names):
        return values
    found = pd.Index([str(label) for label in labels])
    if not found.is_unique or set(found) != set(names):
        raise HypothesisError(
            f"the labels of a hypothesis matrix must be the coefficients {', '.join(names)}, not "
            f"{', '.join(found)}; pass to_numpy() if the columns are in their order"
        )
    return values[..., found.get_indexer(pd.Index(names))]


def _read(text: str, names: list[str]) -> list[tuple[str, np.ndarray, float]]:
    """Return label, row and value of each hypothesis in ``text``, which commas separate."""
    # Names such as "Time:Cu[T.b]" or "bs(x, df=4)[1]" are taken out before anything is parsed;
    # longest first, so that parts of names stay whole.
    special_names = sorted((n for n in names if not n.isidentifier()), key=len, reverse=True)
    # Blanks in them may be others than in the formula.
    spaced = [r"\s*".join(map(re.escape, re.sub(r"\s", "", name))) for name in special_names]
    known = {re.sub(r"\s", "", name): name for name in names}
    pattern = "|".join([r"`[^`]*`", *map(re.escape, special_names), *spaced])
    position = {name: f"_{j}_" for j, name in enumerate(names)}

    def put_placeholder(match: re.Match[str]) -> str:
        name = match[0].strip("`")
        if name not in position:
            name = known.get(re.sub(r"\s", "", name), name)
        if name not in position:
            raise _unknown(name, names)
        return position[name]

    def original(part: str) -> str:
        return re.sub(r"(?<!\w)_(\d+)_(?!\w)", lambda m: names[int(m[1])], part).strip()

    plain = re.sub(pattern, put_placeholder, text)
    found = []
    for part in re.split(r",(?![^()]*\))", plain):
        if not part.strip():
            continue
        sides = re.split(r"==?", part)
        try:
            if len(sides) > 2:
                raise ValueError("two equality signs")
            trees = [ast.parse(side.strip(), mode="eval").body for side in sides]
            terms = [_linear(tree, names) for tree in trees]
        except HypothesisError:
            raise
        except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError) as error:
            raise HypothesisError(
                f"cannot read the hypothesis {original(part)!r}; write a linear one, for example "
                f"'{names[-1]} = 0' or '2*{names[0]} - {names[-1]} = -1.5', with the coefficients "
                f"{', '.join(names)}"
            ) from error
        total = terms[0] - terms[1] if len(terms) == 2 else terms[0]
        found.append((original(part), total[:-1], float(-total[-1])))
    if not found:
        raise HypothesisError(f"the hypothesis is empty; write for example '{names[-1]} = 0'")
    return found


def _unknown(name: str, names: list[str]) -> HypothesisError:
    return HypothesisError(
        f"{name!r} in the hypothesis is no coefficient; the coefficients are {', '.join(names)}"
    )


def _linear(node: ast.expr, names: list[str]) -> np.ndarray:
    """Return the coefficients (p,) of a linear expression, followed by its constant."""
    value = np.zeros(len(names) + 1)
    match node:
        case ast.Constant(value=int() | float() as number) if not isinstance(number, bool):
            value[-1] = number
        case ast.Name(id=name):
            placeholder = re.fullmatch(r"_(\d+)_", name)
            if placeholder is not None:
                value[int(placeholder[1])] = 1.0
            elif name in names:
                value[names.index(name)] = 1.0
            else:
                raise _unknown(name, names)
        case ast.UnaryOp(op=ast.USub() | ast.UAdd() as sign, operand=inner):
            value = _linear(inner, names) * (-1.0 if isinstance(sign, ast.USub) else 1.0)
        case ast.BinOp(left=left, op=ast.Add() | ast.Sub() as sign, right=right):
            other = _linear(right, names)
            value = _linear(left, names) + (other if isinstance(sign, ast.Add) else -other)
        case ast.BinOp(left=left, op=ast.Mult() | ast.Div() as operation, right=right):
            a, b = _linear(left, names), _linear(right, names)
            if isinstance(operation, ast.Mult) and not a[:-1].any():
                a, b = b, a
            if b[:-1].any():
                raise ValueError("not linear")
            if isinstance(operation, ast.Div) and b[-1] == 0.0:
                raise ZeroDivisionError
            value = a * b[-1] if isinstance(operation, ast.Mult) else a / b[-1]
        case _:
            raise ValueError("not linear")
    return value


def _label(row: np.ndarray, value: float, names: list[str]) -> str:
    parts = []
    for weight, name in zip(row, names, strict=True):
        if weight:
            size = "" if abs(weight) == 1.0 else f"{abs(weight):g}*"
            parts.append(f"{'-' if weight < 0 else '+'} {size}{name}")
    return f"{' '.join(parts).removeprefix('+ ')} = {value:g}"
