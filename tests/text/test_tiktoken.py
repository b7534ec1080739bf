"""tiktoken's ``tokenizer.model``, as Meta publishes Llama 3: the ids of its own algorithm."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
import tokenizers
from byte_pairs import LLAMA3, alphabet, encode_by_rank
from random_texts import random_texts
from tokenizers.pre_tokenizers import ByteLevel

from chunkllama.errors import ConfigError
from chunkllama.text.tokenizer import Tokenizer, load_tokenizer

TEXTS = random_texts(400, seed=5)


def trained_ranks() -> dict[bytes, int]:
    """Ranks of a byte-level BPE trained on the texts, single bytes first."""
    byte_of = {char: byte for byte, char in alphabet().items()}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE())
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=1500, initial_alphabet=ByteLevel.alphabet(), show_progress=False
    )
    backend.train_from_iterator(TEXTS, trainer)
    merges = json.loads(backend.to_str())["model"]["merges"]
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [bytes(byte_of[char] for char in left + right) for left, right in merges]
    return {token: rank for rank, token in enumerate(dict.fromkeys(tokens))}


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
        ids = encode_by_rank(ranks, LLAMA3, text)
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


def test_listed_special_tokens_keep_their_ids(ranks: dict[bytes, int], tmp_path: Path) -> None:
    """Ids between them are reserved tokens of the names that transformers gives them."""
    write(tmp_path, ranks)
    base = len(ranks)
    listed = {str(base + n): {"content": f"<t{n}>", "special": True} for n in (9, 0, 4)}
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({"added_tokens_decoder": listed, "bos_token": "<t0>"}))
    tokenizer = load_tokenizer(tmp_path)
    assert [tokenizer.token_id(f"<t{n}>") for n in (0, 4, 9)] == [base, base + 4, base + 9]
    assert tokenizer.token_id(f"<|reserved_token_{base + 5}|>") == base + 5
    assert tokenizer.vocab_size == base + 10
    listed[str(base + 10**6)] = {"content": "<far>"}
    path.write_text(json.dumps({"added_tokens_decoder": listed}))
    with pytest.raises(ConfigError, match="added_tokens_decoder has the id"):
        load_tokenizer(tmp_path)


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


def test_a_file_of_more_tokens_than_llama_3_has_is_refused(
    ranks: dict[bytes, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Llama 4's, say: how it splits words does not follow from the file."""
    monkeypatch.setattr("chunkllama.text.tiktoken_file._NUM_RANKED", len(ranks) - 1)
    write(tmp_path, ranks)
    with pytest.raises(
        ConfigError, match=r"more than Llama 3's .* copy the model's tokenizer\.json"
    ):
        load_tokenizer(tmp_path)
