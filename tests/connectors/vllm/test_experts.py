"""Where a forward of lmc's own would wait for other data-parallel ranks there is none."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from vllm.config import ParallelConfig

from lmc.connectors.vllm.identity import alone_refusal
from tests.connectors.vllm.engine import run_scenario
from tests.connectors.vllm.test_engine import same


def refusal(**parallel: Any) -> str | None:
    return alone_refusal(SimpleNamespace(parallel_config=ParallelConfig(**parallel)))


@pytest.mark.parametrize("experts", [True, None])
def test_experts_on_several_data_parallel_ranks_wait_for_each_other(experts: bool | None) -> None:
    parallel: dict[str, Any] = {"is_moe_model": experts, "data_parallel_size": 2}
    parallel |= {"distributed_executor_backend": "mp"}
    assert "data parallelism with experts" in str(refusal(**parallel))
    by_expert = parallel | {"enable_expert_parallel": True, "tensor_parallel_size": 2}
    assert "data parallelism with experts" in str(refusal(**by_expert))


def test_others_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    mp: dict[str, Any] = {"distributed_executor_backend": "mp"}
    assert refusal(is_moe_model=False, data_parallel_size=2, **mp) is None
    assert refusal(is_moe_model=True) is None
    tensor = {"tensor_parallel_size": 2, "enable_expert_parallel": True}
    assert refusal(is_moe_model=True, **tensor, **mp) is None


@pytest.fixture(scope="module")
def tiny_mixtral_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the tiny Llama, with four experts a layer of which two are asked."""
    import torch
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=512,
        max_position_embeddings=2048,
        num_local_experts=4,
        num_experts_per_tok=2,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = MixtralForCausalLM(config).float()
    folder = tmp_path_factory.mktemp("tiny_mixtral")
    model.save_pretrained(folder)
    return folder


@pytest.mark.engine
def test_exact_reuse_goes_on_and_no_forward_of_ours_is_begun(
    tiny_mixtral_dir: Path, tmp_path: Path
) -> None:
    scenario = "tests.connectors.vllm.experts:beside_others"
    result = run_scenario(scenario, tiny_mixtral_dir, tmp_path)
    assert result["alone"].report["kinds"]["moved"] > 0
    moving, reading, computes = result["refusal"]
    assert "data parallelism with experts" in moving
    assert (reading, computes, result["forwards"]) == (None, False, 0)
    for name in ("beside", "lost"):
        same(result[name], result["plain"])
    assert result["beside"].kinds == {"exact": 110, "new": 90}
    assert result["lost"].kinds == {"recomputed": 110, "new": 90}
    assert "blending_refused:data parallelism" in result["beside"].report["reason"]
    assert (result["stored"].kinds, result["pending"]) == ({"exact": 40, "new": 180}, 0)
