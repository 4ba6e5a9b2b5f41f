"""The worker class: hands the model to the connector, which vLLM does not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer import get_kv_transfer_group, has_kv_transfer_group
from vllm.platforms import current_platform

if TYPE_CHECKING or current_platform.is_cpu():
    from vllm.v1.worker.cpu_worker import CPUWorker as Worker
else:
    from vllm.v1.worker.gpu_worker import Worker


class LMCWorker(Worker):
    """vLLM's worker of this platform; after warm-up the connector gets the model and checks it."""

    def compile_or_warm_up_model(self) -> Any:
        result = super().compile_or_warm_up_model()
        if has_kv_transfer_group():
            get_kv_transfer_group().enable_blending(self.model_runner.get_model())
        return result

    def finish_saves(self) -> None:
        """Return when every chunk computed so far is stored (`collective_rpc("finish_saves")`)."""
        if has_kv_transfer_group():
            get_kv_transfer_group().finish_saves()
