"""Simulated mixed models with one grouping factor, made from a number each.

Design: every model is a function of its number alone. Settings run through cycles of coprime
lengths, so that kinds of model, sizes, variances, correlations, and units meet in many
combinations. Random numbers are uniforms of PCG64, the normals made from them by Box and
Muller's formula, and data are rounded to a few decimals: the tables are the same everywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

N_MODELS = 330


@dataclass(frozen=True)
class Kind:
    """A model's shape: formula (valid for lme4 and lmmax alike) and random effects.

    ``effects`` names the columns of the random-effects design in the formula's order; ``full``
    says whether their covariance matrix is unrestricted or diagonal.
    """

    name: str
    formula: str
    effects: tuple[str, ...]
    full: bool


KINDS = (
    Kind("int", "y ~ x1 + (1 | g)", ("1",), True),
    Kind("slope", "y ~ x1 + (1 + x1 | g)", ("1", "x1"), True),
    Kind("only", "y ~ x1 + (0 + x1 | g)", ("x1",), True),
    Kind("diag2", "y ~ x1 + (1 + x1 || g)", ("1", "x1"), False),
    Kind("full3", "y ~ x1 + x2 + (1 + x1 + x2 | g)", ("1", "x1", "x2"), True),
    Kind("mean", "y ~ 1 + (1 | g)", ("1",), True),
    Kind("full4", "y ~ x1 + x2 + x3 + (1 + x1 + x2 + x3 | g)", ("1", "x1", "x2", "x3"), True),
    Kind("cat0", "y ~ f + x1 + (0 + f | g)", ("f=f1", "f=f2", "f=f3"), True),
    Kind("cat1", "y ~ h + x1 + (1 + h | g)", ("1", "h=h2"), True),
    Kind("far", "y ~ x1 + (1 + x1 | g)", ("1", "x1"), True),
    Kind("diag4", "y ~ x1 + x2 + x3 + (1 + x1 + x2 + x3 || g)", ("1", "x1", "x2", "x3"), False),
)

# Variance of the random effects over that of the residual.
RATIOS = (1.0, 0.0, 0.1, 100.0, 0.01, 10.0, 0.3)
# Relative standard deviations of the effects: equal, unequal, some of them zero.
PATTERNS = ((1.0, 1.0, 1.0, 1.0), (1.0, 0.3, 0.1, 0.5), (1.0, 0.0, 0.5, 0.0), (0.3, 1.0, 0.0, 1.0))
# Common correlation of the effects; 1 makes the covariance matrix of rank one.
CORRELATIONS = (0.3, 0.95, 1.0, 0.0, 0.999)
# Groups and mean group size; the actual size is at least three more than the effects.
SIZES = (
    (5, 4), (20, 5), (12, 8), (30, 6), (8, 5), (50, 10), (10, 12), (100, 5), (6, 30), (200, 8),
    (15, 4), (40, 20), (25, 5),
)  # fmt: skip
LARGE = ((1000, 10), (10, 2000), (3000, 10), (500, 40))


@dataclass(frozen=True)
class Model:
    """One simulated model: everything needed to fit it, and the truth it was drawn from."""

    name: str
    kind: Kind
    data: pd.DataFrame
    reml: bool
    weights: str | None
    D: NDArray[np.float64]  # (q, q), true covariance of the effects over the residual variance

    @property
    def formula(self) -> str:
        return self.kind.formula

    def matrices(self) -> dict[str, Any]:
        """y, X, Z, codes, weights, made by hand from the columns."""
        fixed = self.formula.split("~")[1].split("(")[0].strip(" +").split(" + ")
        names = [] if fixed == ["1"] else fixed
        expand = {"f": ["f=f2", "f=f3"], "h": ["h=h2"]}
        columns = ["1", *(c for name in names for c in expand.get(name, [name]))]
        return {
            "y": self.data["y"].to_numpy(),
            "X": np.column_stack([_column(self.data, c) for c in columns]),
            "Z": np.column_stack([_column(self.data, c) for c in self.kind.effects]),
            "codes": np.unique(self.data["g"].to_numpy(), return_inverse=True)[1],
            "weights": None if self.weights is None else self.data[self.weights].to_numpy(),
        }


def _column(data: pd.DataFrame, name: str) -> NDArray[np.float64]:
    column, _, level = name.partition("=")
    if level:
        return np.asarray(data[column] == level, dtype=np.float64)
    return np.ones(len(data)) if name == "1" else data[name].to_numpy(float)


class _Draws:
    """Uniforms of PCG64 and what is made from them by arithmetic alone."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.Generator(np.random.PCG64(seed))

    def uniform(self, *shape: int) -> NDArray[np.float64]:
        return self._rng.random(shape)

    def normal(self, *shape: int) -> NDArray[np.float64]:
        u, v = self.uniform(*shape), self.uniform(*shape)
        return np.sqrt(-2 * np.log1p(-u)) * np.cos(2 * np.pi * v)

    def order(self, n: int) -> NDArray[np.intp]:
        return np.argsort(self.uniform(n), kind="stable")


def true_covariance(number: int, q: int, full: bool) -> NDArray[np.float64]:
    """Covariance matrix of the effects over the residual variance, shape (q, q)."""
    ratio = RATIOS[number % len(RATIOS)]
    sd = np.sqrt(ratio) * np.array(PATTERNS[(number // 3) % len(PATTERNS)][:q])
    if q == 1:
        sd = np.sqrt([ratio])
    rho = CORRELATIONS[(number // 2) % len(CORRELATIONS)] if full else 0.0
    return np.outer(sd, sd) * (rho + (1 - rho) * np.eye(q))


def make_model(number: int) -> Model:
    """Model ``number`` of the validation matrix, 0 <= number < N_MODELS."""
    kind = KINDS[number % len(KINDS)]
    q = len(kind.effects)
    draws = _Draws(20_000 + number)
    m, k = SIZES[number % len(SIZES)]
    if number % 17 == 16:
        m, k = LARGE[(number // 17) % len(LARGE)]
    k = max(k, q + 3)
    if (number // 4) % 2:
        # Ragged: cubes of uniforms make many singletons and a few large groups.
        sizes = 1 + np.floor(4 * (k - 1) * draws.uniform(m) ** 3).astype(int)
        sizes[0] = max(sizes[0], 2 * k)
    else:
        sizes = np.full(m, k)
    sizes[0] += max(0, 20 - sizes.sum())
    codes = np.repeat(np.arange(m), sizes)
    codes = codes[draws.order(len(codes))]
    n = len(codes)

    data = pd.DataFrame({f"x{j}": np.round(draws.normal(n), 4) for j in (1, 2, 3)})
    if kind.name == "far":
        # A covariate like a calendar year: intercepts and slopes are almost collinear.
        data["x1"] = 2000 + np.floor(20 * draws.uniform(n))
    data["f"] = np.char.add("f", (1 + np.floor(3 * draws.uniform(n))).astype(int).astype(str))
    data["h"] = np.char.add("h", (1 + np.floor(2 * draws.uniform(n))).astype(int).astype(str))
    data["g"] = np.char.add("g", np.char.zfill(codes.astype(str), 5))
    data["w"] = np.round(0.3 + 2.7 * draws.uniform(n), 3)
    weights = "w" if number % 5 == 2 else None

    D = true_covariance(number, q, kind.full)
    Z = np.column_stack([_column(data, c) for c in kind.effects])
    if kind.name == "far":
        Z[:, 1] -= 2010
    values, vectors = np.linalg.eigh(D)
    # The symmetric root does not depend on the signs of the eigenvectors, and the root of a
    # rounding error would depend on the machine.
    values = np.where(values > 1e-12 * np.max(values), values, 0.0)
    root = (vectors * np.sqrt(values)) @ vectors.T
    b = draws.normal(m, q) @ root
    residual = draws.normal(n) / (1.0 if weights is None else np.sqrt(data["w"].to_numpy()))
    x1 = data["x1"].to_numpy() - (2010 if kind.name == "far" else 0)
    y = 1.0 + 0.5 * x1 + (Z * b[codes]).sum(axis=1) + residual
    unit = (1.0, 1.0, 1.0, 1e3, 1e-3)[(number // 11) % 5]
    data["y"] = np.round(y, 6) * unit
    reml = (number // 2 + number // 11) % 2 == 0
    name = f"{number:03d}-{kind.name}-{'reml' if reml else 'ml'}-n{n}-m{m}"
    return Model(name, kind, data, reml, weights, D)
