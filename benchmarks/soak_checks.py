"""Whether answers are right: those of exact paths beside plain vLLM, blended ones alone again."""

from __future__ import annotations

import asyncio
from collections import Counter
from itertools import zip_longest
from typing import Any

import httpx
from openai import AsyncOpenAI
from soak_load import TOPS, Answer, complete

# Nats. Rows that are computed beside other ones come out up to 1e-4 away in float32; a token that
# is ahead of another by less than this may change places with it.
TIE = 1e-3
AT_ONCE = 2  # questions to plain vLLM


class Checks:
    """Compares answers, each by what its report says of it.

    Nothing moved, and nothing local that was: every token's KV is what full prefill gives, whatever
    it came from, so the answer is that of plain vLLM to the same token ids. The same holds where
    the client forbade moving, as for streams, which bring no report.

    Blended: the answer depends on which tokens were moved and which computed, and on nothing else.
    So the prompt is asked again when nobody else asks, and compared where the map of tokens is the
    same. vLLM's cache is dropped first: it has the blended blocks of the first time, under the
    recipe of this very blend, and what is served out of them would be compared with itself. Another
    cache salt would find none of the chunks. It is asked with `save: false`, so that the
    comparison leaves behind what it found.

    Tokens that differ are accepted only where they are a tie, within TIE in the log-probabilities
    of the server that is compared with. Those are counted, and everything behind them is another
    text and compared no more.

    Attributes:
        seen: how many of what, by name. wrong: a line for each answer that is.
        furthest: the greatest difference of a log-probability that both sides told.
    """

    def __init__(self, lmc: AsyncOpenAI, plain: AsyncOpenAI, models: dict[str, str]) -> None:
        self.seen: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.furthest = 0.0
        self._lmc, self._plain, self._models = lmc, plain, models
        self._blended: list[Answer] = []  # since they were asked again
        self._known: dict[str, Answer] = {}
        self._queue: asyncio.Queue[Answer] = asyncio.Queue()

    def heard(self, answer: Answer) -> None:
        """Take in an answer."""
        kinds = (answer.report or {}).get("kinds")
        if answer.lmc.get("blend") == "prefix" or (kinds and _is_exact(kinds)):
            self._queue.put_nowait(answer)
        elif kinds:
            self.seen["blended"] += 1
            self._blended.append(answer)
        else:
            self.seen["unreported"] += 1
            self.wrong.append(f"{answer.phase} {answer.kind}: no report: {answer.report}")

    @property
    def waiting(self) -> int:
        """Answers that are yet to be compared with plain vLLM."""
        return self._queue.qsize()

    async def run(self) -> None:
        """Ask plain vLLM, until cancelled."""
        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(self._refer())

    async def done(self) -> None:
        """Return when nothing waits."""
        await self._queue.join()

    async def again(self, url: str, seconds: float) -> None:
        """Ask blended prompts again, the last ones first; the caller sees that nobody else asks.

        Args:
            url: of lmc's server. seconds: after which no more are begun.
        """
        loop = asyncio.get_running_loop()
        until = loop.time() + seconds
        kept, self._blended = self._blended, []
        for first in reversed(kept):
            if loop.time() > until:
                return
            await _drop_cache(url)
            lmc = first.lmc | {"explain": True, "save": False}
            options = first.options | {"logprobs": TOPS}
            alone = await complete(self._lmc, self._models["lmc"], first.prompt, options, lmc)
            if other := _other(_plan(first.report), _plan(alone.report)):
                self.seen["blended_not_comparable"] += 1
                self.seen[f"plan:{other}"] += 1
                continue
            self.seen["blended_compared"] += 1
            self.seen[f"blended_compared:{first.phase}"] += 1
            self._compare(first, alone)

    async def _refer(self) -> None:
        while True:
            answer = await self._queue.get()
            options = {**answer.options, "logprobs": TOPS}
            name = repr((answer.prompt, sorted(options.items())))
            if name not in self._known:  # the same is asked again and again
                plain, model = self._plain, self._models["plain"]
                self._known[name] = await complete(plain, model, answer.prompt, options, None)
            self.seen["exact_compared"] += 1
            self.seen[f"exact_compared:{answer.phase}"] += 1
            self._compare(answer, self._known[name])
            if answer.kind != "repeat":
                self._known.pop(name, None)
            self._queue.task_done()

    def _compare(self, got: Answer, want: Answer) -> None:
        if len(got.tokens) != len(want.tokens):
            self._say(got, want, 0, f"{len(got.tokens)} answers for {len(want.tokens)}")
        for i, (some, right) in enumerate(zip(got.tokens, want.tokens, strict=False)):
            differ = (j for j, (a, b) in enumerate(zip(some, right, strict=False)) if a != b)
            first = next(differ, None)
            if first is None and len(some) != len(right):
                self._say(got, want, i, "of another length")
            told = got.tops[i] if got.tops else []
            end = len(right) if first is None else first + 1  # behind it is another text
            pairs = zip(told[:end], want.tops[i][:end], strict=False)
            apart = max((_apart(a, b) for a, b in pairs), default=0.0)
            self.furthest = max(self.furthest, apart)
            if apart > TIE:
                self._say(got, want, i, f"log-probabilities {apart:.2g} apart")
            elif first is not None:
                # Of what was drawn it is enough that it was drawn from the same.
                drawn = told and "seed" in got.options
                if drawn or _tie(want.tops[i][first], some[first], right[first]):
                    self.seen["ties"] += 1
                else:
                    tops = want.tops[i][first]
                    self._say(got, want, i, f"another token {first}, {tops}")

    def _say(self, got: Answer, want: Answer, i: int, what: str) -> None:
        kinds = (got.report or {}).get("kinds")
        self.wrong.append(
            f"{got.phase} {got.kind} of {len(got.prompt)} tokens {kinds}: {what}: "
            f"{got.tokens[i]}, want {want.tokens[i]}"
        )


def _is_exact(kinds: dict[str, int]) -> bool:
    return kinds["moved"] == kinds["local_blended"] == 0


def _plan(report: dict[str, Any] | None) -> list[tuple[str, int]]:
    """What a blended answer depends on: runs by their ends, true ones in front all alike."""
    plan: list[tuple[str, int]] = []
    moved = False
    for _, end, kind, _, _ in (report or {}).get("map") or []:
        moved = moved or kind in ("moved", "local_blended")
        what = {"new": "computed", "recomputed": "computed", "exact": "true", "local": "true"}
        said = what.get(kind, kind) if moved else "true"
        if plan and plan[-1][0] == said:
            plan.pop()
        plan.append((said, end))
    return plan


def _other(first: list[tuple[str, int]], alone: list[tuple[str, int]]) -> str:
    """Where two plans part, in words; "" where they are one that is known.

    What is local of an earlier blend may be anything.
    """
    for a, b in zip_longest(first, alone, fillvalue=("nothing", 0)):
        if a != b or a[0] == "local_blended":
            return f"{a[0]}, {b[0]}"
    return "" if first else "not told"


def _apart(a: dict[str, float], b: dict[str, float]) -> float:
    """By how much two servers differ about the tokens that both of them told."""
    return max((abs(a[token] - b[token]) for token in a.keys() & b.keys()), default=0.0)


def _tie(tops: dict[str, float], got: int, want: int) -> bool:
    a, b = (tops.get(f"token_id:{token}") for token in (got, want))
    return a is not None and b is not None and abs(a - b) < TIE


async def _drop_cache(url: str) -> None:
    """vLLM's own; what lmc has stays. It refuses while blocks are lent, as to texts alone."""
    async with httpx.AsyncClient(timeout=60) as http:
        while not (await http.post(f"{url}/reset_prefix_cache")).json()["success"]:
            await asyncio.sleep(0.2)
