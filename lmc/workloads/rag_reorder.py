"""Documents that come back in another order, as those that retrieval finds do."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from lmc.chunking.prompt import Prompt, join
from lmc.workloads.frame import frame_of, system_prompt
from lmc.workloads.manual import Document, ask_about, documents
from lmc.workloads.sample import Sample, positive


@dataclass(frozen=True)
class RagReorder:
    """The documents of a pool come back in other orders and other subsets.

    No two prompts are equal, and none has the document order of the one before it; where the
    pool is larger than a prompt, the subset differs from the one before as well. A question
    quotes a place in one of the prompt's documents and asks what follows, which is the answer.

    Attributes:
        seed: another one gives other documents, orders and questions.
        documents: documents in the pool; documents_per_prompt of them stand in a prompt.
        system_tokens, document_tokens, question_tokens: exact lengths.
        prompts: samples in the workload.

    Raises:
        ValueError: fewer than one of anything, or more documents in a prompt than in the pool.
    """

    seed: int = 0
    documents: int = 8
    documents_per_prompt: int = 6
    system_tokens: int = 40
    document_tokens: int = 256
    question_tokens: int = 32
    prompts: int = 6

    def __post_init__(self) -> None:
        positive(self, "system_tokens", "document_tokens", "question_tokens", "prompts")
        if not 2 <= self.documents_per_prompt <= self.documents:
            raise ValueError(
                f"documents_per_prompt: got {self.documents_per_prompt}, allowed: 2 to "
                f"{self.documents}, the documents in the pool"
            )

    def samples(self, tokenizer: Any) -> list[Sample]:
        """Raises ValueError if a length leaves no room or there are not enough texts of it."""
        rng = random.Random(f"rag_reorder {self.seed}")
        frame = frame_of(tokenizer)
        system = system_prompt(frame, self.system_tokens, tokenizer)
        pool = self._pool(tokenizer, rng)
        samples: list[Sample] = []
        seen: set[tuple[int, ...]] = set()
        previous: tuple[int, ...] = ()
        for _ in range(self.prompts):
            previous = self._next_order(previous, seen, rng)
            seen.add(previous)
            quoted = pool[rng.choice(previous)]
            question, answer = ask_about(
                quoted.ids, self.question_tokens, "document_tokens", frame, tokenizer, rng
            )
            samples.append(Sample(system, [pool[i].ids for i in previous], question, answer))
        return samples

    def corpus(self, tokenizer: Any) -> list[Prompt]:
        """All documents of the pool, those too that the measured prompts do not have."""
        rng = random.Random(f"rag_reorder {self.seed}")
        system = system_prompt(frame_of(tokenizer), self.system_tokens, tokenizer)
        return [join([system, document.ids]) for document in self._pool(tokenizer, rng)]

    def _pool(self, tokenizer: Any, rng: random.Random) -> list[Document]:
        pool = [d for d in documents(self.document_tokens, tokenizer) if d.first]
        if len(pool) < self.documents:
            raise ValueError(
                f"documents: got {self.documents}; there are {len(pool)} texts of "
                f"{self.document_tokens} tokens"
            )
        return rng.sample(pool, self.documents)

    def _next_order(
        self, previous: tuple[int, ...], seen: set[tuple[int, ...]], rng: random.Random
    ) -> tuple[int, ...]:
        every_document = self.documents == self.documents_per_prompt
        for _ in range(1000):
            order = tuple(rng.sample(range(self.documents), self.documents_per_prompt))
            same_order = [i for i in order if i in previous] == [i for i in previous if i in order]
            same_subset = set(order) == set(previous) and not every_document
            if order not in seen and not same_subset and not (previous and same_order):
                return order
        raise ValueError(
            f"prompts: got {self.prompts}, more than there are different orders of "
            f"{self.documents_per_prompt} of {self.documents} documents"
        )
