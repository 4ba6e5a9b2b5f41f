"""Sessions: conversations, agents that read files again, tools that change, agents in a relay."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lmc.sim.synthetic.base import (
    OTHERS,
    PROMPTS,
    SYSTEM,
    Synthetic,
    request_of,
)
from lmc.sim.trace import Request


@dataclass(frozen=True)
class Chat(Synthetic):
    """Conversations: every turn's prompt is all that was said before, and something new.

    All share one system prompt. Sessions begin in a Poisson process and take turns as long as a
    geometric distribution says; between a prompt and the next lie `pause` seconds on average,
    exponentially distributed, the time to answer among them. So they are interleaved in time.

    rate: sessions that begin a second. turns: of a session, on average.
    system_tokens: exactly; user and output tokens: on average.
    """

    sessions: int = 60
    rate: float = 0.1
    turns: float = 5
    pause: float = 30.0
    system_tokens: int = 800
    user_tokens: float = 120
    output_tokens: float = 250

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(0, "system_tokens", "pause")
        self._at_least(1, "sessions", "turns", "user_tokens", "output_tokens")
        self._above_zero("rate")

    def requests(self) -> Iterator[Request]:
        """The requests of all sessions, ascending in time."""
        return self._interleaved(self.sessions, self.rate, self._session)

    def _session(self, number: int, at: float) -> Iterator[Request]:
        random = self._random(PROMPTS, number)
        said = [("system", self._fixed_text(self.system_tokens, SYSTEM))]
        for _ in range(random.geometric(1 / self.turns)):
            said.append(("user", self._text(random, self.user_tokens)))
            answer = self._text(random, self.output_tokens)
            yield request_of(at, f"chat {number}", len(answer), said)
            said.append(("assistant", answer))
            at += random.exponential(self.pause)


@dataclass(frozen=True)
class Agents(Synthetic):
    """Coding agents: every turn appends a call and what the tool answered, a file.

    A session works on its own copy of one repository and starts with a system prompt that all
    sessions share, and a task. A tool reads, with probability `reread`, a file that the session
    has read before, else one that it has not, as long as there is any. Between two readings the
    file is edited with probability `edit`: `edit_tokens` of its tokens, in one run, are new. Its
    length stays, and so do the copies of it that stand in the prompt already.

    sessions, rate, turns, pause: as of Chat.
    repositories, files: how many there are, and how many files each has. Tokens of a file that
        no one has edited depend on the seed and its number alone.
    system_tokens: exactly; task, call (the model's output) and file tokens: on average.
    """

    sessions: int = 40
    rate: float = 0.05
    turns: float = 10
    pause: float = 5.0
    repositories: int = 2
    files: int = 30
    reread: float = 0.3
    edit: float = 0.3
    edit_tokens: int = 8
    system_tokens: int = 1500
    task_tokens: float = 100
    call_tokens: float = 60
    file_tokens: float = 300

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(0, "system_tokens", "pause")
        self._at_least(1, "sessions", "turns", "repositories", "files", "edit_tokens")
        self._at_least(1, "task_tokens", "call_tokens", "file_tokens")
        self._above_zero("rate")
        self._shares("reread", "edit")

    def requests(self) -> Iterator[Request]:
        """The requests of all sessions, ascending in time."""
        return self._interleaved(self.sessions, self.rate, self._session)

    def _session(self, number: int, at: float) -> Iterator[Request]:
        random = self._random(PROMPTS, number)
        first = self.files * int(random.integers(self.repositories))
        unread = (first + random.permutation(self.files)).tolist()
        copies: dict[int, np.ndarray] = {}
        said = [
            ("system", self._fixed_text(self.system_tokens, SYSTEM)),
            ("task", self._text(random, self.task_tokens)),
        ]
        for _ in range(random.geometric(1 / self.turns)):
            call = self._text(random, self.call_tokens)
            yield request_of(at, f"agent {number}", len(call), said)
            said.append(("call", call))
            if copies and (not unread or random.random() < self.reread):
                file = list(copies)[random.integers(len(copies))]
                if random.random() < self.edit:
                    copies[file] = self._edited(random, copies[file])
            else:
                file = unread.pop()
                copies[file] = self._document(file, self.file_tokens)
            said.append((f"file {file}", copies[file]))
            at += random.exponential(self.pause)

    def _edited(self, random: np.random.Generator, text: np.ndarray) -> np.ndarray:
        """A copy in which one run of tokens is new."""
        n = min(self.edit_tokens, len(text))
        start = int(random.integers(len(text) - n + 1))
        edited = text.copy()
        edited[start : start + n] = random.integers(0, self.vocabulary, n, dtype=np.int32)
        return edited


@dataclass(frozen=True)
class Tools(Synthetic):
    """Conversations with tools: a system prompt, what the tools of the session are, what was said.

    A session has `tools_per_session` of the tools, in an order of its own, as servers report them.
    Before a turn, with probability `change`, one of them, drawn at random, gives way to another:
    all that stands behind it, the conversation too, has moved then or stands behind other text.

    sessions, rate, turns, pause: as of Chat. tools: that there are.
    system_tokens: exactly; tool, user and output tokens: on average.
    """

    sessions: int = 40
    rate: float = 0.1
    turns: float = 6
    pause: float = 20.0
    tools: int = 40
    tools_per_session: int = 8
    change: float = 0.2
    system_tokens: int = 500
    tool_tokens: float = 200
    user_tokens: float = 100
    output_tokens: float = 200

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(0, "system_tokens", "pause", "tools_per_session")
        self._at_least(1, "sessions", "turns", "tools", "tool_tokens", "user_tokens")
        self._at_least(1, "output_tokens")
        self._above_zero("rate")
        self._shares("change")
        self._at_most("tools_per_session", "tools")

    def requests(self) -> Iterator[Request]:
        """The requests of all sessions, ascending in time."""
        return self._interleaved(self.sessions, self.rate, self._session)

    def _session(self, number: int, at: float) -> Iterator[Request]:
        random = self._random(PROMPTS, number)
        system = ("system", self._fixed_text(self.system_tokens, SYSTEM))
        order = random.permutation(self.tools).tolist()
        here, others = order[: self.tools_per_session], order[self.tools_per_session :]
        said: list[tuple[str, np.ndarray]] = []
        for turn in range(random.geometric(1 / self.turns)):
            if turn and here and others and random.random() < self.change:
                i, j = random.integers(len(here)), random.integers(len(others))
                here[i], others[j] = others[j], here[i]
            said.append(("user", self._text(random, self.user_tokens)))
            answer = self._text(random, self.output_tokens)
            tools = [(f"tool {n}", self._document(n, self.tool_tokens)) for n in here]
            yield request_of(at, f"chat {number}", len(answer), [system, *tools, *said])
            said.append(("assistant", answer))
            at += random.exponential(self.pause)


@dataclass(frozen=True)
class Relay(Synthetic):
    """Tasks that agents hand on: each agent reads its own role, the brief, and all reports so far.

    The roles, texts of different lengths, are the same in every task; brief and reports are new.
    So what an agent hands on is behind another role with the next one.

    tasks: that begin, `rate` a second. agents: that each task passes. pause: as of Chat.
    role, brief and report (the model's output) tokens: on average.
    """

    tasks: int = 60
    rate: float = 0.1
    agents: int = 4
    pause: float = 10.0
    role_tokens: float = 600
    brief_tokens: float = 800
    report_tokens: float = 400

    def __post_init__(self) -> None:
        super().__post_init__()
        self._at_least(0, "pause")
        self._at_least(1, "tasks", "agents", "role_tokens", "brief_tokens", "report_tokens")
        self._above_zero("rate")

    def requests(self) -> Iterator[Request]:
        """The requests of all tasks, ascending in time."""
        return self._interleaved(self.tasks, self.rate, self._task)

    def _task(self, number: int, at: float) -> Iterator[Request]:
        random = self._random(PROMPTS, number)
        handed = [("brief", self._text(random, self.brief_tokens))]
        for agent in range(self.agents):
            role = self._text(self._random(OTHERS, agent), self.role_tokens)
            report = self._text(random, self.report_tokens)
            parts = [(f"role {agent}", role), *handed]
            yield request_of(at, f"task {number}", len(report), parts)
            handed.append((f"report {agent}", report))
            at += random.exponential(self.pause)
