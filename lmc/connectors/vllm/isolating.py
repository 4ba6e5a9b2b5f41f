"""Texts that came behind others, computed once more, alone, so that they may be moved.

Where the store's context policy lets a chunk be moved only if nothing foreign stood before it, most
of what prompts leave could be used as prefixes alone. So texts that may come again are computed a
second time behind nothing: in blocks borrowed from vLLM's pool, a bounded number of tokens a step
(a text of several chunks goes on where the last step left it, behind what is stored of it by then),
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
from itertools import islice
from typing import Any

import numpy as np

from lmc.chunking.pieces import Contexts, Piece, chunk_key, context_digests
from lmc.connectors.vllm.config import LMCConfig
from lmc.connectors.vllm.groups import Groups
from lmc.connectors.vllm.messages import ChunkLoad, ChunkSave, Encode
from lmc.store import Index, Record
from lmc.store.lookup import Known

SHORTEST = 16  # tokens; less is not worth the bookkeeping
WAITING = 1 << 16  # tokens that may wait; the oldest are dropped
SPARE = 8  # one block in so many stays free for requests
PATIENT = 8  # steps that compute prompts are left alone, but for one in so many
LATER = 64  # and any step at all, by what no client told of
FIRST = 64  # texts that a step looks at
RESTED_S = 0.2  # without a request; a client that asks again at once finds the engine free


class _Wanted:
    """A text.

    Attributes:
        tokens: `[T]`; in front of it the token that prompts begin with, if it is kept there.
        borders: of its chunks, from the first one's start to T.
        contexts: digests of what stands before each border.
        tries: how often something of it was computed.
    """

    def __init__(self, namespace: bytes, tokens: np.ndarray, borders: list[int]) -> None:
        self.namespace, self.tokens, self.borders = namespace, tokens, borders
        self.contexts = context_digests(tokens, borders)
        self.tries = 0

    def ids(self, i: int) -> np.ndarray:
        """Of chunk `i`."""
        return self.tokens[self.borders[i] : self.borders[i + 1]].astype("<i8")


@dataclass(frozen=True)
class _Lent:
    key: bytes  # of the text
    blocks: list[Any]
    slots: set[int]  # that the workers have yet to be done with
    leased: list[int]  # slots of what is loaded


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
        self._at_work: set[bytes] = set()  # texts that the workers have something of

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
            ids = np.concatenate([np.array(front, "<i8"), content])
            borders = [len(front), *(len(front) + piece.end - start for piece in group)]
            self._queues[place][key] = _Wanted(known.namespace, ids, borders)
            self._tokens += len(ids)
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
        self._credit = min(self._credit + self._rate, max(self._rate, self._longest))
        self._waited += 1
        if prompts and self._waited < PATIENT:
            return []
        left = self._rate  # of this step
        room = self._max_rows - scheduled
        rested = now - self._resting >= RESTED_S
        open_to = 3 if rested else 2 if scheduled and self._waited >= LATER else 1
        encodes: list[Encode] = []
        for key, wanted in self._open(open_to):
            stored = self._stored(wanted)
            if len(stored) == len(wanted.contexts) - 1 or wanted.tries > 2 * len(wanted.contexts):
                self._drop(key)
                continue
            # As many chunks as fit; a longer one goes alone, once it has waited for its tokens.
            n, first = len(stored), wanted.borders[len(stored)]
            fits = [end for end in wanted.borders[n + 1 :] if end - first <= left]
            end = fits[-1] if fits else wanted.borders[n + 1]
            T = end - first
            early = scheduled > 0 and (self._credit < T or (room < T and self._waited < PATIENT))
            if early or (encodes and not fits):
                break
            blocks = -(-end // self._groups.block_size) * len(self._groups.specs)
            if pool.get_num_free_blocks() < blocks + pool.num_gpu_blocks // SPARE:
                if scheduled:
                    break
                self._drop(key)  # nothing runs, so that no more will be free
                self.counts["chunks_not_computed_alone"] += 1
                continue
            encode = self._lend(key, wanted, stored, end, pool, blocks)
            if encode is None or end == wanted.borders[-1]:
                self._drop(key)
            if encode is None:
                continue
            encodes.append(encode)
            self._credit = max(0, self._credit - T)
            self._waited = 0
            left -= T
            room -= T
            self.counts["tokens_computed_alone"] += T
        return encodes

    def _open(self, queues: int) -> list[tuple[bytes, _Wanted]]:
        """The first texts of so many queues, but for those that the workers have something of."""
        texts = (item for queue in self._queues[:queues] for item in queue.items())
        return list(islice((text for text in texts if text[0] not in self._at_work), FIRST))

    def settle(self, slot: int, pool: Any) -> None:
        """The workers are done with what `slot` was to hold."""
        if lent := self._lent.pop(slot, None):
            lent.slots.discard(slot)
            if not lent.slots:
                pool.free_blocks(lent.blocks)
                self._at_work.discard(lent.key)
                for leased in lent.leased:
                    self._index.release(leased)

    def clear(self) -> None:
        """Nothing that waits is of use any more."""
        for queue in self._queues:
            queue.clear()
        self._tokens = 0

    def _drop(self, key: bytes) -> None:
        self._tokens -= len(next(q for q in self._queues if key in q).pop(key).tokens)

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

    def _stored(self, wanted: _Wanted) -> list[Record]:
        """The first chunks of a text, as far as host memory has them as they are wanted."""
        found: list[Record] = []
        for i, context in enumerate(wanted.contexts[:-1]):
            some = self._index.variants(wanted.namespace, wanted.ids(i).tobytes())
            fits = [r for r in some if (r.context, r.start) == (context, wanted.borders[i])]
            if not fits or self._index.arriving([fits[0].slot]):
                break
            found.append(fits[0])
        return found

    def _lend(
        self, key: bytes, wanted: _Wanted, stored: list[Record], end: int, pool: Any, blocks: int
    ) -> Encode | None:
        """Room in the index for the chunks up to `end`, and blocks to compute them in behind those
        that are stored; None where the index takes no more."""
        n = len(stored)
        for record in stored:  # what comes may push out anything else
            self._index.lease(record.slot)
        records: list[Record] = []
        for i in range(n, wanted.borders.index(end)):
            ids = wanted.ids(i)
            new = self._index.put(
                namespace=wanted.namespace,
                key=chunk_key(wanted.namespace, ids),
                tokens=ids.tobytes(),
                start=wanted.borders[i],
                context=wanted.contexts[i],
                context_after=wanted.contexts[i + 1],
                origin="isolated",
                nbytes=len(ids) * self._bytes_per_token,
            )
            if new is not None:
                records.append(new)
        leased = [record.slot for record in stored]
        if not records:
            for slot in leased:
                self._index.release(slot)
            return None
        slots = {record.slot for record in records}
        lent = _Lent(key, pool.get_new_blocks(blocks), slots, leased)
        self._lent |= dict.fromkeys(slots, lent)
        self._at_work.add(key)
        wanted.tries += 1
        all_ids = [block.block_id for block in lent.blocks]
        each = blocks // len(self._groups.specs)
        ids_of = [all_ids[i : i + each] for i in range(0, blocks, each)]
        saves = [ChunkSave(r, "", r.start, r.start + r.T, ids_of) for r in records]
        loads = [ChunkLoad(r.slot, r.start, r.start + r.T, r.start, r.T, 0) for r in stored]
        first = wanted.borders[n] if n else 0
        return Encode(wanted.tokens[:end].astype(np.int64), first, loads, saves)
