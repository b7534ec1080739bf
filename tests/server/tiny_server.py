"""A real server process over a random Llama of two layers in fp32, written without torch."""

from __future__ import annotations

import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import numpy as np
from fake_engine import MODEL
from safetensors.numpy import save_file

MAX_MODEL_LEN = 256


@dataclass(frozen=True)
class TinyServer:
    """Where it answers, and the folder of its model."""

    url: str
    folder: Path
    process: subprocess.Popen[bytes]


def write_tiny_model(folder: Path, write_tokenizer: Callable[[Path], None]) -> None:
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
        "max_position_embeddings": MAX_MODEL_LEN,
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


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[TinyServer]:
    """The server while the block runs; it must end by itself when asked to."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *(sys.executable, "-m", "chunkllama_server.cli", "serve", "--model", str(folder)),
        *("--served-model-name", MODEL, "--port", str(port)),
        *("--num-chunks", "64", "--max-model-len", str(MAX_MODEL_LEN), "--threads", "1"),
    ]
    url = f"http://127.0.0.1:{port}"
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        _wait_ready(url, process, folder / "log")
        yield TinyServer(url, folder, process)
    finally:
        process.terminate()
        assert process.wait(timeout=30) == 0


def _wait_ready(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if httpx.get(f"{url}/health").status_code == 200:
                return
        time.sleep(0.1)
    raise AssertionError(log.read_text())
