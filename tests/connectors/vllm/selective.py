"""What strategies that choose rows while a request runs do in an engine; part of `scenarios`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from lmc.blend.cacheblend import CacheBlend
from lmc.blend.evidence import Outline, Seen
from lmc.blend.query import Query
from lmc.blend.strategy import NOTHING
from lmc.connectors.vllm.taint import ChainMap, cached_blocks
from tests.connectors.vllm.engine import OPEN


@dataclass(frozen=True)
class CheckedCacheBlend(CacheBlend):
    """Blended even where it saves nothing, to be compared with full prefill."""

    control: ClassVar[bool] = True


@dataclass(frozen=True)
class CheckedQuery(Query):
    """The same of `query`."""

    control: ClassVar[bool] = True


@dataclass(frozen=True)
class Failing(CheckedCacheBlend):
    """One that fails when it has seen a layer."""

    def rows(self, outline: Outline, layer: int = 0, seen: Seen = NOTHING) -> np.ndarray:
        if layer:
            raise ArithmeticError("a strategy that fails")
        return super().rows(outline, layer, seen)


CACHEBLEND = {"name": "cacheblend", "ratio": 0.15}
QUERY = {"name": "query", "ratio": 0.1, "layers": "all", "queries": "sum"}
UNION = {"name": "union", "first": {"name": "epic", "link_tokens": 8}, "second": {"name": "query"}}
# Layer 0 of fresh rows is that of reused ones, and behind it none goes on.
NONE = {"name": "cacheblend", "ratio": 0.0, "write": "selected"}
# Of the engine's config (`engine.OPEN`).
ALL_BY_DEVIATION = "all_by_deviation"
ALL_BY_QUERY = "all_by_query"


def record(session: Any) -> None:
    """Have a session know what the latest claim's strategy chose, and how many went together."""
    from lmc.connectors.vllm import serving

    run_together = serving.run_together

    def recorded(forwards: Any) -> Any:
        session.together += [len(forwards)] if forwards else []
        outcomes = run_together(forwards)
        for outcome in outcomes:
            if not isinstance(outcome, Exception):
                session.selected = [rows.tolist() for rows in outcome.selected]
        return outcomes

    serving.run_together = recorded


def arms(session: Any, parts: list[list[int]], gap: list[int], suffix: list[int]) -> dict[str, Any]:
    """Each of them on `parts`, whose third and fourth are moved; two texts are not seen yet.

    The suffix is longer than a step of the engine.
    """
    results = {
        "cacheblend": session.fresh(parts, CACHEBLEND, save=False),
        "cacheblend_again": session.ask(parts, CACHEBLEND, save=False),
        "plain_behind": session.ask(parts, enabled=False),
        "cacheblend_all": session.fresh(parts, ALL_BY_DEVIATION, save=False),
        "cacheblend_none": session.fresh(parts, NONE, save=False),
        "cacheblend_kept": session.fresh(parts, NONE | {"write": "all"}, save=False),
        "query": session.fresh(parts, QUERY, save=False),
        "query_all": session.fresh(parts, ALL_BY_QUERY, save=False),
        "query_none": session.fresh(parts, QUERY | {"ratio": 0.0}, save=False),
        "union": session.fresh(parts, UNION, save=False),
    }
    gapped = [*parts[:2], gap, *parts[2:]]
    results |= {
        "gap": session.fresh(gapped, CACHEBLEND, save=False),
        "gap_all": session.fresh(gapped, ALL_BY_QUERY, save=False),
        "gap_plain": session.fresh(gapped, enabled=False),
    }
    long = [*parts[:-1], suffix]
    results |= {
        "long": session.fresh(long, ALL_BY_QUERY, save=False),
        "long_plain": session.fresh(long, enabled=False),
    }
    # Only where worker and scheduler live in this process.
    if selected := results["cacheblend"].selected:
        replayed = {"name": "replay", "by_layer": selected}
        results["replay"] = session.fresh(parts, replayed, save=False)
        results |= parted(session, parts)
    return results


def parted(session: Any, parts: list[list[int]]) -> dict[str, Any]:
    """A blend of which vLLM holds the first two blocks only, twice."""
    session.fresh(parts, CACHEBLEND, save=False)
    side = session.scheduler.connector._scheduler
    scopes = next(reversed(side.local.chains._chains.values()))
    _, chain, _ = scopes[-1]  # the latest of those of this prompt
    held = cached_blocks(side.local.manager.block_pool, chain.hashes)
    side.local.manager.evict_blocks(set(held[2:]))
    results = {}
    for name in ("parted", "parted_again"):
        side.local.chains = ChainMap()  # as if the blend had not been answered yet
        results[name] = session.ask(parts, CACHEBLEND, save=False)
    return results


def lost_chunks(
    session: Any, two: list[list[int]], one: list[list[int]]
) -> tuple[dict[str, Any], int]:
    """The last of `two` moved documents is lost between plan and load; and the only moved one."""
    results, gone = {}, 0
    for name, parts, blend in (("two", two, ALL_BY_DEVIATION), ("one", one, QUERY)):
        session.llm.reset_prefix_cache()
        request_id = session.add(parts, blend, save=False)
        gone += session.lose_last(
            list(session.scheduler.connector._scheduler.requests.values())[-1]
        )
        results[name] = session.finish()[request_id]
        results[name].selected = session.selected
        results[f"{name}_plain"] = session.fresh(parts, enabled=False)
    return results, gone


def measured(session: Any, tokens: np.ndarray, blocks: list[int]) -> dict[str, Any]:
    """The selective forward with a strategy, in pages that no request owns: rows and KV of each."""
    from lmc.blend import STRATEGIES
    from lmc.blend.evidence import Outline
    from lmc.connectors.vllm.adapter import VLLMAdapter
    from lmc.kernels.gather import gather
    from lmc.kernels.scatter import scatter

    worker, T = session.lmc_worker, len(tokens)
    end = T - 30
    moved = ((40, 100), (110, end))
    outline = Outline(L=3, T=T, end=end, moved=moved, new=10 + 30)
    slots = worker._attention.page_slots(np.arange(T), blocks)

    def adapter(max_rows: int = 1000, blocks: list[int] = blocks) -> VLLMAdapter:
        arguments = (worker._decoder, worker._attention, tokens, [blocks], max_rows)
        return VLLMAdapter(*arguments, worker.vllm_config)

    adapter().run(np.arange(T))
    dense = gather(worker._pages, slots).clone()
    # Rows that were seen elsewhere: the later, the farther from what they should be.
    stale = dense.clone()
    for position in outline.candidates:
        stale[:, :, position] *= 1 + position / T

    def blended(blend: dict[str, Any], **options: Any) -> tuple[Any, np.ndarray]:
        scatter(stale, worker._pages, slots)
        outcome = adapter(**options).run(np.arange(100, 110), STRATEGIES.build(blend), outline)
        return outcome, gather(worker._pages, slots).numpy().copy()

    suffix_in_part = blocks[: -(-(end + 5) // 32)]
    return {
        "dense": dense.numpy(),
        "stale": stale.numpy(),
        "all": blended(OPEN["blends"][ALL_BY_DEVIATION]),
        "deviation": blended(CACHEBLEND | {"tensor": "both"}),
        "deviation_sliced": blended(CACHEBLEND | {"tensor": "both"}, max_rows=7),
        "selected": blended(CACHEBLEND | {"write": "selected"}),
        "query": blended(QUERY),
        "query_sliced": blended(QUERY, max_rows=7),
        "query_in_part": blended(QUERY, blocks=suffix_in_part),
    }


def by_itself(session: Any, tokens: np.ndarray, other: np.ndarray) -> dict[str, Any]:
    """The selective forward in pages that no request owns; `other` tokens differ from 150 on."""
    import torch

    from lmc.connectors.vllm.adapter import VLLMAdapter
    from lmc.kernels.gather import gather

    worker = session.lmc_worker
    T, blocks = len(tokens), [9, 4, 17, 2, 30, 11, 6, 21]
    rows = np.arange(T)
    slots = worker._attention.page_slots(rows, blocks)

    def kv_after(ids: np.ndarray, chosen: np.ndarray, max_rows: int) -> Any:
        VLLMAdapter(
            worker._decoder, worker._attention, ids, [blocks], max_rows, worker.vllm_config
        ).run(chosen)
        return gather(worker._pages, slots).clone()

    def poison_rows(chosen: np.ndarray) -> None:
        where = worker._attention.page_slots(chosen, blocks)
        for k, v in zip(worker._pages.k, worker._pages.v, strict=True):
            k[where // 32, where % 32] = 50.0
            v[where // 32, where % 32] = 50.0

    dense = kv_after(tokens, rows, 1000)
    scattered = np.sort(np.random.default_rng(0).permutation(T)[:60])
    poison_rows(scattered)
    again = kv_after(tokens, scattered, 1000)
    poison_rows(scattered)
    sliced = kv_after(tokens, scattered, 7)
    changed = kv_after(other, rows, 1000)
    of_rows = measured(session, tokens, blocks)
    # A forward with the wrong mask, which this must be able to tell from the right one.
    poison_rows(scattered)
    right = worker._attention.prepare
    worker._attention.prepare = bottom_right(worker._attention)
    wrong = kv_after(tokens, scattered, 1000)
    worker._attention.prepare = right
    difference = {
        "scattered": (again - dense).abs().max(),
        "sliced": (sliced - dense).abs().max(),
        "earlier_rows": (changed - dense)[:, :, :150].abs().max(),
        "later_rows": (changed - dense)[:, :, 150:].abs().max(),
        "bottom_right_mask": (wrong - dense).abs().max(),
    }
    return {name: float(x) for name, x in difference.items()} | {
        "finite": bool(torch.isfinite(dense).all()),
        "measured": of_rows,
    }


def bottom_right(attention: Any) -> Any:
    """Rows attend as in both published implementations: as if they were the last ones there are."""
    prepare = attention.prepare

    def wrongly(requests: list[tuple[np.ndarray, list[int]]], group: int) -> Any:
        aligned = [(np.arange(r[-1] + 1 - len(r), r[-1] + 1), blocks) for r, blocks in requests]
        return replace(prepare(requests, group), how=prepare(aligned, group).how)

    return wrongly
