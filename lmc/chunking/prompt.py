"""Prompts with chunk borders: texts in, token ids and spans out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

# What is put in front of a text and taken off again, where tokenizers treat a text's begin
# otherwise than its midst. No token reaches from one of them into a text, or it is not used.
_AHEAD = ("\n", ":", ".\n")


@dataclass(frozen=True)
class Prompt:
    """A tokenised prompt.

    token_ids: [T], what the engine is given as `prompt_token_ids`.
    spans: `(start, end)` in tokens of each segment; they partition what is behind the token that
        the prompt begins with, if the model has one. Pass those worth reusing as `chunks` of a
        request.
    """

    token_ids: list[int]
    spans: list[tuple[int, int]]


def prompt(segments: Sequence[str | Sequence[int]], tokenizer: Any) -> Prompt:
    """Tokenise each segment alone and join the results.

    Tokenised alone, a text gives the same ids wherever it stands: no merge crosses a border. In
    front of the first stands what the tokenizer puts in front of a text (BOS), if the segments do
    not begin with it; it is in no span. Otherwise no special tokens are added: a chat template's
    markers are segments like any other.

    segments: texts, or token ids that are taken as they are: lists, arrays, or what a tokenizer
    has made of a text (`.input_ids`, `.ids`).
    tokenizer: a transformers tokenizer, a `tokenizers.Tokenizer`, or anything whose
    `encode(text, add_special_tokens=False)` gives ids or an object with `.ids`.

    Raises ValueError for no segments, for one text in place of a list, and for a segment that is
    empty, gives no tokens or is neither a text nor one list of whole numbers of 0 or more.
    """
    if isinstance(segments, str):
        raise ValueError("segments: got one text, want a list of texts (or of token id lists)")
    parts: list[list[int]] = []
    for i, segment in enumerate(segments):
        ids = encode(segment, tokenizer) if isinstance(segment, str) else _given(segment, i)
        if not ids:
            raise ValueError(f"segment {i}: got {segment!r}, which has no tokens; leave it out")
        parts.append(ids)
    if not parts:
        raise ValueError("segments: got none, want at least one")
    made = join(parts)
    front = lacking(made.token_ids, tokenizer)
    n = len(front)
    return Prompt(front + made.token_ids, [(start + n, end + n) for start, end in made.spans])


def _given(segment: Any, i: int) -> list[int]:
    """Token ids of segment `i`, which is no text."""
    ids = getattr(segment, "input_ids", getattr(segment, "ids", segment))
    try:
        array = np.asarray(None if isinstance(ids, bytearray) else ids)
    except (ValueError, TypeError, RuntimeError):  # lists of several lengths; tensors not of NumPy
        array = np.array(None)
    if array.size == 0 and array.ndim == 1:
        return []
    wanted = f"segment {i}: got {ids!r:.80}, want a text, or one list of token ids"
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise ValueError(wanted)
    if array.min() < 0:
        raise ValueError(f"{wanted}; token ids: got {array.min()}, allowed: 0 or more")
    return [int(token) for token in array]


def join(parts: Sequence[Sequence[int]]) -> Prompt:
    """The parts behind each other, a span each; an empty one is left out."""
    token_ids: list[int] = []
    spans: list[tuple[int, int]] = []
    for part in parts:
        if len(part):
            spans.append((len(token_ids), len(token_ids) + len(part)))
            token_ids += part
    return Prompt(token_ids, spans)


def encode(text: str, tokenizer: Any) -> list[int]:
    """Token ids of a text as it stands in the midst of another, without special tokens.

    SentencePiece puts a space in front of each text that it is given; in the midst of a prompt
    that would be one too many, so it is not taken.
    """
    tokenizer = _whole(tokenizer)
    ids = _ids(text, tokenizer)
    if text and _ids("\na", tokenizer) != _ids("\n", tokenizer) + _ids("a", tokenizer):
        for ahead in _AHEAD:
            front, both = _ids(ahead, tokenizer), _ids(ahead + text, tokenizer)
            if both[: len(front)] == front:
                return both[len(front) :]
    return ids


def begins(tokenizer: Any) -> list[int]:
    """The token ids that a tokenizer puts in front of a text: BOS, where the model wants it."""
    tokenizer = _whole(tokenizer)
    try:
        bare, full = _ids("a", tokenizer), _ids("a", tokenizer, special=True)
    except Exception:  # one that knows of no special tokens
        return []
    for i in range(len(full) - len(bare) + 1):
        if full[i : i + len(bare)] == bare:
            return full[:i]
    return []


def lacking(ids: Sequence[int], tokenizer: Any) -> list[int]:
    """What `begins` says, for a prompt that does not begin with it yet."""
    front = begins(tokenizer)
    return [] if list(ids[: len(front)]) == front else front


def _ids(text: str, tokenizer: Any, special: bool = False) -> list[int]:
    encoded = tokenizer.encode(text, add_special_tokens=special)
    return [int(t) for t in getattr(encoded, "ids", encoded)]


def _whole(tokenizer: Any) -> Any:
    """One that cuts and pads nothing, as files with such settings have `tokenizers` do."""
    if getattr(tokenizer, "truncation", None) is None and (
        getattr(tokenizer, "padding", None) is None
    ):
        return tokenizer
    copy = type(tokenizer).from_str(tokenizer.to_str())  # the caller's stays as it is
    copy.no_truncation()
    copy.no_padding()
    return copy
