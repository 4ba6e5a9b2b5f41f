"""Text to token ids, message by message."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from lmc.sim.trace import Request

END = object()  # a record behind the last one of a file
Framing = Literal["chatml", "plain"]
CACHED_TOKENS = 1 << 24


class Tokenizer:
    """Any tokenizer, with the ids of messages that come again kept.

    Each message is tokenised alone, so that the same message has the same ids wherever it stands.

    Raises ValueError for what is no tokenizer.
    """

    def __init__(self, path: str, framing: Framing) -> None:
        self._tokenizer = _loaded(path)
        self._tokenizer.no_truncation()  # as its file may have it
        self._tokenizer.no_padding()
        self._framing = framing
        self._known: OrderedDict[tuple[str, str], np.ndarray] = OrderedDict()
        self._size = 0

    def prompt(
        self, messages: Iterable[tuple[str, str]]
    ) -> tuple[np.ndarray, list[tuple[str, int, int]]]:
        """(role, content) of each message -> token ids [T], and (role, start, end) of each."""
        parts: list[np.ndarray] = []
        segments, T = [], 0
        for role, content in messages:
            ids = self._ids(role, content)
            if len(ids):
                parts.append(ids)
                segments.append((role, T, T + len(ids)))
                T += len(ids)
        return np.concatenate(parts) if parts else np.empty(0, np.int32), segments

    def decode(self, ids: Sequence[int]) -> str:
        """Token ids -> text, special tokens included."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=False)
        return text

    def _ids(self, role: str, content: str) -> np.ndarray:
        key = (role, content)
        ids = self._known.get(key)
        if ids is None:
            chatml = f"<|im_start|>{role}\n{content}<|im_end|>\n"
            text = chatml if self._framing == "chatml" else f"{content}\n"
            encoded = self._tokenizer.encode(text, add_special_tokens=False)
            ids = self._known[key] = np.array(encoded.ids, dtype=np.int32)
            self._size += len(ids)
            while self._size > CACHED_TOKENS:
                _, old = self._known.popitem(last=False)
                self._size -= len(old)
        else:
            self._known.move_to_end(key)
        return ids


def _loaded(name: str) -> Any:
    """A tokenizer of a file, a folder, a model of `lmc model export`, or the hub, in this order.

    Raises ValueError where it is none of them.
    """
    import tokenizers

    from lmc.model.exports import EXPORTS, export

    path = export(name) if name in EXPORTS and not Path(name).exists() else Path(name)
    file = path / "tokenizer.json" if path.is_dir() else path
    try:
        if file.exists() or file.suffix == ".json":
            return tokenizers.Tokenizer.from_file(str(file))
        return tokenizers.Tokenizer.from_pretrained(name)
    except Exception as e:  # the library raises no narrower class
        where = "" if file.exists() else "no such file or folder here, and of the hub: "
        raise ValueError(f"tokenizer {name}: {where}{e}") from e


@dataclass
class TextFormat:
    """What formats share whose prompts are text.

    tokenizer: a tokenizer.json, a folder that holds one, a model of `lmc model export`, or a name
        of the hub.
    framing: `chatml` puts <|im_start|>role, newline, content, <|im_end|>, newline; `plain` puts
        the content and a newline.

    Raises ValueError for what is no tokenizer file, before anything is read.
    """

    has_text: ClassVar[bool] = True
    tokenizer: str
    framing: Framing = "chatml"

    def __post_init__(self) -> None:
        self._tokenizer = Tokenizer(self.tokenizer, self.framing)

    def decode(self, ids: Sequence[int]) -> str:
        """Token ids -> text."""
        return self._tokenizer.decode(ids)


def with_end(records: Iterable[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
    """The same records, and `END` behind them, for what is known only then."""
    number = 0
    for number, record in records:
        yield number, record
    yield number, END


@dataclass
class Sessions(TextFormat):
    """What formats share that hold what was said, in order: every answer is a request.

    Its prompt is all that was said before it. Where a file has no times, requests arrive a second
    apart in the order of the file.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.restart()

    def restart(self) -> None:
        """Forget all that was read, before the first file."""
        self.file = ""  # the name of the one that is read
        self._arrivals = count()
        self._made = False  # times, since there were none

    @property
    def assumed(self) -> str:
        """What requests have that the file does not say, in words."""
        return "no times: requests one second apart, in the order of the file" if self._made else ""

    def request(
        self, session: str, said: Iterable[tuple[str, str]], answer: str, at: float | None = None,
        output_tokens: int | None = None,
    ) -> Request:  # fmt: skip
        """One whose prompt is what was `said`, (role, text) each."""
        tokens, segments = self._tokenizer.prompt(said)
        if output_tokens is None:
            output_tokens = self.tokens_of(answer)
        self._made |= at is None
        return Request(
            timestamp=float(next(self._arrivals)) if at is None else at,
            session=session or self.file,
            input_tokens=len(tokens),
            output_tokens=output_tokens,
            tokens=tokens,
            segments=segments,
        )

    def tokens_of(self, answer: str) -> int:
        """Of a message of the model."""
        return len(self._tokenizer.prompt([("assistant", answer)])[0])

    def of_conversation(self, session: str, turns: Iterable[tuple[str, str]]) -> Iterator[Request]:
        """A request for each turn of the assistant that is not the first turn."""
        said: list[tuple[str, str]] = []
        for role, text in turns:
            if role == "assistant" and said:
                yield self.request(session, said, text)
            said.append((role, text))
