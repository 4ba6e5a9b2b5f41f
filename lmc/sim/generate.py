"""Synthetic traces with token ids: documents, conversations, and agents that read files again."""

from __future__ import annotations

import gzip
import heapq
import json
import lzma
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from lmc.registry import Registry
from lmc.sim.trace import Request

GENERATORS = Registry(
    "generator",
    {
        "agents": "lmc.sim.generate:Agents",
        "chat": "lmc.sim.generate:Chat",
        "rag": "lmc.sim.generate:Rag",
    },
    has=["requests"],
)

# Streams of random numbers that do not depend on each other: a longer trace begins as a shorter
# one does, and a document is the same in every trace of one seed.
ARRIVALS, PROMPTS, SYSTEM, DOCUMENTS = range(4)


@dataclass(frozen=True)
class _Synthetic:
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

    def _random(self, *stream: int) -> np.random.Generator:
        return np.random.default_rng([self.seed, *stream])

    def _arrivals(self, n: int, per_second: float) -> list[float]:
        """n arrivals of a Poisson process, in seconds."""
        return np.cumsum(self._random(ARRIVALS).exponential(1 / per_second, n)).tolist()

    def _length(self, random: np.random.Generator, mean: float) -> int:
        return max(1, round(random.lognormal(math.log(mean) - self.spread**2 / 2, self.spread)))

    def _text(self, random: np.random.Generator, mean: float) -> np.ndarray:
        """[T] int32, T around the mean."""
        n = self._length(random, mean)
        return random.integers(0, self.vocabulary, n, dtype=np.int32)

    def _fixed_text(self, tokens: int, *stream: int) -> np.ndarray:
        """[tokens] int32."""
        return self._random(*stream).integers(0, self.vocabulary, tokens, dtype=np.int32)


@dataclass(frozen=True)
class Rag(_Synthetic):
    """Questions about documents: a system prompt, some documents, then a question that is new.

    A document is drawn with a weight of its rank to the power of -zipf (Zipf), at most once a
    prompt. Its tokens depend on the seed and its number alone, so that two traces of one seed
    share documents.

    count: requests. rate: of them a second, in a Poisson process.
    reorder: documents come in the order they were drawn; False puts them in order of their
        numbers, so that prompts with the same ones share a prefix.
    system_tokens: exactly; document, question and output tokens: on average.
    """

    count: int = 300
    rate: float = 1.0
    documents: int = 200
    zipf: float = 1.0
    documents_per_prompt: int = 5
    reorder: bool = True
    system_tokens: int = 200
    document_tokens: float = 400
    question_tokens: float = 40
    output_tokens: float = 150

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(0, "zipf", "system_tokens", "documents_per_prompt")
        self._at_least(1, "count", "documents")
        self._at_least(1, "document_tokens", "question_tokens", "output_tokens")
        self._above_zero("rate")
        if self.documents_per_prompt > self.documents:
            raise ValueError(
                f"got documents_per_prompt {self.documents_per_prompt}, "
                f"want at most documents {self.documents}"
            )

    def requests(self) -> Iterator[Request]:
        """`count` requests, ascending in time, each a session of its own."""
        system = self._fixed_text(self.system_tokens, SYSTEM)
        logs = -self.zipf * np.log(np.arange(1, self.documents + 1))
        texts: dict[int, np.ndarray] = {}
        random = self._random(PROMPTS)
        for i, at in enumerate(self._arrivals(self.count, self.rate)):
            # Gumbel-max: the k largest are k draws without replacement by weight.
            scores = logs + random.gumbel(size=self.documents)
            drawn = np.argsort(-scores)[: self.documents_per_prompt]
            chosen: list[int] = (drawn if self.reorder else np.sort(drawn)).tolist()
            parts = [("system", system)]
            for number in chosen:
                if number not in texts:
                    texts[number] = self._text(
                        self._random(DOCUMENTS, number), self.document_tokens
                    )
                parts.append((f"document {number}", texts[number]))
            parts.append(("question", self._text(random, self.question_tokens)))
            yield _request(at, f"question {i}", self._length(random, self.output_tokens), parts)


@dataclass(frozen=True)
class Chat(_Synthetic):
    """Conversations: every turn's prompt is all that was said before, and something new.

    All share one system prompt. Sessions begin in a Poisson process and take turns as long as a
    geometric distribution says; between a prompt and the next lie `pause` seconds on average,
    exponentially distributed, the time to answer among them. So they are interleaved in time.

    rate: sessions that begin a second. turns: of a session, on average.
    system_tokens: exactly; user and output tokens: on average.
    """

    sessions: int = 60
    rate: float = 0.1
    turns: float = 5
    pause: float = 30.0
    system_tokens: int = 800
    user_tokens: float = 120
    output_tokens: float = 250

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(0, "system_tokens", "pause")
        self._at_least(1, "sessions", "turns", "user_tokens", "output_tokens")
        self._above_zero("rate")

    def requests(self) -> Iterator[Request]:
        """The requests of all sessions, ascending in time."""
        begins = self._arrivals(self.sessions, self.rate)
        return _interleaved(self._session(number, at) for number, at in enumerate(begins))

    def _session(self, number: int, at: float) -> Iterator[Request]:
        random = self._random(PROMPTS, number)
        said = [("system", self._fixed_text(self.system_tokens, SYSTEM))]
        for _ in range(random.geometric(1 / self.turns)):
            said.append(("user", self._text(random, self.user_tokens)))
            answer = self._text(random, self.output_tokens)
            yield _request(at, f"chat {number}", len(answer), said)
            said.append(("assistant", answer))
            at += random.exponential(self.pause)


@dataclass(frozen=True)
class Agents(_Synthetic):
    """Coding agents: every turn appends a call and what the tool answered, a file.

    A session works on its own copy of one repository and starts with a system prompt that all
    sessions share, and a task. A tool reads, with probability `reread`, a file that the session
    has read before, else one that it has not, as long as there is any. Between two readings the
    file is edited with probability `edit`: `edit_tokens` of its tokens, in one run, are new. Its
    length stays, and so do the copies of it that stand in the prompt already.

    sessions, rate, turns, pause: as of Chat.
    repositories, files: how many there are, and how many files each has. Tokens of a file that
        no one has edited depend on the seed and its number alone.
    system_tokens: exactly; task, call (the model's output) and file tokens: on average.
    """

    sessions: int = 40
    rate: float = 0.05
    turns: float = 10
    pause: float = 5.0
    repositories: int = 2
    files: int = 30
    reread: float = 0.3
    edit: float = 0.3
    edit_tokens: int = 8
    system_tokens: int = 1500
    task_tokens: float = 100
    call_tokens: float = 60
    file_tokens: float = 300

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(0, "system_tokens", "pause")
        self._at_least(1, "sessions", "turns", "repositories", "files", "edit_tokens")
        self._at_least(1, "task_tokens", "call_tokens", "file_tokens")
        self._above_zero("rate")
        self._shares("reread", "edit")

    def requests(self) -> Iterator[Request]:
        """The requests of all sessions, ascending in time."""
        begins = self._arrivals(self.sessions, self.rate)
        return _interleaved(self._session(number, at) for number, at in enumerate(begins))

    def _session(self, number: int, at: float) -> Iterator[Request]:
        random = self._random(PROMPTS, number)
        first = self.files * int(random.integers(self.repositories))
        unread = (first + random.permutation(self.files)).tolist()
        copies: dict[int, np.ndarray] = {}
        said = [
            ("system", self._fixed_text(self.system_tokens, SYSTEM)),
            ("task", self._text(random, self.task_tokens)),
        ]
        for _ in range(random.geometric(1 / self.turns)):
            call = self._text(random, self.call_tokens)
            yield _request(at, f"agent {number}", len(call), said)
            said.append(("call", call))
            if copies and (not unread or random.random() < self.reread):
                file = list(copies)[random.integers(len(copies))]
                if random.random() < self.edit:
                    copies[file] = self._edited(random, copies[file])
            else:
                file = unread.pop()
                copies[file] = self._text(self._random(DOCUMENTS, file), self.file_tokens)
            said.append((f"file {file}", copies[file]))
            at += random.exponential(self.pause)

    def _edited(self, random: np.random.Generator, text: np.ndarray) -> np.ndarray:
        """A copy in which one run of tokens is new."""
        n = min(self.edit_tokens, len(text))
        start = int(random.integers(len(text) - n + 1))
        edited = text.copy()
        edited[start : start + n] = random.integers(0, self.vocabulary, n, dtype=np.int32)
        return edited


def save(requests: Iterable[Request], path: str | Path) -> int:
    """Write requests as a trace of the format `tokens`, and return how many.

    A name that ends in .gz, .xz or .zst is compressed so. The file appears when it is whole.

    Raises ValueError for a request without token ids, and writes nothing then.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    n = 0
    try:
        with _compressed(partial, path.suffix) as file:
            for n, r in enumerate(requests, 1):
                if r.tokens is None:
                    raise ValueError(f"request {n} has no token ids, which the format tokens is of")
                record = {
                    "session": r.session,
                    "timestamp": r.timestamp,
                    "output_length": r.output_tokens,
                    "tokens": r.tokens.tolist(),
                    "segments": [list(segment) for segment in r.segments],
                }
                file.write(json.dumps(record, separators=(",", ":")).encode() + b"\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return n


def _compressed(path: Path, suffix: str) -> IO[bytes] | gzip.GzipFile:
    if suffix == ".gz":
        return gzip.open(path, "wb")
    if suffix == ".xz":
        return lzma.open(path, "wb")
    if suffix == ".zst":
        import zstandard

        return zstandard.open(path, "wb")
    return path.open("wb")


def _interleaved(sessions: Iterable[Iterator[Request]]) -> Iterator[Request]:
    return heapq.merge(*sessions, key=lambda r: r.timestamp)


def _request(
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
