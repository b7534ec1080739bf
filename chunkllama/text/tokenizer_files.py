"""The tokenizer files of a model folder: tokenizer.json, or tokenizer.model alone (sentencepiece or
tiktoken), and what tokenizer_config.json and others add to it. Imports no torch.
"""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any, Final, NamedTuple

import tokenizers
from tokenizers import AddedToken, processors

from chunkllama.digits import whole_number
from chunkllama.errors import ConfigError
from chunkllama.text import tiktoken_file
from chunkllama.text.llama_parts import SPIECE_SPACE, as_llama_sentencepiece, is_byte_level
from chunkllama.text.sentencepiece import KEEP_RULES, load_sentencepiece, sentencepiece_defaults

_NAMED_TOKENS: Final = (
    *("bos_token", "eos_token", "unk_token"),
    *("sep_token", "pad_token", "cls_token"),
)


# Characters that a normalizer may make of one; NFKD, which makes most, makes 18.
_MOST_GROWTH: Final = 64
# And what these make of one at most; one of them is in many models beside other steps.
_FORMS: Final = {
    **{"NFC": 3, "NFD": 4, "NFKC": 18, "NFKD": 18},
    **{"Lowercase": 2, "BertNormalizer": 3, "ByteLevel": 4},
}
# A part of a regular expression that is a character: no class in another one, nothing that moves
# the beginning of the match or matches between characters.
_CHARACTER: Final = (
    r"(?:\[\^?+\]?+(?:\\.|[^\[\]\\])*+\]|\\(?:[sSdDwWnrt]|[pP]\{\w+\}|[^\w])|[^\\\[\](){}.*+?^$|])"
)
# One that begins with a character it needs, so that it matches no "": of repeats of repeats, whose
# meaning depends on the dialect, it has none.
_ONE: Final = re.compile(
    rf"{_CHARACTER}(?:\+|\{{[1-9]\d*(?:,(?:[1-9]\d*)?)?\}})?+"
    rf"(?:{_CHARACTER}(?:[*+?]|\{{\d+(?:,\d*)?\}})?+)*+",
    re.DOTALL,
)
_MOST_AROUND: Final = 64  # tokens that a post-processor may put around a text


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


def read_tokenizer_files(
    path: Path,
) -> tuple[tokenizers.Tokenizer, DecodeRule, dict[str, str], list[int]]:
    """Read a model folder: the arguments of ``Tokenizer``.

    Raises:
        ConfigError: there is no tokenizer file, it is unreadable, or of a kind that no Llama-family
            model uses.
        Exception: the files contradict each other; the library has errors of many types.
    """
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
    if (count := backend.num_special_tokens_to_add(False)) > _MOST_AROUND:
        raise ConfigError(
            f"{json_path}: the post-processor puts {count} tokens around a text, at most "
            f"{_MOST_AROUND} are accepted; download the file again"
        )
    rule = _decode_rule(backend, json_path)
    return (
        *(backend, rule, special_tokens),
        _eos_token_ids(path, model_config, backend, special_tokens),
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
        backend = tokenizers.Tokenizer.from_file(str(path))
    except ConfigError:
        raise
    except Exception as error:  # tokenizers raises bare Exception
        raise ConfigError(f"{path} is not a tokenizer this version can read: {error}") from error
    normalizer = json.loads(backend.normalizer.__getstate__()) if backend.normalizer else {}
    if (growth := _growth(normalizer)) > _MOST_GROWTH:
        raise ConfigError(
            f"{path}: the normalizer may make {min(growth, 10**9)} characters of one, at most "
            f"{_MOST_GROWTH} are accepted; use another tokenizer file"
        )
    return backend


def _growth(normalizer: dict[str, Any]) -> int:
    """Return the characters that a normalizer makes of one, at most; of the ``_FORMS``, which only
    together or with other steps have no bound, the largest is not counted."""
    steps = _steps(normalizer)
    free = max((_FORMS.get(str(step.get("type")), 1) for step in steps), default=1)
    return math.prod(map(_growth_of_step, steps)) // free


def _steps(normalizer: dict[str, Any]) -> list[dict[str, Any]]:
    if normalizer.get("type") != "Sequence":
        return [normalizer]
    return [step for each in normalizer["normalizers"] for step in _steps(each)]


def _growth_of_step(step: dict[str, Any]) -> int:
    """Return the characters that a step of a normalizer makes of one, at most; at least 1."""
    match kind := step.get("type"):
        case "Prepend":
            return 1 + len(step["prepend"])
        case "Replace":
            pattern, made = step["pattern"], len(step["content"])
            found = len(pattern.get("String", "")) or bool(_ONE.fullmatch(pattern.get("Regex", "")))
            return max(-(-made // found), 1) if found else 1 + made
        case "Precompiled":
            return max(_longest_text(base64.b64decode(step["precompiled_charsmap"])), 1)
    return _FORMS.get(str(kind), 1)


def _longest_text(table: bytes) -> int:
    """Return the characters of the longest text in sentencepiece's table of characters: the length
    of a trie as u32, the trie, and the texts, each followed by a zero."""
    end = 4 + int.from_bytes(table[:4], "little")
    return max(len(text.decode(errors="replace")) for text in table[end:].split(b"\0"))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, {} where there is none.

    Raises:
        ConfigError: the file is not a JSON object.
    """
    if not path.is_file():
        return {}
    try:
        document = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is not valid JSON ({error}); download the file again") from error
    if not isinstance(document, dict):
        raise ConfigError(f"{path} must hold a JSON object; download the file again")
    return document


def _listed_tokens(config: dict[str, Any]) -> dict[int, str]:
    """Tokens of tokenizer_config.json by their ids."""
    listed = config.get("added_tokens_decoder") or {}
    return {_token_id(index): entry["content"] for index, entry in listed.items()}


def _token_id(index: str) -> int:
    number = whole_number(index)
    if number is None:
        raise ConfigError(
            f"tokenizer_config.json: added_tokens_decoder: {index!r:.60} is no token id; download "
            "the file again"
        )
    return number


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
    missing: list[AddedToken] = []
    for _, entry in sorted(listed.items(), key=lambda item: _token_id(item[0])):
        if entry["content"] not in known:
            missing.append(AddedToken(**{**entry, "special": bool(entry.get("special"))}))
            known.add(entry["content"])
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    extra = list(extra.values()) if isinstance(extra, dict) else extra
    for content in [*special_tokens.values(), *(_content(token) for token in extra)]:
        if content and content not in known:
            missing.append(AddedToken(content, special=True, normalized=False))
            known.add(content)
    add_tokens(backend, missing)


def add_tokens(backend: tokenizers.Tokenizer, tokens: Iterable[AddedToken]) -> None:
    """Add tokens in their order, in as few calls as that takes: each builds the search for all
    added tokens again, and models have thousands."""
    for is_special, run in groupby(tokens, key=lambda token: bool(token.special)):
        (backend.add_special_tokens if is_special else backend.add_tokens)([*run])


def _add_missing_bos(
    backend: tokenizers.Tokenizer, config: dict[str, Any], special_tokens: dict[str, str]
) -> None:
    """Add BOS where tokenizer_config.json asks for one and tokenizer.json adds none; else the
    latter's rule stands, as in transformers 5.
    """
    bos = backend.token_to_id(special_tokens.get("bos_token", ""))
    if not config.get("add_bos_token") or bos is None:
        return
    if bos in backend.encode("", add_special_tokens=True).ids:
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
