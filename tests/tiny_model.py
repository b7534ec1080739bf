"""A random Llama of two layers in fp32, written without torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

MAX_MODEL_LEN = 256
CONTROL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% if tools %}<|im_start|>tools {{ tools | tojson }} <tool_call><|im_end|>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}"
    "{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def byte_tokenizer(special: Sequence[str] = CONTROL_TOKENS) -> Tokenizer:
    """A byte-level tokenizer of 256 bytes and control tokens; no merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in special])
    return tokenizer


def write_tokenizer(folder: Path, special: tuple[str, ...] = ()) -> None:
    """The tokenizer, with further control tokens, and its chat template."""
    tokenizer = byte_tokenizer((*CONTROL_TOKENS, *special))
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "chat_template": TEMPLATE,
        "add_bos_token": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def write_tiny_model(folder: Path, max_model_len: int = MAX_MODEL_LEN) -> None:
    """A model folder; its tokenizer is byte-level, of 259 tokens."""
    write_tokenizer(folder)
    vocab, hidden, heads, kv_heads, head_dim, inner = 259, 128, 2, 1, 64, 128
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": max_model_len,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "bos_token_id": 256,
        "eos_token_id": 258,
    }
    (folder / "config.json").write_text(json.dumps(config))
    shapes = {"model.embed_tokens": (vocab, hidden), "lm_head": (vocab, hidden)}
    for layer in range(2):
        block = f"model.layers.{layer}"
        shapes |= {
            f"{block}.self_attn.q_proj": (heads * head_dim, hidden),
            f"{block}.self_attn.k_proj": (kv_heads * head_dim, hidden),
            f"{block}.self_attn.v_proj": (kv_heads * head_dim, hidden),
            f"{block}.self_attn.o_proj": (hidden, heads * head_dim),
            f"{block}.mlp.gate_proj": (inner, hidden),
            f"{block}.mlp.up_proj": (inner, hidden),
            f"{block}.mlp.down_proj": (hidden, inner),
            f"{block}.input_layernorm": (hidden,),
            f"{block}.post_attention_layernorm": (hidden,),
        }
    shapes["model.norm"] = (hidden,)
    random = np.random.default_rng(7)
    weights = {
        f"{name}.weight": np.ones(shape, np.float32)
        if len(shape) == 1
        else random.normal(0, 0.2, shape).astype(np.float32)
        for name, shape in shapes.items()
    }
    save_file(weights, folder / "model.safetensors")
