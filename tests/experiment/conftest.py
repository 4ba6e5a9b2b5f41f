"""An engine that only pretends."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmc.experiment.vllm.engines import Answer, Request
from lmc.model.cost import PrefillCost


class PretendedEngine:
    """Answers at once; `requests` holds all that any of them was asked."""

    requests: list[tuple[str, Request | str]] = []  # noqa: RUF012 - shared on purpose

    def __init__(self, model: str, config: Any, lmc: Any, log: Path):
        self.name = "stock" if lmc is None else "lmc"
        self.device, self.cost = "none", PrefillCost(1.0, 0.0)

    def __enter__(self) -> PretendedEngine:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def wait(self) -> None:
        pass

    def drain(self) -> None:
        self.requests.append((self.name, "drain"))

    def ask(self, request: Request) -> Answer:
        self.requests.append((self.name, request))
        T, n = len(request.token_ids), request.max_tokens
        report = None
        if self.name == "lmc":
            kinds = {"local": 0, "local_blended": 0, "exact": 0, "moved": T - 40}
            kinds |= {"recomputed": 10, "new": 30}
            report = {"prompt_tokens": T, "kinds": kinds, "compute_fraction": 40 / T}
            report |= {"flops_fraction": 0.2, "strategy": "epic", "reason": None, "bytes": {}}
        log_probs = np.log(np.full((n, 4), 0.25))
        return Answer([1] * n, 0.1, 0.1, 0, report, log_probs)


@pytest.fixture
def pretended(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Request | str]]:
    """`lmc.experiment.vllm.run` on pretended engines; returns what they are asked, as it grows."""
    PretendedEngine.requests = []
    monkeypatch.setattr("lmc.experiment.vllm.run.Engine", PretendedEngine)
    return PretendedEngine.requests
