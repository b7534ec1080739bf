"""The built-in texts of ``chunkllama verify``."""

from __future__ import annotations

from typing import Final

PROSE: Final = """\
A shared system prompt is computed once and read by every request that begins with it. The server \
keeps the keys and values of each prompt in chunks of fixed size, and the chunks in a tree: two \
prompts that begin alike share the chunks of their common beginning, and part where they differ.

In the year 1859 a man named Edwin Drake drilled a well of 69 feet in Titusville, Pennsylvania. It \
gave about 25 barrels a day. Within two years the price of a barrel had fallen from 20 dollars to \
10 cents, and the valley was full of derricks.

def fibonacci(n: int) -> list[int]:
    values = [0, 1]
    while len(values) < n:
        values.append(values[-1] + values[-2])
    return values[:n]

Water boils at 100 degrees Celsius at sea level, but at about 93 degrees in Denver, which lies \
1,609 metres higher. Cooks there add a few minutes to every recipe. The reason is simple: a liquid \
boils when the pressure of its vapour equals the pressure of the air above it, and there is less \
air above a mountain than above a beach.

Q: What is the capital of Australia?
A: Canberra. It was founded in 1913 as a compromise between Sydney and Melbourne.

{"name": "verify", "checks": ["tokenizer", "numbers"], "tolerance": 2e-4, "passed": true}
"""

SAMPLES: Final = [
    "",
    " ",
    "Hello, world!",
    " leading and trailing ",
    "two  spaces,   three,\ttabs\n\nand lines\r\n",
    "don't I'LL we've O'Brien's",
    "12345 3.14159 1e-5 0xFF 1,000,000 ½ ² Ⅷ",
    "naïve café Straße e\u0301 Ångström",
    "Привет, мир! Γειά σου Κόσμε",
    "你好世界。こんにちは、世界！안녕하세요",
    "مرحبا بالعالم שלום עולם",
    "नमस्ते दुनिया สวัสดีชาวโลก",
    "👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 🇩🇪 🤖",
    "for (int i = 0; i < n; ++i) { a[i] += b[i]; } // loop",
    "https://example.org/a?b=1&c=2#d <html>&nbsp;</html>",
    "camelCase HTTPServer snake_case SCREAMING_CASE kebab-case",
    "\u200b\ufeff\u00a0\u2028\x07 control",
    "▁underscores▁ <0x0A> Ġword",
    "....... !!! ??? ((( ]]] --- ___ === ///",
    PROSE,
]
