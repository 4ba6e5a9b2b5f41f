"""What a server holds, and what it says of itself in its metrics."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
from prometheus_client.parser import text_string_to_metric_families

from lmc.experiment.vllm.servers import Server

EVERY_S = 3.0
# What must have moved in /metrics once it was done to the disk, by name and labels: one is enough.
TRACES = {
    "index": r"tier_events.*index_(condemned|faults|rebuilt)",
    "corrupt": r"tier_events.*(damaged:|headers_unreadable|records_torn)",
    "full": r"(write_failures.*outcome=full|tier_events.*(disk_full|no_room))",
    "hung": r"(tiers_left_alone|write_failures.*outcome=dropped|load_failures.*what=fetch"
    r"|single_flights.*outcome=unanswered)",
}
# And seconds that bytes were under way to the disk or from it, if there are as many of them as it
# hung: writes that nobody waited for, with room in the queue for all that came behind them.
UNDER_WAY = r"transfer_seconds.*tier=disk"
LONG_S = 15.0
PREFIX = "vllm:lmc_"
VLLMS = ("model_name", "engine")  # labels


class Memory:
    """Samples of some servers, all their processes together.

    Attributes:
        samples: by server, rows of seconds, MiB of its own, MiB of files that are mapped,
            descriptors, threads.
    """

    def __init__(self, servers: dict[str, Server]) -> None:
        self.samples: dict[str, list[tuple[float, ...]]] = {name: [] for name in servers}
        self._servers = servers

    async def run(self) -> None:
        """Sample, until cancelled."""
        while True:
            for name, server in self._servers.items():
                self.samples[name].append((time.monotonic(), *held(server.pid)))
            await asyncio.sleep(EVERY_S)


def held(pid: int) -> tuple[float, float, float, float]:
    """Of a process and all that it started: MiB of its own, MiB of files, descriptors, threads.

    Its own is what is in no file, shared memory included: pages of files go when others need room.
    """
    root = psutil.Process(pid)
    sums = np.zeros(4)
    for process in [root, *root.children(recursive=True)]:
        try:
            status = dict(
                re.findall(r"(\w+):\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text())
            )
            own = int(status["RssAnon"]) + int(status["RssShmem"])
            sums += (
                own / 1024,
                int(status["RssFile"]) / 1024,
                process.num_fds(),
                int(status["Threads"]),
            )
        except (psutil.NoSuchProcess, FileNotFoundError, KeyError):
            continue  # it has ended just now
    a, b, c, d = sums.tolist()
    return a, b, c, d


def waits(pid: int) -> bool:
    """Whether a thread of a process, or of what it started, waits for a disk."""
    root = psutil.Process(pid)
    for process in [root, *root.children(recursive=True)]:
        for stat in Path(f"/proc/{process.pid}/task").glob("*/stat"):
            try:
                if stat.read_text().rpartition(")")[2].split()[0] == "D":
                    return True
            except OSError:  # it has ended just now
                continue
    return False


def slope(samples: Sequence[tuple[float, ...]]) -> float:
    """MiB a minute over the second half: the median of all pairs' (Theil and Sen)."""
    rows = np.array(samples[len(samples) // 2 :])
    if len(rows) < 3:
        return 0.0
    i, j = np.triu_indices(len(rows), 1)
    return float(np.median((rows[j, 1] - rows[i, 1]) / (rows[j, 0] - rows[i, 0]))) * 60


def tenths(samples: Sequence[tuple[float, ...]], column: int) -> tuple[float, float]:
    """Medians of the first and of the last tenth."""
    values = np.array(samples)[:, column]
    n = max(1, len(values) // 10)
    return float(np.median(values[:n])), float(np.median(values[-n:]))


def counters(server: Server) -> dict[str, float]:
    """lmc's counters by name and labels, those of vLLM's left out."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(server.get("/metrics")):
        if family.type == "counter" and family.name.startswith(PREFIX):
            for sample in family.samples:
                if sample.name.endswith("_total"):
                    labels = {
                        k: v for k, v in sample.labels.items() if k not in ("model_name", "engine")
                    }
                    said = ",".join(f"{k}={v}" for k, v in sorted(labels.items()))
                    name = sample.name.removeprefix(PREFIX).removesuffix("_total")
                    found[f"{name}{{{said}}}" if said else name] = sample.value
    return found


def moved(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """By how much counters grew, those that did."""
    return {k: v - before.get(k, 0) for k, v in after.items() if v > before.get(k, 0)}


def traces(phase: str, grown: dict[str, float]) -> dict[str, float]:
    """Which of them tell of what was done in a phase."""
    told = {k: v for k, v in grown.items() if re.match(TRACES[phase], k)}
    if phase == "hung":
        told |= {k: v for k, v in grown.items() if re.match(UNDER_WAY, k) and v > LONG_S}
    return told


def level(server: Server, name: str) -> float:
    """A gauge of lmc's, all its series together."""
    return sum(
        sample.value
        for family in text_string_to_metric_families(server.get("/metrics"))
        if family.name == PREFIX + name
        for sample in family.samples
    )
