"""The worker's side: holds bytes, moves them, and recomputes rows. Decides nothing."""

from __future__ import annotations

import threading
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
from lmc.connectors.vllm.adapter import VLLMAdapter, self_check
from lmc.connectors.vllm.attention import BackendAttention, PagedAttention, paged_attention
from lmc.connectors.vllm.config import LMCConfig
from lmc.connectors.vllm.layouts import paged_kv
from lmc.connectors.vllm.messages import (
    Blend,
    ChunkLoad,
    ChunkSave,
    LMCStats,
    StepMetadata,
    WorkerHello,
    WorkerReport,
)
from lmc.kernels.gather import gather
from lmc.kernels.paged import PagedKV
from lmc.kernels.scatter import scatter
from lmc.rope import Rope
from lmc.store.memory import HostMemory

logger = init_logger(__name__)


class WorkerSide:
    """One rank's chunks and what is done with them."""

    def __init__(self, vllm_config: Any, kv_cache_config: Any, config: LMCConfig) -> None:
        self.vllm_config = vllm_config
        self.spec = kv_cache_config.kv_cache_groups[0].kv_cache_spec
        self.layer_names = list(kv_cache_config.kv_cache_groups[0].layer_names)
        self.rank = vllm_config.parallel_config.rank
        self.layout = identity.layout_of(vllm_config, kv_cache_config)
        self.memory = HostMemory(self.layout, config.memory_bytes)
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
            self._rope, mismatch = _as_in_model(self._rope, model)
            oracle = self._attention
            if not isinstance(oracle, BackendAttention):
                oracle = BackendAttention(oracle.layers, self.spec, self.vllm_config)
            self.refusal = mismatch or self_check(model, self._attention, oracle, self.vllm_config)
        self._model = model if self.refusal is None else None
        # Kernels are compiled when first launched: better now than within a request.
        assert self._paged is not None
        page = self._attention.slots(np.arange(self.spec.block_size), blocks=[1])
        scatter(gather(self._paged, page), self._paged, page)

    def hello(self) -> WorkerHello:
        """What the scheduler must know before the first request."""
        return WorkerHello(self.refusal)

    # -- once a step, in this order ----------------------------------------------------------

    def begin(self, metadata: StepMetadata) -> None:
        """Before anything of the step: let go of slots; let pending copies out of pages end."""
        for slot in metadata.freed:
            self._copier.submit(self.memory.evict, slot)
        self._released.update(metadata.released)
        if metadata.preempted:
            self.finish_saves()

    def load(self, metadata: StepMetadata) -> None:
        """Before the forward: bring every claim into the pages of its request."""
        for blend in metadata.blends:
            try:
                self._blend(blend)
            except Exception:
                # vLLM truncates the request there and computes the rest itself.
                logger.exception("lmc could not serve its claim on %s", blend.request_id)
                self.counts["claims_failed"] += 1
                self._fail(blend, min([load.start for load in blend.loads] + blend.rows.tolist()))

    def save(self, metadata: StepMetadata) -> None:
        """After the forward: copy new chunks out of the pages, behind the model's back."""
        ready = torch.cuda.Event() if torch.cuda.is_available() else None
        if ready is not None and metadata.saves:
            ready.record()
        for save in metadata.saves:
            with self._lock:
                self._saving[save.request_id] += 1
            self._copier.submit(self._save, save, ready)

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
        return LMCStats(data=dict(counts)) if counts else None

    def finish_saves(self) -> None:
        """Return when all copies asked for so far are done."""
        self._copier.submit(lambda: None).result()

    def close(self) -> None:
        """Stop copying."""
        self._copier.shutdown(wait=True)

    # -- parts -------------------------------------------------------------------------------

    def _blend(self, blend: Blend) -> None:
        missing = [load.slot for load in blend.loads if not self._load(blend, load)]
        with self._lock:
            self._report.lost += missing
        somewhere = _on_any_rank(missing)
        lost = [load for load in blend.loads if load.slot in somewhere]
        rows, strategy, outline = blend.rows, blend.strategy, blend.outline
        for load in lost:
            rows = np.union1d(rows, np.arange(load.start, load.end))
        if lost:
            if self._model is None:
                self._fail(blend, min(load.start for load in lost))
                return
            anew = np.setdiff1d(rows, blend.rows)
            with self._lock:
                self._report.recomputed[blend.request_id] = anew.tolist()
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
                blend.tokens,
                blend.blocks,
                self.max_rows,
                self.vllm_config,
            )
            outcome = adapter.run(rows, strategy, outline)
            self.counts["rows_computed"] += len(rows)
            self.counts["row_layers_selected"] += sum(len(chosen) for chosen in outcome.selected)
            self.counts["row_layers_probed"] += outcome.probe
            if outcome.probe and len(blend.blocks) * self.spec.block_size < len(blend.tokens):
                self.counts["probes_cut_short"] += 1

    def _load(self, blend: Blend, load: ChunkLoad) -> bool:
        chunk = self.memory.get(load.slot)
        if chunk is None or chunk.shape[2] != load.T:
            return False
        assert self._attention is not None and self._paged is not None
        slots = torch.full((load.T,), -1, dtype=torch.int64, device=self._attention.device)
        first = load.start - load.origin
        wanted = np.arange(load.start, load.end, dtype=np.int64)
        slots[first : first + len(wanted)] = self._attention.slots(wanted, blend.blocks)
        cos = sin = None
        if load.delta:
            assert isinstance(self._rope, Rope)
            cos, sin = (torch.from_numpy(a).to(slots.device) for a in self._rope.angles(load.delta))
        interleaved = isinstance(self._rope, Rope) and self._rope.interleaved
        chunk = chunk.to(slots.device, non_blocking=True)
        scatter(chunk, self._paged, slots, cos, sin, interleaved=interleaved)
        self.counts["bytes_loaded:host"] += len(wanted) * self.layout.bytes_per_token
        return True

    def _fail(self, blend: Blend, start: int) -> None:
        block_size = self.spec.block_size
        last = -(-blend.end // block_size)
        self._failed_blocks.update(blend.blocks[start // block_size : last])

    def _save(self, save: ChunkSave, ready: Any) -> None:
        """On the copying thread: one chunk out of the pages."""
        stored = False
        try:
            stored = self.memory.put(save.slot, self._copy_out(save, ready))
        except Exception:
            logger.exception("lmc could not store a chunk of %s", save.request_id)
        with self._lock:
            if stored:
                self._report.saved.append((save.slot, self.rank))
            else:
                self._report.lost.append(save.slot)
            self._saving[save.request_id] -= 1

    def _copy_out(self, save: ChunkSave, ready: Any) -> torch.Tensor:
        assert self._attention is not None and self._paged is not None
        rows = np.arange(save.start, save.end, dtype=np.int64)
        slots = self._attention.slots(rows, save.blocks)
        chunk = self.memory.allocate(len(rows))
        if ready is None:
            return gather(self._paged, slots, out=chunk)
        # Untested on a GPU: a stream of its own, behind the step's forward.
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            stream.wait_event(ready)
            chunk.copy_(gather(self._paged, slots), non_blocking=True)
        stream.synchronize()
        return chunk


def _on_any_rank(slots: list[int]) -> set[int]:
    """Slots that any tensor-parallel rank named: all ranks must compute the same rows."""
    group = get_tp_group()
    if group.world_size == 1:
        return set(slots)
    named: list[list[int]] = [[] for _ in range(group.world_size)]
    torch.distributed.all_gather_object(named, slots, group=group.cpu_group)
    return {slot for rank in named for slot in rank}


def _as_in_model(rope: Rope, model: Any) -> tuple[Rope, str | None]:
    """`rope` with the model's own pairing, and how its angles differ from the model's, if so."""
    for module in model.modules():
        table = getattr(module, "cos_sin_cache", None)
        if table is None or not hasattr(module, "is_neox_style"):
            continue
        rope = Rope(rope.inv_freq, not module.is_neox_style, rope.kind)
        R = 2 * len(rope.inv_freq)
        if table.shape[-1] != R:
            return rope, f"the model rotates {table.shape[-1]} dims, its config says {R}"
        positions = [1, min(1000, len(table) - 1)]
        cos, sin = table[positions].double().cpu().chunk(2, dim=-1)
        expected = torch.from_numpy(np.outer(positions, rope.inv_freq))
        error = torch.atan2(sin, cos) - expected
        worst = float((torch.remainder(error + torch.pi, 2 * torch.pi) - torch.pi).abs().max())
        # The table is in the model's dtype, and its angles were taken in float32.
        if worst > 4 * torch.finfo(table.dtype).eps + 1e-3:
            return rope, f"the model's angles differ from its config's by {worst:.1e} rad"
        return rope, None
    return rope, "no rotary embedding of a known kind found in the model"
