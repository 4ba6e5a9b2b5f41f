"""Where prompts part from those before them, and what a prefix cache computes again behind it."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from lmc.model.times import TTFTModel
from lmc.sim.reuse import PrefixTree
from lmc.sim.trace import Request
from lmc.sim.windows import WindowSet, covered, window_hashes

GRAIN = 32  # tokens; what parts so close behind, as the digits of a clock, is the same place
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
        texts: digests of all that stands in front of each of the tokens before it.
    """

    at: int
    part: str
    requests: int = 0
    tokens: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    before: Sequence[int] = ()
    examples: list[list[int]] = field(default_factory=list)
    texts: Sequence[bytes] = field(default=(), repr=False)


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
        lost = at + np.flatnonzero(covered(known, window, len(r.tokens))[at:])
        seen.add(hashes)
        if not len(lost):
            continue
        found = _place(places, r, at)
        found.at = min(found.at, at)
        found.requests += 1
        cause = "other_order" if known[at : at + 1].any() else "changed_prefix"
        found.tokens[cause] += len(lost)
        if times is not None:
            # A row attends to all keys in front of it, and to itself.
            pairs = int((lost + 1).sum())
            found.seconds += times.per_row_s * len(lost) + times.per_pair_s * pairs
        on = r.tokens[at : at + SHOWN].tolist()
        if len(found.examples) < EXAMPLES and on not in found.examples:
            found.examples.append(on)
    for place, found in list(places.items()):
        # One that was found first, and goes on where a shorter one ends: minutes behind an hour.
        shorter = next((places[d] for d in found.texts if d in places), None)
        if shorter is not None:
            shorter.requests += found.requests
            shorter.tokens.update(found.tokens)
            shorter.seconds += found.seconds
            del places[place]
    return sorted(places.values(), key=lambda b: (-b.seconds, -b.tokens.total(), b.at))


def _place(places: dict[bytes, Break], r: Request, at: int) -> Break:
    """The place at which a prompt parts: one that is there within `GRAIN` tokens, or a new one."""
    assert r.tokens is not None
    first = max(0, at - GRAIN + 1)
    text = hashlib.blake2b(r.tokens[:first].tobytes())
    texts = [text.digest()]  # in front of each token from there on
    for end in range(first + 1, at + 1):
        text.update(r.tokens[end - 1 : end].tobytes())
        texts.append(text.digest())
    if known := [places[here] for here in texts if here in places]:
        return known[0]
    part = next((name for name, start, end in r.segments if start <= at < end), "")
    before = r.tokens[max(0, at - SHOWN) : at].tolist()
    return places.setdefault(texts[-1], Break(at, part, before=before, texts=texts[:-1]))
