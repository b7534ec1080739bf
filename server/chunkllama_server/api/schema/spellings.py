"""Read the values of fields as clients write them.

Forms, shells and YAML quote numbers and flags, languages without integers write 5.0, PHP writes an
empty object as a list, and forms send "" for what is not set.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal

# Fields whose empty list means the same as no list; clients send both. An empty list of allowed
# tokens is not among them: it constrains.
EMPTY_IS_ABSENT = frozenset(
    (
        *("tools", "functions", "stop", "stop_token_ids", "bad_words", "documents", "include"),
        *("content", "tool_calls", "modalities"),
        "mcp_servers",
    )
)
_FLAGS = {"true": True, "false": False}
_WHOLE = re.compile(r"[+-]?[0-9]{1,24}")
_NUMBER = re.compile(r"[+-]?([0-9]{1,24}\.?[0-9]{0,24}|\.[0-9]{1,24})([eE][+-]?[0-9]{1,3})?")


class Word:
    """Stands for the words of a ``Literal``."""


def kinds_of(annotation: Any) -> Iterator[type]:
    """The types of which a value of the annotation is one."""
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        yield from kinds_of(parts[0])
    elif origin in (typing.Union, types.UnionType):
        for part in parts:
            yield from kinds_of(part)
    elif origin is Literal:
        yield Word
    else:
        yield origin or annotation


def as_flag(value: Any) -> Any:
    """A flag that is the text true or false, or 0 or 1; anything else stays."""
    if type(value) is int and value in (0, 1):
        return value == 1
    return _FLAGS.get(value.strip().lower(), value) if isinstance(value, str) else value


def as_number(value: Any) -> Any:
    """A number that is a text, and a whole one without its fraction; anything else stays."""
    if isinstance(value, str):
        text = value.strip()
        if _WHOLE.fullmatch(text):
            return int(text)
        value = float(text) if _NUMBER.fullmatch(text) else value
    if type(value) is float and value.is_integer():
        return int(value)
    return value


def as_plain(value: Any) -> Any:
    """What the text of a flag or number means; anything else stays."""
    return as_number(as_flag(value)) if isinstance(value, str) else value


def scalar_reader(annotation: Any) -> Callable[[Any], Any] | None:
    """What reads a field that is one flag or one number; None for another field."""
    kinds = set(kinds_of(annotation)) - {type(None)}
    if bool in kinds and kinds <= {bool, Word}:
        return as_flag
    return as_number if kinds and kinds <= {int, float} else None


def plain_value(name: str, value: Any) -> Any:
    """The value as the schemas define it: 5.0 is 5, ``[]`` and a blank stop string are absent."""
    if type(value) is float and value.is_integer():
        return int(value)
    if name == "stop":
        is_list = isinstance(value, list)
        value = [text for text in value if text not in ("", None)] if is_list else value or None
    if isinstance(value, list | dict) and not value and name in EMPTY_IS_ABSENT:
        # An object without members may be data: a tool returned it.
        return value if value == {} and name == "content" else None
    if isinstance(value, list) and value and type(value[0]) is float:
        return [plain_value("", item) for item in value]
    return value
