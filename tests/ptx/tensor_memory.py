"""tcgen05 of sm_100: products that a thread asks for and tensor memory holds, and mbarriers.

Of it what Triton writes for one CTA: halves times halves into float32, A in shared or in tensor
memory, B in shared memory. "Tensor Memory" and "tcgen05" in the PTX ISA, version 9.0.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import numpy as np

from tests.ptx.lanes import Execute, Lanes, address, decodes, source
from tests.ptx.moving import whole_warps
from tests.ptx.program import FaultError, Instruction, UnsupportedError, members
from tests.ptx.tensor_cores import check_read, places
from tests.ptx.values import Array, read

ROWS, COLUMNS = 128, 512
UNWRITTEN = np.uint32(0x7FC0DEAD)


@dataclass
class Product:
    """A product under way: D at an address in tensor memory, A there too or, as B, a matrix of
    places in shared memory, counted in halves."""

    M: int
    N: int
    kind: str
    d: int
    a: Array | int
    b: Array
    adds: bool
    granules: list[Array]


@dataclass
class Barrier:
    """An mbarrier: arrivals that a phase takes, those that are missing, and phases completed.

    due: for each commit that will arrive, the products it waits for.
    """

    count: int
    missing: int
    phase: int = 0
    due: list[list[Product]] = field(default_factory=list)


@dataclass
class TensorMemory:
    """Of one CTA. taken: columns by the first one; flight: columns that products will write."""

    cells: Array = field(default_factory=lambda: np.full((ROWS, COLUMNS), UNWRITTEN))
    taken: dict[int, int] = field(default_factory=dict)
    flight: Array = field(default_factory=lambda: np.zeros(COLUMNS, np.int32))
    # Columns of stores, and of loads, that a warp did not wait for.
    storing: dict[int, Array] = field(default_factory=dict)
    loading: dict[int, Array] = field(default_factory=dict)
    products: list[Product] = field(default_factory=list)
    barriers: dict[int, Barrier] = field(default_factory=dict)

    def columns(self, first: int, count: int) -> slice:
        """Those columns, which somebody allocated and no product is writing to."""
        inside = any(a <= first and first + count <= a + n for a, n in self.taken.items())
        if not inside:
            raise FaultError(f"out of bounds: columns {first}..{first + count - 1} of {self.taken}")
        some = slice(first, first + count)
        if self.flight[some].any():
            raise FaultError("race: touches tensor memory of products that were not waited for")
        return some

    def overwrite(self, some: slice, warp: int | None) -> None:
        """Raises FaultError where another warp may still be reading these columns."""
        for other, held in self.loading.items():
            if other != warp and held[some].any():
                raise FaultError("race: overwrites tensor memory that a load not waited for reads")

    def read(self, some: slice) -> None:
        """Raises FaultError where a warp may still be writing to these columns."""
        if any(held[some].any() for held in self.storing.values()):
            raise FaultError("race: reads tensor memory that a store not waited for writes")


def _memory(lanes: Lanes, slot: int) -> TensorMemory:
    found: TensorMemory = lanes.tensor_memory.setdefault(slot, TensorMemory())
    return found


def _warps(lanes: Lanes, mask: Array) -> list[tuple[int, int, int]]:
    """(first thread, slot of the CTA, warp in it) of each warp of a mask."""
    first = np.flatnonzero(mask.reshape(-1, 32).any(1)) * 32
    return [(int(t), int(lanes.slot[t]), int(lanes.thread[t]) // 32) for t in first]


@decodes("tcgen05")
def _tensor_memory(x: Instruction) -> Execute:
    op = x.parts[1]
    if "cta_group::2" in x.parts or op not in _OPS:
        raise UnsupportedError(f"instruction {x.text}")
    return _OPS[op](x)


def _nothing(x: Instruction) -> Execute:
    return lambda lanes, mask: None


def _allocate(x: Instruction) -> Execute:
    where, count = address(x.operands[0]), int(x.operands[1], 0)

    def execute(lanes: Lanes, mask: Array) -> None:
        whole_warps(lanes, mask, "tcgen05.alloc")
        for thread, slot, _ in _warps(lanes, mask):
            taken = _memory(lanes, slot).taken
            first = sum(taken.values())
            if count < 32 or count & (count - 1) or first + count > COLUMNS:
                raise FaultError(f"{count} columns of tensor memory, of which {first} are taken")
            taken[first] = count
            one = np.array([thread])
            flat = lanes.shared.flat(lanes.slot[one], where(lanes)[one], 4)
            value = np.array([[first]], np.uint32).view(np.uint8)
            lanes.shared.store(flat, value, lanes.agent[one])

    return execute


def _free(x: Instruction) -> Execute:
    where, count = source(x.operands[0], "u32"), int(x.operands[1], 0)

    def execute(lanes: Lanes, mask: Array) -> None:
        whole_warps(lanes, mask, "tcgen05.dealloc")
        at = np.broadcast_to(where(lanes), (lanes.N,))
        for thread, slot, _ in _warps(lanes, mask):
            memory = _memory(lanes, slot)
            memory.columns(int(at[thread]), count)
            if memory.taken.pop(int(at[thread]), None) != count:
                raise FaultError(f"gives back {count} columns that were not taken so")

    return execute


def _shape(x: Instruction) -> tuple[str, int]:
    found = re.search(r"\.(32x32b|16x32bx2)\.x(\d+)\.b32$", ".".join(x.parts))
    if found is None or "pack::16b" in x.parts or "unpack::16b" in x.parts:
        raise UnsupportedError(f"shape of {x.text}")
    return found[1], int(found[2])


def _place(shape: str, at: int, warp: int, split: int) -> tuple[Array, Array]:
    """Row and first column of each thread of a warp. 16x32bx2: lanes 16.. have the rows of the
    first sixteen, `split` columns further."""
    row, column = at >> 16, at & 0xFFFF
    # Of 32 rows a warp, sixteen of which the narrow shape has: the upper ones or the lower.
    half = 16 if shape == "16x32bx2" else 0
    if row // 32 not in (0, warp % 4) or row % 32 not in (0, half):
        raise FaultError(f"out of bounds: warp {warp} at row {row} of tensor memory")
    lane = np.arange(32)
    first = 32 * (warp % 4) + row % 32
    if half:
        return first + lane % 16, column + split * (lane // 16)
    return first + lane, np.full(32, column)


def _load(x: Instruction) -> Execute:
    shape, count = _shape(x)
    targets, where = members(x.operands[0]), address(x.operands[1])
    split = int(x.operands[2], 0) if len(x.operands) > 2 else 0

    def execute(lanes: Lanes, mask: Array) -> None:
        whole_warps(lanes, mask, "tcgen05.ld")
        at = where(lanes)
        values = np.zeros((count, lanes.N), np.uint32)
        for thread, slot, warp in _warps(lanes, mask):
            memory = _memory(lanes, slot)
            rows, columns = _place(shape, int(at[thread]), warp, split)
            for first in np.unique(columns):
                memory.read(memory.columns(int(first), count))
                held = memory.loading.setdefault(warp, np.zeros(COLUMNS, bool))
                held[first : first + count] = True
            found = memory.cells[rows[:, None], columns[:, None] + np.arange(count)]
            values[:, thread : thread + 32] = found.T
        # Registers are there at once: the assembler has whoever reads them wait, and Triton writes
        # no wait::ld for that. It is for those that write to tensor memory afterwards.
        for target, value in zip(targets, values, strict=True):
            lanes.write(target, value, "b32", mask)

    return execute


def _store(x: Instruction) -> Execute:
    shape, count = _shape(x)
    where, given = address(x.operands[0]), members(x.operands[-1])
    split = int(x.operands[1], 0) if len(x.operands) > 2 else 0
    sources = [source(o, "b32") for o in given]

    def execute(lanes: Lanes, mask: Array) -> None:
        whole_warps(lanes, mask, "tcgen05.st")
        at = where(lanes)
        values = np.stack([np.broadcast_to(get(lanes), (lanes.N,)) for get in sources], 1)
        for thread, slot, warp in _warps(lanes, mask):
            memory = _memory(lanes, slot)
            rows, columns = _place(shape, int(at[thread]), warp, split)
            for first in np.unique(columns):
                some = memory.columns(int(first), count)
                memory.overwrite(some, warp)
                memory.storing.setdefault(warp, np.zeros(COLUMNS, bool))[some] = True
            cells = rows[:, None], columns[:, None] + np.arange(count)
            memory.cells[cells] = values[thread : thread + 32]

    return execute


def _wait(x: Instruction) -> Execute:
    def loaded(lanes: Lanes, mask: Array) -> None:
        for _, slot, warp in _warps(lanes, mask):
            _memory(lanes, slot).loading.pop(warp, None)

    def stored(lanes: Lanes, mask: Array) -> None:
        for _, slot, warp in _warps(lanes, mask):
            _memory(lanes, slot).storing.pop(warp, None)

    return loaded if x.parts[1].endswith("ld") else stored


def _multiply(x: Instruction) -> Execute:
    if "kind::f16" not in x.parts or len(x.operands) != 5:
        raise UnsupportedError(f"product {x.text}")
    d, a, b, shape, accumulate = x.operands
    to, in_memory = address(d), a.startswith("[")
    left = address(a) if in_memory else source(a, "u64")
    right, how, adds = source(b, "u64"), source(shape, "u32"), source(accumulate, "pred")

    def execute(lanes: Lanes, mask: Array) -> None:
        every = [np.broadcast_to(f(lanes), (lanes.N,)) for f in (to, left, right, how, adds)]
        for thread in np.flatnonzero(mask):
            one = np.array([thread])
            at, first, second, bits, plus = (v[thread] for v in every)
            memory = _memory(lanes, int(lanes.slot[thread]))
            _issue(lanes, memory, one, int(at), first, second, int(bits), bool(plus), in_memory)

    return execute


def _issue(
    lanes: Lanes, memory: TensorMemory, one: Array, at: int, first: np.generic,
    second: np.generic, bits: int, plus: bool, in_memory: bool,
) -> None:  # fmt: skip
    M, N = (bits >> 24 & 31) * 16, (bits >> 17 & 63) * 8
    kinds = bits >> 4 & 3, bits >> 7 & 7, bits >> 10 & 7
    if bits & 0b1111 or bits >> 13 & 3 or kinds not in ((1, 0, 0), (1, 1, 1)) or M not in (64, 128):
        raise UnsupportedError(f"a product with the instruction descriptor {bits:#x}")
    shared, granules = lanes.shared, []

    def matrix(descriptor: np.generic, rows: int, across: int) -> Array:
        found = places(shared, np.array([descriptor]), lanes.slot[one], rows, across)
        granules.append(check_read(shared, found, lanes.agent[one]))
        return found[0] // 2

    if in_memory:
        a: Array | int = int(first)
        memory.read(memory.columns(a & 0xFFFF, 8))
    else:
        a = matrix(first, M, bits >> 15 & 1)
    b = matrix(second, N, bits >> 16 & 1)
    column = at & 0xFFFF
    # Products that follow one another into one place are in order; others may not touch it.
    held, memory.flight = memory.flight, np.zeros_like(memory.flight)
    some = memory.columns(column, N)
    memory.flight = held
    memory.read(some)
    memory.overwrite(some, None)
    memory.flight[some] += 1
    kind = "bf16" if kinds[1] else "f16"
    memory.products.append(Product(M, N, kind, at, a, b, plus, granules))


def _rows(M: int) -> Array:
    """The row of tensor memory that holds each row of a product: 64 of them, 16 a warp."""
    row = np.arange(M)
    return row if M == 128 else row // 16 * 32 + row % 16


def _compute(lanes: Lanes, memory: TensorMemory, product: Product) -> None:
    halves = lanes.shared.bytes.view(np.uint16)
    rows, kind, column = _rows(product.M), product.kind, product.d & 0xFFFF
    B = read(halves[product.b], kind)
    if isinstance(product.a, int):
        first = product.a & 0xFFFF
        at = rows + (product.a >> 16)
        A = read(memory.cells[at, first : first + 8], f"{kind}x2").reshape(-1, 16)
    else:
        A = read(halves[product.a], kind)
    some = slice(column, column + product.N)
    rows = rows + (product.d >> 16)
    result = A @ B.T
    if product.adds:
        result = result + memory.cells[rows, some].view(np.float32)
    memory.cells[rows, some] = result.astype(np.float32).view(np.uint32)
    memory.flight[some] -= 1
    for granules in product.granules:
        np.subtract.at(lanes.shared.reading, granules, 1)


def _commit(x: Instruction) -> Execute:
    where = address(x.operands[0])

    def execute(lanes: Lanes, mask: Array) -> None:
        at = where(lanes)
        for thread in np.flatnonzero(mask):
            memory = _memory(lanes, int(lanes.slot[thread]))
            _barrier_at(memory, int(at[thread])).due.append(memory.products)
            memory.products = []

    return execute


def _barrier_at(memory: TensorMemory, at: int) -> Barrier:
    found = memory.barriers.get(at)
    if found is None:
        raise FaultError(f"no mbarrier was initialised at {at}")
    return found


_OPS = {
    "alloc": _allocate, "dealloc": _free, "relinquish_alloc_permit": _nothing, "ld": _load,
    "st": _store, "wait::ld": _wait, "wait::st": _wait, "mma": _multiply, "commit": _commit,
    "fence::before_thread_sync": _nothing, "fence::after_thread_sync": _nothing,
}  # fmt: skip


@decodes("mbarrier")
def _mbarrier(x: Instruction) -> Execute:
    if x.parts[1] == "init":
        return _initialise(address(x.operands[0]), int(x.operands[1], 0))
    if x.parts[1] == "inval":
        return _invalidate(address(x.operands[0]))
    if x.parts[1] in ("try_wait", "test_wait") and "parity" in x.parts:
        return _await(x.operands[0], address(x.operands[1]), source(x.operands[2], "u32"))
    raise UnsupportedError(f"instruction {x.text}")


def _initialise(where, count: int) -> Execute:
    def execute(lanes: Lanes, mask: Array) -> None:
        flat = lanes.shared.flat(lanes.slot[mask], where(lanes)[mask], 8)
        lanes.shared.store(flat, np.zeros((len(flat), 8), np.uint8), lanes.agent[mask])
        for slot, at in zip(lanes.slot[mask], where(lanes)[mask], strict=True):
            _memory(lanes, int(slot)).barriers[int(at)] = Barrier(count, count)

    return execute


def _invalidate(where) -> Execute:
    def execute(lanes: Lanes, mask: Array) -> None:
        for slot, at in zip(lanes.slot[mask], where(lanes)[mask], strict=True):
            memory = _memory(lanes, int(slot))
            if _barrier_at(memory, int(at)).due:
                raise FaultError("an mbarrier ends before products that arrive at it")
            del memory.barriers[int(at)]

    return execute


def _await(target: str, where, parity) -> Execute:
    def execute(lanes: Lanes, mask: Array) -> None:
        at, wanted = where(lanes), np.broadcast_to(parity(lanes), (lanes.N,))
        flat = lanes.shared.flat(lanes.slot[mask], at[mask], 8)
        lanes.shared.read(flat, 8, lanes.agent[mask])
        for slot, place, odd in {*zip(lanes.slot[mask], at[mask], wanted[mask], strict=True)}:
            memory = _memory(lanes, int(slot))
            barrier = _barrier_at(memory, int(place))
            while barrier.phase % 2 == int(odd):
                if not barrier.due:
                    raise FaultError("waits for an mbarrier at which nothing will arrive")
                # As late as that: whoever looked sooner found products in flight.
                for product in barrier.due.pop(0):
                    _compute(lanes, memory, product)
                barrier.missing -= 1
                if not barrier.missing:
                    barrier.phase, barrier.missing = barrier.phase + 1, barrier.count
        lanes.write(target, np.ones(lanes.N, bool), "pred", mask)

    return execute
