"""Claims that several ranks compute together; workers are processes of their own here."""

from __future__ import annotations

from typing import Any

from lmc.connectors.vllm import serving
from lmc.connectors.vllm.worker_cls import LMCWorker
from tests.connectors.vllm import one_pass
from tests.connectors.vllm import scenarios as s


class CountingWorker(LMCWorker):
    """Knows how many claims went through the layers together."""

    def compile_or_warm_up_model(self) -> Any:
        self.together: list[int] = []
        run_together = serving.run_together

        def counted(forwards: Any) -> Any:
            self.together += [len(forwards)] if forwards else []
            return run_together(forwards)

        serving.run_together = counted
        return super().compile_or_warm_up_model()

    def passes(self) -> list[int]:
        """Claims of each pass."""
        return self.together


def in_ranks(session: s.Session) -> dict[str, Any]:
    """Claims of one step, and each alone."""
    session.warm()
    prompts = [s.prompt(2, 0, 3), s.prompt(4, 2), s.prompt(5, 0, 3), s.prompt(1, 4)]
    pairs = list(zip(prompts, one_pass.BLENDS, strict=True))
    alone = [session.fresh(parts, blend, save=False) for parts, blend in pairs]
    session.fresh([s.SYSTEM, s.text(12, 20)], enabled=False, tokens=1)
    # Held back until all have come: else the first is a step ahead.
    session.llm.llm_engine.engine_core.call_utility("pause_scheduler", "keep", False)
    ids = [session.add(parts, blend, save=False) for parts, blend in pairs]
    session.llm.llm_engine.engine_core.call_utility("resume_scheduler")
    answers = session.finish()
    return {
        "alone": alone,
        "together": [answers[i] for i in ids],
        "passes": session.llm.collective_rpc("passes"),
    }
