"""What happens to each token of one request: local, exact, moved, recomputed or new."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from blake3 import blake3

from lmc.blend.evidence import Outline, Run, positions, probe_row_layers, runs_of, without
from lmc.blend.strategy import Selective, Strategy
from lmc.chunking.pieces import Piece, chunk_key, context_digests
from lmc.store import Index, Record
from lmc.store.lookup import Behind, Known, exact_in

KINDS = ("local", "local_blended", "exact", "moved", "recomputed", "new")


@dataclass(frozen=True)
class Segment:
    """Tokens `[start, end)` of a request that a stored chunk serves.

    Attributes:
        origin: the request's position of the chunk's first token; at most `start`, since a
            chunk that straddles vLLM's own hit gives its last tokens only.
    """

    start: int
    end: int
    kind: Literal["exact", "moved"]
    record: Record
    origin: int

    @property
    def delta(self) -> int:
        """Positions the chunk's keys move by."""
        return self.origin - self.record.start


@dataclass(frozen=True)
class Plan:
    """How rows `[local, end)` of one request come to be; the engine computes `[end, T)`.

    Attributes:
        T: tokens of the request.
        local: tokens the engine has already; never written.
        end: end of the claim.
        segments: what is loaded, ascending, inside `[local, end)`.
        rows: ascending positions in `[local, end)` that all layers compute: gaps, and what a
            strategy that is not selective chose.
        chosen: those of them that had been found.
        moved: the runs of moved tokens in the claim.
        found_beyond: found tokens at or after `end`: computed with the suffix all the same.
        first_moved: the first moved token, or None. From it on nothing is exact.
        strategy: what chooses rows.
        digest: of all tokens, for a selective strategy: what it chooses may depend on each.
        L: layers of the model, as far as a selective strategy must know them.
    """

    T: int
    local: int
    end: int
    segments: tuple[Segment, ...]
    rows: np.ndarray
    chosen: np.ndarray
    moved: tuple[Run, ...]
    found_beyond: int
    first_moved: int | None
    strategy: Strategy = field(repr=False)
    digest: bytes = field(default=b"", repr=False)
    L: int = 1

    @property
    def claimed(self) -> int:
        """Tokens that the engine is told it need not compute."""
        return self.end - self.local

    def after(self, local: int) -> Plan:
        """The same plan for an engine that turns out to hold `local` tokens, not fewer."""
        if local == self.local:
            return self
        end = max(local, self.end)
        return replace(
            self,
            local=local,
            end=end,
            segments=tuple(s for s in (_clip(s, local, end) for s in self.segments) if s),
            rows=self.rows[self.rows >= local],
            chosen=self.chosen[self.chosen >= local],
            moved=tuple((max(a, local), b) for a, b in self.moved if b > local),
            found_beyond=self.found_beyond - max(0, local - self.end),
        )

    def recomputing(self, found: np.ndarray) -> Plan:
        """The same plan when found rows at these positions had to be computed after all."""
        rows, chosen = np.union1d(self.rows, found), np.union1d(self.chosen, found)
        # None of them is left to a selective strategy; without any it has nothing to choose from.
        moved = without(self.moved, found) if self.selective else self.moved
        return replace(self, rows=rows, chosen=chosen, moved=moved)

    @property
    def outline(self) -> Outline:
        """The request as its strategy sees it."""
        new = len(self.rows) + self.T - self.end
        return Outline(L=self.L, T=self.T, end=self.end, moved=self.moved, new=new)

    @property
    def selective(self) -> bool:
        """Whether the strategy chooses rows while the request runs."""
        return isinstance(self.strategy, Selective) and bool(self.moved)

    def kinds(self, local_blended: int = 0) -> dict[str, int]:
        """Tokens of each kind; they add up to T. `local_blended` of the local ones are blended.

        Of a selective strategy, whose rows differ by layer, the mean over layers is recomputed.
        """
        reused = {"exact": 0, "moved": 0}
        for s in self.segments:
            chosen = (self.chosen >= s.start) & (self.chosen < s.end)
            reused[s.kind] += s.end - s.start - int(chosen.sum())
        selected = round(sum(self.strategy.counts(self.outline)) / self.L) if self.selective else 0
        reused["moved"] -= selected
        kinds = {
            "local": self.local - local_blended,
            "local_blended": local_blended,
            **reused,
            "recomputed": len(self.chosen) + selected + self.found_beyond,
        }
        return kinds | {"new": self.T - sum(kinds.values())}

    def computed_runs(self) -> list[tuple[int, int, float]]:
        """Runs of rows `(start, end, share)` and the share of their row-layers that is computed.

        The suffix is among them. Where a selective strategy will take its rows is not known yet,
        so its share is that of all moved rows; what its probe runs through counts once more.
        """
        probe, selected = 0.0, []
        if self.selective:
            outline = self.outline
            needs = self.strategy.needs(outline)
            probe = probe_row_layers(needs, outline) / outline.new / self.L
            share = sum(self.strategy.counts(outline)) / outline.n / self.L
            selected = [(start, end, share) for start, end in outline.moved]
        new = [*runs_of(self.rows), (self.end, self.T)]
        return [*((start, end, 1.0 + probe) for start, end in new), *selected]

    def recipes(self, block_size: int, nonce: bytes = b"") -> dict[int, bytes]:
        """Digest, by block, of how its KV came to be, from the first moved token's block on.

        Two requests get equal digests where equal variants went in at equal places and the
        same rows were computed again, so that one finds the other's blended blocks; `nonce`
        makes them unlike all others.
        """
        if self.first_moved is None:
            return {}
        whole = b""
        if self.selective:
            # Which rows of a block are computed depends on all of the request.
            chosen = blake3(self.digest + repr(self.strategy).encode())
            # Of what is exact the engine holds now more, now less, and it is the same KV.
            for s in (s for s in self.segments if s.start >= self.first_moved):
                chosen.update(s.record.key + s.record.context + s.record.origin.encode())
                chosen.update(np.array([s.origin, s.start, s.end], "<i8").tobytes())
            whole = chosen.digest()
        first, last = self.first_moved // block_size, (self.end - 1) // block_size
        recipes = {}
        for block in range(first, last + 1):
            start, end = block * block_size, (block + 1) * block_size
            digest = blake3(nonce + bytes([self.strategy.rotate]) + whole)
            for s in self.segments:
                if s.start < end and s.end > start:
                    digest.update(s.record.key + s.record.context + s.record.origin.encode())
                    part = [s.origin, max(s.start, start), min(s.end, end)]
                    digest.update(np.array(part, "<i8").tobytes())
            inside = self.rows[(self.rows >= start) & (self.rows < end)]
            digest.update(inside.astype("<i8").tobytes())
            recipes[block] = digest.digest()
        return recipes


def make_plan(
    tokens: np.ndarray,
    pieces: Sequence[Piece],
    index: Index,
    namespace: bytes,
    strategy: Strategy,
    *,
    local: int = 0,
    min_gain: int = 1,
    contiguous: bool = False,
    L: int | None = None,
    decline: bool = True,
    tiers: Sequence[Behind] = (),
) -> Plan:
    """The best claim for one request; an empty one when plain prefill is as good.

    Args:
        tokens: `[T]` token ids.
        pieces: the chunks of it, a partition of `[0, T)`.
        index: what is stored.
        namespace: what the KV must be compatible with.
        strategy: chooses rows among the moved ones.
        local: tokens the engine holds already.
        min_gain: rows that blending must save beyond the gap rows computed.
        contiguous: claim only exact chunks without gaps, so that no row need be computed.
        L: layers of the model; a selective strategy is not weighed without.
        decline: whether to leave a request alone that blending saves too little of.
        tiers: what to ask behind the index; segments of theirs have records without a slot.

    Raises:
        ValueError: a selective strategy and no `L`.
    """
    T = len(tokens)
    control = strategy.control or not decline
    moves = strategy.moves and not contiguous
    known = Known(index, namespace, tiers)
    segments = _find(tokens, pieces, known, namespace, local, moves)
    runs = _moved_runs(segments)
    moved = [(max(a, local), b) for a, b in runs if b > local]
    found = [s for s in (_clip(s, local, T) for s in segments) if s]
    share = 0.0  # of the moved rows, what a selective strategy recomputes
    if isinstance(strategy, Selective):
        if L is None:
            raise ValueError(
                f"{type(strategy).__name__} chooses rows by layer: give the number of layers"
            )
        chosen = positions([])
        share = _selected_share(strategy, moved, found, local, T, L)
    else:
        # Whole runs are shown to the strategy: one that began inside `local` has its first rows
        # behind it already.
        chosen = strategy.rows(runs)
        chosen = chosen[chosen >= local]
    claimable = _leading(found, local) if contiguous else found
    end, gain = _best_end(claimable, chosen, share, local, T, control)
    blends = any(s.kind == "moved" and s.start < end for s in claimable)
    if blends and not control and gain < min_gain:
        end = local
    inside = tuple(s for s in (_clip(s, local, end) for s in found) if s)
    chosen = chosen[chosen < end]
    return Plan(
        T=T,
        local=local,
        end=end,
        segments=inside,
        rows=np.union1d(_gaps(inside, local, end), chosen),
        chosen=chosen,
        moved=tuple((a, min(b, end)) for a, b in moved if a < end),
        found_beyond=sum(s.end - max(s.start, end) for s in found if s.end > end),
        first_moved=next((s.start for s in inside if s.kind == "moved"), None),
        strategy=strategy,
        digest=blake3(np.ascontiguousarray(tokens, "<i8").tobytes()).digest() if share else b"",
        L=L or 1,
    )


def _selected_share(
    strategy: Strategy, moved: list[Run], found: list[Segment], local: int, T: int, L: int
) -> float:
    """Of the moved rows, what a selective strategy and its probe compute, as whole rows."""
    total = sum(end - start for start, end in moved)
    if not total:
        return 0.0
    end = min(found[-1].end, T - 1)
    new = T - local - sum(min(s.end, end) - s.start for s in found)
    outline = Outline(L=L, T=T, end=end, moved=tuple(moved), new=new)
    computed = sum(strategy.counts(outline)) + probe_row_layers(strategy.needs(outline), outline)
    return computed / L / total


def _find(
    tokens: np.ndarray,
    pieces: Sequence[Piece],
    stored: Known,
    namespace: bytes,
    local: int,
    moves: bool,
) -> list[Segment]:
    """Every stored chunk that reaches past `local`, whole."""
    contexts = context_digests(tokens, [p.start for p in pieces])
    ids = np.ascontiguousarray(tokens, "<i8")
    segments: list[Segment] = []
    before: Segment | None = None  # the moved segment that ends where this piece starts
    reached = local  # exact, or the engine's own, as far as this
    for piece, context in zip(pieces, contexts, strict=True):
        if piece.end <= local:
            continue
        content = ids[piece.start : piece.end].tobytes()
        key = chunk_key(namespace, tokens[piece.start : piece.end])
        chained = reached >= piece.start
        known = stored.variants(key, content, context, chained)
        exact = [r for r in known if exact_in(r, context)]
        if exact:
            found = Segment(piece.start, piece.end, "exact", exact[0], piece.start)
        elif tail := stored.tail(context, content, chained):
            found = Segment(piece.start, piece.start + tail.T, "exact", tail, piece.start)
        elif known and moves:
            record = _best_variant(known, before, piece.start)
            found = Segment(piece.start, piece.end, "moved", record, piece.start)
        else:
            before = None
            continue
        segments.append(found)
        reached = found.end if found.kind == "exact" else reached
        before = found if found.kind == "moved" else None
    return segments


def _best_variant(known: list[Record], before: Segment | None, start: int) -> Record:
    """The variant with the least foreign context.

    One that was stored right behind what now stands before it; else one encoded alone or
    behind the shared prefix, else the latest exact one, else a blended one.
    """
    if before is not None:
        for record in known:
            if _continues(before, record, start):
                return record
    rank = {"isolated": 0, "anchored": 0, "exact": 1, "blended": 2}
    return min(known, key=lambda record: rank[record.origin])


def _continues(before: Segment, record: Record, start: int) -> bool:
    """Whether `record`, placed at `start`, was stored right behind what `before` places."""
    return (
        record.context == before.record.context_after
        and start == before.end
        and start - record.start == before.delta
    )


def _moved_runs(segments: Sequence[Segment]) -> list[Run]:
    """Moved tokens as runs; chunks that kept their neighbour in front stay in one run."""
    runs: list[Run] = []
    before: Segment | None = None
    for s in segments:
        if s.kind != "moved":
            before = None
            continue
        if before is not None and _continues(before, s.record, s.origin):
            runs[-1] = (runs[-1][0], s.end)
        else:
            runs.append((s.start, s.end))
        before = s
    return runs


def _leading(segments: Sequence[Segment], local: int) -> list[Segment]:
    """The exact segments that follow `local` without a gap."""
    leading: list[Segment] = []
    for s in segments:
        if s.start != (leading[-1].end if leading else local):
            break
        leading.append(s)
    return leading


def _best_end(
    segments: Sequence[Segment],
    chosen: np.ndarray,
    share: float,
    local: int,
    T: int,
    control: bool,
) -> tuple[int, float]:
    """The claim's end that saves most, and its gain: rows saved minus gap rows computed.

    A control saves nothing by design, so there every found row counts as saved. The last
    token is always the engine's, since its hidden state gives the first new token.
    """
    best_end, best_gain, gain, position = local, 0.0, 0.0, local
    for s in segments:
        end = min(s.end, T - 1)
        if end <= s.start:
            break
        recomputed = 0.0
        if not control:
            recomputed += int(((chosen >= s.start) & (chosen < end)).sum())
            recomputed += share * (end - s.start) if s.kind == "moved" else 0.0
        gain += (end - s.start) - recomputed - (s.start - position)
        position = end
        if gain > best_gain:
            best_end, best_gain = end, gain
    return best_end, best_gain


def _gaps(segments: Sequence[Segment], local: int, end: int) -> np.ndarray:
    """Positions in `[local, end)` that no segment serves."""
    borders = [local, *(x for s in segments for x in (s.start, s.end)), end]
    return positions(list(zip(borders[::2], borders[1::2], strict=True)))


def _clip(segment: Segment, start: int, end: int) -> Segment | None:
    """The part of `segment` inside `[start, end)`, if there is any."""
    start, end = max(segment.start, start), min(segment.end, end)
    return replace(segment, start=start, end=end) if start < end else None
