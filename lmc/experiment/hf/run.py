"""An experiment on a Hugging Face model: every arm on every prompt, a row each."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from lmc.blend.strategy import Strategy
from lmc.experiment.hf.config import HFArm, HFExperiment
from lmc.experiment.settings import samples_of, tokenizer_of
from lmc.model import exports
from lmc.quality import BLENDS
from lmc.results.progress import Progress, Step, silent
from lmc.results.rows import Row, RowFile, cpu_name, hash_of, key_of
from lmc.workloads.sample import Sample


def run(config: HFExperiment, out: Path, progress: Progress = silent) -> list[Row]:
    """Measure what `out` does not hold yet; all rows it then holds.

    Raises ValueError for bad input, before anything is measured.
    """
    folder = exports.resolve(config.model)
    samples = samples_of(config.workload, tokenizer_of(config.model))
    with RowFile(out, config) as file:
        done = {(arm, prompt) for arm, prompt, _ in map(key_of, file.rows)}
        todo = [
            (prompt_id, [name for name in config.arms if (name, prompt_id) not in done])
            for prompt_id in range(len(samples))
        ]
        if left := sum(len(arms) for _, arms in todo):
            with progress(left) as step:
                _measure_all(config, folder, samples, todo, file, step)
        return file.rows


def _measure_all(
    config: HFExperiment,
    folder: str,
    samples: Sequence[Sample],
    todo: Sequence[tuple[int, list[str]]],
    file: RowFile,
    step: Step,
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from lmc.connectors.hf.model import HFModel
    from lmc.experiment.hf.measure import prepare

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
            about = {
                "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "device": f"{cpu_name()}, {config.threads} threads",
                "workload": config.workload["name"],
                "prompt_hash": hash_of(sample.prompt.token_ids),
                "arm": name,
                "prompt_id": prompt_id,
                "repetition": 0,
                "ttft_s": None,  # a dense model times nothing that an engine would serve
            }
            file.append({**about, **row})
            step(phase, name, 1)


def _measure(config: HFExperiment, arm: HFArm, case: Any) -> Row:
    from lmc.experiment.hf.measure import measure, measure_split

    start = time.process_time()
    if arm.blend is None:
        row = measure_split(case)
    else:
        strategy: Strategy = BLENDS.build(arm.blend)
        context, position = arm.context or config.context, arm.position or config.position
        row = measure(case, strategy, context, position)
    return {
        "cpu_s": time.process_time() - start,
        "prompt_tokens": len(case.sample.prompt.token_ids),
        "strategy": arm.blend["name"] if arm.blend else None,
        "reason": None,
        **row,
    }
