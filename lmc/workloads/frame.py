"""What stands around the texts of a prompt, and texts as token ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lmc.chunking.prompt import encode, lacking

SYSTEM = (
    "You are a careful assistant. Answer with the exact words of the documents below, which "
    "come from the reference manual of Python. Do not add anything of your own. "
)


@dataclass(frozen=True)
class Frame:
    """What stands around the texts: the chat format the model was trained on.

    before_system, after_system; before_answer stands between the question and the quotation,
    which begins the answer: so the first new token is a word of a document already, and its
    distribution shows how well the documents are read. after_answer: what a conversation that
    goes on has behind an answer.
    """

    before_system: str
    after_system: str
    before_answer: str
    after_answer: str


# ChatML, the format of SmolLM2 and Qwen; any other model is asked in plain text.
CHATML = Frame(
    "<|im_start|>system\n",
    "<|im_end|>\n<|im_start|>user\n",
    "<|im_end|>\n<|im_start|>assistant\n",
    "<|im_end|>\n<|im_start|>user\n",
)
PLAIN = Frame("", "\n\n", "\nAnswer: ", "\n\n")


def frame_of(tokenizer: Any) -> Frame:
    """The format that a model with this tokenizer was trained on."""
    return CHATML if "<|im_start|>" in tokenizer.get_vocab() else PLAIN


def system_prompt(frame: Frame, tokens: int, tokenizer: Any, text: str = SYSTEM) -> list[int]:
    """Exactly `tokens` ids, with the one that prompts begin with: the text is repeated and cut.

    Raises ValueError for fewer or more than that allows.
    """
    parts = (frame.before_system, text * 4, frame.after_system)
    head, body, tail = (encode(part, tokenizer) for part in parts)
    head = front(head, tokenizer)
    least = len(head) + len(tail) + 1
    most = least - 1 + len(body)
    if not least <= tokens <= most:
        raise ValueError(f"system_tokens: got {tokens}, allowed: {least} to {most}")
    return head + body[: tokens - least + 1] + tail


def front(ids: list[int], tokenizer: Any) -> list[int]:
    """What a prompt begins with, behind the token that all prompts of the model do, if any."""
    return lacking(ids, tokenizer) + ids
