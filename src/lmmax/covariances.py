"""Covariance structures of one random term.

A structure maps k unconstrained real parameters ``theta`` to the covariance ``D`` (q, q) of the
term's q effects, relative to the residual variance.  With standard deviations ``s`` and
correlations ``C``, ``D = diag(s) C diag(s)``:

============  =========  =============  ===================================================
name          variances  k              correlation of effects i and j
============  =========  =============  ===================================================
us            each       q (q + 1) / 2  any, ``D = L L'`` with L lower triangular
diag          each       q              0
homdiag, id   one        1              0
cs, csh       each       q + 1          ``rho`` in (-1 / (q - 1), 1)
homcs         one        2              the same
ar1           one        2              ``rho ** |i - j|``
hetar1, ar1h  each       q + 1          the same
toep, toeph   each       2 q - 1        ``rho_|i - j|``, one per lag
homtoep       one        q              the same
ou            one        2              ``exp(-rate |t_i - t_j|)``, t the levels as numbers
============  =========  =============  ===================================================

The names are those of the R package glmmTMB, where "cs" and "toep" have a variance for each effect.

Every ``D(theta)`` is positive semidefinite, has two derivatives everywhere, and reaches variances
that are exactly zero.  That leaves little choice for ``s``.  One variance for all effects is
``tau ** 2`` with any real tau.  With a variance for each effect, ``s = tau`` would let some of them
turn negative, which flips signs of correlations and leaves the family; a smooth map of the line
onto ``s >= 0`` is flat at zero, and the plainest is ``s = u ** 2``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from functools import cache
from itertools import pairwise
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from .compilation import Compiled, computing
from .compilation_cache import compilation_cache
from .frames import DataError, listing
from .levels import level_numbers
from .parameters import factor, pack_triangle, triangle_size, unpack_lower

__all__ = ["Covariance", "Effects", "covariance"]

Function = Literal["matrix", "values", "of_values"]
"""A structure's functions: its covariance and the values that are reported by theta, and the
covariance by these values."""

# Estimates start here, on the scale of theta: correlations that are positive but not strong.
_START = 0.25
# Gaps between levels that differ by more than this part are not equal.
_UNEQUAL = 1e-6
# Months and years are not equally long.
_UNEQUAL_DATES = 0.2
# The parameter of a correlation next to its limits stays finite.
_NEAR_ONE = 1.0 - 1e-13


@dataclass(frozen=True)
class Effects:
    """What a covariance structure is told about the effects of its term.

    Args:
        names: (q,) names of the effects.
        levels: (q,) levels if the effects are those of one factor, `0 + f`, else None.
        ordered: whether these levels have an order.
        label: the term, for messages.
        factor: the factor, for messages.
        places: (q,) position of each level among all that the factor was declared to have, with
            or without rows; None if the levels are simply those that occur.
        declared: whether the data or the formula say what the order of the levels is.
    """

    names: tuple[str, ...]
    levels: tuple[Any, ...] | None
    ordered: bool
    label: str
    factor: str = ""
    places: tuple[int, ...] | None = None
    declared: bool = False


class Covariance(ABC):
    """A covariance structure; subclass it, as a frozen dataclass, to add one of your own.

    A subclass has a `name` and defines `n_parameters`, `matrix` and `theta_of`. The other methods
    have defaults.

    Example:
        >>> @dataclass(frozen=True)
        ... class Proportional(Covariance):
        ...     "A known matrix times one unknown variance."
        ...     shape: tuple[tuple[float, ...], ...]
        ...     name = "proportional"
        ...
        ...     def n_parameters(self, q):
        ...         return 1
        ...
        ...     def matrix(self, theta, q):
        ...         return theta[0] ** 2 * jnp.asarray(self.shape, theta.dtype)
        ...
        ...     def theta_of(self, D):
        ...         return np.sqrt([np.trace(D) / np.trace(self.shape)])
        >>> Proportional(((2.0, 1.0), (1.0, 2.0))).start(np.array([8.0, 8.0]))
        array([2.])
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """The name, a plain word; it stands before the term in a formula."""

    @abstractmethod
    def n_parameters(self, q: int) -> int:
        """Return the number k of parameters for q effects."""

    @abstractmethod
    def matrix(self, theta: Array, q: int) -> Array:
        """Return the covariance (q, q) relative to the residual variance.

        It must be positive semidefinite and twice differentiable for every theta (k,), in its
        dtype, and work when traced by JAX; an estimated variance of zero must be within reach.
        """

    @abstractmethod
    def theta_of(self, D: np.ndarray) -> np.ndarray:
        """Return the parameters (k,) that give D (q, q), or roughly D if no parameters do."""

    def prepare(self, effects: Effects) -> Covariance:
        """Return the structure for the effects of one term, with whatever it learns from them.

        Raises:
            DataError: if it does not suit them; the message names the term and the remedy.
        """
        return self

    def pattern(self, q: int) -> np.ndarray | None:
        """Return 1 where an entry of D is free and 0 where it is zero, (q, q).

        None if the entries depend on each other in another way.
        """
        return None

    def start(self, variances: np.ndarray) -> np.ndarray:
        """Return parameters (k,) to start from, given rough relative variances (q,)."""
        return self.theta_of(np.diag(_positive(variances)))

    def nullity(self, q: int) -> int:
        """Return how many directions of the effects have variance zero whatever the parameters."""
        return 0

    def values(self, theta: Array, q: int) -> Array:
        """Return the k parameters on the scale on which they are reported.

        Standard deviations are relative to the residual one.
        """
        return theta

    def of_values(self, values: Array, q: int) -> Array | None:
        """Return the covariance (q, q) that has these `values`; None if only theta tells.

        Kenward and Roger's method takes its derivatives.  Where theta is infinite, at a correlation
        of one, they are what they are anywhere else.  A covariance is quadratic in the standard
        deviations.
        """
        return None

    def is_sd(self, q: int) -> tuple[bool, ...]:
        """Return, for each of `values`, whether it is a standard deviation."""
        return (False,) * self.n_parameters(q)

    def labels(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """Return a label for each of `values`; `names` (q,) are those of the effects."""
        return tuple(f"{self.name}{i + 1}" for i in range(self.n_parameters(len(names))))


@dataclass(frozen=True)
class Unstructured(Covariance):
    """Any covariance matrix; theta is its lower Cholesky factor, row by row.

    `values` has the standard deviations and correlations in the same order, the former in the
    place of the diagonal; a correlation with an effect of variance zero is NaN.
    """

    @property
    def name(self) -> str:
        """`"us"`."""
        return "us"

    def n_parameters(self, q: int) -> int:
        """See `Covariance`."""
        return triangle_size(q)

    def pattern(self, q: int) -> np.ndarray:
        """See `Covariance`."""
        return np.ones((q, q))

    def matrix(self, theta: Array, q: int) -> Array:
        """See `Covariance`."""
        L = unpack_lower(theta)
        return L @ L.T

    def theta_of(self, D: np.ndarray) -> np.ndarray:
        """See `Covariance`."""
        return pack_triangle(factor(D))

    def values(self, theta: Array, q: int) -> Array:
        """See `Covariance`."""
        return jnp.asarray(pack_triangle(correlations_and_sd(self.matrix(theta, q))))

    def is_sd(self, q: int) -> tuple[bool, ...]:
        """See `Covariance`."""
        return tuple(i == j for i in range(q) for j in range(i + 1))

    def labels(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """See `Covariance`."""
        return tuple(
            f"sd({name})" if i == j else f"cor({names[j]}, {name})"
            for i, name in enumerate(names)
            for j in range(i + 1)
        )


def correlations_and_sd(D: Array) -> Array:
    """Return the correlations of a covariance, standard deviations on the diagonal, (q, q).

    A correlation with an effect of variance zero is NaN.
    """
    variances = jnp.diag(D)
    positive = variances > 0
    # The inner `where` keeps the derivative finite in the branch that is not taken.
    sd = jnp.where(positive, jnp.sqrt(jnp.where(positive, variances, 1.0)), 0.0)
    products = jnp.where(positive[:, None] & positive, sd[:, None] * sd, 1.0)
    correlations = jnp.where(positive[:, None] & positive, D / products, jnp.nan)
    return jnp.where(np.eye(len(D), dtype=bool), sd, correlations)


@dataclass(frozen=True)
class Diagonal(Covariance):
    """Independent effects; theta is their standard deviations, with either sign.

    Args:
        hom: whether they share one variance.
    """

    hom: bool = False

    @property
    def name(self) -> str:
        """`"diag"` or `"homdiag"`."""
        return "homdiag" if self.hom else "diag"

    def n_parameters(self, q: int) -> int:
        """See `Covariance`."""
        return 1 if self.hom else q

    def pattern(self, q: int) -> np.ndarray | None:
        """See `Covariance`."""
        return None if self.hom else np.eye(q)

    def matrix(self, theta: Array, q: int) -> Array:
        """See `Covariance`."""
        return jnp.diag(jnp.broadcast_to(theta**2, q))

    def theta_of(self, D: np.ndarray) -> np.ndarray:
        """See `Covariance`."""
        sd = np.sqrt(np.diag(D).clip(min=0.0))
        return np.array([_root_mean_square(sd)]) if self.hom else sd

    def values(self, theta: Array, q: int) -> Array:
        """See `Covariance`."""
        return jnp.abs(theta)

    def of_values(self, values: Array, q: int) -> Array:
        """See `Covariance`."""
        return jnp.diag(jnp.broadcast_to(values**2, q))

    def is_sd(self, q: int) -> tuple[bool, ...]:
        """See `Covariance`."""
        return (True,) * self.n_parameters(q)

    def labels(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """See `Covariance`."""
        return _sd_labels(names, self.hom)


class _Correlated(Covariance):
    """Standard deviations, one or each, then the parameters of a correlation matrix.

    The methods on correlations take and return the last part of theta, `x`.
    """

    @property
    def _common(self) -> bool:
        """Whether the effects share one variance."""
        return True

    @abstractmethod
    def _n_correlations(self, q: int) -> int:
        """Return the length of x."""

    @abstractmethod
    def _correlations(self, x: Array, q: int) -> Array:
        """Return the natural parameters of the correlation matrix, as many as x has."""

    @abstractmethod
    def _correlation_matrix(self, natural: Array, q: int) -> Array:
        """Return the correlation matrix (q, q)."""

    @abstractmethod
    def _x_of(self, mean: Callable[[np.ndarray], float], q: int) -> np.ndarray:
        """Return x from averages of given correlations.

        Args:
            mean: from a mask (q, q) to the mean correlation there, NaN if there is none.
            q: the number of effects.
        """

    @abstractmethod
    def _correlation_labels(self, q: int) -> tuple[str, ...]:
        """Return labels of the natural parameters."""

    def _x_start(self, q: int) -> np.ndarray:
        return np.array([_START] + [0.0] * (self._n_correlations(q) - 1))

    def _n_sd(self, q: int) -> int:
        return 1 if self._common else q

    def n_parameters(self, q: int) -> int:
        """See `Covariance`."""
        return self._n_sd(q) + self._n_correlations(q)

    def prepare(self, effects: Effects) -> Covariance:
        """See `Covariance`."""
        if len(effects.names) < 2:
            raise DataError(
                f"the random term {effects.label} has one effect, {effects.names[0]!r}, and "
                f"{self.name!r} correlates two or more: write `( ... | group)`"
            )
        return self

    def matrix(self, theta: Array, q: int) -> Array:
        """See `Covariance`."""
        m = self._n_sd(q)
        C = self._correlation_matrix(self._correlations(theta[m:], q), q)
        if self._common:
            return theta[0] ** 2 * C
        sd = theta[:m] ** 2
        return (sd[:, None] * sd) * C

    def start(self, variances: np.ndarray) -> np.ndarray:
        """See `Covariance`."""
        variances = _positive(variances)
        return np.concatenate([self._sd_part(np.sqrt(variances)), self._x_start(len(variances))])

    def theta_of(self, D: np.ndarray) -> np.ndarray:
        """See `Covariance`."""
        D = np.asarray(D, dtype=float)
        q = len(D)
        sd = np.sqrt(np.diag(D).clip(min=0.0))
        # With one variance for all, it is covariances that average, not correlations.
        scale = np.full(q, _root_mean_square(sd)) if self._common else sd
        products = np.outer(scale, scale)
        known = products > 0.0

        def mean(mask: np.ndarray) -> float:
            here = mask & known
            return float(np.mean(D[here] / products[here])) if here.any() else np.nan

        x = self._x_of(mean, q)
        return np.concatenate([self._sd_part(sd), np.where(np.isnan(x), self._x_start(q), x)])

    def values(self, theta: Array, q: int) -> Array:
        """See `Covariance`."""
        m = self._n_sd(q)
        sd = jnp.abs(theta[:m]) if self._common else theta[:m] ** 2
        return jnp.concatenate([sd, self._correlations(theta[m:], q)])

    def of_values(self, values: Array, q: int) -> Array:
        """See `Covariance`."""
        m = self._n_sd(q)
        sd = jnp.broadcast_to(values[:m], q)
        return (sd[:, None] * sd) * self._correlation_matrix(values[m:], q)

    def is_sd(self, q: int) -> tuple[bool, ...]:
        """See `Covariance`."""
        return (True,) * self._n_sd(q) + (False,) * self._n_correlations(q)

    def labels(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """See `Covariance`."""
        return _sd_labels(names, self._common) + self._correlation_labels(len(names))

    def _sd_part(self, sd: np.ndarray) -> np.ndarray:
        return np.array([_root_mean_square(sd)]) if self._common else np.sqrt(sd)


@dataclass(frozen=True)
class CompoundSymmetry(_Correlated):
    """Every two effects have the same correlation.

    ``rho`` is a shifted tanh of its parameter, with limits -1 / (q - 1) and 1 and zero at zero.

    Args:
        hom: whether they share one variance.
    """

    hom: bool = False

    @property
    def name(self) -> str:
        """`"cs"` or `"homcs"`."""
        return "homcs" if self.hom else "cs"

    @property
    def _common(self) -> bool:
        return self.hom

    def _n_correlations(self, q: int) -> int:
        return 1

    def _correlations(self, x: Array, q: int) -> Array:
        low = -1.0 / (q - 1)
        return low + (1.0 - low) * (1.0 + jnp.tanh(x + _centre(q))) / 2.0

    def _correlation_matrix(self, natural: Array, q: int) -> Array:
        return jnp.where(np.eye(q, dtype=bool), 1.0, natural[0])

    def _x_of(self, mean: Callable[[np.ndarray], float], q: int) -> np.ndarray:
        low = -1.0 / (q - 1)
        rho = mean(~np.eye(q, dtype=bool))
        share = (rho - low) / (1.0 - low)
        return np.array([_atanh(2.0 * share - 1.0) - _centre(q)])

    def _correlation_labels(self, q: int) -> tuple[str, ...]:
        return ("cor",)


class _Ordered(_Correlated):
    """A correlation that depends on how far two effects are apart."""

    def prepare(self, effects: Effects) -> Covariance:
        """See `Covariance`."""
        if effects.levels is None:
            raise DataError(
                f"the random term {effects.label} is not one factor without intercept, and "
                f"{self.name!r} needs one whose levels have an order: write "
                f"`{self.name}(0 + f | group)`, with `C(f)` if f holds numbers"
            )
        if not effects.ordered:
            shown = listing(map(repr, effects.levels), 5)
            remedy = (
                "they are numbers as text, so convert them with pandas.to_numeric and write C()"
                if level_numbers(effects.levels)
                else "make it an ordered pd.Categorical, or write C(f, levels=[...])"
            )
            raise DataError(
                f"the random term {effects.label} needs a factor whose levels have an order, "
                f"and those of {effects.factor!r} ({shown}) are only sorted as text: {remedy}"
            )
        return super().prepare(effects)


class _Lagged(_Ordered):
    """A correlation that depends on the lag, the number of steps between two levels.

    Steps are those of the levels that the factor was declared to have, ``C(t, levels=[...])`` or
    the categories of a pandas categorical, whether they occur or not; else of those that occur.
    """

    places: tuple[int, ...]
    uneven: str

    def prepare(self, effects: Effects) -> Covariance:
        """See `Covariance`; says in `uneven` if levels that are numbers are not evenly spaced."""
        super().prepare(effects)
        q = len(effects.names)
        places = tuple(range(q)) if effects.places is None else effects.places
        uneven = ""
        if not effects.declared and not _evenly_spaced(effects.levels or (), places):
            uneven = (
                f"the levels of {effects.factor!r} are not equally far apart "
                f"({listing(effects.levels or (), 6)}), and {self.name!r} in {effects.label} "
                "takes those next to each other as one step apart: 'ou' goes by the distance "
                "between numbers, or declare the steps with C(f, levels=[...])"
            )
        consecutive = all(b - a == 1 for a, b in pairwise(places))
        places = () if consecutive else places
        return replace(self, places=places, uneven=uneven)  # type: ignore[type-var]

    def _lags(self, q: int) -> np.ndarray:
        """Return the lags of all pairs of effects, (q, q)."""
        if not self.places:
            return _lags(q)
        places = np.array(self.places, dtype=np.int32)
        return np.abs(places[:, None] - places)


@dataclass(frozen=True)
class Autoregressive(_Lagged):
    """First-order autoregression: ``rho = tanh(x)`` to the power of the lag.

    Args:
        hom: whether the effects share one variance.
        places: (q,) the steps at which the effects are, where there are gaps; found by `prepare`.
        uneven: what is to be said of levels that are not evenly spaced; likewise.
    """

    hom: bool = True
    places: tuple[int, ...] = ()
    uneven: str = field(default="", compare=False, repr=False)

    @property
    def name(self) -> str:
        """`"ar1"` or `"hetar1"`."""
        return "ar1" if self.hom else "hetar1"

    @property
    def _common(self) -> bool:
        return self.hom

    def _n_correlations(self, q: int) -> int:
        return 1

    def _correlations(self, x: Array, q: int) -> Array:
        return jnp.tanh(x)

    def _correlation_matrix(self, natural: Array, q: int) -> Array:
        # Products, because the derivatives of `rho ** lag` are not defined at zero.
        lags = self._lags(q)
        powers = jnp.cumprod(jnp.broadcast_to(natural, int(lags.max())))
        return _by_lag(powers, lags)

    def _x_of(self, mean: Callable[[np.ndarray], float], q: int) -> np.ndarray:
        lags = self._lags(q)
        least = int(lags[lags > 0].min())
        rho = mean(lags == least)
        return np.array([_atanh(np.sign(rho) * np.abs(rho) ** (1.0 / least))])

    def _correlation_labels(self, q: int) -> tuple[str, ...]:
        return ("cor(lag 1)",)


@dataclass(frozen=True)
class Toeplitz(_Lagged):
    """One correlation per lag that occurs, free but for positive definiteness.

    Autocorrelations are positive definite if and only if all partial autocorrelations lie in
    (-1, 1) (Barndorff-Nielsen and Schou, 1973, "On the parametrization of autoregressive models
    by partial autocorrelations", Journal of Multivariate Analysis 3, 408-419). Those are tanh of
    the parameters; the recursion of Durbin (1960, "The fitting of time-series models", Revue de
    l'Institut International de Statistique 28, 233-244) gives the autocorrelations.  Where gaps
    between the levels leave a lag out, its partial autocorrelation is zero.

    Args:
        hom: whether the effects share one variance.
        places: (q,) the steps at which the effects are, where there are gaps; found by `prepare`.
        uneven: what is to be said of levels that are not evenly spaced; likewise.
    """

    hom: bool = False
    places: tuple[int, ...] = ()
    uneven: str = field(default="", compare=False, repr=False)

    @property
    def name(self) -> str:
        """`"toep"` or `"homtoep"`."""
        return "homtoep" if self.hom else "toep"

    @property
    def _common(self) -> bool:
        return self.hom

    def _occurring(self, q: int) -> np.ndarray:
        """Return the lags that occur, ascending, (k,)."""
        return np.unique(self._lags(q))[1:]

    def _n_correlations(self, q: int) -> int:
        return len(self._occurring(q))

    def _correlations(self, x: Array, q: int) -> Array:
        if not self.places:
            return _autocorrelations(jnp.tanh(x))
        at = self._occurring(q) - 1
        partial = jnp.zeros(int(at[-1]) + 1, x.dtype).at[at].set(jnp.tanh(x))
        return _autocorrelations(partial)[at]

    def _correlation_matrix(self, natural: Array, q: int) -> Array:
        lags = self._lags(q)
        return _by_lag(natural, np.searchsorted(np.unique(lags), lags).astype(np.int32))

    def _x_of(self, mean: Callable[[np.ndarray], float], q: int) -> np.ndarray:
        lags, occurring = self._lags(q), self._occurring(q)
        found = np.array([mean(lags == lag) for lag in occurring])
        if np.isnan(found[:1]).all():
            return np.full(len(found), np.nan)
        rho = np.full(int(occurring[-1]), np.nan)
        rho[occurring - 1] = np.nan_to_num(found)
        return np.array([_atanh(p) for p in _partial_autocorrelations(rho)[occurring - 1]])

    def _correlation_labels(self, q: int) -> tuple[str, ...]:
        return tuple(f"cor(lag {lag})" for lag in self._occurring(q))


@dataclass(frozen=True)
class OrnsteinUhlenbeck(_Ordered):
    """One variance, and a correlation that decays with the distance in time.

    The parameter is the logit of the correlation at the median gap between neighbouring times, so
    the start does not depend on the unit of time; `values` has the rate per unit of time.

    Args:
        times: (q,) the levels as numbers; found by `prepare`.
    """

    times: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        """`"ou"`."""
        return "ou"

    def prepare(self, effects: Effects) -> Covariance:
        """See `Covariance`."""
        super().prepare(effects)
        assert effects.levels is not None
        times = level_numbers(effects.levels)
        if times is None:
            raise DataError(
                f"the random term {effects.label} needs levels that are times, and those of "
                f"{effects.factor!r} ({listing(map(repr, effects.levels), 5)}) are not numbers: "
                "make a numeric column of times and write C(), or for arrays give the times as "
                "z_names; 'ar1' needs an order only"
            )
        return replace(self, times=times)

    def _gap(self) -> float:
        return float(np.median(np.diff(np.sort(self.times))))

    def _distances(self) -> np.ndarray:
        times = np.asarray(self.times)
        return np.abs(times[:, None] - times)

    def _n_correlations(self, q: int) -> int:
        return 1

    def _correlations(self, x: Array, q: int) -> Array:
        return jax.nn.softplus(-x) / self._gap()

    def _correlation_matrix(self, natural: Array, q: int) -> Array:
        return jnp.exp(-natural[0] * jnp.asarray(self._distances(), natural.dtype))

    def _x_of(self, mean: Callable[[np.ndarray], float], q: int) -> np.ndarray:
        order = np.argsort(self.times)
        rates, gaps = [], np.diff(np.asarray(self.times)[order])
        for i, j, gap in zip(order[:-1], order[1:], gaps, strict=True):
            pair = np.zeros((q, q), dtype=bool)
            pair[i, j] = True
            rates.append(-np.log(np.clip(mean(pair), 1e-12, _NEAR_ONE)) / gap)
        rate = np.median(rates) if not np.isnan(rates).any() else np.nan
        return np.array([-np.log(np.expm1(rate * self._gap()))])

    def _correlation_labels(self, q: int) -> tuple[str, ...]:
        return ("rate",)


def _positive(variances: np.ndarray) -> np.ndarray:
    """Variances without zeros: a standard deviation of zero is where its derivative vanishes."""
    variances = np.asarray(variances, dtype=float)
    largest = variances.max()
    return np.maximum(variances, 0.01 * largest) if largest > 0.0 else np.ones(len(variances))


def _root_mean_square(sd: np.ndarray) -> float:
    return float(np.sqrt(np.mean(sd**2)))


def _sd_labels(names: tuple[str, ...], common: bool) -> tuple[str, ...]:
    return ("sd",) if common else tuple(f"sd({name})" for name in names)


def _atanh(r: float) -> float:
    return float(np.arctanh(np.clip(r, -_NEAR_ONE, _NEAR_ONE)))


def _centre(q: int) -> float:
    """Shift that makes the correlation of compound symmetry zero at zero."""
    return float(np.arctanh(2.0 / q - 1.0))


def _lags(q: int) -> np.ndarray:
    # 32 bits: JAX remembers the type of an array that is kept, and 64 bits may not be on later.
    i, j = np.indices((q, q), dtype=np.int32)
    return np.abs(i - j)


def _by_lag(correlations: Array, lags: np.ndarray) -> Array:
    """Return the matrix (q, q) with the given correlations at lags (q, q) from 1 on."""
    one = jnp.ones(1, correlations.dtype)
    return jnp.concatenate([one, correlations])[lags]


def _evenly_spaced(levels: Sequence[Any], places: Sequence[int]) -> bool:
    """Whether levels that are numbers or dates are as far apart as their places; others pass."""
    numbers, tolerance = level_numbers(levels), _UNEQUAL
    if numbers is None and all(isinstance(level, date) for level in levels):
        numbers, tolerance = tuple(t.toordinal() for t in levels), _UNEQUAL_DATES
    if numbers is None or len(numbers) < 3:
        return True
    steps = np.diff(numbers) / np.diff(places)
    return bool(steps.max() <= steps.min() * (1.0 + tolerance))


_Carry = tuple[Array, Array, Array]


def _autocorrelations(partial: Array) -> Array:
    """Return autocorrelations (q - 1,) from partial ones by the recursion of Durbin and Levinson.

    With ``phi`` the coefficients of the best linear prediction from the last k values and v its
    variance, ``rho_(k+1) = phi_k rho_1 + ... + phi_1 rho_k + v partial_(k+1)``.
    """
    n = len(partial)

    # A loop, because compiling the derivatives of n steps written out takes minutes for n = 30.
    def step(carry: _Carry, k: Array) -> tuple[_Carry, None]:
        phi, rho, variance = carry
        p = partial[k]
        # The first k entries in reverse; all after them are zero and stay so.
        phi_back, rho_back = (jnp.roll(a[::-1], k - n) for a in (phi, rho))
        rho = rho.at[k].set(phi @ rho_back + variance * p)
        phi = (phi - p * phi_back).at[k].set(p)
        return (phi, rho, variance * (1.0 - p**2)), None

    zeros = jnp.zeros_like(partial)
    steps = jnp.arange(n, dtype=jnp.int32)
    (_, rho, _), _ = jax.lax.scan(step, (zeros, zeros, jnp.ones((), partial.dtype)), steps)
    return rho


def _partial_autocorrelations(rho: np.ndarray) -> np.ndarray:
    """Undo `_autocorrelations`; values next to 1 stand for what no stationary process has.

    An autocorrelation that is NaN is as those before it predict.
    """
    rho = np.array(rho, dtype=float)
    phi, partial = np.zeros(0), np.zeros(len(rho))
    variance = 1.0
    for k in range(len(rho)):
        predicted = phi @ rho[:k][::-1]
        rho[k] = predicted if np.isnan(rho[k]) else rho[k]
        rest = rho[k] - predicted
        # Once the prediction is perfect, later values have no effect.
        p = np.clip(rest / variance, -_NEAR_ONE, _NEAR_ONE) if variance > 1e-14 else 0.0
        partial[k] = p
        phi = np.append(phi - p * phi[::-1], p)
        variance *= 1.0 - p**2
    return partial


class _WithHom(Protocol):
    def __call__(self, *, hom: bool) -> Covariance: ...


# The families that take `hom=`; without it each is as its class is by default.
_FAMILIES: dict[str, _WithHom] = {
    "diag": Diagonal,
    "cs": CompoundSymmetry,
    "ar1": Autoregressive,
    "toep": Toeplitz,
}
_STRUCTURES: dict[str, Covariance] = {
    structure.name: structure
    for structure in (
        Unstructured(),
        Diagonal(),
        Diagonal(hom=True),
        CompoundSymmetry(),
        CompoundSymmetry(hom=True),
        Autoregressive(),
        Autoregressive(hom=False),
        Toeplitz(),
        Toeplitz(hom=True),
        OrnsteinUhlenbeck(),
    )
}
_ALIASES = {"id": "homdiag", "csh": "cs", "ar1h": "hetar1", "toeph": "toep"}
NAMES = (*_STRUCTURES, *_ALIASES)


def covariance(structure: str | Covariance, *, hom: bool | None = None) -> Covariance:
    """Return a covariance structure by name, or the given object.

    Args:
        structure: a name, see the table above, or an object.
        hom: whether the effects share one variance; for "diag", "cs", "ar1" and "toep".

    Raises:
        TypeError: if it is neither a name nor a `Covariance`.
        ValueError: for an unknown name, a structure of yours named like one of these, or `hom`
            where it has no meaning.

    Example:
        >>> covariance("ar1").n_parameters(5), covariance("ar1", hom=False).n_parameters(5)
        (2, 6)
        >>> covariance("cs", hom=True).name
        'homcs'
    """
    if isinstance(structure, Covariance):
        if hom is not None:
            raise ValueError("hom= goes with the name of a structure, not with an object")
        known = _STRUCTURES.get(_ALIASES.get(structure.name, structure.name))
        if known is not None and type(known) is not type(structure):
            raise ValueError(
                f"{type(structure).__name__} has the name {structure.name!r} of another covariance "
                "structure: choose one of its own"
            )
        if not structure.name.isidentifier():
            raise ValueError(
                f"the name {structure.name!r} of {type(structure).__name__} is not a plain word"
            )
        return structure
    if not isinstance(structure, str):
        raise TypeError(
            f"covariance must be a name or a Covariance object, not {type(structure).__name__}"
        )
    if structure not in NAMES:
        raise ValueError(
            f"unknown covariance structure {structure!r}: choose one of "
            f"{', '.join(map(repr, NAMES))}"
        )
    if hom is not None:
        if structure not in _FAMILIES:
            raise ValueError(
                f"covariance structure {structure!r} takes no `hom`; "
                f"{', '.join(map(repr, _FAMILIES))} do"
            )
        return _FAMILIES[structure](hom=hom)
    return _STRUCTURES[_ALIASES.get(structure, structure)]


def canonical(structure: str | Covariance) -> str | Covariance:
    """Return the name of a structure that is as its name says, else the object."""
    found = covariance(structure)
    return found.name if _STRUCTURES.get(found.name) == found else found


def matrix_at(structure: Covariance, theta: Any, q: int, of: Function = "matrix") -> np.ndarray:
    """Return the covariance of a structure at theta (k,) in double precision, (q, q)."""
    return _derivative(structure, of, theta, q, 0)


def values_at(structure: Covariance, theta: Any, q: int) -> np.ndarray:
    """Return the values that a structure reports at theta (k,) in double precision, (k,)."""
    return _derivative(structure, "values", theta, q, 0)


def known_by_values(structure: Covariance) -> bool:
    """Return whether a structure tells its covariance by its values."""
    return type(structure).of_values is not Covariance.of_values


def undefined(structure: Covariance, values: np.ndarray, q: int) -> np.ndarray:
    """Return which correlations and rates have no value, for the variances are zero, (k,)."""
    is_sd = np.asarray(structure.is_sd(q), dtype=bool)
    if known_by_values(structure):
        return ~is_sd & ~np.any(slopes(structure, values, q, of="of_values"), axis=(0, 1))
    return np.isnan(values) | (is_sd.any() & ~is_sd & ~np.any(values[is_sd]))


def slopes(structure: Covariance, theta: Any, q: int, of: Function = "matrix") -> np.ndarray:
    """Return the derivatives (..., k) of a function of theta (k,), in double precision.

    Of the covariance by its values theta is these values.
    """
    return _derivative(structure, of, theta, q, 1)


def bends(structure: Covariance, theta: Any, q: int, of: Function = "matrix") -> np.ndarray:
    """Return the second derivatives (..., k, k) of a function of theta (k,), likewise."""
    return _derivative(structure, of, theta, q, 2)


def _derivative(structure: Covariance, of: Function, theta: Any, q: int, order: int) -> np.ndarray:
    with computing(), compilation_cache():
        return np.asarray(_compiled(structure, of, q, order)(np.asarray(theta, float)))


@cache
def _compiled(structure: Covariance, of: Function, q: int, order: int) -> Compiled:
    """Compile a derivative as a whole: its operations one by one are dozens of compilations."""

    def function(theta: Array) -> Array:
        found: Array = getattr(structure, of)(theta, q)
        return found

    for _ in range(order):
        function = jax.jacfwd(function)
    return Compiled(function)
