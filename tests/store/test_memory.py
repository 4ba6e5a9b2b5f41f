import torch

from lmc.layout import KVLayout
from lmc.store.memory import HostMemory

LAYOUT = KVLayout(L=2, G=1, D=8, dtype="float32")  # 128 bytes a token


def test_holds_what_it_was_given_until_evicted() -> None:
    memory = HostMemory(LAYOUT, capacity=1000)
    chunk = memory.allocate(4)
    assert chunk.shape == (2, 2, 4, 1, 8)
    chunk.fill_(3.0)
    assert memory.put(7, chunk)
    held = memory.get(7)
    assert held is not None
    assert torch.equal(held, chunk)
    assert memory.size == 512
    memory.evict(7)
    memory.evict(7)
    assert memory.get(7) is None
    assert memory.size == 0


def test_refuses_what_does_not_fit() -> None:
    memory = HostMemory(LAYOUT, capacity=1000)
    assert memory.put(1, memory.allocate(4))
    assert not memory.put(2, memory.allocate(4))
    assert memory.get(2) is None
    assert memory.size == 512
