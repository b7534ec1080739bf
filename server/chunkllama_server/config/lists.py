"""Settings that are lists: comma-separated, as repeated flags, or as a list of a YAML file."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator


def split_text(value: object) -> object:
    """Split "a,b"; the type checks anything else."""
    if isinstance(value, str):
        return [part.strip() for part in value.split(",") if part.strip()]
    return value


def split_list(value: object) -> object:
    """Split "a,b", also as one text of a list: a flag may hold several values or be repeated."""
    texts = [value] if isinstance(value, str) else value
    if isinstance(texts, list | tuple) and all(isinstance(text, str) for text in texts):
        return [part.strip() for text in texts for part in text.split(",") if part.strip()]
    return value


def split_tags(value: object) -> object:
    """Split "a,b" as ``split_list`` does; texts of a longer list keep white space at their ends."""
    is_one = isinstance(value, str) or (isinstance(value, list | tuple) and len(value) == 1)
    return split_list(value) if is_one else value


Names = Annotated[tuple[str, ...], BeforeValidator(split_list)]
