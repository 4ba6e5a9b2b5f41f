"""The quality gate: chunks are moved only by strategies that were measured on this model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from lmc.blend.baselines import Prefix
from lmc.blend.strategy import Strategy
from lmc.connectors.vllm import identity
from lmc.connectors.vllm.config import (
    LMCConfig,
    build_strategy,
    check_layers,
    check_runs,
)
from lmc.connectors.vllm.request import RequestOptions
from lmc.model.layout import KVLayout
from lmc.model.rope import Rotations
from lmc.quality.auto import Auto
from lmc.quality.gate import ENCODED, admit
from lmc.quality.profile import Blend, QualityProfile, find_profile


@dataclass(frozen=True)
class Quality:
    """What the gate makes of the default strategy.

    Attributes:
        profile: of the model, if there is one.
        strategy: as the config has it.
        admitted: the one that runs, or why none does.
    """

    profile: QualityProfile | None
    strategy: Strategy
    admitted: Strategy | str

    @property
    def moves(self) -> bool:
        """Whether requests that name no strategy move chunks."""
        return not isinstance(self.admitted, str) and self.admitted.moves


class QualityGate:
    """What this engine's profile says of a strategy.

    Attributes:
        weights: digest of the model's weights, or None where they are in no files.
        default: what becomes of requests that name no strategy.

    Raises:
        ValueError: a profile that cannot be read or is of another model, or a strategy of the
            config that the model or a paged engine cannot run.
    """

    def __init__(
        self, vllm_config: Any, layout: KVLayout, rope: Rotations | str, config: LMCConfig
    ) -> None:
        self._config, self._L = config, layout.L
        self.profile: QualityProfile | None = None
        self.weights = identity.weights_of(vllm_config)
        if self.weights is not None and isinstance(rope, Rotations):
            model = (self.weights, layout.dtype, rope.fingerprint)
            self.profile = find_profile(*model, ENCODED[config.context], config.profile)
        elif config.profile is not None:
            raise ValueError(
                f"profile: got {config.profile!r}, but this model's weights are in no files that "
                "it could be compared with"
            )
        strategy = build_strategy(config.blend)
        check_layers(strategy, self._L)
        admitted = self._admit(config.blend, strategy, self.profile)
        self.default = Quality(self.profile, strategy, admitted)

    @property
    def moves_by_default(self) -> bool:
        """Whether requests that name no strategy move chunks."""
        return self.default.moves

    def admit(
        self, options: RequestOptions, adapted: bool = False
    ) -> tuple[RequestOptions, str | None]:
        """The request's options with the strategy that runs, and why it is exact reuse only.

        Args:
            adapted: whether it is under a LoRA adapter, which no profile is of.

        Raises:
            ValueError: a strategy that this model, or a paged engine, cannot run.
        """
        check_layers(options.strategy, self._L)
        profile = None if adapted else self.profile
        found = self._admit(options.config, options.strategy, profile)
        if isinstance(found, str):
            return replace(options, strategy=Prefix()), found
        return replace(options, strategy=found), None

    def _admit(self, blend: Blend, strategy: Any, profile: QualityProfile | None) -> Any:
        config = self._config
        context = ENCODED[config.context]
        found = admit(blend, strategy, profile, config.min_recovery, config.uncalibrated, context)
        if isinstance(strategy, Auto) and not isinstance(found, str):
            check_runs(blend, found)
            check_layers(found, self._L)
        return found
