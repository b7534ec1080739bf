"""Only ASCII digits are numbers in text from outside, and no length of them fails."""

from __future__ import annotations

import json

import pytest

from chunkllama.config import CacheConfig, parse_bytes
from chunkllama.digits import whole_number
from chunkllama.errors import ConfigError
from chunkllama.models.config import _tokenizer_eos
from chunkllama.text.tokenizer_files import _listed_tokens
from chunkllama_server.api.common.schema_references import References, follow
from chunkllama_server.bench.command import _points
from chunkllama_server.bench.workload import Workload
from chunkllama_server.capacity.command import _pools

LONG = "1" * 5000  # int() reads 4,300
ODD = ("٣", "²", "1_0", "+1", " 1", "", LONG)


@pytest.mark.parametrize("text", ODD)
def test_other_text_is_no_whole_number(text) -> None:
    assert whole_number(text) is None
    assert whole_number("0") == 0 and whole_number("9" * 18) == 10**18 - 1


@pytest.mark.parametrize("step", ODD)
def test_a_reference_counts_items_in_ascii_digits(step) -> None:
    schema = {"anyOf": [{"type": "null"}, *[{"type": "string"}] * 12]}
    assert follow(schema, f"#/anyOf/{step}") is None
    assert References(schema).place(f"#/anyOf/{step}", ()) is None
    assert follow(schema, "#/anyOf/0") == {"type": "null"}


@pytest.mark.parametrize("step", ["٣", LONG, "2"])
@pytest.mark.parametrize("strict", [False, True])
def test_a_request_whose_reference_has_a_long_index_is_answered(server, step, strict) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"$ref": f"#/properties/b/anyOf/{step}"},
                       "b": {"anyOf": [{"type": "null"}, {"type": "string"}]}},
        "required": ["a", "b"],
        "additionalProperties": False,
    }  # fmt: skip
    named = {"name": "a", "schema": schema, "strict": strict}
    messages = [{"role": "user", "content": "say({})yas"}]
    body = {"model": "alias", "messages": messages,
            "response_format": {"type": "json_schema", "json_schema": named}}  # fmt: skip
    response = server.post("/v1/chat/completions", body)
    if strict:
        assert response.status_code == 400 and "$ref" in response.json()["error"]["message"]
    else:  # a reference to no place is then left to the model
        assert response.status_code == 200


@pytest.mark.parametrize("key", ["²", "٣", LONG, "-1", "1_0"])
def test_a_token_id_of_a_folder_is_ascii(tmp_path, key) -> None:
    config = {"eos_token": "</s>", "added_tokens_decoder": {key: {"content": "</s>"}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert _tokenizer_eos(tmp_path) == set()
    with pytest.raises(ConfigError, match="is no token id"):
        _listed_tokens(config)


@pytest.mark.parametrize("text", ["٣", "٣MiB", LONG])
def test_a_setting_is_ascii(text) -> None:
    assert parse_bytes(text) == text
    with pytest.raises(ValueError, match="chunk_size"):
        CacheConfig(chunk_size=text)


@pytest.mark.parametrize("text", ["٣", "1_0", LONG])
def test_a_flag_of_a_tool_is_ascii(text) -> None:
    with pytest.raises(ConfigError, match="chunks"):
        _pools(text)
    with pytest.raises(ConfigError, match="concurrency"):
        _points(Workload(), text, "")
    assert _pools("64, 32") == [32, 64]
