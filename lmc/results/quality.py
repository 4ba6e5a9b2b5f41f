"""How far an arm's next tokens are from those of full prefill."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Quality:
    """One prompt, one arm, against full prefill; the names are those of the rows.

    Forced positions are the last of the prompt and those of the reference answer but its last.
    logprob_error: greatest difference of the first token's log-probabilities, whole vocabulary.
    kl_last: KL(full || arm) of the first token's distribution, in nats, whole vocabulary.
    kl_mean: the same, mean over the forced positions.
    top1_agreement: share of forced positions with the same most likely token.
    delta_nll: mean increase of the reference tokens' negative log-likelihood, in nats.
    greedy_agreement: share of equal tokens, place by place, of the arm's own greedy answer.
    """

    logprob_error: float
    kl_last: float
    kl_mean: float
    top1_agreement: float
    delta_nll: float
    greedy_agreement: float


def kl_divergence(full: np.ndarray, arm: np.ndarray) -> np.ndarray:
    """KL(full || arm) in nats from log-probabilities `[..., V]`, summed in float64."""
    full, arm = np.asarray(full, np.float64), np.asarray(arm, np.float64)
    p = np.exp(full)
    with np.errstate(invalid="ignore"):
        terms = np.where(p > 0, p * (full - arm), 0.0)
    # Rounding can leave a tiny negative sum where the two are equal.
    return np.maximum(terms.sum(-1), 0.0)


def compare(
    reference_tokens: list[int],
    reference: np.ndarray,
    forced: np.ndarray,
    greedy_tokens: list[int],
) -> Quality:
    """Quality from full prefill's greedy answer `[n]` and log-probabilities `[n, V]`.

    forced: the arm's log-probabilities `[n, V]` while the reference answer is forced.
    greedy_tokens: the arm's own answer `[n]`.
    """
    kl = kl_divergence(reference, forced)
    places = np.arange(len(reference_tokens))
    increase = reference[places, reference_tokens] - forced[places, reference_tokens]
    return Quality(
        logprob_error=float(np.abs(reference[0] - forced[0]).max()),
        kl_last=float(kl[0]),
        kl_mean=float(kl.mean()),
        top1_agreement=float(np.mean(reference.argmax(-1) == forced.argmax(-1))),
        delta_nll=float(increase.mean()),
        greedy_agreement=float(np.mean(np.equal(reference_tokens, greedy_tokens))),
    )
