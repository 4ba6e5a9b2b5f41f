"""Single requests: questions about documents, tasks that need skills, templates with a clock."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from lmc.sim.synthetic.base import DOCUMENTS, OTHERS, PROMPTS, SYSTEM, Synthetic, request_of
from lmc.sim.trace import Request


@dataclass(frozen=True)
class Rag(Synthetic):
    """Questions about documents: a system prompt, some documents, then a question that is new.

    A document is drawn with a weight of its rank to the power of -zipf (Zipf), at most once a
    prompt. Its tokens depend on the seed and its number alone, so that two traces of one seed
    share documents.

    count: requests. rate: of them a second, in a Poisson process.
    reorder: documents come in the order they were drawn; False puts them in order of their
        numbers, so that prompts with the same ones share a prefix.
    system_tokens: exactly; document, question and output tokens: on average.
    """

    count: int = 300
    rate: float = 1.0
    documents: int = 200
    zipf: float = 1.0
    documents_per_prompt: int = 5
    reorder: bool = True
    system_tokens: int = 200
    document_tokens: float = 400
    question_tokens: float = 40
    output_tokens: float = 150

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(0, "zipf", "system_tokens", "documents_per_prompt")
        self._at_least(1, "count", "documents")
        self._at_least(1, "document_tokens", "question_tokens", "output_tokens")
        self._above_zero("rate")
        self._at_most("documents_per_prompt", "documents")

    def requests(self) -> Iterator[Request]:
        """`count` requests, ascending in time, each a session of its own."""
        system = self._fixed_text(self.system_tokens, SYSTEM)
        random = self._random(PROMPTS)
        for i, at in enumerate(self._arrivals(self.count, self.rate)):
            drawn = self._drawn(random, self.documents, self.documents_per_prompt, self.zipf)
            chosen = drawn if self.reorder else sorted(drawn)
            parts = [("system", system)]
            parts += [(f"document {n}", self._document(n, self.document_tokens)) for n in chosen]
            parts.append(("question", self._text(random, self.question_tokens)))
            yield request_of(at, f"question {i}", self._length(random, self.output_tokens), parts)


@dataclass(frozen=True)
class Skills(Synthetic):
    """Tasks that need skills: who asks and when, a system prompt, some skills, then the task.

    What stands in front is new in every request, so prompts share no prefix; skills, texts that an
    agent loads when it needs them, are drawn as the documents of Rag.

    count, rate, zipf: as of Rag. skills: that there are.
    system_tokens: exactly; header, skill, task and output tokens: on average.
    """

    count: int = 200
    rate: float = 0.5
    skills: int = 40
    zipf: float = 1.0
    skills_per_prompt: int = 3
    system_tokens: int = 1000
    header_tokens: float = 30
    skill_tokens: float = 900
    task_tokens: float = 120
    output_tokens: float = 300

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(0, "zipf", "system_tokens", "skills_per_prompt")
        self._at_least(1, "count", "skills", "header_tokens", "skill_tokens", "task_tokens")
        self._at_least(1, "output_tokens")
        self._above_zero("rate")
        self._at_most("skills_per_prompt", "skills")

    def requests(self) -> Iterator[Request]:
        """`count` requests, ascending in time, each a session of its own."""
        system = self._fixed_text(self.system_tokens, SYSTEM)
        random = self._random(PROMPTS)
        for i, at in enumerate(self._arrivals(self.count, self.rate)):
            drawn = self._drawn(random, self.skills, self.skills_per_prompt, self.zipf)
            parts = [("header", self._text(random, self.header_tokens)), ("system", system)]
            parts += [(f"skill {n}", self._document(n, self.skill_tokens)) for n in drawn]
            parts.append(("task", self._text(random, self.task_tokens)))
            yield request_of(at, f"task {i}", self._length(random, self.output_tokens), parts)


@dataclass(frozen=True)
class Clock(Synthetic):
    """A prompt template that says what time it is near its start, then a question that is new.

    The time is another one every `period` seconds, so that of the template only what stands in
    front of it is a prefix of prompts of another time.

    count, rate: as of Rag.
    head, clock and template tokens: exactly, in this order; question and output tokens: on average.
    """

    count: int = 300
    rate: float = 0.2
    period: float = 60.0
    head_tokens: int = 40
    clock_tokens: int = 8
    template_tokens: int = 2000
    question_tokens: float = 100
    output_tokens: float = 150

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(0, "head_tokens", "template_tokens")
        self._at_least(1, "count", "clock_tokens", "question_tokens", "output_tokens")
        self._above_zero("rate", "period")

    def requests(self) -> Iterator[Request]:
        """`count` requests, ascending in time, each a session of its own."""
        head = self._fixed_text(self.head_tokens, SYSTEM)
        template = self._fixed_text(self.template_tokens, DOCUMENTS)
        random = self._random(PROMPTS)
        for i, at in enumerate(self._arrivals(self.count, self.rate)):
            clock = self._fixed_text(self.clock_tokens, OTHERS, int(at // self.period))
            question = self._text(random, self.question_tokens)
            parts = [("head", head), ("clock", clock), ("template", template)]
            parts.append(("question", question))
            yield request_of(at, f"question {i}", self._length(random, self.output_tokens), parts)
