"""vLLM's KV cache groups: which layers share block tables, and which of them keep windows alone,
or a state in place of keys."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.model_executor.models.utils import extract_layer_index

FULL, WINDOWED, LATENT = "FullAttentionSpec", "SlidingWindowSpec", "MLAAttentionSpec"
STATE = "MambaSpec"


@dataclass(frozen=True, eq=False)
class States:
    """Groups of layers that keep a state: vLLM has that of a block's end in a page, as large as one
    of keys and values, and of most blocks none.

    Attributes:
        ids: of the groups, among all of vLLM's.
        names: of the layers, by group.
        page_bytes: of one page of one layer.
    """

    ids: tuple[int, ...]
    names: tuple[tuple[str, ...], ...]
    page_bytes: int


@dataclass(frozen=True, eq=False)
class Groups:
    """The groups of an engine whose layers keep keys and values, in the model's order.

    Groups share vLLM's pool of blocks, and their layers its tensors: a block belongs to one group.
    Those that keep windows alone give back what lies behind the window of a request's last token.

    Attributes:
        names: of the attention layers.
        of: by layer, the index of its group.
        specs: vLLM's, by group.
        ids: of the groups, among all of vLLM's.
        states: groups of other layers, which keep a state; None where there are none.
    """

    names: tuple[str, ...]
    of: tuple[int, ...]
    specs: tuple[Any, ...]
    ids: tuple[int, ...]
    states: States | None = None

    @property
    def block_size(self) -> int:
        """Tokens of a block, P."""
        size: int = self.specs[0].block_size
        return size

    def those(self, blocks: Sequence[Sequence[int]]) -> list[list[int]]:
        """Of a request's block ids by vLLM's groups those of these groups."""
        return [list(blocks[i]) for i in self.ids]

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
    kept = [type(group.kv_cache_spec).__name__ == STATE for group in groups]
    ids = tuple(i for i, state in enumerate(kept) if not state)
    named = [(name, g) for g, i in enumerate(ids) for name in groups[i].layer_names]
    if len(ids) > 1:
        named.sort(key=lambda one: extract_layer_index(one[0]))
    names, of = zip(*named, strict=True)
    specs = tuple(groups[i].kv_cache_spec for i in ids)
    states = None
    if any(kept):
        others = tuple(i for i, state in enumerate(kept) if state)
        layers = tuple(tuple(groups[i].layer_names) for i in others)
        states = States(others, layers, int(groups[others[0]].kv_cache_spec.page_size_bytes))
    return Groups(names, of, specs, ids, states)


def groups_refusal(kv_cache_config: Any) -> str | None:
    """Why nothing of such an engine's KV is stored or reused; None when it is."""
    specs = [group.kv_cache_spec for group in kv_cache_config.kv_cache_groups]
    rows = [spec for spec in specs if type(spec).__name__ != STATE]
    states = [spec for spec in specs if type(spec).__name__ == STATE]
    if not rows:
        return "no layer that keeps keys and values"
    for spec in rows:
        if type(spec).__name__ not in (FULL, WINDOWED, LATENT):
            return f"attention of kind {type(spec).__name__}"
        if getattr(spec, "extra_retained_tokens", 0):
            return "windows that keep more than they see"
        if states and type(spec).__name__ == WINDOWED:
            return "layers with windows beside layers that keep a state"
    sizes = {(s.block_size, s.num_kv_heads, s.head_size, s.dtype) for s in rows}
    if len(sizes) > 1:
        return f"KV cache groups of different sizes: {sorted(map(str, sizes))}"
    for spec in states:
        if spec.mamba_cache_mode != "align":
            return f"states that are cached in mode {spec.mamba_cache_mode!r}, want 'align'"
        if spec.num_speculative_blocks:
            return "states beside speculative decoding"
    pages = {(s.block_size, s.page_size_bytes) for s in [*rows[:1], *states]}
    if len(pages) > 1:
        return f"pages of keys and of states of different sizes: {sorted(pages)}"
    return None
