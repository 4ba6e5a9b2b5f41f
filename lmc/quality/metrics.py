"""How far one arm is from full prefill: its next tokens, its attention, its KV, its cost.

All of it is relative to a full prefill of the same prompt, so no labels are needed. The noise
floor is measured, not assumed: the arm `full_prefill_split` is a full prefill in two batch
splits, goes through the same functions as any other, and what it differs by is rounding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lmc.results.quality import kl_divergence
from lmc.results.summary import Estimate, bootstrap

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
    Both K must be rotated to the same positions. Raises ValueError for other shapes.
    """
    _check(full, arm, "KV", "[L, 2, T, G, D]")
    if full.shape[1] != 2:
        raise ValueError(f"KV: got shape {list(full.shape)}, want [L, 2, T, G, D] of K and V")
    error, size = _norms(full, arm, axis=(-2, -1))
    deviation = _relative(error, size) if relative else error
    return deviation[:, 0], deviation[:, 1]


def paired_difference(
    a: Mapping[Any, float], b: Mapping[Any, float], reuse: Mapping[Any, float]
) -> Estimate:
    """recovery(a) - recovery(b), over the prompts all three have; prompt -> KL.

    Each bootstrap draw takes the same prompts for both arms: how hard a prompt is then cancels,
    which two separate intervals would count twice. Raises ValueError where no prompt is common
    or full_reuse loses nothing.
    """
    common = [p for p in a if p in b and p in reuse]
    estimate = bootstrap([(a[p], b[p], reuse[p]) for p in common], _recovery_difference)
    if estimate is None or np.isnan(estimate.value):
        raise ValueError(
            f"paired difference: got {len(common)} prompts that both arms and full_reuse have, "
            "want at least one, and one where full_reuse has KL above 0"
        )
    return estimate


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the (cost, value) points that no other dominates, in ascending order of cost.

    A point dominates another if it costs no more, is worth no less, and is better in one of the
    two; of equal points all stay. Raises ValueError for NaN, which has no order.
    """
    if np.isnan(np.asarray(points, float)).any():
        raise ValueError(f"points: got NaN among {list(points)}, want (cost, value) numbers")
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not front or points[i][1] > points[front[-1]][1] or points[i] == points[front[-1]]:
            front.append(i)
    return front


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


def _recovery_difference(sample: list[Any]) -> float:
    a, b, reference = np.sum(sample, axis=0)
    return float((b - a) / reference) if reference else float("nan")
