"""Adapters that a server loads when it starts."""

from __future__ import annotations

import re
from typing import Annotated, Final

from pydantic import BeforeValidator, Field, field_validator

from chunkllama.config import ConfigGroup
from chunkllama_server.config.lists import split_list

NAME: Final = r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}"


def _pairs(value: object) -> object:
    """Split "a=x,b=y"; a mapping in YAML has the same meaning."""
    if isinstance(value, dict):
        return [f"{name}={folder}" for name, folder in value.items()]
    return split_list(value)


class AdapterConfig(ConfigGroup):
    """Adapters, which clients request as models."""

    lora: Annotated[tuple[str, ...], BeforeValidator(_pairs)] = Field(
        default=(),
        description="name=folder of an adapter that PEFT has saved; repeatable. Clients request it "
        "as NAME or MODEL:NAME.",
    )

    @field_validator("lora")
    @classmethod
    def _check_lora(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        names = [text.partition("=")[0] for text in value]
        for text, name in zip(value, names, strict=True):
            if not re.fullmatch(NAME, name) or not text.partition("=")[2]:
                raise ValueError(f"write name=folder, not {text[:100]!r}")
            if names.count(name) > 1:
                raise ValueError(f"{name} occurs twice")
        return value

    @property
    def adapter_folders(self) -> dict[str, str]:
        """Folders of the adapters to load, by name."""
        return dict(text.split("=", 1) for text in self.lora)
