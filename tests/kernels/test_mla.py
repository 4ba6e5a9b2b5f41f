"""MLA's latents through gather and scatter; rotations under every scaling; scatter without a copy.

In an ordinary run launchers work on the torch references; the last test runs this file once more
on the Triton kernels, in a process that interprets them.
"""

import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3RotaryEmbedding,
    apply_rotary_pos_emb_interleave,
)

from lmc.kernels.cases import Case, make_chunk, make_paged, make_slots
from lmc.kernels.gather import LatentCase, gather, make_latents
from lmc.kernels.paged import PagedLatents
from lmc.kernels.rerotate import rerotate
from lmc.kernels.scatter import SPEC, scatter
from lmc.kernels.spec import interpreted, verify
from lmc.model.rope import Rope, rotations_of

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LATENT, ROPE = 512, 64
SCALINGS = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    },
    "yarn": {"factor": 8.0, "original_max_position_embeddings": 512, "mscale": 1.0},
}
properties = settings(max_examples=25, deadline=None, derandomize=True)


def rows_of(pages: list[Tensor], slots: Tensor) -> Tensor:
    """[L, T, D], one row at a time."""
    P = pages[0].shape[1]
    return torch.stack([torch.stack([x[s // P, s % P] for s in slots.tolist()]) for x in pages])


def embedding(kind: str) -> tuple[DeepseekV3RotaryEmbedding, Rope]:
    """What the model computes keys with, and what we move them with."""
    config = DeepseekV3Config(
        hidden_size=64,
        num_attention_heads=2,
        qk_rope_head_dim=ROPE,
        kv_lora_rank=LATENT,
        max_position_embeddings=4096,
        rope_parameters={"rope_type": kind, "rope_theta": 1e4, **SCALINGS[kind]},
    )
    return DeepseekV3RotaryEmbedding(config), rotations_of(config).ropes[0]


def latents_at(model: DeepseekV3RotaryEmbedding, raw: Tensor, position: int) -> Tensor:
    """Rows [L, 1, T, 1, D] of raw ones as the model would cache them from `position` on."""
    raw = raw[..., 0, :]
    cos, sin = model(raw, position + torch.arange(raw.shape[2])[None])
    turned = apply_rotary_pos_emb_interleave(raw[..., LATENT:], raw[..., LATENT:], cos, sin)[1]
    return torch.cat((raw[..., :LATENT], turned), -1).unsqueeze(3)


def angles(rope: Rope, delta: int, factor: float = 1.0) -> dict[str, Tensor]:
    cos, sin = rope.angles(delta)
    return {"cos": torch.from_numpy(cos) * factor, "sin": torch.from_numpy(sin) * factor}


def move(rows: Tensor, **turn: Tensor) -> Tensor:
    """Rows [L, 1, T, 1, D] scattered into pages and read back by hand."""
    case = LatentCase(T=rows.shape[2], P=4, slots="shuffled")
    pages = [torch.full((case.N, 4, case.D), torch.nan) for _ in rows]
    slots = make_slots(case, "cpu")
    scatter(rows, PagedLatents(pages), slots, **turn)
    return rows_of(pages, slots)[:, None, :, None]


@pytest.mark.parametrize("kind", SCALINGS)
@pytest.mark.parametrize("delta", [1, 257, 1500, -900])
def test_a_moved_latent_is_the_latent_of_its_new_position(kind, delta):
    model, rope = embedding(kind)
    start = 1000 if delta < 0 else 7
    raw = torch.randn(2, 1, 5, 1, LATENT + ROPE, generator=torch.Generator().manual_seed(0))
    moved = move(latents_at(model, raw, start), **angles(rope, delta))
    assert torch.equal(moved[..., :LATENT], raw[..., :LATENT])
    # The model's own angles are in fp32: off by 1e-4 at these positions.
    wanted = latents_at(model, raw, start + delta)
    torch.testing.assert_close(moved, wanted, atol=3e-4, rtol=0)


def test_the_magnitude_of_yarn_is_not_applied_twice():
    model, rope = embedding("yarn")
    magnitude = model.attention_scaling
    assert magnitude == pytest.approx(0.1 * np.log(8) + 1)
    raw = torch.randn(1, 1, 9, 1, LATENT + ROPE, generator=torch.Generator().manual_seed(1))
    stored = latents_at(model, raw, 300)

    def growth(factor: float) -> float:
        moved = move(stored, **angles(rope, 411, factor))
        return float(moved[..., LATENT:].norm() / raw[..., LATENT:].norm())

    assert growth(1.0) == pytest.approx(magnitude, rel=1e-5)
    # What the model's own tables of cosines and sines would do.
    assert growth(magnitude) == pytest.approx(magnitude**2, rel=1e-5)


@pytest.mark.parametrize("kind", SCALINGS)
def test_angles_are_as_good_as_fp32_can_hold(kind):
    _, rope = embedding(kind)
    delta = 131_072 - 1
    cos, sin = rope.angles(delta)
    exact = rope.inv_freq * np.float64(delta)
    assert np.abs(cos - np.cos(exact)).max() <= 2**-24
    assert np.abs(sin - np.sin(exact)).max() <= 2**-24
    in_fp32 = np.cos(rope.inv_freq.astype(np.float32) * np.float32(delta))
    assert np.abs(in_fp32 - np.cos(exact)).max() > 1000 * 2**-24


@properties
@given(
    T=st.integers(0, 21), D=st.sampled_from([576, 288, 80]), P=st.sampled_from([1, 4, 16]),
    kind=st.sampled_from(["runs", "shuffled", "holes", "none"]), dtype=st.sampled_from(DTYPES),
    padded=st.booleans(),
)  # fmt: skip
def test_gather_gives_back_what_scatter_put(T, D, P, kind, dtype, padded):
    case = LatentCase(T=T, D=D, P=P, slots=kind)
    pages = [torch.full((case.N, P, D + 16 * padded), torch.nan).to(dtype)[..., :D] for _ in "12"]
    chunk, slots = make_chunk(case, dtype, "cpu")[:, :1], make_slots(case, "cpu")
    paged = PagedLatents(pages)
    scatter(chunk, paged, slots)
    kept = slots >= 0
    assert torch.equal(gather(paged, slots), torch.where(kept[:, None, None], chunk, 0))
    if kept.any():
        assert torch.equal(rows_of(pages, slots[kept])[:, None, :, None], chunk[:, :, kept])
    others = torch.ones(case.N * P, dtype=torch.bool)
    others[slots[kept]] = False
    assert rows_of(pages, others.nonzero().squeeze(1)).isnan().all()


@pytest.mark.parametrize("interleaved", [False, True], ids=["neox", "interleaved"])
def test_only_the_last_dims_of_a_row_turn(interleaved):
    """By a quarter, where (a, b) becomes (-b, a); three ragged chunks in one cache."""
    case = LatentCase(T=52, slots="shuffled", R=ROPE)
    paged, slots = make_latents(case, torch.float32, "cpu", poisoned=True), make_slots(case, "cpu")
    chunk = make_chunk(case, torch.float32, "cpu")[:, :1]
    turn = {"cos": torch.zeros(ROPE // 2), "sin": torch.ones(ROPE // 2)}
    for rows in (slice(0, 1), slice(1, 34), slice(34, 52)):
        scatter(chunk[:, :, rows], paged, slots[rows], **turn, interleaved=interleaved)
    pairs = chunk[..., LATENT:].unflatten(-1, (32, 2) if interleaved else (2, 32))
    a, b = pairs.unbind(-1 if interleaved else -2)
    turned = torch.stack((-b, a), -1 if interleaved else -2).flatten(-2)
    expected = torch.cat((chunk[..., :LATENT], turned), -1)
    assert torch.equal(gather(paged, slots), expected)


def test_verify_sees_the_wrong_dims_turned():
    def front(chunk, paged, slots, cos, sin, interleaved):
        R = 2 * len(cos)
        turned = rerotate(chunk[..., :R], cos, sin, interleaved=interleaved)
        scatter(torch.cat((turned, chunk[..., R:]), -1), paged, slots)

    case = LatentCase(T=9)
    verify(SPEC, case, torch.float32, "cpu")
    with pytest.raises(AssertionError, match="error"):
        verify(dataclasses.replace(SPEC, launch=front), case, torch.float32, "cpu")


ROWS, SLOTS = torch.ones(2, 1, 3, 1, 96), torch.tensor([1, -1, 4])
COS = torch.ones(16)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: PagedLatents([x.unsqueeze(2) for x in p]), r"\[N, P, D\] each, got pages\[0\]"),
        (lambda p: PagedLatents([]), "at least one layer"),
        (lambda p: scatter(ROWS[:, :, :, 0], PagedLatents(p), SLOTS), r"\[2, 1, 3, 1, 96\], got"),
        (lambda p: scatter(ROWS[:, :, :2], PagedLatents(p), SLOTS), r"\[2, 1, 3, 1, 96\], got"),
        (lambda p: scatter(ROWS.half(), PagedLatents(p), SLOTS), "float32 .*got float16"),
        (lambda p: scatter(ROWS, PagedLatents(p), SLOTS, COS, COS[:9]), "got 16 and 9"),
        (lambda p: scatter(ROWS, PagedLatents(p), SLOTS, COS.repeat(4), COS), "R <= D=96"),
        (lambda p: scatter(ROWS, PagedLatents(p), SLOTS + 99), r"got 98\.\.103"),
        (lambda p: gather(PagedLatents(p), SLOTS, ROWS[:, :, :, 0]), r"\[2, 1, 3, 1, 96\] .*got"),
    ],
)  # fmt: skip
def test_bad_input_raises_before_anything_is_written(call, message):
    pages = [torch.zeros(4, 8, 96) for _ in "12"]
    with pytest.raises(ValueError, match=message):
        call(pages)
    assert not torch.stack(pages).any()
    assert (ROWS == 1).all()


CASE = Case(T=21, G=2, D=64, slots="holes")


@pytest.mark.skipif(interpreted(), reason="the interpreter reads host memory, pinned or not")
def test_zero_copy_wants_pinned_memory_and_a_gpu():
    paged = make_paged(CASE, torch.float32, "cpu", poisoned=True)
    chunk, slots = make_chunk(CASE, torch.float32, "cpu"), make_slots(CASE, "cpu")
    wanted = (
        r"zero_copy needs the chunk in pinned memory and pages on a CUDA device, got float32 .*cpu"
    )
    with pytest.raises(ValueError, match=wanted):
        scatter(chunk, paged, slots, zero_copy=True)
    assert torch.stack(paged.k).isnan().all()


@pytest.mark.skipif(not interpreted(), reason="there is no kernel to read the chunk")
def test_zero_copy_gives_the_kernel_the_chunk_itself():
    chunk, slots = make_chunk(CASE, torch.float32, "cpu"), make_slots(CASE, "cpu")
    staged, direct = (make_paged(CASE, torch.float32, "cpu", poisoned=True) for _ in range(2))
    scatter(chunk, staged, slots)
    # Were the chunk staged, this would fail: nothing else about it is converted.
    pinned = chunk.as_subclass(Pinned)
    with pytest.raises(RuntimeError, match="staged"):
        scatter(pinned, direct, slots)
    scatter(pinned, direct, slots, zero_copy=True)
    for x, y in zip((*staged.k, *staged.v), (*direct.k, *direct.v), strict=True):
        assert torch.equal(x.nan_to_num(7), y.nan_to_num(7))


class Pinned(Tensor):
    """A tensor that must not be copied."""

    def to(self, *args: object, **kwargs: object) -> Tensor:
        raise RuntimeError("staged")


@pytest.mark.skipif(interpreted(), reason="this process is interpreting already")
@pytest.mark.heavy
@pytest.mark.alone
def test_the_kernels_do_the_same():
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    if run.returncode or ", 2 skipped" not in run.stdout:
        pytest.fail(f"TRITON_INTERPRET=1 pytest:\n{run.stdout}{run.stderr}", pytrace=False)
