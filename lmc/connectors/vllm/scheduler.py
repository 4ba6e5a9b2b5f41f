"""The scheduler's side: plans, taints, leases, and decides what is stored. Holds no bytes."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
from blake3 import blake3
from vllm.logger import init_logger

from lmc.blend.plan import Plan
from lmc.chunking.pieces import split
from lmc.connectors.vllm import identity
from lmc.connectors.vllm.config import LMCConfig, check_memory, parse_request
from lmc.connectors.vllm.gate import QualityGate
from lmc.connectors.vllm.keeping import chunks_to_keep
from lmc.connectors.vllm.messages import (
    ChunkLoad,
    ChunkSave,
    Claim,
    LMCStats,
    StepMetadata,
    WorkerHello,
    WorkerReport,
)
from lmc.connectors.vllm.planner import Planner
from lmc.connectors.vllm.taint import Chain, ChainMap, cached_blocks, rechain
from lmc.connectors.vllm.tracked import Tracked, report_of, unblendable
from lmc.model.shape import shape_of

logger = init_logger(__name__)


class SchedulerSide:
    """Decides for every request what is reused and what is kept.

    Raises:
        ValueError: memory for less than one chunk, and what `QualityGate` raises.
    """

    def __init__(self, vllm_config: Any, kv_cache_config: Any, config: LMCConfig) -> None:
        self.config = config
        self.chunker = config.build_chunker()
        rope = identity.rope_of(vllm_config)
        self._rope_refusal = rope if isinstance(rope, str) else None
        self.blend_refusal: str | None = self._rope_refusal or "no worker has reported yet"
        self.block_size = kv_cache_config.kv_cache_groups[0].kv_cache_spec.block_size
        self.layout = identity.layout_of(vllm_config, kv_cache_config)
        self.cost = shape_of(vllm_config.model_config.hf_text_config).cost
        self.namespace = identity.namespace_of(vllm_config, kv_cache_config, rope)
        check_memory(
            config.memory_bytes, self.layout.bytes_per_token, self.chunker.longest_chunk or 1
        )
        self.prefix_caching = bool(vllm_config.cache_config.enable_prefix_caching)
        self.ranks = vllm_config.parallel_config.world_size
        self.planner = Planner(config, self.layout, self.cost, self.ranks, vllm_config)
        self.index = self.planner.index
        self.gate = QualityGate(vllm_config, self.layout, rope, config)
        self.chains = ChainMap()
        self.requests: dict[str, Tracked] = {}
        self.saving: dict[int, Tracked] = {}  # by slot
        self.just_finished: dict[str, Tracked] = {}  # in the step that the workers report on
        self.claims: list[Claim] = []
        self.saves: list[ChunkSave] = []
        self.released: list[str] = []
        self.counts: Counter[str] = Counter()
        self.kv_cache_manager: Any = None

    # -- admission ---------------------------------------------------------------------------

    def greet(self, hellos: list[WorkerHello]) -> None:
        """Learn from the workers whether rows can be recomputed."""
        refusals = [hello.refusal for hello in hellos if hello.refusal]
        self.blend_refusal = self._rope_refusal or (refusals[0] if refusals else None)
        if self.blend_refusal:
            logger.warning("lmc reuses exact prefixes only: %s", self.blend_refusal)

    def on_new_request(self, request: Any) -> None:
        """Plan, and taint, before vLLM looks into its own cache."""
        tracked = self._read(request)
        self.requests[request.request_id] = tracked
        if tracked.options is None:
            self.counts[f"plain:{(tracked.reason or '').split(':')[0]}"] += 1
            return
        local = self._peek(tracked)
        known: list[bytes] = []
        if chain := self._earlier_turn(tracked, local):
            known = chain.hashes
            local = (chain.first + len(known)) * self.block_size
            tracked.blended_from = chain.blended_from
        self._plan(tracked, local)
        assert tracked.plan is not None
        recipes = tracked.plan.recipes(self.block_size)
        if known or recipes:
            first = chain.first if chain else min(recipes)
            rechain(request, self.block_size, first, known, recipes)

    def matched_tokens(self, request: Any, local: int) -> int | None:
        """Tokens beyond vLLM's own `local` that are claimed; None to be asked again later."""
        tracked = self.requests.get(request.request_id)
        if tracked is None:
            return 0
        tracked.local = local
        if tracked.plan is None:
            return 0
        grown = len(tracked.tokens) != request.num_tokens
        running = (r for r in self.requests.values() if r.request.num_computed_tokens)
        if self.planner.waits(tracked, others=any(r is not tracked for r in running)):
            return None
        if grown or local < tracked.plan.local or not self.planner.still_held(tracked):
            self._replan(tracked, local)
        self.planner.lease(tracked)  # a preempted request's lease ended with its first admission
        plan = tracked.admitted = tracked.plan.after(local)
        if (len(plan.rows) or plan.selective) and self._hits_uncomputed(tracked, local):
            self.counts["deferred"] += 1
            return None
        if plan.selective and plan.first_moved is not None and local > plan.first_moved:
            # Out of fewer moved rows it may choose others than the hashes stand for.
            recipes = plan.recipes(self.block_size, nonce=os.urandom(16))
            rechain(request, self.block_size, local // self.block_size, [], recipes)
        return plan.claimed

    def allocated(self, request: Any, blocks: list[int], claimed: int) -> None:
        """vLLM admitted `request` with these blocks and `claimed` tokens of ours."""
        tracked = self.requests.get(request.request_id)
        if tracked is None:
            return
        plan = tracked.admitted
        if plan is not None and tracked.blended_from is None:
            # Also when nothing is claimed: vLLM may hold all of an equal recipe's blocks.
            tracked.blended_from = plan.first_moved
        if plan is not None and claimed:
            assert plan.claimed == claimed, (plan.claimed, claimed)
            self.claims.append(_claim_of(request.request_id, tracked.tokens, blocks, plan))
            for slot in {s.record.slot for s in plan.found}:
                self.index.touch(slot)
        if tracked.report is None:
            self._report(tracked)

    # -- once a step -------------------------------------------------------------------------

    def step(self, scheduler_output: Any) -> StepMetadata:
        """All that the workers must do in this step."""
        for request_id, scheduled in scheduler_output.num_scheduled_tokens.items():
            tracked = self.requests.get(request_id)
            if tracked is None or tracked.prompt_saved or not _saves(tracked):
                continue
            request = tracked.request
            if request.num_computed_tokens + scheduled >= request.num_prompt_tokens:
                tracked.prompt_saved = True
                blocks = self.kv_cache_manager.get_block_ids(request_id)[0]
                self._save(tracked, request.num_prompt_tokens, blocks)
        metadata = StepMetadata(
            freed=self.index.take_freed(),
            fetches=self.planner.take_fetches(),
            claims=self.claims,
            saves=self.saves,
            released=self.released,
            preempted=bool(scheduler_output.preempted_req_ids),
        )
        # The workers handle messages in order, so a slot that is freed from now on is freed
        # behind these loads: their leases may end.
        for claim in self.claims:
            self.planner.release(self.requests[claim.request_id])
        self.claims, self.saves, self.released = [], [], []
        self.just_finished = {}
        return metadata

    def heard(self, report: WorkerReport) -> None:
        """Take in what the workers did in a step."""
        for slot, rank in report.saved:
            self.index.acknowledge(slot, rank)
            self._settle(slot)
        for slot in report.lost:
            self.counts["chunks_lost"] += 1
            self.index.drop(slot)
            self._settle(slot)
        if report.late:
            self.planner.leave_tiers_alone()
        for request_id, rows in report.recomputed.items():
            if hit := self.requests.get(request_id) or self.just_finished.get(request_id):
                self._retaint_after_loss(hit, rows)

    def finish(self, request: Any, blocks: list[int]) -> tuple[bool, dict[str, Any] | None]:
        """The request is over: keep what it decoded, and tell its client what happened."""
        tracked = self.requests.pop(request.request_id, None)
        if tracked is None:
            return False, None
        self.just_finished[request.request_id] = tracked
        self.planner.release(tracked)
        self.claims = [c for c in self.claims if c.request_id != request.request_id]
        computed = request.num_computed_tokens - request.num_in_flight_tokens
        if _saves(tracked) and computed >= request.num_prompt_tokens:
            self._save(tracked, computed, blocks)
        if tracked.blended_from is not None:
            first = tracked.blended_from // self.block_size
            hashes = list(request.block_hashes[first : computed // self.block_size])
            tokens = np.asarray(request.all_token_ids, np.int64)
            chain = Chain(tracked.blended_from, first, hashes)
            self.chains.add(tracked.scope, tokens, self.block_size, chain)
        if tracked.report is None:
            self._report(tracked)
        if tracked.unacknowledged:
            self.released.append(request.request_id)
        return bool(tracked.unacknowledged), {"lmc": tracked.report}

    def reset(self) -> None:
        """Forget all that is stored; what tiers behind memory have is never found again."""
        self.index.clear()
        self.namespace = blake3(self.namespace + os.urandom(32)).digest()
        self.chains = ChainMap()

    def close(self) -> None:
        """Let go of the tiers."""
        self.planner.close()

    def take_stats(self) -> LMCStats | None:
        """Counters since the last call."""
        self.counts.update(self.planner.take_counts())
        counts, self.counts = self.counts, Counter()
        return LMCStats(data=dict(counts)) if counts else None

    # -- parts -------------------------------------------------------------------------------

    def _read(self, request: Any) -> Tracked:
        """The request's options, or why it is served as if lmc were not there."""
        raw = (request.kv_transfer_params or {}).get("lmc")
        if reason := unblendable(request):
            return Tracked(request, None, reason)
        try:
            options = parse_request(raw, request.num_prompt_tokens, self.config)
            options, gate = self.gate.admit(options)
        except Exception as error:  # nothing that a client sends may end the engine
            return Tracked(request, None, f"bad_request:{error!s:.500}")
        if not options.enabled:
            return Tracked(request, None, "disabled")
        salt = (request.cache_salt or "").encode()
        namespace = self.namespace + salt
        scope = namespace + repr(options.strategy).encode()
        tracked = Tracked(request, options, None, namespace, scope, gate=gate)
        self._read_tokens(tracked)
        return tracked

    def _read_tokens(self, tracked: Tracked) -> None:
        assert tracked.options is not None
        tracked.tokens = np.asarray(tracked.request.all_token_ids, np.int64)
        tracked.pieces = split(tracked.tokens, self.chunker, tracked.options.chunks)

    def _peek(self, tracked: Tracked) -> int:
        """Tokens that vLLM holds of the exact chain; the last token is never among them."""
        if not self.prefix_caching:
            return 0
        usable = (len(tracked.tokens) - 1) // self.block_size
        hashes = tracked.request.block_hashes[:usable]
        return len(cached_blocks(self.kv_cache_manager.block_pool, hashes)) * self.block_size

    def _earlier_turn(self, tracked: Tracked, local: int) -> Chain | None:
        """The blended blocks of an earlier turn that vLLM still holds, if they reach further."""
        if not self.prefix_caching or self.blend_refusal:
            return None
        tokens = tracked.tokens[:-1]
        chain = self.chains.find(tracked.scope, tokens, self.block_size)
        if chain is None:
            return None
        pool, exact = self.kv_cache_manager.block_pool, tracked.request.block_hashes[: chain.first]
        held = len(cached_blocks(pool, [*exact, *chain.hashes]))
        if held * self.block_size <= local or held <= chain.first:
            return None
        return replace(chain, hashes=chain.hashes[: held - chain.first])

    def _plan(self, tracked: Tracked, local: int) -> None:
        """Plan from `local` on, and count why a request does not blend."""
        self.planner.plan(tracked, local, self.blend_refusal)
        if tracked.reason:
            self.counts[tracked.reason.split(":")[0]] += 1

    def _replan(self, tracked: Tracked, local: int) -> None:
        """Admission is not what was planned for: plan anew, under hashes nobody else has."""
        self.counts["replanned"] += 1
        self._read_tokens(tracked)
        self._plan(tracked, local)
        assert tracked.plan is not None
        if tracked.blended_from is not None and tracked.blended_from >= local:
            tracked.blended_from = None
        recipes = tracked.plan.recipes(self.block_size, nonce=os.urandom(16))
        rechain(tracked.request, self.block_size, local // self.block_size, [], recipes)

    def _hits_uncomputed(self, tracked: Tracked, local: int) -> bool:
        """Whether a local block is still being filled by another request of this step.

        vLLM shares a block as soon as it is allocated, since its own forward fills it before
        anybody attends to it. Recomputed rows attend before that forward.
        """
        hashes = tracked.request.block_hashes[: local // self.block_size]
        hits = set(cached_blocks(self.kv_cache_manager.block_pool, hashes))
        for request_id, other in self.requests.items():
            if other is tracked or not hits:
                continue
            first = other.request.num_computed_tokens // self.block_size
            if hits.intersection(self.kv_cache_manager.get_block_ids(request_id)[0][first:]):
                return True
        return False

    def _save(self, tracked: Tracked, computed: int, blocks: list[int]) -> None:
        """Have the workers keep every chunk of the first `computed` tokens that is not stored."""
        per_token = self.layout.bytes_per_token
        saves = chunks_to_keep(tracked, self.chunker, self.index, computed, blocks, per_token)
        self.saves += saves
        for save in saves:
            tracked.unacknowledged[save.record.slot] = self.ranks
            self.saving[save.record.slot] = tracked

    def _settle(self, slot: int) -> None:
        """One more rank has saved `slot`, or failed to; behind the last one nobody reads pages."""
        if tracked := self.saving.get(slot):
            tracked.unacknowledged[slot] -= 1
            if tracked.unacknowledged[slot] == 0:
                del tracked.unacknowledged[slot], self.saving[slot]

    def _retaint_after_loss(self, tracked: Tracked, rows: list[int]) -> None:
        """Rows that a lost chunk made computed are not what the recipe's hashes say."""
        plan, request = tracked.admitted, tracked.request
        assert plan is not None
        self.counts["rows_recomputed_for_lost_chunks"] += len(rows)
        if plan.first_moved is not None:
            block = plan.first_moved // self.block_size
            held = cached_blocks(self.kv_cache_manager.block_pool, request.block_hashes)
            self.kv_cache_manager.evict_blocks(set(held[block:]))
            recipes = plan.recipes(self.block_size, nonce=os.urandom(16))
            rechain(request, self.block_size, block, [], recipes)
        # A request of one token has its report sent already, since the chunk was lost in the
        # very step that answered it; the counters tell of those.
        tracked.admitted = plan.recomputing(np.array(rows, np.int64))
        tracked.report = report_of(tracked, self.layout.bytes_per_token, self.cost)

    def _report(self, tracked: Tracked) -> None:
        tracked.report = report_of(tracked, self.layout.bytes_per_token, self.cost)
        for kind, n in tracked.report["kinds"].items():
            self.counts[f"tokens:{kind}"] += n


def _saves(tracked: Tracked) -> bool:
    return tracked.options is not None and tracked.options.save


def _claim_of(request_id: str, tokens: np.ndarray, blocks: list[int], plan: Plan) -> Claim:
    loads = [
        ChunkLoad(s.record.slot, s.start, s.end, s.at, s.record.T,
                  s.delta if plan.strategy.rotate else 0)
        for s in plan.found
    ]  # fmt: skip
    claim = (request_id, plan.end)
    if not plan.selective:
        return Claim(*claim, tokens[: plan.end], blocks, loads, plan.rows)
    return Claim(*claim, tokens, blocks, loads, plan.rows, plan.strategy, plan.outline)
