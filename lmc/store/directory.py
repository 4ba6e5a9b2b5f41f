"""What tiers have of a prompt: asked in the background, once for the whole of it."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np

from lmc.chunking.pieces import Contexts, Piece, content_keys
from lmc.store.breaker import Breaker
from lmc.store.record import Record, exact_at
from lmc.store.tier import Behind, Tier

logger = logging.getLogger(__name__)

REMEMBERED = 1 << 14  # answers kept of one tier: a prompt of 128,000 tokens has some 4,000
LASTS_S = 2.0  # an answer of a tier that cannot tell whether it still holds
ROUNDS = 64  # of questions about one prompt: what was cut elsewhere is followed chunk by chunk

# What a tier is asked: its chunks of a content, by token ids, or what is behind.
_Question = bytes | Behind


class Answers:
    """What one tier said about one prompt; what it was not asked counts as not there.

    Args:
        missing: by id, `time.monotonic()` when the tier did not bring what it had told of: of what
            it said before then that is not believed.

    Attributes:
        name: the tier's.
        unasked: what would have been asked of it.
        ids: of all records that it told of.
        told: whether it has answered all that it was asked.
    """

    def __init__(self, name: str, missing: Mapping[bytes, float]) -> None:
        self.name = name
        self._missing, self._asked = missing, time.monotonic()
        self.unasked: set[_Question] = set()
        self.ids: set[bytes] = set()
        self.told = False
        self._known: dict[_Question, list[Record]] = {}

    def of(self, content: bytes) -> list[Record]:
        """Variants of one content, by its token ids' bytes, the oldest first; tails excepted."""
        return self._of(content)

    def after(self, context: bytes, first: bytes) -> list[Record]:
        """What was computed behind `context` and begins with the token `first` (8 bytes)."""
        return self._of(Behind(context, first))

    def has(self, question: _Question) -> bool:
        """Whether it was asked."""
        return question in self._known

    def keep(self, before: Answers) -> None:
        """What it answered before."""
        self._known |= before._known
        self.ids |= before.ids
        self._asked = before._asked

    def learn(self, answers: Mapping[_Question, list[Record]]) -> None:
        """What it answered."""
        self._known.update(answers)
        for records in answers.values():
            if records:
                self.ids.update(record.id for record in records)

    def _of(self, question: _Question) -> list[Record]:
        found = self._known.get(question)
        if found is None:
            if self.told:
                self.unasked.add(question)
            return []
        if self._missing and found:
            return [r for r in found if self._missing.get(r.id, 0.0) < self._asked]
        return found


class Asked:
    """A prompt, and those of its pieces that the tiers are asked about.

    Attributes:
        answers: of each tier, in order; what has not come yet is not in them.
    """

    def __init__(
        self, namespace: bytes, tokens: np.ndarray, pieces: Sequence[Piece], reached: int
    ) -> None:
        self.namespace = namespace
        self.tokens, self.pieces, self.reached = tokens, pieces, reached
        self.answers: list[Answers] = []
        self.deadline = 0.0
        self._left = 0
        self._changed = threading.Condition()

    @property
    def over(self) -> bool:
        """Whether nothing more is waited for: all that were asked have answered, or time is up."""
        return not self._left or time.monotonic() >= self.deadline

    @property
    def told(self) -> bool:
        """Whether any of them told of anything."""
        return any(answers.ids for answers in self.answers)

    @property
    def unasked(self) -> bool:
        """Whether a plan with these answers would have wanted to know more."""
        return any(answers.unasked for answers in self.answers)

    def wait(self, until: float) -> bool:
        """Whether all have answered by `until` of `time.monotonic()`."""
        with self._changed:
            return self._changed.wait_for(
                lambda: not self._left, max(0.0, until - time.monotonic())
            )

    def begin(self, n: int, deadline: float) -> None:
        self._left, self.deadline = n, deadline

    def answered(self) -> None:
        """One more has."""
        with self._changed:
            self._left -= 1
            self._changed.notify_all()

    def told_by(self, id: bytes) -> int | None:
        """The first tier that told of the record of an id, by its place; None where none did."""
        return next((i for i, answers in enumerate(self.answers) if id in answers.ids), None)


class Directory:
    """Asks every tier on a thread of its own, and remembers what it said while that holds.

    A tier that does not answer in time is left alone for a while. What is told may be wrong by the
    time it is used: whoever uses it verifies what comes.

    Args:
        tiers: in the order in which they are asked for bytes.
        patience_s: after so long an answer is not waited for.
    """

    def __init__(self, tiers: Sequence[Tier], patience_s: float) -> None:
        self.tiers = list(tiers)
        self.breakers = [Breaker() for _ in self.tiers]
        self.patience_s = patience_s
        self._desks = [
            _Desk(tier, breaker) for tier, breaker in zip(self.tiers, self.breakers, strict=True)
        ]

    def ask(
        self,
        namespace: bytes,
        tokens: np.ndarray,
        pieces: Sequence[Piece],
        reached: int = 0,
        before: Asked | None = None,
    ) -> Asked:
        """Have every tier that answers asked for chunks of tokens [T]; returns at once.

        Args:
            pieces: those that are asked for.
            reached: tokens that are there already, exact all of them.
            before: what was asked of the same prompt and left questions open: what was answered is
                kept, and those are asked as well.
        """
        asked = Asked(namespace, tokens, pieces, reached)
        answering = []
        for desk in self._desks:
            answers = Answers(desk.name, desk.missing)
            more: set[_Question] = set()
            if before is not None and before.namespace == namespace:
                answers.keep(before.answers[len(asked.answers)])
                more = before.answers[len(asked.answers)].unasked
            asked.answers.append(answers)
            if desk.available():
                answering.append((desk, answers, more))
        asked.begin(len(answering), time.monotonic() + self.patience_s)
        for desk, answers, more in answering:
            desk.submit(partial(desk.answer, asked, answers, more), asked)
        return asked

    def disbelieve(self, tier: int, id: bytes) -> None:
        """A tier, by its place, has not brought what it told of: it has to tell of it anew."""
        missing = self._desks[tier].missing
        if len(missing) >= REMEMBERED:
            missing.clear()
        missing[id] = time.monotonic()

    @property
    def pending(self) -> int:
        """How many questions the tiers have yet to answer, all together."""
        return sum(desk.pending for desk in self._desks)

    def close(self, tiers: bool, timeout_s: float = 5.0) -> None:
        """Let go of the threads; one that hangs is left.

        Args:
            tiers: whether to close the tiers, too, on these threads.
        """
        for desk in self._desks:
            desk.close(tiers)
        until = time.monotonic() + timeout_s
        for desk in self._desks:
            desk.join(until - time.monotonic())


class _Desk:
    """One tier's answers, and the thread that asks for them."""

    def __init__(self, tier: Tier, breaker: Breaker) -> None:
        self.tier, self.breaker, self.name = tier, breaker, tier.name
        self.missing: dict[bytes, float] = {}
        # By namespace; all of one epoch, or each with the time at which it was told.
        self._remembered: dict[bytes, dict[_Question, tuple[list[Record], float]]] = {}
        self._epoch: int | None = None
        self._changed = threading.Condition()
        self._waiting: list[tuple[Callable[[], None], Asked]] = []
        self._running: Asked | None = None
        self._closing = False
        self._close_tier = False
        self._thread = threading.Thread(target=self._run, name=f"lmc-ask-{self.name}", daemon=True)
        self._thread.start()

    @property
    def pending(self) -> int:
        """How many wait for an answer, or are being answered."""
        return len(self._waiting) + (self._running is not None)

    def available(self) -> bool:
        """Whether to ask the tier: not as long as a call has not come back in time."""
        with self._changed:
            overdue = self._running is not None and self._running.deadline <= time.monotonic()
        if overdue:
            self.breaker.late()
        return self.breaker.allows()

    def submit(self, job: Callable[[], None], asked: Asked) -> None:
        with self._changed:
            if not self._closing:
                self._waiting.append((job, asked))
                self._changed.notify()
                return
        asked.answered()

    def close(self, tier: bool) -> None:
        with self._changed:
            self._closing, self._close_tier = True, tier
            waiting, self._waiting = self._waiting, []
            self._changed.notify()
        for _, asked in waiting:
            asked.answered()

    def join(self, timeout_s: float) -> None:
        self._thread.join(max(0.0, timeout_s))

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if self._closing:
                    break
                job, asked = self._waiting.pop(0)
                self._running = asked
            try:
                # One whose time is over is waited for by nobody.
                if time.monotonic() < asked.deadline:
                    job()
            except BaseException:  # a tier may be anybody's
                logger.exception("lmc could not ask tier %s what it has", self.name)
            if time.monotonic() < asked.deadline:
                self.breaker.answered()
            with self._changed:
                self._running = None
            asked.answered()
        try:
            if self._close_tier:
                self.tier.close()
        except BaseException:
            logger.exception("lmc could not close tier %s", self.name)

    def answer(self, asked: Asked, answers: Answers, more: set[_Question]) -> None:
        """Ask for chunks, and for what stands where those end that are exact one behind the other.

        Where that was cut elsewhere, what is left of the prompt is asked for by what stands before
        each chunk, too, in one go: wherever it goes on as this prompt is cut it is found then.
        """
        ids = np.ascontiguousarray(asked.tokens, "<i8").tobytes()
        contexts = Contexts(ids)
        contents = {start: ids[8 * start : 8 * end] for start, end, _ in asked.pieces}
        starts = iter(contents)
        at, elsewhere = asked.reached, False
        behind = Behind(contexts[at], ids[8 * at : 8 * at + 8])
        ask: set[_Question] = {*contents.values(), behind, *more}
        ask = {question for question in ask if not answers.has(question)}
        for _ in range(ROUNDS):
            self._ask(asked, answers, ask)
            ask = set()
            while 8 * at < len(ids):
                question = Behind(contexts[at], ids[8 * at : 8 * at + 8])
                here = answers.of(contents[at]) if at in contents else []
                exact = [record for record in here if exact_at(record, at, contexts)]
                if not exact and not answers.has(question):
                    ask.add(question)
                    break
                exact = exact or [
                    r for r in answers.after(*question) if ids.startswith(r.tokens, 8 * at)
                ]
                if exact:
                    longest = max(exact, key=lambda record: record.T)
                    at += longest.T
                    contexts.learn(at, longest.context_after)
                elif at in contents or (later := next((s for s in starts if s > at), None)) is None:
                    break
                else:  # what lies between may be in memory
                    at = later
            if not ask or time.monotonic() >= asked.deadline:
                break
            if at not in contents and not elsewhere:
                elsewhere = True
                left = (start for start in contents if start > at)
                ask |= {Behind(contexts[s], ids[8 * s : 8 * s + 8]) for s in left}
        answers.told = True

    def _ask(self, asked: Asked, answers: Answers, ask: set[_Question]) -> None:
        contents = [question for question in ask if isinstance(question, bytes)]
        behind = [question for question in ask if isinstance(question, Behind)]
        remembered = self._held(asked.namespace)
        # By key, since contents are long.
        keys: dict[bytes, bytes] = dict(
            zip(content_keys(asked.namespace, contents), contents, strict=True)
        )
        known: dict[_Question, list[Record]] = {
            keys[q] if isinstance(q, bytes) else q: remembered[q][0]
            for q in (*keys, *behind)
            if q in remembered and not self._missed(*remembered[q])
        }
        answers.learn(known)
        new = [key for key in keys if keys[key] not in known]
        behind = [question for question in behind if question not in known]
        if not new and not behind:
            return
        found, after = self.tier.lookup_many(asked.namespace, new, behind, asked.deadline)
        found = [_asked_for(asked.namespace, keys[q], r) for q, r in zip(new, found, strict=True)]
        after = [_asked_for(asked.namespace, q, r) for q, r in zip(behind, after, strict=True)]
        now, told = time.monotonic(), dict[_Question, list[Record]](zip(behind, after, strict=True))
        for question, records in (*zip(new, found, strict=True), *told.items()):
            # That something is not there holds only where it would be noticed when it comes.
            if records or self._epoch is not None:
                remembered[question] = records, now
        for key, records in zip(new, found, strict=True):
            told[keys[key]] = records
        answers.learn(told)

    def _missed(self, records: list[Record], at: float) -> bool:
        """Whether something was not brought since it was told of."""
        return bool(self.missing) and any(self.missing.get(r.id, 0.0) >= at for r in records)

    def _held(self, namespace: bytes) -> dict[_Question, tuple[list[Record], float]]:
        """What was told of a namespace and still holds."""
        epoch, now = self.tier.epoch, time.monotonic()
        much = sum(len(told) for told in self._remembered.values()) > REMEMBERED
        if epoch != self._epoch or much:
            self._epoch = epoch
            self._remembered.clear()
        remembered = self._remembered.setdefault(namespace, {})
        if epoch is None:
            for question in [q for q, (_, at) in remembered.items() if now - at > LASTS_S]:
                del remembered[question]
        return remembered


def _asked_for(namespace: bytes, question: _Question, told: Sequence[Record]) -> list[Record]:
    """Of what a tier told, what was asked for; it names no slot of host memory."""
    out = []
    for record in told:
        if isinstance(question, bytes):
            fits = record.tokens == question
        else:
            fits = (record.context, record.tokens[:8]) == question
        if fits and record.namespace == namespace:
            out.append(record if record.slot == -1 else record.at(-1))
    return out
