"""Random designs with several grouping factors: data, formula and dense model from one seed.

The sizes of a kind do not depend on the seed, so that fits of a kind share compiled code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from scipy.linalg import block_diag

from tests.oracles.dense import Array, Factor, Model

Rng = np.random.Generator


@dataclass(frozen=True, eq=False)
class Problem:
    """A simulated data set and the model it came from.

    Args:
        formula: the model as text; its random terms are the keys of ``covs``.
        data: the table, one row per observation, in no particular order.
        covs: true natural covariance of each term.
        scale: true residual variance.
        model: the dense model; its factors in the order of ``levels``.
        terms: per grouping factor the labels of its terms, in the order of the formula.
        levels: per grouping factor its labels by code.
        weights: the column of prior weights, or None.
        relmat: relationship matrices by grouping factor.
    """

    formula: str
    data: pd.DataFrame
    covs: dict[str, Array]
    scale: float
    model: Model
    terms: dict[str, list[str]]
    levels: dict[str, list[str]]
    weights: str | None = None
    relmat: dict[str, pd.DataFrame] = field(default_factory=dict)

    def by_factor(self, covs: Mapping[str, Array]) -> list[Array]:
        """Covariances of terms -> one matrix per factor, zero between terms."""
        return [block_diag(*[covs[label] for label in labels]) for labels in self.terms.values()]

    def by_term(self, cov_re: Array) -> dict[str, Array]:
        """The block diagonal matrix over all factors -> covariances of terms."""
        out, at = {}, 0
        for labels in self.terms.values():
            for label in labels:
                q = len(self.covs[label])
                out[label] = cov_re[at : at + q, at : at + q]
                at += q
        return out

    def pairs(self) -> list[list[tuple[int, int]]]:
        """The free entries of each factor's covariance."""
        out = []
        for labels in self.terms.values():
            entries, at = [], 0
            for label in labels:
                q = len(self.covs[label])
                entries += [(at + r, at + c) for r in range(q) for c in range(r + 1)]
                at += q
            out.append(entries)
        return out


def _labels(prefix: str, numbers: Array) -> Array:
    return np.array([f"{prefix}{number + 1:02d}" for number in numbers], dtype=object)


def nested(rng: Rng) -> dict[str, Array]:
    """Three levels; labels of b and c start anew in each group; a group of one row."""
    children = rng.permutation([3, 3, 2, 2, 3, 2, 2, 3])
    a = np.append(np.repeat(np.arange(8), children), 8)
    b = np.concatenate([np.arange(k) for k in [*children, 1]])
    grandchildren = np.append(rng.permutation([1, 2, 2, 2, 3] * 4), 1)
    leaf = np.repeat(np.arange(21), grandchildren)
    c = np.concatenate([np.arange(k) for k in grandchildren])
    sizes = np.append(rng.permutation([1, 2, 3, 4] * 10), 1)
    rows = np.repeat(np.arange(41), sizes)
    return {"a": a[leaf][rows], "b": b[leaf][rows], "c": c[rows]}


def crossed(rng: Rng) -> dict[str, Array]:
    """All cells of 9 x 6, one to three rows each; c is nested in a."""
    a, b = np.divmod(np.arange(54), 6)
    rows = np.repeat(np.arange(54), rng.permutation([1, 2, 3] * 18))
    return {"a": a[rows], "b": b[rows], "c": np.arange(len(rows)) % 2}


def partly_crossed(rng: Rng) -> dict[str, Array]:
    """About half of the cells of 9 x 6, two of the levels of a with one row; c is nested in a."""
    # The first cells see to it that no level is empty and that the levels are connected.
    cells = [(i, i % 6) for i in range(9)] + [(i, (i + 1) % 6) for i in range(7)]
    rest = [(i, j) for i in range(7) for j in range(6) if (i, j) not in cells]
    cells += [rest[k] for k in rng.choice(len(rest), 14, replace=False)]
    sizes = np.insert(rng.permutation([2, 2, 3, 4, 5, 3, 4] * 4), 7, [1, 1])
    a, b = np.array(cells)[np.repeat(np.arange(30), sizes)].T
    c = np.zeros(len(a), dtype=int)
    for level in range(9):
        c[a == level] = np.arange(np.sum(a == level)) % 2
    return {"a": a, "b": b, "c": c}


KINDS: dict[str, tuple[Callable[[Rng], dict[str, Array]], tuple[str, ...]]] = {
    "nested": (nested, ("(1 | a)", "(1 | a:b)")),
    "nested_three": (nested, ("(1 | a)", "(1 | a:b)", "(1 | a:b:c)")),
    "nested_slope": (nested, ("(1 + x | a)", "(1 | a:b)")),
    "crossed": (crossed, ("(1 | a)", "(1 | b)")),
    "partly_crossed": (partly_crossed, ("(1 | a)", "(1 | b)")),
    "crossed_nested": (partly_crossed, ("(1 | a)", "(1 | a:c)", "(1 | b)")),
    "crossed_slopes": (partly_crossed, ("(1 + x | a)", "(1 + z | b)")),
    "terms_of_one_factor": (crossed, ("(1 | a)", "(0 + x | a)", "(1 | b)")),
    "weights": (partly_crossed, ("(1 | a)", "(1 | b)")),
    "related": (partly_crossed, ("(1 | a)", "(1 | b)")),
    "related_slope": (crossed, ("(1 + x | a)", "(1 | b)")),
    "related_alone": (crossed, ("(1 + x | a)",)),
}
RELATED = tuple(kind for kind in KINDS if kind.startswith("related"))
UNRELATED = tuple(kind for kind in KINDS if kind not in RELATED)


def relationship(rng: Rng, levels: list[str]) -> pd.DataFrame:
    """A positive definite matrix with labels; diagonal entries from 1 to 1.3."""
    m = len(levels)
    factor = rng.standard_normal((m, 2 * m)) + rng.standard_normal(2 * m)
    K = factor @ factor.T
    size = np.sqrt(rng.uniform(1.0, 1.3, m) / np.diag(K))
    return pd.DataFrame(K * np.outer(size, size), index=levels, columns=levels)


def _covariance(rng: Rng, q: int) -> Array:
    sd = rng.uniform(0.8, 2.0, q)
    correlation = np.eye(q)
    correlation[np.tril_indices(q, -1)] = rng.uniform(-0.6, 0.6, q * (q - 1) // 2)
    correlation = np.tril(correlation) + np.tril(correlation, -1).T
    return np.outer(sd, sd) * correlation


def simulate(kind: str, seed: int) -> Problem:
    """Data of this kind (a key of ``KINDS``) and the model they were drawn from."""
    rng = np.random.Generator(np.random.PCG64([seed, list(KINDS).index(kind)]))
    layout, labels = KINDS[kind]
    codes = layout(rng)
    n = len(codes["a"])
    order = rng.permutation(n)
    data = pd.DataFrame({name: _labels(name, code[order]) for name, code in codes.items()})
    for name in ("x", "z"):
        data[name] = rng.standard_normal(n)
    scale = float(rng.uniform(0.3, 1.0))
    weights = None
    if kind == "weights":
        weights = "w"
        data["w"] = rng.uniform(0.4, 2.5, n)
    sd = np.sqrt(scale / data["w"].to_numpy() if weights else np.full(n, scale))
    mean = 2.0 - 0.7 * data["x"].to_numpy() + sd * rng.standard_normal(n)

    covs: dict[str, Array] = {}
    terms: dict[str, list[str]] = {}
    columns: dict[str, list[Array]] = {}
    for label in labels:
        design, group = label[1:-1].split(" | ")
        effects = [name for name in design.split(" + ") if name != "0"]
        covs[label] = _covariance(rng, len(effects))
        terms.setdefault(group, []).append(label)
        columns.setdefault(group, []).extend(
            np.ones(n) if name == "1" else data[name].to_numpy() for name in effects
        )
    factors, levels, relmat = [], {}, {}
    for group in terms:
        names = data[group.split(":")].agg(":".join, axis=1)
        levels[group] = sorted(set(names))
        code = names.map({level: i for i, level in enumerate(levels[group])}).to_numpy()
        K = None
        if kind in RELATED and group == "a":
            relmat[group] = relationship(rng, levels[group])
            K = relmat[group].to_numpy()
        factor = Factor(code, np.column_stack(columns[group]), K)
        cov = block_diag(*[covs[label] for label in terms[group]])
        effects = np.linalg.cholesky(factor.prior(cov)) @ rng.standard_normal(
            factor.levels * len(cov)
        )
        mean = mean + factor.wide @ effects
        factors.append(factor)
    data["y"] = mean
    model = Model(
        mean,
        np.column_stack([np.ones(n), data["x"]]),
        tuple(factors),
        data["w"].to_numpy() if weights else None,
    )
    formula = f"y ~ x + {' + '.join(labels)}"
    return Problem(formula, data, covs, scale, model, terms, levels, weights, relmat)
