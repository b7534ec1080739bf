"""Consoles for what commands print: names of files and models are text, not rich's markup."""

from __future__ import annotations

from rich.console import Console

_FILE_WIDTH = 150  # columns; a log file has no width of its own


def make_console(*, stderr: bool = False) -> Console:
    """Make a console for stdout or stderr that prints texts as they are."""
    console = Console(stderr=stderr, markup=False, emoji=False, highlight=False)
    if not console.is_terminal:
        console.width = max(console.width, _FILE_WIDTH)
    return console
