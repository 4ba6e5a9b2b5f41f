"""The worker's side: holds bytes, moves them, and recomputes rows. Decides nothing."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
from vllm.distributed.parallel_state import get_tp_group
from vllm.logger import init_logger

from lmc.connectors.vllm import identity
from lmc.connectors.vllm.adapter import VLLMAdapter
from lmc.connectors.vllm.attention import BackendAttention, PagedAttention
from lmc.connectors.vllm.checks import mismoved, misread, of_any_rank, self_check
from lmc.connectors.vllm.computing import on_every_rank
from lmc.connectors.vllm.config import LMCConfig
from lmc.connectors.vllm.copies import Copies, Told, reading
from lmc.connectors.vllm.decoders import Decoder
from lmc.connectors.vllm.groups import groups_of
from lmc.connectors.vllm.kernel_attention import paged_attention
from lmc.connectors.vllm.layouts import paged_kv
from lmc.connectors.vllm.loading import (
    Found,
    LayeredLoad,
    Placement,
    Target,
    find,
    on_any_rank,
    warm_up,
)
from lmc.connectors.vllm.lora import Loras
from lmc.connectors.vllm.messages import (
    ChunkSave,
    Claim,
    Encode,
    LMCStats,
    StepMetadata,
    WeightsTold,
    WorkerHello,
)  # fmt: skip
from lmc.connectors.vllm.metrics import ALIKE
from lmc.connectors.vllm.serving import MakeWindows, Serving
from lmc.connectors.vllm.states import Pages
from lmc.connectors.vllm.weights import WeightsWatch
from lmc.connectors.vllm.windows import Scratch, scratch_pages
from lmc.kernels.paged import PagedKV
from lmc.store.chunks import Chunks
from lmc.store.tier import Attached, taken

logger = init_logger(f"vllm.{__name__}")  # else vLLM prints none of it


class WorkerSide:
    """One rank's chunks and what is done with them.

    Attributes:
        refusal: why rows cannot be recomputed, or None.
        kv_refusal: why not even pages can be read and written, or None.
        watch: what notices that weights change, once there is a model.
        encodes_left: chunks that the scheduler has yet to have computed alone.
    """

    def __init__(self, vllm_config: Any, kv_cache_config: Any, config: LMCConfig) -> None:
        self.vllm_config = vllm_config
        self.groups = groups_of(kv_cache_config)
        self.block_size = self.groups.block_size
        self.rank = vllm_config.parallel_config.rank
        self.layout = identity.layout_of(vllm_config, kv_cache_config)
        self.told = Told(self.rank)
        tiers = identity.open_tiers(config, self.layout, self.rank, vllm_config)
        self.chunks = Chunks(
            self.layout,
            config.memory_bytes,
            [Attached(tier, said.write) for said, tier in tiers],
            config.write_queue_bytes,
            config.fetch_patience_s,
            self.told.held,
            populate=True,
            heads=identity.heads_of(self.layout, self.rank, vllm_config),
        )
        self.copies = Copies(self.chunks, self.told, self.groups, config.staging_bytes)
        self.max_rows = vllm_config.scheduler_config.max_num_batched_tokens
        served = (self.chunks, self.told, self.block_size, self.max_rows)
        self.serving = Serving(*served, self._target, self._of_claim)
        self.refusal: str | None = (
            "the worker has no access to the model; start vLLM with "
            "--worker-cls lmc.connectors.vllm.LMCWorker"
        )
        self.kv_refusal: str | None = None
        self.watch: WeightsWatch | None = None
        self.encodes_left = 0
        self.counts: Counter[str] = Counter()
        self._rope = identity.rope_of(vllm_config)
        self._decoder: Decoder | None = None
        self._loras: Loras | None = None
        self._way, self._window_bytes = config.attention, config.window_bytes
        self._attention: PagedAttention | None = None
        self._pages: PagedKV | None = None
        self._stale = False  # the step was made for other weights
        self._pages_lost = False  # since the last step
        self._failed_blocks: set[int] = set()  # that vLLM has yet to be told of
        self._spoilt: dict[int, int] = {}  # blocks that no save may read: the step they failed in
        # Requests whose claims were brought ahead of them, and those whose came to nothing.
        self._brought: tuple[set[str], set[str]] = set(), set()

    # -- start-up ----------------------------------------------------------------------------

    def register(self) -> None:
        """Learn where vLLM's pages are; what is not known of them is refused, not guessed."""
        try:
            layers = self.vllm_config.compilation_config.static_forward_context
            by_name = {name: layers[name] for name in self.groups.names}
            self._pages = self.copies.pages = paged_kv(list(by_name.values()))
            self.kv_refusal = misread(list(by_name.values()), self._pages, self.block_size)
            if self.groups.longest:
                longest = self.vllm_config.model_config.max_model_len
                pages = scratch_pages(self.groups, self._window_bytes, longest)
                layer = next(iter(by_name.values()))
                self.serving.scratch = Scratch(layer, self.groups, pages)
            if self.groups.states:
                of = (self.groups.states, layers, self._pages.dtype)
                self.serving.states = self.copies.states = Pages(*of)
        except Exception as error:  # a backend of another shape may fail in any way
            self.kv_refusal = f"its pages are not known: {type(error).__name__}: {error}"
        if self.kv_refusal is not None:
            return
        try:
            self._attention = paged_attention(self._way, by_name, self.groups, self.vllm_config)
        except Exception as error:
            self.refusal = f"rows cannot attend here: {type(error).__name__}: {error}"

    def take_model(self, model: Any, lora_manager: Any = None) -> None:
        """Watch the model's weights, and blend by its layers unless they do not work as it does.

        Args:
            lora_manager: the runner's, where adapters may be loaded.
        """
        self.watch = WeightsWatch(model)
        self._loras = self._decoder = None
        if self.groups.states:
            self.refusal = "layers that keep a state, which holds all that was before it"
            return
        blind = self.kv_refusal or (self.refusal if self._attention is None else None)
        try:
            self._loras = None if lora_manager is None else Loras(lora_manager)
        except AttributeError as error:
            blind = blind or f"LoRA adapters cannot be told apart: {error}"
        if self._loras is not None and self.layout.sides == 1:
            blind = blind or "rows of latents are not computed under LoRA adapters"
        if blind := of_any_rank(blind):
            self.refusal = blind
            return
        moving: str | None
        try:
            moving, found = self._checked(model)
        except Exception as error:  # a model of another shape may fail in any way
            moving = found = f"the model cannot be checked: {type(error).__name__}: {error}"
        computing = of_any_rank(found if isinstance(found, str) else None)
        self.refusal = moving or computing
        self._decoder = found if computing is None and isinstance(found, Decoder) else None

    def _checked(self, model: Any) -> tuple[str | None, Decoder | str]:
        """Why chunks cannot be moved on this model; its layers, or why not even rows can be
        computed."""
        assert self._attention is not None
        warm_up(self._target([[1]] * len(self.groups.specs)), self.chunks.memory)
        if (alone := identity.alone_refusal(self.vllm_config)) is not None:
            return alone, alone  # before the checks below, whose forwards would not return
        oracle = self._attention
        if not isinstance(oracle, BackendAttention):
            oracle = BackendAttention(oracle.layers, self.groups, self.vllm_config)
        refusal: str | None
        of = (self.vllm_config, self._loras)
        if isinstance(self._rope, str):
            refusal = self._rope
        else:
            self._rope, refusal = mismoved(self._rope, model, oracle, *of)
        # Where keys cannot be moved, rows can still be computed in place of what is lost.
        return refusal, self_check(model, self._attention, oracle, *of)

    def hello(self) -> WorkerHello:
        """What the scheduler must know before the first request."""
        computes = self._decoder is not None
        ahead = self.groups.states is not None
        return WorkerHello(self.refusal, self.kv_refusal, self.watch is not None, computes, ahead)

    # -- once a step, in this order ----------------------------------------------------------

    def begin(self, metadata: StepMetadata) -> None:
        """Before anything of the step: let go of slots, start fetches, end copies out of pages."""
        self._look_at_weights(metadata)
        self._look_at_adapters(metadata)
        for record in metadata.fetches:
            self.chunks.expect(record)
        self.copies.evict(metadata.freed)
        self._save(metadata, metadata.leaving, lost=self._pages_lost)
        self._pages_lost = False
        if metadata.reused:
            self.copies.finish()
        self.copies.fetch(record.slot for record in metadata.fetches)

    def load(self, metadata: StepMetadata) -> None:
        """Before the forward: bring every claim into the pages of its request.

        Whatever is lost is known, and computed, before the engine's own forward begins: what that
        one computes over bad pages could not be taken back where steps overlap.
        """
        self._look_at_adapters(metadata)  # of this step's requests too
        with ExitStack() as served:
            for claim in metadata.claims:
                served.enter_context(self.told.serving(claim.request_id))
            # Where nobody could compute the claim anew, its KV stays that of the weights before, as
            # that of what vLLM itself has under way does when weights change.
            mends = self._decoder is not None or not self.groups.longest
            for claim in self.serving.serve(metadata.claims, self._stale and mends):
                self._fail(claim, metadata.number)
        if self.groups.states:
            self._brought[0].update(claim.request_id for claim in metadata.claims)

    def ends_rows(self) -> bool:
        """Let rows go on to the end of the model, if on all ranks that is what it makes of them."""
        known = self._decoder is not None and self._decoder.which_end is not None
        if of_any_rank(None if known else "its end is not known"):
            return False
        self.serving.ends = {}
        return True

    def save(self, metadata: StepMetadata) -> None:
        """After the forward: copy new chunks out of the pages, behind the model's back."""
        self._save(metadata, metadata.saves)
        if metadata.encodes:
            found = [find(self.chunks, e.loads, False, time.monotonic()) for e in metadata.encodes]
            lost = [load.slot for some in found for load in some.missing]
            gone, refused = on_any_rank(lost, self._stale or self._decoder is None)
            self.told.lost(lost, late=False)
            for encode, some in zip(metadata.encodes, found, strict=True):
                left = any(load.slot in gone for load in encode.loads)
                self._encode(encode, some, refused or left)
            # Their blocks go back with this step's report.
            self.copies.finish()
        for block in metadata.forgiven:
            if self._spoilt.get(block, metadata.number) < metadata.number:
                del self._spoilt[block]
        self.encodes_left = metadata.encodes_left

    def lose_pages(self) -> None:
        """What is in the pages is about to go: copy what was asked for, and no more of it."""
        self.copies.finish()
        self._pages_lost = True

    def _save(self, metadata: StepMetadata, saves: Sequence[ChunkSave], lost: bool = False) -> None:
        # Freed before they were saved: nobody would ever let go of them.
        refused = {*metadata.freed, *reading(saves, self._spoilt, self.block_size)}
        for save in saves:
            if lost or self._stale or save.record.slot in refused:
                self.counts["saves_refused"] += 1
                self.told.held(save.record.slot, whole=False)
            else:
                self.copies.save(save)

    def take_failed_blocks(self) -> set[int]:
        """Blocks whose claim failed altogether; vLLM recomputes from the first of them."""
        failed, self._failed_blocks = self._failed_blocks, set()
        return failed

    def take_brought(self) -> tuple[set[str], set[str]]:
        """Requests whose claims were brought ahead of them, and those of them that came to nothing,
        since the last call."""
        brought, self._brought = self._brought, (set(), set())
        return brought

    def take_stats(self) -> LMCStats:
        """What happened since the last call, and what is under way."""
        counts, self.counts = self.counts, Counter()
        counts.update(taken(self.serving.counts))
        mine = {name: n for name, n in counts.items() if not self.rank or name not in ALIKE}
        levels = self.chunks.waiting() | {"pending_copies": self.copies.pending}
        return LMCStats.of(self.chunks.take_counts() + Counter(mine), levels=levels, rank=self.rank)

    def finish_saves(self) -> None:
        """Return when all that was computed so far is stored, in tiers behind memory too."""
        self.copies.finish()
        self.chunks.drain()

    def close(self) -> None:
        """Store what waits to be stored, and let go of everything."""
        self.copies.close()
        self.chunks.close()

    # -- claims ------------------------------------------------------------------------------

    def _of_claim(
        self,
        claim: Claim,
        most: np.ndarray,
        arriving: LayeredLoad | None,
        windows: MakeWindows | None,
    ) -> VLLMAdapter:
        of_claim = (claim.tokens, claim.blocks, most, arriving, claim.lora, windows)
        return self._adapter(*of_claim)

    def _adapter(
        self,
        tokens: np.ndarray,
        blocks: list[list[int]],
        most: np.ndarray,
        arriving: LayeredLoad | None = None,
        lora: int = 0,
        windows: MakeWindows | None = None,
    ) -> VLLMAdapter:
        """What computes rows, at most those of `most`; NotReadyError on all ranks or on none."""

        def made() -> VLLMAdapter:
            if self._decoder is None or self._attention is None:
                raise RuntimeError(f"rows cannot be computed: {self.refusal}")
            if get_tp_group().world_size > 1:  # what the layers will want again: it can be had
                for group, of_group in enumerate(blocks):
                    self._attention.prepare([(most, of_group)], group)
            before = arriving.until if arriving else lambda layer: None
            seen = windows() if windows else None
            rest = (self.max_rows, self.vllm_config, before, self._loras, lora, seen)
            return VLLMAdapter(self._decoder, self._attention, tokens, blocks, *rest)

        return on_every_rank(made)

    def _fail(self, claim: Claim, step: int) -> None:
        """Of a claim that is past mending no page is right; vLLM computes them all itself.

        Raises:
            RuntimeError: where it keeps windows apart, it cannot be told to.
        """
        self.counts["claims_failed"] += 1
        if self.groups.states:  # it has not been counted on yet
            self._brought[1].add(claim.request_id)
            self.told.recomputed(claim.request_id, np.arange(claim.start, claim.end))
            return
        if self.groups.longest:
            raise RuntimeError(
                f"lmc could not bring what {claim.request_id} was promised into its pages, and "
                "vLLM cannot compute it where layers keep their windows alone; the engine ends "
                "rather than answer from it (--disable-hybrid-kv-cache-manager)"
            )
        P = self.block_size
        blocks = [b for of in claim.blocks for b in of[claim.start // P : -(-claim.end // P)]]
        self._failed_blocks.update(blocks)
        self._spoilt |= dict.fromkeys(blocks, step)
        self.told.failed(claim.request_id, blocks)

    def _encode(self, encode: Encode, found: Found, refused: bool) -> None:
        """Compute a text alone, in blocks that were lent for it, and keep its chunks."""
        done = False
        try:
            if not refused:
                blocks = encode.saves[0].blocks
                if found.held:
                    Placement(found.held, self.chunks.memory, self._target(blocks)).launch()
                rows = np.arange(encode.first, len(encode.tokens), dtype=np.int64)
                self._adapter(encode.tokens, blocks, rows).run(rows)
                self.counts["rows_computed_alone"] += len(rows)
                done = True
        except Exception:
            logger.exception("lmc could not compute a text alone")
        for save in encode.saves:
            if done:
                self.copies.save(save)
            else:
                self.told.held(save.record.slot, whole=False)

    def _look_at_weights(self, metadata: StepMetadata) -> None:
        """Whether the step was made for the weights that are there; if not, say so."""
        self._stale = False
        if self.watch is None:
            return
        if metadata.look or metadata.claims or metadata.saves or metadata.encodes:
            self.watch.look(metadata.look)
        changes = self.watch.changes
        if metadata.weights.get(self.rank, 0) != changes:
            self._stale = True
            told = WeightsTold(changes, metadata.number, self.watch.version)
            self.told.weights(told)

    def _look_at_adapters(self, metadata: StepMetadata) -> None:
        """Whether those that are loaded are those that the step was made for; say which are new."""
        if self._loras is not None:
            news, wrong = self._loras.look(metadata.adapters)
            self.told.adapters(news)
            self._stale |= wrong

    def _target(self, blocks: list[list[int]]) -> Target:
        if self._pages is None:
            raise RuntimeError(f"pages cannot be read: {self.kv_refusal}")
        ids = [np.asarray(of_group, np.int64) for of_group in blocks]
        return Target(ids, self._pages, self._rope, self.groups)
