"""Check that code and documentation use plain technical English, by a list of phrases to avoid."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PATTERNS = ("*.py", "*.md", "*.h", "*.cpp", "*.cuh", "*.yaml")
MAX_HITS_PER_1000_LINES = 0.5

# Figures of speech, and what to write instead. Matched as whole words, ignoring case, also across
# the line ends of wrapped prose.
PHRASES = {
    # time and continuation
    r"anew": "again, rebuilt, restarted",
    r"for ever": "forever, without bound",
    r"(?:goes?|went|going) on (?:to|until|till|from|with|where|living)": "continues",
    r"others go on": "other requests continue",
    r"on (?:its|their) way": "pending",
    r"(?:for|after) so long": "for this many seconds, expires after",
    r"so long as": "while",
    r"starting again does not": "a restart will not",
    r"stops? now": "exits immediately",
    r"what is left then": "the remaining streams",
    # unnamed agents
    r"nobody": "no request, no client, no thread",
    r"whoever": "name the component",
    r"whatever": "any, regardless of, what",
    r"dear": "expensive, slow",
    r"vouch(?:es)? for": "untrusted",
    r"a stranger(?:'s)?|strangers": "untrusted, unauthenticated client",
    r"newcomers?": "new request, new user",
    # things that speak
    r"tells? (?:of|by)": "reports, reveals",
    r"told (?:of|once|anew|in one line)": "reported",
    r"(?:is|are) told": "gets, receives",
    r"says of": "lists, documents",
    r"what the model says": "model output",
    r"0,? or a bug": "non-zero indicates a bug",
    # giving, taking, healing
    r"given up|gives? up|giving up": "abandoned, disconnected, refused",
    r"gives? way|giving way": "is preempted, yields",
    r"(?:lets?|letting) go of": "releases",
    r"is forgotten": "expires",
    r"heals?|mends?|mended": "fixes",
    r"stumbl(?:e|es|ed|ing)": "fails",
    r"mint(?:s|ed|ing)?": "makes, generates",
    r"(?:taken|takes|take) over": "reuses",
    r"tokens join|sequences end|chunks are shown": "append tokens, finish sequences",
    # places
    r"at hand": "available",
    r"as (?:it stands|they stand)": "unchanged",
    r"(?:hangs?|hung) below": "is a descendant of",
    r"at first sight": "on first use",
    r"doors?": "entry point",
    r"the house itself|house rules?": "code layout, repository rules",
    r"rooms": "packages",
    r"room is short|the room that is left": "under memory pressure, free chunks",
    r"amid|midst": "within, mid-unit",
    # likeness and manner
    r"twins?": "duplicate, counterpart",
    r"surely": "delete it",
    r"are apart": "are isolated",
    r"standstill": "deadlock",
    r"for want of": "due to insufficient",
    r"in spite of": "despite",
    r"becomes? of": "is handled",
    r"plays tenants": "simulates tenants",
}
PATTERN = re.compile(
    r"\b(?:" + "|".join(f"(?:{phrase})" for phrase in PHRASES).replace(" ", r"[\s#*/]+") + r")\b",
    re.IGNORECASE,
)


def replacement(found: str) -> str:
    """Return what to write instead of a matched phrase."""
    plain = re.sub(r"[\s#*/]+", " ", found)
    return next(new for old, new in PHRASES.items() if re.fullmatch(old, plain, re.IGNORECASE))


def hits(text: str) -> list[tuple[int, str]]:
    """Return (line number, phrase) of every hit in a text."""
    return [(text.count("\n", 0, m.start()) + 1, m[0]) for m in PATTERN.finditer(text)]


def tracked_texts() -> dict[Path, str]:
    """Return path and text of every tracked file of the checked kinds, this one excluded."""
    listing = subprocess.run(
        ["git", "ls-files", *PATTERNS], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    paths = [ROOT / line for line in listing.splitlines()]
    return {p: p.read_text() for p in paths if p.is_file() and p != Path(__file__).resolve()}


def test_prose_is_plain() -> None:
    """A few hits are allowed by rate, for words that are correct in context."""
    texts = tracked_texts()
    num_lines = sum(text.count("\n") for text in texts.values())
    found = [
        f"{path.relative_to(ROOT)}:{line}: {phrase!r}: write {replacement(phrase)!r}"
        for path, text in texts.items()
        for line, phrase in hits(text)
    ]
    rate = 1000 * len(found) / num_lines
    assert rate < MAX_HITS_PER_1000_LINES, "\n".join(
        [f"{rate:.2f} hits per 1,000 lines, allowed {MAX_HITS_PER_1000_LINES}", *found]
    )


@pytest.mark.parametrize(
    "sentence",
    [
        "It runs on CPUs as it stands",
        "admits by the room that is left in the pool",
        "docs/http.md says of every field",
        "cold: nobody has seen the prefix",
        "sequences let go of their chunks",
        "the one door to an engine",
        "Whatever is wrong is told in one line",
        "A second signal stops now",
        "which starting again does not heal",
        "A shared cache tells by its timing",
        "their own chunks hang\n# below it",
        "a client is given\nup after so long",
        "what becomes of it",
        "It plays tenants",
        "nobody overtakes it for ever",
        "the newest gives way",
        "has to be told anew",
        "Where room is short, more is given up",
        "made at first sight",
        "computed chunks are shown, tokens join, sequences end",
        "0, or a bug",
        "schemas that are dear to compile",
    ],
)
def test_the_list_finds(sentence: str) -> None:
    assert hits(sentence)
    assert all(replacement(phrase) for _, phrase in hits(sentence))


@pytest.mark.parametrize(
    "sentence",
    [
        "The queue stops when no chunk is free.",
        "`outdoors`, `mushrooms` and `amidst_x` are other words.",
        "Requests continue after a restart.",
    ],
)
def test_the_list_ignores(sentence: str) -> None:
    assert not hits(sentence)
