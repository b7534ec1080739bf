"""What kind of value a setting has, and how it is written: in ``--help``, tables and pages."""

from __future__ import annotations

import types
from typing import Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from chunkllama.config_errors import unit_of

Kind = Literal["file", "folder", "list", "boolean", "size", "seconds", "number", "text"]
_SIZES = (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))


def kind_of(key: str, field: FieldInfo) -> Kind:
    """Return the kind of a setting's values."""
    annotation = str(field.annotation)
    if "Path" in annotation:
        return "folder" if key.endswith("_dir") or key == "packs" else "file"
    if "tuple" in annotation:
        return "list"
    if "bool" in annotation:
        return "boolean"
    unit = unit_of(key, field)
    if unit == "bytes":
        return "size"
    if unit == "seconds":
        return "seconds"
    return "number" if "int" in annotation or "float" in annotation else "text"


def choices(annotation: Any) -> tuple[Any, ...]:
    """Return the values of a ``Literal``, also in an optional type; () for any other type."""
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    if get_origin(annotation) in (Union, types.UnionType):
        return tuple(c for part in get_args(annotation) for c in choices(part))
    return ()


def show_value(value: object, kind: Kind) -> str:
    """Format a setting's value as a YAML file may have it; secrets as asterisks."""
    if value is None or value == ():
        return "-"
    if isinstance(value, tuple):
        return ", ".join(map(str, value))
    if kind == "size" and isinstance(value, int):
        return _size(value)
    return str(value).lower() if isinstance(value, bool) else str(value)


def _size(value: int) -> str:
    """A number of bytes in the largest unit of which it is a multiple."""
    for unit, size in _SIZES:
        if value and value % size == 0:
            return f"{value // size}{unit}"
    return str(value)
