"""Responses drawn from a fitted model, row by row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
import pandas as pd

from .inference.arguments import as_fit
from .options import choose

if TYPE_CHECKING:
    from .results import Fit

RandomEffects = Literal["new", "conditional"]
RANDOM_EFFECTS: tuple[RandomEffects, ...] = get_args(RandomEffects)


def simulate(
    fit: Fit, n: int = 1, seed: int = 0, random_effects: RandomEffects = "new"
) -> pd.DataFrame:
    """Draw responses for the rows of a fit from the fitted model.

    Args:
        fit: the fitted model, with any random terms, weights, offset or relationship matrices.
        n: number of responses.
        seed: of the random numbers.  A column depends on the seed and its position only, so the
            first columns are the same for every ``n``.
        random_effects: "new" draws the random effects from their distribution; "conditional" keeps
            their conditional modes, and draws residuals only.

    Returns:
        One response per column, in the units of the data, (nobs, n); the index is that of the rows
        used.

    Raises:
        ValueError: for an ``n`` or a ``random_effects`` that is not one of these.

    Example:
        >>> import lmmax
        >>> fit = lmmax.fit("Yield ~ 1 + (1 | Batch)", lmmax.datasets.load("dyestuff"))
        >>> lmmax.simulate(fit, n=3, seed=1).shape
        (30, 3)
        >>> again = fit.refit(lmmax.simulate(fit, seed=1)[0])
        >>> again.converged
        True
    """
    as_fit(fit)
    check_count(n, "n")
    check_seed(seed)
    responses = np.empty((n, fit.nobs))
    for row, response in zip(responses, draws(fit, 0, n, seed, random_effects), strict=True):
        row[:] = response
    return pd.DataFrame(responses.T, index=fit.design.index, columns=range(n))


def draws(
    fit: Fit, start: int, stop: int, seed: int, random_effects: RandomEffects = "new"
) -> Iterator[np.ndarray]:
    """Yield the responses (nobs,) from position ``start`` to ``stop``; see :func:`simulate`."""
    random_effects = choose("random_effects", random_effects, RANDOM_EFFECTS)
    fitted = fit.fittedvalues_marginal if random_effects == "new" else fit.fittedvalues
    mean = fitted.to_numpy(float)
    sd = residual_sd(fit)
    for position in range(start, stop):
        rng = generator(seed, position)
        values = mean
        if random_effects == "new":
            values = mean + spread_effects(fit, new_effects(fit, rng))
        yield values + sd * rng.standard_normal(len(mean))


def generator(seed: int, position: int) -> np.random.Generator:
    """Return the generator of one replicate, or of one block of them."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(position,)))


def residual_sd(fit: Fit) -> np.ndarray:
    """Return the standard deviation of each row's residual, (nobs,)."""
    weights = fit.design.weights
    return np.asarray(np.sqrt(fit.scale / (np.ones(fit.nobs) if weights is None else weights)))


def new_effects(fit: Fit, rng: np.random.Generator) -> list[np.ndarray]:
    """Draw the random effects of each factor, (m, q) each."""
    root = np.sqrt(fit.estimates.scale) * fit.estimates.root
    effects = []
    for grouping, here in zip(fit.design.groupings, fit.layout.slices, strict=True):
        standard = rng.standard_normal((len(grouping.levels), here.stop - here.start))
        if grouping.root is not None:
            standard = grouping.root @ standard
        effects.append(standard @ root[here, here].T)
    return effects


def spread_effects(fit: Fit, effects: list[np.ndarray]) -> np.ndarray:
    """Return ``Z b`` for given random effects of each factor, (nobs,)."""
    total = np.zeros(fit.nobs)
    for term, block in zip(fit.terms, fit.design.blocks, strict=True):
        start = fit.layout.slices[term.factor].start
        here = slice(term.columns.start - start, term.columns.stop - start)
        codes = fit.design.groupings[term.factor].codes
        total += np.einsum("ij,ij->i", block.Z, effects[term.factor][codes, here])
    return total


def check_count(n: object, name: str) -> None:
    """Raise unless ``n`` is a whole number of at least one."""
    if not isinstance(n, int | np.integer) or isinstance(n, bool) or n < 1:
        raise ValueError(f"{name}={n!r} must be a whole number, at least 1")


def check_seed(seed: object) -> None:
    """Raise unless ``seed`` is a whole number that NumPy takes."""
    if not isinstance(seed, int | np.integer) or isinstance(seed, bool) or seed < 0:
        raise ValueError(f"seed={seed!r} must be a whole number, not negative")
