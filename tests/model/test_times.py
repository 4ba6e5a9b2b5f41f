"""The time model: work counted row by row, seconds by the formula, break-even by its meaning."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmc.model.times import TierSpeed, TTFTModel, load, prefill_work

MODEL = TTFTModel(
    fixed_s=0.02,
    per_row_s=1e-4,
    per_pair_s=1e-8,
    blend_s=0.05,
    bytes_per_token=1e5,
    tiers=(TierSpeed("host", 0.0, 1e10), TierSpeed("disk", 0.01, 1e9)),
)
TOKENS = st.integers(1, 60)


@st.composite
def models(draw: st.DrawFn) -> TTFTModel:
    """Any mixture of slow and fast computing and loading."""
    some = st.one_of(st.just(0.0), st.floats(1e-6, 1))
    return TTFTModel(
        fixed_s=draw(some),
        per_row_s=draw(some),
        per_pair_s=draw(some),
        bytes_per_token=1.0,
        tiers=(TierSpeed("disk", draw(some), draw(st.floats(0.1, 1e6))),),
        overlap=draw(st.floats(0, 1)),
    )


@given(T=TOKENS, data=st.data())
def test_rows_and_pairs_are_those_of_brute_force(T: int, data: st.DataObject) -> None:
    found = data.draw(st.integers(0, T))
    computed = range(min(found, T - 1), T)
    rows, pairs = prefill_work(T, found)
    assert (rows, pairs) == (len(computed), sum(p + 1 for p in computed))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((10, 11), "T 10 to 10, found 11 to 11; want T of at least 1 and 0 to T"),
        ((10, -1), "found -1 to -1"),
        ((0, 0), "T 0 to 0"),
    ],
)
def test_work_that_cannot_be(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prefill_work(*arguments)


def test_seconds_by_hand() -> None:
    # computing: 0.02 + 100 rows and 5,050 pairs; loading: 300 tokens of 1e5 bytes from disk
    compute, loading = 0.02 + 100 * 1e-4 + 5050 * 1e-8, 0.01 + 300 * 1e5 / 1e9
    for overlap in (0.0, 0.25, 1.0):
        model = replace(MODEL, overlap=overlap)
        want = compute + loading - overlap * min(compute, loading)
        assert model.seconds(100, 5050, [0, 300]) == pytest.approx(want)
    both = MODEL.seconds([100, 100], [5050, 5050], [[0, 0], [10, 300]], [False, True])
    assert both == pytest.approx([compute, compute + 0.05 + loading + 10 * 1e5 / 1e10])


@given(models(), st.integers(0, 50), st.integers(0, 50))
def test_full_overlap_takes_as_long_as_the_longer_half(
    model: TTFTModel, rows: int, found: int
) -> None:
    compute = model.seconds(rows, rows * 9, [0])
    loading = model.load_s([found])
    whole = replace(model, overlap=1.0).seconds(rows, rows * 9, [found])
    assert whole == pytest.approx(max(compute, loading))
    assert whole <= model.seconds(rows, rows * 9, [found]) * (1 + 1e-9)
    assert model.seconds(rows, rows * 9, [found]) <= (compute + loading) * (1 + 1e-9)


@given(models(), st.integers(2, 40))
def test_break_even_is_where_reuse_stops_being_slower(model: TTFTModel, T: int) -> None:
    full = model.seconds(*prefill_work(T, 0), [0])
    slower = [
        found for found in range(1, T) if model.seconds(*prefill_work(T, found), [found]) > full
    ]
    if not slower:
        assert model.break_even("disk", T) == 1
    elif slower[-1] == T - 1:
        assert model.break_even("disk", T) is None
    else:
        assert model.break_even("disk", T) == slower[-1] + 1


def test_break_even_by_hand() -> None:
    # 10 ms to begin with, then 0.1 ms a token against the 0.2 ms that computing takes
    disk = TTFTModel(0.02, 2e-4, 0.0, 1e5, (TierSpeed("disk", 0.01, 1e9),))
    assert disk.break_even("disk", 1000) == pytest.approx(100, abs=1)  # rounding decides the tie
    assert disk.break_even("disk", 50) is None
    assert replace(disk, overlap=1.0).break_even("disk", 1000) == pytest.approx(1, abs=1)


@pytest.mark.parametrize(
    ("tier", "T", "words"),
    [
        (
            TierSpeed("disk", 0.05005, 1e9),
            4000,
            "disk: loading 1,000 tokens takes 0.15 s, computing the first 1,000 of a prompt "
            "0.2 s: reuse is slower than computing below 501 found tokens of 4,000",
        ),
        (TierSpeed("s3", 0.02, 1e8), 4000, "however many of 4,000 tokens are found"),
        (TierSpeed("host", 0.0, 1e10), 300, "never slower than computing, in prompts of 300"),
    ],
    ids=["disk", "s3", "host"],
)
def test_verdict(tier: TierSpeed, T: int, words: str) -> None:
    assert words in TTFTModel(0.02, 2e-4, 0.0, 1e5, (tier,)).verdict(tier.name, T)


def test_unknown_tier_or_nothing_to_find() -> None:
    with pytest.raises(ValueError, match="got 'tape'; valid: host, disk"):
        MODEL.break_even("tape", 10)
    with pytest.raises(ValueError, match="T: got 1, want at least 2"):
        MODEL.verdict("disk", 1)
    with pytest.raises(ValueError, match=r"shape \[3, 1\], want one column for each.*host, disk"):
        MODEL.load_s([[1], [2], [3]])


@given(models())
def test_profile_comes_back(tmp_path_factory: pytest.TempPathFactory, model: TTFTModel) -> None:
    path = tmp_path_factory.mktemp("profile") / "p.yaml"
    whole = replace(model, model="m", provenance={"rows": 3, "commits": ["a"]})
    whole.save(path)
    assert load(path) == whole


def test_an_infinite_bandwidth_is_kept(tmp_path: Path) -> None:
    free = replace(MODEL, tiers=(TierSpeed("host", 0.0, float("inf")),))
    free.save(tmp_path / "p.yaml")
    assert load(tmp_path / "p.yaml") == free
    assert free.load_s([10]) == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"overlap": 1.5}, "overlap: got 1.5, want 0 to 1"),
        ({"per_row_s": -1}, "per_row_s: got -1.0, want 0 or more"),
        ({"per_row_s": "fast"}, "per_row_s: Input should be a valid number"),
        ({"bytes_per_token": 0}, "bytes_per_token: got 0.0, want above 0"),
        ({"per_roe_s": 1}, "per_roe_s: Unexpected keyword argument"),
        ({"tiers": [{"name": "a", "latency_s": 0}]}, "tiers.0.bytes_per_s: .*required"),
        ({"tiers": [{"name": "a", "latency_s": 0, "bytes_per_s": 0}]}, "bytes_per_s 0.0, want"),
        ({"tiers": [{"name": "a", "latency_s": -1, "bytes_per_s": 1}]}, "latency_s -1.0, want"),
        (
            {"tiers": [{"name": "a", "latency_s": 0, "bytes_per_s": 1} for _ in range(2)]},
            "a, a, want each",
        ),
    ],
)
def test_wrong_profiles(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    import yaml

    path = tmp_path / "p.yaml"
    MODEL.save(path)
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        load(path)


def test_no_profile(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        load(tmp_path / "p.yaml")
    (tmp_path / "p.yaml").write_text("a: [")
    with pytest.raises(ValueError, match="is not YAML"):
        load(tmp_path / "p.yaml")


def test_no_torch_and_no_vllm_come_with_it() -> None:
    code = (
        "import sys, lmc.results.fit, lmc.sim.queueing, lmc.cli.fit, lmc.results.rows\n"
        "print(sorted({'torch', 'vllm', 'transformers', 'numba'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"\xff\xfe", "is not UTF-8"),
        (b"[" * 5000, "is not YAML"),
        (b"a: &a [1]\nb: [*a, *a]\n", "aliases are not allowed"),
        (b"provenance: {gpus: null}", "got gpus None"),
        (b"provenance: {gpus: -3}", "got gpus -3"),
        (b"provenance: {gpus: many}", "got gpus 'many'"),
        (b"provenance: {gpus: .inf}", "got gpus inf"),
    ],
    ids=["bytes", "nested", "aliases", "null", "below", "word", "inf"],
)
def test_files_that_mean_harm(tmp_path: Path, text: bytes, message: str) -> None:
    path = tmp_path / "p.yaml"
    path.write_bytes(text)
    if text.startswith(b"provenance"):
        MODEL.save(path)
        path.write_bytes(path.read_bytes().replace(b"provenance: {}\n", b"") + text)
    with pytest.raises(ValueError, match=message) as raised:
        load(path)
    assert str(path) in str(raised.value)


def test_what_a_file_says_of_itself_is_a_name() -> None:
    said = replace(MODEL, model="\x1b[31mred\n", provenance={"device": ["x" * 10_000]}).origin
    assert said.isprintable() and len(said) < 300
