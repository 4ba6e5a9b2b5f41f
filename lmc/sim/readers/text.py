"""Text to token ids, message by message."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

Framing = Literal["chatml", "plain"]
CACHED_TOKENS = 1 << 24


class Tokenizer:
    """Any tokenizer.json, with the ids of messages that come again kept.

    Each message is tokenised alone, so that the same message has the same ids wherever it stands.

    Raises ValueError for what is no tokenizer file.
    """

    def __init__(self, path: str, framing: Framing) -> None:
        import tokenizers

        file = Path(path)
        file = file / "tokenizer.json" if file.is_dir() else file
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as e:  # the library raises no narrower class
            raise ValueError(f"tokenizer {path}: {e}") from e
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


@dataclass
class TextFormat:
    """What formats share whose prompts are text.

    tokenizer: a tokenizer.json, or a folder that holds one.
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
