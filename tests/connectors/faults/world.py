"""Every fault against every kind of claim, in one engine; `run` is what the engine's process does.

The answer of a request that met a fault is compared with that of vLLM alone, or with that of the
same request alone in an engine that lacks what was lost. Nothing that it leaves behind, in vLLM's
cache or in the store, may be wrong for anybody else.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np

from tests.connectors.vllm import scenarios as s

FAULTS = (
    "none", "lost", "late", "damaged", "hung", "memory", "unready", "unready_once",  # in a worker
    "evicted", "aborted", "preempted", "reset",  # in the scheduler
)  # fmt: skip
IN_WORKER = FAULTS[1:8]
UNREADY = FAULTS[6:8]  # before rows are computed
BEHIND = ("late", "damaged", "hung")  # of what a tier behind host memory brings
CLAIMS: dict[str, Any] = {
    "exact": "prefix",
    "moved": {"name": "epic", "link_tokens": 8},
    "all_moved": "full_recompute",
    "selective": {"name": "cacheblend", "ratio": 0.2},
    "all_selective": "all_by_deviation",
}
SOURCES = ("memory", "disk")
# What is on its way comes, however slow the machine is, unless it is the fault that it does not.
PATIENCE_S, SHORT_S, LATE_S = 60.0, 0.4, 0.8
SHORT = ("late", "hung")
# Another one runs, or is admitted in the same step and fills blocks that this one is given too.
COMPANY = ("alone", "beside another", "behind one that begins alike")
OTHER, ALIKE = [s.text(70, 50)], [s.SYSTEM, s.text(71, 30)]
ORDERS = {"exact": (0, 1, 2), "moved": (2, 0, 1)}


@dataclass(frozen=True)
class Case:
    """company: what else runs meanwhile. rank: where the fault is; None: on all."""

    fault: str
    claim: str
    source: str
    company: str
    rank: int | None = None

    @property
    def name(self) -> str:
        where = "" if self.rank is None else f", rank {self.rank}"
        return f"{self.fault}: {self.claim} from {self.source}, {self.company}{where}"


def cases(ranks: int, claims: Sequence[str] = tuple(CLAIMS)) -> list[Case]:
    """All that make sense.

    What is reset in the midst of a blended answer goes on over other KV, so that nothing is left
    to compare it with, unless all is computed again. Of what is exact no rows are computed.
    """
    everywhere: list[int | None] = [None, 1] if ranks > 1 else [None]
    every = [Case(*c) for c in product(FAULTS, claims, SOURCES, COMPANY, everywhere)]
    return [
        case
        for case in every
        if (case.source == "disk" or case.fault not in BEHIND)
        and (case.rank is None or case.fault in IN_WORKER)
        and not (case.fault == "reset" and case.claim in ("moved", "selective"))
        and not (case.fault in UNREADY and case.claim == "exact")
    ]


def pairwise(every: list[Case]) -> list[Case]:
    """Few of them in which each two settings that go together do so."""

    def pairs(case: Case) -> set[tuple[Any, ...]]:
        values = list(enumerate((case.fault, case.claim, case.source, case.company, case.rank)))
        return {(a, b) for i, a in enumerate(values) for b in values[i + 1 :]}

    chosen: list[Case] = []
    missing = set().union(*map(pairs, every))
    while missing:
        best = max(every, key=lambda case: len(pairs(case) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


def run(session: s.Session, which: list[Case]) -> dict[str, Any]:
    """What became of each case, by its name, and whether index and workers agree in the end."""
    world = World(session)
    outcomes = {case.name: world.outcome(case) for case in which}
    result = {"outcomes": outcomes, "alone": world.computed_alone(), "agree": world.agree()}
    return result | {"counts": dict(world.counts)}


class World:
    """An engine whose store has the same documents before each case."""

    def __init__(self, session: s.Session) -> None:
        self.session = session
        self.side = session.scheduler.connector._scheduler
        self.counts = s.persistent.counting(session, worker=False)
        self.seed = 0
        self.salt = ""
        self.others = {
            company: s.plain(session, parts, tokens=24)
            for company, parts in zip(COMPANY[1:], (OTHER, ALIKE), strict=True)
        }
        self.plain = {claim: s.plain(session, self.parts(claim)) for claim in ORDERS}
        self._patience(PATIENCE_S)
        self.rpc("noise", 0)

    def rpc(self, method: str, *arguments: Any) -> list[Any]:
        return self.session.llm.collective_rpc(method, args=arguments)  # type: ignore[no-any-return]

    def parts(self, claim: str) -> list[list[int]]:
        """A prompt; behind what is exact comes what is new, and stored if the claim is served."""
        if claim == "exact":
            return [*s.prompt(*ORDERS["exact"]), s.text(77, 41)]
        return s.prompt(*ORDERS["moved"])

    def outcome(self, case: Case) -> dict[str, Any]:
        """The answer, what it should be, and what others are answered afterwards."""
        moved = case.claim != "exact"
        parts, blend = self.parts(case.claim), CLAIMS[case.claim]
        plain = self.plain["moved" if moved else "exact"]
        self._stored(case, moved)
        # In the midst of what is exact, and the last of what is moved: without that one the claim
        # ends before it, and is the same otherwise.
        lost = np.array(s.DOCUMENTS[1], "<i8").tobytes()
        saves = case.claim == "exact"  # what a failed claim leaves must not be stored
        got, beside = self._met(case, parts, blend, lost, saves)
        # Nobody is served anything wrong by vLLM's own cache, nor out of the store.
        after = self.session.ask(parts, enabled=False, salt=self.salt)
        stored = self.session.fresh(parts, "prefix", save=False, salt=self.salt)
        all_computed = case.fault in ("late", "hung", "memory", *UNREADY)
        if case.claim in ("moved", "selective") and not all_computed:
            expected = self._alone(case, parts, blend, lost)
        else:
            expected = plain
        self._unhide()
        return {
            "got": got,
            "expected": expected,
            "beside": beside,
            "other": self.others.get(case.company),
            "plain": plain,
            "after": after,
            "stored": stored,
        }

    def computed_alone(self) -> list[int]:
        """Tokens moved of a chunk that the last rank cannot compute alone, and of one it can."""
        planner = self.side.planner
        planner._config = self.side.config.model_copy(update={"context": "isolated"})
        self.side.isolation._policy, self.side.isolation._rate = "isolated", 512
        moved = []
        for seed, rank in ((90, self.side.ranks - 1), (91, None)):
            document = s.text(seed, 70)
            if rank is not None:
                self.rpc("fault", "unready", b"", rank)
            self.session.fresh([s.SYSTEM, document, s.QUESTION], s.EPIC, salt="computed alone")
            self.rpc("mend")
            behind = [s.text(92, 33), document, s.QUESTION]
            answer = self.session.fresh(behind, s.EPIC, save=False, salt="computed alone")
            moved.append(answer.report["kinds"]["moved"])
        planner._config = self.side.config
        self.side.isolation._policy, self.side.isolation._rate = "any", 0
        return moved

    def agree(self) -> bool:
        """Whether each slot that the index has is held by each rank, and no other."""
        for i in range(4):  # text that a prompt repeats
            self.session.fresh([s.text(80 + i, 33), *[s.text(55, 40)] * 7], "prefix", tokens=1)
        self._settle()
        return all(held == sorted(self.side.index._entries) for held in self.rpc("held"))

    # -- parts -------------------------------------------------------------------------------

    def _stored(self, case: Case, moved: bool) -> None:
        """What the case finds in the store, and noise in all pages."""
        for breaker in self.side.planner.directory.breakers:
            breaker.back()
        self.salt = case.name  # so that nothing of other cases is found
        self.side.index.clear()
        self._settle()
        if moved:
            for i in ORDERS["moved"]:
                behind = [s.SYSTEM, s.DOCUMENTS[i]]
                self.session.fresh(behind, "prefix", tokens=1, salt=self.salt)
        else:
            whole = s.prompt(*ORDERS["exact"])
            self.session.fresh(whole, "prefix", tokens=1, salt=self.salt)
        self.rpc("finish_saves")
        if case.source == "disk":
            self.side.index.clear()
            self._settle()
        self.session.llm.reset_prefix_cache()
        self.seed += 1
        self.rpc("noise", self.seed)

    def _patience(self, seconds: float) -> None:
        """How long tiers are waited for, by the scheduler and by workers."""
        config = self.side.planner._config
        self.side.planner._config = config.model_copy(update={"fetch_patience_s": seconds})
        self.side.planner.directory.patience_s = seconds
        self.side.admission._patience_s = seconds
        self.rpc("patience", seconds)

    def _settle(self) -> None:
        """A request of nothing stored, so that the workers hear what was freed."""
        self.session.ask([s.text(9, 20)], enabled=False, tokens=1)
        self.session.llm.reset_prefix_cache()

    def _met(
        self, case: Case, parts: list[list[int]], blend: Any, lost: bytes, save: bool
    ) -> tuple[s.Answer | None, s.Answer | None]:
        session, scheduler = self.session, self.session.scheduler
        other = None
        in_worker = case.fault in IN_WORKER
        if case.company == COMPANY[1]:
            other = session.add(OTHER, enabled=False, tokens=24)
            session.engine.step()
        elif case.company == COMPANY[2]:
            other = session.add(ALIKE, enabled=False, tokens=24, salt=self.salt)
        if in_worker:
            self.rpc("fault", case.fault, lost, case.rank)
        if case.fault in SHORT:
            self._patience(SHORT_S)
        request = session.add(parts, blend, save=save, salt=self.salt)
        tracked = next(t for i, t in self.side.requests.items() if i.split("-")[0] == request)
        if case.fault == "evicted":
            slots = [f.record.slot for f in tracked.plan.found if f.record.tokens == lost]
            for slot in slots:
                self.side.index.drop(slot)
        if case.fault in ("aborted", "preempted", "reset"):
            session.engine.step()
            session.engine.step()
        if case.fault == "aborted":
            session.engine.abort_request([tracked.request.request_id], internal=True)
        if case.fault == "preempted":
            running = tracked.request
            if running in scheduler.running:
                scheduler.running.remove(running)
                scheduler._preempt_request(running, time.monotonic())
                scheduler.prev_step_scheduled_req_ids.discard(running.request_id)
        if case.fault == "reset":
            scheduler.reset_prefix_cache(reset_running_requests=True, reset_connector=True)
        answers = session.finish()
        self._patience(PATIENCE_S)
        if in_worker:
            self.rpc("mend")
            time.sleep(0.05)
        beside = answers[other] if other is not None else None
        return answers.get(request), beside

    def _alone(self, case: Case, parts: list[list[int]], blend: Any, lost: bytes) -> s.Answer:
        """The same request in an engine that lacks what was lost."""
        gone = case.fault in ("lost", "damaged")  # what was evicted is on disk still
        for slot, entry in list(self.side.index._entries.items()):
            if gone and entry.record.tokens == lost:
                self.side.index.drop(slot)
        if gone:
            for tier in self.side.planner._tiers:
                tier.lookup_many = hiding(tier.lookup_many, lost)
            self._forget_answers()
        return self.session.fresh(parts, blend, save=False, salt=self.salt)

    def _unhide(self) -> None:
        for tier in self.side.planner._tiers:
            vars(tier).pop("lookup_many", None)
        self._forget_answers()

    def _forget_answers(self) -> None:
        for desk in self.side.planner.directory._desks:
            desk._remembered.clear()


def hiding(lookup_many: Any, tokens: bytes) -> Any:
    def found(*arguments: Any) -> Any:
        return tuple(
            [[record for record in records if record.tokens != tokens] for records in some]
            for some in lookup_many(*arguments)
        )

    return found
