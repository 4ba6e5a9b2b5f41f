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
from lmc.store.flights import NAME_BYTES, QUEUED_S, Flight, SingleFlight
from lmc.store.record import id_of

SHORTEST = 128  # tokens; less is computed before it is told of
FAIR = 2  # times the tokens that waiting saves may be left to compute until they are there
LOOK_S = 0.05
ANSWER_S = 0.25  # a tier that does not say by then what others compute is not asked for a while
RESTS = 9  # times as long as looking took, for each that waits, it is not looked again
GLANCE_S = 0.003  # that a new request waits for what a tier says at once, if it does
LINGER_S = 2.0  # until what the workers have stored is in the tiers


class Flights:
    """Has what several requests need computed once, as far as that takes none of them longer.

    Who comes first computes; who needs the same waits until it is stored, no longer than
    `single_flight_s` seconds, and only where what is left to compute until then is little beside
    what that saves. A document counts where it stands in the prompt exactly as in the other one,
    where the other computes it behind nothing, and, if the engine moves chunks out of any context,
    wherever it stands. Whose wait ends for nothing takes the rest upon itself, or waits for who
    has.
    """

    def __init__(self, config: LMCConfig, planner: Planner) -> None:
        self.counts: Counter[str] = Counter()
        self._planner, self._patience_s = planner, config.single_flight_s
        self._any = config.context == "any"
        self._begins = planner.begins
        self._owners: dict[bytes, Tracked] = {}
        self._following: set[int] = set()  # ids of those that wait
        self._storing: dict[int, Tracked] = {}  # by slot, who has computed it
        self._breaker = Breaker()
        shared = planner.shared_flights
        self._others = SingleFlight(shared) if shared is not None and self._patience_s else None

    def waits(self, tracked: Tracked) -> bool:
        """Whether a request that vLLM would admit now waits for another.

        One that has waited is to be planned again: it asks the tiers anew.
        """
        if not self._patience_s or not tracked.saves:
            self.landed(tracked)
            return False
        now = time.monotonic()
        waiting = tracked.waiting
        if waiting is None:
            waiting = tracked.waiting = self._begun(tracked, now)
        if waiting.over:
            return False
        if waiting.waited and now < waiting.look:
            return True  # else the tier answers any moment
        vain = now >= waiting.since + self._patience_s
        if not vain and self._still(tracked, waiting, now):
            took = time.monotonic() - now
            rest = max(LOOK_S, RESTS * took * len(self._following))
            waiting.look = min(now + rest, waiting.since + self._patience_s)
            return True
        waiting.over = True
        self._following.discard(id(tracked))
        self.counts["flights_in_vain"] += vain
        if waiting.waited:
            self._planner.ask(tracked, tracked.local, anew=True)
            tracked.seen, tracked.rested, tracked.asked = -1, 0.0, now
            if not vain:  # what is still not there is begun anew
                self._let_go(tracked)
                tracked.waiting = None
                tracked.waits_since = waiting.since
        return False

    def admitted(self, tracked: Tracked) -> None:
        """A request is about to compute what it took upon itself."""
        waiting = tracked.waiting
        if waiting is None or waiting.landed or not waiting.ours:
            return
        self._take(tracked, waiting)  # what is free again, if it took too long
        if self._others is None:
            return
        if waiting.told is not None and waiting.told.lapsed:
            self._others.end(waiting.told)
            waiting.told = None
        if waiting.told is None and self._breaker.allows():
            waiting.told = Flight({n: waiting.ours[n] for n in tracked.leads}, ())
            self._others.begin(waiting.told)
        if waiting.told is not None:
            waiting.told.admitted = True

    def landed(self, tracked: Tracked, slots: Sequence[int] = ()) -> None:
        """A request computes its prompt to the end in this step, or will not.

        Args:
            slots: of what is stored of it. The step may take long: who waits does so until the
                workers have them.
        """
        waiting = tracked.waiting
        if waiting is None or waiting.landed or waiting.storing:
            return
        waiting.over = True
        self._following.discard(id(tracked))
        waiting.storing = len(slots)
        self._storing |= dict.fromkeys(slots, tracked)
        if not slots:
            waiting.landed = True
            self._let_go(tracked)

    def stored(self, slot: int) -> None:
        """All workers have a chunk, or have said that they will not."""
        tracked = self._storing.pop(slot, None)
        if tracked is None or tracked.waiting is None:
            return
        waiting = tracked.waiting
        waiting.storing -= 1
        if not waiting.storing:
            waiting.landed = True
            self._let_go(tracked, LINGER_S)

    def close(self) -> None:
        """Let go of the tier's."""
        if self._others is not None:
            self._others.close()

    # -- parts -------------------------------------------------------------------------------

    def _begun(self, tracked: Tracked, now: float) -> Waiting:
        """Take what nobody has taken of what a request must compute; see who has the rest."""
        waiting = Waiting(begun=now, since=tracked.waits_since or now)
        pieces = _new(tracked)
        if sum(piece.end - piece.start for piece in pieces) < SHORTEST:
            waiting.over = True
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
        waiting.wanted = {
            name: piece
            for names in serving
            for name, piece in zip(names, pieces, strict=True)
            if name not in tracked.flown
        }
        waiting.requests = self._ahead(tracked, waiting.wanted)
        # What is computed over moved chunks is exact for nobody, and stored for nobody else.
        until = len(tracked.tokens) if (first := tracked.plan.first_moved) is None else first
        left = len(tracked.tokens) - tracked.local
        for piece, *names in zip(pieces, exact, by_content, strict=True):
            if piece.end <= until:
                waiting.ours |= dict.fromkeys(names, left)
        self._take(tracked, waiting)
        self._follows(tracked, waiting, bool(waiting.requests))
        waiting.over = not waiting.requests
        if self._others is not None and self._breaker.allows():
            owners, idle = self._owners, self._others.idle
            asked = [name for name in waiting.wanted if owners.get(name, tracked) is tracked]
            waiting.flight = waiting.told = Flight(dict.fromkeys(tracked.leads, left), asked)
            waiting.over = False
            self._others.begin(waiting.flight)
            if idle:
                waiting.flight.wait(GLANCE_S)
        return waiting

    def _take(self, tracked: Tracked, waiting: Waiting) -> None:
        owners = self._owners
        for name in waiting.ours:
            owner = owners.get(name)
            if owner is None or not _flies(owner):
                owners[name] = tracked
        tracked.leads = [name for name in waiting.ours if owners[name] is tracked]

    def _let_go(self, tracked: Tracked, linger_s: float = 0.0) -> None:
        """Others may take what a request has taken upon itself."""
        for name in tracked.leads:
            if self._owners.get(name) is tracked:
                del self._owners[name]
        tracked.leads = []
        waiting = tracked.waiting
        if waiting is not None and waiting.told is not None and self._others is not None:
            self._others.end(waiting.told, linger_s)
            waiting.told = None

    def _follows(self, tracked: Tracked, waiting: Waiting, does: bool) -> None:
        if does and not waiting.waited:
            waiting.waited = True
            self._following.add(id(tracked))
            self.counts["flights_followed"] += not tracked.waits_since

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
            if owner is not None and owner is not tracked and _flies(owner):
                owners[id(owner)] = owner
                saved.setdefault(id(owner), set()).add(piece)
        return [
            owner
            for i, owner in owners.items()
            if _worth(saved[i], owner.request.num_prompt_tokens - owner.request.num_computed_tokens)
        ]

    def _still(self, tracked: Tracked, waiting: Waiting, now: float) -> bool:
        """Whether anything is still to be waited for."""
        waiting.requests = [r for r in waiting.requests if r.leads and _flies(r)]
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
        tracked.flown |= {n for n in flight.others if waiting.wanted[n] in found}
        theirs = {n: p for n in flight.others if (p := waiting.wanted[n]) not in found}
        left = max((flight.others[name] for name in theirs), default=0)
        if not theirs or not _worth(found | set(theirs.values()), left):  # they come one by one
            return False
        self._follows(tracked, waiting, True)
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


def _flies(owner: Tracked) -> bool:
    """Whether a request computes what it took, or will soon; not one that waits itself."""
    waiting = owner.waiting
    assert waiting is not None
    begins = owner.report is not None or time.monotonic() <= waiting.begun + QUEUED_S
    return owner.saves and begins and not waiting.landed


def _worth(saved: set[Piece], left: int) -> bool:
    """Whether to wait for chunks that are there when so many tokens have been computed."""
    tokens = sum(piece.end - piece.start for piece in saved)
    return tokens >= SHORTEST and left <= FAIR * tokens
