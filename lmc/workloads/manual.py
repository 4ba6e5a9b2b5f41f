"""Documents out of Python's reference manual, which every Python carries (`pydoc_data.topics`)."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import Any

from lmc.chunking.prompt import encode
from lmc.workloads.frame import Frame

ASK = "\n\nContinue this sentence."
MIN_QUOTE = 4  # tokens; a shorter quotation names no place in a document


@dataclass(frozen=True)
class Document:
    """A run of the prose of one topic, under its title.

    Attributes:
        ids: its tokens. title_tokens: how many of them are the title.
        first: whether it begins with the beginning of its topic.
    """

    ids: list[int]
    title_tokens: int
    first: bool


def documents(tokens: int, tokenizer: Any) -> list[Document]:
    """All documents of exactly `tokens` tokens, by topic; none where titles leave no room."""
    found = []
    for name in sorted(topics):
        title, text = prose(topics[name])
        head = encode(f"\n\nDocument: {title}\n", tokenizer)
        body = encode(text, tokenizer)
        room = tokens - len(head)
        if room > 0:
            found += [
                Document(head + body[at : at + room], len(head), at == 0)
                for at in range(0, len(body) - room + 1, room)
            ]
    return found


def ask_about(
    text: list[int], tokens: int, field: str, frame: Frame, tokenizer: Any, rng: random.Random
) -> tuple[list[int], list[int]]:
    """A question that quotes a place in a text, and its answer: what follows there.

    The question is exactly `tokens` ids, whose quotation takes what the frame leaves; the answer
    is as many ids as the quotation. Raises ValueError where there is no room for that, naming
    `question_tokens`, or `field`, which says how long texts are.
    """
    before = encode(ASK + frame.before_answer, tokenizer)
    room = tokens - len(before)
    if room < MIN_QUOTE:
        least = tokens - room + MIN_QUOTE
        raise ValueError(f"question_tokens: got {tokens}, need at least {least}")
    # Behind the title, and with text left to answer from.
    first, last = room, len(text) - 2 * room
    if first >= last:
        raise ValueError(
            f"{field}: got {len(text)}, need more than {3 * room} for a quotation of {room} tokens"
        )
    start = rng.randrange(first, last)
    end = start + room
    return before + text[start:end], text[end : end + room]


def prose(topic: str) -> tuple[str, str]:
    """Title, and the paragraphs that are sentences: no grammar rules, code or lists."""
    title, _, body = topic.partition("\n")
    paragraphs = re.split(r"\n{2,}", body)
    sentences = [p for p in paragraphs if re.match(r"[A-Z]", p) and p.rstrip().endswith((".", ":"))]
    return title, " ".join(" ".join(p.split()) for p in sentences)
