"""The variance parameters of a model: names, values, and the covariances they stand for.

*Natural* parameters of free terms are the variances and covariances of their effects, in which the
covariance of the data is linear.  A term with a structure has its own, standard deviations as
variances: as in SAS, since Kenward and Roger's method depends on the choice.  *Theta* holds
relative Cholesky factors, and the structures' own parameters, as :attr:`lmmax.Fit.theta` does.

What is inverted, and whether a direction counts as known, must not depend on the units and origins
that a user chose.  *Steady* coordinates are linear in the parameters and take both away: of free
terms they are entries of the covariance relative to itself with the sampling noise of one group
added, for effects whose columns are orthonormal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..constraints import TermColumns
from ..covariances import Covariance, Function, bends, known_by_values, matrix_at, slopes, values_at
from ..estimation import Estimates
from ..solve import Structured

SINGULAR = 1e-8
"""Slopes that are smaller than this, or dependent but for this, relative to others are zero."""


class Steady(NamedTuple):
    """The k parameters in steady coordinates; see the module.

    Attributes:
        slope: derivatives of (vech of the working Psi row by row, scale), (q (q + 1) / 2 + 1, k).
        bend: the parameters' second derivatives, with these directions in the place of theirs,
            (q (q + 1) / 2 + 1, k, k); NaN where they do not exist.
        forward: derivatives of the coordinates in the parameters, (k, k).
        back: those of the parameters in the coordinates, (k, k).
    """

    slope: np.ndarray
    bend: np.ndarray
    forward: np.ndarray
    back: np.ndarray


@dataclass(frozen=True, eq=False)
class VarianceParameters:
    """The k parameters that were estimated, in the user's units; the scale comes last.

    Attributes:
        names: (k,).
        values: (k,).
        slope: derivatives of (vech Psi row by row, scale), (q (q + 1) / 2 + 1, k).
        bend: its second derivatives, (q (q + 1) / 2 + 1, k, k); zero but for structures.
        steady: the same in coordinates to compute with.
    """

    names: tuple[str, ...]
    values: np.ndarray
    slope: np.ndarray
    bend: np.ndarray
    steady: Steady


def apart(names: Sequence[str], taken: Sequence[str], terms: Sequence[str] = ()) -> list[str]:
    """Return names that tell all parameters apart; those that do already stay as they are.

    Two terms of a factor may have parameters of one name, and then bear the term's; a coefficient
    may be called like a variance parameter, which then says what it belongs to.

    Args:
        names: of the variance parameters, ``"group: what"``, the residual's ``"sigma"`` or "scale".
        taken: those of the coefficients.
        terms: the random term of each of the names; the residual's may be missing.
    """
    own = list(names)
    for i, term in enumerate(terms):
        if names.count(names[i]) > 1:
            own[i] = f"{term}: {names[i].split(': ', 1)[1]}"
    used = set(taken)
    for i, name in enumerate(own):
        while own[i] in used:
            own[i] += " (random)" if ": " in name else " (residual)"
        used.add(own[i])
    return own


def natural_parameters(
    estimates: Estimates,
    terms: Sequence[TermColumns],
    effects: Sequence[str],
    groups: Sequence[str],
    coefficients: Sequence[str] = (),
) -> VarianceParameters:
    """Return the natural parameters of a solved model.

    Args:
        estimates: the solved model.
        terms: the random terms.
        effects: names of the effects, (q,).
        groups: names of the grouping factors.
        coefficients: names of the coefficients, which no parameter must have.
    """
    Psi = estimates.scale * estimates.D
    own = {part.columns: part for part in estimates.constraints.structures}
    parts: list[_Part] = []
    owners: list[str] = []
    for term in terms:
        here, group = term.columns, groups[term.factor]
        if estimates.constraints.held[here.start, here.start] > 0.0:
            continue
        structure = own.get((here.start, here.stop))
        labels = effects[here]
        if structure is not None:
            found = _structure(structure, estimates, labels)
        else:
            found = _free(estimates, term, Psi[here, here], labels)
        parts.append(found._replace(names=[f"{group}: {name}" for name in found.names]))
        owners += [term.label] * len(found.names)
    return _together(estimates, parts, owners, coefficients)


class _Part(NamedTuple):
    """The parameters of one term, by its own columns; of q_t effects c entries of the triangle.

    Attributes:
        columns: of D.
        names: (k,).
        values: (k,).
        slope: of vech Psi in the parameters, (c, k).
        bend: (c, k, k).
        by_scale: slope in the scale at given parameters, (c,).
        cross: its derivatives in the parameters, (c, k).
        twice: its derivative in the scale, (c,).
        steady_slope: of the working vech Psi in steady coordinates, (c, k).
        steady_bend: (c, k, k).
        forward: (k, k).
        back: (k, k).
    """

    columns: slice
    names: list[str]
    values: np.ndarray
    slope: np.ndarray
    bend: np.ndarray
    by_scale: np.ndarray
    cross: np.ndarray
    twice: np.ndarray
    steady_slope: np.ndarray
    steady_bend: np.ndarray
    forward: np.ndarray
    back: np.ndarray


def _together(
    estimates: Estimates,
    parts: Sequence[_Part],
    owners: Sequence[str],
    coefficients: Sequence[str],
) -> VarianceParameters:
    """Put the parameters of all terms side by side, and the scale behind them.

    Args:
        estimates: the solved model.
        parts: the parameters, term by term.
        owners: the term that each of them belongs to.
        coefficients: names that are taken.
    """
    q, scale = len(estimates.root), estimates.scale
    free = estimates.constraints.scale_free
    size = q * (q + 1) // 2 + 1
    names = [name for part in parts for name in part.names] + ["scale"] * free
    values = np.concatenate([*(part.values for part in parts), [scale] * free])
    k = len(values)
    slope, steady_slope = np.zeros((size, k)), np.zeros((size, k))
    bend, steady_bend = np.zeros((size, k, k)), np.zeros((size, k, k))
    forward, back = np.zeros((k, k)), np.zeros((k, k))
    if free:
        # In units of itself, as the entries of free terms are.
        slope[-1, -1], steady_slope[-1, -1] = 1.0, scale
        forward[-1, -1], back[-1, -1] = 1.0 / scale, scale
    first = 0
    for part in parts:
        at = slice(first, first + len(part.values))
        first = at.stop
        here = np.array(_entries(part.columns))
        A = np.linalg.inv(estimates.z_inverse[part.columns, part.columns])
        slope[here, at], steady_slope[here, at] = part.slope, part.steady_slope
        bend[here, at, at], steady_bend[here, at, at] = part.bend, part.steady_bend
        forward[at, at], back[at, at] = part.forward, part.back
        if free:
            slope[here, -1], steady_slope[here, -1] = (
                part.by_scale,
                scale * _congruent(A, part.by_scale),
            )
            bend[here, at, -1] = bend[here, -1, at] = part.cross
            turned = scale * _congruent(A, part.cross @ part.back)
            steady_bend[here, at, -1] = steady_bend[here, -1, at] = turned
            bend[here, -1, -1] = part.twice
            steady_bend[here, -1, -1] = scale * (scale * _congruent(A, part.twice))
    return VarianceParameters(
        tuple(apart(names, coefficients, owners)),
        values,
        slope,
        bend,
        Steady(steady_slope, steady_bend, forward, back),
    )


def _congruent(A: np.ndarray, packed: np.ndarray) -> np.ndarray:
    """Return the triangles of ``A S A'`` for those of symmetric S along the first axis."""
    q = len(A)
    rows, columns = np.tril_indices(q)
    place = np.zeros((q, q), dtype=int)
    place[rows, columns] = place[columns, rows] = np.arange(len(rows))
    moved = A @ (A @ packed[place].reshape(q, -1)).reshape(q, q, -1)
    return np.asarray(moved[rows, columns].reshape(packed.shape))


def _base(estimates: Estimates, term: TermColumns) -> tuple[np.ndarray, np.ndarray]:
    """Return the base B of a free term's steady coordinates, and ``B^-1 A``, (q_t, q_t) each.

    ``B B'`` is the working covariance relative to the scale plus the sampling noise of one group,
    in each set of effects that may be correlated.
    """
    here = term.columns
    root, noise = estimates.working_root[here], estimates.noise[here]
    B = np.zeros((term.width, term.width))
    for block in term.sets:
        # By orthogonal rotations of the root beside that of the noise, no digits are lost.
        both = np.concatenate([root[block], np.diag(noise[block])], axis=1)
        B[np.ix_(block, block)] = np.asarray(np.linalg.qr(both.T, mode="r")).T
    A = np.linalg.inv(estimates.z_inverse[here, here])
    return B, np.linalg.solve(B, A)


def _free(
    estimates: Estimates, term: TermColumns, Psi: np.ndarray, effects: Sequence[str]
) -> _Part:
    """Return the variances and covariances of a term whose entries are free, or zero."""
    scale, q = estimates.scale, term.width
    pattern = np.tril(np.ones((1, 1)) if term.pattern is None else term.pattern)
    rows, columns = np.nonzero(pattern)
    k = len(rows)
    names = [
        f"var({effects[i]})" if i == j else f"cov({effects[j]}, {effects[i]})"
        for i, j in zip(rows.tolist(), columns.tolist(), strict=True)
    ]
    E = np.zeros((q, q, k))
    E[rows, columns, np.arange(k)] = E[columns, rows, np.arange(k)] = 1.0
    lower = np.tril_indices(q)
    slope = E[lower]
    B, to_base = _base(estimates, term)
    from_base = np.linalg.solve(to_base, np.eye(q))
    free = np.flatnonzero(pattern[lower])
    nothing = np.zeros(len(slope))
    return _Part(
        term.columns,
        names,
        Psi[rows, columns],
        slope,
        np.zeros((len(slope), k, k)),
        nothing,
        np.zeros_like(slope),
        nothing,
        scale * _congruent(B, slope),
        np.zeros((len(slope), k, k)),
        _congruent(to_base, slope)[free] / scale,
        _congruent(from_base, slope)[free] * scale,
    )


def _entries(here: slice) -> list[int]:
    """Return the positions in the triangle of D of that of one of its diagonal blocks."""
    return [
        row * (row + 1) // 2 + column
        for row in range(here.start, here.stop)
        for column in range(here.start, row + 1)
    ]


def _structure(part: Structured, estimates: Estimates, effects: Sequence[str]) -> _Part:
    """Return the natural parameters of a term with a structure."""
    q = len(effects)
    theta = estimates.structure_theta[slice(*part.parameters)]
    is_sd = np.asarray(part.covariance.is_sd(q), dtype=bool)
    labels = [
        label.replace("sd", "var", 1) if sd else label
        for label, sd in zip(part.covariance.labels(tuple(effects)), is_sd, strict=True)
    ]
    columns = slice(*part.columns)
    if known_by_values(part.covariance):
        return _by_values(part.covariance, estimates, columns, labels, theta, is_sd)
    return _by_theta(part.covariance, estimates, columns, labels, theta, is_sd)


def _by_values(
    structure: Covariance,
    estimates: Estimates,
    columns: slice,
    labels: list[str],
    theta: np.ndarray,
    is_sd: np.ndarray,
) -> _Part:
    """Return the parameters of a structure that tells its covariance by its values.

    Where they do not exist, neither in the limit, parameters stay as they are: standard deviations
    of zero whose covariances grow faster than their variances, correlations with such effects.
    """
    q, k = columns.stop - columns.start, len(theta)
    scale = estimates.scale
    v = np.where(is_sd, np.sqrt(scale), 1.0) * values_at(structure, theta, q)
    values = np.where(is_sd, v**2, v)
    by_variance = np.count_nonzero(is_sd) == 1
    # A common variance times what is known at variance one; else by standard deviations.
    at = np.where(is_sd & by_variance, 1.0, v)
    D, D_slope, D_bend = _triangle(structure, at, q, "of_values")
    if by_variance:
        one = int(np.flatnonzero(is_sd)[0])
        variance = values[one]
        slope, bend = variance * D_slope, variance * D_bend
        slope[:, one], bend[:, one], bend[:, :, one] = D, D_slope, D_slope
        bend[:, one, one] = 0.0
        forward = np.ones(k)
        held = np.full(k, variance == 0.0 and k > 1)
    else:
        slope, bend = D_slope, D_bend
        held = is_sd & (v == 0.0)
        # Second derivatives in the variance v^2, times (2 v)^2.
        each = np.flatnonzero(is_sd & ~held)
        bend[:, each, each] -= slope[:, each] / v[each]
        forward = np.divide(0.5, v, out=np.ones(k), where=is_sd & ~held)
    # What moves nothing has no value, and no derivatives.
    held |= ~np.any(slope, axis=0)
    values = np.where(held & ~is_sd, np.nan, values)
    slope[:, held] = bend[:, held] = bend[:, :, held] = 0.0
    A = np.linalg.inv(estimates.z_inverse[columns, columns])
    return _Part(
        columns,
        labels,
        values,
        slope * forward,
        bend * np.outer(forward, forward),
        np.zeros(len(slope)),
        np.zeros((len(slope), k)),
        np.zeros(len(slope)),
        _congruent(A, slope),
        _congruent(A, bend),
        np.diag(forward),
        np.diag(1.0 / forward),
    )


def _by_theta(
    structure: Covariance,
    estimates: Estimates,
    columns: slice,
    labels: list[str],
    theta: np.ndarray,
    is_sd: np.ndarray,
) -> _Part:
    """Return the same by the chain rule from the structure's own parameters theta and the scale."""
    q = columns.stop - columns.start
    scale = estimates.scale

    # vech Psi = scale vech D(theta), the scale last
    D, D_slope, D_bend = _triangle(structure, theta, q)
    slope = np.column_stack([scale * D_slope, D])
    bend = _bordered(scale * D_bend, D_slope)

    # A standard deviation v stands for the variance scale v^2, another value for itself.
    v, v_slope, v_bend = (
        values_at(structure, theta, q),
        slopes(structure, theta, q, of="values"),
        bends(structure, theta, q, of="values"),
    )
    # A correlation that is not defined has no slope.
    undefined = np.isnan(v)
    v, v_slope, v_bend = (
        np.where(undefined.reshape(-1, *[1] * (part_.ndim - 1)), 0.0, part_)
        for part_ in (v, v_slope, v_bend)
    )
    k = len(v)
    by_v, by_v_twice = np.where(is_sd, [2.0 * scale * v, np.full(k, 2.0 * scale)], [[1.0], [0.0]])
    values = np.where(is_sd, scale * v**2, v)
    by_x = np.eye(k + 1)
    by_x[:k, :k] = by_v[:, None] * v_slope
    by_x[:k, k] = np.where(is_sd, v**2, 0.0)
    natural_bend = np.zeros((k + 1, k + 1, k + 1))
    natural_bend[:k] = _bordered(
        by_v[:, None, None] * v_bend
        + by_v_twice[:, None, None] * v_slope[:, :, None] * v_slope[:, None, :],
        np.where(is_sd, 2.0 * v, 0.0)[:, None] * v_slope,
    )
    unit = np.max(np.abs(by_x), axis=1, initial=np.finfo(float).tiny)
    regular = np.linalg.matrix_rank(by_x / unit[:, None], tol=SINGULAR) == k + 1
    back = np.linalg.pinv(by_x / unit[:, None], rcond=SINGULAR) / unit
    slope = slope @ back
    bend = bend - np.tensordot(slope, natural_bend, 1)
    bend = np.einsum("cij,ia,jb->cab", bend, back, back)
    if not regular:
        bend = np.full_like(bend, np.nan)
    A = np.linalg.inv(estimates.z_inverse[columns, columns])
    own = slice(0, k)
    return _Part(
        columns,
        labels,
        values,
        slope[:, own],
        bend[:, own, own],
        slope[:, -1],
        bend[:, own, -1],
        bend[:, -1, -1],
        _congruent(A, slope[:, own]),
        _congruent(A, bend[:, own, own]),
        np.eye(k),
        np.eye(k),
    )


def theta_parameters(
    estimates: Estimates,
    terms: Sequence[TermColumns],
    effects: Sequence[str],
    groups: Sequence[str],
    coefficients: Sequence[str] = (),
) -> VarianceParameters:
    """Return theta and the scale as parameters; arguments as in :func:`natural_parameters`."""
    own = {part.columns: part for part in estimates.constraints.structures}
    parts: list[_Part] = []
    owners: list[str] = []
    for term in terms:
        here, group = term.columns, groups[term.factor]
        if estimates.constraints.held[here.start, here.start] > 0.0:
            continue
        part = own.get((here.start, here.stop))
        labels = effects[here]
        if part is not None:
            theta = estimates.structure_theta[slice(*part.parameters)]
            named = list(part.covariance.labels(tuple(labels)))
            found = _of_theta(estimates, here, part.covariance, theta)
        else:
            pattern = np.tril(np.ones((1, 1)) if term.pattern is None else term.pattern)
            named = [
                labels[i] if i == j else f"{labels[j]}, {labels[i]}"
                for i, j in zip(*np.nonzero(pattern), strict=True)
            ]
            found = _of_factor(estimates, term, pattern)
        parts.append(found._replace(names=[f"{group}: theta({name})" for name in named]))
        owners += [term.label] * len(named)
    return _together(estimates, parts, owners, coefficients)


def _of_theta(
    estimates: Estimates, columns: slice, structure: Covariance, theta: np.ndarray
) -> _Part:
    """Return the parameters of a structure, which are their own steady coordinates."""
    scale, q, k = estimates.scale, columns.stop - columns.start, len(theta)
    D, D_slope, D_bend = _triangle(structure, theta, q)
    A = np.linalg.inv(estimates.z_inverse[columns, columns])
    return _Part(
        columns,
        [],
        theta,
        scale * D_slope,
        scale * D_bend,
        D,
        D_slope,
        np.zeros(len(D)),
        scale * _congruent(A, D_slope),
        scale * _congruent(A, D_bend),
        np.eye(k),
        np.eye(k),
    )


def _of_factor(estimates: Estimates, term: TermColumns, pattern: np.ndarray) -> _Part:
    """Return the entries of a free term's relative factor.

    In steady coordinates each column of the factor is one of ``B^-1 A L``, in orthonormal
    directions of the space that its free entries span.
    """
    scale, here = estimates.scale, term.columns
    rows, columns = np.nonzero(pattern)
    k, q = len(rows), term.width
    L = estimates.lower[here, here]
    B, to_base = _base(estimates, term)
    E, F = np.zeros((k, q, q)), np.zeros((k, q, q))
    E[np.arange(k), rows, columns] = 1.0
    forward, back = np.zeros((k, k)), np.zeros((k, k))
    for j in range(q):
        own = np.flatnonzero(columns == j)
        Q, R = np.linalg.qr(to_base[:, rows[own]])
        F[own, :, j] = Q.T
        forward[np.ix_(own, own)] = R
        back[np.ix_(own, own)] = np.linalg.solve(R, np.eye(len(own)))
    D, D_slope, D_bend = _factored(L, E)
    _, base_slope, base_bend = _factored(to_base @ L, F)
    # An entry of zero, of a singular covariance, moves nothing, but for rounding.
    moves = np.linalg.norm(base_slope, axis=0)
    base_slope[:, moves <= SINGULAR * np.max(moves)] = 0.0
    return _Part(
        here,
        [],
        L[rows, columns],
        scale * D_slope,
        scale * D_bend,
        D,
        D_slope,
        np.zeros(len(D)),
        scale * _congruent(B, base_slope),
        scale * _congruent(B, base_bend),
        forward,
        back,
    )


def _triangle(
    structure: Covariance, at: np.ndarray, q: int, of: Function = "matrix"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return vech D of a structure at its arguments (k,), with derivatives (., k), (., k, k)."""
    lower = np.tril_indices(q)
    return (
        matrix_at(structure, at, q, of)[lower],
        slopes(structure, at, q, of)[lower],
        bends(structure, at, q, of)[lower],
    )


def _factored(L: np.ndarray, E: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return vech L L' likewise, for L (q, q) that moves along the directions E (k, q, q)."""
    lower = np.tril_indices(len(L))
    half = E @ L.T
    products = np.einsum("kia,lja->ijkl", E, E, optimize=True)
    bend = products + products.swapaxes(0, 1)
    return (
        (L @ L.T)[lower],
        (half + half.swapaxes(1, 2))[:, lower[0], lower[1]].T,
        bend[lower],
    )


def _bordered(bend: np.ndarray, cross: np.ndarray) -> np.ndarray:
    """Append a parameter in which functions are linear to their second derivatives.

    Args:
        bend: second derivatives, (., k, k).
        cross: their derivatives in the k parameters and that one, (., k).
    """
    out = np.pad(bend, ((0, 0), (0, 1), (0, 1)))
    out[:, :-1, -1] = out[:, -1, :-1] = cross
    return out
