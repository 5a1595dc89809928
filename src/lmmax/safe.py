"""`evaluate="safe"`: expressions of formulas by a small interpreter in place of Python.

It walks the syntax tree and knows columns, numbers, arithmetic, comparisons, NumPy's elementwise
functions and the transforms. Nothing else exists in it: no builtins, no attributes, no methods.
Sizes are bounded: arithmetic takes numbers and columns only, whole numbers stay below 2^64.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd

from .expressions import Expression, ExpressionError, read_expression

__all__ = ["Evaluate", "UnsafeError", "check_evaluate", "check_safe", "evaluate_safely"]

Evaluate = Literal["python", "safe"]
"""How the expressions of a formula are evaluated."""

_MOST_COLUMNS = 100
"""Largest degree, or degrees of freedom, of a basis."""

_UFUNCS = (
    *("abs", "absolute", "fabs", "sign", "sqrt", "cbrt", "square"),
    *("exp", "exp2", "expm1", "log", "log2", "log10", "log1p"),
    *("sin", "cos", "tan", "arcsin", "arccos", "arctan", "arctan2"),
    *("sinh", "cosh", "tanh", "arcsinh", "arccosh", "arctanh", "hypot"),
    *("degrees", "radians", "deg2rad", "rad2deg", "floor", "ceil", "trunc"),
    *("rint", "maximum", "minimum", "fmax", "fmin", "power", "add"),
    *("subtract", "multiply", "divide", "mod", "reciprocal", "negative", "isnan"),
    *("isfinite", "logical_and", "logical_or", "logical_not", "greater", "greater_equal", "less"),
    *("less_equal", "equal", "not_equal"),
)
_ELEMENTWISE: dict[str, tuple[Callable[..., Any], int, int]] = {
    **{name: (getattr(np, name), getattr(np, name).nin, getattr(np, name).nin) for name in _UFUNCS},
    "where": (np.where, 3, 3),
    "clip": (np.clip, 3, 3),
    "round": (np.round, 1, 2),
}
_CONSTANTS = {"pi": np.pi, "e": np.e, "nan": np.nan, "inf": np.inf}
# Functions with a name of their own, and the most numbers they take.
_PLAIN = {
    **dict.fromkeys(("sqrt", "abs", "sin", "cos", "tan", "log1p", "expm1", "floor", "tanh"), 1),
    **dict.fromkeys(("log10", "log2", "exp", "exp10", "exp2", "ceiling"), 1),
    "log": 2,
}
_SPLINE = ("df", "knots", "lower_bound", "upper_bound", "constraints", "extrapolation")
# The transforms that learn from data, and the names of their arguments after the first.
_LEARNING: dict[str, tuple[str, ...]] = {
    "center": (),
    "scale": ("center", "scale", "ddof"),
    "standardize": ("center", "rescale", "ddof"),
    "poly": ("degree", "raw"),
    "bs": (
        *("df", "knots", "degree", "include_intercept"),
        *("lower_bound", "upper_bound", "extrapolation"),
    ),
    **dict.fromkeys(("cr", "cs", "cc"), _SPLINE),
}
_CONTRASTS = ("treatment", "sum", "SAS", "helmert", "diff", "poly", "custom")
_CODINGS = ("Treatment", "Poly", "Sum", "Helmert", "Diff")

_BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.BitAnd: operator.and_,
    ast.BitOr: operator.or_,
}
_UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
    ast.Invert: np.logical_not,
}
_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
}


class UnsafeError(ExpressionError):
    """An expression that `evaluate="safe"` does not evaluate."""


def check_evaluate(evaluate: Any) -> None:
    """Raise unless it is one of the ways to evaluate expressions."""
    if evaluate not in get_args(Evaluate):
        raise ValueError(f"evaluate={evaluate!r} must be 'python' or 'safe'")


def _refused(node: ast.AST) -> UnsafeError:
    text = ast.unparse(node)
    shown = text if len(text) <= 60 else f"{text[:60]}..."
    return UnsafeError(
        f"has `{shown}`, which evaluate='safe' does not evaluate: it knows columns, numbers, "
        "arithmetic, comparisons, elementwise functions of NumPy and the transforms"
    )


def _member(node: ast.AST, owner: str) -> str | None:
    """The name of `owner.name`, None for anything else."""
    ok = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name)
    return node.attr if ok and node.value.id == owner else None  # type: ignore[attr-defined]


def check_safe(text: str) -> None:
    """Check an expression, without data.

    Raises:
        UnsafeError: for what is not known to be harmless.
    """
    _check(read_expression(text).tree)


def _check(node: ast.AST) -> None:
    if isinstance(node, ast.Constant):
        if not (node.value is None or type(node.value) in (bool, int, float, str)):
            raise _refused(node)
    elif isinstance(node, ast.Name):
        if node.id.startswith("__"):
            raise _refused(node)
    elif isinstance(node, ast.Attribute):
        if _member(node, "np") not in _CONSTANTS and _member(node, "contr") not in _CONTRASTS:
            raise _refused(node)
    elif isinstance(node, ast.Call):
        if not _known(node.func) or any(k.arg is None or k.arg[0] == "_" for k in node.keywords):
            raise _refused(node)
        for argument in [*node.args, *(keyword.value for keyword in node.keywords)]:
            _check(argument)
    elif isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        _check(node.operand)
    elif isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        _check(node.left)
        _check(node.right)
    elif isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARE:
        _check(node.left)
        _check(node.comparators[0])
    elif isinstance(node, ast.List | ast.Tuple):
        for element in node.elts:
            _check(element)
    elif isinstance(node, ast.Dict):
        for part in [*node.keys, *node.values]:
            if part is None:
                raise _refused(node)
            _check(part)
    else:
        raise _refused(node)


def _known(function: ast.expr) -> bool:
    if isinstance(function, ast.Name):
        return function.id in (*_PLAIN, *_LEARNING, *_CODINGS, "C", "I", "Q")
    return _member(function, "np") in _ELEMENTWISE or _member(function, "contr") in _CONTRASTS


def evaluate_safely(
    text: str,
    column: Callable[[str], Any],
    functions: Mapping[str, Any],
    state: dict[str, Any],
    rows: int,
) -> Any:
    """Evaluate an expression.

    Args:
        text: the expression.
        column: values of a column by its name, a KeyError for other names.
        functions: the library's functions by name.
        state: what transforms have learnt, by their text; filled in here.
        rows: of every column.

    Raises:
        UnsafeError: for what is not known to be harmless.
    """
    expression = read_expression(text)
    _check(expression.tree)
    return _Interpreter(expression, column, functions, state, rows).value(expression.tree)


class _Interpreter:
    def __init__(
        self,
        expression: Expression,
        column: Callable[[str], Any],
        functions: Mapping[str, Any],
        state: dict[str, Any],
        rows: int,
    ) -> None:
        self._expression, self._column, self._functions = expression, column, functions
        self._state, self._rows = state, rows

    def value(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant():
                return _small(node.value)
            case ast.Name():
                return self._column(self._expression.column(node))
            case ast.Attribute():
                if (name := _member(node, "np")) is not None:
                    return _CONSTANTS[name]
                return getattr(self._functions["contr"], node.attr)
            case ast.UnaryOp():
                return _UNARY[type(node.op)](self._numbers(node.operand))
            case ast.BinOp():
                return self._arithmetic(node)
            case ast.Compare():
                right = self.value(node.comparators[0])
                return _COMPARE[type(node.ops[0])](self.value(node.left), right)
            case ast.List() | ast.Tuple():
                return [self._constant(element) for element in node.elts]
            case ast.Dict():
                keys = [self._constant(key) for key in node.keys if key is not None]
                return dict(zip(keys, map(self._constant, node.values), strict=True))
            case ast.Call():
                return self._call(node)
        raise _refused(node)

    def _constant(self, node: ast.expr) -> Any:
        """A value without columns in it."""
        if any(isinstance(part, ast.Name | ast.Call) for part in ast.walk(node)):
            raise _refused(node)
        return self.value(node)

    def _numbers(self, node: ast.expr) -> Any:
        """A number, or a column of them: texts multiply, and tables grow."""
        value = self.value(node)
        value = getattr(value, "__wrapped__", value)
        if type(value) in (bool, int, float) or isinstance(value, np.number | np.bool_):
            return value
        if isinstance(value, np.ndarray | pd.Series):
            number = isinstance(value.dtype, np.dtype) and value.dtype.kind in "biuf"
            if number and value.shape == (self._rows,):
                return value
        raise UnsafeError(f"has `{ast.unparse(node)[:60]}`, which is not a column of numbers")

    def _arithmetic(self, node: ast.BinOp) -> Any:
        left, right = self._numbers(node.left), self._numbers(node.right)
        if isinstance(node.op, ast.Pow) and type(left) in (bool, int) and type(right) is int:
            left = int(left)
            if right < 0 or right > 64 or left.bit_length() * right > 64:
                left = np.float64(left)
                right = np.float64(right)
        if type(left) is float:
            left = np.float64(left)
        return _small(_BINARY[type(node.op)](left, right))

    def _call(self, node: ast.Call) -> Any:
        function = node.func
        if (name := _member(function, "np")) is not None:
            call, least, most = _ELEMENTWISE[name]
            return self._elementwise(node, call, least, most)
        if _member(function, "contr") is not None:
            return self._coding(node, self.value(function))
        assert isinstance(function, ast.Name)
        name = function.id
        if name in _PLAIN:
            return self._elementwise(node, self._functions[name], 1, _PLAIN[name])
        if name in _CODINGS:
            return self._coding(node, self._functions[name])
        if not node.args:
            raise _refused(node)
        if name == "I" and len(node.args) == 1 and not node.keywords:
            return self.value(node.args[0])
        if name == "Q" and len(node.args) == 1 and isinstance(node.args[0], ast.Constant):
            return self._column(str(node.args[0].value))
        if name == "C":
            return self._categories(node)
        if name in _LEARNING:
            return self._learnt(node, name)
        raise _refused(node)

    def _elementwise(self, node: ast.Call, call: Any, least: int, most: int) -> Any:
        if node.keywords or not least <= len(node.args) <= most:
            raise _refused(node)  # such as out=
        return call(*map(self._numbers, node.args))

    def _coding(self, node: ast.Call, call: Any) -> Any:
        return call(
            *map(self._constant, node.args),
            **{str(k.arg): self._constant(k.value) for k in node.keywords},
        )

    def _categories(self, node: ast.Call) -> Any:
        options = self._named(node, ("contrasts", "levels"))
        given = {}
        for key, value in options.items():
            if key == "contrasts" and isinstance(value, ast.Name):
                if value.id not in (*_CODINGS, "sum"):
                    raise _refused(value)
                given[key] = self._functions["Sum" if value.id == "sum" else value.id]
            elif key == "contrasts":
                given[key] = self.value(value)
            else:
                given[key] = self._constant(value)
        return self._functions["C"](self.value(node.args[0]), **given)

    def _learnt(self, node: ast.Call, name: str) -> Any:
        options = self._named(node, _LEARNING[name])
        given = {key: self._constant(value) for key, value in options.items()}
        sizes = [given.get("df"), given.get("degree")]
        knots = given.get("knots")
        if isinstance(knots, list):
            sizes.append(len(knots))
        for size in sizes:
            if size is not None and not (type(size) is int and 0 <= size <= _MOST_COLUMNS):
                raise UnsafeError(
                    f"has {name}() with {str(size)[:20]}, but evaluate='safe' makes at most "
                    f"{_MOST_COLUMNS} columns"
                )
        state = self._state.setdefault(ast.unparse(node), {})
        return self._functions[name](self._numbers(node.args[0]), **given, _state=state)

    @staticmethod
    def _named(node: ast.Call, names: tuple[str, ...]) -> dict[str, ast.expr]:
        """Arguments after the first, by name."""
        rest = node.args[1:]
        found = {name: value for name, value in zip(names, rest, strict=False)}
        for keyword in node.keywords:
            if keyword.arg not in names or keyword.arg in found:
                raise _refused(node)
            found[keyword.arg] = keyword.value
        if len(rest) > len(names):
            raise _refused(node)
        return found


def _small(value: Any) -> Any:
    """A whole number as one only while it is small."""
    large = type(value) is int and value.bit_length() > 64
    return np.float64(value) if large else value
