"""Workloads: real text of the standard library, cut to exact numbers of tokens."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from pydoc_data.topics import topics
from typing import Any

from lmc.chunking.prompt import Prompt, prompt
from lmc.experiment.vllm.config import WorkloadConfig

SYSTEM = (
    "You are a careful assistant. Answer with the exact words of the documents below, which "
    "come from the reference manual of Python. Do not add anything of your own. "
)
ASK = "\n\nContinue this sentence."
MIN_QUOTE = 4  # tokens; a shorter quotation names no place in a document


@dataclass(frozen=True)
class Workload:
    """What is sent.

    documents: each alone behind the system prompt, spans `[system], [document]`: how a service
        prepares its corpus.
    prompts: spans `[system], [document] × n, [question]`.
    """

    documents: list[Prompt]
    prompts: list[Prompt]


@dataclass(frozen=True)
class Frame:
    """What stands around the texts: the chat format the model was trained on.

    before_system, after_system; before_answer stands between the question and the quotation,
    which begins the answer: so the first new token is a word of a document already, and its
    distribution shows how well the documents are read.
    """

    before_system: str
    after_system: str
    before_answer: str


# ChatML, the format of SmolLM2 and Qwen; any other model is asked in plain text.
CHATML = Frame(
    "<|im_start|>system\n",
    "<|im_end|>\n<|im_start|>user\n",
    "<|im_end|>\n<|im_start|>assistant\n",
)
PLAIN = Frame("", "\n\n", "\nAnswer: ")


def build_workload(config: WorkloadConfig, tokenizer: Any) -> Workload:
    """`rag_reorder`: the documents of a pool come back in other orders and other subsets.

    No two prompts are equal, and none has the document order of the one before it; where the
    pool is larger than a prompt, the subset differs from the one before as well. A question
    quotes a place in one of the prompt's documents and asks what follows.

    Raises ValueError if a length leaves no room or there are not enough texts of that length.
    """
    rng = random.Random(f"rag_reorder {config.seed}")
    frame = CHATML if "<|im_start|>" in tokenizer.get_vocab() else PLAIN
    system = system_prompt(frame, config, tokenizer)
    pool = _documents(config, tokenizer, rng)
    prompts: list[Prompt] = []
    seen: set[tuple[int, ...]] = set()
    previous: tuple[int, ...] = ()
    for _ in range(config.prompts):
        order = _next_order(config, previous, seen, rng)
        seen.add(order)
        previous = order
        quoted = pool[rng.choice(order)]
        question = _question(quoted, frame, config, tokenizer, rng)
        prompts.append(prompt([system, *(pool[i] for i in order), question], tokenizer))
    documents = [prompt([system, document], tokenizer) for document in pool]
    return Workload(documents, prompts[: config.measured])


def _next_order(
    config: WorkloadConfig,
    previous: tuple[int, ...],
    seen: set[tuple[int, ...]],
    rng: random.Random,
) -> tuple[int, ...]:
    every_document = config.documents == config.documents_per_prompt
    for _ in range(1000):
        order = tuple(rng.sample(range(config.documents), config.documents_per_prompt))
        same_order = [i for i in order if i in previous] == [i for i in previous if i in order]
        same_subset = set(order) == set(previous) and not every_document
        if order not in seen and not same_subset and not (previous and same_order):
            return order
    raise ValueError(
        f"workload.prompts: got {config.prompts}, more than there are different orders of "
        f"{config.documents_per_prompt} of {config.documents} documents"
    )


def _documents(config: WorkloadConfig, tokenizer: Any, rng: random.Random) -> list[list[int]]:
    """The pool: token ids, exactly `document_tokens` each."""
    candidates = []
    for name in sorted(topics):
        title, text = prose(topics[name])
        head = encode(f"\n\nDocument: {title}\n", tokenizer)
        body = encode(text, tokenizer)
        room = config.document_tokens - len(head)
        if 0 < room <= len(body):
            candidates.append(head + body[:room])
    if len(candidates) < config.documents:
        raise ValueError(
            f"workload.documents: got {config.documents}; there are {len(candidates)} texts of "
            f"{config.document_tokens} tokens"
        )
    return rng.sample(candidates, config.documents)


def prose(topic: str) -> tuple[str, str]:
    """Title, and the paragraphs that are sentences: no grammar rules, code or lists."""
    title, _, body = topic.partition("\n")
    paragraphs = re.split(r"\n{2,}", body)
    sentences = [p for p in paragraphs if re.match(r"[A-Z]", p) and p.rstrip().endswith((".", ":"))]
    return title, " ".join(" ".join(p.split()) for p in sentences)


def _question(
    document: list[int], frame: Frame, config: WorkloadConfig, tokenizer: Any, rng: random.Random
) -> list[int]:
    """Exactly `question_tokens` ids: the quotation takes what the frame leaves."""
    before = encode(ASK + frame.before_answer, tokenizer)
    room = config.question_tokens - len(before)
    if room < MIN_QUOTE:
        least = config.question_tokens - room + MIN_QUOTE
        raise ValueError(
            f"workload.question_tokens: got {config.question_tokens}, need at least {least}"
        )
    # Behind the title, and with text left to answer from.
    first, last = room, len(document) - 2 * room
    if first >= last:
        raise ValueError(
            f"workload.document_tokens: got {config.document_tokens}, need more than "
            f"{3 * room} for a quotation of {room} tokens"
        )
    start = rng.randrange(first, last)
    return before + document[start : start + room]


def system_prompt(frame: Frame, config: WorkloadConfig, tokenizer: Any) -> list[int]:
    """Exactly `system_tokens` ids: the text is repeated and cut so that its frame fits."""
    parts = (frame.before_system, SYSTEM * 4, frame.after_system)
    head, body, tail = (encode(part, tokenizer) for part in parts)
    least = len(head) + len(tail) + 1
    most = least - 1 + len(body)
    if not least <= config.system_tokens <= most:
        raise ValueError(
            f"workload.system_tokens: got {config.system_tokens}, allowed: {least} to {most}"
        )
    return head + body[: config.system_tokens - least + 1] + tail


def encode(text: str, tokenizer: Any) -> list[int]:
    """Token ids of a text, without special tokens; of an empty one, none."""
    return prompt([text], tokenizer).token_ids if text else []
