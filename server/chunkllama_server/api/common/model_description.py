"""Describe a served model or adapter, as /v1/models lists it."""

from __future__ import annotations

from chunkllama_server.api.common.context import ServerContext
from chunkllama_server.api.schema.models import Model


def describe_model(context: ServerContext, name: str) -> Model:
    """Return what clients learn of a name that is served; an adapter's parent is the model."""
    template, base = context.text.template, context.settings.model_names[0]
    adapter = context.adapter_of(name)
    return {
        "id": name,
        "object": "model",
        "created": context.created,
        "owned_by": "chunkllama",
        "root": adapter or base,  # not the folder, which callers must not learn
        "parent": base if adapter else None,
        "max_request_tokens": context.engine.info.max_request_tokens,
        "max_model_len": context.engine.info.max_request_tokens,
        "chat_template": None if template is None else template.capabilities.as_dict(),
    }
