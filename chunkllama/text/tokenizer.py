"""Token ids and text of a model folder: tokenizer.json, or tokenizer.model alone (sentencepiece or
tiktoken). Imports no torch.

The ids are those of transformers' tokenizer for the same folder. Decoding is described by two
kinds, which the incremental detokenizer shares: byte-level BPE (Llama 3, SmolLM) and sentencepiece
with byte fallback (Llama 1/2).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
from tokenizers import AddedToken, processors

from chunkllama.errors import ConfigError
from chunkllama.text import tiktoken_file
from chunkllama.text.byte_alphabet import BYTE_OF_CHAR
from chunkllama.text.llama_parts import (
    SPIECE_SPACE,
    as_llama_sentencepiece,
    is_byte_level,
)
from chunkllama.text.sentencepiece import KEEP_RULES, load_sentencepiece, sentencepiece_defaults

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token")
_PROBE = "A probe: 1 line,\nUTF-8 \u00e9\u4e2d."
# Ids index a list, so one large id costs as much memory as a vocabulary of that size.
_MAX_TOKENS = 1 << 22
_MAX_TOKEN_CHARS = 500  # grammars know tokens of up to 1,023 bytes
# Matched in text even with special parsing off, and never written by a user: see
# `encode_continuation`.
_ANCHOR = "\ue000\U000f0000chunkllama\U000f0000\ue000"


class DecodeRule(NamedTuple):
    """How ids become text.

    Attributes:
        byte_level: token strings spell bytes in the GPT-2 alphabet; otherwise sentencepiece pieces.
        byte_fallback: pieces like ``<0x0A>`` are raw bytes; an invalid run of them is one U+FFFD
            per byte.
        strip_left: leading spaces removed from the whole text.
    """

    byte_level: bool
    byte_fallback: bool
    strip_left: int


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
        for token in [*self.added_tokens.values(), AddedToken(_ANCHOR, normalized=False)]:
            # encode_special_tokens hides exactly the tokens flagged special.
            flagged = AddedToken(
                token.content,
                single_word=token.single_word,
                lstrip=token.lstrip,
                rstrip=token.rstrip,
                normalized=token.normalized,
                special=token.content in control,
            )
            if flagged.special:
                plain.add_special_tokens([flagged])
            else:
                plain.add_tokens([flagged])
        plain.encode_special_tokens = True
        return plain


def encode_ids(backend: tokenizers.Tokenizer, text: str, *, add_special_tokens: bool) -> list[int]:
    """Return ids of one text. Only the backend's batch calls release the interpreter lock, and a
    megabyte takes more than a second."""
    ids: list[int] = backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
    return ids


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
        tokenizer = _load(path)
        tokenizer.decode(tokenizer.encode(_PROBE, add_special_tokens=True, allow_special=True))
    except ConfigError:
        raise
    except BaseException as error:
        # The library reports a bug of its own as a PanicException, which is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(repr(error).split())[:200]
        raise ConfigError(
            f"{path}: tokenizer.json and tokenizer_config.json contradict each other or hold a "
            f"value of a wrong type ({reason}); download them again"
        ) from error
    return tokenizer


def _load(path: Path) -> Tokenizer:
    config = read_json(path / "tokenizer_config.json")
    model_config = read_json(path / "config.json")
    json_path, spm_path = path / "tokenizer.json", path / "tokenizer.model"
    if json_path.is_file():
        backend = _load_json(json_path, config, model_config)
    elif spm_path.is_file() and tiktoken_file.is_tiktoken(spm_path):
        listed = _listed_tokens(config)
        backend = tiktoken_file.load_tiktoken(spm_path, listed)
        config = {**tiktoken_file.tiktoken_defaults(listed), **config}
    elif spm_path.is_file():
        backend = load_sentencepiece(spm_path, config, model_config)
        config = {**sentencepiece_defaults(model_config), **config}
    else:
        raise ConfigError(
            f"{path} has neither tokenizer.json nor tokenizer.model; copy it from the publisher"
        )
    backend.no_truncation()
    backend.no_padding()
    special_tokens = _special_tokens(path, config)
    _add_configured_tokens(backend, config, special_tokens)
    if json_path.is_file():
        _add_missing_bos(backend, config, special_tokens)
    else:
        backend.post_processor = _template(backend, config, special_tokens)
    rule = _decode_rule(backend, json_path)
    return Tokenizer(
        backend, rule, special_tokens, _eos_token_ids(path, model_config, backend, special_tokens)
    )


def _load_json(
    path: Path, config: dict[str, Any], model_config: dict[str, Any]
) -> tokenizers.Tokenizer:
    """Load tokenizer.json unchanged, or rebuilt where transformers uses its LlamaTokenizer for the
    folder."""
    declared = config.get("tokenizer_class") or model_config.get("tokenizer_class")
    keeps_rules = model_config.get("model_type") in KEEP_RULES
    try:
        if declared in ("LlamaTokenizer", "LlamaTokenizerFast") and not keeps_rules:
            document = read_json(path)
            if not is_byte_level(document):
                return tokenizers.Tokenizer.from_str(
                    json.dumps(as_llama_sentencepiece(document, config))
                )
        return tokenizers.Tokenizer.from_file(str(path))
    except ConfigError:
        raise
    except Exception as error:  # tokenizers raises bare Exception
        raise ConfigError(f"{path} is not a tokenizer this version can read: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, {} where there is none.

    Raises:
        ConfigError: the file is not a JSON object.
    """
    if not path.is_file():
        return {}
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON ({error}); download the file again") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{path} must hold a JSON object; download the file again")
    return document


def _listed_tokens(config: dict[str, Any]) -> dict[int, str]:
    """Tokens of tokenizer_config.json by their ids."""
    listed = config.get("added_tokens_decoder") or {}
    return {int(index): entry["content"] for index, entry in listed.items()}


def _content(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _special_tokens(path: Path, config: dict[str, Any]) -> dict[str, str]:
    listed = read_json(path / "special_tokens_map.json") | config
    return {name: token for name in _NAMED_TOKENS if (token := _content(listed.get(name)))}


def _add_configured_tokens(
    backend: tokenizers.Tokenizer, config: dict[str, Any], special_tokens: dict[str, str]
) -> None:
    """Tokens that tokenizer_config.json names and the tokenizer file lacks."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    listed = config.get("added_tokens_decoder") or {}
    for _, entry in sorted(listed.items(), key=lambda item: int(item[0])):
        if entry["content"] not in known:
            token = AddedToken(**{**entry, "special": bool(entry.get("special"))})
            (backend.add_special_tokens if token.special else backend.add_tokens)([token])
            known.add(entry["content"])
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    extra = list(extra.values()) if isinstance(extra, dict) else extra
    for content in [*special_tokens.values(), *(_content(token) for token in extra)]:
        if content and content not in known:
            backend.add_special_tokens([AddedToken(content, special=True, normalized=False)])
            known.add(content)


def _add_missing_bos(
    backend: tokenizers.Tokenizer, config: dict[str, Any], special_tokens: dict[str, str]
) -> None:
    """Add BOS where tokenizer_config.json asks for one and tokenizer.json adds none; else the
    latter's rule stands, as in transformers 5.
    """
    bos = backend.token_to_id(special_tokens.get("bos_token", ""))
    if not config.get("add_bos_token") or bos is None:
        return
    if bos in encode_ids(backend, "", add_special_tokens=True):
        return
    template = _template(backend, {"add_bos_token": True}, special_tokens)
    own = backend.post_processor
    backend.post_processor = processors.Sequence([own, template]) if own else template


def _template(
    backend: tokenizers.Tokenizer, config: dict[str, Any], special_tokens: dict[str, str]
) -> Any:
    """A post-processor that puts BOS and EOS as tokenizer_config.json asks."""
    bos = special_tokens.get("bos_token") if config.get("add_bos_token") else None
    eos = special_tokens.get("eos_token") if config.get("add_eos_token") else None
    pattern = [*([f"{bos}:0"] if bos else []), "$A:0", *([f"{eos}:0"] if eos else [])]
    used = [(token, backend.token_to_id(token)) for token in (bos, eos) if token]
    return processors.TemplateProcessing(
        single=pattern, pair=[*pattern, "$B:1"], special_tokens=used
    )


def _decode_rule(backend: tokenizers.Tokenizer, path: Path) -> DecodeRule:
    # Pickling a decoder alone spares serializing the vocabulary.
    decoder = json.loads(backend.decoder.__getstate__()) if backend.decoder else None
    kind = (decoder or {}).get("type")
    steps = decoder["decoders"] if decoder and kind == "Sequence" else []
    names = [step["type"] for step in steps]
    if kind == "ByteLevel" or names == ["ByteLevel"]:
        return DecodeRule(byte_level=True, byte_fallback=False, strip_left=0)
    if names[:3] == ["Replace", "ByteFallback", "Fuse"] and names[3:] in ([], ["Strip"]):
        strip: dict[str, Any] = steps[3] if names[3:] else {"content": " ", "start": 0, "stop": 0}
        if (
            steps[0]["pattern"] == {"String": SPIECE_SPACE}
            and strip["content"] == " "
            and strip["stop"] == 0
        ):
            return DecodeRule(byte_level=False, byte_fallback=True, strip_left=strip["start"])
    raise ConfigError(
        f"{path}: decoder {names or kind} is not of the Llama family; "
        "a byte-level BPE or a sentencepiece tokenizer with byte fallback is needed"
    )


def _eos_token_ids(
    path: Path,
    model_config: dict[str, Any],
    backend: tokenizers.Tokenizer,
    special_tokens: dict[str, str],
) -> list[int]:
    """Union of generation_config.json, config.json and the tokenizer's own."""
    found: list[int] = []
    for source in (read_json(path / "generation_config.json"), model_config):
        value = source.get("eos_token_id")
        found += [v for v in (value if isinstance(value, list) else [value]) if type(v) is int]
    own = backend.token_to_id(special_tokens.get("eos_token", ""))
    return [*found, *([own] if own is not None else [])]
