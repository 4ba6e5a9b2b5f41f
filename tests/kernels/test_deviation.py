"""Deviation scores against the formulas, and what every norm must hold.

test_reference.py runs SPEC's cases. Here too an ordinary run works on the torch reference, and the
last test runs this file once more, interpreting.
"""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lmc.kernels import deviation as module
from lmc.kernels.aot import DTYPES as AOT_DTYPES
from lmc.kernels.aot import TARGETS, compile_variant
from lmc.kernels.cases import make_chunk, make_paged, make_slots
from lmc.kernels.deviation import NORMS, SPEC, DeviationCase, deviation
from lmc.kernels.paged import PagedKV
from lmc.kernels.spec import interpreted, verify
from tests.kernels.interpreting import interpret

LAYOUTS = ("nhd", "hnd", "joint", "cpu")
TENSORS = ("k", "v", "both")
needs_interpreter = pytest.mark.skipif(not interpreted(), reason="the last test runs it")
needs_compiler = pytest.mark.skipif(interpreted(), reason="TRITON_INTERPRET replaces the compiler")
properties = settings(max_examples=30, deadline=None, derandomize=True)

shapes = st.builds(
    DeviationCase,
    T=st.integers(1, 33), G=st.integers(1, 3), D=st.sampled_from([64, 80, 96]),
    P=st.sampled_from([1, 4, 16]), layout=st.sampled_from(LAYOUTS),
    slots=st.sampled_from(["runs", "shuffled", "holes", "none"]),
    tensor=st.sampled_from(TENSORS), norm=st.sampled_from(list(NORMS)),
)  # fmt: skip
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


def arguments(case: DeviationCase, dtype: torch.dtype) -> dict:
    """Fresh and cached rows of normal values; rows that no slot names are poisoned."""
    paged, slots = make_paged(case, dtype, "cpu", poisoned=True), make_slots(case, "cpu")
    values = make_paged(case, dtype, "cpu", poisoned=False)
    cached = torch.stack([x[0].flatten(0, 1)[slots.clamp(0)] for x in (values.k, values.v)])
    k, v = make_chunk(case, dtype, "cpu")[0]
    put(paged, slots, *cached)
    return {"k": k, "v": v, "paged": paged, "slots": slots}


def put(paged: PagedKV, slots: Tensor, k: Tensor, v: Tensor) -> None:
    for t, slot in enumerate(slots.tolist()):
        if slot >= 0:
            paged.k[0][slot // paged.P, slot % paged.P] = k[t]
            paged.v[0][slot // paged.P, slot % paged.P] = v[t]


def rows(pages: Tensor, slots: Tensor) -> Tensor:
    """[T, G, D], one row at a time; NaN where there is no slot."""
    P = pages.shape[1]
    none = torch.full_like(pages[0, 0], torch.nan)
    return torch.stack([pages[s // P, s % P] if s >= 0 else none for s in slots.tolist()])


def formula(x: Tensor, y: Tensor, norm: str) -> Tensor:
    x, y = x.double().flatten(1), y.double().flatten(1)
    match norm:
        case "l1":
            score = (x - y).abs().sum(1)
        case "squared":
            score = (x - y).square().sum(1)
        case "cosine":
            score = 1 - torch.nn.functional.cosine_similarity(x, y, dim=1)
    return score.nan_to_num(0)


def assert_rounded_sums(score: Tensor, exact: Tensor, terms: int) -> None:
    """As close as a sum of so many terms that are not negative is in fp32, in whatever order."""
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(score.double(), exact, rtol=(terms + 4) * eps / 2, atol=eps)


@properties
@given(case=shapes, dtype=dtypes)
def test_scores_are_the_formula(case, dtype):
    call = arguments(case, dtype)
    exact = torch.zeros(case.T, dtype=torch.float64)
    for name, fresh, cached in (
        ("k", call["k"], call["paged"].k[0]),
        ("v", call["v"], call["paged"].v[0]),
    ):
        if case.tensor in (name, "both"):
            exact += formula(fresh, rows(cached, call["slots"]), case.norm)
    score = deviation(**call, tensor=case.tensor, norm=case.norm)
    assert (score.shape, score.dtype) == ((case.T,), torch.float32)
    assert (score[call["slots"] < 0] == 0).all()
    assert_rounded_sums(score, exact, case.G * case.D)


@properties
@given(case=shapes, dtype=dtypes)
def test_writing_replaces_just_these_rows_and_scores_the_same(case, dtype):
    call = arguments(case, dtype)
    asked = {"tensor": case.tensor, "norm": case.norm}
    before = [x[0].clone() for x in (call["paged"].k, call["paged"].v)]
    dry = deviation(**call, **asked)
    for pages, was in zip((call["paged"].k[0], call["paged"].v[0]), before, strict=True):
        assert torch.equal(pages.nan_to_num(7), was.nan_to_num(7))
    assert torch.equal(deviation(**call, **asked, write=True), dry)
    kept = call["slots"] >= 0
    others = torch.ones(case.N * case.P, dtype=torch.bool)
    others[call["slots"][kept]] = False
    for pages, fresh in ((call["paged"].k[0], call["k"]), (call["paged"].v[0], call["v"])):
        assert torch.equal(rows(pages, call["slots"])[kept], fresh[kept])
        assert rows(pages, others.nonzero().squeeze(1)).isnan().all()
    assert not deviation(**call, **asked).any()


@properties
@given(case=shapes, dtype=dtypes, power=st.integers(-2, 3))
def test_equal_rows_score_zero_and_all_is_symmetric_and_scales(case, dtype, power):
    call = arguments(case, dtype)
    asked = {"tensor": case.tensor, "norm": case.norm}
    score = deviation(**call, **asked)
    old = [rows(x[0], call["slots"]) for x in (call["paged"].k, call["paged"].v)]
    swapped = arguments(case, dtype)
    put(swapped["paged"], call["slots"], call["k"], call["v"])
    assert not deviation(**swapped, **asked).any()
    swapped["k"], swapped["v"] = old
    assert torch.equal(deviation(**swapped, **asked), score)

    factor = 2.0**power
    put(swapped["paged"], call["slots"], call["k"] * factor, call["v"] * factor)
    swapped["k"], swapped["v"] = (x * factor for x in old)
    growth = {"l1": factor, "squared": factor**2, "cosine": 1}[case.norm]
    assert torch.equal(deviation(**swapped, **asked), score * growth)


@properties
@given(case=shapes, dtype=dtypes)
def test_both_is_the_sum_and_cosines_lie_between_same_and_opposite(case, dtype):
    call = arguments(case, dtype)
    k, v, both = (deviation(**call, tensor=t, norm=case.norm) for t in TENSORS)
    assert torch.equal(both, k + v)
    if case.norm == "cosine":
        assert (k >= 0).all()
        assert_rounded_sums(k.clamp(min=2), torch.full_like(k, 2).double(), case.G * case.D)
        opposite = torch.where(call["slots"] < 0, 0.0, 2.0).double()
        put(call["paged"], call["slots"], -call["k"], -3 * call["v"])
        for score in (deviation(**call, tensor=t, norm="cosine") for t in ("k", "v")):
            assert_rounded_sums(score, opposite, case.G * case.D)


def test_cosine_keeps_digits_of_small_angles():
    call = arguments(DeviationCase(T=9, G=2, D=64), torch.float32)
    old = rows(call["paged"].v[0], call["slots"])
    step = torch.randn(old.shape, generator=torch.Generator().manual_seed(0)) * 1e-4
    call["v"] = old + step
    exact = formula(call["v"], old, "cosine")
    assert exact.max() < 1e-7
    score = deviation(**call, norm="cosine").double()
    direct = 1 - torch.nn.functional.cosine_similarity(call["v"].flatten(1), old.flatten(1), dim=1)
    assert (score - exact).abs().max() < (direct.double() - exact).abs().max() / 100


def test_rows_of_zeros_have_no_direction():
    call = arguments(DeviationCase(T=3, G=2, D=64), torch.float32)
    call["v"][0] = 0
    call["v"][1] = 0
    put(call["paged"], call["slots"][1:2], call["k"][1:2], call["v"][1:2])
    assert deviation(**call, norm="cosine")[:2].tolist() == [1, 0]


@pytest.mark.parametrize("norm", NORMS)
def test_a_broken_row_shows_and_shows_alone(norm):
    call = arguments(DeviationCase(T=20, G=2, D=80), torch.float16)
    call["v"][7, 1, 79] = torch.nan
    assert deviation(**call, norm=norm).isnan().nonzero().tolist() == [[7]]


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("D", [64, 256])
def test_bits_do_not_depend_on_the_other_rows(D, norm):
    call = arguments(DeviationCase(T=40, G=3, D=D, slots="shuffled"), torch.float32)
    score = deviation(**call, norm=norm)
    for part in (slice(0, 1), slice(3, 20), slice(39, 40)):
        some = {name: x if name == "paged" else x[part] for name, x in call.items()}
        assert torch.equal(deviation(**some, norm=norm), score[part])


@needs_interpreter
@pytest.mark.parametrize("BLOCK_T", [1, 2, 8, 64])
def test_any_tile_gives_the_same(monkeypatch, BLOCK_T):
    shape = module._launch_shape
    monkeypatch.setattr(module, "_launch_shape", lambda D: {**shape(D), "BLOCK_T": BLOCK_T})
    verify(SPEC, DeviationCase(T=37, G=3, D=80, slots="holes", write=True), torch.float16, "cpu")


def test_fresh_rows_may_be_strided():
    call = arguments(DeviationCase(T=9, G=3, D=64), torch.float32)
    expected = deviation(**call, tensor="both")
    qkv = torch.zeros(9, 5, 2, 64)
    qkv[:, 1:4, 0], qkv[:, 1:4, 1] = call["k"], call["v"]
    call["k"], call["v"] = qkv[:, 1:4, 0], qkv[:, 1:4, 1]
    wide = call["v"].new_zeros(3, 64, 9).permute(2, 0, 1)
    wide.copy_(call["v"])
    for v in (call["v"], wide):
        score = deviation(**{**call, "v": v}, tensor="both")
        assert_rounded_sums(score, expected.double(), 3 * 64)


@needs_interpreter
def test_slots_out_of_range_are_left_alone(monkeypatch):
    """On a GPU nobody checks them first."""
    monkeypatch.setattr(module, "check_slots", lambda slots, paged: None)
    call = arguments(DeviationCase(T=4, G=1, D=64), torch.float32)
    paged = call["paged"]
    paged.k[0].zero_(), paged.v[0].zero_()
    call["slots"] = torch.tensor([1 << 40, -7, paged.N * paged.P, 0])
    score = deviation(**call, write=True)
    assert (score[:3] == 0).all() and score[3] > 0
    written = (paged.v[0] != 0).any(-1).any(-1).nonzero().tolist()
    assert written == [[0, 0]]


def test_verify_sees_planted_faults():
    case = DeviationCase(T=21, G=2, D=64, slots="holes", write=True)

    def other_norm(norm, **call):
        return deviation(norm="l1", **call)

    def one_row_short(k, v, slots, out, **call):
        return deviation(k[1:], v[1:], slots=slots[1:], out=out[1:], **call)

    def next_slot(slots, **call):
        return deviation(slots=torch.where(slots < 0, slots, slots ^ 1), **call)

    def unwritten(write, **call):
        return deviation(write=False, **call)

    for launch in (other_norm, one_row_short, next_slot, unwritten):
        with pytest.raises(AssertionError):
            verify(dataclasses.replace(SPEC, launch=launch), case, torch.float32, "cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(3, 2, 80)}, r"k must be torch.float32 \[3, 2, 64\] .*got .*2, 80\]"),
        ({"v": torch.zeros(2, 2, 64)}, r"v must be .*\[3, 2, 64\] .*got .*\[2, 2, 64\]"),
        ({"v": torch.zeros(3, 2, 64).half()}, "v must be torch.float32 .*got float16"),
        ({"k": torch.zeros(3, 2, 64, device="meta")}, "k must be .* on cpu, got .* on meta"),
        ({"slots": torch.tensor([1, 2, 64 * 16])}, r"slots must lie in .*got 1\.\.1024"),
        ({"slots": torch.tensor([1, 2, 3]).int()}, r"slots must be int64 \[T\], got int32"),
        ({"tensor": "kv"}, "tensor must be one of k, v, both, got 'kv'"),
        ({"norm": "l2"}, "norm must be one of l1, squared, cosine, got 'l2'"),
        ({"out": torch.zeros(4)}, r"out must be contiguous torch.float32 \[3\] .*got .*\[4\]"),
        ({"out": torch.zeros(3).int()}, "out must be .*float32 .*got int32"),
        ({"out": torch.zeros(6)[::2]}, r"out must be contiguous .*got .* strides \(2,\)"),
    ],
)  # fmt: skip
def test_bad_input_raises_before_anything_is_written(change, message):
    paged = make_paged(DeviationCase(T=3, G=2, D=64), torch.float32, "cpu", poisoned=True)
    fresh = torch.zeros(2, 3, 2, 64)
    call = {"k": fresh[0], "v": fresh[1], "slots": torch.tensor([0, -1, 4]), **change}
    with pytest.raises(ValueError, match=message):
        deviation(paged=paged, write=True, **call)
    two = PagedKV(paged.k * 2, paged.v * 2)
    with pytest.raises(ValueError, match="paged must hold one layer, got 2"):
        deviation(*fresh, two, torch.tensor([0, -1, 4]), write=True)
    assert paged.k[0].isnan().all() and paged.v[0].isnan().all()


@pytest.mark.heavy
@needs_compiler
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", AOT_DTYPES, ids=AOT_DTYPES.get)
def test_scoring_without_writing_compiles_without_spills(dtype, target):
    """The variants of SPEC write; these only read."""
    for D, tensor, norm in ((64, "k", "l1"), (128, "v", "squared"), (256, "both", "cosine")):
        aot = {"dry": module._signature(D, tensor, norm, False)}
        binary = compile_variant(dataclasses.replace(SPEC, aot=aot), "dry", dtype, target)
        assert binary.spills == 0
        assert 0 < binary.registers <= 128
        assert binary.load_bits == 128


@needs_compiler
@pytest.mark.heavy
@pytest.mark.alone
def test_kernel_under_the_interpreter():
    interpret(__file__)
