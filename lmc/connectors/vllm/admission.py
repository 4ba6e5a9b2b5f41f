"""With which plan a request is let in, and when."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lmc.blend.plan import Plan
from lmc.connectors.vllm.config import LMCConfig
from lmc.connectors.vllm.flights import GLANCE_S, LOOK_S, Flights
from lmc.connectors.vllm.local import LocalCache
from lmc.connectors.vllm.messages import Claim, Observed
from lmc.connectors.vllm.namespaces import Namespace
from lmc.connectors.vllm.planner import Planner
from lmc.connectors.vllm.reading import Reader
from lmc.connectors.vllm.taint import rechain, untaint
from lmc.connectors.vllm.tracked import Tracked

PAUSE_S = 0.005  # of an engine in which all wait for others
RESTS = 9  # times as long as planning it took a request is not planned again


class Admission:
    """Plans requests when they come, and settles when vLLM wants to admit them what they claim.

    A request that only waits keeps nothing in memory and has nothing fetched, however many there
    are. Between its arrival and its turn more may have been stored: then it is planned again.

    Args:
        rows: that claims may have computed in one step, all together; one of more goes alone.
        begun: requests that were admitted and are not over, by id; far fewer than those that wait.
        pages: of one layer, in which rows attend where vLLM keeps windows apart.

    Attributes:
        computes: whether workers compute rows in place of chunks that are lost.
        counts: what happened, by name.
        observed: how long plans took.
    """

    def __init__(
        self,
        config: LMCConfig,
        rows: int,
        planner: Planner,
        reader: Reader,
        namespace: Namespace,
        local: LocalCache,
        flights: Flights,
        begun: dict[str, Tracked],
        pages: int,
    ) -> None:
        self.computes = False
        self.counts: Counter[str] = Counter()
        self.observed = Observed()
        self._patience_s, self._rows = config.fetch_patience_s, rows
        self._planner, self._reader, self._namespace = planner, reader, namespace
        self._local, self._flights, self._begun = local, flights, begun
        self._block_size = local.block_size
        self._seen = pages * local.block_size
        self._first_in_line: Tracked | None = None
        # Of those that wait to be handed their prompts, by id, since when.
        self._handed: dict[int, float] = {}
        self._deferred = False  # whether a request was, since the last step

    def arrived(self, tracked: Tracked, refusal: str | None) -> None:
        """Plan a new request, and taint it, before vLLM looks into its own cache.

        Args:
            refusal: why rows cannot be recomputed here, or None.
        """
        tracked.refusal = refusal or self._local.groups.unseen(len(tracked.tokens), self._seen)
        handed = tracked.options is not None and tracked.options.handed is not None
        if handed:  # before vLLM is asked: what it has of these tokens may be another KV
            recipes = self._recipes(tracked, 0)
            rechain(tracked.request, self._block_size, 0, [], recipes, tracked.tokens)
        local = self._local.held(tracked)
        known: list[bytes] = []
        chain = None if refusal or handed else self._local.earlier_turn(tracked, local)
        if chain:
            known = chain.hashes
            local = (chain.first + len(known)) * self._block_size
            tracked.blended_from = chain.blended_from
        self._planner.ask(tracked, local)
        if tracked.lookup is not None:
            tracked.lookup.wait(time.monotonic() + GLANCE_S)
        self._plan(tracked, local)
        assert tracked.plan is not None
        if handed:
            self._hashed_anew(tracked, local)
            tracked.blended_from = 0
            return
        recipes = tracked.plan.recipes(self._block_size)
        if known or recipes:
            first = chain.first if chain else min(recipes)
            rechain(tracked.request, self._block_size, first, known, recipes, tracked.tokens)

    def claimed(self, tracked: Tracked, local: int, claims: Sequence[Claim]) -> int | None:
        """Tokens beyond vLLM's own `local` that are claimed; None to be asked again next step.

        Args:
            claims: of those that were admitted in this step.
        """
        tokens = self._claimed(tracked, local, claims)
        self._deferred |= tokens is None
        return tokens

    def pause(self, scheduled: int) -> None:
        """Where a step computes nothing, since all wait for others, it waits a moment as well.

        Else steps would follow each other at once, in several processes, and take the processor
        from those that are waited for: engines beside this one, and threads that read and copy.
        """
        if self._deferred and not scheduled:
            time.sleep(PAUSE_S)
        self._deferred = False

    def rows(self, claims: Sequence[Claim]) -> int:
        """Rows that these claims have computed, as many whole ones."""
        plans = [self._begun[claim.request_id].admitted for claim in claims]
        return sum(plan.computed for plan in plans if plan is not None)

    def to_the_end(self, claims: list[Claim], scheduler_output: Any) -> list[Claim]:
        """The claims, through all that is scheduled behind them if the step is for nothing else.

        Then vLLM's own forward is left out. Otherwise a blended prompt has the weights read twice,
        and with so few rows that is most of what either time costs. Where more rows than claims may
        have lie behind them, it is the lesser part, and vLLM's forward may be compiled. And not
        where fresh KV of rows that are looked at may be taken back: what lies behind must not see
        it.
        """
        scheduled: dict[str, int] = scheduler_output.num_scheduled_tokens
        alone = scheduled.keys() == {claim.request_id for claim in claims}
        few = sum(scheduled.values()) <= self._rows and not self._local.groups.longest
        if not (alone and few and any(claim.computes for claim in claims)):
            return claims
        further = []
        for claim in claims:
            through = claim.end + scheduled[claim.request_id]
            tokens = self._begun[claim.request_id].tokens
            # Shorter where vLLM schedules drafts too.
            known = claim.planned and through <= len(tokens)
            if claim.strategy is not None and claim.strategy.written == "selected":
                return claims
            if not known or bool(claim.lora) != bool(claims[0].lora):
                return claims
            tokens = tokens if claim.strategy is not None else tokens[:through]
            further.append(replace(claim, tokens=tokens, through=through))
        return further

    # -- parts -------------------------------------------------------------------------------

    def _claimed(self, tracked: Tracked, local: int, claims: Sequence[Claim]) -> int | None:
        if tracked.plan is None:
            return 0
        tracked.asked = tracked.asked or time.monotonic()
        reason = self._waits_first(tracked, claims)
        if reason is None:
            if self._outdated(tracked, local):
                self._replan(tracked, local)
            elif self._grown(tracked) and self._planned_again(tracked, local):
                return None
            reason = self._waits_first(tracked, claims) or self._waits(tracked)
        if reason:
            self.counts[f"deferred_for_{reason}"] += 1
            return None
        plan = tracked.admitted = tracked.plan.after(local)
        others = [r for r in self._begun.values() if r is not tracked]
        # Also where nothing is to be computed: a chunk may be lost.
        if plan.claimed and self._local.hits_uncomputed(tracked, local, others):
            self.counts["deferred"] += 1
            return None
        running = any(r.request.status.name == "RUNNING" for r in others)
        # Where nothing runs, what was pinned in vain will be in vain again.
        in_vain = any(tracked.front) and not running
        if plan.claimed and (in_vain or not self._local.pin(tracked, local)):
            if running:  # when they are over there may be room
                self.counts["deferred_for_windows"] += 1
                return None
            self.counts["claims_without_windows"] += 1
            _remember(tracked, local)
            plan, tracked.front = plan.nothing(), []
            tracked.admitted = plan
        if plan.selective and plan.first_moved is not None and local > plan.first_moved:
            # Out of fewer moved rows it may choose others than the hashes stand for.
            recipes = plan.recipes(self._block_size, nonce=os.urandom(16))
            rechain(tracked.request, self._block_size, local // self._block_size, [], recipes)
        return plan.claimed

    def _waits_first(self, tracked: Tracked, claims: Sequence[Claim]) -> str | None:
        """What is ahead of a request, if anything is; costs nothing."""
        assert tracked.plan is not None and tracked.asked is not None
        if claims:
            computed = tracked.plan.after(max(tracked.local, tracked.plan.local)).computed
            if self.rows(claims) + computed > self._rows:
                return "rows"
        if tracked.held:
            return None
        if tracked.heard and self._flights.waits(tracked):
            return "flight"
        if not tracked.heard and not tracked.answered:
            return "lookup"
        patient = time.monotonic() - tracked.asked < self._patience_s
        if patient and self._to_be_handed(tracked):
            return "hand_over"
        if patient and self._planner.index.still_coming(tracked.plan.coming):
            return "save"
        if not tracked.needs:
            return None
        # Who is first in line for memory stays so, however many that need less come behind.
        line = self._first_in_line
        if line is not None and line is not tracked and line.waits:
            return "memory"
        self._first_in_line = None if self._planner.room(tracked) else tracked
        return "memory" if self._first_in_line else None

    def _to_be_handed(self, tracked: Tracked) -> bool:
        """Whether more is to come of what another engine hands over; looks from time to time."""
        assert tracked.options is not None
        if tracked.options.handed is None or tracked.report is not None or _whole(tracked):
            return False
        if self._local.groups.states:  # of which nothing is handed over
            return False
        now, lookup = time.monotonic(), tracked.lookup
        if now < tracked.looks or (lookup is not None and not lookup.over):
            return True
        _remember(tracked, tracked.local)
        self._plan(tracked, tracked.local)
        self._hashed_anew(tracked, tracked.local)
        if _whole(tracked):
            return False
        self._planner.ask(tracked, tracked.local, anew=True)
        took = time.monotonic() - now
        # Whose client has hung up is among them until it would have waited no more.
        self._handed[id(tracked)] = tracked.asked or now
        waiting = self._handed.items()
        self._handed = {i: since for i, since in waiting if now - since < self._patience_s}
        tracked.looks = now + took + max(LOOK_S, RESTS * took * len(self._handed))
        return True

    def _recipes(self, tracked: Tracked, first: int, nonce: bytes = b"") -> dict[int, bytes]:
        """What block hashes are derived from too, from block `first` on.

        All of what is handed over goes by its name, as long as it is all there.
        """
        options, plan = tracked.options, tracked.plan
        if options is None or options.handed is None:
            return {} if plan is None else plan.recipes(self._block_size, nonce)
        name = b"handed" + tracked.namespace
        if plan is not None and not _whole(tracked):
            nonce = nonce or os.urandom(16)
        return {0: name} | ({first: nonce + name} if nonce else {})

    def _waits(self, tracked: Tracked) -> str | None:
        """What a request has to wait for, if anything; else what it needs is kept for it."""
        assert tracked.plan is not None
        if not self._planner.hold(tracked):
            # Where host memory has no room for what a tier has, what it holds itself must do.
            self._replan(tracked, tracked.local, tiers=False)
            self._planner.hold(tracked)
        # Without rows to compute in its place, a chunk must be there before it is counted on.
        others = (r for r in self._begun.values() if r is not tracked)
        running = any(other.request.num_computed_tokens for other in others)
        fetch = self._planner.waits(tracked, running or not self.computes)
        if fetch == "fetch":
            return fetch
        if fetch == "late" or not self._planner.still_held(tracked):
            self._replan(tracked, tracked.local)
            return self._waits(tracked)
        return None

    def _grown(self, tracked: Tracked) -> bool:
        """Whether more has been stored since a request was planned, and it is time to look.

        vLLM may ask for it at every step, for want of pages, and something is always being stored.
        """
        assert tracked.plan is not None
        if not tracked.heard:
            # Of nothing: then the plan stands.
            tracked.heard = not any(asked.told for asked in tracked.asked_of)
            if not tracked.heard:
                return True
        due = tracked.plan.coming or time.monotonic() >= tracked.rested
        return bool(due) and tracked.seen != self._planner.index.added

    def _outdated(self, tracked: Tracked, local: int) -> bool:
        """Whether the plan is of no use any more."""
        assert tracked.plan is not None
        grown = len(tracked.tokens) != tracked.request.num_tokens
        request, options = tracked.request, tracked.options
        assert options is not None
        now = self._namespace.of(request.cache_salt, request.lora_request, options.handed)
        outdated = tracked.namespace != now
        held = self._planner.still_held(tracked)
        return grown or outdated or local < tracked.plan.local or not held

    def _plan(self, tracked: Tracked, local: int, tiers: bool = True) -> None:
        """Plan from `local` on, and count why a request does not blend."""
        self._listen(tracked)
        self._planner.use(tracked, *self._made(tracked, local, tiers))
        if tracked.reason:
            self.counts[f"unblended:{tracked.reason.split(':')[0]}"] += 1

    def _made(self, tracked: Tracked, local: int, tiers: bool = True) -> tuple[Plan, str | None]:
        """As `Planner.plan`; the time is counted."""
        start = time.perf_counter()
        made = self._planner.plan(tracked, local, tiers)
        self.observed.add("plan_seconds", time.perf_counter() - start)
        return made

    def _listen(self, tracked: Tracked) -> None:
        """What the tiers have answered by now is what the next plan knows."""
        tracked.heard |= tracked.answered

    def _planned_again(self, tracked: Tracked, local: int) -> bool:
        """Plan anew if more may be found; whether vLLM then holds more than `local`."""
        plan = tracked.plan
        assert plan is not None
        self._listen(tracked)
        begun = tracked.report is not None
        blended = plan.first_moved is not None and local > plan.first_moved
        if begun or blended:
            return False
        start = time.monotonic()
        new, reason = self._made(tracked, local)
        if tracked.lookup is not None and tracked.lookup.unasked and tracked.heard:
            self._planner.ask(tracked, local)  # what comes behind what a tier has was cut elsewhere
        before, now = plan.after(local), time.monotonic()
        tracked.seen, tracked.rested = self._planner.index.added, now + RESTS * (now - start)
        if _worth(new) <= _worth(before):
            tracked.plan = replace(plan, coming=new.coming)
            return False
        self.counts["planned_again"] += 1
        self._planner.use(tracked, new, reason)
        return self._hashed_anew(tracked, local) > local

    def _replan(self, tracked: Tracked, local: int, tiers: bool = True) -> None:
        """Admission is not what was planned for: plan anew, under hashes nobody else has."""
        self.counts["replanned"] += 1
        _remember(tracked, local)
        read = len(tracked.tokens), tracked.namespace
        self._reader.read_tokens(tracked)
        if (len(tracked.tokens), tracked.namespace) != read:
            self._planner.ask(tracked, local)
        self._plan(tracked, local, tiers)
        self._hashed_anew(tracked, local, nonce=os.urandom(16))

    def _hashed_anew(self, tracked: Tracked, local: int, nonce: bytes = b"") -> int:
        """Give a request the hashes of its new plan; tokens that vLLM holds under them."""
        assert tracked.plan is not None
        if tracked.blended_from is not None and tracked.blended_from >= local:
            tracked.blended_from = None
        first = local // self._block_size
        recipes = self._recipes(tracked, first, nonce)
        if recipes or nonce:
            rechain(tracked.request, self._block_size, first, [], recipes, tracked.tokens)
        else:
            untaint(tracked.request, self._block_size, first)
        return self._local.held(tracked)


def _remember(tracked: Tracked, local: int) -> None:
    """What vLLM holds in front is as blended as before, whatever is planned behind it."""
    plan, known = tracked.plan, tracked.blended_from
    if plan is not None and plan.first_moved is not None and local > plan.first_moved:
        tracked.blended_from = plan.first_moved if known is None else min(known, plan.first_moved)


def _whole(tracked: Tracked) -> bool:
    """Whether all of a prompt that is handed over is there."""
    plan = tracked.plan
    assert plan is not None
    reached = max(plan.end, tracked.local) >= tracked.request.num_prompt_tokens - 1
    return reached and not len(plan.rows)


def _worth(plan: Plan) -> tuple[int, int]:
    """Rows that a plan saves; of those that save none, as controls do, what they found."""
    return plan.claimed - plan.computed, plan.claimed
