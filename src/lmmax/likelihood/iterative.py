"""The parts of the criterion of crossed factors too large for a dense factor, free of matrices.

``y = X beta + sum_f Z_f b_f + e`` with independent ``b_f ~ N(0, scale I_m ⊗ D_f)`` and
``e ~ N(0, scale I)``.  With ``A = Z'Z`` (sparse: a block for each pair of levels that meet in a
row), ``Λ Λ' = D`` the block diagonal of all levels, and ``H = I + Λ'AΛ``::

    logdet = log|V| = log|H|          S = [X y]'V^-1[X y] = [X y]'[X y] - W'U
    W = Z'[X y]                       U = Λ H^-1 Λ'W        Z'V^-1[X y] = W - A U

The factor with the most effects, the *head*, is eliminated exactly, level by level; the other
factors, the *tail*, keep its Schur complement ``I + Λ'SΛ`` with ``S = A_tt - A_t1 M A_1t`` and
``M = (D_1^-1 + A_11)^-1``.  Scaled by its diagonal blocks ``(Φ'Φ)^-1`` (block Jacobi) that is

    T = Φ (I + Λ'SΛ) Φ' = I - E,      E with zero diagonal blocks,

whose eigenvalues cluster around one unless the factors are nearly nested.  Systems with ``T`` are
solved by conjugate gradients, many right-hand sides at once; the same iterations on random signs z
are Lanczos iterations, whose quadrature gives ``z' log(T) z`` (Ubaru, Chen and Saad, 2017), an
unbiased estimate of ``log|T|``, and ``T^-1 z`` gives Hutchinson's estimate of its derivatives.
The quadratic forms ``z'z``, ``z'Ez``, ``z'E^2 z`` and, if asked for, of higher powers, whose means
are known exactly, are recorded with each probe: as control variates they remove most of the noise.

Every array of effects has its levels grouped by factor, the effects of one level together, and the
right-hand sides on the last axis; small blocks have the level axis last.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ..linalg import ldl, solve_unit_lower, turn
from ..linalg import multiply as multiply_blocks

CHUNK_ROWS = 1024
"""Rows of a sparse matrix whose products are accumulated together, in the processor's cache."""
UNROLL = 4
"""Entries of a row handled in one pass; rows are padded to a multiple of it."""
LONG_ROW = 4.0
"""A row with more entries than this multiple of the average is split."""

BASIS_ROUNDS, BASIS_POWER = 4, 3
"""Rounds of subspace iteration, and multiplications between orthogonalisations."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SparseRows:
    """A sparse matrix stored for fast products: chunks of rows, padded to their longest row.

    The format is "sliced ELLPACK" (Kreutzer et al., 2014).  Rows that are much longer than the
    average continue in extra rows at the end, so that one popular level does not pad all others.

    Attributes:
        first: where the slices of each chunk begin, (chunks + 1,).
        column: column of each entry, (slices, UNROLL, CHUNK_ROWS); 0 where padded.
        weight: value of each entry; 0 where padded.
        extra: the row that each extra row continues, (extra,).
        n_rows: number of rows.
    """

    first: Any
    column: Any
    weight: Any
    extra: Any
    n_rows: int = field(metadata={"static": True})

    def __matmul__(self, v: Any) -> Array:
        """Return the product with ``v`` (columns, k), shape (n_rows, k)."""
        v = jnp.asarray(v)
        n_chunks = len(self.first) - 1
        first, column, weight = map(jnp.asarray, (self.first, self.column, self.weight))

        def chunk(c: Array, out: Array) -> Array:
            def add(slice_: Array, total: Array) -> Array:
                columns, weights = column[slice_], weight[slice_]
                for u in range(UNROLL):
                    total = total + weights[u][:, None] * v[columns[u]]
                return total

            total = jnp.zeros((CHUNK_ROWS, v.shape[1]), v.dtype)
            total = lax.fori_loop(first[c], first[c + 1], add, total)
            return lax.dynamic_update_slice_in_dim(out, total, c * CHUNK_ROWS, 0)

        out = jnp.zeros((n_chunks * CHUNK_ROWS, v.shape[1]), v.dtype)
        out = lax.fori_loop(0, n_chunks, chunk, out)
        n, extra = self.n_rows, len(self.extra)
        if not extra:
            return out[:n]
        return out[:n].at[jnp.asarray(self.extra)].add(out[n : n + extra])


def sparse_rows(row: np.ndarray, column: np.ndarray, weight: np.ndarray, n_rows: int) -> SparseRows:
    """Return the matrix with the given entries (one-dimensional arrays, in any order)."""
    order = np.argsort(row, kind="stable")
    row, column, weight = row[order], column[order], weight[order]
    length = np.bincount(row, minlength=n_rows)
    average = len(row) / max(n_rows, CHUNK_ROWS)
    limit = UNROLL * int(np.ceil(max(LONG_ROW * average, 32.0) / UNROLL))
    slot = np.arange(len(row)) - np.repeat(np.cumsum(length) - length, length)
    more = (-(-length // limit) - 1).clip(min=0)
    before = np.cumsum(more) - more
    extra = np.repeat(np.arange(n_rows), more)
    part = np.arange(len(extra)) - before[extra] + 1
    # The full continuations first, then the shorter ends of the rows.
    by_length = np.argsort(-np.minimum(length[extra] - part * limit, limit), kind="stable")
    place = np.argsort(by_length)
    extra = extra[by_length]
    continued = slot >= limit
    target = row.copy()
    target[continued] = n_rows + place[before[row[continued]] + slot[continued] // limit - 1]
    slot = slot % limit

    n_chunks = max(1, -(-(n_rows + len(extra)) // CHUNK_ROWS))
    longest = np.zeros(n_chunks, dtype=int)
    np.maximum.at(longest, target // CHUNK_ROWS, slot // UNROLL + 1)
    first = np.append(0, np.cumsum(longest))
    # Rounded up, so that similar data shares compiled code.
    size = max(1, int(first[-1]))
    step = 1 << max(0, size.bit_length() - 4)
    shape = (-(-size // step) * step, UNROLL, CHUNK_ROWS)
    columns, weights = np.zeros(shape, dtype=np.int32), np.zeros(shape)
    at = (first[target // CHUNK_ROWS] + slot // UNROLL, slot % UNROLL, target % CHUNK_ROWS)
    columns[at], weights[at] = column, weight
    return SparseRows(
        first=first.astype(np.int32),
        column=columns,
        weight=weights,
        extra=extra.astype(np.int32),
        n_rows=n_rows,
    )


class Meetings(NamedTuple):
    """The pairs of a head level and a level of one tail factor that meet, ordered by the latter.

    Attributes:
        head: the head's level, (c,).
        tail: the tail factor's level, (c,).
        block: the block of ``A``, head effects by tail effects, (q_1, q_f, c).
    """

    head: Any
    tail: Any
    block: Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class IterativeProblem:
    """The cross-products ``A = Z'Z`` of two or more factors; the first is the head.

    Attributes:
        diagonal: each factor's diagonal blocks, (q_f, q_f, m_f).
        meetings: the head's meetings with each tail factor.
        head_tail: ``A_1t``, rows the head's effects and columns all tail effects.
        tail_head: its transpose.
        tail_tail: the blocks of ``A_tt`` between different tail factors; None if there is one.
    """

    diagonal: tuple[Any, ...]
    meetings: tuple[Meetings, ...]
    head_tail: SparseRows
    tail_head: SparseRows
    tail_tail: SparseRows | None


class Elimination(NamedTuple):
    """What a covariance determines before any iteration; see the module's docstring.

    Attributes:
        M: ``Λ_1 (I + Λ_1'A_11Λ_1)^-1 Λ_1'``, (q_1, q_1, m_1).
        half: ``N`` with ``N'N = M``, (q_1, q_1, m_1).
        rest: ``I - A_11 M``, (q_1, q_1, m_1).
        scaled: ``Ψ = Λ Φ'`` for each tail factor, (q_f, q_f, m_f).
        identity: ``Φ Φ'``, likewise.
        inverse: ``Λ^-T Φ'``, likewise.
        fill: the diagonal blocks of ``Ψ'A_t1 M A_1tΨ``, likewise.
        logdet: ``log|H| - log|T|``.
        head_slope: derivative of that part of ``log|H|`` in ``D_1`` which needs no ``T``.
        head_mean: exact mean of a probe's ``head_form``, (q_1, q_1).
        tail_mean: exact mean of a probe's ``tail_form``, (q_f, q_f) for each tail factor.
    """

    M: Array
    half: Array
    rest: Array
    scaled: tuple[Array, ...]
    identity: tuple[Array, ...]
    inverse: tuple[Array, ...]
    fill: tuple[Array, ...]
    logdet: Array
    head_slope: Array
    head_mean: Array
    tail_mean: tuple[Array, ...]


class Krylov(NamedTuple):
    """Conjugate gradients, many right-hand sides at once.

    Attributes:
        x: the solutions, (n, k).
        alpha: step lengths, (max_steps, k); zero once a column has converged.
        beta: ratios of squared residuals, (max_steps, k).
        steps: iterations of each column, (k,).
        converged: whether each column met the tolerance, (k,).
    """

    x: Array
    alpha: Array
    beta: Array
    steps: Array
    converged: Array


class Probe(NamedTuple):
    """What the columns z of a set of probes contribute, the columns last.

    Attributes:
        krylov: the iterations for ``T^-1 z``, without the solutions.
        norm: ``z'z``, (k,).
        powers: ``z'Ez``, ``z'E^2 z``, ..., (2 depth, k).
        head: ``sum_l (Q T^-1 z)_l (Q z)_l'`` with ``Q = (I - A_11 M) A_1tΨ``; its mean is minus the
            derivative of ``log|T|`` in ``D_1`` at fixed scaling, (q_1, q_1, k).
        head_form: the same without ``T^-1``, of known mean.
        tail: ``sum_l (SΨ T^-1 z)_l (Λ^-TΦ'z)_l'``, whose mean is the derivative of ``log|H|`` in
            ``D_f``, (q_f, q_f, k) for each tail factor.
        tail_form: the same without ``T^-1``, of known mean.
    """

    krylov: Krylov
    norm: Array
    powers: Array
    head: Array
    head_form: Array
    tail: tuple[Array, ...]
    tail_form: tuple[Array, ...]


def _small(root: Array, block: Array) -> Array:
    """Return ``root @ block`` for one matrix (q, q) and blocks (q, r, m)."""
    return multiply_blocks(root, block)


def _levels(block: Array, v: Array) -> Array:
    """Multiply the effects ``v`` (m q, k) of one factor by its blocks (q, q, m)."""
    q, _, m = block.shape
    if q == 1:
        return block[0, 0][:, None] * v
    v = v.reshape(m, q, -1)
    rows = []
    for a in range(q):
        row = block[a, 0][:, None] * v[:, 0]
        for b in range(1, q):
            row = row + block[a, b][:, None] * v[:, b]
        rows.append(row)
    return jnp.stack(rows, axis=1).reshape(m * q, -1)


def _split(blocks: tuple[Array, ...], v: Array) -> list[Array]:
    """Split an array over the tail's effects by factor."""
    sizes = np.cumsum([block.shape[0] * block.shape[2] for block in blocks])
    return jnp.split(v, sizes[:-1].tolist())


def _each(blocks: tuple[Array, ...], v: Array, transpose: bool = False) -> Array:
    """Multiply the tail's effects by block diagonal matrices."""
    parts = [
        _levels(turn(block) if transpose else block, part)
        for block, part in zip(blocks, _split(blocks, v), strict=True)
    ]
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts)


def eliminate(
    problem: IterativeProblem, roots: tuple[Array, ...], inverses: tuple[Array, ...]
) -> Elimination:
    """Eliminate the head, and scale what is left by its diagonal blocks.

    Args:
        problem: the cross-products.
        roots: ``Λ_f`` with ``D_f = Λ_f Λ_f'``, nonsingular, (q_f, q_f) for each factor.
        inverses: their inverses.
    """
    A1 = jnp.asarray(problem.diagonal[0])
    identity = jnp.eye(A1.shape[0], dtype=A1.dtype)[..., None]
    root = roots[0]
    L, pivots = ldl(identity + multiply_blocks(_small(root.T, A1), _each_column(A1, root)))
    half = solve_unit_lower(L, jnp.broadcast_to(root.T[..., None], A1.shape))
    half = half / jnp.sqrt(pivots)[:, None]
    M = multiply_blocks(turn(half), half)
    rest = identity - multiply_blocks(A1, M)
    logdet = jnp.sum(jnp.log(pivots))
    head_mean = jnp.zeros_like(A1[..., 0])
    scaled, identities, inverse, fills, tail_mean = [], [], [], [], []
    tails = zip(problem.diagonal[1:], problem.meetings, roots[1:], inverses[1:], strict=True)
    for diagonal, (head, tail, block), root, root_inverse in tails:
        diagonal, head, tail = jnp.asarray(diagonal), jnp.asarray(head), jnp.asarray(tail)
        block = jnp.asarray(block)
        q, _, m = diagonal.shape
        eye = jnp.broadcast_to(jnp.eye(q, dtype=block.dtype)[..., None], diagonal.shape)
        part = multiply_blocks(half[..., head], block)
        filled = multiply_blocks(turn(part), part).reshape(q * q, -1)
        filled = jnp.stack(
            [jax.ops.segment_sum(x, tail, m, indices_are_sorted=True) for x in filled]
        )
        filled = filled.reshape(q, q, m)
        schur = diagonal - filled
        whole = eye + multiply_blocks(_small(root.T, schur), _each_column(schur, root))
        L, pivots = ldl(whole)
        phi = solve_unit_lower(L, eye) / jnp.sqrt(pivots)[:, None]
        psi = _small(root, turn(phi))
        logdet = logdet + jnp.sum(jnp.log(pivots))
        back = _small(root_inverse.T, turn(phi))
        scaled.append(psi)
        identities.append(multiply_blocks(phi, turn(phi)))
        inverse.append(back)
        fills.append(multiply_blocks(turn(psi), multiply_blocks(filled, psi)))
        image = multiply_blocks(multiply_blocks(rest[..., head], block), psi[..., tail])
        head_mean = head_mean + jnp.einsum("abc,dbc->ad", image, image)
        tail_mean.append(jnp.sum(multiply_blocks(multiply_blocks(schur, psi), turn(back)), axis=2))
    return Elimination(
        M=M,
        half=half,
        rest=rest,
        scaled=tuple(scaled),
        identity=tuple(identities),
        inverse=tuple(inverse),
        fill=tuple(fills),
        logdet=logdet,
        head_slope=jnp.sum(multiply_blocks(rest, A1), axis=2),
        head_mean=head_mean,
        tail_mean=tuple(tail_mean),
    )


def _each_column(block: Array, root: Array) -> Array:
    """Broadcast one matrix (q, q) to the shape of blocks (q, q, m)."""
    return jnp.broadcast_to(root[..., None], block.shape)


def _schur(problem: IterativeProblem, at: Elimination, v: Array) -> tuple[Array, Array]:
    """Return ``S v`` without the part of ``A_tt`` within levels, and ``A_1t v``."""
    head = problem.head_tail @ v
    out = -(problem.tail_head @ _levels(at.M, head))
    if problem.tail_tail is not None:
        out = out + problem.tail_tail @ v
    return out, head


def multiply_schur(problem: IterativeProblem, at: Elimination, x: Array) -> Array:
    """Return ``T x`` for the tail's effects ``x`` (n, k)."""
    out, _ = _schur(problem, at, _each(at.scaled, x))
    # T has unit diagonal blocks: adding back what fills them leaves minus E in the rest.
    return x + _each(at.fill, x) + _each(at.scaled, out, transpose=True)


def conjugate_gradients(
    multiply: Callable[[Array], Array], b: Array, tol: Array | float, max_steps: int
) -> Krylov:
    """Solve ``T x = b`` for the columns of ``b`` (n, k), each to ``|b - T x| <= tol |b|``."""
    k = b.shape[1]
    size = jnp.sum(b * b, axis=0)
    goal = jnp.asarray(tol, b.dtype) ** 2 * size

    def unfinished(state: tuple[Any, ...]) -> Array:
        return (state[0] < max_steps) & jnp.any(state[4] > goal)

    def step(state: tuple[Any, ...]) -> tuple[Any, ...]:
        i, x, r, p, rr, alpha, beta, steps = state
        active = rr > goal
        Tp = multiply(p)
        curvature = jnp.sum(p * Tp, axis=0)
        a = jnp.where(active, rr / jnp.where(active, curvature, 1.0), 0.0)
        x, r = x + a * p, r - a * Tp
        after = jnp.where(active, jnp.sum(r * r, axis=0), rr)
        ratio = jnp.where(active, after / jnp.where(active, rr, 1.0), 0.0)
        p = r + ratio * p
        return (
            i + 1,
            x,
            r,
            p,
            after,
            alpha.at[i].set(a),
            beta.at[i].set(ratio),
            steps + active.astype(jnp.int32),
        )

    history = jnp.zeros((max_steps, k), b.dtype)
    state: tuple[Any, ...]
    state = (jnp.int32(0), jnp.zeros_like(b), b, b, size, history, history, jnp.zeros(k, jnp.int32))
    _, x, _, _, rr, alpha, beta, steps = lax.while_loop(unfinished, step, state)
    return Krylov(x=x, alpha=alpha, beta=beta, steps=steps, converged=rr <= goal)


def multiply(problem: IterativeProblem, v: Array) -> Array:
    """Return ``A v`` for the effects ``v`` (n, k) of all factors."""
    n = problem.head_tail.n_rows
    head, tail = v[:n], v[n:]
    A = tuple(map(jnp.asarray, problem.diagonal))
    top = _levels(A[0], head) + problem.head_tail @ tail
    bottom = _each(A[1:], tail) + problem.tail_head @ head
    if problem.tail_tail is not None:
        bottom = bottom + problem.tail_tail @ tail
    return jnp.concatenate([top, bottom])


def solve(
    problem: IterativeProblem, at: Elimination, W: Array, tol: Array | float, max_steps: int
) -> tuple[Array, Array, Array]:
    """Return ``Λ H^-1 Λ'W`` for ``W`` (n, k), each column's steps, and whether it converged."""
    n = problem.head_tail.n_rows
    head, tail = W[:n], W[n:]
    b = _each(at.scaled, tail - problem.tail_head @ _levels(at.M, head), transpose=True)
    krylov = conjugate_gradients(lambda x: multiply_schur(problem, at, x), b, tol, max_steps)
    tail = _each(at.scaled, krylov.x)
    head = _levels(at.M, head - problem.head_tail @ tail)
    return jnp.concatenate([head, tail]), krylov.steps, krylov.converged


def dominant_basis(problem: IterativeProblem, at: Elimination, start: Array) -> Array:
    """Find an orthonormal basis (n, r) of E's dominant eigenvectors by subspace iteration.

    Probes are then drawn orthogonal to it and the basis itself is treated exactly: the few
    directions in which T is far from the identity, such as each factor's mean, are no longer noise
    (Meyer et al., 2021, Hutch++).  Any basis gives unbiased estimates.
    """

    def improve(_: Array, Q: Array) -> Array:
        Q = lax.fori_loop(0, BASIS_POWER, lambda _, Q: Q - multiply_schur(problem, at, Q), Q)
        return jnp.linalg.qr(Q)[0]

    return lax.fori_loop(0, BASIS_ROUNDS, improve, jnp.linalg.qr(start)[0])


def random_signs(key: Array, basis: Array, k: int) -> Array:
    """Return k random vectors of signs less their part in the space of ``basis`` (n, r)."""
    z = jax.random.rademacher(key, (basis.shape[0], k), basis.dtype)
    return z - basis @ (basis.T @ z)


def probe(
    problem: IterativeProblem,
    at: Elimination,
    z: Array,
    tol: Array | float,
    max_steps: int,
    depth: int,
) -> Probe:
    """Evaluate the probes ``z`` (n, k) on the tail's effects, with ``depth`` powers of E."""
    A = tuple(jnp.asarray(diagonal) for diagonal in problem.diagonal[1:])
    krylov = conjugate_gradients(lambda x: multiply_schur(problem, at, x), z, tol, max_steps)

    def image(x: Array) -> tuple[Array, Array]:
        v = _each(at.scaled, x)
        rest, head = _schur(problem, at, v)
        return _each(A, v) + rest, _levels(at.rest, head)

    Sz, Qz = image(z)
    Sx, Qx = image(krylov.x)
    power, powers = z, []
    for i in range(depth):
        # The first is at hand: T = ΦΦ' + Ψ'SΨ.
        Tz = _each(at.identity, z) + _each(at.scaled, Sz, transpose=True)
        after = power - (multiply_schur(problem, at, power) if i else Tz)
        powers += [jnp.sum(power * after, axis=0), jnp.sum(after * after, axis=0)]
        power = after
    back = _each(at.inverse, z)

    def outer(u: Array, v: Array, q: int) -> Array:
        u, v = u.reshape(-1, q, u.shape[1]), v.reshape(-1, q, v.shape[1])
        return jnp.stack(
            [jnp.stack([jnp.sum(u[:, a] * v[:, b], axis=0) for b in range(q)]) for a in range(q)]
        )

    def by_factor(u: Array, v: Array) -> tuple[Array, ...]:
        parts = zip(A, _split(A, u), _split(A, v), strict=True)
        return tuple(outer(x, y, block.shape[0]) for block, x, y in parts)

    q = at.M.shape[0]
    return Probe(
        krylov=krylov._replace(x=jnp.zeros((), z.dtype)),
        norm=jnp.sum(z * z, axis=0),
        powers=jnp.stack(powers),
        head=outer(Qx, Qz, q),
        head_form=outer(Qz, Qz, q),
        tail=by_factor(Sx, back),
        tail_form=by_factor(Sz, back),
    )


def quadrature(krylov: Krylov, norm: np.ndarray) -> np.ndarray:
    """Return Lanczos's quadrature of ``z' log(T) z`` for each column, in NumPy.

    The coefficients of conjugate gradients from zero are those of the Lanczos process started at z
    (Golub and Van Loan, 2013, section 11.3): the tridiagonal matrix has ``1 / alpha_j +
    beta_{j-1} / alpha_{j-1}`` on its diagonal and ``sqrt(beta_j) / alpha_j`` beside it.
    """
    steps = np.asarray(krylov.steps)
    length = max(1, int(steps.max(initial=0)))
    alpha, beta = np.asarray(krylov.alpha)[:length], np.asarray(krylov.beta)[:length]
    used = np.arange(length)[:, None] < steps
    safe = np.where(used, alpha, 1.0)
    ratio = np.where(used, beta / safe, 0.0)
    diagonal = np.where(used, 1.0 / safe, 1.0)
    diagonal[1:] += np.where(used[1:], ratio[:-1], 0.0)
    beside = np.where(used[1:], np.sqrt(beta[:-1]) / safe[:-1], 0.0)
    tridiagonal = np.zeros((alpha.shape[1], length, length))
    index = np.arange(length)
    tridiagonal[:, index, index] = diagonal.T
    tridiagonal[:, index[1:], index[:-1]] = beside.T
    values, vectors = np.linalg.eigh(tridiagonal)
    return np.asarray(norm) * np.sum(vectors[:, 0] ** 2 * np.log(values), axis=1)
