"""What lmc's own recorder wrote in an engine (`trace` in the connector's config)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import IO, Any, ClassVar

import numpy as np

from lmc.chunking.cdc import splitmix64
from lmc.sim.readers.records import (
    RecordError,
    fields_of,
    json_lines,
    length,
    name_of,
    number,
    whole,
)
from lmc.sim.trace import Request

VERSION = 1
MOST_IDS = 1 << 31
MOST_MADE = 1 << 22  # tokens of one prompt: a short line may say that it has very many
HASH = re.compile(r"[0-9a-f]{16,64}")


@dataclass(frozen=True)
class Recorded:
    """JSONL of one request a line, with `chunks` [[hash, tokens], ...] of its prompt, or `tokens`.

    A hash stands for a text: tokens are made of it, the same for the same hash, so that all that
    can be asked of token ids can be asked here, as exactly as chunks go: what two prompts share
    inside a chunk does not show. Chunks are segments (`--chunker explicit` cuts where the engine
    did). Tenants are sessions and share nothing; what `lmc trace export` wrote has sessions of its
    own. Requests that lmc left alone have neither, but a reason, and are left out.
    """

    has_text: ClassVar[bool] = False
    example: ClassVar[str] = (
        '{"lmc_trace": 1, "time": 1.5, "request": "r1", "prompt_tokens": 8, "output_tokens": 2, '
        '"chunks": [["abababababababababababab", 5], ["cdcdcdcdcdcdcdcdcdcdcdcd", 3]]}'
    )

    @staticmethod
    def recognises(head: bytes, keys: set[str]) -> bool:
        return "lmc_trace" in keys

    def records(self, stream: IO[bytes]) -> Iterator[tuple[int, Any]]:
        return json_lines(stream)

    def requests(self, record: Any) -> Iterable[Request]:
        r = fields_of(record)
        if (version := whole(r, "lmc_trace")) != VERSION:
            raise RecordError(f"lmc_trace: got version {version}, want {VERSION}")
        T, tenant = length(r, "prompt_tokens"), name_of(r, "tenant")
        segments: list[tuple[str, int, int]] = []
        if "tokens" in r:
            ids = _ids(r["tokens"], T, tenant)
        elif "chunks" in r:
            ids, segments = _texts(r["chunks"], T)
        elif isinstance(r.get("reason"), str):
            return
        else:
            raise RecordError("chunks: got nothing, want a list of [hash, tokens]")
        yield Request(
            timestamp=number(r, "time"),
            session=name_of(r, "session") or tenant,
            input_tokens=T,
            output_tokens=length(r, "output_tokens", 0),
            tokens=ids,
            segments=segments,
        )


def _ids(raw: Any, T: int, tenant: str) -> np.ndarray:
    """Token ids [T] int32; those of a tenant are others than everybody else's."""
    if not isinstance(raw, list) or not all(type(i) is int and 0 <= i < MOST_IDS for i in raw):
        raise RecordError(f"tokens: want a list of token ids from 0 to {MOST_IDS - 1}")
    if len(raw) != T:
        raise RecordError(f"tokens: got {len(raw)}, want {T}, the prompt's tokens")
    ids = np.array(raw, np.uint64)
    return _made(ids ^ np.uint64(_number(tenant))) if tenant else ids.astype(np.int32)


def _texts(raw: Any, T: int) -> tuple[np.ndarray, list[tuple[str, int, int]]]:
    """Token ids [T] int32 that stand for the chunks' texts, and where these are."""
    if not isinstance(raw, list):
        raise RecordError("chunks: want a list of [hash, tokens]")
    if T > MOST_MADE:
        raise RecordError(f"prompt_tokens: got {T}, want {MOST_MADE} at most")
    ends, hashes = [0], []
    for chunk in raw:
        match chunk:
            case [str() as hash, n] if type(n) is int and n > 0 and HASH.fullmatch(hash):
                hashes.append(_number(hash))
                ends.append(ends[-1] + n)
            case _:
                raise RecordError(f"chunks: got {str(chunk)[:40]}, want [hash in hex, tokens]")
        if ends[-1] > T:
            break
    if ends[-1] != T:
        raise RecordError(f"chunks: they have {ends[-1]} tokens or more, the prompt has {T}")
    lengths = np.diff(ends)
    within = np.arange(T, dtype=np.uint64) - np.repeat(np.array(ends[:-1], np.uint64), lengths)
    ids = _made(np.repeat(np.array(hashes, np.uint64), lengths) + within)
    return ids, [("chunk", start, end) for start, end in pairwise(ends)]


def _number(hexed: str) -> int:
    """64 bits of a hash; of a tenant's name that is none, of its characters."""
    text = hexed if HASH.fullmatch(hexed) else hexed.encode("utf-8", "replace").hex()
    return int(text[:16] or "0", 16)


def _made(numbers: np.ndarray) -> np.ndarray:
    """Ids int32, 0 or more, that stand for uint64 [T]."""
    made: np.ndarray = (splitmix64(numbers) & np.uint64(MOST_IDS - 1)).astype(np.int32)
    return made
