"""GPT-2's alphabet: each byte a printable character (openai/gpt-2, encoder.py)."""

from __future__ import annotations

from typing import Final


def _bytes_to_unicode() -> dict[int, str]:
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


CHAR_OF_BYTE: Final = _bytes_to_unicode()
BYTE_OF_CHAR: Final = {char: byte for byte, char in CHAR_OF_BYTE.items()}
