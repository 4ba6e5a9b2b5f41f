"""What is measured on: a prompt whose chunks may be reused, and what truly follows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lmc.chunking.prompt import Prompt, join


@dataclass(frozen=True)
class Sample:
    """One prompt.

    Attributes:
        system: token ids in front, the same in every sample of a workload.
        chunks: token ids of the texts that come from elsewhere and may be reused; at least one.
        question: token ids behind them, always new.
        answer: token ids that truly follow, or empty when nothing is known to.
    """

    system: list[int]
    chunks: list[list[int]]
    question: list[int]
    answer: list[int]

    @property
    def prompt(self) -> Prompt:
        """The whole prompt; spans are the system text, each chunk, and the question."""
        return join([self.system, *self.chunks, self.question])

    @property
    def reusable(self) -> list[tuple[int, int]]:
        """The spans of the prompt that may come back; a question comes once."""
        spans = self.prompt.spans
        return spans[:-1] if self.question else spans


def corpus_of(workload: Any, samples: Sequence[Sample], tokenizer: Any) -> list[Prompt]:
    """What a service stores before it is asked: each document alone behind its system text.

    A workload that has documents which no sample needs says so by `corpus(tokenizer)`; else it is
    every chunk of the samples, once.
    """
    if hasattr(workload, "corpus"):
        documents: list[Prompt] = workload.corpus(tokenizer)
        return documents
    seen: dict[tuple[tuple[int, ...], ...], Prompt] = {}
    for sample in samples:
        for chunk in sample.chunks:
            seen.setdefault((tuple(sample.system), tuple(chunk)), join([sample.system, chunk]))
    return list(seen.values())


def positive(workload: Any, *fields: str) -> None:
    """Raise ValueError for a field below 1."""
    for field in fields:
        if (value := getattr(workload, field)) < 1:
            raise ValueError(f"{field}: got {value}, want at least 1")
