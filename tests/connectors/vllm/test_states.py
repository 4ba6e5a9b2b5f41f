"""Engines whose layers keep a state in place of keys: exact, from the ends of blocks on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.connectors.vllm.engine import run_scenario

LAYERS = ["linear_attention"] * 3 + ["full_attention"]
SIZES: dict[str, Any] = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128,
    "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_num_key_heads": 1,
    "linear_num_value_heads": 2, "max_position_embeddings": 4096, "layer_types": LAYERS * 2,
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Qwen3-Next's shape: of four layers one keeps keys, and the others a state. vLLM's CPU build
    computes them in bfloat16 alone."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    torch.manual_seed(0)
    there = tmp_path_factory.mktemp("qwen3_next")
    made = Qwen3NextForCausalLM(Qwen3NextConfig(**SIZES)).to(torch.bfloat16)
    made.save_pretrained(there)
    return there


def engine(name: str, model: Path, folder: Path, **options: Any) -> Any:
    return run_scenario(
        f"tests.connectors.vllm.stateful:{name}", model, folder, dtype="bfloat16",
        max_model_len=2048, max_num_batched_tokens=512, kv_cache_memory_bytes=64 << 20, **options,
    )  # fmt: skip


def alike(one: Any, other: Any) -> bool:
    """The same answers: of the same rows in the same steps, to the last bit."""
    return one.tokens == other.tokens and np.array_equal(one.logprobs, other.logprobs)


@pytest.mark.engine
def test_a_prompt_goes_on_from_the_last_state_that_is_known(model: Path, tmp_path: Path) -> None:
    # By itself vLLM keeps the state at the end of a prompt alone; here those at the ends of steps.
    got = engine("reuse", model, tmp_path, prefix_cache_retention_interval=160)
    P = got["block"]
    assert P == 160
    end = 740 // P * P
    assert got["first"].kinds == {"new": 740}
    # What is found behind the last state is computed all the same.
    assert got["again"].kinds == {"exact": end, "recomputed": 740 - end}
    for name in ("first", "again"):
        assert alike(got[name], got["plain"]), name
    # The answer's tokens are part of the next prompt, and states at ends of blocks in it are kept.
    turned = 1039 // P * P
    assert turned > end
    assert got["turn"].kinds == {"exact": turned, "recomputed": 1039 - turned, "new": 31}
    assert got["local_turn"].kinds == {"local": turned, "new": 1070 - turned}
    assert alike(got["turn"], got["local_turn"])
    # A decoded token's state is another kernel's than a prompt's: as near as bfloat16 has it.
    assert got["turn"].tokens == got["plain_turn"].tokens
    np.testing.assert_allclose(got["turn"].logprobs, got["plain_turn"].logprobs, atol=0.02)
    # Behind another text there is no state of what follows: nothing of it is moved. And what is the
    # same in front is of use as far as a state is there: none was, at the end of no step.
    assert got["swapped"].kinds == {"recomputed": 300, "new": 440}
    assert alike(got["swapped"], got["plain_swapped"])
    assert "state" in got["swapped"].report["reason"]
    assert got["salted"].kinds == {"new": 740}
    assert got["salted"].tokens == got["plain"].tokens[:12]
    together = got["together"]
    assert together["again"].kinds == got["again"].kinds
    assert together["turn"].kinds == {"exact": turned, "recomputed": 1070 - turned}
    assert together["again"].tokens == got["plain"].tokens
    assert together["turn"].tokens == got["plain_turn"].tokens
    assert got["local"].kinds["local"] == end


@pytest.mark.engine
def test_what_is_lost_is_computed(model: Path, tmp_path: Path) -> None:
    got = engine("lost", model, tmp_path)
    for name in ("state", "rows", "state again", "rows again", "failing", "failing again"):
        assert alike(got[name], got["plain"]), name
    for name in ("state", "rows", "failing"):  # which is not tried again
        assert got[name].kinds == {"recomputed": 740}, name
    assert got["failing again"].kinds == {"exact": 640, "recomputed": 100}


@pytest.mark.engine
def test_states_outlive_the_engine(model: Path, tmp_path: Path) -> None:
    tier = f"disk:{tmp_path / 'tier'},capacity=1GiB"
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
    of = {"lmc": {"tiers": [tier]}, "given": (2,)}
    left = engine("left", model, tmp_path / "first", **of)
    found = engine("found", model, tmp_path / "second", **of)
    for one, other in zip(left, found, strict=True):
        assert one.kinds == {"new": 740}
        assert other.kinds["exact"] == 740 - other.kinds["recomputed"] > 500
        assert other.report["bytes"]["disk"]
        assert alike(one, other)


def test_a_state_is_a_chunk_of_no_tenant() -> None:
    from lmc.connectors.vllm.states import namespace_of

    model = bytes(range(32))  # what all namespaces of its tenants begin with
    tenants = (model, model + b"a", model + b"state")
    names = {namespace_of(tenant, group) for tenant in tenants for group in (0, 1)}
    assert len(names) == 6 and not any(name.startswith(model) for name in names)


def test_what_a_claim_is_brought_into_is_read_before_by_who_still_has_to() -> None:
    # vLLM's step says nothing of a request that is loaded ahead of it, nor of its blocks.
    from types import SimpleNamespace

    from lmc.connectors.vllm.keeping import given_out
    from lmc.connectors.vllm.messages import ChunkLoad, Claim

    none = SimpleNamespace(new_block_ids=[])
    step = SimpleNamespace(scheduled_new_reqs=[], scheduled_cached_reqs=none)
    load = ChunkLoad(1, 0, 32, 0, 32, 0)
    rows = np.empty(0, np.int64)
    claim = Claim("1", 0, 32, rows, [[3, 4]], [load], rows, states=[(load, 7), (load, 8)])
    assert given_out(step, [], [claim]) == {3, 4, 7, 8}


@pytest.mark.parametrize("width", [64, 96, 257])
@pytest.mark.parametrize("groups", [1, 3])
def test_pages_of_states_are_moved_whole(width: int, groups: int) -> None:
    from types import SimpleNamespace

    from lmc.connectors.vllm.groups import States
    from lmc.connectors.vllm.states import Pages

    N, L, page = 5, 2, 4 * (width + 19)
    raw = torch.randint(0, 256, (groups * L, N * page), dtype=torch.uint8)
    layers = {}
    for i, memory in enumerate(raw):
        two = [
            memory.view(torch.float32).view(N, page // 4)[:, start : start + n]
            for n, start in ((width, 0), (11, width))
        ]
        layers[str(i)] = SimpleNamespace(kv_cache=two)
    names = tuple(tuple(str(g * L + i) for i in range(L)) for g in range(groups))
    pages = Pages(States(tuple(range(groups)), names, page), layers, torch.float32)
    size = L * page // 4
    parts = [list(torch.full((size + 9,), torch.nan).split([7, size + 2])) for _ in names]
    before = raw.clone()
    for g in range(groups):
        pages.read(g, g + 1, parts[g])
    assert torch.equal(raw, before)
    raw.random_(0, 256)
    noise = raw.clone()
    for g in range(groups):
        pages.write(g, 4 - g, parts[g])
    for g in range(groups):
        for i in range(g * L, (g + 1) * L):
            was, now = before[i].view(N, page), raw[i].view(N, page)
            assert torch.equal(now[4 - g], was[g + 1])
            others = [n for n in range(N) if n != 4 - g]
            assert torch.equal(now[others], noise[i].view(N, page)[others])
