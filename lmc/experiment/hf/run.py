"""`lmc run` on a Hugging Face model: every arm on every prompt, then a table and a figure."""

from __future__ import annotations

import hashlib
import platform
import random
import time
from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

from lmc.cli.progress import progress
from lmc.experiment.hf.config import HFArm, HFExperiment, load_config
from lmc.model import exports
from lmc.quality.metrics import paired_difference
from lmc.results.rows import Row, RowFile, key_of
from lmc.results.summary import FULL_REUSE, Estimate, recovery
from lmc.workloads import WORKLOADS
from lmc.workloads.sample import Sample

FIGURE = "pareto.png"


def run(experiment: Path, out: Path, overrides: list[str]) -> None:
    """Measure what `out` does not hold yet, then print and draw all it holds.

    Raises ValueError for bad input, before anything is measured.
    """
    console = Console()
    config = load_config(experiment, overrides)
    folder = exports.resolve(config.model)
    samples = _samples(config, folder)
    with RowFile(out, config) as file:
        done = {(arm, prompt) for arm, prompt, _ in map(key_of, file.rows)}
        todo = [
            (prompt_id, [name for name in config.arms if (name, prompt_id) not in done])
            for prompt_id in range(len(samples))
        ]
        if any(arms for _, arms in todo):
            _measure_all(config, folder, samples, todo, file, console)
        rows = file.rows
    console.print(table(rows))
    for line in comparisons(rows, config.compare):
        console.print(line, soft_wrap=True)
    console.print(f"rows: {file.path}", soft_wrap=True)
    if find_spec("matplotlib") is None:
        console.print("figure: not drawn, matplotlib is not installed (pip install lmc[notebooks])")
        return
    from lmc.plots import pareto

    pareto(rows, title=config.workload["name"]).savefig(out / FIGURE, dpi=150)
    console.print(f"figure: {out / FIGURE}", soft_wrap=True)


def table(rows: Sequence[Row]) -> Table:
    """A line an arm: what it computes, and how far it is from full prefill."""
    by_arm = _by_arm(rows)
    shown = Table(
        title="Quality against full prefill",
        caption="rows: row-layers of all, probe and check layers included. KL(full || arm), "
        "top-1 and top-5: over the forced answer. ΔNLL: of what truly follows, nats a token. "
        "recovery: 1 - KL / that of full_reuse.",
        title_justify="left",
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=0,
    )
    shown.add_column("arm", no_wrap=True)
    for name in ("rows", "FLOPs", "KL", "top-1", "top-5", "ΔNLL", "recovery [95%]"):
        shown.add_column(name, justify="right", no_wrap=True)
    reuse = _kl(by_arm[FULL_REUSE])
    for name, group in by_arm.items():
        mean = {
            key: float(np.mean([row[key] for row in group]))
            for key in ("compute_fraction", "flops_fraction", "kl_mean")
        }
        shown.add_row(
            name,
            f"{mean['compute_fraction']:.1%}",
            f"{mean['flops_fraction']:.0%}",
            f"{mean['kl_mean']:.4f}" if mean["kl_mean"] > 1e-4 else f"{mean['kl_mean']:.0e}",
            f"{np.mean([row['top1_agreement'] for row in group]):.0%}",
            f"{np.mean([row['top5_overlap'] for row in group]):.0%}",
            f"{np.mean([row['delta_nll'] for row in group]):+.2f}",
            _interval(recovery(_kl(group), reuse)),
        )
    return shown


def comparisons(rows: Sequence[Row], pairs: Sequence[tuple[str, str]]) -> list[str]:
    """A line for each pair of arms: the difference of their recoveries."""
    by_arm = _by_arm(rows)
    reuse = _kl(by_arm[FULL_REUSE])
    lines = []
    for a, b in pairs:
        if a in by_arm and b in by_arm:
            difference = paired_difference(_kl(by_arm[a]), _kl(by_arm[b]), reuse)
            lines.append(f"recovery of {a} - {b}: {_interval(difference, '+.2f')}")
    return lines


def _by_arm(rows: Sequence[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row["arm"]].append(row)
    order = list(rows[-1]["config"]["arms"]) if rows else []
    return {name: groups[name] for name in order if name in groups}


def _kl(rows: Sequence[Row]) -> dict[int, float]:
    return {row["prompt_id"]: row["kl_mean"] for row in rows}


def _interval(e: Estimate | None, form: str = ".2f") -> str:
    return "–" if e is None else f"{e.value:{form}} [{e.low:{form}}, {e.high:{form}}]"


def _samples(config: HFExperiment, folder: str) -> list[Sample]:
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise ValueError(f"model: got {config.model!r}, which has no tokenizer: {error}") from error
    samples: list[Sample] = WORKLOADS.build(config.workload).samples(tokenizer)
    return samples[: config.limit]


def _measure_all(
    config: HFExperiment,
    folder: str,
    samples: Sequence[Sample],
    todo: Sequence[tuple[int, list[str]]],
    file: RowFile,
    console: Console,
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from lmc.connectors.hf.model import HFModel
    from lmc.experiment.hf.measure import prepare

    with progress(console, sum(len(arms) for _, arms in todo)) as step:
        step("loading the model")
        torch.set_num_threads(config.threads)
        loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=config.dtype)
        model = HFModel(loaded.eval())
        for prompt_id, arms in todo:
            if not arms:
                continue
            phase = f"prompt {prompt_id + 1}/{len(samples)}"
            step(phase, "full prefill")
            sample = samples[prompt_id]
            case = prepare(model, sample, config.answer_tokens)
            # Shuffled, so that no arm always meets the same state of a busy machine.
            random.Random(f"arms {prompt_id}").shuffle(arms)
            for name in arms:
                step(phase, name)
                row = _measure(config, config.arms[name], case)
                digest = hashlib.sha256(np.array(sample.prompt.token_ids, "<i8").tobytes())
                about = {
                    "time": datetime.now(UTC).isoformat(timespec="seconds"),
                    "device": f"{platform.processor() or platform.machine()}, "
                    f"{config.threads} threads",
                    "workload": config.workload["name"],
                    "prompt_hash": digest.hexdigest(),
                    "arm": name,
                    "prompt_id": prompt_id,
                    "repetition": 0,
                    "ttft_s": None,  # a dense model times nothing that an engine would serve
                }
                file.append({**about, **row})
                step(phase, name, 1)


def _measure(config: HFExperiment, arm: HFArm, case: Any) -> Row:
    from lmc.blend import STRATEGIES
    from lmc.experiment.hf.measure import measure, measure_split

    start = time.process_time()
    if arm.blend is None:
        row = measure_split(case)
    else:
        strategy = STRATEGIES.build(arm.blend)
        context, position = arm.context or config.context, arm.position or config.position
        row = measure(case, strategy, context, position)
    return {
        "cpu_s": time.process_time() - start,
        "prompt_tokens": len(case.sample.prompt.token_ids),
        "strategy": arm.blend["name"] if arm.blend else None,
        "reason": None,
        **row,
    }
