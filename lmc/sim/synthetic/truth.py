"""What of a synthetic trace is reusable, known from how it was made."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator

from lmc.sim.kinds import KINDS
from lmc.sim.trace import Request


class Truth:
    """Tokens of each of `lmc.sim.kinds.KINDS`, by the segments of requests alone.

    The texts of a synthetic trace are drawn at random and stand whole in its prompts. So a segment
    is `prefix` where an earlier prompt began with the same segments up to its end, `moved` where an
    earlier prompt had it anywhere, `repeated_within` where only this prompt had it further in
    front, and otherwise `new`. What agrees by chance is left out, and so is what an edited file has
    in common with itself before.
    """

    def __init__(self) -> None:
        self.tokens: Counter[str] = Counter(dict.fromkeys(KINDS, 0))
        self._begun: set[bytes] = set()
        self._had: set[bytes] = set()

    def watch(self, requests: Iterable[Request]) -> Iterator[Request]:
        """The same requests, counted as they pass.

        Raises ValueError for one without token ids, or whose segments leave some of them out.
        """
        for r in requests:
            whole = sum(end - start for _, start, end in r.segments) == r.input_tokens
            if r.tokens is None or not whole:
                raise ValueError("truth: got a request whose segments are not all of its token ids")
            front, here, text = True, set(), hashlib.blake2b()
            for _, start, end in r.segments:
                segment = r.tokens[start:end].tobytes()
                text.update(segment)
                begun, own = text.digest(), hashlib.blake2b(segment).digest()
                front = front and begun in self._begun
                if front:
                    kind = "prefix"
                elif own in self._had:
                    kind = "moved"
                else:
                    kind = "repeated_within" if own in here else "new"
                self.tokens[kind] += end - start
                here.add(own)
                self._begun.add(begun)
            self._had |= here
            yield r

    @property
    def shares(self) -> dict[str, float]:
        """Of all tokens."""
        total = max(1, self.tokens.total())
        return {kind: n / total for kind, n in self.tokens.items()}
