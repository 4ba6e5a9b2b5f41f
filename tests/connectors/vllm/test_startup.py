"""What an engine says when it starts, out of what it knows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from lmc.connectors.vllm import startup
from lmc.connectors.vllm.config import LMCConfig, build_strategy
from lmc.connectors.vllm.gate import Quality
from lmc.connectors.vllm.messages import WorkerHello
from lmc.model.layout import KVLayout
from lmc.quality.gate import ENCODED, admit
from lmc.quality.profile import SHIPPED, QualityProfile, load_profile

WELL = WorkerHello(None, None, watched=True, computes=True)


@dataclass(frozen=True)
class Vault:
    """A tier of somebody's own, with what must not be printed."""

    url: str
    path: str = "/secret"
    write: Literal["through", "back"] = "back"

    def open(self, *arguments: Any, **options: Any) -> Any:
        raise OSError


@pytest.fixture(scope="module")
def profile() -> QualityProfile:
    return load_profile(next(SHIPPED.glob("smollm2-*.yaml")))


def said(
    config: LMCConfig,
    profile: QualityProfile | None = None,
    hello: WorkerHello = WELL,
    weights: bytes | None = b"\xab" * 32,
    ranks: int = 1,
) -> Mapping[str, str]:
    """The lines by their label; the first one is `head`."""
    strategy = build_strategy(config.blend)
    admitted = admit(
        config.blend, strategy, profile, config.min_recovery, config.uncalibrated,
        ENCODED[config.context],
    )  # fmt: skip
    quality = Quality(profile, strategy, admitted)
    layout = KVLayout(30, 3, 64, "float32")
    head, *rest = startup.lines(config, "org/m", layout, ranks, hello, quality, weights)
    parted = [line.strip().partition(" ") for line in rest]
    return {"head": head} | {label: text.strip() for label, _, text in parted}


def test_all_that_is_on_is_there(profile: QualityProfile) -> None:
    tiers = ({"name": "disk", "path": "/kv", "capacity": "200GiB", "write": "back"},)
    lines = said(LMCConfig(memory_bytes=4 << 30, tiers=tiers, policy="sieve"), profile, ranks=2)
    assert lines["head"].endswith("on vLLM 0.32.0")
    assert lines["model"] == (
        "org/m, KV float32: L=30, G=3, D=64, 46,080 bytes a token on each of 2 ranks"
    )
    assert lines["reuse"] == "exact prefixes, and chunks moved by epic"
    measured = next(r for r in profile.rows if r.blend == {"name": "epic", "link_tokens": 16})
    assert lines["quality"] == (
        f"min_recovery 0.2, profile of {profile.model} in float32 (isolated chunks, "
        f"{profile.prompts} prompts): epic link_tokens=16 passes, it recovers "
        f"{measured.recovery:.2f} [{measured.low:.2f}, {measured.high:.2f}]"
    )
    assert lines["memory"] == "4 GiB a rank: 93,206 tokens, evicted by sieve"
    assert lines["tiers"] == "1. disk, path /kv, capacity 200GiB, compression none, write back"
    assert lines["weights"] == f"{'ab' * 8}, of their files; changes are noticed"


@pytest.mark.parametrize(
    ("changed", "reuse", "quality"),
    [
        ({}, "by default no chunk is moved: the gate refuses epic", "no profile: refused: no qua"),
        ({"min_recovery": None}, "and chunks moved by epic", "no gate"),
        ({"uncalibrated": "allow"}, "and chunks moved by epic", "epic link_tokens=16 passes unme"),
        ({"blend": "prefix"}, "prefix moves none", "prefix passes, it loses nothing"),
        ({"blend": "auto"}, "the gate refuses auto", "refused: auto: there is no quality profile"),
    ],
)
def test_without_a_profile(changed: dict[str, Any], reuse: str, quality: str) -> None:
    lines = said(LMCConfig(**changed))
    assert reuse in lines["reuse"]
    assert quality in lines["quality"]


def test_what_the_gate_looked_up(profile: QualityProfile) -> None:
    lines = said(LMCConfig(blend={"name": "auto", "min_recovery": 0.5}), profile)
    assert "lmc compute=" in lines["quality"] and "it recovers 0." in lines["quality"]
    lines = said(LMCConfig(blend="full_reuse"), profile)
    assert "refused: recovery of full_reuse is 0.00" in lines["quality"]
    assert "the gate refuses full_reuse" in lines["reuse"]


def test_what_is_off_and_why() -> None:
    config = LMCConfig()
    lines = said(config, hello=WorkerHello("no such rope", None, False, False))
    assert lines["reuse"] == "exact prefixes only: no such rope"
    assert lines["attention"].startswith("none")
    assert "nobody notices changes" in lines["weights"]
    lines = said(config, hello=WorkerHello("as below", "unknown pages", True, True))
    assert list(lines) == ["head", "model", "reuse"]
    assert lines["reuse"] == "nothing is stored or reused: unknown pages"
    lines = said(config, weights=None)
    assert "nothing that is stored will be found after a restart" in lines["weights"]
    assert lines["tiers"] == "none: what is stored ends with the engine"


def test_fields_of_a_tier_of_ones_own_are_not_printed() -> None:
    vault = {"name": f"{__name__}:Vault", "url": "s3://user:password@host"}
    lines = said(LMCConfig(tiers=(vault, {"name": "disk", "path": "/kv", "capacity": 1})))
    assert lines["tiers"].startswith(f"1. {__name__}:Vault, write back; 2. disk, path /kv")
    assert not [line for line in lines.values() if "password" in line or "secret" in line]


def test_a_policy_that_fails_requests_is_warned_of() -> None:
    assert startup.load_failures("recompute") is None
    assert "want 'recompute'" in str(startup.load_failures("fail"))
