"""Numbers of loaded adapters, by which the tree and the executor know them."""

from __future__ import annotations

from chunkllama.cache.adapter_tags import MAX_ADAPTERS


class AdapterNumbers:
    """Gives each loaded adapter a number from 1.

    A released number is given again as late as possible: what is recorded of earlier prompts, to
    explain cache misses, is keyed by it.
    """

    def __init__(self) -> None:
        self._used: set[int] = set()
        self._last = 0

    @property
    def num_free(self) -> int:
        """How many adapters can get one."""
        return MAX_ADAPTERS - len(self._used)

    def assign(self) -> int:
        """Return a free number for an adapter."""
        assert self.num_free, "no number is free"
        while True:
            self._last = self._last % MAX_ADAPTERS + 1
            if self._last not in self._used:
                self._used.add(self._last)
                return self._last

    def release(self, number: int) -> None:
        """Free the number of an adapter under which no chunk is cached."""
        self._used.remove(number)
