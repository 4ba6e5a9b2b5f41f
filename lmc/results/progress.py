"""How a runner says how far it is; whoever shows it stands above."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Step(Protocol):
    """Called with what is being done, in a phase, and by how many steps that is further."""

    def __call__(self, phase: str, detail: str = "", advance: int = 0) -> None: ...


Progress = Callable[[int], AbstractContextManager[Step]]  # of so many steps in all


@contextmanager
def silent(total: int) -> Iterator[Step]:
    """Progress that nobody is shown."""

    def step(phase: str, detail: str = "", advance: int = 0) -> None:
        pass

    yield step
