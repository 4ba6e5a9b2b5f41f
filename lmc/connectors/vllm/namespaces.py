"""What stored KV must be compatible with, and how that changes while an engine runs."""

from __future__ import annotations

import os
from typing import Any

from blake3 import blake3

from lmc.connectors.vllm import identity
from lmc.connectors.vllm.messages import WeightsTold
from lmc.model.rope import Rotations

LONGEST = 64  # bytes of a salt that is taken as it is
REMEMBERED = 4096  # LoRA adapters


class Adapters:
    """LoRA adapters that workers have loaded, as they told: no file is opened for a request."""

    def __init__(self) -> None:
        self._known: dict[int, bytes | str] = {}  # digest, or why there is none

    def heard(self, told: dict[int, bytes | str]) -> set[int]:
        """Take in what workers say; those that were known and are others now."""
        changed = {lora for lora, x in told.items() if self._known.get(lora, x) != x}
        for lora in told:
            self._known.pop(lora, None)
        self._known |= told
        for lora in list(self._known)[:-REMEMBERED]:
            del self._known[lora]
        return changed

    def refusal(self, lora: Any) -> str | None:
        """Why KV under a request's adapter is neither stored nor reused, or None."""
        known = None if lora is None else self._known.get(lora.lora_int_id, "no worker has it yet")
        return f"lora_without_digest:{known}" if isinstance(known, str) else None

    def digest(self, lora: Any) -> bytes | None:
        """Of a request's adapter; None where there is none."""
        known = self._known.get(lora.lora_int_id)
        return known if isinstance(known, bytes) else None

    @property
    def digests(self) -> dict[int, bytes]:
        """Of all that are known."""
        return {lora: x for lora, x in self._known.items() if isinstance(x, bytes)}


class Namespace:
    """The model's namespace, and the epoch of its weights.

    While a worker's weights are those of the model's files there is no epoch. Of weights that an
    operator named, it is the name; of others, fresh random bits: never a counter, since two engines
    may have come to different weights by as many updates.

    Attributes:
        adapters: LoRA adapters, each with KV of its own.
        known: by rank, how many changes of its weights are taken into account.
    """

    def __init__(self, vllm_config: Any, kv_cache_config: Any, rope: Rotations | str) -> None:
        self._of = (vllm_config, kv_cache_config, rope)
        self._files = identity.namespace_of(*self._of)
        self._epoch = b""
        self.adapters = Adapters()
        self.known: dict[int, int] = {}

    def of(self, salt: str | None, lora: Any = None, handed: str | None = None) -> bytes:
        """Of the requests of one tenant, under one LoRA adapter or none.

        Args:
            handed: the name under which the KV of one prompt goes from one engine to another: what
                is exact there is what it was, which may be blended.
        """
        namespace = blake3(self._files + self._epoch).digest() if self._epoch else self._files
        if lora is not None:
            # Of one that is not known any more nothing is found.
            adapter = self.adapters.digest(lora) or os.urandom(32)
            namespace = blake3(namespace + b"lora" + adapter).digest()
        tenant = (salt or "").encode("utf-8", "surrogatepass")
        if handed is not None:  # longer than any other
            return namespace + blake3(handed.encode() + b"\0" + tenant).digest(length=LONGEST + 1)
        # It goes into the key of each chunk, and a client may send any.
        return namespace + (tenant if len(tenant) <= LONGEST else blake3(tenant).digest())

    def heard(self, told: dict[int, WeightsTold]) -> int | None:
        """Take in what workers say of their weights; the step in which news of them was noticed."""
        news = {rank: t for rank, t in told.items() if self.known.get(rank, 0) != t.changes}
        if not news:
            return None
        self.known |= {rank: t.changes for rank, t in news.items()}
        versions = {t.version for t in news.values()}
        version = versions.pop() if len(versions) == 1 else None
        if version is None:
            self._epoch = os.urandom(16)
        elif version:
            self._epoch = b"named " + version.encode()
        else:
            # Read from the files again, which may be others than before.
            self._files = identity.namespace_of(*self._of)
            self._epoch = b""
        return min(t.step for t in news.values())

    def forget(self) -> None:
        """Never find again what is stored."""
        self._epoch = os.urandom(16)
