"""Python expressions in formulas as syntax trees; names in them may stand in backticks."""

from __future__ import annotations

import ast
import re
import warnings
from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import NamedTuple

__all__ = [
    "QUOTED",
    "Expression",
    "ExpressionError",
    "expression_names",
    "is_elementwise",
    "read_expression",
]

_DEEPEST = 300
"""Most operations inside each other; Python's own functions on trees recurse."""
QUOTED = re.compile(r"(\"(?:\\.|[^\"\\])*\"|'(?:\\.|[^'\\])*'|`[^`]*`)")
"""Strings and names in backticks."""


class ExpressionError(ValueError):
    """Text that is no Python expression, or one that cannot be used."""


class Expression(NamedTuple):
    """A Python expression.

    Args:
        tree: its syntax.
        quoted: by name in the tree, the names that stood in backticks.
    """

    tree: ast.expr
    quoted: Mapping[str, str]

    def column(self, name: ast.Name) -> str:
        """What a name in the tree was in the text."""
        return self.quoted.get(name.id, name.id)


def read_expression(text: str) -> Expression:
    """Parse an expression.

    Raises:
        ExpressionError: if Python cannot.
    """
    quoted: dict[str, str] = {}

    def plain(match: re.Match[str]) -> str:
        if match[1][0] != "`":
            return match[1]
        name = f"_quoted_{len(quoted)}_"
        quoted[name] = match[1][1:-1]
        return name

    plain_text = QUOTED.sub(plain, text).strip()
    try:
        with warnings.catch_warnings():
            # Of escapes that are none, `'\d'`: of no interest to who fits a model.
            warnings.simplefilter("ignore")
            tree = ast.parse(plain_text, mode="eval").body
    except (RecursionError, MemoryError):
        raise ExpressionError("is nested too deeply") from None
    except (SyntaxError, ValueError):  # ValueError: zero bytes, numbers of too many digits
        raise ExpressionError("is not a Python expression") from None
    if _depth(tree) > _DEEPEST:
        raise ExpressionError(f"has more than {_DEEPEST} operations inside each other")
    return Expression(tree, quoted)


def _depth(tree: ast.AST) -> int:
    depth, level = 0, [tree]
    while level:
        depth += 1
        level = [child for node in level for child in ast.iter_child_nodes(node)]
    return depth


@lru_cache(maxsize=4096)
def expression_names(expression: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names used in a Python expression: (as values, as functions), each in order, once.

    Raises:
        ExpressionError: for text that is none.

    Example:
        >>> expression_names("np.log(x) + poly(`my y`, 2)")
        (('np', 'x', 'my y'), ('poly',))
    """
    tree, quoted = read_expression(expression)
    values: dict[str, None] = {}
    functions: dict[str, None] = {}
    called: set[int] = set()
    bound: set[str] = set()
    nodes = list(ast.walk(tree))
    for node in nodes:
        if isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            bound.add(node.id)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            called.add(id(node.func))
            functions[node.func.id] = None
            first = node.args[0] if node.args else None
            if node.func.id == "Q" and isinstance(first, ast.Constant):
                values[str(first.value)] = None
    names = [n for n in nodes if isinstance(n, ast.Name) and id(n) not in called]
    for node in sorted(names, key=lambda n: (n.lineno, n.col_offset)):
        if node.id not in bound:
            values[quoted.get(node.id, node.id)] = None
    return tuple(values), tuple(functions)


def is_elementwise(expression: str, known: Callable[[str], bool]) -> bool:
    """Whether a value of an expression is known to depend on its own row only, from the text.

    Args:
        expression: the text.
        known: whether a function, by its name or as `np.name`, gives each row its own value.

    Raises:
        ExpressionError: for text that is none.

    Example:
        >>> is_elementwise("np.log(x) + 1", {"np.log"}.__contains__)
        True
        >>> is_elementwise("x - x.mean()", {"np.log"}.__contains__)
        False
    """
    for node in ast.walk(read_expression(expression).tree):
        if isinstance(node, ast.Call) and not known(ast.unparse(node.func)):
            return False
        if isinstance(node, ast.Subscript | ast.MatMult | ast.Lambda | ast.comprehension):
            return False
    return True
