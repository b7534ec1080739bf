"""Grammars: what they refuse, what they let through, and that a finished one says so."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

import numpy as np
import pytest

from chunkllama.engine.grammar import TOO_COMPLEX, GrammarCompiler, Matcher
from chunkllama.engine.grammar_text import is_gbnf
from chunkllama.engine.sequence_state import SequenceState
from chunkllama.errors import InvalidRequestError
from chunkllama.sampling_params import GrammarSpec, SamplingParams, ThinkingSpec
from chunkllama.text.tokenizer import Tokenizer

VOCAB, EOS = 49152, 2
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"enum": [1, 2]}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


def spec(kind: str, text: object = "") -> GrammarSpec:
    return GrammarSpec(kind=kind, text=text if isinstance(text, str) else json.dumps(text))


def allowed(matcher: Matcher) -> set[int]:
    mask = np.zeros(-(-VOCAB // 32), np.int32)
    matcher.fill_mask(mask)
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


def walk(matcher: Matcher, tokenizer: Tokenizer, seed: int, limit: int = 80) -> str:
    """A random allowed text, ended by the grammar; "" if it does not end within ``limit``."""
    rng, ids = np.random.default_rng(seed), []
    for _ in range(limit):
        choices = sorted(allowed(matcher))
        assert choices
        token = int(rng.choice(choices))
        if token == EOS:
            return tokenizer.decode(ids)
        assert matcher.accept(token)
        ids.append(token)
        if matcher.is_finished:
            return tokenizer.decode(ids)
    return ""


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        ("json_schema", {"type": "nope"}, "nope"),
        ("json_schema", "{", "EOF"),
        ("json_schema", {"$ref": "http://example.invalid/x"}, "example.invalid"),
        ("regex", "(a", r"'\(a' is no regular expression: error: unclosed group"),
        ("choice", [], "at least one"),
        ("choice", [1], "at least one"),
        ("choice", "yes", "Expecting value"),
        ("lark", "start: missing", "missing"),
        ("lark", "", "Empty"),
        ("xml", "", "unknown grammar kind"),
        ("json_schema", {"$ref": "#"}, "nothing matches"),
        ("regex", "[^\\d\\D]", "nothing matches"),
        ("regex", "(.{1,9999}){9999}", "too many"),
        ("regex", "(a?){900}a{900}", "too complex"),
        ("regex", "b(a?){900}a{900}", "too complex"),
        ("lark", 'start: "b" /(a?){900}a{900}/', "too complex"),
        ("json_schema", {"type": "string", "pattern": "^x(a?){900}a{900}$"}, "too complex"),
        ("json_schema", {"$ref": "file:///etc/passwd"}, "not present"),
        ("json_schema", {"pattern": "(["}, r"'\(\[' is no regular expression: error: unclosed"),
    ],
)
def test_bad_grammars_are_refused_with_one_line(
    kind: str, text: object, words: str, compiler: GrammarCompiler
) -> None:
    with pytest.raises(InvalidRequestError, match=words) as caught:
        compiler.check(spec(kind, text))
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("seed", range(5))
def test_json_schema_walks_validate(seed: int, compiler, tokenizer) -> None:
    text = walk(compiler.matcher(spec("json_schema", SCHEMA), []), tokenizer, seed)
    value = json.loads(text)
    assert set(value) == {"name", "age"}
    assert len(value["name"]) <= 8
    assert value["age"] in (1, 2)
    assert "  " not in text.replace(json.dumps(value["name"], ensure_ascii=False), "")


def test_regex_choice_and_lark_walks_match(compiler, tokenizer) -> None:
    choices = ["yes", 'no "never"\n', "é"]
    for seed in range(8):
        assert walk(compiler.matcher(spec("choice", choices), []), tokenizer, seed) in choices
        assert len(walk(compiler.matcher(spec("regex", "[ab]{3}c?"), []), tokenizer, seed)) in (
            3,
            4,
        )
        text = walk(
            compiler.matcher(spec("lark", 'start: "x" start "y" | "-"'), []), tokenizer, seed
        )
        depth = text.count("x")
        assert text in ("", "x" * depth + "-" + "y" * depth)


def test_errors_of_the_library_record_no_stacks() -> None:
    """With RUST_BACKTRACE each rule around an error would: 4 s where 400 rules are around it."""
    assert os.environ["RUST_LIB_BACKTRACE"] == "0"


def test_json_object_starts_as_one(compiler, tokenizer) -> None:
    first = allowed(compiler.matcher(spec("json_object"), []))
    assert {tokenizer.decode([token])[0] for token in first} <= {"{", " ", "\n"}


def test_a_finished_grammar_allows_the_end_alone(compiler, tokenizer) -> None:
    matcher = compiler.matcher(spec("choice", ["yes"]), [])
    assert not matcher.is_finished
    assert EOS not in allowed(matcher)
    for token in tokenizer.encode("yes", add_special_tokens=False, allow_special=False):
        assert matcher.accept(token)
    assert matcher.is_finished
    assert matcher.accept(EOS)


def test_a_matcher_resumes_behind_its_output(compiler, tokenizer) -> None:
    grammar = spec("json_schema", SCHEMA)
    ids = tokenizer.encode('{"name": "Al', add_special_tokens=False, allow_special=False)
    live = compiler.matcher(grammar, [])
    assert all(live.accept(token) for token in ids)
    assert allowed(compiler.matcher(grammar, ids)) == allowed(live)
    with pytest.raises(InvalidRequestError, match="do not follow"):
        compiler.matcher(grammar, [*ids, EOS])


def test_matchers_of_one_grammar_do_not_share_state(compiler, tokenizer) -> None:
    grammar = spec("choice", ["aa", "b"])
    first, second = compiler.matcher(grammar, []), compiler.matcher(grammar, [])
    before = allowed(second)
    assert first.accept(next(t for t in before if tokenizer.decode([t]) == "b"))
    assert allowed(second) == before


def thinking(tokenizer: Tokenizer, **options) -> ThinkingSpec:
    """Thoughts between tags that are several tokens; the prompt has opened them."""
    ids = tuple(tokenizer.encode("</think>"))
    values = {"is_open": True, "start_token_id": None, "end": "</think>", "end_token_ids": ids}
    return ThinkingSpec(**(values | options))


def feed(matcher, tokenizer: Tokenizer, text: str) -> None:
    for token in tokenizer.encode(text):
        assert token in allowed(matcher)
        assert matcher.accept(token)


def test_a_grammar_holds_from_the_end_of_the_thoughts_on(compiler, tokenizer):
    answer = GrammarSpec(kind="choice", text='["yes"]', thinking=thinking(tokenizer))
    matcher = compiler.matcher(answer, [])
    assert EOS not in allowed(matcher), "an answer has to follow"
    feed(matcher, tokenizer, "Let me see: {no} < yes.</think>")
    assert not matcher.is_finished
    assert allowed(matcher) <= {t for t in range(VOCAB) if "yes".startswith(tokenizer.token_str(t))}
    feed(matcher, tokenizer, "yes")
    assert matcher.is_finished
    again = compiler.matcher(answer, tokenizer.encode("Hm.</think>y"))
    feed(again, tokenizer, "es")


@pytest.mark.parametrize("budget", [0, 1, 5])
def test_thoughts_end_within_their_budget(compiler, tokenizer, budget):
    bound = thinking(tokenizer, budget=budget)
    for kind, text in (("any", ""), ("choice", '["yes"]')):
        matcher = compiler.matcher(GrammarSpec(kind=kind, text=text, thinking=bound), [])
        words = tokenizer.encode(" and so on" * 3)
        for token in words[:budget]:
            assert matcher.accept(token)
        for token in bound.end_token_ids:
            assert allowed(matcher) == {token}
            assert matcher.accept(token)
        if kind == "any":
            assert len(allowed(matcher)) >= VOCAB
        else:
            feed(matcher, tokenizer, "yes")
            assert matcher.is_finished


def test_thoughts_that_the_model_may_begin(compiler, tokenizer):
    start = tokenizer.token_id("<|im_start|>")
    optional = thinking(tokenizer, is_open=False, start_token_id=start)
    spec = GrammarSpec(kind="choice", text='["yes"]', thinking=optional)
    direct = compiler.matcher(spec, [])
    assert start in allowed(direct)
    feed(direct, tokenizer, "yes")
    assert direct.is_finished
    thoughtful = compiler.matcher(spec, [])
    assert thoughtful.accept(start)
    feed(thoughtful, tokenizer, "hm</think>yes")
    late = compiler.matcher(spec, tokenizer.encode("y"))
    assert start not in allowed(late)


def test_an_ending_tag_that_is_one_token(compiler, tokenizer):
    end = tokenizer.token_id("<|im_end|>")
    spec = GrammarSpec(
        kind="choice",
        text='["yes"]',
        thinking=thinking(tokenizer, end="<|im_end|>", end_token_ids=(end,)),
    )
    matcher = compiler.matcher(spec, [*tokenizer.encode("hm"), end])
    feed(matcher, tokenizer, "yes")
    assert matcher.is_finished


def accepts(
    compiler: GrammarCompiler, tokenizer: Tokenizer, grammar: GrammarSpec, text: str
) -> bool:
    """Whether a text, token by token, follows a grammar to its end."""
    matcher = compiler.matcher(grammar, [])
    if not all(
        token in allowed(matcher) and matcher.accept(token) for token in tokenizer.encode(text)
    ):
        return False
    return matcher.is_finished or EOS in allowed(matcher)


DIGITS = ["\u0664", "\u0967", "\U0001fbf1", "\uff15"]


@pytest.mark.parametrize(
    ("pattern", "inside", "outside"),
    [
        (r"\d", ["0", "9"], [*DIGITS, "a"]),
        (r"\w", ["a", "Z", "_", "0"], ["é", "\u0664", "-"]),
        (r"\D", ["a", "\u0664", "é"], ["0", "9"]),
        (r"\W", ["é", "-", "\u0664"], ["a", "_", "5"]),
        (r"[\d.]", ["5", "."], ["\u0664", "a"]),
        (r"[^\d]", ["a", "\u0664"], ["5"]),
        (r"[\D]", ["a", "\u0664"], ["5"]),
        (r"[a\W]", ["a", "é", "-"], ["b", "5"]),
        (r"\\d", [r"\d"], ["5"]),
        (r"[\\d]", ["d", "\\"], ["5"]),
        (r"\[\d\]", ["[5]"], ["[\u0664]"]),
        (r"[]\d]", ["]", "5"], ["\u0664"]),
        (r"(\d{2})-\d+", ["12-3"], ["1\u0664-3"]),
    ],
)
def test_classes_of_a_regex_are_ascii(compiler, tokenizer, pattern, inside, outside):
    """ECMA-262's meaning, in a regex and in a schema's pattern."""
    grammars = [
        spec("regex", pattern),
        spec("json_schema", {"type": "string", "pattern": f"^{pattern}$"}),
    ]
    for grammar in grammars:
        for text in inside:
            shown = text if grammar.kind == "regex" else json.dumps(text, ensure_ascii=False)
            assert accepts(compiler, tokenizer, grammar, shown), (grammar.kind, text)
        for text in outside:
            shown = text if grammar.kind == "regex" else json.dumps(text, ensure_ascii=False)
            assert not accepts(compiler, tokenizer, grammar, shown), (grammar.kind, text)


GBNF = """# A list of animals.
root   ::= animal ("," ws animal){0,2}
animal ::= "cat" | "dog" [0-9]+
ws     ::= " "?
"""


def test_gbnf(compiler, tokenizer):
    grammar = spec("gbnf", GBNF)
    for text in ("cat", "dog12", "cat,dog1", "cat, cat, dog7"):
        assert accepts(compiler, tokenizer, grammar, text)
    for text in ("", "bird", "dog", "cat,,cat", "cat,cat,cat,cat"):
        assert not accepts(compiler, tokenizer, grammar, text)


def test_gbnf_is_told_from_lark():
    assert is_gbnf(GBNF)
    assert is_gbnf('root::="a"')
    assert not is_gbnf('start: "a::=b"')
    assert not is_gbnf('start: "x"\n// a ::= b')
    assert is_gbnf('# comment\n\n \t root \t ::= "a"')


@pytest.mark.parametrize("text", ["\n" * 300_000, " \n" * 150_000, "a\n" * 150_000])
def test_S6_empty_lines_are_read_once(text):
    """Read again from each line, they would take hours; the test would not end."""
    assert not is_gbnf(text)


@pytest.mark.parametrize(
    "text",
    [
        *('root ::= "a', "root ::= [a", "root ::= (", "root = 1", "root ::= a " + "(" * 3000),
        *("root ::= missing", 'x ::= "no rule root"', "root ::= r0\nr0 ::= r1"),
    ],
)
def test_malformed_gbnf_is_refused(compiler, text):
    with pytest.raises(InvalidRequestError):
        compiler.check(spec("gbnf", text))


@dataclass
class Refusing:
    """A matcher that accepts no token."""

    error: str

    def accept(self, token_id: int) -> bool:
        return False


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        ("lexer error: too many expressions constructed", TOO_COMPLEX),
        ("Parser Error: ParserTooComplex", TOO_COMPLEX),
        ('Parser Error: token "z" doesn\'t satisfy the grammar', "grammar_error"),
        ("", "grammar_error"),
    ],
)
def test_a_grammar_that_exceeds_limits_later_is_the_clients_error(error: str, reason: str) -> None:
    state = SequenceState(
        SamplingParams(), 0, np.array([1], np.int32), [3], matcher=Refusing(error)
    )
    state.append(5)
    assert state.failed == reason
