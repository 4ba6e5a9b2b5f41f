"""What is computed when it is first asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from functools import cached_property as once
else:

    class once:  # noqa: N801 it decorates, as `property` does
        """As `functools.cached_property`, but for its lock, which takes longer than most of it."""

        def __init__(self, work: Callable[[Any], Any]) -> None:
            self._work = work
            self.__doc__ = work.__doc__

        def __set_name__(self, owner: type, name: str) -> None:
            self._name = name

        def __get__(self, owner: Any, kind: type) -> Any:
            if owner is None:
                return self
            found = owner.__dict__[self._name] = self._work(owner)
            return found
