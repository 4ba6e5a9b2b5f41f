"""The file that chunks travel in between stores: safetensors, with metadata.

One tensor a record, named by its id in hex, of the KV's own type and shape `[L, S, T, G, D]`,
decoded; what its header in the store says is JSON in the file's metadata, under the same name. The
safetensors package reads and checks the file; only the tensors' bytes are taken from their places
here, since numpy has no bfloat16. The file is written here, so that a store need not fit into
memory: 8 bytes with the length of a JSON header, the header, the tensors without gaps.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open

from lmc.model.layout import KVLayout
from lmc.registry import one_line
from lmc.store.compress import CODECS
from lmc.store.disk import header as fmt
from lmc.store.disk.header import Header
from lmc.store.record import Origin, Record
from lmc.store.tier import Rows

FORMAT = {"format": "lmc-chunks", "version": "1"}
MOST_HEADER = 100_000_000  # of safetensors' own readers
_DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class Facts(BaseModel):
    """What the metadata say of one tensor; digests in hex, that in `xxh3_128` of all of it."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
    namespace: _Digest
    key: _Digest
    context: _Digest
    context_after: _Digest
    tokens: list[Annotated[int, Field(ge=0, lt=1 << 32)]]
    start: int = Field(ge=0, lt=1 << 63)
    origin: Origin
    tail: bool
    shard: int = Field(ge=0, lt=1 << 16)
    shards: int = Field(ge=1, lt=1 << 16)
    codec: str = Field(pattern=f"^({'|'.join(CODECS)})$")
    seq: int = Field(ge=0, lt=1 << 63)
    created: float = Field(ge=0)
    error: float = Field(ge=0, le=1e30)
    label: str = Field(max_length=255)
    xxh3_128: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]


@dataclass(frozen=True)
class Item:
    """A record of a file, checked; its bytes `[at, at + record.nbytes)` are not."""

    facts: Facts
    record: Record
    layout: KVLayout
    S: int
    at: int

    def check(self, rows: Rows) -> None:
        """Raise ValueError unless these are the bytes that were exported, with these facts."""
        if _seal(self.facts, self.layout, self.S, fmt.digest_of(rows)) != self.facts.xxh3_128:
            name = fmt.shard_id(self.record, self.facts.shard, self.facts.shards).hex()
            raise ValueError(f"tensor {name!r}: it does not match its digest")

    @property
    def rank(self) -> tuple[int, int]:
        """Of how many ranks, and which."""
        return (self.facts.shards, self.facts.shard)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """[L, S, T, R] of its rows."""
        R = self.record.nbytes // (self.layout.L * self.S * self.record.T)
        return (self.layout.L, self.S, self.record.T, R)


def header_of(records: Sequence[tuple[Header, bytes]], size: int = 0) -> bytes:
    """The file up to its tensors, filled with spaces up to `size` bytes.

    records: in the order of the tensors; the headers they have in their store, and XXH3-128 of the
        decoded KV.
    """
    metadata = dict(FORMAT)
    header: dict[str, Any] = {"__metadata__": metadata}
    at = 0
    for stored, digest in records:
        record, layout, name = stored.record, stored.layout, stored.id.hex()
        facts = Facts(
            namespace=record.namespace.hex(),
            key=record.key.hex(),
            context=record.context.hex(),
            context_after=record.context_after.hex(),
            tokens=np.frombuffer(record.tokens, "<i8").tolist(),
            start=record.start,
            origin=record.origin,
            tail=record.tail,
            shard=stored.shard,
            shards=stored.shards,
            codec=stored.codec,
            seq=stored.seq,
            created=stored.created,
            error=stored.error,
            label=stored.label,
            xxh3_128="0" * 32,
        )
        facts.xxh3_128 = _seal(facts, layout, stored.S, digest)
        metadata[name] = facts.model_dump_json()
        header[name] = {
            "dtype": _DTYPES[layout.dtype],
            "shape": [layout.L, stored.S, record.T, layout.G, layout.D],
            "data_offsets": [at, at + record.nbytes],
        }
        at += record.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    size = max(size, 8 + len(text) + -len(text) % 8)
    return (size - 8).to_bytes(8, "little") + text.ljust(size - 8)


def _seal(facts: Facts, layout: KVLayout, S: int, digest: bytes) -> str:
    """XXH3-128, in hex, of what the file says of a tensor and of the KV's own digest."""
    told = facts.model_dump(exclude={"xxh3_128"})
    text = json.dumps([told, layout.dtype, layout.L, S, layout.G, layout.D], sort_keys=True)
    return fmt.digest_of(digest + text.encode()).hex()


def items_of(path: Path) -> list[Item]:
    """What a file says of its tensors, in their order; their bytes are not read.

    Raises:
        ValueError: a file that is not whole, or that `header_of` did not write.
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        at = 8 + int.from_bytes(file.read(8), "little")
    try:
        with safe_open(path, "np") as tensors:
            metadata: dict[str, str] = tensors.metadata() or {}
            # In the order of their bytes, which follow each other without gaps.
            slices = [(name, tensors.get_slice(name)) for name in tensors.offset_keys()]
            described = [(name, s.get_dtype(), s.get_shape()) for name, s in slices]
    except SafetensorError as e:
        raise ValueError(f"got {path}, no safetensors file, or not all of one: {e!s:.200}") from e
    marks = {name: metadata.pop(name, None) for name in FORMAT}
    if marks != FORMAT:
        raise ValueError(f"got a file of {marks}, want {FORMAT}, as `lmc store export` writes it")
    if metadata.keys() != {name for name, *_ in described}:
        some = sorted(metadata.keys() ^ {name for name, *_ in described})[0]
        raise ValueError(f"got {some[:80]!r} among either the tensors or the metadata, want both")
    items = []
    for name, dtype, shape in described:
        try:
            items.append(_item(name, dtype, shape, metadata[name], at))
        except ValidationError as e:
            raise ValueError(f"tensor {name[:80]!r}: {one_line(e):.200}") from e
        except ValueError as e:
            raise ValueError(f"tensor {name[:80]!r}: {e}") from e
        at += items[-1].record.nbytes
    return items


def _item(name: str, dtype: str, shape: list[int], text: str, at: int) -> Item:
    facts = Facts.model_validate_json(text)
    if dtype not in _DTYPES.values() or len(shape) != 5 or 0 in shape:
        raise ValueError(
            f"got {dtype} {shape}, want [L, S, T, G, D] of {', '.join(_DTYPES.values())}"
        )
    L, S, T, G, D = shape
    most = (fmt.MOST_LAYERS, 2, fmt.MOST_TOKENS, fmt.MOST_HEADS, fmt.MOST_DIM)
    if any(n > m for n, m in zip(shape, most, strict=True)):
        raise ValueError(f"got shape {shape}, allowed: at most {list(most)}")
    if len(facts.tokens) != T:
        raise ValueError(f"got {len(facts.tokens)} token ids for shape {shape}")
    if facts.shard >= facts.shards:
        raise ValueError(f"got shard {facts.shard} of {facts.shards}")
    if len(facts.label.encode()) > 255:
        raise ValueError("got a label of more than 255 bytes")
    layout = KVLayout(L, G, D, next(k for k, v in _DTYPES.items() if v == dtype))
    nbytes = layout.bytes_per_token * T * S // 2
    record = Record(
        slot=-1,
        namespace=bytes.fromhex(facts.namespace),
        key=bytes.fromhex(facts.key),
        tokens=np.array(facts.tokens, "<i8").tobytes(),
        start=facts.start,
        context=bytes.fromhex(facts.context),
        context_after=bytes.fromhex(facts.context_after),
        origin=facts.origin,
        nbytes=nbytes,
        tail=facts.tail,
    )
    if fmt.shard_id(record, facts.shard, facts.shards).hex() != name:
        raise ValueError("the name is not the id of what the metadata say")
    return Item(facts, record, layout, S, at)
