"""Forced calls in the form of each model family: what the grammar lets through is read as the calls
it says, and it is what the family's template prints in the next turn."""

from __future__ import annotations

import json

import jsonschema_rs
import numpy as np
import pytest
from template_families import script
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from chunkllama.engine.grammar import GrammarCompiler
from chunkllama.sampling_params import GrammarSpec
from chunkllama.text.chat_template import ChatTemplate
from chunkllama.text.template_adapter import adapt
from chunkllama.text.thoughts import Thoughts, ThoughtTags
from chunkllama.text.tokenizer import Tokenizer
from chunkllama.text.tokenizer_files import DecodeRule
from chunkllama_server.api.chat.thinking import with_thoughts
from chunkllama_server.api.schema.chat import ChatCompletionRequest
from chunkllama_server.api.tools.call_format import call_format
from chunkllama_server.api.tools.config import plan_tools
from chunkllama_server.transport.errors import ApiError

EOS = 257
NUM_TOKENS = 256
# Parts of calls that are special tokens in the families' vocabularies.
SPECIAL = (
    "[TOOL_CALLS]", "[ARGS]", "<|tool_call|>", "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>",
    "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>", "<tool_call>", "</tool_call>",
    "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>", "｜DSML｜", "<escape>",
    "<start_function_call>", "<end_function_call>", "<minimax:tool_call>", "</minimax:tool_call>",
    "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>", "<|tool_call_begin|>",
    "<|tool_call_argument_begin|>", "<|tool_call_end|>",
)  # fmt: skip
PARAMETERS = {
    "get_weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "unit": {"type": "string", "enum": ["c", "f"]},
            "days": {"type": "integer", "minimum": 1, "maximum": 14},
            "note": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        },
        "required": ["city", "days"],
    },
    # A name that is no keyword, an open map and a reference: no form but JSON says these.
    "store": {
        "type": "object",
        "properties": {
            "class": {"$ref": "#/$defs/kind"},
            "labels": {"type": "object", "additionalProperties": {"type": "string"}},
            "ids": {"type": "array", "items": {"type": "integer"}},
        },
        "required": ["class"],
        "$defs": {"kind": {"type": "string", "enum": ["a/b", "c"]}},
    },
    "paths": {
        "type": "object",
        "properties": {
            "at": {"$ref": "#/$defs/point"},
            "on": {"type": "boolean"},
            "list": {"type": "array", "items": {"$ref": "#/$defs/point"}},
        },
        "required": ["list"],
        "$defs": {"point": {"type": "object", "properties": {"x": {"type": "number"}}}},
    },
    # A name as servers of MCP have them.
    "files.v1.read-all": None,
}
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": parameters}}
    for name, parameters in PARAMETERS.items()
]
USER = {"role": "user", "content": "go"}
FAMILIES = [pytest.param(family, id=family.template) for family in script.FAMILIES]
# One of each form; the others share the first one's.
FORMS = {
    *("qwen2_5", "llama3_1", "llama3_2_pythonic", "functionary_v3_1", "mistral_v3", "mistral_v13"),
    *("qwen3_coder", "deepseek_v3_1", "granite3", "olmo3", "seed_oss"),
    *("minimax_m2", "glm45", "deepseek_v3_2", "functiongemma", "kimi_k2"),
}
ONE_OF_EACH = [param for param in FAMILIES if param.id in FORMS]


class Family:
    """A family's template, and how its calls are written; ``special`` makes tags special tokens."""

    def __init__(self, family, special: bool) -> None:
        json_text = script.byte_tokenizer(family.added).to_json()
        backend = Backend.from_str(json_text)
        source = (script.TEMPLATES / f"{family.template}.jinja").read_text(encoding="utf-8")
        if special:
            tags = [tag for tag in SPECIAL if tag in source]
            backend.add_special_tokens([AddedToken(tag, normalized=False) for tag in tags])
        self.tokenizer = Tokenizer(backend, DecodeRule(True, False, 0), {}, [EOS])
        self.template = ChatTemplate(source, self.tokenizer)
        self.able = self.template.capabilities
        self.written = call_format(None, self.able, self.tokenizer)
        vocab = -(-self.tokenizer.vocab_size // 32) * 32
        self.compiler = GrammarCompiler(self.tokenizer.to_json(), vocab, [EOS])
        self._mask = np.zeros(vocab // 32, np.int32)

    def plan(self, **fields):
        body = ChatCompletionRequest(messages=[USER], tools=TOOLS, **fields)
        return plan_tools(body, self.written).bounded(NUM_TOKENS)

    def allowed(self, matcher) -> np.ndarray:
        matcher.fill_mask(self._mask)
        assert not matcher.error
        return np.flatnonzero(np.unpackbits(self._mask.view(np.uint8), bitorder="little"))

    def walk(self, grammar: GrammarSpec, seed: int) -> str:
        rng, ids = np.random.default_rng(seed), []
        matcher = self.compiler.matcher(grammar, [])
        while not matcher.is_finished:
            allowed = self.allowed(matcher)
            # Among 256 bytes of text the end would rarely be drawn.
            token = EOS if EOS in allowed and rng.random() < 0.5 else int(rng.choice(allowed))
            if token == EOS:
                break
            assert matcher.accept(token)
            ids.append(token)
            assert len(ids) < 16 * NUM_TOKENS, self.tokenizer.decode(ids)[-200:]
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def longest(self, grammar: GrammarSpec, text: str) -> str:
        """The longest beginning of the text that the grammar accepts as a whole; "" for none."""
        matcher, read, found = self.compiler.matcher(grammar, []), [], ""
        for token in self.tokenizer.encode(text, allow_special=True):
            if not matcher.accept(token):
                break
            read.append(token)
            if matcher.is_finished or EOS in self.allowed(matcher):
                found = self.tokenizer.decode(read, skip_special_tokens=False)
                if matcher.is_finished:
                    break
        return found


@pytest.fixture(scope="module")
def families():
    made: dict[tuple[str, bool], Family] = {}

    def get(family, special=False) -> Family:
        key = (family.template, special)
        if key not in made:
            made[key] = Family(family, special)
        return made[key]

    return get


def read(parser, pieces) -> tuple[str, list[list[str]]]:
    content, calls = "", []
    for parsed in [*map(parser.feed, pieces), parser.finish()]:
        content += parsed.content
        for delta in parsed.calls:
            if delta.name is not None:
                calls.append([delta.name, ""])
            calls[-1][1] += delta.arguments
    return content, calls


def check_calls(config, text: str) -> list[list[str]]:
    """The text is calls that the functions accept; cut anywhere, they are the same."""
    content, calls = read(config.parser(), [text])
    assert read(config.parser(), list(text)) == (content, calls)
    assert content == "" and calls, text
    for name, arguments in calls:
        parameters = PARAMETERS[name] or {"properties": {}}
        value = json.loads(arguments)
        assert isinstance(value, dict) and value.keys() <= parameters["properties"].keys(), text
        errors = [str(e) for e in jsonschema_rs.validator_for(parameters).iter_errors(value)]
        assert not errors, (errors[0], text)
    return calls


@pytest.mark.parametrize("special", [False, True], ids=["text", "special tokens"])
@pytest.mark.parametrize("family", ONE_OF_EACH)
def test_forced_calls_are_read_as_the_grammar_means_them(families, family, special):
    model = families(family, special)
    if special and not model.written.special:
        pytest.skip("none of its tags is a special token")
    config = model.plan(tool_choice="required")
    grammar = config.grammar()
    for seed in range(2):
        calls = check_calls(config, model.walk(grammar, seed))
        assert len(calls) <= 16
    single = model.plan(tool_choice="required", parallel_tool_calls=False)
    assert len(check_calls(single, model.walk(single.grammar(), 9))) == 1


@pytest.mark.parametrize("family", ONE_OF_EACH)
def test_arguments_that_nothing_matches_are_refused(families, family):
    function = {"name": "f", "parameters": {"type": "object", "not": {}}}
    tools = [{"type": "function", "function": function}]
    body = ChatCompletionRequest(messages=[USER], tools=tools, tool_choice="required")
    with pytest.raises(ApiError, match="the function 'f' allows no value") as caught:
        plan_tools(body, families(family).written).bounded(NUM_TOKENS).grammar()
    assert caught.value.param == "tools[0].function.parameters"


# Texts stand in their calls without quotation marks.
RAW = ("qwen3_coder", "seed_oss", "minimax_m2", "glm45", "deepseek_v3_2", "functiongemma")


@pytest.mark.parametrize("family", [param for param in ONE_OF_EACH if param.id in RAW])
def test_a_call_of_parameters_is_closed_in_its_text(families, family):
    """The model writes the first parameter's text until its tokens run out."""
    model = families(family)
    config = model.plan(
        tool_choice={"type": "function", "function": {"name": "get_weather"}},
        parallel_tool_calls=False,
    )
    grammar, letter = config.grammar(), model.tokenizer.encode("x")[0]
    assert grammar.ends
    thinking = Thoughts(ThoughtTags("<think>", "</think>"), is_open=True)
    assert with_thoughts(grammar, thinking, None, model.tokenizer).ends == grammar.ends
    # A byte each, but for tags; fewer than the longest text and the rest of the call take.
    least = {"deepseek_v3_2": 250, "glm45": 90, "functiongemma": 90}.get(family.template, 190)
    for num_tokens in (least, least + 20):
        matcher, ids = model.compiler.matcher(grammar, [], num_tokens), []
        while not matcher.is_finished and len(ids) < num_tokens:
            tokens = model.allowed(matcher)
            ids.append(letter if letter in tokens else int(tokens[0]))
            assert matcher.accept(ids[-1])
        text = model.tokenizer.decode(ids, skip_special_tokens=False)
        ((_, arguments),) = check_calls(config, text)
        assert "xxxx" in json.loads(arguments)["city"] and matcher.is_closing


@pytest.mark.parametrize("family", [p for p in ONE_OF_EACH if p.id in ("qwen3_coder", "seed_oss")])
def test_the_text_of_a_parameter_may_have_other_tags(families, family):
    model = families(family)
    config = model.plan(tool_choice="required", parallel_tool_calls=False)
    edge = "" if model.template.capabilities.call_markers.count("<seed:tool_call>") else "\n"
    around = "seed:tool_call" if not edge else "tool_call"
    for city in ("<p>Oslo</p>", "a <b> && c</", "</param", "<<parameter", "x\n</div>\n\n"):
        text = (
            f"<{around}>\n<function=get_weather>\n<parameter=city>{edge}{city}{edge}</parameter>\n"
            f"<parameter=days>{edge}2{edge}</parameter>\n</function>\n</{around}>"
        )
        assert model.longest(config.grammar(), text) == text
        ((_, arguments),) = check_calls(config, text)
        assert json.loads(arguments)["city"].rstrip("\n") == city.rstrip("\n")
    for end in ("</function>", "<parameter=days>"):
        text = f"<{around}>\n<function=get_weather>\n<parameter=city>{edge}a{end}"
        matcher = model.compiler.matcher(config.grammar(), [])
        accepted = [matcher.accept(t) for t in model.tokenizer.encode(text, allow_special=True)]
        assert not all(accepted)


def test_begun_tags_count_as_characters_of_a_text(families):
    family = next(param.values[0] for param in ONE_OF_EACH if param.id == "qwen3_coder")
    model = families(family)
    schema = {
        "type": "object",
        "properties": {"a": {"type": "string", "maxLength": 6}},
        "required": ["a"],
        "additionalProperties": False,
    }
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    body = ChatCompletionRequest(messages=[USER], tools=[tool], tool_choice="required")
    grammar = plan_tools(body, model.written).grammar()

    def is_accepted(value: str) -> bool:
        call = f"<function=f>\n<parameter=a>\n{value}\n</parameter>\n</function>"
        return model.longest(grammar, text := f"<tool_call>\n{call}\n</tool_call>") == text

    for value in ("", "a\nb", "</par<", "<<</pa", "\u00e9" * 6):
        assert is_accepted(value), value
    for value in ("abcdefg", "</parx<", "<<<</pa", "</par</parx"):
        assert not is_accepted(value), value


@pytest.mark.nightly
@pytest.mark.parametrize("family", FAMILIES)
def test_two_hundred_forced_calls(families, family):
    model = families(family, True)
    config = model.plan(tool_choice="required")
    for seed in range(200):
        check_calls(config, model.walk(config.grammar(), seed))


@pytest.mark.parametrize("family", ONE_OF_EACH)
def test_a_cut_forced_call_has_its_name_and_the_beginning_of_its_arguments(families, family):
    model = families(family)
    config = model.plan(tool_choice="required", parallel_tool_calls=False)
    text = model.walk(config.grammar(), 3)
    ((name, arguments),) = check_calls(config, text)
    for end in range(0, len(text), -(-len(text) // 40)):
        content, calls = read(config.parser(), [text[:end]])
        assert content == ""
        for call in calls:
            assert call[0] == name
            squeezed = "".join(call[1].split()).rstrip("},]\"'")
            assert "".join(arguments.split()).startswith(squeezed)


def called(number: int):
    arguments = [{"city": "Oslo", "days": 2}, {"city": "Bergen", "days": 3}][number]
    function = {"name": "get_weather", "arguments": arguments}
    return {"id": f"a1B2c3D4{number}", "type": "function", "function": function}


# Where the template prints earlier calls otherwise than the model is to write them: with their ids,
# or in a form that it does not describe together with the tools.
OTHERWISE = {"mistral_v3", "deepseek_r1"}


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_template_prints_calls_as_the_grammar_forces_them(families, family, count):
    model = families(family)
    if family.template in OTHERWISE or (count > 1 and not model.able.parallel_calls):
        pytest.skip("the template has no such form")
    config = model.plan(tool_choice="required")
    grammar = config.grammar()
    answer = {"role": "assistant", "content": "", "tool_calls": [called(i) for i in range(count)]}
    turns, tools = adapt([USER, answer], config.prompt_tools, model.able)
    first, _ = adapt([USER], config.prompt_tools, model.able)
    options = {"tools": tools, "template_kwargs": {"enable_thinking": False}}
    asked = model.template.render(first, add_generation_prompt=False, **options)
    whole = model.template.render(turns, add_generation_prompt=False, **options)
    assert whole.startswith(asked)
    printed = whole[len(asked) :]
    begin = printed.find("get_weather")
    found = next(
        (f for at in range(begin, -1, -1) if (f := model.longest(grammar, printed[at:]))), ""
    )
    assert found.count("get_weather") == count, printed
    assert [name for name, _ in check_calls(config, found)] == ["get_weather"] * count
