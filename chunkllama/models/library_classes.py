"""What is known of a decoder of transformers before the library is imported. No torch.

A start is refused at once for a class that the library lacks or that cannot run on this server's
attention; what these tables do not know, ``hf_model.py`` finds when it loads the model.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from functools import cache
from pathlib import Path
from typing import Final

from chunkllama.models.config_file import ConfigFile

_MAPPING: Final = "models/auto/modeling_auto.py"  # model_type and class of each model, as a literal
_INSTEAD: Final = "'chunkllama models list' names what runs"
_OTHER_STATE: Final = "its layers keep a state other than keys and values"
_OWN_ATTENTION: Final = "it computes attention in code of its own"
_REFUSED: Final = {
    "GptOssForCausalLM": "its attention has sinks",
    **dict.fromkeys(("BloomForCausalLM", "FalconForCausalLM", "MptForCausalLM"), _OWN_ATTENTION),
    **{
        f"{name}ForCausalLM": _OTHER_STATE
        for name in (
            *("Bamba", "FalconH1", "FalconMamba", "Jamba", "KimiLinear", "Lfm2", "Lfm2Moe"),
            *("Mamba", "Mamba2", "MiniMax", "NemotronH", "OlmoHybrid", "Qwen3Next", "Qwen3_5"),
            *("Qwen3_5Moe", "RecurrentGemma", "Rwkv", "Zamba", "Zamba2", "xLSTM"),
        )
    },
}
_STATEFUL_LAYERS: Final = {"conv", "linear_attention", "mamba", "mamba2", "recurrent"}


def check_library_class(name: str, config: ConfigFile) -> None:
    """Refuse a decoder that transformers does not know or that cannot run here.

    Raises:
        ConfigError: with the reason.
    """
    why = _REFUSED.get(name)
    types = config.get("layer_types")
    if (
        not why
        and isinstance(types, list)
        and (kinds := _STATEFUL_LAYERS.intersection(map(str, types)))
    ):
        why = f"{_OTHER_STATE} (layer_types: {', '.join(sorted(kinds))})"
    if why:
        raise config.error(f"{name} cannot run here: {why}; {_INSTEAD}")
    known = _mapping()
    kind = config.get("model_type")
    # The library chooses by the kind; a class may have another name there (EXAONE 3's).
    if not known or f'"{name if kind is None else kind}"' in known:
        return
    if config.get("auto_map"):
        why = "is defined by code of the model's folder (auto_map), which is not executed"
    else:
        why = "is unknown"
    version = importlib.metadata.version("transformers")
    missing = name if f'"{name}"' not in known else f"model_type {kind!r:.60}"
    raise config.error(f"{missing} {why}, and transformers {version} does not have it; {_INSTEAD}")


@cache
def _mapping() -> str:
    """The text that maps names to classes; "" where the library has it elsewhere."""
    found = importlib.util.find_spec("transformers")
    if found is None or found.origin is None:
        return ""
    try:
        text = (Path(found.origin).parent / _MAPPING).read_text()
    except OSError:
        return ""
    return text if '"LlamaForCausalLM"' in text else ""
