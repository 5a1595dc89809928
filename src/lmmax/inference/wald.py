"""Wald tests of linear hypotheses on the coefficients."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import jax
import jax.scipy.special as special
import numpy as np
import pandas as pd


class HypothesisError(ValueError):
    """A hypothesis that does not fit the model's coefficients."""


def normal_pvalues(z: np.ndarray) -> np.ndarray:
    """Return two-sided p-values of standard normal statistics."""
    return np.array([math.erfc(abs(value) / math.sqrt(2.0)) for value in z])


def normal_quantile(alpha: float) -> float:
    """Return the upper ``alpha / 2`` quantile of the standard normal distribution."""
    if not 0.0 < alpha < 1.0:
        raise ValueError(f"alpha={alpha!r} must lie between 0 and 1 (0.05 for 95% limits)")
    return NormalDist().inv_cdf(1.0 - 0.5 * alpha)


def format_pvalue(p: float) -> str:
    """Return a p-value with three decimals, honest about small ones."""
    return "<0.001" if p < 0.0005 else f"{p:.3f}"


_FORMATS: dict[str, Any] = {
    "float_format": "{:.4g}".format,
    "formatters": {"z": "{:.3f}".format, "P>|z|": format_pvalue},
}


@dataclass(frozen=True)
class ContrastTable:
    """Tests of single hypotheses.

    Attributes:
        table: a row per hypothesis: estimate, standard error, z, p-value, confidence limits.
    """

    table: pd.DataFrame

    def __str__(self) -> str:
        return self.table.to_string(**_FORMATS)

    def _repr_html_(self) -> str:
        html: str = self.table.to_html(**_FORMATS)
        return html


@dataclass(frozen=True)
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
            head = f"F({self.df_num}, {self.df_denom:g}) = {self.statistic:.4g}"
        p = "p < 0.001" if self.pvalue < 0.0005 else f"p = {self.pvalue:.3f}"
        return f"Wald test: {head}, {p}"


def t_test(
    params: pd.Series, cov: pd.DataFrame, hypothesis: Any, alpha: float = 0.05
) -> ContrastTable:
    """Test each row of a hypothesis on its own; see :meth:`lmmax.Fit.t_test`."""
    R, values, names = linear_hypotheses(params, hypothesis)
    estimate = R @ params.fillna(0.0).to_numpy()
    error = np.sqrt(np.einsum("ij,jk,ik->i", R, cov.fillna(0.0).to_numpy(), R))
    z = (estimate - values) / error
    half = normal_quantile(alpha) * error
    table = pd.DataFrame(
        {
            "coef": estimate,
            "std err": error,
            "z": z,
            "P>|z|": normal_pvalues(z),
            f"[{alpha / 2:g}": estimate - half,
            f"{1 - alpha / 2:g}]": estimate + half,
        },
        index=names,
    )
    return ContrastTable(table)


def wald_test(
    params: pd.Series, cov: pd.DataFrame, hypothesis: Any, df_denom: float | None = None
) -> WaldTest:
    """Test hypotheses jointly, by chi-squared or, with ``df_denom``, by F."""
    R, values, _ = linear_hypotheses(params, hypothesis)
    difference = R @ params.fillna(0.0).to_numpy() - values
    V = R @ cov.fillna(0.0).to_numpy() @ R.T
    unit = np.sqrt(np.diag(V))
    V = V / np.outer(unit, unit)
    rank = int(np.linalg.matrix_rank(V, hermitian=True))
    if rank < len(V):
        raise HypothesisError(
            f"the {len(V)} hypotheses are linearly dependent (rank {rank}); leave out the "
            "redundant ones"
        )
    difference = difference / unit
    statistic = float(difference @ np.linalg.solve(V, difference))
    if df_denom is None:
        return WaldTest(statistic, rank, None, chi2_upper(statistic, rank))
    statistic /= rank
    return WaldTest(statistic, rank, df_denom, f_upper(statistic, rank, df_denom))


def chi2_upper(statistic: float, df: float) -> float:
    """Return the upper tail probability of the chi-squared distribution."""
    with jax.enable_x64(True):
        return float(special.gammaincc(0.5 * df, 0.5 * statistic))


def f_upper(statistic: float, df_num: float, df_denom: float) -> float:
    """Return the upper tail probability of the F distribution."""
    with jax.enable_x64(True):
        ratio = df_denom / (df_denom + df_num * statistic)
        return float(special.betainc(0.5 * df_denom, 0.5 * df_num, ratio))


def linear_hypotheses(
    params: pd.Series, hypothesis: Any
) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Return ``(R, r, labels)`` of the hypotheses ``R beta = r``.

    Raises:
        HypothesisError: for a name that is no coefficient, a shape that does not fit, or a
            hypothesis about an aliased coefficient.
    """
    names = [str(name) for name in params.index]
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
        try:
            R = np.atleast_2d(np.asarray(matrix, dtype=float))
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
    aliased = params.isna().to_numpy() & np.any(R != 0.0, axis=0)
    if aliased.any():
        raise HypothesisError(
            f"the coefficient of {names[int(np.argmax(aliased))]!r} is aliased (not estimable), so "
            "no hypothesis about it can be tested"
        )
    return R, np.asarray(r), labels


def _read(text: str, names: list[str]) -> list[tuple[str, np.ndarray, float]]:
    """Return label, row and value of each hypothesis in ``text``, which commas separate."""
    # Names such as "Time:Cu[T.b]" or "bs(x, df=4)[1]" are taken out before anything is parsed;
    # longest first, so that parts of names stay whole.
    special_names = sorted((n for n in names if not n.isidentifier()), key=len, reverse=True)
    pattern = "|".join([r"`[^`]*`", *map(re.escape, special_names)])
    position = {name: f"_{j}_" for j, name in enumerate(names)}

    def put_placeholder(match: re.Match[str]) -> str:
        name = match[0].strip("`")
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
        except (SyntaxError, ValueError, ZeroDivisionError) as error:
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
