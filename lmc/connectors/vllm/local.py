"""What vLLM holds of a request in its own prefix cache, as far as lmc must know."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from lmc.connectors.vllm.groups import Groups
from lmc.connectors.vllm.taint import Chain, ChainMap, cached_blocks, exact_hashes
from lmc.connectors.vllm.tracked import Tracked

REMEMBERED = 8  # steps; more than vLLM has under way at once


class LocalCache:
    """vLLM's block pool, read only but for evictions.

    Args:
        groups: of its KV cache.
        enabled: whether vLLM caches prefixes at all.
        rows: tokens that a step carries at most.

    Attributes:
        manager: vLLM's KVCacheManager, once it is known.
        chains: of blended requests, to be found again by a next turn.
    """

    def __init__(self, groups: Groups, enabled: bool, rows: int) -> None:
        self.groups, self.block_size, self._rows = groups, groups.block_size, rows
        self.enabled = enabled
        self.manager: Any = None
        self.chains = ChainMap()
        self._maps: deque[tuple[int, Any]] = deque(maxlen=REMEMBERED)  # of cached blocks, by step
        self._seen: Any = None  # the map that `was_reset` last saw
        self._mixed: Any = None  # the map that has blocks of weights that are gone
        self._mixed_loras: dict[int, Any] = {}  # the same of LoRA adapters
        self._pinned: list[Any] = []  # blocks that nobody is given in this step

    def blocks(self, request_id: str) -> list[list[int]]:
        """Ids of the blocks of a request that has any, in order, by KV cache group of layers with
        keys; 0: none."""
        return self.groups.those(self.manager.get_block_ids(request_id))

    def pin(self, tracked: Tracked, local: int) -> bool:
        """Keep the windows in front of a claim from `local` on until the step is made up.

        vLLM needs none of them behind a claim, but rows that are computed in it do. False where
        vLLM does not hold them, or has not the room to keep them beside what the request takes.
        """
        tracked.front = []
        if not self.groups.longest or not local:
            return True
        hashes, P = tracked.request.block_hashes[: local // self.block_size], self.block_size
        blocks, n, _ = self.manager.coordinator.find_longest_cache_hit(hashes, local)
        if n != local:
            return False
        windows = [self.groups.window(group) for group in range(len(blocks))]
        pool, T, takes = self.manager.block_pool, tracked.request.num_tokens, 0
        front: list[list[Any]] = []
        for window, of_group in zip(windows, blocks, strict=True):
            seen = of_group[max(0, local - window + 1) // P :] if window else []
            front.append([block for block in seen if not block.is_null])
            # Those that nobody uses are taken too, out of what is free.
            used = sum(block.ref_cnt > 0 for block in of_group)
            takes += -(-min(T, window + self._rows) // P) if window else -(-T // P) - used
        pinned = [block for of in front for block in of]
        idle = sum(block.ref_cnt == 0 for block in pinned)
        if takes > pool.get_num_free_blocks() - idle:
            return False
        pool.touch(pinned)
        self._pinned += pinned
        tracked.front = [[block.block_id for block in of] for of in front]
        return True

    def needs(self, tracked: Tracked, computed: int) -> int:
        """Blocks that a request takes at most for the rest of its tokens, behind those computed."""
        rest, P = max(0, tracked.request.num_tokens - computed), self.block_size
        windows = map(self.groups.window, range(len(self.groups.specs)))
        return sum(1 - (-(min(rest, self._rows) if window else rest) // P) for window in windows)

    def unpin(self) -> None:
        """The workers are told what to do in this step, in front of all that comes later."""
        pinned, self._pinned = self._pinned, []
        if pinned:
            self.manager.block_pool.free_blocks(reversed(pinned))

    def _held(self, hashes: list[bytes]) -> int:
        """How many blocks vLLM could serve of a chain, in all groups."""
        if not (self.groups.longest or self.groups.states):
            return len(cached_blocks(self.manager.block_pool, hashes))
        tokens = len(hashes) * self.block_size
        found = self.manager.coordinator.find_longest_cache_hit(hashes, tokens)
        return int(found[1]) // self.block_size

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
        held = self._held(chained)
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
        return self._held(hashes) * self.block_size

    def hits_uncomputed(self, tracked: Tracked, local: int, others: Iterable[Tracked]) -> bool:
        """Whether a local block is still being filled by another request of this step.

        vLLM shares a block as soon as it is allocated, since its own forward fills it before
        anybody attends to it. Recomputed rows attend before that forward.
        """
        uncomputed: set[int] = set()
        for other in others:
            request = other.request
            first = request.num_computed_tokens // self.block_size
            for blocks in self.manager.get_blocks(request.request_id).blocks:
                uncomputed.update(block.block_id for block in blocks[first:])
        if not uncomputed or not local:
            return False
        hashes = tracked.request.block_hashes[: local // self.block_size]
        pool, hit = self.manager.block_pool, set[int]()
        for group in range(len(self.groups.specs)):
            window = self.groups.window(group)
            seen = -(-window // self.block_size) if window else len(hashes)
            hit.update(cached_blocks(pool, hashes[-seen:], self.groups.ids[group]))
        return not uncomputed.isdisjoint(hit - {0})

    def spoil(self, request_id: str, failed: set[int]) -> bool:
        """Have nobody else find a request's blocks from the first that failed on, if one did."""
        blocks = self.blocks(request_id)
        bad = [i for of in blocks for i, block in enumerate(of) if block in failed]
        if bad:
            behind = {block for of in blocks for block in of[min(bad) :]}
            self.manager.evict_blocks(behind - {0})
        return bool(bad)

    def evict_from(self, tracked: Tracked, block: int) -> None:
        """Have nobody else find the request's blocks from index `block` on."""
        pool, hashes = self.manager.block_pool, tracked.request.block_hashes[block:]
        ids = self.groups.ids
        held = [pool.get_cached_block(one, [group]) for one in hashes for group in ids]
        self.manager.evict_blocks({block.block_id for found in held if found for block in found})

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
