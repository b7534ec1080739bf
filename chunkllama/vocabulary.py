"""A bound on the pieces of a vocabulary: the ways to split one are tried, at a quadratic cost."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

from chunkllama.errors import ConfigError

MAX_PIECE: Final = 1024  # characters or bytes; the longest of published models has a few hundred


def check_pieces(pieces: Iterable[str | bytes], path: Path) -> None:
    """Refuse a piece that no tokenizer of a language model has.

    Raises:
        ConfigError: one is longer than ``MAX_PIECE``.
    """
    for index, piece in enumerate(pieces):
        if len(piece) > MAX_PIECE:
            raise ConfigError(
                f"{path}: token {index} is {len(piece):,} long, of at most {MAX_PIECE:,}; "
                "download the file again"
            )
