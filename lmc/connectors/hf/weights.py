"""Which weights a Hugging Face model in memory has: those of its files, or others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import xxhash
from blake3 import blake3

from lmc.model.weights import folder_of, weights_digest

# What a config says that no KV depends on. `dtype` is the files'; that of the KV is named apart.
HARMLESS = {
    "_name_or_path",
    "bos_token_id",
    "dtype",
    "eos_token_id",
    "pad_token_id",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


def identity_of(model: Any) -> tuple[str, bytes]:
    """The config, as JSON, and the digest, 32 bytes, of the weights of a model.

    Those of the files it was loaded from, as an engine has them, if the model in memory is the one
    in them: every weight the same, in one dtype, and a config that differs in nothing KV depends
    on. Of a model that was trained, edited or quantised since, of what is in memory. What cannot
    be seen so is code: a module that was replaced or hooked by the caller.

    Raises:
        ValueError: weights that are not in memory (on the meta device).
    """
    if any(weight.is_meta for weight in model.state_dict().values()):
        raise ValueError(
            f"{type(model).__name__}: got weights on the meta device, want them loaded"
        )
    config = model.config.get_text_config().to_json_string()
    folder = _folder(getattr(model.config, "_name_or_path", ""))
    if folder is not None and _equals_files(model, folder):
        from transformers import AutoConfig

        told = AutoConfig.from_pretrained(folder).get_text_config().to_json_string()
        if _relevant(told) == _relevant(config):
            return told, weights_digest(folder)
    return config, _digest_in_memory(model)


def _relevant(config: str) -> dict[str, Any]:
    return {key: value for key, value in json.loads(config).items() if key not in HARMLESS}


def _folder(name: str) -> Path | None:
    """Where a model was loaded from: a folder, or the cache of a hub; None where neither is."""
    try:
        return folder_of(name) if name else None
    except (OSError, ValueError):
        return None


def _digest_in_memory(model: Any) -> bytes:
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

    files = sorted(folder.glob("*.safetensors"))
    held = dict(model.state_dict())
    if any(w.is_floating_point() and w.dtype != model.dtype for w in held.values()):
        return False  # an engine runs all of them in one
    same: set[tuple[Any, ...]] = set()  # where the weights lie that were compared
    for file in files:
        try:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 it is no mapping
                    weight = held.pop(name, None)
                    if weight is None:
                        continue  # a buffer that is computed, or another format's name
                    told = tensors.get_tensor(name).to(weight.dtype)
                    if told.shape != weight.shape or not _same_bytes(told, weight.detach().cpu()):
                        return False
                    same.add(_place(weight))
        except (SafetensorError, OSError):
            return False
    # A tied weight, such as that of a head, is in memory twice and in the files once.
    return bool(same) and all(_place(weight) in same for weight in held.values())


def _place(weight: torch.Tensor) -> tuple[Any, ...]:
    return weight.data_ptr(), weight.shape, weight.stride()


def _same_bytes(one: torch.Tensor, other: torch.Tensor) -> bool:
    # Bytes: NaN equals itself, and 0 is not -0.
    return torch.equal(
        one.contiguous().flatten().view(torch.uint8),
        other.contiguous().flatten().view(torch.uint8),
    )
