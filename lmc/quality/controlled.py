"""CacheBlend's loading controller: recompute as many rows as loading hides."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lmc.blend import STRATEGIES
from lmc.blend.evidence import Need, Outline, Seen
from lmc.blend.strategy import NOTHING, Strategy
from lmc.model.times import TTFTModel, load, prefill_work
from lmc.quality.auto import tunable


@dataclass(frozen=True)
class Controlled(Strategy):
    """A strategy at the ratio whose recompute takes as long as loading the moved tokens does.

    The largest r with r * T_prefill <= T_load, but at least the floor: Yao et al. 2024, arXiv
    2405.16444, section on the loading controller. Rows beyond that would make the request later,
    fewer would not make it earlier, where layers load while others compute. Times are those of
    a time model, so the ratio is a function of the request alone.

    Attributes:
        times: path of a time model, as `lmc fit` writes it.
        strategy: name, or name and fields, of one with a `ratio`, which is not given here.
        floor: the least ratio; 15% in the paper.
        tier: where the moved tokens are loaded from, a tier of the time model.
        model: what that file says; no field of the config.

    Raises:
        ValueError: a time model that cannot be read or has no such tier, a floor outside [0, 1], or
            a strategy without a ratio.
    """

    times: str
    strategy: str | dict[str, Any] = "cacheblend"
    floor: float = 0.15
    tier: str = "host"
    # A field, so that what is derived from a strategy's repr changes with the file.
    model: TTFTModel = field(init=False)

    def __post_init__(self) -> None:
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor must be from 0 to 1, got {self.floor}")
        inner = tunable(self.strategy)
        if inner.knob != "ratio":
            raise ValueError(f"strategy: got {self.strategy!r}, want one with a ratio")
        model = load(Path(self.times))
        tiers = [tier.name for tier in model.tiers]
        if self.tier not in tiers:
            raise ValueError(f"tier: got {self.tier!r}; valid: {', '.join(tiers) or 'none'}")
        object.__setattr__(self, "model", model)
        object.__setattr__(self, "_inner", inner)

    @property
    def least(self) -> tuple[dict[str, Any], Strategy]:
        """Config and strategy of a request whose loading hides nothing."""
        return {**STRATEGIES.parse(self.strategy), "ratio": self.floor}, self._at(self.floor)

    @property
    def rotate(self) -> bool:
        return self._at(self.floor).rotate

    @property
    def mask(self) -> Literal["position", "bottom_right"]:
        return self._at(self.floor).mask

    @property
    def written(self) -> Literal["all", "selected"]:
        return self._at(self.floor).written

    def ratio(self, outline: Outline) -> float:
        """Share of the moved rows; in steps of a hundredth, but for the floor."""
        loaded = [outline.n * (tier.name == self.tier) for tier in self.model.tiers]
        load_s = float(self.model.load_s(loaded))
        prefill_s = float(
            self.model.seconds(*prefill_work(outline.T, 0), np.zeros(len(self.model.tiers)))
        )
        hidden = load_s / prefill_s if prefill_s else 1.0
        return min(1.0, max(self.floor, math.floor(hidden * 100 + 1e-9) / 100))

    def needs(self, outline: Outline) -> tuple[Need, ...]:
        return self._for(outline).needs(outline)

    def counts(self, outline: Outline) -> list[int]:
        return self._for(outline).counts(outline)

    def rows(self, outline: Outline, layer: int = 0, seen: Seen = NOTHING) -> np.ndarray:
        return self._for(outline).rows(outline, layer, seen)

    def _for(self, outline: Outline) -> Strategy:
        return self._at(self.ratio(outline))

    def _at(self, ratio: float) -> Strategy:
        inner: Strategy = dataclasses.replace(self._inner, ratio=ratio)  # type: ignore[attr-defined]
        return inner
