"""What the clients of a soak ask, over and over, each one thing after the other."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from openai import AsyncOpenAI, OpenAIError

from lmc.workloads.manual import documents
from lmc.workloads.rag_reorder import RagReorder
from lmc.workloads.sample import Sample, corpus_of

# How often each is asked.
MIX = {
    "rag": 35, "document": 10, "chat": 13, "chat_streamed": 13, "repeat": 13, "sampled": 5,
    "logprobs": 6, "cancelled": 5,
}  # fmt: skip
ANSWER = 16  # tokens
TURNS = 4  # of a conversation
TOPS = 5  # log-probabilities of a token
SAVED = 0.2  # of retrieval prompts; their documents are stored by being sent alone
REPEATED = 12  # prompts that are asked again and again
CANCEL_S = 4.0  # at most, until a client loses its patience
TIMEOUT_S = 300.0
PAUSE_S = 1.0  # after a failure
NEVER_MOVED = {"blend": "prefix"}


@dataclass
class Answer:
    """What was asked and what came.

    Attributes:
        kind: one of MIX. phase: what was done to the disk meanwhile.
        prompt: token ids. options: how its tokens were chosen, as sent.
        lmc: what was said to lmc of it.
        tokens: of each answer. tops: of each, the log-probabilities of each token's best ones.
        report: lmc's, or None where there is none, as behind a stream.
    """

    kind: str
    phase: str
    prompt: list[int]
    options: dict[str, Any]
    lmc: dict[str, Any]
    tokens: list[list[int]]
    tops: list[list[dict[str, float]]] = field(default_factory=list)
    report: dict[str, Any] | None = None


async def complete(
    client: AsyncOpenAI, model: str, prompt: Sequence[int], options: dict[str, Any],
    lmc: dict[str, Any] | None,
) -> Answer:  # fmt: skip
    """Ask for a completion; of plain vLLM where `lmc` is None."""
    extra: dict[str, Any] = {"return_token_ids": True, "return_tokens_as_token_ids": True}
    extra |= {"ignore_eos": options.get("ignore_eos", True)}
    if lmc is not None:
        extra["kv_transfer_params"] = {"lmc": lmc}
    options = {"max_tokens": ANSWER, "temperature": 0} | options
    sent = {name: value for name, value in options.items() if name != "ignore_eos"}
    got = await client.completions.create(
        model=model, prompt=list(prompt), extra_body=extra, **sent
    )
    choices = sorted(got.choices, key=lambda choice: choice.index)
    said: Any = got
    return Answer(
        "", "", list(prompt), options, lmc or {},
        [choice.token_ids for choice in choices],  # type: ignore[attr-defined]
        [c.logprobs.top_logprobs for c in choices if c.logprobs and c.logprobs.top_logprobs],
        (getattr(said, "kv_transfer_params", None) or {}).get("lmc"),
    )  # fmt: skip


class Load:
    """N clients in a closed loop.

    Attributes:
        phase: what is done to the disk now; set by whoever does it.
        answers: that came, until somebody takes them.
        failures: one line for each request that failed.
        asked: how many of each kind, by phase. cancelled: in the midst.
        seconds: that requests took, by phase.

    Args:
        heard: called with each answer.
    """

    def __init__(
        self, client: AsyncOpenAI, model: str, tokenizer: Any, clients: int, seed: int,
        heard: Callable[[Answer], None],
    ) -> None:  # fmt: skip
        self.phase = ""
        self.failures: list[str] = []
        self.asked: Counter[tuple[str, str]] = Counter()
        self.cancelled = 0
        self.seconds: dict[str, list[float]] = {}
        self._client, self._model, self._tokenizer = client, model, tokenizer
        self._clients, self._rng, self._heard = clients, random.Random(f"load {seed}"), heard
        self._going = asyncio.Event()
        self._idle = asyncio.Condition()
        self._busy = 0
        self._over = False
        rag = RagReorder(
            seed=seed, documents=12, documents_per_prompt=4, document_tokens=192, prompts=4000
        )
        self._samples = rag.samples(tokenizer)
        self._rag = iter(self._samples)
        self._documents = corpus_of(rag, self._samples[:1], tokenizer)
        self.corpus = [document.token_ids for document in self._documents]
        self._topics = deque(d.ids for d in documents(320, tokenizer))
        random.Random(f"topics {seed}").shuffle(self._topics)
        self._repeated = [self._topic() + self._next().question for _ in range(REPEATED)]

    async def warm_up(self) -> None:
        """Documents alone, once each."""
        for document in self._documents:
            lmc = {"chunks": [list(span) for span in document.spans]}
            await complete(self._client, self._model, document.token_ids, {"max_tokens": 1}, lmc)

    async def run(self) -> None:
        """Until `end`."""
        async with asyncio.TaskGroup() as group:
            for _ in range(self._clients):
                group.create_task(self._one())

    def go_on(self) -> None:
        """Ask."""
        self._going.set()

    async def pause(self) -> None:
        """Return when all that was asked is answered; nothing is asked before `go_on`."""
        self._going.clear()
        async with self._idle:
            await self._idle.wait_for(lambda: self._busy == 0)

    async def end(self) -> None:
        """Pause, and let the clients go."""
        await self.pause()
        self._over = True
        self._going.set()

    async def burst(self) -> None:
        """While paused: each client asks one retrieval prompt more, all at once."""
        await asyncio.gather(*(self._request("rag", []) for _ in range(self._clients)))

    async def _one(self) -> None:
        """A client."""
        chat: list[dict[str, str]] = []
        while True:
            await self._going.wait()
            if self._over:
                return
            self._busy += 1
            try:
                await self._request(self._rng.choices(list(MIX), list(MIX.values()))[0], chat)
            finally:
                async with self._idle:
                    self._busy -= 1
                    self._idle.notify_all()

    async def _request(self, kind: str, chat: list[dict[str, str]]) -> None:
        phase = self.phase
        self.asked[phase, kind] += 1
        begun = time.monotonic()
        try:
            answer = await self._ask(kind, chat)
            self.seconds.setdefault(phase, []).append(time.monotonic() - begun)
            if answer is not None:
                answer.kind, answer.phase = kind, phase
                self._heard(answer)
        except OpenAIError as error:
            self.failures.append(f"{phase} {kind}: {type(error).__name__}: {error}"[:300])
            chat.clear()
            await asyncio.sleep(PAUSE_S)

    async def _ask(self, kind: str, chat: list[dict[str, str]]) -> Answer | None:
        match kind:
            case "chat" | "chat_streamed":
                return await self._chat(chat, kind == "chat_streamed")
            case "rag":
                sample = self._next()
                lmc = {"chunks": [list(s) for s in sample.reusable], "explain": True}
                # Most prompts leave nothing behind: their plans are the same when they are asked
                # again, where what they store themselves would be found.
                lmc["save"] = self._rng.random() < SAVED
                return await self._complete(sample.prompt.token_ids, {}, lmc)
            case "document":
                return await self._complete(self._rng.choice(self.corpus), {}, {"explain": True})
            case "repeat":
                prompt = self._rng.choice(self._repeated)
                return await self._complete(prompt, {}, {"explain": True})
            case "logprobs":
                sample = self._next()
                lmc = {"chunks": [list(s) for s in sample.reusable], "explain": True}
                lmc |= self._rng.choice([{}, NEVER_MOVED])
                return await self._complete(sample.prompt.token_ids, {"logprobs": TOPS}, lmc)
            case "sampled":
                options = {"n": 2, "temperature": 0.7, "seed": self._rng.randrange(1 << 30)}
                prompt = self._rng.choice(self._repeated)
                return await self._complete(prompt, options | {"logprobs": TOPS}, NEVER_MOVED)
            case _:
                await self._cancelled()
                return None

    async def _complete(
        self, prompt: Sequence[int], options: dict[str, Any], lmc: dict[str, Any]
    ) -> Answer:
        return await complete(self._client, self._model, prompt, options, lmc)

    async def _chat(self, chat: list[dict[str, str]], streamed: bool) -> Answer:
        """The next turn. A stream has no report, so what is streamed is never moved."""
        if len(chat) >= 2 * TURNS:
            chat.clear()
        decode = self._tokenizer.decode
        text = decode(self._next().question)
        if not chat:
            text = decode(self._topic()) + text
        messages = [*chat, {"role": "user", "content": text}]
        lmc: dict[str, Any] = NEVER_MOVED if streamed else {"explain": True}
        extra = {"return_token_ids": True, "kv_transfer_params": {"lmc": lmc}}
        got: Any = await self._client.chat.completions.create(
            model=self._model, messages=messages, max_tokens=ANSWER,  # type: ignore[arg-type]
            temperature=0, stream=streamed, extra_body=extra,
        )  # fmt: skip
        prompt: list[int] = []
        tokens: list[int] = []
        said, report = "", None
        if streamed:
            async for piece in got:
                prompt = getattr(piece, "prompt_token_ids", None) or prompt
                for choice in piece.choices:
                    tokens += getattr(choice, "token_ids", None) or []
                    said += choice.delta.content or ""
        else:
            prompt, tokens = got.prompt_token_ids, got.choices[0].token_ids
            said, report = got.choices[0].message.content, got.kv_transfer_params["lmc"]
        chat[:] = [*messages, {"role": "assistant", "content": said}]
        options = {"max_tokens": ANSWER, "temperature": 0, "ignore_eos": False}
        return Answer("", "", prompt, options, lmc, [tokens], report=report)

    async def _cancelled(self) -> None:
        """Ask, and hang up."""
        sample = self._next()
        lmc = {"chunks": [list(s) for s in sample.reusable]}
        task = asyncio.create_task(self._complete(sample.prompt.token_ids, {}, lmc))
        done, _ = await asyncio.wait({task}, timeout=self._rng.uniform(0.05, CANCEL_S))
        if done:
            await task
            return
        task.cancel()
        self.cancelled += 1
        await asyncio.wait({task})

    def _next(self) -> Sample:
        """Documents in an order that has not been asked yet, and a question."""
        try:
            return next(self._rag)
        except StopIteration:  # after hours
            self._rag = iter(self._samples)
            return next(self._rag)

    def _topic(self) -> list[int]:
        """A text for a conversation, another one each time for as long as there are any."""
        self._topics.rotate(-1)
        return self._topics[0]
