"""Importance of keys against attention written out row by row, and what every reduction must hold.

test_reference.py runs SPEC's cases. Here too an ordinary run works on the torch reference, and the
last test runs this file once more, interpreting.
"""

import dataclasses
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lmc.kernels import importance as module
from lmc.kernels.aot import DTYPES as AOT_DTYPES
from lmc.kernels.aot import TARGETS, compile_variant
from lmc.kernels.importance import QUERIES, SPEC, Heads, Probe, importance, make_inputs
from lmc.kernels.spec import interpreted, verify
from tests.kernels.interpreting import interpret

needs_interpreter = pytest.mark.skipif(not interpreted(), reason="the last test runs it")
needs_compiler = pytest.mark.skipif(interpreted(), reason="TRITON_INTERPRET replaces the compiler")
properties = settings(max_examples=12, deadline=None, derandomize=True)


@st.composite
def probes(draw: st.DrawFn) -> Probe:
    T, G = draw(st.integers(1, 75)), draw(st.integers(1, 2))
    return Probe(
        T=T, G=G, M=draw(st.integers(1, min(T, 18))), H=G * draw(st.integers(1, 4)),
        D=draw(st.sampled_from([64, 80])), P=draw(st.sampled_from([1, 8, 16])),
        layout=draw(st.sampled_from(["nhd", "hnd", "joint", "cpu"])),
        heads=draw(st.sampled_from(get_args(Heads))), queries=draw(st.sampled_from(list(QUERIES))),
        suffix=draw(st.booleans()), given=draw(st.booleans()),
    )  # fmt: skip


dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


def arguments(case: Probe, dtype: torch.dtype) -> dict[str, Any]:
    return {**make_inputs(case, dtype, "cpu"), "out": None}


def attention(call: dict[str, Any]) -> Tensor:
    """A [M, H, T] in float64, one row and one head at a time."""
    q, k, T = call["q"].double(), call["k"].double(), call["T"]
    M, H, _ = q.shape
    P, G = k.shape[1:3]
    keys = torch.stack([k[call["table"][t // P], t % P] for t in range(T)])
    rows = torch.zeros(M, H, T, dtype=torch.float64)
    for i, position in enumerate(call["positions"].tolist()):
        for h in range(H):
            seen = keys[: position + 1, h // (H // G)]
            logits = call["scale"] * (seen @ q[i, h])
            rows[i, h, : len(seen)] = (logits - logits.logsumexp(0)).exp()
    return rows


def reduced(rows: Tensor, heads: str, queries: str) -> Tensor:
    rows = rows.sum(1) / rows.shape[1] if heads == "mean" else rows.max(1).values
    match queries:
        case "sum":
            return rows.sum(0)
        case "max":
            return rows.max(0).values
        case _:
            return (rows * rows).sum(0) ** 0.5


def rounding(call: dict[str, Any]) -> float:
    """What roundings may change a score by, as a share of it: those of a logit's D products, of its
    log-sum-exp, and of the sums, in which all is positive so that shares stay."""
    M, H, D = call["q"].shape
    largest = (
        call["q"].double().norm(dim=2).max() * call["k"].double().nan_to_num().norm(dim=3).max()
    )
    logit = float(largest) * abs(call["scale"]) + 10
    return (2 * (D + 4) * logit + M + H) * torch.finfo(torch.float32).eps / 2


def assert_close(got: Tensor, exact: Tensor, call: dict[str, Any]) -> None:
    eps = torch.finfo(torch.float32).eps
    torch.testing.assert_close(got.double(), exact, rtol=rounding(call), atol=eps)


@properties
@given(case=probes(), dtype=dtypes)
def test_scores_are_the_formula(case, dtype):
    call = arguments(case, dtype)
    score = importance(**call)
    assert (score.shape, score.dtype) == ((case.T,), torch.float32)
    assert_close(score, reduced(attention(call), case.heads, case.queries), call)
    assert torch.equal(importance(**call), score)


@properties
@given(case=probes(), dtype=dtypes)
def test_mass_is_kept_and_reductions_are_ordered(case, dtype):
    call = arguments(case, dtype)
    by = {
        (heads, queries): importance(**{**call, "heads": heads, "queries": queries}).double()
        for heads in get_args(Heads)
        for queries in QUERIES
    }
    assert_close(by["mean", "sum"].sum(), torch.tensor(case.M, dtype=torch.float64), call)
    last = int(call["positions"].max())
    slack = 1 + rounding(call)
    for heads in get_args(Heads):
        assert (by[heads, "max"] <= by[heads, "l2"] * slack).all()
        assert (by[heads, "l2"] <= by[heads, "sum"] * slack).all()
        assert (by[heads, "max"] <= slack).all()
        assert (by[heads, "sum"][: last + 1] > 0).all()
        assert (by[heads, "sum"][last + 1 :] == 0).all()
    for queries in QUERIES:
        assert (by["mean", queries] <= by["max", queries] * slack).all()


@properties
@given(case=probes(), dtype=dtypes)
def test_what_no_row_sees_changes_nothing(case, dtype):
    """make_inputs leaves NaN there, and NaN must not leak."""
    call = arguments(case, dtype)
    score = importance(**call)
    assert score.isfinite().all()
    clean = {**call, "k": call["k"].nan_to_num(3)}
    assert torch.equal(importance(**clean), score)


@properties
@given(case=probes(), dtype=dtypes)
def test_log_sum_exps_of_the_caller_do_as_well(case, dtype):
    given_lse = arguments(dataclasses.replace(case, given=True), dtype)
    own = importance(**{**given_lse, "lse": None})
    assert_close(own, importance(**given_lse).double(), given_lse)


@pytest.mark.parametrize("given", [False, True])
def test_rows_at_minus_one_pay_nothing_and_rows_past_the_end_see_all(given):
    call = arguments(Probe(T=45, G=2, D=64, M=6, suffix=True, given=given), torch.float32)
    call["k"] = call["k"].nan_to_num(50)  # so that a key past the end could not go unseen
    without = {**call, "q": call["q"][2:], "positions": call["positions"][2:]}
    if given:
        without["lse"], call["lse"] = call["lse"][2:], call["lse"].clone()
        call["lse"][:2] = -torch.inf
    expected = importance(**without)
    call["positions"][:2] = -1
    call["positions"][-1] = 1000
    assert_close(importance(**call), expected.double(), call)


def test_order_of_rows_and_layout_of_tensors_do_not_matter():
    call = arguments(Probe(T=70, G=2, D=64, M=9, H=4), torch.float32)
    expected = importance(**call)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    turned = {**call, "q": call["q"][order], "positions": call["positions"][order]}
    assert_close(importance(**turned), expected.double(), call)
    qkv = torch.full((9, 8, 128), torch.nan)
    qkv[:, 2:6, ::2] = call["q"]
    assert_close(importance(**{**call, "q": qkv[:, 2:6, ::2]}), expected.double(), call)
    assert_close(importance(**{**call, "k": call["k"].mT.contiguous().mT}), expected.double(), call)


def test_equal_heads_make_mean_and_max_one():
    call = arguments(Probe(T=33, G=1, D=64, M=5, H=3), torch.float32)
    call["q"] = call["q"][:, :1].expand(5, 3, 64)
    mean, most = (importance(**{**call, "heads": heads}) for heads in get_args(Heads))
    assert_close(mean, most.double(), call)


@needs_interpreter
@pytest.mark.parametrize(
    "tile", [(16, 32, 16), (16, 128, 32), (64, 64, 64), (128, 32, 128)], ids=str
)
def test_any_tile_gives_the_same(monkeypatch, tile):
    monkeypatch.setattr(module, "TILE", tile)
    for case in (SPEC.cases[1], SPEC.cases[3]):
        verify(SPEC, case, torch.float16, "cpu")


@needs_interpreter
@pytest.mark.parametrize("splits", [1, 2, 4, 16])
def test_any_number_of_splits_gives_the_same(monkeypatch, splits):
    """With 16 shares of 301 keys in steps of 32, six are empty."""
    monkeypatch.setattr(module, "_splits", lambda programs, T: splits)
    for case in (SPEC.cases[0], SPEC.cases[1], SPEC.cases[6]):
        verify(SPEC, case, torch.float32, "cpu")


@pytest.mark.parametrize(
    ("programs", "T", "splits"),
    [(1, 100, 1), (1, 511, 1), (1, 512, 2), (1, 8192, 32), (1, 1 << 20, 32), (16, 8192, 16),
     (100, 8192, 4), (256, 8192, 1), (5000, 8192, 1)],
)  # fmt: skip
def test_splits_fill_the_machine_where_keys_are_many(programs, T, splits):
    assert module._splits(programs, T) == splits


def test_verify_sees_planted_faults():
    case = dataclasses.replace(SPEC.cases[1], T=90)
    dtype = torch.float32

    def bottom_right(positions, T, **call):
        """The mask of published implementations: the i-th of M rows stands for row T - M + i."""
        return importance(positions=torch.arange(T - len(positions), T), T=T, **call)

    def heads_apart(q, **call):
        return importance(q=q.unflatten(1, (-1, 3)).transpose(1, 2).flatten(1, 2), **call)

    def unscaled(scale, **call):
        return importance(scale=1.0, **call)

    def next_page(table, **call):
        return importance(table=table.roll(1), **call)

    def one_key_late(positions, **call):
        return importance(positions=positions - 1, **call)

    def other_reduction(queries, **call):
        return importance(queries="sum", **call)

    for launch in (
        bottom_right, heads_apart, unscaled, next_page, one_key_late, other_reduction,
    ):  # fmt: skip
        with pytest.raises(AssertionError):
            verify(dataclasses.replace(SPEC, launch=launch), case, dtype, "cpu")


GOOD: dict[str, Any] = {
    "q": torch.zeros(3, 4, 64),
    "k": torch.zeros(5, 8, 2, 64),
    "table": torch.tensor([4, 0, 2], dtype=torch.int32),
    "positions": torch.tensor([1, 5, 19]),
    "T": 20,
    "scale": 0.125,
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(5, 8, 64)}, r"k must be floating \[N, P, G, D\].*got .*\[5, 8, 64\]"),
        ({"k": torch.zeros(5, 8, 2, 64).int()}, "k must be floating .*got int32"),
        ({"q": torch.zeros(3, 4, 80)}, r"q must be torch.float32 \[M, H, 64\] .*\[3, 4, 80\]"),
        ({"q": torch.zeros(3, 5, 64)}, r"H a multiple of G=2, got .*\[3, 5, 64\]"),
        ({"q": torch.zeros(3, 4, 64).half()}, "q must be torch.float32 .*got float16"),
        ({"q": torch.zeros(3, 4, 64, device="meta")}, "on cpu, .*got .* on meta"),
        ({"positions": torch.tensor([1, 5])}, r"positions must be .*int64 \[3\] .*got .*\[2\]"),
        ({"positions": torch.tensor([1, 5, 19]).int()}, "positions must be .*got int32"),
        ({"table": torch.tensor([4, 0, 2])}, r"table must be int32 \[pages\] .*got int64"),
        ({"table": torch.zeros(2, dtype=torch.int32)}, "hold T=20 keys, got 2 pages of P=8"),
        ({"table": torch.tensor([4, 5, 2]).int()}, r"table must name pages 0\.\.4, got \[4, 5, 2"),
        ({"table": torch.tensor([4, -1, 2]).int()}, "table must name pages"),
        ({"table": torch.zeros(6, dtype=torch.int32)[::2]}, r"contiguous .*strides \(2,\)"),
        ({"T": -1}, "T must be at least 0, got -1"),
        ({"lse": torch.zeros(3, 2)}, r"lse must be .*float32 \[3, 4\] .*got .*\[3, 2\]"),
        ({"lse": torch.zeros(4, 3).T}, r"lse must be contiguous .*strides \(1, 3\)"),
        ({"out": torch.zeros(21)}, r"out must be .*float32 \[20\] .*got .*\[21\]"),
        ({"out": torch.zeros(20).half()}, "out must be .*float32 .*got float16"),
        ({"heads": "sum"}, "heads must be one of mean, max, got 'sum'"),
        ({"queries": "mean"}, "queries must be one of sum, max, l2, got 'mean'"),
    ],
)  # fmt: skip
def test_bad_input_raises_before_anything_is_written(change, message):
    out = torch.full((20,), torch.nan)
    with pytest.raises(ValueError, match=message):
        importance(**{**GOOD, "out": out, **change})
    assert out.isnan().all()
    assert importance(**GOOD, out=out) is out
    assert out.isfinite().all()


def test_no_rows_pay_nothing():
    none = {"q": GOOD["q"][:0], "positions": GOOD["positions"][:0]}
    out = torch.full((20,), torch.nan)
    for heads in get_args(Heads):
        for queries in QUERIES:
            out.fill_(torch.nan)
            importance(**{**GOOD, **none}, heads=heads, queries=queries, out=out)
            assert (out == 0).all()


@needs_compiler
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", AOT_DTYPES, ids=AOT_DTYPES.get)
def test_other_shapes_compile_without_spills(dtype, target):
    """SPEC's variants are of H/G 4, 7 and 8, and of 4 splits."""
    signatures = {
        "splits-1": {**module._signature(256, 1, "mean", "max"), "SPLITS": 1},
        "splits-32": {**module._signature(96, 3, "max", "l2"), "SPLITS": 32},
    }
    spec = dataclasses.replace(SPEC, aot=signatures)
    for variant in signatures:
        binary = compile_variant(spec, variant, dtype, target)
        assert binary.spills == 0
        assert binary.load_bits == 128


@needs_compiler
@pytest.mark.heavy
@pytest.mark.alone
def test_kernels_under_the_interpreter():
    interpret(__file__)
