"""Errors and units of settings, in words."""

from __future__ import annotations

import re
from collections.abc import Mapping

from pydantic import ValidationError
from pydantic.fields import FieldInfo

_KEY_UNITS = frozenset({"seconds", "bytes", "tokens", "chunks"})
_BOUND = re.compile(r"(?<=than |l to )-?\d[\d.e+]*$")


def first_error(error: ValidationError, fields: Mapping[str, FieldInfo] | None = None) -> str:
    """Describe the first of a validation's errors in one line: key, problem, the value given.

    Args:
        fields: of the model that refused: they tell the unit of a number, and what is secret.
    """
    detail = error.errors(include_url=False, include_context=False)[0]
    message = detail["msg"].removeprefix("Value error, ")
    if not detail["loc"]:
        return message
    key = str(detail["loc"][0])
    message = f"{message[:1].lower()}{message[1:]}"
    if fields is not None and (unit := unit_of(key, fields[key])):
        message = _BOUND.sub(lambda bound: f"{bound[0]} {unit}", message)
        if detail["type"].endswith("_parsing"):
            what = "" if unit.startswith("of ") else f" of {unit}"
            example = ", or a size such as 512MiB" if unit == "bytes" else ""
            message += f"; give a number{what}{example}"
    is_secret = fields is not None and "SecretStr" in str(fields[key].annotation)
    given = "" if is_secret else f", got {repr(detail['input'])[:100]}"
    return f"{key}: {message}{given}"


def unit_of(key: str, field: FieldInfo) -> str:
    """Return the unit of a setting, such as "seconds"; "" for a plain number or a text."""
    extra = field.json_schema_extra
    if isinstance(extra, dict) and isinstance(extra.get("unit"), str):
        return str(extra["unit"])
    if "memory" in key:
        return "bytes"
    last = key.rpartition("_")[2]
    return last if last in _KEY_UNITS else ""
