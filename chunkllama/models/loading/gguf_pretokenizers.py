"""How byte-level BPE vocabularies split a text into words, by the names that llama.cpp gives them
(``tokenizer.ggml.pre``).

The patterns are those of the models' own tokenizer.json files; where llama.cpp approximates one,
because its engine lacks a class of characters, the original stands here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_WORD = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_HAN_AND_HANGUL = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
_HAN_AND_KANA = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_SENTENCE = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_DEEPSEEK_WORDS = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_BLANKS}"
)
# Code points (hexadecimal) of the letters of scripts that distinguish upper and lower case.
_CASED_LETTERS = (
    "41-5a 61-7a b5 c0-d6 d8-f6 f8-1ba 1bc-1bf 1c4-293 295-2af 370-373 376 377 37b-37d 37f "
    "386 388-38a 38c 38e-3a1 3a3-3f5 3f7-481 48a-52f 531-556 10a0-10c5 13a0-13f5 13f8-13fd "
    "1c90-1cba 1cbd-1cbf 1d00-1d2b 1d6b-1d77 1d79-1d9a 1e00-1f15 1f18-1f1d 1f20-1f45 "
    "1f48-1f4d 1f50-1f57 1f59 1f5b 1f5d 1f5f-1f7d 1f80-1fb4 1fb6-1fbc 1fbe 1fc2-1fc4 "
    "1fc6-1fcc 1fd0-1fd3 1fd6-1fdb 1fe0-1fec 1ff2-1ff4 1ff6-1ffc 2102 2107 210a-2113 2115 "
    "2119-211d 2124 2126 2128 212a-212d 212f-2134 2139 213c-213f 2145-2149 214e 2183 2184 "
    "2c00-2c7b 2c7e-2ce4 2ceb-2cee 2cf2 2cf3 a640-a66d a680-a69b a722-a76f a771-a787 "
    "a78b-a78e ab70-abbf fb00-fb06 fb13-fb17 ff21-ff3a ff41-ff5a 10400-1044f 104b0-104d3 "
    "104d8-104fb 10c80-10cb2 10cc0-10cf2 118a0-118df 1e900-1e943 "
)
_DEEPSEEK_LETTERS = "".join(
    "-".join(chr(int(end, 16)) for end in part.split("-")) for part in _CASED_LETTERS.split()
)


def _words(digits: str, *, letters: str = _WORD, symbols: str = _SYMBOLS) -> str:
    """The pattern of GPT-4 and what was derived from it; ``digits`` says how numbers are cut."""
    return "|".join((_CONTRACTIONS, letters, digits, symbols, _BLANKS))


def _cased(digits: str, suffix: str = "") -> str:
    """Words end where a lower-case letter meets an upper-case one (GPT-4o, Tekken)."""
    start = r"[^\r\n\p{L}\p{N}]?"
    return "|".join(
        (
            f"{start}{_UPPER}*{_LOWER}+{suffix}",
            f"{start}{_UPPER}+{_LOWER}*{suffix}",
            digits,
            r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
            _BLANKS,
        )
    )


_BYTE_LEVEL: Final = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
_DIGITS: Final = {"type": "Digits", "individual_digits": True}


def _split(pattern: str) -> dict[str, Any]:
    regex = {"type": "Split", "pattern": {"Regex": pattern}}
    return {**regex, "behavior": "Isolated", "invert": False}


def _patterns(*patterns: str) -> dict[str, Any]:
    """Cut a text by one pattern after the other, then spell its bytes."""
    return _steps(*map(_split, patterns), {**_BYTE_LEVEL, "use_regex": False})


def _steps(*steps: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(steps)}


@dataclass(frozen=True, slots=True)
class PreTokenizer:
    """What a name of ``tokenizer.ggml.pre`` stands for.

    Attributes:
        steps: ``pre_tokenizer`` of tokenizer.json.
        ignore_merges: a word that is a token is taken whole, before any merge.
        add_bos: BOS comes first where the file does not say.
        is_nfc: texts are normalised to NFC first.
    """

    steps: dict[str, Any]
    ignore_merges: bool = False
    add_bos: bool = False
    is_nfc: bool = False


_LLAMA3 = PreTokenizer(_patterns(_words(r"\p{N}{1,3}")), ignore_merges=True, add_bos=True)
_GPT4 = PreTokenizer(_LLAMA3.steps)
_QWEN2 = PreTokenizer(_patterns(_words(r"\p{N}")), is_nfc=True)
_PLAIN = PreTokenizer({**_BYTE_LEVEL, "use_regex": True})
_NEOX = PreTokenizer(_PLAIN.steps, is_nfc=True)
_SINGLE_DIGITS = PreTokenizer(_steps(_DIGITS, {**_BYTE_LEVEL, "use_regex": True}))
_DEEPSEEK3 = PreTokenizer(_patterns(r"\p{N}{1,3}", _HAN_AND_KANA, _DEEPSEEK_WORDS))
_GPT4O = PreTokenizer(_patterns(_cased(r"\p{N}{1,3}", _CONTRACTIONS + "?")))
_BLOOM = PreTokenizer(_patterns(_SENTENCE))
_BAILING = PreTokenizer(
    _patterns(
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
    )
)
_AYA = PreTokenizer(
    _patterns(r"\d{1,3}(?=(?:\d{3})*\b)", _cased(r"\p{N}{1,3}", _CONTRACTIONS + "?"))
)
_DEFAULT = PreTokenizer(_patterns(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"))


def _named(entry: PreTokenizer, *names: str) -> dict[str, PreTokenizer]:
    return dict.fromkeys(names, entry)


PRE_TOKENIZERS: Final[dict[str, PreTokenizer]] = {
    **_named(_DEFAULT, "default"),
    **_named(_LLAMA3, "llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral"),
    **_named(_LLAMA3, "midm-2.0", "lfm2"),
    **_named(_GPT4, "dbrx", "smaug-bpe", "glm4", "chatglm-bpe"),
    **_named(_QWEN2, "qwen2", "kormo", "megrez"),
    **_named(PreTokenizer(_QWEN2.steps), "deepseek-r1-qwen", "stablelm2", "hunyuan", "grok-2"),
    **_named(PreTokenizer(_QWEN2.steps), "solar-open"),
    "qwen35": PreTokenizer(
        _patterns(
            _words(
                r"\p{N}",
                letters=r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",
                symbols=r" ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*",
            )
        ),
        is_nfc=True,
    ),
    "tekken": PreTokenizer(_patterns(_cased(r"\p{N}")), ignore_merges=True, add_bos=True),
    **_named(_GPT4O, "gpt-4o", "llama4", "kanana2", "minimax-m2"),
    **_named(_AYA, "tiny_aya"),
    **_named(_PLAIN, "gpt-2", "phi-2", "jina-es", "jina-de", "jina-v1-en", "jina-v2-es"),
    **_named(_PLAIN, "jina-v2-de", "jina-v2-code", "gigachat", "a.x-4.0", "mellum", "roberta-bpe"),
    **_named(_PLAIN, "jais", "trillion", "granite-docling", "exaone4", "modern-bert"),
    **_named(_NEOX, "mpt", "olmo"),
    **_named(_SINGLE_DIGITS, "smollm", "starcoder", "refact", "codeshell", "exaone"),
    **_named(_SINGLE_DIGITS, "minerva-7b", "mellum2"),
    "command-r": PreTokenizer(_SINGLE_DIGITS.steps, is_nfc=True),
    "falcon": PreTokenizer(
        _steps(
            {"type": "Punctuation", "behavior": "Contiguous"},
            {**_BYTE_LEVEL, "use_regex": True},
            {"type": "Digits", "individual_digits": False},
            _split("[0-9][0-9][0-9]"),
        )
    ),
    "deepseek-llm": PreTokenizer(
        _steps(
            _split(r"[\r\n]"),
            _split(rf"\s?[{_DEEPSEEK_LETTERS}]+"),
            _split("\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"),
            _split(r"\s+$"),
            _split(_HAN_AND_HANGUL),
            _DIGITS,
            {**_BYTE_LEVEL, "use_regex": False},
        )
    ),
    "deepseek-coder": PreTokenizer(
        _steps(
            _split(r"[\r\n]"),
            _split(r"\s?\p{L}+"),
            _split(r"\s?\p{P}+"),
            _split(_HAN_AND_HANGUL),
            _DIGITS,
            {**_BYTE_LEVEL, "use_regex": False},
        )
    ),
    **_named(_DEEPSEEK3, "deepseek-v3", "hunyuan-dense", "joyai-llm"),
    **_named(_BLOOM, "bloom", "poro-chat", "gpt3-finnish"),
    "viking": PreTokenizer(_steps(_split(_SENTENCE), _DIGITS, {**_BYTE_LEVEL, "use_regex": False})),
    "chameleon": PreTokenizer(
        _patterns(
            "<sentinel:[0-9]+>",
            "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z",
            r"([\t\n]|    |  )",
            r"\p{N}",
            r"[\p{P}!-/:-@\[-`{-~]",
            _GPT2,
        ),
        add_bos=True,
    ),
    **_named(_BAILING, "bailingmoe", "bailingmoe2", "llada-moe"),
    "seed-coder": PreTokenizer(_patterns(_words(r"\p{N}{1}", symbols=r" ?[^\s\p{L}\p{N}\r\n]+"))),
    "superbpe": PreTokenizer(_patterns(r"\p{N}+", r"(?=(\d{3})+(?!\d))")),
    "minicpm5": PreTokenizer(_patterns(r"\p{N}{1,3}", _words(r"\p{N}+")), ignore_merges=True),
    "exaone-moe": PreTokenizer(
        _patterns(
            rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?(?:\p{{L}}\p{{M}}*(?: \p{{L}}\p{{M}}*)*)+"
            r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]?|\s*[\r\n]|\s+(?!\S)|\s+"
        )
    ),
}
