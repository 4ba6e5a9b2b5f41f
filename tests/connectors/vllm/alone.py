"""What is computed alone, without an engine: an index, a pool of blocks, prompts and steps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from lmc.chunking.pieces import Piece
from lmc.connectors.vllm.config import LMCConfig
from lmc.connectors.vllm.isolating import RESTED_S, Isolation
from lmc.connectors.vllm.messages import Encode
from lmc.store import Index
from lmc.store.keep import keep
from lmc.store.lookup import Known
from tests.connectors.vllm.grouped import one_group

BLOCK, BOS = 32, 7


class Pool:
    """vLLM's block pool, as far as blocks are taken and given back."""

    def __init__(self, blocks: int = 400) -> None:
        self.num_gpu_blocks = blocks
        self.free = [SimpleNamespace(block_id=i) for i in range(blocks)]

    def get_num_free_blocks(self) -> int:
        return len(self.free)

    def get_new_blocks(self, n: int) -> list[SimpleNamespace]:
        taken, self.free = self.free[:n], self.free[n:]
        return taken

    def free_blocks(self, blocks: list[SimpleNamespace]) -> None:
        self.free += blocks


def text(seed: int, T: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(10, 500, T)


class World:
    def __init__(self, rows: int = 512, capacity: int = 1 << 20, **config: object) -> None:
        self.config = LMCConfig.model_validate({"isolated_tokens": 512} | config)
        self.index, self.pool = Index(capacity), Pool()
        self.now = 0.0
        groups = one_group(1, BLOCK)
        self.isolation = Isolation(
            self.config, self.index, BOS, 1, groups, rows, clock=lambda: self.now
        )

    def prompt(
        self, *parts: np.ndarray, closed: bool = True, spans: Any = None, again: bool = False
    ) -> None:
        """Each part is a span, unless others are given; `again`: all stood behind others before."""
        for part in parts if again else ():
            self.stored(text(99, 32), part)
        ends = np.cumsum([len(part) for part in parts]).tolist()
        pieces = [Piece(a, b) for a, b in zip([0, *ends], ends, strict=False)]
        pieces[-1] = Piece(pieces[-1].start, pieces[-1].end, closed)
        tokens = np.concatenate(parts)
        if spans is None:
            spans = [(start, end) for start, end, whole in pieces if whole]
        known = Known(self.index, b"n", (), self.config.context, BOS)
        self.isolation.want(known, tokens, pieces, spans)

    def stored(self, *parts: np.ndarray) -> None:
        ends = np.cumsum([len(part) for part in parts]).tolist()
        pieces = [Piece(a, b) for a, b in zip([0, *ends], ends, strict=False)]
        for _, record in keep(self.index, b"n", np.concatenate(parts), pieces, None, 1):
            self.index.acknowledge(record.slot, 0)

    def step(self, scheduled: int = 0, prompts: bool = False) -> list[Encode]:
        """One behind which nothing runs is one of an engine that rests, once it has begun to."""
        encodes = self.isolation.take(self.pool, scheduled, prompts)
        if not scheduled and not encodes:
            self.now += 2 * RESTED_S
            encodes = self.isolation.take(self.pool, scheduled, prompts)
        for encode in encodes:
            assert all(len(save.blocks[0]) * BLOCK >= len(encode.tokens) for save in encode.saves)
        return encodes

    def done(self, encodes: list[Encode]) -> None:
        for encode in encodes:
            for save in encode.saves:
                self.index.acknowledge(save.record.slot, 0)
                self.isolation.settle(save.record.slot, self.pool)


def lengths(encodes: list[Encode]) -> list[int]:
    return [sum(save.end - save.start for save in encode.saves) for encode in encodes]
