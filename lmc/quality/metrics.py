"""How far one arm is from full prefill: its next tokens, its attention, its KV, its cost.

All of it is relative to a full prefill of the same prompt, so no labels are needed. The noise
floor is measured, not assumed: the arm `full_prefill_split` is a full prefill in two batch
splits, goes through the same functions as any other, and what it differs by is rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

TOP = 5


@dataclass(frozen=True)
class PromptQuality:
    """One prompt, one arm, against full prefill, over n forced positions; the names of the rows.

    kl_mean: KL(full || arm) in nats over the whole vocabulary, mean over the positions.
    kl_last: the same of the first answer token alone, whose row is the last of the prompt.
    kl_by_position: the same of each position, n values.
    top1_agreement: share of positions with the same most likely token.
    top5_overlap: mean share of full prefill's five most likely tokens that are the arm's too.
    delta_nll: mean increase of the forced tokens' negative log-likelihood, in nats.
    first_divergence: the first position where the most likely tokens differ; n if none.
    logprob_rmse: root mean square difference of the logits, each position's centred on their
        mean over the vocabulary; unlike KL it counts unlikely tokens as much as likely ones.
    """

    kl_mean: float
    kl_last: float
    kl_by_position: list[float]
    top1_agreement: float
    top5_overlap: float
    delta_nll: float
    first_divergence: int
    logprob_rmse: float


@dataclass(frozen=True)
class AnswerQuality:
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
    full_logprobs: np.ndarray | Tensor, arm_logprobs: np.ndarray | Tensor, tokens: Sequence[int]
) -> PromptQuality:
    """Quality from log-probabilities `[n, V]` while the same `tokens` `[n]` are forced.

    Position i is the row that predicts tokens[i]. With fewer than five ids in the vocabulary, all
    of them are the most likely. Raises ValueError for shapes that do not fit, for tokens outside
    the vocabulary, and for rows that are not log-probabilities (finite, and their exponentials
    add up to 1): raw logits would give numbers too, and wrong ones.
    """
    _check(full_logprobs, arm_logprobs, "log-probabilities", "[n, V]")
    full, arm = _float64(full_logprobs), _float64(arm_logprobs)
    forced = np.asarray(tokens)
    n, V = full.shape
    if forced.shape != (n,):
        raise ValueError(f"tokens: got shape {list(forced.shape)}, want [{n}], one a position")
    if forced.min() < 0 or forced.max() >= V:
        raise ValueError(f"tokens: got ids {forced.min()} to {forced.max()}, allowed: 0 to {V - 1}")
    for name, logprobs in (("full", full), ("arm", arm)):
        total = np.exp(logprobs).sum(-1)
        if not (np.isfinite(logprobs).all() and np.allclose(total, 1, atol=1e-2)):
            raise ValueError(
                f"{name} log-probabilities: got rows whose exponentials add up to "
                f"{total.min():.3g} to {total.max():.3g}; want finite ones that add up to 1"
            )
    kl = kl_divergence(full, arm)
    same = full.argmax(-1) == arm.argmax(-1)
    places = np.arange(n)
    centred = [x - x.mean(-1, keepdims=True) for x in (full, arm)]
    return PromptQuality(
        kl_mean=float(kl.mean()),
        kl_last=float(kl[0]),
        kl_by_position=kl.tolist(),
        top1_agreement=float(same.mean()),
        top5_overlap=float((_top(full) & _top(arm)).sum() / _top(full).sum()),
        delta_nll=float((full[places, forced] - arm[places, forced]).mean()),
        first_divergence=n if same.all() else int(same.argmin()),
        logprob_rmse=float(np.sqrt(np.square(centred[0] - centred[1]).mean())),
    )


def compare_answers(
    reference_tokens: list[int],
    reference: np.ndarray,
    forced: np.ndarray,
    greedy_tokens: list[int],
) -> AnswerQuality:
    """Quality from full prefill's greedy answer `[n]` and log-probabilities `[n, V]`.

    forced: the arm's log-probabilities `[n, V]` while the reference answer is forced.
    greedy_tokens: the arm's own answer `[n]`.
    """
    kl = kl_divergence(reference, forced)
    places = np.arange(len(reference_tokens))
    increase = reference[places, reference_tokens] - forced[places, reference_tokens]
    return AnswerQuality(
        logprob_error=float(np.abs(reference[0] - forced[0]).max()),
        kl_last=float(kl[0]),
        kl_mean=float(kl.mean()),
        top1_agreement=float(np.mean(reference.argmax(-1) == forced.argmax(-1))),
        delta_nll=float(increase.mean()),
        greedy_agreement=float(np.mean(np.equal(reference_tokens, greedy_tokens))),
    )


def attention_error(full: np.ndarray | Tensor, arm: np.ndarray | Tensor) -> np.ndarray:
    """Relative error `[L]` of attention outputs `[L, M, H*D]` of the same M rows.

    Per layer ||arm - full|| / ||full||, Frobenius norms: the attention deviation of CacheBlend
    (arXiv 2405.16444, section 4), relative so that layers compare. 0/0 is 0. Raises ValueError
    for other shapes.
    """
    _check(full, arm, "attention outputs", "[L, M, H*D]")
    error, size = _norms(full, arm, axis=None)
    return _relative(error, size)


def kv_deviation(
    full: np.ndarray | Tensor, arm: np.ndarray | Tensor, relative: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Deviation of K `[L, T]` and of V `[L, T]` between two chunk buffers `[L, 2, T, G, D]`.

    The L2 norm of the difference over all kv heads, per layer and token (CacheBlend, arXiv
    2405.16444, section 4); with `relative` divided by the norm of the full row, 0/0 being 0.
    Both K must be rotated to the same positions. Latents `[L, 1, T, 1, D]` are K and V at once.
    Raises ValueError for other shapes.
    """
    _check(full, arm, "KV", "[L, 2, T, G, D]")
    if full.shape[1] not in (1, 2):
        raise ValueError(f"KV: got shape {list(full.shape)}, want [L, 2, T, G, D] of K and V")
    error, size = _norms(full, arm, axis=(-2, -1))
    deviation = _relative(error, size) if relative else error
    return deviation[:, 0], deviation[:, -1]


def recovery(kl: Sequence[float] | np.ndarray, reuse: Sequence[float] | np.ndarray) -> float:
    """1 - mean KL / mean KL of full reuse, of the same prompts: 1 is full prefill, 0 full reuse.

    NaN where full reuse loses nothing.
    """
    lost = float(np.sum(reuse))
    return 1 - float(np.sum(kl)) / lost if lost else float("nan")


def _float64(x: np.ndarray | Tensor) -> np.ndarray:
    # numpy has no bfloat16 and cannot read a GPU.
    return x.astype(np.float64) if isinstance(x, np.ndarray) else x.detach().cpu().double().numpy()


def _check(full: np.ndarray | Tensor, arm: np.ndarray | Tensor, what: str, shape: str) -> None:
    """Both are arrays of one shape, with as many axes as `shape` and nothing empty."""
    if tuple(full.shape) != tuple(arm.shape):
        raise ValueError(f"{what}: got {list(full.shape)} and {list(arm.shape)}, want one shape")
    if full.ndim != shape.count(",") + 1 or 0 in full.shape:
        raise ValueError(f"{what}: got shape {list(full.shape)}, want {shape}, none of them 0")


def _top(logprobs: np.ndarray) -> np.ndarray:
    """Which ids `[n, V]` are among the most likely `TOP` of their position."""
    k = min(TOP, logprobs.shape[-1])
    chosen = np.zeros(logprobs.shape, bool)
    np.put_along_axis(chosen, np.argpartition(logprobs, -k, -1)[:, -k:], True, -1)
    return chosen


def _norms(
    full: np.ndarray | Tensor, arm: np.ndarray | Tensor, axis: tuple[int, int] | None
) -> tuple[np.ndarray, np.ndarray]:
    """L2 norms over `axis` of arm - full and of full, stacked by layer.

    One layer at a time: a whole buffer in float64 would be several times the model's KV.
    """
    error, size = [], []
    for layer, other in zip(full, arm, strict=True):
        x, y = _float64(layer), _float64(other)
        error.append(np.sqrt(np.square(y - x).sum(axis)))
        size.append(np.sqrt(np.square(x).sum(axis)))
    return np.array(error), np.array(size)


def _relative(error: np.ndarray, size: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(error == 0, 0.0, error / size)
