"""The criterion and its slope at one covariance, from solves with the data and from probes."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..compilation import Compiled
from ..likelihood import iterative
from ..likelihood.iterative import Elimination, Probe
from .exact import KRYLOV_STEPS, PROBE_TOL, Exact, quadratic_forms
from .model import Model
from .traces import estimated_traces, worthwhile_depth

PROBES = 32
"""Columns handled together; a gather of one row of them is a few cache lines."""
BASIS = 8
"""Directions treated exactly, see :func:`lmmax.likelihood.iterative.dominant_basis`."""
FLOOR = 1e-10
"""Smallest variance evaluated, relative to the sampling variance of one average level."""

_eliminate = Compiled(iterative.eliminate)
_basis = Compiled(iterative.dominant_basis)
_probe = Compiled(iterative.probe, (4, 5))
_signs = Compiled(iterative.random_signs, (2,))


class Evaluation(NamedTuple):
    """The criterion and what a step needs at one covariance, in working units.

    Attributes:
        D: joint relative covariance, (q, q).
        value: the criterion.
        error: its Monte Carlo standard error.
        gradient: slope in the entries of D's lower triangle, the scale profiled out, (k,).
        noise: Monte Carlo covariance of the gradient, (k, k).
        exact: the rest.
        probes: random probes used.
    """

    D: np.ndarray
    value: float
    error: float
    gradient: np.ndarray
    noise: np.ndarray
    exact: Exact
    probes: int


class Evaluator:
    """Evaluates the criterion of one model, and keeps the probes of the last covariance."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.n_tail = model.W.shape[0] - model.effects[0].stop
        self.rank = min(BASIS, self.n_tail // 4)
        self.key = jax.random.key(model.seed)
        self.basis: Any = None
        self.depth = 1
        self.last: tuple[np.ndarray, Elimination, Exact] | None = None
        self.probes: list[Probe] = []

    def __call__(self, D: np.ndarray, chunks: int) -> Evaluation:
        """Evaluate at the joint covariance ``D`` with a number of chunks of probes."""
        model = self.model
        if self.last is None or not np.array_equal(D, self.last[0]):
            at = self._eliminate(D)
            self.last, self.probes = (D, at, quadratic_forms(model, at)), []
        _, at, exact = self.last
        if self.basis is None:
            # Kept from then on, so that the estimates are smooth in the covariance.
            start = jax.random.normal(self.key, (self.n_tail, self.rank), np.float64)
            self.basis = _basis(model.problem, at, start)
        for chunk in range(len(self.probes), chunks):
            # The basis takes the place of the first probes.
            lead = self.basis if chunk == 0 else self.basis[:, :0]
            key = jax.random.fold_in(self.key, chunk + 1)
            signs = _signs(key, self.basis, PROBES - lead.shape[1])
            z = jnp.concatenate([lead, signs], axis=1)
            probe = _probe(model.problem, at, z, PROBE_TOL, KRYLOV_STEPS, self.depth)
            self.probes.append(jax.tree.map(np.asarray, probe))
        estimate, slope = estimated_traces(model, at, self.probes, self.rank)
        steps = [int(probe.krylov.steps.max()) for probe in self.probes]
        solved = [bool(probe.krylov.converged.all()) for probe in self.probes]
        return Evaluation(
            D=D,
            value=exact.value + float(at.logdet) + float(estimate.mean[0]),
            error=float(np.sqrt(estimate.covariance[0, 0])),
            gradient=exact.gradient + slope + estimate.mean[1:],
            noise=estimate.covariance[1:, 1:],
            exact=exact._replace(
                krylov_steps=max(exact.krylov_steps, *steps),
                converged=exact.converged and all(solved),
            ),
            probes=PROBES * len(self.probes) - self.rank,
        )

    def deepen(self) -> bool:
        """Use more powers of E as control variates, if that is possible."""
        assert self.last is not None
        before, self.depth = self.depth, max(self.depth, worthwhile_depth(self.model, self.last[1]))
        if self.depth > before:
            self.probes = []
        return self.depth > before

    def _eliminate(self, D: np.ndarray) -> Elimination:
        roots = [
            np.linalg.cholesky(D[here, here] + FLOOR * np.diag(self.model.noise[here]))
            for here in self.model.columns
        ]
        inverses = [np.linalg.inv(root) for root in roots]
        return _eliminate(self.model.problem, tuple(roots), tuple(inverses))
