"""Read whole numbers of text from outside."""

from __future__ import annotations

_MOST_DIGITS = 18


def whole_number(text: str) -> int | None:
    """The number that 1 to 18 ASCII digits write; None for any other text.

    Python's ``int`` also reads other scripts' digits, signs, blanks and underscores, and raises for
    more than 4,300 digits.
    """
    is_number = text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS
    return int(text) if is_number else None
