"""Rotary embedding parameters from config.json, in both spellings of transformers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

from chunkllama.model_spec import RopeSpec, RopeType
from chunkllama.models.config_file import ConfigFile

_TYPES: Final[dict[str, RopeType]] = {
    **{"default": "default", "linear": "linear", "dynamic": "dynamic", "llama3": "llama3"},
    **{"yarn": "yarn", "longrope": "longrope", "su": "longrope"},
}
_REQUIRED: Final = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "longrope": ("short_factor", "long_factor"),
}


def read_rope(
    config: ConfigFile,
    head_dim: int,
    *,
    interleaved: bool = False,
    is_partial: bool = False,
    alpha_stretches_base: bool = False,
) -> RopeSpec:
    """``rope_parameters`` (transformers 5), or the older ``rope_scaling`` and ``rope_theta``.

    With ``is_partial`` (Phi-3) a ``partial_rotary_factor`` counts, which transformers ignores for
    other families, and the type "yarn" of its first files is longrope. With
    ``alpha_stretches_base`` the type "dynamic" with an ``alpha`` is the default one with a larger
    base, alike for all lengths (HunYuan).
    """
    # As transformers: the older name counts where a file has both.
    raw = _object(config, config.get("rope_scaling") or config.get("rope_parameters") or {})
    kind = raw.get("rope_type") or raw.get("type")
    if not is_partial:
        raw = {**raw, "partial_rotary_factor": 1.0}
    elif kind == "yarn":
        raw = {**raw, "rope_type": "longrope"}
    if not (alpha_stretches_base and kind == "dynamic" and raw.get("alpha")):
        return _parse(config, raw, head_dim, interleaved=interleaved)
    alpha = raw["alpha"]
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < 1e9:
        raise config.error(f"alpha of rope_parameters must be a positive number, got {alpha!r}")
    rope = _parse(config, {**raw, "rope_type": "default"}, head_dim, interleaved=interleaved)
    return replace(rope, theta=rope.theta * alpha ** (head_dim / max(head_dim - 2, 1)))


def read_ropes_by_type(
    config: ConfigFile, head_dim: int, *, local_theta: float
) -> tuple[RopeSpec, RopeSpec]:
    """The ropes of full and of sliding attention. In older files ``rope_theta`` and
    ``rope_scaling`` are of the former alone, and the base of the latter is ``local_theta``.
    """
    # As transformers: no other name than rope_type, and nothing beside the parameters by kind.
    raw = _object(config, config.get("rope_parameters") or {})
    full = _object(config, raw.get("full_attention") or {"rope_type": "default"})
    sliding = _object(config, raw.get("sliding_attention") or {})
    full = {**full, **_object(config, config.get("rope_scaling") or {})}
    local_theta = sliding.get("rope_theta") or local_theta
    whole = {"partial_rotary_factor": 1.0}
    return (
        _parse(config, {**full, **whole}, head_dim),
        _parse(config, {**sliding, **whole, "rope_theta": local_theta}, head_dim),
    )


def _object(config: ConfigFile, raw: Any) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise config.error(f"rope_parameters must be an object, got {raw!r}")
    return raw


def _parse(
    config: ConfigFile, raw: dict[str, Any], head_dim: int, *, interleaved: bool = False
) -> RopeSpec:
    max_position = config.positive("max_position_embeddings", 2048)
    name = raw.get("rope_type") or raw.get("type") or "default"
    if name not in _TYPES:
        raise config.error(f"rope_type {name!r} is not supported; supported: {', '.join(_TYPES)}")
    kind = _TYPES[name]
    for key in _REQUIRED.get(kind, ()):
        if key not in raw:
            raise config.error(f"rope_type {name} needs {key}")
    name_of_original = "original_max_position_embeddings"
    stated = config.get(name_of_original) or raw.get(name_of_original) or max_position
    if not isinstance(stated, int | float) or not 0 < stated < 2**31:
        raise config.error(f"{name_of_original} must be a positive integer, got {stated!r:.60}")
    original = int(stated)
    if kind == "dynamic":  # transformers stretches from the stated length, whichever was first
        original = max_position
    factor = raw.get("factor")
    if factor is None:
        factor = max_position / original if kind in ("yarn", "longrope") else 1.0
    rotary_dim = _rotary_dim(config, raw, head_dim)
    attention_factor = raw.get("attention_factor")
    return RopeSpec(
        type=kind,
        theta=_theta(config, raw),
        rotary_dim=0 if rotary_dim == head_dim else rotary_dim,
        interleaved=interleaved,
        factor=float(factor),
        original_max_position=original,
        low_freq_factor=float(raw.get("low_freq_factor", 1.0)),
        high_freq_factor=float(raw.get("high_freq_factor", 4.0)),
        attention_factor=None if attention_factor is None else float(attention_factor),
        beta_fast=float(raw.get("beta_fast") or 32),
        beta_slow=float(raw.get("beta_slow") or 1),
        mscale=raw.get("mscale"),
        mscale_all_dim=raw.get("mscale_all_dim"),
        truncate=bool(raw.get("truncate", True)),
        short_factor=_factors(config, raw, "short_factor", rotary_dim, kind),
        long_factor=_factors(config, raw, "long_factor", rotary_dim, kind),
    )


def _theta(config: ConfigFile, raw: dict[str, Any]) -> float:
    given = raw.get("rope_theta")
    return config.number("rope_theta", 10000.0) if given is None else float(given)


def _rotary_dim(config: ConfigFile, raw: dict[str, Any], head_dim: int) -> int:
    share = raw.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    share = 1.0 if share is None else share
    if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0 < share <= 1:
        raise config.error(f"partial_rotary_factor must be above 0 and at most 1, got {share!r}")
    rotary_dim = int(head_dim * share)
    if rotary_dim < 2 or rotary_dim % 2:
        raise config.error(
            f"partial_rotary_factor {share} of head_dim {head_dim} is {rotary_dim} dimensions; "
            "rotary embedding needs pairs"
        )
    return rotary_dim


def _factors(
    config: ConfigFile, raw: dict[str, Any], key: str, rotary_dim: int, kind: RopeType
) -> tuple[float, ...]:
    if kind != "longrope":
        return ()
    values = raw[key]
    is_list = isinstance(values, list) and all(
        isinstance(x, (int, float)) and not isinstance(x, bool) and x > 0 for x in values
    )
    if not is_list or len(values) != rotary_dim // 2:
        raise config.error(f"{key} must be a list of {rotary_dim // 2} positive numbers")
    return tuple(float(x) for x in values)
