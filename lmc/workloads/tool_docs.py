"""Descriptions of tools in front of a request, in ever other orders."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from lmc.chunking.prompt import Prompt, encode, join
from lmc.workloads.frame import frame_of, system_prompt
from lmc.workloads.library import descriptions
from lmc.workloads.manual import ask_about
from lmc.workloads.sample import Sample, positive

SYSTEM = (
    "You can call the tools that are described below. Say exactly what their descriptions say. "
)


@dataclass(frozen=True)
class ToolDocs:
    """A tool retriever puts some of many tools before each request, the best first.

    A tool is a function of Python's standard library with its docstring, whole: unlike documents
    of `rag_reorder`, these have lengths of their own. A question quotes a place in one of them,
    and the answer is what follows there.

    Attributes:
        tools: in the pool; tools_per_prompt of them, in an order of its own, stand in a prompt.
        tool_tokens: the longest description that is taken; the shortest has half as many.
        system_tokens, question_tokens: exact lengths.
        prompts: samples in the workload.
        seed: another one gives other tools, orders and questions.

    Raises:
        ValueError: fewer than one of anything, or more tools in a prompt than in the pool.
    """

    seed: int = 0
    tools: int = 24
    tools_per_prompt: int = 12
    tool_tokens: int = 160
    system_tokens: int = 40
    question_tokens: int = 32
    prompts: int = 8

    def __post_init__(self) -> None:
        positive(self, "tool_tokens", "system_tokens", "question_tokens", "prompts")
        if not 2 <= self.tools_per_prompt <= self.tools:
            raise ValueError(
                f"tools_per_prompt: got {self.tools_per_prompt}, allowed: 2 to {self.tools}, the "
                "tools in the pool"
            )

    def samples(self, tokenizer: Any) -> list[Sample]:
        """Raises ValueError if a length leaves no room or there are too few tools of it."""
        rng = random.Random(f"tool_docs {self.seed}")
        frame = frame_of(tokenizer)
        system = system_prompt(frame, self.system_tokens, tokenizer, SYSTEM)
        pool = self._pool(tokenizer, rng)
        samples = []
        for _ in range(self.prompts):
            chosen = rng.sample(pool, self.tools_per_prompt)
            question, answer = ask_about(
                rng.choice(chosen), self.question_tokens, "tool_tokens", frame, tokenizer, rng
            )
            samples.append(Sample(system, chosen, question, answer))
        return samples

    def corpus(self, tokenizer: Any) -> list[Prompt]:
        """All tools of the pool, those too that the measured prompts do not have."""
        rng = random.Random(f"tool_docs {self.seed}")
        system = system_prompt(frame_of(tokenizer), self.system_tokens, tokenizer, SYSTEM)
        return [join([system, tool]) for tool in self._pool(tokenizer, rng)]

    def _pool(self, tokenizer: Any, rng: random.Random) -> list[list[int]]:
        described = (encode(f"\n\nTool: {text}", tokenizer) for text in descriptions())
        fit = [ids for ids in described if self.tool_tokens <= 2 * len(ids) <= 2 * self.tool_tokens]
        if len(fit) < self.tools:
            raise ValueError(
                f"tools: got {self.tools}; there are {len(fit)} of {self.tool_tokens // 2} to "
                f"{self.tool_tokens} tokens"
            )
        return rng.sample(fit, self.tools)
