"""The limits of the HTTP server: default, unit, answer and who can reach each, in one table.

``docs/limits.md`` is generated from the fields, here and in the other groups, that were made by
``limit``.
"""

from __future__ import annotations

from chunkllama.config import Bytes, ConfigGroup, limit

_PROTOCOL = "The API's own bound is the highest value."


class LimitsConfig(ConfigGroup):
    """Bounds of what a client can cause; docs/limits.md says who can reach each."""

    max_body_bytes: Bytes = limit(
        2 << 20, "bytes", "tenant", "413 request_too_large", "A request body.",
        "The body is larger than {limit} bytes",
    )  # fmt: skip
    max_header_bytes: Bytes = limit(
        32 << 10, "bytes", "anyone", "431 bad_request", "Request line and headers together.",
        "The headers are too large", ge=1024, le=1 << 20,
    )  # fmt: skip
    max_headers: int = limit(
        100, "headers", "anyone", "431 bad_request", "Headers of a request.",
        "The headers are too large", ge=10, le=1000,
    )  # fmt: skip
    max_body_chunks: int = limit(
        4096, "chunks", "anyone", "400 bad_request",
        "Pieces in which a body arrives, beyond one for each KiB.",
        "The body has too many small chunks", ge=16,
    )  # fmt: skip
    max_connections: int = limit(
        4096, "connections", "anyone", "503 too_many_connections",
        "Open connections; further ones may only send a health check.",
        "Too many connections", ge=1,
    )  # fmt: skip
    max_peer_connections: int | None = limit(
        None, "connections", "anyone", "503 too_many_connections",
        "Open connections of one address, or of one network of 64 bits in IPv6. Default: three "
        "quarters of max_connections.",
        "Too many connections", ge=1,
    )  # fmt: skip
    reserved_connections: int = limit(
        512, "connections", "anyone", "closed",
        "Connections beyond max_connections that may send a health check; the oldest is closed.",
        ge=1,
    )  # fmt: skip
    reserved_seconds: float = limit(
        1.0, "seconds", "anyone", "503 too_many_connections",
        "Time for a connection beyond max_connections to send its health check.",
        "Too many connections", gt=0,
    )  # fmt: skip
    header_timeout_seconds: float = limit(
        10.0, "seconds", "anyone", "408 request_timeout",
        "From a connection, or a later request's first byte, to complete headers. A connection "
        "that has sent nothing is closed.",
        "The request arrived too slowly", gt=0,
    )  # fmt: skip
    body_timeout_seconds: float = limit(
        30.0, "seconds", "anyone", "408 request_timeout",
        "From complete headers to a complete body, beside the time that its bytes take at "
        "min_body_rate.",
        "The request arrived too slowly", gt=0,
    )  # fmt: skip
    min_body_rate: int = limit(
        16 << 10, "bytes/s", "anyone", "408 request_timeout",
        "Rate at which a body must arrive at least, after body_timeout_seconds.",
        "The request arrived too slowly", ge=1,
    )  # fmt: skip
    keep_alive_seconds: int = limit(
        75, "seconds", "anyone", "closed", "Idle time of a connection between two requests.", gt=0
    )
    half_close_seconds: float = limit(
        1.0, "seconds", "anyone", "closed",
        "Time between interim responses (100) to a client that has closed its sending side, until "
        "the response begins; they show whether it has left.",
        gt=0,
    )  # fmt: skip
    stream_stall_seconds: float = limit(
        30.0, "seconds", "anyone", "closed",
        "Time in which a client must read some of what waits for it; its request is aborted.",
        gt=0,
    )  # fmt: skip
    stream_first_byte_seconds: float = limit(
        4.0, "seconds", "tenant", "200",
        "Time after which a stream that waits sends its headers and a comment line; an error until "
        "then is a status, later an error event.",
        gt=0,
    )  # fmt: skip
    stream_comment_seconds: float = limit(
        10.0, "seconds", "tenant", "200",
        "Silence after which a stream sends a comment line, so that proxies keep it.", gt=0,
    )  # fmt: skip
    max_stream_backlog: int = limit(
        1 << 16, "tokens", "tenant", "closed",
        "Tokens and log-probability entries that may wait for a client which reads slowly.", gt=0,
    )  # fmt: skip
    max_cache_events: int = limit(
        1 << 16, "events", "operator", "closed",
        "Changes of the cache that may wait for a reader of /admin/cache/events; beyond, it is "
        "disconnected.",
        gt=0,
    )  # fmt: skip
    max_waiting_tokens: int = limit(
        4 << 20, "tokens", "tenant", "429 engine_overloaded",
        "Prompt tokens, once per choice, of requests without a token yet.", gt=0,
    )  # fmt: skip
    max_waiting_chunks: int | None = limit(
        None, "chunks", "tenant", "429 engine_overloaded",
        "Chunks that requests without a token yet will need. Default: 64 times the pool.", gt=0,
    )  # fmt: skip
    max_explanations: int = limit(
        64, "questions", "tenant", "429 engine_overloaded",
        "Questions of /v1/cache/explain without an answer; one key may have as many as are still "
        "free. The engine answers one between two steps.", ge=1,
    )  # fmt: skip
    queue_timeout_seconds: float | None = limit(
        None, "seconds", "tenant", "503 queue_timeout",
        "Wait of a request for its first token. Default: no limit.", gt=0,
    )  # fmt: skip
    request_timeout_seconds: float | None = limit(
        None, "seconds", "tenant", "504 deadline",
        "Duration of a request. Default: no limit.", gt=0,
    )  # fmt: skip
    linger_seconds: float = limit(
        10.0, "seconds", "anyone", "closed",
        "Time in which the rest of a refused body, or what follows headers that cannot be parsed, "
        "is read and dropped, so that the client can read the refusal. Not over TLS.",
        gt=0,
    )  # fmt: skip
    linger_bytes: Bytes = limit(
        256 << 20, "bytes", "anyone", "closed", "Bytes that are read and dropped behind a refusal."
    )
    send_buffer_bytes: Bytes = limit(
        128 << 10, "bytes", "anyone", "waits", "Kernel memory for bytes that a client has not read."
    )
    max_json_depth: int = limit(
        100, "levels", "tenant", "400 invalid_json", "Nesting of a body.",
        "The body is nested deeper than {limit} levels", ge=20, le=200,
    )  # fmt: skip
    max_json_containers: int = limit(
        32_768, "arrays and objects", "tenant", "400 invalid_json",
        "Arrays and objects of a body together, counted before it is parsed.",
        "The body has more than {limit} arrays and objects", ge=100,
    )  # fmt: skip
    max_json_values: int = limit(
        262_144, "values", "tenant", "400 invalid_json",
        "Members and elements of a body together, counted before it is parsed.",
        "The body has more than {limit} values", ge=1000,
    )  # fmt: skip
    max_json_objects: int = limit(
        16_384, "objects", "tenant", "400 invalid_json", "Objects of a body.",
        "The body has more than {limit} objects", ge=100,
    )  # fmt: skip
    max_json_members: int = limit(
        8192, "members", "tenant", "400 invalid_json", "Members of one object.",
        "An object of the body has more than {limit} members", ge=100,
    )  # fmt: skip
    max_choices: int = limit(
        128, "choices", "tenant", "400", f"n and best_of of a request. {_PROTOCOL}",
        "At most {limit} choices are served, got {value}", ge=1, le=128,
    )  # fmt: skip
    max_request_choices: int = limit(
        1024, "choices", "tenant", "400", "Prompts times choices of one request.",
        "The request asks for {value} choices, at most {limit} are allowed", ge=1,
    )  # fmt: skip
    max_stop_strings: int = limit(
        64, "strings", "tenant", "400",
        f"Stop strings of a request: each is looked for in each piece of the text. {_PROTOCOL}",
        "At most {limit} stop strings are served, got {value}", ge=1, le=256,
    )  # fmt: skip
    max_stop_chars: int = limit(
        1024, "characters", "tenant", "400",
        "Stop strings of a request to /v1/messages or Ollama's API together, each counted as 16 at "
        "least: the time to look for them in a piece of the text.",
        "The stop strings have {value} characters (each counts as 16 at least), at most {limit} "
        "are served",
        ge=16, le=16_384,
    )  # fmt: skip
    max_tools: int = limit(
        1024, "tools", "tenant", "400",
        "Tools of a request to /v1/messages or Ollama's API.",
        "At most {limit} tools are served, got {value}", ge=1, le=4096,
    )  # fmt: skip
    max_stop_token_ids: int = limit(
        256, "token ids", "tenant", "400", f"Stop tokens of a request. {_PROTOCOL}",
        "At most {limit} stop tokens are served, got {value}", ge=1, le=256,
    )  # fmt: skip
    max_logit_bias: int = limit(
        1024, "entries", "tenant", "400", f"Entries of logit_bias. {_PROTOCOL}",
        "At most {limit} entries are served, got {value}", ge=1, le=1024,
    )  # fmt: skip
    max_bad_words: int = limit(
        64, "words", "tenant", "400", f"Entries of bad_words. {_PROTOCOL}",
        "At most {limit} words are served, got {value}", ge=1, le=64,
    )  # fmt: skip
    max_allowed_token_ids: int = limit(
        65_536, "token ids", "tenant", "400", f"Entries of allowed_token_ids. {_PROTOCOL}",
        "At most {limit} allowed tokens are served, got {value}", ge=1, le=65_536,
    )  # fmt: skip
    max_logprobs: int = limit(
        20, "tokens", "tenant", "400",
        f"Tokens per position whose log-probabilities a request may ask for. {_PROTOCOL}",
        "At most {limit} log-probabilities are served, got {value}", ge=0, le=20,
    )  # fmt: skip
    max_answer_logprobs: int = limit(
        1 << 20, "log-probabilities", "tenant", "400",
        "Log-probabilities that an answer of several choices or prompts may hold, unless it is "
        "streamed.",
        "The answer could hold {value} log-probabilities, at most {limit} are served; ask for "
        "fewer choices, tokens or prompts, or for a stream",
        ge=1,
    )  # fmt: skip
    max_schema_chars: int = limit(
        128 << 10, "characters", "tenant", "400", "A JSON schema as text.",
        "{param} must have 1 to {limit} characters, got {value}", ge=100,
    )  # fmt: skip
    max_schema_depth: int = limit(
        64, "levels", "tenant", "400", "Nesting of a JSON schema.",
        "The schema is nested deeper than {limit} levels", ge=1, le=100,
    )  # fmt: skip
    max_schema_values: int = limit(
        2048, "values", "tenant", "400", "Values of one list in a JSON schema, e.g. of an enum.",
        "The schema has a list of over {limit} values", ge=1,
    )  # fmt: skip
    max_joined_texts: int = limit(
        8, "constraints", "tenant", "400 grammar_too_complex",
        "Patterns, formats and lengths of a JSON schema that one value must obey together "
        "(multipleOf counts as five): the time to join them has no bound.",
        "The schema joins over {limit} patterns, formats, lengths or multiples in one value",
        ge=6,
    )  # fmt: skip
    max_pattern_properties: int = limit(
        64, "patterns", "tenant", "400 grammar_too_complex",
        "patternProperties of one object in a JSON schema: each is compared with each.",
        "The schema has an object of over {limit} patternProperties", ge=1,
    )  # fmt: skip
    max_schema_work: int = limit(
        10_000, "subschemas", "tenant", "400 grammar_too_complex",
        "Subschemas of a JSON schema; a chain of references may have a few hundred links.",
        "The schema has over {limit} parts, or too long a chain of references", ge=100,
    )  # fmt: skip
    max_regex_chars: int = limit(
        8 << 10, "characters", "tenant", "400", "A regular expression as text.",
        "{param} must have 1 to {limit} characters, got {value}", ge=1,
    )  # fmt: skip
    max_grammar_chars: int = limit(
        64 << 10, "characters", "tenant", "400", "A Lark grammar, or a list of choices, as text.",
        "{param} must have 1 to {limit} characters, got {value}", ge=1,
    )  # fmt: skip
    max_forced_chars: int = limit(
        2048, "characters", "tenant", "400 grammar_too_complex",
        "Text that a grammar leaves no choice in: each of its tokens costs its whole length.",
        "The grammar forces over {limit} characters in a row; shorten its constants or lower its "
        "repeat counts",
        ge=1,
    )  # fmt: skip
    max_expanded_chars: int = limit(
        1_000_000, "characters", "tenant", "400 grammar_too_complex",
        "A regular expression or grammar with all its repeats written out.",
        "The grammar has over {limit} characters when its repeats are written out", ge=1,
    )  # fmt: skip
    grammar_seconds: float = limit(
        2.0, "seconds", "tenant", "400 grammar_too_complex", "Compilation of a grammar.",
        "Compiling takes longer than {limit:g} s", gt=0,
    )  # fmt: skip
    grammar_wait_seconds: float = limit(
        10.0, "seconds", "tenant", "503 grammar_compiler_busy",
        "Wait of a grammar for the compilation of others.",
        "The grammar compiler is busy with {value}", gt=0,
    )  # fmt: skip
    max_template_chars: int = limit(
        64 << 10, "characters", "tenant", "400",
        "A chat_template in a request, where those are trusted.",
        "chat_template has {value} characters; at most {limit}", ge=1,
    )  # fmt: skip
    text_offload_chars: int = limit(
        8192, "characters", "tenant", "waits",
        "Longer bodies are read, and longer texts tokenized, one after the other in a thread for "
        "each, beside the event loop.",
        ge=0,
    )  # fmt: skip
    text_seconds: float = limit(
        10.0, "seconds", "tenant", "503 tokenizer_busy",
        "Reading of one request's body, and tokenization of its text, with the wait for others.",
        "Too many long requests are being read", gt=0,
    )  # fmt: skip
    dashboard_seconds: float = limit(
        0.5, "seconds", "tenant", "waits",
        "Age up to which all viewers of /dashboard share one snapshot of the tree.", ge=0,
    )  # fmt: skip
    dashboard_nodes: int = limit(
        4000, "chunks", "tenant", "left out", "Chunks of the tree that /dashboard shows.", ge=1
    )


DEFAULT_LIMITS = LimitsConfig()
