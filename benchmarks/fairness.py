"""Compare the fair order with an ideal fluid scheduler over 2, 16 and 256 tenants.

    python benchmarks/fairness.py [--save]

Counts steps of the simulated scheduler, so the numbers are the same on every machine. Targets:
prefill at most 1.2 times the least possible; each tenant's P99 wait at most 2 times its wait under
the fluid scheduler on the same arrivals.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from chunkllama.simulation.fairness import Comparison, Scenario, compare

TENANTS = (2, 16, 256)


def scenarios(seeds: int) -> list[Scenario]:
    return [
        Scenario(num_tenants=count, prefixes=prefixes, skewed=skewed, seed=seed, policy=policy)
        for policy in ("fair", "fcfs")
        for count in TENANTS
        for prefixes in ("private", "public")
        for skewed in (False, True)
        for seed in range(seeds)
    ]


def name_of(scenario: Scenario) -> str:
    skew = "skewed" if scenario.skewed else "uniform"
    return f"{scenario.num_tenants} tenants, {scenario.prefixes}, {skew}"


def row(result: Comparison) -> dict[str, Any]:
    """The result with rounded numbers; the ratios by tenant follow from the waits."""
    values = result.as_dict()
    del values["wait_ratios"]
    for name in ("waits", "fluid_waits"):
        values[name] = {tenant: round(wait, 2) for tenant, wait in values[name].items()}
    for name in ("prefill_over_ideal", "worst_wait_ratio"):
        values[name] = round(values[name], 4)
    return values


def plot(results: list[Comparison], path: Path) -> None:
    """Each tenant's P99 wait against its wait under the fluid scheduler, one panel a scenario."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(3, 4, figsize=(14, 10), layout="constrained")
    shown = [r for r in results if r.scenario.seed == 0]
    for policy, colour in (("fcfs", "#f08c2e"), ("fair", "#2f6fed")):
        ours = [r for r in shown if r.scenario.policy == policy]
        for axis, result in zip(axes.flat, ours, strict=True):
            tenants = list(result.waits)
            x = [result.fluid_waits[tenant] for tenant in tenants]
            y = [result.waits[tenant] for tenant in tenants]
            axis.plot(x, y, ".", color=colour, label=policy)
            end = max(*x, axis.get_xlim()[1])
            axis.plot([0, end], [0, end], color="0.7", linewidth=1)
            axis.plot([0, end], [0, 2 * end], color="0.7", linewidth=1, linestyle="--")
            axis.set(title=name_of(result.scenario), xlim=(0, None), ylim=(0, None))
    for axis in axes[-1]:
        axis.set(xlabel="P99 wait, fluid scheduler, steps")
    for axis in axes[:, 0]:
        axis.set(ylabel="P99 wait, steps")
    axes[0, 0].legend()
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--save", action="store_true", help="write results/fairness.json and .png")
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()
    results = []
    for scenario in scenarios(options.seeds):
        result = compare(scenario)
        results.append(result)
        print(
            f"{scenario.policy:<5} {name_of(scenario):<36} seed {scenario.seed}: "
            f"prefill {result.prefill_over_ideal:5.2f}x ideal, "
            f"worst P99 wait {result.worst_wait_ratio:6.2f}x fluid",
            flush=True,
        )
    if options.save:
        folder = Path(__file__).parent / "results"
        document = {
            "command": f"python benchmarks/fairness.py --seeds {options.seeds} --save",
            "unit": "steps",
            "targets": {"prefill_over_ideal": 1.2, "worst_wait_ratio": 2.0},
            "results": [row(result) for result in results],
        }
        (folder / "fairness.json").write_text(json.dumps(document) + "\n")
        plot(results, folder / "fairness.png")


if __name__ == "__main__":
    main()
