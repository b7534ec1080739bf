"""An answer in JSON is closed before its tokens run out, in the same place if computed again."""

from __future__ import annotations

import json
import random

import jsonschema_rs
import numpy as np
import pytest
from mask_draws import draw, is_allowed
from numpy.typing import NDArray

from chunkllama.engine.closing import ClosingMatcher
from chunkllama.engine.end_search import EndSearch
from chunkllama.engine.end_texts import EndTexts
from chunkllama.engine.end_tokens import EndTokens
from chunkllama.engine.grammar import GrammarCompiler, Matcher
from chunkllama.engine.grammar_text import JSON_WHITESPACE
from chunkllama.sampling_params import GrammarSpec, ThinkingSpec
from chunkllama.text.tokenizer import Tokenizer

VOCAB, EOS = 49152, 2
TEXT = {"type": "string", "maxLength": 64}
ITEM = {
    "type": "object",
    "properties": {"name": TEXT, "count": {"type": "integer"}, "tags": {"type": "array"}},
    "required": ["name", "count"],
    "additionalProperties": False,
}
SCHEMA = {
    "type": "object",
    "properties": {
        "items": {"type": "array", "items": ITEM},
        "kind": {"enum": ["gift", "own"]},
        "note": {"anyOf": [TEXT, {"type": "null"}]},
        "more": {"type": "object", "additionalProperties": TEXT},
    },
    "required": ["items", "kind", "note"],
    "additionalProperties": False,
}
JSON = GrammarSpec(kind="json_schema", text=json.dumps(SCHEMA))
LARK = 'start: "<tool_call>" object "</tool_call>"\nobject: %json ' + json.dumps(
    {**SCHEMA, "x-guidance": JSON_WHITESPACE}
)
CALL = GrammarSpec(kind="lark", text=LARK, has_calls=True)


def allowed(matcher: Matcher) -> NDArray[np.int32]:
    mask = np.zeros(VOCAB // 32, np.int32)
    matcher.fill_mask(mask)
    return mask


def ramble(matcher: Matcher, tokenizer: Tokenizer, seed: int, limit: int) -> list[int]:
    """Ids that go on wherever they may: the next item, the next member, more text."""
    rng, ids = random.Random(seed), list[int]()
    going_on = [tokenizer.encode(text)[0] for text in (",", '",', "],", "},", ',"')]
    while not matcher.is_finished and len(ids) < limit:
        mask = allowed(matcher)
        preferred = [token for token in going_on if is_allowed(mask, token)]
        token = rng.choice(preferred) if preferred and rng.random() < 0.96 else draw(mask, rng)
        if token == EOS:
            break
        assert matcher.accept(token)
        ids.append(token)
    return ids


@pytest.mark.parametrize("spec", [JSON, CALL], ids=["schema", "call"])
@pytest.mark.parametrize("num_tokens", [120, 200, 600])
def test_an_answer_that_rambles_is_closed(compiler, tokenizer, spec, num_tokens):
    num_closed = 0
    for seed in range(4):
        matcher = compiler.matcher(spec, [], num_tokens)
        text = tokenizer.decode(ramble(matcher, tokenizer, seed, num_tokens))
        answer = json.loads(text.removeprefix("<tool_call>").removesuffix("</tool_call>"))
        assert jsonschema_rs.is_valid(SCHEMA, answer), text
        num_closed += matcher.is_closing
    assert num_closed > 1


def test_it_closes_in_the_same_place_when_it_is_computed_again(compiler, tokenizer):
    num_tokens = 300
    matcher = compiler.matcher(JSON, [], num_tokens)
    ids, masks = list[int](), list[NDArray[np.int32]]()
    for token in ramble(compiler.matcher(JSON, [], num_tokens), tokenizer, 0, num_tokens):
        masks.append(allowed(matcher))
        assert matcher.accept(token)
        ids.append(token)
    assert matcher.is_closing
    for count in range(len(ids) - 40, len(ids)):
        again = compiler.matcher(JSON, ids[:count], num_tokens)
        assert (allowed(again.copy()) == masks[count]).all()


def test_guesses_close_it_as_well(compiler, tokenizer):
    """Behind guesses the masks are filled by copies."""
    ids = ramble(compiler.matcher(JSON, [], 200), tokenizer, 0, 200)
    matcher = compiler.matcher(JSON, [], 200)
    for begin in range(0, len(ids), 4):
        after = matcher.copy()
        for token in ids[begin : begin + 4]:
            assert is_allowed(allowed(after), token)
            assert after.accept(token) and matcher.accept(token)
    assert matcher.is_closing


WRITTEN = [
    '{"items": [], "kind": "own", "note": null}',
    '{"items": [{"name": "a \\"b\\" c", "count": 12}], "kind": "gift",'
    ' "note": "Voil\u00e0, 5 \u6771!"}',
    '{"items": [], "kind": "own", "note": "x", "more": {"a": "b", "c": ""}}',
    '{"items": [{"name": "", "count": -3, "tags": [1, [2.5e3], {"a": null}]}], "kind": "own",'
    ' "note": null, "more": {}}',
]


@pytest.mark.parametrize("text", WRITTEN, ids=["short", "text", "more", "nested"])
@pytest.mark.parametrize("spare", [1, 2, 3, 8, 40])
def test_an_answer_that_fits_is_its_own(compiler, tokenizer, text, spare):
    """Each of its tokens is allowed, and it ends by itself where something else fitted, too."""
    ids = tokenizer.encode(text)
    matcher = compiler.matcher(JSON, [], len(ids) + spare)
    for token in ids:
        assert is_allowed(allowed(matcher), token), tokenizer.decode([token])
        assert matcher.accept(token)
    assert matcher.is_finished or is_allowed(allowed(matcher), EOS)
    if spare >= 40:  # else an item of the list does not fit
        assert not matcher.is_closing


@pytest.mark.parametrize("spare", [1, 2, 3])
def test_an_answer_without_optional_members_stops(compiler, tokenizer, spare):
    schema = {**ITEM, "properties": {"count": {"type": "integer"}, "name": {"type": "string"}}}
    spec = GrammarSpec(kind="json_schema", text=json.dumps(schema))
    ids = tokenizer.encode('{"count": 97, "name": "a long name of many words, and one more"}')
    matcher = compiler.matcher(spec, [], len(ids) + spare)
    for token in ids:
        assert is_allowed(allowed(matcher), token)
        assert matcher.accept(token)
    assert matcher.is_finished and not matcher.is_closing


def test_where_it_may_end_only_what_fits_is_allowed(compiler, tokenizer):
    spec = GrammarSpec(kind="json_schema", text='{"type": "number"}')
    (digit,), (point,) = tokenizer.encode("1"), tokenizer.encode(".")
    matcher = compiler.matcher(spec, [], 3)
    for _ in range(2):
        assert is_allowed(allowed(matcher), digit)
        assert matcher.accept(digit)
    mask = allowed(matcher)
    assert is_allowed(mask, EOS) and is_allowed(mask, digit) and not is_allowed(mask, point)


def test_a_second_call_that_does_not_fit_is_not_opened(compiler, tokenizer):
    calls = GrammarSpec(
        kind="lark", text=LARK.replace("start: ", "start: call+\ncall: "), has_calls=True
    )
    ids = tokenizer.encode(f"<tool_call>{WRITTEN[0]}</tool_call>")
    for spare, may_open in ((4, False), (100, True)):
        matcher = compiler.matcher(calls, ids, len(ids) + spare)
        mask = allowed(matcher)
        assert is_allowed(mask, EOS)
        assert is_allowed(mask, tokenizer.encode("<")[0]) == may_open
        assert (np.bitwise_count(mask).sum() == 1) == (not may_open)


def test_thoughts_do_not_begin_without_room_for_the_end(compiler, tokenizer):
    end = tuple(tokenizer.encode("</think>"))
    start = 7
    thinking = ThinkingSpec(is_open=False, start_token_id=start, end="</think>", end_token_ids=end)
    spec = GrammarSpec(kind="json_schema", text=JSON.text, thinking=thinking)
    num_least = len(tokenizer.encode(WRITTEN[0]))
    assert not is_allowed(allowed(compiler.matcher(spec, [], num_least)), start)
    assert is_allowed(allowed(compiler.matcher(spec, [], 4 * num_least)), start)


class CountingMatcher:
    """A grammar without an end: it allows one token again and again, and counts masks."""

    error, is_finished, num_masks = "", False, 0

    def fill_mask(self, mask: NDArray[np.int32]) -> None:
        CountingMatcher.num_masks += 1
        mask[0] |= 2

    def accept(self, token_id: int) -> bool:
        return True

    def may_end_behind(self, token_ids: list[int]) -> bool:
        return False

    def copy(self) -> CountingMatcher:
        return self


def test_looks_are_bounded_and_only_where_masks_are_filled():
    tokens = EndTokens(lambda token_id: bytes([97 + token_id]), lambda _: [], 32, [])
    search = EndSearch(CountingMatcher(), tokens, EndTexts((), ()))  # type: ignore[arg-type]
    assert search.first is None
    CountingMatcher.num_masks = 0
    matcher = ClosingMatcher(CountingMatcher(), 4000, search)  # type: ignore[arg-type]
    mask = np.zeros(1, np.int32)
    for _ in range(2000):
        matcher.accept(1)
    assert CountingMatcher.num_masks == 0
    for _ in range(2000):
        matcher.fill_mask(mask)
        matcher.accept(1)
    assert CountingMatcher.num_masks - 2000 <= 17 * 257 + 32 * 33


def test_the_vocabulary_is_read_before_a_matcher_is_made(tokenizer):
    compiler = GrammarCompiler(tokenizer.to_json(), VOCAB, [EOS])
    compiler.matcher(JSON, [])
    assert not compiler.has(JSON)
    compiler.prepare(JSON)
    assert compiler.has(JSON)


def test_a_matcher_is_made_without_compiling_once_its_grammar_is_held(tokenizer, monkeypatch):
    """Others may push it out before the first mask, which a thread makes that all share."""
    monkeypatch.setattr("chunkllama.engine.grammar._MAX_COMPILED", 2)
    compiler = GrammarCompiler(tokenizer.to_json(), VOCAB, [EOS])
    assert compiler.maker(JSON, 40) is None
    compiler.prepare(JSON)
    make = compiler.maker(JSON, 40)
    for text in ("a", "b", "c"):
        compiler.prepare(GrammarSpec(kind="regex", text=text))
    assert not compiler.has(JSON) and compiler.maker(JSON, 40) is None
    monkeypatch.setattr("llguidance.LLMatcher", None)
    matcher = make()
    assert isinstance(matcher, ClosingMatcher)
    mask = np.zeros(-(-VOCAB // 32), np.int32)
    matcher.fill_mask(mask)
    assert mask.any() and not matcher.error


def test_thoughts_count(compiler, tokenizer):
    end = tuple(tokenizer.encode("</think>"))
    thinking = ThinkingSpec(is_open=True, start_token_id=None, end="</think>", end_token_ids=end)
    spec = GrammarSpec(kind="json_schema", text=JSON.text, thinking=thinking)
    thoughts = [*tokenizer.encode("so " * 100), *end]
    num_tokens = len(thoughts) + 100
    matcher = compiler.matcher(spec, thoughts, num_tokens)
    ids = ramble(matcher, tokenizer, 3, 100)
    assert matcher.is_closing
    assert jsonschema_rs.is_valid(SCHEMA, json.loads(tokenizer.decode(ids)))


@pytest.mark.parametrize("kind", ["regex", "lark"])
def test_what_is_no_json_is_left_alone(compiler, tokenizer, kind):
    text = {"regex": "(ab?,){30,}", "lark": "start: /(ab?,){30,}/"}[kind]
    matcher = compiler.matcher(GrammarSpec(kind=kind, text=text), [], 20)
    assert len(ramble(matcher, tokenizer, 1, 20)) == 20
    assert not matcher.is_closing
