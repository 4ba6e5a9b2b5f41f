"""`lmc run`: arms alternate request by request; rows, two tables and a figure come out."""

from __future__ import annotations

import hashlib
import random
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from lmc.blend.plan import KINDS
from lmc.chunking.prompt import Prompt
from lmc.cli.progress import progress
from lmc.cli.tables import fallbacks, tables
from lmc.experiment.vllm.config import (
    BlendArm,
    ExperimentConfig,
    StockArm,
    load_config,
    read_settings,
)
from lmc.experiment.vllm.engines import Answer, Engine, Request
from lmc.model import exports
from lmc.model.layout import KVLayout
from lmc.model.rope import from_config
from lmc.model.shape import shape_of
from lmc.results.quality import Quality, compare
from lmc.results.rows import Key, Row, RowFile, key_of
from lmc.results.summary import FULL_PREFILL, summarise
from lmc.workloads.rag_reorder import Workload, build_workload

FIGURE = "ttft_quality.png"
NO_QUALITY = dict.fromkeys(f.name for f in fields(Quality))


def run(experiment: Path, out: Path, overrides: list[str]) -> None:
    """Measure what `out` does not hold yet, then print and draw all it holds.

    Raises ValueError for bad input, before an engine is started.
    """
    if read_settings(experiment, overrides).get("connector") == "hf":
        from lmc.experiment.hf.run import run as run_hf

        run_hf(experiment, out, overrides)
        return
    console = Console()
    config = load_config(experiment, overrides)
    model = exports.resolve(config.model)
    _check_model(config, model)
    workload = build_workload(config.workload, _tokenizer(model))
    with RowFile(out, config) as file:
        done = set(map(key_of, file.rows))
        todo = [key for key in _schedule(config) if key not in done]
        if todo:
            _measure_all(config, model, workload, file, todo, console)
        rows = file.rows
    summaries = summarise(rows)
    for table in tables(summaries):
        console.print(table)
    for line in fallbacks(summaries):
        console.print(line, soft_wrap=True)
    console.print(f"rows: {file.path}", soft_wrap=True)
    if find_spec("matplotlib") is None:
        console.print("figure: not drawn, matplotlib is not installed (pip install lmc[notebooks])")
        return
    from lmc.plots import ttft_quality

    ttft_quality(rows).savefig(out / FIGURE, dpi=150)
    console.print(f"figure: {out / FIGURE}", soft_wrap=True)


@dataclass
class Session:
    """Two engines at work on one experiment.

    references: full prefill's greedy answer, by prompt.
    """

    config: ExperimentConfig
    workload: Workload
    engines: dict[str, Engine]
    file: RowFile
    references: dict[int, Answer] = field(default_factory=dict)

    def warm_up(self, arms: list[str]) -> None:
        """Store every document for each arm with a store; touch every code path once, untimed."""
        first = self.workload.prompts[0]
        self.engines["stock"].ask(Request(first.token_ids, "warm-up"))
        for name in arms:
            arm = self.config.arms[name]
            if isinstance(arm, StockArm):
                continue
            for document in self.workload.documents:
                options = _options(arm, document, save=True)
                self.engines["lmc"].ask(Request(document.token_ids, name, lmc=options))
            self.engines["lmc"].drain()
            options = _options(arm, first, save=False)
            self.engines["lmc"].ask(Request(first.token_ids, name, lmc=options, reset=True))

    def measure(self, key: Key) -> None:
        """One timed request, and at the first repetition the quality of what it served."""
        name, prompt_id, repetition = key
        arm, prompt = self.config.arms[name], self.workload.prompts[prompt_id]
        if isinstance(arm, StockArm):
            engine, request = self.engines["stock"], self._prepare(key, arm, prompt)
        else:
            engine = self.engines["lmc"]
            options = _options(arm, prompt, save=False)
            request = Request(prompt.token_ids, name, lmc=options, reset=True)
        answer = engine.ask(request)
        quality: dict[str, float | None] = NO_QUALITY
        if repetition == 0 and self.config.quality.tokens:
            quality = self._quality(key, engine, request)
        row: Row = {
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            "device": engine.device,
            "workload": self.config.workload.name,
            "prompt_hash": hashlib.sha256(np.array(prompt.token_ids, "<i8").tobytes()).hexdigest(),
            "arm": name,
            "prompt_id": prompt_id,
            "repetition": repetition,
            "ttft_s": answer.wall_s,
            "cpu_s": answer.cpu_s,
            **_what_was_computed(answer, len(prompt.token_ids), engine),
            **quality,
        }
        self.file.append(row)

    def _prepare(self, key: Key, arm: StockArm, prompt: Prompt) -> Request:
        """Bring the stock engine's cache to what the arm says; the request to be timed."""
        name, prompt_id, repetition = key
        engine = self.engines["stock"]
        if arm.cache == "shared":
            salt = f"{name}/{repetition}"
            # Sent again before each request: what the other arms have pushed out since then
            # would have stayed, had this service been alone.
            for earlier in [*self.workload.documents, *self.workload.prompts[:prompt_id]]:
                engine.ask(Request(earlier.token_ids, salt))
            return Request(prompt.token_ids, salt)
        salt = f"{name}/{repetition}/{prompt_id}"
        if arm.cache == "warmed":
            blocks = self._blocks_to_warm(arm, prompt_id, len(prompt.token_ids))
            warmed = prompt.token_ids[: blocks * self.config.engine.block_size]
            if warmed:
                engine.ask(Request(warmed, salt))
        return Request(prompt.token_ids, salt)

    def _blocks_to_warm(self, arm: StockArm, prompt_id: int, T: int) -> int:
        """Whole blocks that leave as many rows to compute as the other arm's report named."""
        block_size = self.config.engine.block_size
        rows = next(
            round(row["compute_fraction"] * T)
            for row in self.file.rows
            if row["arm"] == arm.equal_rows_of and row["prompt_id"] == prompt_id
        )
        return min(round((T - rows) / block_size), (T - 1) // block_size)

    def _quality(self, key: Key, engine: Engine, request: Request) -> dict[str, float | None]:
        """Forced and free decoding; stock arms answer from the KV that was just timed."""
        name, prompt_id, _ = key
        n = self.config.quality.tokens
        if prompt_id not in self.references:
            self.references[prompt_id] = self.engines["stock"].ask(
                Request(request.token_ids, f"reference/{prompt_id}", max_tokens=n, forced=[])
            )
        reference = self.references[prompt_id]
        free = forced = reference
        if name != FULL_PREFILL:
            again = replace(request, max_tokens=n, forced=[])
            free = forced = engine.ask(again)
            # Free decoding that gave the reference answer was forced decoding of it.
            if free.token_ids != reference.token_ids:
                forced = engine.ask(replace(again, forced=reference.token_ids))
        assert reference.log_probs is not None
        assert forced.log_probs is not None
        return asdict(
            compare(reference.token_ids, reference.log_probs, forced.log_probs, free.token_ids)
        )


def _options(arm: BlendArm, prompt: Prompt, save: bool) -> dict[str, Any]:
    options: dict[str, Any] = {"blend": arm.blend, "save": save}
    if arm.spans:
        # A question comes once; only what may come back is worth a chunk.
        spans = prompt.spans if save else prompt.spans[:-1]
        options["chunks"] = [list(span) for span in spans]
    return options


def _what_was_computed(answer: Answer, T: int, engine: Engine) -> Row:
    if answer.report is not None:
        names = ("prompt_tokens", "kinds", "compute_fraction", "flops_fraction")
        return {name: answer.report[name] for name in (*names, "strategy", "reason", "bytes")}
    kinds = dict.fromkeys(KINDS, 0) | {"local": answer.cached, "new": T - answer.cached}
    return {
        "prompt_tokens": T,
        "kinds": kinds,
        "compute_fraction": kinds["new"] / T,
        "flops_fraction": engine.cost.fraction([(answer.cached, T, 1.0)], T),
        "strategy": None,
        "reason": None,
        "bytes": {},
    }


def _schedule(config: ExperimentConfig) -> list[Key]:
    """Every measurement, in order; the order of the arms is drawn anew for every prompt."""
    rng = random.Random(f"arms {config.workload.seed}")
    schedule: list[Key] = []
    for repetition in range(config.repetitions):
        for prompt_id in range(config.workload.measured):
            arms = list(config.arms)
            rng.shuffle(arms)
            for name, arm in config.arms.items():
                if isinstance(arm, StockArm) and arm.equal_rows_of is not None:
                    # Its rows are known only once the other arm has been served.
                    arms.remove(name)
                    arms.insert(arms.index(arm.equal_rows_of) + 1, name)
            schedule += [(name, prompt_id, repetition) for name in arms]
    return schedule


def _tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise ValueError(f"model: got {model!r}, which has no tokenizer: {error}") from error


def _check_model(config: ExperimentConfig, model: str) -> None:
    """Raise ValueError for what the lmc engine would refuse, or not do, with this model."""
    from transformers import AutoConfig

    from lmc.connectors.vllm.config import LMCConfig, check_memory

    if not any(isinstance(arm, BlendArm) for arm in config.arms.values()):
        return
    try:
        hf = AutoConfig.from_pretrained(model).get_text_config()
    except (OSError, ValueError) as error:
        raise ValueError(f"model: got {model!r}, which has no config: {error}") from error
    from_config(hf)
    model_shape = shape_of(hf)
    auto = config.engine.dtype == "auto"
    dtype = model_shape.dtype if auto else config.engine.dtype
    layout = KVLayout(model_shape.L, model_shape.G, model_shape.D, dtype)
    settings = LMCConfig(**config.lmc)
    longest = settings.build_chunker().longest_chunk or 1
    if any(isinstance(arm, BlendArm) and arm.spans for arm in config.arms.values()):
        longest = max(longest, config.workload.document_tokens)
    check_memory(settings.memory_bytes, layout.bytes_per_token, longest)


def _measure_all(
    config: ExperimentConfig,
    model: str,
    workload: Workload,
    file: RowFile,
    todo: list[Key],
    console: Console,
) -> None:
    arms = list(dict.fromkeys(name for name, _, _ in todo))
    blends = any(isinstance(config.arms[name], BlendArm) for name in arms)
    folder = file.path.parent
    with ExitStack() as stack, progress(console, len(todo)) as step:
        step("starting the engines")
        settings = {"stock": None, "lmc": config.lmc} if blends else {"stock": None}
        engines = {
            name: stack.enter_context(Engine(model, config.engine, lmc, folder / f"{name}.log"))
            for name, lmc in settings.items()
        }
        for engine in engines.values():
            engine.wait()
        session = Session(config, workload, engines, file)
        step("storing the documents")
        session.warm_up(arms)
        for key in todo:
            name, prompt_id, repetition = key
            phase = f"repetition {repetition + 1}/{config.repetitions}, "
            phase += f"prompt {prompt_id + 1}/{config.workload.measured}"
            step(phase, name)
            session.measure(key)
            step(phase, name, 1)
