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
from hashlib import sha256
from typing import Any

import numpy as np


class TaintedHasher:
    """Stands in for a request's block hasher; blocks with a recipe get a hash of their own.

    Args:
        inner: vLLM's hasher of the request.
        block_size: tokens per block.
        exact: the hashes that the request had of it.

    Attributes:
        tokens: as many of the request's as are known as an array, from the first on.
        recipes: by block index, what its hash is derived from too; what follows the last of them
            is hashed as usual, from a parent that is tainted.
    """

    def __init__(
        self, inner: Callable[[Any], list[bytes]], block_size: int, exact: list[bytes]
    ) -> None:
        self.inner = inner
        self.block_size = block_size
        self.recipes: dict[int, bytes] = {}
        self.tokens = np.empty(0, np.int64)
        self.exact = exact

    def __call__(self, request: Any) -> list[bytes]:
        known = request.block_hashes
        before = len(known)
        # The inner hasher chains from the request's own list, so new hashes go in there while
        # it runs and come out again, because the caller is the one who appends them.
        if self.recipes and before < min(self.recipes):
            known.extend(self.inner(request)[: min(self.recipes) - before])
        known.extend(self._tainted(request))
        if not self.recipes or len(known) > max(self.recipes):
            known.extend(self.inner(request))
        new = known[before:]
        del known[before:]
        return new

    def _tainted(self, request: Any) -> list[bytes]:
        """Hashes of the full blocks that have a recipe, or one behind them."""
        known = request.block_hashes
        first, end = len(known), request.num_tokens // self.block_size
        end = min(end, max(self.recipes, default=-1) + 1)
        if first >= end:
            return []
        P, parent, new = self.block_size, known[-1] if known else b"", []
        tokens = self.tokens[first * P : end * P]
        if end * P > len(self.tokens):
            tokens = np.asarray(request.all_token_ids[first * P : end * P])
        ids, at = tokens.astype("<i4").tobytes(), 0  # vLLM takes no token beyond its vocabulary
        for block in range(first, end):
            said = (b"lmc-taint", parent, ids[at : at + 4 * P], self.recipes.get(block, b""))
            parent = sha256(b"".join(said)).digest()
            new.append(parent)
            at += 4 * P
        return new


def rechain(
    request: Any,
    block_size: int,
    first: int,
    known: list[bytes],
    recipes: dict[int, bytes],
    tokens: np.ndarray | None = None,
) -> None:
    """Give `request` other block hashes from block `first` on.

    They are `known` (a chain left by an earlier turn), then those that `recipes` give, then
    vLLM's own from there. Without both, the rest of the chain is as vLLM would have built it.

    Args:
        tokens: the request's, if there is an array of them.
    """
    hasher = request._block_hasher
    if not isinstance(hasher, TaintedHasher):
        exact = list(request.block_hashes)
        hasher = request._block_hasher = TaintedHasher(hasher, block_size, exact)
    hasher.recipes = recipes
    if tokens is not None:
        hasher.tokens = tokens
    request.block_hashes[first:] = known
    request.update_block_hashes()


def exact_hashes(request: Any) -> list[bytes]:
    """vLLM's own hashes of a request's full blocks, whatever it goes by now."""
    hasher = request._block_hasher
    if not isinstance(hasher, TaintedHasher):
        return list(request.block_hashes)
    request.block_hashes, tainted = hasher.exact, request.block_hashes
    try:
        hasher.exact.extend(hasher.inner(request))
    finally:
        request.block_hashes = tainted
    return list(hasher.exact)


def untaint(request: Any, block_size: int, first: int) -> None:
    """Give a request vLLM's own hashes from block `first` on, if it has others."""
    if isinstance(request._block_hasher, TaintedHasher):
        rechain(request, block_size, first, [], {})


def cached_blocks(block_pool: Any, hashes: list[bytes], group: int = 0) -> list[int]:
    """Ids of the blocks that vLLM holds for the longest known start of `hashes`, in one group."""
    ids = []
    for block_hash in hashes:
        blocks = block_pool.get_cached_block(block_hash, [group])
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
    arrive at the same chain; its tokens say which one to take, by the hashes that vLLM has of
    them. Bounded, oldest out first.
    """

    def __init__(self, limit: int = 1 << 16) -> None:
        self.limit = limit
        # By vLLM's hash, then by scope: most hashes that are looked for are not here at all.
        self._held = 0  # of all scopes
        self._chains: OrderedDict[bytes, tuple[tuple[bytes, Chain, int], ...]] = OrderedDict()

    def add(self, scope: bytes, exact: list[bytes], chain: Chain) -> None:
        """Remember `chain` under every block border behind `chain.first` that it reaches.

        Args:
            exact: vLLM's own hashes of the request's blocks, from the first on.
        """
        for block, digest in enumerate(exact[: chain.first + len(chain.hashes)], 1):
            if block > chain.first:
                known = self._chains.pop(digest, ())
                others = tuple(one for one in known if one[0] != scope)
                self._chains[digest] = (*others, (scope, chain, block))
                self._held += 1 + len(others) - len(known)
        while self._held > self.limit:
            self._held -= len(self._chains.popitem(last=False)[1])

    def find(self, scope: bytes, exact: list[bytes]) -> Chain | None:
        """The chain that covers most of the blocks with these hashes, cut where they end."""
        if self._chains.keys().isdisjoint(exact):
            return None
        for digest in reversed(exact):
            for its, chain, block in self._chains.get(digest, ()):
                if its == scope:
                    return replace(chain, hashes=chain.hashes[: block - chain.first])
        return None
