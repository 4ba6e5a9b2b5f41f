"""The block-hash chain of a blended request, on vLLM's own Request and hasher."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
from vllm import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.request import Request

from lmc.connectors.vllm.taint import Chain, ChainMap, exact_hashes, rechain

BLOCK = 16
init_none_hash(sha256)


def request_of(T: int, seed: int = 0) -> Request:
    tokens = np.random.default_rng(seed).integers(0, 100, T).tolist()
    return Request(
        request_id="r",
        prompt_token_ids=tokens,
        sampling_params=SamplingParams(max_tokens=64),
        pooling_params=None,
        block_hasher=get_request_block_hasher(BLOCK, sha256),
    )


def hashes_of(tokens: np.ndarray) -> list[Any]:
    request = Request("r", tokens.tolist(), SamplingParams(max_tokens=64), None,
                      block_hasher=get_request_block_hasher(BLOCK, sha256))  # fmt: skip
    return list(request.block_hashes)


def test_internals_have_the_shape_that_the_taint_relies_on() -> None:
    request = request_of(100)
    assert isinstance(request.block_hashes, list)
    assert len(request.block_hashes) == 100 // BLOCK
    assert callable(request._block_hasher)
    assert list(inspect.signature(request._block_hasher).parameters) == ["request"]
    source = inspect.getsource(Request.update_block_hashes)
    assert "self.block_hashes.extend(self._block_hasher(self))" in source
    assert "self.update_block_hashes()" in inspect.getsource(Request.append_output_token_ids)
    assert list(inspect.signature(BlockPool.get_cached_block).parameters) == [
        "self", "block_hash", "kv_cache_group_ids",
    ]  # fmt: skip
    for name in ("get_block_ids", "get_blocks", "evict_blocks"):
        assert hasattr(KVCacheManager, name)


def decoded(request: Request, n: int) -> Request:
    for token in range(n):
        request.append_output_token_ids(token)
    return request


@pytest.mark.parametrize("first", [0, 2, 6])
def test_no_hash_from_the_first_recipe_on_is_an_exact_one(first: int) -> None:
    exact = decoded(request_of(100), 60).block_hashes
    request = request_of(100)
    rechain(request, BLOCK, first, [], {first: b"recipe"})
    decoded(request, 60)
    assert len(request.block_hashes) == len(exact) == 10
    assert request.block_hashes[:first] == exact[:first]
    assert not set(request.block_hashes[first:]) & set(exact)


def test_moved_content_in_the_last_partial_block_is_tainted_when_decode_fills_it() -> None:
    exact = decoded(request_of(100), 20).block_hashes
    request = request_of(100)
    rechain(request, BLOCK, 6, [], {6: b"recipe"})  # tokens 96..99 are moved
    assert len(request.block_hashes) == 6
    decoded(request, 20)
    assert request.block_hashes[6] != exact[6]


def test_equal_recipes_give_equal_chains_and_others_do_not() -> None:
    def chain(recipes: dict[int, bytes]) -> list[Any]:
        request = request_of(100)
        rechain(request, BLOCK, min(recipes), [], recipes)
        return list(request.block_hashes)

    assert chain({2: b"a", 3: b"b"}) == chain({2: b"a", 3: b"b"})
    other = chain({2: b"a", 3: b"c"})
    assert other[:3] == chain({2: b"a", 3: b"b"})[:3]
    assert other[3:] != chain({2: b"a", 3: b"b"})[3:]
    gap = chain({1: b"a", 4: b"b"})  # blocks 2 and 3 hold new tokens behind a moved one
    assert len(gap) == len(set(gap)) == 6


def test_without_recipes_the_exact_chain_is_back() -> None:
    request = request_of(100)
    exact = list(request.block_hashes)
    rechain(request, BLOCK, 2, [], {2: b"a"})
    rechain(request, BLOCK, 2, [], {})
    assert decoded(request, 20).block_hashes == decoded(request_of(100), 20).block_hashes
    assert request.block_hashes[:6] == exact


def test_next_turn_finds_the_chain_by_its_tokens() -> None:
    first_turn = request_of(100)
    rechain(first_turn, BLOCK, 2, [], {2: b"a", 3: b"b"})
    decoded(first_turn, 60)
    tokens = np.asarray(first_turn.all_token_ids)
    blended = list(first_turn.block_hashes)
    exact = exact_hashes(first_turn)
    assert exact == decoded(request_of(100), 60).block_hashes
    assert first_turn.block_hashes == blended  # it is looked at, not changed
    chains = ChainMap()
    chains.add(b"tenant", exact, Chain(35, 2, blended[2:9]))

    turn = hashes_of(np.concatenate([tokens[:150], np.arange(50)]))
    assert chains.find(b"tenant", turn) == Chain(35, 2, blended[2:9])
    parted = hashes_of(np.concatenate([tokens[:70], np.arange(90)]))
    assert chains.find(b"tenant", parted) == Chain(35, 2, blended[2:4])
    assert chains.find(b"tenant", hashes_of(tokens[:40])) is None
    assert chains.find(b"other tenant", turn) is None


def test_chain_map_is_bounded() -> None:
    chains = ChainMap(limit=5)
    for seed in range(4):
        hashes = list(request_of(100, seed).block_hashes)
        chains.add(b"", hashes, Chain(35, 2, [bytes([i]) for i in range(4)]))
    assert len(chains._chains) == 5
    for strategy in range(20):  # of one prompt too
        chains.add(b"%d" % strategy, list(request_of(100, 3).block_hashes), Chain(35, 2, [b""] * 4))
    assert sum(len(scopes) for scopes in chains._chains.values()) <= 5
    chains.add(b"", list(request_of(100, 3).block_hashes), Chain(35, 2, [b""] * 4))
    assert chains.find(b"", request_of(100, 3).block_hashes) is not None
    assert chains.find(b"", request_of(100, 0).block_hashes) is None
