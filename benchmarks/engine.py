"""An engine with lmc in it, in this process, for what is measured there."""

from __future__ import annotations

import os
from typing import Any

from lmc.model import exports


def started(model: str, lmc: dict[str, Any], **settings: Any) -> Any:
    """vLLM's `LLM` of a model's name or folder, in float32.

    Args:
        lmc: settings of `LMCConfig`.
        settings: vLLM's own.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if "kv_cache_memory_bytes" not in settings:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm import LLM
    from vllm.config import KVTransferConfig

    return LLM(
        str(exports.resolve(model)), dtype="float32", worker_cls="lmc.connectors.vllm.LMCWorker",
        kv_transfer_config=KVTransferConfig(
            kv_connector="LMCConnector", kv_connector_module_path="lmc.connectors.vllm",
            kv_role="kv_both", kv_load_failure_policy="recompute",
            kv_connector_extra_config={"lmc": lmc},
        ),
        **settings,
    )  # fmt: skip
