"""Models of one grouping factor that differ in columns of X: compressed, and solved side by side.

The model without the changing columns is fitted once.  It lends all others their start, and its
designs, which they share: a changing column is one more vector that the groups' random effects and
the other columns of X project, as a response is (:mod:`lmmax.batch.statistics`).  If there is one
response, that belongs to what is shared, and a lane is its changing columns alone, however many
coefficients and random effects the model has (:mod:`lmmax.likelihood.shared`).

Vectors are freed of the other columns by row before any product is taken, and the changing columns
orthonormalised, as in :mod:`lmmax.batch.scan`.

A model that lacks some rows has, in the groups that they belong to, other groups: the sums over all
groups less those of the groups with all their rows, plus those with the rows that are there.  So
no model needs a design of its own, however many patterns of missing values there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np

from ..compress.grouped import Statistics
from ..compress.rows import CHUNK_WORK, orthonormalise, project_out
from ..constraints import read_constraints
from ..likelihood import Problem
from ..likelihood.shared import Exchanged, SharedProblem, pays, shared_matrix
from . import Solved, start_at, with_inference
from .line_statistics import EXPLAINED
from .pooled import INDEPENDENT
from .small import cholesky, turned
from .solve import Effort, Lanes, solve
from .statistics import Pattern, find_patterns, merged, pattern_arrays, pseudo_groups

if TYPE_CHECKING:
    from ..results import Fit

VARYING = ("x_inverse", "x_logdet", "y_scale", "y", "cross")
"""Fields of the problem in which models differ."""
TILE_BYTES = 1 << 20
"""Most bytes of columns that are compressed together: they stay in the processor's cache."""
LEAST_LANES, MOST_LANES = 16, 256
"""Least and most models that are compressed together."""
MOST_COLUMNS = 8
"""Most changing columns: the time that compiling takes grows with their number."""
FEWEST_EXCHANGED = 8
"""Number of exchanged groups that models have room for at least."""
MOST_GONE = 0.3
"""Share of its rows that a model may lack to be fitted in company."""
LEAST_LEFT = 1e-3
"""Share of what is left of a column after the others that the rows which a model has must hold."""


@dataclass(frozen=True, eq=False)
class ScanDesigns:
    """What models share that differ in columns of X.

    All rows are multiplied by the roots of their weights.

    Attributes:
        fit: the model without the changing columns.
        n_changing: number of changing columns, r.
        with_response: whether the response of that fit is the response of all models.
        problem: the problem, without lanes.
        patterns: groups that are merged.
        loose: positions of the groups that stand for themselves.
        roots: roots of the weights, (n,), or None.
        shared: working columns of the others, then, if it is shared, what these leave of the
            response, (n, w).
        Z: working columns of the random effects, (n, q).
        groups: orthonormal bases of the groups' random-effects columns, sparse, (q m, n).
        outside: what these leave of the w shared columns, (n, w).
    """

    fit: Fit
    n_changing: int
    with_response: bool
    problem: SharedProblem
    patterns: tuple[Pattern, ...]
    loose: np.ndarray
    roots: np.ndarray | None
    shared: np.ndarray
    Z: np.ndarray
    groups: Any
    outside: np.ndarray

    @property
    def tile_lanes(self) -> int:
        """Models whose columns are compressed together."""
        return min(max(TILE_BYTES // (8 * len(self.Z)), LEAST_LANES), MOST_LANES)

    @cached_property
    def X(self) -> np.ndarray:
        """Working columns of the others, (n, p)."""
        return np.ascontiguousarray(self.shared[:, : len(self.fit.layout.fixed.kept)])


def scan_designs(fit: Fit, n_changing: int, with_response: bool) -> ScanDesigns | None:
    """Analyse what models share; None if their form of the likelihood does not pay.

    Args:
        fit: the model without the changing columns.
        n_changing: number of these.
        with_response: whether the response is the same for all models.
    """
    from scipy.sparse import csr_array

    layout, whole, statistics = fit.layout, fit.compression.problem, fit.compression.detail
    assert isinstance(statistics, Statistics)  # the engine is "grouped"
    U, p = statistics.U, len(layout.fixed.kept)
    q, _, m = U.shape
    w = p + with_response
    own = q * (n_changing + (not with_response))
    parts = statistics.Y[:, :w]
    patterns, loose = find_patterns(U, parts, own)
    if not pays(q, w, len(patterns) + len(loose)):
        return None
    n_pseudo = pseudo_groups(patterns, loose, own)
    pattern_U, weight, pattern = pattern_arrays(U, patterns, loose, own, n_pseudo)
    shared = np.zeros((q, w, n_pseudo))
    at = 0
    for members, basis in patterns:
        shared[:, :, at : at + basis.shape[1]] = parts[:, :, members] @ basis
        at += basis.shape[1] + own
    shared[:, :, at : at + len(loose)] = parts[:, :, loose]
    X_pseudo = np.ascontiguousarray(shared.transpose(0, 2, 1))

    beta = np.asarray(whole.beta_origin)[:p] * float(whole.y_scale)
    offset = fit.design.offset
    y = fit.design.y if offset is None else fit.design.y - offset
    data = layout.response(y, beta, slice(None)).T
    data[:, p] /= float(whole.y_scale)
    order, sizes = layout.order, layout.sizes[0]
    take: Any = slice(None) if order is None else order
    Q = np.ascontiguousarray(layout.random_columns(0, take))
    roots = None if layout.weights is None else np.sqrt(layout.weights)
    if roots is not None:
        data *= roots[:, None]
        Q *= roots[take]
    Z = np.empty((len(y), q))
    Z[take] = Q.T
    orthonormalise(Q, np.concatenate([[0], np.cumsum(sizes)[:-1]]), sizes)
    rows = np.arange(len(y)) if order is None else order
    codes = np.repeat(np.arange(m), sizes)
    places = np.concatenate([k * m + codes for k in range(q)]), np.tile(rows, q)
    groups = csr_array((Q.reshape(-1), places), shape=(q * m, len(y)))
    shared_rows = np.ascontiguousarray(data[:, :w])
    outside = shared_rows.copy()
    outside -= groups.T @ (groups @ outside)

    common = {each.name: getattr(whole, each.name) for each in fields(Problem)}
    common |= {
        "n_fixed": float(p + n_changing),
        "x_inverse": np.zeros((0, p + n_changing, p + n_changing)),
        "x_logdet": np.zeros(0),
        "beta_origin": np.zeros(p + n_changing),
        "y_scale": np.zeros(0),
    }
    c = own // q
    last = tuple(range(w, w + n_changing)) + ((p,) if with_response else (w + n_changing,))
    return ScanDesigns(
        fit=fit,
        n_changing=n_changing,
        with_response=with_response,
        problem=SharedProblem(
            **common,
            U=pattern_U,
            weight=weight,
            XX=shared_matrix(X_pseudo, pattern, pattern_U.shape[2]),
            X=X_pseudo,
            pattern=pattern if patterns else None,
            C=outside.T @ outside,
            y=np.zeros((0, c, q, n_pseudo)),
            cross=np.zeros((0, c, w + c)),
            order=(*range(p), *last) if with_response else None,
        ),
        patterns=patterns,
        loose=loose,
        roots=roots,
        shared=shared_rows,
        Z=Z,
        groups=groups,
        outside=outside,
    )


class Columns(NamedTuple):
    """Compressed columns of n lanes; where it matters, of length one after the others of X.

    Attributes:
        y: projected columns, pseudo-groups, (n, c, q, m).
        cross: see :class:`lmmax.likelihood.shared.SharedProblem`, (n, c, w + c).
        x_inverse: from working coefficients to the user's, (n, p + r, p + r).
        x_logdet: logarithm of the determinant of the way back, (n,).
        origin: working coefficients already taken out of the response, units of the data,
            (n, p + r).
        y_scale: units of the data per working unit of the response, (n,).
        total: sum of squares of the working response relative to that of the data, (n,).
        lacking: what rows that models lack change; None if none does.
    """

    y: np.ndarray
    cross: np.ndarray
    x_inverse: np.ndarray
    x_logdet: np.ndarray
    origin: np.ndarray
    y_scale: np.ndarray
    total: np.ndarray
    lacking: Lacking | None


class Lacking(NamedTuple):
    """What tells n models apart that lack some rows; fields of the problem of these names.

    Attributes:
        exchanged: groups without these rows, in place of those with them.
        n_obs: numbers of rows that are left, (n,).
        n_groups: numbers of groups, (n, q).
        log_weights: sums of the logarithms of the weights, (n,).
    """

    exchanged: Exchanged
    n_obs: np.ndarray
    n_groups: np.ndarray
    log_weights: np.ndarray


def compressed(
    designs: ScanDesigns,
    x: list[np.ndarray],
    y: np.ndarray | None,
    gone: np.ndarray | None = None,
) -> tuple[Columns, np.ndarray]:
    """Compress changing columns, and responses, offset removed, if they differ.

    Args:
        designs: what is shared.
        x: the r changing columns, (n, lanes) each.
        y: responses, (n, lanes), unless there is one that the designs have.
        gone: which rows a model lacks, (n, lanes), if any; columns have any finite value there.

    Returns:
        The columns, and which lanes need a closer look: those whose changing columns are nearly
        combinations of others, or explain nearly all, and those that lack much.
    """
    r, p, lanes = len(x), designs.X.shape[1], x[0].shape[1]
    given = x if y is None else [*x, y]
    c = len(given)
    rows, origins, sizes = [], [], []
    for each in given:
        own = np.array(each, dtype=float)
        if designs.roots is not None:
            own *= designs.roots[:, None]
        sizes.append(np.einsum("ij,ij->j", own, own))
        origins.append(_products(designs.X, own))
        _take_out(own, designs.X, origins[-1])
        rows.append(own)
    gram = np.empty((lanes, c, c))
    for a in range(c):
        for b in range(a + 1):
            gram[:, a, b] = gram[:, b, a] = np.einsum("ij,ij->j", rows[a], rows[b])
    left, L = cholesky(gram[:, :r, :r])
    sound = np.all(left > INDEPENDENT**2 * np.stack(sizes[:r], axis=1), axis=1)
    sound &= np.isfinite(gram).all(axis=(1, 2))
    L = np.where(sound[:, None, None], L, np.eye(r))
    turn = np.zeros((lanes, c, c))
    turn[:, :r, :r] = inverse = np.linalg.inv(L)
    origin = np.zeros((lanes, p + r))
    if y is None:
        response = np.ascontiguousarray(designs.shared[:, p])
        slope = np.einsum("njk,kn->nj", inverse, [response @ each for each in rows])
        total_y = response @ response
        sound &= total_y - np.sum(slope**2, axis=1) > EXPLAINED * total_y
        origin[:, :p] = designs.fit.compression.problem.beta_origin[:p]
        origin *= float(designs.fit.compression.problem.y_scale)
        y_scale = np.full(lanes, float(designs.fit.compression.problem.y_scale))
        total = np.full(lanes, designs.fit.compression.total)
    else:
        slope = np.einsum("njk,nk->nj", inverse, gram[:, :r, r])
        rest = gram[:, r, r] - np.sum(slope**2, axis=1)
        sound &= rest > EXPLAINED * gram[:, r, r]
        rest = np.where(sound, rest, 1.0)
        y_scale, total = np.sqrt(rest), rest / np.where(sound, sizes[r], 1.0)
        turn[:, r, :r] = -np.einsum("nj,njk->nk", slope, inverse) / y_scale[:, None]
        turn[:, r, r] = 1.0 / y_scale
        origin[:, :p], origin[:, p:] = origins[r].T, slope
    turn[~sound] = 0.0
    lacking = None
    if gone is not None:
        lacking, enough = _without_rows(designs, rows, turn, gone)
        sound &= enough

    parts, left_rows = [], []
    for each in rows:
        parts.append(designs.groups @ each)
        each -= designs.groups.T @ parts[-1]
        left_rows.append(_products(designs.outside, each))
    inner = np.empty((lanes, c, c))
    for a in range(c):
        for b in range(a + 1):
            inner[:, a, b] = inner[:, b, a] = np.einsum("ij,ij->j", rows[a], rows[b])
    q, m = len(designs.problem.U), designs.problem.X.shape[1]
    own_parts = np.stack(turned(turn, [each.T for each in parts]), axis=1)
    pseudo = merged(
        designs.patterns, designs.loose, own_parts.reshape(lanes, c * q, parts[0].shape[0] // q), m
    )
    with_shared = np.stack(turned(turn, [each.T for each in left_rows]), axis=1)
    among = turn @ inner @ turn.transpose(0, 2, 1)
    among[~sound] = np.eye(c)  # harmless

    R_inverse = designs.fit.layout.fixed.inverse
    x_inverse = np.zeros((lanes, p + r, p + r))
    x_inverse[:, :p, :p] = R_inverse
    x_inverse[:, p:, p:] = inverse.transpose(0, 2, 1)
    others = np.stack(turned(turn[:, :r, :r], [each.T for each in origins[:r]]), axis=1)
    x_inverse[:, :p, p:] = -R_inverse @ others.transpose(0, 2, 1)
    logdet = np.log(np.einsum("njj->nj", L)).sum(axis=1)
    logdet += float(designs.fit.compression.problem.x_logdet)
    found = Columns(
        y=pseudo.reshape(lanes, c, q, m),
        cross=np.concatenate([with_shared, among], axis=2),
        x_inverse=x_inverse,
        x_logdet=logdet,
        origin=origin,
        y_scale=y_scale,
        total=total,
        lacking=lacking,
    )
    return found, ~sound


def _without_rows(
    designs: ScanDesigns, rows: list[np.ndarray], turn: np.ndarray, gone: np.ndarray
) -> tuple[Lacking, np.ndarray]:
    """Return what the rows that lanes lack change, and which lanes have enough left.

    Args:
        designs: what lanes share.
        rows: their c columns, freed of the shared ones, (n, lanes) each.
        turn: the combinations of these that are used, (lanes, c, c).
        gone: which rows a lane lacks, (n, lanes).
    """
    layout = designs.fit.layout
    n, lanes = gone.shape
    q, w, c = designs.Z.shape[1], designs.shared.shape[1], len(rows)
    order = np.arange(n) if layout.order is None else layout.order
    sizes = layout.sizes[0]
    starts = np.cumsum(sizes) - sizes
    lost = np.add.reduceat(gone[order], starts, axis=0, dtype=np.int64)
    lane, group = np.nonzero(lost.T)
    count = sizes[group]
    within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    row = order[np.repeat(starts[group], count) + within]
    pair = np.repeat(np.arange(len(group)), count)
    data = np.empty((w + c, len(row)))
    data[:w] = designs.shared[row].T
    own = [each[row, lane[pair]] for each in rows]
    for a in range(c):
        data[w + a] = sum(turn[lane[pair], a, b] * own[b] for b in range(a + 1))
    left = ~gone[row, lane[pair]]

    def squares(data: np.ndarray, lane: np.ndarray) -> np.ndarray:
        """Return cross-products by lane, (lanes, w + c, w + c)."""
        found = np.zeros((lanes, w + c, w + c))
        if len(lane):
            first = np.flatnonzero(np.diff(lane, prepend=-1))
            each = data.T[:, :, None] * data.T[:, None, :]
            found[lane[first]] = np.add.reduceat(each, first)
        return found

    lacks = squares(data[:, ~left], lane[pair[~left]])
    parts_U, parts_Y, at, signs = [], [], [], []
    C = np.zeros((lanes, w + c, w + c))
    for sign, some in ((-1.0, np.ones_like(left)), (1.0, left)):
        here, of = data[:, some], pair[some]
        first = np.flatnonzero(np.diff(of, prepend=-1))
        sizes_here = np.diff(first, append=len(of))
        Q = np.ascontiguousarray(designs.Z[row[some]].T)
        if len(of):
            parts_U.append(orthonormalise(Q, first, sizes_here))
            parts_Y.append(project_out(Q, here, first, sizes_here))
            C += sign * squares(here, lane[of])
            at.append(lane[of[first]])
            signs.append(np.full(len(first), sign))
    where = np.concatenate(at) if at else np.zeros(0, dtype=np.int64)
    by_lane = np.argsort(where, kind="stable")
    where = where[by_lane]
    number = np.bincount(where, minlength=lanes)
    place = where, np.arange(len(where)) - np.repeat(np.cumsum(number) - number, number)
    most = _exchange_size(int(number.max(initial=0)))
    exchanged = Exchanged(
        np.zeros((lanes, q, q, most)),
        np.zeros((lanes, q, w + c, most)),
        np.zeros((lanes, most)),
        C,
    )
    if len(where):
        U, Y = np.concatenate(parts_U, axis=2), np.concatenate(parts_Y, axis=2)
        exchanged.U[place[0], :, :, place[1]] = U[:, :, by_lane].transpose(2, 0, 1)
        exchanged.Y[place[0], :, :, place[1]] = Y[:, :, by_lane].transpose(2, 0, 1)
        exchanged.sign[place] = np.concatenate(signs)[by_lane]

    n_gone = gone.sum(axis=0)
    n_groups = len(sizes) - np.sum(lost == sizes[:, None], axis=0)
    largest = np.max(sizes[:, None] - lost, axis=0)
    enough = (largest > q) & (n_groups > 1) & (n_gone < MOST_GONE * n)
    # What is left of the columns, the response last.
    p = w - designs.with_response
    response = p if designs.with_response else w + c - 1
    columns = [j for j in range(w + c) if j != response] + [response]
    every = np.tile(np.eye(w + c), (lanes, 1, 1))
    if designs.with_response:
        along = designs.shared[:, p] @ designs.shared[:, p]
        every[:, p, p] = along
        between = [each.T @ designs.shared[:, p] for each in rows]
        every[:, p, w:] = every[:, w:, p] = np.einsum("nab,bn->na", turn, between)
    pivots = cholesky((every - lacks)[:, columns][:, :, columns])[0]
    enough &= np.all(pivots > LEAST_LEFT, axis=1)
    log_weights = np.full(lanes, layout.log_weights)
    if designs.roots is not None:
        log_weights -= 2.0 * np.log(designs.roots) @ gone
    return (
        Lacking(
            exchanged,
            layout.n_obs - n_gone.astype(float),
            np.repeat(n_groups[:, None].astype(float), q, axis=1),
            log_weights,
        ),
        enough,
    )


def _exchange_size(count: int) -> int:
    """Round a number of exchanged groups up, so that compiled code is shared."""
    return max(FEWEST_EXCHANGED, 1 << max(count - 1, 0).bit_length())


def _products(X: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return ``X'rows`` for X (n, p) and rows (n, lanes), in pieces that BLAS does on one core."""
    found = np.zeros((X.shape[1], rows.shape[1]))
    for here in _pieces(X, rows):
        found += X[here].T @ rows[here]
    return found


def _take_out(rows: np.ndarray, X: np.ndarray, coefficients: np.ndarray) -> None:
    """Subtract ``X coefficients`` from rows, in pieces."""
    for here in _pieces(X, rows):
        rows[here] -= X[here] @ coefficients


def _pieces(X: np.ndarray, rows: np.ndarray) -> Iterator[slice]:
    size = max(CHUNK_WORK // max(X.shape[1] * rows.shape[1], 1), 1)
    for first in range(0, len(X), size):
        yield slice(first, first + size)


def joined(parts: list[Columns]) -> Columns:
    """Return the columns of lanes one after the other."""
    if parts[0].lacking is not None:
        most = max(len(part.lacking.exchanged.sign[0]) for part in parts if part.lacking)
        parts = [part._replace(lacking=_widened(part.lacking, most)) for part in parts]
    joined: Columns = jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
    return joined


def _widened(lacking: Lacking | None, most: int) -> Lacking:
    """Return as many exchanged groups as others have; those of sign zero are none."""
    assert lacking is not None
    U, Y, sign, C = lacking.exchanged
    extra = most - sign.shape[1]
    widths = [(0, 0), (0, 0), (0, 0), (0, extra)]
    exchanged = Exchanged(np.pad(U, widths), np.pad(Y, widths), np.pad(sign, widths[2:]), C)
    return lacking._replace(exchanged=exchanged)


def solved(
    designs: ScanDesigns,
    columns: Columns,
    kept: np.ndarray,
    n_columns: int,
    effort: Effort | None = None,
) -> Solved:
    """Fit models, each to its own optimum.

    Args:
        designs: what they share.
        columns: what each has of its own.
        kept: positions of the other columns of X that were kept, then of the changing ones.
        n_columns: number of columns of X.
        effort: counts the work, if given.
    """
    fit = designs.fit
    common = fit.compression.problem
    constraints, _ = read_constraints(common, fit.terms, fit.settings)
    own = {name: getattr(columns, name) for name in VARYING}
    if columns.lacking is not None:
        own |= columns.lacking._asdict()
    unit = (float(common.y_scale) / columns.y_scale) ** 2
    natural = np.asarray(constraints.natural) * unit[:, None, None]
    lanes = Lanes(replace(designs.problem, **own), natural, tuple(own))
    ends = solve(
        lanes, constraints, fit.settings, fit.terms, start_at(fit, constraints, unit), effort
    )
    return with_inference(
        fit,
        lanes,
        constraints,
        ends,
        columns.origin,
        columns.y_scale,
        columns.total,
        (kept, n_columns),
    )
