"""Lead the references of a JSON schema to their places, in the one form that a grammar reads.

Writers refer by names that no URI has (``Page[Item]``), by anchors and identifiers, and, where one
schema was put inside another, from the inner one's root. Nothing is fetched.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import quote, unquote

from chunkllama.digits import whole_number
from chunkllama_server.api.common.schema_keywords import map_parts

Steps = tuple[str, ...]
# References that are written as they are read.
_PLAIN = re.compile(r"#(?:/[A-Za-z0-9._$-]*)*")
_DEFINITIONS = frozenset(("$defs", "definitions"))


def follow(root: Any, reference: str) -> Any:
    """What a reference of the form ``#/$defs/Name`` names; None if there is no such place."""
    steps = _steps(reference)
    return None if steps is None else _walk(root, tuple(map(unquote, steps)))


def name_of(reference: str) -> str:
    """The last step of a reference."""
    steps = _steps(reference)
    return unquote(steps[-1]) if steps else ""


def written(steps: Steps) -> str:
    """The reference to the place that some steps lead to."""
    parts = (step.replace("~", "~0").replace("/", "~1") for step in steps)
    return "#" + "".join("/" + quote(part, safe="~!$&'()*+,;=:@") for part in parts)


def _steps(reference: str) -> Steps | None:
    if reference in ("", "#"):
        return ()
    if not reference.startswith("#/"):
        return None
    steps = reference[2:].split("/")
    return tuple(step.replace("~1", "/").replace("~0", "~") for step in steps)


def _walk(node: Any, steps: Steps) -> Any:
    for step in steps:
        if isinstance(node, list):
            index = whole_number(step)
            node = node[index] if index is not None and index < len(node) else None
        else:
            node = node.get(step) if isinstance(node, dict) else None
    return node


class References:
    """The places of a schema that references may lead to by names."""

    def __init__(self, root: Any) -> None:
        self._root = root
        self._named: dict[str, Steps] = {}
        # Inner schemas that have definitions, with their places.
        self._scopes: list[tuple[Steps, dict[str, Any]]] = []
        self._note(root, ())

    def _note(self, node: Any, path: Steps) -> None:
        if not isinstance(node, dict):
            return
        for key, mark in (("$anchor", "#"), ("$dynamicAnchor", "#"), ("$id", ""), ("id", "")):
            if isinstance(name := node.get(key), str) and name:
                self._named.setdefault(mark + name.removesuffix("#"), path)
        if path and _DEFINITIONS & node.keys():
            self._scopes.append((path, node))

        def note(part: Any, place: Steps) -> None:
            self._note(part, (*path, *place))

        map_parts(node, note)

    def place(self, reference: str, path: Steps) -> str | None:
        """The pointer from the root to what a reference at a path names; None if nothing is there.

        A pointer that leads nowhere from the root is read from the schemas around it.
        """
        if reference in self._named:
            return written(self._named[reference])
        identifier, _, pointer = reference.partition("#")
        steps = _steps(f"#{pointer}")
        if steps is None or (identifier and identifier not in self._named):
            return None
        own = self._named.get(identifier, ())
        for read in dict.fromkeys((steps, tuple(map(unquote, steps)))):
            if _walk(self._root, (*own, *read)) is not None:
                return reference if _PLAIN.fullmatch(reference) else written((*own, *read))
            for scope, node in reversed(self._scopes):
                if _walk(node, read) is not None and path[: len(scope)] == scope:
                    return written((*scope, *read))
        return None
