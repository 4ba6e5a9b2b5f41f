"""APE: no row again; attention to the reused texts is sharpened and weighed instead."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from lmc.blend.dense import Attention, Chunks, Dense
from lmc.blend.evidence import Outline, Seen, positions
from lmc.blend.plan import Plan
from lmc.blend.strategy import NOTHING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Ape(Dense):
    """Adaptive parallel encoding: an attention policy, not a selection.

    Yang et al. 2025, arXiv 2502.05431. Meant for texts that were all encoded behind the same
    system prompt, at the same positions: `context: anchored`, `position: local`. Later rows
    attend to all moved tokens at a lower temperature, and that part's weight against the rest
    is scaled: softmax over `[scale * temperature * lse_moved, lse_other]`.

    Attributes:
        temperature, scale: 0.9 each in the released code.

    Raises:
        ValueError: one that is not above 0.
    """

    temperature: float = 0.9
    scale: float = 0.9

    def __post_init__(self) -> None:
        for name in ("temperature", "scale"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name)}")

    def rows(self, outline: Outline, layer: int = 0, seen: Seen = NOTHING) -> np.ndarray:
        return positions([])

    def replan(self, plan: Plan, chunks: Chunks) -> Plan:
        """With the text behind the system prompt moved by nothing, not exact.

        All texts are encoded at one place, so the first of them is no other than the rest.
        """
        exact = [f for f in plan.found if f.kind == "exact" and f.record.origin == "anchored"]
        if not exact or not plan.moved:
            return plan
        found = tuple(f._replace(kind="moved") if f in exact else f for f in plan.found)
        moved = sorted([*plan.moved, *((f.start, f.end) for f in exact)])
        return replace(plan, found=found, moved=tuple(moved), first_moved=moved[0][0])

    def attention(self, plan: Plan) -> Attention:
        return partial(self.attend, plan.outline.candidates)

    def attend(
        self,
        candidates: np.ndarray,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """Attention of query `[1, H, M, D]` to keys `[1, G, T, D]` under mask `[M, T]`.

        candidates: positions of all moved tokens. Rows that see no moved token attend as usual.
        """
        import torch

        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        logits = query @ key.transpose(-1, -2) * scale
        moved = torch.zeros(key.shape[2], dtype=torch.bool, device=key.device)
        moved[torch.from_numpy(candidates[candidates < len(moved)]).to(key.device)] = True
        inside = (logits / self.temperature).masked_fill(~(mask & moved), -torch.inf)
        outside = logits.masked_fill(~(mask & ~moved), -torch.inf)
        lse_in, lse_out = inside.logsumexp(-1), outside.logsumexp(-1)
        shares = torch.stack((self.scale * self.temperature * lse_in, lse_out), -1).softmax(-1)
        # A row that sees none of one kind gives it no weight: its softmax would be NaN.
        parts = [(x - lse[..., None]).exp().nan_to_num(0.0) @ value
                 for x, lse in ((inside, lse_in), (outside, lse_out))]  # fmt: skip
        return shares[..., :1] * parts[0] + shares[..., 1:] * parts[1]
