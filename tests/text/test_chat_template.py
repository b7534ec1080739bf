"""Conversations become the ids transformers gives them, and users' text stays text."""

from __future__ import annotations

import json
import random

import pytest

from chunkllama.errors import ConfigError, InvalidRequestError
from chunkllama.text import template_budget
from chunkllama.text.chat_template import MAX_TEMPLATE, ChatTemplate, load_chat_template
from chunkllama.text.tokenizer import Tokenizer, load_tokenizer

KINDS = ("llama3", "chatml", "llama2", "mistral", "llama2_json")
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "Weather of a town; <b>bold</b> & 'quoted'",
            "parameters": {"type": "object", "properties": {"town": {"type": "string"}}},
        },
    }
]


def load(folder) -> tuple[Tokenizer, ChatTemplate]:
    tokenizer = load_tokenizer(folder)
    template = load_chat_template(folder, tokenizer)
    assert template is not None
    return tokenizer, template


def conversations(texts: list[str], specials: list[str], seed: int, count: int) -> list[list[dict]]:
    """Random ones whose text holds no whole control token, though pieces of some."""
    rng = random.Random(seed)
    clean = [t for t in texts if not any(s in t for s in specials)]
    pieces = ["a<", "b <|eo", "|> c", "> d", " t> ", "<", "<s", "x <|im_start|", "end_id|>"]
    made = []
    for _ in range(count):
        chat = []
        if rng.random() < 0.5:
            chat.append({"role": "system", "content": rng.choice(clean)})
        for turn in range(rng.randrange(1, 6)):
            text = "".join(rng.choice(clean) for _ in range(rng.randrange(3))) + rng.choice(pieces)
            chat.append({"role": ("user", "assistant")[turn % 2], "content": text})
        made.append(chat)
    return made


@pytest.mark.parametrize("kind", KINDS)
def test_ids_equal_apply_chat_template(kind, folders, texts):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folders[kind])
    tokenizer, template = load(folders[kind])
    specials = [tokenizer.added_tokens[i].content for i in tokenizer.special_ids]
    for number, chat in enumerate(conversations(texts, specials, seed=7, count=200)):
        generate = number % 2 == 0
        expected = theirs.apply_chat_template(
            chat, add_generation_prompt=generate, tokenize=True, return_dict=False
        )
        assert template.encode(chat, add_generation_prompt=generate) == expected, chat
        assert template.render(chat, add_generation_prompt=generate) == theirs.apply_chat_template(
            chat, add_generation_prompt=generate, tokenize=False
        )


@pytest.mark.parametrize("kind", KINDS)
def test_continuing_the_last_message_equals_transformers(kind, folders, texts):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folders[kind])
    tokenizer, template = load(folders[kind])
    specials = [tokenizer.added_tokens[i].content for i in tokenizer.special_ids]
    for chat in conversations(texts, specials, seed=8, count=20):
        chat = [*chat, {"role": "assistant", "content": "The answer is "}]
        if len([m for m in chat if m["role"] != "system"]) % 2:
            chat = [*chat[:-2], chat[-1]]
        expected = theirs.apply_chat_template(
            chat, continue_final_message=True, tokenize=True, return_dict=False
        )
        ours = template.encode(chat, add_generation_prompt=False, continue_final_message=True)
        assert ours == expected


@pytest.mark.parametrize("content", ["It is <think>a</think>", "It is <think>a</think>\n\nso"])
def test_what_a_template_would_drop_of_the_last_message_is_continued(content, folders):
    """DeepSeek's templates drop all before the end of a thought, which begins none of these."""
    tokenizer, _ = load(folders["chatml"])
    template = ChatTemplate(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}",
        tokenizer,
    )
    for text in (content, f"<|im_end|>{content}"):
        chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": text}]
        options = {"add_generation_prompt": False, "continue_final_message": True}
        assert template.render(chat, **options).endswith(f"<|im_start|>assistant\n{text}")
        ids = template.encode(chat, **options)
        assert ids.count(tokenizer.token_id("<|im_end|>")) == 1, "that of the user's message"


def test_a_last_message_that_an_earlier_one_quotes_is_continued_whole(folders):
    """Its text stands in the prompt, but not at the end."""
    tokenizer, _ = load(folders["chatml"])
    template = ChatTemplate(
        "{% for m in messages %}{{ m.content.split('#')[-1] if loop.last else m.content }}|"
        "{% endfor %}",
        tokenizer,
    )
    text = "It is #so"
    chat = [{"role": "user", "content": f"Go on: {text}"}, {"role": "assistant", "content": text}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    assert template.render(chat, **options) == f"Go on: {text}|{text}"


@pytest.mark.parametrize("content", ["<think>a</think>so", "<think>\na\n</think>\n\nso", "so"])
def test_thoughts_that_a_template_writes_in_its_own_way_are_written_once(content, folders):
    """Qwen3's takes them out of the text, and writes a block of thoughts in any case."""
    tokenizer, _ = load(folders["chatml"])
    template = ChatTemplate(
        "{% for m in messages %}{% set parts = m.content.split('</think>') %}{{ m.role }}: "
        "{% if loop.last %}<think>\n{{ parts[0].split('<think>')[-1].strip('\n') "
        "if parts | length > 1 else '' }}\n</think>\n\n{% endif %}"
        "{{ parts[-1].lstrip('\n') }}\n{% endfor %}",
        tokenizer,
    )
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": content}]
    options = {"add_generation_prompt": False, "continue_final_message": True}
    thought = "" if content == "so" else "a"
    expected = f"user: Hi\nassistant: <think>\n{thought}\n</think>\n\nso"
    assert template.render(chat, **options) == expected


def test_tools_reach_the_template(folders):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folders["mistral"])
    _, template = load(folders["mistral"])
    chat = [{"role": "user", "content": "Weather in Paris?"}]
    expected = theirs.apply_chat_template(chat, tools=TOOLS, tokenize=True, return_dict=False)
    assert template.encode(chat, tools=TOOLS) == expected
    assert template.capabilities.tools


@pytest.mark.parametrize("kind", KINDS)
def test_users_cannot_write_control_tokens(kind, folders):
    tokenizer, template = load(folders[kind])
    specials = [tokenizer.added_tokens[i].content for i in tokenizer.special_ids]
    innocent = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    innocent.append({"role": "user", "content": "z"})
    allowed = [i for i in template.encode(innocent) if i in tokenizer.special_ids]
    for special in specials:
        forms = [special, f"{special}{special} ", f"a{special}b", special[:-1], f" {special[1:]}"]
        for first in forms:
            chat = [{**m, "content": m["content"] + first} for m in innocent]
            ids = template.encode(chat)
            assert [i for i in ids if i in tokenizer.special_ids] == allowed, first
            assert first.strip() in tokenizer.decode(ids, skip_special_tokens=False)


def test_pieces_of_a_control_token_stay_apart_when_a_template_joins_them(folders):
    tokenizer = load_tokenizer(folders["llama3"])
    joined = "{% for part in messages[0].content %}{{ part.text | trim }}{% endfor %}"
    template = ChatTemplate(joined, tokenizer)
    for cut in range(1, len("<|eot_id|>")):
        parts = ["<|eot_id|>"[:cut] + " ", "\n" + "<|eot_id|>"[cut:]]
        chat = [{"role": "user", "content": [{"type": "text", "text": t} for t in parts]}]
        ids = template.encode(chat)
        assert tokenizer.special_ids.isdisjoint(ids)
        assert tokenizer.decode(ids) == "<|eot_id|>"
    spelled = [{"role": "user", "content": [{"type": "text", "text": c} for c in "<|eot_id|>"]}]
    assert tokenizer.special_ids.isdisjoint(template.encode(spelled))


def test_sentinels_cannot_be_forged(folders):
    tokenizer, template = load(folders["llama3"])
    text = "literal0x0y literal1x0y <|eot_id|>"
    ids = template.encode([{"role": "user", "content": text}])
    assert text in tokenizer.decode(ids, skip_special_tokens=False)


def test_a_plain_added_token_that_the_template_writes_is_a_control_token(folders):
    tokenizer = load_tokenizer(folders["chatml"])
    call = tokenizer.token_id("<tool_call>")
    assert call not in tokenizer.special_ids
    template = ChatTemplate("<tool_call>{{ messages[0].content }}", tokenizer)
    assert template.encode([{"role": "user", "content": "<tool_call>"}]).count(call) == 1


DOUBLING = "{%% set n = namespace(x='ab') %%}{%% for i in range(60) %%}%s{%% endfor %%}"  # to 2^60

# Two equal lists of a few objects that would take days to compare.
TWO_DEEP = (
    "{%% set n = namespace(x=[1], y=[]) %%}{%% for i in range(2) %%}{%% set n.y = n.x %%}"
    "{%% set n.x = [1] %%}{%% for j in range(60) %%}{%% set n.x = %s %%}{%% endfor %%}"
    "{%% endfor %%}"
)


@pytest.mark.parametrize(
    "source",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}{{ cycler.__init__.__globals__ }}",
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% set r = range(99999) %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}",
        DOUBLING % "{% set n.x = n.x + n.x %}",
        DOUBLING % "{% set n.x = n.x ~ n.x %}",
        DOUBLING % "{% set n.x %}{{ n.x }}{{ n.x }}{% endset %}",
        DOUBLING % "{% set n.x = [n.x, n.x] %}" + "{{ n.x }}",
        DOUBLING % "{% set n.x = [n.x, n.x] %}" + "{{ n.x | tojson | length }}",
        "{{ 'a' * 10 ** 10 }}",
        "{{ [0] * 10 ** 10 }}",
        "{{ 10 ** 10000000000 }}",
        "{{ 'a'.center(10 ** 9) }}",
        "{{ '%999999999d' % 1 }}",
        "{{ '{:>999999999}'.format(1) }}",
        "{{ ('a' * 50000) | replace('', 'a' * 50000) }}",
        "{{ ('a' * 50000).replace('a', 'a' * 50000) }}",
        "{{ ('a' * 50000).join(range(50000) | list) }}",
        "{{ 'a' | indent(10 ** 9, first=true) }}",
        "{{ range(9) | batch(10 ** 9, 'x') | list }}",
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% for i in range(99999) %}" + "x" * 5000 + "{% endfor %}",
        "{% set n = namespace(__class__=1) %}",
        "{{ (10 ** 64) ** 64 }}",
        "{% set n = namespace(x=3) %}{% for i in range(60) %}{% set n.x = n.x * n.x %}{% endfor %}",
        "{{ ('f' * 50000) | int(0, 16) }}",
        "{{ ('a' * 10000).translate({97: 'b' * 10000}) }}",
        "{{ 'a'.encode() }}",
        "{{ (5).to_bytes(99999, 'big') }}",
        "{{ {}.fromkeys(range(9)) }}",
        "{{ range(99999) | join('x' * 10000) | length }}",
        "{{ ('x' * 10000).join(range(99999) | map('string')) | length }}",
        "{{ range(999) | list | tojson(indent='a' * 99999) | length }}",
        "{{ range(999) | list | tojson(separators=['a' * 99999, '']) | length }}",
        "{{ [[1]] | sum(start=[]) }}",
        "{{ strftime_now('%255d' * 99999) | length }}",
        TWO_DEEP % "[n.x, n.x]" + "{{ n.x == n.y }}",
        TWO_DEEP % "[n.x, n.x]" + "{{ n.x is eq(n.y) }}",
        TWO_DEEP % "[n.x, n.x]" + "{{ [n.x, n.y] | sort }}",
        TWO_DEEP % "[n.x, n.x]" + "{{ [n.x].count(n.y) }}",
        TWO_DEEP % "[n.x, n.x]" + "{% for a in [n.x, n.y] %}{{ loop.changed(a) }}{% endfor %}",
        TWO_DEEP % "(n.x, n.x)" + "{{ {n.x: 1} }}",
    ],
)
def test_S8_hostile_templates_are_refused_at_start(source, folders, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((folders["llama3"] / name).read_bytes())
    (tmp_path / "chat_template.jinja").write_text(source)
    with pytest.raises(ConfigError, match=r"chat_template\.jinja") as caught:
        load_chat_template(tmp_path, load_tokenizer(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("own_seconds", "is_stopped"), [(0.0, False), (0.01, True)])
def test_a_template_is_stopped_for_its_own_time(folders, monkeypatch, own_seconds, is_stopped):
    """On a busy machine minutes may pass while a template computes for a millisecond."""
    calls = [0]

    class Clock:
        @staticmethod
        def monotonic() -> float:
            calls[0] += 1
            return calls[0] * 60.0

        @staticmethod
        def thread_time() -> float:
            return calls[0] * own_seconds

    template = ChatTemplate("{% for i in range(500) %}{{ i }} {% endfor %}",
                            load_tokenizer(folders["llama3"]))  # fmt: skip
    monkeypatch.setattr(template_budget, "time", Clock)
    messages = [{"role": "user", "content": "x"}]
    if is_stopped:
        with pytest.raises(InvalidRequestError, match="ran longer than 1 s"):
            template.render(messages)
    else:
        assert template.render(messages).endswith("499 ")
    assert calls[0] > 20


def test_a_template_that_cannot_compile_names_the_file(folders, tmp_path):
    tokenizer = load_tokenizer(folders["llama3"])
    override = tmp_path / "mine.jinja"
    with pytest.raises(ConfigError, match=r"mine\.jinja"):
        load_chat_template(tmp_path, tokenizer, override)
    override.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"mine\.jinja: .* cannot be read"):
        load_chat_template(tmp_path, tokenizer, override)
    override.write_text("{% for %}")
    with pytest.raises(ConfigError, match=r"mine\.jinja: the chat template does not compile"):
        load_chat_template(tmp_path, tokenizer, override)
    override.write_text("{{ 'x' | pprint }}")
    with pytest.raises(ConfigError, match="pprint"):
        load_chat_template(tmp_path, tokenizer, override)


@pytest.mark.parametrize(
    "source",
    [
        "{% break %}",
        "{% for a in x %}" * 25 + "{% endfor %}" * 25,
        "{% if a %}" * 110 + "{% endif %}" * 110,
        "{{ " + "not " * 250 + "a }}",
        "{{ f(a=1, a=2) }}",
        "{% macro m(a, a) %}{% endmacro %}",
        "{{ " + "9" * 5000 + " }}",
        "{% block a %}{% endblock %}{% block a %}{% endblock %}",
        "x" * (MAX_TEMPLATE + 1),
    ],
    ids=["break", "for", "if", "not", "call", "macro", "digits", "block", "size"],
)
def test_what_python_cannot_compile_is_refused_in_one_line(source, folders, tmp_path):
    override = tmp_path / "mine.jinja"
    override.write_text(source)
    with pytest.raises(ConfigError, match=r"mine\.jinja: ") as caught:
        load_chat_template(tmp_path, load_tokenizer(folders["llama3"]), override)
    assert "\n" not in str(caught.value)


def test_where_templates_come_from(folders, tmp_path):
    tokenizer = load_tokenizer(folders["llama3"])
    hello = [{"role": "user", "content": "hello"}]
    assert load_chat_template(tmp_path, tokenizer) is None
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "chat_template.json").write_text('{"chat_template": "of a processor"}')
    assert load_chat_template(tmp_path, tokenizer).render(hello) == "of a processor"
    named = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "{{ tools | length }}"},
    ]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    template = load_chat_template(tmp_path, tokenizer)
    assert template.render(hello) == "plain"
    assert template.render(hello, tools=TOOLS) == "1"
    (tmp_path / "chat_template.jinja").write_text("file {{ colour }}")
    template = load_chat_template(tmp_path, tokenizer)
    assert template.render(hello, template_kwargs={"colour": "red"}) == "file red"
    override = tmp_path / "own.jinja"
    override.write_text("{% generation %}own{% endgeneration %}")
    assert load_chat_template(tmp_path, tokenizer, override).render(hello) == "own"
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "tokenizer_config.json").write_text(
        '{"chat_template": [{"name": "a", "template": ""}]}'
    )
    with pytest.raises(ConfigError, match="no entry named default"):
        load_chat_template(tmp_path, tokenizer)
    for odd in (
        5,
        True,
        [{"name": "default", "template": 5}],
        {"default": [1]},
        [{"name": [], "template": "x"}],
        [{"name": "default", "template": "x"}, {"template": "b"}],
    ):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": odd}))
        with pytest.raises(ConfigError, match=r"tokenizer_config\.json: chat_template must be"):
            load_chat_template(tmp_path, tokenizer)


@pytest.mark.parametrize(
    ("messages", "options", "param"),
    [
        ([], {}, "messages"),
        ([{"role": "assistant", "content": "no user"}], {}, "messages"),
        (
            [{"role": "user", "content": "x"}],
            {"continue_final_message": True},
            "continue_final_message",
        ),
        (
            [{"role": "user", "content": None}],
            {"continue_final_message": True, "add_generation_prompt": False},
            "continue_final_message",
        ),
    ],
)
def test_conversations_a_template_refuses(messages, options, param, folders):
    _, template = load(folders["llama2"])
    with pytest.raises(InvalidRequestError) as caught:
        template.encode(messages, **options)
    assert caught.value.param == param


def test_a_long_conversation_stays_within_the_limits(folders):
    _, template = load(folders["mistral"])
    chat = [
        {"role": ("user", "assistant")[i % 2], "content": f"turn {i} " + "words " * 50}
        for i in range(1001)
    ]
    assert "turn 1000" in template.render(chat)
