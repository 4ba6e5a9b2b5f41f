"""Exact reuse behind the same text, of any decoder whose cache transformers keeps by layers.

What `HFModel` refuses has it too: layers that keep a state in place of keys (Gated DeltaNet, Mamba,
lightning attention, short convolutions), that use the KV of others, or whose KV has sizes of its
own. A state cannot be cut, and cannot be moved: it is kept at the ends of aligned blocks, as vLLM's
`--mamba-cache-mode align` has it, and a prompt is taken up at the last of them that is known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache
from transformers import __version__ as transformers_version

from lmc.chunking.pieces import Piece
from lmc.connectors.hf.weights import identity_of
from lmc.model.identity import namespace_of
from lmc.model.layout import KVLayout
from lmc.store import Store
from lmc.store.compress import LOSSY
from lmc.store.lookup import Found
from lmc.store.record import variants_kept
from lmc.store.tier import TIERS

GRID = 64  # tokens that kernels of linear attention take together: a block ends where one of theirs
ROWS = ("keys", "values", "indexer_keys")  # of a layer's cache, that grow by a row a token
STATES = ("conv_states", "recurrent_states")
KNOWN = (
    "DynamicLayer", "DynamicSlidingWindowLayer", "DynamicIndexedLayer", "LinearAttentionLayer",
    "LinearAttentionAndFullAttentionLayer", "LinearAttentionAndSlidingWindowAttentionLayer",
)  # fmt: skip
BY_LENGTH = ("dynamic", "longrope")  # rotations of which early keys depend on what follows


@dataclass(frozen=True)
class Prefix:
    """The beginning of a prompt, computed.

    Attributes:
        past_key_values: as `model(...)` and `model.generate(...)` take it, with the whole prompt's
            ids beside it for the latter; yours, it may grow.
        length: tokens in it, whole blocks; at least one of the prompt is left to compute.
        reused: those of them that had been stored.
    """

    past_key_values: DynamicCache
    length: int
    reused: int


@dataclass(frozen=True)
class _Part:
    """One tensor of a layer's cache, as a block keeps it: `[1, ...]`, rows at dim -2."""

    layer: int
    name: str
    index: int | None  # of a state among the layer's
    shape: tuple[int, ...]
    dtype: torch.dtype

    def of(self, cache: DynamicCache) -> torch.Tensor:
        """It, at the end of a block."""
        held = getattr(cache.layers[self.layer], self.name)
        if self.index is not None:
            found: torch.Tensor = held[self.index]
            return found
        rows: torch.Tensor = held[..., -self.shape[-2] :, :]
        return rows


class PrefixStore:
    """Beginnings of prompts of one model, in blocks, in memory and in tiers behind it.

        store = lmc.PrefixStore(model)
        prefix = store.prefill(ids)  # [T] token ids
        model.generate(torch.tensor([ids]), past_key_values=prefix.past_key_values)

    The model is tried first: the logits behind two blocks that were stored and put back are those
    of its own forward.

    Args:
        model: a transformers `...ForCausalLM`; it is not changed.
        block: tokens of one, a multiple of 64. Each holds the states behind it, of a size that does
            not depend on it: `rows_bytes` and `state_bytes` are those of one block.
        memory_bytes: host memory for both, shared out as their sizes are.
        tiers: places behind it, as `Store` takes them; of lossless compression alone.

    Raises:
        ValueError: a wrong setting, a cache that is not known, a rotation that depends on the
            prompt's length, or a model that does not go on from its own cache as it should.
        OSError: as `Store`.
    """

    def __init__(
        self,
        model: Any,
        *,
        block: int = 512,
        memory_bytes: int = 4 << 30,
        tiers: Sequence[Mapping[str, Any] | str] = (),
    ) -> None:
        if block < GRID or block % GRID:
            raise ValueError(f"block: got {block}, allowed: multiples of {GRID}")
        for tier in tiers:
            codec = getattr(TIERS.build(tier), "compression", "none")
            if codec in LOSSY:
                raise ValueError(
                    f"compression: got {codec!r}, allowed: lossless ones; a state is no KV"
                )
        self.model, self.block = model, block
        rows, states = self._parts()
        self.rows_bytes, self.state_bytes = _size(rows), _size(states)
        both = self.rows_bytes + self.state_bytes
        if memory_bytes < both:
            raise ValueError(f"memory_bytes: got {memory_bytes}, allowed: at least {both}, a block")
        dtype = str(model.dtype).removeprefix("torch.")
        name = f"prefix, blocks of {block}, transformers {transformers_version}"
        who = identity_of(model) if tiers else ("", b"")
        self._stores: dict[str, tuple[Store, list[_Part]]] = {}
        for what, parts in (("rows", rows), ("states", states)):
            if not parts:
                continue
            store = Store(
                _layout(parts, block),
                namespace_of(*who, dtype, None, engine=f"{name}, {what}"),
                memory_bytes=memory_bytes * _size(parts) // both,
                tiers=tiers,
                chunker={"name": "fixed", "n": block},
                exact_variants=variants_kept(None, moves=False),
                label=f"{type(model).__name__} {what}",
            )
            self._stores[what] = store, parts

    def __enter__(self) -> PrefixStore:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @torch.no_grad()
    def prefill(self, tokens: Sequence[int] | np.ndarray) -> Prefix:
        """Load what is known of a prompt's whole blocks, compute and keep those that follow.

        Args:
            tokens: `[T]`. The last one is never part of it: its logits are still to be asked for.

        Raises:
            ValueError: no tokens, or one that the model does not have.
        """
        ids = np.asarray(tokens, np.int64)
        vocabulary = self.model.config.get_text_config().vocab_size
        if ids.ndim != 1 or not ids.size or ids.min() < 0 or ids.max() >= vocabulary:
            raise ValueError(
                f"tokens: got {list(ids.shape)}"
                + (f" of {ids.min()} to {ids.max()}" if ids.size else "")
                + f", want [T] of 0 to {vocabulary - 1}"
            )
        end = (len(ids) - 1) // self.block * self.block
        cache, reused = self._loaded(ids[:end])
        for start in range(reused, end, self.block):
            self._compute(cache, ids[start : start + self.block])
            for store, parts in self._stores.values():
                piece = Piece(start, start + self.block)
                for _, record in store.make_room(ids[: piece.end], [piece]):
                    store.fill(record, _packed(cache, parts, self.block))
        return Prefix(cache, end, reused)

    def close(self) -> None:
        """Let go of memory and tiers; what these hold stays."""
        for store, _ in self._stores.values():
            store.close()

    # -- parts ---------------------------------------------------------------------------------

    def _loaded(self, ids: np.ndarray) -> tuple[DynamicCache, int]:
        """A cache with the most of whole blocks that are stored, and how many tokens these are."""
        stored: dict[str, dict[int, Found]] = {"rows": {}, "states": {}}
        for what, (store, _) in self._stores.items():
            stored[what] = {f.end: f for f in store.lookup(ids) if f.kind == "exact"}
        ends = list(range(self.block, len(ids) + 1, self.block))
        while ends:
            came: dict[str, list[torch.Tensor]] = {}
            # Of states the last one, which tells soonest how far it goes; of rows every block's.
            for what, asked in (("states", ends[-1:]), ("rows", ends)):
                if what in self._stores:
                    found = [stored[what][end] for end in asked if end in stored[what]]
                    blocks = self._stores[what][0].retrieve_many(found)
                    held = {
                        f.end: kv for f, kv in zip(found, blocks, strict=True) if kv is not None
                    }
                    if lost := [end for end in asked if end not in held]:
                        ends = [end for end in ends if end < lost[0]]
                        break
                    came[what] = list(held.values())
            else:
                cache = self._empty()
                for what, blocks_of in came.items():
                    self._put(cache, self._stores[what][1], blocks_of, ends[-1])
                return cache, ends[-1]
        return self._empty(), 0

    def _empty(self) -> DynamicCache:
        return DynamicCache(config=self.model.config)

    def _compute(self, cache: DynamicCache, ids: np.ndarray, n: int = 1) -> torch.Tensor:
        """fp32 logits `[n, V]` of the last rows of ids, which go into the cache."""
        there = torch.from_numpy(ids)[None].to(self.model.device)
        out = self.model(there, past_key_values=cache, use_cache=True, logits_to_keep=n)
        logits: torch.Tensor = out.logits[0].float()
        return logits

    def _put(
        self, cache: DynamicCache, parts: list[_Part], blocks: list[torch.Tensor], length: int
    ) -> None:
        """Fill a cache, as it would be behind `length` tokens."""
        device = self.model.device
        split = [_unpacked(block, parts) for block in blocks]
        for i, part in enumerate(parts):
            layer = cache.layers[part.layer]
            if part.index is not None:
                state = split[-1][i].to(device)
                layer.lazy_initialization(**{part.name: state, "state_idx": part.index})
                getattr(layer, part.name)[part.index].copy_(state)
                layer.has_previous_state[part.index] = True
                continue
            rows = torch.cat([block[i] for block in split], dim=-2).to(device)
            if window := getattr(layer, "sliding_window", 0):
                rows = rows[..., -(window - 1) :, :].clone()
                layer.cumulative_length = length
            if part.name == "indexer_keys":
                layer.lazy_initialization_indexer(rows)
            elif not layer.is_initialized:
                layer.lazy_initialization(rows, rows)
            setattr(layer, part.name, rows)

    @torch.no_grad()
    def _parts(self) -> tuple[list[_Part], list[_Part]]:
        """What a block keeps, rows and states, as this model's own cache has them; tries it."""
        name = type(self.model).__name__
        rope = getattr(self.model.config.get_text_config(), "rope_parameters", None) or {}
        kinds = {str(p.get("rope_type")) for p in [rope, *rope.values()] if isinstance(p, Mapping)}
        if bad := sorted(kinds & {*BY_LENGTH}):
            raise ValueError(
                f"{name}: rope type {bad[0]!r}: what a token has in front depends on the length of "
                "the prompt, so that none begins another"
            )
        cache, behind = self._empty(), 16
        tokens = np.arange(2 * self.block + behind, dtype=np.int64) * 7919
        ids = tokens % self.model.config.get_text_config().vocab_size
        blocks = [ids[: self.block], ids[self.block : -behind]]
        try:
            whole = self._compute(self._empty(), ids, behind)
            self._compute(cache, blocks[0])
        except Exception as error:  # an architecture of another kind may fail in any way
            raise ValueError(f"{name} does not run with a DynamicCache: {error}") from error
        kinds_of = {type(layer).__name__ for layer in cache.layers}
        if unknown := sorted(kinds_of - {*KNOWN}):
            raise ValueError(f"{name} has a cache of {', '.join(unknown)}; known: {KNOWN}")
        rows, states = [], []
        for i, layer in enumerate(cache.layers):
            longest = getattr(layer, "sliding_window", 0) - 1
            n = min(self.block, longest) if longest > 0 else self.block
            for what in ROWS:
                held = getattr(layer, what, None)
                if held is not None and held.numel():
                    shape = (*held.shape[:-2], n, held.shape[-1])
                    rows.append(_Part(i, what, None, shape, held.dtype))
            for what in STATES:
                for index, held in getattr(layer, what, {}).items():
                    if held is not None:
                        states.append(_Part(i, what, index, tuple(held.shape), held.dtype))
        kept = []
        for block in (None, blocks[1]):
            if block is not None:
                self._compute(cache, block)
            kept.append([_packed(cache, parts, self.block) for parts in (rows, states)])
        again = self._empty()
        for parts, packed in zip((rows, states), zip(*kept, strict=True), strict=True):
            if parts:
                self._put(again, parts, list(packed), 2 * self.block)
        got = self._compute(again, ids[-behind:], behind)
        scale = whole.abs().max().clamp_min(1e-6)
        worst, allowed = (
            float((whole - got).abs().max() / scale),
            torch.finfo(self.model.dtype).eps ** 0.5,
        )
        if not worst <= allowed:
            raise ValueError(
                f"{name}: logits behind a stored beginning differ from the model's own by "
                f"{worst:.1e} (at most {allowed:.1e}), so it is not reused"
            )
        return rows, states


def _size(parts: Sequence[_Part]) -> int:
    """Bytes of a block."""
    return sum(int(np.prod(p.shape)) * p.dtype.itemsize for p in parts)


def _layout(parts: Sequence[_Part], block: int) -> KVLayout:
    """A token's share of a block's bytes, as fp32 that nobody reads."""
    return KVLayout(1, 1, ceil(_size(parts) / (4 * block)), "float32", sides=1)


def _packed(cache: DynamicCache, parts: Sequence[_Part], block: int) -> torch.Tensor:
    """The bytes of a block that has just been computed, in the shape that a store takes."""
    out = torch.zeros(_layout(parts, block).shape(block), dtype=torch.float32)
    flat, at = out.view(-1).view(torch.uint8), 0
    for part in parts:
        held = part.of(cache)
        if tuple(held.shape) != part.shape:
            raise ValueError(f"got {part.name} {list(held.shape)}, want {list(part.shape)}")
        data = held.detach().cpu().contiguous().view(-1).view(torch.uint8)
        flat[at : at + len(data)] = data
        at += len(data)
    return out


def _unpacked(block: torch.Tensor, parts: Sequence[_Part]) -> list[torch.Tensor]:
    flat, at, out = block.contiguous().view(-1).view(torch.uint8), 0, []
    for part in parts:
        size = _size([part])
        # Copied: a part may begin anywhere, and its elements want to be aligned.
        out.append(flat[at : at + size].clone().view(part.dtype).view(part.shape))
        at += size
    return out
