"""benchmarks/kernels.py as far as it runs without a GPU: what it checks, counts and prints."""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from benchmarks.kernels import copy_rate, failures, measure, table
from lmc.kernels.cases import Case
from lmc.kernels.spec import load

GATHER = next(spec for spec in load() if spec.name == "gather")
SMALL = dataclasses.replace(GATHER, bench=Case(T=32, G=2, D=64, L=3, rotate=False))
SCRIPT = Path(__file__).parents[2] / "benchmarks" / "kernels.py"


@pytest.mark.heavy
def test_without_a_gpu_it_says_so_and_runs_nothing():
    run = subprocess.run(
        [sys.executable, str(SCRIPT)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stderr) == (0, "")
    here = torch.version.cuda or torch.version.hip
    why = "No GPU here" if here else f"PyTorch {torch.__version__} knows no GPU"
    assert run.stdout == f"{why}: no kernel was run.\n"


def test_a_wrong_kernel_is_named_with_its_case_and_the_others_still_run():
    assert failures([SMALL], "cpu") == {}

    def one_short(paged, slots, out):
        return GATHER.launch(paged, slots[1:], out[:, :, 1:])

    def broken(**inputs):
        raise RuntimeError("does not compile")

    wrong = [
        dataclasses.replace(SMALL, launch=launch, name=name)
        for launch, name in ((one_short, "short"), (broken, "broken"))
    ]
    by_kernel = failures([wrong[0], SMALL, wrong[1]], "cpu")
    assert list(by_kernel) == ["short", "broken"]
    found = [line for lines in by_kernel.values() for line in lines]
    missed = [line for line in found if "a row missed" in line]
    assert {line.split()[2].rstrip(":") for line in missed} == {"fp32", "fp16", "bf16"}
    assert missed[0].startswith(f"short {GATHER.cases[0]} fp16: AssertionError")
    assert len([line for line in found if "does not compile" in line]) == 3 * len(GATHER.cases)


def test_rates_follow_from_the_floor_and_the_time():
    nbytes = SMALL.bytes(SMALL.bench, 2)
    row = measure(SMALL, "cpu", cache=0, copied=1e9, timer=lambda call: call() is None or 2.0)
    assert row["bytes"] == nbytes == 4 * 3 * 32 * 2 * 64 * 2 + 8 * 32
    assert row["ms"] == 2
    assert row["gb_per_s"] == pytest.approx(nbytes / 2e6)
    assert row["of_copy"] == pytest.approx(nbytes / 2e6)
    assert row["tflop_per_s"] is None
    json.dumps(row)

    hot = dataclasses.replace(SMALL, flops=lambda case: 10**9)
    row = measure(hot, "cpu", cache=0, copied=1e9, timer=lambda call: 0.5)
    assert row["tflop_per_s"] == pytest.approx(2)


def test_inputs_take_turns_until_the_cache_cannot_hold_them():
    """Twice the cache's size lies between two uses of the same input."""
    seen = []
    spec = dataclasses.replace(SMALL, launch=lambda **inputs: seen.append(inputs["slots"]))
    nbytes = spec.bytes(spec.bench, 2)

    def timer(call):
        for _ in range(12):
            call()
        return 1.0

    measure(spec, "cpu", cache=2 * nbytes, copied=1.0, timer=timer)
    firsts = [next(i for i, x in enumerate(seen) if x is y) for y in seen]
    assert firsts == [i % 5 for i in range(12)]


def test_the_rate_of_a_copy_counts_both_ways():
    ran = []
    rate = copy_rate(1000, "cpu", lambda call: ran.append(call()) or 4.0)
    assert rate == pytest.approx(2 * 1000 / 4e-3)
    assert ran[0].shape == (1000,)


def test_table_shows_every_row():
    times = itertools.count(1)
    row = measure(SMALL, "cpu", cache=0, copied=1e9, timer=lambda call: float(next(times)))
    console = Console(width=100)
    with console.capture() as capture:
        other = {**row, "kernel": "other", "tflop_per_s": 3.4, "agrees": False}
        console.print(table([{**row, "agrees": True}, other], "made-up GPU"))
    text = capture.get()
    assert text.count("(WRONG)") == 1
    assert "gather" in text and "other" in text and "made-up GPU" in text
    assert str(SMALL.bench) in text and "1.000" in text
