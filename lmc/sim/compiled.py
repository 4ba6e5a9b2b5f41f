"""Loops compiled by numba, kept for the next process where there is a place for it."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from numba import njit


def compiled(function: Callable[..., Any]) -> Any:
    """As `numba.njit`; without a place to keep what was compiled it is compiled once a process."""
    # Without a home numba would keep it in a folder named "~", wherever the process is.
    placed = "NUMBA_CACHE_DIR" in os.environ or os.path.isabs(os.path.expanduser("~"))
    try:
        return njit(function, cache=placed)
    except RuntimeError:  # a file system that is read only, or another user's
        return njit(function)
