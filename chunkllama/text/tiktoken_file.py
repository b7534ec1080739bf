"""Read a tiktoken ``tokenizer.model``, the form in which Meta publishes Llama 3: a line for each
token, its bytes in base64 and its rank.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any, Final

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from chunkllama.errors import ConfigError
from chunkllama.text.byte_alphabet import CHAR_OF_BYTE
from chunkllama.vocabulary import check_pieces

_PATTERN: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_NUM_RANKED: Final = 128_000  # of Llama 3
_NUM_SPECIAL: Final = 256
_MAX_SPECIAL: Final = 65_536  # ids that may follow the ranked tokens
_NAMED: Final = {
    **{0: "begin_of_text", 1: "end_of_text", 4: "finetune_right_pad_id"},
    **{6: "start_header_id", 7: "end_header_id", 8: "eom_id", 9: "eot_id", 10: "python_tag"},
}
_DEFAULTS: Final = {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}


def tiktoken_defaults(listed: dict[int, str]) -> dict[str, Any]:
    """What tokenizer_config.json means where it lacks a key; ``listed``: its tokens, by id."""
    names = {key: x for key, x in _DEFAULTS.items() if not listed or x in listed.values()}
    return {**names, "add_bos_token": True}


def is_tiktoken(path: Path) -> bool:
    """Whether the file begins with a line of base64 and a rank; sentencepiece files do not."""
    with path.open("rb") as file:
        try:
            _parse(file.readline(1 << 16))
        except ValueError:
            return False
    return True


def load_tiktoken(path: Path, special_tokens: dict[int, str]) -> tokenizers.Tokenizer:
    """Build the tokenizer: byte-level BPE by rank, a word that is a token taken whole.

    Args:
        special_tokens: by id, of which those that follow the ranked ones count; ids between them
            are reserved tokens, as in transformers. Empty: the 256 of Llama 3.1 to 3.3 (of Llama 3
            the ones it uses have the same ids).

    Raises:
        ConfigError: a line is damaged, ranks are not 0, 1, 2, ..., or there are more of them than
            Llama 3 has: the file does not say how other models split words.
    """
    tokens = _read(path)
    ranks = {token: rank for rank, token in enumerate(tokens)}
    merges = [
        (_spelled(token[:cut]), _spelled(token[cut:]))
        for token in tokens
        for cut in _cuts(token, ranks)
    ]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab={_spelled(token): rank for token, rank in ranks.items()},
            merges=merges,
            fuse_unk=False,
            ignore_merges=True,
        )
    )
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PATTERN), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [
            AddedToken(name, normalized=False, special=True)
            for name in _special_names(path, len(tokens), special_tokens) or _llama3_special()
        ]
    )
    return backend


def _special_names(path: Path, first: int, listed: dict[int, str]) -> list[str]:
    last = max(listed, default=0)
    if last >= first + _MAX_SPECIAL:
        raise ConfigError(
            f"{path.with_name('tokenizer_config.json')}: added_tokens_decoder has the id {last}, "
            f"but {path.name} has {first:,} tokens; are they of the same model?"
        )
    return [listed.get(index, f"<|reserved_token_{index}|>") for index in range(first, last + 1)]


def _llama3_special() -> list[str]:
    names, reserved = [], 0
    for nth in range(_NUM_SPECIAL):
        if nth in _NAMED:
            names.append(f"<|{_NAMED[nth]}|>")
        else:
            names.append(f"<|reserved_special_token_{reserved}|>")
            reserved += 1
    return names


def _read(path: Path) -> list[bytes]:
    tokens: list[bytes] = []
    try:
        for line in path.read_bytes().splitlines():
            if not line:
                continue
            token, rank = _parse(line)
            if rank != len(tokens):
                raise ValueError(f"rank {rank} where {len(tokens)} is expected")
            tokens.append(token)
    except ValueError as error:
        raise ConfigError(
            f"{path} is not a tiktoken file: {error}; download the file again"
        ) from error
    check_pieces(tokens, path)
    if len(tokens) > _NUM_RANKED:
        raise ConfigError(
            f"{path}: a tiktoken file of {len(tokens):,} tokens, more than Llama 3's "
            f"{_NUM_RANKED:,}; copy the model's tokenizer.json"
        )
    if len(set(tokens)) < len(tokens) or not {bytes([byte]) for byte in range(256)} <= set(tokens):
        raise ConfigError(
            f"{path}: the tokens of a tiktoken file must differ and hold every single byte; "
            "download the file again"
        )
    return tokens


def _parse(line: bytes) -> tuple[bytes, int]:
    parts = line.split()
    if len(parts) != 2 or not parts[1].isdigit() or len(parts[1]) > 8:
        raise ValueError("a line is not a token in base64 and its rank")
    try:
        token = base64.b64decode(parts[0], validate=True)
    except binascii.Error as error:
        raise ValueError(f"a token is not base64 ({error})") from error
    return token, int(parts[1])


def _cuts(token: bytes, ranks: dict[bytes, int]) -> list[int]:
    """Where two other tokens join to this one, those of lower ranks first."""
    cuts = [cut for cut in range(1, len(token)) if token[:cut] in ranks and token[cut:] in ranks]
    return sorted(cuts, key=lambda cut: (ranks[token[:cut]], ranks[token[cut:]]))


def _spelled(token: bytes) -> str:
    return "".join(CHAR_OF_BYTE[byte] for byte in token)
