"""The splitters of byte-level GGUF tokenizers: the ids of the tokenizers whose names they bear.

The originals stand here as their publishers' tokenizer.json have them; vocabularies are trained on
the random texts, so that words are cut wherever a splitter lets them be joined.
"""

from __future__ import annotations

import functools
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from random_texts import random_texts
from tokenizers import Regex
from tokenizers.normalizers import NFC
from tokenizers.pre_tokenizers import ByteLevel, Digits, Punctuation, Sequence, Split

from chunkllama.models.loading.gguf_pretokenizers import PRE_TOKENIZERS
from chunkllama.models.loading.gguf_tokenizer import tokenizer_files

BYTES = ByteLevel(add_prefix_space=False, use_regex=False)
GPT2 = ByteLevel(add_prefix_space=False, use_regex=True)


def split(*patterns: str) -> Sequence:
    return Sequence([*(Split(Regex(p), "isolated") for p in patterns), BYTES])


LLAMA3 = split(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2 = split(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = split(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GPT4O = split(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
DEEPSEEK_CODER = Sequence(
    [
        Split(Regex("[\r\n]"), "isolated"),
        Split(Regex(r"\s?\p{L}+"), "isolated"),
        Split(Regex(r"\s?\p{P}+"), "isolated"),
        Split(Regex("[一-龥ࠀ-一가-\ud7ff]+"), "isolated"),
        Digits(individual_digits=True),
        BYTES,
    ]
)
DEEPSEEK_V3 = split(
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
)
FALCON = Sequence(
    [
        Punctuation("contiguous"),
        GPT2,
        Digits(individual_digits=False),
        Split(Regex("[0-9][0-9][0-9]"), "isolated"),
    ]
)
SINGLE_DIGITS = Sequence([Digits(individual_digits=True), GPT2])
BLOOM = split(r" ?[^(\s|.,!?…。，、।۔،)]+")

# Name in the file -> (its splitter, texts are normalised, whole words first).
ORIGINALS: dict[str, tuple[Any, bool, bool]] = {
    "llama-bpe": (LLAMA3, False, True),
    "llama3": (LLAMA3, False, True),
    "dbrx": (LLAMA3, False, False),
    "glm4": (LLAMA3, False, False),
    "qwen2": (QWEN2, True, False),
    "deepseek-r1-qwen": (QWEN2, False, False),
    "tekken": (TEKKEN, False, True),
    "gpt-4o": (GPT4O, False, False),
    "deepseek-coder": (DEEPSEEK_CODER, False, False),
    "deepseek-v3": (DEEPSEEK_V3, False, False),
    "falcon": (FALCON, False, False),
    "gpt-2": (GPT2, False, False),
    "mpt": (GPT2, True, False),
    "smollm": (SINGLE_DIGITS, False, False),
    "starcoder": (SINGLE_DIGITS, False, False),
    "refact": (SINGLE_DIGITS, False, False),
    "command-r": (SINGLE_DIGITS, True, False),
    "bloom": (BLOOM, False, False),
}


@functools.cache
def texts(count: int) -> tuple[str, ...]:
    return tuple(random_texts(count, seed=11))


def differing(name: str, count: int) -> list[str]:
    splitter, is_nfc, ignore_merges = ORIGINALS[name]
    original = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=ignore_merges))
    original.pre_tokenizer = splitter
    if is_nfc:
        original.normalizer = NFC()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=3000, initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    original.train_from_iterator(texts(count), trainer)
    model = json.loads(original.to_str())["model"]
    tokenizer = built(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": name,
            "tokenizer.ggml.tokens": sorted(model["vocab"], key=model["vocab"].__getitem__),
            "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        }
    )
    return [
        text
        for text in texts(count)
        if tokenizer.encode(text).ids != original.encode(text).ids
        or tokenizer.decode(original.encode(text).ids) != original_text(text, is_nfc)
    ]


def original_text(text: str, is_nfc: bool) -> str:
    return NFC().normalize_str(text) if is_nfc else text


def built(metadata: dict[str, Any]) -> tokenizers.Tokenizer:
    files = tokenizer_files(Path("m.gguf"), metadata)
    return tokenizers.Tokenizer.from_str(json.dumps(files["tokenizer.json"]))


@pytest.mark.parametrize("name", ORIGINALS)
def test_ids_of_the_tokenizer_of_that_name(name: str) -> None:
    assert differing(name, 400) == []


@pytest.mark.nightly
@pytest.mark.parametrize("name", ORIGINALS)
def test_ids_of_two_thousand_texts(name: str) -> None:
    assert differing(name, 2000) == []


SPLITS = {
    # Han, digits and ASCII are words of their own: the published class of punctuation holds the
    # ASCII letters.
    ("deepseek-llm", "Hi 你好 abcЖ 1234,\n x"): (
        ["Hi", "Ġ", "你好", "Ġabc", "Ж", "Ġ", "1", "2", "3", "4", ",", "Ċ", "Ġx"]
    ),
    ("viking", "abc 123, d"): ["abc", "Ġ", "1", "2", "3", ",", "Ġd"],
    ("default", "don't 12345 (x)"): ["don", "'", "t", "Ġ", "123", "45", "Ġ", "(", "x", ")"],
    ("qwen35", "x\u0301y 12"): ["x\u0301y", "Ġ", "1", "2"],
    ("seed-coder", "a+\nb 12"): ["a", "+", "Ċ", "b", "Ġ", "1", "2"],
    ("superbpe", "1234567"): ["1", "234", "567"],
    ("minicpm5", "ab 12345"): ["ab", "Ġ", "123", "45"],
    ("tiny_aya", "12345"): ["12", "345"],
}


@pytest.mark.parametrize(("name", "text"), SPLITS)
def test_words(name: str, text: str) -> None:
    tokenizer = built(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": name,
            "tokenizer.ggml.tokens": sorted(ByteLevel.alphabet()),
            "tokenizer.ggml.merges": [],
        }
    )
    words = [word for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]
    spelled = [BYTES.pre_tokenize_str(word)[0][0] for word in _unspelled(SPLITS[name, text])]
    assert words == spelled


def _unspelled(words: list[str]) -> list[str]:
    return [word.replace("Ġ", " ").replace("Ċ", "\n") for word in words]


def test_every_name_makes_a_tokenizer_that_keeps_the_text() -> None:
    for name, entry in PRE_TOKENIZERS.items():
        tokenizer = built(
            {
                "tokenizer.ggml.model": "gpt2",
                "tokenizer.ggml.pre": name,
                "tokenizer.ggml.tokens": sorted(ByteLevel.alphabet()),
                "tokenizer.ggml.merges": [],
            }
        )
        for text in texts(60):
            expected = original_text(text, entry.is_nfc)
            assert tokenizer.decode(tokenizer.encode(text).ids) == expected, name


def test_a_missing_splitter_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": sorted(ByteLevel.alphabet()),
        "tokenizer.ggml.merges": [],
    }
    with caplog.at_level(logging.WARNING):
        built({**metadata, "tokenizer.ggml.pre": "default"})
    assert not caplog.text
    with caplog.at_level(logging.WARNING):
        built(metadata)
    assert "m.gguf: no tokenizer.ggml.pre" in caplog.text


@pytest.mark.parametrize(
    ("name", "key", "expected"),
    [
        ("llama-bpe", None, True),
        ("tekken", None, True),
        ("qwen2", None, False),
        ("llama-bpe", False, False),
        ("qwen2", True, True),
    ],
)
def test_bos_comes_first_as_the_file_or_else_the_name_says(
    name: str, key: bool | None, expected: bool
) -> None:
    tokens = sorted(ByteLevel.alphabet())
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": name,
        "tokenizer.ggml.tokens": [*tokens, "<bos>"],
        "tokenizer.ggml.merges": [],
        "tokenizer.ggml.token_type": [*[1] * len(tokens), 3],
        "tokenizer.ggml.bos_token_id": len(tokens),
    }
    if key is not None:
        metadata["tokenizer.ggml.add_bos_token"] = key
    assert (built(metadata).encode("a").ids[0] == len(tokens)) is expected
