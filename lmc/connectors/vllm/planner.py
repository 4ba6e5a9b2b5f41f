"""What a request reuses, out of host memory and the tiers behind it; leases and fetches."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from lmc.blend.baselines import Prefix
from lmc.blend.evidence import positions, without
from lmc.blend.plan import Plan, make_plan
from lmc.connectors.vllm import identity, states
from lmc.connectors.vllm.config import LMCConfig
from lmc.connectors.vllm.groups import Groups
from lmc.connectors.vllm.messages import ChunkLoad, Claim
from lmc.connectors.vllm.reading import survive
from lmc.connectors.vllm.states import Ends
from lmc.connectors.vllm.tracked import Tracked
from lmc.model.cost import PrefillCost
from lmc.model.layout import KVLayout
from lmc.store import Index, Record
from lmc.store.directory import Answers, Asked, Directory
from lmc.store.flights import Flights
from lmc.store.history import History
from lmc.store.lookup import Known, find, lacking, reach
from lmc.store.tier import taken

LOOKUP = 0.5  # of the patience for fetches: then a request is planned without what a tier has


class Planner:
    """Owns the index of host memory, and asks the tiers behind it what they have.

    Args:
        begins: the token that the model's prompts begin with, or None.
        groups: of vLLM's KV cache.

    Attributes:
        index: of host memory, on every rank.
        begins: as given.
        directory: of the tiers behind it.
        ends: states in it, where layers keep those; else None.

    Raises:
        ValueError, OSError: a tier that cannot be opened.
    """

    def __init__(
        self,
        config: LMCConfig,
        layout: KVLayout,
        cost: PrefillCost,
        ranks: int,
        vllm_config: Any,
        begins: int | None,
        groups: Groups,
    ) -> None:
        self.index = Index(
            config.memory_bytes, ranks, config.policy, cost,
            exact_variants=config.variants, history=History(),
        )  # fmt: skip
        self._kept = 0  # bytes of what is held for requests
        self._config = config
        self._layout = layout
        self.begins = begins
        # Of these only what they know is asked here; the workers have their bytes.
        opened = identity.open_tiers(config, layout, 0, vllm_config)
        self._tiers = [tier for _, tier in opened]
        self.directory = Directory(self._tiers, LOOKUP * config.fetch_patience_s)
        self.ends: Ends | None = None
        if groups.states:
            T = states.length_of(groups, layout.bytes_per_token)
            of = (self.index, T, T * layout.bytes_per_token)
            self.ends = Ends(groups.states, groups.block_size, *of)
        self._left_alone = 0
        # By slot on its way, the tier that told of it, and the record's id.
        self._sources: dict[int, tuple[int, bytes]] = {}
        self._fetches: list[Record] = []
        self._counts: Counter[str] = Counter()

    @property
    def shared_flights(self) -> Flights | None:
        """Of the first tier through which engines tell each other what they compute."""
        return next((f for t in self._tiers if (f := getattr(t, "flights", None))), None)

    def ask(self, tracked: Tracked, local: int, anew: bool = False) -> None:
        """Have the tiers asked, in the background, for what memory lacks beyond `local`.

        Args:
            anew: also for what they have answered.
        """
        if not self._tiers:
            return
        assert tracked.options is not None
        # A tier tells of more of what is handed over, and only the latest answers are known.
        told = () if anew and tracked.options.handed else None
        found = find(tracked.tokens, tracked.pieces, self.known(tracked, told), local)
        wanted = [p for p in lacking(tracked.pieces, found) if p.end > local]
        before = None if anew else tracked.lookup
        asked = (tracked.namespace, tracked.tokens, wanted, reach(found, local), before)
        tracked.lookup = self.directory.ask(*asked) if wanted else None
        tracked.heard = not wanted
        if self.ends is not None and (ends := self.ends.pieces(len(tracked.tokens), local)):
            named = self.ends.namespaces(tracked.namespace)
            tracked.states = [self.directory.ask(of, tracked.tokens, ends) for of in named]
            tracked.heard = False

    def plan(self, tracked: Tracked, local: int, tiers: bool = True) -> tuple[Plan, str | None]:
        """A plan from `local` on, and why it does not blend, if it was to.

        Args:
            tiers: whether to use what those behind host memory said they have, too.
        """
        start = time.perf_counter()
        told = self._told(tracked) if tiers else []
        plan, reason = self._chosen(tracked, local, told, tracked.refusal)
        if self.ends is not None:
            named = self.ends.namespaces(tracked.namespace)
            asked = tracked.states if tiers and tracked.states else [None] * len(named)
            said = [self._answers(one, of) for one, of in zip(asked, named, strict=True)]
            plan = self.ends.until(tracked, plan, said)
        tracked.took("plan", time.perf_counter() - start)
        return plan, reason

    def use(self, tracked: Tracked, plan: Plan, reason: str | None) -> None:
        """From now on this is the request's plan; nothing is kept for it yet."""
        self.release(tracked)
        tracked.plan, tracked.reason = plan, reason
        tracked.needs = sum(s.record.nbytes for s in plan.needed)
        tracked.seen, tracked.gone = self.index.added, self.index.gone

    def room(self, tracked: Tracked) -> bool:
        """Whether what the plan needs may be kept from eviction too.

        Requests that vLLM has yet to admit keep half of host memory at most, all together.
        """
        half = self.index.capacity // 2
        return not self._kept or self._kept + tracked.needs <= half

    def known(self, tracked: Tracked, told: Sequence[Answers] | None = None) -> Known:
        """What a request's namespace has, of its chunks, in host memory and in the tiers, as far
        as these have told; or as `told` has it."""
        return Known(
            self.index,
            tracked.namespace,
            self._told(tracked) if told is None else told,
            self._config.context,
            self.begins,
        )

    def silent(self, tracked: Tracked) -> bool:
        """Whether some tier did not say what it has of a request, or is left alone."""
        told = self._told(tracked)
        return tracked.lookup is not None and sum(a.told for a in told) < len(self._tiers)

    def waits(self, tracked: Tracked, others: bool) -> Literal["fetch", "late"] | None:
        """Whether chunks are on their way, and others would stand still for them.

        A request that is alone is admitted: it uses the first layers while the last ones come.
        Late is what was waited for in vain: the request must do without it, and nobody new waits.

        Args:
            others: whether any are running.
        """
        assert tracked.plan is not None
        coming = self.index.arriving(s.record.slot for s in tracked.plan.needed)
        if not coming or not others:
            tracked.fetching = 0.0
            return None
        if time.monotonic() - tracked.fetching < self._config.fetch_patience_s:
            return "fetch"
        self.release(tracked)
        self.late(coming)
        for slot in coming:
            self.index.give_up(slot)
        return "late"

    def late(self, slots: Iterable[int]) -> None:
        """Tiers that do not bring these are slow or gone: they are not asked for a while."""
        for tier in {self._sources[slot][0] for slot in slots if slot in self._sources}:
            self.directory.breakers[tier].late()

    def lost(self, slot: int) -> None:
        """Workers do not have a chunk; a tier that was to bring it is not believed that it can."""
        if slot in self._sources:
            self.directory.disbelieve(*self._sources.pop(slot))
        self.index.drop(slot)

    def still_held(self, tracked: Tracked) -> bool:
        """Whether all that the plan needs is there, on its way, or in a tier to be asked for."""
        assert tracked.plan is not None
        if tracked.gone != self.index.gone:
            slots = [s.record.slot for s in tracked.plan.needed]
            if not all(slot in self.index or slot < 0 for slot in slots):
                return False
            tracked.gone = self.index.gone
        return True

    def release(self, tracked: Tracked) -> None:
        """The plan's chunks may go."""
        for slot in tracked.leased:
            self.index.release(slot)
        self._kept -= tracked.needs if tracked.held else 0
        tracked.leased, tracked.held = [], False

    def take_fetches(self) -> list[Record]:
        """What the workers must bring out of the tiers, each told once."""
        fetches, self._fetches = self._fetches, []
        coming = self.index.arriving(self._sources)
        self._sources = {slot: self._sources[slot] for slot in coming}
        fetches = [record for record in fetches if record.slot in self.index]
        self.index.fetching(record.slot for record in fetches)
        return fetches

    def take_counts(self) -> Counter[str]:
        """Counters since the last call."""
        counts, self._counts = self._counts, Counter()
        counts.update({f"store:{kind}": n for kind, n in taken(self.index.counts).items()})
        for tier in self._tiers:
            counts.update({f"{tier.name}:{kind}": n for kind, n in taken(tier.counts).items()})
        opened = sum(breaker.opened for breaker in self.directory.breakers)
        counts["tiers_left_alone"] += opened - self._left_alone
        self._left_alone = opened
        return +counts

    def levels(self) -> dict[str, int]:
        """How things stand, by name."""
        answers = zip(self._tiers, self.directory.breakers, strict=True)
        return {
            "host_memory_bytes:used": self.index.size,
            "host_memory_bytes:capacity": self.index.capacity,
            "pending_lookups": self.directory.pending,
            **{f"tier_answers:{tier.name}": int(breaker.closed) for tier, breaker in answers},
        }

    def close(self) -> None:
        """Let go of the tiers."""
        self.directory.close(tiers=True)

    # -- parts -------------------------------------------------------------------------------

    def _told(self, tracked: Tracked) -> Sequence[Answers]:
        """What tiers said in time that are not left alone, if it is of what the request is now."""
        return self._answers(tracked.lookup, tracked.namespace)

    def _answers(self, asked: Asked | None, namespace: bytes) -> Sequence[Answers]:
        if asked is None or not asked.over or asked.namespace != namespace:
            return []
        pairs = zip(asked.answers, self.directory.breakers, strict=True)
        return [answers for answers, breaker in pairs if breaker.closed and answers.told]

    def _chosen(
        self, tracked: Tracked, local: int, tiers: Sequence[Answers], refusal: str | None
    ) -> tuple[Plan, str | None]:
        """The plan out of memory and `tiers`, and why it does not blend, if it was to."""
        assert tracked.options is not None
        strategy = tracked.options.strategy
        arguments = (tracked.tokens, tracked.pieces, self.index, tracked.namespace)
        plan = make_plan(
            *arguments,
            strategy,
            local=local,
            min_gain=self._config.min_gain_tokens,
            contiguous=refusal is not None,
            L=self._layout.L,
            tiers=tiers,
            context=self._config.context,
            begins=self.begins,
        )
        if tracked.options.handed is not None and plan.found:
            # Perhaps blended: in vLLM's cache it is nobody's exact prefix.
            return replace(plan, first_moved=plan.found[0].start), None
        if tracked.gate:
            return plan, f"quality_gate:{tracked.gate}"
        if refusal is not None and strategy.moves:
            return plan, f"blending_refused:{refusal}"
        if strategy.moves and not plan.claimed and plan.found_beyond:
            exact = make_plan(*arguments, Prefix(), local=local, tiers=tiers)
            # Found, and not worth a blend: all of it that the exact plan does not load.
            loaded = positions([(s.start, s.end) for s in exact.found])
            return replace(exact, beyond=without(plan.beyond, loaded)), "gain_below_minimum"
        return plan, None

    def hold(self, tracked: Tracked) -> bool:
        """Keep what the plan needs, and have fetched what memory lacks; False without room."""
        if tracked.held:
            return True
        plan = tracked.plan
        assert plan is not None
        tracked.held = True
        self._kept += tracked.needs
        tracked.leased = sorted({s.record.slot for s in plan.needed if s.record.slot >= 0})
        for slot in tracked.leased:
            self.index.lease(slot)
            self.index.touch(slot)
        here: dict[bytes, Record] = {}
        adopted: list[Record] = []
        behind = {s.record.id: s.record for s in plan.needed if s.record.slot < 0}
        for record in behind.values():
            taken = self.index.twin(record)  # another has had it fetched since this was planned
            if taken is None:
                taken = self.index.adopt(record)
                adopted += [taken] if taken is not None else []
            if taken is None:
                for other in adopted:
                    self.index.drop(other.slot)
                self.release(tracked)
                return False
            here[record.id] = taken
            self.index.lease(taken.slot)
            tracked.leased.append(taken.slot)
        if here:
            found = [s._replace(record=here.get(s.record.id, s.record)) for s in plan.needed]
            n = len(plan.found)
            tracked.plan = replace(plan, found=tuple(found[:n]), states=tuple(found[n:]))
            self._fetches += adopted
            for id, taken in here.items():
                said = [asked.told_by(id) for asked in tracked.asked_of]
                told_by = next((by for by in said if by is not None), None)
                if told_by is not None:
                    self._sources[taken.slot] = told_by, id
                    tracked.fetched.setdefault(taken.slot, self._tiers[told_by].name)
        if not tracked.fetching and self.index.arriving(tracked.leased):  # or for another before
            tracked.fetching = time.monotonic()
        return True


def claim_of(tracked: Tracked, all_blocks: list[list[int]], claimed: int, groups: Groups) -> Claim:
    """What the workers must do for a request that was admitted with these blocks, by vLLM's groups.

    What vLLM counts on is there, whatever goes wrong here: then all of it is computed.
    """
    request = tracked.request
    lora = getattr(request.lora_request, "lora_int_id", 0)
    of: dict[str, Any] = {
        "request_id": request.request_id,
        "blocks": groups.those(all_blocks),
        "lora": lora,
        "front": tracked.front,
    }
    try:
        plan = tracked.admitted
        assert plan is not None and plan.claimed == claimed, (plan, claimed)
        turns, tokens = plan.strategy.rotate, tracked.tokens
        loads = [
            ChunkLoad(r.slot, start, end, at, len(r.tokens) // 8, at - r.start if turns else 0)
            for start, end, _, r, at in plan.found
        ]
        of |= {"start": plan.local, "end": plan.end, "loads": loads, "rows": plan.rows}
        if groups.states is not None and plan.states:
            last = plan.end // groups.block_size - 1
            each = zip(groups.states.ids, plan.states, strict=True)
            of["states"] = [
                (ChunkLoad(r.slot, start, end, at, r.T, 0), all_blocks[group][last])
                for group, (start, end, _, r, at) in each
            ]
        if not plan.selective:
            return Claim(tokens=tokens[: plan.end], **of)
        return Claim(tokens=tokens, strategy=plan.strategy, outline=plan.outline, **of)
    except BaseException as error:
        survive(error)
        start, end = tracked.local, tracked.local + claimed
        tokens = np.asarray(request.all_token_ids[:end], np.int64)
        of |= {"start": start, "end": end, "loads": [], "rows": np.arange(start, end)}
        return Claim(tokens=tokens, planned=False, **of)
