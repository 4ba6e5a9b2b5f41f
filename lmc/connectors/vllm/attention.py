"""How rows at any positions of one request attend to its pages: two ways that must agree."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from vllm.v1.attention.backend import CommonAttentionMetadata

from lmc.blend.evidence import Deviation, Importance, Outline, runs_of
from lmc.connectors.vllm.groups import Groups
from lmc.connectors.vllm.layouts import Blocks, page_slots_of, paged_kv
from lmc.connectors.vllm.rows import Current, Measure, Part, Place, Rows
from lmc.kernels.deviation import deviation
from lmc.kernels.importance import importance
from lmc.kernels.paged import PagedKV
from lmc.kernels.scatter import scatter


class PagedAttention(ABC):
    """Attention of rows `[M]` of requests, their fresh K and V written to their pages first.

    Args:
        layers: by name, in the model's order.
        groups: of vLLM's KV cache; a request has blocks of its own in each.

    Raises:
        ValueError: pages whose layout is not known.
    """

    def __init__(self, layers: dict[str, Any], groups: Groups) -> None:
        self.layers = layers
        self.groups = groups
        self.block_size = groups.block_size
        self.device = next(iter(layers.values())).kv_cache.device
        self._places = {id(x): Place(x.kv_cache, paged_kv([x])) for x in layers.values()}

    def pages(self, module: Any) -> PagedKV:
        """The pages of the attention layer inside a decoder layer, as of one layer.

        Raises:
            ValueError: it has not one such layer.
        """
        inside = [self._places[id(m)] for m in module.modules() if id(m) in self._places]
        if len(inside) != 1:
            raise ValueError(f"{type(module).__name__} has {len(inside)} attention layers, want 1")
        return inside[0].pages

    def page_slots(self, rows: np.ndarray, blocks: Blocks) -> torch.Tensor:
        """Flat page slots `[M]` of rows in the request's blocks."""
        return page_slots_of(rows, blocks, self.block_size, self.device)

    def prepare(
        self,
        requests: Sequence[tuple[np.ndarray, Blocks]],
        group: int = 0,
        scratch: Place | None = None,
        kept: Sequence[Blocks] = (),
    ) -> Rows:
        """What is the same in every layer of a group for rows of requests, each with its blocks.

        Args:
            scratch: the pages in which these blocks are, if they are not the layers' own.
            kept: by request, its blocks in the layers' own pages then.
        """
        reaches = [int(rows[-1]) + 1 for rows, _ in requests]
        some = [blocks[: -(-reach // self.block_size)]
                for reach, (_, blocks) in zip(reaches, requests, strict=True)]  # fmt: skip
        table = np.zeros((len(some), max(map(len, some))), np.int32)
        for i, of_one in enumerate(some):
            table[i, : len(of_one)] = of_one
        tables = torch.from_numpy(table)
        page_slots = torch.cat([self.page_slots(rows, blocks) for rows, blocks in requests])
        on_device = tables.to(self.device)
        parts, M = [], 0
        for i, (rows, _) in enumerate(requests):
            parts.append(Part(rows, slice(M, M + len(rows)), reaches[i], on_device[i]))
            M += len(rows)
        positions = np.concatenate([rows for rows, _ in requests])
        own = zip(requests, kept, strict=True) if scratch else ()
        return Rows(
            parts=tuple(parts),
            where=torch.from_numpy(positions).to(self.device),
            page_slots=page_slots,
            tables=on_device,
            how=self._how(parts, page_slots, tables, group),
            scratch=scratch,
            kept=torch.cat([self.page_slots(r, b) for (r, _), b in own]) if scratch else None,
        )

    def attend(
        self,
        layer: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rows: Rows,
        measures: Sequence[Measure],
    ) -> torch.Tensor:
        """Write key and value `[M, G, D]`, and attend with query `[M, H, D]`; `[M, H, D]`.

        What is asked of a request's rows is answered on the way.
        """
        place = rows.scratch or self._places[id(layer)]
        deviations = [[n for n in m.needs if isinstance(n, Deviation)] for m in measures]
        if not any(deviations):
            self._write(layer, place, key, value, rows.page_slots, [])
        if rows.kept is not None:
            own = self._places[id(layer)].pages
            scatter(own.fresh(key, value), own, rows.kept)
        for part, measure, asked in zip(rows.parts, measures, deviations, strict=True):
            if any(deviations):
                fresh = (key[part.at], value[part.at], rows.page_slots[part.at])
                scores = self._write(layer, place, *fresh, asked)
                measure.scores.update(zip(asked, scores, strict=True))
            for need in measure.needs:
                if isinstance(need, Importance):
                    assert measure.outline is not None
                    asking = (query[part.at], rows.where[part.at], part)
                    asked_of = (layer, place.pages, *asking, need, measure.outline)
                    measure.scores[need] = self._importance(*asked_of)
        return self._attend(layer, place, query, key, value, rows)

    @contextmanager
    def installed(self, current: Current) -> Iterator[None]:
        """While open, attention layers work on what `current` holds."""
        for layer in self.layers.values():
            layer.forward = self._forward_of(layer, current)
        try:
            yield
        finally:
            for layer in self.layers.values():
                del layer.forward  # the instance's; the class's own shows again

    @abstractmethod
    def _how(
        self, parts: list[Part], page_slots: torch.Tensor, tables: torch.Tensor, group: int
    ) -> Any:
        """`Rows.how`; `tables` are on the host."""

    @abstractmethod
    def _write(
        self,
        layer: Any,
        place: Place,
        key: torch.Tensor,
        value: torch.Tensor,
        page_slots: torch.Tensor,
        needs: list[Deviation],
    ) -> list[torch.Tensor]:
        """Write the fresh rows; how far each was from what they replace, `[M]` by need."""

    @abstractmethod
    def _attend(
        self,
        layer: Any,
        place: Place,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rows: Rows,
    ) -> torch.Tensor:
        """Attention `[M, H, D]` over the pages, in which the fresh rows are."""

    def _importance(
        self,
        layer: Any,
        pages: PagedKV,
        query: torch.Tensor,
        where: torch.Tensor,
        part: Part,
        need: Importance,
        outline: Outline,
    ) -> torch.Tensor:
        """What the asking ones of a request's rows pay to each position of its prompt, fp32 `[T]`.

        As the layer itself attends: within its window, capped, beside its sinks.
        """
        first = int(np.searchsorted(part.positions, need.first_asking(outline)))
        scores = torch.zeros(outline.T, dtype=torch.float32, device=self.device)
        asking = where[first:]
        sinks = getattr(layer.impl, "sinks", None)
        importance(
            query[first:],
            pages.k[0],
            part.table,
            asking,
            part.reach,
            layer.impl.scale,
            heads=need.heads,
            queries=need.queries,
            first=first_key(layer, asking),
            softcap=softcap_of(layer),
            sinks=None if sinks is None else sinks.float().contiguous(),
            out=scores[: part.reach],
        )
        return scores

    def _forward_of(self, layer: Any, current: Current) -> Any:
        def forward(
            query: torch.Tensor,
            key: torch.Tensor,
            value: torch.Tensor,
            output_shape: Any = None,
            output_dtype: torch.dtype | None = None,
        ) -> torch.Tensor:
            assert current.rows is not None
            M = query.shape[0]
            return self.attend(
                layer,
                query.view(M, layer.num_heads, layer.head_size),
                key.view(M, layer.num_kv_heads, layer.head_size),
                value.view(M, layer.num_kv_heads, layer.head_size_v),
                current.rows,
                current.measures,
            ).view(M, -1)

        return forward


class BackendAttention(PagedAttention):
    """vLLM's attention backend, called for rows at any positions.

    Each maximal run of rows is a pseudo-sequence: as many queries as the run is long, a
    sequence that ends with it, the request's block table. The backend's ordinary causal mask
    is then the mask by absolute position, exactly, with one pass over the keys per run.
    """

    def __init__(self, layers: dict[str, Any], groups: Groups, vllm_config: Any) -> None:
        super().__init__(layers, groups)
        # One a group and backend: what it builds may hold the window that the group's layers share,
        # and those that attend in chunks have a backend of their own.
        self._builders: list[dict[Any, Any]] = []
        for group, spec in enumerate(groups.specs):
            names = defaultdict(list)
            for (name, layer), of in zip(layers.items(), groups.of, strict=True):
                if of == group:
                    names[layer.attn_backend].append(name)
            self._builders.append({
                backend: backend.get_builder_cls()(spec, some, vllm_config, self.device)
                for backend, some in names.items()
            })  # fmt: skip

    def _how(
        self, parts: list[Part], page_slots: torch.Tensor, tables: torch.Tensor, group: int
    ) -> Any:
        of_each = [runs_of(part.positions) for part in parts]
        runs = np.asarray([run for of_one in of_each for run in of_one], np.int32)
        request = torch.from_numpy(np.repeat(np.arange(len(parts)), list(map(len, of_each))))
        lengths = runs[:, 1] - runs[:, 0]
        starts = torch.from_numpy(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
        ends = torch.from_numpy(runs[:, 1].copy())
        common = CommonAttentionMetadata(
            query_start_loc=starts.to(self.device),
            query_start_loc_cpu=starts,
            seq_lens=ends.to(self.device),
            seq_lens_cpu_upper_bound=ends,
            num_reqs=len(runs),
            num_actual_tokens=len(page_slots),
            max_query_len=int(lengths.max()),
            max_seq_len=int(runs[:, 1].max()),
            block_table_tensor=tables[request].to(self.device),
            slot_mapping=page_slots,
            causal=True,
        )
        builders = self._builders[group].items()
        # Of what it is given one that attends in chunks makes something else.
        return {backend: builder.build(0, replace(common)) for backend, builder in builders}

    def _write(
        self,
        layer: Any,
        place: Place,
        key: torch.Tensor,
        value: torch.Tensor,
        page_slots: torch.Tensor,
        needs: list[Deviation],
    ) -> list[torch.Tensor]:
        fresh = (key, value, place.pages, page_slots)
        scores = [deviation_of(need, *fresh, write=False) for need in needs]
        layer.impl.do_kv_cache_update(layer, key, value, place.cache, page_slots)
        return scores

    def _attend(
        self,
        layer: Any,
        place: Place,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        rows: Rows,
    ) -> torch.Tensor:
        output = torch.empty_like(query)
        how = rows.how[layer.attn_backend]
        layer.impl.forward(layer, query, key, value, place.cache, how, output=output)
        return output


def window_of(layer: Any) -> int:
    """Tokens of a layer's window, or of the chunks that it attends in; 0 where it has neither."""
    return layer.sliding_window or getattr(layer, "attention_chunk_size", None) or 0


def first_key(layer: Any, positions: torch.Tensor) -> torch.Tensor | None:
    """The first position that queries at these positions see; None where that is the first of all,
    as `Layer.first_key` has it."""
    if not (window := window_of(layer)):
        return None
    if layer.sliding_window:
        return (positions - window + 1).clamp(min=0)
    return positions // window * window


def softcap_of(layer: Any) -> float | None:
    return getattr(layer.impl, "logits_soft_cap", None) or None


def deviation_of(
    need: Deviation,
    key: torch.Tensor,
    value: torch.Tensor,
    pages: PagedKV,
    page_slots: torch.Tensor,
    *,
    write: bool,
) -> torch.Tensor:
    how: Any = {"tensor": need.tensor, "norm": need.norm, "write": write}
    return deviation(key, value, pages, page_slots, **how)
