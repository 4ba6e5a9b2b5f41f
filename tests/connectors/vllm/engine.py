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
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[3]
BLOCK = 32
# Nothing is refused for its quality, nobody is mistrusted, and two strategies are of the tests.
OPEN: dict[str, Any] = {
    "memory_bytes": 64 << 20,
    "min_recovery": None,
    "context": "any",
    "controls": True,
    "blends": {
        "all_by_deviation": {
            "name": "tests.connectors.vllm.selective:CheckedCacheBlend",
            "ratio": 1.0,
            "tensor": "both",
        },
        "failing": {"name": "tests.connectors.vllm.selective:Failing", "ratio": 0.2},
        "all_by_query": {"name": "tests.connectors.vllm.selective:CheckedQuery", "ratio": 1.0},
    },
}


def run_scenario(
    name: str,
    model: Path,
    tmp_path: Path,
    *,
    separate_worker: bool = False,
    interpret: bool = False,
    lmc: dict[str, Any] | None = None,
    given: tuple[Any, ...] = (),
    timeout: float = 280,
    **engine: Any,
) -> Any:
    """What scenario `name` returns for an LMC engine on `model`; the child's output if it fails.

    Args:
        name: of a function of `scenarios.py`, or `module:function`.
        given: what it takes beside the session.
    """
    arguments = {"name": name, "model": str(model), "lmc": lmc or {}, "engine": engine}
    arguments["given"] = given
    file = name.replace(":", ".")
    sent, received = tmp_path / f"{file}-arguments", tmp_path / f"{file}-result"
    sent.write_bytes(pickle.dumps(arguments))
    environment = os.environ | {"VLLM_ENABLE_V1_MULTIPROCESSING": str(int(separate_worker))}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    if engine.get("tensor_parallel_size", 1) > 1:
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"  # else it wants a NUMA node a rank
    child = subprocess.run(
        [sys.executable, __file__, str(sent), str(received)],
        env=environment, capture_output=True, text=True, check=False,
        timeout=800 if interpret else timeout,
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
            kv_connector_extra_config={"lmc": OPEN | lmc},
        ),
    }
    return LLM(model=model, **settings | engine)


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    from tests.connectors.vllm import scenarios

    arguments = pickle.loads(Path(sys.argv[1]).read_bytes())
    llm = engine_of(arguments["model"], arguments["lmc"], arguments["engine"])
    module, _, function = arguments["name"].rpartition(":")
    scenario = getattr(import_module(module) if module else scenarios, function)
    result = scenario(scenarios.Session(llm), *arguments.get("given", ()))
    Path(sys.argv[2]).write_bytes(pickle.dumps(result))
