"""What every call of a disk tier does first, and what it says when it cannot be answered."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

from lmc.store.disk.faults import FAULTS, kind_of

Method = TypeVar("Method", bound=Callable[..., Any])


def otherwise(answer: Callable[..., Any]) -> Callable[[Method], Method]:
    """A call of a tier that is open and whose index answers; else what `answer` says, counted.

    A tier that was opened before this process was forked is opened anew.
    """

    def of(method: Method) -> Method:
        @wraps(method)
        def call(self: Any, *arguments: Any, **options: Any) -> Any:
            try:
                if self.folder.forked:
                    self.open_again()
                with self.folder:
                    return method(self, *arguments, **options)
            except FAULTS as e:
                if not self.folder.index_fault(e):
                    self.counts[kind_of(e)] += 1
                return answer(*arguments, **options)

        return call  # type: ignore[return-value]

    return of
