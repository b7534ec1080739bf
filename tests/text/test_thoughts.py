"""Thoughts told from the answer, however the text is cut into tokens and deltas."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chunkllama.text.thoughts import KNOWN_TAGS, NO_THOUGHTS, Thoughts, ThoughtSplitter, ThoughtTags

THINK = ThoughtTags("<think>", "</think>")
# Text, whether the prompt has opened the thoughts; thoughts and answer.
CASES = [
    ("<think>\nhm\n</think>\n\nParis", False, "hm", "Paris"),
    ("hm\n</think>\n\nParis", True, "hm", "Paris"),
    ("<think>\nhm</think>Paris", True, "hm", "Paris"),
    ("\n <think>a\n\nb  \n c</think> d e ", False, "a\n\nb  \n c", "d e "),
    ("<think></think>Paris", False, "", "Paris"),
    ("<think>\n\n</think>\n\nParis", False, "", "Paris"),
    ("</think>Paris", True, "", "Paris"),
    ("Paris", False, "", "Paris"),
    ("  Paris ", False, "", "  Paris "),
    ("Use <think> and </think>.", False, "", "Use <think> and </think>."),
    ("<think>never ends ", False, "never ends", ""),
    ("never ends </thi", True, "never ends </thi", ""),
    ("<thin", False, "", "<thin"),
    ("<thing>", False, "", "<thing>"),
    ("<think>a</think>b</think>c", False, "a", "b</think>c"),
    ("<think>a</think>b<think>c</think>", False, "a", "b<think>c</think>"),
    ("", False, "", ""),
    ("", True, "", ""),
    ("\n", False, "", "\n"),
]


def split(splitter, pieces):
    thoughts = answer = ""
    for more_thoughts, more in [*map(splitter.feed, pieces), splitter.finish()]:
        assert not (answer and more_thoughts), "thoughts come before the answer"
        thoughts, answer = thoughts + more_thoughts, answer + more
    return thoughts, answer


@pytest.mark.parametrize(("text", "is_open", "thoughts", "answer"), CASES)
def test_thoughts_at_every_split(text, is_open, thoughts, answer):
    expected = (thoughts, answer)
    assert split(ThoughtSplitter(Thoughts(THINK, is_open)), [text]) == expected
    assert split(ThoughtSplitter(Thoughts(THINK, is_open)), text) == expected
    for cut in range(1, len(text)):
        assert (
            split(ThoughtSplitter(Thoughts(THINK, is_open)), [text[:cut], text[cut:]]) == expected
        )


@pytest.mark.parametrize("tags", KNOWN_TAGS)
def test_other_tags(tags):
    text = f"{tags.start}hm{tags.end}yes"
    assert split(ThoughtSplitter(Thoughts(tags)), text) == ("hm", "yes")
    assert split(ThoughtSplitter(NO_THOUGHTS), text) == ("", text)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from(["<think>", "</think>", "<", "think", ">", "/", " ", "\n", "a"]),
        max_size=12,
    ),
    st.booleans(),
    st.data(),
)
def test_any_split_reads_the_same(parts, is_open, data):
    text = "".join(parts)
    cuts = sorted(data.draw(st.sets(st.integers(0, len(text)))))
    pieces = [text[a:b] for a, b in itertools.pairwise([0, *cuts, len(text)])]
    whole = split(ThoughtSplitter(Thoughts(THINK, is_open)), [text])
    assert split(ThoughtSplitter(Thoughts(THINK, is_open)), pieces) == whole
    assert split(ThoughtSplitter(Thoughts(THINK, is_open)), text) == whole


def test_thoughts_stream():
    splitter = ThoughtSplitter(Thoughts(THINK))
    assert splitter.feed("<think>") == ("", "")
    assert splitter.feed("I wonder") == ("I wonder", "")
    assert splitter.feed(" why") == (" why", "")
    assert not splitter.is_answer
    assert splitter.feed("</think>Yes") == ("", "Yes")
    assert splitter.is_answer
