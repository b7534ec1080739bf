"""Vocabularies whose pieces would take minutes to split."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from sentencepiece import sentencepiece_model_pb2

from chunkllama.errors import ConfigError
from chunkllama.models.loading.gguf_tokenizer import tokenizer_files
from chunkllama.text.sentencepiece import load_sentencepiece
from chunkllama.text.tiktoken_file import load_tiktoken
from chunkllama.vocabulary import MAX_PIECE

LONG = "a" * (MAX_PIECE + 1)


def in_sentencepiece(path: Path) -> None:
    proto = vars(sentencepiece_model_pb2)["ModelProto"]()
    proto.trainer_spec.model_type = 2
    proto.pieces.add(piece=LONG)
    path.write_bytes(proto.SerializeToString())
    load_sentencepiece(path, {}, {})


def in_tiktoken(path: Path) -> None:
    tokens = [*(bytes([byte]) for byte in range(256)), LONG.encode()]
    lines = (base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    path.write_bytes(b"".join(lines))
    load_tiktoken(path, [])


def in_gguf(path: Path) -> None:
    tokenizer_files(path, {"tokenizer.ggml.model": "llama", "tokenizer.ggml.tokens": [LONG]})


@pytest.mark.parametrize("load", [in_sentencepiece, in_tiktoken, in_gguf])
def test_a_piece_of_a_length_no_tokenizer_has_is_refused(load, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tokens: token \d+ is 1,025 long, of at most 1,024"):
        load(tmp_path / "tokens")
