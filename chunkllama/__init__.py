"""ChunkLlama: LLM serving for many tenants that share prompts.

Nothing heavy is imported until it is used: torch is loaded when an LLM is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["LLM", "EngineConfig", "SamplingParams", "__version__"]

if TYPE_CHECKING:
    from chunkllama.config import EngineConfig
    from chunkllama.llm import LLM
    from chunkllama.sampling_params import SamplingParams

_HOME = {
    "LLM": "chunkllama.llm",
    "EngineConfig": "chunkllama.config",
    "SamplingParams": "chunkllama.sampling_params",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'chunkllama' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
