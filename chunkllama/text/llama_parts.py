"""Build the parts of a Llama 1/2 tokenizer that transformers builds regardless of the file."""

from __future__ import annotations

import json
from typing import Any

import tokenizers
from tokenizers import decoders, models, pre_tokenizers

SPIECE_SPACE = "\u2581"


def is_byte_level(document: dict[str, Any]) -> bool:
    """Whether a tokenizer.json spells bytes in the GPT-2 alphabet."""
    return '"ByteLevel"' in json.dumps([document.get("pre_tokenizer"), document.get("decoder")])


def as_llama_sentencepiece(document: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer.json with the parts transformers' LlamaTokenizer builds itself."""
    parts = tokenizers.Tokenizer(models.BPE())
    set_llama_parts(parts, config)
    built = json.loads(parts.to_str())
    model = {**document["model"], "fuse_unk": True, "byte_fallback": True, "dropout": None}
    return {
        **document,
        "model": model,
        "normalizer": None,
        "pre_tokenizer": built["pre_tokenizer"],
        "decoder": built["decoder"],
    }


def set_llama_parts(backend: tokenizers.Tokenizer, config: dict[str, Any]) -> None:
    """Pre-tokenizer and decoder of Llama 1/2: a space before the text's first word, byte
    fallback."""
    prefix_space = config.get("add_prefix_space") is not False
    scheme = "never" if not prefix_space else ("always" if config.get("legacy") else "first")
    backend.pre_tokenizer = pre_tokenizers.Metaspace(
        replacement=SPIECE_SPACE, prepend_scheme=scheme, split=False
    )
    backend.decoder = space_decoder(strips=prefix_space)


def space_decoder(*, strips: bool) -> Any:
    """Spaces from U+2581 and bytes from their tokens; ``strips``: without the first space."""
    steps: list[Any] = [
        decoders.Replace(SPIECE_SPACE, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if strips:
        steps.append(decoders.Strip(content=" ", left=1))
    return decoders.Sequence(steps)
