"""Random texts for tokenizers: many scripts, emoji sequences, code, runs of blanks, digits, control
characters and look-alikes of tokens.

``tests/conftest.py`` makes this file importable as ``random_texts`` anywhere under tests/.
"""

from __future__ import annotations

import random

_SCRIPTS = [
    *((0x20, 0x7E), (0xA1, 0x24F), (0x370, 0x3FF), (0x400, 0x4FF), (0x5D0, 0x5EA), (0x600, 0x6FF)),
    *((0x900, 0x97F), (0xE00, 0xE5B), (0x1100, 0x11FF), (0x1E00, 0x1EFF), (0x1F00, 0x1FFF)),
    *((0x2000, 0x206F), (0x2100, 0x22FF), (0x2C00, 0x2D2D), (0x3000, 0x30FF), (0x4E00, 0x9FFF)),
    *((0xA640, 0xA7FF), (0xAB30, 0xABBF), (0xAC00, 0xD7A3), (0xFE00, 0xFE0F), (0xFB00, 0xFB17)),
    *((0xFF00, 0xFFEF), (0x10400, 0x1044F), (0x1D400, 0x1D4FF), (0x1F300, 0x1F64F)),
    *((0x1F900, 0x1F9FF), (0x20000, 0x20100), (0x300, 0x36F), (0xE000, 0xE010)),
]
_JOINED = (
    "the quick brown Fox don't I'LL we've café naïve Straße import return self.x == None {} [] -> "
    "=> != </s> <s> [INST] <0x0A> ▁ ▁▁ 0 7 42 1234 1234567 3.14159 1e-5 0xFF ½ Ⅷ ² 你好 世界 "
    "こんにちは 안녕하세요 привет مرحبا שלום नमस्ते สวัสดี 👩‍👩‍👧‍👦 👍🏽 🇩🇪 e\u0301 \u200b \u200d "
    "\ufeff \u00a0 \u2028 \x00 \x07 \x1b[0m def f(x): camelCase HTTPServer ABCdef "
    "https://x.yz/?q=1 "
    "#include<stdio.h> $\\alpha$ a/b// ....... !!! 。，、「」 \u2018x\u2019"
)
_WORDS = _JOINED.split(" ")
_BLANKS = [" ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", " \n ", "    ", "        ", "\u3000", ""]
_FIXED = [
    "",
    " ",
    "  ",
    "\n",
    " a",
    "a ",
    "\x00",
    "é",
    "e\u0301",
    "don't",
    "12345678",
    "x\r\n\r\ny",
]


def random_texts(count: int, seed: int) -> list[str]:
    """``count`` texts that are a pure function of ``seed``."""
    choose = random.Random(seed)
    texts = list(_FIXED)
    while len(texts) < count:
        parts = []
        for _ in range(choose.choice([1, 2, 3, 5, 8, 15])):
            kind = choose.random()
            if kind < 0.45:
                parts.append(choose.choice(_WORDS))
            elif kind < 0.75:
                low, high = choose.choice(_SCRIPTS)
                letters = (chr(choose.randint(low, high)) for _ in range(choose.randint(1, 6)))
                parts.append("".join(letters))
            elif kind < 0.9:
                parts.append(choose.choice(_BLANKS))
            else:
                digits = (choose.choice("0123456789") for _ in range(choose.randint(1, 9)))
                parts.append("".join(digits))
            if choose.random() < 0.5:
                parts.append(choose.choice(_BLANKS))
        texts.append("".join(parts))
    return texts
