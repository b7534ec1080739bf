"""The protocols of other servers that a setting may name."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator


def _named(value: object) -> object:
    """Split "a,b", also in a list; "none" is no protocol."""
    texts = [value] if isinstance(value, str) else value
    if isinstance(texts, list | tuple) and all(isinstance(text, str) for text in texts):
        names = [part.strip() for text in texts for part in text.split(",") if part.strip()]
        return [] if names == ["none"] else names
    return value


Protocol = Literal["anthropic", "ollama", "tgi"]
Protocols = Annotated[tuple[Protocol, ...], BeforeValidator(_named)]
