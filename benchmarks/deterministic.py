"""Count prompts whose log-probabilities repeat, and measure what ``--deterministic`` costs.

    python benchmarks/deterministic.py                  # prints
    python benchmarks/deterministic.py --pairs 11 --save

24 prompts, of which 16 share their first 1,024 tokens, are answered alone with an empty cache, and
again from the cache, together, and after a restart from a snapshot: counted are those whose tokens
and log-probabilities are all the same bits. The costs are of the whole load together, from an empty
and from a full cache: both settings in turns, a ratio is of the same pair.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import cpu_name, new_result

import chunkllama
from chunkllama.cache_messages import KeepSnapshot, WriteSnapshot
from chunkllama.config import EngineConfig
from chunkllama.engine.build import build_engine
from chunkllama.engine.core import EngineCore
from chunkllama.messages import EngineRequest
from chunkllama.sampling_params import SamplingParams

SHARED_TOKENS = 1024
KINDS = {"off": False, "deterministic": True}
Answer = list[tuple[int, float]]


def make_prompts(vocab_size: int) -> list[list[int]]:
    """16 prompts with a common beginning and 8 of their own."""
    rng = np.random.default_rng(0)

    def draw(count: int) -> list[int]:
        return rng.integers(3, vocab_size, count).tolist()  # type: ignore[no-any-return]

    shared = draw(SHARED_TOKENS)
    return [shared + draw(16 + 8 * i) for i in range(16)] + [draw(50 + 40 * i) for i in range(8)]


def make_core(options: argparse.Namespace, kind: str) -> EngineCore:
    return build_engine(
        EngineConfig.from_flat(
            model=options.model,
            num_chunks=options.num_chunks,
            device="cpu",
            deterministic=KINDS[kind],
            **({"dtype": options.dtype} if options.dtype else {}),
        )
    )


def answer(
    core: EngineCore, prompts: dict[int, list[int]], max_tokens: int, logprobs: int | None = 0
) -> dict[int, Answer]:
    """Greedy tokens with their log-probabilities, of prompts that run together."""
    sampling = SamplingParams(
        max_tokens=max_tokens, temperature=0.0, ignore_eos=True, seed=0, logprobs=logprobs
    )
    for name, prompt in prompts.items():
        request = EngineRequest(request_id=str(name), prompt_token_ids=prompt, sampling=sampling)
        core.add(request)
    found: dict[int, Answer] = {name: [] for name in prompts}
    while core.has_work():
        for delta in core.step():
            for choice in delta.choices:
                found[int(delta.request_id)] += [
                    (entry.token_id, entry.logprob) for entry in choice.logprobs or ()
                ]
    return found


def settle(core: EngineCore) -> None:
    while core.is_moving_chunks():
        core.move_chunks()


def empty(core: EngineCore) -> None:
    core.packs.cache.tree.evict(core.info.num_chunks)


def count_equal(options: argparse.Namespace, kind: str) -> dict[str, int]:
    """How many prompts answer as they did alone with an empty cache."""
    core = make_core(options, kind)
    prompts = dict(enumerate(make_prompts(core.info.vocab_size)))
    expected: dict[int, Answer] = {}
    for name, prompt in prompts.items():
        empty(core)
        expected |= answer(core, {name: prompt}, options.tokens)

    def equal(found: dict[int, Answer]) -> int:
        return sum(found[name] == expected[name] for name in prompts)

    with tempfile.TemporaryDirectory() as folder:
        snapshot = KeepSnapshot(
            path=str(Path(folder) / "s.ckpack"),
            tenants=[""],
            template="",
            realm="here",
            seconds=0.0,
            max_bytes=1 << 33,
        )
        empty(core)
        core.file_command(snapshot)
        counts = {"together, cold": equal(answer(core, prompts, options.tokens))}
        counts["together, from the cache"] = equal(answer(core, prompts, options.tokens))
        alone: dict[int, Answer] = {}
        for name, prompt in prompts.items():
            alone |= answer(core, {name: prompt}, options.tokens)
        counts["alone, from the cache"] = equal(alone)
        core.file_command(WriteSnapshot(command_id=1, seconds=600.0))
        settle(core)
        core.close()
        core = make_core(options, kind)
        core.file_command(snapshot)
        settle(core)
        counts["after a restart"] = equal(answer(core, prompts, options.tokens))
        core.close()
    return counts


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of the whole load with each setting, in turns."""
    cores = {kind: make_core(options, kind) for kind in KINDS}
    prompts = dict(enumerate(make_prompts(cores["off"].info.vocab_size)))
    seconds: dict[str, dict[str, list[float]]] = {
        load: {kind: [] for kind in KINDS} for load in ("cold", "cached")
    }
    for number in range(options.pairs + 1):
        for kind in list(KINDS)[:: -1 if number % 2 else 1]:
            empty(cores[kind])
            for times in seconds.values():
                began = time.perf_counter()
                answer(cores[kind], prompts, options.tokens, None)
                if number:  # the first pair warms up
                    times[kind].append(time.perf_counter() - began)
    for core in cores.values():
        core.close()
    return {
        load: {
            **{kind: round(statistics.median(values), 3) for kind, values in times.items()},
            "ratio": round(
                statistics.median(
                    b / a for a, b in zip(times["off"], times["deterministic"], strict=True)
                ),
                3,
            ),
        }
        for load, times in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--dtype", default="", help="the model's own if not given")
    parser.add_argument("--num-chunks", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--save", action="store_true", help="write results/deterministic-*.json")
    options = parser.parse_args()
    result = {
        "command": " ".join(["python benchmarks/deterministic.py", *sys.argv[1:]]),
        "version": chunkllama.__version__,
        "machine": cpu_name(),
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "tokens": options.tokens,
        "equal_of_24": {kind: count_equal(options, kind) for kind in KINDS},
        "seconds": measure(options),
    }
    print(json.dumps(result, indent=1))
    if options.save:
        new_result("deterministic").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
