"""Runs one scenario in a vLLM engine of its own, in a process of its own.

vLLM keeps one worker connector per process, so engines with different settings cannot follow one
another inside pytest. A scenario is a function of `scenarios.py`; what it returns comes back
pickled, and the test asserts on it. Processes are forks of one that has imported what every engine
imports, which takes longer than to start an engine on a small model.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import pickle
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import psutil

BLOCK = 32
# What every engine imports at its start anyway; none of it starts a thread.
PRELOADED = [
    "vllm.entrypoints.llm",
    "vllm.v1.engine.core",
    "vllm.v1.worker.cpu_worker",
    "vllm.model_executor.models.llama",
    "lmc.connectors.vllm.worker",
]
# Nothing is refused for its quality, nobody is mistrusted, no tier is too slow on a machine that is
# busy, claims of any size go together, and two strategies are of the tests.
OPEN: dict[str, Any] = {
    "memory_bytes": 64 << 20,
    "min_recovery": None,
    "fetch_patience_s": 60.0,
    "context": "any",
    "controls": True,
    "rows_per_step": 1 << 20,
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
    file = name.replace(":", ".")
    received, log = tmp_path / f"{file}-result", tmp_path / f"{file}-log"
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": str(int(separate_worker))}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    if engine.get("tensor_parallel_size", 1) > 1:
        environment["VLLM_CPU_OMP_THREADS_BIND"] = "0|1"  # else it wants a NUMA node a rank
    # Triton reads its variable when it is imported.
    processes = multiprocessing.get_context("spawn" if interpret else "forkserver")
    processes.set_forkserver_preload(PRELOADED)
    arguments = (name, model, lmc or {}, engine, given, environment, received, log)
    child = processes.Process(target=_run, args=arguments)
    child.start()
    try:
        child.join(800 if interpret else timeout)
    finally:
        if child.is_alive():
            # What it started goes first: engines and workers of their own would run on.
            with suppress(psutil.NoSuchProcess):
                for process in psutil.Process(child.pid).children(recursive=True):
                    process.kill()
            child.kill()
        child.join()
    if child.exitcode:
        raise AssertionError(f"scenario {name}: {child.exitcode}\n{log.read_text()[-12000:]}")
    return pickle.loads(received.read_bytes())


def _run(
    name: str, model: Path, lmc: dict[str, Any], engine: dict[str, Any], given: tuple[Any, ...],
    environment: dict[str, str], received: Path, log: Path,
) -> None:  # fmt: skip
    """In the child: one scenario, what it says into `log`."""
    with log.open("wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    from tests.connectors.vllm import scenarios

    module, _, function = name.rpartition(":")
    scenario = getattr(import_module(module) if module else scenarios, function)
    try:
        result = scenario(scenarios.Session(engine_of(str(model), lmc, engine)), *given)
        received.write_bytes(pickle.dumps(result))
    finally:
        # multiprocessing leaves out what Python does at its end, as closing stores and engines.
        atexit._run_exitfuncs()


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
