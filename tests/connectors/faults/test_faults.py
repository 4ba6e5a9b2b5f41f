"""Every fault meets every kind of claim: no wrong answer, nothing wrong left behind, none down.

Few cases that cover all pairs of settings run always, all of them with `make test-slow`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.connectors.faults.world import PATIENCE_S, Case, cases, pairwise
from tests.connectors.vllm.engine import run_scenario

pytestmark = pytest.mark.engine

WORKERS = "tests.connectors.faults.worker"
ENGINES: dict[str, dict[str, Any]] = {
    "one rank": {"worker_cls": f"{WORKERS}:FaultyWorker"},
    "two ranks": {"worker_cls": f"{WORKERS}:FaultyWorker", "tensor_parallel_size": 2},
    # Its rows cannot be computed by lmc, so that a claim that fails is vLLM's to mend.
    "no model": {"worker_cls": f"{WORKERS}:BlindWorker"},
}


def of(engine: str) -> list[Case]:
    claims = {"claims": ("exact", "moved")} if engine == "no model" else {}
    return cases(2 if engine == "two ranks" else 1, **claims)


def ran(engine: str, which: list[Case], model: Path, tmp_path: Path, timeout: float) -> Any:
    settings = ENGINES[engine]
    worker = settings["worker_cls"].replace(":", ".")
    return run_scenario(
        "tests.connectors.faults.world:run",
        model,
        tmp_path,
        given=(which,),
        timeout=timeout,
        lmc={
            "fetch_patience_s": PATIENCE_S,
            "tiers": [{"name": "disk", "path": str(tmp_path / "kv"), "capacity": "64MiB"}],
        },
        **settings | {"worker_cls": worker},
    )


@pytest.mark.alone
@pytest.mark.parametrize("engine", ENGINES)
def test_each_pair_of_fault_and_claim(engine: str, tiny_llama_dir: Path, tmp_path: Path) -> None:
    check(engine, ran(engine, pairwise(of(engine)), tiny_llama_dir, tmp_path, timeout=280))


@pytest.mark.slow
@pytest.mark.alone
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("engine", ENGINES)
def test_every_fault_meets_every_claim(engine: str, tiny_llama_dir: Path, tmp_path: Path) -> None:
    check(engine, ran(engine, of(engine), tiny_llama_dir, tmp_path, timeout=1700))


def check(engine: str, result: Any) -> None:
    wrong = []
    for name, outcome in result["outcomes"].items():
        aborted = name.startswith("aborted")
        assert (outcome["got"] is None) == aborted, name
        pairs = [("got", "expected"), ("beside", "other"), ("after", "plain"), ("stored", "plain")]
        for got, expected in pairs:
            if outcome[got] is not None and (difference := apart(outcome[got], outcome[expected])):
                how = [told(outcome[one]) for one in (got, expected)]
                wrong.append(f"{name}: {got} is not {expected}: {difference}; {how}")
        if not aborted:
            kinds = outcome["got"].report["kinds"]
            if (
                sum(kinds.values()) != outcome["got"].report["prompt_tokens"]
                or min(kinds.values()) < 0
            ):
                wrong.append(f"{name}: {kinds}")
    assert not wrong, f"{engine}:\n" + "\n".join(wrong)
    assert [tokens > 0 for tokens in result["alone"]] == [False, engine != "no model"]
    assert result["agree"]


def told(answer: Any) -> dict[str, Any]:
    """Of a report, what came of the claim."""
    return {key: answer.report[key] for key in ("kinds", "reason", "bytes") if key in answer.report}


def apart(got: Any, expected: Any) -> str:
    """How two answers differ, or nothing."""
    if got.tokens != expected.tokens:
        return f"tokens {got.tokens[:6]}..., {expected.tokens[:6]}..."
    worst = float(np.abs(got.logprobs - expected.logprobs).max())
    return f"log-probabilities by {worst:.1e}" if worst > 1e-4 else ""


def test_pairs_are_covered_by_few_cases() -> None:
    for engine in ENGINES:
        assert len(pairwise(of(engine))) < len(of(engine)) / 2
