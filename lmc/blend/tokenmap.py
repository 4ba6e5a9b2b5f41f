"""The token map of one request: of every token what became of it, from where, and why not better.

Linear in the prompt: one look-up for each chunk that was not found, and one pass over the tokens
for text that was cut elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from lmc.blend.plan import KINDS, Plan
from lmc.chunking.pieces import Piece
from lmc.store.causes import CAUSES, told
from lmc.store.history import WINDOW, History
from lmc.store.lookup import Known

NAMES = ("", *CAUSES)
PLACE = {name: i for i, name in enumerate(NAMES)}


class MapRun(NamedTuple):
    """Tokens `[start, end)` of a prompt that fared alike.

    Attributes:
        kind: one of `lmc.blend.plan.KINDS`.
        tier: where their bytes came from, where the store had them loaded.
        cause: one of `lmc.store.causes.CAUSES`, of all that is `new` or `recomputed`.
    """

    start: int
    end: int
    kind: str
    tier: str | None
    cause: str | None


@dataclass(frozen=True)
class Circumstances:
    """What a plan does not say of itself.

    Attributes:
        unmoved: why nothing was moved at all, or None: `gate`, `engine` or `strategy`.
        silent: whether a tier did not say what it has.
        blended_from: the first of the engine's own tokens whose KV is not exact, or None.
        tiers: by slot, the tier that its bytes came from; host memory's are not in it.
    """

    unmoved: str | None = None
    silent: bool = False
    blended_from: int | None = None
    tiers: Mapping[int, str] | None = None


def token_map(
    plan: Plan,
    tokens: np.ndarray,
    pieces: Sequence[Piece],
    known: Known,
    history: History,
    about: Circumstances,
) -> list[MapRun]:
    """Runs that cover tokens [T], in order; the fewest there can be.

    Of each kind they have as many tokens as `plan.kinds` says, but that rows which a selective
    strategy takes layer by layer are `moved` here, with the cause `chosen_by_layer`.

    Args:
        plan: of the request, as it was admitted.
        pieces: the chunks that it was planned with.
        known: what its namespace has.
    """
    T, local = plan.T, plan.local
    kinds = np.full(T, KINDS.index("new"), np.uint8)
    causes, tiers = np.zeros(T, np.uint8), np.zeros(T, np.uint8)
    blended = local if about.blended_from is None else min(local, about.blended_from)
    kinds[:blended], kinds[blended:local] = KINDS.index("local"), KINDS.index("local_blended")
    names: list[str | None] = [None, "host"]
    by_layer = PLACE["chosen_by_layer"] if plan.selective else 0
    for found in plan.found:
        here = slice(found.start, found.end)
        kinds[here] = KINDS.index(found.kind)
        name = (about.tiers or {}).get(found.record.slot, "host")
        if name not in names:
            names.append(name)
        tiers[here] = names.index(name)
    for start, end in plan.moved if by_layer else ():
        causes[start:end] = by_layer
    _computed_again(plan, about, kinds, causes)
    borders = np.array([(start, end) for start, end, _ in pieces], np.int64).reshape(-1, 2)
    new = kinds == KINDS.index("new")
    missed = _missed(new, borders, tokens, known, history, about)
    causes[new] = np.repeat(missed, borders[:, 1] - borders[:, 0])[new]
    alike = kinds.astype(np.uint32) << 16 | causes.astype(np.uint32) << 8 | tiers
    ends = [0, *(np.flatnonzero(alike[1:] != alike[:-1]) + 1).tolist(), T]
    return [
        MapRun(start, end, KINDS[kinds[start]], names[tiers[start]], NAMES[causes[start]] or None)
        for start, end in pairwise(ends)
    ]


def unplanned(T: int, local: int, cause: str) -> list[MapRun]:
    """The map of T tokens that nothing was planned for; the engine had `local` of them."""
    runs = [MapRun(0, local, "local", None, None), MapRun(local, T, "new", None, cause)]
    return [run for run in runs if run.start < run.end]


def for_client(runs: Sequence[MapRun]) -> list[MapRun]:
    """The map as its client may have it, who must not tell what other salts have stored.

    Not by where runs end either: what is told alike is one run.
    """
    out: list[MapRun] = []
    for run in runs:
        run = run._replace(cause=told(run.cause))
        if out and out[-1][2:] == run[2:]:
            run = run._replace(start=out.pop().start)
        out.append(run)
    return out


def with_lost(runs: Sequence[MapRun], rows: np.ndarray) -> list[MapRun]:
    """The same map when rows [M] were computed since their chunk did not come."""
    of = np.repeat(np.arange(len(runs)), [run.end - run.start for run in runs])
    of[rows] = -1
    borders = [0, *(np.flatnonzero(of[1:] != of[:-1]) + 1).tolist(), len(of)]
    return [
        MapRun(start, end, "recomputed", None, "lost")
        if of[start] < 0
        else runs[of[start]]._replace(start=start, end=end)
        for start, end in pairwise(borders)
    ]


def _computed_again(
    plan: Plan, about: Circumstances, kinds: np.ndarray, causes: np.ndarray
) -> None:
    """Mark what was found and is computed all the same, and why."""
    again = KINDS.index("recomputed")
    kinds[plan.chosen], causes[plan.chosen] = again, PLACE["chosen"]
    for start, end in plan.moved:
        rest = np.flatnonzero(causes[start:end] != PLACE["chosen"])
        if len(rest):
            causes[start : start + int(rest[0])] = PLACE["boundary"]
    for start, end in plan.beyond:
        kinds[start:end] = again
        unused = about.unmoved if about.unmoved == "engine" else "not_worth"
        causes[start:end] = PLACE[unused]
        if plan.end == plan.T - 1 == start:
            causes[start:end] = PLACE["last_token"]


def _missed(
    new: np.ndarray,
    borders: np.ndarray,
    tokens: np.ndarray,
    known: Known,
    history: History,
    about: Circumstances,
) -> np.ndarray:
    """`[P]` places in `NAMES`: why some token of each piece was not found; 0 where all were.

    Args:
        new: `[T]` the tokens that were not. borders: `[P, 2]` of the pieces.
    """
    causes = np.zeros(len(borders), np.uint8)
    before = np.concatenate([[0], np.cumsum(new)])
    lacking = np.flatnonzero(before[borders[:, 1]] > before[borders[:, 0]])
    ids = np.ascontiguousarray(tokens, "<i8").tobytes()
    contents = [ids[a:b] for a, b in (8 * borders[lacking]).tolist()]
    unused = known.unused(contents, about.unmoved is None)
    namespace, seen = known.namespace, set[bytes]()
    elsewhere: list[bool] | None = None
    for i, content, cause in zip(lacking.tolist(), contents, unused, strict=True):
        if cause == "unmoved":
            cause = about.unmoved
        if cause is None:
            cause = "tier_silent" if about.silent else history.own(namespace, content)
        if cause is None and content in seen:
            cause = "repeated_within"
        if cause is None:
            if elsewhere is None:
                elsewhere = _cut_elsewhere(tokens, borders, namespace, history).tolist()
            cause = "cut_elsewhere" if elsewhere[i] else None
        # Last: what clients are told must not depend on what those of other salts stored.
        if cause is None and history.of_others(namespace, content):
            cause = "other_salt"
        causes[i] = PLACE[cause or "never_seen"]
        seen.add(content)
    return causes


def _cut_elsewhere(
    tokens: np.ndarray, borders: np.ndarray, namespace: bytes, history: History
) -> np.ndarray:
    """Whether more than half of the windows sampled in each piece were stored before.

    borders: `[P, 2]` -> `[P]` bool.
    """
    starts, known = history.seen(namespace, tokens)
    first = np.searchsorted(starts, borders[:, 0])
    last = np.searchsorted(starts, borders[:, 1] - WINDOW, "right")
    last = np.maximum(first, last)
    count = np.concatenate([[0], np.cumsum(known)])
    found: np.ndarray = 2 * (count[last] - count[first]) > last - first
    return found


def tokens_by(runs: Sequence[MapRun], field: str) -> dict[str, int]:
    """Tokens of each kind, cause or tier that occurs, in order of appearance."""
    found: dict[str, int] = {}
    for run in runs:
        if (name := getattr(run, field)) is not None:
            found[name] = found.get(name, 0) + run.end - run.start
    return found
