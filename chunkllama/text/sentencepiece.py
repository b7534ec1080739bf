"""Read a sentencepiece ``tokenizer.model`` (Llama 1/2) into the vocabulary and merges of a
byte-fallback BPE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from chunkllama.errors import ConfigError

_BPE, _CONTROL, _USER_DEFINED = (
    2,
    3,
    4,
)  # sentencepiece_model.proto: TrainerSpec.ModelType, OutputDelta.Type


def load_sentencepiece(
    path: Path,
) -> tuple[dict[str, int], list[tuple[str, str]], list[AddedToken]]:
    """Vocabulary, merges in order of rank, and added tokens of a sentencepiece BPE model.

    Raises:
        ConfigError: the file is damaged or not a BPE model.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto: Any = vars(sentencepiece_model_pb2)["ModelProto"]()
    try:
        proto.ParseFromString(path.read_bytes())
    except Exception as error:  # protobuf's DecodeError has no stable import path
        raise ConfigError(
            f"{path} is not a sentencepiece model; download the file again"
        ) from error
    if proto.trainer_spec.model_type != _BPE or not proto.pieces:
        raise ConfigError(
            f"{path} is not a sentencepiece BPE model, the only kind Llama models use"
        )
    vocab = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    added = [
        AddedToken(piece.piece, normalized=False, special=piece.type == _CONTROL)
        for piece in proto.pieces
        if piece.type in (_CONTROL, _USER_DEFINED)
    ]
    return vocab, _merges(vocab), added


def _merges(vocab: dict[str, int]) -> list[tuple[str, str]]:
    """Every split of a piece into two pieces, ranked by the piece's id: sentencepiece's order of
    merging.

    A piece's splits are ordered by their parts' ids, as transformers' ``generate_merges`` has them.
    """
    ranked = [
        (index, len(left), len(right), vocab[left], vocab[right], left, right)
        for piece, index in vocab.items()
        for cut in range(1, len(piece))
        if (left := piece[:cut]) in vocab and (right := piece[cut:]) in vocab
    ]
    ranked.sort(key=lambda entry: entry[:5])
    return [(left, right) for *_, left, right in ranked]
