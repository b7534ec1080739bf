"""How many replicas a load asks for; a policy of Ray Serve's autoscaling. Imports no Ray."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final, Protocol

TARGET_LOAD: Final = 0.7  # of what a replica may run at once, on average


class ScalingContext(Protocol):
    """What Serve tells a policy.

    Attributes:
        aggregated_metrics: means of what replicas report, by name and replica.
        current_num_replicas: that run.
        capacity_adjusted_min_replicas, capacity_adjusted_max_replicas: the bounds.
    """

    aggregated_metrics: Mapping[str, Mapping[Any, float]] | None
    current_num_replicas: int
    capacity_adjusted_min_replicas: int
    capacity_adjusted_max_replicas: int


def scale(context: ScalingContext) -> tuple[int, dict[str, Any]]:
    """Return the number of replicas that brings their mean load to ``TARGET_LOAD``.

    Each replica reports ``load``; see ``EngineHost.load``.
    """
    loads = (context.aggregated_metrics or {}).get("load", {})
    wanted = context.current_num_replicas
    if loads:
        wanted = math.ceil(round(sum(loads.values()) / TARGET_LOAD, 6))
    least = context.capacity_adjusted_min_replicas
    return max(least, min(context.capacity_adjusted_max_replicas, wanted)), {}
