"""What vLLM holds of a request in its own prefix cache, as far as lmc must know."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from lmc.connectors.vllm.taint import Chain, ChainMap, cached_blocks, exact_hashes
from lmc.connectors.vllm.tracked import Tracked

REMEMBERED = 8  # steps; more than vLLM has under way at once


class LocalCache:
    """vLLM's block pool, read only but for evictions.

    Args:
        block_size: tokens of a block.
        enabled: whether vLLM caches prefixes at all.

    Attributes:
        manager: vLLM's KVCacheManager, once it is known.
        chains: of blended requests, to be found again by a next turn.
    """

    def __init__(self, block_size: int, enabled: bool) -> None:
        self.block_size = block_size
        self.enabled = enabled
        self.manager: Any = None
        self.chains = ChainMap()
        self._maps: deque[tuple[int, Any]] = deque(maxlen=REMEMBERED)  # of cached blocks, by step
        self._seen: Any = None  # the map that `was_reset` last saw
        self._mixed: Any = None  # the map that has blocks of weights that are gone
        self._mixed_loras: dict[int, Any] = {}  # the same of LoRA adapters

    def blocks(self, request_id: str) -> list[int]:
        """Ids of the blocks of a request that has any, in order."""
        blocks: list[int] = self.manager.get_block_ids(request_id)[0]
        return blocks

    def earlier_turn(self, tracked: Tracked, local: int) -> Chain | None:
        """The blended blocks of an earlier turn that vLLM still holds, if they reach further."""
        if not self.enabled:
            return None
        usable = (len(tracked.tokens) - 1) // self.block_size
        exact = tracked.request.block_hashes[:usable]
        chain = self.chains.find(tracked.scope, exact)
        if chain is None:
            return None
        chained = [*exact[: chain.first], *chain.hashes]
        held = len(cached_blocks(self.manager.block_pool, chained))
        if held * self.block_size <= local or held <= chain.first:
            return None
        return replace(chain, hashes=chain.hashes[: held - chain.first])

    def leave_chain(self, tracked: Tracked, computed: int) -> None:
        """A blended request is over: remember its chain, `computed` tokens of it."""
        assert tracked.blended_from is not None
        request = tracked.request
        first = tracked.blended_from // self.block_size
        hashes = list(request.block_hashes[first : computed // self.block_size])
        chain = Chain(tracked.blended_from, first, hashes)
        self.chains.add(tracked.scope, exact_hashes(request), chain)

    def held(self, tracked: Tracked) -> int:
        """Tokens that vLLM holds of the request as it goes by now; never the last one."""
        if not self.enabled:
            return 0
        usable = (tracked.request.num_tokens - 1) // self.block_size
        hashes = tracked.request.block_hashes[:usable]
        return len(cached_blocks(self.manager.block_pool, hashes)) * self.block_size

    def hits_uncomputed(self, tracked: Tracked, local: int, others: Iterable[Tracked]) -> bool:
        """Whether a local block is still being filled by another request of this step.

        vLLM shares a block as soon as it is allocated, since its own forward fills it before
        anybody attends to it. Recomputed rows attend before that forward.
        """
        uncomputed: set[int] = set()
        for other in others:
            request = other.request
            first = request.num_computed_tokens // self.block_size
            blocks = self.manager.get_blocks(request.request_id).blocks[0]
            uncomputed.update(block.block_id for block in blocks[first:])
        if not uncomputed or not local:
            return False
        hashes = tracked.request.block_hashes[: local // self.block_size]
        return not uncomputed.isdisjoint(cached_blocks(self.manager.block_pool, hashes))

    def evict_from(self, tracked: Tracked, block: int) -> None:
        """Have nobody else find the request's blocks from index `block` on."""
        held = cached_blocks(self.manager.block_pool, tracked.request.block_hashes)
        self.manager.evict_blocks(set(held[block:]))

    def was_reset(self) -> bool:
        """Whether vLLM's cache was reset since this was last asked."""
        before, self._seen = self._seen, self.manager.block_pool.cached_block_hash_to_block
        return before is not None and before is not self._seen

    # -- weights that change -----------------------------------------------------------------

    def stepped(self, number: int) -> bool:
        """A step begins; whether vLLM's cache was reset since the last one."""
        now = self.manager.block_pool.cached_block_hash_to_block
        reset = bool(self._maps) and self._maps[-1][1] is not now
        self._maps.append((number, now))
        return reset

    def weights_changed(self, number: int) -> None:
        """Weights changed before step `number`: what is cached is of both, unless it was reset."""
        self.chains = ChainMap()
        maps = dict(self._maps)
        if maps.get(number) is maps.get(number - 1) and number in maps:
            self._mixed = maps[number]

    def adapter_changed(self, lora: int) -> None:
        """An adapter is another one, whose requests vLLM gives what it cached of the one before."""
        now = self.manager.block_pool.cached_block_hash_to_block
        loras = {i: seen for i, seen in self._mixed_loras.items() if seen is now}
        self._mixed_loras = loras | {lora: now}

    def mixed(self, lora: Any) -> bool:
        """Whether what vLLM holds may have been computed with weights that are gone.

        Args:
            lora: a request's LoRA adapter, or None.
        """
        now = self.manager.block_pool.cached_block_hash_to_block
        adapter = None if lora is None else self._mixed_loras.get(lora.lora_int_id)
        return self._mixed is now or adapter is now
