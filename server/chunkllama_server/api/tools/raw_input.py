"""Read the input of a custom tool where the whole answer is that input."""

from __future__ import annotations

import json

from chunkllama_server.api.tools.parsers import CallDelta, Parsed

# The member of a custom tool's arguments that holds its input.
CUSTOM_INPUT = "input"
_BEGIN = f'{{"{CUSTOM_INPUT}": "'


class RawInput:
    """All text is the input of one call.

    Args:
        name: the custom tool.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._is_begun = False

    def feed(self, text: str) -> Parsed:
        if not text:
            return Parsed()
        return Parsed([*self._begin(), CallDelta(0, None, json.dumps(text)[1:-1])])

    def finish(self) -> Parsed:
        return Parsed([*self._begin(), CallDelta(0, None, '"}')])

    def _begin(self) -> list[str | CallDelta]:
        if self._is_begun:
            return []
        self._is_begun = True
        return [CallDelta(0, self._name, ""), CallDelta(0, None, _BEGIN)]
