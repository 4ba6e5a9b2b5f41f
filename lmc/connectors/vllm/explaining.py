"""What became of a request's tokens and why: for its client, if it asked, and for the operator."""

from __future__ import annotations

import time
from collections import Counter
from typing import Any

from lmc.blend.tokenmap import Circumstances, for_client, token_map, unplanned
from lmc.chunking.pieces import Piece
from lmc.connectors.vllm.config import LMCConfig
from lmc.connectors.vllm.planner import Planner
from lmc.connectors.vllm.reading import survive
from lmc.connectors.vllm.recorder import Entry, Recorder
from lmc.connectors.vllm.tracked import Tracked
from lmc.store.tier import taken

LONGEST = 128  # characters of a request's id in a trace: its client may have chosen it


class Explaining:
    """Makes token maps where somebody wants them, and records what finished.

    Raises:
        ValueError, OSError: a trace's folder that cannot be used.
    """

    def __init__(self, config: LMCConfig, planner: Planner) -> None:
        self._planner = planner
        self._recorder = Recorder(config.trace) if config.trace else None
        self._owed: dict[str, Tracked] = {}  # finished, before the workers said what they took

    def admitted(self, tracked: Tracked) -> None:
        """A request was let in, or ended before: map its tokens, as long as all is as it was."""
        asked = tracked.options is not None and tracked.options.explain
        if not asked and self._recorder is None:
            return
        if tracked.asked is not None:
            tracked.took("wait", time.monotonic() - tracked.asked)
        try:
            tracked.runs = self._runs(tracked)
        except BaseException as error:
            survive(error)

    def finished(self, tracked: Tracked) -> dict[str, Any] | None:
        """What the client of a finished request is told; its line is written."""
        if self._recorder is not None and tracked.reason != "disabled":
            request_id = tracked.request.request_id
            if (
                tracked.admitted is None
                or not tracked.admitted.claimed
                or "claim" in tracked.seconds
            ):
                self._record(tracked)
            else:
                self._owed[request_id] = tracked
        report, runs = tracked.report, tracked.runs
        if report is not None and tracked.handed_over:
            report = report | {"hand_over": tracked.handed_over}
        if report is None or tracked.options is None or not tracked.options.explain:
            return report
        said = None if runs is None else [list(run) for run in for_client(runs)]
        return report | {"map": said, "seconds": _rounded(tracked)}

    def stepped(self) -> None:
        """The workers have said what they had to say of those that finished."""
        owed, self._owed = self._owed, {}
        for tracked in owed.values():
            self._record(tracked)

    def take_counts(self) -> Counter[str]:
        """Counters since the last call."""
        if self._recorder is None:
            return Counter()
        return Counter({f"trace_{kind}": n for kind, n in taken(self._recorder.counts).items()})

    def close(self) -> None:
        """Write what is to be written."""
        self.stepped()
        if self._recorder is not None:
            self._recorder.close()

    def _runs(self, tracked: Tracked) -> Any:
        T, plan, options = tracked.request.num_prompt_tokens, tracked.admitted, tracked.options
        if options is None:
            return unplanned(T, tracked.local, "plain")
        if plan is None or plan.T != T:
            return unplanned(T, tracked.local, "not_begun")
        unmoved = "gate" if tracked.gate else "engine" if tracked.refusal else None
        if unmoved is None and not options.strategy.moves:
            unmoved = "strategy"
        about = Circumstances(
            unmoved=unmoved,
            silent=self._planner.silent(tracked),
            blended_from=tracked.blended_from,
            tiers=tracked.fetched,
        )
        history = self._planner.index.history
        assert history is not None
        known = self._planner.known(tracked)
        return token_map(plan, tracked.tokens, tracked.pieces, known, history, about)

    def _record(self, tracked: Tracked) -> None:
        assert self._recorder is not None
        try:
            self._recorder.put(_entry(tracked))
        except BaseException as error:
            survive(error)


def _rounded(tracked: Tracked) -> dict[str, float]:
    return {name: round(seconds, 6) for name, seconds in tracked.seconds.items()}


def _entry(tracked: Tracked) -> Entry:
    """What is recorded: no text, neither of a prompt nor of what its client said beside it."""
    request, report = tracked.request, tracked.report or {}
    T, reason = request.num_prompt_tokens, report.get("reason")
    line = {
        "time": request.arrival_time,
        "request": request.request_id[:LONGEST],
        "prompt_tokens": T,
        "output_tokens": request.num_output_tokens,
        "strategy": report.get("strategy"),
        "reason": reason and reason.partition(":")[0],
        "kinds": report.get("kinds"),
        "compute_fraction": report.get("compute_fraction"),
        "bytes": report.get("bytes"),
        "map": tracked.runs,
        "seconds": _rounded(tracked) | {"total": round(time.time() - request.arrival_time, 6)},
    }
    tokens = None if tracked.options is None else tracked.tokens[:T]
    pieces = [Piece(start, min(end, T)) for start, end, _ in tracked.pieces if start < T]
    return Entry(line, tracked.namespace, request.cache_salt or "", tokens, pieces)
