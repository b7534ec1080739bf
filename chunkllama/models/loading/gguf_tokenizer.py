"""The tokenizer of a GGUF file as tokenizer.json and tokenizer_config.json, as plain JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from chunkllama.errors import ConfigError

_CONTROL, _USER_DEFINED = 3, 4  # llama.cpp's token types

_LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
_LLAMA3_SPLIT = {
    "type": "Sequence",
    "pretokenizers": [
        {
            "type": "Split",
            "pattern": {"Regex": _LLAMA3_PATTERN},
            "behavior": "Isolated",
            "invert": False,
        },
        {**_BYTE_LEVEL, "use_regex": False},
    ],
}
_DIGITS_SPLIT = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {**_BYTE_LEVEL, "use_regex": True},
    ],
}
_PLAIN_SPLIT = {**_BYTE_LEVEL, "use_regex": True}
_PRE_TOKENIZERS: dict[str, dict[str, Any]] = {
    "smollm": _DIGITS_SPLIT,
    "llama-bpe": _LLAMA3_SPLIT,
    "llama3": _LLAMA3_SPLIT,
    "llama-v3": _LLAMA3_SPLIT,
    "gpt-2": _PLAIN_SPLIT,
    "default": _PLAIN_SPLIT,
}


def tokenizer_files(path: Path, metadata: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """File name to JSON content, from the GGUF's metadata.

    Raises:
        ConfigError: the tokenizer is missing or of an unknown kind.
    """
    kind = metadata.get("tokenizer.ggml.model")
    tokens: list[str] = metadata.get("tokenizer.ggml.tokens") or []
    if not tokens:
        raise ConfigError(f"{path}: the GGUF holds no tokenizer")
    if kind == "gpt2":
        pipeline = _byte_level_bpe(path, metadata, tokens)
    elif kind == "llama":
        pipeline = _sentencepiece_bpe(metadata, tokens)
    else:
        raise ConfigError(f"{path}: GGUF tokenizer {kind!r}; supported: gpt2, llama")
    special = {
        name: tokens[token]
        for name in ("bos", "eos", "unk", "pad")
        if (token := metadata.get(f"tokenizer.ggml.{_GGUF_NAMES.get(name, name)}_token_id"))
        is not None
        and token < len(tokens)
    }
    add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", kind == "llama"))
    if add_bos and "bos" in special:
        pipeline["post_processor"] = _prepend(special["bos"], tokens.index(special["bos"]))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": add_bos,
        "model_max_length": metadata.get("llama.context_length"),
        **{f"{name}_token": token for name, token in special.items()},
    }
    if template := metadata.get("tokenizer.chat_template"):
        config["chat_template"] = template
    return {
        "tokenizer.json": {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": _added_tokens(metadata, tokens),
            "normalizer": None,
            "post_processor": None,
            **pipeline,
        },
        "tokenizer_config.json": config,
    }


_GGUF_NAMES = {"unk": "unknown", "pad": "padding"}


def _added_tokens(metadata: dict[str, Any], tokens: list[str]) -> list[dict[str, Any]]:
    types: list[int] = metadata.get("tokenizer.ggml.token_type") or []
    return [
        {
            "id": index,
            "content": tokens[index],
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": kind == _CONTROL,
        }
        for index, kind in enumerate(types)
        if kind in (_CONTROL, _USER_DEFINED)
    ]


def _byte_level_bpe(path: Path, metadata: dict[str, Any], tokens: list[str]) -> dict[str, Any]:
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in _PRE_TOKENIZERS:
        raise ConfigError(
            f"{path}: GGUF pre-tokenizer {pre!r}; supported: {', '.join(_PRE_TOKENIZERS)}"
        )
    splitter = _PRE_TOKENIZERS[pre]
    return {
        "pre_tokenizer": splitter,
        "decoder": {**_BYTE_LEVEL, "use_regex": True},
        "model": {
            **_bpe(tokens, [list(_pair(merge)) for merge in metadata["tokenizer.ggml.merges"]]),
            # Llama 3 encodes a whole word that is a token as that token, before any merge.
            "ignore_merges": splitter is _LLAMA3_SPLIT,
        },
    }


def _pair(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _sentencepiece_bpe(metadata: dict[str, Any], tokens: list[str]) -> dict[str, Any]:
    """SentencePiece BPE as Llama 1 and 2 use it: spaces as U+2581, unknown characters as bytes."""
    scores: list[float] = metadata.get("tokenizer.ggml.scores") or [0.0] * len(tokens)
    prefix = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", 0)
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    return {
        "normalizer": {
            "type": "Sequence",
            "normalizers": [*([{"type": "Prepend", "prepend": "▁"}] if prefix else []), replace],
        },
        "pre_tokenizer": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                *strip,
            ],
        },
        "model": {
            **_bpe(tokens, _merges_by_score(tokens, scores)),
            "unk_token": tokens[unknown],
            "fuse_unk": True,
            "byte_fallback": True,
        },
    }


def _merges_by_score(tokens: list[str], scores: list[float]) -> list[list[str]]:
    """Every way to join two tokens to a third, the best-scored result first."""
    ids = {token: index for index, token in enumerate(tokens)}
    merges: list[tuple[float, int, int, int, str, str]] = []
    for token, score in zip(tokens, scores, strict=True):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                merges.append((-score, ids[token], ids[left], ids[right], left, right))
    return [[left, right] for *_, left, right in sorted(merges)]


def _bpe(tokens: list[str], merges: list[list[str]]) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "vocab": {token: index for index, token in enumerate(tokens)},
        "merges": merges,
    }


def _prepend(token: str, token_id: int) -> dict[str, Any]:
    first = {"SpecialToken": {"id": token, "type_id": 0}}
    return {
        "type": "TemplateProcessing",
        "single": [first, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [
            first,
            {"Sequence": {"id": "A", "type_id": 0}},
            first,
            {"Sequence": {"id": "B", "type_id": 1}},
        ],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }
