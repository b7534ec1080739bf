"""The fluid scheduler against times computed by hand."""

from __future__ import annotations

import pytest

from chunkllama.simulation.fluid import FluidRequest, first_token_times


def test_one_tenant_is_served_in_order_of_arrival_at_the_whole_rate() -> None:
    requests = [
        FluidRequest(0, "a", 10, 5),
        FluidRequest(1, "a", 20, 0),
        FluidRequest(9, "a", 1, 0),
    ]
    assert first_token_times(requests, 10) == pytest.approx([1.0, 3.5, 9.1])


def test_tenants_with_work_share_the_rate_equally() -> None:
    requests = [FluidRequest(0, "a", 10, 0), FluidRequest(0, "b", 30, 0)]
    # both at 5 a second until a ends at 2 s; b then has 20 left, at 10 a second
    assert first_token_times(requests, 10) == pytest.approx([2.0, 4.0])


def test_weights_divide_the_rate() -> None:
    requests = [FluidRequest(0, "a", 30, 0), FluidRequest(0, "b", 30, 0)]
    assert first_token_times(requests, 10, {"a": 3.0}) == pytest.approx([4.0, 6.0])


def test_a_tenant_that_arrives_later_gets_its_share_at_once() -> None:
    requests = [FluidRequest(0, "a", 100, 0), FluidRequest(5, "b", 10, 0)]
    # a alone for 5 s, then both at 5 a second: b ends at 7 s, a has 40 left
    assert first_token_times(requests, 10) == pytest.approx([11.0, 7.0])


def test_requests_without_work_end_when_they_arrive() -> None:
    requests = [FluidRequest(2, "a", 0, 0), FluidRequest(2, "a", 0, 0), FluidRequest(3, "b", 4, 0)]
    assert first_token_times(requests, 4) == pytest.approx([2.0, 2.0, 4.0])


def test_no_work_is_lost_under_many_tenants() -> None:
    requests = [FluidRequest(i // 10, f"t{i % 7}", 3 + i % 5, i % 3) for i in range(200)]
    times = first_token_times(requests, 6)
    total = sum(r.prefill + r.decode for r in requests)
    # the queue is never empty after the start, so the last work ends at total / rate
    assert total / 6 - 2 / 6 <= max(times) <= total / 6 + 1e-6
