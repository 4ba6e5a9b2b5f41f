from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lmc.blend.epic import Epic
from lmc.blend.query import Query
from lmc.connectors.vllm.config import (
    LMCConfig,
    check_layers,
    check_memory,
    load_config,
)
from lmc.connectors.vllm.request import parse_request


def test_defaults_and_yaml_file(tmp_path: Path) -> None:
    assert load_config({}) == LMCConfig()
    file = tmp_path / "lmc.yaml"
    file.write_text("memory_bytes: 1000\nblend: {name: epic, link_tokens: 8}\n")
    config = load_config({"lmc": str(file)})
    assert config.memory_bytes == 1000
    assert parse_request(None, 10, config).strategy == Epic(8)


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"memory": 1}, "memory.*valid keys: memory_bytes, policy, .*chunker, context"),
        ({"memory_bytes": 0}, "memory_bytes.*greater than 0.*got 0"),
        ({"blend": "cachblend"}, "'cachblend'.*epic"),
        ({"blend": {"name": "epic", "ratio": 1}}, "ratio.*link_tokens"),
        ({"chunker": "rabin"}, "'rabin'.*cdc"),
        ({"policy": "mru"}, "'mru'.*lru.*sieve"),
        ({"policy": {"name": "ttl", "minutes": 3}}, "minutes.*seconds"),
        ({"policy": "belady"}, "accesses to come"),
        ({"blend": {"name": "cacheblend", "causal": "bottom_right"}}, "ablation.*Hugging Face"),
        ({"blends": {"epic": "epic:4"}}, "blends.epic.*own name"),
        ({"blends": {"mine": "epic:link_tokens=-1"}}, "link_tokens must be at least 0"),
        ({"context": "alone"}, "context.*'any', 'shared_prefix' or 'isolated'"),
        ({"limits": {"spans": 0}}, "limits.spans.*greater than or equal to 1"),
        ({"limits": {"span": 1}}, "limits.span: Extra"),
        ("/does/not/exist.yaml", "exist.yaml.*cannot be read"),
    ],
)
def test_wrong_settings_are_named(raw: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config({"lmc": raw})


def test_layers_that_the_model_lacks_are_refused() -> None:
    check_layers(Query(layers=[2]), 3)
    with pytest.raises(ValueError, match=r"\[3\], want layers of 0 to 2"):
        check_layers(Query(layers=[3]), 3)


def test_memory_for_less_than_one_chunk_is_refused() -> None:
    check_memory(256 * 100, 100, 256)
    with pytest.raises(ValueError, match=r"25599.*one chunk of 256 tokens.*at least 25600"):
        check_memory(25_599, 100, 256)
