"""What is stored: variants of each content, byte capacity, eviction by a policy, and leases.

Holds no bytes and imports no torch: the scheduler's process decides here, the workers obey.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from lmc.model.cost import PrefillCost
from lmc.policies import POLICIES, Item, Policy
from lmc.store.history import History
from lmc.store.record import Origin, Record, superseded

BEHIND = 16  # of what continues a context with the same token, only so many of the latest are told


class _Entry:
    __slots__ = ("item", "leases", "missing", "overdue", "record", "visible")

    def __init__(self, record: Record, item: Item, ranks: int, arriving: bool) -> None:
        self.record = record
        self.item = item
        self.leases = 0
        self.missing = set(range(ranks))  # ranks that have not acknowledged the bytes
        self.visible = arriving or not ranks  # out of another tier it is found at once
        self.overdue = False  # it has expired, and goes when it is in use no more

    @property
    def pinned(self) -> bool:
        """Whether it must stay: it is in use, or some rank would be left holding it."""
        return bool(self.leases or self.missing)


class Index:
    """Records by content, at most `capacity` bytes of them; a policy says which goes first.

    A record is found only once every rank has acknowledged its bytes, and is never evicted
    while leased. Evicted slots pile up in `freed` until the caller tells the workers.

    Args:
        capacity: bytes, on one rank.
        ranks: workers that must acknowledge a record.
        policy: one of `POLICIES` by name, or with its fields.
        cost: FLOPs of prefill, for policies that weigh computing anew; else it is tokens.
        clock: seconds, for policies that ask for the time.
        exact_variants: of one content, how many exact contexts are kept: the latest.
        history: told of what is taken in, and why what is gone is gone.

    Attributes:
        added: how often a record was put or became visible: has it grown, more may be found soon.
        changes: records that every rank has now, or that are gone, in that order; None: not kept.
        gone: how many have been let go of so far: has it not grown, what was found is there.

    Raises:
        ValueError: an unknown policy, wrong fields of it, or one that needs the future.
    """

    def __init__(
        self,
        capacity: int,
        ranks: int = 1,
        policy: Mapping[str, Any] | str = "lru",
        cost: PrefillCost | None = None,
        clock: Callable[[], float] = time.monotonic,
        exact_variants: int = 2,
        history: History | None = None,
    ) -> None:
        if POLICIES.parse(policy).get("name") == "belady":
            raise ValueError("policy belady needs the accesses to come, which no store knows")
        self.capacity = capacity
        self.size = 0
        self.counts: Counter[str] = Counter()
        self._ranks = ranks
        self._policy: Policy = POLICIES.build(policy, capacity=capacity)
        self._cost = cost
        self._clock = clock
        self._exact_variants = exact_variants
        self.history = history
        self.added = self.gone = 0
        self.changes: list[tuple[Record, bool]] | None = None
        self._next_slot = 0
        self._entries: dict[int, _Entry] = {}
        self._slots: dict[Hashable, int] = {}  # of the policy's keys
        self._ends: dict[tuple[bytes, bytes], Hashable] = {}
        self._contents: dict[bytes, dict[bytes, list[_Entry]]] = {}  # by namespace and token ids
        self._behind: dict[bytes, list[_Entry]] = {}  # by namespace, context and first token
        self._tails: dict[tuple[bytes, bytes], int] = {}
        self._freed: list[int] = []
        self._awaited: set[int] = set()  # slots that arrive out of another tier
        self._fetching: set[int] = set()  # slots that a tier may write to
        self._lent: dict[int, int] = {}  # those of them that are gone, and their bytes
        self._lent_bytes = 0
        self._pinned = _Pinned(self)
        self._pinned_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, slot: int) -> bool:
        return slot in self._entries

    def variants(self, namespace: bytes, content: bytes) -> list[Record]:
        """Visible records of one content, by its token ids' bytes, the latest first; no tails."""
        return next(self.variants_of(namespace, [content]))

    def variants_of(self, namespace: bytes, contents: Iterable[bytes]) -> Iterator[list[Record]]:
        """As `variants`, of one content after the other."""
        self._expire()
        known = self._contents.get(namespace, {})
        for content in contents:
            entries = known.get(content, ())
            yield [entry.record for entry in reversed(entries) if entry.visible]

    def coming(self, namespace: bytes, content: bytes) -> list[Record]:
        """Records of one content that are still being stored; no tails."""
        entries = self._contents.get(namespace, {}).get(content, ())
        return [entry.record for entry in entries if not entry.visible]

    def still_coming(self, slots: Iterable[int]) -> bool:
        """Whether any of `slots` is still being stored."""
        entries = (self._entries.get(slot) for slot in slots)
        return any(entry is not None and not entry.visible for entry in entries)

    def after(self, namespace: bytes, context: bytes, first: bytes) -> list[Record]:
        """Visible records, tails too, computed behind `context` that begin with the token `first`.

        Nothing that is blended; of very many only the latest.
        """
        self._expire()
        entries = self._behind.get(namespace + context + first, ())
        return [e.record for e in reversed(entries) if e.visible]

    def put(
        self,
        *,
        namespace: bytes,
        key: bytes,
        tokens: bytes,
        start: int,
        context: bytes,
        context_after: bytes,
        origin: Origin,
        nbytes: int,
        tail: bool = False,
    ) -> Record | None:
        """Reserve room for one chunk; the record becomes visible when acknowledged.

        Returns None, and counts why, when an equal or better variant is known already
        (`known`), when what is not leased does not make enough room (`no_room`), or when the
        policy would rather keep what it has (`not_admitted`).
        """
        slot = self._next_slot
        record = Record(
            slot, namespace, key, tokens, start, context, context_after, origin, nbytes, tail
        )
        return self._take(record, arriving=False)

    def adopt(self, record: Record) -> Record | None:
        """Reserve room for what another tier holds, found at once: who uses it waits for it.

        Returns None as `put` does.
        """
        return self._take(record, arriving=True)

    def twin(self, record: Record) -> Record | None:
        """The visible record of the same variant, if there is one: `record` is another tier's."""
        same = (r for r in self._same(record) if self._entries[r.slot].visible)
        return next((r for r in same if r.id == record.id), None)

    def arriving(self, slots: Iterable[int]) -> list[int]:
        """Those of `slots` that a rank has yet to say it has, out of another tier."""
        return [slot for slot in slots if slot in self._awaited] if self._awaited else []

    def fetching(self, slots: Iterable[int]) -> None:
        """A tier writes to these until they are `returned`: let go of, they still take room."""
        self._fetching.update(slot for slot in slots if slot in self._entries)

    def returned(self, slot: int) -> None:
        """No tier writes to a slot any more, if one did."""
        self._fetching.discard(slot)
        self._lent_bytes -= self._lent.pop(slot, 0)

    def _take(self, record: Record, arriving: bool) -> Record | None:
        self._expire()
        replaced = superseded(self._same(record), record, self._exact_variants, self._leased)
        if replaced is None:
            self.counts["known"] += 1
            return None
        for known in replaced:
            self._forget(known.slot)
        if record.slot != self._next_slot:
            record = replace(record, slot=self._next_slot)
        self._next_slot += 1
        item = self._item(record)
        if not self._make_room(item):
            if self.history is not None:
                self.history.note(record, "no_room")
            return None
        slot = record.slot
        entry = self._entries[slot] = _Entry(record, item, self._ranks, arriving)
        self._slots[item.key] = slot
        self._ends[record.namespace, record.context_after] = item.key
        self._policy.insert(item, self._clock())
        if not record.tail:  # exact only, so never by content
            contents = self._contents.setdefault(record.namespace, {})
            contents.setdefault(record.tokens, []).append(entry)
        if record.origin != "blended":
            behind = self._behind.setdefault(_behind(record), [])
            behind.append(entry)
            del behind[:-BEHIND]
        if record.tail:
            self._tails[record.namespace, record.context] = slot
        self.size += record.nbytes
        self._pinned_bytes += record.nbytes * entry.pinned
        self.counts["adopted" if arriving else "put"] += 1
        self.added += not arriving
        if self.history is not None:
            self.history.stored(record)
        if arriving:
            self._awaited.add(slot)
        return record

    def acknowledge(self, slot: int, rank: int) -> None:
        """Rank `rank` holds the bytes of `slot` now."""
        self.returned(slot)
        if slot in self._entries:
            entry = self._entries[slot]
            pinned, before = entry.pinned, bool(entry.missing)
            entry.missing.discard(rank)
            self._pinned_bytes -= entry.record.nbytes * (pinned - entry.pinned)
            if not entry.missing:
                if before and self.changes is not None:
                    self.changes.append((entry.record, True))
                self._awaited.discard(slot)
                self.added += not entry.visible
                entry.visible = True
                self._end(entry)

    def touch(self, slot: int) -> None:
        """A use, which the policy may reward."""
        entry = self._entries.get(slot)
        if entry is not None and not entry.overdue:
            self._policy.touch(entry.item, self._clock())

    def lease(self, slot: int) -> None:
        """Keep `slot` until released as often as leased."""
        entry = self._entries[slot]
        self._pinned_bytes += entry.record.nbytes * (not entry.pinned)
        entry.leases += 1

    def release(self, slot: int) -> None:
        """Take one lease back; a slot dropped meanwhile is no error."""
        if slot in self._entries:
            entry = self._entries[slot]
            entry.leases -= 1
            self._pinned_bytes -= entry.record.nbytes * (not entry.pinned)
            self._end(entry)

    def drop(self, slot: int) -> None:
        """Forget a record whose bytes are gone or wrong, leased or not."""
        if slot in self._entries:
            self.counts["dropped"] += 1
            self._forget(slot, "lost")

    def give_up_unfilled(self, slot: int) -> None:
        """What `slot` was reserved for will not come, if it has not."""
        if slot in self._entries and self._entries[slot].missing:
            self.drop(slot)

    def give_up(self, slot: int) -> None:
        """Nobody else is to wait for what arrives under `slot`; who uses it already goes on."""
        if slot in self._entries:
            if self._entries[slot].leases:
                self._entries[slot].visible = False
            else:
                self.drop(slot)

    def clear(self) -> None:
        """Forget everything."""
        for slot in list(self._entries):
            self._forget(slot, "reset")

    def take_freed(self) -> list[int]:
        """Slots whose bytes the workers may now free, each told once."""
        freed, self._freed = self._freed, []
        return freed

    def _same(self, record: Record) -> list[Record]:
        """What `record` might take the place of, the oldest first."""
        if record.tail:
            slot = self._tails.get((record.namespace, record.context))
            slots = [] if slot is None else [slot]
        else:
            contents = self._contents.get(record.namespace, {})
            return [entry.record for entry in contents.get(record.tokens, ())]
        return [self._entries[slot].record for slot in slots]

    def _leased(self, record: Record) -> bool:
        """Whether a record must stay; one that is on its way would be held by nobody."""
        return self._entries[record.slot].pinned

    def _item(self, record: Record) -> Item:
        # Not the slot: a policy that remembers what it evicted must know it when it comes back.
        key = (record.key, record.context, record.tail, record.origin == "blended")
        end = record.start + record.T
        return Item(
            key=key,
            size=record.nbytes,
            cost=self._cost.flops(record.start, end) if self._cost else float(record.T),
            parent=self._ends.get((record.namespace, record.context)),
        )

    def _make_room(self, item: Item) -> bool:
        capacity = self.capacity - self._lent_bytes
        if item.size > capacity - self._pinned_bytes:  # else a policy looks at each of those
            self.counts["no_room"] += 1
            return False
        while self.size + item.size > capacity:
            victim = self._policy.evict(item, self._clock(), self._pinned)
            if victim is None or victim == item.key:
                self.counts["no_room" if victim is None else "not_admitted"] += 1
                return False
            self.counts["evicted"] += 1
            self._drop(self._slots[victim], "evicted")
        return True

    def _expire(self) -> None:
        for key in self._policy.expired(self._clock()):
            entry = self._entries[self._slots[key]]
            entry.overdue = True
            self._policy.remove(key)  # or it would be told of it each time
            self._end(entry)

    def _end(self, entry: _Entry) -> None:
        """Let go of what is overdue, once it is in use no more."""
        if entry.overdue and not entry.pinned:
            self.counts["expired"] += 1
            self._drop(entry.record.slot, "expired")

    def _forget(self, slot: int, cause: str | None = None) -> None:
        if not self._entries[slot].overdue:
            self._policy.remove(self._entries[slot].item.key)
        self._drop(slot, cause)

    def _drop(self, slot: int, cause: str | None) -> None:
        """Let go of a record that the policy has forgotten; no cause where a better one is here."""
        self.gone += 1
        self._awaited.discard(slot)
        entry = self._entries.pop(slot)
        record = entry.record
        if self.changes is not None and not entry.missing:
            self.changes.append((record, False))
        if slot in self._fetching:
            self._lent[slot] = record.nbytes
            self._lent_bytes += record.nbytes
        self.size -= record.nbytes
        self._pinned_bytes -= record.nbytes * entry.pinned
        del self._slots[entry.item.key]
        end = (record.namespace, record.context_after)
        if self._ends.get(end) == entry.item.key:
            del self._ends[end]
        if not record.tail:
            contents = self._contents[record.namespace]
            _remove(contents, record.tokens, entry)
            if not contents:
                del self._contents[record.namespace]
        if record.origin != "blended":
            _remove(self._behind, _behind(record), entry)
        if record.tail:
            del self._tails[record.namespace, record.context]
        self._freed.append(slot)
        if self.history is not None and cause is not None:
            self.history.note(record, cause)


class _Pinned:
    """The policy's keys of records that must stay: leased, or not yet held by every rank."""

    def __init__(self, index: Index) -> None:
        self._index = index

    def __contains__(self, key: object) -> bool:
        return self._index._entries[self._index._slots[key]].pinned


def _behind(record: Record) -> bytes:
    return record.namespace + record.context + record.tokens[:8]


def _remove(entries: dict[bytes, list[_Entry]], key: bytes, entry: _Entry) -> None:
    held = entries.get(key, [])
    if entry in held:
        held.remove(entry)
        if not held:
            del entries[key]
