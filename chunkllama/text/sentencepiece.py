"""Read a sentencepiece ``tokenizer.model`` into a byte-fallback BPE: as LlamaTokenizer of
transformers reads it, or as sentencepiece itself encodes.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

import tokenizers
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers

from chunkllama.errors import ConfigError
from chunkllama.text.llama_parts import SPIECE_SPACE, set_llama_parts, space_decoder
from chunkllama.vocabulary import check_pieces

# sentencepiece_model.proto: TrainerSpec.ModelType, SentencePiece.Type
_BPE, _NORMAL, _CONTROL, _USER_DEFINED = 2, 1, 3, 4
# Model types whose tokenizer files say how to encode; others get the rules of LlamaTokenizer.
KEEP_RULES: Final = frozenset(
    {
        *("mistral", "mixtral", "ministral", "ministral3", "phi3", "phimoe"),
        *("ernie4_5", "ernie4_5_moe", "internlm3", "minicpm3", "jamba", "nemotron"),
    }
)
# Their tokenizer has no space before the first word.
_GEMMA: Final = frozenset({"gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "gemma3n_text"})


def sentencepiece_defaults(model_config: dict[str, Any]) -> dict[str, Any]:
    """What tokenizer_config.json means where it lacks a key, or is missing."""
    bos, eos = ("<bos>", "<eos>") if model_config.get("model_type") in _GEMMA else ("<s>", "</s>")
    return {"bos_token": bos, "eos_token": eos, "unk_token": "<unk>", "add_bos_token": True}


def load_sentencepiece(
    path: Path, config: dict[str, Any], model_config: dict[str, Any]
) -> tokenizers.Tokenizer:
    """Load ``tokenizer.model`` as transformers does for the model.

    Args:
        config: tokenizer_config.json.
        model_config: config.json.

    Raises:
        ConfigError: the file cannot be used.
    """
    if model_config.get("model_type") in KEEP_RULES:
        return as_the_model_says(path, legacy=config.get("legacy") is not False)
    vocab, merges, added = _read_pieces(path)
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocab, merges=merges, fuse_unk=True, byte_fallback=True, unk_token="<unk>")
    )
    is_gemma = model_config.get("model_type") in _GEMMA
    set_llama_parts(backend, {"add_prefix_space": False} if is_gemma else config)
    for token in added:
        (backend.add_special_tokens if token.special else backend.add_tokens)([token])
    return backend


def _read_pieces(
    path: Path,
) -> tuple[dict[str, int], list[tuple[str, str]], list[AddedToken]]:
    """Vocabulary, merges in order of rank, and added tokens of a sentencepiece BPE model.

    Raises:
        ConfigError: the file is damaged or not a BPE model.
    """
    proto = _read(path)
    vocab = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    return vocab, _merges(vocab), _added_tokens(proto)


def as_the_model_says(path: Path, *, legacy: bool) -> tokenizers.Tokenizer:
    """A tokenizer with the ids of ``SentencePieceProcessor.encode``.

    Args:
        legacy: a space goes before each piece of text between control tokens, and before a text
            that begins with a space; otherwise before the first one, unless it begins with a space.

    Raises:
        ConfigError: as ``load_sentencepiece``.
    """
    proto = _read(path)
    rules = proto.normalizer_spec
    if rules.precompiled_charsmap:
        raise ConfigError(f"{path} normalises characters by a table, which is not supported")
    scores = {
        piece.piece: (-piece.score, index)
        for index, piece in enumerate(proto.pieces)
        if piece.type == _NORMAL
    }
    merges = sorted(
        (*scores[piece], piece[:cut], piece[cut:])
        for piece in scores
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    )
    whole = [piece.piece for piece in proto.pieces if piece.type == _USER_DEFINED]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={piece.piece: index for index, piece in enumerate(proto.pieces)},
            merges=[(left, right) for *_, left, right in merges],
            unk_token=proto.trainer_spec.unk_piece,
            fuse_unk=True,
            byte_fallback=True,
            ignore_merges=bool(whole),
        )
    )
    steps: list[Any] = [normalizers.Replace(" ", SPIECE_SPACE)]
    if rules.remove_extra_whitespaces:
        outer = normalizers.Replace(Regex(r"\A +| +\z"), "")
        steps = [outer, normalizers.Replace(Regex(" {2,}"), " "), *steps]
    if rules.add_dummy_prefix and legacy:
        # Metaspace adds none where one stands already.
        steps.append(normalizers.Replace(Regex(rf"\A{SPIECE_SPACE}"), 2 * SPIECE_SPACE))
    backend.normalizer = normalizers.Sequence(steps)
    splits: list[Any] = []
    if rules.add_dummy_prefix:
        scheme = "always" if legacy else "first"
        splits.append(
            pre_tokenizers.Metaspace(replacement=SPIECE_SPACE, prepend_scheme=scheme, split=False)
        )
    if whole:
        pattern = "|".join(re.escape(piece) for piece in sorted(whole, key=len, reverse=True))
        splits.append(pre_tokenizers.Split(Regex(pattern), behavior="isolated"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(splits)
    backend.decoder = space_decoder(strips=rules.add_dummy_prefix)
    backend.add_special_tokens([token for token in _added_tokens(proto) if token.special])
    return backend


def _read(path: Path) -> Any:
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
    check_pieces((piece.piece for piece in proto.pieces), path)
    return proto


def _added_tokens(proto: Any) -> list[AddedToken]:
    return [
        AddedToken(piece.piece, normalized=False, special=piece.type == _CONTROL)
        for piece in proto.pieces
        if piece.type in (_CONTROL, _USER_DEFINED)
    ]


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
