"""Compiled code survives the process, and JAX's own settings and cache are left alone.

Most tests run in fresh processes: what matters is what a second process finds, and JAX keeps
process-wide state about its cache.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import textwrap
import threading
import timeit
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from lmmax import compilation_cache as module
from lmmax.compilation_cache import compilation_cache, status

PREAMBLE = """
import json, os, sys, time, warnings
warnings.simplefilter("error")
import jax, jax.numpy as jnp, numpy as np
from jax._src import compilation_cache as slot
from lmmax.compilation_cache import compilation_cache, status

def slow(x):
    # Nothing but compile time: unrolled, so that XLA sees every step.
    for i in range(15):
        x = jnp.sin(x @ x) + jnp.linalg.inv(x + i * jnp.eye(6))
    return x

def quick(x):
    return jnp.sin(x @ x)

def report(**values):
    now = status()
    print(json.dumps(dict(values, enabled=now.enabled, reason=now.reason, hits=now.hits,
                          writes=now.writes, entries=now.n_entries)))
"""


@pytest.fixture(autouse=True)
def own_directory(tmp_path, monkeypatch):
    """Keep the tests of this process out of the user's cache."""
    monkeypatch.setenv("LMMAX_CACHE_DIR", str(tmp_path / "cache-of-this-process"))


def run(body: str, **environment: str | None) -> dict:
    """Run the body in a new process; return what it reported. Nothing may be on stderr."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "LMMAX_", "XDG_"))}
    env["JAX_PLATFORMS"] = "cpu"
    env.update({name: value for name, value in environment.items() if value is not None})
    done = subprocess.run(
        [sys.executable, "-c", PREAMBLE + textwrap.dedent(body)],
        env=env,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    result: dict = json.loads(done.stdout)
    return result


COMPILE_INSIDE = """
f = jax.jit(quick)
x = np.eye(6)
lowered = f.lower(x)
start = time.perf_counter()
with compilation_cache():
    y = lowered.compile()(x)
seconds = time.perf_counter() - start
report(seconds=seconds, value=float(y.sum()))
"""


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A directory with the entry of one process."""
    directory = tmp_path_factory.mktemp("filled")
    run(COMPILE_INSIDE, LMMAX_CACHE_DIR=str(directory))
    return directory


def test_second_process_finds_the_code(tmp_path):
    body = COMPILE_INSIDE.replace("quick", "slow")
    first = run(body, LMMAX_CACHE_DIR=str(tmp_path))
    second = run(body, LMMAX_CACHE_DIR=str(tmp_path))
    assert (first["hits"], first["writes"], first["entries"]) == (0, 1, 1)
    assert (second["hits"], second["writes"], second["entries"]) == (1, 0, 1)
    assert second["value"] == first["value"]
    assert second["seconds"] < first["seconds"] / 3


def test_users_own_functions_are_not_cached(tmp_path):
    """Not before, not after, and not in another thread during a library call; not even functions
    slow enough, or thresholds low enough, for JAX's own cache."""
    result = run(
        """
        import threading
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        x = jnp.eye(6)
        jax.jit(lambda x: slow(x) + 1)(x)
        with compilation_cache():
            jax.jit(lambda x: x + 2)(x)
            inside = status().n_entries
            user = threading.Thread(target=lambda: jax.jit(lambda x: x + 3)(x))
            user.start()
            user.join()
        jax.jit(lambda x: x + 4)(x)
        report(inside=inside, threshold=jax.config.jax_persistent_cache_min_compile_time_secs)
        """,
        LMMAX_CACHE_DIR=str(tmp_path),
    )
    assert result["inside"] >= 1
    assert result["entries"] == result["inside"]
    assert result["threshold"] == 0.0


def test_everything_is_put_back(tmp_path):
    result = run(
        """
        before = jax.config.values
        with compilation_cache():
            with compilation_cache():
                jax.jit(lambda x: x + 1)(1.0)
            nested = slot._cache is not None
        try:
            with compilation_cache():
                raise KeyError
        except KeyError:
            pass
        report(nested=nested, same=before == jax.config.values, slot=slot._cache is None,
               initialized=slot._cache_initialized)
        """,
        LMMAX_CACHE_DIR=str(tmp_path),
    )
    assert result["nested"]
    assert result["same"]
    assert result["slot"]
    assert not result["initialized"]


def test_import_changes_no_setting():
    result = run(
        """
        import subprocess
        code = (
            "import jax, json;"
            "print(json.dumps({k: str(v) for k, v in jax.config.values.items()}))"
        )
        bare = json.loads(subprocess.check_output([sys.executable, "-c", code]))
        mine = {k: str(v) for k, v in jax.config.values.items()}
        report(changed={k: v for k, v in mine.items() if bare.get(k) != v})
        """,
        LMMAX_CACHE_DIR="off",
    )
    assert result["changed"] == {}


def test_directory_set_by_the_user_is_left_to_jax(tmp_path):
    """Whether it was set in the environment, before our first call or after it."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    body = """
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        with compilation_cache():
            jax.jit(lambda x: x * 3)(1.0)
        report()
        """
    result = run(body, LMMAX_CACHE_DIR=str(ours), JAX_COMPILATION_CACHE_DIR=str(theirs))
    assert not result["enabled"]
    assert "user configured" in result["reason"]
    assert result["entries"] == 0
    assert list(theirs.glob("jit_*"))

    late = tmp_path / "late"
    body = f"""
        with compilation_cache():
            jax.jit(lambda x: x * 4)(1.0)
        before = status().n_entries
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        jax.config.update("jax_compilation_cache_dir", {str(late)!r})
        jax.jit(lambda x: x * 5)(1.0)
        with compilation_cache():
            jax.jit(lambda x: x * 6)(1.0)
        report(before=before)
        """
    result = run(body, LMMAX_CACHE_DIR=str(ours))
    assert result["before"] == result["entries"] > 0
    assert not result["enabled"]
    assert len(list(late.glob("jit_*-cache"))) >= 2


@pytest.mark.parametrize("value", ["", "0", "off", "OFF"])
def test_can_be_turned_off(tmp_path, value):
    result = run(COMPILE_INSIDE, LMMAX_CACHE_DIR=value, XDG_CACHE_HOME=str(tmp_path))
    assert not result["enabled"]
    assert "LMMAX_CACHE_DIR" in result["reason"]
    assert not list(tmp_path.iterdir())


def test_jax_switch_is_honoured(tmp_path):
    result = run(
        COMPILE_INSIDE, LMMAX_CACHE_DIR=str(tmp_path), JAX_ENABLE_COMPILATION_CACHE="false"
    )
    assert not result["enabled"]
    assert "jax_enable_compilation_cache" in result["reason"]
    assert result["entries"] == 0


@pytest.mark.skipif(sys.platform in {"win32", "darwin"}, reason="other default directories")
def test_default_directory_is_private(tmp_path):
    result = run(COMPILE_INSIDE, XDG_CACHE_HOME=str(tmp_path))
    assert result["enabled"]
    (entry,) = (tmp_path / "lmmax" / "xla").glob("*/*.xla")
    assert jax.__version__ in entry.parent.name
    assert entry.stat().st_mode & 0o777 == 0o600
    for directory in (entry.parent, entry.parent.parent, entry.parent.parent.parent):
        assert directory.stat().st_mode & 0o777 == 0o700


def test_file_in_place_of_the_directory(tmp_path):
    """Silent, apart from status()."""
    obstacle = tmp_path / "file"
    obstacle.write_text("")
    result = run(COMPILE_INSIDE, LMMAX_CACHE_DIR=str(obstacle))
    assert not result["enabled"]
    assert "cannot write" in result["reason"]


def test_home_of_an_unknown_user(monkeypatch):
    monkeypatch.setenv("LMMAX_CACHE_DIR", "~no-such-user-here/cache")
    with compilation_cache():
        pass
    assert not status().enabled
    assert "no-such-user-here" in status().reason


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="needs POSIX permissions")
def test_directory_that_others_can_write_is_refused(filled, tmp_path):
    shutil.copytree(filled, tmp_path, dirs_exist_ok=True)
    (directory,) = (tmp_path / "xla").iterdir()
    directory.chmod(0o777)
    result = run(COMPILE_INSIDE, LMMAX_CACHE_DIR=str(tmp_path))
    assert not result["enabled"]
    assert "other users" in result["reason"]
    assert result["hits"] == 0


def test_directory_that_cannot_be_made(tmp_path):
    """Below a file nobody can make a directory, whatever the permissions."""
    (tmp_path / "file").touch()
    result = run(COMPILE_INSIDE, LMMAX_CACHE_DIR=str(tmp_path / "file" / "cache"))
    assert not result["enabled"]
    assert "cannot write" in result["reason"]


@pytest.mark.parametrize("damage", ["empty", "half", "flipped"])
def test_damaged_entry_is_replaced_without_a_warning(filled, tmp_path, damage):
    shutil.copytree(filled, tmp_path, dirs_exist_ok=True)
    (entry,) = tmp_path.glob("xla/*/*.xla")
    content = entry.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    entry.write_bytes({"empty": b"", "half": content[: len(content) // 2]}.get(damage, flipped))
    assert run(COMPILE_INSIDE, LMMAX_CACHE_DIR=str(tmp_path))["writes"] == 1
    assert run(COMPILE_INSIDE, LMMAX_CACHE_DIR=str(tmp_path))["hits"] == 1


def test_private_names_of_jax_are_where_we_expect_them():
    assert module._missing_in_jax is None


def test_reset_by_the_user_during_a_call():
    from jax.experimental.compilation_cache.compilation_cache import reset_cache

    with compilation_cache():
        reset_cache()
        assert float(jax.jit(lambda x: x + 7.5)(1.0)) == 8.5


def test_many_threads():
    """The slot is filled while any thread is inside and empty after the last."""
    if not status().enabled:
        pytest.skip(f"the cache is off in this process: {status().reason}")
    failures: list[BaseException] = []
    barrier = threading.Barrier(8)

    def work(number: int) -> None:
        try:
            barrier.wait()
            for step in range(200):
                with compilation_cache():
                    assert module._slot._cache is module._dispatcher
                    if step == 100:
                        value = jax.jit(lambda x: x * number + 0.25)(jnp.ones(number + 1))
                        assert float(value[0]) == number + 0.25
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert module._slot._cache is None
    assert module._threads_inside == 0
    assert status().writes >= 8


def test_pruning_deletes_the_least_recently_used(tmp_path):
    folder = tmp_path / "version"
    folder.mkdir()
    for i in range(6):
        (folder / f"{i}.xla").write_bytes(bytes(100))
        os.utime(folder / f"{i}.xla", (i, i))
    os.utime(folder / "0.xla", (50, 50))
    module._prune(tmp_path, 300)
    assert sorted(path.name for path in folder.iterdir()) == ["0.xla", "4.xla", "5.xla"]
    module._prune(tmp_path, 300)
    assert len(list(folder.iterdir())) == 3


def test_odd_keys_stay_inside_the_directory(tmp_path):
    store = module._Store(tmp_path)
    for key in ("../outside", "a/b", "x" * 500, "jit_f-0123"):
        assert store.get(key) is None
        store.put(key, key.encode())
        assert store.get(key) == key.encode()
    assert len(list(tmp_path.iterdir())) == 4
    assert not store.problem


def test_vanished_directory_is_reported_not_raised(tmp_path):
    store = module._Store(Path(tmp_path) / "gone")
    store.put("key", b"value")
    assert "cannot write" in store.problem
    assert store.get("key") is None


def test_cost_of_a_use():
    """About 3 microseconds on an idle machine; the bound leaves room for a busy one."""

    def use() -> None:
        with compilation_cache():
            pass

    use()
    assert min(timeit.repeat(use, number=2000, repeat=10)) / 2000 < 20e-6


def test_a_place_in_which_others_can_put_something_is_refused(tmp_path):
    place = tmp_path / "shared" / "cache"
    place.mkdir(parents=True, mode=0o700)
    assert module._unsafe_place(place) == ""
    for mode, which in ((0o777, place), (0o770, place), (0o777, place.parent)):
        which.chmod(mode)
        group_of_ones_own = mode == 0o770 and which.stat().st_gid == os.getuid() != 0
        found = module._unsafe_place(place)
        assert group_of_ones_own or found.startswith(f"{which} can be written by other users")
        which.chmod(0o700)
    place.parent.chmod(0o1777)  # sticky, as /tmp is
    assert module._unsafe_place(place) == ""
    link = tmp_path / "link"
    link.symlink_to(place)
    assert module._unsafe_place(link) == ""
    place.chmod(0o777)
    assert "can be written" in module._unsafe_place(link)


@pytest.mark.parametrize("how", ["writable", "link", "directory", "other user"])
def test_an_entry_that_others_can_write_is_not_read(tmp_path, monkeypatch, how):
    store = module._Store(tmp_path)
    store.put("key", b"code")
    path = store._path("key")
    assert store.get("key") == b"code"
    if how == "writable":
        path.chmod(0o620)
    elif how == "link":
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    elif how == "directory":
        path.unlink()
        path.mkdir()
    else:
        mine = os.getuid()
        monkeypatch.setattr(os, "getuid", lambda: mine + 1)
    assert store.get("key") is None
    assert store.problem.startswith(f"cannot read {path}: ")
