"""One prompt, many strategies: what each costs, and how far it is from full prefill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch

from lmc.blend.encoding import Context, Position
from lmc.blend.strategy import Strategy
from lmc.connectors.hf.adapter import Pages
from lmc.connectors.hf.model import HFModel
from lmc.connectors.hf.serve import Blended, run_blend
from lmc.connectors.hf.store import HFStore
from lmc.quality.metrics import attention_error, compare, kv_deviation
from lmc.workloads.sample import Sample

ANSWER_TOKENS = 32


@dataclass(frozen=True)
class Case:
    """A sample and what full prefill makes of it; stores of its chunks are made as asked for.

    Attributes:
        answer: the tokens that full prefill decodes greedily; every arm is forced along them.
        reference: full prefill's log-probabilities `[n, V]` of them.
        truth: K and V of full prefill, of the prompt and the answer.
        outputs: its attention outputs `[L, n, H * D]` there.
        true_nll: nats a token, of what truly follows; None where nothing is known to.
    """

    model: HFModel
    sample: Sample
    answer: list[int]
    reference: np.ndarray
    truth: Pages
    outputs: torch.Tensor
    true_nll: float | None
    _stores: dict[Context, HFStore] = field(default_factory=dict, repr=False)

    def store(self, context: Context) -> HFStore:
        """The sample's chunks, encoded as a context policy says."""
        if context not in self._stores:
            store = HFStore(self.model)
            store.add_chunks(context, self.sample.system, self.sample.chunks)
            self._stores[context] = store
        return self._stores[context]


def prepare(model: HFModel, sample: Sample, answer_tokens: int = ANSWER_TOKENS) -> Case:
    """Full prefill of a sample, its greedy answer, and the likelihood of what truly follows."""
    tokens = np.array(sample.prompt.token_ids, np.int64)
    first = model.prefill(tokens, room=max(answer_tokens, len(sample.answer)))
    true_nll = None
    if sample.answer:
        true_nll = _nll(model.forced(tokens, sample.answer, first.pages).logits, sample.answer)
    answer = model.greedy(tokens, first.logits[0], first.pages, answer_tokens)
    # In one call, as arms are forced along it: tokens that come one by one round otherwise.
    forced = model.forced(tokens, answer, first.pages, record=True)
    assert forced.outputs is not None
    reference = _log_probs(forced.logits)
    return Case(model, sample, answer, reference, first.pages, forced.outputs, true_nll)


def measure(
    case: Case, strategy: Strategy, context: Context = "isolated", position: Position = "global"
) -> dict[str, Any]:
    """What one strategy makes of a case, under the names of rows.jsonl.

    `delta_nll` is of what truly follows where that is known, else of full prefill's answer.
    `attention_error`, `k_deviation` and `v_deviation` are by layer, relative to full prefill; the
    deviations are means over the moved tokens.
    """
    blended = blend_case(case, strategy, context, position, record=True)
    row = _quality(case, blended.logits, blended.outputs)
    moved = blended.plan.outline.candidates
    T = blended.plan.T
    if len(moved):
        k, v = kv_deviation(case.truth.rows(0, T), blended.pages.rows(0, T), relative=True)
        row["k_deviation"] = [float(x) for x in k[:, moved].mean(1)]
        row["v_deviation"] = [float(x) for x in v[:, moved].mean(1)]
    return row | {
        "kinds": blended.plan.kinds(),
        "compute_fraction": blended.compute_fraction,
        "flops_fraction": blended.flops_fraction,
    }


def measure_split(case: Case) -> dict[str, Any]:
    """Full prefill in two parts: the same computation but for rounding, so the noise floor."""
    tokens = np.array(case.sample.prompt.token_ids, np.int64)
    room = max(len(answer) for answer in _answers(case))
    pages = case.model.prefill(tokens, split=len(tokens) // 2, room=room).pages
    again = [case.model.forced(tokens, a, pages, record=True) for a in _answers(case)]
    logits, outputs = [forced.logits for forced in again], again[0].outputs
    row = _quality(case, logits, outputs)
    return row | {"kinds": None, "compute_fraction": 1.0, "flops_fraction": 1.0}


def blend_case(
    case: Case, strategy: Strategy, context: Context, position: Position, record: bool = False
) -> Blended:
    """A case's prompt blended, its answers forced behind it."""
    prompt = case.sample.prompt
    return run_blend(
        case.store(context),
        prompt.token_ids,
        case.sample.reusable,
        strategy,
        position=position,
        answers=_answers(case),
        truth=case.truth,
        record=record,
    )


def _answers(case: Case) -> list[Sequence[int]]:
    return [case.answer, case.sample.answer] if case.sample.answer else [case.answer]


def _quality(
    case: Case, logits: list[torch.Tensor], outputs: torch.Tensor | None
) -> dict[str, Any]:
    row = asdict(compare(case.reference, _log_probs(logits[0]), case.answer))
    if case.true_nll is not None:
        row["delta_nll"] = _nll(logits[1], case.sample.answer) - case.true_nll
    assert outputs is not None
    row["attention_error"] = [float(x) for x in attention_error(case.outputs, outputs)]
    return row


def _log_probs(logits: torch.Tensor) -> np.ndarray:
    array: np.ndarray = logits.double().log_softmax(-1).cpu().numpy()
    return array


def _nll(logits: torch.Tensor, tokens: Sequence[int]) -> float:
    target = torch.tensor(list(tokens), device=logits.device)
    return float(torch.nn.functional.cross_entropy(logits.double(), target))
