"""Compare int4 with llama.cpp's types of the same size, on the sizes of a 1.1B model.

    python benchmarks/quality_shape.py --ggml FOLDER/libggml-base.so --save

The weights are random with heavy tails (Student's t, four degrees of freedom), as those of trained
models have; each matrix is quantized by this project's kernels as --quantization int4 does, and by
llama.cpp's own library as Q4_0 and Q4_K, all of 4.5 bits. A layer at a time, the hidden states of
one prompt pass through the float weights and through each dequantized copy, in float32; the head
and the embedding stay as they are. The error is that of the logits, relative to their size.
"""

from __future__ import annotations

import argparse
import ctypes
import json
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch
from machine import describe_run, new_result
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from chunkllama.backends.cpu.abi import F32, INT4
from chunkllama.backends.cpu.backend import CpuBackend
from chunkllama.backends.cpu.packed import pack_linear, unpack
from chunkllama.backends.model import Linear

# TinyLlama's.
HIDDEN, INTERMEDIATE, LAYERS, VOCAB = 2048, 5632, 22, 32000
HEADS, KV_HEADS, HEAD_DIM = 32, 4, 64
SHAPES = {
    "q": (HEADS * HEAD_DIM, HIDDEN),
    "k": (KV_HEADS * HEAD_DIM, HIDDEN),
    "v": (KV_HEADS * HEAD_DIM, HIDDEN),
    "output": (HIDDEN, HEADS * HEAD_DIM),
    "gate": (INTERMEDIATE, HIDDEN),
    "up": (INTERMEDIATE, HIDDEN),
    "down": (HIDDEN, INTERMEDIATE),
}
Quantize = Callable[[torch.Tensor], torch.Tensor]
Layer = dict[str, torch.Tensor]


def heavy_tailed(rng: np.random.Generator, rows: int, columns: int) -> torch.Tensor:
    values = rng.standard_t(4, (rows, columns)).astype(np.float32)
    return torch.from_numpy(values * np.float32((2 * columns) ** -0.5))  # the variance of t is 2


def ours() -> Quantize:
    """Quantize and read back as the cpu backend packs int4."""
    ops = CpuBackend(dtype=torch.bfloat16, head_dim=HEAD_DIM, num_kv_heads=KV_HEADS)

    def quantize(weight: torch.Tensor) -> torch.Tensor:
        packed = pack_linear(ops.library, Linear(weight.clone()), F32, INT4)
        return unpack(ops.library, packed.packed.parts[0], *weight.shape)

    return quantize


def of_llama_cpp(library: ctypes.CDLL, kind: gguf.GGMLQuantizationType) -> Quantize:
    """Quantize with llama.cpp's library, and read back with the gguf package."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    chunk = library.ggml_quantize_chunk
    chunk.restype = ctypes.c_size_t
    chunk.argtypes = [
        *(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p),
        *(ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p),
    ]

    def quantize(weight: torch.Tensor) -> torch.Tensor:
        rows, columns = weight.shape
        raw = np.empty((rows, columns // block * size), np.uint8)
        written = chunk(kind, weight.data_ptr(), raw.ctypes.data, 0, rows, columns, None)
        assert written == raw.nbytes, f"{written} bytes of {kind.name}, expected {raw.nbytes}"
        return torch.from_numpy(gguf.dequantize(raw, kind))

    return quantize


def forward(x: torch.Tensor, layer: Layer, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """One Llama layer over a prompt [T, H]; norms have no weights."""
    normed = rms_norm(x, (HIDDEN,), eps=1e-5)
    q, k, v = (
        (normed @ layer[name].T).view(len(x), -1, HEAD_DIM).transpose(0, 1) for name in "qkv"
    )
    q, k = (rotated(heads, cos, sin) for heads in (q, k))
    mixed = scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True, enable_gqa=True)
    x = x + mixed[0].transpose(0, 1).reshape(len(x), -1) @ layer["output"].T
    normed = rms_norm(x, (HIDDEN,), eps=1e-5)
    gated = silu(normed @ layer["gate"].T) * (normed @ layer["up"].T)
    return x + gated @ layer["down"].T


def rotated(heads: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    low, high = heads.chunk(2, dim=2)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=2)


@torch.inference_mode()
def compare(kinds: dict[str, Quantize], tokens: int, layers: int) -> dict[str, dict[str, float]]:
    """Return the relative errors of logits and of weights, by type."""
    rng = np.random.default_rng(0)
    frequencies = 1e4 ** (-torch.arange(0, HEAD_DIM, 2) / HEAD_DIM)
    angles = torch.arange(tokens)[:, None] * frequencies
    first = heavy_tailed(rng, tokens, HIDDEN) * HIDDEN**0.5
    exact, states = first, dict.fromkeys(kinds, first)
    weight_errors = {name: np.zeros(2) for name in kinds}
    for index in range(layers):
        layer = {name: heavy_tailed(rng, *shape) for name, shape in SHAPES.items()}
        exact = forward(exact, layer, angles.cos(), angles.sin())
        for name, quantize in kinds.items():
            copy = {part: quantize(weight) for part, weight in layer.items()}
            states[name] = forward(states[name], copy, angles.cos(), angles.sin())
            for part, weight in layer.items():
                squares = (float((x**2).sum()) for x in (copy[part] - weight, weight))
                weight_errors[name] += list(squares)
        print(f"layer {index + 1} of {layers}", flush=True)
    head = heavy_tailed(rng, VOCAB, HIDDEN).T
    logits = rms_norm(exact, (HIDDEN,), eps=1e-5) @ head
    results = {}
    for name in kinds:
        off = rms_norm(states[name], (HIDDEN,), eps=1e-5) @ head - logits
        error, size = weight_errors[name]
        results[name] = {
            "logits": float(off.norm() / logits.norm()),
            "weights": float((error / size) ** 0.5),
        }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ggml", type=Path, required=True, help="llama.cpp's libggml-base.so")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--save", action="store_true", help="write results/quality-shape-*.json")
    options = parser.parse_args()
    library = ctypes.CDLL(str(options.ggml))
    types = gguf.GGMLQuantizationType
    kinds = {
        "int4": ours(),
        "Q4_0": of_llama_cpp(library, types.Q4_0),
        "Q4_K": of_llama_cpp(library, types.Q4_K),
    }
    results = compare(kinds, options.tokens, options.layers)
    print("| type | relative error of logits | of weights |")
    print("| --- | --- | --- |")
    for name, r in results.items():
        print(f"| {name} | {r['logits']:.4f} | {r['weights']:.4f} |")
    if options.save:
        report = {**describe_run(), "tokens": options.tokens, "errors": results}
        new_result("quality-shape").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
