"""States of layers that keep one in place of keys: exact, at the ends of blocks.

A state holds all that was before it: it cannot be cut, and not be moved. vLLM keeps those at the
ends of some blocks (`mamba_cache_mode: align`), each in a page, and tells connectors of each one.
What is stored of a group of layers is a chunk of the tokens that its states end with, as many as
make it as long, in a namespace beside that of keys and values. A prompt is taken up at the last end
of a block whose states are there, and up to which its keys and values are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import gcd
from typing import Any

import numpy as np
import torch
from blake3 import blake3

from lmc.blend.plan import Plan
from lmc.chunking.pieces import Contexts, Piece, chunk_key, context_digests
from lmc.connectors.vllm.groups import Groups, States
from lmc.connectors.vllm.tracked import Tracked
from lmc.kernels.gather import gather
from lmc.kernels.paged import PagedLatents
from lmc.kernels.scatter import scatter
from lmc.store import Index, Record
from lmc.store.directory import Answers
from lmc.store.lookup import Found
from lmc.store.record import exact_at

MARK = b"state"
ROW = 256  # elements of a page that kernels take as one


def namespace_of(namespace: bytes, group: int) -> bytes:
    """Of the states of one group of layers, beside keys and values of a namespace."""
    return MARK + blake3(MARK + bytes([group]) + namespace).digest()


def is_state(record: Record) -> bool:
    """Whether a record is that of states."""
    return len(record.namespace) == len(MARK) + 32 and record.namespace.startswith(MARK)


def length_of(groups: Groups, bytes_per_token: int) -> int:
    """Tokens whose keys and values are as long as the states of a group of layers; 0: none."""
    states = groups.states
    layers = max(map(len, states.names)) if states else 0
    return -(-layers * states.page_bytes // bytes_per_token) if states else 0


class Ends:
    """Finds and keeps states, on the scheduler's side.

    Args:
        states: the groups of layers.
        block_size: tokens of a block.
        index: of host memory.
        T: `length_of` their states.
        nbytes: of so many tokens.
    """

    def __init__(self, states: States, block_size: int, index: Index, T: int, nbytes: int) -> None:
        self._ids, self._P, self._index = states.ids, block_size, index
        self._T, self._nbytes = T, nbytes

    def namespaces(self, namespace: bytes) -> list[bytes]:
        """By group, those of states beside keys and values of a namespace."""
        return [namespace_of(namespace, group) for group in range(len(self._ids))]

    def pieces(self, T: int, local: int) -> list[Piece]:
        """What states at the ends of blocks behind `local`, in front of the last of T tokens, are
        stored as."""
        first = max(local, self._T - 1) // self._P * self._P + self._P
        return [Piece(end - self._T, end, True) for end in range(first, T, self._P)]

    def until(self, tracked: Tracked, plan: Plan, told: Sequence[Sequence[Answers]]) -> Plan:
        """The plan, whose claim ends where states are known; where none are it claims nothing.

        Args:
            told: by group, what tiers behind host memory said.
        """
        if not plan.claimed:
            return plan
        ids = np.ascontiguousarray(tracked.tokens, "<i8").tobytes()
        contexts = Contexts(ids)
        of = list(zip(self.namespaces(tracked.namespace), told, strict=True))
        for start, end, _ in reversed(self.pieces(plan.end + 1, plan.local)):
            content, found = ids[8 * start : 8 * end], []
            for namespace, answers in of:
                known = self._index.variants(namespace, content)
                known += (record for one in answers for record in reversed(one.of(content)))
                exact = (r for r in known if exact_at(r, start, contexts))
                if (record := next(exact, None)) is None:
                    break
                found.append(Found(start, end, "exact", record, start))
            else:
                return plan.until(end, found)
        return plan.nothing()

    def computed(
        self, scheduler_output: Any, requests: Mapping[str, Tracked]
    ) -> Iterator[tuple[Tracked, Record, int, int]]:
        """States that a step computes, and that there is room for: whose, of which group of layers,
        and in which block.

        Of prompts those that vLLM keeps (`prefix_cache_retention_interval`); of answers, of which
        it keeps none by itself, each at the end of a block.
        """
        told = scheduler_output.kv_connector_block_state
        offered = {} if told is None else dict(told.boundary_state_offloads)
        for request_id, n in scheduler_output.num_scheduled_tokens.items():
            tracked = requests.get(request_id)
            end = 0 if tracked is None else tracked.request.num_computed_tokens + n
            if tracked and end % self._P == 0 and end > tracked.request.num_prompt_tokens:
                blocks, last = told.get_block_ids(request_id), end // self._P - 1
                offered[request_id] = [(group, blocks[group][last], end) for group in self._ids]
        for request_id, offers in offered.items():
            tracked = requests.get(request_id)
            if tracked is None or not tracked.saves:
                continue
            for group, block, end in offers:
                if end % self._P or end < self._T or group not in self._ids or not block:
                    continue
                mine = self._ids.index(group)
                if (record := self._put(tracked, end, mine)) is not None:
                    yield tracked, record, mine, block

    def _put(self, tracked: Tracked, end: int, group: int) -> Record | None:
        ids = np.asarray(tracked.request.all_token_ids[:end], "<i8")
        start, namespace = end - self._T, namespace_of(tracked.namespace, group)
        context, after = context_digests(ids, [start, end])
        return self._index.put(
            namespace=namespace,
            key=chunk_key(namespace, ids[start:]),
            tokens=ids[start:].tobytes(),
            start=start,
            context=context,
            context_after=after,
            origin="exact",
            nbytes=self._nbytes,
        )


class Pages:
    """The pages of states, on the worker's side.

    Args:
        layers: vLLM's, by name.
        dtype: of keys and values; states are moved as so many elements of it.

    Raises:
        ValueError: pages of another shape than is known.
    """

    def __init__(self, states: States, layers: Mapping[str, Any], dtype: torch.dtype) -> None:
        self.groups = [
            PagedLatents([_page_of(layers[name].kv_cache, states.page_bytes, dtype) for name in of])
            for of in states.names
        ]
        n = max(pages.L * pages.P * pages.D for pages in self.groups)
        # Those of a group, on their way: out of the pages by one thread, into them by another.
        self._leaving, self._coming = torch.empty((2, n), dtype=dtype, device=self.groups[0].device)

    def read(self, group: int, block: int, into: Sequence[torch.Tensor]) -> None:
        """Copy the states of a group of layers at the end of a block to the parts of a chunk, which
        are in host memory."""
        pages, slots, rest = self._there(group, block, self._leaving)
        gather(pages, slots, out=rest.view(pages.shape(pages.P)))
        for room in into:
            n = min(len(rest), room.numel())
            room.view(-1)[:n].copy_(rest[:n])
            rest = rest[n:]

    def write(self, group: int, block: int, out_of: Sequence[torch.Tensor]) -> None:
        """Put them back, as `read` left them."""
        pages, slots, states = self._there(group, block, self._coming)
        rest = states
        for kept in out_of:
            n = min(len(rest), kept.numel())
            rest[:n].copy_(kept.view(-1)[:n])
            rest = rest[n:]
        scatter(states.view(pages.shape(pages.P)), pages, slots)

    def _there(
        self, group: int, block: int, buffer: torch.Tensor
    ) -> tuple[PagedLatents, torch.Tensor, torch.Tensor]:
        """A group's pages, the slots of a block, and the elements of the buffer that it takes."""
        pages = self.groups[group]
        slots = torch.arange(block * pages.P, (block + 1) * pages.P, device=buffer.device)
        return pages, slots, buffer[: pages.L * pages.P * pages.D]


def _page_of(cache: Any, page_bytes: int, dtype: torch.dtype) -> torch.Tensor:
    """A layer's pages `[N, rows, elements]`, whatever lies in them; the layer's own memory."""
    tensors = list(cache) if isinstance(cache, list | tuple) else [cache]
    first = min(tensors, key=lambda tensor: tensor.data_ptr())
    strides = {tensor.stride(0) * tensor.element_size() for tensor in tensors}
    if strides != {page_bytes}:
        raise ValueError(f"pages of a state are {sorted(strides)} bytes apart, not {page_bytes}")
    storage, size = first.untyped_storage(), dtype.itemsize
    at = first.data_ptr() - storage.data_ptr()
    if page_bytes % size or at % size:
        raise ValueError(f"pages of a state of {page_bytes} bytes, from byte {at} on, in {dtype}")
    n = page_bytes // size
    width = gcd(n, ROW)
    pages = torch.empty(0, dtype=dtype, device=first.device)
    shape, stride = (len(first), n // width, width), (n, width, 1)
    return pages.set_(storage, at // size, shape, stride)
