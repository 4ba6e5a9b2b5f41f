"""How the claims of a step are served: each is loaded, and all are computed in one pass."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from vllm.distributed.parallel_state import get_tp_group
from vllm.logger import init_logger

from lmc.blend.forward import Outcome
from lmc.connectors.vllm.adapter import Forward, VLLMAdapter, most_rows, run_together
from lmc.connectors.vllm.computing import NotReadyError, at_most, with_lost
from lmc.connectors.vllm.copies import Told
from lmc.connectors.vllm.loading import (
    LayeredLoad,
    LostError,
    Placement,
    Target,
    find,
    on_any_rank,
)
from lmc.connectors.vllm.messages import ChunkLoad, Claim
from lmc.connectors.vllm.states import Pages
from lmc.connectors.vllm.windows import Scratch, Windows
from lmc.store.chunks import Chunks
from lmc.store.extents import Run

logger = init_logger(f"vllm.{__name__}")  # else vLLM prints none of it

MakeWindows = Callable[[], Windows]
Adapters = Callable[[Claim, np.ndarray, LayeredLoad | None, MakeWindows | None], VLLMAdapter]


@dataclass
class Attempt:
    """A claim that is being served.

    Attributes:
        late: chunks of it that did not come in time, or were damaged.
        whole: whether all of its rows are computed, out of its tokens alone.
        arriving: chunks that come layer by layer while rows are computed.
        held: chunks that are in host memory.
        lost: those that must be computed; None where all must.
    """

    claim: Claim
    late: list[ChunkLoad] = field(default_factory=list)
    whole: bool = False
    arriving: LayeredLoad | None = None
    held: list[tuple[ChunkLoad, list[Run]]] = field(default_factory=list)
    lost: list[ChunkLoad] | None = None


class Serving:
    """Brings claims into the pages of their requests.

    Rows of several claims go through the layers together, whatever chooses them: each claim has a
    forward of its own, and these go from layer to layer in lock step. What fails of one claim alone
    leaves the others where they are, and it is tried again behind them; where a layer fails, each
    is served by itself.

    Args:
        max_rows: that claims have computed together; one of more goes alone.
        target: where chunks of a request with these blocks go.
        adapter: what computes rows of a claim, at most these, while chunks arrive; raises
            NotReadyError on all ranks or on none.

    Attributes:
        counts: what happened, by name.
        scratch: where rows attend in layers of which vLLM keeps the last window alone, if any.
        ends: by request, hidden states of rows that vLLM's forward need not compute; None where
            that one always runs.
        states: vLLM's pages of layers that keep a state, if there are any.
    """

    def __init__(
        self,
        chunks: Chunks,
        told: Told,
        block_size: int,
        max_rows: int,
        target: Callable[[list[list[int]]], Target],
        adapter: Adapters,
    ) -> None:
        self.counts: Counter[str] = Counter()
        self.scratch: Scratch | None = None
        self.states: Pages | None = None
        self.ends: dict[str, torch.Tensor] | None = None
        self._chunks, self._told = chunks, told
        self._block_size, self._max_rows = block_size, max_rows
        self._target, self._adapter = target, adapter
        self._stale = False

    def serve(self, claims: Sequence[Claim], stale: bool) -> list[Claim]:
        """Serve the claims of a step; those that came to nothing.

        Args:
            stale: whether they were made for weights that are gone, so that nothing is loaded.
        """
        self._stale = stale
        self.ends = None if self.ends is None else {}
        failed: list[Claim] = []
        if self.states is not None:  # rows of such a model are not computed here
            for claim in claims:
                deadline = time.monotonic() + self._chunks.patience_s
                if self._load(Attempt(claim), deadline) != [] or not claim.planned:
                    failed.append(claim)
            return failed
        for group in in_groups(claims, self._max_rows, self.scratch):
            deadline = time.monotonic() + self._chunks.patience_s
            failed += self._serve([Attempt(claim) for claim in group], deadline)
        if self.ends is not None and any(claim.through for claim in claims):
            # A rank that ran the engine's forward alone would wait for the others in it.
            _, some_miss = on_any_rank([], len(self.ends) < len(claims))
            self.ends = {} if some_miss else self.ends
        return failed

    def take_ends(self, order: Sequence[str]) -> torch.Tensor | None:
        """Hidden states `[M, hidden]` of all that the step's forward is for, if they are known.

        Args:
            order: of requests in the engine's batch, by id.
        """
        found = self.ends
        if not found:
            return None
        self.ends = {}
        if found.keys() != {*order}:
            return None
        try:
            ends = found[order[0]] if len(order) == 1 else torch.cat([found[one] for one in order])
        except torch.OutOfMemoryError:
            if get_tp_group().world_size > 1:
                raise  # other ranks may have left the forward out
            logger.exception("lmc leaves the ends of %d requests to the engine", len(order))
            return None
        self.counts["rows_computed_to_the_end"] += len(ends)
        return ends

    def _serve(self, attempts: list[Attempt], deadline: float) -> list[Claim]:
        """Load and compute, and again what did not come; the claims that came to nothing."""
        failed: list[Claim] = []
        left = attempts
        while left:
            if self.scratch is not None:
                self.scratch.clear()
            begun: list[tuple[Attempt, Forward]] = []
            again: list[Attempt] = []
            for attempt in left:
                try:
                    if self._parted(attempt, deadline) and len(left) > 1:
                        again.append(attempt)
                        continue
                    forward = self._begin(attempt)
                    begun += [(attempt, forward)] if forward is not None else []
                except Exception as error:
                    again += self._anew(attempt, error, failed)
            try:
                outcomes = run_together([forward for _, forward in begun])
            except Exception as error:
                # Other ranks cannot be told in the midst of a layer.
                if len(begun) > 1 and get_tp_group().world_size == 1:
                    logger.exception("lmc computes %d claims one by one", len(begun))
                    self.counts["claims_parted"] += len(begun)
                    for attempt, _ in begun:
                        failed += self._serve([attempt], deadline)
                    begun, outcomes = [], []
                else:
                    outcomes = [error] * len(begun)
            for (attempt, forward), outcome in zip(begun, outcomes, strict=True):
                try:
                    self._end(attempt, forward, outcome)
                except Exception as error:
                    again += self._anew(attempt, error, failed)
            left = again
            if self.scratch is not None and len(again) > 1:
                # Each by itself, since one that is computed whole may want all of the scratch.
                failed += [claim for one in again for claim in self._serve([one], deadline)]
                left = []
        return failed

    def _parted(self, attempt: Attempt, deadline: float) -> bool:
        """Load a claim; whether all of it must be computed, in parts that want all of the scratch.

        Then no other claim may have any of that.
        """
        if not attempt.whole:
            attempt.lost = self._load(attempt, deadline)
        if attempt.lost is None or attempt.whole:
            # Out of its tokens alone: what full prefill gives.
            attempt.whole, attempt.arriving, attempt.held, attempt.lost = True, None, [], None
        return attempt.whole and self.scratch is not None

    def _begin(self, attempt: Attempt) -> Forward | None:
        """What is left to be computed of a claim, rows of lost chunks among it."""
        claim, lost = attempt.claim, attempt.lost
        if lost is None:
            rows = np.arange(claim.start, claim.end, dtype=np.int64)
            forward = self._whole(attempt, rows)
            self._told.recomputed(claim.request_id, np.setdiff1d(rows, claim.rows))
            return forward
        claim, anew = with_lost(claim, lost)
        if lost:
            self._told.recomputed(claim.request_id, anew)
        if claim.through and self.ends is not None:
            claim = replace(claim, rows=np.union1d(claim.rows, np.arange(claim.end, claim.through)))
        if not claim.computes:
            return None
        most = at_most(claim, self._block_size)
        adapter = self._adapter(claim, most, attempt.arriving, self._windows(attempt, most))
        return Forward(adapter, claim.rows, claim.strategy, claim.outline)

    def _whole(self, attempt: Attempt, rows: np.ndarray) -> Forward:
        """All rows of a claim; where not all of what they see has room at once, the last of them,
        behind the others, which are computed now."""
        front: Windows | None = None
        parts = self.scratch.segments(attempt.claim) if self.scratch is not None else [rows]
        for i, part in enumerate(parts):
            windows = self._windows(attempt, part, front, i + 1 < len(parts))
            forward = Forward(self._adapter(attempt.claim, part, None, windows), part)
            if i + 1 < len(parts):
                forward.adapter.run(part)
                front = forward.adapter.windows
                assert self.scratch is not None and front is not None
                front.keep()
                self.scratch.clear()
        return forward

    def _end(self, attempt: Attempt, forward: Forward, outcome: Outcome | Exception) -> None:
        """The rows of a claim are computed: wait for what no row has waited for, and count."""
        if isinstance(outcome, Exception):
            raise outcome
        if attempt.arriving is not None:
            attempt.arriving.all()
            self.counts["bytes_loaded:behind"] += attempt.arriving.nbytes
        if (windows := forward.adapter.windows) is not None:
            self.counts["bytes_loaded:host"] += windows.nbytes
        self.counts["claims_computed"] += attempt.whole
        ending = forward.forced >= attempt.claim.end
        if ending.any() and self.ends is not None:
            last = torch.from_numpy(np.flatnonzero(outcome.rows[-1] >= attempt.claim.end))
            try:
                state = tuple(part[last.to(part.device)] for part in outcome.state)
                self.ends[attempt.claim.request_id] = forward.adapter.decoder.end(state)
            except Exception:  # the claim itself is served; the engine computes what is behind it
                logger.exception("lmc leaves the end of %s to the engine", attempt.claim.request_id)
        self.counts["rows_computed"] += int((~ending).sum())
        self.counts["row_layers_selected"] += sum(len(chosen) for chosen in outcome.selected)
        self.counts["row_layers_probed"] += outcome.probe
        if outcome.probe and forward.adapter.reach < len(forward.adapter.tokens):
            self.counts["probes_cut_short"] += 1

    def _anew(self, attempt: Attempt, error: Exception, failed: list[Claim]) -> list[Attempt]:
        """The attempt, if another one may do better; else its claim has failed."""
        request_id = attempt.claim.request_id
        if isinstance(error, LostError):
            self._lose([error.load])
            attempt.late.append(error.load)
            return [attempt]
        agreed = isinstance(error, NotReadyError) or get_tp_group().world_size == 1
        if attempt.whole or not agreed:
            logger.error("lmc could not serve its claim on %s", request_id, exc_info=error)
            failed.append(attempt.claim)
            return []
        logger.error("lmc computes all of its claim on %s", request_id, exc_info=error)
        attempt.whole = True
        return [attempt]

    def _load(self, attempt: Attempt, deadline: float) -> list[ChunkLoad] | None:
        """Put chunks into the request's pages; those that are lost.

        All ranks come to the same answer; where one of them cannot load at all, it is that all
        rows must be computed: None.
        """
        claim, missing = attempt.claim, list(attempt.late)
        attempt.arriving = None
        failed = self._stale
        if not failed:
            try:
                missing += self._place(attempt, deadline)
            except Exception:
                logger.exception("lmc could not load chunks of %s", claim.request_id)
                failed = True
        somewhere, failed = on_any_rank([load.slot for load in missing], failed)
        if failed:
            return None
        self._lose(missing[len(attempt.late) :])
        return [load for load in claim.needs if load.slot in somewhere]

    def _place(self, attempt: Attempt, deadline: float) -> list[ChunkLoad]:
        """Put what is there into the pages; what is missing and was not known to be."""
        claim = attempt.claim
        # Layers may come while rows are computed; all ranks must know first what is lost.
        alone = get_tp_group().world_size == 1 and self.scratch is None
        known = {load.slot for load in attempt.late}
        loads = [load for load in claim.loads if load.slot not in known]
        found = find(self._chunks, loads, alone and claim.computes, deadline)
        target, memory = self._target(claim.blocks), self._chunks.memory
        attempt.held = found.held
        if found.held:
            self.counts["bytes_loaded:host"] += Placement(found.held, memory, target).put()
        for group, (load, block) in enumerate(claim.states):
            assert self.states is not None
            found.missing.extend(find(self._chunks, [load], False, deadline).missing)
            with memory.reading(load.slot) as parts:
                if parts is not None:
                    self.states.write(group, block, parts)
                    self.counts["bytes_loaded:host"] += sum(part.nbytes for part in parts)
        if found.arriving:
            attempt.arriving = LayeredLoad(found.arriving, memory, target, deadline)
        return found.missing

    def _windows(
        self,
        attempt: Attempt,
        rows: np.ndarray,
        front: Windows | None = None,
        followed: bool = False,
    ) -> MakeWindows | None:
        """What makes what these rows of a claim see in layers with windows, if it must be made."""
        if self.scratch is None:
            return None
        claim, memory = attempt.claim, self._chunks.memory
        lost = {load.slot for load in attempt.late}
        held = [one for one in attempt.held if one[0].slot not in lost]
        of_claim = (self._target(claim.blocks), claim, held, memory, rows, front, followed)
        return partial(Windows, self.scratch, *of_claim)

    def _lose(self, loads: list[ChunkLoad]) -> None:
        """Tell the scheduler what is not there."""
        # A fetch that is still under way has been waited for in vain.
        late = any(self._chunks.arrival(load.slot) for load in loads)
        self._told.lost([load.slot for load in loads], late)


def in_groups(
    claims: Sequence[Claim], max_rows: int, scratch: Scratch | None = None
) -> Iterator[list[Claim]]:
    """Claims whose rows go through a layer in one call; one of more rows alone.

    What they see in layers with windows fits into `scratch`, if there is one.

    Hidden states of a whole group stay between layers, so that they take what the engine's own
    forward does, and no more. Rows under LoRA adapters and rows under none do not mix: where all
    are of the model itself vLLM leaves adapters out, and beside others its operations for CPUs
    apply an adapter to them (`lora/ops/torch_ops`: an index of -1 is the last one).
    """
    for adapted in (False, True):
        group: list[Claim] = []
        rows = pages = 0
        for claim in (claim for claim in claims if bool(claim.lora) == adapted):
            try:
                n = most_rows(claim.rows, claim.strategy, claim.outline)
            except Exception:  # of a strategy, which will fail again by itself
                n = max_rows
            seen = scratch.most(claim) if scratch else 0
            if group and (rows + n > max_rows or (scratch and pages + seen > scratch.pages)):
                yield group
                group, rows, pages = [], 0, 0
            group.append(claim)
            rows, pages = rows + n, pages + seen
        if group:
            yield group
