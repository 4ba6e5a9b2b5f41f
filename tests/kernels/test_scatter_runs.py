"""Runs of a buffer into pages: the compiled loops, and what a turn of nothing leaves.

Under Triton's interpreter the kernel meets the same cases in test_reference.py.
"""

import dataclasses

import pytest
import torch

from lmc.kernels.cases import Case, make_chunk, make_paged, make_slots
from lmc.kernels.scatter import scatter
from lmc.kernels.scatter_runs import SPEC, RunsCase, make_inputs, scatter_runs
from lmc.kernels.spec import verify
from tests.kernels.interpreting import interpret

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("case", SPEC.cases, ids=str)
def test_launcher_matches_reference(case, dtype):
    verify(SPEC, case, dtype, "cpu")


def test_verify_sees_a_wrong_run_and_a_wrong_turn():
    case = RunsCase(T=20, G=2, D=64)

    def of_wrong(column):
        def launch(runs, **inputs):
            runs = runs.clone()
            runs[-1, column] = runs[0, column]
            scatter_runs(runs=runs, **inputs)

        return launch

    for column in (2, 4):
        wrong = dataclasses.replace(SPEC, launch=of_wrong(column))
        with pytest.raises(AssertionError, match="error"):
            verify(wrong, case, torch.float32, "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_what_does_not_turn_keeps_its_bits(dtype):
    """Also zeros with a sign and infinities, which a turn by no angle would change."""
    inputs = make_inputs(RunsCase(T=15, G=2, D=64, run=5), dtype, "cpu")
    inputs["buffer"][..., ::3] = -0.0
    inputs["buffer"][..., 1::7] = torch.inf
    inputs["runs"][:, 4] = -1
    scatter_runs(**inputs)
    paged, slots = inputs["paged"], inputs["slots"].tolist()
    for layer in range(paged.L):
        for side, pages in enumerate((paged.k[layer], paged.v[layer])):
            for first, T, base, stride, _ in inputs["runs"].tolist():
                at = base + (2 * layer + side) * stride
                got = torch.stack([pages[s // 16, s % 16] for s in slots[first : first + T]])
                expected = inputs["buffer"][at : at + T]
                assert torch.equal(got, expected)
                assert torch.equal(got.signbit(), expected.signbit())


@pytest.mark.parametrize("layout", ["cpu", "nhd"])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_one_run_is_a_chunk(layout, dtype):
    """Bit for bit what `scatter` does with it, on whatever path it takes here."""
    case = Case(T=37, G=2, D=64, L=3, layout=layout, slots="holes")
    chunk, slots = make_chunk(case, dtype, "cpu"), make_slots(case, "cpu")
    angle = torch.linspace(0.1, 300, 24)
    cos, sin = angle.cos(), angle.sin()
    apart, together = (make_paged(case, dtype, "cpu", poisoned=True) for _ in range(2))
    scatter(chunk, apart, slots, cos, sin)
    runs = torch.tensor([[0, 37, 0, 37, 0]])
    scatter_runs(chunk.view(-1, 2, 64), together, slots, runs, cos[None], sin[None])
    for x, y in zip((*apart.k, *apart.v), (*together.k, *together.v), strict=True):
        assert torch.equal(x.isnan(), y.isnan()) and torch.equal(x.nan_to_num(), y.nan_to_num())


@pytest.mark.heavy
@pytest.mark.alone
def test_the_kernel_keeps_bits_too():
    assert "passed" in interpret(__file__, "-k", "bits and not kernel or chunk")
