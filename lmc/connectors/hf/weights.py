"""Which weights a Hugging Face model in memory has: those of its files, or others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import xxhash
from blake3 import blake3

from lmc.model.weights import weights_digest


def weights_of(model: Any) -> bytes:
    """Digest, 32 bytes, of a model's weights.

    That of the files it was loaded from, as an engine has it, if every weight in memory is the one
    in them; of a model that was trained, edited or quantised since, of what is in memory.
    """
    folder = Path(getattr(model.config, "_name_or_path", "") or "/nonexistent")
    if _equals_files(model, folder):
        return weights_digest(folder)
    digest = blake3(b"in memory")
    for name, weight in model.state_dict().items():
        # XXH3 keeps up with memory; 128 bits of it a tensor go into the digest.
        data = weight.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        shape = f"{name}:{weight.dtype}:{list(weight.shape)}:"
        digest.update(shape.encode() + xxhash.xxh3_128_digest(data))
    return digest.digest()


def _equals_files(model: Any, folder: Path) -> bool:
    """Whether safetensors files hold, under its names, all that the model has in memory."""
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    held = dict(model.state_dict())
    same: set[int] = set()  # where the weights lie that were compared
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 it is no mapping
                    weight = held.pop(name, None)
                    if weight is None:
                        return False
                    told = tensors.get_tensor(name).to(weight.dtype)
                    if told.shape != weight.shape or not _same_bytes(told, weight.detach().cpu()):
                        return False
                    same.add(weight.data_ptr())
        except (SafetensorError, OSError):
            return False
    # A tied weight, such as that of a head, is in memory twice and in the files once.
    return bool(same) and all(weight.data_ptr() in same for weight in held.values())


def _same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    # Bytes: NaN equals itself, and 0 is not -0.
    return torch.equal(
        one.contiguous().flatten().view(torch.uint8),
        other.contiguous().flatten().view(torch.uint8),
    )
