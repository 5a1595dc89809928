"""Files that are complete or absent, whatever happens to who writes them."""

from __future__ import annotations

import os
from pathlib import Path
from uuid import uuid4


def partial_beside(path: Path) -> Path:
    """Return where what is to stand at a path is made: a name that no other process has.

    Numbers of processes repeat, on other hosts and in containers.
    """
    return path.with_name(f"{path.name}.{uuid4().hex}.partial")


def write(path: Path, content: bytes, replace: bool = True) -> None:
    """Write a file at once.

    Args:
        path: its name.
        content: what it holds.
        replace: whether it may be there.

    Raises:
        FileExistsError: if it is there and `replace` is false.
    """
    partial = partial_beside(path)
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if not replace:
            _linked(partial, path)
        else:
            os.replace(partial, path)
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
