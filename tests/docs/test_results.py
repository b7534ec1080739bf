"""Tables and figures of recorded results are those of the committed files."""

from __future__ import annotations

import importlib
import json
import re
import statistics
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks/results"
FIRST = "compare-bf16-amx-2-x-intel-xeon-processor-amx-bf16-avx512-bf16.json"
RECORD = json.loads((RESULTS / FIRST).read_text())


@pytest.fixture
def compare(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("compare")


@pytest.fixture
def compare_plot(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("compare_plot")


@pytest.fixture
def routing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("routing")


def test_the_figure_of_the_routers_can_be_drawn_from_the_record(routing, tmp_path: Path) -> None:
    path = tmp_path / "routing.png"
    routing.plot(path)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_tables_of_comparisons_are_those_of_the_recorded_runs(compare) -> None:
    text = (ROOT / "docs/benchmarks.md").read_text()
    linked = set(re.findall(r"results/(compare-bf16-[\w-]+\.json)", text))
    assert linked
    for name in linked:
        record = json.loads((RESULTS / name).read_text())
        servers = sorted({run["server"] for run in record["runs"]}, key=_order)
        assert compare.table(record["runs"], servers, "ABCDE") in text


def test_every_comparison_is_named_by_its_level_and_says_what_held_each_server() -> None:
    found = sorted(RESULTS.glob("compare-*.json"))
    assert found
    for path in found:
        record = json.loads(path.read_text())
        assert f"-{record['level']}-" in path.name
        assert set(record["isa"]) == set(record["versions"])


def test_the_readme_states_the_gain_over_the_faster_other_server(compare_plot) -> None:
    text = " ".join((ROOT / "README.md").read_text().split())
    match = re.search(r"with (\d\.\d) to (\d\.\d) times the output rate of vLLM or OpenVINO", text)
    assert match is not None

    def rate(server: str, case: str) -> float:
        return compare_plot.spread(RECORD, server, case, "output_tokens_per_s")[0]

    gains = [
        rate("chunkllama", case) / max(rate("vllm", case), rate("openvino", case))
        for case in compare_plot.cases(RECORD)
    ]
    assert float(match[1]) <= min(gains)
    assert float(match[2]) <= max(gains) + 0.05


def _order(server: str) -> int:
    return ["chunkllama", "vllm", "openvino"].index(server)


def test_a_bar_is_the_median_and_its_line_the_spread(compare_plot) -> None:
    assert len(compare_plot.cases(RECORD)) == 10
    rates = [
        run["output_tokens_per_s"]
        for run in RECORD["runs"]
        if (run["server"], run["scenario"], run["phase"]) == ("vllm", "C", "warm")
    ]
    expected = (statistics.median(rates), min(rates), max(rates))
    assert compare_plot.spread(RECORD, "vllm", "C warm", "output_tokens_per_s") == expected
    assert compare_plot.label(RECORD, "openvino") == "OpenVINO GenAI 2026.4.1.0"


def test_the_figure_can_be_drawn_from_the_record(compare_plot, tmp_path: Path) -> None:
    path = tmp_path / "compare.png"
    compare_plot.draw(RECORD, path)
    assert path.read_bytes().startswith(b"\x89PNG")
