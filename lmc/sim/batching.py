"""Time to first token of an engine that batches: steps of bounded tokens, as vLLM makes them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from lmc.model.times import TTFTModel
from lmc.sim.queueing import Queue, ratio, since_first


@dataclass(frozen=True)
class Batch:
    """What an engine puts into a step; named as vLLM's own settings.

    Attributes:
        max_num_seqs: requests that are served side by side.
        max_num_batched_tokens: rows of a step; a longer prompt is computed in several.

    Raises ValueError for less than 1 of either.
    """

    max_num_seqs: int
    max_num_batched_tokens: int = 2048

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_batched_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, want 1 or more")


@dataclass(frozen=True, eq=False)
class Work:
    """What R requests have an engine do; arrays `[R]`.

    Attributes:
        rows, pairs: of the prompt, as `TTFTModel.seconds` takes them.
        extra_s: seconds before its first row: what is loaded, and a strategy's own forward.
        input_tokens, output_tokens: lengths of prompt and answer.
    """

    rows: np.ndarray
    pairs: np.ndarray
    extra_s: np.ndarray
    input_tokens: np.ndarray
    output_tokens: np.ndarray


def simulate_steps(
    arrivals: ArrayLike,
    work: Work,
    model: TTFTModel,
    batch: Batch,
    *,
    servers: int = 1,
    rate_scale: float = 1.0,
) -> Queue:
    """Serve requests by engines that batch, each request by the one with the fewest.

    A step computes one row of each request that decodes, then prompts in the order in which they
    came, as far as rows are left (vLLM V1's scheduler, `v1/core/sched/scheduler.py`, first come
    first served; nothing is preempted). It takes `fixed_s`, what its rows and pairs take, and what
    the requests that begin load. One that decodes alone takes `per_output_token_s`, in which all
    weights are read, and of each further request what its row and pairs take; with rows of prompts
    beside, no less than that. Where it is 0 nothing is decoded.

    Raises:
        ValueError: as `lmc.sim.queueing.simulate`, or work of less than a row a request.
    """
    arrival = since_first(arrivals, work.rows, work.input_tokens, servers, rate_scale)
    shapes = {np.shape(x) for x in (work.pairs, work.extra_s, work.output_tokens)}
    if shapes != {arrival.shape} or work.rows.min() < 1:
        raise ValueError(
            f"work: got {work.rows.min():g} rows at least, and arrays of {shapes}; want 1 or more, "
            f"and all of {arrival.shape}"
        )
    engines = _served(arrival, work, model, batch, servers)
    first, starts = (np.zeros(len(arrival)) for _ in range(2))
    for engine in engines:
        first[list(engine.first)] = list(engine.first.values())
        starts[list(engine.starts)] = list(engine.starts.values())
    end = max(engine.now for engine in engines)
    # If all of them came at once: when the last is let in, all work that came before is done, but
    # for what is served side by side until the end, which says nothing of how much more could be.
    rush = _served(np.zeros(len(arrival)), work, model, batch, servers)
    done = max(max(engine.starts.values(), default=0.0) for engine in rush)
    return Queue(
        wait_s=starts - arrival,
        ttft_s=first - arrival,
        offered=ratio(done, float(arrival[-1])),
        utilisation=ratio(sum(engine.busy for engine in engines), servers * end),
        requests_per_s=ratio(len(arrival), end),
        input_tokens_per_s=ratio(float(work.input_tokens.sum()), end),
    )


def _served(
    arrival: np.ndarray, work: Work, model: TTFTModel, batch: Batch, servers: int
) -> list[_Engine]:
    # Once for all engines: of each number in an array Python would make an object at every use.
    columns = [
        np.asarray(x, np.float64).tolist()
        for x in (work.rows, work.pairs, work.extra_s, work.input_tokens, work.output_tokens)
    ]
    engines = [_Engine(columns, model, batch) for _ in range(servers)]
    for i, came in enumerate(arrival.tolist()):
        for engine in engines:
            engine.run(came)
        min(engines, key=lambda engine: engine.load_at(came)).take(i, came)
    for engine in engines:
        engine.run(math.inf)
    return engines


class _Engine:
    """One engine, and the requests it has, by number.

    Attributes:
        now: seconds. busy: of them with a step under way.
        starts, first: by request, when its first step began and when its first token came.
    """

    def __init__(self, columns: Sequence[list[float]], model: TTFTModel, batch: Batch) -> None:
        self.now = self.busy = 0.0
        self.starts: dict[int, float] = {}
        self.first: dict[int, float] = {}
        self._model, self._batch = model, batch
        self._rows, self._pairs, self._extra, self._tokens, self._outputs = columns
        self._waiting: deque[int] = deque()
        self._prefilling: dict[int, float] = {}  # rows computed
        self._decoding: dict[int, float] = {}  # tokens answered behind the first
        self._over: deque[float] = deque()  # when requests ended, the latest of them

    @property
    def load(self) -> int:
        """Requests that it has."""
        return len(self._waiting) + len(self._prefilling) + len(self._decoding)

    def load_at(self, came: float) -> int:
        """The same at an arrival, with those that end in the step that is under way then."""
        while self._over and self._over[0] <= came:
            self._over.popleft()
        return self.load + len(self._over)

    def take(self, i: int, came: float) -> None:
        """Request `i` comes."""
        if not self.load:
            self.now = max(self.now, came)
        self._waiting.append(i)

    def run(self, until: float) -> None:
        """Make all steps that begin before `until`."""
        while self.load and self.now < until:
            if self._prefilling or (self._waiting and self._room):
                self._step()
            else:
                self._decode(until)

    @property
    def _room(self) -> bool:
        return len(self._prefilling) + len(self._decoding) < self._batch.max_num_seqs

    def _step(self) -> None:
        """One step with rows of prompts in it."""
        left = float(self._batch.max_num_batched_tokens)
        decoding = [*self._decoding][: int(left)]
        left -= len(decoding)
        keys = self._keys(decoding)
        rows, pairs, extra = float(len(decoding)), keys, 0.0
        computed: dict[int, float] = {}
        for i, done in self._prefilling.items():
            computed[i] = min(left, self._rows[i] - done)
            left -= computed[i]
        while self._waiting and self._room and left > 0:
            i = self._waiting.popleft()
            self.starts[i] = self.now
            self._prefilling[i] = 0.0
            computed[i] = min(left, self._rows[i])
            left -= computed[i]
            extra += self._extra[i]
        for i, n in computed.items():
            rows += n
            pairs += self._pairs_of(i, self._prefilling[i], n)
        alone = self._alone(len(decoding), keys) if decoding else 0.0
        prompts = self._model.fixed_s + self._work(rows, pairs)
        self._pass((max(prompts, alone) if computed else alone) + extra)
        self._answered(decoding, 1)
        for i, n in computed.items():
            self._prefilling[i] += n
            if self._prefilling[i] >= self._rows[i]:
                del self._prefilling[i]
                self.first[i] = self.now
                if self._behind(i):
                    self._decoding[i] = 0.0
                else:
                    self._over.append(self.now)

    def _decode(self, until: float) -> None:
        """Some steps that decode alone; none begins behind `until`."""
        some = [*self._decoding][: self._batch.max_num_batched_tokens]
        n, keys = len(some), self._keys(some)
        # Of these steps each sees a key a request more than the one before it.
        k = int(min(self._behind(i) - self._decoding[i] for i in some))
        begin = self._alone(n, keys)
        last = self._alone(n, keys + n * (k - 1))
        if (until - self.now) / last < k:
            k = max(1, int((until - self.now) / last))
            last = self._alone(n, keys + n * (k - 1))
        self._pass(k * (begin + last) / 2)
        self._answered(some, k)

    def _answered(self, some: Sequence[int], k: int) -> None:
        for i in some:
            self._decoding[i] += k
            if self._decoding[i] >= self._behind(i):
                del self._decoding[i]
                self._over.append(self.now)

    def _behind(self, i: int) -> float:
        """Tokens that `i` decodes behind its first one."""
        return max(0.0, self._outputs[i] - 1) if self._model.per_output_token_s else 0.0

    def _keys(self, decoding: Sequence[int]) -> float:
        return sum(self._tokens[i] + self._decoding[i] + 1 for i in decoding)

    def _pairs_of(self, i: int, done: float, n: float) -> float:
        """Of `n` rows behind `done`, where each row sees one key more than the one before it."""
        rows = self._rows[i]
        first = self._pairs[i] / rows - (rows - 1) / 2
        return n * (first + done + (n - 1) / 2)

    def _work(self, rows: float, pairs: float) -> float:
        return self._model.per_row_s * rows + self._model.per_pair_s * pairs

    def _alone(self, n: int, keys: float) -> float:
        """Seconds of a step that decodes a row of each of n requests; that of one was measured."""
        return self._model.per_output_token_s + self._work(n, keys) * (n - 1) / n

    def _pass(self, seconds: float) -> None:
        self.now += seconds
        self.busy += seconds
