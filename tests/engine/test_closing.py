"""An answer in JSON is closed before its tokens run out, in the same place if computed again."""

from __future__ import annotations

import json
import random
from pathlib import Path

import jsonschema_rs
import numpy as np
import pytest
from mask_draws import draw, is_allowed
from numpy.typing import NDArray

from chunkllama.engine.grammar import JSON_WHITESPACE, GrammarCompiler, Matcher
from chunkllama.sampling_params import GrammarSpec, ThinkingSpec
from chunkllama.text.tokenizer import Tokenizer, load_tokenizer

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


@pytest.fixture(scope="module")
def tokenizer(demo_path: Path) -> Tokenizer:
    return load_tokenizer(demo_path)


@pytest.fixture(scope="module")
def compiler(tokenizer: Tokenizer) -> GrammarCompiler:
    return GrammarCompiler(tokenizer.to_json(), VOCAB, [EOS])


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
    ids = ramble(matcher, tokenizer, 0, num_tokens)
    assert matcher.is_closing
    states = [compiler.matcher(JSON, ids[:count], num_tokens) for count in range(len(ids))]
    closing = []
    for state, token in zip(states, ids, strict=True):
        again = state.copy()
        mask = allowed(again)
        assert is_allowed(mask, token)
        closing.append(again.is_closing)
        if again.is_closing:
            assert again.forced()[0] == token and np.bitwise_count(mask).sum() == 1
    assert closing == sorted(closing) and 0 < sum(closing) < len(ids) // 2


def test_an_answer_that_ends_in_time_is_its_own(compiler, tokenizer):
    text = '{"items": [], "kind": "own", "note": null}'
    ids = tokenizer.encode(text)
    matcher = compiler.matcher(JSON, [], len(ids) + 8)
    for token in ids:
        assert is_allowed(allowed(matcher), token)
        assert matcher.accept(token)
    assert not matcher.is_closing


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
