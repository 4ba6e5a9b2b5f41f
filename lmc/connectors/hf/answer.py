"""One call for a notebook: segments and a strategy in, logits, an answer and a report out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lmc.blend.encoding import Context, Position
from lmc.chunking.prompt import prompt
from lmc.connectors.hf.model import HFModel
from lmc.connectors.hf.serve import Blended, run_blend
from lmc.connectors.hf.store import HFStore
from lmc.quality import BLENDS
from lmc.quality.auto import Auto
from lmc.quality.metrics import kl_divergence


@dataclass(frozen=True)
class Answer:
    """A blended prompt, as a notebook shows it.

    Attributes:
        logits: `[V]` fp32 of the prompt's last token.
        token_ids: the greedy answer, up to the tokenizer's end token. text: the same, decoded.
        report: prompt_tokens, kinds (which add up to it), compute_fraction, flops_fraction,
            strategy, context and position; with `compare` also kl_last, KL(full prefill ||
            blended) in nats at the last token, and where an answer is generated kl_mean and
            top1_agreement over full prefill's answer, forced on both.
        selection: positions that the strategy chose, by layer.
        blended: all the rest: plan, K and V, forced logits.
    """

    logits: torch.Tensor
    token_ids: list[int]
    text: str
    report: dict[str, Any]
    selection: list[list[int]]
    blended: Blended


def answer(
    model: Any,
    tokenizer: Any,
    segments: Sequence[str | Sequence[int]],
    strategy: str | Mapping[str, Any] = "full_reuse",
    *,
    context: Context = "isolated",
    position: Position = "global",
    max_new_tokens: int = 0,
    compare: bool = False,
) -> Answer:
    """Answer a prompt whose middle segments were encoded elsewhere.

        from transformers import AutoModelForCausalLM, AutoTokenizer
        import lmc
        model = AutoModelForCausalLM.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        segments = ["Be brief.", " Ann lives in Rome.", " Bob lives in Oslo.", " Bob lives in"]
        result = lmc.answer(model, tokenizer, segments, "epic", max_new_tokens=8, compare=True)
        result.text, result.report["compute_fraction"], result.report["kl_last"]

    Args:
        model: a transformers decoder, or an `HFModel` of one, which skips its checks.
        tokenizer: its tokenizer; None where all segments are token ids.
        segments: texts or token ids: the system prompt, the chunks to reuse, the question.
        strategy: as `blend` in a config: a name, a name and fields (`epic:4`), or your own
            `module:Class`.
        context: what the chunks were encoded in; see `HFStore.add_chunks`.
        position: where they stand; see `run_blend`.
        max_new_tokens: length of the greedy answer; 0 for none.
        compare: measure the distance to full prefill, which is computed for it.

    Raises:
        ValueError: fewer than two segments or an empty one, a text and no tokenizer, a token the
            model does not have, an unknown strategy, context or position, a negative length, or
            a model that cannot be blended.
    """
    chosen = BLENDS.build(strategy)
    if isinstance(chosen, Auto):
        raise ValueError("strategy: got auto, which an engine resolves by its quality profile")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens: got {max_new_tokens}, allowed: 0 or more")
    if isinstance(segments, str) or len(segments) < 2:
        raise ValueError(
            f"segments: got {segments!r}, want at least two: the system prompt, then the chunks "
            "to reuse, and the question"
        )
    if tokenizer is None and any(isinstance(segment, str) for segment in segments):
        raise ValueError("tokenizer: got None, which is allowed for segments of token ids only")
    whole = prompt(segments, tokenizer)
    hf = model if isinstance(model, HFModel) else HFModel(model)
    tokens = np.array(whole.token_ids, np.int64)
    if tokens.min() < 0 or tokens.max() >= hf.vocabulary:
        raise ValueError(
            f"token ids: got {tokens.min()} to {tokens.max()}, allowed: 0 to {hf.vocabulary - 1}"
        )
    store = HFStore(hf)
    system, *chunks, _ = (whole.token_ids[start:end] for start, end in whole.spans)
    store.add_chunks(context, system, chunks)
    forced: list[int] = []
    reference = torch.empty(0)
    if compare:
        full = hf.prefill(tokens, room=max_new_tokens)
        forced = hf.greedy(tokens, full.logits[0], full.pages, max_new_tokens)
        reference = hf.forced(tokens, forced, full.pages).logits if forced else full.logits
    blended = run_blend(
        store,
        whole.token_ids,
        whole.spans[:-1],
        chosen,
        position=position,
        answers=(forced,),
        generate=max_new_tokens,
    )
    report: dict[str, Any] = {
        "prompt_tokens": len(tokens),
        "kinds": blended.plan.kinds(),
        "compute_fraction": blended.compute_fraction,
        "flops_fraction": blended.flops_fraction,
        "strategy": strategy,
        "context": context,
        "position": position,
    }
    if compare:
        report |= _distance(reference, blended.logits[0])
    ids = blended.answer
    end = getattr(tokenizer, "eos_token_id", None)
    ids = ids[: ids.index(end)] if end in ids else ids
    text = tokenizer.decode(ids) if tokenizer is not None else ""
    return Answer(blended.logits[0][0], ids, text, report, blended.selection, blended)


def _distance(full: torch.Tensor, blended: torch.Tensor) -> dict[str, float]:
    """KL in nats and agreement of logits `[n, V]`; the first row is the prompt's last."""
    p, q = (logits.double().log_softmax(-1).cpu().numpy() for logits in (full, blended))
    kl = kl_divergence(p, q)
    distance = {"kl_last": float(kl[0])}
    if len(kl) > 1:
        same = p.argmax(-1) == q.argmax(-1)
        distance |= {"kl_mean": float(kl.mean()), "top1_agreement": float(same.mean())}
    return distance
