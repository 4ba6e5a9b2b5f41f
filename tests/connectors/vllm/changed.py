"""An engine whose weights change while chunks of the old ones are stored; part of `trust`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from tests.connectors.vllm import scenarios as s


def weights(session: s.Session) -> dict[str, Any]:
    """Weights that change by each way there is, while chunks of the old ones are stored."""
    session.llm.reset_prefix_cache()
    parts, longer = s.prompt(2, 0), [*s.prompt(2, 0), s.text(33, 25)]
    model = session.lmc_worker._decoder.model
    weight = model.model.embed_tokens.weight

    def written(seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(weight.shape, generator=generator) * weight.std()

    def in_place(seed: int) -> None:
        with torch.no_grad():
            weight.copy_(written(seed))

    def behind_the_back(seed: int) -> None:
        weight.data.copy_(written(seed))

    def swapped_storage(seed: int) -> None:
        weight.data = written(seed)

    def by_a_trainer(seed: int) -> None:
        model.load_weights([("model.embed_tokens.weight", written(seed))])

    def named(seed: int) -> None:
        weight.data.copy_(written(seed))
        session.llm.collective_rpc("name_weights", args=(f"version {seed}",))

    ways: list[Callable[[int], None]] = [
        in_place, behind_the_back, swapped_storage, by_a_trainer, named,
    ]  # fmt: skip
    results: dict[str, Any] = {"first": s.plain(session, parts)}
    session.fresh(parts, "prefix", tokens=1)
    session.llm.collective_rpc("finish_saves")
    for seed, way in enumerate(ways):
        way(seed)
        session.llm.reset_prefix_cache()
        session.fresh([s.text(300 + seed, 60)], "prefix")  # is what notices, and stores nothing
        got = session.fresh(parts, s.EPIC)
        # The first one was planned for other weights, and keeps nothing.
        session.fresh(parts, "prefix", tokens=1)
        again = session.fresh(longer, "prefix", save=False)
        results[way.__name__] = {
            "got": got, "again": again,
            "plain": s.plain(session, parts), "plain_longer": s.plain(session, longer),
        }  # fmt: skip
    # The same name again, after another: found on disk, as if nothing had been between.
    session.llm.collective_rpc("name_weights", args=("another",))
    results["other_name"] = session.fresh(parts, "prefix", save=False)
    session.llm.collective_rpc("name_weights", args=("version 4",))
    session.fresh([s.text(90, 20)], enabled=False)
    results["same_name"] = session.fresh(parts, "prefix", save=False)
    # Back to the files: their chunks are found again, and no others.
    session.llm.collective_rpc("reload_weights")
    session.llm.reset_prefix_cache()
    results["reloading"] = session.fresh(parts, s.EPIC, save=False)
    results["reloaded"] = session.fresh(parts, "prefix", save=False)
    results["noticed"] = [
        (session.fresh(text, "prefix", save=False), s.plain(session, text))
        for text in ([s.text(300 + seed, 60), s.text(310, 9)] for seed in range(len(ways)))
    ]
    results["running"] = running(session, parts, longer, behind_the_back)
    results["ended"] = ended(session, behind_the_back)
    results["unreset"] = unreset(session, parts, longer, in_place)
    return results


def running(session: s.Session, parts: Any, longer: Any, change: Callable[[int], None]) -> Any:
    """A request that began with other weights leaves nothing to be found."""
    session.llm.reset_prefix_cache()
    long = [s.text(71, 90)]
    request = session.add(long, "prefix", tokens=30)
    for _ in range(5):
        session.engine.step()
    change(20)
    session.lmc_worker.watch.changed()
    tokens = session.finish()[request].tokens
    session.llm.reset_prefix_cache()
    turn = [*long, tokens, s.text(72, 12)]
    now = session.fresh(turn, "prefix", save=False), s.plain(session, turn)
    # Nor under the name of those that it began with.
    session.llm.collective_rpc("reload_weights")
    session.llm.reset_prefix_cache()
    session.fresh([s.text(9, 22)], enabled=False)
    return now, (session.fresh(turn, "prefix", save=False), s.plain(session, turn))


def ended(session: s.Session, change: Callable[[int], None]) -> Any:
    """A request that ends in the very step that notices other weights leaves nothing on disk."""
    session.llm.collective_rpc("reload_weights")
    session.llm.reset_prefix_cache()
    session.fresh([s.text(9, 20)], enabled=False)
    text = [s.text(73, 40)]
    request = session.add(text, "prefix", tokens=24)
    side = session.scheduler.connector._scheduler
    tracked = next(t for i, t in side.requests.items() if i.split("-")[0] == request)
    while len(tracked.request.output_token_ids) < 23:
        session.engine.step()
    change(22)
    session.lmc_worker.watch.changed()
    session.add([s.text(74, 30)], "prefix", tokens=3)
    tokens = session.finish()[request].tokens
    session.llm.collective_rpc("finish_saves")
    session.llm.collective_rpc("reload_weights")
    session.llm.reset_prefix_cache()
    session.fresh([s.text(9, 21)], enabled=False)
    turn = [*text, tokens, s.text(75, 12)]
    return session.fresh(turn, "prefix", save=False), s.plain(session, turn)


def unreset(session: s.Session, parts: Any, longer: Any, change: Callable[[int], None]) -> Any:
    """Where vLLM's own cache is not reset, what is computed over it is not stored."""
    session.fresh(parts, enabled=False)
    change(21)
    session.ask(longer, "prefix")  # over vLLM's blocks of the old weights
    session.ask([*longer, s.text(34, 40)], "prefix")
    time.sleep(0.01)
    session.llm.reset_prefix_cache()
    return session.fresh(longer, "prefix", save=False), s.plain(session, longer)
