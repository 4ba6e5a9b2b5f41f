"""Matrix products: mma.sync of a warp, wgmma of four warps and shared memory (sm_90).

Products are added up in float32, in the order of numpy; tensor cores have orders of their own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from tests.ptx.lanes import Execute, Lanes, decodes, source
from tests.ptx.memory import NOBODY, SEVERAL, SharedMemory
from tests.ptx.moving import whole_warps
from tests.ptx.program import FaultError, Instruction, UnsupportedError, members
from tests.ptx.values import Array, read

LANE = np.arange(32)
ROW, COLUMN = LANE // 4, LANE % 4  # of a lane in a fragment: its row, its pair of columns


def _pairs(lanes: Lanes, registers: list[str], kind: str) -> Array:
    """Packed halves [registers, warps, 32, 2] as float32."""
    raw = [np.broadcast_to(source(o, "b32")(lanes), (lanes.N,)) for o in registers]
    return read(np.stack(raw), f"{kind}x2").reshape(len(registers), -1, 32, 2)


@decodes("mma")
def _warp_product(x: Instruction) -> Execute:
    """mma.sync.aligned.m16n8kK.row.col.f32.A.A.f32 of halves, or of tf32."""
    found = re.fullmatch(
        r"mma\.sync\.aligned\.m16n8k(4|8|16)\.row\.col\.f32\.(bf16|f16|tf32)\.\2\.f32",
        ".".join(x.parts),
    )
    if found is None:
        raise UnsupportedError(f"product {x.text}")
    k, kind = int(found[1]), found[2]
    d, a, b, c = (members(o) for o in x.operands)
    per = 1 if kind == "tf32" else 2  # elements of a register

    def fragment(lanes: Lanes, registers: list[str]) -> Array:
        if kind != "tf32":
            return _pairs(lanes, registers, kind)
        raw = [np.broadcast_to(source(o, "f32")(lanes), (lanes.N,)) for o in registers]
        cut = np.stack(raw).view(np.uint32) & np.uint32(0xFFFFE000)
        return cut.view(np.float32).reshape(len(registers), -1, 32, 1)

    def execute(lanes: Lanes, mask: Array) -> None:
        whole_warps(lanes, mask, "mma")
        left, right = fragment(lanes, a), fragment(lanes, b)
        warps = lanes.N // 32
        A = np.zeros((warps, 16, k), np.float32)
        B = np.zeros((warps, k, 8), np.float32)
        for i, values in enumerate(left):
            for j in range(per):
                A[:, ROW + 8 * (i % 2), COLUMN * per + j + 4 * per * (i // 2)] = values[..., j]
        for i, values in enumerate(right):
            for j in range(per):
                B[:, COLUMN * per + j + 4 * per * i, ROW] = values[..., j]
        product = A @ B
        for i, (target, before) in enumerate(zip(d, c, strict=True)):
            added = product[:, ROW + 8 * (i // 2), COLUMN * 2 + i % 2].reshape(-1)
            lanes.write(target, source(before, "f32")(lanes) + added, "f32", mask)

    return execute


@dataclass
class Product:
    """A wgmma under way, of the warpgroups `groups` of the batch.

    a: registers, or [groups, 64, 16] places in shared memory in halves, as b [groups, n, 16];
    granules: that are being read; scale: whether to add to d; group: of each warpgroup, as commits
    count them.
    """

    groups: Array
    kind: str
    d: list[str]
    a: list[str] | Array
    b: Array
    granules: list[Array]
    scale: Array
    group: Array


def _by_group(lanes: Lanes, mask: Array) -> Array:
    """The warpgroups of a mask, which it must have whole."""
    of_group = mask.reshape(-1, 128)
    if (of_group.any(1) & ~of_group.all(1)).any():
        raise FaultError("wgmma by a part of a warpgroup")
    return np.flatnonzero(of_group.any(1))


@decodes("wgmma")
def _group_product(x: Instruction) -> Execute:
    if x.parts[1] == "fence":
        return lambda lanes, mask: None
    if x.parts[1] == "commit_group":
        return _commit
    if x.parts[1] == "wait_group":
        left = int(x.operands[0], 0)
        return lambda lanes, mask: _complete(lanes, mask, left)
    found = re.fullmatch(
        r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.(bf16|f16)\.\2", ".".join(x.parts)
    )
    if found is None:
        raise UnsupportedError(f"product {x.text}")
    n, kind = int(found[1]), found[2]
    d, a, b, scale, *flags = x.operands
    in_registers = a.startswith("{")
    if [int(f) for f in flags[:2]] != [1, 1]:
        raise UnsupportedError(f"negated matrices: {x.text}")
    transposed = [int(f) for f in flags[2:]]
    adds = source(scale, "pred")

    def issue(lanes: Lanes, mask: Array) -> None:
        groups = _by_group(lanes, mask)
        parts, granules = [], []
        for text, rows, across in (
            *([] if in_registers else [(a, 64, transposed[0])]),
            (b, n, transposed[-1]),
        ):
            descriptor = np.broadcast_to(source(text, "u64")(lanes), (lanes.N,))
            descriptor = descriptor.reshape(-1, 128)[groups, 0]
            slot, agent = (v.reshape(-1, 128)[groups, 0] for v in (lanes.slot, lanes.agent))
            at = places(lanes.shared, descriptor, slot, rows, across)
            granules.append(check_read(lanes.shared, at, agent))
            parts.append(at // 2)
        left = members(a) if in_registers else parts[0]
        truth = np.broadcast_to(adds(lanes), (lanes.N,)).reshape(-1, 128)[groups, 0]
        group = lanes.committed["wgmma"].reshape(-1, 128)[groups, 0]
        lanes.products.append(
            Product(groups, kind, members(d), left, parts[-1], granules, truth, group)
        )
        if in_registers:
            for name in members(a):
                held = lanes.busy.get(name)
                if held is not None and (held & mask).any():
                    raise FaultError(f"race: {name} belongs to a wgmma that was not waited for")
        _count_busy(lanes)

    return issue


def places(shared: SharedMemory, descriptor: Array, slot: Array, rows: int, across: int) -> Array:
    """Byte addresses [n, rows, 16] of the matrices of halves that descriptors [n] tell of, each in
    the shared memory of a CTA.

    "Matrix descriptor" and "Strides" in the PTX ISA, sections on wgmma and tcgen05: start, leading
    and stride byte offsets in units of 16 bytes, and a swizzle that exchanges 16-byte pieces of a
    row by the number of the row. across: rows are contiguous, in place of the 16.
    """
    d = descriptor.astype(np.int64)
    start, leading, stride = ((d >> s & 0x3FFF) << 4 for s in (0, 16, 32))
    swizzle = d >> 62 & 3
    if (d >> 49 & 7).any() or (d >> 61 & 1).any() or (swizzle == 0).any():
        raise UnsupportedError("a matrix descriptor with a base offset or without swizzling")
    pitch = np.array([0, 128, 64, 32])[swizzle][:, None, None]
    start, leading, stride = (v[:, None, None] for v in (start, leading, stride))
    row, column = np.arange(rows)[None, :, None], np.arange(16)[None, None, :]
    if across:
        per = pitch // 2
        inside = column % 8 * pitch + row % per * 2
        linear = start + row // per * leading + column // 8 * stride + inside
    else:
        linear = start + row // 8 * stride + row % 8 * pitch + column * 2
    turned = np.array([0, 7, 3, 1])[swizzle][:, None, None]
    place = linear ^ ((linear >> 7 & turned) << 4)
    if ((place < 0) | (place + 2 > shared.size)).any():
        raise FaultError(
            f"out of bounds: a product reads at {int(place.max())} of {shared.size} bytes"
        )
    return slot[:, None, None] * shared.pitch + place


def check_read(shared: SharedMemory, at: Array, agent: Array) -> Array:
    """Granules [n, k] of places [n, ...] that products of these agents are to read from now on."""
    granules = (at // shared.granule).reshape(len(agent), -1)
    shared.refuse_arriving(granules)
    agent = np.broadcast_to(agent[:, None], granules.shape)
    writer = shared.ledger.writer[granules]
    if (writer == NOBODY).any():
        raise FaultError("uninitialised: a product reads shared memory that nobody wrote")
    if (writer >> 6 == agent >> 6).any():
        raise FaultError("race: a product reads what was written since the last barrier")
    if shared.unfenced[granules].any():
        raise FaultError(
            "race: a product reads what was written without a fence.proxy.async behind it"
        )
    shared.ledger.reader[granules] = agent | SEVERAL
    np.add.at(shared.reading, granules, 1)
    shared.accessed += 2 * at.size
    return granules


def _count_busy(lanes: Lanes) -> None:
    """Which registers belong to products under way, to be written or to be read."""
    lanes.busy, lanes.read_later = {}, {}
    for product in lanes.products:
        mask = np.zeros(lanes.N // 128, bool)
        mask[product.groups] = True
        mask = np.repeat(mask, 128)
        for name in product.d:
            lanes.busy[name] = lanes.busy.get(name, False) | mask
        for name in product.a if isinstance(product.a, list) else ():
            lanes.read_later[name] = lanes.read_later.get(name, False) | mask


def _commit(lanes: Lanes, mask: Array) -> None:
    lanes.committed["wgmma"] += mask


def _complete(lanes: Lanes, mask: Array, left: int) -> None:
    """Compute what must be there once no more than `left` groups are under way: no sooner."""
    groups = _by_group(lanes, mask)
    committed = lanes.committed["wgmma"].reshape(-1, 128)[:, 0]
    waits = np.zeros(lanes.N // 128, bool)
    waits[groups] = True
    under_way = []
    for product in lanes.products:
        due = waits[product.groups] & (product.group < committed[product.groups] - left)
        if due.any():
            _compute(lanes, _part(product, due))
        if not due.all():
            under_way.append(_part(product, ~due))
    lanes.products = under_way
    _count_busy(lanes)


def _part(product: Product, some: Array) -> Product:
    a = product.a if isinstance(product.a, list) else product.a[some]
    return Product(
        product.groups[some], product.kind, product.d, a, product.b[some],
        [g[some] for g in product.granules], product.scale[some], product.group[some],
    )  # fmt: skip


def _compute(lanes: Lanes, product: Product) -> None:
    groups, count = product.groups, len(product.groups)
    halves = lanes.shared.bytes.view(np.uint16)
    B = read(halves[product.b], product.kind)
    if isinstance(product.a, list):
        A = np.zeros((count, 64, 16), np.float32)
        values = _pairs(lanes, product.a, product.kind)
        values = values.reshape(len(product.a), -1, 4, 32, 2)[:, groups]
        for i, value in enumerate(values):
            for warp in range(4):
                rows = 16 * warp + ROW + 8 * (i % 2)
                for j in (0, 1):
                    A[:, rows, COLUMN * 2 + j + 8 * (i // 2)] = value[:, warp, :, j]
    else:
        A = read(halves[product.a], product.kind)
    result = A @ B.transpose(0, 2, 1)
    mask = np.zeros(lanes.N // 128, bool)
    mask[groups] = True
    mask = np.repeat(mask, 128)
    rows = 16 * np.arange(4)[:, None] + ROW[None, :]
    for i, name in enumerate(product.d):
        column = 8 * (i // 4) + COLUMN * 2 + i % 2
        part = result[:, rows + 8 * (i // 2 % 2), column[None, :]].reshape(count, 128)
        before = read(lanes.register(name), "f32").reshape(-1, 128)[groups]
        value = np.zeros((lanes.N // 128, 128), np.float32)
        value[groups] = np.where(product.scale[:, None], before + part, part)
        lanes.write(name, value.reshape(-1), "f32", mask)
    # Other warps of the group have waited no sooner than at the next barrier: reads are of now.
    agent = lanes.agent.reshape(-1, 128)[groups, 0][:, None] | SEVERAL
    for granules in product.granules:
        np.subtract.at(lanes.shared.reading, granules, 1)
        lanes.shared.ledger.reader[granules] = agent
