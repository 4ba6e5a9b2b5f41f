"""Workloads in the formats of other programs."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from lmc.workloads.sample import Sample


def vllm_bench(
    samples: Sequence[Sample], tokenizer: Any, output_tokens: int | None = None
) -> Iterator[str]:
    """Lines of the data set `custom` of vLLM's bench client, one a prompt, in order.

    That data set has texts alone: what stands on either side of a border may be tokenised
    together, which here makes a prompt a token or two shorter. A prompt has the model's chat
    format already. What a sample has no answer of counts as one token.

    output_tokens: how many are asked for; by default as many as the answer has.

    Raises ValueError for a prompt that cannot be sent as text: one that is cut inside a character,
    or that the tokenizer reads as another text.
    """
    for i, sample in enumerate(samples):
        prompt = tokenizer.decode(sample.prompt.token_ids)
        again = tokenizer.decode(tokenizer.encode(prompt, add_special_tokens=False))
        if "\N{REPLACEMENT CHARACTER}" in prompt or again != prompt:
            raise ValueError(f"prompt {i + 1}: its tokens are not those of a text")
        yield json.dumps(
            {"prompt": prompt, "output_tokens": output_tokens or max(1, len(sample.answer))}
        )
