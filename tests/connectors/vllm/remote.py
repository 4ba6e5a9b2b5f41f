"""What the tests let engines do that share a server."""

from __future__ import annotations

from typing import Any

from tests.connectors.vllm.persistent import counting
from tests.connectors.vllm.scenarios import EPIC, Session, plain, prompt


def stores(session: Session) -> int:
    """Documents, by the first engine; how many tokens it put."""
    session.warm()
    session.llm.collective_rpc("finish_saves")
    return int(session.lmc_worker.chunks.memory.size)


def shares(session: Session, servers: Any) -> dict[str, Any]:
    """What the second engine finds of them, while the server is there and when it is not.

    Args:
        servers: the pid of the server.
    """
    import os
    import signal

    parts = prompt(2, 0, 3)
    counts = counting(session)
    results: dict[str, Any] = {"plain": plain(session, parts)}
    for name, blend in (("recompute", "full_recompute"), ("epic", EPIC), ("exact", "prefix")):
        session.scheduler.connector._scheduler.index.clear()
        results[name] = session.fresh(parts, blend, save=False)
    session.scheduler.connector._scheduler.index.clear()
    os.kill(servers, signal.SIGSTOP)
    results["held"] = session.fresh(parts, EPIC, save=False)
    os.kill(servers, signal.SIGCONT)
    return results | {"counts": dict(counts)}
