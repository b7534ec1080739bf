"""Numbers of the CPU backend that depend on the machine.

They are shipped in ``configs/hardware/cpu.yaml``; ``chunkllama tune`` measures those of one machine
and writes them to the cache folder, where the backend finds them at its next start.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml

from chunkllama.backends.cpu.abi import INT4, INT8
from chunkllama.errors import ConfigError
from chunkllama.resources import cache_folder, cpu_name, data_folder

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class FewRows:
    """How quantized weights are multiplied by few rows, without widening them to bf16 first.

    Attributes:
        int8: most rows of int8; they are multiplied in float32.
        int4: most rows of int4 whose activations are rounded to 8 bits.
        int4_float: most rows of int4 in float32.
        rounds: whether activations of int4 are rounded to 8 bits, with a scale for each row and 32
            inputs. Tables whose values are no multiples of their largest / 128 (NF4) stay in float.
    """

    int8: int = 2
    int4: int = 8
    int4_float: int = 4
    rounds: bool = True

    def of(self, type_: int, is_rounded: bool) -> int:
        """Return the most rows for a type of weight."""
        if type_ == INT4:
            return self.int4 if is_rounded else self.int4_float
        return self.int8 if type_ == INT8 else 0


# Weights are widened for any number of rows, see ``few_rows`` in kernels/cpu/api.h.
NO_FEW_ROWS: Final = FewRows(int8=-1, int4=-1, int4_float=-1, rounds=False)


@dataclass(frozen=True, slots=True)
class PackingNumbers:
    """How a step's attention is cut into units, see ``configs/hardware/cpu.yaml``."""

    query_rows_per_item: int
    min_run_chunks: int
    units_per_thread: int
    split_private: bool
    spare_chunks: int


@dataclass(frozen=True, slots=True)
class Tuning:
    """All of the numbers.

    Attributes:
        vector_rows: query rows per kv head up to which attention runs on the vector units, not AMX.
        few_rows: products of quantized weights with few rows.
        packing: of attention.
    """

    vector_rows: int
    few_rows: FewRows = field(default_factory=FewRows)
    packing: PackingNumbers = PackingNumbers(192, 8, 3, False, 1)


# Least and most of each number that ``tune`` writes.
_RANGES: Final = {
    "vector_rows": (0, 1024),
    "few_rows": (0, 32),
    "query_rows_per_item": (1, 4096),
    "min_run_chunks": (1, 1024),
    "units_per_thread": (1, 64),
    "split_private": (0, 1),
    "spare_chunks": (0, 16),
}


def shipped_tuning() -> Tuning:
    """Return the numbers of ``configs/hardware/cpu.yaml``."""
    text = (data_folder("configs") / "hardware" / "cpu.yaml").read_text()
    return _parse(yaml.safe_load(text))


def tuning_path(level: str) -> Path:
    """Return where the numbers of this machine's CPU and an instruction-set level are written.

    Raises:
        ConfigError: there is no cache folder.
    """
    digest = hashlib.sha256(cpu_name().encode()).hexdigest()[:8]
    return cache_folder() / "tuning" / f"{level}-{digest}.yaml"


def load_tuning(level: str) -> Tuning:
    """Return what ``chunkllama tune`` measured on this machine, else the shipped numbers.

    A file that cannot be used is named in a warning; the shipped numbers then stand in.
    """
    try:
        path = tuning_path(level)
        text = path.read_bytes()
    except (OSError, ConfigError):
        return shipped_tuning()
    try:
        tuning = _parse(yaml.safe_load(text.decode()))
    except (ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        logger.warning("%s is not used (%s); run `chunkllama tune` or delete it", path, reason)
        return shipped_tuning()
    logger.info("CPU kernels: numbers measured by `chunkllama tune`, from %s", path)
    return tuning


def as_yaml(tuning: Tuning, level: str, threads: int) -> str:
    """Return the text of a table: the numbers, and what they were measured on."""
    few = asdict(tuning.few_rows)
    del few["rounds"]  # a setting, not a measurement
    table = {
        "vector_rows": tuning.vector_rows,
        "few_rows": few,
        "packing": asdict(tuning.packing),
    }
    head = f"# Written by `chunkllama tune` for {cpu_name()}, level {level}, {threads} threads.\n"
    return head + yaml.safe_dump(table, sort_keys=False)


def save_tuning(tuning: Tuning, level: str, threads: int) -> Path:
    """Write a table where ``load_tuning`` reads it, and return its path.

    Raises:
        ConfigError: the folder cannot be written.
    """
    path = tuning_path(level)
    temporary = path.with_suffix(".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(as_yaml(tuning, level, threads))
        temporary.replace(path)
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}") from error
    return path


def _parse(table: Mapping[str, Any]) -> Tuning:
    """Check every number; ValueError names the first that is wrong."""
    few: dict[str, Any] = {
        name: _checked("few_rows", value) for name, value in table["few_rows"].items()
    }
    packing: dict[str, Any] = {
        name: _checked(name, value) for name, value in table["packing"].items()
    }
    packing["split_private"] = bool(packing["split_private"])
    return Tuning(
        _checked("vector_rows", table["vector_rows"]), FewRows(**few), PackingNumbers(**packing)
    )


def _checked(name: str, value: object) -> int:
    if name not in _RANGES:
        raise ValueError(f"{name} is unknown")
    low, high = _RANGES[name]
    if not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name}: {value!r} is not an integer from {low} to {high}")
    return int(value)
