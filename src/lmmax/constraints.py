"""What the user asks of the estimation, checked and translated for the solver.

The solver works in coordinates where columns are orthonormal and the response has unit length;
starts and fixed values are given in the user's units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import numpy as np
import pandas as pd

from .characters import Visible
from .compress.layout import EngineError
from .covariances import Covariance, matrix_at, slopes
from .frames import real_numbers
from .likelihood import Problem
from .options import EngineName, Solver, choose
from .solve import Constraints, Structured

SOLVERS: tuple[str, ...] = get_args(Solver)
SOLVER_NAMES = {"newtonraphson": "newton", "lbfgsb": "lbfgs"}


class ConstraintError(Visible, ValueError):
    """A ``start`` or ``fix`` argument that does not fit the model."""


@dataclass(frozen=True)
class Settings:
    """How to estimate; immutable, so that fits share nothing that can change.

    Attributes:
        reml: restricted maximum likelihood if True, else maximum likelihood.
        start: covariance matrix, mapping or earlier fit to start from; None for a moment estimate.
        fix: mapping with "cov_re" (natural units) and/or "scale" to hold fixed.
        solver: "auto", "newton" or "lbfgs".
        tol: largest Newton decrement (units of -2 log-likelihood) that counts as converged; None
            for 1e-16, or 1e-13 where an evaluation is expensive (crossed factors).
        max_steps: most steps; None for 100 of Newton or 3000 of L-BFGS.
        em_steps: most EM steps before them.
        engine: form of the likelihood, "auto" by the structure of the model.
        seed: of the iterative engine's random probes.
    """

    reml: bool = True
    start: Any = None
    fix: Mapping[str, Any] | None = None
    solver: str = "auto"
    tol: float | None = None
    max_steps: int | None = None
    em_steps: int = 3
    engine: str = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "solver", choose("solver", self.solver, SOLVERS, SOLVER_NAMES))
        engine = choose("engine", self.engine, get_args(EngineName), error=EngineError)
        object.__setattr__(self, "engine", engine)
        if self.tol is not None:
            _check_positive(self.tol, f"tol={self.tol!r}", ValueError)
        for name in ("max_steps", "em_steps"):
            value = getattr(self, name)
            if name == "max_steps" and value is None:
                continue
            least = 1 if name == "max_steps" else 0
            whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
            if not whole or value < least:
                raise ValueError(f"{name}={value!r} must be a whole number, at least {least}")
        if not isinstance(self.seed, int | np.integer):
            raise ValueError(f"seed={self.seed!r} must be a whole number")
        if self.fix is not None and not isinstance(self.fix, Mapping):
            raise ConstraintError(
                f"fix={self.fix!r} must be a mapping with the entries 'cov_re' and/or 'scale'"
            )


@dataclass(frozen=True)
class TermColumns:
    """A random term's place among the q columns of D.

    Attributes:
        label: the term as text.
        columns: its columns.
        covariance: the structure of its covariance.
        factor: position of its grouping factor.
        effects: factor and name of each effect, (width,).
    """

    label: str
    columns: slice
    covariance: Covariance
    factor: int = 0
    effects: tuple[tuple[str, str], ...] = ()

    @property
    def width(self) -> int:
        """Number of effects."""
        return int(self.columns.stop - self.columns.start)

    @property
    def pattern(self) -> np.ndarray | None:
        """1.0 for the entries that are free, (width, width), or None for a structure."""
        return self.covariance.pattern(self.width)

    @property
    def correlated(self) -> bool:
        """Whether the effects have correlations, free ones or those of a structure."""
        return bool(self.pairs)

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Pairs (i, j), j < i, of effects that may be correlated, row by row."""
        pattern = np.ones((self.width, self.width)) if self.pattern is None else self.pattern
        return tuple((int(i), int(j)) for i, j in np.argwhere(np.tril(pattern, -1)))

    @property
    def sets(self) -> tuple[np.ndarray, ...]:
        """Positions of the effects, those that may be correlated together."""
        if self.pattern is None:
            return (np.arange(self.width),)
        return tuple(np.flatnonzero(row) for i, row in enumerate(self.pattern) if not row[:i].any())


def directions(term: TermColumns) -> np.ndarray:
    """Return the directions in which a term's covariance can move, (k, width, width).

    Those of a structure depend on where it is; any point shows which there are in general.
    """
    pattern, q = term.pattern, term.width
    if pattern is None:
        size = term.covariance.n_parameters(q)
        theta = np.random.default_rng(0).uniform(0.5, 1.5, size)
        return np.moveaxis(slopes(term.covariance, theta, q), -1, 0)
    rows, columns = np.nonzero(np.tril(pattern))
    matrices = np.zeros((len(rows), q, q))
    matrices[np.arange(len(rows)), rows, columns] = 1.0
    matrices[np.arange(len(rows)), columns, rows] = 1.0
    return matrices


class Guess(NamedTuple):
    """Where to start, in working coordinates; None where the user said nothing.

    Attributes:
        D: relative covariance, (q, q).
        theta: parameters of structures.
        s: logarithm of the scale.
    """

    D: np.ndarray | None
    theta: np.ndarray | None
    s: float


def usual_log_scale(problem: Problem) -> float:
    """Return the logarithm of half the variance of the working response, where searches start."""
    return float(np.log(0.5 / float(problem.n_obs)))


def read_constraints(
    problem: Problem, terms: Sequence[TermColumns], settings: Settings
) -> tuple[Constraints, Guess]:
    """Translate structure, ``fix`` and ``start`` into the solver's terms."""
    A, y_scale = np.asarray(problem.z_factor), float(problem.y_scale)
    q = len(A)
    fix = dict(settings.fix or {})
    fixed_cov, fixed_scale = fix.pop("cov_re", None), fix.pop("scale", None)
    if fix:
        raise ConstraintError(
            f"fix has the unknown entry {next(iter(fix))!r}; it takes 'cov_re' and 'scale'"
        )
    Psi, covered = np.zeros((q, q)), np.zeros((q, q))
    if fixed_cov is not None:
        Psi, covered = _read_covariance(fixed_cov, terms, q, "fix['cov_re']")
    allowed, blocks, structures, at = np.zeros((q, q)), np.zeros((q, q)), [], 0
    for term in terms:
        here, pattern = term.columns, term.pattern
        allowed[here, here] = 1.0 if pattern is None else pattern
        if pattern is None and not covered[here.start, here.start]:
            size = term.covariance.n_parameters(term.width)
            structures.append(Structured(term.covariance, (here.start, here.stop), (at, at + size)))
            at += size
            blocks[here, here] = np.eye(term.width)
        else:
            blocks[here, here] = allowed[here, here]
    if np.any(Psi * (1.0 - allowed) != 0.0):
        raise ConstraintError(
            "fix['cov_re'] has covariances between effects that the model takes as uncorrelated"
        )
    D: np.ndarray | None = None
    theta: np.ndarray | None = None
    s = usual_log_scale(problem)
    if settings.start is not None:
        D, scale = _read_start(settings.start, terms, q, 1e-6 * y_scale**2 / float(problem.n_obs))
        # What a structure cannot reproduce it approximates.
        parts = [part.covariance.theta_of(D[slice(*part.columns), slice(*part.columns)])
                 for part in structures]  # fmt: skip
        theta = np.concatenate(parts) if parts else np.zeros(0)
        D = A @ D @ A.T * blocks
        s = np.log(scale / y_scale**2)
    if fixed_scale is not None:
        scale = _check_positive(fixed_scale, f"fix['scale']={fixed_scale!r}", ConstraintError)
        s = np.log(scale / y_scale**2)
    held = covered * blocks
    constraints = Constraints(
        blocks=blocks,
        held=held,
        natural=A @ Psi @ A.T / y_scale**2 * held,
        scale_free=fixed_scale is None,
        profile=fixed_scale is None and fixed_cov is None,
        structures=tuple(structures),
    )
    return constraints, Guess(D, theta, float(s))


def _read_start(
    start: Any, terms: Sequence[TermColumns], q: int, smallest: float
) -> tuple[np.ndarray, float]:
    """Return relative covariance and scale from an earlier fit, a mapping, or theta.

    A scale of zero is taken as the smallest one: a fit may have ended there, and another start.
    """
    if hasattr(start, "cov_re") and hasattr(start, "scale"):
        start = {"cov_re": _known_order(start.cov_re, terms), "scale": start.scale}
    if isinstance(start, Mapping):
        if set(start) != {"cov_re", "scale"}:
            raise ConstraintError(
                "start needs the two entries 'cov_re' and 'scale' (natural units), "
                f"got {sorted(map(str, start))}"
            )
        given = start["scale"]
        inside = smallest if np.ndim(given) == 0 and given == 0.0 else given
        scale = _check_positive(inside, f"start['scale']={given!r}", ConstraintError)
        Psi, covered = _read_covariance(start["cov_re"], terms, q, "start['cov_re']")
        if not np.diag(covered).all():
            raise ConstraintError("start['cov_re'] must give every term's covariance")
        return Psi / scale, scale
    sizes = [_theta_size(term) for term in terms]
    theta, size = _numbers(start), sum(sizes)
    if theta is None or theta.shape != (size,) or not np.isfinite(theta).all():
        raise ConstraintError(
            "start must be an earlier fit, a mapping with 'cov_re' and 'scale', or theta: "
            f"{size} finite numbers, as fit.theta gives them (term after term, the lower triangle, "
            f"row by row, of the relative Cholesky factor); got {start!r}"
        )
    D = np.zeros((q, q))
    for term, part in zip(terms, np.split(theta, np.cumsum(sizes)[:-1]), strict=True):
        if term.pattern is None:
            block = matrix_at(term.covariance, part, term.width)
        else:
            L = np.zeros((term.width, term.width))
            L[np.nonzero(np.tril(term.pattern))] = part
            block = L @ L.T
        D[term.columns, term.columns] = block
    return D, 1.0


def _theta_size(term: TermColumns) -> int:
    """Return the number of entries of theta that a term has."""
    if term.pattern is None:
        return term.covariance.n_parameters(term.width)
    return int(np.tril(term.pattern).sum())


def _read_covariance(
    value: Any, terms: Sequence[TermColumns], q: int, name: str
) -> tuple[np.ndarray, np.ndarray]:
    """Return the covariance matrix (q, q) and a mask of the entries that were given."""
    Psi, covered = np.zeros((q, q)), np.zeros((q, q))
    if isinstance(value, Mapping):
        labels = {term.label: term for term in terms}
        for label, part in value.items():
            if label not in labels:
                raise ConstraintError(
                    f"{name} names the term {label!r}; the model's terms are "
                    + ", ".join(map(repr, labels))
                )
            term = labels[label]
            here, full = term.columns, f"{name}[{label!r}]"
            part = _by_labels(part, term.effects, full)
            Psi[here, here] = _check_covariance(part, term.width, full)
            covered[here, here] = 1.0
        return Psi, covered
    value = _by_labels(value, _effects(terms, q), name)
    return _check_covariance(value, q, name), np.ones((q, q))


def _effects(terms: Sequence[TermColumns], q: int) -> tuple[tuple[str, str], ...]:
    """Return factor and name of each of the q effects, in the order of the columns of D."""
    found = [effect for term in sorted(terms, key=_first) for effect in term.effects]
    return tuple(found) if len(found) == q else ()


def _first(term: TermColumns) -> int:
    return int(term.columns.start)


def _places(labels: Sequence[Any], effects: Sequence[tuple[str, str]]) -> list[int] | None:
    """Return where each effect stands among labels, names or pairs of factor and name.

    None if they are not these effects, each of them once.
    """
    for known in (list(effects), [name for _, name in effects]):
        if len(set(known)) == len(known) and set(known) == set(labels):
            return [labels.index(label) for label in known]
    return None


def _by_labels(value: Any, effects: Sequence[tuple[str, str]], name: str) -> Any:
    """Return a data frame as an array in the order of the effects; anything else as it is.

    Raises:
        ConstraintError: if its labels are others than those of the effects.
    """
    if not isinstance(value, pd.DataFrame) or not effects:
        return value
    order = []
    for axis, labels in (("rows", value.index.tolist()), ("columns", value.columns.tolist())):
        named = [n for _, n in effects], list(effects)
        if labels == list(range(len(effects))) or labels in named:
            order.append(list(range(len(labels))))
            continue
        places = _places(labels, effects)
        if places is None:
            one = len({factor for factor, _ in effects}) == 1
            raise ConstraintError(
                f"the {axis} of {name} are labelled {', '.join(map(repr, labels))}, but the "
                f"random effects are {', '.join(map(repr, named[0] if one else effects))}: use "
                "these labels in any order, or give a plain array in this order"
            )
        order.append(places)
    return value.to_numpy()[np.ix_(*order)]


def _known_order(cov_re: Any, terms: Sequence[TermColumns]) -> Any:
    """Return the covariance of an earlier fit, whose effects may be in another order, or others."""
    if not isinstance(cov_re, pd.DataFrame):
        return cov_re
    places = _places(cov_re.index.tolist(), _effects(terms, len(cov_re)))
    return cov_re.to_numpy() if places is None else cov_re.to_numpy()[np.ix_(places, places)]


def _check_covariance(value: Any, q: int, name: str) -> np.ndarray:
    numbers = _numbers(value)
    if numbers is None or np.atleast_2d(numbers).shape != (q, q):
        got = repr(value) if numbers is None else f"shape {numbers.shape}"
        raise ConstraintError(f"{name} must be a {q} x {q} matrix, got {got}")
    matrix = np.atleast_2d(numbers)
    if not np.isfinite(matrix).all():
        raise ConstraintError(f"{name} must be finite")
    size = np.max(np.abs(matrix))
    if np.max(np.abs(matrix - matrix.T)) > 1e-10 * size:
        raise ConstraintError(f"{name} must be symmetric")
    if np.linalg.eigvalsh(matrix)[0] < -1e-10 * size:
        raise ConstraintError(f"{name} must be positive semidefinite: it is a covariance matrix")
    return matrix


def _numbers(value: Any) -> np.ndarray | None:
    """Return ``value`` as an array of floats, or None if it is not one."""
    try:
        return real_numbers(value, "a matrix of parameters")
    except (TypeError, ValueError):
        return None


def _check_positive(value: Any, name: str, error: type[ValueError]) -> float:
    number = None if isinstance(value, str) else _numbers(value)
    if number is None or number.shape != () or not 0.0 < number < np.inf:
        raise error(f"{name} must be a positive number")
    return float(number)
