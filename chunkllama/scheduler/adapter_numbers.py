"""Numbers of loaded adapters, by which the tree and the executor know them."""

from __future__ import annotations

from chunkllama.cache.adapter_tags import MAX_ADAPTERS, untagged
from chunkllama.cache_messages import EndedPin


class AdapterNumbers:
    """Gives each loaded adapter a number from 1.

    A released number is given again as late as possible: what is recorded of earlier prompts, to
    explain cache misses, is keyed by it.
    """

    def __init__(self) -> None:
        self._names: dict[int, str] = {}
        self._last = 0

    @property
    def num_free(self) -> int:
        """How many adapters can get one."""
        return MAX_ADAPTERS - len(self._names)

    def assign(self, name: str) -> int:
        """Return a free number for an adapter."""
        assert self.num_free, "no number is free"
        while True:
            self._last = self._last % MAX_ADAPTERS + 1
            if self._last not in self._names:
                self._names[self._last] = name
                return self._last

    def release(self, number: int) -> None:
        """Free the number of an adapter under which no chunk is cached."""
        del self._names[number]

    def name_pins(self, pins: list[EndedPin]) -> None:
        """Give pins the names of their adapters, and token ids as the model knows them."""
        for pin in pins:
            pin.adapter = self._names.get(pin.adapter_number, "")
            pin.token_ids = untagged(pin.token_ids)
