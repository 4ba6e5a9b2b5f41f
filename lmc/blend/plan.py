"""What happens to each token of one request: local, exact, moved, recomputed or new."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from blake3 import blake3

from lmc.blend.evidence import (
    Outline,
    Run,
    inside,
    positions,
    probe_row_layers,
    runs_of,
    without,
)
from lmc.blend.strategy import Strategy
from lmc.chunking.pieces import Piece
from lmc.store import Index
from lmc.store.directory import Answers
from lmc.store.lookup import Found, Known, continues, find
from lmc.store.record import ContextPolicy

NAMED = struct.Struct("<32sII")  # a chunk in a recipe: its record's id, where it is placed, its end
KINDS = ("local", "local_blended", "exact", "moved", "recomputed", "new")


@dataclass(frozen=True)
class Plan:
    """How rows `[local, end)` of one request come to be; the engine computes `[end, T)`.

    Attributes:
        T: tokens of the request.
        local: tokens the engine has already; never written.
        end: end of the claim.
        found: what is loaded, ascending, inside `[local, end)`.
        rows: ascending positions in `[local, end)` that all layers compute: gaps, and what a
            strategy that is not selective chose.
        chosen: those of them that had been found.
        moved: the runs of moved tokens in the claim.
        beyond: runs of found tokens that are computed all the same: what lies at or after `end`,
            and what a claim of exact chunks alone leaves out.
        first_moved: the first moved token, or None. From it on nothing is exact.
        strategy: what chooses rows.
        digest: of all tokens, for a selective strategy: what it chooses may depend on each.
        L: layers of the model, as far as a selective strategy must know them.
        coming: slots of what would have been found, but is still being stored.
        states: where layers keep a state in place of keys, those at the end of the claim.
    """

    T: int
    local: int
    end: int
    found: tuple[Found, ...]
    rows: np.ndarray
    chosen: np.ndarray
    moved: tuple[Run, ...]
    beyond: tuple[Run, ...]
    first_moved: int | None
    strategy: Strategy = field(repr=False)
    digest: bytes = field(default=b"", repr=False)
    L: int = 1
    coming: frozenset[int] = frozenset()
    states: tuple[Found, ...] = ()

    @property
    def needed(self) -> tuple[Found, ...]:
        """All that is loaded."""
        return self.found + self.states

    @property
    def found_beyond(self) -> int:
        """How many found tokens are computed all the same."""
        return sum(end - start for start, end in self.beyond)

    @property
    def claimed(self) -> int:
        """Tokens that the engine is told it need not compute."""
        return self.end - self.local

    @property
    def computed(self) -> int:
        """Rows that are computed for the claim, as many whole ones."""
        return len(self.rows) + self._selected

    @property
    def _selected(self) -> int:
        return round(sum(self.strategy.counts(self.outline)) / self.L) if self.selective else 0

    def after(self, local: int) -> Plan:
        """The same plan for an engine that turns out to hold `local` tokens, not fewer."""
        if local == self.local:
            return self
        end = max(local, self.end)
        return replace(
            self,
            local=local,
            end=end,
            found=tuple(_clipped(self.found, local, end)),
            rows=self.rows[self.rows >= local],
            chosen=self.chosen[self.chosen >= local],
            moved=tuple((max(a, local), b) for a, b in self.moved if b > local),
            beyond=tuple((max(a, local), b) for a, b in self.beyond if b > local),
            states=self.states if local < end else (),
        )

    def nothing(self) -> Plan:
        """The same request, of which all that is not held is the engine's to compute."""
        none = positions([])
        beyond = tuple((s.start, s.end) for s in self.found) + self.beyond
        return replace(
            self, end=self.local, found=(), rows=none, chosen=none, moved=(), beyond=beyond,
            first_moved=None, states=(),
        )  # fmt: skip

    def until(self, end: int, states: Sequence[Found]) -> Plan:
        """The same request, of whose exact claim tokens up to `end` are left, and states there."""
        beyond = [(max(s.start, end), s.end) for s in self.found if s.end > end]
        found = tuple(_clipped(self.found, self.local, end))
        beyond += self.beyond
        return replace(self, end=end, found=found, beyond=tuple(beyond), states=tuple(states))

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
        return self.strategy.selective and bool(self.moved)

    def kinds(self, local_blended: int = 0) -> dict[str, int]:
        """Tokens of each kind; they add up to T. `local_blended` of the local ones are blended.

        Of a selective strategy, whose rows differ by layer, the mean over layers is recomputed.
        """
        starts, ends = _bounds(self.found)
        moved = np.array([s.kind == "moved" for s in self.found], bool)
        kept = ends - starts - inside(self.chosen, starts, ends)
        reused = {"exact": int(kept[~moved].sum()), "moved": int(kept[moved].sum())}
        selected = self._selected
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
        """By block, how its KV came to be, from the first moved token's block on.

        Two requests get equal recipes where equal variants went in at equal places and the
        same rows were computed again, so that one finds the other's blended blocks; `nonce`
        makes them unlike all others.
        """
        if self.first_moved is None:
            return {}
        head = nonce + bytes([self.strategy.rotate])
        if self.selective:
            # Which rows of a block are computed depends on all of the request.
            chosen = blake3(self.digest + repr(self.strategy).encode())
            # Of what is exact the engine holds now more, now less, and it is the same KV.
            for s in (s for s in self.found if s.start >= self.first_moved):
                chosen.update(s.record.id + np.array([s.at, s.start, s.end], "<i8").tobytes())
            head += chosen.digest()
        first, last = self.first_moved // block_size, (self.end - 1) // block_size
        found = [s for s in self.found if s.end > first * block_size]
        starts, ends = _bounds(found)
        names = b"".join([NAMED.pack(s.record.id, s.at, s.end) for s in found])
        # Of each block the chunks in it, and the rows computed in it, one behind the other.
        borders = np.arange(first, last + 2) * block_size
        begin = (NAMED.size * np.searchsorted(ends, borders[:-1], "right")).tolist()
        end = (NAMED.size * np.searchsorted(starts, borders[1:], "left")).tolist()
        rows = self.rows.astype("<i8").tobytes()
        at = (8 * np.searchsorted(self.rows, borders)).tolist()
        return {
            first + i: head + names[begin[i] : end[i]] + rows[at[i] : at[i + 1]]
            for i in range(last + 1 - first)
        }


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
    tiers: Sequence[Answers] = (),
    context: ContextPolicy = "any",
    begins: int | None = None,
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
        tiers: what those behind the index said they have: records without a slot.
        context: what a chunk that is moved may have been computed behind.
        begins: the token that prompts begin with, if the model has one.

    Raises:
        ValueError: a selective strategy and no `L`.
    """
    T = len(tokens)
    control = strategy.control or not decline
    moves = strategy.moves and not contiguous
    known = Known(index, namespace, tiers, context, begins)
    everything = find(tokens, pieces, known, local, moves)
    runs = _moved_runs(everything)
    moved = [(max(a, local), b) for a, b in runs if b > local]
    found = _clipped(everything, local, T)
    share = 0.0  # of the moved rows, what a selective strategy recomputes
    if strategy.selective:
        if L is None:
            raise ValueError(
                f"{type(strategy).__name__} chooses rows by layer: give the number of layers"
            )
        chosen = positions([])
        share = _selected_share(strategy, _outline(moved, found, local, T, L))
    else:
        # Whole runs are shown to the strategy: one that began inside `local` has its first rows
        # behind it already.
        chosen = strategy.rows(_outline(runs, found, local, T, L or 1))
        chosen = chosen[chosen >= local]
    claimable = _leading(found, local) if contiguous else found
    end, gain = _best_end(claimable, chosen, share, local, T, control)
    blends = any(s.kind == "moved" and s.start < end for s in claimable)
    if blends and not control and gain < min_gain:
        end = local
    served = tuple(_clipped(found, local, end))
    chosen = chosen[chosen < end]
    return Plan(
        T=T,
        local=local,
        end=end,
        found=served,
        rows=np.union1d(_gaps(served, local, end), chosen),
        chosen=chosen,
        moved=tuple((a, min(b, end)) for a, b in moved if a < end),
        beyond=tuple((max(s.start, end), s.end) for s in found if s.end > end),
        first_moved=next((s.start for s in served if s.kind == "moved"), None),
        strategy=strategy,
        digest=blake3(np.ascontiguousarray(tokens, "<i8").tobytes()).digest() if share else b"",
        L=L or 1,
        coming=frozenset(known.coming),
    )


def _outline(moved: Sequence[Run], found: Sequence[Found], local: int, T: int, L: int) -> Outline:
    """The request as a strategy sees it before the claim is cut to what is worth it."""
    end = min(found[-1].end, T - 1) if found else local
    new = T - local - sum(min(s.end, end) - s.start for s in found)
    return Outline(L=L, T=T, end=end, moved=tuple(moved), new=new)


def _selected_share(strategy: Strategy, outline: Outline) -> float:
    """Of the moved rows, what a selective strategy and its probe compute, as whole rows."""
    if not outline.n:
        return 0.0
    computed = sum(strategy.counts(outline)) + probe_row_layers(strategy.needs(outline), outline)
    return computed / outline.L / outline.n


def _moved_runs(found: Sequence[Found]) -> list[Run]:
    """Moved tokens as runs; chunks that kept their neighbour in front stay in one run."""
    runs: list[Run] = []
    before: Found | None = None
    for s in found:
        if s.kind != "moved":
            before = None
            continue
        if before is not None and continues(before, s.record, s.at):
            runs[-1] = (runs[-1][0], s.end)
        else:
            runs.append((s.start, s.end))
        before = s
    return runs


def _leading(found: Sequence[Found], local: int) -> list[Found]:
    """The exact chunks that follow `local` without a gap."""
    leading: list[Found] = []
    for s in found:
        if s.start != (leading[-1].end if leading else local):
            break
        leading.append(s)
    return leading


def _best_end(
    found: Sequence[Found],
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
    starts, ends = _bounds(found)
    ends = np.minimum(ends, T - 1)
    starts, ends = starts[ends > starts], ends[ends > starts]
    if not len(ends):
        return local, 0.0
    lengths = ends - starts
    saved = lengths.astype(np.float64)
    if not control:
        moved = np.array([s.kind == "moved" for s in found[: len(ends)]], bool)
        saved -= inside(chosen, starts, ends) + share * lengths * moved
    gains = np.cumsum(saved - (starts - np.concatenate([[local], ends[:-1]])))
    best = int(np.argmax(gains))
    return (int(ends[best]), float(gains[best])) if gains[best] > 0 else (local, 0.0)


def _gaps(found: Sequence[Found], local: int, end: int) -> np.ndarray:
    """Positions in `[local, end)` that no chunk serves."""
    starts, ends = _bounds(found)
    gaps = np.stack((np.append(local, ends), np.append(starts, end)), axis=1)
    return positions(gaps[gaps[:, 0] < gaps[:, 1]])


def _bounds(found: Sequence[Found]) -> tuple[np.ndarray, np.ndarray]:
    """Where chunks start and where they end, int64 each."""
    starts, ends = ([s[i] for s in found] for i in (0, 1))
    return np.array(starts, np.int64), np.array(ends, np.int64)


def _clipped(found: Sequence[Found], start: int, end: int) -> list[Found]:
    """The parts of ascending chunks that lie inside `[start, end)`."""
    kept = [s for s in found if s.end > start and s.start < end]
    for i in {0, len(kept) - 1} if kept and start < end else ():
        s = kept[i]
        kept[i] = s._replace(start=max(s.start, start), end=min(s.end, end))
    return kept if start < end else []
