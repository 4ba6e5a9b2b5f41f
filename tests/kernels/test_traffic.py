"""Bytes are counted where they move, not where a formula says so.

The last test runs the others in a process that interprets Triton.
"""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.interpreter import interpreter_builder

from lmc.kernels.cases import Case
from lmc.kernels.spec import interpreted, load
from lmc.kernels.traffic import counted, over_floor

needs_interpreter = pytest.mark.skipif(
    not interpreted(), reason="the last test runs it under TRITON_INTERPRET=1"
)


@triton.jit
def _copy(src, dst, counter, n, BLOCK: tl.constexpr, KIND: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    if KIND == "masked":
        tl.store(dst + o, tl.load(src + o, mask=o < n), mask=o < n)
    elif KIND == "whole":
        tl.store(dst + o, tl.load(src + o))
    elif KIND == "scalar":
        tl.store(dst, tl.load(src))
    elif KIND == "descriptor":
        from_ = tl.make_tensor_descriptor(src, [n], [1], [BLOCK])
        to = tl.make_tensor_descriptor(dst, [n], [1], [BLOCK])
        to.store([tl.program_id(0) * BLOCK], from_.load([tl.program_id(0) * BLOCK]))
    elif KIND == "add":
        tl.atomic_add(counter + o, o, mask=o < n)
    else:
        tl.atomic_cas(counter, 0, 1)


@needs_interpreter
@pytest.mark.parametrize(
    ("kind", "loaded", "stored"),
    [
        ("masked", 40 * 2, 40 * 2),
        ("whole", 48 * 2, 48 * 2),
        ("scalar", 3 * 2, 3 * 2),
        ("descriptor", 40 * 2, 40 * 2),
        ("add", 40 * 4, 40 * 4),
        ("swap", 3 * 4, 3 * 4),
    ],
)
def test_lanes_are_counted_by_mask_and_element_size(kind, loaded, stored):
    src, dst = torch.ones(48).bfloat16(), torch.zeros(48, dtype=torch.bfloat16)
    counter = torch.zeros(48, dtype=torch.int32)
    with counted() as traffic:
        _copy[(3,)](src, dst, counter, 40, BLOCK=16, KIND=kind)
    assert (traffic.loaded, traffic.stored) == (loaded, stored)
    assert dst.any() or counter.any()


@needs_interpreter
def test_counting_ends_with_the_block():
    before = dict(vars(interpreter_builder))
    x = torch.zeros(48)
    with counted() as traffic:
        assert vars(interpreter_builder) != before
    with pytest.raises(ValueError, match="stopped"), counted():
        raise ValueError("stopped")
    assert vars(interpreter_builder) == before
    _copy[(3,)](x, x, x, 40, BLOCK=16, KIND="whole")
    assert traffic.total == 0


@needs_interpreter
def test_a_kernel_that_moves_twice_as_much_is_seen():
    spec = next(spec for spec in load() if spec.name == "gather")
    case = Case(L=1, T=64, G=1, D=128, rotate=False)

    def twice(**inputs):
        spec.launch(**inputs)
        return spec.launch(**inputs)

    once = over_floor(spec, case, torch.float16)
    assert 1 <= once <= 1.05
    assert over_floor(dataclasses.replace(spec, launch=twice), case, torch.float16) == 2 * once


@needs_interpreter
def test_rows_left_out_move_no_bytes():
    spec = next(spec for spec in load() if spec.name == "gather")
    case = Case(T=50, G=2, D=64, L=1, rotate=False)
    moved = []
    for slots in ("runs", "holes", "none"):
        inputs = spec.inputs(dataclasses.replace(case, slots=slots), torch.float16, "cpu")
        with counted() as traffic:
            spec.launch(**inputs)
        moved.append(traffic)
    full, holes, none = moved
    row = 2 * 2 * 64 * 2  # K and V, two heads
    assert full.stored == 50 * row
    assert holes.stored == 40 * row
    assert full.loaded - holes.loaded == 10 * row
    assert none.stored == 0


@pytest.mark.skipif(interpreted(), reason="this process is interpreting")
def test_counting_needs_the_interpreter():
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"), counted():
        pass


@pytest.mark.skipif(interpreted(), reason="this process is interpreting already")
@pytest.mark.heavy
@pytest.mark.alone
def test_counting_in_an_interpreting_process():
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    if run.returncode or "9 passed, 2 skipped" not in run.stdout:
        pytest.fail(f"TRITON_INTERPRET=1 pytest:\n{run.stdout}{run.stderr}", pytrace=False)
