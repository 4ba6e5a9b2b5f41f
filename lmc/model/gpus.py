"""Times to first token by arithmetic: what data sheets of GPUs allow, at a share of their peaks.

Nothing here was measured by us. It says what orders of magnitude to expect before there is a
machine to run `lmc fit` on.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from pathlib import Path

from lmc.model.shape import BYTES, KNOWN, ModelShape
from lmc.model.times import TierSpeed, TTFTModel, load


@dataclass(frozen=True)
class GPU:
    """flops: dense bf16 FLOP/s; hbm: bytes/s; bus: bytes/s from host memory, of PCIe x16, 6/7 of
    what the data sheet has for one direction."""

    flops: float
    hbm: float
    bus: float


# NVIDIA's and AMD's data sheets: A100 80GB SXM, L40S, H100 SXM, H200 SXM, HGX B200, MI300X.
GPUS = {
    "a100": GPU(312e12, 2.04e12, 27e9),
    "l40s": GPU(362e12, 0.864e12, 27e9),
    "h100": GPU(989e12, 3.35e12, 55e9),
    "h200": GPU(989e12, 4.8e12, 55e9),
    "b200": GPU(2250e12, 8.0e12, 55e9),
    "mi300x": GPU(1307e12, 5.3e12, 55e9),
}
# Shares of the peak. Attention: FlashAttention-2 on an H100 (arXiv 2407.08608, section 1); the
# others are assumed.
LINEAR, ATTENTION, MEMORY = 0.6, 0.35, 0.8
STEP_S = 0.005  # of an engine before its first kernel runs; assumed
DISK = TierSpeed("disk", 1e-3, 7e9)  # an NVMe drive of PCIe 4 x4, by its data sheet
REMOTE = TierSpeed("remote", 1e-3, 22e9)  # a network of 200 Gbit/s, 7/8 of it
NAME = re.compile(r"(?:([1-9][0-9]?)x)?([a-z0-9]+)")


def gpu_times(gpu: str, shape: ModelShape, dtype: str | None = None, model: str = "") -> TTFTModel:
    """A time model of `h100`, or of `8xh100`, which work on every layer together.

    FLOPs of rows and pairs over the peak, times the share of it that is reached; a forward reads
    every active weight once; tiers are host memory, a disk and a network. What GPUs tell each
    other takes no time here, nor do answers, which engines decode in batches beside; it is not
    asked whether the model fits.

    Args:
        gpu: of `GPUS`, behind how many and an x.
        shape, dtype: of the model, and of its KV.
        model: its name, to be told with the times.

    Raises:
        ValueError: another GPU, naming those that are known.
    """
    match = NAME.fullmatch(gpu.strip().lower())
    if match is None or match[2] not in GPUS:
        raise ValueError(f"GPU: got {gpu!r}, want one of {', '.join(GPUS)}, or such as 8xh100")
    n, one = int(match[1] or 1), GPUS[match[2]]
    weights = shape.cost.linear / 2 * BYTES.get(shape.dtype, 2)
    forward = STEP_S + weights / (n * one.hbm * MEMORY)
    return TTFTModel(
        fixed_s=forward,
        per_row_s=shape.cost.linear / (n * one.flops * LINEAR),
        per_pair_s=shape.cost.attention / (n * one.flops * ATTENTION),
        blend_s=forward,
        bytes_per_token=shape.bytes_per_token(dtype),
        tiers=(TierSpeed("host", 1e-4, n * one.bus), DISK, REMOTE),
        model=model,
        provenance={
            "kind": "arithmetic, not measured",
            "gpus": n,
            "gpu": match[2],
            **asdict(one),
            "shares_of_peak": {"linear": LINEAR, "attention": ATTENTION, "memory": MEMORY},
        },
    )


def times_for(said: str, shape: ModelShape, dtype: str | None, model: str) -> TTFTModel:
    """The time model of a file, or of a GPU's name, for a model.

    Raises:
        ValueError: neither, or a file of another known model, or of one whose KV has another size,
            by its model or its dtype.
    """
    if not Path(said).exists() and "." not in Path(said).name:
        try:
            return gpu_times(said, shape, dtype, model)
        except ValueError as error:
            raise ValueError(f"times: got {said!r}, which is no file; {error}") from None
    times, wanted = load(Path(said)), shape.bytes_per_token(dtype)
    if {times.model, model} <= KNOWN.keys() and times.model != model:
        raise ValueError(
            f"times: {said} is of {times.model}, got the model {model}: want the model that was "
            "timed, or a GPU's name"
        )
    if times.bytes_per_token != wanted:
        raise ValueError(
            f"times: {said} is of {times.model or 'a model'} with {times.bytes_per_token:,.0f} "
            f"bytes of KV a token, but {model} in {dtype or shape.dtype} has {wanted:,}: want the "
            "model and dtype that were timed, or a GPU's name"
        )
    return times
