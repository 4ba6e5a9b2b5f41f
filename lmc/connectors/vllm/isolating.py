"""Texts that came behind others, computed once more, alone, so that they may be moved.

Where the store's context policy lets a chunk be moved only if nothing foreign stood before it, most
of what prompts leave could be used as prefixes alone. So texts that may come again are computed a
second time behind nothing: in blocks borrowed from vLLM's pool, a bounded number of tokens a step,
while answers are decoded or nothing runs at all, and seldom beside other prompts. What never comes
back shall cost nobody anything, so that a text has to have come again, elsewhere than it stood (as
"cache on second hit" has it, Maggs and Sitaraman 2015), before answers wait for it: those that
clients told of, and seldom those that nobody did. All of these, and what clients tell of for the
first time, are computed once the engine has rested. The chunks of a span follow each other when
they are moved, as in the text.
"""

from __future__ import annotations

import math
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from lmc.chunking.pieces import Contexts, Piece, chunk_key, context_digests
from lmc.connectors.vllm.config import LMCConfig
from lmc.connectors.vllm.groups import Groups
from lmc.connectors.vllm.messages import ChunkSave, Encode
from lmc.store import Index
from lmc.store.lookup import Known

SHORTEST = 16  # tokens; less is not worth the bookkeeping
WAITING = 1 << 16  # tokens that may wait; the oldest are dropped
SPARE = 8  # one block in so many stays free for requests
PATIENT = 8  # steps that compute prompts are left alone, but for one in so many
LATER = 64  # and any step at all, by what no client told of
RESTED_S = 0.2  # without a request; a client that asks again at once finds the engine free


@dataclass(frozen=True)
class _Wanted:
    namespace: bytes
    front: tuple[int, ...]
    content: np.ndarray  # [T]
    ends: list[int]  # of its chunks


@dataclass(frozen=True)
class _Lent:
    blocks: list[Any]
    slots: set[int]  # that the workers have yet to be done with


class Isolation:
    """What is to be computed alone, and the blocks lent for it.

    Args:
        index: of host memory.
        begins: the token that prompts begin with, if the model has one; kept in front of a chunk
            of a prompt that had it.
        bytes_per_token: of one rank.
        groups: of vLLM's KV cache; a text has blocks of its own in each.
        max_rows: tokens that a step of the engine carries.
        clock: seconds.
    """

    def __init__(
        self,
        config: LMCConfig,
        index: Index,
        begins: int | None,
        bytes_per_token: int,
        groups: Groups,
        max_rows: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._policy = config.context
        self._rate = 0 if config.context == "any" else config.isolated_tokens
        self._most = max(config.isolated_tokens, config.limits.chunk_tokens)
        self._index, self._begins = index, begins
        self._bytes_per_token, self._groups = bytes_per_token, groups
        self._max_rows, self._clock = max_rows, clock
        self._credit = 0
        self._waited = 0  # steps, since something was computed
        self._resting = math.inf  # since when nothing runs
        # What came again as clients told, what came again untold of, what was told of alone.
        self._queues: list[OrderedDict[bytes, _Wanted]] = [OrderedDict() for _ in range(3)]
        self._tokens = 0
        self._longest = config.limits.chunk_tokens
        self._lent: dict[int, _Lent] = {}  # by slot

    @property
    def pending(self) -> int:
        """How many chunks wait to be computed."""
        return sum(map(len, self._queues))

    def want(
        self,
        known: Known,
        tokens: np.ndarray,
        pieces: Sequence[Piece],
        spans: Sequence[tuple[int, int]] = (),
    ) -> None:
        """Every text of a prompt that may come again and is not known as one that could be moved.

        Args:
            known: what the request's namespace had before it.
            tokens: `[T]`. pieces: its chunks. spans: texts of several chunks.
        """
        if not self._rate:
            return
        begins = self._begins is not None and int(tokens[0]) == self._begins
        front = (int(tokens[0]),) if begins else ()
        groups = self._texts(pieces, spans)
        # What the prompt begins with was computed behind nothing, or behind no more than it may be.
        anchored = groups[0][0][-1].end if self._policy == "shared_prefix" and groups else -1
        contexts = Contexts(np.ascontiguousarray(tokens, "<i8").tobytes())
        for group, told_of in groups:
            start, end = group[0].start, group[-1].end
            short = end - start < SHORTEST
            if short or not group[-1].closed or start in (0, len(front), anchored):
                continue
            content = np.ascontiguousarray(tokens[start:end], "<i8")
            key = chunk_key(known.namespace, content)
            parts = [tokens[p.start : p.end].astype("<i8").tobytes() for p in group]
            if known.alone(parts):
                continue
            again = known.displaced(parts[0], start, contexts)
            place = 0 if told_of and again else 1 if again else 2
            waits = next((i for i, queue in enumerate(self._queues) if key in queue), 3)
            if waits <= place or not (told_of or again):
                continue
            if waits < 3:
                self._drop(key)
            ends = [piece.end - start for piece in group]
            self._queues[place][key] = _Wanted(known.namespace, front, content, ends)
            self._tokens += len(content)
        while self._tokens > WAITING:
            self._drop(next(key for queue in reversed(self._queues) for key in queue))
            self.counts["chunks_not_computed_alone"] += 1

    def take(self, pool: Any, scheduled: int, prompts: bool) -> list[Encode]:
        """What this step computes beside its `scheduled` tokens.

        Args:
            pool: vLLM's block pool.
            prompts: whether the step computes prompts, whose first tokens somebody waits for.
        """
        now = self._clock()
        self._resting = math.inf if scheduled else min(self._resting, now)
        if not self.pending:
            self._credit = self._waited = 0
            return []
        self._credit = min(self._credit + self._rate, self._most)
        self._waited += 1
        if prompts and self._waited < PATIENT:
            return []
        left = self._max_rows - scheduled
        encodes: list[Encode] = []
        rested = now - self._resting >= RESTED_S
        open_to = 3 if rested else 2 if scheduled and self._waited >= LATER else 1
        while waiting := next(filter(None, self._queues[:open_to]), None):
            key, wanted = next(iter(waiting.items()))
            T = len(wanted.front) + len(wanted.content)
            blocks = -(-T // self._groups.block_size) * len(self._groups.specs)
            # What is longer than a step takes one in which nothing else is computed, or has waited.
            busy = scheduled > 0 and self._waited < PATIENT
            if self._credit + len(wanted.front) < T or (left < T and busy):
                break
            if pool.get_num_free_blocks() < blocks + pool.num_gpu_blocks // SPARE:
                if scheduled:
                    break
                self._drop(key)  # nothing runs, so that no more will be free
                self.counts["chunks_not_computed_alone"] += 1
                continue
            self._drop(key)
            if (encode := self._lend(key, wanted, pool, blocks)) is not None:
                encodes.append(encode)
                self._credit -= len(wanted.content)
                self._waited = 0
                left -= T
                self.counts["tokens_computed_alone"] += len(wanted.content)
        return encodes

    def settle(self, slot: int, pool: Any) -> None:
        """The workers are done with what `slot` was to hold."""
        if lent := self._lent.pop(slot, None):
            lent.slots.discard(slot)
            if not lent.slots:
                pool.free_blocks(lent.blocks)

    def clear(self) -> None:
        """Nothing that waits is of use any more."""
        for queue in self._queues:
            queue.clear()
        self._tokens = 0

    def _drop(self, key: bytes) -> None:
        self._tokens -= len(next(q for q in self._queues if key in q).pop(key).content)

    def _texts(
        self, pieces: Sequence[Piece], spans: Sequence[tuple[int, int]]
    ) -> list[tuple[list[Piece], bool]]:
        """Chunks that are computed together, those of a span as far as it is not too long; and
        whether they are of one."""
        ends = dict(spans)
        groups: list[tuple[list[Piece], bool]] = []
        until = 0  # the end of the span that the last group is of
        for piece in pieces:
            inside = groups and piece.start not in ends and piece.end <= until
            if inside and piece.end - groups[-1][0][0].start <= self._longest:
                groups[-1][0].append(piece)
            else:
                until = ends.get(piece.start, until)
                groups.append(([piece], piece.end <= until))
        return groups

    def _lend(self, key: bytes, wanted: _Wanted, pool: Any, blocks: int) -> Encode | None:
        """Room in the index, and blocks to compute in; None where the index takes no more."""
        front, content = wanted.front, wanted.content
        tokens = np.concatenate([np.array(front, np.int64), content])
        borders = [len(front) + end for end in (0, *wanted.ends)]
        contexts = context_digests(tokens, borders)
        records = []
        for i, (start, end) in enumerate(pairwise(borders)):
            ids = tokens[start:end].astype("<i8")
            record = self._index.put(
                namespace=wanted.namespace,
                key=chunk_key(wanted.namespace, ids),
                tokens=ids.tobytes(),
                start=start,
                context=contexts[i],
                context_after=contexts[i + 1],
                origin="isolated",
                nbytes=len(ids) * self._bytes_per_token,
            )
            if record is not None:
                records.append((record, start, end))
        if not records:
            return None
        lent = _Lent(pool.get_new_blocks(blocks), {record.slot for record, _, _ in records})
        self._lent |= dict.fromkeys(lent.slots, lent)
        ids, n = [block.block_id for block in lent.blocks], blocks // len(self._groups.specs)
        ids_of = [ids[i : i + n] for i in range(0, blocks, n)]
        saves = [ChunkSave(record, "", start, end, ids_of) for record, start, end in records]
        return Encode(tokens, saves)
