"""What the scheduler's side and the workers' side tell each other, once a step."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorWorkerMetadata,
)
from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorStats

from lmc.blend.evidence import Outline
from lmc.blend.strategy import Strategy
from lmc.connectors.vllm.metrics import in_short
from lmc.store import Record


class ChunkLoad(NamedTuple):
    """Tokens `[start, end)` of a request out of chunk `slot`.

    Attributes:
        at: the request's position of the chunk's first token.
        T: tokens of the whole chunk.
        delta: positions its keys move by; 0 leaves them as they are.
    """

    slot: int
    start: int
    end: int
    at: int
    T: int
    delta: int


@dataclass(frozen=True)
class Claim:
    """One request's claim: chunks to load, then rows to compute, into its own blocks.

    Attributes:
        start, end: tokens `[start, end)` are claimed; whole blocks lie before `start`.
        tokens: token ids, int64: `[end]` or `[through]`, or `[T]` with a strategy, whose probe runs
            the suffix.
        blocks: the request's block ids by KV cache group, in order; 0 where it has none.
        front: by group that keeps windows alone, those in front of `start` that vLLM still holds.
        rows: ascending positions that all layers compute.
        strategy: what chooses further rows while the request runs, if anything does.
        outline: the request as it sees it.
        lora: the LoRA adapter that rows are computed under, or 0.
        planned: whether this is what was planned, and not what is left when that failed.
        through: rows `[end, through)` may be computed as well, instead of by vLLM's own forward,
            which has no others in this step; 0 where it has.
        states: of layers that keep one in place of keys, those at `end`, by group of layers, and
            the block that they go to.
    """

    request_id: str
    start: int
    end: int
    tokens: np.ndarray
    blocks: list[list[int]]
    loads: list[ChunkLoad]
    rows: np.ndarray
    strategy: Strategy | None = None
    outline: Outline | None = None
    lora: int = 0
    front: Sequence[list[int]] = ()
    planned: bool = True
    through: int = 0
    states: Sequence[tuple[ChunkLoad, int]] = ()

    @property
    def needs(self) -> list[ChunkLoad]:
        """All that is loaded."""
        return [*self.loads, *(load for load, _ in self.states)]

    @property
    def computes(self) -> bool:
        """Whether rows of it are computed before the engine's own forward."""
        return len(self.rows) > 0 or self.strategy is not None


@dataclass(frozen=True)
class ChunkSave:
    """Tokens `[start, end)` of a request, to be kept as the chunk of `record`.

    Attributes:
        blocks: the request's, by KV cache group; none of these tokens' is 0.
        states: the group of layers whose states at `end` it is, which are in one block; None where
            it is keys and values.
    """

    record: Record
    request_id: str
    start: int
    end: int
    blocks: list[list[int]]
    states: int | None = None


@dataclass(frozen=True)
class Encode:
    """A text to be computed once more, alone, in blocks that no request owns.

    Attributes:
        tokens: token ids `[T]`, int64, from position 0 on.
        first: they are computed from here on, behind what is loaded.
        loads: chunks of the tokens before it.
        saves: what is kept, out of those blocks; at least one.
    """

    tokens: np.ndarray
    first: int
    loads: list[ChunkLoad]
    saves: list[ChunkSave]


@dataclass(frozen=True)
class WeightsTold:
    """What a worker says of its weights when they have changed.

    Attributes:
        changes: how often they have. step: in whose load it was noticed.
        version: which they are now: "" those of the model's files, else a name that the operator
            gave, or None when nobody can say.
    """

    changes: int
    step: int
    version: str | None


@dataclass
class StepMetadata(KVConnectorMetadata):
    """Scheduler to workers.

    Attributes:
        number: of the step.
        leaving: saves out of blocks that their requests have left already: copied before anything.
        reused: whether blocks that saves still read are anybody's from this step on.
        freed: slots whose bytes go; before this step's fetches, loads and saves.
        fetches: records that a tier behind host memory has, to be brought into their slots.
        claims: in order of admission, each complete before the step's forward.
        saves: copied out after the forward.
        encodes: computed and copied out after the forward; `encodes_left` wait for later steps.
        forgiven: blocks that a claim failed on, and that no save reads from now on, but for this
            step's.
        weights: by rank, how many changes of its weights are known.
        adapters: by LoRA adapter, the digest of what it is taken for.
        look: whether weights must be looked at closely, since vLLM's own cache was reset.
        decodes: requests of the step that are in the midst of their answers.
    """

    number: int = 0
    freed: list[int] = field(default_factory=list)
    fetches: list[Record] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    leaving: list[ChunkSave] = field(default_factory=list)
    reused: bool = False
    saves: list[ChunkSave] = field(default_factory=list)
    encodes: list[Encode] = field(default_factory=list)
    encodes_left: int = 0
    forgiven: list[int] = field(default_factory=list)
    weights: dict[int, int] = field(default_factory=dict)
    adapters: dict[int, bytes] = field(default_factory=dict)
    look: bool = False
    decodes: int = 0


class Kept(NamedTuple):
    """A tier has taken or brought a chunk, on one rank."""

    tier: str
    rank: int
    record: Record


@dataclass
class WorkerReport(KVConnectorWorkerMetadata):
    """Workers to scheduler: what each rank stored, lost and recomputed for want of bytes.

    Attributes:
        saved: (slot, rank) of chunks that are held now.
        lost: slots that this rank does not hold although the index says so.
        ended: those of them, and of others, that no tier writes to any more.
        recomputed: positions, by request, computed because their chunk failed to load.
        late: whether a chunk was waited for in vain, so that a tier is slow or gone.
        failed: blocks of claims that failed: what is in them, and behind them, is of no use.
        weights: by rank, of those whose weights are not the ones that the step was made for.
        kept, removed: what tiers have taken or brought, and ids of what they have let go of; only
            where that is published.
        served: by request, seconds that its claim took: chunks loaded, and rows computed.
        adapters: by LoRA adapter that a rank has loaded, its digest, or why there is none.
        hellos: by rank, in its first report: beside another connector vLLM's handshake is that
            one's.
    """

    saved: list[tuple[int, int]] = field(default_factory=list)
    lost: list[int] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)
    recomputed: dict[str, list[int]] = field(default_factory=dict)
    late: bool = False
    failed: set[int] = field(default_factory=set)
    weights: dict[int, WeightsTold] = field(default_factory=dict)
    kept: list[Kept] = field(default_factory=list)
    removed: list[tuple[str, bytes]] = field(default_factory=list)
    served: dict[str, float] = field(default_factory=dict)
    adapters: dict[int, bytes | str] = field(default_factory=dict)
    hellos: dict[int, WorkerHello] = field(default_factory=dict)

    def aggregate(self, other: KVConnectorWorkerMetadata) -> WorkerReport:
        assert isinstance(other, WorkerReport)
        return WorkerReport(
            self.saved + other.saved,
            self.lost + other.lost,
            self.ended + other.ended,
            self.recomputed | other.recomputed,  # every rank recomputes the same rows
            self.late or other.late,
            self.failed | other.failed,
            self.weights | other.weights,
            self.kept + other.kept,
            self.removed + other.removed,
            self.served | other.served,  # ranks wait for each other
            self.adapters | other.adapters,  # of one that ranks disagree on, each refuses the other
            self.hellos | other.hellos,
        )


@dataclass
class WorkerHello(KVConnectorHandshakeMetadata):
    """Workers to scheduler, once, after start-up.

    Attributes:
        refusal: why rows cannot be recomputed on this worker, or None.
        kv_refusal: why its pages cannot even be read, so that nothing is stored or reused.
        watched: whether it notices when its weights change.
        computes: whether it computes rows at all, if only in place of chunks that are lost.
        ahead: whether claims are brought before vLLM computes anything of their requests, so that
            one that is lost is just not there.
    """

    refusal: str | None
    kv_refusal: str | None = None
    watched: bool = False
    computes: bool = False
    ahead: bool = False

    @classmethod
    def of_all(cls, hellos: list[WorkerHello], overlaps: bool) -> WorkerHello:
        """What holds for all ranks together; `overlaps`: whether steps are scheduled ahead."""
        refusal = next((h.refusal for h in hellos if h.refusal), None)
        kv_refusal = next((h.kv_refusal for h in hellos if h.kv_refusal), None)
        computes = bool(hellos) and all(h.computes for h in hellos)
        ahead = bool(hellos) and all(h.ahead for h in hellos)
        if overlaps and not (computes or ahead) and kv_refusal is None:
            kv_refusal = (
                "with async scheduling vLLM cannot take back what was computed over a chunk that "
                f"is lost, and rows cannot be computed in its place: {refusal}"
            )
        watched = bool(hellos) and all(h.watched for h in hellos)
        return cls(refusal, kv_refusal, watched, computes, ahead)


class Observed(dict[str, Counter[float]]):
    """Values that were observed, by name, and how often each.

    They are kept to three digits: so there are never more than some thousands of a name, however
    many requests come in one step.
    """

    def add(self, name: str, value: float) -> None:
        """One more of a name."""
        self.setdefault(name, Counter())[float(f"{value:.3g}")] += 1


@dataclass
class LMCStats(KVConnectorStats):
    """What happened since the last report, and how things stand: for vLLM's log and `/metrics`.

    `data` is plain, since it goes through msgpack. `counts`: by name, how often or how much.
    `observed`: by name and value, how often. `levels`: by name and rank, how much there is now.
    """

    data: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        counts: Mapping[str, float],
        observed: Observed | None = None,
        levels: Mapping[str, float] | None = None,
        rank: int = 0,
    ) -> LMCStats:
        """The report of one rank, or of the scheduler's side."""
        data = {
            "counts": dict(counts),
            "observed": {name: dict(seen) for name, seen in (observed or {}).items()},
            "levels": {name: {str(rank): n} for name, n in (levels or {}).items()},
        }
        return cls({part: of for part, of in data.items() if of})

    def reset(self) -> None:
        self.data.clear()

    def aggregate(self, other: KVConnectorStats) -> LMCStats:
        for part, of in other.data.items():
            mine = self.data.setdefault(part, {})
            for name, value in of.items():
                if part == "counts":
                    mine[name] = mine.get(name, 0) + value
                elif part == "levels":
                    mine[name] = {**mine.get(name, {}), **value}
                else:
                    mine[name] = dict(Counter(mine.get(name, {})) + Counter(value))
        return self

    def reduce(self) -> dict[str, Any]:
        return in_short(self.data)

    def is_empty(self) -> bool:
        return not self.data
