"""A model folder's JSON files, read field by field with errors that name the file and the field."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from chunkllama.errors import ConfigError
from chunkllama.model_spec import Activation

_MAX_JSON_BYTES = 64 << 20
_ACTIVATIONS: Final[dict[str, Activation]] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu2": "relu2",
}


class ConfigFile:
    """config.json over an architecture's defaults.

    Args:
        path: of the file, for errors.
        values: its content.
        defaults: values of missing keys.
    """

    def __init__(
        self, path: Path, values: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
    ) -> None:
        self.path = path
        self.values = {**(defaults or {}), **values}

    def get(self, key: str) -> Any:
        """The value as it is; None if it is missing."""
        return self.values.get(key)

    def positive(self, key: str, default: int | None = None) -> int:
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
            raise self.error(f"{key} must be a positive integer, got {value!r}")
        return value

    def count(self, key: str, default: int) -> int:
        """An integer that may be 0."""
        return 0 if self.values.get(key) == 0 else self.positive(key, default)

    def number(self, key: str, default: float) -> float:
        value = self.values.get(key)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(f"{key} must be a number, got {value!r}")
        if not math.isfinite(value):
            raise self.error(f"{key} must be finite, got {value!r}")
        return float(value)

    def factor(self, key: str) -> float:
        """A multiplier, 1 if missing; 0 would erase what it multiplies."""
        value = self.number(key, 1.0)
        if value == 0:
            raise self.error(f"{key} must not be 0")
        return value

    def optional_number(self, key: str) -> float | None:
        return None if self.values.get(key) is None else self.number(key, 0.0)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self.values.get(key)
        return default if value is None else bool(value)

    def activation(self, key: str = "hidden_act") -> Activation:
        name = self.values.get(key) or "silu"
        if name not in _ACTIVATIONS:
            raise self.error(
                f"{key} {name!r} is not supported; supported: {', '.join(_ACTIVATIONS)}"
            )
        return _ACTIVATIONS[name]

    def error(self, what: str) -> ConfigError:
        return ConfigError(f"{self.path}: {what}")


def read_json(path: Path, *, required: bool = True) -> dict[str, Any]:
    """A JSON object from a file; {} when the file may be missing and is.

    Raises:
        ConfigError: missing though required, unreadable, or not a JSON object.
    """
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ConfigError(
                f"{path}: larger than {_MAX_JSON_BYTES >> 20} MiB, not a model's JSON"
            )
        value = json.loads(path.read_text(encoding="utf-8-sig"))  # of Windows' editors, too
    except FileNotFoundError:
        if not required:
            return {}
        if not path.parent.is_dir():
            raise ConfigError(f"{path.parent}: no such folder; check the model's path") from None
        raise ConfigError(f"{path}: missing; is {path.parent} a model folder?") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid JSON ({error}); copy the file again") from None
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {type(value).__name__}")
    return value
