"""Kernels against references, and both against formulas written down here once more.

In an ordinary run launchers work on the torch references, the production path of CPU machines.
With TRITON_INTERPRET=1 the same tests work on the Triton kernels; test_interpreter.py does that.
"""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lmc.kernels import gather as gather_module
from lmc.kernels import scatter_runs as scatter_runs_module
from lmc.kernels.cases import Case, make_chunk, make_paged, make_slots
from lmc.kernels.gather import gather
from lmc.kernels.rerotate import rerotate
from lmc.kernels.scatter import scatter
from lmc.kernels.scatter_runs import RunsCase, scatter_runs
from lmc.kernels.spec import KERNELS, interpreted, load, verify

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SPECS = load()
LAYOUTS = ("nhd", "hnd", "joint", "cpu")
needs_interpreter = pytest.mark.skipif(
    not interpreted(), reason="test_interpreter.py runs it under TRITON_INTERPRET=1"
)
properties = settings(max_examples=30, deadline=None, derandomize=True)


def angles(delta: int, R: int) -> tuple[Tensor, Tensor]:
    angle = delta * 1e5 ** (-torch.arange(0, R, 2, dtype=torch.float64) / R)
    return angle.cos().float(), angle.sin().float()


def rope(raw: Tensor, position: Tensor, R: int, interleaved: bool) -> Tensor:
    """RoPE of raw [L, T, G, D] at position [T], as complex numbers in float64."""
    pairs = raw[..., :R].double().unflatten(-1, (R // 2, 2) if interleaved else (2, R // 2))
    a, b = pairs.unbind(-1 if interleaved else -2)
    angle = position[:, None].double() * 1e5 ** (-torch.arange(0, R, 2).double() / R)
    turned = torch.complex(a, b) * torch.polar(torch.ones_like(angle), angle)[:, None]
    halves = torch.stack((turned.real, turned.imag), -1 if interleaved else -2)
    return torch.cat((halves.flatten(-2), raw[..., R:].double()), -1)


def rows_of(layers: tuple[Tensor, ...], slots: Tensor) -> Tensor:
    """[L, T, G, D], one row at a time."""
    P = layers[0].shape[1]
    rows = [torch.stack([x[s // P, s % P] for s in slots.tolist()]) for x in layers]
    return torch.stack(rows)


@needs_interpreter
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize(
    ("spec", "case"),
    [pytest.param(s, c, id=f"{s.name}-{c}") for s in SPECS for c in s.cases],
)
def test_kernel_matches_reference(spec, case, dtype):
    verify(spec, case, dtype, "cpu")


def test_every_kernel_is_listed():
    assert tuple(spec.name for spec in SPECS) == KERNELS


def test_verify_sees_a_wrong_row_and_a_wrong_rotation():
    scatter_spec = SPECS[KERNELS.index("scatter")]
    case = Case(T=9, G=1, D=64)

    def turned_back(chunk, paged, slots, cos, sin, interleaved):
        scatter(chunk, paged, slots, cos, -sin, interleaved=interleaved)

    def one_row_short(chunk, paged, slots, cos, sin, interleaved):
        scatter(chunk[:, :, 1:], paged, slots[1:], cos, sin, interleaved=interleaved)

    for launch, message in ((turned_back, "error"), (one_row_short, "a row missed")):
        with pytest.raises(AssertionError, match=message):
            verify(dataclasses.replace(scatter_spec, launch=launch), case, torch.float32, "cpu")


@pytest.mark.parametrize("interleaved", [False, True], ids=["neox", "interleaved"])
@pytest.mark.parametrize(("D", "R"), [(64, 64), (80, 32), (96, 96), (128, 64), (256, 256)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scatter_moves_keys_from_one_position_to_another(layout, D, R, interleaved):
    case = Case(T=11, G=2, D=D, P=4, layout=layout, slots="holes")
    delta = -1234
    chunk = make_chunk(case, torch.float32, "cpu")
    raw, position = chunk[:, 0].clone(), torch.arange(case.T) + 2000
    chunk[:, 0] = rope(raw, position, R, interleaved)
    paged = make_paged(case, torch.float32, "cpu", poisoned=True)
    slots = make_slots(case, "cpu")
    scatter(chunk, paged, slots, *angles(delta, R), interleaved=interleaved)

    kept = slots >= 0
    expected = rope(raw, position + delta, R, interleaved)[:, kept]
    torch.testing.assert_close(rows_of(paged.k, slots[kept]).double(), expected, rtol=0, atol=2e-6)
    assert torch.equal(rows_of(paged.v, slots[kept]), chunk[:, 1][:, kept])
    others = torch.ones(case.N * case.P, dtype=torch.bool)
    others[slots[kept]] = False
    untouched = others.nonzero().squeeze(1)
    for layers in (paged.k, paged.v):
        assert rows_of(layers, untouched).isnan().all()


@properties
@given(
    T=st.integers(0, 33), G=st.integers(1, 3), P=st.sampled_from([1, 4, 16]),
    layout=st.sampled_from(LAYOUTS), kind=st.sampled_from(["runs", "shuffled", "holes", "none"]),
    dtype=st.sampled_from(DTYPES),
)  # fmt: skip
def test_gather_gives_back_what_scatter_put(T, G, P, layout, kind, dtype):
    case = Case(T=T, G=G, D=16, P=P, layout=layout, slots=kind)
    chunk = make_chunk(case, dtype, "cpu")
    paged = make_paged(case, dtype, "cpu", poisoned=True)
    slots = make_slots(case, "cpu")
    scatter(chunk, paged, slots)
    expected = torch.where((slots >= 0)[:, None, None], chunk, 0)
    assert torch.equal(gather(paged, slots), expected)


@properties
@given(
    a=st.integers(-100_000, 100_000), b=st.integers(-100_000, 100_000),
    shape=st.sampled_from([(64, 64), (80, 32), (96, 96)]), interleaved=st.booleans(),
)  # fmt: skip
def test_rotations_add_up_and_undo_each_other(a, b, shape, interleaved):
    D, R = shape
    k = torch.randn(5, 2, D, generator=torch.Generator().manual_seed(0))

    def turn(x: Tensor, delta: int) -> Tensor:
        return rerotate(x, *angles(delta, R), interleaved=interleaved)

    torch.testing.assert_close(turn(turn(k, a), -a), k, rtol=0, atol=2e-6)
    torch.testing.assert_close(turn(k, a + b), turn(turn(k, a), b), rtol=0, atol=2e-6)
    assert torch.equal(turn(k, 0), k)


@pytest.mark.parametrize("interleaved", [False, True], ids=["neox", "interleaved"])
@pytest.mark.parametrize("shape", [(64,), (3, 64), (5, 2, 64), (2, 3, 2, 5, 64)], ids=str)
def test_rerotate_takes_any_axes_in_place_and_strided(shape, interleaved):
    k = torch.randn(*shape, 2, generator=torch.Generator().manual_seed(0))[..., 0]
    cos, sin = angles(77, 48)
    before = k.clone()
    expected = rerotate(before, cos, sin, interleaved=interleaved)
    assert torch.equal(before, k)
    assert rerotate(k, cos, sin, interleaved=interleaved, out=k) is k
    assert torch.equal(k, expected)
    assert not torch.equal(k, before)


def test_half_precision_is_rounded_once():
    k = make_chunk(Case(T=50, G=2, D=64), torch.float16, "cpu")[:, 0]
    cos, sin = angles(4321, 64)
    rounded = rerotate(k.float(), cos, sin).half()
    off = (rerotate(k, cos, sin) != rounded).float().mean()
    assert off < 1e-3  # only where fused multiply-add tips a tie


def test_gather_leaves_rows_without_a_slot_untouched():
    case = Case(T=9, G=1, D=64, slots="holes")
    slots = make_slots(case, "cpu")
    out = torch.full((2, 2, 9, 1, 64), 7.0)
    assert gather(make_paged(case, torch.float32, "cpu", poisoned=False), slots, out) is out
    assert (out[:, :, slots < 0] == 7).all()
    assert (out[:, :, slots >= 0] != 7).all()


def test_chunks_may_be_slices_of_longer_ones():
    case = Case(T=20, G=2, D=64, layout="cpu")
    long, slots = make_chunk(case, torch.float32, "cpu"), make_slots(case, "cpu")
    paged = make_paged(case, torch.float32, "cpu", poisoned=True)
    scatter(long[:, :, 3:17], paged, slots[3:17])
    out = torch.full_like(long, 7)
    gather(paged, slots[5:9], out[:, :, 5:9])
    assert torch.equal(out[:, :, 5:9], long[:, :, 5:9])
    assert (out[:, :, :5] == 7).all()
    assert (out[:, :, 9:] == 7).all()


@needs_interpreter
def test_kernels_leave_slots_out_of_range_alone(monkeypatch):
    """On a GPU nobody checks them first."""
    monkeypatch.setattr(gather_module, "check_slots", lambda slots, paged: None)
    paged = make_paged(Case(T=2, G=1, D=64), torch.float32, "cpu", poisoned=False)
    slots = torch.tensor([1 << 40, -7, paged.N * paged.P, 0])
    out = gather(paged, slots, torch.full((2, 2, 4, 1, 64), 7.0))
    assert (out[:, :, :3] == 7).all()
    assert torch.equal(out[:, 0, 3], torch.stack([k[0, 0] for k in paged.k]))


@needs_interpreter
def test_kernels_leave_runs_out_of_range_alone(monkeypatch):
    monkeypatch.setattr(scatter_runs_module, "_check_runs", lambda *_: None)
    inputs = scatter_runs_module.make_inputs(RunsCase(T=10, G=1, D=64), torch.float32, "cpu")
    first, T, base, stride = inputs["runs"][0, :4].tolist()
    U = len(inputs["buffer"])
    inputs["runs"] = torch.tensor([
        (-1, T, base, stride, 0), (first + 10, T, base, stride, 0), (first, T, base, stride, 2),
        (first, T, -9 * stride, stride, 0), (first, T, U, stride, 0), (first, 1 << 40, 0, 0, 0),
    ])  # fmt: skip
    scatter_runs(**inputs)
    assert all(x.isnan().all() for x in (*inputs["paged"].k, *inputs["paged"].v))
