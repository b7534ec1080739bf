"""The end of a text that may become a tag."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from chunkllama.text.partial_match import partial_end

TEXTS = st.text(alphabet="ab", max_size=8)


@given(TEXTS, TEXTS)
def test_the_longest_end_that_begins_the_tag(text, tag):
    common = [n for n in range(len(tag)) if n <= len(text) and text.endswith(tag[:n])]
    assert partial_end(text, tag) == max(common, default=0)
