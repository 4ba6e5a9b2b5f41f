"""Fixtures shared by all tests: two models on disk, and an environment without a network."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

REPO = Path(__file__).parents[1]

# Before transformers or vLLM are imported: they read these once.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_DATASETS_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    VLLM_NO_USAGE_STATS="1",
    VLLM_LOGGING_LEVEL="WARNING",
)

if worker := os.environ.get("PYTEST_XDIST_WORKER"):
    # A core for each process, and for the engines that it starts: threads that wait for their turn
    # while they spin make everything several times slower.
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = str(int(worker[2:]) % (os.cpu_count() or 1))

# A busy machine is no failure.
settings.register_profile("lmc", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("lmc")


@pytest.hookimpl(tryfirst=True)  # before pytest-xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes seconds first, then engines; a file in one process, unless its tests stand alone.

    What is short and heavy comes last: it fills the time in which one process is done already.
    """

    def place(item: pytest.Item) -> int:
        engine, *others = map(item.get_closest_marker, ("engine", "heavy", "slow"))
        return 1 if engine else 2 if any(others) else 0

    items.sort(key=place)
    for item in items:
        alone = item.get_closest_marker("alone") is not None
        file = str(item.path.relative_to(REPO))
        item.add_marker(pytest.mark.xdist_group(item.nodeid if alone else file))


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama: L=3, H=4, G=2, D=32, 512 ids, 2048 positions, float32, no tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=512,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).float()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() == 2:
                # As initialised, attention is nearly uniform and wrong KV hardly shows.
                weight.mul_(3.0)
    folder = tmp_path_factory.mktemp("tiny_llama")
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """SmolLM2-135M-Instruct in float32 with its tokenizer, from the user's cache."""
    pytest.importorskip("torch", reason="the model is exported by torch")
    from lmc.model import exports

    return exports.export("smollm2")


@pytest.fixture
def demo() -> Path:
    """The demo experiment."""
    return REPO / "experiments" / "demo.yaml"


@pytest.fixture
def make_row() -> Callable[..., dict[str, Any]]:
    """Builds a row of which only the given fields matter."""

    def make(arm: str, prompt_id: int = 0, repetition: int = 0, **fields: Any) -> dict[str, Any]:
        arms = {"full_prefill": {"cache": "none"}, "full_reuse": {"blend": {}}}
        arms |= {"prefix_equal_rows": {"cache": "warmed"}, "epic16": {"blend": {}}}
        row = {
            "arm": arm,
            "prompt_id": prompt_id,
            "repetition": repetition,
            "config": {"arms": arms},
            "ttft_s": 1.0,
            "cpu_s": 1.0,
            "prompt_tokens": 100,
            "kinds": {"local": 0, "exact": 0, "moved": 60, "recomputed": 10, "new": 30},
            "compute_fraction": 0.4,
            "flops_fraction": 0.5,
            "reason": None,
        }
        from lmc.quality.metrics import AnswerQuality

        row |= dict.fromkeys(AnswerQuality.__dataclass_fields__)
        return row | fields

    return make
