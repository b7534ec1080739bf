"""Tiny Llamas: as transformers builds and saves them, and as ours run them; engines of folders."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_families import BuildCore
from transformers import LlamaConfig, LlamaForCausalLM

from chunkllama.backends.select import BackendName
from chunkllama.config import EngineConfig
from chunkllama.engine.build import build_engine
from chunkllama.engine.core import EngineCore
from chunkllama.engine.load import build_attention, build_model
from chunkllama.models.config import read_spec
from chunkllama.models.loading.safetensors import Checkpoint
from chunkllama.models.loading.weights import load_weights
from chunkllama.scheduler.output import ScheduledSlice, SchedulerOutput

CHUNK_SIZE = 16

TINY: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.2,
    "eos_token_id": 2,
}

MakeTiny = Callable[..., LlamaForCausalLM]
Logits = Callable[[Path, list[int]], torch.Tensor]


@pytest.fixture
def build_core() -> Iterator[BuildCore]:
    """Make engines of folders, float32 on one thread unless told otherwise; closed at the end."""
    made: list[EngineCore] = []

    def build(folder: Path, **changes: Any) -> EngineCore:
        settings = {"dtype": "float32", "device": "cpu", "threads": 1, "num_chunks": 64, **changes}
        made.append(build_engine(EngineConfig.from_flat(model=str(folder), **settings)))
        return made[-1]

    yield build
    for core in made:
        core.close()


@pytest.fixture
def make_tiny() -> MakeTiny:
    """A random transformers Llama; biases are random too, where it has any."""

    def make(**changes: Any) -> LlamaForCausalLM:
        torch.manual_seed(7)
        model = LlamaForCausalLM(LlamaConfig(**{**TINY, **changes})).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(std=0.3)
        return model

    return make


@pytest.fixture
def tiny_folder(make_tiny: MakeTiny, tmp_path: Path) -> Path:
    folder = tmp_path / "tiny"
    make_tiny().save_pretrained(folder)
    return folder


@pytest.fixture
def our_logits() -> Logits:
    """All logits of a prompt by our model in float32, on the reference ops by default."""

    def compute(
        folder: Path,
        token_ids: list[int],
        *,
        backend: BackendName = "reference",
        chunk_size: int = CHUNK_SIZE,
    ) -> torch.Tensor:
        spec = read_spec(folder)
        attention = build_attention(
            spec,
            device="cpu",
            dtype=torch.float32,
            num_chunks=12,
            chunk_size=chunk_size,
            backend=backend,
        )
        weights = load_weights(Checkpoint(folder, spec), spec, torch.float32, torch.device("cpu"))
        model = build_model(spec, weights, attention, max_model_len=spec.max_position)
        chunks = np.arange(11, dtype=np.int32)[::-1].copy()
        piece = ScheduledSlice(0, 0, np.array(token_ids, np.int32), chunks, 0, True)
        with torch.inference_mode():
            plan = attention.plan(SchedulerOutput(step=1, slices=[piece], plan_version=0))
            positions = torch.arange(len(token_ids), dtype=torch.int32)
            return model.logits(model.forward(torch.tensor(token_ids), positions, plan))

    return compute
