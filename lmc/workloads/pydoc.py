"""Continuations of the standard library's manual."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from lmc.chunking.prompt import encode
from lmc.workloads.frame import frame_of, system_prompt
from lmc.workloads.manual import ASK, MIN_QUOTE, documents
from lmc.workloads.sample import Sample, positive


@dataclass(frozen=True)
class Pydoc:
    """Continuation of text from Python's reference manual (`pydoc_data.topics`).

    A question quotes a place in one of the documents, and the answer is what follows it there.
    A document is a run of the prose of one topic, under its title. The documents are dealt like
    cards, so that prompts share none until all were dealt (129 of 256 tokens with SmolLM2's
    tokenizer in Python 3.11, enough for 21 prompts of 6); after that they come again, in other
    orders and beside others. No place is quoted twice.

    Attributes:
        prompts: samples in the workload.
        chunks: documents in a prompt, all different.
        system_tokens, chunk_tokens, question_tokens, answer_tokens: exact lengths.
        seed: another one gives other documents, orders and places.
    """

    prompts: int = 64
    chunks: int = 6
    chunk_tokens: int = 256
    system_tokens: int = 40
    question_tokens: int = 32
    answer_tokens: int = 32
    seed: int = 0

    def samples(self, tokenizer: Any) -> list[Sample]:
        """Raises ValueError if a length leaves no room or there are too few documents."""
        positive(self, "prompts", "chunks", "chunk_tokens", "answer_tokens")
        frame = frame_of(tokenizer)
        system = system_prompt(frame, self.system_tokens, tokenizer)
        ask = encode(ASK + frame.before_answer, tokenizer)
        quote_tokens = self.question_tokens - len(ask)
        if quote_tokens < MIN_QUOTE:
            raise ValueError(
                f"question_tokens: got {self.question_tokens}, need at least {len(ask) + MIN_QUOTE}"
            )
        pool = documents(self.chunk_tokens, tokenizer)
        if len(pool) < self.chunks:
            raise ValueError(
                f"chunks: got {self.chunks}; there are {len(pool)} documents of "
                f"{self.chunk_tokens} tokens"
            )
        rng = random.Random(f"pydoc {self.seed}")
        samples: list[Sample] = []
        deck: list[int] = []
        quoted: set[tuple[int, int]] = set()
        for _ in range(self.prompts):
            deck, hand = _deal(deck, len(pool), self.chunks, rng)
            places = [
                (i, start)
                for i in hand
                for start in range(
                    pool[i].title_tokens, self.chunk_tokens - quote_tokens - self.answer_tokens + 1
                )
                if (i, start) not in quoted
            ]
            if not places:
                raise ValueError(
                    f"chunk_tokens: got {self.chunk_tokens}, too few for a title, a quotation of "
                    f"{quote_tokens} tokens and an answer of {self.answer_tokens}"
                )
            i, start = place = rng.choice(places)
            quoted.add(place)
            ids, end = pool[i].ids, start + quote_tokens
            answer = ids[end : end + self.answer_tokens]
            chunks = [pool[j].ids for j in hand]
            samples.append(Sample(system, chunks, ask + ids[start:end], answer))
        return samples


def _deal(
    deck: list[int], documents: int, count: int, rng: random.Random
) -> tuple[list[int], list[int]]:
    """What is left of the deck, and `count` different documents from its top."""
    hand = deck[:count]
    deck = deck[count:]
    if len(hand) < count:
        fresh = rng.sample(range(documents), documents)
        more = [i for i in fresh if i not in hand][: count - len(hand)]
        hand += more
        deck = [i for i in fresh if i not in more]
    return deck, hand
