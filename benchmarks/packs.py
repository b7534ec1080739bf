"""Measure what a pack saves: loading a gibibyte of chunks, and the first token after a start.

    python benchmarks/packs.py --save

Two measurements with the model's engine in this process. *load*: packs of ``--mib`` MiB of K/V with
right checksums, loaded into an empty pool, from the command to the last chunk; the probe is left
out, because the K/V are random. *first token*: a prompt of ``--shared`` tokens and 32 others, in
turns cold, warm, and after the tree was emptied and a pack of the shared tokens was loaded.
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
from machine import cpu_name, new_result

import chunkllama
from chunkllama.cache_messages import LoadPack
from chunkllama.config import EngineConfig
from chunkllama.engine.build import build_engine
from chunkllama.engine.core import EngineCore
from chunkllama.engine.pack_builder import PrefixPrompt, compute_chunks, plan_pack
from chunkllama.messages import EngineRequest
from chunkllama.packs.file import write_pack
from chunkllama.sampling_params import SamplingParams

QUESTION_TOKENS = 32


def load(core: EngineCore, path: Path) -> float:
    """Load a pack into an empty tree; returns the seconds it took."""
    core.packs.cache.tree.evict(core.info.num_chunks)
    began = time.perf_counter()
    core.file_command(LoadPack(path=str(path), namespaces={"": ""}, template=""))
    while core.is_moving_chunks():
        core.move_chunks()
    seconds = time.perf_counter() - began
    (info,) = [info for info in core.packs.infos() if info.name == path.name]
    assert info.chunks_loaded == info.chunks, info
    return seconds


def first_token(core: EngineCore, prompt: list[int]) -> float:
    """Seconds from a request to its first token."""
    began = time.perf_counter()
    sampling = SamplingParams(max_tokens=1, temperature=0.0, seed=0)
    core.add(EngineRequest(request_id="r", prompt_token_ids=prompt, sampling=sampling))
    while core.has_work():
        core.step()
    return time.perf_counter() - began


def measure_load(core: EngineCore, folder: Path, mib: int, runs: int) -> dict[str, Any]:
    io, rng = core.packs.io, np.random.default_rng(0)
    count = (mib << 20) // io.chunk_bytes
    size = core.info.chunk_size
    prompts = [
        PrefixPrompt(f"p{i}", "", rng.integers(3, core.info.vocab_size, 32 * size).tolist())
        for i in range(count // 32)
    ]
    planned, _ = plan_pack(prompts, io.identify(), "")
    values = rng.standard_normal(io.chunk_bytes // 4, np.float32)
    path = folder / "random.ckpack"
    write_pack(path, planned, (values.data.cast("B") for _ in planned.chunks))
    compare, io.compare = io.compare, lambda *_: 0.0
    seconds = [load(core, path) for _ in range(runs)]
    io.compare = compare
    path.unlink()
    mebibytes = len(planned.chunks) * io.chunk_bytes / 2**20
    return {"mib": round(mebibytes), "chunks": len(planned.chunks), "seconds": _round(seconds)}


def measure_first_token(core: EngineCore, folder: Path, shared: int, runs: int) -> dict[str, Any]:
    rng = np.random.default_rng(1)
    prefix = rng.integers(3, core.info.vocab_size, shared).tolist()
    path = folder / "prefix.ckpack"
    planned, ordered = plan_pack([PrefixPrompt("prefix", "", prefix)], core.packs.io.identify(), "")
    write_pack(path, planned, compute_chunks(core, planned, ordered))

    def ask() -> float:
        question = rng.integers(3, core.info.vocab_size, QUESTION_TOKENS).tolist()
        return first_token(core, prefix + question)

    seconds: dict[str, list[float]] = {"cold": [], "warm": [], "pack": []}
    for _ in range(runs):
        core.packs.cache.tree.evict(core.info.num_chunks)
        seconds["cold"].append(ask())
        seconds["warm"].append(ask())
        load(core, path)
        seconds["pack"].append(ask())
    return {"shared_tokens": shared, **{name: _round(found) for name, found in seconds.items()}}


def _round(seconds: list[float]) -> dict[str, Any]:
    return {"median": round(statistics.median(seconds), 4), "runs": [round(s, 4) for s in seconds]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--shared", type=int, default=2048)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--save", action="store_true", help="write to benchmarks/results/")
    arguments = parser.parse_args()
    core = build_engine(EngineConfig.from_flat(model=arguments.model, log_level="warning"))
    with tempfile.TemporaryDirectory() as folder:
        result = {
            "command": " ".join(["python benchmarks/packs.py", *sys.argv[1:]]),
            "version": chunkllama.__version__,
            "machine": cpu_name(),
            "python": platform.python_version(),
            "backend": f"{core.info.backend} {core.info.isa_level}".strip(),
            "load": measure_load(core, Path(folder), arguments.mib, arguments.runs),
            "first_token": measure_first_token(
                core, Path(folder), arguments.shared, arguments.runs
            ),
        }
    core.close()
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.save:
        new_result("packs").write_text(text + "\n")


if __name__ == "__main__":
    main()
