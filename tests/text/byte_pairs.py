"""tiktoken's algorithm, for tests: the ids of a text by the ranks of byte strings.

``tests/conftest.py`` makes this file importable as ``byte_pairs`` anywhere under tests/.
"""

from __future__ import annotations

import regex

LLAMA3 = regex.compile(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def encode_by_rank(ranks: dict[bytes, int], words: regex.Pattern[str], text: str) -> list[int]:
    """Whole words first, else join the pair of lowest rank until none is left."""
    ids: list[int] = []
    for match in words.finditer(text):
        data = match[0].encode()
        parts = [data] if data in ranks else [data[i : i + 1] for i in range(len(data))]
        while len(parts) > 1:
            pairs = [parts[i] + parts[i + 1] for i in range(len(parts) - 1)]
            best = min(range(len(pairs)), key=lambda i: ranks.get(pairs[i], 1 << 30))
            if pairs[best] not in ranks:
                break
            parts[best : best + 2] = [pairs[best]]
        ids += [ranks[part] for part in parts]
    return ids


def alphabet() -> dict[int, str]:
    """The characters in which byte-level vocabularies spell the 256 bytes."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in kept]
    return {b: chr(b) for b in kept} | {b: chr(256 + i) for i, b in enumerate(rest)}
