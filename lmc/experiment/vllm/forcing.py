"""Forced decoding inside vLLM: the raw log-probabilities of every step, and its token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from vllm import SamplingParams
from vllm.v1.sample.logits_processor import AdapterLogitsProcessor

# Log-probabilities [V], float64, by number of tokens before, of the request that is running. The
# engine runs in this process and serves one request at a time: no more plumbing is needed. The
# chunks of a long prompt all come as step 0, the last of them last.
STEPS: dict[int, torch.Tensor] = {}


class Forcing(AdapterLogitsProcessor):
    """Records each step of a request whose `extra_args` has `forced`, and forces its tokens.

    `forced` is the list of token ids to produce; an empty one records greedy decoding. Without
    other processors the logits seen here are the model's own. vLLM could return
    log-probabilities of the whole vocabulary itself, as V Python objects a step.
    """

    def is_argmax_invariant(self) -> bool:
        """False: forcing changes the most likely token."""
        return False

    def new_req_logits_processor(
        self, params: SamplingParams
    ) -> Callable[[list[int], torch.Tensor], torch.Tensor] | None:
        """What handles one request's logits `[V]`, or None to leave them alone."""
        forced = (params.extra_args or {}).get("forced")
        if forced is None:
            return None

        def record(output_ids: list[int], logits: torch.Tensor) -> torch.Tensor:
            STEPS[len(output_ids)] = logits.double().log_softmax(-1).cpu()
            if not forced:
                return logits
            token = forced[len(output_ids)]
            kept = logits[token].clone()
            logits.fill_(float("-inf"))
            logits[token] = kept
            return logits

        return record
