"""The report of one request, checked: out of a response, or out of a recorded trace."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lmc.blend.plan import KINDS
from lmc.blend.tokenmap import MapRun
from lmc.model.times import TTFTModel, prefill_work
from lmc.registry import one_line
from lmc.sim.readers.files import DAMAGED, files_of, opened
from lmc.sim.readers.records import Broken, RecordError, json_lines
from lmc.store.causes import CAUSES

COMPUTED = ("new", "recomputed")


class Report(BaseModel):
    """What a request's report says, as far as it is explained; further keys are let be.

    Attributes:
        prompt_tokens: T. kinds: tokens of each kind, which add up to T.
        map: runs `[start, end, kind, tier, cause]`, which cover `[0, T)` in order.
        compute_fraction: row-layers computed of all.
        seconds: measured, what lmc took, by name.
        request: its id, where a trace has it. time: of its arrival, seconds.

    Raises ValidationError, a ValueError, for anything else.
    """

    model_config = ConfigDict(extra="ignore", frozen=True)

    prompt_tokens: int = Field(ge=1)
    kinds: dict[str, int]
    map: list[MapRun]
    compute_fraction: float = Field(ge=0, allow_inf_nan=False)
    strategy: str | None = None
    reason: str | None = None
    bytes: dict[str, int] = Field(default_factory=dict)
    seconds: dict[str, float] = Field(default_factory=dict)
    request: str | None = None
    time: float | None = None
    output_tokens: int | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Report:
        at = 0
        for start, end, kind, _, cause in self.map:
            if start != at or end <= start:
                raise ValueError(f"map: got [{start}, {end}) behind {at}, want runs without gaps")
            if kind not in KINDS:
                raise ValueError(f"map: got kind {kind!r:.60}; valid: {', '.join(KINDS)}")
            if cause is not None and cause not in CAUSES:
                raise ValueError(f"map: got cause {cause!r:.60}; valid: {', '.join(CAUSES)}")
            at = end
        if at != self.prompt_tokens:
            raise ValueError(f"map: ends at {at}, want {self.prompt_tokens}, the prompt's tokens")
        if unknown := [kind for kind in self.kinds if kind not in KINDS]:
            raise ValueError(f"kinds: got {unknown[0]!r:.60}; valid: {', '.join(KINDS)}")
        if not all(math.isfinite(s) for s in self.seconds.values()):
            raise ValueError("seconds: want finite numbers")
        return self

    def computed(self) -> tuple[float, float]:
        """Rows computed, as many whole ones, and the (row, key) pairs that they attend to.

        Of rows that are chosen layer by layer only how many is known: they count as evenly spread.
        """
        chosen = self.kinds.get("recomputed", 0) - sum(
            end - start for start, end, kind, *_ in self.map if kind == "recomputed"
        )
        spread = sum(r.end - r.start for r in self.map if r.cause == "chosen_by_layer")
        rows = pairs = 0.0
        for start, end, kind, _, cause in self.map:
            if kind in COMPUTED:
                share = 1.0
            elif cause == "chosen_by_layer":
                share = max(chosen, 0) / spread
            else:
                continue
            rows += share * (end - start)
            pairs += share * (end - start) * (end + start + 1) / 2
        return rows, pairs

    def loaded(self) -> dict[str, int]:
        """Tokens by the tier that they were loaded from; rows computed again had been, too."""
        found: dict[str, int] = {}
        for start, end, _, tier, _ in self.map:
            if tier is not None:
                found[tier] = found.get(tier, 0) + end - start
        return found


@dataclass(frozen=True)
class Estimate:
    """Seconds to the first token by a time model, on an engine that does nothing else.

    Attributes:
        full: all computed. engine: with what the engine's own prefix cache had, and without lmc.
        lmc: as it was. times: of which model and machine they are.
    """

    full: float
    engine: float
    lmc: float
    times: str

    @property
    def saved(self) -> float:
        """What lmc saved beside the engine's own cache; below 0 where it cost."""
        return self.engine - self.lmc


def estimate(report: Report, times: TTFTModel) -> Estimate:
    """What a request took and saved, by a time model (`lmc fit`): of no clock.

    Raises:
        ValueError: bytes came from a tier that the model does not know.
    """
    names = [tier.name for tier in times.tiers]
    loaded = np.zeros(len(names))
    for tier, tokens in report.loaded().items():
        if tier not in names:
            known = ", ".join(names) or "none"
            raise ValueError(f"times: the request loaded from {tier!r}; the model has: {known}")
        loaded[names.index(tier)] += tokens
    T = report.prompt_tokens
    local = sum(run.end - run.start for run in report.map if run.kind.startswith("local"))
    nothing = np.zeros(len(names))
    rows, pairs = report.computed()
    blends = any(run.kind in ("moved", "recomputed") for run in report.map)
    # The last token is always computed; where all is the engine's own, it is in no run.
    rows, pairs = (rows, pairs) if rows else (1.0, float(T))
    return Estimate(
        full=float(times.seconds(*prefill_work(T, 0), nothing)),
        engine=float(times.seconds(*prefill_work(T, local), nothing)),
        lmc=float(times.seconds(rows, pairs, loaded, blends)),
        times=times.origin,
    )


def report_in(raw: Any) -> Report:
    """The report in a response of the server, in its `kv_transfer_params`, or as it is.

    Raises:
        ValueError: there is none, or it is wrong.
    """
    found = raw
    for key in ("kv_transfer_params", "lmc"):
        if isinstance(found, Mapping) and key in found:
            found = found[key]
    if not isinstance(found, Mapping) or "kinds" not in found:
        raise ValueError(
            'got no report of lmc: want a response of the server, its kv_transfer_params["lmc"], '
            "or a recorded trace"
        )
    if found.get("map") is None:
        raise ValueError(
            "the report has no token map: send the request with "
            'kv_transfer_params {"lmc": {"explain": true}}'
        )
    try:
        return Report.model_validate(found)
    except ValidationError as error:
        raise ValueError(f"report: {one_line(error)}") from error


@dataclass
class Recording:
    """One request of a recorded trace, by its id or its number from 1 on; by default the last.

    Attributes:
        bad: lines that are none, the first of them in words; bad_count: how many.
    """

    path: Path
    bad: str | None = None
    bad_count: int = 0
    _number: int = field(default=0, repr=False)

    def find(self, wanted: str | None) -> Report:
        """Raises ValueError where there is no such request."""
        found: Any = None
        for record in self._records():
            self._number += 1
            if wanted is None or wanted in (record.get("request"), str(self._number)):
                found = record
                if wanted is not None and wanted == record.get("request"):
                    break
        if found is None:
            why = f"; {self.bad_count} lines are none: {self.bad}" if self.bad else ""
            what = "no request" if wanted is None else f"no request {wanted!r:.80}"
            raise ValueError(f"{self.path}: {what} among {self._number} recorded ones{why}")
        return report_in(found)

    def _records(self) -> Iterator[Mapping[str, Any]]:
        for file in files_of(self.path):
            line = 0
            try:
                with opened(file) as stream:
                    for line, record in json_lines(stream):
                        if isinstance(record, Mapping) and "lmc_trace" in record:
                            yield record
                        else:
                            broken = isinstance(record, Broken)
                            why = record.reason if broken else "no line of a recorded trace"
                            self._leave_out(file, line, why)
            except (*DAMAGED, RecordError) as e:
                self._leave_out(file, line + 1, " ".join(str(e).split()) or type(e).__name__)

    def _leave_out(self, file: Path, line: int, reason: str) -> None:
        self.bad_count += 1
        self.bad = self.bad or f"{file.name}:{line}: {reason}"
