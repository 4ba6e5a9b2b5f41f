"""What a format is given to read from, and where it says what it cannot use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol

from lmc.sim.readers.files import DamagedError, TraceFile
from lmc.sim.trace import Request

if TYPE_CHECKING:
    from tokenizers import Tokenizer

BOM = b"\xef\xbb\xbf"


class Place(NamedTuple):
    """A line of a file, counted from 1; of a JSON array, an element."""

    file: Path
    line: int


class Format(Protocol):
    """A frozen dataclass that knows one format; its fields say what the file does not.

    text: whether prompts are text, which takes a tokenizer.
    """

    text: ClassVar[bool]

    def requests(self, source: Source) -> Iterator[Request]:
        """The requests, in the order of the file; `source.reject` for what is none."""
        ...


class Source:
    """The files of one trace.

    files: read one behind the other; only a format that says so has more than one.
    reject: called with the place and the reason of what is skipped.
    tokenizer: for formats of text, else None.
    """

    def __init__(
        self,
        files: Sequence[Path],
        reject: Callable[[Place, str], None],
        tokenizer: Tokenizer | None = None,
    ):
        self.files, self.reject, self.tokenizer = files, reject, tokenizer
        self.size = sum(path.stat().st_size for path in files)
        self._file: TraceFile | None = None
        self._before = 0

    @property
    def position(self) -> int:
        """Bytes read, of `size`; compressed ones where files are compressed."""
        return self._before + (self._file.position if self._file else 0)

    def open(self) -> Iterator[tuple[Path, TraceFile]]:
        """Each file in turn, closed when the next is asked for."""
        for path in self.files:
            with TraceFile(path) as file:
                self._file = file
                yield path, file
                self._file = None
                self._before += file.size

    def lines(self) -> Iterator[tuple[Place, bytes]]:
        """Each line that is not blank; where a file is damaged, it ends there."""
        for path, file in self.open():
            number = 0
            try:
                for number, line in enumerate(file.stream, 1):  # noqa: B007 (the except reads it)
                    text = line.removeprefix(BOM) if number == 1 else line
                    if not text.isspace() and text:
                        yield Place(path, number), text
            except DamagedError as error:
                self.reject(Place(path, number + 1), str(error))

    def parsed(self, parse: Callable[[bytes], Request]) -> Iterator[Request]:
        """A request a line; a line for which `parse` raises ValueError is rejected."""
        for place, line in self.lines():
            try:
                request = parse(line)
            except (ValueError, RecursionError) as error:
                self.reject(place, str(error))
            else:
                yield request
