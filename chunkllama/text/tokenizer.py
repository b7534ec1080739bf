"""Token ids and text of a model folder. Imports no torch.

The ids are those of transformers' tokenizer for the same folder. Decoding is described by two
kinds, which the incremental detokenizer shares: byte-level BPE (Llama 3, SmolLM) and sentencepiece
with byte fallback (Llama 1/2).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import tokenizers
from tokenizers import AddedToken

from chunkllama.errors import ConfigError, InvalidRequestError
from chunkllama.text.byte_alphabet import BYTE_OF_CHAR
from chunkllama.text.llama_parts import SPIECE_SPACE
from chunkllama.text.tokenizer_files import DecodeRule, add_tokens, read_tokenizer_files

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_PROBE = "A probe: 1 line,\nUTF-8 \u00e9\u4e2d."
# Ids index a list, so one large id costs as much memory as a vocabulary of that size.
_MAX_TOKENS = 1 << 22
_MAX_TOKEN_CHARS = 500  # grammars know tokens of up to 1,023 bytes
# Matched in text even with special parsing off, and never written by a user: see
# `encode_continuation`.
_ANCHOR = "\ue000\U000f0000chunkllama\U000f0000\ue000"


class Tokenizer:
    """Text to ids and back, for one model folder.

    Args:
        backend: the tokenizer, its added tokens and post-processor complete.
        rule: how its decoder works.
        special_tokens: the named ones ("bos_token", ...), for chat templates.
        eos_token_ids: every id that ends an answer.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        rule: DecodeRule,
        special_tokens: dict[str, str],
        eos_token_ids: Iterable[int],
    ) -> None:
        self.rule = rule
        self.special_tokens = special_tokens
        self.added_tokens: dict[int, AddedToken] = dict(
            sorted(backend.get_added_tokens_decoder().items())
        )
        self.special_ids = frozenset(i for i, token in self.added_tokens.items() if token.special)
        vocab = backend.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocab.values(), default=-1) + 1
        if self.vocab_size > min(_MAX_TOKENS, 4 * len(vocab) + 65_536):
            raise ConfigError(
                f"the tokenizer has {len(vocab)} tokens but the id {self.vocab_size - 1}; download "
                "tokenizer.json again"
            )
        self.bos_token_id = vocab.get(special_tokens.get("bos_token", ""))
        self.eos_token_ids = tuple(sorted(set(eos_token_ids)))
        self._token_ids = vocab
        for token in vocab:
            if len(token) > _MAX_TOKEN_CHARS:
                raise ConfigError(f"the tokenizer has a token of {len(token)} characters")
        self._tokens: list[str | None] = [None] * self.vocab_size
        self._fallback_bytes: dict[int, int] = {}
        self._bytes: dict[int, bytes] = {}  # of the tokens that were asked for
        for token, token_id in vocab.items():
            self._tokens[token_id] = token
            if rule.byte_fallback and (match := _BYTE_TOKEN.fullmatch(token)):
                self._fallback_bytes[token_id] = int(match[1], 16)
        self._backend = backend
        self._plain = self.without_control_tokens(
            self.added_tokens[i].content for i in self.special_ids
        )

    def encode(
        self, text: str, add_special_tokens: bool = False, allow_special: bool = False
    ) -> list[int]:
        """Ids of a text.

        Args:
            add_special_tokens: put what the model expects around a document (usually BOS), never a
                second BOS.
            allow_special: strings such as ``<|eot_id|>`` become control tokens; only for trusted
                text.
        """
        backend = self._backend if allow_special else self._plain
        ids = encode_ids(backend, text, add_special_tokens=add_special_tokens)
        if (
            add_special_tokens
            and self.bos_token_id is not None
            and ids[:2] == [self.bos_token_id] * 2
        ):
            del ids[0]
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """Text of a whole sequence of ids; ids outside the vocabulary are skipped."""
        known = [i for i in ids if 0 <= i < self.vocab_size]
        # As a batch, for the reason encode_ids gives.
        text: str = self._backend.decode_batch([known], skip_special_tokens=skip_special_tokens)[0]
        return text

    def to_json(self) -> str:
        """The complete tokenizer as tokenizer.json has it."""
        text: str = self._backend.to_str()
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for: b"" outside the vocabulary, possibly part of a
        character."""
        known = self._bytes.get(token_id)
        if known is None:
            token = self._tokens[token_id] if 0 <= token_id < self.vocab_size else None
            if token is None:
                return b""
            known = self._bytes[token_id] = self._as_bytes(token_id, token)
        return known

    def _as_bytes(self, token_id: int, token: str) -> bytes:
        if self.rule.byte_level:
            mapped = [BYTE_OF_CHAR.get(char) for char in token]
            return token.encode() if None in mapped else bytes(b for b in mapped if b is not None)
        if (byte := self.fallback_byte(token_id)) is not None:
            return bytes([byte])
        return token.replace(SPIECE_SPACE, " ").encode()

    def token_str(self, token_id: int) -> str:
        """One token as text of its own, U+FFFD for partial characters; a special token by its
        name."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def fallback_byte(self, token_id: int) -> int | None:
        """The byte of a byte-fallback piece (``<0x0A>``), None for every other token."""
        return self._fallback_bytes.get(token_id)

    def token_id(self, token: str) -> int | None:
        """Id of a vocabulary entry or added token by its exact string."""
        return self._token_ids.get(token)

    def without_control_tokens(self, control_tokens: Iterable[str]) -> tokenizers.Tokenizer:
        """A tokenizer that reads the given added tokens as ordinary text and keeps every other one.

        The model is shared, not copied. The anchor of `encode_continuation` is one more added token
        in it.
        """
        control = set(control_tokens)
        plain = tokenizers.Tokenizer(self._backend.model)
        for part in ("normalizer", "pre_tokenizer", "decoder", "post_processor"):
            if (value := getattr(self._backend, part)) is not None:
                setattr(plain, part, value)
        tokens = [*self.added_tokens.values(), AddedToken(_ANCHOR, normalized=False)]
        # encode_special_tokens hides exactly the tokens flagged special.
        add_tokens(
            plain,
            [
                AddedToken(
                    token.content,
                    single_word=token.single_word,
                    lstrip=token.lstrip,
                    rstrip=token.rstrip,
                    normalized=token.normalized,
                    special=token.content in control,
                )
                for token in tokens
            ],
        )
        plain.encode_special_tokens = True
        return plain


def encode_ids(backend: tokenizers.Tokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
    """Return ids of one text. Only the backend's batch calls release the interpreter lock, and a
    megabyte takes more than a second.

    Raises:
        InvalidRequestError: the library fails at this text, e.g. since a pattern of the model's
            tokenizer would take too long.
    """
    try:
        encoded = backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)
    except BaseException as error:
        if not _is_panic(error):
            raise
        reason = " ".join(str(error).split())[:200]
        raise InvalidRequestError(
            f"tokenizer.json of the model fails at a text of {len(text)} characters ({reason}); "
            "send it in shorter words, or less of it"
        ) from None
    ids: list[int] = encoded[0].ids
    return ids


def _is_panic(error: BaseException) -> bool:
    """Tell whether the library has reported a bug of its own, which is no Exception."""
    return type(error).__name__ == "PanicException"


def encode_continuation(plain: tokenizers.Tokenizer, text: str) -> list[int]:
    """Ids of a text that stands after a control token, so without the space sentencepiece puts at a
    text's start."""
    return encode_ids(plain, _ANCHOR + text, add_special_tokens=False)[1:]


def load_tokenizer(path: Path) -> Tokenizer:
    """Load the tokenizer of a model folder.

    Raises:
        ConfigError: no tokenizer file, an unreadable one, or a kind no Llama-family model uses.
    """
    try:
        tokenizer = Tokenizer(*read_tokenizer_files(path))
        tokenizer.decode(tokenizer.encode(_PROBE, add_special_tokens=True, allow_special=True))
    except ConfigError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and not _is_panic(error):
            raise
        reason = " ".join(repr(error).split())[:200]
        raise ConfigError(
            f"{path}: tokenizer.json and tokenizer_config.json contradict each other or hold a "
            f"value of a wrong type ({reason}); download them again"
        ) from error
    return tokenizer
