"""Every kernel compiles for every GPU we name, and what the binaries say is what we meant."""

import dataclasses

import pytest

from lmc.kernels.aot import DTYPES, OTHERS, SHARED, SPILLS, TARGETS, compile_variant
from lmc.kernels.spec import interpreted, load

pytestmark = [
    pytest.mark.heavy,
    pytest.mark.alone,
    pytest.mark.skipif(interpreted(), reason="TRITON_INTERPRET replaces the compiler"),
]
SPECS = load()


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPES.get)
@pytest.mark.parametrize(
    ("spec", "variant"), [pytest.param(s, v, id=f"{s.name}-{v}") for s in SPECS for v in s.aot]
)
def test_compiles_without_spills_and_with_wide_access(spec, variant, dtype, target):
    if not spec.supports(variant, target, DTYPES[dtype]):
        pytest.skip(f"{target} cannot run {spec.name} {variant}, or not in {DTYPES[dtype]}")
    binary = compile_variant(spec, variant, dtype, target)
    assert binary.spills == 0
    assert 0 < binary.registers <= 255
    assert binary.shared <= SHARED[target]
    if spec.moves:
        assert binary.registers <= 128
        # Above all for addresses out of a table, where the compiler has only our word for
        # alignment.
        assert (binary.load_bits, binary.store_bits) == (128, 128)


@pytest.mark.slow
@pytest.mark.parametrize("target", OTHERS)
@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_what_spills_on_other_gpus_is_what_the_page_says(spec, target):
    spilling = set()
    for variant in spec.aot:
        for dtype, name in DTYPES.items():
            if not spec.supports(variant, target, name):
                continue
            binary = compile_variant(spec, variant, dtype, target)
            assert binary.shared <= SHARED[target]
            if spec.moves:
                assert (binary.load_bits, binary.store_bits) == (128, 128)
            if binary.spills:
                spilling.add(f"{variant} {name}")
    assert spilling == {*SPILLS.get(target, {}).get(spec.name, ())}


@pytest.mark.parametrize("target", TARGETS)
def test_a_spill_would_be_seen(target):
    spec = SPECS[0]
    huge = {name: {**args, "BLOCK_T": 1024} for name, args in spec.aot.items()}
    variant = next(iter(huge))
    binary = compile_variant(
        dataclasses.replace(spec, aot=huge), variant, next(iter(DTYPES)), target
    )
    assert binary.spills > 0
