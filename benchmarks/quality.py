"""Measure the accuracy of narrower weights and K/V: KL divergence and top-1 agreement with float32.

    python benchmarks/quality.py                       # bf16 and int8 against fp32, 20,000 tokens
    python benchmarks/quality.py --tokens 2000 --candidates int8
    python benchmarks/quality.py --candidates kv8-fp32 kv8  # K/V in int8, computing in fp32, bf16
    python benchmarks/quality.py --candidates kv4-fp32 kv2-fp32 kivi2-fp32  # of the cache tier

The text is this repository's documents, sources and licence, cut into windows of 1,024 tokens.
Every position of a window counts, so short contexts are included. Where the tier rounds K/V, each
128 tokens are computed behind a prefix whose K/V were computed, and all but its first chunk then
rounded, as a request finds them; the first 128, which have no prefix, are left out. kivi2 rounds
them in plain torch instead of by the tier's code. kvfp8 rounds them to 8-bit floats (e4m3) with the
scales of int8, which the engine does not offer.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from machine import cpu_name, new_result

from chunkllama.backends.int8_kv import mix_heads
from chunkllama.backends.kivi import Bits, KiviCodec
from chunkllama.backends.model import RunnableModel
from chunkllama.engine.load import build_attention, build_model
from chunkllama.models.config import read_spec
from chunkllama.models.loading.hub import resolve_model
from chunkllama.models.loading.safetensors import Checkpoint
from chunkllama.models.loading.weights import load_weights
from chunkllama.text.tokenizer import load_tokenizer

ROOT = Path(__file__).resolve().parents[1]
WINDOW = 1024
CHUNK = 64
TAIL = 128  # tokens behind a rounded prefix
ROWS = 256  # logits at a time


class Rounding(NamedTuple):
    """What the cache tier does to K/V, or what it does in plain torch: KIVI, or to 8-bit floats."""

    bits: Bits | None
    is_plain: bool = False


# candidate -> (computing dtype, weights, K/V: of the pool, or as the tier rounds them)
KINDS: dict[str, tuple[torch.dtype, Any, Any]] = {
    "fp32": (torch.float32, "auto", "auto"),
    "bf16": (torch.bfloat16, "auto", "auto"),
    "int8": (torch.bfloat16, "int8", "auto"),
    "int8-fp32": (torch.float32, "int8", "auto"),
    "int4": (torch.bfloat16, "int4", "auto"),
    "int4-fp32": (torch.float32, "int4", "auto"),
    "kv8": (torch.bfloat16, "auto", "int8"),
    "kv8-fp32": (torch.float32, "auto", "int8"),
    "kv4": (torch.bfloat16, "auto", Rounding(4)),
    "kv4-fp32": (torch.float32, "auto", Rounding(4)),
    "kv2": (torch.bfloat16, "auto", Rounding(2)),
    "kv2-fp32": (torch.float32, "auto", Rounding(2)),
    "kivi2-fp32": (torch.float32, "auto", Rounding(2, is_plain=True)),
    "kvfp8-fp32": (torch.float32, "auto", Rounding(None)),
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


def plain_kivi(chunk: torch.Tensor, bits: int) -> torch.Tensor:
    """Round [layers, 2, heads, tokens, dim]: keys per channel, values per token."""
    top, parts = 2**bits - 1, []
    for part, axis in ((chunk[:, 0].float(), 2), (chunk[:, 1].float(), 3)):
        low, high = part.amin(axis, keepdim=True), part.amax(axis, keepdim=True)
        scale, zero = ((high - low) / top).half().float(), low.half().float()
        codes = ((part - zero) / scale).round().clamp(0, top)
        parts.append(torch.where(scale > 0, codes, 0) * scale + zero)
    return torch.stack(parts, dim=1).to(chunk.dtype)


def plain_fp8(chunk: torch.Tensor) -> torch.Tensor:
    """Round [layers, 2, heads, tokens, dim] as int8 K/V, but to codes in e4m3."""
    parts = []
    for part in (mix_heads(chunk[:, 0].float()), chunk[:, 1].float()):
        largest = torch.finfo(torch.float8_e4m3fn).max
        scale = (part.abs().amax(-1, keepdim=True) / largest).clamp(min=1e-30)
        parts.append((part / scale).to(torch.float8_e4m3fn).float() * scale)
    return torch.stack((mix_heads(parts[0]), parts[1]), dim=1).to(chunk.dtype)


class Candidate:
    """A model in one precision with a pool of one window."""

    def __init__(self, folder: Path, kind: str) -> None:
        dtype, weights, storage = KINDS[kind]
        kv_dtype = storage if isinstance(storage, str) else "auto"
        spec = read_spec(folder)
        self.attention = attention = build_attention(
            spec,
            device="cpu",
            dtype=dtype,
            num_chunks=WINDOW // CHUNK,
            chunk_size=CHUNK,
            kv_dtype=kv_dtype,
        )
        loaded = load_weights(Checkpoint(folder, spec), spec, dtype, torch.device("cpu"))
        self.model: RunnableModel = build_model(
            spec, loaded, attention, max_model_len=WINDOW, weights=weights
        )
        self.rounding = storage if isinstance(storage, Rounding) else None
        self.first = TAIL if self.rounding else 0  # position that counts

    def _forward(self, window: np.ndarray, first: int, end: int) -> torch.Tensor:
        """Hidden states of the tokens [first, end)."""
        attention = self.attention
        plan = attention.planner.build(
            first_positions=[first],
            num_tokens=[end - first],
            chunk_ids=[np.arange(end // CHUNK, dtype=np.int32)],
            shared=[0],
            version=0,
        )
        device_plan = attention.backend.upload_plan(
            plan, attention.kv, num_qo_heads=attention.num_qo_heads
        )
        positions = torch.arange(first, end, dtype=torch.int32)
        tokens = torch.from_numpy(window[first:end])
        return self.model.forward(tokens, positions, device_plan).clone()

    def _round(self, chunk: torch.Tensor) -> torch.Tensor:
        assert self.rounding is not None
        if (bits := self.rounding.bits) is None:
            return plain_fp8(chunk)
        if self.rounding.is_plain:
            return plain_kivi(chunk, bits)
        codec = KiviCodec(bits, tuple(chunk.shape), chunk.dtype)
        data = codec.encode(chunk)
        assert data is not None, "K/V that float16 does not hold"
        return codec.decode(data)

    def _hidden(self, window: np.ndarray) -> torch.Tensor:
        hidden = self._forward(window, 0, WINDOW)
        if self.rounding is None:
            return hidden
        ops, kv = self.attention.backend, self.attention.kv
        chunks = range(WINDOW // CHUNK)
        stored = [ops.restore_chunk(kv, ops.copy_chunk(kv, i)).contiguous() for i in chunks]
        prefix = [ops.arrange_chunk(kv, self._round(x) if i else x) for i, x in enumerate(stored)]
        parts = [hidden[:TAIL]]
        for first in range(TAIL, WINDOW, TAIL):
            for i in range((first - TAIL) // CHUNK, first // CHUNK):
                ops.write_chunk(kv, i, prefix[i])
            parts.append(self._forward(window, first, first + TAIL))
        return torch.cat(parts)

    def log_probabilities(self, window: np.ndarray) -> Iterator[torch.Tensor]:
        """Yield blocks of logits [<= ROWS, vocab] float32."""
        for rows in self._hidden(window).split(ROWS):
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
    """Return means over the positions that count, by candidate."""
    reference = Candidate(folder, "fp32")
    candidates = {kind: Candidate(folder, kind) for kind in kinds}
    sums = {kind: np.zeros(6) for kind in kinds}
    for window in windows:
        targets = torch.from_numpy(np.append(window[1:], 0))
        streams = {kind: c.log_probabilities(window) for kind, c in candidates.items()}
        for begin, expected in zip(
            range(0, WINDOW, ROWS), reference.log_probabilities(window), strict=True
        ):
            last = 1 if begin + ROWS == WINDOW else 0  # the last token has no successor
            for kind, stream in streams.items():
                skipped = max(candidates[kind].first - begin, 0)
                got, wanted = next(stream)[skipped:], expected[skipped:]
                rows = torch.arange(len(wanted) - last)
                target = targets[begin + skipped :][: len(rows)]
                agree = (got.argmax(1) == wanted.argmax(1)).sum()
                divergence = torch.nn.functional.kl_div(
                    got, wanted, log_target=True, reduction="sum"
                )
                nll = [-x[rows, target].sum() for x in (got, wanted)]
                counts = len(wanted), len(rows)
                sums[kind] += np.array([float(x) for x in (agree, divergence, *nll, *counts)])
    return {
        kind: {
            "top1": float(agree / count),
            "kl": float(divergence / count),
            "nll": float(nll / successors),
            "nll_fp32": float(nll_fp32 / successors),
        }
        for kind, (agree, divergence, nll, nll_fp32, count, successors) in sums.items()
    }


if __name__ == "__main__":
    main()
