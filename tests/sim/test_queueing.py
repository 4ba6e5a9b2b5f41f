"""The queue against brute force and against what queueing theory says of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmc.sim.queueing import percentiles, simulate

REQUESTS = st.lists(st.tuples(st.integers(0, 50), st.integers(0, 9)), min_size=1, max_size=12)


def brute_force(arrivals: list[int], service: list[int], servers: int) -> list[int]:
    """Start times, by a clock that ticks: each free server takes the first who waits."""
    starts: dict[int, int] = {}
    busy_until = [0] * servers
    clock = 0
    while len(starts) < len(arrivals):
        for s in range(servers):
            while busy_until[s] <= clock:
                waiting = [i for i, a in enumerate(arrivals) if a <= clock and i not in starts]
                if not waiting:
                    break
                starts[waiting[0]] = clock
                busy_until[s] = clock + service[waiting[0]]
        clock += 1
    return [starts[i] for i in range(len(arrivals))]


@given(REQUESTS, st.integers(1, 4), st.integers(1, 9))
def test_every_start_is_that_of_brute_force(
    requests: list[tuple[int, int]], servers: int, after: int
) -> None:
    arrivals, prefill = map(list, zip(*sorted(requests), strict=True))
    queue = simulate(arrivals, prefill, [1] * len(arrivals), servers=servers, after_first_s=after)
    starts = brute_force(arrivals, [p + after for p in prefill], servers)
    assert queue.wait_s.tolist() == [s - a for s, a in zip(starts, arrivals, strict=True)]
    assert (queue.ttft_s - queue.wait_s).tolist() == prefill
    end = max(s + p + after for s, p in zip(starts, prefill, strict=True)) - arrivals[0]
    assert queue.requests_per_s == pytest.approx(len(arrivals) / end)
    assert queue.utilisation == pytest.approx((sum(prefill) + after * len(prefill)) / end / servers)
    assert queue.utilisation <= 1 + 1e-9


@pytest.mark.parametrize("load", [0.3, 0.6, 0.8])
def test_one_server_with_equal_times_waits_as_md1_says(load: float) -> None:
    """Pollaczek and Khinchine: the mean wait is load · s / (2 · (1 - load))."""
    arrivals = np.random.default_rng(0).exponential(1 / load, 400_000).cumsum()
    queue = simulate(arrivals, np.ones(len(arrivals)), np.ones(len(arrivals)))
    assert queue.wait_s.mean() == pytest.approx(load / (2 * (1 - load)), rel=0.03)
    # A Poisson arrival finds the server idle with probability 1 - load.
    assert (queue.wait_s == 0).mean() == pytest.approx(1 - load, abs=0.01)
    assert queue.utilisation == pytest.approx(load, rel=0.01)
    assert queue.offered == pytest.approx(load, rel=0.01)
    assert queue.warning is None


def test_three_servers_wait_as_erlang_c_says() -> None:
    servers, load = 3, 0.7
    rng = np.random.default_rng(1)
    arrivals = rng.exponential(1 / (servers * load), 400_000).cumsum()
    queue = simulate(arrivals, rng.exponential(1, 400_000), np.ones(400_000), servers=servers)
    a = servers * load
    all_busy = a**servers / math.factorial(servers) / (1 - load)
    waits = all_busy / (sum(a**k / math.factorial(k) for k in range(servers)) + all_busy)
    assert (queue.wait_s > 0).mean() == pytest.approx(waits, rel=0.02)
    assert queue.wait_s.mean() == pytest.approx(waits / (servers * (1 - load)), rel=0.04)


def test_a_faster_trace_is_the_same_trace_with_less_time_between() -> None:
    arrivals, service = [10.0, 14.0, 16.0], [3.0, 3.0, 3.0]
    fast = simulate(arrivals, service, [7, 7, 7], rate_scale=4)
    assert fast.wait_s.tolist() == [0.0, 2.0, 4.5]
    assert fast.ttft_s.tolist() == [3.0, 5.0, 7.5]
    assert fast.input_tokens_per_s == pytest.approx(21 / 9)


def test_more_work_than_servers_can_do_is_said() -> None:
    arrivals = np.arange(100.0)
    stable = simulate(arrivals, np.full(100, 0.9), np.ones(100))
    assert stable.offered == pytest.approx(0.9)
    assert stable.warning is None
    over = simulate(arrivals, np.full(100, 2.0), np.ones(100))
    assert over.offered == pytest.approx(2.0)
    assert over.utilisation == pytest.approx(1.0)
    assert "2.00 times as much work arrives" in (over.warning or "")
    assert "not a steady state" in (over.warning or "")
    assert simulate(arrivals, np.full(100, 2.0), np.ones(100), servers=3).warning is None


def test_all_at_once_is_more_than_any_server_can_do() -> None:
    assert simulate([5, 5], [1, 1], [1, 1]).offered == math.inf
    alone = simulate([5], [1], [8])
    assert (alone.offered, alone.utilisation, alone.input_tokens_per_s) == (0.0, 1.0, 8.0)


def test_percentiles() -> None:
    assert percentiles(np.arange(101)) == {"p50": 50, "p90": 90, "p99": 99, "mean": 50}
    with pytest.raises(ValueError, match="no values"):
        percentiles([])


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([], [], []), {}, "got 0 arrivals"),
        (([1, 2], [1], [1, 1]), {}, "2 arrivals, 1 times and 2 lengths"),
        (([2, 1], [1, 1], [1, 1]), {}, r"got 1.0 after 2.0 \(request 1\)"),
        (([1], [-1], [1]), {}, "seconds: got -1.0"),
        (([1], [math.nan], [1]), {}, "seconds: got nan"),
        (([1], [1], [1]), {"servers": 0}, "got 0 servers"),
        (([1], [1], [1]), {"rate_scale": 0}, "rate_scale 0"),
    ],
    ids=["none", "lengths", "order", "negative", "nan", "servers", "rate"],
)
def test_refused(arguments: tuple, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        simulate(*arguments, **options)
