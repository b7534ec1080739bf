"""How a model writes calls: its family, its tags, and the form that its template prints."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

import regex

from chunkllama.text.template_capabilities import TemplateCapabilities
from chunkllama.text.tokenizer import Tokenizer
from chunkllama_server.api.tools.families import (
    FAMILY_TAGS,
    CallTags,
    all_tags,
    set_of_tags,
    special_tags,
    tool_family,
)
from chunkllama_server.config.server import ToolFamily as Family


@dataclass(frozen=True, slots=True)
class CallFormat:
    """How the model writes calls.

    Attributes:
        family: decides the form of calls in a grammar.
        tags: what begins and ends calls in the output.
        special: the tags that are special tokens, by id; decoding has to show them.
        token_ids: of the tags that are one token each. The grammar library takes such a token for
            another thing than its text.
        markers: tags that the template prints around an earlier call; they decide between the forms
            of one family.
    """

    family: Family = "hermes"
    tags: CallTags = FAMILY_TAGS["hermes"]
    special: Mapping[int, str] = field(default_factory=dict)
    token_ids: Mapping[str, int] = field(default_factory=dict)
    markers: frozenset[str] = frozenset()

    def literal(self, text: str) -> str:
        """A text as a Lark grammar has it, its tags by their ids where they are one token."""
        ids = self.token_ids
        terminals = (
            f"<[{ids[part]}]>" if part in ids else json.dumps(part, ensure_ascii=False)
            for part in self.parts(text)
            if part
        )
        return " ".join(terminals)

    def parts(self, text: str) -> list[str]:
        """A text cut at the tags that are one token; the first part, maybe empty, has none."""
        tags = sorted(map(regex.escape, self.token_ids), key=len, reverse=True)
        return regex.split(f"({'|'.join(tags)})", text) if tags else [text]


def call_format(
    configured: Family | None, able: TemplateCapabilities | None, tokenizer: Tokenizer
) -> CallFormat:
    """The form of the model's calls; a configured family restricts reading to its own tags."""
    family = tool_family(configured, able, tokenizer)
    tags = FAMILY_TAGS[family] if configured is not None else all_tags(family)
    known = set_of_tags(tags)
    token_ids = {
        tag: i for tag in known if (i := tokenizer.token_id(tag)) in tokenizer.added_tokens
    }
    markers = {*token_ids, *(able.call_markers if able is not None else ())}
    special = special_tags(tags, tokenizer)
    return CallFormat(family, tags, special, token_ids, frozenset(markers))
