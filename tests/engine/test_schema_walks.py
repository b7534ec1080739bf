"""Random schemas: what their grammars allow is valid by the schema, as another library reads it."""

from __future__ import annotations

import json
import random
from typing import Any

import jsonschema_rs
import numpy as np
import pytest

from chunkllama.errors import InvalidRequestError
from chunkllama.sampling_params import GrammarSpec
from chunkllama_server.api.common.schema_bounds import bound_grammar
from chunkllama_server.api.common.schema_levels import prepare_schema
from chunkllama_server.transport.errors import ApiError

VOCAB, EOS, NUM_TOKENS = 49152, 2, 400
NAMES = ["a", "b", "ünï", "x y", 'q"t']
FORMATS = ["date", "date-time", "time", "duration", "email", "hostname", "ipv4", "uuid", "uri", "x"]
# Without a finite text, or without any; and a recursive definition that is no plain object beside
# other keywords, which the grammar library does not read.
REFUSALS = (
    *("without end", "nsatisfiable", "nothing matches"),
    *("circular references with sibling keys", "intersection stack level exceeded"),
)


class Writer:
    """Writes schemas of definitions A and B, which may refer to themselves and each other."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def _often(self, share: float) -> bool:
        return self._random.random() < share

    def whole(self) -> dict[str, Any]:
        definitions = {"A": self.object(1), "B": self.schema(2)}
        return {**self.schema(3), "$defs": definitions}

    def schema(self, depth: int) -> dict[str, Any]:
        if depth <= 0 or self._often(0.3):
            return self._random.choice([self._text, self._number, self._fixed, self._reference])()
        kinds = [self.object, self._object_and_more, self._list, self._tuple, self._one_of]
        return self._random.choice(kinds)(depth)

    def object(self, depth: int) -> dict[str, Any]:
        names = self._random.sample(NAMES, self._random.randint(0, 3))
        required = [name for name in names if self._often(0.5)]
        properties = {name: self.schema(depth - 1) for name in names}
        return {"type": "object", "properties": properties, "required": required}

    def _object_and_more(self, depth: int) -> dict[str, Any]:
        joined = self.object(depth)
        if self._often(0.3):
            joined["additionalProperties"] = self.schema(0)
        if self._often(0.2):
            joined[self._random.choice(["minProperties", "maxProperties"])] = 1
        if self._often(0.3):
            joined["anyOf"] = [self.object(depth - 1), self._reference()]
        if self._often(0.3):
            joined["allOf"] = [self.object(depth - 1), self._reference()]
        return joined

    def _list(self, depth: int) -> dict[str, Any]:
        counts = {"minItems": self._random.randint(0, 1), "maxItems": 2}
        return {"type": "array", "items": self.schema(depth - 1), **counts}

    def _tuple(self, depth: int) -> dict[str, Any]:
        items = [self.schema(depth - 1) for _ in range(2)]
        return {"type": "array", "prefixItems": items, "items": False, "minItems": 1}

    def _one_of(self, depth: int) -> dict[str, Any]:
        return {"anyOf": [self.schema(depth - 1) for _ in range(2)], "title": "T"}

    def _text(self) -> dict[str, Any]:
        more = [{"maxLength": 5}, {"minLength": 2, "maxLength": 4}, {"pattern": "^[a-c]{1,4}$"},
                {"pattern": "^x|y$"}, {"format": self._random.choice(FORMATS)}]  # fmt: skip
        return {"type": "string", **self._random.choice(more)}

    def _number(self) -> dict[str, Any]:
        low, high = self._random.randint(-5, 3), self._random.randint(3, 9)
        bounds = [{"minimum": low}, {"maximum": high}, {"exclusiveMinimum": low, "maximum": high}]
        kind = self._random.choice(["integer", "number"])
        return {"type": kind, **self._random.choice(bounds)}

    def _fixed(self) -> dict[str, Any]:
        values = ["a", 1, None, True, {"k": 1}, [1]]
        listed = {"enum": self._random.sample(values, 2)}
        kinds = {"type": self._random.sample(["string", "null", "boolean"], 2)}
        return self._random.choice([listed, {"const": self._random.choice(values)}, kinds])

    def _reference(self) -> dict[str, Any]:
        beside = [{}, {"description": "d"}, {"required": ["a"]}, {"properties": {"b": {}}}]
        name = self._random.choice("AB")
        return {"$ref": f"#/$defs/{name}", **self._random.choice(beside)}


def walk(matcher, tokenizer, rng) -> str | None:
    """The text of tokens drawn from what the grammar allows; None for one that takes too many."""
    ids: list[int] = []
    while not matcher.is_finished:
        mask = np.zeros(VOCAB // 32, np.int32)
        matcher.fill_mask(mask)
        token = int(
            rng.choice(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")))
        )
        if token == EOS:
            break
        assert matcher.accept(token)
        ids.append(token)
        if len(ids) == NUM_TOKENS:
            return None
    return tokenizer.decode(ids)


def check_walks(compiler, tokenizer, seed: int) -> int:
    """Number of whole texts of two, all valid."""
    schema = Writer(seed).whole()
    try:
        prepared = prepare_schema(schema, "s", strict=False)
        text = json.dumps(prepared.schema)
        grammar = bound_grammar(GrammarSpec(kind="json_schema", text=text), 256)
        matchers = [compiler.matcher(grammar, []) for _ in range(2)]
    except (ApiError, InvalidRequestError) as error:
        assert any(words in str(error) for words in REFUSALS), (str(error), schema)
        return 0
    validator = jsonschema_rs.validator_for(schema, validate_formats=True)
    texts = [walk(m, tokenizer, np.random.default_rng(i)) for i, m in enumerate(matchers)]
    whole = [text for text in texts if text is not None]
    left_out = [path for path in prepared.left_out if not path.endswith(".format")]
    for text in whole:
        errors = [str(error) for error in validator.iter_errors(json.loads(text))]
        assert left_out or not errors, (errors[0], text, schema)
    return len(whole)


def test_walks_of_random_schemas(compiler, tokenizer):
    assert sum(check_walks(compiler, tokenizer, seed) for seed in range(30)) > 40


@pytest.mark.nightly
@pytest.mark.parametrize("block", range(10))
def test_many_walks_of_random_schemas(compiler, tokenizer, block):
    seeds = range(1000 + 200 * block, 1200 + 200 * block)
    assert sum(check_walks(compiler, tokenizer, seed) for seed in seeds) > 200
