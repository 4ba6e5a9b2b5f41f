"""Sparse attention against torch's dense attention, and what must hold for any rows and tiles.

An ordinary run works on the torch reference; the last test runs this file once more, interpreting.
"""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from lmc.kernels.query_rows import TILES, Prompts, choose_splits, choose_tile, query_rows
from lmc.kernels.sparse_attention import (
    SPEC,
    make_inputs,
    sparse_attention,
    sparse_attention_reference,
)
from lmc.kernels.spec import interpreted, verify
from lmc.kernels.split import merge
from tests.kernels.interpreting import interpret

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("nhd", "hnd", "joint", "cpu")
needs_interpreter = pytest.mark.skipif(not interpreted(), reason="the last test runs it")
properties = settings(max_examples=25, deadline=None, derandomize=True)

prompts = st.builds(
    lambda requests, heads, **rest: Prompts(
        requests=tuple((T, min(n, T)) for T, n in requests), H=heads[0], G=heads[1], **rest
    ),
    requests=st.lists(st.tuples(st.integers(1, 70), st.integers(0, 9)), min_size=1, max_size=3),
    heads=st.sampled_from([(1, 1), (4, 1), (6, 2), (7, 1), (4, 4)]),
    D=st.sampled_from([16, 64, 80, 96]),
    P=st.sampled_from([8, 16, 32, 128]),
    window=st.sampled_from([None, None, 1, 13, 100]),
    softcap=st.sampled_from([None, None, 0.5, 20.0]),
    layout=st.sampled_from(LAYOUTS),
)
dtypes = st.sampled_from(DTYPES)


def prompt(inputs: dict[str, Any], request: int, T: int) -> tuple[Tensor, Tensor]:
    """Keys and values [T, G, D] of one request, one token at a time."""
    P, table = inputs["k"].shape[1], inputs["tables"][request].tolist()
    keys, values = (
        torch.stack([x[table[t // P], t % P] for t in range(T)]) for x in (inputs["k"], inputs["v"])
    )
    return keys, values


def expected(inputs: dict[str, Any], case: Prompts) -> tuple[Tensor, Tensor]:
    """out [M, H, D] and lse [M, H] of float64 inputs: all keys, and a mask written as a loop."""
    outs, lses, cu_rows = [], [], inputs["rows"].cu_rows
    for r, (at, (T, _)) in enumerate(zip(case.positions(), case.requests, strict=True)):
        keys, values = (
            x.nan_to_num().repeat_interleave(case.H // case.G, dim=1) for x in prompt(inputs, r, T)
        )
        q = inputs["q"][cu_rows[r] : cu_rows[r + 1]]
        logits = torch.einsum("mhd,thd->hmt", q, keys) * case.D**-0.5
        if case.softcap is not None:
            logits = (logits / case.softcap).tanh() * case.softcap
        far = case.window or T
        seen = [[p - far < t <= p for t in range(T)] for p in at.tolist()]
        logits[:, ~torch.tensor(seen, dtype=torch.bool).view(-1, T)] = -torch.inf
        outs.append(torch.einsum("hmt,thd->mhd", logits.softmax(-1), values))
        lses.append(logits.logsumexp(-1).T)
    return torch.cat(outs), torch.cat(lses)


def assert_rounded(got: Tensor, want: Tensor, own: Tensor, exact: Tensor) -> None:
    """At most twice the error that torch's dense attention in the same dtype makes in any row."""
    error, allowed = (float((x.double() - y).abs().max()) for x, y in ((got, want), (own, exact)))
    # Triton 3.9's interpreter truncates fp32 to bf16 where a GPU rounds: twice the error.
    factor = 4 if interpreted() and got.dtype == torch.bfloat16 else 2
    assert error <= factor * allowed + 1e-9, f"error {error}, torch's own is {allowed}"


def sdpa(q: Tensor, keys: Tensor, values: Tensor, **mask: Any) -> Tensor:
    q, keys, values = (x.transpose(0, 1)[None] for x in (q, keys, values))
    out = scaled_dot_product_attention(q, keys, values, enable_gqa=True, **mask)
    return out[0].transpose(0, 1)


def whole(case: Prompts, dtype: torch.dtype) -> tuple[dict[str, Any], Tensor, Tensor]:
    """Inputs for all rows of one request, and dense causal attention in dtype and in float64."""
    T = case.requests[0][0]
    inputs = make_inputs(dataclasses.replace(case, requests=((T, T),)), dtype, "cpu")
    q, (keys, values) = inputs["q"], prompt(inputs, 0, T)
    own = sdpa(q, keys, values, is_causal=True)
    return inputs, own, sdpa(q.double(), keys.double(), values.double(), is_causal=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("T", "H", "G", "D"), [(1, 4, 2, 64), (130, 4, 1, 64), (75, 6, 2, 80)])
def test_all_rows_are_dense_causal_attention(T, H, G, D, dtype):
    inputs, own, exact = whole(Prompts(requests=((T, T),), H=H, G=G, D=D), dtype)
    assert_rounded(sparse_attention(**inputs), exact, own, exact)


@properties
@given(T=st.integers(1, 150), layout=st.sampled_from(LAYOUTS), dtype=dtypes, data=st.data())
def test_some_rows_are_those_rows_of_the_dense_result(T, layout, dtype, data):
    at = torch.tensor(sorted(data.draw(st.sets(st.integers(0, T - 1), min_size=1))))
    inputs, own, exact = whole(Prompts(requests=((T, T),), layout=layout), dtype)
    rows = query_rows(at, [0, len(at)], 4, inputs["k"])
    inputs |= {"q": inputs["q"][at], "rows": rows, "out": None, "lse": None}
    assert_rounded(sparse_attention(**inputs), exact[at], own, exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bottom_right_mask_is_seen(dtype):
    """The published mistake: row i of M sees keys up to T - M + i instead of its own position."""
    T, at = 100, torch.arange(0, 100, 3)
    inputs, own, exact = whole(Prompts(requests=((T, T),)), dtype)
    inputs |= {"q": inputs["q"][at], "out": None, "lse": None}
    right = query_rows(at, [0, len(at)], 4, inputs["k"])
    wrong = query_rows(T - len(at) + torch.arange(len(at)), [0, len(at)], 4, inputs["k"])
    assert_rounded(sparse_attention(**inputs | {"rows": right}), exact[at], own, exact)
    with pytest.raises(AssertionError, match="torch's own"):
        assert_rounded(sparse_attention(**inputs | {"rows": wrong}), exact[at], own, exact)


@properties
@given(case=prompts)
def test_windows_soft_caps_and_ragged_requests_are_what_a_loop_says(case):
    inputs = make_inputs(case, torch.float64, "cpu")
    inputs["lse"] = lse = torch.empty(inputs["q"].shape[:2], dtype=torch.float64)
    sparse_attention_reference(**inputs)
    torch.testing.assert_close((inputs["out"], lse), expected(inputs, case))


@needs_interpreter
@properties
@given(case=prompts, dtype=dtypes)
def test_kernel_is_the_reference_for_any_prompts(case, dtype):
    # Twice the error of one lucky number is no bound: log-sum-exps have a test of their own.
    spec = dataclasses.replace(SPEC, inputs=lambda *x: make_inputs(*x) | {"lse": None})
    verify(spec, case, dtype, "cpu")


@needs_interpreter
@pytest.mark.parametrize("softcap", [0.3, 0.8, 2.0, 50.0])
def test_soft_caps_are_exact_at_either_side_of_where_their_formula_changes(softcap):
    verify(SPEC, Prompts(requests=((60, 20),), softcap=softcap), torch.float32, "cpu")


@pytest.mark.parametrize("case", SPEC.cases, ids=str)
def test_lse_is_that_of_the_logits(case):
    inputs = make_inputs(case, torch.float32, "cpu")
    sparse_attention(**inputs)
    doubled = {n: x.double() if n in ("q", "k", "v") else x for n, x in inputs.items()}
    torch.testing.assert_close(inputs["lse"], expected(doubled, case)[1].float())


def with_rows(**change: Any) -> Any:
    """SPEC, its rows cut into other tiles or its keys into other splits."""

    def launch(rows: Any, k: Tensor, **inputs: Any) -> Tensor:
        H = k.shape[2] * rows.group
        tile = change.get("tile", rows.tile)
        rows = query_rows(rows.positions, rows.cu_rows, H, k, tile=tile)
        splits = change.get("splits")
        return sparse_attention(rows=rows, k=k, splits=splits, **inputs)

    return dataclasses.replace(SPEC, launch=launch)


VARIED = (
    Prompts(requests=((40, 11), (1, 1), (20, 0), (90, 14)), layout="hnd"),
    Prompts(requests=((120, 20),), D=80, P=8, window=50, layout="cpu"),
)


@needs_interpreter
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("case", VARIED, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_tile_gives_the_same(tile, case, dtype):
    verify(with_rows(tile=tile), case, dtype, "cpu")


@needs_interpreter
@pytest.mark.parametrize("splits", [1, 2, 7])
@pytest.mark.parametrize("case", VARIED, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_splits_over_keys_give_the_same(splits, case, dtype):
    verify(with_rows(splits=splits), case, dtype, "cpu")


@pytest.mark.parametrize("p", [0, 15, 16, 31, 40, 99])
def test_a_row_does_not_touch_what_comes_after_it(p):
    inputs, own, exact = whole(Prompts(requests=((100, 100),)), torch.float16)
    keys = torch.arange(p + 1, 100)
    page = inputs["tables"][0, keys // 16].long()
    for x in (inputs["k"], inputs["v"]):
        x[page, keys % 16] = torch.nan
    inputs["tables"][0, p // 16 + 1 :] = 1 << 30
    rows = query_rows(torch.tensor([p]), [0, 1], 4, inputs["k"])
    inputs |= {"q": inputs["q"][[p]], "rows": rows, "out": None, "lse": None}
    out = sparse_attention(**inputs)
    assert out.isfinite().all()
    assert_rounded(out, exact[[p]], own, exact)


@pytest.mark.parametrize("window", [None, 20])
def test_earlier_rows_of_a_tile_do_not_change_with_later_keys(window):
    case = Prompts(requests=((90, 90),), D=80, window=window)
    inputs = make_inputs(case, torch.float32, "cpu")
    before = sparse_attention(**inputs).clone()
    p = 52
    keys = torch.arange(p + 1, 90)
    for x in (inputs["k"], inputs["v"]):
        x[inputs["tables"][0, keys // 16].long(), keys % 16] += 100
    after = sparse_attention(**inputs)
    assert torch.equal(after[: p + 1], before[: p + 1])
    assert not torch.isclose(after[p + 1 :], before[p + 1 :]).all(dim=-1).any()


@properties
@given(S=st.integers(2, 6), M=st.integers(1, 9), data=st.data())
def test_merging_is_associative(S, M, data):
    cut = data.draw(st.integers(1, S - 1))
    random = torch.Generator().manual_seed(S * 10 + M)
    parts = torch.randn((S, M, 2, 64), generator=random)
    lses = 5 * torch.randn((S, M, 2), generator=random)

    def merged(parts: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
        out, lse = torch.empty(M, 2, 64), torch.empty(M, 2)
        merge(parts.contiguous(), lses.contiguous(), out, lse)
        return out, lse

    halves = [merged(parts[s], lses[s]) for s in (slice(0, cut), slice(cut, None))]
    twice = merged(*(torch.stack(x) for x in zip(*halves, strict=True)))
    torch.testing.assert_close(twice, merged(parts, lses))


@properties
@given(
    requests=st.lists(st.tuples(st.integers(1, 300), st.integers(0, 90)), max_size=4),
    group=st.integers(1, 9), tile=st.sampled_from((None, *TILES)),
)  # fmt: skip
def test_tiles_hold_every_pair_once_and_begin_with_the_longest(requests, group, tile):
    random = torch.Generator().manual_seed(len(requests))
    at = [torch.randperm(T, generator=random)[:n].sort().values for T, n in requests]
    cu_rows = [0, *torch.tensor([len(x) for x in at]).long().cumsum(0).tolist()]
    positions = torch.cat([torch.empty(0, dtype=torch.int64), *at])
    rows = query_rows(positions, cu_rows, 2 * group, torch.empty(1, 16, 2, 64), tile=tile)
    pairs, costs = [], []
    for request, first, end in rows.tiles.tolist():
        assert 0 < end - first <= rows.tile[0]
        assert cu_rows[request] * group <= first < end <= cu_rows[request + 1] * group
        pairs += range(first, end)
        costs.append(int(positions[(end - 1) // group]) + 1)
    assert sorted(pairs) == list(range(len(positions) * group))
    assert costs == sorted(costs, reverse=True)
    assert rows.keys == max(costs, default=0)
    assert rows.tile == tile or tile is None


def test_tiles_fit_the_rows_and_the_registers():
    assert choose_tile(8, 128) == choose_tile(16, 256) == (16, 32, 4)
    assert choose_tile(17, 128) == choose_tile(4096, 80) == (128, 32, 8)
    assert choose_tile(4096, 256) == (64, 32, 8)


@pytest.mark.parametrize(
    ("programs", "keys", "splits"),
    [(8, 32768, 33), (8, 1000, 3), (8, 100, 1), (264, 9999, 1), (132, 9999, 2), (200, 9999, 1)],
)
def test_few_long_tiles_are_split_until_the_machine_is_full(programs, keys, splits):
    assert choose_splits(programs, keys, processors=132) == splits


@pytest.mark.parametrize("case", [VARIED[0], VARIED[1], Prompts(requests=((50, 50),), window=9)])
def test_floor_and_flops_count_what_rows_see(case):
    seen_keys = pairs = 0
    for (T, _), at in zip(case.requests, case.positions(), strict=True):
        seen: set[int] = set()
        for p in at.tolist():
            mine = range(0 if case.window is None else max(0, p - case.window + 1), p + 1)
            seen |= set(mine)
            pairs += len(mine)
        assert max(seen, default=0) < T
        seen_keys += len(seen)
    M = sum(n for _, n in case.requests)
    q_and_out, k_and_v = 2 * M * case.H * case.D, 2 * seen_keys * case.G * case.D
    small = 4 * M * case.H + 8 * M  # log-sum-exps and positions
    assert SPEC.bytes(case, 2) == 2 * (q_and_out + k_and_v) + small
    assert SPEC.flops is not None and SPEC.flops(case) == 4 * case.H * case.D * pairs


def rows_at(*positions: int, cu_rows: tuple[int, ...] | None = None, **change: Any) -> Any:
    at = torch.tensor(positions)
    k = torch.zeros(6, 16, 2, 64)
    return query_rows(at, cu_rows or (0, len(at)), change.pop("H", 4), k, **change)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rows_at(3, 2), "positions of request 0 must ascend"),
        (lambda: rows_at(2, 2), "must ascend"),
        (lambda: rows_at(-1, 2), "must ascend from 0"),
        (lambda: rows_at(1, 2, cu_rows=(0, 1)), r"ascend from 0 to M=2, got \(0, 1\)"),
        (lambda: rows_at(1, 2, cu_rows=(1, 2)), "cu_rows must"),
        (lambda: rows_at(1, 2, cu_rows=(0, 2, 1, 2)), "cu_rows must"),
        (lambda: rows_at(1, 2, H=3), "H must be a multiple of G=2, got 3"),
        (lambda: rows_at(1, 2, tile=(8, 8, 4)), r"tile must be one of .*got \(8, 8, 4\)"),
        (lambda: query_rows(torch.zeros(2), [0, 2], 4, torch.zeros(1, 1, 2, 4)), "int64 .*float32"),
    ],
)
def test_query_rows_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"q": torch.zeros(3, 4, 64)},
            r"q must be torch.float32 \[2, 4, 64\].*got float32 \[3, 4, 64\]",
        ),
        ({"q": torch.zeros(2, 4, 64).half()}, "q must be .*got float16"),
        ({"q": torch.zeros(2, 64, 4).mT}, "last stride of q must be 1"),
        ({"q": torch.zeros(2, 4, 64, device="meta")}, "q must be .*on cpu .*on meta"),
        ({"lse": torch.zeros(2, 4, device="meta")}, "lse must be .*on cpu .*on meta"),
        ({"tables": torch.zeros(1, 6, device="meta").int()}, "tables must be .*on meta"),
        ({"k": torch.zeros(6, 16, 2)}, r"needs floating \[N, P, G, D\]"),
        ({"v": torch.zeros(6, 16, 2, 96)}, r"v must be like k, .*of no more dims, got .*96"),
        ({"v": torch.zeros(6, 8, 2, 64)}, "v must be like k"),
        ({"out": torch.zeros(2, 4, 32)}, r"out must be .*\[2, 4, 64\].*got .*\[2, 4, 32\]"),
        ({"out": torch.zeros(2, 64, 4).mT}, "last stride of out must be 1"),
        ({"lse": torch.zeros(2, 4).half()}, r"lse must be torch.float32 \[2, 4\].*got float16"),
        ({"lse": torch.zeros(4, 2).T}, "last stride of lse"),
        ({"tables": torch.zeros(1, 6).long()}, "tables must be torch.int32 .*got int64"),
        ({"tables": torch.zeros(6).int()}, r"tables must be .*\[1, 6\].*got int32 \[6\]"),
        ({"tables": torch.zeros(2, 6).int()}, "B=1 requests.*got int32 .2, 6"),
        (
            {"tables": torch.zeros(1, 5).int()},
            r"tables must be .*\[1, 6\].*81 keys.*got int32 \[1, 5\]",
        ),
        ({"tables": torch.zeros(1, 12).int()[:, ::2]}, "last stride of tables"),
        ({"window": 0}, "window must be positive, got 0"),
        ({"softcap": 0.0}, "softcap must be positive, got 0.0"),
        ({"scale": 0.0}, "scale must be positive, got 0.0"),
        ({"splits": 0}, "splits must be positive, got 0"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else None,
)
def test_bad_input_raises_before_anything_is_written(change, message):
    good = {
        "q": torch.ones(2, 4, 64), "k": torch.ones(6, 16, 2, 64), "v": torch.ones(6, 16, 2, 64),
        "tables": torch.zeros(1, 6).int(), "rows": rows_at(3, 80), "scale": 1.0,
        "out": torch.zeros(2, 4, 64), "lse": torch.zeros(2, 4),
    }  # fmt: skip
    with pytest.raises(ValueError, match=message):
        sparse_attention(**good | change)
    assert not good["out"].any() and not good["lse"].any()
    sparse_attention(**good)
    assert good["out"].all() and good["lse"].all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parts": torch.zeros(2, 3, 64)}, r"parts must be .*\[S, M, H, D\]"),
        ({"parts": torch.zeros(2, 3, 4, 64).half()}, "got float16"),
        ({"lses": torch.zeros(2, 3, 5)}, r"lses must be .*\[2, 3, 4\].*got .*\[2, 3, 5\]"),
        ({"out": torch.zeros(3, 4, 32)}, r"out must be .*\[3, 4, 64\]"),
        ({"out": torch.zeros(3, 64, 4).mT}, "last stride of out"),
        ({"lse": torch.zeros(3, 4).half()}, "lse must be .*got float16"),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else None,
)
def test_merge_refuses(change, message):
    good = {"parts": torch.ones(2, 3, 4, 64), "lses": torch.ones(2, 3, 4),
            "out": torch.zeros(3, 4, 64), "lse": torch.zeros(3, 4)}  # fmt: skip
    with pytest.raises(ValueError, match=message):
        merge(**good | change)
    assert not good["out"].any()


@pytest.mark.skipif(interpreted(), reason="this process is interpreting already")
@pytest.mark.heavy
@pytest.mark.alone
def test_kernels_under_the_interpreter():
    out = interpret(__file__, "-k", "not under_the_interpreter and not loop_says")
    assert "skipped" not in out
