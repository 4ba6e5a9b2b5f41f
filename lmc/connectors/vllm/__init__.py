"""The connector for stock vLLM.

    --kv-transfer-config '{"kv_connector": "LMCConnector", "kv_role": "kv_both",
        "kv_connector_module_path": "lmc.connectors.vllm", "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"lmc": {...} or "path.yaml"}}'
    --worker-cls lmc.connectors.vllm.LMCWorker

The classes are imported when first asked for: vLLM imports this module in its front end too,
which needs none of torch's weight.
"""

from typing import Any

from lmc.connectors.vllm.client import drain, kv_transfer_params
from lmc.connectors.vllm.config import LMCConfig

__all__ = ["LMCConfig", "LMCConnector", "LMCWorker", "drain", "kv_transfer_params"]


def __getattr__(name: str) -> Any:
    if name == "LMCConnector":
        from lmc.connectors.vllm.connector import LMCConnector

        return LMCConnector
    if name == "LMCWorker":
        from lmc.connectors.vllm.worker_cls import LMCWorker

        return LMCWorker
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
