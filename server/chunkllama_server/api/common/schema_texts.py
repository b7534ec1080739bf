"""What a text of a JSON schema has to be like, in expressions that a grammar enforces.

Expressions with look-ahead are rewritten where libraries write them by default, and formats are
narrowed to what the libraries' own types accept: RFC 3339 has leap seconds and durations without
end, and the grammar library a 29 February in every year.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from chunkllama_server.api.common.regex_syntax import rust_syntax

# Years with a 29 February, and all other days.
_LEAP = r"[1-9]\d(?:0[48]|[2468][048]|[13579][26])|(?:[2468][048]|[13579][26])00"
_DAYS = (
    r"(?:0[13578]|1[02])-(?:0[1-9]|[12]\d|3[01])|(?:0[469]|11)-(?:0[1-9]|[12]\d|30)"
    r"|02-(?:0[1-9]|1\d|2[0-8])"
)
_DATE = rf"(?:(?:{_LEAP})-02-29|[1-9]\d{{3}}-(?:{_DAYS}))"
_ZONE = r"(?:Z|[+-](?:[01]\d|2[0-3]):[0-5]\d)"
_CLOCK = rf"(?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d{{1,6}})?{_ZONE}"
_OCTET = r"(?:25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_LABEL = r"[a-z0-9]{1,20}(?:-[a-z0-9]{1,20})?"
_HOST = rf"(?:(?:{_LABEL}\.){{0,3}}[a-z]{{1,20}}|(?:{_OCTET}\.){{3}}{_OCTET})"
# An address whose parts are no longer than mail allows.
_EMAIL = (
    r"^(?:[A-Za-z0-9_'+\-]{1,20}\.){0,2}[A-Za-z0-9_'+\-]{0,20}[A-Za-z0-9_+-]@"
    r"(?:[A-Za-z0-9](?:[A-Za-z0-9\-]{0,30}[A-Za-z0-9])?\.){1,3}[A-Za-z]{2,20}$"
)
FORMAT_PATTERNS: Mapping[str, str] = {
    "date": f"^{_DATE}$",
    "date-time": f"^{_DATE}T{_CLOCK}$",
    "time": rf"^{_CLOCK}$",
    "email": _EMAIL,
    "duration": r"^P(?:T?\d{1,4}[YMWDHS])+$",
}
_HTTP_URL = rf"^https?://{_HOST}(?::\d{{2,4}})?(?:/[A-Za-z0-9._~/?&=%+-]{{0,200}})?$"
# The longest address that pydantic's HttpUrl takes; its schema says nothing else about the scheme.
_HTTP_URL_LENGTH = 2083
# Of zod: the same without look-ahead, or less.
_KNOWN: Mapping[str, str] = {
    # z.email() before 4.5, and since
    r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@"
    r"([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$": _EMAIL,
    r"^(?:[A-Za-z0-9_'+\-]+\.)*[A-Za-z0-9_'+\-]*[A-Za-z0-9_+-]@"
    r"(?:[A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$": _EMAIL,
    # z.hostname()
    r"^(?=.{1,253}\.?$)[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?"
    r"(?:\.[a-zA-Z0-9](?:[-0-9a-zA-Z]{0,61}[0-9a-zA-Z])?)*\.?$": (
        r"^[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,30}[a-zA-Z0-9])?"
        r"(?:\.[a-zA-Z0-9](?:[-0-9a-zA-Z]{0,30}[0-9a-zA-Z])?){0,6}$"
    ),
    # z.iso.duration()
    r"^P(?:(\d+W)|(?!.*W)(?=\d|T\d)(\d+Y)?(\d+M)?(\d+D)?"
    r"(T(?=\d)(\d+H)?(\d+M)?(\d+([.,]\d+)?S)?)?)$": (
        r"^P(?:\d{1,4}W|(?:\d{1,4}Y)?(?:\d{1,4}M)?\d{1,4}D(?:T\d{1,4}H(?:\d{1,4}M)?)?"
        r"|T\d{1,4}H(?:\d{1,4}M)?|T(?:\d{1,4}M)?\d{1,4}S)$"
    ),
}
# Of pydantic before 2.14, for a Decimal: a digit is demanded by look-ahead.
_DECIMAL = r"^(?!^[-+.]*$)[+-]?0*"
_DIGITS = re.compile(r"\\d\{0,([0-9]+)\}")


def enforceable(pattern: str) -> str | None:
    """The expression, or one without assertions that allows no other texts; None if there is
    none."""
    if pattern in _KNOWN:
        return _KNOWN[pattern]
    if pattern.startswith(_DECIMAL):
        return _decimal(pattern.removeprefix(_DECIMAL))
    return rust_syntax(pattern)


def _decimal(rest: str) -> str:
    """A decimal number of as many digits before and behind the point as the rest allows."""
    whole, _, fraction = rest.partition(r"\.")
    before, behind = _DIGITS.search(whole), _DIGITS.search(fraction)
    most, places = (match[1] if match is not None else "15" for match in (before, behind))
    whole = "0" if most == "0" else rf"\d{{1,{most}}}"
    point = "" if places == "0" else rf"(?:\.\d{{1,{places}}})?"
    return f"^[+-]?{whole}{point}$"


def format_pattern(node: Mapping[str, Any]) -> str | None:
    """What a text of the schema's format has to match beside it; None for nothing."""
    if node.get("format") == "uri" and node.get("maxLength") == _HTTP_URL_LENGTH:
        return _HTTP_URL
    name = node.get("format")
    return FORMAT_PATTERNS.get(name) if isinstance(name, str) else None


def other_names(names: Iterable[str], length: int) -> str:
    """An expression of texts of one character to about ``length`` that are none of the names."""
    tree: dict[str, Any] = {}
    for name in names:
        node = tree
        for char in name:
            node = node.setdefault(char, {})
        node[""] = {}
    tree[""] = {}  # no name is empty
    return f"^{_beside(tree, length)}$"


def _beside(node: Mapping[str, Any], length: int) -> str:
    """What may follow the texts that lead to a node, so that they are none of the tree's."""
    chars = sorted(char for char in node if char)
    listed = "".join(rf"\{char}" if char in r"\]^-[&~" else char for char in chars)
    ways = [f"[^{listed}].{{0,{length}}}" if chars else f".{{1,{length}}}"]
    ways += [re.escape(char) + _beside(node[char], length) for char in chars]
    end = "" if "" in node else "?"
    return f"(?:{'|'.join(ways)}){end}"
