"""An experiment on vLLM: arms alternate request by request, and every measurement is a row."""

from __future__ import annotations

import random
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lmc.blend.plan import KINDS
from lmc.chunking.prompt import Prompt
from lmc.experiment.settings import built, samples_of, tokenizer_of
from lmc.experiment.vllm.config import BlendArm, StockArm, VLLMExperiment
from lmc.experiment.vllm.engines import Answer, Engine, Request
from lmc.model import exports
from lmc.model.rope import rotations_of
from lmc.model.shape import shape_of
from lmc.quality.metrics import AnswerQuality, compare_answers
from lmc.results.progress import Progress, Step, silent
from lmc.results.rows import Key, Row, RowFile, hash_of, key_of
from lmc.results.summary import FULL_PREFILL
from lmc.workloads.sample import Sample, corpus_of

NO_QUALITY = dict.fromkeys(f.name for f in fields(AnswerQuality))


def run(config: VLLMExperiment, out: Path, progress: Progress = silent) -> list[Row]:
    """Measure what `out` does not hold yet; all rows it then holds.

    Raises ValueError for bad input, before an engine is started.
    """
    if find_spec("vllm") is None:  # the engines' processes would say so late
        raise ModuleNotFoundError("No module named 'vllm'", name="vllm")
    model = exports.resolve(config.model)
    _check_model(config, model)
    tokenizer = tokenizer_of(config.model)
    samples = samples_of(config.workload, tokenizer)
    documents = corpus_of(built(config.workload), samples, tokenizer)
    _check_lengths(config, model, samples)
    with RowFile(out, config) as file:
        done = set(map(key_of, file.rows))
        todo = [key for key in _schedule(config, len(samples)) if key not in done]
        if todo:
            with progress(len(todo)) as step:
                _measure_all(config, model, samples, documents, file, todo, step)
        return file.rows


@dataclass
class Session:
    """Two engines at work on one experiment.

    references: full prefill's greedy answer, by prompt.
    """

    config: VLLMExperiment
    samples: list[Sample]
    documents: list[Prompt]
    engines: dict[str, Engine]
    file: RowFile
    references: dict[int, Answer] = field(default_factory=dict)

    def warm_up(self, arms: list[str]) -> None:
        """Store every document for each arm with a store; touch every code path once, untimed."""
        first = self.samples[0]
        tokens = first.prompt.token_ids
        self.engines["stock"].ask(Request(tokens, "warm-up"))
        for name in arms:
            arm = self.config.arms[name]
            if isinstance(arm, StockArm):
                continue
            for document in self.documents:
                options = _options(name, arm, document.spans, save=True)
                self.engines["lmc"].ask(Request(document.token_ids, name, lmc=options))
            self.engines["lmc"].drain()
            options = _options(name, arm, first.reusable, save=False)
            self.engines["lmc"].ask(Request(tokens, name, lmc=options, reset=True))

    def measure(self, key: Key) -> None:
        """One timed request, and at the first repetition the quality of what it served."""
        name, prompt_id, repetition = key
        arm, sample = self.config.arms[name], self.samples[prompt_id]
        prompt = sample.prompt
        if isinstance(arm, StockArm):
            engine, request = self.engines["stock"], self._prepare(key, arm, prompt)
        else:
            engine = self.engines["lmc"]
            options = _options(name, arm, sample.reusable, save=False)
            request = Request(prompt.token_ids, name, lmc=options, reset=True)
        answer = engine.ask(request)
        quality: dict[str, float | None] = NO_QUALITY
        if repetition == 0 and self.config.quality.tokens:
            quality = self._quality(key, engine, request)
        row: Row = {
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "device": engine.device,
            "workload": self.config.workload["name"],
            "prompt_hash": hash_of(prompt.token_ids),
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
            prompts = [sample.prompt for sample in self.samples[:prompt_id]]
            for earlier in [*self.documents, *prompts]:
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
            compare_answers(
                reference.token_ids, reference.log_probs, forced.log_probs, free.token_ids
            )
        )


def _options(
    name: str, arm: BlendArm, spans: Sequence[tuple[int, int]], save: bool
) -> dict[str, Any]:
    options: dict[str, Any] = {"blend": _listed(name), "save": save}
    if arm.spans:
        options["chunks"] = [list(span) for span in spans]
    return options


def _listed(arm: str) -> str:
    """The name under which the engine's config lists an arm's strategy, which may be anything."""
    return f"arm:{arm}"


def _settings(config: VLLMExperiment) -> dict[str, Any]:
    """The connector's, with the arms' strategies listed, since no request may name some of them."""
    arms = {_listed(n): a.blend for n, a in config.arms.items() if isinstance(a, BlendArm)}
    return config.lmc | {"blends": config.lmc.get("blends", {}) | arms}


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


def _schedule(config: VLLMExperiment, prompts: int) -> list[Key]:
    """Every measurement, in order; the order of the arms is drawn anew for every prompt."""
    rng = random.Random(f"arms {config.workload.get('seed', 0)}")
    schedule: list[Key] = []
    for repetition in range(config.repetitions):
        for prompt_id in range(prompts):
            arms = list(config.arms)
            rng.shuffle(arms)
            for name, arm in config.arms.items():
                if isinstance(arm, StockArm) and arm.equal_rows_of is not None:
                    # Its rows are known only once the other arm has been served.
                    arms.remove(name)
                    arms.insert(arms.index(arm.equal_rows_of) + 1, name)
            schedule += [(name, prompt_id, repetition) for name in arms]
    return schedule


def _check_model(config: VLLMExperiment, model: str) -> None:
    """Raise ValueError for a model whose keys the lmc engine could not move."""
    if any(isinstance(arm, BlendArm) for arm in config.arms.values()):
        rotations_of(_hf_config(model))


def _check_lengths(config: VLLMExperiment, model: str, samples: Sequence[Sample]) -> None:
    """Raise ValueError for prompts longer than the engine's, and chunks larger than its memory."""
    longest = max(len(sample.prompt.token_ids) for sample in samples)
    need = longest + max(1, config.quality.tokens)
    if need > config.engine.max_model_len:
        raise ValueError(
            f"engine.max_model_len: got {config.engine.max_model_len}, less than the "
            f"{need} tokens of a prompt and its answer"
        )
    blends = [arm for arm in config.arms.values() if isinstance(arm, BlendArm)]
    if not blends:
        return
    from lmc.connectors.vllm.config import LMCConfig, check_memory

    shape = shape_of(_hf_config(model))
    dtype = shape.dtype if config.engine.dtype == "auto" else config.engine.dtype
    settings = LMCConfig(**config.lmc)
    chunk = settings.build_chunker().longest_chunk or 1
    if any(arm.spans for arm in blends):
        chunk = max(chunk, *(end - start for s in samples for start, end in s.reusable))
    chunk = min(chunk, settings.limits.chunk_tokens)
    check_memory(settings.memory_bytes, shape.layout(dtype).bytes_per_token, chunk)


def _hf_config(model: str) -> Any:
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(model).get_text_config()
    except (OSError, ValueError) as error:
        raise ValueError(f"model: got {model!r}, which has no config: {error}") from error


def _measure_all(
    config: VLLMExperiment,
    model: str,
    samples: list[Sample],
    documents: list[Prompt],
    file: RowFile,
    todo: list[Key],
    step: Step,
) -> None:
    arms = list(dict.fromkeys(name for name, _, _ in todo))
    blends = any(isinstance(config.arms[name], BlendArm) for name in arms)
    folder = file.path.parent
    with ExitStack() as stack:
        step("starting the engines")
        settings = {"stock": None, "lmc": _settings(config)} if blends else {"stock": None}
        engines = {
            name: stack.enter_context(Engine(model, config.engine, lmc, folder / f"{name}.log"))
            for name, lmc in settings.items()
        }
        for engine in engines.values():
            engine.wait()
        session = Session(config, samples, documents, engines, file)
        step("storing the documents")
        session.warm_up(arms)
        for key in todo:
            name, prompt_id, repetition = key
            phase = f"repetition {repetition + 1}/{config.repetitions}, "
            phase += f"prompt {prompt_id + 1}/{len(samples)}"
            step(phase, name)
            session.measure(key)
            step(phase, name, 1)
