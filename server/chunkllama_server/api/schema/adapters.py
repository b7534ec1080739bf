"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter: request schemas."""

from __future__ import annotations

from pydantic import Field

from chunkllama_server.api.schema.base import RequestModel
from chunkllama_server.config.adapters import NAME


class LoadAdapterRequest(RequestModel):
    """Body of POST /v1/load_lora_adapter."""

    lora_name: str = Field(
        pattern=f"^{NAME}$", description="Honoured: the name that clients request."
    )
    lora_path: str = Field(
        min_length=1,
        max_length=4096,
        description="Honoured: folder on the server, as PEFT has saved it.",
    )


class UnloadAdapterRequest(RequestModel):
    """Body of POST /v1/unload_lora_adapter."""

    lora_name: str = Field(max_length=256, description="Honoured: the name of a loaded adapter.")
