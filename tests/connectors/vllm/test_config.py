from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from lmc.blend.baselines import FullReuse
from lmc.blend.epic import Epic
from lmc.blend.query import Query
from lmc.connectors.vllm import kv_transfer_params
from lmc.connectors.vllm.config import (
    LMCConfig,
    check_layers,
    check_memory,
    load_config,
    parse_request,
)


@dataclass(frozen=True)
class Dense(FullReuse):
    """A strategy that asks for what pages do not give."""

    dense: ClassVar[bool] = True


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
        ({"memory": 1}, "memory.*valid keys: memory_bytes, policy, .*chunker, blend"),
        ({"memory_bytes": 0}, "memory_bytes.*greater than 0.*got 0"),
        ({"blend": "cachblend"}, "'cachblend'.*epic"),
        ({"blend": {"name": "epic", "ratio": 1}}, "ratio.*link_tokens"),
        ({"chunker": "rabin"}, "'rabin'.*cdc"),
        ({"policy": "mru"}, "'mru'.*lru.*sieve"),
        ({"policy": {"name": "ttl", "minutes": 3}}, "minutes.*seconds"),
        ({"policy": "belady"}, "accesses to come"),
        ({"blend": {"name": "cacheblend", "causal": "bottom_right"}}, "ablation.*Hugging Face"),
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


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"chunk": []}, "chunk; valid: blend, chunks, enabled, save"),
        ({"chunks": [[0, 5], [4, 8]]}, r"\(4, 8\), want 5 <= start"),
        ({"chunks": [[0, 11]]}, r"\(0, 11\).*<= 10"),
        ({"chunks": [[3, 3]]}, r"\(3, 3\)"),
        ({"chunks": [[0.5, 3]]}, "two integers"),
        ({"chunks": "0-5"}, "list of spans, got '0-5'"),
        ({"blend": "nope"}, "'nope'"),
        ({"blend": {"ratio": 0.1}}, "blend strategy"),
        (
            {"blend": {"name": "tests.connectors.vllm.test_config:Dense"}},
            "paged engine.*Hugging Face",
        ),
        ({"blend": {"name": "cacheblend", "causal": "bottom_right"}}, "ablation.*Hugging Face"),
        ({"save": "no"}, "save must be true or false, got 'no'"),
        ([1], "must be an object, got list"),
    ],
)
def test_bad_request_is_named(raw: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_request(raw, 10, LMCConfig())


def test_client_helper_raises_before_anything_is_sent() -> None:
    sent = kv_transfer_params(10, chunks=[(0, 4), (4, 9)], blend={"name": "epic"}, save=False)
    assert sent == {
        "lmc": {
            "chunks": [[0, 4], [4, 9]],
            "blend": {"name": "epic"},
            "save": False,
            "enabled": True,
        }
    }
    with pytest.raises(ValueError, match=r"\(4, 11\)"):
        kv_transfer_params(10, chunks=[(4, 11)])
