"""A tiny model in every form that is read, undamaged: for the mutations of its files."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from tiny_model import byte_tokenizer
from tokenizers import pre_tokenizers

from chunkllama.models.config import read_spec
from chunkllama.models.tensors import expected_shapes

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "vocab_size": 272,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 128,
    },
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "torch_dtype": "float32",
    "bos_token_id": 256,
    "eos_token_id": 258,
}
Tensors = dict[str, tuple[str, list[int], bytes]]
GENERATION = {
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 50,
    "min_p": 0.01,
    "repetition_penalty": 1.1,
    "bos_token_id": 256,
    "eos_token_id": [258],
}


def write_folder(folder: Path) -> Path:
    """A complete tiny model with a byte-level tokenizer."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    settings = {
        "bos_token": "<|endoftext|>",
        "eos_token": {"content": "<|im_end|>", "special": True},
        "add_bos_token": True,
        "added_tokens_decoder": {"258": {"content": "<|im_end|>", "special": True}},
        "additional_special_tokens": ["<|im_start|>"],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    write_weights(folder / "model.safetensors", tensors(folder))
    return folder


def tensors(folder: Path) -> Tensors:
    """Type, shape and content of each tensor of the folder's config.json."""
    rng = np.random.default_rng(0)
    return {
        name: ("F32", list(shape), rng.normal(0, 0.1, shape).astype(np.float32).tobytes())
        for name, shape in expected_shapes(read_spec(folder))
    }


def write_weights(path: Path, found: Tensors) -> None:
    header, at = {}, 0
    for name, (dtype, shape, blob) in found.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + len(blob)]}
        at += len(blob)
    text = json.dumps(header).encode()
    blobs = b"".join(blob for _, _, blob in found.values())
    path.write_bytes(struct.pack("<Q", len(text)) + text + blobs)


def write_shards(folder: Path) -> None:
    """The weights in two files with an index."""
    found = tensors(folder)
    (folder / "model.safetensors").unlink()
    names = sorted(found)
    weight_map = {name: f"model-{i % 2 + 1}.safetensors" for i, name in enumerate(names)}
    for shard in sorted(set(weight_map.values())):
        part = {name: found[name] for name in names if weight_map[name] == shard}
        write_weights(folder / shard, part)
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


QUANTIZATION: dict[str, dict[str, Any]] = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 16, "version": "gemm"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False},
    "packed": {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"weights": {"num_bits": 4}, "targets": ["Linear"]}},
        "sparsity_config": {"format": "dense"},
        "transform_config": {},
        "ignore": ["lm_head"],
    },
    "int8": {"quant_method": "compressed-tensors", "config_groups": {}},
    "fp8": {"quant_method": "fp8", "weight_block_size": [128, 128], "ignored_layers": []},
}


def write_quantized(folder: Path, method: str) -> None:
    """The projections as codes of 4 or 8 bits with scales."""
    found = tensors(folder)
    rng = np.random.default_rng(1)
    for name in [name for name in found if name.endswith("_proj.weight")]:
        module, (_, (rows, columns), _) = name.removesuffix("weight"), found.pop(name)
        groups = columns // 16
        parts: dict[str, tuple[str, list[int]]] = {
            "awq": {
                "qweight": ("I32", [columns, rows // 8]),
                "qzeros": ("I32", [groups, rows // 8]),
                "scales": ("F16", [groups, rows]),
            },
            "gptq": {
                "qweight": ("I32", [columns // 8, rows]),
                "qzeros": ("I32", [groups, rows // 8]),
                "scales": ("F16", [groups, rows]),
            },
            "packed": {
                "weight_packed": ("I32", [rows, columns // 8]),
                "weight_scale": ("F16", [rows, groups]),
            },
            "int8": {"weight": ("I8", [rows, columns]), "weight_scale": ("F16", [rows, 1])},
            "fp8": {"weight": ("F8_E4M3", [rows, columns]), "weight_scale": ("F16", [1])},
        }[method]
        for part, (dtype, shape) in parts.items():
            if dtype == "F16":
                blob = np.full(shape, 0.01, np.float16).tobytes()
            else:
                size = 4 if dtype == "I32" else 1
                # of a byte's values the two NaN of fp8 are left out
                blob = (rng.integers(0, 256, math.prod(shape) * size) & 0x7E).astype("u1").tobytes()
            found[module + part] = (dtype, shape, blob)
    write_weights(folder / "model.safetensors", found)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": QUANTIZATION[method]})
    )


def write_gguf(path: Path, quantized: tuple[str, ...] = ()) -> Path:
    """The same model as llama.cpp writes it.

    Args:
        quantized: tensors stored as Q8_0 instead of F32.
    """
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(512)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(48)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_key_length(16)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(16)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "<|endoftext|>", "ab", "<|im_end|>"]
    writer.add_token_list(tokens)
    writer.add_token_types([*[1] * 256, 3, 1, 3])
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(258)
    writer.add_chat_template(TEMPLATE)
    rng = np.random.default_rng(0)
    shapes = {
        "token_embd": (259, 32), "output_norm": (32,), "blk.0.attn_norm": (32,),
        "blk.0.ffn_norm": (32,), "blk.0.attn_q": (32, 32), "blk.0.attn_k": (16, 32),
        "blk.0.attn_v": (16, 32), "blk.0.attn_output": (32, 32), "blk.0.ffn_gate": (48, 32),
        "blk.0.ffn_up": (48, 32), "blk.0.ffn_down": (32, 48),
    }  # fmt: skip
    for name, shape in shapes.items():
        values = rng.normal(0, 0.1, shape).astype(np.float32)
        if name in quantized:
            codes = gguf.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(f"{name}.weight", codes, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
        else:
            writer.add_tensor(f"{name}.weight", values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
