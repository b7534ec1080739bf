"""Every answer of the other endpoints, whole or cut at any token, is accepted in the next turn, as
in ``test_next_turn.py``."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from next_turns import (
    ANSWERS,
    CHOICES,
    FEW,
    MANY,
    OTHERS,
    PIECES,
    cuts,
    every,
    open_family,
    strict,
)

others = pytest.mark.parametrize("check", OTHERS, ids=lambda check: check.__name__[6:])


@pytest.fixture(scope="module")
def family(request, app_maker):
    with open_family(request.param, app_maker) as opened:
        yield opened


@others
@pytest.mark.parametrize("family", ["exaone4", "gemma2"], indirect=True, scope="module")
@FEW
@given(ANSWERS, st.integers(1, 200), CHOICES)
def test_an_answer_of_another_endpoint_is_accepted(family, check, text, cut, choice):
    check(family, text, cut, choice)


@pytest.mark.nightly
@others
@every
@MANY
@given(ANSWERS, st.integers(1, 250), CHOICES)
def test_many_answers_of_other_endpoints_are_accepted(family, check, text, cut, choice):
    check(family, text, cut, choice)


@pytest.mark.nightly
@strict
@pytest.mark.parametrize("piece", PIECES)
def test_an_answer_of_another_endpoint_cut_at_any_token_is_accepted(family, piece):
    """All of them go on as a chat does, with the same templates."""
    for text, cut in cuts(piece):
        for check in OTHERS:
            check(family, text, cut, "auto")
