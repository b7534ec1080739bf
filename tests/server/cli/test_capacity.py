"""``chunkllama capacity``: tables, files and refusals, on traces that the tests make."""

from __future__ import annotations

import json

import pytest

COST = {"seconds": {"step": 0.01, "token": 0.0001}}


@pytest.fixture
def trace(tmp_path):
    """Mooncake's form: four conversations over one system prompt of two blocks."""
    file = tmp_path / "trace.jsonl"
    lines = [
        {
            "timestamp": 400 * i,
            "input_length": 1024 + 100,
            "output_length": 8,
            "hash_ids": [0, 1, 10 + i % 4],
        }
        for i in range(12)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "cost.json").write_text(json.dumps(COST))
    return file


def test_a_trace_gives_a_table_json_and_a_plot(chunkllama, trace, tmp_path):
    pytest.importorskip("matplotlib")
    done = chunkllama(
        "capacity", "--trace", trace, "--chunks", "60,20", "--cost", tmp_path / "cost.json",
        "--output", tmp_path / "out", "--plots",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "out/capacity.json").read_text())
    small, large = document["results"]
    assert (small["num_chunks"], large["num_chunks"]) == (20, 60)
    assert large["requests"] == 12 and large["refused"] == large["too_long"] == 0
    # the prefix once, each of the four conversations' last 100 tokens once
    cached = 3 * 1024 + 8 * (1124 - 1)
    assert large["hit_rate"] == pytest.approx(cached / (12 * 1124))
    needed = document["needed"]
    assert needed["target"] == 0.95
    assert needed["best_hit_rate"] == pytest.approx(large["hit_rate"])
    assert needed["num_chunks"] <= 60
    assert document["settings"]["cost"]["seconds"] == COST["seconds"] | {
        "sequence": 0.0, "read": 0.0, "attention": 0.0
    }  # fmt: skip
    assert (tmp_path / "out/capacity.png").stat().st_size > 1000
    assert "hit rate" in done.stdout and f"chunks needed: {needed['num_chunks']}" in done.stdout


def test_arrivals_can_be_faster_and_refused(chunkllama, trace, tmp_path):
    done = chunkllama(
        "capacity", "--trace", trace, "--chunks", "200", "--cost", tmp_path / "cost.json",
        "--rate", "100", "--max-waiting", "2", "--max-num-seqs", "1", "--no-needed",
        "--output", tmp_path / "out",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    document = json.loads((tmp_path / "out/capacity.json").read_text())
    assert document["needed"] is None
    assert document["results"][0]["refused"] > 0


def test_our_traces_are_tokenized_by_the_model(chunkllama, tiny_model, tmp_path):
    file = tmp_path / "own.jsonl"
    line = {"at": 0, "messages": [{"role": "user", "content": "hello " * 30}], "max_tokens": 4}
    file.write_text(f"{json.dumps(line)}\n{json.dumps(line | {'at': 60})}\n")
    done = chunkllama(
        "capacity", "--trace", file, "--chunks", "50", "--model", tiny_model,
        "--no-needed", "--output", tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    (result,) = json.loads((tmp_path / "capacity.json").read_text())["results"]
    assert result["requests"] == 2 and 0.4 < result["hit_rate"] < 0.5


def test_the_cost_of_a_model_is_measured_and_used_again(chunkllama, tiny_model, trace, tmp_path):
    done = chunkllama(
        "capacity", "--measure", "--model", tiny_model, "--output", tmp_path, "--name", "tiny"
    )
    assert done.returncode == 0, done.stderr
    file = tmp_path / "tiny-cost.json"
    document = json.loads(file.read_text())
    assert document["source"]["steps"] > 50
    assert min(document["seconds"].values()) >= 0 < max(document["seconds"].values())
    done = chunkllama("capacity", "--trace", trace, "--chunks", "60", "--no-needed", "--cost", file)
    assert done.returncode == 0, done.stderr
    assert "tiny-cost.json" in done.stdout


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "trace: give --trace FILE"),
        (("--trace", "none.jsonl"), "trace: cannot read none.jsonl"),
        (("--trace", "TRACE", "--chunks", "10,x"), "chunks: give numbers"),
        (("--trace", "TRACE", "--chunks", "0"), "chunks: give numbers"),
        (("--trace", "TRACE", "--target", "2"), "target: must be in (0, 1]"),
        (("--trace", "TRACE", "--rate", "0"), "rate: must be in"),
        (("--trace", "TRACE", "--cost", "none.json"), "cost: cannot read none.json"),
        (("--trace", "TRACE", "--cost", "x", "--measure"), "cost: give --cost or --measure"),
        (("--trace", "TRACE", "--scheduling-policy", "best"), "scheduling_policy: must be fair"),
        (("--trace", "TRACE", "--max-num-batched-tokens", "9"), "max_num_batched_tokens 9"),
        (("--trace", "TRACE", "--plots"), "plots: give --output"),
    ],
)
def test_mistakes_are_one_line(in_process, trace, flags, message):
    done = in_process("capacity", *(trace if flag == "TRACE" else flag for flag in flags))
    assert done.returncode == 2
    assert message in done.stderr and len(done.stderr.splitlines()) == 1
