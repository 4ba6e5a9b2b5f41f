"""Constants of `TTFTModel`, fitted to the rows that `lmc run` measured."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lmc.model.shape import ModelShape
from lmc.model.times import TierSpeed, TTFTModel, prefill_work
from lmc.results.rows import Row
from lmc.results.statistics import RESAMPLES, Estimate

COLUMNS = (
    "arm",
    "bytes",
    "compute_fraction",
    "config",
    "device",
    "flops_fraction",
    "kinds",
    "prompt_hash",
    "prompt_tokens",
    "ttft_s",
)
CONSTANTS = ("fixed_s", "per_row_s", "per_pair_s", "blend_s")
COLLINEAR = 30  # condition number from which terms count as confounded (Belsley et al. 1980)
FEW_PROMPTS = 5


@dataclass(frozen=True)
class Residual:
    """How far the model is from one arm: medians of predicted over measured seconds, minus 1.

    absolute: of the size of it. signed: below 0, the model is too fast.
    """

    arm: str
    rows: int
    absolute: float
    signed: float


@dataclass(frozen=True)
class Fit:
    """A fitted model, and how far to trust it.

    Attributes:
        model: with the tiers that the rows loaded from, whose latency is inside the constants.
        estimates: the value and its 95% interval, by name of the constant; by name of the tier,
            its bytes per second.
        residuals: by arm, in the order of the rows.
        warnings: what these rows could not tell, in words.
    """

    model: TTFTModel
    estimates: dict[str, Estimate]
    residuals: list[Residual]
    warnings: list[str]


def fit(rows: Sequence[Row], shape: ModelShape | None = None) -> Fit:
    """Nonnegative least squares over rows of one model, engine and device.

    Every row counts, whatever its arm and engine: what was computed and loaded for it is known,
    also where a request was not blended. There are no warm-up rows to drop, since `lmc run` sends
    each arm's first request untimed before. Each row is weighted by 1 / ttft_s, so that the sum
    of squared relative errors is least. Tokens in vLLM's own cache (`local`) cost nothing to
    load. `overlap` is 0, since lmc loads everything before it computes.

    The intervals are percentiles of a bootstrap over prompts, all rows of one drawn together. With
    15 prompts they cover the truth in 80 to 97 of 100 cases, by constant, not in 95; and what
    slowed the machine down all the time is in none of them.

    Args:
        rows: of one or more results folders.
        shape: of the model, for rows that tell neither its FLOPs (no prompt was partly in vLLM's
            cache) nor its bytes per token (nothing was loaded).

    Raises:
        ValueError: no rows, rows of different models, engines or devices, rows and a shape that
            contradict each other, or neither of them tells.
    """
    model = _check(rows)
    bytes_per_token = _bytes_per_token(rows, shape)
    names, design = _design(rows, _attention_per_linear(rows, shape), bytes_per_token)
    seconds = np.array([row["ttft_s"] for row in rows])
    # Columns of unit length make the condition number a matter of directions, not of units.
    weighted = design / seconds[:, None]
    scale = np.linalg.norm(weighted, axis=0)
    grams, moments = _by_prompt(rows, weighted / scale)
    solution = nnls(grams.sum(axis=0), moments.sum(axis=0)) / scale
    rng = np.random.default_rng(0)
    draws = rng.integers(len(grams), size=(RESAMPLES, len(grams)))
    counts = np.stack([np.bincount(draw, minlength=len(grams)) for draw in draws])
    resampled = nnls(np.tensordot(counts, grams, 1), np.tensordot(counts, moments, 1)) / scale
    low, high = np.percentile(resampled, [2.5, 97.5], axis=0)

    constants = dict.fromkeys(CONSTANTS, Estimate(0.0, 0.0, 0.0))
    for name, value, lo, hi in zip(names, solution, low, high, strict=True):
        constants[name] = Estimate(float(value), float(lo), float(hi))
    estimates = {name: e if name in CONSTANTS else _rate(e) for name, e in constants.items()}
    fixed, per_row, per_pair, blend = (estimates[name].value for name in CONSTANTS)
    return Fit(
        TTFTModel(
            fixed_s=fixed,
            per_row_s=per_row,
            per_pair_s=per_pair,
            blend_s=blend,
            bytes_per_token=bytes_per_token,
            tiers=tuple(
                TierSpeed(name, 0.0, e.value)
                for name, e in estimates.items()
                if name not in CONSTANTS
            ),
            model=model,
            provenance=_provenance(rows, estimates),
        ),
        estimates,
        _residuals(rows, design @ solution / seconds - 1),
        _warnings(rows, names, constants, grams.sum(axis=0)),
    )


def nnls(gram: np.ndarray, moment: np.ndarray) -> np.ndarray:
    """[..., K] the x of no negative entry that minimises x' gram x - 2 moment' x.

    gram: [..., K, K] positive semidefinite, of columns of about equal length; moment: [..., K].
    The least squares solution of each subset of the columns is tried, and the best one without a
    negative entry taken: that is exact, and short for the few columns there are.
    """
    K = moment.shape[-1]
    best, best_gain = np.zeros_like(moment), np.zeros(moment.shape[:-1])
    for size in range(1, K + 1):
        for columns in itertools.combinations(range(K), size):
            part = gram[..., columns, :][..., columns]
            inverse = np.linalg.pinv(part, rcond=1e-12, hermitian=True)
            x = np.zeros_like(moment)
            x[..., columns] = np.einsum("...ij,...j->...i", inverse, moment[..., columns])
            gain = 2 * np.sum(moment * x, -1) - np.einsum("...i,...ij,...j->...", x, gram, x)
            better = (gain > best_gain) & np.all(x >= 0, axis=-1)
            best = np.where(better[..., None], x, best)
            best_gain = np.where(better, gain, best_gain)
    return best


def _check(rows: Sequence[Row]) -> str:
    """The model that all rows are of; they must agree on engine settings and device too."""
    if not rows:
        raise ValueError("got no rows to fit")
    about: dict[str, Any] = {}
    for row in rows:
        if missing := [name for name in COLUMNS if name not in row]:
            raise ValueError(f"a row lacks {', '.join(missing)}; want rows that `lmc run` wrote")
        if not row["ttft_s"] > 0:
            raise ValueError(f"ttft_s: got {row['ttft_s']}, want above 0")
        config = row["config"]
        settings = {"model": config["model"], "device": row["device"]}
        settings |= {f"engine.{name}": value for name, value in config["engine"].items()}
        for name, value in settings.items():
            if about.setdefault(name, value) != value:
                raise ValueError(
                    f"rows of different measurements: {name} is {about[name]!r} in one row and "
                    f"{value!r} in another; fit each alone"
                )
    return str(about["model"])


def _design(
    rows: Sequence[Row], attention: float, bytes_per_token: float
) -> tuple[list[str], np.ndarray]:
    """[rows, columns] what each constant is multiplied by, and their names; none is all zero.

    attention: FLOPs of a pair over those of a row.
    """
    T = np.array([row["prompt_tokens"] for row in rows], np.float64)
    computed = T * [row["compute_fraction"] for row in rows]
    flops = (T + attention * _pairs(T)) * [row["flops_fraction"] for row in rows]
    pairs = (flops - computed) / attention
    # lmc runs a forward of its own over rows among reused tokens. Those a strategy chose were
    # loaded all the same, though no exact or moved tokens; gaps show in that the rows attend to
    # fewer keys than the last rows would.
    loaded = np.array([sum(row["bytes"].values()) for row in rows]) / bytes_per_token
    kept = np.array([row["kinds"]["exact"] + row["kinds"]["moved"] for row in rows])
    gaps = pairs < _pairs(T) - _pairs(T - computed) - 0.5
    blends = (loaded > kept + 0.5) | gaps
    columns = {
        "fixed_s": np.ones_like(T),
        "per_row_s": computed,
        "per_pair_s": pairs,
        "blend_s": blends.astype(np.float64),
    }
    for tier in sorted({tier for row in rows for tier in row["bytes"]}):
        columns[tier] = np.array([row["bytes"].get(tier, 0.0) for row in rows])
    columns = {name: column for name, column in columns.items() if column.any()}
    return list(columns), np.stack(list(columns.values()), axis=1)


def _attention_per_linear(rows: Sequence[Row], shape: ModelShape | None) -> float:
    """FLOPs of a pair over those of a row, which flops_fraction was computed with.

    A prompt whose first tokens vLLM held and whose others were all computed tells it: its rows
    and pairs are known, so its flops_fraction leaves one unknown.
    """
    told = [] if shape is None else [shape.cost.attention / shape.cost.linear]
    for row in rows:
        T, kinds, share = row["prompt_tokens"], row["kinds"], row["flops_fraction"]
        local = kinds["local"] + kinds["local_blended"]
        if 0 < local < T and local + kinds["new"] == T:
            computed, pairs = prefill_work(T, local)
            told.append(float((computed - share * T) / (share * _pairs(T) - pairs)))
    if not told:
        raise ValueError(
            "the rows do not tell the model's FLOPs, as no prompt was partly in vLLM's cache: "
            "name the model, or measure an arm such as `cache: warmed`"
        )
    if not np.allclose(told, told[0], rtol=1e-4):
        raise ValueError(
            "the rows, and the model if one was named, do not agree on FLOPs: a key attended to "
            f"takes {min(told):.4g} to {max(told):.4g} of what the rest of a row takes"
        )
    return told[0]


def _pairs(T: Any) -> Any:
    """(row, key) pairs of a full prefill of T tokens."""
    return T * (T + 1) / 2


def _bytes_per_token(rows: Sequence[Row], shape: ModelShape | None) -> float:
    """Of KV; from the rows, where found tokens that were not loaded make it look smaller only."""
    told = []
    for row in rows:
        if found := sum(row["kinds"][kind] for kind in ("exact", "moved", "recomputed")):
            told.append(sum(row["bytes"].values()) / found)
    if largest := max(told, default=0.0):
        return largest
    if shape is None:
        raise ValueError(
            "no row loaded anything, so KV bytes per token are unknown: name the model"
        )
    dtype = rows[0]["config"]["engine"]["dtype"]
    return shape.bytes_per_token(None if dtype == "auto" else dtype)


def _by_prompt(rows: Sequence[Row], weighted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[prompts, K, K] and [prompts, K]: what each prompt adds to the normal equations."""
    indices: dict[str, list[int]] = defaultdict(list)
    for i, row in enumerate(rows):
        indices[row["prompt_hash"]].append(i)
    parts = [weighted[i] for i in indices.values()]
    # The target of every row is 1: its weight times its seconds.
    return np.stack([a.T @ a for a in parts]), np.stack([a.sum(axis=0) for a in parts])


def _rate(seconds_per_byte: Estimate) -> Estimate:
    """Bytes per second; infinite where loading took no time that could be seen."""
    e = seconds_per_byte
    value, low, high = (1 / s if s else float("inf") for s in (e.value, e.high, e.low))
    return Estimate(value, low, high)


def _provenance(rows: Sequence[Row], estimates: dict[str, Estimate]) -> dict[str, Any]:
    lengths = [row["prompt_tokens"] for row in rows]
    return {
        "rows": len(rows),
        "prompts": len({row["prompt_hash"] for row in rows}),
        "prompt_tokens": [min(lengths), max(lengths)],
        "device": rows[0]["device"],
        "commits": sorted(_versions(rows)["commit"]),
        "intervals_95": {name: [e.low, e.high] for name, e in estimates.items()},
    }


def _versions(rows: Sequence[Row]) -> dict[str, set[str]]:
    """The commits, and the versions of each package, that the rows were measured with."""
    seen: dict[str, set[str]] = defaultdict(set)
    for row in rows:
        seen["commit"].add(row.get("git_commit") or "unknown")
        for package, version in row.get("packages", {}).items():
            seen[package].add(version)
    return seen


def _residuals(rows: Sequence[Row], relative: np.ndarray) -> list[Residual]:
    by_arm: dict[str, list[float]] = defaultdict(list)
    for row, error in zip(rows, relative, strict=True):
        by_arm[row["arm"]].append(error)
    return [
        Residual(arm, len(e), float(np.median(np.abs(e))), float(np.median(e)))
        for arm, e in by_arm.items()
    ]


def _warnings(
    rows: Sequence[Row], names: list[str], constants: dict[str, Estimate], gram: np.ndarray
) -> list[str]:
    warnings = []
    if len(lengths := {row["prompt_tokens"] for row in rows}) == 1:
        warnings.append(
            f"all prompts have {lengths.pop():,} tokens, so per_row_s and per_pair_s are told "
            "apart only by what was reused: measure other lengths too"
        )
    values, vectors = np.linalg.eigh(gram)
    values = np.maximum(values, np.finfo(float).eps * values[-1])
    condition = np.sqrt(values[-1] / values[0])
    if condition > COLLINEAR:
        # Of each constant's variance, the share that the weakest direction holds (Belsley et al.).
        held = vectors**2 / values
        shares = held[:, 0] / held.sum(axis=1)
        weak = [name for name, share in zip(names, shares, strict=True) if share > 0.5]
        warnings.append(
            f"these rows hardly tell apart {', '.join(weak)} (condition number {condition:.0f}, "
            f"want at most {COLLINEAR}): together they are known better than each alone"
        )
    for name, e in constants.items():
        what = name if name in CONSTANTS else f"loading from {name}"
        if name not in names:
            warnings.append(f"{what}: no row needed it, so it is unknown and taken as 0")
        elif e.low <= 0:
            warnings.append(f"{what}: the time it takes cannot be told from 0")
    if not any(any(row["bytes"].values()) for row in rows):
        warnings.append("no row loaded anything, so what loading takes is unknown")
    if (prompts := len({row["prompt_hash"] for row in rows})) < FEW_PROMPTS:
        warnings.append(f"{prompts} different prompts only, so the intervals are too narrow")
    if mixed := [name for name, seen in _versions(rows).items() if len(seen) > 1]:
        warnings.append(f"rows of different versions are mixed: {', '.join(mixed)}")
    return warnings
