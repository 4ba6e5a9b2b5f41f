"""An engine in steps, against one that is written down plainly and makes each step alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmc.model.times import TTFTModel, prefill_work
from lmc.sim.batching import Batch, Work, simulate_steps
from lmc.sim.queueing import simulate

FIXED, PER_ROW, PER_PAIR = 0.5, 0.01, 0.0001
REQUESTS = st.lists(
    st.tuples(
        st.floats(0, 30),  # arrival
        st.integers(1, 60),  # prompt
        st.integers(0, 59),  # of it found, at its start
        st.sampled_from([0.0, 0.0, 2.5]),  # seconds to load
        st.integers(0, 90),  # answer
    ),
    min_size=1,
    max_size=8,
)


def times(per_output_token_s: float = 1e-9, **constants: float) -> TTFTModel:
    some: dict[str, Any] = {"fixed_s": FIXED, "per_row_s": PER_ROW, "per_pair_s": PER_PAIR}
    some |= constants
    return TTFTModel(**some, bytes_per_token=1, tiers=(), per_output_token_s=per_output_token_s)


def work_of(T: Any, found: Any, extra: Any, outputs: Any) -> Work:
    rows, pairs = prefill_work(T, np.minimum(found, np.array(T) - 1))
    return Work(rows, pairs, np.array(extra, float), np.array(T), np.array(outputs))


def plainly(
    arrivals: list[float], T: list[int], found: list[int], extra: list[float],
    outputs: list[int], batch: Batch,
) -> tuple[list[float], list[float]]:  # fmt: skip
    """When each begins and when its first token comes: one engine, step by step."""
    R = len(arrivals)
    done = [min(f, t - 1) for f, t in zip(found, T, strict=True)]  # tokens with KV
    answered, starts, first = [0] * R, [-1.0] * R, [-1.0] * R
    over: set[int] = set()
    running: list[int] = []
    now = 0.0
    while len(over) < R:
        waiting = [i for i in range(R) if i not in over and i not in running]
        if not running and all(arrivals[i] > now for i in waiting):
            now = min(arrivals[i] for i in waiting)
        left, loads, work = batch.max_num_batched_tokens, 0.0, 0.0
        step: list[tuple[int, int]] = []
        # Those that decode first, as they are the older ones.
        for i in sorted(running, key=lambda i: first[i] < 0):
            n = min(left, T[i] - done[i]) if first[i] < 0 else min(left, 1)
            step.append((i, n))
            left -= n
        for i in waiting:
            if arrivals[i] <= now and len(running) < batch.max_num_seqs and left > 0:
                running.append(i)
                starts[i] = now
                loads += extra[i]
                n = min(left, T[i] - done[i])
                step.append((i, n))
                left -= n
        for i, n in step:
            for k in range(n):
                work += PER_ROW + PER_PAIR * (done[i] + k + 1)
        rows = sum(n for _, n in step)
        decodes = all(first[i] >= 0 for i, n in step if n)
        now += loads + (work * (rows - 1) / rows if decodes else FIXED + work)
        for i, n in step:
            if not n:
                continue
            done[i] += n
            if first[i] < 0 and done[i] == T[i]:
                first[i] = now
                answered[i] = 1
            elif first[i] >= 0:
                answered[i] += 1
            if first[i] >= 0 and answered[i] >= outputs[i]:
                over.add(i)
                running.remove(i)
    return starts, first


@given(REQUESTS, st.integers(1, 4), st.integers(8, 70))
def test_every_step_is_that_of_an_engine_written_plainly(
    requests: list[tuple[float, int, int, float, int]], seqs: int, tokens: int
) -> None:
    arrivals, T, found, extra, outputs = map(list, zip(*sorted(requests), strict=True))
    arrivals = [a - arrivals[0] for a in arrivals]
    batch = Batch(seqs, tokens)
    queue = simulate_steps(arrivals, work_of(T, found, extra, outputs), times(), batch)
    starts, first = plainly(arrivals, T, found, extra, outputs, batch)
    np.testing.assert_allclose(queue.wait_s, np.array(starts) - arrivals, atol=1e-6)
    np.testing.assert_allclose(queue.ttft_s, np.array(first) - arrivals, atol=1e-6)
    assert 0 < queue.utilisation <= 1 + 1e-9


@given(REQUESTS, st.integers(1, 3))
def test_one_at_a_time_is_the_queue_of_one_at_a_time(
    requests: list[tuple[float, int, int, float, int]], servers: int
) -> None:
    arrivals, T, found, extra, outputs = map(list, zip(*sorted(requests), strict=True))
    model = times(per_output_token_s=0.75, fixed_s=0.0, per_row_s=0.001, per_pair_s=0.0)
    work = work_of(T, found, extra, outputs)
    seconds = model.seconds(work.rows, work.pairs, np.zeros((len(T), 0))) + extra
    after = 0.75 * np.maximum(np.array(outputs) - 1, 0)
    one = simulate(arrivals, seconds, T, after_first_s=after)
    steps = simulate_steps(arrivals, work, model, Batch(1, 100))
    np.testing.assert_allclose(steps.ttft_s, one.ttft_s, atol=1e-6)
    np.testing.assert_allclose(steps.utilisation, one.utilisation)
    more = simulate_steps(arrivals, work, model, Batch(1, 100), servers=servers)
    assert more.ttft_s.sum() <= one.ttft_s.sum() + 1e-6


def test_a_short_prompt_behind_a_long_one_waits_for_steps_not_for_its_end() -> None:
    work = work_of([10_000, 10], [0, 0], [0, 0], [1, 1])
    model = times(0.0)
    whole = simulate_steps([0, 0.1], work, model, Batch(8, 10_000))
    cut = simulate_steps([0, 0.1], work, model, Batch(8, 1000))
    assert whole.wait_s[1] > 1000  # all of the long one is one step
    assert cut.wait_s[1] == pytest.approx(whole.wait_s[1], rel=0.01)  # the long one goes first
    alone = simulate_steps([0, 0.1], work, model, Batch(1, 1000))
    assert cut.ttft_s[1] <= alone.ttft_s[1]


def test_decoding_takes_no_less_than_reading_the_weights() -> None:
    work = work_of([10, 10], [0, 0], [0, 0], [100, 1])
    model = times(per_output_token_s=2.0, fixed_s=0.1)
    queue = simulate_steps([0, 1], work, model, Batch(4, 100))
    assert queue.ttft_s[0] < 0.3
    # The second comes while the first decodes, and both are of one step of 2 seconds.
    assert queue.ttft_s[1] == pytest.approx(2.0 + 2.0 - (1 - queue.ttft_s[0]), rel=1e-6)


def test_offered_is_what_comes_over_what_is_served() -> None:
    T, outputs = np.full(200, 50), np.full(200, 20)
    work = work_of(T, 0 * T, 0.0 * T, outputs)
    batch = Batch(8, 64)
    busy = simulate_steps(np.arange(200) * 0.1, work, times(), batch)
    idle = simulate_steps(np.arange(200) * 100.0, work, times(), batch)
    assert busy.offered > 1 and busy.warning
    assert idle.offered < 0.2 and idle.warning is None
    two = simulate_steps(np.arange(200) * 0.1, work, times(), batch, servers=2)
    assert two.offered == pytest.approx(busy.offered / 2, rel=0.05)


def test_a_request_goes_to_the_engine_that_has_the_fewest_when_it_comes() -> None:
    # The first engine's one step is under way when the second request comes.
    work = work_of([10_000] * 2, [0, 0], [0, 0], [1, 1])
    queue = simulate_steps([0, 1], work, times(0.0), Batch(1, 10_000), servers=2)
    assert queue.wait_s.tolist() == [0, 0]


@given(REQUESTS, st.integers(2, 3))
def test_no_engine_rests_while_a_request_waits_for_another(asked: list[Any], servers: int) -> None:
    """One at a time, answers of one token: who waits came when there was one for each engine."""
    arrivals, T, found, extra, _ = (list(x) for x in zip(*sorted(asked), strict=True))
    work = work_of(T, found, extra, [1] * len(T))
    batch = Batch(1, 100)
    queue = simulate_steps(arrivals, work, times(0.0), batch, servers=servers)
    at = np.array(arrivals) - arrivals[0]
    end = at + queue.ttft_s
    for i in np.flatnonzero(queue.wait_s > 1e-9):
        assert (end[:i] > at[i]).sum() >= servers


def test_decoding_beside_a_prompt_takes_no_less_than_alone() -> None:
    model = times(0.03, fixed_s=0.005, per_row_s=0.0005, per_pair_s=2e-7)
    T, outputs = np.array([1500] * 32 + [1]), np.array([200] * 32 + [1])
    came = np.append(np.zeros(32), 60.0)
    queue = simulate_steps(came, work_of(T, 0 * T, 0.0 * T, outputs), model, Batch(64, 10**6))
    assert queue.ttft_s[:32].max() < 60
    few = simulate_steps([0.0], work_of([1], [0], [0], [1]), model, Batch(64, 10**6))
    assert queue.ttft_s[-1] >= few.ttft_s[0]
    two = np.array([1500] * 32), np.array([2] * 32)
    # All decode alone, one step; then the same with one row of a prompt beside.
    alone = (
        model.per_output_token_s + (32 * model.per_row_s + 32 * 1501 * model.per_pair_s) * 31 / 32
    )
    first = simulate_steps(np.zeros(32), work_of(two[0], 0 * two[0], 0.0 * two[0], two[1]), model,
                           Batch(64, 10**6)).ttft_s[0]  # fmt: skip
    beside = np.append(np.zeros(32), first / 2)
    T, outputs = np.append(two[0], 1), np.append(two[1], 1)
    queue = simulate_steps(beside, work_of(T, 0 * T, 0.0 * T, outputs), model, Batch(64, 10**6))
    assert queue.ttft_s[-1] - first / 2 >= alone - 1e-9


def test_few_that_fit_side_by_side_are_no_load() -> None:
    model = times(0.1)
    alone = simulate_steps([0.0], work_of([50], [0], [0], [9]), model, Batch(4, 100))
    assert (alone.offered, alone.warning) == (0.0, None)
    # One answer of hours beside short ones.
    T, outputs = np.full(101, 10), np.array([20_000] + [1] * 100)
    came = np.arange(101) * 20.0
    queue = simulate_steps(came, work_of(T, 0 * T, 0.0 * T, outputs), model, Batch(16, 2048))
    assert queue.offered < 0.5 and queue.warning is None and queue.wait_s.max() < 1


def test_long_answers_take_no_time_to_simulate() -> None:
    work = work_of([10, 10], [0, 0], [0, 0], [1 << 30, 5])
    queue = simulate_steps([0, 1], work, times(0.1), Batch(4, 100))
    assert np.isfinite(queue.ttft_s).all()


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: Batch(0), "max_num_seqs: got 0"),
        (lambda: Batch(1, 0), "max_num_batched_tokens: got 0"),
        (
            lambda: simulate_steps([1, 0], work_of([1, 1], 0, [0, 0], [1, 1]), times(), Batch(1)),
            "got 0.0 after 1.0",
        ),
        (
            lambda: simulate_steps([0], work_of([1, 1], 0, [0, 0], [1, 1]), times(), Batch(1)),
            "got 1 arrivals, 2 times",
        ),
    ],
    ids=["seqs", "tokens", "order", "lengths"],
)
def test_what_is_wrong_is_named(made: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        made()
