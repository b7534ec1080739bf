"""Tokenizers of GGUF files: the same ids as the tokenizer whose tables the file holds."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

from chunkllama.errors import ConfigError
from chunkllama.models.loading.gguf_tokenizer import end_token_ids, tokenizer_files

TEXT = [
    "The quick brown fox jumps over the lazy dog, 1234 times.",
    "  Two spaces first; then\ttabs\nand newlines \n\n",
    "naïve café, 中文 and हिन्दी, emoji 🙂🙃 and \x00 bytes",
    "def f(x):\n    return x + 12345",
    "",
    " ",
    "don't won't I'LL",
]
CORPUS = [*TEXT, *(f"word{i} is the number {i * 37} of them all" for i in range(300))]


def build(metadata: dict[str, Any]) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    files = tokenizer_files(Path("m.gguf"), metadata)
    return (
        tokenizers.Tokenizer.from_str(json.dumps(files["tokenizer.json"])),
        files["tokenizer_config.json"],
    )


@pytest.fixture(scope="module")
def spm() -> sentencepiece.SentencePieceProcessor:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        model_type="bpe",
        vocab_size=480,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@pytest.mark.parametrize("text", TEXT, ids=repr)
def test_sentencepiece_ids(text: str, spm: sentencepiece.SentencePieceProcessor) -> None:
    size = spm.vocab_size()
    tokenizer, config = build(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": [spm.id_to_piece(i) for i in range(size)],
            "tokenizer.ggml.scores": [spm.get_score(i) for i in range(size)],
            "tokenizer.ggml.token_type": [
                3 if spm.is_control(i) else 2 if spm.is_unknown(i) else 6 if spm.is_byte(i) else 1
                for i in range(size)
            ],
            "tokenizer.ggml.bos_token_id": spm.bos_id(),
            "tokenizer.ggml.eos_token_id": spm.eos_id(),
            "tokenizer.ggml.unknown_token_id": spm.unk_id(),
        }
    )
    expected = spm.encode(text)
    assert tokenizer.encode(text, add_special_tokens=False).ids == expected
    assert tokenizer.encode(text).ids == [spm.bos_id(), *expected]
    assert tokenizer.decode(expected) == spm.decode(expected)
    assert (config["bos_token"], config["eos_token"]) == ("<s>", "</s>")


@pytest.mark.parametrize("pre", ["smollm", "gpt-2"])
def test_byte_level_ids(pre: str) -> None:
    original = tokenizers.Tokenizer(tokenizers.models.BPE())
    byte_level = ByteLevel(add_prefix_space=False)
    original.pre_tokenizer = (
        Sequence([Digits(individual_digits=True), byte_level]) if pre == "smollm" else byte_level
    )
    original.train_from_iterator(
        CORPUS,
        tokenizers.trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=["<|end|>"],
            initial_alphabet=ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    model = json.loads(original.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    tokenizer, config = build(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
            "tokenizer.ggml.token_type": [3, *[1] * (len(tokens) - 1)],
            "tokenizer.ggml.eos_token_id": 0,
            "tokenizer.chat_template": "{{ messages }}",
        }
    )
    for text in [*TEXT, "a<|end|>b"]:
        ids = tokenizer.encode(text).ids
        assert ids == original.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
    assert config["eos_token"] == "<|end|>"
    assert config["chat_template"] == "{{ messages }}"
    assert config["add_bos_token"] is False


def test_llama3_takes_whole_words_first() -> None:
    """A word that is a token is taken whole, though no merge leads to it; BOS comes first."""
    tokens = [*sorted(ByteLevel.alphabet()), "ab", "Ġabba", "<|begin_of_text|>"]
    tokenizer, _ = build(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "llama-bpe",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.merges": ["a b"],
            "tokenizer.ggml.token_type": [*[1] * (len(tokens) - 1), 3],
            "tokenizer.ggml.bos_token_id": len(tokens) - 1,
            "tokenizer.ggml.add_bos_token": True,
        }
    )
    encoded = tokenizer.encode("ab abba1234")
    assert encoded.tokens == ["<|begin_of_text|>", "ab", "Ġabba", "1", "2", "3", "4"]


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({}, "no tokenizer"),
        ({"tokenizer.ggml.model": "bert", "tokenizer.ggml.tokens": ["a"]}, "'bert'"),
        (
            {
                "tokenizer.ggml.model": "gpt2",
                "tokenizer.ggml.tokens": ["a"],
                "tokenizer.ggml.pre": "martian",
            },
            "'martian'",
        ),
    ],
)
def test_unknown_kinds_are_refused(metadata: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        tokenizer_files(Path("m.gguf"), metadata)


PHI3_TOKENS = [
    "<unk>",
    "<s>",
    "</s>",
    "\u2581",
    "a",
    "<|endoftext|>",
    "<|end|>",
    "<|user|>",
    "_<EOT>",
]
PHI3: dict[str, Any] = {
    "general.name": "Phi-3-mini-4k-instruct",
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": PHI3_TOKENS,
    "tokenizer.ggml.token_type": [2, 3, 3, 1, 1, 3, 3, 4, 1],
    "tokenizer.ggml.eos_token_id": 2,
    "tokenizer.ggml.unknown_token_id": 0,
}


def test_tokens_end_an_answer_by_their_texts() -> None:
    """Control and user-defined tokens: a piece of text of this form is text."""
    assert end_token_ids(PHI3) == [2, 5, 6]
    types = [2, 3, 3, 1, 1, 4, 1, 4, 3]
    metadata = {**PHI3, "tokenizer.ggml.token_type": types, "tokenizer.ggml.eot_token_id": 7}
    assert end_token_ids(metadata) == [2, 5, 7, 8]
    added = tokenizer_files(Path("m.gguf"), metadata)["tokenizer.json"]["added_tokens"]
    assert {x["content"] for x in added if x["special"]} == {
        "<s>",
        "</s>",
        "<|endoftext|>",
        "_<EOT>",
    }


@pytest.mark.parametrize("name", ["Phi-3-mini-4k-instruct", "Phi 3.5 mini", "Phi-4-mini"])
def test_control_tokens_of_phi_3_swallow_white_space(name: str) -> None:
    tokenizer, _ = build({**PHI3, "general.name": name})
    texts = ("<|end|> a", "<|user|>\na", "<|endoftext|> a")
    ids = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    first = [[6, 3, 3, 4], [7, 3, 0, 4]] if name == "Phi-4-mini" else [[6, 3, 4], [7, 3, 4]]
    assert ids == [*first, [5, 3, 3, 4]]
