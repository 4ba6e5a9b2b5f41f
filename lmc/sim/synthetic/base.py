"""What makes a trace: random numbers, texts of them, and requests whose prompts are such texts."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from lmc.sim.trace import Request

# Streams of random numbers that do not depend on each other: a longer trace begins as a shorter
# one does, and a document is the same in every trace of one seed.
ARRIVALS, PROMPTS, SYSTEM, DOCUMENTS, OTHERS = range(5)


@dataclass(frozen=True)
class Synthetic:
    """What all generators share.

    Token ids are uniform in `[0, vocabulary)`. Lengths are lognormal around the mean that is
    named, `spread` being the deviation of their logarithm; 0 makes them all equal.
    """

    seed: int = 0
    vocabulary: int = 32_000
    spread: float = 0.5

    def __post_init__(self) -> None:
        self._at_least(0, "seed", "spread")
        self._at_least(1, "vocabulary")
        if self.vocabulary > 1 << 31:
            raise ValueError(f"got vocabulary {self.vocabulary}, want at most {1 << 31}")

    def _at_least(self, least: int, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if not least <= value < math.inf:
                raise ValueError(f"got {name} {value}, want a number of at least {least}")

    def _above_zero(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"got {name} {value}, want a number above 0")

    def _shares(self, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"got {name} {value}, want a share from 0 to 1")

    def _at_most(self, name: str, most: str) -> None:
        value, limit = getattr(self, name), getattr(self, most)
        if value > limit:
            raise ValueError(f"got {name} {value}, want at most {most} {limit}")

    def _random(self, *stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *stream])

    def _arrivals(self, n: int, per_second: float) -> list[float]:
        """n arrivals of a Poisson process, in seconds."""
        return np.cumsum(self._random(ARRIVALS).exponential(1 / per_second, n)).tolist()

    def _interleaved(
        self, n: int, per_second: float, session: Callable[[int, float], Iterator[Request]]
    ) -> Iterator[Request]:
        """The requests of n sessions, each made of its number and when it begins, by time."""
        begins = self._arrivals(n, per_second)
        sessions = (session(number, at) for number, at in enumerate(begins))
        return heapq.merge(*sessions, key=lambda r: r.timestamp)

    def _length(self, random: np.random.Generator, mean: float) -> int:
        return max(1, round(random.lognormal(math.log(mean) - self.spread**2 / 2, self.spread)))

    def _text(self, random: np.random.Generator, mean: float) -> np.ndarray:
        """[T] int32, T around the mean."""
        n = self._length(random, mean)
        return random.integers(0, self.vocabulary, n, dtype=np.int32)

    def _fixed_text(self, tokens: int, *stream: int) -> np.ndarray:
        """[tokens] int32."""
        return self._random(*stream).integers(0, self.vocabulary, tokens, dtype=np.int32)

    def _drawn(self, random: np.random.Generator, n: int, k: int, zipf: float) -> list[int]:
        """k different ones of n, each with a weight of its rank to the power of -zipf."""
        # Gumbel-max: the k largest are k draws without replacement by weight.
        scores = -zipf * np.log(np.arange(1, n + 1)) + random.gumbel(size=n)
        return np.argsort(-scores)[:k].tolist()

    def _document(self, number: int, mean: float) -> np.ndarray:
        """[T] int32, the same in every trace of one seed."""
        return self._text(self._random(DOCUMENTS, number), mean)


def request_of(
    at: float, session: str, output_tokens: int, parts: Sequence[tuple[str, np.ndarray]]
) -> Request:
    """A request whose prompt is the parts, one behind the other; empty ones have no segment."""
    segments, end = [], 0
    for name, text in parts:
        if len(text):
            segments.append((name, end, end + len(text)))
            end += len(text)
    tokens = np.concatenate([text for _, text in parts])
    return Request(at, session, len(tokens), output_tokens, tokens=tokens, segments=segments)
