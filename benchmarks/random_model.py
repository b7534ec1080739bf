"""Write a GGUF file of a 1.1B Llama (TinyLlama's shape) with random weights in bfloat16.

    python benchmarks/random_model.py random-1.1b-bf16.gguf
    llamacpp/bin/llama-quantize --pure random-1.1b-bf16.gguf random-1.1b-q4_0.gguf Q4_0

For comparisons of speed with other servers at a size whose weights no cache holds: the arithmetic
does not depend on the weights. The tokenizer has the demo model's first 32,000 tokens.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import gguf
import torch
from gguf import GGMLQuantizationType
from quality_shape import HEAD_DIM, HEADS, HIDDEN, INTERMEDIATE, KV_HEADS, LAYERS, SHAPES, VOCAB

from chunkllama.models.loading.hub import resolve_model

CONTEXT = 8192


def add_matrix(writer: gguf.GGUFWriter, name: str, rows: int, columns: int) -> None:
    weight = torch.randn(rows, columns, dtype=torch.float32) * columns**-0.5
    data = weight.bfloat16().view(torch.uint8).numpy()
    writer.add_tensor(name + ".weight", data, raw_dtype=GGMLQuantizationType.BF16)


def add_norm(writer: gguf.GGUFWriter, name: str) -> None:
    writer.add_tensor(name + ".weight", torch.ones(HIDDEN).numpy())


def add_tokenizer(writer: gguf.GGUFWriter, folder: Path) -> None:
    """Copy the demo model's first ``VOCAB`` tokens and the merges among them."""
    model = json.loads((folder / "tokenizer.json").read_text())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)[:VOCAB]
    known = set(tokens)
    pairs = [m.split(" ") if isinstance(m, str) else m for m in model["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 17 + [gguf.TokenType.NORMAL] * (VOCAB - 17))
    writer.add_token_merges([f"{a} {b}" for a, b in pairs if {a, b, a + b} <= known])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    writer = gguf.GGUFWriter(options.file, "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    add_tokenizer(writer, resolve_model("smollm2-135m-instruct"))
    add_matrix(writer, "token_embd", VOCAB, HIDDEN)
    for layer in range(LAYERS):
        for norm in ("attn_norm", "ffn_norm"):
            add_norm(writer, f"blk.{layer}.{norm}")
        for name, (rows, columns) in SHAPES.items():
            part = "ffn" if name in ("gate", "up", "down") else "attn"
            add_matrix(writer, f"blk.{layer}.{part}_{name}", rows, columns)
    add_norm(writer, "output_norm")
    add_matrix(writer, "output", VOCAB, HIDDEN)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main()
