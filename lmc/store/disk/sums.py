"""A digest of all that an index holds, kept up with every change of it.

LMDB believes whatever it reads. What was written to its file and is another by now is found by
reading all entries: they do not add up to the digest any more.
"""

from __future__ import annotations

import time
from typing import Any

import xxhash

_DIGEST = b"digest"  # in the table `meta`
Seeds = dict[Any, tuple[int, bool]]  # by database: a number, and whether a key has several values


class Summed:
    """A transaction that writes, and keeps the digest of all that is in the tables.

    The digest is the exclusive or of those of all entries, so that what is put and what is taken
    away changes it alike. It is an entry itself, and not part of what it is of.
    """

    def __init__(self, txn: Any, seeds: Seeds, meta: Any) -> None:
        self._txn, self._seeds, self._meta = txn, seeds, meta
        self.get, self.cursor = txn.get, txn.cursor
        self._before = int.from_bytes(txn.get(_DIGEST, bytes(8), db=self._meta), "big")
        self._digest = self._before

    def put(self, key: bytes, value: bytes, db: Any) -> None:
        """As LMDB's, of one more value where a table has several of a key."""
        seed, dups = self._seeds[db]
        if dups:
            if not self._txn.put(key, value, dupdata=False, db=db):
                return
        else:
            old = self._txn.replace(key, value, db=db)
            if old is not None:
                self._digest ^= _entry(key, old, seed)
        self._digest ^= _entry(key, value, seed)

    def pop(self, key: bytes, db: Any) -> bytes | None:
        """As LMDB's, where a table has one value of a key."""
        value: bytes | None = self._txn.pop(key, db=db)
        if value is not None:
            self._digest ^= _entry(key, value, self._seeds[db][0])
        return value

    def delete(self, key: bytes, value: bytes = b"", db: Any = None) -> bool:
        """As LMDB's; the value is told where a table has several of a key."""
        seed, dups = self._seeds[db]
        if not dups:
            return self.pop(key, db) is not None
        gone = bool(self._txn.delete(key, value, db=db))
        if gone:
            self._digest ^= _entry(key, value, seed)
        return gone

    def drop(self, db: Any, delete: bool) -> None:
        """Empty a table; `delete` is False, as in LMDB's."""
        for key, value in self._txn.cursor(db):
            self._digest ^= _entry(key, value, self._seeds[db][0])
        self._txn.drop(db, delete=delete)

    def commit(self) -> None:
        if self._digest != self._before:
            self._txn.put(_DIGEST, self._digest.to_bytes(8, "big"), db=self._meta)
        self._txn.commit()

    def abort(self) -> None:
        self._txn.abort()


def adds_up(txn: Any, seeds: Seeds, meta: Any, until: float) -> bool:
    """Whether all entries are what was put; also False when that takes too long.

    Args:
        txn: sees them.
        meta: the table that holds the digest.
        until: `time.monotonic()`.
    """
    kept, total, n = txn.get(_DIGEST, bytes(8), db=meta), 0, 0
    for db, (seed, _) in seeds.items():
        for key, value in txn.cursor(db):
            n += 1
            if n % 1024 == 0 and time.monotonic() > until:
                return False
            if db is not meta or key != _DIGEST:
                total ^= _entry(key, value, seed)
    return total == int.from_bytes(kept, "big")


def _entry(key: bytes, value: bytes, seed: int) -> int:
    return xxhash.xxh3_64_intdigest(key + value, seed)
