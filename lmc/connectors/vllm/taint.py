"""Block hashes of blended requests: never those of the exact prefix with the same tokens.

vLLM finds cached blocks by a hash chain over token ids. Blended blocks hold KV that full prefill
would not have given, so from the first moved token's block on a request's chain is derived from
the recipe of its blend too. Everything that follows, decoded blocks included, inherits it.

This touches internals of vLLM that are no API: `Request._block_hasher`, `Request.block_hashes`
and `BlockPool.get_cached_block`. tests/connectors/vllm/test_taint.py fails when they change shape.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from blake3 import blake3


class TaintedHasher:
    """Stands in for a request's block hasher; blocks with a recipe get a hash of their own.

    Args:
        inner: vLLM's hasher of the request.
        block_size: tokens per block.

    Attributes:
        recipes: digest by block index; what follows the last of them is hashed as usual, from
            a parent that is tainted.
    """

    def __init__(self, inner: Callable[[Any], list[bytes]], block_size: int) -> None:
        self.inner = inner
        self.block_size = block_size
        self.recipes: dict[int, bytes] = {}

    def __call__(self, request: Any) -> list[bytes]:
        known = request.block_hashes
        before = len(known)
        # The inner hasher chains from the request's own list, so new hashes go in there while
        # it runs and come out again, because the caller is the one who appends them.
        while (len(known) + 1) * self.block_size <= request.num_tokens:
            block = len(known)
            if recipe := self.recipes.get(block):
                start, end = block * self.block_size, (block + 1) * self.block_size
                ids = np.asarray(request.all_token_ids[start:end], "<i8").tobytes()
                parent = known[-1] if known else b""
                known.append(blake3(b"lmc-taint" + parent + ids + recipe).digest())
            else:
                until = min((b for b in self.recipes if b > block), default=None)
                known.extend(self.inner(request)[: until and until - block])
        new = known[before:]
        del known[before:]
        return new


def rechain(
    request: Any, block_size: int, first: int, known: list[bytes], recipes: dict[int, bytes]
) -> None:
    """Give `request` other block hashes from block `first` on.

    They are `known` (a chain left by an earlier turn), then those that `recipes` give, then
    vLLM's own from there. Without both, the rest of the chain is as vLLM would have built it.
    """
    hasher = request._block_hasher
    if not isinstance(hasher, TaintedHasher):
        hasher = request._block_hasher = TaintedHasher(hasher, block_size)
    hasher.recipes = recipes
    request.block_hashes[first:] = known
    request.update_block_hashes()


def untaint(request: Any, block_size: int, first: int) -> None:
    """Give a request vLLM's own hashes from block `first` on, if it has others."""
    if isinstance(request._block_hasher, TaintedHasher):
        rechain(request, block_size, first, [], {})


def cached_blocks(block_pool: Any, hashes: list[bytes]) -> list[int]:
    """Ids of the blocks that vLLM holds for the longest known start of `hashes`."""
    ids = []
    for block_hash in hashes:
        blocks = block_pool.get_cached_block(block_hash, [0])
        if not blocks:
            break
        ids.append(blocks[0].block_id)
    return ids


@dataclass(frozen=True)
class Chain:
    """A tainted chain that a finished request left.

    Attributes:
        blended_from: the first token that is not exact.
        first: its block.
        hashes: of the blocks from `first` on.
    """

    blended_from: int
    first: int
    hashes: list[bytes]


class ChainMap:
    """Finds the blended blocks of an earlier turn by the tokens they stand for.

    The next turn of a conversation plans anew, perhaps from other variants, and would not
    arrive at the same chain; its tokens say which one to take. Bounded, oldest out first.
    """

    def __init__(self, limit: int = 1 << 16) -> None:
        self.limit = limit
        self._chains: OrderedDict[bytes, tuple[Chain, int]] = OrderedDict()

    def add(self, scope: bytes, tokens: np.ndarray, block_size: int, chain: Chain) -> None:
        """Remember `chain` under every block border of `tokens` that it reaches."""
        last = chain.first + len(chain.hashes)
        for block, digest in self._borders(scope, tokens, block_size, last):
            if block > chain.first:
                self._chains[digest] = (chain, block)
                self._chains.move_to_end(digest)
        while len(self._chains) > self.limit:
            self._chains.popitem(last=False)

    def find(self, scope: bytes, tokens: np.ndarray, block_size: int) -> Chain | None:
        """The chain that covers most blocks of `tokens`, cut where their tokens part."""
        for block, digest in reversed(
            self._borders(scope, tokens, block_size, len(tokens) // block_size)
        ):
            if found := self._chains.get(digest):
                chain, _ = found
                return replace(chain, hashes=chain.hashes[: block - chain.first])
        return None

    @staticmethod
    def _borders(
        scope: bytes, tokens: np.ndarray, block_size: int, last: int
    ) -> list[tuple[int, bytes]]:
        hasher, borders = blake3(scope), []
        ids = np.ascontiguousarray(tokens, "<i8")
        for block in range(1, last + 1):
            hasher.update(ids[(block - 1) * block_size : block * block_size].tobytes())
            borders.append((block, hasher.digest()))
        return borders
