"""Check the numbers that a model folder's JSON files bring, before anything computes with them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from chunkllama.errors import ConfigError, InvalidRequestError
from chunkllama.logger import init_logger
from chunkllama.model_spec import ModelSpec
from chunkllama.models.config_file import ConfigFile
from chunkllama.sampling_params import SamplingParams

logger = init_logger(__name__)

_INTEGERS = ("top_k",)
_NUMBERS = ("temperature", "top_p", "min_p", "repetition_penalty")
_MAX_POSITIONS = 1 << 27
_MAX_SIZE = 1 << 24


def default_sampling(generation: Mapping[str, Any], path: Path) -> dict[str, float]:
    """The sampling defaults of generation_config.json that a request can use.

    A value of a wrong type or out of range is left out with a warning that names it: the model is
    usable without, and a request that omits the field must not fail because of it.
    """
    defaults: dict[str, float] = {}
    for name in (*_NUMBERS, *_INTEGERS):
        value = generation.get(name)
        if value is None:
            continue
        problem = _sampling_problem(name, value)
        if problem is None:
            defaults[name] = int(value) if name in _INTEGERS else float(value)
        else:
            logger.warning("%s: %s; the default of the server applies", path, problem)
    return defaults


def _sampling_problem(name: str, value: Any) -> str | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not -(2**31) < value < 2**31:
        return f"{name} must be a finite number, got {str(value)!r:.60}"
    if name in _INTEGERS and value != int(value):
        return f"{name} must be an integer, got {value}"
    values: dict[str, Any] = {name: int(value) if name in _INTEGERS else float(value)}
    try:
        SamplingParams(**values)
    except InvalidRequestError as error:
        return error.message
    return None


def fork_tokens(fork: Any, child: Any, config: ConfigFile) -> tuple[int, int] | None:
    """The tokens that begin a branch; None for a model that names neither.

    Raises:
        ConfigError: only one of them is named, or one is no token of the vocabulary.
    """
    if fork is None and child is None:
        return None
    vocab_size = config.positive("vocab_size")
    for key, value in (("fork_token_id", fork), ("child_token_id", child)):
        is_id = isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocab_size
        if not is_id:
            raise config.error(f"{key} must be a token id below {vocab_size}, got {value!r:.60}")
    return fork, child


def usable_eos_ids(ids: set[int], vocab_size: int, path: Path) -> tuple[int, ...]:
    """The ids inside the vocabulary, ascending; others are left out with a warning."""
    outside = sorted(i for i in ids if i >= vocab_size)
    if outside:
        logger.warning(
            "%s: eos_token_id %s is outside the vocabulary of %d and never ends an answer",
            path.parent,
            outside[:5],
            vocab_size,
        )
    return tuple(sorted(ids.difference(outside)))


def check_numbers(spec: ModelSpec, path: Path) -> None:
    """Refuse numbers no model can be computed with.

    Raises:
        ConfigError: one line naming the key.
    """
    values: list[tuple[str, object, float, float]] = [
        ("rms_norm_eps", spec.rms_norm_eps, 0.0, 1.0),
        # A prompt and a token after it.
        ("max_position_embeddings", spec.max_position, 2, _MAX_POSITIONS),
        ("hidden_size", spec.hidden_size, 1, _MAX_SIZE),
        ("intermediate_size", spec.intermediate_size, 1, _MAX_SIZE),
        ("head_dim", spec.head_dim, 2, 1024),
        ("vocab_size", spec.vocab_size, 1, _MAX_SIZE),
    ]
    for rope in spec.ropes:
        factors = [*rope.short_factor, *rope.long_factor]
        values += [
            ("rope_theta", rope.theta, 1.0, 1e15),
            ("rope factor", rope.factor, 1e-3, 1e6),
            ("original_max_position_embeddings", rope.original_max_position, 0, _MAX_POSITIONS),
            ("low_freq_factor", rope.low_freq_factor, 1e-6, 1e6),
            ("high_freq_factor", rope.high_freq_factor, 1e-6, 1e6),
            ("beta_fast", rope.beta_fast, 1e-6, 1e6),
            ("beta_slow", rope.beta_slow, 1e-6, 1e6),
            ("attention_factor", rope.attention_factor, 1e-6, 1e6),
            ("mscale", rope.mscale, 0.0, 1e6),
            ("mscale_all_dim", rope.mscale_all_dim, 0.0, 1e6),
            *(("a factor of longrope", factor, 1e-6, 1e6) for factor in factors),
        ]
        if rope.type in ("llama3", "yarn") and rope.original_max_position == 0:
            raise ConfigError(f"{path}: original_max_position_embeddings must not be 0")
        if rope.type in ("yarn", "dynamic") and rope.theta == 1.0:
            raise ConfigError(f"{path}: rope_theta must be above 1 for rope_type {rope.type}")
        if rope.type == "llama3" and rope.low_freq_factor == rope.high_freq_factor:
            raise ConfigError(f"{path}: low_freq_factor and high_freq_factor must differ")
    for name, value, low, high in values:
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{path}: {name} must be a number, got {value!r:.60}")
        if not low <= value <= high:  # NaN compares false
            raise ConfigError(f"{path}: {name} must be in [{low:g}, {high:g}], got {value!r:.40}")
