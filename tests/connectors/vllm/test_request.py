"""What a request may say, and that nothing else has any effect."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lmc.blend.baselines import FullRecompute, FullReuse
from lmc.blend.epic import Epic
from lmc.connectors.vllm import kv_transfer_params
from lmc.connectors.vllm.config import LMCConfig, check_layers, load_config
from lmc.connectors.vllm.request import allowed_strategies, parse_request
from tests.connectors.vllm.audit import audited
from tests.connectors.vllm.grammar import nested, parameters


@dataclass(frozen=True)
class Own(FullReuse):
    """A strategy that a request must not reach."""

    dense: ClassVar[bool] = False


OWN = "tests.connectors.vllm.test_request:Own"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({"chunk": []}, "'chunk'; valid: blend, chunks, enabled, explain, hand_over, handed, save"),
        ({5: 1}, "parameter 5; valid"),
        ({"chunks": [[0, 5], [4, 8]]}, r"chunks: got span \(4, 8\), want 5 <= start"),
        ({"chunks": [[0, 11]]}, r"\(0, 11\).*<= 10"),
        ({"chunks": [[3, 3]]}, r"\(3, 3\)"),
        ({"chunks": [[0.5, 3]]}, "two integers"),
        ({"chunks": [[0, 2**70]]}, "inside the prompt"),
        ({"chunks": [5]}, "two integers"),
        ({"chunks": "0-5"}, "list of spans, got '0-5'"),
        ({"chunks": [[0, 1]] * 2000}, "2000 spans, allowed: 1024"),
        ({"hand_over": "prompt-1"}, "hand_over: this engine neither hands prompts over nor takes"),
        ({"handed": "prompt-1"}, "handed: this engine neither"),
        ({"hand_over": "short"}, "hand_over: got 'short', want 8 to 64 letters"),
        ({"hand_over": "../../etc/x"}, "hand_over: got '../../etc/x'"),
        ({"handed": 12345678}, "handed: got 12345678"),
        ({"handed": "x" * 65}, "handed: got 'x"),
        ({"blend": {"name": "auto", "min_recovery": 2}}, "min_recovery: got 2.*want 0 to 1"),
        ({"blend": "nope"}, "valid: auto, block"),  # none that runs on Hugging Face only
        ({"blend": "nope"}, "'nope'"),
        ({"blend": 5}, "got 5, want a name"),
        ({"blend": True}, "got True, want a name"),
        ({"blend": ["epic"]}, "got list, want a name"),
        ({"blend": {"ratio": 0.1}}, "got dict, want a name"),
        ({"blend": {"name": ["epic"]}}, "got dict, want a name"),
        ({"blend": {"name": OWN}}, "got dict, want a name.*valid: "),
        ({"blend": OWN}, "want a name"),
        ({"blend": "epic:4"}, "'epic:4', want a name"),
        ({"blend": {"name": "union", "first": OWN}}, "want a word"),
        ({"blend": {"name": "union", "first": {"name": OWN}}}, "want a word"),
        ({"blend": {"name": "auto", "strategy": "epic:4"}}, "want a word"),
        ({"blend": {"name": "controlled", "times": "times"}}, "got dict, want a name"),
        ({"blend": {"name": "union", "second": "controlled"}}, "unknown blend strategy"),
        ({"blend": "full_recompute"}, "'full_recompute', want a name"),
        ({"blend": {"name": "replay", "by_layer": [[1]]}}, "got dict, want a name"),
        ({"blend": {"name": "union", "first": "full_recompute"}}, "cannot be joined"),
        ({"blend": {"name": "epic", "link_tokens": 2**63}}, "64 bits"),
        ({"blend": {"name": "epic", "link_tokens": 10**5000}}, "got int, want words"),
        ({"blend": {"name": "cacheblend", "ratio": float("nan")}}, "finite"),
        ({"blend": {"name": "lmc", "wide": 1e308}}, "wide must be from 1 to"),
        ({"blend": {"name": "random", "seed": -1}}, "seed must be at least 0"),
        ({"blend": {"name": "epic", "link_tokens": b"4"}}, "got bytes, want words"),
        ({"blend": {"name": "epic", "link tokens": 4}}, "'link tokens', want a word"),
        ({"blend": {"name": "cacheblend", "ratio": [0.1] * 10_001}}, "more than 10000 values"),
        ({"blend": nested(300)}, "nested deeper than 6"),
        ({"blend": {"name": "cacheblend", "causal": "bottom_right"}}, "ablation.*Hugging Face"),
        ({"blend": "ape"}, "paged engine.*Hugging Face"),
        ({"explain": 1}, "explain must be true or false, got 1"),
        ({"save": "no"}, "save must be true or false, got 'no'"),
        ([1], "must be an object, got list"),
        ("x", "must be an object, got str"),
    ],
)
def test_bad_request_is_named(raw: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        parse_request(raw, 10, LMCConfig())
    assert len(str(caught.value)) < 1000


def test_what_the_operator_lists_may_be_asked_for_by_its_name() -> None:
    own = {"mine": {"name": OWN, "rotate": False}, "all": "full_recompute"}
    config = load_config({"lmc": {"blends": own}})
    assert parse_request({"blend": "mine"}, 10, config).strategy == Own(rotate=False)
    assert parse_request({"blend": "all"}, 10, config).strategy == FullRecompute()
    assert parse_request({"blend": "mine"}, 10, config).blend == OWN
    # By its name alone: its fields are the operator's.
    with pytest.raises(ValueError, match="want a name"):
        parse_request({"blend": {"name": "mine", "rotate": True}}, 10, config)
    with pytest.raises(ValueError, match="valid: mine, all, auto"):
        parse_request({"blend": "other"}, 10, config)


def test_controls_are_for_engines_that_trust_their_clients() -> None:
    assert {"full_recompute", "replay"} <= set(allowed_strategies(LMCConfig(controls=True)))
    assert not {"full_recompute", "replay", "controlled"} & set(allowed_strategies(LMCConfig()))
    replay = {"name": "replay", "by_layer": [[1, 2], [2]]}
    assert parse_request({"blend": replay}, 10, LMCConfig(controls=True)).blend == "replay"


def test_limits_are_settings() -> None:
    config = load_config({"lmc": {"limits": {"spans": 1, "depth": 2, "values": 3}}})
    assert parse_request({"chunks": [(0, 4)]}, 10, config).chunks == [(0, 4)]
    for raw in (
        {"chunks": [(0, 4), (4, 5)]},
        {"blend": {"name": "cacheblend", "ratio": [0.2]}},
        {"blend": {"name": "epic", "link_tokens": 1, "x": 1, "y": 1}},
    ):
        with pytest.raises(ValueError, match=r"limits|allowed: 1"):
            parse_request(raw, 10, config)


@given(st.data())
@settings(max_examples=500)
def test_no_request_imports_opens_or_runs_anything(data: st.DataObject) -> None:
    T = 60
    raw = data.draw(parameters(T))
    config = load_config({"lmc": {"controls": data.draw(st.booleans())}})
    with audited() as events:
        try:
            options = parse_request(raw, T, config)
            check_layers(options.strategy, 3)
        except ValueError as error:
            assert len(str(error)) < 5000  # noqa: PT017 - whatever it says, it is short
    assert not events


def test_the_audit_sees_what_it_must(tmp_path: Path) -> None:
    with audited() as events:
        (tmp_path / "x").write_text("x")
        sys.modules.pop("this", None)
        with pytest.raises(ValueError, match="'this:x'"):
            load_config({"lmc": {"blend": "this:x"}})  # what an operator's config may do
    assert any(event.startswith(f"open ('{tmp_path}") for event in events)
    assert "import this" in events


def test_client_helper_raises_before_anything_is_sent() -> None:
    sent = kv_transfer_params(10, chunks=[(0, 4), (4, 9)], blend={"name": "epic"}, save=False)
    assert sent == {
        "lmc": {
            "chunks": [[0, 4], [4, 9]],
            "blend": {"name": "epic"},
            "save": False,
            "enabled": True,
            "explain": False,
        }
    }
    with pytest.raises(ValueError, match=r"\(4, 11\)"):
        kv_transfer_params(10, chunks=[(4, 11)])
    config = LMCConfig(blends={"mine": "epic:link_tokens=3"})
    assert kv_transfer_params(10, blend="mine", config=config)["lmc"]["blend"] == "mine"
    assert parse_request({"blend": "mine"}, 10, config).strategy == Epic(3)
    with pytest.raises(ValueError, match="'mine'"):
        kv_transfer_params(10, blend="mine")
