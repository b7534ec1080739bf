"""Keys, units and errors of settings, in words."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from typing import Any, Final

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from chunkllama.errors import ConfigError
from chunkllama.logger import init_logger

logger = init_logger(__name__)

# Former keys, still accepted wherever a key is.
RENAMED_KEYS: Final = {"op_set": "backend", "weights": "quantization"}
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
    if detail["type"] == "string_pattern_mismatch" and fields is not None:
        message = f"write it like {' or '.join(map(str, fields[key].examples or ()))}"
    is_secret = fields is not None and "SecretStr" in str(fields[key].annotation)
    given = "" if is_secret else f", got {repr(detail['input'])[:100]}"
    return f"{key}: {message}{given}"


def unit_of(key: str, field: FieldInfo) -> str:
    """Return the unit of a setting, such as "seconds"; "" for a plain number or a text."""
    extra = field.json_schema_extra
    if isinstance(extra, dict) and isinstance(extra.get("unit"), str):
        return str(extra["unit"])
    if "memory" in key and not key.endswith("_utilization"):
        return "bytes"
    last = key.rpartition("_")[2]
    return last if last in _KEY_UNITS else ""


def rename_keys(given: Mapping[str, Any], origin: str = "") -> dict[str, Any]:
    """Replace former keys by their present names, with a warning for each.

    Args:
        origin: where the keys come from, for the warning.

    Raises:
        ConfigError: a key is given under both names.
    """
    renamed: dict[str, Any] = {}
    for key, value in given.items():
        name = RENAMED_KEYS.get(key, key)
        if name != key:
            where = f" in {origin}" if origin else ""
            if name in given:
                raise ConfigError(f"{key}{where} is the former name of {name}; give {name} only")
            logger.warning("%s%s is a former name and will be removed; use %s", key, where, name)
        renamed[name] = value
    return renamed


def check_keys(keys: Iterable[str], known: Iterable[str], origin: str = "") -> None:
    """Refuse unknown keys.

    Raises:
        ConfigError: naming the key, its origin and the nearest known key.
    """
    known = list(known)
    for key in keys:
        if key not in known:
            near = difflib.get_close_matches(key.lower().replace("-", "_"), known, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigError(f"unknown key {key}{f' in {origin}' if origin else ''}{hint}")
