"""An end fits behind all that an answer in JSON opens before its tokens run out."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import jsonschema_rs
import numpy as np
import pytest
from mask_draws import draw, is_allowed
from numpy.typing import NDArray

from chunkllama.engine import end_texts as module
from chunkllama.engine.end_texts import end_texts, texts_of_pattern
from chunkllama.engine.grammar import GrammarCompiler, Matcher
from chunkllama.engine.mask_threads import MaskThreads
from chunkllama.engine.sequence_state import SequenceState
from chunkllama.sampling_params import GrammarSpec, SamplingParams, ThinkingSpec
from chunkllama.text.tokenizer import Tokenizer

VOCAB, EOS = 49152, 2
INTEGER = {"type": "integer"}


def record(**properties: Any) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": [*properties],
        "additionalProperties": False,
    }


def numbers(count: int) -> dict[str, Any]:
    return record(**{f"field_{i}": INTEGER for i in range(count)})


def list_of(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item}


def text(**more: Any) -> dict[str, Any]:
    return {"type": "string", **more}


LARGE = {
    "8 numbers": record(items=list_of(numbers(8))),
    "20 numbers": record(items=list_of(numbers(20))),
    "lists in lists": record(a=list_of(record(b=list_of(numbers(6)), c=text()))),
    "optional": {**record(a=list_of(INTEGER), more=numbers(12)), "required": ["a"]},
    "one of": record(x=list_of({"anyOf": [numbers(10), INTEGER, list_of(numbers(3))]})),
}
PATTERNS = {
    "letters": r"^[a-z]+@[a-z]+\.[a-z]+$",
    "no blanks": r"^\S+@\S+\.\S+$",
    "file": r"^.+\.(jpg|png)$",
    "phone": r"^[0-9()+ -]+$",
    "optional end": r"^[a-z]+(@[a-z]+\.[a-z]+)?$",
}
TEXTS = {
    **{name: record(v=text(pattern=pattern)) for name, pattern in PATTERNS.items()},
    **{
        f"list of {name}": record(v=list_of(record(t=text(pattern=pattern), n=INTEGER)))
        for name, pattern in PATTERNS.items()
    },
    **{
        form: record(v=list_of(text(format=form)), w=text(format=form))
        for form in ("email", "uri", "date-time", "duration")
    },
}
SCHEMAS = LARGE | TEXTS


def schema_spec(schema: dict[str, Any], **more: Any) -> GrammarSpec:
    return GrammarSpec(kind="json_schema", text=json.dumps(schema), **more)


def allowed(matcher: Matcher) -> NDArray[np.int32]:
    mask = np.zeros(VOCAB // 32, np.int32)
    matcher.fill_mask(mask)
    return mask


def ramble(matcher: Matcher, tokenizer: Tokenizer, seed: int, limit: int) -> list[int]:
    """Ids that open what they may, and else any text."""
    rng, ids = random.Random(seed), list[int]()
    opening = [tokenizer.encode(text)[0] for text in (",", '",', "],", "},", ',"', "{", '{"')]
    while not matcher.is_finished and len(ids) < limit:
        mask = allowed(matcher)
        preferred = [token for token in opening if is_allowed(mask, token)]
        token = rng.choice(preferred) if preferred and rng.random() < 0.9 else draw(mask, rng)
        if token == EOS:
            break
        assert matcher.accept(token)
        ids.append(token)
    return ids


def check_ends(
    compiler: GrammarCompiler, tokenizer: Tokenizer, schema: dict[str, Any], num_tokens: int
) -> None:
    matcher = compiler.matcher(schema_spec(schema), [], num_tokens)
    written = tokenizer.decode(ramble(matcher, tokenizer, num_tokens, num_tokens))
    assert jsonschema_rs.is_valid(schema, json.loads(written)), (num_tokens, written)


@pytest.mark.parametrize("name", ["20 numbers", "lists in lists", "optional", "one of"])
def test_what_is_opened_fits(compiler, tokenizer, name):
    for num_tokens in (47, 101, 143, 206):
        check_ends(compiler, tokenizer, SCHEMAS[name], num_tokens)


@pytest.mark.parametrize("name", [*TEXTS])
def test_strings_that_must_match_end(compiler, tokenizer, name):
    for num_tokens in (29, 36):
        check_ends(compiler, tokenizer, SCHEMAS[name], num_tokens)


URIS = {
    "user": "a2+b-c.d://u:::::::::p",
    "host and port": "http://u:p@h-1.x:80/%41/b;c?q=%20#f%C3",
    "address": "ftp://192.0.2.16:80/",
    "long address": "h://[2001:db8:0:1:2:3:4:5]:8/",
    "short address": "h://[fe80::1:2]/",
    "future address": "h://[v1.a:b]",
    "no host": "urn:isbn:0-486%2d",
    "path": "file:///a/b",
}


@pytest.mark.parametrize("uri", URIS.values(), ids=URIS)
def test_an_address_ends_wherever_it_is_left(compiler, tokenizer, uri):
    schema = record(v=text(format="uri", maxLength=512))
    for length in range(len(uri) + 1):
        ids = tokenizer.encode('{"v": "' + uri[:length])
        matcher = compiler.matcher(schema_spec(schema), ids, len(ids) + 24)
        rng = random.Random(length)
        while not matcher.is_finished:
            ids.append(draw(allowed(matcher), rng))
            assert matcher.accept(ids[-1])
            assert len(ids) < 100, tokenizer.decode(ids)
        assert json.loads(tokenizer.decode(ids))["v"].startswith(uri[:length])


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (text(format="uri"), "h://h"),
        (text(pattern=r"^[a-z]+(:\d*|::[a-z]{8}@[a-z]{8}\.[a-z]{8})?$"), "h"),
    ],
    ids=["uri", "pattern"],
)
def test_an_end_fits_behind_each_mark(compiler, tokenizer, value, written):
    """Two colons begin a part that only more text ends, and one does not."""
    spec, ids = schema_spec(record(v=value)), tokenizer.encode(f'{{"v": "{written}')
    marks = [i for i in range(3, VOCAB) if tokenizer.decode([i]).startswith((":", "%", "@"))]
    num_tried = 0
    for num_left in range(3, 28):
        mask = allowed(compiler.matcher(spec, ids, len(ids) + num_left))
        for token in (token for token in marks if is_allowed(mask, token)):
            matcher = compiler.matcher(spec, [*ids, token], len(ids) + num_left)
            allowed(matcher)
            assert matcher._end is not None, (num_left, tokenizer.decode([token]))
            num_tried += 1
    assert num_tried > 10


@pytest.mark.nightly
@pytest.mark.parametrize("name", [*SCHEMAS])
def test_an_end_fits_in_any_number_of_tokens(compiler, tokenizer, name):
    for num_tokens in [*range(30, 260), 300, 400, 511, 512, 513, 600, 1000]:
        check_ends(compiler, tokenizer, SCHEMAS[name], num_tokens)


RAW = (
    'start: "<parameter=a>\\n" text "<parameter=b>\\n" number\n'
    r"text: /([^<]|<[^\/p<]){0,400}\n<\/parameter>\n/"
    "\n"
    r'number: %json {"type": "array", "items": {"type": "string"}} "\n</parameter>\n"'
)


def test_raw_text_is_ended_by_its_tag(compiler, tokenizer):
    spec = GrammarSpec(kind="lark", text=RAW, has_calls=True, ends=("\n</parameter>\n",))
    for num_tokens in (40, 55, 90):
        matcher = compiler.matcher(spec, [], num_tokens)
        rng, ids = random.Random(num_tokens), tokenizer.encode('<parameter=a>\nsay "so) and')
        assert all(map(matcher.accept, ids))
        while not matcher.is_finished and len(ids) < num_tokens:
            token = draw(allowed(matcher), rng)
            assert matcher.accept(token)
            ids.append(token)
        assert matcher.is_finished, tokenizer.decode(ids)


@pytest.mark.parametrize(
    "name", [pytest.param("8 numbers", marks=pytest.mark.nightly), "list of letters"]
)
def test_the_mask_follows_from_the_tokens_alone(compiler, tokenizer, name):
    """Not from the masks that were filled before: all, some, none or those of copies."""
    spec, num_tokens = schema_spec(SCHEMAS[name]), 160
    ids = ramble(compiler.matcher(spec, [], num_tokens), tokenizer, 1, num_tokens)
    matchers = [compiler.matcher(spec, [], num_tokens) for _ in range(3)]
    for count, token in enumerate(ids):
        masks = [allowed(matchers[0]), allowed(matchers[1].copy())]
        if count % 7 == 0:
            masks.append(allowed(matchers[2]))
        if count % 16 == 0:
            masks.append(allowed(compiler.matcher(spec, ids[:count], num_tokens)))
        assert all((mask == masks[0]).all() for mask in masks), count
        assert all(matcher.accept(token) for matcher in matchers)
    matchers.append(compiler.matcher(spec, ids, num_tokens))
    assert {matcher.is_closing for matcher in matchers} == {True}


def test_thoughts_end_in_time_for_the_answer(compiler, tokenizer):
    end = tuple(tokenizer.encode("</think>"))
    thinking = ThinkingSpec(is_open=True, start_token_id=None, end="</think>", end_token_ids=end)
    schema = record(answer=text(maxLength=200), sure={"type": "boolean"})
    so = tokenizer.encode(" so")[0]
    for num_tokens in (20, 33, 60):
        matcher = compiler.matcher(schema_spec(schema, thinking=thinking), [], num_tokens)
        ids = list[int]()
        while not matcher.is_finished:
            mask = allowed(matcher)
            ids.append(so if is_allowed(mask, so) else draw(mask, random.Random(len(ids))))
            assert matcher.accept(ids[-1])
        thoughts, _, answer = tokenizer.decode(ids).partition("</think>")
        assert len(ids) <= num_tokens and " so so" in thoughts
        assert jsonschema_rs.is_valid(schema, json.loads(answer))


@pytest.mark.parametrize(
    "parameters",
    [{"min_tokens": 0}, {"bad_words_token_ids": ((EOS,),)}, {"allowed_token_ids": (33,)}],
    ids=["min_tokens", "bad_words", "allowed_token_ids"],
)
def test_where_the_end_is_forbidden_the_grammar_alone_decides(compiler, tokenizer, parameters):
    """An answer that cannot be closed is cut, and is no error."""
    call = json.dumps({**numbers(1), "x-guidance": {"whitespace_flexible": False}})
    spec = GrammarSpec(kind="lark", text=f"start: call+\ncall: %json {call}", has_calls=True)
    written = tokenizer.encode('{"field_0":1}')
    (brace,) = tokenizer.encode("{")
    if "allowed_token_ids" in parameters:
        parameters = {"allowed_token_ids": (brace,)}
    if "min_tokens" in parameters:
        parameters = {"min_tokens": len(written) + 2}
    sampling = SamplingParams(grammar=spec, max_tokens=len(written) + 2, **parameters)
    matcher = compiler.matcher(spec, written, sampling.max_tokens)
    state = SequenceState(sampling, 0, np.zeros(1, np.int32), written, matcher=matcher)
    assert not state.leaves_any(allowed(matcher.copy()), [EOS])
    threads = MaskThreads(VOCAB, [EOS])
    threads.start([state])
    threads.wait_for_all([state])
    threads.close()
    assert state.mask is not None
    assert state.leaves_any(state.mask, [EOS]) and is_allowed(state.mask, brace)


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        (r"^[a-z]{2,}-\d+$", ["aa-0"]),
        (r"a|bcd", ["a", "bcd"]),
        (r"[^q0]\D\s\W[^\w ]", [" q --"]),
        (r"(?:x(?P<n>y)z)+.?", ["xyz", "xyzq"]),
        (r"^a(?::\d+|::b@c)?(?:e|f{2})?(?:){0}$", ["a", "a:0", "a::b@c", "ae", "aff"]),
        (r"(?:ab?|c){2}", ["aa", "aba", "ca"]),
        (r"^a{70}$", []),
        (r"(?=a)b", []),
        ("(", []),
        (r"b{64}", ["b" * 64]),
        (r"(?:b{70}|c)d", ["cd"]),
    ],
)
def test_texts_of_a_pattern(pattern, found):
    assert sorted(texts_of_pattern(pattern)) == sorted(found)
    assert all(re.fullmatch(pattern, text) for text in texts_of_pattern(pattern))


def test_repeats_of_repeats_are_not_written_out():
    pattern = "b"
    for _ in range(12):
        pattern = f"({pattern}){{64}}"
    assert texts_of_pattern(f"^(|{pattern})$") == [""]
    assert texts_of_pattern(pattern) == []


def test_texts_are_of_the_schemas_in_a_schema():
    """Values and unknown members hold no schemas, except what a reference names."""
    hidden = {"pattern": "^hidden$"}
    schema = {
        **dict.fromkeys(("default", "const", "x-unknown"), hidden),
        "examples": [hidden],
        "properties": {"default": {"pattern": "^member$"}},
        "patternProperties": {"^name$": {"items": {"anyOf": [{"pattern": "^inner$"}]}}},
        "allOf": [{"$ref": "#/components/a~1b"}],
        "components": {"a/b": {"pattern": "^named$", "items": {"$ref": "#"}}, "c": hidden},
    }
    texts = {text.decode() for text in end_texts(schema_spec(schema)).of_strings}
    assert texts == {"member", "name", "inner", "named"}


def test_a_mark_of_json_inside_of_texts():
    schema = json.dumps({"enum": ["%json x"], "description": "%json", "pattern": "^a$"})
    text = f'start: ("%json x" | /%json/) %json {schema} %json {{"pattern": "^b$"}}'
    spec = GrammarSpec(kind="lark", text=text, has_calls=True, ends=(("</p>",), (7, "b")))
    assert end_texts(spec) == (((b"</p>",), (7, b"b")), (b"a", b"b"))


@pytest.mark.parametrize("error", [RuntimeError, MemoryError, RecursionError])
def test_without_texts_of_strings_answers_still_end(compiler, monkeypatch, error):
    def fail(_: Any) -> Any:
        raise error

    monkeypatch.setattr(module, "_texts", fail)
    spec = schema_spec(record(v=text(pattern=f"^{error.__name__}$")))
    assert end_texts(spec) == ((), ())
    assert compiler.matcher(spec, [], 64) is not None
