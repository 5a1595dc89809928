"""Conditional modes of the random effects and their covariance, factor by factor.

One factor: with ``G_i = U_i Lambda`` and ``r_i = Y_i [-beta; 1]``, per group::

    b_i = Lambda (I + G_i' G_i)^-1 G_i' r_i
    cov(b_i | y) = scale Lambda (I + G_i' G_i)^-1 Lambda'

which never inverts Lambda, so singular covariances are as good as any.  Nested factors: from the
coarsest level down, each given those above it.  Crossed factors: the solver's last evaluation holds
both; the iterative engine finds the modes only.  NumPy: it runs once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from .compilation import Compiled, computing
from .compilation_cache import compilation_cache
from .compress import Compression, Layout
from .compress.crossed import Skeleton
from .compress.grouped import Statistics
from .compress.iterative import Rows
from .compress.nested import Tree
from .estimation import Estimates
from .likelihood import crossed
from .likelihood.nested import NestedProblem

FAR_APART = 1e6
"""Size of the groups' effects, relative to the residual, above which their squares lose digits."""


class Effects(NamedTuple):
    """Conditional effects of one grouping factor, in the user's units.

    Attributes:
        modes: (m, q).
        covariance: given the data and the coefficients, (m, q, q); None where it was not found.
    """

    modes: np.ndarray
    covariance: np.ndarray | None


def joint_covariance(gram: np.ndarray, root: np.ndarray) -> np.ndarray:
    """Return the covariance of effects given the data and coefficients, relative to the scale.

    Args:
        gram: ``M'M`` of the design M of the effects, (q, q).
        root: root of their relative covariance, (q, q); it may be singular.
    """
    inner = np.eye(len(root)) + root.T @ gram @ root
    return np.asarray(root @ np.linalg.solve(inner, root.T))


def conditional_effects(
    compression: Compression, layout: Layout, estimates: Estimates
) -> tuple[Effects, ...]:
    """Return the conditional effects of each factor, in the layout's order."""
    detail = compression.detail
    found: Mapping[int, tuple[np.ndarray, np.ndarray | None]]
    if isinstance(detail, Statistics):
        found = {0: _grouped(detail, estimates)}
    elif isinstance(detail, Tree):
        found = _nested(compression.problem, detail, layout, estimates)
    else:
        at: Any = estimates.solution.point.at.effects
        unknown = isinstance(detail, Rows)
        if isinstance(detail, Skeleton) and _is_moved(compression.problem, estimates):
            # The last evaluation was a little inside of where the estimates are.
            at = _at_boundary(compression.problem, estimates)
        found = {
            position: (
                np.asarray(modes).T,
                None if unknown else np.moveaxis(np.asarray(covariance), -1, 0),
            )
            for position, (modes, covariance) in zip(
                range(len(at)) if unknown else layout.chain, at, strict=True
            )
        }
    effects = []
    y_scale = float(compression.problem.y_scale)
    for position, here in enumerate(layout.slices):
        to_user = estimates.z_inverse[here, here]
        modes, covariance = found[position]
        m = layout.factors[position].n_groups
        if covariance is not None:
            covariance = estimates.scale * np.einsum(
                "ij,mjk,lk->mil", to_user, covariance[:m], to_user, optimize=True
            )
        effects.append(Effects(modes[:m] @ to_user.T * y_scale, covariance))
    return tuple(effects)


_crossed = Compiled(crossed.conditional_effects)


def _is_moved(problem: crossed.CrossedProblem, estimates: Estimates) -> bool:
    """Return whether the solver evaluated elsewhere than at the estimates.

    That is, at a singular covariance, estimated or fixed so, or one that is nearly so.
    """
    root = estimates.working_root
    for size, here in zip(problem.precision, problem.slices[1:], strict=True):
        values = np.linalg.svd(root[here, here], compute_uv=False) ** 2
        if values[-1] <= crossed.INSIDE / size:
            return True
    return bool(estimates.boundary)


def _at_boundary(
    problem: crossed.CrossedProblem, estimates: Estimates
) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """Return the conditional effects at the estimates themselves, working coordinates."""
    root = estimates.working_root
    with computing(), compilation_cache():
        found = _crossed(problem, root @ root.T, estimates.solution.point.at.beta)
        return tuple((np.asarray(modes), np.asarray(cov)) for modes, cov in found)


def _residual(estimates: Estimates, p: int) -> np.ndarray:
    """Return ``[-beta; 1]`` in working coordinates, (p + 1,)."""
    return np.append(-estimates.solution.point.at.beta[:p], 1.0)


def _grouped(statistics: Statistics, estimates: Estimates) -> tuple[np.ndarray, np.ndarray]:
    r = np.einsum("kxm,x->km", statistics.Y, _residual(estimates, statistics.Y.shape[1] - 1))
    root = estimates.working_root
    G = np.einsum("ijm,jk->mik", statistics.U, root)
    if np.max(np.abs(G), initial=0.0) > FAR_APART:
        u, inverse = _far_apart(G, r.T)
    else:
        gram = np.eye(G.shape[2]) + np.swapaxes(G, 1, 2) @ G
        u = np.linalg.solve(gram, np.einsum("mik,im->mk", G, r)[..., None])[..., 0]
        inverse = np.linalg.inv(gram)
    covariance = np.einsum("ij,mjk,lk->mil", root, inverse, root, optimize=True)
    return u @ root.T, covariance


def _far_apart(G: np.ndarray, r: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return ``(I + G'G)^-1 G'r`` (m, q) and ``(I + G'G)^-1`` (m, q, q) for effects far apart.

    By the singular values of G (m, u, q), whose squares would leave nothing of the identity.
    """
    left, values, right = np.linalg.svd(G, full_matrices=True)
    weights = np.zeros((len(G), G.shape[2]))
    weights[:, : values.shape[1]] = values
    along = np.einsum("miv,mi->mv", left[:, :, : values.shape[1]], r)
    shrunk = values / (1.0 + values**2) * along
    u = np.einsum("mv,mvk->mk", shrunk, right[:, : values.shape[1]])
    kept = 1.0 / (1.0 + weights**2)
    return u, np.einsum("mvk,mv,mvl->mkl", right, kept, right, optimize=True)


def _nested(
    problem: NestedProblem, tree: Tree, layout: Layout, estimates: Estimates
) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Up the tree with cross-products, then down with the effects given those above."""
    roots = [estimates.working_root[here, here] for here in problem.slices]
    sizes = [len(level) for level in tree.levels]
    # Per level (groups first): G, and B = D P for the columns that remain.
    shrunk: list[tuple[np.ndarray, np.ndarray]] = []
    U = np.moveaxis(problem.U, -1, 0)[: sizes[0]]
    Y = np.moveaxis(problem.Y, -1, 0)[: sizes[0]]
    left = U @ roots[0]
    inverse = np.linalg.inv(np.eye(left.shape[2]) + np.swapaxes(left, 1, 2) @ left)
    half = roots[0] @ inverse
    shrunk.append((half @ roots[0].T, half @ np.swapaxes(left, 1, 2) @ Y))
    # Y' H^-1 Y = Y' (Y - U B)
    products = np.swapaxes(Y, 1, 2) @ (Y - U @ shrunk[0][1])
    S = np.moveaxis(problem.C, -1, 0)[: sizes[1]].copy()
    np.add.at(S, tree.parents[0], products)
    for level, root in enumerate(roots[1:], start=1):
        q = len(root)
        a, b, c = S[:, :q, :q], S[:, :q, q:], S[:, q:, q:]
        inverse = np.linalg.inv(np.eye(q) + root.T @ a @ root)
        G = root @ inverse @ root.T
        shrunk.append((G, G @ b))
        rest = c - np.swapaxes(b, 1, 2) @ G @ b
        if level + 1 < len(roots):
            S = np.zeros((sizes[level + 1], *rest.shape[1:]))
            np.add.at(S, tree.parents[level], rest)

    p = int(problem.n_fixed)
    padded = len(problem.beta_origin)
    v = np.zeros(padded + 1)
    v[:p], v[-1] = -estimates.solution.point.at.beta[:p], 1.0
    found = {}
    above = np.zeros((sizes[-1], 0))  # effects of the groups above, coarsest last
    joint = np.zeros((sizes[-1], 0, 0))  # and their covariance
    for level in range(len(roots) - 1, -1, -1):
        G, B = shrunk[level]
        if level < len(roots) - 1:
            above, joint = above[tree.parents[level]], joint[tree.parents[level]]
        r = above.shape[1]
        onto = B[:, :, :r]
        modes = B[:, :, r:] @ v - np.einsum("mij,mj->mi", onto, above)
        cross = -onto @ joint
        covariance = G - cross @ np.swapaxes(onto, 1, 2)
        order = tree.levels[level]
        result = np.empty_like(modes), np.empty_like(covariance)
        result[0][order], result[1][order] = modes, covariance
        found[layout.chain[level]] = result
        above = np.concatenate([modes, above], axis=1)
        joint = np.block([[covariance, cross], [np.swapaxes(cross, 1, 2), joint]])
    return found
