"""Beside vLLM's own NixlConnector, one server to prefill and one to decode."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest

from lmc.experiment.vllm.servers import Server, free_port, running, vllm_serve
from tests.connectors.vllm.server import chat_model

pytestmark = [pytest.mark.engine, pytest.mark.slow, pytest.mark.timeout(1200)]
pytest.importorskip("nixl", reason="the extra [nixl]")

FLAGS = ("--max-model-len", "2048", "--dtype", "float32", "--max-num-seqs", "4", "--enforce-eager")
REMOTE = {
    "do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None,
    "remote_block_ids": None, "remote_host": None, "remote_port": None,
}  # fmt: skip


def documented() -> str:
    """The config of the two connectors, as docs/serve.md has it."""
    page = (Path(__file__).parents[3] / "docs" / "serve.md").read_text()
    (found,) = re.findall(
        r"--kv-transfer-config '(.*?\"MultiConnector\".*?)' \\\n", page, re.DOTALL
    )
    config: dict[str, Any] = json.loads(found)
    lmc = {"memory_bytes": 64 << 20, "min_recovery": None, "context": "any"}
    config["kv_connector_extra_config"]["connectors"][1]["kv_connector_extra_config"]["lmc"] = lmc
    return json.dumps(config)


@pytest.fixture(scope="module")
def servers(
    tiny_llama_dir: Path, smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Server, Server]]:
    """One that prefills, and one that decodes."""
    folder = tmp_path_factory.mktemp("beside")
    model = chat_model(tiny_llama_dir, smollm2_dir, folder / "model")
    with ExitStack() as stack:
        made = []
        for which in ("prefill", "decode"):
            command = [
                *vllm_serve(model), *FLAGS, "--kv-transfer-config", documented(),
                "--worker-cls", "lmc.connectors.vllm.LMCWorker",
            ]  # fmt: skip
            environment = {
                "VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
                "VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port()),
                "VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1", "UCX_NET_DEVICES": "lo",
            }  # fmt: skip
            made.append(stack.enter_context(running(command, folder / which, environment)))
        yield made[0], made[1]


# The first request of two servers waits for NIXL half a minute, and /metrics with it.
TIMEOUT_S = 120.0


def ask(server: Server, prompt: list[int], tokens: int, params: dict[str, Any]) -> dict[str, Any]:
    body = {
        "prompt": prompt, "max_tokens": tokens, "temperature": 0,
        "ignore_eos": True, "kv_transfer_params": params,
    }  # fmt: skip
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=TIMEOUT_S)
    answer.raise_for_status()
    found: dict[str, Any] = answer.json()
    return found


def counted(server: Server, name: str) -> float:
    lines = httpx.get(f"{server.url}/metrics", timeout=TIMEOUT_S).text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


def dropped(server: Server) -> None:
    answer = httpx.post(f"{server.url}/reset_prefix_cache", timeout=TIMEOUT_S)
    answer.raise_for_status()


def test_what_nixl_brings_is_left_alone_and_what_it_takes_is_exact(
    servers: tuple[Server, Server],
) -> None:
    prefill, decode = servers
    rng = random.Random(0)
    first, second, question = ([rng.randrange(10, 500) for _ in range(n)] for n in (300, 300, 40))
    # The workers greet with their first step.
    for server in servers:
        ask(server, question, 1, {"lmc": {"save": False}})
    ask(prefill, [*first, *second], 1, {"lmc": {}})
    for i, order in enumerate(([*first, *second, *question], [*second, *first, *question])):
        dropped(prefill)
        handed = ask(prefill, order, 1, REMOTE | {"lmc": {"blend": "epic"}})["kv_transfer_params"]
        kinds = handed.pop("lmc")["kinds"]
        # Behind the same text it is reused; what would have to be moved is computed.
        assert not {"moved", "recomputed"} & {kind for kind, n in kinds.items() if n}, kinds
        assert (kinds["exact"] > 500) == (i == 0), kinds
        before = counted(decode, "vllm:nixl_bytes_transferred_sum")
        got = ask(decode, order, 8, handed | {"lmc": {}})
        assert got["kv_transfer_params"]["lmc"]["reason"] == "remote_prefill"
        assert counted(decode, "vllm:nixl_bytes_transferred_sum") > before
        plain = ask(decode, order, 8, {"lmc": {"enabled": False}})
        assert got["choices"][0]["text"] == plain["choices"][0]["text"]
    # It stored nothing of what was brought, and of its own it goes on to.
    dropped(decode)
    again = ask(decode, [*first, *second, *question], 1, {"lmc": {}})
    assert again["kv_transfer_params"]["lmc"]["kinds"]["new"] == 640
