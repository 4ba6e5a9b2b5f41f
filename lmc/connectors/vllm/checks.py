"""What a worker makes sure of at start, before it touches a request: pages, positions, layers.

Each check compares with the engine itself. What fails is refused, and no more than that: pages that
cannot be read rule out everything, keys that cannot be moved or rows that cannot be computed only
blending.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from vllm.distributed.parallel_state import get_tp_group
from vllm.forward_context import set_forward_context

from lmc.blend.evidence import Deviation, Importance, Outline
from lmc.connectors.vllm.adapter import VLLMAdapter
from lmc.connectors.vllm.attention import BackendAttention, PagedAttention, window_of
from lmc.connectors.vllm.decoders import Decoder
from lmc.connectors.vllm.layouts import page_slots_of
from lmc.connectors.vllm.lora import Loras
from lmc.kernels.gather import gather
from lmc.kernels.paged import PagedKV
from lmc.kernels.rerotate import rerotate
from lmc.model.rope import Rotations

ROWS = 64  # of a check, behind the longest window
SHIFT = 100  # positions that keys are moved by
GROWTH, GROWN = 16.0, 0.05  # by what errors may grow from layer to layer, and to what at most


def of_any_rank(reason: str | None) -> str | None:
    """The first reason that a tensor-parallel rank has, the same on all of them.

    What one of them cannot do none does: the model runs on all of them together.
    """
    group = get_tp_group()
    if group.world_size == 1:
        return reason
    said: list[str | None] = [None] * group.world_size
    torch.distributed.all_gather_object(said, reason, group=group.cpu_group)
    return next((r for r in said if r), None)


@torch.inference_mode()
def misread(layers: list[Any], pages: PagedKV, block_size: int) -> str | None:
    """How what is read from pages is not what the engine's backend wrote there, or None.

    In every layer the backend writes K and V of rows here and there, in blocks that no request owns
    yet; they are read as chunks are.
    """
    rows = np.array([0, 1, block_size - 1, block_size, 2 * block_size - 2], np.int64)
    blocks = [2, 1]  # block 0 is vLLM's null block
    slots = page_slots_of(rows, blocks, block_size, pages.k[0].device)
    for i, layer in enumerate(layers):
        cache = layer.kv_cache
        before = cache[blocks].clone()
        one = pages.some(i, i + 1)
        # Small whole numbers: exact in every dtype.
        shape = (pages.sides, len(rows), layer.num_kv_heads, layer.head_size)
        kv = torch.randint(-8, 9, shape, device=slots.device).to(pages.k[0].dtype)
        try:
            if pages.sides == 1:
                parts = kv[0, :, 0, : layer.kv_lora_rank], kv[0, :, :, layer.kv_lora_rank :]
                how = layer.kv_cache_dtype, layer._k_scale
                layer.impl.do_kv_cache_update(*parts, cache, slots, *how)
            else:
                layer.impl.do_kv_cache_update(layer, kv[0], kv[1], cache, slots)
            got = gather(one, slots)[0]
        finally:
            cache[blocks] = before
        if not torch.equal(got, kv):
            return f"what layer {i} wrote into pages is not what is read from them"
    return None


@torch.inference_mode()
def mismoved(
    rope: Rotations,
    model: Any,
    oracle: BackendAttention,
    vllm_config: Any,
    loras: Loras | None = None,
) -> tuple[Rotations, str | None]:
    """The rotations with the model's own pairing, and why keys cannot be moved so, or None.

    Every layer's keys of a text are moved and compared with those of the same text further on:
    layers without a rotation, with another one, or with logits that depend on the position are
    found out here.
    """
    rope, mismatch, paired = rope_as_in_model(rope, model)
    if mismatch is not None:
        return rope, mismatch
    T = length(oracle, vllm_config)
    shift = min(SHIFT, vllm_config.model_config.max_model_len - T)
    if shift < 1:
        return rope, f"the model is too short ({shift + T} tokens) for keys to be moved"
    layers = list(oracle.layers.values())
    try:
        with Scratch(oracle, vllm_config, loras) as scratch:
            kept = []
            for first in (0, shift):
                scratch.forward(model, np.arange(T) + first)
                kept.append([_keys(oracle, i, layer, scratch) for i, layer in enumerate(layers)])
    except Exception as error:  # an architecture of another shape may fail in any way
        return rope, f"the model does not run by itself: {type(error).__name__}: {error}"
    cos, sin = (torch.from_numpy(x).to(oracle.device) for x in rope.angles(shift))
    first = oracle.pages(layers[0]).turned_from(2 * cos.shape[-1])

    def errors(interleaved: bool) -> list[float]:
        """By layer, of keys that are moved."""
        of_layers = []
        for which, here, there in zip(rope.of, *kept, strict=True):
            turned = here
            if which >= 0:
                angles = cos[which], sin[which]
                turned = rerotate(here, *angles, first=first, interleaved=interleaved)
            of_layers.append(relative_error(there, turned))
        return of_layers

    # What transformers has says nothing of pairs.
    found = {
        pairing: errors(pairing) for pairing in ({rope.interleaved} if paired else (False, True))
    }
    best = min(found, key=lambda pairing: max(found[pairing]))
    if (wrong := unlike(found[best], kept[0][0].dtype)) is not None:
        i, worst, allowed = wrong
        return rope, (
            f"keys of layer {i} moved by {shift} positions differ from the model's own there "
            f"by {worst:.1e} (at most {allowed:.1e})"
        )
    return rope.paired(best), None


def unlike(errors: list[float], dtype: torch.dtype) -> tuple[int, float, float] | None:
    """The first layer whose keys do not turn as they should, its error and what was allowed; None
    if all do.

    Keys of a layer are as far off as what goes into it, and some models make much of a little:
    Qwen 2.5 0.5B turns 1e-6 of rounding into 2e-3 from its fourth layer on. So what is allowed
    grows with the layers before; keys that do not turn, or otherwise, are off by 0.3 and more.
    """
    tolerance = 4 * torch.finfo(dtype).eps ** 0.5
    before = 0.0
    for i, worst in enumerate(errors):
        allowed = max(tolerance, min(GROWN, GROWTH * before))
        if not worst <= allowed:
            return i, worst, allowed
        before = max(before, worst)
    return None


@torch.inference_mode()
def self_check(
    model: Any,
    attention: PagedAttention,
    oracle: BackendAttention,
    vllm_config: Any,
    loras: Loras | None = None,
) -> Decoder | str:
    """The model's layers, or why a loop over them is not the model's own forward.

    Runs in blocks that no request owns yet, once whole through `model.forward` with the backend's
    attention and once by the loop in two parts with `attention`, and compares hidden states and
    the KV left behind. Architectures that do more between their layers than hand on
    (hidden, residual) are found out here, and pages in which rows cannot be measured.
    """
    T = length(oracle, vllm_config)
    rows = np.arange(T, dtype=np.int64)
    try:
        with Scratch(oracle, vllm_config, loras) as scratch:
            whole = scratch.forward(model, rows)
            kept = scratch.contents()
            scratch.restore()
            arguments = (scratch.tokens, scratch.blocks, T - ROWS // 2, vllm_config)
            decoder = Decoder(model)
            adapter = VLLMAdapter(decoder, attention, *arguments, loras=loras)
            ends = decoder.ends(adapter.run(rows).state)
            errors = [relative_error(whole, end) for end in ends]
            pairs = list(zip(kept, scratch.contents(), strict=True))
            # Sums are taken in another order, and compiled code may fuse; no more than that.
            tolerance = torch.finfo(whole.dtype).eps ** 0.5
            worst = max(relative_error(a, b) for a, b in pairs)
            worst = max(worst, min(errors))
            wrong = _mismeasured(adapter, T, tolerance)
            if min(errors) <= tolerance / 4:  # what rows give in place of the model's own forward
                decoder.which_end = errors.index(min(errors))
    except Exception as error:  # an architecture of another shape may fail in any way
        return f"the layer loop does not run on this model: {type(error).__name__}: {error}"
    if not worst <= tolerance:
        return f"the layer loop differs from model.forward by {worst:.1e} (at most {tolerance:.1e})"
    return decoder if wrong is None else wrong


def length(attention: PagedAttention, vllm_config: Any) -> int:
    """Tokens of a check: beyond every window that a prompt can be longer than, and no longer than
    a prompt that can still be moved."""
    windows = [window_of(layer) for layer in attention.layers.values()]
    longest = int(vllm_config.model_config.max_model_len) - 1
    return max([ROWS, *(min(w + ROWS, longest) for w in windows if 0 < w < longest)])


class Scratch:
    """A text in blocks that no request owns yet, whose contents are put back in the end."""

    def __init__(
        self, attention: BackendAttention, vllm_config: Any, loras: Loras | None = None
    ) -> None:
        T = length(attention, vllm_config)
        self.tokens = np.arange(T, dtype=np.int64) * 7919
        self.tokens %= vllm_config.model_config.get_vocab_size()
        n = -(-T // attention.block_size)
        groups = attention.groups  # which share their tensors, so that each has blocks of its own
        ids = range(len(groups.specs))
        self.blocks = [list(range(1 + group * n, 1 + (group + 1) * n)) for group in ids]
        self._of_layers = [self.blocks[group] for group in groups.of]
        self._attention, self._vllm_config, self._loras = attention, vllm_config, loras
        self._caches = [layer.kv_cache for layer in attention.layers.values()]

    def __enter__(self) -> Scratch:
        self._before = self.contents()
        return self

    def __exit__(self, *_: object) -> None:
        self.restore()

    def contents(self) -> list[torch.Tensor]:
        """What is in the blocks, by layer."""
        pairs = zip(self._caches, self._of_layers, strict=True)
        return [cache[blocks].clone() for cache, blocks in pairs]

    def restore(self) -> None:
        """Put back what was in them at first."""
        each = zip(self._caches, self._of_layers, self._before, strict=True)
        for cache, blocks, before in each:
            cache[blocks] = before

    def forward(self, model: Any, at: np.ndarray) -> Any:
        """Hidden states `[T, hidden]` of the text at these positions, by the model itself.

        In as many calls as an engine would take.
        """
        T, most = len(at), self._vllm_config.scheduler_config.max_num_batched_tokens
        parts = [slice(i, min(i + most, T)) for i in range(0, T, most)]
        return torch.cat([self._forward(model, at, part) for part in parts])

    def _forward(self, model: Any, at: np.ndarray, part: slice) -> torch.Tensor:
        rows = np.arange(part.start, part.stop, dtype=np.int64)
        blocks = enumerate(self.blocks)
        checked = [self._attention.prepare([(rows, of)], group) for group, of in blocks]
        layers = self._attention.layers
        of = list(zip(layers, self._attention.groups.of, layers.values(), strict=True))
        device = self._attention.device
        if self._loras is not None:
            self._loras.rows([(0, len(rows))])
        with set_forward_context(
            {name: checked[group].how[layer.attn_backend] for name, group, layer in of},
            self._vllm_config,
            num_tokens=len(rows),
            slot_mapping={name: checked[group].page_slots for name, group, _ in of},
        ):
            # Of the dtypes that the engine itself sends: compiled code reads the bytes as those.
            return model(
                input_ids=torch.from_numpy(self.tokens[part]).to(device, torch.int32),
                positions=torch.from_numpy(at[part]).to(device, torch.int64),
            )


def rope_as_in_model(rope: Rotations, model: Any) -> tuple[Rotations, str | None, bool]:
    """`rope` with the model's own pairing, how a layer's angles differ from it, if so, and whether
    the model says which elements make a pair."""
    found, turns = False, getattr(model.model, "rotary_emb", None)
    if turns is not None and hasattr(turns, "forward") and not hasattr(turns, "cos_sin_cache"):
        return rope, _angles_of_transformers(rope, turns), False
    for index, layer in enumerate(model.model.layers):
        tables = [m for m in layer.modules() if hasattr(m, "cos_sin_cache")]
        tables = [m for m in tables if hasattr(m, "is_neox_style")]
        if not tables:  # its keys will be compared all the same
            continue
        found, table = True, tables[0].cos_sin_cache
        rope = rope.paired(not tables[0].is_neox_style)
        inv_freq = rope.ropes[max(0, rope.of[index])].inv_freq
        if table.shape[-1] != 2 * len(inv_freq):
            turned = 2 * len(inv_freq)
            return rope, f"the model rotates {table.shape[-1]} dims, its config says {turned}", True
        if rope.of[index] < 0:
            continue
        positions = [1, min(1000, len(table) - 1)]
        cos, sin = table[positions].double().cpu().chunk(2, dim=-1)
        expected = torch.from_numpy(np.outer(positions, inv_freq))
        error = torch.atan2(sin, cos) - expected
        worst = float((torch.remainder(error + torch.pi, 2 * torch.pi) - torch.pi).abs().max())
        # The table is in the model's dtype, and its angles were taken in float32.
        if worst > 4 * torch.finfo(table.dtype).eps + 1e-3:
            wrong = f"by {worst:.1e} rad in layer {index}"
            return rope, f"the model's angles differ from its config's {wrong}", True
    return rope, None if found else "no rotary embedding of a known kind found in the model", True


def _angles_of_transformers(rope: Rotations, turns: Any) -> str | None:
    """How angles that transformers has differ, where vLLM runs a model as that has it."""
    tables = [x for name, x in turns.named_buffers() if name.endswith("inv_freq")]
    tables = [x.double().cpu().numpy() for x in tables if x.ndim == 1]
    for index, of in enumerate(rope.of):
        wanted = rope.ropes[of].inv_freq
        if of >= 0 and not any(
            x.shape == wanted.shape and np.allclose(x, wanted, rtol=1e-5, atol=0) for x in tables
        ):
            return f"the model's angles differ from its config's in layer {index}"
    return None


def _mismeasured(adapter: VLLMAdapter, T: int, tolerance: float) -> str | None:
    """What is wrong with scores of the last rows of T tokens that are in the pages, if any."""
    n, L = ROWS // 2, adapter.num_layers
    outline = Outline(L=L, T=T, end=T - n, moved=((0, T - n),), new=T - n)
    needs = (Deviation(0, "both", "cosine"), Importance((0,), queries="sum"))
    far, paid = adapter.measure(np.arange(T - n, T), needs, outline)
    if far.shape != (n,) or not float(far.max()) <= tolerance:
        return f"rows that are in their pages deviate from them by {float(far.max()):.1e}"
    # What one row pays to all keys adds up to 1, with what it pays to a learned sink.
    impls = [layer.impl for layer in adapter.attention.layers.values()]
    sinks = any(getattr(impl, "sinks", None) is not None for impl in impls)
    share = float(paid.sum()) / n
    if paid.shape != (T,) or share - 1 > tolerance or (share - 1 < -tolerance and not sinks):
        return f"{n} rows pay {share * n:.3f} of attention"
    return None


def _keys(oracle: BackendAttention, index: int, layer: Any, scratch: Scratch) -> torch.Tensor:
    """One layer's keys `[T, G, D]` of the text."""
    rows = np.arange(len(scratch.tokens), dtype=np.int64)
    blocks = scratch.blocks[oracle.groups.of[index]]
    return gather(oracle.pages(layer), oracle.page_slots(rows, blocks))[0, 0]


def relative_error(expected: torch.Tensor, got: torch.Tensor) -> float:
    scale = expected.float().abs().max().clamp_min(1e-6)
    return float((expected.float() - got.float()).abs().max() / scale)
