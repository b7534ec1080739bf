"""Every answer the server can give, whole or cut at any token, is accepted in the next turn: of
chat and of responses, with the template of every model family, also through
``previous_response_id``, and in strict mode."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from next_turns import (
    ANSWERS,
    CHOICES,
    FEW,
    MANY,
    PIECES,
    check_chat,
    check_responses,
    cuts,
    every,
    open_family,
    strict,
)


@pytest.fixture(scope="module")
def family(request, app_maker):
    with open_family(request.param, app_maker) as opened:
        yield opened


@strict
@FEW
@given(ANSWERS, st.integers(1, 200), CHOICES)
def test_a_chat_answer_is_accepted(family, text, cut, choice):
    check_chat(family, text, cut, choice)


@strict
@FEW
@given(ANSWERS, st.integers(16, 200), CHOICES)
def test_a_response_is_accepted(family, text, cut, choice):
    check_responses(family, text, cut, choice)


@pytest.mark.nightly
@every
@MANY
@given(ANSWERS, st.integers(1, 250), CHOICES)
def test_many_chat_answers_are_accepted(family, text, cut, choice):
    check_chat(family, text, cut, choice)


@pytest.mark.nightly
@every
@MANY
@given(ANSWERS, st.integers(16, 250), CHOICES)
def test_many_responses_are_accepted(family, text, cut, choice):
    check_responses(family, text, cut, choice)


@pytest.mark.nightly
@every
@pytest.mark.parametrize("piece", PIECES)
def test_a_chat_answer_cut_at_any_token_is_accepted(family, piece):
    every = cuts(piece)
    for text, cut in every:
        is_shown = cut % 16 == 0 or cut == len(every)
        check_chat(family, text, cut, "auto", is_shown=is_shown)


@pytest.mark.nightly
@strict
@pytest.mark.parametrize("piece", PIECES)
def test_a_response_cut_at_any_token_is_accepted(family, piece):
    """It goes on as a chat does, with the same templates."""
    for text, cut in cuts(piece):
        if cut >= 16:
            check_responses(family, text, cut, "auto")
