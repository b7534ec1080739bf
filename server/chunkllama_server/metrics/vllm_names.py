"""Repeat the metrics under vLLM's names, for routers and dashboards that expect them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

# Names here to vLLM's, without the suffixes that each type has.
_NAMES = {
    "requests_running": ("num_requests_running",),
    "requests_waiting": ("num_requests_waiting",),
    "kv_usage_ratio": ("kv_cache_usage_perc",),
    "prefix_tokens_queried": ("prefix_cache_queries",),
    "prefix_tokens_hit": ("prefix_cache_hits",),
    "prompt_tokens": ("prompt_tokens",),
    "generation_tokens": ("generation_tokens",),
    "preemptions": ("num_preemptions",),
    "request_finished": ("request_success",),
    "time_to_first_token_seconds": ("time_to_first_token_seconds",),
    # The second is the older name of the first; both are in use.
    "inter_token_latency_seconds": (
        "inter_token_latency_seconds",
        "time_per_output_token_seconds",
    ),
    "e2e_request_latency_seconds": ("e2e_request_latency_seconds",),
    "queue_time_seconds": ("request_queue_time_seconds",),
    "prefill_time_seconds": ("request_prefill_time_seconds",),
    "decode_time_seconds": ("request_decode_time_seconds",),
}
_LABELS = {"reason": "finished_reason"}
# vLLM has no such labels, and its users divide one series by another, so they are summed.
_SUMMED_OVER = ("scope", "tenant")


class VllmNames(Collector):
    """Renames what a registry collects; every sample gets the label ``model_name``.

    Args:
        source: the registry of the metrics.
        model_name: name that clients request.
    """

    def __init__(self, source: Collector, model_name: str) -> None:
        self._source = source
        self._model_name = model_name

    def collect(self) -> Iterator[Metric]:
        for metric in self._source.collect():
            for name in _NAMES.get(metric.name.removeprefix("chunkllama_"), ()):
                yield self._renamed(metric, f"vllm:{name}")

    def _renamed(self, metric: Metric, name: str) -> Metric:
        values: dict[tuple[str, tuple[tuple[str, str], ...]], float] = defaultdict(float)
        for sample in metric.samples:
            suffix = sample.name.removeprefix(metric.name)
            is_success = sample.labels.get("reason") != "refused"
            if is_success and suffix != "_created":
                labels = {k: v for k, v in sample.labels.items() if k not in _SUMMED_OVER}
                values[suffix, tuple(labels.items())] += sample.value
        renamed = Metric(name, metric.documentation, metric.type)
        for (suffix, pairs), value in values.items():
            labels = {_LABELS.get(key, key): text for key, text in pairs}
            renamed.add_sample(name + suffix, {**labels, "model_name": self._model_name}, value)
        return renamed
