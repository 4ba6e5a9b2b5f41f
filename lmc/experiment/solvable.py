"""Whether a model can do a task at all: without that, its loss by blending says nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lmc.results.statistics import Estimate, bootstrap
from lmc.workloads.sample import Sample

SOLVABLE = 0.8  # share of prompts that full prefill must answer


@dataclass(frozen=True)
class Solved:
    """What full prefill answers.

    Attributes:
        right: for each sample, whether every answer token is the most likely one behind the
            prompt and the answer tokens before it: greedy decoding then gives the answer.
        share: share of right samples, with a bootstrap interval over samples.
    """

    right: list[bool]
    share: Estimate

    @property
    def solvable(self) -> bool:
        """Whether the share reaches `SOLVABLE`."""
        return self.share.value >= SOLVABLE


def solved(model: Any, samples: Sequence[Sample]) -> Solved:
    """Answer every sample by full prefill, one forward each.

    model: a transformers causal language model.

    Raises ValueError for no samples and for a sample without an answer.
    """
    if not samples:
        raise ValueError("samples: got none, want at least one")
    for i, sample in enumerate(samples):
        if not sample.answer:
            raise ValueError(f"sample {i}: got no answer tokens, want at least one")
    right = [_answers(model, sample) for sample in samples]
    share = bootstrap([[float(r)] for r in right], np.mean)
    assert share is not None
    return Solved(right, share)


@torch.inference_mode()
def _answers(model: Any, sample: Sample) -> bool:
    # The last answer token is predicted, never read.
    ids = torch.tensor([sample.prompt.token_ids + sample.answer[:-1]], device=model.device)
    logits = model(ids, logits_to_keep=len(sample.answer), use_cache=False).logits[0]
    best: list[int] = logits.argmax(-1).tolist()
    return best == sample.answer
