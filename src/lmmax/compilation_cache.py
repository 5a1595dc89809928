"""Compiled code kept on disk between processes, for the library's own calls only.

Compiling a fit takes seconds and running it takes well under a millisecond, so a process that
finds its compiled code on disk starts many times sooner. The high-level calls run inside
``with compilation_cache():``. It reads and writes a private directory of the user,

    $XDG_CACHE_HOME/lmmax (Linux: ~/.cache/lmmax, macOS: ~/Library/Caches/lmmax,
    Windows: %LOCALAPPDATA%/lmmax/Cache)  /  xla  /  <jax, jaxlib and processor>

``LMMAX_CACHE_DIR`` names another directory; empty, ``0`` or ``off`` turns the cache off. A user
who configured JAX's own persistent cache (``jax_compilation_cache_dir``) keeps exactly that, and
this module does nothing.

Why not simply JAX's settings? They can be set for one thread and one block, but JAX builds its
cache object once per process, at the first compilation that finds a directory set, and uses that
object from then on whatever the settings say (jax 0.10.2, ``jax._src.compilation_cache``). After
one library call the user's own functions would be cached in our directory, and a directory that
the user sets later would be ignored. JAX also writes entries in place, so a reader can see half
an entry and a killed process leaves a broken one that warns in every later process. Therefore an
object of our own stands in JAX's slot while at least one library call is running, and the slot is
emptied after the last one. It answers only threads that are inside such a call. What remains:
while a library call runs in one thread, a compilation in another thread bypasses a directory
which the user sets during that very call.

The slot and the compile-time threshold are private names of JAX. If a JAX release moves them, the
cache turns itself off, and :func:`status` and the tests say so.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import re
import stat
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
from jaxlib.version import __version__ as _jaxlib_version

__all__ = ["CacheStatus", "compilation_cache", "status"]

ENVIRONMENT_VARIABLE = "LMMAX_CACHE_DIR"
"""Environment variable that moves the cache or turns it off."""

MAX_BYTES = 512 * 2**20
"""Size of all entries together above which the least recently used are deleted."""

_OFF = frozenset({"", "0", "off"})
_JAX_VARIABLE = "JAX_COMPILATION_CACHE_DIR"
_SUFFIX = ".xla"
# Temporary files of processes that were killed while writing.
_PARTIAL_PREFIX = "partial-"
_DIGEST_BYTES = 16

# Typed Any: these are private names, and their absence is handled, not assumed away.
_slot: Any
_min_compile_time: Any
_missing_in_jax: str | None
try:
    from jax._src import compilation_cache as _slot
    from jax._src import config as _jax_config

    # Touch every private name that is used below, so that a change in JAX shows here.
    _ = (_slot._cache, _slot._cache_initialized)
    _min_compile_time = _jax_config.persistent_cache_min_compile_time_secs
    with _min_compile_time(_min_compile_time.value):
        pass
    _missing_in_jax = None
except (ImportError, AttributeError, TypeError) as _error:  # pragma: no cover
    _slot = _min_compile_time = None
    _missing_in_jax = str(_error)


@dataclass(frozen=True)
class CacheStatus:
    """State of the compilation cache, as :func:`status` returns it.

    Attributes:
        enabled: Whether a library call made now would use the cache.
        directory: Where the entries are; ``None`` if no directory could be determined.
        reason: Why the cache is off, or the last thing that went wrong; empty if all is well.
        hits: Compilations that this process was spared.
        writes: Entries that this process wrote.
        n_entries: Entries in the directory.
        n_bytes: Their size in bytes.
    """

    enabled: bool
    directory: Path | None
    reason: str
    hits: int
    writes: int
    n_entries: int
    n_bytes: int


class _Store:
    """Entries in one directory; errors of the file system mean "not cached", never an exception.

    An entry is a digest followed by the bytes that JAX gave. The digest turns a damaged file into
    a miss; otherwise JAX would warn about it in every process.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.problem = ""
        self.hits = 0
        self.writes = 0
        self._pruned = False

    def _path(self, key: str) -> Path:
        # JAX builds the key from the function's name and a hash of all that matters.
        name = key if re.fullmatch(r"[\w.-]{1,200}", key) else _digest(key.encode()).hex()
        return self.directory / (name + _SUFFIX)

    def get(self, key: str) -> bytes | None:
        path = self._path(key)
        try:
            content = _own_bytes(path)
        except FileNotFoundError:
            return None
        except OSError as error:
            self.problem = f"cannot read {path}: {error}"
            return None
        digest, value = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
        if digest != _digest(value):
            with contextlib.suppress(OSError):
                path.unlink()
            return None
        self.hits += 1
        with contextlib.suppress(OSError):
            os.utime(path)  # marks the entry as used, for pruning
        return value

    def put(self, key: str, value: bytes) -> None:
        try:
            # Renamed into place, so that other processes see a whole entry or none.
            handle, partial = tempfile.mkstemp(prefix=_PARTIAL_PREFIX, dir=self.directory)
            try:
                with os.fdopen(handle, "wb") as stream:
                    stream.write(_digest(value) + value)
                os.replace(partial, self._path(key))
            except BaseException:
                os.unlink(partial)
                raise
            self.writes += 1
            if not self._pruned:
                self._pruned = True
                _prune(self.directory.parent, MAX_BYTES)
        except OSError as error:
            self.problem = f"cannot write to {self.directory}: {error}"


class _Dispatcher:
    """What stands in JAX's slot: passes on to the store of the calling thread, if it has one."""

    _path = "lmmax"  # JAX logs this name when its cache is reset.

    def get(self, key: str) -> bytes | None:
        store = _local.store
        return None if store is None else store.get(key)

    def put(self, key: str, value: bytes) -> None:
        store = _local.store
        if store is not None:
            store.put(key, value)

    def clear(self) -> None:
        """Do nothing: entries of other processes are not this one's to delete."""


class _Local(threading.local):
    depth: int = 0
    store: _Store | None = None
    threshold: Any = None


_local = _Local()
_dispatcher = _Dispatcher()
_lock = threading.Lock()
_threads_inside = 0
# Per value of the environment variable: the store, or why there is none.
_resolved: dict[str | None, tuple[_Store | None, str, Path | None]] = {}


def _digest(value: bytes) -> bytes:
    return hashlib.blake2b(value, digest_size=_DIGEST_BYTES).digest()


def _default_root() -> Path | None:
    """Return the platform's cache directory for this library, or None without a home."""
    try:
        if sys.platform == "win32":
            local = os.environ.get("LOCALAPPDATA")
            base = Path(local) if local else Path.home() / "AppData" / "Local"
            return base / "lmmax" / "Cache"
        if sys.platform == "darwin":
            return Path.home() / "Library" / "Caches" / "lmmax"
        configured = os.environ.get("XDG_CACHE_HOME", "")
        # A relative XDG_CACHE_HOME is to be ignored, says the specification.
        base = Path(configured) if os.path.isabs(configured) else Path.home() / ".cache"
        return base / "lmmax"
    except RuntimeError:
        return None


def _processor() -> str:
    """Return a short name of the processor's instruction set.

    Code compiled for one processor may not run on another, and a home directory can be shared by
    different machines.
    """
    features = ""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as stream:
            for line in stream:
                if line.startswith(("flags", "Features")):
                    features = " ".join(sorted(line.partition(":")[2].split()))
                    break
    except OSError:
        features = platform.processor()  # starts a process on some systems, hence the fallback
    digest = hashlib.blake2b(features.encode(), digest_size=4).hexdigest()
    return f"{platform.machine() or 'unknown'}-{digest}"


def _resolve(setting: str | None) -> tuple[_Store | None, str, Path | None]:
    """Make the directory for a value of the environment variable."""
    if setting is not None and setting.strip().lower() in _OFF:
        return None, f"turned off by {ENVIRONMENT_VARIABLE}", None
    try:
        root = Path(setting).expanduser() if setting else _default_root()
    except RuntimeError as error:  # "~name" of an unknown user
        return None, f"{ENVIRONMENT_VARIABLE}={setting}: {error}", None
    if root is None:
        return None, f"no home directory; set {ENVIRONMENT_VARIABLE}", None
    versions = f"jax-{jax.__version__}-{_jaxlib_version}-{_processor()}"
    directory = root.absolute() / "xla" / versions
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        directory.parent.mkdir(mode=0o700, exist_ok=True)
        directory.mkdir(mode=0o700, exist_ok=True)
        if problem := _unsafe_place(root) or _unsafe(directory.parent) or _unsafe(directory):
            return None, problem, directory
        with tempfile.TemporaryFile(prefix=_PARTIAL_PREFIX, dir=directory):
            pass
    except OSError as error:
        return None, f"cannot write to {directory}: {error}", directory
    return _Store(directory), "", directory


def _unsafe(directory: Path) -> str:
    """Return why code from this directory must not be run, or an empty string.

    Entries are machine code: whoever can write them can run code as this user.
    """
    if not hasattr(os, "getuid"):
        return ""
    info = directory.lstat()
    if not stat.S_ISDIR(info.st_mode):
        return f"{directory} is not a directory"
    if info.st_uid != os.getuid():
        return f"{directory} belongs to another user"
    if info.st_mode & 0o022:
        return f"{directory} can be written by other users; run: chmod go-w {directory}"
    return ""


def _unsafe_place(root: Path) -> str:
    """Return why what is in a directory may be put there by others, or an empty string.

    Whoever can write a directory can rename what is in it, and put something else in its place, in
    all directories above as well; but not if it is sticky, as /tmp is.
    """
    if not hasattr(os, "getuid"):
        return ""
    trusted = (os.getuid(), 0)
    real = Path(os.path.realpath(root))
    for directory in (real, *real.parents):
        info = directory.stat()
        if info.st_uid not in trusted:
            return f"{directory} belongs to another user, who can replace what is in it"
        # A group with the number of its user is that user's alone, by custom.
        others = 0o002 if info.st_gid == info.st_uid == os.getuid() != 0 else 0o022
        if info.st_mode & others and not info.st_mode & stat.S_ISVTX:
            return (
                f"{directory} can be written by other users, who can replace what is in it; run: "
                f"chmod go-w {directory}, or set {ENVIRONMENT_VARIABLE} to a directory of your own"
            )
    return ""


def _own_bytes(path: Path) -> bytes:
    """Return the contents of a file that this user alone could write.

    Raises:
        OSError: for a link, what is no file, and a file of another user.
    """
    if not hasattr(os, "getuid"):
        return path.read_bytes()
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        info = os.fstat(file.fileno())
        if not stat.S_ISREG(info.st_mode):
            raise OSError("it is no file")
        if info.st_uid != os.getuid():
            raise PermissionError("it belongs to another user")
        if info.st_mode & 0o022:
            raise PermissionError("it can be written by other users")
        return file.read()


def _prune(root: Path, max_bytes: int) -> None:
    """Delete the least recently used entries below root until max_bytes hold the rest."""
    entries = []
    for path in root.glob("*/*"):
        try:
            info = path.stat()
        except OSError:
            continue
        entries.append((info.st_mtime, info.st_size, path))
    excess = sum(size for _, size, _ in entries) - max_bytes
    for _, size, path in sorted(entries):
        if excess <= 0:
            break
        try:
            path.unlink()
        except OSError:
            continue
        excess -= size


def _reason_to_stand_aside() -> str:
    """Return which setting of the user's forbids our cache, or an empty string."""
    if _missing_in_jax is not None:
        return f"this version of JAX keeps its cache elsewhere ({_missing_in_jax})"
    # JAX adds its options to this object at run time, unseen by type checkers.
    config: Any = jax.config
    if _JAX_VARIABLE in os.environ or config.jax_compilation_cache_dir is not None:
        return "the user configured JAX's own persistent compilation cache"
    if not config.jax_enable_compilation_cache:
        return "jax_enable_compilation_cache is off"
    if _slot._cache is not None and _slot._cache is not _dispatcher:
        return "JAX's own persistent compilation cache is in use"
    return ""


def _lookup() -> tuple[_Store | None, str, Path | None]:
    setting = os.environ.get(ENVIRONMENT_VARIABLE)
    found = _resolved.get(setting)
    if found is None:
        with _lock:
            found = _resolved.get(setting)
            if found is None:
                found = _resolved[setting] = _resolve(setting)
    return found


def _open(local: _Local, store: _Store) -> None:
    global _threads_inside
    # Without this JAX would keep only what took longer than a second to compile.
    local.threshold = _min_compile_time(0.0)
    local.threshold.__enter__()
    local.store = store
    with _lock:
        _threads_inside += 1
        if _slot._cache is None:
            _slot._cache = _dispatcher
            _slot._cache_initialized = True


def _close(local: _Local) -> None:
    global _threads_inside
    with _lock:
        _threads_inside -= 1
        if _threads_inside == 0 and _slot._cache is _dispatcher:
            _slot._cache = None
            _slot._cache_initialized = False
    local.store = None
    local.threshold.__exit__(None, None, None)
    local.threshold = None


class _Scope:
    """The context manager. All state is per thread, so one object serves every use."""

    __slots__ = ()

    def __enter__(self) -> None:
        local = _local
        if local.depth == 0 and not _reason_to_stand_aside():
            store = _lookup()[0]
            if store is not None:
                _open(local, store)
        local.depth += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        local = _local
        local.depth -= 1
        if local.depth == 0 and local.store is not None:
            _close(local)


_scope = _Scope()


def compilation_cache() -> _Scope:
    """Return a context manager under which compiled code is kept on disk.

    It may be nested, used in several threads at once, and costs a few microseconds. Whatever
    goes wrong with the directory means only that nothing is cached; :func:`status` tells.

    Examples:
        >>> import jax
        >>> from lmmax.compilation_cache import compilation_cache
        >>> with compilation_cache():
        ...     float(jax.jit(lambda x: 2 * x)(3.0))
        6.0
    """
    return _scope


def status() -> CacheStatus:
    """Return whether the cache is used, where it is, and what is in it.

    Examples:
        >>> from lmmax.compilation_cache import status
        >>> status().hits >= 0
        True
    """
    store, problem, directory = _lookup()
    reason = _reason_to_stand_aside()
    n_entries = n_bytes = 0
    if store is not None:
        for path in store.directory.glob("*" + _SUFFIX):
            try:
                n_bytes += path.stat().st_size
            except OSError:
                continue
            n_entries += 1
    return CacheStatus(
        enabled=store is not None and not reason,
        directory=directory,
        reason=reason or problem or (store.problem if store else ""),
        hits=store.hits if store else 0,
        writes=store.writes if store else 0,
        n_entries=n_entries,
        n_bytes=n_bytes,
    )
