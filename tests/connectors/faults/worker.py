"""A worker that does what a test tells it to: pages of noise, and faults where chunks come from."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

import lmc.connectors.vllm.loading as loading
from lmc.connectors.vllm.weights import WeightsWatch
from lmc.connectors.vllm.worker_cls import LMCWorker, _side
from tests.connectors.faults.world import LATE_S


class FaultyWorker(LMCWorker):
    """Faults are set by `collective_rpc`, on all ranks or on one."""

    _mend: Callable[[], None] | None = None

    def noise(self, seed: int) -> None:
        """Fill every page: what is not written before it is read shows."""
        generator = torch.Generator().manual_seed(seed)
        pages = _side()._pages
        for view in (*pages.k, *pages.v):
            view.copy_(torch.randn(view.shape, generator=generator) * 3)

    def fault(self, kind: str, tokens: bytes, rank: int | None = None) -> None:
        """What happens to the chunk of these tokens, on one rank or on all."""
        if rank in (None, _side().rank):
            self._mend = getattr(self, f"_{kind}")(tokens)

    def patience(self, seconds: float) -> None:
        """How long what a tier is to bring is waited for."""
        _side().chunks.patience_s = seconds

    def mend(self) -> None:
        """All is well again; what hung goes on, and tiers are not left alone for it any more."""
        if self._mend is not None:
            self._mend()
        self._mend = None
        chunks, until = _side().chunks, time.monotonic() + 60
        while any(fetcher._running for fetcher in chunks._fetchers):
            assert time.monotonic() < until, "a read has not come back"
            time.sleep(0.01)
        for breaker in chunks._breakers:  # what is late when it returns opens them
            breaker.back()

    def held(self) -> list[int]:
        """Slots that host memory holds."""
        return sorted(_side().chunks.memory._held)

    # -- kinds -------------------------------------------------------------------------------

    def _lost(self, tokens: bytes) -> Callable[[], None]:
        """Its bytes are gone, in memory and behind it."""
        chunks = _side().chunks
        for slot, record in list(chunks._records.items()):
            if record.tokens == tokens and chunks.arrival(slot) is None:
                chunks.memory.release(slot)
        return self._got(tokens, lambda *_: None)

    def _damaged(self, tokens: bytes) -> Callable[[], None]:
        """Its first layer is right and told of, the others are not."""

        def damaged(get: Any, record: Any, into: Any, deadline: Any, arrived: Any) -> None:
            get(record, into, deadline, lambda layers: None)
            for rows in into:
                np.asarray(rows)[1:] = 77
            arrived(1)
            time.sleep(LATE_S / 16)

        return self._got(tokens, damaged)

    def _late(self, tokens: bytes) -> Callable[[], None]:
        """It comes, but too late: so does all that a tier is asked for."""

        def late(get: Any, *arguments: Any) -> Any:
            time.sleep(LATE_S)
            return get(*arguments)

        return self._got(None, late)

    def _hung(self, tokens: bytes) -> Callable[[], None]:
        """The tier never answers, and has told of a layer before."""
        over = threading.Event()

        def hung(get: Any, record: Any, into: Any, deadline: Any, arrived: Any) -> None:
            arrived(1) if record.tokens == tokens else None
            over.wait(60)

        back = self._got(None, hung)
        return lambda: (over.set(), back())[1]

    def _memory(self, tokens: bytes) -> Callable[[], None]:
        """The device has no room to put chunks in place."""
        scatter_runs = loading.scatter_runs

        def none_left(*arguments: Any, **options: Any) -> None:
            raise torch.OutOfMemoryError("out of memory")

        loading.scatter_runs = none_left

        def back() -> None:
            loading.scatter_runs = scatter_runs

        return back

    def _unready(self, tokens: bytes, times: int | None = None) -> Callable[[], None]:
        """Rows cannot be prepared: block tables, page slots, room for them."""
        attention = _side()._attention
        prepare, left = attention.prepare, [times]

        def fails(*arguments: Any) -> Any:
            if left[0] == 0:
                return prepare(*arguments)
            left[0] = None if left[0] is None else left[0] - 1
            raise torch.OutOfMemoryError("out of memory")

        attention.prepare = fails

        def back() -> None:
            del attention.prepare  # the instance's; the class's own shows again

        return back

    def _unready_once(self, tokens: bytes) -> Callable[[], None]:
        """It works with the second try, in which all is computed."""
        return self._unready(tokens, 1)

    def _got(self, tokens: bytes | None, instead: Callable[..., Any]) -> Callable[[], None]:
        """Have the tiers answer otherwise for a chunk, or for all."""
        tiers = [attached.tier for attached in _side().chunks.tiers]
        gets = [tier.get for tier in tiers]
        for tier, get in zip(tiers, gets, strict=True):

            def faulty(
                record: Any, into: Any = None, deadline: Any = None,
                arrived: Any = lambda layers: None, get: Any = get,
            ) -> Any:  # fmt: skip
                if tokens in (None, record.tokens):
                    return instead(get, record, into, deadline, arrived)
                return get(record, into, deadline, arrived)

            tier.get = faulty

        def back() -> None:
            for tier, get in zip(tiers, gets, strict=True):
                tier.get = get

        return back


class BlindWorker(FaultyWorker):
    """One that computes no rows, as of a model whose loop is not known."""

    def compile_or_warm_up_model(self) -> Any:
        result = super(LMCWorker, self).compile_or_warm_up_model()
        _side().watch = WeightsWatch(self.model_runner.get_model())
        return result
