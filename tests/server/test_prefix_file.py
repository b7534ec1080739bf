"""The file of prompts that ``chunkllama pack build`` reads."""

from __future__ import annotations

import pytest

from chunkllama.errors import ConfigError
from chunkllama_server.config.files import load_yaml
from chunkllama_server.config.prefix_file import encode_prefixes


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("a: b", " must be a YAML list of prompts"),
        ("", " must be a YAML list of prompts"),
        ("- [", ": not valid YAML at line"),
        ("- a", ": entry 1: must hold key: value lines"),
        ("- {name: a}", ": entry 1: give text or messages"),
        ("- {name: a, text: b, messages: [{role: user}]}", ": entry 1: give text or messages"),
        ("- {text: b}", ": entry 1: name: Field required"),
        ("- {name: a, text: b, scope: tenant}", ": entry 1: scope: tenant and tenant: NAME belong"),
        ("- {name: a, text: b, tenant: red}", ": entry 1: scope: tenant and tenant: NAME belong"),
        ("- {name: a, text: b, scope: all}", ": entry 1: scope: Input should be 'public' or"),
        ("- {name: a, text: b, scop: public}", ": entry 1: scop: Extra inputs"),
        ("- {name: a, text: b}\n- {name: a, text: c}", ": entry 2: name: a occurs twice"),
        ("- {name: a, text: b, tools: [{}]}", ": entry 1: tools belong to messages"),
        ("- {name: a, messages: [{role: 1}]}", ": entry 1: "),
    ],
)
def test_a_wrong_file_is_one_line_that_names_the_entry(text_parts, tmp_path, text, error) -> None:
    path = tmp_path / "prompts.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as refused:
        encode_prefixes(load_yaml(path, "prefixes"), path, *text_parts)
    assert str(refused.value).startswith(f"prefixes: {path}{error}")
    assert "\n" not in str(refused.value)


def test_prompts_are_what_every_conversation_begins_with(text_parts, tmp_path) -> None:
    tokenizer, template = text_parts
    path = tmp_path / "prompts.yaml"
    tool = "{type: function, function: {name: find, parameters: {type: object}}}"
    path.write_text(
        "- {name: system, messages: [{role: system, content: be kind}], pin: true}\n"
        f"- {{name: tools, messages: [{{role: system, content: be kind}}], tools: [{tool}]}}\n"
        "- {name: asked, messages: [{role: user, content: why}]}\n"
        "- {name: text, text: once, scope: tenant, tenant: red}\n"
    )
    document = load_yaml(path, "prefixes")
    system, tools, asked, text = encode_prefixes(document, path, tokenizer, template)
    conversation = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "so"}]
    whole = template.encode(conversation)
    assert system.token_ids == whole[: len(system.token_ids)]
    assert tokenizer.decode(system.token_ids).endswith("be kind\nuser\n")
    assert "find" in tokenizer.decode(tools.token_ids)
    assert asked.token_ids == template.encode([{"role": "user", "content": "why"}])
    assert (text.token_ids, text.tenant) == (tokenizer.encode("once"), "red")
    assert [prompt.pin for prompt in (system, tools, asked, text)] == [True, False, False, False]
