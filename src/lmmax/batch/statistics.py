"""Sufficient statistics of many responses that share the designs of a one-factor model.

With ``Z_i = Q_i U_i`` and ``Y_i = Q_i' [X_i y_i]`` as in :mod:`lmmax.compress.grouped`, only the
last column of ``Y_i``, and the last row of C, differ between responses.

Groups that share ``U`` form a pattern.  Let the rows of ``M_X (m_u, q p)`` and ``M_y (m_u, q)`` be
the entries of their ``Y_i``, ``B`` an orthonormal basis of the columns of ``M_X``, r in number, and
``T'T`` the cross-product of what B leaves of ``M_y``.  The criterion needs the cross-product of
``[M_X M_y]`` only, which is that of r + q rows, the pseudo-groups::

    [B'M_X  B'M_y]
    [  0      T  ]

For responses from the fitted model, the rows of ``M_y`` around the fitted mean are independent
draws from ``N(0, scale (U D U' + I))``.  So ``B'M_y`` are r such draws and ``T'T`` is a Wishart
matrix with ``m_u - r`` degrees of freedom, whose root is drawn directly (Bartlett, 1933): the cost
depends on the number of patterns, not on that of rows or groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..compress.grouped import Statistics, equal_groups, within_groups
from ..compress.layout import Layout
from ..compress.rows import SMALLEST_BUCKET, bucket, chunk_rows, chunks, orthonormalise, project_out
from ..likelihood import Problem
from ..likelihood.grouped import GroupedProblem
from ..likelihood.shared import SharedProblem, pays, shared_matrix
from .grouped_rows import as_range

if TYPE_CHECKING:
    from ..results import Fit

RANK_TOLERANCE = 1e-13
"""What is left of columns of length one, below which it is a rounding error."""


class Pattern(NamedTuple):
    """Groups with the same ``U``, merged.

    Attributes:
        members: their positions, (m_u,).
        basis: orthonormal basis of what X does across them, (m_u, r).
    """

    members: np.ndarray
    basis: np.ndarray


class Responses(NamedTuple):
    """What differs between n responses, in working coordinates.

    Attributes:
        Y: last column of the pseudo-groups' ``Y_i``, (n, q, m).
        C: last row of C: cross-products with the p columns of X, then with itself, (n, p + 1).
        origin: coefficients (working coordinates, units of the data) already taken out, (n, p).
        y_scale: units of the data per unit of the working response, (n,).
    """

    Y: np.ndarray
    C: np.ndarray
    origin: np.ndarray
    y_scale: np.ndarray


@dataclass(frozen=True)
class SharedDesigns:
    """What responses share, in working coordinates.

    Attributes:
        problem: the problem with its pseudo-groups, the response's entries zero.
        patterns: the merged groups; their pseudo-groups come first, in this order.
        loose: positions of the groups that stand for themselves, behind them.
        U: triangular factors of all groups, (q, q, m).
        rank: 1.0 where a group's projected row exists, (q, m).
        root_C: root of the cross-product of X outside the column spaces of Z, (p, rank).
        layout: the designs by row.
    """

    problem: GroupedProblem
    patterns: tuple[Pattern, ...]
    loose: np.ndarray
    U: np.ndarray
    rank: np.ndarray
    root_C: np.ndarray
    layout: Layout

    @property
    def n_fixed(self) -> int:
        """Number of coefficients, without padding."""
        return len(self.root_C)

    @property
    def numbers(self) -> int:
        """How many numbers a response brings with it."""
        return int(self.problem.Y.size)

    @property
    def sizes(self) -> list[int]:
        """Number of pseudo-groups of each pattern."""
        return [pattern.basis.shape[1] + len(self.U) for pattern in self.patterns]

    @property
    def residual_df(self) -> int:
        """Number of dimensions of the rows outside the column spaces of Z and X."""
        n, inside = self.layout.n_obs, int(self.rank.sum())
        return n - inside - self.root_C.shape[1]

    @cached_property
    def by_pattern(self) -> SharedProblem | None:
        """The form of the likelihood for lanes that share designs, without lanes; None if none."""
        whole, p = self.problem, self.n_fixed
        q, _, m = whole.U.shape
        if not pays(q, p, len(self.patterns) + len(self.loose)):
            return None
        U, weight, pattern = pattern_arrays(self.U, self.patterns, self.loose, q, m)
        X = np.ascontiguousarray(whole.Y[:, :p].transpose(0, 2, 1))
        common = {each.name: getattr(whole, each.name) for each in fields(Problem)}
        common["x_inverse"] = whole.x_inverse[:p, :p]
        common["beta_origin"] = whole.beta_origin[:p]
        return SharedProblem(
            **common,
            U=U,
            weight=weight,
            XX=shared_matrix(X, pattern, U.shape[2]),
            X=X,
            pattern=pattern if self.patterns else None,
            C=whole.C[:p, :p],
            y=np.zeros((0, 1, q, m)),
            cross=np.zeros((0, 1, p + 1)),
        )


def shared_designs(fit: Fit) -> SharedDesigns:
    """Return what all responses of a one-factor model share, its groups merged by pattern."""
    statistics, whole = fit.compression.detail, fit.compression.problem
    assert isinstance(statistics, Statistics)  # the engine is "grouped"
    U, p = statistics.U, int(whole.n_fixed)
    X_parts = statistics.Y[:, :p]
    q = len(U)
    patterns, rest = find_patterns(U, X_parts, q)
    parts_U, parts_X, weight = [], [], []
    for members, basis in patterns:
        r = basis.shape[1]
        X_part = np.zeros((q, p, r + q))
        X_part[:, :, :r] = X_parts[:, :, members] @ basis
        parts_X.append(X_part)
        parts_U.append(np.broadcast_to(U[:, :, members[:1]], (q, q, r + q)))
        weight.append(np.full(r + q, len(members) / (r + q)))
    parts_U.append(U[:, :, rest])
    parts_X.append(X_parts[:, :, rest])
    weight.append(np.ones(len(rest)))

    C = np.array(whole.C)
    C[-1] = C[:, -1] = 0.0
    width, count = whole.C.shape[0], sum(map(len, weight))
    size = _bucket(count)
    Y, padded_U, padded_weight = (
        np.zeros((q, width, size)),
        np.zeros((q, q, size)),
        np.zeros(size),
    )
    Y[:, :p, :count] = np.concatenate(parts_X, axis=2)
    padded_U[:, :, :count] = np.concatenate(parts_U, axis=2)
    padded_weight[:count] = np.concatenate(weight)
    values, vectors = np.linalg.eigh(C[:p, :p])
    left = values > RANK_TOLERANCE
    return SharedDesigns(
        problem=replace(whole, U=padded_U, Y=Y, weight=padded_weight, C=C),
        patterns=patterns,
        loose=rest,
        U=U,
        rank=(np.einsum("kkm->km", U) > 0.0).astype(float),
        root_C=vectors[:, left] * np.sqrt(values[left]),
        layout=fit.layout,
    )


def find_patterns(
    U: np.ndarray, shared: np.ndarray, own: int
) -> tuple[tuple[Pattern, ...], np.ndarray]:
    """Return groups that are merged, and the positions of those that stand for themselves.

    Args:
        U: triangular factors, (q, q, m).
        shared: projected columns that all lanes share, (q, w, m).
        own: numbers of a group that each lane has of its own.
    """
    q, w, m = shared.shape
    loose, patterns = np.ones(m, dtype=bool), []
    for members in equal_groups(U, own):
        rows = shared[:, :, members].reshape(q * w, len(members)).T
        left, values, _ = np.linalg.svd(rows, full_matrices=False)
        basis = left[:, values > RANK_TOLERANCE]
        # Fewer groups than this would not shrink.
        if len(members) > basis.shape[1] + own:
            patterns.append(Pattern(members, basis))
            loose[members] = False
    return tuple(patterns), np.flatnonzero(loose)


def pseudo_groups(patterns: Sequence[Pattern], loose: np.ndarray, own: int) -> int:
    """Return the number of pseudo-groups, padded so that similar designs share compiled code."""
    return _bucket(sum(basis.shape[1] + own for _, basis in patterns) + len(loose))


def pattern_arrays(
    U: np.ndarray, patterns: Sequence[Pattern], loose: np.ndarray, own: int, m: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return what a :class:`SharedProblem` has by pattern.

    Args:
        U: triangular factors of all groups, (q, q, groups).
        patterns: the merged groups.
        loose: groups that stand for themselves.
        own: numbers of a group that each lane has of its own.
        m: number of pseudo-groups, padding included.

    Returns:
        ``U`` and ``weight`` of the patterns, and the pattern of each pseudo-group.
    """
    q, u = len(U), len(patterns) + len(loose)
    first = np.array([members[0] for members, _ in patterns], dtype=int)
    U_patterns, weight = np.zeros((q, q, _bucket(u))), np.zeros(_bucket(u))
    U_patterns[:, :, :u] = U[:, :, np.append(first, loose)]
    weight[:u] = [*(len(members) for members, _ in patterns), *np.ones(len(loose))]
    counts = [*(basis.shape[1] + own for _, basis in patterns), *[1] * len(loose)]
    pattern = np.zeros(m, dtype=np.int32)
    pattern[: sum(counts)] = np.repeat(np.arange(u), counts)
    return U_patterns, weight, pattern


def _bucket(count: int) -> int:
    """Round a number of pseudo-groups up, so that similar designs share compiled code."""
    return 1 << (count - 1).bit_length() if count <= SMALLEST_BUCKET else bucket(count)


def with_responses(shared: SharedDesigns, responses: Responses) -> GroupedProblem:
    """Return a problem whose ``Y`` and ``C`` have a leading axis of responses."""
    n, p, problem = len(responses.C), shared.n_fixed, shared.problem
    Y = np.repeat(problem.Y[None], n, axis=0)
    Y[:, :, -1] = responses.Y
    C = np.repeat(problem.C[None], n, axis=0)
    C[:, -1, :p] = C[:, :p, -1] = responses.C[:, :p]
    C[:, -1, -1] = responses.C[:, p]
    return replace(problem, Y=Y, C=C)


def lanes_of(shared: SharedDesigns, responses: Responses) -> tuple[Problem, tuple[str, ...]]:
    """Return a problem with a leading axis of responses, and the names of its fields that have it.

    In the form for lanes that share designs where there is one.
    """
    if shared.by_pattern is None:
        return with_responses(shared, responses), ("Y", "C")
    y, cross = np.ascontiguousarray(responses.Y)[:, None], responses.C[:, None]
    return replace(shared.by_pattern, y=y, cross=cross), ("y", "cross")


def project(shared: SharedDesigns, y: np.ndarray, center: np.ndarray | None = None) -> Responses:
    """Compress responses given by row, their offset removed, (n, nobs).

    Each is centred, at its least-squares fit, or with groups far apart at the fit within them,
    where no center is given (working coefficients, (n, p)), and scaled to residuals of unit length.
    """
    layout, p, weights = shared.layout, shared.n_fixed, shared.layout.weights
    weighted = y if weights is None else y * weights
    origin = center
    if origin is None:
        origin = (weighted @ layout.X)[:, layout.fixed.kept] @ layout.fixed.inverse
    parts, C, total = _projected(shared, y, origin)
    shift, far_apart = within_groups(shared.problem.C[:p, :p], C[:, :p], C[:, p])
    far = np.flatnonzero(far_apart & (center is None))
    if far.size:
        origin[far] += shift[far]
        parts[far], C[far], total[far] = _projected(shared, y[far], origin[far])
    y_scale = np.sqrt(np.where(total > 0.0, total, 1.0))
    C[:, :p] /= y_scale[:, None]
    C[:, p] /= total
    return Responses(merge(shared, parts / y_scale[:, None, None]), C, origin, y_scale)


def _projected(
    shared: SharedDesigns, y: np.ndarray, origin: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the groups' parts, cross-products outside them, and sums of squares around centres.

    Args:
        shared: the designs.
        y: the responses, (n, nobs).
        origin: their centres, as working coefficients, (n, p).

    Returns:
        Last column of each ``Y_i`` (n, q, m), last row of C (n, p + 1), sums of squares (n,).
    """
    layout, p, q, m = shared.layout, shared.n_fixed, *shared.U.shape[1:]
    order, weights, sizes = layout.order, layout.weights, layout.sizes[0]
    starts = np.concatenate([[0], np.cumsum(sizes)[:-1]])
    n = len(y)
    parts = np.empty((n, q, m))
    C = np.zeros((n, p + 1))
    total = np.zeros(n)
    none = np.zeros(p)
    for groups, rows in chunks(starts, sizes, chunk_rows(max(p + 1, q))):
        take = rows if order is None else order[rows]
        X = layout.response(y[0], none, take)[:p]
        data = np.concatenate([X, y[:, take] - origin @ X])
        Q = layout.random_columns(0, take)
        if weights is not None:
            root = np.sqrt(weights[take])
            data *= root
            Q *= root
        total += np.einsum("ni,ni->n", data[p:], data[p:])
        local, count = starts[groups] - rows.start, sizes[groups]
        orthonormalise(Q, local, count)
        parts[:, :, groups] = project_out(Q, data, local, count)[:, p:].transpose(1, 0, 2)
        C[:, :p] += data[p:] @ data[:p].T
        C[:, p] += np.einsum("ni,ni->n", data[p:], data[p:])
    return parts, C, total


def merge(shared: SharedDesigns, parts: np.ndarray) -> np.ndarray:
    """Merge the projected responses of all groups, (n, q, m), to those of the pseudo-groups."""
    return merged(shared.patterns, shared.loose, parts, shared.problem.U.shape[2])


def merged(patterns: Sequence[Pattern], loose: np.ndarray, parts: np.ndarray, m: int) -> np.ndarray:
    """Merge what lanes have of their own of all groups, (n, own, groups), to m pseudo-groups."""
    n, own, _ = parts.shape
    found = np.zeros((n, own, m))
    at = 0
    for members, basis in patterns:
        r = basis.shape[1]
        # One large product, not many small ones.
        here = parts[:, :, as_range(members)].reshape(n * own, len(members))
        inside = here @ basis
        found[:, :, at : at + r] = inside.reshape(n, own, r)
        left = (here - inside @ basis.T).reshape(n, own, len(members))
        squares = np.empty((n, own, own))
        for a in range(own):
            for b in range(a + 1):
                squares[:, a, b] = squares[:, b, a] = np.einsum("nm,nm->n", left[:, a], left[:, b])
        found[:, :, at + r : at + r + own] = _semidefinite_root(squares)
        at += r + own
    found[:, :, at : at + len(loose)] = parts[:, :, loose]
    return found


def _semidefinite_root(A: np.ndarray) -> np.ndarray:
    """Return R with ``A = R R'`` for positive semidefinite matrices, (n, q, q)."""
    values, vectors = np.linalg.eigh(A)
    return np.asarray(vectors * np.sqrt(values.clip(min=0.0))[:, None, :])


@dataclass(frozen=True)
class Sampler:
    """Draws the statistics of responses from a fitted model; see the module's docstring.

    Attributes:
        shared: the designs.
        root: root of ``U D U' + I`` times that of the scale, working coordinates, per pattern and
            then per loose group, (q, q, patterns + loose).
        scale: residual variance, working coordinates.
        origin: the fitted coefficients, (p,).
        y_scale: units of the data per unit of the working response.
    """

    shared: SharedDesigns
    root: np.ndarray
    scale: float
    origin: np.ndarray
    y_scale: float

    def draw(self, rng: np.random.Generator, n: int) -> Responses:
        """Draw n responses."""
        shared, q, p = self.shared, len(self.root), self.shared.n_fixed
        Y = np.zeros((n, q, shared.problem.U.shape[2]))
        at = 0
        for u, (members, basis) in enumerate(shared.patterns):
            r = basis.shape[1]
            standard = np.empty((n, q, r + q))
            standard[:, :, :r] = rng.standard_normal((n, q, r))
            standard[:, :, r:] = _bartlett(rng, n, q, len(members) - r)
            Y[:, :, at : at + r + q] = self.root[:, :, u] @ standard
            at += r + q
        loose = len(shared.loose)
        standard = rng.standard_normal((n, q, loose))
        own = self.root[:, :, len(shared.patterns) :]
        for j in range(q):
            Y[:, :, at : at + loose] += own[:, j] * standard[:, j, None]
        z = rng.standard_normal((n, shared.root_C.shape[1]))
        C = np.empty((n, p + 1))
        C[:, :p] = np.sqrt(self.scale) * (z @ shared.root_C.T)
        df = shared.residual_df
        C[:, p] = np.einsum("ni,ni->n", z, z) + (rng.chisquare(df, n) if df else 0.0)
        C[:, p] *= self.scale
        return Responses(Y, C, np.tile(self.origin, (n, 1)), np.full(n, self.y_scale))


def sampler(fit: Fit, shared: SharedDesigns) -> Sampler:
    """Prepare drawing the statistics of responses from a fitted one-factor model."""
    estimates, problem = fit.estimates, shared.problem
    q = len(estimates.root)
    y_scale = float(problem.y_scale)
    scale = estimates.scale / y_scale**2
    root = estimates.working_root
    which = np.concatenate([[members[0] for members, _ in shared.patterns], shared.loose])
    which = which.astype(np.int64)
    half = np.einsum("ijm,jk->mik", shared.U[:, :, which], root)
    roots = np.sqrt(scale) * np.linalg.cholesky(half @ half.transpose(0, 2, 1) + np.eye(q))
    # A row that a group does not have is zero; in V it is uncorrelated with the others.
    roots = np.moveaxis(roots, 0, -1) * shared.rank[:, None, which]
    return Sampler(shared, roots, scale, fit.layout.fixed.R @ estimates.beta, y_scale)


def _bartlett(rng: np.random.Generator, n: int, q: int, df: int) -> np.ndarray:
    """Draw lower triangular roots of n standard Wishart matrices, (n, q, q); df is at least q."""
    root = np.zeros((n, q, q))
    for i in range(q):
        root[:, i, i] = np.sqrt(rng.chisquare(df - i, n))
        root[:, i, :i] = rng.standard_normal((n, i))
    return root
