"""Sessions of several turns, in which a prompt is all that was said before and something new.

What was said is written beforehand and not what a model answered, so that every server is sent
the same prompts. The turns of sessions alternate: the second of each comes behind the first of all.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lmc.chunking.prompt import Prompt, encode, join
from lmc.workloads.frame import frame_of, system_prompt
from lmc.workloads.library import sources
from lmc.workloads.manual import ask_about, documents
from lmc.workloads.sample import Sample, positive

READER = "You read files of a repository and say exactly what stands in them, nothing else. "


@dataclass(frozen=True)
class Chat:
    """Conversations, each about a document that its first message brings.

    A question quotes a place in the document, and the answer is what follows there.

    Attributes:
        sessions: conversations, each about another document. turns: questions in each.
        system_tokens, document_tokens, question_tokens: exact lengths.
        seed: another one gives other documents and questions.
    """

    seed: int = 0
    sessions: int = 4
    turns: int = 4
    system_tokens: int = 40
    document_tokens: int = 512
    question_tokens: int = 32

    def __post_init__(self) -> None:
        positive(self, "sessions", "turns", "system_tokens", "document_tokens", "question_tokens")

    def samples(self, tokenizer: Any) -> list[Sample]:
        """Raises ValueError if a length leaves no room or there are too few documents."""
        system = system_prompt(frame_of(tokenizer), self.system_tokens, tokenizer)
        none_new: list[list[int]] = [[]] * (self.turns - 1)
        return _alternating(
            _session(
                system,
                [document, *none_new],
                self.question_tokens,
                "document_tokens",
                tokenizer,
                random.Random(f"chat {self.seed} {i}"),
            )
            for i, document in enumerate(self._documents(tokenizer))
        )

    def corpus(self, tokenizer: Any) -> list[Prompt]:
        """The documents; what was said about them is nowhere before it is said."""
        system = system_prompt(frame_of(tokenizer), self.system_tokens, tokenizer)
        return [join([system, document]) for document in self._documents(tokenizer)]

    def _documents(self, tokenizer: Any) -> list[list[int]]:
        pool = [d.ids for d in documents(self.document_tokens, tokenizer) if d.first]
        return _drawn(pool, self, "sessions", "document_tokens", f"chat {self.seed}")


@dataclass(frozen=True)
class Agents:
    """Agents that work on one repository and read its files, also those they read before.

    Every turn brings a file: one that the session has read before with probability `reread`, else
    one that it has not, as long as there is any. Before a file is read again, it has been edited
    with probability `edit`: a run of its tokens is then taken from elsewhere in it. A question
    quotes a place in the file, and the answer is what follows there.

    The files are the heads of modules of Python's standard library. All sessions read them, each
    in an order of its own.

    Attributes:
        sessions: agents. turns: files that each of them reads. files: in the repository.
        reread, edit: probabilities. edit_tokens: of an edit; the file keeps its length.
        system_tokens, file_tokens, question_tokens: exact lengths.
        seed: another one gives other files, orders, edits and questions.
    """

    seed: int = 0
    sessions: int = 4
    turns: int = 6
    files: int = 8
    reread: float = 0.4
    edit: float = 0.3
    edit_tokens: int = 8
    system_tokens: int = 40
    file_tokens: int = 256
    question_tokens: int = 32

    def __post_init__(self) -> None:
        positive(self, "sessions", "turns", "files", "edit_tokens")
        positive(self, "system_tokens", "file_tokens", "question_tokens")
        for name in ("reread", "edit"):
            if not 0 <= (value := getattr(self, name)) <= 1:
                raise ValueError(f"{name}: got {value}, want a probability from 0 to 1")
        if self.edit_tokens > self.file_tokens:
            raise ValueError(
                f"edit_tokens: got {self.edit_tokens}, allowed: up to {self.file_tokens}, the "
                "tokens of a file"
            )

    def samples(self, tokenizer: Any) -> list[Sample]:
        """Raises ValueError if a length leaves no room or there are too few files."""
        system = system_prompt(frame_of(tokenizer), self.system_tokens, tokenizer, READER)
        files = self._files(tokenizer)
        sessions = []
        for i in range(self.sessions):
            rng = random.Random(f"agents {self.seed} {i}")
            read = self._read(files, rng)
            sessions.append(
                _session(system, read, self.question_tokens, "file_tokens", tokenizer, rng)
            )
        return _alternating(sessions)

    def corpus(self, tokenizer: Any) -> list[Prompt]:
        """The files of the repository as they are before an edit."""
        system = system_prompt(frame_of(tokenizer), self.system_tokens, tokenizer, READER)
        return [join([system, file]) for file in self._files(tokenizer)]

    def _files(self, tokenizer: Any) -> list[list[int]]:
        heads = []
        for module, source in sources().items():
            text = source[: 8 * self.file_tokens]  # code has some 4 characters a token
            ids = encode(f"\n\nread {module}.py\n{text}", tokenizer)
            if len(ids) >= self.file_tokens:
                heads.append(ids[: self.file_tokens])
        return _drawn(heads, self, "files", "file_tokens", f"agents {self.seed}")

    def _read(self, files: list[list[int]], rng: random.Random) -> list[list[int]]:
        """What a session reads, turn by turn."""
        unread = rng.sample(range(len(files)), len(files))
        copies: dict[int, list[int]] = {}
        read = []
        for _ in range(self.turns):
            if copies and (not unread or rng.random() < self.reread):
                file = rng.choice(list(copies))
                if rng.random() < self.edit:
                    copies[file] = self._edited(copies[file], rng)
            else:
                file = unread.pop()
                copies[file] = files[file]
            read.append(copies[file])
        return read

    def _edited(self, file: list[int], rng: random.Random) -> list[int]:
        at, source = (rng.randrange(len(file) - self.edit_tokens + 1) for _ in range(2))
        run = file[source : source + self.edit_tokens]
        return file[:at] + run + file[at + self.edit_tokens :]


def _session(
    system: list[int],
    brought: Sequence[list[int]],
    question_tokens: int,
    field: str,
    tokenizer: Any,
    rng: random.Random,
) -> Iterator[Sample]:
    """A sample a turn, which brings a text, or none; questions are about the last one brought."""
    frame = frame_of(tokenizer)
    goes_on = encode(frame.after_answer, tokenizer)
    said: list[list[int]] = []
    about: list[int] = []
    for text in brought:
        if text:
            said.append(text)
            about = text
        question, answer = ask_about(about, question_tokens, field, frame, tokenizer, rng)
        yield Sample(system, list(said), question, answer)
        said.append(question + answer + goes_on)


def _alternating(sessions: Iterator[Iterator[Sample]] | list[Iterator[Sample]]) -> list[Sample]:
    return [sample for turn in zip(*sessions, strict=True) for sample in turn]


def _drawn(
    pool: list[list[int]], workload: Any, field: str, tokens: str, seed: str
) -> list[list[int]]:
    """As many texts as the workload's `field` says, out of the pool."""
    count = getattr(workload, field)
    if count > len(pool):
        raise ValueError(
            f"{field}: got {count}; there are {len(pool)} texts of {getattr(workload, tokens)} "
            "tokens"
        )
    return random.Random(seed).sample(pool, count)
