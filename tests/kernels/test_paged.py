"""PagedKV, runs of slots, and what the launchers refuse."""

import pytest
import torch

from lmc.kernels.cases import Case, make_paged
from lmc.kernels.gather import gather
from lmc.kernels.paged import PagedKV, page_runs
from lmc.kernels.rerotate import rerotate
from lmc.kernels.scatter import scatter
from lmc.kernels.scatter_runs import scatter_runs


def test_page_runs_cut_at_pages_gaps_and_holes():
    slots = torch.tensor([6, 7, 8, 9, -1, -1, 3, 2, 0, 1])
    assert list(page_runs(slots, 4)) == [
        (slice(0, 2), 1, slice(2, 4)),
        (slice(2, 4), 2, slice(0, 2)),
        (slice(6, 7), 0, slice(3, 4)),
        (slice(7, 8), 0, slice(2, 3)),
        (slice(8, 10), 0, slice(0, 2)),
    ]
    assert list(page_runs(slots[:0], 4)) == []


def test_paged_kv_knows_its_shape_and_addresses():
    paged = make_paged(Case(T=3, G=3, D=64, L=4, P=8, layout="cpu"), torch.float16, "cpu",
                       poisoned=False)  # fmt: skip
    assert (paged.L, paged.N, paged.P, paged.G, paged.D) == (4, 3, 8, 3, 64)
    assert (paged.dtype, paged.device) == (torch.float16, torch.device("cpu"))
    assert paged.k[0].stride() != paged.v[0].stride()
    assert paged.table.dtype == torch.int64
    assert paged.table.tolist() == [[x.data_ptr() for x in xs] for xs in (paged.k, paged.v)]
    assert paged.table is paged.table


GOOD = torch.zeros(4, 8, 2, 64)


@pytest.mark.parametrize(
    ("k", "v", "message"),
    [
        ([], [], "at least one layer, got 0"),
        ([GOOD], [GOOD, GOOD], "got 1 k and 2 v"),
        ([GOOD[0]], [GOOD[0]], r"\[N, P, G, D\].* got k\[0\] float32 \[8, 2, 64\]"),
        ([GOOD.int()], [GOOD.int()], "got k.* int32"),
        ([GOOD], [GOOD[:3]], r"v\[0\] is .*\[3, 8, 2, 64\].*, expected .*\[4, 8, 2, 64\]"),
        ([GOOD], [GOOD.half()], r"v\[0\] is float16"),
        ([GOOD, GOOD.mT.contiguous().mT], [GOOD, GOOD], r"strides of k\[1\]"),
    ],
)
def test_paged_kv_refuses(k, v, message):
    with pytest.raises(ValueError, match=message):
        PagedKV(tuple(k), tuple(v))


COS, SIN = torch.zeros(32), torch.zeros(32)
CHUNK, SLOTS = torch.zeros(2, 2, 3, 2, 64), torch.tensor([1, -1, 4])
# The chunk as a buffer, and its rows as one run of it.
ROWS, RUNS, TURNS = CHUNK.view(12, 2, 64), torch.tensor([[0, 3, 0, 3, -1]]), COS[None]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda p: scatter(CHUNK[:1], p, SLOTS), r"\[2, 2, 3, 2, 64\], got .*\[1, 2, 3, 2, 64\]"),
        (lambda p: scatter(CHUNK, p, SLOTS[:2]), r"\[2, 2, 2, 2, 64\], got"),
        (lambda p: scatter(CHUNK.half(), p, SLOTS), "float32 .*got float16"),
        (lambda p: scatter(CHUNK, p, SLOTS.int()), r"int64 \[T\], got int32"),
        (lambda p: scatter(CHUNK, p, SLOTS[None]), r"int64 \[T\], got int64 \[1, 3\]"),
        (lambda p: scatter(CHUNK, p, SLOTS + 60), r"-1\.\.63 .*got 59\.\.64"),
        (lambda p: scatter(CHUNK, p, SLOTS - 1), r"got -2\.\.3"),
        (lambda p: scatter(CHUNK, p, SLOTS, COS), "cos and sin go together"),
        (lambda p: scatter(CHUNK, p, SLOTS, COS, SIN[:9]), "got 32 and 9"),
        (lambda p: scatter(CHUNK, p, SLOTS, COS.double(), SIN), "cos must be float32"),
        (lambda p: scatter(CHUNK, p, SLOTS, COS.repeat(2), SIN), r"R <= D=64, got .*\[64\]"),
        (lambda p: scatter_runs(ROWS[:, :1], p, SLOTS, RUNS), r"\[U, 2, 64\].* got .*12, 1, 64"),
        (lambda p: scatter_runs(ROWS[:, :, ::2], p, SLOTS, RUNS), r"got float32 \[12, 2, 32\]"),
        (lambda p: scatter_runs(ROWS.mT.contiguous().mT, p, SLOTS, RUNS), "contiguous, got"),
        (lambda p: scatter_runs(ROWS.half(), p, SLOTS, RUNS), "float32 .*got float16"),
        (lambda p: scatter_runs(ROWS, p, SLOTS + 60, RUNS), r"got 59\.\.64"),
        (lambda p: scatter_runs(ROWS, p, SLOTS, RUNS.int()), r"int64 \[n, 5\], got int32"),
        (lambda p: scatter_runs(ROWS, p, SLOTS, RUNS[:, :4]), r"\[n, 5\], got int64 \[1, 4\]"),
        (lambda p: scatter_runs(ROWS[:11], p, SLOTS, RUNS), r"11 rows.* got \[0, 3, 0, 3, -1\]"),
        (lambda p: scatter_runs(ROWS, p, SLOTS[:2], RUNS), r"2 slots.* got \[0, 3, 0, 3, -1\]"),
        (lambda p: scatter_runs(ROWS, p, SLOTS, RUNS + 1), r"0 turns, got \[1, 4, 1, 4, 0\]"),
        (lambda p: scatter_runs(ROWS, p, SLOTS, RUNS - 1), r"got \[-1, 2, -1, 2, -2\] for"),
        (lambda p: scatter_runs(ROWS, p, SLOTS, RUNS, layers=(1, 3)), r"0\.\.2, got 1\.\.3"),
        (lambda p: scatter_runs(ROWS, p, SLOTS, RUNS, TURNS), "cos and sin go together"),
        (lambda p: scatter_runs(ROWS, p, SLOTS, RUNS, COS, SIN), r"\[C, R/2\].* got .*\[32\]"),
        (lambda p: scatter_runs(ROWS, p, SLOTS, RUNS, TURNS, TURNS[:, :9]), "must be alike"),
        (lambda p: gather(p, SLOTS + 60), r"got 59\.\.64"),
        (lambda p: gather(p, SLOTS, CHUNK[:, :, :2]), r"\[2, 2, 3, 2, 64\] .*got"),
        (lambda p: gather(p, SLOTS, CHUNK.half()), "got float16"),
        (lambda p: rerotate(CHUNK.int(), COS, SIN), "got int32"),
        (lambda p: rerotate(p.k[0], COS[:0], SIN[:0]), r"2 <= R <= D=64, got .*\[0\]"),
        (lambda p: rerotate(p.k[0], COS[None], SIN[None]), r"got float32 \[1, 32\]"),
        (lambda p: rerotate(p.k[0], COS, SIN, out=p.k[0][:2]), r"out must be like k"),
    ],
)  # fmt: skip
def test_bad_input_raises_before_anything_is_written(call, message):
    paged = make_paged(Case(T=40, G=2, D=64), torch.float32, "cpu", poisoned=False)
    assert paged.N * paged.P >= 64
    paged = PagedKV(tuple(x[:4] for x in paged.k), tuple(x[:4] for x in paged.v))
    before = [x.clone() for x in (*paged.k, *paged.v)]
    with pytest.raises(ValueError, match=message):
        call(paged)
    assert all(map(torch.equal, before, (*paged.k, *paged.v)))
    assert not CHUNK.any()
