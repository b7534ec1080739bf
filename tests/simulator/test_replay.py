"""Traces, their replay through the scheduler, and the pool that they need."""

from __future__ import annotations

import json

import pytest

from chunkllama.errors import ConfigError
from chunkllama.simulation.capacity import PoolResult, find_needed, most_chunks, summarize
from chunkllama.simulation.engine import make_limits
from chunkllama.simulation.replay import Replay, Replayed
from chunkllama.simulation.trace import MOONCAKE_BLOCK, TraceRequest, read_trace

SIZE = 64


def replay(requests, num_chunks: int, **changed) -> Replayed:
    defaults = {
        "max_num_seqs": 4,
        "max_num_batched_tokens": 512,
        "max_model_len": 100_000,
        "max_waiting": 100,
        "spare_chunks": 0,
    }
    limits = make_limits(**defaults | changed)
    run = Replay(limits, num_chunks, SIZE, lambda output, size: 1.0, check=True)
    return run.run(requests)


def mooncake(*requests: tuple[int, list[int], int], tail: int = 100) -> list[dict]:
    return [
        {
            "timestamp": at,
            "input_length": MOONCAKE_BLOCK * (len(blocks) - 1) + tail,
            "output_length": output,
            "hash_ids": blocks,
        }
        for at, blocks, output in requests
    ]


def written(tmp_path, entries) -> list[TraceRequest]:
    file = tmp_path / "trace.jsonl"
    file.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return read_trace(file)


def test_equal_blocks_are_equal_tokens_and_different_ones_are_not(tmp_path) -> None:
    first, second = written(tmp_path, mooncake((0, [0, 7, 9], 2), (5, [0, 7, 8], 3)))
    assert (first.at, second.at) == (0.0, 0.005)
    a, b = first.prompt(), second.prompt()
    assert len(a) == len(b) == first.num_prompt_tokens == 1124
    assert a[:1024] == b[:1024] and not {*a[1024:]} & {*b}
    assert len({*a}) == len(a)


def test_requests_are_sorted_by_arrival_and_limited(tmp_path) -> None:
    file = tmp_path / "trace.jsonl"
    lines = [{"at": at, "prompt_token_ids": [1, 2], "tenant": at} for at in (3, 1, 2)]
    file.write_text("\n\n".join(map(json.dumps, lines)))
    assert [(r.at, r.tenant) for r in read_trace(file)] == [(1, "1"), (2, "2"), (3, "3")]
    assert [r.at for r in read_trace(file, limit=2)] == [1, 3]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("nonsense", "not a JSON object"),
        ("[1]", "not a JSON object"),
        ('{"a":' * 10_000, "not a JSON object"),
        ('{"at": 1}', "give prompt_token_ids, messages, prompt, or Mooncake's hash_ids"),
        ('{"messages": []}', "give --model"),
        ('{"messages": "hi"}', "messages: give a list of objects"),
        ('{"messages": [{"role": "user"}, 3]}', "messages: give a list of objects"),
        ('{"prompt_token_ids": []}', "the prompt has no token"),
        ('{"prompt_token_ids": [-1]}', "prompt_token_ids"),
        ('{"prompt_token_ids": [1], "at": "now"}', "at: give a time"),
        ('{"prompt_token_ids": [1], "max_tokens": 0}', "max_tokens: give an integer"),
        ('{"prompt_token_ids": [1], "tenant": [2]}', "tenant: give a name"),
        ('{"hash_ids": [1], "input_length": 513}', "has 2 blocks of 512 tokens, got 1"),
        ('{"hash_ids": ["a"], "input_length": 5}', "hash_ids: give a list of integers"),
        ('{"hash_ids": [1], "input_length": 5}', "timestamp"),
    ],
)
def test_unusable_lines_name_the_line_and_the_field(tmp_path, line, message) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text('{"prompt_token_ids": [1]}\n' + line)
    with pytest.raises(ConfigError) as caught:
        read_trace(file)
    assert f"{file}, line 2: " in str(caught.value) and message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unusable_files_are_one_line(tmp_path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        read_trace(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(ConfigError, match="holds no request"):
        read_trace(tmp_path / "empty.jsonl")


def test_a_replay_counts_hits_waits_and_times(tmp_path) -> None:
    requests = written(tmp_path, mooncake((0, [1, 2], 3), (20_000, [1, 3], 1)))
    result = replay(requests, 100)
    first, second = result.outcomes
    # 612 tokens are two steps, then two more tokens; one step is one second
    assert (first.first_token_at, first.ended_at, first.cached_tokens) == (2, 4, 0)
    assert (second.first_token_at, second.ended_at, second.cached_tokens) == (21, 21, 512)
    assert (first.queue_seconds, second.queue_seconds) == (0, 0)
    assert (result.seconds, result.busy_seconds, result.num_steps) == (21, 5, 5)
    assert result.peak_chunks == 10  # 612 tokens and two of output


def test_requests_wait_for_a_slot_and_are_refused_beyond_the_queue() -> None:
    requests = [TraceRequest(0.0, "", 3, 2, (i, i, i)) for i in range(4)]
    result = replay(requests, 100, max_num_seqs=1, max_waiting=2)
    assert [outcome.refusal for outcome in result.outcomes] == ["", "", "", "429"]
    assert [outcome.queue_seconds for outcome in result.outcomes[:3]] == [0, 2, 4]
    summary = summarize(result, 100)
    assert (summary.requests, summary.refused, summary.too_long) == (4, 1, 0)
    assert summary.queue_seconds == (2, 4, 4)
    assert summary.output_tokens_per_second == 6 / 6 and summary.busy == 1


def test_what_the_pool_or_the_context_cannot_hold_is_a_400() -> None:
    requests = [TraceRequest(0.0, "", 65, 64, (1,) * 65), TraceRequest(0.0, "", 2, 2, (1, 2))]
    assert [o.refusal for o in replay(requests, 1).outcomes] == ["400", ""]
    assert [o.refusal for o in replay(requests, 9, max_model_len=128).outcomes] == ["400", ""]


def test_a_tenants_prompts_are_its_own() -> None:
    prompt = tuple(range(200))
    requests = [TraceRequest(float(10 * i), name, 200, 1, prompt) for i, name in enumerate("aba")]
    assert [o.cached_tokens for o in replay(requests, 100).outcomes] == [0, 0, 199]


def test_public_prefixes_take_no_time_and_are_matched_by_all() -> None:
    limits = make_limits(max_num_seqs=4, max_num_batched_tokens=64, fair_quantum=100)
    run = Replay(limits, 40, SIZE, lambda output, size: 1.0, check=True)
    run.add_public_prefix(list(range(128)))
    assert run.now == 0
    prompt = (*range(128), 7)
    result = run.run([TraceRequest(0.0, name, 129, 1, prompt) for name in "ab"])
    assert [o.cached_tokens for o in result.outcomes] == [128, 128]


def test_the_needed_pool_is_the_smallest_that_keeps_the_hit_rate() -> None:
    """Ten prompts of ten chunks in turn, three times: fewer than all of them give no hit."""
    prompts = [tuple(range(640 * i, 640 * (i + 1))) for i in range(10)]
    requests = [TraceRequest(float(20 * i), "", 640, 1, prompts[i % 10]) for i in range(30)]
    tried = []

    def run(num_chunks: int) -> PoolResult:
        tried.append(num_chunks)
        return summarize(replay(requests, num_chunks), num_chunks)

    found = find_needed(run, requests, SIZE, 100_000, 0.95)
    assert found.best_hit_rate == pytest.approx(20 * 639 / (30 * 640))
    assert 100 <= found.num_chunks <= 107
    assert run(found.num_chunks).hit_rate >= 0.95 * found.best_hit_rate
    assert run(90).hit_rate < 0.95 * found.best_hit_rate
    assert most_chunks(requests, SIZE) == tried[0] == 30 * 12
    assert [row.num_chunks for row in found.tried] == sorted(tried[:-2])
