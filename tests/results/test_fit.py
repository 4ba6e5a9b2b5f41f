"""The fit gives back the constants that rows were made with, and says what rows cannot tell."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from typer.testing import CliRunner

from lmc.blend.evidence import Run
from lmc.cli.fit import fit as fit_command
from lmc.model.shape import shape
from lmc.model.times import TierSpeed, TTFTModel, load
from lmc.results.fit import CONSTANTS, Fit, fit, nnls
from lmc.results.rows import ROWS

SHAPE = shape("smollm2-135m")
MODEL = TTFTModel(
    fixed_s=0.02,
    per_row_s=7e-4,
    per_pair_s=1e-6,
    blend_s=0.06,
    bytes_per_token=SHAPE.bytes_per_token("float32"),
    tiers=(TierSpeed("host", 0.0, 1.6e9),),
)
SYSTEM, DOCUMENT, QUESTION = 48, 256, 32
LENGTHS = (3, 5, 7)  # documents in a prompt, as experiments/ttft_fit.yaml has them


def test_constants_come_back(design: list[dict[str, Any]]) -> None:
    found = fit(design)
    for name in CONSTANTS:
        assert getattr(found.model, name) == pytest.approx(getattr(MODEL, name), rel=1e-6)
    assert found.model.tiers[0].bytes_per_s == pytest.approx(1.6e9, rel=1e-6)
    assert found.model.bytes_per_token == MODEL.bytes_per_token
    assert found.warnings == []
    assert all(r.absolute < 1e-6 for r in found.residuals)


@settings(max_examples=25)
@given(
    fixed=st.floats(0, 1),
    per_row=st.floats(1e-6, 1e-2),
    per_pair=st.floats(0, 1e-5),
    blend=st.floats(0, 1),
    rate=st.floats(1e7, 1e11),
)
def test_any_constants_come_back(
    fixed: float, per_row: float, per_pair: float, blend: float, rate: float
) -> None:
    true = TTFTModel(fixed, per_row, per_pair, 46080, (TierSpeed("host", 0, rate),), blend)
    found = fit(rows_of(true)).model
    # What a term adds to the slowest request is all that a fit can be held to.
    assert found.fixed_s == pytest.approx(fixed, abs=1e-6)
    assert found.per_row_s * 1872 == pytest.approx(per_row * 1872, abs=1e-6)
    assert found.per_pair_s * 1.8e6 == pytest.approx(per_pair * 1.8e6, abs=1e-6)
    assert found.blend_s == pytest.approx(blend, abs=1e-6)
    assert found.load_s([1840]) == pytest.approx(true.load_s([1840]), abs=1e-6)


def test_a_forward_of_lmc_is_told_from_the_suffix_that_the_engine_computes() -> None:
    """Neither rows recomputed to the last one nor a token found but not loaded mislead."""
    found = fit(rows_of(MODEL, arms=(*ARMS, "full_recompute", "whole_prompt"))).model
    assert found.blend_s == pytest.approx(MODEL.blend_s, rel=1e-6)
    assert found.fixed_s == pytest.approx(MODEL.fixed_s, rel=1e-6)


def test_intervals_cover_the_constants_under_noise() -> None:
    true = {**{name: getattr(MODEL, name) for name in CONSTANTS}, "host": 1.6e9}
    covered = []
    for seed in range(20):
        noise = np.random.default_rng(seed).lognormal(sigma=0.05, size=1000)
        found = fit(rows_of(MODEL, noise=noise.tolist()))
        covered += [e.low <= true[name] <= e.high for name, e in found.estimates.items()]
        assert max(r.absolute for r in found.residuals) < 0.1
    # Percentile intervals over 15 prompts are narrower than 95%; without noise all would cover.
    assert 0.8 < np.mean(covered) <= 1
    assert len(covered) == 20 * 5


@given(
    arrays(np.float64, (8, 4), elements=st.integers(-4, 4)),
    arrays(np.float64, 8, elements=st.integers(-4, 4)),
)
def test_nnls_meets_the_conditions_of_its_optimum(a: np.ndarray, b: np.ndarray) -> None:
    x = nnls(a.T @ a, a.T @ b)
    gradient = a.T @ (a @ x - b)
    assert (x >= 0).all()
    assert (gradient >= -1e-6).all()
    assert abs(gradient @ x) < 1e-6


def test_nnls_solves_many_at_once() -> None:
    a = np.random.default_rng(0).normal(size=(6, 9, 3))
    grams, moments = a.transpose(0, 2, 1) @ a, a.sum(axis=1)
    one_by_one = [nnls(g, m) for g, m in zip(grams, moments, strict=True)]
    assert nnls(grams, moments) == pytest.approx(np.stack(one_by_one))


def test_an_arm_that_the_model_misses_shows(design: list[dict[str, Any]]) -> None:
    slow = [r | {"ttft_s": r["ttft_s"] * 2} if r["arm"] == "epic16" else r for r in design]
    signed = {r.arm: r.signed for r in fit(slow).residuals}
    assert min(signed, key=signed.__getitem__) == "epic16"
    assert signed["epic16"] < -0.1


def test_one_length_is_said_and_so_are_terms_that_it_confounds() -> None:
    rows = rows_of(MODEL, lengths=(7,), arms=("full_prefill", "prefix_equal_rows"))
    found = fit(rows, SHAPE)
    assert "all prompts have 1,872 tokens" in said(found)
    assert "hardly tell apart fixed_s, per_row_s, per_pair_s (condition number" in said(found)
    assert "blend_s: no row needed it" in said(found)
    assert "no row loaded anything" in said(found)
    assert found.model.tiers == ()


def test_a_term_that_takes_no_time_is_said(design: list[dict[str, Any]]) -> None:
    free = TTFTModel(0.02, 7e-4, 1e-6, 46080, (TierSpeed("host", 0, float("inf")),), 0.0)
    found = fit(rows_of(free))
    assert "loading from host: the time it takes cannot be told from 0" in said(found)
    assert found.model.load_s([1840]) == pytest.approx(0, abs=1e-9)


def test_few_prompts_and_mixed_versions_are_said(design: list[dict[str, Any]]) -> None:
    few = [r for r in design if r["prompt_id"] == 0]
    assert "3 different prompts only" in said(fit(few))
    other = [design[0] | {"git_commit": "b", "packages": {"vllm": "0.33"}}, *design[1:]]
    assert "versions are mixed: commit, vllm" in said(fit(other))


def test_the_shape_stands_in_where_rows_do_not_tell(design: list[dict[str, Any]]) -> None:
    blends = [r for r in design if r["arm"] in ("full_prefill", "full_reuse", "epic16", "epic128")]
    assert fit(blends, SHAPE).model.per_pair_s == pytest.approx(1e-6, rel=1e-6)
    with pytest.raises(ValueError, match=r"do not tell the model's FLOPs.*name the model"):
        fit(blends)
    stock = [r for r in design if not r["bytes"]]
    assert fit(stock, SHAPE).model.bytes_per_token == SHAPE.bytes_per_token("float32")
    with pytest.raises(ValueError, match="KV bytes per token are unknown: name the model"):
        fit(stock)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: {"device": "GPU"}, "device is 'GPU' in one row and 'CPU' in another"),
        (lambda row: {"config": {"model": "smollm2", "engine": {"dtype": "half"}}}, "engine.dtype"),
        (lambda row: {"flops_fraction": row["flops_fraction"] * 0.9}, "do not agree on FLOPs"),
        (lambda row: {"ttft_s": 0.0}, "ttft_s: got 0.0, want above 0"),
    ],
    ids=["device", "dtype", "flops", "seconds"],
)
def test_rows_that_do_not_belong_together(
    design: list[dict[str, Any]], change: Callable[[dict], dict], message: str
) -> None:
    i = next(i for i, r in enumerate(design) if r["arm"] == "prefix_half")
    changed = design[i] | change(design[i])
    with pytest.raises(ValueError, match=message):
        fit([changed, *design[:i], *design[i + 1 :]])


def test_no_rows_or_others() -> None:
    with pytest.raises(ValueError, match="no rows"):
        fit([])
    with pytest.raises(ValueError, match="a row lacks bytes, compute_fraction"):
        fit([{"arm": "full_prefill"}])
    with pytest.raises(ValueError, match="do not agree on FLOPs"):
        fit(rows_of(MODEL), shape("llama-3.1-8b"))


# -- the command -------------------------------------------------------------------------------


@pytest.fixture
def lmc_fit() -> Callable[..., Any]:
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(fit_command)
    return lambda *arguments: CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.fixture
def results(tmp_path: Path, design: list[dict[str, Any]]) -> list[Path]:
    """One folder a prompt length, as `lmc run` needs them."""
    for row in design:
        folder = tmp_path / str(row["prompt_tokens"])
        folder.mkdir(exist_ok=True)
        with (folder / ROWS).open("a") as file:
            file.write(json.dumps(row) + "\n")
    return sorted(tmp_path.iterdir())


def test_command_prints_constants_and_verdicts(
    lmc_fit: Callable[..., Any], results: list[Path]
) -> None:
    done = lmc_fit(*results, "--tier", "s3:0.05GiB,latency_s=0.02")
    assert done.exit_code == 0, done.output
    assert "0.7 ms" in done.output
    assert "1.49 GiB/s" in done.output  # 1.6e9 bytes
    assert "s3: loading 1,000 tokens takes 0.878 s" in done.output
    assert "warning" not in done.output


def test_command_saves_a_profile_and_prints_json(
    lmc_fit: Callable[..., Any], results: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "profile.yaml"
    done = lmc_fit(*results, "--out", out, "--overlap", "0.5", "--json")
    printed = json.loads(done.output)
    profile = load(out)
    assert printed["times"]["per_row_s"] == profile.per_row_s
    assert profile.overlap == 0.5
    assert profile.model == "smollm2"
    assert profile.provenance["prompt_tokens"] == [848, 1872]
    assert len(profile.provenance["files"]) == 3
    assert [r["arm"] for r in printed["residuals"]] == list(ARMS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tier", "disk"], "bytes_per_s: "),
        (["--tier", "disk:fast"], "got 'fast', want a number"),
        (["--tier", "disk:2:0.1"], "2:0.1"),
        (["--tier", "host:2GiB"], "tiers: got host, host, want each name once"),
        (["--overlap", "2"], "overlap: got 2.0, want 0 to 1"),
        (["--model", "gpt"], "model: got 'gpt'"),
    ],
)
def test_command_refuses(
    lmc_fit: Callable[..., Any],
    results: list[Path],
    tmp_path: Path,
    arguments: list[str],
    message: str,
) -> None:
    out = tmp_path / "profile.yaml"
    done = lmc_fit(*results, *arguments, "--out", out)
    assert done.exit_code == 2
    assert message in done.output
    assert not out.exists()


def test_command_without_results(lmc_fit: Callable[..., Any], tmp_path: Path) -> None:
    done = lmc_fit(tmp_path)
    assert done.exit_code == 2
    assert "no such file" in done.output


# -- rows as `lmc run` writes them, with times that a model says --------------------------------


@pytest.fixture(scope="module")
def design() -> list[dict[str, Any]]:
    return rows_of(MODEL)


def said(found: Fit) -> str:
    return "\n".join(found.warnings)


def work_of(arm: str, n: int) -> tuple[list[Run], dict[str, int], int]:
    """What an arm computes of a prompt of n documents: runs, kinds, tokens loaded.

    The first document stands where it was stored, so it is exact; the others are moved.
    """
    T = SYSTEM + n * DOCUMENT + QUESTION
    kinds = dict.fromkeys(("local", "local_blended", "exact", "moved", "recomputed", "new"), 0)
    if arm in ("full_prefill", "prefix_equal_rows", "prefix_half"):
        link = {"full_prefill": None, "prefix_equal_rows": 16, "prefix_half": 128}[arm]
        local = 0 if link is None else (T - QUESTION - (n - 1) * link) // 32 * 32
        return [(local, T)], kinds | {"local": local, "new": T - local}, 0
    if arm == "whole_prompt":
        return [(T - 1, T)], kinds | {"exact": T - 1, "recomputed": 1}, T - 1
    link = {"full_reuse": 0, "epic16": 16, "epic128": 128, "full_recompute": DOCUMENT}[arm]
    starts = [SYSTEM + i * DOCUMENT for i in range(1, n)]
    found = {
        "exact": SYSTEM + DOCUMENT,
        "moved": (n - 1) * (DOCUMENT - link),
        "recomputed": (n - 1) * link,
        "new": QUESTION,
    }
    runs = [(start, start + link) for start in starts if link]
    return [*runs, (T - QUESTION, T)], kinds | found, T - QUESTION


ARMS = ("full_prefill", "prefix_equal_rows", "full_reuse", "epic16", "epic128", "prefix_half")


def rows_of(
    model: TTFTModel,
    lengths: tuple[int, ...] = LENGTHS,
    arms: tuple[str, ...] = ARMS,
    prompts: int = 5,
    noise: list[float] | None = None,
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for n in lengths:
        T = SYSTEM + n * DOCUMENT + QUESTION
        for arm in arms:
            runs, kinds, loaded = work_of(arm, n)
            pairs = sum(p + 1 for start, end in runs for p in range(start, end))
            computed = sum(end - start for start, end in runs)
            seconds = float(model.seconds(computed, pairs, [loaded], len(runs) > 1))
            for prompt_id in range(prompts):
                rows.append(
                    {
                        "config": {"model": "smollm2", "engine": {"dtype": "float32"}},
                        "git_commit": "a",
                        "packages": {"vllm": "0.32.0"},
                        "device": "CPU",
                        "prompt_hash": f"{n} {prompt_id}",
                        "prompt_id": prompt_id,
                        "arm": arm,
                        "ttft_s": seconds * (noise[len(rows)] if noise else 1.0),
                        "prompt_tokens": T,
                        "kinds": kinds,
                        "compute_fraction": computed / T,
                        "flops_fraction": SHAPE.cost.fraction([(a, b, 1.0) for a, b in runs], T),
                        "bytes": {"host": loaded * 46080} if loaded else {},
                    }
                )
    return rows
