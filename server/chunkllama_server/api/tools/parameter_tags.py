"""The tags of calls that have one for each parameter, as model families write them."""

from __future__ import annotations

from dataclasses import dataclass, field

import regex

# A tag that is not closed within so many characters is none.
_MAX_TAG = 512


@dataclass(frozen=True, slots=True)
class ParameterTags:
    """The tags of one call.

    Attributes:
        parameter: expression of what stands before a value; possessive, so that a tag that is not
            closed is read once. A group ``string`` says that the value is text.
        begun: the beginnings of such a tag; a value behind one without a name is left out.
        close: ends a value.
        ends: end the call and belong to it.
        others: end a value whose own tag is missing.
        trims: a line's end at either end of a value belongs to the tags.
        value_ends: all that ends a value.
        value_end: an expression of these.
        max_held: so many characters at a text's end may be a line's end and the beginning of a tag.
    """

    parameter: regex.Pattern[str]
    begun: tuple[str, ...]
    close: str
    ends: tuple[str, ...]
    others: tuple[str, ...] = ()
    trims: bool = True
    value_ends: tuple[str, ...] = field(init=False)
    value_end: regex.Pattern[str] = field(init=False)
    max_held: int = field(init=False)

    def __post_init__(self) -> None:
        ends = (self.close, *self.begun, *self.ends, *self.others)
        object.__setattr__(self, "value_ends", ends)
        object.__setattr__(self, "value_end", regex.compile("|".join(map(regex.escape, ends))))
        object.__setattr__(self, "max_held", max(map(len, ends)))

    def match(self, text: str) -> regex.Match[str] | None:
        """A parameter's tag that a text begins with; partial where its end may still come."""
        found = self.parameter.match(text[:_MAX_TAG], partial=True)
        is_open = found is not None and found.partial and len(text) >= _MAX_TAG
        return None if is_open else found


# Qwen3-Coder, Seed-OSS, MiniMax.
PARAMETER = ParameterTags(
    regex.compile(r'<parameter(?:=|\s++name=)\s*+"?(?P<key>[^"<>\n]++)"?[^<>\n]*+>'),
    begun=("<parameter=", "<parameter "),
    close="</parameter>",
    ends=("</function>", "</invoke>"),
    others=("</tool_call>",),
)
# DeepSeek V3.2: a text has ``string="true"`` and no edge.
_DSML = "｜DSML｜"
DSML = ParameterTags(
    regex.compile(
        rf'<{_DSML}parameter\s++name=\s*+"?(?P<key>[^"<>\n]++)"?'
        r'(?P<string>\s++string="true")?[^<>\n]*+>'
    ),
    begun=(f"<{_DSML}parameter ",),
    close=f"</{_DSML}parameter>",
    ends=(f"</{_DSML}invoke>",),
    others=(f"</{_DSML}function_calls>", f"</{_DSML}tool_calls>"),
    trims=False,
)
# GLM 4.5 to 4.7: the name of a parameter and its value have a tag each.
KEY_AND_VALUE = ParameterTags(
    regex.compile(r"<arg_key>\s*+(?P<key>[^<>\n]++)</arg_key>\s*+<arg_value>"),
    begun=("<arg_key>",),
    close="</arg_value>",
    ends=(),
    others=("</tool_call>",),
    trims=False,
)


def tags_behind(tag: str) -> ParameterTags:
    """The tags of the call that begins with a tag, or that one follows whose name begins it."""
    if tag.startswith(f"<{_DSML}"):
        return DSML
    return PARAMETER if tag.startswith(("<function=", "<invoke")) else KEY_AND_VALUE
