"""What somebody sees who scrapes an engine in processes of its own and follows its KV events."""

from __future__ import annotations

import time
from typing import Any

import msgspec
import zmq
from prometheus_client import REGISTRY, generate_latest
from vllm.distributed.kv_events import KVEventBatch

from tests.connectors.vllm import scenarios as s


class Subscriber:
    """Follows KV events as a router does."""

    def __init__(self, endpoint: str) -> None:
        self._socket = zmq.Context.instance().socket(zmq.SUB)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"")
        self._socket.connect(endpoint)
        time.sleep(0.5)  # until the publisher knows of it
        self._decoder = msgspec.msgpack.Decoder(KVEventBatch)

    def received(self, quiet_s: float = 1.0) -> list[Any]:
        """All events, as soon as no more came for a while."""
        events: list[Any] = []
        while self._socket.poll(1000 * quiet_s):
            _, _, payload = self._socket.recv_multipart()
            events += self._decoder.decode(payload).events
        return events


def observed(session: s.Session, endpoint: str) -> dict[str, Any]:
    """Documents that come again in another order while others are answered, and are evicted."""
    subscriber = Subscriber(endpoint)
    answers: list[s.Answer] = []
    for parts in (s.prompt(0, 1, 2), s.prompt(3, 4, 5)):
        answers.append(session.ask(parts, tokens=4))
    answers.append(session.fresh(s.prompt(0, 1, 2), tokens=4))
    session.llm.reset_prefix_cache()
    begun = time.monotonic()
    decoding = session.add([s.text(200, 40)], tokens=60)
    while not any(output.outputs[0].token_ids for output in session.engine.step()):
        pass
    session.add(s.prompt(2, 0, 1), s.EPIC, save=False, tokens=4)
    session.add(s.prompt(5, 3, 4), "all_by_deviation", save=False, tokens=4)
    session.add([s.text(201, 30)], enabled=False, tokens=4)
    together = session.finish()
    wall = time.monotonic() - begun
    answers += together.values()
    for seed in range(10):  # more than memory holds, then more than the disk does
        answers.append(session.ask([s.text(300 + seed, 200)], tokens=1))
        if seed == 4:
            answers.append(session.fresh(s.prompt(1, 2, 0), "full_reuse", save=False, tokens=4))
    # What is told by threads comes with a later step.
    time.sleep(1.0)
    answers.append(session.ask([s.text(400, 20)], save=False, tokens=3))
    events = [msgspec.to_builtins(e) | {"is": type(e).__name__} for e in subscriber.received()]
    return {
        "answers": answers,
        "decoding": together[decoding],
        "wall": wall,
        "scraped": generate_latest(REGISTRY).decode(),
        "events": events,
    }
