"""The least recompute that a quality bound allows, by what was measured on the model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lmc.blend import STRATEGIES
from lmc.blend.evidence import Outline, Seen
from lmc.blend.strategy import NOTHING, Strategy

if TYPE_CHECKING:
    from lmc.quality.profile import QualityProfile


def tunable(blend: str | dict[str, Any]) -> Strategy:
    """A strategy whose knob somebody else will set.

    Raises:
        ValueError: a strategy that does not exist, has no knob or one that is given already, or
            that only checks or bounds others.
    """
    strategy: Strategy = STRATEGIES.build(blend)
    if strategy.knob is None or strategy.control or strategy.dense or not strategy.moves:
        raise ValueError(f"strategy: got {blend!r}, want one with a ratio or another such knob")
    if strategy.knob in STRATEGIES.parse(blend):
        raise ValueError(f"strategy: got {blend!r}, but {strategy.knob} is chosen for it")
    return strategy


@dataclass(frozen=True)
class Auto(Strategy):
    """Stands for the least value of a strategy's knob that recovers enough; never runs itself.

    Attributes:
        strategy: its name, or name and fields, without the knob.
        min_recovery: the least share of the full-reuse loss that must be recovered.

    Raises:
        ValueError: see `tunable`, or a share that is none.
    """

    strategy: str | dict[str, Any] = "lmc"
    min_recovery: float = 0.5

    def __post_init__(self) -> None:
        tunable(self.strategy)
        if not 0 <= self.min_recovery <= 1:
            raise ValueError(f"min_recovery: got {self.min_recovery}, want 0 to 1")

    def rows(self, outline: Outline, layer: int = 0, seen: Seen = NOTHING) -> np.ndarray:
        raise TypeError("an auto strategy is resolved with a quality profile before it runs")

    def resolve(self, profile: QualityProfile | None) -> Strategy:
        """The strategy to run, whose knob lies at or between values that were measured.

        Raises:
            ValueError: no profile, or no value in it that recovers enough.
        """
        from lmc.quality.profile import best, least_knob

        if profile is None:
            raise ValueError(
                f"auto: there is no quality profile of this model to choose {self.strategy!r} by: "
                "run `lmc calibrate MODEL`"
            )
        strategy = tunable(self.strategy)
        curve = profile.curve(self.strategy, strategy)
        if not curve:
            raise ValueError(
                f"auto: {self.strategy!r} is not in the quality profile of this model: "
                "run `lmc calibrate MODEL --blend STRATEGY`"
            )
        value = least_knob(curve, self.min_recovery)
        if value is None:
            knob, row = best(curve)
            raise ValueError(
                f"auto: no measured {strategy.knob} of {self.strategy!r} reaches min_recovery "
                f"{self.min_recovery:g}; best: {strategy.knob} {knob:g} recovers {row.recovery:.2f}"
            )
        assert strategy.knob is not None
        return dataclasses.replace(strategy, **{strategy.knob: value})
