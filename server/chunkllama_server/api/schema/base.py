"""Define what every request model shares: strict types, no NaN, unknown fields kept to be named.

Descriptions begin with how a field is handled: Honoured, Validated (without effect on the output),
Ignored, Ignored and named (in a response header; strict mode refuses it), or Refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

from chunkllama.rests import rest
from chunkllama_server.api.schema.spellings import Word, kinds_of, plain_value, scalar_reader

StopString = Annotated[str, StringConstraints(min_length=1, max_length=256)]
# Report only the first invalid element of a list: each report costs microseconds.
TokenIds = Annotated[list[Annotated[int, Field(ge=0, le=2**31 - 1)]], Field(fail_fast=True)]
LogitBias = Annotated[float, Field(ge=-100, le=100)]
MAX_TOKENS = 2**31 - 1
MAX_STOPS = 256  # the highest value of max_stop_strings
MOST_STOPS = 1024  # of the protocols whose stop strings max_stop_chars bounds
MOST_TOOLS = 4096
REFUSED = "Refused."
NAMED = "Ignored and named"
# Refused fields of which an empty object asks for nothing.
EMPTY_OBJECT_IS_ABSENT = frozenset(("kv_transfer_params", "vllm_xargs"))
MAX_SEED = 2**63 - 1


class RequestModel(BaseModel):
    """Base of request models; ``null`` equals absent wherever a field's type allows it.

    Values are read as clients write them (``spellings``): 5.0 is an integer, "0.7" a number and
    "false" a flag.
    """

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _accept_client_spellings(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        names, empty, blank = cls.wire_names(), cls._empty_objects(), cls._blank_fields()
        scalars = cls._scalars()

        def read(name: str, value: Any) -> Any:
            if value == [] and name in empty:
                return empty[name]
            if value == "" and name in blank:
                return None
            if name in scalars:
                return scalars[name](value)
            return plain_value(name, value) if name in names else value

        return {
            name: read(name, value)
            for name, value in data.items()
            if value is not None or name != "model"
        }

    @classmethod
    @cache
    def wire_names(cls) -> frozenset[str]:
        return frozenset(field.alias or name for name, field in cls.model_fields.items())

    @classmethod
    @cache
    def _empty_objects(cls) -> dict[str, Any]:
        """What ``[]``, as PHP writes an empty object, is for the fields that are objects."""
        found: dict[str, Any] = {}
        for name, field in cls.model_fields.items():
            kinds = set(kinds_of(field.annotation))
            is_object = any(
                kind is dict or (isinstance(kind, type) and issubclass(kind, BaseModel))
                for kind in kinds
            )
            if is_object and list not in kinds and Any not in kinds:
                found[field.alias or name] = None if type(None) in kinds else {}
        return found

    @classmethod
    @cache
    def _blank_fields(cls) -> frozenset[str]:
        """Fields of numbers, flags and fixed words, which forms send as "" where nothing is set."""
        found = set()
        for name, field in cls.model_fields.items():
            kinds = set(kinds_of(field.annotation))
            if type(None) in kinds and kinds <= {type(None), int, float, bool, Word}:
                found.add(field.alias or name)
        return frozenset(found)

    @classmethod
    @cache
    def _scalars(cls) -> dict[str, Callable[[Any], Any]]:
        """What reads each field that is one flag or one number."""
        found = {
            field.alias or name: scalar_reader(field.annotation)
            for name, field in cls.model_fields.items()
        }
        return {name: read for name, read in found.items() if read is not None}

    # Whether an unknown field that would constrain the answer is refused; requests that the dialect
    # table translates are checked there.
    refuses_binding: ClassVar[bool] = False
    # Settings that bound the lengths of fields, where they are not those of OpenAI's API.
    own_limits: ClassVar[Mapping[str, str]] = {}

    def is_skipped(self) -> bool:
        """Whether the whole object is left out of the request and named."""
        return False


def walk_fields(
    model: BaseModel, prefix: str = ""
) -> Iterator[tuple[str, Literal["unknown", "refused"]]]:
    """Paths of the fields a client sent that no model knows, or that are known and not served."""
    rest()
    if isinstance(model, RequestModel) and model.is_skipped():
        yield prefix.removesuffix("."), "unknown"
        return
    for name, value in (model.model_extra or {}).items():
        if value is not None:
            yield f"{prefix}{name}", "unknown"
    fields = type(model).model_fields
    for name in sorted(model.model_fields_set & fields.keys()):
        value = getattr(model, name)
        path = f"{prefix}{fields[name].alias or name}"
        description = fields[name].description or ""
        is_absent = value in (None, "", []) or (value == {} and name in EMPTY_OBJECT_IS_ABSENT)
        if not is_absent and description == REFUSED:
            yield path, "refused"
        if value not in (None, False) and description.startswith(NAMED):
            yield path, "unknown"
        yield from _nested(value, path)


def _nested(value: Any, path: str) -> Iterator[tuple[str, Literal["unknown", "refused"]]]:
    if isinstance(value, BaseModel):
        yield from walk_fields(value, f"{path}.")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            if isinstance(item, BaseModel):
                yield from walk_fields(item, f"{path}[{index}].")


class StreamOptions(RequestModel):
    """Options of a streamed answer."""

    include_usage: bool | None = Field(
        default=None,
        description="Honoured: a last chunk with usage; every other chunk has usage null.",
    )
    continuous_usage_stats: bool | None = Field(
        default=None,
        description="Honoured: with include_usage, each chunk carries the usage so far.",
    )
    include_obfuscation: bool | None = Field(
        default=None, description="Ignored: no padding is sent, which is what false asks for."
    )


class PromptCacheOptions(RequestModel):
    """How a prompt is kept for later requests."""

    mode: Literal["implicit", "explicit"] | None = Field(
        default=None,
        description="Honoured: implicit (default) stores the whole prompt, explicit only up to "
        "the last breakpoint; explicit without a breakpoint stores nothing.",
    )
    ttl: str | None = Field(
        default=None,
        pattern=r"^[0-9]{1,5}[smh]$",
        description='Honoured: the least time the prefix is kept, e.g. "30m" (the only value in '
        "strict mode), inside the server's pin budget.",
    )


class PromptCacheBreakpoint(RequestModel):
    """The end of a reusable prefix."""

    mode: Literal["explicit"] = Field(default="explicit", description="Honoured.")


class StructuredOutputs(RequestModel):
    """A constraint on the output: exactly one of its fields."""

    json_: str | dict[str, Any] | None = Field(
        default=None, alias="json", description="Honoured: a JSON schema, as an object or as text."
    )
    regex: str | None = Field(default=None, description="Honoured: the output matches it.")
    choice: list[str] | None = Field(
        default=None,
        min_length=1,
        max_length=1024,
        fail_fast=True,
        description="Honoured: the output is one of these.",
    )
    grammar: str | None = Field(
        default=None, description="Honoured: a grammar in Lark's syntax or GBNF (with ::=)."
    )
    json_object: bool | None = Field(
        default=None, description="Honoured: true asks for any JSON object."
    )
    structural_tag: Any = Field(default=None, description="Refused.")


class CacheFields(RequestModel):
    """Prompt-cache fields, the same on every endpoint that generates."""

    prompt_cache_key: str | None = Field(
        default=None,
        max_length=1024,
        description="Validated: prefixes are shared by their content, so a key has nothing to add.",
    )
    prompt_cache_options: PromptCacheOptions | None = Field(default=None, description="Honoured.")
    prompt_cache_retention: Literal["in_memory", "in-memory", "24h"] | None = Field(
        default=None,
        description="Honoured (deprecated): 24h is a ttl of 24 hours; in_memory is the default.",
    )
    cache_salt: str | None = Field(
        default=None,
        min_length=1,
        max_length=1024,
        description="Honoured: narrows cache sharing to requests of this key with this salt.",
    )


class ExplainField(RequestModel):
    """The field that asks why a prompt was not cached."""

    explain_cache: bool | None = Field(
        default=None,
        description="Honoured: the usage details say why the match in the cache ended, as with the "
        "header x-chunkllama-explain: 1.",
    )


class ParallelBranches(RequestModel):
    """Branches of one answer that are generated at the same time."""

    branches: Annotated[list[str], Field(min_length=1, max_length=128, fail_fast=True)] = Field(
        description="Honoured: the text that each branch begins with. The prompt is computed once."
    )
    join: Literal["concat", "json", "last"] = Field(
        default="concat",
        description="Honoured: the answer is the branches' texts and what the model writes after "
        "reading them, as one text (concat) or as a JSON object with branches and answer (json), "
        "or only the latter (last).",
    )
    join_tokens: int | None = Field(
        default=None,
        ge=0,
        le=MAX_TOKENS,
        description="Honoured: tokens written after the join at most; 0 ends the answer with the "
        "branches. Default: the limit of a branch, which is the request's limit of tokens.",
    )


class GenerationFields(CacheFields, ExplainField):
    """Sampling fields that every endpoint has that generates text."""

    top_k: int | None = Field(
        default=None, ge=-1, le=MAX_TOKENS, description="Honoured: -1 and 0 are off."
    )
    min_p: float | None = Field(default=None, ge=0, le=1, description="Honoured.")
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2, description="Honoured.")
    presence_penalty: float | None = Field(default=None, ge=-2, le=2, description="Honoured.")
    repetition_penalty: float | None = Field(default=None, gt=0, le=100, description="Honoured.")
    logit_bias: dict[str, LogitBias] | None = Field(
        default=None,
        max_length=1024,
        description="Honoured: token id to a value in [-100, 100].",
    )
    seed: int | None = Field(
        default=None,
        ge=-MAX_SEED - 1,
        le=MAX_SEED,
        description="Honoured: the same seed and parameters give the same output.",
    )
    stop: (
        StopString | Annotated[list[StopString], Field(max_length=MAX_STOPS, fail_fast=True)] | None
    ) = Field(
        default=None,
        description="Honoured: strings of 1 to 256 characters, not in the text; up to the setting "
        "max_stop_strings.",
    )
    stop_token_ids: TokenIds | None = Field(default=None, max_length=256, description="Honoured.")
    include_stop_str_in_output: bool | None = Field(default=None, description="Honoured.")
    ignore_eos: bool | None = Field(default=None, description="Honoured.")
    min_tokens: int | None = Field(default=None, ge=0, le=MAX_TOKENS, description="Honoured.")
    skip_special_tokens: bool | None = Field(default=None, description="Honoured. Default true.")
    bad_words: list[StopString] | None = Field(
        default=None, max_length=64, description="Honoured: these words are never generated."
    )
    allowed_token_ids: TokenIds | None = Field(
        default=None,
        min_length=1,
        max_length=65536,
        description="Honoured: only these are generated.",
    )
    structured_outputs: StructuredOutputs | None = Field(default=None, description="Honoured.")
    parallel: ParallelBranches | None = Field(
        default=None,
        description="Honoured: branches of one answer. In a stream, choices and text deltas carry "
        "the index of their branch; what follows the join has none.",
    )
    truncate_prompt_tokens: int | None = Field(
        default=None, ge=1, le=MAX_TOKENS, description="Honoured: keeps the prompt's last N tokens."
    )
    priority: int | None = Field(
        default=None,
        ge=-1000,
        le=1000,
        description="Honoured: lower is served first, and 1000 as a batch's line. Default 0.",
    )


class SamplingFields(GenerationFields):
    """Sampling fields that chat and text completions share."""

    model: str = Field(
        default="",
        description="Honoured: a served model name; another is 404. Absent: the served model.",
    )
    temperature: float | None = Field(
        default=None, ge=0, le=2, description="Honoured: 0 is greedy. Default 1 or the model's."
    )
    top_p: float | None = Field(
        default=None, ge=0, le=1, description="Honoured: 0 keeps the single best token."
    )
    n: int | None = Field(
        default=None, ge=1, le=128, description="Honoured: choices; the prompt is computed once."
    )
    use_beam_search: bool | None = Field(
        default=None,
        description="Honoured: n beams; temperature 0 or absent; no stream, logprobs or grammar.",
    )
    length_penalty: float | None = Field(
        default=None, ge=-10, le=10, description="Honoured with beam search."
    )
    prompt_logprobs: int | None = Field(
        default=None,
        ge=0,
        le=20,
        description="Honoured: not with stream. Recomputes the whole prompt.",
    )
    stream: bool | None = Field(default=None, description="Honoured.")
    stream_options: StreamOptions | None = Field(
        default=None, description="Honoured: without stream there is nothing to do."
    )
    return_token_ids: bool | None = Field(
        default=None, description="Honoured: prompt_token_ids and each choice's token_ids."
    )
    return_tokens_as_token_ids: bool | None = Field(
        default=None, description="Honoured: log-probability tokens read token_id:N."
    )
    user: str | None = Field(default=None, max_length=512, description="Validated (deprecated).")
    request_id: str | None = Field(
        default=None, max_length=256, description="Ignored: send the x-request-id header instead."
    )
    session_id: str | None = Field(
        default=None, max_length=256, description="Ignored: the prefix tree needs no session."
    )
    stream_interval: int | None = Field(
        default=None, ge=1, le=1024, description="Ignored: each step's tokens are sent at once."
    )
    kv_transfer_params: Any = Field(default=None, description="Refused.")
    vllm_xargs: Any = Field(default=None, description="Refused.")
