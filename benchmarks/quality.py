"""Measure the accuracy of narrower weights and K/V: KL divergence and top-1 agreement with float32.

    python benchmarks/quality.py                       # bf16 and int8 against fp32, 20,000 tokens
    python benchmarks/quality.py --tokens 2000 --candidates int8
    python benchmarks/quality.py --candidates kv8-fp32 kv8  # K/V in int8, computing in fp32, bf16

The text is this repository's documents, sources and licence, cut into windows of 1,024 tokens.
Every position of a window counts, so short contexts are included.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from machine import cpu_name, new_result

from chunkllama.backends.base import DevicePlan
from chunkllama.backends.model import RunnableModel
from chunkllama.engine.load import build_attention, build_model
from chunkllama.models.config import read_spec
from chunkllama.models.loading.hub import resolve_model
from chunkllama.models.loading.safetensors import Checkpoint
from chunkllama.models.loading.weights import load_weights
from chunkllama.text.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
WINDOW = 1024
ROWS = 256  # logits at a time
# candidate -> (computing dtype, weights, K/V)
KINDS = {
    "fp32": (torch.float32, "auto", "auto"),
    "bf16": (torch.bfloat16, "auto", "auto"),
    "int8": (torch.bfloat16, "int8", "auto"),
    "int8-fp32": (torch.float32, "int8", "auto"),
    "int4": (torch.bfloat16, "int4", "auto"),
    "int4-fp32": (torch.float32, "int4", "auto"),
    "kv8": (torch.bfloat16, "auto", "int8"),
    "kv8-fp32": (torch.float32, "auto", "int8"),
}


def repository_text() -> str:
    listing = subprocess.run(
        ["git", "ls-files", "LICENSE", "*.md", "*.py", "*.h"],
        cwd=ROOT,
        check=True,
        capture_output=True,
        text=True,
    ).stdout.split()
    order = sorted(listing, key=lambda name: (Path(name).suffix in (".py", ".h"), name))
    return "\n\n".join((ROOT / name).read_text(errors="replace") for name in order)


class Candidate:
    """A model in one precision with a pool of one window."""

    def __init__(self, folder: Path, kind: str) -> None:
        dtype, weights, kv_dtype = KINDS[kind]
        spec = read_spec(folder)
        attention = build_attention(
            spec,
            device="cpu",
            dtype=dtype,
            num_chunks=WINDOW // 64,
            chunk_size=64,
            kv_dtype=kv_dtype,
        )
        loaded = load_weights(Checkpoint(folder, spec), spec, dtype, torch.device("cpu"))
        self.model: RunnableModel = build_model(
            spec, loaded, attention, max_model_len=WINDOW, weights=weights
        )
        self.plan: DevicePlan = attention.backend.upload_plan(
            attention.planner.build(
                first_positions=[0],
                num_tokens=[WINDOW],
                chunk_ids=[np.arange(WINDOW // 64, dtype=np.int32)],
                shared=[0],
                version=0,
            ),
            attention.kv,
            num_qo_heads=spec.num_qo_heads,
        )

    def log_probabilities(self, window: np.ndarray) -> Iterator[torch.Tensor]:
        """Yield blocks of logits [<= ROWS, vocab] float32."""
        positions = torch.arange(WINDOW, dtype=torch.int32)
        hidden = self.model.forward(torch.from_numpy(window), positions, self.plan).clone()
        for rows in hidden.split(ROWS):
            yield self.model.logits(rows).log_softmax(dim=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--tokens", type=int, default=20 * WINDOW, help="at least 20,000 to count")
    parser.add_argument("--candidates", nargs="+", default=["bf16", "int8"], choices=[*KINDS])
    parser.add_argument("--save", action="store_true", help="write results/quality-<machine>.json")
    options = parser.parse_args()
    folder = resolve_model(options.model)
    ids = np.array(load_tokenizer(folder).encode(repository_text()), np.int64)
    windows = ids[: options.tokens // WINDOW * WINDOW].reshape(-1, WINDOW)
    assert windows.size >= options.tokens - WINDOW, f"the text has only {len(ids)} tokens"
    with torch.inference_mode():
        results = compare(folder, windows, options.candidates)
    print(f"{windows.size} tokens of {options.model}, against fp32")
    print("| candidate | top-1 agreement | mean KL | mean NLL | NLL of fp32 |")
    print("| --- | --- | --- | --- | --- |")
    for kind, r in results.items():
        print(
            f"| {kind} | {r['top1']:.2%} | {r['kl']:.5f} | {r['nll']:.4f} | {r['nll_fp32']:.4f} |"
        )
    if options.save:
        path = new_result("quality")
        report = {
            "machine": cpu_name(),
            "model": options.model,
            "tokens": int(windows.size),
            "candidates": results,
        }
        path.write_text(json.dumps(report, indent=1) + "\n")


def compare(folder: Path, windows: np.ndarray, kinds: list[str]) -> dict[str, dict[str, float]]:
    """Return means over all positions, by candidate."""
    reference = Candidate(folder, "fp32")
    candidates = {kind: Candidate(folder, kind) for kind in kinds}
    sums = {kind: np.zeros(4) for kind in kinds}
    for window in windows:
        targets = torch.from_numpy(np.append(window[1:], 0))
        streams = [c.log_probabilities(window) for c in candidates.values()]
        for begin, expected in zip(
            range(0, WINDOW, ROWS), reference.log_probabilities(window), strict=True
        ):
            last = 1 if begin + ROWS == WINDOW else 0  # the last token has no successor
            rows = torch.arange(len(expected) - last)
            target = targets[begin : begin + len(rows)]
            for kind, stream in zip(kinds, streams, strict=True):
                got = next(stream)
                agree = (got.argmax(1) == expected.argmax(1)).sum()
                divergence = torch.nn.functional.kl_div(
                    got, expected, log_target=True, reduction="sum"
                )
                nll = [-x[rows, target].sum() for x in (got, expected)]
                sums[kind] += np.array([float(x) for x in (agree, divergence, *nll)])
    per = [windows.size, windows.size, *([windows.size - len(windows)] * 2)]
    names = ("top1", "kl", "nll", "nll_fp32")
    return {
        kind: {name: float(x / n) for name, x, n in zip(names, total, per, strict=True)}
        for kind, total in sums.items()
    }


if __name__ == "__main__":
    main()
