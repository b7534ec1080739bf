"""Implement `serve`: a model of Llama 2 7B's sizes answers requests, in this process.

Table 4 of arXiv 2402.15220: prompts of 1,024 to 4,096 tokens of which all or none are shared,
answers of 512 tokens, at most 32 requests at once; and conversations as in Mooncake's traces (FAST
25), which share blocks of 512 tokens. Each setting is a point for each variant: ours, with sharing
off, with shared chunks that each sequence reads by itself, and transformers' continuous batching.

A dry run has a tiny model on the CPU, in which all of it runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from gpu_suite.device import Device
from gpu_suite.points import Point, Record

from chunkllama.config import EngineConfig
from chunkllama.engine.build import build_engine
from chunkllama.engine.core import EngineCore
from chunkllama.messages import EngineRequest
from chunkllama.models.loading.hub import resolve_model
from chunkllama.resources import cache_folder
from chunkllama.sampling_params import SamplingParams

MODELS = Path(__file__).resolve().parents[2] / "configs" / "models"
BLOCK = 512  # tokens that Mooncake hashes together
CHUNK = 64
_ROUNDS = 2  # requests of a point, in multiples of those that run at once


@dataclass(frozen=True)
class Setting:
    """Requests that are answered, ``rows`` at once.

    Attributes:
        prompt, shared: tokens of each prompt, and of them those that all share.
        answer: tokens of each answer.
        is_trace: prompts are conversations over a few system prompts; ``prompt`` is the longest.
    """

    prompt: int
    shared: int
    answer: int
    rows: int = 32
    is_trace: bool = False

    @property
    def name(self) -> str:
        if self.is_trace:
            return f"trace np{self.prompt} nc{self.answer} b{self.rows}"
        return f"np{self.prompt} ns{self.shared} nc{self.answer} b{self.rows}"

    def prompts(self, vocab_size: int) -> list[list[int]]:
        """The prompts of a point, the same in every run."""
        rng = np.random.default_rng(0)

        def tokens(count: int) -> list[int]:
            return [int(x) for x in rng.integers(0, vocab_size, count)]

        count = _ROUNDS * self.rows
        if not self.is_trace:
            shared = tokens(self.shared)
            return [shared + tokens(self.prompt - self.shared) for _ in range(count)]
        most = max(self.prompt // BLOCK, 2)
        systems = [tokens(BLOCK * max(most // 4, 1)) for _ in range(3)]
        found: list[list[int]] = []
        for index in range(count):  # each fourth goes on with an earlier one
            earlier = found[index // 2] if index % 4 == 3 else systems[index % 4]
            earlier = earlier[: self.prompt - CHUNK]
            own = int(rng.integers(CHUNK, self.prompt - len(earlier) + 1))
            found.append(earlier + tokens(own))
        return found


SETTINGS = [
    *(Setting(np_, ns, 512) for np_ in (4096, 2048, 1024) for ns in (np_, 0)),
    Setting(4096, 0, 256, is_trace=True),
]
DRY = [Setting(192, 128, 3, rows=2), Setting(256, 0, 3, rows=2, is_trace=True)]


def serve_points(device: Device) -> list[Point]:
    """Return the points: a setting with all variants, then the next."""
    model, found = _model(device), []
    for setting in DRY if device.dry else SETTINGS:
        for name, run in VARIANTS.items():
            run_point = partial(run, setting, model, device)
            found.append(Point(f"{name}: {setting.name}", run_point))
    return found


def _model(device: Device) -> Path:
    """Write Llama 2 7B's sizes with more positions, as the paper's prompts and answers need them;
    for a dry run those of a tiny model.
    """
    sizes = yaml.safe_load((MODELS / "llama-2-7b.yaml").read_text())
    sizes["max_position_embeddings"] = 8192
    if device.dry:
        sizes |= {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 64}
        sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    path = cache_folder() / ("gpu-serve-dry.yaml" if device.dry else "gpu-serve.yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(sizes))
    return path


def _settings(setting: Setting, model: Path, device: Device) -> dict[str, Any]:
    """Room for all of them without sharing, so that no variant preempts."""
    each = -(-(setting.prompt + CHUNK + setting.answer) // CHUNK) + 1
    return {
        "model": str(model),
        "load_format": "dummy",
        "device": "cpu" if device.dry else "cuda",
        "backend": "reference" if device.dry else "cuda",
        "num_chunks": setting.rows * each,
        "max_num_seqs": setting.rows,
        "max_num_batched_tokens": 512,
    }


def _ours(setting: Setting, model: Path, device: Device) -> Record:
    return _run_engine(setting, _settings(setting, model, device))


def _sharing_off(setting: Setting, model: Path, device: Device) -> Record:
    settings = _settings(setting, model, device) | {"enable_prefix_caching": False}
    return _run_engine(setting, settings)


def _two_phase_off(setting: Setting, model: Path, device: Device) -> Record:
    return _run_engine(setting, _settings(setting, model, device), one_phase=True)


def _run_engine(setting: Setting, settings: dict[str, Any], *, one_phase: bool = False) -> Record:
    core = build_engine(EngineConfig.from_flat(**settings))
    try:
        if one_phase:
            _read_alone(core)
        return measure_core(core, setting)
    finally:
        core.close()


def _read_alone(core: EngineCore) -> None:
    """Plan as if no chunk were shared: each sequence reads all of its own."""
    planner = core._executor.step_model.attention.planner
    build = planner.build

    def build_alone(*, shared: list[int], **rest: Any) -> Any:
        return build(shared=[0] * len(shared), **rest)

    planner.build = build_alone


def measure_core(core: EngineCore, setting: Setting) -> Record:
    """Answer the setting's prompts, ``rows`` at a time; a request that ends is followed by another.

    Returns:
        Milliseconds for a token of an answer, from the request's start; tokens of answers in a
        second; the largest number of chunks in use; the largest batch.
    """
    prompts = setting.prompts(core.info.vocab_size)
    waiting = list(enumerate(prompts))[::-1]
    started: dict[str, float] = {}
    latencies: list[float] = []
    num_tokens = most_chunks = most_rows = 0
    begin = time.perf_counter()
    while waiting or started:
        while waiting and len(started) < setting.rows:
            index, prompt = waiting.pop()
            name = f"r{index}"
            sampling = SamplingParams(
                temperature=0.0, max_tokens=setting.answer, ignore_eos=True, seed=0
            )
            core.add(EngineRequest(request_id=name, prompt_token_ids=prompt, sampling=sampling))
            started[name] = time.perf_counter()
        deltas = core.step()
        now = time.perf_counter()
        for delta in deltas:
            assert delta.error is None, delta.error
            num_tokens += sum(len(choice.token_ids) for choice in delta.choices)
            if delta.choices and delta.choices[0].finish_reason is not None:
                latencies.append((now - started.pop(delta.request_id)) / setting.answer)
        stats = core.stats()
        most_chunks = max(most_chunks, stats.chunks_referenced + stats.chunks_private)
        most_rows = max(most_rows, stats.requests_running)
    seconds = time.perf_counter() - begin
    assert num_tokens == len(prompts) * setting.answer, "tokens were lost"
    return {
        "ms_per_token": round(1000 * float(np.mean(latencies)), 3),
        "tokens_per_s": round(num_tokens / seconds, 1),
        "most_chunks": most_chunks,
        "most_rows": most_rows,
        "requests": len(prompts),
    }


def _transformers(setting: Setting, model: Path, device: Device) -> Record:
    """Answer the same prompts by ``generate_batch``; its memory is its own to choose."""
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    config = AutoConfig.from_pretrained(resolve_model(str(model)))
    place = "cpu" if device.dry else "cuda"
    with torch.device(place):
        network = AutoModelForCausalLM.from_config(
            config,
            dtype=torch.float32 if device.dry else torch.bfloat16,
            attn_implementation="paged|sdpa",
        ).eval()
    options = GenerationConfig(
        max_new_tokens=setting.answer, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    prompts = setting.prompts(config.vocab_size)
    begin = time.perf_counter()
    answers = network.generate_batch(inputs=prompts, generation_config=options)
    seconds = time.perf_counter() - begin
    num_tokens = sum(len(answer.generated_tokens) for answer in answers.values())
    assert num_tokens == len(prompts) * setting.answer, f"{num_tokens} tokens"
    return {"tokens_per_s": round(num_tokens / seconds, 1), "requests": len(prompts)}


VARIANTS: dict[str, Callable[[Setting, Path, Device], Record]] = {
    "ours": _ours,
    "sharing off": _sharing_off,
    "two-phase off": _two_phase_off,
    "transformers": _transformers,
}


def serve_rows(records: list[Record]) -> list[dict[str, Any]]:
    """Print the short table: one line per point, with our speed over a variant's."""
    ours = {
        name.removeprefix("ours: "): record["result"]["tokens_per_s"]
        for record in records
        if (name := record["point"]).startswith("ours: ") and "result" in record
    }
    rows = []
    for record in records:
        variant, _, setting = record["point"].partition(": ")
        row = {"setting": setting, "variant": variant, **record.get("result", {})}
        if setting in ours and "result" in record:
            row["ours x"] = ours[setting] / record["result"]["tokens_per_s"]
        rows.append(row)
    return rows
