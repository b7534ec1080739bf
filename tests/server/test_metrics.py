"""/metrics: what it counts, under our names and under vLLM's."""

from __future__ import annotations

import random
from typing import Any

import httpx
import pytest
from fake_engine import DURATIONS
from prometheus_client.parser import text_string_to_metric_families

from chunkllama.messages import EngineStats, TenantStats
from chunkllama_server.metrics.server_metrics import (
    FINISH_REASONS,
    REFUSALS,
    TENANT_COUNTERS,
    TENANT_REFUSALS,
    EngineStatsCollector,
    ServerMetrics,
)

# Every name operators are promised, without suffixes.
PROMISED = """
requests_running requests_waiting kv_chunks kv_usage_ratio prefix_tokens_queried prefix_tokens_hit
request_accepted request_finished rejected time_to_first_token_seconds inter_token_latency_seconds
e2e_request_latency_seconds queue_time_seconds prefill_time_seconds decode_time_seconds
prompt_tokens generation_tokens preemptions engine_restarts step_seconds batch_size step_tokens
inference_time_seconds request_prompt_tokens request_generation_tokens
drafts draft_tokens accepted_draft_tokens
engine_stats_age_seconds watchdog_kills replayed_requests slow_cache_readers
"""
VLLM = """
num_requests_running num_requests_waiting kv_cache_usage_perc prefix_cache_queries
prefix_cache_hits prompt_tokens generation_tokens num_preemptions request_success
time_to_first_token_seconds inter_token_latency_seconds time_per_output_token_seconds
e2e_request_latency_seconds request_queue_time_seconds request_prefill_time_seconds
request_decode_time_seconds request_inference_time_seconds
request_prompt_tokens request_generation_tokens iteration_tokens iteration_tokens_total
gpu_cache_usage_perc gpu_prefix_cache_queries gpu_prefix_cache_hits cache_config_info
lora_requests_info
spec_decode_num_drafts spec_decode_num_draft_tokens spec_decode_num_accepted_tokens
"""


def scrape(server: Any, key: str = "") -> dict[str, float]:
    """Sample name and labels, as the text has them, to value."""
    with server.http() as http:
        lines = http.get("/metrics", headers={"x-api-key": key}).text.splitlines()
    pairs = (line.rpartition(" ") for line in lines if line[0] != "#")
    return {name: float(value) for name, _, value in pairs}


def change(server: Any, act: Any) -> dict[str, float]:
    """What ``act()`` adds to the samples."""
    before = scrape(server)
    act()
    return {name: value - before.get(name, 0.0) for name, value in scrape(server).items()}


def test_every_promised_name_is_exported(server):
    with server.http() as http:
        text = http.get("/metrics").text
    exported = {family.name for family in text_string_to_metric_families(text)}
    assert not {f"chunkllama_{name}" for name in PROMISED.split()} - exported
    assert not [name for name in exported if not name.startswith("chunkllama_")]


def test_engine_snapshot(server):
    server.engine.statistics = EngineStats(
        steps_total=10**6,
        prefill_tokens_computed_total=1024,
        prefix_tokens_hit_total=77,
        prefix_tokens_hit_public_total=70,
        chunks_free=3,
        chunks_cached=61,
        chunks_total=64,
        chunks_peak=62,
    )
    for seconds in (0.07, 0.5, 3):
        server.engine.statistics.step_seconds.observe(seconds)
        server.engine.statistics.batch_size.observe(4)
    samples = scrape(server)
    for name, value in {
        "prefill_tokens_computed_total": 1024,
        'prefix_tokens_hit_total{scope="public"}': 70,
        'prefix_tokens_hit_total{scope="tenant"}': 7,
        'kv_chunks{state="cached"}': 61,
        "kv_chunks_peak": 62,
        'step_seconds_bucket{le="0.1"}': 1,
        'step_seconds_bucket{le="1.0"}': 2,
        'step_seconds_bucket{le="+Inf"}': 3,
        "step_seconds_count": 3,
        "step_seconds_sum": 3.57,
        'batch_size_bucket{le="8.0"}': 3,
        "batch_size_sum": 12,
    }.items():
        assert samples[f"chunkllama_{name}"] == pytest.approx(value), name


def test_an_engine_that_is_gone(server):
    server.engine.is_ready = False
    assert scrape(server)["chunkllama_requests_live"] == 0


def test_every_accepted_request_has_one_end(server):
    def act() -> None:
        server.chat()
        server.chat("say(abc)yas", stop="b", stream=True)

    changes = change(server, act)
    ends = [v for name, v in changes.items() if name.startswith("chunkllama_request_finished_t")]
    assert changes["chunkllama_request_accepted_total"] == sum(ends) == 2
    assert changes["chunkllama_requests_live"] == 0


def test_refusals_are_counted_by_status(server):
    changes = change(server, lambda: server.chat(n=0))
    assert changes['chunkllama_rejected_total{why="400",reason="400"}'] == 1


@pytest.mark.parametrize("fields", [{}, {"n": 2}, {"stop": "b"}, {"n": 2, "stop": "b"}])
def test_durations_come_from_the_engine(server, fields):
    """A request counts once, however many choices it has and wherever its end is detected."""
    queue, prefill, per_delta = DURATIONS
    changes = change(server, lambda: server.chat("say(abcd)yas", **fields))
    deltas = 2 if "stop" in fields else 5
    for name, seconds in (
        ("queue_time", queue),
        ("prefill_time", prefill),
        ("decode_time", per_delta * (deltas - 1)),
    ):
        assert changes[f"chunkllama_{name}_seconds_count"] == 1
        assert changes[f"chunkllama_{name}_seconds_sum"] == pytest.approx(seconds)


def test_an_embedding_is_not_decoded(server):
    changes = change(
        server, lambda: server.post("/v1/embeddings", {"model": "alias", "input": "a"})
    )
    assert changes["chunkllama_prefill_time_seconds_count"] == 1
    assert changes["chunkllama_decode_time_seconds_count"] == 0


def test_counters_go_on_when_an_engine_starts_from_zero():
    collector = EngineStatsCollector()
    for steps, tokens, size in ((10, 100, 2), (2, 5, 3)):
        sizes = EngineStats().batch_size
        sizes.observe(size)
        collector.update(
            EngineStats(
                steps_total=steps,
                prompt_tokens_total=tokens,
                prefix_tokens_hit_total=tokens,
                prefix_tokens_hit_public_total=1,
                batch_size=sizes,
            )
        )
    values = {s.name + str(s.labels): s.value for m in collector.collect() for s in m.samples}
    assert values["chunkllama_prompt_tokens_total{}"] == 105
    assert values["chunkllama_prefix_tokens_hit_total{'scope': 'public'}"] == 2
    assert values["chunkllama_prefix_tokens_hit_total{'scope': 'tenant'}"] == 103
    assert values["chunkllama_batch_size_count{}"] == 2
    assert values["chunkllama_batch_size_sum{}"] == 5


def test_the_age_of_the_engine_values_is_exported():
    now = [100.0]
    collector = EngineStatsCollector(lambda: now[0])
    collector.update(EngineStats(requests_running=5, chunks_total=9, chunks_free=2))
    now[0] += 7.5

    def values() -> dict[str, float]:
        return {s.name: s.value for m in collector.collect() for s in m.samples if not s.labels}

    assert values()["chunkllama_engine_stats_age_seconds"] == 7.5
    assert values()["chunkllama_requests_running"] == 5
    collector.restarted()
    assert values()["chunkllama_engine_stats_age_seconds"] == 0
    assert values()["chunkllama_requests_running"] == 0
    assert values()["chunkllama_kv_chunks_capacity"] == 9


def test_known_labels_begin_at_zero(start_server):
    alone = scrape(start_server())
    keyed = scrape(start_server(api_keys={"blue": "k"}), "k")
    for status in REFUSALS:
        assert alone[f'chunkllama_rejected_total{{why="{status}",reason="{status}"}}'] == 0
    for reason in FINISH_REASONS:
        assert alone[f'chunkllama_request_finished_total{{reason="{reason}"}}'] == 0
        name = f'chunkllama_request_finished_total{{reason="{reason}",tenant="blue"}}'
        assert keyed[name] == 0
    assert keyed['chunkllama_request_accepted_total{tenant="blue"}'] == 0
    for name in (*TENANT_COUNTERS, "prompt_tokens", "output_tokens", "queue_seconds"):
        assert keyed[f'chunkllama_tenant_{name}_total{{tenant="blue"}}'] == 0
    for reason in TENANT_REFUSALS:
        name = f'chunkllama_tenant_rejected_total{{reason="{reason}",tenant="blue"}}'
        assert keyed[name] == 0


def test_requests_are_labelled_with_their_tenant(start_server):
    server = start_server(api_keys={"blue": "key-b", "red": "key-r"}, operator_keys=("key-o",))
    for key in ("key-b", "key-b", "key-r"):
        body = {"model": "alias", "messages": [{"role": "user", "content": "hi"}]}
        assert server.post("/v1/chat/completions", body, **{"x-api-key": key}).status_code == 200
    samples = scrape(server, "key-o")
    assert samples['chunkllama_request_accepted_total{tenant="blue"}'] == 2
    assert samples['chunkllama_request_finished_total{reason="stop",tenant="red"}'] == 1


def by_tenant(metrics: ServerMetrics, name: str) -> dict[str, float]:
    """Value of each tenant label, of all other labels together."""
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(metrics.render().decode()):
        for sample in family.samples:
            if sample.name == f"chunkllama_{name}_total":
                tenant = sample.labels["tenant"]
                values[tenant] = values.get(tenant, 0.0) + sample.value
    return values


def test_tenants_beyond_the_first_share_a_label():
    metrics = ServerMetrics(tenant_labels=3)
    for number in range(8):
        metrics.start_request(f"t{number}").finish("stop")
    expected = {"t0": 1, "t1": 1, "t2": 1, "other": 5}
    assert by_tenant(metrics, "request_accepted") == expected
    assert by_tenant(metrics, "request_finished") == expected


def test_the_tenants_with_most_tokens_have_labels_and_sums_never_decrease():
    metrics = ServerMetrics(tenant_labels=2)
    rng = random.Random(0)
    spent = {f"t{i}": 0 for i in range(30)}
    total = 0.0
    for turn in range(3000):
        # in each third of the time, two others of the thirty are the busy ones
        tenant = f"t{turn // 1000 * 10 + rng.choice([3, 4] * 9 + list(range(10)))}"
        tokens = rng.randrange(100) * 10 ** (turn // 1000)
        spent[tenant] += tokens
        metrics.add_output(tenant, tokens)
        if turn % 100 == 99:
            values = by_tenant(metrics, "tenant_output_tokens")
            assert len(values) <= 3 and sum(values.values()) >= total
            total = sum(values.values())
    assert total == sum(spent.values())
    assert set(values) == {"t23", "t24", "other"}
    assert values["t23"] <= spent["t23"]


def test_usage_of_engines_that_start_from_zero_adds_up():
    metrics = ServerMetrics(tenant_labels=5)
    for steps, computed in ((10, 100), (20, 150), (3, 7), (9, 9)):
        tenants = {"a": TenantStats(computed_tokens=computed, chunks_cached=computed)}
        metrics.update(EngineStats(steps_total=steps, tenants=tenants))
    assert metrics.usage.engine("a").computed_tokens == 159
    assert metrics.usage.engine("a").chunks_cached == 9
    assert by_tenant(metrics, "tenant_computed_tokens") == {"a": 159}


def test_names_of_vllm(start_server):
    keys = {"a": "ka", "b": "kb"}
    server = start_server(api_keys=keys, operator_keys=("ko",), metrics_compat="vllm")
    server.engine.statistics = EngineStats(
        requests_waiting=3,
        chunks_total=64,
        chunks_private=16,
        prefix_tokens_hit_total=9,
        prefix_tokens_hit_public_total=4,
    )
    for key in ("ka", "kb"):
        body = {"model": "alias", "messages": [{"role": "user", "content": "say(abcd)yas"}]}
        httpx.post(f"{server.url}/v1/chat/completions", json=body, headers={"x-api-key": key})
    with server.http() as http:
        text = http.get("/metrics", headers={"x-api-key": "ko"}).text
        own = http.get("/metrics", headers={"x-api-key": "ka"}).text
    assert "vllm:request_success_total{" in own
    assert 'vllm:num_requests_waiting{model_name="org/tiny"} 0.0' in own
    assert "vllm:kv_cache_usage_perc" not in own
    families = {family.name: family for family in text_string_to_metric_families(text)}
    theirs = {name: family for name, family in families.items() if name.startswith("vllm:")}
    assert set(theirs) == {f"vllm:{name}" for name in VLLM.split()}
    values: dict[str, list[float]] = {}
    for family in theirs.values():
        for sample in family.samples:
            assert sample.labels["model_name"] == "org/tiny"
            assert (
                set(sample.labels) <= {"model_name", "finished_reason", "le"}
                or "info" in sample.name
            )
            values.setdefault(sample.name, []).append(sample.value)
    assert values["vllm:num_requests_waiting"] == [3]
    assert values["vllm:kv_cache_usage_perc"] == [0.25]
    assert values["vllm:prefix_cache_hits_total"] == [9]
    assert sorted(values["vllm:request_success_total"]) == [0, 0, 0, 0, 2]
    assert values["vllm:request_generation_tokens_sum"] == [10]
    assert values["vllm:request_prompt_tokens_count"] == [2]
    assert values["vllm:request_inference_time_seconds_count"] == [2]
    assert values["vllm:gpu_cache_usage_perc"] == [0.25]
    (cache,) = theirs["vllm:cache_config_info"].samples
    assert (cache.labels["block_size"], cache.labels["num_gpu_blocks"]) == ("64", "64")
    assert theirs["vllm:lora_requests_info"].samples[0].labels["max_lora"] == "0"
    assert values["vllm:request_queue_time_seconds_count"] == [2]
    for ours, their in (
        ("inter_token_latency_seconds", "time_per_output_token_seconds"),
        ("decode_time_seconds", "request_decode_time_seconds"),
    ):
        assert families[f"vllm:{their}"].type == "histogram"
        bounds = [
            [(s.labels.get("le"), s.value) for s in family.samples if s.name.endswith("_bucket")]
            for family in (families[f"chunkllama_{ours}"], families[f"vllm:{their}"])
        ]
        assert bounds[0] == bounds[1] != []


def test_refusals_are_no_successes_of_vllm():
    metrics = ServerMetrics(vllm_model="m")
    metrics.start_request("").finish("refused")
    metrics.start_request("").finish("length")
    lines = metrics.render().decode().splitlines()
    ends = [line for line in lines if line.startswith("vllm:request_success_total{")]
    ends = [line for line in ends if not line.endswith(" 0.0")]
    assert ends == ['vllm:request_success_total{finished_reason="length",model_name="m"} 1.0']


def test_no_gauge_is_named_like_a_counter():
    """As promtool checks; the former name of a gauge has no type."""
    lines = ServerMetrics(vllm_model="m").render().decode().splitlines()
    types = [line.split()[2:] for line in lines if line.startswith("# TYPE ")]
    assert ["chunkllama_kv_chunks_total", "untyped"] in types
    assert not [name for name, kind in types if name.endswith("_total") and kind == "gauge"]
