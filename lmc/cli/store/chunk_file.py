"""The file that chunks travel in between stores: safetensors, with metadata.

One tensor a section, of the KV's own type and shape `[L, S, T, G, D]`, decoded, named by the id of
its record's part in hex and a number; what the part's header in the store says is JSON in the
file's metadata, under that id. The safetensors package reads and checks the file; only the tensors'
bytes are taken from their places here, since numpy has no bfloat16. The file is written here, so
that a store need not fit into memory: 8 bytes with the length of a JSON header, the header, the
tensors without gaps.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import numpy as np
from pydantic import BaseModel, ConfigDict, FailFast, Field, ValidationError
from pydantic_core import from_json
from safetensors import SafetensorError, safe_open

from lmc.registry import one_line
from lmc.store import wire
from lmc.store.compress import CODECS
from lmc.store.record import Origin, Record
from lmc.store.sections import Form, Kind, Section

FORMAT = {"format": "lmc-chunks", "version": "2"}
MOST_HEADER = 64 << 20
MOST_TENSORS = 1 << 17
# A file of so many times the bytes that are on the disk is a hole: no KV compresses so well.
SPARSE = 8
_STRING = re.compile(rb'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_BARE_BYTES = 256  # what a tensor takes of a header beside names and text, at most
# Of quotes and brackets, and of commas beside those between tokens: 64 sections take 1,200.
_MOST_MARKS = 4096
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Number = Annotated[int, Field(ge=0, le=wire.MOST_HEADS)]
_Position = Annotated[int, Field(ge=0, le=wire.MOST_TOKENS)]


class SectionFacts(BaseModel):
    """What the metadata say of one tensor."""

    model_config = ConfigDict(strict=True, extra="forbid")
    group: _Number
    kind: Kind
    heads: Annotated[list[_Number], Field(min_length=3, max_length=3)]
    tokens: Annotated[list[_Position], Field(min_length=2, max_length=2)]
    codec: str = Field(pattern=f"^({'|'.join(CODECS)})$")


class Facts(BaseModel):
    """What the metadata say of one part; digests in hex, that in `xxh3_128` of all of it."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    namespace: _Digest
    key: _Digest
    context: _Digest
    context_after: _Digest
    tokens: Annotated[
        list[Annotated[int, Field(ge=0, lt=1 << 32)]],
        Field(min_length=1, max_length=wire.MOST_TOKENS),
        FailFast(),
    ]
    start: int = Field(ge=0, le=wire.MOST_START)
    origin: Origin
    tail: bool
    sections: Annotated[list[SectionFacts], Field(min_length=1, max_length=wire.MOST_FORMS)]
    seq: int = Field(ge=0, le=1 << 62)
    created: float = Field(ge=0, le=wire.LATEST)
    error: float = Field(ge=0, le=1e30)
    label: str = Field(max_length=255)
    xxh3_128: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


@dataclass(frozen=True)
class Item:
    """A part of a record in a file, checked; its bytes `[at, at + record.nbytes)` are not."""

    facts: Facts
    record: Record
    forms: tuple[Form, ...]
    at: int

    @property
    def id(self) -> bytes:
        """The part's."""
        return wire.part_id(self.record.id, self.forms)

    def sections(self, data: np.ndarray) -> list[Section]:
        """The sections in bytes uint8 `[record.nbytes]`.

        Raises:
            ValueError: they are not those that were exported, with these facts.
        """
        if _seal(self.facts, self.forms, wire.digest_of(data)) != self.facts.xxh3_128:
            raise ValueError(f"tensor {self.id.hex()!r}: it does not match its digest")
        out, at = [], 0
        for form in self.forms:
            out.append(Section(form, [data[at : at + form.nbytes].reshape(form.shape)]))
            at += form.nbytes
        return out


def header_of(parts: Sequence[tuple[wire.Header, int, bytes]], size: int = 0) -> bytes:
    """The file up to its tensors, filled with spaces up to `size` bytes.

    parts: in the order of the tensors; the headers that they have anywhere, the numbers of their
        puts, and XXH3-128 of all that they have, decoded.
    """
    metadata = dict(FORMAT)
    header: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    for part, seq, digest in parts:
        record, name = part.record, part.id.hex()
        facts = Facts(
            namespace=record.namespace.hex(),
            key=record.key.hex(),
            context=record.context.hex(),
            context_after=record.context_after.hex(),
            tokens=np.frombuffer(record.tokens, "<i8").tolist(),
            start=record.start,
            origin=record.origin,
            tail=record.tail,
            sections=[
                SectionFacts(
                    group=form.group,
                    kind=form.kind,
                    heads=list(form.heads),
                    tokens=list(form.tokens),
                    codec=codec,
                )
                for form, codec, _, _ in part.stored
            ],
            seq=seq,
            created=part.created,
            error=part.error,
            label=part.label,
            xxh3_128="0" * 32,
        )
        facts.xxh3_128 = _seal(facts, part.forms, digest)
        metadata[name] = facts.model_dump_json()
        for i, form in enumerate(part.forms):
            L, S, T, _ = form.shape
            header[f"{name}.{i}"] = {
                "dtype": _DTYPES[form.dtype],
                "shape": [L, S, T, form.heads[1] - form.heads[0], form.D],
                "data_offsets": [at, at + form.nbytes],
            }
            at += form.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    size = max(size, 8 + len(text) + -len(text) % 8)
    return (size - 8).to_bytes(8, "little") + text.ljust(size - 8)


def _seal(facts: Facts, forms: Sequence[Form], digest: bytes) -> str:
    """XXH3-128, in hex, of what the file says of a part and of the KV's own digest."""
    told = facts.model_dump(exclude={"xxh3_128"})
    shapes = [(form.dtype, form.L, form.D) for form in forms]
    text = json.dumps([told, shapes], sort_keys=True)
    return wire.digest_of(digest + text.encode()).hex()


def items_of(path: Path) -> list[Item]:
    """What a file says of its tensors, in their order; their bytes are not read.

    Raises:
        ValueError: a file that is not whole, or that `header_of` did not write.
        OSError: it cannot be read.
    """
    at = _bounded(path)
    try:
        with safe_open(path, "np") as tensors:
            metadata: dict[str, str] = tensors.metadata() or {}
            # In the order of their bytes, which follow each other without gaps.
            slices = [(name, tensors.get_slice(name)) for name in tensors.offset_keys()]
            described = {name: (s.get_dtype(), s.get_shape()) for name, s in slices}
    except SafetensorError as e:
        raise ValueError(f"got {path}, no safetensors file, or not all of one: {e!s:.200}") from e
    marks = {name: metadata.pop(name, None) for name in FORMAT}
    if marks != FORMAT:
        raise ValueError(f"got a file of {marks}, want {FORMAT}, as `lmc store export` writes it")
    tensors_of: dict[str, list[tuple[str, list[int]]]] = {}
    for name, (dtype, shape) in described.items():
        part, _, number = name.rpartition(".")
        if number != str(len(tensors_of.setdefault(part, []))):
            raise ValueError(f"got tensor {name[:80]!r} where the parts of a record follow")
        tensors_of[part].append((dtype, shape))
    if metadata.keys() != tensors_of.keys():
        some = sorted(metadata.keys() ^ tensors_of.keys())[0]
        raise ValueError(f"got {some[:80]!r} among either the tensors or the metadata, want both")
    items = []
    for name, some_tensors in tensors_of.items():
        try:
            items.append(_item(name, some_tensors, metadata.pop(name), at))
        except ValidationError as e:
            raise ValueError(f"tensor {name[:80]!r}: {one_line(e):.200}") from e
        except ValueError as e:
            raise ValueError(f"tensor {name[:80]!r}: {e}") from e
        at += items[-1].record.nbytes
    return items


def open_plain(path: Path) -> BinaryIO:
    """A plain file, to be read: of a pipe the other end would have to be waited for.

    Raises:
        ValueError: it is none.
        OSError: it cannot be opened.
    """
    return open(path, "rb", opener=_plain)


def _plain(path: str, flags: int) -> int:
    fd = os.open(path, flags | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise ValueError(f"got {path}, which is no plain file")
    except BaseException:
        os.close(fd)
        raise
    return fd


def _bounded(path: Path) -> int:
    """Where a file's tensors begin; ValueError where to look at its header might cost too much."""
    with open_plain(path) as file:
        at = 8 + int.from_bytes(file.read(8), "little")
        if at > MOST_HEADER:
            raise ValueError(f"got a header of {at:,} bytes, allowed: at most {MOST_HEADER:,}")
        # Parsers take many times the bytes of what is in no string, and strings are looked at one
        # by one.
        bare = _STRING.sub(b"", file.read(at - 8).rstrip(b" "))
        objects = bare.count(b"{") - 2
        if objects > MOST_TENSORS:
            raise ValueError(f"got {objects:,} tensors, allowed: at most {MOST_TENSORS:,}")
        if len(bare) > _BARE_BYTES * (objects + 2):
            raise ValueError(f"got a header of {len(bare):,} bytes beside names and text")
        there = os.fstat(file.fileno())
    if there.st_size > SPARSE * 512 * there.st_blocks + (1 << 20):
        raise ValueError(
            f"got {path} of {there.st_size:,} bytes, of which the disk has "
            f"{512 * there.st_blocks:,}: a file with holes is not read"
        )
    return at


def _item(name: str, tensors: Sequence[tuple[str, list[int]]], text: str, at: int) -> Item:
    # The parser takes many times the bytes of what it finds, and more to say what is wrong with it.
    commas = text.count(",") - wire.MOST_TOKENS
    if max(commas, *(text.count(mark) for mark in '"[{')) > _MOST_MARKS:
        raise ValueError("got metadata with more in them than any record has")
    # Read first: each field that is missing would have all of the text made again to show it.
    try:
        told = from_json(text)
    except ValueError as e:
        raise ValueError(f"Invalid JSON: {e}") from e
    facts = Facts.model_validate(told)
    if len(facts.sections) != len(tensors):
        raise ValueError(f"got {len(tensors)} tensors, the metadata tell {len(facts.sections)}")
    forms = []
    for section, (dtype, shape) in zip(facts.sections, tensors, strict=True):
        if dtype not in _DTYPES.values() or len(shape) != 5 or 0 in shape:
            raise ValueError(
                f"got {dtype} {shape}, want [L, S, T, G, D] of {', '.join(_DTYPES.values())}"
            )
        L, S, T, G, D = shape
        most = (wire.MOST_LAYERS, 2, wire.MOST_TOKENS, wire.MOST_HEADS, wire.MOST_DIM)
        if any(n > m for n, m in zip(shape, most, strict=True)):
            raise ValueError(f"got shape {shape}, allowed: at most {list(most)}")
        (start, end, of), (first, last) = section.heads, section.tokens
        kind = next(k for k, v in _DTYPES.items() if v == dtype)
        form = Form(section.group, section.kind, (start, end, of), (first, last), L, D, kind)
        wire.check_form(form, len(facts.tokens))
        if (form.S, last - first, end - start) != (S, T, G):
            raise ValueError(
                f"got shape {shape} for {len(facts.tokens)} token ids, tokens {section.tokens} and "
                f"heads {section.heads}"
            )
        forms.append(form)
    if len(facts.label.encode()) > 255:
        raise ValueError("got a label of more than 255 bytes")
    if forms != sorted(forms, key=wire.order):
        raise ValueError("the sections are out of order")
    record = Record(
        slot=-1,
        namespace=bytes.fromhex(facts.namespace),
        key=bytes.fromhex(facts.key),
        tokens=np.array(facts.tokens, "<i8").tobytes(),
        start=facts.start,
        context=bytes.fromhex(facts.context),
        context_after=bytes.fromhex(facts.context_after),
        origin=facts.origin,
        nbytes=sum(form.nbytes for form in forms),
        tail=facts.tail,
    )
    wire.check(record, forms)
    if wire.part_id(record.id, forms).hex() != name:
        raise ValueError("the name is not the id of what the metadata say")
    return Item(facts, record, tuple(forms), at)
