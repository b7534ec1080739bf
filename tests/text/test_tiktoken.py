"""tiktoken's ``tokenizer.model``, as Meta publishes Llama 3: the ids of its own algorithm."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
import regex
import tokenizers
from random_texts import random_texts
from tokenizers.pre_tokenizers import ByteLevel

from chunkllama.errors import ConfigError
from chunkllama.text.tokenizer import Tokenizer, load_tokenizer

PATTERN = regex.compile(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = random_texts(400, seed=5)


def trained_ranks() -> dict[bytes, int]:
    """Ranks of a byte-level BPE trained on the texts, single bytes first."""
    alphabet = {char: byte for byte, char in _alphabet().items()}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1500, initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    merges = json.loads(backend.to_str())["model"]["merges"]
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [bytes(alphabet[char] for char in left + right) for left, right in merges]
    return {token: rank for rank, token in enumerate(dict.fromkeys(tokens))}


def _alphabet() -> dict[int, str]:
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in kept]
    return {b: chr(b) for b in kept} | {b: chr(256 + i) for i, b in enumerate(rest)}


def encode(ranks: dict[bytes, int], text: str) -> list[int]:
    """tiktoken: whole words first, else join the pair of lowest rank until none is left."""
    ids: list[int] = []
    for word in PATTERN.findall(text):
        data = word.encode()
        parts = [data] if data in ranks else [data[i : i + 1] for i in range(len(data))]
        while len(parts) > 1:
            pairs = [parts[i] + parts[i + 1] for i in range(len(parts) - 1)]
            best = min(range(len(pairs)), key=lambda i: ranks.get(pairs[i], 1 << 30))
            if pairs[best] not in ranks:
                break
            parts[best : best + 2] = [pairs[best]]
        ids += [ranks[part] for part in parts]
    return ids


def write(folder: Path, ranks: dict[bytes, int]) -> None:
    lines = (f"{base64.b64encode(token).decode()} {rank}" for token, rank in ranks.items())
    (folder / "tokenizer.model").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def ranks() -> dict[bytes, int]:
    return trained_ranks()


@pytest.fixture
def tokenizer(ranks: dict[bytes, int], tmp_path: Path) -> Tokenizer:
    write(tmp_path, ranks)
    return load_tokenizer(tmp_path)


def test_ids_are_those_of_tiktoken(tokenizer: Tokenizer, ranks: dict[bytes, int]) -> None:
    for text in TEXTS:
        ids = encode(ranks, text)
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids) == text


def test_the_special_tokens_are_llama_3s(tokenizer: Tokenizer, ranks: dict[bytes, int]) -> None:
    base = len(ranks)
    for name, offset in {
        "<|begin_of_text|>": 0,
        "<|end_of_text|>": 1,
        "<|reserved_special_token_0|>": 2,
        "<|start_header_id|>": 6,
        "<|end_header_id|>": 7,
        "<|eom_id|>": 8,
        "<|eot_id|>": 9,
        "<|python_tag|>": 10,
        "<|reserved_special_token_247|>": 255,
    }.items():
        assert tokenizer.token_id(name) == base + offset, name
    assert tokenizer.vocab_size == base + 256
    assert tokenizer.encode("a", add_special_tokens=True)[0] == base
    assert tokenizer.bos_token_id == base
    assert tokenizer.eos_token_ids == (base + 1,)
    text = "<|eot_id|>x"
    assert tokenizer.encode(text, allow_special=True)[0] == base + 9
    assert tokenizer.special_ids.isdisjoint(tokenizer.encode(text))


def test_listed_special_tokens_replace_them(ranks: dict[bytes, int], tmp_path: Path) -> None:
    write(tmp_path, ranks)
    base = len(ranks)
    listed = {str(base): {"content": "<s>"}, str(base + 1): {"content": "</s>", "special": True}}
    config = {"added_tokens_decoder": listed, "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (base, (base + 1,))
    assert tokenizer.vocab_size == base + 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text.replace(" 7\n", " 9\n", 1), "rank 9 where 7"),
        (lambda text: text + "?? 99999999\n", "not base64"),
        (lambda text: text + "YWI=\n", "a token in base64 and its rank"),
        (lambda text: "\n".join(text.splitlines()[:100]) + "\n", "every single byte"),
        (lambda text: text + f"YQ== {len(text.splitlines())}\n", "must differ"),
    ],
)
def test_a_damaged_file_is_named(change, words, ranks, tmp_path: Path) -> None:
    write(tmp_path, ranks)
    path = tmp_path / "tokenizer.model"
    path.write_text(change(path.read_text()))
    with pytest.raises(ConfigError, match=words) as caught:
        load_tokenizer(tmp_path)
    assert "tokenizer.model" in str(caught.value)
    assert "\n" not in str(caught.value)
