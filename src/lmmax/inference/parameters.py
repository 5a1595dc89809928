"""The variance parameters of a model: names, values, and the covariances they stand for.

*Natural* parameters of free terms are the variances and covariances of their effects, in which the
covariance of the data is linear.  A term with a structure has its own, standard deviations as
variances: as in SAS, since Kenward and Roger's method depends on the choice.  *Theta* holds
relative Cholesky factors, and the structures' own parameters, as :attr:`lmmax.Fit.theta` does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from ..constraints import TermColumns
from ..estimation import Estimates
from ..parameters import pack_triangle
from ..solve import Structured


@dataclass(frozen=True, eq=False)
class VarianceParameters:
    """The k parameters that were estimated, in the user's units; the scale comes last.

    Attributes:
        names: (k,).
        values: (k,).
        slope: derivatives of (vech Psi row by row, scale), (q (q + 1) / 2 + 1, k).
        bend: its second derivatives, (q (q + 1) / 2 + 1, k, k); zero but for structures.
    """

    names: tuple[str, ...]
    values: np.ndarray
    slope: np.ndarray
    bend: np.ndarray


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
    bends: list[tuple[slice, np.ndarray]] = []
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
            whole = np.zeros((size, len(at)))
            positions = _entries(here)
            whole[positions] = slope
            # What the scale moves at given parameters: nothing, if they are enough for Psi.
            sd = np.asarray(part.covariance.is_sd(term.width))
            scale_slope[positions] = pack_triangle(Psi[here, here]) / scale - slope @ (
                np.where(sd, at, 0.0) / scale
            )
            slopes += list(whole.T)
            full = np.zeros((size, len(at), len(at)))
            full[positions] = bend
            bends.append((slice(first, len(names)), full))
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
    for at_parameters, part_bend in bends:
        bend[:, at_parameters, at_parameters] = part_bend
    return VarianceParameters(tuple(names), np.array(values), np.reshape(slopes, (k, size)).T, bend)


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

    By the chain rule from the structure's own parameters theta, at a fixed scale.
    """
    q, scale = len(effects), estimates.scale
    theta = estimates.structure_theta[slice(*part.parameters)]
    is_sd = np.asarray(part.covariance.is_sd(q))
    rows, columns = np.tril_indices(q)

    def natural(theta: jax.Array) -> jax.Array:
        found = part.covariance.values(theta, q)
        return jnp.where(is_sd, scale * found**2, found)

    def vech(theta: jax.Array) -> jax.Array:
        return scale * part.covariance.matrix(theta, q)[rows, columns]

    with jax.enable_x64(True):
        at = jnp.asarray(theta)
        values, by_theta = np.asarray(natural(at)), np.asarray(jax.jacfwd(natural)(at))
        slope, bend = np.asarray(jax.jacfwd(vech)(at)), np.asarray(jax.hessian(vech)(at))
        natural_bend = np.asarray(jax.hessian(natural)(at))
    back = np.linalg.pinv(by_theta)
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
    rows, columns = np.tril_indices(q)

    def natural(x: jax.Array) -> jax.Array:
        size = x[-1] if estimates.constraints.scale_free else jnp.asarray(scale)
        D = jnp.asarray(estimates.D * held)
        for term, pattern, at in blocks:
            here = term.columns
            if pattern is None:
                block = term.covariance.matrix(x[at], term.width)
            else:
                L = jnp.zeros((term.width, term.width), x.dtype).at[np.nonzero(pattern)].set(x[at])
                block = L @ L.T
            D = D.at[here, here].set(block)
        # Covariances that are fixed are so in natural units.
        Psi = jnp.where(held > 0.0, scale * D, size * D)
        return jnp.append(Psi[rows, columns], size)

    values = np.concatenate([*parts, np.zeros(0)])
    with jax.enable_x64(True):
        at = jnp.asarray(values)
        slope, bend = np.asarray(jax.jacfwd(natural)(at)), np.asarray(jax.hessian(natural)(at))
    return VarianceParameters(tuple(names), values, slope, bend)
