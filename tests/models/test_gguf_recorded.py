"""The ids that llama.cpp records for its vocabularies (models/ggml-vocab-*.gguf, .inp and .out).

recorded_vocabularies.json holds of each vocabulary the tokens that occur anywhere in the texts, and
their merges; ids count these tokens.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from chunkllama.models.loading.gguf_tokenizer import tokenizer_files

NAMES = (
    *("command-r", "deepseek-coder", "deepseek-llm", "falcon", "gpt-2", "llama-bpe", "mpt"),
    *("qwen2", "qwen35", "refact", "starcoder"),
)


@functools.cache
def recorded() -> dict[str, Any]:
    data: dict[str, Any] = json.loads(
        Path(__file__).with_name("recorded_vocabularies.json").read_text(encoding="utf-8")
    )
    return data


def test_every_recorded_vocabulary_is_compared() -> None:
    assert set(NAMES) == set(recorded()["vocabularies"])
    assert len(recorded()["texts"]) == 46


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_those_that_llama_cpp_records(name: str) -> None:
    vocabulary = recorded()["vocabularies"][name]
    tokens, types = vocabulary["tokens"], vocabulary["types"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": vocabulary["merges"],
        "tokenizer.ggml.token_type": [types.get(str(i), 1) for i in range(len(tokens))],
    }
    document = tokenizer_files(Path("m.gguf"), metadata)["tokenizer.json"]
    if name == "qwen35":  # llama.cpp does not normalise; transformers' Qwen 3.5 does
        document["normalizer"] = None
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(document))
    texts = vocabulary.get("texts", recorded()["texts"])
    for text, ids in zip(texts, vocabulary["ids"], strict=True):
        assert tokenizer.encode(text, add_special_tokens=False).ids == ids, text
