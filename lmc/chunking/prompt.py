"""Prompts with chunk borders: texts in, token ids and spans out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Prompt:
    """A tokenised prompt.

    token_ids: [T], what the engine is given as `prompt_token_ids`.
    spans: `(start, end)` in tokens of each segment; they partition `[0, T)`. Pass those worth
    reusing as `chunks` of a request.
    """

    token_ids: list[int]
    spans: list[tuple[int, int]]


def prompt(segments: Sequence[str | Sequence[int]], tokenizer: Any) -> Prompt:
    """Tokenise each segment alone and join the results.

    Tokenised alone, a text gives the same ids wherever it stands: no merge crosses a border. No
    special tokens are added; a BOS or a chat template's markers are segments like any other.

    segments: texts, or token ids that are taken as they are.
    tokenizer: a transformers tokenizer, a `tokenizers.Tokenizer`, or anything whose
    `encode(text, add_special_tokens=False)` gives ids or an object with `.ids`.

    Raises ValueError for no segments, for one text in place of a list, and for a segment that is
    empty or gives no tokens.
    """
    if isinstance(segments, str):
        raise ValueError("segments: got one text, want a list of texts (or of token id lists)")
    parts: list[list[int]] = []
    for i, segment in enumerate(segments):
        if isinstance(segment, str):
            encoded = tokenizer.encode(segment, add_special_tokens=False)
            ids = [int(t) for t in getattr(encoded, "ids", encoded)]
        else:
            ids = [int(t) for t in segment]
        if not ids:
            raise ValueError(f"segment {i}: got {segment!r}, which has no tokens; leave it out")
        parts.append(ids)
    if not parts:
        raise ValueError("segments: got none, want at least one")
    return join(parts)


def join(parts: Sequence[Sequence[int]]) -> Prompt:
    """The parts behind each other, a span each; an empty one is left out."""
    token_ids: list[int] = []
    spans: list[tuple[int, int]] = []
    for part in parts:
        if len(part):
            spans.append((len(token_ids), len(token_ids) + len(part)))
            token_ids += part
    return Prompt(token_ids, spans)
