"""Runs one scenario in a vLLM engine of its own, in a process of its own.

vLLM keeps one worker connector per process, so engines with different settings cannot follow one
another inside pytest. A scenario is a function of `scenarios.py`; what it returns comes back
pickled, and the test asserts on it.
"""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
BLOCK = 32


def run_scenario(
    name: str,
    model: Path,
    tmp_path: Path,
    *,
    separate_worker: bool = False,
    interpret: bool = False,
    lmc: dict[str, Any] | None = None,
    **engine: Any,
) -> Any:
    """What scenario `name` returns for an LMC engine on `model`; the child's output if it fails."""
    arguments = {"name": name, "model": str(model), "lmc": lmc or {}, "engine": engine}
    sent, received = tmp_path / f"{name}-arguments", tmp_path / f"{name}-result"
    sent.write_bytes(pickle.dumps(arguments))
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": str(int(separate_worker))}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    if engine.get("tensor_parallel_size", 1) > 1:
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"  # else it wants a NUMA node a rank
    child = subprocess.run(
        [sys.executable, __file__, str(sent), str(received)],
        env=environment, capture_output=True, text=True, check=False,
        timeout=800 if interpret else 280,
    )  # fmt: skip
    if child.returncode:
        raise AssertionError(f"scenario {name}:\n{child.stdout[-4000:]}\n{child.stderr[-8000:]}")
    return pickle.loads(received.read_bytes())


def engine_of(model: str, lmc: dict[str, Any], engine: dict[str, Any]) -> Any:
    """A small LMC engine: 39 usable blocks of 32 tokens, at most 128 tokens a step."""
    from vllm import LLM
    from vllm.config import KVTransferConfig

    settings: dict[str, Any] = {
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "dtype": "float32",
        "max_model_len": 1024,
        "block_size": BLOCK,
        "kv_cache_memory_bytes": 40 * BLOCK * 1536,
        "max_num_batched_tokens": 128,
        "max_num_seqs": 4,
        "worker_cls": "lmc.connectors.vllm.LMCWorker",
        "kv_transfer_config": KVTransferConfig(
            kv_connector="LMCConnector",
            kv_connector_module_path="lmc.connectors.vllm",
            kv_role="kv_both",
            kv_load_failure_policy="recompute",
            kv_connector_extra_config={
                "lmc": {"memory_bytes": 64 << 20, "min_recovery": None} | lmc
            },
        ),
    }
    return LLM(model=model, **settings | engine)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from tests.connectors.vllm import scenarios

    arguments = pickle.loads(Path(sys.argv[1]).read_bytes())
    llm = engine_of(arguments["model"], arguments["lmc"], arguments["engine"])
    result = getattr(scenarios, arguments["name"])(scenarios.Session(llm))
    Path(sys.argv[2]).write_bytes(pickle.dumps(result))
