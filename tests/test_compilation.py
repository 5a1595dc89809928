"""Data of similar size reuse compiled code: no retrace, few buckets."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import lmmax
from lmmax import compilation, estimation
from lmmax.compilation import Compiled
from tests.compiled import UNOPTIMISED
from tests.simulate import simulate


def test_similar_data_options_and_criteria_share_one_executable() -> None:
    solve = estimation._compiled["newton"]

    def fit(seed: int, *, groups: int, p: int, **options: object) -> lmmax.Fit:
        sizes = np.random.default_rng(seed).integers(2, 9, groups)
        case = simulate(seed, p=p, sizes=sizes)
        return lmmax.fit_arrays(case["y"], case["X"], case["codes"], case["Z"], **options)

    first = fit(0, groups=15, p=3)
    before = solve.count()
    fit(1, groups=40, p=4, reml=False)
    fit(2, groups=64, p=3, tol=1e-8, max_steps=50, em_steps=1)
    fit(3, groups=15, p=3, covariance="diag")
    fit(4, groups=15, p=3, fix={"scale": 1.0})
    fit(5, groups=15, p=3, start=first)
    first.refit_ml()
    first.refit(first.design.y[::-1].copy())
    assert solve.count() == before


@pytest.mark.parametrize("groups", [2000, 2300, 2500])
def test_thousands_of_unequal_groups_share_a_bucket(groups: int) -> None:
    case = simulate(groups, sizes=np.full(groups, 3))
    fit = lmmax.fit_arrays(case["y"], case["X"], case["codes"], case["Z"])
    assert fit.converged
    assert fit.compression.problem.U.shape[2] in (2048, 2560)


def test_an_option_that_the_compiler_does_not_know_is_left_out(monkeypatch) -> None:
    monkeypatch.setattr(compilation, "CPU_OPTIONS", {"xla_cpu_no_such_option": True})
    double = Compiled(lambda x: 2.0 * x)
    assert float(double(jnp.ones(()))) == 2.0
    assert float(double(jnp.ones(()))) == 2.0


def test_options_are_those_of_the_moment_of_a_call(monkeypatch) -> None:
    double = Compiled(lambda x: 2.0 * x)
    for x in (1.0, 3.0):
        assert float(double(jnp.asarray(x))) == 2.0 * x
    assert double.count() == 1
    monkeypatch.setattr(compilation, "CPU_OPTIONS", UNOPTIMISED)
    assert float(double(jnp.ones(()))) == 2.0
    assert double.count() == 2


@pytest.mark.parametrize(("few", "mappings", "kept"), [(1, 4, 0), (1, 3, 2), (1000, 4, 2)])
def test_executables_are_dropped_before_a_process_has_no_mappings_left(
    monkeypatch, tmp_path: Path, few: int, mappings: int, kept: int
) -> None:
    made, most = tmp_path / "maps", tmp_path / "max_map_count"
    made.write_text(mappings * "one\n")
    most.write_text("4\n")
    monkeypatch.setattr(compilation, "FEW", few)
    monkeypatch.setattr(compilation, "MAPPINGS", (made, most))
    monkeypatch.setattr(compilation, "_every", weakref.WeakSet())
    double = Compiled(lambda x: 2.0 * x)
    for n in (1, 2):
        assert double(jnp.ones(n)).tolist() == [2.0] * n
    assert double.count() == kept
    assert double(jnp.ones(2)).tolist() == [2.0, 2.0]


def test_where_mappings_are_not_counted_nothing_is_dropped(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setattr(compilation, "FEW", 1)
    monkeypatch.setattr(compilation, "MAPPINGS", (tmp_path / "none", tmp_path / "neither"))
    double = Compiled(lambda x: 2.0 * x)
    double(jnp.ones(1))
    assert double.count() == 1


@pytest.mark.skipif(not compilation.MAPPINGS[0].exists(), reason="mappings are counted on Linux")
def test_dropped_executables_give_their_mappings_back(monkeypatch) -> None:
    made = compilation.MAPPINGS[0]
    case = simulate(0, p=3, sizes=np.full(15, 4))
    solve = Compiled(estimation._flat(estimation.newton_from_each))
    monkeypatch.setitem(estimation._compiled, "newton", solve)

    def fit() -> lmmax.Fit:
        return lmmax.fit_arrays(case["y"], case["X"], case["codes"], case["Z"])

    first, before = fit(), made.read_bytes().count(b"\n")
    solve.clear()
    gc.collect()
    assert made.read_bytes().count(b"\n") < before - 50
    assert fit().llf == first.llf


def test_other_errors_of_the_compiler_are_not_swallowed() -> None:
    fails = Compiled(lambda x: x @ x)
    with pytest.raises(ValueError, match="matmul"):
        fails(jnp.ones(()))


def test_the_options_are_known_to_the_compiler() -> None:
    """If this fails with a new jaxlib, its default code generator is in use: measure again."""
    double = Compiled(lambda x: 2.0 * x)
    double(jnp.ones(()))
    assert double._quick_works
