"""What each architecture runs on, and with what: for ``chunkllama models list`` and the docs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, get_args

from chunkllama.backends.base import Quantization
from chunkllama.backends.cpu.fused_model import can_fuse
from chunkllama.backends.cuda.source import HEAD_DIMS
from chunkllama.model_spec import ModelSpec
from chunkllama.models.architectures import ARCHITECTURES
from chunkllama.models.config import parse_spec
from chunkllama.models.loading.gguf_config import GGUF_ARCHITECTURES
from chunkllama.models.text_part import OUTER

# A config.json of which nothing is special; what transformers assumes is added to it.
_TYPICAL: Final[dict[str, Any]] = {
    "num_hidden_layers": 4,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 1024,
    "max_position_embeddings": 8192,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "logits_scaling": 8.0,
}

# What holds for all of them.
NOTES: Final = (
    "Each runs on the reference backend (torch), too. It takes the place of the others for a "
    "head_dim that the kernels lack: they have multiples of 16 up to 256 on a CPU, and "
    f"{', '.join(map(str, HEAD_DIMS))} on a GPU.",
    "Other decoders (classes named ForCausalLM or LMHeadModel at their end) run through "
    "transformers, where it can run them on this server's attention: slower, and without "
    "quantization.",
    "Of multimodal checkpoints (*ForConditionalGeneration) the text model is served, without "
    f"images: {', '.join(name.removesuffix('ForConditionalGeneration') for name in OUTER)}.",
)


@dataclass(frozen=True, slots=True)
class Entry:
    """One architecture.

    Attributes:
        architecture: as config.json names it.
        cpu: how the cpu backend runs it.
        cuda: how the cuda backend runs it.
        quantizations: storage of linear layers on the cpu backend.
        gguf: llama.cpp's name of it in GGUF files; "" if these are not read.
        limits: what is not supported; "" if nothing is known.
    """

    architecture: str
    cpu: str
    cuda: str
    quantizations: str
    gguf: str
    limits: str


def entries() -> list[Entry]:
    """Every supported architecture, in the order of the table."""
    return [_entry(name) for name in ARCHITECTURES]


def _entry(name: str) -> Entry:
    spec = parse_spec({"architectures": [name], **_TYPICAL}, Path("config.json"))
    return Entry(
        architecture=name,
        cpu="one native call" if can_fuse(spec) else "native, op by op",
        cuda="native, op by op",
        quantizations=", ".join(x for x in get_args(Quantization) if x != "auto"),
        gguf=", ".join(_gguf_names(name)),
        limits="; ".join(_limits(spec)),
    )


def _gguf_names(name: str) -> list[str]:
    return [
        gguf
        for gguf, entry in GGUF_ARCHITECTURES.items()
        if name in (entry.name, entry.name_with_windows)
    ]


def _limits(spec: ModelSpec) -> list[str]:
    limits = []
    if len({layer.window for layer in spec.layers}) > 1:
        limits.append("layers with different windows are not fused")
    if spec.architecture == "Phi3ForCausalLM":
        limits.append("longrope: one set of factors, by max_model_len")
    return limits
