"""The protocols of other servers that a setting may name."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator

from chunkllama_server.config.lists import split_list


def _named(value: object) -> object:
    """Split a list of names; "none" is no protocol."""
    names = split_list(value)
    return [] if names == ["none"] else names


Protocol = Literal["anthropic", "ollama", "tgi"]
Protocols = Annotated[tuple[Protocol, ...], BeforeValidator(_named)]
