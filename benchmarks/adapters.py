"""Compare the throughput of requests with mixed adapters with that of the model alone.

    python benchmarks/adapters.py [--adapters 8] [--concurrency 16] [--rank 16] [--activated]

Rounds of both alternate in one engine. The adapters are random, of the given rank, for every linear
layer. All prompts begin with one system prompt; with plain adapters each adapter computes it once
for itself, with activated ones the model does for all.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from machine import cpu_name, new_result
from safetensors.numpy import save_file

from chunkllama.adapter_messages import LoadAdapter
from chunkllama.config import DEMO_MODEL, EngineConfig
from chunkllama.engine.build import build_engine
from chunkllama.engine.core import EngineCore
from chunkllama.messages import EngineRequest
from chunkllama.models.config import read_spec
from chunkllama.models.loading.adapter_file import CONFIG, WEIGHTS, module_shapes
from chunkllama.models.loading.hub import resolve_model
from chunkllama.sampling_params import SamplingParams

INVOCATION = (7, 11, 13)


def write_adapter(folder: Path, model: Path, rank: int, seed: int, activated: bool) -> None:
    """Write a random adapter of every linear layer."""
    folder.mkdir()
    random = np.random.default_rng(seed)
    tensors = {}
    for name, (rows, columns) in module_shapes(read_spec(model)):
        for letter, shape in (("A", (rank, columns)), ("B", (rows, rank))):
            values = random.normal(0, 0.02, shape).astype(np.float32)
            tensors[f"base_model.model.{name}.lora_{letter}.weight"] = values
    save_file(tensors, folder / WEIGHTS)
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": "all-linear",
        "alora_invocation_tokens": list(INVOCATION) if activated else None,
    }
    (folder / CONFIG).write_text(json.dumps(config))


def load(core: EngineCore, name: str, folder: Path) -> None:
    reply = core.load_adapter(LoadAdapter(command_id=1, name=name, folder=str(folder)))
    while reply is None:
        core.step()
        reply = next(iter(core.adapter_replies()), None)
    assert not reply.error, reply.error


def run_round(core: EngineCore, names: list[str], args: argparse.Namespace, seed: int) -> float:
    """Output tokens per second of ``args.requests`` requests, ``args.concurrency`` at once."""
    random = np.random.default_rng(seed)
    system = np.random.default_rng(1).integers(20, 1000, args.system_tokens).tolist()
    waiting = [
        EngineRequest(
            request_id=f"{seed}-{index}",
            prompt_token_ids=[*system, *random.integers(20, 1000, 20).tolist(), *INVOCATION, 5],
            sampling=SamplingParams(
                temperature=0.0, seed=1, ignore_eos=True, max_tokens=args.output_tokens
            ),
            adapter=name,
        )
        for index, name in zip(range(args.requests), itertools.cycle(names), strict=False)
    ]
    live, tokens, started = 0, 0, time.perf_counter()
    while waiting or live:
        while waiting and live < args.concurrency:
            core.add(waiting.pop())
            live += 1
        for delta in core.step():
            for choice in delta.choices:
                tokens += len(choice.token_ids)
                live -= choice.finish_reason is not None
    return tokens / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=DEMO_MODEL)
    parser.add_argument("--adapters", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--system-tokens", type=int, default=512)
    parser.add_argument("--output-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--activated", action="store_true")
    parser.add_argument("--save", action="store_true", help="write a file in results/")
    args = parser.parse_args()
    model = resolve_model(args.model)
    core = build_engine(EngineConfig.from_flat(model=args.model))
    names = [f"a{i}" for i in range(args.adapters)]
    with tempfile.TemporaryDirectory() as folder:
        for seed, name in enumerate(names):
            write_adapter(Path(folder) / name, model, args.rank, seed, args.activated)
            load(core, name, Path(folder) / name)
    rounds: dict[str, list[float]] = {"base": [], "mixed": []}
    kinds = {"base": [""], "mixed": names}
    for number in range(args.rounds + 1):  # the first one warms both up
        for kind, used in kinds.items():
            speed = run_round(core, used, args, 2 * number + (kind == "mixed"))
            if number:
                rounds[kind].append(round(speed, 1))
                print(f"{kind}: {speed:.1f} output tokens/s", flush=True)
    core.close()
    medians = {kind: statistics.median(values) for kind, values in rounds.items()}
    ratio = medians["mixed"] / medians["base"]
    print(f"mixed / base: {ratio:.3f} (medians {medians})")
    if args.save:
        result = {"machine": cpu_name(), "settings": vars(args), "rounds": rounds, "ratio": ratio}
        new_result("adapters").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
