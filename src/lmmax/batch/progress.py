"""Progress bars, with rate and remaining time."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any


def progress_bar(count: int | None, show: bool, unit: str = "fit") -> Any:
    """Return a context whose value has ``update(n)``; a bar of tqdm's if it is to be shown.

    Args:
        count: how many there are; None if that is not known.
        show: whether to show it.
        unit: what is counted.
    """
    if not show:
        return nullcontext(SimpleNamespace(update=lambda n: None))
    try:
        from tqdm.auto import tqdm
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "progress=True needs tqdm, which is not installed: pip install 'lmmax[progress]'"
        ) from error

    return tqdm(total=count, unit=unit, unit_scale=True)
