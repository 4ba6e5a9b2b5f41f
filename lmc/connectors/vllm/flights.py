"""Who waits for what another request computes, in this engine or in one that shares a tier."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

import numpy as np

from lmc.chunking.pieces import Piece, content_keys, context_digests
from lmc.connectors.vllm.config import LMCConfig
from lmc.connectors.vllm.planner import Planner
from lmc.connectors.vllm.tracked import Tracked, Waiting
from lmc.store.breaker import Breaker
from lmc.store.flights import NAME_BYTES, Flight, SingleFlight
from lmc.store.record import id_of

SHORTEST = 128  # tokens; less is computed before it is told of
FAIR = 2  # times the tokens that waiting saves may be left to compute until they are there
LOOK_S = 0.05
ANSWER_S = 0.25  # a tier that does not say by then what others compute is not asked for a while
RESTS = 9  # times as long as looking took it is not looked again
LINGER_S = 5.0  # until what is computed is in the tiers


class Flights:
    """Has what several requests need computed once, as far as that takes none of them longer.

    Who comes first computes; who needs the same waits until it is stored, no longer than
    `single_flight_s` seconds, and only where what is left to compute until then is little beside
    what that saves. A document counts where it stands in the prompt exactly as in the other one,
    where the other computes it behind nothing, and, if the engine moves chunks out of any context,
    wherever it stands.
    """

    def __init__(self, config: LMCConfig, planner: Planner) -> None:
        self.counts: Counter[str] = Counter()
        self._planner, self._patience_s = planner, config.single_flight_s
        self._any = config.context == "any"
        self._begins = planner.begins
        self._owners: dict[bytes, Tracked] = {}
        self._breaker = Breaker()
        shared = planner.shared_flights
        self._others = SingleFlight(shared) if shared is not None and self._patience_s else None

    def waits(self, tracked: Tracked) -> bool:
        """Whether a request that vLLM would admit now waits for another.

        One that has waited is to be planned again: it asks the tiers anew.
        """
        if not self._patience_s or not tracked.saves:
            return False
        if tracked.waiting is None:
            tracked.waiting = self._begun(tracked)
        waiting = tracked.waiting
        if waiting.over:
            return False
        now = time.monotonic()
        if waiting.waited and now < waiting.look:
            return True  # else the tier answers any moment
        vain = now >= waiting.since + self._patience_s
        if not vain and self._still(tracked, waiting, now):
            waiting.look = now + max(LOOK_S, RESTS * (time.monotonic() - now))
            return True
        waiting.over = True
        self.counts["flights_in_vain"] += vain
        if waiting.waited:
            self._planner.ask(tracked, tracked.local, anew=True)
            tracked.seen, tracked.rested, tracked.asked = -1, 0.0, now
        return False

    def landed(self, tracked: Tracked, stored: bool) -> None:
        """A request has computed its prompt, or will not.

        Args:
            stored: whether what it has computed is on its way into the store.
        """
        waiting = tracked.waiting
        if waiting is None:
            return
        for name in tracked.leads:
            if self._owners.get(name) is tracked:
                del self._owners[name]
        tracked.leads = []
        waiting.over = True
        if waiting.flight is not None and self._others is not None:
            self._others.end(waiting.flight, LINGER_S if stored else 0.0)
            waiting.flight = None

    def close(self) -> None:
        """Let go of the tier's."""
        if self._others is not None:
            self._others.close()

    # -- parts -------------------------------------------------------------------------------

    def _begun(self, tracked: Tracked) -> Waiting:
        """Take what nobody has taken of what a request must compute; see who has the rest."""
        waiting = Waiting(since=time.monotonic(), over=True)
        pieces = _new(tracked)
        missing = sum(piece.end - piece.start for piece in pieces)
        if missing < SHORTEST:
            return waiting
        assert tracked.plan is not None and tracked.options is not None
        moves = tracked.options.strategy.moves and not tracked.refusal and not tracked.gate
        ids = np.ascontiguousarray(tracked.tokens, "<i8").tobytes()
        contents = [ids[8 * p.start : 8 * p.end] for p in pieces]
        keys = content_keys(tracked.namespace, contents)
        contexts = context_digests(tracked.tokens, [p.start for p in pieces])
        exact = [id_of(*pair)[:NAME_BYTES] for pair in zip(keys, contexts, strict=True)]
        by_content = [key[:NAME_BYTES] for key in keys]
        serving = [exact]
        if moves:
            serving.append(by_content if self._any else self._alone(tracked, pieces, keys))
        waiting.contents = {p.start: content for p, content in zip(pieces, contents, strict=True)}
        wanted = {
            name: piece for names in serving for name, piece in zip(names, pieces, strict=True)
        }
        waiting.requests = self._ahead(tracked, wanted)
        # What is computed over moved chunks is exact for nobody, and stored for nobody else.
        until = len(tracked.tokens) if (first := tracked.plan.first_moved) is None else first
        left = len(tracked.tokens) - tracked.local
        ours: dict[bytes, int] = {}
        for piece, *names in zip(pieces, exact, by_content, strict=True):
            if piece.end <= until:
                ours |= {n: left for n in names if self._owners.setdefault(n, tracked) is tracked}
        tracked.leads = list(ours)
        waiting.wanted = wanted
        waiting.waited = bool(waiting.requests)
        waiting.over = not waiting.requests
        self.counts["flights_followed"] += waiting.waited
        if self._others is not None and self._breaker.allows():
            asked = [name for name in wanted if self._owners.get(name, tracked) is tracked]
            waiting.flight = Flight(ours, asked)
            waiting.over = False
            self._others.begin(waiting.flight)
        return waiting

    def _alone(
        self, tracked: Tracked, pieces: Sequence[Piece], keys: Sequence[bytes]
    ) -> list[bytes]:
        """Names of chunks as they are where a text of them stands alone, or behind the first token.

        Chunks that follow each other are one text, as documents between two others are.
        """
        tokens = tracked.tokens
        begins = self._begins is not None and int(tokens[0]) == self._begins
        front = tokens[: int(begins)]
        names: list[bytes] = []
        assert tracked.options is not None
        first, ends = 0, dict(tracked.options.chunks or ())
        while first < len(pieces):
            last = first + 1
            until = ends.get(pieces[first].start, pieces[first].end)
            while last < len(pieces) and pieces[last].end <= until:
                last += 1
            start = pieces[first].start
            text = np.concatenate([front, tokens[start : pieces[last - 1].end]])
            at = [len(front) + piece.start - start for piece in pieces[first:last]]
            pairs = zip(keys[first:last], context_digests(text, at), strict=True)
            names += [id_of(*pair)[:NAME_BYTES] for pair in pairs]
            first = last
        return names

    def _ahead(self, tracked: Tracked, wanted: dict[bytes, Piece]) -> list[Tracked]:
        """Requests of this engine that are worth waiting for."""
        saved: dict[int, set[Piece]] = {}
        owners: dict[int, Tracked] = {}
        for name, piece in wanted.items():
            owner = self._owners.get(name)
            if owner is not None and owner is not tracked:
                owners[id(owner)] = owner
                saved.setdefault(id(owner), set()).add(piece)
        return [
            owner
            for i, owner in owners.items()
            if _worth(saved[i], owner.request.num_prompt_tokens - owner.request.num_computed_tokens)
        ]

    def _still(self, tracked: Tracked, waiting: Waiting, now: float) -> bool:
        """Whether anything is still to be waited for."""
        waiting.requests = [r for r in waiting.requests if r.leads]
        return self._theirs(tracked, waiting, now) or bool(waiting.requests)

    def _theirs(self, tracked: Tracked, waiting: Waiting, now: float) -> bool:
        """Whether another engine computes what is waited for."""
        flight = waiting.flight
        if flight is None or self._others is None:
            return False
        if not flight.over:
            late = now >= flight.looked + ANSWER_S
            if late:
                self._breaker.late()
                self.counts["flights_unanswered"] += 1
            return not late
        self._breaker.answered()
        found = self._found(tracked, waiting)
        theirs = {n: p for n in flight.others if (p := waiting.wanted[n]) not in found}
        left = max((flight.others[name] for name in theirs), default=0)
        if not theirs or not _worth(set(theirs.values()), left):
            return False
        self.counts["flights_followed"] += not waiting.waited
        waiting.waited = True
        if tracked.lookup is None or tracked.lookup.over:
            self._others.look(flight)
            self._planner.ask(tracked, tracked.local, anew=True)
        return True

    def _found(self, tracked: Tracked, waiting: Waiting) -> set[Piece]:
        """Chunks that a tier has by now."""
        lookup = tracked.lookup
        if lookup is None or not lookup.over:
            return set()
        return {
            piece
            for piece in waiting.wanted.values()
            if any(answers.of(waiting.contents[piece.start]) for answers in lookup.answers)
        }


def _new(tracked: Tracked) -> list[Piece]:
    """Chunks of a prompt, each whole, that nothing serves all of."""
    plan, T = tracked.plan, len(tracked.tokens)
    assert plan is not None
    served = np.zeros(T + 1, np.int64)
    served[1 : tracked.local + 1] = 1
    for start, end in [*((s.start, s.end) for s in plan.found), *plan.beyond]:
        served[start + 1 : end + 1] = 1
    before = served.cumsum()
    return [
        piece
        for piece in tracked.pieces
        if piece.closed and before[piece.end] - before[piece.start] < piece.end - piece.start
    ]


def _worth(saved: set[Piece], left: int) -> bool:
    """Whether to wait for chunks that are there when so many tokens have been computed."""
    tokens = sum(piece.end - piece.start for piece in saved)
    return tokens >= SHORTEST and left <= FAIR * tokens
