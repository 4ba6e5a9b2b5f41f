"""Lines of every trace format, files of them, and a reading of such a file."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import zstandard

from lmc.sim.readers import Reading, read

PACK: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".xz": lzma.compress,
    ".bz2": partial(bz2.compress, compresslevel=1),  # its smallest block, 100 kB
    ".zst": zstandard.ZstdCompressor().compress,
}

MAGICS = (b"\x1f\x8b", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd", b"BZh")


def mooncake(ms: int, tokens: int = 600, ids: Any = (1, 2), **changes: Any) -> str:
    fields = {"timestamp": ms, "input_length": tokens, "output_length": 5, "hash_ids": list(ids)}
    return json.dumps(fields | changes)


def bailian(chat: int, parent: int, at: float = 1.5) -> str:
    fields = {"chat_id": chat, "parent_chat_id": parent, "timestamp": at, "input_length": 20}
    return json.dumps(
        fields | {"output_length": 5, "type": "text", "turn": 1, "hash_ids": [1, chat]}
    )


def weka(name: str, t: float = 1.0, **changes: Any) -> str:
    requests = [{"t": t, "type": "s", "in": 130, "out": 3, "hash_ids": [1, 2, 3], "api_time": 0.5}]
    return json.dumps({"id": name, "block_size": 64, "requests": requests} | changes)


def chat(at: float, *said: Any) -> str:
    messages = [{"role": "user", "content": text} for text in said or ("hi",)]
    return json.dumps({"session": "s", "timestamp": at, "messages": messages})


def tokens(at: float, ids: Any = (7, 8, 9), **changes: Any) -> str:
    fields = {"session": "s", "timestamp": at, "output_length": 4, "tokens": list(ids)}
    return json.dumps(fields | {"segments": [["a", 0, 2], ["b", 2, 3]]} | changes)


def recorded(at: float, chunks: Any = (("ab" * 12, 5), ("cd" * 12, 3)), **changes: Any) -> str:
    fields = {"lmc_trace": 1, "time": at, "request": "r", "prompt_tokens": 8, "output_tokens": 2}
    fields |= {"kinds": {"new": 8}, "compute_fraction": 1.0, "seconds": {"plan": 0.001}}
    fields |= {"map": [[0, 8, "new", None, "never_seen"]], "chunks": [list(c) for c in chunks]}
    return json.dumps(fields | changes)


AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens"
BURSTGPT = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens"
# Of each format, the header if it has one, and lines whose times are 0, 1, 2 and 3 seconds.
LINES = {
    "azure": (AZURE, [f"1970-01-01 00:00:0{i}.0000000,374,44" for i in range(4)]),
    "bailian": ("", [bailian(i + 1, i or -1, i) for i in range(4)]),
    "burstgpt": (BURSTGPT, [f"{i},{i % 2},3.5,GPT-4,417,276,693" for i in range(4)]),
    "chat": ("", [chat(i) for i in range(4)]),
    "lmc": ("", [recorded(i) for i in range(4)]),
    "mooncake": ("", [mooncake(1000 * i) for i in range(4)]),
    "tokens": ("", [tokens(i) for i in range(4)]),
    "weka": ("", [weka(f"s{i}", i) for i in range(4)]),
}


def file_of(name: str) -> bytes:
    header, lines = LINES[name]
    return "".join(f"{line}\n" for line in ([header] if header else []) + lines).encode()


def opened(folder: Path, content: str | bytes, name: str = "t.jsonl", **options: Any) -> Reading:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read(path, options.pop("format", "auto"), **options)


def times(requests: Any) -> list[float]:
    return [r.timestamp for r in requests]


SHAREGPT = json.dumps(
    [
        {
            "id": f"c{i}",
            "conversations": [
                {"from": "human", "value": "hi"},
                {"from": "gpt", "value": "you"},
                {"from": "human", "value": "more"},
                {"from": "gpt", "value": "no"},
            ],
        }
        for i in range(2)
    ]
)
