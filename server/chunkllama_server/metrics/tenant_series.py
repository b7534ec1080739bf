"""Counters with a tenant label of bounded cardinality."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

from prometheus_client.core import CounterMetricFamily, Metric
from prometheus_client.registry import Collector

from chunkllama_server.config.api_keys import OTHER_TENANTS


class TopTenants:
    """Which tenants have a label of their own: the ``limit`` with the largest amounts.

    A tenant that exceeds twice the smallest of them takes its place (after Metwally et al.,
    "Efficient computation of frequent and top-k elements", 2005; the factor keeps two equal tenants
    from alternating).
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._amounts: Counter[str] = Counter()
        self._top: set[str] = set()
        self._smallest = 0

    def add(self, tenant: str, amount: float) -> str | None:
        """Count an amount; returns the tenant that lost its label to this one, if any."""
        self._amounts[tenant] += amount  # type: ignore[assignment]
        if tenant in self._top:
            return None
        if len(self._top) < self._limit:
            self._top.add(tenant)
            return None
        if self._amounts[tenant] <= 2 * self._smallest:
            return None
        last = min(self._top, key=lambda name: (self._amounts[name], name))
        self._smallest = self._amounts[last]
        if self._amounts[tenant] <= 2 * self._smallest:
            return None
        self._top.remove(last)
        self._top.add(tenant)
        return last

    def label(self, tenant: str) -> str:
        """Return the tenant's label."""
        return tenant if tenant in self._top else OTHER_TENANTS


@dataclass(slots=True)
class _Series:
    text: str
    reasons: tuple[str, ...]
    values: dict[tuple[str, ...], float] = field(default_factory=dict)  # the tenant comes last


class TenantSeries(Collector):
    """Counters by tenant; a tenant that loses its label is added to ``other``.

    The sum over the labels is the total at any time, and never decreases.

    Args:
        limit: tenants with a label of their own; None counts all tenants together, without label.
    """

    def __init__(self, limit: int | None) -> None:
        self._top = None if limit is None else TopTenants(limit)
        self._series: dict[str, _Series] = {}

    def declare(self, name: str, text: str, reasons: tuple[str, ...] = ()) -> None:
        """Add a counter, by reason if there are several."""
        self._series[name] = _Series(text, reasons)

    def rank(self, tenant: str, amount: float) -> None:
        """Count what decides about labels: requests and tokens."""
        lost = None if self._top is None else self._top.add(tenant, amount)
        if lost is None:
            return
        for series in self._series.values():
            for key in [key for key in series.values if key[-1] == lost]:
                value, other = series.values.pop(key), (*key[:-1], OTHER_TENANTS)
                series.values[other] = series.values.get(other, 0.0) + value

    def begin(self, tenant: str) -> None:
        """Export a tenant's counters from 0 on."""
        self.rank(tenant, 0)
        for name, series in self._series.items():
            for reason in series.reasons:
                self.add(name, tenant, 0, reason)
            if not series.reasons:
                self.add(name, tenant, 0)

    def add(self, name: str, tenant: str, amount: float = 1.0, *labels: str) -> None:
        """Increase a counter."""
        label = () if self._top is None else (self._top.label(tenant),)
        values, key = self._series[name].values, (*labels, *label)
        values[key] = values.get(key, 0.0) + amount

    def collect(self) -> Iterator[Metric]:
        tenant = [] if self._top is None else ["tenant"]
        for name, series in self._series.items():
            labels = [*(["reason"] if series.reasons else []), *tenant]
            family = CounterMetricFamily(f"chunkllama_{name}", series.text, labels=labels)
            if not labels:
                family.add_metric([], series.values.get((), 0.0))
            for key, value in series.values.items():
                if labels:
                    family.add_metric(list(key), value)
            yield family
