"""A trace served with what a policy holds, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from lmc.model.shape import shape
from lmc.model.times import TierSpeed, TTFTModel
from lmc.sim.batching import Batch
from lmc.sim.sweep import sweep
from lmc.sim.timing import serve
from lmc.sim.trace import Request, accesses

MODEL = TTFTModel(
    fixed_s=0.5,
    per_row_s=0.01,
    per_pair_s=0.0,
    bytes_per_token=1000.0,
    tiers=(TierSpeed("host", 0.0, 1e6), TierSpeed("disk", 9.0, 1e6)),
    per_output_token_s=1.0,
)


def prompts(*arrivals: float) -> list[Request]:
    """The same 100 tokens in blocks of 10, with 2 output tokens."""
    return [Request(t, "", 100, 2, blocks=list(range(10)), block_tokens=10) for t in arrivals]


def test_waiting_computing_and_loading_add_up() -> None:
    requests = prompts(0.0, 1.0)
    (held,) = sweep(
        accesses(requests), ["lru"], [(100.0,)], metric="prefix", model=shape("smollm2-135m")
    )
    cold = serve(requests, None, MODEL)
    # Each is 0.5 + 100 rows; the server is held for the second output token, one second.
    assert cold.queue.ttft_s.tolist() == [1.5, pytest.approx(1.5 + 1 - 1 + 1.5)]
    warm = serve(requests, held, MODEL)
    # The second loads 100 tokens and computes the last row.
    assert warm.queue.ttft_s.tolist() == [1.5, pytest.approx(1.5 + 0.5 + 0.01 + 0.1)]
    assert not warm.slower.any()
    assert warm.row()["ttft_s"]["p50"] < cold.row()["ttft_s"]["p50"]


def test_a_batch_computes_the_next_prompt_while_it_decodes() -> None:
    requests = prompts(0.0, 1.0)
    (held,) = sweep(
        accesses(requests), ["lru"], [(100.0,)], metric="prefix", model=shape("smollm2-135m")
    )
    cold = serve(requests, None, MODEL, batch=Batch(2))
    # The second waits until 1.5; its 100 rows are of one step with a row that decodes.
    assert cold.queue.ttft_s.tolist() == [1.5, pytest.approx(0.5 + 0.5 + 1.01)]
    warm = serve(requests, held, MODEL, batch=Batch(2))
    # It loads 100 tokens, and its one row takes as long as a row that decodes must.
    assert warm.queue.ttft_s.tolist() == [1.5, pytest.approx(0.5 + 1.0 + 0.1)]


def test_a_slow_tier_is_slower_than_computing() -> None:
    requests = prompts(0.0, 100.0)
    (held,) = sweep(
        accesses(requests), ["lru"], [(1.0, 100.0)], metric="prefix", model=shape("smollm2-135m")
    )
    served = serve(requests, held, MODEL)
    assert served.slower.tolist() == [False, True]
    assert served.row()["reuse_slower"] == 0.5
    assert served.queue.ttft_s[1] == pytest.approx(0.5 + 0.01 + 9 + 0.1)


def test_faster_arrivals_wait_longer() -> None:
    requests = prompts(*np.arange(0.0, 100.0, 5.0))
    slow, fast = (serve(requests, None, MODEL, rate_scale=s) for s in (1.0, 4.0))
    assert slow.queue.wait_s.max() == 0
    assert fast.queue.wait_s.max() > 10
    assert fast.queue.warning is not None
    many = serve(requests, None, MODEL, rate_scale=4.0, servers=4)
    assert many.queue.wait_s.max() == 0


def test_more_tiers_than_the_profile_has() -> None:
    requests = prompts(0.0)
    (held,) = sweep(accesses(requests), ["lru"], [(1.0, 2.0, 3.0)], model=shape("smollm2-135m"))
    with pytest.raises(ValueError, match=r"3 tiers.*host, disk"):
        serve(requests, held, MODEL)
