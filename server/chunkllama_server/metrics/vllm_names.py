"""Repeat the metrics under vLLM's names, for routers and dashboards that expect them."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from copy import copy

from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from chunkllama.messages import EngineReady

# Names here to vLLM's, without the suffixes that each type has: those that its dashboards and the
# routers of llm-d, production-stack and aibrix read, with the older name after the newer one.
_NAMES = {
    "requests_running": ("num_requests_running",),
    "requests_waiting": ("num_requests_waiting",),
    "kv_usage_ratio": ("kv_cache_usage_perc", "gpu_cache_usage_perc"),
    "prefix_tokens_queried": ("prefix_cache_queries", "gpu_prefix_cache_queries"),
    "prefix_tokens_hit": ("prefix_cache_hits", "gpu_prefix_cache_hits"),
    "prompt_tokens": ("prompt_tokens",),
    "generation_tokens": ("generation_tokens",),
    "preemptions": ("num_preemptions",),
    "drafts": ("spec_decode_num_drafts",),
    "draft_tokens": ("spec_decode_num_draft_tokens",),
    "accepted_draft_tokens": ("spec_decode_num_accepted_tokens",),
    "request_finished": ("request_success",),
    "time_to_first_token_seconds": ("time_to_first_token_seconds",),
    "inter_token_latency_seconds": (
        "inter_token_latency_seconds",
        "time_per_output_token_seconds",
    ),
    "e2e_request_latency_seconds": ("e2e_request_latency_seconds",),
    "queue_time_seconds": ("request_queue_time_seconds",),
    "prefill_time_seconds": ("request_prefill_time_seconds",),
    "decode_time_seconds": ("request_decode_time_seconds",),
    "inference_time_seconds": ("request_inference_time_seconds",),
    "request_prompt_tokens": ("request_prompt_tokens",),
    "request_generation_tokens": ("request_generation_tokens",),
    # A histogram, which vLLM names like a counter.
    "step_tokens": ("iteration_tokens_total", "iteration_tokens"),
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
        self._cache_labels: dict[str, str] = {}
        self._num_chunks: Callable[[], int] = lambda: 0

    def describe(self, info: EngineReady, num_chunks: Callable[[], int]) -> None:
        """Take the size of the K/V pool, which routers read from labels.

        Args:
            num_chunks: returns the chunks of all engines; replicas come and go.
        """
        self._num_chunks = num_chunks
        self._cache_labels = {
            "block_size": str(info.chunk_size),
            "cache_dtype": info.kv_dtype if info.is_kv_quantized else "auto",
            "enable_prefix_caching": "True",
        }

    def _constants(self) -> Iterator[Metric]:
        """Yield what has no equivalent here: the pool's size as labels, and that no LoRA is
        loaded, whose value is the time of the report."""
        cache = Metric("vllm:cache_config_info", "Sizes of the K/V pool.", "gauge")
        name = {"model_name": self._model_name}
        size = {"num_gpu_blocks": str(self._num_chunks())}
        cache.add_sample("vllm:cache_config_info", {**self._cache_labels, **size, **name}, 1)
        yield cache
        lora = Metric("vllm:lora_requests_info", "LoRA adapters; none are served.", "gauge")
        labels = {"max_lora": "0", "running_lora_adapters": "", "waiting_lora_adapters": ""}
        lora.add_sample("vllm:lora_requests_info", {**labels, **name}, time.time())
        yield lora

    def of(self, source: Collector) -> VllmNames:
        """Return the same names for what another collector shows."""
        names = copy(self)
        names._source = source
        return names

    def collect(self) -> Iterator[Metric]:
        if self._cache_labels:
            yield from self._constants()
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
