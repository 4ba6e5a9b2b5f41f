"""What requests leave in the store, until the workers have copied it out of their blocks."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from vllm.platforms import current_platform

from lmc.chunking.pieces import Piece, split
from lmc.connectors.vllm.config import LMCConfig
from lmc.connectors.vllm.local import LocalCache
from lmc.connectors.vllm.messages import ChunkSave, Claim, Encode
from lmc.connectors.vllm.namespaces import Namespace
from lmc.connectors.vllm.reading import survive
from lmc.connectors.vllm.states import Ends
from lmc.connectors.vllm.tracked import Tracked
from lmc.store import Index, Record
from lmc.store.keep import keep

SPARE = 8  # one block in so many stays free for requests


class Keeping:
    """Decides which chunks of a request are stored, and knows which are on their way.

    No request keeps its blocks for them: the workers are told when blocks that are still to be
    read become somebody else's, and read them first. But a chunk of which a step computes only a
    part keeps those that a window would leave behind, until the rest of it is computed.

    Args:
        bytes_per_token: of one rank.
        local: vLLM's own cache.
        ranks: workers that must say that they have a chunk.

    Attributes:
        counts: what happened, by name.
    """

    def __init__(
        self, config: LMCConfig, index: Index, bytes_per_token: int, local: LocalCache, ranks: int
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._index, self._ranks, self._bytes_per_token = index, ranks, bytes_per_token
        self._local, self._groups, self._block_size = local, local.groups, local.block_size
        self._chunker = config.build_chunker()
        self._longest = config.limits.chunk_tokens
        self._saves: list[ChunkSave] = []
        self._missing: dict[int, int] = {}  # by slot, ranks that have yet to say that they have it
        self._reads: dict[int, set[int]] = {}  # by slot, the blocks that it is copied from

    @property
    def pending(self) -> bool:
        """Whether anything is on its way."""
        return bool(self._missing)

    def keep(
        self, tracked: Tracked, computed: int, blocks: list[list[int]], over: bool = True
    ) -> list[int]:
        """Have the workers keep every chunk of the first `computed` tokens that is not stored.

        Args:
            blocks: the request's block ids, in order, by KV cache group.
            over: whether the prompt, or the answer, ends here; else only what is whole is kept.

        Returns:
            Their slots.
        """
        assert tracked.options is not None
        if not over and computed < tracked.request.num_prompt_tokens:
            whole = [piece for piece in tracked.pieces if piece.end <= computed]
            return self._keep(tracked, tracked.tokens, whole, tracked.options.chunks or (), blocks)
        tokens = np.asarray(tracked.request.all_token_ids[:computed], "<i8")
        n = min(computed, tracked.request.num_prompt_tokens)
        spans = [span for span in tracked.options.chunks or () if span[1] <= n]
        pieces = split(tokens[:n], self._chunker, spans, self._longest)
        # What was answered is apart: the next turn may go on behind another answer.
        answer = split(tokens[n:], self._chunker, longest=self._longest)
        answer = answer if over else answer[:-1]
        pieces += [Piece(start + n, end + n, closed) for start, end, closed in answer]
        return self._keep(tracked, tokens, pieces, spans, blocks)

    def _keep(
        self,
        tracked: Tracked,
        tokens: np.ndarray,
        pieces: Sequence[Piece],
        spans: Sequence[tuple[int, int]],
        blocks: list[list[int]],
    ) -> list[int]:
        """Keep these chunks, which the tokens begin with; of those that are new the slots."""
        end = pieces[-1].end if pieces else 0
        if end <= tracked.seen_to:
            return []
        for (group, i), block in tracked.open.items():
            blocks[group][i] = block.block_id
        spans = [span for span in spans if span[1] <= end]
        namespace, blended_from = tracked.namespace, tracked.blended_from
        per_token = self._bytes_per_token
        reads = self._read_by([p for p in pieces if p.end > tracked.seen_to], blocks)
        # Before anything makes room for them: what a window has left behind.
        gone = {start for start, some in reads.items() if 0 in some}
        computed_from = max(tracked.local, tracked.admitted.end if tracked.admitted else 0)
        self.counts["saves_behind_window"] += sum(start >= computed_from for start in gone)
        of = (namespace, tokens[:end], pieces, blended_from, per_token, spans, tracked.seen_to)
        kept = keep(self._index, *of, without=gone)
        tracked.seen_to = end
        return self._told(tracked, kept, blocks, reads)

    def keep_states(
        self, ends: Ends | None, scheduler_output: Any, requests: Mapping[str, Tracked]
    ) -> None:
        """Have the workers keep states that a step computes, of layers that keep one."""
        found = ends.computed(scheduler_output, requests) if ends else ()
        for tracked, record, group, block in found:
            piece = Piece(record.start, record.start + record.T, True)
            of = (tracked, [(piece, record)], [[block]], {piece.start: {block}})
            tracked.storing += self._told(*of, states=group)

    def hand_over(self, tracked: Tracked, namespace: Namespace) -> bool:
        """Keep a prompt that is computed for another engine, whatever of it is stored, if its
        client wants that; whether it does.

        It is kept in a namespace of its own, where it is exact although it may be blended. Nothing
        of it is kept where a window has left some of it behind, or where something is there under
        its name already: two computations of one prompt may differ, and are not to be mixed.
        """
        options, request = tracked.options, tracked.request
        if options is None or options.hand_over is None:
            return False
        if tracked.unsaved or self._groups.states:  # whose state is not handed over
            tracked.handed_over = "lost"
            self.counts["hand_overs:lost"] += 1
            return False
        try:
            blocks, n = self._local.blocks(request.request_id), request.num_prompt_tokens
            pieces = [piece for piece in tracked.pieces if piece.end <= n]
            reads = self._read_by(pieces, blocks)
            into = namespace.of(request.cache_salt, request.lora_request, options.hand_over)
            first = tracked.tokens[pieces[0].start : pieces[0].end].astype("<i8").tobytes()
            kept: list[tuple[Piece, Record]] = []
            if any(0 in some for some in reads.values()):
                tracked.handed_over = "lost"
            elif self._index.variants(into, first) or self._index.coming(into, first):
                tracked.handed_over = "taken"
            else:
                of = (into, tracked.tokens[:n], pieces, None, self._bytes_per_token)
                kept = keep(self._index, *of)
                tracked.handed_over = "kept" if len(kept) == len(pieces) else "in_part"
            self.counts[f"hand_overs:{tracked.handed_over}"] += 1
            self._told(tracked, kept, blocks, reads)
        except BaseException as error:
            survive(error)
            self.counts["saves_given_up"] += 1
        return True

    def _read_by(self, pieces: Sequence[Piece], blocks: list[list[int]]) -> dict[int, set[int]]:
        """By where a chunk starts, the blocks that it lies in; 0 among them where one is gone."""
        P, reads = self._block_size, dict[int, set[int]]()
        for piece in pieces:
            here = slice(piece.start // P, -(-piece.end // P))
            reads[piece.start] = {block for of_group in blocks for block in of_group[here]}
        return reads

    def _told(
        self,
        tracked: Tracked,
        kept: list[tuple[Piece, Record]],
        blocks: list[list[int]],
        reads: dict[int, set[int]],
        states: int | None = None,
    ) -> list[int]:
        """Have the workers copy these chunks; their slots."""
        request_id, slots = tracked.request.request_id, []
        for piece, record in kept:
            save = ChunkSave(record, request_id, piece.start, piece.end, blocks, states)
            self._saves.append(save)
            self._missing[record.slot] = self._ranks
            self._reads[record.slot] = reads[piece.start]
            slots.append(record.slot)
        return slots

    def underway(
        self, scheduler_output: Any, requests: Mapping[str, Tracked]
    ) -> Iterator[tuple[Tracked, int, list[list[int]]]]:
        """Requests of which a step computes so much that it must be kept before a window leaves it
        behind, how far they are computed then, and their blocks.

        Of a chunk that is not whole then the blocks are held until it is.
        """
        for request_id in scheduler_output.preempted_req_ids or ():
            if tracked := requests.get(request_id):
                self.let_go(tracked)
                tracked.holds = False  # it may have been for want of these
        for request_id, n in scheduler_output.num_scheduled_tokens.items():
            tracked = requests.get(request_id)
            if tracked is None or not tracked.saves:
                continue
            computed = tracked.request.num_computed_tokens + n
            if n > 1 or computed - tracked.seen_to >= self._groups.longest // 2:
                yield tracked, computed, self._local.blocks(request_id)
                self.let_go(tracked, before=tracked.seen_to)
                self._hold(tracked, computed)

    def let_go(self, tracked: Tracked, before: int | None = None) -> None:
        """Hold no more of a request's blocks, or none in front of token `before`."""
        end = None if before is None else before // self._block_size
        gone = [key for key in tracked.open if end is None or key[1] < end]
        if gone:
            pool = self._local.manager.block_pool
            pool.free_blocks([tracked.open.pop(key) for key in gone])

    def _hold(self, tracked: Tracked, computed: int) -> None:
        """Hold what a window leaves behind in the next step of a chunk that is not whole.

        Nothing where some of the chunk is gone already, or the request may want for it.
        """
        manager, P = self._local.manager, self._block_size
        pool, first = manager.block_pool, tracked.seen_to // P
        blocks = manager.get_blocks(tracked.request.request_id).blocks
        wanted = []
        for group, of_group in enumerate(blocks):
            window = self._groups.window(group)
            behind = max(0, computed - window + 1) // P if window else 0
            new = [(group, i) for i in range(first, behind) if (group, i) not in tracked.open]
            if any(of_group[i].is_null for _, i in new):
                return
            wanted += new
        most = pool.get_num_free_blocks() - self._local.needs(tracked, computed)
        if tracked.holds and len(wanted) <= most - pool.num_gpu_blocks // SPARE:
            for group, i in wanted:
                pool.touch([blocks[group][i]])
                tracked.open[group, i] = blocks[group][i]

    def missing(self, slots: Iterable[int]) -> list[int]:
        """Those of them that are on their way."""
        return [slot for slot in slots if slot in self._missing]

    def take(self) -> list[ChunkSave]:
        """What the workers must copy, each told once."""
        saves, self._saves = self._saves, []
        return saves

    def reading(self) -> set[int]:
        """Blocks that are still to be copied from."""
        return {block for blocks in self._reads.values() for block in blocks}

    def settle(self, slot: int) -> bool:
        """One more rank has saved `slot`, or failed to; True of the last: nobody reads pages."""
        if slot not in self._missing:
            return False
        self._missing[slot] -= 1
        if self._missing[slot]:
            return False
        del self._missing[slot], self._reads[slot]
        return True


def given_out(scheduler_output: Any, encodes: list[Encode], claims: list[Claim]) -> set[int]:
    """Blocks that a step may write to for the first time; some of its claims are brought ahead of
    their requests, of which it says nothing yet."""
    new = [data.block_ids for data in scheduler_output.scheduled_new_reqs]
    new += [blocks for blocks in scheduler_output.scheduled_cached_reqs.new_block_ids if blocks]
    lent = [block for encode in encodes for of in encode.saves[0].blocks for block in of]
    lent += [block for claim in claims for of in claim.blocks for block in of]
    lent += [block for claim in claims for _, block in claim.states]
    return {block for groups in new for of in groups for block in of}.union(lent)


def prompts_done(
    scheduler_output: Any, requests: dict[str, Tracked]
) -> Iterator[tuple[str, Tracked]]:
    """Requests whose prompts a step computes to their ends, and those that others wait for in vain
    by now, since nothing of them is stored."""
    for request_id, n in scheduler_output.num_scheduled_tokens.items():
        tracked = requests.get(request_id)
        if tracked is not None and not tracked.prompt_saved:
            done = tracked.request.num_computed_tokens + n >= tracked.request.num_prompt_tokens
            if done or (tracked.leads and not tracked.saves):
                yield request_id, tracked


def computes_prompts(scheduler_output: Any) -> bool:
    """Whether a step computes prompts, and not only answers and what was drafted of them."""
    drafts = scheduler_output.scheduled_spec_decode_tokens
    scheduled = scheduler_output.num_scheduled_tokens.items()
    return any(n > 1 + len(drafts.get(i, ())) for i, n in scheduled)


def misadapted(scheduler_output: Any, requests: dict[str, Tracked]) -> list[Tracked]:
    """Requests under no LoRA adapter that a step computes beside others, on a CPU.

    There vLLM applies the last adapter to them (`lora/ops/torch_ops` reads an index of -1 so), and
    what it leaves in their pages is of use to nobody.
    """
    ids = scheduler_output.num_scheduled_tokens
    some = [requests[i] for i in ids if i in requests]
    plain = [tracked for tracked in some if tracked.request.lora_request is None]
    mixed = 0 < len(plain) < len(some)
    return plain if mixed and current_platform.is_cpu() else []
