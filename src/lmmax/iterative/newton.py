"""The root of the estimated gradient: damped Newton steps, with more probes as they are needed."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ..compilation import Compiled
from ..parameters import unpack_symmetric
from ..solve import Status, newton_step, pivoted_factor
from .evaluation import PROBES, Evaluation, Evaluator
from .model import Model

SHARE = 0.2
"""Part of the criterion's error that the noise of the estimates may add to it."""
EARLY = 0.01
"""Newton decrement at which the first few probes have served."""
MOST_STEPPING = 16
"""Most chunks of probes that steps use for the sake of the criterion's error alone."""

_damped_step = Compiled(newton_step)
_pivoted = Compiled(pivoted_factor)


class Step(NamedTuple):
    """A Newton step from a point, in the coordinates of a pivoted root of D.

    Attributes:
        root: ``R`` with ``D = R R'``, (q, q).
        step: its change, (q, q).
        decrement: ``g'H^-1 g``.
        predicted: decrease of the criterion that the quadratic model promises.
        noise: what the gradient's noise adds to the criterion at the root, on average.
        escape: 1.0 where a zero variance should be left in the direction of negative curvature.
        D_covariance: Monte Carlo covariance of D's triangle.
    """

    root: np.ndarray
    step: np.ndarray
    decrement: float
    predicted: float
    noise: float
    escape: np.ndarray
    D_covariance: np.ndarray


def _newton_step(model: Model, point: Evaluation, damping: float) -> Step:
    q = len(model.free)
    root, pivot, inside = (np.asarray(x) for x in _pivoted(point.D, model.free))
    rows, columns = np.tril_indices(q)
    row, column = np.eye(q)[rows], np.eye(q)[columns]
    jacobian = (
        row[:, :, None] * (column @ root)[:, None] + column[:, :, None] * (row @ root)[:, None]
    ).reshape(-1, q * q) * inside.reshape(-1)
    # A diagonal entry was counted from both sides: both are its derivative.
    G = unpack_symmetric(point.gradient) * (0.5 + 0.5 * np.eye(q)) * model.free
    information = point.exact.information
    profile = 2.0 * (
        information[:-1, :-1]
        - np.outer(information[:-1, -1], information[-1, :-1]) / information[-1, -1]
    )
    free = inside.reshape(-1)
    hessian = jacobian.T @ profile @ jacobian
    hessian += np.kron(2.0 * G, np.eye(q)) * np.outer(free, free) + np.diag(1.0 - free)
    gradient = jacobian.T @ point.gradient
    step = np.asarray(_damped_step(gradient, hessian, damping))
    decrement = -float(gradient @ step) * (1.0 + damping)
    length = max(float(np.linalg.norm(step)), 1e-300)
    limit = (1.0 + float(np.linalg.norm(root))) / (1.0 + 10.0 * damping)
    bent = step @ hessian @ step < 0.0
    step = step * (limit / length if bent else min(1.0, limit / length))
    predicted = -float(gradient @ step) - 0.5 * float(step @ hessian @ step)
    # A root has columns that vanish, where the noise moves nothing.
    unit = np.sqrt(np.abs(np.diag(hessian)))
    unit = np.where(unit > 0.0, unit, 1.0)
    inverse = np.linalg.pinv(hessian / np.outer(unit, unit), hermitian=True, rcond=1e-10)
    reach = jacobian @ (inverse / np.outer(unit, unit))
    noise = jacobian.T @ point.noise @ jacobian
    curvature = np.diag(hessian)
    escape = (curvature < -1e-6 * np.max(np.abs(curvature))).reshape(q, q) * pivot
    return Step(
        root=root,
        step=step.reshape(q, q),
        decrement=decrement,
        predicted=predicted,
        noise=0.5 * float(np.sum(inverse / np.outer(unit, unit) * noise)),
        escape=escape,
        D_covariance=reach @ noise @ reach.T,
    )


def newton(
    model: Model,
    D: np.ndarray,
    target_error: float,
    tol: float,
    max_steps: int,
    max_probes: int,
) -> tuple[Evaluation, Step, Status, np.ndarray]:
    """Find the root of the estimated gradient.

    Returns:
        The last point with the step from it, how the search ended, and a row per evaluation.
    """
    evaluate = Evaluator(model)
    most = max(1, (max_probes + evaluate.rank) // PROBES)
    chunks, damping, status, promised = 1, 0.0, Status.MAX_STEPS, 0.0
    deepened = False
    point: Evaluation | None = None
    step: Step | None = None
    trial = D
    trace = []
    for _ in range(max_steps):
        new = evaluate(trial, chunks)
        usable = new.exact.scale > 0.0 and bool(np.isfinite(new.value))
        if point is None:
            accept, good = usable, True
        else:
            # Where the gain is of the size of its noise, the gradient alone decides.
            slack = 3.0 * float(np.hypot(new.error, point.error)) + 1e-9 * abs(new.value)
            gain = point.value - new.value
            accept = usable and gain >= -slack
            good = accept and gain >= 0.25 * promised - slack
        if not accept and point is None:
            point, step, status = new, _newton_step(model, new, 0.0), Status.NOT_FINITE
            break
        if accept:
            point = new
            damping = damping if good else max(2.0 * damping, 1e-3)
            damping = 0.0 if good and damping < 1e-3 else 0.1 * damping if good else damping
        else:
            damping = max(8.0 * damping, 1e-2)
        assert point is not None
        step = _newton_step(model, point, damping)
        row = (point.value, point.error, step.decrement, damping, float(accept), point.probes)
        trace.append(row)
        if not point.exact.converged or damping > 1e8:
            status = Status.STALLED
            break
        stuck = accept and step.decrement <= tol and bool(step.escape.any())
        if accept and not stuck and step.decrement <= max(tol, EARLY if chunks <= 4 else 0.0):
            wanted = _chunks(point.probes, step.noise / (SHARE * target_error), evaluate.rank)
            error = _chunks(point.probes, (point.error / target_error) ** 2, evaluate.rank)
            if error > MOST_STEPPING and not deepened:
                deepened = True
                if evaluate.deepen():
                    chunks, trial, promised = min(4, most), point.D, 0.0
                    continue
            wanted = max(wanted, min(error, MOST_STEPPING))
            wanted = min(wanted, most)
            if wanted > chunks:
                # The same covariance again, with more probes beside those it has.
                chunks, trial, promised = wanted, point.D, 0.0
                continue
            if step.decrement <= tol:
                status = Status.CONVERGED
                break
        move = 0.1 * step.escape * np.sqrt(model.noise)[:, None] if stuck else step.step
        moved = step.root + move
        trial, promised = moved @ moved.T * model.free, 0.0 if stuck else step.predicted

    assert point is not None and step is not None
    if status != Status.NOT_FINITE:
        # The step's noise is that of the probes which chose the covariance.
        error = _chunks(point.probes, (point.error / target_error) ** 2, evaluate.rank)
        if error > MOST_STEPPING and not deepened and evaluate.deepen():
            chunks = max(chunks, min(4, most))
        if len(evaluate.probes) != chunks:
            point = evaluate(point.D, chunks)
        while point.error > target_error and chunks < most:
            wanted = _chunks(point.probes, (point.error / target_error) ** 2, evaluate.rank)
            chunks = min(max(wanted, chunks + 1), most)
            point = evaluate(point.D, chunks)
    return point, step, status, np.array(trace).reshape(-1, 6)


def _chunks(probes: int, times: float, rank: int) -> int:
    """Return how many chunks hold ``times`` as many probes, and a few more."""
    return int(np.ceil((1.1 * times * probes + rank) / PROBES)) if times > 1.0 else 1
