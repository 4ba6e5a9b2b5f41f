"""Times by arithmetic: orders of magnitude, what they scale with, and what is refused."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from lmc.model.gpus import GPUS, gpu_times, times_for
from lmc.model.shape import shape
from lmc.model.times import TTFTModel, load, prefill_work

LLAMA = shape("llama-3.1-8b")


def ttft(gpu: str, T: int, found: int = 0) -> float:
    times = gpu_times(gpu, LLAMA)
    return float(times.seconds(*prefill_work(T, found), [found, 0, 0]))


def test_a_prefill_by_hand() -> None:
    # 2 FLOPs for each of 6.98e9 weights in layers and row, at 0.6 of 989 TFLOP/s; 4 H D L for each
    # of 8192 * 8193 / 2 pairs at 0.35 of it; all weights once at 0.8 of 3.35 TB/s, and 5 ms.
    weights = 32 * (4096 * (2 * 4096 + 2 * 1024) + 3 * 4096 * 14336)
    linear = 2 * weights * 8192 / (0.6 * 989e12)
    attention = 4 * 4096 * 32 * 8192 * 8193 / 2 / (0.35 * 989e12)
    once = 2 * weights / (0.8 * 3.35e12) + 0.005
    assert ttft("h100", 8192) == pytest.approx(linear + attention + once)


@pytest.mark.parametrize("gpu", GPUS)
def test_more_gpus_and_more_found_are_sooner(gpu: str) -> None:
    assert ttft(f"8x{gpu}", 32_768) < ttft(gpu, 32_768) / 4
    assert ttft(gpu, 32_768, found=32_000) < ttft(gpu, 32_768) / 4
    assert gpu_times(gpu, LLAMA).provenance["kind"] == "arithmetic, not measured"


@pytest.mark.parametrize("gpu", ["", "h1000", "0xh100", "h100x8", "x", "100xh100", "8x"])
def test_another_name_is_refused(gpu: str) -> None:
    with pytest.raises(ValueError, match="want one of a100, l40s, h100"):
        gpu_times(gpu, LLAMA)


def test_times_of_another_model_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "times.yaml"
    gpu_times("h100", LLAMA, model="llama-3.1-8b").save(file)
    assert times_for(str(file), LLAMA, None, "llama-3.1-8b").model == "llama-3.1-8b"
    with pytest.raises(
        ValueError,
        match=r"is of llama-3.1-8b with 131,072 bytes.*a-70b in bfloat16 has 327,680",
    ):
        times_for(str(file), shape("llama-3.1-70b"), None, "a-70b")
    with pytest.raises(ValueError, match="in fp8 has 65,536"):
        times_for(str(file), LLAMA, "fp8", "llama-3.1-8b")
    with pytest.raises(ValueError, match="'h101', which is no file; GPU: got"):
        times_for("h101", LLAMA, None, "llama-3.1-8b")
    with pytest.raises(ValueError, match=r"nowhere.yaml: cannot be read"):
        times_for("nowhere.yaml", LLAMA, None, "llama-3.1-8b")


def test_times_of_a_model_of_the_same_size_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "times.yaml"
    gpu_times("h100", LLAMA, model="llama-3.1-8b").save(file)
    mistral = shape("mistral-7b-v0.3")
    assert mistral.bytes_per_token() == LLAMA.bytes_per_token()
    with pytest.raises(ValueError, match=r"is of llama-3.1-8b, got the model mistral-7b-v0\.3"):
        times_for(str(file), mistral, None, "mistral-7b-v0.3")


def test_saved_times_say_what_they_are(tmp_path: Path) -> None:
    file = tmp_path / "times.yaml"
    made = gpu_times("8xmi300x", LLAMA, "fp8", "llama-3.1-8b")
    made.save(file)
    again = times_for(str(file), LLAMA, "fp8", "llama-3.1-8b")
    assert again == made
    assert np.isclose(again.tiers[0].bytes_per_s, 8 * 55e9)


def test_times_say_whose_they_are() -> None:
    known = shape("llama-3.1-8b")
    arithmetic = gpu_times("8xh100", known, model="llama-3.1-8b")
    assert arithmetic.origin == "llama-3.1-8b on 8 x h100, arithmetic, not measured"
    measured = load(Path("benchmarks/times/smollm2-135m-cpu.yaml"))
    assert measured.origin == "smollm2 on AMD EPYC, 2 threads, measured"
    assert "not named" in replace(measured, provenance={}).origin


def test_the_page_has_each_field() -> None:
    page = Path("docs/times.md").read_text()
    rows = [line.split("|")[1].strip() for line in page.splitlines() if line.startswith("| `")]
    assert {name.strip("`") for name in rows} == {field.name for field in fields(TTFTModel)}
