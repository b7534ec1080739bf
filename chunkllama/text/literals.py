"""Strings of users that spell control tokens: sentinels stand for them while a template renders."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from chunkllama.rests import rest
from chunkllama.text.sandbox import strings_in


class ControlText:
    """Control tokens as strings, and the pieces of them that could meet to form one."""

    def __init__(self, controls: Iterable[str]) -> None:
        # Longest first: where one control token begins another, the tokenizer matches the longer.
        ordered = sorted(controls, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, ordered)) or r"(?!)")
        self._heads = {token[:n] for token in ordered for n in range(1, len(token))}
        self._tails = {token[n:] for token in ordered for n in range(1, len(token))}
        self._longest = max(map(len, ordered), default=0)

    def replace(self, text: str, sentinel: Callable[[str], str]) -> str:
        """Replace whole control tokens, a beginning of one at the text's end and an end of one at
        its beginning.

        Templates join strings and trim them, so white space at either end does not separate.
        """
        text = self.pattern.sub(lambda match: sentinel(match[0]), text)
        body = text.rstrip()
        for size in range(min(self._longest, len(body)), 0, -1):
            if body[-size:] in self._heads:
                cut = len(body) - size
                text = body[:cut] + sentinel(body[cut:]) + text[len(body) :]
                break
        body = text.lstrip()
        for size in range(min(self._longest, len(body)), 0, -1):
            if body[:size] in self._tails:
                lead = text[: len(text) - len(body)]
                return lead + sentinel(body[:size]) + body[size:]
        return text


class Literals:
    """Hide control-token strings of one conversation behind sentinels that it does not
    contain."""

    def __init__(self, control_text: ControlText, inputs: Any) -> None:
        self.hidden: list[str] = []
        self._control_text = control_text
        written = "\0".join(strings_in(inputs))
        serial = 0
        while f"literal{serial}x" in written:
            serial += 1
        self._nonce = f"literal{serial}x"

    def hide(self, value: Any) -> Any:
        """A copy of plain data with every string made harmless."""
        if isinstance(value, str):
            rest()
            return self._control_text.replace(value, self._sentinel)
        if isinstance(value, dict):
            # A role is one of a few known words, and templates spell control tokens with it.
            return {
                self.hide(k): v if k == "role" and str(v).isidentifier() else self.hide(v)
                for k, v in value.items()
            }
        if isinstance(value, list | tuple):
            return type(value)(self.hide(item) for item in value)
        return value

    def restore(self, text: str) -> str:
        """The hidden strings back in their places; one may have been hidden inside another's
        sentinel."""
        sentinel = re.compile(self._nonce + r"(\d+)y")
        while (restored := sentinel.sub(lambda m: self.hidden[int(m[1])], text)) != text:
            text = restored
        return text

    def _sentinel(self, literal: str) -> str:
        self.hidden.append(literal)
        return f"{self._nonce}{len(self.hidden) - 1}y"
