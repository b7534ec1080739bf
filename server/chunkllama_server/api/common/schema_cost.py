"""Bound what the grammar of a JSON schema costs at each token, and find schemas without end."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from chunkllama.rests import rest
from chunkllama_server.api.common.forced_runs import MANY, Runs, fixed, free, in_turn, one_of
from chunkllama_server.api.common.grammar_cost import check_size, regex_size
from chunkllama_server.api.common.schema_references import follow
from chunkllama_server.config.limits import DEFAULT_LIMITS, LimitsConfig
from chunkllama_server.transport.errors import exceeded, invalid

# So many characters of names of which any may come next cost what one does that must.
_OPTIONAL_PER_FORCED = 8
# Keywords that become a regular expression of the value, by their part of ``max_joined_texts``.
# A multiple of p has p states, and of p and q together p times q.
_TEXT_KEYWORDS = {"pattern": 1, "format": 1, "minLength": 1, "maxLength": 1, "multipleOf": 5}


class _SchemaSize:
    """The text a JSON schema forces, following its references once each.

    Raises:
        ApiError: 400 when it has too many parts, or is nothing but references to itself.
    """

    def __init__(self, root: Any, limits: LimitsConfig, param: str) -> None:
        self._root = root
        self._limits = limits
        self._param = param
        self._open: set[int] = set()
        self._known: dict[int, Runs] = {}
        # Those that have a finite text.
        self._ending: set[int] = set()
        self._num_looked_at = 0
        self._num_texts: dict[int, int] = {}

    def forced(self, schema: Any) -> Runs:
        if not isinstance(schema, Mapping) or id(schema) in self._open:
            return free(1)
        if id(schema) not in self._known:
            rest()
            self._open.add(id(schema))
            if len(self._known) + len(self._open) > self._limits.max_schema_work:
                raise exceeded(self._limits, "max_schema_work", self._param)
            self._known[id(schema)] = self._compute(schema)
            self._open.discard(id(schema))
        return self._known[id(schema)]

    def _compute(self, schema: Mapping[str, Any]) -> Runs:
        if "const" in schema:
            return fixed(len(json.dumps(schema["const"])))
        if isinstance(values := schema.get("enum"), list):
            texts = [fixed(len(json.dumps(value))) for value in values]
            return texts[0] if len(texts) == 1 else one_of(texts)
        parts = [*self._joined(schema)]
        if isinstance(pattern := schema.get("pattern"), str):
            forced, expanded = regex_size(pattern)
            is_bounded = expanded <= self._limits.max_expanded_chars
            parts.append(free(forced if is_bounded else MANY))
        if isinstance(schema.get("items"), Mapping):
            count = schema.get("minItems")
            least = count if isinstance(count, int) and count > 0 else 1
            parts.append(self.forced(schema["items"]).then(fixed(1)).times(least))
        if isinstance(properties := schema.get("properties"), Mapping):
            parts += self._members(properties, schema.get("required"))
        if isinstance(others := schema.get("additionalProperties"), Mapping):
            parts.append(one_of([self.forced(others)]))
        if schema.get("type") == "null":
            parts.append(fixed(4))
        return in_turn(parts or [free(1)])

    def _joined(self, schema: Mapping[str, Any]) -> Iterable[Runs]:
        if isinstance(reference := schema.get("$ref"), str):
            yield self.forced(follow(self._root, reference))
        for name in ("anyOf", "oneOf"):
            if isinstance(branches := schema.get(name), list):
                yield one_of(map(self.forced, branches))
        for name in ("allOf", "prefixItems"):
            if isinstance(branches := schema.get(name), list):
                yield from map(self.forced, branches)

    def _members(self, properties: Mapping[str, Any], required: Any) -> Iterable[Runs]:
        listed = required if isinstance(required, list) else []
        names = {name for name in listed if isinstance(name, str)}
        num_optional_chars = 0
        for name, value in properties.items():
            member = fixed(len(name) + 4).then(self.forced(value))
            # One that may be left out begins with a choice.
            yield member if name in names else free(member.longest)
            num_optional_chars += 0 if name in names else len(name) + 4
        if num_optional_chars:
            yield free(num_optional_chars // _OPTIONAL_PER_FORCED)

    def check_joined(self) -> None:
        """Refuse regular expressions whose intersection would take without end to compile."""
        pending, seen = [self._root], set()
        while pending:
            node = pending.pop()
            if isinstance(node, list):
                pending += node
            if not isinstance(node, Mapping) or id(node) in seen:
                continue
            seen.add(id(node))
            pending += node.values()
            if self._num_joined(node) > self._limits.max_joined_texts:
                raise exceeded(self._limits, "max_joined_texts", self._param)
            patterns = node.get("patternProperties")
            most = self._limits.max_pattern_properties
            if isinstance(patterns, Mapping) and len(patterns) > most:
                raise exceeded(self._limits, "max_pattern_properties", self._param)

    def _num_joined(self, schema: Any) -> int:
        """Regular expressions that a value of the schema has to match together, at most."""
        if not isinstance(schema, Mapping):
            return 0
        if id(schema) not in self._num_texts:
            rest()
            self._num_texts[id(schema)] = 0  # of a schema that leads back to itself
            own = sum(
                part  # of a keyword: what a property of its name has is a schema
                for name, part in _TEXT_KEYWORDS.items()
                if isinstance(schema.get(name), str | int | float)
            )
            if isinstance(reference := schema.get("$ref"), str):
                own += self._num_joined(follow(self._root, reference))
            if isinstance(parts := schema.get("allOf"), list):
                own += sum(map(self._num_joined, parts))
            for name in ("anyOf", "oneOf"):
                if isinstance(branches := schema.get(name), list):
                    own += max(map(self._num_joined, branches), default=0)
            self._num_texts[id(schema)] = own
        return self._num_texts[id(schema)]

    def check_ends(self) -> None:
        """Refuse a schema whose references lead back to it before they reach anything else."""
        if self._is_endless(self._root):
            raise invalid(
                "The schema refers to itself without end", self._param, "grammar_too_complex"
            )

    def _is_endless(self, schema: Any) -> bool:
        if not isinstance(schema, Mapping) or id(schema) in self._ending:
            return False
        if id(schema) in self._open:
            return True
        self._num_looked_at += 1
        if self._num_looked_at > self._limits.max_schema_work:
            raise exceeded(self._limits, "max_schema_work", self._param)
        self._open.add(id(schema))
        try:
            leads_back = self._leads_back(schema)
        finally:
            self._open.discard(id(schema))
        if not leads_back:
            self._ending.add(id(schema))
        return leads_back

    def _leads_back(self, schema: Mapping[str, Any]) -> bool:
        """Whether every text of the schema has one of a schema that is being looked at in it."""
        if any(map(self._is_endless, self._parts(schema))):
            return True
        choices = [schema.get(name) for name in ("anyOf", "oneOf")]
        return any(
            isinstance(branches, list) and branches and all(map(self._is_endless, branches))
            for branches in choices
        )

    def _parts(self, schema: Mapping[str, Any]) -> Iterable[Any]:
        """The schemas that each text of a schema follows."""
        if "const" in schema or "enum" in schema:
            return
        if isinstance(reference := schema.get("$ref"), str):
            yield follow(self._root, reference)
        if isinstance(parts := schema.get("allOf"), list):
            yield from parts
        properties, required = schema.get("properties"), schema.get("required")
        if isinstance(properties, Mapping) and isinstance(required, list):
            yield from (properties.get(name) for name in required if isinstance(name, str))
        least = schema.get("minItems")
        if isinstance(least, int) and least > 0:
            first = schema.get("prefixItems")
            yield from first[:least] if isinstance(first, list) else [schema.get("items")]


def check_schema_cost(schema: Any, param: str, limits: LimitsConfig = DEFAULT_LIMITS) -> Runs:
    """Return the runs of characters that a schema forces.

    Raises:
        ApiError: 400 when constants, patterns and minItems force too long a text, when its
            references have no end, or when it joins many patterns.
    """
    try:
        size = _SchemaSize(schema, limits, param)
        runs = size.forced(schema)
        check_size(runs.longest, 0, param, limits)
        size.check_ends()
        size.check_joined()
        return runs
    except RecursionError:  # a chain of references, each to the next
        raise exceeded(limits, "max_schema_work", param) from None
