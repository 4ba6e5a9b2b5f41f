"""Seconds to the first token, from what a request computes and what it loads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import ArrayLike
from pydantic import ConfigDict, TypeAdapter, ValidationError

from lmc.registry import PlainLoader, one_line

LONGEST = 80  # letters of a name, as a title has it


@dataclass(frozen=True)
class TierSpeed:
    """How long a tier takes to hand over KV: `latency_s + bytes / bytes_per_s`.

    Raises ValueError for a latency below 0 or a bandwidth that is not above 0. The bandwidth may
    be infinite.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: str
    latency_s: float
    bytes_per_s: float

    def __post_init__(self) -> None:
        if not 0 <= self.latency_s < math.inf:
            raise ValueError(f"tier {self.name}: got latency_s {self.latency_s}, want 0 or more")
        if not self.bytes_per_s > 0:
            raise ValueError(f"tier {self.name}: got bytes_per_s {self.bytes_per_s}, want above 0")


@dataclass(frozen=True)
class TTFTModel:
    """A linear model of one request's time to first token, on an engine that does nothing else.

    compute = fixed_s + per_row_s · rows + per_pair_s · pairs (+ blend_s), where a row is a token
    that is computed and a pair is such a row and one key it attends to; load = the sum over the
    tiers used of `latency_s + tokens · bytes_per_token / bytes_per_s`; and
    seconds = compute + load - overlap · min(compute, load).

    Attributes:
        blend_s: of the second forward that a strategy needs when rows among reused tokens are
            computed: it reads all weights again, however few the rows.
        per_output_token_s: for which a server is held per token after the first; 0 is a server
            that only prefills. Not part of the TTFT.
        overlap: share of the loading that hides behind computing, or the other way round: 0
            where all is loaded first, as lmc does; 1 where every layer's load hides behind the
            layer before it.
        bytes_per_token: of KV.
        tiers: in the order of the columns of `loaded`.
        model: the model's name.
        provenance: what the constants were measured on.

    Raises ValueError for a constant below 0, an overlap outside [0, 1] or two tiers of one name.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    fixed_s: float
    per_row_s: float
    per_pair_s: float
    bytes_per_token: float
    tiers: tuple[TierSpeed, ...]
    blend_s: float = 0.0
    per_output_token_s: float = 0.0
    overlap: float = 0.0
    model: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("fixed_s", "per_row_s", "per_pair_s", "blend_s", "per_output_token_s"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: got {getattr(self, name)}, want 0 or more")
        if not 0 < self.bytes_per_token < math.inf:
            raise ValueError(f"bytes_per_token: got {self.bytes_per_token}, want above 0")
        if not 0 <= self.overlap <= 1:
            raise ValueError(f"overlap: got {self.overlap}, want 0 to 1")
        gpus = self.provenance.get("gpus", 1)
        if not isinstance(gpus, int) or isinstance(gpus, bool) or gpus < 1:
            raise ValueError(f"provenance: got gpus {gpus!r:.80}, want 1 or more")
        names = [tier.name for tier in self.tiers]
        if len(set(names)) < len(names):
            raise ValueError(f"tiers: got {', '.join(names)}, want each name once")

    @property
    def origin(self) -> str:
        """The model and the machine that its seconds are of, and how they were come by."""
        of = self.provenance
        machine = f"{self.gpus} x {of['gpu']!s}" if "gpu" in of else of.get("device")
        where = machine or "a machine that is not named"
        parts = (self.model or "a model", where, of.get("kind", "measured"))
        # A file says what it likes: no more of it than a title takes, and nothing to be obeyed.
        model, where, how = (
            "".join(c if c.isprintable() else "?" for c in str(part)[:LONGEST]) for part in parts
        )
        return f"{model} on {where}, {how}"

    @property
    def gpus(self) -> int:
        """That work on a request together, by arithmetic."""
        return int(self.provenance.get("gpus", 1))

    def load_s(self, loaded: ArrayLike) -> np.ndarray:
        """Seconds to load `loaded` [..., tiers] tokens; a tier that gives none takes none.

        Raises ValueError for another number of tiers.
        """
        tokens = np.asarray(loaded, np.float64)
        if tokens.ndim == 0 or tokens.shape[-1] != len(self.tiers):
            raise ValueError(
                f"loaded: got shape {list(tokens.shape)}, want one column for each tier: "
                f"{', '.join(tier.name for tier in self.tiers) or 'none'}"
            )
        latency = np.array([tier.latency_s for tier in self.tiers])
        per_token = np.array([self.bytes_per_token / tier.bytes_per_s for tier in self.tiers])
        return np.sum(latency * (tokens > 0) + per_token * tokens, axis=-1)

    def seconds(
        self, rows: ArrayLike, pairs: ArrayLike, loaded: ArrayLike, blends: ArrayLike = False
    ) -> np.ndarray:
        """[R] seconds to the first token.

        Args:
            rows: [R] rows computed.
            pairs: [R] their (row, key) pairs.
            loaded: [R, tiers] tokens whose KV each tier hands over.
            blends: [R] whether rows among reused tokens are computed.
        """
        compute = (
            self.fixed_s
            + self.per_row_s * np.asarray(rows, np.float64)
            + self.per_pair_s * np.asarray(pairs, np.float64)
            + self.blend_s * np.asarray(blends, np.float64)
        )
        load = self.load_s(loaded)
        return compute + load - self.overlap * np.minimum(compute, load)

    def break_even(self, tier: str, T: int) -> int | None:
        """Tokens at the start of a prompt of T that `tier` must hold for reuse to pay.

        From this number on, up to T - 1, reuse is never slower than computing the whole prompt.
        None where even T - 1 tokens take longer. Raises ValueError for an unknown tier or a
        prompt of fewer than 2 tokens.
        """
        found = np.arange(1, _at_least_two(T))
        loaded = found[:, None] * self._column(tier)
        full = self.seconds(*prefill_work(T, 0), np.zeros(len(self.tiers)))
        slower = self.seconds(*prefill_work(T, found), loaded) > full
        if slower[-1]:
            return None
        return int(found[slower][-1]) + 1 if slower.any() else 1

    def verdict(self, tier: str, T: int) -> str:
        """In words, whether reuse out of a tier pays in prompts of T tokens; see `break_even`."""
        n = min(1000, _at_least_two(T) - 1)
        load = float(self.load_s(n * self._column(tier)))
        compute = self.per_row_s * n + self.per_pair_s * n * (n + 1) / 2
        least = self.break_even(tier, T)
        if least is None:
            pays = f"reuse is slower than computing however many of {T:,} tokens are found"
        elif least == 1:
            pays = f"reuse is never slower than computing, in prompts of {T:,} tokens"
        else:
            pays = f"reuse is slower than computing below {least:,} found tokens of {T:,}"
        return (
            f"{tier}: loading {n:,} tokens takes {load:.3g} s, computing the first {n:,} of a "
            f"prompt {compute:.3g} s: {pays}"
        )

    def _column(self, tier: str) -> np.ndarray:
        names = [t.name for t in self.tiers]
        if tier not in names:
            raise ValueError(f"tier: got {tier!r}; valid: {', '.join(names) or 'none'}")
        return np.array([float(name == tier) for name in names])

    def save(self, path: Path) -> None:
        """Write the model as YAML, one key for each attribute."""
        fields = asdict(self)
        fields["tiers"] = list(fields["tiers"])
        path.write_text(yaml.safe_dump(fields, sort_keys=False, width=100))


def prefill_work(T: ArrayLike, found: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Rows and (row, key) pairs [R] of prefill when `found` [R] tokens at the start are held.

    Rows found..T-1 are computed, that at position p attends to p + 1 keys, and the last token is
    always computed.

    Raises ValueError for a prompt of no tokens, or for more found than it has.
    """
    all_tokens, held = np.asarray(T, np.float64), np.asarray(found, np.float64)
    if np.any(all_tokens < 1) or np.any(held < 0) or np.any(held > all_tokens):
        raise ValueError(
            f"tokens: got T {_range(all_tokens)}, found {_range(held)}; want T of at least 1 and "
            "0 to T of them found"
        )
    held = np.minimum(held, all_tokens - 1)
    return all_tokens - held, (all_tokens - held) * (all_tokens + held + 1) / 2


def load(path: Path) -> TTFTModel:
    """Read a time model. Raises ValueError for a file that is missing, no YAML or no model."""
    try:
        fields = yaml.load(path.read_text(encoding="utf-8"), Loader=PlainLoader)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: is not UTF-8: {error.reason}") from error
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{path}: is not YAML: {error}") from error
    try:
        return TypeAdapter(TTFTModel).validate_python(fields)
    except ValidationError as error:
        raise ValueError(f"{path}: {one_line(error)}") from error


def _at_least_two(T: int) -> int:
    if T < 2:
        raise ValueError(f"T: got {T}, want at least 2, since the last token is always computed")
    return T


def _range(a: np.ndarray) -> str:
    return f"{a.min():g} to {a.max():g}" if a.size else "none"
