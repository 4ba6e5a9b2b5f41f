"""What engines that share a Redis are computing just now, as `lmc.store.flights` has it.

A name is a key that its owner renews and that ends by itself. All of them are in one hash slot, so
that a script takes the names of a request in one go, on a cluster too.
"""

from __future__ import annotations

import os
import threading
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from lmc.store.flights import LASTS_S
from lmc.store.remote.redis_server import RedisServer
from lmc.store.remote.server import Fault

MOST = 1 << 18  # names of one process: of some thirty prompts of 128,000 tokens
OWNER_BYTES = 8

# KEYS: names. ARGV: owner, milliseconds, tokens of each. Returns what others say of each, or "".
TAKE = """
local said = {}
for i, name in ipairs(KEYS) do
  local other = redis.call('GET', name)
  if other and string.sub(other, 1, #ARGV[1]) ~= ARGV[1] then
    said[i] = other
  else
    redis.call('SET', name, ARGV[1] .. ARGV[i + 2], 'PX', ARGV[2])
    said[i] = ''
  end
end
return said
"""
END = """
for _, name in ipairs(KEYS) do
  local of = redis.call('GET', name)
  if of and string.sub(of, 1, #ARGV[1]) == ARGV[1] then redis.call('DEL', name) end
end
"""


class RedisFlights:
    """The names of one process, and what it asks of others'.

    Args:
        counts: of the tier: `flights_failed:{kind}`.
    """

    def __init__(self, server: RedisServer, counts: Counter[str]) -> None:
        self._server, self._counts = server, counts
        self._owner, self._pid = os.urandom(OWNER_BYTES), os.getpid()
        self._ours: dict[bytes, tuple[int, int]] = {}  # how often it was begun, and tokens
        self._lock = threading.Lock()

    def begin(
        self, requests: Sequence[tuple[Mapping[bytes, int], Collection[bytes]]]
    ) -> list[dict[bytes, int]]:
        """As `Flights.begin`."""
        names = {name: tokens for some, _ in requests for name, tokens in some.items()}
        others: dict[bytes, int] = {}
        with self._counted():
            with self._lock:
                room = len(self._ours) + len(names) <= MOST
            said = self._take(names) if room else {}
            asked = {name for _, some in requests for name in some if name not in names}
            others = said | self.others(asked)
            with self._lock:
                for some, _ in requests if room else ():
                    for name, tokens in some.items():
                        if name not in others:
                            times = self._ours.get(name, (0, 0))[0]
                            self._ours[name] = times + 1, tokens
        return [
            {n: others[n] for n in {*some, *asked_of} if n in others} for some, asked_of in requests
        ]

    def others(self, asked: Collection[bytes]) -> dict[bytes, int]:
        """As `Flights.others`."""
        names, others = list(asked), dict[bytes, int]()
        with self._counted():
            values = self._server.values([self._key(name) for name in names])
            others = self._read(zip(names, values, strict=True))
        return others

    def end(self, names: Iterable[bytes]) -> None:
        """As `Flights.end`."""
        over = []
        with self._lock:
            for name in names:
                times, tokens = self._ours.pop(name, (0, 0))
                if times > 1:
                    self._ours[name] = times - 1, tokens
                elif times:
                    over.append(name)
        with self._counted():
            if over:
                self._server.script(END, [self._key(name) for name in over], [self._owner])

    def renew(self) -> None:
        """As `Flights.renew`."""
        with self._lock:
            ours = {name: tokens for name, (_, tokens) in self._ours.items()}
        with self._counted():
            self._take(ours)

    def close(self) -> None:
        """As `Flights.close`."""
        if os.getpid() != self._pid:  # a child's, who has begun none of them
            return
        with self._lock:
            names = [name for name, (times, _) in self._ours.items() for _ in range(times)]
        self.end(names)

    # -- parts -------------------------------------------------------------------------------

    def _take(self, names: Mapping[bytes, int]) -> dict[bytes, int]:
        if not names:
            return {}
        arguments: list[Any] = [self._owner, round(1000 * LASTS_S), *map(str, names.values())]
        said = self._server.script(TAKE, [self._key(name) for name in names], arguments)
        return self._read(zip(names, said, strict=True))

    def _read(self, said: Iterable[tuple[bytes, bytes | None]]) -> dict[bytes, int]:
        others = {}
        for name, value in said:
            if value and not value.startswith(self._owner):
                tokens = value[OWNER_BYTES:]
                others[name] = int(tokens) if tokens.isdigit() and len(tokens) < 12 else 0
        return others

    def _key(self, name: bytes) -> bytes:
        return b"{flights}" + name

    @contextmanager
    def _counted(self) -> Iterator[None]:
        """What goes wrong is counted, and that is all."""
        try:
            yield
        except Exception as fault:  # a server may answer anything
            kind = str(fault) if isinstance(fault, Fault) else "garbage"
            self._counts[f"flights_failed:{kind}"] += 1
