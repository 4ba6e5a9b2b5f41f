"""A server as users start one: `lmc serve`, in a process of its own, on loopback."""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import openai

START_S = 400.0


@dataclass(frozen=True)
class Server:
    """One that runs, and how to talk to it."""

    url: str
    log: Path
    key: str = "none"

    @property
    def client(self) -> openai.OpenAI:
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=self.key, max_retries=0, timeout=300
        )

    def post(self, path: str) -> int:
        with urllib.request.urlopen(urllib.request.Request(self.url + path, method="POST")) as it:
            return int(it.status)

    @property
    def plain_command(self) -> list[str]:
        """The command of vLLM's own that `lmc serve` printed."""
        lines = self.log.read_text().splitlines()
        return shlex.split(lines[next(i for i, x in enumerate(lines) if "the same" in x) + 1])


def lmc_serve(model: Path, config: Path) -> list[str]:
    start = "from lmc.cli.app import app; app()"
    return [sys.executable, "-c", start, "serve", str(model), "--config", str(config)]


def port() -> int:
    with socket.socket() as it:
        it.bind(("127.0.0.1", 0))
        return int(it.getsockname()[1])


@contextmanager
def running(command: Sequence[str], log: Path, key: str = "none") -> Iterator[Server]:
    """A server that answers; it and all that it started are gone in the end."""
    number = port()
    more = ["--host", "127.0.0.1", "--port", str(number)]
    more += ["--api-key", key] if key != "none" else []
    environment = os.environ | {
        "VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONUNBUFFERED": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
    }  # fmt: skip
    with log.open("w") as out:
        child = subprocess.Popen(
            [*command, *more], stdout=out, stderr=subprocess.STDOUT, env=environment,
            start_new_session=True,
        )  # fmt: skip
    server = Server(f"http://127.0.0.1:{number}", log, key)
    try:
        _wait(server, child)
        yield server
    finally:
        child.terminate()
        try:
            child.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def _wait(server: Server, child: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        if child.poll() is not None:
            break
        try:
            with urllib.request.urlopen(f"{server.url}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"no server:\n{server.log.read_text()[-6000:]}")


def chat_model(tiny: Path, tokenizer: Path, folder: Path) -> Path:
    """A random model of SmolLM2's vocabulary, with its tokenizer and chat template."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(tiny)
    config.vocab_size, config.tie_word_embeddings = 49152, True
    with torch.random.fork_rng():
        torch.manual_seed(1)
        LlamaForCausalLM(config).float().save_pretrained(folder)
    for file in tokenizer.iterdir():
        if "token" in file.name or "vocab" in file.name or "chat" in file.name:
            shutil.copy(file, folder)
    return folder
