"""What the whole test session shares: a compilation cache of its own, and common fits."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import lmmax

CACHE_VARIABLE = "LMMAX_CACHE_DIR"
MOST_MAPPINGS = int(os.environ.get("LMMAX_TEST_MAPPINGS", 25_000))
"""Mappings of memory after which the compiled code of a test module is dropped."""
_own_cache = pytest.StashKey[str]()


def pytest_configure(config: pytest.Config) -> None:
    """Register markers, and keep the tests out of the user's compilation cache.

    Set before collection and in the environment, so that whatever compiles first and every
    subprocess share it; the caller may choose the directory.
    """
    config.addinivalue_line(
        "markers",
        "unoptimised: many models, each fitted a few times to small data: the library's functions "
        "are compiled in half the time, by LLVM's level 0",
    )
    # With a worker for each core, threads that wait for one another in BLAS take time from both.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    if CACHE_VARIABLE not in os.environ:
        directory = tempfile.mkdtemp(prefix="lmmax-tests-")
        config.stash[_own_cache] = directory
        os.environ[CACHE_VARIABLE] = directory


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the cache that this session made."""
    directory = config.stash.get(_own_cache, None)
    if directory is not None:
        os.environ.pop(CACHE_VARIABLE, None)
        shutil.rmtree(directory, ignore_errors=True)


@pytest.fixture(scope="module", autouse=True)
def _optimisation(request: pytest.FixtureRequest) -> Iterator[None]:
    """Compile the library's functions as for users, or quickly where the module is marked so."""
    with pytest.MonkeyPatch.context() as patch:
        if request.node.get_closest_marker("unoptimised") is not None:
            from lmmax import compilation
            from tests.compiled import UNOPTIMISED

            patch.setattr(compilation, "CPU_OPTIONS", UNOPTIMISED)
        yield


@pytest.fixture(scope="module", autouse=True)
def _few_mappings() -> Iterator[None]:
    """Let go of compiled code before a process reaches the system's limit of memory mappings.

    Every executable takes several; beyond 65,530 of them XLA aborts.  What is needed again is read
    from the disk.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MOST_MAPPINGS:
        import jax

        jax.clear_caches()


def _fit(formula: str, name: str) -> lmmax.Fit:
    # Imported late: a module that does not import shall fail its own tests, not all of them.
    import lmmax

    return lmmax.fit(formula, lmmax.datasets.load(name))


@pytest.fixture(scope="session")
def dietox_intercept() -> lmmax.Fit:
    """REML fit of a random intercept, the documented example of statsmodels."""
    return _fit("Weight ~ Time + (1 | Pig)", "dietox")


@pytest.fixture(scope="session")
def dietox_slope() -> lmmax.Fit:
    """REML fit of a correlated random intercept and slope."""
    return _fit("Weight ~ Time + (1 + Time | Pig)", "dietox")


@pytest.fixture(scope="session")
def sleepstudy_slope() -> lmmax.Fit:
    """REML fit of a correlated random intercept and slope, balanced."""
    return _fit("Reaction ~ Days + (1 + Days | Subject)", "sleepstudy")
