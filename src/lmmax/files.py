"""Files that are complete or absent, whatever happens to who writes them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4


def partial_beside(path: Path) -> Path:
    """Return where what is to stand at a path is made: a name that no other process has.

    Numbers of processes repeat, on other hosts and in containers.
    """
    return path.with_name(f"{path.name}.{uuid4().hex}.partial")


@contextmanager
def whole(path: Path, replace: bool = True) -> Iterator[BinaryIO]:
    """Open a file that stands at a path once it is written, and not at all if that fails.

    Args:
        path: its name.
        replace: whether something may be there.

    Raises:
        FileExistsError: if something is there and `replace` is false.
    """
    partial = partial_beside(path)
    try:
        with open(partial, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if replace:
            os.replace(partial, path)
        else:
            _linked(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _linked(partial: Path, path: Path) -> None:
    """Give a file a second name that nothing has."""
    try:
        os.link(partial, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        if path.exists():
            raise FileExistsError(path) from None
        os.replace(partial, path)
