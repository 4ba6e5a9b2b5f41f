"""KV cache groups as tests need them."""

from types import SimpleNamespace

from lmc.connectors.vllm.groups import Groups


def one_group(L: int, block_size: int) -> Groups:
    """All layers share block tables."""
    names = tuple(f"layers.{i}.attn" for i in range(L))
    return Groups(names, (0,) * L, (SimpleNamespace(block_size=block_size),), (0,))
