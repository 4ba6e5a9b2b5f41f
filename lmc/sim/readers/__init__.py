"""Readers of traces, one format a file; all stream, and count what they cannot read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar, Protocol

from lmc.registry import Registry
from lmc.sim.readers.files import DAMAGED, files_of, opened, readable_again
from lmc.sim.readers.records import Broken, RecordError
from lmc.sim.readers.text import Sessions, TextFormat
from lmc.sim.trace import Request

FORMATS = Registry(
    "trace format",
    {
        "azure": "lmc.sim.readers.azure:Azure",
        "bailian": "lmc.sim.readers.bailian:Bailian",
        "burstgpt": "lmc.sim.readers.burstgpt:BurstGpt",
        "chat": "lmc.sim.readers.chat:Chat",
        "claude_code": "lmc.sim.readers.claude_code:ClaudeCode",
        "codex": "lmc.sim.readers.codex:Codex",
        "lmc": "lmc.sim.readers.recorded:Recorded",
        "mooncake": "lmc.sim.readers.mooncake:Mooncake",
        "openhands": "lmc.sim.readers.trajectories:OpenHands",
        "sharegpt": "lmc.sim.readers.sharegpt:ShareGpt",
        "timed_trace": "lmc.sim.readers.mooncake:Mooncake",
        "tokens": "lmc.sim.readers.tokens:Tokens",
        "trajectories": "lmc.sim.readers.trajectories:Trajectories",
        "weka": "lmc.sim.readers.weka:Weka",
    },
    given=["tokenizer"],
    has=["example", "has_text", "recognises", "records", "requests"],
)
MOST_SHOWN = 100


class Format(Protocol):
    """A dataclass that knows one format.

    has_text: its prompts are text, so that it has a field `tokenizer`.
    example: a short file.
    """

    has_text: ClassVar[bool]
    example: ClassVar[str]

    @staticmethod
    def recognises(head: bytes, keys: set[str]) -> bool:
        """Whether a file is of this format, and of no other.

        head: its first bytes. keys: of its first JSON object, if it begins with one.
        """
        ...

    def records(self, stream: IO[bytes]) -> Iterator[tuple[int, Any]]:
        """(line or record number from 1 on, record) of a file; `Broken` stands for a bad one."""
        ...

    def requests(self, record: Any) -> Iterable[Request]:
        """The requests of one record. Raises RecordError, with the reason, for a wrong one."""
        ...


@dataclass(frozen=True)
class BadLine:
    """A line that was left out: the file, the line (or record, in one JSON array), the reason."""

    file: str
    line: int
    reason: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.reason}"


class Reading:
    """A trace file (or folder) that yields its requests as often as it is iterated over.

    format: the name in `FORMATS`.
    bad: the lines left out in the last iteration, at most `MOST_SHOWN` of them.
    bad_count: how many there were. count: how many requests were read.
    """

    def __init__(
        self,
        path: Path,
        format: str,
        reader: Format,
        *,
        strict: bool,
        tell: Callable[[int], None] | None,
        copy: Any = None,
        once: Mapping[str, Any] | None = None,
    ) -> None:
        self.path, self.format = path, format
        self._copy = copy  # of a pipe; goes when this does
        self._once = once  # how it is read, where what was tokenised is kept
        self._reader, self._strict, self._tell = reader, strict, tell
        self._reset()

    @property
    def assumed(self) -> str:
        """What was told of its units from the lines that were read, in words; "" for nothing."""
        return str(getattr(self._reader, "assumed", ""))

    @property
    def decode(self) -> Callable[[Sequence[int]], str] | None:
        """Token ids -> text, for a trace that was text; None for others."""
        return self._reader.decode if isinstance(self._reader, TextFormat) else None

    def _reset(self) -> None:
        self.bad: list[BadLine] = []
        self.bad_count = self.count = 0

    def __iter__(self) -> Iterator[Request]:
        self._reset()
        file = None
        if self._once is not None:
            from lmc.sim.readers.kept import place

            file = place(self.path, self._once)
        yield from self._read() if file is None else self._read_once(file)
        if not self.count and not self.bad_count:
            raise ValueError(f"{self.path}: the trace is empty")
        if not self.count:
            raise ValueError(
                f"{self.path}: none of its {self.bad_count} lines is a request of format "
                f"{self.format}; the first: {self.bad[0]}"
            )

    def _read(self) -> Iterator[Request]:
        if isinstance(self._reader, Sessions):
            self._reader.restart()
        for file in files_of(self.path):
            if isinstance(self._reader, Sessions):
                self._reader.file = file.name.split(".")[0] if self.path.is_dir() else ""
            yield from self._requests_of(file)

    def _read_once(self, file: Path) -> Iterator[Request]:
        """Requests as `file` has them; if it has none, it has them then."""
        from lmc.sim.readers import kept

        if (found := kept.load(file)) is not None:
            requests, bad, self.bad_count = found
            self.count, self.bad = len(requests), [BadLine(*line) for line in bad]
            if self._strict and self.bad:
                first = self.bad[0]
                raise ValueError(f"{first.file}:{first.line}: {first.reason}")
            yield from requests
            return
        requests, tokens = [], 0
        for r in self._read():
            tokens += r.input_tokens
            if tokens <= kept.MOST_TOKENS:
                requests.append(r)
            yield r
        if tokens <= kept.MOST_TOKENS:
            lines = [(bad.file, bad.line, bad.reason) for bad in self.bad]
            kept.keep(file, requests, lines, self.bad_count)

    def _requests_of(self, file: Path) -> Iterator[Request]:
        line = 0
        try:
            with opened(file, self._tell) as stream:
                for line, record in self._reader.records(stream):
                    try:
                        if isinstance(record, Broken):
                            raise RecordError(record.reason)
                        found = list(self._reader.requests(record))
                    except RecordError as e:
                        self._leave_out(file, line, str(e))
                        continue
                    except RecursionError:
                        self._leave_out(file, line, "nested too deep")
                        continue
                    self.count += len(found)
                    yield from found
        except DAMAGED as e:
            reason = " ".join(str(e).split()) or type(e).__name__
            self._leave_out(file, line + 1, f"the file cannot be read on: {reason}")

    def _leave_out(self, file: Path, line: int, reason: str) -> None:
        if self._strict:
            raise ValueError(f"{file}:{line}: {reason}")
        bad = BadLine(file.name, line, reason)
        self.bad_count += 1
        if len(self.bad) < MOST_SHOWN:
            self.bad.append(bad)


def read(
    trace: str | Path | Iterable[Mapping[str, Any]],
    format: Mapping[str, Any] | str = "auto",
    *,
    tokenizer: str | Path | None = None,
    strict: bool = False,
    tell: Callable[[int], None] | None = None,
) -> Reading:
    """Open a trace: plain, .gz, .xz, .zst or .bz2, a pipe, or a folder of files of one format.

    Lines that cannot be read are counted in `Reading.bad` and left out.

    Args:
        trace: a path, `-` for standard input, or records, such as the rows of a data set that the
            library `datasets` has loaded.
        format: one of `FORMATS`, with fields such as `chat:framing=plain`, or `auto`, which looks
            at the first line.
        tokenizer: a tokenizer.json, or a folder that holds one, for formats with text.
        strict: raise for the first bad line.
        tell: called with how many bytes were read, as they are, for a bar.

    Raises:
        ValueError: an unknown format or field; a missing or empty file; text without a
            tokenizer; while iterating, a trace none of whose lines can be read.
    """
    path, copy = readable_again(Path(trace) if isinstance(trace, str) else trace)
    if not path.exists():
        raise ValueError(f"{path}: no such trace")
    if format == "auto":
        from lmc.sim.readers.detect import detect

        format = detect(path)
    spec = FORMATS.parse(format)
    name = spec.get("name")
    if name in FORMATS.entries and FORMATS.load(name).has_text and tokenizer is None:
        raise ValueError(
            f"format {name} is text: a tokenizer is needed (a tokenizer.json, or its folder)"
        )
    given = {} if tokenizer is None else {"tokenizer": str(tokenizer)}
    reader = FORMATS.build(spec, **given)
    # A format of a user's own may have what is not kept, or change.
    once = spec | given if reader.has_text and copy is None and name in FORMATS.entries else None
    return Reading(path, str(name), reader, strict=strict, tell=tell, copy=copy, once=once)
