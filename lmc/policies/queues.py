"""The piece that policies of several queues are made of."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Hashable
from typing import Any


def first_free(queue: OrderedDict[Hashable, Any], pinned: Container) -> Hashable | None:
    """The first key that is not pinned, or None.

    Those before it go to the end: they are in use, and would be looked at each time. Where all are
    pinned the order stays.
    """
    for _ in range(len(queue)):
        key = next(iter(queue))
        if key not in pinned:
            return key
        queue.move_to_end(key)
    return None


class Queue(OrderedDict[Hashable, int]):
    """Keys with their sizes, the oldest first; knows the sum of the sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def push(self, key: Hashable, size: int) -> None:
        """Put a key that is not in it at the young end."""
        self[key] = size
        self.size += size

    def take(self, key: Hashable) -> int:
        """Take a key that is in it out; its size."""
        size = self.pop(key)
        self.size -= size
        return size

    def oldest(self, pinned: Container = ()) -> Hashable | None:
        """The oldest key that is not pinned, or None; those before it go round once more."""
        return first_free(self, pinned)

    def trim(self, limit: float) -> None:
        """Forget the oldest keys until the sizes add up to at most `limit`."""
        while self.size > limit:
            self.take(next(iter(self)))
