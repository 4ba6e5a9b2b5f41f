"""Beginnings of prompts, of models whose layers keep states, or KV of sizes of their own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lmc.connectors.hf.check import small
from lmc.connectors.hf.prefix import PrefixStore
from tests.connectors.hf.tiny import decoder

IDS = np.random.default_rng(0).integers(3, 128, 300).tolist()
FAMILIES = ("gemma3_text", "gemma4_text", "deepseek_v32", "qwen3_next", "jamba")


@torch.inference_mode()
def last(model: Any, ids: list[int], cache: Any = None) -> torch.Tensor:
    done = 0 if cache is None else cache.get_seq_length()
    logits: torch.Tensor = model(torch.tensor([ids[done:]]), past_key_values=cache).logits[0, -1]
    return logits


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_put_back_is_what_was_computed(family: str) -> None:
    model = small(family)
    with PrefixStore(model, block=64, memory_bytes=256 << 20) as store:
        first, again = store.prefill(IDS), store.prefill(IDS)
        assert (first.length, first.reused) == (256, 0) and (again.length, again.reused) == (
            256,
        ) * 2
        torch.testing.assert_close(
            last(model, IDS, again.past_key_values), last(model, IDS, first.past_key_values),
            rtol=0, atol=0,
        )  # fmt: skip
        # Another prompt goes on from the last block that is the same, and no further.
        other = [*IDS[:150], *IDS[160:]]
        got = store.prefill(other)
        assert got.reused == 128
        torch.testing.assert_close(
            last(model, other, got.past_key_values), last(model, other), rtol=0, atol=1e-4
        )
        # The same texts elsewhere are no beginning of anything.
        assert store.prefill([*IDS[64:], *IDS[:64]]).reused == 0


def test_it_is_there_after_a_restart_and_of_no_other_model(tmp_path: Path) -> None:
    tiers = [{"name": "disk", "path": str(tmp_path / "kv"), "capacity": "1GiB"}]
    for seed, reused in ((0, 0), (0, 256), (1, 0)):
        model = small("qwen3_next")
        with torch.no_grad():
            model.lm_head.weight += seed
        with PrefixStore(model, block=64, memory_bytes=256 << 20, tiers=tiers) as store:
            prefix = store.prefill(IDS)
            assert prefix.reused == reused
            got = last(model, IDS, prefix.past_key_values)
        torch.testing.assert_close(got, last(model, IDS), rtol=0, atol=1e-4)


def test_generating_goes_on_from_it() -> None:
    model = small("qwen3_next")
    ids = torch.tensor([IDS])
    with PrefixStore(model, block=64, memory_bytes=256 << 20) as store:
        store.prefill(IDS)
        cache = store.prefill(IDS).past_key_values
        options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
        assert torch.equal(
            model.generate(ids, past_key_values=cache, **options), model.generate(ids, **options)
        )


def test_what_has_no_room_is_computed() -> None:
    model = small("qwen3_next")
    with PrefixStore(model, block=64, memory_bytes=14 << 20) as store:  # two blocks
        store.prefill(IDS)
        got = store.prefill(IDS)
        torch.testing.assert_close(
            last(model, IDS, got.past_key_values), last(model, IDS), rtol=0, atol=1e-4
        )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"block": 100}, "block: got 100, allowed: multiples of 64"),
        ({"block": 64, "memory_bytes": 10}, "memory_bytes: got 10, allowed: at least"),
        (
            {"block": 64, "tiers": ["disk:/nowhere,capacity=1GiB,compression=int8"]},
            "'int8'.*lossless",
        ),
    ],
    ids=["block", "memory", "lossy"],
)
def test_wrong_settings_are_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PrefixStore(decoder("Llama"), **options)


@pytest.mark.parametrize("tokens", [[], [-1, 5], [600], [[1, 2]]], ids=str)
def test_wrong_tokens_are_named(tokens: Any) -> None:
    with (
        PrefixStore(decoder("Llama"), block=64, memory_bytes=8 << 20) as store,
        pytest.raises(ValueError, match=r"tokens: got .*want \[T\] of 0 to 511"),
    ):
        store.prefill(tokens)


def test_models_that_have_no_beginning_are_refused() -> None:
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    with pytest.raises(ValueError, match="rope type 'dynamic'"):
        PrefixStore(decoder("Llama", rope_parameters=rope), block=64)
    with pytest.raises(ValueError, match="does not run with a DynamicCache"):
        PrefixStore(small("minimax"), block=64)
