"""Measures strategies on one model, prompt by prompt, for a quality profile."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from lmc.blend.encoding import Context
from lmc.blend.strategy import Strategy
from lmc.connectors.hf.model import HFModel
from lmc.experiment.hf.measure import ANSWER_TOKENS, measure, prepare
from lmc.quality import BLENDS
from lmc.quality.auto import Auto
from lmc.quality.controlled import Controlled
from lmc.quality.gate import described
from lmc.quality.profile import Measured
from lmc.results.progress import Step
from lmc.results.statistics import recovery_estimate
from lmc.results.summary import FULL_REUSE
from lmc.workloads.sample import Sample

BASE: dict[str, Any] = {"name": FULL_REUSE}
# What is measured unless told otherwise: by name, the fields that are tried.
GRID: dict[str, list[dict[str, Any]]] = {
    FULL_REUSE: [{}, {"rotate": False}],
    "epic": [{"link_tokens": n} for n in (1, 4, 16, 32)],
    "cacheblend": [
        {"tensor": tensor, "ratio": ratio} for tensor in "kv" for ratio in (0.05, 0.15, 0.35, 0.5)
    ],
    "query": [{"ratio": ratio} for ratio in (0.05, 0.15, 0.3)],
    "lmc": [{"compute": compute} for compute in (0.05, 0.1, 0.2, 0.4)],
}


def grid(blends: Sequence[Mapping[str, Any] | str] = ()) -> list[dict[str, Any]]:
    """Configs to measure, full_reuse first, since recovery is relative to it; each once.

    blends: names of `GRID`, which stand for all values there, or strategies as a config names
        them; none is all of `GRID`.

    Raises ValueError for a strategy that does not exist.
    """
    configs = [BASE]
    for blend in blends or GRID:
        config = BLENDS.parse(blend)
        tried = GRID.get(blend, [{}]) if isinstance(blend, str) else [{}]
        configs += [config | fields for fields in tried]
    built: list[Strategy] = []
    kept = []
    for config in configs:
        strategy = BLENDS.build(config)
        if strategy not in built:
            built.append(strategy)
            kept.append(config)
    return kept


def calibrate(
    model: HFModel,
    samples: Sequence[Sample],
    configs: Sequence[dict[str, Any]],
    step: Step,
    context: Context = "isolated",
    answer_tokens: int = ANSWER_TOKENS,
) -> Iterator[list[Measured]]:
    """After each prompt, the rows of all prompts so far.

    Args:
        samples: prompts; of what truly follows them no use is made.
        configs: as `grid` gives them.
        step: is told of each strategy on each prompt, one step.
        context: how the chunks are encoded.
        answer_tokens: over how many of full prefill's greedy tokens KL is taken.

    Raises:
        ValueError: no samples, configs that do not begin with full_reuse, one that a profile has
            no use for, or a prompt of which nothing is moved.
    """
    if not samples:
        raise ValueError("samples: got none, want at least one")
    if not configs or configs[0] != BASE:
        raise ValueError(f"configs: got {list(configs[:1])}, want {BASE} first")
    strategies = [BLENDS.build(config) for config in configs]
    for config, strategy in zip(configs, strategies, strict=True):
        if strategy.control or not strategy.moves:
            raise ValueError(f"{config}: loses no quality, so there is nothing to measure")
        if isinstance(strategy, Auto | Controlled):
            raise ValueError(f"{config}: stands for {strategy.strategy!r}; measure that")
    kl: list[dict[int, float]] = [{} for _ in configs]
    compute: dict[int, list[float]] = defaultdict(list)
    for prompt, sample in enumerate(samples):
        phase = f"prompt {prompt + 1}"
        step(phase, "full prefill")
        case = prepare(model, replace(sample, answer=[]), answer_tokens)
        for i, (config, strategy) in enumerate(zip(configs, strategies, strict=True)):
            step(phase, described(config, strategy))
            row = measure(case, strategy, context)
            if i == 0 and not row["kinds"]["moved"]:
                raise ValueError(f"sample {prompt}: nothing of it is moved, so nothing is blended")
            kl[i][prompt] = row["kl_mean"]
            compute[i].append(row["compute_fraction"])
            step(phase, described(config, strategy), advance=1)
        yield [_measured(config, kl[i], kl[0], compute[i]) for i, config in enumerate(configs)]


def _measured(
    config: dict[str, Any], kl: dict[int, float], reuse: dict[int, float], compute: list[float]
) -> Measured:
    estimate = recovery_estimate(kl, reuse)
    if estimate is None:
        raise ValueError("full_reuse loses nothing on these prompts, so nothing can be recovered")
    return Measured(
        blend=config,
        recovery=estimate.value,
        low=estimate.low,
        high=estimate.high,
        compute_fraction=float(np.mean(compute)),
        kl=float(np.mean(list(kl.values()))),
        prompts=len(kl),
    )
