"""Draw the results of ``compare.py``: a bar for each server, with the spread over the rounds.

    python benchmarks/compare_plot.py [results/compare-bf16-amx-MACHINE.json ...]

Writes a PNG beside each file (default: every result), which names the machine, the instruction-set
level and the versions.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
NAMES = {"chunkllama": "ChunkLlama", "vllm": "vLLM (CPU)", "openvino": "OpenVINO GenAI"}
COLOURS = ("#2f6fed", "#f08c2e", "#7aa7a0", "#98a2b3")
PANELS = {
    "output_tokens_per_s": "output tokens/s\n(higher is better)",
    "ttft_p50_ms": "time to first token,\nmedian, ms (lower is better)",
    "tpot_p50_ms": "time per output token,\nmedian, ms (lower is better)",
}


def spread(record: dict[str, Any], server: str, case: str, key: str) -> tuple[float, float, float]:
    """Return (median, lowest, highest) over the rounds of a case like "A cold"."""
    scenario, phase = case.split()
    values = [
        run[key]
        for run in record["runs"]
        if (run["server"], run["scenario"], run["phase"]) == (server, scenario, phase)
    ]
    return statistics.median(values), min(values), max(values)


def cases(record: dict[str, Any]) -> list[str]:
    """Return the cases of a record, "A cold" first."""
    return [f"{name} {phase}" for name in sorted(record["scenarios"]) for phase in ("cold", "warm")]


def label(record: dict[str, Any], server: str) -> str:
    """Return a server's name and version, without the build number."""
    version = record["versions"].get(server, "").split("-")[0]
    return f"{NAMES.get(server, server)} {version}".strip()


def draw(record: dict[str, Any], path: Path) -> None:
    """Write the figure."""
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot as plt

    servers = list(dict.fromkeys(run["server"] for run in record["runs"]))
    shown = cases(record)
    figure, panels = plt.subplots(len(PANELS), 1, figsize=(10, 8), layout="constrained")
    width = 0.8 / len(servers)
    for panel, (key, title) in zip(panels, PANELS.items(), strict=True):
        for number, server in enumerate(servers):
            values = [spread(record, server, case, key) for case in shown]
            medians = [value[0] for value in values]
            errors = [
                [median - low for median, low, _ in values],
                [high - median for median, _, high in values],
            ]
            places = [i + (number - (len(servers) - 1) / 2) * width for i in range(len(shown))]
            panel.bar(
                places, medians, width, yerr=errors, capsize=2, ecolor="#667085",
                color=COLOURS[number % len(COLOURS)], label=label(record, server),
            )  # fmt: skip
        panel.set_ylabel(title)
        panel.set_xticks(range(len(shown)), shown)
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", alpha=0.3)
        panel.set_axisbelow(True)
    panels[0].legend(frameon=False, ncols=len(servers), loc="upper right")
    rounds = len(record["runs"]) // (len(servers) * len(shown))
    figure.suptitle(
        f"{record['machine']}, {record['date']}, level {record['level']}; "
        f"median, lowest and highest of {rounds} rounds",
        fontsize=10,
    )
    figure.savefig(path, dpi=100, metadata={"Software": None})


def main() -> None:
    for path in map(Path, sys.argv[1:] or sorted(RESULTS.glob("compare-*.json"))):
        draw(json.loads(path.read_text()), path.with_suffix(".png"))


if __name__ == "__main__":
    main()
