"""vLLM's connector interface, one line a hook; the two sides do the work."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from vllm.distributed.kv_events import KVCacheEvent
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
    SupportsHMA,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import (
    KVConnectorPromMetrics,
    KVConnectorStats,
)
from vllm.logger import init_logger
from vllm.v1.outputs import KVConnectorOutput

from lmc.connectors.vllm.config import load_config
from lmc.connectors.vllm.events import published
from lmc.connectors.vllm.identity import check_vllm_version, engine_refusal
from lmc.connectors.vllm.messages import LMCStats, StepMetadata, WorkerHello, WorkerReport
from lmc.connectors.vllm.metrics import LMCPromMetrics
from lmc.connectors.vllm.scheduler import SchedulerSide
from lmc.connectors.vllm.stalls import Stalls
from lmc.connectors.vllm.worker import WorkerSide

logger = init_logger(f"vllm.{__name__}")  # else vLLM prints none of it


class LMCConnector(KVConnectorBase_V1, SupportsHMA):
    """Reuses KV at any position of a prompt on stock vLLM; see the package's docstring.

    Raises:
        RuntimeError: a vLLM version this was not tested with.
        ValueError: wrong settings, or memory for less than one chunk.
    """

    def __init__(self, vllm_config: Any, role: KVConnectorRole, kv_cache_config: Any) -> None:
        check_vllm_version()
        super().__init__(vllm_config, role, kv_cache_config)
        config = load_config(vllm_config.kv_transfer_config.kv_connector_extra_config)
        self._refusal = engine_refusal(vllm_config, kv_cache_config, config)
        self._scheduler: SchedulerSide | None = None
        self._worker: WorkerSide | None = None
        self._stalls = Stalls()
        self._said_hello = False
        self._publishes = published(vllm_config)
        if self._refusal:
            logger.warning("lmc neither stores nor reuses KV here: %s", self._refusal)
        elif role == KVConnectorRole.SCHEDULER:
            self._scheduler = SchedulerSide(vllm_config, kv_cache_config, config)
        else:
            self._worker = WorkerSide(vllm_config, kv_cache_config, config)
            if self._publishes:
                self._worker.chunks.kept = self._worker.told.kept

    # -- scheduler ---------------------------------------------------------------------------

    @property
    def requires_kv_delivery(self) -> bool:
        return False  # a cache: a save that is dropped is a later miss

    def bind_kv_cache_manager(self, kv_cache_manager: Any) -> None:
        if self._scheduler:
            self._scheduler.local.manager = kv_cache_manager

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        if self._scheduler:
            self._scheduler.greet([m for m in metadata.values() if isinstance(m, WorkerHello)])

    def on_new_request(self, request: Any) -> None:
        if self._scheduler:
            self._scheduler.on_new_request(request)

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        if not self._scheduler:
            return 0, False
        tokens = self._scheduler.matched_tokens(request, num_computed_tokens)
        # A state must be in its page before vLLM prepares the step that goes on from it.
        return tokens, bool(tokens) and self._scheduler.planner.ends is not None

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        if self._scheduler:
            ids = [list(of_group) for of_group in blocks.get_block_ids()]
            self._scheduler.allocated(request, ids, num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> KVConnectorMetadata:
        return self._scheduler.step(scheduler_output) if self._scheduler else StepMetadata()

    def update_connector_output(self, connector_output: KVConnectorOutput) -> None:
        report = connector_output.kv_connector_worker_meta
        if self._scheduler and isinstance(report, WorkerReport):
            self._scheduler.heard(report)

    def has_pending_push_work(self) -> bool:
        return self._scheduler is not None and self._scheduler.idle_work

    def request_finished(
        self, request: Any, block_ids: list[int]
    ) -> tuple[bool, dict[str, Any] | None]:
        # Beside a connector that knows of no groups of layers, both are asked like this.
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        # Its blocks are free at once: what is still to be copied out of them is read in time.
        if not self._scheduler:
            return False, {"lmc": {"reason": f"engine:{self._refusal}"}}
        blocks = self._scheduler.local.groups.those(block_ids)
        return False, self._scheduler.finish(request, blocks)

    def take_events(self) -> list[KVCacheEvent]:
        return self._scheduler.events.take() if self._scheduler and self._scheduler.events else []

    def reset_cache(self) -> bool:
        if self._scheduler:
            self._scheduler.reset()
        return True

    # -- worker ------------------------------------------------------------------------------

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        if self._worker:
            self._worker.register()

    def take_model(self, model: Any, lora_manager: Any = None) -> None:
        """Called by LMCWorker once the model is ready."""
        if self._worker:
            self._worker.take_model(model, lora_manager)

    @property
    def worker(self) -> WorkerSide | None:
        """The worker's side, where this is one that stores anything."""
        return self._worker

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        return self._worker.hello() if self._worker else None

    def handle_preemptions(self, kv_connector_metadata: KVConnectorMetadata) -> None:
        assert isinstance(kv_connector_metadata, StepMetadata)
        if self._worker:
            with self._stalls.during("copies", kv_connector_metadata):
                self._worker.begin(kv_connector_metadata)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        if self._worker:
            with self._stalls.during("claims", self._step()):
                self._worker.load(self._step())

    def wait_for_layer_load(self, layer_name: str) -> None:
        return  # all that is claimed is in place before the forward

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        return  # all layers at once in wait_for_save, which full CUDA graphs cannot skip

    def wait_for_save(self) -> None:
        if self._worker:
            with self._stalls.during("isolated", self._step()):
                self._worker.save(self._step())

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        brought, failed = self._worker.take_brought() if self._worker else (set(), set())
        return KVConnectorTransferResults(finished_recving=brought, failed_recving=failed)

    def get_block_ids_with_load_errors(self) -> set[int]:
        return self._worker.take_failed_blocks() if self._worker else set()

    def build_connector_worker_meta(self) -> WorkerReport | None:
        if self._worker is None:
            return None
        if not self._said_hello:
            self._said_hello = True
            self._worker.told.hello(self._worker.hello())
        if self._publishes:
            self._worker.told.removed(self._worker.chunks.take_removed())
        return self._worker.told.take()

    def shutdown(self) -> None:
        if self._worker:
            self._worker.close()
        if self._scheduler:
            self._scheduler.close()

    def _step(self) -> StepMetadata:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, StepMetadata)
        return metadata

    # -- both --------------------------------------------------------------------------------

    def get_kv_connector_stats(self) -> KVConnectorStats | None:
        if self._scheduler:
            return self._scheduler.take_stats()
        if self._worker is None:
            return None
        stalls, stats = self._stalls.take(), self._worker.take_stats()
        return stats if self._worker.rank else stats.aggregate(stalls)  # alike on all ranks

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> KVConnectorStats:
        return LMCStats(data=data or {})

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: Any,
        metric_types: dict[Any, Any],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> KVConnectorPromMetrics:
        return LMCPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)


# Beside others vLLM asks for the class of its statistics by this name alone.
with suppress(ValueError):  # it was imported before
    KVConnectorFactory.register_connector("LMCConnector", "lmc.connectors.vllm", "LMCConnector")
