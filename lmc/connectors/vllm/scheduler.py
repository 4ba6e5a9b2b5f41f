"""The scheduler's side: plans, taints, leases, and decides what is stored. Holds no bytes."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import numpy as np
from vllm.logger import init_logger

from lmc.blend.evidence import positions
from lmc.connectors.vllm import identity, keeping, startup
from lmc.connectors.vllm.admission import Admission
from lmc.connectors.vllm.config import LMCConfig, check_memory
from lmc.connectors.vllm.events import Events, published
from lmc.connectors.vllm.explaining import Explaining
from lmc.connectors.vllm.flights import Flights
from lmc.connectors.vllm.gate import QualityGate
from lmc.connectors.vllm.groups import groups_of
from lmc.connectors.vllm.isolating import Isolation
from lmc.connectors.vllm.local import LocalCache
from lmc.connectors.vllm.messages import (
    Claim,
    LMCStats,
    Observed,
    StepMetadata,
    WorkerHello,
    WorkerReport,
)
from lmc.connectors.vllm.namespaces import Namespace
from lmc.connectors.vllm.planner import Planner, claim_of
from lmc.connectors.vllm.reading import Reader, survive
from lmc.connectors.vllm.states import length_of
from lmc.connectors.vllm.taint import ChainMap, rechain, untaint
from lmc.connectors.vllm.tracked import Tracked, recompute, report_of, served
from lmc.connectors.vllm.windows import scratch_pages
from lmc.model.identity import first_token
from lmc.model.shape import shape_of

BLENDING = 16  # of what vLLM computes in a step, the part that blending may add unless told
UNKNOWN = "no worker has reported yet"
logger = init_logger(f"vllm.{__name__}")  # else vLLM prints none of it


class SchedulerSide:
    """Decides for every request what is reused and what is kept.

    Whatever goes wrong for one request, here, is its own affair: it is served as if lmc were not
    there, and counted.

    Raises:
        ValueError: memory for less than one chunk, and what `QualityGate` raises.
    """

    def __init__(self, vllm_config: Any, kv_cache_config: Any, config: LMCConfig) -> None:
        self.config, self._vllm_config = config, vllm_config
        rope = identity.rope_of(vllm_config)
        self._rope_refusal = rope if isinstance(rope, str) else None
        self.kv_refusal: str | None = UNKNOWN
        self.blend_refusal: str | None = self._rope_refusal or UNKNOWN
        groups = groups_of(kv_cache_config)
        self.block_size = groups.block_size
        self.layout = identity.layout_of(vllm_config, kv_cache_config)
        self.cost = shape_of(vllm_config.model_config.hf_text_config).cost
        self.namespace = Namespace(vllm_config, kv_cache_config, rope)
        per_token = self.layout.bytes_per_token
        chunk = min(config.build_chunker().longest_chunk or 1, config.limits.chunk_tokens)
        check_memory(config.memory_bytes, per_token, max(chunk, length_of(groups, per_token)))
        self.ranks = vllm_config.parallel_config.world_size
        begins = first_token(vllm_config.model_config.hf_text_config)
        of = (self.layout, self.cost, self.ranks, vllm_config, begins, groups)
        self.planner = Planner(config, *of)
        self.index = self.planner.index
        self.explaining = Explaining(config, self.planner)
        self.gate = QualityGate(vllm_config, self.layout, rope, config)
        self.reader = Reader(config, self.gate, self.namespace)
        caches = bool(vllm_config.cache_config.enable_prefix_caching)
        rows = vllm_config.scheduler_config.max_num_batched_tokens
        self.local = LocalCache(groups, caches, rows)
        self.isolation = Isolation(config, self.index, begins, per_token, groups, rows)
        self.keeping = keeping.Keeping(config, self.index, per_token, self.local, self.ranks)
        self.requests: dict[str, Tracked] = {}
        self.begun: dict[str, Tracked] = {}  # those of them that were admitted
        self.flights = Flights(config, self.planner)
        longest = vllm_config.model_config.max_model_len if groups.longest else 0
        pages = scratch_pages(groups, config.window_bytes, longest) if longest else 0
        parts = (self.planner, self.reader, self.namespace, self.local, self.flights, self.begun)
        self.admission = Admission(config, config.rows_per_step or rows // BLENDING, *parts, pages)
        publishes = published(vllm_config)
        self.events = Events(self.index, self.ranks, self.block_size) if publishes else None
        self.just_finished: dict[str, Tracked] = {}  # in the step that the workers report on
        self.claims: list[Claim] = []
        self.forgiven: set[int] = set()
        self.counts: Counter[str] = Counter()
        self._step, self._watched = 0, False  # whether workers notice when weights change
        self._overlaps = bool(vllm_config.scheduler_config.async_scheduling)

    def greet(self, hellos: list[WorkerHello]) -> None:
        """Learn from the workers what can be reused, and whether rows can be recomputed."""
        if not hellos:  # beside another connector they come with a report
            return
        hello = WorkerHello.of_all(hellos, self._overlaps)
        hello.refusal = self._rope_refusal or hello.refusal
        self.kv_refusal, self._watched = hello.kv_refusal, hello.watched
        self.blend_refusal, self.admission.computes = hello.refusal, hello.computes
        gate = (self.gate.default, self.gate.weights)
        startup.say(self._vllm_config, self.config, self.layout, hello, *gate)

    # -- admission ---------------------------------------------------------------------------

    def on_new_request(self, request: Any) -> None:
        """Plan, and taint, before vLLM looks into its own cache."""
        try:
            self._arrived(request)
        except BaseException as error:
            self._give_up(request, error, block=0)

    def matched_tokens(self, request: Any, local: int) -> int | None:
        """Tokens beyond vLLM's own `local` that are claimed; None to be asked again later."""
        try:
            return self._claimed(request, local)
        except BaseException as error:
            self._give_up(request, error, block=local // self.block_size)
            return 0

    def allocated(self, request: Any, blocks: list[list[int]], claimed: int) -> None:
        """vLLM admitted `request` with these blocks, by its groups, and `claimed` of our tokens."""
        tracked = self.requests.get(request.request_id)
        if tracked is None:
            return
        self.begun[request.request_id] = tracked
        self.flights.admitted(tracked)
        if tracked.local and self.local.mixed(request.lora_request):
            tracked.unsaved = True
        plan = tracked.admitted
        if plan is not None and tracked.blended_from is None:
            # Also when nothing is claimed: vLLM may hold all of an equal recipe's blocks.
            tracked.blended_from = plan.first_moved
            if self.events and tracked.blended_from is not None:
                self.events.blended(tracked)
        if claimed:
            claim = claim_of(tracked, blocks, claimed, self.local.groups)
            if not claim.planned:
                self.counts["claims_given_up"] += 1
            self.claims.append(claim)
        else:
            self.planner.release(tracked)
        if tracked.report is None:
            self._report(tracked)

    def _arrived(self, request: Any) -> None:
        self._notice_reset()
        tracked = self.reader.read(request, self.kv_refusal)
        self.requests[request.request_id] = tracked
        if tracked.options is None:
            self.counts[f"plain:{(tracked.reason or '').split(':')[0]}"] += 1
            return
        self.admission.arrived(tracked, self.blend_refusal)

    def _claimed(self, request: Any, local: int) -> int | None:
        tracked = self.requests.get(request.request_id)
        if tracked is None:
            return 0
        self._notice_reset()
        tracked.local = local
        return self.admission.claimed(tracked, local, self.claims)

    def _give_up(self, request: Any, error: BaseException, block: int) -> None:
        """Serve a request without lmc, with vLLM's own hashes from index `block` on."""
        survive(error)
        self.counts["requests_given_up"] += 1
        tracked = self.requests.get(request.request_id)
        if tracked is None:
            tracked = self.requests[request.request_id] = Tracked(request, None, None)
        self.planner.release(tracked)
        self.flights.landed(tracked)
        tracked.options = tracked.plan = tracked.admitted = None
        tracked.reason = f"failed:{type(error).__name__}"
        untaint(request, self.block_size, block)

    # -- once a step -------------------------------------------------------------------------

    def step(self, scheduler_output: Any) -> StepMetadata:
        """All that the workers must do in this step."""
        self._step += 1
        reset = self.local.stepped(self._step)
        leaving, read_before = self.keeping.take(), self.keeping.reading()
        for wrong in keeping.misadapted(scheduler_output, self.requests):
            wrong.unsaved = True
        if self.local.groups.longest:
            for tracked, n, blocks in self.keeping.underway(scheduler_output, self.requests):
                self._save(tracked, n, blocks, over=False)
        self.keeping.keep_states(self.planner.ends, scheduler_output, self.requests)
        for request_id, tracked in keeping.prompts_done(scheduler_output, self.requests):
            n, saves = tracked.request.num_prompt_tokens, tracked.saves
            if saves:
                self._save(tracked, n, self.local.blocks(request_id))
            tracked.prompt_saved |= saves | self.keeping.hand_over(tracked, self.namespace)
            self.flights.landed(tracked, self.keeping.missing(tracked.storing))
        scheduled = sum(scheduler_output.num_scheduled_tokens.values())
        pool, prompts = self.local.manager.block_pool, keeping.computes_prompts(scheduler_output)
        encodes = self.isolation.take(pool, scheduled + self.admission.rows(self.claims), prompts)
        given = keeping.given_out(scheduler_output, encodes, self.claims)
        metadata = StepMetadata(
            number=self._step,
            freed=self.index.take_freed(),
            fetches=self.planner.take_fetches(),
            claims=self.admission.to_the_end(self.claims, scheduler_output),
            leaving=leaving,
            reused=not read_before.isdisjoint(given),
            saves=self.keeping.take(),
            encodes=encodes,
            encodes_left=self.isolation.pending,
            forgiven=sorted(self.forgiven),
            weights=dict(self.namespace.known),
            adapters=self.namespace.adapters.digests,
            look=reset,
            decodes=sum(n > 0 for n in scheduler_output.scheduled_cached_reqs.num_output_tokens),
        )
        # A slot that is freed from now on is freed behind these loads: their leases may end.
        for claim in self.claims:
            self.planner.release(self.requests[claim.request_id])
        self.claims, self.forgiven, self.just_finished = [], set(), {}
        self.local.unpin()
        self.explaining.stepped()
        self.admission.pause(scheduled)
        return metadata

    @property
    def idle_work(self) -> bool:
        """Whether steps are wanted although no request is there."""
        return self.isolation.pending > 0 or self.keeping.pending

    def heard(self, report: WorkerReport) -> None:
        """Take in what the workers did in a step."""
        if report.hellos and self.kv_refusal == UNKNOWN:
            self.greet([*report.hellos.values()])
        for slot, rank in report.saved:
            self.index.acknowledge(slot, rank)
        for slot in report.ended:
            self.index.returned(slot)
        if report.late:
            self.planner.late(report.lost)
        for slot in report.lost:
            self.counts["chunks_lost"] += 1
            self.planner.lost(slot)
        for slot in [*(slot for slot, _ in report.saved), *report.lost]:
            self.isolation.settle(slot, self.local.manager.block_pool)
            if self.keeping.settle(slot):
                self.flights.stored(slot)
        if self.events:
            self.events.kept(report.kept)
            self.events.removed(report.removed)
        if report.failed:
            self._claims_failed(report.failed)
        for request_id, rows in report.recomputed.items():
            if hit := self.requests.get(request_id) or self.just_finished.get(request_id):
                self._retaint_after_loss(hit, rows)
        for request_id, seconds in report.served.items():
            if hit := self.requests.get(request_id) or self.just_finished.get(request_id):
                hit.took("claim", seconds)
        self.explaining.stepped()
        for lora in self.namespace.adapters.heard(report.adapters):
            self._adapter_changed(lora)
        if (step := self.namespace.heard(report.weights)) is not None:
            self._weights_changed(step)

    def finish(self, request: Any, blocks: list[list[int]]) -> dict[str, Any] | None:
        """The request is over: keep what it decoded, and tell its client what happened."""
        tracked = self.requests.pop(request.request_id, None)
        if tracked is None:
            return None
        self.begun.pop(request.request_id, None)
        self.just_finished[request.request_id] = tracked
        self.planner.release(tracked)
        self.flights.landed(tracked)
        self.claims = [c for c in self.claims if c.request_id != request.request_id]
        computed = request.num_computed_tokens - request.num_in_flight_tokens
        if tracked.saves and computed >= request.num_prompt_tokens:
            self._save(tracked, computed, blocks)
        self.keeping.let_go(tracked)
        if tracked.blended_from is not None and not tracked.unsaved:
            self.local.leave_chain(tracked, computed)
        if tracked.report is None:
            self._report(tracked, admitted=False)
        return {"lmc": self.explaining.finished(tracked)}

    def reset(self) -> None:
        """Forget what host memory holds.

        What tiers behind it have stays, if the workers notice when weights change; else it might
        be of weights that are gone, and is never found again.
        """
        self.index.clear()
        self.isolation.clear()
        self.local.chains = ChainMap()
        if not self._watched:
            self.namespace.forget()

    def _notice_reset(self) -> None:
        """Where nobody sees weights change, vLLM's cache being reset is all there is to go by."""
        if self.local.was_reset() and not self._watched:
            self.reset()

    def close(self) -> None:
        """Let go of the tiers, and write what is still to be recorded."""
        self.explaining.close()
        self.flights.close()
        self.planner.close()

    def take_stats(self) -> LMCStats:
        """What happened since the last call, and how things stand."""
        self.counts.update(self.planner.take_counts() + self.explaining.take_counts())
        for part in (self.isolation, self.admission, self.flights, self.keeping):
            self.counts += part.counts
            part.counts.clear()
        counts, self.counts = self.counts, Counter()
        observed, self.admission.observed = self.admission.observed, Observed()
        levels = self.planner.levels() | {"isolated_waiting": self.isolation.pending}
        return LMCStats.of(counts, observed, levels)

    # -- parts -------------------------------------------------------------------------------

    def _save(
        self, tracked: Tracked, computed: int, blocks: list[list[int]], over: bool = True
    ) -> None:
        """Have the workers keep chunks of the first `computed` tokens: `Keeping.keep`."""
        assert tracked.options is not None
        try:
            tracked.storing += self.keeping.keep(tracked, computed, blocks, over)
            moves = tracked.options.strategy.moves or self.gate.moves_by_default
            base = tracked.request.lora_request is None  # nothing is computed alone under others
            blends = moves and self.blend_refusal is None
            if base and blends and over and not tracked.prompt_saved:
                of = (tracked.tokens, tracked.pieces, tracked.options.chunks or ())
                self.isolation.want(self.planner.known(tracked), *of)
        except BaseException as error:
            survive(error)
            self.counts["saves_given_up"] += 1
            tracked.unsaved = True

    def _retaint_after_loss(self, tracked: Tracked, rows: list[int]) -> None:
        """Rows that a lost chunk made computed are not what the recipe's hashes say."""
        plan, request = tracked.admitted, tracked.request
        if plan is None:  # it was given up meanwhile
            return
        self.counts["rows_recomputed_for_lost_chunks"] += len(rows)
        if plan.first_moved is not None:
            block = plan.first_moved // self.block_size
            self.local.evict_from(tracked, block)
            recipes = plan.recipes(self.block_size, nonce=os.urandom(16))
            rechain(request, self.block_size, block, [], recipes)
            if self.events:
                self.events.blended(tracked)
        if self.planner.ends is not None:  # vLLM asks for it again, and computes it
            tracked.plan = None
        # One of one token has its report sent already: the counters tell of those.
        recompute(tracked, np.array(rows, np.int64), self.layout.bytes_per_token, self.cost)

    def _claims_failed(self, failed: set[int]) -> None:
        """What was computed over these blocks, and goes on behind them, serves nobody else."""
        self.forgiven |= failed
        for request_id, tracked in self.begun.items():
            if self.local.spoil(request_id, failed):
                tracked.unsaved = True
                self.counts["requests_over_failed_claims"] += 1
                if plan := tracked.admitted:  # vLLM computes all of it
                    rows = positions([(s.start, s.end) for s in plan.found])
                    recompute(tracked, rows, self.layout.bytes_per_token, self.cost)

    def _adapter_changed(self, lora: int) -> None:
        """What is under way under a LoRA adapter may be of the one it was before."""
        self.counts["adapters_changed"] += 1
        self.local.adapter_changed(lora)
        for tracked in self.requests.values():
            adapter = tracked.request.lora_request
            if adapter is not None and adapter.lora_int_id == lora and tracked.report is not None:
                tracked.unsaved = True

    def _weights_changed(self, step: int) -> None:
        """What is stored, and what is under way, was computed with other weights."""
        self.counts["weights_changed"] += 1
        logger.warning("lmc: the model's weights have changed; what was stored is left behind")
        self.index.clear()
        self.isolation.clear()
        self.local.weights_changed(step)
        for tracked in self.requests.values():
            if tracked.report is not None:  # it has begun
                tracked.unsaved = True

    def _report(self, tracked: Tracked, admitted: bool = True) -> None:
        tracked.report = report_of(tracked, self.layout.bytes_per_token, self.cost)
        self.explaining.admitted(tracked)
        if not admitted:  # nothing became of its prompt
            return
        for kind, n in tracked.report["kinds"].items():
            self.counts[f"tokens:{kind}"] += n
        self.admission.observed.add("compute_fraction", tracked.report["compute_fraction"])
        self.counts.update(served(tracked, self.layout.bytes_per_token))
