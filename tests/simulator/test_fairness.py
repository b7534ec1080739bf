"""The fair order beside the ideal fluid scheduler; ``benchmarks/fairness.py`` runs more seeds."""

from __future__ import annotations

import pytest

from chunkllama.simulation.fairness import Scenario, compare

# prefill over the least possible, and the worst tenant's P99 wait over the fluid scheduler's
EXPECTED = {
    (2, "private", False): (1.0000, 1.2716),
    (2, "private", True): (1.0000, 1.2520),
    (2, "public", False): (1.0000, 1.1887),
    (2, "public", True): (1.0000, 1.1720),
    (16, "private", False): (1.0160, 1.2753),
    (16, "private", True): (1.0000, 1.2669),
    (16, "public", False): (1.0000, 1.3011),
    (16, "public", True): (1.0000, 1.5000),
    (256, "private", False): (1.1858, 1.6663),
    (256, "public", False): (1.0000, 1.0948),
    (256, "public", True): (1.0000, 1.2808),
}


@pytest.mark.parametrize(("num_tenants", "prefixes", "skewed"), EXPECTED)
def test_prefill_and_waits_of_many_tenants(num_tenants, prefixes, skewed) -> None:
    """The numbers are exact, so that a change of the order is seen; the bounds are the aim."""
    result = compare(Scenario(num_tenants=num_tenants, prefixes=prefixes, skewed=skewed))
    assert result.num_requests >= 4 * num_tenants
    assert set(result.waits) == set(result.fluid_waits) == {f"t{i}" for i in range(num_tenants)}
    numbers = (round(result.prefill_over_ideal, 4), round(result.worst_wait_ratio, 4))
    assert numbers[0] <= 1.2 and numbers[1] <= 2.0
    assert numbers == EXPECTED[num_tenants, prefixes, skewed]


def test_a_bound_on_what_tenants_add_to_steps_keeps_prefill_and_waits() -> None:
    result = compare(
        Scenario(num_tenants=16, prefixes="private", skewed=True, max_tenant_slowdown=1.5)
    )
    numbers = (round(result.prefill_over_ideal, 4), round(result.worst_wait_ratio, 4))
    assert numbers == (1.0073, 1.3045)


@pytest.mark.nightly
@pytest.mark.parametrize("num_tenants", [2, 16, 256])
def test_prefill_and_waits_with_other_seeds(num_tenants) -> None:
    for prefixes in ("private", "public"):
        for skewed in (False, True):
            for seed in range(5):
                result = compare(
                    Scenario(num_tenants=num_tenants, prefixes=prefixes, skewed=skewed, seed=seed)
                )
                assert result.prefill_over_ideal <= 1.2
                assert result.worst_wait_ratio <= 2.0


def test_first_come_first_served_is_neither_near_the_ideal_nor_fair() -> None:
    scenario = Scenario(num_tenants=16, prefixes="private", skewed=True, policy="fcfs")
    result = compare(scenario)
    assert result.prefill_over_ideal > 1.5
    assert result.worst_wait_ratio > 2.0
