"""The variance parameters of a model: names, values, and the covariances they stand for.

*Natural* parameters of free terms are the variances and covariances of their effects, in which the
covariance of the data is linear.  A term with a structure has its own, standard deviations as
variances: as in SAS, since Kenward and Roger's method depends on the choice.  *Theta* holds
relative Cholesky factors, and the structures' own parameters, as :attr:`lmmax.Fit.theta` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..constraints import TermColumns
from ..covariances import Covariance, bends, matrix_at, slopes, values_at
from ..estimation import Estimates
from ..identifiability import reduced
from ..solve import Structured


@dataclass(frozen=True, eq=False)
class VarianceParameters:
    """The k parameters that were estimated, in the user's units; the scale comes last.

    Attributes:
        names: (k,).
        values: (k,).
        slope: derivatives of (vech Psi row by row, scale), (q (q + 1) / 2 + 1, k).
        bend: its second derivatives, (q (q + 1) / 2 + 1, k, k); zero but for structures.
        identified: whether the data identify the parameter, (k,).
        free: which parameters are enough, (k,): with the others held where they are, all that is
            identified can still take any value.
    """

    names: tuple[str, ...]
    values: np.ndarray
    slope: np.ndarray
    bend: np.ndarray
    identified: np.ndarray
    free: np.ndarray


def natural_parameters(
    estimates: Estimates,
    terms: Sequence[TermColumns],
    effects: Sequence[str],
    groups: Sequence[str],
) -> VarianceParameters:
    """Return the natural parameters of a solved model.

    Args:
        estimates: the solved model.
        terms: the random terms.
        effects: names of the effects, (q,).
        groups: names of the grouping factors.
    """
    q, scale = len(estimates.root), estimates.scale
    Psi = scale * estimates.D
    size = q * (q + 1) // 2 + 1
    own = {part.columns: part for part in estimates.constraints.structures}
    held = estimates.constraints.held
    names: list[str] = []
    values: list[float] = []
    slopes: list[np.ndarray] = []
    bends: list[tuple[np.ndarray, np.ndarray]] = []
    scale_slope = np.zeros(size)
    scale_slope[-1] = 1.0
    for term in terms:
        here, group = term.columns, groups[term.factor]
        if held[here.start, here.start] > 0.0:
            continue
        part = own.get((here.start, here.stop))
        if part is not None:
            labels, at, slope, bend = _structure(part, estimates, effects[here])
            first = len(names)
            names += [f"{group}: {label}" for label in labels]
            values += at.tolist()
            whole, full = np.zeros((size, len(at) + 1)), np.zeros((size, len(at) + 1, len(at) + 1))
            positions = _entries(here)
            whole[positions], full[positions] = slope, bend
            # What the scale moves at given parameters: nothing, if they are enough for Psi.
            scale_slope[positions] = slope[:, -1]
            slopes += list(whole.T[:-1])
            bends.append((np.append(np.arange(first, len(names)), -1), full))
            continue
        pattern = np.tril(np.ones((1, 1)) if term.pattern is None else term.pattern)
        for i, j in zip(*np.nonzero(pattern), strict=True):
            row, column = here.start + int(i), here.start + int(j)
            kind = f"var({effects[row]})" if i == j else f"cov({effects[column]}, {effects[row]})"
            names.append(f"{group}: {kind}")
            values.append(float(Psi[row, column]))
            E = np.zeros(size)
            E[row * (row + 1) // 2 + column] = 1.0
            slopes.append(E)
    if estimates.constraints.scale_free:
        names.append("scale")
        values.append(scale)
        slopes.append(scale_slope)
    k = len(names)
    bend = np.zeros((size, k, k))
    for moved, part_bend in bends:
        if not estimates.constraints.scale_free:
            moved, part_bend = moved[:-1], part_bend[:, :-1, :-1]
        bend[:, moved[:, None], moved] += part_bend
    slope = np.reshape(slopes, (k, size)).T
    return VarianceParameters(
        tuple(names), np.array(values), slope, bend, *_identified(estimates, slope)
    )


def _identified(estimates: Estimates, slope: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return which parameters with this slope are identified, and which are enough, (k,) each."""
    k = slope.shape[1]
    identified, free = np.ones(k, dtype=bool), np.ones(k, dtype=bool)
    null = estimates.flat_in_user_units[: len(slope)]
    if null.size:
        scaled = estimates.sizes[: len(slope), None] * slope
        unit = np.linalg.norm(scaled, axis=0)
        unit = np.where(unit > 0.0, unit, 1.0)
        moved = estimates.sizes[: len(slope), None] * null
        moved /= np.linalg.norm(moved, axis=0)
        flat = np.linalg.lstsq(scaled / unit, moved, rcond=1e-12)[0]
        identified = (reduced(flat.T) == 0.0).all(axis=0)
        # At a boundary of a structure a direction may lead out of it.
        inside = np.linalg.norm(scaled / unit @ flat - moved, axis=0) < 1e-6
        if inside.any():
            free[np.argmax(np.abs(reduced(flat[:, inside].T)), axis=1)] = False
    return identified, free


def _entries(here: slice) -> list[int]:
    """Return the positions in the triangle of D of that of one of its diagonal blocks."""
    return [
        row * (row + 1) // 2 + column
        for row in range(here.start, here.stop)
        for column in range(here.start, row + 1)
    ]


def _structure(
    part: Structured, estimates: Estimates, effects: Sequence[str]
) -> tuple[list[str], np.ndarray, np.ndarray, np.ndarray]:
    """Return names, values, and two derivatives of vech Psi for a term with a structure.

    By the chain rule from the structure's own parameters theta and the scale, which is the last in
    the derivatives.
    """
    q = len(effects)
    theta = estimates.structure_theta[slice(*part.parameters)]
    is_sd = np.asarray(part.covariance.is_sd(q), dtype=bool)
    scale, structure = estimates.scale, part.covariance

    # vech Psi = scale vech D(theta)
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
    back = np.linalg.pinv(by_x)
    slope = slope @ back
    bend = bend - np.tensordot(slope, natural_bend, 1)
    bend = np.einsum("cij,ia,jb->cab", bend, back, back)
    labels = [
        label.replace("sd", "var", 1) if sd else label
        for label, sd in zip(part.covariance.labels(tuple(effects)), is_sd, strict=True)
    ]
    return labels, values, slope, bend


def theta_parameters(
    estimates: Estimates,
    terms: Sequence[TermColumns],
    effects: Sequence[str],
    groups: Sequence[str],
) -> VarianceParameters:
    """Return theta and the scale as parameters; arguments as in :func:`natural_parameters`."""
    q, scale = len(estimates.root), estimates.scale
    own = {part.columns: part for part in estimates.constraints.structures}
    held = estimates.constraints.held
    names: list[str] = []
    parts: list[np.ndarray] = []
    blocks: list[tuple[TermColumns, np.ndarray | None, slice]] = []
    for term in terms:
        here = term.columns
        if held[here.start, here.start] > 0.0:
            continue
        part = own.get((here.start, here.stop))
        labels = effects[here]
        if part is not None:
            values, pattern = estimates.structure_theta[slice(*part.parameters)], None
            named = part.covariance.labels(tuple(labels))
        else:
            pattern = np.tril(np.ones((1, 1)) if term.pattern is None else term.pattern)
            values = estimates.lower[here, here][pattern > 0.0]
            named = tuple(
                labels[i] if i == j else f"{labels[j]}, {labels[i]}"
                for i, j in zip(*np.nonzero(pattern), strict=True)
            )
        blocks.append((term, pattern, slice(len(names), len(names) + len(values))))
        names += [f"{groups[term.factor]}: theta({label})" for label in named]
        parts.append(values)
    if estimates.constraints.scale_free:
        names.append("scale")
        parts.append(np.array([scale]))

    values = np.concatenate([*parts, np.zeros(0)])
    size, k = q * (q + 1) // 2 + 1, len(values)
    slope, bend = np.zeros((size, k)), np.zeros((size, k, k))
    for term, pattern, at in blocks:
        # Covariances that are fixed are so in natural units; all others grow with the scale.
        if pattern is None:
            D, D_slope, D_bend = _triangle(term.covariance, values[at], term.width)
        else:
            D, D_slope, D_bend = _factored(values[at], pattern)
        positions = np.array(_entries(term.columns))
        slope[positions, at] = scale * D_slope
        bend[positions, at, at] = scale * D_bend
        if estimates.constraints.scale_free:
            slope[positions, -1] = D
            bend[positions, at, -1] = bend[positions, -1, at] = D_slope
    if estimates.constraints.scale_free:
        slope[-1, -1] = 1.0
    return VarianceParameters(tuple(names), values, slope, bend, *_identified(estimates, slope))


def _triangle(
    structure: Covariance, theta: np.ndarray, q: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return vech D of a structure at theta (k,), with its derivatives (., k) and (., k, k)."""
    lower = np.tril_indices(q)
    return (
        matrix_at(structure, theta, q)[lower],
        slopes(structure, theta, q)[lower],
        bends(structure, theta, q)[lower],
    )


def _factored(
    entries: np.ndarray, pattern: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return vech L L' likewise, for the k free entries of a lower triangular L."""
    q, k = len(pattern), len(entries)
    rows, columns = np.nonzero(pattern)
    lower = np.tril_indices(q)
    L, E = np.zeros((q, q)), np.zeros((k, q, q))
    L[rows, columns] = entries
    E[np.arange(k), rows, columns] = 1.0
    half = E @ L.T
    place = np.zeros((q, q), dtype=int)
    place[lower] = np.arange(len(lower[0]))
    place = np.maximum(place, place.T)
    # D_ij is the sum of products of entries in a column.
    a, b = np.nonzero(columns[:, None] == columns)
    bend = np.zeros((len(lower[0]), k, k))
    bend[place[rows[a], rows[b]], a, b] = np.where(a == b, 2.0, 1.0)
    return (L @ L.T)[lower], (half + half.swapaxes(1, 2))[:, lower[0], lower[1]].T, bend


def _bordered(bend: np.ndarray, cross: np.ndarray) -> np.ndarray:
    """Append a parameter in which functions are linear to their second derivatives.

    Args:
        bend: second derivatives, (., k, k).
        cross: their derivatives in the k parameters and that one, (., k).
    """
    out = np.pad(bend, ((0, 0), (0, 1), (0, 1)))
    out[:, :-1, -1] = out[:, -1, :-1] = cross
    return out
