"""A tier for tests of the scheduler's side, which has a directory and no bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from lmc.store import Record

ON_SHELF: list[Record] = []


@dataclass(frozen=True)
class Shelf:
    """It has what is `ON_SHELF`; nobody asks it for bytes."""

    write: str = "through"

    def open(self, layout: Any, **options: Any) -> Any:
        def lookup_many(
            namespace: bytes, keys: Sequence[bytes], behind: Sequence[Any], deadline: float
        ) -> tuple[list[list[Record]], list[list[Record]]]:
            there = [replace(r, slot=-1) for r in ON_SHELF]
            of_keys = [[r for r in there if r.key == key and not r.tail] for key in keys]
            after = [[r for r in there if (r.context, r.tokens[:8]) == tuple(q)] for q in behind]
            return of_keys, after

        return SimpleNamespace(
            name="shelf", counts=Counter(), epoch=None, lookup_many=lookup_many,
            close=lambda: None,
        )  # fmt: skip
