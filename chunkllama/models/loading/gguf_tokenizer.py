"""The tokenizer of a GGUF file as tokenizer.json and tokenizer_config.json, as plain JSON."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

from chunkllama.errors import ConfigError
from chunkllama.logger import init_logger
from chunkllama.models.loading.gguf_pretokenizers import PRE_TOKENIZERS, PreTokenizer
from chunkllama.vocabulary import check_pieces

logger = init_logger(__name__)

_CONTROL, _USER_DEFINED = 3, 4  # llama.cpp's token types

_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
_GGUF_NAMES = {"unk": "unknown", "pad": "padding"}
# Texts of the tokens that llama.cpp takes for ends of an answer without a key that names them: of
# an answer, and of a file where a model completes code.
_ENDS: Final = frozenset(
    {
        *("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>"),
        *("<|end_of_text|>", "<EOT>", "_<EOT>", "<｜end▁of▁sentence｜>", "<end_of_utterance>"),
        *("<|fim_pad|>", "<fim-pad>", "<fim_pad>", "<PAD>", "<|fim_repo|>", "<|repo_name|>"),
        *("<fim-repo>", "<REPO>", "<reponame>", "<|file_sep|>"),
    }
)
# As llama.cpp: the name alone tells these models, whose control tokens swallow white space.
_PHI3: Final = re.compile("phi[- ]?3", re.IGNORECASE)
_KEEPS_SPACE: Final = ("<unk>", "<s>", "<|endoftext|>")


def tokenizer_files(path: Path, metadata: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """File name to JSON content, from the GGUF's metadata.

    Raises:
        ConfigError: the tokenizer is missing or of an unknown kind.
    """
    kind = metadata.get("tokenizer.ggml.model")
    tokens: list[str] = metadata.get("tokenizer.ggml.tokens") or []
    if not tokens:
        raise ConfigError(f"{path}: the GGUF holds no tokenizer")
    check_pieces(tokens, path)
    add_bos = kind == "llama"
    if kind == "gpt2":
        splitter = _pre_tokenizer(path, metadata)
        pipeline, add_bos = _byte_level_bpe(splitter, metadata, tokens), splitter.add_bos
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
    add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", add_bos))
    if add_bos and "bos" in special:
        pipeline["post_processor"] = _prepend(special["bos"], tokens.index(special["bos"]))
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "add_bos_token": add_bos,
        "model_max_length": metadata.get(f"{metadata.get('general.architecture')}.context_length"),
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


def end_token_ids(metadata: dict[str, Any]) -> list[int]:
    """Ids of the tokens that end an answer, ascending: those that keys name, and control and
    user-defined tokens of the texts by which llama.cpp knows them.
    """
    named = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    tokens: list[str] = metadata.get("tokenizer.ggml.tokens") or []
    types: list[int] = metadata.get("tokenizer.ggml.token_type") or []
    by_text = {
        index
        for index, (token, kind) in enumerate(zip(tokens, types, strict=False))
        if token in _ENDS and kind in (_CONTROL, _USER_DEFINED)
    }
    return sorted(by_text.union(token for token in named if token is not None))


def _added_tokens(metadata: dict[str, Any], tokens: list[str]) -> list[dict[str, Any]]:
    types: list[int] = metadata.get("tokenizer.ggml.token_type") or []
    swallows = _PHI3.search(str(metadata.get("general.name", ""))) is not None
    return [
        {
            "id": index,
            "content": tokens[index],
            "single_word": False,
            "lstrip": False,
            "rstrip": swallows and tokens[index] not in _KEEPS_SPACE,
            "normalized": False,
            "special": kind == _CONTROL or tokens[index] in _ENDS,
        }
        for index, kind in enumerate(types)
        if kind in (_CONTROL, _USER_DEFINED)
    ]


def _pre_tokenizer(path: Path, metadata: dict[str, Any]) -> PreTokenizer:
    pre = metadata.get("tokenizer.ggml.pre")
    if pre is None:
        logger.warning(
            "%s: no tokenizer.ggml.pre says how texts are split into words; llama.cpp's default is "
            "used, which may lower the quality of answers; convert the model again",
            path,
        )
        pre = "default"
    if pre not in PRE_TOKENIZERS:
        raise ConfigError(
            f"{path}: GGUF pre-tokenizer {pre!r}; supported: {', '.join(PRE_TOKENIZERS)}"
        )
    return PRE_TOKENIZERS[pre]


def _byte_level_bpe(
    splitter: PreTokenizer, metadata: dict[str, Any], tokens: list[str]
) -> dict[str, Any]:
    return {
        "normalizer": {"type": "NFC"} if splitter.is_nfc else None,
        "pre_tokenizer": splitter.steps,
        "decoder": {**_BYTE_LEVEL, "use_regex": True},
        "model": {
            **_bpe(tokens, [list(_pair(merge)) for merge in metadata["tokenizer.ggml.merges"]]),
            "ignore_merges": splitter.ignore_merges,
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
