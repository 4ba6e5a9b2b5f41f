"""The threads of some CTAs in lock step: registers, control flow, and what is still under way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from operator import itemgetter

import numpy as np

from tests.ptx.memory import GlobalMemory, SharedMemory
from tests.ptx.program import FaultError, Instruction, Program, UnsupportedError
from tests.ptx.values import UNWRITTEN, Array, bits, holder, immediate, read, resized, width_of

Execute = Callable[["Lanes", Array], None]
Decode = Callable[[Instruction], Execute]
DECODERS: dict[str, Decode] = {}
THREADS = 4096  # of a batch of CTAs, about
LIMIT = 5_000_000  # instructions of a batch: a kernel that goes on is taken to hang


def decodes(*names: str) -> Callable[[Decode], Decode]:
    """Register what turns an instruction of these names (the op up to its first dot) into a
    function of the lanes and of the mask of those that execute it."""

    def register(decode: Decode) -> Decode:
        DECODERS.update(dict.fromkeys(names, decode))
        return decode

    return register


@dataclass
class Totals:
    """What was executed. instructions: of warps, by op; lines: how often each line of PTX was by
    anybody, by "kernel:line", and held_back: how often its guard kept some threads from it; bytes:
    of global and of shared memory."""

    launches: int = 0
    ctas: int = 0
    instructions: Counter[str] = field(default_factory=Counter)
    lines: Counter[str] = field(default_factory=Counter)
    held_back: Counter[str] = field(default_factory=Counter)
    bytes_read: int = 0
    bytes_written: int = 0
    shared_bytes: int = 0

    def add(self, other: Totals) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)


class Lanes:
    """All threads of the CTAs with the flat indices `ctas` in a grid."""

    def __init__(
        self, program: Program, grid: tuple[int, int, int], ctas: Array, parameters: list[int],
        memory: GlobalMemory, shared_bytes: int,
    ) -> None:  # fmt: skip
        T, C = program.threads, len(ctas)
        self.program, self.parameters, self.memory = program, parameters, memory
        self.offsets = {name: 8 * i for i, name in enumerate(program.parameters)}
        self.N = N = C * T
        self.everyone = np.ones(N, bool)
        self.thread = np.tile(np.arange(T, dtype=np.int64), C)
        self.lane = np.arange(N) % 32
        self.slot = np.repeat(np.arange(C, dtype=np.int64), T)
        self.cta = np.repeat(ctas.astype(np.int64), T)
        self.epoch = np.zeros(C, np.int64)
        self.agent = self._agents()
        self.shared = SharedMemory(C, shared_bytes, program.granule["shared"])
        self.registers: dict[str, Array] = {}
        self.special = self._special(grid)
        # Registers that a wgmma is to write, and that it still reads, and by which threads.
        self.busy: dict[str, Array] = {}
        self.read_later: dict[str, Array] = {}
        self.products: list = []
        self.tensor_memory: dict = {}  # of sm_100, by the CTA's slot
        self.copies: list = []
        self.committed = {"cp.async": np.zeros(N, np.int64), "wgmma": np.zeros(N, np.int64)}
        self.executed, self.held_back = np.zeros((2, len(program.instructions)), np.int64)

    def _agents(self) -> Array:
        return self.cta << 32 | self.epoch[self.slot] << 6 | self.thread // 32

    def _special(self, grid: tuple[int, int, int]) -> dict[str, Array]:
        x, y, _ = grid
        axes = (self.cta % x, self.cta // x % y, self.cta // (x * y))
        values = {"%laneid": self.lane, "%warpid": self.thread // 32}
        for axis, index, size in zip("xyz", axes, grid, strict=True):
            values[f"%ctaid.{axis}"] = index
            values[f"%nctaid.{axis}"] = np.full(self.N, size)
            values[f"%tid.{axis}"] = self.thread if axis == "x" else np.zeros(self.N)
            threads = self.program.threads if axis == "x" else 1
            values[f"%ntid.{axis}"] = np.full(self.N, threads)
        return {name: value.astype(np.uint32) for name, value in values.items()}

    def register(self, name: str) -> Array:
        """The bits of a register of every thread."""
        found = self.registers.get(name)
        if found is None:
            found = np.full(self.N, UNWRITTEN[holder(self.program.kind(name))])
            self.registers[name] = found
        return found

    def write(self, name: str, value: Array, kind: str, mask: Array) -> None:
        """Give a register the value of a type in the threads of a mask."""
        if name == "_":
            return
        kept = holder(self.program.kind(name))
        raw = bits(value, kind)
        if kept != "pred" and raw.dtype.itemsize * 8 != (width := width_of(kept)):
            signed = kind[0] == "s" and kind not in ("s16x2",)
            raw = (
                bits(value.astype(f"i{width // 8}"), f"s{width}") if signed else resized(raw, width)
            )
        if mask is self.everyone and raw.shape == (self.N,):
            self.registers[name] = raw
        else:
            self.registers[name] = np.where(mask, raw, self.register(name))

    def barrier(self, parked: list[tuple[int, Array]]) -> list[tuple[int, Array]]:
        """Let the CTAs go on of which all threads are parked at a barrier; those that go, taken out
        of `parked`."""
        threads = sum(np.bincount(self.slot[m], minlength=len(self.epoch)) for _, m in parked)
        full = threads == self.program.threads
        if not full.any():
            return []
        self.epoch[full] += 1
        self.agent = self._agents()
        goes = full[self.slot]
        free = [(at, mask & goes) for at, mask in parked]
        parked[:] = [(at, mask & ~goes) for at, mask in parked if (mask & ~goes).any()]
        return [(at, mask) for at, mask in free if mask.any()]

    def run(self) -> None:
        """Execute to the end. Threads that part go on one by one, those further back first."""
        run = [_decoded(x) for x in self.program.instructions]
        waiting = [(0, self.everyone)]
        parked: list[tuple[int, Array]] = []
        steps = 0
        while waiting:
            waiting.sort(key=itemgetter(0))
            at, mask = waiting.pop(0)
            while waiting and waiting[0][0] == at:
                mask = mask | waiting.pop(0)[1]
            mask = self.everyone if mask.all() else mask
            warps = int(mask.reshape(-1, 32).any(1).sum())
            stop = waiting[0][0] if waiting else len(run)
            while True:
                if at >= len(run):
                    raise FaultError("a thread runs out of the kernel")
                instruction = self.program.instructions[at]
                steps += 1
                if steps > LIMIT:
                    raise FaultError(f"no end after {LIMIT} instructions   {_place(instruction)}")
                active = self._active(instruction, mask)
                self.executed[at] += warps * (active is mask or active.any())
                self.held_back[at] += active is not mask
                op = instruction.parts[0]
                if op in ("bra", "ret", "exit"):
                    if active.any() and op == "bra":
                        waiting.append((self.program.labels[instruction.operands[0]], active))
                    if (rest := mask & ~active).any():
                        waiting.append((at + 1, rest))
                    break
                if op in ("bar", "barrier") and "warp" not in instruction.parts:
                    if active.any():
                        parked.append((at + 1, active))
                        waiting += self.barrier(parked)
                    if (rest := mask & ~active).any():
                        waiting.append((at + 1, rest))
                    break
                if active is self.everyone or active.any():
                    try:
                        if self.busy:
                            self._refuse_busy(instruction, active)
                        run[at](self, active)
                    except FaultError as fault:
                        raise FaultError(f"{fault}   {_place(instruction)}") from None
                at += 1
                if at >= stop:
                    waiting.append((at, mask))
                    break
        if parked:
            place = _place(self.program.instructions[parked[0][0] - 1])
            raise FaultError(f"a barrier that not all threads of a CTA come to   {place}")
        memories = self.tensor_memory.values()
        if self.products or any(x.products or x.flight.any() for x in memories):
            raise FaultError("the kernel ends before a product that was not waited for")
        if any(x.taken for x in memories):
            raise FaultError(
                "the kernel ends and keeps tensor memory, which the next one waits for"
            )

    def _active(self, instruction: Instruction, mask: Array) -> Array:
        if instruction.guard is None:
            return mask
        truth = self.register(instruction.guard)
        active = mask & ~truth if instruction.negated else mask & truth
        return mask if (active == mask).all() else active

    def _refuse_busy(self, instruction: Instruction, active: Array) -> None:
        """Registers of products under way are neither read nor written before their wait."""
        if instruction.parts[0] == "wgmma":
            return
        for name in instruction.registers:
            held = self.busy.get(name)
            if held is not None and (held & active).any():
                raise FaultError(f"race: {name} belongs to a wgmma that was not waited for")
            held = self.read_later.get(name)
            if held is not None and (held & active).any() and name in instruction.written:
                raise FaultError(
                    f"race: writes {name}, which a wgmma that was not waited for reads"
                )


def _place(instruction: Instruction) -> str:
    return f"at {instruction.text[:200]} ({instruction.where or 'no source line'})"


@decodes("bra", "ret", "exit")
def _control(x: Instruction) -> Execute:
    return lambda lanes, mask: None  # Lanes.run does it


@lru_cache(maxsize=100_000)
def _decoded(instruction: Instruction) -> Execute:
    decode = DECODERS.get(instruction.parts[0])
    if decode is None:
        raise UnsupportedError(f"instruction {instruction.text}")
    return decode(instruction)


def source(text: str, kind: str) -> Callable[[Lanes], Array]:
    """Reads an operand: a register, a special one, a constant, or the address of shared memory."""
    if text.startswith("%") and "." not in text and text not in ("%laneid", "%warpid"):
        return lambda lanes: read(lanes.register(text), kind)
    if text.startswith("%"):
        return lambda lanes: read(lanes.special[text], kind)
    if text == "global_smem":
        zero = immediate("0", kind)
        return lambda lanes: zero
    if text[0].isdigit() or text[0] == "-":
        value = immediate(text, kind)
        return lambda lanes: value

    def named(lanes: Lanes) -> Array:
        if text in lanes.offsets:
            return immediate(str(lanes.offsets[text]), kind)
        return read(lanes.register(text), kind)

    return named


def address(operand: str) -> Callable[[Lanes], Array]:
    """int64 [threads] of `[register + offset]`, or of `[offset]`."""
    inside = operand.strip("[] ")
    base, _, offset = (x.strip() for x in inside.partition("+"))
    shift = np.int64(int(offset, 0) if offset else 0)

    def compute(lanes: Lanes) -> Array:
        if base == "global_smem" or base[0].isdigit():
            value = np.int64(0 if base == "global_smem" else int(base, 0))
        elif base in lanes.offsets:
            value = np.int64(lanes.offsets[base])
        else:
            value = lanes.register(base)
        return np.broadcast_to(value, lanes.N).astype(np.int64) + shift

    return compute


def launch(
    program: Program, grid: tuple[int, int, int], parameters: list[int], memory: GlobalMemory,
    shared_bytes: int,
) -> Totals:  # fmt: skip
    """Execute every CTA of a grid.

    parameters: the bits of each, in the order of the program's. Raises FaultError at the first
    thing that is wrong, UnsupportedError at what is not known.
    """
    unknown = len(program.parameters) - len(parameters)
    if unknown:
        raise UnsupportedError(f"{len(program.parameters)} parameters, got {len(parameters)}")
    if not all(1 <= n <= most for n, most in zip(grid, (2**31 - 1, 65535, 65535), strict=True)):
        raise FaultError(f"grid {grid}: at most 2**31 - 1, 65,535 and 65,535")
    total = int(np.prod(grid, dtype=np.int64))
    batch = max(1, THREADS // program.threads)
    counts, reached, held_back = Counter(), Counter(), Counter()
    shared = 0
    with np.errstate(all="ignore"):
        for first in range(0, total, batch):
            ctas = np.arange(first, min(first + batch, total))
            lanes = Lanes(program, grid, ctas, parameters, memory, shared_bytes)
            lanes.run()
            shared += lanes.shared.accessed
            for i, instruction in enumerate(program.instructions):
                counts[".".join(instruction.parts)] += int(lanes.executed[i])
                line = f"{program.name}:{instruction.line}"
                reached[line] += int(lanes.executed[i])
                held_back[line] += int(lanes.held_back[i])
    read, written = memory.bytes_read, memory.bytes_written
    return Totals(1, total, counts, reached, held_back, read, written, shared)
