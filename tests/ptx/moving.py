"""Instructions that move: between registers, threads of a warp, shared and global memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tests.ptx.lanes import Execute, Lanes, address, decodes, source
from tests.ptx.memory import NOBODY
from tests.ptx.program import FaultError, Instruction, UnsupportedError, members, width
from tests.ptx.values import UNSIGNED, Array, read, width_of


@decodes("mov")
def _move(x: Instruction) -> Execute:
    kind, target, given = x.parts[-1], *x.operands
    if target.startswith("{"):
        return _unpack(members(target), given, width_of(kind))
    if given.startswith("{"):
        return _pack(target, members(given), width_of(kind))
    get = source(given, kind)

    def execute(lanes: Lanes, mask: Array) -> None:
        lanes.write(target, np.broadcast_to(get(lanes), (lanes.N,)), kind, mask)

    return execute


def _unpack(targets: list[str], given: str, whole: int) -> Execute:
    part = whole // len(targets)
    get = source(given, f"b{whole}")

    def execute(lanes: Lanes, mask: Array) -> None:
        value = np.broadcast_to(get(lanes), (lanes.N,))
        for i, target in enumerate(targets):
            piece = (value >> value.dtype.type(part * i)).astype(UNSIGNED[part])
            lanes.write(target, piece, f"b{part}", mask)

    return execute


def _pack(target: str, given: list[str], whole: int) -> Execute:
    part = whole // len(given)
    sources = [source(o, f"b{part}") for o in given]
    wide = UNSIGNED[whole]

    def execute(lanes: Lanes, mask: Array) -> None:
        value = np.zeros(lanes.N, wide)
        for i, get in enumerate(sources):
            value |= get(lanes).astype(wide) << wide(part * i)
        lanes.write(target, value, f"b{whole}", mask)

    return execute


@decodes("cvta")
def _to_generic(x: Instruction) -> Execute:
    if "global" not in x.parts:
        raise UnsupportedError(f"generic addresses of other than global memory: {x.text}")
    get = source(x.operands[1], "u64")
    return lambda lanes, mask: lanes.write(x.operands[0], get(lanes), "u64", mask)


@decodes("ld")
def _load(x: Instruction) -> Execute:
    space = x.parts[1].partition("::")[0]
    kind, targets = x.parts[-1], members(x.operands[0])
    if space == "param":
        return _load_parameter(x)
    elements, size = width(x.parts)
    where = address(x.operands[1])

    def load_global(lanes: Lanes, mask: Array) -> None:
        at, agent = where(lanes)[mask], lanes.agent[mask]
        lanes.memory.read(at, elements * size, agent)
        give(lanes, mask, lanes.memory.fetch(at, elements, size))

    def load_shared(lanes: Lanes, mask: Array) -> None:
        flat = lanes.shared.flat(lanes.slot[mask], where(lanes)[mask], elements * size)
        lanes.shared.read(flat, elements * size, lanes.agent[mask])
        give(lanes, mask, lanes.shared.load(flat, elements * size).view(UNSIGNED[8 * size]))

    def give(lanes: Lanes, mask: Array, values: Array) -> None:
        for i, target in enumerate(targets):
            whole = np.zeros(lanes.N, UNSIGNED[8 * size])
            whole[mask] = values[:, i]
            plain = kind if kind[0] == "s" else f"b{8 * size}"
            lanes.write(target, read(whole, plain), plain, mask)

    if space not in ("global", "shared"):
        raise UnsupportedError(f"memory of {x.text}")
    return load_global if space == "global" else load_shared


def _load_parameter(x: Instruction) -> Execute:
    """ld.param from a parameter's name, or from an address in a register: 8 bytes each."""
    where, kind = address(x.operands[1]), x.parts[-1]
    width = width_of(kind)

    def execute(lanes: Lanes, mask: Array) -> None:
        at = where(lanes)
        values = np.array([p & (2**64 - 1) for p in lanes.parameters], np.uint64)
        if (wrong := (at % 8 != 0) | (at < 0) | (at >= 8 * len(values)))[mask].any():
            raise FaultError(f"out of bounds: parameter at {int(at[wrong & mask][0])}")
        raw = values[np.where(wrong, 0, at // 8)].astype(UNSIGNED[width])
        lanes.write(x.operands[0], read(raw, kind), kind, mask)

    return execute


@decodes("st")
def _store(x: Instruction) -> Execute:
    space = x.parts[1].partition("::")[0]
    if space not in ("global", "shared"):
        raise UnsupportedError(f"memory of {x.text}")
    elements, size = width(x.parts)
    where = address(x.operands[0])
    sources = [source(o, f"b{8 * size}") for o in members(x.operands[1])]

    def execute(lanes: Lanes, mask: Array) -> None:
        values = [np.broadcast_to(get(lanes), (lanes.N,))[mask] for get in sources]
        stacked = np.stack(values, 1)
        at, agent = where(lanes)[mask], lanes.agent[mask]
        if space == "global":
            lanes.memory.store(at, stacked, agent)
        else:
            flat = lanes.shared.flat(lanes.slot[mask], at, elements * size)
            lanes.shared.store(flat, stacked.view(np.uint8), agent)

    return execute


@decodes("bar", "barrier")
def _barrier(x: Instruction) -> Execute:
    if "warp" not in x.parts and ("sync" not in x.parts or len(x.operands) > 1):
        raise UnsupportedError(f"barrier of part of a CTA: {x.text}")
    return lambda lanes, mask: None  # Lanes.run does it


@decodes("fence")
def _fence(x: Instruction) -> Execute:
    if x.parts[1:3] != ("proxy", "async"):
        return lambda lanes, mask: None
    return lambda lanes, mask: lanes.shared.fence(lanes.agent[mask])


@decodes("shfl")
def _shuffle(x: Instruction) -> Execute:
    mode, target = x.parts[2], x.operands[0].split("|")
    value, offset = source(x.operands[1], "b32"), source(x.operands[2], "s32")

    def execute(lanes: Lanes, mask: Array) -> None:
        whole_warps(lanes, mask, "shfl")
        n = np.broadcast_to(offset(lanes), (lanes.N,)).astype(np.int64)
        lane = lanes.lane
        wanted = {"bfly": lane ^ n, "idx": n & 31, "down": lane + n, "up": lane - n}[mode]
        inside = (wanted >= 0) & (wanted < 32)
        other = np.arange(lanes.N) - lane + np.where(inside, wanted, lane)
        lanes.write(target[0], np.broadcast_to(value(lanes), (lanes.N,))[other], "b32", mask)
        if len(target) > 1:
            lanes.write(target[1], inside, "pred", mask)

    return execute


def whole_warps(lanes: Lanes, mask: Array, what: str) -> None:
    some = mask.reshape(-1, 32)
    if (some.any(1) & ~some.all(1)).any():
        raise FaultError(f"{what} by a part of a warp")


@decodes("elect")
def _elect(x: Instruction) -> Execute:
    """elect.sync d|p, mask: p in the first of the threads of a warp, d is its lane."""
    lane, elected = (t.strip() for t in x.operands[0].split("|"))

    def execute(lanes: Lanes, mask: Array) -> None:
        first = np.repeat(mask.reshape(-1, 32).argmax(1), 32)
        lanes.write(lane, first.astype(np.uint32), "b32", mask)
        lanes.write(elected, lanes.lane == first, "pred", mask)

    return execute


@decodes("redux")
def _reduce(x: Instruction) -> Execute:
    """redux.sync.op{.abs}{.NaN}.type d, a, members: over the lanes that a thread's mask names."""
    op, kind = x.parts[2], x.parts[-1]
    get, named = source(x.operands[1], kind), source(x.operands[2], "b32")
    reduce = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and,
              "or": np.bitwise_or, "xor": np.bitwise_xor}[op]  # fmt: skip
    if kind == "f32" and "NaN" not in x.parts:
        reduce = np.fmin if op == "min" else np.fmax

    def execute(lanes: Lanes, mask: Array) -> None:
        whole_warps(lanes, mask, "redux")
        values = np.broadcast_to(get(lanes), (lanes.N,)).reshape(-1, 1, 32)
        values = np.abs(values) if "abs" in x.parts else values
        members = np.broadcast_to(named(lanes), (lanes.N,)).reshape(-1, 32, 1)
        inside = (members >> np.arange(32, dtype=np.uint32)) & np.uint32(1) != 0
        own = np.arange(32)
        if not inside[mask.reshape(-1, 32).any(1)][:, own, own].all():
            raise FaultError("redux by a thread that its own mask leaves out")
        # In place of a lane that is left out, the thread's own value, which changes no minimum, and
        # of a sum nothing.
        own_value = values.reshape(-1, 32, 1)
        others = np.zeros_like(own_value) if op in ("add", "xor") else own_value
        result = reduce.reduce(np.where(inside, values, others), axis=2)
        lanes.write(x.operands[0], result.reshape(-1).astype(values.dtype), kind, mask)

    return execute


@decodes("vote")
def _vote(x: Instruction) -> Execute:
    get = source(x.operands[1], "pred")

    def execute(lanes: Lanes, mask: Array) -> None:
        truth = (np.broadcast_to(get(lanes), (lanes.N,)) & mask).reshape(-1, 32)
        active = mask.reshape(-1, 32)
        if x.parts[2] == "ballot":
            packed = np.packbits(truth, axis=1, bitorder="little").view(np.uint32)[:, 0]
            lanes.write(x.operands[0], np.repeat(packed, 32), "b32", mask)
            return
        result = truth.any(1) if x.parts[2] == "any" else (truth | ~active).all(1)
        lanes.write(x.operands[0], np.repeat(result, 32), "pred", mask)

    return execute


@decodes("ldmatrix")
def _load_matrix(x: Instruction) -> Execute:
    """Each of n matrices of 8 x 8 halves: row r at the address that lane 8 n + r gives."""
    targets, where = members(x.operands[0]), address(x.operands[1])
    transposed = "trans" in x.parts
    lane = np.arange(32)
    row, column = lane // 4, lane % 4 * 2

    def execute(lanes: Lanes, mask: Array) -> None:
        whole_warps(lanes, mask, "ldmatrix")
        given = mask & (lanes.lane < 8 * len(targets))
        flat = lanes.shared.flat(lanes.slot[given], where(lanes)[given], 16)
        lanes.shared.read(flat, 16, lanes.agent[given])
        halves = lanes.shared.load(flat, 16).view(np.uint16).reshape(-1, len(targets), 8, 8)
        for i, target in enumerate(targets):
            matrix = halves[:, i].transpose(0, 2, 1) if transposed else halves[:, i]
            low, high = (matrix[:, row, column + k].astype(np.uint32) for k in (0, 1))
            whole = np.zeros(lanes.N, np.uint32)
            whole[mask] = (low | high << np.uint32(16)).reshape(-1)
            lanes.write(target, whole, "b32", mask)

    return execute


@decodes("stmatrix")
def _store_matrix(x: Instruction) -> Execute:
    where, given = address(x.operands[0]), members(x.operands[1])
    sources = [source(o, "b32") for o in given]
    transposed = "trans" in x.parts
    lane = np.arange(32)
    row, column = lane // 4, lane % 4 * 2

    def execute(lanes: Lanes, mask: Array) -> None:
        whole_warps(lanes, mask, "stmatrix")
        warps = int(mask.sum()) // 32
        halves = np.zeros((warps, len(given), 8, 8), np.uint16)
        for i, get in enumerate(sources):
            value = np.broadcast_to(get(lanes), (lanes.N,))[mask].reshape(warps, 32)
            for k in (0, 1):
                half = (value >> np.uint32(16 * k)).astype(np.uint16)
                at = (column + k, row) if transposed else (row, column + k)
                halves[:, i][:, at[0], at[1]] = half
        rows = mask & (lanes.lane < 8 * len(given))
        flat = lanes.shared.flat(lanes.slot[rows], where(lanes)[rows], 16)
        lanes.shared.store(flat, halves.reshape(-1, 8).view(np.uint8), lanes.agent[rows])

    return execute


@dataclass
class Copy:
    """A cp.async under way: threads who, from addresses to flat shared ones, in groups."""

    who: Array
    flat: Array
    address: Array
    size: int
    given: Array
    group: Array


@decodes("cp")
def _copy(x: Instruction) -> Execute:
    if x.parts[1:2] != ("async",) or "bulk" in x.parts or "mbarrier" in x.parts:
        raise UnsupportedError(f"instruction {x.text}")
    if x.parts[2] == "commit_group":
        return _commit
    if x.parts[2] in ("wait_group", "wait_all"):
        left = int(x.operands[0], 0) if x.operands else 0
        return lambda lanes, mask: _complete(lanes, mask, left)
    target, origin = address(x.operands[0]), address(x.operands[1])
    size = int(x.operands[2], 0)
    bytes_given = source(x.operands[3] if len(x.operands) > 3 else str(size), "u32")

    def issue(lanes: Lanes, mask: Array) -> None:
        given = np.broadcast_to(bytes_given(lanes), (lanes.N,)).astype(np.int64)[mask]
        if (given > size).any():
            raise FaultError(f"cp.async of {int(given.max())} bytes into {size}")
        start = origin(lanes)[mask]
        for n in np.unique(given[given > 0]):
            some = given == n
            lanes.memory.read(start[some], int(n), lanes.agent[mask][some])
        flat = lanes.shared.flat(lanes.slot[mask], target(lanes)[mask], size)
        at = lanes.shared.granules(flat, size)
        lanes.shared.write(at, lanes.agent[mask], np.zeros(at.shape, bool))
        lanes.shared.arriving[at] = True
        group = lanes.committed["cp.async"][mask]
        lanes.copies.append(Copy(np.flatnonzero(mask), flat, start, size, given, group))

    return issue


def _commit(lanes: Lanes, mask: Array) -> None:
    lanes.committed["cp.async"] += mask


def _complete(lanes: Lanes, mask: Array, left: int) -> None:
    """Bring what must have come once no more than `left` groups of a thread are under way.

    That is as late as it may come: whoever looks sooner finds it `arriving`, which is a fault.
    """
    committed, under_way = lanes.committed["cp.async"], []
    for copy in lanes.copies:
        due = mask[copy.who] & (copy.group < committed[copy.who] - left)
        _bring(lanes, copy, due)
        if not due.all():
            rest = [value[~due] for value in (copy.who, copy.flat, copy.address)]
            under_way.append(Copy(*rest, copy.size, copy.given[~due], copy.group[~due]))
    lanes.copies = under_way


def _bring(lanes: Lanes, copy: Copy, due: Array) -> None:
    flat = copy.flat[due]
    if not len(flat):
        return
    given, start = copy.given[due], copy.address[due]
    values = np.zeros((len(flat), copy.size), np.uint8)
    for n in np.unique(given[given > 0]):
        some = given == n
        unit = min(int(n & -n), 8)
        values[some, :n] = lanes.memory.fetch(start[some], int(n) // unit, unit).view(np.uint8)
    lanes.shared.bytes[flat[:, None] + np.arange(copy.size)] = values
    at = lanes.shared.granules(flat, copy.size)
    lanes.shared.arriving[at] = False
    lanes.shared.unfenced[at] = True
    lanes.shared.ledger.writer[at] = lanes.agent[copy.who[due]][:, None]
    lanes.shared.ledger.reader[at] = NOBODY
