"""One run at a time where results are kept.

A claim is a lock of the operating system on a small file.  It ends with its process, however that
ends, so that none is ever left over; it holds among all hosts that share the file system, if that
has locks.  Where it has none, runs are not kept apart, and what ties results to their work
(:mod:`lmmax.batch.seals`) still keeps them from taking each other's.
"""

from __future__ import annotations

import errno
import os
import socket
import sys
import time
import weakref
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from threading import Lock

PATIENCE = 60.0
"""Seconds that a run that goes on with results waits for another one to end.

A job that is started again often meets the end of the one before.
"""
POLL = 0.05
"""Seconds between two looks."""
HELD = {errno.EACCES, errno.EAGAIN}
"""What the system answers if another process has the lock."""
WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL}
"""What file systems without locks answer."""


class ClaimedError(Exception):
    """Another run has claimed it; the message says which."""


class Claim:
    """The right to write somewhere, of one run among all processes and threads.

    Attributes:
        path: of the file that is locked; it is there while the claim is held.
        exclusive: whether it is locked, and not only held for want of locks.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.exclusive = path, False
        self._process = os.getpid()
        self._close: weakref.finalize[[int], Claim] | None = None

    def take(self, patience: float = 0.0) -> None:
        """Claim it.

        Args:
            patience: seconds to wait if another run has.

        Raises:
            ClaimedError: if it has, and keeps it.
            OSError: if the file cannot be written.
        """
        until = time.monotonic() + patience
        while not self._taken():
            if time.monotonic() >= until:
                raise ClaimedError(self._holder())
            time.sleep(POLL)

    def release(self) -> None:
        """End the claim, if it is held."""
        if self._close is None:
            return
        with _GUARD:
            _HERE.pop(os.path.realpath(self.path), None)
            # Before the lock goes: who gets that sees that the file has gone.
            with suppress(OSError):
                self.path.unlink()
            self._close()
            self._close, self.exclusive = None, False

    def _taken(self) -> bool:
        key = os.path.realpath(self.path)
        with _GUARD:
            if _held_here(key):
                return False
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            close = weakref.finalize(self, os.close, file)
            try:
                locked = _locked(file)
                taken = locked is not False and _is_at(file, self.path)
                if taken:
                    since = datetime.now().astimezone().isoformat(" ", "seconds")
                    text = f"process {self._process} on {socket.gethostname()}, since {since}"
                    os.ftruncate(file, 0)
                    os.write(file, text.encode())
            except BaseException:
                close()
                raise
            if not taken:
                close()
                return False
            self._close, _HERE[key], self.exclusive = close, self, locked is True
            return True

    def _holder(self) -> str:
        with _GUARD:
            # A process that closes a file loses its locks on it: one's own is not opened again.
            if _held_here(os.path.realpath(self.path)):
                return "another run in this process"
            try:
                return self.path.read_text() or "another process"
            except OSError:
                return "another process"


_HERE: weakref.WeakValueDictionary[str, Claim] = weakref.WeakValueDictionary()
_GUARD = Lock()


def _held_here(key: str) -> bool:
    """Return whether a run in this process has the claim: locks do not keep its threads apart."""
    holder = _HERE.get(key)
    # A forked process has a copy of the table, and no claims.
    return holder is not None and holder._process == os.getpid()


def _is_at(file: int, path: Path) -> bool:
    """Return whether an open file is the one at a path, and not one that was there before."""
    try:
        return os.path.samestat(os.fstat(file), os.stat(path))
    except FileNotFoundError:
        return False


def _locked(file: int) -> bool | None:
    """Lock an open file; return whether that succeeded, None where there are no locks."""
    if sys.platform == "win32":
        return None
    import fcntl

    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in WITHOUT_LOCKS:
            return None
        if error.errno not in HELD:
            raise
        return False
    return True
