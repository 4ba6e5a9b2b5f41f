"""What a client may ask for. Whoever sends it shares the engine with others, so nothing is trusted.

A request imports nothing, opens nothing, and names no strategy that its operator has not: those
that are registered, but for controls and for those that read files, and what the config lists.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lmc.blend.strategy import Strategy
from lmc.chunking.pieces import checked_spans
from lmc.connectors.vllm.config import Limits, LMCConfig, build_strategy, check_runs
from lmc.quality import BLENDS

KEYS = ("blend", "chunks", "enabled", "explain", "hand_over", "handed", "save")
NAMES = ("hand_over", "handed")
FLAGS = ("enabled", "explain", "save")
READS_FILES = ("controlled",)
NAME = re.compile(r"[\w-]{8,64}", re.ASCII)
WORD = re.compile(r"[A-Za-z_]\w{0,63}", re.ASCII)


@dataclass(frozen=True)
class RequestOptions:
    """Settings of one request, `kv_transfer_params={"lmc": {...}}`.

    Attributes:
        chunks: spans `(start, end)` the caller knows to be documents, or None.
        strategy: how moved chunks are blended.
        blend: its name. config: what it was built from.
        save: whether this request's KV is stored.
        enabled: false makes the request one that lmc never saw.
        explain: whether its report has the token map, and seconds.
        hand_over: the name under which another engine finds the KV of its prompt as it is here,
            blended or not; handed: the name under which this one is to find it.
    """

    chunks: Sequence[tuple[int, int]] | None
    strategy: Strategy
    blend: str
    config: Mapping[str, Any] | str
    save: bool = True
    enabled: bool = True
    explain: bool = False
    hand_over: str | None = None
    handed: str | None = None


def parse_request(raw: Any, T: int, config: LMCConfig) -> RequestOptions:
    """Read `kv_transfer_params["lmc"]` of a prompt of T tokens; all keys are optional.

    Raises:
        ValueError: unknown keys, a strategy that requests may not name or a wrong one, spans that
            overlap or lie outside, or more of anything than the config's limits.
    """
    raw = {} if raw is None else raw
    if not isinstance(raw, Mapping):
        raise ValueError(f"lmc parameters must be an object, got {type(raw).__name__}")
    if unknown := [key for key in raw if key not in KEYS]:
        raise ValueError(
            f"unknown lmc parameter {_shown(unknown[0])}; valid: {', '.join(KEYS)}, "
            "and of a server behind lmc's front texts"
        )
    for key in FLAGS:
        if not isinstance(raw.get(key, True), bool):
            raise ValueError(f"lmc parameter {key} must be true or false, got {_shown(raw[key])}")
    names = {key: _name(key, raw.get(key)) for key in NAMES}
    said = [key for key in NAMES if names[key] is not None]
    if said and not config.hand_over:
        raise ValueError(
            f"lmc parameter {said[0]}: this engine neither hands prompts over nor takes them "
            "(hand_over of its config)"
        )
    if len(said) > 1:
        raise ValueError(f"lmc parameter {said[0]}: got {said[1]} too, want one of them")
    if names["handed"] is not None and raw.get("blend") is not None:
        raise ValueError("lmc parameter handed: got blend too, which is whose that hands it over")
    chunks = None if raw.get("chunks") is None else _spans(raw["chunks"], T, config.limits)
    name, blend = _asked(raw.get("blend"), config) if not names["handed"] else ("prefix",) * 2
    return RequestOptions(
        chunks=chunks,
        strategy=build_strategy(blend),
        blend=name,
        config=blend,
        save=raw.get("save", True) and names["handed"] is None,  # who handed it over keeps it
        enabled=raw.get("enabled", True),
        explain=raw.get("explain", False),
        **names,
    )


def _name(key: str, name: Any) -> str | None:
    if name is not None and not (isinstance(name, str) and NAME.fullmatch(name)):
        want = "8 to 64 letters, digits, _ and -"
        raise ValueError(f"lmc parameter {key}: got {_shown(name)}, want {want}")
    return name


def _spans(chunks: Any, T: int, limits: Limits) -> list[tuple[int, int]]:
    if not isinstance(chunks, list | tuple):
        raise ValueError(f"lmc parameter chunks must be a list of spans, got {_shown(chunks)}")
    if len(chunks) > limits.spans:
        raise ValueError(
            f"lmc parameter chunks: got {len(chunks)} spans, allowed: {limits.spans} "
            "(limits.spans of the engine's config)"
        )
    try:
        return checked_spans(chunks, T)
    except ValueError as error:
        raise ValueError(f"lmc parameter chunks: {error}") from None


def _asked(blend: Any, config: LMCConfig) -> tuple[str, Mapping[str, Any] | str]:
    """A strategy's name, for reports, and what it is built from."""
    if blend is None:
        return BLENDS.parse(config.blend)["name"], config.blend
    name = blend.get("name") if isinstance(blend, Mapping) else blend
    if isinstance(blend, str) and blend in config.blends:
        return BLENDS.parse(config.blends[blend])["name"], config.blends[blend]
    allowed = allowed_strategies(config)
    if isinstance(name, str) and name in BLENDS.names() and BLENDS.load(name).dense:
        check_runs(name, BLENDS.load(name))  # which says why it does not
    if not (isinstance(name, str) and name in allowed):
        valid = ", ".join([*config.blends, *allowed])
        raise ValueError(
            f"lmc parameter blend: got {_shown(blend)}, want a name or {{name: ..., field: value}}"
            f"; valid: {valid}"
        )
    if isinstance(blend, Mapping):
        check_plain(blend, config.limits)
        return name, blend
    return name, name


def allowed_strategies(config: LMCConfig) -> list[str]:
    """Registered strategies that a request may name, with fields of its own, and that run here."""
    return [
        name
        for name in BLENDS.names()
        if name not in READS_FILES
        and not BLENDS.load(name).dense
        and (config.controls or not BLENDS.load(name).control)
    ]


def check_plain(value: Any, limits: Limits) -> None:
    """Raise ValueError unless a client's value is plain data within bounds.

    Numbers are finite and fit 64 bits; texts are single words, so that none is a path, names a
    module or has to be parsed.
    """
    left = [(value, 1)]
    seen = 0
    while left:
        item, depth = left.pop()
        seen += 1
        if seen > limits.values:
            raise ValueError(f"lmc parameter blend: more than {limits.values} values (limits)")
        if depth > limits.depth:
            raise ValueError(f"lmc parameter blend: nested deeper than {limits.depth} (limits)")
        match item:
            case Mapping():
                for key in item:
                    _check_word(key)
                left += [(inside, depth + 1) for inside in item.values()]
            case list() | tuple():
                left += [(inside, depth + 1) for inside in item]
            case str():
                _check_word(item)
            case bool() | None:
                pass
            case int() if -(2**63) <= item < 2**63:
                pass
            case float() if math.isfinite(item):
                pass
            case _:
                raise ValueError(
                    f"lmc parameter blend: got {_shown(item)}, want words, lists, mappings, "
                    "finite numbers of 64 bits, true, false or null"
                )


def _check_word(text: Any) -> None:
    if not (isinstance(text, str) and WORD.fullmatch(text)):
        raise ValueError(
            f"lmc parameter blend: got {_shown(text)}, want a word of at most 64 letters, "
            "digits and _"
        )


def _shown(value: Any) -> str:
    """The beginning of a value, as a message shows it, however large or deep it is."""
    try:
        return f"{value!r:.100}" if isinstance(value, str | int | float) else type(value).__name__
    except ValueError:  # Python does not print an int of many thousand digits
        return type(value).__name__
