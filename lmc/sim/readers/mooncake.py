"""Traces of Mooncake (Qin et al., FAST 2025), and what others call timed_trace."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import IO, Any, ClassVar, Literal

from lmc.sim.readers.files import DAMAGED
from lmc.sim.readers.records import (
    MOST_TOKENS,
    RecordError,
    fields_of,
    hash_ids,
    json_lines,
    length,
    name_of,
    number,
)
from lmc.sim.trace import Request

LOOKED_AT = 1000  # records, from which a file's units are told
USUAL = (512, 16, 32, 64, 128, 256, 1024, 2048, 4096)  # tokens of a block, the likeliest first
ROUND = (1000, 512, 500, 256, 100, 64, 50, 16, 10, 8, 2, 1)
CROWDED, SPARSE = 1000, 100  # requests a second, and seconds a request, of no trace


@dataclass
class Mooncake:
    """JSONL of {timestamp (ms), input_length, output_length, hash_ids, perhaps session_id}.

    block_tokens: tokens that one of the prefix-chained hash_ids stands for; by default 512, or
        what most of the first 1,000 lines agree with where 512 is not half of theirs.
    time: what timestamps count. By default seconds where some have fractions (and there is a
        request in 100 of them), or where whole milliseconds would mean over 1,000 requests a
        second, and else milliseconds.
    """

    has_text: ClassVar[bool] = False
    example: ClassVar[str] = (
        '{"timestamp": 27482, "input_length": 600, "output_length": 52, "hash_ids": [46, 47]}'
    )
    block_tokens: int | None = None
    time: Literal["ms", "s"] | None = None

    def __post_init__(self) -> None:
        if self.block_tokens is not None and self.block_tokens < 1:
            raise ValueError(f"got block_tokens {self.block_tokens}, want at least 1")
        self._block, self._per_second = self.block_tokens or USUAL[0], 1000.0

    @staticmethod
    def recognises(head: bytes, keys: set[str]) -> bool:
        return "hash_ids" in keys and not keys & {"chat_id", "requests"}

    @property
    def assumed(self) -> str:
        """What was told from the lines of the last file, in words, where it is not as usual."""
        parts = [f"blocks of {self._block} tokens"] if self._block != USUAL[0] else []
        parts += ["timestamps in seconds"] if self._per_second == 1 else []
        return ", ".join(parts)

    def records(self, stream: IO[bytes]) -> Iterator[tuple[int, Any]]:
        records = json_lines(stream)
        first: list[tuple[int, Any]] = []
        damage = None
        try:
            first.extend(islice(records, LOOKED_AT))
        except DAMAGED as error:  # what was read in front of it is told first
            damage = error
        seen = [record for _, record in first if isinstance(record, dict)]
        self._block = self.block_tokens or _block_tokens(seen)
        self._per_second = {"ms": 1000.0, "s": 1.0}[self.time or _unit(seen)]
        yield from first
        if damage is not None:
            raise damage
        yield from records

    def requests(self, record: Any) -> Iterable[Request]:
        r = fields_of(record)
        tokens = length(r, "input_length")
        yield Request(
            timestamp=number(r, "timestamp") / self._per_second,
            session=name_of(r, "session_id"),
            input_tokens=tokens,
            output_tokens=length(r, "output_length"),
            blocks=hash_ids(r, tokens, self._block),
            block_tokens=self._block,
        )


def _block_tokens(records: Sequence[dict[str, Any]]) -> int:
    """Mooncake's own size of blocks, if half of the records agree with it; else the one that most
    do, a usual one where several are alike. One id says little, and does not vote where others do.
    """
    ranges: list[tuple[int, int]] = []  # from, to: the sizes of which a record's ids are as many
    few: list[tuple[int, int]] = []
    for r in records:
        ids = r.get("hash_ids")
        try:
            tokens = length(r, "input_length")
        except RecordError:
            continue
        if isinstance(ids, list) and ids and tokens:
            # ceil(tokens / size) or floor(tokens / size) is the number of ids.
            n = len(ids)
            most = MOST_TOKENS if n == 1 else (tokens - 1) // (n - 1)
            (ranges if n > 1 else few).append((tokens // (n + 1) + 1, most))
    voters = ranges or few

    def agree(size: int) -> tuple[int, int]:
        votes, rest = (sum(low <= size <= high for low, high in of) for of in (voters, few))
        return votes, rest

    if not voters or 2 * agree(USUAL[0])[0] >= len(voters):
        return USUAL[0]
    low, high = max(r[0] for r in voters), min(r[1] for r in voters)
    # Of unusual sizes the roundest.
    rounds = (-(-low // step) * step for step in ROUND)
    other = [size for size in rounds if size <= high < MOST_TOKENS][:1]
    return max([*USUAL, *other], key=agree)  # the first of those that are alike


def _unit(records: Sequence[dict[str, Any]]) -> Literal["ms", "s"]:
    times = []
    for r in records:
        try:
            times.append(number(r, "timestamp"))
        except RecordError:
            continue
    span = max(times, default=0.0) - min(times, default=0.0)
    if any(t != int(t) for t in times):
        # Milliseconds may have fractions, too: a request in 100 seconds is none of a trace.
        return "ms" if span > SPARSE * len(times) else "s"
    crowded = len(times) >= 100 and len(times) - 1 > CROWDED * span / 1000
    return "s" if crowded and span else "ms"
