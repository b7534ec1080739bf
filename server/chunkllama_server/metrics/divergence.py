"""Where prompts that are otherwise equal differ early, and what that costs in cache hits.

A timestamp near the start of a system prompt makes everything after it miss the cache. The report
compares each recent prompt with the one of the same cache namespace that shares most of its start.
If the two go on equally after a short difference, the equal rest would have been read from the
cache without it: its tokens are lost.
"""

from __future__ import annotations

import re
from array import array
from collections import defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

MAX_PROMPTS: Final = 2048
MAX_DIFFERENCE: Final = 48  # tokens of a difference after which prompts may be equal again
ANCHOR: Final = 12  # equal tokens that end a difference
LEAST_LOST: Final = 32  # tokens of an equal rest that are worth a report
MAX_ROWS: Final = 20
_SHOWN: Final = 12  # tokens of text

Decode = Callable[[list[int]], str]

_KINDS: Final = (
    ("identifier", re.compile(r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}|[0-9a-fA-F]{16,}")),
    (
        "timestamp",
        re.compile(
            r"\d{1,2}:\d{2}|\d{4}-\d{1,2}-\d{1,2}|\d{1,2}/\d{1,2}/\d{2,4}"
            r"|(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)[a-z]* \d"
            r"|\b\d{10}(?:\d{3})?\b"
        ),
    ),
    ("number", re.compile(r"\d")),
)


@dataclass(frozen=True, slots=True)
class LoggedPrompt:
    """One prompt that ran, and how many of its tokens came from the cache."""

    tenant: str
    namespace: str
    token_ids: array[int]
    num_cached_tokens: int


class PromptLog:
    """The last prompts, up to a number of tokens in all and ``MAX_PROMPTS``."""

    def __init__(self, max_tokens: int) -> None:
        self._max_tokens = max_tokens
        self._prompts: deque[LoggedPrompt] = deque()
        self.num_tokens = 0

    def record(self, tenant: str, namespace: str, token_ids: list[int], num_cached: int) -> None:
        """Add a prompt and drop the oldest beyond the bounds; one over the bound is left out."""
        if len(token_ids) > self._max_tokens:
            return
        self._prompts.append(LoggedPrompt(tenant, namespace, array("i", token_ids), num_cached))
        self.num_tokens += len(token_ids)
        while self.num_tokens > self._max_tokens or len(self._prompts) > MAX_PROMPTS:
            self.num_tokens -= len(self._prompts.popleft().token_ids)

    def prompts(self) -> list[LoggedPrompt]:
        """Return the prompts kept, the oldest first."""
        return list(self._prompts)


@dataclass(slots=True)
class Divergence:
    """Prompts of one tenant that differ at one place and then go on equally.

    Attributes:
        token: index of the first token that differs.
        num_requests: prompts that differ there.
        lost_tokens: tokens behind the difference that would have been cached without it.
        cached_tokens: tokens of these prompts that were cached.
        kind: what differs, by its form: timestamp, identifier, number or text.
        text_before: the end of what the prompts have in common.
        examples: up to three of the texts that differ.
    """

    tenant: str
    token: int
    num_requests: int = 0
    lost_tokens: int = 0
    cached_tokens: int = 0
    kind: str = "text"
    text_before: str = ""
    examples: list[str] = field(default_factory=list)

    @property
    def share(self) -> float:
        """Part of the possible cache hits of these prompts that is lost, in [0, 1]."""
        return self.lost_tokens / max(self.lost_tokens + self.cached_tokens, 1)


def find_divergences(prompts: list[LoggedPrompt], decode: Decode) -> list[Divergence]:
    """Return the costliest divergences, at most ``MAX_ROWS``, the one that loses most first.

    Args:
        prompts: recent prompts of any tenants; only those of one namespace are compared.
        decode: returns the text of token ids.
    """
    groups: dict[tuple[str, str], list[LoggedPrompt]] = defaultdict(list)
    for prompt in prompts:
        groups[prompt.tenant, prompt.namespace].append(prompt)
    rows = [row for group in groups.values() for row in _of_group(group, decode)]
    rows.sort(key=lambda row: -row.lost_tokens)
    return rows[:MAX_ROWS]


def _of_group(group: list[LoggedPrompt], decode: Decode) -> list[Divergence]:
    # neighbours in token order share most of their starts
    ordered = sorted(group, key=lambda prompt: prompt.token_ids.tolist())
    found: dict[tuple[int, ...], tuple[Divergence, list[tuple[array[int], int, int]]]] = {}
    for before, prompt in pairwise(ordered):
        a, b = before.token_ids, prompt.token_ids
        start = _common(a, b, 0, 0)
        if start == min(len(a), len(b)):
            continue
        ends = _resync(a, b, start)
        if ends is None:
            continue
        lost = _common(a, b, *ends)
        if lost < LEAST_LOST:
            continue
        anchor = tuple(b[ends[1] : ends[1] + ANCHOR])
        if anchor not in found:
            found[anchor] = (Divergence(prompt.tenant, start), [])
        row, places = found[anchor]
        row.num_requests += 1
        row.lost_tokens += max(lost - max(prompt.num_cached_tokens - ends[1], 0), 0)
        row.cached_tokens += prompt.num_cached_tokens
        row.token = min(row.token, start)  # by chance some differences begin with equal tokens
        places.append((b, start, ends[1]))
    rows = []
    for row, places in found.values():
        if row.lost_tokens >= LEAST_LOST:
            row.examples = [_word_at(*place, decode) for place in places[:3]]
            row.kind = _kind(row.examples)
            row.text_before = decode(places[0][0][max(row.token - _SHOWN, 0) : row.token].tolist())
            rows.append(row)
    return rows


def _word_at(ids: array[int], start: int, end: int, decode: Decode) -> str:
    """Return the text of tokens [start, end), to the next spaces on both sides."""
    before = decode(ids[max(start - _SHOWN, 0) : start].tolist())
    after = decode(ids[end : end + _SHOWN].tolist())
    left = before[len(before.rstrip()) :] or before.split()[-1:]
    right = "" if after[:1].isspace() else after.split()[:1]
    return "".join(left).strip() + decode(ids[start:end].tolist()) + "".join(right)


def _kind(texts: list[str]) -> str:
    for name, pattern in _KINDS:
        if all(pattern.search(text) for text in texts):
            return name
    return "text"


def _common(a: array[int], b: array[int], i: int, j: int) -> int:
    """Count the tokens from a[i] and b[j] on that are equal."""
    most = min(len(a) - i, len(b) - j)
    # by doubling, then by halving: slices are compared at once
    equal = 0
    step = 64
    while equal < most:
        size = min(step, most - equal)
        if a[i + equal : i + equal + size] == b[j + equal : j + equal + size]:
            equal += size
            step *= 2
            continue
        if size == 1:
            break
        step = max(size // 2, 1)
        most = min(most, equal + size)
    return equal


def _resync(a: array[int], b: array[int], start: int) -> tuple[int, int] | None:
    """Return where two prompts that differ at ``start`` are equal again, the nearest place."""
    places: dict[bytes, int] = {}
    for i in range(start, min(start + MAX_DIFFERENCE, len(a) - ANCHOR) + 1):
        places.setdefault(a[i : i + ANCHOR].tobytes(), i)
    for j in range(start, min(start + MAX_DIFFERENCE, len(b) - ANCHOR) + 1):
        i = places.get(b[j : j + ANCHOR].tobytes(), -1)
        if i >= 0:
            return i, j
    return None
