"""Stop strings, found wherever the text is cut."""

from __future__ import annotations

import random

import pytest

from chunkllama.text.detokenizer import StopChecker
from chunkllama.text.partial_match import partial_end


def run(stops: list[str], pieces: list[str], include: bool = False) -> tuple[str, str | None]:
    checker = StopChecker(stops, include)
    sent = ""
    for piece in pieces:
        text, matched = checker.feed(piece)
        sent += text
        if matched:
            return sent, matched
    return sent + checker.flush(), None


@pytest.mark.parametrize(
    ("stops", "text", "include", "expected"),
    [
        ([], "abc", False, ("abc", None)),
        (["x"], "abc", False, ("abc", None)),
        (["bc"], "abcd", False, ("a", "bc")),
        (["bc"], "abcd", True, ("abc", "bc")),
        (["abc", "b"], "abc", False, ("a", "b")),
        (["cd", "bcd"], "abcde", False, ("a", "bcd")),
        (["aab"], "aaaab", False, ("aa", "aab")),
        (["\n\nUser:"], "hi\n\nUse", False, ("hi\n\nUse", None)),
        (["🤖"], "ok 🤖!", False, ("ok ", "🤖")),
    ],
)
def test_whole_and_cut_anywhere(stops, text, include, expected):
    assert run(stops, [text], include) == expected
    assert run(stops, list(text), include) == expected
    for cut in range(len(text)):
        assert run(stops, [text[:cut], text[cut:]], include) == expected


def test_the_result_never_depends_on_the_pieces():
    rng = random.Random(1)
    for _ in range(3000):
        text = "".join(rng.choice("ab") for _ in range(rng.randrange(12)))
        stops = ["".join(rng.choice("ab") for _ in range(rng.randrange(1, 5))) for _ in range(3)]
        cuts = sorted(rng.randrange(len(text) + 1) for _ in range(3))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        include = rng.random() < 0.5
        assert run(stops, pieces, include) == run(stops, [text], include)


def test_what_is_held_is_the_longest_end_that_begins_a_stop_string():
    rng = random.Random(2)
    for num_stops in [1, 2, 5, 200] * 100:
        lengths = (rng.randrange(1, 9) for _ in range(num_stops))
        stops = ["".join(rng.choice("abc") for _ in range(length)) for length in lengths]
        text = "".join(rng.choice("abc") for _ in range(rng.randrange(12)))
        sent, _ = StopChecker(stops, include=False).feed(text, may_stop=False)
        assert len(text) - len(sent) == max(partial_end(text, stop) for stop in stops)


def test_nothing_of_a_stop_string_is_sent_before_it_is_decided():
    checker = StopChecker(["STOP"], include=False)
    assert [checker.feed(c)[0] for c in "xSTO"] == ["x", "", "", ""]
    assert checker.feed("n") == ("STOn", None)
    assert checker.flush() == ""


def test_a_stop_string_that_may_not_stop_passes_for_good():
    checker = StopChecker(["b", "abc"], include=False)
    assert checker.feed("ab", may_stop=False) == ("", None)  # "abc" may follow
    assert checker.feed("x") == ("abx", None)
    assert checker.feed("b") == ("", "b")


def test_a_stop_string_may_begin_where_none_may_stop():
    checker = StopChecker(["abc"], include=False)
    assert checker.feed("xab", may_stop=False) == ("x", None)
    assert checker.feed("c") == ("", "abc")
