"""The number of replicas follows the load within its bounds."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from chunkllama.cluster.scaling import scale


@dataclass
class Context:
    aggregated_metrics: dict[str, dict[str, float]] | None
    current_num_replicas: int = 2
    capacity_adjusted_min_replicas: int = 2
    capacity_adjusted_max_replicas: int = 8


@pytest.mark.parametrize(
    ("loads", "wanted"),
    [
        ({"a": 0.7, "b": 0.7}, 2),
        ({"a": 1.0, "b": 1.0}, 3),
        ({"a": 3.0, "b": 0.1}, 5),
        ({"a": 20.0, "b": 20.0}, 8),
        ({"a": 0.0, "b": 0.0, "c": 0.1}, 2),
    ],
)
def test_replicas_follow_the_load(loads: dict[str, float], wanted: int) -> None:
    assert scale(Context({"load": loads})) == (wanted, {})


@pytest.mark.parametrize("metrics", [None, {}, {"load": {}}])
def test_without_figures_the_number_stays(metrics: dict[str, dict[str, float]] | None) -> None:
    assert scale(Context(metrics, current_num_replicas=5)) == (5, {})
