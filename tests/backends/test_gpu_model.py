"""`benchmarks/gpu_model.py`: the committed table is what the arithmetic gives, in its bounds."""

from __future__ import annotations

import functools

import gpu_model
import pytest
from gpu_model import BUILT, CHANGES, GPUS, GQA, RESULT, WORKLOADS, microseconds, report
from gpu_suite.workload import Workload


@functools.cache
def modelled(gpu: str, workload: Workload) -> dict[str, float]:
    return dict(zip(("ideal", *CHANGES), microseconds(gpu, workload), strict=True))


def test_gpu_model_table_is_committed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_model, "microseconds", lambda gpu, w: list(modelled(gpu, w).values()))
    assert RESULT.read_text() == report()
    assert f"**{CHANGES[BUILT]}** (built)" in report()


@pytest.mark.parametrize(
    ("workload", "limit"),
    [
        (Workload(32, 4096, 512), 85),
        (Workload(32, 4096, 512, **GQA), 28),
        (Workload(128, 4096, 512, **GQA), 76),
    ],
    ids=lambda x: x.name if isinstance(x, Workload) else None,
)
def test_gpu_model_says_that_one_launch_reaches_the_goals(workload: Workload, limit: float) -> None:
    assert modelled("H200", workload)["one launch"] <= limit


@pytest.mark.parametrize("gpu", GPUS)
def test_gpu_model_is_never_faster_than_memory(gpu: str) -> None:
    """K and V cross HBM once, with any kernels."""
    for workload in WORKLOADS:
        floor = 1e6 * workload.unique_bytes / GPUS[gpu].copy
        assert min(modelled(gpu, workload)[change] for change in CHANGES) > floor


def test_gpu_model_charges_what_is_not_shared() -> None:
    """Tokens of one row only cost what their bytes cost; shared ones are read once for 32 rows."""
    private = modelled("H200", Workload(32, 0, 4096, **GQA))["one launch"]
    shared = modelled("H200", Workload(32, 4096, 0, **GQA))["one launch"]
    assert private > 5 * shared
