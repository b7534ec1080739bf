"""Tokenizers of published models on 2,000 texts: folders against transformers, GGUF files against
tokenizers, sentencepiece, tiktoken's algorithm and the ids that llama.cpp records. Nightly, since
pip and npm fetch the files.
"""

from __future__ import annotations

import base64
import json
import random
import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest
import regex
import sentencepiece
import tokenizers
from byte_pairs import alphabet, encode_by_rank
from random_texts import random_texts
from registry_files import registry_files
from sentencepiece import sentencepiece_model_pb2
from transformers import AutoTokenizer

from chunkllama.errors import ConfigError
from chunkllama.models.loading.gguf_tokenizer import tokenizer_files
from chunkllama.text.detokenizer import IncrementalDetokenizer
from chunkllama.text.tokenizer import load_tokenizer

pytestmark = pytest.mark.nightly

TEXTS = random_texts(2000, seed=5)
CONTROL = 3  # llama.cpp's token types
USER_DEFINED = 4

# Package -> model_type of config.json.
FOLDERS = {
    **{"llama2": "llama", "llama3": "llama", "llama3_1": "llama", "qwen3": "qwen3"},
    **{"gemma3": "gemma3_text", "deepseek_v3": "deepseek_v3", "gptoss": "gpt_oss"},
}
# Files of Mistral's own layout, read by sentencepiece's rules.
MISTRAL = {
    "v1": "tokenizer.model.v1",
    "v2": "mistral_instruct_tokenizer_240216.model.v2",
    "v3": "mistral_instruct_tokenizer_240323.model.v3",
    "v7": "mistral_instruct_tokenizer_241114.model.v7",
}
# Vocabularies of llama.cpp that have recorded ids; BERT's and Gemma 4's kinds are not supported.
RECORDED = (
    *("command-r", "deepseek-coder", "deepseek-llm", "falcon", "gpt-2", "llama-bpe", "llama-spm"),
    *("mpt", "phi-3", "qwen2", "qwen35", "refact", "starcoder"),
)


def metadata_of(path: Path) -> dict[str, Any]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


def built(metadata: dict[str, Any]) -> tokenizers.Tokenizer:
    files = tokenizer_files(Path("m.gguf"), metadata)
    return tokenizers.Tokenizer.from_str(json.dumps(files["tokenizer.json"]))


def plain(texts: Iterable[str], control: Iterable[str]) -> list[str]:
    """Texts in which no control token stands."""
    names = list(control)
    return [text for text in texts if not any(name in text for name in names)]


def assert_same(
    ours: tokenizers.Tokenizer,
    encode: Callable[[str], Sequence[int]],
    decode: Callable[[list[int]], str] | None,
    texts: Sequence[str],
) -> None:
    assert len(texts) > len(TEXTS) * 3 // 4
    for text in texts:
        expected = list(encode(text))
        assert ours.encode(text, add_special_tokens=False).ids == expected, text
        if decode is not None:
            assert ours.decode(expected) == decode(expected), text


def published(package: str, folder: Path) -> Path:
    for path in registry_files(package).glob("tokenizer*.json"):
        shutil.copy(path, folder)
    (folder / "config.json").write_text(json.dumps({"model_type": FOLDERS[package]}))
    return folder


def assert_like_transformers(folder: Path, *, adds_bos: bool | None = None) -> None:
    """Ids with control tokens parsed and not, with BOS, text and streamed text.

    ``adds_bos``: where it is intended to differ from transformers.
    """
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    cut = random.Random(3)
    for text in TEXTS:
        parsed = theirs.encode(text, add_special_tokens=False)
        assert ours.encode(text, allow_special=True) == parsed, text
        whole = ours.encode(text, add_special_tokens=True, allow_special=True)
        expected = theirs.encode(text) if adds_bos is None else parsed
        if adds_bos or expected[:2] == [ours.bos_token_id] * 2:
            expected = [ours.bos_token_id, *parsed] if adds_bos else expected[1:]
        assert whole == expected, text
        shown = theirs.decode(parsed)
        assert ours.decode(parsed, skip_special_tokens=False) == shown, text
        stream, pieces = IncrementalDetokenizer(ours, False), []
        while parsed:
            size = cut.randint(1, 3)
            pieces.append(stream.add(parsed[:size]))
            parsed = parsed[size:]
        assert "".join([*pieces, stream.finish()]) == shown, text


@pytest.mark.parametrize("package", FOLDERS)
def test_tokenizer_json_is_read_as_transformers_reads_it(package: str, tmp_path: Path) -> None:
    # transformers 5 adds no BOS for DeepSeek-V3, whose tokenizer_config.json asks for it.
    adds_bos = True if package == "deepseek_v3" else None
    assert_like_transformers(published(package, tmp_path), adds_bos=adds_bos)


@pytest.mark.parametrize("model_type", ["mistral", "llama"])
@pytest.mark.parametrize("version", MISTRAL)
def test_tokenizer_model_is_read_as_transformers_reads_it(
    version: str, model_type: str, tmp_path: Path
) -> None:
    shutil.copy(registry_files("mistral") / MISTRAL[version], tmp_path / "tokenizer.model")
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    config = {"tokenizer_class": "LlamaTokenizer", **names, "add_bos_token": True, "legacy": True}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert_like_transformers(tmp_path)


def test_metas_file_gives_the_ids_of_tokenizer_json(tmp_path: Path) -> None:
    """tiktoken's layout of Llama 3, against the tokenizer.json that was made of it."""
    shutil.copy(registry_files("meta") / "llama3.model", tmp_path / "tokenizer.model")
    ours = load_tokenizer(tmp_path)
    document = str(registry_files("llama3_1") / "tokenizer.json")
    theirs = tokenizers.Tokenizer.from_file(document)
    for text in TEXTS:
        ids = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, allow_special=True) == ids, text
        assert ours.decode(ids) == theirs.decode(ids), text
    names = ("begin_of_text", "end_of_text", "start_header_id", "end_header_id", "eot_id")
    for name in (f"<|{name}|>" for name in names):
        assert ours.token_id(name) == theirs.token_to_id(name) is not None


def test_metas_file_of_llama_4_is_refused(tmp_path: Path) -> None:
    """Its words are split by another rule, which the file does not hold."""
    shutil.copy(registry_files("meta") / "llama4.model", tmp_path / "tokenizer.model")
    with pytest.raises(ConfigError, match=r"200,000 tokens, more than Llama 3's"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", RECORDED)
def test_ids_are_those_that_llama_cpp_records(name: str) -> None:
    path = registry_files("llama.cpp") / f"ggml-vocab-{name}.gguf"
    files = tokenizer_files(path, metadata_of(path))
    document = files["tokenizer.json"]
    if name == "qwen35":  # llama.cpp does not normalise; transformers' Qwen 3.5 does
        document["normalizer"] = None
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(document))
    *texts, end = Path(f"{path}.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    recorded = Path(f"{path}.out").read_text().splitlines()
    assert end == ""
    assert len(texts) == len(recorded) > 40
    for text, ids in zip(texts, recorded, strict=True):
        found = tokenizer.encode(text, add_special_tokens=False).ids
        assert found == [int(x) for x in ids.split()], text


def sentencepiece_of(metadata: dict[str, Any]) -> sentencepiece.SentencePieceProcessor:
    """sentencepiece's own model from the pieces of a GGUF file."""
    proto: Any = vars(sentencepiece_model_pb2)["ModelProto"]()
    proto.trainer_spec.model_type, proto.trainer_spec.byte_fallback = 2, True
    proto.normalizer_spec.name = "identity"
    proto.normalizer_spec.add_dummy_prefix = True
    proto.normalizer_spec.remove_extra_whitespaces = False
    names = ("tokens", "scores", "token_type")
    for fields in zip(*(metadata[f"tokenizer.ggml.{name}"] for name in names), strict=True):
        piece = proto.pieces.add()
        piece.piece, piece.score, piece.type = fields
    proto.trainer_spec.unk_id, proto.trainer_spec.pad_id = 0, -1
    proto.trainer_spec.bos_id, proto.trainer_spec.eos_id = 1, 2
    return sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())


def assert_like_sentencepiece(
    metadata: dict[str, Any], model: sentencepiece.SentencePieceProcessor
) -> None:
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    control = [token for token, kind in zip(tokens, types, strict=True) if kind == CONTROL]
    texts = plain(TEXTS, [*control, "<unk>"])
    assert_same(built(metadata), model.encode, model.decode, texts)


@pytest.mark.parametrize("name", ["llama-spm", "baichuan"])
def test_pieces_in_a_gguf_file_give_sentencepieces_ids(name: str) -> None:
    metadata = metadata_of(registry_files("llama.cpp") / f"ggml-vocab-{name}.gguf")
    assert_like_sentencepiece(metadata, sentencepiece_of(metadata))


@pytest.mark.parametrize("version", MISTRAL)
def test_a_gguf_file_of_mistrals_pieces_gives_sentencepieces_ids(version: str) -> None:
    path = registry_files("mistral") / MISTRAL[version]
    proto: Any = vars(sentencepiece_model_pb2)["ModelProto"]()
    proto.ParseFromString(path.read_bytes())
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [piece.piece for piece in proto.pieces],
        "tokenizer.ggml.scores": [piece.score for piece in proto.pieces],
        "tokenizer.ggml.token_type": [piece.type for piece in proto.pieces],
        "tokenizer.ggml.unknown_token_id": 0,
    }
    model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert_like_sentencepiece(metadata, model)


# Name of the splitter -> the package that holds a tokenizer of this kind.
BYTE_LEVEL = {
    **{"llama-bpe": "llama3_1", "qwen2": "qwen3", "deepseek-v3": "deepseek_v3"},
    **{"gpt-4o": "gpt4o", "llama3": "llama3"},
}


@pytest.mark.parametrize("pre", BYTE_LEVEL)
def test_a_gguf_file_of_a_tokenizer_json_gives_its_ids(pre: str) -> None:
    """As llama.cpp's converter writes it: tokens by id, merges, and the splitter's name."""
    path = registry_files(BYTE_LEVEL[pre]) / "tokenizer.json"
    original = tokenizers.Tokenizer.from_file(str(path))
    ids = original.get_vocab(with_added_tokens=True)
    tokens = [f"[PAD{i}]" for i in range(max(ids.values()) + 1)]
    types = [5] * len(tokens)
    for token, index in ids.items():
        tokens[index], types[index] = token, 1
    for index, added in original.get_added_tokens_decoder().items():
        types[index] = CONTROL if added.special else USER_DEFINED
    merges = json.loads(path.read_text(encoding="utf-8"))["model"]["merges"]
    ours = built(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.token_type": types,
            "tokenizer.ggml.merges": [x if isinstance(x, str) else " ".join(x) for x in merges],
        }
    )
    assert_same(
        ours,
        lambda text: original.encode(text, add_special_tokens=False).ids,
        original.decode,
        TEXTS,
    )


TEKKEN = regex.compile(
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.mark.parametrize("file", ["tekken_240718.json", "tekken_240911.json"])
def test_a_gguf_file_of_tekken_gives_tiktokens_ids(file: str) -> None:
    """As llama.cpp's converter writes it: the merges are where two tokens join to a third."""
    document = json.loads((registry_files("mistral") / file).read_text(encoding="utf-8"))
    assert document["config"]["pattern"] == TEKKEN.pattern
    count = document["config"]["default_vocab_size"] - (
        num_special := document["config"]["default_num_special_tokens"]
    )
    ranked = [base64.b64decode(x["token_bytes"]) for x in document["vocab"][:count]]
    ranks = {token: rank for rank, token in enumerate(ranked)}
    spelled = alphabet()

    def spell(token: bytes) -> str:
        return "".join(spelled[byte] for byte in token)

    merges = []
    for token in ranked:
        cuts = [c for c in range(1, len(token)) if token[:c] in ranks and token[c:] in ranks]
        cuts.sort(key=lambda c: (ranks[token[:c]], ranks[token[c:]]))
        merges += [f"{spell(token[:c])} {spell(token[c:])}" for c in cuts]
    special = [f"<SPECIAL_{i}>" for i in range(num_special)]
    ours = built(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "tekken",
            "tokenizer.ggml.tokens": [*special, *map(spell, ranked)],
            "tokenizer.ggml.token_type": [*[CONTROL] * num_special, *[1] * count],
            "tokenizer.ggml.merges": merges,
        }
    )

    def encode(text: str) -> list[int]:
        return [num_special + rank for rank in encode_by_rank(ranks, TEKKEN, text)]

    assert_same(ours, encode, None, TEXTS)
