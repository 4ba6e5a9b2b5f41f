"""Ways to damage one thing in a folder that nobody has open."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lmc.store.disk.header import FRONT, PAGE, STATE_AT, Header

INDEX, SEAL, FORMAT = Path("index/data.mdb"), Path("index/seal"), Path("lmc-store.json")


@dataclass(frozen=True)
class Placed:
    """A record of the folder before it was damaged; its id is that of any tier."""

    id: bytes
    segment: int
    at: int
    header: Header

    @property
    def end(self) -> int:
        return self.at + self.header.record_bytes


@dataclass(frozen=True)
class Case:
    """A folder to be damaged.

    Attributes:
        root: a copy that may be changed.
        stale: its index, with a seal, of when there were fewer records.
    """

    root: Path
    stale: Path
    placed: tuple[Placed, ...]
    rng: random.Random

    def file(self, segment: int) -> Path:
        return self.root / "segments" / f"{segment:08d}.seg"

    def any_segment(self) -> int:
        return self.rng.choice(sorted({record.segment for record in self.placed}))

    def within(self, segment: int) -> set[bytes]:
        """Ids of the records of one segment."""
        return {record.id for record in self.placed if record.segment == segment}


def flip(case: Case, file: Path, start: int, end: int) -> None:
    """Flip 1 to 8 bits of bytes `[start, end)`: an odd number, so that something is another."""
    with open(file, "r+b") as f:
        for _ in range(case.rng.choice((1, 1, 3, 7))):
            at = case.rng.randrange(start, end)
            f.seek(at)
            byte = f.read(1)[0] ^ (1 << case.rng.randrange(8))
            f.seek(at)
            f.write(bytes([byte]))


def flip_in_record(
    part: Callable[[Header], tuple[int, int]], harmless: bool = False
) -> Callable[[Case], set[bytes]]:
    """Flip bits in some part of a record, where records have that part."""

    def damage(case: Case) -> set[bytes]:
        record = case.rng.choice([r for r in case.placed if len(range(*part(r.header)))])
        start, end = part(record.header)
        flip(case, case.file(record.segment), record.at + start, record.at + end)
        return set() if harmless else {record.id}

    return damage


def _tokens(header: Header) -> tuple[int, int]:
    end = _table(header)[0]
    return end - 4 * header.record.T, end


def _table(header: Header) -> tuple[int, int]:
    """Lengths and digests of spans."""
    end = FRONT + header.part.size
    return end - 24 * len(header.sections), end


def _payload(header: Header) -> tuple[int, int]:
    return header.payload_at, header.payload_at + header.payload_bytes


def flip_index_page(case: Case) -> set[bytes]:
    file = case.root / INDEX
    flip(case, file, 2 * PAGE, file.stat().st_size)
    return set()


def flip_index_meta_page(case: Case) -> set[bytes]:
    flip(case, case.root / INDEX, 0, 2 * PAGE)
    return set()


def flip_seal(case: Case) -> set[bytes]:
    flip(case, case.root / SEAL, 0, (case.root / SEAL).stat().st_size)
    return set()


def flip_format(case: Case) -> set[bytes]:
    flip(case, case.root / FORMAT, 0, (case.root / FORMAT).stat().st_size)
    return set()


def truncate_segment(case: Case) -> set[bytes]:
    segment = case.any_segment()
    end = case.rng.randrange(case.file(segment).stat().st_size)
    os.truncate(case.file(segment), end)
    return {r.id for r in case.placed if r.segment == segment and r.end > end}


def truncate_index(case: Case) -> set[bytes]:
    os.truncate(case.root / INDEX, case.rng.randrange((case.root / INDEX).stat().st_size))
    return set()


def swap_segments(case: Case) -> set[bytes]:
    a, b = case.any_segment(), case.any_segment()
    spare = case.root / "spare"
    same_size = case.file(a).stat().st_size == case.file(b).stat().st_size
    case.file(a).rename(spare)
    if a != b:
        case.file(b).rename(case.file(a))
    spare.rename(case.file(b))
    # Of other sizes they are seen to be strangers, and all is found where it is now.
    return case.within(a) | case.within(b) if same_size and a != b else set()


def swap_records(case: Case) -> set[bytes]:
    a, b = case.rng.sample(case.placed, 2)
    n = min(a.header.record_bytes, b.header.record_bytes)
    parts = []
    for record in (a, b):
        with open(case.file(record.segment), "rb") as f:
            f.seek(record.at)
            parts.append(f.read(n))
    for record, part in ((a, parts[1]), (b, parts[0])):
        with open(case.file(record.segment), "r+b") as f:
            f.seek(record.at)
            f.write(part)
    return {a.id, b.id}


def remove_segment(case: Case) -> set[bytes]:
    segment = case.any_segment()
    case.file(segment).unlink()
    return case.within(segment)


def garbage_segment(case: Case) -> set[bytes]:
    segment = case.any_segment()
    size = case.file(segment).stat().st_size
    size = case.rng.choice((size, case.rng.randrange(2 * size)))
    case.file(segment).write_bytes(case.rng.randbytes(size))
    return case.within(segment)


def directory_segment(case: Case) -> set[bytes]:
    segment = case.any_segment()
    case.file(segment).unlink()
    case.file(segment).mkdir()
    return case.within(segment)


def remove_index(case: Case) -> set[bytes]:
    shutil.rmtree(case.root / "index")
    return set()


def stale_index(case: Case) -> set[bytes]:
    """As a backup would bring it back."""
    shutil.rmtree(case.root / "index")
    shutil.copytree(case.stale, case.root / "index")
    return set()


def removed(file: Path) -> Callable[[Case], set[bytes]]:
    def damage(case: Case) -> set[bytes]:
        (case.root / file).unlink()
        return set()

    return damage


def garbage(file: Path) -> Callable[[Case], set[bytes]]:
    def damage(case: Case) -> set[bytes]:
        size = (case.root / file).stat().st_size
        size = case.rng.choice((size, case.rng.randrange(2 * size)))
        (case.root / file).write_bytes(case.rng.randbytes(size))
        return set()

    return damage


def directory(file: Path) -> Callable[[Case], set[bytes]]:
    def damage(case: Case) -> set[bytes]:
        (case.root / file).unlink()
        (case.root / file).mkdir()
        return set()

    return damage


# Each damages one thing and says which records may be gone then: all others must be served. The
# second is what must be counted; None where what is hit may not matter, or be found.
DAMAGE: dict[str, tuple[Callable[[Case], set[bytes]], tuple[str, ...]]] = {
    "front": (flip_in_record(lambda h: (STATE_AT + 1, FRONT)), ("damaged:header",)),
    "header": (flip_in_record(lambda h: (FRONT, _tokens(h)[0])), ("damaged:header",)),
    "magic": (flip_in_record(lambda h: (0, STATE_AT)), ("damaged:header",)),
    "state": (flip_in_record(lambda h: (STATE_AT, STATE_AT + 1), harmless=True), ()),
    "tokens": (flip_in_record(_tokens), ("damaged:header",)),
    "table of spans": (flip_in_record(_table), ("damaged:header",)),
    "payload": (flip_in_record(_payload), ("damaged:payload",)),
    "padding before": (
        flip_in_record(lambda h: (_table(h)[1], h.payload_at), harmless=True),
        (),
    ),
    "padding behind": (
        flip_in_record(lambda h: (_payload(h)[1], h.record_bytes), harmless=True),
        (),
    ),
    "index page": (flip_index_page, ("index_rebuilt",)),
    "index meta page": (flip_index_meta_page, ("index_rebuilt",)),
    "seal": (flip_seal, ("index_rebuilt",)),
    "format": (flip_format, ()),
    "segment truncated": (truncate_segment, ("index_rebuilt",)),
    "index truncated": (truncate_index, ("index_rebuilt",)),
    "segments swapped": (swap_segments, ()),
    "records swapped": (swap_records, ("damaged:header",)),
    "segment removed": (remove_segment, ("index_rebuilt",)),
    "index removed": (remove_index, ("index_rebuilt",)),
    "index file removed": (removed(INDEX), ("index_rebuilt",)),
    "seal removed": (removed(SEAL), ("index_rebuilt",)),
    "format removed": (removed(FORMAT), ()),
    "segment garbage": (garbage_segment, ("damaged:header", "index_rebuilt")),
    "index garbage": (garbage(INDEX), ("index_rebuilt",)),
    "seal garbage": (garbage(SEAL), ("index_rebuilt",)),
    "format garbage": (garbage(FORMAT), ()),
    "segment a folder": (directory_segment, ("segments_unreadable",)),
    "index a folder": (directory(INDEX), ("index_rebuilt",)),
    "seal a folder": (directory(SEAL), ("index_rebuilt",)),
    "format a folder": (directory(FORMAT), ()),
    "index stale": (stale_index, ("index_rebuilt",)),
}
