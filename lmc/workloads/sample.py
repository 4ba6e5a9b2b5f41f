"""What quality is measured on: a prompt whose chunks may be reused, and what truly follows it."""

from __future__ import annotations

from dataclasses import dataclass

from lmc.chunking.prompt import Prompt


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
        token_ids: list[int] = []
        spans: list[tuple[int, int]] = []
        for part in (self.system, *self.chunks, self.question):
            if part:
                spans.append((len(token_ids), len(token_ids) + len(part)))
                token_ids += part
        return Prompt(token_ids, spans)
