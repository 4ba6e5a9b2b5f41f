"""The gate: whether a strategy was measured on this model, and recovers enough of the quality."""

from __future__ import annotations

from typing import Literal

from lmc.blend import STRATEGIES
from lmc.blend.encoding import Context
from lmc.blend.strategy import Strategy
from lmc.quality.auto import Auto
from lmc.quality.controlled import Controlled
from lmc.quality.profile import Blend, Curve, QualityProfile, interpolated, knob_of
from lmc.store.record import ContextPolicy

Uncalibrated = Literal["refuse", "allow"]
# How chunks are encoded under a store's context policy, in the words of a profile.
ENCODED: dict[ContextPolicy, Context] = {
    "any": "first_seen",
    "shared_prefix": "anchored",
    "isolated": "isolated",
}


def admit(
    blend: Blend,
    strategy: Strategy,
    profile: QualityProfile | None,
    min_recovery: float | None,
    uncalibrated: Uncalibrated = "refuse",
    context: Context = "isolated",
) -> Strategy | str:
    """The strategy to run, an automatic one resolved, or why chunks must not be moved.

    As `verdict`; where `min_recovery` is None, any strategy may run.
    """
    if isinstance(strategy, Auto):
        blend = strategy.strategy
        try:
            strategy = strategy.resolve(profile)
        except ValueError as error:
            return str(error)
    if min_recovery is None:
        return strategy
    return verdict(blend, strategy, profile, min_recovery, uncalibrated, context) or strategy


def verdict(
    blend: Blend,
    strategy: Strategy,
    profile: QualityProfile | None,
    min_recovery: float,
    uncalibrated: Uncalibrated = "refuse",
    context: Context = "isolated",
) -> str | None:
    """Why chunks must not be moved by this strategy, in one line; None when they may.

    What cannot lose quality passes: exact reuse, and controls. A controlled strategy is judged at
    its floor.

    Args:
        blend: the config that `strategy` was built from.
        profile: of the model, if there is one.
        min_recovery: the least recovery of the full-reuse loss.
        context: how chunks are encoded here, as the profile must have had them.
        uncalibrated: what becomes of a strategy that the profile says nothing of.
    """
    if strategy.control or not strategy.moves:
        return None
    if isinstance(strategy, Controlled):
        blend, strategy = strategy.least
    if profile is None:
        option = "" if context == "isolated" else f" --context {context}"
        why = f"no quality profile of this model with {context} chunks: "
        why += f"run `lmc calibrate MODEL{option}`"
        return why if uncalibrated == "refuse" else None
    curve = profile.curve(blend, strategy)
    found = interpolated(curve, knob_of(strategy))
    if found is None:
        why = f"{described(blend, strategy)} is not in the quality profile of this model"
        return f"{why} ({_known(curve, strategy)})" if uncalibrated == "refuse" else None
    recovery, low, high = found
    if recovery >= min_recovery:
        return None
    return (
        f"recovery of {described(blend, strategy)} is {recovery:.2f} [{low:.2f}, {high:.2f}], "
        f"below min_recovery {min_recovery:g}"
    )


def described(blend: Blend, strategy: Strategy) -> str:
    """A strategy on one line: its name, the fields that were given, and its knob."""
    fields = STRATEGIES.parse(blend)
    name = fields.pop("name")
    if strategy.knob is not None:
        fields[strategy.knob] = knob_of(strategy)
    return " ".join([str(name), *(f"{field}={value}" for field, value in fields.items())])


def _known(curve: Curve, strategy: Strategy) -> str:
    if curve:
        return f"measured: {strategy.knob} from {curve[0][0]:g} on"
    return "run `lmc calibrate MODEL --blend STRATEGY`"
