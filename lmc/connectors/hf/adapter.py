"""A Hugging Face decoder as an adapter of the selective forward, without a patch to the model.

Its layers run as they are. What is ours comes in by the doors that transformers has: a cache
object, which puts fresh keys and values where their rows are, and an attention function, which
masks by position.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from lmc.blend.dense import Attention
from lmc.blend.evidence import Deviation, Importance, Need, Outline
from lmc.blend.forward import State
from lmc.kernels.deviation import deviation
from lmc.kernels.gather import gather
from lmc.kernels.importance import importance
from lmc.kernels.paged import PagedKV, PagedLatents
from lmc.kernels.scatter import scatter
from lmc.model.layers import Layer
from lmc.model.layout import KVLayout

PAGE = 16
NAME = "lmc"
# Rows that one call may carry: activations of a small model, and a mask of this many rows.
MAX_ROWS = 4096
# Whose rows a layer is called with.
_ATTENDING: ContextVar[HFAdapter] = ContextVar("lmc_attending")
# Is shown every attention: rows [M], query [1, H, M, D], key [1, G, T, D], scale, and the layer.
Watch = Callable[[np.ndarray, torch.Tensor, torch.Tensor, float, Layer], None]


class Pages:
    """K and V of one request, `[L, 2, N, P, G, D]`; or latents `[L, 1, N, P, 1, D]`.

    Row t is in slot t.

    Args:
        layout: of the model. T: rows it must hold.
    """

    def __init__(self, layout: KVLayout, T: int, device: torch.device) -> None:
        N = max(1, -(-T // PAGE))
        L, sides, T, G, D = layout.shape(N * PAGE)
        dtype = getattr(torch, layout.dtype)
        self.buffer = torch.zeros(L, sides, N, PAGE, G, D, dtype=dtype, device=device)
        self.all: PagedKV
        if sides == 1:
            self.all = PagedLatents([layer[0, :, :, 0] for layer in self.buffer])
        else:
            self.all = PagedKV(*zip(*self.buffer, strict=True))
        self.layers = [self.all.some(i, i + 1) for i in range(L)]
        self.table = torch.arange(N, dtype=torch.int32, device=device)

    def rows(self, start: int, end: int) -> torch.Tensor:
        """A view `[L, 2, T, G, D]`, or of latents `[L, 1, T, 1, D]`, of rows `[start, end)`."""
        return self.buffer.flatten(2, 3)[:, :, start:end]


class HFAdapter:
    """The rows of one request through the layers of a Hugging Face model.

    Args:
        inner: the decoder: `embed_tokens`, `rotary_emb`, `layers`.
        tokens: `[T']` token ids; those behind the prompt's T are an answer that is forced.
        pages: what is reused lies there already; fresh rows go there.
        layers: what each of its layers lets a row see.
        positions: `[T']` RoPE positions, where they are not 0..T'-1. The mask goes by rows.
        outline: of the request, for rows that ask and for the ablation of the mask.
        mask: see `Strategy.mask`.
        attention: what rows attend by, where a dense strategy says; see `lmc.blend.dense`.
    """

    def __init__(
        self,
        inner: Any,
        tokens: np.ndarray,
        pages: Pages,
        layers: Sequence[Layer],
        positions: np.ndarray | None = None,
        *,
        outline: Outline | None = None,
        mask: Literal["position", "bottom_right"] = "position",
        attention: Attention | None = None,
    ) -> None:
        self.layers = list(inner.layers)
        self.num_layers = len(self.layers)
        # A bottom-right mask goes by how many rows there are, so all must be in one call.
        self.max_rows = MAX_ROWS if mask == "position" else max(MAX_ROWS, len(tokens))
        self.pages = pages
        self.device = pages.buffer.device
        # Attention outputs `[M, H * D]` of the last call of each layer, by layer, if recorded.
        self.outputs: list[torch.Tensor] | None = None
        self.watch: Watch | None = None
        self._inner, self._kinds = inner, layers
        self._types: Sequence[str] | None = None  # of layers, where each type turns by its own
        if "layer_type" in inspect.signature(inner.rotary_emb.forward).parameters:
            self._types = inner.config.layer_types
        self._tokens = torch.from_numpy(np.asarray(tokens, np.int64)).to(self.device)
        at = np.arange(len(tokens)) if positions is None else positions
        self._positions = torch.from_numpy(np.asarray(at, np.int64)).to(self.device)
        self._outline, self._mask, self._attention = outline, mask, attention
        self._rows = np.empty(0, np.int64)
        self._needs: Sequence[Need] = ()
        self._scores: dict[Need, torch.Tensor] = {}
        # Of these rows: where they are, and by kind of layer their angles, and their mask.
        self._where = torch.empty(0, dtype=torch.int64)
        self._angles: dict[str | None, Any] = {}
        self._masks: dict[tuple[str, int], torch.Tensor | None] = {}

    # -- the adapter's side ------------------------------------------------------------------

    def embed(self, rows: np.ndarray) -> State:
        return (self._inner.embed_tokens(self._tokens[self._at(rows)]),)

    def layer(
        self, index: int, rows: np.ndarray, state: State, needs: Sequence[Need] = ()
    ) -> tuple[State, list[torch.Tensor]]:
        hidden = state[0][None]
        if not np.array_equal(rows, self._rows):
            self._rows, self._where = rows, self._at(rows)
            self._angles, self._masks = {}, {}
        self._needs, self._scores = needs, {}
        token = _ATTENDING.set(self)  # some layers hand no argument of ours on to their attention
        try:
            out = self.layers[index](
                hidden,
                attention_mask=None,
                position_ids=self._positions[self._where][None],
                past_key_values=self,
                use_cache=True,
                position_embeddings=self._angles_of(index, hidden),
            )
        finally:
            _ATTENDING.reset(token)
        out = out[0] if isinstance(out, tuple) else out
        return (out[0],), [self._scores[need] for need in needs]

    def read(self, index: int, rows: np.ndarray) -> torch.Tensor:
        return gather(self.pages.layers[index], self._at(rows))

    def write(self, index: int, rows: np.ndarray, kv: torch.Tensor) -> None:
        scatter(kv.contiguous(), self.pages.layers[index], self._at(rows))

    def agree(self, scores: torch.Tensor) -> torch.Tensor:
        return scores  # one rank holds all heads

    # -- the model's side --------------------------------------------------------------------

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """As `transformers.Cache.update`: takes `[1, G, M, D]`, gives all rows up to the last.

        Of latents it is told what is compressed, and what turns, each as of one head.
        """
        k, v = key[0].transpose(0, 1), value[0].transpose(0, 1)
        pages, where = self.pages.layers[layer_idx], self._where
        latents = isinstance(pages, PagedLatents)
        if latents:
            k = v = torch.cat((k, v), -1)
        for need in self._needs:
            if isinstance(need, Deviation):
                self._scores[need] = deviation(
                    k, v, pages, where, tensor=need.tensor, norm=need.norm
                )
        scatter(pages.fresh(k, v), pages, where)
        used = self.pages.rows(0, self._used())[layer_idx].transpose(1, 2)
        if latents:
            whole = used[0][None]
            return whole[..., : key.shape[-1]], whole[..., key.shape[-1] :]
        return used[0][None], used[1][None]

    def get_seq_length(self, layer_idx: int = 0) -> torch.Tensor:
        """What to add to 0, 1, ... for the positions of the rows, `[M]`: Llama 4 counts its own."""
        return self._where - torch.arange(len(self._where), device=self.device)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, layer: int,
        scale: float, softcap: float | None, sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """Attention of query `[1, H, M, D]` to keys `[1, G, T, D]`: `[1, M, H, D]`."""
        kind = self._kinds[layer]
        for need in self._needs:
            if isinstance(need, Importance):
                how = (scale, softcap, sinks)
                self._scores[need] = self._importance(need, query, key, layer, *how)
        if self.watch is not None:
            self.watch(self._rows, query, key, scale, kind)
        if (kind.kind, kind.window) not in self._masks:
            self._masks[kind.kind, kind.window] = self._mask_of(kind)
        mask = self._masks[kind.kind, kind.window]
        if self._attention is not None:
            assert mask is not None  # which it has wherever attention is a strategy's
            if softcap or sinks is not None:
                what = "capped logits" if softcap else "learned sinks"
                raise ValueError(f"attention of a strategy does not know of a model's {what}")
            out = self._attention(query, key, value, mask, scale)
        elif softcap or sinks is not None:
            out = _by_hand(query, key, value, mask, scale, softcap, sinks)
        elif mask is None:
            out = scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=scale, enable_gqa=True
            )
        else:
            out = scaled_dot_product_attention(
                query, key, value, attn_mask=mask, scale=scale, enable_gqa=True
            )
        out = out.transpose(1, 2).contiguous()
        if self.outputs is not None:
            recorded = out[0].flatten(1)
            if layer < len(self.outputs):  # a further slice of the same layer
                self.outputs[layer] = torch.cat((self.outputs[layer], recorded))
            else:
                self.outputs.append(recorded)
        return out

    @contextmanager
    def installed(self, model: Any) -> Iterator[None]:
        """While open, the model's layers attend by this module's function."""
        before = model.config._attn_implementation
        model.set_attn_implementation(NAME)
        try:
            yield
        finally:
            model.set_attn_implementation(before)

    # -- parts -------------------------------------------------------------------------------

    def _at(self, rows: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(rows).to(self.device)

    def _used(self) -> int:
        """Rows that may be attended to: a bottom-right mask looks beyond a row."""
        last = int(self._rows[-1]) + 1
        if self._mask == "bottom_right" and self._outline:
            return max(last, self._outline.end)
        return last

    def _angles_of(self, index: int, hidden: torch.Tensor) -> Any:
        """cos and sin of the rows, as one layer takes them."""
        name = None if self._types is None else self._types[index]
        if name not in self._angles:
            at = self._positions[self._where][None]
            which = {} if name is None else {"layer_type": name}
            self._angles[name] = self._inner.rotary_emb(hidden, position_ids=at, **which)
        return self._angles[name]

    def _mask_of(self, layer: Layer) -> torch.Tensor | None:
        """True `[M, T]` where row i may look; None for the plain causal mask of a whole prompt."""
        rows, last = self._rows, self._where
        if self._mask == "bottom_right" and self._outline and rows[0] < self._outline.end:
            # Query i of M sees keys <= T - M + i, whichever row it is, as both published
            # implementations compute it; there the suffix is part of the M.
            M = len(rows) + self._outline.T - self._outline.end
            last = self._outline.T - M + torch.arange(len(rows), device=self.device)
        elif self._attention is None and len(rows) == rows[-1] + 1 and not layer.window:
            return None
        key = torch.arange(self._used(), device=self.device)[None]
        mask = key <= last[:, None]
        if layer.window:
            mask &= key >= self._at(layer.first_key(last.cpu().numpy()))[:, None]
        return mask

    def _importance(
        self, need: Importance, query: torch.Tensor, key: torch.Tensor, index: int, scale: float,
        softcap: float | None, sinks: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        assert self._outline is not None
        pages, table = self.pages.layers[index].k[0], self.pages.table
        scores = torch.zeros(self._outline.T, dtype=torch.float32, device=self.device)
        known = scores
        if self.pages.all.sides == 1:  # keys as they were made of latents: all in one page
            pages, table = key.transpose(1, 2).contiguous(), table[:1]
            known = scores[: pages.shape[1]]
        asks = self._rows >= need.first_asking(self._outline)
        asking, layer = self._rows[asks], self._kinds[index]
        q = query[0].transpose(0, 1)[torch.from_numpy(asks)]
        importance(
            q, pages, table, self._at(asking), len(known), scale, heads=need.heads,
            queries=need.queries, softcap=softcap,
            first=self._at(layer.first_key(asking)) if layer.window else None,
            sinks=None if sinks is None else sinks.float().contiguous(), out=known,
        )  # fmt: skip
        return scores


def _by_hand(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None,
    scale: float, softcap: float | None, sinks: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """What torch's own attention has not: capped logits, and learned sinks `[H]` beside keys."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    logits = query @ key.transpose(-1, -2) * scale
    if softcap:
        logits = torch.tanh(logits / softcap) * softcap
    if mask is None:
        mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).tril()
    logits = logits.masked_fill(~mask, -torch.inf)
    if sinks is None:
        return logits.softmax(-1) @ value
    beside = sinks.to(logits.dtype).view(1, -1, 1, 1).expand(*logits.shape[:3], 1)
    weights = torch.cat([logits, beside], -1).softmax(-1)[..., :-1]
    return weights @ value


def _attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    attention_mask: Any, scaling: float | None = None, dropout: float = 0.0,
    softcap: float | None = None, s_aux: torch.Tensor | None = None, **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """What transformers calls in place of its own attention."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    adapter = _ATTENDING.get()
    return adapter.attend(query, key, value, module.layer_idx, scale, softcap, s_aux), None


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, lambda *_, **__: None)
