"""vLLM's KV cache groups: which layers share block tables, and which of them keep windows alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vllm.model_executor.models.utils import extract_layer_index

FULL, WINDOWED, LATENT = "FullAttentionSpec", "SlidingWindowSpec", "MLAAttentionSpec"


@dataclass(frozen=True, eq=False)
class Groups:
    """The groups of an engine, layers in the model's order.

    Groups share vLLM's pool of blocks, and their layers its tensors: a block belongs to one group.
    Those that keep windows alone give back what lies behind the window of a request's last token.

    Attributes:
        names: of the attention layers.
        of: by layer, the index of its group.
        specs: vLLM's, by group.
    """

    names: tuple[str, ...]
    of: tuple[int, ...]
    specs: tuple[Any, ...]

    @property
    def block_size(self) -> int:
        """Tokens of a block, P."""
        size: int = self.specs[0].block_size
        return size

    def window(self, group: int) -> int:
        """Tokens that the group keeps behind the next one's own; 0: all of them."""
        spec = self.specs[group]
        return int(spec.sliding_window) if type(spec).__name__ == WINDOWED else 0

    @property
    def longest(self) -> int:
        """The longest window of a group that keeps no more than that; 0 where each keeps all."""
        return max(map(self.window, range(len(self.specs))))

    def unseen(self, T: int, seen: int) -> str | None:
        """Why rows in the midst of T tokens cannot be computed, or None.

        Args:
            seen: how many tokens of one layer there is room for, where windows are kept alone.
        """
        if not self.longest or seen >= T:
            return None
        return f"rows would see {T:,} tokens of a layer with a window, window_bytes has {seen:,}"

    def runs(self, group: int) -> list[tuple[int, int]]:
        """Layers of a group as maximal runs [first, behind the last)."""
        runs: list[tuple[int, int]] = []
        for layer, of in enumerate(self.of):
            if of == group and runs and runs[-1][1] == layer:
                runs[-1] = (runs[-1][0], layer + 1)
            elif of == group:
                runs.append((layer, layer + 1))
        return runs


def groups_of(kv_cache_config: Any) -> Groups:
    """The groups that vLLM made."""
    groups = kv_cache_config.kv_cache_groups
    named = [(name, i) for i, group in enumerate(groups) for name in group.layer_names]
    if len(groups) > 1:
        named.sort(key=lambda one: extract_layer_index(one[0]))
    names, of = zip(*named, strict=True)
    return Groups(names, of, tuple(group.kv_cache_spec for group in groups))


def groups_refusal(groups: Groups) -> str | None:
    """Why nothing of such an engine's KV is stored or reused; None when it is."""
    for spec in groups.specs:
        if type(spec).__name__ not in (FULL, WINDOWED, LATENT):
            return f"attention of kind {type(spec).__name__}"
        if getattr(spec, "attention_chunk_size", None):
            return "chunked attention"
        if getattr(spec, "extra_retained_tokens", 0):
            return "windows that keep more than they see"
    sizes = {(s.block_size, s.num_kv_heads, s.head_size, s.dtype) for s in groups.specs}
    if len(sizes) > 1:
        return f"KV cache groups of different sizes: {sorted(map(str, sizes))}"
    return None
