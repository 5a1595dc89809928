"""Lanes that share their designs have the criterion of each by itself, derivatives included."""

from __future__ import annotations

import jax
import numpy as np
import pytest

from lmmax.compilation import Compiled
from lmmax.likelihood import derivatives
from lmmax.likelihood.grouped import GroupedProblem
from lmmax.likelihood.shared import SharedProblem, derivatives_of_lanes, pays, shared_matrix

EVALUATE = Compiled(derivatives_of_lanes)
SINGLE = Compiled(derivatives)


@pytest.mark.parametrize(
    ("q", "pattern", "n_patterns", "order"),
    [
        (2, [0, 0, 0, 1, 1], 2, None),
        (1, [0, 0, 0], 1, (0, 1, 3, 2)),
        (3, [0, 1, 2], 3, (0, 3, 4, 1, 2)),
    ],
    ids=["the response differs", "a column of X differs", "two columns differ, in any order"],
)
def test_lanes_equal_single_problems(
    q: int, pattern: list[int], n_patterns: int, order: tuple[int, ...] | None
) -> None:
    """Against the grouped form, whose own oracles are autodiff and the dense density."""
    rng, n, w, m = np.random.default_rng(q), 3, 3, len(pattern)
    to = np.arange(w + 1) if order is None else np.array(order)
    p, c = len(to) - 1, len(to) - w
    at = np.array(pattern)
    U = np.triu(rng.normal(size=(n_patterns, q, q))).transpose(1, 2, 0)
    X, y = rng.normal(size=(q, m, w)), rng.normal(size=(n, c, q, m))
    weight, root = rng.integers(1, 4, n_patterns).astype(float), rng.normal(size=(p + 1, p + 1))
    C = root @ root.T
    common = {
        "n_obs": 100.0,
        "n_fixed": float(p),
        "n_groups": np.full(q, 50.0),
        "z_factor": np.eye(q),
        "z_inverse": np.eye(q),
        "x_inverse": np.eye(p),
        "x_logdet": 0.0,
        "beta_origin": np.zeros(p),
        "y_scale": 1.0,
        "log_weights": 0.0,
    }
    lanes = SharedProblem(
        **common,
        U=U,
        weight=weight,
        XX=shared_matrix(X, at, n_patterns),
        X=X,
        pattern=None if m == n_patterns else at,
        C=C[:w, :w],
        y=y,
        cross=np.tile(C[w:], (n, 1, 1)),
        order=order,
    )
    half = rng.normal(size=(n, q, q))
    D = half @ half.transpose(0, 2, 1)
    share = weight / np.bincount(at, minlength=n_patterns)
    for reml in (0.0, 1.0):
        with jax.enable_x64(True):
            found = jax.device_get(EVALUATE(lanes, D, reml, np.zeros(n), True))
        for i in range(n):
            rows = np.concatenate([X.transpose(0, 2, 1), y[i].transpose(1, 0, 2)], axis=1)[:, to]
            outside = C[np.ix_(to, to)]
            one = GroupedProblem(**common, U=U[:, :, at], Y=rows, weight=share[at], C=outside)
            with jax.enable_x64(True):
                expected = jax.device_get(SINGLE(one, D[i], reml, 0.0, True))
            for name, part, whole in zip(expected._fields[:-1], found, expected, strict=False):
                size = max(1.0, np.max(np.abs(whole)))
                np.testing.assert_allclose(part[i], whole, rtol=0, atol=1e-12 * size, err_msg=name)


def test_what_is_too_large_has_no_shared_matrix() -> None:
    assert pays(2, 10, 1_000)
    assert not pays(2, 50, 100_000)  # 3 x 100,000 x 1,275 numbers
    assert not pays(5, 2, 10)
