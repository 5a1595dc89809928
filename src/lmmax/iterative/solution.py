"""Estimates of an iterative fit in the units and the order of the data handed over."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..parameters import unpack_symmetric
from ..solve import Status
from .evaluation import Evaluation
from .model import Model
from .newton import Step

BOUNDARY = 1e-5
"""A variance below this fraction of the sampling variance of one average level is zero."""


class IterativeSolution(NamedTuple):
    """Estimates of an iterative fit, all in the units of the data handed over.

    The k entries of the lower triangles of ``D``, row by row and factor after factor, are its
    *parameters*; ``log scale`` comes last where ``information`` has an entry for it.

    Attributes:
        D: relative covariance of each factor's effects, (q_f, q_f).
        scale: residual variance.
        beta: fixed-effects coefficients, (p,).
        beta_unscaled: ``(X'V^-1X)^-1``, their covariance divided by the scale, (p, p).
        slopes: derivatives of ``X'V^-1X`` in the parameters, (k, p, p).
        criterion: -2 log-likelihood (REML: restricted), an unbiased estimate.
        criterion_error: its Monte Carlo standard error.
        D_error: Monte Carlo standard error of each entry of D, (q_f, q_f).
        information: average information of the log-likelihood in (parameters, log scale),
            (k + 1, k + 1).
        free: which parameters were estimated, (k,).
        gradient: of the criterion, the scale profiled out, (k,).
        gradient_error: its Monte Carlo standard error, (k,).
        modes: conditional modes of each factor's effects, (m_f, q_f).
        boundary: whether each factor's covariance is singular.
        status: how the solve ended.
        steps: covariances evaluated.
        decrement: ``g'H^-1 g``: how far, in units of the criterion, a Newton step still goes.
        krylov_steps: most iterations of conjugate gradients in one solve at the end.
        probes: random probes behind the criterion.
        n_tail: number of effects that were not eliminated.
        trace: a row per evaluation: criterion, its error, decrement, damping, accepted, probes.
    """

    D: tuple[np.ndarray, ...]
    scale: float
    beta: np.ndarray
    beta_unscaled: np.ndarray
    slopes: np.ndarray
    criterion: float
    criterion_error: float
    D_error: tuple[np.ndarray, ...]
    information: np.ndarray
    free: np.ndarray
    gradient: np.ndarray
    gradient_error: np.ndarray
    modes: tuple[np.ndarray, ...]
    boundary: tuple[bool, ...]
    status: Status
    steps: int
    decrement: float
    krylov_steps: int
    probes: int
    n_tail: int
    trace: np.ndarray


def in_user_units(
    model: Model, point: Evaluation, step: Step, status: Status, trace: np.ndarray
) -> IterativeSolution:
    """Return the solution in the caller's units and order."""
    D, modes = point.D.copy(), point.exact.modes
    q = len(D)
    error = unpack_symmetric(np.sqrt(np.diag(step.D_covariance).clip(min=0.0)))
    boundary = []
    for here in model.columns:
        size = np.sqrt(model.noise[here])
        values, vectors = np.linalg.eigh(D[here, here] / np.outer(size, size))
        zero = values <= BOUNDARY
        boundary.append(bool(zero.any()))
        if zero.any():
            kept = (vectors * np.where(zero, 0.0, values)) @ vectors.T
            D[here, here] = kept * np.outer(size, size) * model.free[here, here]
    unit = model.z_scale
    D = D / np.outer(unit, unit)
    error = error / np.outer(unit, unit)

    back = np.argsort(model.order)
    entries, free = [], []
    for f in back:
        here = model.columns[f]
        for i, j in zip(*np.tril_indices(here.stop - here.start), strict=True):
            i, j = i + here.start, j + here.start
            entries.append(i * (i + 1) // 2 + j)
            free.append(model.free[i, j] > 0.0)
    rows, columns = np.tril_indices(q)
    factor = (unit[rows] * unit[columns])[entries]
    index = np.array([*entries, q * (q + 1) // 2])
    scaling = np.append(factor, 1.0)
    information = point.exact.information[np.ix_(index, index)] * np.outer(scaling, scaling)
    effects = []
    for f in back:
        here = model.columns[f]
        modes_f = modes[model.effects[f]].reshape(-1, here.stop - here.start)
        effects.append(modes_f[model.ranks[f]] / unit[here])
    return IterativeSolution(
        D=tuple(D[model.columns[f], model.columns[f]] for f in back),
        scale=point.exact.scale,
        beta=point.exact.beta,
        beta_unscaled=point.exact.beta_unscaled,
        slopes=point.exact.slopes[entries] * factor[:, None, None],
        criterion=point.value,
        criterion_error=point.error,
        D_error=tuple(error[model.columns[f], model.columns[f]] for f in back),
        information=information,
        free=np.array(free),
        gradient=point.gradient[entries] * factor,
        gradient_error=np.sqrt(np.diag(point.noise)[entries].clip(min=0.0)) * factor,
        modes=tuple(effects),
        boundary=tuple(boundary[f] for f in back),
        status=status,
        steps=len(trace),
        decrement=step.decrement,
        krylov_steps=point.exact.krylov_steps,
        probes=point.probes,
        n_tail=model.W.shape[0] - model.effects[0].stop,
        trace=trace,
    )
