"""Adapter folders as PEFT writes them: what is adapted, checked in full before a weight is used.

A folder holds adapter_config.json and adapter_model.safetensors; nothing else of it is read. No
torch here, so that a start that must fail does so at once.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from dataclasses import fields as fields_of
from pathlib import Path
from typing import Any, Final

import regex

from chunkllama.errors import ConfigError
from chunkllama.model_spec import ModelSpec
from chunkllama.models.config_file import ConfigFile, read_json
from chunkllama.models.folder_check import check_is_file
from chunkllama.models.loading.safetensors import ITEM_SIZES, MAX_HEADER_BYTES, read_header
from chunkllama.models.loading.tensor_info import TensorInfo
from chunkllama.models.tensors import LinearTensors, layer_tensors

MAX_RANK: Final = 128
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX: Final = "base_model.model."
_PICKLE: Final = "adapter_model.bin"
MAX_CONFIG_BYTES: Final = 1 << 20
_MAX_INVOCATION: Final = 256
_PATTERN_SECONDS: Final = 5.0  # for all patterns of an adapter
# A compiled pattern holds a copy of what is repeated per repetition, nested ones their product.
_MAX_PATTERN: Final = 1024
_MAX_REPETITIONS: Final = 256
_REPEAT: Final = re.compile(r"\{([0-9]{0,4})(?:,([0-9]{0,4}))?\}")
# Fields that change what an adapter computes, and are not computed here. PEFT writes them all, most
# of them empty.
_REFUSED: Final = (
    *("use_dora", "use_qalora", "use_bdlora", "lora_bias", "fan_in_fan_out", "modules_to_save"),
    *("trainable_token_indices", "target_parameters", "layer_replication", "arrow_config"),
    *("monteclora_config", "megatron_config", "kasa_config"),
)
# Initializations with which PEFT leaves the weights of the model as they are. Others change them,
# and the adapter is trained on top of the changed ones, of which its folder says nothing.
_INITIALIZATIONS: Final = ("gaussian", "eva", "orthogonal", "mica")
_MAX_ALPHA: Final = 1e6


@dataclass(frozen=True, slots=True)
class AdapterModule:
    """One adapted module: scale * (x A^T) B^T, with A [rank, in] and B [out, rank]."""

    rank: int
    scale: float
    a: TensorInfo
    b: TensorInfo


@dataclass(frozen=True, slots=True)
class AdapterFile:
    """An adapter that fits a model.

    Attributes:
        modules: by their names in the model.
        invocation: tokens from whose last occurrence in a prompt on the adapter is active; ():
            from the beginning.
        digest: SHA-256 of both files, in hexadecimal.
        file_bytes: size of the file of weights.
    """

    folder: Path
    modules: Mapping[str, AdapterModule]
    invocation: tuple[int, ...]
    digest: str
    file_bytes: int

    @property
    def num_values(self) -> int:
        """Numbers in the A and B matrices."""
        tensors = (tensor for module in self.modules.values() for tensor in (module.a, module.b))
        return sum(math.prod(tensor.shape) for tensor in tensors)

    @property
    def rank(self) -> int:
        """The largest rank of a module."""
        return max(module.rank for module in self.modules.values())


def read_adapter(folder: Path, spec: ModelSpec) -> AdapterFile:
    """Read and check an adapter's configuration and the header of its weights.

    Raises:
        ConfigError: one line naming the file, the field or tensor, and the fix.
    """
    if not spec.is_native:
        raise ConfigError(
            f"{folder}: adapters need an architecture of this server, not {spec.architecture}"
        )
    if not os.path.isdir(folder):  # also for a name that no file system holds
        raise ConfigError(f"{folder}: no such folder; an adapter is a folder that PEFT has saved")
    if not (folder / CONFIG).exists():
        raise ConfigError(
            f"{folder / CONFIG}: missing; an adapter is a folder that PEFT has saved, not a model"
        )
    if not (folder / WEIGHTS).is_file() and (folder / _PICKLE).exists():
        raise ConfigError(
            f"{folder / _PICKLE}: pickled weights can run code when loaded and are refused; save "
            "the adapter as safetensors"
        )
    largest = sum(4 * MAX_RANK * (rows + columns) for _, (rows, columns) in module_shapes(spec))
    sizes = (MAX_CONFIG_BYTES, largest + MAX_HEADER_BYTES)
    # First: a file that changes later no longer has this digest.
    digest, file_bytes = _hash_files(folder, sizes)
    path = folder / CONFIG
    config = ConfigFile(path, read_json(path))
    _check_kind(config)
    targets = _Targets(config, spec)
    modules = targets.modules(read_header(folder / WEIGHTS), folder / WEIGHTS)
    return AdapterFile(folder, modules, _invocation(config, spec), digest, file_bytes)


def _hash_files(folder: Path, largest: tuple[int, int]) -> tuple[str, int]:
    """The SHA-256 of an adapter's two files, and the size of the second one.

    Args:
        largest: sizes that the files may have, in bytes.
    """
    digest, size = hashlib.sha256(), 0
    for name, most in zip((CONFIG, WEIGHTS), largest, strict=True):
        path = folder / name
        check_is_file(path)
        try:
            size = path.stat().st_size
            if size > most:
                raise ConfigError(
                    f"{path}: has {size} bytes, an adapter of this model at most {most}"
                )
            with path.open("rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        except OSError as error:
            raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    return digest.hexdigest(), size


def _check_kind(config: ConfigFile) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise config.error(f"peft_type {kind!r:.40} is not supported; use LORA")
    bias = config.get("bias")
    if bias not in (None, "none"):
        raise config.error(f"bias {bias!r:.40} is not supported; use none")
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower() not in _INITIALIZATIONS:
        raise config.error(
            f"init_lora_weights {start!r:.40} changes the model's own weights; convert the adapter "
            "to an ordinary one with PEFT, or merge it"
        )
    for name in _REFUSED:
        if config.get(name):
            raise config.error(f"{name} is not supported")


def _invocation(config: ConfigFile, spec: ModelSpec) -> tuple[int, ...]:
    tokens = config.get("alora_invocation_tokens")
    if tokens is None:
        return ()
    if not isinstance(tokens, list) or not 0 < len(tokens) <= _MAX_INVOCATION:
        raise config.error(
            f"alora_invocation_tokens must be a list of 1 to {_MAX_INVOCATION} token ids"
        )
    for token in tokens:
        if type(token) is not int or not 0 <= token < spec.vocab_size:
            raise config.error(
                f"alora_invocation_tokens: {token!r:.40} is no token id below {spec.vocab_size}"
            )
    return tuple(tokens)


class _Targets:
    """Which modules of a model a configuration adapts, and how."""

    def __init__(self, config: ConfigFile, spec: ModelSpec) -> None:
        self._config = config
        self._deadline = time.monotonic() + _PATTERN_SECONDS
        self._shapes = dict(module_shapes(spec))
        self._rank = self._checked_rank(config.get("r"), "r")
        self._alpha = self._positive(config.get("lora_alpha"), "lora_alpha")
        self._ranks = {
            key: self._checked_rank(value, f"rank_pattern {key!r:.60}")
            for key, value in self._mapping("rank_pattern").items()
        }
        self._alphas = {
            key: self._positive(value, f"alpha_pattern {key!r:.60}")
            for key, value in self._mapping("alpha_pattern").items()
        }

    def modules(self, infos: dict[str, TensorInfo], path: Path) -> dict[str, AdapterModule]:
        """The adapted modules with their tensors, all of which are used."""
        found: dict[str, AdapterModule] = {}
        left = dict(infos)
        for name, (rows, columns) in self._shapes.items():
            if not self._is_target(name):
                continue
            rank = self._of(self._ranks, name, self._rank)
            a = self._take(left, path, f"{name}.lora_A.weight", (rank, columns))
            b = self._take(left, path, f"{name}.lora_B.weight", (rows, rank))
            alpha = self._of(self._alphas, name, self._alpha)
            root = math.sqrt(rank) if self._config.get("use_rslora") else rank
            found[name] = AdapterModule(rank, alpha / root, a, b)
        if left:
            name = min(left)
            raise ConfigError(f"{path}: unexpected tensor {name:.120}{self._why(name)}")
        if not found:
            raise self._config.error("target_modules names no linear layer of this model")
        return found

    def _take(
        self, left: dict[str, TensorInfo], path: Path, name: str, shape: tuple[int, int]
    ) -> TensorInfo:
        info = left.pop(_PREFIX + name, None)
        if info is None:
            raise ConfigError(f"{path}: has no tensor {_PREFIX}{name}, which target_modules names")
        if info.shape != shape:
            raise ConfigError(
                f"{path}: tensor {name} has shape {list(info.shape)}, rank and base model ask for "
                f"{list(shape)}; was it trained for this model?"
            )
        if info.dtype not in ITEM_SIZES:
            raise ConfigError(
                f"{path}: tensor {name} is {info.dtype}; supported: {', '.join(ITEM_SIZES)}"
            )
        return info

    def _why(self, name: str) -> str:
        """What an unexpected tensor belongs to."""
        if "lora_magnitude_vector" in name:
            return ": DoRA is not supported"
        if "lm_head" in name or "embed" in name:
            return ": adapters of the head and of embeddings are not supported"
        module = name.removeprefix(_PREFIX).partition(".lora_")[0]
        if module in self._shapes:
            return ": target_modules does not name its module"
        return ": the model has no such linear layer; was it trained for this model?"

    def _is_target(self, module: str) -> bool:
        if self._matches("exclude_modules", module):
            return False
        if not self._matches("target_modules", module):
            return False
        layers = self._config.get("layers_to_transform")
        if layers is None or isinstance(self._config.get("target_modules"), str):
            return True
        indices = layers if isinstance(layers, list) else [layers]
        return not indices or int(module.split(".")[2]) in indices

    def _matches(self, field: str, module: str) -> bool:
        """Whether a field with names or a pattern of modules names one, as PEFT reads it."""
        names = self._config.get(field)
        if not names:
            return False
        if isinstance(names, str):
            if field == "target_modules" and names.lower() == "all-linear":
                return True
            return self._fits(names, module, field)
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise self._config.error(f"{field} must be a pattern or a list of names")
        return any(module == name or module.endswith(f".{name}") for name in names)

    def _of(self, patterns: Mapping[str, Any], module: str, default: Any) -> Any:
        """The value of the first pattern that fits a module's name."""
        for pattern, value in patterns.items():
            if self._fits(rf"(.*\.)?({pattern})", module, "rank_pattern, alpha_pattern"):
                return value
        return default

    def _fits(self, pattern: str, module: str, field: str) -> bool:
        self._check_size(pattern, field)
        try:
            # Concurrent: steps run meanwhile, for which the interpreter's lock is needed.
            match = regex.fullmatch(pattern, module, timeout=self._seconds_left(), concurrent=True)
            return match is not None
        except regex.error as error:
            raise self._config.error(f"{field}: {pattern!r:.60} is no pattern: {error}") from None
        except RecursionError:
            raise self._config.error(f"{field}: {pattern!r:.60} is nested too deeply") from None
        except TimeoutError:
            raise self._config.error(f"{field}: {pattern!r:.60} takes too long") from None

    def _check_size(self, pattern: str, field: str) -> None:
        """Refuse a pattern that could take much memory when it is compiled."""
        if len(pattern) > _MAX_PATTERN:
            raise self._config.error(
                f"{field}: {pattern!r:.60} has {len(pattern)} characters; a pattern may have "
                f"{_MAX_PATTERN}"
            )
        repeats = _REPEAT.findall(pattern)
        if len(repeats) != pattern.count("{"):
            raise self._config.error(
                f"{field}: {pattern!r:.60}: braces may hold a count of repetitions only"
            )
        counts = (max(int(least or 1), int(most or 1), 1) for least, most in repeats)
        if math.prod(counts) > _MAX_REPETITIONS:
            raise self._config.error(
                f"{field}: {pattern!r:.60} repeats too often; the product of its counts may be "
                f"{_MAX_REPETITIONS}"
            )

    def _seconds_left(self) -> float:
        """Time that is left for all patterns together.

        Raises:
            TimeoutError: none.
        """
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left

    def _mapping(self, field: str) -> dict[str, Any]:
        value = self._config.get(field) or {}
        if not isinstance(value, dict):
            raise self._config.error(f"{field} must be an object")
        return value

    def _checked_rank(self, value: Any, field: str) -> int:
        if type(value) is not int or not 0 < value <= MAX_RANK:
            raise self._config.error(
                f"{field} must be a rank from 1 to {MAX_RANK}, got {value!r:.40}"
            )
        return value

    def _positive(self, value: Any, field: str) -> float:
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not 0 < value <= _MAX_ALPHA:
            raise self._config.error(
                f"{field} must be a positive number up to {_MAX_ALPHA:.0f}, got {value!r:.40}"
            )
        return float(value)


def module_shapes(spec: ModelSpec) -> Iterator[tuple[str, tuple[int, int]]]:
    """Every linear module of the layers and its shape [out, in]."""
    for index in range(spec.num_layers):
        tensors = layer_tensors(spec, index)
        for source in (getattr(tensors, item.name) for item in fields_of(tensors)):
            if isinstance(source, LinearTensors):
                for name, rows in source.parts:
                    yield name, (rows, source.columns)
