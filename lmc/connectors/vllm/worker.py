"""The worker's side: holds bytes, moves them, and recomputes rows. Decides nothing."""

from __future__ import annotations

import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from vllm.distributed.parallel_state import get_tp_group
from vllm.logger import init_logger

from lmc.blend.evidence import without
from lmc.connectors.vllm import identity
from lmc.connectors.vllm.adapter import VLLMAdapter, rope_as_in_model, self_check
from lmc.connectors.vllm.attention import BackendAttention, PagedAttention, paged_attention
from lmc.connectors.vllm.config import LMCConfig
from lmc.connectors.vllm.layouts import paged_kv
from lmc.connectors.vllm.loading import LayeredLoad, LostError, Placement, placed
from lmc.connectors.vllm.messages import (
    ChunkLoad,
    ChunkSave,
    Claim,
    LMCStats,
    StepMetadata,
    WorkerHello,
    WorkerReport,
)
from lmc.kernels.gather import gather
from lmc.kernels.paged import PagedKV
from lmc.kernels.scatter import scatter
from lmc.store.chunks import Attached, Chunks

logger = init_logger(__name__)


class WorkerSide:
    """One rank's chunks and what is done with them."""

    def __init__(self, vllm_config: Any, kv_cache_config: Any, config: LMCConfig) -> None:
        self.vllm_config = vllm_config
        self.spec = kv_cache_config.kv_cache_groups[0].kv_cache_spec
        self.layer_names = list(kv_cache_config.kv_cache_groups[0].layer_names)
        self.rank = vllm_config.parallel_config.rank
        self.layout = identity.layout_of(vllm_config, kv_cache_config)
        world = vllm_config.parallel_config.world_size
        tiers = identity.open_tiers(config, self.layout, self.rank, world, vllm_config)
        self.chunks = Chunks(
            self.layout,
            config.memory_bytes,
            [Attached(tier, said.write) for said, tier in tiers],
            config.write_queue_bytes,
            config.fetch_patience_s,
            self._fetched,
            populate=True,
        )
        self.max_rows = vllm_config.scheduler_config.max_num_batched_tokens
        self.refusal: str | None = (
            "the worker has no access to the model; start vLLM with "
            "--worker-cls lmc.connectors.vllm.LMCWorker"
        )
        self.counts: Counter[str] = Counter()
        self._rope = identity.rope_of(vllm_config)
        self._model: Any = None
        self._way = config.attention
        self._attention: PagedAttention | None = None
        self._paged: PagedKV | None = None
        self._arriving: list[tuple[Claim, LayeredLoad]] = []  # claims that this forward waits for
        # A forward that is replayed whole as a CUDA graph calls nobody between its layers.
        self._hooked = not vllm_config.compilation_config.cudagraph_mode.has_full_cudagraphs()
        # One thread, so that saves and frees happen in the order the scheduler wanted.
        self._copier = ThreadPoolExecutor(1, thread_name_prefix="lmc-save")
        self._lock = threading.Lock()
        self._report = WorkerReport()
        self._saving: Counter[str] = Counter()
        self._released: set[str] = set()
        self._failed_blocks: set[int] = set()

    # -- start-up ----------------------------------------------------------------------------

    def register(self) -> None:
        """Learn where vLLM's pages are.

        Raises:
            ValueError: an attention backend whose page layout is not known.
        """
        layers = self.vllm_config.compilation_config.static_forward_context
        by_name = {name: layers[name] for name in self.layer_names}
        self._attention = paged_attention(self._way, by_name, self.spec, self.vllm_config)
        self._paged = paged_kv(list(by_name.values()))

    def enable_blending(self, model: Any) -> None:
        """Take the model, unless its rows cannot be recomputed as it would."""
        assert self._attention is not None
        if isinstance(self._rope, str):
            self.refusal = self._rope
        else:
            self._rope, mismatch = rope_as_in_model(self._rope, model)
            oracle = self._attention
            if not isinstance(oracle, BackendAttention):
                oracle = BackendAttention(oracle.layers, self.spec, self.vllm_config)
            self.refusal = mismatch or self_check(model, self._attention, oracle, self.vllm_config)
        self._model = model if self.refusal is None else None
        # Kernels are compiled when first launched: better now than within a request.
        assert self._paged is not None
        page = self._attention.page_slots(np.arange(self.spec.block_size), blocks=[1])
        scatter(gather(self._paged, page), self._paged, page)

    def hello(self) -> WorkerHello:
        """What the scheduler must know before the first request."""
        return WorkerHello(self.refusal)

    # -- once a step, in this order ----------------------------------------------------------

    def begin(self, metadata: StepMetadata) -> None:
        """Before anything of the step: let go of slots, start fetches, end copies out of pages."""
        for record in metadata.fetches:
            self.chunks.expect(record)
        # Untested on a GPU: copies of earlier steps out of the memory that is let go of.
        used = _recorded() if metadata.freed else None
        for slot in metadata.freed:
            self._copier.submit(self._evict, slot, used)
        for record in metadata.fetches:
            self._copier.submit(self.chunks.fetch, record.slot)
        self._released.update(metadata.released)
        if metadata.preempted:
            self._finish_copies()

    def load(self, metadata: StepMetadata) -> None:
        """Before the forward: bring every claim into the pages of its request."""
        for claim in metadata.claims:
            try:
                self._serve(claim)
            except Exception:
                # vLLM truncates the request there and computes the rest itself.
                logger.exception("lmc could not serve its claim on %s", claim.request_id)
                self.counts["claims_failed"] += 1
                self._fail(claim, min([load.start for load in claim.loads] + claim.rows.tolist()))

    def save(self, metadata: StepMetadata) -> None:
        """After the forward: copy new chunks out of the pages, behind the model's back."""
        for claim, arriving in self._arriving:
            if not arriving.complete:
                logger.error("lmc was not asked for the layers of %s", claim.request_id)
                self._lose(claim, claim.loads)
        self._arriving = []
        ready = _recorded() if metadata.saves else None
        for save in metadata.saves:
            with self._lock:
                self._saving[save.request_id] += 1
            self._copier.submit(self._save, save, ready)

    def wait_for_layer(self, layer_name: str) -> None:
        """Within the forward, before a layer attends: what it needs of chunks on their way."""
        if not self._arriving:
            return
        layer = self.layer_names.index(layer_name)
        for claim, arriving in list(self._arriving):
            try:
                arriving.until(layer)
            except LostError as lost:
                # The forward goes on over pages that vLLM will have computed anew.
                self._lose(claim, [lost.load])
                self._arriving.remove((claim, arriving))

    def finished(self) -> set[str]:
        """Released requests whose saves are done, each told once."""
        with self._lock:
            done = {r for r in self._released if not self._saving[r]}
            for request_id in done:
                del self._saving[request_id]
        self._released -= done
        return done

    def report(self) -> WorkerReport | None:
        """What happened since the last call, if anything did."""
        with self._lock:
            report, self._report = self._report, WorkerReport()
        return report if report != WorkerReport() else None

    def take_failed_blocks(self) -> set[int]:
        """Blocks whose claim failed altogether; vLLM recomputes from the first of them."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def take_stats(self) -> LMCStats | None:
        """Counters since the last call."""
        counts, self.counts = self.counts, Counter()
        for behind in self.chunks.tiers:
            tier = behind.tier
            counts.update({f"{tier.name}:{kind}": n for kind, n in tier.counts.items() if n})
            tier.counts.clear()
        counts.update(self.chunks.counts)
        self.chunks.counts.clear()
        return LMCStats(data=dict(counts)) if counts else None

    def finish_saves(self) -> None:
        """Return when all that was computed so far is stored, in tiers behind memory too."""
        self._finish_copies()
        self.chunks.drain()

    def close(self) -> None:
        """Store what waits to be stored, and let go of everything."""
        self._copier.shutdown(wait=True)
        self.chunks.close()

    # -- parts -------------------------------------------------------------------------------

    def _serve(self, claim: Claim) -> None:
        """Load, then compute rows; chunks that do not come are computed too."""
        late: list[ChunkLoad] = []
        while True:
            lost, arriving = self._load(claim, late)
            hooked = self._hooked and not _computes(claim)
            if hooked and not lost and arriving is not None:
                self._arriving.append((claim, arriving))  # the engine's own forward waits for it
                return
            try:
                self._compute(claim, lost, arriving)
                return
            except LostError as e:
                self._lose(None, [e.load])
                late.append(e.load)

    def _load(
        self, claim: Claim, late: list[ChunkLoad]
    ) -> tuple[list[ChunkLoad], LayeredLoad | None]:
        """Put chunks into the request's pages: those that are lost, and those still to come.

        Args:
            late: what did not come in time.
        """
        assert self._attention is not None and self._paged is not None
        deadline = time.monotonic() + self.chunks.patience_s
        layered = get_tp_group().world_size == 1  # else all ranks must know first what is lost
        missing, arriving = list(late), []
        for load in claim.loads:
            if load in late:
                continue
            arrival = self.chunks.arrival(load.slot)
            if arrival is not None and not layered and not arrival.wait(None, deadline):
                missing.append(load)
                continue
            placement = placed(load, claim.blocks, self._attention, self._rope)
            parts = self.chunks.parts(load.slot)
            if parts is not None and sum(part.shape[2] for part in parts) == load.T:
                placement.put(parts, self._paged)
                self._count_loaded("host", placement)
            elif arrival is not None and layered:
                arriving.append((arrival, placement))
                self._count_loaded("behind", placement)
            else:
                missing.append(load)
        somewhere = _on_any_rank([load.slot for load in missing])
        self._lose(None, [load for load in missing if load not in late])
        lost = [load for load in claim.loads if load.slot in somewhere]
        return lost, LayeredLoad(arriving, self._paged, deadline) if arriving else None

    def _compute(self, claim: Claim, lost: list[ChunkLoad], arriving: LayeredLoad | None) -> None:
        """The rows of a claim, those of lost chunks among them, layer by layer as chunks come."""
        rows, strategy, outline = claim.rows, claim.strategy, claim.outline
        for load in lost:
            rows = np.union1d(rows, np.arange(load.start, load.end))
        if lost:
            if self._model is None:
                self._fail(claim, min(load.start for load in lost))
                return
            anew = np.setdiff1d(rows, claim.rows)
            with self._lock:
                self._report.recomputed[claim.request_id] = anew.tolist()
            if outline is not None:
                # As Plan.recomputing has it on the scheduler's side.
                moved, new = without(outline.moved, anew), outline.new + len(anew)
                outline = replace(outline, moved=moved, new=new)
        if outline is not None and not outline.moved:
            strategy = outline = None
        if len(rows) or strategy is not None:
            assert self._attention is not None
            adapter = VLLMAdapter(
                self._model,
                self._attention,
                claim.tokens,
                claim.blocks,
                self.max_rows,
                self.vllm_config,
                arriving.until if arriving else lambda layer: None,
            )
            outcome = adapter.run(rows, strategy, outline)
            self.counts["rows_computed"] += len(rows)
            self.counts["row_layers_selected"] += sum(len(chosen) for chosen in outcome.selected)
            self.counts["row_layers_probed"] += outcome.probe
            if outcome.probe and len(claim.blocks) * self.spec.block_size < len(claim.tokens):
                self.counts["probes_cut_short"] += 1
        if arriving is not None:
            arriving.all()

    def _count_loaded(self, source: str, placement: Placement) -> None:
        self.counts[f"bytes_loaded:{source}"] += placement.tokens * self.layout.bytes_per_token

    def _lose(self, claim: Claim | None, loads: list[ChunkLoad]) -> None:
        """Tell the scheduler what is not there; a claim that is past mending, the engine."""
        if not loads:
            return
        with self._lock:
            self._report.lost += [load.slot for load in loads]
            # A fetch that is still under way has been waited for in vain.
            self._report.late |= any(self.chunks.arrival(load.slot) for load in loads)
        if claim is not None:
            self.counts["claims_failed"] += 1
            self._fail(claim, min(load.start for load in loads))

    def _fetched(self, slot: int, whole: bool) -> None:
        """On a fetching thread: a chunk has come out of a tier, or has not."""
        with self._lock:
            if whole:
                self._report.saved.append((slot, self.rank))
            else:
                self._report.lost.append(slot)

    def _evict(self, slot: int, used: Any) -> None:
        """On the copying thread."""
        if used is not None:
            used.synchronize()
        self.chunks.evict(slot)

    def _finish_copies(self) -> None:
        self._copier.submit(lambda: None).result()

    def _fail(self, claim: Claim, start: int) -> None:
        block_size = self.spec.block_size
        last = -(-claim.end // block_size)
        self._failed_blocks.update(claim.blocks[start // block_size : last])

    def _save(self, save: ChunkSave, ready: Any) -> None:
        """On the copying thread: one chunk out of the pages."""
        slot, stored = save.record.slot, False
        parts = self.chunks.reserve(slot, save.end - save.start)
        if parts is not None:
            try:
                self._copy_out(save, parts, ready)
                stored = True
            except Exception:
                logger.exception("lmc could not store a chunk of %s", save.request_id)
                self.chunks.forget(slot)
        if stored:
            self.chunks.publish(save.record)
        with self._lock:
            if stored:
                self._report.saved.append((slot, self.rank))
            else:
                self._report.lost.append(slot)
            self._saving[save.request_id] -= 1

    def _copy_out(self, save: ChunkSave, parts: list[torch.Tensor], ready: Any) -> None:
        assert self._attention is not None and self._paged is not None
        rows = np.arange(save.start, save.end, dtype=np.int64)
        here = self._attention.page_slots(rows, save.blocks).split(
            [part.shape[2] for part in parts]
        )
        if ready is None:
            for part, slots in zip(parts, here, strict=True):
                gather(self._paged, slots, out=part)
            return
        # Untested on a GPU: a stream of its own, behind the step's forward.
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            stream.wait_event(ready)
            for part, slots in zip(parts, here, strict=True):
                part.copy_(gather(self._paged, slots), non_blocking=True)
        stream.synchronize()


def _computes(claim: Claim) -> bool:
    """Whether rows of a claim are computed before the engine's own forward."""
    return len(claim.rows) > 0 or claim.strategy is not None


def _recorded() -> Any:
    """An event behind all that the device has been given so far; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    event = torch.cuda.Event()
    event.record()
    return event


def _on_any_rank(slots: list[int]) -> set[int]:
    """Slots that any tensor-parallel rank named: all ranks must compute the same rows."""
    group = get_tp_group()
    if group.world_size == 1:
        return set(slots)
    named: list[list[int]] = [[] for _ in range(group.world_size)]
    torch.distributed.all_gather_object(named, slots, group=group.cpu_group)
    return {slot for rank in named for slot in rank}
