"""GGUF files of tiny Llamas, as llama.cpp's converter writes them."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from transformers import LlamaForCausalLM

from chunkllama.models.loading.gguf import convert_gguf

PROMPT = np.random.default_rng(4).integers(0, 131, 40).tolist()
TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(128))]
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def random_blocks(rng: np.random.Generator, kind: str, rows: int, columns: int) -> np.ndarray:
    """Rows of random blocks whose scales are sane numbers."""
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    raw = rng.integers(0, 256, (rows * columns // block, size), dtype=np.uint8)
    scales = {"Q4_1": (0, 2), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2)}.get(kind, (0,))
    scales = {"Q6_K": (208,), "Q3_K": (108,), "Q2_K": (80, 82)}.get(kind, scales)
    for at in scales:
        d = rng.uniform(0.5, 1, len(raw)) * (1e-4 if kind.endswith(("_K", "_XS")) else 2e-3)
        raw[:, at : at + 2] = d.astype(np.float16)[:, None].view(np.uint8)
    return raw.reshape(rows, -1)


def write_gguf(
    path: Path,
    model: LlamaForCausalLM,
    kind: gguf.GGMLQuantizationType | Callable[[str], str] = gguf.GGMLQuantizationType.F32,
    **metadata: Any,
) -> None:
    """What llama.cpp's converter writes: names, q and k permuted, matrices quantized.

    ``kind`` may depend on the tensor's name; of types that the gguf package cannot quantize, blocks
    are random.
    """
    config = model.config
    writer = gguf.GGUFWriter(path, metadata.pop("architecture", "llama"))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_key_length(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("llama")
    writer.add_token_list(TOKENS)
    writer.add_token_scores([0.0] * len(TOKENS))
    writer.add_token_types([2, 3, 3, *[6] * 128])
    writer.add_eos_token_id(2)
    for key, value in metadata.items():
        getattr(writer, f"add_{key}")(*value)
    for name, parameter in model.state_dict().items():
        values = parameter.numpy()
        for part, heads in (("q", config.num_attention_heads), ("k", config.num_key_value_heads)):
            if f"{part}_proj" in name:
                halves = values.reshape(heads, 2, -1, *values.shape[1:])
                values = halves.swapaxes(1, 2).reshape(values.shape)
        stem, suffix = name.rsplit(".", 1)
        block = stem.removeprefix("model.layers.")
        if block != stem:
            index, rest = block.split(".", 1)
            new = f"blk.{index}.{NAMES[rest]}.{suffix}"
        else:
            new = f"{NAMES[stem]}.{suffix}"
        if values.ndim == 2:
            own = gguf.GGMLQuantizationType[kind(new)] if callable(kind) else kind
            try:
                raw = gguf.quantize(values, own)
            except NotImplementedError:
                rng = np.random.default_rng(zlib.crc32(new.encode()))
                raw = random_blocks(rng, own.name, *values.shape)
            writer.add_tensor(new, raw, raw_dtype=own)
        else:
            writer.add_tensor(new, values)
    if factors := getattr(model, "rope_factors", None):
        writer.add_tensor("rope_freqs.weight", np.array(factors, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def converted(path: Path, folder: Path) -> Path:
    folder.mkdir()
    convert_gguf(path, folder, lambda done, total: None)
    return folder
