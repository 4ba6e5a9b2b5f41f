"""vLLM engines, each in a process of its own, asked one request at a time."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from lmc.experiment.vllm.config import EngineConfig
from lmc.model.cost import PrefillCost
from lmc.model.shape import shape_of
from lmc.results.rows import cpu_name

REQUIRED = {
    # Wall and CPU time are read, and logits recorded, in the process that computes.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # lmc.experiment.vllm.forcing has the interface of the first model runner.
    "VLLM_USE_V2_MODEL_RUNNER": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # One core is otherwise kept free for a front end, which is the same process here.
    "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
}


@dataclass(frozen=True)
class Request:
    """One request.

    lmc: `kv_transfer_params["lmc"]`, or None. forced: tokens to force, `[]` to record greedy
    decoding, None to do neither. reset: empty vLLM's prefix cache first, outside the timing.
    """

    token_ids: list[int]
    salt: str
    max_tokens: int = 1
    lmc: dict[str, Any] | None = None
    forced: list[int] | None = None
    reset: bool = False


@dataclass(frozen=True)
class Answer:
    """What came back.

    wall_s, cpu_s: seconds from the request to the last token (the first, if max_tokens is 1);
    CPU seconds are those of all threads of the engine. cached: prompt tokens that vLLM counts
    as cached. report: lmc's, or None. log_probs: `[max_tokens, V]` float64, or None.
    """

    token_ids: list[int]
    wall_s: float
    cpu_s: float
    cached: int
    report: dict[str, Any] | None
    log_probs: np.ndarray | None


class Engine:
    """A vLLM engine in a spawned process; `lmc`: the connector's settings, None for stock vLLM.

    A context manager: it starts at once, `wait` returns when it serves, and leaving stops it.
    log: the file that its output goes to; what goes wrong there is raised here as RuntimeError.
    """

    def __init__(self, model: str, config: EngineConfig, lmc: dict[str, Any] | None, log: Path):
        self.name = "stock" if lmc is None else "lmc"
        self.device = ""
        self.cost = PrefillCost(1.0, 0.0)
        self._log = log
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, str(log), _llm_arguments(model, config, lmc)), daemon=True
        )
        with _environment(config):
            self._process.start()
        theirs.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def wait(self) -> None:
        """Return when the engine serves; sets `device` and `cost`."""
        self.device, self.cost = self._receive()

    def ask(self, request: Request) -> Answer:
        """Send one request and wait for its answer."""
        self._send(request)
        answer: Answer = self._receive()
        return answer

    def drain(self) -> None:
        """Return when lmc has stored all that it was given."""
        self._send("drain")
        self._receive()

    def stop(self) -> None:
        """End the process; one that does not end by itself is killed."""
        self._pipe.close()
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def _send(self, message: Any) -> None:
        try:
            self._pipe.send(message)
        except OSError as error:
            raise self._failed("ended") from error

    def _receive(self) -> Any:
        try:
            kind, value = self._pipe.recv()
        except (EOFError, OSError) as error:
            self._process.join(10)
            raise self._failed(f"ended with exit code {self._process.exitcode}") from error
        if kind == "error":
            raise self._failed(f"failed:\n{value}")
        return value

    def _failed(self, what: str) -> RuntimeError:
        last = "".join(self._log.read_text(errors="replace").splitlines(keepends=True)[-20:])
        return RuntimeError(f"the {self.name} engine {what}\nend of {self._log}:\n{last}")


def _llm_arguments(model: str, config: EngineConfig, lmc: dict[str, Any] | None) -> dict[str, Any]:
    arguments = config.model_dump(exclude={"threads", "preload", "environment"})
    arguments |= {"model": model, "logits_processors": ["lmc.experiment.vllm.forcing:Forcing"]}
    if lmc is not None:
        arguments["worker_cls"] = "lmc.connectors.vllm.LMCWorker"
        arguments["kv_transfer_config"] = {
            "kv_connector": "LMCConnector",
            "kv_connector_module_path": "lmc.connectors.vllm",
            "kv_role": "kv_both",
            "kv_load_failure_policy": "recompute",
            "kv_connector_extra_config": {"lmc": lmc},
        }
    return arguments


@contextmanager
def _environment(config: EngineConfig) -> Iterator[None]:
    """The engine's environment, for as long as its process starts: LD_PRELOAD is read once."""
    environment = {**REQUIRED, "OMP_NUM_THREADS": str(config.threads), **config.environment}
    if config.preload is not None:
        library = Path(sys.prefix, "lib", config.preload)
        if library.exists():
            environment["LD_PRELOAD"] = str(library)
    before = os.environ.copy()
    os.environ.update(environment)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _serve(pipe: Connection, log: str, arguments: dict[str, Any]) -> None:
    """The process: start, then answer until the other end closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    try:
        llm, device, cost = _start(arguments)
    except BaseException:
        pipe.send(("error", traceback.format_exc()))
        return
    pipe.send(("ok", (device, cost)))
    while True:
        try:
            message = pipe.recv()
        except EOFError:
            return
        try:
            if message == "drain":
                _drain(llm)
            pipe.send(("ok", None if message == "drain" else _answer(llm, message)))
        except Exception:
            pipe.send(("error", traceback.format_exc()))


def _start(arguments: dict[str, Any]) -> tuple[Any, str, PrefillCost]:
    import torch
    from vllm import LLM
    from vllm.config import KVTransferConfig

    if "kv_transfer_config" in arguments:
        arguments["kv_transfer_config"] = KVTransferConfig(**arguments["kv_transfer_config"])
    llm = LLM(**arguments)
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"{cpu_name()}, {torch.get_num_threads()} threads"
    return llm, device, shape_of(llm.llm_engine.model_config.hf_config).cost


def _answer(llm: Any, request: Request) -> Answer:
    from vllm import SamplingParams

    from lmc.experiment.vllm.forcing import STEPS

    extra: dict[str, Any] = {}
    if request.lmc is not None:
        extra["kv_transfer_params"] = {"lmc": request.lmc}
    if request.forced is not None:
        extra["forced"] = request.forced
    sampling = SamplingParams(
        temperature=0,
        max_tokens=request.max_tokens,
        ignore_eos=True,  # as many tokens as asked for, so that positions can be compared
        detokenize=False,
        extra_args=extra or None,
    )
    prompt = {"prompt_token_ids": request.token_ids, "cache_salt": request.salt}
    if request.reset:
        llm.reset_prefix_cache()
    STEPS.clear()
    cpu, wall = time.process_time(), time.perf_counter()
    output = llm.generate([prompt], sampling, use_tqdm=False)[0]
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Answer(
        token_ids=list(output.outputs[0].token_ids),
        wall_s=wall,
        cpu_s=cpu,
        cached=output.num_cached_tokens or 0,
        report=(output.kv_transfer_params or {}).get("lmc"),
        log_probs=np.stack([step.numpy() for step in STEPS.values()]) if STEPS else None,
    )


def _drain(llm: Any) -> None:
    from lmc.connectors.vllm import drain

    drain(llm)
