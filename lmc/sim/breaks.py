"""Where prompts part from those before them, and what a prefix cache computes again behind it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from lmc.model.times import TTFTModel, prefill_work
from lmc.sim.reuse import PrefixTree
from lmc.sim.trace import Request
from lmc.sim.windows import WindowSet, covered, window_hashes

GRAIN = 32  # tokens; what parts so close together, as the digits of a clock, is one place
EXAMPLES = 3
SHOWN = 12  # tokens of an example


@dataclass(eq=False)
class Break:
    """A place behind which prompts had text that earlier ones had behind other text.

    Attributes:
        at: tokens in front of it, the fewest of its prompts.
        part: the segment that it lies in, "" where the trace names none.
        requests: prompts that parted here.
        tokens: that were computed again, by cause: `other_order`, what comes next had been there
            too, elsewhere; `changed_prefix`, something new comes next, and then what had.
        seconds: that computing them took, by a time model; 0 without one.
        before: ids right in front, at most `SHOWN`. examples: ids of different ways on.
    """

    at: int
    part: str
    requests: int = 0
    tokens: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    before: Sequence[int] = ()
    examples: list[list[int]] = field(default_factory=list)


def breaks(
    requests: Iterable[Request], *, times: TTFTModel | None = None, window: int = 64
) -> list[Break]:
    """All places of a trace, the costliest first.

    A token counts as one that was there if any window of `window` tokens that it lies in was.

    Args:
        requests: with token ids, in order of arrival.
        times: says what computing takes.

    Raises:
        ValueError: a request without token ids, or a window below 1.
    """
    if window < 1:
        raise ValueError(f"got window {window}, want at least 1 token")
    tree, seen = PrefixTree(), WindowSet()
    places: dict[bytes, Break] = {}
    for r in requests:
        if r.tokens is None:
            raise ValueError("where prompts part shows in text or token ids alone")
        at = tree.add(r.tokens)
        hashes = window_hashes(r.tokens, window)
        known = seen.known(hashes)
        lost = int(covered(known, window, len(r.tokens))[at:].sum())
        seen.add(hashes)
        if not lost:
            continue
        place = hashlib.blake2b(r.tokens[: at // GRAIN * GRAIN].tobytes()).digest()
        if place not in places:
            part = next((name for name, start, end in r.segments if start <= at < end), "")
            places[place] = Break(at, part, before=r.tokens[max(0, at - SHOWN) : at].tolist())
        found = places[place]
        found.at = min(found.at, at)
        found.requests += 1
        found.tokens["other_order" if known[at : at + 1].any() else "changed_prefix"] += lost
        if times is not None:
            with_it, without = (
                times.seconds(*prefill_work(len(r.tokens), held), np.zeros(len(times.tiers)))
                for held in (at, at + lost)
            )
            found.seconds += float(with_it - without)
        on = r.tokens[at : at + SHOWN].tolist()
        if len(found.examples) < EXAMPLES and on not in found.examples:
            found.examples.append(on)
    return sorted(places.values(), key=lambda b: (-b.seconds, -b.tokens.total(), b.at))
