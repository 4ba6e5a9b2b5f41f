"""Every kernel as Triton compiled it for a GPU, executed here: tests/ptx/README.md says how.

All cases in all types for all architectures are slow; a part of them is not.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lmc.kernels.cases import Case
from lmc.kernels.checksum import checksum, checksum_reference
from lmc.kernels.query_rows import Prompts
from lmc.kernels.spec import KERNELS, interpreted, load
from tests.kernels.compiled import compiled, verify_compiled
from tests.ptx.device import Device
from tests.ptx.mutants import mutants
from tests.ptx.program import FaultError

pytestmark = [
    pytest.mark.skipif(interpreted(), reason="TRITON_INTERPRET=1 replaces the compiler"),
    pytest.mark.heavy,
    pytest.mark.alone,
]
SPECS = {spec.name: spec for spec in load()}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
ARCHES = ("sm_80", "sm_89", "sm_90")


def runs(spec, case, arch: str) -> bool:
    """Whether hardware of an architecture has the format of a case."""
    return not (arch == "sm_80" and getattr(case, "format", "") == "fp8")


def verify_all(arch: str, name: str, dtypes, every: int = 1) -> int:
    spec, checked = SPECS[name], 0
    with compiled(arch) as device:
        for case in spec.cases[::every]:
            for dtype in dtypes:
                if runs(spec, case, arch):
                    verify_compiled(device, spec, case, dtype)
                    checked += 1
    return checked


@pytest.mark.parametrize("name", KERNELS)
def test_compiled_for_sm_90(name):
    assert verify_all("sm_90", name, DTYPES[:1], every=2)


@pytest.mark.parametrize("name", ["gather", "sparse_attention", "importance", "quantize"])
def test_compiled_for_sm_80(name):
    assert verify_all("sm_80", name, DTYPES[:1], every=4)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", KERNELS)
@pytest.mark.parametrize("arch", ARCHES)
def test_every_case(arch, name):
    assert verify_all(arch, name, DTYPES)


@pytest.mark.parametrize("size", [1, 8, 9, 17, 8 * 2048 + 1])
def test_arguments_of_one_are_no_constants_that_fail_to_compile(size):
    """Triton makes constants of integers that are 1; n % 8 == 1 did not compile."""
    x = torch.arange(size, dtype=torch.uint8)
    with compiled("sm_90"):
        assert int(checksum(x)) == int(checksum_reference(x))
    case = Case(L=1, T=1, G=1, D=16, P=1)
    with compiled("sm_90") as device:
        for name in ("gather", "scatter", "rerotate"):
            verify_compiled(device, SPECS[name], case, torch.bfloat16)


def planted(arch: str, name: str, kind: str, case: Any) -> tuple[int, list[str]]:
    """How many faults were planted in the PTX of a kernel's case, and which were not seen."""
    spec, texts, count = SPECS[name], [], 0

    def verify(rewrite) -> Device:
        with compiled(arch, rewrite) as device:
            verify_compiled(device, spec, case, torch.bfloat16)
        return device

    device = verify(lambda text: texts.append(text) or text)
    missed = []
    for text in dict.fromkeys(texts):
        for what, line, changed in mutants(text, kind):
            counts = device.totals.held_back if kind == "mask" else device.totals.lines
            if not counts[line]:
                continue  # it holds nobody back, or nobody comes to it
            count += 1
            try:
                verify(lambda given, old=text, new=changed: new if given == old else given)
            except (FaultError, AssertionError):
                continue
            missed.append(f"{line}: {what}")
    return count, missed


LONG = Prompts(requests=((300, 140),))  # rows whose tiles have keys that need no mask
# The kernel is right without any one of these, each of which was looked at: barriers, waits and
# fences that Triton writes out of caution, where others order the same; and masks of loads of rows
# that have no slot, which are there in the chunk, and are stored nowhere.
NEEDLESS = {
    ("sm_90", "sparse_attention", "barrier"): 2, ("sm_90", "sparse_attention", "wait"): 1,
    ("sm_90", "sparse_attention", "fence"): 1, ("sm_90", "scatter", "mask"): 6,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    ("arch", "name", "case", "kind"),
    [
        *(("sm_90", "sparse_attention", LONG, kind) for kind in ("barrier", "wait", "fence")),
        *(("sm_90", "gather", SPECS["gather"].cases[2], kind) for kind in ("mask", "address")),
        *(("sm_90", "scatter", SPECS["scatter"].cases[3], kind) for kind in ("mask", "address")),
    ],
)
def test_planted_faults_are_seen(arch, name, case, kind):
    count, missed = planted(arch, name, kind, case)
    assert count
    assert len(missed) == NEEDLESS.get((arch, name, kind), 0), missed
